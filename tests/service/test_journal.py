"""The journal's file: torn, of another format, without room."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator

import pytest

from hwpoison.linux.journal import FORMAT, LABEL, JournalError, LinuxRecords, read
from tests.support import SECONDS_MAX


class Kept:
    """Keeps the newest journal."""

    def __init__(self) -> None:
        self.fd = -1

    def keep(self, *things: tuple[str, int]) -> None:
        self.drop(LABEL)
        ((label, fd),) = things
        assert label == LABEL
        self.fd = os.dup(fd)

    def drop(self, *labels: str) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


@pytest.fixture
def kept() -> Iterator[Kept]:
    kept = Kept()
    yield kept
    kept.drop(LABEL)


def written_bytes(fd: int) -> int:
    """Up to where something was written: the rest is room."""
    return len(os.pread(fd, 1 << 22, 0).rstrip(b"\0"))


def test_a_journal_that_was_torn_anywhere_has_what_was_written_before(kept: Kept) -> None:
    records = LinuxRecords(kept)
    ends = []
    for number in range(20):
        records.put(("thing", number), "x" * number)
        ends.append(written_bytes(kept.fd))
    whole = os.pread(kept.fd, ends[-1], 0)
    for cut in range(ends[0], ends[-1]):
        torn = os.memfd_create("torn")
        os.write(torn, whole[:cut] + bytes(64))
        found = read(torn)
        os.close(torn)
        assert found == {("thing", number): "x" * number for number in range(sum(end <= cut for end in ends))}
    records.close()


def test_of_a_journal_in_which_any_bit_has_changed_nothing_is_believed(kept: Kept) -> None:
    records = LinuxRecords(kept)
    for number in range(3):
        records.put(("thing", number), [0, "x" * number, 0])
    whole = os.pread(kept.fd, written_bytes(kept.fd), 0)
    damaged = os.memfd_create("damaged")
    for at in range(len(whole)):
        for bit in range(8):
            os.pwrite(damaged, whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :] + bytes(64), 0)
            with pytest.raises(JournalError):
                read(damaged)
    os.close(damaged)
    records.close()


def test_what_is_written_together_is_there_as_a_whole_or_not_at_all(kept: Kept) -> None:
    records = LinuxRecords(kept)
    records.put(("old",), 1)
    before = written_bytes(kept.fd)
    with records.together():
        records.drop(("old",))
        with records.together():
            records.put(("new",), 2)
        assert written_bytes(kept.fd) == before
    whole = os.pread(kept.fd, written_bytes(kept.fd), 0)
    assert read(kept.fd) == {("new",): 2}
    torn = os.memfd_create("torn")
    os.write(torn, whole[:-1])
    assert read(torn) == {("old",): 1}
    os.close(torn)
    records.close()


def test_it_is_written_anew_when_most_of_it_is_old(kept: Kept) -> None:
    records = LinuxRecords(kept)
    for number in range(20_000):
        records.put(("thing", number % 10), "x" * 100)
    assert written_bytes(kept.fd) < 1 << 18
    assert read(kept.fd) == {("thing", number): "x" * 100 for number in range(10)}
    records.close()


def test_another_format_and_what_is_none_are_refused(kept: Kept) -> None:
    records = LinuxRecords(kept)
    os.pwrite(kept.fd, bytes([FORMAT + 1]), 8)
    with pytest.raises(JournalError, match=f"of format {FORMAT + 1}; this knows {FORMAT}"):
        read(kept.fd)
    os.pwrite(kept.fd, b"another", 0)
    with pytest.raises(JournalError, match="is no journal"):
        read(kept.fd)
    records.close()


WITHOUT_ROOM = """
import logging, resource, signal, sys
from hwpoison.linux.journal import LinuxRecords
from tests.service.test_journal import Kept
logging.basicConfig()
kept = Kept()
records = LinuxRecords(kept)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
number = 0
refused = -1
while kept.fd >= 0:
    number += 1
    records.put(("thing", number), "x" * 100)
    try:
        records.require()
    except MemoryError as error:
        if refused < 0:
            refused = number
            print(error)
print(0 < refused < number - 500, records.all()["thing", number] == "x" * 100)
"""


def test_without_room_what_begins_is_refused_and_when_the_reserve_is_used_up_there_is_no_successor() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ROOM], capture_output=True, text=True, timeout=SECONDS_MAX, check=False
    )
    assert done.stdout.splitlines() == ["the manager's journal can't grow: File too large", "True True"]
    assert done.stderr.count("the manager's journal can't be written (File too large): if the manager dies") == 1
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
