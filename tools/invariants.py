"""Writes docs/invariants.md from `hwpoison.simulation.invariants`: `.venv/bin/python tools/invariants.py`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from hwpoison.simulation import invariants

PLACE = Path(__file__).parents[1] / "docs" / "invariants.md"
HEAD = """\
# What must hold in simulation

<!-- Made by tools/invariants.py from src/hwpoison/simulation/invariants.py. Change that, and run it again. -->

Each of these is looked at whenever it can have changed: at every access, every notice, every page that the manager puts in
place, after every step, and when nothing can happen any more. The first one that does not hold ends the run, which is then a
file that can be told again ([simulation.md](simulation.md)). Beside them: the same state twice on one run is a livelock.

"""


def sentences() -> Iterator[str]:
    """Each sentence once, in the order of the file, without the place where it did not hold."""
    found: dict[str, None] = {}
    calls = [node for node in ast.walk(ast.parse(Path(invariants.__file__).read_text())) if isinstance(node, ast.Call)]
    for node in sorted(calls, key=lambda call: call.lineno):
        if ast.unparse(node.func) == "self.fail":
            text = node.args[0]
            first = text.values[0] if isinstance(text, ast.JoinedStr) else text
            assert isinstance(first, ast.Constant), ast.unparse(node)
            found[str(first.value).partition(":")[0].rstrip(". ") + "."] = None
    yield from found


def text() -> str:
    """All of docs/invariants.md."""
    return HEAD + "\n".join(f"* {one}" for one in sentences()) + "\n"


if __name__ == "__main__":
    PLACE.write_text(text())
