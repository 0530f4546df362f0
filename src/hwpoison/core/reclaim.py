"""A manager that holds less memory than its objects: clean file pages are dropped, the least recently brought in first.

Age is one byte a page: the generation in which it came. A generation ends when a sixty-fourth of what files may have has
come, so "least recently" is right to that grain. When the byte has no value left, what remains of the oldest generation
joins the next one: their order is lost, which matters little at such an age.

A unit (`Machine.large_frame_bytes`) that is present as a whole goes as a whole, or stays. Objects refuse large frames, but
whoever has the memory can have the kernel make one of such a unit all the same, and a part of it that is taken out while
somebody holds the frame would stay, and read as zeros. With a page absent it is never made one: the kernel leaves those
absent for which a userfaultfd wants to be asked.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hwpoison.core.accounting import Statistics
from hwpoison.core.objects import MemoryObject
from hwpoison.core.pages import PRESENT

FILES_LEAST = 64
"""Pages that files may have in any case, even over the limit. One access can need four at the same time (a move from one
border between pages to another); with too few for all threads, each would push out what another has just been given, and
none would get on."""
GENERATIONS = 255
"""Values of the byte that are generations; 0 is none."""
_ABSENT = bytes(0 if value & PRESENT else 1 for value in range(256))


@dataclass(slots=True)
class _Count:
    present: int = 0
    coming: int = 0
    """Pages for which there is room, and which are not here yet."""

    @property
    def all(self) -> int:
        return self.present + self.coming


class Reclaim:
    """Keeps the pages that are present within `limit` pages, as far as they can be dropped. None: no limit."""

    def __init__(self, objects: Callable[[], list[MemoryObject]], statistics: Statistics, limit: int | None) -> None:
        self._objects = objects
        self._statistics = statistics
        self.limit = limit
        self.files_least = FILES_LEAST
        self._files = _Count()
        self._anonymous = _Count()
        self._generation = 1
        self._oldest = 1
        self._came = 0

    @property
    def present(self) -> int:
        """Pages that are present, of all objects."""
        return self._files.present + self._anonymous.present

    @property
    def for_files(self) -> int:
        """How many pages all files together may have."""
        return 1 << 30 if self.limit is None else max(self.limit - self._anonymous.all, self.files_least)

    @property
    def largest_window(self) -> int:
        """Most pages that one fault should bring in: a window must not push out what it has just brought."""
        return max(1, self.for_files // 8)

    def require_resident(self, object_: MemoryObject, count: int) -> None:
        """Raises OSError (ENOMEM) if `count` more pages of the object cannot stay: half of what files have is for others."""
        resident = sum(len(one.resident) for one in self._objects() if one.backing is not None)
        if object_.backing is not None and resident + count > self.for_files // 2:
            limit = self.for_files // 2
            raise OSError(
                errno.ENOMEM,
                f"{count} pages cannot be resident: the memory limit leaves {limit} for that, and {resident} are in use",
            )

    def _of(self, object_: MemoryObject) -> _Count:
        return self._anonymous if object_.backing is None else self._files

    def arrived(self, object_: MemoryObject, count: int) -> int:
        """`count` pages of the object come; the generation to note for them."""
        self._of(object_).present += count
        if self.limit is None or object_.backing is None:
            return 0
        self._came += count
        if self._came >= max(1, self.for_files // 64):
            self._came = 0
            self._generation = self._generation % GENERATIONS + 1
            if self._generation == self._oldest:
                self._join_oldest()
        return self._generation

    def _join_oldest(self) -> None:
        following = self._oldest % GENERATIONS + 1
        for object_ in self._objects():
            object_.pages.join_generation(self._oldest, following)
        self._oldest = following

    def left(self, object_: MemoryObject, count: int) -> None:
        """`count` pages of the object are gone."""
        self._of(object_).present -= count

    def over(self, object_: MemoryObject, count: int) -> int:
        """How many pages of files would have to go so that `count` pages of the object can come."""
        if self.limit is None:
            return 0
        anonymous, files = self._anonymous.all, self._files.all
        if object_.backing is None:
            anonymous += count
        else:
            files += count
        return files - max(self.limit - anonymous, self.files_least)

    @contextmanager
    def coming(self, object_: MemoryObject, count: int) -> Iterator[None]:
        """From the moment that there is room for `count` pages until they are here, or can't be had: it is theirs."""
        counted = self._of(object_)
        counted.coming += count
        try:
            yield
        finally:
            counted.coming -= count

    def drop(self, object_: MemoryObject, first: int, count: int) -> None:
        """Drop clean pages that nobody has locked. Raises `NotIsolatedError` if they are still there."""
        object_.store.drop(first, count)
        object_.pages.left(first, count)
        self.left(object_, count)
        self._statistics.pages_dropped += count

    def oldest_run(self, wanted: int) -> tuple[MemoryObject, int, int] | None:
        """Up to `wanted` neighbouring pages of the oldest generation that can be dropped now, or the whole unit that may be
        one frame with the first of them: object, first, count."""
        files = [one for one in self._objects() if one.backing is not None]
        while True:
            for object_ in files:
                run = self._oldest_run_of(object_, wanted)
                if run is not None:
                    return object_, *run
            if self._oldest == self._generation:
                return None
            self._oldest = self._oldest % GENERATIONS + 1

    def _oldest_run_of(self, object_: MemoryObject, wanted: int) -> tuple[int, int] | None:
        """(first, count) of pages to drop; those of the oldest generation that can't go become young again."""
        pages, unit_pages = object_.pages, object_.unit_pages
        page = pages.find_generation(self._oldest)
        while page >= 0:
            unit = page // unit_pages * unit_pages
            end = page + 1
            if _may_be_one_frame(object_, unit, unit_pages):
                if _can_drop(object_, unit, unit_pages):
                    return unit, unit_pages
                end = unit + unit_pages
            elif _can_drop(object_, page):
                return page, self._run_length(object_, page, min(wanted, unit + unit_pages - page))
            if self._oldest != self._generation:
                for young in range(page, end):
                    if pages.generation[young] == self._oldest:
                        pages.generation[young] = self._generation
            page = pages.find_generation(self._oldest, end)
        return None

    def _run_length(self, object_: MemoryObject, first: int, limit: int) -> int:
        count = 1
        generation = object_.pages.generation
        end = min(first + limit, object_.pages.count)
        while first + count < end and generation[first + count] == self._oldest and _can_drop(object_, first + count):
            count += 1
        return count


def _can_drop(object_: MemoryObject, first: int, count: int = 1) -> bool:
    """True if all the pages are clean and well, and nobody has locked one, or wants it to stay."""
    if object_.resident and any(page in object_.resident for page in range(first, first + count)):
        return False
    return object_.pages.flags[first : first + count].count(PRESENT) == count and object_.locks.free(first, count)


def _may_be_one_frame(object_: MemoryObject, first: int, count: int) -> bool:
    """True if the kernel has all the pages; one that is not here yet may have come already."""
    if first + count > object_.pages.count:
        return False
    absent = object_.pages.flags[first : first + count].translate(_ABSENT)
    page = absent.find(1)
    while page >= 0:
        if not object_.store.present(first + page):
            return False
        page = absent.find(1, page + 1)
    return True
