"""A manager takes over from one that has died, at whatever instant that was.

Of the one before there are: the memory, with its flags for each page; the clients' userfaultfds; bad frames, in quarantine;
and the journal. Clients go on meanwhile: what is present they read and write, and at what is absent they sleep.

`take_over` is the story: the books are made again; each page's flags are compared with what is there, and mean from now on
what they say; what can have lost its watching is watched; markers of what is not lost any more are taken away; failures
that were begun are finished; and then everybody who sleeps is woken, once, and meets a fault if it still is one. Before that
no fault is read and no request answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from hwpoison.core import failure, residence
from hwpoison.core.books import Books
from hwpoison.core.journal import failure_of, identity_of, of_kind
from hwpoison.core.machine import Inheritance, NotIsolatedError
from hwpoison.core.manager import MemoryManager
from hwpoison.core.mappings import Client, Mapping
from hwpoison.core.objects import Backing, Loss, MemoryObject
from hwpoison.core.pages import DIRTY, LOST, PIECE_PAGES, POISONED, PRESENT, WRITEBACK
from hwpoison.core.records import Failure, Outcome, State
from hwpoison.core.recovery import lose, note_loss, well_again

INTERRUPTED = "the manager was killed while it gave up a large frame that held the page"
_STEADY = bytes(value & PRESENT if value in (0, PRESENT, PRESENT | DIRTY) else 2 for value in range(256))
"""For flags that are the same whoever reads them: 1 if the page is there. 2 for all others."""


async def take_over(books: MemoryManager, inherited: Inheritance) -> None:
    """Make the books of the managers before this one again, and everybody's memory what it was. Nobody is served before."""
    records = books.machine.records.all()
    taking = _Takeover(books, inherited, records)
    await taking.objects()
    taking.clients()
    taking.failures_begun()
    # What was being isolated is held; what was not yet is taken out once more, by its failure.
    taking.held = inherited.transit(hold=not taking.still_there())
    for object_ in books.objects():
        taking.settle(object_)
    taking.not_surely_durable()
    for object_ in books.objects():
        await _watch(object_)
    for object_, page, loss, kind in taking.revived:
        async with object_.locks.hold(page):
            if object_.is_present(page):
                await well_again(books, object_, page, loss, kind)
    # Each takes its page's lock before anybody else can want it.
    taking.versions()
    taking.answers()
    taking.finish_failures()
    books.statistics.quarantined = books.machine.held
    for client in books.clients():
        for mapping in client.mappings:
            mapping.wake(mapping.first, mapping.count)
    for object_ in books.objects():
        if not object_.references:
            # Its last client has gone, and its end was not written down.
            books.hold(object_)
            books.release(object_)


class _Takeover:
    """What is found."""

    def __init__(self, books: Books, inherited: Inheritance, records: dict[Any, Any]) -> None:
        self.books = books
        self.inherited = inherited
        self.records = records
        self.revived: list[tuple[MemoryObject, int, Loss, str]] = []
        """Pages that were lost, are there again, by "repair" or "discard", and may have poison markers yet."""
        self.held = True
        """The frame that was being isolated is in quarantine."""
        self._in_flight: list[int] = []
        """Objects to whose files something was being written."""
        self._by_number: dict[int, MemoryObject] = {}
        self._reviving: dict[tuple[int, int], str] = {}
        """(object, page) of losses that were being repaired or discarded, and which of the two."""
        self._poisoned: dict[tuple[int, int], None] = {}
        """(object, page) of failures that were begun."""
        self._isolating: dict[tuple[int, int], None] = {}
        """Those of them whose page may have been taken out."""
        counted = records.get(("counted",))
        if counted:
            books.statistics.outcomes.update(counted[0])
            books.statistics.states.update(counted[1])
            books.statistics.accesses_to_lost = counted[2]

    # --- the books

    async def objects(self) -> None:
        """Objects, and what is lost of them."""
        books, machine = self.books, self.books.machine
        for (number,), (name, nbytes, file, persistent) in of_kind(self.records, "object").items():
            assert isinstance(number, int)
            backing = await self._backing(number, file) if file else None
            store = self.inherited.store(number, name, nbytes)
            object_ = MemoryObject(
                number, name, nbytes, machine.page_size, store, backing, machine.table, machine.large_frame_bytes
            )
            object_.unsynced = ("unsynced", number) in self.records
            object_.persistent = persistent
            object_.references = int(persistent)
            object_.error_sequence = self.records.get(("errors", number), 0)
            self._by_number[number] = object_
            books.inherit(object_)
        for (number, page), value in of_kind(self.records, "loss").items():
            event_id, state, outcome, reason, source, when, untold, reviving = value
            loss = Loss(event_id, State(state), Outcome(outcome), reason, source, when)
            note_loss(books, self._by_number[number], page, loss, untold=untold)  # type: ignore[index, arg-type]
            if reviving:
                self._reviving[number, page] = reviving  # type: ignore[index]

    async def _backing(self, number: int, value: list[Any]) -> Backing:
        offset, writable, known, changed, writing, place = value
        file = self.inherited.file(number)
        identity = identity_of(known)
        backing = Backing(file, offset, writable, identity, changed, place=tuple(place))
        if writing and identity is not None:
            # A write was in flight, and is over now, done or not: the version that it has made is ours. The file is asked
            # beside everything else, and nobody reads it before it has answered.
            await backing.turn.acquire()
            backing.writing = True
            self._in_flight.append(number)
        return backing

    def versions(self) -> None:
        """Ask the files that were being written which version they are in."""
        for number in self._in_flight:
            self.books.start(self._version(self._by_number[number]), f"version of object {number}")

    async def _version(self, object_: MemoryObject) -> None:
        backing = object_.backing
        assert backing is not None
        assert backing.identity is not None
        try:
            now = await backing.file.identity()
        except OSError as error:
            backing.identity, backing.changed = None, f"the manager was killed while it wrote, and then: {error.strerror}"
        else:
            if now[:3] == backing.identity[:3]:
                backing.identity = now
        finally:
            backing.writing = False
            backing.turn.release()
            object_.io_ended()
        if not object_.closed:
            self.books.journal.object(object_)

    def clients(self) -> None:
        """Clients and their mappings."""
        clients: dict[int, Client] = {}
        for (number,), pid in of_kind(self.records, "client").items():
            assert isinstance(number, int)
            clients[number] = Client(number, self.inherited.space(number, pid), self.books.machine.page_size)
            self.books.inherit(clients[number])
        mappings: dict[Any, Mapping] = {}
        for (number,), value in of_kind(self.records, "mapping").items():
            client_number, object_number, address, slot, errors_apart, heir, error_seen = value
            client, object_ = clients[client_number], self._by_number[object_number]
            hits = self.inherited.hits(client_number, slot) if slot >= 0 else None
            mapping = Mapping(number, client, object_, address, 0, object_.pages.count, hits)  # type: ignore[arg-type]
            mappings[number] = mapping
            mapping.errors_apart, mapping.heir, mapping.error_seen = errors_apart, heir, error_seen
            # Which of them it has met is not known, and to take one away that is not there does nothing.
            mapping.markers.update(object_.losses)
            if ("met", number) in self.records:
                before, met = self.records["met", number]
                mapping.met_before, mapping.met = before, list(met)
                while hits is not None and hits.count < mapping.met_before + len(mapping.met):
                    hits.hit()
            self.books.add_mapping(mapping)
        for (number, own), (first, count, write) in of_kind(self.records, "resident").items():
            assert isinstance(own, int)
            mappings[number].resident[own] = (first, count, write)
            residence.count_pages(mappings[number], own, 1)
        for asked_by, object_number in of_kind(self.records, "promised").items():
            object_ = self._by_number[object_number]
            self.books.promises[asked_by] = object_  # type: ignore[index]
            object_.references += 1

    def failures_begun(self) -> None:
        """Which pages they are about."""
        for number, page, state, isolated, *_ in of_kind(self.records, "failure").values():
            if number not in self._by_number:
                continue
            self._poisoned[number, page] = None
            if state and not isolated and page not in self._by_number[number].losses:
                self._isolating[number, page] = None

    def still_there(self) -> bool:
        """True if the page of a failure that was about to isolate it has not been taken out.

        There is one such failure at most: all that is between is done in one go.
        """
        return any(self._by_number[number].store.present(page) for number, page in self._isolating)

    # --- the pages

    def settle(self, object_: MemoryObject) -> None:
        """What the flags of each page say from now on."""
        books = self.books
        given_up: list[int] = []
        for page in list(object_.losses):
            object_.pages.set(LOST, page)
            if (object_.number, page) not in self._reviving and object_.store.present(page):
                # Somebody has touched it who asks nobody: zeros.
                _drop(object_, page)
        for first, count, runs in _pieces(object_):
            flags = bytearray(object_.pages.flags[first : first + count])
            present = bytearray(count)
            for start, length in runs:
                present[start - first : start - first + length] = b"\1" * length
            lost = [page - first for page in object_.losses if first <= page < first + count]
            for index in dict.fromkeys([*_differing(flags.translate(_STEADY), present), *lost]):
                flags[index] = self._settled(object_, first + index, flags[index], bool(present[index]), given_up)
            for number, page in self._poisoned:
                if number == object_.number and first <= page < first + count:
                    flags[page - first] |= POISONED
            arrived = sum(1 for value in flags if value & PRESENT)
            object_.pages.found(first, bytes(flags), books.reclaim.arrived(object_, arrived) if arrived else 0)
        if given_up:
            event_id = books.new_event_id()
            for page in given_up:
                state = State.DIRTY_FILE if object_.backing is not None else State.ANONYMOUS
                loss = Loss(event_id, state, Outcome.FAILED, INTERRUPTED, time=books.machine.now())
                books.reclaim.left(object_, 1)
                lose(books, object_, page, loss)

    def _settled(self, object_: MemoryObject, page: int, flags: int, present: bool, given_up: list[int]) -> int:
        place = (object_.number, page)
        changed = DIRTY if flags & (DIRTY | WRITEBACK) else 0
        loss = object_.losses.get(page)
        if loss is not None:
            if not present:
                if place in self._reviving:
                    self.books.journal.loss(object_, page, loss, untold=page in object_.untold)
                return LOST | POISONED
            # It was repaired or discarded; what is left to do is to take the markers away.
            del object_.losses[page]
            object_.untold.discard(page)
            if loss.state is State.DIRTY_FILE and object_.backing is not None:
                self.books.lost_changes_of[object_.backing.place] -= 1
            self.revived.append((object_, page, loss, self._reviving[place]))
            return PRESENT | changed
        if present:
            # Also if it had just come: it was what belongs there, and nobody can have written to it unseen.
            return PRESENT | changed
        if flags & PRESENT and (changed or object_.backing is None) and place not in self._isolating:
            given_up.append(page)
            # Until the loss is written down: this manager may die before that, too.
            return PRESENT | changed
        return 0

    def not_surely_durable(self) -> None:
        """A sync that was under way may have failed: the error was the dead manager's, and the next sync would say that all
        is well. So what it was about is written once more, and where that is not in memory any more everybody is told.
        """
        for (number, which), (runs, others) in of_kind(self.records, "syncing").items():
            object_ = self._by_number.get(number)  # type: ignore[arg-type]
            if object_ is None:
                continue
            assert isinstance(which, int)
            pages = [page for first, count in runs for page in range(first, first + count)]
            for page in pages:
                if object_.is_present(page):
                    object_.pages.set(DIRTY, page)
            if others or any(not object_.is_present(page) and page not in object_.losses for page in pages):
                object_.error_sequence += 1
                self.books.journal.errors(object_)
            self.books.journal.synced(object_, which)

    # --- failures

    def answers(self) -> None:
        """What was found out, and may not have been said."""
        for asked_by, value in of_kind(self.records, "answer").items():
            answer = self.books.answers[asked_by] = asyncio.get_running_loop().create_future()  # type: ignore[index]
            answer.set_result(failure_of(value))

    def finish_failures(self) -> None:
        """Each under its own event id, and told to who has asked."""
        for (event_id,), value in of_kind(self.records, "failure").items():
            object_ = self._by_number.get(value[0])
            if object_ is None:
                continue
            assert isinstance(event_id, str)
            answer = asyncio.get_running_loop().create_future()
            *_, asked_by = value
            if asked_by:
                self.books.answers[tuple(asked_by)] = answer
            self.books.start(self._finished(event_id, object_, value, answer), f"rest of failure {event_id}")

    async def _finished(
        self, event_id: str, object_: MemoryObject, value: list[Any], answer: asyncio.Future[Failure]
    ) -> None:
        answer.set_result(await failure.finish(self.books, event_id, object_, value, held=self.held))


async def _watch(object_: MemoryObject) -> None:
    """What is not changed is watched for first writes: who took a page away has watched it again only afterwards. What is
    changed is watched too, as changed pages may lie anywhere between; its next write is noted once more."""
    if object_.tracks_dirt:
        async with object_.locks.hold(0, object_.pages.count):
            await object_.watch_again(0, object_.pages.count)


def _drop(object_: MemoryObject, page: int) -> None:
    try:
        object_.store.drop(page, 1)
    except NotIsolatedError:
        # A part of a large frame. All of it goes: what was in it is found to be gone.
        unit = page // object_.unit_pages * object_.unit_pages
        object_.store.drop(unit, min(object_.unit_pages, object_.pages.count - unit))


def _pieces(object_: MemoryObject) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """(first, count, runs that are present) of pieces outside of which there are no flags and no pages."""
    pieces: dict[int, list[tuple[int, int]]] = {}
    for first, count in object_.store.flagged():
        for piece in range(first // PIECE_PAGES, -(-(first + count) // PIECE_PAGES)):
            pieces.setdefault(piece, [])
    for first, count in object_.store.runs():
        at, end = first, first + count
        while at < end:
            length = min(PIECE_PAGES - at % PIECE_PAGES, end - at)
            pieces.setdefault(at // PIECE_PAGES, []).append((at, length))
            at += length
    for piece in sorted(pieces):
        first = piece * PIECE_PAGES
        yield first, min(PIECE_PAGES, object_.pages.count - first), pieces[piece]


def _differing(one: bytes | bytearray, other: bytearray) -> Iterator[int]:
    """Where two of the same length differ: in nearly all places they do not."""
    if one == other:
        return
    differing = (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little")
    at = 0
    while at < len(differing):
        rest = differing[at:].lstrip(b"\0")
        if not rest:
            return
        at = len(differing) - len(rest)
        yield at
        at += 1
