"""What it can mean that a system call in the body of a guard failed with EFAULT.

Where the manager serves faults inside system calls (root, /dev/userfaultfd), a call that reads lost bytes through a guarded
view succeeds, and the guard raises. Through the ordinary view it gets EFAULT, and leaves a poison marker in this process's
page table: so what it was can be known.

In user mode the kernel asks nobody inside a system call: EFAULT is what a lost page gives, but also a healthy one that is
not present, or one of a writable file that was not written to yet. Which of them it was can be known afterwards only where
all but one are ruled out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from hwpoison.app.memory import Memory, all_memories
from hwpoison.errors import Range
from hwpoison.linux.presence import PAGEMAP, markers, next_hole
from hwpoison.linux.syscalls import PAGE_SIZE
from hwpoison.plain.memory import Memory as PlainMemory


def lost_by(error: OSError, memories: Iterable[Memory]) -> list[Range]:
    """The lost bytes of the guarded memories, if nothing else in this process's managed memory can be the reason of `error`.

    If they can be, and something else too, `error` gets a note that says so.
    """
    # Of plain memory nothing is known to be lost.
    names = {_name(memory) for memory in memories if not isinstance(memory, PlainMemory)}
    # Another mapping of the same object shows the same bytes.
    guarded = [memory for memory in all_memories() if _name(memory) in names]
    others = [memory for memory in all_memories() if _name(memory) not in names]
    lost = list(dict.fromkeys(one for memory in guarded for one in _suspects(memory)))
    if not lost:
        return []
    if not any(map(_may_be_refused, guarded)) and not any(map(_may_be_the_reason, others)):
        return lost
    note = (
        f"hwpoison: the reason may be lost bytes ({', '.join(map(str, lost))}), or pages that are well but that a system "
        "call can't reach in this process: not present, or not written to yet; prefetch() what a call reads from, and store "
        "a byte in every page that it writes into, or use Memory.write"
    )
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)
    return []


def _name(memory: Memory) -> tuple[str, str]:
    return memory._connection.socket_name, memory.name


def _suspects(memory: Memory) -> list[Range]:
    """Lost bytes of the memory that a system call can have got EFAULT for."""
    lost = memory.lost()
    if memory._connection.user_mode or not os.access(PAGEMAP, os.R_OK):
        return lost
    found: list[Range] = []
    for one in lost:
        for page in markers(memory.address + one.offset, -(-one.nbytes // PAGE_SIZE)):
            offset = one.offset + page * PAGE_SIZE
            nbytes = min(PAGE_SIZE, memory.nbytes - offset)
            if found and found[-1].offset + found[-1].nbytes == offset:
                offset, nbytes = found[-1].offset, found.pop().nbytes + nbytes
            found.append(Range(memory.name, offset, nbytes))
    return found


def _may_be_the_reason(memory: Memory) -> bool:
    """True if system calls may get EFAULT for any page of the memory, which nobody guards here."""
    try:
        return _may_be_refused(memory) or bool(_suspects(memory))
    except (OSError, ValueError):
        return True  # Its manager has gone, or it is being closed.


def _may_be_refused(memory: Memory) -> bool:
    """True if system calls may get EFAULT for pages of the memory that are well."""
    if not memory._connection.user_mode:
        return not os.access(PAGEMAP, os.R_OK)
    if memory.kind == "file" and memory.writable:
        return True
    lost = memory.lost()
    descriptor = memory._memfd()
    hole = next_hole(descriptor.number, 0, memory.nbytes)
    while hole is not None:
        begin, end = hole
        for one in lost:
            if one.offset <= begin < one.offset + one.nbytes:
                begin = -(-(one.offset + one.nbytes) // PAGE_SIZE) * PAGE_SIZE
        if begin < end:
            return True
        hole = next_hole(descriptor.number, end, memory.nbytes)
    return False
