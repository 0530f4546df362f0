"""Other processes, for the tests: each runs a few lines of Python and talks in lines of JSON."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import hwpoison
from hwpoison.linux.syscalls import PAGE_SIZE
from tests.support import SECONDS_MAX, wait_until

_PRELUDE = """
import json, mmap, os, signal, sys, threading, time
import numpy
import hwpoison

def say(value=None):
    print(json.dumps(value), flush=True)

def hear():
    return json.loads(sys.stdin.readline())

arguments = json.loads(sys.argv[1])
"""


class Child:
    """A process that runs `code`, in which `say`, `hear` and `arguments` are there, and numpy and hwpoison.

    It is killed and reaped at the end of the `with` block, if it has not ended by then.
    """

    def __init__(self, code: str, *arguments: Any, user: int | None = None, directory: Path | None = None) -> None:
        other: dict[str, Any] = {} if user is None else {"user": user, "group": user, "extra_groups": []}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PRELUDE + code, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=directory,
            process_group=0,
            **other,
        )
        self.pid = self._process.pid
        self.errors = ""

    def tell(self, value: Any = None) -> None:
        """What `hear` returns there."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value).encode() + b"\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        """What it says next. Fails if it ends or says nothing."""
        line = b""
        while not line.endswith(b"\n"):
            assert select.select([self.output], [], [], SECONDS_MAX)[0], f"process {self.pid} says nothing: it hangs"
            byte = os.read(self.output, 1)
            assert byte, f"the process ended with status {self.wait()}: {self.errors}"
            line += byte
        return json.loads(line)

    def ask(self, value: Any = None) -> Any:
        """Tell and hear."""
        self.tell(value)
        return self.hear()

    @property
    def output(self) -> int:
        """Readable when it has said something, or has ended."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    @property
    def state(self) -> str:
        """The letter that ps shows: T if it is stopped."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """Its exit status, or the negative number of the signal that ended it. `errors` is what it wrote there."""
        assert self._process.stderr is not None
        status = self._process.wait(SECONDS_MAX)
        if not self._process.stderr.closed:
            self.errors = self._process.stderr.read().decode()
            self._process.stderr.close()
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        with suppress(ProcessLookupError):
            # What it has forked: it may hang, and has our pipes.
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


def asleep_in_a_fault(pid: int) -> bool:
    """True if a thread of the process sleeps in a fault that nobody has resolved yet."""
    return any(
        "userfault" in Path(f"/proc/{pid}/task/{thread}/wchan").read_text() for thread in os.listdir(f"/proc/{pid}/task")
    )


def keeper_of(manager_pid: int) -> int:
    """The process that the manager comes from, and that holds what outlives it."""
    return int(Path(f"/proc/{manager_pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def manager_of(keeper_pid: int) -> int:
    """The manager that the keeper has started."""
    children = Path(f"/proc/{keeper_pid}/task/{keeper_pid}/children")
    # The kernel's list can lack one while another process ends (proc(5)).
    wait_until(lambda: len(children.read_text().split()) == 1, "the keeper has one child")
    return int(children.read_text())


def kill_service(keeper_pid: int) -> None:
    """SIGKILL for a manager and its keeper, so that neither can start another one."""
    manager = os.pidfd_open(manager_of(keeper_pid))
    signal.pidfd_send_signal(manager, signal.SIGSTOP)
    os.kill(keeper_pid, signal.SIGKILL)
    signal.pidfd_send_signal(manager, signal.SIGKILL)
    select.select([manager], [], [], SECONDS_MAX)
    os.close(manager)


def kill(one: int | hwpoison.Manager) -> None:
    """SIGKILL, of a process or of whatever manager it is now, and it is dead when this returns."""
    pid = one if isinstance(one, int) else one.statistics().pid
    process = os.pidfd_open(pid)
    signal.pidfd_send_signal(process, signal.SIGKILL)
    assert select.select([process], [], [], SECONDS_MAX)[0]
    os.close(process)


class serving:  # noqa: N801  (used as a function)
    """`hwpoison serve`, serving."""

    def __init__(self, path: Path, environment: dict[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hwpoison", "serve", "--socket", str(path)], stderr=subprocess.PIPE, env=environment
        )
        assert self._process.stderr is not None
        assert b"serves at" in self._process.stderr.readline()

    def __enter__(self) -> subprocess.Popen[bytes]:
        return self._process

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            kill_service(self._process.pid)
        self._process.wait(SECONDS_MAX)
        assert self._process.stderr is not None
        self._process.stderr.close()


def state_of(pid: int) -> str:
    """As in `ps`: T is stopped, Z has ended."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T", "it is stopped")


def open_of(pid: int, name: str) -> str:
    """The way to a descriptor of a process."""
    for one in os.listdir(f"/proc/{pid}/fd"):
        if name in os.readlink(f"/proc/{pid}/fd/{one}"):
            return f"/proc/{pid}/fd/{one}"
    raise AssertionError(f"process {pid} has no {name} open")


def commands(parent: int) -> list[str]:
    """The command lines of its children."""
    found = []
    for one in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        try:
            found.append(Path(f"/proc/{one}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found


def pending(pid: int, number: signal.Signals) -> bool:
    """A signal was sent to the process that it has not taken yet."""
    found = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return any(int(line.split()[1], 16) & (1 << (number - 1)) for line in found)


def page(letter: str) -> bytes:
    """One, full of that."""
    return letter.encode() * PAGE_SIZE
