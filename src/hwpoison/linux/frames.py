"""Physical frames: their numbers, for root. Everybody else sees none, and is told None."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

from hwpoison.linux.syscalls import PAGE_SIZE

_PRESENT = 1 << 63
_NUMBER = (1 << 55) - 1
_NUMBER_BYTES = 6
"""Whole bytes of an entry that are nothing but PFN."""
_ENTRY_BYTES = 8
_IS_PRESENT = bytes(value >> 7 for value in range(256))
"""For the last byte of an entry."""
_LARGE = 1 << 15 | 1 << 16 | 1 << 22
"""Head or tail of a compound page, or transparent huge page (linux/kernel-page-flags.h)."""
SEARCHED_PAGES = 1 << 16
"""Entries that are read at a time."""
HARD_OFFLINE = "/sys/devices/system/memory/hard_offline_page"


def large_frame_bytes() -> int:
    """What one entry of the second lowest page tables covers: 2 MiB with pages of 4 KiB, 512 MiB with 64 KiB."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size") as size:
            return int(size.read())
    except OSError:
        # A kernel without transparent huge pages. A table is a page, and an entry has 8 bytes.
        return PAGE_SIZE * (PAGE_SIZE // 8)


class PageMap:
    """A process's page table: /proc/PID/pagemap."""

    def __init__(self, pid: int | str = "self") -> None:
        self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def numbers(self, address: int, count: int) -> list[int]:
        """The PFN of each page from `address` on; 0 where none is mapped, or where they are not to be known."""
        data = self._entries(address, count)
        return [entry & _NUMBER if entry & _PRESENT else 0 for (entry,) in struct.iter_unpack("Q", data)]

    def find(self, number: int, address: int, count: int) -> int | None:
        """Which of the pages from `address` on has this PFN: looked for in the raw bytes, as there may be millions."""
        if number >> 8 * _NUMBER_BYTES:
            return None
        data = self._entries(address, count)
        wanted = number.to_bytes(8, "little")[:_NUMBER_BYTES]
        at = data.find(wanted)
        while at >= 0:
            if not at % _ENTRY_BYTES:
                (entry,) = struct.unpack_from("Q", data, at)
                if entry & _PRESENT and entry & _NUMBER == number:
                    return at // _ENTRY_BYTES
            at = data.find(wanted, at + 1)
        return None

    def unmapped(self, address: int, count: int) -> Iterator[tuple[int, int]]:
        """(first, count) of each run of pages, counted from `address`, that are not in the page table."""
        mapped = self._entries(address, count)[_ENTRY_BYTES - 1 :: _ENTRY_BYTES].translate(_IS_PRESENT)
        begin = mapped.find(0)
        while begin >= 0:
            end = mapped.find(1, begin)
            end = end if end >= 0 else len(mapped)
            yield begin, end - begin
            begin = mapped.find(0, end)

    def _entries(self, address: int, count: int) -> bytes:
        return os.pread(self._fd, count * _ENTRY_BYTES, address // PAGE_SIZE * _ENTRY_BYTES)

    def close(self) -> None:
        os.close(self._fd)


class FrameFlags:
    """What the kernel says of frames: /proc/kpageflags, which is root's. Raises OSError for others."""

    def __init__(self) -> None:
        self._fd = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)

    def large(self, number: int) -> bool:
        """True if the frame is part of a larger one."""
        data = os.pread(self._fd, _ENTRY_BYTES, number * _ENTRY_BYTES)
        return len(data) == _ENTRY_BYTES and bool(int.from_bytes(data, "little") & _LARGE)

    def close(self) -> None:
        os.close(self._fd)


OBJECT_NAME = "hwpoison:"
"""How the names of the memfds of objects begin, and no others."""


def mapped_by(pid: int | str, number: int) -> bool:
    """True if the process maps the frame, other than as memory of an object: that is much, and looked through by itself."""
    pagemap = PageMap(pid)
    try:
        with open(f"/proc/{pid}/maps", errors="surrogateescape") as maps:
            for line in maps:
                start, _, rest = line.partition("-")
                end = int(rest.split(" ", 1)[0], 16)
                begin = int(start, 16)
                if end >= 1 << 63 or f"/memfd:{OBJECT_NAME}" in line:
                    continue
                for address in range(begin, end, SEARCHED_PAGES * PAGE_SIZE):
                    count = min((end - address) // PAGE_SIZE, SEARCHED_PAGES)
                    if pagemap.find(number, address, count) is not None:
                        return True
    finally:
        pagemap.close()
    return False


def hard_offline(number: int) -> None:
    """The kernel's hard offline of a frame: root, and a kernel with CONFIG_MEMORY_FAILURE. Raises OSError."""
    with open(HARD_OFFLINE, "w") as control:
        control.write(hex(number * PAGE_SIZE))
