"""What callers pass, checked where they pass it: the messages are ours, and nothing half-done is left behind."""

from __future__ import annotations

import operator
from typing import SupportsIndex


def whole(what: str, number: SupportsIndex) -> int:
    """`number` as an int. Raises TypeError."""
    try:
        return operator.index(number)
    except TypeError:
        raise TypeError(f"{what} is a whole number, not {type(number).__name__} {number!r:.40}") from None


def not_negative(what: str, number: SupportsIndex) -> int:
    """As `whole`. Raises ValueError too."""
    checked = whole(what, number)
    if checked < 0:
        raise ValueError(f"{what} {checked}: must be 0 or more")
    return checked
