"""What the benchmarks share: a result, figures, a manager, a file, CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import hwpoison
from hwpoison.cli.benchmarks.floors import Floors

START_SECONDS_MAX = 30.0
PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Target:
    """What must hold: the ratio to the floor, or the value itself, is at most, or at least, `limit`."""

    limit: float
    of: Literal["ratio", "value"] = "ratio"
    bound: Literal["at most", "at least"] = "at most"


@dataclass(frozen=True)
class Result:
    """One figure. `floor` has the same unit; `note` says what a reader must know to understand the figure."""

    name: str
    value: float
    unit: str
    floor: float | None = None
    target: Target | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return self.value / self.floor if self.floor else None

    @property
    def met(self) -> bool | None:
        """None where there is no target."""
        if self.target is None:
            return None
        judged = self.value if self.target.of == "value" else self.ratio
        assert judged is not None, f"{self.name} has a target for its ratio, but no floor"
        return judged <= self.target.limit if self.target.bound == "at most" else judged >= self.target.limit

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "floor": self.floor,
            "ratio": self.ratio,
            "target": self.target and self.target.limit,
            "target_of": self.target and self.target.of,
            "target_bound": self.target and self.target.bound,
            "met": self.met,
            "note": self.note,
        }


class Bench:
    """One run: a folder for its files, its floors, and `say` for progress."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.say = say
        self.floors = Floors(folder)

    @contextmanager
    def manager(self) -> Iterator[hwpoison.SharedManager]:
        """A manager process as `hwpoison serve` runs it. Its lines on standard error are not for the user's terminal,
        nor its events for the user's log."""
        socket_name = f"@hwpoison-bench-{os.getpid()}-{time.monotonic_ns()}"
        environment = os.environ | {"HWPOISON_LOG": str(self.folder / "events.sqlite")}
        with tempfile.TemporaryFile(dir=self.folder) as said:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "hwpoison", "serve", "--socket", socket_name],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )
            try:
                with _connected(socket_name, process) as manager:
                    yield manager
            finally:
                process.terminate()
                try:
                    process.wait(START_SECONDS_MAX)
                finally:
                    process.kill()
                    process.wait()

    def file(self, nbytes: int, name: str = "content") -> Path:
        """A file of random bytes, in the page cache and on the disk. Made once."""
        path = self.folder / f"{name}-{nbytes}"
        if not path.exists():
            with path.open("wb") as file:
                for _ in range(0, nbytes, PIECE_BYTES):
                    file.write(os.urandom(PIECE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        return path


@contextmanager
def _connected(socket_name: str, process: subprocess.Popen[bytes]) -> Iterator[hwpoison.SharedManager]:
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        try:
            manager = hwpoison.connect(socket_name)
            break
        except ConnectionError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    "the manager did not start; does `hwpoison serve` work here? see `hwpoison doctor`"
                ) from None
            time.sleep(0.01)
    with manager:
        yield manager


def percentile(values: Sequence[float], percent: int) -> float:
    """By nearest rank, as the floors do it: a value that was measured."""
    return sorted(values)[-(-len(values) * percent // 100) - 1]


def median(values: Sequence[float]) -> float:
    """As `percentile`."""
    return percentile(values, 50)


@contextmanager
def on_cpus(*cpus: tuple[int, set[int]]) -> Iterator[None]:
    """Processes (by pid; 0 is this one) and all their threads stay on the given CPUs for a while."""
    before = os.sched_getaffinity(0)
    try:
        for pid, allowed in cpus:
            _set_cpus(pid, allowed)
        yield
    finally:
        for pid, _ in cpus:
            _set_cpus(pid, before)


def _set_cpus(pid: int, cpus: set[int]) -> None:
    for task in Path(f"/proc/{pid or 'self'}/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), cpus)
        except ProcessLookupError:
            pass  # the thread, or the process, has ended
