"""A manager that holds less than its objects: what it drops, in which order, and what it never drops."""

from __future__ import annotations

import asyncio
import os
import random

import pytest

from hwpoison.core.objects import MemoryObject
from hwpoison.core.pages import DIRTY, POISONED, PRESENT, WRITEBACK
from hwpoison.core.reclaim import FILES_LEAST, GENERATIONS
from hwpoison.core.records import State
from hwpoison.core.recovery import drop, room, write
from hwpoison.linux.syscalls import PAGE_SIZE
from tests.core.conftest import Core, Run
from tests.large_frames import BLOCK_BYTES, collapse


class Ages:
    """When each page came, counted in pages; and whether they go in that order."""

    def __init__(self, core: Core, grain: int) -> None:
        self._core = core
        self._grain = grain
        self._came: dict[tuple[MemoryObject, int], int] = {}
        self._now = 0

    async def bring_in(self, object_: MemoryObject, page: int) -> None:
        """Bring a page in; what goes for it must be older than what stays, to the grain."""
        await self._core.bring_in(object_, page)
        self._now += 1
        self._came[object_, page] = self._now
        gone = {self._came.pop(place) for place in list(self._came) if not place[0].is_present(place[1])}
        if gone:
            assert max(gone) - min(self._came.values()) < self._grain
        assert self._core.manager.reclaim.present == sum(one.pages.present for one in self._core.manager.objects())


@pytest.mark.parametrize(("limit", "grain"), [(64, 1), (128, 2), (320, 5)])
def test_the_least_recently_brought_in_go_first_through_several_rounds_of_the_generations(
    run: Run, limit: int, grain: int
) -> None:
    chance = random.Random(limit)

    async def story(core: Core) -> None:
        objects = [core.open(core.new_file(limit)) for _ in range(3)]
        ages = Ages(core, grain)
        for _ in range(3 * GENERATIONS * grain):
            object_ = chance.choice(objects)
            absent = [page for page in range(limit) if not object_.is_present(page)]
            if absent:
                await ages.bring_in(object_, chance.choice(absent))
                assert core.manager.reclaim.present <= limit
        assert core.manager.reclaim.present == limit

    run(story, limit_pages=limit)


@pytest.mark.parametrize("passing_pages", [200, 240, 255, 270, 500, 520])
def test_the_order_is_kept_where_nothing_had_to_go_for_longer_than_the_generations_last(
    run: Run, passing_pages: int
) -> None:
    async def story(core: Core) -> None:
        ages = Ages(core, 1)
        # The object that is opened first is the one that is looked through first.
        newer = core.open(core.new_file(64))
        older = core.open(core.new_file(64))
        for page in range(8):
            await ages.bring_in(older, page)
        passing = core.new_file(40)
        for first in range(0, passing_pages, 40):
            object_ = core.open(passing)
            for page in range(min(40, passing_pages - first)):
                await core.bring_in(object_, page)
            core.manager.release(object_)
            await core.manager.settled(object_.name)
        for page in range(8, 16):
            await ages.bring_in(older, page)
        for page in range(64):
            await ages.bring_in(newer, page)
        assert core.manager.reclaim.present == 64
        assert not any(older.is_present(page) for page in range(16))

    run(story, limit_pages=64)


def test_pages_that_are_dirty_locked_poisoned_or_on_their_way_stay(run: Run) -> None:
    async def story(core: Core) -> None:
        victim = core.open(core.new_file(16))
        other = core.open(core.new_file(64))
        await core.bring_in(victim, 0, 16)
        kept = {1: DIRTY, 2: WRITEBACK, 3: POISONED, 5: DIRTY | WRITEBACK}
        for page, flags in kept.items():
            victim.pages.flags[page] |= flags
        async with victim.locks.hold(8, 2):
            for page in range(16):
                await core.bring_in(other, page)
            assert {page for page in range(16) if victim.is_present(page)} == {*kept, 8, 9}
        for page in kept:
            victim.pages.flags[page] = PRESENT
        # Now they can go: they were met meanwhile, so they are younger than what came before that.
        for page in range(16, 64):
            await core.bring_in(other, page)
        assert not any(victim.is_present(page) for page in range(16))

    run(story, limit_pages=20)


def test_dirty_pages_are_written_to_their_file_before_they_are_dropped(run: Run) -> None:
    async def story(core: Core) -> None:
        path = core.new_file(16)
        expected = bytearray(path.read_bytes())
        object_ = core.open(path, writable=True)
        for page in range(16):
            await write(core.manager, object_, page * PAGE_SIZE + 7, b"changed")
            expected[page * PAGE_SIZE + 7 : page * PAGE_SIZE + 14] = b"changed"
            assert core.manager.reclaim.present <= 8
        # Those that are in memory no more must be in the file, and all together are what was written.
        for page in range(16):
            if not object_.is_present(page):
                await core.bring_in(object_, page)
            assert object_.store.content(page, 1) == expected[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]

    run(story, limit_pages=8)


def test_anonymous_pages_count_and_are_never_dropped(run: Run) -> None:
    async def story(core: Core) -> None:
        memory = core.allocate(12)
        file = core.open(core.new_file(16))
        await core.bring_in(memory, 0, 12)
        for page in range(16):
            await core.bring_in(file, page)
            assert file.pages.present <= 4
        assert memory.pages.present == 12

    run(story, limit_pages=16)


def test_files_have_some_pages_in_any_case_and_what_has_just_come_stays(run: Run) -> None:
    async def story(core: Core) -> None:
        memory = core.allocate(2000)
        file = core.open(core.new_file(300))
        for page in range(200):
            await core.bring_in(file, page)
        # Pages came by the hundred in each generation; what is left to files must be aged more finely than that.
        await core.bring_in(memory, 0, 2000)
        assert file.pages.present == FILES_LEAST
        for page in random.Random(1).sample(range(299), 200):
            for one in (page + 1, page):
                if not file.is_present(one):
                    await core.bring_in(file, one)
            assert file.is_present(page)
            assert file.is_present(page + 1)
            assert file.pages.present == FILES_LEAST
            assert core.manager.reclaim.largest_window == FILES_LEAST // 8
        assert memory.pages.present == 2000

    run(story, limit_pages=2000, files_least=FILES_LEAST)


def test_without_a_limit_nothing_is_dropped(run: Run) -> None:
    async def story(core: Core) -> None:
        file = core.open(core.new_file(2000))
        for first in range(0, 2000, 100):
            await core.bring_in(file, first, 100)
        assert file.pages.present == core.manager.reclaim.present == 2000
        assert room(core.manager, file, 1 << 40)

    run(story)


def test_what_cannot_be_dropped_puts_the_manager_over_its_limit_and_nothing_hangs(run: Run) -> None:
    async def story(core: Core) -> None:
        file = core.open(core.new_file(16))
        async with file.locks.hold(0, 8):
            for page in range(8):
                file.pages.arrived(page, 1, core.manager.reclaim.arrived(file, 1))
                file.store.publish(page, bytes(PAGE_SIZE))
            await core.bring_in(file, 8)
            assert core.manager.reclaim.present == 9
        await core.bring_in(file, 9)
        assert core.manager.reclaim.present == 4

    run(story, limit_pages=4)


def test_pages_that_come_at_the_same_time_get_room_each(run: Run) -> None:
    async def story(core: Core) -> None:
        old, new = core.open(core.new_file(256)), core.open(core.new_file(256))
        await core.bring_in(old, 0, 256)
        # Each of these is more than is read at once, so they wait for the file together.
        await asyncio.gather(*(core.bring_in(new, first, 32) for first in range(0, 256, 32)))
        assert new.pages.present == core.manager.reclaim.present == 256

    run(story, limit_pages=256)


def test_one_window_is_a_small_part_of_the_limit(run: Run) -> None:
    async def story(core: Core) -> None:
        assert core.manager.reclaim.largest_window == 8

    run(story, limit_pages=64)


def test_the_smallest_limit_lets_one_page_in_after_another(run: Run) -> None:
    async def story(core: Core) -> None:
        file = core.open(core.new_file(4))
        for page in (0, 1, 2, 3, 0):
            await core.bring_in(file, page)
            assert [one for one in range(4) if file.is_present(one)] == [page]
        assert core.manager.reclaim.largest_window == 1

    run(story, limit_pages=1)


def test_what_is_still_there_after_it_was_dropped_is_lost_with_all_of_its_large_frame(run: Run) -> None:
    unit = BLOCK_BYTES // PAGE_SIZE

    async def story(core: Core) -> None:
        file = core.open(core.new_file(unit + 1), writable=True)
        await core.bring_in(file, 0, unit + 1)
        await write(core.manager, file, 9 * PAGE_SIZE, b"changed")
        memory: int = file.store.fd  # type: ignore[attr-defined]
        collapse(memory)
        pipe = os.pipe()
        os.splice(memory, pipe[1], PAGE_SIZE, offset_src=100 * PAGE_SIZE)
        drop(core.manager, file, 5, 1)
        assert file.lost() == [(file.name, 0, BLOCK_BYTES)]
        # What the file does not have must not be taken for what it has, when the object ends.
        assert {page for page, loss in file.losses.items() if loss.state is State.DIRTY_FILE} == {9}
        assert file.error_sequence == 1
        assert not any(file.store.present(page) for page in range(unit))
        assert core.manager.reclaim.present == 1
        assert "large frame" in core.events[-1].detail
        for one in pipe:
            os.close(one)

    run(story, limit_pages=2 * unit)
