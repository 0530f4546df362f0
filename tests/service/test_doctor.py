"""`hwpoison doctor` as root, as an unprivileged user, where userfaultfd is forbidden, and where nothing can be asked."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import without_userfaultfd
from tests.support import SECONDS_MAX, need

LAUNCHER = [sys.executable, str(Path(without_userfaultfd.__file__))]
PREFIXES = {"root": [], "unprivileged": LAUNCHER, "forbidden": [*LAUNCHER, "--forbidden"]}
KEYS = {"group", "name", "state", "found", "gives", "how", "needed", "in_the_way"}
FEATURES = {"missing pages of shared memory", "the thread of a fault", "writes to shared memory", "poison markers"}


def run(privilege: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as that user, who is asked first whether it could run at all."""
    need(privilege != "root" or os.geteuid() == 0, "root")
    prefix = [*PREFIXES[privilege], sys.executable]
    probe = subprocess.run([*prefix, "-c", "import hwpoison"], capture_output=True, timeout=SECONDS_MAX, check=False)
    need(probe.returncode == 0, f"a checkout and an interpreter that {privilege} can use: {probe.stderr[-200:]!r}")
    command = [*prefix, "-m", "hwpoison", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_MAX, check=False)


def found(done: subprocess.CompletedProcess[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The document, and its capabilities by name."""
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert document["version"] == 1
    return document, {one["name"]: one for one in document["capabilities"]}


def states(capabilities: dict[str, dict[str, Any]], *names: str) -> dict[str, str]:
    return {name: capabilities[name]["state"] for name in names}


def has_privilege(number: int) -> bool:
    status = Path("/proc/self/status").read_text()
    return bool(int(re.search(r"CapEff:\s*(\w+)", status)[1], 16) >> number & 1)  # type: ignore[index]


def yes_or_no(condition: object) -> str:
    return "yes" if condition else "no"


@pytest.mark.live
def test_root_is_told_what_it_can_do() -> None:
    done = run("root", "--json")
    document, capabilities = found(done)
    frames = has_privilege(21)
    assert states(
        capabilities, "isolating a page", "userfaultfd", "userfaultfd(2) in user mode", "/dev/userfaultfd", "root",
        "CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "frame numbers", "/proc/kpageflags", "the kernel's memory failure",
        "hard offline", "room in quarantine",
    ) == {
        "isolating a page": "yes",
        "userfaultfd": "yes",
        "userfaultfd(2) in user mode": "yes",
        "/dev/userfaultfd": yes_or_no(os.access("/dev/userfaultfd", os.W_OK)),
        "root": "yes",
        "CAP_SYS_PTRACE": yes_or_no(has_privilege(19)),
        "CAP_SYS_ADMIN": yes_or_no(frames),
        "frame numbers": yes_or_no(frames),
        "/proc/kpageflags": yes_or_no(os.access("/proc/kpageflags", os.R_OK)),
        "the kernel's memory failure": yes_or_no(os.path.exists("/proc/sys/vm/memory_failure_early_kill")),
        "hard offline": yes_or_no(os.access("/sys/devices/system/memory/hard_offline_page", os.W_OK)),
        "room in quarantine": "yes",
    }  # fmt: skip
    assert (done.returncode, document["works"], document["verdict"]) == (0, True, "hwpoison works here.")


@pytest.mark.live
def test_an_unprivileged_user_is_told_what_is_missing_and_that_it_works_all_the_same() -> None:
    done = run("unprivileged", "--json")
    document, capabilities = found(done)
    privileged = ("root", "CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "frame numbers", "/proc/kpageflags", "hard offline")
    assert set(states(capabilities, *privileged).values()) == {"no"}
    assert states(capabilities, *FEATURES - {"poison markers"}) == dict.fromkeys(FEATURES - {"poison markers"}, "yes")
    assert (done.returncode, document["works"], capabilities["isolating a page"]["state"]) == (0, True, "yes")
    # Full fault handling is for this user only where somebody has allowed it to all.
    allowed = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1"
    full = allowed or os.stat("/dev/userfaultfd").st_mode & 0o006 == 0o006
    assert capabilities["vm.unprivileged_userfaultfd"]["in_the_way"] == (not full)
    assert ("user mode" in document["verdict"]) == (not full)


def test_where_a_filter_forbids_userfaultfd_it_is_named_and_the_exit_status_is_1() -> None:
    done = run("forbidden", "--json")
    document, capabilities = found(done)
    ways = ("isolating a page", "userfaultfd", "/dev/userfaultfd", "userfaultfd(2)", "userfaultfd(2) in user mode")
    assert states(capabilities, *ways) == dict.fromkeys(ways, "no")
    # What could not be asked is not a no.
    assert states(capabilities, *FEATURES, "single pages in shared memory") == dict.fromkeys(
        (*FEATURES, "single pages in shared memory"), "unknown"
    )
    assert (capabilities["seccomp"]["state"], capabilities["seccomp"]["in_the_way"]) == ("yes", True)
    assert not capabilities["vm.unprivileged_userfaultfd"]["in_the_way"]
    assert (done.returncode, document["works"]) == (1, False)
    assert document["verdict"].startswith("hwpoison does not work here: no userfaultfd. In the way: ")
    assert "seccomp (a filter)" in document["verdict"]


NOTHING_LEFT = """
import dataclasses, json, os, resource
from hwpoison.linux.capabilities import probe, works
held = []
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    while True:
        held.append(os.dup(0))
except OSError:
    pass
found = probe()
for fd in held:
    os.close(fd)
print(json.dumps({"works": works(found), "no": [one.name for one in found if one.state == "no"], "all": len(found)}))
"""


def test_what_cannot_be_asked_is_unknown_and_never_no() -> None:
    """A process that may open nothing more finds nothing out, but for what it knows without."""
    command = [sys.executable, "-c", NOTHING_LEFT]
    null = subprocess.DEVNULL
    done = subprocess.run(command, stdin=null, capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["all"] > 20
    assert (set(seen["no"]) - {"root"}, seen["works"]) == (set(), False)


@pytest.mark.parametrize("privilege", ["root", "forbidden"])
def test_each_capability_says_what_it_gives_and_how_to_get_it(privilege: str) -> None:
    document, capabilities = found(run(privilege, "--json"))
    assert len(capabilities) == len(document["capabilities"])
    assert all(set(one) == KEYS for one in capabilities.values())
    assert {one["state"] for one in capabilities.values()} <= {"yes", "no", "unknown"}
    assert all(one["found"] and one["gives"] and one["how"] for one in capabilities.values())
    table = run(privilege, "--verbose").stdout
    assert "0x" not in table, "no number that only programs understand"
    for name, one in capabilities.items():
        assert len(re.findall(rf"^ \S {re.escape(name)}  +\S", table, re.MULTILINE)) == 1, name
        assert one["gives"][:30] in table
        if one["state"] == "no" and one["group"] != "surroundings":
            assert one["how"][:30] in table
    assert table.startswith(document["verdict"][:40])


def test_of_what_is_fine_there_is_one_line_and_of_what_is_missing_what_it_would_give() -> None:
    _, capabilities = found(run("unprivileged", "--json"))
    table = run("unprivileged").stdout
    assert states(capabilities, "root", "architecture") == {"root": "no", "architecture": "yes"}
    assert re.search(r"^ – root +user 65534\n +gives: what asks for root below; hwpoison works without it$", table, re.M)
    for one in capabilities.values():
        if one["group"] != "surroundings":
            assert (f"gives: {one['gives'][:25]}" in table) == (one["state"] != "yes"), one["name"]


def test_colours_are_for_terminals_without_no_color() -> None:
    def shown_in_a_terminal(environment: dict[str, str]) -> str:
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "hwpoison", "doctor"]
        with subprocess.Popen(command, stdin=theirs, stdout=theirs, env=os.environ | environment):
            os.close(theirs)
            text = b""
            try:
                while more := os.read(ours, 1 << 16):
                    text += more
            except OSError:
                pass  # EIO: the last process has closed the terminal
            os.close(ours)
        return text.decode()

    green = "\x1b[32m"
    assert green in shown_in_a_terminal({"TERM": "xterm-256color", "NO_COLOR": ""})
    assert green not in shown_in_a_terminal({"TERM": "xterm-256color", "NO_COLOR": "1"})
