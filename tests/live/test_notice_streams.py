"""Notices as iterators and for event loops, and when a process learns of a loss that nobody in it wants a notice of."""

from __future__ import annotations

import asyncio
import os
import selectors
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import hwpoison
from hwpoison import Policy
from hwpoison.linux.syscalls import PAGE_SIZE, SI_QUEUE
from tests.live.process import Child, kill, kill_service, serving
from tests.live.signals import BUS_MCEERR_AO, end_tracing, next_bus_error, seize
from tests.support import wait_until

pytestmark = pytest.mark.live

PAGE = PAGE_SIZE


@pytest.fixture
def table(manager: hwpoison.Manager) -> Iterator[hwpoison.Memory]:
    memory = manager.allocate(16 * PAGE, "table")
    memory.buffer[:] = b"x" * memory.nbytes
    yield memory
    memory.close()


def test_an_iterator_gives_what_stands_and_then_what_comes_each_once(
    manager: hwpoison.Manager, table: hwpoison.Memory
) -> None:
    before = [manager.inject(table, page * PAGE) for page in (3, 1)]
    with table.notices() as notices:
        after = [manager.inject(table, page * PAGE) for page in (5, 2)]
        told = [next(notices) for _ in range(4)]
    expected = sorted(before, key=lambda one: one.offset or 0) + after
    assert [one.event_id for one in told] == [one.event_id for one in expected]
    assert {one.memory for one in told} == {table}
    assert {one.source for one in told} == {"injected"}
    assert list(notices) == []


def test_a_manager_gives_those_of_all_its_memories(manager: hwpoison.Manager, table: hwpoison.Memory) -> None:
    other = manager.allocate(PAGE, "other")
    other.buffer[0] = 1
    first = manager.inject(table, 0)
    notices = manager.notices()
    second = manager.inject(other, 0)
    assert [(one.event_id, one.memory) for one in (next(notices), next(notices))] == [
        (first.event_id, table), (second.event_id, other)
    ]  # fmt: skip


def test_two_tasks_share_an_asynchronous_iterator_that_ends_with_the_memory(
    manager: hwpoison.Manager, table: hwpoison.Memory
) -> None:
    heard: list[str] = []
    notices = table.notices()
    both = asyncio.Event()

    async def listen() -> None:
        async for one in notices:
            heard.append(one.event_id)
            if len(heard) == 8:
                both.set()

    async def main() -> list[str]:
        async with asyncio.TaskGroup() as group:
            group.create_task(listen())
            group.create_task(listen())
            strikes = [await asyncio.to_thread(manager.inject, table, page * PAGE) for page in range(8)]
            await both.wait()
            await asyncio.to_thread(table.close)
        return [one.event_id for one in strikes]

    assert sorted(asyncio.run(main())) == sorted(heard)


def test_its_descriptor_can_be_read_from_exactly_while_something_waits(
    manager: hwpoison.Manager, table: hwpoison.Memory
) -> None:
    notices = table.notices()
    with selectors.DefaultSelector() as selector:
        selector.register(notices, selectors.EVENT_READ)
        assert selector.select(0) == []
        manager.inject(table, 0)
        manager.inject(table, PAGE)
        for offset in (0, PAGE):
            assert len(selector.select(30)) == 1
            assert next(notices).offset == offset
        assert selector.select(0) == []
        notices.close()
        assert len(selector.select(30)) == 1
        assert list(notices) == []


def test_who_waits_in_a_thread_is_woken_by_close(table: hwpoison.Memory) -> None:
    notices = table.notices()
    ended = threading.Event()

    def wait() -> None:
        assert list(notices) == []
        ended.set()

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for one in threads:
        one.start()
    notices.close()
    for one in threads:
        one.join(30)
    assert ended.is_set()


def test_a_decorated_function_stays_a_function(manager: hwpoison.Manager, table: hwpoison.Memory) -> None:
    heard: list[str] = []
    came = threading.Event()

    @table.on_failure
    def failed(notice: hwpoison.Notice) -> int:
        heard.append(notice.event_id)
        came.set()
        return 7

    event = manager.inject(table, 0).event_id
    assert came.wait(30)
    assert heard == [event]
    assert failed(next(table.notices())) == 7
    failed.cancel()


EARLY = """
manager = hwpoison.connect(arguments[0])
memory = manager.attach("table")
how = arguments[1]
if how == "memory":
    memory.policy = "early"
elif how == "process, and set before":
    hwpoison.set_policy("early")
    memory = manager.attach("table")
elif how == "process":
    # It is open already.
    hwpoison.set_policy(hwpoison.Policy.EARLY)
elif how == "process, and late for this one":
    hwpoison.set_policy("early")
    memory.policy = "late"
elif how == "with a function":
    memory.policy = "early"
    memory.on_failure(lambda notice: say("told"))
threads = {one.name: one.native_id for one in threading.enumerate()}
say([memory.policy, memory.address, threads.get("hwpoison-notices")])
hear()
"""


@pytest.mark.parametrize("how", ["memory", "process", "process, and set before"])
def test_early_is_the_signal_that_the_kernel_would_send(how: str, manager: hwpoison.Manager, table: hwpoison.Memory) -> None:
    with Child(EARLY, manager.socket, how) as child:
        policy, address, thread = child.hear()
        assert policy == "early"
        seize(thread)
        manager.inject(table, 3 * PAGE)
        information = next_bus_error(thread)
        assert (information.code, information.address) == (BUS_MCEERR_AO, address + 3 * PAGE)
        assert 1 << information.shift == PAGE
        end_tracing(thread)
        assert child.wait() == -signal.SIGBUS
    assert os.getpid() in manager.inject(table, 4 * PAGE).victims


@pytest.mark.parametrize("handled", [False, True])
def test_early_is_told_where_the_signal_is_blocked(
    handled: bool, manager: hwpoison.Manager, table: hwpoison.Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a handler it is waited for; with one, this thread may just have been started by one that blocks everything."""
    # numpy's threads, which begin when it is imported, would not block it.
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    code = """
import faulthandler
if arguments[1]:
    faulthandler.enable()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS])
manager = hwpoison.connect(arguments[0])
memory = manager.attach("table")
memory.policy = "early"
say()
say(signal.sigwaitinfo([signal.SIGBUS]).si_code)
hear()
"""
    with Child(code, manager.socket, handled) as child:
        child.hear()
        manager.inject(table, 3 * PAGE)
        if handled:
            assert child.wait() == -signal.SIGBUS
        else:
            assert child.hear() == SI_QUEUE
            child.tell()
            assert child.wait() == 0, child.errors


def test_early_is_that_signal_in_a_forked_child_too(manager: hwpoison.Manager, table: hwpoison.Memory) -> None:
    code = """
manager = hwpoison.connect(arguments[0])
memory = manager.attach("table")
hwpoison.set_policy("early")
child = os.fork()
if not child:
    say()
    time.sleep(60)
    os._exit(0)
# Of the parent nobody is to be told: it is about the child.
hwpoison.set_policy("late")
memory.on_failure(lambda notice: None)
say(os.waitpid(child, 0)[1])
hear()
"""
    with Child(code, manager.socket) as child:
        child.hear()
        manager.inject(table, 3 * PAGE)
        assert child.hear() == signal.SIGBUS
        child.tell()
        assert child.wait() == 0, child.errors


def test_a_forked_child_is_told_of_what_stands_and_its_parent_had_not_begun_to_tell(
    manager: hwpoison.Manager, table: hwpoison.Memory
) -> None:
    code = """
manager = hwpoison.connect(arguments[0])
memory = manager.attach("table")
parent = os.getpid()
begun, go_on, told = threading.Event(), threading.Event(), []

@memory.on_failure
def lost(notice):
    told.append(notice.offset // mmap.PAGESIZE)
    begun.set()
    if os.getpid() == parent:
        go_on.wait()

say()
hear()
begun.wait()
child = os.fork()
if not child:
    deadline = time.monotonic() + 60
    while len(told) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    # Nothing that follows was told before: the next loss comes after those that stood.
    manager.inject(memory, 7 * mmap.PAGESIZE)
    while 7 not in told and time.monotonic() < deadline:
        time.sleep(0.001)
    say([told, signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()])
    os._exit(0)
os.waitpid(child, 0)
go_on.set()
"""
    with Child(code, manager.socket) as child:
        child.hear()
        for page in range(3):
            manager.inject(table, page * PAGE)
        child.tell()
        assert child.hear() == [[0, 1, 2, 7], True]


def test_a_function_that_ends_its_thread_keeps_nobody_else_from_being_told(
    manager: hwpoison.Manager, table: hwpoison.Memory, caplog: pytest.LogCaptureFixture
) -> None:
    told = []
    table.on_failure(lambda _: sys.exit("now"))
    table.on_failure(told.append)
    for page in range(2):
        manager.inject(table, page * PAGE)
    wait_until(lambda: len(told) == 2, "the other function hears of both")
    assert "SystemExit: now" in caplog.text


def test_a_process_that_has_no_descriptor_left_when_the_manager_dies_is_told_when_it_has_some_again(
    manager: hwpoison.Manager, table: hwpoison.Memory
) -> None:
    code = """
import resource
manager = hwpoison.connect(arguments[0])
memory = manager.attach("table")
memory.on_failure(lambda notice: say(notice.offset))
say()
hear()
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, most))
say()
hear()
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
hear()
"""
    with Child(code, manager.socket) as child:
        child.hear()
        child.ask()
        kill(manager)
        assert manager.inject(table, 0).victims
        child.tell()
        assert child.hear() == 0
        manager.inject(table, PAGE)
        assert child.hear() == PAGE
        child.tell()
        assert child.wait() == 0, child.errors


def test_who_waits_for_notices_when_nobody_can_send_any_waits_no_longer() -> None:
    code = """
manager = hwpoison.connect(arguments[0])
notices = manager.notices()
say()
say(list(notices))
"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "socket"
        with serving(path) as server, Child(code, str(path)) as child:
            child.hear()
            kill_service(server.pid)
            assert child.hear() == []
            assert child.wait() == 0, child.errors


@pytest.mark.parametrize("how", ["process, and late for this one", "the manager's", "with a function"])
def test_late_and_with_a_function_no_signal_comes(how: str, manager: hwpoison.Manager, table: hwpoison.Memory) -> None:
    with Child(EARLY, manager.socket, how) as child:
        policy, _, _ = child.hear()
        assert policy == ("early" if how == "with a function" else "late")
        manager.inject(table, 3 * PAGE)
        if how == "with a function":
            assert child.hear() == "told"
        child.tell()
        assert child.wait() == 0, child.errors


def test_the_managers_policy_is_what_is_true_for_who_says_nothing() -> None:
    code = """
manager = hwpoison.Manager(policy="early")
memory = manager.allocate(4096)
memory.buffer[0] = 1
say(memory.policy)
manager.inject(memory, 0)
hear()
"""
    with Child(code) as child:
        assert child.hear() == Policy.EARLY
        assert child.wait() == -signal.SIGBUS


def test_a_policy_that_is_none_is_refused_in_words(table: hwpoison.Memory) -> None:
    for attempt in (lambda: hwpoison.set_policy("soon"), lambda: setattr(table, "policy", "soon")):
        with pytest.raises(ValueError, match="soon"):
            attempt()
    assert table.policy is Policy.LATE
