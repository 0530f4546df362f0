"""The buffer pool of a small database: pages in managed memory, and a log from which those that are lost are done again.

The database's file has each page as it was at the last checkpoint; the log has every change since. A page of the pool that
is lost is read from the file, and its changes are made again: nobody who uses the pool notices more than a slow access.

    python examples/buffer_pool.py
"""

from __future__ import annotations

import mmap
import random
import struct
import tempfile
import threading
from pathlib import Path
from typing import BinaryIO

import hwpoison

PAGE = mmap.PAGESIZE
PAGES = 256
CHANGE = struct.Struct("<IIQ")
"""A record of the log: page, offset in it, the 8 bytes that are there from now on."""


class BufferPool:
    """Not for several threads at once: the latches of a real one have been left out."""

    def __init__(self, manager: hwpoison.BaseManager, file: Path, log: BinaryIO) -> None:
        self._memory = manager.allocate(PAGES * PAGE, "buffer pool")
        self._file, self._log = file, log
        self._file.write_bytes(bytes(PAGES * PAGE))
        self.redone = 0

    def change(self, page: int, offset: int, value: int) -> None:
        """The log first: what is in the pool can be lost at any moment."""
        self._log.write(CHANGE.pack(page, offset, value))
        self._log.flush()
        while True:
            try:
                self._memory.write(page * PAGE + offset, value.to_bytes(8, "little"))
                return
            except hwpoison.PoisonError:
                self._redo()

    def read(self, page: int, offset: int) -> int:
        while True:
            try:
                return int.from_bytes(self._memory.read(page * PAGE + offset, 8), "little")
            except hwpoison.PoisonError:
                self._redo()

    def checkpoint(self) -> None:
        """All pages to the file, and an empty log."""
        while True:
            try:
                content = self._memory.read(0, PAGES * PAGE)
                break
            except hwpoison.PoisonError:
                self._redo()
        self._file.write_bytes(content)
        self._log.seek(0)
        self._log.truncate()

    def _redo(self) -> None:
        """Pages that are lost: from the file, with all changes since."""
        lost = {
            page for one in self._memory.lost() for page in range(one.offset // PAGE, -(-(one.offset + one.nbytes) // PAGE))
        }
        with self._file.open("rb") as file:
            pages = {page: bytearray(_at(file, page)) for page in lost}
        self._log.seek(0)
        for page, offset, value in CHANGE.iter_unpack(self._log.read()):
            if page in pages:
                pages[page][offset : offset + 8] = value.to_bytes(8, "little")
        for page, content in pages.items():
            self._memory.repair(page * PAGE, content)
        self.redone += len(pages)

    def close(self) -> None:
        self._memory.close()


def _at(file: BinaryIO, page: int) -> bytes:
    file.seek(page * PAGE)
    return file.read(PAGE)


def strike(manager: hwpoison.Manager, failures: int) -> None:
    chance = random.Random(1)
    for _ in range(failures):
        manager.inject("buffer pool", chance.randrange(PAGES * PAGE))


def main() -> None:
    chance, expected = random.Random(2), dict[tuple[int, int], int]()
    with (
        tempfile.TemporaryDirectory() as folder,
        Path(folder, "log").open("w+b") as log,
        hwpoison.Manager() as manager,
    ):
        pool = BufferPool(manager, Path(folder, "database"), log)
        # Pages fail meanwhile (simulated), whenever it pleases them.
        failures = threading.Thread(target=strike, args=(manager, 50))
        failures.start()
        for number in range(20_000):
            page, offset = chance.randrange(PAGES), chance.randrange(0, PAGE, 8)
            pool.change(page, offset, number)
            expected[page, offset] = number
            if number % 5_000 == 4_999:
                pool.checkpoint()
        failures.join()
        wrong = sum(pool.read(*place) != value for place, value in expected.items())
        print("pages that were lost and done again:", "some" if pool.redone else "none")
        print(f"{wrong} of {len(expected)} values are wrong")
        pool.close()


if __name__ == "__main__":
    main()
