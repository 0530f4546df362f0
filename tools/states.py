"""Writes docs/states.md from the table in `hwpoison.core.failure`: `.venv/bin/python tools/states.py`."""

from __future__ import annotations

from pathlib import Path

from hwpoison.core.failure import TABLE, Condition, Row

PLACE = Path(__file__).parents[1] / "docs" / "states.md"

WORDS = {
    Condition.RESERVED: "the manager's own memory",
    Condition.OWNED: "a page of an object, or a frame in quarantine",
    Condition.POISONED: "known to be bad",
    Condition.CLOSED: "of an object that was closed",
    Condition.PRESENT: "in its object's memory",
    Condition.FILE: "of a file",
    Condition.ANONYMOUS: "of anonymous memory",
    Condition.DIRTY: "newer than the file, or on its way there",
}

OUTCOMES = """
| outcome | means |
| --- | --- |
| Recovered | the bad frame is isolated, and the data is back or its loss is recorded and told |
| Delayed | isolated; the owner learns on the next access |
| Failed | should have been isolated and could not be; or it was known before (EHWPOISON) |
| Ignored | nothing was done; the next access will report again |
"""

HEAD = """\
# Page states

<!-- Made by tools/states.py from the table in src/hwpoison/core/failure.py. Change that, and run it again. -->

A failure is decided by the first row whose condition fits. The last row fits everything. A page that is being read in or
written back is waited for first; what it is then decides.

| | if it is | state | what is done |
| --- | --- | --- | --- |
"""


def condition(row: Row) -> str:
    """What a row asks for, in words."""
    asked = [
        words if flag & row.value else f"not {words}"
        for flag, words in WORDS.items()
        # What belongs to an object is said by whatever else is asked of it.
        if flag & row.mask and (flag is not Condition.OWNED or row.mask == Condition.OWNED)
    ]
    return ", ".join(asked) or "anything else"


def text() -> str:
    """All of docs/states.md."""
    rows = (f"| {number} | {condition(row)} | {row.state} | {row.does} |" for number, row in enumerate(TABLE, 1))
    return HEAD + "\n".join(rows) + "\n" + OUTCOMES


if __name__ == "__main__":
    PLACE.parent.mkdir(exist_ok=True)
    PLACE.write_text(text())
