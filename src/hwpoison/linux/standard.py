"""The three standard descriptors, which a process may have been started without."""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress


def open_standard_streams() -> None:
    """What was closed is /dev/null from now on.

    Else the next thing that is opened, a socket or somebody's data, becomes standard error, and is written to. To be
    called before anything else is opened.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number, and so this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    # Python has None for what was closed when it started.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def say(line: str) -> None:
    """A line on standard error, if somebody takes it: a pipe that nobody reads, or a terminal that was stopped, must hold up
    nobody."""
    poll = select.poll()
    with suppress(OSError):
        poll.register(2, select.POLLOUT)
        if poll.poll(0):
            os.write(2, (line + "\n").encode(errors="backslashreplace"))
