"""System calls that read and write managed memory: where they wait for pages as any access does, and in user mode, where
they can use what is there, and fail with EFAULT at what is not."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hwpoison
from tests.live.conftest import known
from tests.live.process import Child
from tests.support import need

pytestmark = pytest.mark.live

PAGE = os.sysconf("SC_PAGE_SIZE")
MakeFile = Callable[..., Path]
BEGIN = """
import socket
import tempfile
PAGE = os.sysconf("SC_PAGE_SIZE")

def into(view):
    "The two that write into memory; what they have written."
    with tempfile.TemporaryFile() as file:
        file.write(b"x" * len(view))
        file.seek(0)
        assert file.readinto(view[:PAGE]) == PAGE
    one, other = socket.socketpair()
    with one, other:
        one.sendall(b"y" * 1000)
        assert other.recv_into(view[PAGE:]) == 1000
    return bytes(view[:PAGE]) == b"x" * PAGE and bytes(view[PAGE:PAGE + 1000]) == b"y" * 1000

def out_of(view):
    "The three that read from it; what they have read."
    array, found = numpy.frombuffer(view, "u1"), []
    for write in (
        lambda file: os.write(file.fileno(), view),
        lambda file: numpy.save(file, array),
        lambda file: array.tofile(file),
    ):
        with tempfile.TemporaryFile(buffering=0) as file:
            write(file)
            file.seek(0)
            found.append(file.read()[-len(view):] == bytes(view))
    return found
"""


@pytest.fixture(params=["full", "user"])
def child(request: pytest.FixtureRequest) -> Callable[..., Child]:
    """A maker of processes: of root, or of an ordinary user, whose system calls the manager does not see."""
    if request.param == "user":
        return request.getfixturevalue("nobody")  # type: ignore[no-any-return]
    need(os.geteuid() == 0, "root")
    return Child


@pytest.fixture
def anybodys() -> Iterator[MakeFile]:
    """A maker of files that everybody may write."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)

        def make(nbytes: int) -> Path:
            path = Path(folder, "data.bin")
            path.write_bytes(known(nbytes))
            path.chmod(0o666)
            return path

        yield make


def test_new_memory_is_fit_for_every_call(child: Callable[..., Child]) -> None:
    code = """
with hwpoison.Manager() as manager:
    memory = manager.allocate(64 * PAGE, "table")
    with memory.buffer as view:
        say([into(view[:2 * PAGE]), out_of(view[2 * PAGE:32 * PAGE]), out_of(view)])
"""
    with child(BEGIN + code) as process:
        assert process.hear() == [True, [True] * 3, [True] * 3]
        assert process.wait() == 0, process.errors


def test_a_file_is_fit_for_them_where_it_is_resident(child: Callable[..., Child], anybodys: MakeFile) -> None:
    path = anybodys(64 * PAGE)
    code = """
path = arguments[0]
with hwpoison.Manager() as manager:
    memory = manager.open(path, "r+")
    before = bytes(memory.read(0, memory.nbytes))
    with memory.resident(8 * PAGE, 16 * PAGE) as view:
        say([view.readonly, bytes(view) == before[8 * PAGE:24 * PAGE], out_of(view)])
    with memory.resident(40 * PAGE, 4 * PAGE, write=True) as view:
        right = into(view)
        memory.flush()
        # After a write-back too: who is resident is not watched for its first write.
        say([right, into(view)])
    memory.flush()
    with open(path, "rb") as file:
        say(file.read() == bytes(memory.read(0, memory.nbytes)) != before)
"""
    with child(BEGIN + code, str(path)) as process:
        assert process.hear() == [True, True, [True] * 3]
        assert process.hear() == [True, True]
        assert process.hear() is True
        assert process.wait() == 0, process.errors


def test_what_is_resident_stays_under_a_memory_limit(nobody: Callable[..., Child], anybodys: MakeFile) -> None:
    path = anybodys(1024 * PAGE)
    code = """
with hwpoison.Manager(memory_limit=256 * PAGE) as manager:
    memory = manager.open(arguments[0])
    with memory.resident(0, 64 * PAGE) as view:
        with memory.buffer as everything:
            total = sum(everything[::PAGE])
        say(out_of(view))
        try:
            with memory.resident(64 * PAGE, 65 * PAGE):
                pass
        except OSError as error:
            say([error.errno, error.strerror])
    with memory.resident(0, 128 * PAGE) as view:
        say(out_of(view))
"""
    with nobody(BEGIN + code, str(path)) as process:
        assert process.hear() == [True] * 3
        number, why = process.hear()
        assert number == errno.ENOMEM
        assert why == "65 pages cannot be resident: the memory limit leaves 128 for that, and 64 are in use"
        assert process.hear() == [True] * 3
        assert process.wait() == 0, process.errors


def test_what_is_resident_is_so_after_the_managers_death(nobody: Callable[..., Child], anybodys: MakeFile) -> None:
    path = anybodys(64 * PAGE)
    code = """
with hwpoison.Manager() as manager:
    memory = manager.open(arguments[0], "r+")
    with memory.resident(0, 4 * PAGE, write=True) as view:
        before = manager.pid
        os.kill(before, signal.SIGKILL)
        memory.lost()
        say([manager.pid != before, into(view), out_of(view)])
    memory.flush()
"""
    with nobody("import signal\n" + BEGIN + code, str(path)) as process:
        assert process.hear() == [True, True, [True] * 3]
        assert process.wait() == 0, process.errors
    assert path.read_bytes()[:PAGE] == b"x" * PAGE


def test_bytes_that_are_lost_can_not_be_made_resident(manager: hwpoison.Manager) -> None:
    memory = manager.allocate(8 * PAGE, "table")
    memory.write(0, b"x" * 8 * PAGE)
    manager.inject(memory, 3 * PAGE)
    with pytest.raises(hwpoison.PoisonError) as caught, memory.resident(0, 8 * PAGE):
        pass
    assert [tuple(one) for one in caught.value.ranges] == [("table", 3 * PAGE, PAGE)]
    with memory.resident(4 * PAGE) as view:
        assert bytes(view) == b"x" * 4 * PAGE


def test_what_fails_while_it_is_resident_is_refused_by_name(manager: hwpoison.Manager, file: MakeFile) -> None:
    memory = manager.open(file(8 * PAGE))
    with memory.resident() as view:
        # A clean page of a file comes back.
        manager.inject(memory, 3 * PAGE)
        read, write = os.pipe()
        assert os.write(write, view[3 * PAGE : 4 * PAGE]) == PAGE
        assert os.read(read, PAGE) == known(8 * PAGE)[3 * PAGE : 4 * PAGE]
        os.close(read)
        os.close(write)


def test_misuse_is_one_clear_line(manager: hwpoison.Manager, file: MakeFile) -> None:
    memory = manager.open(file(8 * PAGE))
    with pytest.raises(PermissionError, match="is read-only; open it with mode 'r\\+'"), memory.resident(write=True):
        pass
    with pytest.raises(ValueError, match="are not within"), memory.resident(0, 9 * PAGE):
        pass
    with pytest.raises(TypeError, match="write is True or False"), memory.resident(0, PAGE, write=1):  # type: ignore[arg-type]
        pass
    with memory.resident(0, PAGE) as view, pytest.raises(TypeError):
        view[0] = 1
