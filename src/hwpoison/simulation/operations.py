"""What can happen in a simulated world: what clients do and ask for, and what befalls the machine."""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from hwpoison.core import recovery, residence, writeback
from hwpoison.core.mappings import Mapping
from hwpoison.core.objects import Backing, Loss
from hwpoison.core.records import Outcome, Report, Source, State
from hwpoison.errors import PoisonError
from hwpoison.simulation.files import FILE_OFFSET, SimulatedFile
from hwpoison.simulation.scenario import Step

if TYPE_CHECKING:
    from hwpoison.simulation.world import World

PAGE_SIZE = 8
NAME = "a"
NO_LIMIT = 1 << 40
"""A memory limit in pages that is never met: so that pages have ages, and can be evicted."""


def token(number: int) -> bytes:
    """The content of a page, different for each number, in each half."""
    return number.to_bytes(PAGE_SIZE // 2, "little") * 2


# --- what clients ask the manager for --------------------------------------------------------------------------------


async def _write_to(world: World, mapping: Mapping, offset: int, data: bytes) -> None:
    try:
        await recovery.write(world.manager, mapping.object, offset, data)
    except PoisonError as error:
        world.expectation.told_lost([one.offset // PAGE_SIZE for one in error.ranges])
    except FileNotFoundError:
        assert mapping.object.closed
    except OSError as error:
        # The kernel has declared the page bad, and the manager is about to hear it.
        assert error.errno == errno.EIO, error


async def _write(world: World, mapping: Mapping, page: int, data: bytes) -> None:
    with world.expectation.may_become(page, lambda _: data):
        await _write_to(world, mapping, page * PAGE_SIZE, data)


async def _write_half(world: World, mapping: Mapping, page: int, data: bytes) -> None:
    half = PAGE_SIZE // 2
    with world.expectation.may_become(page, lambda old: data[:half] + old[half:]):
        await _write_to(world, mapping, page * PAGE_SIZE, data[:half])


async def _write_across(world: World, mapping: Mapping, page: int, data: bytes) -> None:
    """From the middle of a page to the middle of the next one, where there is one."""
    half = PAGE_SIZE // 2
    if page + 1 == mapping.object.pages.count:
        await _write_half(world, mapping, page, data)
        return
    with (
        world.expectation.may_become(page, lambda old: old[:half] + data[half:]),
        world.expectation.may_become(page + 1, lambda old: data[:half] + old[half:]),
    ):
        await _write_to(world, mapping, page * PAGE_SIZE + half, data[half:] + data[:half])


async def _repair(world: World, mapping: Mapping, page: int, data: bytes) -> None:
    with world.expectation.may_become(page, lambda _: data):
        await recovery.repair(world.manager, mapping.object, page * PAGE_SIZE, data)


async def _discard(world: World, mapping: Mapping, page: int, data: bytes) -> None:
    with world.expectation.may_be_fresh(page):
        try:
            await recovery.discard(world.manager, mapping.object, page, 1)
        except OSError as error:
            # The file is shorter now, or could not be read: the page is still lost.
            assert mapping.object.backing is not None, error


async def _flush(world: World, mapping: Mapping, page: int, data: bytes) -> None:
    world.touched_all()
    world.expectation.flush_begins(mapping)
    mapping.error_seen = world.errors_seen.get(mapping.number, mapping.error_seen)
    try:
        await world.manager.flush(mapping)
    except writeback.UnwrittenError as error:
        world.expectation.not_written(mapping, error.errors)
    except OSError:
        world.expectation.flush_failed(mapping)
    else:
        world.expectation.flushed(mapping)
    world.errors_seen[mapping.number] = mapping.error_seen
    world.manager.journal.mapping(mapping)
    world.touched_all()


async def _make_resident(world: World, mapping: Mapping, page: int, data: bytes) -> None:
    try:
        await residence.begin(world.manager, mapping, 1, page, 1, write=mapping.object.writable)
    except PoisonError as error:
        world.expectation.told_lost([one.offset // PAGE_SIZE for one in error.ranges])
    except FileNotFoundError:
        assert mapping.object.closed or mapping.gone
    except OSError as error:
        assert error.errno == errno.ENOMEM, error
    else:
        world.expectation.resident[mapping.number] = page


async def _end_residence(world: World, mapping: Mapping, page: int, data: bytes) -> None:
    world.expectation.resident.pop(mapping.number, None)
    residence.end(world.manager, mapping, 1)


async def _prefetch(world: World, mapping: Mapping, page: int, data: bytes) -> None:
    await world.manager.prefetch(mapping, page, 1)


Request = Callable[["World", Mapping, int, bytes], Coroutine[Any, Any, None]]
REQUESTS: dict[str, Request] = {
    "request to write": _write,
    "request to write half of": _write_half,
    "request to write across": _write_across,
    "repair": _repair,
    "discard": _discard,
    "flush": _flush,
    "prefetch": _prefetch,
    "make resident": _make_resident,
    "end residence": _end_residence,
}
INNER = ("make resident", "end residence")
"""What clients do only together with other things."""


# --- what happens to the world ---------------------------------------------------------------------------------------


async def _report(world: World, page: int) -> None:
    if not any(one is world.object for one in world.manager.objects()):
        return
    with world.expectation.reporting(page) as known:
        known.append(await world.report(Report(name=NAME, offset=page * PAGE_SIZE, source=Source.INJECTED)))


async def _hardware(world: World, page: int) -> None:
    """A frame goes bad, and its number is reported."""
    number = world.goes_bad(page, declared=False)
    if number is not None:
        await world.report(Report(pfn=number))


async def _frame_report(world: World, page: int) -> None:
    """The frame in which a page is now is reported, by its number. Nothing else is wrong with it."""
    found = world.store.pages[page]
    if found is not None:
        world.expectation.struck.add(page)
        world.expectation.named.add(found.number)
        failure = await world.report(Report(pfn=found.number))
        if not found.held:
            world.expectation.frame_handled(found.number, failure)


async def _evict(world: World, page: int) -> None:
    """Memory is short by a page, until one has been given back."""
    reclaim, machine = world.manager.reclaim, world.machine

    def enough() -> None:
        reclaim.limit = NO_LIMIT

    reclaim.limit = max(0, reclaim.present - 1)
    machine.freed = enough
    try:
        await recovery.make_room(world.manager, world.object, 0)
    finally:
        enough()


async def _write_back(world: World, page: int) -> None:
    """Dirty pages are written back beside everything else, as where room is wanted."""
    await writeback.write_back_some(world.manager, world.object, 1)


async def _lose_elsewhere(world: World, page: int) -> None:
    """Another object over the same bytes of the file, which somebody has written to, loses what was written."""
    manager, disk = world.manager, world.disk
    assert disk is not None
    identity = disk.identity()
    if "elsewhere" not in [one.name for one in manager.objects()]:
        backing = Backing(SimulatedFile(world.machine, disk), FILE_OFFSET, True, identity)
        manager.hold(manager._create("elsewhere", world.object.nbytes, backing))
    other = manager.find("elsewhere")
    async with other.locks.hold(page):
        if page not in other.losses:
            loss = Loss(manager.new_event_id(), State.DIRTY_FILE, Outcome.RECOVERED, "")
            recovery.lose(manager, other, page, loss)
            world.expectation.elsewhere.add(page)


STORIES: dict[str, Callable[[World, int], Coroutine[Any, Any, None]]] = {
    "report": _report,
    "hardware": _hardware,
    "frame report": _frame_report,
    "evict": _evict,
    "write back": _write_back,
    "lose elsewhere": _lose_elsewhere,
}


def _truncate(world: World, page: int) -> None:
    assert world.disk is not None
    end = (len(world.disk.content) - FILE_OFFSET) // PAGE_SIZE
    world.expectation.changed_by_others(range(min(page, end), len(world.expectation.history)))
    world.disk.truncate(FILE_OFFSET + page * PAGE_SIZE)


def _change(world: World, page: int) -> None:
    assert world.disk is not None
    end = (len(world.disk.content) - FILE_OFFSET) // PAGE_SIZE
    world.expectation.changed_by_others(range(min(page, end), page + 1))
    world.disk.change(FILE_OFFSET + page * PAGE_SIZE, token(99))


def _collapse(world: World, page: int) -> None:
    """A client has the kernel make a large frame of ours; it does where all pages of a unit are present."""
    unit = world.object.unit_pages
    number = page // unit
    pages = world.store.pages[number * unit : (number + 1) * unit]
    if len(pages) == unit and None not in pages:
        world.store.large.add(number)
        world.expectation.collapsed = True


def _kernel_poison(world: World, page: int) -> None:
    """The kernel declares a page bad by itself: it poisons the entries of all who map it, and signals one of them, which
    tells the manager. Nobody is told of a page that nobody has mapped, until somebody touches it (linux-facts 25, 26)."""
    tellers = [agent for agent in world.agents if agent.maps(page)]
    if world.goes_bad(page, declared=True) is None:
        return
    world.unreported.add(page)
    if tellers:
        world.will_come(f"{tellers[0].name} reports {page}", lambda: tellers[0].report_to_manager(page))


def _move(world: World, page: int) -> None:
    world.store.moves(page)


CHANGES: dict[str, Callable[[World, int], None]] = {
    "truncate": _truncate,
    "change": _change,
    "collapse": _collapse,
    "move": _move,
    "kernel poison": _kernel_poison,
}


# --- what clients do -------------------------------------------------------------------------------------------------


def _guarded(page: int, data: bytes) -> list[Step]:
    return [Step("enter", page), Step("look", page), Step("leave", page)]


def _resident(page: int, *calls: Step) -> list[Step]:
    return [Step("make resident", page), *calls, Step("end residence", page)]


SCRIPTS: dict[str, Callable[[int, bytes], list[Step]]] = {
    "read": lambda page, data: [Step("read", page)],
    "write": lambda page, data: [Step("write", page, data)],
    "read guarded": _guarded,
    "read guarded twice": lambda page, data: _guarded(page, data) * 2,
    "flush twice": lambda page, data: [Step("flush", page), Step("flush", page)],
    "die": lambda page, data: [Step("write", page, data)],
    "die reading": lambda page, data: [Step("read", page)],
    "close": lambda page, data: [Step("unmap", page), Step("tell", page)],
    "attach": lambda page, data: [Step("attach", page), Step("read", page)],
    "attach and flush": lambda page, data: [Step("attach", page), Step("flush", page)],
    "read in a call": lambda page, data: [Step("call", page)],
    "read while resident": lambda page, data: _resident(page, Step("call", page)),
    "write while resident": lambda page, data: _resident(page, Step("call", page, data), Step("call", page)),
    **{
        kind: (lambda page, data, kind=kind: [Step(kind, page, data)])  # type: ignore[misc]
        for kind in REQUESTS
        if kind not in INNER
    },
}
DYING = ("die", "die reading")
"""Clients that may be killed at any moment."""
OPERATIONS = (*SCRIPTS, *STORIES, *CHANGES)
_WRITING = (
    "write", "die", "request to write", "request to write half of", "request to write across", "repair", "flush",
    "flush twice", "attach and flush", "write back", "write while resident",
)  # fmt: skip
_FILES = ("truncate", "change", "flush", "flush twice", "attach and flush", "write back")


def applies(kind: str, operation: str) -> bool:
    """True if there is such an operation on such an object."""
    if operation == "lose elsewhere":
        # What another one has lost may be what this one has written since: there is no telling.
        return kind in ("read-only", "cached")
    if kind == "anonymous":
        return operation not in _FILES
    return kind != "read-only" or operation not in _WRITING
