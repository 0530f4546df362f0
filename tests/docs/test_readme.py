"""The examples of README.md do what it says, as they stand."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import SECONDS_MAX

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """What is between the fences of that language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


@pytest.mark.live
@pytest.mark.parametrize(
    ("code", "printed"), [*zip(blocks("python"), blocks(""), strict=True)], ids=["one process", "a file", "several"]
)
def test_an_example_prints_what_stands_below_it(tmp_path: Path, code: str, printed: str) -> None:
    (tmp_path / "example.py").write_text(code)

    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS_MAX, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout == printed
    assert {line.partition(":")[0] for line in done.stderr.splitlines()} == {"Memory failure"}


@pytest.mark.live
def test_the_session_runs_line_by_line_as_it_stands(tmp_path: Path) -> None:
    lines = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines() if "hwpoison" in line]
    assert len(lines) > 5
    script = ["trap 'kill $(jobs -p); wait' EXIT"]
    for line in lines:
        script += [line.replace("/tmp/", f"{tmp_path}/"), 'echo "$?" >&3']
    statuses = tmp_path / "statuses"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with subprocess.Popen(
        ["bash", "-c", f"exec 3>{statuses}\n" + "\n".join(script)],
        cwd=tmp_path, env=os.environ | {"PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as session_of_bash:  # fmt: skip
        try:
            printed, errors = session_of_bash.communicate(timeout=2 * SECONDS_MAX)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(session_of_bash.pid, signal.SIGKILL)

    found = dict(zip(lines, map(int, statuses.read_text().split()), strict=True))
    assert {line.partition("#")[0].strip() for line, status in found.items() if status} == {
        "hwpoison inject t 0",
        "hwpoison report --name t --offset 0x1000",
        "hwpoison status",
    }, (found, errors)
    assert printed.count("recovery action for anonymous page: Recovered") == 2
    assert "<hwpoison.Memory 't' anonymous 1048576 bytes" in printed
