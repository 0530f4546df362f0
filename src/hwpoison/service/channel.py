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

    def listen(self) -> None:
        """From now on what the client says is read."""
        self._loop.add_reader(self._connection, self._readable)

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
                    self._session.replied(request)
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

    def fileno(self) -> int:
        return self._connection.fileno()

    def say(self, message: protocol.Message, fds: list[int] | None = None) -> None:
        """What nobody has asked for here."""
        self._reply(message, fds)

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
    """The socket on which a client is told of losses: of each once, in order, however slowly it reads. What is sent it has:
    if the manager dies then, the socket still holds it.

    What it has not read waits here. When that is more than `NOTICES_LIMIT`, what `stands` says no to is left out: losses
    that were repaired or discarded before the client read of them, which the event log has. So at most twice as many wait
    as losses stood at one time, and not as many as there were. `over` is called with the number of each that does not wait
    any more. Before `begin`, for a client that has not come back since the last manager died, all waits.
    """

    def __init__(self, stands: Callable[[Notice], bool], over: Callable[[int], None]) -> None:
        self._connection: socket.socket | None = None
        self._stands = stands
        self._over = over
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[protocol.Told] = deque()
        self._waiting_limit = NOTICES_LIMIT
        self._soon = False

    def tell(self, told: protocol.Told) -> None:
        """Send it, or keep it until the client reads."""
        self._waiting.append(told)
        if len(self._waiting) > self._waiting_limit:
            for one in [one for one in self._waiting if not self._stands(one.notice)]:
                self._waiting.remove(one)
                self._over(one.number)
            # All of them are looked at only when they have doubled.
            self._waiting_limit = max(NOTICES_LIMIT, 2 * len(self._waiting))
        if not self._soon:
            # Not before what is being done has been written down.
            self._soon = True
            self._loop.call_soon(self._send)

    def inherit(self, told: list[protocol.Told]) -> None:
        """What a manager before this one has not told. There are no books yet to look which of it stands."""
        self._waiting.extend(told)
        self._waiting_limit = max(NOTICES_LIMIT, 2 * len(self._waiting))

    def begin(self, connection: socket.socket, after: int, welcome: protocol.Message) -> None:
        """The client listens, and has been told of those up to number `after`."""
        self._hang_up()
        self._connection = connection
        connection.setblocking(False)
        while self._waiting and self._waiting[0].number <= after:
            self._over(self._waiting.popleft().number)
        try:
            protocol.send(connection, welcome)
        except OSError:
            self.close()
            return
        self._send()

    def _send(self) -> None:
        self._soon = False
        connection = self._connection
        if connection is None or not self._waiting:
            return
        try:
            for _ in range(min(len(self._waiting), NOTICES_AT_ONCE)):
                protocol.send(connection, self._waiting[0])
                self._over(self._waiting.popleft().number)
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if self._waiting:
            self._loop.add_writer(connection, self._send)
        else:
            self._loop.remove_writer(connection)
            self._waiting_limit = NOTICES_LIMIT

    @property
    def closed(self) -> bool:
        """True if the client does not listen any more."""
        return self._connection is not None and self._connection.fileno() < 0

    def _hang_up(self) -> None:
        if self._connection is not None and self._connection.fileno() >= 0:
            self._loop.remove_writer(self._connection)
            self._connection.close()

    def close(self) -> None:
        self._hang_up()
        while self._waiting:
            self._over(self._waiting.popleft().number)


def taken_socket(fds: list[int]) -> socket.socket:
    """The one that a message brings; it is taken out of `fds`. Raises ValueError."""
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
