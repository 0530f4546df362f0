"""The stage of `hwpoison demo`: a manager with its clients; and the trial that each scenario is.

A trial looks with the eyes of every client: what they were told, and every byte that they have. Nothing is taken from the
manager's word alone.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from hwpoison.core.records import Failure, State
from hwpoison.linux.syscalls import PAGE_SIZE

STEPS_AFTER = 30
"""Pieces of work that each client does after a strike before all bytes are compared."""
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
