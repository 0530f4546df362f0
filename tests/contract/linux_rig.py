"""Linux's world: processes, files in a folder, /proc."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, cast

import pytest

from hwpoison.core.machine import Hits, Store
from hwpoison.errors import UnsupportedError
from hwpoison.linux import frames, syscalls
from hwpoison.linux.files import LinuxFile
from hwpoison.linux.inheritance import LinuxInheritance
from hwpoison.linux.machine import LinuxMachine
from hwpoison.linux.space import Board, LinuxSpace
from hwpoison.linux.store import LinuxStore
from hwpoison.linux.syscalls import PAGE_SIZE
from tests.contract.rig import ClientDiedError, Fault
from tests.support import SECONDS_MAX, need

MADV_HWPOISON = 100


class LinuxClient:
    """See `ClientRig`."""

    def __init__(self, machine: LinuxMachine) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            script = Path(__file__).with_name("linux_client.py")
            command = [sys.executable, "-P", str(script), str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        data, fds, _, _ = socket.recv_fds(self._channel, 1 << 16, 1)
        hello = json.loads(data)
        self.thread: int = hello["thread"]
        self._channel.setblocking(False)
        self.space: LinuxSpace = machine.space(fds[0], hello["pid"], os.pidfd_open(hello["pid"]))
        self._faults: asyncio.Queue[Fault] = asyncio.Queue()
        self._gone = asyncio.Event()
        self.space.listen(lambda fault: self._faults.put_nowait(Fault(*fault)), self._gone.set)
        self._boards: list[Board] = []

    async def _ask(self, what: str, fds: tuple[int, ...] = (), **arguments: Any) -> dict[str, Any]:
        self._tell(what, fds, **arguments)
        return await self._answer()

    def _tell(self, what: str, fds: tuple[int, ...] = (), **arguments: Any) -> None:
        socket.send_fds(self._channel, [json.dumps({"do": what, **arguments}).encode()], list(fds))

    async def _answer(self) -> dict[str, Any]:
        try:
            data = await asyncio.get_running_loop().sock_recv(self._channel, 1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            raise ClientDiedError(await self.end())
        return cast(dict[str, Any], json.loads(data))

    async def map(self, store: Store, *, private: bool = False, protected: bool = False, registered: bool = True) -> int:
        memory = cast(LinuxStore, store)
        fd = memory.read_only_fd() if private else os.dup(memory.fd)
        nbytes = os.fstat(fd).st_size
        answer = await self._ask("map", (fd,), nbytes=nbytes, private=private, protected=protected, registered=registered)
        os.close(fd)
        return int(answer["address"])

    async def load(self, address: int) -> int:
        return int((await self._ask("load", address=address))["value"])

    async def store(self, address: int, value: int) -> None:
        await self._ask("store", address=address, value=value)

    async def copy(self, address: int, nbytes: int) -> bytes:
        answer = await self._ask("copy", address=address, nbytes=nbytes)
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]))
        return bytes.fromhex(answer["content"])

    async def discard(self, address: int, nbytes: int) -> None:
        await self._ask("discard", address=address, nbytes=nbytes)

    async def count(self, address: int) -> None:
        self._tell("count", address=address)

    async def stop_counting(self) -> tuple[int, int]:
        answer = await self._ask("stop")
        return answer["done"], answer["found"]

    async def fault(self) -> Fault:
        return await self._faults.get()

    async def dispose(self, *, handled: bool = False, ignored: bool = False, blocked: bool = False) -> None:
        await self._ask("dispose", handled=handled, ignored=ignored, blocked=blocked)

    async def signalled(self) -> tuple[int, int]:
        answer = await self._ask("signalled")
        return answer["code"], answer["value"]

    async def hits(self) -> Hits:
        board = Board()
        self._boards.append(board)
        await self._ask("hits", (board.fd,))
        slot = board.slot()
        assert slot.index == 0
        return slot

    async def open_guards(self, count: int) -> None:
        await self._ask("guards", count=count)

    async def met(self) -> int:
        return int((await self._ask("met"))["met"])

    async def end(self) -> int:
        return -await asyncio.to_thread(self._process.wait, SECONDS_MAX)

    def die(self) -> None:
        self._process.kill()

    async def close(self) -> None:
        self.die()
        await self.end()
        if self.space.fd >= 0:
            self.space.close()
        self._channel.close()
        for board in self._boards:
            board.close()


class LinuxFileRig:
    """See `FileRig`."""

    def __init__(self, machine: LinuxMachine, path: Path, content: bytes, *, writable: bool) -> None:
        self.path = path
        path.write_bytes(content)
        self.file: LinuxFile = machine.file(os.open(path, os.O_RDWR if writable else os.O_RDONLY))
        self.file.prepare_now()

    def content(self) -> bytes:
        return self.path.read_bytes()

    def write(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def truncate(self, nbytes: int) -> None:
        os.truncate(self.path, nbytes)

    def touch(self, time_ns: int) -> None:
        os.utime(self.path, ns=(time_ns, time_ns))

    def cache(self) -> None:
        self.path.read_bytes()

    def evict(self) -> None:
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            nbytes = os.fstat(file.fileno()).st_size
            address = syscalls.map_memory(nbytes, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno())
        cached = syscalls.all_resident(address, PAGE_SIZE)
        syscalls.unmap_memory(address, nbytes)
        need(not cached, "a file system whose cache can be dropped")


class Holder:
    """What a keeper does, in this process. See `hwpoison.linux.kept.Keeping`."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}

    def keep(self, *things: tuple[str, int]) -> None:
        for label, fd in things:
            self.drop(label)
            self._held[label] = os.dup(fd)

    def drop(self, *labels: str) -> None:
        for label in labels:
            if label in self._held:
                os.close(self._held.pop(label))

    def copies(self) -> dict[str, int]:
        return {label: os.dup(fd) for label, fd in self._held.items()}

    def close(self) -> None:
        self.drop(*list(self._held))


class LinuxRig:
    """See `Rig`."""

    def __init__(self, folder: Path) -> None:
        try:
            self._kept = Holder()
            self.machine = LinuxMachine(self._kept)
        except UnsupportedError as error:
            need(None, f"a userfaultfd ({error})")
            raise
        self.pid = os.getpid()
        self._folder = folder
        self._clients: list[LinuxClient] = []
        self._files: list[LinuxFileRig] = []
        self._successors: list[LinuxMachine] = []

    def run(self, story: Coroutine[Any, Any, None]) -> None:
        async def whole_story() -> None:
            try:
                async with asyncio.timeout(SECONDS_MAX):
                    await story
            finally:
                for client in self._clients:
                    await client.close()

        asyncio.run(whole_story())

    async def client(self) -> LinuxClient:
        self._clients.append(LinuxClient(self.machine))
        return self._clients[-1]

    def file(self, content: bytes, *, writable: bool = True) -> LinuxFileRig:
        path = self._folder / f"file-{len(self._files)}"
        self._files.append(LinuxFileRig(self.machine, path, content, writable=writable))
        return self._files[-1]

    def number(self, store: Store, page: int) -> int:
        number = cast(LinuxStore, store).number(page)
        need(number, "the privilege to know frame numbers")
        assert number is not None
        return number

    def declare_bad(self, store: Store, page: int) -> None:
        # The kernel tells who has a page declared bad in this way, and maps it.
        before = signal.signal(signal.SIGBUS, lambda *_: None)
        fd, nbytes = cast(LinuxStore, store).fd, (page + 1) * PAGE_SIZE
        try:
            with mmap.mmap(fd, nbytes, prot=mmap.PROT_READ) as mapping:
                mapping[nbytes - 1]
                syscalls.advise(syscalls.address_of(mapping) + page * PAGE_SIZE, PAGE_SIZE, MADV_HWPOISON)
        except OSError as error:
            need(None, f"a kernel that declares pages bad, and the privilege to have it do so ({error})", "lab")
        finally:
            signal.signal(signal.SIGBUS, before)

    def own_number(self) -> int:
        own = bytearray(b"x" * PAGE_SIZE)
        pagemap = frames.PageMap()
        number = pagemap.numbers(syscalls.address_of(own), 1)[0]
        pagemap.close()
        need(number, "the privilege to know frame numbers")
        # It stays where it is for as long as the rig.
        self._own = own
        return number

    def successor(self) -> tuple[LinuxMachine, LinuxInheritance]:
        machine = LinuxMachine(Holder(), inherited=self._kept.copies())
        self._successors.append(machine)
        return machine, LinuxInheritance(machine)

    def offlines_nothing(self) -> None:
        if os.path.exists(frames.HARD_OFFLINE):
            pytest.skip("this kernel would take a frame away for good")

    def close(self) -> None:
        for one in self._files:
            asyncio.run(one.file.close())
        for machine in (self.machine, *self._successors):
            machine.close()
        self._kept.close()
