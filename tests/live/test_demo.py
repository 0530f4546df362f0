"""`hwpoison demo` as people and programs run it, and whether it would find out a manager that does wrong."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hwpoison.core.failure import TABLE
from hwpoison.linux.syscalls import PAGE_SIZE
from tests import without_userfaultfd
from tests.support import SECONDS_MAX, need, wait_until

pytestmark = pytest.mark.live

COMMAND = [sys.executable, "-m", "hwpoison", "demo"]
UNPRIVILEGED = [sys.executable, str(Path(without_userfaultfd.__file__))]
EXPECTED = [
    # scenario, state, outcome, content
    ("free page", "free page", "Recovered", "intact"),
    ("clean file page, mapped", "clean file page", "Recovered", "intact"),
    ("clean file page, not mapped", "clean file page", "Recovered", "intact"),
    ("dirty file page", "dirty file page", "Recovered", "lost as declared"),
    ("anonymous page", "anonymous page", "Recovered", "lost as declared"),
    ("page being read in", "clean file page", "Recovered", "intact"),
    ("page being written back", "clean file page", "Recovered", "intact"),
    ("already poisoned page", "already poisoned page", "Failed", "lost as declared"),
    ("truncated page", "truncated page", "Ignored", "intact"),
    ("reserved page", "reserved page", "Ignored", "intact"),
    ("unknown page", "unknown page", "Ignored", "intact"),
]


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a demo writes whatever it writes, which has to be gone afterwards; and so have its processes.

    Everybody may write there: pytest's own folders are for their user alone.
    """
    folder = Path(tempfile.mkdtemp(prefix="hwpoison-test-"))
    temporary = folder / "temporary"
    for one in (folder, temporary):
        one.mkdir(exist_ok=True)
        one.chmod(0o777)
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("HWPOISON_LOG", str(folder / "events.db"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    try:
        yield folder
        wait_until(lambda: not processes_of(folder), "all that the demo started has ended")
        assert os.listdir(temporary) == []
    finally:
        shutil.rmtree(folder)


def processes_of(folder: Path) -> list[str]:
    """Command lines of the processes that have this folder's event log, and live."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"HWPOISON_LOG={folder}/".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
    return found


def demo(*arguments: str, prefix: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [*(prefix or []), *COMMAND, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * SECONDS_MAX, check=False)


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.stdout, done.stderr
    loaded: dict[str, Any] = json.loads(done.stdout)
    assert loaded["version"] == 1
    return loaded


def random_file(path: Path, nbytes: int) -> Path:
    path.write_bytes(os.urandom(nbytes))
    return path


# --- what it shows ---------------------------------------------------------------------------------------------------


def test_every_row_of_the_handlers_table_is_struck_and_ends_as_it_must() -> None:
    done = demo("--json")
    shown = document(done)
    rows = shown["scenarios"]
    assert [(row["scenario"], row["state"], row["outcome"], row["content"]) for row in rows] == EXPECTED
    assert [(row["expected_state"], row["expected_outcome"]) for row in rows] == [one[1:3] for one in EXPECTED]
    assert {row["state"] for row in rows} == {row.state for row in TABLE}
    assert [(row["ok"], row["problems"]) for row in rows] == [(True, [])] * len(rows)
    assert all(row["latency_us"] > 0 for row in rows)
    everybody, nobody = shown["processes"], []
    victims = {row["scenario"]: row["victims"] for row in rows}
    (late,) = victims.pop("already poisoned page")
    assert len(everybody) >= 2
    assert late not in everybody
    losses = ("dirty file page", "anonymous page")
    assert victims == {name: everybody if name in losses else nobody for name in victims}
    assert (done.returncode, shown["ok"], shown["problems"]) == (0, True, [])


def test_an_unprivileged_user_sees_the_same() -> None:
    need(os.geteuid() == 0, "root, to become another user")
    probe = subprocess.run([*UNPRIVILEGED, sys.executable, "-c", "import hwpoison"], capture_output=True, check=False)
    need(probe.returncode == 0, "a checkout and an interpreter that another user can use")
    shown = document(demo("--json", prefix=UNPRIVILEGED))
    assert [row["content"] for row in shown["scenarios"] if row["ok"]] == [one[3] for one in EXPECTED]


@pytest.mark.parametrize(
    ("nbytes", "used"),
    [(16 * PAGE_SIZE, 16 * PAGE_SIZE), (20 * PAGE_SIZE + 1, 20 * PAGE_SIZE + 1), ((8 << 20) + 1, 8 << 20)],
    ids=["the smallest that will do", "no whole number of pages", "larger than is used"],
)
def test_a_given_file_is_used_and_left_as_it_is(folder: Path, nbytes: int, used: int) -> None:
    path = random_file(folder / "given", nbytes)
    before = path.read_bytes(), path.stat().st_mtime_ns
    done = demo("--file", str(path), "--json")
    file = document(done)["file"]
    assert (done.returncode, file["path"], file["nbytes"]) == (0, str(path), used)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_without_a_terminal_the_table_is_plain_text_and_the_managers_lines_go_to_standard_error() -> None:
    done = demo()
    assert done.returncode == 0
    assert [
        line[:27].rstrip() for line in done.stdout.splitlines() if re.match(r"\S.*(Recovered|Failed|Ignored)", line)
    ] == [one[0] for one in EXPECTED]
    assert "\x1b" not in done.stdout
    assert f"All {len(EXPECTED)} as they should be" in done.stdout
    assert "Recovered: the bad frame is isolated; the data is back, or its loss was told." in done.stdout
    assert {line.partition(":")[0] for line in done.stderr.splitlines()} == {"Memory failure"}


def test_the_command_that_it_names_at_the_end_works_from_where_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    script = os.path.relpath(Path(sys.executable).parent / "hwpoison")
    need(os.access(script, os.X_OK), "the command hwpoison beside the interpreter")
    for command in ([script, "demo"], COMMAND):
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * SECONDS_MAX, check=True)
        said = re.search(r"^(\d+) failures are in the event log \((.*)\):\s(.*)", done.stdout, re.MULTILINE | re.DOTALL)
        assert said is not None, done.stdout
        assert int(said[1]) > len(EXPECTED)
        assert said[2].startswith("one was needed to prepare another")
        arguments = said[3].split()
        assert arguments[-1] == "log"
        assert (script in arguments) == (command != COMMAND)
        logged = subprocess.run([*arguments, "--json"], capture_output=True, text=True, timeout=SECONDS_MAX, check=True)
        assert logged.stdout.count('"kind":"report"') >= int(said[1])


@pytest.mark.parametrize("colours", [True, False])
def test_in_a_terminal_the_managers_lines_come_after_the_table(monkeypatch: pytest.MonkeyPatch, colours: bool) -> None:
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    ours, theirs = pty.openpty()
    with subprocess.Popen(COMMAND, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True) as process:
        os.close(theirs)
        shown = b""
        # EIO: the last process has closed the terminal.
        while more := read_terminal(ours):
            shown += more
        os.close(ours)
    text = shown.decode()
    assert process.returncode == 0, text
    assert text.rindex("as they should be") < text.index("Memory failure:")
    assert bool(re.search(r"\x1b\[[0-9;]*3\d", text)) == colours


def read_terminal(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 16)
    except OSError:
        return b""


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["missing", "a directory", "a FIFO", "too small", "unreadable"])
def test_a_file_that_cannot_be_used_is_one_line_and_status_2(folder: Path, kind: str) -> None:
    path = folder / "given"
    prefix: list[str] = []
    if kind == "a directory":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "too small":
        random_file(path, 16 * PAGE_SIZE - 1)
    elif kind == "unreadable":
        random_file(path, 16 * PAGE_SIZE).chmod(0)
        if os.geteuid() == 0:
            prefix = UNPRIVILEGED
    done = demo("--file", str(path), prefix=prefix)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done
    assert str(path) in done.stderr or kind == "unreadable"


# --- what it finds ---------------------------------------------------------------------------------------------------

LOST, INTACT, WRONG = "lost as declared", "intact", "WRONG"
WRONG_MANAGERS = {
    "loses content and says nothing": (
        "failure.lose = lambda manager, object_, page, loss: ()",
        {"dirty file page": WRONG, "anonymous page": WRONG, "already poisoned page": WRONG},
    ),
    "brings back a wrong byte": (
        """
        right = failure.read_in
        async def wrong(manager, object_, first, count):
            await right(manager, object_, first, count)
            os.pwrite(object_.store.fd, b"wrong", first * 4096 + 100)
        failure.read_in = wrong
        """,
        {"clean file page, mapped": WRONG, "clean file page, not mapped": WRONG, "page being read in": WRONG},
    ),
    "tells nobody": (
        "server.Server.notice = lambda self, client, notice: None",
        {"dirty file page": LOST, "anonymous page": LOST},
    ),
    "gives bad frames back to the system": (
        """
        from hwpoison.linux.quarantine import Quarantine
        Quarantine.hold = lambda self, number: os.read(self.transit[0], 4096)
        failure._quarantine = lambda handling, object_, frame: (frame.quarantine(), Outcome.RECOVERED)[1]
        """,
        {"clean file page, mapped": INTACT, "dirty file page": LOST, "anonymous page": LOST},
    ),
}


@pytest.mark.parametrize("wrong", WRONG_MANAGERS)
def test_a_manager_that_does_wrong_is_found_out(wrong: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defect, found = WRONG_MANAGERS[wrong]
    # Every Python runs this first; only the manager becomes a wrong one.
    start = "import os, sys\nif 'hwpoison.service.daemon' in sys.orig_argv:\n"
    imports = (
        "from hwpoison.core import failure\nfrom hwpoison.core.records import Outcome\nfrom hwpoison.service import server\n"
    )
    (folder / "sitecustomize.py").write_text(start + textwrap.indent(imports + textwrap.dedent(defect), "    "))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    done = demo("--json")
    assert done.returncode == 1, done.stdout
    shown = document(done)
    not_as_it_should_be = {row["scenario"]: row["content"] for row in shown["scenarios"] if not row["ok"]}
    assert not shown["ok"]
    assert found.items() <= not_as_it_should_be.items()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_demo_and_all_that_it_started(number: signal.Signals, status: int) -> None:
    with subprocess.Popen(
        COMMAND, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("anonymous page"):
                break
        # As a terminal does it: to the whole group.
        os.killpg(process.pid, number)
        process.stdout.read()
        assert process.wait(SECONDS_MAX) == status


def test_a_reader_that_has_seen_enough_ends_the_demo_with_no_complaint() -> None:
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert {line.partition(":")[0] for line in process.stderr} <= {"Memory failure"}
        assert process.wait(SECONDS_MAX) == 0
