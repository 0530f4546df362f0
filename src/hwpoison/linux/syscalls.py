"""System calls that Python has no function for. The only file with ctypes.

Numbers that differ between architectures are asked for by name where the C library has a wrapper, and otherwise are those
that all architectures share, but for the ones in `_NUMBERS`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import signal
import struct
import sys
import threading
from functools import partial

PAGE_SIZE = mmap.PAGESIZE

_NUMBERS = {
    # machine: (userfaultfd, rt_tgsigqueueinfo)
    "x86_64": (323, 297),
    "aarch64": (282, 240),
}
ARCHITECTURES = tuple(_NUMBERS)
_USERFAULTFD, _RT_TGSIGQUEUEINFO = _NUMBERS.get(platform.machine(), (-1, -1))

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
MAP_FIXED = 0x10
MAP_FIXED_NOREPLACE = 0x100000
MAP_NORESERVE = 0x4000
MADV_NOHUGEPAGE = 15
SI_QUEUE = -1
BUS_MCEERR_AO = 5
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


class _Buffer(ctypes.Structure):
    """CPython's Py_buffer: the way to the address of a read-only buffer."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = [ctypes.py_object, ctypes.POINTER(_Buffer), ctypes.c_int]
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = [ctypes.POINTER(_Buffer)]
_release_buffer.restype = None


def address_of(buffer: bytes | bytearray | memoryview | mmap.mmap) -> int:
    """The address of a contiguous buffer's first byte. The caller keeps the buffer alive and in its size."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    except (TypeError, ValueError):
        pass  # It is read-only, or empty.
    view = _Buffer()
    _get_buffer(buffer, ctypes.byref(view), 0)
    try:
        return view.buf or 0
    finally:
        _release_buffer(ctypes.byref(view))


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def userfaultfd(flags: int) -> int:
    """A new userfaultfd by the system call. Raises OSError."""
    return _checked(int(_libc.syscall(ctypes.c_long(_USERFAULTFD), ctypes.c_int(flags))))


def punch_hole(fd: int, offset: int, nbytes: int) -> None:
    """Make bytes of a file a hole; its size stays."""
    _checked(_libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, nbytes))


def map_memory(nbytes: int, protection: int, flags: int, fd: int, address: int = 0) -> int:
    """mmap(2); the address. For mappings that Python code never reads or writes."""
    result = _libc.mmap(address or None, nbytes, protection, flags, fd, 0)
    if result is None or result == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)


def fence(address: int, nbytes: int) -> None:
    """Make addresses where nothing is mapped inaccessible, so that nothing else comes there."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_NORESERVE
    map_memory(nbytes, 0, flags, -1, address)


def unmap_memory(address: int, nbytes: int) -> None:
    """munmap(2)."""
    _checked(_libc.munmap(address, nbytes))


def move(mapping: mmap.mmap, address: int) -> bool:
    """Have a Python mapping be what is mapped at another address, and unmap what it was.

    False, with nothing changed, where a mapping's address is not, as CPython has it, the first thing in the object.
    """
    before = address_of(mapping)
    kept = ctypes.c_void_p.from_address(id(mapping) + object.__basicsize__)
    if kept.value != before:
        return False
    kept.value = address
    unmap_memory(before, len(mapping))
    return True


def advise(address: int, nbytes: int, advice: int) -> None:
    """madvise(2)."""
    _checked(_libc.madvise(address, nbytes, advice))


_LOWEST_BIT = bytes(value & 1 for value in range(256))


def file_system_type(fd: int) -> int:
    """The magic number of the file system that a file is in (fstatfs). The file system may be asked."""
    information = ctypes.create_string_buffer(256)
    _checked(_libc.fstatfs(fd, information))
    return ctypes.c_long.from_buffer(information).value & 0xFFFFFFFF


def all_resident(address: int, nbytes: int) -> bool:
    """True if every page of a mapping is in the page cache, as far as this process may know (mincore)."""
    vector = (ctypes.c_ubyte * -(-nbytes // PAGE_SIZE))()
    _checked(_libc.mincore(address, nbytes, vector))
    return 0 not in bytes(vector).translate(_LOWEST_BIT)


def queue_signal(process: int, thread: int, number: signal.Signals, value: int) -> None:
    """rt_tgsigqueueinfo(2): a signal to one thread, with SI_QUEUE and a pointer as its value."""
    information = struct.pack("iiixxxxiiP", number, 0, SI_QUEUE, os.getpid(), os.getuid(), value).ljust(128, b"\0")
    _checked(int(_libc.syscall(
        ctypes.c_long(_RT_TGSIGQUEUEINFO), ctypes.c_int(process), ctypes.c_int(thread), ctypes.c_int(number), information
    )))  # fmt: skip


def signal_action_optional(address: int) -> None:
    """Send this thread the SIGBUS that the kernel sends early: BUS_MCEERR_AO, with the address of the page and how many low
    bits of it say nothing. (Such a code can be sent to no other process, and to no other thread of this one.)"""
    shift = PAGE_SIZE.bit_length() - 1
    information = struct.pack("iiixxxxPh", signal.SIGBUS, 0, BUS_MCEERR_AO, address, shift).ljust(128, b"\0")
    process, thread = ctypes.c_int(os.getpid()), ctypes.c_int(threading.get_native_id())
    number = ctypes.c_int(signal.SIGBUS)
    _checked(int(_libc.syscall(ctypes.c_long(_RT_TGSIGQUEUEINFO), process, thread, number, information)))


def queue_to_process(number: signal.Signals, value: int) -> None:
    """sigqueue(3), to this process: a signal with SI_QUEUE and a pointer as its value."""
    _checked(_libc.sigqueue(os.getpid(), ctypes.c_int(number), ctypes.c_void_p(value)))


SignalMask = ctypes.c_char * 128
"""A sigset_t."""
# Calls without any Python code in them, for `os.register_at_fork`: what a signal handler raises in that would be printed and
# lost. They keep the GIL.
_held = ctypes.PyDLL(None)
_every_signal = SignalMask.from_buffer_copy(b"\xff" * ctypes.sizeof(SignalMask))
mask_in_use = ctypes.pointer(SignalMask())
"""To where `block_signals` puts, and from where `restore_signals` takes. A thread says so just before, as its last
Python code: `mask_in_use.contents = mask`."""
block_signals = partial(_held.pthread_sigmask, int(signal.SIG_BLOCK), _every_signal, mask_in_use)
"""Block all signals in this thread."""
restore_signals = partial(_held.pthread_sigmask, int(signal.SIG_SETMASK), mask_in_use, None)
"""After `block_signals`: block what was blocked before. Python's own call would run the handlers of what is pending."""
signal_to_raise = ctypes.c_int(0)
raise_signal = partial(getattr(_held, "raise"), signal_to_raise)
"""Send this thread the signal that `signal_to_raise` says; 0 is none."""


def signals_in(mask: ctypes.Array[ctypes.c_char]) -> set[int]:
    """Those that it blocks."""
    bits = int.from_bytes(mask.raw[:8], sys.byteorder)
    return {number for number in signal.valid_signals() if bits >> (number - 1) & 1}


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """This process gets the signal when its parent thread ends."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0))


def name_process(name: str) -> None:
    """What `ps` and `top` show."""
    _checked(_libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0))
