"""Every choice of the world goes through one object: what happened can be written down, told again, and enumerated.

A run is a list of integers, one for each choice that had two options or more. What a list leaves open is the first option.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

MANAGER, ALL = "manager", "all"
"""What something can have to do with, beside pages and processes."""


class Event(Protocol):
    """Something that can happen. Its `str()` is its name."""

    def happen(self) -> None: ...


@dataclass(slots=True, eq=False)
class Happening:
    """Something that can happen. Many are offered for each that does, so a name may be made when it is asked for."""

    name: str | Callable[[], str]
    happen: Callable[[], None]

    def __str__(self) -> str:
        return self.name if isinstance(self.name, str) else self.name()


Hook = Callable[[int, Sequence[object], bool], int]


class Control(SystemExit):
    """Ends a run from within. A task keeps any other exception as its result; these it passes on."""


class DivergedError(Control):
    """A replay met a choice that is not the one that was written down."""


class PrunedError(Control):
    """What can happen from here on was explored before."""


class Choices:
    """Answers all questions of one run: first those of `prefix`, then the first option, or a random one.

    `names`, if given, are what the choices of the prefix must be called, `numbers` how many options each must have. `hook`
    is asked for each new choice instead: it is told its number, its options, and whether it is one between two steps (else
    it is inside one).
    """

    __slots__ = ("_hook", "_names", "_numbers", "_prefix", "_random", "footprint", "observed", "taken", "told", "widths")

    def __init__(
        self,
        prefix: Sequence[int] = (),
        *,
        names: Sequence[str] | None = None,
        numbers: Sequence[int] = (),
        seed: int | None = None,
        hook: Hook | None = None,
    ) -> None:
        self._prefix = prefix
        self._names = names
        self._numbers = numbers
        self._random = None if seed is None else random.Random(seed)
        self._hook = hook
        self.observed: list[object] = []
        """What the machine has answered since the last choice between two steps."""
        self.footprint: set[object] = set()
        """What has happened since then has to do with these: pages, processes, and what else the world names."""
        self.taken: list[int] = []
        self.widths: list[int] = []
        self.told: list[str] = []
        """The name of each option taken: only where `names` or a seed ask for it."""

    def pick(self, options: Sequence[object], *, inside: bool = False) -> int:
        """Which of two options or more; `str()` of one is its name."""
        number = len(self.taken)
        if number < len(self._prefix):
            index = self._prefix[number]
            if number < len(self._numbers) and len(options) != self._numbers[number]:
                raise DivergedError(f"diverged at choice {number}: {_listed(options)}, not {self._numbers[number]}")
            if index >= len(options):
                raise DivergedError(f"diverged at choice {number}: option {index} of {_listed(options)}")
        elif self._hook is not None:
            index = self._hook(number, options, not inside)
        else:
            index = 0 if self._random is None else self._random.randrange(len(options))
        if self._names is not None:
            name = str(options[index])
            if number < len(self._names) and name != self._names[number]:
                raise DivergedError(f"diverged at choice {number}: {name!r} and not {self._names[number]!r}")
            self.told.append(name)
        if not inside:
            self.observed.clear()
            self.footprint.clear()
        self.taken.append(index)
        self.widths.append(len(options))
        return index

    @property
    def known(self) -> int:
        """How many choices the prefix has: when so many are taken, something new begins."""
        return len(self._prefix)


def _listed(options: Sequence[object]) -> str:
    return f"{len(options)}: {', '.join(map(str, options))}"
