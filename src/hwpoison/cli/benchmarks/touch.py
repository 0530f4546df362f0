"""The first touch of a page of a cached file, 4 KiB random, one page a fault: against `benchmarks/fault.c`.

A tight loop touches one byte of each page and looks at the clock before and after. The two looks are in the figure: about
0.1 µs. Waking a process dominates, and its cost depends on which CPUs client and manager have, so both are measured with a
CPU each, as the scheduler chooses, and sharing one.
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
TOUCHES = 2000
ROUNDS = 7
TARGET = Target(1.3)


def measure(bench: Bench) -> Iterator[Result]:
    """With each choice of CPUs."""
    path = bench.file(NBYTES)
    offsets = [page * mmap.PAGESIZE for page in range(NBYTES // mmap.PAGESIZE)]
    random.Random(1).shuffle(offsets)
    allowed = os.sched_getaffinity(0)
    first, second = min(allowed), sorted(allowed)[1:2]
    choices: list[tuple[str, set[int], set[int], tuple[str, ...]]]
    choices = [("any CPUs", allowed, allowed, ()), ("one CPU", {first}, {first}, ())]
    if second:
        choices.insert(0, ("two CPUs", {first}, set(second), ("apart",)))
    with bench.manager() as manager:
        buffer = manager.open(path, "r").buffer
        for name, manager_cpus, client_cpus, argument in choices:
            ours, floors = [], []
            for _ in range(ROUNDS):
                floors.append(bench.floors.run("fault", path, TOUCHES, *argument, cpus=manager_cpus | client_cpus)["p50_us"])
                with on_cpus((manager.pid, manager_cpus), (0, client_cpus)):
                    ours.append(percentile(_touch(buffer, [offsets.pop() for _ in range(TOUCHES)]), 50) / 1e3)
            note = f"{ROUNDS} runs of {TOUCHES} touches in turns; each run's p50, of those the median"
            yield Result(f"first touch, {name}", median(ours), "µs", median(floors), TARGET, note)
        del buffer


def _touch(buffer: memoryview, offsets: list[int]) -> list[int]:
    """Nanoseconds of each touch."""
    clock = time.perf_counter_ns
    took = []
    gc.disable()
    try:
        for offset in offsets:
            started = clock()
            buffer[offset]
            took.append(clock() - started)
    finally:
        gc.enable()
    return took
