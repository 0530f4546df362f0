"""`os.fork()` in a process that has managed memory: until the child's first line of Python runs, when all is there again.

The floor is the same in the same process, without any managed memory: half of it before, half of it after.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator

import hwpoison
from hwpoison.cli.benchmarks.common import Bench, Result, Target, median

ROUNDS = 100
COUNTS = (1, 100)
NBYTES = 1 << 20


def measure(bench: Bench) -> Iterator[Result]:
    """With one memory, and with many."""
    plain = [_until_child() for _ in range(ROUNDS)]
    took: dict[int, list[float]] = {}
    with bench.manager() as manager:
        memories: list[hwpoison.Memory] = []
        for count in COUNTS:
            bench.say(f"fork with {count} of {COUNTS[-1]} memories")
            memories += [manager.allocate(NBYTES) for _ in range(count - len(memories))]
            took[count] = [_until_child() for _ in range(ROUNDS)]
    plain += [_until_child() for _ in range(ROUNDS)]
    note = f"{ROUNDS} forks, the median; floor: without managed memory"
    for count, found in took.items():
        name = f"os.fork(), {count} memor{'y' if count == 1 else 'ies'}"
        target = Target(1000, "value") if count == 1 else None
        yield Result(name, median(found), "µs", median(plain), target, note)


def _until_child() -> float:
    """Microseconds until the child runs."""
    read, write = os.pipe()
    started = time.perf_counter_ns()
    child = os.fork()
    if not child:
        try:
            os.write(write, struct.pack("q", time.perf_counter_ns()))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        (begun,) = struct.unpack("q", pipe.read(8))
    os.waitpid(child, 0)
    return float(begun - started) / 1e3
