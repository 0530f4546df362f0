"""A report by the number of processes attached: against `benchmarks/punch.c`.

Managers with 1, 10, 100 and 1,000 clients stand side by side and get some reports each in turns. A report is for a clean
page of one of two objects: `one`, which a single process maps, or `all`, which all of them map and have in their page
tables. The time is the manager's own, from the report's arrival to its outcome (`Failure.latency_us`).
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import hwpoison
from hwpoison.cli.benchmarks.common import Bench, Result, Target, median

NBYTES = 64 << 20
PROCESSES = (1, 10, 100, 1000)
ROUNDS = 25
REPORTS = 5
"""In a row: the first one of them finds the caches full of what the manager before has done, and is not counted."""
FLOOR_RUNS = 3
OFFSET = NBYTES // 2
DESCRIPTORS = 8192
TARGET = Target(1.3, "value")
NOTE = f"p50 of {ROUNDS} times {REPORTS - 1} reports in turns; the manager's own time, from arrival to outcome"


def measure(bench: Bench) -> Iterator[Result]:
    """Each number, and the growth from the first to the last."""
    path = bench.file(NBYTES)
    allow_descriptors()
    ours: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        fleets = []
        for count in PROCESSES:
            bench.say(f"attached: starting {count} processes")
            fleets.append(stack.enter_context(_fleet(bench, path, count)))
        for mapped in ("one", "all"):
            for _ in range(ROUNDS):
                for fleet in fleets:
                    took = [fleet.report(mapped) for _ in range(REPORTS)]
                    ours.setdefault((mapped, fleet.count), []).extend(took[1:])
    for mapped in ("one", "all"):
        values, floors = [], []
        for count in PROCESSES:
            arguments = (count, 1 if mapped == "one" else count)
            values.append(median(ours[mapped, count]))
            floors.append(median([bench.floors.run("punch", *arguments)["p50_us"] for _ in range(FLOOR_RUNS)]))
            mapping = "one maps the page" if mapped == "one" else "all map the page"
            yield Result(f"report, {count} attached, {mapping}", values[-1], "µs", floors[-1], note=NOTE)
        yield Result(
            f"report, {PROCESSES[-1]} attached / {PROCESSES[0]}, {mapping}",
            values[-1] / values[0],
            "",
            floors[-1] / floors[0],
            TARGET if mapped == "one" else None,
            "how much the p50 grows",
        )


class _Fleet:
    """A manager and its clients, this process among them."""

    def __init__(self, manager: hwpoison.SharedManager, path: Path, stack: ExitStack, count: int) -> None:
        self.count = count
        self._manager = manager
        self._memories = {name: manager.open(path, "r", name=name) for name in ("one", "all")}
        self._page_tables: list[tuple[int, int]] = []
        for pid, address in stack.enter_context(clients(manager.socket, "all", count - 1)):
            memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, memory)
            self._page_tables.append((memory, address))

    def report(self, name: str) -> float:
        """Microseconds. All who map the page have it in their page tables before."""
        memory = self._memories[name]
        right = memory.buffer[OFFSET]
        if name == "all":
            for fd, address in self._page_tables:
                # The kernel faults the page in on the process's behalf, which need not wake up for it.
                if os.pread(fd, 1, address + OFFSET)[0] != right:
                    raise RuntimeError("a client has a wrong byte")
        return self._manager.inject(memory, OFFSET).latency_us


@contextmanager
def _fleet(bench: Bench, path: Path, count: int) -> Iterator[_Fleet]:
    with ExitStack() as stack:
        yield _Fleet(stack.enter_context(bench.manager()), path, stack, count)


@contextmanager
def clients(socket_name: str, name: str, count: int) -> Iterator[list[tuple[int, int]]]:
    """(pid, address of the mapping) of each."""
    command = [sys.executable, "-P", "-m", "hwpoison.cli.benchmarks.clients", socket_name, name, str(count)]
    # A library that starts threads when it is loaded would make the forks unsafe.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().split() for _ in range(count)]
        if not all(lines):
            raise RuntimeError(f"{count} processes could not be attached: are memory and descriptors enough (ulimit -n)?")
        yield [(int(pid), int(address)) for pid, address in lines]


def allow_descriptors() -> None:
    """For us and for what we start: a manager has four descriptors for each client."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
