"""A manager that holds less memory than its objects: clean file pages are dropped, the least recently brought in first.

Age is one byte a page: the generation in which it came. A generation ends when a sixty-fourth of the limit has come, so
"least recently" is right to that grain. When the byte has no value left, what remains of the oldest generation joins the
next one: their order is lost, which matters little at such an age.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hwpoison.core.accounting import Statistics
from hwpoison.core.objects import MemoryObject
from hwpoison.core.pages import DIRTY, POISONED, PRESENT, WRITEBACK

GENERATIONS = 255
"""Values of the byte that are generations; 0 is none."""
RUN_BYTES = 2 << 20
"""Most that is dropped by one system call."""


class Reclaim:
    """Keeps the pages that are present within `limit` pages, as far as they can be dropped. None: no limit."""

    def __init__(self, objects: Callable[[], list[MemoryObject]], statistics: Statistics, limit: int | None) -> None:
        self._objects = objects
        self._statistics = statistics
        self.limit = limit
        self.present = 0
        """Pages that are present, of all objects."""
        self._generation = 1
        self._oldest = 1
        self._came = 0
        self._coming = 0
        """Pages for which there is room, and which are not here yet."""

    @property
    def largest_window(self) -> int:
        """Most pages that one fault should bring in: a window must not push out what it has just brought."""
        return 1 << 30 if self.limit is None else max(1, self.limit // 8)

    def arrived(self, object_: MemoryObject, count: int) -> int:
        """`count` pages of the object come; the generation to note for them."""
        self.present += count
        if self.limit is None or object_.backing is None:
            return 0
        self._came += count
        if self._came >= max(1, self.limit // 64):
            self._came = 0
            self._generation = self._generation % GENERATIONS + 1
            if self._generation == self._oldest:
                self._join_oldest()
        return self._generation

    def _join_oldest(self) -> None:
        following = self._oldest % GENERATIONS + 1
        joined = bytes(following if value == self._oldest else value for value in range(256))
        for object_ in self._objects():
            generation = object_.pages.generation
            if self._oldest in generation:
                generation[:] = generation.translate(joined)
        self._oldest = following

    def left(self, count: int) -> None:
        """`count` pages are gone."""
        self.present -= count

    def over(self, count: int) -> int:
        """How many pages would have to go so that `count` more can come."""
        return 0 if self.limit is None else self.present + self._coming + count - self.limit

    @contextmanager
    def coming(self, count: int) -> Iterator[None]:
        """From the moment that there is room for `count` pages until they are here, or can't be had: it is theirs."""
        self._coming += count
        try:
            yield
        finally:
            self._coming -= count

    def room(self, count: int) -> bool:
        """Make room for `count` pages without waiting, if that is possible; whether there is room."""
        while (over := self.over(count)) > 0:
            victim = self.oldest_run(over)
            if victim is None or victim[0].tracks_dirt:
                return False
            self.drop(*victim)
        return True

    def drop(self, object_: MemoryObject, first: int, count: int) -> None:
        """Drop clean pages that nobody has locked."""
        object_.store.drop(first, count)
        object_.pages.left(first, count)
        self.left(count)
        self._statistics.pages_dropped += count

    def oldest_run(self, wanted: int) -> tuple[MemoryObject, int, int] | None:
        """Up to `wanted` neighbouring pages of the oldest generation that can be dropped now: object, first, count."""
        files = [one for one in self._objects() if one.backing is not None]
        while True:
            for object_ in files:
                first = self._first_clean(object_)
                if first is not None:
                    return object_, first, self._run_length(object_, first, min(wanted, object_.pages_in(RUN_BYTES)))
            if self._oldest == self._generation:
                return None
            self._oldest = self._oldest % GENERATIONS + 1

    def _first_clean(self, object_: MemoryObject) -> int | None:
        """The first page of the oldest generation that can be dropped; those that can't become young again."""
        pages = object_.pages
        page = pages.generation.find(self._oldest)
        while page >= 0:
            if self._can_drop(object_, page):
                return page
            if self._oldest != self._generation:
                pages.generation[page] = self._generation
            page = pages.generation.find(self._oldest, page + 1)
        return None

    def _run_length(self, object_: MemoryObject, first: int, limit: int) -> int:
        count = 1
        generation = object_.pages.generation
        end = min(first + limit, object_.pages.count)
        while first + count < end and generation[first + count] == self._oldest and self._can_drop(object_, first + count):
            count += 1
        return count

    @staticmethod
    def _can_drop(object_: MemoryObject, page: int) -> bool:
        flags = object_.pages.flags[page]
        return flags & (PRESENT | DIRTY | WRITEBACK | POISONED) == PRESENT and object_.locks.free(page)
