"""The manager's books: objects, clients, and what clients may ask for. The handling itself is in the files beside.

Everything runs on one event loop. A coroutine that has awaited anything looks again at what it relied on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any

from hwpoison.core import faults
from hwpoison.core.accounting import Observer, Statistics
from hwpoison.core.failure import memory_failure
from hwpoison.core.machine import File, Hits, Machine, Space
from hwpoison.core.mappings import Client, Mapping
from hwpoison.core.objects import Backing, MemoryObject
from hwpoison.core.pages import WRITEBACK
from hwpoison.core.reclaim import Reclaim
from hwpoison.core.records import Event, Failure, Report
from hwpoison.core.writeback import write_back_all


class MemoryManager:
    """All objects and clients of one manager process. `instance` makes its event ids different from any other's."""

    def __init__(
        self,
        machine: Machine,
        observer: Observer,
        *,
        instance: str,
        memory_limit: int | None = None,
        offline_foreign: bool = False,
    ) -> None:
        self.machine = machine
        self.observer = observer
        self.offline_foreign = offline_foreign
        self.statistics = Statistics()
        self._zeros = memoryview(bytes(faults.READ_AHEAD_PAGES * machine.page_size))
        self.memory_limit = memory_limit
        self.reclaim = Reclaim(self, None if memory_limit is None else max(1, memory_limit // machine.page_size))
        self._instance = instance
        self._events = 0
        self._numbers = 0
        self._objects: dict[str, MemoryObject] = {}
        self._clients: dict[int, Client] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # --- objects

    def objects(self) -> list[MemoryObject]:
        return list(self._objects.values())

    def find(self, name: str) -> MemoryObject:
        """Raises FileNotFoundError."""
        try:
            return self._objects[name]
        except KeyError:
            raise FileNotFoundError(f"there is no object {name!r}; objects() lists those that are") from None

    def allocate(self, nbytes: int, name: str | None = None) -> MemoryObject:
        """A new anonymous object, all zeros. Raises ValueError, FileExistsError, MemoryError."""
        if nbytes <= 0:
            raise ValueError(f"an object has at least 1 byte, not {nbytes}")
        if self.memory_limit is not None:
            allocated = sum(one.nbytes for one in self._objects.values() if one.backing is None)
            if allocated + nbytes > self.memory_limit:
                raise MemoryError(
                    f"{nbytes} bytes of anonymous memory do not fit: {allocated} of the memory limit of "
                    f"{self.memory_limit} are allocated, and anonymous pages can't be dropped"
                )
        return self._create(name, nbytes, None)

    def open(self, name: str, file: File, offset: int, nbytes: int | None, *, writable: bool) -> MemoryObject:
        """The object over bytes of `file`: a new one, or that of `name` if it is the same file, range and mode.

        Raises ValueError for a range that is not within the file, FileExistsError for a name that is taken.
        """
        identity = file.identity()
        if offset < 0 or (nbytes is not None and nbytes <= 0):
            raise ValueError(f"offset {offset} and {nbytes} bytes are no range: offset >= 0 and nbytes >= 1")
        if nbytes is None:
            nbytes = identity.nbytes - offset
        if nbytes <= 0 or offset + nbytes > identity.nbytes:
            raise ValueError(
                f"{max(nbytes, 0)} bytes at offset {offset} are not within {name!r}, which has {identity.nbytes} bytes"
            )
        known = self._objects.get(name)
        if known is not None and known.backing is not None and known.backing.identity is not None:
            same_file = known.backing.identity[:2] == identity[:2]
            if same_file and (known.backing.offset, known.nbytes, known.backing.writable) == (offset, nbytes, writable):
                file.close()
                return known
        return self._create(name, nbytes, Backing(file, offset, writable, identity))

    def _create(self, name: str | None, nbytes: int, backing: Backing | None) -> MemoryObject:
        if name is None:
            self._numbers += 1
            name = f"anonymous-{self._numbers}"
        if name in self._objects:
            raise FileExistsError(f"the name {name!r} is taken by another object; pass another name=, or attach({name!r})")
        if not name:
            raise ValueError("an object's name has at least one character")
        store = self.machine.create(name, nbytes)
        self._numbers += 1
        object_ = MemoryObject(self._numbers, name, nbytes, self.machine.page_size, store, backing)
        self._objects[name] = object_
        return object_

    def hold(self, object_: MemoryObject) -> None:
        """The object stays although nobody maps it: a client is about to."""
        object_.references += 1

    def release(self, object_: MemoryObject) -> None:
        """One reference less; the last one writes the object back and ends it."""
        object_.references -= 1
        if not object_.references:
            self.start(self._end(object_), f"end of object {object_.number}")

    async def _end(self, object_: MemoryObject) -> None:
        await write_back_all(self, object_)
        async with object_.locks.hold(0, object_.pages.count):
            # What reclaim writes back needs no lock any more, but it needs the file.
            for page in [page for run in object_.pages.runs(WRITEBACK) for page in range(run[0], run[0] + run[1])]:
                await object_.written_back(page)
            if object_.references or object_.closed:
                return
            object_.closed = True
            del self._objects[object_.name]
            self.reclaim.left(object_.pages.present)
            object_.store.close()
            if object_.backing is not None:
                object_.backing.file.close()

    # --- clients and their mappings

    def add_client(self, space: Space) -> Client:
        self._numbers += 1
        client = Client(self._numbers, space, self.machine.page_size)
        self._clients[client.number] = client
        return client

    def remove_client(self, client: Client) -> None:
        """The process is gone, or has no mapping left and wants no more."""
        if not client.alive:
            return
        client.alive = False
        del self._clients[client.number]
        for mapping in (*client.mappings, *client.vacated):
            self.unmap(mapping)

    def clients(self) -> list[Client]:
        return list(self._clients.values())

    def clients_of(self, pid: int) -> Iterator[Client]:
        return (client for client in self.clients() if client.pid == pid)

    def map(self, client: Client, object_: MemoryObject, address: int, hits: Hits | None) -> Mapping:
        """`client` shows the whole object at `address`, registered with its userfaultfd. Raises ValueError."""
        size = object_.pages.count * object_.page_size
        if address <= 0 or address % object_.page_size:
            raise ValueError(f"address {address:#x} is not that of a new mapping of {object_.name!r}")
        for stale in client.mappings:
            if stale.address < address + size and address < stale.end_address:
                # Unmapped by another thread, which has not come to say so yet.
                self._vacate(stale)
        self._numbers += 1
        mapping = Mapping(self._numbers, client, object_, address, 0, object_.pages.count, hits)
        client.add(mapping)
        object_.mappings.add(mapping)
        self.hold(object_)
        return mapping

    def unmap(self, mapping: Mapping) -> None:
        """The mapping is gone from the client's address space."""
        if mapping in mapping.client.vacated:
            mapping.client.vacated.remove(mapping)
        else:
            mapping.client.remove(mapping)
            mapping.object.mappings.remove(mapping)
        self.release(mapping.object)

    def _vacate(self, mapping: Mapping) -> None:
        """The addresses show something else by now. The mapping ends when the client says so."""
        mapping.client.remove(mapping)
        mapping.object.mappings.remove(mapping)
        mapping.client.vacated.add(mapping)

    # --- what happens

    def fault(self, client: Client, address: int, thread: int, *, write: bool, protected: bool) -> None:
        """See `core.faults.fault`."""
        faults.fault(self, client, address, thread, write=write, protected=protected)

    async def report(self, report: Report) -> Failure:
        """See `core.failure.memory_failure`. Raises FileNotFoundError or ValueError for what names no page."""
        if report.name is not None:
            self.find(report.name).pages_of(report.offset or 0, 1)
        return await memory_failure(self, report)

    async def prefetch(self, mapping: Mapping, first: int, count: int) -> None:
        """Bring pages in, as many as the memory limit lets stay; those that can't be had are left for their access."""
        if self.reclaim.limit is not None:
            count = min(count, self.reclaim.limit // 2)
        await faults.prefetch(self, mapping.object, first, count)

    async def find_frame(self, number: int) -> tuple[MemoryObject, int] | None:
        """The page whose frame has this PFN."""
        objects = self.objects()
        found = await self.machine.find_frame(number, [(one.store, one.is_present) for one in objects])
        return None if found is None else (objects[found[0]], found[1])

    async def close(self) -> None:
        """Write everything back; afterwards nothing is under way."""
        for object_ in self.objects():
            await write_back_all(self, object_)
        while self._tasks:
            await asyncio.wait(self._tasks)

    # --- for the files beside

    def zeros(self, count: int) -> memoryview:
        """The content of `count` fresh anonymous pages."""
        return self._zeros[: count * self.machine.page_size]

    def new_event_id(self) -> str:
        self._events += 1
        return f"{self._instance}-{self._events}"

    def record(
        self,
        kind: str,
        object_: MemoryObject | None = None,
        page: int | None = None,
        *,
        event_id: str = "",
        state: str = "",
        outcome: str = "",
        pid: int = 0,
        detail: str = "",
    ) -> None:
        """Something happened, to `page` of `object_` if they are given: one line of the event log."""
        place = object_.range_of(page) if object_ is not None and page is not None else None
        self.observer.event(
            Event(
                kind=kind,
                event_id=event_id,
                name=object_.name if object_ is not None else "",
                offset=place.offset if place else -1,
                nbytes=place.nbytes if place else 0,
                state=state,
                outcome=outcome,
                pid=pid,
                detail=detail,
            )
        )

    def start(self, story: Coroutine[Any, Any, None], name: str) -> None:
        """Run `story` beside everything else. Its errors are defects."""
        task = asyncio.get_running_loop().create_task(story, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.observer.defect(task.get_name(), error)
