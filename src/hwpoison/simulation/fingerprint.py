"""A value that two worlds share if and only if the same can happen in both from here on.

It is made of everything that the future depends on: the machine, the books, what is asked of the expectation, what is under
way outside, the callbacks that are ready, the timers, and of each task where it stands and what it holds. A coroutine's
stack is had from the garbage collector: it has loops' iterators and temporaries too, which the local variables have not.
A type that is not known here is an error: it must be taught, not skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import types
from asyncio.locks import Event, Lock
from asyncio.timeouts import Timeout
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from typing import Any

from hwpoison.core import locks, mappings, objects, reclaim
from hwpoison.core.accounting import Statistics
from hwpoison.core.failure import Handling, Row
from hwpoison.core.journal import Journal
from hwpoison.core.pages import Pages
from hwpoison.core.readahead import STREAMS
from hwpoison.core.records import Event as LogEvent
from hwpoison.core.takeover import _Takeover
from hwpoison.simulation import files, machine, memory, processes
from hwpoison.simulation.agents import Agent, Guard
from hwpoison.simulation.invariants import Expectation
from hwpoison.simulation.loop import SimulationLoop, TimedCallback
from hwpoison.simulation.scenario import Scenario
from hwpoison.simulation.world import Manager, World

_PLAIN = {int, bytes, bool, type(None), float}
_CODE = (
    types.FrameType, types.CodeType, types.ModuleType, type, types.BuiltinFunctionType,
    types.GetSetDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType, types.MethodDescriptorType,
)  # fmt: skip
_NOT_HELD = {*_CODE, types.CoroutineType}
"""What a coroutine refers to and does not hold: code, and the coroutine that it waits for, which is looked at by itself."""


class Fingerprint:
    """One look at a world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._futures: dict[int, int] = {}
        self._ids: dict[str, int] = {}
        self._frames: dict[int, int] = {}

    def value(self) -> int:
        """The hash."""
        return hash(self.parts())

    def parts(self) -> tuple[Any, ...]:
        """All of it."""
        return (self._memory(), self._books(), self._outside(), self._tasks(), self._expected())

    def _memory(self) -> tuple[Any, ...]:
        simulated = self._world.machine
        stores = tuple([
            (tuple([page and (self._frame(page.number), page.content, page.bad, page.held) for page in store.pages]),
             tuple(store.large), tuple(store.marks), store.closed,
             tuple([self._frame(page.number) for page in store.transit]),
             tuple([(area.process.pid, area.address, tuple(sorted(area.entries.items()))) for area in store.areas]))
            for store in simulated.stores
        ])  # fmt: skip
        processes = tuple([
            (one.alive, one.asleep, tuple(one.unread), tuple(one.signalled)) for one in simulated.processes
        ])  # fmt: skip
        disk = self._world.disk
        return (
            stores, processes,
            disk and (disk.content, disk.durable, disk.pending, tuple(sorted(disk.given_up)), disk.times, disk.cached),
            tuple(sorted([(self._frame(number), count) for number, count in simulated.quarantine.items()])),
            tuple([self._frame(number) for number in simulated.free]), tuple(sorted(simulated.budget.items())),
            tuple(sorted([self._frame(one) for one in simulated.bad])),
        )  # fmt: skip

    def _books(self) -> tuple[Any, ...]:
        world = self._world
        object_, manager = world.object, world.manager
        pages, backing = object_.pages, object_.backing
        return (
            bytes(pages.flags[: pages.count]), bytes(pages.generation[: pages.count]), pages.present,
            tuple([(page, self.canonical(loss)) for page, loss in object_.losses.items()]),
            object_.error_sequence, tuple(sorted(object_.untold)), object_.unsynced, object_.references, object_.closed,
            self.canonical(object_.ending),
            self.canonical(object_.locks._held), self.canonical(object_.locks._waiting), self.canonical(object_._io),
            backing and (backing.identity, backing.changed, backing.writing, self.canonical(backing.turn)),
            tuple([self._mapping(one) for one in object_.mappings]),
            tuple([(client.alive, tuple(sorted(client.told.items())), len(client.vacated)) for client in manager.clients()]),
            self.canonical(vars(manager.reclaim)), tuple(sorted(manager.lost_changes_of.items())),
            tuple(sorted(object_.resident.items())), tuple(manager.promises),
        )  # fmt: skip

    def _mapping(self, mapping: mappings.Mapping) -> tuple[Any, ...]:
        return (
            mapping.number, tuple(sorted(mapping.markers)), tuple(mapping.met), mapping.met_before,
            _streams(mapping.reads, mapping.object), _streams(mapping.writes, mapping.object),
            mapping.error_seen, mapping.errors_apart, mapping.heir,
            len(mapping._answers), tuple(mapping._asleep.items()), mapping.hits and mapping.hits.guarded,
            tuple(mapping.resident.items()), mapping.gone,
        )  # fmt: skip

    def _outside(self) -> tuple[Any, ...]:
        world = self._world
        loop = world.loop
        return (
            tuple([(one.what, self.canonical(one.state), self._future(one.future)) for one in world.machine.waiting]),
            tuple([
                (one.at, one.mourned, one.area is not None, self.canonical(one.request), one.guard and one.guard.state)
                if one.process.alive else (one.has_written, one.mourned, one.guard and one.guard.hits.guarded)
                for one in world.agents
            ]),
            tuple([one.owns for one in world.agents]),
            tuple([str(one) for one in world.to_come]), tuple(world.unreported), world.dead, world.may_die,
            world.successors and self._to_succeed(),
            tuple([one.owner for one in loop.ready]),
            tuple(sorted([(round(at - loop.time(), 9), one.owner) for at, _, one in loop.timers if not one.cancelled()])),
            loop.arriving if loop.mode == "batch" else None,
        )  # fmt: skip

    def _to_succeed(self) -> tuple[Any, ...]:
        """What a successor finds, beside the memory."""
        world = self._world
        # Not how often what has happened: nothing depends on that.
        records = sorted(
            (self.canonical(key), self.canonical(value))
            for key, value in world.machine.records.all().items()
            if key[0] not in ("counted", "answer")
        )
        answers = [key for key in world.machine.records.all() if key[0] == "answer"]
        transit = [self._frame(page.number) for store in world.machine.stores for page in store.transit]
        told = tuple(sorted(world.errors_seen.items()))
        written = tuple(sorted(world.disk.written)) if world.disk is not None else ()
        return (
            written, hash(repr(records)), len(answers), tuple(transit), world.successors, world.taking_over, told,
            len(world.unanswered), self.canonical(world.manager.answers), len(world._to_begin),
            hash(repr(world._left)) if world.dead else None, tuple(sorted(world.expectation.found_out)),
        )  # fmt: skip

    def _tasks(self) -> tuple[Any, ...]:
        found = []
        for task in self._world.loop.tasks:
            if task.done():
                continue
            chain = []
            coroutine: Any = task.get_coro()
            while type(coroutine) is types.CoroutineType:
                chain.append(self._coroutine(coroutine))
                coroutine = coroutine.cr_await
            found.append((
                task.get_name(), task.cancelling(), self._world.has_waited(task), tuple(chain),
                self.canonical(task._fut_waiter),  # type: ignore[attr-defined]
            ))  # fmt: skip
        # One that has failed is looked at in the end: a run in which none has must not stand for it.
        failed = [
            (task.get_name(), repr(task.exception()))
            for task in self._world.loop.tasks
            if task.done() and not task.cancelled() and task.exception() is not None
        ]
        return tuple(found), tuple(failed), len(self._world.loop.errors)

    def _coroutine(self, coroutine: types.CoroutineType[Any, Any, Any]) -> tuple[Any, ...]:
        frame = coroutine.cr_frame
        canonical, plain, constant = self.canonical, _PLAIN, _ONE
        # This is where most time goes.
        held = [
            one if kind in plain else constant[kind] if kind in constant else canonical(one)
            for one in _referents(coroutine)
            if (kind := type(one)) not in _NOT_HELD
        ]
        return (coroutine.__name__, frame.f_lasti if frame else None, tuple(held))

    def _expected(self) -> tuple[Any, ...]:
        expectation = self._world.expectation
        return (
            # What a flush has to find is what came after it began.
            tuple([tuple(one) if expectation._flushes else one[-1] for one in expectation.history]),
            tuple(sorted(expectation.foreign)), expectation.frames_gone_bad, expectation._calm,
            tuple(sorted([one.number for one in expectation.owed])), tuple(sorted(expectation._untold)),
            tuple([len(one) for one in expectation._may]), tuple(expectation._fresh), tuple(expectation._reviving),
            tuple([tuple(one) for one in expectation._was]),
            tuple(expectation._reporting),
            tuple(sorted([(self._id(id_), page, who) for id_, page, who in expectation._told])),
            tuple(sorted([(self._id(id_), page) for id_, page in expectation._losses])),
            tuple([(one.number, tuple(begun), *rest) for one, (begun, *rest) in expectation._flushes.items()]),
            tuple([(one.number, wrong) for one, wrong in expectation._told_of.items()]),
            tuple([(one.number, tuple(sorted(dirty))) for one, dirty in expectation._dirty.items()]),
            tuple(sorted(expectation._unsynced)), tuple(sorted(expectation._unsure)), expectation.unheard,
            tuple(sorted(expectation.elsewhere)), expectation.collapsed,
            tuple(sorted(expectation.resident.items())), tuple(sorted(expectation.struck)),
            tuple(sorted([self._frame(one) for one in expectation.named])),
        )  # fmt: skip

    # --- what tasks hold

    def canonical(self, value: Any) -> Any:
        """The same for values that make no difference."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is str:
            return self._id(value) if value.startswith("sim-") else value
        if kind in _ONE:
            return _ONE[kind]
        known = _KNOWN.get(kind)
        if known is None:
            known = _KNOWN[kind] = _learned(kind, value)
        return known(self, value)

    def _future(self, future: asyncio.Future[Any]) -> tuple[Any, ...]:
        number = self._futures.setdefault(id(future), len(self._futures))
        return ("future", number, future._state)

    def _id(self, event_id: str) -> int:
        return self._ids.setdefault(event_id, len(self._ids))

    def _frame(self, number: int) -> int:
        return self._frames.setdefault(number, len(self._frames))


def _streams(streams: dict[int, int], object_: objects.MemoryObject) -> tuple[tuple[int, int], ...]:
    """Those that can go on. Of the others it matters how many there are, once they push out any."""
    if len(streams) >= STREAMS:
        return tuple(streams.items())
    return tuple([(page, window) for page, window in streams.items() if page < object_.pages.count])


def _referents(suspended: Any) -> list[Any]:
    """What a coroutine or generator holds. Behind it comes the exception that it handles: None, or nothing if no function
    that it has called ever handled one, which depends on what was cached, and makes no difference."""
    referents = gc.get_referents(suspended)
    if referents and referents[-1] is None:
        referents.pop()
    return referents


def _held(look: Fingerprint, value: locks.Held) -> Any:
    return ("held", value.first, value.end, look.canonical(value.granted))


def _lock(look: Fingerprint, value: Lock) -> Any:
    return ("lock", value.locked(), look.canonical(list(value._waiters or ())))


def _event(look: Fingerprint, value: Event) -> Any:
    return ("event", value.is_set(), look.canonical(list(value._waiters)))


def _timeout(look: Fingerprint, value: Timeout) -> Any:
    when = value.when()
    left = None if when is None else round(when - look._world.loop.time(), 9)
    return ("timeout", left, value._state.value)  # type: ignore[attr-defined]


def _generator(look: Fingerprint, value: Any) -> Any:
    frame = value.gi_frame
    referents = [look.canonical(one) for one in _referents(value) if not isinstance(one, _CODE)]
    return ("generator", value.__name__, frame.f_lasti if frame else None, tuple(referents))


def _function(look: Fingerprint, value: types.FunctionType) -> Any:
    """What it was made with, if that is anything."""
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    return (value.__name__, tuple([look.canonical(one) for one in cells])) if cells else None


def _each(look: Fingerprint, value: Any) -> Any:
    return tuple([look.canonical(one) for one in value])


def _dict(look: Fingerprint, value: dict[Any, Any]) -> Any:
    return tuple([(look.canonical(key), look.canonical(one)) for key, one in value.items()])


def _task(look: Fingerprint, value: asyncio.Task[Any]) -> Any:
    return ("task", value.get_name(), value.done())


def _learned(kind: type, value: Any) -> Callable[[Fingerprint, Any], Any]:
    """How to look at what belongs to a family of types. Raises TypeError for a type of no family that is known."""
    name = kind.__name__
    if issubclass(kind, asyncio.Task):
        return _task
    if issubclass(kind, asyncio.Future):
        return Fingerprint._future
    if issubclass(kind, Enum):
        return lambda look, value: value.value
    if issubclass(kind, BaseException):
        return lambda look, value: (name, look.canonical(value.args), look.canonical(vars(value)))
    if issubclass(kind, tuple):
        return _each
    if is_dataclass(kind):
        names = [one.name for one in fields(kind)]
        return lambda look, value: (name, *[look.canonical(getattr(value, one)) for one in names])
    if issubclass(kind, _CODE):
        return lambda look, value: None
    if name in ("FutureIter", "coroutine_wrapper", "Context", "weakref", "ReferenceType"):
        return lambda look, value: name
    raise TypeError(f"teach the fingerprint what a {kind.__module__}.{kind.__qualname__} is: {value!r}")


_ONLY = (
    Manager, World, SimulationLoop, Expectation, machine.SimulatedMachine, processes.SimulatedHits, Journal,
    machine.SimulatedRecords, machine.SimulatedInheritance, _Takeover,
    mappings.ReverseMap, Pages, reclaim.Reclaim, Statistics, Scenario, Agent, Guard,
)  # fmt: skip
"""Of these there is one, or its content is part of the fingerprint in another place."""
LOOKED_AT = {
    "MemoryObject": (
        "_io", "backing", "closed", "ending", "error_sequence", "locks", "losses", "mappings", "pages", "references",
        "resident", "unsynced", "untold",
    ),
    "Manager": ("_clients", "_objects", "answers", "lost_changes_of", "promises", "reclaim"),
    "Expectation": (
        "_calm", "_dirty", "_flushes", "_fresh", "_losses", "_may", "_reporting", "_reviving", "_told", "_told_of",
        "_unsure", "_unsynced", "_untold", "_was", "collapsed", "elsewhere", "foreign", "found_out", "frames_gone_bad",
        "history", "named", "owed", "resident", "struck",
    ),
    "Agent": ("area", "at", "guard", "mourned", "owns", "process", "request"),
}  # fmt: skip
"""What changes in these, and is part of the fingerprint."""
THE_SAME = {
    "MemoryObject": ("name", "nbytes", "number", "page_size", "persistent", "store", "unit_pages"),
    # Numbers that are given once make no difference; tasks are looked at by themselves.
    "Manager": (
        "_events", "_numbers", "_tasks", "_world", "_zeros", "instance", "journal", "life", "machine", "memory_limit",
        "observer", "offline_foreign", "statistics",
    ),
    "Expectation": ("violation", "world"),
    # What it maps is known by its process and by whether it owns.
    "Agent": (
        "_dies_for_the_manager", "_gets_signal", "_has_a_fault", "client", "goes_on", "mapping", "name", "script", "world",
    ),
}  # fmt: skip
"""What does not change in them, or makes no difference. There is nothing else in them: a test looks."""
_ITERATORS: tuple[type, ...] = (
    type(iter([])),
    type(iter(())),
    type(iter(range(1))),
    type(iter(deque())),
    type(zip()),
    type(enumerate(())),
)
_ONE: dict[type, str] = {
    **{kind: kind.__name__ for kind in _ONLY},
    locks.RangeLocks: "locks",
    contextlib.suppress: "suppress",
}
_KNOWN: dict[type, Callable[[Fingerprint, Any], Any]] = {
    **{kind: (lambda look, value: (type(value).__name__, look.canonical(value.__reduce__()[1:]))) for kind in _ITERATORS},
    list: _each,
    tuple: _each,
    deque: _each,
    dict: _dict,
    Counter: _dict,
    set: lambda look, value: tuple(sorted([look.canonical(one) for one in value])),
    frozenset: lambda look, value: tuple(sorted([look.canonical(one) for one in value])),
    bytearray: lambda look, value: bytes(value),
    memoryview: lambda look, value: value.tobytes() if value.nbytes < 1 << 12 else ("memory", value.nbytes),
    range: lambda look, value: value,
    slice: lambda look, value: (value.start, value.stop, value.step),
    contextlib._GeneratorContextManager: lambda look, value: look.canonical(value.gen),
    types.CellType: lambda look, value: look.canonical(gc.get_referents(value)),
    types.GeneratorType: _generator,
    types.FunctionType: _function,
    types.CoroutineType: Fingerprint._coroutine,
    types.MethodType: lambda look, value: (value.__name__, look.canonical(value.__self__)),
    partial: lambda look, value: (
        look.canonical(value.func), look.canonical(value.args), look.canonical(value.keywords),
    ),
    Lock: _lock,
    Event: _event,
    Timeout: _timeout,
    TimedCallback: lambda look, value: ("timer", round(value.when() - look._world.loop.time(), 9), value.cancelled()),
    locks.Held: _held,
    objects.MemoryObject: lambda look, value: ("object", value.number),
    # Who found it and when makes no difference.
    objects.Loss: lambda look, value: (
        "loss", look.canonical(value.event_id), value.state.value, value.outcome.value, value.reason,
    ),
    objects.Backing: lambda look, value: ("backing", value.place),
    mappings.Mapping: lambda look, value: ("mapping", value.number),
    mappings.Client: lambda look, value: ("client", value.number),
    Handling: lambda look, value: (
        "handling", look.canonical(value.event_id), look.canonical(value.place), value.state, value.victims, value.reason,
    ),
    Row: lambda look, value: value.state.value,
    LogEvent: lambda look, value: value.kind,
    files.SimulatedFile: lambda look, value: ("file", value.disk.inode),
    memory.SimulatedStore: lambda look, value: ("store", value.name),
    processes.SimulatedSpace: lambda look, value: ("space", value.pid),
    memory.SimulatedFrame: lambda look, value: ("frame", look._frame(value.number), value.page.content, value.page.bad),
    machine.Waiting: lambda look, value: ("waiting", value.what),
    processes.Process: lambda look, value: ("process", value.pid),
    processes.Area: lambda look, value: ("area", value.process.pid, value.address),
    files.Disk: lambda look, value: ("disk", value.inode),
}  # fmt: skip
