"""`status`, `objects`, `inject`, `report`: what a manager says, and failures by hand."""

from __future__ import annotations

import json
import os
import re
import select
import sqlite3
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

import hwpoison
from tests.service.command import PAGE, assert_refused, bounded, document, next_line, run, started
from tests.support import need, wait_until

pytestmark = pytest.mark.usefixtures("log_path")
live = pytest.mark.live


# --- asking a manager


@live
def test_status_is_fine_until_bytes_are_lost(manager: hwpoison.Manager, table: hwpoison.Memory) -> None:
    before = document("status")
    assert (before["pid"], before["socket"]) == (manager.pid, manager.socket)
    assert (before["lost"], before["objects"], before["outcomes"]) == (0, 1, {})

    manager.inject(table, 0)
    after = document("status", status=1)
    assert (after["lost"], after["quarantined"]) == (PAGE, PAGE)
    assert (after["outcomes"], after["states"]) == ({"Recovered": 1}, {"anonymous page": 1})
    ended = run("status")
    assert ended.returncode == 1
    assert re.search(rf"^Lost +{PAGE // 1024} KiB, until its owner repairs or discards it$", ended.stdout, re.MULTILINE)

    table.discard(0, PAGE)
    assert document("status")["lost"] == 0


@live
def test_the_lines_of_status_below_the_failures_add_up_to_them(manager: hwpoison.Manager, table: hwpoison.Memory) -> None:
    manager.inject(table, 0)
    manager.inject(table, 0)  # known to be bad by then, and no second failure
    manager.inject(table, 8 * PAGE)
    manager.report(pid=1, address=PAGE)

    lines = [re.split("  +", line.strip()) for line in run("status").stdout.splitlines()]

    first = lines.index(["Failures", "3: 1 Ignored, 2 Recovered"])
    assert lines[first + 1 : first + 5] == [
        ["anonymous page", "1"],
        ["free page", "1"],
        ["unknown page", "1"],
        ["Reports of pages known to be bad", "1 (no new failures)"],
    ]


@live
def test_objects_lists_each_object_with_its_bytes_and_processes(manager: hwpoison.Manager, table: hwpoison.Memory) -> None:
    expected = {"name": "table", "kind": "anonymous", "nbytes": 16 * PAGE, "lost": 0, "pids": [os.getpid()]}
    (found,) = document("objects")["objects"]
    assert {key: found[key] for key in expected} == expected

    manager.inject(table, 0)
    ended = run("objects")
    assert ended.returncode == 1
    headings, row = (re.split("  +", line.strip()) for line in ended.stdout.splitlines())
    shown = dict(zip(headings, row, strict=True))
    size = f"{16 * PAGE // 1024} KiB"
    assert (shown["NAME"], shown["SIZE"], shown["LOST"]) == ("table", size, f"{PAGE // 1024} KiB")
    assert not any(line.endswith(" ") for line in ended.stdout.splitlines())


@live
def test_a_guard_is_no_further_process_of_an_object(table: hwpoison.Memory) -> None:
    with hwpoison.guard(table) as safe:
        assert safe.array("u1")[0] == ord("x")
        shown = run("objects").stdout.splitlines()[1]

    assert shown.split()[-1] == str(os.getpid())
    assert shown.endswith(f" 0 B  {os.getpid()}"), "nothing else is counted"


@live
def test_objects_names_a_few_processes_and_counts_the_rest(manager: hwpoison.Manager, table: hwpoison.Memory) -> None:
    script = "import hwpoison, sys; t = hwpoison.connect().attach('table'); print('ready', flush=True); sys.stdin.read()"
    with ExitStack() as stack:
        for _ in range(4):
            child = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            stack.enter_context(bounded(child))
            assert next_line(child) == "ready"
        (found,) = document("objects")["objects"]
        assert len(found["pids"]) == 5
        first = " ".join(map(str, found["pids"][:3]))
        assert run("objects").stdout.splitlines()[1].endswith(f" {first} and 2 more")


@live
def test_a_manager_without_objects_says_so(manager: hwpoison.Manager) -> None:
    ended = run("objects")

    assert (ended.returncode, ended.stdout) == (0, "The manager owns no memory now.\n")
    assert document("objects") == {"objects": []}


@live
def test_a_name_cannot_act_on_the_terminal(manager: hwpoison.Manager) -> None:
    memory = manager.allocate(PAGE, name="\x1b[31mred\nline")

    ended = run("objects")

    assert not memory.closed
    assert r"\x1b[31mred\nline" in ended.stdout
    assert "\x1b" not in ended.stdout


# --- failures


@live
def test_inject_prints_the_kernels_line_with_the_id_of_its_events(table: hwpoison.Memory) -> None:
    ended = run("inject", "table", hex(PAGE))

    assert ended.returncode == 1, "data was lost"
    line, victims = ended.stdout.splitlines()
    pattern = rf"Memory failure: table\+{PAGE:#x}: recovery action for anonymous page: Recovered \[(\S+)\]"
    found = re.fullmatch(pattern, line)
    assert found is not None
    assert victims == f"Data lost in process {os.getpid()}"
    logged = run("log", "--event", found[1], "--json").stdout.splitlines()
    assert {json.loads(one)["kind"] for one in logged} >= {"report", "outcome", "victim"}
    assert table.lost() == [("table", PAGE, PAGE)]


@live
def test_inject_into_a_free_page_finds_nothing(table: hwpoison.Memory) -> None:
    failure = document("inject", "table", 8 * PAGE)

    assert (failure["state"], failure["outcome"], failure["victims"]) == ("free page", "Recovered", [])
    assert failure["latency_us"] > 0


@live
def test_what_a_failure_means_is_said_in_a_line_after_the_kernels(table: hwpoison.Memory) -> None:
    def said(*arguments: object) -> str:
        return run(*arguments).stdout.splitlines()[1]

    assert said("inject", "table", 8 * PAGE) == "Nothing is there; the next access gets a good frame."
    assert said("report", "--pid", 1, "--address", 0) == (
        "Nothing was done: it is not this manager's memory; see serve --offline-foreign."
    )


@live
def test_a_foreign_frame_that_the_kernel_was_asked_to_take_is_not_said_to_be_left_alone(log_path: Path) -> None:
    need(os.geteuid() == 0, "root, who may hand frames to the kernel")
    with hwpoison.Manager(offline_foreign=True) as manager:
        # No machine has this frame, so a kernel that can take frames refuses it.
        ended = run("report", "--pfn", 1 << 40, "--socket", manager.socket)

    assert "Ignored (the kernel's hard offline failed:" in ended.stdout
    assert "Nothing was done" not in ended.stdout


@live
def test_a_failure_that_is_printed_is_in_the_event_log(table: hwpoison.Memory, log_path: Path) -> None:
    run("inject", "table", 8 * PAGE)
    with closing(sqlite3.connect(log_path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")  # the manager cannot write to the log
        with started("inject", "table", 0) as injecting:
            wait_until(table.lost, "the failure is handled")
            assert injecting.stdout is not None
            assert not select.select([injecting.stdout], [], [], 0.5)[0]
            writer.execute("ROLLBACK")
            event_id = next_line(injecting).rpartition("[")[2].rstrip("]")
            assert run("log", "--event", event_id).returncode == 0


@live
def test_inject_passes_on_that_action_is_required(table: hwpoison.Memory) -> None:
    event_id = document("inject", "table", 0, "--action-required", status=1)["event_id"]

    logged = json.loads(run("log", "--event", event_id, "--json").stdout.splitlines()[0])
    assert (logged["kind"], logged["detail"]) == ("report", "injected, action required")


@live
@pytest.mark.parametrize(
    ("name", "offset", "word"),
    [
        ("nothing", 0, "no object 'nothing'"),
        ("table", 16 * PAGE, f"byte {16 * PAGE:#x} is not within 'table' ({16 * PAGE:#x} bytes)"),
    ],
)
def test_inject_into_what_does_not_exist_is_status_2(table: hwpoison.Memory, name: str, offset: int, word: str) -> None:
    assert_refused(run("inject", name, offset), 2, word)
    assert_refused(run("report", "--name", name, "--offset", offset), 2, word)


@live
def test_whoever_names_a_file_as_the_shell_does_is_told_the_name_of_its_object(
    manager: hwpoison.Manager, tmp_path: Path
) -> None:
    path = tmp_path / "d.bin"
    path.write_bytes(b"x" * PAGE)
    memory = manager.open(path)

    words = f"there is no object 'd.bin'; a file's name is its absolute path: '{path}'"
    assert memory.name == str(path)
    assert_refused(run("inject", "d.bin", 0, cwd=tmp_path), 2, words)


@live
def test_a_page_is_reported_by_name_or_by_process_and_address(table: hwpoison.Memory) -> None:
    by_name = document("report", "--name", "table", "--offset", 0, "--source", "a scan", status=1)
    by_address = document("report", "--pid", os.getpid(), "--address", hex(table.address + PAGE), status=1)

    assert [(one["name"], one["offset"], one["victims"]) for one in (by_name, by_address)] == [
        ("table", 0, [os.getpid()]),
        ("table", PAGE, [os.getpid()]),
    ]
    logged = json.loads(run("log", "--event", by_name["event_id"], "--json").stdout.splitlines()[0])
    assert logged["detail"] == "a scan, action optional"


@live
def test_a_page_is_reported_by_frame_or_physical_address(table: hwpoison.Memory) -> None:
    need(os.geteuid() == 0, "root, who may see page frame numbers")

    def frame(page: int) -> int:
        assert table.buffer[page * PAGE] == ord("x")
        with Path("/proc/self/pagemap").open("rb") as pagemap:
            pagemap.seek((table.address // PAGE + page) * 8)
            return int.from_bytes(pagemap.read(8), "little") & ((1 << 55) - 1)

    first, second = frame(0), frame(1)
    by_frame = document("report", "--pfn", first, status=1)
    ended = run("report", "--physical", hex(second * PAGE + 100))

    assert (by_frame["name"], by_frame["offset"]) == ("table", 0)
    assert ended.stdout.startswith(f"Memory failure: {second:#x}: recovery action for anonymous page: Recovered [")
    assert table.lost() == [("table", 0, 2 * PAGE)]


@live
def test_a_frame_that_belongs_to_nobody_here_is_ignored_and_no_finding(table: hwpoison.Memory) -> None:
    failure = document("report", "--pid", 1, "--address", "0x1000")

    assert (failure["state"], failure["outcome"]) == ("unknown page", "Ignored")
