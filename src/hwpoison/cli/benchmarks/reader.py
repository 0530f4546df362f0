"""A process that reads one byte of a managed memory all the time: `python -m hwpoison.cli.benchmarks.reader`.

    SOCKET NAME OFFSET FD CPU

The measured read is the one that slept in the fault. The reader knows it from the kernel, as `benchmarks/recover.c`
explains: its count of voluntary context switches has grown. What it has to tell stands in the shared words of `FD`.
"""

from __future__ import annotations

import gc
import mmap
import os
import sys
import time
from resource import RUSAGE_THREAD, getrusage

import hwpoison

READS, SLEPT, GOT, ENDED_NS = range(4)
"""The words. The last two belong to the latest read that slept, and are written before it is counted."""
WORDS_BYTES = mmap.PAGESIZE


def words_of(fd: int) -> memoryview:
    """The words, shared by all who have the descriptor."""
    return memoryview(mmap.mmap(fd, WORDS_BYTES)).cast("Q")


def _read_for_ever(byte: memoryview, words: memoryview) -> None:
    clock = time.monotonic_ns
    switches = getrusage(RUSAGE_THREAD).ru_nvcsw
    while True:
        got = byte[0]
        ended_ns = clock()
        now = getrusage(RUSAGE_THREAD).ru_nvcsw
        if now != switches:
            switches = now
            words[GOT] = got
            words[ENDED_NS] = ended_ns
            words[SLEPT] += 1
        words[READS] += 1


def main(socket_name: str, name: str, offset: str, fd: str, cpu: str) -> None:
    """Never returns."""
    memory = hwpoison.connect(socket_name).attach(name)
    os.sched_setaffinity(0, {int(cpu)})
    gc.disable()
    _read_for_ever(memory.buffer[int(offset) : int(offset) + 1], words_of(int(fd)))


if __name__ == "__main__":
    main(*sys.argv[1:])
