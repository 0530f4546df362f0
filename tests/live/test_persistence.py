"""How long memory lives: as long as it is open or has views, or until it is unlinked."""

from __future__ import annotations

import gc
import os
import select
import signal
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

import hwpoison
from hwpoison.linux.syscalls import PAGE_SIZE
from tests.live.process import Child, keeper_of
from tests.support import SECONDS_MAX, wait_until

pytestmark = pytest.mark.live

PAGE = PAGE_SIZE


def names(manager: hwpoison.Manager) -> list[str]:
    return [one.name for one in manager.objects()]


def test_a_program_that_restarts_has_its_cache_back(manager: hwpoison.Manager) -> None:
    code = """
manager = hwpoison.connect(arguments[0])
memory = manager.allocate(4 * mmap.PAGESIZE, "cache", persistent=True)
memory.write(0, (b"warm" * 1024) * (mmap.PAGESIZE // 4096) * 3)
manager.inject(memory, mmap.PAGESIZE)
"""
    with Child(code, manager.socket) as first:
        assert first.wait() == 0, first.errors
    wait_until(lambda: manager.objects()[0].pids == [], "nobody maps it")
    assert manager.objects()[0].persistent
    with manager.attach("cache") as again:
        assert again.buffer[:4] == b"warm"
        assert [one.offset for one in again.lost()] == [PAGE]
        assert next(again.notices()).offset == PAGE
    assert names(manager) == ["cache"]
    manager.unlink("cache")
    wait_until(lambda: names(manager) == [], "it is gone")
    with pytest.raises(FileNotFoundError, match="cache"):
        manager.unlink("cache")


def test_what_is_unlinked_stays_for_who_has_it_open(manager: hwpoison.Manager) -> None:
    memory = manager.allocate(PAGE, "cache", persistent=True)
    manager.unlink("cache")
    manager.unlink("cache")
    memory.write(0, b"here")
    assert memory.read(0, 4) == b"here"
    memory.close()
    wait_until(lambda: names(manager) == [], "it is gone")


def test_what_is_persistent_outlives_a_manager_too(manager: hwpoison.Manager) -> None:
    manager.allocate(4 * PAGE, "cache", persistent=True).write(0, b"warm")
    gc.collect()
    wait_until(lambda: manager.objects()[0].mappings == 0, "nobody maps it")
    for _ in range(2):
        dead = os.pidfd_open(manager.statistics().pid)
        signal.pidfd_send_signal(dead, signal.SIGKILL)
        assert select.select([dead], [], [], SECONDS_MAX)[0]
        os.close(dead)
        assert names(manager) == ["cache"]
    with manager.attach("cache") as again:
        assert again.read(0, 4) == b"warm"
    manager.unlink("cache")
    wait_until(lambda: names(manager) == [], "it is gone")


def test_a_shared_manager_ends_although_it_has_persistent_memory(tmp_path: Path) -> None:
    code = """
import subprocess
path = arguments[0]
server = subprocess.Popen([sys.executable, "-m", "hwpoison", "serve", "--socket", path], stderr=subprocess.DEVNULL)
while True:
    try:
        manager = hwpoison.connect(path)
        break
    except ConnectionError:
        time.sleep(0.01)
manager.allocate(4096, "cache", persistent=True).close()
manager.close()
server.terminate()
say(server.wait(30))
"""
    with Child(code, str(tmp_path / "socket")) as child:
        assert child.hear() == 0
        assert child.wait() == 0, child.errors


def test_persistent_memory_needs_a_name(manager: hwpoison.Manager) -> None:
    with pytest.raises(ValueError, match="name"):
        manager.allocate(PAGE, persistent=True)
    with pytest.raises(TypeError, match="persistent"):
        manager.allocate(PAGE, "cache", persistent="yes")  # type: ignore[arg-type]


def test_memory_that_nobody_refers_to_any_more_is_closed(manager: hwpoison.Manager, tmp_path: Path) -> None:
    watcher = hwpoison.connect(manager.socket, maps=False)
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * PAGE))
    memory = manager.open(path, "r+")
    memory.buffer[0] = 7
    with hwpoison.guard(memory) as safe:
        assert safe.buffer[0] == 7
    del memory, safe
    gc.collect()
    # The manager that has mapped it asks nothing meanwhile.
    wait_until(lambda: watcher.objects() == [], "it is gone")
    assert path.read_bytes()[0] == 7
    view = manager.allocate(PAGE, "viewed").array()
    gc.collect()
    assert [one.name for one in watcher.objects()] == ["viewed"]
    view[0] = 1
    assert view[0] == 1
    watcher.close()


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_connection_that_nobody_refers_to_any_more_leaves_nothing_open(manager: hwpoison.Manager) -> None:
    def descriptors() -> Counter[str]:
        gc.collect()
        found: Counter[str] = Counter()
        for one in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):
                found[os.readlink(f"/proc/self/fd/{one}")] += 1
        return found

    manager.allocate(PAGE, "cache", persistent=True).write(0, b"warm")
    before = descriptors()
    for _ in range(10):
        view = hwpoison.connect(manager.socket).attach("cache").array("u1")
        assert view[0] == ord("w")
        del view
    # What a thread of an earlier test was about to close may be gone since; nothing else may be there.
    wait_until(lambda: not descriptors() - before, "all are closed")
    manager.unlink("cache")


def test_a_collection_in_the_middle_of_a_message_changes_none(manager: hwpoison.Manager) -> None:
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    try:
        for objects_made in range(40):
            gc.disable()
            forgotten: list[object] = [manager.allocate(PAGE, f"cache {objects_made}")]
            forgotten.append(forgotten)
            del forgotten
            # It is found when so many more objects were made: somewhere in this request.
            gc.set_threshold(gc.get_count()[0] + objects_made)
            gc.enable()
            assert manager.statistics().pid == manager.pid
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
    # Some may have been looked at while they were used.
    gc.collect()
    wait_until(lambda: names(manager) == [], "nothing is left of them")


@pytest.mark.parametrize("how", ["del view", "memory.close()"])
def test_a_manager_that_was_closed_stays_until_the_last_view_is_gone_and_then_ends(how: str) -> None:
    code = """
import warnings
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    with hwpoison.Manager() as manager:
        memory = manager.allocate(64 * 4096, "table")
        view = memory.array()
say([manager.pid, [str(one.message) for one in warned if one.category is ResourceWarning]])
hear()
try:
    manager.allocate(4096)
except ConnectionError as error:
    say(str(error))
view[5 * 4096] = 9
say(int(view.sum()))
hear()
if arguments[0] == "memory.close()":
    del view
    memory.close()
else:
    del view
    del memory
say()
hear()
"""
    with Child(code, how) as child:
        pid, warned = child.hear()
        assert len(warned) == 1
        assert "table" in warned[0]
        keeper, manager = os.pidfd_open(keeper_of(pid)), os.pidfd_open(pid)
        assert "open a new one" in child.ask()
        assert child.hear() == 9
        child.ask()
        for one in (manager, keeper):
            assert select.select([one], [], [], SECONDS_MAX)[0], "it stays"
            os.close(one)
        child.tell()
        assert child.wait() == 0, child.errors


def test_a_forked_child_keeps_the_manager_of_the_views_that_it_has() -> None:
    code = """
with hwpoison.Manager() as manager:
    memory = manager.allocate(64 * 4096, "table")
    view = memory.array()
    view[:] = 1
    child = os.fork()
    if not child:
        hear()
        say(int(view.sum()) == len(view))
        view[5] = 2
        say(int(view[5]))
        os._exit(0)
    del view
    memory.close()
say(manager.pid)
os._exit(0)
"""
    with Child(code) as child:
        manager = os.pidfd_open(child.hear())
        assert child.ask() is True
        assert child.hear() == 2
        assert select.select([manager], [], [], SECONDS_MAX)[0], "it stays"
        os.close(manager)
