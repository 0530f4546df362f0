"""`hwpoison.core.machine.Records` on Linux: a memfd that the keeper holds too.

A record is a length and its checksum, a checksum of what follows, a list of keys, each with a new value or none (msgpack),
and a byte that is no zero. What was cut off by a death while it was written ends the file: behind it there are zeros.
Anything else that is not as it was written is damage, as memory fails, and nothing of such a journal is believed. When most
of it is old, what counts is written to another memfd, which takes its place.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from hwpoison.core.machine import Key
from hwpoison.linux.kept import Alone, Keeping

FORMAT = 4
"""Of what is written, by whatever part of the manager: a manager takes over only from those that write this one."""
LABEL = "journal"
RESERVE_BYTES = 1 << 18
"""So much room is there in advance, for what can't be refused."""
OLD_BYTES_MIN = 1 << 16
"""Less than this is not worth being written anew."""
_head = struct.Struct("<8sQ")
_MAGIC = b"hwpoison"
_frame = struct.Struct("<III")
_END = b"\xff"

log = logging.getLogger("hwpoison")


DAMAGED = "the journal of the manager before this one is damaged, so what it says of losses can't be believed"


class JournalError(OSError):
    """It is none that this version can read, or damaged."""


class LinuxRecords:
    """Writes to a new memfd, after what is found in `inherited`, one that a manager before this one has written."""

    def __init__(self, keeping: Keeping | None = None, inherited: int = -1) -> None:
        self._keeping = keeping or Alone()
        self._encode = msgspec.msgpack.Encoder().encode
        self._values: dict[Key, Any] = read(inherited) if inherited >= 0 else {}
        self._together: list[Any] | None = None
        self.broken = False
        """It could not be written. A manager that dies now has no successor."""
        self._fd = -1
        self._end = self._room = 0
        self._live = 0
        self._write_anew()
        if inherited >= 0:
            os.close(inherited)

    def put(self, key: Key, value: Any) -> None:
        self._values[key] = value
        self._say([key, value])

    def drop(self, key: Key) -> None:
        if self._values.pop(key, self) is not self:
            self._say([key])

    @contextmanager
    def together(self) -> Iterator[None]:
        if self._together is not None:
            yield
            return
        self._together = []
        try:
            yield
        finally:
            said, self._together = self._together, None
            if said:
                self._append(said)

    def all(self) -> dict[Key, Any]:
        return dict(self._values)

    def require(self) -> None:
        if self.broken:
            self._append([])
        elif self._room - self._end >= RESERVE_BYTES // 2:
            return
        try:
            if self.broken:
                raise OSError(errno.ENOSPC, "it could not be written")
            self._reserve()
        except OSError as error:
            raise MemoryError(f"the manager's journal can't grow: {error.strerror}") from error

    def close(self) -> None:
        os.close(self._fd)

    # --- the file

    def _say(self, said: list[Any]) -> None:
        if self._together is not None:
            self._together.append(said)
        else:
            self._append([said])

    def _append(self, said: list[Any]) -> None:
        content = self._encode(said)
        try:
            if self.broken:
                self._write_anew()
                self.broken = False
                log.error("the manager's journal can be written again")
                return
            self._write(_record(content))
        except OSError as error:
            self._break(error)
            return
        if self._end > 2 * self._live + OLD_BYTES_MIN:
            try:
                self._write_anew()
            except OSError:
                # It is whole as it is. Once more when it has doubled.
                self._live = self._end

    def _write(self, data: bytes) -> None:
        if self._end + len(data) > self._room:
            self._reserve(len(data))
        os.pwrite(self._fd, data, self._end)
        self._end += len(data)

    def _reserve(self, nbytes: int = 0) -> None:
        wanted = self._end + nbytes + RESERVE_BYTES
        os.posix_fallocate(self._fd, 0, wanted)
        self._room = wanted

    def _write_anew(self) -> None:
        """Only what counts, in a memfd that is there as a whole before it is given to the keeper."""
        old, before = self._fd, (self._end, self._room)
        self._fd = os.memfd_create("hwpoison-journal", os.MFD_CLOEXEC)
        self._end = self._room = 0
        try:
            content = self._encode([[key, value] for key, value in self._values.items()])
            self._write(_head.pack(_MAGIC, FORMAT) + _record(content))
        except OSError:
            os.close(self._fd)
            self._fd, (self._end, self._room) = old, before
            raise
        self._live = self._end
        self._keeping.keep((LABEL, self._fd))
        if old >= 0:
            os.close(old)

    def _break(self, error: OSError) -> None:
        """It is not whole any more: a successor must not believe it. It is tried again with whatever is to be said next."""
        if not self.broken:
            self.broken = True
            self._keeping.drop(LABEL)
            log.error("the manager's journal can't be written (%s): if the manager dies, its clients end", error.strerror)


def _record(content: bytes) -> bytes:
    return _frame.pack(len(content), _checksum(len(content)), zlib.crc32(content)) + content + _END


def _checksum(length: int) -> int:
    return zlib.crc32(length.to_bytes(4, "little"))


def read(fd: int) -> dict[Key, Any]:
    """The last value of each key. Raises `JournalError` for what is no journal of this format."""
    try:
        data = os.pread(fd, os.fstat(fd).st_size, 0)
    except OSError as error:
        # Its own memory may fail.
        why = f"the journal of the manager before this one can't be read ({error.strerror})"
        raise JournalError(error.errno or errno.EIO, why) from error
    if len(data) < _head.size or _head.unpack_from(data)[0] != _MAGIC:
        raise JournalError(errno.EINVAL, "what the manager before this one has left is no journal")
    found = _head.unpack_from(data)[1]
    if found != FORMAT:
        raise JournalError(
            errno.EPROTO, f"the manager before this one wrote a journal of format {found}; this knows {FORMAT}"
        )
    values: dict[Key, Any] = {}
    at = _head.size
    while at + _frame.size <= len(data):
        length, of_length, checksum = _frame.unpack_from(data, at)
        at += _frame.size
        if of_length != _checksum(length):
            break
        content, end = data[at : at + length], data[at + length : at + length + 1]
        if end in (b"", b"\0"):
            at += length
            break
        if end != _END or zlib.crc32(content) != checksum:
            raise JournalError(errno.EIO, DAMAGED)
        for key, *value in msgspec.msgpack.decode(content):
            if value:
                values[tuple(key)] = value[0]
            else:
                values.pop(tuple(key), None)
        at += length + 1
    if data[at:].strip(b"\0"):
        raise JournalError(errno.EIO, DAMAGED)
    return values
