"""What becomes of a client that touches lost bytes: each row of the table in `hwpoison.core.policy`, for both kernels.

A kernel without poison markers is had by leaving the feature out when the userfaultfds are opened.
"""

from __future__ import annotations

import errno
import os
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hwpoison
from hwpoison.core.policy import TELL_LIMIT
from hwpoison.linux.userfaultfd import NO_FEATURE, Feature, open_userfaultfd
from tests.live.conftest import known
from tests.live.frames import PAGE
from tests.live.process import Child, asleep_in_a_fault
from tests.live.signals import BUS_ADRERR, BUS_MCEERR_AR, SI_QUEUE, next_bus_error, seize
from tests.live.slow_files import SlowFile
from tests.support import need, wait_until

WITH, WITHOUT = "with poison markers", "without poison markers"
KERNEL_POISON = os.path.exists("/proc/sys/vm/memory_failure_recovery")
"""A kernel that knows of memory failures says more with its signals."""


@pytest.fixture(params=[WITH, WITHOUT])
def markers(request: pytest.FixtureRequest) -> str:
    opened = open_userfaultfd(Feature.POISON)
    os.close(opened.fd)
    if request.param == WITH:
        need(opened.features, "a kernel with poison markers (6.6)")
    return str(request.param)


@pytest.fixture
def manager(markers: str) -> Iterator[hwpoison.Manager]:
    with hwpoison.Manager(without=Feature.POISON if markers == WITHOUT else NO_FEATURE) as manager:
        yield manager


@pytest.fixture
def memory(manager: hwpoison.Manager) -> hwpoison.Memory:
    """Four pages, of which the third is lost."""
    memory = manager.allocate(4 * PAGE, "t")
    memory.buffer[:] = known(4 * PAGE)
    manager.inject(memory, 2 * PAGE)
    return memory


def content() -> bytes:
    return known(4 * PAGE)[2 * PAGE : 3 * PAGE]


ATTACH = """
manager = hwpoison.connect(arguments[0])
memory = manager.attach("t")
view = memory.buffer
"""
TOUCH = """
say(memory.address)
hear()
say(view[2 * 4096 + 8])
hear()
"""
HANDLER = """
import ctypes, struct
libc = ctypes.CDLL(None)
Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)

class Action(ctypes.Structure):
    _fields_ = [("handler", Handler), ("mask", ctypes.c_char * 128), ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p)]

def at_bus_error(function):
    "Call the function in the signal itself, with code, address, value, and the thread."
    def handler(number, info, context):
        code, address, value = struct.unpack_from("8xi4xPP", ctypes.string_at(info, 32))
        function(code, address, value, threading.get_native_id())
    global kept
    kept = Action(Handler(handler), b"", 4, None)
    assert libc.sigaction(int(signal.SIGBUS), ctypes.byref(kept), None) == 0
"""


def kills(manager: hwpoison.Manager, pid: int) -> list[str]:
    return [event.detail for event in manager.events() if event.kind == "kill" and event.pid == pid]


# --- the rows --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("memory")
def test_through_a_guarded_view_the_guard_raises(manager: hwpoison.Manager) -> None:
    code = """
try:
    with hwpoison.guard(memory) as safe:
        zero = safe.buffer[2 * 4096 + 8]
except hwpoison.PoisonError as error:
    say([zero, error.ranges])
"""
    with Child(ATTACH + code, manager.socket) as child:
        assert child.hear() == [0, [["t", 2 * PAGE, PAGE]]]
        assert child.wait() == 0


@pytest.mark.usefixtures("memory")
def test_by_default_the_process_ends_with_a_sigbus_that_names_the_page(manager: hwpoison.Manager, markers: str) -> None:
    with Child(ATTACH + TOUCH, manager.socket) as child:
        page = child.hear() + 2 * PAGE
        seize(child.pid)
        child.tell()
        told = next_bus_error(child.pid)
        if markers == WITHOUT:
            assert (told.code, told.value) == (SI_QUEUE, page)
        else:
            assert told.code == (BUS_MCEERR_AR if KERNEL_POISON else BUS_ADRERR)
            assert told.address // PAGE * PAGE == page
            assert told.shift == (12 if KERNEL_POISON else 0)
        assert child.wait() == -signal.SIGBUS
    assert kills(manager, child.pid) == []


@pytest.mark.usefixtures("memory")
def test_a_handler_runs_in_the_thread_that_touched_the_page_and_knows_which(manager: hwpoison.Manager, markers: str) -> None:
    code = """
def handler(code, address, value, thread):
    say([code, address, value, thread == toucher.native_id])
    os._exit(42)

at_bus_error(handler)
say(memory.address)
toucher = threading.Thread(target=lambda: view[2 * 4096 + 8])
toucher.start()
toucher.join()
"""
    with Child(ATTACH + HANDLER + code, manager.socket) as child:
        page = child.hear() + 2 * PAGE
        code, address, value, in_toucher = child.hear()
        assert in_toucher
        assert (value if markers == WITHOUT else address) // PAGE * PAGE == page
        assert code == (SI_QUEUE if markers == WITHOUT else BUS_MCEERR_AR if KERNEL_POISON else BUS_ADRERR)
        assert child.wait() == 42


@pytest.mark.usefixtures("memory")
def test_a_handler_that_repairs_the_page_lets_the_access_go_on(manager: hwpoison.Manager) -> None:
    code = """
at_bus_error(lambda *_: memory.repair(2 * 4096, bytes.fromhex(arguments[1])))
say(view[2 * 4096 + 8])
"""
    with Child(ATTACH + HANDLER + code, manager.socket, content().hex()) as child:
        assert child.hear() == content()[8]
        assert child.wait() == 0


@pytest.mark.parametrize("how", ["ignored", "blocked"])
@pytest.mark.usefixtures("memory")
def test_a_process_that_does_not_want_to_know_ends(how: str, manager: hwpoison.Manager, markers: str) -> None:
    code = {
        "ignored": "signal.signal(signal.SIGBUS, signal.SIG_IGN)",
        "blocked": "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS])",
    }[how]
    with Child(ATTACH + code + TOUCH, manager.socket) as child:
        child.hear()
        child.tell()
        assert child.wait() == (-signal.SIGKILL if markers == WITHOUT else -signal.SIGBUS)
    assert kills(manager, child.pid) == ([f"SIGBUS is {how}"] if markers == WITHOUT else [])


@pytest.fixture
def deliveries(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A FIFO into which a process writes one byte for each signal that it gets, and the descriptor to read them."""
    path = tmp_path / "signals"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    yield path, reader
    os.close(reader)


RETURNS = """
signal.signal(signal.SIGBUS, lambda *_: None)
signal.set_wakeup_fd(os.open(arguments[1], os.O_WRONLY | os.O_NONBLOCK), warn_on_full_buffer=False)
"""


def test_a_handler_that_returns_is_called_again_until_the_page_is_repaired_or_it_is_enough(
    manager: hwpoison.Manager, memory: hwpoison.Memory, markers: str, deliveries: tuple[Path, int]
) -> None:
    path, reader = deliveries
    with Child(ATTACH + RETURNS + TOUCH, manager.socket, str(path)) as child:
        child.hear()
        child.tell()
        if markers == WITH:
            told = 0
            while told < 10 * TELL_LIMIT:
                select.select([reader], [], [])
                told += len(os.read(reader, 100))
            memory.repair(2 * PAGE, content())
            assert child.hear() == content()[8]
        else:
            assert child.wait() == -signal.SIGKILL
            assert len(os.read(reader, 100)) == TELL_LIMIT
            assert kills(manager, child.pid) == [f"{TELL_LIMIT} SIGBUS did not help it"]


@pytest.mark.usefixtures("memory")
def test_a_process_that_is_stopped_holds_nobody_up_and_is_told_when_it_goes_on(manager: hwpoison.Manager) -> None:
    code = """
told = []
memory.on_failure(lambda notice: notice.offset == 3 * mmap.PAGESIZE and say(["told", notice.offset]))
"""
    with Child(ATTACH + code + TOUCH, manager.socket) as child:
        child.hear()
        child.signal(signal.SIGSTOP)
        wait_until(lambda: child.state == "T", "it is stopped")
        failure = manager.inject("t", 3 * PAGE)
        assert child.pid in failure.victims
        child.signal(signal.SIGCONT)
        assert child.hear() == ["told", 3 * PAGE]
        child.tell()
        assert child.wait() == -signal.SIGBUS


def test_a_process_that_is_stopped_while_it_sleeps_in_the_access_is_told_when_it_goes_on(
    slow_file: Callable[[bytes], SlowFile], manager: hwpoison.Manager
) -> None:
    slow = slow_file(known(4 * PAGE))
    memory = manager.open(slow.path, name="t")
    slow.hold("read")
    with Child(ATTACH + TOUCH, manager.socket) as child:
        child.hear()
        child.tell()
        wait_until(lambda: slow.waiting, "the page is being read in")
        wait_until(lambda: asleep_in_a_fault(child.pid), "the process sleeps in its access")
        child.signal(signal.SIGSTOP)
        wait_until(lambda: child.state == "T", "it is stopped")
        slow.fail(read=errno.EIO)
        slow.hold()
        wait_until(lambda: memory.lost() == [("t", 2 * PAGE, PAGE)], "the page cannot be had")
        child.signal(signal.SIGCONT)
        assert child.wait() == -signal.SIGBUS


SYSTEM_CALL = """
reader, writer = os.pipe()
try:
    say(os.write(writer, view[2 * 4096 : 3 * 4096]))
except OSError as error:
    say(error.errno)
"""


@pytest.mark.usefixtures("memory")
def test_a_system_call_whose_faults_come_to_the_manager_fails_or_ends_the_process(
    manager: hwpoison.Manager, markers: str
) -> None:
    need(not manager.connection.user_mode, "userfaultfd with faults of system calls: root, or access to /dev/userfaultfd")
    with Child(ATTACH + SYSTEM_CALL, manager.socket) as child:
        if markers == WITH:
            assert child.hear() == errno.EFAULT
            assert child.wait() == 0
        else:
            assert child.wait() == -signal.SIGKILL
            assert kills(manager, child.pid) == [f"{TELL_LIMIT} SIGBUS did not help it"]


def test_a_system_call_of_an_unprivileged_process_fails_with_efault(markers: str, nobody: Callable[..., Child]) -> None:
    code = """
from hwpoison.linux.userfaultfd import Feature
manager = hwpoison.Manager(without=Feature(arguments[0]))
say(manager.connection.user_mode)
memory = manager.allocate(4 * 4096, "t")
memory.array()[:] = 1
manager.inject(memory, 2 * 4096)
view = memory.buffer
"""
    without = Feature.POISON if markers == WITHOUT else NO_FEATURE
    with nobody(code + SYSTEM_CALL + "del view\nmanager.close()\n", int(without)) as child:
        need(child.hear(), "a user without full access to userfaultfd")
        assert child.hear() == errno.EFAULT
        assert child.wait() == 0


@pytest.mark.usefixtures("memory")
def test_a_process_that_repairs_what_it_is_told_of_is_not_ended_however_often_it_is_told(manager: hwpoison.Manager) -> None:
    code = """
told = 0

def handler(*_):
    global told
    told += 1
    memory.repair(2 * 4096, bytes([told]) * 4096)

at_bus_error(handler)
for _ in range(arguments[1]):
    assert view[2 * 4096] == told
    manager.inject("t", 2 * 4096)
say(told)
os._exit(0)
"""
    with Child(ATTACH + HANDLER + code, manager.socket, 3 * TELL_LIMIT) as child:
        assert child.hear() == 3 * TELL_LIMIT
        assert child.wait() == 0
    assert kills(manager, child.pid) == []


def test_a_store_that_goes_on_after_a_discard_is_seen_as_a_change_of_the_file(
    manager: hwpoison.Manager, file: Callable[..., Path]
) -> None:
    path = file(2 * PAGE)
    memory = manager.open(path, "r+", name="t")
    code = """
at_bus_error(lambda *_: memory.discard())
memory.buffer[4096] = 1
manager.inject("t", 4096)
memory.buffer[4096 + 5] = 77
say(memory.buffer[4096])
hear()
os._exit(0)
"""
    with Child(ATTACH + HANDLER + code, manager.socket) as child:
        assert child.hear() == known(PAGE + 1)[-1], "the first change is lost and was discarded"
        with pytest.raises(OSError):
            memory.flush()
        expected = bytearray(known(2 * PAGE))
        expected[PAGE + 5] = 77
        assert path.read_bytes() == expected
        assert manager.inject("t", PAGE).state is hwpoison.State.CLEAN_FILE
        assert bytes(memory.buffer) == expected
        child.tell()
        assert child.wait() == 0
