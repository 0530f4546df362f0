"""`hwpoison report`: a page that really is bad."""

from __future__ import annotations

import click

from hwpoison.cli.common import connected, explaining, json_option, number, print_failure, socket_option, wait_for_log


@click.command
@click.option("--name", help="The object, with --offset.")
@click.option("--offset", type=number, help="A byte of the object.")
@click.option("--pfn", type=number, help="The number of the frame (as root).")
@click.option("--physical", type=number, help="A physical address (as root).")
@click.option("--pid", type=number, help="A process, with --address.")
@click.option("--address", type=number, help="An address in the process.")
@click.option("--source", default="application", show_default=True, help="Who found it.")
@click.option("--action-required", is_flag=True, help="A process has touched the page.")
@socket_option
@json_option
def report(
    name: str | None,
    offset: int | None,
    pfn: int | None,
    physical: int | None,
    pid: int | None,
    address: int | None,
    source: str,
    action_required: bool,
    socket: str | None,
    as_json: bool,
) -> int:
    """Report a page that really is bad: its frame is not used again.

    Name the page by --name and --offset, by --pfn, by --physical, or by --pid and --address. Prints the kernel's line,
    which ends with the id of the failure's events in the log. The exit status is 1 if data was lost or the recovery failed.
    A page that is not the manager's is an unknown page: Ignored, with exit status 0.

    \b
    Example:
      hwpoison report --pid 4711 --address 0x7f3a5c007000 --source "nightly scan"
    """
    for first, value, second, other in (("--name", name, "--offset", offset), ("--pid", pid, "--address", address)):
        if (value is None) != (other is None):
            raise click.UsageError(f"{first} needs {second}" if other is None else f"{second} needs {first}")
    ways = [(name, offset), (pfn,), (physical,), (pid, address)]
    given = [values for values in ways if any(value is not None for value in values)]
    if len(given) != 1:
        raise click.UsageError("name one page: --name and --offset, --pfn, --physical, or --pid and --address")
    from hwpoison.core.records import Report, Source

    if source == Source.INJECTED:
        raise click.UsageError(f"--source {source} is for simulated failures; use `hwpoison inject NAME OFFSET`")
    with connected(socket) as manager:
        with explaining(manager, name or "", offset or 0):
            failure = manager.report(
                name, offset, pfn=pfn, physical=physical, pid=pid, address=address, source=source,
                action_required=action_required,
            )  # fmt: skip
        wait_for_log(manager)
        page_size = manager.connection.welcome.page_size
    if physical is not None:
        pfn = physical // page_size
    where = Report(name=name, offset=offset, pfn=pfn, pid=pid, address=address).where
    return print_failure(where, failure, as_json=as_json)
