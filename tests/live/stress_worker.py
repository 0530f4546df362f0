"""The processes of the stress test: what they do with the memory, and the nursery that forks them.

    stress_worker.py FOLDER SOCKET SEED SLOTS

Each line on standard input, {"slot", "role", "generation"}, forks a process; each line on standard output says that one
was born or has ended. A process that meets anything wrong prints a traceback and ends with status 1.
"""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import random
import select
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hwpoison
from tests.live.stress_content import ANONYMOUS, BOOK, CONSTANT, KINDS, PAGE, Kind, Refused, Table, content
from tests.support import wait_until

WRITERS = 8
"""Slots of processes that own pages: `page % WRITERS` is the slot. Higher slots only read."""


class Worker:
    """One process. `slot` is its place in the table; the next generation in the slot goes on with its pages."""

    def __init__(self, folder: Path, socket: str, seed: str, slots: int, slot: int, generation: int) -> None:
        self.table = Table(folder / "table", slots)
        self.slot = slot
        self.random = random.Random(f"{seed} {slot} {generation}")
        self.scratch = os.memfd_create("scratch")
        self.marker_name = f"marker {slot}.{generation}"
        self.refusals: deque[tuple[Kind, int]] = deque(maxlen=8)
        self.marked: deque[tuple[Kind, int]] = deque(maxlen=8)
        """Pages that were refused to a system call, which leaves a marker in the page table."""
        self.told = 0
        self.markers_told = 0
        self.notices = os.open(folder / f"notices {slot}.{generation}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.manager = hwpoison.connect(socket)
        self.marker = self.manager.allocate(PAGE, self.marker_name)
        self.marker.on_failure(self.on_notice)  # from here on it is told of whatever it maps
        self.memories = {
            ANONYMOUS: self.manager.attach("anonymous"),
            BOOK: self.manager.open(folder / "book", "r+", name="book"),
            CONSTANT: self.manager.open(folder / "constant", name="constant"),
        }
        for memory in self.memories.values():
            memory.on_failure(self.on_notice)
        for kind, memory in self.memories.items():
            self.table.addresses[slot, 1 + kind.number] = memory.address
        self.table.addresses[slot, 0] = os.getpid()

    def on_notice(self, notice: hwpoison.Notice) -> None:
        os.write(self.notices, json.dumps([notice.event_id, notice.name, notice.offset]).encode() + b"\n")
        self.told += 1
        self.markers_told += notice.name == self.marker_name

    def mark(self) -> None:
        """A loss of its own, so that the event log shows between which two points this process hears all notices."""
        before = self.markers_told
        self.marker.write(0, b"m" * PAGE)
        failure = self.manager.inject(self.marker, 0)
        assert failure.victims == (os.getpid(),), failure
        wait_until(lambda: self.markers_told > before, "the notice of a loss arrives")

    def owned(self) -> list[tuple[Kind, int]]:
        if self.slot >= WRITERS:
            return []
        return [(kind, page) for kind in KINDS if kind.writable for page in range(self.slot, kind.pages, WRITERS)]

    def run(self, steps: list[Callable[[], None]]) -> None:
        self.mark()
        for kind, page in self.owned():
            self.take_over(kind, page)
        while not self.table.stop[0]:
            self.random.choice(steps)()
            self.table.beats[self.slot] += 1
        self.mark()
        self.table.addresses[self.slot, 0] = 0
        try:
            self.manager.close()
        except OSError as error:
            # Changes that were lost since the last flush; each was told.
            if error.errno != errno.EIO:
                raise

    # --- writing: pages of its own

    def take_over(self, kind: Kind, page: int) -> None:
        """Whatever the generation before was doing with the page when it ended."""
        begun, acknowledged = self.table.begun[kind.number, page], self.table.acknowledged[kind.number, page]
        if begun != acknowledged or not begun or self.table.discarding[kind.number, page] % 2:
            self.write(kind, page)
            self.table.discarding[kind.number, page] += self.table.discarding[kind.number, page] % 2

    def begin(self, kind: Kind, page: int) -> bytes:
        self.table.latest[self.slot] = (kind.number, page)
        self.table.begun[kind.number, page] += 1
        return content(kind, page, int(self.table.begun[kind.number, page]))

    def acknowledge(self, kind: Kind, page: int) -> None:
        self.table.acknowledged[kind.number, page] = self.table.begun[kind.number, page]

    def write(self, kind: Kind, page: int) -> None:
        self.memories[kind].write(page * PAGE, self.begin(kind, page))
        self.acknowledge(kind, page)

    def write_own(self) -> None:
        self.write(*self.random.choice(self.owned()))

    def write_own_in_halves(self) -> None:
        kind, page = self.random.choice(self.owned())
        data = self.begin(kind, page)
        half = len(data) // 64 * 32
        for start, part in ((0, data[:half]), (half, data[half:])):
            try:
                self.memories[kind].write(page * PAGE + start, part)
            except hwpoison.PoisonError as error:
                if (error.offset, error.nbytes) != (page * PAGE, len(data)):
                    raise
                self.memories[kind].repair(page * PAGE, data)
        # A loss between the halves and a repair by the second write are not possible: half a page repairs nothing.
        self.acknowledge(kind, page)

    def store_own(self) -> None:
        """Through the ordinary view: this process may be struck."""
        kind, page = self.random.choice(self.owned())
        data = self.begin(kind, page)
        self.table.touching[self.slot] = (kind.number, page)
        self.memories[kind].buffer[page * PAGE : page * PAGE + len(data)] = data
        self.table.touching[self.slot] = (-1, -1)
        self.acknowledge(kind, page)

    def see_to_losses(self) -> None:
        """Repair lost pages of its own with the right content, or give some up."""
        for kind, memory in self.memories.items():
            if not kind.writable:
                assert memory.lost() == []
                continue
            for start, nbytes in ((one.offset, one.nbytes) for one in memory.lost()):
                for page in range(start // PAGE, (start + nbytes + PAGE - 1) // PAGE):
                    if (kind, page) in self.owned():
                        self.bring_back(kind, page)

    def bring_back(self, kind: Kind, page: int) -> None:
        if self.random.random() < 0.7:
            self.memories[kind].repair(page * PAGE, content(kind, page, int(self.table.begun[kind.number, page])))
            self.acknowledge(kind, page)
            return
        self.table.discarding[kind.number, page] += 1
        self.memories[kind].discard(page * PAGE, PAGE if page < kind.pages - 1 else kind.last)
        self.look_by_read(kind, page, 1)
        self.write(kind, page)
        self.table.discarding[kind.number, page] += 1

    # --- reading: anybody's pages

    def somewhere(self, most: int = 16) -> tuple[Kind, int, int]:
        """Anywhere, or where this process was refused lately."""
        kind = self.random.choice(KINDS)
        count = self.random.randint(1, most)
        first = self.random.randrange(kind.pages)
        if self.refusals and self.random.random() < 0.3:
            kind, first = self.random.choice(self.refusals)
        self.table.latest[self.slot] = (kind.number, first)
        return kind, first, min(count, kind.pages - first)

    def look(self, kind: Kind, first: int, count: int, read: Callable[[], bytes]) -> None:
        if not self.table.checked(kind, first, count, read):
            self.refusals.append((kind, first))

    def range_of(self, kind: Kind, first: int, count: int) -> tuple[int, int]:
        return first * PAGE, min((first + count) * PAGE, kind.nbytes)

    def refused(self, error: OSError, kind: Kind) -> Refused:
        """The refusal, if it was one that may be."""
        assert isinstance(error, hwpoison.PoisonError) or error.errno == errno.EFAULT, error
        assert kind.writable, f"nothing of a file that nobody changes can be lost: {error}"
        return Refused()

    def look_by_read(self, kind: Kind, first: int, count: int) -> None:
        start, end = self.range_of(kind, first, count)

        def read() -> bytes:
            try:
                return self.memories[kind].read(start, end - start)
            except OSError as error:
                raise self.refused(error, kind) from error

        self.look(kind, first, count, read)

    def read(self) -> None:
        self.look_by_read(*self.somewhere())

    def look_in_guard(self) -> None:
        kind, first, count = self.somewhere(64)
        start, end = self.range_of(kind, first, count)

        def read() -> bytes:
            try:
                with hwpoison.guard(self.memories[kind]) as safe:
                    return safe.array("u1", end - start, offset=start).tobytes()
            except OSError as error:
                raise self.refused(error, kind) from error

        self.look(kind, first, count, read)

    def look_and_check(self) -> None:
        """Two nested guards, and `check` before the bytes are used."""
        kind, first, count = self.somewhere()
        start, end = self.range_of(kind, first, count)
        try:
            with hwpoison.guard(self.memories[CONSTANT], self.memories[kind]) as (_, safe):

                def read() -> bytes:
                    data = bytes(safe.buffer[start:end])
                    try:
                        safe.check()
                    except OSError as error:
                        raise self.refused(error, kind) from error
                    return data

                with hwpoison.guard(self.memories[kind]):
                    self.look(kind, first, count, read)
        except hwpoison.PoisonError as error:
            self.refused(error, kind)

    def look_by_system_call(self) -> None:
        """What write(2) takes from the ordinary view: EFAULT, or as many bytes as could be had, and never a signal."""
        kind, first, _ = self.somewhere()
        if self.marked and self.random.random() < 0.5:
            kind, first = self.random.choice(self.marked)
        start, end = self.range_of(kind, first, 1)
        memory = self.memories[kind]

        def read() -> bytes:
            for _ in range(1000):
                try:
                    done = os.pwrite(self.scratch, memory.buffer[start:end], 0)
                except OSError as error:
                    if error.errno != errno.EFAULT:
                        raise
                    done = 0
                if done == end - start:
                    return os.pread(self.scratch, done, 0)
                if self.manager.connection.user_mode:
                    raise Refused  # where the kernel can't ask the manager inside a system call
                if any(one.offset <= start < one.offset + one.nbytes for one in memory.lost()):
                    self.marked.append((kind, first))
                    raise Refused
                # Brought back in the meantime, or never lost: then it must go well some time.
            raise AssertionError(f"page {first} of {kind} is refused, and is not lost")

        self.look(kind, first, 1, read)

    def load(self) -> None:
        """Through the ordinary view, page by page: this process may be struck."""
        kind, first, count = self.somewhere(8)
        for page in range(first, first + count):
            start, end = self.range_of(kind, page, 1)
            self.table.touching[self.slot] = (kind.number, page)
            buffer = self.memories[kind].buffer
            self.look(kind, page, 1, lambda: bytes(buffer[start:end]))  # noqa: B023
            self.table.touching[self.slot] = (-1, -1)

    # --- and the rest

    def flush(self) -> None:
        try:
            self.memories[BOOK].flush()
        except OSError as error:
            if error.errno != errno.EIO:
                raise

    def prefetch(self) -> None:
        kind, first, count = self.somewhere(512)
        start, end = self.range_of(kind, first, count)
        self.memories[kind].prefetch(start, end - start)


def careful(worker: Worker) -> list[Callable[[], None]]:
    """Never through the ordinary view, but by system calls: no signal may end it."""
    often = [worker.write_own, worker.read, worker.look_in_guard, worker.look_by_system_call, worker.see_to_losses]
    return often * 4 + [worker.write_own_in_halves, worker.look_and_check, worker.flush, worker.prefetch]


def ordinary(worker: Worker) -> list[Callable[[], None]]:
    """As programs do that know nothing: loads and stores. A lost page ends it by SIGBUS."""
    return [worker.store_own] * 10 + [worker.load] * 6 + [worker.see_to_losses] * 8 + [worker.flush]


def reader(worker: Worker) -> list[Callable[[], None]]:
    return [worker.read, worker.look_in_guard, worker.look_and_check, worker.look_by_system_call, worker.prefetch]


def visitor(worker: Worker) -> list[Callable[[], None]]:
    """Comes, looks, and goes without a goodbye."""
    visits = worker.random.randint(0, 20)

    def look_and_go() -> None:
        nonlocal visits
        visits -= 1
        if visits < 0:
            worker.random.choice([sys.exit, os._exit])(0)
        worker.random.choice([worker.read, worker.look_in_guard])()

    return [look_and_go]


ROLES = {one.__name__: one for one in (careful, ordinary, reader, visitor)}


def live(arguments: list[str], born: dict[str, Any]) -> int:
    """A forked process's life; its exit status."""
    folder = Path(arguments[0])
    said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDWR)
    for target, source in ((0, null), (1, null), (2, said)):
        os.dup2(source, target)
    try:
        worker = Worker(folder, arguments[1], arguments[2], int(arguments[3]), born["slot"], born["generation"])
        worker.run(ROLES[born["role"]](worker))
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:  # noqa: BLE001  (the exit status says it)
        print(f"{born} (pid {os.getpid()}):", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


def say(value: Any) -> None:
    os.write(1, json.dumps(value).encode() + b"\n")


def nursery(arguments: list[str]) -> None:
    """Fork what is asked for, until standard input ends; then kill what is left."""
    faulthandler.enable()  # SIGABRT shows where a process hangs
    children: dict[int, int] = {}  # pidfd -> pid
    orders = b""
    while True:
        readable, _, _ = select.select([0, *children], [], [])
        for pidfd in readable:
            if pidfd in children:
                _, status = os.waitpid(children.pop(pidfd), 0)
                say({"ended": pidfd, "status": os.waitstatus_to_exitcode(status)})
                os.close(pidfd)
        if 0 not in readable:
            continue
        data = os.read(0, 1 << 16)
        if not data:
            break
        orders += data
        while b"\n" in orders:
            line, _, orders = orders.partition(b"\n")
            born = json.loads(line)
            pid = os.fork()
            if pid == 0:
                os._exit(live(arguments, born))
            pidfd = os.pidfd_open(pid)
            children[pidfd] = pid
            say({"born": pidfd, "pid": pid, **born})
    for pid in children.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    nursery(sys.argv[1:])
