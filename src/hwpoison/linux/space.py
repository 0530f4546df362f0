"""A client's address space: its userfaultfd, its process, and the word that a guarded view shares with the manager.

Ioctls on a client's userfaultfd can wait for that client's mmap lock (linux-facts 7), so all but WAKE run in a worker.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import mmap
import os
import signal
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial

from hwpoison.core.machine import Telling
from hwpoison.linux import syscalls, userfaultfd
from hwpoison.linux.syscalls import PAGE_SIZE

BOARD_BYTES = 1 << 16
"""Shared with each client: one slot of two words for each guarded view that it may have at the same time."""
BOARD_SLOTS = BOARD_BYTES // 16

WORKERS_OF_CLIENT = 4
"""Workers that one client can make wait for its mmap lock: the others are for other clients."""
ATTEMPTS = 1000
"""How often an ioctl is tried that the kernel wants to be tried again."""

_GONE = (errno.ESRCH, errno.ENOENT)
"""The process has ended, or has unmapped the range: nobody is left to be told."""


class LinuxSpace:
    """See `hwpoison.core.machine.Space`. Owns `fd`, the client's userfaultfd, and `pidfd`."""

    def __init__(self, fd: int, pid: int, pidfd: int, workers: Executor) -> None:
        self.fd = fd
        self._lent = _Lent(fd)
        self.pid = pid
        self.pidfd = pidfd
        self._workers = workers
        self._turn = asyncio.Semaphore(WORKERS_OF_CLIENT)
        os.set_blocking(fd, False)

    def listen(self, on_fault: Callable[[userfaultfd.Fault], None], on_death: Callable[[], None]) -> None:
        """Call `on_fault` for each fault, on the event loop, until the process dies: then `on_death`, once."""
        loop = asyncio.get_running_loop()

        def read() -> None:
            for fault in userfaultfd.read_faults(self.fd):
                on_fault(fault)

        def dead() -> None:
            loop.remove_reader(self.pidfd)
            on_death()

        loop.add_reader(self.fd, read)
        loop.add_reader(self.pidfd, dead)

    def close(self) -> None:
        """Listen no more. Threads that sleep in a fault still sleep: the client holds a descriptor of its own."""
        loop = asyncio.get_running_loop()
        for fd in (self.fd, self.pidfd):
            loop.remove_reader(fd)
        os.close(self.pidfd)
        self._lent.give_back()
        self.fd = self.pidfd = -1

    def wake(self, address: int, nbytes: int) -> None:
        if self.fd < 0:
            return
        try:
            userfaultfd.wake(self.fd, address, nbytes)
        except OSError:
            pass  # Any error means that nobody sleeps there: the process or the mapping is gone.

    def reaches(self, address: int, nbytes: int) -> bool:
        """True if the range can be one of this process: the kernel is asked, by a WAKE."""
        try:
            userfaultfd.wake(self.fd, address, nbytes)
        except (OSError, struct.error):
            return False
        return True

    async def registered(self, address: int, nbytes: int, *, watched: bool) -> bool:
        """False if the range is no mapping of shared memory, registered with this userfaultfd; `watched`: for writes too.

        The kernel is asked by doing what does no harm: copying from nowhere, watching for writes, mapping what is there.
        """
        async with self._turn:
            if self.fd < 0:
                return True
            try:
                await self._run(partial(_require_registered, watched=watched), address, nbytes)
            except OSError as error:
                return error.errno not in (errno.ENOENT, errno.EINVAL)
        return True

    async def protect(self, address: int, nbytes: int) -> None:
        await self._in_worker(partial(userfaultfd.protect, on=True), address, nbytes)

    async def unprotect(self, address: int, nbytes: int) -> None:
        await self._in_worker(partial(userfaultfd.protect, on=False), address, nbytes)

    async def poison(self, address: int) -> bool:
        return await self._in_worker(userfaultfd.poison, address, PAGE_SIZE)

    async def unpoison(self, address: int, *, protect: bool) -> None:
        await self._in_worker(partial(userfaultfd.continue_, protected=protect), address, PAGE_SIZE)

    async def show_zeros(self, address: int) -> None:
        await self._in_worker(userfaultfd.zero_page, address, PAGE_SIZE)

    async def _in_worker(self, call: Callable[[int, int, int], None], address: int, nbytes: int) -> bool:
        """Run the ioctl in a worker; False if there was something in the way (EEXIST)."""
        async with self._turn:
            if self.fd < 0:
                return True
            try:
                await self._run(call, address, nbytes)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _GONE:
                    raise
            return True

    async def gone(self) -> bool:
        """True if there is no such address space any more: the process has ended, or executes another program by now.

        Asked by an ioctl that changes nothing that matters: where a page is there to be protected, its next write is noted
        once more.
        """
        async with self._turn:
            if self.fd < 0:
                return True
            try:
                await self._run(partial(userfaultfd.protect, on=True), userfaultfd.NOWHERE, PAGE_SIZE)
            except OSError as error:
                return error.errno == errno.ESRCH
            return False

    async def _run(self, call: Callable[[int, int, int], None], address: int, nbytes: int) -> None:
        # No descriptor of the worker's own: when none is left, faults must be answered all the same.
        fd = self._lent.lend()
        try:
            running = self._workers.submit(_persistently, call, fd, address, nbytes)
        except BaseException:
            self._lent.give_back()
            raise
        # Also if nobody waits for it any more, and if it never ran.
        running.add_done_callback(self._lent.give_back)
        await asyncio.wrap_future(running)

    def telling(self, thread: int) -> Telling:
        bit = 1 << (signal.SIGBUS - 1)
        masks = {}
        try:
            with open(f"/proc/{self.pid}/task/{thread}/status") as status:
                for line in status:
                    if line.startswith("Sig"):
                        key, _, value = line.partition(":")
                        masks[key] = int(value, 16) & bit if key != "SigQ" else 0
        except OSError:
            return Telling.FATAL
        if masks.get("SigBlk"):
            return Telling.BLOCKED
        if masks.get("SigIgn"):
            return Telling.IGNORED
        return Telling.HANDLED if masks.get("SigCgt") else Telling.FATAL

    def signal(self, thread: int, address: int) -> None:
        # Without the pidfd, the number may be another process's by now.
        if self.pidfd < 0:
            return
        with suppress(ProcessLookupError):
            syscalls.queue_signal(self.pid, thread, signal.SIGBUS, address)

    def kill(self) -> None:
        if self.pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)


class _Lent:
    """A descriptor that workers use too: it is closed when its owner and the last of them have given it back."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._users = 1
        self._lock = threading.Lock()

    def lend(self) -> int:
        with self._lock:
            self._users += 1
        return self._fd

    def give_back(self, _: Future[None] | None = None) -> None:
        with self._lock:
            self._users -= 1
            last = not self._users
        if last:
            os.close(self._fd)


def _persistently(call: Callable[[int, int, int], None], fd: int, address: int, nbytes: int) -> None:
    for attempts_left in reversed(range(ATTEMPTS)):
        try:
            call(fd, address, nbytes)
        except BlockingIOError:
            # EAGAIN: the kernel took an empty page table away at this moment; MADV_DONTNEED does that in new ones.
            if not attempts_left:
                raise
        else:
            return


def _require_registered(fd: int, address: int, nbytes: int, *, watched: bool) -> None:
    """Raises what the kernel says where it is not."""
    userfaultfd.require_registered(fd, address, nbytes)
    for page in dict.fromkeys((address, address + nbytes - PAGE_SIZE)):
        try:
            if watched:
                userfaultfd.protect(fd, page, PAGE_SIZE, on=True)
            else:
                userfaultfd.continue_(fd, page, PAGE_SIZE)
        except OSError as error:
            # It is mapped already, or absent.
            if error.errno not in (errno.EEXIST, errno.EFAULT):
                raise


class Board:
    """The words shared with one client: for each slot a count of losses met and a count of open guards.

    A sealed memfd, so that the client can't take it away under the manager.
    """

    def __init__(self, inherited: int = -1) -> None:
        self.fd = inherited
        if inherited < 0:
            self.fd = os.memfd_create("hwpoison-hits", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, BOARD_BYTES)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._words = memoryview(mmap.mmap(self.fd, BOARD_BYTES)).cast("Q")
        self._free = list(range(BOARD_SLOTS - 1, -1, -1))

    def slot(self) -> Slot:
        """A free slot, all zeros. Raises OSError if the client has too many guarded views."""
        if not self._free:
            raise OSError(errno.EMFILE, f"a process can have {BOARD_SLOTS} guarded views; close some memories")
        index = self._free.pop()
        self._words[2 * index] = self._words[2 * index + 1] = 0
        return Slot(self._words, index)

    def taken(self, index: int) -> Slot:
        """A slot that was taken by a manager before this one."""
        self._free.remove(index)
        return Slot(self._words, index)

    def free(self, slot: Slot) -> None:
        self._free.append(slot.index)

    def close(self) -> None:
        os.close(self.fd)


class Slot:
    """See `hwpoison.core.machine.Hits`."""

    def __init__(self, words: memoryview, index: int) -> None:
        self._words = words
        self.index = index

    @property
    def guarded(self) -> bool:
        return bool(self._words[2 * self.index + 1])

    @property
    def count(self) -> int:
        return int(self._words[2 * self.index])

    def hit(self) -> int:
        self._words[2 * self.index] += 1
        # A lock that is taken is a memory barrier: whether a guard is open is looked at only after that was stored.
        threading.Lock().acquire()
        return int(self._words[2 * self.index])
