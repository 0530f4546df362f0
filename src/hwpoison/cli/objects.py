"""`hwpoison objects`: the memory that a manager owns."""

from __future__ import annotations

import click

from hwpoison.cli.common import (
    FINE,
    FOUND,
    connected,
    json_option,
    paint,
    print_json,
    print_table,
    size_text,
    socket_option,
)
from hwpoison.core.records import printable

HEADINGS = ("NAME", "KIND", "MODE", "SIZE", "PRESENT", "DIRTY", "LOST", "PROCESSES")
PROCESSES_SHOWN = 3
"""Of more only the first are named: an object may have thousands."""


@click.command
@socket_option
@json_option
def objects(socket: str | None, as_json: bool) -> int:
    """List the memory that a manager owns. The exit status is 1 if any of it is lost.

    PRESENT is in memory now, DIRTY is newer than its file, LOST is gone until its owner repairs or discards it. PROCESSES
    are those that map it. JSON has all of them, and how often they map it, views of guards counted too.

    \b
    Example:
      hwpoison objects --socket /tmp/hwpoison.sock
    """
    with connected(socket) as manager:
        found = manager.objects()
    if as_json:
        import msgspec

        print_json({"objects": msgspec.to_builtins(found)})
    elif found:
        rows = [
            (
                printable(one.name), one.kind, one.mode, size_text(one.nbytes), size_text(one.present),
                size_text(one.dirty), paint(size_text(one.lost), colour="red" if one.lost else ""), _processes(one.pids),
            )
            for one in found
        ]  # fmt: skip
        print_table(HEADINGS, rows, numbers=HEADINGS[3:7])
    else:
        click.echo("The manager owns no memory now.")
    return FOUND if any(one.lost for one in found) else FINE


def _processes(pids: list[int]) -> str:
    shown = " ".join(map(str, pids[:PROCESSES_SHOWN]))
    return f"{shown} and {len(pids) - PROCESSES_SHOWN} more" if len(pids) > PROCESSES_SHOWN else shown
