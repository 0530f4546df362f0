"""`Machine`: frames by number, and what is the machine's own."""

from __future__ import annotations

import pytest

from hwpoison.core.machine import Machine
from tests.contract.rig import Rig


async def test_a_frame_is_found_in_the_object_and_page_that_it_is(rig: Rig, machine: Machine) -> None:
    page = machine.page_size
    first, second = machine.create("first", 600 * page), machine.create("second", 8 * page)
    first.publish(599, bytes(page))
    second.publish(2, bytes(4 * page))
    stores = [(first, {599}.__contains__), (second, {2, 3, 4, 5}.__contains__)]
    assert await machine.find_frame(rig.number(first, 599), stores) == (0, 599)
    for one in range(2, 6):
        assert await machine.find_frame(rig.number(second, one), stores) == (1, one)
    gone = rig.number(second, 3)
    frame = second.take(3)
    assert frame is not None
    frame.quarantine()
    stores[1] = (second, {2, 4, 5}.__contains__)
    assert await machine.find_frame(gone, stores) is None
    for store in (first, second):
        store.close()


@pytest.mark.parametrize("number", [0, 1 << 50])
async def test_a_number_that_no_frame_has_is_found_nowhere(machine: Machine, number: int) -> None:
    store = machine.create("object", 4 * machine.page_size)
    store.publish(1, bytes(machine.page_size))
    assert await machine.find_frame(number, [(store, {1}.__contains__)]) is None
    assert not machine.reserved(number=number)
    assert not machine.quarantined(number)
    store.close()


def test_the_machine_reserves_its_own_process_and_its_own_frames(rig: Rig, machine: Machine) -> None:
    assert machine.reserved(pid=rig.pid)
    assert not machine.reserved(pid=1)
    assert machine.reserved(number=rig.own_number())


async def test_a_frame_that_cannot_be_offlined_is_an_error(rig: Rig, machine: Machine) -> None:
    rig.offlines_nothing()
    with pytest.raises(OSError):
        await machine.offline(0)


def test_pages_have_a_size_that_a_machine_can_have(machine: Machine) -> None:
    assert machine.page_size >= 4096
    assert not machine.page_size & (machine.page_size - 1)
