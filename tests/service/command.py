"""The command as a real process, for its tests: run to its end, started, at a terminal, refused."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tests.support import SECONDS_MAX, wait_until

COMMAND = [sys.executable, "-m", "hwpoison"]
PAGE = os.sysconf("SC_PAGE_SIZE")


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
def terminal() -> Iterator[tuple[int, int]]:
    """Our end of a new terminal, and the programs' end."""
    ours, theirs = pty.openpty()
    with closing(os.fdopen(ours, "rb", 0)), closing(os.fdopen(theirs, "rb", 0)):
        yield ours, theirs


@contextmanager
def serving(path: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """`hwpoison serve`, from the moment that it answers."""
    with started("serve", "--socket", path, *arguments) as server:
        wait_until(
            lambda: server.poll() is not None or run("status", "--socket", path).returncode != 3, "the manager answers"
        )
        assert server.poll() is None, server.communicate()
        yield server
