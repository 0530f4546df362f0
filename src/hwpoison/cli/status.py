"""`hwpoison status`: how a manager is doing."""

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


@click.command
@socket_option
@json_option
def status(socket: str | None, as_json: bool) -> int:
    """Show how a manager is doing. The exit status is 1 if bytes are lost or a failure ended as Failed.

    \b
    Example:
      hwpoison status --socket /run/user/1000/hwpoison.sock
    """
    with connected(socket) as manager:
        statistics = manager.statistics()
        lost = sum(one.lost for one in manager.objects())
    failed = statistics.outcomes.get("Failed", 0)
    if as_json:
        import msgspec

        print_json({"lost": lost, **msgspec.to_builtins(statistics)})
        return FOUND if lost or failed else FINE
    limit = statistics.memory_limit
    memory = size_text(statistics.memory_present) + ("" if limit is None else f" of {size_text(limit)}")
    outcomes = ", ".join(
        paint(f"{count} {outcome}", outcome=outcome) for outcome, count in sorted(statistics.outcomes.items())
    )
    rows = [
        ("Manager", f"process {statistics.pid} at {statistics.socket}"),
        ("Memory", memory),
        ("Objects", str(statistics.objects)),
        ("Clients", str(statistics.clients)),
        ("Failures", outcomes or "none"),
        *((f"  {state}", str(count)) for state, count in sorted(statistics.states.items())),
        ("Lost", paint(size_text(lost), colour="red" if lost else "")),
        ("Quarantined", size_text(statistics.quarantined)),
        ("Accesses to lost pages", str(statistics.accesses_to_lost)),
        ("Faults", str(statistics.faults)),
        ("Read from files", size_text(statistics.read)),
        ("Written to files", size_text(statistics.written)),
        ("Dropped to save memory", size_text(statistics.dropped)),
        ("Events not logged", str(statistics.events_dropped)),
    ]
    print_table((), rows)
    return FOUND if lost or failed else FINE
