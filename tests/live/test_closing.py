"""Threads that close what others use, or close too: each is told clearly, and nothing that is not ours is closed."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import hwpoison
from hwpoison.linux.syscalls import PAGE_SIZE

pytestmark = pytest.mark.live

ROUNDS = 400


def sockets() -> set[str]:
    """Those that this process has open."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
    return {one for one in found if one.startswith("socket:")}


@pytest.fixture(autouse=True)
def restless() -> Iterator[None]:
    """Threads take turns as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(*actions: Callable[[], object]) -> list[BaseException]:
    """Each in a thread of its own, at the same time; what they raised."""
    raised: list[BaseException] = []
    barrier = threading.Barrier(len(actions))

    def run(action: Callable[[], object]) -> None:
        barrier.wait()
        try:
            action()
        except Exception as error:  # noqa: BLE001
            raised.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in actions]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return raised


def test_threads_that_close_one_memory_close_no_descriptor_of_others(manager: hwpoison.Manager) -> None:
    stop, stolen = threading.Event(), 0

    def innocent() -> None:
        nonlocal stolen
        while not stop.is_set():
            fd = os.open(os.devnull, os.O_RDONLY)
            for _ in range(20):
                os.sched_yield()
            try:
                os.close(fd)
            except OSError:
                stolen += 1

    thread = threading.Thread(target=innocent)
    thread.start()
    try:
        for _ in range(ROUNDS):
            memory = manager.allocate(PAGE_SIZE)
            assert together(memory.close, memory.close, memory.close) == []
    finally:
        stop.set()
        thread.join()
    assert not stolen
    assert manager.objects() == []


def test_who_uses_a_memory_that_another_thread_closes_is_told_that_it_is_closed(manager: hwpoison.Manager) -> None:
    errors: Counter[str] = Counter()

    def guarded(memory: hwpoison.Memory) -> None:
        with hwpoison.guard(memory) as safe:
            bytes(safe.buffer[:8])

    uses: list[Callable[[hwpoison.Memory], object]] = [
        lambda memory: memory.read(0, 8),
        lambda memory: memory.write(0, b"x"),
        lambda memory: memory.lost(),
        lambda memory: bytes(memory.buffer[:8]),
        lambda memory: memory.flush(),
        guarded,
    ]

    def use(memory: hwpoison.Memory, action: Callable[[hwpoison.Memory], object]) -> None:
        for _ in range(50):
            action(memory)

    def close(memory: hwpoison.Memory) -> None:
        while not memory.closed:
            try:
                memory.close()
            except BufferError:
                os.sched_yield()  # Somebody reads it at this moment.

    for number in range(ROUNDS):
        memory = manager.allocate(PAGE_SIZE)
        action = uses[number % len(uses)]
        for error in together(lambda: use(memory, action), lambda: close(memory)):  # noqa: B023
            assert str(error) == f"memory {memory.name!r} is closed", repr(error)
            assert type(error) is ValueError
            errors[action.__name__] += 1
    assert errors
    assert manager.objects() == []


def test_a_request_that_ends_after_the_close_leaves_no_descriptor() -> None:
    before = sockets()
    manager = hwpoison.Manager()
    # As a thread whose reply has just come has it.
    channel = manager.connection.take_channel()
    manager.close()
    manager.connection.give_back(channel)
    assert sockets() == before


def test_an_error_of_a_flush_is_heard_where_warnings_are_errors(file: Callable[..., Path]) -> None:
    manager = hwpoison.Manager()
    memory = manager.open(file(2 * PAGE_SIZE), "r+")
    view = memory.buffer
    view[0] = 1
    manager.inject(memory, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OSError, match="were lost") as caught:
            manager.close()
    assert isinstance(caught.value.__context__, ResourceWarning)
    memory.discard()
    view.release()
    memory.close()


def test_the_error_of_the_first_memory_that_a_manager_closes_names_those_of_others(file: Callable[..., Path]) -> None:
    manager = hwpoison.Manager()
    memories = [manager.open(file(2 * PAGE_SIZE, name), "r+") for name in ("one", "two", "three")]
    for one in memories:
        one.write(0, b"changed")
        manager.inject(one, 0)
    with pytest.raises(OSError, match="one'") as caught:
        manager.close()
    first, second = caught.value.__notes__
    assert memories[1].name in first
    assert memories[2].name in second
