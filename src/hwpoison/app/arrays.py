"""From the user's arrays to our memories and back."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy

from hwpoison.app.manager import SOCKET_VARIABLE, BaseManager, Manager, connect
from hwpoison.app.memory import Memory, all_memories
from hwpoison.extents import as_array, extent, header_of, reach
from hwpoison.plain.memory import all_memories as all_plain_memories


class Location(NamedTuple):
    """Bytes `offset` to `offset + nbytes` of `memory`."""

    memory: Memory
    offset: int
    nbytes: int


def locate(array: object) -> Location:
    """Where an array, or anything that exports a buffer, lies: from its first byte to its last, with what its strides leave
    out between. Raises ValueError if it is not in managed memory, or in one that nobody refers to any more but by views."""
    begin, end = extent(as_array(array))
    memories: list[Any] = [*all_memories(), *all_plain_memories()]
    for memory in memories:
        for address in memory.addresses():
            if address <= begin and end <= address + memory.nbytes:
                return Location(memory, begin - address, end - begin)
    raise ValueError(
        f"the {type(array).__name__} at {begin:#x} does not lie in managed memory that is open in this process (a view "
        "alone is not enough: keep its Memory)"
    )


def lost(array: object) -> numpy.ndarray[Any, numpy.dtype[numpy.intp]]:
    """The indices along the first axis of an array of which any byte is lost, in order. Raises what `locate` does."""
    rowed = as_array(array)
    memory, offset, _ = locate(rowed)
    if not rowed.ndim:
        rowed = rowed.reshape(1)
    found = [numpy.empty(0, numpy.intp)]
    if rowed.size:
        # Of the first row, the bytes before and behind its first element that it has.
        before, behind = reach(rowed[:1])
        first = offset + reach(rowed)[0] - before
        for one in memory.lost():
            begin, end = one.offset, one.offset + one.nbytes
            rows: Iterable[int] = _between(first, before + behind, rowed.strides[0], len(rowed), begin, end)
            if not rowed[:1].flags.forc:
                rows = [row for row in rows if _touches(rowed[row : row + 1], memory, begin, end)]
            found.append(numpy.array(rows, numpy.intp))
    return numpy.unique(numpy.concatenate(found))


def _between(first: int, nbytes: int, step: int, count: int, begin: int, end: int) -> range:
    """The rows that have a byte in begin..end: there are `count`, each of `nbytes`, at `first`, `first + step`, ..."""
    if step > 0:
        low, high = (begin - nbytes - first) // step + 1, (end - first - 1) // step
    elif step < 0:
        low, high = (first - end) // -step + 1, (first + nbytes - begin - 1) // -step
    else:
        low, high = (0, count - 1) if first < end and begin < first + nbytes else (0, -1)
    return range(max(0, low), min(count - 1, high) + 1)


def _touches(row: numpy.ndarray[Any, Any], memory: Memory, begin: int, end: int) -> bool:
    """True if an element of the rows has a byte there."""
    base = row.__array_interface__["data"][0]
    address = next(one for one in memory.addresses() if one <= base < one + memory.nbytes)
    offsets = numpy.zeros(row.shape, numpy.int64)
    for axis, (length, step) in enumerate(zip(row.shape, row.strides, strict=True)):
        shape = [1] * row.ndim
        shape[axis] = length
        offsets = offsets + (numpy.arange(length, dtype=numpy.int64) * step).reshape(shape)
    offsets += base - address
    return bool(((offsets < end) & (offsets + row.itemsize > begin)).any())


_lock = threading.RLock()
_manager: list[BaseManager] = []
"""What `load` uses, once it has."""


def _default_manager() -> BaseManager:
    with _lock:
        if not _manager or _manager[0].closed:
            _manager[:] = [connect() if os.environ.get(SOCKET_VARIABLE) else Manager()]
        return _manager[0]


def load(
    path: str | os.PathLike[str], mode: Literal["r", "r+"] = "r", *, manager: BaseManager | None = None
) -> numpy.ndarray[Any, Any]:
    """The array in a .npy file, as `numpy.load(path, mmap_mode=mode)` gives it, in managed memory: read as it is used, and
    what fails of it is read again. `locate` has the `Memory`, which lives as long as the array.

    `manager`: None is that at $HWPOISON_SOCKET, or else a private one, which all calls share. Raises ValueError if it is no
    .npy file, or one of Python objects, and what `open` of a manager raises.
    """
    found = header_of(path)
    memory = (manager or _default_manager()).open(path, mode)
    array = memory.array(found.dtype, found.shape, offset=found.offset, order=found.order)
    memory._kept_by_views()
    return array
