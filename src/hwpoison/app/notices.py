"""How a process is told of losses early: one thread that reads what the manager sends and calls functions."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from hwpoison import protocol
from hwpoison.core.records import Notice

if TYPE_CHECKING:
    from hwpoison.app.connection import Connection
    from hwpoison.app.memory import Memory

log = logging.getLogger("hwpoison")


class Handle:
    """What `on_failure` returns."""

    def __init__(self, notices: Notices, memory: Memory, function: Callable[[Notice], object]) -> None:
        self._notices = notices
        self._entry = (memory, function)

    def cancel(self) -> None:
        """Call the function no more."""
        self._notices.remove(self._entry)


class Notices:
    """The functions of one connection, and the thread that calls them, which starts with the first."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._functions: list[tuple[Memory, Callable[[Notice], object]]] = []
        self._channel: socket.socket | None = None

    def add(self, memory: Memory, function: Callable[[Notice], object]) -> Handle:
        """Call `function` for each loss of `memory`."""
        with self._lock:
            self._functions.append((memory, function))
            if self._channel is None:
                self._channel = self._connection.new_channel(protocol.Listen())
                threading.Thread(target=self._run, args=(self._channel,), name="hwpoison-notices", daemon=True).start()
        return Handle(self, memory, function)

    def forget(self, memory: Memory) -> None:
        """It is closed: its functions are called no more."""
        with self._lock:
            self._functions = [entry for entry in self._functions if entry[0] is not memory]

    def remove(self, entry: tuple[Memory, Callable[[Notice], object]]) -> None:
        with self._lock:
            if entry in self._functions:
                self._functions.remove(entry)

    def _run(self, channel: socket.socket) -> None:
        while True:
            try:
                data, _ = protocol.receive(channel)
            except OSError:
                return
            if not data:
                return
            try:
                self._deliver(protocol.decode_reply(data))
            except Exception:
                log.exception("a notice could not be delivered")

    def _deliver(self, message: protocol.Reply) -> None:
        if isinstance(message, protocol.Told):
            self._call(message.notice)

    def _call(self, notice: Notice) -> None:
        with self._lock:
            functions = [function for memory, function in self._functions if memory.name == notice.name]
        for function in functions:
            try:
                function(notice)
            except Exception:
                log.exception("on_failure: %r failed", function)

    def close(self) -> None:
        """End the thread, after what it is doing."""
        if self._channel is not None:
            self._channel.shutdown(socket.SHUT_RDWR)
            self._channel.close()
            self._channel = None
