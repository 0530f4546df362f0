"""Memory-failure recovery in user space.

    with hwpoison.Manager() as manager:
        table = manager.allocate(64 << 20, name="table")
        with hwpoison.guard(table) as safe:
            total = safe.array("f8").sum()

See `Manager`, `connect`, `guard`, `Memory` and `PoisonError`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hwpoison.app.guard import SafeView, guard
    from hwpoison.app.manager import BaseManager, Manager, SharedManager, connect
    from hwpoison.app.memory import Memory
    from hwpoison.core.records import Failure, Notice, Outcome, State
    from hwpoison.errors import EHWPOISON, PoisonError, Range, UnsupportedError

__all__ = [
    "EHWPOISON",
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

_PLACES = {
    "app.guard": ("SafeView", "guard"),
    "app.manager": ("BaseManager", "Manager", "SharedManager", "connect"),
    "app.memory": ("Memory",),
    "core.records": ("Failure", "Notice", "Outcome", "State"),
    "errors": ("EHWPOISON", "PoisonError", "Range", "UnsupportedError"),
}


def __getattr__(name: str) -> object:
    """Names are loaded when they are used: the manager process and the command need no numpy."""
    for place, names in _PLACES.items():
        if name in names:
            value: object = getattr(import_module(f"{__name__}.{place}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
