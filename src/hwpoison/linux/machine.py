"""`hwpoison.core.machine.Machine` on Linux: puts the parts of this package together."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

from hwpoison.core.machine import Store
from hwpoison.linux import frames, userfaultfd
from hwpoison.linux.files import LinuxFile
from hwpoison.linux.quarantine import Quarantine
from hwpoison.linux.space import LinuxSpace
from hwpoison.linux.store import LinuxStore
from hwpoison.linux.syscalls import PAGE_SIZE, address_of

FILE_WORKERS = 64
"""File operations that may wait at the same time."""
CLIENT_WORKERS = 32
"""Ioctls that may wait for clients' mmap locks at the same time."""


class LinuxMachine:
    """The operating system. `keep` is given each new quarantine pipe; `wanted` leaves features out, for tests."""

    page_size = PAGE_SIZE

    def __init__(
        self,
        keep: Callable[[int], None] | None = None,
        wanted: userfaultfd.Feature = userfaultfd.NEEDED | userfaultfd.Feature.POISON,
    ) -> None:
        self._own = userfaultfd.open_userfaultfd(wanted)
        self.poison_markers = bool(self._own.features & userfaultfd.Feature.POISON)
        self.quarantine = Quarantine(keep)
        self._file_workers = ThreadPoolExecutor(FILE_WORKERS, "hwpoison-file")
        self._client_workers = ThreadPoolExecutor(CLIENT_WORKERS, "hwpoison-client")
        self._pagemap = frames.PageMap() if self._sees_frames() else None

    @staticmethod
    def _sees_frames() -> bool:
        """PFNs are for those with CAP_SYS_ADMIN; everybody else reads zeros."""
        probe = bytearray(PAGE_SIZE)
        pagemap = frames.PageMap()
        try:
            return any(pagemap.numbers(address_of(probe), 1))
        finally:
            pagemap.close()

    @property
    def knows_frames(self) -> bool:
        return self._pagemap is not None

    def create(self, name: str, nbytes: int) -> LinuxStore:
        return LinuxStore(
            name,
            nbytes,
            own=self._own.fd,
            quarantine=self.quarantine,
            pagemap=self._pagemap,
            workers=self._file_workers,
        )

    def file(self, fd: int) -> LinuxFile:
        """A file by descriptor, which it owns from now on."""
        return LinuxFile(fd, self._file_workers)

    def space(self, fd: int, pid: int, pidfd: int) -> LinuxSpace:
        """The address space of process `pid`, by its userfaultfd."""
        return LinuxSpace(fd, pid, pidfd, self._client_workers)

    async def find_frame(self, number: int, stores: Sequence[tuple[Store, Callable[[int], bool]]]) -> tuple[int, int] | None:
        def search() -> tuple[int, int] | None:
            for index, (store, is_present) in enumerate(stores):
                page = cast(LinuxStore, store).find(number, is_present)
                if page is not None:
                    return index, page
            return None

        return await asyncio.get_running_loop().run_in_executor(self._file_workers, search)

    def quarantined(self, number: int) -> bool:
        return number in self.quarantine.numbers

    def reserved(self, *, pid: int | None = None, number: int | None = None) -> bool:
        if pid is not None:
            return pid == os.getpid()
        return number is not None and number > 0 and self.knows_frames and frames.mapped_by("self", number)

    async def offline(self, number: int) -> None:
        await asyncio.get_running_loop().run_in_executor(self._file_workers, frames.hard_offline, number)

    def close(self) -> None:
        """Let everything go; the keeper may still hold the quarantine."""
        self._file_workers.shutdown()
        self._client_workers.shutdown(wait=False, cancel_futures=True)
        self.quarantine.close()
        os.close(self._own.fd)
