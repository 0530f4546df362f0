"""A guard on one memory, warm: entering and leaving it, and `check()`, where nothing is lost.

The floor of the first is a `with` of an object whose methods do nothing; of the second, the call of such a method.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator

import hwpoison
from hwpoison.cli.benchmarks.common import Bench, Result, Target, median

REPEATS = 2000
ROUNDS = 51


class _Nothing:
    __slots__ = ()

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def check(self) -> None:
        pass


def measure(bench: Bench) -> Iterator[Result]:
    """Enter and leave, and `check()`."""
    with bench.manager() as manager:
        memory = manager.allocate(1 << 20)
        guard, nothing = hwpoison.guard, _Nothing

        def enter_guard() -> None:
            for _ in range(REPEATS):
                with guard(memory):
                    pass

        def enter_nothing() -> None:
            for _ in range(REPEATS):
                with nothing():
                    pass

        def check_view(check: Callable[[], None]) -> None:
            for _ in range(REPEATS):
                check()

        note = f"{ROUNDS} runs of {REPEATS} in turns, the median; floor: "
        value, floor = _in_turns(enter_guard, enter_nothing)
        yield Result("guard, enter and leave", value, "µs", floor, Target(10, "value"), note + "a `with` that does nothing")
        with guard(memory) as safe:
            value, floor = _in_turns(lambda: check_view(safe.check), lambda: check_view(nothing().check))
        yield Result("guard, check()", value, "µs", floor, Target(0.5, "value"), note + "a method that does nothing")


def _in_turns(ours: Callable[[], None], floor: Callable[[], None]) -> tuple[float, float]:
    """Median microseconds of one repeat of each."""
    took: dict[Callable[[], None], list[float]] = {ours: [], floor: []}
    gc.disable()
    try:
        for _ in range(ROUNDS + 1):
            for run, found in took.items():
                started = time.perf_counter_ns()
                run()
                found.append((time.perf_counter_ns() - started) / 1e3 / REPEATS)
    finally:
        gc.enable()
    return median(took[ours][1:]), median(took[floor][1:])
