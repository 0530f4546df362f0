"""The event log's file: where it is, what is in it, and how it is read. `hwpoison.service.eventlog` writes it.

One SQLite file per user holds the events of all that user's managers and outlives them. This file belongs to both sides
of the wire: applications and the command read the log without a manager. What is added here says what the file is like;
what only a writer does stays with the writer.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from hwpoison.core.records import Event

PATH_VARIABLE = "HWPOISON_LOG"
SCHEMA_VERSION = 1
BUSY_SECONDS_MAX = 5.0
"""How long a reader or writer waits for others that hold the file."""
READ_ROWS = 1000
"""Rows that one read transaction takes: a reader that is slow to use them must not hold up the writers' checkpoints."""

EVENT_FIELDS = ("kind", "event_id", "name", "offset", "nbytes", "state", "outcome", "pid", "detail")
"""The columns that are fields of `Event`. The others: `id`, `time` (integer nanoseconds, UTC) and `instance`."""

SCHEMA = (
    """
    CREATE TABLE event (
        id INTEGER PRIMARY KEY,
        time INTEGER NOT NULL,
        instance TEXT NOT NULL,
        kind TEXT NOT NULL,
        event_id TEXT NOT NULL,
        name TEXT NOT NULL,
        "offset" INTEGER NOT NULL,
        nbytes INTEGER NOT NULL,
        state TEXT NOT NULL,
        outcome TEXT NOT NULL,
        pid INTEGER NOT NULL,
        detail TEXT NOT NULL
    )
    """,
    "CREATE INDEX event_by_event_id ON event (event_id)",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_COLUMNS = ", ".join(f'"{column}"' for column in ("id", "time", "instance", *EVENT_FIELDS))


class NotAnEventLogError(ValueError):
    """The file is something else, or the log of another version of hwpoison. It is left alone."""


class LoggedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event as it stands in the log. `id` orders the events of a file; `time` is in UTC; `instance` tells managers
    apart, and begins the event ids of one.

    `kind` says what happened (`report`, `outcome`, `victim`, `notice`, `access`, `refill`, `repair`, `discard`, `error`,
    `kill`, `takeover`); `event_id` is that of the failure to which it belongs. It concerns `nbytes` at `offset` of the
    object `name` (-1: no place in it) and process `pid` (0: none); `state` and `outcome` are the failure's, `detail` is for
    people.
    """

    id: int
    time: datetime
    instance: str
    kind: str
    event_id: str
    name: str
    offset: int
    nbytes: int
    state: str
    outcome: str
    pid: int
    detail: str


def default_path() -> Path:
    """`$HWPOISON_LOG`, or `hwpoison/events.db` in the user's state directory."""
    if given := os.environ.get(PATH_VARIABLE):
        return Path(given)
    # The XDG specification: a relative path is to be ignored.
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        try:
            state = Path.home() / ".local" / "state"
        except RuntimeError:
            # A user without a home, as in some containers. Where this doesn't exist either, nothing can be written.
            state = Path(f"/run/user/{os.getuid()}")
    return state / "hwpoison" / "events.db"


def values_of(event: Event) -> tuple[str | int, ...]:
    """The values of `EVENT_FIELDS`."""
    return (
        event.kind, event.event_id, event.name, event.offset, event.nbytes, event.state, event.outcome, event.pid,
        event.detail,
    )  # fmt: skip


def has_schema(connection: sqlite3.Connection, path: Path) -> bool:
    """True if the open file is an event log, False if it is still empty. Raises `NotAnEventLogError`.

    To be asked within a transaction, so that somebody who makes the log at this moment is seen wholly or not at all.
    """
    assert connection.in_transaction
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if version == 0 and not tables:
        return False
    if "event" not in tables:
        raise NotAnEventLogError(f"{path} is no event log but another SQLite file; set {PATH_VARIABLE} to another path")
    if version != SCHEMA_VERSION:
        raise NotAnEventLogError(
            f"{path} is an event log of version {version}, and this hwpoison knows version {SCHEMA_VERSION}; "
            f"move the file away, or set {PATH_VARIABLE} to another path"
        )
    return True


def read(
    path: Path,
    *,
    after: int = 0,
    instance: str | None = None,
    event_id: str | None = None,
    name: str | None = None,
    limit: int | None = None,
) -> Iterator[LoggedEvent]:
    """The events with an `id` above `after`, in order; of those, `limit` takes the last ones. Writers are not held up.

    The first events are read before this returns, so its errors come at once: FileNotFoundError if there is no log
    yet, `NotAnEventLogError`, or another OSError for a file that can't be read.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit}: at least 1 event, or None for all")
    conditions = [("instance", instance), ("event_id", event_id), ("name", name)]
    where = "".join(f" AND {column} = ?" for column, value in conditions if value is not None)
    values = [value for _, value in conditions if value is not None]
    if limit is not None:
        newest = f"SELECT id FROM event WHERE id > ?{where} ORDER BY id DESC LIMIT 1 OFFSET ?"
        found = _query(path, newest, (after, *values, limit - 1))
        if found:
            after = found[0][0] - 1
    query = f"SELECT {_COLUMNS} FROM event WHERE id > ?{where} ORDER BY id LIMIT {READ_ROWS}"

    def batch(after: int) -> list[LoggedEvent]:
        return [_logged(row) for row in _query(path, query, (after, *values))]

    def rest(events: list[LoggedEvent]) -> Iterator[LoggedEvent]:
        yield from events
        while len(events) == READ_ROWS:
            events = batch(events[-1].id)
            yield from events

    return rest(batch(after))


def _query(path: Path, query: str, values: tuple[str | int, ...]) -> list[tuple[int, ...]]:
    """The rows of one query, each time on a connection of its own, so that none is left open by a reader that stops."""
    path = path.absolute()
    if not path.is_file():
        if path.exists():
            raise NotAnEventLogError(f"{path} is no file; name the event log's file")
        raise FileNotFoundError(f"there is no event log at {path} yet; a manager writes it with the first event")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"the event log {path} belongs to somebody else; read it as that user or as root")
    try:
        with closing(_connect(path)) as connection:
            connection.execute("BEGIN")
            return connection.execute(query, values).fetchall() if has_schema(connection, path) else []
    except sqlite3.OperationalError as error:
        raise OSError(f"the event log {path} cannot be read: {error}; try again") from error
    except sqlite3.DatabaseError as error:
        raise NotAnEventLogError(f"{path} is no event log, or a damaged one: {error}; move it away") from error


def _connect(path: Path) -> sqlite3.Connection:
    immutable = ""
    if not os.access(path.parent, os.W_OK) and not path.with_name(path.name + "-wal").exists():
        # Some SQLite would have to make the files of the write-ahead log here to read at all, and cannot. Nobody has the
        # file open, or they would exist, so it can't change either.
        immutable = "&immutable=1"
    return sqlite3.connect(f"{path.as_uri()}?mode=ro{immutable}", uri=True, timeout=BUSY_SECONDS_MAX, isolation_level=None)


def _logged(row: tuple[int, ...]) -> LoggedEvent:
    values = dict(zip(LoggedEvent.__struct_fields__, row, strict=True))
    time = _EPOCH + timedelta(microseconds=values.pop("time") // 1000)
    return msgspec.convert({"time": time, **values}, LoggedEvent)
