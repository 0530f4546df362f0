"""The whole main job of an application, for a process of its own: what it saw goes to standard output, as JSON.

    main_job.py FOLDER

FOLDER is an empty folder that the process may write to. `test_privilege` runs it as different users.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hwpoison
from hwpoison.linux.syscalls import PAGE_SIZE

PAGES = 16
WAIT_SECONDS = 30.0


def page(letter: str) -> bytes:
    return letter.encode() * PAGE_SIZE


def raised(function: Callable[[], object]) -> str:
    """What is raised, as the name of its errno or of its class."""
    try:
        function()
    except hwpoison.PoisonError as error:
        return f"PoisonError {error.offset // PAGE_SIZE}"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    return "nothing"


def anonymous(manager: hwpoison.Manager) -> dict[str, Any]:
    """Lose, guard, repair, discard, and a write that repairs."""
    table = manager.allocate(PAGES * PAGE_SIZE, name="table")
    notices: queue.Queue[hwpoison.Notice] = queue.Queue()
    table.on_failure(notices.put)
    for index in range(PAGES):
        table.buffer[index * PAGE_SIZE : (index + 1) * PAGE_SIZE] = page("a")
    failures = [manager.inject(table, index * PAGE_SIZE) for index in (1, 2, 3)]
    told = [notices.get(timeout=WAIT_SECONDS) for _ in failures]

    def sum_up() -> None:
        with hwpoison.guard(table) as safe:
            safe.array("u1").sum()

    seen: dict[str, Any] = {
        "failures": [(one.state, one.outcome, one.victims == (os.getpid(),)) for one in failures],
        "told of what failed": [one.event_id for one in told] == [one.event_id for one in failures],
        "a guard over lost pages": raised(sum_up),
        "lost": [(one.offset // PAGE_SIZE, one.nbytes // PAGE_SIZE) for one in table.lost()],
        "read of a lost page": raised(lambda: table.read(2 * PAGE_SIZE, 1)),
        "write to a part of a lost page": raised(lambda: table.write(2 * PAGE_SIZE, b"x")),
        "repaired": table.repair(PAGE_SIZE, page("r")),
        "discarded": table.discard(2 * PAGE_SIZE, PAGE_SIZE),
    }
    table.write(3 * PAGE_SIZE, page("w"))
    seen["content afterwards"] = bytes(table.buffer[::PAGE_SIZE]).decode()
    seen["a guard over whole pages"] = raised(sum_up)
    return seen


def read_only_file(manager: hwpoison.Manager, path: Path) -> dict[str, Any]:
    """A clean page is healed, and nobody learns of it."""
    path.write_bytes(b"".join(page(chr(ord("A") + index)) for index in range(PAGES)))
    weights = manager.open(path)
    assert weights.buffer[5 * PAGE_SIZE] == ord("F")
    failure = manager.inject(weights, 5 * PAGE_SIZE)
    return {
        "failure": (failure.state, failure.outcome, failure.victims),
        "content afterwards": bytes(weights.buffer[::PAGE_SIZE]).decode(),
        "read of absent and present pages": weights.read(0, PAGES * PAGE_SIZE) == path.read_bytes(),
    }


def writable_file(manager: hwpoison.Manager, path: Path) -> dict[str, Any]:
    """Changes reach the file with a flush, and those that are lost are told by one."""
    path.write_bytes(page("o") * PAGES)
    book = manager.open(path, "r+")
    book.buffer[:PAGE_SIZE] = page("s")  # by stores
    book.write(PAGE_SIZE, page("w"))  # by Memory.write, to an absent page
    book.flush()
    seen: dict[str, Any] = {"file after a flush": path.read_bytes()[::PAGE_SIZE].decode()}
    clean = manager.inject(book, 0)
    book.write(PAGE_SIZE, page("x"))
    dirty = manager.inject(book, PAGE_SIZE)
    seen["failures"] = [(one.state, one.outcome) for one in (clean, dirty)]
    seen["flush after a loss"] = raised(book.flush)
    seen["second flush after a loss"] = raised(book.flush)
    seen["read of the lost page"] = raised(lambda: book.read(PAGE_SIZE, 1))
    seen["discarded"] = book.discard()
    seen["content afterwards"] = bytes(book.buffer[::PAGE_SIZE]).decode()
    return seen


def system_calls(manager: hwpoison.Manager, path: Path) -> dict[str, Any]:
    """What system calls get that meet absent pages in an ordinary view, and what is there when they were refused."""
    path.write_bytes(page("f") * 2)
    weights = manager.open(path)
    table = manager.allocate(PAGE_SIZE, name="untouched", populate=False)
    ends = os.pipe()
    seen: dict[str, Any] = {"write(2) from an absent page": raised(lambda: os.write(ends[1], weights.buffer[:10]))}
    os.write(ends[1], b"1234567890")
    seen["read(2) into an absent page"] = raised(lambda: os.readv(ends[0], [table.buffer[:10]]))
    seen["content afterwards"] = chr(weights.buffer[0])
    for end in ends:
        os.close(end)
    return seen


def main() -> None:
    folder = Path(sys.argv[1])
    with hwpoison.Manager() as manager:
        user_mode = manager.connection.user_mode
        seen = {
            "user mode": user_mode,
            "anonymous": anonymous(manager),
            "read-only file": read_only_file(manager, folder / "weights"),
            "writable file": writable_file(manager, folder / "book"),
            "system calls": system_calls(manager, folder / "cold"),
            "reports in the event log": sum(one.kind == "report" for one in manager.events()),
        }
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main()
