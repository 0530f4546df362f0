"""The clients of a simulated world: processes that do one thing after the other.

An agent is no task: it is a small state machine that may go on whenever the world lets it, also between two system calls of
the manager.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from hwpoison.core import policy
from hwpoison.core.machine import Telling
from hwpoison.core.mappings import Client, Mapping
from hwpoison.core.records import Report
from hwpoison.simulation.choices import Event, Happening
from hwpoison.simulation.memory import HWPOISON, PAGE
from hwpoison.simulation.operations import REQUESTS
from hwpoison.simulation.processes import Area, Process, Sigbus, SimulatedHits
from hwpoison.simulation.scenario import Step

if TYPE_CHECKING:
    from hwpoison.simulation.world import World


ACCESSES = ("read", "write", "look", "call")
"""Steps that touch memory. `look` reads through a guarded view, `call` reads or writes by a system call of a process in user
mode."""


class Agent:
    """A process, and what it will do. Each step is tried until it is done."""

    def __init__(self, world: World, name: str, script: Sequence[Step]) -> None:
        self.world = world
        self.name = name
        self.process: Process = world.machine.process(name)
        self.process.disposition = Telling(world.scenario.sigbus)
        self.client: Client = world.manager.add_client(self.process.space)
        self.script = list(script)
        self.at = 0
        self.area: Area | None = None
        self.mapping: Mapping | None = None
        self.owns = False
        """The manager was told of its mapping, and not yet of the mapping's end."""
        self.guard = Guard(self) if any(step.kind == "look" for step in script) else None
        self.mourned = False
        self.request: Any = None
        """What it has asked the manager for, and waits for."""
        self._dies_for_the_manager = Happening(f"the manager learns that {name} has died", self._mourn)
        self._has_a_fault = Happening(f"the manager reads a fault of {name}", self._read_fault)
        self._gets_signal = Happening(f"{name} gets SIGBUS", self._signalled)
        self.goes_on = Happening(lambda: f"{name}: {self.script[self.at].kind} {self.script[self.at].page}", self.act)

    def map(self) -> None:
        """Map the object."""
        world, object_ = self.world, self.world.object
        private = not object_.writable or self.guard is not None
        if self.area is None:
            self.area = self.process.map(world.store, private=private, protected=object_.tracks_dirt and not private)
        hits = self.guard.hits if self.guard is not None else None
        self.mapping = world.manager.map(self.client, object_, self.area.address, hits)
        self.owns = True

    def taken_over(self, mappings: dict[int, Mapping]) -> None:
        """There is another manager, which knows these mappings. What was not answered is asked again."""
        self.request = None
        self.mourned = self.client.number not in [one.number for one in self.world.manager.clients()]
        if self.mapping is None:
            # The manager may have got to know of it, and have died before anybody else did.
            known = [one for one in mappings.values() if one.client is self.client]
            self.mapping = known[0] if known else None
        else:
            self.mapping = mappings.get(self.mapping.number)
        self.owns = self.mapping is not None and not self.mourned

    def add_events(self, events: list[Event], *, manager: bool) -> None:
        """What it, or its end, can be the next to do; with the manager, if that is alive."""
        process = self.process
        if not process.alive:
            if not self.mourned and manager:
                events.append(self._dies_for_the_manager)
            return
        if process.unread and manager:
            events.append(self._has_a_fault)
        if process.signalled:
            events.append(self._gets_signal)
        elif (
            process.asleep is None
            and self.request is None
            and self.at < len(self.script)
            and (manager or self.script[self.at].kind in ACCESSES)
        ):
            events.append(self.goes_on)

    def can_touch(self, first: int, count: int) -> bool:
        """True if its next step is an access to one of the pages, and it can go on. A signal comes first."""
        process = self.process
        if not process.alive or process.asleep is not None or process.signalled or self.at >= len(self.script):
            return False
        step = self.script[self.at]
        return step.kind in ACCESSES and self.area is not None and first <= step.page < first + count

    @property
    def has_written(self) -> bool:
        """True if it has written something, or was about to."""
        return any(step.kind in ("write", "make resident") for step in self.script[: self.at + 1])

    def maps(self, page: int) -> bool:
        """True if the page is in its page table."""
        return self.process.alive and self.area is not None and self.area.entries.get(page, ("", False))[0] == PAGE

    def views(self, pages: Iterable[int]) -> list[Step]:
        """What it does to see these pages."""
        if self.guard is None:
            return [Step("read", page) for page in pages]
        return [Step("enter", 0), *[Step("look", page) for page in pages], Step("leave", 0)]

    def act(self) -> None:
        """Do the next thing."""
        step = self.script[self.at]
        self.world.touched(self.process)
        if step.kind in ACCESSES:
            self.world.touched(step.page)
            self._access(step)
            return
        self.world.touched_by_manager()
        if step.kind == "unmap":
            assert self.area is not None
            self.world.touched_all()
            self.process.unmap(self.area)
            self.at += 1
        elif step.kind == "tell":
            self.owns = False
            if self.mapping is not None:
                self.world.manager.unmap(self.mapping)
            self.at += 1
        elif step.kind == "attach":
            self._attach()
        elif step.kind in ("enter", "leave"):
            assert self.guard is not None
            self.guard.act(step.kind)
        else:
            assert self.mapping is not None
            story = REQUESTS[step.kind](self.world, self.mapping, step.page, step.data)
            self.start(f"{step.kind} {step.page}", story)

    def _access(self, step: Step) -> None:
        assert self.area is not None
        world, page = self.world, step.page
        if step.kind == "call":
            self._call(page, step.data)
            return
        try:
            found = self.process.touch(self.area, page, (lambda _: step.data) if step.kind == "write" else None)
        except Sigbus:
            self._refused(page)
            return
        if found is None:
            return
        if step.kind == "write":
            world.expectation.stored(page, step.data)
        elif step.kind == "read":
            world.expectation.read(self.name, page, found)
        else:
            assert self.guard is not None
            self.guard.looked(page, found)
        self.at += 1

    def _call(self, page: int, data: bytes) -> None:
        """Where the manager would have to be asked, it fails with EFAULT."""
        assert self.area is not None
        expectation = self.world.expectation
        try:
            found = self.process.copy(self.area, page, data)
        except OSError:
            entry, protected = self.area.entries.get(page, ("", False))
            present = self.world.store.pages[page]
            if present is not None and not present.bad and page not in self.world.object.losses and not (data and protected):
                expectation.in_vain(self.name, page, entry)
            if self.mapping is not None:
                expectation.refused_in_call(self.mapping.number, self.name, page)
        else:
            if data:
                expectation.stored(page, data)
            else:
                expectation.read(self.name, page, found)
        self.at += 1

    def _refused(self, page: int, *, sent: bool = False) -> None:
        """`sent`: by the manager. That there was a reason was looked at then."""
        world = self.world
        assert self.area is not None
        by_kernel = self.area.entries.get(page, ("", False))[0] == HWPOISON or world.is_bad(page)
        guarded = self.guard is not None and self.guard.hits.guarded
        if not sent or guarded:
            world.expectation.refused(self.name, page, guarded=guarded, by_kernel=by_kernel)
        if by_kernel:
            if world.liveness is not None:
                world.liveness.met_bad(page)
            self.report_to_manager(page)
        self.at += 1

    def report_to_manager(self, page: int) -> None:
        """The kernel has told this process of a page that it declares bad: the manager hears of it, once."""
        world = self.world
        if page not in world.unreported or not self.process.alive or self.mapping is None:
            return
        world.unreported.discard(page)
        report = Report(pid=self.process.pid, address=self.mapping.address_of(page), action_required=True)
        world.touched_by_manager()
        world.ask(f"report of {self.name} of {page}", lambda world, _: world.reported(report), page)

    def _signalled(self) -> None:
        self.world.touched(self.process)
        self.world.touched(self.script[self.at].page)
        self.process.signalled.clear()
        self.process.asleep = None
        self.process.unread.clear()
        self._refused(self.script[self.at].page, sent=True)

    def _read_fault(self) -> None:
        self.world.touched(self.process)
        self.world.touched_by_manager()
        fault = self.process.unread.popleft()
        self.world.manager.fault(self.client, fault.address, fault.thread, write=fault.write, protected=fault.protected)

    def _mourn(self) -> None:
        self.world.touched_all()
        self.mourned = True
        self.owns = False
        self.world.manager.remove_client(self.client)

    def _attach(self) -> None:
        """As a client does: the object is held, then mapped, then the manager is told and makes sure of the markers."""
        world, object_ = self.world, self.world.object
        if object_.closed or not any(one is object_ for one in world.manager.objects()):
            self.at = len(self.script)
            return
        world.touched_all()
        if self.mapping is None:
            self.map()
        assert self.area is not None
        address, nbytes = self.area.address, self.area.count * object_.page_size

        async def mapped() -> None:
            if object_.tracks_dirt and self.guard is None:
                await self.process.space.protect(address, nbytes)

        self.start("attach", mapped())

    def start(self, name: str, story: Coroutine[Any, Any, None]) -> None:
        """Ask the manager for something; the step is done when it is answered."""
        self.request = self.world.start(f"{name} of {self.name}", story)
        self.request.add_done_callback(self._answered)

    def _answered(self, _: object) -> None:
        self.request = None
        if self.guard is None or self.guard.reply is None:
            self.at += 1


class Guard:
    """What the library keeps of an agent's guarded view (`app.view`): it is entered, looked through and left."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.hits = SimulatedHits()
        self.clean = 0
        """Up to which count all zeros are gone again."""
        self.seen = 0
        """At which count the guard has begun."""
        self.saw_zeros = False
        self.asked = False
        self.reply: tuple[list[int], int] | None = None
        """What the manager has answered, and the library has not acted on yet."""

    @property
    def state(self) -> tuple[object, ...]:
        """All that its future depends on."""
        count = self.hits.count
        reply = self.reply and (tuple(self.reply[0]), count - self.reply[1])
        return (self.hits.guards, count - self.clean, count - self.seen, self.saw_zeros, reply)

    def act(self, kind: str) -> None:
        """`enter` or `leave`: in one go if nothing was met, or by way of the manager."""
        if self.reply is not None:
            self._settle(kind)
            return
        if not self.asked:
            # Of what it asks, this is done once.
            self.hits.guards += 1 if kind == "enter" else -1
        self.asked = True
        since = self.clean if kind == "enter" else self.seen
        if self.hits.count != since:
            self.agent.start(kind, self._ask(since))
        else:
            self._done(kind, [])

    async def _ask(self, since: int) -> None:
        assert self.agent.mapping is not None
        self.reply = await policy.met(self.agent.mapping, since, min(self.clean, self.seen))

    def _settle(self, kind: str) -> None:
        """The library has the answer: what was met is taken from the view, so that it can be met again."""
        assert self.reply is not None
        assert self.agent.area is not None
        pages, count = self.reply
        self.reply = None
        for page in pages:
            self.agent.world.touched(page)
            self.agent.process.discard(self.agent.area, page, 1)
        self.clean = max(self.clean, count)
        self._done(kind, pages)

    def _done(self, kind: str, met: list[int]) -> None:
        self.asked = False
        if kind == "enter":
            self.seen = self.clean
        else:
            self.agent.world.expectation.guard_ended(self.agent.name, met, saw_zeros=self.saw_zeros)
            self.saw_zeros = False
        self.agent.at += 1

    def looked(self, page: int, found: bytes) -> None:
        """The view has shown this."""
        if not self.agent.world.expectation.right(page, found):
            self.saw_zeros = True
            self.agent.world.expectation.guarded(self.agent.name, page, found)
