"""The sockets of one client: those on which it asks, and those on which it is told of losses.

A channel is read only while none of its requests is under way, and is never written to if that would have to wait. A
client that does not read loses its channel, or, for losses, is told of them when it does read; nobody else notices.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from hwpoison import protocol
from hwpoison.core.records import Notice
from hwpoison.linux.descriptors import exhausted

if TYPE_CHECKING:
    from hwpoison.service.session import Session

NOTICES_LIMIT = 1000
"""Notices that wait for a client to read them; beyond that those of losses that stand no more are left out."""
NOTICES_AT_ONCE = 100
"""Sent to a client before others have their turn: one that reads as fast as we send must not hold them up."""
log = logging.getLogger("hwpoison")


class Channel:
    """One socket of a client, for requests."""

    def __init__(self, session: Session, connection: socket.socket) -> None:
        self._session = session
        self._connection = connection
        self._busy = False
        connection.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection, self._readable)

    def _readable(self) -> None:
        if self._busy:
            # Rare, so that the ordinary request is spared it: a client that sends more than it reads, or goes meanwhile.
            self._loop.remove_reader(self._connection)
            return
        try:
            data, fds = protocol.receive(self._connection)
        except BlockingIOError:
            return
        except protocol.MalformedError as error:
            self._reply(protocol.failed(error))
            return
        except protocol.NoDescriptorError:
            self._reply(protocol.failed(exhausted()))
            return
        except OSError:
            data, fds = b"", []
        except Exception as error:  # noqa: BLE001
            # A defect of ours must cost this client its channel, not everybody the processor.
            self._session.server.defect("a message", error)
            data, fds = b"", []
        if not data:
            self.close()
            return
        self._busy = True
        self._session.server.spawn(self._answer(data, fds))

    async def _answer(self, data: bytes, fds: list[int]) -> None:
        reply: protocol.Message | None
        reply_fds: list[int] = []
        request: protocol.Request | None = None
        try:
            try:
                request = protocol.decode_request(data)
                reply, reply_fds = await self._session.handle(request, fds, self)
            except Exception as error:
                if not isinstance(error, (OSError, ValueError, MemoryError)):
                    log.exception("a request failed by a defect")
                reply = protocol.failed(error)
            try:
                if reply is not None:
                    self._reply(reply, reply_fds)
            except Exception as error:  # noqa: BLE001
                # What can't be said, by a defect: whoever waits for it is told that much.
                self._session.server.defect(f"the reply to {type(request).__name__}", error)
                self._reply(protocol.failed(error))
        finally:
            for fd in reply_fds:
                os.close(fd)
            for fd in fds:
                self._session.server.spawn(self._session.server.machine.let_go(fd))
        self._busy = False
        if self._connection.fileno() >= 0:
            self._loop.add_reader(self._connection, self._readable)
        self._session.server.request_answered()

    def welcome(self) -> None:
        """The client has it now."""
        self._reply(protocol.Done())

    def _reply(self, reply: protocol.Message, fds: list[int] | None = None) -> None:
        if self._connection.fileno() < 0:
            return
        try:
            protocol.send_reply(self._connection, reply, fds or ())
        except OSError:
            # It is gone, or has sent many requests without reading one reply.
            self.close()

    def close(self) -> None:
        if self._connection.fileno() >= 0:
            self._loop.remove_reader(self._connection)
            self._connection.close()
            self._session.channel_closed(self)


class NoticeChannel:
    """The socket on which a client is told of losses: of each once, in order, however slowly it reads.

    What it has not read waits here. When that is more than `NOTICES_LIMIT`, what `stands` says no to is left out: losses
    that were repaired or discarded before the client read of them, which the event log has. So at most twice as many wait
    as losses stood at one time, and not as many as there were.
    """

    def __init__(self, connection: socket.socket, stands: Callable[[Notice], bool]) -> None:
        self._connection = connection
        self._stands = stands
        connection.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[protocol.Told] = deque()
        self._waiting_limit = NOTICES_LIMIT
        try:
            protocol.send(connection, protocol.Done())
        except OSError:
            self.close()

    def tell(self, told: protocol.Told) -> None:
        """Send it, or keep it until the client reads."""
        if self._connection.fileno() < 0:
            return
        self._waiting.append(told)
        if len(self._waiting) == 1:
            self._send()
        elif len(self._waiting) > self._waiting_limit:
            self._waiting = deque(told for told in self._waiting if self._stands(told.notice))
            # All of them are looked at only when they have doubled.
            self._waiting_limit = max(NOTICES_LIMIT, 2 * len(self._waiting))

    def _send(self) -> None:
        try:
            for _ in range(min(len(self._waiting), NOTICES_AT_ONCE)):
                protocol.send(self._connection, self._waiting[0])
                self._waiting.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if self._waiting:
            self._loop.add_writer(self._connection, self._send)
        else:
            self._loop.remove_writer(self._connection)
            self._waiting_limit = NOTICES_LIMIT

    def close(self) -> None:
        if self._connection.fileno() >= 0:
            self._loop.remove_writer(self._connection)
            self._connection.close()
        self._waiting.clear()
