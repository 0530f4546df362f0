"""`Store` and `Frame`: the memory of an object, seen from the manager and from those that map it."""

from __future__ import annotations

import asyncio

import pytest

from hwpoison.core.machine import Content, Machine, StaleFrameError, Store
from tests.contract.rig import ClientDiedError, Rig


@pytest.fixture
def page(machine: Machine) -> int:
    """The size of a page."""
    return machine.page_size


def pattern(number: int, nbytes: int) -> bytes:
    return number.to_bytes(4, "big") * (nbytes // 4)


async def filled(machine: Machine, pages: int) -> Store:
    """An object whose pages have each a pattern of their own."""
    store = machine.create("object", pages * machine.page_size)
    await store.fill(0, b"".join(pattern(number, machine.page_size) for number in range(pages)))
    return store


async def test_all_pages_of_a_new_object_are_absent(machine: Machine, page: int) -> None:
    store = machine.create("object", 3 * page)
    assert [store.present(number) for number in range(3)] == [False] * 3
    assert [store.take(number) for number in range(3)] == [None] * 3
    store.close()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_what_is_published_is_there_for_other_processes_at_once(
    rig: Rig, machine: Machine, page: int, kind: type[Content]
) -> None:
    store = machine.create("object", 4 * page)
    client = await rig.client()
    address = await client.map(store)
    store.publish(1, kind(pattern(1, page) + pattern(2, page)))
    # No fault: it would wait for an answer that nobody gives.
    assert await client.copy(address + page, 2 * page) == pattern(1, page) + pattern(2, page)
    assert [store.present(number) for number in range(4)] == [False, True, True, False]
    assert store.content(1, 2) == pattern(1, page) + pattern(2, page)
    store.close()


async def test_an_object_is_filled_with_any_number_of_pages(rig: Rig, machine: Machine, page: int) -> None:
    store = await filled(machine, 700)
    client = await rig.client()
    address = await client.map(store)
    for number in (0, 1, 511, 512, 699):
        assert await client.copy(address + number * page, page) == pattern(number, page)
    assert store.content(0, 700) == b"".join(pattern(number, page) for number in range(700))
    store.close()


async def test_a_page_that_was_taken_is_absent_for_everybody_and_its_content_is_had_from_the_frame(
    rig: Rig, machine: Machine, page: int
) -> None:
    store = await filled(machine, 3)
    clients = [await rig.client(), await rig.client()]
    addresses = [await client.map(store) for client in clients]
    for client, address in zip(clients, addresses, strict=True):
        await client.load(address + page)
    await clients[0].store(addresses[0] + page, 7)
    frame = store.take(1)
    assert frame is not None
    assert [store.present(number) for number in range(3)] == [True, False, True]
    reading = [asyncio.create_task(one.load(where + page)) for one, where in zip(clients, addresses, strict=True)]
    for client, address in zip(clients, addresses, strict=True):
        assert await client.fault() == (address + page, client.thread, False, False)
    content = frame.content()
    assert content == b"\7" + pattern(1, page)[1:]
    store.publish(1, content)
    for client, address in zip(clients, addresses, strict=True):
        client.space.wake(address, 3 * page)
    assert await asyncio.gather(*reading) == [7, 7]
    store.close()


async def test_no_store_of_another_process_is_lost_when_a_page_is_taken_and_given_back(
    rig: Rig, machine: Machine, page: int
) -> None:
    store = machine.create("object", page)
    store.publish(0, bytes(page))
    client = await rig.client()
    address = await client.map(store)
    await client.count(address)
    seen = set()
    while len(seen) < 100:
        frame = store.take(0)
        assert frame is not None
        content = frame.content()
        seen.add(content[:8])
        store.publish(0, content)
        client.space.wake(address, page)
    done, found = await client.stop_counting()
    assert done == found
    assert done >= len(seen) - 1
    store.close()


async def test_a_page_in_another_frame_is_left_alone(rig: Rig, machine: Machine, page: int) -> None:
    store = await filled(machine, 2)
    client = await rig.client()
    address = await client.map(store)
    number = rig.number(store, 0)
    with pytest.raises(StaleFrameError):
        store.take(1, number)
    assert store.present(1)
    assert await client.copy(address + page, page) == pattern(1, page)
    frame = store.take(0, number)
    assert frame is not None
    assert frame.number == number
    assert frame.content() == pattern(0, page)
    store.close()


async def test_a_frame_in_quarantine_is_known_as_such_and_one_that_went_back_is_not(
    rig: Rig, machine: Machine, page: int
) -> None:
    store = await filled(machine, 3)
    numbers = [rig.number(store, one) for one in range(3)]
    for end in ("quarantine", "release", "content"):
        frame = store.take(0 if end == "quarantine" else 1 if end == "release" else 2)
        assert frame is not None
        getattr(frame, end)()
    assert [machine.quarantined(number) for number in numbers] == [True, False, False]
    store.close()
    # It outlives its object.
    assert machine.quarantined(numbers[0])


async def test_frames_in_quarantine_are_given_to_nobody(rig: Rig, machine: Machine, page: int) -> None:
    store = await filled(machine, 300)
    held = {rig.number(store, one) for one in range(300)}
    for one in range(300):
        frame = store.take(one)
        assert frame is not None
        frame.quarantine()
    await store.fill(0, bytes(300 * page))
    assert not held & {rig.number(store, one) for one in range(300)}
    assert all(machine.quarantined(number) for number in held)
    store.close()


async def test_pages_that_are_dropped_are_absent_for_everybody(rig: Rig, machine: Machine, page: int) -> None:
    store = await filled(machine, 6)
    client = await rig.client()
    address = await client.map(store)
    await client.load(address + 2 * page)
    # The last one is absent already.
    store.drop(5, 1)
    store.drop(2, 4)
    assert [store.present(one) for one in range(6)] == [True, True, False, False, False, False]
    touching = asyncio.create_task(client.load(address + 2 * page + 3))
    assert await client.fault() == (address + 2 * page, client.thread, False, False)
    store.publish(2, pattern(9, page))
    client.space.wake(address + 2 * page, page)
    assert await touching == 9
    store.close()


async def test_bytes_that_are_changed_are_changed_for_everybody_and_are_no_first_write(
    rig: Rig, machine: Machine, page: int
) -> None:
    store = await filled(machine, 2)
    client = await rig.client()
    address = await client.map(store, protected=True)
    store.write(page - 2, b"abcd")
    assert await client.copy(address + page - 4, 8) == pattern(0, 4)[:2] + b"abcd" + pattern(1, 4)[2:]
    # The client's own first write still is one.
    writing = asyncio.create_task(client.store(address, 1))
    assert await client.fault() == (address, client.thread, True, True)
    await client.space.unprotect(address, page)
    client.space.wake(address, page)
    await writing
    store.close()


async def test_those_that_map_an_object_keep_what_is_present_when_it_is_closed(
    rig: Rig, machine: Machine, page: int
) -> None:
    store = await filled(machine, 2)
    client = await rig.client()
    address = await client.map(store)
    store.close()
    assert await client.copy(address, 2 * page) == pattern(0, page) + pattern(1, page)


async def test_the_last_page_of_an_object_is_whole(rig: Rig, machine: Machine, page: int) -> None:
    store = machine.create("object", page + 1)
    store.publish(1, pattern(5, page))
    frame = store.take(1)
    assert frame is not None
    assert frame.content() == pattern(5, page)
    assert not store.present(1)
    store.close()


async def test_a_page_that_the_kernel_declares_bad_is_taken_all_the_same(rig: Rig, machine: Machine, page: int) -> None:
    store = await filled(machine, 3)
    rig.declare_bad(store, 1)
    with pytest.raises(OSError, match=r"."):
        store.content(1, 1)
    frame = store.take(1)
    assert frame is not None
    with pytest.raises(OSError, match=r"."):
        frame.content()
    frame.quarantine()
    assert [store.present(number) for number in range(3)] == [True, False, True]
    assert store.take(1) is None
    store.publish(1, pattern(9, page))
    assert store.content(0, 3) == pattern(0, page) + pattern(9, page) + pattern(2, page)
    store.close()


async def test_a_page_that_the_kernel_declares_bad_is_dropped_all_the_same(rig: Rig, machine: Machine, page: int) -> None:
    store = await filled(machine, 2)
    rig.declare_bad(store, 0)
    store.drop(0, 1)
    assert not store.present(0)
    store.publish(0, pattern(9, page))
    assert store.content(0, 2) == pattern(9, page) + pattern(1, page)
    store.close()


async def test_who_has_a_page_mapped_that_the_kernel_declares_bad_gets_sigbus_until_he_lets_go_of_it(
    rig: Rig, machine: Machine, page: int
) -> None:
    store = await filled(machine, 1)
    other, patient = await rig.client(), await rig.client()
    addresses = [await one.map(store) for one in (other, patient)]
    for one, address in zip((other, patient), addresses, strict=True):
        assert await one.load(address) == 0
    rig.declare_bad(store, 0)
    frame = store.take(0)
    assert frame is not None
    frame.quarantine()
    store.publish(0, pattern(9, page))
    with pytest.raises(ClientDiedError, match="SIGBUS"):
        await other.load(addresses[0])
    await patient.discard(addresses[1], page)
    assert await patient.copy(addresses[1], page) == pattern(9, page)
    store.close()
