"""The handling of one report that a page is bad, from its arrival to its outcome.

`memory_failure` is the story. `TABLE` decides: the first row whose condition fits says what the page is, what is done,
and, with the action's result, what the outcome is; the last row fits everything. A row is added here only together with a
test that reaches it with real processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import IntFlag
from functools import cache
from typing import Any

from hwpoison.core.books import Books
from hwpoison.core.journal import AskedBy, report_of
from hwpoison.core.locks import Held
from hwpoison.core.machine import Frame, StaleFrameError
from hwpoison.core.objects import Kind, Loss, MemoryObject
from hwpoison.core.pages import DIRTY, LOST, POISONED, PRESENT, WRITEBACK
from hwpoison.core.policy import owners_of, pids_of
from hwpoison.core.records import Failure, Outcome, Report, State
from hwpoison.core.recovery import UnreadableError, declare_unreadable, isolate, lose, lose_block, read_in

WAIT_LIMIT_SECONDS = 30.0
"""How long a failure waits for a page that is being read in or written back, before it decides all the same."""
LOCK_REPORT_SECONDS = 1.0
"""A wait longer than this is reported."""
WAKE_AT_ONCE = 8
"""In so many mappings those who met the page while it was away go on at once; in others when their fault is read."""


class Condition(IntFlag):
    """What can be seen of a page from outside."""

    RESERVED = 1
    OWNED = 2
    POISONED = 4
    CLOSED = 8
    PRESENT = 16
    FILE = 32
    ANONYMOUS = 64
    DIRTY = 128


@dataclass(frozen=True, slots=True)
class Place:
    """Where a report points: a page of an object, or a frame or address that is not ours."""

    object: MemoryObject | None = None
    page: int = -1
    reserved: bool = False
    pfn: int | None = None
    quarantined: bool = False
    """The frame was taken out of its object before."""


@dataclass(slots=True)
class Handling:
    """One failure under way: what the actions need and what they leave for the outcome."""

    books: Books
    report: Report
    event_id: str
    place: Place
    asked_by: AskedBy | None = None
    state: State = State.UNKNOWN
    victims: tuple[int, ...] = ()
    reason: str = ""

    @property
    def object(self) -> MemoryObject:
        assert self.place.object is not None
        return self.place.object

    @property
    def page(self) -> int:
        return self.place.page

    def loss(self, outcome: Outcome) -> Loss:
        now = self.books.machine.now()
        return Loss(self.event_id, self.state, outcome, self.reason, self.report.source, now)

    def write_down(self, state: str = "", *, isolated: str = "") -> None:
        """For a successor: this is being handled. If the page has a state, it may be isolated from now on; with `isolated`,
        the outcome of that, it is."""
        self.books.journal.failure(
            self.event_id, self.object, self.page, self.report, self.asked_by, state=state, isolated=isolated
        )


@dataclass(frozen=True, slots=True)
class Row:
    """If `condition & mask == value`, the page is in `state` and `action` is taken."""

    mask: Condition
    value: Condition
    state: State
    action: Callable[[Handling], Awaitable[Outcome]]
    does: str
    """What the action does, for `docs/states.md`."""


async def memory_failure(books: Books, report: Report, asked_by: AskedBy | None = None) -> Failure:
    """Handle `report`. Never raises for what it finds; every way out goes through `_finish`."""
    started = asyncio.get_running_loop().time()
    place = await _locate(books, report)
    handling = Handling(books, report, books.new_event_id(), place, asked_by)
    row = identify(_observe(place))
    if row.state in DECIDED_WITHOUT_LOCK:
        outcome = await _act(handling, row)
        with books.journal.together():
            _record_report(handling)
            return _finish(handling, outcome, started)

    # From here on nobody else handles this page: the flag was clear (else the row had been "already poisoned page").
    with books.journal.together():
        _record_report(handling)
        handling.write_down()
    handling.object.pages.set(POISONED, handling.page)
    return await _handle(handling, started, _act)


Act = Callable[[Handling, Row], Awaitable[Outcome]]


async def _handle(handling: Handling, started: float, act: Act) -> Failure:
    """The page of `handling` is poisoned: lock it, look what it is, and act."""
    object_, page, place = handling.object, handling.page, handling.place
    held = object_.locks.hold(page)
    try:
        if not await _locked(handling, held):
            # What it was before the wait it may not be any more.
            row = identify(_observe(place, own=POISONED))
            handling.state = row.state
            return _finish(handling, Outcome.FAILED, started)
        try:
            await _io_settled(handling)
            row = identify(_observe(place, own=POISONED))
            outcome = await act(handling, row)
        finally:
            object_.locks.release(held)
    finally:
        if not object_.pages.flags[page] & LOST:
            object_.pages.clear(POISONED, page)
    return _finish(handling, outcome, started)


async def _locate(books: Books, report: Report) -> Place:
    """The page that a report means."""
    if report.name is not None:
        object_ = books.find(report.name)
        assert report.offset is not None
        return Place(object_, object_.pages_of(report.offset, 1)[0])
    if report.pfn is not None:
        if books.machine.quarantined(report.pfn):
            return Place(pfn=report.pfn, quarantined=True)
        found = await books.find_frame(report.pfn)
        if found is not None:
            return Place(*found, pfn=report.pfn)
        return Place(pfn=report.pfn, reserved=await books.machine.reserved(number=report.pfn))
    assert report.pid is not None and report.address is not None
    for client in books.clients_of(report.pid):
        mapping = client.find(report.address)
        if mapping is not None:
            return Place(mapping.object, mapping.page(report.address))
    return Place(reserved=await books.machine.reserved(pid=report.pid))


def _observe(place: Place, own: int = 0) -> Condition:
    """The condition of the place, now, but for the flag that the one who looks has set himself.

    It is another's all the same if the page was lost meanwhile, because its file could not be read.
    """
    object_ = place.object
    if object_ is not None:
        flags = object_.pages.flags[place.page]
        return _condition(object_.kind, flags if flags & LOST else flags & ~own, object_.closed)
    if place.quarantined:
        return Condition.OWNED | Condition.POISONED
    return Condition.RESERVED if place.reserved else Condition(0)


@cache
def _condition(kind: Kind, flags: int, closed: bool) -> Condition:
    seen = Condition.OWNED | (Condition.FILE if kind is Kind.FILE else Condition.ANONYMOUS)
    if flags & POISONED:
        seen |= Condition.POISONED
    if closed:
        seen |= Condition.CLOSED
    if flags & PRESENT:
        seen |= Condition.PRESENT
    if flags & (DIRTY | WRITEBACK):
        # What has waited for write-back and is still on its way is not surely in the file.
        seen |= Condition.DIRTY
    return seen


@cache
def identify(condition: Condition) -> Row:
    """The first row that fits."""
    for row in TABLE:
        if condition & row.mask == row.value:
            return row
    raise AssertionError("the last row of the table fits everything")


async def _locked(handling: Handling, held: Held) -> bool:
    """Take the page lock, however long that takes; bounded, and a long wait is reported. False if the bound was met."""
    locks = handling.object.locks
    if locks.free(held.first):
        await locks.acquire(held)
        return True
    for limit in (LOCK_REPORT_SECONDS, WAIT_LIMIT_SECONDS - LOCK_REPORT_SECONDS):
        try:
            async with asyncio.timeout(limit):
                await locks.acquire(held)
        except TimeoutError:
            handling.reason = "the page stayed locked: it is being read in, or a client holds up its own mapping"
            handling.books.record("error", event_id=handling.event_id, detail=handling.reason)
        else:
            handling.reason = ""
            return True
    return False


async def _io_settled(handling: Handling) -> None:
    """Until the locked page is not on its way to its file; bounded."""
    if not handling.object.pages.flags[handling.page] & WRITEBACK:
        return
    try:
        async with asyncio.timeout(WAIT_LIMIT_SECONDS):
            await handling.object.written_back(handling.page)
    except TimeoutError:
        handling.reason = f"write-back did not end within {WAIT_LIMIT_SECONDS:.0f} s"


async def _act(handling: Handling, row: Row) -> Outcome:
    handling.state = row.state
    try:
        return await row.action(handling)
    except StaleFrameError:
        # Compaction has moved the page since it was found: the frame of the report is not ours any more.
        handling.reason = "the page has moved to another frame"
        return Outcome.IGNORED
    except OSError as error:
        # No memory, for instance. The page is as it was, or absent, and then its next access brings it.
        handling.reason = f"the system refused what was needed: {error.strerror}"
        return Outcome.FAILED


def _record_report(handling: Handling) -> None:
    report, place = handling.report, handling.place
    frame = "frame " if report.pfn is not None else ""
    where = () if report.name is not None else (frame + report.where,)
    urgency = "action required" if report.action_required else "action optional"
    handling.books.record(
        "report",
        place.object,
        place.page,
        event_id=handling.event_id,
        pid=report.pid or 0,
        detail=", ".join((str(report.source), urgency, *where)),
    )


def _finish(handling: Handling, outcome: Outcome, started: float) -> Failure:
    """The one way out: make the result, count it, record it, say it."""
    books, place = handling.books, handling.place
    failure = Failure(
        event_id=handling.event_id,
        state=handling.state,
        outcome=outcome,
        victims=handling.victims,
        latency_us=(asyncio.get_running_loop().time() - started) * 1e6,
        name=place.object.name if place.object else None,
        offset=place.page * place.object.page_size if place.object else None,
        nbytes=place.object.nbytes_of(place.page, 1) if place.object else 0,
        reason=handling.reason,
    )
    books.statistics.count(failure)
    with books.journal.together():
        books.journal.failure_over(failure, handling.asked_by, books.statistics)
        books.record(
            "outcome",
            place.object,
            place.page,
            event_id=failure.event_id,
            state=failure.state,
            outcome=failure.outcome,
            detail=failure.reason,
        )
    where = f"{failure.name}+{failure.offset:#x}" if failure.name else handling.report.where
    books.observer.failure(where, failure)
    return failure


# --- the actions -----------------------------------------------------------------------------------------------------


async def _ignore(handling: Handling) -> Outcome:
    return Outcome.IGNORED


async def _already(handling: Handling) -> Outcome:
    """Nothing more can be done for the page; who touched it must learn."""
    handling.reason = "EHWPOISON"
    place = handling.place
    if handling.report.action_required and place.object is not None:
        # Each access to a lost page fails by itself; the victims of this report are those who have it before them.
        handling.victims = tuple(
            sorted(
                {
                    mapping.client.pid
                    for mapping in place.object.mappings.covering(place.page)
                    if handling.report.pid in (None, mapping.client.pid)
                }
            )
        )
    return Outcome.FAILED


async def _foreign(handling: Handling) -> Outcome:
    """Not ours. Handed on to the kernel only where the operator wanted that, and never because of a simulated report."""
    books, report = handling.books, handling.report
    if report.pfn is not None and books.offline_foreign and not report.simulated:
        try:
            await books.machine.offline(report.pfn)
        except OSError as error:
            handling.reason = f"the kernel's hard offline failed: {error.strerror}"
        else:
            handling.reason = "handed to the kernel's hard offline"
    return Outcome.IGNORED


async def _nothing_there(handling: Handling) -> Outcome:
    """No frame is behind an absent page; the next access brings a good one.

    A report that names a frame is another matter: the frame was the page's when it was looked for and has gone back to the
    system since, so nobody has isolated it.
    """
    if handling.place.pfn is not None:
        handling.reason = "the frame has gone back to the system"
        return Outcome.IGNORED
    return Outcome.RECOVERED


async def _lose(handling: Handling) -> Outcome:
    """The only copy is gone: isolate, and tell the owners."""
    books, object_, page = handling.books, handling.object, handling.page
    handling.write_down(handling.state)
    frame = isolate(object_, page, handling.place.pfn)
    if frame is None:
        return _lose_block(handling)
    isolated = _quarantine(handling, object_, frame)
    handling.victims = lose(books, object_, page, handling.loss(isolated))
    return isolated


def _lose_block(handling: Handling) -> Outcome:
    handling.reason = "the page is part of a large frame, which was given up whole"
    handling.victims = lose_block(handling.books, handling.object, handling.page, handling.loss(Outcome.FAILED))
    return Outcome.FAILED


async def _read_again(handling: Handling) -> Outcome:
    """The file has it: isolate, and read it again, at once if anybody maps it."""
    handling.write_down(handling.state)
    frame = isolate(handling.object, handling.page, handling.place.pfn)
    if frame is None:
        return _lose_block(handling)
    isolated = _quarantine(handling, handling.object, frame)
    handling.write_down(handling.state, isolated=isolated)
    await _have_back(handling)
    return isolated


async def _have_back(handling: Handling) -> None:
    """An isolated page of a file is read again, if anybody maps it."""
    books, object_, page = handling.books, handling.object, handling.page
    await object_.watch(page, 1)
    mappings = object_.mappings.covering(page)
    if mappings:
        try:
            await read_in(books, object_, page, 1)
        except UnreadableError as error:
            handling.reason = str(error)
            handling.victims = await declare_unreadable(
                books, object_, page, error, handling.event_id, handling.report.source
            )
        else:
            for mapping in mappings[:WAKE_AT_ONCE]:
                mapping.wake(page)
            books.record("refill", object_, page, event_id=handling.event_id)


async def finish(books: Books, event_id: str, object_: MemoryObject, value: list[Any], *, held: bool) -> Failure:
    """A manager before this one has begun to handle a failure (`value`: as `core.journal` has it). The page is poisoned.

    `held`: the frame that was being isolated when it died is in quarantine.
    """
    _, page, state, isolated, report, asked_by = value
    place = Place(object_, page, pfn=report_of(report).pfn)
    handling = Handling(books, report_of(report), event_id, place, tuple(asked_by) if asked_by else None)

    async def act(handling: Handling, row: Row) -> Outcome:
        loss = object_.losses.get(page)
        if loss is not None and loss.event_id == event_id:
            # Its owners were told, or are in the journal.
            handling.state, handling.reason = loss.state, loss.reason
            handling.victims = pids_of(owners_of(object_, page))
            return loss.outcome
        if isolated or (state and row.state is State.FREE):
            handling.state = State(state)
            outcome = Outcome(isolated) if isolated else Outcome.RECOVERED if held else Outcome.FAILED
            if outcome is Outcome.FAILED:
                handling.reason = "the quarantine is full"
            if handling.state is not State.CLEAN_FILE:
                handling.victims = lose(books, object_, page, handling.loss(outcome))
            elif row.state is State.FREE:
                await _have_back(handling)
            elif row.state is State.CLEAN_FILE:
                books.record("refill", object_, page, event_id=event_id)
            return outcome
        return await _act(handling, row)

    return await _handle(handling, asyncio.get_running_loop().time(), act)


def _quarantine(handling: Handling, object_: MemoryObject, frame: Frame) -> Outcome:
    """Hold the frame for ever. Where the system allows no more of that, it goes back to it: the page is recovered, the
    frame is not isolated."""
    handling.books.reclaim.left(object_, 1)
    try:
        frame.quarantine()
    except OSError as error:
        handling.reason = f"the quarantine is full: {error.strerror}"
        return Outcome.FAILED
    handling.books.statistics.quarantined += 1
    return Outcome.RECOVERED


C = Condition
TABLE: tuple[Row, ...] = (
    Row(C.RESERVED, C.RESERVED, State.RESERVED, _ignore, "nothing: it is the manager's own memory"),
    Row(C.OWNED | C.POISONED, C.OWNED | C.POISONED, State.ALREADY_POISONED, _already,
        "nothing more: the first report is or was handled; EHWPOISON, not counted twice"),
    Row(C.OWNED | C.CLOSED, C.OWNED | C.CLOSED, State.TRUNCATED, _ignore, "nothing: nobody can reach it any more"),
    Row(C.OWNED | C.PRESENT, C.OWNED, State.FREE, _nothing_there, "nothing is there; the next access gets a good frame"),
    Row(C.OWNED | C.FILE | C.DIRTY, C.OWNED | C.FILE | C.DIRTY, State.DIRTY_FILE, _lose,
        "isolated; the content is lost, the owners are told, flush() raises EIO once per handle"),
    Row(C.OWNED | C.FILE, C.OWNED | C.FILE, State.CLEAN_FILE, _read_again,
        "isolated and read again from the file; nobody is told"),
    Row(C.OWNED | C.ANONYMOUS, C.OWNED | C.ANONYMOUS, State.ANONYMOUS, _lose,
        "isolated; the content is lost, the owners are told"),
    Row(C(0), C(0), State.UNKNOWN, _foreign, "nothing: it is not this manager's memory; see serve --offline-foreign"),
)  # fmt: skip
"""All that a page can be. `docs/states.md` is made from this."""

DECIDED_WITHOUT_LOCK = (State.RESERVED, State.ALREADY_POISONED, State.UNKNOWN)
"""States that no wait can change."""
