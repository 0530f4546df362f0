"""`hwpoison log`: the event log, which is read from its file and needs no manager."""

from __future__ import annotations

import select
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hwpoison.cli.common import FINE, JSON_VERSION, bytes_text, json_option, paint
from hwpoison.core.records import printable

if TYPE_CHECKING:
    from hwpoison.events import LoggedEvent

FOLLOW_SECONDS = 0.2
"""How often `--follow` looks for more."""


@click.command
@json_option
@click.option("--follow", is_flag=True, help="Go on with the events that come, until Ctrl-C.")
@click.option("--event", metavar="ID", help="Only what belongs to one failure; the manager's line ends with its ID.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the last N events.")
@click.option("--path", type=click.Path(path_type=Path), help="The log's file. [default: $HWPOISON_LOG, or the user's log]")
def log(as_json: bool, follow: bool, event: str | None, limit: int | None, path: Path | None) -> int:
    """Read the event log: every report, outcome, notice, repair and discard, of managers that have ended too.

    A line has the time (UTC), the failure's id, what happened, and where. With --json each line is an object. It is status 2
    if there is no log, or nothing with the id that is asked for; --follow waits for either.

    \b
    Example:
      hwpoison log --limit 20
      hwpoison log --follow --json
    """
    from hwpoison.events import default_path, read

    path = path or default_path()
    show = _json_line if as_json else _line
    events = _following(path, event, limit) if follow else read(path, event_id=event, limit=limit)
    found = False
    with suppress(KeyboardInterrupt):
        for one in events:
            found = True
            sys.stdout.write(show(one) + "\n")
            if follow:
                sys.stdout.flush()
        if event is not None and not found and not follow:
            raise ValueError(f"no event in {path} has the id {event!r}; `hwpoison log` shows those that are there")
    return FINE


def _following(path: Path, event_id: str | None, limit: int | None) -> Iterator[LoggedEvent]:
    """What is there, and then whatever comes, until nobody reads standard output any more."""
    from hwpoison.events import read

    last: LoggedEvent | None = None
    reader_is_gone = select.poll()
    reader_is_gone.register(sys.stdout.fileno(), 0)
    if not path.exists():
        click.echo(f"hwpoison log: there is no event log at {path} yet; waiting for it", err=True)
    while True:
        # A log that does not exist yet will come with the first event.
        with suppress(FileNotFoundError):
            events = read(path, after=last.id - 1 if last else 0, event_id=event_id, limit=limit)
            limit = None
            if last and next(events, None) != last:
                # Somebody has removed the log, and this is another.
                events = read(path, event_id=event_id)
            for last in events:
                yield last
        if reader_is_gone.poll(FOLLOW_SECONDS * 1000):
            return


def _json_line(event: LoggedEvent) -> str:
    import msgspec

    return msgspec.json.encode({"version": JSON_VERSION} | msgspec.structs.asdict(event)).decode()


def _line(event: LoggedEvent) -> str:
    time = event.time.isoformat(sep=" ", timespec="milliseconds").replace("+00:00", "Z")
    place = f"{event.name}+{event.offset:#x}" if event.offset >= 0 else event.name
    said = f"{event.state}: {event.outcome}" if event.state and event.outcome else event.state or event.outcome
    details = [
        bytes_text(event.nbytes) if event.nbytes else "",
        f"pid {event.pid}" if event.pid else "",
        said,
        event.detail,
    ]
    text = "  ".join(printable(one) for one in (place, *details) if one)
    return f"{time}  {event.event_id or '-':<12}  {paint(f'{event.kind:<8}', outcome=event.outcome)}  {text}"
