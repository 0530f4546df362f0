"""Which pages of a mapping are there: what a process can find out for itself, of its own memory, without any privilege."""

from __future__ import annotations

import errno
import os
import struct

from hwpoison.linux.syscalls import PAGE_SIZE

PAGEMAP = "/proc/self/pagemap"
_ENTRY_BYTES = 8
_PRESENT, _NOT_IN_MEMORY, _GUARD_REGION, _WRITE_PROTECTED = 1 << 63, 1 << 62, 1 << 58, 1 << 57
_PIECE_BYTES = 1 << 20


def markers(address: int, count: int) -> list[int]:
    """Which of the pages from `address` on have a poison marker. Raises OSError where `PAGEMAP` can't be read.

    A marker is shown as an entry that is not in memory, like swap, which shared memory has none of in page tables; markers
    for write protection and of guard regions have bits of their own.
    """
    bits = _PRESENT | _NOT_IN_MEMORY | _GUARD_REGION | _WRITE_PROTECTED
    found = []
    fd = os.open(PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
    try:
        page = 0
        while page < count:
            nbytes = min((count - page) * _ENTRY_BYTES, _PIECE_BYTES)
            data = os.pread(fd, nbytes, (address // PAGE_SIZE + page) * _ENTRY_BYTES)
            if not data:
                break
            entries = struct.iter_unpack("Q", data)
            found += [page + index for index, (entry,) in enumerate(entries) if entry & bits == _NOT_IN_MEMORY]
            page += len(data) // _ENTRY_BYTES
    finally:
        os.close(fd)
    return found


def next_hole(fd: int, offset: int, end: int) -> tuple[int, int] | None:
    """The first bytes from `offset` on that a memfd has no pages for: where they begin and end. None if there are none."""
    begin = os.lseek(fd, offset, os.SEEK_HOLE)
    if begin >= end:
        return None
    try:
        return begin, min(os.lseek(fd, begin, os.SEEK_DATA), end)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return begin, end
