"""The same interface where memory can't be managed: plain shared memory, without recovery. Nothing here is Linux's alone.

`Manager(required=False)` is this where userfaultfd can't be had, and on other systems. What fails is as it is without
hwpoison: nothing is isolated, read again or told, and nothing is ever lost as far as is known here. Objects are files in a
folder that goes with the process that has made the manager; others `connect` to that, or are sent the `Memory` by pickling.
Who has an object open has a lock on its file, so the last one takes it away.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import socket
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self
from urllib.parse import quote

from hwpoison.checking import (
    MEMORY_LIMIT_MAX,
    as_bytes,
    memory_limit_of,
    name_of,
    range_of,
    seconds_of,
    stack_level,
    true_or_false,
    whole,
)
from hwpoison.core.records import Capabilities, Failure, Policy
from hwpoison.errors import Range, UnsupportedError
from hwpoison.protocol import ObjectInfo, Statistics

if TYPE_CHECKING:
    import numpy
    import numpy.typing

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:
    # Windows. Objects go with their folder there.
    fcntl = None

PREFIX = "plain:"
"""What the `socket` of such a manager begins with."""
OTHER_SYSTEM = f"memory is managed on Linux only, and this is {sys.platform}"
Content = bytes | bytearray | memoryview
PERSISTENT = ".persistent"
"""What stands beside the file of an object that stays without anybody who has it open."""

WHY = "why"
"""The file that says why memory is not managed."""

_warned = False


def _warn(why: str) -> None:
    """Once for the process."""
    global _warned  # noqa: PLW0603
    if not _warned:
        _warned = True
        said = f"hwpoison manages no memory here, so nothing of it is recovered: {why}"
        warnings.warn(said, RuntimeWarning, stacklevel=stack_level())


def _lock(fd: int) -> None:
    """Of who has an object's file open, for as long as that is. Raises FileNotFoundError if the last one has just gone."""
    if fcntl is not None:
        fcntl.flock(fd, fcntl.LOCK_SH)
        if not os.fstat(fd).st_nlink:
            raise FileNotFoundError


def _let_go(fd: int, path: str, owner: int) -> None:
    """Of the file of an object that nobody has in this process any more."""
    if os.getpid() == owner:
        if fcntl is not None:
            # Of the mapping too, which has a copy: when the interpreter ends it is still there.
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)
        _remove_if_unused(path)


def _remove_if_unused(path: str) -> None:
    if fcntl is not None and not os.path.exists(path + PERSISTENT):
        with suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)


def _remove_folder(folder: str, owner: int) -> None:
    # Where a mapped file can't be deleted, it stays. A forked child's is not its to take away.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


class Handle:
    """Of a function that will not be called."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def cancel(self) -> None:
        """Nothing to do."""

    def __call__(self, notice: object) -> object:
        return self._function(notice)


class NoticeStream:
    """No notices: iterating ends at once, and the descriptor is never readable."""

    def __init__(self) -> None:
        self._ours, self._other = socket.socketpair()

    def fileno(self) -> int:
        return self._ours.fileno()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        raise StopIteration

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        raise StopAsyncIteration

    def close(self) -> None:
        self._ours.close()
        self._other.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Mark(NamedTuple):
    """As `app.view.Mark`: nothing is ever met."""

    inherited: tuple[Range, ...] = ()
    seen: int = 0


class View:
    """As `app.view.GuardedView` and `Visit`, for `guard`."""

    mark = Mark()

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    @property
    def buffer(self) -> memoryview:
        return self._memory.buffer.toreadonly()

    @property
    def address(self) -> int:
        return self._memory.address

    def unseen(self, seen: int) -> bool:
        return False

    def leave(self) -> list[Range]:
        return []

    def told(self) -> None:
        pass

    def end(self) -> None:
        pass


class _Mapping(mmap.mmap):
    """May keep its memory."""

    memory: Memory | None = None


_memories: weakref.WeakSet[Memory] = weakref.WeakSet()


def all_memories() -> list[Memory]:
    """Those of this process that are open."""
    return [one for one in _memories if not one.closed]


class Memory:
    """As `hwpoison.Memory`; nothing of it is ever lost as far as is known here."""

    def __init__(self, manager: Manager, path: str, name: str, kind: str, mode: str, offset: int, nbytes: int) -> None:
        self._manager = manager
        self._opened = (path, name, kind, mode, offset, nbytes)
        self.name = name
        self.nbytes = nbytes
        self.kind = kind
        self.writable = mode == "r+"
        self.closed = False
        self._policy: Policy | None = None
        self._at = offset % mmap.ALLOCATIONGRANULARITY
        access = mmap.ACCESS_WRITE if self.writable else mmap.ACCESS_READ
        fd = os.open(path, (os.O_RDWR if self.writable else os.O_RDONLY) | getattr(os, "O_BINARY", 0))
        try:
            if kind == "anonymous":
                _lock(fd)
            self._mapping = _Mapping(fd, nbytes + self._at, access=access, offset=offset - self._at)
        except BaseException:
            os.close(fd)
            raise
        self._over: Callable[[], object] = int
        if kind == "anonymous":
            # Views keep the mapping, and the object with it.
            self._over = weakref.finalize(self._mapping, _let_go, fd, path, os.getpid())
        else:
            os.close(fd)
        _memories.add(self)

    @property
    def manager(self) -> Manager:
        return self._manager

    @property
    def buffer(self) -> memoryview:
        self._check_open()
        return memoryview(self._mapping)[self._at : self._at + self.nbytes]

    def __buffer__(self, flags: int, /) -> memoryview:
        return self.buffer

    @property
    def address(self) -> int:
        with self.buffer as view:
            import numpy  # noqa: PLC0415  (it takes long to load)

            return int(numpy.frombuffer(view, "u1").__array_interface__["data"][0])

    def addresses(self) -> list[int]:
        return [self.address]

    def array(
        self,
        dtype: numpy.typing.DTypeLike = "u1",
        shape: int | tuple[int, ...] | None = None,
        *,
        offset: int = 0,
        order: Literal["C", "F"] = "C",
    ) -> numpy.ndarray[Any, Any]:
        from hwpoison.extents import array_over  # noqa: PLC0415

        return array_over(self.buffer, dtype, shape, offset, order)

    def _visit(self, *, tells: bool = True) -> tuple[View, View]:
        """For `hwpoison.guard`."""
        view = View(self)
        return view, view

    def read(self, offset: int, nbytes: int) -> bytes:
        return bytes(self.buffer[self._range(offset, nbytes)])

    def write(self, offset: int, data: Content) -> None:
        view = as_bytes(data)
        place = self._range(offset, len(view))
        if not self.writable:
            raise PermissionError(errno.EACCES, f"{self.name!r} is open read-only; open it with mode 'r+'")
        self.buffer[place] = view

    def prefetch(self, offset: int = 0, nbytes: int | None = None) -> None:
        self._range(offset, nbytes)

    @contextmanager
    def resident(self, offset: int = 0, nbytes: int | None = None, write: bool = False) -> Iterator[memoryview]:
        place = self._range(offset, nbytes)
        if true_or_false("write", write) and not self.writable:
            raise PermissionError(f"memory {self.name!r} is read-only; open it with mode 'r+'")
        part = self.buffer[place]
        with part if write else part.toreadonly() as view:
            yield view

    def flush(self) -> None:
        self._check_open()
        if self.writable and self.kind == "file":
            self._mapping.flush()

    def lost(self) -> list[Range]:
        self._check_open()
        return []

    def repair(self, offset: int, data: Content) -> int:
        self._range(offset, len(as_bytes(data)))
        return 0

    def discard(self, offset: int = 0, nbytes: int | None = None) -> int:
        self._range(offset, nbytes)
        return 0

    def notices(self) -> NoticeStream:
        self._check_open()
        return NoticeStream()

    def on_failure(self, function: Callable[[Any], object]) -> Handle:
        self._check_open()
        if not callable(function):
            raise TypeError(f"on_failure needs a function, not {type(function).__name__}")
        return Handle(function)

    @property
    def policy(self) -> Policy:
        return self._policy or self._manager.policy

    @policy.setter
    def policy(self, policy: Policy | str | None) -> None:
        self._policy = None if policy is None else Policy(policy)

    def _kept_by_views(self) -> None:
        """As of `hwpoison.Memory`: the mapping, which they keep, keeps this."""
        self._mapping.memory = self

    def close(self) -> None:
        if self.closed:
            return
        self.flush()
        try:
            self._mapping.close()
        except BufferError:
            raise BufferError(f"{self.name!r} has views (arrays or memoryviews); delete them before close()") from None
        self.closed = True
        self._over()
        self._manager._open.pop(id(self), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[..., Memory], tuple[Any, ...]]:
        self._check_open()
        path, _, kind, *_ = self._opened
        return _opened_again, (self._manager.socket, os.stat(path).st_ino if kind == "anonymous" else 0, *self._opened)

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"memory {self.name!r} is closed")

    def _range(self, offset: int, nbytes: int | None) -> slice:
        self._check_open()
        offset, nbytes = range_of(self.name, self.nbytes, offset, nbytes)
        return slice(offset, offset + nbytes)


def _opened_again(socket_name: str, inode: int, path: str, name: str, *opened: Any) -> Memory:
    manager = connect(socket_name)
    if inode and (not os.path.exists(path) or os.stat(path).st_ino != inode):
        raise FileNotFoundError(f"memory {name!r} is no more")
    return manager._memory(path, name, *opened)


class Manager:
    """As `hwpoison.Manager`, without a process of its own. The options of that are checked, and make no difference."""

    def __init__(
        self,
        *,
        memory_limit: int | None = None,
        offline_foreign: bool = False,
        policy: Policy | str = Policy.LATE,
        io_limit: float = 30.0,
        required: bool = True,
        without: int = 0,
    ) -> None:
        memory_limit_of(memory_limit, mmap.PAGESIZE)
        true_or_false("offline_foreign", offline_foreign)
        seconds_of("io_limit", io_limit)
        policy = Policy(policy)
        if true_or_false("required", required):
            raise UnsupportedError(f"{OTHER_SYSTEM}; with Manager(required=False) programs run without recovery")
        self._begin(OTHER_SYSTEM, policy)

    def _begin(self, why: str, policy: Policy, folder: str | None = None) -> None:
        """`folder`: that of the manager that it is the way to; None: this is that manager."""
        self._end: Callable[[], object] = int
        if folder is None:
            _warn(why)
            folder = tempfile.mkdtemp(prefix="hwpoison-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
            Path(folder, WHY).write_text(why)
            self._end = weakref.finalize(self, _remove_folder, folder, os.getpid())
        self._folder = folder
        self._open: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()
        self._mapped: weakref.WeakKeyDictionary[_Mapping, str] = weakref.WeakKeyDictionary()
        """Those too of which nothing is left but views."""
        self.socket = PREFIX + self._folder
        self.pid = os.getpid()
        self.policy = policy
        self.closed = False
        self.capabilities = Capabilities(recovery=False, system_calls=True, poison_markers=False, reason=why)

    def _path(self, name: str) -> str:
        if self.closed:
            raise ConnectionError("the manager was closed; open a new one with Manager() or connect()")
        return os.path.join(self._folder, quote(name_of(name) or "", safe="") + ".memory")

    def _memory(self, *opened: Any) -> Memory:
        if self.closed:
            raise ConnectionError("the manager was closed; open a new one with Manager() or connect()")
        memory = Memory(self, *opened)
        self._open[id(memory)] = memory
        self._mapped[memory._mapping] = memory.name
        return memory

    def allocate(
        self, nbytes: int, name: str | None = None, *, persistent: bool = False, populate: bool | None = None
    ) -> Memory:
        nbytes = whole("nbytes", nbytes)
        if nbytes < 1:
            raise ValueError(f"{nbytes} bytes: an object has at least 1")
        if populate is not None:
            true_or_false("populate", populate)
        if true_or_false("persistent", persistent) and name is None:
            raise ValueError("persistent memory needs a name, by which it can be attached again: pass name=")
        if nbytes > MEMORY_LIMIT_MAX:
            raise ValueError(f"{nbytes} bytes: an object has at most {MEMORY_LIMIT_MAX}")
        for one in map("anonymous-{}".format, count(1)) if name is None else (name, name):
            path = self._path(one)
            # Of a process that was killed, perhaps.
            _remove_if_unused(path)
            with suppress(FileExistsError):
                return self._made(path, one, nbytes, persistent=persistent)
        raise FileExistsError(f"the name {name!r} is taken by another object; pass another name=, or attach({name!r})")

    def _made(self, path: str, name: str, nbytes: int, *, persistent: bool) -> Memory:
        with open(path, "xb") as file:
            try:
                _lock(file.fileno())
            except FileNotFoundError:
                # Who has found it unlocked has taken it away.
                raise FileExistsError from None
            try:
                file.truncate(nbytes)
                if persistent:
                    Path(path + PERSISTENT).touch()
                return self._memory(path, name, "anonymous", "r+", 0, nbytes)
            except BaseException as error:
                for one in (path, path + PERSISTENT):
                    with suppress(OSError):
                        os.unlink(one)
                if isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.EFBIG, errno.ENOSPC):
                    raise MemoryError(f"{nbytes} bytes do not fit: {error.strerror}") from None
                raise

    def attach(self, name: str) -> Memory:
        for one in list(self._open.values()):
            if one.name == name and one.kind == "file":
                return self._memory(*one._opened)
        path = self._path(name)
        try:
            # Of one that is just being made there are no bytes yet.
            if nbytes := os.path.getsize(path):
                return self._memory(path, name, "anonymous", "r+", 0, nbytes)
        except FileNotFoundError:
            pass
        raise FileNotFoundError(f"there is no object {name!r}")

    def open(
        self,
        path: str | os.PathLike[str],
        mode: Literal["r", "r+"] = "r",
        offset: int = 0,
        nbytes: int | None = None,
        *,
        name: str | None = None,
    ) -> Memory:
        if mode not in ("r", "r+"):
            raise ValueError(f"mode {mode!r}: a file is opened 'r' or 'r+'")
        place = os.path.abspath(path)
        size = os.path.getsize(place)
        offset, nbytes = range_of(place, size, offset, nbytes)
        if not nbytes:
            raise ValueError(f"{nbytes} bytes of {place!r}: an object has at least 1")
        return self._memory(place, name_of(name) or place, "file", mode, offset, nbytes)

    def unlink(self, name: str) -> None:
        path = self._path(name)
        try:
            os.unlink(path + PERSISTENT)
        except FileNotFoundError:
            if not os.path.exists(path):
                raise FileNotFoundError(f"there is no object {name!r}") from None
        _remove_if_unused(path)

    def inject(self, memory: str | Memory, offset: int, action_required: bool = False) -> Failure:
        raise UnsupportedError(f"a failure can't be simulated: {self.capabilities.reason}")

    def report(self, *arguments: object, **named: object) -> Failure:
        raise UnsupportedError(f"a failure can't be handled: {self.capabilities.reason}")

    def notices(self) -> NoticeStream:
        return NoticeStream()

    def objects(self) -> list[ObjectInfo]:
        return [
            ObjectInfo(
                name=one.name, kind=one.kind, mode="r+" if one.writable else "r",
                persistent=os.path.exists(one._opened[0] + PERSISTENT), nbytes=one.nbytes,
                present=one.nbytes, dirty=0, lost=0, mappings=1, pids=[os.getpid()],
            )
            for one in list(self._open.values())
        ]  # fmt: skip

    def statistics(self) -> Statistics:
        present = sum(one.nbytes for one in list(self._open.values()))
        return Statistics(
            pid=self.pid, page_size=mmap.PAGESIZE, socket=self.socket, memory_limit=None, memory_present=present, keeper=0,
            restarts=0, clients=1, objects=len(self._open), outcomes={}, states={}, quarantined=0, faults=0, read=0,
            written=0, dropped=0, accesses_to_lost=0, events_dropped=0,
        )  # fmt: skip

    def events(self) -> Iterator[Any]:
        return iter(())

    def log_place(self) -> tuple[Path, str]:
        return Path(os.devnull), ""

    def restart(self) -> int:
        return self.pid

    def close(self) -> None:
        if self.closed:
            return
        for memory in list(self._open.values()):
            with suppress(BufferError):
                memory.close()
        kept = [name for mapping, name in list(self._mapped.items()) if not mapping.closed]
        self.closed = True
        self._end()
        if kept:
            warnings.warn(f"still in use, kept by their views: {', '.join(kept)}", ResourceWarning, stacklevel=stack_level())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


BaseManager = SharedManager = Manager


def unmanaged(why: str, *, policy: Policy | str = Policy.LATE, **options: Any) -> Manager:
    """What `Manager(required=False)` is where userfaultfd can't be had; `why` says why. Raises what `Manager` does."""
    try:
        Manager(policy=policy, **options)
    except UnsupportedError:
        # The options are right, then.
        pass
    manager = Manager.__new__(Manager)
    manager._begin(why, Policy(policy))
    return manager


def connect(socket: str | os.PathLike[str] | None = None, *, maps: bool = True) -> Manager:
    """The plain manager that has this `socket`."""
    name = os.fspath(socket or "") or os.environ.get("HWPOISON_SOCKET", "")
    if not name.startswith(PREFIX) or not os.path.isdir(name.removeprefix(PREFIX)):
        raise ConnectionError(f"no manager answers at {name or 'no socket'}: {OTHER_SYSTEM}")
    manager = Manager.__new__(Manager)
    folder = name.removeprefix(PREFIX)
    manager._begin(Path(folder, WHY).read_text(), Policy.LATE, folder)
    return manager


# --- where nothing else of hwpoison can be loaded


class SafeView:
    """As `hwpoison.SafeView`."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    @property
    def buffer(self) -> memoryview:
        return self.memory.buffer.toreadonly()

    def array(self, *arguments: Any, **named: Any) -> numpy.ndarray[Any, Any]:
        array = self.memory.array(*arguments, **named)
        array.flags.writeable = False
        return array

    def check(self) -> None:
        pass


@contextmanager
def guard(*memories: Memory) -> Iterator[Any]:
    """As `hwpoison.guard`: nothing lost is ever met."""
    if not memories:
        raise ValueError("guard() needs at least one memory")
    views = tuple(map(SafeView, memories))
    yield views[0] if len(views) == 1 else views


def set_policy(policy: Policy | str | None) -> None:
    """As `hwpoison.set_policy`."""
    if policy is not None:
        Policy(policy)


class Location(NamedTuple):
    """Bytes `offset` to `offset + nbytes` of `memory`."""

    memory: Memory
    offset: int
    nbytes: int


def locate(array: object) -> Location:
    """As `hwpoison.locate`."""
    from hwpoison.extents import as_array, extent  # noqa: PLC0415

    begin, end = extent(as_array(array))
    for memory in all_memories():
        address = memory.address
        if address <= begin and end <= address + memory.nbytes:
            return Location(memory, begin - address, end - begin)
    raise ValueError(
        f"the {type(array).__name__} at {begin:#x} does not lie in the memory of a manager that is open in this process (a "
        "view alone is not enough: keep its Memory)"
    )


def lost(array: object) -> numpy.ndarray[Any, Any]:
    """As `hwpoison.lost`: none."""
    import numpy  # noqa: PLC0415

    locate(array)
    return numpy.empty(0, numpy.intp)


def load(
    path: str | os.PathLike[str], mode: Literal["r", "r+"] = "r", *, manager: Manager | None = None
) -> numpy.ndarray[Any, Any]:
    """As `hwpoison.load`."""
    from hwpoison.extents import header_of  # noqa: PLC0415

    found = header_of(path)
    memory = (manager or Manager()).open(path, mode)
    array = memory.array(found.dtype, found.shape, offset=found.offset, order=found.order)
    memory._kept_by_views()
    return array
