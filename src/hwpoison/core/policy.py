"""Who is told of a loss, when, and how; and what becomes of a client that cannot be told.

| the client's access to a lost page | with poison markers | without (kernels before 6.6) |
| --- | --- | --- |
| through a guarded view, guard open | recorded, then zeros; the guard raises | the same |
| SIGBUS handled or default | SIGBUS, address and code from the kernel | SIGBUS to the thread, address in its value |
| SIGBUS ignored or blocked | SIGBUS: the kernel forces it, the process ends | SIGKILL |
| in a system call, faults of which come to the manager (root) | EFAULT | SIGKILL: no signal gets in before the call ends |
| in a system call, of an unprivileged process | EFAULT | EFAULT |
| stopped | told when it goes on | told when it goes on |
| told before, and it touches again | SIGBUS again | SIGBUS again, SIGKILL after the limit |

`docs/last-resort.md` says the same for users; each row has its test.
"""

from __future__ import annotations

from hwpoison.core.books import Books
from hwpoison.core.machine import Telling
from hwpoison.core.mappings import Client, Mapping
from hwpoison.core.objects import Loss, MemoryObject
from hwpoison.core.records import Notice

TELL_LIMIT = 16
"""How often a thread is sent SIGBUS for one address before its process is killed: its handler does not help it."""


def tell_owners(books: Books, object_: MemoryObject, page: int, loss: Loss) -> tuple[int, ...]:
    """Tell each client that maps the page, once, that it is lost; their pids."""
    owners = owners_of(object_, page)
    notice = notice_of(object_, page, loss)
    for owner in owners.values():
        books.record("victim", object_, page, event_id=loss.event_id, pid=owner.pid)
        books.observer.notice(owner, notice)
    return pids_of(owners)


def notice_of(object_: MemoryObject, page: int, loss: Loss) -> Notice:
    """What is said of a loss."""
    name, offset, nbytes = object_.range_of(page)
    return Notice(
        event_id=loss.event_id, name=name, offset=offset, nbytes=nbytes, state=loss.state, outcome=loss.outcome,
        source=loss.source, time=loss.time, reason=loss.reason,
    )  # fmt: skip


def owners_of(object_: MemoryObject, page: int) -> dict[int, Client]:
    """The clients that map the page, by their numbers."""
    return {mapping.client.number: mapping.client for mapping in object_.mappings.covering(page)}


def pids_of(owners: dict[int, Client]) -> tuple[int, ...]:
    """Their processes."""
    return tuple(sorted({owner.pid for owner in owners.values()}))


async def answer_lost(books: Books, mapping: Mapping, page: int, thread: int) -> None:
    """A thread sleeps in an access to a lost, locked page. After this it may be woken."""
    object_ = mapping.object
    loss = object_.losses.get(page)
    books.statistics.accesses_to_lost += 1
    event_id = loss.event_id if loss else ""
    how = "guarded" if mapping.hits else ""
    books.record("access", object_, page, event_id=event_id, pid=mapping.client.pid, detail=how)
    address = mapping.address_of(page)
    with mapping.answering():
        if mapping.hits is not None:
            # The loss is recorded first, then looked whether a guard is still open: it closes in the opposite order, so
            # at least one of the two sees the other. Outside of all guards it is recorded for the next one, which clears
            # what is left here.
            mapping.met.append(page)
            books.journal.met(mapping)
            mapping.hits.hit()
            if mapping.hits.guarded:
                await mapping.client.space.show_zeros(address)
                return
        if books.machine.poison_markers:
            await _mark(mapping, page, address)
        elif mapping.still_sleeps(thread, page):
            signal_or_kill(books, mapping.client, address, thread, (object_, page), event_id)


async def met(mapping: Mapping, since: int, forget: int) -> tuple[list[int], int]:
    """The pages that a guarded view has shown as zeros since its count was `since`, and its count now.

    What was met before the count was `forget` nobody will ask for again. When this returns, all zeros that were counted are
    in the view, so that whoever takes them away finds them.
    """
    forget = min(forget - mapping.met_before, len(mapping.met))
    if forget > 0:
        del mapping.met[:forget]
        mapping.met_before += forget
    found = dict.fromkeys(mapping.met[max(since - mapping.met_before, 0) :])
    count = mapping.met_before + len(mapping.met)
    await mapping.answered()
    return list(found), count


async def _mark(mapping: Mapping, page: int, address: int) -> None:
    mapping.markers.add(page)
    if mapping.watched:
        # A write-protect marker stands where the poison marker must go.
        await mapping.client.space.unprotect(address, mapping.object.page_size)
    await mapping.client.space.poison(address)


def signal_or_kill(
    books: Books,
    client: Client,
    address: int,
    thread: int,
    place: tuple[MemoryObject, int] | None = None,
    event_id: str = "",
) -> None:
    """Fail this one access of a thread that sleeps in a fault, and leave nothing behind. After this it may be woken."""
    told = client.told.get((thread, address), 0)
    telling = client.space.telling(thread)
    if telling in (Telling.IGNORED, Telling.BLOCKED) or told >= TELL_LIMIT:
        why = f"SIGBUS is {telling.value}" if told < TELL_LIMIT else f"{TELL_LIMIT} SIGBUS did not help it"
        books.record("kill", *(place or ()), event_id=event_id, pid=client.pid, detail=why)
        client.space.kill()
    else:
        client.told[thread, address] = told + 1
        client.space.signal(thread, address)
