"""The event log's writer: what the manager says goes to a file, and nobody ever waits for that.

The manager adds events from its event loop. One thread writes them, some time later and many in one transaction. A file
that can't be written costs events, which are counted, and never the manager: one warning says so, and every batch is a new
attempt. Until an event is in the file it is in the manager's journal, as `event` and a number: if the manager dies, the next
one writes what is not there yet. `hwpoison.events` says where the file is and what is in it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import sqlite3
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from hwpoison.core.journal import of_kind
from hwpoison.core.machine import Records
from hwpoison.core.records import Event
from hwpoison.events import BUSY_SECONDS_MAX, EVENT_FIELDS, PATH_VARIABLE, SCHEMA, NotAnEventLogError, has_schema, values_of

EVENTS_LIMIT = 100_000
"""Most rows in the file."""
PRUNE_ROWS = 10_000
"""Rows that go at once when the limit is reached, the oldest first."""
QUEUE_LIMIT = 20_000
"""Most events that wait for the writer."""
LINGER_SECONDS = 0.02
"""How long the writer lets events gather: it leaves the processor to the failure that they come from."""
CLOSE_SECONDS_MAX = 10.0
"""How long `EventLog.close` waits for the rest to be written."""

_COLUMNS = ("time", "instance", *EVENT_FIELDS)
_INSERT = (
    f"INSERT INTO event ({', '.join(f'{chr(34)}{column}{chr(34)}' for column in _COLUMNS)}) "
    f"VALUES ({', '.join('?' * len(_COLUMNS))})"
)

_FIND = f"SELECT 1 FROM event WHERE {' AND '.join(f'{chr(34)}{column}{chr(34)} = ?' for column in _COLUMNS)}"

_Row = tuple[str | int, ...]

log = logging.getLogger("hwpoison")


class EventLog:
    """Writes the events of one manager to the file at `path`. `instance` begins that manager's event ids. `records`: its
    journal."""

    def __init__(self, path: Path, instance: str, records: Records | None = None) -> None:
        self.path = path
        self.instance = instance
        self._records = records
        self._loop: asyncio.AbstractEventLoop | None = None
        self._early: list[int] = []
        """What was written before there was a loop."""
        # Not queue.Queue: its put takes a lock that the writer takes too. The bound is `add`'s.
        self._queue: queue.SimpleQueue[tuple[int, _Row] | Future[None] | None] = queue.SimpleQueue()
        self._hurry = threading.Event()
        self._lock = threading.Lock()
        self._dropped = 0
        self._closed = False
        self._file = _File(path)
        self._last = 0
        for (number,), row in of_kind(records.all(), "event").items() if records is not None else ():
            # It may be in the file already.
            assert isinstance(number, int)
            self._last = number
            self._file.doubtful.add(number)
            self._queue.put((number, tuple(row)))
        self._writer = threading.Thread(target=self._write_all, name="hwpoison-event-log", daemon=True)
        self._writer.start()

    @property
    def dropped(self) -> int:
        """How many events are not in the file, because too many came at once or it could not be written."""
        return self._dropped

    def add(self, event: Event) -> None:
        """Note `event`, with the time that it is now. Never waits, never raises."""
        if self._closed or self._queue.qsize() >= QUEUE_LIMIT:
            self._drop(1)
        else:
            row = (time.time_ns(), self.instance, *values_of(event))
            self._last += 1
            if self._records is not None:
                if self._loop is None:
                    self._loop = asyncio.get_running_loop()
                    self._loop.call_later(LINGER_SECONDS, lambda: self._forget(self._early))
                self._records.put(("event", self._last), row)
            self._queue.put((self._last, row))

    def sync(self) -> Future[None]:
        """Done when all events that were added before are in the file, or counted as dropped."""
        done: Future[None] = Future()
        if self._closed:
            done.set_result(None)
        else:
            self._queue.put(done)
            self._hurry.set()
        return done

    def close(self) -> None:
        """Write the rest. Waits at most `CLOSE_SECONDS_MAX`; later events are dropped."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._hurry.set()
        self._writer.join(CLOSE_SECONDS_MAX)
        if self._writer.is_alive():
            log.warning("the event log %s did not take the last events within %g s", self.path, CLOSE_SECONDS_MAX)

    def _written(self, numbers: list[int]) -> None:
        """They need not be in the journal any more. By the writer."""
        if self._loop is None:
            self._early += numbers
        elif self._records is not None:
            # The loop may be over; then nobody will read the journal.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._forget, numbers)

    def _forget(self, numbers: list[int]) -> None:
        assert self._records is not None
        with self._records.together():
            for number in numbers:
                self._records.drop(("event", number))

    def _drop(self, count: int) -> None:
        with self._lock:
            self._dropped += count

    # --- the writer's thread

    def _write_all(self) -> None:
        going_on = True
        while going_on:
            waiting: list[tuple[int, _Row] | Future[None] | None] = [self._queue.get()]
            self._hurry.wait(LINGER_SECONDS)
            self._hurry.clear()
            with suppress(queue.Empty):
                while len(waiting) < QUEUE_LIMIT:
                    waiting.append(self._queue.get_nowait())
            rows = [one for one in waiting if isinstance(one, tuple)]
            if rows:
                self._drop(self._file.write(rows))
                self._written([number for number, _ in rows])
            for one in waiting:
                # The manager may have given up waiting; the first call settles whether it has.
                if isinstance(one, Future) and one.set_running_or_notify_cancel():
                    one.set_result(None)
            going_on = None not in waiting
        self._file.close()


class _File:
    """The file, opened when there is something to write, and again after every error. Used by one thread."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.doubtful: set[int] = set()
        """The numbers of rows that may be in the file already."""
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._failing = False

    def write(self, rows: list[tuple[int, _Row]]) -> int:
        """Write all rows in one transaction; how many could not be written."""
        try:
            dropped = self._transaction(rows)
        except (sqlite3.Error, OSError, MemoryError, NotAnEventLogError) as error:
            self.close()
            if not self._failing:
                self._failing = True
                own_words = isinstance(error, NotAnEventLogError)
                why = str(error) if own_words else f"{self.path}: {error}; free it or set {PATH_VARIABLE} to another path"
                log.warning("events are not being logged: %s", why)
            return len(rows)
        if self._failing:
            self._failing = False
            log.warning("events are being logged again, at %s", self.path)
        return dropped

    def _transaction(self, rows: list[tuple[int, _Row]]) -> int:
        connection = self._open()
        dropped = 0
        connection.execute("BEGIN IMMEDIATE")
        _make_room(connection, len(rows))
        for number, row in rows:
            try:
                if number in self.doubtful and connection.execute(_FIND, row).fetchone():
                    continue
                connection.execute(_INSERT, row)
            except (OverflowError, UnicodeEncodeError):
                # A number of more than 64 bits or a lone surrogate: one such event must not cost the others.
                dropped += 1
        connection.execute("COMMIT")
        return dropped

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None and self._identity == _identity_of(self.path):
            return self._connection
        # Never opened, or somebody has removed or replaced the file.
        self.close()
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS_MAX, isolation_level=None)
        try:
            connection.execute("BEGIN")
            finished = has_schema(connection, self.path)
            connection.execute("COMMIT")
            if not finished:
                _create(connection, self.path)
            connection.execute("PRAGMA synchronous = NORMAL")
            identity = _identity_of(self.path)
        except BaseException:
            connection.close()
            raise
        self._connection, self._identity = connection, identity
        return connection

    def close(self) -> None:
        """Let go of the file."""
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None


def _identity_of(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _create(connection: sqlite3.Connection, path: Path) -> None:
    """Make the empty file an event log, unless another manager does so at the same moment."""
    deadline = time.monotonic() + BUSY_SECONDS_MAX
    while True:
        try:
            # This needs the file for itself, and SQLite does not wait for that.
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    connection.execute("BEGIN IMMEDIATE")
    if not has_schema(connection, path):
        for statement in SCHEMA:
            connection.execute(statement)
    connection.execute("COMMIT")


def _make_room(connection: sqlite3.Connection, count: int) -> None:
    """Before `count` rows are added. Rows go from the old end only, so the ids have no gaps and tell their number."""
    oldest, newest = connection.execute("SELECT (SELECT min(id) FROM event), (SELECT max(id) FROM event)").fetchone()
    if oldest is not None and newest - oldest + 1 + count > EVENTS_LIMIT:
        kept = max(0, EVENTS_LIMIT - PRUNE_ROWS - count)
        # The newest row stays, whatever comes: ids go on from it.
        connection.execute("DELETE FROM event WHERE id <= ? AND id < ?", (newest - kept, newest))
