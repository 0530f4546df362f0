"""An operator has another manager take over, of the version that is installed by now."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import hwpoison
from hwpoison.linux.syscalls import PAGE_SIZE
from tests.live.process import (
    Child,
    commands,
    kill,
    manager_of,
    page,
    serving,
    state_of,
    stop,
)
from tests.live.slow_files import SlowFile
from tests.support import SECONDS_MAX, wait_until

pytestmark = pytest.mark.live

PAGE = PAGE_SIZE


def test_a_planned_restart_does_not_begin_while_a_file_does_not_answer(
    manager: hwpoison.Manager, slow_file: Callable[[bytes], SlowFile]
) -> None:
    slow = slow_file(page("s") * 4)
    memory, table = manager.open(slow.path), manager.allocate(PAGE, populate=False)
    slow.hold("read")
    waits = threading.Thread(target=memory.prefetch)
    waits.start()
    wait_until(lambda: slow.waiting, "the file is being read")
    pid = manager.pid
    with pytest.raises(OSError, match="no answer for 2 s"):
        manager.restart()
    # It goes on, for the others at once.
    assert table.read(0, 1) == b"\0"
    slow.hold()
    waits.join()
    assert memory.read(0, 1) == b"s"
    assert manager.restart() != pid
    assert memory.read(PAGE, 1) == b"s"


def test_a_planned_restart_keeps_the_process_that_was_started_and_everything_else(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serving(path) as server:
        manager = hwpoison.connect(path)
        table = manager.allocate(4 * PAGE, name="table")
        table.write(0, page("t"))
        before = manager.pid
        done = subprocess.run(
            [sys.executable, "-m", "hwpoison", "restart", "--socket", str(path)], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert str(manager_of(server.pid)) in done.stdout
        assert table.read(0, 2 * PAGE) == page("t") + bytes(PAGE)
        assert manager.statistics().restarts == 1
        assert manager.pid != before
        assert server.poll() is None
        table.close()
        manager.close()
        server.send_signal(signal.SIGTERM)
        assert server.wait(SECONDS_MAX) == 0
    assert not path.exists()


@pytest.mark.parametrize("when", ["while it is checked", "when the keeper is about to execute it"])
def test_who_tells_it_to_end_during_a_restart_is_heard(tmp_path: Path, when: str) -> None:
    path = tmp_path / "socket"
    with serving(path) as server:
        first = manager_of(server.pid)
        asking = subprocess.Popen(
            [sys.executable, "-m", "hwpoison", "restart", "--socket", str(path)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until(lambda: any("--reads-journal" in one for one in commands(first)), "the new version is asked")
        if when == "when the keeper is about to execute it":
            stop(server.pid)
            wait_until(lambda: state_of(first) == "Z", "the manager has made way")
        server.send_signal(signal.SIGTERM)
        os.kill(server.pid, signal.SIGCONT)
        assert server.wait(SECONDS_MAX) == 0
        asking.wait(SECONDS_MAX)
    assert not path.exists()


def test_another_version_that_is_installed_meanwhile_takes_over_at_a_planned_restart_and_at_a_death(tmp_path: Path) -> None:
    """A whole installation of its own, of which files are replaced while it serves."""
    installed = tmp_path / "installed"
    shutil.copytree(Path(hwpoison.__path__[0]), installed / "hwpoison", ignore=shutil.ignore_patterns("__pycache__"))
    server_file = installed / "hwpoison" / "service" / "server.py"
    first = server_file.read_text()
    line = "            memory_limit=self.manager.memory_limit,\n"
    assert first.count(line) == 1
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    path = tmp_path / "socket"
    with serving(path, environment) as server:
        code = """
manager = hwpoison.connect(arguments[0])
table = manager.allocate(1 << 20, "table")
table.write(0, b"t" * (1 << 20))
manager.inject(table, 1 << 16)
say(manager.statistics().memory_limit)
for _ in range(3):
    hear()
    say([manager.statistics().memory_limit, table.buffer[0], bytes(table.read(1 << 19, 2)).decode(), len(table.lost())])
"""
        with Child(code, str(path)) as client:
            assert client.hear() is None
            server_file.write_text(first.replace(line, "            memory_limit=2222,\n"))
            done = subprocess.run(
                [sys.executable, "-m", "hwpoison", "restart", "--socket", str(path)],
                env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert client.ask() == [2222, ord("t"), "tt", 1]
            # The keeper is of the new version too: who comes after a death is.
            kill(manager_of(server.pid))
            assert client.ask() == [2222, ord("t"), "tt", 1]
            # One that can't even start is refused, and what serves goes on.
            server_file.write_text("this is no Python\n")
            done = subprocess.run(
                [sys.executable, "-m", "hwpoison", "restart", "--socket", str(path)],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode != 0
            assert len(done.stderr.splitlines()) == 1, done.stderr
            assert client.ask() == [2222, ord("t"), "tt", 1]
            assert client.wait() == 0, client.errors
