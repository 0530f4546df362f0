"""A manager that is out of file descriptors, objects larger than any memory, and clients that leave without a word."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

import hwpoison
from hwpoison import Outcome, protocol
from hwpoison.linux.syscalls import PAGE_SIZE
from tests.live.conftest import known
from tests.live.process import Child, state_of
from tests.support import wait_until

pytestmark = pytest.mark.live

MakeFile = Callable[..., Path]
Short = Callable[[], AbstractContextManager[None]]

TIB = 1 << 40
ADVICE = ("no file descriptors left", "`ulimit -n`", "LimitNOFILE=")


# --- no descriptor left ----------------------------------------------------------------------------------------------


def descriptors(pid: int) -> set[int]:
    return {int(name) for name in os.listdir(f"/proc/{pid}/fd")}


@contextmanager
def limited(pid: int, most: int) -> Iterator[None]:
    """The process may have no descriptor from number `most` on, except those that it has."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@pytest.fixture(params=["those that are reserved are left", "none is left"])
def short(request: pytest.FixtureRequest, manager: hwpoison.Manager) -> Short:
    """Takes the manager's descriptors away, in two degrees."""
    left = 4 if request.param.startswith("those") else 0

    def short() -> AbstractContextManager[None]:
        used = descriptors(manager.pid)
        return limited(manager.pid, next(number for number in itertools.count() if number not in used) + left)

    return short


ATTACHED = """
manager = hwpoison.connect(arguments[0])
table, cached = manager.attach("table"), manager.open(arguments[1], "r+")
cached.buffer[0] = 1
with hwpoison.guard(table):
    pass
say()
hear()
table.buffer[5 * 4096] = cached.buffer[40 * 4096] = 7
say([bytes(table.buffer[:4]).decode(), table.buffer[4 * 4096], table.buffer[5 * 4096]])
say(bytes(cached.buffer[20 * 4096 : 20 * 4096 + 16]).hex())
hear()
try:
    with hwpoison.guard(table) as safe:
        bytes(safe.buffer[:4])
except hwpoison.PoisonError as error:
    say([error.offset, error.nbytes])
hear()
cached.flush()
say(bytes(table.buffer[:4]).decode())
"""


def test_who_is_attached_is_served_on_when_the_manager_has_no_descriptors_left(
    manager: hwpoison.Manager, short: Short, file: MakeFile
) -> None:
    """First touches, first writes, failures, losses, guards, repair, write-back."""
    path = file(64 * PAGE_SIZE)
    table = manager.allocate(16 * PAGE_SIZE, name="table")
    table.write(0, b"data" * (2 * PAGE_SIZE // 4))
    # The frames of failures go into a pipe, which is there from the first one on.
    manager.inject(table, PAGE_SIZE)
    with Child(ATTACHED, manager.socket, str(path)) as child:
        child.hear()
        with short():
            assert child.ask() == ["data", 0, 7]
            assert child.hear() == known(64 * PAGE_SIZE)[20 * PAGE_SIZE : 20 * PAGE_SIZE + 16].hex()
            failure = manager.inject(table, 0)
            assert (failure.outcome, set(failure.victims)) == (Outcome.RECOVERED, {os.getpid(), child.pid})
            assert child.ask() == [0, PAGE_SIZE]
            table.repair(0, b"good" * (PAGE_SIZE // 4))
            assert child.ask() == "good"
        assert child.wait() == 0
    assert path.read_bytes()[40 * PAGE_SIZE] == 7


def test_who_wants_more_when_the_manager_has_no_descriptors_left_is_told_what_to_do(
    manager: hwpoison.Manager, short: Short, file: MakeFile
) -> None:
    path = file(PAGE_SIZE)
    table = manager.allocate(PAGE_SIZE, name="table")
    wishes: list[Callable[[], object]] = [
        lambda: hwpoison.connect(manager.socket),
        lambda: hwpoison.connect(manager.socket, maps=False),
        lambda: manager.allocate(PAGE_SIZE, name="more"),
        lambda: manager.open(path),
        lambda: table.on_failure(print),
    ]
    with short():
        for wish in wishes * 3:
            with pytest.raises(OSError) as refused:
                wish()
            assert refused.value.errno == errno.EMFILE
            assert all(word in str(refused.value) for word in (*ADVICE, str(manager.pid)))
        command = [sys.executable, "-m", "hwpoison", "status", "--socket", manager.socket]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        assert told.returncode
        assert told.stderr.count("\n") == 1
        assert all(word in told.stderr for word in ADVICE)
    # With the limit raised nothing is missing, and nothing was left behind.
    assert [one.name for one in manager.objects()] == ["table"]
    manager.allocate(PAGE_SIZE, name="more")
    hwpoison.connect(manager.socket).close()


OUT_OF_DESCRIPTORS = """
import resource
manager = hwpoison.connect(arguments[0])
manager.allocate(4096, name="first")
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
try:
    manager.allocate(4096, name="table")
except OSError as error:
    say([error.errno, str(error)])
resource.setrlimit(resource.RLIMIT_NOFILE, limits)
manager.allocate(4096, name="table").write(0, b"data")
say()
"""


def test_a_client_that_has_no_descriptors_left_gets_no_memory_and_leaves_nothing_behind(manager: hwpoison.Manager) -> None:
    with Child(OUT_OF_DESCRIPTORS, manager.socket) as child:
        code, text = child.hear()
        assert code == errno.EMFILE
        assert f"process {child.pid} has no file descriptors left" in text
        child.hear()
        assert child.wait() == 0


def test_connections_that_cannot_even_be_refused_are_served_when_that_is_over(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Until then the manager does not try without a pause."""
    with hwpoison.Manager() as manager, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
        with limited(manager.pid, 3):
            channel.connect(protocol.address_of(manager.socket))
            protocol.send(channel, protocol.Hello())
            assert [manager.objects() for _ in range(50)] == [[]] * 50
            assert 1 <= capfd.readouterr().err.count("nobody can connect for") < 25
        reply, _ = protocol.receive_reply(channel)
        assert isinstance(reply, protocol.Welcome)


def listens(address: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
        return not channel.connect_ex(address)


def test_a_manager_takes_all_descriptors_that_it_is_allowed(tmp_path: Path) -> None:
    address = str(tmp_path / "manager.sock")
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 512)); "
    script += "from hwpoison.service.daemon import serve; serve(sys.argv[1])"
    with subprocess.Popen([sys.executable, "-c", script, address], stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: listens(address), "the manager serves")
            with hwpoison.connect(address, maps=False) as manager:
                assert resource.prlimit(manager.pid, resource.RLIMIT_NOFILE) == (512, 512)
        finally:
            process.terminate()


# --- very large objects ----------------------------------------------------------------------------------------------


def memory_most(pid: int) -> int:
    """Most bytes of memory that the process has had at a time."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def test_objects_of_a_tebibyte_cost_the_manager_what_is_used_of_them(manager: hwpoison.Manager, tmp_path: Path) -> None:
    """Whatever is asked of them: nothing is done for each page, which would hold up everybody else."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(TIB)
    manager.allocate(PAGE_SIZE).close()
    before = memory_most(manager.pid)
    memory, cached = manager.allocate(TIB, name="large"), manager.open(path)
    memory.buffer[TIB // 2] = 7
    assert (memory.buffer[TIB // 2], cached.buffer[TIB - 1]) == (7, 0)
    assert manager.inject(memory, TIB // 2).outcome is Outcome.RECOVERED
    assert memory.lost() == [("large", TIB // 2, PAGE_SIZE)]
    assert [(one.present, one.lost) for one in manager.objects() if one.name == "large"] == [(0, PAGE_SIZE)]
    assert memory.discard(0, TIB) == PAGE_SIZE
    memory.close()
    cached.close()
    assert manager.objects() == []
    assert memory_most(manager.pid) - before < 16 << 20


@pytest.mark.parametrize("nbytes", [1 << 47, 1 << 57, (1 << 63) - 1, (1 << 64) - 1])
def test_more_memory_than_addresses_is_refused_with_their_number(manager: hwpoison.Manager, nbytes: int) -> None:
    with pytest.raises(MemoryError, match=f"no object of {nbytes} bytes.* a process has [0-9]+ bytes of addresses"):
        manager.allocate(nbytes, name="huge")
    manager.allocate(PAGE_SIZE, name="huge")


# --- leaving without a word ------------------------------------------------------------------------------------------

OWNER = """
import stat, subprocess
manager = hwpoison.connect(arguments[0])
table = manager.allocate(64 * 4096, name="table")
shared = manager.attach("shared")
table.buffer[0] = 1
say(bytes(shared.buffer[:4]).decode())

def lose_sockets():
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.close(int(name))
        except OSError:
            pass

def another_program():
    os.execv(sys.executable, [sys.executable, "-c", "import sys; sys.stdin.readline()"])
"""


def owners(manager: hwpoison.Manager) -> dict[str, list[int]]:
    return {one.name: one.pids for one in manager.objects()}


@pytest.fixture
def shared(manager: hwpoison.Manager) -> hwpoison.Memory:
    memory = manager.allocate(PAGE_SIZE, name="shared")
    memory.write(0, b"data")
    return memory


def test_a_client_that_executes_another_program_owns_nothing_any_more(
    manager: hwpoison.Manager, shared: hwpoison.Memory
) -> None:
    with Child(OWNER + "hear(); another_program()", manager.socket) as child:
        assert child.hear() == "data"
        assert owners(manager) == {"table": [child.pid], "shared": sorted((os.getpid(), child.pid))}
        child.tell()
        wait_until(lambda: owners(manager) == {"shared": [os.getpid()]}, "the manager sees that the owner is gone")
        assert state_of(child.pid) != "Z"
        assert manager.inject(shared, 0).victims == (os.getpid(),)
        child.tell()
        assert child.wait() == 0


LOSES_ITS_SOCKETS = """
hear()
lose_sockets()
for page in range(1, 32):
    table.buffer[page * 4096] = page
    say([table.buffer[page * 4096], table.buffer[(page + 32) * 4096]])
    hear()
another_program()
"""


def test_a_client_that_has_lost_its_connections_is_served_until_its_memory_is_gone(
    manager: hwpoison.Manager, shared: hwpoison.Memory
) -> None:
    with Child(OWNER + LOSES_ITS_SOCKETS, manager.socket) as child:
        assert child.hear() == "data"
        before = len(descriptors(manager.pid))
        child.tell()
        for page in range(1, 32):
            assert child.hear() == [page, 0]
            wait_until(lambda: len(descriptors(manager.pid)) < before, "the manager closes its ends of the connections")
            assert owners(manager)["table"] == [child.pid]
            if page < 31:
                child.tell()
        assert set(manager.inject(shared, 0).victims) == {os.getpid(), child.pid}
        child.tell()
        wait_until(lambda: owners(manager) == {"shared": [os.getpid()]}, "the manager sees that the owner is gone")
        child.tell()
        assert child.wait() == 0


HAS_CHILDREN = """
hear()
def forked():
    if not (pid := os.fork()):
        os.execv(sys.executable, [sys.executable, "-c", ""])
    return os.waitpid(pid, 0)[1]
statuses = [
    subprocess.run([sys.executable, "-c", ""]).returncode,
    os.waitpid(os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ), 0)[1],
    forked(),
]
table.buffer[4096] = 2
say([statuses, manager.objects()[0].name, table.buffer[0], table.buffer[4096]])
hear()
"""


def test_a_client_whose_children_execute_other_programs_stays_the_owner(
    manager: hwpoison.Manager, shared: hwpoison.Memory
) -> None:
    with Child(OWNER + HAS_CHILDREN, manager.socket) as child:
        assert child.hear() == shared.read(0, 4).decode()
        assert child.ask() == [[0, 0, 0], "shared", 1, 2]
        assert owners(manager)["table"] == [child.pid]
        child.tell()
        assert child.wait() == 0
