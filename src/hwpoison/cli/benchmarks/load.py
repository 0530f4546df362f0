"""Bringing in a whole cached file, by sequential access and by `prefetch`: against `benchmarks/load.c`.

Sequential access touches one byte of each page in order, in numpy's loop. Each run opens the file anew, so that the time
has the allocation of all memory in it, as the floor's has.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterator

import hwpoison
from hwpoison.cli.benchmarks.common import Bench, Result, Target, median

NBYTES = 256 << 20
ROUNDS = 7
TARGET = Target(0.5, bound="at least")


def measure(bench: Bench) -> Iterator[Result]:
    """Sequential access and prefetch."""
    path = bench.file(NBYTES)
    ours: dict[str, list[float]] = {"sequential": [], "prefetch": []}
    floors = []
    with bench.manager() as manager:
        for _ in range(ROUNDS):
            floors.append(bench.floors.run("load", path)["bytes_per_second"])
            for name, load in (("sequential", _sequential), ("prefetch", hwpoison.Memory.prefetch)):
                with manager.open(path, "r", name=f"{name} {len(floors)}") as memory:
                    ours[name].append(NBYTES / _seconds(load, memory))
    note = f"{NBYTES >> 20} MiB, {ROUNDS} runs in turns, the median; floor: sendfile into a memfd"
    for name, found in ours.items():
        yield Result(f"load, {name}", median(found) / 1e9, "GB/s", median(floors) / 1e9, TARGET, note)


def _sequential(memory: hwpoison.Memory) -> None:
    memory.array("u1")[:: mmap.PAGESIZE].sum()


def _seconds(load: Callable[[hwpoison.Memory], object], memory: hwpoison.Memory) -> float:
    started = time.perf_counter()
    load(memory)
    return time.perf_counter() - started
