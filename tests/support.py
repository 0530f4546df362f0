"""What tests of every kind share: needing a feature, and waiting for a state. What only some need stays with them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

SECONDS_MAX = 60.0
"""How long a test waits for what must happen."""


def need(available: object, what: str, kind: str = "live") -> None:
    """Skip the test if `what` is not available here; fail it where `HWPOISON_REQUIRE` demands tests of that kind."""
    if not available:
        if kind in os.environ.get("HWPOISON_REQUIRE", "").split(","):
            pytest.fail(f"HWPOISON_REQUIRE demands {kind!r}, and this machine has not: {what}")
        pytest.skip(f"this machine has not: {what}")


def wait_until(condition: Callable[[], object], what: str, seconds: float = SECONDS_MAX) -> None:
    """Look at the state of another process, say, until it is as it must be."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"this did not happen within {seconds:g} s: {what}"
        time.sleep(0.001)
