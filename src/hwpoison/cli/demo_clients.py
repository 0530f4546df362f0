"""The client processes of `hwpoison demo`, as the demo sees them: it asks, they answer. `demo_work` is what they do."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import hwpoison

ANSWER_SECONDS_MAX = 60.0
"""A client that says nothing for so long hangs, and that is a defect."""


class ClientError(Exception):
    """A client process did not do what it was asked for; the message says what it did."""


class Verdict(NamedTuple):
    """What one client has seen of its memories, down to the last byte."""

    wrong: tuple[tuple[str, int], ...]
    """(name, offset) of each page that had a wrong byte since the last time."""
    lost: tuple[hwpoison.Range, ...]
    """What was refused now."""
    refused: frozenset[tuple[str, int]]
    """(name, offset) of each page that was refused to its work since the last time."""
    compared: int
    """Bytes compared since the last time."""


class Client:
    """One client process. It starts at once; the first `ask` waits for it."""

    def __init__(self, address: str, index: int, count: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", "-m", "hwpoison.cli.demo_work"]
            command += ["--channel", str(theirs.fileno()), "--socket", address, "--index", str(index), "--count", str(count)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        self._channel = Connection(ours.detach())
        self.index = index
        self.pid = self._process.pid

    def ask(self, request: str, *arguments: Any) -> Any:
        """Let the client do something, and wait for what comes of it. Raises `ClientError`."""
        self.tell(request, *arguments)
        return self.answer()

    def tell(self, request: str, *arguments: Any) -> None:
        """As `ask`, but `answer` has to be called for what comes of it."""
        with suppress(BrokenPipeError):
            self._channel.send((request, arguments))

    def begin(self, request: str, *arguments: Any) -> None:
        """As `tell`; when this returns the client sleeps in it: the manager is stopped, or takes its time."""
        self.tell("announced", request, *arguments)
        self._receive()
        wait_until(lambda: states_of(self.pid)[0] in "SD", f"client {self.pid} sleeps in {request}()")

    def answer(self) -> Any:
        """What came of the last `tell` or `begin`. Raises `ClientError`."""
        done, result = self._receive()
        if not done:
            raise ClientError(f"process {self.pid}: {result}")
        return result

    def _receive(self) -> Any:
        try:
            if not self._channel.poll(ANSWER_SECONDS_MAX):
                raise ClientError(f"process {self.pid} hangs: it has not answered for {ANSWER_SECONDS_MAX:.0f} s")
            return self._channel.recv()
        except (EOFError, ConnectionError):
            raise ClientError(f"process {self.pid} has ended: {self.ended_by()}") from None

    def ended_by(self) -> str:
        """How the process ended, which it is about to."""
        try:
            status = self._process.wait(ANSWER_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            return "not yet"
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"

    def dismiss(self) -> None:
        """Let the process end."""
        self._channel.close()

    def close(self) -> None:
        """The process has ended when this returns: in order, if it can."""
        self.dismiss()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def ask_all(clients: Sequence[Client], request: str, *arguments: Any) -> list[Any]:
    """All of them at the same time."""
    for client in clients:
        client.tell(request, *arguments)
    return [client.answer() for client in clients]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Bounded: raises `ClientError`."""
    deadline = time.monotonic() + ANSWER_SECONDS_MAX
    while not condition():
        if time.monotonic() > deadline:
            raise ClientError(f"this did not come true: {what}")
        time.sleep(0.0005)


def states_of(pid: int) -> str:
    """A letter for what each thread of the process does, as ps(1) has them; the main thread comes first."""
    letters = []
    for task in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda one: int(one.name)):
        with suppress(FileNotFoundError, ProcessLookupError):
            letters.append((task / "stat").read_text().rpartition(")")[2].split()[0])
    return "".join(letters) or "X"
