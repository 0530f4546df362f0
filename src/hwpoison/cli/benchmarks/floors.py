"""The floors: small C programs in the checkout's folder `benchmarks`, compiled when they are needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import hwpoison

SOURCES = Path(hwpoison.__file__).parents[2] / "benchmarks"
FLOOR_SECONDS_MAX = 300


class FloorError(RuntimeError):
    """A floor can't be built or has failed; the message says why."""


class Floors:
    """Compiles into `folder` and runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @staticmethod
    def check() -> None:
        """Raises `FloorError` if floors can't be built here."""
        if not (SOURCES / "floor.h").exists():
            raise FloorError(f"the floors' sources are not in {SOURCES}: run this from a checkout of hwpoison")
        if shutil.which("cc") is None:
            raise FloorError("there is no C compiler (cc) for the floors: install one, such as the package gcc")

    def run(self, name: str, *arguments: object, cpus: set[int] | None = None) -> dict[str, Any]:
        """What the floor prints. It may run on `cpus`, or where this process may."""
        program = self._folder / name
        if not program.exists():
            self._call("cc", "-O2", "-Wall", "-Wextra", "-o", program, SOURCES / f"{name}.c", "-lpthread")
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus or before)
        try:
            found: dict[str, Any] = json.loads(self._call(program, *arguments))
        finally:
            os.sched_setaffinity(0, before)
        return found

    @staticmethod
    def _call(*command: object) -> str:
        try:
            return subprocess.run(
                [str(one) for one in command], check=True, capture_output=True, text=True, timeout=FLOOR_SECONDS_MAX
            ).stdout
        except subprocess.CalledProcessError as error:
            raise FloorError(f"{command[0]} failed: {error.stderr.strip()}") from None
