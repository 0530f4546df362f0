"""The examples do what they say, while pages fail under them."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support import need

EXAMPLES = Path(__file__).parents[2] / "examples"
PRINTED = {
    "buffer_pool": ["pages that were lost and done again: some", "0 of 18559 values are wrong"],
    "cache": ["dropped: key 23", "now: None", "then: b'fetched again'", "the others are right: True"],
    "checkpoint": ["rows that were lost and computed again: some", "the result is right"],
    "table": [
        "the column lies in the file: True",
        "its sum is right: True",
        "rows are lost: True",
        "a sum over them is refused",
        "after the repair it is right: True",
    ],
    "weights": ["workers whose answers were all right: 3 of 3", "bytes that are lost: 0"],
}


def test_each_example_is_tested() -> None:
    assert sorted(PRINTED) == sorted(one.stem for one in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_prints_what_it_should(name: str) -> None:
    done = subprocess.run([sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.splitlines()) == (0, PRINTED[name]), done.stderr


def test_the_weights_are_tensors_of_torch_where_that_is_installed() -> None:
    need(find_spec("torch") is not None, "torch", "torch")
    test_an_example_prints_what_it_should("weights")
