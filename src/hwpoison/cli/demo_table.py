"""What a person sees of `hwpoison demo`: who takes part, a row for each strike as it happens, and what it comes to."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hwpoison.cli.common import OUTCOME_COLOURS, console, own_command, size_text
from hwpoison.cli.demo_scenarios import Scenario
from hwpoison.cli.demo_stage import Stage, processes
from hwpoison.core.records import printable

WIDTH_MAX = 106
HEADINGS = ("What was hit", "What the handler did", "Who was told", "Took", "Every byte")
WIDTHS = (27, 29, 17, 7, 16)
"""Columns of the headings, where the terminal is wide enough; a narrower one folds their text."""
CONTENT_COLOURS = {"intact": "green", "lost as declared": "yellow", "WRONG": "bold red"}


class DemoTable:
    """Prints row after row, so it works in a terminal, a pipe and a file alike."""

    def __init__(self) -> None:
        self.shares_terminal = sys.stdout.isatty() and sys.stderr.isatty()
        """True if what others write to standard error would come between the rows."""
        self._console = console(without_terminal=WIDTH_MAX, at_most=WIDTH_MAX)

    def begin(self, stage: Stage, sha256: str, memory_bytes: int) -> None:
        """Who takes part, and the table's head."""
        pids = ", ".join(map(str, stage.pids))
        file = printable(str(stage.file))
        self._say(f"Processes {pids} work in memory that a manager, process {stage.manager.pid}, owns for them:")
        self._say(f"file    {size_text(stage.nbytes)} of {file}, read-only, sha256 {sha256[:16]}", indent=2)
        self._say(f"copy    {size_text(stage.copy.stat().st_size)}, a writable copy of its beginning", indent=2)
        self._say(f"memory  {size_text(memory_bytes)} with no file behind it", indent=2)
        self._say(
            "Pages of it fail while they read and write. After each failure every process compares every byte that it has "
            "with what it must be."
        )
        self._console.print()
        self._columns([Text(heading, "bold") for heading in HEADINGS])
        self._say("─" * min(self._console.width, sum(WIDTHS) + 2 * len(WIDTHS) - 2), "dim")

    def row(self, scenario: Scenario, row: dict[str, Any], stage: Stage) -> None:
        """One strike."""
        self._columns(
            [
                Text(row["scenario"], "bold" if row["ok"] else "bold red"),
                Text(f"{row['state']}: ").append(row["outcome"], OUTCOME_COLOURS.get(row["outcome"], "")),
                Text(_told(row["told"], stage)),
                Text(_time_text(row["latency_us"])),
                Text(row["content"], CONTENT_COLOURS[row["content"]]),
            ]
        )
        if row["ok"]:
            self._say(f"{row['where']}: {scenario.meaning}", "dim", indent=2)
            return
        self._say(f"{row['where'] or 'nothing was struck'}: this is not as it should be.", "red", indent=2)
        for problem in row["problems"]:
            self._say(printable(problem), "red", indent=4)

    def end(self, document: dict[str, Any]) -> None:
        """What it all comes to."""
        rows = document["scenarios"]
        right = sum(row["ok"] for row in rows)
        self._console.print()
        for problem in document["problems"]:
            self._say(printable(problem), "red")
        compared, seconds = size_text(document["compared"]), document["seconds"]
        if document["ok"]:
            count = len(document["processes"])
            self._say(
                f"All {right} as they should be. In {seconds:.1f} s {count} processes compared {compared}: "
                "not one wrong byte; each loss was told to exactly those who have it; the file is as it was.",
                "bold green",
            )
        else:
            self._say(f"{right} of {len(rows)} as they should be. {compared} compared in {seconds:.1f} s.", "bold red")
        self._say("Recovered: the bad frame is isolated; the data is back, or its loss was told.", "dim")
        failures = document["failures"]
        self._say(f"{failures} failures are in the event log{_more(failures - len(rows))}: {own_command()} log", "dim")

    def _columns(self, cells: Sequence[Text]) -> None:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for width, heading in zip(self._fitting(), HEADINGS, strict=True):
            table.add_column(width=width, overflow="fold", justify="right" if heading == "Took" else "left")
        table.add_row(*cells)
        self._console.print(table)

    def _fitting(self) -> list[int]:
        """The widths of the columns: narrower ones, in proportion, where there is less room."""
        room = self._console.width - 2 * len(WIDTHS)
        return [width if room >= sum(WIDTHS) else max(6, width * room // sum(WIDTHS)) for width in WIDTHS]

    def _say(self, text: str, style: str = "", *, indent: int = 0) -> None:
        self._console.print(Padding(Text(text, style), (0, 0, 0, indent), expand=False))


def _more(others: int) -> str:
    """Why there are more failures than rows."""
    if others <= 0:
        return ""
    again = f"; {others - 1} more came at the wrong moment" if others > 1 else ""
    return f" (one was needed to prepare another{again})"


def _told(pids: Sequence[int], stage: Stage) -> str:
    return f"all {len(pids)} processes" if tuple(pids) == stage.pids else processes(pids)


def _time_text(microseconds: float) -> str:
    return f"{microseconds:.0f} µs" if microseconds < 1000 else f"{microseconds / 1000:.1f} ms"
