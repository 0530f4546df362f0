"""The command `hwpoison`: a table of subcommands, each in a file of its own that is imported only when it runs.

This package alone prints and chooses exit statuses. A new command is one file and one line in `COMMANDS`.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import click

from hwpoison.cli.common import FINE, INTERRUPTED, USAGE, reason
from hwpoison.linux.standard import open_standard_streams


class Place(NamedTuple):
    """Where a command is, as `module:attribute`, and what `hwpoison --help` says of it."""

    where: str
    summary: str


COMMANDS = {
    "run": Place("hwpoison.cli.run:run", "Run a command with a manager of its own."),
    "serve": Place("hwpoison.cli.serve:serve", "Run a manager that processes share."),
    "restart": Place("hwpoison.cli.restart:restart", "Replace a manager, after an upgrade, while programs go on."),
    "status": Place("hwpoison.cli.status:status", "Show how a manager is doing, and whether anything is lost."),
    "objects": Place("hwpoison.cli.objects:objects", "List the memory that a manager owns."),
    "inject": Place("hwpoison.cli.inject:inject", "Simulate a failure of one page."),
    "report": Place("hwpoison.cli.report:report", "Report a page that really is bad."),
    "log": Place("hwpoison.cli.log:log", "Read the event log, of managers that have ended too."),
    "demo": Place("hwpoison.cli.demo:demo", "Watch memory fail in every way, and every byte be right."),
    "doctor": Place("hwpoison.cli.doctor:doctor", "Find out what this machine can do, and what keeps it from more."),
    "explore": Place("hwpoison.cli.explore:explore", "Meet every order of events, in simulation."),
    "bench": Place("hwpoison.cli.bench:bench", "Measure what this costs here, each figure beside its floor."),
}


class Commands(click.Group):
    """The group of all commands in `COMMANDS`, in that order."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name].where.split(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            status = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read our output has read enough. Python's own flush at the end must not find the same again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FINE
        return status

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, place.summary) for name, place in COMMANDS.items()])


@click.group(cls=Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hwpoison", message="%(prog)s %(version)s")
@click.pass_context
def command(context: click.Context) -> int:
    """Memory-failure recovery in user space.

    \b
    Exit status:
      0  fine
      1  something was found: lost data, a failed recovery
      2  wrong usage or input
      3  no manager answers

    \b
    Example:
      hwpoison run -- python train.py
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        return USAGE
    return FINE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status. Every error is one line on standard error."""
    open_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A mark that a terminal's encoding lacks must not cost the rest of the output.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = command.main(arguments, prog_name="hwpoison", standalone_mode=False)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "hwpoison"
        return _fail(path, f"{error.format_message()} (see {path} --help)", USAGE)
    except click.ClickException as error:
        return _fail("hwpoison", error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        return _fail("hwpoison", reason(error), USAGE)
    return status or FINE


def _fail(who: str, what: str, status: int) -> int:
    click.echo(f"{who}: {' '.join(what.split())}", err=True)
    return status
