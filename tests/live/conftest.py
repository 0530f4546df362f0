"""For tests with real processes on the real kernel."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest

import hwpoison
from hwpoison.linux.userfaultfd import NEEDED, open_userfaultfd
from tests.live.frames import can_see_frames
from tests.live.process import Child
from tests.live.slow_files import SlowFile, can_mount
from tests.support import need


@pytest.fixture(scope="session", autouse=True)
def userfaultfd() -> None:
    """Nothing here runs without it."""
    try:
        os.close(open_userfaultfd(NEEDED).fd)
    except OSError as error:
        need(False, str(error))


@pytest.fixture
def manager(userfaultfd: None) -> Iterator[hwpoison.Manager]:
    with hwpoison.Manager() as manager:
        yield manager


@pytest.fixture
def root() -> None:
    """The test looks at frames, or becomes other users."""
    need(can_see_frames(), "root, who may see page frame numbers")


@pytest.fixture
def nobody(root: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Child]]:
    """A maker of processes that run as an unprivileged user."""
    user = 65534
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, user, user)
        monkeypatch.setenv("HWPOISON_LOG", f"{folder}/events.db")
        probe = [sys.executable, "-c", "import hwpoison"]
        tried = subprocess.run(probe, user=user, group=user, extra_groups=[], cwd="/", capture_output=True, check=False)
        need(not tried.returncode, "a checkout and a Python that other users can run")
        yield lambda code, *arguments: Child(code, *arguments, user=user, directory=Path(folder))


@pytest.fixture
def slow_file() -> Iterator[Callable[[bytes], SlowFile]]:
    """A file whose reads and writes the test can hold up and fail."""
    need(can_mount(), "the right to mount a FUSE file system")
    files: list[SlowFile] = []

    def make(content: bytes) -> SlowFile:
        files.append(SlowFile(content))
        return files[-1]

    yield make
    for one in files:
        one.close()


def known(nbytes: int, version: int = 1) -> bytes:
    """Content in which every 8 bytes are different, no byte range is all zeros, and versions differ everywhere."""
    words = numpy.arange(1, nbytes // 8 + 2, dtype="u8") * numpy.uint64(0x9E3779B97F4A7C15)
    return (words ^ numpy.uint64(version << 56 | version)).tobytes()[:nbytes]


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    """A file with known content on the disk."""

    def make(nbytes: int, name: str = "data.bin", version: int = 1) -> Path:
        path = tmp_path / name
        path.write_bytes(known(nbytes, version))
        return path

    return make
