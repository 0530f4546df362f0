"""What a client process of `hwpoison demo` does: it attaches to the manager by name, reads and writes all the time, and
compares every byte with what it has to be, which it knows from somewhere else: the file as read(2) gives it, or its own
writes.

python -m hwpoison.cli.demo_work --channel FD --socket ADDRESS --index N --count N
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy
import numpy.typing

import hwpoison
from hwpoison.cli.demo_clients import Verdict
from hwpoison.linux import syscalls
from hwpoison.linux.syscalls import PAGE_SIZE

PAUSE_SECONDS = 0.0002
"""Between two pieces of a client's work: two processors shall do for everything."""
FAILING_PAGES = 16
"""Only the first pages of a memory fail, and the clients work there most of the time. Behind them they write with plain
stores, which would be SIGBUS on a lost page; here with `write`, which refuses."""
KEPT_BYTES = 8
"""What a client's write leaves of a page: it must not cover a lost page whole, for that would repair it."""
TOLD_SECONDS_MAX = 3.0
"""A loss is told while it is handled; so late it can only be on its way because the machine is busy."""
FILLED_BYTES = 2 << 20
"""What one thread lets the manager bring in while the memory is closed."""
FILLERS = 4
CLOSE_ATTEMPTS_MAX = 100

Bytes = numpy.typing.NDArray[numpy.uint8]


class Known:
    """What a memory must hold: its first content, and how often each page was written since."""

    def __init__(self, first: Bytes, page_count: int) -> None:
        self._first = first
        self.content = first.copy()
        self.writes = numpy.zeros(page_count, "u4")

    def page(self, page: int) -> Bytes:
        """The bytes of a page, fewer than a whole page at the end."""
        return self.content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]

    def after(self, page: int, writes: int) -> Bytes:
        """The bytes of a page after so many writes."""
        old = self._first[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        if not writes:
            return old
        mixed = numpy.arange(PAGE_SIZE // 8, dtype="u8") + numpy.uint64(page << 40 | writes << 12)
        mixed *= numpy.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> numpy.uint64(29)
        new = mixed.view("u1")[: len(old)].copy()
        new[:KEPT_BYTES] = old[:KEPT_BYTES]
        return new

    def written(self, page: int, writes: int) -> None:
        """It is so from now on."""
        self.page(page)[:] = self.after(page, writes)
        self.writes[page] = writes


class Work:
    """The client's process. The methods without an underscore are what the demo may ask for."""

    def __init__(self, manager: hwpoison.BaseManager, index: int, count: int) -> None:
        self._manager = manager
        self._index, self._count = index, count
        self._memories: dict[str, hwpoison.Memory] = {}
        self._known: dict[str, Known] = {}
        self._given_up: set[tuple[str, int]] = set()
        self._wrong: set[tuple[str, int]] = set()
        self._refused: set[tuple[str, int]] = set()
        self._compared = 0
        self._notices: list[tuple[str, str, int, int]] = []
        self._told = threading.Condition()
        self._random = random.Random(index)
        self.working = False

    # --- memories

    def open(self, name: str, path: str, mode: Literal["r", "r+"], nbytes: int) -> None:
        """Be the first to open a file."""
        self._keep(self._manager.open(path, mode, nbytes=nbytes, name=name), path)

    def allocate(self, name: str, nbytes: int) -> None:
        """Be the first to have anonymous memory."""
        # A page that is free is struck too.
        self._keep(self._manager.allocate(nbytes, name, populate=False), None)

    def attach(self, name: str, path: str | None) -> None:
        """Have what another client opened or allocated."""
        self._keep(self._manager.attach(name), path)

    def _keep(self, memory: hwpoison.Memory, path: str | None) -> None:
        nbytes = memory.nbytes
        first = numpy.zeros(nbytes, "u1") if path is None else numpy.fromfile(path, "u1", nbytes)
        self._known[memory.name] = Known(first, -(-nbytes // PAGE_SIZE))
        self._memories[memory.name] = memory
        memory.on_failure(self._notice)

    def leave(self, name: str) -> None:
        """Close a memory."""
        del self._known[name]
        self._memories.pop(name).close()

    def borrow(self, name: str) -> int:
        """Attach and neither work on it nor listen; its address."""
        memory = self._memories[name] = self._manager.attach(name)
        return memory.address

    # --- work

    def go(self) -> None:
        """From now on work between two requests."""
        self.working = True

    def pause(self) -> dict[str, bytes]:
        """Work no more, so that others can compare; how often this client's pages were written."""
        self.working = False
        return {name: known.writes.tobytes() for name, known in self._known.items() if self._memories[name].writable}

    def work(self, steps: int) -> None:
        """Do so many pieces of work, now."""
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        """One piece of work: read something that all share, or write something of one's own and read it back."""
        name = self._random.choice([name for name in self._known if name in ("file", "copy", "memory")])
        count = len(self._known[name].writes)
        page = self._random.randrange(FAILING_PAGES if self._random.random() < 0.7 else count)
        writable = self._memories[name].writable
        if writable:
            page = self._own(page, count)
        if (name, page * PAGE_SIZE) in self._given_up:
            return
        try:
            if writable:
                self._write(name, page)
            self._look(name, page)
        except hwpoison.PoisonError as error:
            self._refused.update((one.name, one.offset) for one in error.ranges)
            self._given_up.update((one.name, one.offset) for one in error.ranges)

    def _own(self, page: int, count: int) -> int:
        """The client's own page next to this one: each page has one client that writes it."""
        page += self._index - page % self._count
        return page if page < count else page - self._count

    def write(self, name: str, page: int) -> None:
        """Write one of the client's own pages."""
        self._write(name, page)

    def write_all(self, name: str) -> None:
        """Write all of the client's own pages."""
        for page in range(self._index, len(self._known[name].writes), self._count):
            self._write(name, page)

    def _write(self, name: str, page: int) -> None:
        known = self._known[name]
        writes = int(known.writes[page]) + 1
        content = known.after(page, writes)[KEPT_BYTES:]
        start = page * PAGE_SIZE + KEPT_BYTES
        if page < FAILING_PAGES:
            self._memories[name].write(start, content.tobytes())
        else:
            self._memories[name].array()[start : start + len(content)] = content
        known.written(page, writes)

    def _look(self, name: str, page: int) -> None:
        expected = self._known[name].page(page)
        start = page * PAGE_SIZE
        with hwpoison.guard(self._memories[name]) as safe:
            right = numpy.array_equal(safe.array()[start : start + len(expected)], expected)
        self._compared += len(expected)
        if not right:
            self._wrong.add((name, start))

    # --- what the demo looks at

    def compare(self, writes: dict[str, bytes]) -> Verdict:
        """Compare all bytes of all memories; `writes`: how often each page was written, by whomever."""
        lost: list[hwpoison.Range] = []
        for name, known in self._known.items():
            if name in writes:
                counted = numpy.frombuffer(writes[name], "u4")
                for page in numpy.flatnonzero(counted != known.writes):
                    known.written(int(page), int(counted[page]))
            differs: set[int] = set()
            refused: set[int] = set()
            try:
                with hwpoison.guard(self._memories[name]) as safe:
                    differs = set((numpy.flatnonzero(safe.array() != known.content) // PAGE_SIZE).tolist())
            except hwpoison.PoisonError as error:
                lost += error.ranges
                for one in error.ranges:
                    refused.update(range(one.offset // PAGE_SIZE, -(-(one.offset + one.nbytes) // PAGE_SIZE)))
            self._wrong.update((name, page * PAGE_SIZE) for page in differs - refused)
            self._compared += len(known.content)
        verdict = Verdict(tuple(sorted(self._wrong)), tuple(sorted(lost)), self.refusals(), self._compared)
        self._wrong, self._compared = set(), 0
        return verdict

    def refusals(self) -> frozenset[tuple[str, int]]:
        """(name, offset) of each page that was refused to the work since the last time."""
        refused, self._refused = frozenset(self._refused), set()
        return refused

    def known(self, name: str, page: int) -> bytes:
        """What a page has to hold."""
        return self._known[name].page(page).tobytes()

    def _notice(self, notice: hwpoison.Notice) -> None:
        with self._told:
            self._notices.append((notice.event_id, notice.name, notice.offset, notice.nbytes))
            self._told.notify_all()

    def told_of(self, event_id: str) -> bool:
        """True if this client is told of that failure, soon or before."""
        with self._told:
            return self._told.wait_for(lambda: event_id in [one[0] for one in self._notices], TOLD_SECONDS_MAX)

    def notices(self) -> list[tuple[str, str, int, int]]:
        """Event id, name, offset and size of all that this client was told of."""
        with self._told:
            return list(self._notices)

    # --- single acts

    def repair(self, name: str, page: int) -> int:
        """Give a lost page its content again; the bytes repaired."""
        return self._memories[name].repair(page * PAGE_SIZE, self.known(name, page))

    def resume(self, name: str, page: int) -> None:
        """The page is well again: work on it."""
        self._given_up.discard((name, page * PAGE_SIZE))

    def prefetch(self, name: str) -> None:
        """Let the manager bring in all of a memory, which nobody touches."""
        self._memories[name].prefetch()

    def touch(self, name: str, page: int) -> bytes:
        """Read a page with no guard: SIGBUS if it is lost."""
        return bytes(self._memories[name].buffer[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])

    def flush(self, name: str) -> int:
        """The errno that flush() raises, or 0."""
        try:
            self._memories[name].flush()
        except OSError as error:
            return error.errno or -1
        return 0

    def inject(self, name: str, page: int) -> hwpoison.Failure:
        """Simulate a failure."""
        return self._manager.inject(name, page * PAGE_SIZE)

    def written(self) -> int:
        """Bytes that the manager has written to files."""
        return self._manager.statistics().written

    def last_unwritten(self, before: int) -> float:
        """Ask the manager again and again whether it has written to files since; when the last no was asked for."""
        last = 0.0
        while True:
            asked = time.monotonic()
            if self._manager.statistics().written != before:
                return last
            last = asked

    def fail_while_closing(self) -> tuple[hwpoison.Failure, str]:
        """Strike a page of a memory that is being closed; the failure and the memory's name.

        While pages are brought in for other threads of this process, the memory has been closed, and its end waits for
        them: a report that comes now waits behind the end, and meets an object that is gone. Nothing can hold that moment,
        so it is tried until a report comes neither too early nor too late.
        """
        for attempt in range(CLOSE_ATTEMPTS_MAX):
            name = f"closing-{attempt}"
            memory = self._manager.allocate(FILLERS * FILLED_BYTES, name, populate=False)
            fillers = [threading.Thread(target=_fill, args=(memory, number)) for number in range(FILLERS)]
            for filler in fillers:
                filler.start()
            memory.close()
            try:
                failure = self._manager.inject(name, 0)
            except FileNotFoundError:
                continue
            finally:
                for filler in fillers:
                    filler.join()
            return failure, name
        raise TimeoutError(f"{CLOSE_ATTEMPTS_MAX} reports all came too late for an object that is being closed")


def _fill(memory: hwpoison.Memory, number: int) -> None:
    # It may have been closed before this thread asked.
    with suppress(ValueError):
        memory.prefetch(number * FILLED_BYTES, FILLED_BYTES)


def _requests(channel: Connection, work: Work) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """What the demo asks for, with work in between."""
    while True:
        if not work.working or channel.poll(PAUSE_SECONDS):
            try:
                yield channel.recv()
            except (EOFError, ConnectionError):
                return
        else:
            work.step()


def _answer(work: Work, request: str, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    """Whether it was done, and what came of it."""
    try:
        return True, getattr(work, request)(*arguments)
    except Exception as error:  # noqa: BLE001
        # The demo says it.
        return False, f"{request}(): {type(error).__name__}: {error}"


def main() -> int:
    """Do what the demo asks for until it goes away."""
    parser = argparse.ArgumentParser("client of the hwpoison demo")
    for name, kind in (("channel", int), ("socket", str), ("index", int), ("count", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    options = parser.parse_args()
    syscalls.die_with_parent()
    # A Ctrl-C is for the demo, which then ends its clients. One of them shall die of SIGBUS: without a core dump.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Connection(options.channel) as channel, hwpoison.connect(options.socket) as manager:
        work = Work(manager, options.index, options.count)
        # The demo ends its clients by going away, also in the middle of an answer.
        with suppress(BrokenPipeError, ConnectionResetError):
            for request, arguments in _requests(channel, work):
                if request == "announced":
                    channel.send(None)
                    request, arguments = arguments[0], arguments[1:]  # noqa: PLW2901
                channel.send(_answer(work, request, arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
