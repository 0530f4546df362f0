"""Where memory can't be managed: `required=False` gives the same interface over plain shared memory, and says so once."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import hwpoison
from hwpoison.plain import manager as plain
from hwpoison.plain import memory, notices
from tests import without_userfaultfd

pytestmark = pytest.mark.live

PROGRAM = """
import asyncio, errno, multiprocessing, os, pathlib, select, sys, threading, warnings
import numpy
import hwpoison

KINDS = ("BaseManager", "Manager", "SharedManager", "Memory", "NoticeStream", "Handle")

def add(memory):
    assert isinstance(memory, hwpoison.Memory)
    memory.array("u1")[0] += 1

async def all_of(stream):
    return [one async for one in stream]

def listens(memory, close):
    # It waits as long as something could come, and ends with what it is of.
    streams = [memory.notices() for _ in range(3)]
    ready = [select.select(streams, [], [], 0)[0]]
    found = []
    waiting = [threading.Thread(target=lambda: found.extend(streams[0])),
               threading.Thread(target=lambda: found.extend(asyncio.run(all_of(streams[1]))))]
    for one in waiting:
        one.start()
    ready.append(select.select(streams, [], [], 0)[0])
    close()
    for one in waiting:
        one.join()
    return found, [len(one) for one in [*ready, select.select(streams, [], [])[0]]], list(streams[2])

if __name__ == "__main__":
    warnings.simplefilter("always")
    with warnings.catch_warnings(record=True) as warned:
        managers = [hwpoison.Manager(required=False) for _ in range(3)]
    print(len(warned), warned[0].category.__name__, "nothing of it is recovered" in str(warned[0].message))
    manager = managers[0]
    print(manager.capabilities.recovery, bool(manager.capabilities.reason))
    path = pathlib.Path(sys.argv[1])
    path.write_bytes(bytes(range(256)) * 4096)
    with manager, managers[1], managers[2]:
        weights = manager.open(path, offset=100)
        table = manager.allocate(1 << 20, name="t")
        array = table.array("f8", (128, 1024))
        array[:] = 1.0
        memory, *where = hwpoison.locate(array[1:, :1])
        print(memory is table, where, hwpoison.lost(array).tolist())
        with hwpoison.guard(table) as safe:
            print(float(safe.array("f8", (128, 1024)).sum()), weights.read(0, 4), bytes(weights.buffer[:2]))
        try:
            with hwpoison.guard(table):
                try:
                    table.close()
                except BufferError as error:
                    print(error)
                raise OSError(errno.EFAULT, "of something else")
        except OSError as error:
            print(error)
        with table.resident(0, 8, write=True) as view:
            view[:] = bytes(8)
        table.write(8, b"written")
        print(table.read(8, 7), table.lost(), table.repair(0, bytes(4096)), table.discard())
        table.on_failure(print)
        short = managers[1].allocate(1)
        print(listens(short, short.close), listens(managers[2], managers[2].close))
        with table.notices() as stream:
            print(stream.fileno() >= 0)
        print(list(stream))
        for method in ("spawn", "fork") if hasattr(os, "fork") else ("spawn",):
            process = multiprocessing.get_context(method).Process(target=add, args=(table,))
            process.start()
            process.join()
            print(method, process.exitcode, table.read(0, 1))
        with hwpoison.connect(manager.socket) as other:
            other.attach("t").write(0, b"seen")
            print(table.read(0, 4), other.attach(str(path)).read(0, 2), other.open(path, offset=100).name == str(path))
            print(sorted((one.kind, one.mode, len(one.pids)) for one in other.objects()), other.statistics().objects)
        for one in (manager, table, table.notices(), table.on_failure(print)):
            print([kind for kind in KINDS if isinstance(one, getattr(hwpoison, kind))], end=" ")
        print(repr(manager)[:19], repr(table)[:29])
        hwpoison.set_policy("early")
        print(table.policy, end=" ")
        table.policy = "late"
        print(table.policy, end=" ")
        table.policy = None
        hwpoison.set_policy(None)
        print(table.policy)
        for wrong in (lambda: manager.attach("u"), lambda: manager.allocate(1, "t"), lambda: table.read(0, 1 << 30),
                      lambda: weights.write(0, b"x"), lambda: manager.inject(table, 0), lambda: manager.open(path),
                      lambda: table.repair(1, b"x"), lambda: weights.repair(0, bytes(1 << 16))):
            try:
                wrong()
            except Exception as error:
                print(type(error).__name__)
        changed = manager.open(path, "r+", name="changed")
        changed.write(0, b"changed")
        changed.close()
        print(path.read_bytes()[:7], {"t", str(path)} <= {one.name for one in manager.objects()})
        del array, safe
    print(os.path.exists(manager.socket.removeprefix("plain:")))
"""
PRINTED = [
    "1 RuntimeWarning True",
    "False True",
    "True [8192, 1032200] []",
    "131072.0 b'defg' b'de'",
    "'t' is being guarded; end that before close()",
    "[Errno 14] of something else",
    "b'written' [] 0 0",
    "([], [0, 0, 3], []) ([], [0, 0, 3], [])",
    "True",
    "[]",
    "spawn 0 b'\\x01'",
    "fork 0 b'\\x02'",
    "b'seen' b'de' True",
    "[('anonymous', 'r+', 1), ('file', 'r', 1)] 2",
    "['BaseManager', 'Manager'] ['Memory'] ['NoticeStream'] ['Handle'] <hwpoison.Manager a <hwpoison.Memory 't' anonymou",
    "early late late",
    "FileNotFoundError",
    "FileExistsError",
    "ValueError",
    "PermissionError",
    "UnsupportedError",
    "FileExistsError",
    "ValueError",
    "PermissionError",
    "b'changed' True",
    "False",
]


def test_a_program_runs_where_there_is_no_userfaultfd() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        program = Path(folder, "program.py")
        program.write_text(PROGRAM)
        command = [sys.executable, without_userfaultfd.__file__, "--forbidden", sys.executable, str(program)]
        done = subprocess.run(
            [*command, f"{folder}/data.bin"], capture_output=True, text=True, timeout=60, check=False, cwd="/"
        )
    assert (done.returncode, done.stdout.splitlines()) == (0, PRINTED), done.stderr


LIFETIMES = """
import gc, os, pathlib, pickle, subprocess, sys, threading, warnings
import numpy
import hwpoison

warnings.simplefilter("error")
for wrong in ({"memory_limt": 1}, {"policy": "xx"}, {"io_limit": 0}, {"memory_limit": 1}, {"required": 1}):
    try:
        hwpoison.Manager(**{"required": False, **wrong})
    except (TypeError, ValueError) as error:
        print(type(error).__name__)
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    manager = hwpoison.Manager(required=False)  # Here.
print(os.path.basename(warned[0].filename), "Here." in pathlib.Path(__file__).read_text().splitlines()[warned[0].lineno - 1])

def names(folder=manager.socket.removeprefix("plain:")):
    return sorted(pathlib.Path(one).suffix for one in os.listdir(folder) if one != "manager")

def attach(name):
    try:
        return hwpoison.connect(manager.socket).attach(name)
    except FileNotFoundError as error:
        print(error)

manager.allocate(8, "closed").close()
attach("closed")
forgotten = manager.allocate(8, "forgotten")
array = forgotten.array()
forgotten = None
gc.collect()
print(names())
array = None
print(names())
first, other = manager.allocate(8, "two"), attach("two")
first.write(0, b"abc")
first.close()
print(attach("two").read(0, 3))
other.close()
gc.collect()
print(names())
manager.allocate(8, "stays", persistent=True).close()
print(attach("stays").nbytes)
manager.unlink("stays")
for call in (manager.unlink, attach):
    try:
        call("stays")
    except FileNotFoundError as error:
        print(error)
numpy.save(sys.argv[1], numpy.arange(5.0))
loaded = hwpoison.load(sys.argv[1], manager=manager)
print(loaded.sum(), hwpoison.locate(loaded).nbytes)
os.environ["HWPOISON_SOCKET"] = manager.socket
print(hwpoison.load(sys.argv[1]).sum(), hwpoison.load(sys.argv[1]).sum())
for wrong in ((1 << 62, "much"), (1 << 70, "more"), (8, "x\\ud800")):
    for _ in range(2):
        try:
            manager.allocate(*wrong, persistent=True)
        except Exception as error:
            print(type(error).__name__)
sent = manager.allocate(8, "sent")
pickled = pickle.dumps(sent)
sent.close()
manager.allocate(4, "sent").close()
kept = manager.allocate(16, "sent")
try:
    pickle.loads(pickled)
except FileNotFoundError as error:
    print(error)
kept.close()
child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", '''
import os, sys, hwpoison

kept = hwpoison.connect(os.environ["HWPOISON_SOCKET"]).allocate(8, "killed")
print(flush=True)
sys.stdin.readline()
'''], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
try:
    manager.allocate(8, "killed")
except FileExistsError as error:
    print(error)
child.kill()
child.communicate()
attach("killed")
manager.allocate(8, "killed").close()
threads = [threading.Thread(target=lambda: [manager.allocate(8).close() for _ in range(100)]) for _ in range(4)]
for one in threads:
    one.start()
for one in threads:
    one.join()
loaded = None
kept = manager.allocate(8, "kept").array()
try:
    manager.close()
except ResourceWarning as warning:
    print(warning)
try:
    manager.allocate(8)
except ConnectionError as error:
    print(error)
child = os.fork()
if not child:
    for name in (None, "x"):
        try:
            hwpoison.connect(manager.socket).allocate(8, name)
        except ConnectionError as error:
            print(str(error)[:33], flush=True)
    os._exit(0)
os.waitpid(child, 0)
if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        last = hwpoison.Manager(required=False)
    last.allocate(8, "last")
    child = os.fork()
    if not child:
        os.rename(last.socket.removeprefix("plain:"), last.socket.removeprefix("plain:") + "-")
        for name in (None, "x"):
            try:
                last.allocate(8, name)
            except ConnectionError as error:
                print(str(error)[:33], flush=True)
        os.rename(last.socket.removeprefix("plain:") + "-", last.socket.removeprefix("plain:"))
        os._exit(0)
    os.waitpid(child, 0)
    if os.fork() == 0:
        sys.exit()
    os.wait()
    print(os.path.isdir(last.socket.removeprefix("plain:")))
    print(last.socket.removeprefix("plain:"))
"""
LIVED = [
    "TypeError",
    "ValueError",
    "ValueError",
    "ValueError",
    "TypeError",
    "program.py True",
    "[Errno 2] there is no object 'closed'",
    "['.entry', '.memory']",
    "[]",
    "b'abc'",
    "[]",
    "8",
    "[Errno 2] there is no object 'stays'",
    "[Errno 2] there is no object 'stays'",
    "10.0 40",
    "10.0 10.0",
    "MemoryError",
    "MemoryError",
    "MemoryError",
    "MemoryError",
    "ValueError",
    "ValueError",
    "[Errno 2] memory 'sent' is no more",
    "[Errno 17] the name 'killed' is taken by another object; pass another name=, or attach('killed')",
    "[Errno 2] there is no object 'killed'",
    "still in use, kept by their views: kept",
    "the manager was closed; open a new one with Manager() or connect()",
    *["the manager whose folder was /dev"] * 4,
    "True",
]


def test_what_nobody_has_any_more_is_gone_and_what_is_wrong_is_refused() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        program = Path(folder, "program.py")
        program.write_text(LIFETIMES)
        command = [sys.executable, without_userfaultfd.__file__, "--forbidden", sys.executable, str(program)]
        done = subprocess.run(
            [*command, f"{folder}/data.npy"], capture_output=True, text=True, timeout=60, check=False, cwd="/"
        )
    *printed, left = done.stdout.splitlines()
    assert (done.returncode, printed) == (0, LIVED), done.stderr
    assert not Path(left).exists()


def test_it_is_the_real_one_where_that_can_be_had() -> None:
    with hwpoison.Manager(required=False) as manager:
        assert isinstance(manager, hwpoison.Manager)
        assert manager.capabilities.recovery
        assert manager.capabilities.reason == ""


OTHER_SYSTEM = """
import sys
class NotHere:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource", "termios", "pwd", "grp") or name.startswith(("hwpoison.linux", "hwpoison.app")):
            raise ImportError(f"{name} is not on this system")
sys.meta_path.insert(0, NotHere())
import hwpoison
sys.modules.pop("fcntl", None)
for name in hwpoison.__all__:
    getattr(hwpoison, name)
try:
    hwpoison.Manager()
except hwpoison.UnsupportedError as error:
    print(error)
"""


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_everything_can_be_imported_on_other_systems(system: str, tmp_path: Path) -> None:
    """As far as that can be seen on this one: without what they have not."""
    # What is not ours knows what system it is on.
    start = f"import shutil, socket, sys, tempfile\nlinux, sys.platform = sys.platform, {system!r}\n"
    done = subprocess.run([sys.executable, "-c", start + OTHER_SYSTEM], capture_output=True, text=True, check=False)
    said = f"memory is managed on Linux only, and this is {system}; "
    said += "with Manager(required=False) programs run without recovery\n"
    assert (done.returncode, done.stdout) == (0, said), done.stderr
    program = tmp_path / "program.py"
    program.write_text(start + OTHER_SYSTEM.replace("hwpoison.Manager()", "sys.platform = linux") + PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "data.bin")], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.splitlines()) == (0, PRINTED), done.stderr


@pytest.mark.parametrize(
    ("one", "other"),
    [(hwpoison.Manager, plain.Manager), (hwpoison.Memory, memory.Memory), (hwpoison.NoticeStream, notices.NoticeStream)],
)
def test_the_interface_is_the_same(one: type, other: type) -> None:
    begun = [vars(kind)["__init__"] for kind in other.__mro__[:-1] if "__init__" in vars(kind)]
    attributes = {name for function in begun for name in function.__code__.co_names}
    for name in dir(one):
        if name.startswith("_"):
            continue
        assert hasattr(other, name) or name in attributes, name
        found = getattr(one, name)
        if inspect.isfunction(found) and name != "report":
            parameters = inspect.signature(getattr(other, name)).parameters
            assert list(parameters) == list(inspect.signature(found).parameters), name
