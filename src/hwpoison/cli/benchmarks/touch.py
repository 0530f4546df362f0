"""The first touch of a page of a cached file, 4 KiB random, one page a fault: against `benchmarks/fault.c`.

A tight loop touches one byte of each page and looks at the clock before and after. The two looks are in the figure: about
0.1 µs. Waking a process dominates, and its cost depends on which CPUs the scheduler chooses, so both are also measured
with everything on one CPU.
"""

from __future__ import annotations

import gc
import mmap
import os
import random
import time
from collections.abc import Iterator

from hwpoison.cli.benchmarks.common import Bench, Result, Target, median, on_cpus, percentile

NBYTES = 256 << 20
TOUCHES = 3000
ROUNDS = 7
TARGET = Target(1.3)


def measure(bench: Bench) -> Iterator[Result]:
    """With the CPUs that the scheduler chooses, and on one."""
    path = bench.file(NBYTES)
    offsets = [page * mmap.PAGESIZE for page in range(NBYTES // mmap.PAGESIZE)]
    random.Random(1).shuffle(offsets)
    with bench.manager() as manager:
        buffer = manager.open(path, "r").buffer
        anywhere = os.sched_getaffinity(0)
        for cpus, name, target in (
            (anywhere, "first touch", TARGET),
            ({min(anywhere)}, "first touch, all on one CPU", None),
        ):
            ours, floors = [], []
            with on_cpus((0, cpus), (manager.pid, cpus)):
                for _ in range(ROUNDS):
                    floors.append(bench.floors.run("fault", path, TOUCHES)["p50_us"])
                    ours.append(percentile(_touch(buffer, [offsets.pop() for _ in range(TOUCHES)]), 50) / 1e3)
            note = f"{ROUNDS} runs of {TOUCHES} touches in turns; each run's p50, of those the median"
            yield Result(name, median(ours), "µs", median(floors), target, note)
        del buffer


def _touch(buffer: memoryview, offsets: list[int]) -> list[int]:
    """Nanoseconds of each touch."""
    clock = time.perf_counter_ns
    took = []
    gc.disable()
    try:
        for offset in offsets:
            started = clock()
            buffer[offset]  # noqa: B018  (the touch)
            took.append(clock() - started)
    finally:
        gc.enable()
    return took
