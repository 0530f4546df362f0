"""The suite runs once for each machine. A test that is a coroutine runs on its machine's event loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hwpoison.core.machine import Machine
from tests.contract.linux_rig import LinuxRig
from tests.contract.rig import Rig
from tests.contract.simulation_rig import SimulationRig

RIGS: dict[str, Callable[[Path], Rig]] = {"linux": LinuxRig, "simulation": SimulationRig}


@pytest.fixture(params=RIGS)
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    """A machine under test and its world."""
    rig = RIGS[request.param](tmp_path)
    yield rig
    rig.close()


@pytest.fixture
def machine(rig: Rig) -> Machine:
    """The machine under test."""
    return rig.machine


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    # Every such test has a rig: at least the one that its machine comes with.
    rig: Rig = pyfuncitem._request.getfixturevalue("rig")
    names = inspect.signature(pyfuncitem.obj).parameters
    rig.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True
