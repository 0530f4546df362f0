"""What one client has of the manager's memory: objects found for it, mappings made, and what it asks about each."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from hwpoison import protocol
from hwpoison.core import policy, recovery, residence
from hwpoison.core.journal import AskedBy
from hwpoison.core.mappings import Mapping
from hwpoison.core.objects import MemoryObject
from hwpoison.core.writeback import UnwrittenError
from hwpoison.linux.space import Slot
from hwpoison.linux.store import LinuxStore

if TYPE_CHECKING:
    from hwpoison.linux.inheritance import LinuxInheritance
    from hwpoison.service.channel import Channel
    from hwpoison.service.session import Session


class Memories:
    """Those of one session. By a client's own number for a mapping, the next manager finds it (`handle` in the journal)."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._slots: dict[int, Slot] = {}
        self._mappings: dict[int, Mapping] = {}
        self._about_to_map: dict[Channel, list[AskedBy]] = {}
        self._unasked = 0
        self._flush_failed: dict[int, protocol.Failed] = {}

    def __bool__(self) -> bool:
        """True if anything is mapped."""
        return bool(self._mappings)

    def find(self, number: int) -> Mapping | None:
        """By the client's number for it."""
        return self._mappings.get(number)

    def objects(self) -> list[MemoryObject]:
        """Those that are mapped."""
        return list(dict.fromkeys(mapping.object for mapping in self._mappings.values()))

    def standing(self, number: int) -> list[protocol.Told]:
        """What is lost of the object of one mapping, or of all (0)."""
        objects = [self._mapping(number).object] if number else self.objects()
        return [
            protocol.Told(0, one.number, policy.notice_of(one, page, loss))
            for one in objects
            for page, loss in sorted(one.losses.items())
        ]

    def inherit(self, inheritance: LinuxInheritance, handles: dict[int, int]) -> None:
        """What it had mapped when another manager served it."""
        client = self.session.client
        assert client is not None
        known = {one.number: one for one in (*client.mappings, *client.vacated)}
        for handle, number in handles.items():
            if number in known:
                mapping = self._mappings[handle] = known[number]
                if mapping.hits is not None:
                    self._slots[handle] = inheritance.slots[self.session.number, mapping.hits.index]

    def channel_closed(self, channel: Channel) -> None:
        """What was found through it and not mapped will not be: the client was interrupted."""
        for asked_by in self._about_to_map.pop(channel, ()):
            self.session.server.manager.promise_over(asked_by)

    def end(self) -> None:
        """The client is gone. (The core has let go of its mappings.)"""
        for handle in self._mappings:
            self.session.server.machine.records.drop(("handle", self.session.number, handle))
        self._about_to_map.clear()
        self._mappings.clear()
        self._slots.clear()

    async def ask(
        self,
        request: protocol.Write | protocol.Prefetch | protocol.Resident | protocol.ResidentOver | protocol.Repair
        | protocol.Discard | protocol.Lost | protocol.Met | protocol.Flush,
    ) -> protocol.Message:  # fmt: skip
        manager = self.session.server.manager
        mapping = self._mapping(request.mapping)
        object_ = mapping.object
        match request:
            case protocol.Write():
                await recovery.write(manager, object_, request.offset, request.data)
            case protocol.Prefetch():
                await manager.prefetch(mapping, *object_.pages_of(request.offset, request.nbytes))
            case protocol.Resident():
                pages = object_.pages_of(request.offset, request.nbytes)
                await residence.begin(manager, mapping, request.number, *pages, write=request.write)
            case protocol.ResidentOver():
                residence.end(manager, mapping, request.number)
            case protocol.Repair():
                return protocol.Count(await recovery.repair(manager, object_, request.offset, request.data))
            case protocol.Discard():
                first, count = object_.pages_of(request.offset, request.nbytes)
                return protocol.Count(await recovery.discard(manager, object_, first, count))
            case protocol.Lost():
                return protocol.Ranges([(one.offset, one.nbytes) for one in object_.lost()])
            case protocol.Met():
                return await self._met(mapping, request)
            case protocol.Flush():
                return await self._flush(mapping, request)
        return protocol.Done()

    async def _flush(self, mapping: Mapping, request: protocol.Flush) -> protocol.Message:
        # A client that was interrupted has not got the last reply, and no error is told before it has arrived.
        mapping.error_seen = request.errors
        try:
            await self.session.server.manager.flush(mapping)
        except UnwrittenError as error:
            return protocol.Flushed(request.errors + error.errors, protocol.failed(error), unwritten=True)
        except OSError as error:
            self._flush_failed[request.mapping] = protocol.failed(error)
        # Of two flushes at a time, the first one's reply may be the one that nobody has got.
        new = mapping.error_seen != request.errors
        return protocol.Flushed(mapping.error_seen, self._flush_failed.get(request.mapping) if new else None)

    async def object(self, request: protocol.Allocate | protocol.Open | protocol.Attach, fds: list[int]) -> MemoryObject:
        manager = self.session.server.manager
        promised = manager.promises.get((self.session.number, request.mapping)) if request.mapping else None
        if promised is not None:
            # It was made for this very request, by a manager that has died before it could say so.
            return promised
        if not isinstance(request, protocol.Attach) and request.name is not None:
            await manager.settled(request.name)
        if self.session.client is None:
            # Before it is made: an object that nobody can map would stay for ever.
            raise PermissionError("a client that sent no userfaultfd gets no memory: unregistered mappings read zeros")
        match request:
            case protocol.Allocate():
                # Both or neither is found by a manager after this one: asked again, it must know who has asked.
                with self.session.server.machine.records.together():
                    made = manager.allocate(request.nbytes, request.name, persistent=request.persistent)
                    if request.mapping:
                        manager.promise(made, (self.session.number, request.mapping))
                return made
            case protocol.Open():
                return await self._open(request, fds)
            case protocol.Attach():
                object_ = manager.find(request.name)
                if request.object not in (None, object_.number):
                    raise FileNotFoundError(f"memory {request.name!r} is no more; another object has its name")
                return object_

    async def _open(self, request: protocol.Open, fds: list[int]) -> MemoryObject:
        if not fds:
            raise ValueError("Open needs the file's descriptor")
        flags = fcntl.fcntl(fds[0], fcntl.F_GETFL)
        access = flags & os.O_ACCMODE
        file = await self.session.server.machine.open_file(fds.pop(0), request.name)
        try:
            if flags & os.O_APPEND:
                raise ValueError(
                    f"the descriptor of {request.name!r} is open for appending: every write would go to its end"
                )
            if access == os.O_WRONLY or (request.writable and access != os.O_RDWR):
                raise PermissionError(f"the descriptor of {request.name!r} is not open for what the mode asks")
            manager = self.session.server.manager
            await manager.settled(request.name)
            identity = await manager.version(request.name, file)
            if self.session.client is None:
                raise ConnectionError("the client is gone")
            return manager.open(request.name, file, identity, request.offset, request.nbytes, writable=request.writable)
        except Exception:
            await file.close()
            raise

    def found(self, object_: MemoryObject, channel: Channel, mapping: int) -> tuple[protocol.Message, list[int]]:
        """The object, held until the client has mapped it: who gets the memory has given a userfaultfd."""
        manager = self.session.server.manager
        if not mapping:
            self._unasked -= 1
        asked_by = (self.session.number, mapping or self._unasked)
        if asked_by not in manager.promises:
            manager.promise(object_, asked_by)
        store = object_.store
        assert isinstance(store, LinuxStore)
        try:
            fd = os.dup(store.fd) if object_.writable else store.read_only_fd()
        except OSError:
            manager.promise_over(asked_by)
            raise
        self._about_to_map.setdefault(channel, []).append(asked_by)
        reply = protocol.Found(
            object_.number, object_.name, object_.nbytes, object_.kind, object_.writable, object_.tracks_dirt
        )
        return reply, [fd]

    async def map(self, request: protocol.Map, channel: Channel) -> protocol.Message:
        manager = self.session.server.manager
        await self._require_registered(request, self._object_to_map(request, channel)[0])
        # It may have gone meanwhile.
        object_, asked_by = self._object_to_map(request, channel)
        assert self.session.client is not None
        assert self.session.board is not None
        mapping = self._mappings.get(request.mapping)
        if mapping is not None and (mapping.object, mapping.address) == (object_, request.address):
            # Asked again.
            slot = self._slots.get(request.mapping)
            await self._protect(mapping, request)
            return protocol.Mapped(slot.index if slot else -1, mapping.error_seen)
        if mapping is not None:
            raise ValueError(f"the client has a mapping {request.mapping} already; each needs a number of its own")
        slot = self.session.board.slot() if request.guarded else None
        records = self.session.server.machine.records
        try:
            with records.together():
                mapping = manager.map(self.session.client, object_, request.address, slot)
                records.put(("handle", self.session.number, request.mapping), mapping.number)
                if asked_by is not None:
                    manager.promise_over(asked_by)
        except Exception:
            if slot is not None:
                self.session.board.free(slot)
            raise
        self._mappings[request.mapping] = mapping
        if slot is not None:
            self._slots[request.mapping] = slot
        if asked_by is not None and asked_by in self._about_to_map.get(channel, ()):
            self._about_to_map[channel].remove(asked_by)
        await self._protect(mapping, request)
        return protocol.Mapped(slot.index if slot else -1, mapping.error_seen)

    def _object_to_map(self, request: protocol.Map, channel: Channel) -> tuple[MemoryObject, AskedBy | None]:
        """And under what it was promised to the client, if it was. Raises ValueError."""
        promises = self._promises(request, channel)
        if promises:
            object_: MemoryObject | None = self.session.server.manager.promises[promises[0]]
        else:
            object_ = next((one.object for one in self._mappings.values() if one.object.number == request.object), None)
        if object_ is None or self.session.client is None or self.session.board is None:
            raise ValueError(f"object {request.object} was not allocated, opened or attached by this client")
        return object_, promises[0] if promises else None

    async def _require_registered(self, request: protocol.Map, object_: MemoryObject) -> None:
        """Raises ValueError where pages that are absent would read as zeros, and become zeros for everybody."""
        space, nbytes = self.session.space, object_.pages.count * object_.page_size
        assert space is not None
        if not space.reaches(request.address, nbytes):
            raise ValueError(f"{object_.name!r} can't be mapped at {request.address:#x}: no process has such addresses")
        if not await space.registered(request.address, nbytes, watched=object_.tracks_dirt and not request.guarded):
            raise ValueError(
                f"{object_.name!r} at {request.address:#x} is not registered with the userfaultfd of this client: absent "
                "pages would read as zeros; map and register it first"
            )

    def _promises(self, request: protocol.Map, channel: Channel) -> list[AskedBy]:
        """Those of the object that are meant for this mapping, the best first."""
        promises = self.session.server.manager.promises
        asked_by = (self.session.number, request.mapping)
        through_channel = [one for one in self._about_to_map.get(channel, ()) if one[1] < 0]
        return [one for one in (asked_by, *through_channel) if one in promises and promises[one].number == request.object]

    async def _protect(self, mapping: Mapping, request: protocol.Map) -> None:
        """The client has done it, but a page that was taken away before the mapping was known can have lost its marker."""
        object_ = mapping.object
        if not mapping.watched or self.session.space is None:
            return
        try:
            await self.session.space.protect(request.address, object_.pages.count * object_.page_size)
        except OSError:
            if request.mapping in self._mappings:
                self.unmap(request.mapping)
            raise

    def unmap(self, number: int) -> None:
        if (self.session.number, number) in self.session.server.manager.promises:
            # The client was interrupted before it mapped it.
            self.session.server.manager.promise_over((self.session.number, number))
            return
        mapping = self._mapping(number)
        del self._mappings[number]
        self._flush_failed.pop(number, None)
        slot = self._slots.pop(number, None)
        if slot is not None and self.session.board is not None:
            self.session.board.free(slot)
        records = self.session.server.machine.records
        with records.together():
            records.drop(("handle", self.session.number, number))
            self.session.server.manager.unmap(mapping)

    def _mapping(self, number: int) -> Mapping:
        try:
            return self._mappings[number]
        except KeyError:
            raise ValueError(f"this client has no mapping {number}") from None

    async def _met(self, mapping: Mapping, request: protocol.Met) -> protocol.Message:
        pages, count = await policy.met(mapping, request.since, request.forget)
        return protocol.Ranges(_joined(mapping.object, pages), count)


def _joined(object_: MemoryObject, pages: list[int]) -> list[tuple[int, int]]:
    """(offset, nbytes) of pages, neighbours joined, in the order in which they come."""
    runs: list[list[int]] = []
    for page in pages:
        if runs and runs[-1][0] + runs[-1][1] == page:
            runs[-1][1] += 1
        else:
            runs.append([page, 1])
    return [(object_.range_of(*run).offset, object_.range_of(*run).nbytes) for run in runs]
