"""The errors and warnings that an application meets, and nothing else.

Bad arguments raise what the standard library raises for them (`ValueError`, `FileNotFoundError`, ...). Only two things
have no standard name: bytes that are gone, and a machine that lacks what is needed.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

EHWPOISON = 133
"""The kernel's errno for "memory page has hardware error", which Python's `errno` module does not have."""


class Range(NamedTuple):
    """Bytes `offset` to `offset + nbytes` of the object called `name`."""

    name: str
    offset: int
    nbytes: int


class PoisonError(OSError):
    """Bytes that were needed are lost. `ranges` says which; `name`, `offset`, `nbytes` are the first of them.

    Answer it with `Memory.repair` (the right content is known) or `Memory.discard` (it is not).
    """

    def __init__(self, ranges: Iterable[Range]) -> None:
        # A forked child may meet what its parent had met before in the same guard.
        self.ranges = tuple(dict.fromkeys(Range(*one) for one in ranges))
        if not self.ranges:
            raise ValueError("a PoisonError needs at least one range: pass the ranges that are lost")
        self.name, self.offset, self.nbytes = self.ranges[0]
        more = f" and {len(self.ranges) - 1} more" if len(self.ranges) > 1 else ""
        super().__init__(
            EHWPOISON,
            f"memory page has hardware error: {self.nbytes} byte{'s' if self.nbytes != 1 else ''} lost at offset "
            f"{self.offset:#x} of {self.name!r}{more}; repair() or discard() them",
        )

    def __reduce__(self) -> tuple[type[PoisonError], tuple[tuple[Range, ...]], dict[str, Any]]:
        # What was added to it goes with it, notes for instance.
        return type(self), (self.ranges,), vars(self)


class UnsupportedError(OSError):
    """This machine lacks something that is needed; the message says what, and how to get it. `errno` is the kernel's."""


def warn(said: str, category: type[Warning]) -> None:
    """At the line outside of hwpoison that has led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "hwpoison":
        frame, level = frame.f_back, level + 1
    warnings.warn(said, category, stacklevel=level)
