"""What this machine can do for hwpoison: found out by trying, never by a version number.

Each answer is yes, no or unknown: what could not be asked is not a no. Nothing here changes the machine. A capability is
added here together with the code that uses it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hwpoison.linux import syscalls, userfaultfd
from hwpoison.linux.frames import HARD_OFFLINE, PageMap
from hwpoison.linux.machine import LinuxMachine
from hwpoison.linux.probing import (
    CAP_SYS_ADMIN,
    CAP_SYS_PTRACE,
    CAP_SYS_RESOURCE,
    Answer,
    Capability,
    Tried,
    has_privilege,
    setting,
    tried,
)
from hwpoison.linux.quarantine import PIPE_FRAMES
from hwpoison.linux.store import LinuxStore
from hwpoison.linux.surroundings import surroundings
from hwpoison.linux.syscalls import PAGE_SIZE
from hwpoison.linux.userfaultfd import Feature

NOT_ASKED = "could not be asked: there is no userfaultfd"
EARLY_KILL = "/proc/sys/vm/memory_failure_early_kill"
SHMEM_ENABLED = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"


def probe() -> list[Capability]:
    """Everything, in the order in which a reader wants to know it. Never raises for what it finds."""
    ways = {
        "device": tried(lambda: os.close(userfaultfd.open_by_device())),
        "call": tried(lambda: os.close(syscalls.userfaultfd(userfaultfd.OPEN_FLAGS))),
        "user": tried(lambda: os.close(syscalls.userfaultfd(userfaultfd.OPEN_FLAGS | userfaultfd.USER_MODE_ONLY))),
    }
    calls = {
        "memfd_create(2)": tried(lambda: os.close(os.memfd_create("doctor"))),
        "pidfd_open(2)": tried(lambda: os.close(os.pidfd_open(os.getpid()))),
    }
    return [
        _isolation(),
        *_userfaultfd(ways),
        *_features(),
        *_calls(calls),
        *_privilege(),
        *_frames(),
        *_kernel_poison(),
        *_huge_pages(),
        *_resources(),
        *surroundings(list(ways.values()), list(calls.values())),
    ]


def works(capabilities: Sequence[Capability]) -> bool:
    """True if nothing that hwpoison needs is missing."""
    return all(one.state is Answer.YES for one in capabilities if one.needed)


# --- the main thing ----------------------------------------------------------------------------------------------------


def _isolation() -> Capability:
    """One page, taken out and replaced as for a failure. All of hwpoison stands on this."""
    try:
        attempt = tried(_isolate_one, "one was published, taken out, held, and replaced")
    except AssertionError as error:
        attempt = Tried(Answer.NO, str(error))
    return Capability(
        group="hwpoison",
        name="isolating a page",
        state=attempt.state,
        found=attempt.found.partition("; see ")[0],
        gives="a bad page is taken from all processes at once, held, and replaced",
        how="whatever below is needed and missing has to be had",
        needed=True,
    )


def _isolate_one() -> None:
    """Raises OSError, or AssertionError if a step does not do what it must."""
    with _object() as store:
        content = os.urandom(PAGE_SIZE)
        for _ in range(2):
            store.publish(0, content)
            assert store.content(0, 1) == content, "a page that was published has another content"
            frame = store.take(0)
            assert frame is not None, "a page that was published is not there"
            frame.quarantine()
            assert store.take(0) is None, "a page that was taken out is still there"


@contextmanager
def _object() -> Iterator[LinuxStore]:
    """The memory of an object in which a huge page would have room."""
    machine = LinuxMachine()
    try:
        store = machine.create("doctor", 2 * machine.large_frame_bytes)
        try:
            yield store
        finally:
            store.close()
    finally:
        machine.close()


def _userfaultfd(ways: dict[str, Tried]) -> Iterator[Capability]:
    states = [one.state for one in ways.values()]
    words = {"device": "by the device", "call": "by the system call", "user": "by the system call, in user mode only"}
    best = next((name for name, one in ways.items() if one.state is Answer.YES), None)
    state = Answer.YES if best else Answer.UNKNOWN if Answer.UNKNOWN in states else Answer.NO
    yield Capability(
        group="userfaultfd",
        name="userfaultfd",
        state=state,
        found=words[best] if best else ways["user"].found,
        gives="the manager is asked when a process touches a page that is not there",
        how="a kernel with CONFIG_USERFAULTFD, and one of the three ways below; in a container or under SELinux see the end",
        needed=True,
    )
    yield Capability(
        group="userfaultfd",
        name=userfaultfd.DEVICE,
        state=ways["device"].state,
        found=ways["device"].found,
        gives="every user who may open it has full fault handling: read(2) and other calls work on pages that are not there",
        how=f"as root: chmod o+rw {userfaultfd.DEVICE}, or chgrp it; into a container: --device {userfaultfd.DEVICE}",
    )
    yield Capability(
        group="userfaultfd",
        name="userfaultfd(2)",
        state=ways["call"].state,
        found=ways["call"].found,
        gives="full fault handling without the device",
        how="root, CAP_SYS_PTRACE, or as root: sysctl vm.unprivileged_userfaultfd=1",
    )
    yield Capability(
        group="userfaultfd",
        name="userfaultfd(2) in user mode",
        state=ways["user"].state,
        found=ways["user"].found,
        gives="fault handling for anybody, but a system call that meets a page that is not there gets EFAULT",
        how="it needs no privilege; a seccomp filter or SELinux must allow userfaultfd(2)",
    )


def _features() -> Iterator[Capability]:
    try:
        features: Feature | None = userfaultfd.features_of_kernel()
    except OSError:
        features = None
    for feature, since, name, gives in (
        (Feature.MISSING_SHMEM, "4.11", "missing pages of shared memory", "several processes can share an object"),
        (Feature.THREAD_ID, "4.14", "the thread of a fault", "the manager knows which thread touched a lost page"),
        (
            Feature.WRITE_PROTECT_SHMEM,
            "5.19",
            "writes to shared memory",
            "the manager knows which pages of a writable file are dirty",
        ),
        (
            Feature.POISON,
            "6.6",
            "poison markers",
            "the kernel sends SIGBUS for an access to a lost page; without, the manager does",
        ),
    ):
        yield Capability(
            group="userfaultfd",
            name=name,
            state=Answer.UNKNOWN if features is None else Answer.YES if feature in features else Answer.NO,
            found=NOT_ASKED
            if features is None
            else "this kernel has it"
            if feature in features
            else "this kernel has it not",
            gives=gives,
            how=f"Linux {since} or newer",
            needed=feature in userfaultfd.NEEDED,
        )


def _calls(calls: dict[str, Tried]) -> Iterator[Capability]:
    for name, gives in (
        ("memfd_create(2)", "objects have memory that processes can share"),
        ("pidfd_open(2)", "the end of a client is noticed at once"),
    ):
        yield Capability(
            group="system calls",
            name=name,
            state=calls[name].state,
            found=calls[name].found,
            gives=gives,
            how="every kernel that has userfaultfd has it; a seccomp filter must allow it",
            needed=True,
        )


# --- what root adds ----------------------------------------------------------------------------------------------------


def _privilege() -> Iterator[Capability]:
    user = os.geteuid()
    yield Capability(
        group="privilege",
        name="root",
        state=Answer.YES if user == 0 else Answer.NO,
        found=f"user {user}",
        gives="what asks for root below; hwpoison works without it",
        how="sudo",
    )
    for number, name, gives in (
        (CAP_SYS_PTRACE, "CAP_SYS_PTRACE", "full fault handling by userfaultfd(2)"),
        (CAP_SYS_ADMIN, "CAP_SYS_ADMIN", "frame numbers, the kernel's hard offline, no limit to the quarantine"),
    ):
        state, found = has_privilege(number)
        yield Capability(
            group="privilege",
            name=name,
            state=state,
            found=found,
            gives=gives,
            how=f"root, or setcap {name.lower()}+ep on a copy of the interpreter; in a container --cap-add {name[4:]}",
        )


def _frames() -> Iterator[Capability]:
    attempt = tried(_own_frame)
    yield Capability(
        group="frames",
        name="frame numbers",
        state=attempt.state,
        found=attempt.found,
        gives="hardware names bad memory by physical address: with frame numbers such a report finds the page",
        how="root, outside of containers",
    )
    attempt = tried(_frame_flags)
    yield Capability(
        group="frames",
        name="/proc/kpageflags",
        state=attempt.state,
        found=attempt.found,
        gives="an operator can look up what the kernel knows of a frame; hwpoison itself needs it only in its tests",
        how="root, outside of containers, and a kernel with CONFIG_PROC_PAGE_MONITOR",
    )


def _own_frame() -> None:
    probe = bytearray(PAGE_SIZE)
    pagemap = PageMap()
    try:
        if not any(pagemap.numbers(syscalls.address_of(probe), 1)):
            raise PermissionError(errno.EPERM, "/proc/self/pagemap shows none")
    finally:
        pagemap.close()


def _frame_flags() -> None:
    fd = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.pread(fd, 8, 0)
    finally:
        os.close(fd)


def _kernel_poison() -> Iterator[Capability]:
    state, found = setting(EARLY_KILL)
    yield Capability(
        group="kernel poison",
        name="the kernel's memory failure",
        state=state,
        found={Answer.YES: "this kernel has it", Answer.NO: "this kernel is built without it"}.get(state, found),
        gives="the kernel itself takes bad pages out of use, and tells processes of what the hardware reports",
        how="a kernel with CONFIG_MEMORY_FAILURE; virtual machines often have none",
    )
    # Opening it changes nothing; only a frame's address that is written to it would.
    attempt = tried(lambda: os.close(os.open(HARD_OFFLINE, os.O_WRONLY | os.O_CLOEXEC)), "may be written")
    yield Capability(
        group="kernel poison",
        name="hard offline",
        state=attempt.state,
        found="this kernel is built without it" if attempt.error == errno.ENOENT else attempt.found,
        gives="`serve --offline-foreign` can hand bad memory that is not managed here to the kernel",
        how="root, outside of containers, and a kernel with CONFIG_MEMORY_FAILURE",
    )


# --- memory and files --------------------------------------------------------------------------------------------------


def _huge_pages() -> Iterator[Capability]:
    try:
        _publish_one()
    except OSError:
        state, found = Answer.UNKNOWN, NOT_ASKED
    except AssertionError as error:
        state, found = Answer.NO, str(error)
    else:
        state, found = Answer.YES, f"objects are made of pages of {PAGE_SIZE} bytes"
    yield Capability(
        group="huge pages",
        name="single pages in shared memory",
        state=state,
        found=found,
        gives="a failure costs one page; of a huge page it would cost the whole",
        how=f"as root: echo never > {SHMEM_ENABLED}",
    )


def _publish_one() -> None:
    """Raises AssertionError if more than one page came."""
    with _object() as store:
        store.publish(1, os.urandom(PAGE_SIZE))
        for page in (0, 2):
            assert store.take(page) is None, "the kernel makes huge pages of ours"


def _resources() -> Iterator[Capability]:
    attempt = tried(_large_pipe)
    soft = setting("/proc/sys/fs/pipe-user-pages-soft")[1]
    unlimited = Answer.YES in (has_privilege(CAP_SYS_ADMIN)[0], has_privilege(CAP_SYS_RESOURCE)[0]) or soft == "0"
    room = "no limit but memory" if unlimited else f"{soft} frames for all managers of this user"
    yield Capability(
        group="resources",
        name="room in quarantine",
        state=attempt.state,
        found=attempt.found if attempt.error else room,
        gives="bad frames are held, so that nobody gets them again; what finds no room goes back to the system",
        how="root, or as root: sysctl fs.pipe-user-pages-soft=N",
    )
    attempt = _direct_reads()
    yield Capability(
        group="resources",
        name="O_DIRECT",
        state=attempt.state,
        found=attempt.found,
        gives="files are read past the kernel's page cache; without, what is read is dropped from it afterwards",
        how="files on a disk's file system, such as ext4, xfs or btrfs",
    )
    known = platform.machine() in syscalls.ARCHITECTURES
    yield Capability(
        group="resources",
        name="architecture",
        state=Answer.YES if known else Answer.NO,
        found=f"{platform.machine()}, pages of {PAGE_SIZE} bytes, Linux {platform.release()}",
        gives="hwpoison knows this processor's system calls",
        how=f"one of {', '.join(syscalls.ARCHITECTURES)}; others are a line in linux/syscalls.py",
    )


def _large_pipe() -> None:
    ends = os.pipe2(os.O_CLOEXEC)
    try:
        fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, PIPE_FRAMES * PAGE_SIZE)
    finally:
        for end in ends:
            os.close(end)


def _direct_reads() -> Tried:
    """Whether the file system of temporary files has them: others may differ."""
    try:
        with tempfile.NamedTemporaryFile() as file, mmap.mmap(-1, PAGE_SIZE) as buffer:
            file.write(buffer)
            file.flush()
            return tried(lambda: _read_past_cache(file.name, buffer), f"in {os.path.dirname(file.name)}")
    except OSError as error:
        return Tried(Answer.UNKNOWN, f"no file to try it on: {error.strerror}")


def _read_past_cache(path: str, buffer: mmap.mmap) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        os.preadv(fd, [buffer], 0)
    finally:
        os.close(fd)
