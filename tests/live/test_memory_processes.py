"""How a memory comes to other processes, and what they see of it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

import hwpoison
from tests.live.frames import PAGE
from tests.live.process import Child
from tests.support import SECONDS_MAX, wait_until

MakeFile = Callable[..., Path]


def _double(memory: hwpoison.Memory, other: hwpoison.Memory) -> None:
    memory.array("u8")[:] *= 2
    other.buffer[0] = len(memory.name)
    with pytest.raises(hwpoison.PoisonError):
        memory._manager.attach("lost").read(0, 1)


def test_a_memory_is_pickled_to_another_process(manager: hwpoison.Manager) -> None:
    memory, other, lost = manager.allocate(PAGE, "t"), manager.allocate(1), manager.allocate(1, "lost")
    memory.array("u8")[:] = range(512)
    lost.buffer[0] = 1
    manager.inject("lost", 0)
    process = multiprocessing.get_context("spawn").Process(target=_double, args=(memory, other))
    process.start()
    process.join(SECONDS_MAX)
    assert process.exitcode == 0
    process.close()
    assert memory.array("u8").tolist() == list(range(0, 1024, 2))
    assert other.buffer[0] == 1
    wait_until(lambda: manager.objects()[0].mappings == 1, "the process has gone")


def test_a_memory_that_is_pickled_within_a_process_comes_by_the_same_connection(manager: hwpoison.Manager) -> None:
    memory = manager.allocate(PAGE, "t")
    again = pickle.loads(pickle.dumps(memory))
    again.buffer[0] = 7
    assert memory.buffer[0] == 7
    assert again.address != memory.address
    assert manager.statistics().clients == 1


def _descriptors(memory: hwpoison.Memory) -> tuple[int, int]:
    memory.read(0, 1)
    return os.getpid(), len(os.listdir("/proc/self/fd"))


def test_a_memory_that_is_passed_with_each_task_of_a_pool_leaves_nothing_behind(manager: hwpoison.Manager) -> None:
    with manager.allocate(PAGE, "t") as memory, multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.map(_descriptors, [memory] * 50, chunksize=1)
        # The first ones connect, and open another channel.
        assert len(set(found[2:])) == 1
        wait_until(lambda: manager.objects()[0].mappings <= 3, "those of the tasks before are gone")


def test_a_memory_that_nobody_has_any_more_is_gone_unless_it_has_views(manager: hwpoison.Manager) -> None:
    array = manager.allocate(PAGE, "viewed").array("u1")
    array[0] = 7
    manager.allocate(PAGE, "dropped").write(0, b"x")
    gc.collect()
    wait_until(lambda: [one.name for one in manager.objects()] == ["viewed"], "what nobody has is gone")
    with pytest.warns(ResourceWarning, match="kept by their views: viewed"):
        manager.close()
    assert array[0] == 7
    assert array[PAGE - 1] == 0


def test_a_pickled_memory_never_becomes_another_object_of_its_name(manager: hwpoison.Manager) -> None:
    with manager.allocate(PAGE, "mine") as memory:
        pickled = pickle.dumps(memory)
    with pytest.raises(ValueError, match="closed"):
        pickle.dumps(memory)
    other = manager.allocate(PAGE, "mine")
    with pytest.raises(FileNotFoundError, match="another object has its name"):
        pickle.loads(pickled)
    other.buffer[:3] = b"abc"
    assert pickle.loads(pickle.dumps(other)).read(0, 3) == b"abc"


def test_a_pickled_memory_whose_manager_has_ended_is_a_connection_error() -> None:
    with hwpoison.Manager() as manager:
        pickled = pickle.dumps(manager.allocate(1))
    with pytest.raises(ConnectionError):
        pickle.loads(pickled)


def test_a_memory_is_attached_by_name_in_another_process_and_both_see_every_store(manager: hwpoison.Manager) -> None:
    memory = manager.allocate(3 * PAGE, "t")
    code = """
manager = hwpoison.connect(arguments[0])
memory = manager.attach("t")
while (order := hear()) is not None:
    offset, value = order
    before = memory.buffer[offset]
    memory.buffer[offset] = value
    say(before)
try:
    manager.attach("missing")
except FileNotFoundError:
    say("missing")
manager.close()
"""
    with Child(code, manager.socket) as child:
        for offset, value in ((0, 1), (2 * PAGE + 5, 2), (0, 3)):
            memory.buffer[offset + 1] = value
            before = memory.buffer[offset]
            assert child.ask((offset, value)) == before
            assert memory.buffer[offset] == value
            assert child.ask((offset + 1, 0)) == value
        assert child.ask(None) == "missing"
        assert child.wait() == 0
