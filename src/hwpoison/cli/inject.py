"""`hwpoison inject`: a simulated failure."""

from __future__ import annotations

import click

from hwpoison.cli.common import connected, explaining, json_option, number, print_failure, socket_option, wait_for_log


@click.command
@click.argument("name")
@click.argument("offset", type=number)
@click.option("--action-required", is_flag=True, help="As if a process had touched the page.")
@socket_option
@json_option
def inject(name: str, offset: int, action_required: bool, socket: str | None, as_json: bool) -> int:
    """Simulate a failure of the page at byte OFFSET of the object NAME.

    It is handled as a real one, but no hardware is blamed for it. Prints the kernel's line, which ends with the id of the
    failure's events in the log. The exit status is 1 if data was lost or the recovery failed.

    \b
    Example:
      hwpoison inject table 0x7000
    """
    with connected(socket) as manager:
        with explaining(manager, name, offset):
            failure = manager.inject(name, offset, action_required)
        wait_for_log(manager)
    return print_failure(f"{name}+{offset:#x}", failure, as_json=as_json)
