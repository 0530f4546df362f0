"""The cells that are explored: every state of a page with every pair of operations, beside a client that always works.

There are these matrices: `pairs` on one page (all, or those without what differs little from others), `apart`, what is not
done beside everything, `two_pages`, `deaths`, each operation by itself with the manager's death at every choice, `restarts`,
the same with another manager that takes over and may die too, `restart_pairs`, pairs with that, and `old_kernels`, pairs
again where there are no poison markers. `small` are cells in which reduction is compared with none.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import combinations_with_replacement

from hwpoison.simulation.explore import Cell, explore
from hwpoison.simulation.loop import Mode
from hwpoison.simulation.operations import OPERATIONS, applies
from hwpoison.simulation.scenario import Scenario

STATES = {
    "anonymous": ("absent", "present", "lost"),
    "read-only": ("absent", "present", "lost"),
    "writable": ("absent", "present", "dirty", "lost"),
    "cached": ("absent", "present", "dirty", "lost"),
}
"""What a page of each kind of object can be. What it can be in between is met on the way."""
BUDGETS: dict[str, tuple[tuple[str, int], ...]] = {
    "anonymous": (),
    "read-only": (("read fails", 1),),
    "writable": (("write fails", 1), ("sync fails", 1)),
    "cached": (("marker lost", 1),),
}
"""What may go wrong beside the operations, and how often in a run."""
VARIANTS = ("request to write half of", "hardware", "change", "collapse")
"""Operations that differ little from others. They are left out where time is short, with what little a cached file adds."""
AT_ONCE = {"absent": ("read", "read guarded", "attach", "evict")}
"""What has an absent page of a cached file read without waiting; a page that is there is evicted first. Without one of these
everything is as with a file that is not cached, schedule by schedule."""
APART = (
    "read guarded twice", "flush twice", "attach and flush", "frame report", "move", "read in a call",
    "request to write across", "lose elsewhere", "read while resident", "write while resident",
)  # fmt: skip
"""Operations that are explored beside a few others, and not in pairs with all of them."""


def _cells(variants: bool) -> Iterator[tuple[str, str, list[str]]]:
    """(kind, state, operations)."""
    for kind, states in STATES.items():
        operations = [one for one in OPERATIONS if applies(kind, one)]
        if kind == "cached":
            # What another one has lost may be what the worker has written since.
            operations.remove("lose elsewhere")
        if not variants:
            # A client that dies while it writes makes half of all schedules.
            left_out = (*VARIANTS, *APART, "die", *(("die reading",) if kind == "cached" else ()))
            operations = [one for one in operations if one not in left_out]
        elif "die" in operations:
            operations.remove("die reading")
        # What can be had at once from a cached file makes a difference where the page is absent.
        for state in states if variants or kind != "cached" else ("absent",):
            yield kind, state, operations


def pairs(*, misfortunes: bool = False, variants: bool = True) -> Iterator[Scenario]:
    """One page, in each state, with each pair of operations on it; `misfortunes`: one more thing may go wrong beside."""
    for kind, state, operations in _cells(variants):
        once = [one for one in operations if one not in APART]
        for first, second in combinations_with_replacement(once, 2):
            if kind == "cached" and not misfortunes and not {first, second}.intersection(AT_ONCE.get(state, ("evict",))):
                continue
            budget = BUDGETS[kind] if misfortunes else ()
            yield Scenario(kind, (state,), ((first, 0), (second, 0)), budget=budget)


def restart_pairs() -> Iterator[Scenario]:
    """As `pairs`, without a worker, and with what may go wrong: the manager dies, and another one takes over."""
    for one in pairs(misfortunes=True, variants=False):
        yield replace(one, worker=(), death=True, successors=1)


def old_kernels() -> Iterator[Scenario]:
    """As `pairs`, where the kernel has no poison markers (before 6.6): who touches what is lost is sent a signal."""
    for one in pairs(variants=False):
        yield replace(one, markers=False)


def apart() -> Iterator[Scenario]:
    """What is not explored in pairs with everything, and cells that are about something by themselves."""
    for kind, state, operations in _cells(variants=True):
        for operation in operations:
            if operation in APART:
                yield Scenario(kind, (state,), ((operation, 0),), budget=BUDGETS[kind])
        # A page moves to another frame beside what names it by its frame, and a call beside what takes it away.
        for first, second in (("frame report", "move"), ("frame report", "evict"), ("read in a call", "report")):
            yield Scenario(kind, (state,), ((first, 0), (second, 0)))
        if kind == "read-only":
            for beside in ("read", "read guarded", "report", "hardware", "evict", "prefetch", "discard"):
                yield Scenario(kind, (state,), (("lose elsewhere", 0), (beside, 0)))
        # Memory that is resident, beside what would take it away or watch it.
        residence = "write while resident" if applies(kind, "write while resident") else "read while resident"
        for beside in ("evict", "write back", "flush", "report", "discard", "truncate", "collapse", residence):
            if applies(kind, beside):
                yield Scenario(kind, (state,), ((residence, 0), (beside, 0)), worker=())
        yield Scenario(kind, (state,), ((residence, 0), (residence, 0), ("evict", 0)), worker=())
        # The last client goes: nobody else has the object.
        for operation in operations:
            if not operation.startswith("attach"):
                yield Scenario(kind, (state,), ((operation, 0), ("close", 0)), worker=(), budget=BUDGETS[kind])
        if state == "lost":
            # Where there are no poison markers, it is told by a signal, or ended.
            for sigbus in ("handled", "ignored", "blocked"):
                for operation in ("read", "read guarded", "write")[: 2 if kind == "read-only" else 3]:
                    yield Scenario(kind, (state,), ((operation, 0),), markers=False, sigbus=sigbus)
    yield from _gone_meanwhile()
    yield from _told()
    # What one has had read and what a change has made of it; a page that becomes unreadable under a request.
    yield Scenario("cached", ("absent",), (("read", 0), ("change", 0)))
    yield Scenario("cached", ("absent",), (("read", 0), ("lose elsewhere", 0)), worker=())
    for operation in ("request to write half of", "request to write across", "repair"):
        for beside in ("change", "truncate"):
            yield Scenario("writable", ("absent",), ((operation, 0), (beside, 0)), budget=(("read fails", 1),))
    # A window of several pages.
    for kind in ("read-only", "writable"):
        for beside in ("read", "report", "evict"):
            yield Scenario(kind, ("absent",) * 3, ((beside, 2),), worker=(), clients=((("read", 0), ("read", 1)),))
    # Without poison markers a signal is for an access that is not over.
    for first in ("read", "write"):
        yield Scenario("anonymous", ("present",), ((first, 0), ("report", 0), ("repair", 0)), worker=(), markers=False)
    # What is lost and what can't be written are told one by one.
    for one in BUDGETS["writable"]:
        yield Scenario("writable", ("dirty",), (("flush twice", 0), ("report", 0)), budget=(one,))
    # Of what was lost when its last client went, the next one is told.
    lost = (("report", 0), ("close", 0), ("attach and flush", 0))
    yield Scenario("writable", ("dirty",), lost, worker=())
    # A request that holds the only page that could make room for it.
    yield Scenario("writable", ("dirty", "absent"), (("request to write across", 0),), worker=(), limit=1)
    # What one page's write-back does to the reading of another, and that of one which others have changed.
    for first in ("flush", "write back"):
        yield Scenario("writable", ("dirty", "absent"), ((first, 0), ("read", 1)), worker=())
        yield Scenario("writable", ("dirty", "absent"), ((first, 0), ("change", 1), ("read", 1)), worker=())
    # A page that can't be written, beside others.
    for first in ("hardware", "kernel poison"):
        yield Scenario("writable", ("dirty", "dirty"), ((first, 1), ("flush", 0)), worker=())
    # Of a large frame that is given up, everybody is told.
    for kind in ("anonymous", "read-only"):
        yield Scenario(kind, ("present", "present"), (("report", 0), ("collapse", 0), ("read", 1)))
    # What changed in it is lost as that, and also what is on its way to the file.
    yield GIVEN_UP
    # A page moves between the moment at which it was found by its frame and that at which nobody has it locked.
    yield Scenario("writable", ("dirty",), (("flush", 0), ("frame report", 0), ("move", 0)), worker=())
    # A request for several pages holds them while it wants room.
    for kind, first in (("anonymous", "present"), ("writable", "dirty"), ("cached", "dirty")):
        for second in ("evict", "report", "write back", "discard", "flush"):
            if applies(kind, second):
                yield Scenario(kind, (first, "absent"), (("request to write across", 0), (second, 0)))


def _gone_meanwhile() -> Iterator[Scenario]:
    """The last client dies while it waits for what it has asked for."""
    requests = (
        "request to write", "request to write half of", "request to write across", "repair", "discard", "flush", "prefetch",
        "read while resident", "write while resident",
    )  # fmt: skip
    for kind, state, operations in _cells(variants=True):
        for request in requests:
            if request in operations:
                clients = (((request, 0), ("die", 0)),)
                yield Scenario(kind, (state,), (), worker=(), clients=clients, budget=BUDGETS[kind])
    yield Scenario("writable", ("absent", "absent"), (), worker=(), clients=((("request to write across", 0), ("die", 0)),))


def _told() -> Iterator[Scenario]:
    """Of what was lost, or could not be made durable, each handle is told once, and who comes later if nobody was."""
    budget = BUDGETS["writable"]
    for first, second in (("flush", "flush"), ("flush twice", "attach and flush"), ("repair", "attach and flush")):
        for state in ("dirty", "lost"):
            yield Scenario("writable", (state,), ((first, 0), (second, 0)), worker=(), budget=budget)


def two_pages() -> Iterator[Scenario]:
    """Two pages, both in each state, with an operation on each; the worker writes to the first and reads the second."""
    for kind, state, operations in _cells(variants=False):
        if kind == "cached":
            continue
        if state == "present":
            # Where all pages are there, they can become one large frame.
            operations.append("collapse")
        for first, second in combinations_with_replacement(operations, 2):
            yield Scenario(kind, (state, state), ((first, 0), (second, 1)), worker=(0, 1))


def deaths() -> Iterator[Scenario]:
    """One page, in each state, with each operation, and the manager's death at every choice."""
    for kind, state, operations in _cells(variants=True):
        for operation in operations:
            yield Scenario(kind, (state,), ((operation, 0),), death=True)


def restarts(successors: int = 1) -> Iterator[Scenario]:
    """As `deaths`, and another manager takes over; all but the last one may die too."""
    for one in deaths():
        if one.operations[0][0] == "lose elsewhere":
            continue  # A successor finds one object here.
        # What takes a page away may take its marker too.
        budget = (("marker lost", 1),) if one.operations[0][0] == "evict" else ()
        yield replace(one, successors=successors, budget=budget)
        if one.operations[0][0] in ("read while resident", "write while resident"):
            yield replace(one, operations=(*one.operations, ("evict", 0)), worker=(), successors=successors)
    # A client that has died before has left nothing behind.
    for one in _gone_meanwhile():
        budget = (("sync fails", 1),) if one.kind == "writable" and one.clients[0][0][0] == "flush" else ()
        yield replace(one, budget=budget, death=True, successors=successors)
    # Of what was lost before the death, whoever comes after it is told.
    told_later = (("report", 0), ("attach and flush", 0))
    yield Scenario("writable", ("dirty",), told_later, worker=(), death=True, successors=successors)
    # A sync that fails is told to whoever met it, and not again by the next manager.
    twice, fails = (("flush twice", 0),), (("sync fails", 1),)
    yield Scenario("writable", ("dirty",), twice, worker=(), budget=fails, death=True, successors=successors)
    # A death while a large frame is given up, of which each page is lost.
    for kind, state in (("writable", "dirty"), ("anonymous", "present")):
        for failure in ("report", "hardware"):
            operations = ((failure, 0), ("collapse", 1))
            clients = ((("write", 1), ("read", 1)),) if kind == "anonymous" else ()
            yield Scenario(kind, (state, state), operations, worker=(), clients=clients, death=True, successors=successors)
    # What the death in a write-back does to the reading of another page.
    for first in ("flush", "write back"):
        operations = ((first, 0), ("read", 1))
        yield Scenario("writable", ("dirty", "absent"), operations, worker=(), death=True, successors=successors)


GIVEN_UP = Scenario("writable", ("dirty", "present"), (("report", 1), ("collapse", 0), ("flush", 0)), worker=())
"""A large frame, in which there are changes beside the page that is struck."""
SMALL = (
    ("anonymous", "present", ("report", "read")),
    ("anonymous", "present", ("report", "report")),
    ("anonymous", "absent", ("read", "report")),
    ("read-only", "present", ("hardware", "read")),
    ("read-only", "present", ("hardware", "collapse")),
    ("anonymous", "present", ("report", "collapse")),
    ("anonymous", "present", ("read", "report", "read")),
    ("anonymous", "lost", ("discard", "report")),
    ("writable", "lost", ("read guarded",)),
    ("read-only", "absent", ("read", "change")),
    ("read-only", "absent", ("read", "report")),
    ("read-only", "absent", ("read", "report", "report")),
    ("writable", "dirty", ("flush", "report")),
    ("writable", "dirty", ("flush", "kernel poison")),
    ("writable", "present", ("kernel poison", "request to write half of")),
    ("read-only", "absent", ("lose elsewhere", "read")),
    ("anonymous", "lost", ("read", "read")),
    ("writable", "dirty", ("evict", "read")),
    ("writable", "dirty", ("flush twice",)),
    ("writable", "dirty", ("flush twice", "report")),
    ("writable", "dirty", ("write", "flush")),
    ("writable", "dirty", ("flush", "request to write", "flush")),
    ("writable", "dirty", ("flush", "frame report", "move")),
    ("writable", "dirty", ("report", "attach and flush")),
    ("writable", "dirty", ("close",)),
    ("writable", "dirty", ("write back", "close")),
    ("cached", "absent", ("read", "lose elsewhere")),
    ("writable", "lost", ("request to write half of",)),
    ("writable", "lost", ("repair", "read")),
    ("writable", "lost", ("repair", "flush")),
    ("writable", "absent", ("write", "report")),
    ("writable", "present", ("request to write", "flush")),
    ("cached", "absent", ("write", "read")),
    ("cached", "absent", ("read", "request to write")),
    ("cached", "present", ("evict", "read", "write")),
    ("read-only", "absent", ("read while resident", "evict")),
    ("read-only", "absent", ("read while resident", "read while resident", "evict")),
    ("writable", "dirty", ("write while resident", "flush")),
)
"""Kind, state and operations: on one page, and on the first and the second of two by turns."""
SMALL_DYING: tuple[tuple[str, tuple[str, ...], tuple[str, ...], tuple[tuple[str, int], ...]], ...] = (
    ("read-only", ("absent",), ("read",), ()),
    ("read-only", ("present",), ("report",), ()),
    ("anonymous", ("lost",), ("read",), ()),
    ("anonymous", ("lost",), ("repair", "read"), ()),
    ("writable", ("dirty",), ("flush",), ()),
    ("writable", ("dirty",), ("flush", "report"), ()),
    ("writable", ("dirty",), ("report", "attach and flush"), ()),
    ("writable", ("dirty",), ("flush", "write back"), (("sync fails", 1),)),
    ("writable", ("dirty", "absent"), ("write back", "read"), ()),
    ("writable", ("absent",), ("request to write",), ()),
    ("cached", ("present",), ("evict", "read"), BUDGETS["cached"]),
)
"""The same, with the state of each page and what may go wrong, the manager's death, and one that takes over."""


def small() -> Iterator[Scenario]:
    """Cells without a worker, in each of which little happens: they can be explored without any reduction."""
    for kind, state, operations in SMALL:
        for pages in (1, 2)[: len(operations)]:
            spread = tuple((one, number % pages) for number, one in enumerate(operations))
            yield Scenario(kind, (state,) * pages, spread, worker=(), budget=BUDGETS[kind])
    yield GIVEN_UP
    for kind, states, dying, budget in SMALL_DYING:
        spread = tuple((one, number % len(states)) for number, one in enumerate(dying))
        yield Scenario(kind, states, spread, worker=(), budget=budget, death=True, successors=1)
    # A window of two pages.
    yield Scenario("read-only", ("absent",) * 3, (), worker=(), clients=((("read", 0), ("read", 1)),))
    yield Scenario("anonymous", ("absent",), (), worker=(), clients=((("read while resident", 0), ("die", 0)),))
    for state in ("present", "dirty"):
        clients = ((("flush", 0), ("die", 0)),)
        budget = (("sync fails", 1),)
        yield Scenario("writable", (state,), (), worker=(), budget=budget, clients=clients, death=True, successors=1)
    # A death while a large frame is given up.
    given_up = (("report", 0), ("collapse", 1))
    yield Scenario("writable", ("dirty", "dirty"), given_up, worker=(), death=True, successors=1)


MATRICES: dict[str, Callable[[], Iterator[Scenario]]] = {
    "pairs": partial(pairs, variants=False),
    "all-pairs": pairs,
    "apart": apart,
    "two-pages": two_pages,
    "deaths": deaths,
    "restarts": restarts,
    "two-deaths": partial(restarts, 2),
    "restart-pairs": restart_pairs,
    "old-kernels": old_kernels,
}


def explore_all(
    scenarios: Iterable[Scenario],
    mode: Mode = "quiet",
    *,
    schedules_max: int | None = None,
    processes: int | None = None,
    progress: Callable[[Cell], None] | None = None,
) -> list[Cell]:
    """Explore each in a process of several; in the order of the scenarios."""
    wanted = list(scenarios)
    found: dict[int, Cell] = {}
    with workers(processes) as pool:
        tasks = {pool.submit(_explore, one, mode, schedules_max): number for number, one in enumerate(wanted)}
        for task in as_completed(tasks):
            cell = found[tasks[task]] = task.result()
            if progress is not None:
                progress(cell)
    return [found[number] for number in range(len(wanted))]


@contextmanager
def workers(processes: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """Processes that explore, one for each processor. Ctrl-C ends them with what they have begun, and no more."""
    pool = ProcessPoolExecutor(processes or os.cpu_count() or 1, initializer=_begin)
    try:
        yield pool
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def _begin() -> None:
    # Ctrl-C reaches all processes of a terminal; it is for the one that waits.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Worlds are cycles. What is there before is never garbage.
    gc.disable()
    gc.freeze()


def _explore(scenario: Scenario, mode: Mode, schedules_max: int | None) -> Cell:
    cell = explore(scenario, mode, schedules_max=schedules_max)
    gc.collect()
    return cell
