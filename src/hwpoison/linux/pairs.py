"""Socket pairs of which another process is to have the other end.

A child that another thread forks before that end is handed over would keep it open for as long as it lives, and who waits at
this one would never hear that the other process has ended. So a forked child closes those that it finds.
"""

from __future__ import annotations

import os
import socket
import threading
import weakref

_lock = threading.RLock()
"""Held by whoever forks: a pair is known, or not made yet. A signal handler may fork too."""
_theirs: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def pair(kind: socket.SocketKind = socket.SOCK_SEQPACKET) -> tuple[socket.socket, socket.socket]:
    """Our end, and the one for another process, which is to be closed here when it was sent."""
    with _lock:
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        _theirs.add(theirs)
    return ours, theirs


def _in_child() -> None:
    for one in list(_theirs):
        one.close()
    _lock.release()


os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_in_child)
