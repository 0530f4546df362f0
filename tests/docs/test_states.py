"""docs/states.md is what the table says."""

from __future__ import annotations

from hwpoison.core.failure import TABLE, Condition
from tools import states


def test_the_page_about_states_is_the_table() -> None:
    """If it is not: `.venv/bin/python tools/states.py` writes it again."""
    assert states.PLACE.read_text() == states.text()


def test_every_flag_has_words_and_every_row_a_line_of_its_own() -> None:
    assert set(states.WORDS) == set(Condition)
    conditions = [states.condition(row) for row in TABLE]
    assert len(set(conditions)) == len(TABLE)
    assert conditions[-1] == "anything else"
