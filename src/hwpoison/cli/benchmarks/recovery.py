"""The recovery of a clean page of a file that a process is reading all the time: against `benchmarks/recover.c`.

Manager and reader have a CPU each, as in the floor; who reports shares the manager's. A round is timed from right before
the report is put into the manager's socket until the reader has the right byte in its hand: so the time has a message and
the manager's waking up in it, which the floor has not. Rounds in which the reader did not sleep in the fault are not
counted; the floor's are chosen alike.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hwpoison
from hwpoison import protocol
from hwpoison.cli.benchmarks.common import Bench, Result, Target, median, on_cpus, percentile
from hwpoison.cli.benchmarks.reader import ENDED_NS, GOT, READS, SLEPT, WORDS_BYTES, words_of
from hwpoison.core.records import Report, Source

NBYTES = 64 << 20
ROUNDS = 5
RECOVERIES = 200
PATIENCE_SECONDS = 10.0
TARGETS = {50: Target(4), 99: Target(10)}


def measure(bench: Bench) -> Iterator[Result]:
    """p50 and p99."""
    path = bench.file(NBYTES)
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        raise RuntimeError("needs two CPUs: one for the manager and one for the reader")
    ours: list[list[float]] = []
    floors = []
    with bench.manager() as manager:
        memory = manager.open(path, "r")
        offset = _offset_of_nonzero(path)
        with _reader(manager, memory, offset, cpus[1]) as words:
            for _ in range(ROUNDS):
                with on_cpus((0, {cpus[0]}), (manager.pid, {cpus[0]})):
                    ours.append(_recover(manager, memory, offset, words, path))
                floors.append(bench.floors.run("recover", path, RECOVERIES))
    note = (
        f"{ROUNDS} runs of {RECOVERIES} in turns; each run's percentile, of those the median; from before the report is sent"
    )
    for percent, target in TARGETS.items():
        value = median([percentile(run, percent) for run in ours])
        floor = median([one[f"p{percent}_us"] for one in floors])
        yield Result(f"recovery of a mapped clean page, p{percent}", value, "µs", floor, target, note)


@contextmanager
def _reader(manager: hwpoison.SharedManager, memory: hwpoison.Memory, offset: int, cpu: int) -> Iterator[memoryview]:
    """Its words."""
    fd = os.memfd_create("reader", os.MFD_CLOEXEC)
    os.ftruncate(fd, WORDS_BYTES)
    command = [sys.executable, "-P", "-m", "hwpoison.cli.benchmarks.reader", manager.socket, memory.name, offset, fd, cpu]
    process = subprocess.Popen(list(map(str, command)), pass_fds=[fd])
    try:
        yield words_of(fd)
    finally:
        process.kill()
        process.wait()
        os.close(fd)


def _recover(
    manager: hwpoison.SharedManager, memory: hwpoison.Memory, offset: int, words: memoryview, path: Path
) -> list[float]:
    """Microseconds of each recovery that the reader met."""
    right = _byte(path, offset)
    took: list[float] = []
    tried = 0
    channel = manager.connection.new_channel(protocol.AddChannel())
    report = protocol.ReportPage(Report(name=memory.name, offset=offset, source=Source.INJECTED))
    while len(took) < RECOVERIES:
        tried += 1
        if tried > 100 + 20 * RECOVERIES:
            raise RuntimeError("the reader hardly ever met the absent page: is the machine too busy?")
        _await_reads(words, 100)
        slept = words[SLEPT]
        sent_ns = time.monotonic_ns()
        protocol.send(channel, report)
        protocol.receive_reply(channel)
        # The first of two more reads may have begun before the page was taken, the second one has not.
        _await_reads(words, 2)
        if words[SLEPT] != slept and words[ENDED_NS] > sent_ns:
            if words[GOT] != right:
                raise RuntimeError(f"the reader has read {words[GOT]}, but the file has {right}: a wrong byte")
            took.append((words[ENDED_NS] - sent_ns) / 1e3)
    channel.close()
    return took


def _await_reads(words: memoryview, count: int) -> None:
    goal = words[READS] + count
    deadline = time.monotonic() + PATIENCE_SECONDS
    while words[READS] < goal:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the reader has not read the page within {PATIENCE_SECONDS:.0f} s")
        time.sleep(1e-4)


def _offset_of_nonzero(path: Path) -> int:
    """In the middle of the file; a page of zeros must not pass for the right one."""
    offset = NBYTES // 2
    while not _byte(path, offset):
        offset += 1
    return offset


def _byte(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(1)[0]
