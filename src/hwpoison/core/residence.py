"""Ranges that are fit for system calls: present, never dropped and, for writing, not watched.

Where a userfaultfd is in user mode, a system call that would have to ask the manager fails. Within a range that is resident
it does not have to, unless a page of it fails meanwhile: then the call is refused, loudly, as it is anywhere.
"""

from __future__ import annotations

from hwpoison.core.books import WINDOW_BYTES, Books
from hwpoison.core.faults import note_dirt
from hwpoison.core.mappings import Mapping
from hwpoison.core.objects import MemoryObject
from hwpoison.core.pages import LOST, PRESENT
from hwpoison.core.recovery import UnreadableError, declare_unreadable, read_in
from hwpoison.errors import PoisonError


async def begin(books: Books, mapping: Mapping, number: int, first: int, count: int, *, write: bool) -> None:
    """Make the pages resident until `end`, by a number of the client's own. Asked twice, it is done once.

    Raises `PoisonError` if bytes of them are lost, OSError (ENOMEM) for more than the memory limit lets stay and
    PermissionError. Locks the pages, a window at a time.
    """
    object_ = mapping.object
    if write and not object_.writable:
        raise PermissionError(f"{object_.name!r} is open read-only; open it with mode 'r+'")
    if mapping.gone:
        raise FileNotFoundError(f"{object_.name!r} was closed")
    end(books, mapping, number)
    books.reclaim.require_resident(object_, count)
    mapping.resident[number] = (first, count, write)
    count_pages(mapping, number, 1)
    books.journal.resident(mapping, number)
    try:
        window = object_.pages_in(WINDOW_BYTES)
        for start in range(first, first + count, window):
            await _bring(books, mapping, start, min(window, first + count - start), write=write)
    except BaseException:
        end(books, mapping, number)
        raise


async def _bring(books: Books, mapping: Mapping, first: int, count: int, *, write: bool) -> None:
    object_ = mapping.object
    async with object_.locks.hold(first, count):
        if object_.closed:
            raise FileNotFoundError(f"{object_.name!r} was closed")
        for start, length in _absent(object_, first, count):
            try:
                await read_in(books, object_, start, length)
            except UnreadableError:
                await _bring_each(books, object_, start, length)
        lost = object_.lost(first, count)
        if lost:
            raise PoisonError(lost)
        if write and mapping.watched:
            await note_dirt(mapping, first, count)


async def _bring_each(books: Books, object_: MemoryObject, first: int, count: int) -> None:
    for page in range(first, first + count):
        if not object_.is_present(page):
            try:
                await read_in(books, object_, page, 1)
            except UnreadableError as error:
                await declare_unreadable(books, object_, page, error)


def _absent(object_: MemoryObject, first: int, count: int) -> list[tuple[int, int]]:
    """The runs of pages that are neither here nor lost."""
    runs: list[tuple[int, int]] = []
    for page in range(first, first + count):
        if not object_.pages.flags[page] & (PRESENT | LOST):
            if runs and sum(runs[-1]) == page:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((page, 1))
    return runs


def end(books: Books, mapping: Mapping, number: int) -> None:
    """They may be dropped, and are watched again, as soon as that is of use."""
    if number in mapping.resident:
        count_pages(mapping, number, -1)
        del mapping.resident[number]
        books.journal.resident_over(mapping, number)


def count_pages(mapping: Mapping, number: int, by: int) -> None:
    """How often each page of the object is resident."""
    counted = mapping.object.resident
    first, count, _ = mapping.resident[number]
    for page in range(first, first + count):
        counted[page] += by
        if not counted[page]:
            del counted[page]
