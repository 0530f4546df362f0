"""The keeper: it starts managers, and is replaced when it dies; who is told to end, ends."""

from __future__ import annotations

import os
import resource
import select
import signal
from pathlib import Path

import pytest

import hwpoison
from hwpoison.linux.syscalls import PAGE_SIZE
from tests.live.process import (
    Child,
    commands,
    keeper_of,
    kill,
    manager_of,
    page,
    pending,
    serving,
    state_of,
    stop,
)
from tests.support import SECONDS_MAX, wait_until

pytestmark = pytest.mark.live

PAGE = PAGE_SIZE


def test_a_keeper_that_dies_is_replaced_and_the_next_one_keeps_everything(root: None, manager: hwpoison.Manager) -> None:
    table = manager.allocate(4 * PAGE, name="table")
    table.write(0, page("t"))
    manager.report(table, 0)
    served = manager.pid
    kill(keeper_of(served))
    wait_until(lambda: any("--adopt" in one for one in commands(served)), "another keeper is there")
    assert table.read(PAGE, 1) == b"\0"
    assert manager.pid == served
    assert manager.statistics().pid == served
    kill(served)
    assert manager.statistics().quarantined == PAGE
    assert [(one.offset, one.nbytes) for one in table.lost()] == [(0, PAGE)]
    assert manager.pid != served


def test_a_keeper_that_can_not_be_replaced_at_once_is_replaced_when_it_can_be() -> None:
    code = """
manager = hwpoison.Manager()
table = manager.allocate(1 << 20, name="table")
table.write(0, b"t")
say(manager.pid)
hear()
try:
    manager.restart()
except OSError as error:
    say(str(error))
hear()
say([manager.statistics().restarts, table.read(0, 1).decode(), table.buffer[1 << 19]])
"""
    with Child(code) as client:
        pid = client.hear()
        _, most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, most))
        kill(keeper_of(pid))
        assert "the keeper has died, and there is no other one yet" in client.ask()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, most))
        wait_until(lambda: any("--adopt" in one for one in commands(pid)), "another keeper is there")
        kill(pid)
        assert client.ask() == [1, "t", 0]
        assert client.wait() == 0
        assert "no keeper can be started now" in client.errors
        assert "there is a keeper again" in client.errors


@pytest.mark.parametrize("who", ["private", "shared"])
def test_that_whoever_starts_it_ignores_the_ends_of_its_children_makes_no_difference(who: str, tmp_path: Path) -> None:
    code = """
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
if arguments[0] == "shared":
    import subprocess
    service = subprocess.Popen([sys.executable, "-m", "hwpoison", "serve", "--socket", arguments[1]], stderr=subprocess.PIPE)
    service.stderr.readline()
    manager = hwpoison.connect(arguments[1])
else:
    manager = hwpoison.Manager()
table = manager.allocate(1 << 20, name="table")
table.write(0, b"t")
for number in range(2):
    os.kill(manager.statistics().pid, signal.SIGKILL)
    said = [manager.statistics().restarts, table.read(0, 1).decode(), table.buffer[1 << 19]]
before = manager.pid
said.append(manager.restart() != before)
say([*said, table.read(0, 1).decode()])
table.close()
manager.close()
if arguments[0] == "shared":
    service.terminate()
    service.stderr.read()
"""
    with Child(code, who, str(tmp_path / "socket")) as client:
        assert client.hear() == [2, "t", 0, True, "t"]
        assert client.wait() == 0, client.errors


def test_a_keeper_that_was_stopped_is_continued_before_it_misses_anything(manager: hwpoison.Manager) -> None:
    keeper = keeper_of(manager.pid)
    stop(keeper)
    memories = []
    # Until its socket is full: then it is continued, which has the manager wait for a second.
    while state_of(keeper) == "T":
        memories.append(manager.allocate(PAGE, name=f"table {len(memories)}"))
        memories[-1].write(0, page("t"))
        assert len(memories) < 5_000
    assert len(memories) > 10
    kill(manager)
    assert all(one.read(0, PAGE) == page("t") for one in memories)


def test_a_private_manager_that_is_killed_when_nobody_is_left_is_not_followed_for_long() -> None:
    with Child("manager = hwpoison.Manager()\nsay(manager.pid)\nhear()\n") as client:
        pid = client.hear()
        keeper = os.pidfd_open(keeper_of(pid))
        stop(pid)
        client.signal(signal.SIGKILL)
        kill(pid)
        assert select.select([keeper], [], [], SECONDS_MAX)[0], "the keeper stays"
        os.close(keeper)


def test_signals_while_it_ends_do_not_keep_it_from_ending_in_order(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP) * 3:
        with serving(tmp_path / "socket") as server:
            while server.poll() is None:
                server.send_signal(number)
                select.select([], [], [], 0.001)
            assert server.stderr is not None
            assert (server.returncode, server.stderr.read()) == (0, b"")


def test_a_manager_that_was_told_to_end_and_dies_is_followed_by_one_that_ends_too(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serving(path) as server:
        manager = hwpoison.connect(path)
        table = manager.allocate(4 * PAGE, name="table")
        table.write(0, page("t"))
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: not path.exists(), "nobody new is let in")
        kill(manager)
        assert table.read(0, 2 * PAGE) == page("t") + bytes(PAGE)
        table.close()
        manager.close()
        assert server.wait(SECONDS_MAX) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_the_dead_manager_had_no_time_for_is_for_the_next_one(number: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serving(path) as server:
        manager = hwpoison.connect(path)
        pid = manager_of(server.pid)
        stop(server.pid)
        # What it says meanwhile was said before it was sent the signal.
        table = manager.allocate(PAGE, name="table")
        stop(pid)
        server.send_signal(number)
        server.send_signal(signal.SIGCONT)
        wait_until(lambda: pending(pid, number), "the manager was sent it")
        kill(pid)
        wait_until(lambda: not path.exists(), "nobody new is let in")
        assert table.read(0, 1) == b"\0"
        table.close()
        manager.close()
        assert server.wait(SECONDS_MAX) == 0
