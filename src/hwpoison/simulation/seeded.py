"""Large worlds by seed: several clients, more pages, many operations, too many orders to try them all.

One integer makes a world and answers its choices. A run has a random part of all that can happen (a swarm: what is left out
makes room for the rest), and ends with a liveness phase. What is drawn here, and in which order, decides what a seed means:
runs worth keeping are kept as files, not as seeds.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass

from hwpoison.simulation.choices import Choices
from hwpoison.simulation.explore import Run, run
from hwpoison.simulation.loop import Mode
from hwpoison.simulation.matrix import STATES, workers
from hwpoison.simulation.operations import CHANGES, INNER, REQUESTS, STORIES, applies
from hwpoison.simulation.runs import SavedRun
from hwpoison.simulation.scenario import Operation, Scenario
from hwpoison.simulation.shrink import kind_of, shrink

CLIENTS = 4
PAGES = 8
OPERATIONS = 30
FAULTS = ("read fails", "write fails", "sync fails", "marker lost")
FAULTS_MAX = 3
"""Most of each in a run."""
SETTLES_AFTER = (40, 400)
"""After how many steps the liveness phase begins, where the rest is not done before."""
BATCH = 50
"""Runs that a process does before it says what came of them."""
SHRUNK_MAX = 5
"""So many different failures are shrunk."""


# --- a world -----------------------------------------------------------------------------------------------------------


def scenario(seed: int) -> Scenario:
    """The world of this seed."""
    chance = random.Random(seed)
    kind = chance.choice(tuple(STATES))
    pages = _pages(chance)
    accesses = ("read", "read", "write", "write", "read in a call", "read while resident", "write while resident")
    plain = [one for one in accesses if applies(kind, one)]
    asked = _some(chance, kind, (*[one for one in REQUESTS if one not in INNER], "flush twice"))
    befalls = _some(chance, kind, (*STORIES, *CHANGES))
    clients: list[list[Operation]] = [[] for _ in range(CLIENTS)]
    # A client whose views are guarded has no other mapping here.
    does = [
        ["read guarded", "read guarded twice", *asked] if chance.random() < 0.25 else [*plain, *plain, *asked]
        for _ in clients
    ]
    leaving = chance.choice((0.1, 0.4, 1.0))
    dying = "die" if applies(kind, "die") else "die reading"
    ends = [chance.choice(("close", dying)) if chance.random() < leaving else "" for _ in clients]
    coming = [one for one in ("attach", "attach and flush") if applies(kind, one)]
    operations: list[Operation] = []
    for script in clients:
        if chance.random() < 0.2:
            script.append((chance.choice(coming), pages()))
    for _ in range(OPERATIONS - sum(map(len, clients)) - sum(map(bool, ends))):
        if befalls and chance.random() < 0.4:
            operations.append((chance.choice(befalls), pages()))
        else:
            number = chance.randrange(CLIENTS)
            clients[number].append((chance.choice(does[number]), pages()))
    for script, end, choices in zip(clients, ends, does, strict=True):
        if end:
            # One that dies while it writes has an ordinary view.
            script.append(("die reading" if end == "die" and "read guarded" in choices else end, 0))
    return Scenario(
        kind,
        _states(chance, kind),
        tuple(operations),
        worker=(),
        budget=() if kind == "anonymous" else _budget(chance),
        clients=tuple(map(tuple, clients)),
        settles_after=chance.randint(*SETTLES_AFTER),
    )


def _pages(chance: random.Random) -> Callable[[], int]:
    """Most happens on a few pages, so that it meets."""
    hot = chance.sample(range(PAGES), chance.choice((1, 2, 3, PAGES)))
    return lambda: chance.choice(hot) if chance.random() < 0.9 else chance.randrange(PAGES)


def _some(chance: random.Random, kind: str, names: Sequence[str]) -> list[str]:
    share = chance.choice((0.3, 0.6, 1.0))
    return [one for one in names if applies(kind, one) and chance.random() < share]


def _states(chance: random.Random, kind: str) -> tuple[str, ...]:
    # A large frame is made only where all pages of a unit are present.
    states = chance.choice((STATES[kind], STATES[kind], STATES[kind][1:], ("present",)))
    return tuple([chance.choice(states) for _ in range(PAGES)])


def _budget(chance: random.Random) -> tuple[tuple[str, int], ...]:
    return tuple([(one, chance.randint(1, FAULTS_MAX)) for one in FAULTS if chance.random() < 0.4])


# --- many of them ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Failed:
    """A run that has failed: its own seed, the sentence that did not hold, how many choices it took."""

    seed: int
    sentence: str
    choices: int


@dataclass(frozen=True, slots=True)
class Done:
    """What came of some runs, or of all. `seconds` are those of a processor, all processes together."""

    schedules: int
    steps: int
    seconds: float
    failed: tuple[Failed, ...]

    def __add__(self, other: Done) -> Done:
        return Done(
            self.schedules + other.schedules,
            self.steps + other.steps,
            self.seconds + other.seconds,
            self.failed + other.failed,
        )


NOTHING_DONE = Done(0, 0, 0.0, ())


def seed_of(seed: int, number: int) -> int:
    """The seed of one of many runs. The first run's is the seed itself, so each can be had again by its own."""
    return random.Random(f"{seed} {number}").getrandbits(48) if number else seed


def run_seed(seed: int, mode: Mode = "quiet") -> Run:
    """The run of this seed."""
    return run(scenario(seed), Choices(seed=seed), mode)


def run_some(seed: int, numbers: Sequence[int], mode: Mode) -> Done:
    """The runs of these numbers, one after the other."""
    schedules = steps = 0
    failed = []
    started = time.process_time()
    for number in numbers:
        own = seed_of(seed, number)
        found = run_seed(own, mode)
        schedules += 1
        steps += found.world.loop.steps
        if found.violation is not None:
            failed.append(Failed(own, found.violation, len(found.choices.taken)))
        del found
        gc.collect(0)
    gc.collect()
    return Done(schedules, steps, time.process_time() - started, tuple(failed))


def run_many(
    seed: int,
    runs: int,
    mode: Mode = "quiet",
    *,
    processes: int | None = None,
    progress: Callable[[Done], None] | None = None,
) -> Done:
    """All runs of `seed`, in several processes; those that have failed in the order of their numbers."""
    batches = [range(first, min(first + BATCH, runs)) for first in range(0, runs, BATCH)]
    found: dict[int, Done] = {}
    total = NOTHING_DONE
    with workers(processes) as pool:
        tasks = {pool.submit(run_some, seed, batch, mode): number for number, batch in enumerate(batches)}
        for task in as_completed(tasks):
            done = found[tasks[task]] = task.result()
            total += done
            if progress is not None:
                progress(total)
    return sum([found[number] for number in range(len(batches))], NOTHING_DONE)


def shrink_failed(failed: Sequence[Failed], mode: Mode) -> list[tuple[Failed, SavedRun]]:
    """The first of each kind, as short as it can be made."""
    first: dict[str, Failed] = {}
    for one in failed:
        first.setdefault(kind_of(one.sentence), one)
    found = []
    for one in list(first.values())[:SHRUNK_MAX]:
        again = run_seed(one.seed, mode)
        found.append((one, shrink(scenario(one.seed), mode, again.choices.taken, one.sentence)))
    return found
