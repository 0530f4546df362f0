"""From arrays to memory and back, where `hwpoison.app.arrays` can't be loaded."""

from __future__ import annotations

import os
from typing import Any, Literal, NamedTuple

import numpy

from hwpoison.extents import as_array, extent, header_of
from hwpoison.plain.manager import BaseManager, Manager, connect
from hwpoison.plain.memory import Memory, all_memories


class Location(NamedTuple):
    """As `hwpoison.Location`."""

    memory: Memory
    offset: int
    nbytes: int


def locate(array: object) -> Location:
    """As `hwpoison.locate`."""
    begin, end = extent(as_array(array))
    for memory in all_memories():
        address = memory.address
        if address <= begin and end <= address + memory.nbytes:
            return Location(memory, begin - address, end - begin)
    raise ValueError(
        f"the {type(array).__name__} at {begin:#x} does not lie in the memory of a manager that is open in this process (a "
        "view alone is not enough: keep its Memory)"
    )


def lost(array: object) -> numpy.ndarray[Any, numpy.dtype[numpy.intp]]:
    """As `hwpoison.lost`: none."""
    locate(array)
    return numpy.empty(0, numpy.intp)


_manager: list[BaseManager] = []
"""What `load` uses, once it has."""


def load(
    path: str | os.PathLike[str], mode: Literal["r", "r+"] = "r", *, manager: BaseManager | None = None
) -> numpy.ndarray[Any, Any]:
    """As `hwpoison.load`."""
    found = header_of(path)
    if manager is None:
        if not _manager or _manager[0].closed:
            _manager[:] = [connect() if os.environ.get("HWPOISON_SOCKET") else Manager()]
        manager = _manager[0]
    memory = manager.open(path, mode)
    array = memory.array(found.dtype, found.shape, offset=found.offset, order=found.order)
    memory._kept_by_views()
    return array
