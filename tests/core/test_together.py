"""Everything at once, without clients: writes, failures, write-back, dropping, repairs. Each page says what it must hold."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from hwpoison.core.failure import memory_failure
from hwpoison.core.objects import MemoryObject
from hwpoison.core.pages import LOST, PRESENT
from hwpoison.core.records import Outcome, Report, State
from hwpoison.core.recovery import UnreadableError, declare_unreadable, discard, read_in, repair, write
from hwpoison.core.writeback import write_back_all
from hwpoison.errors import PoisonError
from hwpoison.linux.syscalls import PAGE_SIZE
from tests.core.conftest import Core, Run

PAGES_EACH = 6
ROUNDS = 300


class World:
    """One object, whose pages are each written by one of several owners, and struck by anybody."""

    def __init__(self, core: Core, object_: MemoryObject, seed: int) -> None:
        self.core = core
        self.object = object_
        self.chance = random.Random(seed)
        self.running = True
        self.written = 0
        self.lost_found = 0

    async def read(self, page: int) -> bytes | None:
        """What an access finds: the content, or None if the page is lost."""
        object_ = self.object
        async with object_.locks.hold(page):
            flags = object_.pages.flags[page]
            if not flags & (LOST | PRESENT):
                try:
                    await read_in(self.core.manager, object_, page, 1)
                except UnreadableError as error:
                    await declare_unreadable(self.core.manager, object_, page, error)
            if object_.pages.flags[page] & LOST:
                assert page in object_.losses
                return None
            return object_.store.content(page, 1)

    async def owner(self, pages: range) -> None:
        """Writes to its pages, and finds in them what it wrote, or that it is lost, and nothing else."""
        manager, object_ = self.core.manager, self.object
        # What a page held at any time, the newest last: an older one can come back from the file, if it is discarded.
        held = {page: [await self.read(page)] for page in pages}
        for _ in range(ROUNDS):
            # Others have their turn as well, also where nothing has to be waited for.
            for _ in range(self.chance.randrange(4)):
                await asyncio.sleep(0)
            page = self.chance.choice(pages)
            self.written += 1
            content = self.written.to_bytes(8, "big") * (PAGE_SIZE // 8)
            found = await self.read(page)
            assert found is None or found == held[page][-1], f"page {page} holds something else than what was written"
            if found is None:
                self.lost_found += 1
                with pytest.raises(PoisonError):
                    await write(manager, object_, page * PAGE_SIZE + 8, b"part")
                if self.chance.random() < 0.5:
                    await discard(manager, object_, page, 1)
                    found = await self.read(page)
                    assert found is None or found in (*held[page], bytes(PAGE_SIZE))
                    held[page].append(found or bytes(PAGE_SIZE))
                    continue
                # Right away it may have been struck again: then it says so.
                await repair(manager, object_, page * PAGE_SIZE, content)
            else:
                await write(manager, object_, page * PAGE_SIZE, content)
            held[page].append(content)

    async def striker(self) -> None:
        while self.running:
            page = self.chance.randrange(self.object.pages.count)
            failure = await memory_failure(self.core.manager, Report(name=self.object.name, offset=page * PAGE_SIZE))
            if failure.state is State.ALREADY_POISONED:
                assert failure.outcome is Outcome.FAILED
            else:
                assert failure.outcome is Outcome.RECOVERED, failure
            await asyncio.sleep(0)

    async def flusher(self) -> None:
        while self.running:
            assert await write_back_all(self.core.manager, self.object) is None
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("kind", "limit_pages"),
    [("anonymous", None), ("file", None), ("file", 9)],
    ids=["anonymous", "file", "file that does not fit"],
)
@pytest.mark.parametrize("seed", range(3))
def test_every_page_holds_what_was_written_to_it_or_is_lost(run: Run, kind: str, limit_pages: int | None, seed: int) -> None:
    async def story(core: Core) -> None:
        owners = 4
        count = owners * PAGES_EACH
        object_ = core.allocate(count) if kind == "anonymous" else core.open(core.new_file(count), writable=True)
        world = World(core, object_, seed)
        others = [asyncio.create_task(one) for one in (world.striker(), world.striker(), world.flusher(), world.flusher())]
        await asyncio.gather(*(world.owner(range(first, first + PAGES_EACH)) for first in range(0, count, PAGES_EACH)))
        world.running = False
        await asyncio.gather(*others)
        assert world.lost_found
        assert object_.locks.free(0, count)
        assert core.manager.reclaim.present == object_.pages.present
        assert all(object_.store.present(page) == object_.is_present(page) for page in range(count))
        assert sorted(object_.losses) == [page for page in range(count) if object_.pages.flags[page] & LOST]
        if kind == "file":
            await write_back_all(core.manager, object_)
            assert all_in(object_)

    run(story, limit_pages)


def all_in(object_: MemoryObject) -> bool:
    """What is in memory is in the file."""
    content = Path(object_.name).read_bytes()
    return all(
        object_.store.content(page, 1) == content[page * PAGE_SIZE :][:PAGE_SIZE]
        for page in range(object_.pages.count)
        if object_.is_present(page)
    )
