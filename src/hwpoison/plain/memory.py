"""`Memory`, where memory can't be managed: a mapping of a file."""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

from hwpoison.checking import Data, as_bytes, range_of, true_or_false, whole_pages
from hwpoison.core.records import Notice, Policy
from hwpoison.errors import Range
from hwpoison.extents import array_over, as_array, extent
from hwpoison.plain.folder import Held
from hwpoison.plain.guard import View
from hwpoison.plain.notices import Handle, NoticeStream, policy_of

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    from hwpoison.plain.manager import BaseManager


class Mapping(mmap.mmap):
    """May keep its memory."""

    memory: Memory | None = None
    socket = name = ""
    """Of its manager, and of its object."""


_memories: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()
_mappings: weakref.WeakValueDictionary[int, Mapping] = weakref.WeakValueDictionary()


def all_memories() -> list[Memory]:
    """Those of this process that are open."""
    found = [reference() for reference in _memories.valuerefs()]
    return [one for one in found if one is not None and not one.closed]


def mapped(socket: str) -> list[str]:
    """The names of what this process maps of a manager, also where nothing is left of it but views."""
    found = [reference() for reference in _mappings.valuerefs()]
    return [one.name for one in found if one is not None and not one.closed and one.socket == socket]


class Memory:
    """As `hwpoison.Memory`; nothing of it is ever lost as far as is known here."""

    def __init__(self, manager: BaseManager, held: Held) -> None:
        self._manager = manager
        entry = held.entry
        self.name = entry.name
        self.nbytes = entry.nbytes
        self.kind = entry.kind
        self.writable = entry.mode == "r+"
        self.object_number = held.number
        self.instance = manager.socket
        self.closed = False
        self._policy: Policy | None = None
        self._streams: weakref.WeakSet[NoticeStream] = weakref.WeakSet()
        self._at = entry.offset % mmap.ALLOCATIONGRANULARITY
        access = mmap.ACCESS_WRITE if self.writable else mmap.ACCESS_READ
        fd = os.open(entry.path, (os.O_RDWR if self.writable else os.O_RDONLY) | getattr(os, "O_BINARY", 0))
        try:
            self._mapping = Mapping(fd, entry.nbytes + self._at, access=access, offset=entry.offset - self._at)
        finally:
            os.close(fd)
        self._mapping.socket, self._mapping.name = manager.socket, entry.name
        # Views keep the mapping, and the object with it.
        self._over = weakref.finalize(self._mapping, held.let_go)
        with self.buffer as view:
            self.address = extent(as_array(view))[0]
        self._visits: weakref.WeakSet[View] = weakref.WeakSet()
        _mappings[id(self._mapping)] = self._mapping
        _memories[id(self)] = self

    @property
    def manager(self) -> BaseManager:
        return self._manager

    @property
    def buffer(self) -> memoryview:
        self._check_open()
        return memoryview(self._mapping)[self._at : self._at + self.nbytes]

    def __buffer__(self, flags: int, /) -> memoryview:
        return self.buffer

    def addresses(self) -> list[int]:
        return [self.address]

    def array(
        self,
        dtype: numpy.typing.DTypeLike = "u1",
        shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
        *,
        offset: SupportsIndex = 0,
        order: Literal["C", "F"] = "C",
    ) -> numpy.ndarray[Any, Any]:
        return array_over(self.buffer, dtype, shape, offset, order)

    def _visit(self, *, tells: bool = True) -> tuple[View, View]:
        """For `hwpoison.guard`."""
        self._check_open()
        view = View(self, self._visits)
        return view, view

    def read(self, offset: SupportsIndex, nbytes: SupportsIndex) -> bytes:
        return bytes(self.buffer[self._range(offset, nbytes)])

    def write(self, offset: SupportsIndex, data: Data) -> None:
        view = as_bytes(data)
        place = self._range(offset, len(view))
        if not self.writable:
            raise PermissionError(errno.EACCES, f"{self.name!r} is open read-only; open it with mode 'r+'")
        self.buffer[place] = view

    def prefetch(self, offset: SupportsIndex = 0, nbytes: SupportsIndex | None = None) -> None:
        self._range(offset, nbytes)

    @contextmanager
    def resident(
        self, offset: SupportsIndex = 0, nbytes: SupportsIndex | None = None, write: bool = False
    ) -> Iterator[memoryview]:
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

    def repair(self, offset: SupportsIndex, data: Data) -> int:
        place = self._range(offset, len(as_bytes(data)))
        whole_pages(self.name, self.nbytes, place.start, place.stop, mmap.PAGESIZE)
        if not self.writable and place.start < place.stop:
            raise PermissionError(errno.EACCES, f"{self.name!r} is open read-only; open it with mode 'r+'")
        return 0

    def discard(self, offset: SupportsIndex = 0, nbytes: SupportsIndex | None = None) -> int:
        self._range(offset, nbytes)
        return 0

    def notices(self) -> NoticeStream:
        self._check_open()
        return NoticeStream(self._streams, self)

    def on_failure(self, function: Callable[[Notice], object]) -> Handle:
        self._check_open()
        if not callable(function):
            raise TypeError(f"on_failure needs a function, not {type(function).__name__}")
        return Handle(function, self._manager._handles, self)

    @property
    def policy(self) -> Policy:
        return policy_of(self._manager._policy, self._policy)

    @policy.setter
    def policy(self, policy: Policy | str | None) -> None:
        self._check_open()
        self._policy = None if policy is None else Policy(policy)

    def _kept_by_views(self) -> None:
        """As of `hwpoison.Memory`: the mapping, which they keep, keeps this."""
        self._mapping.memory = self

    def close(self) -> None:
        if self.closed:
            return
        if self._visits:
            raise BufferError(f"{self.name!r} is being guarded; end that before close()")
        self.flush()
        try:
            self._mapping.close()
        except BufferError:
            raise BufferError(f"{self.name!r} has views (arrays or memoryviews); delete them before close()") from None
        self.closed = True
        for stream in list(self._streams):
            stream.close()
        for handle in [one for one in self._manager._handles if one._of is self]:
            handle.cancel()
        self._over()
        self._manager._open.pop(id(self), None)

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[[str, str, int], Memory], tuple[str, str, int]]:
        from hwpoison.plain.manager import attach_pickled  # noqa: PLC0415  (managers make memories)

        self._check_open()
        return attach_pickled, (self._manager.socket, self.name, self.object_number)

    def __repr__(self) -> str:
        return f"<hwpoison.Memory {self.name!r} {self.kind} {self.nbytes} bytes at {self.address:#x}, not managed>"

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"memory {self.name!r} is closed")

    def _range(self, offset: SupportsIndex, nbytes: SupportsIndex | None) -> slice:
        self._check_open()
        first, length = range_of(self.name, self.nbytes, offset, nbytes)
        return slice(first, first + length)
