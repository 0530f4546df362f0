"""The hunt for planted defects: each in a process of its own, cell by cell, until one is caught.

And the comparison that shows that the explorer leaves out nothing that matters: with each defect, small cells are explored
with and without what makes it quick.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from hwpoison.simulation.mutants import MUTANTS, mutant, planted

Argument = TypeVar("Argument")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Hunt:
    """What came of one mutant: the first cell that caught it, the schedules in that, and in all up to then."""

    name: str
    source: str
    what: str
    caught: bool
    cell: str
    schedules: int
    total: int
    sentence: str
    mode: str
    why_batch: str
    """Why it is not caught in quiet mode; empty if it is."""


def hunt_all(schedules_max: int | None = None) -> Iterator[Hunt]:
    """In the order of the catalogue."""
    yield from _with_each(hunt, schedules_max)


def _with_each(
    story: Callable[[str, Argument], Result], argument: Argument, names: Sequence[str] | None = None
) -> Iterator[Result]:
    """`story` of every mutant, or of those that are named, in the order of the catalogue, each in a new process: it is
    planted while modules are imported. Ctrl-C is for the process that waits."""
    context = multiprocessing.get_context("spawn")
    deaf = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(os.cpu_count(), mp_context=context, max_tasks_per_child=1, initializer=deaf)
    try:
        wanted = [one.name for one in MUTANTS] if names is None else list(names)
        yield from pool.map(story, wanted, [argument] * len(wanted))
    finally:
        pool.shutdown(cancel_futures=True)


def hunt(name: str, schedules_max: int | None = None) -> Hunt:
    """Explore with the mutant planted."""
    wanted = mutant(name)
    gc.disable()
    total = 0
    with planted(wanted):
        from hwpoison.simulation.explore import explore  # noqa: PLC0415  (with the mutant in it)
        from hwpoison.simulation.matrix import apart, pairs, restart_pairs, restarts, small, two_pages  # noqa: PLC0415

        scenarios = [*pairs(misfortunes=True), *apart(), *restarts(), *two_pages(), *small(), *restart_pairs()]
        for scenario in sorted(scenarios, key=lambda one: not str(one).startswith(wanted.hint)):
            cell = explore(scenario, wanted.mode, schedules_max=schedules_max)
            gc.collect()
            total += cell.schedules
            if cell.violation is not None:
                return Hunt(
                    name=name, source=wanted.source, what=wanted.what, caught=True, cell=str(scenario),
                    schedules=cell.schedules, total=total, sentence=cell.violation.sentence, mode=wanted.mode,
                    why_batch=wanted.why_batch,
                )  # fmt: skip
    return Hunt(
        name=name, source=wanted.source, what=wanted.what, caught=False, cell="", schedules=0, total=total, sentence="",
        mode=wanted.mode, why_batch=wanted.why_batch,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Comparison:
    """One cell with one mutant: was anything caught, without reduction and with each (sleep sets are for quiet mode).

    Only of cells that the search without reduction has explored to the end, or in which it has caught something.
    """

    name: str
    cell: str
    plain: bool
    with_hashing: bool | None
    with_sleep_sets: bool | None = None
    with_both: bool | None = None

    @property
    def equal(self) -> bool:
        """True if reduction makes no difference."""
        return all(one in (None, self.plain) for one in (self.with_hashing, self.with_sleep_sets, self.with_both))


def compare_all(schedules_max: int, names: Sequence[str] | None = None) -> Iterator[Comparison]:
    """Every mutant, or those that are named, with every cell of `matrix.small`."""
    for found in _with_each(compare, schedules_max, names):
        yield from found


def compare(name: str, schedules_max: int) -> list[Comparison]:
    """All cells with one mutant planted."""
    gc.disable()
    mode = mutant(name).mode
    reductions = ((True, False), (False, True), (True, True))[: 3 if mode == "quiet" else 1]
    found = []
    with planted(mutant(name)):
        from hwpoison.simulation.explore import explore  # noqa: PLC0415  (with the mutant in it)
        from hwpoison.simulation.matrix import small  # noqa: PLC0415
        from hwpoison.simulation.scenario import Scenario  # noqa: PLC0415

        gc.freeze()
        for scenario in small():

            def verdict(hashing: bool, sleeping: bool, scenario: Scenario = scenario) -> bool | None:
                cell = explore(scenario, mode, hashing=hashing, sleeping=sleeping, schedules_max=schedules_max)
                return cell.violation is not None if cell.complete or cell.violation else None

            plain = verdict(False, False)
            if plain is not None:
                found.append(Comparison(name, str(scenario), plain, *(verdict(*one) for one in reductions)))
            gc.collect()
    return found
