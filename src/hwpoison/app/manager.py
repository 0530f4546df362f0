"""`Manager` and `connect`: the way to a manager process."""

from __future__ import annotations

import atexit
import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
import weakref
from abc import ABC
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from socket import AF_UNIX, SOCK_SEQPACKET
from types import TracebackType
from typing import Any, Literal, Self, SupportsIndex

from hwpoison import events as event_log
from hwpoison import protocol
from hwpoison.app import (
    fork,  # noqa: F401  (from now on a forked child has everything again)
    guard,  # noqa: F401  (a thread that imports holds a lock that would stay locked in a child which another thread forks)
)
from hwpoison.app.connection import Channel, Connection, Descriptor, NoWelcomeError
from hwpoison.app.memory import Memory
from hwpoison.app.notices import Notices, NoticeStream
from hwpoison.checking import memory_limit_of, name_of, not_negative, seconds_of, text, true_or_false, whole
from hwpoison.core.records import Capabilities, Failure, Policy, Report, Source
from hwpoison.errors import UnsupportedError, warn
from hwpoison.linux.files import checked_file
from hwpoison.linux.pairs import pair
from hwpoison.linux.syscalls import PAGE_SIZE
from hwpoison.linux.userfaultfd import NO_FEATURE, Feature, open_userfaultfd
from hwpoison.plain import manager as plain

SOCKET_VARIABLE = "HWPOISON_SOCKET"

Socket = socket.socket
"""Where `socket` is the name of something else."""
START_ATTEMPTS = 3
CONNECT_ATTEMPTS = 10
"""A manager may die with a client that it has just accepted; so many in a row do not."""


_managers: weakref.WeakValueDictionary[int, BaseManager] = weakref.WeakValueDictionary()


def all_managers() -> list[BaseManager]:
    """Those of this process to which there is a way."""
    found = [reference() for reference in _managers.valuerefs()]
    return [one for one in found if one is not None and not one.closed and one.connection.owner == os.getpid()]


watchers: list[Callable[[BaseManager, bool], None]] = []
"""Called with each manager when there is a way to it, and before it is closed; and whether it is. For the pytest fixture."""


class BaseManager(ABC):  # noqa: B024  (plain ones are registered)
    """What a private and a shared manager have in common."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.notice_board = Notices(connection, self._open_memory)
        self._open: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()
        """By their ids. A memory that nobody has any more goes with its mapping, unless that has views."""
        _managers[id(self)] = self
        self._tell_watchers(closes=False)

    def _tell_watchers(self, *, closes: bool) -> None:
        for watcher in list(watchers):
            watcher(self, closes)

    @property
    def pid(self) -> int:
        """The manager's process id, as of the last answer: another one may have taken over since."""
        return self.connection.pid

    @property
    def closed(self) -> bool:
        """True if nothing can be asked here any more: not while it stays for views."""
        return self.connection.closed

    @property
    def socket(self) -> str:
        """Where others can `connect`: a path, or an abstract name that begins with @."""
        return self.connection.socket_name

    # --- memory

    def allocate(
        self, nbytes: SupportsIndex, name: str | None = None, *, persistent: bool = False, populate: bool | None = None
    ) -> Memory:
        """Anonymous memory, all zeros. It lives as long as any process has it open; with `persistent`, which needs a name,
        until `unlink`, or the manager's end (a private one ends with its last process).

        `populate`: all of it is there at once; by default where userfaultfd is in user mode, as system calls can't use pages
        there that are not. Raises ValueError, FileExistsError (the name), MemoryError (the limit).
        """
        if populate is not None:
            populate = true_or_false("populate", populate)
        if true_or_false("persistent", persistent) and name is None:
            raise ValueError("persistent memory needs a name, by which it can be attached again: pass name=")
        memory = self._memory(protocol.Allocate(whole("nbytes", nbytes), name_of(name), persistent=persistent))
        if self.connection.user_mode if populate is None else populate:
            try:
                memory.prefetch()
            except BaseException:
                memory.close()
                raise
        return memory

    def unlink(self, name: str) -> None:
        """A persistent object ends when nobody has it open any more, or at once. Raises FileNotFoundError."""
        life = self.connection.life
        try:
            self.connection.request(protocol.Unlink(name_of(name) or ""), protocol.Done)
        except FileNotFoundError:
            # If a manager has died meanwhile, it had done it.
            if self.connection.life == life:
                raise

    def open(
        self,
        path: str | os.PathLike[str],
        mode: Literal["r", "r+"] = "r",
        offset: SupportsIndex = 0,
        nbytes: SupportsIndex | None = None,
        *,
        name: str | None = None,
    ) -> Memory:
        """A page cache over `nbytes` of a file from `offset` on (None: to its end); the name is the absolute path.

        Opening the same range in the same mode again, here or in another process, gives the same object; for another range
        or mode at the same time pass another `name`, else FileExistsError is raised: also while that version of the file is
        in use and the file has changed since, or while changes to it are lost. Raises what `open()` raises too, and
        ValueError for an unknown mode, a range outside the file, an empty file, or a FIFO, socket or device.
        """
        if mode not in ("r", "r+"):
            raise ValueError(f"mode {mode!r}: a file is opened 'r' or 'r+'")
        flags = os.O_RDWR if mode == "r+" else os.O_RDONLY
        # O_NONBLOCK: a FIFO must not hold us up before it can be refused.
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            checked_file(fd, os.fspath(path))
            message = protocol.Open(
                name_of(name) or os.fsencode(os.path.abspath(path)).decode("utf-8", "backslashreplace"),
                whole("offset", offset),
                None if nbytes is None else whole("nbytes", nbytes),
                mode == "r+",
            )
            return self._memory(message, [fd])
        finally:
            os.close(fd)

    def attach(self, name: str) -> Memory:
        """An object that this or another process has made. Raises FileNotFoundError."""
        return self._memory(protocol.Attach(name_of(name) or ""))

    def _attach_object(self, name: str, number: int) -> Memory:
        """As `attach`, if it is still that object. For `pickle`."""
        return self._memory(protocol.Attach(name, number))

    def _memory(self, message: protocol.Allocate | protocol.Open | protocol.Attach, fds: list[int] | None = None) -> Memory:
        if self.connection.when_unmapped is not None:
            raise ConnectionError(
                "the manager was closed, and stays only for what still has views; open a new one with Manager() or connect()"
            )
        try:
            return self._asked_for(message, fds)
        except (OSError, ValueError) as error:
            if self.connection.closing:
                # By another thread, which may have taken anything from under this.
                raise ConnectionError(
                    "the manager was closed meanwhile; open a new one with Manager() or connect()"
                ) from error
            raise

    def _asked_for(self, message: protocol.Allocate | protocol.Open | protocol.Attach, fds: list[int] | None) -> Memory:
        # Until it is mapped, the manager holds it for us, and gives it up when the channel ends.
        channel = self.connection.take_channel()
        message.mapping = number = self.connection.new_number()
        memory = None
        try:
            memory = self._mapped(channel, message, fds)
            self.connection.give_back(channel)
            self._open[id(memory)] = memory
        except BaseException:
            if memory is None:
                channel.close()
                # If the manager has died meanwhile, the next one does not know the channel.
                self.connection.not_mapped(number)
            else:
                self._open.pop(id(memory), None)
            raise
        return memory

    def _mapped(
        self, channel: Channel, message: protocol.Allocate | protocol.Open | protocol.Attach, fds: list[int] | None
    ) -> Memory:
        found, memory_fds = self.connection.ask(channel, message, protocol.Found, fds)
        return Memory(self, found, Descriptor(memory_fds.pop()), channel, message.mapping)

    def _open_memory(self, number: int) -> Memory | None:
        return next((one for one in list(self._open.values()) if one.object_number == number), None)

    def _forget(self, memory: Memory) -> None:
        """It was closed."""
        self.notice_board.forget(memory)
        self._open.pop(id(memory), None)
        if self.connection.when_unmapped is not None:
            self.connection.when_unmapped()

    # --- failures

    def inject(self, memory: str | Memory, offset: SupportsIndex, action_required: bool = False) -> Failure:
        """A simulated failure of the page at byte `offset`: handled as a real one, but no hardware is blamed.

        Returns the handling: `event_id` (of its events in the log), `state` (what the page was), `outcome`, `victims`
        (process ids of those whose data is gone), `latency_us` (from the report to the outcome), `name`, `offset` and
        `nbytes` of what failed, `reason` (where there is more to say) and `already_poisoned`. Raises FileNotFoundError for
        an unknown name, ValueError for an offset outside.
        """
        checked = not_negative("offset", offset)
        action_required = true_or_false("action_required", action_required)
        return self._report(
            Report(name=self._name(memory), offset=checked, source=Source.INJECTED, action_required=action_required)
        )

    def report(
        self,
        name: str | Memory | None = None,
        offset: SupportsIndex | None = None,
        *,
        pfn: SupportsIndex | None = None,
        physical: SupportsIndex | None = None,
        pid: SupportsIndex | None = None,
        address: SupportsIndex | None = None,
        source: str = Source.APPLICATION,
        action_required: bool = False,
    ) -> Failure:
        """A real failure: a page is bad, named by `name` and `offset`, `pfn`, `physical` (an address), or `pid` and
        `address`. `source` says who found it; `action_required`: somebody has touched it.

        Returns what `inject` does; a page that is not the manager's is Ignored. Raises ValueError for none or several ways,
        PermissionError for frames where the manager is not root.
        """
        pairs = {"name": (name, "offset", offset), "pid": (pid, "address", address)}
        for first, (value, second, other) in pairs.items():
            if (value is None) != (other is None):
                raise ValueError(f"{first} needs {second}" if other is None else f"{second} needs {first}")
        given = {"offset": offset, "pfn": pfn, "physical": physical, "pid": pid, "address": address}
        numbers = {what: not_negative(what, number) for what, number in given.items() if number is not None}
        action_required = true_or_false("action_required", action_required)
        if not isinstance(source, str):
            raise TypeError(f"source is a str, not {type(source).__name__}")
        text("source", source)
        if [name, pfn, physical, pid].count(None) != 3:
            raise ValueError("report needs one of: name and offset, pfn=, physical=, pid= and address=")
        if source == Source.INJECTED:
            raise ValueError(f"source {source!r} is for simulated failures; use inject()")
        if physical is not None:
            numbers["pfn"] = numbers.pop("physical") // PAGE_SIZE
        called = None if name is None else self._name(name)
        return self._report(Report(name=called, source=source, action_required=action_required, **numbers))

    def _name(self, memory: str | Memory) -> str:
        if isinstance(memory, str):
            return name_of(memory) or ""
        if not isinstance(memory, Memory):
            raise TypeError(f"a memory, or the name of an object as a str, not {type(memory).__name__}")
        if memory.closed:
            raise ValueError(f"memory {memory.name!r} is closed; pass the name if another process has it open")
        if memory.instance != self.connection.welcome.instance:
            raise ValueError(f"memory {memory.name!r} is another manager's; an object here that has its name is not it")
        return memory.name

    def _report(self, report: Report) -> Failure:
        return self.connection.request(protocol.ReportPage(report, self.connection.new_number()), protocol.Handled).failure

    @property
    def capabilities(self) -> Capabilities:
        """What this manager can do for this process, see `Capabilities`."""
        welcome = self.connection.welcome
        return Capabilities(recovery=True, system_calls=not self.connection.user_mode, poison_markers=welcome.poison_markers)

    def notices(self) -> NoticeStream:
        """As `Memory.notices`, of everything that this process maps of the manager."""
        self.connection.check()
        return NoticeStream(self.notice_board, None)

    # --- what is and what was

    def objects(self) -> list[protocol.ObjectInfo]:
        """All objects of the manager; see `ObjectInfo`."""
        return self.connection.request(protocol.ListObjects(), protocol.ObjectList).objects

    def statistics(self) -> protocol.Statistics:
        """What has happened since the manager started; see `Statistics`."""
        return self.connection.request(protocol.GetStatistics(), protocol.StatisticsReply).statistics

    def events(self) -> Iterator[event_log.LoggedEvent]:
        """This manager's events, in order, from the log; see `LoggedEvent`."""
        path, instance = self.log_place()
        try:
            return event_log.read(path, instance=instance)
        except FileNotFoundError:
            # The manager writes it with the first event.
            return iter(())

    def log_place(self) -> tuple[Path, str]:
        """The event log's file, which has all events up to now, and what this manager's event ids begin with."""
        place = self.connection.request(protocol.SyncLog(), protocol.LogPlace)
        return Path(os.fsdecode(place.path)), place.instance

    # --- its life

    def restart(self) -> int:
        """Replace the manager by another one, of the version of hwpoison that is installed by now; its process id.

        Memories, views, losses and what is under way stay as they are: nobody notices more than a slow access. Raises
        OSError, and leaves the manager alone, if the version that is installed can't take over from it.
        """
        life = self.statistics().restarts + 1
        self.connection.request(protocol.Restart(life), protocol.Done)
        return self.pid

    def close(self) -> None:
        """Flush and unmap all memories. Those that still have views stay, and so does the manager; a ResourceWarning
        names them. Raises what `flush` raises: the first error, with notes that name the memories of others."""
        if self.connection.closed:
            return
        self._tell_watchers(closes=True)
        kept: dict[str, None] = {}
        errors: list[tuple[str, OSError]] = []
        for memory in list(self._open.values()):
            try:
                memory.close()
            except BufferError:
                kept[memory.name] = None
            except OSError as error:
                errors.append((memory.name, error))
        kept |= dict.fromkeys(self.connection.mapped())
        if not kept:
            self._say_goodbye()
        elif self.connection.when_unmapped is None:
            atexit.register(self.connection.abandon)
            self.connection.when_unmapped = self._end_if_unused
        try:
            if kept:
                warn(f"still in use, kept by their views: {', '.join(kept)}", ResourceWarning)
        finally:
            # Also where warnings are errors: it is said once, and the warning is its context.
            if errors:
                first, *others = errors
                for name, other in others:
                    first[1].add_note(f"hwpoison: and of {name!r}: {other}")
                raise first[1]

    def _say_goodbye(self) -> None:
        self.notice_board.close()
        self.connection.close()

    def _end_if_unused(self) -> None:
        """This was closed, and a mapping is gone, or a memory: the last one ends it."""
        if not self.connection.closed and not self.connection.mapped() and not len(self._open):
            with suppress(OSError):
                self._say_goodbye()

    def __enter__(self) -> Self:
        return self

    def __repr__(self) -> str:
        return f"<hwpoison.{type(self).__name__} process {self.pid} at {self.socket}>"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Manager(BaseManager):
    """A private manager process, for this process and those that it tells `socket`.

    `memory_limit` (bytes) is for the memory of all objects: anonymous pages are never dropped, those of files share what is
    left (64 stay in any case). `policy`: see `Policy`, for processes that have none of their own. `io_limit` (seconds): so
    long an access waits for its file; then it fails, and the page is lost, with that reason. `offline_foreign` (root): hand
    reports on frames that are not managed to the kernel.
    `without`: features of userfaultfd to do without as an older kernel must, for tests. Raises `UnsupportedError` where
    userfaultfd can't be had, saying what to do; with `required=False` there is a warning then, and plain shared memory with
    the same interface and without recovery (`capabilities` says so); not for a class that is derived from this one.
    """

    def __new__(cls, *arguments: Any, required: bool = True, **options: Any) -> Self:
        # A class that is derived from this one has methods of its own, which plain memory would not have.
        if not true_or_false("required", required) and cls is Manager:
            try:
                os.close(open_userfaultfd().fd)
            except UnsupportedError as error:
                return plain.Manager(required=False, why=str(error.strerror), **options)  # type: ignore[return-value]
        return super().__new__(cls)

    def __init__(
        self,
        *,
        required: bool = True,
        memory_limit: SupportsIndex | None = None,
        offline_foreign: bool = False,
        policy: Policy | str = Policy.LATE,
        io_limit: float = 30.0,
        without: Feature = NO_FEATURE,
    ) -> None:
        limit = memory_limit_of(memory_limit, PAGE_SIZE)
        if offline_foreign and os.geteuid():
            raise PermissionError("offline_foreign needs root: the kernel's hard offline does")
        # Where it can't be had, nothing is started.
        os.close(open_userfaultfd().fd)
        arguments = ["--policy", Policy(policy), "--io-limit", str(seconds_of("io_limit", io_limit))]
        if limit is not None:
            arguments += ["--memory-limit", str(limit)]
        if offline_foreign:
            arguments.append("--offline-foreign")
        if without:
            arguments += ["--without", str(without.name)]
        for attempts_left in reversed(range(START_ATTEMPTS)):
            try:
                connection = self._start(arguments, without)
                break
            except NoWelcomeError:
                # It was killed while it started, and there was nobody yet for whom another one would take over.
                if not attempts_left:
                    raise
        super().__init__(connection)
        try:
            connection.socket_name = self.statistics().socket
        except BaseException:
            self.close()
            raise
        connection.on_fork.append(self._not_this_ones_child)

    def _start(self, arguments: list[str], without: Feature) -> Connection:
        ours, theirs = pair()
        if theirs.fileno() <= 2:
            # This process has closed a standard descriptor. In the manager's that number is for what it is meant for.
            low, theirs = theirs, socket.socket(fileno=fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, 3))
            low.close()
        command = [sys.executable, "-P", "-m", "hwpoison.service.daemon", "--channel", str(theirs.fileno()), *arguments]
        with theirs:
            # A session of its own: what the terminal sends to this program is not meant for its memory.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # Where there was none at the start, its number may be anything now, a file with data for instance.
                stderr=None if sys.__stderr__ else subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        try:
            return Connection(ours, "", without=without)
        except BaseException:
            ours.close()
            self._process.kill()
            self._process.wait()
            raise

    def close(self) -> None:
        """As `BaseManager.close`; then the manager process ends, or with the last other process that uses it."""
        if self.connection.closed:
            return
        alone = True
        with suppress(OSError):
            alone = self.statistics().clients <= 1
        try:
            super().close()
        finally:
            if self.connection.closed:
                self._reaper().join(10 if alone else 0)
            else:
                self._reaper()

    def _not_this_ones_child(self, _: object) -> None:
        # In a forked child. There is nothing to wait for.
        self._process.returncode = 0

    def _reaper(self) -> threading.Thread:
        """Whoever ends last, the process is waited for."""
        reaper = threading.Thread(target=self._process.wait, name="hwpoison-reaper", daemon=True)
        reaper.start()
        return reaper


class SharedManager(BaseManager):
    """A manager that others use too; made by `connect`."""


def connect(socket: str | os.PathLike[str] | None = None, *, maps: bool = True) -> SharedManager:
    """The manager at `socket` (a path, or an abstract name that begins with @), by default at `$HWPOISON_SOCKET`.

    `maps=False` is for tools that only ask and report: no userfaultfd is needed. Raises ConnectionError, and PermissionError
    if it is another user's.
    """
    if socket is not None and not isinstance(socket, (str, os.PathLike)):
        raise TypeError(f"a manager's socket is a str or a path, not {type(socket).__name__}")
    socket_name = os.fspath(socket or "") or os.environ.get(SOCKET_VARIABLE)
    if not socket_name:
        raise ConnectionError(f"no manager is named: pass its socket, or set {SOCKET_VARIABLE} (hwpoison run does)")
    if not isinstance(socket_name, str):
        raise TypeError(f"a manager's socket is a path of str, not of {type(socket_name).__name__}")
    if socket_name.startswith(plain.PREFIX):
        return plain.connect(socket_name)  # type: ignore[return-value]
    if "\0" in socket_name:
        raise ValueError(f"a manager's socket has no NUL in its name: {socket_name!r}")
    if not socket_name.startswith("@"):
        socket_name = os.path.abspath(socket_name)
    for attempts_left in reversed(range(CONNECT_ATTEMPTS)):
        try:
            return SharedManager(Connection(_connected(socket_name), socket_name, maps=maps))
        except NoWelcomeError:
            if not attempts_left:
                raise
    raise AssertionError("the last attempt has raised")


def _connected(socket_name: str) -> Socket:
    channel = Socket(AF_UNIX, SOCK_SEQPACKET)
    try:
        channel.connect(protocol.address_of(socket_name))
    except PermissionError as error:
        channel.close()
        raise PermissionError(error.errno, _whose(socket_name)) from error
    except OSError as error:
        channel.close()
        why = f"no manager serves at {socket_name}: {error.strerror or error}; start one with hwpoison serve"
        raise ConnectionError(error.errno or errno.EINVAL, why) from error
    return channel


def _whose(socket_name: str) -> str:
    """Why it can't be had."""
    try:
        owner = Path(socket_name).stat().st_uid
    except OSError:
        return f"the socket {socket_name} is in a folder that user {os.geteuid()} has no access to; ask whose it is"
    return (
        f"the manager at {socket_name} is that of user {owner}: it serves that user and root, not user {os.geteuid()}; "
        "start one of your own with hwpoison serve"
    )


# Where memory can't be managed, what there is instead is one of these to a program all the same.
BaseManager.register(plain.BaseManager)
Manager.register(plain.Manager)
SharedManager.register(plain.SharedManager)

_shared: list[SharedManager] = []
"""Those that were connected for pickled memories: nobody else keeps them."""


def attach_pickled(socket_name: str, instance: str, name: str, number: int) -> Memory:
    """What a pickled `Memory` becomes: attached in this process, through the connection that it has to that manager.

    Raises FileNotFoundError if that object is no more, whatever has its name by now.
    """
    for manager in all_managers():
        if manager.connection.welcome.instance == instance:
            return manager._attach_object(name, number)
    manager = connect(socket_name)
    if manager.connection.welcome.instance != instance:
        manager.close()
        raise FileNotFoundError(f"the manager that had memory {name!r} has ended; the one at {socket_name} is another")
    _shared.append(manager)
    return manager._attach_object(name, number)
