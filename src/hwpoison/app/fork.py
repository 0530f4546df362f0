"""A forked child has every object again, at the same address, before any other Python code of it runs.

Before the fork the manager is asked to hold what is mapped (`Connection.invite`), as the parent may end at once. In the
child every address is fenced first, so that nothing else comes there; then each connection begins again, and each mapping is
made again in place of its fence. Signals are blocked from just before the fork until then. What can't be had again stays
fenced: an access is a SIGSEGV, never a zero. A fork by C code gets no fence, and no mapping.
"""

from __future__ import annotations

import asyncio  # noqa: F401  (what it does in a forked child comes before ours: signals wait for that too)
import logging
import os
import signal
import socket
import threading
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from hwpoison.app.connection import Connection, all_connections
from hwpoison.app.mapping import Mapped, again, all_mapped, fence, forget
from hwpoison.app.memory import all_memories, every_memory
from hwpoison.linux import syscalls

log = logging.getLogger("hwpoison")


POOL_BYTES = 4096
"""Small objects are allocated in pools of about this size or more."""
POOLS = 64
"""So many are free at a fork."""


ROUNDS = 20
"""So often a fork asks for what has come meanwhile."""


class _Forking(threading.local):
    """What the thread that forks has prepared; the child begins with it."""

    def __init__(self) -> None:
        self.invitations: dict[Connection, socket.socket | None] = {}
        self.reserve = b""
        self.again = 0
        """A signal that is to come when the fork is over."""
        self.masks: list[Any] = []
        """The signals that are blocked when it does not fork."""
        self.parent = 0
        self.known: set[Mapped] = set()
        """What the manager knew of before anything was asked for: the invitations have it."""


_forking = _Forking()
_open: set[socket.socket] = set()
"""The invitations of all threads that are forking."""


def _before() -> None:
    # In variables of its own: a signal handler may fork in the middle of it.
    invitations: dict[Connection, socket.socket | None] = {}
    try:
        _forking.invitations, _forking.known, _forking.parent, _forking.again = {}, set(), 0, 0
        known = _prepare(invitations)
        _forking.invitations, _forking.known, _forking.parent = invitations, known, os.getpid()
    except BaseException as error:
        for one in invitations.values():
            _close(one)
        _say_again(error)
        raise


def _prepare(invitations: dict[Connection, socket.socket | None]) -> set[Mapped]:
    """Adds an invitation of each connection; what the manager knew of before anything was asked for."""
    known: set[Mapped] = set()
    # What other threads make while a manager is asked is for the next round: each takes a fraction of a millisecond.
    for _ in range(ROUNDS):
        there = {one for one in all_mapped() if one.told}
        grown = {one.connection for one in there - known}
        connections = [one for one in all_connections if not one.closing and one.owner == os.getpid()]
        wanted = [one for one in connections if one in grown or one not in invitations]
        if not wanted:
            break
        for connection in wanted:
            _invite(connection, invitations)
        known = there
    for memory in all_memories():
        with suppress(OSError):
            memory._about_to_fork()
    # What is allocated in the child before our turn comes should not need new memory.
    some = [bytes(POOL_BYTES // 16) for _ in range(16 * POOLS)]
    _forking.reserve = some[-1]
    return known


def _say_again(error: BaseException) -> None:
    """What is raised in a function that runs at a fork is printed and lost. Ctrl-C comes again when the fork is over."""
    if isinstance(error, KeyboardInterrupt):
        _forking.again = signal.SIGINT


def _close(invitation: socket.socket | None) -> None:
    if invitation is not None:
        _open.discard(invitation)
        invitation.close()


def _invite(connection: Connection, invitations: dict[Connection, socket.socket | None]) -> None:
    before = invitations.get(connection)
    try:
        invitation = connection.invite()
    except (OSError, ValueError) as error:
        if connection.closing:
            # By another thread: nothing of it is mapped any more.
            return
        log.warning("a child that is forked now may not get the memory of %s: %s", connection.socket_name, error)
        invitations.setdefault(connection, None)
        return
    invitations[connection] = invitation
    _open.add(invitation)
    _close(before)


def _in_parent() -> None:
    try:
        invitations, _forking.invitations, _forking.parent = _forking.invitations, {}, 0
        _forking.known = set()
        for invitation in invitations.values():
            _close(invitation)
    except BaseException as error:
        _say_again(error)
        raise


def _in_child() -> None:
    # All signals are blocked, and there is no other thread.
    # There is none if a handler raised in the only moment for that: then the one in use is as it was.
    mask, _forking.masks = (_forking.masks or [None])[0], []
    try:
        _begin_again(syscalls.signals_in(mask or syscalls.mask_in_use.contents))
    finally:
        if mask is not None:
            syscalls.mask_in_use.contents = mask


# --- signals: blocked from just before the fork, so that a child's handlers run when it has everything


def _about_to_block() -> None:
    mask = syscalls.SignalMask()
    # Of several: a handler may fork.
    _forking.masks.append(mask)
    syscalls.mask_in_use.contents = mask


def _about_to_restore() -> None:
    again, _forking.again = _forking.again, 0
    if _forking.masks:
        mask = _forking.masks.pop()
        syscalls.signal_to_raise.value = again
        syscalls.mask_in_use.contents = mask


def _begin_again(blocked: Collection[int]) -> None:
    invitations, _forking.invitations = _forking.invitations, {}
    for one in _open.difference(invitations.values()):
        one.close()
    _open.clear()
    # Begun in another thread after the invitations; or all, if a signal handler has raised before there were any.
    parent, _forking.parent = _forking.parent or os.getppid(), 0
    come_since = [one for one in list(all_connections) if not one.closing and one.owner == parent and one not in invitations]
    invitations.update(dict.fromkeys(come_since))
    everything = all_mapped()
    known, _forking.known = _forking.known, set()
    fenced = [one for one in everything if _fenced(one)]
    for mapped in everything:
        # The parent's word on the board. If this is not made again it has none.
        mapped.slot = -1
    for connection, invitation in invitations.items():
        try:
            if connection.closing:
                # By another thread: nothing of it is mapped any more.
                continue
            connection.begin_again(invitation)
            _map_again(connection, [one for one in fenced if one.connection is connection], known)
        except Exception as error:  # noqa: BLE001  (it would be printed as nobody's, and the others be left out)
            # What another thread has begun meanwhile, and has ended in the parent by now, nobody here can have.
            level = logging.DEBUG if connection in come_since else logging.ERROR
            message = "the forked child %d has no way to the manager at %s: %s"
            log.log(level, message, os.getpid(), connection.socket_name, error)
        finally:
            if invitation is not None:
                invitation.close()
    for memory in every_memory():
        memory._begin_again()
    for connection in invitations:
        if connection.owner == os.getpid():
            connection.begun_again(blocked)


def _fenced(mapped: Mapped) -> bool:
    try:
        fence(mapped)
    except OSError as error:
        _not_there(mapped, error)
        return False
    return True


def _not_there(mapped: Mapped, error: Exception, level: int = logging.ERROR) -> None:
    forget(mapped)
    mapped.told = False
    mapped.connection.not_there(mapped.number)
    log.log(level, "memory %r is not there in the forked child %d: %s", mapped.found.name, os.getpid(), error)


def _map_again(connection: Connection, mapped: list[Mapped], known: set[Mapped]) -> None:
    for one in mapped:
        channel = connection.take_channel()
        try:
            again(one, channel)
        except Exception as error:  # noqa: BLE001  (the others are to be there all the same)
            channel.close()
            # What another thread has made meanwhile, and the parent has let go of by now, nobody here can have.
            gone = isinstance(error, FileNotFoundError) and one not in known
            _not_there(one, error, logging.DEBUG if gone else logging.ERROR)
        else:
            connection.give_back(channel)


# What is before a fork runs from the last to the first. No Python code of ours may come after the signals are restored.
os.register_at_fork(before=syscalls.block_signals, after_in_parent=_in_parent, after_in_child=_in_child)
os.register_at_fork(before=_about_to_block, after_in_parent=_about_to_restore, after_in_child=syscalls.restore_signals)
os.register_at_fork(before=_before, after_in_parent=syscalls.restore_signals)
os.register_at_fork(after_in_parent=syscalls.raise_signal)
