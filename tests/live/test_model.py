"""Any sequence of what an application can do to a memory, and of failures, beside a model that says what must be there."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import hwpoison
from hwpoison import PoisonError, State
from tests.live.conftest import known
from tests.live.frames import PAGE

NBYTES = 140 * PAGE + 123
PAGES = 141
STEPS = 700


def pages_of(offset: int, nbytes: int) -> set[int]:
    return set(range(offset // PAGE, -(-(offset + nbytes) // PAGE))) if nbytes else set()


def end_of(page: int) -> int:
    return min((page + 1) * PAGE, NBYTES)


def nbytes_of(pages: Iterable[int]) -> int:
    return sum(end_of(page) - page * PAGE for page in pages)


class Model:
    """A memory, and what is known of it. Each action does the same to both and compares."""

    def __init__(self, manager: hwpoison.Manager, memory: hwpoison.Memory, content: bytes, path: Path | None) -> None:
        self.manager = manager
        self.memory = memory
        self.path = path
        self.limited = manager.statistics().memory_limit is not None
        """Dirty pages are written back at any time, then."""
        self.content = bytearray(content)
        self.stored = bytearray(content)
        """What a discard brings back."""
        self.lost: set[int] = set()
        self.dirty: set[int] = set()
        self.unsaid = False
        """True if dirty content was lost and `flush` has not said so."""
        self.chance = random.Random(memory.kind + str(self.limited))

    def ranges(self, pages: Iterable[int]) -> list[tuple[str, int, int]]:
        """Neighbours joined."""
        found: list[tuple[str, int, int]] = []
        for page in sorted(pages):
            if found and found[-1][1] + found[-1][2] == page * PAGE:
                found[-1] = (self.memory.name, found[-1][1], end_of(page) - found[-1][1])
            else:
                found.append((self.memory.name, page * PAGE, end_of(page) - page * PAGE))
        return found

    def some_range(self) -> tuple[int, int]:
        offset = self.chance.choice([self.chance.randrange(NBYTES), self.chance.randrange(PAGES) * PAGE])
        length = self.chance.choice(
            [0, 1, PAGE, 3 * PAGE, 40 * PAGE, 40 * PAGE + 9, self.chance.randrange(2 * PAGE), NBYTES]
        )
        return offset, min(length, NBYTES - offset)

    def not_whole(self, offset: int, nbytes: int) -> set[int]:
        """The pages that the range covers only in part."""
        return {page for page in pages_of(offset, nbytes) if page * PAGE < offset or offset + nbytes < end_of(page)}

    # --- actions

    def write(self) -> None:
        offset, nbytes = self.some_range()
        data = self.chance.randbytes(nbytes)
        refused = self.lost & self.not_whole(offset, nbytes)
        if refused:
            with pytest.raises(PoisonError) as caught:
                self.memory.write(offset, data)
            met = {page for one in caught.value.ranges for page in pages_of(one.offset, one.nbytes)}
            assert self.ranges(met) == self.ranges(refused)
        else:
            self.memory.write(offset, data)
            self.content[offset : offset + nbytes] = data
            self.lost -= pages_of(offset, nbytes)
            self.dirty |= pages_of(offset, nbytes)

    def store(self) -> None:
        """By the processor: must not be tried where something is lost."""
        offset, nbytes = self.some_range()
        if not self.lost & pages_of(offset, nbytes):
            data = self.chance.randbytes(nbytes)
            self.memory.buffer[offset : offset + nbytes] = data
            self.content[offset : offset + nbytes] = data
            self.dirty |= pages_of(offset, nbytes)

    def load(self) -> None:
        offset, nbytes = self.some_range()
        if not self.lost & pages_of(offset, nbytes):
            assert bytes(self.memory.buffer[offset : offset + nbytes]) == self.content[offset : offset + nbytes]

    def read(self) -> None:
        offset, nbytes = self.some_range()
        bad = self.lost & pages_of(offset, nbytes)
        if bad:
            with pytest.raises(PoisonError) as caught:
                self.memory.read(offset, nbytes)
            assert sorted(caught.value.ranges) == self.ranges(bad)
        else:
            assert self.memory.read(offset, nbytes) == self.content[offset : offset + nbytes]

    def repair(self) -> None:
        offset, nbytes = self.some_range()
        data = self.chance.randbytes(nbytes)
        if self.not_whole(offset, nbytes):
            with pytest.raises(ValueError):
                self.memory.repair(offset, data)
        else:
            mended = self.lost & pages_of(offset, nbytes)
            assert self.memory.repair(offset, data) == nbytes_of(mended)
            for page in mended:
                self.content[page * PAGE : end_of(page)] = data[page * PAGE - offset : end_of(page) - offset]
            self.lost -= mended
            self.dirty |= mended

    def discard(self) -> None:
        offset, nbytes = self.some_range()
        given_up = self.lost & pages_of(offset, nbytes)
        assert self.memory.discard(offset, nbytes) == nbytes_of(given_up)
        if self.limited and self.path is not None:
            self.stored[:] = self.path.read_bytes()
        for page in given_up:
            self.content[page * PAGE : end_of(page)] = self.stored[page * PAGE : end_of(page)]
        self.lost -= given_up
        self.dirty -= given_up

    def fail(self) -> None:
        page = self.chance.randrange(PAGES)
        failure = self.manager.inject(self.memory, self.chance.randrange(page * PAGE, end_of(page)))
        if page in self.lost:
            assert failure.state is State.ALREADY_POISONED
        elif failure.state in (State.ANONYMOUS, State.DIRTY_FILE):
            assert failure.victims == (os.getpid(),)
            self.lost.add(page)
            self.unsaid |= failure.state is State.DIRTY_FILE
        else:
            assert failure.state in (State.FREE, State.CLEAN_FILE)
            assert failure.victims == ()
            assert self.limited or page not in self.dirty, "what is dirty was taken for clean"

    def flush(self) -> None:
        if self.unsaid:
            with pytest.raises(OSError):
                self.memory.flush()
        self.memory.flush()
        self.unsaid = False
        if self.path is not None:
            for page in self.dirty - self.lost:
                self.stored[page * PAGE : end_of(page)] = self.content[page * PAGE : end_of(page)]
            self.dirty &= self.lost
            written = self.path.read_bytes()
            assert len(written) == NBYTES
            for page in set(range(PAGES)) - self.lost if self.limited else range(PAGES):
                assert written[page * PAGE : end_of(page)] == self.stored[page * PAGE : end_of(page)]

    def step(self) -> None:
        actions: dict[Callable[[], None], int] = {
            self.write: 3, self.store: 3, self.read: 4, self.load: 3, self.repair: 2, self.discard: 2, self.fail: 8,
            self.flush: 1,
        }  # fmt: skip
        self.chance.choices(list(actions), list(actions.values()))[0]()
        assert self.memory.lost() == self.ranges(self.lost)


@pytest.mark.parametrize("kind", ["anonymous", "file", "file that does not fit"])
def test_any_sequence_of_actions_and_failures_shows_what_the_model_says(kind: str, file: Callable[..., Path]) -> None:
    with hwpoison.Manager(memory_limit=16 * PAGE if kind == "file that does not fit" else None) as manager:
        if kind == "anonymous":
            model = Model(manager, manager.allocate(NBYTES, "t"), bytes(NBYTES), None)
        else:
            path = file(NBYTES)
            model = Model(manager, manager.open(path, "r+"), known(NBYTES), path)
        for _ in range(STEPS):
            model.step()
        whole = (0, NBYTES)
        model.some_range = lambda: whole  # type: ignore[method-assign]
        for last in (model.discard, model.read, model.flush, model.load):
            last()
        assert model.memory.lost() == []
