"""How a client learns that nobody is left who could serve its faults: the manager is dead, its keeper too, or has given up.

A thread that sleeps in a fault can be told nothing, and often has Python's one lock, so no thread of the client could watch
for it. The kernel does: of a socket pair the manager and the keeper hold one end, and when both have let go of it, the owner
of the other is sent SIGKILL: nothing else ends whoever sleeps in a system call, or handles the signal. (A keeper that gives
up sends SIGBUS before.) While the process maps nothing it is not armed.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import threading

from hwpoison.linux.pairs import pair


class Lifeline:
    """`other` is the end for the manager, until it is `given`."""

    def __init__(self) -> None:
        ours, theirs = pair(socket.SOCK_STREAM)
        self._ours, self._theirs = ours, theirs
        self._armed = False
        self.lock = threading.RLock()
        """Held from the look whether anything is mapped until it is armed, or not. Signal handlers may come back here."""
        fcntl.fcntl(ours.fileno(), fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(ours.fileno(), F_SETSIG, signal.SIGKILL)

    @property
    def other(self) -> int:
        return self._theirs.fileno()

    def given(self) -> None:
        """The manager has it."""
        self._theirs.close()

    def arm(self) -> None:
        """The process maps memory of the manager."""
        if not self._armed:
            self._armed = True
            self._set(os.O_ASYNC)

    def disarm(self) -> None:
        """It does not any more."""
        if self._armed:
            self._armed = False
            self._set(0)

    def _set(self, flag: int) -> None:
        if self._ours.fileno() >= 0:
            fd = self._ours.fileno()
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_ASYNC | flag)

    def forget(self) -> None:
        """In a forked child: it is the parent's."""
        self._ours.close()
        self._theirs.close()

    def close(self) -> None:
        self.disarm()
        self._ours.close()
        self._theirs.close()


F_SETSIG = 10
"""fcntl(2); Python's module has no name for it. The same on all architectures that hwpoison knows."""
