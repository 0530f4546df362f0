"""`hwpoison serve`: a manager that processes share."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import click

from hwpoison.cli.common import SOCKET_VARIABLE, memory_limit_option


@click.command
@click.option(
    "--socket", metavar="PATH", envvar=SOCKET_VARIABLE,
    help=f"Where to listen; @NAME is an abstract address. [default: ${SOCKET_VARIABLE}]",
)  # fmt: skip
@memory_limit_option
@click.option("--offline-foreign", is_flag=True, help="Hand reports on unmanaged frames to the kernel (root).")
@click.option(
    "--policy", type=click.Choice(["early", "late"]), default="late", show_default=True,
    help="When processes that want no notices learn of a loss: at once, by SIGBUS, or on access.",
)  # fmt: skip
@click.option(
    "--io-limit", metavar="SECONDS", type=click.FloatRange(0.001), default=30.0, show_default=True,
    help="So long an access waits for its file; then it fails, and the page is lost, with that reason.",
)  # fmt: skip
@click.option(
    "--user", metavar="NAME", multiple=True,
    help="Serve this user too (root; may be repeated). Its system calls on managed memory wait for pages like root's.",
)  # fmt: skip
def serve(
    socket: str | None,
    memory_limit: int | None,
    offline_foreign: bool,
    policy: str,
    io_limit: float,
    user: tuple[str, ...],
) -> int:
    """Run a manager that processes share, until SIGTERM or Ctrl-C.

    Programs find it through $HWPOISON_SOCKET or hwpoison.connect(PATH). It serves its own user and root, and writes one
    line per failure to standard error, which on a terminal comes between what other commands print there.

    When it is told to end while processes still map its memory, it writes changes back, lets nobody new in and stays until
    the last has gone; the same signal again ends it at once, and those processes with it, by SIGBUS: nobody could serve
    their accesses any more. A manager that dies is followed by another one (docs/restart.md).

    \b
    Example:
      hwpoison serve --socket /tmp/hwpoison.sock --memory-limit 2GiB
    """
    if not socket:
        raise click.UsageError(f"Missing option '--socket': pass a path, or set {SOCKET_VARIABLE}")
    if offline_foreign and os.geteuid() != 0:
        raise click.UsageError("--offline-foreign needs root, as the kernel's hard offline does; run it with sudo")
    if user and os.geteuid() != 0:
        raise click.UsageError("--user needs root: the manager may have to signal processes of that user; run it with sudo")
    folder = Path(socket).absolute().parent
    if not socket.startswith("@") and not folder.is_dir():
        raise click.UsageError(f"there is no folder {folder}: make it, or choose another path for the socket")
    from hwpoison.core.records import Policy
    from hwpoison.service.daemon import serve as serve_at

    return serve_at(
        socket, memory_limit=memory_limit, offline_foreign=offline_foreign, policy=Policy(policy), io_limit=io_limit,
        users=tuple(map(_user, user)),
    )  # fmt: skip


def _user(name: str) -> int:
    """The number of a user. Raises UsageError."""
    try:
        return int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
    except KeyError:
        raise click.UsageError(f"there is no user {name!r}") from None
