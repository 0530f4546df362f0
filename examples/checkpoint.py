"""A long computation with its state in managed memory and a checkpoint on the disk.

Rows that are lost are taken from the checkpoint and computed again, up to where their block is; all others go on as if
nothing had been. Each block is read in a guard and written as whole pages, so that no failure, at no moment, ends the
program or gets into the result.

    python examples/checkpoint.py
"""

from __future__ import annotations

import random
import tempfile
import threading
from pathlib import Path

import numpy

import hwpoison

ROWS, COLUMNS = 512, 1024
BLOCK = 64
"""Rows that are computed at a time. Their bytes are whole pages, whatever a page is here."""
STEPS, CHECKPOINT_EVERY = 60, 20

Rows = numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.float64]]


def step(rows: Rows) -> Rows:
    """One step of the computation: each row by itself."""
    return 3.9 * rows * (1.0 - rows)


class Computation:
    """`done[block]`: how many steps a block has behind it."""

    def __init__(self, memory: hwpoison.Memory, checkpoint: Path, state: Rows) -> None:
        self.memory = memory
        self.checkpoint = checkpoint
        self.saved_at = 0
        self.done = [0] * (ROWS // BLOCK)
        self.lost = 0
        numpy.save(checkpoint, state)
        memory.write(0, state)

    def rows(self, begin: int, end: int) -> Rows:
        """A copy of some rows, with what was lost of them repaired."""
        while True:
            try:
                with hwpoison.guard(self.memory) as safe:
                    return safe.array("f8", (ROWS, COLUMNS))[begin:end].copy()
            except hwpoison.PoisonError:
                self.repair()

    def repair(self) -> None:
        """Blocks in which rows are lost, from the checkpoint and computed again."""
        lost = hwpoison.lost(self.memory.array("f8", (ROWS, COLUMNS)))
        saved = numpy.load(self.checkpoint, mmap_mode="r")
        for block in sorted({int(row) // BLOCK for row in lost}):
            again = numpy.array(saved[block * BLOCK : (block + 1) * BLOCK])
            for _ in range(self.done[block] - self.saved_at):
                again = step(again)
            # Pages that are not lost stay as they are.
            self.memory.repair(block * again.nbytes, again)
        self.lost += len(lost)

    def run(self, steps: int) -> None:
        for number in range(1, steps + 1):
            for block in range(len(self.done)):
                begin = block * BLOCK
                self.memory.write(begin * COLUMNS * 8, step(self.rows(begin, begin + BLOCK)))
                self.done[block] = number
            if number % CHECKPOINT_EVERY == 0:
                numpy.save(self.checkpoint, self.rows(0, ROWS))
                self.saved_at = number


def strike(manager: hwpoison.Manager, memory: hwpoison.Memory, failures: int) -> None:
    chance = random.Random(1)
    for _ in range(failures):
        manager.inject(memory, chance.randrange(memory.nbytes))


def main() -> None:
    state = numpy.random.default_rng(1).random((ROWS, COLUMNS))
    expected = state
    for _ in range(STEPS):
        expected = step(expected)
    with tempfile.TemporaryDirectory() as folder, hwpoison.Manager() as manager:
        with manager.allocate(state.nbytes, "state") as memory:
            computation = Computation(memory, Path(folder, "checkpoint.npy"), state)
            # Pages fail meanwhile (simulated), whenever it pleases them.
            failures = threading.Thread(target=strike, args=(manager, memory, 20))
            failures.start()
            computation.run(STEPS)
            failures.join()
            right = numpy.array_equal(computation.rows(0, ROWS), expected)
    print(f"rows that were lost and computed again: {'some' if computation.lost else 'none'}")
    print(f"the result is {'right' if right else 'WRONG'}")


if __name__ == "__main__":
    main()
