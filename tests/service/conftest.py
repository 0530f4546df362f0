"""For the tests of the command: a log of the test's own, and a manager that commands find by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import hwpoison
from tests.service.command import PAGE


@pytest.fixture
def log_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every process of a test logs to a file of the test's own, and finds no manager of somebody else."""
    path = tmp_path / "events.db"
    monkeypatch.setenv("HWPOISON_LOG", str(path))
    monkeypatch.delenv("HWPOISON_SOCKET", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return path


@pytest.fixture
def manager(log_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hwpoison.Manager]:
    """A manager that commands find by themselves."""
    with hwpoison.Manager() as manager:
        monkeypatch.setenv("HWPOISON_SOCKET", manager.socket)
        yield manager


@pytest.fixture
def table(manager: hwpoison.Manager) -> hwpoison.Memory:
    """Sixteen pages, of which the first two hold data."""
    table = manager.allocate(16 * PAGE, name="table")
    table.write(0, b"x" * (2 * PAGE))
    return table
