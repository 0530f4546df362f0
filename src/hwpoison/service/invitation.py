"""What a client that is about to fork holds for its child.

The parent may end at once, and be the last that had the objects. So each is held from before the fork until the child has
mapped it, or has said that it will not, by closing its end.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from hwpoison import protocol
from hwpoison.service.channel import taken_socket

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hwpoison.core.objects import MemoryObject
    from hwpoison.service.server import Server


INVITATION = "invitation"
"""What the keeper holds its socket under, with its number; and the record that there is one."""


class Invitation:
    """The socket at whose other end the child is, or nobody yet. It has a number of its own, as it outlives the parent."""

    def __init__(self, server: Server, connection: socket.socket, number: int) -> None:
        self._server = server
        self._connection = connection
        self._number = number
        connection.setblocking(False)
        asyncio.get_running_loop().add_reader(connection, self._readable)

    @classmethod
    def new(cls, server: Server, connection: socket.socket, objects: Iterable[MemoryObject]) -> Invitation:
        """For a client that maps these objects. If it is gone by now, this ends at once."""
        number = server.manager.new_number()
        server.machine.keeping.keep((f"{INVITATION}:{number}", connection.fileno()))
        with server.machine.records.together():
            server.machine.records.put((INVITATION, number), True)
            for one, object_ in enumerate(objects):
                server.manager.promise(object_, (number, one))
        invitation = cls(server, connection, number)
        invitation._say_added()
        return invitation

    @classmethod
    def inherited(cls, server: Server, fd: int, number: int) -> Invitation:
        """Of a manager before this one, which may have died before it said so. Its promises are in the books."""
        invitation = cls(server, socket.socket(fileno=fd), number)
        invitation._say_added()
        return invitation

    def _say_added(self) -> None:
        """Who is told twice has stopped listening, and does not notice."""
        with suppress(OSError):
            protocol.send(self._connection, protocol.Added(self._server.manager.life, os.getpid()))

    def _readable(self) -> None:
        try:
            data, fds = protocol.receive(self._connection)
        except BlockingIOError:
            return
        except (OSError, protocol.MalformedError):
            data, fds = b"", []
        try:
            if data and isinstance(protocol.decode_request(data), protocol.Join):
                self._server.admit(taken_socket(fds))
                return
        except (OSError, ValueError):
            pass  # It is no child of ours.
        finally:
            for fd in fds:
                os.close(fd)
        self.close()

    def close(self) -> None:
        """What it has held is let go."""
        if self._connection.fileno() < 0:
            return
        asyncio.get_running_loop().remove_reader(self._connection)
        self._connection.close()
        manager, machine = self._server.manager, self._server.machine
        with machine.records.together():
            for asked_by in [one for one in manager.promises if one[0] == self._number]:
                manager.promise_over(asked_by)
            machine.records.drop((INVITATION, self._number))
        machine.keeping.drop(f"{INVITATION}:{self._number}")
        self._server.invitation_over(self)
