"""What happens when a client touches a page that it can't have at once.

Three things can be the matter: the page is absent (bring it in), it is lost (say so), or it is watched for its first
write (note the dirt). Each fault ends with a wake, whatever happens: a thread that sleeps in a fault cannot help itself.
"""

from __future__ import annotations

from contextlib import suppress

from hwpoison.core.books import WINDOW_BYTES, Books
from hwpoison.core.locks import Held
from hwpoison.core.machine import Content
from hwpoison.core.mappings import Client, Mapping
from hwpoison.core.objects import MemoryObject
from hwpoison.core.pages import DIRTY, LOST, POISONED, PRESENT
from hwpoison.core.policy import answer_lost, signal_or_kill
from hwpoison.core.readahead import next_window
from hwpoison.core.recovery import UnreadableError, declare_unreadable, read_in, room

WRITE_AROUND_BYTES = 256 << 10
"""Most that one fault declares dirty, when writes are sequential: a failure would lose any page of it."""


def fault(books: Books, client: Client, address: int, thread: int, *, write: bool, protected: bool) -> None:
    """A thread of `client` sleeps in a fault at `address` (page aligned). Called by the machine; never waits."""
    books.statistics.faults += 1
    mapping = client.find(address)
    if mapping is None:
        # The client has told us of no mapping here. It must not be woken into the same fault for ever.
        signal_or_kill(books, client, address, thread)
        client.space.wake(address, client.page_size)
        return
    page = mapping.page(address)
    if not books.machine.poison_markers:
        mapping.sleeps(thread, page)
    if protected or not _at_once_or_not(books, mapping, page, write):
        books.start(_served(books, mapping, page, thread, write, protected), f"fault of {client.number}")
    elif client.told:
        client.forget_told(address)


def _at_once_or_not(books: Books, mapping: Mapping, page: int, write: bool) -> bool:
    try:
        return _at_once(books, mapping, page, write)
    except OSError:
        # It is tried again with all that can be done about it; the accessor must not sleep on.
        return False


def _at_once(books: Books, mapping: Mapping, page: int, write: bool) -> bool:
    """The common cases, without a task: the page has come meanwhile, or is one page of a cached file, or of zeros."""
    object_ = mapping.object
    if not object_.locks.free(page):
        return False
    flags = object_.pages.flags[page]
    if flags & PRESENT:
        mapping.wake(page)
        return True
    if flags or page in mapping.reads or (write and object_.tracks_dirt) or not room(books, object_, 1):
        return False
    backing = object_.backing
    if backing is None:
        content: Content = books.zeros(1)
    else:
        if backing.writing or books.lost_changes_of[backing.place]:
            return False
        nbytes = object_.nbytes_of(page, 1)
        found = backing.file.read_cached(backing.offset + page * object_.page_size, nbytes)
        if found is None:
            return False
        # The identity is that after the read: a change before or during it is seen.
        cached, identity = found
        if len(cached) < nbytes or identity != backing.identity:
            return False
        content = cached if nbytes == object_.page_size else bytes(cached).ljust(object_.page_size, b"\0")
    object_.store.publish(page, content)
    object_.pages.arrived(page, 1, books.reclaim.arrived(object_, 1))
    mapping.wake(page)
    if backing is not None:
        books.statistics.pages_read += 1
    next_window(mapping.reads, page, 1)
    return True


async def _served(books: Books, mapping: Mapping, page: int, thread: int, write: bool, protected: bool) -> None:
    try:
        if protected:
            await _first_write(books, mapping, page, thread)
        else:
            await _missing(books, mapping, page, thread, write)
        if mapping.client.told and mapping.object.pages.flags[page] & PRESENT:
            mapping.client.forget_told(mapping.address_of(page))
    except Exception as error:  # noqa: BLE001
        # No memory, or a defect of ours. The page is what it was and nothing is lost, but nobody may sleep for ever: this
        # access fails, loudly, and the next one may succeed.
        books.observer.defect(f"fault at page {page} of {mapping.object.name}", error)
        signal_or_kill(books, mapping.client, mapping.address_of(page), thread, (mapping.object, page))
    finally:
        mapping.wake(page)


async def _missing(books: Books, mapping: Mapping, page: int, thread: int, write: bool) -> None:
    object_ = mapping.object
    window = next_window(mapping.reads, page, min(object_.pages_in(WINDOW_BYTES), books.reclaim.largest_window))
    window = max(1, object_.pages.absent_from(page, window))
    async with object_.locks.hold(page, window) as held:
        flags = object_.pages.flags[page]
        if flags & LOST or object_.closed:
            await answer_lost(books, mapping, page, thread)
        elif flags & PRESENT:
            return
        else:
            # While this waited for the lock, others may have brought pages of the window in.
            window = max(1, object_.pages.absent_from(page, window))
            try:
                await bring_in(books, object_, held, window, mapping if write else None, mapping)
            except UnreadableError as error:
                await declare_unreadable(books, object_, page, error)
                await answer_lost(books, mapping, page, thread)


async def bring_in(
    books: Books,
    object_: MemoryObject,
    held: Held,
    count: int,
    writer: Mapping | None,
    waiter: Mapping | None,
) -> None:
    """Bring in `count` absent pages from the front of `held`: together, as each piece costs two hand-overs to a worker, or
    page by page if they can't be had together, letting go of each.

    `writer` is about to write to the first page; `waiter` sleeps on it. Raises `UnreadableError` if the first page can't
    be had; if a later one can't, that is found when somebody wants it.
    """
    first = held.first
    piece = count
    while count:
        page, piece = held.first, min(count, piece)
        try:
            await read_in(books, object_, page, piece)
        except UnreadableError:
            if piece > 1:
                piece = 1
                continue
            if page > first:
                return
            raise
        if page == first:
            if writer is not None and object_.tracks_dirt:
                await note_dirt(writer, page, 1)
            if waiter is not None:
                waiter.wake(page)
        count -= piece
        if count:
            held.release_front(piece)


async def _first_write(books: Books, mapping: Mapping, page: int, thread: int) -> None:
    object_ = mapping.object
    window = next_window(mapping.writes, page, object_.pages_in(WRITE_AROUND_BYTES))
    window = min(window, object_.pages.count - page)
    async with object_.locks.hold(page, window):
        flags = object_.pages.flags
        if flags[page] & LOST or object_.closed:
            await answer_lost(books, mapping, page, thread)
            return
        count = 0
        while count < window and flags[page + count] & (PRESENT | POISONED) == PRESENT:
            count += 1
        # An absent page: taken away while this fault waited. It comes again as a missing page.
        if count:
            await note_dirt(mapping, page, count)


async def note_dirt(mapping: Mapping, first: int, count: int) -> None:
    """Present pages, locked, are about to be written to through `mapping`: first note it, then let it happen."""
    for page in range(first, first + count):
        mapping.object.pages.set(DIRTY, page)
    # Taking the protection away wakes who sleeps at it.
    mapping.woken(first, count)
    await mapping.client.space.unprotect(mapping.address_of(first), count * mapping.object.page_size)


async def prefetch(books: Books, object_: MemoryObject, first: int, count: int) -> None:
    """Bring pages in that are absent and well. Those that can't be had are left for their access."""
    page, end = first, first + count
    while page < end:
        window = object_.pages.absent_from(page, min(end - page, object_.pages_in(WINDOW_BYTES)))
        if window:
            async with object_.locks.hold(page, window) as held:
                window = object_.pages.absent_from(page, window)
                if object_.closed:
                    return
                if window:
                    with suppress(UnreadableError):
                        await bring_in(books, object_, held, window, None, None)
        page += max(1, window)
