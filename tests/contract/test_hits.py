"""`Hits`: the word that a guarded view shares with the manager."""

from __future__ import annotations

import asyncio

from hwpoison.core.machine import Machine
from tests.contract.rig import Rig


async def test_the_manager_sees_whether_a_guard_is_open_and_the_client_how_many_losses_it_has_met(rig: Rig) -> None:
    client = await rig.client()
    hits = await client.hits()
    assert not hits.guarded
    for guards in (1, 2, 1):
        await client.open_guards(guards)
        assert hits.guarded
    await client.open_guards(0)
    assert not hits.guarded
    assert await client.met() == 0
    assert [hits.hit(), hits.hit(), hits.hit()] == [1, 2, 3]
    assert await client.met() == 3


async def test_clients_have_words_of_their_own(rig: Rig) -> None:
    first, second = await rig.client(), await rig.client()
    hits = await first.hits()
    other = await second.hits()
    await first.open_guards(1)
    hits.hit()
    assert (other.guarded, await second.met()) == (False, 0)


async def test_who_was_shown_zeros_finds_them_counted(rig: Rig, machine: Machine) -> None:
    page = machine.page_size
    store = machine.create("object", page)
    client = await rig.client()
    hits = await client.hits()
    address = await client.map(store, private=True)
    for expected in range(1, 20):
        reading = asyncio.create_task(client.load(address))
        await client.fault()
        hits.hit()
        await client.space.show_zeros(address)
        client.space.wake(address, page)
        assert await reading == 0
        assert await client.met() == expected
        await client.discard(address, page)
    store.close()
