"""Guards, sentence by sentence: what is met through their views is raised, and nothing that was computed from it leaves."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy
import pytest

import hwpoison
from tests.live.conftest import known
from tests.live.frames import PAGE, can_see_frames, frame_at
from tests.live.process import Child
from tests.support import SECONDS_MAX

PAGES = 8


@pytest.fixture
def memory(manager: hwpoison.Manager) -> hwpoison.Memory:
    """Anonymous memory with known content."""
    memory = manager.allocate(PAGES * PAGE, "t")
    memory.buffer[:] = known(PAGES * PAGE)
    return memory


def lose(manager: hwpoison.Manager, memory: hwpoison.Memory, *pages: int) -> None:
    """These pages have content, and are lost."""
    for page in pages:
        assert manager.inject(memory, page * PAGE).victims


def repair(memory: hwpoison.Memory, page: int) -> None:
    memory.repair(page * PAGE, known(PAGES * PAGE)[page * PAGE : (page + 1) * PAGE])


# --- what a view shows -----------------------------------------------------------------------------------------------


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


# --- how it ends -----------------------------------------------------------------------------------------------------


def test_a_guard_raises_at_its_end_what_was_met_and_only_that(manager: hwpoison.Manager, memory: hwpoison.Memory) -> None:
    lose(manager, memory, 1, 4, 5, 7)
    ended = False
    with pytest.raises(hwpoison.PoisonError) as caught:
        with hwpoison.guard(memory) as safe:
            assert safe.buffer[5 * PAGE + 9] == 0
            assert bytes(safe.buffer[PAGE : 2 * PAGE]) == bytes(PAGE)
            assert safe.buffer[4 * PAGE] == 0
            ended = True
    assert ended
    error = caught.value
    assert sorted(error.ranges) in (
        [("t", PAGE, PAGE), ("t", 4 * PAGE, 2 * PAGE)],
        [("t", page * PAGE, PAGE) for page in (1, 4, 5)],
    )
    assert (error.errno, error.name, error.offset, error.nbytes) == (133, *error.ranges[0])
    assert error.__cause__ is None
    assert isinstance(error, OSError)


def test_a_guard_that_meets_no_loss_ends_quietly_whatever_is_lost(
    manager: hwpoison.Manager, memory: hwpoison.Memory
) -> None:
    with hwpoison.guard(memory) as safe:
        assert safe.buffer[3 * PAGE] == known(PAGES * PAGE)[3 * PAGE]
        lose(manager, memory, 3)
        assert bytes(safe.buffer[:PAGE]) == known(PAGE)


def test_poison_error_is_raised_from_the_exception_of_the_body(manager: hwpoison.Manager, memory: hwpoison.Memory) -> None:
    lose(manager, memory, 2)
    with pytest.raises(hwpoison.PoisonError) as caught, hwpoison.guard(memory) as safe:
        1 / safe.buffer[2 * PAGE]
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_exception_of_a_body_that_met_nothing_passes_as_it_is(manager: hwpoison.Manager, memory: hwpoison.Memory) -> None:
    lose(manager, memory, 2)
    for error in (KeyError("mine"), OSError(14, "EFAULT of something else")):
        healthy = memory if isinstance(error, KeyError) else manager.allocate(PAGE)
        with pytest.raises(type(error)) as caught, hwpoison.guard(healthy):
            raise error
        assert caught.value is error
        assert not hasattr(error, "__notes__")


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(3), asyncio.CancelledError()], ids=lambda error: type(error).__name__
)
def test_interrupts_exits_and_cancellation_pass_with_a_note(
    error: BaseException, manager: hwpoison.Manager, memory: hwpoison.Memory
) -> None:
    lose(manager, memory, 2)
    with pytest.raises(type(error)) as caught, hwpoison.guard(memory) as safe:
        safe.buffer[2 * PAGE]
        raise error
    assert caught.value is error
    (note,) = error.__notes__
    assert "lost bytes were met" in note
    assert str(2 * PAGE) in note


def test_a_cancelled_task_stays_cancelled(manager: hwpoison.Manager, memory: hwpoison.Memory) -> None:
    lose(manager, memory, 2)

    async def work(started: asyncio.Event) -> None:
        with hwpoison.guard(memory) as safe:
            safe.buffer[2 * PAGE]
            started.set()
            await asyncio.Event().wait()

    async def story() -> bool:
        started = asyncio.Event()
        task = asyncio.create_task(work(started))
        await started.wait()
        task.cancel()
        await asyncio.wait([task], timeout=SECONDS_MAX)
        return task.cancelled()

    assert asyncio.run(story())


# --- system calls ----------------------------------------------------------------------------------------------------


def test_a_system_call_that_reads_lost_bytes_through_a_view_ends_in_poison_error(
    manager: hwpoison.Manager, memory: hwpoison.Memory
) -> None:
    lose(manager, memory, 2)
    reader, writer = os.pipe()
    try:
        with pytest.raises(hwpoison.PoisonError) as caught, hwpoison.guard(memory) as safe:
            os.write(writer, safe.buffer[2 * PAGE : 3 * PAGE])
    finally:
        os.close(reader)
        os.close(writer)
    assert caught.value.ranges == (("t", 2 * PAGE, PAGE),)


def test_efault_of_a_lost_page_becomes_poison_error_for_an_unprivileged_process(nobody: Callable[..., Child]) -> None:
    code = """
with hwpoison.Manager() as manager:
    memory = manager.allocate(4 * 4096, "t")
    memory.array()[:] = 1
    manager.inject(memory, 2 * 4096)
    reader, writer = os.pipe()
    try:
        with hwpoison.guard(memory) as safe:
            os.write(writer, safe.buffer[2 * 4096 :])
    except hwpoison.PoisonError as error:
        say([error.ranges, type(error.__cause__).__name__ if error.__cause__ else None, manager.connection.user_mode])
"""
    with nobody(code) as child:
        ranges, cause, user_mode = child.hear()
        assert ranges == [["t", 2 * PAGE, PAGE]]
        assert cause == ("OSError" if user_mode else None)
        assert child.wait() == 0


# --- check -----------------------------------------------------------------------------------------------------------


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


# --- several guards --------------------------------------------------------------------------------------------------


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


def test_threads_of_native_code_in_one_guard_are_all_seen(manager: hwpoison.Manager) -> None:
    pages = 512
    memory = manager.allocate(pages * PAGE, "t")
    memory.buffer[:] = known(pages * PAGE)
    lost = [3, 130, 255, 300, 511]
    lose(manager, memory, *lost)
    with ThreadPoolExecutor(4) as threads, pytest.raises(hwpoison.PoisonError) as caught:
        with hwpoison.guard(memory) as safe:
            slices = numpy.split(safe.array("u8"), 4)
            sums = list(threads.map(numpy.sum, slices))
            del slices
    assert len(sums) == 4
    met = {page for one in caught.value.ranges for page in range(one.offset // PAGE, (one.offset + one.nbytes) // PAGE)}
    assert met == set(lost)


def test_a_sum_that_leaves_overlapping_guards_without_an_exception_is_right(manager: hwpoison.Manager) -> None:
    pages, rounds, workers = 32, 400, 4
    memory = manager.allocate(pages * PAGE, "t")
    content = known(pages * PAGE)
    memory.buffer[:] = content
    sums = numpy.frombuffer(content, "u8").reshape(pages, -1).sum(axis=1)
    wrong: list[str] = []
    right, refused = count(), count()
    ended = threading.Event()

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(rounds):
            first = chance.randrange(pages)
            last = chance.randint(first, min(first + 4, pages - 1))
            try:
                with hwpoison.guard(memory) as safe:
                    found = safe.array("u8", (pages, PAGE // 8))[first : last + 1].sum(axis=1)
                    if chance.random() < 0.3:
                        safe.check()
            except hwpoison.PoisonError:
                next(refused)
                continue
            if not (found == sums[first : last + 1]).all():
                wrong.append(f"pages {first} to {last}")
            next(right)

    def strike() -> None:
        chance = random.Random(0)
        while not ended.is_set():
            page = chance.randrange(pages)
            manager.inject(memory, page * PAGE)
            if chance.random() < 0.7:
                page = chance.randrange(pages)
            memory.repair(page * PAGE, content[page * PAGE : (page + 1) * PAGE])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, workers + 1)]
    striker = threading.Thread(target=strike)
    for thread in (striker, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    striker.join()
    assert wrong == []
    assert next(right) > 0
    assert next(refused) > 0
    memory.repair(0, content)
    with hwpoison.guard(memory) as safe:
        assert bytes(safe.buffer) == content, "after the last guard all zero pages are gone"


# --- outside of all guards -------------------------------------------------------------------------------------------

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
