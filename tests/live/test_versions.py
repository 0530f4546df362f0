"""Which version of a file is shown: never a stale one after a loss, never two at the same time."""

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import hwpoison
from tests.live.process import Child
from tests.live.slow_files import SlowFile
from tests.support import wait_until

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"A" * 4 * PAGE)
    return path


def _dirty_and_wait(socket: str, path: str, ready) -> None:
    memory = hwpoison.connect(socket).open(path, "r+")
    memory.buffer[:PAGE] = b"B" * PAGE
    ready.set()
    signal.pause()


def test_lost_changes_of_a_client_that_was_killed_are_not_read_as_the_old_content(file: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with hwpoison.Manager() as manager:
        ready = context.Event()
        owner = context.Process(target=_dirty_and_wait, args=(manager.socket, str(file), ready))
        owner.start()
        assert ready.wait(60)
        victims = manager.inject(str(file), 0).victims
        assert victims == (owner.pid,)
        owner.kill()
        owner.join()
        with pytest.raises(FileExistsError, match=r"are lost|another mode"):
            manager.open(file, "r")
        with pytest.raises(FileExistsError, match="are lost"):
            manager.open(file, "r", name="by another name")
        again = manager.open(file, "r+")
        with pytest.raises(hwpoison.PoisonError):
            again.read(0, 4)
        assert again.discard() == PAGE
        assert again.read(0, 4) == b"AAAA"
        again.close()
        assert manager.open(file, "r").read(0, 4) == b"AAAA"


def test_what_one_object_has_lost_is_not_read_from_the_file_as_another(file: Path) -> None:
    with hwpoison.Manager() as manager:
        # Three objects over the same file, one of which has only a part of it.
        late, writer = manager.open(file, name="late"), manager.open(file, "r+", name="writer")
        other = manager.open(file, "r+", PAGE, PAGE, name="other")
        old = file.read_bytes()
        for page in range(2):
            writer.write(page * PAGE, b"n" * PAGE)
            manager.inject(writer, page * PAGE)
        for memory, offset in ((late, 0), (late, PAGE), (other, 0)):
            with pytest.raises(hwpoison.PoisonError):
                memory.read(offset, 1)
            # Also for who accepts what the file holds; it does so by itself.
            assert memory.discard(offset, 1) == PAGE
            assert memory.read(offset, 1) == old[:1]
        reasons = {event.detail for event in manager.events() if event.kind == "error"}
        assert any("made as 'writer' are lost" in reason for reason in reasons), reasons
        # What nobody has lost is read as ever, and all of it once the loss is given up.
        assert late.read(2 * PAGE, 1) == old[:1]
        writer.discard()
        again = manager.open(file, name="again")
        assert again.read(0, 2 * PAGE) == old[: 2 * PAGE]
        with pytest.raises(OSError, match="were lost"):
            writer.flush()


READS = """
memory = hwpoison.connect(arguments[0]).attach("late")
try:
    say(memory.read(0, 1).decode())
except hwpoison.PoisonError as error:
    say([list(one) for one in error.ranges])
"""


def test_what_is_lost_while_another_object_reads_it_is_not_read(slow_file: Callable[[bytes], SlowFile]) -> None:
    slow = slow_file(b"A" * PAGE)
    with hwpoison.Manager() as manager:
        writer, late = manager.open(slow.path, "r+", name="writer"), manager.open(slow.path, name="late")
        writer.write(0, b"n" * PAGE)
        slow.hold("read")
        with Child(READS, manager.socket) as reader:
            wait_until(lambda: slow.waiting, "the file is being read")
            manager.inject(writer, 0)
            slow.hold()
            assert reader.hear() == [["late", 0, PAGE]]
        assert late.lost() == [("late", 0, PAGE)]
        with pytest.raises(OSError, match="were lost"):
            writer.flush()


def test_a_file_that_changed_is_not_opened_as_the_version_that_others_still_use(file: Path) -> None:
    with hwpoison.Manager() as manager:
        before = manager.open(file)
        assert before.read(0, 4) == b"AAAA"
        file.write_bytes(b"C" * 4 * PAGE)
        with hwpoison.connect(manager.socket) as other:
            with pytest.raises(FileExistsError, match="was changed"):
                other.open(file)
            assert other.open(file, name="now").read(0, 4) == b"CCCC"


def test_a_flush_does_not_take_the_change_of_somebody_else_for_its_own(file: Path) -> None:
    with hwpoison.Manager() as manager, manager.open(file, "r+") as memory:
        assert memory.read(PAGE, 4) == b"AAAA"
        memory.write(0, b"B" * PAGE)
        with file.open("r+b") as other:
            other.seek(PAGE)
            other.write(b"X" * PAGE)
        memory.flush()
        failure = manager.inject(memory, PAGE)
        assert "changed" in failure.reason
        with pytest.raises(hwpoison.PoisonError):
            memory.read(PAGE, 4)
        assert memory.discard() == PAGE
        assert memory.read(PAGE, 4) == b"XXXX"


@pytest.mark.parametrize(("when", "content"), [("before", b"X" * 4 * PAGE), ("during", b"X" * 5 * PAGE)])
def test_a_write_that_fails_does_not_hide_the_change_of_somebody_else(
    when: str, content: bytes, slow_file: Callable[[bytes], SlowFile]
) -> None:
    slow = slow_file(b"A" * 4 * PAGE)
    with hwpoison.Manager() as manager, manager.open(slow.path, "r+", name="slow") as memory:
        assert memory.read(PAGE, 4) == b"AAAA"
        memory.write(0, b"B" * PAGE)
        slow.hold("write")
        if when == "before":
            slow.change(content)
        said: list[int | None] = []

        def flush() -> None:
            with pytest.raises(OSError) as caught:
                memory.flush()
            said.append(caught.value.errno)

        flushing = threading.Thread(target=flush)
        flushing.start()
        wait_until(lambda: slow.waiting, "the write is under way")
        if when == "during":
            slow.change(content)
        slow.fail(write=errno.ENOSPC)
        slow.hold()
        flushing.join()
        assert said == [errno.ENOSPC]
        slow.fail()
        assert "changed by somebody else" in manager.inject(memory, PAGE).reason
        with pytest.raises(hwpoison.PoisonError):
            memory.read(PAGE, 4)
        assert memory.read(0, 4) == b"BBBB"
        assert memory.discard() == PAGE
        assert memory.read(PAGE, 4) == b"XXXX"


def test_a_write_that_fails_is_not_taken_for_the_change_of_somebody_else(slow_file: Callable[[bytes], SlowFile]) -> None:
    slow = slow_file(b"A" * 4 * PAGE)
    with hwpoison.Manager() as manager, manager.open(slow.path, "r+", name="slow") as memory:
        memory.write(0, b"B" * PAGE)
        memory.write(2 * PAGE, b"B" * PAGE)
        slow.fail_after(1, write=errno.ENOSPC)
        with pytest.raises(OSError, match="could not be written"):
            memory.flush()
        slow.fail()
        manager.inject(memory, PAGE)
        assert memory.read(0, 4 * PAGE) == b"B" * PAGE + b"A" * PAGE + b"B" * PAGE + b"A" * PAGE
        assert memory.lost() == []


def _other(file: Path) -> Path:
    other = file.with_name("other")
    other.write_bytes(b"D" * 4 * PAGE)
    return other


def _write_and_set_times_back(file: Path) -> None:
    before = file.stat()
    file.write_bytes(b"C" * 4 * PAGE)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


CTIME = "the file's ctime changed: it was renamed, replaced or deleted, or its links, attributes or times changed"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda file: os.replace(_other(file), file), CTIME),
        (lambda file: file.unlink(), CTIME),
        (lambda file: file.chmod(0o600), CTIME),
        (lambda file: file.with_name("link").hardlink_to(file), CTIME),
        (_write_and_set_times_back, CTIME),
        (lambda file: file.write_bytes(b"C" * 4 * PAGE), "the file was changed by somebody else"),
        (lambda file: os.truncate(file, 5 * PAGE), "the file was changed by somebody else"),
        (lambda file: os.truncate(file, PAGE), "the file shrank"),
    ],
    ids=["replaced", "deleted", "mode", "link", "times set back", "written", "grown", "shrunk"],
)
def test_a_page_that_cannot_be_read_again_is_lost_for_the_reason_that_the_file_gives(
    change: Callable[[Path], object], reason: str, file: Path
) -> None:
    os.utime(file, ns=(1, 1))
    with hwpoison.Manager() as manager, manager.open(file) as memory:
        assert memory.read(2 * PAGE, 4) == b"AAAA"
        change(file)
        assert manager.inject(memory, 2 * PAGE).reason == reason
        assert memory.lost() == [(str(file), 2 * PAGE, PAGE)]


def test_an_answer_that_is_larger_than_a_packet_arrives(file: Path) -> None:
    with hwpoison.Manager() as manager:
        names = {f"{number:04}{'x' * 4000}" for number in range(60)}
        memories = [manager.open(file, name=name) for name in names]
        assert {one.name for one in manager.objects()} == names
        del memories


@pytest.mark.soak
def test_more_losses_than_a_packet_holds_are_all_named(tmp_path: Path) -> None:
    pages = 60_000
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(pages * PAGE)
    with hwpoison.Manager() as manager:
        memory = manager.open(path)
        os.truncate(path, PAGE)
        with pytest.raises(hwpoison.PoisonError) as caught, hwpoison.guard(memory) as safe:
            view = safe.array()
            total = sum(int(view[offset]) for offset in range(PAGE, pages * PAGE, 2 * PAGE))
            assert total == 0
            del view
        assert len(caught.value.ranges) == pages // 2
        assert memory.lost() == list(caught.value.ranges)
        memory.close()
