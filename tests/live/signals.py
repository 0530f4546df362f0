"""What the kernel says with a signal, seen from outside: the process is traced when it gets it."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from typing import NamedTuple

from tests.support import wait_until

_PTRACE_CONT, _PTRACE_GETSIGINFO, _PTRACE_SEIZE = 7, 0x4202, 0x4206
_WALL = 0x40000000

SI_QUEUE = -1
BUS_ADRERR = 2
BUS_MCEERR_AR = 4
BUS_MCEERR_AO = 5


class SignalInfo(NamedTuple):
    """`code`; the address of a fault, of which `shift` low bits say nothing; the `value` of a signal that was queued."""

    code: int
    address: int
    shift: int
    value: int


def seize(pid: int) -> None:
    """Trace a child of this process, which goes on."""
    _ptrace(_PTRACE_SEIZE, pid, None)


def next_bus_error(pid: int) -> SignalInfo:
    """Wait until the traced process is about to get a SIGBUS, and let it have it."""
    status = 0

    def stopped() -> bool:
        nonlocal status
        found, status = os.waitpid(pid, _WALL | os.WNOHANG)
        return found == pid

    wait_until(stopped, "the process stops for a signal")
    assert os.WIFSTOPPED(status), f"the process ended with status {status:#x}"
    assert os.WSTOPSIG(status) == signal.SIGBUS
    information = ctypes.create_string_buffer(128)
    _ptrace(_PTRACE_GETSIGINFO, pid, information)
    _ptrace(_PTRACE_CONT, pid, ctypes.c_void_p(signal.SIGBUS))
    number, code, address, value = struct.unpack_from("i4xi4xPP", information)
    assert number == signal.SIGBUS
    return SignalInfo(code, address, value & 0xFFFF, value)


def end_tracing(thread: int) -> None:
    """A traced thread is about to end: until this process has seen that, its process is not over."""
    os.waitpid(thread, _WALL)


def _ptrace(request: int, pid: int, data: ctypes.Array[ctypes.c_char] | ctypes.c_void_p | None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(request, pid, None, data) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
