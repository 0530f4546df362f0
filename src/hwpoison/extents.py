"""Arrays over buffers: which bytes one lies on, how one is made, what the head of a .npy file says."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, SupportsIndex

import numpy
import numpy.lib.format
import numpy.typing

from hwpoison.checking import shape_of, whole


def as_array(value: object) -> numpy.ndarray[Any, Any]:
    """Over the same bytes. Raises TypeError if it exports no buffer."""
    if isinstance(value, numpy.ndarray):
        return value
    try:
        if isinstance(value, numpy.generic):
            # Most are copies, and those that are not have buffers which nobody understands.
            raise TypeError
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


def array_over(
    buffer: memoryview,
    dtype: numpy.typing.DTypeLike,
    shape: SupportsIndex | Iterable[SupportsIndex] | None,
    offset: SupportsIndex,
    order: Literal["C", "F"],
) -> numpy.ndarray[Any, Any]:
    """A numpy array over a buffer, with the arguments that `numpy.memmap` has."""
    item = numpy.dtype(dtype)
    if item.hasobject:
        raise ValueError(f"{item} holds Python objects; managed memory holds bytes: choose another dtype")
    if not item.itemsize:
        raise ValueError(f"{item!r} has items of 0 bytes; choose another dtype")
    first = whole("offset", offset)
    if first > len(buffer):
        raise ValueError(f"offset {first} is not within the {len(buffer)} bytes")
    if first < 0:
        raise ValueError(f"offset {first}: must be 0 or more")
    if shape is not None:
        lengths = shape_of(shape)
    else:
        if (len(buffer) - first) % item.itemsize:
            raise ValueError(f"{len(buffer) - first} bytes from offset {first} are no whole number of {item}; pass shape=")
        lengths = ((len(buffer) - first) // item.itemsize,)
    try:
        # Of a memoryview, numpy would keep only the mapping behind it, which could be closed under the array then.
        return numpy.ndarray(lengths, item, numpy.frombuffer(buffer, "u1"), first, order=order)
    except TypeError as error:
        raise ValueError(
            f"shape {lengths} of {item} at offset {first} needs more than the {len(buffer)} bytes: {error}"
        ) from None


class Header(NamedTuple):
    """Of a .npy file; the array begins at byte `offset`."""

    dtype: numpy.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    order: Literal["C", "F"]


def header_of(path: str | os.PathLike[str]) -> Header:
    """Raises ValueError if it is no .npy file, or one of Python objects."""
    try:
        # That maps the file, and reads nothing of it but this.
        mapped = numpy.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is no .npy file of numbers: {error}") from None
    return Header(mapped.dtype, mapped.shape, mapped.offset, "C" if mapped.flags.c_contiguous else "F")
