"""Writing dirty pages of a writable file back.

A piece of dirty pages is locked, watched for writes again, noted as clean and on its way, copied, and let go of; then the
copy is written. A store that comes meanwhile makes its page dirty again and is written the next time; a page that is
resident for writing (`core.residence`) stays dirty. A page is not clean before the write has ended, so a failure that
strikes it waits for that (`core.failure`).
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator

from hwpoison.core.books import WINDOW_BYTES, Books
from hwpoison.core.mappings import Mapping
from hwpoison.core.objects import MemoryObject
from hwpoison.core.pages import DIRTY, POISONED, PRESENT, WRITEBACK

STRUCK = DIRTY | POISONED


class UnwrittenError(OSError):
    """What is dirty could not all be written. It still is dirty: nothing is lost by it."""

    errors = 0
    """How many `Mapping.errors` are told by this."""


async def flush(books: Books, mapping: Mapping) -> None:
    """All that was dirty is in the file and on the disk when this returns.

    Raises `UnwrittenError`, with what the file system says, as often as that does not take everything. Else OSError (EIO),
    once for this mapping, if dirty content was lost since it came or was last told, or if another handle's flush met an
    fsync that failed.
    """
    object_ = mapping.object
    error, met = await _write_back(books, object_)
    # It hears of it now.
    mapping.error_seen += met
    if error is not None:
        others = "; others were lost, see lost()" if mapping.error_seen != mapping.errors or object_.lost_changes else ""
        unwritten = UnwrittenError(
            error.errno or errno.EIO,
            f"changes to {object_.name!r} could not be written: {error.strerror or error}; they stay in memory while "
            f"somebody has it open, and flush() can be tried again{others}",
        )
        unwritten.errors = met
        raise unwritten
    if mapping.heir and object_.untold:
        mapping.errors_apart += 1
    inherited, mapping.heir = mapping.heir, False
    if inherited:
        books.journal.mapping(mapping)
    if mapping.error_seen != mapping.errors:
        mapping.error_seen = mapping.errors
        books.journal.losses_told(object_)
        object_.untold.clear()
        raise OSError(errno.EIO, f"changes to {object_.name!r} were lost or could not be written; see lost()")


async def write_back_all(books: Books, object_: MemoryObject) -> OSError | None:
    """Write every page back that is dirty now, to the disk. The first error; its pages stay dirty."""
    error, _ = await _write_back(books, object_)
    return error


async def _write_back(books: Books, object_: MemoryObject) -> tuple[OSError | None, int]:
    """As `write_back_all`, and how many errors each handle is to be told of for that: who has asked for it hears so now."""
    backing = object_.backing
    if backing is None or not backing.writable:
        return None, 0
    failed: OSError | None = None
    met = 0
    # What another flush has on its way is waited for too, and written again if that fails.
    pieces = _pieces(object_, DIRTY) + _pieces(object_, WRITEBACK)
    # Whoever writes them: they are on the disk only when the sync below says so.
    written = list(pieces)
    syncing = books.new_number()
    books.journal.syncing(object_, syncing, written)
    while pieces:
        first, count = pieces.pop(0)
        error, struck = await _write_back_piece(books, object_, first, count)
        failed = failed or error
        # What was struck is for its failure to decide, which is next at the lock; if that leaves it as it is, it is written.
        pieces += [(page, 1) for page in struck]
    # What was written to make room may be in memory no more, and this sync decides what becomes of it.
    others, object_.unsynced = object_.unsynced, False
    if others:
        books.journal.syncing(object_, syncing, written, others=True)
        books.journal.syncs(object_)
    try:
        await backing.file.sync()
    except OSError as error:
        # Whether the disk has what was written is not known: it is still the memory that holds it.
        failed = failed or error
        for first, count in written:
            _dirty_again(object_, first, count)
        # But what was written earlier and is not in memory any more may be lost, of every handle.
        met = 1
        object_.error_sequence += met
        books.journal.errors(object_)
    books.journal.synced(object_, syncing)
    if failed is not None:
        _note(books, object_, failed)
    return failed, met


async def write_back_some(books: Books, object_: MemoryObject, wanted: int) -> None:
    """Write about `wanted` dirty pages back so that they can be dropped; not to the disk yet, and waiting for no lock.

    It is called by somebody who holds page locks. What may be dropped only together (`core.reclaim`) is written together.
    """
    last = 0
    for first, count in _pieces(object_, DIRTY):
        if wanted <= 0 and first > last:
            return
        busy = any(object_.pages.flags[page] & WRITEBACK for page in range(first, first + count))
        if busy or object_.closed or not object_.locks.free(first, count):
            continue
        _note_unsynced(books, object_)
        error, _ = await _write_back_piece(books, object_, first, count)
        # A sync that has begun meanwhile may have been too early for it.
        _note_unsynced(books, object_)
        if error is not None:
            _note(books, object_, error)
            return
        wanted -= count
        unit_pages = object_.unit_pages
        last = (first + count - 1) // unit_pages * unit_pages + unit_pages - 1


def _note_unsynced(books: Books, object_: MemoryObject) -> None:
    if not object_.unsynced:
        object_.unsynced = True
        books.journal.unsynced(object_)


def _pieces(object_: MemoryObject, flag: int) -> list[tuple[int, int]]:
    """The runs of pages that have the flag, in pieces, none of which reaches into two windows."""
    window, pieces = object_.pages_in(WINDOW_BYTES), []
    for first, count in object_.pages.runs(flag):
        start, end = first, first + count
        while start < end:
            length = min(window - start % window, end - start)
            pieces.append((start, length))
            start += length
    return pieces


def _note(books: Books, object_: MemoryObject, error: OSError) -> None:
    """What could not be written stays dirty: nothing is lost, and only who asked for it is told."""
    books.record("error", object_, detail=f"write-back failed: {error.strerror}")


async def _write_back_piece(books: Books, object_: MemoryObject, first: int, count: int) -> tuple[OSError | None, list[int]]:
    """Write what is dirty of the pages. An error, and the dirty pages that were left out as a failure has struck them."""
    async with object_.locks.hold(first, count):
        if object_.closed:
            return None, []
        for page in range(first, first + count):
            # Two flushes of one object: the second waits for the first one's write, or it would overtake it.
            await object_.written_back(page)
        unwatched = await object_.watch_again(first, count)
        copies, failed = _copied(object_, _well(object_, first, count))
        struck = [page for page in range(first, first + count) if object_.pages.flags[page] & STRUCK == STRUCK]
        runs = [(start, length) for start, length, _ in copies]
        for start, length in runs:
            for page in range(start, start + length):
                # In this order: whenever this process is killed, the page counts as changed.
                object_.pages.set(WRITEBACK, page)
                if page not in unwatched:
                    object_.pages.clear(DIRTY, page)
    try:
        for start, length, copy in copies:
            error = await _write(books, object_, start, length, copy)
            if error is not None:
                failed = failed or error
                _dirty_again(object_, start, length)
    finally:
        for start, length in runs:
            for page in range(start, start + length):
                object_.pages.clear(WRITEBACK, page)
        object_.io_ended()
    return failed, struck


def _copied(object_: MemoryObject, runs: Iterable[tuple[int, int]]) -> tuple[list[tuple[int, int, bytes]], OSError | None]:
    """(first, count, content) of the runs, without pages that can't be read: those stay dirty. And the first error."""
    copies: list[tuple[int, int, bytes]] = []
    failed: OSError | None = None
    for start, length in runs:
        try:
            copies.append((start, length, object_.store.content(start, length)))
        except OSError as error:
            # A frame that is bad, and of which no report has come yet. It must not keep its neighbours from the file.
            failed = failed or error
            if length > 1:
                copies += _copied(object_, [(page, 1) for page in range(start, start + length)])[0]
    return copies, failed


def _well(object_: MemoryObject, first: int, count: int) -> Iterator[tuple[int, int]]:
    """The runs of dirty pages that were not struck: what is on a bad frame must not become what the file says."""
    for start, length in object_.pages.runs(DIRTY, first, count):
        begin = start
        for bad, many in object_.pages.runs(POISONED, start, length):
            if bad > begin:
                yield begin, bad - begin
            begin = bad + many
        if begin < start + length:
            yield begin, start + length - begin


async def _write(books: Books, object_: MemoryObject, first: int, count: int, copy: bytes) -> OSError | None:
    """Write one run. Only one's own write may lie between the identity that is known and the next one."""
    backing = object_.backing
    assert backing is not None
    async with backing.turn:
        backing.writing = True
        books.journal.object(object_)
        try:
            content = copy[: object_.nbytes_of(first, count)]
            written = await backing.file.write(backing.offset + first * object_.page_size, content)
        except OSError as error:
            if backing.identity is not None:
                backing.identity, backing.changed = None, f"the file's version could not be asked for: {error.strerror}"
                books.record("error", object_, detail=backing.changed)
            return error
        else:
            # A write that failed may have written some of it, so the file's times may be of our making all the same.
            if changed := backing.follow(written):
                books.record("error", object_, detail=changed)
            if written.error is None:
                books.statistics.pages_written += count
            return written.error
        finally:
            backing.writing = False
            if not object_.closed:
                books.journal.object(object_)
            object_.io_ended()


def _dirty_again(object_: MemoryObject, first: int, count: int) -> None:
    for page in range(first, first + count):
        if object_.pages.flags[page] & PRESENT:
            object_.pages.set(DIRTY, page)
