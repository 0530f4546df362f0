"""`hwpoison run`: a manager for the life of a command."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import click

from hwpoison.cli.common import SOCKET_VARIABLE, memory_limit_option
from hwpoison.core.records import printable

NOT_EXECUTABLE = 126
NOT_FOUND = 127
KILLED = 128
"""Exit statuses as shells have them; a signal's number is added to the last."""

STOPPING = {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
"""By which a shell's job control stops a command."""
OURS = {
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGTRAP,
    signal.SIGSYS,
    signal.SIGABRT,
    signal.SIGPIPE,
}
"""By which the system tells a program of what it has done itself."""
WAITED_FOR = signal.valid_signals() - OURS - {signal.SIGKILL, signal.SIGSTOP, signal.SIGTTIN, signal.SIGTTOU}
"""All that are passed on, but for SIGCHLD, which is about the command."""
SI_KERNEL = 0x80
"""The `si_code` of a signal from the terminal. The command, which is in our process group, has it too."""


@click.command(context_settings={"allow_interspersed_args": False})
@memory_limit_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(memory_limit: int | None, command: tuple[str, ...]) -> int:
    """Run COMMAND with a manager of its own, which it finds through $HWPOISON_SOCKET with hwpoison.connect().

    Signals are passed on, and it stops and goes on together with the command. The exit status is the command's: 128 + n if
    signal n ended it, 127 if it was not found, 126 if it could not be run.

    \b
    Example:
      hwpoison run --memory-limit 2GiB -- python train.py --epochs 3
    """
    if not command[0]:
        raise click.UsageError("the command's name is empty: what is it to run?")
    # Threads that an import starts, numpy's, inherit the mask. Without it they would take signals, and end the process.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, WAITED_FOR)
    from hwpoison.app.manager import Manager

    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    with Manager(memory_limit=memory_limit) as manager:
        signal.pthread_sigmask(signal.SIG_BLOCK, WAITED_FOR)
        # A parent may have left SIGCHLD ignored, and then nobody could wait for the command.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            child = _start(command, os.environ | {SOCKET_VARIABLE: manager.socket}, mask)
        except OSError as error:
            not_found = isinstance(error, FileNotFoundError)
            what = "command not found" if not_found else error.strerror
            click.echo(f"hwpoison run: {printable(command[0])}: {what}", err=True)
            return NOT_FOUND if not_found else NOT_EXECUTABLE
        return _wait(child)


def _start(command: tuple[str, ...], environment: dict[str, str], mask: set[int]) -> int:
    """The process id. The command stays in our process group, so that Ctrl-C and Ctrl-Z reach it as if it ran alone."""
    # Python ignores two signals, which programs expect to end them.
    defaults = [signal.SIGPIPE, signal.SIGXFSZ]
    return os.posix_spawnp(command[0], command, environment, setsigmask=mask, setsigdef=defaults)


def _wait(child: int) -> int:
    """Pass signals on until the command ends; its exit status. The signals are blocked, so none is lost between two."""
    while True:
        changed, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
        if changed and os.WIFSTOPPED(status):
            # Whoever has started us sees the command stop, and has us go on with SIGCONT, which comes below. One that has
            # come already would be lost.
            if os.WSTOPSIG(status) in STOPPING and signal.SIGCONT not in signal.sigpending():
                os.kill(os.getpid(), signal.SIGSTOP)
        elif changed:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else KILLED - code
        signalled = signal.sigwaitinfo(WAITED_FOR)
        if signalled.si_signo != signal.SIGCHLD and signalled.si_code != SI_KERNEL:
            # A command that has become another user is told by whoever may tell it.
            with suppress(PermissionError):
                os.kill(child, signalled.si_signo)
