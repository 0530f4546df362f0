"""The manager is killed: how long does the first access that needs one wait, by the number of processes attached?

The floor is the start of an interpreter that does nothing: what the next manager would take at least if it were executed
instead of forked (`service.keeper`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from hwpoison.cli.benchmarks.attached import allow_descriptors, clients
from hwpoison.cli.benchmarks.common import Bench, Result, Target, median

NBYTES = 64 << 20
PAGE = 4096
PROCESSES = (1, 10, 100, 1000)
DEATHS = 10
FLOOR_RUNS = 10
TARGET = Target(300, "value")
TARGET_CLIENT = Target(1, "value")
NOTE = f"p50 of {DEATHS} deaths; from before SIGKILL until an access to an absent page of a file has its byte"


def measure(bench: Bench) -> Iterator[Result]:
    """Each number, and what one more client costs."""
    path = bench.file(NBYTES)
    allow_descriptors()
    floor = median([_interpreter() for _ in range(FLOOR_RUNS)])
    values = []
    for count in PROCESSES:
        bench.say(f"restart: {count} processes")
        with bench.manager() as manager:
            memory = manager.open(path, "r", name="all")
            with clients(manager.socket, "all", count - 1):
                took = []
                for death in range(DEATHS):
                    pid = manager.statistics().pid
                    begun = time.perf_counter()
                    os.kill(pid, signal.SIGKILL)
                    # Each access is far from those before it: nothing has brought its page in.
                    memory.buffer[(death * 977 % (NBYTES // PAGE)) * PAGE]
                    took.append((time.perf_counter() - begun) * 1e3)
                values.append(median(took))
        target = TARGET if count == 1 else None
        yield Result(f"death to first access served, {count} attached", values[-1], "ms", floor, target, NOTE)
    yield Result(
        "death to first access served, each client more",
        (values[-1] - values[0]) / (PROCESSES[-1] - PROCESSES[0]),
        "ms",
        target=TARGET_CLIENT,
        note=f"from {PROCESSES[0]} to {PROCESSES[-1]}",
    )


def _interpreter() -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True)
    return (time.perf_counter() - begun) * 1e3
