"""How a test gets the kernel to put pages of ours into a large frame, which it does not do by itself."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from hwpoison.linux import syscalls
from tests.support import need, wait_until

BLOCK_BYTES = 2 << 20
MADV_COLLAPSE = 25
SETTING = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def collapse(memory: int) -> None:
    """Make the first 2 MiB of a memfd, all present, one large frame: by somebody who maps it without our care."""
    need(not os.geteuid() and SETTING.exists(), "root and transparent huge pages, to make the kernel collapse memory")
    before = SETTING.read_text().split("[")[1].split("]")[0]
    SETTING.write_text("always")
    try:
        with mmap.mmap(memory, BLOCK_BYTES, prot=mmap.PROT_READ) as careless:
            need(not syscalls.address_of(careless) % BLOCK_BYTES, "a kernel that aligns mappings to huge pages")
            wait_until(lambda: _collapsed(careless), "the kernel, which asks to try again where a page is in use just then")
    finally:
        SETTING.write_text(before)


def _collapsed(careless: mmap.mmap) -> bool:
    try:
        careless.madvise(MADV_COLLAPSE)
    except BlockingIOError:
        return False
    return True
