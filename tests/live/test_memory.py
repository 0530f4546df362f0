"""`Memory`: what it shows, stores, loses, gets back, and how it comes to other processes."""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

import hwpoison
from hwpoison.protocol import DATA_LIMIT
from tests.live.conftest import known
from tests.live.frames import PAGE
from tests.live.process import Child
from tests.support import SECONDS_MAX, wait_until

MakeFile = Callable[..., Path]


# --- views ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "shape", "offset", "order"),
    [
        ("u1", None, 0, "C"),
        ("<f8", (4, 5), 0, "C"),
        ("<f8", (4, 5), 24, "F"),
        (">i2", 100, 3, "C"),
        ([("a", "u1"), ("b", "<u4")], 7, 1, "C"),
        ("f4", (), 4096, "C"),
    ],
)
def test_array_takes_its_arguments_as_memmap_does(
    dtype: Any, shape: Any, offset: int, order: Any, manager: hwpoison.Manager, file: MakeFile
) -> None:
    path = file(2 * PAGE)
    with manager.open(path) as memory:
        expected = numpy.memmap(path, dtype, "r", offset=offset, shape=shape, order=order)
        array = memory.array(dtype, shape, offset=offset, order=order)
        assert (array.dtype, array.shape, array.strides) == (expected.dtype, expected.shape, expected.strides)
        assert array.tobytes() == expected.tobytes()
        assert array.flags.writeable is False
        del array


def test_an_array_that_does_not_fit_is_a_value_error(manager: hwpoison.Manager) -> None:
    memory = manager.allocate(100)
    for arguments in (
        {"shape": 101},
        {"dtype": "u8"},
        {"offset": 101},
        {"offset": -1},
        {"dtype": "u8", "shape": 12, "offset": 8},
    ):
        with pytest.raises(ValueError):
            memory.array(**{"dtype": "u1", **arguments})


def test_buffer_is_the_mapping_itself(manager: hwpoison.Manager, file: MakeFile) -> None:
    table, weights = manager.allocate(PAGE + 1, "t"), manager.open(file(PAGE + 1))
    for memory in (table, weights):
        view = memory.buffer
        assert (view.format, view.ndim, view.nbytes, view.readonly) == ("B", 1, PAGE + 1, memory is weights)
        address = numpy.frombuffer(view, "u1").__array_interface__["data"][0]
        assert address == memory.address
        del view
    table.buffer[PAGE] = 9
    assert manager.attach("t").array()[PAGE] == 9
    assert (table.kind, weights.kind) == ("anonymous", "file")
    assert (table.writable, weights.writable) == (True, False)


def test_a_memory_with_views_cannot_be_closed_and_stays_usable(manager: hwpoison.Manager) -> None:
    memory = manager.allocate(2 * PAGE, "t")
    array = memory.array("u8")
    array[:] = 5
    with pytest.raises(BufferError):
        memory.close()
    with hwpoison.guard(memory) as safe:
        guarded = safe.buffer
    with pytest.raises(BufferError):
        memory.close()
    assert memory.read(PAGE, 1) == b"\x05"
    array[1] = 6
    with pytest.warns(ResourceWarning, match="t"):
        manager.close()
    assert array[:2].tolist() == [5, 6], "an access is served as before"
    assert array[-1] == 5
    del array, guarded, safe
    memory.close()
    memory.close()
    assert memory.closed
    for use in (lambda: memory.buffer, lambda: memory.read(0, 1), lambda: memory.write(0, b"x"), memory.lost, memory.flush,
                lambda: memory.repair(0, bytes(PAGE)), memory.discard, memory.prefetch, memory.array):  # fmt: skip
        with pytest.raises(ValueError, match="closed"):
            use()


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_opened_is_the_error_of_the_standard_library(
    manager: hwpoison.Manager, file: MakeFile, tmp_path: Path
) -> None:
    path = file(100)
    os.mkfifo(tmp_path / "fifo")
    refused: list[tuple[type[Exception], Callable[[], object]]] = [
        (FileNotFoundError, lambda: manager.open(tmp_path / "missing")),
        (IsADirectoryError, lambda: manager.open(tmp_path)),
        (ValueError, lambda: manager.open(tmp_path / "fifo")),
        (ValueError, lambda: manager.open("/dev/zero")),
        (ValueError, lambda: manager.open(path, "w")),  # type: ignore[arg-type]
        (ValueError, lambda: manager.open(path, offset=100)),
        (ValueError, lambda: manager.open(path, offset=-1)),
        (ValueError, lambda: manager.open(path, nbytes=101)),
        (ValueError, lambda: manager.open(path, nbytes=0)),
        (ValueError, lambda: manager.open(file(0, "empty"))),
        (ValueError, lambda: manager.allocate(0)),
        (ValueError, lambda: manager.allocate(-1)),
        (ValueError, lambda: manager.allocate(1, name="")),
        (FileNotFoundError, lambda: manager.attach("missing")),
        (FileNotFoundError, lambda: manager.inject("missing", 0)),
        (ValueError, lambda: hwpoison.Manager(memory_limit=1)),
    ]
    for kind, action in refused:
        with pytest.raises(kind):
            action()
    table = manager.allocate(1, "t")
    with pytest.raises(FileExistsError):
        manager.allocate(1, "t")
    for offset in (-1, 1, 1 << 70):
        with pytest.raises(ValueError):
            manager.inject(table, offset)
    for wrong in (
        {},
        {"name": "t"},
        {"offset": 0},
        {"pid": 1},
        {"pfn": 1, "physical": 1},
        {"name": "t", "offset": 0, "pfn": 1},
    ):
        with pytest.raises(ValueError):
            manager.report(**wrong)  # type: ignore[arg-type]
    assert [one.name for one in manager.objects()] == ["t"], "nothing was left behind"


def test_one_file_in_one_mode_is_one_object_and_another_mode_is_refused(manager: hwpoison.Manager, file: MakeFile) -> None:
    path = file(PAGE)
    one, two = manager.open(path, "r+"), manager.open(str(path), "r+")
    one.buffer[0] ^= 255
    assert two.buffer[0] == one.buffer[0] != known(1)[0]
    with pytest.raises(FileExistsError, match="name="):
        manager.open(path)
    assert [(info.name, info.mappings) for info in manager.objects()] == [(str(path), 2)]


# --- losses -----------------------------------------------------------------------------------------------------------


def test_read_raises_for_what_it_needs_and_not_for_what_an_open_guard_has_met(manager: hwpoison.Manager) -> None:
    memory = manager.allocate(8 * PAGE + 1, "t")
    memory.buffer[:] = known(8 * PAGE + 1)
    for page in (1, 2, 5, 8):
        manager.inject(memory, page * PAGE)
    with pytest.raises(hwpoison.PoisonError) as caught:
        memory.read(2 * PAGE - 1, 6 * PAGE + 2)
    assert caught.value.ranges == (("t", PAGE, 2 * PAGE), ("t", 5 * PAGE, PAGE), ("t", 8 * PAGE, 1))
    with pytest.raises(hwpoison.PoisonError), hwpoison.guard(memory) as safe:
        safe.buffer[5 * PAGE]
        assert memory.read(3 * PAGE, 2 * PAGE) == known(5 * PAGE)[3 * PAGE :]
    assert memory.read(8 * PAGE, 0) == b""
    for outside in ((-1, 1), (0, -1), (8 * PAGE, 2), (8 * PAGE + 2, 0)):
        with pytest.raises(ValueError):
            memory.read(*outside)


def test_what_is_read_only_can_be_discarded_and_not_written(manager: hwpoison.Manager, file: MakeFile) -> None:
    path = file(2 * PAGE)
    memory = manager.open(path)
    assert memory.read(0, 2 * PAGE) == known(2 * PAGE)
    os.utime(path, (1, 1))
    manager.inject(memory, PAGE)
    for change in (lambda: memory.write(0, b"x"), lambda: memory.repair(PAGE, bytes(PAGE))):
        with pytest.raises(PermissionError):
            change()
    memory.flush()
    assert memory.discard() == PAGE
    assert memory.read(0, 2 * PAGE) == known(2 * PAGE)


WATCHER = """
manager = hwpoison.connect(arguments[0])
memory = manager.attach(arguments[1])
memory.read(0, 1)
say()
ended = threading.Event()
threading.Thread(target=lambda: hear() or ended.set()).start()
right = refused = 0
while not ended.is_set():
    try:
        with hwpoison.guard(memory) as safe:
            words = safe.array("u8").copy()
    except hwpoison.PoisonError:
        refused += 1
    else:
        # A repair in the middle of the copy shows the next version from there on, and nothing else.
        assert words[0] and (words[1:] >= words[:-1]).all(), words
        right += 1
say([right, refused])
del safe
manager.close()
"""


@pytest.mark.parametrize("by", ["repair", "write"])
def test_nobody_sees_anything_but_the_repaired_content_while_a_page_is_repaired(by: str, manager: hwpoison.Manager) -> None:
    memory = manager.allocate(PAGE, "t")
    memory.buffer[:] = (1).to_bytes(8, "little") * 512
    with Child(WATCHER, manager.socket, "t") as child:
        child.hear()
        for version in range(2, 1000):
            manager.inject(memory, 0)
            getattr(memory, by)(0, version.to_bytes(8, "little") * 512)
        right, refused = child.ask()
        assert right > 0
        assert refused > 0
        assert child.wait() == 0


# --- notices ----------------------------------------------------------------------------------------------------------


def test_functions_are_called_once_for_each_loss_until_they_are_cancelled(
    manager: hwpoison.Manager, caplog: pytest.LogCaptureFixture
) -> None:
    memory = manager.allocate(4 * PAGE, "t")
    memory.buffer[:] = known(4 * PAGE)
    first: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    second: queue.SimpleQueue[int] = queue.SimpleQueue()

    def fails(notice: hwpoison.Notice) -> None:
        first.put((notice.offset, threading.current_thread().name))
        raise RuntimeError("in the application")

    handle = memory.on_failure(fails)
    memory.on_failure(lambda notice: second.put(notice.offset))
    with caplog.at_level(logging.ERROR, "hwpoison"):
        manager.inject(memory, 0)
        assert first.get(timeout=SECONDS_MAX) == (0, "hwpoison-notices")
        assert second.get(timeout=SECONDS_MAX) == 0
    assert "in the application" in caplog.text
    handle.cancel()
    manager.inject(memory, PAGE)
    assert second.get(timeout=SECONDS_MAX) == PAGE
    assert first.empty()


def test_a_function_that_is_called_may_use_the_memory(manager: hwpoison.Manager) -> None:
    memory = manager.allocate(4 * PAGE, "t")
    memory.buffer[:] = known(4 * PAGE)
    healed = threading.Event()

    def heal(notice: hwpoison.Notice) -> None:
        memory.repair(notice.offset, known(4 * PAGE)[notice.offset : notice.offset + notice.nbytes])
        healed.set()

    memory.on_failure(heal)
    manager.inject(memory, 3 * PAGE)
    assert healed.wait(SECONDS_MAX)
    assert bytes(memory.buffer) == known(4 * PAGE)


# --- sizes and threads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "offset", "nbytes"),
    [(1, 0, None), (PAGE + 1, 0, None), (3 * PAGE - 7, 0, None), (3 * PAGE, 1234, 5000), (3 * PAGE, PAGE, 1), (100, 99, 1)],
)
def test_a_part_of_a_file_of_any_size_is_shown_and_written_back_exactly(
    size: int, offset: int, nbytes: int | None, manager: hwpoison.Manager, file: MakeFile
) -> None:
    path = file(size)
    expected = known(size)[offset:][:nbytes]
    memory = manager.open(path, "r+", offset, nbytes)
    assert memory.nbytes == len(expected)
    assert bytes(memory.buffer) == memory.read(0, memory.nbytes) == expected
    failure = manager.inject(memory, memory.nbytes - 1)
    assert failure.state is hwpoison.State.CLEAN_FILE
    assert failure.nbytes == (memory.nbytes - 1) % PAGE + 1
    assert bytes(memory.buffer) == expected
    changed = bytes(byte ^ 0x55 for byte in expected)
    memory.buffer[:] = changed
    memory.close()
    assert path.read_bytes() == known(size)[:offset] + changed + known(size)[offset + len(changed) :]


def test_anonymous_memory_has_any_size_and_its_last_page_can_be_repaired(manager: hwpoison.Manager) -> None:
    for nbytes in (1, PAGE - 1, PAGE, PAGE + 1):
        memory = manager.allocate(nbytes)
        assert bytes(memory.buffer) == bytes(nbytes)
        memory.buffer[-1] = 1
        last = (nbytes - 1) // PAGE * PAGE
        failure = manager.inject(memory, nbytes - 1)
        assert (failure.offset, failure.nbytes) == (last, nbytes - last)
        assert memory.lost() == [(memory.name, last, nbytes - last)]
        for wrong in (
            bytes(nbytes - last + 1),
            bytes(nbytes - last - 1) or bytes(2),
            bytes(PAGE) if nbytes % PAGE else bytes(1),
        ):
            with pytest.raises(ValueError):
                memory.repair(last, wrong)
        assert memory.repair(last, b"\x07" * (nbytes - last)) == nbytes - last
        assert memory.buffer[-1] == 7


def test_threads_that_open_and_close_memories_do_not_get_in_each_others_way(
    manager: hwpoison.Manager, file: MakeFile
) -> None:
    paths = [file(4 * PAGE, f"{number}.bin", number + 1) for number in range(4)]
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(60):
                memory = manager.open(paths[number], "r+")
                assert memory.read(0, 4 * PAGE) == known(4 * PAGE, number + 1)
                memory.buffer[0] = memory.buffer[0]
                memory.close()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    wait_until(lambda: manager.objects() == [], "all objects have ended")


def _allocate_until_refused(manager: hwpoison.Manager, begun: threading.Barrier, errors: list[BaseException]) -> None:
    begun.wait()
    try:
        while True:
            manager.allocate(PAGE).close()
    except BaseException as error:  # noqa: BLE001
        errors.append(error)


def test_a_close_that_views_forbid_has_flushed(manager: hwpoison.Manager, file: MakeFile) -> None:
    path = file(4 * PAGE)
    memory = manager.open(path, "r+")
    array = memory.array()
    array[:7] = numpy.frombuffer(b"changed", "u1")
    with pytest.raises(BufferError):
        memory.close()
    assert path.read_bytes()[:7] == b"changed"
    array[PAGE] = 7
    del array
    memory.close()
    assert path.read_bytes()[PAGE] == 7


def test_more_is_mapped_than_the_process_may_have_of_its_own(manager: hwpoison.Manager) -> None:
    """What is mapped is the manager's: limits of private memory are not for it."""
    code = """
import resource
manager = hwpoison.connect(arguments[0])
_, most = resource.getrlimit(resource.RLIMIT_DATA)
resource.setrlimit(resource.RLIMIT_DATA, (512 << 20, most))
memory = manager.allocate(4 << 30, populate=False)
memory.buffer[-1] = 7
say([memory.read(memory.nbytes - 1, 1)[0], memory.buffer[1 << 30]])
"""
    with Child(code, manager.socket) as child:
        assert child.hear() == [7, 0], child.errors
        assert child.wait() == 0


# What is just being made has no owner yet who could close it.
@pytest.mark.filterwarnings("ignore:still in use:ResourceWarning")
def test_what_is_asked_while_another_thread_closes_the_manager_is_told_that() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(5):
            manager = hwpoison.Manager()
            begun = threading.Barrier(5)
            errors: list[BaseException] = []

            threads = [threading.Thread(target=_allocate_until_refused, args=(manager, begun, errors)) for _ in range(4)]
            for thread in threads:
                thread.start()
            begun.wait()
            manager.close()
            for thread in threads:
                thread.join()
            assert {type(error) for error in errors} <= {ConnectionError}, errors
    finally:
        sys.setswitchinterval(before)


def test_content_that_lies_in_the_memory_itself_is_stored_as_it_was(manager: hwpoison.Manager) -> None:
    """As memmove has it, also where it takes several messages."""
    table = manager.allocate(3 * DATA_LIMIT, "table")
    again = manager.attach("table")
    for source in (table.buffer, again.buffer):
        source[:] = b"".join(number.to_bytes(8, "little") for number in range(len(source) // 8))
        expected = bytes(source[: 2 * DATA_LIMIT])
        table.write(PAGE, source[: 2 * DATA_LIMIT])
        assert table.read(PAGE, 2 * DATA_LIMIT) == expected


def test_a_memory_of_another_manager_is_not_taken_for_ours(manager: hwpoison.Manager) -> None:
    ours = manager.allocate(PAGE, "same name")
    with hwpoison.Manager() as other:
        theirs = other.allocate(PAGE, "same name")
        for strike in (
            lambda: manager.inject(theirs, 0),
            lambda: manager.report(theirs, 0),
            lambda: other.inject(ours, 0),
        ):
            with pytest.raises(ValueError, match="another manager's"):
                strike()
        assert theirs.lost() == ours.lost() == []
    with hwpoison.connect(manager.socket) as same:
        assert same.inject(ours, 0).outcome == hwpoison.Outcome.RECOVERED
    ours.close()
    with pytest.raises(ValueError, match="closed"):
        manager.inject(ours, 0)


def test_what_no_name_source_shape_or_content_can_be_is_said_in_words(manager: hwpoison.Manager) -> None:
    table = manager.allocate(4 * PAGE, "t")
    refused: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, "is Unicode text", lambda: manager.allocate(1, "\udcff")),
        (ValueError, "is Unicode text", lambda: manager.attach("\udcff")),
        (ValueError, "is Unicode text", lambda: manager.inject("\udcff", 0)),
        (ValueError, "is Unicode text", lambda: manager.report(table, 0, source="\udcff")),
        (ValueError, "at most 256 characters", lambda: manager.report(table, 0, source="x" * 257)),
        (ValueError, "contiguous", lambda: table.write(0, numpy.zeros(16, "u1")[::2])),
        (ValueError, "contiguous", lambda: table.repair(0, numpy.zeros((2, PAGE), "u1").T)),
        (TypeError, "bytes-like", lambda: table.write(0, 7)),  # type: ignore[arg-type]
        (TypeError, "shape is a whole number", lambda: table.array("u1", "3")),  # type: ignore[arg-type]
        (TypeError, "a number in shape is a whole number", lambda: table.array("u1", (2, 1.5))),  # type: ignore[arg-type]
        (ValueError, "must be 0 or more", lambda: table.array("u1", (2, -1))),
    ]
    for kind, message, action in refused:
        with pytest.raises(kind, match=message):
            action()
    table.write(0, numpy.zeros((0, 3)))
    assert table.repair(0, numpy.zeros((0, 3))) == 0
    assert table.array("u1", numpy.array([2, 3])).shape == (2, 3)  # type: ignore[arg-type]
    assert table.lost() == []
