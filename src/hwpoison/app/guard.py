"""`guard`: read memory in which pages may be lost, and learn of it by an exception instead of a signal."""

from __future__ import annotations

import errno
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

from hwpoison.app.efault import lost_by
from hwpoison.app.view import GuardedView, Mark, Visit
from hwpoison.errors import PoisonError, Range
from hwpoison.plain import guard as plain

if TYPE_CHECKING:
    from hwpoison.app.memory import Memory

Views = TypeVar("Views")


class SafeView(plain.SafeView):
    """A memory as one guard shows it: the live content, read-only. Lost bytes read as zeros, and that is recorded: the end
    of the guard, or `check`, raises. Use nothing that was computed from them before that."""

    __slots__ = ("_mark",)
    memory: Memory

    def __init__(self, memory: Memory, view: GuardedView, mark: Mark) -> None:
        super().__init__(memory, view)
        self._mark = mark

    def check(self) -> None:
        """Raise PoisonError for what was met since the guard began or this last raised; then it can be met again."""
        mark = self._mark
        if mark.inherited or self._view.unseen(mark.seen):
            met, count = self._view.settle(mark.seen)
            met = [*mark.inherited, *met]
            if met:
                try:
                    raise PoisonError(met)
                except PoisonError:
                    # Now even what a signal handler raises has the PoisonError as its context.
                    mark.seen, mark.inherited = count, []
                    raise
            mark.seen = count


class guard(Generic[Views]):  # noqa: N801  (used as a function)
    """`with guard(memory) as safe:` or `with guard(one, other) as (safe_one, safe_other):`.

    Lost bytes read as zeros in its views, until the block ends, which raises `PoisonError`, or `safe.check()` does. Nothing
    that is computed from them leaves the block by a normal exit; use none of it (send, write, commit) before that. Outside
    of guards nothing reads as zeros that were not there.

    The block's end raises if anybody met lost bytes through the views, also if the body raised an Exception: then from
    that. KeyboardInterrupt, SystemExit and cancellation pass, with a note. Guards nest and run in several threads; each
    instance is for one `with` at a time. A view must not be used after its guard: lost bytes are a SIGBUS then, or zeros
    while another guard is open on that memory, which tells of them. If a signal handler raises while a guard begins or
    ends, what it had not told yet is told by the next guard.

    An OSError with EFAULT becomes a `PoisonError` of lost bytes of the memories if they can be the reason and nothing else
    of managed memory can. If others can too (in user mode a system call gets EFAULT also for pages that are not present,
    or not written to yet), the OSError passes with a note that names the lost bytes; if lost bytes can't be the reason, it
    passes as it is.
    """

    __slots__ = ("_memories", "_visits")

    @overload
    def __init__(self: guard[SafeView], memory: Memory, /) -> None: ...
    @overload
    def __init__(self: guard[tuple[SafeView, SafeView]], one: Memory, other: Memory, /) -> None: ...
    @overload
    def __init__(self: guard[Any], *memories: Memory) -> None: ...

    def __init__(self, *memories: Memory) -> None:
        if not memories:
            raise ValueError("guard() needs at least one memory")
        for memory in memories:
            if not hasattr(memory, "_visit"):
                raise TypeError(f"guard() takes memories of a manager, not {type(memory).__name__}")
        self._memories = memories
        self._visits: list[Visit] = []

    def __enter__(self) -> Views:
        try:
            # Some are left if a signal handler raised in `__exit__`.
            self._end()
            views = []
            for memory in self._memories:
                view, visit = memory._visit()
                self._visits.append(visit)
                views.append(SafeView(memory, view, self._visits[-1].mark))
            return cast("Views", views[0] if len(views) == 1 else tuple(views))
        except BaseException:
            self._end()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            met: list[Range] = []
            for visit in self._visits:
                met += visit.leave()
            if not met and isinstance(error, OSError) and error.errno == errno.EFAULT:
                met = lost_by(error, self._memories)
            if met:
                self._tell(met, error)
        finally:
            self._end()

    def _tell(self, met: list[Range], error: BaseException | None) -> None:
        if error is not None and not isinstance(error, Exception):
            error.add_note(f"hwpoison: lost bytes were met as well: {', '.join(map(str, met))}")
            self._told()
            return
        try:
            raise PoisonError(met) from error
        except PoisonError:
            # Now even what a signal handler raises has the PoisonError as its context.
            self._told()
            raise

    def _told(self) -> None:
        for visit in self._visits:
            visit.told()

    def _end(self) -> None:
        while self._visits:
            self._visits[-1].end()
            self._visits.pop()
