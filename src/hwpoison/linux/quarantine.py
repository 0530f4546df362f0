"""Where bad frames are held: pipes that nobody reads.

`splice` of a page into a pipe pins its frame; while the pipe lives, the frame is on no free list. A pipe holds many. Each
new pipe is given to the keeper before it holds anything, so that the frames outlive this process. The one by which a page is
taken out is kept too: what is found in it after a death was being isolated.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import termios
from collections.abc import Mapping

from hwpoison.linux.journal import LinuxRecords
from hwpoison.linux.kept import Keeping
from hwpoison.linux.syscalls import PAGE_SIZE

PIPE_FRAMES = 256
"""Frames a pipe; the kernel lets an unprivileged user have 16,384 in all (fs.pipe-user-pages-soft)."""


class Quarantine:
    """The frames that are held, those by PFN where it can be known. `inherited`: descriptors by label."""

    def __init__(self, keeping: Keeping, records: LinuxRecords, inherited: Mapping[str, int]) -> None:
        self._keeping = keeping
        self._records = records
        self._pipes: list[tuple[int, int]] = []
        self._room = 0
        self.count = 0
        self.numbers: set[int] = {int(key[1]) for key in records.all() if key[0] == "quarantined"}
        while (ends := _ends(inherited, f"pipe:{len(self._pipes)}")) is not None:
            self._pipes.append(ends)
            self.count += _frames_in(ends[0])
        if self._pipes:
            self._room = fcntl.fcntl(self._pipes[-1][1], fcntl.F_GETPIPE_SZ) // PAGE_SIZE - _frames_in(self._pipes[-1][0])
        transit = _ends(inherited, "transit")
        self.transit = transit or os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        """Through which one page at a time is taken out."""
        if transit is None:
            keeping.keep(*_labelled("transit", self.transit))

    def settle(self, *, hold: bool) -> bool:
        """Hold the frame that a manager before this one has left in transit, or let it go. False if there is no room."""
        if not _frames_in(self.transit[0]):
            return True
        if hold:
            with contextlib.suppress(OSError):
                self.hold(None)
                return True
        os.read(self.transit[0], PAGE_SIZE)
        return not hold

    def hold(self, number: int | None) -> None:
        """Move the frame in transit to the quarantine. Raises OSError if the system gives no more pipes."""
        if not self._room:
            self._add_pipe()
        if number is not None:
            self._records.put(("quarantined", number), True)
        moved = os.splice(self.transit[0], self._pipes[-1][1], PAGE_SIZE, flags=os.SPLICE_F_NONBLOCK)
        assert moved == PAGE_SIZE, f"{moved} bytes of a frame moved"
        self._room -= 1
        self.count += 1
        if number is not None:
            self.numbers.add(number)

    def _add_pipe(self) -> None:
        ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # Over its soft limit a user keeps what a new pipe has of itself: some frames still fit.
        with contextlib.suppress(OSError):
            fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, PIPE_FRAMES * PAGE_SIZE)
        self._room = fcntl.fcntl(ends[1], fcntl.F_GETPIPE_SZ) // PAGE_SIZE
        self._keeping.keep(*_labelled(f"pipe:{len(self._pipes)}", ends))
        self._pipes.append(ends)

    def close(self) -> None:
        """Let all frames go, unless the keeper holds them."""
        for ends in (*self._pipes, self.transit):
            for end in ends:
                os.close(end)
        self._pipes.clear()
        self._room = 0


def _labelled(label: str, ends: tuple[int, int]) -> list[tuple[str, int]]:
    return [(f"{label}:{end}", fd) for end, fd in enumerate(ends)]


def _ends(inherited: Mapping[str, int], label: str) -> tuple[int, int] | None:
    """Both ends of a pipe, if they were kept."""
    if f"{label}:0" not in inherited or f"{label}:1" not in inherited:
        return None
    return inherited[f"{label}:0"], inherited[f"{label}:1"]


def _frames_in(pipe: int) -> int:
    (nbytes,) = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, struct.pack("i", 0)))
    return int(nbytes) // PAGE_SIZE
