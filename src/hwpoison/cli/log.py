"""`hwpoison log`: the event log, which is read from its file and needs no manager."""

from __future__ import annotations

import select
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import click

from hwpoison.cli.common import FINE, JSON_VERSION, bytes_text, json_option, paint
from hwpoison.core.records import printable

if TYPE_CHECKING:
    from hwpoison.events import LoggedEvent

FOLLOW_SECONDS = 0.2
"""How often `--follow` looks for more."""
LIMIT_ON_TERMINAL = 50
"""A person at a terminal wants to see the last ones, and a log has thousands."""


@click.command
@json_option
@click.option("--follow", is_flag=True, help="Go on with the events that come, until Ctrl-C.")
@click.option("--event", metavar="ID", help="Only what belongs to one failure; the manager's line ends with its ID.")
@click.option("--name", help="Only what happened to the object of that name.")
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N",
    help=f"Only the last N events. [default: {LIMIT_ON_TERMINAL} on a terminal, else all]",
)  # fmt: skip
@click.option("--all", "everything", is_flag=True, help="All events, on a terminal too.")
@click.option("--path", type=click.Path(path_type=Path), help="The log's file. [default: $HWPOISON_LOG, or the user's log]")
def log(
    as_json: bool,
    follow: bool,
    event: str | None,
    name: str | None,
    limit: int | None,
    everything: bool,
    path: Path | None,
) -> int:
    """Read the event log: every report, outcome, notice, repair and discard, of managers that have ended too.

    A line has the time (UTC), the failure's id, what happened, and where. With --json each line is an object. It is status 2
    if there is no log, or nothing with the id or name that is asked for; --follow waits for either.

    \b
    What can happen:
      report    somebody says that a page is bad    victim   a process whose data is gone
      outcome   what the handler made of it         notice   that process was sent the news
      refill    a page was read again               access   somebody touched a lost page
      repair    a lost page has its content again   kill     who could not be told was ended
      discard   a lost page has fresh content       error    something failed; the detail says what
      takeover  a manager follows one that ended

    \b
    Example:
      hwpoison log --limit 20
      hwpoison log --follow --json
    """
    from hwpoison.events import default_path, read

    if everything and limit is not None:
        raise click.UsageError("--all and --limit contradict each other; choose one")
    if sys.__stdout__ is None:
        raise click.UsageError("standard output is closed, and a log is there to be read: send it to a file, say")
    shortened = not (limit or everything or as_json or event) and sys.stdout.isatty()
    if shortened:
        limit = LIMIT_ON_TERMINAL
    path = path or default_path()
    show = _json_line if as_json else _line
    wanted = Wanted(event_id=event, name=name)
    events = _following(path, wanted, limit) if follow else read(path, limit=limit, **wanted)
    found = 0
    with suppress(KeyboardInterrupt):
        for one in events:
            found += 1
            sys.stdout.write(show(one) + "\n")
            if follow:
                sys.stdout.flush()
        if shortened and found == limit and not follow:
            click.echo(f"hwpoison log: these are the last {limit} events; --all shows all", err=True)
        if not found and not follow:
            for what, value in (("the id", event), ("the name", name)):
                if value is not None:
                    raise ValueError(f"no event in {path} has {what} {value!r}; `hwpoison log` shows those that are there")
    return FINE


class Wanted(TypedDict):
    """What is asked for."""

    event_id: str | None
    name: str | None


def _following(path: Path, wanted: Wanted, limit: int | None) -> Iterator[LoggedEvent]:
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
            events = read(path, after=last.id - 1 if last else 0, limit=limit, **wanted)
            limit = None
            if last and next(events, None) != last:
                # Somebody has removed the log, and this is another.
                events = read(path, **wanted)
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
