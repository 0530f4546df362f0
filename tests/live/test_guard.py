"""Guards, sentence by sentence: what is met through their views is raised, and nothing that was computed from it leaves."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import hwpoison
from tests.live.conftest import known
from tests.live.frames import PAGE, can_see_frames, frame_at
from tests.live.guarded import PAGES, known_memory, lose, repair
from tests.live.process import Child


@pytest.fixture
def memory(manager: hwpoison.Manager) -> hwpoison.Memory:
    return known_memory(manager)


# --- what a view shows ------------------------------------------------------------------------------------------------


def test_a_guarded_view_shows_the_live_content_and_cannot_be_written(memory: hwpoison.Memory) -> None:
    with hwpoison.guard(memory) as safe:
        assert bytes(safe.buffer) == known(PAGES * PAGE)
        memory.buffer[PAGE] = 7
        assert safe.buffer[PAGE] == 7
        with pytest.raises(TypeError):
            safe.buffer[0] = 1
        with pytest.raises(ValueError):
            safe.array("u4", (2, 5), offset=8)[0, 0] = 1
        assert (
            safe.array("u4", (2, 5), offset=8, order="F").tolist()
            == memory.array("u4", (2, 5), offset=8, order="F").tolist()
        )
        assert safe.address != memory.address


def test_one_memory_gives_one_view_and_several_give_a_tuple(manager: hwpoison.Manager, memory: hwpoison.Memory) -> None:
    other = manager.allocate(PAGE, "other")
    with hwpoison.guard(memory) as safe:
        assert isinstance(safe, hwpoison.SafeView)
    with hwpoison.guard(memory, other) as views:
        assert [view.memory for view in views] == [memory, other]
    with pytest.raises(ValueError):
        hwpoison.guard()


def test_a_guard_over_several_memories_raises_for_what_was_met_in_all(
    manager: hwpoison.Manager, memory: hwpoison.Memory
) -> None:
    other = manager.allocate(3 * PAGE, "other")
    other.buffer[2 * PAGE] = 1
    lose(manager, memory, 1)
    lose(manager, other, 2)
    with pytest.raises(hwpoison.PoisonError) as caught:
        with hwpoison.guard(memory, other) as (one, two):
            assert one.buffer[PAGE] == two.buffer[2 * PAGE] == 0
    assert caught.value.ranges == (("t", PAGE, PAGE), ("other", 2 * PAGE, PAGE))


def test_a_guard_works_on_a_read_only_file(manager: hwpoison.Manager, file: Callable[..., Path]) -> None:
    path = file(PAGES * PAGE)
    memory = manager.open(path)
    with hwpoison.guard(memory) as safe:
        assert bytes(safe.buffer) == known(PAGES * PAGE)
    os.truncate(path, 5 * PAGE)
    assert manager.inject(memory, 6 * PAGE).victims, "it cannot be read again"
    with pytest.raises(hwpoison.PoisonError) as caught, hwpoison.guard(memory) as safe:
        bytes(safe.buffer)
    assert caught.value.ranges == ((str(path), 6 * PAGE, PAGE),)


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_raises_once_for_each_loss_that_is_met_and_then_arms_again(
    manager: hwpoison.Manager, memory: hwpoison.Memory
) -> None:
    lose(manager, memory, 2, 6)
    with hwpoison.guard(memory) as safe:
        safe.check()
        for page in (2, 6, 2):
            assert safe.buffer[page * PAGE] == 0
            with pytest.raises(hwpoison.PoisonError) as caught:
                safe.check()
            assert caught.value.ranges == (("t", page * PAGE, PAGE),)
            safe.check()
        assert manager.statistics().accesses_to_lost == 3
    with pytest.raises(hwpoison.PoisonError), hwpoison.guard(memory) as safe:
        safe.buffer[2 * PAGE]
        with pytest.raises(hwpoison.PoisonError):
            safe.check()
        safe.buffer[6 * PAGE]


# --- several guards ---------------------------------------------------------------------------------------------------


def test_guards_nest_and_what_the_inner_one_met_does_not_leave_the_outer_one_unnoticed(
    manager: hwpoison.Manager, memory: hwpoison.Memory
) -> None:
    lose(manager, memory, 2, 5)
    with pytest.raises(hwpoison.PoisonError) as outer:
        with hwpoison.guard(memory) as safe:
            seen = safe.buffer[5 * PAGE]
            with pytest.raises(hwpoison.PoisonError) as inner, hwpoison.guard(memory) as nested:
                nested.buffer[2 * PAGE]
            assert ("t", 2 * PAGE, PAGE) in inner.value.ranges
            assert safe.buffer[0] == known(PAGE)[0]
    assert seen == 0
    assert ("t", 5 * PAGE, PAGE) in outer.value.ranges


def test_a_guard_that_begins_among_the_zeros_of_another_raises_too(
    manager: hwpoison.Manager, memory: hwpoison.Memory
) -> None:
    lose(manager, memory, 2)
    first = hwpoison.guard(memory)
    safe = first.__enter__()
    safe.buffer[2 * PAGE]
    with pytest.raises(hwpoison.PoisonError), hwpoison.guard(memory) as second:
        second.buffer[2 * PAGE]
    with pytest.raises(hwpoison.PoisonError):
        first.__exit__(None, None, None)


def test_a_guard_that_begins_among_the_zeros_of_another_and_touches_none_ends_quietly(
    manager: hwpoison.Manager, memory: hwpoison.Memory
) -> None:
    lose(manager, memory, 2)
    with pytest.raises(hwpoison.PoisonError), hwpoison.guard(memory) as safe:
        safe.buffer[2 * PAGE]
        with hwpoison.guard(memory) as second:
            assert second.buffer[PAGE] == known(2 * PAGE)[PAGE]


def test_after_the_last_guard_the_zero_pages_are_gone(manager: hwpoison.Manager, memory: hwpoison.Memory) -> None:
    lose(manager, memory, 2)
    with pytest.raises(hwpoison.PoisonError), hwpoison.guard(memory) as safe, hwpoison.guard(memory) as other:
        assert safe.buffer[2 * PAGE] == other.buffer[2 * PAGE] == 0
        address = safe.address + 2 * PAGE
        assert not can_see_frames() or frame_at(address)
    assert not can_see_frames() or not frame_at(address)
    repair(memory, 2)
    with hwpoison.guard(memory) as safe:
        assert bytes(safe.buffer) == known(PAGES * PAGE)


def test_a_page_that_is_repaired_during_a_guard_is_right_after_its_check(
    manager: hwpoison.Manager, memory: hwpoison.Memory
) -> None:
    lose(manager, memory, 2)
    with hwpoison.guard(memory) as safe:
        safe.buffer[2 * PAGE]
        repair(memory, 2)
        with pytest.raises(hwpoison.PoisonError):
            safe.check()
        assert bytes(safe.buffer) == known(PAGES * PAGE)


def test_a_child_that_is_forked_within_a_guard_does_not_end_it_and_does_not_take_its_zeros_for_content() -> None:
    code = """
with hwpoison.Manager() as manager:
    memory = manager.allocate(4 * 4096, "t")
    memory.array()[:] = 1
    manager.inject(memory, 4096)
    guard = hwpoison.guard(memory)
    safe = guard.__enter__()
    for touch in (False, True):
        seen = safe.buffer[4096] if touch else None
        child = os.fork()
        if not child:
            try:
                guard.__exit__(None, None, None)
            except hwpoison.PoisonError:
                os._exit(3)
            os._exit(0)
        say([seen, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])])
    try:
        guard.__exit__(None, None, None)
    except hwpoison.PoisonError as error:
        say(error.ranges)
    del safe
"""
    with Child(code) as child:
        assert child.hear() == [None, 0]
        assert child.hear() == [0, 3]
        assert child.hear() == [["t", PAGE, PAGE]]
        assert child.wait() == 0


# --- outside of all guards --------------------------------------------------------------------------------------------


LEAKED = """
with hwpoison.Manager() as manager:
    memory = manager.allocate(4 * 4096, "t")
    memory.array()[:] = 1
    manager.inject(memory, 4096)
    try:
        with hwpoison.guard(memory) as safe:
            leaked = safe.buffer
            safe.buffer[4096]
    except hwpoison.PoisonError:
        say()
"""


def test_a_view_that_is_used_after_its_guard_is_a_sigbus_and_never_a_zero() -> None:
    with Child(LEAKED + "    say(leaked[4096])\n    os._exit(0)\n") as child:
        child.hear()
        assert child.wait() == -signal.SIGBUS


def test_a_guard_is_not_hurt_by_a_use_of_its_view_outside_of_all_guards() -> None:
    code = """
    reader, writer = os.pipe()
    try:
        say(os.write(writer, leaked[4096:8192]))
    except OSError as error:
        say(error.errno)
    with hwpoison.guard(memory) as safe:
        say(safe.buffer[0])
    try:
        with hwpoison.guard(memory) as safe:
            safe.buffer[4096]
    except hwpoison.PoisonError as error:
        say(error.ranges)
    del safe, leaked
"""
    with Child(LEAKED + code) as child:
        child.hear()
        assert child.hear() == 14
        assert child.hear() == 1
        assert child.hear() == [["t", PAGE, PAGE]]
        assert child.wait() == 0


def test_guards_are_kept_and_cheap_to_enter_again(manager: hwpoison.Manager, memory: hwpoison.Memory) -> None:
    with hwpoison.guard(memory) as safe:
        address = safe.address
    again = hwpoison.guard(memory)
    for _ in range(3):
        with again as safe:
            assert safe.address == address
    assert manager.objects()[0].mappings == 2
    del safe
    memory.close()
    with pytest.raises(ValueError):
        again.__enter__()
