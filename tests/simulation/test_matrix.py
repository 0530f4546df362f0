"""Every state of a page with every pair of operations, beside a client that always works, in every order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

import pytest

from hwpoison.simulation.explore import explore
from hwpoison.simulation.matrix import APART, STATES, apart, deaths, explore_all, old_kernels, pairs, restarts, two_pages
from hwpoison.simulation.operations import OPERATIONS, applies
from hwpoison.simulation.scenario import Scenario


def explored(scenarios: Iterable[Scenario]) -> int:
    """How many cells there are, all of which end well in every order."""
    cells = explore_all(scenarios)
    assert [(cell.scenario, cell.violation.sentence) for cell in cells if cell.violation is not None] == []
    assert [cell.scenario for cell in cells if not cell.complete] == []
    return len(cells)


@pytest.mark.parametrize(
    ("kind", "state"),
    # What a cached file adds to others begins with an absent page, see `matrix.AT_ONCE`.
    [(kind, state) for kind in STATES for state in STATES[kind] if kind != "cached" or state == "absent"],
)
def test_in_every_order_every_pair_of_operations_ends_well(kind: str, state: str) -> None:
    assert explored(one for one in pairs(variants=False) if (one.kind, one.states) == (kind, (state,))) > 50


def test_what_is_lost_is_told_to_the_right_thread_where_there_are_no_poison_markers() -> None:
    assert explored(one for one in old_kernels() if one.states == ("lost",) and one.kind != "read-only") > 100


def test_what_is_not_done_beside_everything_ends_well_beside_a_misfortune() -> None:
    assert explored(apart()) > 200


@pytest.mark.soak
def test_every_operation_ends_well_beside_a_client_that_dies_while_it_writes() -> None:
    assert explored(one for one in pairs() if ("die", 0) in one.operations) > 100


@pytest.mark.soak
def test_every_pair_of_operations_ends_well_beside_a_misfortune() -> None:
    assert explored(pairs(misfortunes=True)) > 2000


def test_wherever_the_manager_dies_nobody_reads_a_wrong_byte() -> None:
    assert explored(deaths()) > 200


def test_each_matrix_has_every_state_with_every_operation_that_there_is() -> None:
    wanted = {
        (kind, state, operation)
        for kind, states in STATES.items()
        for state in states
        for operation in OPERATIONS
        if applies(kind, operation) and not (operation == "die reading" and applies(kind, "die"))
    }
    # What another object has lost of a cached file may be what the worker has written since.
    wanted -= {("cached", state, "lose elsewhere") for state in STATES["cached"]}
    for matrix, left_out in ((pairs(), APART), (deaths(), ())):
        scenarios = list(matrix)
        assert len({str(one) for one in scenarios}) == len(scenarios)
        found = {(one.kind, one.states[0], name) for one in scenarios for name, _ in one.operations}
        assert found == {one for one in wanted if one[2] not in left_out}
    assert {page for one in two_pages() for _, page in one.operations} == {0, 1}


def test_what_is_left_out_of_a_cached_file_is_as_with_one_that_is_not_cached() -> None:
    there = set(map(str, pairs(variants=False)))
    left_out = [one for one in pairs(misfortunes=True, variants=False) if str(replace(one, budget=())) not in there]
    assert {one.kind for one in left_out} == {"cached"}
    for one in left_out[::60]:
        with_it, without = (explore(replace(one, kind=kind, budget=())) for kind in ("cached", "writable"))
        assert (with_it.schedules, with_it.steps, with_it.states) == (without.schedules, without.steps, without.states)


def test_wherever_the_manager_dies_the_next_one_goes_on_as_if_nothing_had_been() -> None:
    # `make soak` has all of them; here those of a fifth are enough to see that it works.
    assert explored(islice(restarts(), 0, None, 5)) > 60


@pytest.mark.soak
def test_wherever_it_dies_in_all_of_them() -> None:
    assert explored(restarts()) > 300


@pytest.mark.soak
def test_and_wherever_that_one_dies_too() -> None:
    assert explored(restarts(2)) > 300


@pytest.mark.parametrize("kind", STATES)
def test_the_manager_may_die_between_any_two_of_its_system_calls(kind: str) -> None:
    operations = (("report", 0),)
    without = explore(Scenario(kind, ("present",), operations))
    dying = explore(Scenario(kind, ("present",), operations, death=True))
    # Each state that is met without it can be the last one of the manager, and each system call that it has begun.
    assert without.complete
    assert dying.complete
    assert dying.schedules > 2 * without.schedules
