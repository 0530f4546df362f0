"""This process's side of a manager: its userfaultfd, the board of guarded views, and channels for requests.

A request takes a channel that is idle, or opens one more, so no thread waits for another's slow request. Nothing here is
needed to resolve a fault of this process: a thread that sleeps in one holds the GIL.
"""

from __future__ import annotations

import mmap
import os
import socket
import threading
import weakref
from collections import deque
from contextlib import suppress
from typing import TypeVar

from hwpoison import protocol
from hwpoison.linux.userfaultfd import NEEDED, NO_FEATURE, Feature, Opened, open_userfaultfd

Reply = TypeVar("Reply", bound=protocol.Message)


class Connection:
    """Takes over `channel`, the first one. Raises what the manager answers, `UnsupportedError`, ConnectionError.

    With `maps=False` the process can ask but gets no memory, and needs no userfaultfd.
    """

    def __init__(
        self, channel: socket.socket, socket_name: str, *, maps: bool = True, without: Feature = NO_FEATURE
    ) -> None:
        self.owner = os.getpid()
        self.socket_name = socket_name
        self.userfaultfd: Opened | None = None
        self.words: memoryview | None = None
        self._control = channel
        self._control_lock = threading.Lock()
        self._idle: deque[socket.socket] = deque()
        self._unmapped: deque[int] = deque()
        self.closed = False
        fds: list[int] = []
        try:
            if maps:
                self.userfaultfd = open_userfaultfd((NEEDED | Feature.POISON) & ~without)
                fds = [self.userfaultfd.fd]
            reply, board = self._exchange(channel, protocol.Hello(), fds)
            if isinstance(reply, protocol.Failed):
                raise protocol.error_of(reply)
            assert isinstance(reply, protocol.Welcome)
        except BaseException as error:
            channel.close()
            if self.userfaultfd is not None:
                os.close(self.userfaultfd.fd)
            if isinstance(error, EOFError):
                raise ConnectionError(f"no manager answers at {socket_name}: {error}") from error
            raise
        self.welcome = reply
        if board:
            self.words = memoryview(mmap.mmap(board[0], 0)).cast("Q")
            os.close(board[0])

    @property
    def user_mode(self) -> bool:
        """True if faults inside system calls are not served here, but fail with EFAULT."""
        return self.userfaultfd is not None and self.userfaultfd.user_mode

    def check(self) -> None:
        """Raises ConnectionError if nothing can be asked here any more."""
        if self.closed:
            raise ConnectionError("the manager was closed; open a new one with Manager() or connect()")
        if os.getpid() != self.owner:
            raise ConnectionError("this manager was opened by the parent process; connect() to it again after fork()")

    def request(self, message: protocol.Message, kind: type[Reply]) -> Reply:
        """Send `message` and return its reply."""
        return self.request_fds(message, kind)[0]

    def request_fds(
        self, message: protocol.Message, kind: type[Reply], fds: list[int] | None = None
    ) -> tuple[Reply, list[int]]:
        """As `request`, with descriptors both ways; those that come are the caller's."""
        self.check()
        channel = self._channel()
        try:
            while self._unmapped:
                self._exchange(channel, protocol.Unmap(self._unmapped.popleft()))
            reply, reply_fds = self._exchange(channel, message, fds)
        except protocol.NoDescriptorError:
            self._idle.append(channel)
            raise
        except (OSError, EOFError) as error:
            channel.close()
            raise ConnectionError(f"the manager of {self.socket_name} is gone: {error}") from error
        except BaseException:
            # Interrupted between a request and its reply: the next one would get the wrong reply.
            channel.close()
            raise
        self._idle.append(channel)
        if isinstance(reply, protocol.Failed):
            raise protocol.error_of(reply)
        if not isinstance(reply, kind):
            raise ConnectionError(f"the manager answered {type(message).__name__} with {type(reply).__name__}")
        return reply, reply_fds

    @staticmethod
    def _exchange(
        channel: socket.socket, message: protocol.Message, fds: list[int] | None = None
    ) -> tuple[protocol.Message, list[int]]:
        try:
            protocol.send(channel, message, fds or ())
            return protocol.receive_reply(channel)
        except (BrokenPipeError, ConnectionResetError):
            # It has closed the channel without reading this; what it said before can be read now.
            return protocol.receive_reply(channel)

    def _channel(self) -> socket.socket:
        with suppress(IndexError):
            return self._idle.popleft()
        return self.new_channel(protocol.AddChannel())

    def new_channel(self, message: protocol.AddChannel | protocol.Listen) -> socket.socket:
        """A new socket pair, of which the manager has the other end. Asked for on the first channel, which is for that."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs, self._control_lock:
                reply, _ = self._exchange(self._control, message, [theirs.fileno()])
        except (OSError, EOFError) as error:
            ours.close()
            raise ConnectionError(f"the manager of {self.socket_name} is gone: {error}") from error
        if isinstance(reply, protocol.Failed):
            ours.close()
            raise protocol.error_of(reply)
        return ours

    def watch_mapping(self, mapping: mmap.mmap, number: int) -> None:
        """When `mapping` is gone, the manager is told with the next request."""
        weakref.finalize(mapping, self._unmapped.append, number).atexit = False

    def abandon(self) -> None:
        """Close the channels; mappings are served on. For a process that ends."""
        for channel in (self._control, *self._idle):
            channel.close()

    def close(self) -> None:
        """Say goodbye. All mappings must be gone."""
        if self.closed:
            return
        with suppress(OSError):
            self.request(protocol.Goodbye(), protocol.Done)
        self.closed = True
        for channel in (self._control, *self._idle):
            channel.close()
        if self.userfaultfd is not None:
            os.close(self.userfaultfd.fd)
