"""A private manager can be had wherever Python code runs: without a file, in a thread, beside a loop that runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support import SECONDS_MAX

pytestmark = pytest.mark.live

USE = """
import hwpoison
manager = hwpoison.Manager()
table = manager.allocate(1 << 20, "table")
table.buffer[0], table.buffer[1 << 16] = 7, 8
manager.inject(table, 1 << 16)
print(table.buffer[0], len(table.lost()))
table.close()
manager.close()
"""
THREAD = "import threading\none = threading.Thread(target=exec, args=(USE, {}))\none.start()\none.join()\n"
# As a cell of a notebook: a loop runs, and its namespace is of no file.
CELL = "import asyncio\nasync def cell():\n    exec(USE, {'__name__': '__main__'})\nasyncio.run(cell())\n"


@pytest.mark.parametrize("program", [USE, THREAD, CELL], ids=["standard input", "a thread", "a notebook"])
def test_it_works_where_it_is_begun_and_needs_no_main_guard(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-"],
        input=f"USE = {USE!r}\n{program}",
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "7 1\n"), done.stderr
