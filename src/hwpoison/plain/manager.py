"""`Manager` and `connect`, where memory can't be managed: no process, but a folder of files."""

from __future__ import annotations

import errno
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, SupportsIndex

from hwpoison.checking import MEMORY_LIMIT_MAX, memory_limit_of, name_of, range_of, seconds_of, true_or_false, whole
from hwpoison.core.records import Capabilities, Failure, Policy
from hwpoison.errors import UnsupportedError, warn
from hwpoison.plain.folder import GONE, Folder, Held, make_folder
from hwpoison.plain.memory import Mapping, Memory, mapped
from hwpoison.plain.notices import Handle, NoticeStream
from hwpoison.protocol import ObjectInfo, Statistics

PREFIX = "plain:"
"""What the `socket` of such a manager begins with."""
OTHER_SYSTEM = f"memory is managed on Linux only, and this is {sys.platform}"

_managers: weakref.WeakValueDictionary[int, BaseManager] = weakref.WeakValueDictionary()


def _all_managers() -> list[BaseManager]:
    found = [reference() for reference in _managers.valuerefs()]
    return [one for one in found if one is not None]


_warned: list[bool] = []
"""Not empty: this process has been told."""


class BaseManager:
    """As `hwpoison.BaseManager`, without a process of its own."""

    def __init__(self, folder: Folder, policy: Policy) -> None:
        self._folder = folder
        self._open: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()
        self._mapped: weakref.WeakValueDictionary[int, Mapping] = weakref.WeakValueDictionary()
        """Those too of which nothing is left but views."""
        self._streams: weakref.WeakSet[NoticeStream] = weakref.WeakSet()
        self._handles: list[Handle] = []
        self._end: Callable[[], object] = int
        """What takes the folder away, if this is who has made it."""
        self.socket = PREFIX + folder.path
        self.pid = os.getpid()
        self._policy = policy
        self.closed = False
        self.capabilities = Capabilities(recovery=False, system_calls=True, poison_markers=False, reason=folder.why)
        _managers[id(self)] = self

    def _memory(self, held: Held) -> Memory:
        try:
            memory = Memory(self, held)
        except BaseException:
            held.let_go()
            raise
        self._open[id(memory)] = memory
        self._mapped[id(memory._mapping)] = memory._mapping
        return memory

    def allocate(
        self, nbytes: SupportsIndex, name: str | None = None, *, persistent: bool = False, populate: bool | None = None
    ) -> Memory:
        self._check_open()
        nbytes = whole("nbytes", nbytes)
        if populate is not None:
            true_or_false("populate", populate)
        if true_or_false("persistent", persistent) and name is None:
            raise ValueError("persistent memory needs a name, by which it can be attached again: pass name=")
        if nbytes < 1:
            raise ValueError(f"an object has at least 1 byte, not {nbytes}")
        if nbytes > MEMORY_LIMIT_MAX:
            raise MemoryError(f"{nbytes} bytes: an object has at most {MEMORY_LIMIT_MAX}")
        held = None
        try:
            held = self._folder.add(name_of(name), "anonymous", "r+", "", 0, nbytes, persistent=persistent)
            return self._memory(held)
        except OSError as error:
            if held is not None and persistent:
                self._folder.unlink(held.entry.name)
            if error.errno in (errno.ENOMEM, errno.EFBIG, errno.ENOSPC):
                raise MemoryError(f"{nbytes} bytes do not fit: {error.strerror}") from None
            raise

    def attach(self, name: str) -> Memory:
        self._check_open()
        return self._memory(self._folder.find(name_of(name) or ""))

    def open(
        self,
        path: str | os.PathLike[str],
        mode: Literal["r", "r+"] = "r",
        offset: SupportsIndex = 0,
        nbytes: SupportsIndex | None = None,
        *,
        name: str | None = None,
    ) -> Memory:
        self._check_open()
        if mode not in ("r", "r+"):
            raise ValueError(f"mode {mode!r}: a file is opened 'r' or 'r+'")
        place = os.path.abspath(os.fsdecode(path))
        if os.path.isdir(place):
            raise IsADirectoryError(errno.EISDIR, f"{place!r} is a directory; an object needs a regular file")
        first, length = range_of(place, os.path.getsize(place), offset, nbytes)
        if not length:
            raise ValueError(f"{place!r} is empty there; an object has at least 1 byte")
        called = name_of(name) or os.fsencode(place).decode("utf-8", "backslashreplace")
        wanted = (called, "file", mode, place, first, length)
        try:
            held = self._folder.add(*wanted, persistent=False)
        except FileExistsError:
            held = self._folder.find(called)
            if held.entry != wanted:
                held.let_go()
                raise
        return self._memory(held)

    def unlink(self, name: str) -> None:
        self._check_open()
        self._folder.unlink(name_of(name) or "")

    def inject(self, memory: str | Memory, offset: SupportsIndex, action_required: bool = False) -> Failure:
        self._check_open()
        raise UnsupportedError(f"a failure can't be simulated: {self.capabilities.reason}")

    def report(self, *arguments: object, **named: object) -> Failure:
        self._check_open()
        raise UnsupportedError(f"a failure can't be handled: {self.capabilities.reason}")

    def notices(self) -> NoticeStream:
        self._check_open()
        return NoticeStream(self._streams, self)

    def objects(self) -> list[ObjectInfo]:
        self._check_open()
        ours = mapped(self.socket)
        return [
            ObjectInfo(
                name=one.name, kind=one.kind, mode=one.mode, persistent=persistent, nbytes=one.nbytes, present=one.nbytes,
                dirty=0, lost=0, mappings=ours.count(one.name), pids=[os.getpid()] if one.name in ours else [],
            )
            for one, persistent in self._folder.entries()
        ]  # fmt: skip

    def statistics(self) -> Statistics:
        self._check_open()
        objects = self._folder.entries()
        return Statistics(
            pid=self.pid, page_size=mmap.PAGESIZE, socket=self.socket, memory_limit=None,
            memory_present=sum(one.nbytes for one, _ in objects), keeper=0, restarts=0, clients=1, objects=len(objects),
            outcomes={}, states={}, quarantined=0, faults=0, read=0, written=0, dropped=0, accesses_to_lost=0,
            events_dropped=0,
        )  # fmt: skip

    def events(self) -> Iterator[Any]:
        self._check_open()
        return iter(())

    def log_place(self) -> tuple[Path, str]:
        self._check_open()
        return Path(os.devnull), ""

    def restart(self) -> int:
        self._check_open()
        return self.pid

    def close(self) -> None:
        if self.closed:
            return
        for memory in list(self._open.values()):
            with suppress(BufferError):
                memory.close()
        kept = dict.fromkeys(one.name for one in list(self._mapped.values()) if not one.closed)
        self.closed = True
        for stream in list(self._streams):
            stream.close()
        self._end()
        if kept:
            warn(f"still in use, kept by their views: {', '.join(kept)}", ResourceWarning)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<hwpoison.{type(self).__name__} at {self.socket}, without recovery>"

    def _check_open(self) -> None:
        if self.closed:
            raise ConnectionError("the manager was closed; open a new one with Manager() or connect()")


class Manager(BaseManager):
    """As `hwpoison.Manager`. Its options are checked, and make no difference."""

    def __init__(
        self,
        *,
        memory_limit: int | None = None,
        offline_foreign: bool = False,
        policy: Policy | str = Policy.LATE,
        io_limit: float = 30.0,
        required: bool = True,
        without: int = 0,
        why: str = OTHER_SYSTEM,
    ) -> None:
        memory_limit_of(memory_limit, mmap.PAGESIZE)
        true_or_false("offline_foreign", offline_foreign)
        seconds_of("io_limit", io_limit)
        policy = Policy(policy)
        if true_or_false("required", required):
            raise UnsupportedError(f"{why}; with Manager(required=False) programs run without recovery")
        if not _warned:
            _warned.append(True)
            warn(f"hwpoison manages no memory here, so nothing of it is recovered: {why}", RuntimeWarning)
        folder = make_folder(why, policy)
        super().__init__(folder, policy)
        self._end = weakref.finalize(self, folder.remove)


class SharedManager(BaseManager):
    """As `hwpoison.SharedManager`."""


def connect(socket: str | os.PathLike[str] | None = None, *, maps: bool = True) -> SharedManager:
    """The plain manager that has this `socket`."""
    name = os.fspath(socket or "") or os.environ.get("HWPOISON_SOCKET", "")
    folder = name.removeprefix(PREFIX)
    if not name.startswith(PREFIX):
        raise ConnectionError(f"no manager answers at {name or 'no socket'}: {OTHER_SYSTEM}")
    try:
        known = Folder(folder)
        return SharedManager(known, Policy(known.policy))
    except FileNotFoundError:
        raise ConnectionError(GONE.format(folder)) from None


def attach_pickled(socket_name: str, name: str, number: int) -> Memory:
    """What a pickled `Memory` becomes. Raises FileNotFoundError if that object is no more."""
    known = (one for one in _all_managers() if one.socket == socket_name and not one.closed)
    memory = (next(known, None) or connect(socket_name)).attach(name)
    if memory.object_number != number:
        memory.close()
        raise FileNotFoundError(errno.ENOENT, f"memory {name!r} is no more")
    return memory
