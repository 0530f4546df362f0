"""The memory of one object: a memfd, and the manager's own registered mapping of it, through which pages are published.

Pages are published with UFFDIO_COPY into the manager's mapping: the kernel makes the page and its content appear at once,
nobody's locks but ours are involved, and one page is one page whatever the huge page settings (linux-facts 5). They are
taken out by splice, punch and a look (9, 10).
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import suppress

from hwpoison.core.machine import Content, NotIsolatedError, Runs, StaleFrameError
from hwpoison.linux import syscalls, userfaultfd
from hwpoison.linux.frames import OBJECT_NAME, SEARCHED_PAGES, FrameFlags, PageMap
from hwpoison.linux.kept import Keeping
from hwpoison.linux.quarantine import Quarantine
from hwpoison.linux.syscalls import PAGE_SIZE

REGION_PAGES = PAGE_SIZE // 8
"""Pages that one page of a page table maps."""
REGIONS_LIMIT = 256
"""Page table pages that an object's mapping in the manager may have before they are given back."""


class LinuxFrame:
    """One page in the transit pipe. One of the methods is called before anything else is taken, of any object."""

    def __init__(self, quarantine: Quarantine, number: int | None) -> None:
        self._quarantine = quarantine
        self.number = number

    def content(self) -> bytes:
        return os.read(self._quarantine.transit[0], PAGE_SIZE)

    def quarantine(self) -> None:
        try:
            self._quarantine.hold(self.number)
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        os.read(self._quarantine.transit[0], PAGE_SIZE)


class PoisonedFrame:
    """A page that the kernel itself has declared bad. It holds the frame by itself, and lets nobody read it."""

    def __init__(self, number: int | None) -> None:
        self.number = number

    def content(self) -> bytes:
        raise OSError(errno.EIO, "the kernel has declared the page bad; what was in it is gone")

    def quarantine(self) -> None:
        """Nothing: no frame that the kernel has declared bad is given to anybody again."""

    def release(self) -> None:
        """Nothing: it can't be had back."""


def labels_of(number: int) -> tuple[str, str]:
    """Under which the memory and the flags of an object are kept."""
    return f"memory:{number}", f"flags:{number}"


class LinuxStore:
    """See `hwpoison.core.machine.Store`. `fd` is the memfd. `inherited`: that and the table of flags, if they are kept."""

    def __init__(
        self,
        name: str,
        nbytes: int,
        *,
        number: int,
        keeping: Keeping,
        inherited: tuple[int, int] | None = None,
        own: int,
        quarantine: Quarantine,
        pagemap: PageMap | None,
        frame_flags: FrameFlags | None,
        workers: Executor,
    ) -> None:
        self._pages = -(-nbytes // PAGE_SIZE)
        self._nbytes = self._pages * PAGE_SIZE
        self._own = own
        self._quarantine = quarantine
        self._pagemap = pagemap
        self._frame_flags = frame_flags
        self._workers = workers
        self._filling = 0
        self._regions: set[int] = set()
        self._address = 0
        self._keeping = keeping
        self._labels = labels_of(number)
        self.fd = self._flags_fd = -1
        try:
            if inherited is not None:
                self.fd, self._flags_fd = inherited
            else:
                self.fd = os.memfd_create(OBJECT_NAME + name.encode()[:200].decode(errors="ignore"), os.MFD_CLOEXEC)
                os.ftruncate(self.fd, self._nbytes)
                self._flags_fd = os.memfd_create("hwpoison-flags", os.MFD_CLOEXEC)
                os.ftruncate(self._flags_fd, self._pages)
            self.flags = mmap.mmap(self._flags_fd, self._pages)
            _no_huge_pages(syscalls.address_of(self.flags), self._pages)
            self._map()
            if number and inherited is None:
                keeping.keep((self._labels[0], self.fd), (self._labels[1], self._flags_fd))
        except (OSError, OverflowError) as error:
            self.close()
            why = error.strerror if isinstance(error, OSError) else "no file can have so many"
            raise MemoryError(f"the system gives no object of {nbytes} bytes: {why}") from error

    def _map(self) -> None:
        """Map and register, in place of what was mapped before: which gives its page tables back."""
        flags = mmap.MAP_SHARED | (syscalls.MAP_FIXED if self._address else 0)
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        self._address = syscalls.map_memory(self._nbytes, protection, flags, self.fd, self._address)
        syscalls.advise(self._address, self._nbytes, mmap.MADV_DONTFORK)
        _no_huge_pages(self._address, self._nbytes)
        userfaultfd.register(self._own, self._address, self._nbytes, userfaultfd.MODE_MISSING)
        self._regions.clear()

    def _address_of(self, page: int) -> int:
        return self._address + page * PAGE_SIZE

    # --- taking out

    def take(self, page: int, number: int | None = None) -> LinuxFrame | PoisonedFrame | None:
        offset = page * PAGE_SIZE
        if not self.present(page):
            return None
        try:
            transit = self._quarantine.transit[1]
            moved = os.splice(self.fd, transit, PAGE_SIZE, offset_src=offset, flags=os.SPLICE_F_NONBLOCK)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            # A page that the kernel has declared bad fails every access until it is punched (linux-facts 26).
            self._punch(page)
            # Its mark is still in the page tables that had the page, ours too, and nothing could be published there.
            syscalls.advise(self._address_of(page), PAGE_SIZE, mmap.MADV_DONTNEED)
            return PoisonedFrame(number)
        assert moved == PAGE_SIZE, f"{moved} bytes of a page pinned"
        # Only now that it is pinned does the page keep its frame: compaction moves others at any time.
        frame = LinuxFrame(self._quarantine, None)
        try:
            frame.number = self.number(page)
            if number is not None and frame.number != number:
                raise StaleFrameError(errno.ESTALE, f"page {page} is not in frame {number:#x} any more")
            if frame.number is not None and self._frame_flags is not None and self._frame_flags.large(frame.number):
                # Before anything is touched: a punch would empty the page in place, for everybody to see.
                raise NotIsolatedError(errno.EBUSY, f"page {page} is part of a large frame")
            self._punch(page)
        except OSError:
            frame.release()
            raise
        return frame

    def _punch(self, page: int) -> None:
        syscalls.punch_hole(self.fd, page * PAGE_SIZE, PAGE_SIZE)
        if self.present(page):
            raise NotIsolatedError(errno.EBUSY, f"page {page} is part of a large frame, which is in use")

    def drop(self, first: int, count: int) -> None:
        syscalls.punch_hole(self.fd, first * PAGE_SIZE, count * PAGE_SIZE)
        # A page that the kernel had declared bad leaves its mark in our page table, where nothing could be published.
        syscalls.advise(self._address_of(first), count * PAGE_SIZE, mmap.MADV_DONTNEED)
        if self._first_present(first) < first + count:
            raise NotIsolatedError(errno.EBUSY, f"pages from {first} on are part of a large frame, which is in use")

    def present(self, page: int) -> bool:
        return self._first_present(page) == page

    def _first_present(self, page: int) -> int:
        """The first page from this one on that is present; where there is none, the number of pages."""
        try:
            return os.lseek(self.fd, page * PAGE_SIZE, os.SEEK_DATA) // PAGE_SIZE
        except OSError as error:
            if error.errno == errno.ENXIO:
                return self._pages
            raise

    def number(self, page: int) -> int | None:
        """The PFN of a present page; None where that is not to be known."""
        if self._pagemap is None:
            return None
        address = self._address_of(page)
        number = self._pagemap.numbers(address, 1)[0]
        if not number:
            try:
                userfaultfd.continue_(self._own, address, PAGE_SIZE)
            except OSError:
                return None
            number = self._pagemap.numbers(address, 1)[0]
        return number or None

    def find(self, number: int, runs: Runs) -> int | None:
        """The page whose frame has this PFN; `runs` of pages are present. For a worker: it looks at every page."""
        pagemap = self._pagemap
        if pagemap is None or not number:
            return None
        # Of a large object that is nearly empty there is little to look at.
        for begin, length in self.runs():
            for first in range(begin, begin + length, SEARCHED_PAGES):
                found = pagemap.find(number, self._address_of(first), min(SEARCHED_PAGES, begin + length - first))
                if found is not None:
                    return first + found
        # Present pages may be missing in our page table: it was given back.
        for begin, length in runs():
            for first in range(begin, begin + length, SEARCHED_PAGES):
                address, count = self._address_of(first), min(SEARCHED_PAGES, begin + length - first)
                unmapped = list(pagemap.unmapped(address, count))
                for skipped, missing in unmapped:
                    with suppress(OSError):  # dropped meanwhile, or brought in
                        userfaultfd.continue_(self._own, address + skipped * PAGE_SIZE, missing * PAGE_SIZE)
                found = pagemap.find(number, address, count) if unmapped else None
                if found is not None:
                    return first + found
        return None

    def flagged(self) -> Iterator[tuple[int, int]]:
        begin = 0
        while begin < self._pages:
            try:
                begin = os.lseek(self._flags_fd, begin, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            end = min(os.lseek(self._flags_fd, begin, os.SEEK_HOLE), self._pages)
            yield begin, end - begin
            begin = end

    def runs(self) -> Iterator[tuple[int, int]]:
        begin = self._first_present(0)
        while begin < self._pages:
            end = min(os.lseek(self.fd, begin * PAGE_SIZE, os.SEEK_HOLE) // PAGE_SIZE, self._pages)
            yield begin, end - begin
            begin = self._first_present(end) if end < self._pages else end

    def searched(self) -> None:
        """After `find`, on the event loop: give back the page tables that it has made."""
        if self._address and self._pages > REGIONS_LIMIT * REGION_PAGES and not self._filling:
            self._map()

    # --- bringing in

    def publish(self, first: int, content: Content) -> None:
        self._copy(first, content)
        self._mapped(first, len(content) // PAGE_SIZE)

    def _copy(self, first: int, content: Content) -> None:
        userfaultfd.copy(self._own, self._address_of(first), syscalls.address_of(content), len(content))

    async def fill(self, first: int, content: Content) -> None:
        self._filling += 1
        try:
            # The worker has the content itself, not its address alone: it stays, even if nobody waits for it any more.
            await asyncio.get_running_loop().run_in_executor(self._workers, self._copy, first, content)
        finally:
            self._filling -= 1
        self._mapped(first, len(content) // PAGE_SIZE)

    def _mapped(self, first: int, count: int) -> None:
        """Note where page tables have grown, and give them back when there are many."""
        self._regions.update(range(first // REGION_PAGES, (first + count - 1) // REGION_PAGES + 1))
        if len(self._regions) > REGIONS_LIMIT and not self._filling:
            self._map()

    def content(self, first: int, count: int) -> bytes:
        content = os.pread(self.fd, count * PAGE_SIZE, first * PAGE_SIZE)
        assert len(content) == count * PAGE_SIZE
        return content

    def write(self, offset: int, data: Content) -> None:
        written = os.pwrite(self.fd, data, offset)
        assert written == len(data)

    def read_only_fd(self) -> int:
        """A descriptor of the memory through which nobody can write."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        if self._address:
            syscalls.unmap_memory(self._address, self._nbytes)
            self._address = 0
        self._keeping.drop(*self._labels)
        for fd in (self.fd, self._flags_fd):
            if fd >= 0:
                os.close(fd)


def _no_huge_pages(address: int, nbytes: int) -> None:
    """A page in a large frame can't be isolated alone (linux-facts 11), so the kernel shall not make such frames of ours."""
    try:
        syscalls.advise(address, nbytes, syscalls.MADV_NOHUGEPAGE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a kernel without transparent huge pages
            raise
