"""What the core needs from a machine: the only door between the logic and an operating system.

There are exactly two implementations, `hwpoison.linux` and `hwpoison.simulation`; one suite in `tests/contract` runs on
both. A method that is one short system call is a plain `def`: nothing else of the manager runs during it. A method
that may sleep (a file, a client's mmap lock, much memory to copy) is an `async def`. Methods may be added here only
together with their contract case. Errors are `OSError` with the kernel's errno.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from enum import Enum
from typing import Any, NamedTuple, Protocol, TypeVar, overload

Content = bytes | bytearray | memoryview

Runs = Callable[[], Iterable[tuple[int, int]]]
"""Gives (first, count) of runs of pages."""


Result = TypeVar("Result")


class Table(Protocol):
    """Bytes that can be changed, and are 0 at first: what a `bytearray` can do."""

    @overload
    def __getitem__(self, index: int, /) -> int: ...
    @overload
    def __getitem__(self, index: slice, /) -> bytes | bytearray: ...
    @overload
    def __setitem__(self, index: int, value: int, /) -> None: ...
    @overload
    def __setitem__(self, index: slice, value: bytes | bytearray, /) -> None: ...
    def __len__(self) -> int: ...
    def find(self, wanted: bytes, first: int, end: int, /) -> int: ...


Key = tuple[str | int, ...]


class Records(Protocol):
    """What outlives the manager: the last value of each key. Values are made of None, bool, int, float, str, list, dict."""

    def put(self, key: Key, value: Any) -> None:
        """From now on. Never raises: where there is no room, the manager will have no successor, and its owner is told."""

    def drop(self, key: Key) -> None:
        """It has no value any more."""

    def together(self) -> AbstractContextManager[None]:
        """All that is put and dropped within is as one: a successor finds all of it or nothing. Not across an await."""

    def all(self) -> dict[Key, Any]:
        """As the managers before this one have left it."""

    def require(self) -> None:
        """Raises MemoryError if there is not much room left."""


class Identity(NamedTuple):
    """Which version of which file: equal values mean that nobody has changed it (as far as the file system tells)."""

    device: int
    inode: int
    nbytes: int
    mtime_ns: int
    ctime_ns: int


class Written(NamedTuple):
    """A write: which version the file was in right before, and right after, and why not all of it could be written."""

    before: Identity
    after: Identity
    error: OSError | None


class Telling(Enum):
    """What a SIGBUS sent to a thread would do to it."""

    HANDLED = "handled"
    FATAL = "fatal"
    IGNORED = "ignored"
    BLOCKED = "blocked"


class ShrunkError(OSError):
    """The file is too short for the bytes that were to be written: somebody has truncated it."""

    def __init__(self, nbytes: int, end: int) -> None:
        super().__init__(
            errno.EIO,
            f"the file has shrunk to {nbytes} bytes, and the changes reach to byte {end} of it. They stay in memory while "
            "it is open here: make the file as long again and flush() again, or read() them and keep them elsewhere",
        )


class NotIsolatedError(OSError):
    """A page was punched out and is still there: its frame is part of a larger one that somebody holds."""


class StaleFrameError(OSError):
    """The page is in another frame by now."""


class Frame(Protocol):
    """A page that was taken out of its object: pinned, mapped nowhere. Exactly one of the methods ends its use."""

    @property
    def number(self) -> int | None:
        """The PFN, where this process may know it."""

    def content(self) -> bytes:
        """The bytes, every store that any process has made included; the frame goes back to the system."""

    def quarantine(self) -> None:
        """Hold the frame for ever, unread."""

    def release(self) -> None:
        """Give the frame back to the system, unread."""


class Store(Protocol):
    """The memory of one object. Pages that were never published, or were taken or dropped, are absent."""

    @property
    def flags(self) -> Table:
        """A byte for each page, for the core to use. It outlives the manager, as the memory does."""

    def flagged(self) -> Iterator[tuple[int, int]]:
        """(first, count) of runs of pages: outside of them nothing was ever stored in `flags`."""

    def runs(self) -> Iterator[tuple[int, int]]:
        """(first, count) of the runs of pages that are present."""

    def take(self, page: int, number: int | None = None) -> Frame | None:
        """Pin the page's frame and remove the page from the object and every process; None if it was absent.

        Raises `StaleFrameError`, and does nothing, if `number` is given and the page is in another frame, and
        `NotIsolatedError` if the page is still there afterwards.
        """

    def present(self, page: int) -> bool:
        """True if the page is in the object's memory."""

    def drop(self, first: int, count: int) -> None:
        """Remove pages from the object and every process, and let their frames go.

        Raises `NotIsolatedError` if some are still there afterwards, with whatever content: a part of a large frame that
        somebody holds is only emptied. Whole units of `Machine.large_frame_bytes` always go.
        """

    def publish(self, first: int, content: Content) -> None:
        """Make absent pages present with `content` (whole pages). For a few pages: it runs on the event loop."""

    async def fill(self, first: int, content: Content) -> None:
        """As `publish`, for any number of pages, without holding up anybody else. If it fails, some may be present."""

    def content(self, first: int, count: int) -> bytes:
        """The bytes of pages, all of which must be present."""

    def write(self, offset: int, data: Content) -> None:
        """Change bytes (`offset` in bytes) of present pages. Nobody is told: no fault, no first write."""

    def close(self) -> None:
        """The object is gone, also for a successor; clients that still map it keep what is present."""


class Space(Protocol):
    """A client's address space, reached through its userfaultfd. Addresses and sizes are in bytes, page aligned.

    A space whose process is gone answers every method as if it had succeeded: nobody is left to be told.
    """

    @property
    def pid(self) -> int: ...

    def wake(self, address: int, nbytes: int) -> None:
        """Let the threads that sleep in a fault in the range try again."""

    async def protect(self, address: int, nbytes: int) -> None:
        """From now on the first write to each page of the range, present or absent, is a fault."""

    async def unprotect(self, address: int, nbytes: int) -> None:
        """Writes are no faults any more. Wakes nobody."""

    async def poison(self, address: int) -> bool:
        """Make accesses to the absent page SIGBUS (EFAULT in system calls). False if it is not absent here."""

    async def unpoison(self, address: int, *, protect: bool) -> None:
        """Replace a poison marker by the page, which must be present in the object."""

    async def show_zeros(self, address: int) -> None:
        """Give a private mapping a page of zeros of its own in place of the absent page. Wakes nobody."""

    def telling(self, thread: int) -> Telling:
        """What would become of a SIGBUS sent to `thread` now."""

    def signal(self, thread: int, address: int) -> None:
        """Send SIGBUS to `thread`, the address in its value: where poison markers do not exist."""

    def kill(self) -> None:
        """SIGKILL."""


class Hits(Protocol):
    """The word that a guarded view shares with the manager: is it in use, and how many losses has it met.

    `hit` is ordered before the answer to the fault, so a thread that got zeros can be sure that the count shows it.
    """

    @property
    def index(self) -> int:
        """Which of its client's it is."""

    @property
    def count(self) -> int:
        """How many losses it has met."""

    @property
    def guarded(self) -> bool:
        """True while at least one guard is open on the view."""

    def hit(self) -> int:
        """Count one more loss; the new count."""


class File(Protocol):
    """A file behind an object. Offsets are the file's, in bytes."""

    async def identity(self) -> Identity: ...

    def read_cached(self, offset: int, nbytes: int) -> tuple[Content, Identity] | None:
        """The bytes, and the identity right after they were read, if both can be had without waiting for anybody; the
        buffer is valid until the next call."""

    async def read(self, offset: int, nbytes: int) -> Content:
        """The bytes, fewer only at the end of the file."""

    async def write(self, offset: int, content: Content) -> Written:
        """Write it all, if that is possible. Raises OSError if it is not known which version the file is in.

        The file keeps its size: if it does not hold the range, nothing is written, and the error is a `ShrunkError`.
        """

    async def sync(self) -> None:
        """All that was written is on the disk when this returns."""

    def keep(self, number: int) -> None:
        """A successor of the manager finds it as that of the object `number`."""

    async def close(self) -> None: ...


class Inheritance(Protocol):
    """What a manager finds of those before it, by the numbers of objects and clients."""

    def store(self, number: int, name: str, nbytes: int) -> Store:
        """The memory of an object."""

    def transit(self, *, hold: bool) -> bool:
        """What becomes of the frame that was being taken out, if there is one: it is held in quarantine, or let go. False if
        it should be held and the system gives no room: then it is let go."""

    def file(self, number: int) -> File: ...

    def space(self, number: int, pid: int) -> Space:
        """The address space of a client."""

    def hits(self, number: int, index: int) -> Hits:
        """The word of a client's guarded view."""


class Machine(Protocol):
    """The operating system."""

    @property
    def records(self) -> Records: ...

    @property
    def held(self) -> int:
        """Frames in quarantine."""

    @property
    def page_size(self) -> int: ...

    def now(self) -> float:
        """Seconds since the epoch."""

    @property
    def publish_at_once_bytes(self) -> int:
        """Up to so much is published on the event loop (`Store.publish`); more would hold up other clients' faults."""

    @property
    def io_seconds_max(self) -> float:
        """How long somebody may sleep in a fault because of a file."""

    async def in_time(self, story: Awaitable[Result]) -> Result:
        """What it returns. Raises TimeoutError, after it was cancelled, if it takes longer than `io_seconds_max`."""

    @property
    def large_frame_bytes(self) -> int:
        """The aligned unit of an object that may be one large frame, if all its pages are present."""

    @property
    def poison_markers(self) -> bool:
        """True if `Space.poison` exists here (Linux 6.6 and newer)."""

    def create(self, name: str, nbytes: int, number: int = 0) -> Store:
        """Memory for the new object `number` (0: one that no successor will ask for), all of it absent. Raises
        MemoryError."""

    def table(self, nbytes: int) -> Table:
        """A table of zeros, at once, however large: memory comes where something is stored. Raises MemoryError."""

    async def find_frame(self, number: int, stores: Sequence[tuple[Store, Runs]]) -> tuple[int, int] | None:
        """Which of the stores (its index) and which page of it frame `number` is. Each store comes with a function that
        gives the runs of its present pages."""

    def quarantined(self, number: int) -> bool:
        """True if the frame is held in quarantine."""

    async def reserved(self, *, pid: int | None = None, number: int | None = None) -> bool:
        """True if the process is the manager, or the frame is part of the manager's own memory."""

    async def offline(self, number: int) -> None:
        """Hand a frame that is not ours to the kernel's hard offline."""
