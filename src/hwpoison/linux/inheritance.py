"""`hwpoison.core.machine.Inheritance` on Linux: what the keeper held, by label."""

from __future__ import annotations

from hwpoison.linux.files import LinuxFile, file_label
from hwpoison.linux.machine import LinuxMachine
from hwpoison.linux.space import Board, LinuxSpace, Slot
from hwpoison.linux.store import LinuxStore, labels_of

SPACE, PROCESS, BOARD = "userfaultfd", "process", "board"


class LinuxInheritance:
    """The descriptors that `machine` has inherited. Each is taken once."""

    def __init__(self, machine: LinuxMachine) -> None:
        self._machine = machine
        self._left = dict(machine.inherited)
        self.spaces: dict[int, LinuxSpace] = {}
        self.boards: dict[int, Board] = {}
        self.slots: dict[tuple[int, int], Slot] = {}

    def take(self, label: str) -> int:
        """The descriptor. Raises LookupError if nothing was kept under the label."""
        return self._left.pop(label)

    def find(self, label: str) -> int:
        """As `take`; -1 if nothing was kept under the label."""
        return self._left.pop(label, -1)

    def nobodys(self) -> dict[str, int]:
        """What nobody has taken, as it is written down nowhere: the manager has died while it took it, or let go of it."""
        kinds = (SPACE, PROCESS, BOARD, "control", "lifeline", "invitation", "memory", "flags", "file")
        return {label: fd for label, fd in self._left.items() if label.partition(":")[0] in kinds}

    def store(self, number: int, name: str, nbytes: int) -> LinuxStore:
        memory, flags = labels_of(number)
        return self._machine.store(number, name, nbytes, (self.take(memory), self.take(flags)))

    def transit(self, *, hold: bool) -> bool:
        return self._machine.quarantine.settle(hold=hold)

    def file(self, number: int) -> LinuxFile:
        return self._machine.file(self.take(file_label(number)), file_label(number))

    def space(self, number: int, pid: int) -> LinuxSpace:
        fd, pidfd = self.take(f"{SPACE}:{number}"), self.take(f"{PROCESS}:{number}")
        self.spaces[number] = self._machine.space(fd, pid, pidfd)
        return self.spaces[number]

    def board(self, number: int) -> Board:
        """The words that a client shares with the manager."""
        if number not in self.boards:
            self.boards[number] = Board(self.take(f"{BOARD}:{number}"))
        return self.boards[number]

    def hits(self, number: int, index: int) -> Slot:
        slot = self.slots[number, index] = self.board(number).taken(index)
        return slot
