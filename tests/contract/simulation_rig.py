"""The simulated machine's world: it has no other."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, cast

from hwpoison.core.machine import Hits, Store, Telling
from hwpoison.simulation.files import Disk, SimulatedFile
from hwpoison.simulation.loop import SimulationLoop
from hwpoison.simulation.machine import OWN_FRAME, OWN_PID, SimulatedInheritance, SimulatedMachine
from hwpoison.simulation.memory import SimulatedStore
from hwpoison.simulation.processes import THREAD, Area, Process, Sigbus, SimulatedHits, SimulatedSpace
from tests.contract.rig import ClientDiedError, Fault
from tests.support import SECONDS_MAX


class SimulatedClient:
    """See `ClientRig`."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._changed = asyncio.Event()
        self._counter: tuple[Area, int] | None = None
        self._counted = 0
        self._hits = SimulatedHits()
        self.thread = THREAD
        self.space: SimulatedSpace = process.space
        process.on_change = self._changed.set

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds, or the process has ended."""
        while self._process.alive and not condition():
            self._changed.clear()
            await self._changed.wait()
        if not self._process.alive:
            raise ClientDiedError(self._process.ended_by)

    async def _access(self, address: int, write: Callable[[bytes], bytes] | None = None) -> bytes:
        """As often as it takes."""
        found = self._process.area_at(address)
        assert found is not None, f"nothing is mapped at {address:#x}"
        while True:
            self._deliver()
            if not self._process.alive:
                raise ClientDiedError(self._process.ended_by)
            content = self._process.touch(*found, write)
            if content is not None:
                return content
            await self._until(lambda: self._process.asleep is None or bool(self._process.signalled))

    def _deliver(self) -> None:
        if self._process.signalled and self._process.disposition is Telling.FATAL:
            self._process.die(signal.SIGBUS)

    async def map(self, store: Store, *, private: bool = False, protected: bool = False, registered: bool = True) -> int:
        memory = cast(SimulatedStore, store)
        return self._process.map(memory, private=private, protected=protected, registered=registered).address

    async def load(self, address: int) -> int:
        try:
            content = await self._access(address)
        except Sigbus:
            self._process.die(signal.SIGBUS)
            raise ClientDiedError(signal.SIGBUS) from None
        return content[address % len(content)]

    async def store(self, address: int, value: int) -> None:
        def write(content: bytes) -> bytes:
            at = address % len(content)
            return content[:at] + bytes((value,)) + content[at + 1 :]

        await self._access(address, write)

    async def copy(self, address: int, nbytes: int) -> bytes:
        size = self._process.machine.page_size
        parts = []
        for begin in range(address - address % size, address + nbytes, size):
            try:
                content = await self._access(begin)
            except Sigbus:
                raise OSError(errno.EFAULT, os.strerror(errno.EFAULT)) from None
            parts.append(content[max(address - begin, 0) : address + nbytes - begin])
        return b"".join(parts)

    async def discard(self, address: int, nbytes: int) -> None:
        found = self._process.area_at(address)
        assert found is not None
        self._process.discard(*found, nbytes // self._process.machine.page_size)

    async def count(self, address: int) -> None:
        self._counter = self._process.area_at(address)

    def count_once(self) -> None:
        """A process of its own: it counts between any two things that the manager does, if it isn't asleep."""

        def add_one(old: bytes) -> bytes:
            return (int.from_bytes(old[:8], "little") + 1).to_bytes(8, "little") + old[8:]

        if self._counter is not None and self._process.asleep is None:
            self._counted += self._process.touch(*self._counter, add_one) is not None

    async def stop_counting(self) -> tuple[int, int]:
        assert self._counter is not None
        content = self._process.touch(*self._counter)
        assert content is not None
        return self._counted, int.from_bytes(content[:8], "little")

    async def fault(self) -> Fault:
        await self._until(lambda: bool(self._process.unread))
        return Fault(*self._process.unread.popleft())

    async def dispose(self, *, handled: bool = False, ignored: bool = False, blocked: bool = False) -> None:
        self._process.disposition = (
            Telling.BLOCKED if blocked else Telling.IGNORED if ignored else Telling.HANDLED if handled else Telling.FATAL
        )

    async def signalled(self) -> tuple[int, int]:
        await self._until(lambda: bool(self._process.signalled))
        return -1, self._process.signalled.popleft()

    async def hits(self) -> Hits:
        self._hits = SimulatedHits()
        return self._hits

    async def open_guards(self, count: int) -> None:
        self._hits.guards = count

    async def met(self) -> int:
        return self._hits.count

    async def end(self) -> int:
        return self._process.ended_by

    def die(self) -> None:
        self._process.die()


class SimulatedFileRig:
    """See `FileRig`."""

    def __init__(self, machine: SimulatedMachine, disk: Disk) -> None:
        self._disk = disk
        self.file = SimulatedFile(machine, disk)

    def content(self) -> bytes:
        return self._disk.content

    def write(self, offset: int, data: bytes) -> None:
        self._disk.change(offset, data)

    def truncate(self, nbytes: int) -> None:
        self._disk.truncate(nbytes)

    def touch(self, time_ns: int) -> None:
        self._disk.times += 1

    def cache(self) -> None:
        self._disk.cached = True

    def evict(self) -> None:
        self._disk.cached = False


class SimulationRig:
    """See `Rig`."""

    pid = OWN_PID

    def __init__(self, folder: Path) -> None:
        self.machine = SimulatedMachine()
        self.machine.before = self._before
        self._clients: list[SimulatedClient] = []

    def _before(self, store: SimulatedStore, first: int, count: int) -> None:
        for client in self._clients:
            client.count_once()

    def run(self, story: Coroutine[Any, Any, None]) -> None:
        async def whole_story() -> None:
            async with asyncio.timeout(SECONDS_MAX):
                await story

        loop = SimulationLoop(outside=self.machine.events)
        loop.run_until_complete(whole_story())
        loop.close()

    async def client(self) -> SimulatedClient:
        self._clients.append(SimulatedClient(self.machine.process(f"client {len(self._clients)}")))
        return self._clients[-1]

    def file(self, content: bytes, *, writable: bool = True) -> SimulatedFileRig:
        return SimulatedFileRig(self.machine, self.machine.disk("file", content, writable=writable))

    def number(self, store: Store, page: int) -> int:
        found = cast(SimulatedStore, store).pages[page]
        assert found is not None
        return found.number

    def declare_bad(self, store: Store, page: int) -> None:
        cast(SimulatedStore, store).goes_bad(page, declared=True)

    def own_number(self) -> int:
        return OWN_FRAME

    def successor(self) -> tuple[SimulatedMachine, SimulatedInheritance]:
        return self.machine, SimulatedInheritance(self.machine, {})

    def offlines_nothing(self) -> None:
        """Here it takes none."""

    def close(self) -> None:
        self.machine.close()
