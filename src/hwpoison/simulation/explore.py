"""Exhaustive exploration of one scenario: every choice, in every order, until nothing new can be met.

A schedule is replayed from the beginning with a list of integers, and goes on with first options; then the last choice that
has another option takes it. A state that was met before is not gone into again.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from hwpoison.simulation.choices import Choices, PrunedError
from hwpoison.simulation.fingerprint import Fingerprint
from hwpoison.simulation.loop import Mode
from hwpoison.simulation.scenario import Scenario
from hwpoison.simulation.world import World

STEPS_MAX = 2000
"""A schedule that takes more does not settle."""
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


def run(scenario: Scenario, choices: Choices, mode: Mode = "quiet", *, world: World | None = None) -> Run:
    """Let the choices be made until nothing can happen any more, or something is wrong."""
    world = world or World(scenario, choices, mode)
    loop, expectation = world.loop, world.expectation
    violation, pruned = None, False
    loop.enter()
    try:
        while world.step():
            expectation.look_at_losses()
            if not choices.replaying:
                violation = expectation.check()
                if violation is not None:
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
        world.over = True
        _abandon(loop.tasks)
    return Run(world, choices, violation, pruned)


def _abandon(tasks: list[asyncio.Task[Any]]) -> None:
    """The world is dropped as it is: nobody shall complain of what is left in it."""
    for task in tasks:
        if not task.done():
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            story = task.get_coro()
            if isinstance(story, Coroutine) and inspect.getcoroutinestate(story) == inspect.CORO_CREATED:
                story.close()
        elif not task.cancelled():
            task.exception()


@dataclass(slots=True)
class _Search:
    """What was met, in this schedule and in all."""

    scenario: Scenario
    mode: Mode
    visited: set[int] = field(default_factory=set)
    path: list[tuple[int, int]] = field(default_factory=list)
    """(number of the choice, state) of the choices between steps on the way."""
    world: World | None = None

    def hook(self, number: int, options: Sequence[object], outer: bool) -> None:
        assert self.world is not None
        path = self.path
        while path and path[-1][0] >= number:
            path.pop()
        if outer:
            state = Fingerprint(self.world).value()
        else:
            # A coroutine that runs can't be looked at. What has happened in it since the last look follows from what it
            # was told by the machine.
            at, before = path[-1] if path else (-1, 0)
            choices = self.world.choices
            state = hash((before, tuple(choices.taken[max(at, 0) :]), tuple(choices.observed)))
        if state in self.visited:
            if outer and any(known == state for _, known in path):
                raise PrunedError(LIVELOCK)
            raise PrunedError
        self.visited.add(state)
        if outer:
            path.append((number, state))


def explore(
    scenario: Scenario, mode: Mode = "quiet", *, hashing: bool = True, schedules_max: int | None = None, make: Any = World
) -> Cell:
    """All schedules of `scenario`, or up to the first violation, or to the limit."""
    cell = Cell(str(scenario))
    search = _Search(scenario, mode)
    prefix: list[int] = []
    started = time.perf_counter()
    while True:
        choices = Choices(prefix, hook=search.hook if hashing else None)
        world = search.world = make(scenario, choices, mode)
        found = run(scenario, choices, mode, world=world)
        cell.schedules += 1
        cell.steps += world.loop.steps
        if found.violation is not None:
            cell.violation = Violation(found.violation, list(choices.taken))
            break
        taken, widths = choices.taken, choices.widths
        while taken and taken[-1] + 1 >= widths[len(taken) - 1]:
            taken.pop()
        if not taken:
            cell.complete = True
            break
        prefix = [*taken[:-1], taken[-1] + 1]
        search.world = None
        del world, found, choices
        gc.collect(0)
        if schedules_max is not None and cell.schedules >= schedules_max:
            break
    cell.states = len(search.visited)
    cell.seconds = time.perf_counter() - started
    return cell
