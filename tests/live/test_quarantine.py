"""Bad frames are held, whatever comes, and where they can't be that is said."""

from __future__ import annotations

import os
import resource
import select
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import hwpoison
from hwpoison import Outcome, State
from tests.live.conftest import known
from tests.live.frames import PAGE, frame_at, is_held, times_mapped, use_memory
from tests.live.process import keeper_of
from tests.live.reading import touch
from tests.support import SECONDS_MAX, wait_until

MakeFile = Callable[..., Path]


@pytest.mark.parametrize("kind", ["clean", "dirty", "anonymous"])
@pytest.mark.usefixtures("root")
def test_the_bad_frame_is_quarantined_and_the_page_is_in_another(
    kind: str, manager: hwpoison.Manager, file: MakeFile
) -> None:
    memory = {
        "clean": lambda: manager.open(file(4 * PAGE)),
        "dirty": lambda: manager.open(file(4 * PAGE), "r+"),
        "anonymous": lambda: manager.allocate(4 * PAGE),
    }[kind]()
    if kind != "clean":
        memory.buffer[PAGE] = 1
    touch(memory)
    address = memory.address + PAGE
    bad = frame_at(address)
    assert times_mapped(bad) > 0
    assert manager.report(memory, PAGE).outcome == Outcome.RECOVERED
    memory.discard()
    assert len(touch(memory)) == 4 * PAGE
    assert frame_at(address) not in (0, bad)
    assert is_held(bad)
    assert manager.statistics().quarantined == PAGE
    if kind == "dirty":
        with pytest.raises(OSError):
            memory.flush()


@pytest.mark.usefixtures("root")
def test_bad_frames_stay_in_quarantine_under_memory_pressure_and_when_the_manager_is_killed(
    file: MakeFile,
) -> None:
    manager = hwpoison.Manager()
    memory = manager.open(file(64 * PAGE))
    touch(memory)
    bad = [frame_at(memory.address + page * PAGE) for page in range(64)]
    keeper, killed = keeper_of(manager.pid), manager.pid
    for page in range(64):
        manager.report(memory, page * PAGE)
    touch(memory)
    use_memory(256 << 20)
    assert all(map(is_held, bad))
    keeper_ends, manager_ends = os.pidfd_open(keeper), os.pidfd_open(manager.pid)
    try:
        os.kill(manager.pid, signal.SIGKILL)
        select.select([manager_ends], [], [], SECONDS_MAX)
        use_memory(256 << 20)
        assert not select.select([keeper_ends], [], [], 0)[0], "the keeper did not outlive the manager"
        assert all(map(is_held, bad))
        assert manager.statistics().quarantined == 64 * PAGE
        assert manager.pid != killed
        assert manager.report(pfn=bad[5]).already_poisoned
        manager.close()
        assert select.select([keeper_ends], [], [], SECONDS_MAX)[0], "the keeper holds for ever"
        wait_until(lambda: not any(map(is_held, bad)), "the frames go back to the system with the keeper")
    finally:
        os.close(keeper_ends)
        os.close(manager_ends)


def test_where_the_system_holds_no_more_frames_the_page_is_well_and_the_frame_is_said_not_to_be_isolated(
    manager: hwpoison.Manager, file: MakeFile
) -> None:
    memory = manager.open(file(2 * PAGE))
    touch(memory)
    limits = resource.prlimit(manager.pid, resource.RLIMIT_NOFILE)
    # A limit below what is open already: the manager gets no pipe to hold a frame in.
    resource.prlimit(manager.pid, resource.RLIMIT_NOFILE, (5, limits[1]))
    failure = manager.report(memory, 0)
    resource.prlimit(manager.pid, resource.RLIMIT_NOFILE, limits)
    assert (failure.state, failure.outcome, failure.victims) == (State.CLEAN_FILE, Outcome.FAILED, ())
    assert "quarantine is full" in failure.reason
    assert touch(memory) == known(2 * PAGE)
    assert manager.statistics().quarantined == 0
    assert manager.report(memory, 0).outcome == Outcome.RECOVERED
