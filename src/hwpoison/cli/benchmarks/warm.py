"""Access to pages that are there: managed memory against a plain mapping of a memfd.

The two are mapped alike (size, MAP_SHARED, no huge pages, every page touched in order), so any difference is ours.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy

from hwpoison.cli.benchmarks.common import Bench, Result, Target, median
from hwpoison.linux import syscalls

NBYTES = 256 << 20
READS = 1 << 19
ROUNDS = 41
TARGET = Target(1.02)

Array = numpy.ndarray[Any, Any]


def measure(bench: Bench) -> Iterator[Result]:
    """Sum and random reads."""
    plain = _plain_mapping()
    with bench.manager() as manager:
        memory = manager.allocate(NBYTES)
        managed = memory.array("i8")
        places = numpy.random.default_rng(1).integers(0, len(managed), READS)
        into = numpy.empty(READS, "i8")
        for array in (managed, plain):
            array[:] = numpy.arange(len(array))

        def random_reads(array: Array) -> object:
            return numpy.take(array, places, out=into, mode="clip")

        for name, access in (("warm sum", Array.sum), ("warm random reads", random_reads)):
            value, floor = _in_turns(access, managed, plain)
            yield Result(
                name, value * 1e3, "ms", floor * 1e3, TARGET, f"{NBYTES >> 20} MiB; floor: numpy over a plain memfd mapping"
            )
        del managed, array


def _plain_mapping() -> Array:
    fd = os.memfd_create("plain", os.MFD_CLOEXEC)
    os.ftruncate(fd, NBYTES)
    mapping = mmap.mmap(fd, NBYTES, mmap.MAP_SHARED)
    os.close(fd)
    mapping.madvise(syscalls.MADV_NOHUGEPAGE)
    return numpy.frombuffer(mapping, "i8")


def _in_turns(access: Callable[[Array], object], managed: Array, plain: Array) -> tuple[float, float]:
    """Median seconds of an access to each. Who goes first alternates."""
    took: dict[bool, list[float]] = {True: [], False: []}
    for round_ in range(ROUNDS + 1):
        for ours in (True, False) if round_ % 2 else (False, True):
            started = time.perf_counter()
            access(managed if ours else plain)
            took[ours].append(time.perf_counter() - started)
    return median(took[True][1:]), median(took[False][1:])
