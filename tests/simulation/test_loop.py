"""The loop keeps asyncio's promises: CPython's own tests say so."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from hwpoison.simulation.choices import Choices, Happening
from hwpoison.simulation.loop import SimulationLoop
from tests.support import need

RUN = """
import asyncio, sys, unittest, warnings
from hwpoison.simulation.loop import SimulationLoop

class Policy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self):
        return SimulationLoop()

warnings.simplefilter("ignore")
asyncio.set_event_loop_policy(Policy())
found = unittest.TextTestRunner(verbosity=0).run(unittest.defaultTestLoader.loadTestsFromName(sys.argv[1]))
print(found.testsRun)
sys.exit(not found.wasSuccessful())
"""


@pytest.mark.parametrize("subject", ["locks", "taskgroups", "timeouts", "waitfor", "queues"])
def test_cpythons_own_tests_pass_on_it(subject: str) -> None:
    name = f"test.test_asyncio.test_{subject}"
    found = importlib.util.find_spec("test") and importlib.util.find_spec("test.test_asyncio")
    need(found, "CPython's own tests (Debian: libpython3.11-testsuite)", "cpython")
    done = subprocess.run([sys.executable, "-P", "-c", RUN, name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


def new_loop(choices: Choices | None = None, *events: Happening) -> SimulationLoop:
    offered = list(events)
    return SimulationLoop(choices, lambda: offered)  # type: ignore[abstract]


def test_callbacks_run_in_the_order_in_which_they_became_ready() -> None:
    loop = new_loop(Choices(seed=1))
    order: list[int] = []
    for number in range(20):
        loop.call_soon(order.append, number)
    while loop.step():
        pass
    assert order == list(range(20))


def test_time_moves_only_to_the_next_timer() -> None:
    loop = new_loop()

    async def sleep() -> float:
        await asyncio.sleep(3600)
        return loop.time()

    assert loop.run_until_complete(sleep()) == 3600


def test_what_comes_from_outside_is_chosen_and_comes_when_nothing_is_ready() -> None:
    order: list[str] = []
    events: list[Happening] = []
    for name in ("first", "second"):
        events.append(Happening(name, lambda name=name: (order.append(name), events.clear())))  # type: ignore[misc]
    loop = SimulationLoop(Choices([1]), lambda: events)  # type: ignore[abstract]
    loop.call_soon(order.append, "callback")
    while loop.step():
        pass
    assert order == ["callback", "second"]


def test_in_batch_mode_several_may_come_before_the_first_callback() -> None:
    order: list[str] = []
    events: list[Happening] = []
    for name in ("first", "second"):

        def happen(name: str = name) -> None:
            events[:] = [one for one in events if one.name != name]
            loop.call_soon(order.append, name)

        events.append(Happening(name, happen))
    loop = SimulationLoop(Choices([1, 1]), lambda: events, "batch")  # type: ignore[abstract]
    loop.call_soon(order.append, "callback")
    while loop.step():
        pass
    assert order == ["callback", "first", "second"]


def test_threads_are_refused() -> None:
    async def thread() -> None:
        await asyncio.get_running_loop().run_in_executor(None, print)

    async def from_a_thread() -> None:
        asyncio.get_running_loop().call_soon_threadsafe(print)

    for one in (thread, from_a_thread):
        with pytest.raises(RuntimeError, match="threads"):
            new_loop().run_until_complete(one())


def test_waiting_for_what_cannot_come_is_an_error() -> None:
    async def wait() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="nothing can happen"):
        new_loop().run_until_complete(wait())


def test_tasks_under_way_have_names_of_their_own() -> None:
    loop = new_loop()

    async def wait() -> None:
        await asyncio.sleep(1)

    async def names() -> list[str]:
        tasks = [loop.create_task(wait(), name="same") for _ in range(3)]
        await asyncio.wait(tasks)
        tasks.append(loop.create_task(wait(), name="same"))
        await tasks[-1]
        return [task.get_name() for task in tasks]

    assert loop.run_until_complete(names()) == ["same", "same (2)", "same (3)", "same"]


def test_it_is_small_enough_to_be_read() -> None:
    assert len(Path(inspect.getfile(SimulationLoop)).read_text().splitlines()) <= 250
