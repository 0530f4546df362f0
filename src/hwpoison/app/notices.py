"""How a process is told of losses early: one thread that reads what the manager sends and calls functions."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from hwpoison import protocol
from hwpoison.core.records import Notice

if TYPE_CHECKING:
    from hwpoison.app.connection import Connection
    from hwpoison.app.memory import Memory

log = logging.getLogger("hwpoison")


class Entry:
    """A function, for the losses of one memory after the first `since` that this process has had."""

    __slots__ = ("function", "memory", "since")

    def __init__(self, memory: Memory, function: Callable[[Notice], object], since: int) -> None:
        self.memory = memory
        self.function = function
        self.since = since


class Handle:
    """What `Memory.on_failure` returns: `cancel()` ends the calls."""

    def __init__(self, notices: Notices, entry: Entry) -> None:
        self._notices = notices
        self._entry = entry

    def cancel(self) -> None:
        """Call the function no more."""
        self._notices.remove(self._entry)


class Notices:
    """The functions of one connection, and the thread that calls them, which starts with the first."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        # A signal handler may register a function too.
        self._lock = threading.RLock()
        self._functions: list[Entry] = []
        self._channel: socket.socket | None = None
        connection.on_fork.append(self.begin_again)

    def begin_again(self) -> None:
        """In a forked child: the thread is the parent's. The functions are called here too, for losses of this process."""
        self._lock = threading.RLock()
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
        for entry in self._functions:
            entry.since = 0
        if self._functions:
            self._start()

    def add(self, memory: Memory, function: Callable[[Notice], object]) -> Handle:
        """Call `function` for each loss of `memory` from now on. Raises ConnectionError where nobody would ever call it."""
        # Before the lock: in a forked child it may be held by a thread that only the parent has.
        self._connection.check()
        with self._lock:
            if self._channel is None:
                self._start()
            # What is told meanwhile waits for the lock.
            since = self._connection.request(protocol.CountLosses(), protocol.Losses).count
            entry = Entry(memory, function, since)
            self._functions.append(entry)
        return Handle(self, entry)

    def _start(self) -> None:
        # Known before the thread may have to look for another one.
        channel = self._channel = self._connection.new_channel(protocol.Listen())
        try:
            threading.Thread(target=self._run, args=(channel,), name="hwpoison-notices", daemon=True).start()
        except BaseException:
            self._channel = None
            channel.shutdown(socket.SHUT_RDWR)
            channel.close()
            raise

    def forget(self, memory: Memory) -> None:
        """It is closed: its functions are called no more."""
        with self._lock:
            self._functions = [entry for entry in self._functions if entry.memory is not memory]

    def remove(self, entry: Entry) -> None:
        with self._lock:
            with suppress(ValueError):
                self._functions.remove(entry)

    def _run(self, channel: socket.socket) -> None:
        last = 0
        while True:
            try:
                data, _ = protocol.receive(channel)
            except OSError:
                data = b""
            if not data:
                # It was closed here, or the manager has died.
                again = self._listen_again(channel, last)
                if again is None:
                    return
                channel = again
                continue
            try:
                last = self._deliver(protocol.decode_reply(data), last)
            except Exception:
                log.exception("a notice could not be delivered")

    def _listen_again(self, channel: socket.socket, last: int) -> socket.socket | None:
        """Another channel in place of this one, by which the next manager goes on after notice number `last`."""
        if self._channel is not channel:
            return None
        try:
            again = self._connection.new_channel(protocol.Listen(last))
        except OSError:
            return None
        # In one step with the look whether it is still wanted; `close` may come at any moment.
        with self._lock:
            if self._channel is not channel:
                again.close()
                return None
            self._channel = again
        channel.close()
        return again

    def _deliver(self, message: protocol.Reply, last: int) -> int:
        """Call the functions, if it is news; the number of the last one that was."""
        if not isinstance(message, protocol.Told) or message.number <= last:
            return last
        self._call(message)
        return message.number

    def _call(self, told: protocol.Told) -> None:
        with self._lock:
            functions = [
                entry.function
                for entry in self._functions
                if entry.memory.object_number == told.object and told.number > entry.since
            ]
        for function in functions:
            try:
                function(told.notice)
            except Exception:
                log.exception("on_failure: %r failed", function)

    def close(self) -> None:
        """End the thread, after what it is doing."""
        channel, self._channel = self._channel, None
        if channel is not None:
            with suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)
            channel.close()
