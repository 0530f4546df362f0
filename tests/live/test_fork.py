"""After a fork every object is there again, at the same address, before any other Python code of the child runs."""

from __future__ import annotations

import signal

import pytest

import hwpoison
from tests.live.process import Child
from tests.support import SECONDS_MAX, wait_until

pytestmark = pytest.mark.live

BEGIN = """
def forked(do):
    child = os.fork()
    if child:
        return child
    try:
        do()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

PAGE = mmap.PAGESIZE
"""


def test_views_that_were_made_before_show_the_same_memory_at_the_same_address() -> None:
    code = """
manager = hwpoison.Manager()
memory = manager.allocate(64 * PAGE, "table")
array = memory.array("u4")
array[:] = numpy.arange(len(array))

def there():
    assert array.ctypes.data == memory.address
    assert array.sum() == sum(range(len(array)))
    array[5] = 77
    memory.write(PAGE, b"from the child")
    assert memory.read(0, 4) == bytes(4)
    more = manager.allocate(PAGE, "more")
    more.buffer[0] = 1

child = forked(there)
say([status(child), int(array[5]), bytes(memory.buffer[PAGE:PAGE + 14]).decode()])
"""
    with Child(BEGIN + code) as child:
        assert child.hear() == [0, 77, "from the child"]
        assert child.wait() == 0, child.errors


def test_what_is_absent_is_served_and_changes_of_a_file_are_written(tmp_path: object) -> None:
    code = """
path = arguments[0]
with open(path, "wb") as file:
    file.write(b"a" * (8 * PAGE))
manager = hwpoison.Manager()
memory = manager.open(path, "r+")
reader = manager.open(path, name="again")

def there():
    assert bytes(memory.buffer[3 * PAGE:3 * PAGE + 2]) == b"aa"
    assert bytes(reader.buffer[7 * PAGE:]) == b"a" * PAGE
    memory.buffer[PAGE] = ord("b")
    memory.flush()

say(status(forked(there)))
with open(path, "rb") as file:
    say(file.read()[PAGE:PAGE + 2].decode())
"""
    with Child(BEGIN + code, f"{tmp_path}/file") as child:
        assert child.hear() == 0
        assert child.hear() == "ba"
        assert child.wait() == 0, child.errors


def test_a_child_outlives_its_parent_with_everything() -> None:
    """As a daemon does: the parent ends at once."""
    code = """
with hwpoison.Manager() as manager:
    memory = manager.allocate(8 * PAGE, "table")
    memory.buffer[:5] = b"hello"
    pipe = os.pipe()
    if os.fork():
        os._exit(0)
    if os.fork():
        os._exit(0)
    say(bytes(memory.buffer[:5]).decode())
    say([one.name for one in manager.objects()])
    say(manager.inject(memory, 0).victims == (os.getpid(),))
    os._exit(0)
"""
    with Child(BEGIN + code) as child:
        assert child.hear() == "hello"
        assert child.hear() == ["table"]
        assert child.hear() is True


def test_a_loss_is_told_to_parent_and_child() -> None:
    code = """
manager = hwpoison.Manager()
memory = manager.allocate(8 * PAGE, "table")
memory.buffer[:] = b"x" * (8 * PAGE)
told = threading.Event()
heard = []

@memory.on_failure
def failed(notice):
    heard.append(notice.offset)
    if notice.offset == 3 * PAGE:
        told.set()

manager.inject(memory, PAGE)

def there():
    say("ready")
    assert told.wait(10)
    say(heard[-1] // PAGE)
    assert [one.offset for one in memory.lost()] == [PAGE, 3 * PAGE]

child = forked(there)
hear()
failure = manager.inject(memory, 3 * PAGE)
assert set(failure.victims) == {os.getpid(), child}
say(status(child))
assert told.wait(10)
say(heard)
"""
    with Child(BEGIN + code) as child:
        assert child.hear() == "ready"
        child.tell()
        assert sorted(map(str, (child.hear(), child.hear()))) == ["0", "3"]
        assert child.hear() == [4096, 3 * 4096]
        assert child.wait() == 0, child.errors


def test_a_guard_that_is_open_at_the_fork_tells_in_both_what_it_had_met() -> None:
    code = """
manager = hwpoison.Manager()
memory = manager.allocate(8 * PAGE, "table")
memory.buffer[:] = b"x" * (8 * PAGE)
manager.inject(memory, PAGE)

def ended(guard):
    try:
        guard.__exit__(None, None, None)
    except hwpoison.PoisonError as error:
        return [one.offset // PAGE for one in error.ranges]
    return []

def there():
    if also:
        assert safe.buffer[3 * PAGE] == 0
    say(ended(guard))
    with hwpoison.guard(memory) as healthy:
        assert healthy.buffer[0] == ord("x")

manager.inject(memory, 3 * PAGE)
for touch, also in ((False, False), (True, False), (True, True)):
    guard = hwpoison.guard(memory)
    safe = guard.__enter__()
    if touch:
        assert safe.buffer[PAGE] == 0
    assert status(forked(there)) == 0
    say(ended(guard))
"""
    with Child(BEGIN + code) as child:
        assert [child.hear() for _ in range(6)] == [[], [], [1], [1], [1, 3], [1]]
        assert child.wait() == 0, child.errors


def test_multiprocessing_workers_that_are_forked_have_arrays_of_before() -> None:
    code = """
import multiprocessing
manager = hwpoison.Manager()
table = manager.allocate(64 * PAGE).array("u8")
table[:] = 3

def add(part):
    table[part] += 1
    return int(table[part].sum())

if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(2) as pool:
        say(sum(pool.map(add, [slice(at, at + 512) for at in range(0, len(table), 512)])) == 4 * len(table))
    say(int(table.sum()) == 4 * len(table))
"""
    with Child(BEGIN + code) as child:
        assert child.hear() is True
        assert child.hear() is True
        assert child.wait() == 0, child.errors


def test_a_fork_from_a_thread_while_others_use_the_memory() -> None:
    code = """
manager = hwpoison.Manager()
memories = [manager.allocate(64 * PAGE, f"table {n}") for n in range(4)]
over = threading.Event()

def work(memory):
    while not over.is_set():
        memory.write(0, b"abc")
        with hwpoison.guard(memory) as safe:
            safe.buffer[0]
        memory.lost()

threads = [threading.Thread(target=work, args=(memory,)) for memory in memories]
for thread in threads:
    thread.start()

def there():
    for memory in memories:
        memory.write(PAGE, b"child")
        with hwpoison.guard(memory) as safe:
            assert bytes(safe.buffer[PAGE:PAGE + 5]) == b"child"
        memory.lost()

results = []
def fork_some():
    results.extend(status(forked(there)) for _ in range(20))

forkers = [threading.Thread(target=fork_some) for _ in range(2)]
for one in forkers:
    one.start()
for one in forkers:
    one.join()
over.set()
for thread in threads:
    thread.join()
say(results)
say(manager.statistics().clients)
"""
    with Child(BEGIN + code) as child:
        assert child.hear() == [0] * 40
        assert child.hear() == 1
        assert child.wait() == 0, child.errors


def test_a_fork_beside_memories_that_come_and_go_has_the_others_and_nothing_to_complain_of() -> None:
    code = """
manager = hwpoison.Manager()
table = manager.allocate(64 * PAGE, "table")
table.write(0, b"abc")
over = threading.Event()

held = {}

def memories():
    while not over.is_set():
        array = manager.allocate(PAGE).array()
        array[0] = ord("a")
        held["memory"] = array
        del array
        held.pop("memory")

def connections():
    while not over.is_set():
        other = hwpoison.connect(manager.socket)
        held["connection"] = other.attach("table").array()
        other.close()
        held.pop("connection")

threads = [threading.Thread(target=one) for one in (memories, memories, connections)]
for thread in threads:
    thread.start()

def there():
    assert table.read(0, 3) == b"abc"
    # A fork has what other threads have made, at whatever moment.
    for array in held.values():
        assert array[0] == ord("a")

def fork_again():
    there()
    assert status(forked(there)) == 0

say([status(forked(fork_again)) for _ in range(30)])
over.set()
for thread in threads:
    thread.join()
"""
    with Child(BEGIN + code) as child:
        assert child.hear() == [0] * 30
        assert child.wait() == 0
        # Python itself warns of every fork beside threads from 3.12 on.
        said = [line for line in child.errors.splitlines() if "os.fork()" not in line and "use of fork()" not in line]
        assert said == []


def test_a_fork_by_c_code_gets_sigsegv_and_never_zeros() -> None:
    code = """
import ctypes
manager = hwpoison.Manager()
memory = manager.allocate(8 * PAGE)
view = memory.buffer
view[0] = 1
with hwpoison.guard(memory) as safe:
    guarded = safe.buffer
    guarded[0]
for touched in (view, guarded):
    child = ctypes.CDLL(None).fork()
    if not child:
        # What is mapped now, or allocated, is nowhere where a view shows it.
        kept = [mmap.mmap(-1, nbytes) for nbytes in (8 * PAGE, PAGE, 1 << 21, 1 << 26) for _ in range(100)]
        kept += [numpy.zeros(nbytes) for nbytes in (1 << 10, 1 << 16, 1 << 20) for _ in range(100)]
        os._exit(touched[0])
    say(status(child))
child = ctypes.CDLL(None).fork()
if not child:
    try:
        memory.lost()
    except ConnectionError as error:
        os._exit(7 if "C code has forked" in str(error) else 8)
say(status(child))
"""
    with Child(BEGIN + code) as child:
        assert [child.hear() for _ in range(3)] == [-signal.SIGSEGV, -signal.SIGSEGV, 7]
        assert child.wait() == 0, child.errors


def test_a_fork_while_another_thread_closes_a_memory() -> None:
    """At any point of it: the child has all others, and can close them."""
    code = """
manager = hwpoison.Manager()
table = manager.allocate(PAGE, "table")
table.write(0, b"t")
over = threading.Event()
def work():
    while not over.is_set():
        manager.allocate(4 * PAGE).close()
threads = [threading.Thread(target=work) for _ in range(3)]
for one in threads:
    one.start()
failed = []
for _ in range(200):
    child = os.fork()
    if not child:
        signal.alarm(SECONDS_MAX)
        try:
            assert table.read(0, 1) == b"t"
            manager.close()
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    failed.append(status(child))
over.set()
for one in threads:
    one.join()
say([one for one in failed if one])
"""
    with Child(BEGIN + f"SECONDS_MAX = {SECONDS_MAX:.0f}\n" + code) as child:
        assert child.hear() == [], child.errors
        assert child.wait() == 0


def test_what_a_signal_handler_raises_in_a_child_at_once_is_raised_there() -> None:
    """Not in a function that Python runs at a fork, where it would be printed and lost."""
    code = """
manager = hwpoison.Manager()
memories = [manager.allocate(PAGE) for _ in range(10)]
memories[-1].write(0, b"m")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
ended = []
for number in range(30):
    child = os.fork()
    if not child:
        try:
            memories[-1].read(0, 1)
            time.sleep(SECONDS_MAX)
        except SystemExit as error:
            os._exit(error.code if memories[-1].read(0, 1) == b"m" else 8)
    os.kill(child, signal.SIGTERM)
    ended.append(status(child))
say(ended)
"""
    with Child(BEGIN + f"SECONDS_MAX = {SECONDS_MAX:.0f}\n" + code) as child:
        # A signal that comes before anything is done there ends it by itself.
        assert set(child.hear()) == {7}, child.errors
        assert child.wait() == 0


@pytest.mark.parametrize("does", ["raises", "raises, alone", "forks"])
def test_signals_at_forks_leave_all_as_it_was(does: str) -> None:
    """The mask of signals, and what the child has; and no Ctrl-C is lost but at the very beginning."""
    code = """
manager = hwpoison.Manager()
memory = manager.allocate(PAGE)
memory.write(0, b"m")
swallowed = []
sys.unraisablehook = lambda one: swallowed.append(str(one.object))
mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2]) | {signal.SIGUSR2}
def right():
    return signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask and memory.read(0, 1) == b"m"
raised, seen, wrong = 0, 0, 0
def handler(*_):
    global raised, wrong
    raised += 1
    if arguments[0] != "forks":
        raise KeyboardInterrupt
    child = os.fork()
    if not child:
        os._exit(memory.read(0, 1) != b"m")
    wrong += status(child) != 0
if arguments[0] != "raises, alone":
    # It may be sent it while this one blocks it: then the handler runs in the middle.
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
signal.signal(signal.SIGINT, handler)
signal.signal(signal.SIGALRM, handler)
def children():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return set(map(int, file.read().split()))
others = children()
# A function: what is raised as a loop begins anew is not within a `try` around that for Python 3.12 and 3.13.
def wait(before):
    while raised == before:
        pass
    # What comes again may come a moment later.
    for _ in range(1000):
        pass
for number in range(300):
    before = raised
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + number % 200))
        child = os.fork()
        if not child:
            signal.setitimer(signal.ITIMER_REAL, 0)
            os._exit(not right())
        wait(before)
    except KeyboardInterrupt:
        seen += 1
    # There is none if it was raised before the fork.
    wrong += any([status(one) != 0 for one in children() - others])
    wrong += not right()
say([wrong, raised >= 300, seen > 250 or arguments[0] != "raises, alone"])
"""
    with Child(BEGIN + code, does) as child:
        assert child.hear() == [0, True, True], child.errors
        assert child.wait() == 0


def test_a_fork_while_the_manager_dies() -> None:
    code = """
manager = hwpoison.Manager()
memory = manager.allocate(8 * PAGE, "table")
memory.buffer[0] = 9
array = memory.array()
results = []
for number in range(20):
    killer = threading.Timer(number * 0.0003, os.kill, (manager.statistics().pid, signal.SIGKILL))
    killer.start()
    results.append(status(forked(lambda: os._exit(array[0]))))
    killer.join()
say(results)
"""
    with Child(BEGIN + code) as child:
        assert child.hear() == [9] * 20
        assert child.wait() == 0, child.errors


def test_a_child_of_a_parent_that_ends_with_the_manager_has_everything() -> None:
    code = """
manager = hwpoison.Manager()
memory = manager.allocate(8 * PAGE, "table")
memory.buffer[0] = 9
pid = manager.statistics().pid
if not os.fork():
    hear()
    say(memory.buffer[0])
    say(memory.read(0, 1).hex())
    os._exit(0)
time.sleep(float(arguments[0]))
os.kill(pid, signal.SIGKILL)
os._exit(0)
"""
    for number in range(10):
        with Child(BEGIN + code, number * 0.0005) as child:
            assert child.ask() == 9
            assert child.hear() == "09"


def test_a_child_that_never_uses_it_holds_nothing_after_its_end(manager: hwpoison.Manager) -> None:
    code = """
manager = hwpoison.connect(arguments[0])
memory = manager.allocate(PAGE, "table")
memory.buffer[0] = 1
for _ in range(50):
    assert status(forked(lambda: None)) == 0
say()
hear()
"""
    with Child(BEGIN + code, manager.socket) as child:
        child.hear()
        wait_until(lambda: manager.statistics().clients == 2, "the children are gone")
        assert [one.mappings for one in manager.objects()] == [1]
        child.tell()
        assert child.wait() == 0, child.errors
    wait_until(lambda: not manager.objects(), "its object is gone")
