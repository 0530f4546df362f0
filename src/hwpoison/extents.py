"""Which bytes an array lies on."""

from __future__ import annotations

from typing import Any

import numpy


def as_array(value: object) -> numpy.ndarray[Any, Any]:
    """Over the same bytes. Raises TypeError if it exports no buffer."""
    if isinstance(value, numpy.ndarray):
        return value
    try:
        view = memoryview(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"an array, or something with a buffer, and not {type(value).__name__}") from None
    return numpy.asarray(view)


def reach(array: numpy.ndarray[Any, Any]) -> tuple[int, int]:
    """How many bytes before the first element's begin, and from there on, an array has."""
    if not array.size:
        return 0, 0
    steps = [(length - 1) * step for length, step in zip(array.shape, array.strides, strict=True)]
    return -sum(one for one in steps if one < 0), sum(one for one in steps if one > 0) + array.itemsize


def extent(array: numpy.ndarray[Any, Any]) -> tuple[int, int]:
    """The address of its first byte, and that behind its last one."""
    base = array.__array_interface__["data"][0]
    before, behind = reach(array)
    return base - before, base + behind
