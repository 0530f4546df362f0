"""Run a command as an unprivileged user, `--forbidden`: where userfaultfd(2) fails with EPERM as well.

    without_userfaultfd.py [--forbidden] COMMAND...

Containers look like that: their seccomp filter forbids the system call, and /dev/userfaultfd is not there or not theirs.
Only the standard library is used, because what is run here must not have been able to open a userfaultfd before.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

NOBODY = 65534
# machine: (its AUDIT_ARCH, the number of userfaultfd)
MACHINES = {"x86_64": (0xC000003E, 323), "aarch64": (0xC00000B7, 282)}

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO = 0x7FFF0000, 0x00050000
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
NUMBER_OFFSET, ARCHITECTURE_OFFSET = 0, 4  # in struct seccomp_data


def drop_privilege() -> None:
    """Become nobody, who can't open /dev/userfaultfd. Who is no root is nobody enough."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def forbid_userfaultfd() -> None:
    """A seccomp filter, kept over exec: userfaultfd(2) is EPERM, everything else is allowed."""
    architecture, number = MACHINES[platform.machine()]
    program = b"".join(
        struct.pack("HBBI", *one)
        for one in (
            (LOAD_WORD, 0, 0, ARCHITECTURE_OFFSET),
            (JUMP_IF_EQUAL, 0, 3, architecture),
            (LOAD_WORD, 0, 0, NUMBER_OFFSET),
            (JUMP_IF_EQUAL, 0, 1, number),
            (RETURN, 0, 0, SECCOMP_RET_ERRNO | errno.EPERM),
            (RETURN, 0, 0, SECCOMP_RET_ALLOW),
        )
    )
    instructions = ctypes.create_string_buffer(program, len(program))
    descriptor = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(instructions))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, descriptor, 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), f"prctl{arguments[:2]} failed")


def main() -> None:
    command = sys.argv[1:]
    forbidden = command[0] == "--forbidden"
    drop_privilege()
    if forbidden:
        forbid_userfaultfd()
        command = command[1:]
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
