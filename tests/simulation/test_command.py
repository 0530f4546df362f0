"""`hwpoison explore`, as a person uses it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOUND = Path(__file__).parent / "found"


def explore(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "hwpoison", "explore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_run_is_told_as_a_story() -> None:
    done = explore("--replay", str(FOUND / "torn-discard.json"))
    assert done.returncode == 0
    assert "read-only absent: discard 0, change 0" in done.stdout
    assert "When it was found, this did not hold: No page gets content that" in done.stdout
    assert "page 0: poisoned, lost" in done.stdout
    assert done.stdout.endswith("Everything holds.\n")


def test_a_run_that_diverges_is_neither_a_pass_nor_a_failure(tmp_path: Path) -> None:
    document = json.loads((FOUND / "torn-discard.json").read_text())
    document["names"][1] = "something else"
    path = tmp_path / "run.json"
    path.write_text(json.dumps(document))
    done = explore("--replay", str(path))
    assert done.returncode == 2
    assert "diverged at choice 1" in done.stderr


@pytest.mark.parametrize(
    ("scenario", "text"),
    [
        (
            {"kind": "anonymous", "states": ["absent"], "operations": [["truncate", 0]]},
            "no 'truncate' of a anonymous object",
        ),
        ({"kind": "anonymous", "states": ["absent"], "operations": [], "worker": [5]}, "a worker on pages (5,) of 1"),
        ({"kind": "read-only", "states": ["lost"], "operations": [["repair", 0]]}, "no 'repair' of a read-only object"),
        ({"kind": "writable", "states": ["lost"], "operations": [], "budget": [["luck", 1]]}, "a budget for luck"),
        ({"kind": "writable", "states": ["lost"], "operations": [], "sigbus": "odd"}, "a SIGBUS that is 'odd'"),
        (
            {"kind": "anonymous", "states": ["present"], "operations": [], "clients": [[["close", 0], ["close", 0]]]},
            "a client that comes after",
        ),
    ],
)
def test_a_run_of_what_there_is_not_is_refused_in_one_line(tmp_path: Path, scenario: dict[str, object], text: str) -> None:
    path = tmp_path / "run.json"
    document = {"format": 1, "scenario": scenario, "mode": "quiet", "choices": [], "names": [], "violation": ""}
    document["widths"] = []
    path.write_text(json.dumps(document))
    done = explore("--replay", str(path))
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
    assert text in done.stderr


def test_a_place_that_can_hold_no_runs_is_refused_before_the_work() -> None:
    done = explore("--exhaustive", "--limit", "1", "--save", "/dev/null/runs")
    assert (done.returncode, done.stdout) == (2, "")
    assert "can't be a folder to save runs in" in done.stderr


def test_few_schedules_are_not_all_and_that_is_said() -> None:
    done = explore("--exhaustive", "--limit", "1", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["version"] == 1
    assert document["pairs"] == len(document["cells"])
    assert document["schedules"] == document["pairs"]
    assert not document["complete"]
    assert {cell["violations"] for cell in document["cells"]} == {0}
    assert "cells" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--exhaustive", "--mutants"),
        ("--replay", "/nonexistent"),
        ("--seed", "0", "--matrix", "deaths"),
        ("--mutants", "--mode", "batch"),
        ("--exhaustive", "--runs", "7"),
    ],
)
def test_a_usage_that_makes_no_sense_is_one_line(arguments: tuple[str, ...]) -> None:
    done = explore(*arguments)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
