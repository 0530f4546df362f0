"""The hunt for planted defects: each in a process of its own, cell by cell, until one is caught."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from hwpoison.simulation.mutants import MUTANTS, mutant, planted


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


def hunt_all(schedules_max: int | None = None) -> Iterator[Hunt]:
    """In the order of the catalogue."""
    # A new process each: a mutant is planted while modules are imported.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, max_tasks_per_child=1) as pool:
        yield from pool.map(hunt, [one.name for one in MUTANTS], [schedules_max] * len(MUTANTS))


def hunt(name: str, schedules_max: int | None = None) -> Hunt:
    """Explore with the mutant planted."""
    wanted = mutant(name)
    gc.disable()
    total = 0
    with planted(wanted):
        from hwpoison.simulation.explore import explore  # noqa: PLC0415  (with the mutant in it)
        from hwpoison.simulation.matrix import pairs  # noqa: PLC0415

        for scenario in sorted(pairs(misfortunes=True), key=lambda one: not str(one).startswith(wanted.hint)):
            cell = explore(scenario, wanted.mode, schedules_max=schedules_max)
            gc.collect()
            total += cell.schedules
            if cell.violation is not None:
                return Hunt(
                    name, wanted.source, wanted.what, True, str(scenario), cell.schedules, total, cell.violation.sentence
                )
    return Hunt(name, wanted.source, wanted.what, False, "", 0, total, "")
