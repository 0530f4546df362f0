"""What the core says about what happened: states, outcomes, failures, notices, events.

All are plain values. The words are the kernel's (`mm/memory-failure.c`) where it has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

NAME_LIMIT = 4096
"""Most characters of an object's name: those of the longest path. Every notice has the name in it."""


class State(StrEnum):
    """What a page was when it failed: the row of the table in `core.failure` that decided."""

    ALREADY_POISONED = "already poisoned page"
    RESERVED = "reserved page"
    TRUNCATED = "truncated page"
    FREE = "free page"
    DIRTY_FILE = "dirty file page"
    CLEAN_FILE = "clean file page"
    ANONYMOUS = "anonymous page"
    UNKNOWN = "unknown page"


class Outcome(StrEnum):
    """How the handling of a failure ended, with the kernel's meanings."""

    IGNORED = "Ignored"
    """Nothing was done; the next access will report again."""
    FAILED = "Failed"
    """The page should have been isolated and could not be."""
    DELAYED = "Delayed"
    """Isolated; the owner learns on the next access."""
    RECOVERED = "Recovered"
    """Isolated, and either the data is back or its loss is recorded and reported."""


class Source(StrEnum):
    """Who claimed that the page is bad. Only `INJECTED` is simulated."""

    INJECTED = "injected"
    APPLICATION = "application"
    MANAGER = "manager"
    """The manager itself: a file can't be read any more, or memory not be isolated."""


class Policy(StrEnum):
    """When a process that wants no notices learns of a loss."""

    EARLY = "early"
    """At once: a SIGBUS with BUS_MCEERR_AO."""
    LATE = "late"
    """On access."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Somebody's claim that a page is bad, by exactly one way to name it.

    `name` and `offset` (bytes), or `pfn`, or `pid` and `address`. `action_required`: somebody has touched it.
    """

    name: str | None = None
    offset: int | None = None
    pfn: int | None = None
    pid: int | None = None
    address: int | None = None
    source: str = Source.APPLICATION
    action_required: bool = False

    @property
    def simulated(self) -> bool:
        """True if no hardware is claimed to be bad; such a report never leaves this system."""
        return self.source == Source.INJECTED

    @property
    def where(self) -> str:
        """The place in the kernel's way of writing it."""
        if self.name is not None:
            return f"{self.name}+{self.offset:#x}"
        if self.pfn is not None:
            return f"{self.pfn:#x}"
        return f"pid {self.pid} address {self.address:#x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The handling of one report, from its arrival to its outcome."""

    event_id: str
    state: State
    outcome: Outcome
    victims: tuple[int, ...] = ()
    """Process ids of the clients whose data is gone."""
    latency_us: float = 0.0
    """From the report's arrival to the outcome."""
    name: str | None = None
    offset: int | None = None
    nbytes: int = 0
    reason: str = ""

    @property
    def already_poisoned(self) -> bool:
        """True if the page was known to be bad: the kernel's EHWPOISON."""
        return self.state is State.ALREADY_POISONED


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """What an owner is told of a loss. `offset` and `nbytes` are bytes of the object `name`.

    `source`: who found it. `time`: when it was lost, in seconds since the epoch. `reason`: where there is more to say.
    """

    event_id: str
    name: str
    offset: int
    nbytes: int
    state: State
    outcome: Outcome
    source: str
    time: float
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a manager can do on this machine.

    `recovery`: pages that fail are isolated, read again, and told. `system_calls`: one that meets a page which is not there
    waits for it, where it would else fail with EFAULT (`Memory.resident`). `poison_markers`: an access to what is lost is
    refused by the kernel itself, also in system calls. `reason`: why there is no recovery.
    """

    recovery: bool
    system_calls: bool
    poison_markers: bool
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of the event log. All events of one failure carry its `event_id`."""

    kind: str
    """`report`, `outcome`, `victim`, `notice`, `access`, `refill`, `repair`, `discard`, `error`, `kill`, `takeover`."""
    event_id: str = ""
    name: str = ""
    offset: int = -1
    nbytes: int = 0
    state: str = ""
    outcome: str = ""
    pid: int = 0
    detail: str = ""


def printable(text: str) -> str:
    """`text` without what would act on a terminal: names are given by programs and files."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def kernel_line(where: str, failure: Failure) -> str:
    """The kernel's log line for `failure`, with the event id that links it to the event log."""
    return (
        f"Memory failure: {printable(where)}: recovery action for {failure.state}: {failure.outcome}"
        f"{f' ({failure.reason})' if failure.reason else ''} [{failure.event_id}]"
    )
