"""A manager of root serves other users that it was told of, whose system calls wait for pages then as its own do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.process import Child, kill_service
from tests.support import SECONDS_MAX, need

pytestmark = pytest.mark.live

NOBODY, ANOTHER = 65534, 65533

CALLS = """
import socket
import tempfile
manager = hwpoison.connect(arguments[0])
memory = manager.allocate(64 * 4096, "table")
view = memory.buffer
with tempfile.TemporaryFile() as file:
    file.write(b"x" * 8192)
    file.seek(0)
    file.readinto(view[:8192])
    one, other = socket.socketpair()
    one.sendall(b"y" * 4096)
    assert other.recv_into(view[16384:20480]) == 4096
    assert os.write(file.fileno(), view[40960:45056]) == 4096
    numpy.save(file, memory.array("u8")[6000:6100])
    file.seek(0)
    memory.array("u1")[100000:150000].tofile(file)
say([bytes(view[:2]).decode(), bytes(view[16384:16386]).decode(), manager.connection.user_mode])
"""


@pytest.fixture
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    need(os.geteuid() == 0, "root")
    need(os.path.exists("/dev/userfaultfd"), "/dev/userfaultfd")
    folder = Path("/tmp") / f"hwpoison-test-{os.getpid()}"
    folder.mkdir(mode=0o755)
    path = folder / "socket"
    command = [sys.executable, "-m", "hwpoison", "serve", "--socket", str(path), "--user", str(NOBODY)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        assert b"serves at" in process.stderr.readline()
        yield str(path)
    finally:
        if process.poll() is None:
            kill_service(process.pid)
        process.wait(SECONDS_MAX)
        assert process.stderr is not None
        process.stderr.close()
        path.unlink(missing_ok=True)
        folder.rmdir()


def test_system_calls_of_a_user_that_is_named_wait_for_pages(served: str) -> None:
    with Child(CALLS, served, user=NOBODY) as child:
        assert child.hear() == ["xx", "yy", False]
        assert child.wait() == 0, child.errors


def test_so_they_do_where_the_system_call_is_forbidden_as_the_manager_passes_what_is_needed(served: str) -> None:
    forbidden = (
        "sys.path.insert(0, arguments[1])\nfrom tests.without_userfaultfd import forbid_userfaultfd\nforbid_userfaultfd()\n"
    )
    with Child(forbidden + CALLS, served, str(Path(__file__).parents[2]), user=NOBODY) as child:
        assert child.hear() == ["xx", "yy", False]
        assert child.wait() == 0, child.errors


def test_who_is_not_named_is_refused(served: str) -> None:
    with Child("hwpoison.connect(arguments[0])\n", served, user=ANOTHER) as child:
        assert child.wait() == 1
        assert f"serves user 0, {NOBODY} and root, not user {ANOTHER}" in child.errors
