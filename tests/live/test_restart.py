"""The manager dies, at any instant, and it costs nothing: another one takes over, and programs only wait for it."""

from __future__ import annotations

import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

import hwpoison
from hwpoison import Outcome, State, events, protocol
from hwpoison.linux.pairs import pair
from hwpoison.linux.syscalls import PAGE_SIZE
from tests.live.conftest import known
from tests.live.process import Child, asleep_in_a_fault, keeper_of, kill, kill_service, manager_of, serving, state_of
from tests.live.slow_files import SlowFile
from tests.support import SECONDS_MAX, wait_until

pytestmark = pytest.mark.live

PAGE = PAGE_SIZE
MakeFile = Callable[..., Path]


def page(letter: str) -> bytes:
    return letter.encode() * PAGE


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T", "it is stopped")


# --- what there was is there again -----------------------------------------------------------------------------------


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


# --- who sleeps ------------------------------------------------------------------------------------------------------

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
    assert sorted(answers, key=str) == ["another", State.ANONYMOUS, b"\0"] or set(map(str, answers)) == {
        "another",
        "anonymous page",
        "b'\\x00'",
    }
    assert manager.statistics().states == {State.ANONYMOUS: 1}
    assert sum(event.kind == "outcome" for event in manager.events()) == 1


# --- where it ends ---------------------------------------------------------------------------------------------------

MAP = """
manager = hwpoison.connect(arguments[0])
memory = manager.attach(arguments[1])
say()
hear()
memory.buffer[arguments[2]]
"""


def test_if_manager_and_keeper_are_gone_those_who_map_memory_are_ended_and_nobody_hangs(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serving(path) as server:
        shared = hwpoison.connect(path)
        # Pages that nobody has touched are there for the second one to sleep at.
        code = "manager = hwpoison.connect(arguments[0])\nmemory = manager.allocate(1 << 20, name='table')\nsay()\nhear()\n"
        with Child(code, str(path)) as owner:
            owner.hear()
            reader = Child(MAP, str(path), "table", 9 * PAGE)
            reader.hear()
            manager_pid = manager_of(server.pid)
            stop(manager_pid)
            reader.tell()
            wait_until(lambda: asleep_in_a_fault(reader.pid), "it sleeps in a fault")
            kill_service(server.pid)
            with reader:
                assert reader.wait() == -signal.SIGKILL
            assert owner.wait() == -signal.SIGKILL
        # Who maps nothing is told when it asks.
        with pytest.raises(ConnectionError):
            shared.statistics()
        shared.close()


ATTACHED = """
manager = hwpoison.connect(arguments[0])
memory = manager.allocate(1 << 20, populate=False)
say()
hear()
"""
IN_A_CALL = """
try:
    os.write(os.memfd_create("copy"), memory.buffer[:4096])
except OSError:
    # An ordinary user's call does not wait for a page.
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_manager_that_can_not_be_followed_is_given_up_in_a_named_time_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    asleep = ["", "memory.buffer[0]"]
    not_ended_by_sigbus = [
        "signal.signal(signal.SIGBUS, signal.SIG_IGN)\nmemory.buffer[0]",
        "signal.signal(signal.SIGBUS, lambda *_: None)\nmemory.buffer[0]",
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS])\nmemory.buffer[0]",
        IN_A_CALL,
    ]
    with serving(path) as server, ExitStack() as stack:
        clients = [
            stack.enter_context(Child(ATTACHED + one + "\nhear()", str(path))) for one in asleep + not_ended_by_sigbus
        ]
        for client in clients:
            client.hear()
        unmapped = hwpoison.connect(path)
        # The keeper can start nobody: it may open nothing any more.
        dead = manager_of(server.pid)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (3, 3))
        kill(dead)
        for client in clients:
            client.tell()
        assert server.wait(SECONDS_MAX) == 1, server.stderr and server.stderr.read()
        endings = [client.wait() for client in clients]
        assert endings[: len(asleep)] == [-signal.SIGBUS] * len(asleep)
        # One that blocks it in its first thread may have another one.
        assert set(endings[len(asleep) :]) <= {-signal.SIGBUS, -signal.SIGKILL}
        assert server.stderr is not None
        said = server.stderr.read().decode()
        assert "no other one could be started within 10 s: processes that map its memory are ended by SIGBUS" in said
        with pytest.raises(ConnectionError):
            unmapped.statistics()
        unmapped.close()


def test_a_dead_manager_that_a_file_system_does_not_let_go_of_is_given_up_in_a_named_time_too(
    tmp_path: Path, slow_file: Callable[[bytes], SlowFile]
) -> None:
    slow = slow_file(page("s") * 4)
    path = str(tmp_path / "socket")
    opens = (
        "manager = hwpoison.connect(arguments[0])\nmemory = manager.open(arguments[1])\nsay()\nhear()\nmemory.buffer[0]\n"
    )
    with (
        serving(tmp_path / "socket") as server,
        Child(ATTACHED + "memory.buffer[0]", path) as other,
        Child(opens, path, str(slow.path)) as reader,
    ):
        for client in (other, reader):
            client.hear()
        slow.hold("read")
        reader.tell()
        wait_until(lambda: slow.waiting, "the manager reads the file for it")
        os.kill(manager_of(server.pid), signal.SIGKILL)
        other.tell()
        assert [client.wait() for client in (other, reader)] == [-signal.SIGBUS] * 2
        assert server.wait(SECONDS_MAX) == 1
        # Until then the dead manager has it open, too.
        slow.hold()
        assert server.stderr is not None
        said = server.stderr.read().decode()
        assert "the manager is dead, but for a thread that waits for a file system" in said
        assert "for 10 s, so that no other one can be started: processes that map its memory are ended" in said


def test_a_keeper_that_dies_is_replaced_and_the_next_one_keeps_everything(root: None, manager: hwpoison.Manager) -> None:
    table = manager.allocate(4 * PAGE, name="table")
    table.write(0, page("t"))
    manager.report(table, 0)
    served = manager.pid
    kill(keeper_of(served))
    wait_until(lambda: any("--adopt" in one for one in commands(served)), "another keeper is there")
    assert table.read(PAGE, 1) == b"\0"
    assert manager.pid == served
    assert manager.statistics().pid == served
    kill(served)
    assert manager.statistics().quarantined == PAGE
    assert [(one.offset, one.nbytes) for one in table.lost()] == [(0, PAGE)]
    assert manager.pid != served


def test_a_keeper_that_can_not_be_replaced_at_once_is_replaced_when_it_can_be() -> None:
    code = """
manager = hwpoison.Manager()
table = manager.allocate(1 << 20, name="table")
table.write(0, b"t")
say(manager.pid)
hear()
try:
    manager.restart()
except OSError as error:
    say(str(error))
hear()
say([manager.statistics().restarts, table.read(0, 1).decode(), table.buffer[1 << 19]])
"""
    with Child(code) as client:
        pid = client.hear()
        _, most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, most))
        kill(keeper_of(pid))
        assert "the keeper has died, and there is no other one yet" in client.ask()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, most))
        wait_until(lambda: any("--adopt" in one for one in commands(pid)), "another keeper is there")
        kill(pid)
        assert client.ask() == [1, "t", 0]
        assert client.wait() == 0
        assert "no keeper can be started now" in client.errors
        assert "there is a keeper again" in client.errors


@pytest.mark.parametrize("who", ["private", "shared"])
def test_that_whoever_starts_it_ignores_the_ends_of_its_children_makes_no_difference(who: str, tmp_path: Path) -> None:
    code = """
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
if arguments[0] == "shared":
    import subprocess
    service = subprocess.Popen([sys.executable, "-m", "hwpoison", "serve", "--socket", arguments[1]], stderr=subprocess.PIPE)
    service.stderr.readline()
    manager = hwpoison.connect(arguments[1])
else:
    manager = hwpoison.Manager()
table = manager.allocate(1 << 20, name="table")
table.write(0, b"t")
for number in range(2):
    os.kill(manager.statistics().pid, signal.SIGKILL)
    said = [manager.statistics().restarts, table.read(0, 1).decode(), table.buffer[1 << 19]]
before = manager.pid
said.append(manager.restart() != before)
say([*said, table.read(0, 1).decode()])
table.close()
manager.close()
if arguments[0] == "shared":
    service.terminate()
    service.stderr.read()
"""
    with Child(code, who, str(tmp_path / "socket")) as client:
        assert client.hear() == [2, "t", 0, True, "t"]
        assert client.wait() == 0, client.errors


@pytest.mark.parametrize("damage", ["the middle", "the head"])
def test_a_journal_that_is_damaged_is_not_believed(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serving(path) as server, Child(ATTACHED + "memory.buffer[0]", str(path)) as client:
        client.hear()
        pid = manager_of(server.pid)
        stop(pid)
        with open(open_of(server.pid, "hwpoison-journal"), "r+b") as file:
            at = 0 if damage == "the head" else 40
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
        os.kill(pid, signal.SIGKILL)
        client.tell()
        # Whom it names nobody can know, so nobody is told by SIGBUS.
        assert client.wait() == -signal.SIGKILL
        assert server.wait(SECONDS_MAX) == 1
        assert server.stderr is not None
        said = server.stderr.read().decode()
        assert ("is no journal" if damage == "the head" else "is damaged") in said
        assert "no manager can take over: processes that map its memory are ended by SIGKILL" in said


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


def test_a_manager_that_dies_while_its_journal_can_not_be_written_has_no_successor(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serving(path) as server, Child(ATTACHED + "memory.buffer[0]", str(path)) as client:
        client.hear()
        pid = manager_of(server.pid)
        manager = hwpoison.connect(path)
        name = manager.objects()[0].name
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        # That this was handled can't be noted.
        manager.inject(name, PAGE)
        kill(pid)
        client.tell()
        assert client.wait() == -signal.SIGKILL
        assert server.wait(SECONDS_MAX) == 1
        assert server.stderr is not None
        assert "its journal could not be written: processes that map its memory are ended" in server.stderr.read().decode()
        manager.close()


def test_signals_while_it_ends_do_not_keep_it_from_ending_in_order(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP) * 3:
        with serving(tmp_path / "socket") as server:
            while server.poll() is None:
                server.send_signal(number)
                select.select([], [], [], 0.001)
            assert server.stderr is not None
            assert (server.returncode, server.stderr.read()) == (0, b"")


def open_of(pid: int, name: str) -> str:
    """The way to a descriptor of a process."""
    for one in os.listdir(f"/proc/{pid}/fd"):
        if name in os.readlink(f"/proc/{pid}/fd/{one}"):
            return f"/proc/{pid}/fd/{one}"
    raise AssertionError(f"process {pid} has no {name} open")


def test_a_keeper_that_was_stopped_is_continued_before_it_misses_anything(manager: hwpoison.Manager) -> None:
    keeper = keeper_of(manager.pid)
    stop(keeper)
    memories = []
    # Until its socket is full: then it is continued, which has the manager wait for a second.
    while state_of(keeper) == "T":
        memories.append(manager.allocate(PAGE, name=f"table {len(memories)}"))
        memories[-1].write(0, page("t"))
        assert len(memories) < 5_000
    assert len(memories) > 10
    kill(manager)
    assert all(one.read(0, PAGE) == page("t") for one in memories)


def commands(parent: int) -> list[str]:
    """The command lines of its children."""
    found = []
    for one in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        try:
            found.append(Path(f"/proc/{one}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found


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


def test_a_private_manager_that_is_killed_when_nobody_is_left_is_not_followed_for_long() -> None:
    with Child("manager = hwpoison.Manager()\nsay(manager.pid)\nhear()\n") as client:
        pid = client.hear()
        keeper = os.pidfd_open(keeper_of(pid))
        stop(pid)
        client.signal(signal.SIGKILL)
        kill(pid)
        assert select.select([keeper], [], [], SECONDS_MAX)[0], "the keeper stays"
        os.close(keeper)


def test_a_manager_that_was_told_to_end_and_dies_is_followed_by_one_that_ends_too(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serving(path) as server:
        manager = hwpoison.connect(path)
        table = manager.allocate(4 * PAGE, name="table")
        table.write(0, page("t"))
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: not path.exists(), "nobody new is let in")
        kill(manager)
        assert table.read(0, 2 * PAGE) == page("t") + bytes(PAGE)
        table.close()
        manager.close()
        assert server.wait(SECONDS_MAX) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_the_dead_manager_had_no_time_for_is_for_the_next_one(number: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serving(path) as server:
        manager = hwpoison.connect(path)
        pid = manager_of(server.pid)
        stop(server.pid)
        # What it says meanwhile was said before it was sent the signal.
        table = manager.allocate(PAGE, name="table")
        stop(pid)
        server.send_signal(number)
        server.send_signal(signal.SIGCONT)
        wait_until(lambda: pending(pid, number), "the manager was sent it")
        kill(pid)
        wait_until(lambda: not path.exists(), "nobody new is let in")
        assert table.read(0, 1) == b"\0"
        table.close()
        manager.close()
        assert server.wait(SECONDS_MAX) == 0


def pending(pid: int, number: signal.Signals) -> bool:
    """A signal was sent to the process that it has not taken yet."""
    found = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return any(int(line.split()[1], 16) & (1 << (number - 1)) for line in found)


# --- planned ---------------------------------------------------------------------------------------------------------


def test_a_planned_restart_does_not_begin_while_a_file_does_not_answer(
    manager: hwpoison.Manager, slow_file: Callable[[bytes], SlowFile]
) -> None:
    slow = slow_file(page("s") * 4)
    memory, table = manager.open(slow.path), manager.allocate(PAGE, populate=False)
    slow.hold("read")
    waits = threading.Thread(target=memory.prefetch)
    waits.start()
    wait_until(lambda: slow.waiting, "the file is being read")
    pid = manager.pid
    with pytest.raises(OSError, match="no answer for 2 s"):
        manager.restart()
    # It goes on, for the others at once.
    assert table.read(0, 1) == b"\0"
    slow.hold()
    waits.join()
    assert memory.read(0, 1) == b"s"
    assert manager.restart() != pid
    assert memory.read(PAGE, 1) == b"s"


def test_a_planned_restart_keeps_the_process_that_was_started_and_everything_else(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serving(path) as server:
        manager = hwpoison.connect(path)
        table = manager.allocate(4 * PAGE, name="table")
        table.write(0, page("t"))
        before = manager.pid
        done = subprocess.run(
            [sys.executable, "-m", "hwpoison", "restart", "--socket", str(path)], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert str(manager_of(server.pid)) in done.stdout
        assert table.read(0, 2 * PAGE) == page("t") + bytes(PAGE)
        assert manager.statistics().restarts == 1
        assert manager.pid != before
        assert server.poll() is None
        table.close()
        manager.close()
        server.send_signal(signal.SIGTERM)
        assert server.wait(SECONDS_MAX) == 0
    assert not path.exists()


@pytest.mark.parametrize("when", ["while it is checked", "when the keeper is about to execute it"])
def test_who_tells_it_to_end_during_a_restart_is_heard(tmp_path: Path, when: str) -> None:
    path = tmp_path / "socket"
    with serving(path) as server:
        first = manager_of(server.pid)
        asking = subprocess.Popen(
            [sys.executable, "-m", "hwpoison", "restart", "--socket", str(path)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until(lambda: any("--reads-journal" in one for one in commands(first)), "the new version is asked")
        if when == "when the keeper is about to execute it":
            stop(server.pid)
            wait_until(lambda: state_of(first) == "Z", "the manager has made way")
        server.send_signal(signal.SIGTERM)
        os.kill(server.pid, signal.SIGCONT)
        assert server.wait(SECONDS_MAX) == 0
        asking.wait(SECONDS_MAX)
    assert not path.exists()


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


def test_another_version_that_is_installed_meanwhile_takes_over_at_a_planned_restart_and_at_a_death(tmp_path: Path) -> None:
    """A whole installation of its own, of which files are replaced while it serves."""
    installed = tmp_path / "installed"
    shutil.copytree(Path(hwpoison.__path__[0]), installed / "hwpoison", ignore=shutil.ignore_patterns("__pycache__"))
    server_file = installed / "hwpoison" / "service" / "server.py"
    first = server_file.read_text()
    line = "            memory_limit=self.manager.memory_limit,\n"
    assert first.count(line) == 1
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    path = tmp_path / "socket"
    with serving(path, environment) as server:
        code = """
manager = hwpoison.connect(arguments[0])
table = manager.allocate(1 << 20, "table")
table.write(0, b"t" * (1 << 20))
manager.inject(table, 1 << 16)
say(manager.statistics().memory_limit)
for _ in range(3):
    hear()
    say([manager.statistics().memory_limit, table.buffer[0], bytes(table.read(1 << 19, 2)).decode(), len(table.lost())])
"""
        with Child(code, str(path)) as client:
            assert client.hear() is None
            server_file.write_text(first.replace(line, "            memory_limit=2222,\n"))
            done = subprocess.run(
                [sys.executable, "-m", "hwpoison", "restart", "--socket", str(path)],
                env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert client.ask() == [2222, ord("t"), "tt", 1]
            # The keeper is of the new version too: who comes after a death is.
            kill(manager_of(server.pid))
            assert client.ask() == [2222, ord("t"), "tt", 1]
            # One that can't even start is refused, and what serves goes on.
            server_file.write_text("this is no Python\n")
            done = subprocess.run(
                [sys.executable, "-m", "hwpoison", "restart", "--socket", str(path)],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode != 0
            assert len(done.stderr.splitlines()) == 1, done.stderr
            assert client.ask() == [2222, ord("t"), "tt", 1]
            assert client.wait() == 0, client.errors
