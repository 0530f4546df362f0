"""The SIGBUS that a process is sent early, as the kernel's prctl(PR_MCE_KILL) has it sent."""

from __future__ import annotations

import signal

from hwpoison.linux import syscalls

_BIT = 1 << (signal.SIGBUS - 1)


def tell(address: int) -> None:
    """Send this process SIGBUS for the page at `address`.

    With BUS_MCEERR_AO, to this thread: the kernel lets that be sent to no other one. Where this thread blocks the signal and
    nobody handles it, it is for sigwaitinfo(2) or a signalfd, and is sent to the process, with SI_QUEUE and the address as
    its value.
    """
    blocked = signal.SIGBUS in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    if blocked and not _handled():
        syscalls.queue_to_process(signal.SIGBUS, address)
        return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGBUS])
    try:
        syscalls.signal_action_optional(address)
    finally:
        if blocked:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS])


def _handled() -> bool:
    """By whatever language: Python knows of its own handlers only."""
    with open("/proc/self/status") as status:
        return any(int(line.split()[1], 16) & _BIT for line in status if line.startswith("SigCgt:"))
