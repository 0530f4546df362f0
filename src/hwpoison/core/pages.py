"""Two bytes for each page of an object: what it is, and when it came. Nothing else is kept for a page that is well.

A page that has flags of 0 is absent and nobody knows anything bad of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hwpoison.core.machine import Table

PRESENT = 1
"""The content is in the object's memory."""
DIRTY = 2
"""A page of a writable file that may be newer than the file."""
WRITEBACK = 4
"""Its content is on the way to the file."""
POISONED = 8
"""A failure of this page is being handled; for good if it is lost. Set first of all, by test-and-set."""
LOST = 16
"""The content is gone until the owner repairs or discards it. A lost page is absent."""

PIECE_PAGES = 1 << 16
"""An object may have very many pages: they are looked at in pieces of this size, and only where there ever was anything."""
_ABSENT = bytes(value for value in range(256) if not value & PRESENT)
_WITH = {flag: bytes(1 if value & flag else 0 for value in range(256)) for flag in (1, 2, 4, 8, 16)}


class Pages:
    """The state of each page of one object. Indices and counts are in pages."""

    __slots__ = ("_used", "count", "flags", "generation", "present")

    def __init__(self, count: int, table: Callable[[int], Table] = bytearray, flags: Table | None = None) -> None:
        self.count = count
        self.flags = table(count) if flags is None else flags
        self.generation = table(count)
        """In which generation the page was brought in, see `core.reclaim`; 0 if it is absent or can't be dropped."""
        self.present = 0
        """How many pages are present."""
        self._used: set[int] = set()
        """The pieces in which something was not 0 at some time."""

    def arrived(self, first: int, count: int, generation: int, flags: int = 0) -> None:
        """Absent pages are present now, with `flags` beside; poison that struck meanwhile stays to be handled."""
        if count == 1 and not self.flags[first]:
            self.flags[first] = PRESENT | flags
            self.generation[first] = generation
            self.present += 1
            self._used.add(first // PIECE_PAGES)
            return
        end = first + count
        self._used.update(range(first // PIECE_PAGES, -(-end // PIECE_PAGES)))
        if self.flags[first:end] == bytes(count):
            self.flags[first:end] = bytes((PRESENT | flags,)) * count
        else:
            for page in range(first, end):
                assert not self.flags[page] & (PRESENT | LOST), f"page {page} came twice"
                self.flags[page] |= PRESENT | flags
        self.generation[first:end] = bytes((generation,)) * count
        self.present += count

    def left(self, first: int, count: int) -> None:
        """Present pages are absent now."""
        for page in range(first, first + count):
            assert self.flags[page] & PRESENT, f"page {page} left twice"
            self.flags[page] &= ~(PRESENT | DIRTY)
        self.generation[first : first + count] = bytes(count)
        self.present -= count

    def found(self, first: int, flags: bytes, generation: int) -> None:
        """What a manager before this one has left, or what that comes to: the flags of pages from `first` on."""
        end = first + len(flags)
        self.flags[first:end] = flags
        self._used.update(range(first // PIECE_PAGES, -(-end // PIECE_PAGES)))
        self.generation[first:end] = flags.translate(bytes(generation if value & PRESENT else 0 for value in range(256)))
        self.present += len(flags.translate(None, _ABSENT))

    def set(self, flag: int, page: int) -> bool:
        """Set `flag`; False if it was set already."""
        before = self.flags[page]
        self.flags[page] = before | flag
        self._used.add(page // PIECE_PAGES)
        return not before & flag

    def clear(self, flag: int, page: int) -> None:
        self.flags[page] &= ~flag

    def runs(self, flag: int, first: int = 0, count: int | None = None) -> Iterator[tuple[int, int]]:
        """(first, count) of each maximal run of pages that have `flag`, within the range. For use at once: no snapshot."""
        end = self.count if count is None else first + count
        begun = -1
        for piece in range(first // PIECE_PAGES, -(-end // PIECE_PAGES)):
            base = max(first, piece * PIECE_PAGES)
            if piece not in self._used:
                if begun >= 0:
                    yield begun, base - begun
                    begun = -1
                continue
            has = self.flags[base : min((piece + 1) * PIECE_PAGES, end)].translate(_WITH[flag])
            at = has.find(1 if begun < 0 else 0)
            while at >= 0:
                if begun < 0:
                    begun = base + at
                else:
                    yield begun, base + at - begun
                    begun = -1
                at = has.find(1 if begun < 0 else 0, at)
        if begun >= 0:
            yield begun, end - begun

    def find_generation(self, generation: int, first: int = 0) -> int:
        """The first page from `first` on that came in `generation`; -1 if there is none."""
        wanted = bytes((generation,))
        for piece in range(first // PIECE_PAGES, -(-self.count // PIECE_PAGES)):
            if piece in self._used:
                page = self.generation.find(wanted, max(first, piece * PIECE_PAGES), (piece + 1) * PIECE_PAGES)
                if page >= 0:
                    return page
        return -1

    def join_generation(self, generation: int, following: int) -> None:
        """What came in `generation` is from now on said to have come in `following`."""
        old, new = bytes((generation,)), bytes((following,))
        for piece in self._used:
            pages = slice(piece * PIECE_PAGES, min((piece + 1) * PIECE_PAGES, self.count))
            came = self.generation[pages]
            if generation in came:
                self.generation[pages] = came.replace(old, new)

    def absent_from(self, first: int, limit: int) -> int:
        """How many pages from `first`, at most `limit`, are absent and not known to be bad."""
        flags = self.flags[first : first + limit]
        return len(flags) - len(flags.lstrip(b"\0"))
