"""This process's side of a manager: its userfaultfd, the board of guarded views, and channels for requests.

A request takes a channel that is idle, or opens one more, so no thread waits for another's slow request. Nothing here is
needed to resolve a fault of this process: a thread that sleeps in one holds the GIL.
"""

from __future__ import annotations

import logging
import mmap
import os
import select
import socket
import weakref
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from itertools import count
from typing import TypeVar

from hwpoison import protocol
from hwpoison.app.mapping import Watch
from hwpoison.errors import UnsupportedError
from hwpoison.linux.lifeline import Lifeline
from hwpoison.linux.pairs import pair
from hwpoison.linux.userfaultfd import NEEDED, NO_FEATURE, Feature, Opened, open_userfaultfd

log = logging.getLogger("hwpoison")

all_connections: weakref.WeakSet[Connection] = weakref.WeakSet()
"""Of this process."""

JOIN_ATTEMPTS = 10
REFUSALS_MAX = 3
"""So often one manager may close the channel of a request before that counts as its answer."""
REFUSAL_SECONDS = 0.02
"""How long a manager that could not take a channel may need to say so."""

Reply = TypeVar("Reply", bound=protocol.Message)


class Descriptor:
    """A file descriptor that is closed when nobody uses this object any more, unless it is `kept`: a number alone may be
    anybody's by then. Another thread that closes is no matter to who has taken this."""

    __slots__ = ("_owner", "kept", "number")

    def __init__(self, number: int, *, kept: bool = False) -> None:
        self.number = number
        self.kept = [kept]
        """One item: of a connection that is collected with this, only what is not may be looked at."""
        self._owner = os.getpid()

    def inherited(self) -> None:
        """In a forked child, which has a copy."""
        self._owner = os.getpid()

    def __del__(self, close: Callable[[int], None] = os.close, getpid: Callable[[], int] = os.getpid) -> None:
        # A forked child may have closed it, and have something else by that number.
        if not self.kept[0] and getpid() == self._owner:
            close(self.number)


def _forgotten(kept: list[bool]) -> None:
    """Nobody has the connection any more, so nothing is mapped: every mapping keeps its connection."""
    kept[0] = False


class NoWelcomeError(ConnectionError):
    """The manager has closed the connection instead of answering: it has died, and where it serves there is another one."""


class Channel:
    """A socket for requests; another one when the manager has died."""

    __slots__ = ("__weakref__", "socket")

    def __init__(self, socket_: socket.socket) -> None:
        self.socket = socket_

    def close(self) -> None:
        self.socket.close()


_nothing_mapped = mmap.mmap(-1, 1)


def _nothing() -> None:
    pass


def _there(watch: Watch) -> bool:
    mapping = watch()
    return mapping is not None and not mapping.closed


class Connection:
    """Takes over `channel`, the first one. Raises what the manager answers, `UnsupportedError`, ConnectionError.

    With `maps=False` the process can ask but gets no memory, and needs no userfaultfd.
    """

    def __init__(
        self, channel: socket.socket, socket_name: str, *, maps: bool = True, without: Feature = NO_FEATURE
    ) -> None:
        self.owner = os.getpid()
        self.socket_name = socket_name
        self.maps = maps
        self._without = without
        self._refusal: protocol.Failed | None = None
        self.userfaultfd: Opened | None = None
        self.words: memoryview | None = None
        self.descriptor: Descriptor | None = None
        """The userfaultfd, for who uses it in this thread while another may close all this."""
        self._numbers = count(1)
        self._control = channel
        self.life = 1
        """How many managers there were, as far as is known here."""
        self._lifeline: Lifeline | None = None
        self._idle: deque[Channel] = deque()
        self._channels: weakref.WeakSet[Channel] = weakref.WeakSet()
        """Those too that are not idle."""
        self._watched: dict[int, Watch] = {}
        self._unmapped: deque[Watch] = deque()
        self.closed = self.closing = False
        self.lost = ""
        """In a forked child, why it has no connection."""
        self.on_fork: list[Callable[[Collection[int]], None]] = []
        """What is done in a forked child when this is there again; it is told the signals that are blocked afterwards."""
        self.listen: Callable[[], None] = _nothing
        """Have losses read from now on (`app.notices`)."""
        self.when_unmapped: Callable[[], None] | None = None
        """What is done, once the manager was closed, when a mapping is gone."""
        self.welcome, self.pid = self._begin()
        all_connections.add(self)

    def _begin(self) -> tuple[protocol.Welcome, int]:
        """Say hello on the first channel; what the manager says, and its process as far as is known."""
        channel, socket_name = self._control, self.socket_name
        fds: list[int] = []
        try:
            if self.maps:
                self.userfaultfd = self._open_userfaultfd()
                # Kept until `close`: when the interpreter ends, mappings may outlive all objects of ours.
                self.descriptor = Descriptor(self.userfaultfd.fd, kept=True)
                weakref.finalize(self, _forgotten, self.descriptor.kept).atexit = False
                self._lifeline = Lifeline()
                fds = [self.userfaultfd.fd, self._lifeline.other]
            reply, board = self._exchange(channel, protocol.Hello(), fds)
            if isinstance(reply, protocol.Failed):
                raise protocol.error_of(reply)
            assert isinstance(reply, protocol.Welcome)
            if self._lifeline is not None:
                self._lifeline.given()
        except BaseException as error:
            channel.close()
            self._drop_descriptor()
            if self._lifeline is not None:
                self._lifeline.close()
            if isinstance(error, (EOFError, ConnectionResetError, BrokenPipeError)):
                if self._refusal is not None:
                    raise protocol.error_of(self._refusal) from None
                raise NoWelcomeError(f"no manager answers at {socket_name}: {error}") from error
            raise
        if board:
            self.words = memoryview(mmap.mmap(board[0], 0)).cast("Q")
            board.close()
        return reply, reply.pid

    def _open_userfaultfd(self) -> Opened:
        """One without limits if this process may, or by what the manager may."""
        wanted = (NEEDED | Feature.POISON) & ~self._without
        opened = refused = None
        try:
            opened = open_userfaultfd(wanted)
        except UnsupportedError as error:
            # By a seccomp filter, say. What the manager passes needs no system call of its own.
            refused = error
        if opened is None or opened.user_mode:
            reply, fds = self._exchange(self._control, protocol.Device())
            if isinstance(reply, protocol.Failed) and not reply.errno:
                # Not that the device can't be opened: it does not serve this user, and hangs up.
                self._refusal = reply
            try:
                if isinstance(reply, protocol.Done) and fds:
                    full = open_userfaultfd(wanted, fds[0])
                    if opened is not None:
                        os.close(opened.fd)
                    opened = full
            except OSError:
                pass  # It is no device that this kernel knows. What there is works too, within limits.
            finally:
                fds.close()
        if opened is None:
            assert refused is not None
            raise refused
        return opened

    # --- in a forked child

    def invite(self) -> socket.socket:
        """For a child that is about to be forked: it holds what is mapped here until the child has closed it."""
        return self.new_channel(protocol.Invite())

    def begin_again(self, invitation: socket.socket | None) -> None:
        """In a forked child: a connection of its own. All numbers of mappings stay what they are.

        Raises OSError. The parent's descriptors are closed in any case.
        """
        # A copy that stays open would keep from the manager that the parent has closed one.
        inherited = [self._control, *(one.socket for one in list(self._channels))]
        if self._lifeline is not None:
            self._lifeline.forget()
        if self.descriptor is not None:
            os.close(self.descriptor.number)
            self.descriptor = None
        self._idle.clear()
        self._unmapped.clear()
        self.words = None
        self.lost = "the way to it could not be made anew"
        try:
            self.welcome, self.pid = self._joined(invitation)
        finally:
            for one in inherited:
                one.close()
        self._watched = {number: watch for number, watch in self._watched.items() if _there(watch)}
        self.owner = os.getpid()
        self._arm()

    def begun_again(self, blocked: Collection[int]) -> None:
        """Everything else of this process is there too."""
        for function in self.on_fork:
            try:
                function(blocked)
            except (OSError, RuntimeError) as error:
                # There can be no other thread, say.
                log.error("in the forked child %d nobody is told of losses: %s", os.getpid(), error)

    def _joined(self, invitation: socket.socket | None) -> tuple[protocol.Welcome, int]:
        """As `_begin`, as another client. The manager can die meanwhile, and the invitation with it; the next one gives
        another."""
        inherited = self._control
        for attempts_left in reversed(range(JOIN_ATTEMPTS)):
            ours, theirs = pair()
            self._control = inherited
            try:
                with theirs:
                    # One that the manager has given before it died is good for the next one too.
                    invitation = invitation or self.invite()
                    protocol.send(invitation, protocol.Join(), [theirs.fileno()])
                self._control = ours
                return self._begin()
            except NoWelcomeError:
                ours.close()
                if not attempts_left:
                    raise
            except OSError:
                ours.close()
                if not attempts_left:
                    raise
                invitation = None
        raise AssertionError("the last attempt has raised")

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
                f"this manager was opened by the parent process, and {self.lost or 'C code has forked this one'}: connect() "
                "again and attach()"
            )

    def request(self, message: protocol.Message, kind: type[Reply]) -> Reply:
        """Send `message` and return its reply."""
        return self.request_fds(message, kind)[0]

    def request_fds(
        self, message: protocol.Message, kind: type[Reply], fds: list[int] | None = None
    ) -> tuple[Reply, protocol.Descriptors]:
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
        self, channel: Channel, message: protocol.Message, kind: type[Reply], fds: list[int] | None = None
    ) -> tuple[Reply, protocol.Descriptors]:
        """As `request_fds`, on a channel that the caller has taken and closes if anything goes wrong."""
        reply, reply_fds = self._answer(channel, message, fds)
        return self._checked(message, kind, reply), reply_fds

    def take_channel(self) -> Channel:
        """A channel for several requests that belong together. If it is closed, the manager forgets what they began."""
        self.check()
        with suppress(IndexError):
            return self._idle.popleft()
        channel = Channel(self.new_channel(protocol.AddChannel()))
        self._channels.add(channel)
        return channel

    def give_back(self, channel: Channel) -> None:
        """All its requests have got their replies."""
        self._idle.append(channel)
        if self.closed:
            # Meanwhile, by another thread, which could not know of this one.
            self._close_idle()

    def _answer(
        self, channel: Channel, message: protocol.Message, fds: list[int] | None
    ) -> tuple[protocol.Message, protocol.Descriptors]:
        self._say_unmapped(channel)
        return self._exchange_again(channel, message, fds)

    def _exchange_again(
        self, channel: Channel, message: protocol.Message, fds: list[int] | None = None
    ) -> tuple[protocol.Message, protocol.Descriptors]:
        """The reply: of the next manager, on another channel, if this one dies. Raises ConnectionError if there is none."""
        refused, life = 0, self.life
        while True:
            try:
                return self._exchange(channel.socket, message, fds)
            except protocol.NoDescriptorError:
                raise
            except (OSError, EOFError) as error:
                # The manager has died, or has had enough of this channel.
                channel.close()
                channel.socket = self.new_channel(protocol.AddChannel())
                refused = refused + 1 if life == self.life else 0
                life = self.life
                if refused > REFUSALS_MAX:
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
    ) -> tuple[protocol.Message, protocol.Descriptors]:
        try:
            protocol.send(channel, message, fds or ())
            return protocol.receive_reply(channel)
        except (BrokenPipeError, ConnectionResetError):
            # It has closed the channel without reading this; what it said before can be read now.
            return protocol.receive_reply(channel)

    def new_channel(self, message: protocol.AddChannel | protocol.Listen | protocol.Invite) -> socket.socket:
        """A new socket pair, of which the manager has the other end. Asked for on the first channel, which is for that, and
        which outlives the manager.

        The answer comes by the new one, so an interrupt leaves nothing behind that somebody else would read.
        """
        while True:
            ours, theirs = pair()
            try:
                with theirs:
                    protocol.send(self._control, message, [theirs.fileno()])
                reply = self._welcome(ours)
            except (OSError, EOFError) as error:
                ours.close()
                raise self._gone(error) from error
            except BaseException:
                ours.close()
                raise
            if isinstance(reply, protocol.Added):
                self.life, self.pid = reply.life, reply.pid
                return ours
            ours.close()
            if reply is not None:
                raise protocol.error_of(reply)

    def _welcome(self, ours: socket.socket) -> protocol.Added | protocol.Failed | None:
        """What the manager says to a new channel. None if it has died meanwhile: then the next one is to be asked."""
        with suppress(EOFError, ConnectionResetError):
            reply, _ = protocol.receive_reply(ours)
            assert isinstance(reply, (protocol.Added, protocol.Failed))
            return reply
        # It is dead, or could not take the descriptor: then it says so where it was asked.
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        while poll.poll(REFUSAL_SECONDS * 1000):
            said, fds = protocol.receive_reply(self._control)
            fds.close()
            if isinstance(said, protocol.Failed):
                return said
        return None

    def mapped(self) -> list[str]:
        """The names of memories that are mapped, those too of which nothing is left but views."""
        mappings = [(watch.name, watch()) for watch in list(self._watched.values())]
        return [name for name, mapping in mappings if mapping is not None and not mapping.closed]

    def watch_mapping(self, mapping: mmap.mmap, name: str, number: int) -> None:
        """`mapping` is about to be made known by that number. When it is gone, the manager is told with the next request."""
        watch = Watch(mapping, self._unmapped.append)
        watch.number, watch.name = number, name
        self._watched[number] = watch
        self._arm()

    def _arm(self) -> None:
        """While something is mapped, the end of whoever could serve it is this process's."""
        lifeline = self._lifeline
        if lifeline is not None:
            with lifeline.lock:
                if self.mapped():
                    lifeline.arm()
                else:
                    lifeline.disarm()

    def new_number(self) -> int:
        """For a mapping that is to be made, or a report."""
        return next(self._numbers)

    def mapping_gone(self) -> None:
        """Nobody has it any more, nor a view of it: tell the manager. It would hear of it with the next request too."""
        if self.closed or os.getpid() != self.owner:
            return
        with suppress(OSError):
            self.tell_unmapped()
        if self.when_unmapped is not None:
            self.when_unmapped()

    def not_mapped(self, number: int) -> None:
        """The mapping of that number will not be made: the manager is told with the next request."""
        watch = Watch(_nothing_mapped)
        watch.number, watch.name = number, ""
        self._unmapped.append(watch)

    def not_there(self, number: int) -> None:
        """In a forked child: the manager does not know of it."""
        self._watched.pop(number, None)

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
        except BaseException:
            channel.close()
            raise
        self.give_back(channel)

    def _say_unmapped(self, channel: Channel) -> None:
        while True:
            try:
                watch = self._unmapped[0]
            except IndexError:
                return
            # Before it is said: a manager that only waits for this ends when it hears it.
            self._arm()
            self._exchange_again(channel, protocol.Unmap(watch.number))
            # Only now, for an interrupt's sake. If two threads say it, the second one is wrong, which harms nobody.
            self._watched.pop(watch.number, None)
            with suppress(ValueError):
                self._unmapped.remove(watch)

    def _gone(self, error: BaseException) -> ConnectionError:
        return ConnectionError(f"the manager of {self.socket_name} is gone: {error}")

    def abandon(self) -> None:
        """Close the channels; mappings are served on. For a process that ends."""
        if self._lifeline is not None:
            self._lifeline.close()
        self._control.close()
        for channel in self._idle:
            channel.close()

    def close(self) -> None:
        """Say goodbye. All mappings must be gone."""
        if self.closed:
            return
        self.closing = True
        if self._lifeline is not None:
            self._lifeline.close()
        with suppress(OSError):
            self.request(protocol.Goodbye(), protocol.Done)
        self.closed = True
        self._control.close()
        self._close_idle()
        self._drop_descriptor()

    def _close_idle(self) -> None:
        with suppress(IndexError):
            while True:
                self._idle.popleft().close()

    def _drop_descriptor(self) -> None:
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            descriptor.kept[0] = False
