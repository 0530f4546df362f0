"""How a guard ends, and what becomes of the exception that its body raised."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import pytest

import hwpoison
from tests.live.conftest import known
from tests.live.frames import PAGE
from tests.live.guarded import PAGES, known_memory, lose
from tests.live.process import Child
from tests.support import SECONDS_MAX, need


@pytest.fixture
def memory(manager: hwpoison.Manager) -> hwpoison.Memory:
    return known_memory(manager)


# --- how it ends ------------------------------------------------------------------------------------------------------


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


# --- system calls -----------------------------------------------------------------------------------------------------


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


def test_efault_of_lost_bytes_in_the_ordinary_view_becomes_poison_error_of_those_and_no_others(
    manager: hwpoison.Manager, memory: hwpoison.Memory
) -> None:
    need(not manager.connection.user_mode, "faults of system calls come to the manager")
    lose(manager, memory, 2, 4, 5)
    reader, writer = os.pipe()
    try:
        with pytest.raises(hwpoison.PoisonError) as caught, hwpoison.guard(memory):
            os.write(writer, memory.buffer[4 * PAGE : 6 * PAGE])
    finally:
        os.close(reader)
        os.close(writer)
    assert caught.value.ranges == (("t", 4 * PAGE, PAGE),)
    assert isinstance(caught.value.__cause__, OSError)


def test_efault_that_lost_bytes_cannot_be_the_reason_of_passes_as_it_is(
    manager: hwpoison.Manager, memory: hwpoison.Memory
) -> None:
    need(not manager.connection.user_mode, "faults of system calls come to the manager")
    other = manager.allocate(PAGE, "other")
    other.buffer[0] = 1
    lose(manager, memory, 2)
    lose(manager, other, 0)
    reader, writer = os.pipe()
    try:
        with pytest.raises(OSError, match="Bad address") as caught, hwpoison.guard(memory):
            os.write(writer, other.buffer)
    finally:
        os.close(reader)
        os.close(writer)
    assert type(caught.value) is OSError
    assert not hasattr(caught.value, "__notes__")


USER_MODE = """
def tried(memory, view, call=os.write):
    try:
        with hwpoison.guard(memory) as safe:
            call(writer, view(safe))
    except OSError as error:
        return [type(error).__name__, error.errno, getattr(error, "__notes__", [])]

with hwpoison.Manager() as manager:
    reader, writer = os.pipe()
    say(manager.connection.user_mode)
    memory = manager.allocate(64 * 4096, "t", populate=False)
    memory.buffer[:4096] = bytes(range(256)) * 16
    hear()
"""


def test_efault_of_a_page_that_is_not_present_is_not_told_as_a_loss_but_with_what_may_be_one(
    nobody: Callable[..., Child],
) -> None:
    code = """
    absent = lambda safe: safe.buffer[-4096:]
    say(tried(memory, absent))
    memory.buffer[32 * 4096] = 1
    manager.inject(memory, 32 * 4096)
    say(tried(memory, absent))
    say(tried(memory, lambda safe: safe.buffer[:4096]))
    memory.prefetch()
    say(tried(memory, absent))
    say(tried(memory, lambda safe: safe.buffer[32 * 4096 :]))
"""
    with nobody(USER_MODE + code) as child:
        need(child.hear(), "user mode for unprivileged processes: /dev/userfaultfd is open to them")
        child.tell()
        assert child.hear() == ["OSError", 14, []], "nothing is lost"
        kind, _, (note,) = child.hear()
        assert kind == "OSError"
        assert f"name='t', offset={32 * PAGE}, nbytes={PAGE}" in note
        assert "not present" in note
        assert child.hear() is None, "what is present can be read"
        assert child.hear() is None, "what was brought in can be read"
        assert child.hear() == ["PoisonError", 133, []], "nothing else can be the reason any more"
        assert child.wait() == 0


def test_efault_is_not_taken_for_a_loss_while_another_memory_may_be_the_reason(nobody: Callable[..., Child]) -> None:
    code = """
    memory.prefetch()
    manager.inject(memory, 0)
    other = manager.allocate(4096, "other", populate=False)
    say(tried(memory, lambda safe: other.buffer))
    other.prefetch()
    say(tried(memory, lambda safe: safe.buffer))
    again = manager.attach("t")
    say(tried(memory, lambda safe: again.buffer))
    again.close()
    with open("book", "wb") as file:
        file.write(b"x" * 8192)
    book = manager.open("book", "r+")
    book.prefetch()
    say(tried(memory, lambda safe: [book.buffer[:1]], lambda _, view: os.write(writer, b"y") and os.readv(reader, view)))
    say(bytes(book.buffer[:1]).decode())
"""
    with nobody(USER_MODE + code) as child:
        need(child.hear(), "user mode for unprivileged processes: /dev/userfaultfd is open to them")
        child.tell()
        for expected in ("OSError", "PoisonError", "PoisonError", "OSError"):
            kind, _, notes = child.hear()
            assert kind == expected
            assert len(notes) == (kind == "OSError")
        assert child.hear() == "x"
        assert child.wait() == 0
