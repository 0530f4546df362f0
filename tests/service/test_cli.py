"""What all commands share: help, wrong usage, the way to a manager, colours."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import pytest

from hwpoison.app.manager import CONNECT_ATTEMPTS
from hwpoison.cli import COMMANDS
from hwpoison.core.records import Event
from hwpoison.service.eventlog import EventLog
from tests.live.process import kill_service, manager_of
from tests.service.command import COMMAND, assert_refused, run, serving, started, terminal
from tests.support import SECONDS_MAX, wait_until

pytestmark = pytest.mark.usefixtures("log_path")
live = pytest.mark.live


def test_the_help_names_every_command() -> None:
    ended = run("--help")

    assert ended.returncode == 0
    for name, place in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(place.summary[:30])}", ended.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_has_an_example(name: str) -> None:
    ended = run(name, "--help")

    assert ended.returncode == 0
    assert re.search(rf"^  Examples?:\n    hwpoison {name}\b", ended.stdout, re.MULTILINE)


def test_a_command_loads_nothing_heavy_before_it_runs() -> None:
    """It answers quickly, and no thread of a library is there to take the signals that `hwpoison run` waits for."""
    script = "import sys, hwpoison.cli; print(sorted({'numpy', 'rich', 'msgspec', 'asyncio'} & set(sys.modules)))"

    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_no_command_at_all_is_wrong_usage_and_shows_the_help() -> None:
    ended = run()

    assert (ended.returncode, ended.stdout) == (2, "")
    assert "Usage: hwpoison" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nonsense",), ("No such command 'nonsense'", "hwpoison --help")),
        (("status", "--nonsense"), ("--nonsense", "hwpoison status --help")),
        (("inject", "t"), ("Missing argument 'OFFSET'",)),
        (("inject", "t", "12q"), ("'12q' is no number", "hexadecimal with 0x")),
        (("inject", "t", "--", "-1"), ("is not between 0 and",)),
        (("report", "--pfn", str(1 << 64)), ("is not between 0 and",)),
        (("report",), ("name one page",)),
        (("report", "--name", "t"), ("--name needs --offset",)),
        (("report", "--address", "1"), ("--address needs --pid",)),
        (("report", "--pfn", "1", "--physical", "4096"), ("name one page",)),
        (("report", "--pfn", "1", "--source", "injected"), ("use `hwpoison inject NAME OFFSET`",)),
        (("run",), ("Missing argument 'COMMAND...'",)),
        (("run", "--memory-limit", "512MB", "--", "true"), ("'512MB' is no size", "512M or 2GiB")),
        (("run", "--memory-limit", "0", "--", "true"), ("is no size that memory can have",)),
        (("serve",), ("Missing option '--socket'", "or set HWPOISON_SOCKET")),
        (("log", "--limit", "0"), ("--limit",)),
        (("log", "--limit", "1", "--all"), ("--all and --limit",)),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_refused(run(*arguments), 2, *words)


# --- no manager

QUESTIONS = [("status",), ("objects",), ("inject", "t", "0"), ("report", "--pfn", "1")]


@pytest.mark.parametrize("arguments", QUESTIONS, ids=lambda arguments: arguments[0])
def test_without_a_manager_the_status_is_3_and_the_line_says_how_to_start_one(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    start = ("hwpoison serve --socket PATH", "hwpoison run -- COMMAND")
    assert_refused(run(*arguments), 3, "--socket or $HWPOISON_SOCKET", *start)
    assert_refused(run(*arguments, "--socket", tmp_path / "none"), 3, "none: No such file or directory", *start)


def test_a_socket_that_is_no_managers_is_status_3(tmp_path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as other:
        other.bind(str(tmp_path / "other"))
        other.listen()
        assert_refused(run("status", "--socket", tmp_path / "other"), 3, "no manager answers")


def test_a_socket_that_its_manager_has_left_behind_and_a_file_that_is_none_are_told_apart(tmp_path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as stale:
        stale.bind(str(tmp_path / "stale"))

    assert_refused(run("status", "--socket", tmp_path / "stale"), 3, "the manager that made this socket has ended")
    assert_refused(run("status", "--socket", tmp_path), 3, "it is no socket")


def test_a_socket_path_that_nobody_can_serve_at_is_wrong_input(tmp_path: Path) -> None:
    assert_refused(run("status", "--socket", tmp_path / ("x" * 108)), 2, "at most 107 bytes")


def test_a_manager_that_talks_nonsense_or_hangs_up_is_status_3(tmp_path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as other:
        other.bind(str(tmp_path / "other"))
        other.listen()
        # Who hangs up at once may have died, and is asked again.
        for answer, times in ((b"nonsense", 1), (b"", CONNECT_ATTEMPTS)):
            with started("status", "--socket", tmp_path / "other") as asking:
                for _ in range(times):
                    channel, _ = other.accept()
                    with channel:
                        channel.recv(1 << 16)
                        if answer:
                            channel.send(answer)
                output, errors = asking.communicate(timeout=SECONDS_MAX)
                assert (asking.returncode, output, errors.count("\n")) == (3, "", 1)


@live
def test_a_manager_that_goes_away_while_it_is_asked_is_status_3(tmp_path: Path) -> None:
    with serving(tmp_path / "socket") as server:
        os.kill(manager_of(server.pid), signal.SIGSTOP)
        with started("status", "--socket", tmp_path / "socket") as asking:
            wait_until(lambda: has_socket(asking), "the command has connected")
            kill_service(server.pid)
            server.wait(SECONDS_MAX)
            output, errors = asking.communicate(timeout=SECONDS_MAX)

    assert (asking.returncode, output, errors.count("\n")) == (3, "", 1)
    assert "hwpoison serve --socket PATH" in errors


def has_socket(process: subprocess.Popen[str]) -> bool:
    assert process.poll() is None
    # What is listed may be closed by the time that it is looked at.
    with suppress(FileNotFoundError):
        return any(os.readlink(one).startswith("socket:") for one in Path(f"/proc/{process.pid}/fd").iterdir())
    return False


# --- colours


@pytest.mark.parametrize(("variables", "expected"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colours_are_for_terminals_that_want_them(log_path: Path, variables: dict[str, str], expected: bool) -> None:
    log = EventLog(log_path, "i")
    log.add(Event(kind="outcome", outcome="Failed"))
    log.close()
    with terminal() as (ours, theirs):
        environment = os.environ | {"TERM": "xterm"} | variables
        subprocess.run([*COMMAND, "log"], stdout=theirs, env=environment, timeout=SECONDS_MAX, check=True)
        assert (b"\x1b[31m" in os.read(ours, 1 << 16)) is expected

    assert "\x1b" not in run("log").stdout


@pytest.mark.parametrize("arguments", [("doctor",), ("log",)], ids=lambda arguments: arguments[0])
def test_an_encoding_without_our_marks_costs_the_marks_and_nothing_else(log_path: Path, arguments: tuple[str, ...]) -> None:
    log = EventLog(log_path, "i")
    log.add(Event(kind="report", name="ü"))
    log.close()

    ended = run(*arguments, env=os.environ | {"PYTHONIOENCODING": "ascii"})

    assert ended.stderr == ""
    assert re.search(r"\\u2713|\\xfc", ended.stdout)
