"""A failing run becomes a short story: a smaller world, and a list of choices most of which are the first option.

What is tried must fail with the same sentence, up to its colon, or it slips to another defect. A list that asks for an
option that is not there is no failure. All is done in a fixed order and within a limit, so it ends the same way each time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from hwpoison.simulation.choices import Choices, DivergedError
from hwpoison.simulation.explore import run
from hwpoison.simulation.loop import Mode
from hwpoison.simulation.runs import SavedRun
from hwpoison.simulation.scenario import Scenario

RUNS_MAX = 3000
"""Runs that one shrinking may take."""
BLOCKS = (32, 16, 8, 4, 2, 1)


@dataclass(frozen=True, slots=True)
class _Failing:
    """A run that fails as wanted, with the name of each choice."""

    scenario: Scenario
    choices: tuple[int, ...]
    names: tuple[str, ...]
    violation: str

    @property
    def size(self) -> tuple[int, int, int, int]:
        """A small one is better: first of all few choices that are not the first option."""
        return (
            sum(one > 0 for one in self.choices), len(self.choices), sum(self.choices),
            len(self.scenario.operations) + sum(map(len, self.scenario.clients)),
        )  # fmt: skip


def kind_of(sentence: str) -> str:
    """The invariant, without the place where it did not hold."""
    return sentence.partition(":")[0]


def shrink(scenario: Scenario, mode: Mode, choices: Sequence[int], sentence: str, runs_max: int = RUNS_MAX) -> SavedRun:
    """The smallest failing run that is found. Raises ValueError if this one does not fail with `sentence`."""
    return _Shrinker(mode, kind_of(sentence), runs_max).shrink(scenario, choices)


class _Shrinker:
    def __init__(self, mode: Mode, wanted: str, runs_max: int) -> None:
        self._mode = mode
        self._wanted = wanted
        self._left = runs_max

    def shrink(self, scenario: Scenario, choices: Sequence[int]) -> SavedRun:
        best = self._try(scenario, Choices(choices, names=()))
        if best is None:
            raise ValueError(f"this run does not end with: {self._wanted}")
        before = None
        while before != best and self._left > 0:
            before = best
            best = self._smaller_world(best)
            best = self._fewer_choices(best)
        again = Choices(best.choices, names=())
        run(best.scenario, again, self._mode)
        widths = tuple(again.widths[: len(best.choices)])
        return SavedRun(best.scenario, self._mode, best.choices, best.names, best.violation, widths)

    def _try(self, scenario: Scenario, choices: Choices) -> _Failing | None:
        """The run, without zeros at its end, if it fails as wanted."""
        if self._left <= 0:
            return None
        self._left -= 1
        try:
            found = run(scenario, choices, self._mode)
        except DivergedError:
            return None
        finally:
            gc.collect(0)
        if found.violation is None or kind_of(found.violation) != self._wanted:
            return None
        count = len(choices.taken)
        while count and not choices.taken[count - 1]:
            count -= 1
        return _Failing(scenario, tuple(choices.taken[:count]), tuple(choices.told[:count]), found.violation)

    # --- the world

    def _smaller_world(self, best: _Failing) -> _Failing:
        """Leave out whatever can be left out. The choices go on by their names: numbers mean something else there."""
        improved = True
        while improved:
            improved = False
            for scenario, renamed in _smaller(best.scenario):
                names = [renamed(one) for one in best.names]
                found = self._try(scenario, Choices(names=(), hook=_follow(names)))
                if found is None:
                    found = self._try(scenario, Choices(best.choices, names=()))
                if found is not None:
                    best = found
                    improved = True
                    break
        return best

    # --- the list

    def _fewer_choices(self, best: _Failing) -> _Failing:
        """Make choices the first option, leave some out, lower what is left."""
        before = None
        while before != best and self._left > 0:
            before = best
            for block in BLOCKS:
                at = len(best.choices) - block
                while at >= 0:
                    best = self._without(best, at, block)
                    at = min(at - 1 if block == 1 else at - block, len(best.choices) - block)
            for at in range(len(best.choices)):
                best = self._lower(best, at)
        return best

    def _without(self, best: _Failing, at: int, block: int) -> _Failing:
        choices = best.choices
        zeros = (*choices[:at], *[0] * block, *choices[at + block :])
        shorter = (*choices[:at], *choices[at + block :])
        for candidate in (zeros, shorter):
            if candidate != choices:
                found = self._try(best.scenario, Choices(candidate, names=()))
                if found is not None and found.size < best.size:
                    return found
        return best

    def _lower(self, best: _Failing, at: int) -> _Failing:
        for value in range(1, best.choices[at] if at < len(best.choices) else 0):
            found = self._try(best.scenario, Choices((*best.choices[:at], value, *best.choices[at + 1 :]), names=()))
            if found is not None and found.size < best.size:
                return found
        return best


def _follow(names: Sequence[str]) -> Callable[[int, Sequence[object], bool], int]:
    """Choose what was chosen before, in that order; what is not there any more is passed over."""
    wanted = [_plain(one) for one in names]
    at = 0

    def choose(number: int, options: Sequence[object], outer: bool) -> int:
        nonlocal at
        here = [_plain(str(one)) for one in options]
        for ahead in range(at, min(at + AHEAD, len(wanted))):
            if wanted[ahead] in here:
                at = ahead + 1
                return here.index(wanted[ahead])
        return 0

    return choose


AHEAD = 12
"""So many names may be passed over at once."""


def _plain(name: str) -> str:
    """Without the number that tells operations of one name apart: it changes as others are left out."""
    return name.rpartition(" (")[0] if name.endswith(")") else name


def _same(name: str) -> str:
    return name


def _smaller(scenario: Scenario) -> Iterator[tuple[Scenario, Callable[[str], str]]]:
    """Each scenario that has one thing less, the larger things first; and what names are called there."""
    clients, operations = scenario.clients, scenario.operations
    for number in range(len(clients)):
        yield replace(scenario, clients=clients[:number] + clients[number + 1 :]), _without_client(number)
    for block in (8, 4, 2, 1):
        for at in range(0, len(operations) - block + 1, block):
            yield replace(scenario, operations=operations[:at] + operations[at + block :]), _same
    for block in (4, 2, 1):
        for number, script in enumerate(clients):
            for at in range(0, len(script) - block + 1, block):
                less = script[:at] + script[at + block :]
                yield replace(scenario, clients=(*clients[:number], less, *clients[number + 1 :])), _same
    for number in range(len(scenario.budget)):
        yield replace(scenario, budget=scenario.budget[:number] + scenario.budget[number + 1 :]), _same
    for page, state in enumerate(scenario.states):
        if state != "absent":
            yield replace(scenario, states=(*scenario.states[:page], "absent", *scenario.states[page + 1 :])), _same
    last = max([page for _, page in (*operations, *[one for script in clients for one in script])], default=0)
    if last + 1 < len(scenario.states):
        yield replace(scenario, states=scenario.states[: last + 1]), _same


def _without_client(number: int) -> Callable[[str], str]:
    """Those behind it move up."""

    def renamed(name: str) -> str:
        for behind in range(number + 1, ord("Z") - ord("A")):
            name = name.replace(f"client {chr(ord('A') + behind)}", f"client {chr(ord('A') + behind - 1)}")
        return name

    return renamed
