"""File descriptors, of which a process may have a limited number: new work is refused while there are still some left.

What the manager has taken on needs a descriptor now and then: a pipe for bad frames, the event log, a reply with an
object's memory. The kernel gives the lowest number that is free, so the number that is next says how many are left.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress

RESERVED = 64
"""Descriptors that are left to what is under way, where the limit is not very low."""


class Descriptors:
    """Of this process. Holds one that can be spared."""

    def __init__(self) -> None:
        self._spare = -1
        self._take_spare()

    def _take_spare(self) -> None:
        with suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def require(self) -> None:
        """Raises OSError (EMFILE) if none is left for anything new."""
        limit = _limit()
        if self._spare < 0:
            self._take_spare()
        try:
            free = os.dup(self._spare)
        except OSError as error:
            raise exhausted() from error
        os.close(free)
        if free >= limit - min(RESERVED, limit // 4):
            raise exhausted()

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """One descriptor is free meanwhile, if that is possible at all."""
        self.close()
        try:
            yield
        finally:
            self._take_spare()

    def close(self) -> None:
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1


def exhausted() -> OSError:
    """What somebody is told who can't be served for want of descriptors."""
    return OSError(
        errno.EMFILE,
        f"the manager, process {os.getpid()}, has no file descriptors left for this; it may have {_limit()}; close "
        "something, or raise that: `ulimit -n` where it starts, LimitNOFILE= in systemd, `prlimit --nofile` while it runs",
    )


def _limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
