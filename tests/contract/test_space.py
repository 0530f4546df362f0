"""`Space`: what the manager does to a client's accesses, on a real client."""

from __future__ import annotations

import asyncio
import errno
import signal

import pytest

from hwpoison.core.machine import Machine, Space, Store, Telling
from tests.contract.rig import ClientDiedError, ClientRig, Rig
from tests.support import need

SI_QUEUE = -1


@pytest.fixture
def page(machine: Machine) -> int:
    """The size of a page."""
    return machine.page_size


@pytest.fixture
def store(machine: Machine, page: int) -> Store:
    """Eight pages, of which the first four are present, all ones."""
    store = machine.create("object", 8 * page)
    store.publish(0, b"\1" * (4 * page))
    return store


async def write(client: ClientRig, address: int, page: int) -> tuple[bool, bool]:
    """Let a client write to a page that is present; whether that was a fault, and a protected one."""
    writing = asyncio.create_task(client.store(address, 9))
    faulting = asyncio.create_task(client.fault())
    await asyncio.wait((writing, faulting), return_when=asyncio.FIRST_COMPLETED)
    if not faulting.done():
        faulting.cancel()
        return False, False
    fault = faulting.result()
    assert fault == (address, client.thread, True, fault.protected)
    await client.space.unprotect(address, page)
    client.space.wake(address, page)
    await writing
    return True, fault.protected


async def test_a_space_is_that_of_its_process(rig: Rig) -> None:
    first, second = await rig.client(), await rig.client()
    assert first.space.pid != second.space.pid
    first.space.kill()
    assert await first.end() == signal.SIGKILL
    await second.dispose()


async def test_an_access_to_an_absent_page_waits_until_it_is_woken_with_the_page_there(
    rig: Rig, store: Store, page: int
) -> None:
    client = await rig.client()
    address = await client.map(store)
    reading = asyncio.create_task(client.load(address + 5 * page + 17))
    assert await client.fault() == (address + 5 * page, client.thread, False, False)
    # Woken without the page, it waits again.
    client.space.wake(address + 5 * page, page)
    assert (await client.fault()).address == address + 5 * page
    store.publish(5, b"\5" * page)
    client.space.wake(address, 8 * page)
    assert await reading == 5
    writing = asyncio.create_task(client.store(address + 6 * page, 3))
    assert await client.fault() == (address + 6 * page, client.thread, True, False)
    store.publish(6, bytes(page))
    client.space.wake(address + 6 * page, page)
    await writing
    assert store.content(6, 1) == b"\3" + bytes(page - 1)


async def test_the_first_write_to_a_protected_page_is_a_fault_and_the_second_is_not(
    rig: Rig, store: Store, page: int
) -> None:
    client = await rig.client()
    address = await client.map(store, protected=True)
    assert await client.load(address) == 1
    assert await write(client, address, page) == (True, True)
    assert await write(client, address, page) == (False, False)
    assert await write(client, address + page, page) == (True, True)


async def test_a_range_is_protected_again_and_freed_as_a_whole(rig: Rig, store: Store, page: int) -> None:
    client = await rig.client()
    address = await client.map(store, protected=True)
    await client.space.unprotect(address, 4 * page)
    assert [await write(client, address + one * page, page) for one in range(4)] == [(False, False)] * 4
    await client.space.protect(address + page, 2 * page)
    found = [await write(client, address + one * page, page) for one in range(4)]
    assert found == [(False, False), (True, True), (True, True), (False, False)]


async def test_an_absent_page_that_is_protected_is_so_when_it_has_come(rig: Rig, store: Store, page: int) -> None:
    """Nothing may be written unseen after a page was taken away and brought back: the marker could have gone with it."""
    client = await rig.client()
    address = await client.map(store, protected=True)
    await client.space.unprotect(address, 8 * page)
    for one in (0, 5):
        store.drop(one, 1)
        await client.space.protect(address + one * page, page)
        store.publish(one, bytes(page))
        assert await client.load(address + one * page) == 0
        assert await write(client, address + one * page, page) == (True, True)


async def test_a_poisoned_page_ends_who_touches_it_with_sigbus(rig: Rig, machine: Machine, store: Store, page: int) -> None:
    need(machine.poison_markers, "poison markers (Linux 6.6)")
    for handled in (False, True):
        client = await rig.client()
        address = await client.map(store)
        assert await client.space.poison(address + 5 * page)
        if handled:
            # Python's handler runs later, so the access is repeated for ever; a system call says it without a signal.
            await client.dispose(handled=True)
            with pytest.raises(OSError) as caught:
                await client.copy(address + 5 * page, page)
            assert caught.value.errno == errno.EFAULT
        else:
            with pytest.raises(ClientDiedError) as died:
                await client.load(address + 5 * page)
            assert died.value.number == signal.SIGBUS
    assert not store.present(5)


async def test_a_page_that_is_poisoned_in_one_process_is_not_in_another(
    rig: Rig, machine: Machine, store: Store, page: int
) -> None:
    need(machine.poison_markers, "poison markers (Linux 6.6)")
    client, other = await rig.client(), await rig.client()
    address, other_address = await client.map(store), await other.map(store)
    assert await client.space.poison(address + 5 * page)
    reading = asyncio.create_task(other.load(other_address + 5 * page))
    assert (await other.fault()).address == other_address + 5 * page
    store.publish(5, b"\5" * page)
    other.space.wake(other_address + 5 * page, page)
    assert await reading == 5
    # It is there, and the marker is as well.
    with pytest.raises(ClientDiedError):
        await client.load(address + 5 * page)


async def test_a_page_that_is_there_cannot_be_poisoned(rig: Rig, machine: Machine, store: Store, page: int) -> None:
    need(machine.poison_markers, "poison markers (Linux 6.6)")
    client = await rig.client()
    address = await client.map(store)
    assert await client.load(address) == 1
    assert not await client.space.poison(address)
    assert await client.load(address) == 1


@pytest.mark.parametrize("private", [False, True], ids=["shared", "private"])
async def test_a_marker_is_replaced_by_the_page(rig: Rig, machine: Machine, store: Store, page: int, private: bool) -> None:
    need(machine.poison_markers, "poison markers (Linux 6.6)")
    client = await rig.client()
    address = await client.map(store, private=private)
    assert await client.space.poison(address + 5 * page)
    store.publish(5, b"\5" * page)
    await client.space.unpoison(address + 5 * page, protect=False)
    assert await client.copy(address + 5 * page, page) == b"\5" * page
    assert await client.load(address + 5 * page) == 5


@pytest.mark.parametrize("protect", [False, True])
async def test_a_marker_is_replaced_by_a_page_that_is_protected_if_so_wanted(
    rig: Rig, machine: Machine, store: Store, page: int, protect: bool
) -> None:
    need(machine.poison_markers, "poison markers (Linux 6.6)")
    client = await rig.client()
    address = await client.map(store, protected=True)
    # The marker of protection stands in the way, and goes first.
    assert not await client.space.poison(address + 5 * page)
    await client.space.unprotect(address + 5 * page, page)
    assert await client.space.poison(address + 5 * page)
    store.publish(5, bytes(page))
    await client.space.unpoison(address + 5 * page, protect=protect)
    assert await client.load(address + 5 * page) == 0
    assert await write(client, address + 5 * page, page) == (protect, protect)


async def test_a_page_cannot_be_protected_where_first_writes_are_not_watched(
    rig: Rig, machine: Machine, store: Store, page: int
) -> None:
    need(machine.poison_markers, "poison markers (Linux 6.6)")
    client = await rig.client()
    address = await client.map(store, private=True)
    assert await client.space.poison(address + 5 * page)
    store.publish(5, bytes(page))
    with pytest.raises(OSError, match="Invalid argument"):
        await client.space.unpoison(address + 5 * page, protect=True)


async def test_zeros_are_shown_to_one_view_only_and_go_when_it_lets_go_of_them(rig: Rig, store: Store, page: int) -> None:
    client, other = await rig.client(), await rig.client()
    view, ordinary = await client.map(store, private=True), await client.map(store)
    other_view = await other.map(store, private=True)
    reading = asyncio.create_task(client.load(view + 5 * page))
    assert (await client.fault()).address == view + 5 * page
    await client.space.show_zeros(view + 5 * page)
    client.space.wake(view + 5 * page, page)
    assert await reading == 0
    assert await client.copy(view + 5 * page, page) == bytes(page)
    assert not store.present(5)
    # Nobody else sees them: neither its own ordinary mapping, nor another's view.
    readings = [
        asyncio.create_task(client.load(ordinary + 5 * page)),
        asyncio.create_task(other.load(other_view + 5 * page)),
    ]
    assert (await client.fault()).address == ordinary + 5 * page
    assert (await other.fault()).address == other_view + 5 * page
    store.publish(5, b"\5" * page)
    client.space.wake(ordinary + 5 * page, page)
    other.space.wake(other_view + 5 * page, page)
    assert await asyncio.gather(*readings) == [5, 5]
    # The zeros are its own until it lets go of them.
    assert await client.load(view + 5 * page) == 0
    await client.discard(view + 5 * page, page)
    assert await client.load(view + 5 * page) == 5


@pytest.mark.parametrize(
    ("disposition", "telling"),
    [
        ({}, Telling.FATAL),
        ({"handled": True}, Telling.HANDLED),
        ({"ignored": True}, Telling.IGNORED),
        ({"blocked": True}, Telling.BLOCKED),
        ({"handled": True, "blocked": True}, Telling.BLOCKED),
    ],
    ids=["default", "handled", "ignored", "blocked", "handled and blocked"],
)
async def test_it_is_known_what_would_become_of_a_sigbus(rig: Rig, disposition: dict[str, bool], telling: Telling) -> None:
    client = await rig.client()
    await client.dispose(**disposition)
    assert client.space.telling(client.thread) is telling


async def test_a_sigbus_that_is_sent_has_the_address_in_its_value(rig: Rig, store: Store, page: int) -> None:
    client = await rig.client()
    address = await client.map(store)
    await client.dispose(blocked=True)
    client.space.signal(client.thread, address + 5 * page)
    assert await client.signalled() == (SI_QUEUE, address + 5 * page)


async def test_a_sigbus_that_is_sent_reaches_a_thread_that_sleeps_in_a_fault(rig: Rig, store: Store, page: int) -> None:
    client = await rig.client()
    address = await client.map(store)
    reading = asyncio.create_task(client.load(address + 5 * page))
    fault = await client.fault()
    client.space.signal(fault.thread, fault.address)
    with pytest.raises(ClientDiedError) as died:
        await reading
    assert died.value.number == signal.SIGBUS


async def everything(space: Space, thread: int, address: int, page: int) -> None:
    """Every method, as if nothing had happened."""
    space.wake(address, page)
    await space.protect(address, 8 * page)
    await space.unprotect(address, 8 * page)
    assert await space.poison(address + 5 * page)
    await space.unpoison(address, protect=True)
    await space.show_zeros(address + 6 * page)
    assert isinstance(space.telling(thread), Telling)
    space.signal(thread, address)
    space.kill()
    assert space.pid


async def test_nothing_goes_wrong_with_a_process_that_was_killed(rig: Rig, store: Store, page: int) -> None:
    client = await rig.client()
    address = await client.map(store, protected=True)
    client.die()
    await everything(client.space, client.thread, address, page)
    assert await client.end() == signal.SIGKILL
    await everything(client.space, client.thread, address, page)


async def test_a_process_is_killed_whatever_it_does(rig: Rig, store: Store, page: int) -> None:
    client = await rig.client()
    address = await client.map(store)
    await client.dispose(ignored=True, blocked=True)
    reading = asyncio.create_task(client.load(address + 5 * page))
    await client.fault()
    client.space.kill()
    with pytest.raises(ClientDiedError) as died:
        await reading
    assert died.value.number == signal.SIGKILL


async def test_who_is_not_registered_makes_pages_of_zeros_for_everybody(rig: Rig, machine: Machine) -> None:
    """Why a client gets memory only together with its registration (linux-facts 4)."""
    store = machine.create("object", 2 * machine.page_size)
    stray, client = await rig.client(), await rig.client()
    elsewhere, address = await stray.map(store, registered=False), await client.map(store)
    assert await stray.load(elsewhere) == 0
    assert store.present(0)
    assert not store.present(1)
    assert await client.load(address) == 0
    store.close()
