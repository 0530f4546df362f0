"""A signal handler raises while a request is under way, as Ctrl-C does: nothing is lost, and nobody else gets its reply."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import hwpoison
from hwpoison.app import mapping
from hwpoison.app.connection import Connection
from hwpoison.app.manager import BaseManager
from hwpoison.app.memory import Memory
from hwpoison.linux.syscalls import PAGE_SIZE
from tests.live.process import state_of
from tests.live.slow_files import SlowFile
from tests.live.test_guard_interrupts import interrupted_everywhere
from tests.support import wait_until

pytestmark = pytest.mark.live


class Alarm(Exception):
    """What the signal handler raises."""


@contextmanager
def stopped(manager: hwpoison.Manager) -> Iterator[None]:
    """It gets what it is asked, and answers only afterwards."""
    os.kill(manager.pid, signal.SIGSTOP)
    wait_until(lambda: state_of(manager.pid) == "T", "the manager is stopped")
    try:
        yield
    finally:
        os.kill(manager.pid, signal.SIGCONT)


@contextmanager
def interruptions() -> Iterator[None]:
    """A signal comes soon, and raises."""

    def handler(*_: object) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interrupted(manager: hwpoison.Manager, action: Callable[[], object]) -> None:
    """`action` asks, and a signal comes before it has got its reply."""
    with stopped(manager), interruptions(), pytest.raises(Alarm):
        action()


def struck(manager: hwpoison.Manager, path: Path) -> hwpoison.Memory:
    """A memory with a change that the file will never get."""
    memory = manager.open(path, "r+")
    memory.write(0, b"changed")
    assert manager.inject(memory, 0).state is hwpoison.State.DIRTY_FILE
    return memory


@pytest.mark.parametrize(("first", "again"), [("flush", "flush"), ("flush", "close"), ("close", "close")])
def test_an_error_whose_telling_was_interrupted_is_told_by_the_next_one_once(
    manager: hwpoison.Manager, file: Callable[..., Path], first: str, again: str
) -> None:
    memory = struck(manager, file(2 * PAGE_SIZE))
    interrupted(manager, getattr(memory, first))
    with pytest.raises(OSError, match="lost"):
        getattr(memory, again)()
    memory.close()
    assert manager.objects()[0].mappings == 0


def test_a_close_of_the_manager_finishes_a_memory_whose_close_was_interrupted(file: Callable[..., Path]) -> None:
    manager = hwpoison.Manager()
    memory = struck(manager, file(2 * PAGE_SIZE))
    interrupted(manager, memory.close)
    with pytest.raises(OSError, match="lost"):
        manager.close()


def test_a_first_request_that_was_interrupted_leaves_no_reply_to_others_and_no_descriptor(manager: hwpoison.Manager) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    channels = [manager.connection.take_channel()]
    with suppress(IndexError):
        while True:
            channels.append(manager.connection._idle.popleft())
    for _ in range(3):
        interrupted(manager, manager.statistics)
    # It is answered as what it is.
    assert manager.objects() == []
    assert manager.statistics().pid == manager.pid
    for channel in channels:
        manager.connection.give_back(channel)
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1


def test_an_allocation_that_was_interrupted_leaves_no_object(manager: hwpoison.Manager) -> None:
    with manager.allocate(PAGE_SIZE, "first"):
        interrupted(manager, lambda: manager.allocate(PAGE_SIZE, "second"))
        wait_until(lambda: [one.name for one in manager.objects()] == ["first"], "nobody holds it any more")
        manager.allocate(PAGE_SIZE, "second").close()


def test_a_read_that_waits_for_its_file_is_interrupted(
    manager: hwpoison.Manager, slow_file: Callable[[bytes], SlowFile]
) -> None:
    """An access would not be: the thread sleeps with the interpreter's one lock."""
    slow = slow_file(b"s" * 4 * PAGE_SIZE)
    memory = manager.open(slow.path)
    slow.hold("read")
    # As long as it takes no signal is seen; the file answers only afterwards.
    with interruptions(), pytest.raises(Alarm):
        memory.read(0, 4 * PAGE_SIZE)
    slow.hold()
    assert memory.read(PAGE_SIZE, 2) == b"ss"


def test_an_attachment_that_is_interrupted_anywhere_leaves_no_mapping(manager: hwpoison.Manager) -> None:
    table = manager.allocate(PAGE_SIZE, "table")
    attached: list[hwpoison.Memory] = []
    codes = [
        one.__code__
        for one in (
            Connection.ask, Connection._answer, Connection._exchange, Connection.watch_mapping, BaseManager._mapped,
            Memory.__init__, mapping.map_object, mapping.register, mapping._tell,
        )
    ]  # fmt: skip

    def attach() -> None:
        attached.clear()
        attached.append(manager.attach("table"))

    times = 0
    for _ in interrupted_everywhere(attach, *codes):
        times += 1
        assert list(manager._open.values()) == [table]
        wait_until(lambda: manager.objects()[0].mappings == 1, "only the first one maps it")
    assert times > 100
    assert [one.read(0, 1) for one in attached] == [b"\0"]
