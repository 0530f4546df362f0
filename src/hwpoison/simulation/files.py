"""Files of the simulated machine, as all see them, and as the manager reads and writes them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hwpoison.core.machine import Content, Identity, ShrunkError, Written

if TYPE_CHECKING:
    from hwpoison.simulation.machine import SimulatedMachine


PREFIX = b"outside!"
"""What is in a world's file before the object's bytes: nobody may change it."""
FILE_OFFSET = len(PREFIX)


@dataclass(slots=True, eq=False)
class Disk:
    """A file as all see it. `times` counts its changes; `durable` is what it is after a loss of power: what was synced.

    A sync makes all that is `pending` durable. One that fails does not, and nobody will try again: the system counts it as
    written, so that it must be written anew.
    """

    name: str
    inode: int
    content: bytes
    times: int = 0
    cached: bool = False
    writable: bool = True
    durable: bytes = field(init=False)
    pending: bytes = field(init=False)
    given_up: set[int] = field(default_factory=set)
    """Offsets that were pending when a sync failed."""
    written: set[int] = field(default_factory=set)
    """Offsets at which a manager has written."""

    def __post_init__(self) -> None:
        self.durable = self.content
        self.pending = bytes(len(self.content))

    def sync(self, *, fails: bool = False) -> None:
        """Make durable what is pending, or not."""
        if not fails:
            old = self.durable.ljust(len(self.content), b"\0")
            self.durable = bytes(
                new if waits else was for new, was, waits in zip(self.content, old, self.pending, strict=False)
            )
        else:
            self.given_up.update([at for at, waits in enumerate(self.pending) if waits])
        self.pending = bytes(len(self.content))

    def identity(self) -> Identity:
        return Identity(1, self.inode, len(self.content), self.times, self.times)

    def change(self, offset: int, data: bytes) -> None:
        """Write, by whomever."""
        self.content = self.content[:offset].ljust(offset, b"\0") + data + self.content[offset + len(data) :]
        self.pending = self.pending[:offset].ljust(offset, b"\1") + b"\1" * len(data) + self.pending[offset + len(data) :]
        self.times += 1

    def truncate(self, nbytes: int) -> None:
        self.content = self.content[:nbytes].ljust(nbytes, b"\0")
        self.pending = self.pending[:nbytes].ljust(nbytes, b"\1")
        self.times += 1


class SimulatedFile:
    """See `core.machine.File`."""

    def __init__(self, machine: SimulatedMachine, disk: Disk) -> None:
        self._machine = machine
        self.disk = disk

    async def identity(self) -> Identity:
        return self.disk.identity()

    def read_cached(self, offset: int, nbytes: int) -> tuple[Content, Identity] | None:
        return (self.disk.content[offset : offset + nbytes], self.disk.identity()) if self.disk.cached else None

    async def read(self, offset: int, nbytes: int) -> Content:
        old = self.disk.content

        def done() -> bytes:
            now = self.disk.content
            half = offset + nbytes // 2
            return old[offset:half] + now[half : offset + nbytes] if old != now else now[offset : offset + nbytes]

        what = f"read {self.disk.name} {offset}"
        endings: list[tuple[str, Callable[[], Any]]] = [("done", done)]
        if self._machine.allows("read fails"):
            endings.append(("fails", lambda: self._machine.fail("read fails", errno.EIO)))
        state = old[offset : offset + nbytes]
        content: bytes = await self._machine.slow(what, (self.disk, offset, nbytes), state, endings)
        return content

    async def write(self, offset: int, content: Content) -> Written:
        data = bytes(content)

        def write(part: int, code: int = 0) -> Written:
            before = self.disk.identity()
            if part and before.nbytes < offset + len(data):
                return Written(before, before, ShrunkError(before.nbytes, offset + len(data)))
            if part:
                self.disk.change(offset, data[:part])
                self.disk.written.update(range(offset, offset + part))
            error = None
            if code:
                self._machine.goes_wrong("write fails")
                error = OSError(code, "write fails")
            return Written(before, self.disk.identity(), error)

        def unknown(part: int) -> None:
            # The file can't be asked, before or afterwards, which version it is in.
            write(part)
            self._machine.fail("write fails", errno.ESTALE)

        if not self.disk.writable:
            return write(0, errno.EBADF)
        endings: list[tuple[str, Callable[[], Any]]] = [("done", lambda: write(len(data)))]
        if self._machine.allows("write fails"):
            endings += [
                ("fails", lambda: write(0, errno.ENOSPC)),
                ("fails half way", lambda: write(len(data) // 2, errno.ENOSPC)),
                ("can't be asked for", lambda: unknown(0)),
                ("is not known to be done", lambda: unknown(len(data))),
            ]
        what = f"write {self.disk.name} {offset}"
        written: Written = await self._machine.slow(what, (self.disk, offset, len(data)), data, endings)
        return written

    async def sync(self) -> None:
        def fails() -> None:
            self.disk.sync(fails=True)
            self._machine.fail("sync fails", errno.EIO)

        endings: list[tuple[str, Callable[[], Any]]] = [("done", self.disk.sync)]
        if self._machine.allows("sync fails"):
            endings.append(("fails", fails))
        await self._machine.slow(f"sync {self.disk.name}", (self.disk, 0, 0), None, endings)

    def keep(self, number: int) -> None:
        self._machine.kept[number] = self.disk

    async def close(self) -> None:
        writing = (f"write {self.disk.name} ", f"sync {self.disk.name}")
        self._machine.closed_under += [one.what for one in self._machine.waiting if one.what.startswith(writing)]
