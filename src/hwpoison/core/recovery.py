"""Content comes, goes, and comes back: reading in, losing, repairing, discarding.

Everything here works on pages that the caller has locked, or locks them itself where it says so.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import replace

from hwpoison.core.books import Books
from hwpoison.core.machine import Content, Frame, NotIsolatedError, Result
from hwpoison.core.mappings import Mapping
from hwpoison.core.objects import Backing, Loss, MemoryObject
from hwpoison.core.pages import DIRTY, LOST, POISONED, PRESENT, WRITEBACK
from hwpoison.core.policy import tell_owners
from hwpoison.core.records import Outcome, Source, State
from hwpoison.core.writeback import write_back_some
from hwpoison.errors import PoisonError

FRESH_READS = 10
"""How often a page is read that is to be had in whatever version, while others change the file."""


class UnreadableError(Exception):
    """The file can't give the content that belongs here; the message says why."""


async def read_in(books: Books, object_: MemoryObject, first: int, count: int) -> None:
    """Make absent, locked pages present with what belongs there. Raises `UnreadableError`."""
    await make_room(books, object_, count)
    with books.reclaim.coming(object_, count):
        if object_.backing is None:
            content: Content = books.zeros(count)
        else:
            content = await _read_in_time(books, object_, first, count)
            books.statistics.pages_read += count
        await _publish(books, object_, first, count, content)


async def make_room(books: Books, coming: MemoryObject, count: int) -> None:
    """Make room for `count` pages of an object, writing dirty pages back if need be.

    Gives up, over the limit, where nothing helps.
    """
    reclaim = books.reclaim
    written_back = False
    while not room(books, coming, count):
        victim = reclaim.oldest_run(reclaim.over(coming, count))
        if victim is not None:
            object_, first, length = victim
            # Nobody holds the lock (else it were no victim), so this does not wait.
            async with object_.locks.hold(first, length):
                drop(books, object_, first, length)
                await object_.watch(first, length)
        elif not written_back:
            written_back = True
            # A file system that does not answer must not keep somebody asleep who wants something else.
            writing = books.start(_write_back_some(books, count + reclaim.for_files // 8), "write-back to make room")
            with suppress(TimeoutError):
                await books.machine.in_time(asyncio.shield(writing))
        else:
            return


async def _write_back_some(books: Books, count: int) -> None:
    for object_ in books.objects():
        if object_.tracks_dirt:
            await write_back_some(books, object_, count)


def room(books: Books, coming: MemoryObject, count: int) -> bool:
    """Make room for `count` pages of an object without waiting, if that is possible; whether there is room."""
    while (over := books.reclaim.over(coming, count)) > 0:
        victim = books.reclaim.oldest_run(over)
        if victim is None or victim[0].tracks_dirt:
            return False
        drop(books, *victim)
    return True


def drop(books: Books, object_: MemoryObject, first: int, count: int) -> None:
    """Drop clean, unlocked pages of one unit (`core.reclaim`)."""
    try:
        books.reclaim.drop(object_, first, count)
    except NotIsolatedError as error:
        why = str(error.strerror)
        loss = Loss(books.new_event_id(), State.CLEAN_FILE, Outcome.FAILED, why, time=books.machine.now())
        lose_block(books, object_, first, loss)
        books.record("error", object_, first, event_id=loss.event_id, detail=loss.reason)


async def _publish(books: Books, object_: MemoryObject, first: int, count: int, content: Content, flags: int = 0) -> None:
    try:
        if count <= object_.pages_in(books.machine.publish_at_once_bytes):
            object_.store.publish(first, content)
        else:
            await object_.store.fill(first, content)
    except OSError:
        # No memory, for instance. What did come may be in use already, so it stays, and is known to be there.
        for page in range(first, first + count):
            if object_.store.present(page):
                object_.pages.arrived(page, 1, books.reclaim.arrived(object_, 1), flags)
        raise
    object_.pages.arrived(first, count, books.reclaim.arrived(object_, count), flags)


async def _read_in_time(books: Books, object_: MemoryObject, first: int, count: int) -> Content:
    """As `_read_version`: somebody may sleep in a fault, and can do nothing for himself."""
    try:
        return await books.machine.in_time(_read_version(books, object_, first, count))
    except TimeoutError:
        limit = books.machine.io_seconds_max
        raise UnreadableError(f"the file system has not given it within {limit:g} s") from None


async def _read_version(books: Books, object_: MemoryObject, first: int, count: int) -> Content:
    """What the file holds, in the version that the object shows, in whole pages."""
    backing = object_.backing
    assert backing is not None
    offset, nbytes = backing.offset + first * object_.page_size, object_.nbytes_of(first, count)
    _none_lost_elsewhere(books, object_, offset, nbytes)
    try:
        content = await _read_unchanged(backing, offset, nbytes)
        if content is None:
            # Beside an own write, which changes the file's times, the identity says nothing. So it is read once more in
            # turn with the writes, of which there may be no end.
            async with backing.turn:
                content = await _read_unchanged(backing, offset, nbytes)
        if content is not None:
            # Changes to it may have been lost while it was read.
            _none_lost_elsewhere(books, object_, offset, nbytes)
            return _whole_pages(content, count * object_.page_size)
        how = backing.how_changed(await backing.file.identity(), offset + nbytes)
    except OSError as error:
        raise UnreadableError(f"reading the file failed: {error.strerror}") from error
    raise UnreadableError(how)


def _none_lost_elsewhere(books: Books, object_: MemoryObject, offset: int, nbytes: int) -> None:
    """Raises `UnreadableError` if the file does not hold what belongs here, as another object over it has lost that."""
    other = books.lost_elsewhere(object_, offset, nbytes)
    if other is not None:
        raise UnreadableError(
            f"changes to these bytes of the file that were made as {other.name!r} are lost: repair() and flush() them "
            "there, or discard() them, then discard() here"
        )


async def _read_unchanged(backing: Backing, offset: int, nbytes: int) -> Content | None:
    """What the file holds, None if that may be of another version."""

    async def unchanged() -> bool:
        now = await backing.file.identity()
        return not backing.writing and now == backing.identity

    content = await backing.file.read(offset, nbytes) if await unchanged() else b""
    return content if len(content) == nbytes and await unchanged() else None


def _whole_pages(content: Content, nbytes: int) -> Content:
    return content if len(content) == nbytes else bytes(content).ljust(nbytes, b"\0")


async def declare_unreadable(
    books: Books,
    object_: MemoryObject,
    page: int,
    error: UnreadableError,
    event_id: str | None = None,
    source: str = Source.MANAGER,
) -> tuple[int, ...]:
    """A locked, absent page can't be had back: it is lost. The pids of its owners."""
    event_id, now = event_id or books.new_event_id(), books.machine.now()
    loss = Loss(event_id, State.CLEAN_FILE, Outcome.RECOVERED, str(error), source, now)
    books.record("error", object_, page, event_id=loss.event_id, detail=loss.reason)
    return lose(books, object_, page, loss)


def isolate(object_: MemoryObject, page: int, number: int | None = None) -> Frame | None:
    """Take a present, locked page out for good; None where that is impossible: then its block must be given up.

    Raises `StaleFrameError` if the page is not in frame `number` any more. Objects are made
    of single frames; where the kernel collapsed some into a large one all the same, a punch zeroes the page in place, so
    the block is given up whole: loud, and never a wrong byte.
    """
    try:
        frame = object_.store.take(page, number)
    except NotIsolatedError:
        return None
    object_.pages.left(page, 1)
    assert frame is not None, f"page {page} of {object_.name} was said to be present"
    return frame


def lose_block(books: Books, object_: MemoryObject, page: int, loss: Loss) -> tuple[int, ...]:
    """The large frame that holds `page` can't be split: all its present pages are dropped and lost."""
    block = object_.unit_pages
    first = page // block * block
    count = min(block, object_.pages.count - first)
    # Before all else: until this is done, what is left of the frame reads as zeros.
    object_.store.drop(first, count)
    present = list(object_.pages.runs(PRESENT, first, count))
    changed: set[int] = {page for page in range(first, first + count) if object_.pages.flags[page] & (DIRTY | WRITEBACK)}
    victims: set[int] = set()
    for start, length in present:
        books.reclaim.left(object_, length)
        for one in range(start, start + length):
            # What the file does not have is lost as that, whatever the page was that brought all this about.
            one_loss = replace(loss, state=State.DIRTY_FILE) if one in changed else loss
            victims.update(lose(books, object_, one, one_loss))
    return tuple(sorted(victims))


def lose(books: Books, object_: MemoryObject, page: int, loss: Loss) -> tuple[int, ...]:
    """A page that is not in memory any more is lost from now on: its owners are told. Their pids."""
    changed = loss.state is State.DIRTY_FILE and object_.backing is not None
    with books.journal.together():
        # The loss, and that its owners are to be told: both or neither.
        books.journal.loss(object_, page, loss, untold=changed)
        if changed:
            object_.error_sequence += 1
            books.journal.errors(object_)
        note_loss(books, object_, page, loss, untold=changed)
        victims = tell_owners(books, object_, page, loss)
    # Only now that it is written down: a successor that finds no record knows by the flags that there was something.
    if object_.pages.flags[page] & PRESENT:
        object_.pages.left(page, 1)
    object_.pages.set(LOST, page)
    object_.pages.set(POISONED, page)
    return victims


def note_loss(books: Books, object_: MemoryObject, page: int, loss: Loss, *, untold: bool) -> None:
    """It is among the losses from now on."""
    object_.losses[page] = loss
    if untold:
        object_.untold.add(page)
    if loss.state is State.DIRTY_FILE and object_.backing is not None:
        books.lost_changes_of[object_.backing.place] += 1


async def repair(books: Books, object_: MemoryObject, offset: int, data: Content) -> int:
    """Give the lost pages among those that `data` covers their right content, in one step each; the bytes repaired.

    `data` begins at a page and ends at one, or at the object's end: half a page cannot be had back. Locks the pages.
    """
    first, count = object_.pages_of(offset, len(data))
    if not object_.writable:
        raise PermissionError(f"{object_.name!r} is read-only; discard() gives what the file holds now")
    if offset % object_.page_size or len(data) != object_.nbytes_of(first, count):
        raise ValueError(
            f"repair needs whole pages: start at a multiple of {object_.page_size} and end at one, or at the end of "
            f"{object_.name!r} ({object_.nbytes} bytes); lost pages are in lost()"
        )
    repaired = 0
    for page in _lost_pages(object_, first, count):
        start = (page - first) * object_.page_size
        content = _whole_pages(data[start : start + object_.page_size], object_.page_size)
        repaired += await _revive(books, object_, page, content, "repair")
    return repaired


async def discard(books: Books, object_: MemoryObject, first: int, count: int) -> int:
    """Give lost pages fresh content: zeros, or what the file holds now. Returns the bytes discarded. Locks the pages."""
    discarded = 0
    for page in _lost_pages(object_, first, count):
        discarded += await _revive(books, object_, page, None, "discard")
    return discarded


async def write(books: Books, object_: MemoryObject, offset: int, data: Content) -> None:
    """Store bytes for a client that must not meet a signal. Lost pages that `data` covers whole are repaired.

    Raises `PoisonError`, with nothing written, if a lost page is covered in part, PermissionError, ValueError. Locks the
    pages, all of them at once: `data` is one message's worth.
    """
    first, count = object_.pages_of(offset, len(data))
    if not object_.writable:
        raise PermissionError(f"{object_.name!r} is open read-only; open it with mode 'r+'")
    if not count:
        return
    async with object_.locks.hold(first, count):
        if object_.closed:
            raise FileNotFoundError(f"{object_.name!r} was closed")
        parts = [_part(object_, offset, data, page) for page in range(first, first + count)]
        flags = object_.pages.flags
        for page, (_, _, whole) in enumerate(parts, first):
            if not whole and not flags[page] & (PRESENT | LOST):
                try:
                    await read_in(books, object_, page, 1)
                except UnreadableError as error:
                    await declare_unreadable(books, object_, page, error)
        refused = [page for page, (_, _, whole) in enumerate(parts, first) if flags[page] & LOST and not whole]
        if refused:
            raise PoisonError(object_.range_of(page) for page in refused)
        for page, (start, part, whole) in enumerate(parts, first):
            if flags[page] & LOST:
                await _revive_locked(books, object_, page, _whole_pages(part, object_.page_size), "repair")
            elif flags[page] & PRESENT:
                # No client's store is seen as a fault here, so the dirt is noted by hand, and first.
                dirty = DIRTY if object_.tracks_dirt and not flags[page] & DIRTY else 0
                object_.pages.set(dirty, page)
                try:
                    object_.store.write(start, part)
                except OSError:
                    # The kernel has declared the page bad. It is what it was, for whoever asks what is lost with it.
                    object_.pages.clear(dirty, page)
                    raise
            else:
                assert whole
                await make_room(books, object_, 1)
                dirty = DIRTY if object_.tracks_dirt else 0
                # Before it is there: to a successor, a page that has come and has no flags is what the file holds.
                object_.pages.set(dirty, page)
                try:
                    await _publish(books, object_, page, 1, _whole_pages(part, object_.page_size), dirty)
                finally:
                    if not object_.is_present(page):
                        object_.pages.clear(dirty, page)


def _part(object_: MemoryObject, offset: int, data: Content, page: int) -> tuple[int, Content, bool]:
    """What `data` at `offset` has for `page`: where it begins in the object, the bytes, and whether that is all of it."""
    begin = max(offset, page * object_.page_size)
    end = min(offset + len(data), (page + 1) * object_.page_size)
    whole = begin == page * object_.page_size and end - begin == object_.nbytes_of(page, 1)
    return begin, data[begin - offset : end - offset], whole


def _lost_pages(object_: MemoryObject, first: int, count: int) -> list[int]:
    return [page for run in object_.pages.runs(LOST, first, count) for page in range(run[0], run[0] + run[1])]


async def _revive(books: Books, object_: MemoryObject, page: int, content: Content | None, kind: str) -> int:
    async with object_.locks.hold(page):
        if not object_.pages.flags[page] & LOST or object_.closed:
            return 0
        return await _revive_locked(books, object_, page, content, kind)


async def _revive_locked(books: Books, object_: MemoryObject, page: int, content: Content | None, kind: str) -> int:
    """A lost, locked page becomes a page with `content` (None: fresh). Nobody sees anything else in between."""
    nbytes = object_.nbytes_of(page, 1)
    dirty = DIRTY if object_.tracks_dirt and content is not None else 0
    # A write that hung may still be on its way: what the file holds is not known before it has ended.
    await _answered(books, object_.written_back(page))
    if content is None:
        content = await _answered(books, _fresh(books, object_, page, nbytes))
    await make_room(books, object_, 1)
    await object_.watch(page, 1)
    loss = object_.losses[page]
    books.journal.loss(object_, page, loss, untold=page in object_.untold, reviving=kind)
    object_.pages.set(dirty, page)
    try:
        object_.store.publish(page, content)
    except OSError:
        object_.pages.clear(dirty, page)
        raise
    del object_.losses[page]
    object_.untold.discard(page)
    if loss.state is State.DIRTY_FILE and object_.backing is not None:
        books.lost_changes_of[object_.backing.place] -= 1
    object_.pages.clear(LOST | POISONED, page)
    object_.pages.arrived(page, 1, books.reclaim.arrived(object_, 1), dirty)
    await well_again(books, object_, page, loss, kind)
    return nbytes


async def _answered(books: Books, story: Awaitable[Result]) -> Result:
    """What a file says. The page is locked, and somebody may sleep at it: raises OSError if that takes too long."""
    try:
        return await books.machine.in_time(story)
    except TimeoutError:
        limit = books.machine.io_seconds_max
        raise OSError(errno.ETIMEDOUT, f"the file system has not answered within {limit:g} s; try again later") from None


async def well_again(books: Books, object_: MemoryObject, page: int, loss: Loss, kind: str) -> None:
    """A present, locked page was lost, and is not any more: where it has poison markers, it takes their place."""
    for mapping in object_.mappings.covering(page):
        mapping.client.forget_told(mapping.address_of(page))
        if page in mapping.markers:
            await _unmark(mapping, page)
    with books.journal.together():
        if page not in object_.losses:
            # Only now: a successor must not forget a marker.
            books.journal.loss_over(object_, page)
        books.record(kind, object_, page, event_id=loss.event_id)


async def _unmark(mapping: Mapping, page: int) -> None:
    """A present, locked page takes the place of its poison marker."""
    object_ = mapping.object
    try:
        await mapping.client.space.unpoison(mapping.address_of(page), protect=mapping.watched)
    except OSError:
        if object_.is_present(page):
            raise
        # Its large frame was given up meanwhile: it is lost again, and the marker is right.
    else:
        mapping.markers.discard(page)


async def _fresh(books: Books, object_: MemoryObject, page: int, nbytes: int) -> Content:
    """Zeros, or what the file holds now, in whatever version, but in one. Raises OSError if the file can't be read."""
    backing = object_.backing
    if backing is None:
        return books.zeros(1)
    async with backing.turn:
        for _ in range(FRESH_READS):
            before = await backing.file.identity()
            content = await backing.file.read(backing.offset + page * object_.page_size, nbytes)
            if await backing.file.identity() == before:
                break
        else:
            raise OSError(f"the file of {object_.name!r} is being changed by somebody else all the time; try again later")
    if len(content) < nbytes:
        raise OSError(f"the file of {object_.name!r} has shrunk and holds nothing here: repair() the bytes, or close it")
    return _whole_pages(content, object_.page_size)
