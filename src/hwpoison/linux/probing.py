"""How a capability is found out, and what is said of it. `capabilities` and `surroundings` ask the questions."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_SYS_RESOURCE = 19, 21, 24
"""Numbers of linux/capability.h."""

_REFUSALS = (
    errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.EINVAL, errno.EOPNOTSUPP,
    errno.EROFS, errno.ENOTTY,
)  # fmt: skip
"""Errors that mean no. Others (out of memory or descriptors, say) tell nothing about the machine."""


class Answer(StrEnum):
    """Whether the machine has it."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """One thing that the machine has or has not."""

    group: str
    name: str
    state: Answer
    found: str
    """What was seen."""
    gives: str
    """What it is good for, or, in the group "surroundings", what it does to hwpoison."""
    how: str
    """How to get it, or how to make it step aside."""
    needed: bool = False
    """hwpoison does not work without it."""
    in_the_way: bool = False
    """It keeps something that hwpoison wants from working."""


@dataclass(frozen=True, slots=True)
class Tried:
    """What came of one attempt. `error` is the errno, or 0."""

    state: Answer
    found: str
    error: int = 0


def tried(attempt: Callable[[], object], found: str = "works") -> Tried:
    """What comes of `attempt`: no if it is refused, unknown for any other error."""
    try:
        attempt()
    except OSError as error:
        state = Answer.NO if error.errno in _REFUSALS else Answer.UNKNOWN
        return Tried(state, error.strerror or str(error), error.errno or 0)
    return Tried(Answer.YES, found)


def read(path: str) -> str:
    """The file's text. Raises OSError."""
    with open(path, errors="replace") as file:
        return file.read().strip()


def setting(path: str) -> tuple[Answer, str]:
    """The value of a setting; no if the kernel has none of it, unknown if it is not to be seen."""
    try:
        return Answer.YES, read(path)
    except FileNotFoundError:
        if os.path.isdir(os.path.dirname(path)):
            return Answer.NO, f"this kernel has no {path}"
        return Answer.UNKNOWN, f"{os.path.dirname(path)} is not to be seen"
    except OSError as error:
        return Answer.UNKNOWN, f"{path}: {error.strerror}"


def status(field: str) -> str:
    """A line of /proc/self/status. Raises OSError or ValueError."""
    for line in read("/proc/self/status").splitlines():
        key, _, value = line.partition(":")
        if key == field:
            return value.strip()
    raise ValueError(f"/proc/self/status has no {field}")


def has_privilege(number: int) -> tuple[Answer, str]:
    """Whether this process has the privilege that Linux calls a capability."""
    try:
        effective = int(status("CapEff"), 16)
    except (OSError, ValueError) as error:
        return Answer.UNKNOWN, str(error)
    return (Answer.YES, "effective") if effective >> number & 1 else (Answer.NO, "not effective")
