"""The pytest fixture, as somebody uses it who tests a program: pytest runs as they would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import SECONDS_MAX

pytestmark = pytest.mark.live

PROGRAM = """
import numpy
import pytest
from hwpoison import Manager, PoisonError, guard, lost
import hwpoison as library

import mmap
PAGE = mmap.PAGESIZE


class Table:
    def __init__(self):
        self.manager = Manager()
        self.memory = self.manager.allocate(64 * PAGE, "table")
        self.array = self.memory.array("u8", (64, PAGE // 8))
        for row in range(64):
            self.array[row] = row

    def sum(self):
        while True:
            try:
                with guard(self.memory) as safe:
                    return int(safe.array("u8").sum())
            except PoisonError as error:
                for one in error.ranges:
                    row = one.offset // PAGE
                    self.memory.repair(one.offset, numpy.full(PAGE // 8, row, "u8"))


@pytest.fixture
def table():
    return Table()
"""


def run(folder: Path, tests: str, **variables: str) -> tuple[int, str]:
    (folder / "test_it.py").write_text(PROGRAM + tests)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    environment = {**os.environ, **variables}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=SECONDS_MAX, check=False, env=environment
    )
    return done.returncode, done.stdout + done.stderr


def test_a_page_that_is_lost_already_can_be_struck_again(tmp_path: Path) -> None:
    status, said = run(
        tmp_path,
        """
def test_it(hwpoison, table):
    for index in ((3, 5), 3, (3, 5), numpy.int64(3)):
        hwpoison.strike(table.array, index)
    hwpoison.strike(table.memory, numpy.int64(3 * PAGE))
    for wrong in (64, (1, 2, 3), (-65,)):
        with pytest.raises(IndexError):
            hwpoison.strike(table.array, wrong)
    assert table.sum() == sum(range(64)) * (PAGE // 8)
""",
    )
    assert status == 0, said


def test_a_program_that_repairs_what_it_loses_passes(tmp_path: Path) -> None:
    status, said = run(
        tmp_path,
        """
def test_strike(hwpoison, table):
    expected = table.sum()
    failure = hwpoison.strike(table.array, 17)
    assert (failure.offset, failure.outcome) == (17 * PAGE, "Recovered")
    assert hwpoison.strike(table.array, (18, 5)).offset == 18 * PAGE
    assert hwpoison.strike(table.array[:, -1], -1).offset == 63 * PAGE
    assert hwpoison.strike(table.memory, 3 * PAGE + 5).offset == 3 * PAGE
    assert lost(table.array).tolist() == [3, 17, 18, 63]
    assert table.sum() == expected

def test_storm(hwpoison, table):
    expected = table.sum()
    with hwpoison.storm(table.array[10:20], failures=50, seed=5) as storm:
        while not storm.over.is_set():
            assert table.sum() == expected
    assert table.sum() == expected
    assert len(storm.struck) == 50
    assert {one.offset // PAGE for one in storm.struck} <= set(range(10, 20))

def test_declared(hwpoison, table):
    hwpoison.declare(hwpoison.strike(table.array, 1))
    hwpoison.strike(table.array, 2)
    hwpoison.declare(*[])
    table.manager.inject(table.memory, 7 * PAGE)
    assert [int(one.split("offset ")[1].split()[0], 16) // PAGE for one in hwpoison.undeclared()] == [2, 7]
    hwpoison.declare_all()
    assert hwpoison.undeclared() == []

def test_a_number_by_itself(hwpoison, table):
    number = table.array[5, 3:4].reshape(())
    for index in (None, ()):
        assert hwpoison.strike(number, index).offset == 5 * PAGE
        table.sum()

def test_a_storm_strikes_nothing_between(hwpoison, table):
    with hwpoison.storm(table.array[::-2, :3], failures=50) as storm:
        assert storm.over.wait(60)
    table.sum()
    assert {one.offset // PAGE % 2 for one in storm.struck} == {1}
    assert len({one.offset for one in storm.struck}) > 10


def test_a_page_of_a_file_comes_back_by_itself(hwpoison, tmp_path):
    numpy.save(tmp_path / "x.npy", numpy.arange(5000))
    with Manager() as manager:
        array = library.load(tmp_path / "x.npy", manager=manager)
        assert array.sum() == sum(range(5000))
        assert hwpoison.strike(array, 3000).outcome == "Recovered"
        assert array.sum() == sum(range(5000))
        del array

def test_policy(hwpoison, table):
    assert table.memory.policy == "late"
    hwpoison.policy("early")
    assert table.memory.policy == "early"

def test_policy_was_for_one_test(table):
    assert table.memory.policy == "late"

def test_wrong_arguments(hwpoison, table):
    outside = (((table.array, 64), IndexError), ((table.memory, -1), IndexError))
    for wrong, error in (((numpy.zeros(5), 0), ValueError), *outside):
        with pytest.raises(error):
            hwpoison.strike(*wrong)
""",
    )
    assert status == 0, said
    assert "9 passed" in said


def test_an_undeclared_loss_fails_the_test_and_says_which(tmp_path: Path) -> None:
    status, said = run(
        tmp_path,
        """
@pytest.fixture(scope="module")
def lost_before():
    manager = Manager()
    manager.table = manager.allocate(2 * PAGE)
    manager.table.write(0, b"x")
    manager.inject(manager.table, 0)
    yield manager

def test_forgets(hwpoison, table):
    hwpoison.strike(table.array, 17)

def test_forgets_what_it_has_injected_itself(hwpoison, table):
    table.manager.inject(table.memory, 5 * PAGE)

def test_is_told_of_what_its_child_has_lost_for_it(hwpoison, table):
    import os
    child = os.fork()
    if not child:
        hwpoison.strike(table.array, 6)
        os._exit(0)
    os.waitpid(child, 0)

def test_forgets_what_a_child_alone_has_lost(hwpoison):
    import os
    with Manager() as manager:
        child = os.fork()
        if not child:
            memory = manager.allocate(PAGE)
            memory.write(0, b"x")
            manager.inject(memory, 0)
            os._exit(0)
        os.waitpid(child, 0)

def test_forgets_what_a_shared_one_has_lost(hwpoison):
    with Manager() as manager, library.connect(manager.socket) as shared:
        memory = shared.allocate(PAGE, "shared")
        memory.write(0, b"x")
        shared.inject(memory, 0)
        shared.close()

def test_what_stood_before_is_not_its_own(hwpoison, lost_before):
    lost_before.table.read(PAGE, 1)

def test_forgets_the_manager_too(hwpoison):
    memory = Manager().allocate(PAGE)
    memory.write(0, b"x")
    memory.manager.inject(memory, 0)
    del memory
    import gc
    gc.collect()

def test_forgets_and_closes(hwpoison):
    with Manager() as manager:
        memory = manager.allocate(PAGE, "closed")
        memory.write(0, b"x")
        hwpoison.strike(memory, 0)
        memory.close()

def test_another_is_well(hwpoison, table):
    hwpoison.strike(table.array, 17)
    table.sum()

@pytest.fixture
def strikes_again(hwpoison, table):
    yield
    hwpoison.strike(table.array, 3)

def test_what_is_lost_behind_it_is_an_error_of_its_own(hwpoison, table, strikes_again):
    hwpoison.strike(table.array, 17)

@pytest.mark.xfail(strict=True)
def test_known(hwpoison, table):
    hwpoison.strike(table.array, 17)
""",
    )
    assert status == 1, said
    assert "8 failed, 2 passed, 1 xfailed, 1 error" in said
    assert said.count("\n1 undeclared losses: ") == 9
    assert "'table'" in said
    assert "'closed'" in said


@pytest.mark.parametrize("log", ["/proc/nowhere/events.db", "/dev/null"])
def test_it_works_where_there_is_no_event_log(tmp_path: Path, log: str) -> None:
    tests = """
def test_is_well(hwpoison, table):
    hwpoison.strike(table.array, 17)
    table.sum()

def test_forgets(hwpoison, table):
    hwpoison.strike(table.array, 17)

def test_forgets_what_it_has_injected_itself(hwpoison, table):
    table.manager.inject(table.memory, 5 * PAGE)

def test_forgets_and_closes(hwpoison):
    with Manager() as manager:
        memory = manager.allocate(PAGE, "closed")
        memory.write(0, b"x")
        hwpoison.strike(memory, 0)
        memory.close()
"""
    status, said = run(tmp_path, tests, HWPOISON_LOG=log)
    assert status == 1, said
    assert "3 failed, 1 passed" in said


def test_it_costs_a_run_without_it_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import sys\ndef test(): assert not {'numpy', 'msgspec', 'hwpoison.app'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    assert done.returncode == 0, done.stdout
