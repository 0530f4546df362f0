"""Memory-failure recovery in user space.

    with hwpoison.Manager() as manager:
        table = manager.allocate(64 << 20, name="table")
        with hwpoison.guard(table) as safe:
            total = safe.array("f8").sum()

The way to memory:

    Manager           a private manager process, for this process and those that it tells its `socket`
    connect           the way to a manager that others use too: a SharedManager
    SharedManager     what `connect` returns
    BaseManager       what both have in common: allocate, open, attach, inject, report, objects, statistics, events
    Memory            an object, mapped here: buffer, array, read, write, flush, repair, discard, lost, on_failure
    guard             read memory in which bytes may be lost: raises PoisonError at its end
    SafeView          what `guard` gives: buffer, array, check

From arrays and back:

    load              the array in a .npy file, in managed memory
    locate            where an array, or anything with a buffer, lies: a Location
    Location          memory, offset, nbytes
    lost              the indices along the first axis of an array of which bytes are lost

What fails, and what is said of it:

    Failure           the handling of one report: what `inject` and `report` return
    Notice            what `on_failure` and `notices` tell an owner of a loss
    NoticeStream      what `notices` returns: an iterator, an asynchronous one, fileno, close
    Handle            what `on_failure` returns: cancel
    Policy            when who wants no notices learns of a loss: early or late
    set_policy        that of this process
    State, Outcome    what a page was when it failed, and how its handling ended
    PoisonError       bytes that were needed are lost; an OSError, its errno is EHWPOISON
    EHWPOISON         133, the kernel's number for it
    Range             name, offset, nbytes: bytes of an object
    UnsupportedError  this machine lacks something that is needed

What a manager says of itself:

    ObjectInfo        one of `objects()`
    Statistics        what `statistics()` returns
    Capabilities      what it can do on this machine
    LoggedEvent       one of `events()`
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hwpoison.app.arrays import Location, load, locate, lost
    from hwpoison.app.guard import SafeView, guard
    from hwpoison.app.manager import BaseManager, Manager, SharedManager, connect
    from hwpoison.app.memory import Memory
    from hwpoison.app.notices import Handle, Notice, NoticeStream, set_policy
    from hwpoison.core.records import Capabilities, Failure, Outcome, Policy, State
    from hwpoison.errors import EHWPOISON, PoisonError, Range, UnsupportedError
    from hwpoison.events import LoggedEvent
    from hwpoison.protocol import ObjectInfo, Statistics

__all__ = [
    "EHWPOISON",
    "BaseManager",
    "Capabilities",
    "Failure",
    "Handle",
    "Location",
    "LoggedEvent",
    "Manager",
    "Memory",
    "Notice",
    "NoticeStream",
    "ObjectInfo",
    "Outcome",
    "PoisonError",
    "Policy",
    "Range",
    "SafeView",
    "SharedManager",
    "State",
    "Statistics",
    "UnsupportedError",
    "connect",
    "guard",
    "load",
    "locate",
    "lost",
    "set_policy",
]

_PLACES = {
    "app.arrays": ("Location", "load", "locate", "lost"),
    "app.guard": ("SafeView", "guard"),
    "app.manager": ("BaseManager", "Manager", "SharedManager", "connect"),
    "app.memory": ("Memory",),
    "app.notices": ("Handle", "Notice", "NoticeStream", "set_policy"),
    "core.records": ("Capabilities", "Failure", "Outcome", "Policy", "State"),
    "errors": ("EHWPOISON", "PoisonError", "Range", "UnsupportedError"),
    "events": ("LoggedEvent",),
    "protocol": ("ObjectInfo", "Statistics"),
}
if sys.platform != "linux":
    # Plain shared memory without recovery is what there is.
    _PLACES = {place.replace("app.", "plain."): names for place, names in _PLACES.items()}


def _load(name: str) -> object:
    """Names are loaded when they are used: the manager process and the command need no numpy."""
    for place, names in _PLACES.items():
        if name in names:
            value: object = getattr(import_module(f"{__name__}.{place}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if not TYPE_CHECKING:
    # A type checker would take any name for one that is there.
    __getattr__ = _load


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
