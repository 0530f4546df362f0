"""One client of the manager: what it asks, what it has, and what it is told. Its sockets are in `service.channel`."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from hwpoison import protocol
from hwpoison.core import policy, recovery
from hwpoison.core.journal import AskedBy, of_kind
from hwpoison.core.machine import Key
from hwpoison.core.mappings import Client, Mapping
from hwpoison.core.objects import MemoryObject
from hwpoison.core.pages import DIRTY
from hwpoison.core.records import Notice
from hwpoison.core.writeback import UnwrittenError
from hwpoison.linux import userfaultfd
from hwpoison.linux.inheritance import BOARD, PROCESS, SPACE, LinuxInheritance
from hwpoison.linux.space import Board, LinuxSpace, Slot
from hwpoison.linux.store import LinuxStore
from hwpoison.service.channel import Channel, NoticeChannel

if TYPE_CHECKING:
    from hwpoison.service.server import Server

LOOK_SECONDS_MIN, LOOK_SECONDS_MAX = 0.05, 60.0
"""How often it is looked whether a client with which there is no connection any more still has its memory."""
CONTROL, LIFELINE = "control", "lifeline"
KEPT = (SPACE, PROCESS, BOARD, CONTROL, LIFELINE)
"""What the keeper holds of a session, under these words and its number."""
log = logging.getLogger("hwpoison")


class Left:
    """What managers before this one have written down of all sessions, by their numbers."""

    def __init__(self, records: dict[Key, Any]) -> None:
        self.sessions: dict[int, list[Any]] = {}
        """Process, whether it maps, whether it was welcomed."""
        self.listens: dict[int, int] = {}
        """How many losses it has had."""
        self.handles: dict[int, dict[int, int]] = {}
        """The numbers of its mappings, by its own numbers for them."""
        self.notices: dict[int, dict[int, list[Any]]] = {}
        """Object and `Notice` of what it was not told yet, by number."""
        for kind, whole in (("session", self.sessions), ("listens", self.listens)):
            for (number,), value in of_kind(records, kind).items():
                whole[number] = value  # type: ignore[index]
        for kind, parts in (("handle", self.handles), ("notice", self.notices)):
            for (number, part), value in of_kind(records, kind).items():
                parts.setdefault(number, {})[part] = value  # type: ignore[arg-type, index]


class Session:
    """One client process. It has a number from its Hello on, which for a client that maps is that of its `Client`.

    What the next manager can't do without is written down (`records`), under keys that begin with what it is and the number:
    `session` (process, whether it maps, whether it was welcomed), `handle` (the number of the mapping, by the client's own
    number for it), `listens` (how many losses it has had, if it listens) and `notice` (what it was not told yet). The keeper
    holds its first socket and its end of the lifeline, and if it maps its userfaultfd, process and board.
    """

    def __init__(self, server: Server, connection: socket.socket, pid: int, number: int = 0) -> None:
        self.server = server
        self.pid = pid
        self.number = number
        self.client: Client | None = None
        self._space: LinuxSpace | None = None
        self._board: Board | None = None
        self._slots: dict[int, Slot] = {}
        self._mappings: dict[int, Mapping] = {}
        self._about_to_map: dict[Channel, list[AskedBy]] = {}
        self._unasked = 0
        self._flush_failed: dict[int, protocol.Failed] = {}
        self._losses = 0
        self._maps = False
        self._welcomed = True
        self._lifeline = -1
        self._notices: NoticeChannel | None = None
        self._next_look: asyncio.TimerHandle | None = None
        self._control: Channel | None = Channel(self, connection)
        """The first one, which the keeper holds too."""
        self._channels: set[Channel] = {self._control}

    # --- what a manager before this one has left

    @classmethod
    def inherited(cls, server: Server, inheritance: LinuxInheritance, number: int, left: Left) -> Session:
        """The session, before anything is served: `go_on` begins that."""
        pid, maps, session_welcomed = left.sessions[number]
        session = cls(server, socket.socket(fileno=inheritance.take(f"{CONTROL}:{number}")), pid, number)
        if number in left.listens:
            session._losses = left.listens[number]
            session._notices = session._notice_channel()
            for told, (object_number, notice) in left.notices.get(number, {}).items():
                session._notices.tell(protocol.Told(told, object_number, msgspec.convert(notice, Notice)))
        session._maps = maps
        session._welcomed = session_welcomed
        session._lifeline = inheritance.find(f"{LIFELINE}:{number}")
        return session

    def go_on(self, inheritance: LinuxInheritance, left: Left) -> None:
        """The books are made: serve the client."""
        if self._maps:
            self.client = self.server.manager.client(self.number)
            self._space = inheritance.spaces[self.number]
            self._board = inheritance.board(self.number)
            known = {one.number: one for one in (*self.client.mappings, *self.client.vacated)}
            for handle, mapping_number in left.handles.get(self.number, {}).items():
                if mapping_number in known:
                    mapping = self._mappings[handle] = known[mapping_number]
                    if mapping.hits is not None:
                        self._slots[handle] = inheritance.slots[self.number, mapping.hits.index]
            self._listen()
        if not self._welcomed:
            # Whether it got the welcome is not known; a second one does no harm.
            self._welcome()

    def listen(self) -> None:
        """From now on the client's requests are read."""
        if self._control is not None:
            self._control.listen()

    def _welcome(self) -> None:
        assert self._control is not None
        reply, fds = self._welcome_reply()
        try:
            self._control.say(reply, fds)
        finally:
            for fd in fds:
                os.close(fd)
        self.replied(protocol.Hello())

    def replied(self, request: protocol.Request | None) -> None:
        """The reply is sent. It is in the client's socket, whatever becomes of this process."""
        if isinstance(request, protocol.Flush) and request.mapping in self._mappings:
            # Only now: what has been told is not told again by the next manager.
            self.server.manager.journal.mapping(self._mappings[request.mapping])
        elif isinstance(request, protocol.ReportPage) and request.number:
            self.server.manager.answered((self.number, request.number))
        elif isinstance(request, protocol.Hello) and self._control is not None and self.number:
            self.server.machine.records.put(("session", self.number), [self.pid, self._maps, True])

    # --- its life

    def _add_channel(self, request: protocol.AddChannel | protocol.Listen, fds: list[int]) -> None:
        """It is answered on the new channel: a client that stops waiting leaves no answer for the next one to read."""
        taken = _taken_socket(fds)
        try:
            # One that it asks by it has in any case: what is kept in reserve is for that.
            if len(self._channels) > 1 or isinstance(request, protocol.Listen):
                self.server.descriptors.require()
        except OSError as error:
            with taken, suppress(OSError):
                taken.setblocking(False)
                protocol.send(taken, protocol.failed(error))
            return
        added = protocol.Added(self.server.manager.life, os.getpid())
        if isinstance(request, protocol.AddChannel):
            channel = Channel(self, taken)
            self._channels.add(channel)
            channel.listen()
            channel.say(added)
            return
        if self._notices is None or self._notices.closed:
            self._notices = self._notice_channel()
        self.server.machine.records.put(("listens", self.number), self._losses)
        self._notices.begin(taken, request.after, added)

    def _notice_channel(self) -> NoticeChannel:
        records = self.server.machine.records
        return NoticeChannel(self.server.manager.stands, lambda number: records.drop(("notice", self.number, number)))

    def channel_closed(self, channel: Channel) -> None:
        """The last channel's end is the client's, unless its memory lives and still has mappings: those are served.

        What was found through it and not mapped will not be: the client was interrupted.
        """
        self._channels.discard(channel)
        for asked_by in self._about_to_map.pop(channel, ()):
            self.server.manager.promise_over(asked_by)
        if not self._channels:
            if self._mappings:
                self.server.spawn(self._end_if_gone(LOOK_SECONDS_MIN))
            else:
                self.end()

    async def _end_if_gone(self, seconds: float) -> None:
        """A process that executes another program closes its channels, and its memory is gone: that is its end here.

        Others can hold that memory for a moment yet (who reads its /proc, for instance), so it is looked again, and ever
        more seldom: the process may as well live and have lost its connections.
        """
        gone = self._space is None or await self._space.gone()
        if self._space is None:
            return
        if gone:
            self.end()
        else:
            look = partial(self._end_if_gone, min(2 * seconds, LOOK_SECONDS_MAX))
            self._next_look = asyncio.get_running_loop().call_later(seconds, lambda: self.server.spawn(look()))

    def end(self) -> None:
        """The process is gone, or has said goodbye."""
        manager = self.server.manager
        if self._next_look is not None:
            self._next_look.cancel()
        records = self.server.machine.records
        with records.together():
            if self.client is not None:
                manager.remove_client(self.client)
                self.client = None
            for asked_by in [one for one in manager.promises if one[0] == self.number]:
                manager.promise_over(asked_by)
            for asked_by in [one for one in manager.answers if one[0] == self.number]:
                manager.answered(asked_by)
            for handle in self._mappings:
                records.drop(("handle", self.number, handle))
            records.drop(("listens", self.number))
            records.drop(("session", self.number))
        self._about_to_map.clear()
        self._mappings.clear()
        for channel in list(self._channels):
            channel.close()
        if self._notices is not None:
            self._notices.close()
        # What refers to itself would stay, with its memory, until the garbage collector comes.
        self._notices = self._control = None
        self._slots.clear()
        if self._space is not None:
            self._space.close()
            self._space = None
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        if self.number:
            self.server.machine.keeping.drop(*(f"{kind}:{self.number}" for kind in KEPT))
        self.server.session_ended(self)

    def tell(self, notice: Notice) -> None:
        """A loss, for those who listen."""
        self._losses += 1
        if self._notices is not None and not self._notices.closed:
            object_ = self.server.manager.find(notice.name)
            records = self.server.machine.records
            with records.together():
                records.put(("listens", self.number), self._losses)
                records.put(("notice", self.number, self._losses), [object_.number, msgspec.to_builtins(notice)])
            self._notices.tell(protocol.Told(self._losses, object_.number, notice))

    # --- what it asks

    async def handle(
        self, request: protocol.Request, fds: list[int], channel: Channel
    ) -> tuple[protocol.Message | None, list[int]]:
        """The reply (None if it has gone another way) and its descriptors, which are the caller's to close; so are those of
        `fds` that are left in it."""
        if not self.number and not isinstance(request, protocol.Hello):
            raise ConnectionError("the first message must be Hello")
        if isinstance(request, (protocol.Hello, protocol.Allocate, protocol.Open)):
            self.server.descriptors.require()
        match request:
            case protocol.Hello():
                return self._hello(request, fds)
            case protocol.AddChannel() | protocol.Listen():
                self._add_channel(request, fds)
                return None, []
            case protocol.CountLosses():
                return protocol.Losses(self._losses), []
            case protocol.Allocate() | protocol.Open() | protocol.Attach():
                return self._found(await self._object(request, fds), channel, request.mapping)
            case protocol.Map():
                return await self._map(request, channel), []
            case protocol.Unmap():
                self._unmap(request.mapping)
            case protocol.Goodbye():
                # The reply goes first; then there is nobody left to reply to.
                asyncio.get_running_loop().call_soon(self.end)
            case protocol.ReportPage():
                if request.report.pfn is not None and not self.server.machine.knows_frames:
                    raise PermissionError("this manager is not root: pass name and offset, or pid and address")
                asked_by = (self.number, request.number) if request.number else None
                return protocol.Handled(await self.server.manager.report(request.report, asked_by)), []
            case protocol.ListObjects():
                return protocol.ObjectList([_information(one) for one in self.server.manager.objects()]), []
            case protocol.GetStatistics():
                return protocol.StatisticsReply(self.server.statistics()), []
            case protocol.Restart():
                if request.life >= self.server.manager.life:
                    await self.server.restart()
            case protocol.SyncLog():
                return protocol.LogPlace(await self.server.sync_log(), self.server.instance), []
            case _:
                return await self._on_mapping(request), []
        return protocol.Done(), []

    async def _on_mapping(
        self,
        request: protocol.Write | protocol.Prefetch | protocol.Repair | protocol.Discard | protocol.Lost | protocol.Met
        | protocol.Flush,
    ) -> protocol.Message:  # fmt: skip
        manager = self.server.manager
        mapping = self._mapping(request.mapping)
        object_ = mapping.object
        match request:
            case protocol.Write():
                await recovery.write(manager, object_, request.offset, request.data)
            case protocol.Prefetch():
                await manager.prefetch(mapping, *object_.pages_of(request.offset, request.nbytes))
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
            await self.server.manager.flush(mapping)
        except UnwrittenError as error:
            return protocol.Flushed(request.errors, protocol.failed(error), unwritten=True)
        except OSError as error:
            self._flush_failed[request.mapping] = protocol.failed(error)
        # Of two flushes at a time, the first one's reply may be the one that nobody has got.
        new = mapping.error_seen != request.errors
        return protocol.Flushed(mapping.error_seen, self._flush_failed.get(request.mapping) if new else None)

    def _hello(self, request: protocol.Hello, fds: list[int]) -> tuple[protocol.Message, list[int]]:
        if request.version != protocol.VERSION:
            raise ConnectionError(
                f"the manager speaks protocol version {protocol.VERSION} and the client {request.version}: "
                "install the same version of hwpoison on both sides"
            )
        if self.number:
            raise ConnectionError("the second Hello of a client")
        if fds:
            features = userfaultfd.features_of(fds[0])
            if not features:
                raise ValueError("the descriptor of Hello is not a userfaultfd; open one and do its handshake first")
            if features & ~(userfaultfd.NEEDED | userfaultfd.Feature.POISON):
                raise ValueError("the userfaultfd was opened for more than this manager serves; leave other features out")
        # Also if what follows fails: what it has made by then must not be made twice.
        self.number = self.server.manager.new_number()
        machine = self.server.machine
        assert self._control is not None
        machine.keeping.keep((f"{CONTROL}:{self.number}", self._control.fileno()))
        with machine.records.together():
            if fds:
                self._attach(fds)
            machine.records.put(("session", self.number), [self.pid, self._maps, False])
        if self.client is not None:
            self._listen()
        return self._welcome_reply()

    def _welcome_reply(self) -> tuple[protocol.Welcome, list[int]]:
        machine = self.server.machine
        fds = [] if self._board is None else [os.dup(self._board.fd)]
        return protocol.Welcome(os.getpid(), machine.page_size, self.server.instance, machine.poison_markers), fds

    def _attach(self, fds: list[int]) -> None:
        manager, machine, number = self.server.manager, self.server.machine, self.number
        pidfd = os.pidfd_open(self.pid)
        self._space = machine.space(fds.pop(0), self.pid, pidfd)
        self._lifeline = fds.pop(0) if fds else -1
        self._board = Board()
        self._maps = True
        machine.keeping.keep(
            (f"{SPACE}:{number}", self._space.fd),
            (f"{PROCESS}:{number}", pidfd),
            (f"{BOARD}:{number}", self._board.fd),
        )
        if self._lifeline >= 0:
            machine.keeping.keep((f"{LIFELINE}:{number}", self._lifeline))
        self.client = manager.add_client(self._space, number)
        self.server.sessions_of[number] = self

    def _listen(self) -> None:
        manager, client = self.server.manager, self.client
        assert client is not None
        assert self._space is not None

        def on_fault(fault: userfaultfd.Fault) -> None:
            manager.fault(client, fault.address, fault.thread, write=fault.write, protected=fault.protected)

        self._space.listen(on_fault, self.end)

    async def _object(self, request: protocol.Allocate | protocol.Open | protocol.Attach, fds: list[int]) -> MemoryObject:
        manager = self.server.manager
        promised = manager.promises.get((self.number, request.mapping)) if request.mapping else None
        if promised is not None:
            # It was made for this very request, by a manager that has died before it could say so.
            return promised
        if not isinstance(request, protocol.Attach) and request.name is not None:
            await manager.settled(request.name)
        if self.client is None:
            # Before it is made: an object that nobody can map would stay for ever.
            raise PermissionError("a client that sent no userfaultfd gets no memory: unregistered mappings read zeros")
        match request:
            case protocol.Allocate():
                return manager.allocate(request.nbytes, request.name)
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
        file = await self.server.machine.open_file(fds.pop(0), request.name)
        try:
            if flags & os.O_APPEND:
                raise ValueError(
                    f"the descriptor of {request.name!r} is open for appending: every write would go to its end"
                )
            if access == os.O_WRONLY or (request.writable and access != os.O_RDWR):
                raise PermissionError(f"the descriptor of {request.name!r} is not open for what the mode asks")
            manager = self.server.manager
            await manager.settled(request.name)
            identity = await manager.version(request.name, file)
            if self.client is None:
                raise ConnectionError("the client is gone")
            return manager.open(request.name, file, identity, request.offset, request.nbytes, writable=request.writable)
        except Exception:
            await file.close()
            raise

    def _found(self, object_: MemoryObject, channel: Channel, mapping: int) -> tuple[protocol.Message, list[int]]:
        """The object, held until the client has mapped it: who gets the memory has given a userfaultfd."""
        manager = self.server.manager
        if not mapping:
            self._unasked -= 1
        asked_by = (self.number, mapping or self._unasked)
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

    async def _map(self, request: protocol.Map, channel: Channel) -> protocol.Message:
        manager = self.server.manager
        promises = self._promises(request, channel)
        asked_by = promises[0] if promises else None
        known = next((one.object for one in self._mappings.values() if one.object.number == request.object), None)
        object_ = manager.promises[asked_by] if asked_by is not None else known
        if object_ is None or self.client is None or self._board is None:
            raise ValueError(f"object {request.object} was not allocated, opened or attached by this client")
        mapping = self._mappings.get(request.mapping)
        if mapping is not None and (mapping.object, mapping.address) == (object_, request.address):
            # Asked again.
            slot = self._slots.get(request.mapping)
            await self._protect(mapping, request)
            return protocol.Mapped(slot.index if slot else -1, mapping.error_seen)
        if mapping is not None:
            raise ValueError(f"the client has a mapping {request.mapping} already; each needs a number of its own")
        assert self._space is not None
        if not self._space.reaches(request.address, object_.pages.count * object_.page_size):
            raise ValueError(f"{object_.name!r} can't be mapped at {request.address:#x}: no process has such addresses")
        slot = self._board.slot() if request.guarded else None
        records = self.server.machine.records
        try:
            with records.together():
                mapping = manager.map(self.client, object_, request.address, slot)
                records.put(("handle", self.number, request.mapping), mapping.number)
                if asked_by is not None:
                    manager.promise_over(asked_by)
        except Exception:
            if slot is not None:
                self._board.free(slot)
            raise
        self._mappings[request.mapping] = mapping
        if slot is not None:
            self._slots[request.mapping] = slot
        if asked_by is not None and asked_by in self._about_to_map.get(channel, ()):
            self._about_to_map[channel].remove(asked_by)
        await self._protect(mapping, request)
        return protocol.Mapped(slot.index if slot else -1, mapping.error_seen)

    def _promises(self, request: protocol.Map, channel: Channel) -> list[AskedBy]:
        """Those of the object that are meant for this mapping, the best first."""
        promises = self.server.manager.promises
        asked_by = (self.number, request.mapping)
        through_channel = [one for one in self._about_to_map.get(channel, ()) if one[1] < 0]
        return [one for one in (asked_by, *through_channel) if one in promises and promises[one].number == request.object]

    async def _protect(self, mapping: Mapping, request: protocol.Map) -> None:
        """The client has done it, but a page that was taken away before the mapping was known can have lost its marker."""
        object_ = mapping.object
        if not object_.tracks_dirt or mapping.hits is not None or self._space is None:
            return
        try:
            await self._space.protect(request.address, object_.pages.count * object_.page_size)
        except OSError:
            if request.mapping in self._mappings:
                self._unmap(request.mapping)
            raise

    def _unmap(self, number: int) -> None:
        if (self.number, number) in self.server.manager.promises:
            # The client was interrupted before it mapped it.
            self.server.manager.promise_over((self.number, number))
            return
        mapping = self._mapping(number)
        del self._mappings[number]
        self._flush_failed.pop(number, None)
        slot = self._slots.pop(number, None)
        if slot is not None and self._board is not None:
            self._board.free(slot)
        records = self.server.machine.records
        with records.together():
            records.drop(("handle", self.number, number))
            self.server.manager.unmap(mapping)

    def _mapping(self, number: int) -> Mapping:
        try:
            return self._mappings[number]
        except KeyError:
            raise ValueError(f"this client has no mapping {number}") from None

    async def _met(self, mapping: Mapping, request: protocol.Met) -> protocol.Message:
        pages, count = await policy.met(mapping, request.since, request.forget)
        return protocol.Ranges(_joined(mapping.object, pages), count)


def _taken_socket(fds: list[int]) -> socket.socket:
    if not fds:
        raise ValueError("the message needs a socket's descriptor")
    try:
        taken = socket.socket(fileno=fds[0])
    except OSError as error:
        raise ValueError(f"the descriptor is not a socket: {error.strerror}") from None
    del fds[0]
    if taken.family != socket.AF_UNIX or taken.type != socket.SOCK_SEQPACKET:
        taken.close()
        raise ValueError("the descriptor is not a SOCK_SEQPACKET socket of AF_UNIX")
    return taken


def _joined(object_: MemoryObject, pages: list[int]) -> list[tuple[int, int]]:
    """(offset, nbytes) of pages, neighbours joined, in the order in which they come."""
    runs: list[list[int]] = []
    for page in pages:
        if runs and runs[-1][0] + runs[-1][1] == page:
            runs[-1][1] += 1
        else:
            runs.append([page, 1])
    return [(object_.range_of(*run).offset, object_.range_of(*run).nbytes) for run in runs]


def _information(object_: MemoryObject) -> protocol.ObjectInfo:
    pages, size = object_.pages, object_.page_size
    return protocol.ObjectInfo(
        name=object_.name,
        kind=object_.kind,
        mode="r+" if object_.writable else "r",
        nbytes=object_.nbytes,
        present=min(pages.present * size, object_.nbytes),
        dirty=sum(count for _, count in pages.runs(DIRTY)) * size,
        lost=sum(one.nbytes for one in object_.lost()),
        mappings=len(object_.mappings),
        pids=sorted({mapping.client.pid for mapping in object_.mappings}),
    )
