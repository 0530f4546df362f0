"""Page locks: a table of the ranges that are held, so that a page which nobody works on costs nothing.

Waiters are served in the order in which they came, also against later ones that would fit: nobody starves.
"""

from __future__ import annotations

import asyncio
from types import TracebackType


class Held:
    """A range of pages that somebody holds or waits for; `async with` it."""

    __slots__ = ("end", "first", "granted", "locks")

    def __init__(self, locks: RangeLocks, first: int, count: int) -> None:
        self.locks = locks
        self.first = first
        self.end = first + count
        self.granted: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Held:
        await self.locks.acquire(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.locks.release(self)

    def release_front(self, count: int) -> None:
        """Let go of the first `count` pages and keep the others."""
        self.first += count
        self.locks.grant()


class RangeLocks:
    """The locks of one object's pages."""

    __slots__ = ("_held", "_waiting")

    def __init__(self) -> None:
        self._held: list[Held] = []
        self._waiting: list[Held] = []

    def free(self, first: int, count: int = 1) -> bool:
        """True if nobody holds or waits for any page of the range."""
        if not self._held and not self._waiting:
            return True
        end = first + count
        return not any(one.first < end and first < one.end for one in self._held) and not any(
            one.first < end and first < one.end for one in self._waiting
        )

    @property
    def busy(self) -> bool:
        """True if anybody holds or waits for anything."""
        return bool(self._held or self._waiting)

    def hold(self, first: int, count: int = 1) -> Held:
        """`async with locks.hold(page):`"""
        return Held(self, first, count)

    async def acquire(self, range_: Held) -> None:
        if self.free(range_.first, range_.end - range_.first):
            self._held.append(range_)
            return
        range_.granted = asyncio.get_running_loop().create_future()
        self._waiting.append(range_)
        try:
            await range_.granted
        except asyncio.CancelledError:
            # The grant may have come in the same turn as the cancellation; it must not be kept by nobody.
            if range_ in self._held:
                self.release(range_)
            else:
                self._waiting.remove(range_)
                self.grant()
            raise

    def release(self, range_: Held) -> None:
        self._held.remove(range_)
        self.grant()

    def grant(self) -> None:
        """Give waiters what has become free, in order."""
        if not self._waiting:
            return
        blocked = list(self._held)
        for waiter in list(self._waiting):
            if not any(one.first < waiter.end and waiter.first < one.end for one in blocked):
                self._waiting.remove(waiter)
                self._held.append(waiter)
                assert waiter.granted is not None
                if not waiter.granted.done():
                    waiter.granted.set_result(None)
            blocked.append(waiter)
