"""What of this machine's surroundings may keep hwpoison from working, and whether it does: containers, filters, policies."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress

from hwpoison.linux.probing import Answer, Capability, Tried, read, setting, status
from hwpoison.linux.userfaultfd import DEVICE

SECCOMP_MODES = ("none", "strict", "a filter")
CONTAINER_FILES = ("/run/.containerenv", "/.dockerenv", "/run/systemd/container")
CONTAINER_GROUPS = ("docker", "kubepods", "containerd", "libpod", "lxc", "machine.slice")


def surroundings(ways: Sequence[Tried], calls: Sequence[Tried]) -> Iterator[Capability]:
    """`ways` to a userfaultfd, the last of which the kernel allows to everybody; `calls` that it allows to everybody."""
    filtered, filter_found = _seccomp()
    # Who refuses what the kernel allows to everybody is somebody else. A filter may also act as an older kernel.
    refusals = (errno.EPERM, errno.EACCES, errno.ENOSYS if filtered is Answer.YES else 0)
    full = any(one.state is Answer.YES for one in ways[:-1])
    refused = any(one.error in refusals for one in (*calls, *(() if full else ways[-1:])) if one.error)
    state, found = _container()
    yield Capability(
        group="surroundings",
        name="container",
        state=state,
        found=found,
        gives="container runtimes forbid userfaultfd(2) by a seccomp filter, and give no devices",
        how=f"run it with --device {DEVICE}, or --security-opt seccomp=PROFILE that allows userfaultfd "
        "(Kubernetes: securityContext.seccompProfile)",
        in_the_way=state is Answer.YES and refused,
    )
    yield Capability(
        group="surroundings",
        name="seccomp",
        state=filtered,
        found=filter_found,
        gives="a filter may forbid userfaultfd(2), memfd_create(2) or pidfd_open(2)",
        how="use a profile that allows them; in a systemd unit: SystemCallFilter=userfaultfd",
        in_the_way=filtered is Answer.YES and refused,
    )
    state, found = _selinux()
    yield Capability(
        group="surroundings",
        name="SELinux",
        state=state,
        found=found,
        gives="a policy may forbid this process to make a userfaultfd",
        how="as root: `ausearch -m avc -ts recent | audit2allow` names the rule that is missing (class anon_inode)",
        in_the_way=state is Answer.YES and refused,
    )
    state, found = setting("/proc/sys/vm/unprivileged_userfaultfd")
    if state is Answer.YES:
        state, found = (Answer.NO if found == "0" else Answer.YES), f"it is {found}"
    yield Capability(
        group="surroundings",
        name="vm.unprivileged_userfaultfd",
        state=state,
        found=found,
        gives="at 1, every user has full fault handling; at 0, root and those who may open the device",
        how="as root: sysctl vm.unprivileged_userfaultfd=1",
        in_the_way=state is Answer.NO and not full and not refused,
    )


def _container() -> tuple[Answer, str]:
    for path in CONTAINER_FILES:
        if os.path.exists(path):
            return Answer.YES, f"{path} is there"
    try:
        groups = read("/proc/self/cgroup")
    except OSError as error:
        return Answer.UNKNOWN, f"/proc/self/cgroup: {error.strerror}"
    for word in CONTAINER_GROUPS:
        if word in groups:
            return Answer.YES, f"the control group is of {word}"
    with suppress(OSError):
        if "container=" in read("/proc/1/environ"):
            return Answer.YES, "the first process says so"
    return Answer.NO, "no sign of one"


def _seccomp() -> tuple[Answer, str]:
    try:
        mode = int(status("Seccomp"))
    except (OSError, ValueError) as error:
        return Answer.UNKNOWN, str(error)
    return (Answer.YES if mode else Answer.NO), SECCOMP_MODES[mode] if mode < len(SECCOMP_MODES) else f"mode {mode}"


def _selinux() -> tuple[Answer, str]:
    state, found = setting("/sys/fs/selinux/enforce")
    if state is Answer.YES:
        return (Answer.YES, "enforcing") if found == "1" else (Answer.NO, "permissive")
    try:
        built_in = "selinuxfs" in read("/proc/filesystems")
    except OSError as error:
        return Answer.UNKNOWN, f"/proc/filesystems: {error.strerror}"
    return (Answer.UNKNOWN, "the kernel has it, and does not show its state here") if built_in else (Answer.NO, "none")
