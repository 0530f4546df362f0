"""A process that reads what it is told to, and what was told of an object so far."""

from __future__ import annotations

import hwpoison
from tests.live.process import Child

READER = """
memory = manager.attach(arguments[1])
notices = []
handle = memory.on_failure(lambda notice: notices.append([notice.name, notice.offset, notice.nbytes]))
say()
while (order := hear()) is not None:
    if order == "notices":
        say(notices)
    elif order == "flush":
        try:
            memory.flush()
            say(0)
        except OSError as error:
            say(error.errno)
    else:
        try:
            say(memory.read(*order).hex())
        except hwpoison.PoisonError as error:
            say([list(one) for one in error.ranges])
manager.close()
"""


def reader(manager: hwpoison.Manager, memory: hwpoison.Memory, *, start: str = "") -> Child:
    """A process that maps the memory and does what it is told: reads (offset, nbytes), "notices", "flush"."""
    child = Child("manager = hwpoison.connect(arguments[0])\n" + start + READER, manager.socket, memory.name)
    child.hear()
    return child


def touch(memory: hwpoison.Memory) -> bytes:
    """Map every page in this process, and return what is there."""
    return bytes(memory.buffer)


def told_of(manager: hwpoison.Manager, name: str) -> list[tuple[int, str]]:
    return [(event.offset, event.kind) for event in manager.events() if event.name == name]
