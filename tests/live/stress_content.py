"""What the stress test's pages hold, and the table that its processes share: which content is right, now.

Every 32 bytes of a page, in four words, say which object, page, version and block they are, so zeros and foreign or stale
content are recognised wherever they turn up. Each page has one writer. It notes a version in `begun` before it stores it and
in `acknowledged` afterwards; whoever reads the page meanwhile must find versions between the two, and nothing else, unless
the writer has declared by an odd number in `discarding` that it gives content up.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy

PAGE = mmap.PAGESIZE
BLOCKS = PAGE // 32
MAGIC = 0xA1B2C3D4E5F60718

Array = numpy.ndarray[Any, Any]


class Kind(NamedTuple):
    """One of the objects: its place in the table, its pages, and the bytes that its last page has."""

    number: int
    pages: int
    writable: bool
    last: int = PAGE

    @property
    def nbytes(self) -> int:
        return (self.pages - 1) * PAGE + self.last


ANONYMOUS = Kind(0, 256, True)
BOOK = Kind(1, 512, True, 1024)
CONSTANT = Kind(2, 3000, False, 3072)
KINDS = (ANONYMOUS, BOOK, CONSTANT)
FIRST_VERSION = 1
"""What files hold at the beginning; fresh anonymous pages are zeros, as if of version 0."""


def content(kind: Kind, page: int, version: int) -> bytes:
    """The bytes of a page."""
    blocks = numpy.empty((BLOCKS, 4), "<u8")
    blocks[:] = (MAGIC ^ kind.number, page, version, 0)
    blocks[:, 3] = numpy.arange(BLOCKS)
    return blocks.tobytes()[: kind.last if page == kind.pages - 1 else PAGE]


class Table:
    """Plain memory that all processes of one stress test share. Numbers of 8 bytes, each with one writer."""

    def __init__(self, path: Path, slots: int) -> None:
        per_page = (len(KINDS), max(one.pages for one in KINDS))
        shapes = {
            "begun": per_page,
            "acknowledged": per_page,
            "discarding": per_page,
            "beats": (slots,),
            "touching": (slots, 2),
            "latest": (slots, 2),
            "addresses": (slots, 1 + len(KINDS)),
            "stop": (1,),
        }
        count = sum(int(numpy.prod(shape)) for shape in shapes.values())
        if not path.exists():
            path.write_bytes(bytes(count * 8))
        numbers = numpy.memmap(path, "<i8", "r+")
        for name, shape in shapes.items():
            nitems = int(numpy.prod(shape))
            setattr(self, name, numbers[:nitems].reshape(shape))
            numbers = numbers[nitems:]

    begun: Array
    acknowledged: Array
    discarding: Array
    beats: Array
    """Counts what each process has done: while it goes up, the process is alive."""
    touching: Array
    """(object, page) that each process is about to access through its ordinary view, where it may be struck."""
    latest: Array
    """(object, page) of what each process did last: good places to strike."""
    addresses: Array
    """The pid of each process, and where it has mapped each object."""
    stop: Array

    def checked(self, kind: Kind, first: int, count: int, read: Callable[[], Any]) -> bool:
        """Read pages by `read` and look at every byte; False if `read` was refused. AssertionError for a wrong byte."""
        pages = slice(first, first + count)
        discarding = self.discarding[kind.number, pages].copy()
        lowest = self.acknowledged[kind.number, pages].copy()
        data = None
        with suppress(Refused):
            data = read()
        if data is None:
            return False
        highest = self.begun[kind.number, pages].copy()
        given_up = (discarding % 2 == 1) | (discarding != self.discarding[kind.number, pages])
        if not kind.writable:
            lowest[:] = highest[:] = FIRST_VERSION
        blocks = numpy.frombuffer(data, "<u8", len(data) // 32 * 4).reshape(-1, 4)
        places = numpy.arange(len(blocks))
        versions = blocks[:, 2]
        right = numpy.empty(blocks.shape, bool)
        right[:, 0] = blocks[:, 0] == MAGIC ^ kind.number
        right[:, 1] = blocks[:, 1] == first + places // BLOCKS
        right[:, 2] = (
            (versions >= 1)
            & (versions <= highest[places // BLOCKS])
            & ((versions >= lowest[places // BLOCKS]) | given_up[places // BLOCKS])
        )
        right[:, 3] = blocks[:, 3] == places % BLOCKS
        # Word by word: who looks while the first content is stored in place of zeros can see some of it.
        may_be_zeros = (lowest[places // BLOCKS] == 0) | given_up[places // BLOCKS]
        wrong = numpy.flatnonzero(~(right | ((blocks == 0) & may_be_zeros[:, None])).all(axis=1))
        assert not len(wrong), (
            f"WRONG BYTES in object {kind.number} page {first + wrong[0] // BLOCKS}: {len(wrong)} blocks, the first is "
            f"{blocks[wrong[0]].tolist()}, and its version must be from {lowest[wrong[0] // BLOCKS]} to "
            f"{highest[wrong[0] // BLOCKS]}; discarding was {discarding[wrong[0] // BLOCKS]}"
        )
        return True


class Refused(Exception):
    """An access was refused because of lost bytes: PoisonError, or EFAULT."""
