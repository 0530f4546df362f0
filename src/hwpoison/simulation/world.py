"""One run: the core over the simulated machine, processes that work, and what happens to them meanwhile."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from hwpoison.core.journal import AskedBy, failure_of
from hwpoison.core.locks import RangeLocks
from hwpoison.core.machine import Key
from hwpoison.core.manager import MemoryManager
from hwpoison.core.mappings import Client
from hwpoison.core.objects import Backing, Loss, MemoryObject
from hwpoison.core.pages import DIRTY, LOST, POISONED, WRITEBACK
from hwpoison.core.records import Event as LogEvent
from hwpoison.core.records import Failure, Notice, Outcome, Report, State
from hwpoison.core.recovery import note_loss
from hwpoison.core.takeover import take_over
from hwpoison.simulation.agents import Agent
from hwpoison.simulation.choices import ALL, MANAGER, Choices, Control, Event, Happening
from hwpoison.simulation.files import FILE_OFFSET, PREFIX, Disk, SimulatedFile
from hwpoison.simulation.invariants import Expectation
from hwpoison.simulation.liveness import Liveness
from hwpoison.simulation.loop import Mode, SimulationLoop
from hwpoison.simulation.machine import SimulatedInheritance, SimulatedMachine
from hwpoison.simulation.memory import PAGE, SimulatedStore
from hwpoison.simulation.operations import CHANGES, DYING, NAME, NO_LIMIT, PAGE_SIZE, SCRIPTS, STORIES, token
from hwpoison.simulation.processes import Process
from hwpoison.simulation.scenario import Operation, Scenario, Step

UNIT_PAGES = 4
"""Pages of a large frame, or all pages of an object that has fewer."""
DEATH = "the manager dies"
SUCCESSION = "another manager takes over"


class ManagerDiedError(Control):
    """The manager is dead: nothing of it runs on."""


class Manager(MemoryManager):
    """A manager in a world, which learns at once what it inherits."""

    def __init__(self, world: World, life: int) -> None:
        limit = (world.scenario.limit or NO_LIMIT) * PAGE_SIZE
        super().__init__(world.machine, world, instance="sim", life=life, memory_limit=limit)
        self.reclaim.files_least = 0
        self._world = world

    def inherit(self, one: MemoryObject | Client) -> None:
        super().inherit(one)
        if isinstance(one, MemoryObject):
            self._world.object = one
            return
        for agent in self._world.agents:
            if agent.client.number == one.number:
                agent.client = one


class World:
    """The core, the machine, the clients and all that is expected of them."""

    def __init__(self, scenario: Scenario, choices: Choices, mode: Mode = "quiet") -> None:
        self.scenario = scenario
        unit = PAGE_SIZE * min(len(scenario.states), UNIT_PAGES)
        self.machine = SimulatedMachine(PAGE_SIZE, unit, poison_markers=scenario.markers, budget=dict(scenario.budget))
        self.machine.before = self._before
        self.machine.touched = self._touched_by_call
        self.machine.affected = self.touched
        self.machine.observe = choices.observed.append
        self.machine.choose = lambda options: choices.pick(options, inside=True)
        self.choices = choices
        self.footprint = choices.footprint
        self.loop = SimulationLoop(choices, self.outside, mode)  # type: ignore[abstract]
        self.manager = Manager(self, 1)
        self.events: list[LogEvent] = []
        self.defects: list[str] = []
        self.failures: list[Failure] = []
        self.disk: Disk | None = None
        self.object = self._make_object()
        self.store: SimulatedStore = self.machine.stores[0]
        self.expectation = Expectation(self)
        self.machine.placed = self.expectation.placed
        self.machine.sent = self.expectation.sent
        self.agents: list[Agent] = []
        self.to_come: list[Happening] = []
        self.later: list[Happening] = []
        """What comes in this order, the first of it being among `to_come`."""
        self.liveness = Liveness(self, scenario.settles_after) if scenario.settles_after is not None else None
        self.unreported: set[int] = set()
        """Pages that the kernel has declared bad, and of which the manager has not heard."""
        self.may_die = scenario.death
        self.dead = False
        self.successors = scenario.successors
        """Managers that can still take over."""
        self.taking_over = False
        """A manager is alive, and serves nobody yet."""
        self.unanswered: dict[AskedBy, Report] = {}
        """Reports that somebody waits for."""
        self.errors_seen: dict[int, int] = {}
        """What the library knows of a handle's errors, by its mapping's number (`protocol.Flush`)."""
        self._left: tuple[dict[Key, Any], list[bytes]] = ({}, [])
        """What the last manager had written down when it died, and the flags of each store."""
        self._reports = 0
        self._to_begin: list[tuple[str, Callable[[World, int], Coroutine[Any, Any, None]], int]] = []
        self._asked: dict[str, tuple[str, Callable[[World, int], Coroutine[Any, Any, None]], int]] = {}
        self.over = False
        """Nothing more will be looked at: coroutines that are taken down now find a machine that does nothing."""
        self._death = Happening(DEATH, self.manager_dies)
        self._succession = Happening(SUCCESSION, self._succeed)
        self._populate()
        if scenario.successors:
            self.machine.between = self._between

    # --- what it begins with

    def _make_object(self) -> MemoryObject:
        pages = len(self.scenario.states)
        if self.scenario.kind == "anonymous":
            return self.manager.allocate(pages * PAGE_SIZE, NAME)
        content = PREFIX + b"".join([token(1 + page) for page in range(pages)])
        kind = self.scenario.kind
        self.disk = self.machine.disk("file", content, writable=kind != "read-only", cached=kind == "cached")
        file = SimulatedFile(self.machine, self.disk)
        backing = Backing(file, FILE_OFFSET, self.disk.writable, self.disk.identity())
        return self.manager._create(NAME, pages * PAGE_SIZE, backing)

    def _populate(self) -> None:
        scenario = self.scenario
        if scenario.worker:
            first, last = scenario.worker[0], scenario.worker[-1]
            writes = self.object.writable
            self._join("worker", [Step("write", first, token(50)) if writes else Step("read", first), Step("read", last)])
        for number, (name, page) in enumerate(scenario.operations):
            label = f"{name} {page}" if scenario.operations.count((name, page)) == 1 else f"{name} {page} ({number})"
            if name in SCRIPTS:
                agent = self._join(
                    f"client {number}", SCRIPTS[name](page, token(60 + number)), mapped=not name.startswith("attach")
                )
                if name in DYING:
                    self.will_come(f"{agent.name} dies", agent.process.die)
            elif name in STORIES:
                self.will_come(label, partial(self.ask, label, STORIES[name], page))
            else:
                self.will_come(label, partial(CHANGES[name], self, page))
        for number, operations in enumerate(scenario.clients):
            self._join_for_long(number, operations)
        if self.liveness is not None:
            self._one_after_the_other()
        for page, state in enumerate(scenario.states):
            self._put(page, state)

    def _join_for_long(self, number: int, operations: Sequence[Operation]) -> None:
        """A client that does much. What it writes is different each time."""
        script = [
            step
            for index, (name, page) in enumerate(operations)
            if name not in DYING
            for step in SCRIPTS[name](page, token(1000 * (number + 1) + index))
        ]
        mapped = not script or script[0].kind != "attach"
        agent = self._join(f"client {chr(ord('A') + number)}", script, mapped=mapped)
        if any(name in DYING for name, _ in operations):
            self.will_come(f"{agent.name} dies", agent.process.die)

    def _one_after_the_other(self) -> None:
        """In a large world all that befalls it would come before its clients have done anything, if each were offered at
        each choice. The deaths are spread among the rest."""
        deaths = [one for one in self.to_come if str(one).endswith("dies")]
        self.later = [one for one in self.to_come if one not in deaths]
        for number, death in enumerate(deaths, 1):
            self.later.insert(len(self.later) * number // (len(deaths) + 1), death)
        self.to_come = self.later[:1]

    def _join(self, name: str, script: Sequence[Step], *, mapped: bool = True) -> Agent:
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
            loss = Loss("sim-before", what, Outcome.RECOVERED, "")
            note_loss(self.manager, object_, page, loss, untold=False)
            self.manager.journal.loss(object_, page, loss, untold=what is State.DIRTY_FILE)
            # What is gone was neither zeros nor what the file has: who sees those is not shown what was last written.
            self.expectation.begins(page, token(40 + page) if what is not State.CLEAN_FILE else None)
            self.expectation.lost_before(page)
            self.manager.journal.errors(object_)
            return
        content = self.expectation.begins(page, token(40 + page) if state == "dirty" or self.disk is None else None)
        self.store.pages[page] = self.machine.new_page(content)
        object_.pages.arrived(page, 1, self.manager.reclaim.arrived(object_, 1), DIRTY if state == "dirty" else 0)
        for agent in self.agents:
            if agent.area is not None:
                agent.area.entries[page] = (PAGE, agent.area.registered_for_writes and state != "dirty")

    # --- what can happen

    def step(self) -> bool:
        """Let one thing happen; False if nothing can."""
        try:
            if self.liveness is None:
                return self.loop.step()
            return self.liveness.step()
        except ManagerDiedError:
            # What was told of the end of the task that has met it.
            self.loop.ready.clear()
            self.loop.timers.clear()
            return True

    def has_waited(self, task: asyncio.Task[Any] | None = None) -> bool:
        """True if a timer has fired since the task was made; by default the one that runs, or has run in the last step."""
        task = task or getattr(getattr(self.loop.last, "_callback", None), "__self__", None)
        return isinstance(task, asyncio.Task) and task.begun < self.loop.time()  # type: ignore[attr-defined]

    def outside(self) -> list[Event]:
        """All that can come from outside now, in a fixed order."""
        found: list[Event] = []
        for agent in self.agents:
            agent.add_events(found, manager=not self.dead and not self.taking_over)
        for waiting in self.machine.waiting:
            found += waiting.endings
        found += self.to_come
        if self.may_die:
            found.append(self._death)
        if self.dead and self.successors:
            found.append(self._succession)
        return found

    def will_come(self, name: str, what: Callable[[], None]) -> None:
        """Something may happen at any moment, once."""

        def happen() -> None:
            self.to_come.remove(one)
            if self.later and self.later[0] is one:
                del self.later[0]
                self.to_come += self.later[:1]
            self.touched_all()
            what()

        one = Happening(name, happen)
        self.to_come.append(one)

    def begin_liveness(self) -> None:
        """Nothing goes wrong any more. What is on its way arrives: the signal of a page that the kernel has declared bad."""
        self.machine.nothing_goes_wrong()
        self.to_come = [one for one in self.to_come if one not in self.later]
        self.later = []
        self.may_die = False

    def ask(self, name: str, story: Callable[[World, int], Coroutine[Any, Any, None]], page: int) -> None:
        """Somebody wants something of the manager."""
        if self.dead or self.taking_over:
            # Whoever wants something of the manager asks the next one, if there is one.
            self._to_begin.append((name, story, page))
        else:
            self._asked[name] = (name, story, page)
            self.start(name, story(self, page))

    def start(self, name: str, story: Coroutine[Any, Any, None]) -> Any:
        """Run what somebody asks of the manager, as the service does."""
        return self.loop.create_task(story, name=name)

    async def reported(self, report: Report) -> None:
        """A report, handled."""
        await self.report(report)

    async def report(self, report: Report, asked_by: AskedBy | None = None) -> Failure:
        """What becomes of a report: as the service has it. If the manager dies meanwhile, the next one is asked again."""
        if asked_by is None:
            self._reports += 1
            asked_by = (0, self._reports)
        self.unanswered[asked_by] = report
        failure = await self.manager.report(report, asked_by)
        self.expectation.answered(asked_by, report, failure)
        self.manager.answered(asked_by)
        if failure not in self.failures:
            # The manager has died between writing it down and saying it.
            self.failures.append(failure)
        del self.unanswered[asked_by]
        return failure

    def goes_bad(self, page: int, *, declared: bool) -> int | None:
        """The page's frame goes bad; its number. `declared`: the kernel says so by itself."""
        number = self.store.goes_bad(page, declared=declared)
        if number is not None:
            self.expectation.frames_gone_bad += 1
            self.expectation.struck.add(page)
        return number

    def is_bad(self, page: int) -> bool:
        """True if what is in the page is not to be had."""
        found = self.store.pages[page]
        return found is not None and found.bad

    # --- between two system calls

    def _before(self, store: SimulatedStore, first: int, count: int) -> None:
        """Processes do not wait for the manager: before each of its system calls, accesses to those pages may happen. And
        before each it may be killed."""
        if self.over:
            return
        self.footprint.update(range(first, first + count))
        if self.dead:
            raise ManagerDiedError
        while True:
            going = [agent for agent in self.agents if agent.can_touch(first, count)]
            if not going and not self.may_die:
                return
            options = ["the manager goes on", *[f"meanwhile {one.name}: {one.script[one.at].kind}" for one in going]]
            if self.may_die:
                options.append(DEATH)
            chosen = self.choices.pick(options, inside=True)
            if not chosen:
                return
            if chosen > len(going):
                self.manager_dies()
                raise ManagerDiedError
            going[chosen - 1].act()

    def _touched_by_call(self, process: Process) -> None:
        """A system call of the manager is about a process: it may be killed before that, too."""
        if self.over:
            return
        self.footprint.add(process)
        if self.dead:
            raise ManagerDiedError
        if self.may_die and self.choices.pick(("the manager goes on", DEATH), inside=True):
            self.manager_dies()
            raise ManagerDiedError

    def manager_dies(self) -> None:
        """At once. Of what it has asked the system for, all that takes time still happens, and nobody hears of it. What is
        left of it, and runs while its coroutines are taken down, does nothing: every system call raises."""
        self.touched_all()
        self.dead = True
        self.taking_over = False
        self.may_die = False
        # What runs while it is taken down has not run.
        self._left = self.machine.records.all(), [bytes(one.flags[: len(one.pages)]) for one in self.machine.stores]
        self.loop.ready.clear()
        self.loop.timers.clear()
        for waiting in self.machine.waiting:
            waiting.future = self.loop.create_future()

    def _between(self) -> None:
        """Between what is written down and what is done, the manager may be killed too."""
        if self.over:
            return
        if self.dead:
            raise ManagerDiedError
        if self.may_die and self.choices.pick(("the manager goes on", DEATH), inside=True):
            self.manager_dies()
            raise ManagerDiedError

    def _succeed(self) -> None:
        """Another manager takes over. Of what the last one had asked the system for, nothing is under way any more: it has
        happened by now, or never will."""
        self.touched_all()
        self._take_down()
        self.machine.waiting.clear()
        self.machine.freed = _nothing
        self.successors -= 1
        self.dead, self.taking_over = False, True
        self.may_die = self.scenario.death and self.successors > 0
        self.manager = Manager(self, self.manager.life + 1)
        hits = {agent.client.number: agent.guard.hits for agent in self.agents if agent.guard is not None}
        self.start("takeover", self._take_over(SimulatedInheritance(self.machine, hits)))

    def _take_down(self) -> None:
        """The last manager's stories end where they are, as if they had never run on."""
        self.over = True
        for task in self.loop.tasks:
            if task.done():
                if not task.cancelled() and not isinstance(task.exception(), (ManagerDiedError, type(None))):
                    self.defects.append(f"{task.get_name()}: {task.exception()!r}")
            else:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                story = task.get_coro()
                assert isinstance(story, Coroutine)
                if inspect.getcoroutinestate(story) == inspect.CORO_CREATED and task.get_name() in self._asked:
                    # The request was not read yet.
                    self._to_begin.append(self._asked[task.get_name()])
                story.close()
        self.over = False
        self.loop.tasks.clear()
        self.loop.ready.clear()
        self.loop.timers.clear()
        records, flags = self._left
        self.machine.records.restore(records)
        for store, left in zip(self.machine.stores, flags, strict=True):
            store.flags[: len(left)] = left

    async def _take_over(self, inheritance: SimulatedInheritance) -> None:
        before = self.object
        for key, value in self.machine.records.all().items():
            if key[0] == "answer":
                self.expectation.found_out[key[1:]] = failure_of(value).event_id  # type: ignore[index]
        await take_over(self.manager, inheritance)
        if self.object is before:
            # It had ended. Who was about to do something with it did not live to see that.
            before.closed = True
            before.locks = RangeLocks()
            for page in range(before.pages.count):
                before.pages.clear(POISONED | WRITEBACK, page)
            if not self.store.closed:
                self.store.close()
        mappings = {one.number: one for client in self.manager.clients() for one in (*client.mappings, *client.vacated)}
        for agent in self.agents:
            agent.taken_over(mappings)
        self.expectation.taken_over(mappings)
        self.taking_over = False
        for asked_by, report in list(self.unanswered.items()):
            # Who had asked the last one.
            self.start(f"report {asked_by[1]} again", self._again(report, asked_by))
        to_begin, self._to_begin = self._to_begin, []
        for name, story, page in to_begin:
            self.ask(name, story, page)

    async def _again(self, report: Report, asked_by: AskedBy) -> None:
        try:
            await self.report(report, asked_by)
        except FileNotFoundError:
            # The object has ended.
            del self.unanswered[asked_by]

    # --- what a step has to do with: two that have nothing in common can change places (see `explore`)

    def touched(self, what: object) -> None:
        """A page or a process."""
        self.footprint.add(what)

    def touched_by_manager(self) -> None:
        """The manager has done something: what else it does is to come before it or after."""
        self.footprint.add(MANAGER)

    def touched_all(self) -> None:
        """Everything may depend on this."""
        self.footprint.add(ALL)

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


def _nothing() -> None:
    pass
