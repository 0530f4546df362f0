"""A guarded view: a second, private, read-only mapping of a memory, in which lost bytes can be met without a signal.

The manager counts each loss that is met in a word that it shares with this process, then answers with a private page of
zeros, if a second word says that a guard is open. Whoever uses the view compares the count at the end. `_clean` is the count
up to which all such zeros are gone again: a guard that begins sees to it that all are, and measures from there, so zeros
that an overlapping guard has met can't be read unnoticed.

A signal handler (Ctrl-C) may raise between any two bytecodes. So there is no lock that could stay locked, and no number that
could stay wrong: the word of open guards is always made from the set of them, in one step, and a visit that its owner could
not end is ended by its own death. What its guard had met is told by the next guard.
"""

from __future__ import annotations

import mmap
import os
import weakref
from _thread import allocate_lock, get_ident
from heapq import heappushpop
from operator import setitem
from typing import Any

from hwpoison import protocol
from hwpoison.app.connection import Connection
from hwpoison.app.mapping import Mapped
from hwpoison.errors import Range
from hwpoison.linux import syscalls
from hwpoison.linux.syscalls import PAGE_SIZE


class Mark:
    """How far one guard has looked: it has `seen` that many of the losses that the view has met.

    `tells`: what it has not told when it is interrupted, the next one must; then it is `owed`. `inherited`: what it had met,
    and not told, when this process was forked; `before`: that, for a child that may be forked now, when `count` were met.
    """

    __slots__ = ("before", "count", "inherited", "owed", "seen", "tells", "thread")

    def __init__(self, seen: int, tells: bool) -> None:
        self.seen = seen
        self.tells = tells
        self.owed = False
        self.thread = get_ident()
        self.inherited: list[Range] = []
        self.before: list[Range] = []
        self.count = 0


class Entry(weakref.ref["Visit"]):
    """A visit in the view's books, which do not keep it; known by itself, as a plain reference is not once that has died."""

    __slots__ = ()
    __hash__ = object.__hash__
    __eq__ = object.__eq__


class Visit:
    """One guard's stay in a view, made by `enter`. Only the guard may keep it: it ends, at the latest, when it dies."""

    __slots__ = ("__weakref__", "_entry", "_view", "mark")

    def __init__(self, view: GuardedView, mark: Mark) -> None:
        self._view = view
        self.mark = mark
        self._entry: Entry | None = Entry(self, view.end)

    def leave(self) -> list[Range]:
        """The guard is open no more; the losses met since the mark. Then `told` must follow, if there are any.

        The word of open guards is stored before the count is loaded; the manager counts before it looks at the open
        guards. So a loss that is met while the last guard ends is either seen here or answered with SIGBUS.
        """
        if self._entry is None:
            return []
        self._view.shut(self._entry)
        met = list(self.mark.inherited)
        if self._view.unseen(self.mark.seen):
            met += self._view.settle(self.mark.seen)[0]
        if not met:
            self.told()
        return met

    def told(self) -> None:
        """What `leave` returned has been told."""
        if self._entry is not None:
            self._view.forget(self._entry)
            self._entry = None

    def end(self) -> None:
        """As its death would: if it was not left, or what it has met was not told, the next guard tells it."""
        if self._entry is not None:
            self._view.end(self._entry)
            self._entry = None


_store: Any = setitem


class GuardedView:
    """One memory's guarded view, shared by all guards on it in this process."""

    def __init__(self, connection: Connection, mapping: mmap.mmap, mapped: Mapped, name: str, nbytes: int) -> None:
        assert connection.words is not None
        self._connection = connection
        self._mapping = mapping
        self._mapped = mapped
        self._number = mapped.number
        self._name = name
        self._nbytes = nbytes
        self._words = connection.words
        self._met_word = 2 * mapped.slot
        self._guards_word = 2 * mapped.slot + 1
        self._open: set[Entry] = set()
        self._untold: dict[Entry, Mark] = {}
        """The marks of all that are open, that have still to tell what they met, or that have left that to the next."""
        self._clean_heap = [0]

    @property
    def buffer(self) -> memoryview:
        return memory_of(self._mapping, self._name)[: self._nbytes]

    @property
    def address(self) -> int:
        return syscalls.address_of(self._mapping)

    @property
    def _clean(self) -> int:
        return self._clean_heap[0]

    # --- guards

    def enter(self, *, tells: bool = True) -> Visit:
        """One guard more. With `tells` it takes on what interrupted ones have not told. Raises ConnectionError in a forked
        child."""
        # A child shares the words with its parent, and must not touch them.
        self._connection.check()
        owed = self._owed() if self._untold and tells else {}
        mark = Mark(self._clean, bool(owed))
        visit = Visit(self, mark)
        assert visit._entry is not None
        if owed:
            mark.seen = min(mark.seen, *(one.seen for one in owed.values()))
            mark.inherited = [lost for one in owed.values() for lost in one.inherited]
        self._untold[visit._entry] = mark
        for entry in owed:
            self._untold.pop(entry, None)
        self._open.add(visit._entry)
        self._publish()
        if self.unseen(self._clean):
            # What others have met must not meet this one: their zeros, nor the poison markers that the manager has answered
            # with while no guard was open. None of those can come after this: from now on it sees a guard.
            _, count = self.settle(self._clean)
            if not owed:
                mark.seen = count
        mark.tells = tells
        return visit

    def _owed(self) -> dict[Entry, Mark]:
        """What guards that have ended did not tell."""
        found = {}
        for entry, mark in list(self._untold.items()):
            if entry() is None and not mark.owed:
                self.end(entry)  # A signal handler has raised even while it died.
            if mark.owed:
                found[entry] = mark
        return found

    def shut(self, entry: Entry) -> None:
        """One open guard less."""
        self._open.discard(entry)
        self._publish()

    def forget(self, entry: Entry) -> None:
        """It has told all that it met."""
        self._untold.pop(entry, None)

    def end(self, entry: Entry) -> None:
        """A visit was not left, or what it has met was not told. Asks the manager nothing: this may run anywhere."""
        if os.getpid() != self._connection.owner:
            return
        self.shut(entry)
        mark = self._untold.get(entry)
        if mark is None or mark.owed:
            return
        if self.unseen(self._clean):
            self._mapping.madvise(mmap.MADV_DONTNEED)
        if mark.tells and (mark.inherited or self.unseen(mark.seen)):
            mark.owed = True
        else:
            self.forget(entry)

    def _publish(self) -> None:
        """Show the manager how many guards are open."""
        # A child shares the words with its parent.
        if os.getpid() == self._connection.owner:
            # Counted and stored by one call into C: no signal handler and, with the GIL, no other thread can come between.
            next(map(_store, (self._words,), (self._guards_word,), map(len, (self._open,))))
            # A lock that is taken is a memory barrier: the count of losses is loaded only after that was stored.
            allocate_lock().acquire()

    # --- in a forked child

    def about_to_fork(self) -> None:
        """What the guards that are there have met. Raises OSError."""
        for mark in list(self._untold.values()):
            mark.before, mark.count = list(mark.inherited), mark.seen
            if self.unseen(mark.seen):
                met, mark.count = self._met_since(mark.seen)
                mark.before += met

    def begin_again(self) -> None:
        """The view is there again, with other words. The guards of this thread are open, those of others, which are not
        here, are not any more; what each has met it has still to tell."""
        assert self._connection.words is not None
        for mark in self._untold.values():
            if self.unseen(mark.count):
                # Since the look, by other threads: which it was is not known here.
                mark.before.append(Range(self._name, 0, self._nbytes))
            mark.inherited, mark.seen = mark.before, 0
        # One that could not be made again has words that nobody reads, not somebody else's: an access to it is a SIGSEGV.
        slot, self._words = self._mapped.slot, self._connection.words
        if slot < 0:
            slot, self._words = 0, memoryview(bytearray(16)).cast("Q")
        self._met_word, self._guards_word = 2 * slot, 2 * slot + 1
        self._clean_heap = [0]
        here = get_ident()
        self._open = {one for one in self._open if one in self._untold and self._untold[one].thread == here}
        self._publish()

    # --- losses

    def unseen(self, seen: int) -> bool:
        """True if losses were met since `seen`."""
        return bool(self._words[self._met_word] != seen)

    def settle(self, seen: int) -> tuple[list[Range], int]:
        """The losses met since `seen`, and the count now. Their zeros are gone: another access is another loss met.

        The manager keeps them until every guard whose mark is older has told them.
        """
        met, count = self._met_since(seen)
        for one in met:
            self._mapping.madvise(mmap.MADV_DONTNEED, one.offset, -(-one.nbytes // PAGE_SIZE) * PAGE_SIZE)
        # A heap of one item keeps the larger one, in one step.
        heappushpop(self._clean_heap, count)
        return met, count

    def _met_since(self, seen: int) -> tuple[list[Range], int]:
        forget = min([self._clean, *(mark.seen for mark in list(self._untold.values()))])
        reply = self._connection.request(protocol.Met(self._number, seen, forget), protocol.Ranges)
        return [Range(self._name, *one) for one in reply.ranges], reply.count

    def close(self) -> None:
        """Raises BufferError if there are open guards, arrays or memoryviews of it. The manager learns of it later."""
        if any(entry() is not None for entry in list(self._untold)):
            raise BufferError(f"{self._name!r} is being guarded or read; end that before close()")
        try:
            self._mapping.close()
        except BufferError:
            raise BufferError(f"a guarded view of {self._name!r} has arrays or memoryviews; delete them first") from None
        self._connection.unmapped(self._number)


def memory_of(mapping: mmap.mmap, name: str) -> memoryview:
    """Raises ValueError if the mapping is closed."""
    try:
        return memoryview(mapping)
    except ValueError:
        raise ValueError(f"memory {name!r} is closed") from None
