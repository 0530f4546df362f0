"""What a managed page costs the manager: its private memory and its page tables, at 4 GiB managed and all present.

The object is a sparse file, all of it brought in. Beforehand the manager has served a tiny object of the same kind; what
it then needs more is for the pages. Beside it, in place of a floor: the page tables of a process that maps and touches as
much by itself.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from hwpoison.cli.benchmarks.common import Bench, Result, Target

NBYTES = 4 << 30
STEP_BYTES = 64 << 20
PLAIN_BYTES = 256 << 20


def measure(bench: Bench) -> Iterator[Result]:
    """Bytes a page."""
    plain = _page_tables_of_plain_mapping()
    with bench.manager() as manager:
        before = 0
        for name, nbytes in (("tiny", mmap.PAGESIZE), ("large", NBYTES)):
            path = bench.folder / name
            with path.open("wb") as file:
                file.truncate(nbytes)
            memory = manager.open(path, "r")
            for offset in range(0, nbytes, STEP_BYTES):
                memory.prefetch(offset, min(STEP_BYTES, nbytes - offset))
            present = manager.statistics().memory_present
            if name == "tiny":
                before = _own_bytes(manager.pid)
            elif present < nbytes:
                raise RuntimeError(f"only {present} of {nbytes} bytes could be brought in: is there enough free memory?")
        value = (_own_bytes(manager.pid) - before) / (NBYTES // mmap.PAGESIZE)
    note = f"{NBYTES >> 30} GiB managed and present; RssAnon + VmPTE; floor: the page tables of a plain mapping"
    yield Result("manager's memory for a page", value, "B", plain, Target(4, "value"), note)


def _own_bytes(pid: int | str) -> int:
    """Private memory and page tables."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "VmPTE"))


def _page_tables_of_plain_mapping() -> float:
    fd = os.memfd_create("plain", os.MFD_CLOEXEC)
    os.ftruncate(fd, PLAIN_BYTES)
    before = _own_bytes("self")
    with mmap.mmap(fd, PLAIN_BYTES, mmap.MAP_SHARED) as mapping:
        os.close(fd)
        for offset in range(0, PLAIN_BYTES, mmap.PAGESIZE):
            mapping[offset] = 1
        return (_own_bytes("self") - before) / (PLAIN_BYTES // mmap.PAGESIZE)
