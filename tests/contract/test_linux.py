"""Facts about Linux that the machine rests on and that its seams don't show. Numbers are those of the facts."""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hwpoison.core.machine import NotIsolatedError
from hwpoison.linux import syscalls, userfaultfd
from hwpoison.linux.space import LinuxSpace
from hwpoison.linux.store import REGION_PAGES, REGIONS_LIMIT, LinuxStore
from hwpoison.linux.syscalls import PAGE_SIZE
from tests.contract.linux_rig import LinuxRig
from tests.large_frames import BLOCK_BYTES, collapse

BUDDY = 1 << 10
"""In /proc/kpageflags: the frame is on a free list."""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[LinuxRig]:
    rig = LinuxRig(tmp_path)
    yield rig
    rig.close()


Create = Callable[[int], LinuxStore]


@pytest.fixture
def create(rig: LinuxRig) -> Iterator[Create]:
    """Makes objects of so many pages."""
    stores: list[LinuxStore] = []

    def create(pages: int) -> LinuxStore:
        stores.append(rig.machine.create("object", pages * PAGE_SIZE))
        return stores[-1]

    yield create
    for one in stores:
        one.close()


def test_a_page_that_was_taken_is_a_hole_and_its_frame_is_on_no_free_list(rig: LinuxRig, create: Create) -> None:
    """9"""
    store = create(3)
    store.publish(0, bytes(3 * PAGE_SIZE))
    number = rig.number(store, 1)
    frame = store.take(1)
    assert frame is not None
    assert os.lseek(store.fd, PAGE_SIZE, os.SEEK_DATA) == 2 * PAGE_SIZE
    assert os.lseek(store.fd, 0, os.SEEK_HOLE) == PAGE_SIZE
    frame.quarantine()
    with open("/proc/kpageflags", "rb", buffering=0) as flags:
        flags.seek(number * 8)
        assert not int.from_bytes(flags.read(8), "little") & BUDDY


def test_an_absent_page_of_the_managers_own_mapping_is_no_fault_for_its_system_calls(create: Create) -> None:
    """4: `pread` gives zeros, which is why presence is always asked first; and it makes no page."""
    store = create(1)
    assert store.content(0, 1) == bytes(PAGE_SIZE)
    assert not store.present(0)


def test_a_page_that_is_published_twice_keeps_its_first_content(create: Create) -> None:
    """6"""
    store = create(20)
    store.publish(1, b"\1" * PAGE_SIZE)
    with pytest.raises(FileExistsError):
        store.publish(1, b"\2" * PAGE_SIZE)
    assert store.content(1, 1) == b"\1" * PAGE_SIZE


async def no_page_of_a_large_frame_can_be_isolated_alone(rig: LinuxRig, store: LinuxStore) -> None:
    """11"""
    await store.fill(0, b"\1" * BLOCK_BYTES)
    collapse(store.fd)
    with pytest.raises(NotIsolatedError):
        store.take(5)
    assert store.present(5)
    if store.number(5) is not None:
        # Who sees frames touches nothing that can't be had alone: nobody meets zeros before the whole is given up.
        assert store.content(0, BLOCK_BYTES // PAGE_SIZE) == b"\1" * BLOCK_BYTES
    # The pipe is empty again: what is taken next is what was asked for.
    store.drop(0, BLOCK_BYTES // PAGE_SIZE)
    store.publish(7, b"\7" * PAGE_SIZE)
    frame = store.take(7)
    assert frame is not None
    assert frame.content() == b"\7" * PAGE_SIZE


def test_no_page_of_a_large_frame_can_be_isolated_alone(rig: LinuxRig, create: Create) -> None:
    rig.run(no_page_of_a_large_frame_can_be_isolated_alone(rig, create(BLOCK_BYTES // PAGE_SIZE)))


def test_page_tables_are_given_back_and_every_page_is_where_it_was(create: Create) -> None:
    """The manager maps all that it publishes; of that, it keeps little."""
    store = create((REGIONS_LIMIT + 40) * REGION_PAGES)
    pages = range(3, (REGIONS_LIMIT + 40) * REGION_PAGES, REGION_PAGES)
    for page in pages:
        store.publish(page, page.to_bytes(4, "big") * (PAGE_SIZE // 4))
    assert all(store.content(page, 1) == page.to_bytes(4, "big") * (PAGE_SIZE // 4) for page in pages)
    for page in (pages[0], pages[-1]):
        frame = store.take(page)
        assert frame is not None
        assert frame.content() == page.to_bytes(4, "big") * (PAGE_SIZE // 4)
        assert not store.present(page)
        store.publish(page, bytes(PAGE_SIZE))
        assert store.present(page)


def test_a_read_only_descriptor_of_the_memory_lets_nobody_write(create: Create) -> None:
    """16"""
    store = create(1)
    store.publish(0, bytes(PAGE_SIZE))
    fd = store.read_only_fd()
    with pytest.raises(OSError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    os.close(fd)
    assert store.content(0, 1) == bytes(PAGE_SIZE)


@pytest.mark.parametrize("nbytes", [1 << 62, (1 << 63) - 1, 1 << 64])
def test_memory_that_cannot_be_had_leaves_no_descriptors(rig: LinuxRig, nbytes: int) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(MemoryError):
        rig.machine.create("object", nbytes)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_what_was_agreed_in_a_handshake_can_be_asked_of_the_descriptor() -> None:
    opened = userfaultfd.open_userfaultfd()
    assert userfaultfd.features_of(opened.fd) == opened.features
    os.close(opened.fd)
    assert not userfaultfd.features_of(0)


def test_a_file_is_read_past_the_page_cache_where_it_is_not_in_it(rig: LinuxRig) -> None:
    """Its content is not kept twice: neither after it was read nor after it was written."""
    nbytes = 1 << 20
    file = rig.file(b"x" * nbytes)
    file.evict()

    async def story() -> None:
        assert bytes(await file.file.read(0, nbytes)) == b"x" * nbytes
        assert not cached_pages(file.path)
        await file.file.write(0, b"y" * nbytes)
        await file.file.sync()
        assert not cached_pages(file.path)

    rig.run(story())


async def test_a_clients_descriptor_is_closed_when_the_last_worker_is_done_with_it() -> None:
    """Not before, or the worker would use somebody else's; and not later."""
    fd = userfaultfd.open_userfaultfd().fd
    held = threading.Event()
    with ThreadPoolExecutor(1) as workers:
        workers.submit(held.wait)
        space = LinuxSpace(fd, os.getpid(), os.pidfd_open(os.getpid()), workers)
        asked = [asyncio.create_task(space.poison(1 << 20)), asyncio.create_task(space.gone())]
        await asyncio.sleep(0)
        space.close()
        assert os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[userfaultfd]"
        asked.append(asyncio.create_task(space.gone()))
        held.set()
        assert await asyncio.gather(*asked) == [True, False, True]
    with pytest.raises(OSError):
        os.fstat(fd)


def cached_pages(path: Path) -> int:
    nbytes = path.stat().st_size
    with path.open("rb") as file:
        address = syscalls.map_memory(nbytes, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno())
    try:
        return sum(syscalls.all_resident(address + start, PAGE_SIZE) for start in range(0, nbytes, PAGE_SIZE))
    finally:
        syscalls.unmap_memory(address, nbytes)
