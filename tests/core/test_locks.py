"""Page locks against a naive model, turn by turn of the event loop."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from hwpoison.core.locks import Held, RangeLocks

PAGES = 6


@dataclass(eq=False)
class Wanted:
    """One request, and what the model knows of it."""

    held: Held
    task: asyncio.Task[None]
    first: int
    end: int

    def meets(self, other: Wanted) -> bool:
        return self.first < other.end and other.first < self.end


class LocksMachine(RuleBasedStateMachine):
    """The model: requests in the order in which they came; each has its pages when no earlier one that is still there
    wants any of them."""

    requests = Bundle("requests")

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.locks = RangeLocks()
        self.order: list[Wanted] = []

    def teardown(self) -> None:
        while self.order:
            self.drop(self.order[0])
            self.settle()
        assert self.locks.free(0, PAGES)
        assert not self.locks._held
        assert not self.locks._waiting
        self.loop.close()

    def settle(self) -> None:
        async def turns() -> None:
            for _ in range(4):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def granted(self, one: Wanted) -> bool:
        earlier = self.order[: self.order.index(one)]
        return not any(one.meets(other) for other in earlier)

    def drop(self, one: Wanted) -> None:
        """Release it if it has its pages, cancel it if it waits."""
        if self.granted(one):
            self.locks.release(one.held)
        else:
            one.task.cancel()
        self.order.remove(one)

    @rule(target=requests, first=st.integers(0, PAGES - 1), count=st.integers(1, PAGES))
    def request(self, first: int, count: int) -> Wanted:
        count = min(count, PAGES - first)
        was_free = self.locks.free(first, count)
        held = self.locks.hold(first, count)
        one = Wanted(held, self.loop.create_task(self.locks.acquire(held)), first, first + count)
        self.order.append(one)
        self.settle()
        assert was_free == self.granted(one)
        return one

    @rule(one=consumes(requests))
    def end(self, one: Wanted) -> None:
        self.drop(one)
        self.settle()

    @rule(one=requests, count=st.integers(1, PAGES))
    def release_front(self, one: Wanted, count: int) -> None:
        if self.granted(one) and count < one.end - one.first:
            one.held.release_front(count)
            one.first += count
            self.settle()

    @rule(one=consumes(requests), other=consumes(requests), cancelled_first=st.booleans())
    def grant_and_cancel_in_one_turn(self, one: Wanted, other: Wanted, cancelled_first: bool) -> None:
        """A request ends, and another one, that may be waiting for just that, is cancelled before the loop goes on."""
        if not self.granted(one) or self.granted(other):
            self.drop(one)
            self.settle()
            self.drop(other)
        elif cancelled_first:
            other.task.cancel()
            self.locks.release(one.held)
            self.order.remove(one)
            self.order.remove(other)
        else:
            self.locks.release(one.held)
            other.task.cancel()
            self.order.remove(one)
            self.order.remove(other)
        self.settle()

    @invariant()
    @precondition(lambda self: hasattr(self, "order"))
    def those_have_their_pages_that_should(self) -> None:
        for one in self.order:
            assert one.task.done() == self.granted(one)
            assert not one.task.cancelled()
        having = [one for one in self.order if self.granted(one)]
        assert {id(one.held) for one in having} == {id(held) for held in self.locks._held}
        for page in range(PAGES):
            assert self.locks.free(page) == (not any(one.first <= page < one.end for one in self.order))


LocksMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestLocks: Any = LocksMachine.TestCase


def test_pages_are_held_inside_a_with_block_and_free_after_an_error() -> None:
    async def story() -> None:
        locks = RangeLocks()
        with pytest.raises(ZeroDivisionError):
            async with locks.hold(3, 2) as held:
                assert (held.first, held.end) == (3, 5)
                assert not locks.free(4)
                raise ZeroDivisionError
        assert locks.free(0, PAGES)

    asyncio.run(story())


def test_who_waits_for_the_front_of_a_range_has_it_when_the_front_is_let_go() -> None:
    order: list[str] = []

    async def wait(locks: RangeLocks, first: int, count: int, name: str) -> None:
        async with locks.hold(first, count):
            order.append(name)

    async def story() -> None:
        locks = RangeLocks()
        async with asyncio.TaskGroup() as group:
            async with locks.hold(0, 6) as held:
                group.create_task(wait(locks, 3, 2, "behind"))
                group.create_task(wait(locks, 0, 2, "front"))
                await asyncio.sleep(0)
                held.release_front(1)
                await asyncio.sleep(0)
                assert order == []
                held.release_front(1)
                await asyncio.sleep(0)
                assert order == ["front"]
        assert order == ["front", "behind"]

    asyncio.run(story())


def test_a_wait_that_is_bounded_leaves_nothing_behind_and_can_be_repeated() -> None:
    """As the handler of failures does it: a first wait that is reported when it is long, then another."""

    async def story() -> None:
        locks = RangeLocks()
        first, second = locks.hold(0), locks.hold(0)
        await locks.acquire(first)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await locks.acquire(second)
        again = asyncio.create_task(locks.acquire(second))
        await asyncio.sleep(0)
        locks.release(first)
        await again
        locks.release(second)
        assert locks.free(0)

    asyncio.run(story())
