"""`hwpoison explore`: every interleaving of the core in simulation, and runs told again."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hwpoison.cli.common import FINE, FOUND, USAGE, json_option, paint, print_json

if TYPE_CHECKING:
    from hwpoison.simulation.explore import Cell


@click.command
@click.option("--exhaustive", is_flag=True, help="Every state of a page with every pair of operations, to the end.")
@click.option("--mutants", is_flag=True, help="Plant known defects one by one, and find each.")
@click.option("--replay", metavar="FILE", type=click.Path(path_type=Path), help="Tell a run again, step by step.")
@click.option("--mode", type=click.Choice(["quiet", "batch"]), default="quiet", show_default=True,
              help="When something from outside may come: if nothing is ready, or several at once.")  # fmt: skip
@click.option("--matrix", type=click.Choice(["pairs", "two-pages", "deaths"]), default="pairs", show_default=True,
              help="Pairs of operations on one page, on two, or each operation with the manager's death.")  # fmt: skip
@click.option("--misfortunes", is_flag=True, help="One write or read may fail, or one marker be lost, beside all else.")
@click.option("--limit", metavar="N", type=click.IntRange(1), help="At most so many schedules a cell.")
@click.option("--save", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False), help="Save runs that fail.")
@json_option
def explore(
    exhaustive: bool,
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
      hwpoison explore --replay tests/simulation/found/one.json
    """
    if exhaustive + mutants + (replay is not None) != 1:
        raise click.UsageError("say one of --exhaustive, --mutants, --replay FILE")
    if replay is not None:
        return _replay(replay)
    return _mutants(limit, as_json) if mutants else _exhaustive(mode, matrix, misfortunes, limit, save, as_json)


def _replay(path: Path) -> int:
    from hwpoison.simulation.choices import DivergedError
    from hwpoison.simulation.runs import Replay, load

    try:
        saved = load(path)
    except (OSError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    again = Replay(saved)
    click.echo(f"{saved.scenario} ({saved.mode})")
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

    if misfortunes and matrix != "pairs":
        raise click.UsageError("--misfortunes goes with the matrix of pairs")
    scenarios = list(pairs(misfortunes=misfortunes) if matrix == "pairs" else MATRICES[matrix]())
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
            "cells": [asdict(cell) for cell in cells],
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
    click.echo(paint(f"{len(found)} violations", colour="red") if found else paint("Everything holds.", colour="green"))
    return FOUND if found else FINE


def _save(cells: list[Cell], scenarios: list[Any], mode: Any, folder: Path) -> None:
    from hwpoison.simulation.runs import named

    folder.mkdir(parents=True, exist_ok=True)
    for number, (cell, scenario) in enumerate(zip(cells, scenarios, strict=True)):
        if cell.violation is not None:
            named(scenario, mode, tuple(cell.violation.choices)).save(folder / f"{number}.json")


def _mutants(limit: int | None, as_json: bool) -> int:
    from hwpoison.simulation.hunt import hunt_all

    hunts = []
    for one in hunt_all(schedules_max=limit):
        hunts.append(one)
        if not as_json:
            how = f"{one.cell} after {one.schedules:,} schedules of {one.total:,}: {one.sentence}"
            click.echo(f"{one.name}: {how if one.caught else 'NOT CAUGHT'}")
    missed = [one for one in hunts if not one.caught]
    if as_json:
        print_json({"mutants": [asdict(one) for one in hunts], "caught": len(hunts) - len(missed)})
    else:
        click.echo(f"{len(hunts) - len(missed)} of {len(hunts)} caught")
    return FOUND if missed else FINE
