"""The keeper: a small process beside the manager that holds the quarantined frames, whatever becomes of the manager.

A frame is held by a pipe that nobody reads, and lives as long as the pipe has a descriptor anywhere. The manager sends the
keeper each pipe before anything is in it. The keeper is forked from the manager before that has threads, so it shares
nearly all its memory.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from contextlib import suppress

from hwpoison.linux import syscalls

HOLD_SECONDS = 10.0
"""How long the frames are held when the manager has died without a goodbye: so long a successor has to come."""
_GOODBYE = b"goodbye"


class Keeper:
    """The manager's side. `pid` is the keeper process."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self._channel = channel

    def keep(self, fd: int) -> None:
        """Give the keeper a pipe. A keeper that has died keeps nothing; the manager still does."""
        with suppress(OSError):
            socket.send_fds(self._channel, [b"keep"], [fd], socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    def dismiss(self) -> None:
        """The manager ends in order: its frames may go."""
        with suppress(OSError):
            self._channel.send(_GOODBYE, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        self._channel.close()
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def start() -> Keeper:
    """Fork the keeper. To be called before the process has threads."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            ours.close()
            _keep(theirs)
            status = 0
        finally:
            os._exit(status)
    theirs.close()
    return Keeper(pid, ours)


def _keep(channel: socket.socket) -> None:
    """Hold what comes until the goodbye, or for a while after the manager's death."""
    os.setsid()
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)
    syscalls.name_process("hwpoison-keeper")
    os.closerange(3, channel.fileno())
    os.closerange(channel.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    held: list[int] = []
    while True:
        message, fds, _, _ = socket.recv_fds(channel, 16, 1)
        held += fds
        if message == _GOODBYE:
            return
        if not message:
            break
    deadline = time.monotonic() + HOLD_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        select.select([], [], [], left)
