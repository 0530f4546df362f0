"""The handler, where the machine or another story gets in its way."""

from __future__ import annotations

import asyncio

import pytest

from hwpoison.core.failure import memory_failure
from hwpoison.core.pages import LOST, POISONED
from hwpoison.core.records import Outcome, Report, State
from hwpoison.core.recovery import discard, write
from hwpoison.core.writeback import write_back_all
from hwpoison.linux.syscalls import PAGE_SIZE
from tests.core.conftest import Core, Run
from tests.large_frames import BLOCK_BYTES, collapse
from tests.support import need

BLOCK_PAGES = BLOCK_BYTES // PAGE_SIZE


def test_two_reports_of_one_page_are_one_failure(run: Run) -> None:
    async def story(core: Core) -> None:
        memory = core.allocate(1)
        await core.bring_in(memory, 0)
        report = Report(name=memory.name, offset=0)
        failures = await asyncio.gather(*(memory_failure(core.manager, report) for _ in range(3)))
        assert [one.state for one in failures] == [State.ANONYMOUS, State.ALREADY_POISONED, State.ALREADY_POISONED]
        assert dict(core.manager.statistics.outcomes) == {"Recovered": 1}
        assert core.manager.statistics.quarantined == 1

    run(story)


def test_failures_of_different_pages_do_not_wait_for_each_other(run: Run) -> None:
    async def story(core: Core) -> None:
        memory = core.allocate(2)
        await core.bring_in(memory, 0, 2)
        async with memory.locks.hold(0):
            held_up = asyncio.create_task(memory_failure(core.manager, Report(name=memory.name, offset=0)))
            await asyncio.sleep(0)
            assert (await memory_failure(core.manager, Report(name=memory.name, offset=PAGE_SIZE))).state is State.ANONYMOUS
            assert not held_up.done()
        assert (await held_up).state is State.ANONYMOUS

    run(story)


def test_a_page_that_is_dropped_while_the_report_waits_is_a_free_page(run: Run) -> None:
    async def story(core: Core) -> None:
        file = core.open(core.new_file(1))
        await core.bring_in(file, 0)
        async with file.locks.hold(0):
            failing = asyncio.create_task(memory_failure(core.manager, Report(name=file.name, offset=0)))
            await asyncio.sleep(0)
            core.manager.reclaim.drop(file, 0, 1)
        failure = await failing
        assert (failure.state, failure.outcome) == (State.FREE, Outcome.RECOVERED)
        assert not file.pages.flags[0]

    run(story)


def test_an_object_that_ends_while_the_report_waits_is_a_truncated_page(run: Run) -> None:
    async def story(core: Core) -> None:
        memory = core.allocate(1)
        await core.bring_in(memory, 0)
        before = memory.locks.hold(0)
        await memory.locks.acquire(before)
        core.manager.release(memory)
        # Its end is first at the lock, and the report comes while it still is an object.
        await asyncio.sleep(0)
        failing = asyncio.create_task(memory_failure(core.manager, Report(name=memory.name, offset=0)))
        await asyncio.sleep(0)
        memory.locks.release(before)
        failure = await failing
        assert (failure.state, failure.outcome) == (State.TRUNCATED, Outcome.IGNORED)

    run(story)


def test_a_page_whose_frame_has_changed_is_left_alone(run: Run) -> None:
    async def story(core: Core) -> None:
        need(core.machine.knows_frames, "the privilege to know frame numbers")
        memory = core.allocate(1)
        content = b"content".ljust(PAGE_SIZE)
        await write(core.manager, memory, 0, content)
        number = memory.store.number(0)  # type: ignore[attr-defined]
        async with memory.locks.hold(0):
            failing = asyncio.create_task(memory_failure(core.manager, Report(pfn=number)))
            while not memory.pages.flags[0] & POISONED:  # noqa: ASYNC110  (it looks for the frame in a thread)
                await asyncio.sleep(0)
            # Another frame with the same content, as compaction makes it.
            frame = memory.store.take(0)
            assert frame is not None
            memory.store.publish(0, content)
            frame.release()
        failure = await failing
        assert (failure.outcome, failure.reason) == (Outcome.IGNORED, "the page has moved to another frame")
        assert memory.store.content(0, 1) == content
        assert not memory.pages.flags[0] & (POISONED | LOST)

    run(story)


def test_a_frame_that_has_gone_back_to_the_system_was_not_isolated(run: Run) -> None:
    async def story(core: Core) -> None:
        need(core.machine.knows_frames, "the privilege to know frame numbers")
        file = core.open(core.new_file(1))
        await core.bring_in(file, 0)
        number = file.store.number(0)  # type: ignore[attr-defined]
        async with file.locks.hold(0):
            failing = asyncio.create_task(memory_failure(core.manager, Report(pfn=number)))
            while not file.pages.flags[0] & POISONED:  # noqa: ASYNC110  (it looks for the frame in a thread)
                await asyncio.sleep(0)
            core.manager.reclaim.drop(file, 0, 1)
        failure = await failing
        assert (failure.state, failure.outcome) == (State.FREE, Outcome.IGNORED)
        assert failure.reason == "the frame has gone back to the system"
        assert not core.manager.statistics.quarantined

    run(story)


@pytest.mark.parametrize("number", [0, 1 << 50])
def test_a_frame_that_cannot_be_is_unknown(run: Run, number: int) -> None:
    async def story(core: Core) -> None:
        memory = core.allocate(16)
        await core.bring_in(memory, 0, 8)
        failure = await memory_failure(core.manager, Report(pfn=number))
        assert (failure.state, failure.outcome, failure.name) == (State.UNKNOWN, Outcome.IGNORED, None)

    run(story)


def test_dirty_pages_that_go_with_a_large_frame_are_an_error_for_flush(run: Run) -> None:
    async def story(core: Core) -> None:
        file = core.open(core.new_file(BLOCK_PAGES), writable=True)
        await core.bring_in(file, 0, BLOCK_PAGES)
        await write(core.manager, file, 9 * PAGE_SIZE, b"new")
        collapse(file.store.fd)  # type: ignore[attr-defined]
        # A clean page is struck, and the dirty one is lost with it.
        failure = await memory_failure(core.manager, Report(name=file.name, offset=5 * PAGE_SIZE))
        assert (failure.state, failure.outcome) == (State.CLEAN_FILE, Outcome.FAILED)
        assert [one[1:] for one in file.lost()] == [(0, BLOCK_PAGES * PAGE_SIZE)]
        assert file.error_sequence == 1
        assert await write_back_all(core.manager, file) is None
        assert await discard(core.manager, file, 0, BLOCK_PAGES) == BLOCK_PAGES * PAGE_SIZE

    run(story)
