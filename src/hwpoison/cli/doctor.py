"""`hwpoison doctor`: what this machine can do, and what keeps it from doing more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import click

from hwpoison.cli.common import FINE, FOUND, console, json_option, print_json
from hwpoison.core.records import printable
from hwpoison.linux.capabilities import probe, works
from hwpoison.linux.probing import Capability
from hwpoison.linux.userfaultfd import DEVICE

MARKS = {"yes": ("✓", "green"), "no": ("–", "yellow"), "unknown": ("?", "cyan")}
NEEDED = {"no": "✗", "unknown": "?"}
SURROUNDINGS = "surroundings"
WIDTH_MAX = 120
USER_MODE = f"a system call that meets a page that is not there gets EFAULT; see {DEVICE} below for how to get more"


@click.command
@click.option("--verbose", "-v", is_flag=True, help="Say of everything what it gives.")
@json_option
def doctor(verbose: bool, as_json: bool) -> int:
    """Find out, by trying, what this machine can do; of what is missing, what it would give, and how to get it.

    The first line says whether hwpoison works here. Below, ✓ is there, – is not and hwpoison works without, ✗ is needed,
    ! is in the way, ? could not be found out. Nothing is changed. The exit status is 1 if hwpoison does not work here.

    \b
    Example:
      hwpoison doctor
    """
    found = probe()
    if as_json:
        print_json({"works": works(found), "verdict": _verdict(found), "capabilities": [asdict(one) for one in found]})
    else:
        _print(found, verbose)
    return FINE if works(found) else FOUND


def _verdict(found: Sequence[Capability]) -> str:
    """In one or two sentences: does it work, how well, and if not, why."""
    if works(found):
        full = any(one.state == "yes" for one in found if one.name in ("/dev/userfaultfd", "userfaultfd(2)"))
        return "hwpoison works here" + ("." if full else f", in user mode: {USER_MODE}.")
    trial, *others = [one for one in found if one.needed]
    missing = [one.name for one in others if one.state == "no"]
    why = ", ".join(f"no {name}" for name in missing) or trial.found
    text = f"hwpoison does not work here: {why}."
    obstacles = [f"{one.name} ({one.found})" for one in found if one.in_the_way]
    return text + (f" In the way: {', '.join(obstacles)}." if obstacles else "")


def _print(found: Sequence[Capability], verbose: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    output = console(without_terminal=WIDTH_MAX, at_most=WIDTH_MAX)
    output.print(Text(_verdict(found), "bold green" if works(found) else "bold red"))
    output.print()
    group = ""
    for one in found:
        if one.group != group:
            group = one.group
            output.print(Text(group, "bold"))
        mark, colour = _mark(one)
        what = Text(printable(one.found))
        surrounding = one.group == SURROUNDINGS
        if verbose or one.in_the_way or (one.state != "yes" and not surrounding):
            what.append(f"\n{'' if surrounding else 'gives: '}{one.gives}", "dim")
        if one.in_the_way:
            what.append(f"\nin the way: {one.how}")
        elif one.state == "no" and not surrounding:
            what.append(f"\n{'needed' if one.needed else 'to get it'}: {one.how}")
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
        for width in (2, 31, None):
            table.add_column(width=width, overflow="fold")
        table.add_row(Text(f" {mark}", colour), Text(one.name, colour if "red" in colour else ""), what)
        output.print(table)


def _mark(one: Capability) -> tuple[str, str]:
    """What stands before a capability, and its colour."""
    if one.in_the_way:
        return "!", "bold red"
    if one.group == SURROUNDINGS:
        return "·", ""
    if one.needed and one.state != "yes":
        return NEEDED[one.state], "bold red"
    return MARKS[one.state]
