"""Who is told of a loss learns of it once, in order and by its event id, however late it reads; nobody waits for it."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

import hwpoison
from hwpoison.linux.syscalls import PAGE_SIZE
from hwpoison.service.channel import NOTICES_LIMIT
from tests.live.process import Child
from tests.support import SECONDS_MAX, wait_until

pytestmark = pytest.mark.live

MANY = 3 * NOTICES_LIMIT + NOTICES_LIMIT // 2
"""So many that far more wait than may, also without what is repaired and what a socket holds."""

SLOW = """
manager = hwpoison.connect(arguments[0])
go_on, told = threading.Event(), []

def listen(notice):
    go_on.wait()
    told.append([notice.event_id, notice.name, notice.offset, notice.nbytes, notice.state, notice.outcome, notice.reason])

def attach(name):
    memory = manager.attach(name)
    memory.on_failure(listen)
    return memory

kept = [attach("table")]
say()
while (order := hear()) != "go on":
    kept.append(attach(order))
    say()
go_on.set()
say()
while (last := hear()) is not None:
    while last not in [one[0] for one in told]:
        time.sleep(0.001)
    with open(arguments[1], "w") as file:
        json.dump(told, file)
    say()
"""
"""Its function waits with the first notice until it is told to go on; meanwhile it attaches what it is told. Then it writes
down what it has been told, up to an event."""


def as_told(failure: hwpoison.Failure) -> list[object]:
    """What an owner must be told of it."""
    return [
        failure.event_id, failure.name, failure.offset, failure.nbytes, failure.state, failure.outcome, failure.reason
    ]  # fmt: skip


def told_up_to(failure: hwpoison.Failure, slow: Child, place: Path) -> Any:
    """What the slow one has been told when it has been told of this, which may be more."""
    slow.ask(failure.event_id)
    return json.loads(place.read_text())


def strike(manager: hwpoison.Manager, memory: hwpoison.Memory, page: int) -> hwpoison.Failure:
    failure = manager.inject(memory, page * PAGE_SIZE)
    assert failure.state is hwpoison.State.ANONYMOUS
    return failure


def test_every_loss_that_stands_is_told_once_and_in_order_to_an_owner_that_reads_late(
    manager: hwpoison.Manager, tmp_path: Path
) -> None:
    place = tmp_path / "told"
    table = manager.allocate((MANY + 2) * PAGE_SIZE, "table")
    table.buffer[:] = b"a" * table.nbytes
    at_once: list[str] = []
    table.on_failure(lambda notice: at_once.append(notice.event_id))
    with Child(SLOW, manager.socket, str(place)) as slow:
        slow.hear()
        failures, standing = [], {}
        for page in range(MANY):
            failures.append(strike(manager, table, page))
            standing[page] = failures[-1]
            if page % 3 == 0:
                table.repair(page * PAGE_SIZE, b"b" * PAGE_SIZE)
                del standing[page]
            if page % 9 == 5:
                # Another loss of the same page, and the first one stands no more.
                table.discard(page * PAGE_SIZE, PAGE_SIZE)
                failures.append(strike(manager, table, page))
                standing[page] = failures[-1]
        assert all(slow.pid in one.victims for one in failures)
        assert len(standing) > 2 * NOTICES_LIMIT
        wait_until(lambda: len(at_once) >= len(failures), "the other owner is told while this one reads nothing")
        assert at_once == [one.event_id for one in failures]

        assert slow.ask("go on") is None
        # While it reads on there is another one, and then another: what is told after this would be told twice.
        for page in (MANY, MANY + 1):
            failures.append(strike(manager, table, page))
            standing[page] = failures[-1]
            told = told_up_to(failures[-1], slow, place)
        slow.tell()
        assert slow.wait() == 0
    ids = {one.event_id for one in standing.values()}
    assert [one for one in told if one[0] in ids] == [as_told(one) for one in failures if one.event_id in ids]
    # What was repaired before it was read may be told as well, and neither twice nor out of order.
    heard = [one[0] for one in told]
    assert heard == [one.event_id for one in failures if one.event_id in heard]


def test_more_than_may_wait_are_told_although_the_manager_dies_meanwhile(manager: hwpoison.Manager, tmp_path: Path) -> None:
    place, pages = tmp_path / "told", NOTICES_LIMIT + NOTICES_LIMIT // 2
    table = manager.allocate(pages * PAGE_SIZE, "table")
    table.buffer[:] = b"a" * table.nbytes
    with Child(SLOW, manager.socket, str(place)) as slow:
        slow.hear()
        expected = [strike(manager, table, page) for page in range(pages)]
        os.kill(manager.pid, signal.SIGKILL)
        slow.ask("go on")
        assert told_up_to(expected[-1], slow, place) == [as_told(one) for one in expected]
        slow.tell()
        assert slow.wait() == 0


def test_an_owner_that_reads_late_is_told_first_of_losses_before_it_attached_that_stand(
    manager: hwpoison.Manager, tmp_path: Path
) -> None:
    place, pages = tmp_path / "told", 2 * NOTICES_LIMIT
    table, late = manager.allocate(pages * PAGE_SIZE, "table"), manager.allocate(3 * PAGE_SIZE, "late")
    for memory in (table, late):
        memory.buffer[:] = b"a" * memory.nbytes
    with Child(SLOW, manager.socket, str(place)) as slow:
        slow.hear()
        expected = [strike(manager, table, page) for page in range(pages - 1)]
        before = strike(manager, late, 0)
        assert before.victims == (os.getpid(),)
        slow.ask("late")
        expected += [strike(manager, late, 1), strike(manager, table, pages - 1), strike(manager, late, 2)]
        slow.ask("go on")
        told = told_up_to(expected[-1], slow, place)
        # When the thread has heard of the other memory, between two of this one's, is not known.
        of_table = [as_told(one) for one in expected if one.name == "table"]
        assert [one for one in told if one[1] == "table"] == of_table
        assert [one for one in told if one[1] == "late"] == [as_told(before), as_told(expected[-3]), as_told(expected[-1])]
        slow.tell()
        assert slow.wait() == 0


def test_a_function_is_called_once_for_what_was_lost_before_and_not_for_another_object_of_the_name(
    manager: hwpoison.Manager,
) -> None:
    entered, go_on, last = threading.Event(), threading.Event(), threading.Event()
    slow = manager.allocate(PAGE_SIZE, "slow")
    slow.on_failure(lambda _: (entered.set(), go_on.wait()))
    slow.write(0, b"x")
    strike(manager, slow, 0)
    assert entered.wait(SECONDS_MAX)
    # What happens now is read by the thread only later.
    gone = manager.allocate(PAGE_SIZE, "table")
    gone.write(0, b"x")
    strike(manager, gone, 0)
    gone.close()
    table = manager.allocate(3 * PAGE_SIZE, "table")
    table.buffer[:] = b"a" * table.nbytes
    expected = [strike(manager, table, 0).event_id]
    told: list[str] = []
    table.on_failure(lambda notice: told.append(notice.event_id))
    expected.append(strike(manager, table, 1).event_id)
    table.on_failure(lambda notice: last.set() if notice.offset == 2 * PAGE_SIZE else None)
    expected.append(strike(manager, table, 2).event_id)
    go_on.set()
    assert last.wait(SECONDS_MAX)
    assert told == expected
