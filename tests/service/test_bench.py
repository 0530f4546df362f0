"""`hwpoison bench` as people and programs use it. No speed is asserted: that is what the command itself shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hwpoison.linux.userfaultfd import open_userfaultfd
from tests.support import need

BENCH = [sys.executable, "-m", "hwpoison", "bench"]
SECONDS_MAX = 120


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*BENCH, *arguments], capture_output=True, text=True, timeout=SECONDS_MAX, check=False)


@pytest.mark.live
def test_each_result_is_judged_by_its_own_numbers() -> None:
    try:
        os.close(open_userfaultfd().fd)
    except OSError as error:
        need(False, str(error))
    done = run("guard", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["version"] == 1
    results = {one["name"]: one for one in document["results"]}
    assert set(results) == {"guard, enter and leave", "guard, check()"}
    for one in results.values():
        assert (one["unit"], one["target_of"], one["target_bound"]) == ("µs", "value", "at most")
        assert one["value"] > 0
        assert one["ratio"] == pytest.approx(one["value"] / one["floor"])
        assert one["met"] is (one["value"] <= one["target"])


def test_an_unknown_benchmark_is_refused_in_one_line() -> None:
    done = run("warp")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "'warp' is not one of 'warm', 'touch'" in done.stderr


def test_without_a_compiler_the_floors_are_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run("touch")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "hwpoison: there is no C compiler (cc) for the floors: install one, such as the package gcc\n"
