"""Memory to read files into, used again and again: a fresh page costs more than reading the bytes that go there."""

from __future__ import annotations

import mmap
import threading

KEPT = 4
"""Buffers that are kept for the next ones who need them."""


class Buffers:
    """Page-aligned buffers of `nbytes`. One is free again as soon as nobody has a view of it."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._kept: list[mmap.mmap] = []
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> memoryview:
        """A buffer of so many bytes, with anything in it."""
        if nbytes > self._nbytes:
            return memoryview(mmap.mmap(-1, nbytes))
        with self._lock:
            for buffer in self._kept:
                if _free(buffer):
                    break
            else:
                buffer = mmap.mmap(-1, self._nbytes)
                if len(self._kept) < KEPT:
                    self._kept.append(buffer)
            return memoryview(buffer)[:nbytes]


def _free(buffer: mmap.mmap) -> bool:
    try:
        # Python resizes, also to the size that it has, only what nobody has a view of.
        buffer.resize(len(buffer))
    except BufferError:
        return False
    return True
