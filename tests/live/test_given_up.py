"""Where no manager can take over any more: who maps memory is ended, and nobody hangs."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

import hwpoison
from hwpoison.linux.syscalls import PAGE_SIZE
from tests.live.process import (
    Child,
    asleep_in_a_fault,
    kill,
    kill_service,
    manager_of,
    open_of,
    page,
    serving,
    stop,
)
from tests.live.slow_files import SlowFile
from tests.support import SECONDS_MAX, wait_until

pytestmark = pytest.mark.live

PAGE = PAGE_SIZE

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
