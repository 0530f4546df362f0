"""What callers pass, checked where they pass it: the messages are ours, and nothing half-done is left behind."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import numpy

if TYPE_CHECKING:
    from typing_extensions import Buffer

Data: TypeAlias = "Buffer | numpy.ndarray[Any, Any]"
"""What bytes are taken from: all that a memoryview can be made of."""
MEMORY_LIMIT_MAX = (1 << 63) - 1
"""Bytes: the most that can be said in a message."""


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


def shape_of(shape: SupportsIndex | Iterable[SupportsIndex]) -> tuple[int, ...]:
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


def name_of(value: str | None) -> str | None:
    """An object's name, or None for what has none. Raises TypeError, ValueError."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"an object's name is a str, not {type(value).__name__}")
    return None if value is None else text("an object's name, as objects() shows it,", value)


def as_bytes(data: Data) -> memoryview:
    """The bytes of any buffer, one after the other. Raises TypeError for what is none, ValueError for one with gaps."""
    # That arrays have a buffer is known to their types from Python 3.12 on.
    value: Any = data
    view = memoryview(value)
    if not view.nbytes:
        return memoryview(b"")
    if not view.c_contiguous:
        raise ValueError("the data is not contiguous in C order; of an array, pass numpy.ascontiguousarray(it)")
    return view.cast("B")


def range_of(name: str, size: int, offset: SupportsIndex, nbytes: SupportsIndex | None) -> tuple[int, int]:
    """`offset` and `nbytes` within memory of that name and size, as whole numbers; `nbytes` None is all the rest.

    Raises TypeError, ValueError.
    """
    first = whole("offset", offset)
    length = size - first if nbytes is None else whole("nbytes", nbytes)
    if first < 0 or length < 0 or first + length > size:
        raise ValueError(f"bytes {first} to {first + length} are not within {name!r}, which ends at {size}")
    return first, length


def whole_pages(name: str, size: int, begin: int, end: int, page_size: int) -> None:
    """Raises ValueError if the bytes from `begin` to `end` of memory of that name and size are not what `repair` takes."""
    if begin < end and (begin % page_size or (end % page_size and end != size)):
        raise ValueError(
            f"repair needs whole pages, and bytes {begin} to {end} are none: begin at a multiple of {page_size}, and "
            f"end at one or at the end of {name!r} ({size})"
        )


def memory_limit_of(value: SupportsIndex | None, page_size: int) -> int | None:
    """A memory limit in bytes. Raises TypeError, ValueError."""
    if value is None:
        return None
    limit = whole("memory_limit", value)
    if not page_size <= limit <= MEMORY_LIMIT_MAX:
        raise ValueError(f"memory_limit is in bytes, from one page ({page_size}) to {MEMORY_LIMIT_MAX}, and not {limit}")
    return limit


def seconds_of(what: str, value: object) -> float:
    """A time limit. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{what} is a number of seconds above 0, and not {value!r}")
    return float(value)
