"""Nobody is ever told of anything, and waits for it as long as there is something that could be lost."""

from __future__ import annotations

import os
import select
import socket
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from hwpoison.core.records import Notice, Policy

_default: list[Policy | None] = [None]


def set_policy(policy: Policy | str | None) -> None:
    """As `hwpoison.set_policy`."""
    _default[0] = None if policy is None else Policy(policy)


def default_policy() -> Policy | None:
    """As it was set last."""
    return _default[0]


def policy_of(manager: Policy, own: Policy | None) -> Policy:
    """What is true for a memory that has this policy of its own, or none."""
    return own or _default[0] or manager


class Handle:
    """Of a function that will not be called. Until it is cancelled its memory stays open."""

    def __init__(self, function: Callable[[Notice], object], keeping: list[Handle], of: object) -> None:
        self._function = function
        self._keeping = keeping
        self._of = of
        keeping.append(self)

    def cancel(self) -> None:
        with suppress(ValueError):
            self._keeping.remove(self)
        self._of = None

    def __call__(self, notice: Notice) -> object:
        return self._function(notice)


class NoticeStream:
    """No notices: it ends when the memory or the manager is closed, or by `close()`."""

    def __init__(self, streams: weakref.WeakSet[NoticeStream], of: object) -> None:
        """`streams`: those that end with the same memory or manager, which this keeps."""
        self._of = of
        self._ours, self._other = socket.socketpair()
        streams.add(self)
        _streams.add(self)

    def fileno(self) -> int:
        return self._ours.fileno()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Notice:
        # It is never written to: what comes is its end.
        select.select([self._ours], [], [])
        raise StopIteration

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Notice:
        from asyncio import get_running_loop  # noqa: PLC0415  (as in `hwpoison.app.notices`)

        # One of its own for each task that waits: a loop has one reader for a descriptor.
        with self._ours.dup() as ours:
            ours.setblocking(False)
            await get_running_loop().sock_recv(ours, 1)
        raise StopAsyncIteration

    def close(self) -> None:
        self._other.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        # Not there if the system has refused them.
        if hasattr(self, "_other"):
            self._ours.close()
            self._other.close()


_streams: weakref.WeakSet[NoticeStream] = weakref.WeakSet()


def _in_child() -> None:
    # What the parent has of a stream would keep it open here.
    for one in list(_streams):
        ended = one._other.fileno() < 0
        ours, other = socket.socketpair()
        os.dup2(ours.fileno(), one._ours.fileno(), inheritable=False)
        ours.close()
        one._other.close()
        one._other = other
        if ended:
            other.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
