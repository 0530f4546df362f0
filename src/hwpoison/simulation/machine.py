"""The simulated machine: memory, client processes, files and faults, as `core.machine` wants them.

The fault model: what may fail, where, when, and what the system owes in return.

* A process touches memory at any moment, also between two system calls of the manager: each method that is one short
  system call first lets those go whose accesses touch its pages. Owed: the last written byte, or a refusal.
* A frame goes bad at any moment, and is reported, at any moment after that, once or more often. What is read from a frame
  that is really bad is an error, for everybody. Owed: the frame is never used again; a loss is told to each owner once.
* The kernel declares a page bad by itself: its content is an error for everybody, and who has it mapped gets SIGBUS for it
  from then on, also when the manager has put another frame there. Owed: no byte of it; the loss is recorded once reported.
* A process dies at any moment, in a fault too. What the manager does to a dead process succeeds and does nothing.
* A file operation takes any time. A read or write may fail, a write half way; others may change the file at any moment, also
  while it is read: then the first half of what was read is older than the second. Owed: never a mix of versions.
* An ioctl on a client's address space takes any time, and takes effect at its end.
* A punch removes a page from everybody's page table. It may take markers of write protection with it (linux-facts 15). In a
  large frame it empties the page in place and removes nothing (11), which is seen before (the manager is root).
* Who touches an absent page sleeps, and the manager is told, once, in any order with what others do. A wake lets it try.

How often each of these may happen in one run is the scenario's: its `budget`. Not in the model: memory that runs out, writes
by direct I/O in flight (10), a process that is not registered (4), more than one thread of a process.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hwpoison.core.machine import (
    Content,
    Identity,
    NotIsolatedError,
    Runs,
    ShrunkError,
    StaleFrameError,
    Store,
    Table,
    Telling,
    Written,
)
from hwpoison.errors import EHWPOISON
from hwpoison.simulation.choices import Event

OWN_PID = 2
OWN_FRAME = 1
FIRST_PID = 100
FIRST_FRAME = 16
THREAD = 0
BASE = 1 << 32
"""Where a process has its first mapping."""
MANAGER, ALL = "manager", "all"
"""What can be affected, beside pages and processes."""


class Fault(NamedTuple):
    """What the manager reads of a fault."""

    address: int
    thread: int
    write: bool
    protected: bool


class Sigbus(Exception):
    """What an access ends with."""


@dataclass(slots=True)
class SimulatedPage:
    """A frame in use. `bad`: what is in it is not to be had. `held`: the kernel says so, and gives it to nobody again."""

    number: int
    content: bytes
    bad: bool = False
    held: bool = False


class Completion:
    """One way in which something that takes time can end."""

    __slots__ = ("effect", "how", "waiting")

    def __init__(self, waiting: Waiting, how: str, effect: Callable[[], Any]) -> None:
        self.waiting = waiting
        self.how = how
        self.effect = effect

    def __str__(self) -> str:
        return f"{self.waiting.what}: {self.how}"

    def happen(self) -> None:
        self.waiting.machine.waiting.remove(self.waiting)
        self.waiting.machine.affected(MANAGER)
        # A caller that has given up cancels its waiting, not the operation.
        future = self.waiting.future
        try:
            result = self.effect()
        except OSError as error:
            if not future.done():
                future.set_exception(error)
        else:
            if not future.done():
                future.set_result(result)


class Waiting:
    """Something that takes time, with all the ways in which it can end. `state` is all else that its end depends on."""

    __slots__ = ("endings", "future", "machine", "place", "state", "what")

    def __init__(self, machine: SimulatedMachine, what: str, place: object, state: object = None) -> None:
        self.machine = machine
        self.what = what
        self.place = place
        self.state = state
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.endings: list[Completion] = []


class SimulatedFrame:
    """See `core.machine.Frame`."""

    def __init__(self, machine: SimulatedMachine, page: SimulatedPage) -> None:
        self._machine = machine
        self.page = page
        self.number = page.number

    def content(self) -> bytes:
        self._machine.let_go(self.page)
        if self.page.bad:
            raise OSError(EHWPOISON, "the frame is bad")
        return self.page.content

    def quarantine(self) -> None:
        if not self.page.held:
            self._machine.quarantine[self.number] += 1

    def release(self) -> None:
        if self.page.bad and not self.page.held:
            self._machine.given_back.append(self.number)
        self._machine.let_go(self.page)


class SimulatedStore:
    """See `core.machine.Store`."""

    def __init__(self, machine: SimulatedMachine, name: str, nbytes: int) -> None:
        self.machine = machine
        self.name = name
        self.size = machine.page_size
        self.pages: list[SimulatedPage | None] = [None] * -(-nbytes // self.size)
        self.areas: list[Area] = []
        self.large: set[int] = set()
        """Large frames, by number in the object."""
        self.marks: set[int] = set()
        """Pages at which the kernel has left its mark in the manager's own page table: nothing can be published there."""
        self.closed = False

    @property
    def _unit(self) -> int:
        return self.machine.large_frame_bytes // self.size

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
        self.pages[page] = None
        self._unmap(page, 1)
        self.marks.discard(page)
        return SimulatedFrame(self.machine, found)

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
            begin, end = max(offset, index * self.size), min(offset + len(data), (index + 1) * self.size)
            at = begin - index * self.size
            part = bytes(data[begin - offset : end - offset])
            page.content = page.content[:at] + part + page.content[at + len(part) :]
            self.machine.placed(self, index, page.content)

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


PAGE, WATCHED, POISON, ZEROS, HWPOISON = "page", "watched", "poison", "zeros", "hwpoison"
"""What a page table can have for a page: the object's page; a marker of write protection where there is none; a poison
marker; a page of zeros of its own; the kernel's own mark, which stays until the process takes it away (linux-facts 26)."""


@dataclass(slots=True, eq=False)
class Area:
    """A mapping in a client's address space. `entries` are its page table: page -> what, and whether writes are faults."""

    process: Process
    store: SimulatedStore
    address: int
    count: int
    private: bool
    registered_for_writes: bool
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

    def map(self, store: SimulatedStore, *, private: bool = False, protected: bool = False) -> Area:
        """A new mapping of the whole object, registered."""
        last = self.areas[-1] if self.areas else None
        address = BASE if last is None else last.address + (last.count + 1) * store.size
        area = Area(self, store, address, len(store.pages), private, protected)
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
            self._process.signalled.append(address)
            self._process.on_change()

    def kill(self) -> None:
        self._machine.touched(self._process)
        self._process.die()


class SimulatedHits:
    """See `core.machine.Hits`."""

    def __init__(self) -> None:
        self.guards = 0
        self.count = 0

    @property
    def guarded(self) -> bool:
        return self.guards > 0

    def hit(self) -> int:
        self.count += 1
        return self.count


@dataclass(slots=True, eq=False)
class Disk:
    """A file as all see it. `times` counts its changes."""

    name: str
    inode: int
    content: bytes
    times: int = 0
    cached: bool = False
    writable: bool = True

    def identity(self) -> Identity:
        return Identity(1, self.inode, len(self.content), self.times, self.times)

    def change(self, offset: int, data: bytes) -> None:
        """Write, by whomever."""
        self.content = self.content[:offset].ljust(offset, b"\0") + data + self.content[offset + len(data) :]
        self.times += 1

    def truncate(self, nbytes: int) -> None:
        self.content = self.content[:nbytes].ljust(nbytes, b"\0")
        self.times += 1


class SimulatedFile:
    """See `core.machine.File`."""

    def __init__(self, machine: SimulatedMachine, disk: Disk) -> None:
        self._machine = machine
        self.disk = disk

    async def identity(self) -> Identity:
        return self.disk.identity()

    def read_cached(self, offset: int, nbytes: int) -> tuple[Content, Identity] | None:
        return (self.disk.content[offset : offset + nbytes], self.disk.identity()) if self.disk.cached else None

    async def read(self, offset: int, nbytes: int) -> Content:
        old = self.disk.content

        def done() -> bytes:
            now = self.disk.content
            half = offset + nbytes // 2
            return old[offset:half] + now[half : offset + nbytes] if old != now else now[offset : offset + nbytes]

        what = f"read {self.disk.name} {offset}"
        endings: list[tuple[str, Callable[[], Any]]] = [("done", done)]
        if self._machine.allows("read fails"):
            endings.append(("fails", lambda: self._machine.fail("read fails", errno.EIO)))
        state = old[offset : offset + nbytes]
        content: bytes = await self._machine.slow(what, (self.disk, offset, nbytes), state, endings)
        return content

    async def write(self, offset: int, content: Content) -> Written:
        data = bytes(content)

        def write(part: int, code: int = 0) -> Written:
            before = self.disk.identity()
            if part and before.nbytes < offset + len(data):
                return Written(before, before, ShrunkError(before.nbytes, offset + len(data)))
            if part:
                self.disk.change(offset, data[:part])
            error = None
            if code:
                self._machine.goes_wrong("write fails")
                error = OSError(code, "write fails")
            return Written(before, self.disk.identity(), error)

        if not self.disk.writable:
            return write(0, errno.EBADF)
        endings: list[tuple[str, Callable[[], Any]]] = [("done", lambda: write(len(data)))]
        if self._machine.allows("write fails"):
            endings += [
                ("fails", lambda: write(0, errno.ENOSPC)),
                ("fails half way", lambda: write(len(data) // 2, errno.ENOSPC)),
            ]
        what = f"write {self.disk.name} {offset}"
        written: Written = await self._machine.slow(what, (self.disk, offset, len(data)), data, endings)
        return written

    async def sync(self) -> None:
        endings: list[tuple[str, Callable[[], Any]]] = [("done", lambda: None)]
        if self._machine.allows("sync fails"):
            endings.append(("fails", lambda: self._machine.fail("sync fails", errno.EIO)))
        await self._machine.slow(f"sync {self.disk.name}", (self.disk, 0, 0), None, endings)

    async def close(self) -> None:
        pass


class SimulatedMachine:
    """See `core.machine.Machine`. `waiting` are the operations under way: their endings are events of the outside world.

    `before` is called at the start of each short system call with the store and the pages that it is about, `placed` when a
    page has got content; `choose` is asked which of two things happens; `observe` is given all that these calls answer.
    `freed` is called when a frame goes back. `touched` is called at the start of each call that is about a process, and
    `affected` with all that the end of something which takes time has to do with.
    """

    def __init__(
        self,
        page_size: int = 4096,
        large_frame_bytes: int = 2 << 20,
        *,
        poison_markers: bool = True,
        budget: dict[str, int] | None = None,
    ) -> None:
        self.page_size = page_size
        self.large_frame_bytes = large_frame_bytes
        self.poison_markers = poison_markers
        self.budget = Counter(budget or {})
        self.went_wrong: Counter[str] = Counter()
        """How often each has."""
        self.waiting: list[Waiting] = []
        self.quarantine: Counter[int] = Counter()
        self.processes: list[Process] = []
        self.stores: list[SimulatedStore] = []
        self.before: Callable[[SimulatedStore, int, int], None] = _nothing_before
        self.choose: Callable[[Sequence[str]], int] = _first
        self.placed: Callable[[SimulatedStore, int, bytes], None] = _nothing_placed
        self.freed: Callable[[], None] = _nothing
        self.touched: Callable[[Process], None] = _unobserved
        self.affected: Callable[[object], None] = _unobserved
        self.observe: Callable[[object], None] = _unobserved
        self.bad: set[int] = set()
        """Frames that have gone bad, by number."""
        self.given_back: list[int] = []
        """Bad frames that were taken out and given back to the system."""
        self.free: list[int] = []
        self._frames = FIRST_FRAME
        self._inodes = 0

    # --- the world's side

    def events(self) -> list[Event]:
        """All the ways in which what is under way can end next."""
        return [ending for waiting in self.waiting for ending in waiting.endings]

    async def slow(self, what: str, place: object, state: object, endings: Sequence[tuple[str, Callable[[], Any]]]) -> Any:
        """Something takes time: the result of whichever ending it has."""
        waiting = Waiting(self, what, place, state)
        waiting.endings = [Completion(waiting, how, effect) for how, effect in endings]
        self.waiting.append(waiting)
        return await waiting.future

    def allows(self, what: str) -> bool:
        """True if this may still go wrong in this run."""
        return self.budget[what] > 0

    def fail(self, what: str, code: int) -> None:
        """It goes wrong."""
        self.goes_wrong(what)
        raise OSError(code, what)

    def goes_wrong(self, what: str) -> None:
        """It is noted."""
        self.budget[what] -= 1
        self.went_wrong[what] += 1

    def nothing_goes_wrong(self) -> None:
        """From now on, neither what is under way."""
        self.budget.clear()
        for waiting in self.waiting:
            del waiting.endings[1:]

    def misfortune(self, what: str) -> bool:
        """Whether a marker is lost here."""
        if not self.allows("marker lost"):
            return False
        if not self.choose((what.replace("is lost", "stays"), what)):
            return False
        self.goes_wrong("marker lost")
        return True

    def process(self, name: str) -> Process:
        """A new client process."""
        process = Process(self, name, FIRST_PID + len(self.processes))
        self.processes.append(process)
        return process

    def disk(self, name: str, content: bytes, *, cached: bool = False, writable: bool = True) -> Disk:
        """A new file."""
        self._inodes += 1
        return Disk(name, self._inodes, content, cached=cached, writable=writable)

    def new_page(self, content: bytes) -> SimulatedPage:
        """The frame that went back last is given out first: who lets go of a bad one gets it again."""
        if self.free:
            number = self.free.pop()
            return SimulatedPage(number, content, number in self.bad)
        self._frames += 1
        return SimulatedPage(self._frames, content)

    def let_go(self, page: SimulatedPage) -> None:
        """The frame goes back to the system."""
        self.freed()
        if not page.held:
            self.free.append(page.number)

    # --- what the core asks

    def create(self, name: str, nbytes: int) -> SimulatedStore:
        store = SimulatedStore(self, name, nbytes)
        self.stores.append(store)
        return store

    def table(self, nbytes: int) -> Table:
        try:
            return bytearray(nbytes) if nbytes < 1 << 20 else mmap.mmap(-1, nbytes)
        except (OSError, OverflowError) as error:
            raise MemoryError(f"no table of {nbytes} bytes: {error}") from error

    async def find_frame(self, number: int, stores: Sequence[tuple[Store, Runs]]) -> tuple[int, int] | None:
        def search() -> tuple[int, int] | None:
            for index, (store, runs) in enumerate(stores):
                assert isinstance(store, SimulatedStore)
                for first, count in runs():
                    for page in range(first, first + count):
                        found = store.pages[page]
                        if found is not None and found.number == number:
                            return index, page
            return None

        result: tuple[int, int] | None = await self.slow(f"find frame {number}", None, number, [("done", search)])
        return result

    def quarantined(self, number: int) -> bool:
        return bool(self.quarantine[number])

    async def reserved(self, *, pid: int | None = None, number: int | None = None) -> bool:
        return pid == OWN_PID or number == OWN_FRAME

    async def offline(self, number: int) -> None:
        self.fail("offline", errno.EIO)

    def close(self) -> None:
        """Nothing is left to be let go of."""


def _nothing_before(store: SimulatedStore, first: int, count: int) -> None:
    pass


def _nothing_placed(store: SimulatedStore, page: int, content: bytes) -> None:
    pass


def _unobserved(answer: object) -> None:
    pass


def _first(options: Sequence[str]) -> int:
    return 0


def _nothing() -> None:
    pass
