"""The same package for root, for everybody, and where userfaultfd is forbidden."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import without_userfaultfd
from tests.live.process import Child
from tests.support import SECONDS_MAX, need, wait_until

pytestmark = pytest.mark.live

LAUNCHER = Path(without_userfaultfd.__file__)
MAIN_JOB = Path(__file__).with_name("main_job.py")
PREFIXES = {
    "root": [],
    "unprivileged": [sys.executable, str(LAUNCHER)],
    "without userfaultfd": [sys.executable, str(LAUNCHER), "--forbidden"],
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that everybody may write to: pytest's own are for their user alone."""
    folder = Path(tempfile.mkdtemp(prefix="hwpoison-test-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def start(privilege: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Python with `arguments` as that user, with an event log of its own."""
    need(privilege != "root" or os.geteuid() == 0, "root")
    command = [*PREFIXES[privilege], sys.executable, "-W", "error"]
    environment = {**os.environ, "HWPOISON_LOG": str(folder / "events.db"), "PYTHONDONTWRITEBYTECODE": "1"}
    importing = [*command, "-c", "import hwpoison"]
    probe = subprocess.run(importing, check=False, capture_output=True, text=True, timeout=SECONDS_MAX)
    need(probe.returncode == 0, f"a checkout and an interpreter that {privilege} can use: {probe.stderr[-200:]}")
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *arguments], env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def run(privilege: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    with start(privilege, folder, *arguments) as process:
        try:
            output, errors = process.communicate(timeout=SECONDS_MAX)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def processes_of(folder: Path) -> list[str]:
    """Command lines of the processes that were started with this folder's event log, and live."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"HWPOISON_LOG={folder}/".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
    return found


@pytest.mark.parametrize("privilege", ["root", "unprivileged"])
def test_the_main_job_works_with_any_privilege(privilege: str, folder: Path) -> None:
    done = run(privilege, folder, str(MAIN_JOB), str(folder))
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    unprivileged = privilege == "unprivileged"
    system_call = "EFAULT" if unprivileged else "nothing"
    assert seen == {
        "user mode": unprivileged,
        "anonymous": {
            "failures": [["anonymous page", "Recovered", True]] * 3,
            "told of what failed": True,
            "a guard over lost pages": "PoisonError 1",
            "lost": [[1, 3]],
            "read of a lost page": "PoisonError 2",
            "write to a part of a lost page": "PoisonError 2",
            "repaired": 4096,
            "discarded": 4096,
            "content afterwards": "ar\0waaaaaaaaaaaa",
            "a guard over whole pages": "nothing",
        },
        "read-only file": {
            "failure": ["clean file page", "Recovered", []],
            "content afterwards": "ABCDEFGHIJKLMNOP",
            "read of absent and present pages": True,
        },
        "writable file": {
            "file after a flush": "swoooooooooooooo",
            "failures": [["clean file page", "Recovered"], ["dirty file page", "Recovered"]],
            "flush after a loss": "EIO",
            "second flush after a loss": "nothing",
            "read of the lost page": "PoisonError 1",
            "discarded": 4096,
            "content afterwards": "swoooooooooooooo",
        },
        # In user mode the kernel can't ask the manager inside a system call, so it refuses; it invents nothing.
        "system calls": {
            "write(2) from an absent page": system_call,
            "read(2) into an absent page": system_call,
            "content afterwards": "f",
        },
        "reports in the event log": 6,
    }
    wait_until(lambda: not processes_of(folder), "the manager and its keeper end with their client")


MANAGER = """
import hwpoison
try:
    hwpoison.Manager()
except hwpoison.UnsupportedError as error:
    print(error)
"""
CONNECT = """
import sys, hwpoison
try:
    hwpoison.connect(sys.argv[1])
except hwpoison.UnsupportedError as error:
    print(error)
with hwpoison.connect(sys.argv[1], maps=False) as manager:
    print([one.name for one in manager.objects()])
"""
SHARED = """
import sys, hwpoison
with hwpoison.Manager() as manager:
    table = manager.allocate(4096, name="table")
    print(manager.socket, flush=True)
    sys.stdin.read()
"""
MESSAGE = (
    "[Errno 1] userfaultfd is forbidden here: a seccomp filter (container runtimes have one) or SELinux must allow "
    "userfaultfd(2), or give this user access to /dev/userfaultfd; see `hwpoison doctor`"
)


def test_without_userfaultfd_a_manager_is_refused_with_one_message_and_leaves_nothing_behind(folder: Path) -> None:
    done = run("without userfaultfd", folder, "-c", MANAGER)
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, [MESSAGE], "")
    assert processes_of(folder) == []


def test_without_userfaultfd_a_process_gets_no_memory_of_a_shared_manager_but_may_ask_it(folder: Path) -> None:
    with start("unprivileged", folder, "-c", SHARED) as manager:
        try:
            assert manager.stdout is not None
            done = run("without userfaultfd", folder, "-c", CONNECT, manager.stdout.readline().strip())
            assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, [MESSAGE, "['table']"], "")
            _, errors = manager.communicate(timeout=SECONDS_MAX)
            assert (manager.returncode, errors) == (0, "")
        finally:
            if manager.poll() is None:
                manager.kill()


def test_an_ordinary_users_system_calls_work_on_pages_that_were_made_ready_as_the_readme_says(
    nobody: Callable[..., Child],
) -> None:
    code = """
open("book", "wb").write(bytes(range(256)) * 64)
manager = hwpoison.Manager()
say(manager.connection.user_mode)
hear()
source, writer = open("book", "rb"), os.pipe()[1]

def tried(call):
    try:
        say(call())
    except OSError as error:
        say(-error.errno)

for memory in (manager.allocate(16384, "t", populate=False), manager.open("book", "r+")):
    reading = lambda: os.write(writer, memory.buffer[:8192])
    writing = lambda: os.preadv(source.fileno(), [memory.buffer[:8192]], 0)
    tried(reading)
    memory.prefetch()
    tried(reading)
    if memory.kind == "file":
        tried(writing)
    for offset in range(0, 8192, 4096):
        memory.buffer[offset] = 1
    tried(writing)
    say(memory.read(0, 8192) == bytes(range(256)) * 32)
manager.close()
"""
    with nobody(code) as child:
        need(child.hear(), "user mode for unprivileged processes: /dev/userfaultfd is open to them")
        child.tell()
        assert [child.hear() for _ in range(4)] == [-errno.EFAULT, 8192, 8192, True], "anonymous memory"
        assert [child.hear() for _ in range(5)] == [-errno.EFAULT, 8192, -errno.EFAULT, 8192, True], "a file opened r+"
        assert child.wait() == 0
