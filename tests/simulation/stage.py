"""A manager on the simulated machine beside models of its memories: one operation after the other, and what must hold."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine

from hwpoison.core.machine import Telling
from hwpoison.core.manager import MemoryManager
from hwpoison.core.mappings import Client
from hwpoison.core.policy import TELL_LIMIT
from hwpoison.core.records import Event, Failure, Notice, State
from hwpoison.simulation.choices import Choices, Happening
from hwpoison.simulation.files import SimulatedFile
from hwpoison.simulation.loop import Mode, SimulationLoop
from hwpoison.simulation.machine import FIRST_FRAME, Completion, SimulatedMachine
from hwpoison.simulation.memory import POISON
from hwpoison.simulation.processes import Process, Sigbus
from tests.simulation.model import PAGE, Handle, Memory

STEPS_MAX = 10_000
"""An operation that takes more does not settle."""
UNKNOWN = ("can't be asked for", "is not known to be done")
"""How a write may end after which the file can't be asked for its version."""
ATTEMPTS_MAX = 10
"""An access that was woken so often, and still does not get its page, never will."""
EVERY_TIME = 1 << 40
Shape = tuple[str, int, int, int, bool]


class Drawn(Choices):
    """Choices that follow from a number, drawn for each operation: with 0, the first options. `chosen` is told of each."""

    def __init__(self, chosen: Callable[[object], None]) -> None:
        super().__init__()
        self._chosen = chosen

    def begin(self, number: int) -> None:
        self._random = random.Random(number) if number else None

    def pick(self, options: Sequence[object], *, inside: bool = False) -> int:
        index = super().pick(options, inside=inside)
        self._chosen(options[index])
        return index


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """An object: its kind and size, where in its file it begins, how much follows, and whether that file is cached."""
    kind = draw(st.sampled_from(["writable", "writable", "anonymous", "read-only"]))
    return kind, draw(st.integers(1, 70)), draw(st.integers(0, 9)), draw(st.integers(0, 9)), draw(st.booleans())


class Stage(RuleBasedStateMachine):
    """What operations are made of. Its user adds them, as rules."""

    def __init__(self) -> None:
        super().__init__()
        self.settled = False
        """The last operation has ended well."""

    def set_up(self, objects: Sequence[Shape], limit: int | None, markers: bool, mode: Mode) -> None:
        self.chance = random.Random(0)
        self.machine = SimulatedMachine(PAGE, poison_markers=markers, budget={"marker lost": EVERY_TIME})
        self.choices = Drawn(self.chosen)
        self.loop = SimulationLoop(self.choices, self.outside, mode)  # type: ignore[abstract]
        self.limit = limit
        self.manager = MemoryManager(self.machine, self, instance="t", memory_limit=limit and limit * PAGE)
        self.manager.reclaim.files_least = 0
        self.clients: dict[Process, Client] = {}
        self.memories: list[Memory] = []
        for number, (kind, nbytes, offset, rest, cached) in enumerate(objects):
            content = self.chance.randbytes(offset + nbytes + rest)
            disk = self.machine.disk(f"file-{number}", content, cached=cached, writable=kind == "writable")
            self.memories.append(Memory(f"{kind}-{number}", nbytes, disk if kind != "anonymous" else None, offset))
        self.faults = self.reports = self.known_already = self.isolated = 0

    # --- one operation

    @contextmanager
    def step(self, data: Any) -> Iterator[None]:
        self.settled = False
        self.choices.begin(0 if data is None else data.draw(st.integers(0, 1000)))
        self.events: list[Event] = []
        self.defects: list[str] = []
        self.notices: list[tuple[int, str, int, int, State]] = []
        self.losses: list[tuple[int, str, int, int, State]] = []
        self.wrong: set[tuple[str, str]] = set()
        """What went wrong, with which file."""
        self.loop.enter()
        try:
            yield
            self.settle()
        finally:
            self.loop.leave()
        self.check()
        self.settled = True

    def settle(self) -> None:
        limit = self.loop.steps + STEPS_MAX
        while self.loop.step():
            assert self.loop.steps < limit

    def run(self, story: Coroutine[Any, Any, Any]) -> Any:
        task = self.loop.create_task(story)
        self.settle()
        assert task.done(), "nobody waits for ever"
        return task.result()

    def outside(self) -> list[Any]:
        faults = [Happening(f"a fault of {one.name}", partial(self.read_fault, one)) for one in self.clients if one.unread]
        return [*faults, *self.machine.events()]

    def read_fault(self, process: Process) -> None:
        address, thread, write, protected = process.unread.popleft()
        self.faults += 1
        self.manager.fault(self.clients[process], address, thread, write=write, protected=protected)

    def chosen(self, option: object) -> None:
        """Something goes wrong if the world has chosen it so."""
        if isinstance(option, Completion) and option.how != "done":
            what, name = option.waiting.what.split()[:2]
            self.wrong.add((what, name))
            for memory in self.memories:
                if what == "sync" and memory.disk is not None and memory.disk.name == name:
                    memory.failed()
                if what == "write" and memory.disk is not None and memory.disk.name == name and option.how in UNKNOWN:
                    # Nobody knows which version the file is in: it may as well be another's.
                    memory.foreign = memory.is_open

    # --- clients

    def open(self, memory: Memory) -> bool:
        """As the service does it; whether there is such an object now."""
        if memory.disk is None:
            return memory.is_open or self.allocate(memory)
        file = SimulatedFile(self.machine, memory.disk)
        identity = self.run(self.manager.version(memory.name, file))
        opening = partial(
            self.manager.open, memory.name, file, identity, memory.offset, memory.nbytes, writable=memory.writable
        )
        if len(memory.disk.content) < memory.offset + memory.nbytes:
            with pytest.raises(ValueError):
                opening()
            # Somebody makes it as long again, or it would stay closed for the rest of the sequence.
            memory.change_file(partial(memory.disk.truncate, memory.offset + memory.nbytes))
            return self.open(memory)
        if memory.is_open and memory.foreign:
            with pytest.raises(FileExistsError):
                opening()
            return False
        object_ = opening()
        assert not memory.is_open or object_ is memory.object
        if not memory.is_open:
            memory.opened(object_, self.machine.stores[-1])
        return True

    def allocate(self, memory: Memory) -> bool:
        # Whole pages.
        allocated = sum(
            -(-one.nbytes // PAGE) for one in self.memories if one.disk is None and (one.is_open or one is memory)
        )
        if self.limit is not None and allocated > self.limit:
            with pytest.raises(MemoryError):
                self.manager.allocate(memory.nbytes, memory.name)
            return False
        object_ = self.manager.allocate(memory.nbytes, memory.name)
        memory.opened(object_, self.machine.stores[-1])
        return True

    def map(self, memory: Memory, process: Process | None) -> Handle:
        if process is None:
            process = self.machine.process(f"client-{len(self.machine.processes)}")
            process.disposition = Telling.HANDLED
            self.clients[process] = self.manager.add_client(process.space)
        area = process.map(memory.store, private=not memory.writable, protected=memory.tracks_dirt)
        mapping = self.manager.map(self.clients[process], memory.object, area.address, None)
        memory.handles.append(Handle(process, area, mapping, memory))
        return memory.handles[-1]

    def die(self, process: Process) -> None:
        process.die()
        self.manager.remove_client(self.clients.pop(process))
        self.left([one for memory in self.memories for one in memory.handles if one.process is process])

    def left(self, handles: list[Handle]) -> None:
        for handle in handles:
            handle.memory.handles.remove(handle)
        self.settle()
        for memory in dict.fromkeys(one.memory for one in handles):
            if not memory.handles:
                self.ended(memory)

    def ended(self, memory: Memory) -> None:
        """Nobody has it any more: its changes are in the file, and it is gone, unless some are lost."""
        if State.DIRTY_FILE in memory.lost.values():
            assert not memory.object.closed, "who opens it again must find the loss"
            return
        assert memory.object.closed
        memory.is_open = False
        said = any(one.kind == "error" and one.name == memory.name and "are lost" in one.detail for one in self.events)
        assert said or not memory.unsaved()
        assert self.could_fail(memory) or not said

    def access(self, handle: Handle, page: int, write: Callable[[bytes], bytes] | None = None) -> bytes | None:
        """A process touches a page: what is in it then, None if it was refused."""
        if handle.told[page] == TELL_LIMIT:
            # Once more, and the process would be killed: its handler does not help it.
            return None
        for _ in range(ATTEMPTS_MAX):
            try:
                content = handle.process.touch(handle.area, page, write)
            except Sigbus:
                return None
            if content is not None:
                return content
            self.settle()
            assert handle.process.alive
            assert handle.process.asleep is None, "nobody sleeps for ever"
            if handle.process.signalled:
                handle.process.signalled.popleft()
                handle.told[page] += 1
                return None
        raise AssertionError("an access ends")

    # --- what is told to the observer

    def event(self, event: Event) -> None:
        self.events.append(event)

    def notice(self, client: Client, notice: Notice) -> None:
        assert self.manager.stands(notice)
        self.notices.append((client.number, notice.name, notice.offset, notice.nbytes, notice.state))

    def failure(self, where: str, failure: Failure) -> None:
        self.reports += 1
        self.known_already += failure.already_poisoned

    def defect(self, what: str, error: BaseException) -> None:
        self.defects.append(f"{what}: {error!r}")

    # --- what must hold after each

    def check(self) -> None:
        assert not self.defects
        assert sorted(self.notices) == sorted(self.losses), "each owner is told of each loss once"
        self.check_that_nothing_waits()
        self.check_frames()
        opened = [one for one in self.memories if one.is_open]
        assert {one.name for one in self.manager.objects()} == {one.name for one in opened}
        for memory in opened:
            assert memory.object.lost() == memory.ranges()
            assert all(memory.present(page) for page in memory.only_here())
            for page, found in enumerate(memory.store.pages):
                assert found is None or (page not in memory.lost and found.content == memory.pages[page])
        self.look_at_files()
        for memory in opened:
            self.check_page_tables(memory)
        present = sum(memory.present(page) for memory in opened for page in range(memory.count))
        assert self.manager.reclaim.present == present
        statistics = self.manager.statistics
        assert (statistics.faults, statistics.quarantined) == (self.faults, self.isolated)
        assert (statistics.states.total(), statistics.outcomes.total()) == (self.reports, self.reports - self.known_already)

    def check_page_tables(self, memory: Memory) -> None:
        """Only what is lost is refused for good, and nobody can store to a page of a file unseen that counts as clean."""
        unwatched = memory.stored | memory.touched | set(memory.lost)
        for area in memory.store.areas:
            for page in range(area.count):
                kind, protected = area.entries.get(page, ("", False))
                assert kind != POISON or page in memory.lost
                assert protected or page in unwatched or not memory.tracks_dirt

    def check_that_nothing_waits(self) -> None:
        assert not self.machine.waiting
        assert not self.loop.errors
        assert all(task.done() for task in self.loop.tasks)
        assert not any(process.asleep or process.unread for process in self.clients)
        for object_ in self.manager.objects():
            assert not object_.locks.busy
            assert object_.backing is None or not (object_.backing.writing or object_.backing.turn.locked())

    def look_at_files(self) -> None:
        for memory in self.memories:
            memory.look_at_file(half_way=self.went_wrong("write", memory))

    def check_frames(self) -> None:
        """Each is a page's, or the system's, or held, and what is bad is held."""
        machine = self.machine
        used = [page.number for store in machine.stores for page in store.pages if page is not None]
        known = sorted([*used, *machine.free, *machine.quarantine.elements()])
        assert known == list(range(FIRST_FRAME + 1, FIRST_FRAME + 1 + len(known)))
        assert machine.bad <= set(machine.quarantine)

    def went_wrong(self, what: str, memory: Memory) -> bool:
        return memory.disk is not None and (what, memory.disk.name) in self.wrong

    def could_fail(self, memory: Memory) -> bool:
        """True if what is dirty could not all be written."""
        wrong = self.went_wrong("write", memory) or self.went_wrong("sync", memory)
        return wrong or memory.cut_off(memory.stored | memory.touched)

    def lose(self, memory: Memory, pages: Iterable[int], state: State) -> None:
        """From now on these pages are lost."""
        owners = {handle.mapping.client.number for handle in memory.handles}
        for page in pages:
            memory.lost[page] = state
            if state is State.DIRTY_FILE:
                memory.untold.add(page)
            memory.clean([page])
            self.losses += [(one, memory.name, page * PAGE, memory.nbytes_of(page), state) for one in owners]
        if state is State.DIRTY_FILE and pages:
            memory.failed()

    def read_in(self, memory: Memory, absent: set[int], refused: set[int]) -> None:
        """Absent pages had to be read, and these were refused: as it must be if the file is another one by now, and as it
        may be if reading it has failed."""
        assert refused <= absent
        if memory.foreign:
            assert refused == absent
        elif not self.went_wrong("read", memory):
            assert not refused
        self.lose(memory, refused, State.CLEAN_FILE)

    @contextmanager
    def writing_back(self, memories: Sequence[Memory]) -> Iterator[None]:
        """All that is dirty of these is to be in their files afterwards, or it is said that it is not."""
        yield
        self.look_at_files()
        for memory in memories:
            if not self.could_fail(memory):
                assert not memory.unsaved()
                memory.clean(range(memory.count))
