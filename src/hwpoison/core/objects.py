"""Objects: memory that the manager owns, page by page, and everything that is known of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import StrEnum

from hwpoison.core.locks import RangeLocks
from hwpoison.core.machine import File, Identity, Store
from hwpoison.core.mappings import ReverseMap
from hwpoison.core.pages import PRESENT, WRITEBACK, Pages
from hwpoison.core.records import Outcome, State
from hwpoison.errors import Range


class Kind(StrEnum):
    """What an object's content is when nobody has written to it."""

    ANONYMOUS = "anonymous"
    FILE = "file"


@dataclass(frozen=True, slots=True)
class Loss:
    """Why a page is lost, and by which failure."""

    event_id: str
    state: State
    outcome: Outcome
    reason: str


@dataclass(slots=True)
class Backing:
    """The file behind an object, from byte `offset` on, in the version `identity` (None: it was changed under us)."""

    file: File
    offset: int
    writable: bool
    identity: Identity | None
    writing: bool = False
    """An own write is in flight: meanwhile the file's identity says nothing."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the one who writes, or reads what must not be beside a write."""


class MemoryObject:
    """One object. `backing` is None for anonymous memory."""

    def __init__(
        self, number: int, name: str, nbytes: int, page_size: int, store: Store, backing: Backing | None = None
    ) -> None:
        self.number = number
        self.name = name
        self.nbytes = nbytes
        self.page_size = page_size
        self.store = store
        self.backing = backing
        self.pages = Pages(-(-nbytes // page_size))
        self.locks = RangeLocks()
        self.mappings = ReverseMap()
        self.losses: dict[int, Loss] = {}
        self.error_sequence = 0
        """Counts losses of data that was on its way to the file; each handle reports each once (`flush`)."""
        self.references = 0
        """Mappings, and clients that are about to map."""
        self.closed = False
        self.ending: asyncio.Task[None] | None = None
        """What ends it: started each time that nobody refers to it any more."""
        self._io = asyncio.Event()

    @property
    def kind(self) -> Kind:
        return Kind.ANONYMOUS if self.backing is None else Kind.FILE

    @property
    def writable(self) -> bool:
        return self.backing is None or self.backing.writable

    @property
    def tracks_dirt(self) -> bool:
        """True if first writes to its pages are watched."""
        return self.backing is not None and self.backing.writable

    def nbytes_of(self, first: int, count: int) -> int:
        """How many bytes of the object lie in the pages: less than whole pages only at the end."""
        return min((first + count) * self.page_size, self.nbytes) - first * self.page_size

    def range_of(self, first: int, count: int = 1) -> Range:
        return Range(self.name, first * self.page_size, self.nbytes_of(first, count))

    def pages_of(self, offset: int, nbytes: int) -> tuple[int, int]:
        """(first, count) of the pages that hold the bytes. Raises ValueError outside the object."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(
                f"{nbytes} bytes at offset {offset} are not within {self.name!r}, which has {self.nbytes} bytes"
            )
        first = offset // self.page_size
        return first, -(-(offset + nbytes) // self.page_size) - first if nbytes else 0

    def pages_in(self, nbytes: int) -> int:
        """How many pages so many bytes are, at least one: limits are in bytes, as page sizes differ."""
        return max(1, nbytes // self.page_size)

    @property
    def lost_changes(self) -> bool:
        """True if something is lost that the file does not have."""
        return any(loss.state is State.DIRTY_FILE for loss in self.losses.values())

    def is_present(self, page: int) -> bool:
        return bool(self.pages.flags[page] & PRESENT)

    def lost(self, first: int = 0, count: int | None = None) -> list[Range]:
        """The lost ranges within the pages."""
        end = self.pages.count if count is None else first + count
        runs: list[list[int]] = []
        for page in sorted(page for page in self.losses if first <= page < end):
            if runs and runs[-1][0] + runs[-1][1] == page:
                runs[-1][1] += 1
            else:
                runs.append([page, 1])
        return [self.range_of(start, length) for start, length in runs]

    def io_ended(self) -> None:
        """Some file I/O has ended: those who wait for it look again."""
        self._io.set()
        self._io.clear()

    async def io_wait(self) -> None:
        """Until some file I/O of this object ends."""
        await self._io.wait()

    async def written_back(self, page: int) -> None:
        """Until the page is not on its way to the file."""
        while self.pages.flags[page] & WRITEBACK:
            await self.io_wait()

    async def watch(self, first: int, count: int) -> None:
        """Absent, locked pages of a writable file are watched for first writes again: what took them away can have lost the
        markers."""
        if not self.tracks_dirt:
            return
        for mapping in self.mappings.covering(first, count):
            if mapping.hits is None:
                begin, end = max(first, mapping.first), min(first + count, mapping.first + mapping.count)
                await mapping.client.space.protect(mapping.address_of(begin), (end - begin) * self.page_size)
