"""The manager's books: what there is, what has happened, and how to say so. Everything that handles anything has them.

They decide nothing. What can be done with them is in the files beside; `core.manager` puts all together.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterator
from typing import Any

from hwpoison.core.accounting import Observer, Statistics
from hwpoison.core.journal import AskedBy, Journal
from hwpoison.core.machine import Machine
from hwpoison.core.mappings import Client, Mapping
from hwpoison.core.objects import MemoryObject
from hwpoison.core.reclaim import Reclaim
from hwpoison.core.records import Event, Failure, Notice

LIFE_BITS = 32
"""Numbers that one manager can give, as a power of two."""
WINDOW_BYTES = 2 << 20
"""Most that is brought in, or written back, at a time."""


class Books:
    """All objects and clients of one manager process. `instance` makes its event ids different from any other's."""

    def __init__(
        self,
        machine: Machine,
        observer: Observer,
        *,
        instance: str,
        life: int = 1,
        memory_limit: int | None = None,
        offline_foreign: bool = False,
    ) -> None:
        self.machine = machine
        self.observer = observer
        self.journal = Journal(machine.records)
        self.offline_foreign = offline_foreign
        self.statistics = Statistics()
        self._zeros = memoryview(b"")
        self.memory_limit = memory_limit
        limit = None if memory_limit is None else max(1, memory_limit // machine.page_size)
        self.reclaim = Reclaim(self.objects, self.statistics, limit)
        self.lost_changes_of: Counter[tuple[int, int]] = Counter()
        """How many pages of each file (device, inode) are lost with changes that it does not have."""
        self.instance = instance
        self.life = life
        """How many managers there were, with this one."""
        self._events = 0
        self._numbers = 0
        self._objects: dict[str, MemoryObject] = {}
        self._clients: dict[int, Client] = {}
        self._tasks: dict[asyncio.Task[None], None] = {}
        self.answers: dict[AskedBy, asyncio.Future[Failure]] = {}
        """Of reports that a manager before this one has begun, or has not answered."""
        self.promises: dict[AskedBy, MemoryObject] = {}
        """Objects that stay although nobody maps them: clients have asked for them, and are about to."""

    # --- what there is

    def objects(self) -> list[MemoryObject]:
        return list(self._objects.values())

    def find(self, name: str) -> MemoryObject:
        """Raises FileNotFoundError."""
        try:
            return self._objects[name]
        except KeyError:
            known = "objects() and `hwpoison objects` list those that are"
            raise FileNotFoundError(f"there is no object {name!r}; {known}") from None

    def clients(self) -> list[Client]:
        return list(self._clients.values())

    def inherit(self, one: MemoryObject | Client) -> None:
        """It was there before this manager (`core.takeover`)."""
        if isinstance(one, MemoryObject):
            self._objects[one.name] = one
        else:
            self._clients[one.number] = one

    def add_mapping(self, mapping: Mapping) -> None:
        """The client shows the object there from now on. What was there before is gone."""
        client = mapping.client
        for stale in client.mappings:
            if stale.address < mapping.end_address and mapping.address < stale.end_address:
                # Unmapped by another thread, which has not come to say so yet. It ends when the client says so.
                client.remove(stale)
                stale.object.mappings.remove(stale)
                client.vacated[stale] = None
        client.add(mapping)
        mapping.object.mappings.add(mapping)
        mapping.object.references += 1

    def client(self, number: int) -> Client:
        """Raises KeyError."""
        return self._clients[number]

    def clients_of(self, pid: int) -> Iterator[Client]:
        return (client for client in self.clients() if client.pid == pid)

    async def find_frame(self, number: int) -> tuple[MemoryObject, int] | None:
        """The page whose frame has this PFN."""
        while True:
            objects = self.objects()
            found = await self.machine.find_frame(number, [(one.store, one.present_runs) for one in objects])
            # Where an object was, there may be another one by now.
            if not any(one.closed for one in objects):
                return None if found is None else (objects[found[0]], found[1])

    def lost_elsewhere(self, object_: MemoryObject, offset: int, nbytes: int) -> MemoryObject | None:
        """An object other than this one, over the same file, that has lost changes to these bytes of the file."""
        backing = object_.backing
        assert backing is not None
        if not self.lost_changes_of[backing.place]:
            return None
        for other in self.objects():
            if other is not object_ and other.backing is not None and other.backing.place == backing.place:
                begin = max(offset - other.backing.offset, 0)
                end = min(offset + nbytes - other.backing.offset, other.nbytes)
                if begin < end and other.lost_changes_within(*other.pages_of(begin, end - begin)):
                    return other
        return None

    def zeros(self, count: int) -> memoryview:
        """The content of `count` fresh anonymous pages."""
        nbytes = count * self.machine.page_size
        if len(self._zeros) < nbytes:
            self._zeros = memoryview(bytes(nbytes))
        return self._zeros[:nbytes]

    def stands(self, notice: Notice) -> bool:
        """True until the loss that it tells of is repaired or discarded. A page that is lost again is another loss."""
        object_ = self._objects.get(notice.name)
        loss = object_.losses.get(notice.offset // object_.page_size) if object_ is not None else None
        return loss is not None and loss.event_id == notice.event_id

    # --- what happens

    def new_event_id(self) -> str:
        self._events += 1
        life = "" if self.life == 1 else f"{self.life}."
        return f"{self.instance}-{life}{self._events}"

    def new_number(self) -> int:
        """For an object, a client or a mapping: none is used twice, by the managers before this one neither."""
        self._numbers += 1
        return (self.life - 1 << LIFE_BITS) + self._numbers

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

    def start(self, story: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run `story` beside everything else. Its errors are defects."""
        task = asyncio.get_running_loop().create_task(story, name=name)
        self._tasks[task] = None
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            self.observer.defect(task.get_name(), error)
