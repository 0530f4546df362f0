"""Failures at any moment of a process's life, and what becomes of managers whose clients go."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import hwpoison
from hwpoison import Outcome, State
from hwpoison.linux.syscalls import PAGE_SIZE
from tests.live.conftest import known
from tests.live.process import Child, asleep_in_a_fault, keeper_of, kill_service, state_of
from tests.live.slow_files import SlowFile
from tests.support import SECONDS_MAX, wait_until

pytestmark = pytest.mark.live

MakeFile = Callable[..., Path]
MakeSlowFile = Callable[[bytes], SlowFile]

CONNECT = "manager = hwpoison.connect(arguments[0])\n"


def page(letter: str) -> bytes:
    return letter.encode() * PAGE_SIZE


@contextmanager
def watched(*pids: int) -> Iterator[Callable[[], bool]]:
    """A function that tells whether all the processes have ended, whosever children they are."""
    pidfds = [os.pidfd_open(pid) for pid in pids]
    try:
        yield lambda: len(select.select(pidfds, [], [], 0)[0]) == len(pidfds)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


# --- just attaching --------------------------------------------------------------------------------------------------

ATTACH_SLOWLY = """
import socket
from hwpoison import protocol
from hwpoison.linux import syscalls, userfaultfd

channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
channel.connect(protocol.address_of(arguments[0]))
opened = userfaultfd.open_userfaultfd()

def ask(message, fds=()):
    protocol.send(channel, message, fds)
    data, fds = protocol.receive(channel)
    return protocol.decode_reply(data), fds

ask(protocol.Hello(), [opened.fd])
found, (memory,) = ask(protocol.Attach(arguments[1]))
assert isinstance(found, protocol.Found)
say("found")
hear()
mapping = mmap.mmap(memory, found.nbytes)
mapping.madvise(mmap.MADV_DONTFORK)
address = syscalls.address_of(mapping)
userfaultfd.register(opened.fd, address, found.nbytes, userfaultfd.MODE_MISSING)
mapped, _ = ask(protocol.Map(found.object, address, 1))
assert isinstance(mapped, protocol.Mapped)
say(ask(protocol.Lost(1))[0].ranges)
hear()
say([mapping[0], mapping[4096]])
mapping[8192]
"""


def test_a_page_that_fails_while_a_client_is_about_to_map_it_is_lost_for_that_client_too(manager: hwpoison.Manager) -> None:
    table = manager.allocate(4 * PAGE_SIZE, name="table")
    for index, letter in enumerate("abcd"):
        table.write(index * PAGE_SIZE, page(letter))
    with Child(ATTACH_SLOWLY, manager.socket, table.name) as attaching:
        assert attaching.hear() == "found"
        failures = [manager.inject(table, index * PAGE_SIZE) for index in (0, 2)]
        assert [one.victims for one in failures] == [(os.getpid(),)] * 2, "who has not mapped it owns nothing of it yet"
        assert attaching.ask() == [[0, PAGE_SIZE], [2 * PAGE_SIZE, PAGE_SIZE]]
        table.repair(0, page("r"))
        assert attaching.ask() == [ord("r"), ord("b")]
        assert attaching.wait() == -signal.SIGBUS


def test_a_client_that_is_killed_while_it_is_about_to_map_holds_nothing(manager: hwpoison.Manager) -> None:
    table = manager.allocate(PAGE_SIZE, name="table")
    with Child(ATTACH_SLOWLY, manager.socket, table.name) as attaching:
        attaching.hear()
        table.close()
        assert [one.name for one in manager.objects()] == ["table"], "it is kept for who is about to map it"
        attaching.signal(signal.SIGKILL)
        wait_until(lambda: not manager.objects(), "the object ends with its last user")


# --- asleep in a fault -----------------------------------------------------------------------------------------------

READ_A_PAGE = """
memory = manager.open(arguments[1])
say()
offset = hear()
say(memory.buffer[offset])
hear()
"""


def test_clients_are_killed_while_they_sleep_in_a_fault_and_the_others_get_the_page(
    manager: hwpoison.Manager, slow_file: MakeSlowFile
) -> None:
    content = known(8 * PAGE_SIZE)
    slow = slow_file(content)
    with (
        Child(CONNECT + READ_A_PAGE, manager.socket, str(slow.path)) as first,
        Child(CONNECT + READ_A_PAGE, manager.socket, str(slow.path)) as second,
        Child(CONNECT + READ_A_PAGE, manager.socket, str(slow.path)) as third,
    ):
        readers = (first, second, third)
        for one in readers:
            one.hear()
        slow.hold("read")
        for one in readers:
            one.tell(5 * PAGE_SIZE)
        for one in readers:
            wait_until(lambda pid=one.pid: asleep_in_a_fault(pid), "it sleeps in a fault")
        # The one whose fault is being served, or one that waits for the same page: both are there among the first two.
        for one in (first, second):
            one.signal(signal.SIGTERM)
            assert one.wait() == -signal.SIGTERM
        wait_until(lambda: manager.statistics().clients == 2, "the manager has noticed that they are gone")
        slow.hold()
        assert third.hear() == content[5 * PAGE_SIZE]


def test_a_failure_ends_although_the_only_client_of_its_page_is_killed_while_it_waits(
    manager: hwpoison.Manager, slow_file: MakeSlowFile
) -> None:
    content = known(8 * PAGE_SIZE)
    slow = slow_file(content)
    failures = []
    with Child(CONNECT + READ_A_PAGE, manager.socket, str(slow.path)) as reader:
        reader.hear()
        slow.hold("read")
        reader.tell(5 * PAGE_SIZE)
        wait_until(lambda: asleep_in_a_fault(reader.pid), "it sleeps in a fault")
        report = threading.Thread(target=lambda: failures.append(manager.inject(str(slow.path), 5 * PAGE_SIZE)))
        report.start()
        wait_until(lambda: any(one.kind == "report" for one in manager.events()), "the failure is being handled")
        reader.signal(signal.SIGKILL)
        assert reader.wait() == -signal.SIGKILL
        slow.hold()
        report.join(SECONDS_MAX)
    (failure,) = failures
    # The last client is gone, and with it the object: before the failure got the page, or just after.
    assert (failure.state, failure.outcome) in (
        (State.CLEAN_FILE, Outcome.RECOVERED),
        (State.TRUNCATED, Outcome.IGNORED),
    )
    assert failure.victims == ()
    wait_until(lambda: not manager.objects(), "the object ends with its last user")
    assert manager.open(slow.path).read(0, len(content)) == content


# --- writing ---------------------------------------------------------------------------------------------------------

WRITE_FOR_EVER = """
memory = manager.open(arguments[1], "r+")
version = arguments[2]
say()
while True:
    version += 1
    memory.write(0, version.to_bytes(8, "little") * (memory.nbytes // 8))
"""


def test_a_client_that_is_killed_while_it_writes_leaves_each_write_done_or_not_begun(
    manager: hwpoison.Manager, tmp_path: Path
) -> None:
    path = tmp_path / "book"
    path.write_bytes(bytes(8 * PAGE_SIZE))
    book = manager.open(path, "r+")
    before = 0

    def written() -> bool:
        return book.read(0, 8) != before.to_bytes(8, "little")

    for _ in range(10):
        with Child(CONNECT + WRITE_FOR_EVER, manager.socket, str(path), before) as writer:
            writer.hear()
            wait_until(written, "it writes")
            writer.signal(signal.SIGKILL)
            writer.wait()
        wait_until(lambda: manager.statistics().clients == 1, "the manager has noticed that it is gone")
        words = struct.unpack(f"<{book.nbytes // 8}Q", book.read(0, book.nbytes))
        assert len(set(words)) == 1, f"versions {set(words)} are mixed"
        assert words[0] > before
        before = words[0]
    book.close()
    wait_until(lambda: not manager.objects(), "the file is written back")
    assert path.read_bytes() == before.to_bytes(8, "little") * PAGE_SIZE


# --- exiting ---------------------------------------------------------------------------------------------------------

FIRST_THREAD_ENDS = """
import ctypes, platform
memory = manager.attach("table")
notices = []
memory.on_failure(lambda notice: notices.append(notice.offset))

def go_on():
    hear()
    while not notices:
        time.sleep(0.001)
    memory.repair(notices[0], b"r" * 4096)
    say([notices, memory.buffer[0], memory.buffer[4096]])
    hear()
    os._exit(0)

threading.Thread(target=go_on).start()
say()
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)  # exit(2), of this thread only
"""


def test_a_client_whose_first_thread_has_ended_is_a_client_until_the_last_one_ends(manager: hwpoison.Manager) -> None:
    table = manager.allocate(2 * PAGE_SIZE, name="table")
    table.write(0, page("a"))
    with Child(CONNECT + FIRST_THREAD_ENDS, manager.socket) as client:
        client.hear()
        wait_until(lambda: state_of(client.pid) == "Z", "its first thread ends")
        failure = manager.inject(table, 0)
        assert failure.victims == tuple(sorted((os.getpid(), client.pid)))
        # It hears the notice, repairs, and touches a page for the first time.
        assert client.ask() == [[0], ord("r"), 0]
        client.tell()
        assert client.wait() == 0
    wait_until(lambda: manager.statistics().clients == 1, "it is gone")


# --- the end of a private manager ------------------------------------------------------------------------------------

OWN_MANAGER = """
manager = hwpoison.Manager()
memory = manager.allocate(1 << 20, name="table")
memory.write(0, b"x" * memory.nbytes)
manager.inject(memory, 0)
say([manager.pid, manager.socket])
"""


@pytest.mark.parametrize(
    "end",
    ["manager.close()", "sys.exit()", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)", "memory.buffer[0]"],
    ids=["closes", "exits without closing", "exits at once", "is killed", "dies of a lost page"],
)
def test_when_its_last_client_is_gone_a_private_manager_leaves_nothing(end: str) -> None:
    with Child(f"{OWN_MANAGER}hear()\n{end}\n") as client:
        manager_pid, address = client.hear()
        with watched(manager_pid, keeper_of(manager_pid)) as ended:
            assert not ended()
            client.tell()
            client.wait()
            wait_until(ended, "the manager and its keeper end")
    assert address not in Path("/proc/net/unix").read_text()


WRITE_AND_READ = """
memory = manager.attach("table")
say()
hear()
memory.buffer[8192:8195] = b"abc"
say(memory.read(8191, 5).hex())
"""


def test_a_private_manager_stays_for_others_when_the_process_that_started_it_is_gone() -> None:
    with Child(OWN_MANAGER + "hear()\n") as starter:
        manager_pid, address = starter.hear()
        with Child(CONNECT + WRITE_AND_READ, address) as second:
            second.hear()
            with watched(manager_pid, keeper_of(manager_pid)) as ended, watched(starter.pid) as starter_ended:
                starter.signal(signal.SIGKILL)
                wait_until(starter_ended, "the first process ends")
                assert bytes.fromhex(second.ask()) == b"xabcx"
                wait_until(ended, "the manager ends with the second process")


def test_a_private_manager_is_not_ended_by_the_signals_that_end_its_clients(manager: hwpoison.Manager) -> None:
    table = manager.allocate(2 * PAGE_SIZE, name="table")
    table.write(0, page("a"))
    keeper = keeper_of(manager.pid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        for pid in (manager.pid, keeper):
            os.kill(pid, number)
    assert table.buffer[PAGE_SIZE] == 0  # a fault, which only the manager can end
    assert manager.inject(table, 0).outcome is Outcome.RECOVERED
    assert keeper_of(manager.pid) == keeper
    os.kill(keeper, 0)


# --- a shared manager ------------------------------------------------------------------------------------------------


@contextmanager
def serve(path: Path) -> Iterator[subprocess.Popen[str]]:
    """`hwpoison serve`, from the moment that it answers."""
    command = [sys.executable, "-m", "hwpoison", "serve", "--socket", str(path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            wait_until(lambda: server.poll() is not None or answers(path), "the manager answers")
            yield server
        finally:
            if server.poll() is None:
                server.kill()


def answers(path: Path) -> bool:
    try:
        hwpoison.connect(str(path), maps=False).close()
    except ConnectionError:
        return False
    return True


def said(server: subprocess.Popen[str], what: str) -> None:
    """Its next line on standard error is that."""
    assert server.stderr is not None
    assert select.select([server.stderr], [], [], SECONDS_MAX)[0]
    assert what in server.stderr.readline()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_shared_manager_that_is_told_to_end_serves_those_who_map_its_memory_until_they_have_gone(
    tmp_path: Path, file: MakeFile, number: signal.Signals
) -> None:
    socket_path, path = tmp_path / "socket", file(64 * PAGE_SIZE)
    code = """
manager = hwpoison.connect(arguments[0])
book, table = manager.open(arguments[1], "r+"), manager.allocate(1 << 20)
book.buffer[0] = 1
say()
hear()
say(table.buffer[12345])
hear()
book.buffer[5 * 4096] = 2
say(table.nbytes)
hear()
os.kill(os.getpid(), signal.SIGKILL)
"""
    with (
        serve(socket_path) as server,
        Child(code, str(socket_path), str(path)) as first,
        Child(code, str(socket_path), str(path)) as second,
    ):
        said(server, "serves at")
        first.hear()
        second.hear()
        server.send_signal(number)
        said(server, "2 processes still map memory")
        assert not answers(socket_path)
        assert first.ask() == second.ask() == 0
        wait_until(lambda: path.read_bytes()[0] == 1, "what was dirty is in the file")
        with serve(socket_path) as successor:
            assert first.ask() == second.ask() == 1 << 20
            first.tell()
            assert first.wait() == -signal.SIGKILL
            assert server.poll() is None
            second.tell()
            assert server.wait(SECONDS_MAX) == 0, server.communicate()
            assert path.read_bytes()[5 * PAGE_SIZE] == 2
            with hwpoison.connect(str(socket_path), maps=False) as manager:
                assert keeper_of(manager.pid) == successor.pid


def test_a_shared_manager_that_is_told_to_end_ends_when_its_last_memory_is_closed(tmp_path: Path) -> None:
    with serve(tmp_path / "socket") as server:
        manager = hwpoison.connect(str(tmp_path / "socket"))
        said(server, "serves at")
        first, second = manager.allocate(PAGE_SIZE), manager.allocate(PAGE_SIZE)
        server.send_signal(signal.SIGTERM)
        said(server, "1 process still maps memory")
        first.close()
        assert second.read(0, 1) == b"\0"
        second.close()
        # That is said with the next request, or when the connection is closed.
        manager.close()
        assert server.wait(SECONDS_MAX) == 0


BOOK = f"""
manager = hwpoison.connect(arguments[0])
book = manager.open(arguments[1], "r+")
book.buffer[3 * {PAGE_SIZE} : 4 * {PAGE_SIZE}] = b"s" * {PAGE_SIZE}
book.write(63 * {PAGE_SIZE}, b"w" * {PAGE_SIZE})
say()
hear()
"""


def test_a_shared_manager_that_is_ended_writes_back_what_its_clients_have_stored(tmp_path: Path, file: MakeFile) -> None:
    path = file(64 * PAGE_SIZE)
    with serve(tmp_path / "socket") as server, Child(BOOK, str(tmp_path / "socket"), str(path)) as client:
        client.hear()
        said(server, "serves at")
        server.send_signal(signal.SIGTERM)
        said(server, "or the same signal again, ends it at once, and those with it")
        server.send_signal(signal.SIGTERM)
        assert server.wait(SECONDS_MAX) == 0
        # Nobody is left who could serve an access of its.
        assert client.wait() == -signal.SIGBUS
    expected = bytearray(known(64 * PAGE_SIZE))
    expected[3 * PAGE_SIZE : 4 * PAGE_SIZE] = page("s")
    expected[63 * PAGE_SIZE :] = page("w")
    assert path.read_bytes() == expected


def test_the_socket_of_a_manager_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serve(path) as first:
        kill_service(first.pid)
        first.wait(SECONDS_MAX)
    assert path.is_socket()
    assert not answers(path)
    with serve(path) as second:
        assert second.poll() is None
        manager = hwpoison.connect(str(path))
        assert keeper_of(manager.pid) == second.pid
        manager.close()


def test_of_managers_that_start_at_one_socket_at_the_same_moment_one_serves_and_the_others_are_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "socket"
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stale.bind(str(path))
    stale.close()
    command = [sys.executable, "-m", "hwpoison", "serve", "--socket", str(path)]
    servers = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
        for _ in range(6)
    ]
    try:
        wait_until(lambda: sum(one.poll() is None for one in servers) <= 1, "all but one have given up")
        (winner,) = [one for one in servers if one.poll() is None]
        manager = hwpoison.connect(str(path), maps=False)
        assert keeper_of(manager.pid) == winner.pid
        manager.close()
        winner.send_signal(signal.SIGTERM)
        assert winner.wait(SECONDS_MAX) == 0
        for one in servers:
            assert one.stderr is not None
            if one is not winner:
                assert (one.returncode, "already" in one.stderr.read()) == (2, True)
    finally:
        for one in servers:
            if one.poll() is None:
                one.kill()
            one.communicate()
    assert not path.exists()
