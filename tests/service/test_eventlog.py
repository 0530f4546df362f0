"""The event log on real files, with real processes that share it."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import pytest

from hwpoison import events
from hwpoison.core.records import Event
from hwpoison.events import NotAnEventLogError, read
from hwpoison.service.eventlog import EVENTS_LIMIT, QUEUE_LIMIT, EventLog
from tests.support import SECONDS_MAX

NOBODY = 65534


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "events.db"


@pytest.fixture
def log(path: Path) -> Iterator[EventLog]:
    log = EventLog(path, "i")
    yield log
    log.close()


def add(log: EventLog, *details: object, event_id: str = "") -> None:
    for detail in details:
        log.add(Event(kind="report", event_id=event_id, detail=str(detail)))


def synced(log: EventLog) -> None:
    log.sync().result(SECONDS_MAX)


def details(path: Path, **selection: object) -> list[str]:
    return [one.detail for one in read(path, **selection)]  # type: ignore[arg-type]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Somebody else is writing to the file, and takes long."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    root = os.geteuid() == 0
    if root:
        os.setresgid(NOBODY, NOBODY, 0)
        os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        if root:
            os.setresuid(0, 0, 0)
            os.setresgid(0, 0, 0)


def test_an_event_is_read_back_as_it_was_added(log: EventLog, path: Path) -> None:
    event = Event(
        kind="outcome", event_id="i-1", name="t", offset=4096, nbytes=8192, state="anonymous page", outcome="Recovered",
        pid=7, detail="ünïcode",
    )  # fmt: skip
    before = datetime.now(UTC)
    log.add(event)
    after = datetime.now(UTC)
    synced(log)

    (found,) = read(path)

    assert tuple(getattr(found, field) for field in events.EVENT_FIELDS) == events.values_of(event)
    assert (found.id, found.instance) == (1, "i")
    assert before.replace(microsecond=before.microsecond // 10 * 10) <= found.time <= after
    assert found.time.tzinfo is UTC


def test_events_are_chosen_by_id_instance_and_event_id_and_the_limit_takes_the_last(log: EventLog, path: Path) -> None:
    add(log, "a", event_id="i-1")
    add(log, "b", event_id="i-2")
    add(log, "c", event_id="i-1")
    synced(log)
    other = EventLog(path, "j")
    add(other, "d", event_id="j-1")
    other.close()

    assert details(path) == ["a", "b", "c", "d"]
    assert details(path, after=2) == ["c", "d"]
    assert details(path, instance="i") == ["a", "b", "c"]
    assert details(path, event_id="i-1") == ["a", "c"]
    assert details(path, limit=2) == ["c", "d"]
    assert details(path, limit=9) == ["a", "b", "c", "d"]
    assert details(path, event_id="i-1", limit=1) == ["c"]
    assert details(path, after=4) == []
    with pytest.raises(ValueError, match="at least 1 event"):
        read(path, limit=0)


def test_a_log_that_nobody_has_written_yet_is_file_not_found(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no event log at"):
        read(path)


def test_directory_and_file_are_for_their_user_only(log: EventLog, path: Path) -> None:
    add(log, "a")
    synced(log)

    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE(one.stat().st_mode) for one in path.parent.iterdir()} == {0o600}


def test_the_place_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("HWPOISON_LOG", raising=False)
    assert events.default_path() == tmp_path / ".local/state/hwpoison/events.db"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert events.default_path() == tmp_path / ".local/state/hwpoison/events.db"
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert events.default_path() == Path("/state/hwpoison/events.db")
    monkeypatch.setenv("HWPOISON_LOG", "/elsewhere/log.db")
    assert events.default_path() == Path("/elsewhere/log.db")


def test_a_reader_in_the_middle_of_the_log_holds_no_writer_up_and_misses_nothing(log: EventLog, path: Path) -> None:
    half = events.READ_ROWS + 10
    add(log, *range(half))
    synced(log)

    reader = read(path)
    first = [one.detail for one in islice(reader, 5)]
    add(log, *range(half, 2 * half))
    synced(log)

    assert log.dropped == 0
    assert first + [one.detail for one in reader] == [str(number) for number in range(2 * half)]


def test_a_log_in_a_place_where_the_reader_may_not_write_is_read() -> None:
    # Not in tmp_path, which nobody else can enter.
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "events.db"
        log = EventLog(path, "i")
        add(log, "a")
        log.close()
        path.chmod(0o444)
        os.chmod(place, 0o555)
        with as_ordinary_user():
            assert details(path) == ["a"]
        os.chmod(place, 0o700)


WRITE_MANY = """
import sys
from pathlib import Path
from hwpoison.core.records import Event
from hwpoison.service.eventlog import EventLog
path, instance, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
log = EventLog(path, instance)
for number in range(count):
    log.add(Event(kind="report", detail=str(number)))
    if number % 50 == 0:
        log.sync().result(60)
log.close()
print(log.dropped)
"""


def test_managers_that_start_the_same_log_at_the_same_moment_lose_nothing(path: Path) -> None:
    writers, count = 8, 500
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE_MANY, path, str(number), str(count)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(writers)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()

    assert [process.communicate(timeout=SECONDS_MAX) for process in processes] == [("0\n", "")] * writers
    for number in range(writers):
        assert details(path, instance=str(number)) == [str(one) for one in range(count)]
    assert [one.id for one in read(path)] == list(range(1, writers * count + 1))


def test_what_was_synced_survives_the_death_of_its_manager(path: Path) -> None:
    script = """if True:
        import os, signal, sys
        from pathlib import Path
        from hwpoison.core.records import Event
        from hwpoison.service.eventlog import EventLog
        log = EventLog(Path(sys.argv[1]), "i")
        log.add(Event(kind="report", detail="a"))
        log.sync().result(60)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    ended = subprocess.run([sys.executable, "-c", script, path], timeout=SECONDS_MAX, check=False)

    assert ended.returncode == -signal.SIGKILL
    assert details(path) == ["a"]


def test_the_log_is_bounded_and_keeps_the_newest(log: EventLog, path: Path) -> None:
    total = EVENTS_LIMIT + QUEUE_LIMIT
    for start in range(0, total, QUEUE_LIMIT // 2):
        add(log, *range(start, start + QUEUE_LIMIT // 2))
        synced(log)
        with closing(sqlite3.connect(path)) as connection:
            (rows,) = connection.execute("SELECT count(*) FROM event").fetchone()
        assert rows <= EVENTS_LIMIT

    kept = [int(one) for one in details(path)]
    assert len(kept) > EVENTS_LIMIT * 0.8
    assert kept == list(range(total - len(kept), total))


def test_a_locked_file_delays_the_log_and_nobody_else(log: EventLog, path: Path) -> None:
    add(log, "a")
    synced(log)
    with locked(path):
        add(log, "b")
        future = log.sync()
        assert details(path) == ["a"]
        assert not future.done()
    future.result(SECONDS_MAX)

    assert details(path) == ["a", "b"]


def test_more_events_than_can_wait_are_counted_and_the_others_are_kept(log: EventLog, path: Path) -> None:
    add(log, "a")
    synced(log)
    with locked(path):
        started = time.monotonic()
        add(log, *range(3 * QUEUE_LIMIT))
        assert time.monotonic() - started < 4, "it waited for the lock"
        assert log.dropped >= QUEUE_LIMIT
    synced(log)

    assert len(details(path)) + log.dropped == 1 + 3 * QUEUE_LIMIT


def test_an_event_that_no_file_can_hold_costs_only_itself(log: EventLog, path: Path) -> None:
    add(log, "a")
    log.add(Event(kind="report", offset=1 << 64))
    log.add(Event(kind="report", name="\udc80"))
    add(log, "b")
    synced(log)

    assert details(path) == ["a", "b"]
    assert log.dropped == 2


def test_close_writes_the_rest_and_later_events_are_dropped(log: EventLog, path: Path) -> None:
    add(log, *range(100))
    log.close()
    add(log, "late")
    synced(log)
    log.close()

    assert details(path) == [str(number) for number in range(100)]
    assert log.dropped == 1


def test_somebody_who_stops_waiting_for_a_sync_disturbs_nothing(log: EventLog, path: Path) -> None:
    add(log, "a")
    synced(log)
    with locked(path):
        add(log, "b")
        assert log.sync().cancel()
    synced(log)

    assert details(path) == ["a", "b"]


def test_a_place_that_cannot_be_written_costs_events_and_one_warning_until_it_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    obstacle = tmp_path / "state"
    obstacle.write_text("no directory")
    log = EventLog(obstacle / "events.db", "i")
    for detail in ("a", "b", "c"):
        add(log, detail)
        synced(log)

    assert log.dropped == 3
    (warning,) = caplog.records
    assert (warning.name, warning.levelno) == ("hwpoison", logging.WARNING)
    assert "events are not being logged: " in warning.getMessage()
    assert "set HWPOISON_LOG to another path" in warning.getMessage()

    obstacle.unlink()
    add(log, "d")
    log.close()
    assert details(obstacle / "events.db") == ["d"]
    assert log.dropped == 3
    assert "being logged again" in caplog.messages[-1]


def test_a_full_disk_costs_events_and_the_log_goes_on_when_there_is_room(path: Path) -> None:
    script = """if True:
        import resource, sys
        from pathlib import Path
        from hwpoison.core.records import Event
        from hwpoison.service.eventlog import EventLog
        log = EventLog(Path(sys.argv[1]), "i")
        def add(detail):
            log.add(Event(kind="report", detail=detail))
            log.sync().result(60)
        add("before")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        add("x" * 1_000_000)
        print(log.dropped)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        add("after")
        log.close()
        print(log.dropped)
    """
    ended = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, timeout=SECONDS_MAX, check=True
    )

    assert ended.stdout.split() == ["1", "1"]
    assert details(path) == ["before", "after"]


def test_a_file_that_is_no_database_is_left_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.write_bytes(b"my precious notes\n" * 1000)
    log = EventLog(path, "i")
    add(log, "a")
    log.close()

    assert log.dropped == 1
    assert "file is not a database" in caplog.text
    assert path.read_bytes() == b"my precious notes\n" * 1000
    with pytest.raises(NotAnEventLogError, match="is no event log, or a damaged one"):
        read(path)


@pytest.mark.parametrize(
    ("table", "version", "message"),
    [("event", 2, "is an event log of version 2"), ("bookmark", 1, "another SQLite file"), ("bookmark", 0, "another")],
)
def test_a_database_of_somebody_else_or_another_version_is_left_alone(
    path: Path, caplog: pytest.LogCaptureFixture, table: str, version: int, message: str
) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"CREATE TABLE {table} (a)")
        connection.execute(f"PRAGMA user_version = {version}")
        connection.commit()
    content = path.read_bytes()
    log = EventLog(path, "i")
    add(log, "a")
    synced(log)
    add(log, "b")
    log.close()

    assert log.dropped == 2
    assert len(caplog.records) == 1
    assert message in caplog.text
    assert path.read_bytes() == content
    with pytest.raises(NotAnEventLogError, match=message):
        read(path)


def test_a_log_that_somebody_removes_begins_again(log: EventLog, path: Path) -> None:
    add(log, "a")
    synced(log)
    for one in list(path.parent.iterdir()):
        one.unlink()
    add(log, "b")
    synced(log)

    assert details(path) == ["b"]
    assert log.dropped == 0


def test_only_the_main_file_of_a_log_in_use_is_removed_and_it_begins_again(log: EventLog, path: Path) -> None:
    add(log, "a")
    synced(log)
    path.unlink()
    add(log, "b")
    synced(log)

    assert details(path) == ["b"]
    assert log.dropped == 0
