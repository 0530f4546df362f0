"""`Records` and `Inheritance`: what the next manager finds when this one has died."""

from __future__ import annotations

from hwpoison.core.machine import Machine
from tests.contract.rig import Rig

NAME, NUMBER = "object", 7


async def test_the_next_one_finds_the_last_value_of_each_key(rig: Rig, machine: Machine) -> None:
    records = machine.records
    for value in (1, [None, True, "text", 1.5, {"a": -1}]):
        records.put(("thing", 1), value)
    records.put(("thing", 2), 2)
    records.put(("gone",), 3)
    records.drop(("gone",))
    records.drop(("never",))
    with records.together():
        records.put(("thing", 3), 3)
        records.drop(("thing", 2))
    records.require()
    successor, _ = rig.successor()
    assert successor.records.all() == {("thing", 1): [None, True, "text", 1.5, {"a": -1}], ("thing", 3): 3}
    # What it goes on with is there for the one after it.
    successor.records.put(("thing", 1), 0)
    assert successor.records.all()["thing", 1] == 0


async def test_it_finds_the_memory_of_an_object_and_the_flags_of_its_pages(rig: Rig, machine: Machine) -> None:
    page = machine.page_size
    store = machine.create(NAME, 8 * page, NUMBER)
    store.publish(2, b"x" * page)
    store.publish(3, b"y" * page)
    store.publish(6, b"z" * page)
    store.flags[2:4] = b"\1\3"
    store.flags[6] = 9
    store.drop(3, 1)
    successor, inherited = rig.successor()
    found = inherited.store(NUMBER, NAME, 8 * page)
    assert list(found.runs()) == [(2, 1), (6, 1)]
    assert found.content(2, 1) == b"x" * page
    assert bytes(found.flags[:8]) == b"\0\0\1\3\0\0\x09\0"
    assert {number for first, count in found.flagged() for number in range(first, first + count)} >= {2, 3, 6}
    found.publish(3, b"w" * page)
    assert store.present(3)
    frame = found.take(6)
    assert frame is not None
    frame.quarantine()
    assert successor.held == 1
    found.close()


async def test_a_frame_that_was_being_taken_out_is_held(rig: Rig, machine: Machine) -> None:
    page = machine.page_size
    store = machine.create(NAME, page, NUMBER)
    store.publish(0, b"x" * page)
    assert store.take(0) is not None
    successor, inherited = rig.successor()
    inherited.transit(hold=True)
    assert successor.held == 1
    # There is nothing any more.
    inherited.transit(hold=False)
    assert successor.held == 1


async def test_frames_in_quarantine_stay_there(rig: Rig, machine: Machine) -> None:
    page = machine.page_size
    store = machine.create(NAME, 3 * page, NUMBER)
    for number in range(3):
        store.publish(number, b"x" * page)
        frame = store.take(number)
        assert frame is not None
        frame.quarantine()
    assert machine.held == 3
    successor, _ = rig.successor()
    assert successor.held == 3


async def test_it_finds_the_file_of_an_object(rig: Rig, machine: Machine) -> None:
    content = bytes(range(256)) * 32
    file = rig.file(content)
    file.file.keep(NUMBER)
    before = await file.file.identity()
    _, inherited = rig.successor()
    found = inherited.file(NUMBER)
    assert await found.identity() == before
    assert bytes(await found.read(100, 1000)) == content[100:1100]
    await found.close()
