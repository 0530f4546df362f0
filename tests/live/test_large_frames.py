"""A page in a large frame can't be isolated alone: a punch zeroes it in place (linux-facts 11)."""

import mmap
import os
from pathlib import Path

import pytest

import hwpoison
from hwpoison.core.records import Outcome
from tests.support import need

SETTING = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
MADV_COLLAPSE = 25
BLOCK = 2 << 20


@pytest.fixture
def _huge_pages_for_shared_memory():
    need(not os.geteuid() and SETTING.exists(), "root and transparent huge pages, to make the kernel collapse memory")
    before = SETTING.read_text().split("[")[1].split("]")[0]
    SETTING.write_text("always")
    yield
    SETTING.write_text(before)


@pytest.mark.usefixtures("_huge_pages_for_shared_memory")
def test_the_kernel_makes_no_large_frames_of_our_mappings():
    with hwpoison.Manager() as manager, manager.allocate(BLOCK, name="small") as memory:
        memory.write(0, b"\1" * BLOCK)
        with pytest.raises(OSError, match="Invalid argument"):
            memory._mapping.madvise(MADV_COLLAPSE)


@pytest.mark.usefixtures("_huge_pages_for_shared_memory")
def test_a_failure_in_a_large_frame_loses_its_block_and_never_reads_as_zeros():
    with hwpoison.Manager() as manager, manager.allocate(2 * BLOCK, name="large") as memory:
        memory.write(0, b"\1" * (2 * BLOCK))
        # Somebody who maps the memory without our care lets the kernel collapse it.
        with mmap.mmap(memory._memfd().number, 2 * BLOCK) as careless:
            try:
                careless.madvise(MADV_COLLAPSE)
            except OSError:
                need(False, "MADV_COLLAPSE of shared memory")
        failure = manager.inject(memory, 0x5000)
        assert failure.outcome is Outcome.FAILED
        assert [(one.offset % BLOCK, one.nbytes) for one in memory.lost()] == [(0, BLOCK)]
        lost = memory.lost()[0].offset
        with pytest.raises(hwpoison.PoisonError):
            memory.read(lost + 0x5000, 1)
        other = BLOCK - lost
        assert memory.read(other, BLOCK) == b"\1" * BLOCK
