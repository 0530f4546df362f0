"""The table that decides: every row is reached by something that can be, none is shadowed, and all states have theirs."""

from __future__ import annotations

import asyncio
import os
from itertools import product

import pytest

from hwpoison.core.failure import DECIDED_WITHOUT_LOCK, TABLE, Condition, Place, Row, _observe, identify
from hwpoison.core.machine import Identity
from hwpoison.core.objects import Backing, MemoryObject
from hwpoison.core.pages import DIRTY, LOST, POISONED, PRESENT, WRITEBACK
from hwpoison.core.records import State
from hwpoison.linux.machine import LinuxMachine
from hwpoison.linux.syscalls import PAGE_SIZE

ALL = [Condition(value) for value in range(2 * max(Condition))]


def fits(row: Row, condition: Condition) -> bool:
    return condition & row.mask == row.value


def possible_flags(*, file: bool) -> set[int]:
    """What the two sides of a page's life allow: a lost page is absent and poisoned, a dirty one is there, in a file."""
    return {
        flags
        for flags in range(32)
        if (not flags & LOST or (flags & POISONED and not flags & PRESENT))
        and (not flags & DIRTY or flags & PRESENT)
        and (file or not flags & (DIRTY | WRITEBACK))
    }


@pytest.fixture(scope="module")
def possible(machine: LinuxMachine, tmp_path_factory: pytest.TempPathFactory) -> set[Condition]:
    """Every condition that a place can be in, as the handler sees it: first when the report comes, then under the lock."""
    path = tmp_path_factory.mktemp("table") / "file"
    path.write_bytes(bytes(PAGE_SIZE))
    places = [Place(), Place(pfn=1), Place(reserved=True), Place(pfn=1, reserved=True), Place(pfn=1, quarantined=True)]
    seen = {_observe(place) for place in places}
    backing = Backing(machine.file(os.open(path, os.O_RDONLY)), 0, True, Identity(0, 0, 0, 0, 0))
    for file, closed in product((False, True), repeat=2):
        store = machine.create("table", PAGE_SIZE)
        object_ = MemoryObject(1, "table", PAGE_SIZE, PAGE_SIZE, store, backing if file else None)
        object_.closed = closed
        for flags in possible_flags(file=file):
            object_.pages.flags[0] = flags
            condition = _observe(Place(object_, 0))
            seen |= {condition, condition & ~Condition.POISONED}
        store.close()
    asyncio.run(backing.file.close())
    return seen


def test_for_every_combination_exactly_the_first_row_that_fits_decides() -> None:
    assert len(ALL) == 256
    for condition in ALL:
        row = identify(condition)
        assert fits(row, condition)
        assert not any(fits(earlier, condition) for earlier in TABLE[: TABLE.index(row)])


def test_the_last_row_fits_everything() -> None:
    assert all(fits(TABLE[-1], condition) for condition in ALL)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.state)
def test_every_row_decides_about_something_that_can_be(possible: set[Condition], row: Row) -> None:
    assert any(identify(condition) is row for condition in possible)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.state)
def test_no_row_asks_for_what_its_mask_leaves_out(row: Row) -> None:
    assert row.value & ~row.mask == Condition(0)


def test_every_state_has_one_row() -> None:
    assert sorted(row.state for row in TABLE) == sorted(State)


def test_what_is_possible_of_an_object_is_never_unknown(possible: set[Condition]) -> None:
    for condition in possible:
        assert (identify(condition).state is State.UNKNOWN) == (condition == Condition(0))


def test_what_is_decided_without_the_lock_is_no_page_of_an_object_or_was_struck_before(possible: set[Condition]) -> None:
    for condition in possible:
        if identify(condition).state in DECIDED_WITHOUT_LOCK:
            of_an_object = condition & (Condition.FILE | Condition.ANONYMOUS)
            assert not of_an_object or condition & Condition.POISONED


EXPECTED = {
    "nothing of ours": (Condition(0), State.UNKNOWN),
    "the manager's own": (Condition.RESERVED, State.RESERVED),
    "a frame in quarantine": (Condition.OWNED | Condition.POISONED, State.ALREADY_POISONED),
    "struck before, and closed": (
        Condition.OWNED | Condition.ANONYMOUS | Condition.POISONED | Condition.CLOSED, State.ALREADY_POISONED,
    ),
    "closed, and dirty": (
        Condition.OWNED | Condition.FILE | Condition.CLOSED | Condition.PRESENT | Condition.DIRTY, State.TRUNCATED,
    ),
    "absent from a file": (Condition.OWNED | Condition.FILE, State.FREE),
    "absent from memory": (Condition.OWNED | Condition.ANONYMOUS, State.FREE),
    "as in the file": (Condition.OWNED | Condition.FILE | Condition.PRESENT, State.CLEAN_FILE),
    "newer than the file": (
        Condition.OWNED | Condition.FILE | Condition.PRESENT | Condition.DIRTY, State.DIRTY_FILE,
    ),
    "in memory only": (Condition.OWNED | Condition.ANONYMOUS | Condition.PRESENT, State.ANONYMOUS),
}  # fmt: skip


@pytest.mark.parametrize("what", EXPECTED)
def test_a_condition_is_the_state_that_the_words_say(possible: set[Condition], what: str) -> None:
    condition, state = EXPECTED[what]
    assert condition in possible
    assert identify(condition).state is state
