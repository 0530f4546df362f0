"""Writing back while a failure strikes, and while the object's last user goes."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from hwpoison.core.failure import memory_failure
from hwpoison.core.objects import MemoryObject
from hwpoison.core.pages import DIRTY, LOST, POISONED, WRITEBACK
from hwpoison.core.records import Outcome, Report, State
from hwpoison.core.recovery import write
from hwpoison.core.writeback import write_back_all
from hwpoison.linux.syscalls import PAGE_SIZE
from tests.core.conftest import Core, Run
from tests.support import need


async def dirtied(core: Core, pages: int) -> MemoryObject:
    """A writable file, each page of which is newer than the file."""
    object_ = core.open(core.new_file(pages), writable=True)
    for page in range(pages):
        await write(core.manager, object_, page * PAGE_SIZE, b"new")
    return object_


async def on_its_way(object_: MemoryObject) -> None:
    while not any(object_.pages.runs(WRITEBACK)):  # noqa: ASYNC110  (nothing tells when a page begins its way)
        await asyncio.sleep(0)


def file_content(object_: MemoryObject) -> bytes:
    return Path(object_.name).read_bytes()


def test_a_page_that_was_struck_before_its_turn_is_not_written_to_the_file(run: Run) -> None:
    """What is on a bad frame must not become what the file says. The failure decides first: the page is lost."""

    async def story(core: Core) -> None:
        object_ = await dirtied(core, 4)
        before = object_.locks.hold(2)
        await object_.locks.acquire(before)
        flushing = asyncio.create_task(write_back_all(core.manager, object_))
        await asyncio.sleep(0)
        failing = asyncio.create_task(memory_failure(core.manager, Report(name=object_.name, offset=2 * PAGE_SIZE)))
        await asyncio.sleep(0)
        sequence = object_.error_sequence
        object_.locks.release(before)
        await flushing
        # When the flush has ended, it is known that it could not write everything.
        assert object_.error_sequence == sequence + 1
        failure = await failing
        assert (failure.state, failure.outcome) == (State.DIRTY_FILE, Outcome.RECOVERED)
        content = file_content(object_)
        assert [content[page * PAGE_SIZE :][:3] for page in range(4)] == [b"new", b"new", b"1:2", b"new"]
        assert list(object_.pages.runs(DIRTY)) == []
        assert list(object_.pages.runs(LOST)) == [(2, 1)]

    run(story)


def test_a_page_that_was_struck_and_is_well_after_all_is_written_by_the_same_flush(run: Run) -> None:
    async def story(core: Core) -> None:
        need(core.machine.knows_frames, "the privilege to know frame numbers")
        object_ = await dirtied(core, 1)
        number = object_.store.number(0)  # type: ignore[attr-defined]
        before = object_.locks.hold(0)
        await object_.locks.acquire(before)
        flushing = asyncio.create_task(write_back_all(core.manager, object_))
        failing = asyncio.create_task(memory_failure(core.manager, Report(pfn=number)))
        while not object_.pages.flags[0] & POISONED:  # noqa: ASYNC110  (it looks for the frame in a thread)
            await asyncio.sleep(0)
        # As compaction does it: the bad frame is not the page's any more.
        frame = object_.store.take(0)
        assert frame is not None
        object_.store.publish(0, b"new".ljust(PAGE_SIZE))
        frame.release()
        object_.locks.release(before)
        assert await flushing is None
        assert (await failing).outcome is Outcome.IGNORED
        assert file_content(object_)[:3] == b"new"
        assert list(object_.pages.runs(DIRTY)) == []

    run(story)


def test_pages_that_are_struck_while_they_are_written_are_clean_when_that_has_ended(run: Run) -> None:
    async def story(core: Core) -> None:
        object_ = await dirtied(core, 4)
        flushing = asyncio.create_task(write_back_all(core.manager, object_))
        await on_its_way(object_)
        failure = await memory_failure(core.manager, Report(name=object_.name, offset=PAGE_SIZE))
        assert (failure.state, failure.outcome) == (State.CLEAN_FILE, Outcome.RECOVERED)
        assert await flushing is None

    run(story)


def test_an_object_ends_only_when_everything_is_in_its_file(run: Run) -> None:
    async def story(core: Core) -> None:
        object_ = await dirtied(core, 600)
        # Every second page again, so that these are many writes: another flush is in the middle of them.
        await write_back_all(core.manager, object_)
        for page in range(0, 600, 2):
            await write(core.manager, object_, page * PAGE_SIZE, b"newer")
        flushing = asyncio.create_task(write_back_all(core.manager, object_))
        await on_its_way(object_)
        core.manager.release(object_)
        await core.manager.settled(object_.name)
        assert object_.closed
        content = file_content(object_)
        assert all(content[page * PAGE_SIZE :][:5] == b"newer" for page in range(0, 600, 2))
        await flushing

    run(story)


def test_a_name_is_free_when_the_object_has_settled(run: Run) -> None:
    async def story(core: Core) -> None:
        object_ = await dirtied(core, 1)
        name = object_.name
        core.manager.release(object_)
        with pytest.raises(FileExistsError):
            core.manager.allocate(PAGE_SIZE, name)
        await core.manager.settled(name)
        core.manager.hold(core.manager.allocate(PAGE_SIZE, name))

    run(story)


def test_dirty_pages_that_the_file_does_not_take_stay_dirty_and_the_error_is_kept(run: Run) -> None:
    async def story(core: Core) -> None:
        path = core.new_file(2)
        # Read-only for the manager, though it was told otherwise: every write to it fails.
        object_ = core.open(path)
        assert object_.backing is not None
        object_.backing.writable = True
        await write(core.manager, object_, 0, b"new")
        error = await write_back_all(core.manager, object_)
        assert error is not None
        assert error.errno == errno.EBADF
        assert list(object_.pages.runs(DIRTY)) == [(0, 1)]
        assert object_.error_sequence == 0, "nothing is lost"
        object_.backing.writable = False
        object_.pages.clear(DIRTY, 0)

    run(story)
