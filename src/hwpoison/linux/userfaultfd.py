"""userfaultfd(2): opening one, and its ioctls. Plain numbers and structures; no policy.

Feature bits are asked of the running kernel by the handshake; kernel versions are never compared. See linux/userfaultfd.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import suppress
from enum import IntFlag
from typing import NamedTuple

from hwpoison.errors import UnsupportedError
from hwpoison.linux import syscalls

API = 0xAA
USER_MODE_ONLY = 1
OPEN_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
DEVICE = "/dev/userfaultfd"


class Feature(IntFlag):
    """What a kernel's userfaultfd can do."""

    MISSING_SHMEM = 1 << 5
    THREAD_ID = 1 << 8
    WRITE_PROTECT_SHMEM = 1 << 12
    POISON = 1 << 14


NOWHERE = 1 << 20
"""An address at which programs have nothing."""
NO_FEATURE = Feature(0)
NEEDED = Feature.MISSING_SHMEM | Feature.THREAD_ID | Feature.WRITE_PROTECT_SHMEM


def _ioctl(direction: int, number: int, nbytes: int) -> int:
    return direction << 30 | nbytes << 16 | API << 8 | number


_IOC_API = _ioctl(3, 0x3F, 24)
_IOC_REGISTER = _ioctl(3, 0x00, 32)
_IOC_WAKE = _ioctl(2, 0x02, 16)
_IOC_COPY = _ioctl(3, 0x03, 40)
_IOC_ZEROPAGE = _ioctl(3, 0x04, 32)
_IOC_WRITEPROTECT = _ioctl(3, 0x06, 24)
_IOC_CONTINUE = _ioctl(3, 0x07, 32)
_IOC_POISON = _ioctl(3, 0x08, 32)
_IOC_NEW = 0xAA << 8  # of the device: _IO(0xAA, 0)

MODE_MISSING = 1
MODE_WRITE_PROTECT = 2
_DONT_WAKE = 1
_CONTINUE_DONT_WAKE, _CONTINUE_WRITE_PROTECT = 1, 2
_WRITE_PROTECT, _WRITE_PROTECT_DONT_WAKE = 1, 2

_range = struct.Struct("QQ")
_copy = struct.Struct("QQQQq")
_filled = struct.Struct("QQQq")
_protected = struct.Struct("QQQ")

EVENT_BYTES = 32
_event = struct.Struct("BxxxxxxxQQIxxxx")
EVENT_PAGEFAULT = 0x12
FAULT_WRITE = 1
FAULT_PROTECTED = 2

_HANDSHAKE_DONE = 1 << 31
"""The kernel's own bit among the features that it shows."""


class Opened(NamedTuple):
    """A userfaultfd after its handshake. `user_mode`: faults inside system calls are not seen, they get EFAULT."""

    fd: int
    features: Feature
    user_mode: bool


def open_userfaultfd(wanted: Feature = NEEDED | Feature.POISON, device: int | None = None) -> Opened:
    """A new userfaultfd of this process with what this kernel has of `wanted`.

    Tried in this order: the device, the system call (root), the system call in user mode; or only `device`, which somebody
    has opened who may. Raises `UnsupportedError` that says what to do, and OSError if that is none.
    """
    fd, user_mode = _open() if device is None else (_by(device), False)
    try:
        features = features_of_kernel(device) & wanted
        fcntl.ioctl(fd, _IOC_API, struct.pack("QQQ", API, features, 0))
    except OSError:
        os.close(fd)
        raise
    missing = NEEDED & wanted & ~features
    if missing:
        os.close(fd)
        raise UnsupportedError(
            errno.EOPNOTSUPP,
            f"this kernel's userfaultfd lacks {missing!r}; Linux 5.19 or newer is needed, see `hwpoison doctor`",
        )
    return Opened(fd, features, user_mode)


def _open() -> tuple[int, bool]:
    with suppress(OSError):
        return open_by_device(), False
    try:
        return syscalls.userfaultfd(OPEN_FLAGS), False
    except PermissionError:
        pass
    except OSError as error:
        raise _unsupported(error) from error
    try:
        return syscalls.userfaultfd(OPEN_FLAGS | USER_MODE_ONLY), True
    except OSError as error:
        raise _unsupported(error) from error


def open_by_device() -> int:
    """A new userfaultfd by the device: whoever may open that gets one with no limits. Raises OSError."""
    device = open_device()
    try:
        return _by(device)
    finally:
        os.close(device)


def open_device() -> int:
    """The device itself: the right to open it is all that is needed, whoever uses it then. Raises OSError."""
    return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)


def _by(device: int) -> int:
    return fcntl.ioctl(device, _IOC_NEW, OPEN_FLAGS)


def _unsupported(error: OSError) -> UnsupportedError:
    why = {
        errno.EPERM: "userfaultfd is forbidden here: a seccomp filter (container runtimes have one) or SELinux must allow "
        "userfaultfd(2), or give this user access to /dev/userfaultfd",
        errno.ENOSYS: "this kernel has no userfaultfd: it needs CONFIG_USERFAULTFD, or a seccomp filter that allows it",
    }
    text = why.get(error.errno or 0, f"userfaultfd can't be opened: {error.strerror}")
    return UnsupportedError(error.errno or errno.ENOSYS, f"{text}; see `hwpoison doctor`")


def features_of_kernel(device: int | None = None) -> Feature:
    """All that this kernel's userfaultfd can do. Asked of one of its own, because a handshake can't be repeated."""
    fd = _open()[0] if device is None else _by(device)
    try:
        return Feature(struct.unpack("QQQ", fcntl.ioctl(fd, _IOC_API, struct.pack("QQQ", API, 0, 0)))[1])
    finally:
        os.close(fd)


def features_of(fd: int) -> Feature:
    """What was agreed in a userfaultfd's handshake; nothing for one that had none, and for any other descriptor."""
    try:
        if os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[userfaultfd]":
            return NO_FEATURE
        with open(f"/proc/self/fdinfo/{fd}") as information:
            agreed = int(information.read().partition("API:")[2].split(":")[1], 16)
    except (OSError, LookupError, ValueError):
        return NO_FEATURE
    return Feature(agreed & ~_HANDSHAKE_DONE)


def register(fd: int, address: int, nbytes: int, mode: int) -> None:
    """From now on faults in the range are reported."""
    fcntl.ioctl(fd, _IOC_REGISTER, struct.pack("QQQQ", address, nbytes, mode, 0))


def wake(fd: int, address: int, nbytes: int) -> None:
    """Threads that sleep in faults in the range try again."""
    fcntl.ioctl(fd, _IOC_WAKE, _range.pack(address, nbytes))


def copy(fd: int, address: int, source: int, nbytes: int) -> None:
    """Make the absent pages of the range present, filled from `source`. Wakes nobody."""
    done = 0
    while done < nbytes:
        try:
            answer = fcntl.ioctl(fd, _IOC_COPY, _copy.pack(address + done, source + done, nbytes - done, _DONT_WAKE, 0))
        except BlockingIOError:
            # EAGAIN: the address space was changing, or only a part was copied; how much is not to be had from here,
            # so the rest goes page by page.
            if nbytes - done > syscalls.PAGE_SIZE:
                for start in range(done, nbytes, syscalls.PAGE_SIZE):
                    _copy_page(fd, address + start, source + start)
                return
            continue
        done += _copy.unpack(answer)[4]


def _copy_page(fd: int, address: int, source: int) -> None:
    while True:
        try:
            fcntl.ioctl(fd, _IOC_COPY, _copy.pack(address, source, syscalls.PAGE_SIZE, _DONT_WAKE, 0))
        except BlockingIOError:
            continue
        except FileExistsError:
            pass
        return


def require_registered(fd: int, address: int, nbytes: int) -> None:
    """Raises OSError, ENOENT for instance, unless the whole range is one mapping that is registered, for whatever faults.

    By a copy from where nothing can be read (EFAULT): the kernel looks at the range before it looks there.
    """
    try:
        fcntl.ioctl(fd, _IOC_COPY, _copy.pack(address, NOWHERE, nbytes, _DONT_WAKE, 0))
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise


def zero_page(fd: int, address: int, nbytes: int) -> None:
    """Pages of zeros of the mapping's own. Wakes nobody."""
    fcntl.ioctl(fd, _IOC_ZEROPAGE, _filled.pack(address, nbytes, _DONT_WAKE, 0))


def protect(fd: int, address: int, nbytes: int, *, on: bool) -> None:
    """Watch for writes, or not any more. Wakes nobody."""
    mode = _WRITE_PROTECT if on else _WRITE_PROTECT_DONT_WAKE
    fcntl.ioctl(fd, _IOC_WRITEPROTECT, _protected.pack(address, nbytes, mode))


def poison(fd: int, address: int, nbytes: int) -> None:
    """Poison markers. Wakes nobody."""
    fcntl.ioctl(fd, _IOC_POISON, _filled.pack(address, nbytes, _DONT_WAKE, 0))


def continue_(fd: int, address: int, nbytes: int, *, protected: bool = False) -> None:
    """Map pages that are present in the object, in place of markers. Wakes nobody."""
    mode = _CONTINUE_DONT_WAKE | (_CONTINUE_WRITE_PROTECT if protected else 0)
    fcntl.ioctl(fd, _IOC_CONTINUE, _filled.pack(address, nbytes, mode, 0))


class Fault(NamedTuple):
    """One fault: the address, in whole pages, and the thread that sleeps in it."""

    address: int
    thread: int
    write: bool
    protected: bool


def read_faults(fd: int, limit: int = 64) -> list[Fault]:
    """The faults that wait to be read, at most `limit`; none if there are none."""
    try:
        data = os.read(fd, limit * EVENT_BYTES)
    except BlockingIOError:
        return []
    mask = ~(syscalls.PAGE_SIZE - 1)
    return [
        Fault(address & mask, thread, bool(flags & FAULT_WRITE), bool(flags & FAULT_PROTECTED))
        for event, flags, address, thread in _event.iter_unpack(data)
        if event == EVENT_PAGEFAULT
    ]
