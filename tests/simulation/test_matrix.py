"""Every state of a page with every pair of operations, beside a client that always works, in every order."""

from __future__ import annotations

from hwpoison.simulation.matrix import explore_all, pairs


def test_in_every_order_every_pair_of_operations_ends_well() -> None:
    cells = explore_all(pairs())
    assert [(cell.scenario, cell.violation.sentence) for cell in cells if cell.violation is not None] == []
    assert [cell.scenario for cell in cells if not cell.complete] == []
    assert len(cells) > 1500
