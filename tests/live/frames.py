"""What the kernel says of frames. For root."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from pathlib import Path

PAGE = mmap.PAGESIZE
_UP_TO_DATE, _BUDDY = 1 << 3, 1 << 10
"""Of linux/kernel-page-flags.h: the frame holds something; it is on a free list."""


def can_see_frames() -> bool:
    """PFNs are shown to root only."""
    return os.geteuid() == 0 and os.path.exists("/proc/kpageflags")


def _word(path: str, index: int) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return int(struct.unpack("Q", os.pread(fd, 8, index * 8))[0])
    finally:
        os.close(fd)


def frame_at(address: int, pid: int | str = "self") -> int:
    """The PFN of what is mapped there, 0 if nothing is."""
    entry = _word(f"/proc/{pid}/pagemap", address // PAGE)
    return entry & (1 << 55) - 1 if entry >> 63 else 0


def times_mapped(frame: int) -> int:
    return _word("/proc/kpagecount", frame)


def is_held(frame: int) -> bool:
    """True if nobody maps the frame and nobody can get it: it is on no free list, a processor's own included."""
    return _word("/proc/kpageflags", frame) & (_UP_TO_DATE | _BUDDY) == _UP_TO_DATE and times_mapped(frame) == 0


def use_memory(nbytes: int) -> None:
    """Allocate, fill and give back memory, and have the kernel move pages about."""
    with mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for offset in range(0, nbytes, PAGE):
            memory[offset] = 1
        Path("/proc/sys/vm/compact_memory").write_text("1")


def cached_pages(path: Path) -> int:
    """How many pages of a file the kernel's page cache has (mincore)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        vector = (ctypes.c_ubyte * -(-len(mapping) // PAGE))()
        start = ctypes.c_char.from_buffer(mapping)
        result = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapping)), vector)
        del start
    assert result == 0, os.strerror(ctypes.get_errno())
    return sum(one & 1 for one in vector)


def forget_cached(path: Path) -> None:
    """The page cache holds nothing of the file, where it is not the file itself."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
