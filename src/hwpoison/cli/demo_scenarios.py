"""What `hwpoison demo` does to its clients: one function for each state of a page, and what must come of it.

A scenario strikes and then looks with the eyes of every client: what they were told, and every byte that they have.
Nothing is taken from the manager's word alone. A row of `core.failure.TABLE` without a scenario here is a gap.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import hwpoison
from hwpoison.cli.demo_clients import (
    ANSWER_SECONDS_MAX,
    Client,
    ClientError,
    Verdict,
    ask_all,
    states_of,
    wait_until,
)
from hwpoison.core.records import Failure, Outcome, State
from hwpoison.linux.syscalls import PAGE_SIZE

STEPS_AFTER = 30
"""Pieces of work that each client does after a strike before all bytes are compared."""
STRUCK = {"file": 9, "dirty": 12, "anonymous": 7, "again": 15, "unread": 3, "idle": 11}
"""Which page each scenario strikes. All are within the smallest file that the demo takes."""
READ_IN_PAGES = (1, 6, 11)
"""Tried one after the other: a strike may come before the page is on its way."""
WRITTEN_BACK_PAGE = 14
ATTEMPTS_MAX = 100
"""How often a strike is tried that must meet a write in flight: it may come after it."""
ISOLATED = {State.DIRTY_FILE, State.CLEAN_FILE, State.ANONYMOUS}
"""States of pages that had a frame."""

Content = Literal["intact", "lost as declared", "WRONG"]


@dataclass(kw_only=True)
class Stage:
    """The manager, its clients and what they share. `visitor` is a process that has nothing of it yet."""

    manager: hwpoison.Manager
    clients: list[Client]
    visitor: Client
    file: Path
    copy: Path
    nbytes: int
    """Of `file` that are used: from its beginning."""
    compared: int = 0
    quarantined: int = 0
    strikes: int = 0
    losses: list[tuple[str, str, int, int]] = field(default_factory=list)
    """Event id, name, offset and size of each loss of which every client must be told, in order, and of no other."""

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(sorted(client.pid for client in self.clients))

    def open_everywhere(self, name: str) -> None:
        """One client opens the file, under a name of its own, and the others attach; nobody touches it."""
        self.clients[0].ask("open", name, str(self.file), "r", self.nbytes)
        for client in self.clients[1:]:
            client.tell("attach", name, str(self.file))
        for client in self.clients[1:]:
            client.answer()

    def leave_everywhere(self, name: str) -> None:
        ask_all(self.clients, "leave", name)

    def owner(self, page: int) -> Client:
        """The client that writes a page."""
        return self.clients[page % len(self.clients)]

    def compare(self) -> list[Verdict]:
        """Everybody stops, compares all bytes of all memories, and works on."""
        writes: dict[str, bytes] = {}
        counted: list[dict[str, bytes]] = ask_all(self.clients, "pause")
        for name in counted[0]:
            count = len(counted[0][name]) // 4
            words = [memoryview(one[name]).cast("I") for one in counted]
            merged = [words[page % len(words)][page] for page in range(count)]
            writes[name] = b"".join(one.to_bytes(4, "little") for one in merged)
        verdicts: list[Verdict] = ask_all(self.clients, "compare", writes)
        ask_all(self.clients, "go")
        self.compared += sum(one.compared for one in verdicts)
        return verdicts

    @staticmethod
    def ready(*clients: Client) -> None:
        """These do nothing but wait, and have said all that they had to say to the manager, which is about to stop."""
        for client in clients:
            client.ask("pause")
            client.ask("written")

    def wait_for_copy(self, first: bytes) -> None:
        """Until the file on the disk begins with these bytes, and not a moment longer."""
        deadline = time.monotonic() + ANSWER_SECONDS_MAX
        with self.copy.open("rb") as copy:
            while os.pread(copy.fileno(), len(first), 0) != first:
                if time.monotonic() > deadline:
                    raise ClientError("flush() does not write to the file")

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The manager process stands still, so that what it is sent meanwhile meets it at once, in order."""
        os.kill(self.manager.pid, signal.SIGSTOP)
        try:
            wait_until(lambda: set(states_of(self.manager.pid)) == {"T"}, "the manager is stopped")
            yield
        finally:
            os.kill(self.manager.pid, signal.SIGCONT)


@dataclass(slots=True)
class Trial:
    """One scenario under way: its failure, and what was found to be wrong."""

    stage: Stage
    failure: Failure | None = None
    where: str = ""
    isolated: int = 0
    """Failures of pages that had a frame: so many frames more must be in quarantine."""
    victims: tuple[int, ...] = ()
    """The processes whose data is gone, as it must be."""
    told: tuple[int, ...] = ()
    """The processes that have learned of it."""
    content: Content = "intact"
    problems: list[str] = field(default_factory=list)

    def expect(self, condition: bool, problem: str) -> None:
        """`problem` is what must be said if the condition does not hold."""
        if not condition and problem not in self.problems:
            self.problems.append(problem)

    def strike(self, name: str, page: int) -> Failure:
        """Simulate a failure of a page while the clients work."""
        return self.struck(self.stage.manager.inject(name, page * PAGE_SIZE), f"{name}+{page * PAGE_SIZE:#x}")

    def struck(self, failure: Failure, where: str) -> Failure:
        """A failure was handled: it is this scenario's."""
        self.stage.strikes += 1
        self.isolated += failure.state in ISOLATED
        self.failure, self.where = failure, where
        return failure

    def lose(self, name: str, page: int) -> tuple[hwpoison.Range, ...]:
        """Strike a page that cannot be had back: every client must be told. The bytes that are gone."""
        failure = self.strike(name, page)
        lost = hwpoison.Range(name, page * PAGE_SIZE, failure.nbytes)
        self.stage.losses.append((failure.event_id, *lost))
        self.victims = self.stage.pids
        told = ask_all(self.stage.clients, "told_of", failure.event_id)
        self.told = tuple(sorted(client.pid for client, one in zip(self.stage.clients, told, strict=True) if one))
        return (lost,)

    def count_frames(self) -> None:
        """Each frame that failed must be in quarantine now."""
        before, held = self.stage.quarantined, self.stage.manager.statistics().quarantined
        self.stage.quarantined = held
        more = (held - before) // PAGE_SIZE
        self.expect(more == self.isolated, f"{more} more frames are in quarantine, and not {self.isolated}")

    def compare(self, lost: tuple[hwpoison.Range, ...] = ()) -> None:
        """Every client works on, and then compares all it has: `lost` must be refused, all else must be right."""
        ask_all(self.stage.clients, "work", STEPS_AFTER)
        for client, verdict in zip(self.stage.clients, self.stage.compare(), strict=True):
            for name, offset in verdict.wrong:
                self.wrong(f"process {client.pid} read wrong bytes at {name}+{offset:#x}")
            if verdict.lost != lost:
                self.wrong(f"process {client.pid} was refused {_places(verdict.lost)} and not {_places(lost)}")
            self._check_refused(client, verdict.refused, lost)
        if lost and self.content == "intact":
            self.content = "lost as declared"

    def _check_refused(self, client: Client, refused: frozenset[tuple[str, int]], lost: tuple[hwpoison.Range, ...]) -> None:
        for name, offset in refused - {(one.name, one.offset) for one in lost}:
            self.wrong(f"the work of process {client.pid} was refused {name}+{offset:#x}, which is not lost")

    def wrong(self, problem: str) -> None:
        """Some bytes are not what they must be."""
        self.content = "WRONG"
        self.expect(False, problem)

    def repair(self, lost: tuple[hwpoison.Range, ...]) -> None:
        """The client that knows the lost content gives it back; from then on everybody must have it."""
        clients = self.stage.clients
        ask_all(clients, "pause")
        for client, refused in zip(clients, ask_all(clients, "refusals"), strict=True):
            self._check_refused(client, refused, lost)
        for name, offset, _ in lost:
            page = offset // PAGE_SIZE
            self.stage.owner(page).ask("repair", name, page)
            ask_all(clients, "resume", name, page)
        self.compare()

    def expect_in_copy(self, page: int) -> None:
        """The file on the disk must have what its writer last wrote."""
        known = self.stage.owner(page).ask("known", "copy", page)
        with self.stage.copy.open("rb") as copy:
            on_disk = os.pread(copy.fileno(), len(known), page * PAGE_SIZE)
        self.expect(on_disk == known, f"the file does not have what was written to copy+{page * PAGE_SIZE:#x}")


def processes(pids: Sequence[int]) -> str:
    """In words."""
    return f"process {', '.join(map(str, pids))}" if pids else "nobody"


def _places(ranges: tuple[hwpoison.Range, ...]) -> str:
    return ", ".join(f"{one.name}+{one.offset:#x}" for one in ranges) or "nothing"


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
        trial.expect(reader.answer() == reader.ask("known", "arriving", page), "the waiting reader got wrong bytes")
        if trial.failure and trial.failure.state is not State.FREE:
            break
    trial.compare()
    stage.leave_everywhere("arriving")


def page_being_written_back(trial: Trial) -> None:
    """A changed page fails while flush() writes it to the file: it is not lost if that is waited for."""
    stage, page = trial.stage, WRITTEN_BACK_PAGE
    writer = stage.owner(page)
    reporter, witness = (one for one in stage.clients if one is not writer)
    in_flight = False
    for _ in range(ATTEMPTS_MAX):
        # All pages change, so that flush() writes them in one piece; it takes its time, and begins with the first.
        stage.ready(*stage.clients)
        ask_all(stage.clients, "write_all", "copy")
        first = stage.owner(0).ask("known", "copy", 0)
        before = stage.manager.statistics().written
        writer.tell("flush", "copy")
        stage.wait_for_copy(first)
        with stage.stopped():
            reporter.begin("inject", "copy", page)
            witness.begin("written")
        failure = trial.struck(reporter.answer(), f"copy+{page * PAGE_SIZE:#x}")
        flushed = writer.answer()
        # The manager counts a write when it has ended. What it said after it had the report proves that it had not.
        in_flight = witness.answer() == before
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
        "a process without a guard touched a lost page: SIGBUS, and no wrong byte. The others work on."),
    Scenario("truncated page", State.TRUNCATED, Outcome.IGNORED, truncated_page,
        "its memory was closed while the report was on its way. Nobody can reach it any more."),
    Scenario("reserved page", State.RESERVED, Outcome.IGNORED, reserved_page,
        "the manager's own memory, which it can't take away from itself."),
    Scenario("unknown page", State.UNKNOWN, Outcome.IGNORED, unknown_page,
        "a process that has ended and never was a client. Not ours to handle."),
)  # fmt: skip
"""In the order in which they are played."""
