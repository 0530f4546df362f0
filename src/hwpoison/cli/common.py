"""What the commands share: options, sizes and numbers, the way to a manager, and how things are printed."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

    from hwpoison.app.manager import SharedManager
    from hwpoison.core.records import Failure

FINE = 0
FOUND = 1
USAGE = 2
NO_MANAGER = 3
INTERRUPTED = 130

SOCKET_VARIABLE = "HWPOISON_SOCKET"
HOW_TO_START = "start one with `hwpoison serve --socket PATH`, or run the program with `hwpoison run -- COMMAND`"
JSON_VERSION = 1
NUMBER_MAX = (1 << 63) - 1

Function = TypeVar("Function", bound=Callable[..., Any])


class NoManagerError(click.ClickException):
    """Nobody listens where a manager should."""

    exit_code = NO_MANAGER


# --- options and arguments


def socket_option(function: Function) -> Function:
    """`--socket`, for a command that asks a manager."""
    return click.option(
        "--socket", metavar="PATH", envvar=SOCKET_VARIABLE, help=f"The manager's socket. [default: ${SOCKET_VARIABLE}]"
    )(function)


def json_option(function: Function) -> Function:
    """`--json`, passed on as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(function)


def memory_limit_option(function: Function) -> Function:
    """`--memory-limit`, in bytes."""
    return click.option(
        "--memory-limit",
        type=size,
        help="For the memory of all objects: anonymous pages are never dropped; pages of files share what is left. 512M and "
        "2GiB are sizes.",
    )(function)


def number(text: str) -> int:
    """A number from 0 on: decimal, or hexadecimal with 0x."""
    try:
        value = int(text, 0)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no number; write it in decimal, or in hexadecimal with 0x") from None
    if not 0 <= value <= NUMBER_MAX:
        raise click.BadParameter(f"{text} is not between 0 and {NUMBER_MAX:#x}")
    return value


def size(text: str) -> int:
    """A number of bytes; units are powers of 1024, written as K or KiB, M or MiB, G or GiB, T or TiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(?:([KMGT])(?:iB)?|B)?", text, re.ASCII | re.IGNORECASE)
    if found is None:
        raise click.BadParameter(f"{text!r} is no size; write bytes, or units of 1024 such as 512M or 2GiB")
    amount, unit = found.groups(default="")
    nbytes = int(Decimal(amount) * 1024 ** " KMGT".index(unit.upper() or " "))
    if not 0 < nbytes <= NUMBER_MAX:
        raise click.BadParameter(f"{text!r} is no size that memory can have; write 512M, say")
    return nbytes


# --- the way to a manager


@contextmanager
def connected(address: str | None) -> Iterator[SharedManager]:
    """The manager at `address`, for asking and reporting. Nothing is printed inside: a reader of the output that goes
    away would look like a manager that does. Raises `NoManagerError`.
    """
    if not address:
        raise NoManagerError(f"no manager is named by --socket or ${SOCKET_VARIABLE}; {HOW_TO_START}")
    import hwpoison
    from hwpoison.protocol import MalformedError

    try:
        manager = hwpoison.connect(address, maps=False)
    except (ConnectionError, MalformedError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        if isinstance(cause, OSError) and cause.errno == errno.ENAMETOOLONG:
            raise cause from None  # the input is wrong: nobody can serve there
        raise NoManagerError(f"no manager answers at {address}: {_why_not(address, cause)}; {HOW_TO_START}") from error
    try:
        with manager:
            yield manager
    except ConnectionError as error:
        raise NoManagerError(f"{reason(error)}; {HOW_TO_START}") from error


def _why_not(address: str, error: BaseException) -> str:
    """Why nobody answers: "Connection refused" is said of a file of any kind."""
    path = Path(address)
    if isinstance(error, ConnectionRefusedError) and path.exists():
        return "the manager that made this socket has ended" if path.is_socket() else "it is no socket"
    return reason(error)


@contextmanager
def explaining(manager: SharedManager, name: str, offset: int) -> Iterator[None]:
    """What is wrong with a name or an offset is said in the words of somebody who has just typed it."""
    try:
        yield
    except FileNotFoundError:
        path = os.path.abspath(name)  # noqa: PTH100  (as `open` names a file)
        if any(one.name == path for one in manager.objects()):
            raise ValueError(f"there is no object {name!r}; a file's name is its absolute path: {path!r}") from None
        raise
    except ValueError:
        for one in manager.objects():
            if one.name == name and offset >= one.nbytes:
                raise ValueError(f"byte {offset:#x} is not within {name!r} ({one.nbytes:#x} bytes)") from None
        raise


def own_command() -> str:
    """How this command is called from where it was called."""
    import shlex
    import shutil

    called, found = Path(sys.argv[0]), shutil.which("hwpoison")
    if called.name != "hwpoison" or not os.access(called, os.X_OK):
        return f"{shlex.quote(sys.executable)} -m hwpoison"
    return "hwpoison" if found and called.samefile(found) else shlex.quote(str(called))


def wait_for_log(manager: SharedManager) -> None:
    """Until all that has happened so far is in the event log: an id that is printed must be found there."""
    from hwpoison import protocol

    manager.connection.request(protocol.SyncLog(), protocol.LogPlace)


# --- what is printed


def reason(error: BaseException) -> str:
    """What to tell a person about `error`."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return str(error) or type(error).__name__


def print_json(document: dict[str, Any]) -> None:
    """One JSON document, indented."""
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode({"version": JSON_VERSION} | document)).decode())


def print_failure(where: str, failure: Failure, *, as_json: bool) -> int:
    """The handling of one report; the exit status: data that is lost and a failed recovery are found."""
    from hwpoison.core.records import Outcome, kernel_line

    if as_json:
        import msgspec

        print_json(msgspec.to_builtins(failure))
    else:
        click.echo(paint(kernel_line(where, failure), outcome=failure.outcome))
        if consequence := _consequence(failure):
            click.echo(consequence)
    return FOUND if failure.victims or failure.outcome is Outcome.FAILED else FINE


def _consequence(failure: Failure) -> str:
    """What the kernel's words mean here, for somebody who reads them for the first time; nothing if they say it all."""
    from hwpoison.core.failure import TABLE
    from hwpoison.core.records import Outcome, State

    if failure.victims:
        return f"Data lost in process {', '.join(map(str, failure.victims))}"
    if failure.outcome is Outcome.FAILED and not failure.already_poisoned:
        return "The bad page could not be isolated: it may be used again."
    if failure.state is State.UNKNOWN and failure.reason:
        return ""  # what the kernel's hard offline made of it
    does = next(row.does for row in TABLE if row.state is failure.state).replace("nothing:", "nothing was done:")
    return f"{does[0].upper()}{does[1:]}."


OUTCOME_COLOURS = {"Recovered": "green", "Delayed": "yellow", "Ignored": "cyan", "Failed": "red"}


def coloured() -> bool:
    """True if standard output is a terminal that shows colours, and nobody asked for none (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, *, outcome: str = "", colour: str = "") -> str:
    """`text` in the colour of an outcome, or in `colour`."""
    colour = colour or OUTCOME_COLOURS.get(outcome, "")
    return click.style(text, fg=colour) if colour and coloured() else text


def bytes_text(nbytes: int) -> str:
    """A size for people, exact."""
    return "1 byte" if nbytes == 1 else f"{nbytes} bytes"


def size_text(nbytes: int) -> str:
    """A size for people."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str] = ()) -> None:
    """A table, without headings if there are none; `numbers` are those of columns that are aligned to the right.

    A terminal's width is kept; a file has none.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False, show_header=bool(headings))
    for heading in headings:
        table.add_column(heading, justify="right" if heading in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text.from_ansi(cell) for cell in row))
    console(without_terminal=10_000).print(table)


def console(*, without_terminal: int, at_most: int | None = None) -> Console:
    """What tables are printed to: as wide as the terminal, but `at_most`; a pipe or a file has the other width."""
    from rich.console import Console

    class Output(Console):
        """Ends no line with blanks, and leaves it to `hwpoison.cli.main` what becomes of us when nobody reads any more."""

        def print(self, *objects: Any, **options: Any) -> None:
            with self.capture() as captured:
                super().print(*objects, **options)
            sys.stdout.write(re.sub(" +$", "", captured.get(), flags=re.MULTILINE))
            sys.stdout.flush()

    output = Output(highlight=False, no_color=not coloured(), width=None if sys.stdout.isatty() else without_terminal)
    if at_most is not None:
        output.width = min(output.width, at_most)
    return output
