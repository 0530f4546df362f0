"""`hwpoison explore`: every interleaving of the core in simulation, and runs told again."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hwpoison.cli.common import FINE, FOUND, USAGE, json_option, paint, print_json
from hwpoison.core.records import printable

if TYPE_CHECKING:
    from hwpoison.simulation.explore import Cell
    from hwpoison.simulation.seeded import Done

PROGRESS_SECONDS = 2.0
"""How often a long search says how far it is."""
FOUND_FOLDER = Path("tests/simulation/found")
"""Where runs are kept that have failed once, seen from a checkout of the project."""


@click.command
@click.option("--exhaustive", is_flag=True, help="Every state of a page with every pair of operations, to the end.")
@click.option("--seed", metavar="S", type=click.IntRange(0), help="Large worlds by seed: one number makes the same runs.")
@click.option("--runs", metavar="N", type=click.IntRange(1), default=1, show_default=True, help="How many, with --seed.")
@click.option("--mutants", is_flag=True, help="Plant known defects one by one, and find each.")
@click.option("--replay", metavar="FILE", type=click.Path(path_type=Path), help="Tell a run again, step by step.")
@click.option("--mode", type=click.Choice(["quiet", "batch"]), default="quiet", show_default=True,
              help="When something from outside may come: if nothing is ready, or several at once.")  # fmt: skip
@click.option("--matrix", default="pairs", show_default=True,
              type=click.Choice(["pairs", "all-pairs", "apart", "two-pages", "deaths", "restarts", "two-deaths",
                                 "restart-pairs", "old-kernels"]),
              help="Pairs of operations on one page (all-pairs: those too that differ little from others; apart: what is "
                   "not done beside everything), on two, each operation with the manager's death, or pairs where the "
                   "kernel has no poison markers; with restarts, another manager takes over; with two-deaths, that one "
                   "may die too.")  # fmt: skip
@click.option("--misfortunes", is_flag=True, help="One write or read may fail, or one marker be lost, beside all else.")
@click.option("--limit", metavar="N", type=click.IntRange(1), help="At most so many schedules a cell.")
@click.option("--save", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False),
              help="Save runs that fail; those by seed go to tests/simulation/found, where that is.")  # fmt: skip
@json_option
def explore(
    exhaustive: bool,
    seed: int | None,
    runs: int,
    mutants: bool,
    replay: Path | None,
    mode: str,
    matrix: str,
    misfortunes: bool,
    limit: int | None,
    save: Path | None,
    as_json: bool,
) -> int:
    """Run the manager's core in simulation, where every order of events can be met, and check what must hold after each
    step. The exit status is 1 if something did not hold.

    \b
    Example:
      hwpoison explore --exhaustive
      hwpoison explore --seed 1 --runs 10000
      hwpoison explore --replay tests/simulation/found/torn-discard.json
    """
    if exhaustive + mutants + (seed is not None) + (replay is not None) != 1:
        raise click.UsageError("say one of --exhaustive, --seed S, --mutants, --replay FILE")
    _refuse_others("seed" if seed is not None else "replay" if replay else "mutants" if mutants else "exhaustive")
    if replay is not None:
        return _replay(replay)
    if seed is not None:
        return _seeded(seed, runs, mode, save or (FOUND_FOLDER if FOUND_FOLDER.is_dir() else None), as_json)
    return _mutants(limit, as_json) if mutants else _exhaustive(mode, matrix, misfortunes, limit, save, as_json)


_GOES_WITH = {
    "exhaustive": ("mode", "matrix", "misfortunes", "limit", "save", "as_json"),
    "seed": ("runs", "mode", "save", "as_json"),
    "mutants": ("limit", "as_json"),
    "replay": (),
}
"""What each way to explore looks at."""


def _refuse_others(way: str) -> None:
    context = click.get_current_context()
    for option in context.command.params:
        name = option.name or ""
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and name not in (way, *_GOES_WITH[way]):
            raise click.UsageError(f"{option.opts[0]} says nothing with --{way}")


def _replay(path: Path) -> int:
    from hwpoison.simulation.choices import DivergedError
    from hwpoison.simulation.runs import Replay, load

    try:
        saved = load(path)
    except (OSError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    again = Replay(saved)
    click.echo(f"{saved.scenario} ({saved.mode})")
    if saved.violation:
        click.echo(f"When it was found, this did not hold: {printable(saved.violation)}")
    try:
        for line in again.story():
            click.echo(line)
    except DivergedError as error:
        click.echo(f"hwpoison: {error}", err=True)
        return USAGE
    click.echo(again.violation or "Everything holds.")
    return FOUND if again.violation else FINE


def _exhaustive(mode: Any, matrix: str, misfortunes: bool, limit: int | None, save: Path | None, as_json: bool) -> int:
    from hwpoison.simulation.matrix import MATRICES, explore_all, pairs

    if misfortunes and matrix not in ("pairs", "all-pairs"):
        raise click.UsageError("--misfortunes goes with the matrices of pairs")
    _make_folder(save)
    scenarios = list(pairs(misfortunes=True, variants=matrix == "all-pairs") if misfortunes else MATRICES[matrix]())
    started = time.monotonic()
    counted = [0, 0]

    def progress(cell: Cell) -> None:
        counted[0] += 1
        counted[1] += cell.schedules
        if counted[0] % 50 == 0 or counted[0] == len(scenarios):
            seconds = time.monotonic() - started
            click.echo(f"{counted[0]} of {len(scenarios)} cells, {counted[1]:,} schedules, {seconds:.0f} s", err=True)

    cells = explore_all(scenarios, mode, schedules_max=limit, progress=progress)
    seconds = time.monotonic() - started
    found = [cell for cell in cells if cell.violation is not None]
    if save is not None:
        _save(cells, scenarios, mode, save)
    schedules, steps = sum(cell.schedules for cell in cells), sum(cell.steps for cell in cells)
    complete = sum(cell.complete for cell in cells)
    if as_json:
        print_json({
            "mode": mode, "matrix": matrix, "pairs": len(cells), "schedules": schedules, "steps": steps,
            "violations": len(found), "complete": complete == len(cells), "seconds": seconds,
            "cells": [asdict(cell) | {"violations": int(cell.violation is not None)} for cell in cells],
        })  # fmt: skip
        return FOUND if found else FINE
    for cell in found:
        assert cell.violation is not None
        click.echo(f"{cell.scenario}: {cell.violation.sentence}")
    for cell in cells:
        if not cell.complete and cell.violation is None:
            click.echo(f"{cell.scenario}: not complete after {cell.schedules:,} schedules")
    rate = schedules / seconds / (os.cpu_count() or 1)
    share = f"{complete} complete ({complete / len(cells):.1%})"
    click.echo(f"{len(cells)} cells, {share}; {schedules:,} schedules, {steps:,} steps in {seconds:.0f} s: "
               f"{rate:,.0f} schedules a second and core")  # fmt: skip
    return _holds(len(found))


def _make_folder(folder: Path | None) -> None:
    """For the runs that will fail; before all the work, whose result would have no place. Raises UsageError."""
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise click.UsageError(f"{folder} can't be a folder to save runs in: {error.strerror}") from error


def _save(cells: list[Cell], scenarios: list[Any], mode: Any, folder: Path) -> None:
    from hwpoison.simulation.runs import named

    for number, (cell, scenario) in enumerate(zip(cells, scenarios, strict=True)):
        if cell.violation is not None:
            named(scenario, mode, tuple(cell.violation.choices)).save(folder / f"{number}.json")


def _seeded(seed: int, runs: int, mode: Any, save: Path | None, as_json: bool) -> int:
    from hwpoison.simulation.seeded import run_many, shrink_failed

    _make_folder(save)
    started = said = time.monotonic()

    def progress(done: Done) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= PROGRESS_SECONDS or done.schedules == runs:
            said = now
            failed = f", {len(done.failed)} failed" if done.failed else ""
            click.echo(f"{done.schedules:,} of {runs:,} runs{failed}, {now - started:.0f} s", err=True)

    done = run_many(seed, runs, mode, progress=progress)
    seconds = time.monotonic() - started
    rate = done.schedules / done.seconds
    shrunk = shrink_failed(done.failed, mode)
    if save is not None:
        for one, again in shrunk:
            again.save(save / f"seed-{one.seed}.json")
    if as_json:
        short = {one.seed: asdict(again) for one, again in shrunk}
        print_json({
            "seed": seed, "runs": runs, "mode": mode, "schedules": done.schedules, "steps": done.steps,
            "violations": len(done.failed), "seconds": seconds, "schedules_per_second_and_core": rate,
            "found": [asdict(one) | {"shrunk": short.get(one.seed)} for one in done.failed],
        })  # fmt: skip
        return FOUND if done.failed else FINE
    for failed in done.failed:
        click.echo(f"--seed {failed.seed} --mode {mode}: {failed.sentence}")
    for one, again in shrunk:
        where = f"saved as {save / f'seed-{one.seed}.json'}" if save is not None else "--save FOLDER writes it to a file"
        click.echo(f"--seed {one.seed}, shrunk to {len(again.choices)} of {one.choices} choices; {where}:")
        click.echo(f"  {again.scenario}")
        click.echo(f"  {'; '.join(again.names) or 'the first option, always'}")
    click.echo(f"{done.schedules:,} runs, {done.steps:,} steps in {seconds:.1f} s: {rate:,.0f} runs a second and core")
    return _holds(len(done.failed))


def _holds(violations: int) -> int:
    click.echo(paint(f"{violations} violations", colour="red") if violations else paint("Everything holds.", colour="green"))
    return FOUND if violations else FINE


def _mutants(limit: int | None, as_json: bool) -> int:
    from hwpoison.simulation.hunt import hunt_all

    hunts: list[Any] = []
    for one in hunt_all(schedules_max=limit):
        hunts.append(one)
        if as_json:
            click.echo(f"{len(hunts)} mutants, {one.name}: {'caught' if one.caught else 'NOT CAUGHT'}", err=True)
        if not as_json:
            where = f" in batch, as {one.why_batch}" if one.why_batch else ""
            how = f"{one.cell}{where} after {one.schedules:,} schedules of {one.total:,}: {one.sentence}"
            click.echo(f"{one.name}: {how if one.caught else 'NOT CAUGHT'}")
    missed = [one for one in hunts if not one.caught]
    if as_json:
        print_json({"mutants": [asdict(one) for one in hunts], "caught": len(hunts) - len(missed)})
    else:
        click.echo(f"{len(hunts) - len(missed)} of {len(hunts)} caught")
    return FOUND if missed else FINE
