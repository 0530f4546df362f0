"""A page is named by its object, by a frame or physical address, or by a process and address."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import hwpoison
from hwpoison import State
from tests.live.frames import PAGE, frame_at
from tests.live.process import Child
from tests.live.reading import touch

MakeFile = Callable[..., Path]


@pytest.mark.usefixtures("root")
def test_a_frame_is_found_beside_a_huge_object_that_is_nearly_empty(manager: hwpoison.Manager) -> None:
    huge, memory = manager.allocate(1 << 44, "huge"), manager.allocate(PAGE, "t")
    for offset in (0, 1 << 43, huge.nbytes - PAGE):
        huge.buffer[offset] = 1
    touch(memory)
    failure = manager.report(pfn=frame_at(memory.address))
    assert (failure.name, failure.state) == ("t", State.ANONYMOUS)
    failure = manager.report(pfn=frame_at(huge.address + (1 << 43)))
    assert (failure.name, failure.offset) == ("huge", 1 << 43)
    assert manager.report(pfn=1).name is None


def test_a_page_is_reached_by_name_and_by_the_address_of_any_of_its_mappings(manager: hwpoison.Manager) -> None:
    memory = manager.allocate(8 * PAGE, "t")
    second = manager.attach("t")
    touch(memory)
    ways = [
        {"name": "t", "offset": PAGE + 1},
        {"name": memory, "offset": 3 * PAGE - 1},
        {"pid": os.getpid(), "address": memory.address + 3 * PAGE + 77},
        {"pid": os.getpid(), "address": second.address + 4 * PAGE},
    ]
    with hwpoison.guard(memory) as safe:
        ways.append({"pid": os.getpid(), "address": safe.address + 5 * PAGE + 4095})
    for page, way in enumerate(ways, 1):
        failure = manager.report(**way, source="test")
        assert (failure.name, failure.offset, failure.state) == ("t", page * PAGE, State.ANONYMOUS), way
    assert memory.lost() == [("t", PAGE, 5 * PAGE)]
    reports = [event.detail for event in manager.events() if event.kind == "report"]
    assert reports[0] == "test, action optional"
    del safe


@pytest.mark.usefixtures("root")
def test_a_foreign_frame_is_unknown_also_beside_a_file_whose_name_is_not_text(
    manager: hwpoison.Manager, tmp_path: Path
) -> None:
    path = os.fsencode(tmp_path) + b"/\xff"
    with open(path, "wb") as file:
        file.write(b"z" * PAGE)
    memory = manager.open(path)
    assert memory.read(0, 1) == b"z"
    failure = manager.report(pfn=(1 << 40) - 1)
    assert (failure.state, failure.name) == (State.UNKNOWN, None)
    assert failure.event_id in [event.event_id for event in manager.events() if event.kind == "outcome"]


@pytest.mark.usefixtures("root")
def test_a_page_is_reached_by_its_frame_and_by_its_physical_address(manager: hwpoison.Manager, file: MakeFile) -> None:
    table, weights = manager.allocate(1000 * PAGE, "t"), manager.open(file(8 * PAGE), name="w")
    touch(table)
    # The manager must find it although nobody but a client maps it there.
    assert len(touch(weights)) == 8 * PAGE
    for memory, page, way in ((table, 999, "pfn"), (weights, 7, "pfn"), (table, 998, "physical"), (weights, 0, "physical")):
        frame = frame_at(memory.address + page * PAGE)
        place = {"pfn": frame} if way == "pfn" else {"physical": frame * PAGE + 4095}
        failure = manager.report(**place)
        assert (failure.name, failure.offset) == (memory.name, page * PAGE)
    assert table.lost() == [("t", 998 * PAGE, 2 * PAGE)]


def test_a_manager_without_root_refuses_frames_and_finds_pages_by_the_other_ways(nobody: Callable[..., Child]) -> None:
    code = """
with hwpoison.Manager() as manager:
    memory = manager.allocate(8192, "t")
    memory.buffer[0]
    for place in ({"pfn": 1}, {"physical": 4096}):
        try:
            say(str(manager.report(**place).state))
        except PermissionError as error:
            say("root" in str(error))
    say(manager.report(memory, 0).state)
    say(memory.lost())
"""
    with nobody(code) as child:
        assert [child.hear() for _ in range(4)] == [True, True, State.ANONYMOUS, [["t", 0, PAGE]]]
        assert child.wait() == 0


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({}, "report needs one of"),
        ({"name": "t", "offset": 0, "pfn": 1}, "report needs one of"),
        ({"name": "t"}, "name needs offset"),
        ({"address": 1}, "address needs pid"),
        ({"name": "t", "offset": -1}, "offset -1: must be 0 or more"),
        ({"physical": -1}, "physical -1: must be 0 or more"),
    ],
)
def test_a_report_that_names_no_page_says_what_is_wrong(
    manager: hwpoison.Manager, place: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        manager.report(**place)


def test_a_manager_to_which_nothing_has_happened_has_no_events(manager: hwpoison.Manager) -> None:
    assert list(manager.events()) == []
    manager.inject(manager.allocate(PAGE, name="t"), 0)
    assert [event.kind for event in manager.events()] == ["report", "outcome"]
