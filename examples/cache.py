"""A cache for an asyncio service, in managed memory: keys whose bytes are lost are dropped, as if they had never been there.

python examples/cache.py
"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import hwpoison

SLOT = 4 * mmap.PAGESIZE


class Cache:
    """Values of up to `SLOT` bytes. A value has its pages for itself, so a failure costs one key."""

    def __init__(self, memory: hwpoison.Memory) -> None:
        self._memory = memory
        self._free = list(range(memory.nbytes // SLOT))
        self._slots: dict[str, tuple[int, int]] = {}
        """Where each key's value is: (slot, bytes)."""
        self.dropped = asyncio.Queue[str]()

    def put(self, key: str, value: bytes) -> None:
        self.drop(key)
        slot = self._free.pop()
        # Whole pages: what was lost there before is good again.
        self._memory.write(slot * SLOT, value.ljust(SLOT, b"\0"))
        self._slots[key] = slot, len(value)

    def get(self, key: str) -> bytes | None:
        if key not in self._slots:
            return None
        slot, nbytes = self._slots[key]
        try:
            return self._memory.read(slot * SLOT, nbytes)
        except hwpoison.PoisonError:
            # The failure was faster than its notice.
            self.drop(key)
            self.dropped.put_nowait(key)
            return None

    def drop(self, key: str) -> None:
        if key in self._slots:
            self._free.append(self._slots.pop(key)[0])

    async def drop_what_is_lost(self, notices: hwpoison.NoticeStream) -> None:
        async for _ in notices:
            # Not what the notice says: the slot may have got another value, and be good again.
            lost = {
                slot
                for one in self._memory.lost()
                for slot in range(one.offset // SLOT, -(-(one.offset + one.nbytes) // SLOT))
            }
            for key in [key for key, (slot, _) in self._slots.items() if slot in lost]:
                self.drop(key)
                self.dropped.put_nowait(key)


@asynccontextmanager
async def serving(memory: hwpoison.Memory) -> AsyncIterator[Cache]:
    cache = Cache(memory)
    with memory.notices() as notices:
        listening = asyncio.create_task(cache.drop_what_is_lost(notices))
        try:
            yield cache
        finally:
            listening.cancel()
            with suppress(asyncio.CancelledError):
                await listening


async def main() -> None:
    with hwpoison.Manager() as manager, manager.allocate(64 * SLOT, "cache") as memory:
        async with serving(memory) as cache:
            for number in range(50):
                cache.put(f"key {number}", f"value {number}".encode() * 100)
            # The page of somebody's value fails (simulated).
            await asyncio.to_thread(manager.inject, memory, 40 * SLOT)
            key = await cache.dropped.get()
            print("dropped:", key)
            print("now:", cache.get(key))
            cache.put(key, b"fetched again")
            print("then:", cache.get(key))
            others = [f"key {number}" for number in range(50) if f"key {number}" != key]
            print(
                "the others are right:", all(cache.get(one) == one.replace("key", "value").encode() * 100 for one in others)
            )


if __name__ == "__main__":
    asyncio.run(main())
