"""Many processes that are attached to a manager and sleep: `python -m hwpoison.cli.benchmarks.clients SOCKET NAME COUNT`.

Each maps the object NAME, with a connection and a userfaultfd of its own. They are forked from one process, so that a
thousand of them fit in memory. When all are attached, one line for each is printed: its pid and the address of its
mapping. They end when standard input does.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import NoReturn

from hwpoison.app.manager import connect


def main(socket_name: str, name: str, count: str) -> None:
    """Fork them, tell who they are, wait for the end."""
    gc.freeze()
    ours, theirs = os.pipe()
    for _ in range(int(count)):
        if os.fork() == 0:
            os.close(ours)
            _attach_and_sleep(socket_name, name, theirs)
    os.close(theirs)
    with os.fdopen(ours) as told:
        # Each child holds the other end until it has told, or died: then this ends.
        lines = told.read()
    sys.stdout.write(lines)
    sys.stdout.flush()
    sys.stdin.read()


def _attach_and_sleep(socket_name: str, name: str, told: int) -> NoReturn:
    status = 1
    try:
        memory = connect(socket_name).attach(name)
        os.write(told, f"{os.getpid()} {memory.address}\n".encode())
        os.close(told)
        # Standard input is shared: it ends for all at the same time.
        os.read(0, 1)
        status = 0
    finally:
        os._exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
