"""What the explorer finds, and that what it leaves out makes no difference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hwpoison.simulation.choices import DivergedError
from hwpoison.simulation.explore import explore
from hwpoison.simulation.hunt import hunt
from hwpoison.simulation.matrix import BUDGETS, STATES, pairs
from hwpoison.simulation.mutants import MUTANTS
from hwpoison.simulation.runs import Replay, SavedRun, load, named
from hwpoison.simulation.scenario import Scenario

FOUND = Path(__file__).parent / "found"


def cell(kind: str, state: str, *operations: str, worker: tuple[int, ...] = (0,)) -> Scenario:
    return Scenario(kind, (state,), tuple((one, 0) for one in operations), worker, BUDGETS[kind])


SINGLE = [cell(kind, state, "report") for kind, states in STATES.items() for state in states]


@pytest.mark.parametrize("scenario", SINGLE, ids=str)
def test_a_report_beside_a_working_client_ends_well_in_every_order(scenario: Scenario) -> None:
    found = explore(scenario)
    assert found.violation is None
    assert found.complete


def test_the_pairs_are_every_state_with_every_pair_of_operations() -> None:
    scenarios = list(pairs())
    assert len({str(one) for one in scenarios}) == len(scenarios) > 1500


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


COUNT = """
from hwpoison.simulation.explore import explore
from hwpoison.simulation.scenario import Scenario
found = [explore(Scenario(kind, (state,), (("report", 0), ("die", 0)))) for kind, state in
         (("anonymous", "present"), ("writable", "dirty"), ("read-only", "absent"))]
print([(one.schedules, one.steps, one.states) for one in found])
"""


def test_the_same_is_explored_whatever_the_hash_seed() -> None:
    counts = {
        subprocess.run(
            [sys.executable, "-P", "-c", COUNT], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(counts) == 1, counts


@pytest.mark.parametrize("name", [one.name for one in MUTANTS])
def test_every_planted_defect_is_found(name: str) -> None:
    found = hunt(name)
    assert found.caught


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
    other = SavedRun(saved.scenario, saved.mode, saved.choices, ("something else", *saved.names[1:]), "")
    with pytest.raises(DivergedError, match="diverged at choice 0"):
        list(Replay(other).story())
    wide = SavedRun(saved.scenario, saved.mode, (99, *saved.choices[1:]), saved.names, "")
    with pytest.raises(DivergedError, match="diverged at choice 0"):
        list(Replay(wide).story())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', "no json"])
def test_what_is_no_run_is_said_so(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no run of format 1"):
        load(path)


@pytest.mark.parametrize("path", sorted(FOUND.glob("*.json")), ids=lambda path: path.stem)
def test_what_was_found_once_holds_now(path: Path) -> None:
    saved = load(path)
    assert saved.violation
    # It must still be told to its end: where it diverges, it is to be found and written down anew.
    again = Replay(saved)
    assert list(again.story())
    assert again.violation is None
