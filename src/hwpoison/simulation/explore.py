"""Exhaustive exploration of one scenario: every choice, in every order, until nothing new can be met.

A schedule is replayed from the beginning with a list of integers, and goes on with first options; then the last choice that
has another option takes it. A state that was met before is not gone into again.
"""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from hwpoison.simulation.choices import ALL, Choices, PrunedError
from hwpoison.simulation.fingerprint import Fingerprint
from hwpoison.simulation.loop import Mode
from hwpoison.simulation.scenario import Scenario
from hwpoison.simulation.world import World

STEPS_MAX = 2000
"""A schedule that takes more does not settle."""
ALONE_MAX = 100
"""So many steps without a choice, and it is looked whether a state comes again. Looking takes longer than the step."""
LIVELOCK = "Everything settles: the same state has come again."


@dataclass(slots=True)
class Violation:
    """A sentence that did not hold, and the choices that lead there."""

    sentence: str
    choices: list[int]


@dataclass(slots=True)
class Cell:
    """What came of exploring a scenario. `steps` are those of all schedules, replayed ones included."""

    scenario: str
    schedules: int = 0
    steps: int = 0
    states: int = 0
    complete: bool = False
    seconds: float = 0.0
    violation: Violation | None = None


@dataclass(slots=True)
class Run:
    """One schedule."""

    world: World
    choices: Choices
    violation: str | None
    pruned: bool = False


class Repeats:
    """The states that a run has been in. One that comes again will come for ever: that is a livelock."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._states: dict[int, int] = {}

    def come_again(self) -> bool:
        """True if the run was in this state after another step. To be asked after each step."""
        steps = self._world.loop.steps
        return self._states.setdefault(Fingerprint(self._world).value(), steps) != steps


def run(
    scenario: Scenario, choices: Choices, mode: Mode = "quiet", *, world: World | None = None, alone_max: int = ALONE_MAX
) -> Run:
    """Let the choices be made until nothing can happen any more, or something is wrong.

    Whether a state comes again is for who makes the choices to see. Where `alone_max` steps have gone by without one (0:
    after every step, for a run that is to be told), it is looked for here.
    """
    world = world or World(scenario, choices, mode)
    loop, expectation = world.loop, world.expectation
    # This runs some million times: what can be looked up once is.
    step, taken, known = world.step, choices.taken, choices.known
    violation, pruned = None, False
    repeats, chosen, last = Repeats(world), -1, 0
    loop.enter()
    try:
        while step():
            if world.object.losses:
                expectation.look_at_losses()
            if len(taken) >= known:
                violation = expectation.check()
                if violation is not None:
                    break
            if len(taken) != chosen and alone_max:
                chosen, last = len(taken), loop.steps
            elif loop.steps - last >= alone_max and repeats.come_again():
                violation = LIVELOCK
                break
            if loop.steps > STEPS_MAX:
                violation = f"Everything settles: not after {STEPS_MAX} steps."
                break
        else:
            violation = expectation.check_end()
    except PrunedError as error:
        pruned = True
        violation = str(error) or None
    finally:
        loop.leave()
        abandon(world)
    return Run(world, choices, violation, pruned)


def abandon(world: World) -> None:
    """The world is dropped as it is: nobody shall complain of what is left in it."""
    world.over = True
    # Coroutines that are taken down let go of the object, and must not begin its end.
    world.manager.hold(world.object)
    for task in world.loop.tasks:
        if not task.done():
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            story = task.get_coro()
            if isinstance(story, Coroutine) and inspect.getcoroutinestate(story) == inspect.CORO_CREATED:
                story.close()
        elif not task.cancelled():
            task.exception()


@dataclass(slots=True, eq=False)
class _Node:
    """A choice between two steps, on the path that is being explored.

    `asleep`: what need not be gone into here, as it leads where another order has led, with all that it has to do with. What
    has been explored here is added to it.
    """

    number: int
    state: int
    names: list[str]
    asleep: dict[str, frozenset[object]]
    now: str = ""
    """What is being explored."""
    footprint: set[object] = field(default_factory=set)
    """What that has to do with, whatever happens within it."""


class _Search:
    """What was met, in this schedule and in all.

    `sleeping`: what was explored in one order with something that it has nothing to do with is not explored in the other
    (sleep sets). The states are the same, only fewer ways lead to each.
    """

    def __init__(self, *, hashing: bool, sleeping: bool) -> None:
        self._hashing = hashing
        self._sleeping = sleeping
        self.visited: dict[int, list[frozenset[str]]] = {}
        """The states, each with what was asleep when it was gone into."""
        self.path: list[_Node] = []
        self.world: World | None = None

    # --- within a schedule

    def hook(self, number: int, options: Sequence[object], outer: bool) -> int:
        """Which option to take; raises PrunedError where all that can happen was explored before."""
        assert self.world is not None
        if not outer:
            if self._hashing:
                self._inside()
            return 0
        names = _told_apart(options) if self._sleeping else []
        asleep = self._inherited() if self._sleeping else {}
        state = Fingerprint(self.world).value() if self._hashing else number
        if self._hashing:
            self._go_into(state, frozenset(asleep) if asleep else NOTHING)
        index = 0
        if asleep:
            awake = (index for index, name in enumerate(names) if name not in asleep)
            index = next(awake, -1)
            if index < 0:
                raise PrunedError
        self.path.append(_Node(number, state, names, asleep, names[index] if names else ""))
        return index

    def _inside(self) -> None:
        """A coroutine that runs can't be looked at. What has happened in it since the last look follows from what it was
        told by the machine."""
        assert self.world is not None
        choices = self.world.choices
        node = self.path[-1] if self.path else None
        at, before, asleep = (node.number, node.state, node.asleep) if node else (0, 0, {})
        state = hash((before, tuple(choices.taken[at:]), tuple(choices.observed)))
        self._go_into(state, frozenset(asleep) if asleep else NOTHING, outer=False)

    def _go_into(self, state: int, asleep: frozenset[str], *, outer: bool = True) -> None:
        known = self.visited.get(state)
        if known is None:
            self.visited[state] = [asleep]
            return
        if outer and any(node.state == state for node in self.path):
            raise PrunedError(LIVELOCK)
        if any(before <= asleep for before in known):
            raise PrunedError
        known.append(asleep)

    def _inherited(self) -> dict[str, frozenset[object]]:
        """What was asleep before the last choice, or explored there, and has nothing to do with what was chosen."""
        assert self.world is not None
        if not self.path:
            return {}
        done = self.world.choices.footprint
        self.path[-1].footprint |= done
        if ALL in done:
            return {}
        return {name: touched for name, touched in self.path[-1].asleep.items() if touched.isdisjoint(done)}

    # --- from one to the next

    def next_prefix(self, choices: Choices) -> list[int] | None:
        """The choices to begin the next schedule with; None if all was explored."""
        taken, path = choices.taken, self.path
        if path and self._sleeping:
            path[-1].footprint |= choices.footprint
        while taken:
            number = len(taken) - 1
            following = taken.pop() + 1
            node = path[-1] if path and path[-1].number == number else None
            if node is not None and self._sleeping:
                if ALL not in node.footprint:
                    node.asleep[node.now] = frozenset(node.footprint)
                node.footprint.clear()
                while following < len(node.names) and node.names[following] in node.asleep:
                    following += 1
            if following < choices.widths[number]:
                if node is not None and self._sleeping:
                    node.now = node.names[following]
                return [*taken, following]
            if node is not None:
                path.pop()
        return None


NOTHING: frozenset[str] = frozenset()


def _told_apart(options: Sequence[object]) -> list[str]:
    names: list[str] = []
    for option in options:
        name = str(option)
        while name in names:
            name += "'"
        names.append(name)
    return names


def explore(
    scenario: Scenario,
    mode: Mode = "quiet",
    *,
    hashing: bool = True,
    sleeping: bool | None = None,
    schedules_max: int | None = None,
    make: Any = World,
) -> Cell:
    """All schedules of `scenario`, or up to the first violation, or to the limit.

    Sleep sets are for quiet mode, where an event and all that the manager does at it are one step; by themselves they are
    used from two pages on.
    """
    if sleeping is None:
        sleeping = hashing and mode == "quiet" and len(scenario.states) > 1
    cell = Cell(str(scenario))
    search = _Search(hashing=hashing, sleeping=sleeping)
    prefix: list[int] | None = []
    started = time.perf_counter()
    while prefix is not None:
        if schedules_max is not None and cell.schedules >= schedules_max:
            break
        choices = Choices(prefix, hook=search.hook if hashing or sleeping else None)
        world = search.world = make(scenario, choices, mode)
        found = run(scenario, choices, mode, world=world)
        cell.schedules += 1
        cell.steps += world.loop.steps
        if found.violation is not None:
            cell.violation = Violation(found.violation, list(choices.taken))
            break
        prefix = search.next_prefix(choices)
        search.world = None
        del world, found, choices
        gc.collect(0)
    else:
        cell.complete = True
    cell.states = len(search.visited)
    cell.seconds = time.perf_counter() - started
    return cell
