"""Objects: memory that the manager owns, page by page, and everything that is known of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from hwpoison.core.locks import RangeLocks
from hwpoison.core.machine import File, Identity, Store, Table, Written
from hwpoison.core.mappings import ReverseMap
from hwpoison.core.pages import DIRTY, PRESENT, WRITEBACK, Pages
from hwpoison.core.records import Outcome, Source, State
from hwpoison.errors import Range


class Kind(StrEnum):
    """What an object's content is when nobody has written to it."""

    ANONYMOUS = "anonymous"
    FILE = "file"


@dataclass(frozen=True, slots=True)
class Loss:
    """Why a page is lost, by which failure, who found it, and when (seconds since the epoch)."""

    event_id: str
    state: State
    outcome: Outcome
    reason: str
    source: str = Source.MANAGER
    time: float = 0.0


@dataclass(slots=True)
class Backing:
    """The file behind an object, from byte `offset` on, in the version `identity` (None: it was changed under us)."""

    file: File
    offset: int
    writable: bool
    identity: Identity | None
    changed: str = ""
    """How it was changed under us, in words."""
    writing: bool = False
    """An own write is in flight: meanwhile the file's identity says nothing."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the one who writes, or reads what must not be beside a write."""
    place: tuple[int, int] = (0, 0)
    """The file's device and inode, which stay; those of `identity`, where there is one."""

    def __post_init__(self) -> None:
        if self.identity is not None:
            self.place = self.identity[:2]

    def how_changed(self, now: Identity, end: int = 0) -> str:
        """What is another about the file than in the version that is known, in words; its bytes up to `end` are wanted."""
        known = self.identity
        if now.nbytes < end:
            return "the file shrank"
        if known is None:
            return self.changed
        if (now.nbytes, now.mtime_ns) != (known.nbytes, known.mtime_ns):
            return "the file was changed by somebody else"
        if now != known:
            # A change of the content after which the mtime was set back looks the same.
            return "the file's ctime changed: it was renamed, replaced or deleted, or its links, attributes or times changed"
        return "the file gave fewer bytes than it has"

    def follow(self, written: Written) -> str:
        """We have written to the file: note which version it is in now. In words, how it was changed by others.

        It is of our making if it was in the known version right before, and our writes change no size. What somebody else
        has written between the two looks at it can't be told from what we have: times are all that both change.
        """
        known = self.identity
        if known is None:
            return ""
        if written.before == known and written.after[:3] == known[:3]:
            self.identity = written.after
            return ""
        self.changed = self.how_changed(written.after if written.before == known else written.before)
        self.identity = None
        return self.changed


class MemoryObject:
    """One object. `backing` is None for anonymous memory."""

    def __init__(
        self,
        number: int,
        name: str,
        nbytes: int,
        page_size: int,
        store: Store,
        backing: Backing | None = None,
        table: Callable[[int], Table] = bytearray,
        large_frame_bytes: int = 1 << 21,
    ) -> None:
        self.number = number
        self.name = name
        self.nbytes = nbytes
        self.page_size = page_size
        self.store = store
        self.backing = backing
        self.unit_pages = max(1, large_frame_bytes // page_size)
        """Pages of the aligned unit that may be one large frame."""
        self.pages = Pages(-(-nbytes // page_size), table, store.flags)
        self.locks = RangeLocks()
        self.mappings = ReverseMap()
        self.resident: Counter[int] = Counter()
        """How many want that a page stays, see `core.residence`."""
        self.losses: dict[int, Loss] = {}
        self.error_sequence = 0
        """Counts losses of data that the file should have; each handle reports each once (`flush`)."""
        self.untold: set[int] = set()
        """Lost pages with changes of which no flush has told yet. Who has the file next is told too."""
        self.unsynced = False
        """Something was written to make room, and no sync has begun since."""
        self.references = 0
        """Mappings, clients that are about to map, and its persistence."""
        self.persistent = False
        """It stays, although nobody has it open, until it is unlinked."""
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
                f"bytes {offset} to {offset + nbytes} are not within {self.name!r}, which ends at {self.nbytes}"
            )
        first = offset // self.page_size
        return first, -(-(offset + nbytes) // self.page_size) - first if nbytes else 0

    def pages_in(self, nbytes: int) -> int:
        """How many pages so many bytes are, at least one: limits are in bytes, as page sizes differ."""
        return max(1, nbytes // self.page_size)

    @property
    def lost_changes(self) -> bool:
        """True if something is lost that the file does not have."""
        return self.lost_changes_within(0, self.pages.count)

    def lost_changes_within(self, first: int, count: int) -> bool:
        """As `lost_changes`, of these pages."""
        return any(first <= page < first + count and loss.state is State.DIRTY_FILE for page, loss in self.losses.items())

    def is_present(self, page: int) -> bool:
        return bool(self.pages.flags[page] & PRESENT)

    def present_runs(self) -> Iterator[tuple[int, int]]:
        """(first, count) of the runs of pages that are present."""
        return self.pages.runs(PRESENT)

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
        """Locked pages of a writable file are watched for first writes again: what took absent ones away can have lost the
        markers."""
        for mapping in self.mappings.covering(first, count):
            if mapping.watched:
                begin, end = max(first, mapping.first), min(first + count, mapping.first + mapping.count)
                await mapping.client.space.protect(mapping.address_of(begin), (end - begin) * self.page_size)

    async def watch_again(self, first: int, count: int) -> tuple[int, ...]:
        """As `watch`, but for dirty pages to which a system call may write at any moment: they are returned, and stay so."""
        left_out = tuple(
            page
            for page in sorted(self.resident)
            if first <= page < first + count
            and self.pages.flags[page] & DIRTY
            and any(one.unwatched(page) for one in self.mappings.covering(page))
        )
        edges = list(pairwise((first - 1, *left_out, first + count)))
        for start, length in [(before + 1, after - before - 1) for before, after in edges if after > before + 1]:
            await self.watch(start, length)
        return left_out
