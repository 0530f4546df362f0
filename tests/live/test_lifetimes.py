"""Failures at any moment of a process's life, and what becomes of managers whose clients go, and of clients that stall."""

from __future__ import annotations

import mmap
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
from tests.live.process import Child, asleep_in_a_fault, keeper_of
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


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


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
mapped, _ = ask(protocol.Map(found.object, address))
assert isinstance(mapped, protocol.Mapped)
say(ask(protocol.Lost(mapped.mapping))[0].ranges)
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


def test_a_shared_manager_that_is_ended_writes_back_what_its_clients_have_stored(tmp_path: Path, file: MakeFile) -> None:
    path = file(64 * PAGE_SIZE)
    with serve(tmp_path / "socket") as server:
        manager = hwpoison.connect(str(tmp_path / "socket"))
        book = manager.open(path, "r+")
        book.buffer[3 * PAGE_SIZE : 4 * PAGE_SIZE] = page("s")
        book.write(63 * PAGE_SIZE, page("w"))
        server.send_signal(signal.SIGTERM)
        assert server.wait(SECONDS_MAX) == 0
        with pytest.raises(ConnectionError):
            manager.close()
    expected = bytearray(known(64 * PAGE_SIZE))
    expected[3 * PAGE_SIZE : 4 * PAGE_SIZE] = page("s")
    expected[63 * PAGE_SIZE :] = page("w")
    assert path.read_bytes() == expected


def test_the_socket_of_a_manager_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serve(path) as first:
        first.kill()
        first.wait(SECONDS_MAX)
    assert path.is_socket()
    assert not answers(path)
    with serve(path) as second:
        assert second.poll() is None
        manager = hwpoison.connect(str(path))
        assert manager.pid == second.pid
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
        assert manager.pid == winner.pid
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


# --- clients that stall ----------------------------------------------------------------------------------------------

STALLING = """
anonymous, reading, writing = manager.attach("table"), manager.open(arguments[1]), manager.open(arguments[2], "r+")
notices = []
for memory in (anonymous, reading, writing):
    memory.on_failure(lambda notice: notices.append(notice.event_id))
    memory.read(8192, memory.nbytes - 8192)
    memory.buffer[8192 :: 4096].tobytes()
os.readv(os.open(arguments[1], os.O_RDONLY), [writing.buffer[:1]])
try:
    os.write(os.pipe()[1], anonymous.buffer[4096:4097])
except OSError as error:
    say(error.errno)
expected = hear()
while len(notices) < len(expected):
    time.sleep(0.001)
say([notices, anonymous.read(0, anonymous.nbytes).hex(), writing.read(0, writing.nbytes).hex()])
"""


def test_a_client_that_is_stopped_holds_up_nobody(manager: hwpoison.Manager, file: MakeFile) -> None:
    pages = 16
    read_only, writable = file(pages * PAGE_SIZE, "read"), file(pages * PAGE_SIZE, "written")
    table = manager.allocate(pages * PAGE_SIZE, name="table")
    table.write(0, page("a") * pages)
    reading, writing = manager.open(read_only), manager.open(writable, "r+")
    manager.inject(table, PAGE_SIZE)
    with Child(CONNECT + STALLING, manager.socket, str(read_only), str(writable)) as stopped:
        stopped.hear()
        stopped.signal(signal.SIGSTOP)
        wait_until(lambda: is_stopped(stopped.pid), "it is stopped")
        # All that the manager does to a client's address space or says to it: watch, mark, put in the place of a mark, tell.
        lost = []
        for index in range(2, pages):
            assert manager.inject(reading, index * PAGE_SIZE).state is State.CLEAN_FILE
            assert manager.inject(writing, index * PAGE_SIZE).state is State.CLEAN_FILE
            lost.append(manager.inject(table, index * PAGE_SIZE))
        assert all(stopped.pid in one.victims for one in lost)
        table.repair(PAGE_SIZE, page("r"))
        for index in range(2, pages):
            table.repair(index * PAGE_SIZE, page("s"))
            writing.buffer[index * PAGE_SIZE : (index + 1) * PAGE_SIZE] = page("w")
        writing.flush()
        assert reading.read(0, reading.nbytes) == known(pages * PAGE_SIZE)
        assert is_stopped(stopped.pid), "it has slept through all of it"
        stopped.signal(signal.SIGCONT)
        told, anonymous, written = stopped.ask([one.event_id for one in lost])
        assert told == [one.event_id for one in lost]
        assert bytes.fromhex(anonymous) == page("a") + page("r") + page("s") * (pages - 2)
        assert bytes.fromhex(written) == known(2 * PAGE_SIZE) + page("w") * (pages - 2)


def test_a_page_is_read_in_although_others_never_stop_writing_to_its_file(
    manager: hwpoison.Manager, slow_file: MakeSlowFile
) -> None:
    content = known(8 * PAGE_SIZE)
    slow = slow_file(content)
    book = manager.open(slow.path, "r+")

    def flush_page(index: int) -> threading.Thread:
        book.write(index * PAGE_SIZE, page("w"))
        thread = threading.Thread(target=book.flush)
        thread.start()
        return thread

    def waiting(operation: str) -> list[int]:
        return [offset // PAGE_SIZE for name, offset, _ in slow.waiting if name == operation]

    with Child(CONNECT + "memory = manager.attach(arguments[1])\nsay()\nhear()\nsay(memory.buffer[7 * 4096])\n",
               manager.socket, book.name) as reader:  # fmt: skip
        reader.hear()
        slow.hold("read", "write")
        reader.tell()
        wait_until(lambda: waiting("read") == [7], "the page is being read")
        flushes = [flush_page(0)]
        wait_until(lambda: waiting("write") == [0], "the first write is under way")
        # What was read beside a write is of no use: nobody can say whether others have changed the file meanwhile.
        slow.let("read")
        for index in range(1, 7):
            flushes.append(flush_page(index))
            slow.let("write")
            wait_until(lambda: slow.waiting, "a write or a read is next")
            for _ in range(10):
                manager.statistics()
            if waiting("read"):
                slow.let("read")
            wait_until(lambda: waiting("write"), "the next write is under way")
        assert reader.hear() == content[7 * PAGE_SIZE], "although a write is under way, and all the time was"
        slow.hold()
        for one in flushes:
            one.join(SECONDS_MAX)
    book.close()
    assert slow.content == page("w") * 7 + content[7 * PAGE_SIZE :]


HOLDING_ITS_MMAP_LOCK = """
import ctypes
memory = manager.open(arguments[1], "r+")
memory.prefetch()
rounds = mmap.mmap(os.open(arguments[2], os.O_RDWR), 8)
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
nbytes = 8 << 30
address = ctypes.c_void_p(libc.mmap(None, ctypes.c_size_t(nbytes), 3, 0x4022, -1, 0))
MADV_NOHUGEPAGE, MADV_POPULATE_READ = 15, 22
for advice in (MADV_NOHUGEPAGE, MADV_POPULATE_READ):
    assert not libc.madvise(address, ctypes.c_size_t(nbytes), advice)
say()
number = 0
while not rounds[7]:
    # An odd number while the system call walks two million pages with the lock held.
    rounds[0] = number = number + 1 & 255
    assert not libc.mprotect(address, ctypes.c_size_t(nbytes), 1 | number & 2)
    rounds[0] = number = number + 1 & 255
"""


def test_a_client_that_holds_its_mmap_lock_holds_up_nobody_who_does_not_share_the_page(
    manager: hwpoison.Manager, file: MakeFile, tmp_path: Path
) -> None:
    reports, batch = 12, 8
    shared, own = file(reports * PAGE_SIZE, "shared"), file(8192 * PAGE_SIZE, "own")
    (tmp_path / "rounds").write_bytes(bytes(8))
    with (tmp_path / "rounds").open("r+b") as opened, mmap.mmap(opened.fileno(), 8) as rounds:
        with Child(CONNECT + HOLDING_ITS_MMAP_LOCK, manager.socket, str(shared), str(tmp_path / "rounds")) as holder:
            book = manager.open(own, "r+")
            table = manager.allocate(8192 * PAGE_SIZE, name="table")
            holder.hear()
            under_way, ended, stop = set[int](), [0] * reports, threading.Event()

            def fail_again_and_again(index: int) -> None:
                """Each failure of this clean page needs the lock: it must be watched while it is absent."""
                while not stop.is_set():
                    under_way.add(index)
                    manager.inject(str(shared), index * PAGE_SIZE)
                    ended[index] += 1
                    under_way.remove(index)

            threads = [threading.Thread(target=fail_again_and_again, args=(index,)) for index in range(reports)]
            for thread in threads:
                thread.start()
            try:
                # In an order that is no stream, so that each is a fault of its own.
                fresh = iter(index * 1021 % 8192 for index in range(8192))

                def look() -> tuple[int, int, list[int]]:
                    """What there is to see, when everybody who can go on has done so."""
                    for _ in range(10):
                        manager.statistics()
                    return rounds[0], len(under_way), list(ended)

                def held_throughout() -> bool:
                    """First writes and first touches ended while the lock was held and all failures waited for it."""
                    before = look()
                    for index in [next(fresh) for _ in range(batch)]:
                        book.buffer[index * PAGE_SIZE] = 1
                        table.buffer[index * PAGE_SIZE] = 1
                    return before[0] % 2 == 1 and before[1] == reports and before == look()

                wait_until(held_throughout, "others' faults are served while one client's lock is held")
            finally:
                stop.set()
                rounds[7] = 1
                for thread in threads:
                    thread.join(SECONDS_MAX)
            assert holder.wait() == 0
