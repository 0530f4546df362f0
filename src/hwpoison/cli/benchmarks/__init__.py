"""What `hwpoison bench` measures: one module for each benchmark, whose `measure` yields results.

Each figure stands beside its floor, which is measured in the same run and in turns with it, so that the drift of the
machine does not decide. A new benchmark is one module and one line in `BENCHMARKS`.
"""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """A benchmark: its module in this package, what it is about, and whether its floor is a program in C."""

    module: str
    summary: str
    compiled: bool


BENCHMARKS = {
    "warm": Place("warm", "access to memory that is there", False),
    "touch": Place("touch", "the first touch of a page of a file", True),
    "load": Place("load", "bringing in a whole file", True),
    "recovery": Place("recovery", "a clean page that a process is reading goes bad", True),
    "attached": Place("attached", "a report, by the number of processes attached", True),
    "restart": Place("restart", "the manager is killed: until an access is served again", False),
    "memory": Place("memory", "the manager's own memory", False),
    "guard": Place("guard", "a guard, warm", False),
    "fork": Place("fork", "os.fork() with managed memory", False),
}
