"""A file system with one file, whose reads and writes a test can hold up, fail and look at.

It is a real one, by FUSE, in a process of its own: a test that sleeps in a fault could not serve it. Its mount is in no
directory: it is reached through a descriptor of the server, and gone with it. For root.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import stat
import struct
import subprocess
import sys
import time
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

SECONDS_MAX = 60.0
BLOCK = 4096


class Operation(IntEnum):
    """What the kernel may ask (linux/fuse.h); anything else is answered with ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    SYNC = 20
    FLUSH = 25
    INIT = 26
    INTERRUPT = 36
    FORGET_MANY = 42


_NAMES: dict[int, str] = {
    Operation.READ: "read",
    Operation.WRITE: "write",
    Operation.SYNC: "sync",
    Operation.GETATTR: "getattr",
    Operation.STATFS: "statfs",
    Operation.FLUSH: "flush",
}
"""Those that a test can hold and fail. The kernel asks for attributes each time: nothing of them is valid for long."""
_DONE = ("read", "write", "sync")
_NO_REPLY = (Operation.FORGET, Operation.FORGET_MANY, Operation.INTERRUPT)
_ENOSYS, _ENOENT, _EINVAL = 38, 2, 22
_FILE = 2
"""The number of the only file; the root directory is 1."""
_SIZE_IS_SET = 8
_KEEP_CACHE = 2
_READ_AHEAD = 128 << 10


class Request(NamedTuple):
    """What the kernel wants of the file system."""

    operation: int
    unique: int
    node: int
    body: bytes

    @property
    def place(self) -> tuple[int, int]:
        """(offset, nbytes) of a read or write."""
        return struct.unpack_from("QI", self.body, 8) if self.operation in (Operation.READ, Operation.WRITE) else (0, 0)


class Server:
    """The file system's process: answers the kernel on /dev/fuse and the test on its standard streams."""

    def __init__(self, nbytes: int) -> None:
        self.content = bytearray(nbytes)
        self.changed_ns = time.time_ns()
        self.hold: set[str] = set()
        self.fail: dict[str, int] = {}
        self.pass_first = 0
        self.refuse_direct = False
        self.waiting: list[Request] = []
        self.done: list[tuple[str, int, int]] = []
        self.fuse, self.mount = _mount()

    def run(self) -> None:
        self._say({"path": f"/proc/{os.getpid()}/fd/{self.mount}/file"})
        while True:
            readable, _, _ = select.select([self.fuse, 0], [], [])
            if self.fuse in readable:
                self._serve(_request(os.read(self.fuse, 1 << 21)))
            if 0 in readable and not self._obey():
                return

    @staticmethod
    def _say(value: Any) -> None:
        os.write(1, json.dumps(value).encode() + b"\n")

    def _obey(self) -> bool:
        line = sys.stdin.buffer.readline()
        if not line:
            return False
        order = json.loads(line)
        self.hold = set(order.get("hold", self.hold))
        self.fail = order.get("fail", self.fail)
        self.pass_first = order.get("pass_first", self.pass_first)
        self.refuse_direct = order.get("refuse_direct", self.refuse_direct)
        if "content" in order:
            self.content[:] = bytes.fromhex(order["content"])
            self.changed_ns = time.time_ns()
        if name := order.get("let"):
            one = next(one for one in self.waiting if _NAMES[one.operation] == name)
            self.waiting.remove(one)
            self._answer(one)
        ready = [one for one in self.waiting if _NAMES[one.operation] not in self.hold]
        self.waiting = [one for one in self.waiting if one not in ready]
        for request in ready:
            self._answer(request)
        self._say(
            {
                "waiting": [(_NAMES[one.operation], *one.place) for one in self.waiting],
                "done": self.done,
                "content": self.content.hex() if order.get("show") else "",
            }
        )
        return True

    def _serve(self, request: Request) -> None:
        if _NAMES.get(request.operation) in self.hold:
            self.waiting.append(request)
        else:
            self._answer(request)

    def _answer(self, request: Request) -> None:
        if request.operation in _NO_REPLY:
            return
        body, error = self._result(request)
        try:
            os.write(self.fuse, struct.pack("IiQ", 16 + len(body), -error, request.unique) + body)
        except FileNotFoundError:
            pass  # nobody waits for it any more

    def _result(self, request: Request) -> tuple[bytes, int]:
        name = _NAMES.get(request.operation, "")
        if name in _DONE:
            self.done.append((name, *request.place))
        if error := self.fail.get(name):
            if not self.pass_first:
                return b"", error
            self.pass_first -= 1
        match request.operation:
            case Operation.INIT:
                return struct.pack("IIIIHHIIHHI28x", 7, 31, _READ_AHEAD, 0, 16, 16, 1 << 20, 1, 256, 0, 0), 0
            case Operation.LOOKUP:
                if request.body != b"file\0":
                    return b"", _ENOENT
                return struct.pack("QQQQII", _FILE, 0, 0, 0, 0, 0) + self._attributes(_FILE), 0
            case Operation.GETATTR:
                return struct.pack("QII", 0, 0, 0) + self._attributes(request.node), 0
            case Operation.SETATTR:
                if struct.unpack_from("I", request.body)[0] & _SIZE_IS_SET:
                    (nbytes,) = struct.unpack_from("Q", request.body, 16)
                    self.content[nbytes:] = bytes(max(0, nbytes - len(self.content)))
                    self.changed_ns = time.time_ns()
                return struct.pack("QII", 0, 0, 0) + self._attributes(request.node), 0
            case Operation.OPEN:
                if self.refuse_direct and struct.unpack_from("I", request.body)[0] & os.O_DIRECT:
                    return b"", _EINVAL
                return struct.pack("QII", 0, _KEEP_CACHE if self.refuse_direct else 0, 0), 0
            case Operation.READ:
                offset, nbytes = request.place
                return bytes(self.content[offset : offset + nbytes]), 0
            case Operation.WRITE:
                offset, nbytes = request.place
                self.content[offset : offset + nbytes] = request.body[40 : 40 + nbytes]
                self.changed_ns = time.time_ns()
                return struct.pack("II", nbytes, 0), 0
            case Operation.RELEASE | Operation.SYNC | Operation.FLUSH:
                return b"", 0
        return b"", _ENOSYS

    def _attributes(self, node: int) -> bytes:
        mode = stat.S_IFREG | 0o666 if node == _FILE else stat.S_IFDIR | 0o755
        nbytes = len(self.content) if node == _FILE else 0
        seconds, rest = divmod(self.changed_ns, 10**9)
        times = (seconds, seconds, seconds, rest, rest, rest)
        return struct.pack("QQQQQQIIIIIIIIII", node, nbytes, -(-nbytes // 512), *times, mode, 1, 0, 0, 0, BLOCK, 0)


def _request(data: bytes) -> Request:
    _, operation, unique, node = struct.unpack_from("IIQQ", data)
    return Request(operation, unique, node, data[40:])


def _mount() -> tuple[int, int]:
    """The descriptors of the connection and of the mount: fsopen, fsconfig, fsmount."""
    fsopen, fsconfig, fsmount = 430, 431, 432
    set_flag, set_string, create = 0, 1, 6
    libc = ctypes.CDLL(None, use_errno=True)

    def call(*arguments: Any) -> int:
        result = int(libc.syscall(*arguments))
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    context = call(fsopen, b"fuse", 0)
    for key, value in ((b"fd", fuse), (b"rootmode", b"40000"), (b"user_id", 0), (b"group_id", 0)):
        call(fsconfig, context, set_string, key, str(value).encode() if isinstance(value, int) else value, 0)
    call(fsconfig, context, set_flag, b"allow_other", None, 0)
    call(fsconfig, context, create, None, None, 0)
    mount = call(fsmount, context, 0, 0)
    os.close(context)
    return fuse, mount


class SlowFile:
    """The test's side. `path` is the file."""

    def __init__(self, content: bytes) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(len(content))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.path = Path(self._hear()["path"])
        self._ask({"content": content.hex()})

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        assert select.select([self._process.stdout], [], [], SECONDS_MAX)[0], "the file system does not answer"
        return json.loads(self._process.stdout.readline())

    def _ask(self, order: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        return self._hear()

    def hold(self, *operations: str) -> None:
        """Keep these ("read", "write", "sync", "getattr": fstat, "statfs", "flush": close) waiting from now on, and let all
        others through."""
        self._ask({"hold": operations})

    def let(self, operation: str) -> None:
        """Let the first that waits of this operation through."""
        self._ask({"let": operation})

    def fail(self, **operations: int) -> None:
        """Let these operations fail with an errno from now on, and no others."""
        self.fail_after(0, **operations)

    def fail_after(self, count: int, **operations: int) -> None:
        """As `fail`, but let the first `count` of them through."""
        self._ask({"fail": operations, "pass_first": count})

    def refuse_direct(self) -> None:
        """From now on nobody can open it with O_DIRECT, and what the page cache has of it stays when it is opened."""
        self._ask({"refuse_direct": True})

    def change(self, content: bytes) -> None:
        """Somebody else has changed the file."""
        self._ask({"content": content.hex()})

    @property
    def waiting(self) -> list[tuple[str, int, int]]:
        """(operation, offset, nbytes) of those that are held."""
        return [tuple(one) for one in self._ask({})["waiting"]]

    @property
    def done(self) -> list[str]:
        """The reads, writes and syncs that were done, in order."""
        return [name for name, _, _ in self._ask({})["done"]]

    @property
    def content(self) -> bytes:
        return bytes.fromhex(self._ask({"show": True})["content"])

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(SECONDS_MAX)
        self._process.stdout.close()


def can_mount() -> bool:
    """True if this process may make such a file system."""
    try:
        for fd in _mount():
            os.close(fd)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    Server(int(sys.argv[1])).run()
