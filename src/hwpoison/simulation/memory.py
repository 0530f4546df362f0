"""The memory of objects in the simulated machine: frames, and the pages that they are."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hwpoison.core.machine import Content, NotIsolatedError, StaleFrameError, Table
from hwpoison.errors import EHWPOISON

if TYPE_CHECKING:
    from hwpoison.simulation.machine import SimulatedMachine
    from hwpoison.simulation.processes import Area

PAGE, WATCHED, POISON, ZEROS, HWPOISON = "page", "watched", "poison", "zeros", "hwpoison"
"""What a page table can have for a page: the object's page; a marker of write protection where there is none; a poison
marker; a page of zeros of its own; the kernel's own mark, which stays until the process takes it away (linux-facts 26)."""


@dataclass(slots=True)
class SimulatedPage:
    """A frame in use. `bad`: what is in it is not to be had. `held`: the kernel says so, and gives it to nobody again."""

    number: int
    content: bytes
    bad: bool = False
    held: bool = False


class SimulatedFrame:
    """See `core.machine.Frame`."""

    def __init__(self, machine: SimulatedMachine, page: SimulatedPage, transit: list[SimulatedPage]) -> None:
        self._machine = machine
        self._transit = transit
        self.page = page
        self.number = page.number

    def content(self) -> bytes:
        if self.page.held:
            raise OSError(errno.EIO, "the kernel has declared the page bad")
        self._transit.remove(self.page)
        self._machine.let_go(self.page)
        if self.page.bad:
            raise OSError(EHWPOISON, "the frame is bad")
        return self.page.content

    def quarantine(self) -> None:
        self._transit.remove(self.page)
        if not self.page.held:
            self._machine.quarantine[self.number] += 1

    def release(self) -> None:
        self._transit.remove(self.page)
        if self.page.bad and not self.page.held:
            self._machine.given_back.append(self.number)
        self._machine.let_go(self.page)


class SimulatedStore:
    """See `core.machine.Store`."""

    def __init__(self, machine: SimulatedMachine, name: str, nbytes: int, flags: Table, number: int) -> None:
        self.machine = machine
        self.name = name
        self.flags = flags
        self.number = number
        self.size = machine.page_size
        self.pages: list[SimulatedPage | None] = [None] * -(-nbytes // self.size)
        self.areas: list[Area] = []
        self.large: set[int] = set()
        """Large frames, by number in the object."""
        self.marks: set[int] = set()
        """Pages at which the kernel has left its mark in the manager's own page table: nothing can be published there."""
        self.transit: list[SimulatedPage] = []
        """Pages that were taken out, and of which it is not said yet what becomes of them."""
        self.closed = False

    @property
    def _unit(self) -> int:
        return self.machine.large_frame_bytes // self.size

    def flagged(self) -> Iterator[tuple[int, int]]:
        yield 0, len(self.pages)

    def runs(self) -> Iterator[tuple[int, int]]:
        self.machine.before(self, 0, len(self.pages))
        self.machine.observe(tuple([page is not None for page in self.pages]))
        return iter([(number, 1) for number, page in enumerate(self.pages) if page is not None])

    def take(self, page: int, number: int | None = None) -> SimulatedFrame | None:
        self.machine.before(self, page, 1)
        found = self.pages[page]
        self.machine.observe(found and (found.number == number, found.content))
        if found is None:
            return None
        if number is not None and found.number != number:
            raise StaleFrameError(errno.ESTALE, f"page {page} is not in frame {number:#x}")
        if page // self._unit in self.large:
            raise NotIsolatedError(errno.EBUSY, f"page {page} is part of a large frame")
        self.transit.append(found)
        self.pages[page] = None
        self._unmap(page, 1)
        self.marks.discard(page)
        self.machine.between()
        return SimulatedFrame(self.machine, found, self.transit)

    def drop(self, first: int, count: int) -> None:
        self.machine.before(self, first, count)
        stays = False
        for unit in sorted(self.large & set(range(first // self._unit, -(-(first + count) // self._unit)))):
            begin, end = unit * self._unit, min((unit + 1) * self._unit, len(self.pages))
            if first <= begin and end <= first + count:
                self.large.discard(unit)
            else:
                low, high = max(begin, first), min(end, first + count)
                self._empty(low, high - low)
                stays = True
        for page in range(first, first + count):
            found = self.pages[page]
            if found is not None and page // self._unit not in self.large:
                self.pages[page] = None
                self._unmap(page, 1)
                self.marks.discard(page)
                self.machine.let_go(found)
        self.machine.between()
        if stays:
            raise NotIsolatedError(errno.EBUSY, "some pages are part of a large frame")

    def _empty(self, first: int, count: int) -> None:
        for page in range(first, first + count):
            found = self.pages[page]
            if found is not None:
                found.content = bytes(self.size)

    def _unmap(self, first: int, count: int) -> None:
        for area in self.areas:
            area.unmap(first, count)

    def present(self, page: int) -> bool:
        self.machine.before(self, page, 1)
        present = self.pages[page] is not None
        self.machine.observe(present)
        return present

    def publish(self, first: int, content: Content) -> None:
        self.machine.before(self, first, len(content) // self.size)
        self._place(first, bytes(content))
        self.machine.between()

    def _place(self, first: int, content: bytes) -> None:
        for index in range(len(content) // self.size):
            self.machine.affected(first + index)
            if first + index in self.marks:
                raise FileExistsError(errno.EEXIST, "the kernel's mark is in the page table")
            if self.pages[first + index] is None:
                part = content[index * self.size : (index + 1) * self.size]
                self.pages[first + index] = self.machine.new_page(part)
                self.machine.placed(self, first + index, part)

    async def fill(self, first: int, content: Content) -> None:
        kept = bytes(content)
        await self.machine.slow(f"fill {self.name} {first}", (self, first, len(kept) // self.size), kept, [
            ("done", lambda: self._place(first, kept)),
        ])  # fmt: skip

    def content(self, first: int, count: int) -> bytes:
        self.machine.before(self, first, count)
        found = self.pages[first : first + count]
        assert None not in found, "content of an absent page"
        if any(page.bad for page in found if page is not None):
            raise OSError(errno.EIO, "a frame is bad")
        content = b"".join([page.content for page in found if page is not None])
        self.machine.observe(content)
        return content

    def write(self, offset: int, data: Content) -> None:
        first = offset // self.size
        count = -(-(offset + len(data)) // self.size) - first
        self.machine.before(self, first, count)
        for index in range(first, first + count):
            page = self.pages[index]
            assert page is not None, "a write to an absent page makes a page of zeros"
            if page.held:
                raise OSError(errno.EIO, "the kernel has declared the page bad")
            begin, end = max(offset, index * self.size), min(offset + len(data), (index + 1) * self.size)
            at = begin - index * self.size
            part = bytes(data[begin - offset : end - offset])
            page.content = page.content[:at] + part + page.content[at + len(part) :]
            self.machine.placed(self, index, page.content)
        self.machine.between()

    def moves(self, page: int) -> None:
        """Compaction moves a page to another frame (linux-facts 9): its old one is anybody's."""
        found = self.pages[page]
        if found is not None and not found.bad and page // self._unit not in self.large:
            self.pages[page] = self.machine.new_page(found.content, other=True)
            self.machine.let_go(found)

    def has_bad(self) -> bool:
        """True if some page is in a frame that has gone bad."""
        return any(page is not None and page.bad for page in self.pages)

    def goes_bad(self, page: int, *, declared: bool) -> int | None:
        """The page's frame goes bad; its number. `declared`: the kernel says so to all who map it (linux-facts 26)."""
        found = self.pages[page]
        if found is None:
            return None
        found.bad = True
        self.machine.bad.add(found.number)
        if declared:
            found.held = True
            self.marks.add(page)
            for area in self.areas:
                if area.entries.get(page, ("", False))[0] == PAGE:
                    area.entries[page] = (HWPOISON, False)
        return found.number

    def close(self) -> None:
        self.closed = True
        if not self.areas:
            self.forget()

    def forget(self) -> None:
        """Nobody has it any more."""
        for index, page in enumerate(self.pages):
            if page is not None:
                self.machine.let_go(page)
                self.pages[index] = None
