"""What the manager writes down for its successor: what can be found out in no other way. `core.takeover` reads it.

Which pages are there is known from the memory itself, and what else is known of each is in its flags, which outlive the
manager as the memory does. Here is the rest, a few hundred bytes for each object, client, mapping and loss. The rule is
that a thing is written down before it is done: of what is written and was not done, the successor can see that it was not.

| key | value |
| --- | --- |
| life | how many managers there were, and the name by which all their event ids begin |
| object, number | name, bytes, and of a file: offset, writable, version, how it was changed, is being written, place |
| errors, number | `MemoryObject.error_sequence` |
| syncing, object, number | runs of pages that a flush under way writes and makes durable; whether others wait for its sync |
| unsynced, object | `MemoryObject.unsynced`, where it is so |
| loss, object, page | the `Loss`, whether no flush has told of it, how it is about to be well again |
| client, number | its process |
| mapping, number | client, object, address, slot of the guarded view, `errors_apart`, `heir`, `error_seen` |
| met, mapping | the losses that a guarded view has shown: how many are forgotten, and the pages of the others |
| resident, mapping, number | first page, count, whether for writing (`core.residence`) |
| promised, who has asked | an object that it has been given, and will map |
| failure, event id | object, page, the state that it was found in, how it was isolated, the report, who has asked |
| answer, who has asked | the `Failure` of a report, until the reply is sent |
| counted | statistics of failures |
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from hwpoison.core.machine import Identity, Key, Records
from hwpoison.core.records import Failure, Outcome, Report, State

if TYPE_CHECKING:
    from hwpoison.core.accounting import Statistics
    from hwpoison.core.mappings import Client, Mapping
    from hwpoison.core.objects import Loss, MemoryObject

AskedBy = tuple[int, int]
"""A client's request: the number of its session, and the request's own."""


class Journal:
    """Writes it all down in `records`."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self._put, self._drop = records.put, records.drop

    def together(self) -> AbstractContextManager[None]:
        """What is written within is written as one, or not at all."""
        return self.records.together()

    def require(self) -> None:
        """Raises MemoryError if there is no room for what is about to begin."""
        self.records.require()

    # --- objects

    def object(self, object_: MemoryObject) -> None:
        """It is there, or its file is in another version."""
        backing = object_.backing
        file = backing and [
            backing.offset,
            backing.writable,
            backing.identity and list(backing.identity),
            backing.changed,
            backing.writing,
            list(backing.place),
        ]
        self._put(("object", object_.number), [object_.name, object_.nbytes, file, object_.persistent])

    def object_ended(self, object_: MemoryObject) -> None:
        with self.together():
            self._drop(("object", object_.number))
            self._drop(("errors", object_.number))
            for page in object_.losses:
                self._drop(("loss", object_.number, page))

    def errors(self, object_: MemoryObject) -> None:
        """There are more of them."""
        if object_.closed:
            return
        self._put(("errors", object_.number), object_.error_sequence)

    def syncing(self, object_: MemoryObject, number: int, runs: list[tuple[int, int]], *, others: bool = False) -> None:
        """Pages are about to be written and made durable; `others`: more than these wait for the sync that comes now. If it
        fails, nobody else is told of it."""
        if not object_.closed:
            self._put(("syncing", object_.number, number), [[list(one) for one in runs], others])

    def unsynced(self, object_: MemoryObject) -> None:
        """Something is about to be written to make room: what becomes of it, a sync will say."""
        self._put(("unsynced", object_.number), True)

    def syncs(self, object_: MemoryObject) -> None:
        """That sync begins, and has a record of its own."""
        self._drop(("unsynced", object_.number))

    def synced(self, object_: MemoryObject, number: int) -> None:
        """What has become of it is in the flags of the pages."""
        self._drop(("syncing", object_.number, number))

    # --- losses

    def loss(self, object_: MemoryObject, page: int, loss: Loss, *, untold: bool, reviving: str = "") -> None:
        """The page is lost; `reviving`: it is about to get other content, by a "repair" or "discard"."""
        why = [loss.event_id, loss.state.value, loss.outcome.value, loss.reason, loss.source, loss.time]
        value = [*why, untold, reviving]
        self._put(("loss", object_.number, page), value)

    def loss_over(self, object_: MemoryObject, page: int) -> None:
        """It was repaired or discarded, and nobody has a poison marker there."""
        self._drop(("loss", object_.number, page))

    def losses_told(self, object_: MemoryObject) -> None:
        """A flush has told of all of them."""
        for page in object_.untold:
            self.loss(object_, page, object_.losses[page], untold=False)

    # --- clients

    def client(self, client: Client) -> None:
        self._put(("client", client.number), client.pid)

    def client_gone(self, client: Client) -> None:
        self._drop(("client", client.number))

    def mapping(self, mapping: Mapping) -> None:
        """It is there, or what its flush has to tell is another."""
        if mapping.gone:
            return
        slot = -1 if mapping.hits is None else mapping.hits.index
        self._put(("mapping", mapping.number), [
            mapping.client.number, mapping.object.number, mapping.address, slot, mapping.errors_apart, mapping.heir,
            mapping.error_seen,
        ])  # fmt: skip

    def mapping_gone(self, mapping: Mapping) -> None:
        self._drop(("mapping", mapping.number))
        if mapping.hits is not None:
            self._drop(("met", mapping.number))

    def resident(self, mapping: Mapping, number: int) -> None:
        """A range is resident from now on, by the client's number for it."""
        self._put(("resident", mapping.number, number), list(mapping.resident[number]))

    def resident_over(self, mapping: Mapping, number: int) -> None:
        self._drop(("resident", mapping.number, number))

    def promised(self, asked_by: AskedBy, object_: MemoryObject) -> None:
        """A client has been given the object, and will map it."""
        self._put(("promised", *asked_by), object_.number)

    def promise_over(self, asked_by: AskedBy) -> None:
        self._drop(("promised", *asked_by))

    def met(self, mapping: Mapping) -> None:
        """A guarded view is shown one more loss."""
        if mapping.gone:
            return
        self._put(("met", mapping.number), [mapping.met_before, list(mapping.met)])

    # --- failures

    def failure(
        self,
        event_id: str,
        object_: MemoryObject,
        page: int,
        report: Report,
        asked_by: AskedBy | None,
        *,
        state: str = "",
        isolated: str = "",
    ) -> None:
        """It is being handled. With `state`, the page was found in that, and may be isolated by now; `isolated`: it is, with
        that outcome."""
        value = [object_.number, page, state, isolated, list(_of_report(report)), asked_by and list(asked_by)]
        self._put(("failure", event_id), value)

    def failure_over(self, failure: Failure, asked_by: AskedBy | None, statistics: Statistics) -> None:
        """It was handled. To be called together with what is said of it."""
        self._drop(("failure", failure.event_id))
        self._put(("counted",), [dict(statistics.outcomes), dict(statistics.states), statistics.accesses_to_lost])
        if asked_by is not None:
            self._put(("answer", *asked_by), plain(failure))

    def answered(self, asked_by: AskedBy) -> None:
        """The reply is sent."""
        self._drop(("answer", *asked_by))


# `dataclasses.astuple` would copy every value, deeply.
_of_report = attrgetter(*(one.name for one in fields(Report)))
_of_failure = attrgetter(*(one.name for one in fields(Failure)))


def plain(failure: Failure) -> list[Any]:
    """As `failure_of` has it."""
    values = list(_of_failure(failure))
    values[3] = list(failure.victims)
    return values


def failure_of(value: list[Any]) -> Failure:
    """From its plain value."""
    event_id, state, outcome, victims, latency, name, offset, nbytes, reason = value
    return Failure(
        event_id=event_id, state=State(state), outcome=Outcome(outcome), victims=tuple(victims), latency_us=latency,
        name=name, offset=offset, nbytes=nbytes, reason=reason,
    )  # fmt: skip


def report_of(value: list[Any]) -> Report:
    """From its plain value."""
    name, offset, pfn, pid, address, source, action_required = value
    return Report(
        name=name, offset=offset, pfn=pfn, pid=pid, address=address, source=source, action_required=action_required
    )


def identity_of(value: list[int] | None) -> Identity | None:
    """From its plain value."""
    return None if value is None else Identity(*value)


def of_kind(records: dict[Key, Any], kind: str) -> dict[Key, Any]:
    """The records whose key begins so, by the rest of it, in its order."""
    return dict(sorted((key[1:], value) for key, value in records.items() if key[0] == kind))
