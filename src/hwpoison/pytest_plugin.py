"""The pytest fixture `hwpoison`: memory failures in the tests of one's own program. See docs/testing.md.

pytest loads this wherever hwpoison is installed, so nothing else is loaded before a test asks for the fixture.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from hwpoison import BaseManager, Failure, Memory, Policy

HANDLED = ("repair", "discard")
"""Events of a loss that somebody has dealt with."""


@pytest.fixture(name="hwpoison")
def _hwpoison() -> Iterator[Faults]:
    """Failures of managed memory, as the test wants them: `strike`, `storm`, `policy`, `declare`. The test fails if data was
    lost by them that nobody has repaired, discarded or declared."""
    faults = Faults()
    try:
        yield faults
    finally:
        faults.end()
    # Of a test that has failed, or of what fixtures have done since.
    faults.check()


@pytest.hookimpl(trylast=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """After the test's function, if that has not failed: so it is the test that fails, and not what cleans up behind it."""
    faults = getattr(item, "funcargs", {}).get("hwpoison")
    if isinstance(faults, Faults):
        faults.check()


class Faults:
    """What the fixture `hwpoison` is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._struck: dict[str, tuple[Failure, BaseManager, Path]] = {}
        """Failures that have cost data, by event id, each with its manager and the log of that."""
        self._declared: set[str] = set()
        self._told: list[str] = []
        """The test has failed for them."""
        self._policy: Policy | None = None
        self._has_policy = False

    def strike(self, target: Any, index: int | tuple[int, ...] = 0, *, action_required: bool = False) -> Failure:
        """The page with item `index` of an array, or byte `index` of a `Memory`, fails; what came of it.

        It is a simulated failure, handled as a real one. Raises ValueError if the array does not lie in managed memory,
        IndexError for an index outside.
        """
        memory, offset = _place(target, index)
        failure = memory.manager.inject(memory, offset, action_required)
        self._note(failure, memory)
        return failure

    @contextmanager
    def storm(self, *targets: Any, failures: int = 100, seed: int = 0, pause: float = 0.001) -> Iterator[Storm]:
        """While the block runs, a thread strikes random pages of the arrays and memories, `failures` times at most, with
        `pause` seconds between. At the block's end it stops; what it raised is raised there."""
        if not targets:
            raise ValueError("storm() needs arrays or memories to strike")
        places = [(memory, offset, max(nbytes, 1)) for memory, offset, nbytes in map(_located, targets)]
        storm = Storm(self, places, failures, seed, pause)
        storm.thread.start()
        try:
            yield storm
        finally:
            storm.stop()
        if storm.error is not None:
            raise storm.error

    def policy(self, policy: Policy | str | None) -> None:
        """As `hwpoison.set_policy`, until the test ends."""
        from hwpoison.app.notices import default_policy, set_policy

        before = default_policy()
        set_policy(policy)
        if not self._has_policy:
            self._policy, self._has_policy = before, True

    def declare(self, *failures: Failure) -> None:
        """These losses are meant to be; none given: all so far."""
        with self._lock:
            self._declared.update([one.event_id for one in failures] or self._struck)

    def undeclared(self) -> list[str]:
        """What was lost and neither repaired nor discarded nor declared, in words."""
        return [
            f"{failure.name!r}: {failure.nbytes} bytes at offset {failure.offset:#x}, {failure.state} [{event_id}]"
            for event_id, (failure, manager, log) in list(self._struck.items())
            if event_id not in self._declared and not _handled(event_id, manager, log)
        ]

    def check(self) -> None:
        """Fail the test for what is undeclared, once."""
        found = [one for one in self.undeclared() if one not in self._told]
        if found:
            self._told += found
            listed = "\n  ".join(found)
            pytest.fail(
                f"{len(found)} undeclared losses: repair() or discard() them in the program, or declare() them in the test:"
                f"\n  {listed}",
                pytrace=False,
            )

    def end(self) -> None:
        """The test is over."""
        if self._has_policy:
            from hwpoison.app.notices import set_policy

            set_policy(self._policy)

    def _note(self, failure: Failure, memory: Memory) -> None:
        if failure.victims:
            manager = memory.manager
            log = manager.log_place()[0]
            with self._lock:
                self._struck[failure.event_id] = (failure, manager, log)


class Storm:
    """Failures that come while something else runs; `struck` are those so far."""

    def __init__(
        self, faults: Faults, places: list[tuple[Memory, int, int]], failures: int, seed: int, pause: float
    ) -> None:
        self.struck: list[Failure] = []
        self.error: BaseException | None = None
        self.over = threading.Event()
        """Set when all failures have been."""
        self._faults = faults
        self._places = places
        self._failures = failures
        self._random = random.Random(seed)
        self._pause = pause
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run, name="hwpoison-storm", daemon=True)

    def _run(self) -> None:
        try:
            for _ in range(self._failures):
                memory, offset, nbytes = self._random.choice(self._places)
                failure = memory.manager.inject(memory, offset + self._random.randrange(nbytes))
                self.struck.append(failure)
                self._faults._note(failure, memory)
                if self._stop.wait(self._pause):
                    break
        except BaseException as error:  # noqa: BLE001  (it is raised where the storm ends)
            self.error = error
        self.over.set()

    def stop(self) -> None:
        """No more."""
        self._stop.set()
        self.thread.join()


def _located(target: Any) -> tuple[Memory, int, int]:
    from hwpoison import Memory, locate

    return (target, 0, target.nbytes) if isinstance(target, Memory) else tuple(locate(target))  # type: ignore[return-value]


def _place(target: Any, index: int | tuple[int, ...]) -> tuple[Memory, int]:
    import numpy

    from hwpoison import Memory, locate

    if isinstance(target, Memory):
        if not isinstance(index, (int, numpy.integer)) or not 0 <= index < target.nbytes:
            raise IndexError(f"{index} is not the offset of a byte of {target.name!r}, which has {target.nbytes}")
        return target, int(index)
    array = numpy.asarray(target)
    wanted = index if isinstance(index, tuple) else (index,)
    if len(wanted) > array.ndim or any(not -size <= one < size for one, size in zip(wanted, array.shape, strict=False)):
        raise IndexError(f"{index} is no index of an array of shape {array.shape}")
    # A view, and not the item itself: that may be lost.
    memory, offset, _ = locate(array[tuple(slice(one, one + 1 or None) for one in wanted)])
    return memory, offset


def _handled(event_id: str, manager: BaseManager, log: Path) -> bool:
    from hwpoison import events

    # What happened just now is in the log when the manager has said so, or has ended.
    with suppress(ConnectionError):
        manager.log_place()
    return any(one.kind in HANDLED for one in events.read(log, event_id=event_id))
