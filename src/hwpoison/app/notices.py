"""How a process is told of losses early: one thread that reads what the manager sends, and gives it to whoever wants it.

Who wants it: functions (`on_failure`), streams that are read (`notices`), and, where nobody does and the policy is early,
the process itself, by a SIGBUS as the kernel's prctl(PR_MCE_KILL) would have it sent.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
from abc import ABC
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, fields
from types import TracebackType
from typing import TYPE_CHECKING, Self

from hwpoison import protocol
from hwpoison.app.mapping import all_mapped
from hwpoison.core import records
from hwpoison.core.records import Policy
from hwpoison.linux import early
from hwpoison.plain import notices as plain

if TYPE_CHECKING:
    from hwpoison.app.connection import Connection
    from hwpoison.app.memory import Memory

log = logging.getLogger("hwpoison")

AGAIN_SECONDS = 0.1
"""Between two attempts to listen to the next manager, while the system refuses what that needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice(records.Notice):
    """What an owner is told of a loss.

    `name` of the object, `offset` and `nbytes` (bytes of it that are lost), `state` that the page was in, the `outcome`, the
    `source` that found it, the `time` in seconds since the epoch, the `event_id` of the failure in the event log, and a
    `reason` where there is more to say. `memory`: the one that it was asked of; of a manager's notices one that is open, or
    None if there are only views left.
    """

    memory: Memory | None


_FIELDS = [one.name for one in fields(records.Notice)]
Deliver = Callable[[Notice], object]


class Entry:
    """Who wants the losses of one memory, or of all: those that stand, and then those after the first `since` that this
    process has had."""

    __slots__ = ("before", "deliver", "end", "memory", "since", "told")

    def __init__(self, memory: Memory | None, deliver: Deliver, end: Callable[[], None] | None) -> None:
        self.memory = memory
        self.deliver = deliver
        self.end = end
        """Called when nothing more will come."""
        self.since = 0
        self.before: list[protocol.Told] = []
        self.told: dict[tuple[int, int], str] = {}
        """The last loss that was delivered of each page, by object and offset: a forked child has them from its parent."""


class Handle(ABC):  # noqa: B024  (plain ones are registered)
    """What `Memory.on_failure` returns: `cancel()` ends the calls. Calling it calls the function."""

    def __init__(self, notices: Notices, entry: Entry) -> None:
        self._notices = notices
        self._entry = entry

    def cancel(self) -> None:
        """Call the function no more."""
        self._notices.remove(self._entry)

    def __call__(self, notice: Notice) -> object:
        return self._entry.deliver(notice)


class Notices:
    """Those of one connection, and the thread that reads them, which starts with the first who wants them."""

    def __init__(self, connection: Connection, find: Callable[[int], Memory | None]) -> None:
        self._connection = connection
        self._find = find
        """An open memory, by its object's number."""
        # A signal handler may register a function too.
        self._lock = threading.RLock()
        self._entries: list[Entry] = []
        self._channel: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._wake = -1
        """An eventfd: somebody has come who must be told of what was before."""
        connection.on_fork.append(self.begin_again)
        connection.listen = self.listen

    def begin_again(self, blocked: Collection[int]) -> None:
        """In a forked child: the thread is the parent's. Who wants them is told of losses of this process, and of those that
        stand and that the parent's thread had not begun to tell of. `blocked`: signals that are when this is over."""
        self._lock = threading.RLock()
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
            os.close(self._wake)
        for entry in self._entries:
            queue = getattr(entry.deliver, "__self__", None)
            if isinstance(queue, _Queue):
                queue.inherited()
        if channel is None:
            return
        self._start(blocked)
        with self._lock:
            for entry in self._entries:
                entry.since, entry.before = 0, []
                try:
                    self._ask_for_those_that_stand(entry)
                except (OSError, ValueError) as error:
                    # Of one that is not there in this process, for instance.
                    log.debug("losses from before the fork are not told: %s", error)

    def add(self, memory: Memory | None, deliver: Deliver, end: Callable[[], None] | None = None) -> Entry:
        """Deliver each loss of `memory` (None: of all) that stands, and then each from now on. Raises ConnectionError where
        nobody would ever do it."""
        # Before the lock: in a forked child it may be held by a thread that only the parent has.
        self._connection.check()
        entry = Entry(memory, deliver, end)
        with self._lock:
            self.listen()
            # What is told meanwhile waits for the lock.
            self._ask_for_those_that_stand(entry)
            self._entries.append(entry)
        return entry

    def _ask_for_those_that_stand(self, entry: Entry) -> None:
        request = protocol.Standing(0 if entry.memory is None else entry.memory._number)
        reply = self._connection.request(request, protocol.Losses)
        new = [one for one in reply.standing if entry.told.get((one.object, one.notice.offset)) != one.notice.event_id]
        entry.since, entry.before = reply.count, new
        if new and self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def listen(self) -> None:
        """From now on losses are read."""
        with self._lock:
            if self._channel is None:
                self._start()

    def _start(self, blocked: Collection[int] | None = None) -> None:
        # Known before the thread may have to look for another one.
        channel = self._channel = self._connection.new_channel(protocol.Listen())
        wake = -1
        try:
            wake = self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            arguments = (channel, wake, blocked)
            self._thread = threading.Thread(target=self._run, args=arguments, name="hwpoison-notices", daemon=True)
            self._thread.start()
        except BaseException:
            if self._thread is not None and self._thread.ident is not None:
                # A signal handler has raised when it ran already.
                raise
            self._channel = None
            channel.shutdown(socket.SHUT_RDWR)
            channel.close()
            if wake >= 0:
                os.close(wake)
            raise

    def forget(self, memory: Memory) -> None:
        """It is closed: nothing more comes of it."""
        with self._lock:
            over = [entry for entry in self._entries if entry.memory is memory]
            self._entries = [entry for entry in self._entries if entry.memory is not memory]
        for entry in over:
            if entry.end is not None:
                entry.end()

    def remove(self, entry: Entry) -> None:
        with self._lock:
            with suppress(ValueError):
                self._entries.remove(entry)

    # --- the thread

    def _run(self, channel: socket.socket, wake: int, blocked: Collection[int] | None) -> None:
        if blocked is not None:
            # It was started where all are.
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        last, listening = 0, True
        poll = select.poll()
        try:
            poll.register(wake, select.POLLIN)
            poll.register(channel, select.POLLIN)
        except ValueError:
            # A signal handler has raised while it was started: whoever comes next starts another one.
            return
        while True:
            ready = [fd for fd, _ in poll.poll(None if listening else AGAIN_SECONDS * 1000)]
            if wake in ready:
                with suppress(BlockingIOError):
                    os.eventfd_read(wake)
                self._tell_of_before()
            if self._thread is not threading.current_thread():
                # A function has forked and come back, in the child: that has a thread of its own for this.
                return
            if ready == [wake]:
                continue
            data = b""
            if listening:
                with suppress(OSError):
                    data, _ = protocol.receive(channel)
            if data:
                try:
                    last = self._news(protocol.decode_reply(data), last)
                except Exception:
                    log.exception("a notice could not be delivered")
                if self._thread is not threading.current_thread():
                    return
                continue
            # It was closed here, or the manager has died.
            if listening:
                listening = False
                with suppress(KeyError, ValueError):
                    poll.unregister(channel)
            try:
                again = self._listen_again(channel, last)
            except ConnectionError:
                again = None
            except OSError as error:
                # This process, or the manager, is short of descriptors, say.
                log.debug("notices wait: %s", error)
                continue
            if again is None:
                self._let_go(channel, wake)
                return
            channel, listening = again, True
            poll.register(channel, select.POLLIN)

    def _let_go(self, channel: socket.socket, wake: int) -> None:
        with self._lock:
            if self._wake == wake:
                self._wake = -1
            gone = self._channel is channel
        os.close(wake)
        if gone:
            # There is no manager any more: nobody waits for what can't come.
            self.close()

    def _listen_again(self, channel: socket.socket, last: int) -> socket.socket | None:
        """Another channel in place of this one, by which the next manager goes on after notice number `last`; None if nobody
        wants one. Raises ConnectionError if there is no manager, and OSError."""
        if self._channel is not channel:
            return None
        again = self._connection.new_channel(protocol.Listen(last))
        # In one step with the look whether it is still wanted; `close` may come at any moment.
        with self._lock:
            if self._channel is not channel:
                again.close()
                return None
            self._channel = again
        channel.close()
        return again

    def _news(self, message: protocol.Reply, last: int) -> int:
        """Deliver it, if it is news; the number of the last one that was."""
        if not isinstance(message, protocol.Told) or message.number <= last:
            return last
        self._tell_of_before()
        with self._lock:
            wanted = [
                entry for entry in self._entries if entry.memory is None or entry.memory.object_number == message.object
            ]
        for entry in wanted:
            # Else it was among those that stood when this one came.
            if message.number > entry.since:
                self._deliver(entry, message)
        if not wanted:
            self._by_signal(message)
        return message.number

    def _tell_of_before(self) -> None:
        with self._lock:
            before = [(entry, told) for entry in self._entries for told in entry.before]
            for entry in self._entries:
                entry.before = []
        for entry, told in before:
            self._deliver(entry, told)

    def _deliver(self, entry: Entry, told: protocol.Told) -> None:
        if self._thread is not threading.current_thread():
            return
        memory = entry.memory or self._find(told.object)
        values = {name: getattr(told.notice, name) for name in _FIELDS}
        entry.told[told.object, told.notice.offset] = told.notice.event_id
        try:
            entry.deliver(Notice(memory=memory, **values))
        except BaseException:  # SystemExit too: the others are told all the same.
            log.exception("on_failure: %r failed", entry.deliver)

    def _by_signal(self, told: protocol.Told) -> None:
        """Nobody wants it. Where the policy is early, the process is sent what the kernel would send."""
        for one in all_mapped():
            mine = one.connection is self._connection and one.found.object == told.object and not one.guarded
            if mine and policy_of(self._connection, one.policy) is Policy.EARLY:
                early.tell(one.address + told.notice.offset)
                return

    def close(self) -> None:
        """End the thread, after what it is doing."""
        channel, self._channel = self._channel, None
        if channel is not None:
            with suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)
            channel.close()
        with self._lock:
            over, self._entries = self._entries, []
        for entry in over:
            if entry.end is not None:
                entry.end()


_default: list[Policy | None] = [None]


def set_policy(policy: Policy | str | None) -> None:
    """For all memories of this process that have none of their own; None: each manager's. As prctl(PR_MCE_KILL) for the
    kernel's. Raises ValueError for an unknown one."""
    _default[0] = None if policy is None else Policy(policy)
    plain.set_policy(policy)
    for one in all_mapped():
        if policy_of(one.connection, one.policy) is Policy.EARLY:
            one.connection.listen()


def default_policy() -> Policy | None:
    """As it was set last."""
    return _default[0]


def policy_of(connection: Connection, own: Policy | None) -> Policy:
    """What is true for a mapping that has this policy of its own, or none."""
    return own or _default[0] or connection.welcome.policy


class _Queue:
    """Notices that wait to be taken. Its descriptor can be read from as long as there are some, or no more will come."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        self.closed = False
        self._waiting: deque[Notice] = deque()

    def put(self, notice: Notice) -> None:
        self._waiting.append(notice)
        os.eventfd_write(self.fd, 1)

    def take(self) -> Notice | None:
        """The next one; None if no more will come. Raises BlockingIOError if there is none now."""
        if self.closed and not self._waiting:
            return None
        os.eventfd_read(self.fd)
        try:
            return self._waiting.popleft()
        except IndexError:
            return None

    def end(self) -> None:
        """No more will come: whoever waits is woken, whatever their number."""
        if not self.closed:
            self.closed = True
            os.eventfd_write(self.fd, 1 << 32)

    def inherited(self) -> None:
        """In a forked child: under the same number a descriptor of its own, with what waits."""
        own = os.eventfd(len(self._waiting) + (self.closed << 32), os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        os.dup2(own, self.fd, inheritable=False)
        os.close(own)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.fd)


class NoticeStream(ABC):  # noqa: B024  (plain ones are registered)
    """What `notices()` returns: an iterator and an asynchronous one, of each loss that stands and then of each that comes,
    once. It ends when the memory or the manager is closed, or by `close()`.

    `fileno()` is for any event loop: while it can be read from, `next()` does not wait. Reading the descriptor is ours.
    """

    def __init__(self, notices: Notices, memory: Memory | None) -> None:
        self._notices = notices
        self._queue = _Queue()
        self._entry = notices.add(memory, self._queue.put, self._queue.end)

    def fileno(self) -> int:
        """A descriptor that can be read from while a notice waits, or none will come any more."""
        return self._queue.fd

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Notice:
        poll = select.poll()
        poll.register(self._queue.fd, select.POLLIN)
        while True:
            poll.poll()
            # Another thread may have been quicker.
            with suppress(BlockingIOError):
                found = self._queue.take()
                if found is None:
                    raise StopIteration
                return found

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Notice:
        while True:
            try:
                found = self._queue.take()
            except BlockingIOError:
                await self._readable()
                continue
            if found is None:
                raise StopAsyncIteration
            return found

    async def _readable(self) -> None:
        # Who comes here has it, and it takes long to load for those who never do.
        from asyncio import get_running_loop  # noqa: PLC0415

        loop = get_running_loop()
        readable = loop.create_future()
        # One of its own for each task that waits: a loop has one reader for a descriptor.
        fd = os.dup(self._queue.fd)
        try:
            loop.add_reader(fd, lambda: None if readable.done() else readable.set_result(None))
            await readable
        finally:
            loop.remove_reader(fd)
            os.close(fd)

    def close(self) -> None:
        """Nothing more comes; what waits can still be taken."""
        self._notices.remove(self._entry)
        self._queue.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        # Not there if the registration has failed.
        if hasattr(self, "_entry"):
            self._notices.remove(self._entry)


Handle.register(plain.Handle)
NoticeStream.register(plain.NoticeStream)
