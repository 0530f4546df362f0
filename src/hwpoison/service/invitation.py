"""What a client that is about to fork holds for its child.

The parent may end at once, and be the last that had the objects. So each is held from before the fork until the child has
mapped it, or has said that it will not, by closing its end.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING

from hwpoison import protocol
from hwpoison.service.channel import taken_socket

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hwpoison.core.objects import MemoryObject
    from hwpoison.service.server import Server


class Invitation:
    """The socket at whose other end the child is, or nobody yet."""

    def __init__(self, server: Server, connection: socket.socket, objects: Iterable[MemoryObject]) -> None:
        self._server = server
        self._connection = connection
        # One of its own, as a client's: it outlives the parent.
        self._number = server.manager.new_number()
        for one, object_ in enumerate(objects):
            server.manager.promise(object_, (self._number, one))
        connection.setblocking(False)
        asyncio.get_running_loop().add_reader(connection, self._readable)
        protocol.send(connection, protocol.Added(server.manager.life, os.getpid()))

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
        manager = self._server.manager
        for asked_by in [one for one in manager.promises if one[0] == self._number]:
            manager.promise_over(asked_by)
        self._server.invitation_over(self)
