"""`Memory`: one object, mapped in this process."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from abc import ABC
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import numpy
import numpy.typing

from hwpoison import protocol
from hwpoison.app.connection import Channel, Descriptor, Reply
from hwpoison.app.mapping import map_object, register
from hwpoison.app.notices import Handle, Notice, NoticeStream, policy_of
from hwpoison.app.view import GuardedView, Visit, memory_of
from hwpoison.checking import Data, as_bytes, range_of, true_or_false, whole_pages
from hwpoison.core.records import Policy
from hwpoison.errors import PoisonError, Range
from hwpoison.extents import array_over, as_array, extent
from hwpoison.linux import syscalls
from hwpoison.linux.presence import next_hole
from hwpoison.linux.syscalls import PAGE_SIZE
from hwpoison.plain.memory import Memory as PlainMemory

if TYPE_CHECKING:
    from hwpoison.app.manager import BaseManager


_memories: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()


def every_memory() -> list[Memory]:
    """Those that are closed, or were the parent's, too."""
    found = [reference() for reference in _memories.valuerefs()]
    return [one for one in found if one is not None]


def all_memories() -> list[Memory]:
    """Those that are open."""
    return [one for one in every_memory() if not one.closed and one._connection.owner == os.getpid()]


class Memory(ABC):  # noqa: B024  (plain ones are registered)
    """An object of a manager, mapped in this process. Made by `allocate`, `open` and `attach`, never directly.

    `name`, `nbytes`, `kind` ("anonymous" or "file"), `writable` and `address` (of the mapping) are what they say. An
    access through `buffer` or `array` to bytes that are lost is a SIGBUS; `read`, `write` and `guard` raise `PoisonError`.

    The object lives as long as a process has it open. With the last one it is gone: anonymous memory is freed, changes to
    a file are written back. They are written at `flush` and `close` too, and at any time under a memory limit, in no
    particular order. A memory that nobody refers to any more is closed, unless it has views, but what `flush` would raise is
    not heard. A forked child has it too, at the same address.
    """

    def __init__(
        self, manager: BaseManager, found: protocol.Found, descriptor: Descriptor, channel: Channel, number: int
    ) -> None:
        self._manager = manager
        self._connection = manager.connection
        self._found = found
        self._descriptor: Descriptor | None = descriptor
        self.object_number = found.object
        self.instance = manager.connection.welcome.instance
        """Which manager it is of."""
        self.name = found.name
        self.nbytes = found.nbytes
        self.kind = found.kind
        self.writable = found.writable
        self._connection.check()
        self._mapping = map_object(descriptor.number, found, guarded=False)
        self.address = syscalls.address_of(self._mapping)
        self._mapped = register(self._connection, self._mapping, found, guarded=False, channel=channel, number=number)
        self._number = self._mapped.number
        self._errors = self._mapped.errors
        """How many errors of the object had happened when this handle was last told of them."""
        self._guarded: GuardedView | None = None
        self._numbers = count(1)
        # Not for more than to make a view, to begin to use it, or to unmap: a signal handler may do that too.
        self._lock = threading.RLock()
        self.closed = False
        self._unfinished = [True]
        """What `close` has to do after it has unmapped, for the one who takes it from here."""
        _memories[id(self)] = self
        self._listen_if_early()

    @property
    def manager(self) -> BaseManager:
        """Of which it is."""
        return self._manager

    # --- in a forked child

    def _about_to_fork(self) -> None:
        """What guards have met is known to the child too. Raises OSError."""
        if self._guarded is not None:
            self._guarded.about_to_fork()

    def _begin_again(self) -> None:
        """The mappings are there again, as another client's."""
        # A thread that only the parent has may have held it.
        self._lock = threading.RLock()
        if self._mapping.closed or not self._mapped.told:
            # That thread was closing it, or it could not be had again: the parent has it, and what is to be flushed.
            self.closed = self._mapping.closed
            self._unfinished.clear()
            self._manager._open.pop(id(self), None)
        if self.closed or self._connection.owner != os.getpid():
            return
        self._errors = self._mapped.errors
        if self._descriptor is not None:
            self._descriptor.inherited()
        if self._guarded is not None:
            self._guarded.begin_again()

    # --- the guarded view

    def _guarded_view(self) -> GuardedView:
        """The second view of this memory, made at its first use and kept."""
        # Before the lock: in a forked child it may be held by a thread that only the parent has.
        self._check_open()
        self._connection.check()
        with self._lock:
            view = self._guarded
            if view is None:
                # What is gone must be known before something else can come to its address.
                self._connection.tell_unmapped()
                mapping = map_object(self._memfd().number, self._found, guarded=True)
                mapped = register(self._connection, mapping, self._found, guarded=True)
                view = GuardedView(self._connection, mapping, mapped, self.name, self.nbytes)
            # What makes a view waits for the manager: a signal handler may have closed all meanwhile.
            self._check_open()
            self._guarded = view
            return view

    def _visit(self, *, tells: bool = True) -> tuple[GuardedView, Visit]:
        """The guarded view and a stay in it, during which nobody closes it. For `hwpoison.guard`."""
        self._connection.check()
        with self._lock:
            view = self._guarded_view()
            return view, view.enter(tells=tells)

    def _memfd(self) -> Descriptor:
        """The object's memory: hold this while the number is used. Raises ValueError if it is closed."""
        descriptor = self._descriptor
        if descriptor is None:
            raise ValueError(f"memory {self.name!r} is closed")
        return descriptor

    # --- views

    @property
    def buffer(self) -> memoryview:
        """The mapping itself, `nbytes` long; writable unless the memory is a file opened "r".

        System calls in user mode (see `hwpoison doctor`) get EFAULT for pages that the manager would have to be asked about.
        `resident` makes a range fit for them.
        """
        self._check_open()
        return memory_of(self._mapping, self.name)[: self.nbytes]

    def __buffer__(self, flags: int, /) -> memoryview:
        """As `buffer`, for whatever takes an object with a buffer (from Python 3.12 on)."""
        return self.buffer

    def _kept_by_views(self) -> None:
        """From now on it lives as long as its mapping has views."""
        self._mapping.memory = self

    def addresses(self) -> list[int]:
        """Where its views are: the ordinary one, and that of guards if there is one."""
        return [self.address] if self._guarded is None else [self.address, self._guarded.address]

    def array(
        self,
        dtype: numpy.typing.DTypeLike = "u1",
        shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
        *,
        offset: SupportsIndex = 0,
        order: Literal["C", "F"] = "C",
    ) -> numpy.ndarray[Any, Any]:
        """A numpy array over the same bytes from byte `offset` on; `shape` None: as many items as there are.

        Raises ValueError where the bytes do not suffice. What `buffer` says of system calls is true of it too.
        """
        return array_over(self.buffer, dtype, shape, offset, order)

    # --- content

    def read(self, offset: SupportsIndex, nbytes: SupportsIndex) -> bytes:
        """A copy of bytes. Raises PoisonError, naming all that is lost of them; ValueError outside the memory."""
        begin, length = self._checked_range(offset, nbytes)
        memfd = self._memfd()
        if length and next_hole(memfd.number, begin, begin + length) is not None:
            # Within the copying no other thread runs, and no signal is seen.
            self.prefetch(begin, length)
        view, visit = self._visit(tells=False)
        try:
            content = bytes(view.buffer[begin : begin + length])
        finally:
            met = visit.leave()
            visit.told()
        # An overlapping guard may have met other losses.
        page, end = begin // PAGE_SIZE * PAGE_SIZE, begin + length
        met = [one for one in met if one.offset < end and page < one.offset + one.nbytes]
        if met:
            raise PoisonError(met)
        return content

    def write(self, offset: SupportsIndex, data: Data) -> None:
        """Store bytes. Lost pages that `data` covers whole are repaired.

        Raises PoisonError, with nothing written, if a page that is covered in part is lost; ValueError outside the memory;
        PermissionError if it is read-only. Pages that are lost while this writes are told by PoisonError too.
        """
        view = as_bytes(data)
        begin, length = self._checked_range(offset, len(view))
        end = begin + length
        if not self.writable:
            raise PermissionError(errno.EACCES, f"{self.name!r} is open read-only; open it with mode 'r+'")
        # Pieces begin at pages, so that a page is never covered by two of them. The manager refuses a piece whole.
        pieces = [begin, *range((begin // PAGE_SIZE) * PAGE_SIZE + protocol.DATA_LIMIT, end, protocol.DATA_LIMIT)]
        if len(pieces) > 1:
            refused = self._lost_in_part(begin, length)
            if refused:
                raise PoisonError(refused)
            view = self._apart(view)
        for start, stop in zip(pieces, [*pieces[1:], end], strict=True):
            piece = bytes(view[start - begin : stop - begin])
            self._ask(protocol.Write(self._number, start, piece), protocol.Done)

    def _apart(self, data: memoryview) -> memoryview:
        """The data; if it lies in this object, a copy: a piece that is stored must not change those that come after it."""
        begin, end = extent(as_array(data))
        same = [one for one in all_memories() if one.instance == self.instance and one.object_number == self.object_number]
        places = [(at, at + one.nbytes) for one in same for at in one.addresses()]
        return memoryview(bytes(data)) if any(begin < last and first < end for first, last in places) else data

    def _lost_in_part(self, offset: int, nbytes: int) -> list[Range]:
        """The lost pages that the range covers, but not whole: its first or its last page."""
        end = offset + nbytes
        edges = {offset // PAGE_SIZE * PAGE_SIZE, (end - 1) // PAGE_SIZE * PAGE_SIZE}
        return [
            Range(self.name, edge, min(PAGE_SIZE, self.nbytes - edge))
            for edge in sorted(edges)
            if (edge < offset or end < min(edge + PAGE_SIZE, self.nbytes))
            and any(one.offset <= edge < one.offset + one.nbytes for one in self.lost())
        ]

    def prefetch(self, offset: SupportsIndex = 0, nbytes: SupportsIndex | None = None) -> None:
        """Bring bytes in, and return when they are there; other threads run meanwhile.

        A hint: what does not fit into the manager's memory limit, or can't be read, is left for its first access.
        """
        self._ask(protocol.Prefetch(self._number, *self._checked_range(offset, nbytes)), protocol.Done)

    @contextmanager
    def resident(
        self, offset: SupportsIndex = 0, nbytes: SupportsIndex | None = None, write: bool = False
    ) -> Iterator[memoryview]:
        """Within the block, system calls can use these bytes, also where userfaultfd is in user mode: `file.readinto(view)`.

        `write`: calls may store into them; all of them count as changed then. Raises `PoisonError` if some are lost,
        OSError (ENOMEM) for more than the memory limit leaves. What fails meanwhile is refused with EFAULT even so.
        """
        begin, length = self._checked_range(offset, nbytes)
        write = true_or_false("write", write)
        if write and not self.writable:
            raise PermissionError(f"memory {self.name!r} is read-only; open it with mode 'r+'")
        number = next(self._numbers)
        try:
            self._ask(protocol.Resident(self._number, number, begin, length, write), protocol.Done)
            part = self.buffer[begin : begin + length]
            with part if write else part.toreadonly() as view:
                yield view
        finally:
            if not self.closed:
                self._ask(protocol.ResidentOver(self._number, number), protocol.Done)

    def flush(self) -> None:
        """Write changes to the file and wait until they are on the disk. Nothing to do for anonymous memory.

        Raises OSError: EIO exactly once for changes that were lost; the file system's reason as often as it does not take
        them. Those are still in memory, and the next `flush` tries again.
        """
        self._check_open()
        self._tell(self._ask(protocol.Flush(self._number, self._errors), protocol.Flushed))

    def _tell(self, reply: protocol.Flushed) -> None:
        """Raise what is new in it. Until it is raised, the manager says it again."""
        if reply.failed is None:
            return
        with self._lock:
            if reply.errors <= self._errors and not reply.unwritten:
                return  # Another thread's flush has told it.
            try:
                raise protocol.error_of(reply.failed)
            except OSError:
                # Now even what a signal handler raises has the error as its context.
                self._errors = max(self._errors, reply.errors)
                raise

    # --- losses

    def lost(self) -> list[Range]:
        """The ranges that are lost, whole pages, by offset."""
        self._check_open()
        reply = self._ask(protocol.Lost(self._number), protocol.Ranges)
        return [Range(self.name, *one) for one in reply.ranges]

    def repair(self, offset: SupportsIndex, data: Data) -> int:
        """Give lost pages their right content, each in one step: nobody ever sees zeros. Returns the bytes repaired.

        `data` covers whole pages; those of them that are not lost stay as they are. Raises ValueError if it does not,
        PermissionError if the memory is read-only.
        """
        view = as_bytes(data)
        begin, length = self._checked_range(offset, len(view))
        # The manager says so too, but it gets the data in pieces: none must be repaired before the last is refused.
        whole_pages(self.name, self.nbytes, begin, begin + length, PAGE_SIZE)
        repaired = 0
        for start in range(0, len(view), protocol.DATA_LIMIT):
            piece = bytes(view[start : start + protocol.DATA_LIMIT])
            request = protocol.Repair(self._number, begin + start, piece)
            repaired += self._ask(request, protocol.Count).nbytes
        return repaired

    def discard(self, offset: SupportsIndex = 0, nbytes: SupportsIndex | None = None) -> int:
        """Give up every lost page that the range touches, whole: zeros, or what the file holds now. Returns the bytes
        discarded.

        Pages that are not lost stay as they are. Raises OSError if the file can't be read.
        """
        return self._ask(protocol.Discard(self._number, *self._checked_range(offset, nbytes)), protocol.Count).nbytes

    def notices(self) -> NoticeStream:
        """Each loss that stands now, and then each that comes, once, in order: an iterator, an asynchronous iterator, and
        something with a `fileno()` for any event loop."""
        self._check_open()
        return NoticeStream(self._manager.notice_board, self)

    def on_failure(self, function: Callable[[Notice], object]) -> Handle:
        """Call `function` with a `Notice` for each loss that stands now, and then for each that comes, in order, on the
        thread "hwpoison-notices", and never in a signal handler. Can be used as a decorator.

        Each loss is told once, however slow the function is. But where more than 1,000 notices wait for it, those of losses
        that have been repaired or discarded meanwhile may be left out; they are in `events()`. The function's exceptions go
        to the logger "hwpoison". Returns a handle with `cancel()`; until then, or `close`, this memory stays open, whoever
        refers to it. Raises ConnectionError if there is no manager.
        """
        self._check_open()
        if not callable(function):
            raise TypeError(f"on_failure needs a function, not {type(function).__name__}")
        board = self._manager.notice_board
        return Handle(board, board.add(self, function))

    @property
    def policy(self) -> Policy:
        """When this process learns of a loss that nobody here wants a notice of: early, by a SIGBUS with BUS_MCEERR_AO, or
        late, on access. Set it to None for what `set_policy` says, or the manager, which is late if it says nothing."""
        return policy_of(self._connection, self._mapped.policy)

    @policy.setter
    def policy(self, policy: Policy | str | None) -> None:
        self._check_open()
        self._mapped.policy = None if policy is None else Policy(policy)
        self._listen_if_early()

    def _listen_if_early(self) -> None:
        if self.policy is Policy.EARLY:
            self._manager.notice_board.listen()

    # --- its life

    def close(self) -> None:
        """Unmap, and flush. Raises BufferError if there are views: it is flushed, and everything is still usable; and what
        `flush` raises, when it is closed all the same if there are none.

        A second close does nothing, and waits for nothing, unless the first one was interrupted: then it goes on with it.
        """
        if os.getpid() != self._connection.owner:
            # The lock may be held by a thread that only the parent has.
            self._connection.check()
        try:
            with self._lock:
                if not self.closed:
                    self._unmap()
        except BufferError:
            # That there is no manager any more, or that another thread has closed it, is said by whatever is asked next.
            with suppress(ConnectionError, ValueError):
                self.flush()
            raise
        try:
            # In one step: of several threads, one does it.
            self._unfinished.pop()
        except IndexError:
            return
        try:
            # Only now: a flush that fails must not leave a mapping behind, whose absent pages would be zeros for everybody
            # once the userfaultfd is closed. What is dirty is in the object, not in the mapping.
            request = protocol.Flush(self._number, self._errors)
            reply = self._connection.request(request, protocol.Flushed) if self.writable else protocol.Flushed(0)
        except ConnectionError:
            self._manager._forget(self)
            raise
        except BaseException:
            self._unfinished.append(True)
            raise
        try:
            self._tell(reply)
        finally:
            self._connection.unmapped(self._number)
            try:
                self._connection.tell_unmapped()
            finally:
                self._manager._forget(self)

    def _unmap(self) -> None:
        if self._guarded is not None:
            self._guarded.close()
            self._guarded = None
        try:
            self._mapping.close()
        except BufferError:
            raise BufferError(f"{self.name!r} has views (arrays or memoryviews); delete them before close()") from None
        self.closed = True
        self._descriptor = None

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[[str, str, str, int], Memory], tuple[str, str, str, int]]:
        from hwpoison.app.manager import attach_pickled  # noqa: PLC0415  (managers make memories)

        self._check_open()
        return attach_pickled, (self._connection.socket_name, self.instance, self.name, self.object_number)

    def __repr__(self) -> str:
        return f"<hwpoison.Memory {self.name!r} {self.kind} {self.nbytes} bytes at {self.address:#x}>"

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"memory {self.name!r} is closed")

    def _ask(self, message: protocol.Message, kind: type[Reply]) -> Reply:
        """What the manager says, but if another thread has closed this memory meanwhile: that."""
        try:
            return self._connection.request(message, kind)
        except (ValueError, FileNotFoundError, ConnectionError) as error:
            if self.closed:
                raise ValueError(f"memory {self.name!r} is closed") from error
            raise

    def _checked_range(self, offset: SupportsIndex, nbytes: SupportsIndex | None) -> tuple[int, int]:
        """As whole numbers; `nbytes` None is all the rest."""
        self._check_open()
        return range_of(self.name, self.nbytes, offset, nbytes)


Memory.register(PlainMemory)
