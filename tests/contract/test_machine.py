"""`Machine`: frames by number, and what is the machine's own."""

from __future__ import annotations

import pytest

from hwpoison.core.machine import Machine, Runs
from tests.contract.rig import Rig


def runs(*pages: int) -> Runs:
    return lambda: [(page, 1) for page in pages]


async def test_a_frame_is_found_in_the_object_and_page_that_it_is(rig: Rig, machine: Machine) -> None:
    page = machine.page_size
    first, second = machine.create("first", 600 * page), machine.create("second", 8 * page)
    first.publish(599, bytes(page))
    second.publish(2, bytes(4 * page))
    stores = [(first, runs(599)), (second, runs(2, 3, 4, 5))]
    assert await machine.find_frame(rig.number(first, 599), stores) == (0, 599)
    for one in range(2, 6):
        assert await machine.find_frame(rig.number(second, one), stores) == (1, one)
    gone = rig.number(second, 3)
    frame = second.take(3)
    assert frame is not None
    frame.quarantine()
    stores[1] = (second, runs(2, 4, 5))
    assert await machine.find_frame(gone, stores) is None
    for store in (first, second):
        store.close()


async def test_a_frame_is_found_in_a_large_object_that_is_thinly_filled(rig: Rig, machine: Machine) -> None:
    """On Linux the manager gives its page tables of the object back while this one is filled."""
    step, count = machine.page_size // 8, 300
    store = machine.create("large", count * step * machine.page_size)
    store.publish(0, bytes(machine.page_size))
    number = rig.number(store, 0)
    for index in range(1, count):
        store.publish(index * step, bytes(machine.page_size))
    assert await machine.find_frame(number, [(store, runs(*range(0, count * step, step)))]) == (0, 0)
    last = rig.number(store, (count - 1) * step)
    assert await machine.find_frame(last, [(store, runs(*range(0, count * step, step)))]) == (0, (count - 1) * step)
    store.close()


@pytest.mark.parametrize("number", [0, 1 << 50])
async def test_a_number_that_no_frame_has_is_found_nowhere(machine: Machine, number: int) -> None:
    store = machine.create("object", 4 * machine.page_size)
    store.publish(1, bytes(machine.page_size))
    assert await machine.find_frame(number, [(store, runs(1))]) is None
    assert not await machine.reserved(number=number)
    assert not machine.quarantined(number)
    store.close()


async def test_the_machine_reserves_its_own_process_and_its_own_frames(rig: Rig, machine: Machine) -> None:
    assert await machine.reserved(pid=rig.pid)
    assert not await machine.reserved(pid=1)
    assert await machine.reserved(number=rig.own_number())


async def test_a_frame_that_cannot_be_offlined_is_an_error(rig: Rig, machine: Machine) -> None:
    rig.offlines_nothing()
    with pytest.raises(OSError):
        await machine.offline(0)


def test_a_table_is_of_zeros_and_keeps_what_is_stored_however_large_it_is(machine: Machine) -> None:
    nbytes = 1 << 32
    table = machine.table(nbytes)
    assert len(table) == nbytes
    assert (table[0], table[nbytes - 1], table[70:73]) == (0, 0, bytes(3))
    table[nbytes - 2] = 255
    table[70:73] = b"abc"
    assert (table[nbytes - 2], table[69:74]) == (255, b"\0abc\0")
    assert (table.find(b"c", 60, 80), table.find(b"c", 60, 72)) == (72, -1)
    assert table.find(b"\xff", nbytes - 9, nbytes) == nbytes - 2


def test_a_table_that_cannot_be_had_is_said_so(machine: Machine) -> None:
    with pytest.raises(MemoryError):
        machine.table(1 << 62)


def test_pages_have_a_size_that_a_machine_can_have(machine: Machine) -> None:
    assert machine.page_size >= 4096
    assert not machine.page_size & (machine.page_size - 1)
