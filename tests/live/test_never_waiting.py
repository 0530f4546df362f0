"""The manager never waits for a client: whoever stalls holds up nobody but those who need what it holds."""

from __future__ import annotations

import mmap
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import hwpoison
from hwpoison import State, protocol
from hwpoison.linux.files import WORKERS_OF_FILE, WORKERS_OF_MOUNT
from hwpoison.linux.syscalls import PAGE_SIZE
from tests.live.conftest import known
from tests.live.process import Child, state_of
from tests.live.slow_files import SlowFile
from tests.support import SECONDS_MAX, wait_until

pytestmark = pytest.mark.live

MakeFile = Callable[..., Path]
MakeSlowFile = Callable[[bytes], SlowFile]

CONNECT = "manager = hwpoison.connect(arguments[0])\n"


def page(letter: str) -> bytes:
    return letter.encode() * PAGE_SIZE


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
    before = manager.inject(table, PAGE_SIZE)
    with Child(CONNECT + STALLING, manager.socket, str(read_only), str(writable)) as stopped:
        stopped.hear()
        stopped.signal(signal.SIGSTOP)
        wait_until(lambda: state_of(stopped.pid) == "T", "it is stopped")
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
        assert state_of(stopped.pid) == "T", "it has slept through all of it"
        stopped.signal(signal.SIGCONT)
        told, anonymous, written = stopped.ask([one.event_id for one in (before, *lost)])
        assert told == [one.event_id for one in (before, *lost)]
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


READ_A_BYTE = """
memory = manager.open(arguments[1])
say()
say(memory.buffer[hear()])
"""


@pytest.mark.parametrize(
    ("files", "workers"), [(1, WORKERS_OF_FILE), (9, WORKERS_OF_MOUNT)], ids=["one file", "many files of one file system"]
)
def test_a_file_whose_reads_hang_holds_up_only_those_who_read_it(
    files: int, workers: int, manager: hwpoison.Manager, slow_file: MakeSlowFile
) -> None:
    hanging, other = slow_file(known(16 * PAGE_SIZE)), slow_file(known(8 * PAGE_SIZE, version=2))
    memories = [manager.open(hanging.path, name=f"hanging {number}") for number in range(files)]
    with Child(CONNECT + READ_A_BYTE, manager.socket, str(other.path)) as reader:
        reader.hear()
        hanging.hold("read", "getattr")
        # So many at once that they would use up the workers of a manager that has none left for others.
        threads = [
            threading.Thread(target=memory.prefetch, args=(index * PAGE_SIZE, PAGE_SIZE))
            for memory in memories
            for index in range(16)
        ]
        for one in threads:
            one.start()
        wait_until(lambda: len(hanging.waiting) >= workers, "all that may be at once are under way")
        assert reader.ask(PAGE_SIZE) == known(2 * PAGE_SIZE, version=2)[PAGE_SIZE]
        hanging.hold()
        for one in threads:
            one.join(SECONDS_MAX)
    for memory in memories:
        assert memory.read(0, memory.nbytes) == known(16 * PAGE_SIZE)


TOUCH = """
memory = manager.attach("hanging")
say()
hear()
say(memory.buffer[7 * 4096 : 8 * 4096].hex())
"""


def test_a_file_system_that_answers_nothing_holds_up_only_those_who_need_its_file(
    manager: hwpoison.Manager, slow_file: MakeSlowFile, file: MakeFile
) -> None:
    content = known(8 * PAGE_SIZE)
    hanging, closing, opening = slow_file(content), slow_file(content), slow_file(content)
    memory = manager.open(hanging.path, "r+", name="hanging")
    memory.read(0, PAGE_SIZE)
    memory.write(PAGE_SIZE, page("w"))
    closed = manager.open(closing.path, name="closing")
    other = manager.open(file(8 * PAGE_SIZE, version=2), "r+")
    expected = bytearray(known(8 * PAGE_SIZE, version=2))
    opened: list[hwpoison.Memory] = []
    threads = [
        threading.Thread(target=call)
        for call in (
            memory.flush,
            lambda: manager.inject(memory, 0),
            lambda: memory.prefetch(5 * PAGE_SIZE, PAGE_SIZE),
            closed.close,
            lambda: opened.append(manager.open(opening.path, name="opening")),
        )
    ]
    with Child(CONNECT + TOUCH, manager.socket) as toucher:
        toucher.hear()
        # Not even how large the file is can be had, nor can it be closed, or looked at when it is opened.
        hanging.hold("getattr", "read", "write")
        closing.hold("flush")
        opening.hold("statfs")
        for one in threads:
            one.start()
        toucher.tell()
        wait_until(lambda: len(hanging.waiting) == 4, "a flush, a failure, a prefetch and a fault wait for the file")
        wait_until(lambda: closing.waiting and opening.waiting, "the other two are under way")
        for offset in range(0, other.nbytes, PAGE_SIZE):
            assert other.buffer[offset : offset + PAGE_SIZE] == expected[offset : offset + PAGE_SIZE]
            other.buffer[offset : offset + 1] = expected[offset : offset + 1] = b"o"
            other.flush()
            assert manager.inject(other, offset).state is State.CLEAN_FILE
            assert other.read(offset, PAGE_SIZE) == expected[offset : offset + PAGE_SIZE]
        assert {name for name, _, _ in hanging.waiting} == {"getattr"}, "all the time"
        assert len(hanging.waiting) == 4
        for slow in (hanging, closing, opening):
            slow.hold()
        for one in threads:
            one.join(SECONDS_MAX)
            assert not one.is_alive()
        assert bytes.fromhex(toucher.hear()) == content[7 * PAGE_SIZE :]
    assert memory.lost() == []
    assert memory.read(0, memory.nbytes) == content[:PAGE_SIZE] + page("w") + content[2 * PAGE_SIZE :]
    memory.close()
    assert hanging.content == content[:PAGE_SIZE] + page("w") + content[2 * PAGE_SIZE :]
    assert opened[0].read(0, opened[0].nbytes) == content


def test_a_descriptor_that_was_sent_in_vain_and_cannot_be_closed_holds_up_nobody(
    manager: hwpoison.Manager, slow_file: MakeSlowFile
) -> None:
    slow = slow_file(known(PAGE_SIZE))
    with slow.path.open("rb") as file:
        slow.hold("flush")
        with pytest.raises(FileNotFoundError):
            manager.connection.request_fds(protocol.Attach("nothing"), protocol.Found, [file.fileno()])
        wait_until(lambda: slow.waiting, "the manager closes it")
        assert manager.statistics().pid == manager.pid
        assert [name for name, _, _ in slow.waiting] == ["flush"]
        slow.hold()


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


def test_an_access_to_a_file_that_does_not_answer_fails_in_the_named_time_and_others_go_on(slow_file: MakeSlowFile) -> None:
    slow = slow_file(known(4 * PAGE_SIZE))
    code = """
manager = hwpoison.Manager(io_limit=0.5)
memory = manager.open(arguments[0])
other = manager.allocate(4096)
say(manager.socket)
hear()
try:
    memory.read(0, 1)
except hwpoison.PoisonError as error:
    say(str(error))
say(next(memory.notices()).reason)
other.buffer[0] = 1
say(other.buffer[0])
try:
    memory.discard()
except OSError as error:
    say(error.strerror)
hear()
memory.discard()
say(memory.read(0, 8).hex())
"""
    with Child(code, str(slow.path)) as child:
        child.hear()
        slow.hold("read")
        assert "lost" in child.ask()
        assert child.hear() == "the file system has not given it within 0.5 s"
        assert child.hear() == 1
        # It has the page locked, and whoever touches it would wait for it.
        assert child.hear() == "the file system has not answered within 0.5 s; try again later"
        slow.hold()
        assert child.ask() == known(4 * PAGE_SIZE)[:8].hex()
        assert child.wait() == 0, child.errors


def test_an_access_of_c_code_to_such_a_file_ends_too(slow_file: MakeSlowFile) -> None:
    """A thread that sleeps in a fault with the interpreter's lock reacts to nothing."""
    slow = slow_file(known(4 * PAGE_SIZE))
    code = """
manager = hwpoison.Manager(io_limit=0.5)
memory = manager.open(arguments[0])
say()
hear()
memory.buffer[0]
"""
    with Child(code, str(slow.path)) as child:
        child.hear()
        slow.hold("read")
        child.tell()
        wait_until(lambda: child.state == "Z", "it has ended")
        # Its manager can't, before the file system has answered, and has the child's standard error.
        slow.hold()
        assert child.wait() == -signal.SIGBUS
