"""A program that was started without standard input, output or error, as daemons are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import SECONDS_MAX

CLOSED = ["2>&-", ">&- 2>&-", "<&- >&- 2>&-", "<&-"]

PROGRAM = """
import sys
book = open(sys.argv[1], "w")  # where it has no standard error, this may well get its number
import json, hwpoison
with hwpoison.Manager() as manager:
    table = manager.allocate(8192, "t")
    table.write(0, bytes(8192))
    failure = manager.inject(table, 4096)
    json.dump([failure.outcome, failure.victims, table.lost()], book)
"""


@pytest.mark.parametrize("closed", CLOSED)
def test_the_memory_of_a_program_without_standard_streams_fails_and_its_files_are_left_alone(
    tmp_path: Path, closed: str
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = ["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, str(tmp_path / "program.py"), str(tmp_path / "book")]

    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        pid = process.pid
        try:
            assert process.wait(SECONDS_MAX) == 0
        finally:
            process.kill()

    assert json.loads((tmp_path / "book").read_text()) == ["Recovered", [pid], [["t", 4096, 4096]]]


@pytest.mark.parametrize("closed", CLOSED)
def test_the_command_needs_no_standard_streams(closed: str) -> None:
    inner = f"'{sys.executable}' -m hwpoison report --pid 1 --address 0; exit $(($? + 40))"
    command = ["sh", "-c", f'exec "$0" -m hwpoison run -- sh -c "$1" {closed}', sys.executable, inner]

    done = subprocess.run(command, capture_output=True, timeout=SECONDS_MAX, check=False)

    assert done.returncode == 40, "the report was handled, and the command's status is passed on"
