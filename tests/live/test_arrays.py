"""From arrays to memories and back: load, locate, lost, the buffer protocol."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import numpy
import numpy.typing
import pytest

import hwpoison
from hwpoison.linux.syscalls import PAGE_SIZE
from tests.support import need, wait_until

pytestmark = pytest.mark.live

PAGE = PAGE_SIZE
Array = numpy.typing.NDArray[numpy.float64]


@pytest.fixture
def table(manager: hwpoison.Manager) -> hwpoison.Memory:
    memory = manager.allocate(64 * PAGE, "table")
    memory.array("f8")[:] = numpy.arange(64 * PAGE // 8)
    return memory


def test_whatever_lies_in_managed_memory_is_located(table: hwpoison.Memory) -> None:
    array = table.array("f8")
    assert hwpoison.locate(array) == (table, 0, table.nbytes)
    assert hwpoison.locate(array[10:20]) == (table, 80, 80)
    assert hwpoison.locate(array[20:10:-2]) == (table, 12 * 8, 9 * 8)
    assert hwpoison.locate(array.reshape(64, -1)[3, 5:7]) == (table, 3 * PAGE + 40, 16)
    assert hwpoison.locate(array.reshape(64, -1)[::2, 1]) == (table, 8, 62 * PAGE + 8)
    assert hwpoison.locate(table.buffer[5:9]) == (table, 5, 4)
    with hwpoison.guard(table) as safe:
        assert hwpoison.locate(safe.array("f8")[1:2]) == (table, 8, 8)
    for foreign in (numpy.zeros(5), b"abc", array.copy()):
        with pytest.raises(ValueError, match="managed memory"):
            hwpoison.locate(foreign)
    with pytest.raises(TypeError, match="int"):
        hwpoison.locate(5)  # type: ignore[arg-type]


def expected_lost(array: Array, memory: hwpoison.Memory) -> list[int]:
    """Element by element, by its address."""
    ranges = [(memory.address + one.offset, memory.address + one.offset + one.nbytes) for one in memory.lost()]
    found = []
    for index in range(len(array)):
        row = array[index : index + 1]
        places = [row[at : at + 1] if row.ndim == 1 else None for at in range(1)]
        addresses = (
            [row.__array_interface__["data"][0]]
            if places[0] is not None
            else [row[:, at : at + 1].__array_interface__["data"][0] for at in range(row.shape[1])]
        )
        if any(begin < address + row.itemsize and address < end for address in addresses for begin, end in ranges):
            found.append(index)
    return found


def test_the_lost_indices_are_exactly_those_of_rows_with_a_lost_byte(
    manager: hwpoison.Manager, table: hwpoison.Memory
) -> None:
    flat: Array = table.array("f8")
    odd: Array = table.array("f8", (64 * PAGE // 24, 3))
    views: list[Array] = [
        flat, flat[::-1], flat[7::3], flat[-5:2:-11], odd, odd[::-1], odd[5:, ::2], odd[::4, 1:], odd.T, odd.T[::-1],
        odd[:, 1], flat.reshape(64, -1)[:, :3], flat.reshape(64, -1)[::-3, 2:9:3], flat[:0], flat[3:4],
        table.array("f8", (64, PAGE // 8), order="F"),
    ]  # fmt: skip
    assert all(len(hwpoison.lost(one)) == 0 for one in views)
    for page in (0, 7, 8, 40, 63):
        manager.inject(table, page * PAGE)
    for number, one in enumerate(views):
        assert hwpoison.lost(one).tolist() == expected_lost(one, table), number
    assert len(hwpoison.lost(flat)) == 5 * PAGE // 8
    # What it is for.
    rows = hwpoison.lost(odd)
    for one in table.lost():
        table.repair(one.offset, numpy.arange(one.offset // 8, (one.offset + one.nbytes) // 8, dtype="f8").tobytes())
    assert (odd[rows].ravel() == (rows[:, None] * 3 + numpy.arange(3)).ravel()).all()
    assert hwpoison.lost(flat).tolist() == []


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_saved_array_is_loaded_and_recovers(manager: hwpoison.Manager, tmp_path: Path, order: str) -> None:
    path = tmp_path / "x.npy"
    saved = numpy.asarray(numpy.random.default_rng(1).random((50, 700)), order=order)  # type: ignore[call-overload]
    numpy.save(path, saved)
    array = hwpoison.load(path, manager=manager)
    gc.collect()
    assert (array == saved).all()
    assert not array.flags.writeable
    memory, offset, nbytes = hwpoison.locate(array)
    assert (memory.name, nbytes) == (str(path), saved.nbytes)
    assert manager.inject(memory, offset + PAGE).outcome is hwpoison.Outcome.RECOVERED
    assert hwpoison.lost(array).tolist() == []
    assert (array == saved).all()
    del array, memory
    gc.collect()
    wait_until(lambda: manager.objects() == [], "nobody has it any more")
    changed = hwpoison.load(path, "r+", manager=manager)
    changed[3, 4] = 5
    hwpoison.locate(changed).memory.flush()
    assert numpy.load(path)[3, 4] == 5


@pytest.mark.filterwarnings("ignore:Stored array in format")
@pytest.mark.parametrize("fields", [[("number", "<i4")], [("Größe", "<i4"), ("日本", "<f8")]])
def test_every_version_of_the_format_is_loaded(
    manager: hwpoison.Manager, tmp_path: Path, fields: list[tuple[str, str]]
) -> None:
    path = tmp_path / "x.npy"
    saved = numpy.ones(500, fields)
    numpy.save(path, saved)
    assert (hwpoison.load(path, manager=manager) == saved).all()


def test_without_a_manager_one_is_there_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HWPOISON_SOCKET", raising=False)
    path = tmp_path / "x.npy"
    numpy.save(path, numpy.arange(5))
    one, two = hwpoison.load(path), hwpoison.load(str(path))
    assert hwpoison.locate(one).memory.instance == hwpoison.locate(two).memory.instance
    assert one.tolist() == two.tolist() == [0, 1, 2, 3, 4]


def test_what_is_no_array_is_refused_in_words(manager: hwpoison.Manager, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"no \.npy file"):
        hwpoison.load(path, manager=manager)
    numpy.save(path, numpy.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        hwpoison.load(path, manager=manager)
    with pytest.raises(FileNotFoundError):
        hwpoison.load(tmp_path / "none.npy", manager=manager)


def test_a_memory_is_a_buffer_itself(table: hwpoison.Memory) -> None:
    need(sys.version_info >= (3, 12), "Python 3.12, where a class can export a buffer", "python3.12")
    with memoryview(table) as view:  # type: ignore[arg-type]
        assert view.nbytes == table.nbytes
        with pytest.raises(BufferError):
            table.close()
    assert numpy.frombuffer(table, "f8")[5] == 5  # type: ignore[call-overload]
