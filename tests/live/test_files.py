"""Memory over files: what is read, and when, whatever happens to the file. What comes back to it is in `test_flush`."""

from __future__ import annotations

import errno
import os
import random
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import hwpoison
from hwpoison import Outcome, PoisonError, State
from tests.live.conftest import known
from tests.live.frames import PAGE, cached_pages, forget_cached
from tests.live.process import Child
from tests.live.slow_files import SlowFile
from tests.support import need, wait_until

MakeFile = Callable[..., Path]
MakeSlowFile = Callable[[bytes], SlowFile]
MIB = 1 << 20


@pytest.fixture
def uncached(file: MakeFile) -> MakeFile:
    """A file of which the page cache holds nothing."""

    def make(nbytes: int) -> Path:
        path = file(nbytes)
        forget_cached(path)
        need(not cached_pages(path), "a temporary folder on a disk: here the page cache is the file")
        return path

    return make


# --- what is read ----------------------------------------------------------------------------------------------------


def test_random_access_reads_the_pages_that_are_touched_and_no_other(manager: hwpoison.Manager, uncached: MakeFile) -> None:
    memory = manager.open(uncached(16 * MIB))
    expected = known(16 * MIB)
    for page in random.Random(1).sample(range(0, 4096, 2), 500):
        assert memory.buffer[page * PAGE] == expected[page * PAGE]
    counted = manager.statistics()
    assert (counted.read, counted.faults) == (500 * PAGE, 500)


def test_sequential_access_grows_to_windows_of_2_mib(manager: hwpoison.Manager, uncached: MakeFile) -> None:
    memory = manager.open(uncached(16 * MIB))
    # Page by page: a large copy may go backwards (memcpy does where the addresses alias), or touch several pages in turn.
    for offset in range(0, 16 * MIB, PAGE):
        memory.buffer[offset]
    assert bytes(memory.buffer) == known(16 * MIB)
    counted = manager.statistics()
    assert counted.read == 16 * MIB, "no page was read twice"
    # 1, 4, 16, 64 and 256 pages, then 512 at a time; some more where the reader catches up with a window on its way.
    assert counted.faults <= 3 * (5 + 16 * MIB // (2 * MIB))


def test_two_sequential_readers_of_one_mapping_do_not_disturb_each_other(
    manager: hwpoison.Manager, uncached: MakeFile
) -> None:
    memory = manager.open(uncached(16 * MIB))
    half = 8 * MIB
    for offset in range(0, half, PAGE):
        assert memory.buffer[offset] == memory.buffer[offset]
        assert memory.buffer[half + offset] == memory.buffer[half + offset]
    assert manager.statistics().faults <= 6 * (5 + half // (2 * MIB))


def test_prefetch_brings_everything_in_while_other_threads_run(slow_file: MakeSlowFile, manager: hwpoison.Manager) -> None:
    slow = slow_file(known(64 * PAGE))
    memory = manager.open(slow.path, name="slow")
    slow.hold("read")
    prefetch = threading.Thread(target=memory.prefetch, args=(PAGE, 62 * PAGE))
    prefetch.start()
    wait_until(lambda: slow.waiting, "the file is being read, and this thread runs")
    assert prefetch.is_alive()
    slow.hold()
    prefetch.join()
    counted = manager.statistics()
    assert (counted.read, counted.faults) == (62 * PAGE, 0)
    assert bytes(memory.buffer[PAGE : 63 * PAGE]) == known(63 * PAGE)[PAGE:]
    assert manager.statistics().faults == 0


@pytest.mark.parametrize("how", ["sequential", "random", "prefetch", "write"])
def test_the_page_cache_does_not_grow_with_ours(how: str, manager: hwpoison.Manager, uncached: MakeFile) -> None:
    path = uncached(8 * MIB)
    memory = manager.open(path, "r+" if how == "write" else "r")
    if how == "prefetch":
        memory.prefetch()
    elif how == "random":
        for page in random.Random(2).sample(range(2048), 300):
            memory.buffer[page * PAGE]
    else:
        assert bytes(memory.buffer) == known(8 * MIB)
    if how == "write":
        memory.buffer[:] = known(8 * MIB, 2)
        memory.flush()
    assert cached_pages(path) == 0
    assert path.read_bytes() == known(8 * MIB, 2 if how == "write" else 1)


@pytest.mark.parametrize("offset", [1, 512, PAGE - 1])
def test_the_page_cache_does_not_grow_with_an_object_that_begins_anywhere_in_a_file(
    offset: int, manager: hwpoison.Manager, uncached: MakeFile
) -> None:
    path = uncached(8 * MIB)
    memory = manager.open(path, offset=offset, nbytes=7 * MIB)
    for page in random.Random(2).sample(range(1792), 100):
        assert memory.buffer[page * PAGE] == known(8 * MIB)[offset + page * PAGE]
    assert bytes(memory.buffer) == known(8 * MIB)[offset : offset + 7 * MIB]
    rest = manager.open(path, offset=offset, name="to the end")
    rest.prefetch()
    assert bytes(rest.buffer) == known(8 * MIB)[offset:]
    assert cached_pages(path) == 0


@pytest.mark.parametrize("offset", [0, 1000])
def test_where_a_file_system_cannot_read_past_the_page_cache_that_keeps_nothing_all_the_same(
    offset: int, slow_file: MakeSlowFile, manager: hwpoison.Manager
) -> None:
    slow = slow_file(known(4 * MIB))
    slow.refuse_direct()
    with pytest.raises(OSError, match="Invalid argument"):
        os.open(slow.path, os.O_RDONLY | os.O_DIRECT)
    memory = manager.open(slow.path, offset=offset, name="slow")
    for page in (0, 1, 2, 3, 500, 700, 900):
        assert memory.buffer[page * PAGE] == known(4 * MIB)[offset + page * PAGE]
        assert cached_pages(slow.path) == 0
    assert bytes(memory.buffer) == known(4 * MIB)[offset:]
    assert cached_pages(slow.path) == 0


def test_the_page_cache_does_not_grow_when_an_unprivileged_user_reads_a_file_of_somebody_else(
    nobody: Callable[..., Child], request: pytest.FixtureRequest
) -> None:
    folder = tempfile.TemporaryDirectory()
    request.addfinalizer(folder.cleanup)
    os.chmod(folder.name, 0o755)
    path = Path(folder.name, "data.bin")
    path.write_bytes(known(8 * MIB))
    forget_cached(path)
    need(not cached_pages(path), "a temporary folder on a disk: here the page cache is the file")
    code = """
with hwpoison.Manager() as manager:
    memory = manager.open(arguments[0])
    say(memory.read(0, memory.nbytes)[-8:].hex())
"""
    with nobody(code, str(path)) as child:
        assert child.hear() == known(8 * MIB)[-8:].hex()
        assert child.wait() == 0
    assert cached_pages(path) == 0


# --- a file that changes ---------------------------------------------------------------------------------------------


def test_a_file_that_shrinks_under_us_raises_and_gives_no_zeros(manager: hwpoison.Manager, file: MakeFile) -> None:
    path = file(8 * PAGE)
    memory = manager.open(path)
    assert memory.read(0, PAGE) == known(PAGE)
    os.truncate(path, 5 * PAGE + 10)
    with pytest.raises(PoisonError) as caught:
        memory.read(5 * PAGE, 3 * PAGE)
    assert caught.value.ranges == ((str(path), 5 * PAGE, 3 * PAGE),)
    assert memory.read(0, PAGE) == known(PAGE), "what was there is still there"
    reasons = {event.detail for event in manager.events() if event.kind == "error"}
    assert reasons == {"the file shrank"}
    with pytest.raises(OSError):
        memory.discard(6 * PAGE, PAGE)
    assert memory.lost() == [(str(path), 5 * PAGE, 3 * PAGE)]
    touch = """
manager = hwpoison.connect(arguments[0])
memory = manager.attach(arguments[1])
say(memory.buffer[7 * 4096])
"""
    with Child(touch, manager.socket, str(path)) as child:
        assert child.wait() == -signal.SIGBUS


def _rewrite(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.write(content)


def test_a_page_of_a_file_that_somebody_has_changed_is_lost_not_mixed(manager: hwpoison.Manager, file: MakeFile) -> None:
    path = file(12 * PAGE)
    # A time that is not now: times of a file are no finer than the tick of the system's clock.
    os.utime(path, ns=(1, 1))
    memory = manager.open(path)
    told: list[hwpoison.Notice] = []
    memory.on_failure(told.append)
    for page in (0, 2, 4):
        assert memory.read(page * PAGE, PAGE) == known(12 * PAGE)[page * PAGE : (page + 1) * PAGE]
    _rewrite(path, known(12 * PAGE, 2))
    failure = manager.report(memory, 2 * PAGE)
    assert (failure.state, failure.outcome) == (State.CLEAN_FILE, Outcome.RECOVERED)
    assert failure.victims == (os.getpid(),)
    assert failure.reason == "the file was changed by somebody else"
    with pytest.raises(PoisonError) as caught:
        memory.read(6 * PAGE, PAGE)
    assert caught.value.ranges == ((str(path), 6 * PAGE, PAGE),)
    wait_until(lambda: len(told) == 2, "both losses are told")
    assert [(one.offset, one.state, one.reason) for one in told] == [
        (offset, State.CLEAN_FILE, "the file was changed by somebody else") for offset in (2 * PAGE, 6 * PAGE)
    ]
    for page in (0, 4):
        assert memory.read(page * PAGE, PAGE) == known(12 * PAGE)[page * PAGE : (page + 1) * PAGE]
    assert memory.discard() == 2 * PAGE
    assert memory.read(6 * PAGE, PAGE) == known(7 * PAGE, 2)[6 * PAGE :]


def test_nothing_is_ever_read_from_a_file_that_takes_the_place_of_the_one_that_was_opened(
    manager: hwpoison.Manager, file: MakeFile
) -> None:
    path = file(4 * PAGE)
    memory = manager.open(path)
    assert memory.read(0, PAGE) == known(PAGE)
    file(4 * PAGE, "new.bin", 2).rename(path)
    # The old file has lost its name, and so its identity has changed: what was not read in is not trusted.
    with pytest.raises(PoisonError):
        memory.read(0, 4 * PAGE)
    memory.discard()
    assert memory.read(0, 4 * PAGE) == known(4 * PAGE)


def test_while_somebody_rewrites_the_file_no_read_gives_anything_but_the_version_that_was_opened(
    manager: hwpoison.Manager, file: MakeFile
) -> None:
    pages = 64
    path = file(pages * PAGE)
    need(tells_changes_apart(path), "a file system whose times tell two changes apart")
    rewrite = """
versions = [open(one, "rb").read() for one in arguments[1]]
file = open(arguments[0], "r+b", buffering=0)
say()
number = 0
while True:
    number += 1
    os.pwrite(file.fileno(), versions[number % 2], 0)
"""
    versions = [str(file(pages * PAGE, f"version {version}", version)) for version in (2, 3)]
    intact = 0
    for _ in range(10):
        _rewrite(path, known(pages * PAGE))
        memory = manager.open(path)
        with Child(rewrite, str(path), versions) as child:
            child.hear()
            for page in range(pages):
                if page % 8 == 0 and page:
                    manager.report(memory, (page - 4) * PAGE)
                try:
                    content = memory.read(page * PAGE, PAGE)
                except PoisonError:
                    continue
                assert content == known((page + 1) * PAGE)[page * PAGE :], "another version"
                intact += 1
        memory.close()
        wait_until(lambda: manager.objects() == [], "the object ends")
    assert intact < 10 * pages, "nothing was rewritten"


def tells_changes_apart(path: Path) -> bool:
    """True if a change shows in the file's times although one came just before."""
    times = set()
    with path.open("r+b", buffering=0) as file:
        for _ in range(20):
            os.pwrite(file.fileno(), known(8), 0)
            times.add(os.fstat(file.fileno()).st_ctime_ns)
    return len(times) == 20


def test_what_a_file_fails_to_read_raises_and_can_be_had_when_it_reads_again(
    slow_file: MakeSlowFile, manager: hwpoison.Manager
) -> None:
    slow = slow_file(known(4 * PAGE))
    memory = manager.open(slow.path, name="slow")
    assert memory.read(0, PAGE) == known(PAGE)
    slow.fail(read=errno.EIO)
    failure = manager.report(memory, 0)
    assert (failure.state, failure.outcome, failure.victims) == (State.CLEAN_FILE, Outcome.RECOVERED, (os.getpid(),))
    assert "Input/output error" in failure.reason
    memory.prefetch()
    assert memory.lost() == [("slow", 0, PAGE)], "a prefetch loses nothing"
    with pytest.raises(PoisonError):
        memory.read(2 * PAGE, 1)
    with pytest.raises(OSError) as caught:
        memory.discard()
    assert caught.value.errno == errno.EIO
    assert memory.lost() == [("slow", 0, PAGE), ("slow", 2 * PAGE, PAGE)]
    slow.fail()
    assert memory.read(PAGE, PAGE) == known(2 * PAGE)[PAGE:]
    assert memory.discard() == 2 * PAGE
    assert memory.read(0, 4 * PAGE) == known(4 * PAGE)


# --- less memory than content ----------------------------------------------------------------------------------------


def test_a_file_that_is_larger_than_the_memory_limit_is_read_right(uncached: MakeFile) -> None:
    nbytes, limit = 24 * MIB, 2 * MIB
    with hwpoison.Manager(memory_limit=limit) as manager:
        memory = manager.open(uncached(nbytes))
        expected = known(nbytes)
        for _ in range(2):
            for offset in range(0, nbytes, MIB):
                assert memory.buffer[offset : offset + MIB] == expected[offset : offset + MIB]
                assert manager.statistics().memory_present <= limit
        chance = random.Random(3)
        for _ in range(500):
            offset = chance.randrange(nbytes - 100)
            assert memory.buffer[offset : offset + 100] == expected[offset : offset + 100]
        memory.prefetch()
        assert manager.statistics().memory_present <= limit
        assert manager.statistics().dropped >= 2 * (nbytes - limit)
        with pytest.raises(MemoryError):
            manager.allocate(limit + 1)


def test_a_file_that_is_larger_than_the_memory_limit_is_written_right(file: MakeFile) -> None:
    nbytes, limit = 12 * MIB, 1 * MIB
    path = file(nbytes)
    with hwpoison.Manager(memory_limit=limit) as manager:
        memory = manager.open(path, "r+")
        expected = bytearray(known(nbytes))
        chance = random.Random(4)
        for offset in range(0, nbytes, MIB):
            memory.buffer[offset : offset + MIB] = expected[offset : offset + MIB] = known(MIB, 2 + offset // MIB)
        for _ in range(500):
            offset = chance.randrange(nbytes - 100)
            memory.buffer[offset : offset + 100] = expected[offset : offset + 100] = chance.randbytes(100)
            offset = chance.randrange(nbytes - 100)
            assert memory.buffer[offset : offset + 100] == expected[offset : offset + 100]
        assert manager.statistics().memory_present <= limit
    assert path.read_bytes() == expected
