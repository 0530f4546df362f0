"""What the explorer finds, and that what it leaves out makes no difference."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from hwpoison.simulation.choices import Choices, DivergedError
from hwpoison.simulation.explore import explore
from hwpoison.simulation.fingerprint import LOOKED_AT, THE_SAME, Fingerprint
from hwpoison.simulation.hunt import compare_all, hunt_all
from hwpoison.simulation.matrix import BUDGETS, STATES
from hwpoison.simulation.mutants import FAULTS, MUTANTS, RECOVERY, Mutant, planted
from hwpoison.simulation.runs import Replay, SavedRun, load, named
from hwpoison.simulation.scenario import Scenario
from hwpoison.simulation.world import World

FOUND = Path(__file__).parent / "found"


def cell(kind: str, state: str, *operations: str, worker: tuple[int, ...] = (0,)) -> Scenario:
    return Scenario(kind, (state,), tuple((one, 0) for one in operations), worker, BUDGETS[kind])


SINGLE = [cell(kind, state, "report") for kind, states in STATES.items() for state in states]


@pytest.mark.parametrize("scenario", SINGLE, ids=str)
def test_a_report_beside_a_working_client_ends_well_in_every_order(scenario: Scenario) -> None:
    found = explore(scenario)
    assert found.violation is None
    assert found.complete


@pytest.mark.parametrize("mode", ["quiet", "batch"])
def test_plain_search_and_hashing_agree_where_plain_search_ends(mode: str) -> None:
    for scenario in (
        cell("anonymous", "present", "report"),
        cell("read-only", "absent", "report"),
        cell("read-only", "present", "evict"),
        cell("anonymous", "lost", "repair"),
    ):
        plain = explore(scenario, mode, hashing=False)  # type: ignore[arg-type]
        hashed = explore(scenario, mode)  # type: ignore[arg-type]
        assert plain.complete
        assert hashed.complete
        assert plain.violation is hashed.violation is None
        assert hashed.schedules <= plain.schedules


def test_what_is_left_out_makes_no_difference_for_some_of_what_may_be_wrong() -> None:
    # `make soak` has all of it; here some mutants in the smallest cells are enough to see that it works.
    comparisons = list(compare_all(schedules_max=60, names=[one.name for one in MUTANTS[::9]]))
    assert [one for one in comparisons if not one.equal] == []
    assert any(one.plain for one in comparisons)
    assert sum(not one.plain for one in comparisons) > 50


@pytest.mark.soak
def test_what_is_left_out_makes_no_difference_whatever_is_wrong() -> None:
    comparisons = list(compare_all(schedules_max=250))
    # A few show only in cells that are larger.
    shown = [one.name for one in comparisons if one.plain]
    comparisons += compare_all(schedules_max=2000, names=[one.name for one in MUTANTS if one.name not in shown])
    assert [one for one in comparisons if not one.equal] == []
    # Each mutant shows in one of the cells at least, so the searches had something to miss.
    assert {one.name for one in comparisons if one.plain} == {one.name for one in MUTANTS}
    assert sum(not one.plain for one in comparisons) > 500


def test_with_sleep_sets_the_same_states_are_met_in_fewer_ways() -> None:
    fewer = 0
    for operations in (("request to write", "report"), ("flush", "evict"), ("discard", "kernel poison"), ("write", "read")):
        scenario = Scenario("writable", ("dirty", "dirty"), tuple(zip(operations, (0, 1), strict=True)), worker=(0, 1))
        every = explore(scenario, sleeping=False)
        some = explore(scenario, sleeping=True)
        assert every.complete
        assert some.complete
        assert every.states == some.states
        fewer += every.schedules - some.schedules
    assert fewer


COUNT = """
import sys
from itertools import islice
from hwpoison.simulation.explore import explore
from hwpoison.simulation.matrix import pairs
found = [explore(one) for one in islice(pairs(variants=False), 0, None, int(sys.argv[1]))]
print(sys.version_info[:2], [(one.schedules, one.steps, one.states) for one in found])
"""
SOURCE = Path(__file__).parents[2] / "src"


def interpreters() -> list[str]:
    """This one, and others of Python 3.11 to 3.13 where they are installed."""
    candidates = [f"python3.{minor}" for minor in (11, 12, 13)]
    candidates += map(str, sorted(Path.home().glob(".pyenv/versions/3.1[123].*/bin/python3")))
    found = {sys.version_info[:2]: sys.executable}
    for candidate in candidates:
        if (path := shutil.which(candidate)) is None:
            continue
        asked = subprocess.run(
            [path, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True, check=False
        )
        # A name may be there without the interpreter behind it.
        if asked.returncode == 0:
            found.setdefault(tuple(map(int, asked.stdout.split())), path)  # type: ignore[arg-type]
    return list(found.values())


def counts(interpreter: str, seed: str, stride: int) -> tuple[str, str]:
    """(version, what was counted) for every so many cells of the matrix."""
    environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [interpreter, "-c", COUNT, str(stride)], env=environment, capture_output=True, text=True, check=True
    )
    version, _, counted = done.stdout.partition(") ")
    return version, counted


def same_everywhere(stride: int) -> None:
    wanted = [(interpreter, "1") for interpreter in interpreters()] + [(sys.executable, "2")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda one: counts(*one, stride), wanted))
    assert len({counted for _, counted in found}) == 1, [version for version, _ in found]


def test_the_same_is_explored_whatever_the_interpreter_and_the_hash_seed() -> None:
    same_everywhere(stride=50)


@pytest.mark.soak
def test_the_same_is_explored_in_the_whole_matrix() -> None:
    same_everywhere(stride=1)


def test_every_planted_defect_is_found() -> None:
    assert [one.name for one in hunt_all() if not one.caught] == []


BUSY = Mutant(
    "", "", "it is waited for what never comes, busily", RECOVERY,
    "    await make_room(books, object_, count)\n    with",
    "    import asyncio\n    while True:\n        await asyncio.sleep(0)\n    with",
)  # fmt: skip
WOKEN = Mutant(
    "", "", "who meets an absent page is woken, and meets it again", FAULTS,
    "        else:\n            # While this waited", "        elif window > 999:\n            # While this waited",
)  # fmt: skip


@pytest.mark.parametrize(("mutant", "steps_max"), [(BUSY, 150), (WOKEN, 50)], ids=["without a choice", "at a choice"])
def test_a_state_that_comes_again_is_reported_at_once(mutant: Mutant, steps_max: int, tmp_path: Path) -> None:
    with planted(mutant):
        from hwpoison.simulation import explore as planted_explore
        from hwpoison.simulation import runs as planted_runs

        scenario = cell("read-only", "absent", "close")
        found = planted_explore.explore(scenario)
        assert found.violation is not None
        assert found.violation.sentence == planted_explore.LIVELOCK
        assert found.steps / found.schedules < steps_max
        saved = planted_runs.named(scenario, "quiet", tuple(found.violation.choices))
        assert saved.violation == planted_explore.LIVELOCK
        saved.save(tmp_path / "run.json")
        again = planted_runs.Replay(planted_runs.load(tmp_path / "run.json"))
        assert list(again.story())
        assert again.violation == planted_explore.LIVELOCK


def test_a_run_is_told_again_as_it_was(tmp_path: Path) -> None:
    scenario = cell("writable", "dirty", "report", "flush")
    saved = named(scenario, "quiet", (2,))
    assert not saved.violation
    path = tmp_path / "run.json"
    saved.save(path)
    assert load(path) == saved
    again = Replay(load(path))
    story = list(again.story())
    assert again.violation is None
    assert any("poisoned, lost" in line for line in story)
    assert story == list(Replay(saved).story())


def test_a_run_that_meets_another_choice_diverges() -> None:
    saved = named(cell("writable", "dirty", "report", "flush"), "quiet", (1, 0, 1))
    other = SavedRun(saved.scenario, saved.mode, saved.choices, ("something else", *saved.names[1:]), "", saved.widths)
    with pytest.raises(DivergedError, match="diverged at choice 0"):
        list(Replay(other).story())
    wider = replace(saved, widths=(saved.widths[0] + 1, *saved.widths[1:]))
    with pytest.raises(DivergedError, match="diverged at choice 0"):
        list(Replay(wider).story())
    wide = SavedRun(saved.scenario, saved.mode, (99, *saved.choices[1:]), saved.names, "", saved.widths)
    with pytest.raises(DivergedError, match="diverged at choice 0"):
        list(Replay(wide).story())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', "no json"])
def test_what_is_no_run_is_said_so(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no run of format 1"):
        load(path)


@pytest.mark.parametrize(
    ("where", "wrong"),
    [(("scenario", "states"), []), (("scenario", "states"), ["gone"]), (("choices", 0), -1), (("names",), []),
     (("scenario", "limit"), -1), (("scenario", "marker"), False), (("widths",), []), (("choice",), 1),
     (("scenario", "operations", 0, 1), 10**30), (("scenario", "operations", 0, 0), "explode"), (("mode",), "loud")],
)  # fmt: skip
def test_a_run_that_cannot_be_is_refused(where: tuple[str | int, ...], wrong: object, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    document = json.loads((FOUND / "torn-discard.json").read_text())
    place = document
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = wrong
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="is no run of format 1"):
        load(path)


@pytest.mark.parametrize(
    ("scenario", "said"),
    [
        (Scenario("anonymous", ("present",) * 3, (("read", 0),), limit=2), "3 pages within 2"),
        (
            Scenario("writable", ("present",), (), clients=((("write while resident", 0), ("read guarded", 0)),)),
            "writes and guards",
        ),
    ],
)
def test_a_world_that_cannot_be_is_refused(scenario: Scenario, said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    SavedRun(scenario, "quiet", (), (), "", ()).save(path)
    with pytest.raises(ValueError, match=said):
        load(path)


@pytest.mark.parametrize("path", sorted(FOUND.glob("*.json")), ids=lambda path: path.stem)
def test_what_was_found_once_holds_now(path: Path) -> None:
    saved = load(path)
    assert saved.violation
    # It must still be told to its end: where it diverges, it is to be found and written down anew.
    again = Replay(saved)
    assert list(again.story())
    assert again.violation is None


def test_all_that_an_object_and_a_manager_have_is_part_of_the_fingerprint_or_makes_no_difference() -> None:
    world = World(cell("writable", "dirty", "report"), Choices(()))
    for one in (world.object, world.manager, world.expectation, world.agents[0]):
        name = type(one).__name__
        assert sorted(vars(one)) == sorted(LOOKED_AT[name] + THE_SAME[name])


def test_what_is_resident_or_promised_makes_another_state() -> None:
    def value() -> int:
        return Fingerprint(world).value()

    world = World(cell("writable", "present", "evict"), Choices(()))
    mapping = next(iter(world.object.mappings))
    seen = [value()]
    world.object.resident[0] += 1
    seen.append(value())
    mapping.resident[1] = (0, 1, True)
    seen.append(value())
    world.manager.promises[1, 2] = world.object
    seen.append(value())
    mapping.gone = True
    seen.append(value())
    assert len(set(seen)) == len(seen)
