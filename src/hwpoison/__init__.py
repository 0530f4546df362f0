"""Memory-failure recovery in user space.

    with hwpoison.Manager() as manager:
        table = manager.allocate(64 << 20, name="table")
        with hwpoison.guard(table) as safe:
            total = safe.array("f8").sum()

See `Manager`, `connect`, `guard`, `Memory` and `PoisonError`.
"""

from hwpoison.app.guard import SafeView, guard
from hwpoison.app.manager import BaseManager, Manager, SharedManager, connect
from hwpoison.app.memory import Memory
from hwpoison.core.records import Failure, Notice, Outcome, State
from hwpoison.errors import PoisonError, Range, UnsupportedError

__all__ = [
    "BaseManager",
    "Failure",
    "Manager",
    "Memory",
    "Notice",
    "Outcome",
    "PoisonError",
    "Range",
    "SafeView",
    "SharedManager",
    "State",
    "UnsupportedError",
    "connect",
    "guard",
]
