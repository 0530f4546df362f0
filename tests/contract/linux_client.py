"""A process with memory of a machine: does what it is told on a socket (its descriptor is the argument), one at a time."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import threading
from typing import Any

from hwpoison.linux import syscalls, userfaultfd

libc = ctypes.CDLL(None, use_errno=True)
channel = socket.socket(fileno=int(sys.argv[1]))
opened = userfaultfd.open_userfaultfd()
mappings: dict[int, mmap.mmap] = {}
boards: list[memoryview] = []


def place(address: int) -> tuple[mmap.mmap, int]:
    """The mapping that has the address, and where in it."""
    base = max(one for one in mappings if one <= address)
    return mappings[base], address - base


def map_memory(fds: list[int], nbytes: int, *, private: bool, protected: bool, registered: bool) -> int:
    if private:
        mapping = mmap.mmap(fds[0], nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ)
    else:
        mapping = mmap.mmap(fds[0], nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    mapping.madvise(syscalls.MADV_NOHUGEPAGE)
    address = syscalls.address_of(mapping)
    mode = userfaultfd.MODE_MISSING | (userfaultfd.MODE_WRITE_PROTECT if protected else 0)
    if registered:
        userfaultfd.register(opened.fd, address, nbytes, mode)
    if protected:
        userfaultfd.protect(opened.fd, address, nbytes, on=True)
    mappings[address] = mapping
    return address


def copy(address: int, nbytes: int) -> dict[str, Any]:
    mapping, offset = place(address)
    ends = os.pipe()
    try:
        with memoryview(mapping) as view:
            return {"content": os.read(ends[0], os.write(ends[1], view[offset : offset + nbytes])).hex()}
    except OSError as error:
        return {"errno": error.errno}
    finally:
        for end in ends:
            os.close(end)


def count(address: int) -> tuple[int, int]:
    mapping, offset = place(address)
    waiting = select.poll()
    waiting.register(channel, select.POLLIN)
    done = 0
    with memoryview(mapping) as view, view.cast("Q") as words:
        while not waiting.poll(0):
            words[offset // 8] += 1
            done += 1
        return done, words[offset // 8]


def dispose(*, handled: bool, ignored: bool, blocked: bool) -> None:
    signal.signal(signal.SIGBUS, (lambda *_: None) if handled else signal.SIG_IGN if ignored else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK if blocked else signal.SIG_UNBLOCK, {signal.SIGBUS})


def signalled() -> tuple[int, int]:
    """Python's sigwaitinfo leaves the value out."""
    wanted = (1 << (signal.SIGBUS - 1)).to_bytes(128, sys.byteorder)
    information = ctypes.create_string_buffer(128)
    if libc.sigwaitinfo(wanted, information) != signal.SIGBUS:
        raise OSError(ctypes.get_errno(), "sigwaitinfo")
    _, _, code, value = struct.unpack_from("iiixxxxxxxxxxxxP", information)
    return code, value


def do(command: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    what = command.pop("do")
    match what:
        case "map":
            return {"address": map_memory(fds, **command)}
        case "load":
            mapping, offset = place(command["address"])
            return {"value": mapping[offset]}
        case "store":
            mapping, offset = place(command["address"])
            mapping[offset] = command["value"]
        case "copy":
            return copy(**command)
        case "discard":
            mapping, offset = place(command["address"])
            mapping.madvise(mmap.MADV_DONTNEED, offset, command["nbytes"])
        case "count":
            done, found = count(**command)
            channel.recv(1 << 16)
            return {"done": done, "found": found}
        case "dispose":
            dispose(**command)
        case "signalled":
            code, value = signalled()
            return {"code": code, "value": value}
        case "hits":
            boards.append(memoryview(mmap.mmap(fds[0], 0)).cast("Q"))
        case "guards":
            boards[-1][1] = command["count"]
        case "met":
            return {"met": boards[-1][0]}
    return {}


def main() -> None:
    hello = {"thread": threading.get_native_id(), "pid": os.getpid()}
    socket.send_fds(channel, [json.dumps(hello).encode()], [opened.fd])
    while True:
        data, fds, _, _ = socket.recv_fds(channel, 1 << 16, 4)
        if not data:
            return
        answer = do(json.loads(data), list(fds))
        for fd in fds:
            os.close(fd)
        channel.send(json.dumps(answer).encode())


main()
