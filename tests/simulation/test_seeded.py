"""Large worlds by seed, their liveness phase, and the shrinking of runs that fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hwpoison.simulation.choices import Choices
from hwpoison.simulation.explore import run
from hwpoison.simulation.loop import Mode
from hwpoison.simulation.mutants import mutant, planted
from hwpoison.simulation.operations import CHANGES, REQUESTS, STORIES
from hwpoison.simulation.operations import OPERATIONS as OPERATIONS_OF_ANY
from hwpoison.simulation.runs import Replay, SavedRun, load
from hwpoison.simulation.scenario import Scenario
from hwpoison.simulation.seeded import CLIENTS, OPERATIONS, PAGES, run_many, run_seed, run_some, scenario, seed_of
from hwpoison.simulation.shrink import shrink

PLANTED = "the lock is kept on a cancelled wait"


@pytest.mark.parametrize(("mode", "runs"), [("quiet", 250), ("batch", 150)])
def test_large_worlds_end_well(mode: Mode, runs: int) -> None:
    done = run_some(1, range(runs), mode)
    assert done.failed == ()
    assert done.schedules == runs
    assert done.steps > 50 * runs


def test_what_happens_differs_from_seed_to_seed_and_is_as_much_as_it_should_be() -> None:
    worlds = [scenario(seed) for seed in range(200)]
    kinds = []
    for world in worlds:
        happens = [*world.operations, *[one for script in world.clients for one in script]]
        assert (len(world.states), len(world.clients), len(happens)) == (PAGES, CLIENTS, OPERATIONS)
        kinds.append({name for name, _ in happens})
    assert set().union(*kinds) == set(OPERATIONS_OF_ANY)
    for wanted in ("write", "read guarded", "attach", "close", "die", *REQUESTS, *STORIES, *CHANGES):
        assert any(wanted not in kind for kind in kinds), wanted


SAY = """
from hwpoison.simulation.seeded import run_seed, scenario
for seed in range(5):
    found = run_seed(seed)
    print(scenario(seed), found.choices.taken, found.world.loop.steps, [one.kind for one in found.world.events])
"""


def test_every_world_can_be_saved_and_told_again(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for number in range(500):
        world = scenario(seed_of(1, number))
        SavedRun(world, "quiet", (), (), "", ()).save(path)
        assert load(path).scenario == world


def test_the_same_seed_makes_the_same_run_whatever_the_hash_seed() -> None:
    said = {
        subprocess.run(
            [sys.executable, "-P", "-c", SAY], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


def test_each_of_many_runs_can_be_had_again_by_its_own_seed() -> None:
    own = seed_of(7, 3)
    assert seed_of(own, 0) == own
    assert len({seed_of(7, number) for number in range(1000)}) == 1000
    assert run_some(7, [3], "quiet").steps == run_seed(own).world.loop.steps


def test_several_processes_do_the_same_runs() -> None:
    together = run_many(7, 60, processes=2)
    alone = run_some(7, range(60), "quiet")
    assert (together.schedules, together.steps, together.failed) == (alone.schedules, alone.steps, alone.failed)


def test_in_the_end_everybody_looks_at_every_page_and_so_does_a_newcomer() -> None:
    found = run(Scenario("writable", ("absent", "lost"), (), (), clients=((("write", 0),), ()), settles_after=10), Choices())
    assert found.violation is None
    looks = [[(step.kind, step.page) for step in agent.script] for agent in found.world.agents]
    every = [("read", 0), ("read", 1)]
    assert looks == [[("write", 0), *every], every, [("attach", 0), *every]]
    assert all(agent.at == len(agent.script) for agent in found.world.agents)


def test_in_the_liveness_phase_nothing_goes_wrong_any_more() -> None:
    budget = (("read fails", 9), ("write fails", 9), ("sync fails", 9))
    clients = ((("write", 0), ("flush", 0), ("die", 0)),)
    world = Scenario("writable", ("absent",), (("report", 0), ("truncate", 0)), (), budget, clients, settles_after=0)
    for seed in range(20):
        found = run(world, Choices(seed=seed))
        assert found.violation is None
        assert found.world.failures == []
        assert not found.world.machine.went_wrong
        assert all(agent.process.alive for agent in found.world.agents)


def test_a_bad_frame_that_nobody_knows_of_is_known_in_the_end() -> None:
    clients = ((("read", 0),),)
    # The process that the kernel tells of the page dies before it can say so.
    world = Scenario(
        "anonymous", ("present",), (("kernel poison", 0),), (), (), (*clients, (("die", 0),)), settles_after=100
    )
    for seed in range(20):
        found = run(world, Choices(seed=seed))
        assert found.violation is None
        assert 0 in found.world.object.losses


def test_a_planted_defect_is_found_by_seed_and_its_run_shrunk_to_a_short_one_that_fails_the_same_way(tmp_path: Path) -> None:
    with planted(mutant(PLANTED)):
        from hwpoison.simulation import runs, seeded
        from hwpoison.simulation.choices import Choices as Mutated
        from hwpoison.simulation.explore import run as rerun

        done = seeded.run_some(0, range(60), "batch")
        assert done.failed
        # One that is long: there is something to take away.
        longest = [max(done.failed, key=lambda one: one.choices)]
        ((failed, saved), *_) = seeded.shrink_failed(longest, "batch")
        assert saved.violation.partition(":")[0] == failed.sentence.partition(":")[0]
        assert len(saved.choices) < failed.choices // 4
        assert sum(map(len, saved.scenario.clients)) + len(saved.scenario.operations) <= 6
        assert rerun(saved.scenario, Mutated(saved.choices), "batch").violation == saved.violation
        saved.save(tmp_path / "run.json")
        again = runs.Replay(runs.load(tmp_path / "run.json"))
        assert list(again.story())
        assert again.violation == saved.violation
        assert seeded.shrink_failed(longest, "batch") == [(failed, saved)]
    # Without the defect the same run can be told too: this is how it stays in the folder of what was found.
    well = Replay(load(tmp_path / "run.json"))
    assert list(well.story())
    assert well.violation is None


@pytest.mark.parametrize("choices", [(), (99,)], ids=["well", "diverges"])
def test_only_a_run_that_fails_can_be_shrunk(choices: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not end with: No lock is lost"):
        shrink(scenario(1), "quiet", choices, "No lock is lost: at all.")


FAIL = f"""
import multiprocessing, sys
from hwpoison.simulation.mutants import mutant, planted
multiprocessing.set_start_method("fork")
with planted(mutant({PLANTED!r})):
    from hwpoison.cli.explore import explore
    sys.exit(explore.main(sys.argv[1:], standalone_mode=False))
"""


def test_the_command_counts_finds_and_saves(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "hwpoison", "explore", "--seed", "1", "--runs", "60", "--json"]
    fine = subprocess.run(command, capture_output=True, text=True, check=False)
    assert fine.returncode == 0, fine.stderr
    document = json.loads(fine.stdout)
    assert (document["version"], document["seed"], document["runs"], document["schedules"]) == (1, 1, 60, 60)
    assert (document["violations"], document["found"]) == (0, [])
    assert document["schedules_per_second_and_core"] > 0
    assert "60 of 60 runs" in fine.stderr

    command = [sys.executable, "-P", "-c", FAIL, "--seed", "0", "--runs", "50", "--mode", "batch", "--save", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1, found.stderr
    assert "violations" in found.stdout
    saved = sorted(tmp_path.iterdir())
    assert saved
    assert all(load(one).violation and str(one) in found.stdout for one in saved)
