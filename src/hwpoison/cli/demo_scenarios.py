"""What `hwpoison demo` does to its clients: one function for each state of a page, and what must come of it.

A row of `core.failure.TABLE` without a scenario here is a gap.
"""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hwpoison.cli.demo_clients import ClientError, ask_all
from hwpoison.cli.demo_stage import Trial
from hwpoison.core.records import Outcome, State
from hwpoison.linux.syscalls import PAGE_SIZE

STRUCK = {"file": 9, "dirty": 12, "anonymous": 7, "again": 15, "unread": 3, "idle": 11}
"""Which page each scenario strikes. All are within the smallest file that the demo takes."""
READ_IN_PAGES = (1, 6, 11)
"""Tried one after the other: a strike may come before the page is on its way."""
WRITTEN_BACK_PAGE = 14
ATTEMPTS_MAX = 100
"""How often a strike is tried that must meet a write in flight: it may come after it."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is struck, what must come of it, and what it means to a reader who has never seen one."""

    name: str
    state: State
    outcome: Outcome
    play: Callable[[Trial], None]
    meaning: str


def free_page(trial: Trial) -> None:
    """A page that is absent: of a file that nobody has read."""
    trial.stage.open_everywhere("unread")
    trial.strike("unread", STRUCK["unread"])
    trial.compare()
    trial.stage.leave_everywhere("unread")


def clean_file_page_mapped(trial: Trial) -> None:
    """A page of a file that all clients are reading."""
    trial.compare()  # every client has read all of it, and goes on reading
    trial.strike("file", STRUCK["file"])
    trial.compare()


def clean_file_page_not_mapped(trial: Trial) -> None:
    """A page of a file that is in memory and in nobody's page table."""
    trial.stage.open_everywhere("idle")
    trial.stage.clients[0].ask("prefetch", "idle")
    trial.strike("idle", STRUCK["idle"])
    trial.compare()
    trial.stage.leave_everywhere("idle")


def dirty_file_page(trial: Trial) -> None:
    """A page of a writable file that is newer than the file."""
    stage, page = trial.stage, STRUCK["dirty"]
    owner = stage.owner(page)
    owner.ask("pause")
    owner.ask("write", "copy", page)
    lost = trial.lose("copy", page)
    trial.compare(lost)
    flushed = [(client.ask("flush", "copy"), client.ask("flush", "copy")) for client in stage.clients]
    trial.expect(set(flushed) == {(errno.EIO, 0)}, f"flush() raised {flushed}, and not EIO once for each process")
    trial.compare(lost)  # what the file holds is older than what was lost, and must not be shown
    trial.repair(lost)
    trial.expect(owner.ask("flush", "copy") == 0, "flush() failed after the repair")


def anonymous_page(trial: Trial) -> None:
    """A page that exists in memory only."""
    lost = trial.lose("memory", STRUCK["anonymous"])
    trial.compare(lost)
    trial.repair(lost)


def page_being_read_in(trial: Trial) -> None:
    """The page that a process waits for fails while it is on its way from the file."""
    stage = trial.stage
    reader, reporter = stage.clients[:2]
    stage.open_everywhere("arriving")
    for page in READ_IN_PAGES:
        # The second page of a sequence is read together with those behind it, by a worker, while the manager does
        # other things. It can't have been read when the report is looked at: both wait for the manager to go on.
        reader.ask("touch", "arriving", page - 1)
        stage.ready(reader, reporter)
        with stage.stopped():
            reader.begin("touch", "arriving", page)
            reporter.begin("inject", "arriving", page)
        trial.struck(reporter.answer(), f"arriving+{page * PAGE_SIZE:#x}")
        if reader.answer() != reader.ask("known", "arriving", page):
            trial.wrong(f"process {reader.pid}, which waited for the page, got wrong bytes")
        if trial.failure and trial.failure.state is not State.FREE:
            break
    trial.compare()
    stage.leave_everywhere("arriving")


def page_being_written_back(trial: Trial) -> None:
    """A changed page fails while flush() writes it to the file: it is not lost if that is waited for."""
    stage, page = trial.stage, WRITTEN_BACK_PAGE
    writer = stage.owner(page)
    witness = next(one for one in stage.clients if one is not writer)
    in_flight = False
    for _ in range(ATTEMPTS_MAX):
        # All pages change, so that flush() writes them in one piece; it takes its time, and begins with the first.
        ask_all(stage.clients, "pause")
        ask_all(stage.clients, "write_all", "copy")
        first = stage.owner(0).ask("known", "copy", 0)
        witness.tell("last_unwritten", stage.manager.statistics().written)
        writer.tell("flush", "copy")
        stage.wait_for_copy(first)
        failure = trial.strike("copy", page)
        handled = time.monotonic()
        flushed = writer.answer()
        # The report had come when its handling began, or before. The witness asked after that, and the manager, which
        # counts a write when it has ended, had not counted it.
        in_flight = witness.answer() > handled - failure.latency_us / 1e6
        if in_flight or failure.state is not State.CLEAN_FILE:
            break
    trial.expect(in_flight, f"{ATTEMPTS_MAX} reports all came when the page was in the file already")
    trial.expect(flushed == 0, f"flush() failed: {os.strerror(flushed)}")
    trial.expect_in_copy(page)
    trial.compare()


def already_poisoned_page(trial: Trial) -> None:
    """A page is lost; then a process that came later, and has no guard, touches it."""
    stage, page = trial.stage, STRUCK["again"]
    lost = trial.lose("memory", page)
    address = stage.visitor.ask("borrow", "memory") + page * PAGE_SIZE
    counted = sum(stage.manager.statistics().outcomes.values())
    failure = stage.manager.report(pid=stage.visitor.pid, address=address, action_required=True)
    trial.struck(failure, f"{lost[0].name}+{lost[0].offset:#x}")
    trial.expect((failure.name, failure.offset) == lost[0][:2], f"the report was taken for {failure.name}+{failure.offset}")
    trial.expect(sum(stage.manager.statistics().outcomes.values()) == counted, "the page was counted twice")
    trial.compare(lost)
    trial.victims, trial.told = (stage.visitor.pid,), ()
    stage.visitor.tell("touch", "memory", page)
    try:
        stage.visitor.answer()
    except ClientError:
        ended_by = stage.visitor.ended_by()
        trial.expect(ended_by == "SIGBUS", f"the access to the lost page ended with {ended_by}, and not with SIGBUS")
        trial.told = (stage.visitor.pid,)
    else:
        trial.wrong(f"process {stage.visitor.pid} read something from a lost page")
    trial.repair(lost)


def truncated_page(trial: Trial) -> None:
    """A page of a memory that is closed while the report is on its way."""
    failure, name = trial.stage.clients[-1].ask("fail_while_closing")
    trial.struck(failure, f"{name}+0x0")
    trial.compare()


def reserved_page(trial: Trial) -> None:
    """A page of the manager's own memory."""
    pid = trial.stage.manager.pid
    address = _heap_of(pid)
    trial.struck(trial.stage.manager.report(pid=pid, address=address), f"pid {pid} {address:#x}")
    trial.compare()


def _heap_of(pid: int) -> int:
    """An address in the process's own memory, where that is to be known."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if line.endswith("[heap]"):
                return int(line.partition("-")[0], 16)
    return PAGE_SIZE


def unknown_page(trial: Trial) -> None:
    """An address in a process that is no client: it has ended."""
    nobody = subprocess.Popen(["true"], stdin=subprocess.DEVNULL)
    nobody.wait()
    failure = trial.stage.manager.report(pid=nobody.pid, address=PAGE_SIZE)
    trial.struck(failure, f"pid {nobody.pid} {PAGE_SIZE:#x}")
    trial.compare()


SCENARIOS = (
    Scenario("free page", State.FREE, Outcome.RECOVERED, free_page,
        "nobody had read it yet, so nothing is gone. Its first reader got a good frame."),
    Scenario("clean file page, mapped", State.CLEAN_FILE, Outcome.RECOVERED, clean_file_page_mapped,
        "all processes were reading it. It was read again from the file, and none of them noticed."),
    Scenario("clean file page, not mapped", State.CLEAN_FILE, Outcome.RECOVERED, clean_file_page_not_mapped,
        "it was in memory, but nobody had touched it. It was read again from the file."),
    Scenario("dirty file page", State.DIRTY_FILE, Outcome.RECOVERED, dirty_file_page,
        "it was newer than the file, so it is lost. Nobody got the old bytes, flush() raised EIO; then it was repaired."),
    Scenario("anonymous page", State.ANONYMOUS, Outcome.RECOVERED, anonymous_page,
        "it was the only copy, so it is lost. Nobody got zeros; then the process that wrote it repaired it."),
    Scenario("page being read in", State.CLEAN_FILE, Outcome.RECOVERED, page_being_read_in,
        "a process was waiting for it. So did the handler, and the process got the right bytes."),
    Scenario("page being written back", State.CLEAN_FILE, Outcome.RECOVERED, page_being_written_back,
        "its writer was in flush(). The handler waited until the file had it, so nothing is lost."),
    Scenario("already poisoned page", State.ALREADY_POISONED, Outcome.FAILED, already_poisoned_page,
        "lost before, so there is nothing to recover. A process without a guard touched it: SIGBUS, and no wrong byte."),
    Scenario("truncated page", State.TRUNCATED, Outcome.IGNORED, truncated_page,
        "its memory was closed while the report was on its way. Nobody can reach it any more."),
    Scenario("reserved page", State.RESERVED, Outcome.IGNORED, reserved_page,
        "the manager's own memory, which it can't take away from itself."),
    Scenario("unknown page", State.UNKNOWN, Outcome.IGNORED, unknown_page,
        "a process that has ended and never was a client. Not ours to handle."),
)  # fmt: skip
"""In the order in which they are played."""
