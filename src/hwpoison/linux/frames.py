"""Physical frames: their numbers, for root. Everybody else sees none, and is told None."""

from __future__ import annotations

import os
import struct

from hwpoison.linux.syscalls import PAGE_SIZE

_PRESENT = 1 << 63
_NUMBER = (1 << 55) - 1
HARD_OFFLINE = "/sys/devices/system/memory/hard_offline_page"


class PageMap:
    """A process's page table: /proc/PID/pagemap."""

    def __init__(self, pid: int | str = "self") -> None:
        self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def numbers(self, address: int, count: int) -> list[int]:
        """The PFN of each page from `address` on; 0 where none is mapped, or where they are not to be known."""
        data = os.pread(self._fd, count * 8, address // PAGE_SIZE * 8)
        return [entry & _NUMBER if entry & _PRESENT else 0 for (entry,) in struct.iter_unpack("Q", data)]

    def close(self) -> None:
        os.close(self._fd)


OBJECT_NAME = "hwpoison:"
"""How the names of the memfds of objects begin, and no others."""


def mapped_by(pid: int | str, number: int) -> bool:
    """True if the process maps the frame, other than as memory of an object: that is much, and looked through by itself."""
    pagemap = PageMap(pid)
    try:
        with open(f"/proc/{pid}/maps") as maps:
            for line in maps:
                start, _, rest = line.partition("-")
                end = int(rest.split(" ", 1)[0], 16)
                begin = int(start, 16)
                if end >= 1 << 63 or f"/memfd:{OBJECT_NAME}" in line:
                    continue
                for address in range(begin, end, 1 << 26):
                    if number in pagemap.numbers(address, min(end - address, 1 << 26) // PAGE_SIZE):
                        return True
    finally:
        pagemap.close()
    return False


def hard_offline(number: int) -> None:
    """The kernel's hard offline of a frame: root, and a kernel with CONFIG_MEMORY_FAILURE. Raises OSError."""
    with open(HARD_OFFLINE, "w") as control:
        control.write(hex(number * PAGE_SIZE))
