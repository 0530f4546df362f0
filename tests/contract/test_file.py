"""`File`: what is behind an object, while others change it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from hwpoison.core.machine import Machine, ShrunkError
from tests.contract.rig import FileRig, Rig

CONTENT = bytes(range(256)) * 256 + b"the end"


async def test_a_file_that_nobody_changes_stays_the_same(rig: Rig, machine: Machine) -> None:
    file = rig.file(CONTENT)
    identity = await file.file.identity()
    assert identity.nbytes == len(CONTENT)
    file.cache()
    await file.file.read(0, len(CONTENT))
    await file.file.sync()
    assert await file.file.identity() == identity
    assert await rig.file(CONTENT).file.identity() != identity


CHANGES: dict[str, Callable[[FileRig], None]] = {
    "a write": lambda file: file.write(5, b"changed"),
    "a write of the same bytes": lambda file: file.write(0, CONTENT[:1]),
    "an append": lambda file: file.write(len(CONTENT), b"more"),
    "a shorter file": lambda file: file.truncate(10),
    "an empty file": lambda file: file.truncate(0),
    "another time": lambda file: file.touch(2),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_file_that_somebody_changes_is_another(rig: Rig, change: str) -> None:
    file = rig.file(CONTENT)
    # A time that is not now: times of a file are no finer than the tick of the system's clock.
    file.touch(1)
    identity = await file.file.identity()
    CHANGES[change](file)
    assert await file.file.identity() != identity


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "not cached"])
@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(0, 4096), (4096, 8192), (1, 5000), (4095, 2), (0, len(CONTENT)), (65_536, 7), (65_536, 4096), (65_540, 100)],
)
async def test_bytes_are_read_up_to_the_end_of_the_file(rig: Rig, cached: bool, offset: int, nbytes: int) -> None:
    file = rig.file(CONTENT)
    file.cache() if cached else file.evict()
    assert bytes(await file.file.read(offset, nbytes)) == CONTENT[offset : offset + nbytes]


async def test_nothing_is_read_beyond_the_end(rig: Rig) -> None:
    file = rig.file(CONTENT)
    for offset in (len(CONTENT), 1 << 20, 1 << 40):
        assert bytes(await file.file.read(offset, 4096)) == b""


async def test_holes_are_zeros(rig: Rig) -> None:
    file = rig.file(b"x")
    file.truncate(1 << 20)
    file.write((1 << 20) - 1, b"y")
    assert bytes(await file.file.read(0, 1 << 20)) == b"x" + bytes((1 << 20) - 2) + b"y"


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "not cached"])
async def test_a_file_that_was_changed_is_read_as_it_is_now(rig: Rig, cached: bool) -> None:
    file = rig.file(CONTENT)
    await file.file.read(0, len(CONTENT))
    file.write(100, b"changed")
    file.truncate(70_000)
    if not cached:
        file.evict()
    assert bytes(await file.file.read(0, 80_000)) == file.content()
    file.truncate(50)
    assert bytes(await file.file.read(0, 80_000)) == file.content()


async def test_many_reads_at_the_same_time_have_each_their_own_bytes(rig: Rig) -> None:
    content = b"".join(number.to_bytes(4, "big") * 1024 for number in range(256))
    file = rig.file(content)
    file.evict()
    found = await asyncio.gather(*(file.file.read(4096 * number, 4096) for number in range(256)))
    assert b"".join(bytes(one) for one in found) == content


async def test_only_bytes_that_can_be_had_without_waiting_are_had_at_once(rig: Rig) -> None:
    file = rig.file(CONTENT)
    file.evict()
    assert file.file.read_cached(0, 4096) is None
    file.cache()
    for offset, nbytes in ((0, 4096), (100, 5000), (4096, 65_536 - 4096)):
        cached = file.file.read_cached(offset, nbytes)
        assert cached is not None
        assert bytes(cached[0]) == CONTENT[offset : offset + nbytes]
        assert cached[1] == await file.file.identity()
    file.truncate(100)
    cached = file.file.read_cached(0, 4096)
    assert cached is None or bytes(cached[0]) == CONTENT[:100]


async def test_what_is_written_is_in_the_file_and_nothing_else_is_changed(rig: Rig) -> None:
    file = rig.file(CONTENT)
    before = await file.file.identity()
    first = await file.file.write(3, b"a" * 10_000)
    second = await file.file.write(20_000, memoryview(b"b" * 5))
    assert (first.before, first.after, second.error) == (before, second.before, None)
    assert second.after == await file.file.identity()
    await file.file.sync()
    expected = bytearray(CONTENT)
    expected[3:10_003] = b"a" * 10_000
    expected[20_000:20_005] = b"b" * 5
    assert file.content() == expected
    assert bytes(await file.file.read(0, len(CONTENT))) == expected


@pytest.mark.parametrize("nbytes", [0, 4096, 20_005])
async def test_a_write_never_makes_a_file_longer(rig: Rig, nbytes: int) -> None:
    file = rig.file(CONTENT)
    file.truncate(nbytes)
    for offset, length in ((20_000, 6), (nbytes, 1), (50_000, 4096)):
        written = await file.file.write(offset, b"w" * length)
        assert isinstance(written.error, ShrunkError)
        assert written.before == written.after == await file.file.identity()
    assert file.content() == CONTENT[:nbytes]


async def test_what_cannot_be_written_is_an_error(rig: Rig) -> None:
    file = rig.file(CONTENT, writable=False)
    written = await file.file.write(0, b"x")
    assert isinstance(written.error, OSError)
    assert written.before == written.after == await file.file.identity()
    assert file.content() == CONTENT
