"""What is wrong with an argument is said where it is passed, in words of ours, and nothing else is disturbed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hwpoison
from hwpoison.linux.syscalls import PAGE_SIZE
from hwpoison.protocol import MESSAGE_LIMIT
from tests.live.process import Child, serving

pytestmark = pytest.mark.live


@pytest.fixture
def served() -> Iterator[Path]:
    """The socket of a manager, in a folder that everybody may look into."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "socket"
        with serving(path):
            yield path


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda manager, table: table.array("S0"), ValueError, "items of 0 bytes"),
        (lambda manager, table: table.array("V0"), ValueError, "items of 0 bytes"),
        (lambda manager, table: table.array("u1", offset=1 << 40), ValueError, "is not within the 4096 bytes"),
        (lambda manager, table: table.discard(0.5, 5), TypeError, "offset is a whole number, not float 0.5"),
        (lambda manager, table: manager.inject(None, 0), TypeError, "the name of an object as a str, not NoneType"),
        (lambda manager, table: manager.inject(5, 0), TypeError, "the name of an object as a str, not int"),
        (lambda manager, table: manager.inject(table, 0, 1), TypeError, "action_required is True or False, not int 1"),
        (lambda manager, table: manager.report(pfn=1, action_required="no"), TypeError, "action_required is True or False"),
        (lambda manager, table: manager.allocate(1 << 63), MemoryError, "of 9223372036854775808 bytes: no file can have so"),
        (lambda manager, table: manager.report(pfn="x"), TypeError, "pfn is a whole number, not str 'x'"),
        (lambda manager, table: manager.allocate(True), TypeError, "nbytes is a whole number, not True"),
        (lambda manager, table: manager.attach("x" * MESSAGE_LIMIT), ValueError, "too long for a message"),
        (lambda manager, table: hwpoison.connect(socket=5), TypeError, "socket is a str or a path, not int"),
        (lambda manager, table: hwpoison.connect("a\0b"), ValueError, "no NUL"),
    ],
)
def test_a_wrong_argument_is_refused_in_words(
    manager: hwpoison.Manager, call: Callable[[Any, hwpoison.Memory], object], kind: type[Exception], text: str
) -> None:
    with manager.allocate(PAGE_SIZE, "table") as table:
        with pytest.raises(kind, match=text):
            call(manager, table)
        assert table.read(0, 1) == b"\0"


def test_a_path_names_a_socket_and_another_users_manager_is_a_permission_error(
    nobody: Callable[..., Child], served: Path
) -> None:
    hwpoison.connect(socket=served).close()
    code = """
try:
    hwpoison.connect(arguments[0])
except PermissionError as error:
    say(str(error))
"""
    with nobody(code, str(served)) as child:
        assert f"is that of user {os.geteuid()}" in child.hear()
