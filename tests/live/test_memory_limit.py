"""A manager that holds less memory than its files, while the kernel is made to put pages of theirs into large frames."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import hwpoison
from hwpoison.core.reclaim import FILES_LEAST
from hwpoison.linux.syscalls import PAGE_SIZE
from tests.large_frames import BLOCK_BYTES, collapse
from tests.live.conftest import known
from tests.live.process import Child

MakeFile = Callable[..., Path]


@contextmanager
def pinned(memory: int, offset: int) -> Iterator[None]:
    """Somebody holds the frame of this page, as a pipe does; a large frame with it is held whole."""
    read, write = os.pipe()
    try:
        assert os.splice(memory, write, PAGE_SIZE, offset_src=offset) == PAGE_SIZE
        yield
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_pages_of_a_large_frame_that_somebody_holds_are_dropped_and_come_back_right(mode: str, file: MakeFile) -> None:
    nbytes, limit = 5 * BLOCK_BYTES, 2 * BLOCK_BYTES
    path = file(nbytes)
    expected = bytearray(known(nbytes))
    with hwpoison.Manager(memory_limit=limit) as manager:
        memory = manager.open(path, mode)
        for version in (2, 3):
            assert memory.buffer[:BLOCK_BYTES] == expected[:BLOCK_BYTES]
            if mode == "r+":
                memory.buffer[:BLOCK_BYTES] = expected[:BLOCK_BYTES] = known(BLOCK_BYTES, version)
            collapse(memory._memfd().number)
            with pinned(memory._memfd().number, 77 * PAGE_SIZE):
                dropped = manager.statistics().dropped
                for offset in random.Random(version).sample(range(BLOCK_BYTES, nbytes, PAGE_SIZE), 1500):
                    assert memory.buffer[offset : offset + PAGE_SIZE] == expected[offset : offset + PAGE_SIZE]
                assert manager.statistics().memory_present <= limit
                assert manager.statistics().dropped - dropped > BLOCK_BYTES
                assert memory.buffer == expected
        assert memory.lost() == []
    assert path.read_bytes() == expected


def test_files_are_written_right_within_a_limit_of_whole_large_frames(file: MakeFile) -> None:
    nbytes, limit = 6 * BLOCK_BYTES, 2 * BLOCK_BYTES
    path = file(nbytes)
    expected = bytearray(known(nbytes))
    chance = random.Random(5)
    with hwpoison.Manager(memory_limit=limit) as manager:
        memory = manager.open(path, "r+")
        for unit in range(6):
            memory.prefetch(unit * BLOCK_BYTES, BLOCK_BYTES)
            for page in chance.sample(range(512), 100):
                offset = unit * BLOCK_BYTES + page * PAGE_SIZE
                memory.buffer[offset : offset + 8] = expected[offset : offset + 8] = chance.randbytes(8)
            assert manager.statistics().memory_present <= limit
        assert memory.buffer == expected
        assert manager.statistics().memory_present <= limit
    assert path.read_bytes() == expected


def test_small_anonymous_objects_count_as_the_pages_that_they_take() -> None:
    with hwpoison.Manager(memory_limit=10 * PAGE_SIZE) as manager:
        kept = [manager.allocate(1) for _ in range(10)]
        for one in kept:
            one.buffer[0] = 1
        with pytest.raises(MemoryError, match="do not fit"):
            manager.allocate(1)
        assert manager.statistics().memory_present == 10 * PAGE_SIZE


READS_AND_WRITES = """
import random
memory = hwpoison.connect(arguments[0]).attach(arguments[1])
page, chance = os.sysconf("SC_PAGE_SIZE"), random.Random(arguments[2])
mine = 8 + 8 * arguments[2]
for _ in range(200):
    # The borders between pages, from many places of the file to a place of one's own.
    there = chance.randrange(40 * page - 7, memory.nbytes - 8, page)
    content = memory.buffer[there : there + 8].tobytes()
    assert content == memory.read(there, 8)
    at = page * mine - 4
    memory.buffer[at : at + 8] = content
    assert memory.buffer[at : at + 8] == content
say("done")
"""


@pytest.mark.parametrize("filled", [False, True])
def test_accesses_over_the_borders_of_pages_end_however_little_a_limit_leaves_to_files(filled: bool, file: MakeFile) -> None:
    limit = 64 * PAGE_SIZE if filled else PAGE_SIZE
    nbytes = 300 * PAGE_SIZE
    path = file(nbytes)
    with hwpoison.Manager(memory_limit=limit) as manager:
        if filled:
            manager.allocate(limit).buffer[:] = bytes([1]) * limit
        memory = manager.open(path, "r+", name="file")
        assert memory.read(PAGE_SIZE - 6, 12) == known(nbytes)[PAGE_SIZE - 6 : PAGE_SIZE + 6]
        with ExitStack() as stack:
            children = [stack.enter_context(Child(READS_AND_WRITES, manager.socket, "file", number)) for number in range(3)]
            assert [child.hear() for child in children] == ["done"] * 3
        assert manager.statistics().memory_present <= (limit if filled else 0) + FILES_LEAST * PAGE_SIZE
