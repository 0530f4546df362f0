"""Programs in C that share a manager's memory, without Python in them: built from what is installed with the package."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import hwpoison
from tests.live.process import Child, kill, kill_service, manager_of, serving, state_of
from tests.support import SECONDS_MAX, need, wait_until

pytestmark = pytest.mark.live

PAGE = os.sysconf("SC_PAGE_SIZE")
SOURCES = Path(hwpoison.__path__[0], "c")
PLACE = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A program from a file, and the client."""
    compiler = shutil.which("cc")
    need(compiler, "a C compiler")
    folder = tmp_path_factory.mktemp("c")
    built: dict[Path, Path] = {}

    def make(source: Path) -> Path:
        if source not in built:
            built[source] = folder / source.stem
            command = [str(compiler), "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}"]
            command += ["-o", str(built[source]), str(source), str(SOURCES / "hwpoison.c"), "-lpthread"]
            subprocess.run(command, check=True)
        return built[source]

    return make


@contextmanager
def running(program: Path, *arguments: str, socket: str, preload: str = "") -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "HWPOISON_SOCKET": socket, "LD_PRELOAD": preload}
    with subprocess.Popen(
        [program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def lines(process: subprocess.Popen[str], count: int = 1) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().rstrip() for _ in range(count)]


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("on\n")
    process.stdin.flush()


@pytest.fixture
def client(build: Callable[[Path], Path]) -> Path:
    return build(PLACE / "examples" / "client.c")


@pytest.fixture
def driver(build: Callable[[Path], Path]) -> Path:
    return build(Path(__file__).with_name("client_driver.c"))


@pytest.mark.parametrize("dies", [False, True])
def test_the_example_hears_of_a_loss_and_repairs_it(client: Path, manager: hwpoison.Manager, dies: bool) -> None:
    table = manager.allocate(64 * PAGE, "table")
    with running(client, "table", socket=manager.socket) as process:
        (first,) = lines(process)
        assert first == f"sum {sum(table.array('u8').tolist())}"
        for page in (3, 40):
            if dies:
                kill(manager)
            manager.inject("table", page * PAGE + 5)
            assert lines(process, 4) == [
                f"lost {PAGE} bytes at {page * PAGE} of table, anonymous page",
                f"a sum met {PAGE} lost bytes at {page * PAGE}",
                f"repaired {PAGE} bytes",
                first,
            ]
        assert table.lost() == []
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(SECONDS_MAX) == 0
    assert table.array("u8").sum() == int(first.split()[1])


def test_losses_that_stand_are_told_first(client: Path, manager: hwpoison.Manager) -> None:
    table = manager.allocate(64 * PAGE, "table", populate=True)
    with running(client, "table", socket=manager.socket) as process:
        lines(process)
        # It is stopped, so that there are two by the time that it looks.
        process.send_signal(signal.SIGSTOP)
        manager.inject("table", 0)
        manager.inject("table", 9 * PAGE)
        process.send_signal(signal.SIGCONT)
        assert lines(process)[0].startswith(f"lost {PAGE} bytes at 0 of table")
    del table


def test_without_a_manager_it_says_so_in_one_line(client: Path) -> None:
    for socket, said in (
        ("", "client: no manager: no manager is named: pass its socket, or set HWPOISON_SOCKET\n"),
        ("/nowhere", "client: no manager: no manager answers at /nowhere: No such file or directory\n"),
    ):
        done = subprocess.run(
            [client], env={**os.environ, "HWPOISON_SOCKET": socket}, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (1, said)


@pytest.mark.parametrize("what", ["memory", "descriptors"])
def test_memory_is_mapped_shared_and_refused(driver: Path, manager: hwpoison.Manager, what: str) -> None:
    table = manager.allocate(64 * PAGE, "table")
    with running(driver, what, socket=manager.socket) as process:
        assert lines(process) == ["done"]
        assert process.wait(SECONDS_MAX) == 0
    assert manager.statistics().objects == 1
    del table


def test_guards_tell_what_was_met_and_an_access_to_what_is_lost_is_a_sigbus(driver: Path, manager: hwpoison.Manager) -> None:
    table = manager.allocate(64 * PAGE, "table")
    table.write(0, b"\7" * 64 * PAGE)
    with running(driver, "losses", socket=manager.socket) as process:
        for _ in range(3):
            assert lines(process) == ["strike"]
            manager.inject("table", 3 * PAGE)
            tell(process)
        assert lines(process) == ["touch"]
        assert process.wait(SECONDS_MAX) == -signal.SIGBUS


@pytest.mark.parametrize("dies", [False, True])
def test_guards_in_several_threads_while_pages_fail(driver: Path, manager: hwpoison.Manager, dies: bool) -> None:
    table = manager.allocate(64 * PAGE, "table")
    with running(driver, "threads", socket=manager.socket) as process:
        assert lines(process) == ["begin"]
        for number in range(150):
            manager.inject("table", number * 7 % 64 * PAGE)
            if dies and number % 50 == 25:
                kill(manager)
        assert lines(process) == ["done"]
        assert process.wait(SECONDS_MAX) == 0
    del table


def test_a_forked_child_has_none_of_it_and_may_connect_anew(driver: Path, manager: hwpoison.Manager) -> None:
    table = manager.allocate(64 * PAGE, "table")
    with running(driver, "forks", socket=manager.socket) as process:
        assert lines(process) == ["done"]
        assert process.wait(SECONDS_MAX) == 0
    del table


@pytest.mark.parametrize("what", ["connects", "forks beside"])
def test_whoever_connects_while_managers_die_finds_one(driver: Path, manager: hwpoison.Manager, what: str) -> None:
    table = manager.allocate(64 * PAGE, "table")
    with running(driver, what, socket=manager.socket) as process:
        assert lines(process) == ["begin"]
        for _ in range(100):
            kill(manager)
            # The next one has taken over.
            manager.inject(table, 9 * PAGE)
        tell(process)
        assert lines(process) == ["done"]
        assert process.wait(SECONDS_MAX) == 0
    wait_until(lambda: manager.statistics().clients == 1, "nobody else is there")


def test_who_sleeps_is_ended_when_nobody_is_left(driver: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    code = 'with hwpoison.connect(arguments[0]) as manager:\n    manager.allocate(64 << 16, "table", persistent=True)\n'
    with serving(path) as server:
        with Child(code, str(path)) as child:
            assert child.wait() == 0, child.errors
        with running(driver, "sleeps", socket=str(path)) as process:
            assert lines(process) == ["ready"]
            # Nobody answers its access; and then nobody is left who could.
            os.kill(manager_of(server.pid), signal.SIGSTOP)
            tell(process)
            wait_until(lambda: state_of(process.pid) != "R", "it sleeps")
            kill_service(server.pid)
            assert process.wait(SECONDS_MAX) == -signal.SIGKILL


def test_who_closes_the_last_memory_of_a_manager_that_ends_is_not_ended_with_it(driver: Path, tmp_path: Path) -> None:
    """Also if it is not scheduled just between what it says and what it does."""
    path, slow = tmp_path / "socket", tmp_path / "slow.so"
    source = Path(__file__).with_name("slow_fcntl.c")
    subprocess.run(["cc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(slow), str(source), "-ldl"], check=True)
    code = 'with hwpoison.connect(arguments[0]) as manager:\n    manager.allocate(1 << 16, "table", persistent=True)\n'
    with serving(path) as server:
        with Child(code, str(path)) as child:
            assert child.wait() == 0, child.errors
        with running(driver, "closes", socket=str(path), preload=str(slow)) as process:
            assert lines(process) == ["ready"]
            server.send_signal(signal.SIGTERM)
            wait_until(lambda: not path.exists(), "nobody new is let in")
            tell(process)
            assert lines(process) == ["closed"]
            assert process.wait(SECONDS_MAX) == 0
        assert server.wait(SECONDS_MAX) == 0


def test_a_loss_of_what_has_the_longest_name_is_told(client: Path, manager: hwpoison.Manager) -> None:
    name = "€" * 4096
    table = manager.allocate(64 * PAGE, name)
    with running(client, name, socket=manager.socket) as process:
        lines(process)
        manager.inject(table, 3 * PAGE)
        # Of the name there is as much as there is room for.
        assert lines(process) == [f"lost {PAGE} bytes at {3 * PAGE} of {name[:85]}, anonymous page"]
    del table
