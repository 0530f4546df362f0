"""The core on the real machine, in this process: real memory and real files, but no client."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from hwpoison.core.manager import MemoryManager
from hwpoison.core.mappings import Client
from hwpoison.core.objects import MemoryObject
from hwpoison.core.records import Event, Failure, Notice
from hwpoison.core.recovery import discard, read_in
from hwpoison.errors import UnsupportedError
from hwpoison.linux.machine import LinuxMachine
from hwpoison.linux.syscalls import PAGE_SIZE
from tests.support import SECONDS_MAX, need


class Core:
    """A manager of memory, and what it has said. Nobody maps anything, so nobody is told."""

    def __init__(self, machine: LinuxMachine, folder: Path, limit_pages: int | None, files_least: int) -> None:
        self.machine = machine
        self.events: list[Event] = []
        self.defects: list[tuple[str, BaseException]] = []
        limit = None if limit_pages is None else limit_pages * PAGE_SIZE
        self.manager = MemoryManager(machine, self, instance="test", memory_limit=limit)
        self.manager.reclaim.files_least = files_least
        self._folder = folder
        self._files = 0

    def event(self, event: Event) -> None:
        self.events.append(event)

    def notice(self, client: Client, notice: Notice) -> None:
        raise AssertionError(f"there is no client to be told of {notice}")

    def failure(self, where: str, failure: Failure) -> None:
        pass

    def defect(self, what: str, error: BaseException) -> None:
        self.defects.append((what, error))

    def new_file(self, pages: int) -> Path:
        """A file of so many pages, each of them different from all others."""
        self._files += 1
        path = self._folder / f"file-{self._files}"
        path.write_bytes(b"".join(f"{self._files}:{page}".encode().ljust(PAGE_SIZE, b".") for page in range(pages)))
        return path

    def open(self, path: Path, *, writable: bool = False) -> MemoryObject:
        """An object over the whole file, held."""
        file = self.machine.file(os.open(path, os.O_RDWR if writable else os.O_RDONLY))
        object_ = self.manager.open(str(path), file, file.identity_now(), 0, None, writable=writable)
        self.manager.hold(object_)
        return object_

    def allocate(self, pages: int) -> MemoryObject:
        """An anonymous object, held."""
        object_ = self.manager.allocate(pages * PAGE_SIZE)
        self.manager.hold(object_)
        return object_

    async def bring_in(self, object_: MemoryObject, first: int, count: int = 1) -> None:
        """What a first touch does."""
        async with object_.locks.hold(first, count):
            await read_in(self.manager, object_, first, count)

    async def end(self) -> None:
        for object_ in self.manager.objects():
            while object_.references:
                self.manager.release(object_)
        await self.manager.close()
        for object_ in self.manager.objects():
            # It outlives its users only because of what it has lost and the file has not.
            assert object_.lost_changes
            self.manager.hold(object_)
            await discard(self.manager, object_, 0, object_.pages.count)
            self.manager.release(object_)
        await self.manager.close()
        assert not self.manager.objects()
        assert self.defects == []


Run = Callable[..., None]


@pytest.fixture(scope="session")
def machine() -> Iterator[LinuxMachine]:
    try:
        machine = LinuxMachine()
    except UnsupportedError as error:
        need(None, f"a userfaultfd ({error})")
        raise
    yield machine
    machine.close()


@pytest.fixture
def run(machine: LinuxMachine, tmp_path: Path) -> Run:
    """Run a story on a core of its own; `limit_pages` is its memory limit, `files_least` what files may have
    in any case."""

    def run(story: Callable[[Core], Awaitable[None]], limit_pages: int | None = None, files_least: int = 0) -> None:
        async def whole_story() -> None:
            core = Core(machine, tmp_path, limit_pages, files_least)
            try:
                async with asyncio.timeout(SECONDS_MAX):
                    await story(core)
            finally:
                await core.end()

        asyncio.run(whole_story())

    return run
