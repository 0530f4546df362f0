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
* The kernel moves a page that is well to another frame at any moment (9). Owed: what was reported by the number of its old
  frame is not done to it.
* A punch removes a page from everybody's page table. It may take markers of write protection with it (linux-facts 15). In a
  large frame it empties the page in place and removes nothing (11), which is seen before (the manager is root).
* Who touches an absent page sleeps, and the manager is told, once, in any order with what others do. A wake lets it try.

How often each of these may happen in one run is the scenario's: its `budget`. Not in the model: memory that runs out, writes
by direct I/O in flight (10), a process that is not registered (4), more than one thread of a process.
"""

from __future__ import annotations

import asyncio
import copy
import errno
import mmap
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Self

from hwpoison.core.machine import Key, Result, Runs, Store, Table
from hwpoison.simulation.choices import MANAGER, Event
from hwpoison.simulation.files import Disk, SimulatedFile
from hwpoison.simulation.memory import SimulatedPage, SimulatedStore
from hwpoison.simulation.processes import Process, SimulatedHits, SimulatedSpace

OWN_PID = 2
OWN_FRAME = 1
FIRST_PID = 100
FIRST_FRAME = 16


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


class SimulatedMachine:
    """See `core.machine.Machine`. `waiting` are the operations under way: their endings are events of the outside world.

    `before` is called at the start of each short system call with the store and the pages that it is about, `placed` when a
    page has got content; `choose` is asked which of two things happens; `observe` is given all that these calls answer.
    `freed` is called when a frame goes back, `sent` when a process is sent SIGBUS. `touched` is called at the start of each
    call that is about a process, and `affected` with all that the end of something which takes time has to do with.
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
        self.sent: Callable[[Process, int], None] = _nothing_sent
        self.placed: Callable[[SimulatedStore, int, bytes], None] = _nothing_placed
        self.freed: Callable[[], None] = _nothing
        self.touched: Callable[[Process], None] = _unobserved
        self.affected: Callable[[object], None] = _unobserved
        self.observe: Callable[[object], None] = _unobserved
        self.bad: set[int] = set()
        """Frames that have gone bad, by number."""
        self.given_back: list[int] = []
        self.closed_under: list[str] = []
        """What was written or synced of a file when that was closed."""
        """Bad frames that were taken out and given back to the system."""
        self.free: list[int] = []
        self.records = SimulatedRecords(self)
        self.between: Callable[[], None] = _nothing
        self.kept: dict[int, Disk] = {}
        """The files of objects, by number."""
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

    def new_page(self, content: bytes, *, other: bool = False) -> SimulatedPage:
        """The frame that went back last is given out first: who lets go of a bad one gets it again. `other`: one that nobody
        has had."""
        if self.free and not other:
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

    def create(self, name: str, nbytes: int, number: int = 0) -> SimulatedStore:
        store = SimulatedStore(self, name, nbytes, self.table(-(-nbytes // self.page_size)), number)
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

    def now(self) -> float:
        return 0.0

    io_seconds_max = 0.0
    publish_at_once_bytes = 1
    """One page at once: what is more goes the other way."""

    async def in_time(self, story: Awaitable[Result]) -> Result:
        """A file that does not answer in time is one that fails: that is one of the things that go wrong here."""
        return await story

    @property
    def held(self) -> int:
        return self.quarantine.total()

    def quarantined(self, number: int) -> bool:
        return bool(self.quarantine[number])

    async def reserved(self, *, pid: int | None = None, number: int | None = None) -> bool:
        return pid == OWN_PID or number == OWN_FRAME

    async def offline(self, number: int) -> None:
        self.fail("offline", errno.EIO)

    def close(self) -> None:
        """Nothing is left to be let go of."""


class SimulatedRecords:
    """See `core.machine.Records`. `between` of the machine is called whenever something is written down, before that and
    after."""

    def __init__(self, machine: SimulatedMachine) -> None:
        self._machine = machine
        self._values: dict[Key, Any] = {}
        self._together = 0

    def put(self, key: Key, value: Any) -> None:
        with self:
            self._values[key] = value

    def drop(self, key: Key) -> None:
        with self:
            self._values.pop(key, None)

    def together(self) -> Self:
        return self

    def __enter__(self) -> None:
        if not self._together:
            self._machine.between()
        self._together += 1

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._together -= 1
        if kind is None and not self._together:
            self._machine.between()

    def all(self) -> dict[Key, Any]:
        return copy.deepcopy(self._values)

    def require(self) -> None:
        pass

    def restore(self, values: dict[Key, Any]) -> None:
        """To what they were when a manager died."""
        self._values = values
        self._together = 0


class SimulatedInheritance:
    """See `core.machine.Inheritance`. `hits` are those of the guarded views that there are, by client."""

    def __init__(self, machine: SimulatedMachine, hits: dict[int, SimulatedHits]) -> None:
        self._machine = machine
        self._hits = hits

    def store(self, number: int, name: str, nbytes: int) -> SimulatedStore:
        store = next(one for one in self._machine.stores if one.number == number)
        # Those were in the page table of the one before.
        store.marks.clear()
        return store

    def transit(self, *, hold: bool) -> bool:
        for store in self._machine.stores:
            for page in store.transit:
                assert hold, "a page that was taken out is still there"
                if not page.held:
                    self._machine.quarantine[page.number] += 1
            store.transit.clear()
        return True

    def file(self, number: int) -> SimulatedFile:
        return SimulatedFile(self._machine, self._machine.kept[number])

    def space(self, number: int, pid: int) -> SimulatedSpace:
        return next(one.space for one in self._machine.processes if one.pid == pid)

    def hits(self, number: int, index: int) -> SimulatedHits:
        return self._hits[number]


def _nothing_before(store: SimulatedStore, first: int, count: int) -> None:
    pass


def _nothing_sent(process: Process, address: int) -> None:
    pass


def _nothing_placed(store: SimulatedStore, page: int, content: bytes) -> None:
    pass


def _unobserved(answer: object) -> None:
    pass


def _first(options: Sequence[str]) -> int:
    return 0


def _nothing() -> None:
    pass
