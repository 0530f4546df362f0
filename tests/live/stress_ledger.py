"""The stress test's second opinion: what the event log, the results of reports and the received notices say together."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import hwpoison
from hwpoison import Failure, Outcome, State, events, protocol
from hwpoison.events import LoggedEvent

LOSSES = (State.ANONYMOUS, State.DIRTY_FILE)
ISOLATED = (State.ANONYMOUS, State.DIRTY_FILE, State.CLEAN_FILE)


class Listener:
    """One process that is told of losses: what the log says it was told, from its first marker on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.notices: list[list[object]] = []
        self.markers = 0


class Ledger:
    """Reads the log while it grows, and checks each event against what came before it. `own`: hears all from the start."""

    def __init__(self, manager: hwpoison.Manager) -> None:
        self._manager = manager
        self._last = 0
        self._lost: dict[tuple[str, int], str] = {}
        self._told: dict[str, tuple[list[int], list[int]]] = {}  # victims and notices, until the outcome
        self._outcomes: dict[str, tuple[LoggedEvent, tuple[int, ...]]] = {}
        self._accesses: set[tuple[int, str, int]] = set()
        self.own = Listener("this process")
        self._listeners = {os.getpid(): self.own}
        self.heard: list[Listener] = []
        self.counts: Counter[str] = Counter()
        self.states: Counter[str] = Counter()
        self.isolated = 0

    def collect(self) -> None:
        """Take up all events so far."""
        place = self._manager.connection.request(protocol.SyncLog(), protocol.LogPlace)
        checks: dict[str, Callable[[LoggedEvent], None]] = {
            "report": lambda event: None,
            "refill": lambda event: None,
            "takeover": lambda event: None,
            "victim": self._victim,
            "notice": self._notice,
            "access": self._access,
            "outcome": self._outcome,
            "repair": self._revival,
            "discard": self._revival,
            "error": self._error,
        }
        for event in events.read(Path(os.fsdecode(place.path)), after=self._last, instance=place.instance):
            self._last = event.id
            self.counts[event.kind] += 1
            assert event.kind in checks, f"nothing here should cause this: {event}"
            checks[event.kind](event)

    def _error(self, event: LoggedEvent) -> None:
        assert event.detail.startswith("the page stayed locked"), f"only a busy machine may be an error: {event}"

    def _victim(self, event: LoggedEvent) -> None:
        self._told.setdefault(event.event_id, ([], []))[0].append(event.pid)

    def _notice(self, event: LoggedEvent) -> None:
        self._told.setdefault(event.event_id, ([], []))[1].append(event.pid)
        listener = self._listeners.get(event.pid)
        if event.name.startswith("marker ") and event.pid != os.getpid():
            if listener is None or listener.name != event.name:
                # A process of that number has ended, and another one begins.
                listener = self._listeners[event.pid] = Listener(event.name)
                self.heard.append(listener)
            listener.markers += 1
        if listener is not None:
            listener.notices.append([event.event_id, event.name, event.offset])

    def _access(self, event: LoggedEvent) -> None:
        lost = self._lost.get((event.name, event.offset))
        assert lost == event.event_id, f"somebody was refused what was not lost, or lost by {lost}: {event}"
        self._accesses.add((event.pid, event.name, event.offset))

    def _outcome(self, event: LoggedEvent) -> None:
        self.states[event.state] += 1
        self.isolated += event.state in ISOLATED and event.outcome == Outcome.RECOVERED
        victims, notices = self._told.pop(event.event_id, ([], []))
        assert sorted(victims) == sorted(notices), f"the owners {victims} were told as {notices}: {event}"
        assert len(set(victims)) == len(victims), f"somebody was told twice: {event}"
        if event.state in LOSSES:
            assert event.outcome == Outcome.RECOVERED, event
            assert (event.name, event.offset) not in self._lost, f"lost while it was lost: {event}"
            self._lost[event.name, event.offset] = event.event_id
        else:
            assert not victims, f"nothing was lost, and somebody was told: {event}"
        assert event.event_id not in self._outcomes, f"a second outcome: {event}"
        self._outcomes[event.event_id] = event, tuple(sorted(victims))

    def _revival(self, event: LoggedEvent) -> None:
        lost = self._lost.pop((event.name, event.offset), None)
        assert lost == event.event_id, f"brought back what was lost by {lost}: {event}"

    # --- against what others know

    def check_failure(self, failure: Failure) -> None:
        """The result that the reporter got is what the log says. Forgets it: a long run has many."""
        logged, victims = self._outcomes.pop(failure.event_id)
        assert (logged.state, logged.outcome) == (failure.state, failure.outcome)
        assert (logged.name or None, logged.offset) == (failure.name, -1 if failure.offset is None else failure.offset)
        if failure.state is not State.ALREADY_POISONED:
            assert victims == failure.victims, (failure, victims)

    def was_refused(self, pid: int, name: str, offset: int) -> bool:
        """True if the process has touched the page while it was lost."""
        return (pid, name, offset) in self._accesses

    def check_notices(self, listener: Listener, received: Path, *, to_the_end: bool) -> None:
        """The process has received what was sent to it, in order and once each; all of it, if it went in order."""
        said = [json.loads(line) for line in received.read_bytes().split(b"\n") if line.endswith(b"]")]
        first = next((index for index, one in enumerate(said) if one[1] == listener.name), len(said))
        said = said[first:]
        assert said == listener.notices[: len(said)], f"{listener.name} was told something else than was logged"
        if to_the_end:
            assert listener.markers == 2, f"{listener.name} has not come to its end"
            last = max(index for index, one in enumerate(listener.notices) if one[1] == listener.name)
            assert len(said) > last, f"{listener.name} has not received {listener.notices[len(said) : last + 1]}"
