"""Counters, and the door through which the core says what happened. Nothing here decides anything."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Protocol

from hwpoison.core.records import Event, Failure, Notice

if TYPE_CHECKING:
    from hwpoison.core.mappings import Client


class Observer(Protocol):
    """Who listens to the core. No method may wait for anything."""

    def event(self, event: Event) -> None:
        """Something happened that belongs into the event log."""

    def notice(self, client: Client, notice: Notice) -> None:
        """`client` must be told of a loss."""

    def failure(self, where: str, failure: Failure) -> None:
        """A report was handled."""

    def defect(self, what: str, error: BaseException) -> None:
        """Our own code failed; whoever waited was answered in the safe way."""


class Statistics:
    """What has happened since the manager started."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.states: Counter[str] = Counter()
        self.faults = 0
        self.pages_read = 0
        self.pages_written = 0
        self.pages_dropped = 0
        self.accesses_to_lost = 0
        self.quarantined = 0

    def count(self, failure: Failure) -> None:
        """One more failure. A page that was already poisoned was counted when it became so."""
        self.states[failure.state.value] += 1
        if not failure.already_poisoned:
            self.outcomes[failure.outcome.value] += 1
