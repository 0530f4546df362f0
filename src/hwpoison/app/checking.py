"""What callers pass, checked where they pass it: the messages are ours, and nothing half-done is left behind."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import SupportsIndex

import numpy

from hwpoison.core.machine import Content


def whole(what: str, number: SupportsIndex) -> int:
    """`number` as an int. Raises TypeError."""
    if isinstance(number, bool):
        raise TypeError(f"{what} is a whole number, not {number}")
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


def true_or_false(what: str, value: object) -> bool:
    """`value` as a bool, numpy's too. Raises TypeError: what only counts as true may be an argument in the wrong place."""
    if not isinstance(value, (bool, numpy.bool_)):
        raise TypeError(f"{what} is True or False, not {type(value).__name__} {value!r:.40}")
    return bool(value)


def shape_of(shape: int | Iterable[SupportsIndex]) -> tuple[int, ...]:
    """A shape as numpy has it. Raises TypeError, ValueError."""
    if isinstance(shape, Iterable) and not isinstance(shape, (str, bytes)):
        return tuple(not_negative("a number in shape", one) for one in shape)
    return (not_negative("shape", shape),)  # type: ignore[arg-type]


def text(what: str, value: str) -> str:
    """`value`, if it can be written as UTF-8. Raises ValueError."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is Unicode text, and {value[:80]!a} is not") from None
    return value


def as_bytes(data: Content) -> memoryview:
    """The bytes of any buffer, one after the other. Raises TypeError for what is none, ValueError for one with gaps."""
    view = memoryview(data)
    if not view.nbytes:
        return memoryview(b"")
    if not view.c_contiguous:
        raise ValueError("the data is not contiguous in C order; of an array, pass numpy.ascontiguousarray(it)")
    return view.cast("B")
