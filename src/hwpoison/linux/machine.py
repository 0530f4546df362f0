"""`hwpoison.core.machine.Machine` on Linux: puts the parts of this package together."""

from __future__ import annotations

import asyncio
import mmap
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

from hwpoison.core.machine import Result, Runs, Store
from hwpoison.linux import frames, syscalls, userfaultfd
from hwpoison.linux.files import WORKERS_OF_MOUNT, LinuxFile, mount_of
from hwpoison.linux.journal import LABEL, LinuxRecords
from hwpoison.linux.kept import Alone, Keeping
from hwpoison.linux.quarantine import Quarantine
from hwpoison.linux.space import LinuxSpace
from hwpoison.linux.store import LinuxStore
from hwpoison.linux.syscalls import PAGE_SIZE, address_of

FILE_WORKERS = 64
"""File operations that may wait at the same time."""
IO_SECONDS_MAX = 30.0
"""How long a fault waits for a file, if nothing else is wanted."""
CLIENT_WORKERS = 32
"""Ioctls that may wait for clients' mmap locks at the same time."""


class _Workers(ThreadPoolExecutor):
    """As that, and `asked` is what has no answer yet."""

    def __init__(self, many: int, name: str) -> None:
        super().__init__(many, name)
        self.asked: set[Future[Any]] = set()

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future = super().submit(call, *arguments, **options)
        self.asked.add(future)
        future.add_done_callback(self.asked.discard)
        return future


class LinuxMachine:
    """The operating system. `keeping` holds what outlives this process; `wanted` leaves features out, for tests."""

    page_size = PAGE_SIZE
    large_frame_bytes = frames.large_frame_bytes()
    publish_at_once_bytes = 64 << 10

    def __init__(
        self,
        keeping: Keeping | None = None,
        wanted: userfaultfd.Feature = userfaultfd.NEEDED | userfaultfd.Feature.POISON,
        inherited: Mapping[str, int] | None = None,
        io_seconds_max: float = IO_SECONDS_MAX,
    ) -> None:
        self.io_seconds_max = io_seconds_max
        self.keeping = keeping or Alone()
        self.inherited = dict(inherited or {})
        """Descriptors by label, of managers before this one."""
        self.records = LinuxRecords(self.keeping, self.inherited.get(LABEL, -1))
        self._own = userfaultfd.open_userfaultfd(wanted)
        self.poison_markers = bool(self._own.features & userfaultfd.Feature.POISON)
        self.quarantine = Quarantine(self.keeping, self.records, self.inherited)
        self._file_workers = _Workers(FILE_WORKERS, "hwpoison-file")
        self._client_workers = ThreadPoolExecutor(CLIENT_WORKERS, "hwpoison-client")
        self._turns_of_mounts: WeakValueDictionary[int, asyncio.Semaphore] = WeakValueDictionary()
        self._pagemap = frames.PageMap() if self._sees_frames() else None
        self._frame_flags: frames.FrameFlags | None = None
        with suppress(OSError):
            self._frame_flags = frames.FrameFlags()

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

    def now(self) -> float:
        return time.time()

    async def in_time(self, story: Awaitable[Result]) -> Result:
        async with asyncio.timeout(self.io_seconds_max):
            return await story

    @property
    def held(self) -> int:
        return self.quarantine.count

    def create(self, name: str, nbytes: int, number: int = 0) -> LinuxStore:
        try:
            return self.store(number, name, nbytes, None)
        except MemoryError as error:
            raise MemoryError(f"{error}; a process has {_addresses()} bytes of addresses for all that it maps") from error

    def store(self, number: int, name: str, nbytes: int, inherited: tuple[int, int] | None) -> LinuxStore:
        """A new one, or one that is `inherited`."""
        return LinuxStore(
            name,
            nbytes,
            number=number,
            keeping=self.keeping,
            inherited=inherited,
            own=self._own.fd,
            quarantine=self.quarantine,
            pagemap=self._pagemap,
            frame_flags=self._frame_flags,
            workers=self._file_workers,
        )

    def table(self, nbytes: int) -> mmap.mmap:
        # Not reserved: of a large object's table most is never touched.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | syscalls.MAP_NORESERVE
        try:
            table = mmap.mmap(-1, nbytes, flags=flags)
        except (OSError, OverflowError) as error:
            raise MemoryError(f"the system gives no table of {nbytes} bytes for an object's pages: {error}") from error
        with suppress(OSError):
            # One page of the table must not become 2 MiB of it.
            table.madvise(syscalls.MADV_NOHUGEPAGE)
        return table

    def file(self, fd: int, label: str = "") -> LinuxFile:
        """A file by descriptor, which it owns from now on. `label`: under which it is kept."""
        return LinuxFile(fd, self._file_workers, self._turns_of_mount(fd), self.keeping, label)

    async def open_file(self, fd: int, name: str) -> LinuxFile:
        """As `file`, and it is known what kind of file it is. Raises IsADirectoryError or ValueError for what is no regular
        file."""
        file = self.file(fd)
        try:
            await file.prepare(name)
        except BaseException:
            await file.close()
            raise
        return file

    async def let_go(self, fd: int) -> None:
        """Close a descriptor of whatever kind. A file system may have to be asked even for that."""
        async with self._turns_of_mount(fd):
            with suppress(OSError):
                await asyncio.get_running_loop().run_in_executor(self._file_workers, os.close, fd)

    async def unanswered(self, seconds: float) -> int:
        """How much of what files are being asked for now has no answer within that time. This process ends no sooner."""
        asked = set(self._file_workers.asked)
        return len((await asyncio.to_thread(wait, asked, seconds)).not_done)

    def _turns_of_mount(self, fd: int) -> asyncio.Semaphore:
        return self._turns_of_mounts.setdefault(mount_of(fd), asyncio.Semaphore(WORKERS_OF_MOUNT))

    def space(self, fd: int, pid: int, pidfd: int) -> LinuxSpace:
        """The address space of process `pid`, by its userfaultfd."""
        return LinuxSpace(fd, pid, pidfd, self._client_workers)

    async def find_frame(self, number: int, stores: Sequence[tuple[Store, Runs]]) -> tuple[int, int] | None:
        for index, (store, runs) in enumerate(stores):
            assert isinstance(store, LinuxStore)
            page = await asyncio.get_running_loop().run_in_executor(self._file_workers, store.find, number, runs)
            store.searched()
            if page is not None:
                return index, page
        return None

    def quarantined(self, number: int) -> bool:
        return number in self.quarantine.numbers

    async def reserved(self, *, pid: int | None = None, number: int | None = None) -> bool:
        if pid is not None:
            return pid == os.getpid()
        if not number or not self.knows_frames:
            return False
        return await asyncio.get_running_loop().run_in_executor(self._file_workers, frames.mapped_by, "self", number)

    async def offline(self, number: int) -> None:
        await asyncio.get_running_loop().run_in_executor(self._file_workers, frames.hard_offline, number)

    def close(self) -> None:
        """Let everything go; the keeper may still hold the quarantine."""
        self._file_workers.shutdown()
        self._client_workers.shutdown(wait=False, cancel_futures=True)
        self.quarantine.close()
        self.records.close()
        if self._pagemap is not None:
            self._pagemap.close()
        if self._frame_flags is not None:
            self._frame_flags.close()
        os.close(self._own.fd)


def _addresses() -> int:
    """How many bytes of addresses a process has here: its stack is near their end."""
    with open("/proc/self/maps", errors="surrogateescape") as maps:
        ends = [int(line.split()[0].partition("-")[2], 16) for line in maps if "[stack]" in line]
    return 1 << max(ends).bit_length()
