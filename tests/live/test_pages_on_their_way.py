"""Reports on pages that are being read in, written back or closed: waited for, and then decided."""

from __future__ import annotations

import select
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import hwpoison
from hwpoison import Outcome, State
from tests.live.conftest import known
from tests.live.frames import PAGE, forget_cached
from tests.live.process import Child
from tests.live.reading import reader, told_of, touch
from tests.live.slow_files import SlowFile
from tests.support import wait_until

MakeFile = Callable[..., Path]
MakeSlowFile = Callable[[bytes], SlowFile]


def test_a_report_on_a_page_that_is_being_read_in_waits_for_it_and_then_decides(
    slow_file: MakeSlowFile, manager: hwpoison.Manager
) -> None:
    slow = slow_file(known(4 * PAGE))
    memory = manager.open(slow.path, name="slow")
    slow.hold("read")
    reporter = "manager = hwpoison.connect(arguments[0], maps=False)\nsay(str(manager.report(arguments[1], 0).state))"
    with reader(manager, memory) as child:
        child.tell([0, 4 * PAGE])
        wait_until(lambda: bool(slow.waiting), "the file is being read")
        with Child(reporter, manager.socket, "slow") as reporting:
            wait_until(lambda: (0, "report") in told_of(manager, "slow"), "the report has arrived")
            assert (0, "outcome") not in told_of(manager, "slow")
            slow.hold()
            assert reporting.hear() == State.CLEAN_FILE
        assert child.hear() == known(4 * PAGE).hex()
        child.tell(None)
    assert touch(memory) == known(4 * PAGE)


def test_reports_during_a_prefetch_of_an_uncached_file_leave_every_byte_right(
    manager: hwpoison.Manager, file: MakeFile
) -> None:
    nbytes = 24 << 20
    path = file(nbytes)
    expected = known(nbytes)
    states = set()
    prefetch = """
manager = hwpoison.connect(arguments[0])
while (path := hear()) is not None:
    memory = manager.open(path)
    say()
    memory.prefetch()
    say()
    memory.close()
manager.close()
"""
    with Child(prefetch, manager.socket) as child:
        for _ in range(8):
            forget_cached(path)
            child.ask(str(path))
            memory = manager.open(path)
            # Just where the reading is: some pages are absent, some locked, some have come.
            while present := manager.objects()[0].present < nbytes:
                present = manager.objects()[0].present
                failure = manager.report(memory, min(present, nbytes - PAGE))
                states.add(failure.state)
                assert failure.outcome == Outcome.RECOVERED
                if present >= nbytes - PAGE:
                    break
            child.hear()
            assert touch(memory) == expected
            assert memory.lost() == []
            memory.close()
            wait_until(lambda: manager.objects() == [], "the object ends with its last mapping")
        child.tell(None)
    assert State.CLEAN_FILE in states, "no report met a page that had come or was coming"


def test_a_report_on_a_page_that_is_being_written_back_waits_for_that_and_loses_nothing(
    slow_file: MakeSlowFile, manager: hwpoison.Manager
) -> None:
    slow = slow_file(known(4 * PAGE))
    memory = manager.open(slow.path, "r+", name="slow")
    memory.buffer[:] = known(4 * PAGE, 2)
    slow.hold("write")
    with reader(manager, memory) as child:
        child.tell("flush")
        wait_until(lambda: bool(slow.waiting), "the page is being written")
        reporter = """
manager = hwpoison.connect(arguments[0], maps=False)
failure = manager.report(arguments[1], 0)
say([failure.state, failure.outcome])
"""
        with Child(reporter, manager.socket, "slow") as reporting:
            wait_until(lambda: (0, "report") in told_of(manager, "slow"), "the report has arrived")
            assert (0, "outcome") not in told_of(manager, "slow")
            slow.hold()
            assert reporting.hear() == [State.CLEAN_FILE, Outcome.RECOVERED]
        assert child.hear() == 0
        assert touch(memory) == known(4 * PAGE, 2) == slow.content
        child.tell(None)


def test_a_page_whose_write_back_fails_while_a_report_waits_is_lost_not_read_again_stale(
    slow_file: MakeSlowFile, manager: hwpoison.Manager
) -> None:
    slow = slow_file(known(PAGE))
    memory = manager.open(slow.path, "r+", name="slow")
    memory.buffer[:] = known(PAGE, 2)
    slow.hold("write")
    reporter = "manager = hwpoison.connect(arguments[0], maps=False)\nsay(manager.report(arguments[1], 0).state)"
    with reader(manager, memory) as child:
        child.tell("flush")
        wait_until(lambda: bool(slow.waiting), "the page is being written")
        with Child(reporter, manager.socket, "slow") as reporting:
            wait_until(lambda: (0, "report") in told_of(manager, "slow"), "the report has arrived")
            slow.fail(write=28)
            slow.hold()
            assert reporting.hear() == State.DIRTY_FILE
        assert child.hear() == 28
        assert child.ask([0, 1]) == [["slow", 0, PAGE]]
        child.tell(None)
        slow.fail()
    with pytest.raises(OSError):
        memory.flush()


def test_reports_during_a_loop_of_writes_and_flushes_lose_what_is_declared_and_nothing_else(
    manager: hwpoison.Manager, file: MakeFile
) -> None:
    pages = 64
    path = file(pages * PAGE)
    writer = """
manager = hwpoison.connect(arguments[0])
memory = manager.open(arguments[1], "r+")
pages = arguments[2]
say()
rounds, lost = 0, set()
for rounds in range(1, 41):
    for page in range(pages):
        try:
            memory.write(page * 4096, rounds.to_bytes(8, "little") * 512)
        except hwpoison.PoisonError:
            say("a write of a whole page repairs it")
    try:
        memory.flush()
    except OSError as error:
        assert error.errno == 5, error
# What was lost after its last write must be said to be lost; everything else must be there.
for name, offset, nbytes in memory.lost():
    lost.update(range(offset // 4096, (offset + nbytes) // 4096))
for page in range(pages):
    if page not in lost:
        assert memory.read(page * 4096, 4096) == rounds.to_bytes(8, "little") * 512, page
say(sorted(lost))
hear()
memory.discard()
for page in range(pages):
    memory.write(page * 4096, rounds.to_bytes(8, "little") * 512)
try:
    memory.flush()
except OSError:
    memory.flush()
manager.close()
say()
"""
    states = set()
    with Child(writer, manager.socket, str(path), pages) as child:
        child.hear()
        page = 0
        while not select.select([child.output], [], [], 0)[0]:
            states.add(manager.report(str(path), page % pages * PAGE).state)
            page += 7
        assert isinstance(child.hear(), list)
        child.ask()
        assert child.wait() == 0
    assert {State.CLEAN_FILE, State.DIRTY_FILE} <= states
    assert path.read_bytes() == (40).to_bytes(8, "little") * 512 * pages


def test_a_page_whose_object_ends_while_the_report_waits_is_a_truncated_page(
    slow_file: MakeSlowFile, manager: hwpoison.Manager
) -> None:
    slow = slow_file(known(4 * PAGE))
    slow.hold("read")
    owner = """
manager = hwpoison.connect(arguments[0])
memory = manager.open(arguments[1], name="slow")
memory.prefetch()
"""
    reporter = """
manager = hwpoison.connect(arguments[0], maps=False)
failure = manager.report("slow", 0)
say([failure.state, failure.outcome])
"""
    with Child(owner, manager.socket, str(slow.path)) as owning:
        wait_until(lambda: bool(slow.waiting), "the page is being read in")
        owning.signal(signal.SIGKILL)
        owning.wait()
        wait_until(lambda: manager.objects()[0].mappings == 0, "the manager has seen that its only client is dead")
        with Child(reporter, manager.socket) as reporting:
            wait_until(lambda: (0, "report") in told_of(manager, "slow"), "the report has arrived")
            slow.hold()
            assert reporting.hear() == [State.TRUNCATED, Outcome.IGNORED]
    assert manager.objects() == []
