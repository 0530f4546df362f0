"""`hwpoison serve` and `hwpoison run`: managers with a life of their own, or that of a command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path

import pytest

import hwpoison
from hwpoison.cli import COMMANDS, main
from tests.live.process import manager_of, state_of
from tests.service.command import (
    COMMAND,
    PAGE,
    assert_refused,
    bounded,
    document,
    next_line,
    run,
    serving,
    started,
    terminal,
)
from tests.support import SECONDS_MAX, wait_until

pytestmark = pytest.mark.usefixtures("log_path")
live = pytest.mark.live


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
    names = "SIGINT SIGTERM SIGHUP SIGQUIT SIGUSR1 SIGUSR2 SIGALRM SIGWINCH SIGURG SIGIO SIGRTMIN SIGRTMAX".split()
    numbers = {signal.Signals[name] for name in names}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    print("ready", flush=True)
    name = ""
    while name != sys.argv[1]:
        name = signal.Signals(signal.sigtimedwait(numbers, 60).si_signo).name
        print(name, flush=True)
"""


@live
def test_run_passes_signals_on() -> None:
    with started("run", "--", sys.executable, "-c", SIGNALLED, "SIGUSR2") as running:
        assert next_line(running) == "ready"
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGALRM", "SIGWINCH", "SIGURG", "SIGIO",
                     "SIGRTMIN", "SIGRTMAX", "SIGUSR2"):  # fmt: skip
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


STOPPED = """if True:
    # A shell without a terminal, whose job is stopped by its process id alone.
    import os, subprocess, sys
    job = subprocess.Popen([sys.executable, "-m", "hwpoison", "run", "--", *sys.argv[1:]], process_group=0)
    print("job", job.pid, flush=True)
    while True:
        _, status = os.waitpid(job.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            os._exit(os.waitstatus_to_exitcode(status))
        print("stopped", flush=True)
"""


@live
def test_run_stops_and_goes_on_together_with_its_command() -> None:
    script = "import os; print('command', os.getpid(), flush=True)\n" + SIGNALLED
    command = [sys.executable, "-c", STOPPED, sys.executable, "-c", script, "SIGUSR2"]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, start_new_session=True) as shell, bounded(shell):
        try:
            pids = {what: int(pid) for what, pid in (next_line(shell).split() for _ in range(2))}
            assert next_line(shell) == "ready"
            for _ in range(3):
                os.kill(pids["job"], signal.SIGTSTP)
                assert next_line(shell) == "stopped"
                assert (state_of(pids["job"]), state_of(pids["command"])) == ("T", "T")
                os.kill(pids["job"], signal.SIGCONT)
                wait_until(lambda: state_of(pids["command"]) != "T", "the command goes on")
            os.kill(pids["job"], signal.SIGUSR2)
            assert next_line(shell) == "SIGUSR2"
            assert shell.wait(SECONDS_MAX) == 0
        finally:
            for pid in pids.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_run_needs_a_command_that_has_a_name() -> None:
    assert_refused(run("run", ""), 2, "the command's name is empty")


# --- a manager that is shared


@live
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_serves_until_it_is_told_to_end(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "socket"
    with serving(path, "--memory-limit", "1GiB") as server:
        found = document("status", "--socket", path)
        assert (found["socket"], found["memory_limit"]) == (str(path), 1 << 30)
        assert found["pid"] == manager_of(server.pid)

        server.send_signal(number)

        assert server.wait(SECONDS_MAX) == 0
        assert server.stderr is not None
        assert server.stderr.read() == f"hwpoison serve: process {server.pid} serves at {path}\n"
    assert not path.exists()


@live
def test_a_socket_and_an_event_log_may_have_names_that_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    monkeypatch.setenv("HWPOISON_LOG", str(folder / "events.db"))
    with serving(folder / "socket") as server:
        with hwpoison.connect(str(folder / "socket")) as manager:
            memory = manager.allocate(PAGE, "t")
            memory.write(0, b"x")
            event_id = manager.inject(memory, 0).event_id
            assert {event.event_id for event in manager.events() if event.name == "t"} == {event_id}
            found = document("status", "--socket", folder / "socket", status=1)
            assert found["socket"] == str(tmp_path / r"\xff" / "socket")
        server.terminate()
        assert server.wait(SECONDS_MAX) == 0


@pytest.mark.parametrize("limit", [0, PAGE - 1, 1 << 63, 1 << 70])
def test_a_memory_limit_that_no_memory_can_have_is_refused_at_once(limit: int) -> None:
    with pytest.raises(ValueError, match="memory_limit is in bytes"):
        hwpoison.Manager(memory_limit=limit)


@live
def test_serve_refuses_a_place_that_is_taken(tmp_path: Path) -> None:
    with serving(tmp_path / "socket"):
        assert_refused(run("serve", "--socket", tmp_path / "socket"), 2, "a manager serves at", "already")
        assert document("status", "--socket", tmp_path / "socket")["clients"] == 0
    (tmp_path / "file").touch()
    assert_refused(run("serve", "--socket", tmp_path / "file"), 2, "is no socket")
    assert_refused(run("serve", "--socket", tmp_path / "none" / "socket"), 2, "there is no folder", str(tmp_path / "none"))
    assert_refused(run("serve", "--socket", "/" + "x" * 200), 2, "at most 107 bytes")


def test_offline_foreign_is_for_root(capsys: pytest.CaptureFixture[str]) -> None:
    # In this process, and imported before: another user may not be able to read the interpreter or this checkout.
    import_module(COMMANDS["serve"].where.split(":")[0])
    with as_ordinary_user():
        status = main(["serve", "--socket", "@x", "--offline-foreign"])

    assert status == 2
    assert "hwpoison serve: --offline-foreign needs root" in capsys.readouterr().err


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    root = os.geteuid() == 0
    if root:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if root:
            os.setresuid(0, 0, 0)
