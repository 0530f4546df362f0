"""The model of a memory: the bytes of each page, what is lost, and what its file holds.

It does not say which pages are present, nor when dirty ones are written back. That is the manager's business: the model
looks at what was done, and says whether it was right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from hwpoison.core.mappings import Mapping
from hwpoison.core.objects import MemoryObject
from hwpoison.core.records import State
from hwpoison.errors import Range
from hwpoison.simulation.files import Disk
from hwpoison.simulation.memory import SimulatedStore
from hwpoison.simulation.processes import Area, Process

PAGE = 8


def pages_of(offset: int, nbytes: int) -> range:
    return range(offset // PAGE, -(-(offset + nbytes) // PAGE) if nbytes else offset // PAGE)


class Handle:
    """A mapping, of a process that has one thread. `owed`: its next flush that writes everything must say EIO."""

    def __init__(self, process: Process, area: Area, mapping: Mapping, memory: Memory) -> None:
        self.process = process
        self.area = area
        self.mapping = mapping
        self.memory = memory
        self.owed = False
        self.told: Counter[int] = Counter()
        """How often it was sent a signal for a page that is lost."""

    def __repr__(self) -> str:
        return f"<{self.memory.name} in {self.process.name}>"


class Memory:
    """The model of an object. It has pages from when it is opened until it is closed."""

    object: MemoryObject
    store: SimulatedStore

    def __init__(self, name: str, nbytes: int, disk: Disk | None, offset: int) -> None:
        self.name = name
        self.nbytes = nbytes
        self.count = -(-nbytes // PAGE)
        self.disk = disk
        self.offset = offset
        self.tracks_dirt = disk is not None and disk.writable
        self.writable = disk is None or disk.writable
        self.is_open = False
        self.handles: list[Handle] = []
        self.pages: list[bytes] = []
        self.lost: dict[int, State] = {}
        self.untold: set[int] = set()
        """Lost pages of which no flush has told."""
        self.stored: set[int] = set()
        """Pages that were changed since they were last seen to be what the file holds."""
        self.touched: set[int] = set()
        """Pages that may count as dirty although nothing in them is to get to the file."""
        self.foreign = False
        """The file was changed by somebody else: what is not in memory is gone."""
        self.known = disk.content if disk is not None else b""
        """What the file was seen to hold."""

    def __repr__(self) -> str:
        return f"<{self.name}, {self.nbytes} bytes>"

    def opened(self, object_: MemoryObject, store: SimulatedStore) -> None:
        self.object, self.store, self.is_open, self.foreign = object_, store, True, False
        self.untold = set()
        self.pages = [self.behind(page) for page in range(self.count)]
        self.lost, self.stored, self.touched = {}, set(), set()

    # --- where things are

    def nbytes_of(self, page: int) -> int:
        return min(PAGE, self.nbytes - page * PAGE)

    def part(self, offset: int, nbytes: int, page: int) -> tuple[int, int]:
        """From where to where in `page` the bytes reach."""
        return max(offset - page * PAGE, 0), min(offset + nbytes - page * PAGE, self.nbytes_of(page))

    def whole(self, offset: int, nbytes: int, page: int) -> bool:
        return self.part(offset, nbytes, page) == (0, self.nbytes_of(page))

    def present(self, page: int) -> bool:
        return self.store.pages[page] is not None

    def absent(self, pages: Iterable[int]) -> set[int]:
        """Those that have to be read before they are used."""
        return {page for page in pages if not self.present(page) and page not in self.lost}

    def ranges(self) -> list[Range]:
        """What is lost; neighbours joined."""
        found: list[Range] = []
        for page in sorted(self.lost):
            begin = page * PAGE
            if found and found[-1].offset + found[-1].nbytes == begin:
                begin = found.pop().offset
            found.append(Range(self.name, begin, page * PAGE + self.nbytes_of(page) - begin))
        return found

    # --- what is in them

    def in_file(self, page: int, content: bytes | None = None) -> bytes:
        """The bytes that the file has for the page: fewer if it has shrunk."""
        assert self.disk is not None
        begin = self.offset + page * PAGE
        return (self.disk.content if content is None else content)[begin : begin + self.nbytes_of(page)]

    def behind(self, page: int) -> bytes:
        """The page as it comes when nothing was written to it."""
        return bytes(PAGE) if self.disk is None else self.in_file(page).ljust(PAGE, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """What is written is there, and no page of it is lost any more."""
        for page in pages_of(offset, len(data)):
            begin, end = self.part(offset, len(data), page)
            start = page * PAGE - offset
            self.pages[page] = self.pages[page][:begin] + data[start + begin : start + end] + self.pages[page][end:]
            self.well(page)
            self.stored.add(page)

    def fresh(self, page: int) -> None:
        """The page is what is behind it."""
        self.pages[page] = self.behind(page)
        self.well(page)
        self.clean([page])

    def well(self, page: int) -> None:
        """The page is not lost any more."""
        self.lost.pop(page, None)
        for handle in self.handles:
            handle.told[page] = 0

    def clean(self, pages: Iterable[int]) -> None:
        self.stored -= set(pages)
        self.touched -= set(pages)

    def unsaved(self) -> set[int]:
        """Pages whose content is to get to the file."""
        if self.disk is None:
            return set()
        return {page for page in self.stored if self.pages[page][: self.nbytes_of(page)] != self.in_file(page)}

    def only_here(self) -> set[int]:
        """Pages that cannot be had again."""
        return self.stored if self.disk is None else self.unsaved()

    def cut_off(self, pages: Iterable[int]) -> bool:
        """True if the file is too short for one of the pages."""
        return self.disk is not None and any(len(self.in_file(page)) < self.nbytes_of(page) for page in pages)

    def failed(self) -> None:
        """Changes are lost, or may be: every handle's flush says so."""
        for handle in self.handles:
            handle.owed = True

    def change_file(self, change: Callable[[], None]) -> None:
        """Somebody else does it."""
        assert self.disk is not None
        change()
        self.foreign, self.known = self.is_open, self.disk.content

    def look_at_file(self, half_way: bool) -> None:
        """Only what was changed is written, to its place, and as it is: as far as a write got that failed half way."""
        if self.disk is None:
            return
        now, before = self.disk.content, self.known
        end = self.offset + self.nbytes
        assert (len(now), now[: self.offset], now[end:]) == (len(before), before[: self.offset], before[end:])
        for page in range(self.count):
            found, old = self.in_file(page), self.in_file(page, before)
            if found != old:
                assert page in self.stored | self.touched, f"page {page} of {self} was written"
                new = self.pages[page][: self.nbytes_of(page)]
                assert found == new or (half_way and found in [new[:at] + old[at:] for at in range(len(new))])
        self.known = now
        self.touched |= self.stored - self.unsaved()
        self.stored = self.unsaved()
