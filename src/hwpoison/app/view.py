"""A guarded view: a second, private, read-only mapping of a memory, in which lost bytes can be met without a signal.

The manager counts each loss that is met in a word that it shares with this process, then answers with a private page of
zeros. Whoever uses the view compares the count at the end. `clean` is the count up to which all such zeros are gone again:
a guard that begins measures from there, so zeros that an overlapping guard has met can't be read unnoticed.
"""

from __future__ import annotations

import mmap
import threading
from typing import Any, Literal

import numpy
import numpy.typing

from hwpoison import protocol
from hwpoison.app.connection import Connection
from hwpoison.errors import Range
from hwpoison.linux import syscalls
from hwpoison.linux.syscalls import PAGE_SIZE


class GuardedView:
    """One memory's guarded view, shared by all guards on it in this process."""

    def __init__(self, connection: Connection, mapping: mmap.mmap, mapped: protocol.Mapped, name: str, nbytes: int) -> None:
        assert connection.words is not None
        self._connection = connection
        self._mapping = mapping
        self._number = mapped.mapping
        self._name = name
        self._nbytes = nbytes
        self._words = connection.words
        self._met_word = 2 * mapped.slot
        self._guards_word = 2 * mapped.slot + 1
        self._lock = threading.Lock()
        self._guards = 0
        self._looking = 0
        self._clean = 0
        self._forget = 0

    @property
    def buffer(self) -> memoryview:
        return memoryview(self._mapping)[: self._nbytes]

    def enter(self) -> int:
        """One guard more; what it has seen of the count so far. Raises ConnectionError in a forked child."""
        # A child shares the words with its parent, and must not touch them.
        self._connection.check()
        with self._lock:
            if not self._looking and self._words[self._met_word] != self._clean:
                # Somebody has used the view outside of all guards. What was left there must not meet this one.
                self._settle(self._clean)
            self._guards += 1
            self._looking += 1
            self._words[self._guards_word] = self._guards
            return self._clean

    def leave(self, seen: int) -> list[Range]:
        """One guard less; the losses met since `seen`.

        The word of open guards is stored before the count is loaded; the manager counts before it looks at the open
        guards. So a loss that is met while the last guard ends is either seen here or answered with SIGBUS. Nothing is
        forgotten before the last guard has looked: others may have ended since this one was left.
        """
        with self._lock:
            self._guards -= 1
            self._words[self._guards_word] = self._guards
        with self._lock:
            try:
                return self._settle(seen)[0] if self._words[self._met_word] != seen else []
            finally:
                self._looking -= 1
                if not self._looking:
                    self._forget = self._clean

    def unseen(self, seen: int) -> bool:
        """True if losses were met since `seen`."""
        return bool(self._words[self._met_word] != seen)

    def settle(self, seen: int) -> tuple[list[Range], int]:
        """The losses met since `seen`, and the count now. Their zeros are gone: another access is another loss met."""
        with self._lock:
            return self._settle(seen)

    def _settle(self, seen: int) -> tuple[list[Range], int]:
        reply = self._connection.request(protocol.Met(self._number, seen, self._forget), protocol.Ranges)
        for offset, nbytes in reply.ranges:
            self._mapping.madvise(mmap.MADV_DONTNEED, offset, -(-nbytes // PAGE_SIZE) * PAGE_SIZE)
        self._clean = max(self._clean, reply.count)
        return [Range(self._name, *one) for one in reply.ranges], reply.count

    def lost(self) -> list[Range]:
        """All that is lost of the memory."""
        reply = self._connection.request(protocol.Lost(self._number), protocol.Ranges)
        return [Range(self._name, *one) for one in reply.ranges]

    def close(self) -> None:
        """Raises BufferError if there are open guards, arrays or memoryviews of it."""
        if self._looking:
            raise BufferError(f"{self._name!r} is being guarded; end its guards before close()")
        try:
            self._mapping.close()
        except BufferError:
            raise BufferError(f"a guarded view of {self._name!r} has arrays or memoryviews; delete them first") from None
        self._connection.request(protocol.Unmap(self._number), protocol.Done)

    @property
    def address(self) -> int:
        return syscalls.address_of(self._mapping)


def array_over(
    buffer: memoryview,
    dtype: numpy.typing.DTypeLike,
    shape: int | tuple[int, ...] | None,
    offset: int,
    order: Literal["C", "F"],
) -> numpy.ndarray[Any, Any]:
    """A numpy array over a buffer, with the arguments that `numpy.memmap` has."""
    item = numpy.dtype(dtype)
    if item.hasobject:
        raise ValueError(f"{item} holds Python objects; managed memory holds bytes: choose another dtype")
    if offset < 0 or (shape is not None and any(one < 0 for one in numpy.atleast_1d(shape))):
        raise ValueError(f"offset {offset} and shape {shape} are 0 or more")
    if shape is None:
        if offset < 0 or (len(buffer) - offset) % item.itemsize:
            raise ValueError(f"{len(buffer) - offset} bytes from offset {offset} are no whole number of {item}; pass shape=")
        shape = ((len(buffer) - offset) // item.itemsize,)
    try:
        # Of a memoryview, numpy would keep only the mapping behind it, which could be closed under the array then.
        return numpy.ndarray(shape, item, numpy.frombuffer(buffer, "u1"), offset, order=order)
    except TypeError as error:
        raise ValueError(
            f"shape {shape} of {item} at offset {offset} needs more than the {len(buffer)} bytes: {error}"
        ) from None
