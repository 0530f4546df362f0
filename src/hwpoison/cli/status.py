"""`hwpoison status`: how a manager is doing."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from hwpoison.core.records import State

if TYPE_CHECKING:
    from hwpoison.protocol import Statistics


@click.command
@socket_option
@json_option
def status(socket: str | None, as_json: bool) -> int:
    """Show how a manager is doing. The exit status is 1 if bytes are lost or a failure ended as Failed.

    "Lost" is what is lost now. Failures and bad frames are counted since the keeper was started, accesses, faults, reads,
    writes and drops since the last manager took over ("Restarts": after a death, or by `hwpoison restart`). The lines below
    "Failures" say what the pages were, and add up to it (reports of pages known to be bad are not counted). `hwpoison run`
    is a client of its manager, too.

    \b
    Example:
      hwpoison status --socket /tmp/hwpoison.sock
    """
    with connected(socket) as manager:
        statistics = manager.statistics()
        lost = sum(one.lost for one in manager.objects())
    found = FOUND if lost or statistics.outcomes.get("Failed", 0) else FINE
    if as_json:
        import msgspec

        print_json({"lost": lost, **msgspec.to_builtins(statistics)})
    else:
        print_table((), _rows(statistics, lost))
    return found


def _rows(statistics: Statistics, lost: int) -> list[tuple[str, str]]:
    limit = statistics.memory_limit
    allowed = "no limit" if limit is None else f"limit {size_text(limit)}"
    states = dict(statistics.states)
    again = states.pop(State.ALREADY_POISONED.value, 0)
    return [
        ("Manager", f"process {statistics.pid}, of keeper {statistics.keeper}, at {statistics.socket}"),
        *([("Restarts", str(statistics.restarts))] if statistics.restarts else []),
        ("Clients", str(statistics.clients)),
        ("Objects", str(statistics.objects)),
        ("Memory in use", f"{size_text(statistics.memory_present)} ({allowed})"),
        ("Lost", paint(f"{size_text(lost)}, until its owner repairs or discards it", colour="red") if lost else "nothing"),
        ("Failures", _failures(statistics.outcomes)),
        *((f"  {state}", str(count)) for state, count in sorted(states.items())),
        *([("Reports of pages known to be bad", f"{again} (no new failures)")] if again else []),
        ("Bad frames in quarantine", size_text(statistics.quarantined)),
        ("Accesses to lost pages", str(statistics.accesses_to_lost)),
        ("Faults served", str(statistics.faults)),
        ("Read from files", size_text(statistics.read)),
        ("Written to files", size_text(statistics.written)),
        ("Dropped to keep the limit", size_text(statistics.dropped)),
        *([("Events not logged", paint(str(statistics.events_dropped), colour="red"))] if statistics.events_dropped else []),
    ]


def _failures(outcomes: dict[str, int]) -> str:
    """The number, and how they ended."""
    if not outcomes:
        return "none"
    ends = ", ".join(paint(f"{count} {outcome}", outcome=outcome) for outcome, count in sorted(outcomes.items()))
    return f"{sum(outcomes.values())}: {ends}"
