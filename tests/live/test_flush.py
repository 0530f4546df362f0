"""What comes back to the file: `flush`, and what it says, whoever asks and whatever goes wrong."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import hwpoison
from hwpoison import PoisonError
from tests.live.conftest import known
from tests.live.frames import PAGE
from tests.live.process import Child
from tests.live.slow_files import SlowFile
from tests.support import wait_until

MakeFile = Callable[..., Path]
MakeSlowFile = Callable[[bytes], SlowFile]


def test_flush_returns_when_everything_is_written_and_then_synced(
    slow_file: MakeSlowFile, manager: hwpoison.Manager
) -> None:
    slow = slow_file(known(64 * PAGE))
    memory = manager.open(slow.path, "r+", name="slow")
    memory.buffer[:] = known(64 * PAGE, 2)
    assert "write" not in slow.done, "nothing is written before it is asked for"
    memory.flush()
    assert slow.content == known(64 * PAGE, 2)
    done = slow.done
    assert set(done[done.index("write") : -1]) == {"write"}
    assert done[-1] == "sync"
    memory.buffer[5 * PAGE] ^= 1
    memory.flush()
    assert slow.done[len(done) :] == ["write", "sync"], "only what has changed is written"
    assert slow.content == bytes(memory.buffer)


def test_a_flush_does_not_rely_on_what_another_one_has_on_its_way(
    slow_file: MakeSlowFile, manager: hwpoison.Manager
) -> None:
    slow = slow_file(known(PAGE))
    memory = manager.open(slow.path, "r+", name="slow")
    memory.buffer[:] = known(PAGE, 2)
    slow.hold("write")
    said: list[int | None] = []

    def flush() -> None:
        try:
            memory.flush()
        except OSError as error:
            said.append(error.errno)
        else:
            said.append(None)

    flushes = [threading.Thread(target=flush), threading.Thread(target=flush)]
    flushes[0].start()
    wait_until(lambda: slow.waiting, "the page is on its way")
    flushes[1].start()
    for _ in range(20):
        # The manager answers these after it has seen the second flush.
        manager.statistics()
    slow.fail(write=errno.ENOSPC)
    slow.hold()
    for one in flushes:
        one.join()
    assert said == [errno.ENOSPC, errno.ENOSPC], "the second one has to write the page itself, and cannot either"
    slow.fail()
    memory.flush()
    assert slow.content == known(PAGE, 2)


def test_a_write_that_fails_is_told_and_the_content_is_kept_for_the_next_flush(
    slow_file: MakeSlowFile, manager: hwpoison.Manager
) -> None:
    slow = slow_file(known(2 * PAGE))
    memory = manager.open(slow.path, "r+", name="slow")
    for operation in ("write", "sync"):
        memory.buffer[:] = known(2 * PAGE, len(operation))
        slow.fail(**{operation: errno.ENOSPC})
        with pytest.raises(OSError) as caught:
            memory.flush()
        assert caught.value.errno == errno.ENOSPC
        assert manager.objects()[0].dirty == 2 * PAGE
        slow.fail()
        memory.flush()
        assert slow.content == known(2 * PAGE, len(operation))
        assert manager.objects()[0].dirty == 0
    assert memory.lost() == []


def test_a_write_that_failed_and_was_done_again_is_told_to_nobody_else(
    slow_file: MakeSlowFile, manager: hwpoison.Manager
) -> None:
    slow = slow_file(known(2 * PAGE))
    memory = manager.open(slow.path, "r+", name="slow")
    other = manager.attach("slow")
    memory.buffer[:] = known(2 * PAGE, 2)
    slow.fail(write=errno.ENOSPC)
    for each in (memory, other, memory):
        with pytest.raises(OSError, match="stay in memory") as caught:
            each.flush()
        assert caught.value.errno == errno.ENOSPC
    slow.fail()
    for each in (other, memory):
        each.flush()
    assert slow.content == known(2 * PAGE, 2)
    assert memory.lost() == []


@pytest.mark.parametrize("had_back", [False, True])
def test_a_loss_is_told_although_a_flush_could_not_write_before_it_could(
    slow_file: MakeSlowFile, manager: hwpoison.Manager, had_back: bool
) -> None:
    slow = slow_file(known(4 * PAGE))
    memory = manager.open(slow.path, "r+", name="slow")
    other = manager.attach("slow")
    memory.buffer[:] = known(4 * PAGE, 2)
    assert manager.inject(memory, 0).state == hwpoison.State.DIRTY_FILE
    if had_back:
        assert other.discard() == PAGE
    slow.fail(write=errno.ENOSPC)
    for _ in range(2):
        with pytest.raises(OSError, match="others were lost") as caught:
            memory.flush()
        assert caught.value.errno == errno.ENOSPC
    slow.fail()
    for each in (memory, other):
        with pytest.raises(OSError, match="lost") as caught:
            each.flush()
        assert caught.value.errno == errno.EIO
        each.flush()
    assert slow.content[PAGE:] == known(4 * PAGE, 2)[PAGE:]


@pytest.mark.parametrize("operation", ["write", "sync"])
def test_each_thread_that_flushes_hears_that_not_everything_could_be_written(
    slow_file: MakeSlowFile, manager: hwpoison.Manager, operation: str
) -> None:
    slow = slow_file(known(4 * PAGE))
    memory = manager.open(slow.path, "r+", name="slow")
    memory.buffer[:] = known(4 * PAGE, 2)
    manager.inject(memory, 0)
    slow.fail(**{operation: errno.ENOSPC})
    ready, said = threading.Barrier(3), []

    def flush() -> None:
        ready.wait()
        try:
            memory.flush()
        except OSError as error:
            said.append(error.errno)

    threads = [threading.Thread(target=flush) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == [errno.ENOSPC] * 3
    slow.fail()
    with pytest.raises(OSError, match="lost") as caught:
        memory.flush()
    assert caught.value.errno == errno.EIO
    memory.flush()


def test_a_told_loss_that_stands_makes_no_error_of_one_that_was_had_back(file: MakeFile) -> None:
    with hwpoison.Manager() as manager:
        path = file(4 * PAGE)
        memory = manager.open(path, "r+")
        memory.buffer[:] = known(4 * PAGE, 2)
        manager.inject(memory, 0)
        with pytest.raises(OSError, match="lost"):
            memory.flush()
        memory.buffer[PAGE:] = known(3 * PAGE, 3)
        manager.inject(memory, PAGE)
        assert memory.repair(PAGE, known(PAGE, 4)) == PAGE
        manager.attach(str(path)).flush()
        with pytest.raises(OSError, match="lost"):
            memory.flush()
        memory.discard()


def test_a_file_that_lost_changes_and_was_mended_by_other_means_can_be_opened_again(file: MakeFile) -> None:
    path = file(4 * PAGE)
    with hwpoison.Manager() as manager:
        memory = manager.open(path, "r+")
        memory.buffer[:5] = b"hello"
        manager.inject(memory, 0)
        with pytest.raises(OSError, match="lost"):
            memory.close()
        path.write_bytes(known(4 * PAGE, 5))
        for mode, name in (("r+", None), ("r", None), ("r+", "other")):
            with pytest.raises(FileExistsError, match="attach"):
                manager.open(path, mode, name=name)  # type: ignore[arg-type]
        with manager.attach(str(path)) as again:
            assert again.discard() == PAGE
            assert again.read(0, PAGE) == known(PAGE, 5)
        wait_until(lambda: not manager.objects(), "the object is at its end")
        assert manager.open(path, "r+").read(0, 4 * PAGE) == known(4 * PAGE, 5)


WRITES_AND_STAYS = """
manager = hwpoison.connect(arguments[0])
memory = manager.open(arguments[1], "r+")
memory.buffer[:5] = b"hello"
say()
hear()
"""


def test_lost_changes_of_which_nobody_was_told_are_told_to_who_has_the_file_next(file: MakeFile) -> None:
    path = file(2 * PAGE)
    with hwpoison.Manager() as manager:
        with Child(WRITES_AND_STAYS, manager.socket, str(path)) as child:
            child.hear()
            assert manager.inject(str(path), 0).state == hwpoison.State.DIRTY_FILE
        memory = manager.open(path, "r+")
        memory.buffer[PAGE:][:5] = b"later"
        with pytest.raises(OSError, match="lost") as caught:
            memory.flush()
        assert caught.value.errno == errno.EIO
        memory.flush()
        manager.attach(str(path)).flush()
        assert memory.discard() == PAGE
    assert path.read_bytes()[PAGE:][:5] == b"later"


def test_a_flush_to_a_file_that_shrank_writes_nothing_and_keeps_the_changes_until_it_is_as_long_again(
    manager: hwpoison.Manager, file: MakeFile
) -> None:
    path = file(16 * PAGE)
    memory = manager.open(path, "r+")
    memory.buffer[8 * PAGE : 8 * PAGE + 4] = b"mine"
    os.truncate(path, PAGE)
    for _ in range(2):
        with pytest.raises(OSError, match=r"the file has shrunk to 4096 bytes.*in memory.*flush"):
            memory.flush()
        assert path.read_bytes() == known(PAGE)
        assert manager.objects()[0].dirty == PAGE
    with pytest.raises(PoisonError):
        memory.read(4 * PAGE, 1)
    with pytest.raises(OSError, match="has shrunk and holds nothing here"):
        memory.discard()
    assert memory.read(8 * PAGE, 4) == b"mine"
    assert path.stat().st_size == PAGE
    os.truncate(path, 16 * PAGE)
    memory.flush()
    assert path.read_bytes() == known(PAGE) + bytes(7 * PAGE) + b"mine" + known(16 * PAGE)[8 * PAGE + 4 : 9 * PAGE] + bytes(
        7 * PAGE
    )


def test_changes_that_the_last_client_leaves_behind_and_that_cannot_be_written_are_in_the_event_log(file: MakeFile) -> None:
    path = file(16 * PAGE)
    with hwpoison.Manager() as manager:
        memory = manager.open(path, "r+")
        memory.buffer[8 * PAGE] ^= 1
        os.truncate(path, PAGE)
        with pytest.raises(OSError, match="the file has shrunk"):
            memory.close()
        wait_until(lambda: not manager.objects(), "the object is at its end")
        details = [event.detail for event in manager.events() if event.kind == "error" and event.name == str(path)]
    assert any("the file has shrunk to 4096 bytes" in detail for detail in details)
    assert "4096 bytes of changes are lost" in details[-1]
    assert path.read_bytes() == known(PAGE)


WRITER = """
manager = hwpoison.connect(arguments[0])
memory = manager.open(arguments[1], "r+")
mine, rounds = arguments[2], arguments[3]
for number in range(1, rounds + 1):
    for page in range(mine, memory.nbytes // 4096, 2):
        memory.buffer[page * 4096 : (page + 1) * 4096] = bytes([10 * mine + number]) * 4096
    if number % 3 == 0:
        memory.flush()
say()
hear()
manager.close()
"""


def test_two_processes_that_write_different_pages_of_a_file_lose_nothing_of_each_other(
    manager: hwpoison.Manager, file: MakeFile
) -> None:
    path = file(64 * PAGE)
    with Child(WRITER, manager.socket, str(path), 0, 9) as even, Child(WRITER, manager.socket, str(path), 1, 9) as odd:
        for child in (even, odd):
            child.hear()
        memory = manager.open(path, "r+")
        expected = (bytes([9]) * PAGE + bytes([19]) * PAGE) * 32
        assert bytes(memory.buffer) == expected
        memory.buffer[0] = 77
        for child in (even, odd):
            child.tell()
            assert child.wait() == 0
        memory.close()
    assert path.read_bytes() == bytes([77]) + expected[1:]


@pytest.mark.parametrize("end", ["close", "exit", "kill"])
def test_the_last_client_leaves_its_changes_in_the_file_however_it_ends(
    end: str, manager: hwpoison.Manager, file: MakeFile
) -> None:
    path = file(16 * PAGE + 5)
    code = """
manager = hwpoison.connect(arguments[0])
memory = manager.open(arguments[1], "r+")
memory.buffer[:] = open(arguments[2], "rb").read()
say()
if hear() == "close":
    memory.close()
    say()
else:
    os._exit(0)
"""
    changed = known(16 * PAGE + 5, 2)
    with Child(code, manager.socket, str(path), str(file(16 * PAGE + 5, "changed", 2))) as child:
        child.hear()
        assert path.read_bytes() == known(16 * PAGE + 5)
        if end == "kill":
            child.signal(signal.SIGKILL)
        else:
            child.tell(end)
        if end == "close":
            child.hear()
            assert path.read_bytes() == changed
        child.wait()
    wait_until(lambda: manager.objects() == [], "the object ends")
    assert path.read_bytes() == changed


def test_a_client_that_is_killed_in_the_middle_of_its_flush_loses_nothing(
    slow_file: MakeSlowFile, manager: hwpoison.Manager
) -> None:
    slow = slow_file(known(8 * PAGE))
    slow.hold("write")
    code = """
manager = hwpoison.connect(arguments[0])
memory = manager.open(arguments[1], "r+", name="slow")
for page in (0, 2, 5):
    memory.buffer[page * 4096] ^= 255
memory.flush()
"""
    with Child(code, manager.socket, str(slow.path)) as child:
        wait_until(lambda: slow.waiting, "the first page is being written")
        child.signal(signal.SIGKILL)
        child.wait()
    wait_until(lambda: manager.objects()[0].mappings == 0, "the manager has seen it")
    slow.hold()
    wait_until(lambda: manager.objects() == [], "the object ends")
    expected = bytearray(known(8 * PAGE))
    for page in (0, 2, 5):
        expected[page * PAGE] ^= 255
    assert slow.content == expected
    assert slow.done[-1] == "sync"
