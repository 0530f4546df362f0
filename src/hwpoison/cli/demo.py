"""`hwpoison demo`: every kind of failure, struck while real processes work, and every byte compared."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from hwpoison.cli.common import FINE, FOUND, bytes_text, json_option, print_json

if TYPE_CHECKING:
    from hwpoison.cli.demo_scenarios import Scenario
    from hwpoison.cli.demo_stage import Stage, Trial
    from hwpoison.cli.demo_table import DemoTable

CLIENTS = 3
FILE_PAGES_MIN = 16
FILE_BYTES_MAX = 8 << 20
COPY_BYTES = 2 << 20
MEMORY_BYTES = 2 << 20
PREFIX = "hwpoison-demo-"
ON_A_DISK = "/var/tmp"
"""A folder for temporary files that is not in memory, where /tmp is."""
_IOC_GETFLAGS, _IOC_SETFLAGS, _SYNC_FLAG = 0x80086601, 0x40086602, 8  # linux/fs.h


class BrokenError(click.ClickException):
    """The demo could not even begin, or the processes for it are gone."""

    exit_code = FOUND


@click.command
@click.option(
    "--file", "path", metavar="PATH", type=click.Path(path_type=Path),
    help=f"Use the first {FILE_BYTES_MAX >> 20} MiB of this file, read-only. [default: a file made for it]",
)  # fmt: skip
@json_option
def demo(path: Path | None, as_json: bool) -> int:
    """Strike memory while processes work on it, in every way there is, and show what comes of it.

    Starts a manager and several processes that read and write a file's pages and anonymous memory, and compare every byte
    with what it must be. One page of each kind fails. The exit status is 1 if anything is not as it should be.

    \b
    Example:
      hwpoison demo --file /usr/bin/python3
    """
    from hwpoison.cli.demo_clients import ClientError
    from hwpoison.cli.demo_table import DemoTable

    for number in (signal.SIGTERM, signal.SIGHUP):
        # What was started is ended, and what was written is removed, also then.
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    started = time.monotonic()
    table = None if as_json else DemoTable()
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        directory = Path(name)
        path = path or _written(directory)
        nbytes = _checked(path)
        with _manager_lines_last(directory / "manager-lines") if table and table.shares_terminal else ExitStack():
            try:
                document = _demonstrated(path, nbytes, directory, table)
            except BrokenPipeError:
                raise  # nobody reads the table any more
            except (ClientError, ConnectionError) as error:
                raise BrokenError(f"the demo broke off: {error}") from error
            document["seconds"] = round(time.monotonic() - started, 3)
            if table:
                table.end(document)
    if as_json:
        print_json(document)
    return FINE if document["ok"] else FOUND


def _demonstrated(path: Path, nbytes: int, directory: Path, table: DemoTable | None) -> dict[str, Any]:
    """Everything that happened, as the JSON document has it."""
    before = _identity(path)
    with _stage(path, nbytes, directory) as stage:
        if table:
            table.begin(stage, before.sha256, MEMORY_BYTES)
        rows, problems = _play(stage, table)
    if _identity(path) != before:
        problems.append(f"{path} was changed")
    return {
        "ok": not problems and all(row["ok"] for row in rows),
        "scenarios": rows,
        "problems": problems,
        "file": {"path": str(path), "nbytes": nbytes, "sha256": before.sha256},
        "processes": list(stage.pids),
        "manager": stage.manager.pid,
        "failures": stage.strikes,
        "compared": stage.compared,
        "quarantined": stage.quarantined,
    }


# --- the file ----------------------------------------------------------------------------------------------------------


def _written(directory: Path) -> Path:
    """A file of our own, full of noise."""
    import numpy

    path = directory / "file"
    numpy.random.default_rng().integers(0, 256, FILE_BYTES_MAX, "u1").tofile(path)
    return path


def _checked(path: Path) -> int:
    """How much of the file is used. Raises OSError or ValueError if it can't be."""
    from hwpoison.linux.files import checked_file
    from hwpoison.linux.syscalls import PAGE_SIZE

    # A FIFO must not hold us up before it can be refused.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        checked_file(fd, str(path))
        found = os.fstat(fd).st_size
    finally:
        os.close(fd)
    needed = FILE_PAGES_MIN * PAGE_SIZE
    if found < needed:
        raise ValueError(f"{path} has {bytes_text(found)} and the demo needs at least {needed}: choose a larger file")
    return min(found, FILE_BYTES_MAX)


@contextmanager
def _copy(path: Path, nbytes: int, directory: Path) -> Iterator[Path]:
    """A writable file that begins as `path` does, on a disk if possible.

    A write to it shall take as long as the disk, which leaves time to strike a page that is being written back. In
    memory (tmpfs) there is less of it, and the strike needs more attempts.
    """
    import numpy

    content = numpy.resize(numpy.fromfile(path, "u1", min(nbytes, COPY_BYTES)), COPY_BYTES)
    with ExitStack() as stack:
        folders = [directory]
        with suppress(OSError):
            folders += [Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX, dir=ON_A_DISK)))]
        for folder in folders:
            content.tofile(folder / "copy")
            if _write_through(folder / "copy"):
                break
        else:
            folder = directory
        yield folder / "copy"


def _write_through(path: Path) -> bool:
    """Let each write to the file wait for the disk; False if its file system has no such thing."""
    with path.open("rb") as file:
        try:
            (flags,) = struct.unpack("l", fcntl.ioctl(file, _IOC_GETFLAGS, struct.pack("l", 0)))
            fcntl.ioctl(file, _IOC_SETFLAGS, struct.pack("l", flags | _SYNC_FLAG))
        except OSError:
            return False
    return True


class Identity(NamedTuple):
    """What must be the same of a file afterwards."""

    sha256: str
    nbytes: int
    mtime_ns: int


def _identity(path: Path) -> Identity:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        found = os.fstat(file.fileno())
    return Identity(sha256, found.st_size, found.st_mtime_ns)


# --- the processes -----------------------------------------------------------------------------------------------------


@contextmanager
def _stage(path: Path, nbytes: int, directory: Path) -> Iterator[Stage]:
    """The manager and its clients, who have the file, a writable copy of its beginning, and anonymous memory."""
    import hwpoison
    from hwpoison.cli.demo_clients import Client, ask_all
    from hwpoison.cli.demo_stage import Stage

    with ExitStack() as stack:
        copy = stack.enter_context(_copy(path, nbytes, directory))
        manager = stack.enter_context(hwpoison.Manager())
        clients = [Client(manager.socket, index, CLIENTS) for index in range(CLIENTS + 1)]
        for client in clients:
            stack.callback(client.close)
        for client in clients:
            stack.callback(client.dismiss)
        *clients, visitor = clients
        stage = Stage(manager=manager, clients=clients, visitor=visitor, file=path, copy=copy, nbytes=nbytes)
        stage.open_everywhere("file")
        clients[0].ask("open", "copy", str(copy), "r+", copy.stat().st_size)
        clients[0].ask("allocate", "memory", MEMORY_BYTES)
        for name, origin in (("copy", str(copy)), ("memory", None)):
            for client in clients[1:]:
                client.ask("attach", name, origin)
        ask_all(clients, "go")
        yield stage


def _play(stage: Stage, table: DemoTable | None) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of all scenarios, or of those up to one that breaks the stage, and what is wrong beside them."""
    from hwpoison.cli.demo_scenarios import SCENARIOS
    from hwpoison.cli.demo_stage import Trial

    rows: list[dict[str, Any]] = []
    for scenario in SCENARIOS:
        trial = Trial(stage)
        broken = False
        try:
            scenario.play(trial)
            trial.count_frames()
        except Exception as error:  # noqa: BLE001
            # Whatever it is, it should not be: it is shown, and the exit status says it.
            broken = True
            trial.wrong(f"{type(error).__name__}: {error}")
        row = _row(scenario, trial)
        rows.append(row)
        if table:
            table.row(scenario, row, stage)
        if broken:
            left = len(SCENARIOS) - len(rows)
            return rows, [f"{left} more were not tried"] if left else []
    return rows, _wrong_notices(stage)


def _row(scenario: Scenario, trial: Trial) -> dict[str, Any]:
    from hwpoison.cli.demo_stage import processes

    failure = trial.failure
    state, outcome = (failure.state.value, failure.outcome.value) if failure else ("", "")
    victims = failure.victims if failure else ()
    trial.expect(state == scenario.state, f"the state is {state!r} and not {scenario.state.value!r}")
    trial.expect(outcome == scenario.outcome, f"the outcome is {outcome!r} and not {scenario.outcome.value!r}")
    who = processes(trial.victims)
    trial.expect(victims == trial.victims, f"the manager says that it hit {processes(victims)}, and not {who}")
    trial.expect(trial.told == trial.victims, f"told was {processes(trial.told)}, and not {who}")
    return {
        "scenario": scenario.name,
        "state": state,
        "outcome": outcome,
        "expected_state": scenario.state.value,
        "expected_outcome": scenario.outcome.value,
        "victims": list(victims),
        "latency_us": round(failure.latency_us, 1) if failure else 0.0,
        "content": trial.content,
        "ok": not trial.problems,
        "where": trial.where,
        "told": list(trial.told),
        "event_id": failure.event_id if failure else "",
        "problems": trial.problems,
    }


def _wrong_notices(stage: Stage) -> list[str]:
    """Nobody may have been told of anything else than the losses, or twice."""
    return [
        f"process {client.pid} was told of {notices}, and not of {stage.losses}"
        for client in stage.clients
        if (notices := client.ask("notices")) != stage.losses
    ]


@contextmanager
def _manager_lines_last(path: Path) -> Iterator[None]:
    """What the manager writes to standard error comes after the table: both are the same terminal.

    It is kept in a file meanwhile, which takes any amount without anybody having to read it.
    """
    terminal = os.dup(2)
    try:
        with path.open("w+b") as kept:
            os.dup2(kept.fileno(), 2)
            try:
                yield
            finally:
                sys.stderr.flush()
                os.dup2(terminal, 2)
                kept.seek(0)
                with suppress(OSError):
                    os.write(2, kept.read())
    finally:
        os.close(terminal)
