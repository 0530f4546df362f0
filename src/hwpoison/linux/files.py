"""Files behind objects, read so that their content is not kept twice.

What the kernel's page cache has is copied from there. What it has not is read past it (O_DIRECT), or, where the file
system can't do that, through it, and dropped from it again.
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

from hwpoison.core.machine import Content, Identity
from hwpoison.linux import syscalls
from hwpoison.linux.syscalls import PAGE_SIZE

WORKERS_OF_FILE = 8
"""Workers that one file can make wait: one whose file system hangs must not take all."""
AT_ONCE_BYTES = 1 << 16
"""Most bytes that `read_cached` copies on the event loop."""


def checked_file(fd: int, name: str) -> None:
    """Raises the exception that fits if `fd` is not a regular file."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, f"{name!r} is a directory; an object needs a regular file")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{name!r} is not a regular file (a FIFO, socket or device can't back an object)")


Result = TypeVar("Result")


class LinuxFile:
    """See `hwpoison.core.machine.File`. Owns `fd`."""

    def __init__(self, fd: int, workers: Executor) -> None:
        self._fd = fd
        self._workers = workers
        self._turns = asyncio.Semaphore(WORKERS_OF_FILE)
        self._scratch = mmap.mmap(-1, AT_ONCE_BYTES)
        self._mapped = (0, 0)
        self._mapping_lock = threading.Lock()
        # To those who neither own the file nor may write to it, mincore says that all of it is in the page cache.
        by_descriptor = f"/proc/self/fd/{fd}"
        may_write = os.access(by_descriptor, os.W_OK, effective_ids=True)
        self._told_what_is_cached = may_write or os.fstat(fd).st_uid == os.geteuid()
        self._direct = -1
        with suppress(OSError):
            self._direct = os.open(by_descriptor, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)

    def identity(self) -> Identity:
        found = os.fstat(self._fd)
        return Identity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def read_cached(self, offset: int, nbytes: int) -> Content | None:
        if nbytes > AT_ONCE_BYTES or not self._resident(offset, nbytes):
            return None
        view = memoryview(self._scratch)[:nbytes]
        try:
            # It was cached a moment ago; if it is not any more, this must not wait for the disk.
            got = os.preadv(self._fd, [view], offset, os.RWF_NOWAIT)
        except OSError:
            return None
        return view[:got]

    async def read(self, offset: int, nbytes: int) -> Content:
        cached = self.read_cached(offset, nbytes)
        if cached is not None and len(cached) == nbytes:
            return bytes(cached)
        return await self._in_worker(partial(self._read, offset, nbytes))

    def _read(self, offset: int, nbytes: int) -> Content:
        if self._resident(offset, nbytes):
            return _read_all(self._fd, offset, nbytes)
        if self._direct >= 0 and not offset % PAGE_SIZE:
            with suppress(OSError):
                return self._read_direct(offset, nbytes)
        content = _read_all(self._fd, offset, nbytes)
        with suppress(OSError):
            os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
        return content

    def _read_direct(self, offset: int, nbytes: int) -> Content:
        buffer = memoryview(mmap.mmap(-1, -(-nbytes // PAGE_SIZE) * PAGE_SIZE))
        got = 0
        while got < nbytes:
            count = os.preadv(self._direct, [buffer[got:]], offset + got)
            got += count
            if not count or count % PAGE_SIZE:
                break
        return buffer[: min(got, nbytes)]

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
        async with self._turns:
            return await asyncio.get_running_loop().run_in_executor(self._workers, call)

    async def write(self, offset: int, content: Content) -> tuple[Identity, Identity]:
        return await self._in_worker(partial(self._write, offset, content))

    def _write(self, offset: int, content: Content) -> tuple[Identity, Identity]:
        before = self.identity()
        view = memoryview(content)
        while view:
            done = os.pwrite(self._fd, view, offset)
            offset += done
            view = view[done:]
        return before, self.identity()

    async def sync(self) -> None:
        await self._in_worker(self._sync)

    def _sync(self) -> None:
        os.fsync(self._fd)
        with suppress(OSError):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        if self._mapped[1]:
            syscalls.unmap_memory(*self._mapped)
        for fd in (self._fd, self._direct):
            if fd >= 0:
                # Some file systems say only here what they have said to fsync; the descriptor is closed all the same.
                with suppress(OSError):
                    os.close(fd)
        # Whoever still comes must not meet another file under the same number.
        self._fd = self._direct = -1


def _read_all(fd: int, offset: int, nbytes: int) -> Content:
    content = os.pread(fd, nbytes, offset)
    if len(content) == nbytes:
        return content
    parts = [content]
    got = len(content)
    while got < nbytes and (more := os.pread(fd, nbytes - got, offset + got)):
        parts.append(more)
        got += len(more)
    return b"".join(parts)
