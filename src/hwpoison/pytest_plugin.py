"""The pytest fixture `hwpoison`: memory failures in the tests of one's own program. See docs/testing.md.

pytest loads this wherever hwpoison is installed, so nothing else is loaded before a test asks for the fixture.
"""

from __future__ import annotations

import operator
import os
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import import_module
from typing import TYPE_CHECKING, Any, SupportsIndex

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from hwpoison import BaseManager, Failure, LoggedEvent, Memory, Policy

END_SECONDS_MAX = 10.0
"""How long a manager that nobody has any more may take to end."""
HANDLED = ("repair", "discard")
"""Events of a loss that somebody has dealt with."""


@pytest.fixture(name="hwpoison")
def _hwpoison() -> Iterator[Faults]:
    """Failures of managed memory, as the test wants them: `strike`, `storm`, `policy`, `declare`. The test fails if this
    process has lost data, by them or otherwise, that nobody has repaired, discarded or declared."""
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
        self._struck: dict[str, tuple[Failure, Memory]] = {}
        """Failures by `strike` and `storm` that have cost data, by event id."""
        self._declared: set[str] = set()
        self._told: set[str] = set()
        """The test has failed for them."""
        self._policy: Policy | None = None
        self._has_policy = False
        self._begun = datetime.now(UTC)
        self._logs: dict[Path, int] = {}
        """The event logs that there are, and the last event in each before the test as far as that is known."""
        self._private: set[str] = set()
        """What the event ids of managers begin with that are this process's own: whatever they lose counts."""
        self._processes: list[tuple[weakref.ref[BaseManager], subprocess.Popen[bytes]]] = []
        """Those of the private managers."""
        self._left: dict[str, str] = {}
        """What stood when a manager was closed."""
        self._before: set[str] = set()
        """Losses that stand from before the test."""
        manager = _manager_module()
        for one in manager.all_managers() if manager else ():
            self._watch(one)
            self._before |= (_standing(one) or {}).keys()
        self._note_log(_default_log())
        if manager:
            manager.watchers.append(self._watch)

    def strike(
        self, target: Any, index: SupportsIndex | tuple[SupportsIndex, ...] | None = None, *, action_required: bool = False
    ) -> Failure:
        """The page with item `index` of an array, or byte `index` of a `Memory`, fails; what came of it. Without an index it
        is the first one.

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
        storm = Storm(self, [_Target(one) for one in targets], failures, seed, pause)
        storm.thread.start()
        try:
            yield storm
        finally:
            storm.stop()
        if storm.error is not None:
            raise storm.error

    def policy(self, policy: Policy | str | None) -> None:
        """As `hwpoison.set_policy`, until the test ends."""
        from hwpoison import set_policy

        before = import_module(set_policy.__module__).default_policy()
        set_policy(policy)
        if not self._has_policy:
            self._policy, self._has_policy = before, True

    def declare(self, *failures: Failure) -> None:
        """These losses are meant to be."""
        self._declared.update(one.event_id for one in failures)

    def declare_all(self) -> None:
        """All losses so far are meant to be."""
        self._declared.update(self._lost())

    def undeclared(self) -> list[str]:
        """What was lost and neither repaired nor discarded nor declared, in words."""
        return list(self._undeclared().values())

    def check(self) -> None:
        """Fail the test for what is undeclared, once."""
        found = {event_id: said for event_id, said in self._undeclared().items() if event_id not in self._told}
        if found:
            self._told |= found.keys()
            listed = "\n  ".join(found.values())
            pytest.fail(
                f"{len(found)} undeclared losses: repair() or discard() them in the program, or declare() them in the test:"
                f"\n  {listed}",
                pytrace=False,
            )

    def end(self) -> None:
        """The test is over."""
        manager = _manager_module()
        if manager and self._watch in manager.watchers:
            manager.watchers.remove(self._watch)
        if self._has_policy:
            from hwpoison import set_policy

            set_policy(self._policy)

    def _note(self, failure: Failure, memory: Memory) -> None:
        if failure.victims:
            with self._lock:
                self._struck[failure.event_id] = (failure, memory)

    def _watch(self, manager: BaseManager, closes: bool = False) -> None:
        """There is a way to it, or it is about to be closed: what has happened is in its log, what stands is known."""
        from hwpoison import Manager

        stands = _standing(manager) if closes else None
        if stands is not None:
            with self._lock:
                self._left |= stands
                for key, (_, memory) in list(self._struck.items()):
                    if memory.manager is manager and not memory.closed and key not in stands:
                        del self._struck[key]
        with suppress(OSError):
            log, instance = manager.log_place()
            self._note_log(log)
            if isinstance(manager, Manager) and instance not in self._private:
                self._private.add(instance)
                self._processes.append((weakref.ref(manager), manager._process))

    def _note_log(self, log: Path) -> None:
        with self._lock:
            if log not in self._logs:
                self._logs[log] = _last_event(log)

    def _undeclared(self) -> dict[str, str]:
        return {event_id: said for event_id, said in self._lost().items() if event_id not in self._declared}

    def _lost(self) -> dict[str, str]:
        """What was lost and not dealt with, in words.

        What can be asked, the managers say: what stands of the memories that are open here. Of those that are not, the event
        logs tell: who has lost something, and whether somebody has dealt with it.
        """
        manager = _manager_module()
        managers = list(manager.all_managers()) if manager else []
        for one in managers:
            self._watch(one)
        for manager_there, process in self._processes:
            if manager_there() is None:
                # Nobody has closed it. When it has ended, its log is complete.
                with suppress(subprocess.TimeoutExpired):
                    process.wait(END_SECONDS_MAX)
        with self._lock:
            struck, logs = dict(self._struck), dict(self._logs)
        stands: dict[str, str] = {}
        asked: list[BaseManager] = []
        for one in managers:
            if (found := _standing(one)) is not None:
                stands |= found
                asked.append(one)
        # Of memories that can't be asked about the logs tell, and if they can't either, what was struck is lost.
        seen = {key for key, (_, memory) in struck.items() if not memory.closed and memory.manager in asked}
        lost = {key: _said(one.name, one.offset, one.nbytes, key) for key, (one, _) in struck.items() if key not in seen}
        lost |= self._left
        for log, before in logs.items():
            events = [one for one in _events(log, before) if one.time >= self._begun]
            dealt_with = {one.event_id for one in events if one.kind in HANDLED}
            for key in dealt_with:
                lost.pop(key, None)
            for one in events:
                ours = one.pid == os.getpid() or one.instance in self._private
                if one.kind == "victim" and ours and not {one.event_id} & (dealt_with | seen):
                    lost[one.event_id] = _said(one.name, one.offset, one.nbytes, one.event_id)
        return {key: said for key, said in (stands | lost).items() if key not in self._before}


class Storm:
    """Failures that come while something else runs; `struck` are those so far."""

    def __init__(self, faults: Faults, targets: list[_Target], failures: int, seed: int, pause: float) -> None:
        self.struck: list[Failure] = []
        self.error: BaseException | None = None
        self.over = threading.Event()
        """Set when all failures have been."""
        self._faults = faults
        self._targets = targets
        self._failures = failures
        self._random = random.Random(seed)
        self._pause = pause
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run, name="hwpoison-storm", daemon=True)

    def _run(self) -> None:
        try:
            for _ in range(self._failures):
                target = self._random.choice(self._targets)
                memory = target.memory
                failure = memory.manager.inject(memory, target.any_byte(self._random))
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


class _Target:
    """What a storm strikes: the bytes of the array's items, and not what its strides leave out."""

    def __init__(self, target: Any) -> None:
        from hwpoison import Memory, locate
        from hwpoison.extents import as_array, reach

        self._shape: tuple[int, ...]
        self._strides: tuple[int, ...]
        if isinstance(target, Memory):
            self.memory, self._first = target, 0
            self._shape, self._strides, self._itemsize = (target.nbytes,), (1,), 1
            return
        array = as_array(target)
        if not array.size:
            raise ValueError(f"an array of shape {array.shape} has no item to strike")
        self.memory, offset, _ = locate(array)
        self._first = offset + reach(array)[0]
        self._shape, self._strides, self._itemsize = array.shape, array.strides, array.itemsize

    def any_byte(self, chance: random.Random) -> int:
        index = [chance.randrange(length) for length in self._shape]
        place = sum(one * step for one, step in zip(index, self._strides, strict=True))
        return self._first + place + chance.randrange(self._itemsize)


def _place(target: Any, index: SupportsIndex | tuple[SupportsIndex, ...] | None) -> tuple[Memory, int]:
    import numpy

    from hwpoison import Memory, locate

    if isinstance(target, Memory):
        offset = 0 if index is None else index
        if isinstance(offset, tuple) or not 0 <= operator.index(offset) < target.nbytes:
            raise IndexError(f"{index} is not the offset of a byte of {target.name!r}, which has {target.nbytes}")
        return target, operator.index(offset)
    array = numpy.asarray(target)
    given = (0,) * min(array.ndim, 1) if index is None else index if isinstance(index, tuple) else (index,)
    wanted = [operator.index(one) for one in given]
    if len(wanted) > array.ndim or any(not -size <= one < size for one, size in zip(wanted, array.shape, strict=False)):
        raise IndexError(f"{index} is no index of an array of shape {array.shape}")
    # A view, and not the item itself: that may be lost.
    memory, offset, _ = locate(array[(*(slice(one, one + 1 or None) for one in wanted), ...)])
    return memory, offset


# --- what managers and event logs say


def _manager_module() -> Any:
    """None on other systems."""
    if sys.platform != "linux":
        return None
    return import_module("hwpoison.app.manager")


def _standing(manager: BaseManager) -> dict[str, str] | None:
    """What is lost now of what is mapped here, by event id; None if it can't be asked."""
    from hwpoison import protocol

    with suppress(OSError, ValueError):
        told = manager.connection.request(protocol.Standing(0), protocol.Losses).standing
        notices = [one.notice for one in told]
        return {one.event_id: _said(one.name, one.offset, one.nbytes, one.event_id) for one in notices}
    return None


def _default_log() -> Path:
    from hwpoison import events

    return events.default_path()


def _last_event(log: Path) -> int:
    from hwpoison import events

    with suppress(OSError, events.NotAnEventLogError):
        return max((one.id for one in events.read(log, limit=1)), default=0)
    return 0


def _events(log: Path, after: int) -> list[LoggedEvent]:
    """Nothing if it can't be read."""
    from hwpoison import events

    with suppress(OSError, events.NotAnEventLogError):
        return list(events.read(log, after=after))
    return []


def _said(name: str | None, offset: int | None, nbytes: int, event_id: str) -> str:
    return f"{name!r}: {nbytes} bytes at offset {offset or 0:#x} [{event_id}]"
