"""`hwpoison bench`: what this costs here, each figure beside its floor."""

from __future__ import annotations

import tempfile
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hwpoison.cli.benchmarks import BENCHMARKS
from hwpoison.cli.common import FINE, json_option, paint, print_json, print_table

if TYPE_CHECKING:
    from hwpoison.cli.benchmarks.common import Result

HEADINGS = ("FIGURE", "VALUE", "FLOOR", "UNIT", "RATIO", "TARGET", "")
NUMBERS = HEADINGS[1:3] + HEADINGS[4:5]
NAMES = "\n".join(f"  {name:<9} {place.summary}" for name, place in BENCHMARKS.items())


@click.command(
    help=f"""Measure what hwpoison costs on this machine.

Each figure stands beside its floor: what the same work costs without hwpoison, most often done by a small program in C
with raw system calls, which is compiled when it is needed. The two are measured in turns. Takes about two minutes, and
4 GiB of memory; a quiet machine gives better figures. The exit status is 0 also if a target is missed.

\b
Benchmarks; all of them if none is NAMEd:
{NAMES}

\b
Example:
  hwpoison bench
  hwpoison bench guard --json
"""
)
@click.argument("name", required=False, type=click.Choice(list(BENCHMARKS)), metavar="[NAME]")
@json_option
def bench(name: str | None, as_json: bool) -> int:
    """See the help above: the list of benchmarks is in it."""
    from hwpoison.cli.benchmarks.common import Bench
    from hwpoison.cli.benchmarks.floors import Floors

    chosen = {name: BENCHMARKS[name]} if name else BENCHMARKS
    if any(place.compiled for place in chosen.values()):
        Floors.check()
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="hwpoison-bench-") as folder:
        run = Bench(Path(folder), lambda text: click.echo(text, err=True))
        for one, place in chosen.items():
            run.say(f"{one}: {place.summary}")
            results += import_module(f"hwpoison.cli.benchmarks.{place.module}").measure(run)
    if as_json:
        print_json({"results": [one.document() for one in results]})
    else:
        print_table(HEADINGS, [_row(one) for one in results], numbers=NUMBERS)
    return FINE


def _row(result: Result) -> tuple[str, ...]:
    target, verdict = "", ""
    if result.target is not None:
        of = "ratio" if result.target.of == "ratio" else "value"
        target = f"{of} {result.target.bound} {result.target.limit:g}"
        verdict = paint("met", colour="green") if result.met else paint("MISSED", colour="red")
    return (
        result.name,
        _number(result.value),
        "" if result.floor is None else _number(result.floor),
        result.unit,
        "" if result.ratio is None else f"{result.ratio:.2f}",
        target,
        verdict,
    )


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
