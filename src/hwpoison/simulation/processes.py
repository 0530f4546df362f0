"""Client processes of the simulated machine: page tables, accesses, and what the manager does to them."""

from __future__ import annotations

import errno
import os
import signal
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from hwpoison.core.machine import Telling
from hwpoison.simulation.memory import HWPOISON, PAGE, POISON, WATCHED, ZEROS, SimulatedStore

if TYPE_CHECKING:
    from hwpoison.simulation.machine import SimulatedMachine

THREAD = 0
BASE = 1 << 32
"""Where a process has its first mapping."""


class Fault(NamedTuple):
    """What the manager reads of a fault."""

    address: int
    thread: int
    write: bool
    protected: bool


class Sigbus(Exception):
    """What an access ends with."""


@dataclass(slots=True, eq=False)
class Area:
    """A mapping in a client's address space. `entries` are its page table: page -> what, and whether writes are faults."""

    process: Process
    store: SimulatedStore
    address: int
    count: int
    private: bool
    registered_for_writes: bool
    registered: bool = True
    entries: dict[int, tuple[str, bool]] = field(default_factory=dict)

    def unmap(self, first: int, count: int) -> None:
        """The pages are gone from the object."""
        machine = self.store.machine
        for page in range(first, first + count):
            kind, protected = self.entries.get(page, ("", False))
            if kind != PAGE:
                continue
            del self.entries[page]
            if protected and not machine.misfortune(f"marker of {self.process.name} {self.store.name} {page} is lost"):
                self.entries[page] = (WATCHED, True)


class Process:
    """A client's process, with one thread. Its accesses are attempts: what sleeps is asked again when it was woken."""

    def __init__(self, machine: SimulatedMachine, name: str, pid: int) -> None:
        self.machine = machine
        self.name = name
        self.pid = pid
        self.alive = True
        self.ended_by = 0
        self.areas: list[Area] = []
        self.disposition = Telling.FATAL
        self.asleep: Fault | None = None
        """The fault in which its thread sleeps."""
        self.unread: deque[Fault] = deque()
        """Faults that the manager has not read yet."""
        self.signalled: deque[int] = deque()
        """Addresses of signals that were sent and have not arrived."""
        self.on_change: Callable[[], None] = _nothing
        """Called when its thread was woken, has gone to sleep or was sent a signal, and when it was ended."""
        self.space = SimulatedSpace(self)

    def map(self, store: SimulatedStore, *, private: bool = False, protected: bool = False, registered: bool = True) -> Area:
        """A new mapping of the whole object."""
        last = self.areas[-1] if self.areas else None
        # Each process has it somewhere else.
        address = BASE * self.pid if last is None else last.address + (last.count + 1) * store.size
        area = Area(self, store, address, len(store.pages), private, protected, registered)
        if protected:
            area.entries = dict.fromkeys(range(area.count), (WATCHED, True))
        self.areas.append(area)
        store.areas.append(area)
        return area

    def unmap(self, area: Area) -> None:
        """The mapping is gone, also from those that the object knows."""
        self.areas.remove(area)
        area.store.areas.remove(area)
        if area.store.closed and not area.store.areas:
            area.store.forget()

    def die(self, number: int = signal.SIGKILL) -> None:
        """At once; what is left of it does nothing."""
        if not self.alive:
            return
        self.alive = False
        self.ended_by = number
        self.asleep = None
        self.unread.clear()
        self.on_change()
        for area in list(self.areas):
            self.unmap(area)

    def area_at(self, address: int) -> tuple[Area, int] | None:
        """The mapping at `address`, and which page of it."""
        for area in self.areas:
            page = (address - area.address) // area.store.size
            if 0 <= page < area.count:
                return area, page
        return None

    def touch(self, area: Area, page: int, write: Callable[[bytes], bytes] | None = None) -> bytes | None:
        """Try an access to a page: its content after it, None if the thread sleeps in a fault now. Raises `Sigbus`."""
        kind, protected = area.entries.get(page, ("", False))
        if kind in (POISON, HWPOISON):
            raise Sigbus
        if kind == ZEROS:
            assert write is None, "private views are read-only"
            return bytes(area.store.size)
        found = area.store.pages[page]
        if found is None and not area.registered:
            # Nobody is asked: the page of zeros that the kernel makes is everybody's (linux-facts 4).
            found = area.store.pages[page] = self.machine.new_page(bytes(area.store.size))
        if found is None:
            self._sleep(area, page, write is not None, protected=False)
            return None
        if found.bad:
            raise Sigbus
        if kind != PAGE:
            # The kernel maps what the object has; a marker of write protection goes with it.
            area.entries[page] = (PAGE, protected)
        if write is not None:
            if protected:
                self._sleep(area, page, True, protected=True)
                return None
            found.content = write(found.content)
        return found.content

    def copy(self, area: Area, page: int, data: bytes = b"") -> bytes:
        """Read a page in a system call of a process in user mode, or write it: OSError (EFAULT) if that would be a fault."""
        kind, protected = area.entries.get(page, ("", False))
        found = area.store.pages[page]
        if kind == ZEROS:
            return bytes(area.store.size)
        if kind in (POISON, HWPOISON) or found is None or found.bad or (data and protected):
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        if kind != PAGE:
            area.entries[page] = (PAGE, protected)
        if data:
            found.content = data
        return found.content

    def _sleep(self, area: Area, page: int, write: bool, *, protected: bool) -> None:
        self.asleep = Fault(area.address + page * area.store.size, THREAD, write, protected)
        self.unread.append(self.asleep)
        self.on_change()

    def wake(self, address: int, nbytes: int) -> None:
        """Who sleeps there tries again."""
        if self.asleep is not None and address <= self.asleep.address < address + nbytes:
            self.asleep = None
        self.unread = deque(fault for fault in self.unread if not address <= fault.address < address + nbytes)
        self.on_change()

    def discard(self, area: Area, first: int, count: int) -> None:
        """MADV_DONTNEED: its own pages and poison markers go, markers of write protection stay."""
        for page in range(first, first + count):
            kind, protected = area.entries.get(page, ("", False))
            if kind in (ZEROS, POISON, HWPOISON):
                del area.entries[page]
            elif kind == PAGE:
                del area.entries[page]
                if protected:
                    area.entries[page] = (WATCHED, True)


class SimulatedSpace:
    """See `core.machine.Space`."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._machine = process.machine

    @property
    def pid(self) -> int:
        return self._process.pid

    def wake(self, address: int, nbytes: int) -> None:
        self._machine.touched(self._process)
        self._process.wake(address, nbytes)

    async def protect(self, address: int, nbytes: int) -> None:
        def change(entry: tuple[str, bool]) -> tuple[str, bool]:
            return entry if entry[0] in (POISON, HWPOISON) else (entry[0] or WATCHED, True)

        await self._change("protect", address, nbytes, change)

    async def unprotect(self, address: int, nbytes: int) -> None:
        def change(entry: tuple[str, bool]) -> tuple[str, bool]:
            return ("", False) if entry[0] == WATCHED else (entry[0], False)

        await self._change("unprotect", address, nbytes, change)

    async def poison(self, address: int) -> bool:
        done = []

        def change(entry: tuple[str, bool]) -> tuple[str, bool]:
            if entry[0]:
                return entry
            done.append(True)
            return (POISON, False)

        await self._change("poison", address, self._machine.page_size, change)
        return bool(done) or not self._process.alive

    async def unpoison(self, address: int, *, protect: bool) -> None:
        found = self._process.area_at(address)

        def change(entry: tuple[str, bool]) -> tuple[str, bool]:
            if found is not None and found[0].store.pages[found[1]] is None:
                raise OSError(errno.EFAULT, "the page is absent")
            if protect and found is not None and not found[0].registered_for_writes:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return entry if entry[0] in (PAGE, ZEROS, HWPOISON) else (PAGE, protect)

        await self._change("unpoison", address, self._machine.page_size, change)

    async def show_zeros(self, address: int) -> None:
        def change(entry: tuple[str, bool]) -> tuple[str, bool]:
            return entry if entry[0] else (ZEROS, False)

        await self._change("show zeros", address, self._machine.page_size, change)

    async def _change(
        self, what: str, address: int, nbytes: int, change: Callable[[tuple[str, bool]], tuple[str, bool]]
    ) -> None:
        self._machine.touched(self._process)
        size = self._machine.page_size
        found = self._process.area_at(address)
        place = (found[0].store, found[1], nbytes // size) if found else None

        def effect() -> None:
            self._machine.affected(self._process)
            for page in range(nbytes // size):
                found = self._process.area_at(address + page * size)
                if found is None:
                    continue
                area, index = found
                self._machine.affected(index)
                entry = change(area.entries.get(index, ("", False)))
                if entry[0]:
                    area.entries[index] = entry
                else:
                    area.entries.pop(index, None)

        where = f"{place[0].name} {place[1]}" if place else f"{address:#x}"
        await self._machine.slow(f"{what} {self._process.name} {where}", place, nbytes // size, [("done", effect)])

    def telling(self, thread: int) -> Telling:
        return self._process.disposition if self._process.alive else Telling.FATAL

    def signal(self, thread: int, address: int) -> None:
        self._machine.touched(self._process)
        if self._process.alive:
            self._machine.sent(self._process, address)
            self._process.signalled.append(address)
            self._process.on_change()

    def kill(self) -> None:
        self._machine.touched(self._process)
        self._process.die()


class SimulatedHits:
    """See `core.machine.Hits`."""

    index = 0

    def __init__(self) -> None:
        self.guards = 0
        self.count = 0

    @property
    def guarded(self) -> bool:
        return self.guards > 0

    def hit(self) -> int:
        self.count += 1
        return self.count


def _nothing() -> None:
    pass
