"""The command as people and programs use it: real processes, real managers, real terminals."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import hwpoison
from hwpoison.cli import COMMANDS, main
from hwpoison.core.records import Event
from hwpoison.service.eventlog import EventLog
from tests.support import SECONDS_MAX, need, wait_until

COMMAND = [sys.executable, "-m", "hwpoison"]
NOBODY = 65534
PAGE = os.sysconf("SC_PAGE_SIZE")

live = pytest.mark.live


@pytest.fixture(autouse=True)
def log_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every process of a test logs to a file of the test's own, and finds no manager of somebody else."""
    path = tmp_path / "events.db"
    monkeypatch.setenv("HWPOISON_LOG", str(path))
    monkeypatch.delenv("HWPOISON_SOCKET", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return path


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Iterator[hwpoison.Manager]:
    """A manager that commands find by themselves."""
    with hwpoison.Manager() as manager:
        monkeypatch.setenv("HWPOISON_SOCKET", manager.socket)
        yield manager


@pytest.fixture
def table(manager: hwpoison.Manager) -> hwpoison.Memory:
    """Sixteen pages, of which the first two hold data."""
    table = manager.allocate(16 * PAGE, name="table")
    table.write(0, b"x" * (2 * PAGE))
    return table


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=SECONDS_MAX, check=False, **options
    )


def document(*arguments: object, status: int = 0) -> dict[str, Any]:
    """What a command prints with --json."""
    ended = run(*arguments, "--json")
    assert (ended.returncode, ended.stderr) == (status, "")
    found = json.loads(ended.stdout)
    assert found.pop("version") == 1
    assert isinstance(found, dict)
    return found


def assert_refused(ended: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """It says why in one line on standard error, and nothing else."""
    assert ended.returncode == status
    assert ended.stdout == ""
    assert ended.stderr.startswith("hwpoison")
    assert ended.stderr.count("\n") == 1
    for word in words:
        assert word in ended.stderr


@contextmanager
def started(*arguments: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A command that goes on, with pipes; killed at the end, or when it takes too long, if it is still there."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    with subprocess.Popen([*COMMAND, *map(str, arguments)], text=True, **options) as process, bounded(process):
        yield process


@contextmanager
def bounded(process: subprocess.Popen[str]) -> Iterator[None]:
    """So that reading from a process that has hung ends."""
    watchdog = threading.Timer(SECONDS_MAX, process.kill)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()
        watchdog.join()
        process.kill()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    root = os.geteuid() == 0
    if root:
        os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        if root:
            os.setresuid(0, 0, 0)


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """Our end of a new terminal, and the programs' end."""
    ours, theirs = pty.openpty()
    with closing(os.fdopen(ours, "rb", 0)), closing(os.fdopen(theirs, "rb", 0)):
        yield ours, theirs


# --- help and errors


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
        (("report", "--name", "t"), ("name one page",)),
        (("report", "--pid", "1"), ("name one page",)),
        (("report", "--pfn", "1", "--physical", "4096"), ("name one page",)),
        (("run",), ("Missing argument 'COMMAND...'",)),
        (("run", "--memory-limit", "512MB", "--", "true"), ("'512MB' is no size", "512M or 2GiB")),
        (("run", "--memory-limit", "0", "--", "true"), ("is no size that memory can have",)),
        (("serve",), ("--socket",)),
        (("log", "--limit", "0"), ("--limit",)),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_refused(run(*arguments), 2, *words)


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


def test_a_manager_that_talks_nonsense_or_hangs_up_is_status_3(tmp_path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as other:
        other.bind(str(tmp_path / "other"))
        other.listen()
        for answer in (b"nonsense", b""):
            with started("status", "--socket", tmp_path / "other") as asking:
                channel, _ = other.accept()
                with channel:
                    channel.recv(1 << 16)
                    if answer:
                        channel.send(answer)
                output, errors = asking.communicate(timeout=SECONDS_MAX)
                assert (asking.returncode, output, errors.count("\n")) == (3, "", 1)


# --- asking a manager


@live
def test_status_is_fine_until_bytes_are_lost(manager: hwpoison.Manager, table: hwpoison.Memory) -> None:
    before = document("status")
    assert (before["pid"], before["socket"]) == (manager.pid, manager.socket)
    assert (before["lost"], before["objects"], before["outcomes"]) == (0, 1, {})

    manager.inject(table, 0)
    after = document("status", status=1)
    assert (after["lost"], after["quarantined"]) == (PAGE, PAGE)
    assert (after["outcomes"], after["states"]) == ({"Recovered": 1}, {"anonymous page": 1})
    ended = run("status")
    assert ended.returncode == 1
    assert re.search(r"^Failures +1 Recovered *$", ended.stdout, re.MULTILINE)
    assert re.search(rf"^Lost +{PAGE // 1024} KiB *$", ended.stdout, re.MULTILINE)

    table.discard(0, PAGE)
    assert document("status")["lost"] == 0


@live
def test_objects_lists_each_object_with_its_bytes_and_processes(manager: hwpoison.Manager, table: hwpoison.Memory) -> None:
    expected = {"name": "table", "kind": "anonymous", "nbytes": 16 * PAGE, "lost": 0, "pids": [os.getpid()]}
    (found,) = document("objects")["objects"]
    assert {key: found[key] for key in expected} == expected

    manager.inject(table, 0)
    ended = run("objects")
    assert ended.returncode == 1
    headings, row = (re.split("  +", line.strip()) for line in ended.stdout.splitlines())
    shown = dict(zip(headings, row, strict=True))
    size = f"{16 * PAGE // 1024} KiB"
    assert (shown["NAME"], shown["SIZE"], shown["LOST"]) == ("table", size, f"{PAGE // 1024} KiB")


@live
def test_a_manager_without_objects_says_so(manager: hwpoison.Manager) -> None:
    ended = run("objects")

    assert (ended.returncode, ended.stdout) == (0, "The manager owns no memory now.\n")
    assert document("objects") == {"objects": []}


@live
def test_a_name_cannot_act_on_the_terminal(manager: hwpoison.Manager) -> None:
    manager.allocate(PAGE, name="\x1b[31mred\nline")

    ended = run("objects")

    assert r"\x1b[31mred\nline" in ended.stdout
    assert "\x1b" not in ended.stdout


# --- failures


@live
def test_inject_prints_the_kernels_line_with_the_id_of_its_events(table: hwpoison.Memory) -> None:
    ended = run("inject", "table", hex(PAGE))

    assert ended.returncode == 1, "data was lost"
    line, victims = ended.stdout.splitlines()
    pattern = rf"Memory failure: table\+{PAGE:#x}: recovery action for anonymous page: Recovered \[(\S+)\]"
    found = re.fullmatch(pattern, line)
    assert found is not None
    assert victims == f"Data lost in process {os.getpid()}"
    logged = run("log", "--event", found[1], "--json").stdout.splitlines()
    assert {json.loads(one)["kind"] for one in logged} >= {"report", "outcome", "victim"}
    assert table.lost() == [("table", PAGE, PAGE)]


@live
def test_inject_into_a_free_page_finds_nothing(table: hwpoison.Memory) -> None:
    failure = document("inject", "table", 8 * PAGE)

    assert (failure["state"], failure["outcome"], failure["victims"]) == ("free page", "Recovered", [])
    assert failure["latency_us"] > 0


@live
def test_inject_passes_on_that_action_is_required(table: hwpoison.Memory) -> None:
    event_id = document("inject", "table", 0, "--action-required", status=1)["event_id"]

    logged = json.loads(run("log", "--event", event_id, "--json").stdout.splitlines()[0])
    assert (logged["kind"], logged["detail"]) == ("report", "injected, action required")


@live
@pytest.mark.parametrize(
    ("name", "offset", "word"), [("nothing", 0, "no object 'nothing'"), ("table", 16 * PAGE, "not within 'table'")]
)
def test_inject_into_what_does_not_exist_is_status_2(table: hwpoison.Memory, name: str, offset: int, word: str) -> None:
    assert_refused(run("inject", name, offset), 2, word)


@live
def test_a_page_is_reported_by_name_or_by_process_and_address(table: hwpoison.Memory) -> None:
    by_name = document("report", "--name", "table", "--offset", 0, "--source", "a scan", status=1)
    by_address = document("report", "--pid", os.getpid(), "--address", hex(table.address + PAGE), status=1)

    assert [(one["name"], one["offset"], one["victims"]) for one in (by_name, by_address)] == [
        ("table", 0, [os.getpid()]),
        ("table", PAGE, [os.getpid()]),
    ]
    logged = json.loads(run("log", "--event", by_name["event_id"], "--json").stdout.splitlines()[0])
    assert logged["detail"] == "a scan, action optional"


@live
def test_a_page_is_reported_by_frame_or_physical_address(table: hwpoison.Memory) -> None:
    need(os.geteuid() == 0, "root, who may see page frame numbers")

    def frame(page: int) -> int:
        assert table.buffer[page * PAGE] == ord("x")
        with Path("/proc/self/pagemap").open("rb") as pagemap:
            pagemap.seek((table.address // PAGE + page) * 8)
            return int.from_bytes(pagemap.read(8), "little") & ((1 << 55) - 1)

    first, second = frame(0), frame(1)
    by_frame = document("report", "--pfn", first, status=1)
    ended = run("report", "--physical", hex(second * PAGE + 100))

    assert (by_frame["name"], by_frame["offset"]) == ("table", 0)
    assert ended.stdout.startswith(f"Memory failure: {second:#x}: recovery action for anonymous page: Recovered [")
    assert table.lost() == [("table", 0, 2 * PAGE)]


@live
def test_a_frame_that_belongs_to_nobody_here_is_ignored_and_no_finding(table: hwpoison.Memory) -> None:
    failure = document("report", "--pid", 1, "--address", "0x1000")

    assert (failure["state"], failure["outcome"]) == ("unknown page", "Ignored")


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


def test_log_selects_by_event_and_shows_the_last(log_path: Path) -> None:
    write_log(log_path, 1, 2, 3)

    assert [line.split()[-1] for line in run("log", "--limit", 2).stdout.splitlines()] == ["2", "3"]
    assert [line.split()[2] for line in run("log", "--event", "i-2").stdout.splitlines()] == ["i-2"]
    assert run("log", "--event", "i-9").stdout == ""


def test_log_without_a_log_says_where_it_looked(tmp_path: Path) -> None:
    assert_refused(run("log"), 2, "there is no event log at", "events.db")
    assert_refused(run("log", "--path", tmp_path), 2, str(tmp_path), "is no file")
    (tmp_path / "text").write_text("no database" * 100)
    assert_refused(run("log", "--path", tmp_path / "text"), 2, "is no event log")


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
    # An event that is not the log's first tells that the process is waiting already; the log itself is not there.
    with started("log", "--follow") as following:
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


# --- a manager for the life of a command


@live
@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 128 + 9), ("kill -TERM $$", 128 + 15)]
)
def test_run_ends_with_the_status_of_its_command(script: str, status: int) -> None:
    ended = run("run", "--", "sh", "-c", script)

    assert (ended.returncode, ended.stdout, ended.stderr) == (status, "", "")


@live
def test_run_says_as_shells_do_that_a_command_cannot_be_run(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")

    assert_refused(run("run", "no-such-command"), 127, "no-such-command: command not found")
    assert_refused(run("run", tmp_path / "text"), 126, "Permission denied")
    assert_refused(run("run", tmp_path), 126, "Permission denied")


@live
def test_run_gives_its_command_a_manager_that_ends_with_it() -> None:
    script = """if True:
        import os, hwpoison
        with hwpoison.connect() as manager:
            memory = manager.allocate(1 << 20, name="t")
            memory.write(0, b"kept")
            assert memory.read(0, 4) == b"kept"
            print(os.environ["HWPOISON_SOCKET"], manager.statistics().memory_limit)
    """
    ended = run("run", "--memory-limit", "2MiB", "--", sys.executable, "-c", script)

    assert (ended.returncode, ended.stderr) == (0, "")
    address, memory_limit = ended.stdout.split()
    assert int(memory_limit) == 2 << 20
    assert_refused(run("status", "--socket", address), 3, "no manager answers")


SIGNALLED = """if True:
    # Tells each signal, to the last, which is named by the argument.
    import signal, sys
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
    numbers = {signal.Signals[name] for name in names}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    signal.alarm(60)
    print("ready", flush=True)
    name = ""
    while name != sys.argv[1]:
        name = signal.Signals(signal.sigwait(numbers)).name
        print(name, flush=True)
"""


@live
def test_run_passes_signals_on() -> None:
    with started("run", "--", sys.executable, "-c", SIGNALLED, "SIGUSR2") as running:
        assert next_line(running) == "ready"
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"):
            running.send_signal(signal.Signals[name])
            assert next_line(running) == name
        assert running.wait(SECONDS_MAX) == 0


@live
def test_run_leaves_no_signal_blocked_or_ignored_in_its_command() -> None:
    def masks(prefix: list[str]) -> list[int]:
        """Of the signals that programs know; above are those of the C library."""
        command = [*prefix, "grep", "^Sig[BI]", "/proc/self/status"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_MAX, check=True).stdout
        return [int(line.split()[1], 16) & 0x7FFF_FFFF for line in shown.splitlines()]

    assert masks([*COMMAND, "run", "--"]) == masks([])


SHELL = """if True:
    # The least of a shell: a terminal of its own, and one job in the foreground.
    import fcntl, os, signal, sys, termios
    os.setsid()
    terminal = int(sys.argv[1])
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    job = os.fork()
    if job == 0:
        os.setpgid(0, 0)
        os.tcsetpgrp(terminal, os.getpid())
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, "-m", "hwpoison", "run", "--", *sys.argv[2:]])
    while True:
        _, status = os.waitpid(job, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            sys.exit(os.waitstatus_to_exitcode(status))
        print("stopped", flush=True)
        os.killpg(job, signal.SIGCONT)
"""


@live
def test_what_is_typed_at_a_terminal_reaches_the_command_once() -> None:
    with terminal() as (ours, theirs):
        command = [sys.executable, "-c", SHELL, str(theirs), sys.executable, "-c", SIGNALLED, "SIGQUIT"]
        with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, pass_fds=[theirs]) as shell, bounded(shell):
            assert next_line(shell) == "ready"
            for key, answer in ((b"\x03", "SIGINT"), (b"\x1a", "stopped"), (b"\x1c", "SIGQUIT"), (b"", "")):
                os.write(ours, key)
                assert next_line(shell) == answer
            assert shell.wait(SECONDS_MAX) == 0


# --- a manager that is shared


@contextmanager
def serving(path: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """`hwpoison serve`, from the moment that it answers."""
    with started("serve", "--socket", path, *arguments) as server:
        wait_until(
            lambda: server.poll() is not None or run("status", "--socket", path).returncode != 3, "the manager answers"
        )
        assert server.poll() is None, server.communicate()
        yield server


@live
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_serves_until_it_is_told_to_end(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "socket"
    with serving(path, "--memory-limit", "1GiB") as server:
        found = document("status", "--socket", path)
        assert (found["socket"], found["memory_limit"], found["pid"]) == (str(path), 1 << 30, server.pid)

        server.send_signal(number)

        assert server.wait(SECONDS_MAX) == 0
    assert not path.exists()


@live
def test_serve_refuses_a_place_that_is_taken(tmp_path: Path) -> None:
    with serving(tmp_path / "socket"):
        assert_refused(run("serve", "--socket", tmp_path / "socket"), 2, "a manager serves at", "already")
        assert document("status", "--socket", tmp_path / "socket")["clients"] == 0
    (tmp_path / "file").touch()
    assert_refused(run("serve", "--socket", tmp_path / "file"), 2, "is no socket")
    assert_refused(run("serve", "--socket", tmp_path / "none" / "socket"), 2, "No such file or directory")
    assert_refused(run("serve", "--socket", "/" + "x" * 200), 2, "at most 107 bytes")


def test_offline_foreign_is_for_root(capsys: pytest.CaptureFixture[str]) -> None:
    # In this process, and imported before: another user may not be able to read the interpreter or this checkout.
    import_module(COMMANDS["serve"].where.split(":")[0])
    with as_ordinary_user():
        status = main(["serve", "--socket", "@x", "--offline-foreign"])

    assert status == 2
    assert "hwpoison serve: --offline-foreign needs root" in capsys.readouterr().err


@live
def test_a_manager_that_goes_away_while_it_is_asked_is_status_3(tmp_path: Path) -> None:
    with serving(tmp_path / "socket") as server:
        server.send_signal(signal.SIGSTOP)
        with started("status", "--socket", tmp_path / "socket") as asking:
            wait_until(lambda: has_socket(asking), "the command has connected")
            server.kill()
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
