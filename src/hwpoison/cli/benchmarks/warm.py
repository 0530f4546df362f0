"""Access to pages that are there: managed memory against plain mappings of memfds.

All are mapped alike (size, MAP_SHARED, no huge pages, every page touched in order). Where in the machine's memory a mapping
happens to lie makes a few per cent of difference, so there are several of each kind, made and accessed in turns.
"""

from __future__ import annotations

import math
import mmap
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy

import hwpoison
from hwpoison.cli.benchmarks.common import Bench, Result, Target
from hwpoison.linux import syscalls

NBYTES = 128 << 20
READS = 1 << 19
ROUNDS = 81
ORDER = "PMMPMPPM"
"""Managed and plain mappings: each kind has each place in the order as early and as late as the other."""
TARGET = Target(1.02)

Array = numpy.ndarray[Any, Any]


def measure(bench: Bench) -> Iterator[Result]:
    """Sum and random reads."""
    places = numpy.random.default_rng(1).integers(0, NBYTES // 8, READS)
    into = numpy.empty(READS, "i8")

    def random_reads(array: Array) -> object:
        return numpy.take(array, places, out=into, mode="clip")

    with bench.manager() as manager:
        # The first memory that a process gets is slower here, whoever gets it.
        arrays = [("", _plain())] + [(kind, _managed(manager) if kind == "M" else _plain()) for kind in ORDER]
        for _, array in arrays:
            array[:] = 1
        size = f"{ORDER.count('M')} mappings of {NBYTES >> 20} MiB each"
        note = f"{size}, the fastest of {ROUNDS} rounds; floor: numpy over plain memfds"
        for name, access in (("warm sum", Array.sum), ("warm random reads", random_reads)):
            value, floor = _in_turns(access, arrays)
            yield Result(name, value * 1e3, "ms", floor * 1e3, TARGET, note)
        del arrays, array


def _managed(manager: hwpoison.BaseManager) -> Array:
    return manager.allocate(NBYTES).array("i8")


def _plain() -> Array:
    fd = os.memfd_create("plain", os.MFD_CLOEXEC)
    os.ftruncate(fd, NBYTES)
    mapping = mmap.mmap(fd, NBYTES, mmap.MAP_SHARED)
    os.close(fd)
    mapping.madvise(syscalls.MADV_NOHUGEPAGE)
    return numpy.frombuffer(mapping, "i8")


def _in_turns(access: Callable[[Array], object], arrays: list[tuple[str, Array]]) -> tuple[float, float]:
    """Seconds of an access to managed and to plain memory: of each mapping the fastest, of those the mean.

    Others that run on the machine only ever add to a time, and by more than what is to be measured here.
    """
    fastest = [math.inf] * len(arrays)
    for _ in range(ROUNDS):
        for index, (_, array) in enumerate(arrays):
            started = time.perf_counter()
            access(array)
            fastest[index] = min(fastest[index], time.perf_counter() - started)
    managed = [one for one, (kind, _) in zip(fastest, arrays, strict=True) if kind == "M"]
    plain = [one for one, (kind, _) in zip(fastest, arrays, strict=True) if kind == "P"]
    return sum(managed) / len(managed), sum(plain) / len(plain)
