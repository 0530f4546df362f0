"""The manager process: `hwpoison serve`, and the private manager that `hwpoison.Manager()` starts as

python -m hwpoison.service.daemon --channel FD [--memory-limit BYTES] [--offline-foreign] [--without FEATURE]
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import logging
import os
import resource
import secrets
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

from hwpoison import events, protocol
from hwpoison.linux import syscalls
from hwpoison.linux.machine import LinuxMachine
from hwpoison.linux.standard import open_standard_streams
from hwpoison.linux.userfaultfd import NEEDED, NO_FEATURE, Feature
from hwpoison.service import keeper
from hwpoison.service.eventlog import EventLog
from hwpoison.service.server import Server


def serve(socket_path: str, *, memory_limit: int | None = None, offline_foreign: bool = False) -> int:
    """Serve at `socket_path` (a path, or @name for an abstract address) until SIGTERM or SIGINT; the exit status.

    Whoever maps memory then is served on until it has gone, or until the signal comes again.

    Raises FileExistsError if somebody serves there, OSError if it can't be used, `UnsupportedError`.
    """
    if not socket_path.startswith("@"):
        socket_path = os.path.abspath(socket_path)
    listener = _listen(socket_path)
    with ExitStack() as place:
        if not socket_path.startswith("@"):
            place.callback(_unlink, socket_path)
        _run(listener, socket_path, None, place.close, memory_limit=memory_limit, offline_foreign=offline_foreign)
    return 0


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _listen(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with _alone_at(address):
            if not address.startswith("@") and os.path.exists(address):
                _remove_stale(address)
            old_mask = os.umask(0o177)
            try:
                listener.bind(protocol.address_of(address))
            finally:
                os.umask(old_mask)
            listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return listener


@contextmanager
def _alone_at(address: str) -> Iterator[None]:
    """Of several managers that start at one path, one at a time looks and binds: the next one finds that it serves."""
    folder = -1
    if not address.startswith("@"):
        folder = os.open(os.path.dirname(os.path.abspath(address)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if folder >= 0:
            os.close(folder)


def _remove_stale(path: str) -> None:
    """A socket that nobody serves is removed; anything else at the path is an error."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        raise FileExistsError(f"{path!r} exists and is no socket; choose another path")
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    else:
        raise FileExistsError(f"a manager serves at {path!r} already; choose another path")
    finally:
        probe.close()


def _run(
    listener: socket.socket,
    address: str,
    first: socket.socket | None,
    leave: Callable[[], None],
    *,
    memory_limit: int | None,
    offline_foreign: bool,
    without: Feature = NO_FEATURE,
) -> None:
    """The manager's whole life. `leave` makes room at its address, when nobody can connect any more."""
    syscalls.name_process("hwpoison-manager")
    # A client costs about six descriptors, and a shell allows 1,024: take what the administrator allows.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    instance = secrets.token_hex(4)
    held = keeper.start()
    try:
        machine = LinuxMachine(held.keep, (NEEDED | Feature.POISON) & ~without)
        try:
            log = EventLog(events.default_path(), instance)
            try:
                asyncio.run(
                    _serve(
                        machine,
                        listener,
                        first,
                        leave,
                        address=address,
                        instance=instance,
                        log=log,
                        memory_limit=memory_limit,
                        offline_foreign=offline_foreign,
                    )
                )
            finally:
                log.close()
        finally:
            machine.close()
    finally:
        held.dismiss()


async def _serve(
    machine: LinuxMachine,
    listener: socket.socket,
    first: socket.socket | None,
    leave: Callable[[], None],
    *,
    address: str,
    instance: str,
    log: EventLog,
    memory_limit: int | None,
    offline_foreign: bool,
) -> None:
    server = Server(
        machine,
        listener,
        address=address,
        instance=instance,
        events=log,
        private=first is not None,
        leave=leave,
        memory_limit=memory_limit,
        offline_foreign=offline_foreign,
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A private manager ends with its clients: a Ctrl-C that is meant for them must not take their memory. Of SIGHUP
        # come several when a terminal is closed, which nobody has meant.
        at_once = number != signal.SIGHUP
        told = (lambda: None) if first is not None else partial(server.told_to_end, at_once=at_once)
        loop.add_signal_handler(number, told)
    if first is None:
        with suppress(OSError):
            sys.stderr.write(f"hwpoison serve: process {os.getpid()} serves at {address}\n")
            sys.stderr.flush()
    await server.run(first)


def main() -> int:
    """The private manager. Errors go to the client that starts it."""
    open_standard_streams()
    parser = argparse.ArgumentParser("hwpoison private manager")
    parser.add_argument("--channel", type=int, required=True)
    parser.add_argument("--memory-limit", type=int)
    parser.add_argument("--offline-foreign", action="store_true")
    parser.add_argument("--without", type=Feature.__getitem__, default=NO_FEATURE)
    options = parser.parse_args()
    logging.basicConfig(format="hwpoison manager: %(message)s")
    first = socket.socket(fileno=options.channel)
    address = f"@hwpoison-{secrets.token_hex(8)}"
    try:
        _run(
            _listen(address),
            address,
            first,
            lambda: None,
            memory_limit=options.memory_limit,
            offline_foreign=options.offline_foreign,
            without=options.without,
        )
    except OSError as error:
        with suppress(OSError):
            protocol.send(first, protocol.failed(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
