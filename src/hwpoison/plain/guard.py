"""`guard`, where that of `hwpoison.app` can't be loaded: nothing that is lost is ever met."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, SupportsIndex

from hwpoison.errors import Range
from hwpoison.extents import array_over

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    from hwpoison.plain.memory import Memory


class Mark(NamedTuple):
    """As `app.view.Mark`."""

    inherited: tuple[Range, ...] = ()
    seen: int = 0


class View:
    """As `app.view.GuardedView` and `Visit`, for the guard of `hwpoison.app`."""

    mark = Mark()

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    @property
    def buffer(self) -> memoryview:
        return self._memory.buffer.toreadonly()

    @property
    def address(self) -> int:
        return self._memory.address

    def unseen(self, seen: int) -> bool:
        return False

    def leave(self) -> list[Range]:
        return []

    def told(self) -> None:
        pass

    def end(self) -> None:
        pass


class SafeView:
    """As `hwpoison.SafeView`."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    @property
    def buffer(self) -> memoryview:
        return self.memory.buffer.toreadonly()

    @property
    def address(self) -> int:
        return self.memory.address

    def array(
        self,
        dtype: numpy.typing.DTypeLike = "u1",
        shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
        *,
        offset: SupportsIndex = 0,
        order: Literal["C", "F"] = "C",
    ) -> numpy.ndarray[Any, Any]:
        return array_over(self.buffer, dtype, shape, offset, order)

    def check(self) -> None:
        pass


@contextmanager
def guard(*memories: Memory) -> Iterator[Any]:
    """As `hwpoison.guard`."""
    if not memories:
        raise ValueError("guard() needs at least one memory")
    for memory in memories:
        if not hasattr(memory, "_visit"):
            raise TypeError(f"guard() takes memories of a manager, not {type(memory).__name__}")
    views = tuple(map(SafeView, memories))
    yield views[0] if len(views) == 1 else views
