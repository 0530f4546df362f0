"""`hwpoison log`: the event log as people and programs read it."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import sqlite3
import subprocess
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hwpoison.core.records import Event
from hwpoison.service.eventlog import EventLog
from tests.service.command import COMMAND, assert_refused, next_line, run, started, terminal
from tests.support import SECONDS_MAX

pytestmark = pytest.mark.usefixtures("log_path")
live = pytest.mark.live


# --- the log


def write_log(path: Path, *details: object) -> None:
    log = EventLog(path, "i")
    for detail in details:
        log.add(Event(kind="report", event_id=f"i-{detail}", name="t", offset=4096, nbytes=1, detail=str(detail)))
    log.close()
    assert log.dropped == 0


def test_log_prints_one_object_a_line_with_its_time_in_utc(log_path: Path) -> None:
    before = datetime.now(UTC)
    write_log(log_path, 1, 2)

    ended = run("log", "--json")

    assert (ended.returncode, ended.stderr) == (0, "")
    first, second = (json.loads(line) for line in ended.stdout.splitlines())
    time_of_event = first.pop("time")
    assert first == {
        "version": 1, "id": 1, "instance": "i", "kind": "report", "event_id": "i-1", "name": "t", "offset": 4096,
        "nbytes": 1, "state": "", "outcome": "", "pid": 0, "detail": "1",
    }  # fmt: skip
    assert second["event_id"] == "i-2"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", time_of_event)
    assert abs(datetime.fromisoformat(time_of_event) - before).total_seconds() < SECONDS_MAX


@pytest.mark.parametrize("arguments", [[], ["--json"], ["--follow"]])
def test_a_log_that_nobody_can_read_is_an_error(log_path: Path, arguments: list[str]) -> None:
    write_log(log_path, 1)

    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, "log", *arguments]
    ended = subprocess.run(closed, stderr=subprocess.PIPE, text=True, timeout=SECONDS_MAX, check=False)

    assert ended.returncode == 2
    assert ended.stderr.startswith("hwpoison log: standard output is closed")
    assert ended.stderr.count("\n") == 1


def test_log_selects_by_event_and_shows_the_last(log_path: Path) -> None:
    write_log(log_path, 1, 2, 3)

    assert [line.split()[-1] for line in run("log", "--limit", 2).stdout.splitlines()] == ["2", "3"]
    assert [line.split()[2] for line in run("log", "--event", "i-2").stdout.splitlines()] == ["i-2"]
    assert_refused(run("log", "--event", "i-9"), 2, str(log_path), "'i-9'")
    assert_refused(run("log", "--event", "i-9", "--json"), 2, "'i-9'")


def test_log_selects_by_the_name_of_an_object(log_path: Path) -> None:
    log = EventLog(log_path, "i")
    for name in ("one", "other", "one"):
        log.add(Event(kind="report", name=name))
    log.close()

    assert [json.loads(line)["id"] for line in run("log", "--name", "one", "--json").stdout.splitlines()] == [1, 3]
    assert_refused(run("log", "--name", "none"), 2, str(log_path), "has the name 'none'")


@pytest.mark.parametrize(
    ("arguments", "first"), [((), 10), (("--all",), 0), (("--limit", "2"), 58), (("--json",), 0), (("--event", "i-7"), 7)]
)
def test_on_a_terminal_the_last_events_are_shown_unless_others_are_asked_for(
    log_path: Path, arguments: tuple[str, ...], first: int
) -> None:
    write_log(log_path, *range(60))
    with terminal() as (ours, theirs):
        with started("log", *arguments, stdout=theirs) as reading:
            shown = b""
            while select.select([ours], [], [], 0.01)[0] or reading.poll() is None:
                if select.select([ours], [], [], 0)[0]:
                    shown += os.read(ours, 1 << 16)
            assert reading.stderr is not None
            hint = reading.stderr.read()

    assert re.search(rf"i-{first}\b", shown.decode().splitlines()[0])
    assert hint == ("" if arguments else "hwpoison log: these are the last 50 events; --all shows all\n")


def test_log_shows_one_byte_as_one(log_path: Path) -> None:
    write_log(log_path, 1)

    assert "  t+0x1000  1 byte  1\n" in run("log").stdout


def test_log_without_a_log_says_where_it_looked(tmp_path: Path) -> None:
    assert_refused(run("log"), 2, "there is no event log at", "events.db")
    assert_refused(run("log", "--path", tmp_path), 2, str(tmp_path), "is no file")
    (tmp_path / "text").write_text("no database" * 100)
    assert_refused(run("log", "--path", tmp_path / "text"), 2, "is no event log")


def test_follow_does_not_wait_for_a_log_that_is_damaged_or_of_another_version(tmp_path: Path) -> None:
    newer, damaged = tmp_path / "newer.db", tmp_path / "damaged.db"
    for path in (newer, damaged):
        write_log(path, *range(200))
    with closing(sqlite3.connect(newer)) as connection:
        connection.execute("PRAGMA user_version = 9")
    content = damaged.read_bytes()
    damaged.write_bytes(content[:4096] + b"x" * (len(content) - 4096))

    assert_refused(run("log", "--follow", "--path", newer), 2, str(newer), "of version 9", "move the file away")
    assert_refused(run("log", "--follow", "--path", damaged), 2, str(damaged), "a damaged one", "move it away")


def test_a_reader_that_has_read_enough_of_the_log_is_no_error(log_path: Path) -> None:
    write_log(log_path, *range(5000))

    with started("log") as reading:
        assert next_line(reading).endswith("  0")
        assert reading.stdout is not None
        reading.stdout.close()
        assert reading.stderr is not None
        assert reading.stderr.read() == ""
        assert reading.wait(SECONDS_MAX) == 0


def test_follow_shows_what_comes_and_ends_with_ctrl_c(log_path: Path) -> None:
    write_log(log_path, 1, 2)
    with started("log", "--follow", "--json", "--limit", "1") as following:
        assert json.loads(next_line(following))["detail"] == "2"
        write_log(log_path, 3, 4)
        assert [json.loads(next_line(following))["detail"] for _ in range(2)] == ["3", "4"]

        following.send_signal(signal.SIGINT)

        assert following.communicate(timeout=SECONDS_MAX) == ("", "")
        assert following.returncode == 0


def test_follow_waits_for_a_log_that_does_not_exist_yet_and_for_a_new_one_after_it(log_path: Path) -> None:
    with started("log", "--follow") as following:
        assert following.stderr is not None
        assert following.stderr.readline() == f"hwpoison log: there is no event log at {log_path} yet; waiting for it\n"
        write_log(log_path, 1)
        assert next_line(following).endswith("  1")
        for one in log_path.parent.glob("events.db*"):
            one.unlink()
        write_log(log_path, 2)
        assert next_line(following).endswith("  2")


def test_follow_ends_when_nobody_reads_any_more(log_path: Path) -> None:
    write_log(log_path, 1)
    with started("log", "--follow") as following:
        assert next_line(following).endswith("  1")
        assert following.stdout is not None
        following.stdout.close()

        assert following.wait(SECONDS_MAX) == 0
        assert following.stderr is not None
        assert following.stderr.read() == ""
