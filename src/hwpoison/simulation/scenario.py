"""What there is at the beginning of a run, and what will happen in some order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

Operation = tuple[str, int]
"""The name of one of `operations.OPERATIONS`, and the page that it is about."""


class Step(NamedTuple):
    """One thing that a client does: what, to which page, with what content."""

    kind: str
    page: int
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Scenario:
    """`kind` is anonymous, read-only, writable, or cached (writable, and all of the file can be had at once); `states` has
    the state of each page: absent, present, dirty or lost.

    Each of `operations` is done once; those that are a process's by a process of its own. The worker is a process that is
    always there: it writes to the first page of `worker` and then reads the last (with a read-only object: reads both).
    `clients` are further processes, each with a list of operations that it does one after the other. `budget`: how often
    what may go wrong. `death`: the manager may die, and so may all but the last of its `successors`. `markers`: the kernel
    has poison markers, as from 6.6 on.

    With `settles_after` this is a large world: what befalls it comes in the order of `operations`, and after so many steps,
    or when all has come, nothing goes wrong any more and everything must settle (`liveness`).
    """

    kind: str
    states: tuple[str, ...]
    operations: tuple[Operation, ...]
    worker: tuple[int, ...] = (0,)
    budget: tuple[tuple[str, int], ...] = ()
    clients: tuple[tuple[Operation, ...], ...] = ()
    death: bool = False
    successors: int = 0
    """Managers that take over, one after the other."""
    settles_after: int | None = None
    markers: bool = True
    limit: int = 0
    """The memory limit in pages; 0: none that matters."""
    sigbus: str = "fatal"
    """What SIGBUS would do to each client: see `core.machine.Telling`."""

    def __str__(self) -> str:
        happens = ", ".join(f"{name} {page}" for name, page in self.operations)
        dies = " and the manager dies" if self.death else ""
        if self.successors:
            dies += f", with {self.successors} to take over"
        clients = "; ".join(", ".join(f"{name} {page}" for name, page in script) for script in self.clients)
        beside = f"; beside clients that {clients}" if clients else ""
        kernel = "" if self.markers else " without poison markers"
        sigbus = "" if self.sigbus == "fatal" else f" with SIGBUS {self.sigbus}"
        limit = f" within {self.limit} pages" if self.limit else ""
        return f"{self.kind} {' '.join(self.states)}{limit}{kernel}{sigbus}: {happens}{dies}{beside}"
