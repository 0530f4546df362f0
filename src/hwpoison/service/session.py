"""One client of the manager: what it asks, what it has, and what it is told. Its sockets are in `service.channel`."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from hwpoison import protocol
from hwpoison.core.journal import of_kind
from hwpoison.core.machine import Key
from hwpoison.core.mappings import Client
from hwpoison.core.objects import MemoryObject
from hwpoison.core.pages import DIRTY
from hwpoison.core.records import Notice
from hwpoison.linux import userfaultfd
from hwpoison.linux.inheritance import BOARD, PROCESS, SPACE, LinuxInheritance
from hwpoison.linux.space import Board, LinuxSpace
from hwpoison.service.channel import Channel, NoticeChannel, taken_socket
from hwpoison.service.memories import Memories

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
        self.invitations: list[int] = [number for (number,) in of_kind(records, "invitation")]  # type: ignore[misc]
        """Of clients that were about to fork."""
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
        self.space: LinuxSpace | None = None
        self.board: Board | None = None
        self.memories = Memories(self)
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
            session._notices.inherit(
                [
                    protocol.Told(told, object_number, msgspec.convert(notice, Notice))
                    for told, (object_number, notice) in left.notices.get(number, {}).items()
                ]
            )
        session._maps = maps
        session._welcomed = session_welcomed
        session._lifeline = inheritance.find(f"{LIFELINE}:{number}")
        return session

    def go_on(self, inheritance: LinuxInheritance, left: Left) -> None:
        """The books are made: serve the client."""
        if self._maps:
            self.client = self.server.manager.client(self.number)
            self.space = inheritance.spaces[self.number]
            self.board = inheritance.board(self.number)
            self.memories.inherit(inheritance, left.handles.get(self.number, {}))
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
        if isinstance(request, protocol.Flush):
            mapping = self.memories.find(request.mapping)
            if mapping is not None:
                # Only now: what has been told is not told again by the next manager.
                self.server.manager.journal.mapping(mapping)
        elif isinstance(request, protocol.ReportPage) and request.number:
            self.server.manager.answered((self.number, request.number))
        elif isinstance(request, protocol.Hello) and self._control is not None and self.number:
            self.server.machine.records.put(("session", self.number), [self.pid, self._maps, True])

    # --- its life

    def _add_channel(self, request: protocol.AddChannel | protocol.Listen | protocol.Invite, fds: list[int]) -> None:
        """It is answered on the new channel: a client that stops waiting leaves no answer for the next one to read."""
        taken = taken_socket(fds)
        try:
            # One that it asks by it has in any case: what is kept in reserve is for that.
            if len(self._channels) > 1 or not isinstance(request, protocol.AddChannel):
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
        if isinstance(request, protocol.Invite):
            self.server.invite(taken, self.memories.objects())
            return
        if self._notices is None or self._notices.closed:
            self._notices = self._notice_channel()
        self.server.machine.records.put(("listens", self.number), self._losses)
        self._notices.begin(taken, request.after, added)

    def _notice_channel(self) -> NoticeChannel:
        records = self.server.machine.records
        return NoticeChannel(self.server.manager.stands, lambda number: records.drop(("notice", self.number, number)))

    def channel_closed(self, channel: Channel) -> None:
        """The last channel's end is the client's, unless its memory lives and still has mappings: those are served."""
        self._channels.discard(channel)
        self.memories.channel_closed(channel)
        if not self._channels:
            if self.memories:
                self.server.spawn(self._end_if_gone(LOOK_SECONDS_MIN))
            else:
                self.end()

    async def _end_if_gone(self, seconds: float) -> None:
        """A process that executes another program closes its channels, and its memory is gone: that is its end here.

        Others can hold that memory for a moment yet (who reads its /proc, for instance), so it is looked again, and ever
        more seldom: the process may as well live and have lost its connections.
        """
        gone = self.space is None or await self.space.gone()
        if self.space is None:
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
            self.memories.end()
            records.drop(("listens", self.number))
            records.drop(("session", self.number))
        for channel in list(self._channels):
            channel.close()
        if self._notices is not None:
            self._notices.close()
        # What refers to itself would stay, with its memory, until the garbage collector comes.
        self._notices = self._control = None
        if self.space is not None:
            self.space.close()
            self.space = None
        if self.board is not None:
            self.board.close()
            self.board = None
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
        if not self.number and not isinstance(request, (protocol.Hello, protocol.Device)):
            raise ConnectionError("the first message must be Hello")
        if isinstance(request, (protocol.Hello, protocol.Allocate, protocol.Open)):
            self.server.descriptors.require()
        match request:
            case protocol.Hello():
                return self._hello(request, fds)
            case protocol.Device():
                self.server.descriptors.require()
                return protocol.Done(), [userfaultfd.open_device()]
            case protocol.AddChannel() | protocol.Listen() | protocol.Invite():
                self._add_channel(request, fds)
                return None, []
            case protocol.Join():
                raise ValueError("Join is for the socket of an Invite")
            case protocol.Standing():
                return protocol.Losses(self._losses, self.memories.standing(request.mapping)), []
            case protocol.Allocate() | protocol.Open() | protocol.Attach():
                return self.memories.found(await self.memories.object(request, fds), channel, request.mapping)
            case protocol.Unlink():
                self.server.manager.unlink(request.name)
            case protocol.Map():
                return await self.memories.map(request, channel), []
            case protocol.Unmap():
                self.memories.unmap(request.mapping)
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
                return await self.memories.ask(request), []
        return protocol.Done(), []

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
        fds = [] if self.board is None else [os.dup(self.board.fd)]
        return protocol.Welcome(
            os.getpid(), machine.page_size, self.server.instance, machine.poison_markers, self.server.policy
        ), fds

    def _attach(self, fds: list[int]) -> None:
        manager, machine, number = self.server.manager, self.server.machine, self.number
        pidfd = os.pidfd_open(self.pid)
        self.space = machine.space(fds.pop(0), self.pid, pidfd)
        self._lifeline = fds.pop(0) if fds else -1
        self.board = Board()
        self._maps = True
        machine.keeping.keep(
            (f"{SPACE}:{number}", self.space.fd),
            (f"{PROCESS}:{number}", pidfd),
            (f"{BOARD}:{number}", self.board.fd),
        )
        if self._lifeline >= 0:
            machine.keeping.keep((f"{LIFELINE}:{number}", self._lifeline))
        self.client = manager.add_client(self.space, number)
        self.server.sessions_of[number] = self

    def _listen(self) -> None:
        manager, client = self.server.manager, self.client
        assert client is not None
        assert self.space is not None

        def on_fault(fault: userfaultfd.Fault) -> None:
            manager.fault(client, fault.address, fault.thread, write=fault.write, protected=fault.protected)

        self.space.listen(on_fault, self.end)


def _information(object_: MemoryObject) -> protocol.ObjectInfo:
    pages, size = object_.pages, object_.page_size
    return protocol.ObjectInfo(
        name=object_.name,
        kind=object_.kind,
        mode="r+" if object_.writable else "r",
        persistent=object_.persistent,
        nbytes=object_.nbytes,
        present=min(pages.present * size, object_.nbytes),
        dirty=sum(count for _, count in pages.runs(DIRTY)) * size,
        lost=sum(one.nbytes for one in object_.lost()),
        mappings=len(object_.mappings),
        pids=sorted({mapping.client.pid for mapping in object_.mappings}),
    )
