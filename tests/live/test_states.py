"""What the handler does in each state that a page can be in: one part for each row of `hwpoison.core.failure.TABLE`."""

from __future__ import annotations

import os
import queue
import resource
import select
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import hwpoison
from hwpoison import Outcome, State, protocol
from hwpoison.core.records import Report, Source
from tests.live.conftest import known
from tests.live.frames import PAGE, can_see_frames, forget_cached, frame_at, is_held, times_mapped, use_memory
from tests.live.process import Child
from tests.live.slow_files import SlowFile
from tests.support import SECONDS_MAX, wait_until

MakeFile = Callable[..., Path]
MakeSlowFile = Callable[[bytes], SlowFile]

READER = """
memory = manager.attach(arguments[1])
notices = []
handle = memory.on_failure(lambda notice: notices.append([notice.name, notice.offset, notice.nbytes]))
say()
while (order := hear()) is not None:
    if order == "notices":
        say(notices)
    elif order == "flush":
        try:
            memory.flush()
            say(0)
        except OSError as error:
            say(error.errno)
    else:
        try:
            say(memory.read(*order).hex())
        except hwpoison.PoisonError as error:
            say([list(one) for one in error.ranges])
manager.close()
"""


def reader(manager: hwpoison.Manager, memory: hwpoison.Memory, *, start: str = "") -> Child:
    """A process that maps the memory and does what it is told: reads (offset, nbytes), "notices", "flush"."""
    child = Child("manager = hwpoison.connect(arguments[0])\n" + start + READER, manager.socket, memory.name)
    child.hear()
    return child


def touch(memory: hwpoison.Memory) -> bytes:
    """Map every page in this process, and return what is there."""
    return bytes(memory.buffer)


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
        os.close(fds[0])
        memory.close()
        read = manager.statistics().read
        failure = manager.report(str(path), PAGE)
        assert (failure.state, failure.outcome, failure.victims) == (State.CLEAN_FILE, Outcome.RECOVERED, ())
        assert manager.objects()[0].present == 3 * PAGE
        assert manager.statistics().read == read
        again = manager.open(path)
        assert touch(again) == known(4 * PAGE)


@pytest.mark.parametrize("kind", ["clean", "dirty", "anonymous"])
@pytest.mark.usefixtures("root")
def test_the_bad_frame_is_quarantined_and_the_page_is_in_another(
    kind: str, manager: hwpoison.Manager, file: MakeFile
) -> None:
    memory = {
        "clean": lambda: manager.open(file(4 * PAGE)),
        "dirty": lambda: manager.open(file(4 * PAGE), "r+"),
        "anonymous": lambda: manager.allocate(4 * PAGE),
    }[kind]()
    if kind != "clean":
        memory.buffer[PAGE] = 1
    touch(memory)
    address = memory.address + PAGE
    bad = frame_at(address)
    assert times_mapped(bad) > 0
    assert manager.report(memory, PAGE).outcome == Outcome.RECOVERED
    memory.discard()
    assert len(touch(memory)) == 4 * PAGE
    assert frame_at(address) not in (0, bad)
    assert is_held(bad)
    assert manager.statistics().quarantined == PAGE
    if kind == "dirty":
        with pytest.raises(OSError):
            memory.flush()


@pytest.mark.usefixtures("root")
def test_bad_frames_stay_in_quarantine_under_memory_pressure_and_for_a_while_after_the_manager_was_killed(
    file: MakeFile,
) -> None:
    manager = hwpoison.Manager()
    memory = manager.open(file(64 * PAGE))
    touch(memory)
    bad = [frame_at(memory.address + page * PAGE) for page in range(64)]
    keeper = int(Path(f"/proc/{manager.pid}/task/{manager.pid}/children").read_text())
    for page in range(64):
        manager.report(memory, page * PAGE)
    touch(memory)
    use_memory(256 << 20)
    assert all(map(is_held, bad))
    keeper_ends, manager_ends = os.pidfd_open(keeper), os.pidfd_open(manager.pid)
    try:
        os.kill(manager.pid, signal.SIGKILL)
        select.select([manager_ends], [], [], SECONDS_MAX)
        use_memory(256 << 20)
        assert not select.select([keeper_ends], [], [], 0)[0], "the keeper did not outlive the manager"
        assert all(map(is_held, bad))
        with pytest.raises(ConnectionError):
            manager.close()
        assert select.select([keeper_ends], [], [], SECONDS_MAX)[0], "the keeper holds for ever"
        wait_until(lambda: not any(map(is_held, bad)), "the frames go back to the system with the keeper")
    finally:
        os.close(keeper_ends)
        os.close(manager_ends)


def test_where_the_system_holds_no_more_frames_the_page_is_well_and_the_frame_is_said_not_to_be_isolated(
    manager: hwpoison.Manager, file: MakeFile
) -> None:
    memory = manager.open(file(2 * PAGE))
    touch(memory)
    limits = resource.prlimit(manager.pid, resource.RLIMIT_NOFILE)
    # A limit below what is open already: the manager gets no pipe to hold a frame in.
    resource.prlimit(manager.pid, resource.RLIMIT_NOFILE, (5, limits[1]))
    failure = manager.report(memory, 0)
    resource.prlimit(manager.pid, resource.RLIMIT_NOFILE, limits)
    assert (failure.state, failure.outcome, failure.victims) == (State.CLEAN_FILE, Outcome.FAILED, ())
    assert "quarantine is full" in failure.reason
    assert touch(memory) == known(2 * PAGE)
    assert manager.statistics().quarantined == 0
    assert manager.report(memory, 0).outcome == Outcome.RECOVERED


# --- dirty file page -------------------------------------------------------------------------------------------------


def test_a_dirty_file_page_is_lost_to_all_its_owners_and_they_are_told_once_each(
    manager: hwpoison.Manager, file: MakeFile
) -> None:
    path = file(3 * PAGE + 100)
    memory = manager.open(path, "r+")
    others = manager.allocate(PAGE, "of somebody else")
    told: queue.SimpleQueue[hwpoison.Notice] = queue.SimpleQueue()
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
                outcome=Outcome.RECOVERED,
            )  # fmt: skip
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


# --- pages on their way ----------------------------------------------------------------------------------------------


def test_a_report_on_a_page_that_is_being_read_in_waits_for_it_and_then_decides(
    slow_file: MakeSlowFile, manager: hwpoison.Manager
) -> None:
    slow = slow_file(known(4 * PAGE))
    memory = manager.open(slow.path, name="slow")
    slow.hold("read")
    reporter = "manager = hwpoison.connect(arguments[0], maps=False)\nsay(str(manager.report(arguments[1], 0).state))"
    with reader(manager, memory) as child:
        child.tell([0, 4 * PAGE])
        wait_until(lambda: bool(slow.waiting), "the file is being read")
        with Child(reporter, manager.socket, "slow") as reporting:
            wait_until(lambda: (0, "report") in told_of(manager, "slow"), "the report has arrived")
            assert (0, "outcome") not in told_of(manager, "slow")
            slow.hold()
            assert reporting.hear() == State.CLEAN_FILE
        assert child.hear() == known(4 * PAGE).hex()
        child.tell(None)
    assert touch(memory) == known(4 * PAGE)


def told_of(manager: hwpoison.Manager, name: str) -> list[tuple[int, str]]:
    return [(event.offset, event.kind) for event in manager.events() if event.name == name]


def test_reports_during_a_prefetch_of_an_uncached_file_leave_every_byte_right(
    manager: hwpoison.Manager, file: MakeFile
) -> None:
    nbytes = 24 << 20
    path = file(nbytes)
    expected = known(nbytes)
    states = set()
    prefetch = """
manager = hwpoison.connect(arguments[0])
while (path := hear()) is not None:
    memory = manager.open(path)
    say()
    memory.prefetch()
    say()
    memory.close()
manager.close()
"""
    with Child(prefetch, manager.socket) as child:
        for _ in range(8):
            forget_cached(path)
            child.ask(str(path))
            memory = manager.open(path)
            # Just where the reading is: some pages are absent, some locked, some have come.
            while present := manager.objects()[0].present < nbytes:
                present = manager.objects()[0].present
                failure = manager.report(memory, min(present, nbytes - PAGE))
                states.add(failure.state)
                assert failure.outcome == Outcome.RECOVERED
                if present >= nbytes - PAGE:
                    break
            child.hear()
            assert touch(memory) == expected
            assert memory.lost() == []
            memory.close()
            wait_until(lambda: manager.objects() == [], "the object ends with its last mapping")
        child.tell(None)
    assert State.CLEAN_FILE in states, "no report met a page that had come or was coming"


def test_a_report_on_a_page_that_is_being_written_back_waits_for_that_and_loses_nothing(
    slow_file: MakeSlowFile, manager: hwpoison.Manager
) -> None:
    slow = slow_file(known(4 * PAGE))
    memory = manager.open(slow.path, "r+", name="slow")
    memory.buffer[:] = known(4 * PAGE, 2)
    slow.hold("write")
    with reader(manager, memory) as child:
        child.tell("flush")
        wait_until(lambda: bool(slow.waiting), "the page is being written")
        reporter = """
manager = hwpoison.connect(arguments[0], maps=False)
failure = manager.report(arguments[1], 0)
say([failure.state, failure.outcome])
"""
        with Child(reporter, manager.socket, "slow") as reporting:
            wait_until(lambda: (0, "report") in told_of(manager, "slow"), "the report has arrived")
            assert (0, "outcome") not in told_of(manager, "slow")
            slow.hold()
            assert reporting.hear() == [State.CLEAN_FILE, Outcome.RECOVERED]
        assert child.hear() == 0
        assert touch(memory) == known(4 * PAGE, 2) == slow.content
        child.tell(None)


def test_a_page_whose_write_back_fails_while_a_report_waits_is_lost_not_read_again_stale(
    slow_file: MakeSlowFile, manager: hwpoison.Manager
) -> None:
    slow = slow_file(known(PAGE))
    memory = manager.open(slow.path, "r+", name="slow")
    memory.buffer[:] = known(PAGE, 2)
    slow.hold("write")
    reporter = "manager = hwpoison.connect(arguments[0], maps=False)\nsay(manager.report(arguments[1], 0).state)"
    with reader(manager, memory) as child:
        child.tell("flush")
        wait_until(lambda: bool(slow.waiting), "the page is being written")
        with Child(reporter, manager.socket, "slow") as reporting:
            wait_until(lambda: (0, "report") in told_of(manager, "slow"), "the report has arrived")
            slow.fail(write=28)
            slow.hold()
            assert reporting.hear() == State.DIRTY_FILE
        assert child.hear() == 28
        assert child.ask([0, 1]) == [["slow", 0, PAGE]]
        child.tell(None)
        slow.fail()
    with pytest.raises(OSError):
        memory.flush()


def test_reports_during_a_loop_of_writes_and_flushes_lose_what_is_declared_and_nothing_else(
    manager: hwpoison.Manager, file: MakeFile
) -> None:
    pages = 64
    path = file(pages * PAGE)
    writer = """
manager = hwpoison.connect(arguments[0])
memory = manager.open(arguments[1], "r+")
pages = arguments[2]
say()
rounds, lost = 0, set()
for rounds in range(1, 41):
    for page in range(pages):
        try:
            memory.write(page * 4096, rounds.to_bytes(8, "little") * 512)
        except hwpoison.PoisonError:
            say("a write of a whole page repairs it")
    try:
        memory.flush()
    except OSError as error:
        assert error.errno == 5, error
# What was lost after its last write must be said to be lost; everything else must be there.
for name, offset, nbytes in memory.lost():
    lost.update(range(offset // 4096, (offset + nbytes) // 4096))
for page in range(pages):
    if page not in lost:
        assert memory.read(page * 4096, 4096) == rounds.to_bytes(8, "little") * 512, page
say(sorted(lost))
hear()
memory.discard()
for page in range(pages):
    memory.write(page * 4096, rounds.to_bytes(8, "little") * 512)
try:
    memory.flush()
except OSError:
    memory.flush()
manager.close()
say()
"""
    states = set()
    with Child(writer, manager.socket, str(path), pages) as child:
        child.hear()
        page = 0
        while not select.select([child.output], [], [], 0)[0]:
            states.add(manager.report(str(path), page % pages * PAGE).state)
            page += 7
        assert isinstance(child.hear(), list)
        child.ask()
        assert child.wait() == 0
    assert {State.CLEAN_FILE, State.DIRTY_FILE} <= states
    assert path.read_bytes() == (40).to_bytes(8, "little") * 512 * pages


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


# --- truncated page --------------------------------------------------------------------------------------------------


def test_a_page_whose_object_ends_while_the_report_waits_is_a_truncated_page(
    slow_file: MakeSlowFile, manager: hwpoison.Manager
) -> None:
    slow = slow_file(known(4 * PAGE))
    slow.hold("read")
    owner = """
manager = hwpoison.connect(arguments[0])
memory = manager.open(arguments[1], name="slow")
memory.prefetch()
"""
    reporter = """
manager = hwpoison.connect(arguments[0], maps=False)
failure = manager.report("slow", 0)
say([failure.state, failure.outcome])
"""
    with Child(owner, manager.socket, str(slow.path)) as owning:
        wait_until(lambda: bool(slow.waiting), "the page is being read in")
        owning.signal(signal.SIGKILL)
        owning.wait()
        wait_until(lambda: manager.objects()[0].mappings == 0, "the manager has seen that its only client is dead")
        with Child(reporter, manager.socket) as reporting:
            wait_until(lambda: (0, "report") in told_of(manager, "slow"), "the report has arrived")
            slow.hold()
            assert reporting.hear() == [State.TRUNCATED, Outcome.IGNORED]
    assert manager.objects() == []


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


# --- the ways to name a page -----------------------------------------------------------------------------------------


def test_a_page_is_reached_by_name_and_by_the_address_of_any_of_its_mappings(manager: hwpoison.Manager) -> None:
    memory = manager.allocate(8 * PAGE, "t")
    second = manager.attach("t")
    touch(memory)
    ways = [
        {"name": "t", "offset": PAGE + 1},
        {"name": memory, "offset": 3 * PAGE - 1},
        {"pid": os.getpid(), "address": memory.address + 3 * PAGE + 77},
        {"pid": os.getpid(), "address": second.address + 4 * PAGE},
    ]
    with hwpoison.guard(memory) as safe:
        ways.append({"pid": os.getpid(), "address": safe.address + 5 * PAGE + 4095})
    for page, way in enumerate(ways, 1):
        failure = manager.report(**way, source="test")
        assert (failure.name, failure.offset, failure.state) == ("t", page * PAGE, State.ANONYMOUS), way
    assert memory.lost() == [("t", PAGE, 5 * PAGE)]
    reports = [event.detail for event in manager.events() if event.kind == "report"]
    assert reports[0] == "test, action optional"
    del safe


@pytest.mark.usefixtures("root")
def test_a_page_is_reached_by_its_frame_and_by_its_physical_address(manager: hwpoison.Manager, file: MakeFile) -> None:
    table, weights = manager.allocate(1000 * PAGE, "t"), manager.open(file(8 * PAGE), name="w")
    touch(table)
    # The manager must find it although nobody but a client maps it there.
    assert len(touch(weights)) == 8 * PAGE
    for memory, page, way in ((table, 999, "pfn"), (weights, 7, "pfn"), (table, 998, "physical"), (weights, 0, "physical")):
        frame = frame_at(memory.address + page * PAGE)
        place = {"pfn": frame} if way == "pfn" else {"physical": frame * PAGE + 4095}
        failure = manager.report(**place)
        assert (failure.name, failure.offset) == (memory.name, page * PAGE)
    assert table.lost() == [("t", 998 * PAGE, 2 * PAGE)]


def test_a_manager_without_root_refuses_frames_and_finds_pages_by_the_other_ways(nobody: Callable[..., Child]) -> None:
    code = """
with hwpoison.Manager() as manager:
    memory = manager.allocate(8192, "t")
    memory.buffer[0]
    for place in ({"pfn": 1}, {"physical": 4096}):
        try:
            say(str(manager.report(**place).state))
        except PermissionError as error:
            say("root" in str(error))
    say(manager.report(memory, 0).state)
    say(memory.lost())
"""
    with nobody(code) as child:
        assert [child.hear() for _ in range(4)] == [True, True, State.ANONYMOUS, [["t", 0, PAGE]]]
        assert child.wait() == 0
