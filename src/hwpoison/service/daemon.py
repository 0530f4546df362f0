"""The processes: `hwpoison serve`, and a private manager, which `hwpoison.Manager()` starts as

python -m hwpoison.service.daemon --channel FD [--memory-limit BYTES] [--offline-foreign] [--without FEATURE]

What is started is the keeper (`service.keeper`); `_manage` is the life of each manager that it forks.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import logging
import os
import resource
import secrets
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from hwpoison import events, protocol
from hwpoison.core.records import Policy
from hwpoison.linux import syscalls
from hwpoison.linux.journal import FORMAT, JournalError
from hwpoison.linux.machine import IO_SECONDS_MAX, LinuxMachine
from hwpoison.linux.standard import open_standard_streams
from hwpoison.linux.userfaultfd import NEEDED, NO_FEATURE, Feature, open_userfaultfd
from hwpoison.service import keeper
from hwpoison.service.eventlog import EventLog
from hwpoison.service.keeper import LISTENER
from hwpoison.service.server import Server


@dataclass(frozen=True)
class Options:
    """How a manager is to be, and each that follows it. `address` is where it serves."""

    address: str
    private: bool
    memory_limit: int | None = None
    offline_foreign: bool = False
    without: Feature = NO_FEATURE
    policy: Policy = Policy.LATE
    io_limit: float = IO_SECONDS_MAX
    users: tuple[int, ...] = ()
    """Who is served beside its own user and root."""

    def arguments(self) -> list[str]:
        """Of this module's command line."""
        given = ["--address", self.address]
        if self.private:
            given.append("--private")
        if self.memory_limit is not None:
            given += ["--memory-limit", str(self.memory_limit)]
        if self.offline_foreign:
            given.append("--offline-foreign")
        if self.without:
            given += ["--without", str(self.without.name)]
        given += [part for user in self.users for part in ("--user", str(user))]
        return [*given, "--policy", self.policy, "--io-limit", str(self.io_limit)]


def serve(
    socket_path: str,
    *,
    memory_limit: int | None = None,
    offline_foreign: bool = False,
    policy: Policy = Policy.LATE,
    io_limit: float = IO_SECONDS_MAX,
    users: tuple[int, ...] = (),
) -> int:
    """Serve at `socket_path` (a path, or @name for an abstract address) until SIGTERM or SIGINT; the exit status.

    Whoever maps memory then is served on until it has gone, or until the signal comes again.

    Raises FileExistsError if somebody serves there, OSError if it can't be used, `UnsupportedError`.
    """
    if not socket_path.startswith("@"):
        socket_path = os.path.abspath(socket_path)
    options = Options(
        socket_path,
        private=False,
        memory_limit=memory_limit,
        offline_foreign=offline_foreign,
        policy=policy,
        io_limit=io_limit,
        users=users,
    )
    # Said here, to who has called this, and not by the manager.
    os.close(open_userfaultfd().fd)
    return _keep(options, {LISTENER: _listen(socket_path, others=bool(users)).detach()})


def _keep(options: Options, held: keeper.Held, first: socket.socket | None = None) -> int:
    """This process becomes the keeper."""
    _become_keeper()
    status = keeper.run(partial(_manage, options, first), held, partial(_resume, options), first)
    if status and not options.private and not options.address.startswith("@"):
        # No manager has lived to do it.
        _unlink(options.address)
    return status


_COMMAND = [sys.executable, "-P", "-m", "hwpoison.service.daemon"]


def _become_keeper() -> None:
    syscalls.name_process("hwpoison-keeper")
    # A client costs about six descriptors, and a shell allows 1,024: take what the administrator allows.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _resume(options: Options, held: keeper.Held, life: int, told: list[int]) -> None:
    """See `keeper.Resume`."""
    for fd in held.values():
        os.set_inheritable(fd, True)
    # A signal that comes from here on waits for the one who can pass it on; of those before, the handler has run.
    signal.pthread_sigmask(signal.SIG_BLOCK, keeper.SIGNALS)
    state = os.memfd_create("hwpoison-resume", 0)
    try:
        with os.fdopen(state, "wb", closefd=False) as file:
            file.write(json.dumps({"held": held, "life": life, "told": told}).encode())
        os.execv(sys.executable, [*_COMMAND, "--resume", str(state), *options.arguments()])
    except BaseException:
        os.close(state)
        for fd in held.values():
            os.set_inheritable(fd, False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, keeper.SIGNALS)
        raise


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _listen(address: str, *, others: bool = False) -> socket.socket:
    """The socket at the address. `others`: other users can reach it too."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with _alone_at(address):
            if not address.startswith("@") and os.path.exists(address):
                _remove_stale(address)
            # Whoever else may connect is looked at when they do.
            old_mask = os.umask(0o111 if others else 0o177)
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


def _manage(options: Options, first: socket.socket | None, held_by: keeper.Keeper, held: keeper.Held, life: int) -> int:
    """A manager's whole life; its exit status. `first` is a client of the first one that is connected already."""
    syscalls.name_process("hwpoison-manager")
    if life > 1:
        first = None
    try:
        machine = LinuxMachine(held_by, (NEEDED | Feature.POISON) & ~options.without, held, options.io_limit)
    except JournalError as error:
        sys.stderr.write(f"hwpoison: {error.strerror}\n")
        return keeper.HOPELESS
    except OSError as error:
        if first is None:
            raise
        with suppress(OSError):
            protocol.send(first, protocol.failed(error))
        return 1
    instance = machine.records.all().get(("life",), [0, secrets.token_hex(4)])[1]
    try:
        log = EventLog(events.default_path(), instance, machine.records)
        try:
            asyncio.run(_serve(machine, options, first, held_by, held, life=life, instance=instance, log=log))
        finally:
            log.close()
        held_by.goodbye()
    finally:
        machine.close()
    return 0


async def _serve(
    machine: LinuxMachine,
    options: Options,
    first: socket.socket | None,
    held_by: keeper.Keeper,
    held: keeper.Held,
    *,
    life: int,
    instance: str,
    log: EventLog,
) -> None:
    """Until it is over."""
    address, private = options.address, options.private
    server = Server(
        machine,
        socket.socket(fileno=held[LISTENER]) if LISTENER in held else None,
        address=address,
        instance=instance,
        life=life,
        keeper=held_by,
        new_keeper=partial(_new_keeper, options, life),
        check=[*_COMMAND, "--reads-journal", str(FORMAT), *options.arguments()],
        events=log,
        private=private,
        leave=(lambda: None) if private or address.startswith("@") else partial(_unlink, address),
        memory_limit=options.memory_limit,
        offline_foreign=options.offline_foreign,
        policy=options.policy,
        users=options.users,
    )
    loop = asyncio.get_running_loop()
    for number in keeper.SIGNALS:
        # A private manager ends with its clients: a Ctrl-C that is meant for them must not take their memory. Of SIGHUP
        # come several when a terminal is closed, which nobody has meant.
        at_once = number != signal.SIGHUP
        told = (lambda: None) if private else partial(server.told_to_end, at_once=at_once)
        loop.add_signal_handler(number, told)

    def serving() -> None:
        with suppress(OSError):
            # The process that was started, which is the keeper.
            sys.stderr.write(f"hwpoison serve: process {os.getppid()} serves at {address}\n")
            sys.stderr.flush()

    await server.run(first, serving if not private and life == 1 else None)
    for number in keeper.SIGNALS:
        # The end of the loop would have this process end by them, before it has ended in order.
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)
    if server.renewing:
        # What is under way is left as it is, as by a death: nothing of it may run on and say that it had been done.
        held_by.restart()
        log.close()
        os._exit(0)


def _new_keeper(options: Options, life: int) -> tuple[socket.socket, int]:
    """Another one, as the last one has died: this process's end of the way to it, and its process id. Raises
    OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    given = [theirs.fileno()]
    try:
        given.append(os.pidfd_open(os.getpid()))
        command = [*_COMMAND, "--adopt", *map(str, given), "--life", str(life), *options.arguments()]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=given, start_new_session=True
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        for own in given[1:]:
            os.close(own)
    # It is nobody's to wait for: it outlives this process.
    process.returncode = 0
    return ours, process.pid


def main() -> int:
    """A private manager with its keeper (`--channel`), a keeper for a manager that has lost its own (`--adopt`), or one that
    goes on as another version (`--resume`)."""
    open_standard_streams()
    parser = argparse.ArgumentParser("hwpoison private manager")
    parser.add_argument("--channel", type=int, help="a socket, of the first client")
    parser.add_argument("--adopt", type=int, nargs=2, help="a socket, of the manager, and its pidfd")
    parser.add_argument("--resume", type=int, help="a file, with what is held")
    parser.add_argument(
        "--reads-journal", type=int, help="whether this version can take over from one that wrote that format"
    )
    parser.add_argument("--life", type=int, default=1)
    parser.add_argument("--address", default=f"@hwpoison-{secrets.token_hex(8)}")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--memory-limit", type=int)
    parser.add_argument("--offline-foreign", action="store_true")
    parser.add_argument("--without", type=Feature.__getitem__, default=NO_FEATURE)
    parser.add_argument("--policy", type=Policy, default=Policy.LATE)
    parser.add_argument("--io-limit", type=float, default=IO_SECONDS_MAX)
    parser.add_argument("--user", type=int, action="append", default=[])
    given = parser.parse_args()
    logging.basicConfig(format="hwpoison manager: %(message)s")
    if given.reads_journal is not None:
        if given.reads_journal != FORMAT:
            sys.stderr.write(f"it reads journals of format {FORMAT}, and the manager writes format {given.reads_journal}\n")
        return int(given.reads_journal != FORMAT)
    options = Options(
        given.address, given.private or given.channel is not None, given.memory_limit, given.offline_foreign, given.without,
        given.policy, given.io_limit, tuple(given.user),
    )  # fmt: skip
    if given.adopt is not None:
        _become_keeper()
        return keeper.adopt(
            partial(_manage, options, None),
            socket.socket(fileno=given.adopt[0]),
            given.adopt[1],
            given.life,
            partial(_resume, options),
        )
    if given.resume is not None:
        _become_keeper()
        os.lseek(given.resume, 0, os.SEEK_SET)
        with os.fdopen(given.resume) as state:
            found = json.load(state)
        for fd in found["held"].values():
            os.set_inheritable(fd, False)
        return keeper.run(partial(_manage, options, None), found["held"], partial(_resume, options),
            life=found["life"], told=found["told"],
        )  # fmt: skip
    first = socket.socket(fileno=given.channel)
    try:
        return _keep(options, {LISTENER: _listen(options.address).detach()}, first)
    except OSError as error:
        with suppress(OSError):
            protocol.send(first, protocol.failed(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
