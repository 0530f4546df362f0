"""`guard`: read memory in which pages may be lost, and learn of it by an exception instead of a signal."""

from __future__ import annotations

import errno
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from hwpoison.app.view import GuardedView, array_over
from hwpoison.errors import PoisonError, Range

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    from hwpoison.app.memory import Memory


class SafeView:
    """A memory as one guard shows it: the live content, read-only. An access to lost bytes is an access to zeros, and is
    recorded: the guard, or `check`, raises."""

    __slots__ = ("_seen", "_view", "memory")

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._view: GuardedView = memory.guarded_view()
        self._seen = 0

    @property
    def buffer(self) -> memoryview:
        """All bytes of the memory, read-only."""
        return self._view.buffer

    @property
    def address(self) -> int:
        """Where the view is mapped."""
        return self._view.address

    def array(
        self,
        dtype: numpy.typing.DTypeLike = "u1",
        shape: int | tuple[int, ...] | None = None,
        *,
        offset: int = 0,
        order: Literal["C", "F"] = "C",
    ) -> numpy.ndarray[Any, Any]:
        """As `Memory.array`, read-only."""
        return array_over(self._view.buffer, dtype, shape, offset, order)

    def check(self) -> None:
        """Raise PoisonError for what was met since the guard began or this last raised; then it can be met again."""
        if self._view.unseen(self._seen):
            met, self._seen = self._view.settle(self._seen)
            if met:
                raise PoisonError(met)

    def begin(self) -> None:
        self._seen = self._view.enter()

    def end(self) -> list[Range]:
        return self._view.leave(self._seen)

    def lost(self) -> list[Range]:
        """All that is lost of the memory now."""
        return self._view.lost()


class guard:  # noqa: N801  (used as a function)
    """`with guard(memory) as safe:` or `with guard(one, other) as (safe_one, safe_other):`.

    At its end it raises `PoisonError` if anybody met lost bytes through its views, also if the body raised an Exception:
    then from that. KeyboardInterrupt, SystemExit and cancellation pass, with a note. Guards nest and run in several
    threads; each instance is for one `with` at a time. A view must not be used after its guard: then it is a SIGBUS.
    """

    __slots__ = ("_memories", "_views")

    def __init__(self, *memories: Memory) -> None:
        if not memories:
            raise ValueError("guard() needs at least one memory")
        for memory in memories:
            if not hasattr(memory, "guarded_view"):
                raise TypeError(f"guard() takes memories of a manager, not {type(memory).__name__}")
        self._memories = memories
        self._views: list[SafeView] = []

    def __enter__(self) -> Any:
        views: list[SafeView] = []
        try:
            for memory in self._memories:
                view = SafeView(memory)
                view.begin()
                views.append(view)
        except BaseException:
            for view in views:
                view.end()
            raise
        self._views = views
        return views[0] if len(views) == 1 else tuple(views)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        views, self._views = self._views, []
        met: list[Range] = []
        for view in views:
            met += view.end()
        if error is None:
            if met:
                raise PoisonError(met)
            return
        if not met and isinstance(error, OSError) and error.errno == errno.EFAULT:
            # In a system call a lost page is EFAULT where the kernel does not let the manager see it.
            met = [one for view in views for one in view.lost()]
        if not met:
            return
        if isinstance(error, Exception):
            raise PoisonError(met) from error
        error.add_note(f"hwpoison: lost bytes were met as well: {', '.join(map(str, met))}")
