"""`docs/last-resort.md` says to users what the code says of itself."""

from __future__ import annotations

from pathlib import Path

from hwpoison.core import policy

DOCUMENT = Path(__file__).parents[2] / "docs" / "last-resort.md"


def table(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_the_table_of_the_last_resort_is_that_of_the_policy() -> None:
    assert table(DOCUMENT.read_text()) == table(policy.__doc__ or "")
    assert len(table(policy.__doc__ or "")) > 2


def test_the_limit_in_the_text_is_that_of_the_policy() -> None:
    assert f"without them {policy.TELL_LIMIT} times; the {policy.TELL_LIMIT + 1}th access" in DOCUMENT.read_text()
