"""What the suite needs of a world around a machine: client processes, files that others change, frames.

A machine is under test together with a rig of its own that builds that world. `RIGS` in conftest.py lists them.
"""

from __future__ import annotations

import signal
from collections.abc import Coroutine
from typing import Any, NamedTuple, Protocol

from hwpoison.core.machine import File, Hits, Inheritance, Machine, Space, Store


class Fault(NamedTuple):
    """A thread of a client sleeps in an access at `address`, which is page aligned."""

    address: int
    thread: int
    write: bool
    protected: bool


class ClientDiedError(Exception):
    """The client's process was ended by a signal instead of answering."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class ClientRig(Protocol):
    """A process with memory of the machine. What it does may have to wait until its fault is answered, so start it as a
    task; it does one thing at a time. Raises `ClientDiedError`."""

    @property
    def space(self) -> Space: ...

    @property
    def thread(self) -> int:
        """The thread that does everything."""

    async def map(self, store: Store, *, private: bool = False, protected: bool = False, registered: bool = True) -> int:
        """Map the whole object; its address. `private`: and read-only, else shared and writable. `protected`: first writes
        are faults, on all its pages. Without `registered` nobody is asked about absent pages."""

    async def load(self, address: int) -> int:
        """Read one byte."""

    async def store(self, address: int, value: int) -> None:
        """Write one byte."""

    async def copy(self, address: int, nbytes: int) -> bytes:
        """Read by a system call. Raises OSError as that does."""

    async def discard(self, address: int, nbytes: int) -> None:
        """Let go of what the pages of a mapping hold of their own: markers, private pages."""

    async def count(self, address: int) -> None:
        """Begin to add one to the 8 bytes at `address`, and go on with that until `stop_counting`."""

    async def stop_counting(self) -> tuple[int, int]:
        """How often it has added one, and what is in memory then."""

    async def fault(self) -> Fault:
        """The next fault, in the order in which they came."""

    async def dispose(self, *, handled: bool = False, ignored: bool = False, blocked: bool = False) -> None:
        """What it does about SIGBUS; nothing of these is the default."""

    async def signalled(self) -> tuple[int, int]:
        """Wait for a SIGBUS, which must be blocked; its `si_code` and the pointer in its value."""

    async def hits(self) -> Hits:
        """A new word that it shares with the manager."""

    async def open_guards(self, count: int) -> None:
        """So many guards are open on its view, the newest of `hits`."""

    async def met(self) -> int:
        """The losses that it has met, as it reads the same word."""

    async def end(self) -> int:
        """The signal by which the process was ended; it is reaped."""

    def die(self) -> None:
        """Be killed, and not be reaped yet."""


class FileRig(Protocol):
    """A file of the machine, and what others do to it."""

    @property
    def file(self) -> File: ...

    def content(self) -> bytes: ...

    def write(self, offset: int, data: bytes) -> None: ...

    def truncate(self, nbytes: int) -> None: ...

    def touch(self, time_ns: int) -> None:
        """Say that it was changed then."""

    def cache(self) -> None:
        """Make all of it to be had without waiting."""

    def evict(self) -> None:
        """Make none of it to be had without waiting. Skips the test where that can't be."""


class Rig(Protocol):
    """A machine and its world."""

    @property
    def machine(self) -> Machine: ...

    @property
    def pid(self) -> int:
        """The process that the machine runs in."""

    def run(self, story: Coroutine[Any, Any, None]) -> None:
        """Run a story on the machine's event loop, then end all its clients."""

    async def client(self) -> ClientRig: ...

    def file(self, content: bytes, *, writable: bool = True) -> FileRig: ...

    def number(self, store: Store, page: int) -> int:
        """The number of the frame that a present page is in. Skips the test where that is not to be known."""

    def declare_bad(self, store: Store, page: int) -> None:
        """Have the kernel declare a present page bad (linux-facts 26). Skips the test where it does not do that. On a real
        machine this takes the frame away for good."""

    def own_number(self) -> int:
        """The number of a frame of the machine's own process. Skips the test where that is not to be known."""

    def successor(self) -> tuple[Machine, Inheritance]:
        """The machine of another manager, and what this one has left it, as if it had been killed now."""

    def offlines_nothing(self) -> None:
        """Skip the test where the machine's `offline` would take a frame away for good."""

    def close(self) -> None: ...
