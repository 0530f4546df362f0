"""The reverse map and the lookup by address, against models that look at every mapping there is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwpoison.core.mappings import Client, Mapping
from hwpoison.core.objects import MemoryObject
from hwpoison.linux.machine import LinuxMachine
from hwpoison.linux.space import LinuxSpace
from hwpoison.linux.syscalls import PAGE_SIZE
from hwpoison.linux.userfaultfd import open_userfaultfd

PAGES = 64
SLOTS = 16
"""Places in a client's address space: one mapping of a whole object fits into each."""


class Step(NamedTuple):
    """Map pages in a slot of a client's address space, or unmap what is there."""

    client: int
    slot: int
    first: int
    count: int


steps = st.lists(
    st.builds(Step, st.integers(0, 2), st.integers(0, SLOTS - 1), st.integers(0, PAGES - 1), st.integers(1, PAGES)),
    max_size=60,
)


@pytest.fixture(scope="module")
def object_(machine: LinuxMachine) -> Iterator[MemoryObject]:
    store = machine.create("mapped", PAGES * PAGE_SIZE)
    yield MemoryObject(1, "mapped", PAGES * PAGE_SIZE, PAGE_SIZE, store)
    store.close()


@pytest.fixture(scope="module")
def space(machine: LinuxMachine) -> Iterator[LinuxSpace]:
    """This process's own: nothing is asked of it but its number."""
    space = machine.space(open_userfaultfd().fd, os.getpid(), os.pidfd_open(os.getpid()))
    yield space
    os.close(space.fd)
    os.close(space.pidfd)


def play(object_: MemoryObject, space: LinuxSpace, story: list[Step]) -> tuple[list[Client], list[Mapping]]:
    """The clients, and the mappings that are left."""
    clients = [Client(number, space, PAGE_SIZE) for number in range(3)]
    at: dict[tuple[int, int], Mapping] = {}
    for number, (client, slot, first, count) in enumerate(story):
        old = at.pop((client, slot), None)
        if old is not None:
            clients[client].remove(old)
            object_.mappings.remove(old)
        else:
            address = (1 + slot * PAGES) * PAGE_SIZE
            mapping = Mapping(number, clients[client], object_, address, first, min(count, PAGES - first), None)
            clients[client].add(mapping)
            object_.mappings.add(mapping)
            at[client, slot] = mapping
    return clients, list(at.values())


def numbers(mappings: list[Mapping]) -> list[int]:
    return sorted(one.number for one in mappings)


@given(story=steps, ranges=st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES)), min_size=1))
def test_a_range_of_pages_is_covered_by_those_that_show_one_of_them(
    object_: MemoryObject, space: LinuxSpace, story: list[Step], ranges: list[tuple[int, int]]
) -> None:
    _, left = play(object_, space, story)
    try:
        for first, count in ranges:
            showing = [one for one in left if any(one.covers(page) for page in range(first, first + count))]
            assert numbers(object_.mappings.covering(first, count)) == numbers(showing)
        assert numbers(list(object_.mappings)) == numbers(left)
        assert len(object_.mappings) == len(left)
    finally:
        for one in left:
            object_.mappings.remove(one)


@given(story=steps)
def test_an_address_is_found_in_the_mapping_that_shows_it_and_back(
    object_: MemoryObject, space: LinuxSpace, story: list[Step]
) -> None:
    clients, left = play(object_, space, story)
    try:
        for client in clients:
            for page in range(SLOTS * PAGES + 2):
                address = page * PAGE_SIZE
                own = [one for one in left if one.client is client and one.address <= address < one.end_address]
                found = client.find(address)
                assert [found] == (own or [None])
                if found is not None:
                    assert client.find(address + PAGE_SIZE - 1) is found
                    assert found.covers(found.page(address))
                    assert found.address_of(found.page(address)) == address
            assert sorted(one.address for one in left if one.client is client) == [one.address for one in client.mappings]
    finally:
        for one in left:
            object_.mappings.remove(one)


def test_those_that_are_looked_at_may_go_meanwhile(object_: MemoryObject, space: LinuxSpace) -> None:
    """A failure tells one owner after the other, and any of them may end between."""
    _, left = play(object_, space, [Step(0, 0, 0, 1), Step(1, 0, 0, 1), Step(2, 0, 0, 1)])
    for one in object_.mappings:
        object_.mappings.remove(one)
        left.remove(one)
    assert not left
    assert not len(object_.mappings)


def test_how_often_a_thread_was_told_is_forgotten_with_the_mapping(object_: MemoryObject, space: LinuxSpace) -> None:
    """Else it is killed for the first loss of what it maps at the same address later, without a signal before."""
    (client, *_), left = play(object_, space, [Step(0, 0, 0, 2), Step(0, 1, 0, 2)])
    first, second = left
    client.told = {(1, first.address + PAGE_SIZE): 16, (2, first.address): 1, (1, second.address): 16}
    client.remove(first)
    assert client.told == {(1, second.address): 16}
    for one in left:
        object_.mappings.remove(one)
