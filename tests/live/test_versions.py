"""Which version of a file is shown: never a stale one after a loss, never two at the same time."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

import hwpoison

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
