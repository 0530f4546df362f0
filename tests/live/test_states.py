"""What the handler does in each state that a page can be in: one part for each row of `hwpoison.core.failure.TABLE`.

Pages whose state is about to change are in `test_pages_on_their_way`, what becomes of frames is in `test_quarantine`.
"""

from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import hwpoison
from hwpoison import Outcome, State, protocol
from hwpoison.core.records import Report, Source
from tests.live.conftest import known
from tests.live.frames import PAGE, can_see_frames, frame_at
from tests.live.process import Child
from tests.live.reading import reader, touch
from tests.support import SECONDS_MAX, wait_until

MakeFile = Callable[..., Path]


# --- free page -------------------------------------------------------------------------------------------------------


def test_a_page_that_nobody_has_touched_is_a_free_page_and_comes_good_on_the_next_access(
    manager: hwpoison.Manager, file: MakeFile
) -> None:
    anonymous, weights = manager.allocate(4 * PAGE, "t"), manager.open(file(4 * PAGE))
    for memory in (anonymous, weights):
        failure = manager.report(memory, PAGE)
        assert (failure.state, failure.outcome, failure.victims) == (State.FREE, Outcome.RECOVERED, ())
    assert touch(anonymous) == bytes(4 * PAGE)
    assert touch(weights) == known(4 * PAGE)
    assert manager.statistics().quarantined == 0


# --- clean file page -------------------------------------------------------------------------------------------------


def test_a_clean_file_page_that_is_mapped_is_read_again_at_once_and_nobody_is_told(
    manager: hwpoison.Manager, file: MakeFile
) -> None:
    memory = manager.open(file(4 * PAGE))
    with reader(manager, memory) as child:
        assert child.ask([0, 4 * PAGE]) == touch(memory).hex() == known(4 * PAGE).hex()
        failure = manager.report(memory, PAGE + 5)
        assert (failure.state, failure.outcome, failure.victims) == (State.CLEAN_FILE, Outcome.RECOVERED, ())
        assert (failure.name, failure.offset, failure.nbytes) == (memory.name, PAGE, PAGE)
        faults = manager.statistics().faults
        assert touch(memory) == known(4 * PAGE)
        assert manager.statistics().faults == faults, "the page was not there at once"
        assert child.ask([0, 4 * PAGE]) == known(4 * PAGE).hex()
        # What was told before the next report is delivered before what that one causes.
        table = manager.allocate(PAGE, "table")
        assert child.ask("notices") == [] == table.lost() == memory.lost()
        child.tell(None)


def test_a_clean_file_page_that_nobody_maps_is_dropped_and_read_on_the_next_access(
    manager: hwpoison.Manager, file: MakeFile
) -> None:
    path = file(4 * PAGE)
    memory = manager.open(path)
    touch(memory)
    # A client that has asked for the object and has not mapped it yet keeps it alive.
    with path.open("rb") as opened, hwpoison.connect(manager.socket) as other:
        request = protocol.Open(str(path), 0, None, False)
        _, fds = other.connection.request_fds(request, protocol.Found, [opened.fileno()])
        fds.close()
        memory.close()
        read = manager.statistics().read
        failure = manager.report(str(path), PAGE)
        assert (failure.state, failure.outcome, failure.victims) == (State.CLEAN_FILE, Outcome.RECOVERED, ())
        assert manager.objects()[0].present == 3 * PAGE
        assert manager.statistics().read == read
        again = manager.open(path)
        assert touch(again) == known(4 * PAGE)


# --- dirty file page -------------------------------------------------------------------------------------------------


def test_a_dirty_file_page_is_lost_to_all_its_owners_and_they_are_told_once_each(
    manager: hwpoison.Manager, file: MakeFile
) -> None:
    path = file(3 * PAGE + 100)
    memory = manager.open(path, "r+")
    others = manager.allocate(PAGE, "of somebody else")
    told: queue.SimpleQueue[hwpoison.Notice] = queue.SimpleQueue()
    started = time.time()
    memory.on_failure(told.put)
    others.on_failure(told.put)
    with reader(manager, memory) as one, reader(manager, memory) as two, reader(manager, others) as stranger:
        memory.buffer[3 * PAGE] ^= 255
        failure = manager.report(memory, 3 * PAGE + 99)
        assert (failure.state, failure.outcome) == (State.DIRTY_FILE, Outcome.RECOVERED)
        assert failure.victims == tuple(sorted((os.getpid(), one.pid, two.pid)))
        # A second loss shows that nothing more was said of the first: notices come in order.
        memory.buffer[0] ^= 255
        second = manager.report(memory, 0)
        for expected, offset, nbytes in ((failure, 3 * PAGE, 100), (second, 0, PAGE)):
            notice = told.get(timeout=SECONDS_MAX)
            assert notice == hwpoison.Notice(
                event_id=expected.event_id, name=str(path), offset=offset, nbytes=nbytes, state=State.DIRTY_FILE,
                outcome=Outcome.RECOVERED, source="application", time=notice.time, memory=notice.memory,
            )  # fmt: skip
            assert notice.memory in (memory, others)
            assert started <= notice.time <= time.time()
        for child in (one, two):
            wait_until(lambda child=child: len(child.ask("notices")) >= 2, "both notices")
            assert child.ask("notices") == [[str(path), 3 * PAGE, 100], [str(path), 0, PAGE]]
        assert stranger.ask("notices") == []
        assert told.empty()
        for child in (one, two, stranger):
            child.tell(None)
    with pytest.raises(OSError):
        memory.close()


def test_flush_raises_eio_exactly_once_for_each_handle_of_a_dirty_page(manager: hwpoison.Manager, file: MakeFile) -> None:
    path = file(4 * PAGE)
    mine, second = manager.open(path, "r+"), manager.open(path, "r+")
    with reader(manager, mine) as child:
        mine.buffer[PAGE : 3 * PAGE] = known(2 * PAGE, 2)
        manager.report(mine, PAGE)
        assert child.ask("flush") == 5
        for memory in (mine, second):
            with pytest.raises(OSError) as caught:
                memory.flush()
            assert caught.value.errno == 5
        later = manager.open(path, "r+")
        for memory in (mine, second, later):
            memory.flush()
        assert child.ask("flush") == 0
        child.tell(None)
    expected = known(2 * PAGE) + known(2 * PAGE, 2)[PAGE:] + known(4 * PAGE)[3 * PAGE :]
    assert path.read_bytes() == expected, "only what is not lost was written"


def test_the_stale_content_of_a_lost_dirty_page_is_not_read_before_somebody_discards_it(
    manager: hwpoison.Manager, file: MakeFile
) -> None:
    path = file(4 * PAGE)
    memory = manager.open(path, "r+")
    memory.buffer[PAGE : 2 * PAGE] = known(PAGE, 2)
    manager.report(memory, PAGE)
    later = manager.open(path, "r+")
    with reader(manager, memory) as child:
        memory.prefetch()
        for one in (memory, later):
            assert one.lost() == [(str(path), PAGE, PAGE)]
            with pytest.raises(hwpoison.PoisonError) as caught:
                one.read(0, 4 * PAGE)
            assert caught.value.ranges == ((str(path), PAGE, PAGE),)
        assert child.ask([2 * PAGE - 1, 1]) == [[str(path), PAGE, PAGE]]
        with pytest.raises(OSError):
            memory.flush()
        assert child.ask([PAGE, 1]) == [[str(path), PAGE, PAGE]], "flush has not brought the old content back"
        assert later.discard() == PAGE
        assert child.ask([0, 4 * PAGE]) == known(4 * PAGE).hex()
        assert touch(memory) == known(4 * PAGE)
        child.tell(None)
    later.flush()


# --- anonymous page --------------------------------------------------------------------------------------------------


def test_an_anonymous_page_is_lost_also_if_it_held_zeros_only(manager: hwpoison.Manager) -> None:
    memory = manager.allocate(2 * PAGE + 1, "t")
    told: queue.SimpleQueue[hwpoison.Notice] = queue.SimpleQueue()
    memory.on_failure(told.put)
    touch(memory)
    failure = manager.inject(memory, 2 * PAGE)
    assert (failure.state, failure.outcome) == (State.ANONYMOUS, Outcome.RECOVERED)
    assert failure.victims == (os.getpid(),)
    assert failure.latency_us > 0
    notice = told.get(timeout=SECONDS_MAX)
    assert (notice.event_id, notice.name, notice.offset, notice.nbytes) == (failure.event_id, "t", 2 * PAGE, 1)
    assert (notice.state, notice.outcome) == (State.ANONYMOUS, Outcome.RECOVERED)


# --- already poisoned page -------------------------------------------------------------------------------------------


def test_a_second_report_of_a_lost_page_is_ehwpoison_and_counts_once(manager: hwpoison.Manager) -> None:
    memory = manager.allocate(PAGE, "t")
    told: queue.SimpleQueue[hwpoison.Notice] = queue.SimpleQueue()
    memory.on_failure(told.put)
    touch(memory)
    first = manager.report(memory, 0)
    second = manager.report(memory, 10)
    assert (second.state, second.outcome, second.reason) == (State.ALREADY_POISONED, Outcome.FAILED, "EHWPOISON")
    assert second.already_poisoned
    assert second.event_id != first.event_id
    counted = manager.statistics()
    assert counted.outcomes == {Outcome.RECOVERED: 1}
    assert counted.states == {State.ANONYMOUS: 1, State.ALREADY_POISONED: 1}
    assert counted.quarantined == PAGE
    assert told.get(timeout=SECONDS_MAX).event_id == first.event_id
    memory.discard()
    touch(memory)
    third = manager.report(memory, 0)
    assert third.state == State.ANONYMOUS, "after a discard it is a page like any other"
    assert told.get(timeout=SECONDS_MAX).event_id == third.event_id, "the second report told nobody"


def test_action_required_on_an_already_poisoned_page_still_reaches_the_accessor(manager: hwpoison.Manager) -> None:
    memory = manager.allocate(PAGE, "t")
    touch(memory)
    manager.report(memory, 0)
    toucher = """
manager = hwpoison.connect(arguments[0])
memory = manager.attach("t")
say(memory.address)
hear()
memory.buffer[0]
"""
    with Child(toucher, manager.socket) as child:
        address = child.hear()
        failure = manager.report(pid=child.pid, address=address, action_required=True)
        assert (failure.state, failure.victims) == (State.ALREADY_POISONED, (child.pid,))
        child.tell()
        assert child.wait() == -signal.SIGBUS


@pytest.mark.usefixtures("root")
def test_a_frame_in_quarantine_is_an_already_poisoned_page(manager: hwpoison.Manager, file: MakeFile) -> None:
    memory = manager.open(file(PAGE))
    touch(memory)
    bad = frame_at(memory.address)
    assert manager.report(pfn=bad).state == State.CLEAN_FILE
    assert manager.report(pfn=bad).state == State.ALREADY_POISONED
    assert manager.report(pfn=frame_at_of(memory)).state == State.CLEAN_FILE, "the page itself is well"


def frame_at_of(memory: hwpoison.Memory) -> int:
    touch(memory)
    return frame_at(memory.address)


# --- reserved page ---------------------------------------------------------------------------------------------------


def test_the_memory_of_the_manager_itself_is_a_reserved_page(manager: hwpoison.Manager) -> None:
    failure = manager.report(pid=manager.pid, address=0x7000)
    assert (failure.state, failure.outcome, failure.victims) == (State.RESERVED, Outcome.IGNORED, ())
    if can_see_frames():
        stack = next(line for line in Path(f"/proc/{manager.pid}/maps").read_text().splitlines() if "[heap]" in line)
        frame = frame_at(int(stack.partition("-")[0], 16), manager.pid)
        assert frame
        assert manager.report(pfn=frame).state == State.RESERVED


# --- unknown page ----------------------------------------------------------------------------------------------------


def test_an_address_that_is_not_managed_is_an_unknown_page_and_is_logged(manager: hwpoison.Manager) -> None:
    memory = manager.allocate(PAGE, "t")
    strangers = [
        {"pid": os.getpid(), "address": memory.address - PAGE},
        {"pid": os.getpid(), "address": memory.address + PAGE},
        {"pid": 1, "address": memory.address},
    ]
    for place in strangers:
        failure = manager.report(**place)
        assert (failure.state, failure.outcome, failure.victims) == (State.UNKNOWN, Outcome.IGNORED, ())
        logged = [(event.kind, event.state) for event in manager.events() if event.event_id == failure.event_id]
        assert logged == [("report", ""), ("outcome", State.UNKNOWN)]


@pytest.mark.usefixtures("root")
def test_a_foreign_frame_is_handed_to_the_kernel_only_if_the_operator_wants_that_and_the_report_is_real() -> None:
    nowhere = 1 << 40  # no machine has this frame, so a kernel that can take frames offline refuses it
    with hwpoison.Manager() as manager:
        failure = manager.report(pfn=nowhere)
        assert (failure.state, failure.outcome, failure.reason) == (State.UNKNOWN, Outcome.IGNORED, "")
    with hwpoison.Manager(offline_foreign=True) as manager:
        real = manager.report(pfn=nowhere)
        assert (real.state, real.outcome) == (State.UNKNOWN, Outcome.IGNORED)
        assert "hard offline failed" in real.reason
        simulated = protocol.ReportPage(Report(pfn=nowhere, source=Source.INJECTED))
        failure = manager.connection.request(simulated, protocol.Handled).failure
        assert (failure.state, failure.outcome, failure.reason) == (State.UNKNOWN, Outcome.IGNORED, "")
