"""The manager dies, at any instant, and it costs nothing: another one takes over, and programs only wait for it."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import hwpoison
from hwpoison import Outcome, State, events, protocol
from hwpoison.linux.pairs import pair
from hwpoison.linux.syscalls import PAGE_SIZE
from tests.live.conftest import known
from tests.live.process import (
    Child,
    asleep_in_a_fault,
    kill,
    page,
    stop,
)
from tests.live.slow_files import SlowFile
from tests.support import SECONDS_MAX, wait_until

pytestmark = pytest.mark.live

PAGE = PAGE_SIZE
MakeFile = Callable[..., Path]


def test_who_was_to_be_told_that_a_child_may_come_is_told_by_the_next_manager(manager: hwpoison.Manager) -> None:
    table = manager.allocate(PAGE, name="table")
    # The first one may die after it has noted it and before it has said so. Who has heard it does not look again.
    with manager.connection.invite() as invitation:
        kill(manager)
        assert table.lost() == []
        invitation.settimeout(SECONDS_MAX)
        said, _ = protocol.receive_reply(invitation)
        assert isinstance(said, protocol.Added)
        assert said.life == 2
    wait_until(lambda: manager.statistics().clients == 1, "nobody is expected any more")


def test_what_is_for_the_manager_stays_open_in_no_child() -> None:
    ours, theirs = pair()
    ours.settimeout(SECONDS_MAX)
    hold, lives = os.pipe()
    child = os.fork()
    if not child:
        os.close(lives)
        os.read(hold, 1)
        os._exit(0)
    theirs.close()
    assert ours.recv(1) == b""
    os.close(lives)
    assert os.waitpid(child, 0)[1] == 0
    os.close(hold)
    ours.close()


def test_everything_is_as_it_was_and_nobody_reads_a_zero_that_was_not_there(
    manager: hwpoison.Manager, file: MakeFile
) -> None:
    path = file(8 * PAGE)
    table, book = manager.allocate(8 * PAGE, name="table"), manager.open(path, "r+")
    table.write(0, page("t") * 4)
    book.write(PAGE, page("b"))
    book.buffer[3 * PAGE : 4 * PAGE] = page("c")
    told: list[hwpoison.Notice] = []
    table.on_failure(told.append)
    lost = manager.inject(table, 2 * PAGE)
    first = manager.pid
    kill(first)

    assert table.read(0, PAGE) == page("t")
    assert bytes(table.buffer[5 * PAGE : 6 * PAGE]) == bytes(PAGE)
    assert book.read(0, 4 * PAGE) == known(8 * PAGE)[:PAGE] + page("b") + known(8 * PAGE)[2 * PAGE : 3 * PAGE] + page("c")
    assert [(one.offset, one.nbytes) for one in table.lost()] == [(2 * PAGE, PAGE)]
    with pytest.raises(hwpoison.PoisonError), hwpoison.guard(table) as safe:
        bytes(safe.buffer)
    again = manager.inject(table, 3 * PAGE)
    assert again.outcome is Outcome.RECOVERED
    assert again.event_id != lost.event_id
    wait_until(lambda: len(told) == 2, "the next loss is told")
    assert [one.event_id for one in told] == [lost.event_id, again.event_id]
    said = manager.statistics()
    assert (said.restarts, said.states[State.ANONYMOUS], said.pid) == (1, 2, manager.pid)
    assert manager.pid != first
    book.flush()
    assert path.read_bytes()[PAGE : 2 * PAGE] == page("b")
    assert table.repair(2 * PAGE, page("r")) == PAGE
    assert bytes(table.buffer[2 * PAGE : 3 * PAGE]) == page("r")


def test_a_flush_that_met_a_sync_that_failed_has_said_so_whatever_becomes_of_the_manager(
    manager: hwpoison.Manager, slow_file: Callable[[bytes], SlowFile]
) -> None:
    slow = slow_file(page("s") * 2)
    book = manager.open(slow.path, "r+")
    for _ in range(20):
        book.write(0, page("b"))
        slow.fail(sync=5)
        with pytest.raises(OSError, match="could not be written"):
            book.flush()
        # It had been said; what comes after that may not have been written down any more.
        kill(manager)
        slow.fail()
        book.flush()


@pytest.mark.parametrize("number", [signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT, signal.SIGRTMIN + 5])
def test_a_failure_of_the_managers_own_memory_is_one_more_way_to_die(manager: hwpoison.Manager, number: int) -> None:
    table = manager.allocate(2 * PAGE, name="table")
    table.write(0, page("t"))
    dead = manager.pid
    os.kill(dead, number)
    assert bytes(table.buffer[: 2 * PAGE]) == page("t") + bytes(PAGE)
    assert manager.statistics().restarts == 1
    assert manager.pid != dead


def test_a_first_write_after_it_is_seen_and_a_loss_of_changes_is_told_by_flush(
    manager: hwpoison.Manager, file: MakeFile
) -> None:
    path = file(4 * PAGE)
    book = manager.open(path, "r+")
    assert len(book.read(0, 4 * PAGE)) == 4 * PAGE
    book.buffer[0] = 1
    kill(manager)
    book.buffer[PAGE] = 2
    kill(manager)
    book.flush()
    assert (path.read_bytes()[0], path.read_bytes()[PAGE]) == (1, 2)
    book.buffer[0] = 3
    kill(manager)
    assert manager.inject(book, 0).state is State.DIRTY_FILE
    kill(manager)
    with pytest.raises(OSError, match="were lost"):
        book.flush()
    kill(manager)
    book.flush()
    assert book.discard() == PAGE
    assert book.read(0, 1) == b"\1"


def test_what_a_killed_manager_had_isolated_is_never_used_again(root: None, manager: hwpoison.Manager) -> None:
    table = manager.allocate(4 * PAGE, name="table")
    table.write(0, page("t"))
    manager.report(table, 0)
    for _ in range(3):
        kill(manager)
        assert manager.statistics().quarantined == PAGE
    manager.report(table, PAGE)  # absent: nothing to isolate
    table.write(PAGE, page("u"))
    manager.report(table, PAGE)
    kill(manager)
    assert manager.statistics().quarantined == 2 * PAGE


READ = """
manager = hwpoison.connect(arguments[0])
memory = manager.attach(arguments[1])
say()
hear()
say(memory.buffer[arguments[2]])
hear()
"""


def test_who_sleeps_in_a_fault_that_nobody_has_read_is_served_by_the_next_one(
    manager: hwpoison.Manager, file: MakeFile
) -> None:
    book = manager.open(file(4 * PAGE), name="book")
    # The only thread of that process sleeps with the one lock of its interpreter.
    with Child(READ, manager.socket, "book", 2 * PAGE) as reader:
        reader.hear()
        dead = manager.pid
        stop(dead)
        reader.tell()
        wait_until(lambda: asleep_in_a_fault(reader.pid), "it sleeps in a fault")
        kill(dead)
        assert reader.hear() == known(4 * PAGE)[2 * PAGE]
        assert book.read(2 * PAGE, 1)[0] == known(4 * PAGE)[2 * PAGE]


def test_who_sleeps_in_a_fault_that_the_dead_manager_had_read_is_served_too(
    manager: hwpoison.Manager, slow_file: Callable[[bytes], SlowFile]
) -> None:
    slow = slow_file(page("s") * 4)
    book = manager.open(slow.path, name="book")
    with Child(READ, manager.socket, "book", PAGE) as reader:
        reader.hear()
        slow.hold("read")
        reader.tell()
        wait_until(lambda: slow.waiting, "the manager reads the file for it")
        # The manager can have the event before the reader, which has put it there, has fallen asleep.
        wait_until(lambda: asleep_in_a_fault(reader.pid), "it sleeps in a fault")
        # It is dead when the file system lets go of its thread.
        os.kill(manager.pid, signal.SIGKILL)
        slow.hold()
        assert reader.hear() == ord("s")
        assert book.read(PAGE, 1) == b"s"


def test_who_waits_for_an_answer_gets_it_from_the_next_one_and_a_report_is_handled_once(
    manager: hwpoison.Manager, tmp_path: Path
) -> None:
    table = manager.allocate(4 * PAGE, name="table")
    table.write(0, page("t"))
    dead = manager.pid
    stop(dead)
    answers: list[object] = []
    asking = [
        threading.Thread(target=lambda: answers.append(manager.inject(table, 0).state)),
        threading.Thread(target=lambda: answers.append(manager.allocate(PAGE, name="another").name)),
        threading.Thread(target=lambda: answers.append(table.read(PAGE, 1))),
    ]
    for one in asking:
        one.start()
    kill(dead)
    for one in asking:
        one.join(SECONDS_MAX)
    assert sorted(answers, key=str) == [State.ANONYMOUS, "another", b"\0"]
    assert manager.statistics().states == {State.ANONYMOUS: 1}
    assert sum(event.kind == "outcome" for event in manager.events()) == 1


def test_a_journal_that_could_not_be_written_is_written_again_as_soon_as_it_can_be(manager: hwpoison.Manager) -> None:
    table = manager.allocate(4 * PAGE, name="table", populate=False)
    table.write(0, page("t"))
    manager.inject(table, PAGE)
    _, most = resource.prlimit(manager.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(manager.pid, resource.RLIMIT_FSIZE, (1, most))
    # What is under way is noted, or not: the next thing that begins is refused.
    with suppress(MemoryError):
        manager.inject(table, 2 * PAGE)
    with pytest.raises(MemoryError, match="journal can't grow"):
        manager.allocate(PAGE, name="another")
    with pytest.raises(OSError, match="journal can't be written"):
        manager.restart()
    resource.prlimit(manager.pid, resource.RLIMIT_FSIZE, (most, most))
    manager.allocate(PAGE, name="another").close()
    lost = table.lost()
    kill(manager)
    assert table.lost() == lost
    assert table.read(0, PAGE) == page("t")


def test_clients_that_die_with_the_manager_leave_nothing(manager: hwpoison.Manager) -> None:
    code = "manager = hwpoison.connect(arguments[0])\nmemory = manager.allocate(1 << 20, name='gone')\nsay()\nhear()\n"
    with Child(code, manager.socket) as client:
        client.hear()
        dead = manager.pid
        stop(dead)
        client.signal(signal.SIGKILL)
        client.wait()
        kill(dead)
        wait_until(lambda: not manager.objects(), "its object is gone")
    assert manager.statistics().clients == 1


def test_events_are_logged_once_also_those_that_were_not_written_yet(manager: hwpoison.Manager) -> None:
    table = manager.allocate(64 * PAGE, name="table")
    for number in range(64):
        table.write(number * PAGE, page("t"))
    found = []
    for number in range(64):
        found.append(manager.inject(table, number * PAGE).event_id)
        if number % 8 == 7:
            kill(manager)
    logged = [event.event_id for event in manager.events() if event.kind == "outcome"]
    assert logged == found
    assert events.default_path().exists()
