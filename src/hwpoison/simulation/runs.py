"""A run in a file: a list of integers, with the names of what was chosen; and the story that it tells."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import msgspec

from hwpoison.core.machine import Telling
from hwpoison.core.pages import DIRTY, LOST, POISONED, PRESENT, WRITEBACK
from hwpoison.simulation.choices import Choices, DivergedError
from hwpoison.simulation.explore import LIVELOCK, STEPS_MAX, Repeats, abandon, run
from hwpoison.simulation.files import FILE_OFFSET
from hwpoison.simulation.loop import Mode
from hwpoison.simulation.matrix import BUDGETS, STATES
from hwpoison.simulation.operations import DYING, OPERATIONS, SCRIPTS, applies
from hwpoison.simulation.scenario import Scenario
from hwpoison.simulation.world import World

FORMAT = 1
LEAVING = ("close", *DYING)
FAULTS = {fault for budget in BUDGETS.values() for fault, _ in budget}
_FLAGS = {PRESENT: "present", DIRTY: "dirty", WRITEBACK: "on its way", POISONED: "poisoned", LOST: "lost"}


@dataclass(frozen=True, slots=True)
class SavedRun:
    """What a file has. `violation` is the sentence that did not hold, empty if all did."""

    scenario: Scenario
    mode: Mode
    choices: tuple[int, ...]
    names: tuple[str, ...]
    violation: str
    widths: tuple[int, ...]
    """How many options each choice had."""

    def save(self, path: Path) -> None:
        """Write it."""
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")


def load(path: Path) -> SavedRun:
    """Read it. Raises OSError, and ValueError for what is no run of this format."""
    try:
        document = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        if document.get("format") != FORMAT or document["format"] is True:
            raise ValueError(f"it has format {document.get('format')!r}")
        saved = msgspec.convert(document, SavedRun)
        scenario = saved.scenario
        # What is not known here would be left out, and another run told.
        for known, found in ((SavedRun, document), (Scenario, document["scenario"])):
            unknown = found.keys() - {one.name for one in fields(known)} - {"format"}
            if unknown:
                raise ValueError(f"it has {', '.join(map(repr, sorted(unknown)))}, which no run has")
        for name, page in (*scenario.operations, *(one for script in scenario.clients for one in script)):
            if name not in OPERATIONS:
                raise ValueError(f"it has an operation {name!r}")
            if not applies(scenario.kind, name):
                raise ValueError(f"there is no {name!r} of a {scenario.kind} object")
            if not 0 <= page < len(scenario.states):
                raise ValueError(f"it has an operation on page {page} of {len(scenario.states)}")
        for script in scenario.clients:
            names = {name for name, _ in script}
            if not names <= SCRIPTS.keys():
                raise ValueError(f"it has a client that does {', '.join(map(repr, sorted(names - SCRIPTS.keys())))}")
            if names & {"write", "die", "write while resident"} and names & {"read guarded", "read guarded twice"}:
                raise ValueError("it has a client that writes and guards: each has one view")
            # As in `seeded`: it comes first or is there, and goes last.
            if any(name.startswith("attach") for name, _ in script[1:]) or any(name in LEAVING for name, _ in script[:-1]):
                raise ValueError(
                    "it has a client that comes after it has done something, or does something after it has gone"
                )
        if not all(0 <= page < len(scenario.states) for page in scenario.worker):
            raise ValueError(f"it has a worker on pages {scenario.worker} of {len(scenario.states)}")
        if not {one for one, _ in scenario.budget} <= FAULTS or any(most < 0 for _, most in scenario.budget):
            raise ValueError(f"it has a budget for {', '.join(f'{one} ({most})' for one, most in scenario.budget)}")
        if scenario.limit < 0 or scenario.successors < 0:
            raise ValueError("it has a limit, or successors, of less than 0")
        if scenario.kind == "anonymous" and 0 < scenario.limit < len(scenario.states):
            raise ValueError(f"it has an anonymous object of {len(scenario.states)} pages within {scenario.limit}")
        if scenario.sigbus not in [one.value for one in Telling]:
            raise ValueError(f"it has a SIGBUS that is {scenario.sigbus!r}")
        if not scenario.states or scenario.kind not in STATES or not set(scenario.states) <= set(STATES[scenario.kind]):
            raise ValueError(f"it has no {scenario.kind} object with pages that are {', '.join(scenario.states) or 'there'}")
        if len(saved.names) != len(saved.choices) or any(one < 0 for one in saved.choices):
            raise ValueError("it has not one name, and a number from 0 on, for each choice")
        if len(saved.widths) != len(saved.choices):
            raise ValueError("it has not one width for each choice")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no run of format {FORMAT}: {error}") from error
    return saved


def named(scenario: Scenario, mode: Mode, choices: tuple[int, ...]) -> SavedRun:
    """The run with the names of its choices, and what it ends with."""
    made = Choices(choices, names=())
    found = run(scenario, made, mode, alone_max=0)
    return SavedRun(scenario, mode, tuple(made.taken), tuple(made.told), found.violation or "", tuple(made.widths))


class Replay:
    """Tell a run again, step by step. `violation` is what it ended with, when all has been told."""

    def __init__(self, saved: SavedRun) -> None:
        self._saved = saved
        self.violation: str | None = None

    def story(self) -> Iterator[str]:
        """What happens, and the pages after it. Raises `DivergedError` where a choice is not the one in the file."""
        choices = Choices(self._saved.choices, names=self._saved.names, numbers=self._saved.widths)
        world = World(self._saved.scenario, choices, self._saved.mode)
        told: list[str] = []
        before = ""
        try:
            for number in run_steps(world):
                happened = choices.told[len(told) :]
                told += happened
                pages = _pages(world)
                if happened or pages != before:
                    yield f"{number:4}  {'; '.join(happened) or '(the manager)'}"
                    if pages != before:
                        yield f"      {pages}"
                    before = pages
            self.violation = steps_end(world)
        finally:
            # Also where it has diverged: what was begun in it must not complain.
            abandon(world)
        if len(choices.taken) < len(self._saved.choices):
            raise DivergedError(f"diverged at choice {len(choices.taken)}: the run has ended")


def run_steps(world: World) -> Iterator[int]:
    """The steps of a run, one after the other."""
    loop, repeats = world.loop, Repeats(world)
    loop.enter()
    try:
        while world.expectation.violation is None and world.step():
            world.expectation.look_at_losses()
            world.expectation.check()
            yield loop.steps
            if repeats.come_again():
                world.expectation.fail(LIVELOCK)
            if loop.steps > STEPS_MAX:
                world.expectation.fail(f"Everything settles: not after {STEPS_MAX} steps.")
    finally:
        loop.leave()


def steps_end(world: World) -> str | None:
    """What the run has ended with."""
    return world.expectation.violation or world.expectation.check_end()


def _pages(world: World) -> str:
    told = []
    for page in range(world.object.pages.count):
        flags = world.object.pages.flags[page]
        words = [word for flag, word in _FLAGS.items() if flags & flag] or ["absent"]
        found = world.store.pages[page]
        if found is not None:
            words.append(f"frame {found.number}{' (bad)' if found.bad else ''} holds {_short(found.content)}")
        if world.disk is not None:
            size = world.object.page_size
            words.append(f"the file {_short(world.disk.content[FILE_OFFSET:][page * size : (page + 1) * size])}")
        told.append(f"page {page}: {', '.join(words)}")
    return "; ".join(told)


def _short(content: bytes) -> str:
    half = len(content) // 2
    first, second = int.from_bytes(content[:half], "little"), int.from_bytes(content[half:], "little")
    return str(first) if first == second else f"{first}|{second}"
