"""Many processes at work on memory that fails all the time: every byte right or refused, every loss told once, no hang."""

from __future__ import annotations

import faulthandler
import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import hwpoison
from hwpoison import Failure, Outcome, State
from hwpoison.linux.quarantine import PIPE_FRAMES
from tests.live import stress_worker
from tests.live.frames import can_see_frames, frame_at
from tests.live.process import keeper_of
from tests.live.stress_content import ANONYMOUS, BOOK, CONSTANT, FIRST_VERSION, KINDS, PAGE, Table, content
from tests.live.stress_ledger import Ledger
from tests.support import wait_until

pytestmark = pytest.mark.live

ROLES = [*["careful", "ordinary"] * (stress_worker.WRITERS // 2), "reader", "reader", "visitor", "visitor"]
"""The role of each slot."""
MEMORY_LIMIT = 1500 * PAGE
"""Less than half of all pages."""
HANG_SECONDS = 60.0
STRIKERS = 3
STRIKES_PER_SECOND = 90
KILLS_PER_SECOND = 6
"""Of the manager, where it is to die."""
HARMS_PER_SECOND = 4
"""Processes that are killed, stopped, or go on after that."""
NAMES = {ANONYMOUS: "anonymous", BOOK: "book", CONSTANT: "constant"}


def descriptors(pid: int) -> Counter[str]:
    """How many of each kind a process has."""
    found: Counter[str] = Counter()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found[os.readlink(f"/proc/{pid}/fd/{fd}").replace(f"/proc/{pid}/", "/proc/self/").split(":[")[0]] += 1
    return found


class Crew:
    """The processes: started by the nursery, replaced when they end."""

    def __init__(self, folder: Path, socket: str, seed: str) -> None:
        root = Path(__file__).parents[2]
        path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        self.nursery = subprocess.Popen(
            [sys.executable, "-W", "error", stress_worker.__file__, str(folder), socket, seed, str(len(ROLES))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.alive: dict[int, dict[str, Any]] = {}  # nursery's pidfd -> what was born
        self.generations: Counter[int] = Counter()
        self._said = b""

    def bear(self, slot: int) -> None:
        self.generations[slot] += 1
        order = {"slot": slot, "role": ROLES[slot], "generation": self.generations[slot]}
        assert self.nursery.stdin is not None
        self.nursery.stdin.write(json.dumps(order).encode() + b"\n")
        self.nursery.stdin.flush()

    def news(self, seconds: float) -> list[dict[str, Any]]:
        """Who has ended, after waiting for anything to happen for at most `seconds`."""
        assert self.nursery.stdout is not None
        ended = []
        if select.select([self.nursery.stdout], [], [], seconds)[0]:
            data = os.read(self.nursery.stdout.fileno(), 1 << 16)
            assert data, "the nursery has died"
            self._said += data
        while b"\n" in self._said:
            line, _, self._said = self._said.partition(b"\n")
            message = json.loads(line)
            if "born" in message:
                with suppress(ProcessLookupError):
                    message["pidfd"] = os.pidfd_open(message["pid"])
                self.alive[message["born"]] = message
            else:
                found = self.alive.pop(message["ended"])
                if "pidfd" in found:
                    os.close(found.pop("pidfd"))
                ended.append({**found, "status": message["status"]})
        return ended

    def signal(self, one: dict[str, Any], number: signal.Signals) -> None:
        with suppress(ProcessLookupError, KeyError):
            signal.pidfd_send_signal(one["pidfd"], number)

    def close(self) -> None:
        assert self.nursery.stdin is not None
        assert self.nursery.stdout is not None
        self.nursery.stdin.close()
        self.nursery.wait(HANG_SECONDS)
        self.nursery.stdout.close()
        for one in self.alive.values():
            if "pidfd" in one:
                os.close(one["pidfd"])


class Stress:
    """One run."""

    def __init__(self, folder: Path, seed: str, kills: int = 0) -> None:
        self.folder = folder
        self.kills = kills
        """How often the manager is to be killed."""
        self.seed = seed
        self.random = random.Random(f"{seed} main")
        self.table = Table(folder / "table", len(ROLES))
        for kind, name in ((BOOK, "book"), (CONSTANT, "constant")):
            pages = [content(kind, page, FIRST_VERSION) for page in range(kind.pages)]
            (folder / name).write_bytes(b"".join(pages))
        self.table.begun[BOOK.number, : BOOK.pages] = self.table.acknowledged[BOOK.number, : BOOK.pages] = FIRST_VERSION
        self.manager = hwpoison.Manager(memory_limit=MEMORY_LIMIT)
        self.manager.report(pid=os.getpid(), address=0)
        list(self.manager.events())  # now the manager has opened its log
        self.keeper = keeper_of(self.manager.pid)
        self.descriptors = descriptors(self.manager.pid)
        self.sockets = descriptors(os.getpid())["socket"]
        self.memories = {
            ANONYMOUS: self.manager.allocate(ANONYMOUS.nbytes, "anonymous"),
            BOOK: self.manager.open(folder / "book", "r+", name="book"),
            CONSTANT: self.manager.open(folder / "constant", name="constant"),
        }
        self.told: list[list[object]] = []
        for memory in self.memories.values():
            memory.on_failure(lambda notice: self.told.append([notice.event_id, notice.name, notice.offset]))
        self.ledger = Ledger(self.manager)
        self.crew = Crew(folder, self.manager.socket, seed)
        self.failures: list[Failure] = []
        self.striking = threading.Event()
        self.endings: Counter[str] = Counter()
        self.orderly: set[str] = set()
        """The processes that have ended as they were asked to."""
        self.to_look_up: list[tuple[int, str, int]] = []
        self.killed: set[int] = set()

    # --- failures

    def strike_again_and_again(self, number: int) -> None:
        chance = random.Random(f"{self.seed} striker {number}")
        while not self.striking.wait(chance.expovariate(STRIKES_PER_SECOND / STRIKERS)):
            self.failures.append(chance.choice([self.strike_name] * 5 + [self.strike_address, self.strike_frame])(chance))

    def strike_name(self, chance: random.Random) -> Failure:
        """Any page, or one that somebody is at."""
        kind = chance.choice(KINDS)
        page = chance.randrange(kind.pages)
        if chance.random() < 0.7:
            number, page = self.table.latest[chance.randrange(len(ROLES))].tolist()
            # Whoever notes it may be killed between the two.
            kind = KINDS[number]
            page = min(page, kind.pages - 1)
        place = NAMES[kind], page * PAGE + chance.randrange(kind.last)
        if chance.random() < 0.5:
            return self.manager.inject(*place, action_required=chance.random() < 0.3)
        return self.manager.report(*place, source="stress", action_required=chance.random() < 0.3)

    def somewhere(self, chance: random.Random) -> tuple[int, int]:
        """The pid of some process, of which some may have ended, and the address of some page in it."""
        slot, kind = chance.randrange(len(ROLES)), chance.choice(KINDS)
        pid = int(self.table.addresses[slot, 0]) or os.getpid()
        address = int(self.table.addresses[slot, 1 + kind.number]) or self.memories[kind].address
        return pid, address + chance.randrange(kind.pages) * PAGE

    def strike_address(self, chance: random.Random) -> Failure:
        pid, address = self.somewhere(chance)
        return self.manager.report(pid=pid, address=address, action_required=chance.random() < 0.3)

    def strike_frame(self, chance: random.Random) -> Failure:
        frame = 0
        if can_see_frames():
            pid, address = self.somewhere(chance)
            with suppress(FileNotFoundError, ProcessLookupError):
                frame = frame_at(address, pid)
        return self.manager.report(pfn=frame) if frame else self.strike_name(chance)

    def kill_the_manager(self) -> None:
        """Whichever it is now, again and again: so many have died of it."""
        chance = random.Random(f"{self.seed} killer")
        while self.endings["managers"] < self.kills:
            if self.striking.wait(chance.expovariate(KILLS_PER_SECOND)):
                return
            # None, while the next one is being made.
            for pid in Path(f"/proc/{self.keeper}/task/{self.keeper}/children").read_text().split():
                with suppress(ProcessLookupError):
                    self.endings["managers"] += killed(int(pid))

    # --- the run

    def run(self, seconds: float) -> None:
        for slot in range(len(ROLES)):
            self.crew.bear(slot)
        strikers = [threading.Thread(target=self.strike_again_and_again, args=(number,)) for number in range(STRIKERS)]
        strikers.append(threading.Thread(target=self.kill_the_manager))
        for one in strikers:
            one.start()
        try:
            self.watch(time.monotonic() + seconds)
            # The last of its kills.
            strikers[-1].join(HANG_SECONDS)
        finally:
            self.striking.set()
            for one in strikers:
                one.join(HANG_SECONDS)
            if any(one.is_alive() for one in strikers):
                self.show_hang("a report")
        self.table.stop[0] = 1
        self.watch(None)

    def watch(self, until: float | None) -> None:
        """Replace who ends, kill and stop some, and see that everybody goes on. None: until all have ended."""
        beats = [(0, time.monotonic())] * len(ROLES)
        next_harm = next_look = 0.0
        stopped: dict[str, Any] | None = None
        while self.crew.alive or until is not None:
            now = time.monotonic()
            if until is not None and now > until:
                break
            for one in self.crew.news(0.05):
                beats[one["slot"]] = (0, now)
                self.judge_ending(one)
                if until is not None:
                    self.crew.bear(one["slot"])
            for slot, (count, since) in enumerate(beats):
                if (current := int(self.table.beats[slot])) != count:
                    beats[slot] = (current, now)
                elif now - since > HANG_SECONDS and any(one["slot"] == slot for one in self.crew.alive.values()):
                    self.show_hang(f"slot {slot}, {ROLES[slot]},")
            if now > next_look:
                next_look = now + 1
                self.ledger.collect()
            if now > next_harm:
                next_harm = now + self.random.expovariate(HARMS_PER_SECOND)
                if stopped is not None:
                    self.crew.signal(stopped, signal.SIGCONT)
                    stopped = None
                elif self.crew.alive and until is not None:
                    one = self.random.choice(list(self.crew.alive.values()))
                    if self.random.random() < 0.5:
                        self.killed.add(one["pid"])
                        self.crew.signal(one, signal.SIGKILL)
                    else:
                        self.crew.signal(one, signal.SIGSTOP)
                        stopped = one
        if stopped is not None:
            self.crew.signal(stopped, signal.SIGCONT)

    def judge_ending(self, one: dict[str, Any]) -> None:
        """Each process ends as it may, or the test fails."""
        slot, role, pid, status = one["slot"], one["role"], one["pid"], one["status"]
        self.table.addresses[slot, 0] = 0
        name = f"marker {slot}.{one['generation']}"
        if status == -signal.SIGKILL and pid in self.killed:
            self.endings["killed"] += 1
        elif status == -signal.SIGBUS and role == "ordinary":
            number, page = self.table.touching[slot].tolist()
            assert number >= 0, f"{name} was struck where it touched nothing"
            assert KINDS[number].writable, f"{name} was struck at a page of a file that can't be lost: {page}"
            self.to_look_up.append((pid, NAMES[KINDS[number]], page * PAGE))
            self.endings["struck"] += 1
        elif status == 0 and (role == "visitor" or self.table.stop[0]):
            self.endings["left"] += 1
            if role != "visitor":
                self.orderly.add(name)
        else:
            raise AssertionError(f"{name}, {role}, ended with status {status}:\n{(self.folder / 'said').read_text()}")
        self.table.touching[slot] = (-1, -1)

    def show_hang(self, who: str) -> None:
        """Everybody's stacks, and the end."""
        faulthandler.dump_traceback(all_threads=True)
        for one in (*self.crew.alive.values(), {"pid": self.manager.pid}):
            for thread in os.listdir(f"/proc/{one['pid']}/task"):
                where = Path(f"/proc/{one['pid']}/task/{thread}/wchan").read_text()
                print(f"{one} thread {thread} sleeps in {where or 'nothing'}", file=sys.stderr)
            # Python's fault handler, which is enabled in all of them, prints the stacks of all threads.
            os.kill(one["pid"], signal.SIGABRT)
        while self.crew.alive:
            self.crew.news(1)
        raise AssertionError(f"{who} hangs:\n{(self.folder / 'said').read_text()}")

    # --- the reckoning

    def reckon(self) -> None:
        """All of what everybody knows fits together."""
        self.ledger.collect()
        for failure in self.failures:
            self.ledger.check_failure(failure)
        for pid, name, offset in self.to_look_up:
            assert self.ledger.was_refused(pid, name, offset), f"{pid} got SIGBUS at {name}+{offset:#x}, which was not lost"
        for listener in self.ledger.heard:
            received = self.folder / listener.name.replace("marker", "notices")
            self.ledger.check_notices(listener, received, to_the_end=listener.name in self.orderly)
        wait_until(lambda: len(self.told) >= len(self.ledger.own.notices), "this process has heard all")
        assert self.told == self.ledger.own.notices
        self.reckon_statistics()
        self.reckon_content()
        self.reckon_remains()

    def reckon_statistics(self) -> None:
        said, ledger = self.manager.statistics(), self.ledger
        assert said.events_dropped == 0
        assert said.states == dict(ledger.states)
        assert sum(said.states.values()) == ledger.counts["report"] == ledger.counts["outcome"]
        assert sum(said.outcomes.values()) == sum(said.states.values()) - said.states.get(State.ALREADY_POISONED, 0)
        assert said.outcomes.get(Outcome.FAILED, 0) == said.outcomes.get(Outcome.DELAYED, 0) == 0
        assert said.quarantined == ledger.isolated * PAGE
        assert self.kills or said.accesses_to_lost == ledger.counts["access"]
        assert said.restarts == self.endings["managers"] == self.kills
        # The bytes of an object end within its last page.
        assert said.memory_present == sum(-(-one.present // PAGE) * PAGE for one in self.manager.objects())

    def reckon_content(self) -> None:
        """Repair all that is lost: then every page of every object and of the file holds what was acknowledged."""
        for kind, memory in self.memories.items():
            for start, nbytes in [(one.offset, one.nbytes) for one in memory.lost()]:
                for page in range(start // PAGE, (start + nbytes + PAGE - 1) // PAGE):
                    memory.repair(page * PAGE, content(kind, page, int(self.table.begun[kind.number, page])))
            assert self.table.checked(kind, 0, kind.pages, lambda: memory.read(0, memory.nbytes))  # noqa: B023
        with suppress(OSError):
            self.memories[BOOK].flush()  # EIO, for what was lost and repaired since
        self.memories[BOOK].flush()
        assert self.table.checked(BOOK, 0, BOOK.pages, (self.folder / "book").read_bytes)

    def reckon_remains(self) -> None:
        """Nothing is left of the processes that have ended; then nothing of the manager."""
        wait_until(lambda: len(self.manager.objects()) == len(KINDS), "the objects of others are gone")
        assert self.manager.statistics().clients == 1
        for memory in self.memories.values():
            memory.close()
        wait_until(lambda: not self.manager.objects(), "the objects are gone")
        expected = self.descriptors.copy()
        expected["pipe"] += 2 * -(-self.ledger.isolated // PIPE_FRAMES)
        expected["socket"] += descriptors(os.getpid())["socket"] - self.sockets  # this process has opened more channels
        assert descriptors(self.manager.pid) == expected
        manager = self.manager.pid
        self.manager.close()
        assert not os.path.exists(f"/proc/{manager}")
        assert not os.path.exists(f"/proc/{self.keeper}")
        assert self.manager.socket not in Path("/proc/net/unix").read_text()

    def reckon_variety(self) -> None:
        """The run was worth something: all of it has happened."""
        for state in (State.FREE, State.CLEAN_FILE, State.DIRTY_FILE, State.ANONYMOUS, State.ALREADY_POISONED):
            assert self.ledger.states[state], f"no {state}"
        for kind in ("access", "repair", "discard", "refill"):
            assert self.ledger.counts[kind], f"no {kind}"
        assert all(self.endings[one] for one in ("killed", "struck", "left")), self.endings
        assert all(self.table.beats), "somebody has done nothing"

    def close(self) -> None:
        """End everything, however far it came."""
        self.crew.close()
        with suppress(OSError):
            self.manager.close()


@pytest.fixture(autouse=True)
def fault_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the manager too: see `show_hang`."""
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")


def killed(pid: int) -> bool:
    """Kill a process and wait for its death; False if it had died before."""
    process = os.pidfd_open(pid)
    try:
        if select.select([process], [], [], 0)[0]:
            return False
        signal.pidfd_send_signal(process, signal.SIGKILL)
        assert select.select([process], [], [], HANG_SECONDS)[0], "it dies"
        return True
    finally:
        os.close(process)


def stress(folder: Path, seconds: float, kills: int = 0) -> None:
    seed = os.environ.get("HWPOISON_STRESS_SEED") or str(random.SystemRandom().randrange(1 << 32))
    print(f"HWPOISON_STRESS_SEED={seed}")
    run = Stress(folder, seed, kills)
    try:
        run.run(seconds)
        run.reckon()
        print(len(run.failures), run.endings, dict(run.ledger.counts), dict(run.ledger.states), run.table.beats)
        run.reckon_variety()
    finally:
        run.close()


def test_at_any_moment_every_byte_is_right_or_refused_and_every_loss_is_told_once(tmp_path: Path) -> None:
    stress(tmp_path, 15)


def test_so_it_is_too_if_the_manager_is_killed_a_hundred_times(tmp_path: Path) -> None:
    stress(tmp_path, 120 / KILLS_PER_SECOND, kills=100)


@pytest.mark.soak
def test_and_if_it_is_killed_a_thousand_times(tmp_path: Path) -> None:
    stress(tmp_path, 1100 / KILLS_PER_SECOND, kills=1000)


@pytest.mark.soak
def test_so_it_stays_for_ten_minutes(tmp_path: Path) -> None:
    stress(tmp_path, 600)
