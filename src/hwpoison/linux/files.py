"""Files behind objects, read so that their content is not kept twice.

What the kernel's page cache has is copied from there. What it has not is read past it (O_DIRECT), or, where the file
system can't do that, through it, and dropped from it again.

A file system whose server is elsewhere (a network, FUSE) may not answer, not even when it is asked for a file's size. Such
a file is asked in a worker, whatever it is asked for, and takes so many of them and no more.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial
from typing import TypeVar

from hwpoison.core.books import WINDOW_BYTES
from hwpoison.core.machine import Content, Identity, ShrunkError, Written
from hwpoison.linux import syscalls
from hwpoison.linux.buffers import Buffers
from hwpoison.linux.kept import Alone, Keeping
from hwpoison.linux.syscalls import PAGE_SIZE

WORKERS_OF_FILE = 8
"""Workers that one file can make wait: one whose file system hangs must not take all."""
WORKERS_OF_MOUNT = 24
"""Workers that all files of one file system that has a server can make wait."""
AT_ONCE_BYTES = 1 << 16
"""Most bytes that `read_cached` copies on the event loop."""


LOCAL_FILE_SYSTEMS = frozenset(
    {
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # XFS
        0x9123683E,  # Btrfs
        0xF2F52010,  # F2FS
        0xCA451A4E,  # bcachefs
        0x2FC12FC1,  # ZFS
        0x01021994,  # tmpfs
        0x858458F6,  # ramfs
        0x794C7630,  # overlay: of local ones, in containers
        0x73717368,  # SquashFS
        0xE0F5E1E2,  # EROFS
    }
)
"""Those that know a file's size and times, and what the page cache has of it, without asking anybody (linux/magic.h)."""


def file_label(number: int) -> str:
    """Under which the file of an object is kept."""
    return f"file:{number}"


def checked_file(fd: int, name: str) -> None:
    """Raises the exception that fits if `fd` is not a regular file."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, f"{name!r} is a directory; an object needs a regular file")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{name!r} is not a regular file (a FIFO, socket or device can't back an object)")


Result = TypeVar("Result")
_buffers = Buffers(WINDOW_BYTES + PAGE_SIZE)


class LinuxFile:
    """See `hwpoison.core.machine.File`. Owns `fd`.

    What kind of file it is, is asked when it is first used: the file system may not answer. `label`: it is kept already.
    """

    def __init__(
        self,
        fd: int,
        workers: Executor,
        turns_of_mount: asyncio.Semaphore | None = None,
        keeping: Keeping | None = None,
        label: str = "",
    ) -> None:
        self._fd = fd
        self._workers = workers
        self._keeping = keeping or Alone()
        self._label = label
        self._turns = asyncio.Semaphore(WORKERS_OF_FILE)
        self._turns_of_mount = turns_of_mount or asyncio.Semaphore(WORKERS_OF_MOUNT)
        self._local = False
        self._scratch = mmap.mmap(-1, AT_ONCE_BYTES)
        self._mapped = (0, 0)
        self._mapping_lock = threading.Lock()
        self._told_what_is_cached = False
        self._direct = -1
        self._prepared = False

    async def prepare(self, name: str) -> None:
        """Raises the exception that fits if it is no regular file."""

        def checked() -> None:
            checked_file(self._fd, name)

        await self._in_worker(checked)

    def prepare_now(self) -> None:
        """May wait for the file system."""
        with self._mapping_lock:
            if self._prepared:
                return
            fd = self._fd
            # To those who neither own the file nor may write to it, mincore says that all of it is in the page cache.
            by_descriptor = f"/proc/self/fd/{fd}"
            may_write = os.access(by_descriptor, os.W_OK, effective_ids=True)
            self._told_what_is_cached = may_write or os.fstat(fd).st_uid == os.geteuid()
            # No read-ahead: what it brought would stay, and look as if somebody else had wanted it.
            with suppress(OSError):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            with suppress(OSError):
                self._direct = os.open(by_descriptor, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            with suppress(OSError):
                self._local = syscalls.file_system_type(fd) in LOCAL_FILE_SYSTEMS
            self._prepared = True

    def keep(self, number: int) -> None:
        self._label = file_label(number)
        self._keeping.keep((self._label, self._fd))

    def identity_now(self) -> Identity:
        """As `identity`, and may wait for the file system."""
        found = os.fstat(self._fd)
        return Identity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    async def identity(self) -> Identity:
        return self.identity_now() if self._local else await self._in_worker(self.identity_now)

    def read_cached(self, offset: int, nbytes: int) -> tuple[Content, Identity] | None:
        content = self._cached(offset, nbytes)
        return None if content is None else (content, self.identity_now())

    def _cached(self, offset: int, nbytes: int) -> Content | None:
        if not self._local or nbytes > AT_ONCE_BYTES or not self._resident(offset, nbytes):
            return None
        view = memoryview(self._scratch)[:nbytes]
        try:
            # It was cached a moment ago; if it is not any more, this must not wait for the disk.
            got = os.preadv(self._fd, [view], offset, os.RWF_NOWAIT)
        except OSError:
            return None
        return view[:got]

    async def read(self, offset: int, nbytes: int) -> Content:
        cached = self._cached(offset, nbytes)
        if cached is not None and len(cached) == nbytes:
            return bytes(cached)
        return await self._in_worker(partial(self._read, offset, nbytes))

    def _read(self, offset: int, nbytes: int) -> Content:
        if self._resident(offset, nbytes):
            return _read_all(self._fd, offset, nbytes)
        # Past the cache, and out of it again, go whole pages.
        skipped = offset % PAGE_SIZE
        begin = offset - skipped
        if self._direct >= 0:
            with suppress(OSError):
                return _read_all(self._direct, begin, skipped + nbytes, granule=PAGE_SIZE)[skipped:]
        content = _read_all(self._fd, offset, nbytes)
        with suppress(OSError):
            end = -(-(offset + nbytes) // PAGE_SIZE) * PAGE_SIZE
            os.posix_fadvise(self._fd, begin, end - begin, os.POSIX_FADV_DONTNEED)
        return content

    def _resident(self, offset: int, nbytes: int) -> bool:
        """True if the page cache has all of it. The file's mapping is only asked, never read."""
        if not self._told_what_is_cached:
            return False
        begin = offset // PAGE_SIZE * PAGE_SIZE
        # The event loop and the workers come here: what one has unmapped, another must not unmap again.
        with self._mapping_lock:
            address, length = self._mapped
            if offset + nbytes > length:
                length = -(-os.fstat(self._fd).st_size // PAGE_SIZE) * PAGE_SIZE
                if offset + nbytes > length:
                    return False
                old = self._mapped
                try:
                    address = syscalls.map_memory(length, mmap.PROT_READ, mmap.MAP_SHARED, self._fd)
                except OSError:
                    return False
                self._mapped = (address, length)
                if old[1]:
                    syscalls.unmap_memory(*old)
        try:
            return syscalls.all_resident(address + begin, offset + nbytes - begin)
        except OSError:
            return False

    async def _in_worker(self, call: Callable[[], Result]) -> Result:
        turns = []
        try:
            for one in (self._turns,) if self._local else (self._turns, self._turns_of_mount):
                await one.acquire()
                turns.append(one)
            done = asyncio.get_running_loop().run_in_executor(self._workers, self._prepared_first, call)
        except BaseException:
            for one in turns:
                one.release()
            raise

        def over(_: object) -> None:
            for one in turns:
                one.release()
            if not done.cancelled():
                done.exception()  # Nobody may want to know it any more.

        # Whoever waits for it may give up. The worker does not, and has its turns until the file system has answered.
        done.add_done_callback(over)
        return await asyncio.shield(done)

    def _prepared_first(self, call: Callable[[], Result]) -> Result:
        if not self._prepared:
            self.prepare_now()
        return call()

    async def write(self, offset: int, content: Content) -> Written:
        return await self._in_worker(partial(self._write, offset, content))

    def _write(self, offset: int, content: Content) -> Written:
        before = self.identity_now()
        error = None
        view = memoryview(content)
        nbytes, end = before.nbytes, offset + len(view)
        try:
            while view:
                # A write beyond the end would make the file longer, with zeros in between that nobody has written. (Who
                # truncates it between this look and the write is too fast for us: no system call does both.)
                if nbytes < end:
                    raise ShrunkError(nbytes, end)
                done = os.pwrite(self._fd, view, offset)
                offset += done
                view = view[done:]
                if view:
                    nbytes = os.fstat(self._fd).st_size
        except OSError as caught:
            error = caught
        return Written(before, self.identity_now(), error)

    async def sync(self) -> None:
        await self._in_worker(self._sync)

    def _sync(self) -> None:
        os.fsync(self._fd)
        with suppress(OSError):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    async def close(self) -> None:
        if self._label:
            self._keeping.drop(self._label)
        mapped, fds = self._mapped, (self._fd, self._direct)
        # Whoever still comes must not meet another file under the same number.
        self._fd = self._direct = -1
        self._mapped = (0, 0)
        if self._local:
            _close(mapped, fds)
        else:
            async with self._turns, self._turns_of_mount:
                await asyncio.get_running_loop().run_in_executor(self._workers, _close, mapped, fds)


def mount_of(fd: int) -> int:
    """The number of the mount that a file was opened in. The file system is not asked."""
    with open(f"/proc/self/fdinfo/{fd}") as lines:
        return next((int(line.split()[1]) for line in lines if line.startswith("mnt_id:")), -1)


def _close(mapped: tuple[int, int], fds: tuple[int, ...]) -> None:
    if mapped[1]:
        syscalls.unmap_memory(*mapped)
    for fd in fds:
        if fd >= 0:
            # Some file systems say only here what they have said to fsync; the descriptor is closed all the same.
            with suppress(OSError):
                os.close(fd)


def _read_all(fd: int, offset: int, nbytes: int, granule: int = 1) -> Content:
    """The bytes, fewer only at the end of the file. A read of a part of a `granule` has come to the end."""
    buffer = _buffers.take(-(-nbytes // PAGE_SIZE) * PAGE_SIZE)
    got = 0
    while got < nbytes:
        count = os.preadv(fd, [buffer[got:]], offset + got)
        got += count
        if not count or count % granule:
            break
    return buffer[: min(got, nbytes)]
