"""The reverse map: from a page of an object to the mappings that cover it, and from a client's address to its mapping.

The kernel walks every process to find out who maps a page. Here a failure costs in proportion to the mappings of that
page. All mappings of an object that start at the same page are neighbours in one sorted list; in practice nearly every
mapping covers its whole object.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right, insort
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hwpoison.core.machine import Hits, Space

if TYPE_CHECKING:
    from hwpoison.core.objects import MemoryObject


class Mapping:
    """One client's view of pages `first` to `first + count` of an object, at `address`.

    `hits` is there for a guarded view, and `met` are the lost pages that it has been shown as zeros, in order: one for
    each count of `hits`, but for the first `met_before` of them, which are forgotten. `markers` are the pages at which a
    poison marker was left. `reads` and `writes` are the sequential streams, see `core.readahead`; `resident` are the ranges
    that are (`core.residence`), by the client's own numbers: first, count, whether for writing.
    """

    __slots__ = (
        "_answers", "_asleep", "address", "client", "count", "error_seen", "errors_apart", "first", "gone", "heir", "hits",
        "markers", "met", "met_before", "number", "object", "reads", "resident", "writes",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        client: Client,
        object_: MemoryObject,
        address: int,
        first: int,
        count: int,
        hits: Hits | None,
    ) -> None:
        self.number = number
        self.client = client
        self.object = object_
        self.address = address
        self.first = first
        self.count = count
        self.hits = hits
        self.markers: set[int] = set()
        self.met: list[int] = []
        self.met_before = 0
        self.reads: dict[int, int] = {}
        self.writes: dict[int, int] = {}
        self.resident: dict[int, tuple[int, int, bool]] = {}
        self.error_seen = object_.error_sequence
        self.errors_apart = 0
        """How many more `errors` it has than the object: one for what it inherits."""
        self.heir = bool(object_.untold)
        """Changes were lost before it came, and nobody was told: it is, unless they are had back or told meanwhile."""
        self.gone = False
        """It has ended, though something that was asked through it may still be under way."""
        self._answers: dict[asyncio.Future[None], None] = {}
        self._asleep: dict[int, int] = {}

    @property
    def end_address(self) -> int:
        return self.address + self.count * self.object.page_size

    @property
    def errors(self) -> int:
        """Of how many errors `flush` is to tell this handle; `error_seen` is of how many it has."""
        return self.object.error_sequence + self.errors_apart

    @property
    def watched(self) -> bool:
        """True if first writes through it are. A guarded view is read-only."""
        return self.object.tracks_dirt and self.hits is None

    def unwatched(self, page: int) -> bool:
        """True if a system call may write to the page at any moment."""
        return any(write and first <= page < first + count for first, count, write in self.resident.values())

    def page(self, address: int) -> int:
        """The page of the object that `address` shows."""
        return self.first + (address - self.address) // self.object.page_size

    def address_of(self, page: int) -> int:
        """Where `page` is to be seen."""
        return self.address + (page - self.first) * self.object.page_size

    def covers(self, page: int) -> bool:
        return self.first <= page < self.first + self.count

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While an access to a lost page gets its answer: zeros or a poison marker."""
        answer = asyncio.get_running_loop().create_future()
        self._answers[answer] = None
        try:
            yield
        finally:
            del self._answers[answer]
            answer.set_result(None)

    async def answered(self) -> None:
        """Until all answers that are on their way have arrived: who takes zeros back must find them."""
        for answer in tuple(self._answers):
            await answer

    def wake(self, page: int, count: int = 1) -> None:
        """Let those that sleep on the pages try again."""
        self.woken(page, count)
        self.client.space.wake(self.address_of(page), count * self.object.page_size)

    def sleeps(self, thread: int, page: int) -> None:
        """A fault of the thread was read. Noted only where a thread may have to be sent a signal for it."""
        self._asleep[thread] = page

    def woken(self, page: int, count: int) -> None:
        """Whoever slept on the pages goes on."""
        for thread in [thread for thread, one in self._asleep.items() if page <= one < page + count]:
            del self._asleep[thread]

    def still_sleeps(self, thread: int, page: int) -> bool:
        """False if the thread has been woken since its fault was read: it may be anywhere by now, and if it still wants the
        page, there is another fault."""
        return self._asleep.get(thread) == page


class Client:
    """A process that is attached: its address space and its mappings, sorted by address."""

    __slots__ = ("_addresses", "_mappings", "alive", "number", "page_size", "space", "told", "vacated")

    def __init__(self, number: int, space: Space, page_size: int) -> None:
        self.number = number
        self.space = space
        self.page_size = page_size
        self.alive = True
        self._addresses: list[int] = []
        self._mappings: list[Mapping] = []
        self.vacated: dict[Mapping, None] = {}
        """Mappings whose addresses show something else by now, and whose end the client has not told yet."""
        self.told: dict[tuple[int, int], int] = {}
        """How often each (thread, address) was sent SIGBUS for the same loss, where there are no poison markers."""

    @property
    def pid(self) -> int:
        return self.space.pid

    def forget_told(self, address: int) -> None:
        """The page at `address` is well again."""
        for key in [key for key in self.told if key[1] == address]:
            del self.told[key]

    @property
    def mappings(self) -> tuple[Mapping, ...]:
        return tuple(self._mappings)

    def find(self, address: int) -> Mapping | None:
        """The mapping that contains `address`."""
        index = bisect_right(self._addresses, address) - 1
        if index < 0:
            return None
        mapping = self._mappings[index]
        return mapping if address < mapping.end_address else None

    def add(self, mapping: Mapping) -> None:
        index = bisect_right(self._addresses, mapping.address)
        self._addresses.insert(index, mapping.address)
        self._mappings.insert(index, mapping)

    def remove(self, mapping: Mapping) -> None:
        index = self._mappings.index(mapping)
        del self._addresses[index], self._mappings[index]
        # What is mapped there next are other pages, and of their losses nobody was told.
        for key in [key for key in self.told if mapping.address <= key[1] < mapping.end_address]:
            del self.told[key]


class ReverseMap:
    """The mappings of one object, sorted by their first page."""

    __slots__ = ("_longest", "_mappings")

    def __init__(self) -> None:
        self._mappings: list[Mapping] = []
        self._longest = 0

    def __len__(self) -> int:
        return len(self._mappings)

    def __iter__(self) -> Iterator[Mapping]:
        return iter(tuple(self._mappings))

    def add(self, mapping: Mapping) -> None:
        insort(self._mappings, mapping, key=lambda one: one.first)
        self._longest = max(self._longest, mapping.count)

    def remove(self, mapping: Mapping) -> None:
        self._mappings.remove(mapping)

    def covering(self, first: int, count: int = 1) -> list[Mapping]:
        """The mappings that show at least one of the pages."""
        low = bisect_right(self._mappings, first - self._longest, key=lambda one: one.first)
        high = bisect_right(self._mappings, first + count - 1, key=lambda one: one.first)
        return [one for one in self._mappings[low:high] if one.first + one.count > first]
