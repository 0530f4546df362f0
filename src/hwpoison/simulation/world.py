"""One run: the core over the simulated machine, processes that work, and what happens to them meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hwpoison.core import recovery
from hwpoison.core.manager import MemoryManager
from hwpoison.core.mappings import Client, Mapping
from hwpoison.core.objects import Backing, Loss, MemoryObject
from hwpoison.core.pages import DIRTY, LOST, POISONED
from hwpoison.core.records import Event as LogEvent
from hwpoison.core.records import Failure, Notice, Outcome, Report, Source, State
from hwpoison.errors import PoisonError
from hwpoison.simulation.choices import Choices, Event, Happening
from hwpoison.simulation.invariants import Expectation
from hwpoison.simulation.loop import Mode, SimulationLoop
from hwpoison.simulation.machine import (
    PAGE,
    Area,
    Disk,
    Process,
    Sigbus,
    SimulatedFile,
    SimulatedMachine,
    SimulatedStore,
)

PAGE_SIZE = 8
NO_LIMIT = 1 << 40
"""A memory limit in bytes that is never met: so that pages have ages, and can be evicted."""
NAME = "a"


def token(number: int) -> bytes:
    """The content of a page, different for each number, in each half."""
    return number.to_bytes(PAGE_SIZE // 2, "little") * 2


@dataclass(frozen=True, slots=True)
class Scenario:
    """What there is at the beginning, and what will happen in some order.

    `kind` is anonymous, read-only, writable, or cached (writable, and all of the file can be had at once); `states` has the
    state of each page: absent, present, dirty or lost.
    `operations` are names of `OPERATIONS` with the page that each is about. `worker` is the page that a client, who is
    always there, writes to and then reads (with a read-only object: reads twice). `budget`: how often what may go wrong.
    """

    kind: str
    states: tuple[str, ...]
    operations: tuple[tuple[str, int], ...]
    worker: int | None = 0
    budget: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        happens = ", ".join(f"{name} {page}" for name, page in self.operations)
        return f"{self.kind} {' '.join(self.states)}: {happens}"


class Agent:
    """A client: a process, and what it will do, one thing after the other. Each thing is asked for until it is done."""

    def __init__(self, world: World, name: str, script: Sequence[tuple[str, int, bytes]]) -> None:
        self.world = world
        self.name = name
        self.process: Process = world.machine.process(name)
        self.client: Client = world.manager.add_client(self.process.space)
        self.script = list(script)
        self.at = 0
        self.area: Area | None = None
        self.mapping: Mapping | None = None
        self.mourned = False
        self._dies_for_the_manager = Happening(f"the manager learns that {name} has died", self._mourn)
        self._has_a_fault = Happening(f"the manager reads a fault of {name}", self._read_fault)
        self._gets_signal = Happening(f"{name} gets SIGBUS", self._signalled)
        self._goes_on = Happening(lambda: f"{name}: {self.script[self.at][0]} {self.script[self.at][1]}", self.act)
        self.request: Any = None
        """What it has asked the manager for, and waits for."""

    def map(self) -> None:
        """Map the object."""
        object_ = self.world.object
        self.area = self.process.map(self.world.store, private=not object_.writable, protected=object_.tracks_dirt)
        self.mapping = self.world.manager.map(self.client, object_, self.area.address, None)

    def add_events(self, events: list[Event]) -> None:
        """What it, or its end, can be the next to do."""
        process = self.process
        if not process.alive:
            if not self.mourned:
                events.append(self._dies_for_the_manager)
            return
        if process.unread:
            events.append(self._has_a_fault)
        if process.signalled:
            events.append(self._gets_signal)
        elif process.asleep is None and self.request is None and self.at < len(self.script):
            events.append(self._goes_on)

    def act(self) -> None:
        """Do the next thing."""
        kind, page, data = self.script[self.at]
        if kind in ("read", "write"):
            self._access(page, data if kind == "write" else None)
        elif kind == "unmap":
            assert self.area is not None
            self.process.unmap(self.area)
            self.at += 1
        elif kind == "tell":
            assert self.mapping is not None
            self.world.manager.unmap(self.mapping)
            self.at += 1
        elif kind == "attach":
            self._attach()
        else:
            self._ask(kind, page, data)

    def _access(self, page: int, data: bytes | None) -> None:
        assert self.area is not None
        world = self.world
        try:
            found = self.process.touch(self.area, page, None if data is None else lambda _: data)
        except Sigbus:
            self._refused(page)
            return
        if found is None:
            return
        if data is None:
            world.expectation.read(self.name, page, found)
        else:
            world.expectation.stored(page, data)
        self.at += 1

    def _refused(self, page: int) -> None:
        self.world.expectation.refused(self.name, page)
        self.at += 1

    def _signalled(self) -> None:
        self.process.signalled.clear()
        self.process.asleep = None
        self.process.unread.clear()
        self._refused(self.script[self.at][1])

    def _read_fault(self) -> None:
        fault = self.process.unread.popleft()
        self.world.manager.fault(self.client, fault.address, fault.thread, write=fault.write, protected=fault.protected)

    def _mourn(self) -> None:
        self.mourned = True
        self.world.manager.remove_client(self.client)

    def _attach(self) -> None:
        """As a client does: the object is held, then mapped, then the manager is told and makes sure of the markers."""
        world, object_ = self.world, self.world.object
        if object_.closed or object_.name != NAME or not any(one is object_ for one in world.manager.objects()):
            self.at = len(self.script)
            return
        self.map()
        assert self.area is not None
        address, nbytes = self.area.address, self.area.count * PAGE_SIZE

        async def mapped() -> None:
            if object_.tracks_dirt:
                await self.process.space.protect(address, nbytes)

        self._start("attach", mapped())

    def _ask(self, kind: str, page: int, data: bytes) -> None:
        assert self.mapping is not None
        self._start(f"{kind} {page}", REQUESTS[kind](self.world, self.mapping, page, data))

    def _start(self, name: str, story: Coroutine[Any, Any, None]) -> None:
        self.request = self.world.start(f"{name} of {self.name}", story)
        self.request.add_done_callback(self._answered)

    def _answered(self, _: object) -> None:
        self.request = None
        self.at += 1


# --- what clients ask the manager for --------------------------------------------------------------------------------


async def _write(world: World, mapping: Mapping, page: int, data: bytes) -> None:
    object_ = mapping.object
    with world.expectation.may_become(page, lambda _: data):
        try:
            await recovery.write(world.manager, object_, page * PAGE_SIZE, data)
        except FileNotFoundError:
            assert object_.closed


async def _write_half(world: World, mapping: Mapping, page: int, data: bytes) -> None:
    half = PAGE_SIZE // 2
    with world.expectation.may_become(page, lambda old: data[:half] + old[half:]):
        try:
            await recovery.write(world.manager, mapping.object, page * PAGE_SIZE, data[:half])
        except PoisonError as error:
            world.expectation.told_lost([one.offset // PAGE_SIZE for one in error.ranges])
        except FileNotFoundError:
            assert mapping.object.closed


async def _repair(world: World, mapping: Mapping, page: int, data: bytes) -> None:
    with world.expectation.may_become(page, lambda _: data):
        await recovery.repair(world.manager, mapping.object, page * PAGE_SIZE, data)


async def _discard(world: World, mapping: Mapping, page: int, data: bytes) -> None:
    with world.expectation.may_be_fresh(page):
        try:
            await recovery.discard(world.manager, mapping.object, page, 1)
        except OSError as error:
            # The file is shorter now, or could not be read: the page is still lost.
            assert mapping.object.backing is not None, error


async def _flush(world: World, mapping: Mapping, page: int, data: bytes) -> None:
    world.expectation.flush_begins(mapping)
    try:
        await world.manager.flush(mapping)
    except OSError:
        world.expectation.flush_failed(mapping)
    else:
        world.expectation.flushed(mapping)


async def _prefetch(world: World, mapping: Mapping, page: int, data: bytes) -> None:
    await world.manager.prefetch(mapping, page, 1)


REQUESTS: dict[str, Callable[[World, Mapping, int, bytes], Coroutine[Any, Any, None]]] = {
    "request to write": _write,
    "request to write half of": _write_half,
    "repair": _repair,
    "discard": _discard,
    "flush": _flush,
    "prefetch": _prefetch,
}


# --- what happens to the world ---------------------------------------------------------------------------------------


async def _report(world: World, page: int) -> None:
    with world.expectation.reporting(page) as known:
        known.append(await world.manager.report(Report(name=NAME, offset=page * PAGE_SIZE, source=Source.INJECTED)))


async def _hardware(world: World, page: int) -> None:
    """A frame goes bad, and its number is reported."""
    found = world.store.pages[page]
    if found is None:
        return
    found.bad = True
    world.machine.bad.add(found.number)
    world.expectation.bad.add(page)
    await world.manager.report(Report(pfn=found.number))


async def _evict(world: World, page: int) -> None:
    reclaim = world.manager.reclaim
    reclaim.limit, before = max(0, reclaim.present - 1), reclaim.limit
    try:
        await recovery.make_room(world.manager, 0)
    finally:
        reclaim.limit = before


def _truncate(world: World, page: int) -> None:
    assert world.disk is not None
    world.disk.truncate(page * PAGE_SIZE)
    world.expectation.changed_by_others()


def _collapse(world: World, page: int) -> None:
    """A client has the kernel make a large frame of ours; it does where all pages are present."""
    if None not in world.store.pages:
        world.store.large.add(0)


def _change(world: World, page: int) -> None:
    assert world.disk is not None
    world.disk.change(page * PAGE_SIZE, token(99))
    world.expectation.changed_by_others()


STORIES: dict[str, Callable[[World, int], Coroutine[Any, Any, None]]] = {
    "report": _report,
    "hardware": _hardware,
    "evict": _evict,
}
CHANGES: dict[str, Callable[[World, int], None]] = {"truncate": _truncate, "change": _change, "collapse": _collapse}
SCRIPTS: dict[str, Callable[[int, bytes], list[tuple[str, int, bytes]]]] = {
    "read": lambda page, data: [("read", page, data)],
    "write": lambda page, data: [("write", page, data)],
    "die": lambda page, data: [("write", page, data)],
    "close": lambda page, data: [("unmap", page, data), ("tell", page, data)],
    "attach": lambda page, data: [("attach", page, data), ("read", page, data)],
    **{kind: (lambda page, data, kind=kind: [(kind, page, data)]) for kind in REQUESTS},  # type: ignore[misc]
}
OPERATIONS = (*SCRIPTS, *STORIES, *CHANGES)
_WRITING = ("write", "die", "request to write", "request to write half of", "repair", "flush")


def applies(kind: str, operation: str) -> bool:
    """True if there is such an operation on such an object."""
    if kind == "anonymous":
        return operation not in ("truncate", "change", "flush")
    return kind != "read-only" or operation not in _WRITING


class World:
    """The core, the machine, the clients and all that is expected of them. `deaths` are the pids to come."""

    def __init__(self, scenario: Scenario, choices: Choices, mode: Mode = "quiet") -> None:
        self.scenario = scenario
        self.machine = SimulatedMachine(PAGE_SIZE, budget=dict(scenario.budget))
        self.machine.before = self._before
        self.machine.observe = choices.observed.append
        self.machine.choose = lambda options: choices.pick(options, inside=True)
        self.choices = choices
        self.loop = SimulationLoop(choices, self.outside, mode)  # type: ignore[abstract]
        self.manager = MemoryManager(self.machine, self, instance="sim", memory_limit=NO_LIMIT)
        self.events: list[LogEvent] = []
        self.defects: list[str] = []
        self.failures: list[Failure] = []
        self.disk: Disk | None = None
        self.object = self._make_object()
        self.store: SimulatedStore = self.machine.stores[0]
        self.expectation = Expectation(self)
        self.machine.placed = self.expectation.placed
        self.agents: list[Agent] = []
        self.to_come: list[Happening] = []
        self._populate()

    # --- what it begins with

    def _make_object(self) -> MemoryObject:
        pages = len(self.scenario.states)
        if self.scenario.kind == "anonymous":
            return self.manager.allocate(pages * PAGE_SIZE, NAME)
        content = b"".join(token(1 + page) for page in range(pages))
        kind = self.scenario.kind
        self.disk = self.machine.disk("file", content, writable=kind != "read-only", cached=kind == "cached")
        file = SimulatedFile(self.machine, self.disk)
        backing = Backing(file, 0, self.disk.writable, self.disk.identity())
        return self.manager._create(NAME, len(content), backing)

    def _populate(self) -> None:
        scenario = self.scenario
        if scenario.worker is not None:
            page, writes = scenario.worker, self.object.writable
            first = ("write", page, token(50)) if writes else ("read", page, b"")
            self._join("worker", [first, ("read", page, b"")])
        for number, (name, page) in enumerate(scenario.operations):
            label = f"{name} {page}" if scenario.operations.count((name, page)) == 1 else f"{name} {page} ({number})"
            if name in SCRIPTS:
                agent = self._join(f"client {number}", SCRIPTS[name](page, token(60 + number)), mapped=name != "attach")
                if name == "die":
                    self._will_come(f"{agent.name} dies", agent.process.die)
            elif name in STORIES:
                self._will_come(label, partial(self._begin, label, STORIES[name], page))
            else:
                self._will_come(label, partial(CHANGES[name], self, page))
        for page, state in enumerate(scenario.states):
            self._put(page, state)

    def _join(self, name: str, script: Sequence[tuple[str, int, bytes]], *, mapped: bool = True) -> Agent:
        agent = Agent(self, name, script)
        self.agents.append(agent)
        if mapped:
            agent.map()
        return agent

    def _put(self, page: int, state: str) -> None:
        """Bring a page into the state that it begins with."""
        object_ = self.object
        if state == "absent":
            return
        if state == "lost":
            what = State.DIRTY_FILE if object_.tracks_dirt else State.CLEAN_FILE if object_.backing else State.ANONYMOUS
            object_.pages.set(LOST, page)
            object_.pages.set(POISONED, page)
            object_.losses[page] = Loss("sim-before", what, Outcome.RECOVERED, "")
            self.expectation.lost_before(page)
            return
        content = self.expectation.begins(page, token(40 + page) if state == "dirty" or self.disk is None else None)
        self.store.pages[page] = self.machine.new_page(content)
        object_.pages.arrived(page, 1, self.manager.reclaim.arrived(object_, 1), DIRTY if state == "dirty" else 0)
        for agent in self.agents:
            if agent.area is not None:
                agent.area.entries[page] = (PAGE, object_.tracks_dirt and state != "dirty")

    # --- what can happen

    def outside(self) -> list[Event]:
        """All that can come from outside now, in a fixed order."""
        found: list[Event] = []
        for agent in self.agents:
            agent.add_events(found)
        for waiting in self.machine.waiting:
            found += waiting.endings
        found += self.to_come
        return found

    def _will_come(self, name: str, what: Callable[[], None]) -> None:
        def happen() -> None:
            self.to_come.remove(one)
            what()

        one = Happening(name, happen)
        self.to_come.append(one)

    def _begin(self, name: str, story: Callable[[World, int], Coroutine[Any, Any, None]], page: int) -> None:
        self.start(name, story(self, page))

    def start(self, name: str, story: Coroutine[Any, Any, None]) -> Any:
        """Run what somebody asks of the manager, as the service does."""
        return self.loop.create_task(story, name=name)

    def _before(self, store: SimulatedStore, first: int, count: int) -> None:
        """Processes do not wait for the manager: before each of its system calls, accesses to those pages may happen."""
        while True:
            going = [agent for agent in self.agents if self._can_go(agent, first, count)]
            if not going:
                return
            options = ["the manager goes on", *(f"meanwhile {one.name}: {one.script[one.at][0]}" for one in going)]
            chosen = self.choices.pick(options, inside=True)
            if not chosen:
                return
            going[chosen - 1].act()

    @staticmethod
    def _can_go(agent: Agent, first: int, count: int) -> bool:
        if not agent.process.alive or agent.process.asleep is not None or agent.at >= len(agent.script):
            return False
        kind, page, _ = agent.script[agent.at]
        return kind in ("read", "write") and agent.area is not None and first <= page < first + count

    # --- what the core says

    def event(self, event: LogEvent) -> None:
        self.events.append(event)

    def notice(self, client: Client, notice: Notice) -> None:
        self.expectation.told(client, notice)

    def failure(self, where: str, failure: Failure) -> None:
        self.failures.append(failure)
        self.expectation.handled(failure)

    def defect(self, what: str, error: BaseException) -> None:
        self.defects.append(f"{what}: {error!r}")
