"""docs/invariants.md is what the simulation looks at."""

from __future__ import annotations

from tools import invariants


def test_the_page_about_invariants_is_the_file_of_invariants() -> None:
    """If it is not: `.venv/bin/python tools/invariants.py` writes it again."""
    assert invariants.PLACE.read_text() == invariants.text()
    assert len(list(invariants.sentences())) > 30
