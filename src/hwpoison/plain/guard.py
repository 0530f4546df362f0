"""`guard`, where that of `hwpoison.app` can't be loaded: nothing that is lost is ever met."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import GenericAlias, TracebackType
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

    def __init__(self, memory: Memory, visits: weakref.WeakSet[View]) -> None:
        """`visits`: those that the memory can't be closed under."""
        self._memory = memory
        self._visits = visits
        visits.add(self)

    @property
    def buffer(self) -> memoryview:
        return self._memory.buffer.toreadonly()

    @property
    def address(self) -> int:
        return self._memory.address

    def unseen(self, seen: int) -> bool:
        return False

    def leave(self) -> list[Range]:
        self.end()
        return []

    def told(self) -> None:
        pass

    def end(self) -> None:
        self._visits.discard(self)


class SafeView:
    """As `hwpoison.SafeView`, which is this too."""

    __slots__ = ("_view", "memory")

    def __init__(self, memory: Any, view: Any) -> None:
        self.memory = memory
        self._view = view

    @property
    def buffer(self) -> memoryview:
        """All bytes of the memory, read-only."""
        buffer: memoryview = self._view.buffer
        return buffer

    @property
    def address(self) -> int:
        """Where the view is mapped."""
        return int(self._view.address)

    def array(
        self,
        dtype: numpy.typing.DTypeLike = "u1",
        shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
        *,
        offset: SupportsIndex = 0,
        order: Literal["C", "F"] = "C",
    ) -> numpy.ndarray[Any, Any]:
        """As `Memory.array`, read-only."""
        return array_over(self._view.buffer, dtype, shape, offset, order)

    def check(self) -> None:
        """Nothing is ever met."""


class guard:  # noqa: N801  (used as a function)
    """As `hwpoison.guard`."""

    __class_getitem__: Any = classmethod(GenericAlias)

    def __init__(self, *memories: Memory) -> None:
        if not memories:
            raise ValueError("guard() needs at least one memory")
        for memory in memories:
            if not hasattr(memory, "_visit"):
                raise TypeError(f"guard() takes memories of a manager, not {type(memory).__name__}")
        self._memories = memories
        self._views: list[View] = []

    def __enter__(self) -> Any:
        self._end()
        self._views = [memory._visit()[0] for memory in self._memories]
        views = tuple(SafeView(*both) for both in zip(self._memories, self._views, strict=True))
        return views[0] if len(views) == 1 else views

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        while self._views:
            self._views.pop().end()
