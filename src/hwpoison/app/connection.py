"""This process's side of a manager: its userfaultfd, the board of guarded views, and channels for requests.

A request takes a channel that is idle, or opens one more, so no thread waits for another's slow request. Nothing here is
needed to resolve a fault of this process: a thread that sleeps in one holds the GIL.
"""

from __future__ import annotations

import mmap
import os
import socket
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import TypeVar

from hwpoison import protocol
from hwpoison.linux.userfaultfd import NEEDED, NO_FEATURE, Feature, Opened, open_userfaultfd

Reply = TypeVar("Reply", bound=protocol.Message)


class Descriptor:
    """A file descriptor that is closed when nobody uses this object any more, unless it is `kept`: a number alone may be
    anybody's by then. Another thread that closes is no matter to who has taken this."""

    __slots__ = ("_owner", "kept", "number")

    def __init__(self, number: int, *, kept: bool = False) -> None:
        self.number = number
        self.kept = kept
        self._owner = os.getpid()

    def __del__(self, close: Callable[[int], None] = os.close, getpid: Callable[[], int] = os.getpid) -> None:
        # A forked child may have closed it, and have something else by that number.
        if not self.kept and getpid() == self._owner:
            close(self.number)


class Watch(weakref.ref[mmap.mmap]):
    """Sees the end of a mapping. What is done then must be one call into C, which no signal handler can interrupt."""

    __slots__ = ("name", "number")
    __hash__ = object.__hash__
    __eq__ = object.__eq__

    number: int
    name: str


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
        self.descriptor: Descriptor | None = None
        """The userfaultfd, for who uses it in this thread while another may close all this."""
        self._numbers = count(1)
        self._control = channel
        self._idle: deque[socket.socket] = deque()
        self._watched: dict[int, Watch] = {}
        self._unmapped: deque[Watch] = deque()
        self.closed = False
        fds: list[int] = []
        try:
            if maps:
                self.userfaultfd = open_userfaultfd((NEEDED | Feature.POISON) & ~without)
                # Kept until `close`: mappings may outlive all objects of ours, and need it if the manager is killed.
                self.descriptor = Descriptor(self.userfaultfd.fd, kept=True)
                fds = [self.userfaultfd.fd]
            reply, board = self._exchange(channel, protocol.Hello(), fds)
            if isinstance(reply, protocol.Failed):
                raise protocol.error_of(reply)
            assert isinstance(reply, protocol.Welcome)
        except BaseException as error:
            channel.close()
            self._drop_descriptor()
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
            raise ConnectionError(
                "this manager was opened by the parent process: in a forked child connect() again and attach(), or start "
                "workers with the 'spawn' method"
            )

    def request(self, message: protocol.Message, kind: type[Reply]) -> Reply:
        """Send `message` and return its reply."""
        return self.request_fds(message, kind)[0]

    def request_fds(
        self, message: protocol.Message, kind: type[Reply], fds: list[int] | None = None
    ) -> tuple[Reply, list[int]]:
        """As `request`, with descriptors both ways; those that come are the caller's."""
        channel = self.take_channel()
        try:
            reply, reply_fds = self._answer(channel, message, fds)
        except protocol.NoDescriptorError:
            self.give_back(channel)
            raise
        except BaseException:
            # Interrupted between a request and its reply: the next one would get the wrong reply.
            channel.close()
            raise
        self.give_back(channel)
        return self._checked(message, kind, reply), reply_fds

    def ask(
        self, channel: socket.socket, message: protocol.Message, kind: type[Reply], fds: list[int] | None = None
    ) -> tuple[Reply, list[int]]:
        """As `request_fds`, on a channel that the caller has taken and closes if anything goes wrong."""
        reply, reply_fds = self._answer(channel, message, fds)
        return self._checked(message, kind, reply), reply_fds

    def take_channel(self) -> socket.socket:
        """A channel for several requests that belong together. If it is closed, the manager forgets what they began."""
        self.check()
        with suppress(IndexError):
            return self._idle.popleft()
        return self.new_channel(protocol.AddChannel())

    def give_back(self, channel: socket.socket) -> None:
        """All its requests have got their replies."""
        self._idle.append(channel)

    def _answer(
        self, channel: socket.socket, message: protocol.Message, fds: list[int] | None
    ) -> tuple[protocol.Message, list[int]]:
        try:
            self._say_unmapped(channel)
            return self._exchange(channel, message, fds)
        except protocol.NoDescriptorError:
            raise
        except (OSError, EOFError) as error:
            raise self._gone(error) from error

    @staticmethod
    def _checked(message: protocol.Message, kind: type[Reply], reply: protocol.Message) -> Reply:
        if isinstance(reply, protocol.Failed):
            raise protocol.error_of(reply)
        if not isinstance(reply, kind):
            raise ConnectionError(f"the manager answered {type(message).__name__} with {type(reply).__name__}")
        return reply

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

    def new_channel(self, message: protocol.AddChannel | protocol.Listen) -> socket.socket:
        """A new socket pair, of which the manager has the other end. Asked for on the first channel, which is for that.

        The answer comes by the new one, so an interrupt leaves nothing behind that somebody else would read.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            reply = self._welcome(ours, theirs, message)
        except (OSError, EOFError) as error:
            ours.close()
            raise self._gone(error) from error
        except BaseException:
            ours.close()
            raise
        if isinstance(reply, protocol.Failed):
            ours.close()
            raise protocol.error_of(reply)
        return ours

    def _welcome(
        self, ours: socket.socket, theirs: socket.socket, message: protocol.AddChannel | protocol.Listen
    ) -> protocol.Message:
        try:
            with theirs:
                protocol.send(self._control, message, [theirs.fileno()])
            return protocol.receive_reply(ours)[0]
        except (EOFError, BrokenPipeError, ConnectionResetError):
            # It could not take the descriptor, or has closed the connection: it says so where it was asked.
            return protocol.receive_reply(self._control)[0]

    def mapped(self) -> list[str]:
        """The names of memories that are mapped, those too of which nothing is left but views."""
        mappings = [(watch.name, watch()) for watch in list(self._watched.values())]
        return [name for name, mapping in mappings if mapping is not None and not mapping.closed]

    def watch_mapping(self, mapping: mmap.mmap, name: str) -> int:
        """A number for `mapping`, which is about to be made known. When it is gone, the manager is told with the next
        request."""
        watch = Watch(mapping, self._unmapped.append)
        watch.number = next(self._numbers)
        watch.name = name
        self._watched[watch.number] = watch
        return watch.number

    def unmapped(self, number: int) -> None:
        """The mapping is gone; the manager is told with the next request. Twice is as good as once."""
        watch = self._watched.get(number)
        if watch is not None:
            self._unmapped.append(watch)

    def tell_unmapped(self) -> None:
        """Tell it now."""
        channel = self.take_channel()
        try:
            self._say_unmapped(channel)
        except BaseException as error:
            channel.close()
            if isinstance(error, (OSError, EOFError)):
                raise self._gone(error) from error
            raise
        self.give_back(channel)

    def _say_unmapped(self, channel: socket.socket) -> None:
        while True:
            try:
                watch = self._unmapped[0]
            except IndexError:
                return
            self._exchange(channel, protocol.Unmap(watch.number))
            # Only now, for an interrupt's sake. If two threads say it, the second one is wrong, which harms nobody.
            self._watched.pop(watch.number, None)
            with suppress(ValueError):
                self._unmapped.remove(watch)

    def _gone(self, error: BaseException) -> ConnectionError:
        return ConnectionError(f"the manager of {self.socket_name} is gone: {error}")

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
        self._drop_descriptor()

    def _drop_descriptor(self) -> None:
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            descriptor.kept = False
