"""Where bad frames are held: pipes that nobody reads.

`splice` of a page into a pipe pins its frame; while the pipe lives, the frame is on no free list. A pipe holds many. Each
new pipe is offered to the keeper process before it holds anything, so that the frames outlive this process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable

from hwpoison.linux.syscalls import PAGE_SIZE

PIPE_FRAMES = 256
"""Frames a pipe; the kernel lets an unprivileged user have 16,384 in all (fs.pipe-user-pages-soft)."""


class Quarantine:
    """The frames that are held, by PFN where it can be known."""

    def __init__(self, keep: Callable[[int], None] | None = None) -> None:
        self._keep = keep
        self._pipes: list[tuple[int, int]] = []
        self._room = 0
        self.numbers: set[int] = set()
        self.count = 0

    def hold(self, pipe: int, number: int | None) -> None:
        """Move one frame from `pipe` to the quarantine. Raises OSError if the system gives no more pipes."""
        if not self._room:
            self._add_pipe()
        moved = os.splice(pipe, self._pipes[-1][1], PAGE_SIZE, flags=os.SPLICE_F_NONBLOCK)
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
        self._pipes.append(ends)
        if self._keep is not None:
            self._keep(ends[0])

    def close(self) -> None:
        """Let all frames go, unless the keeper holds them."""
        for ends in self._pipes:
            for end in ends:
                os.close(end)
        self._pipes.clear()
        self._room = 0
