"""`hwpoison restart`: another manager in place of this one."""

from __future__ import annotations

import click

from hwpoison.cli.common import FINE, connected, json_option, print_json, socket_option


@click.command
@socket_option
@json_option
def restart(socket: str | None, as_json: bool) -> int:
    """Replace a manager by another one, of the version of hwpoison that is installed now: after an upgrade, for instance.

    Programs go on, with their memory and all that is known of it: an access or a request that comes meanwhile takes longer.
    The process that was started by `hwpoison serve` stays the same. If the version that is installed can't take over, the
    manager stays as it is, and the exit status is 2.

    \b
    Example:
      hwpoison restart --socket /tmp/hwpoison.sock
    """
    with connected(socket) as manager:
        before = manager.pid
        after = manager.restart()
    if as_json:
        print_json({"before": before, "after": after})
    else:
        click.echo(f"process {after} has taken over from process {before}")
    return FINE
