"""A client of the manager that speaks the protocol by itself, and can do so wrongly.

Run as a program (`python raw.py SOCKET WHERE`) it is a process that vanishes at the point that `VANISH` calls WHERE.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hwpoison import protocol
from hwpoison.core.records import Report
from hwpoison.linux import syscalls, userfaultfd
from hwpoison.linux.syscalls import PAGE_SIZE

FILE_PAGES = 512


class RawClient:
    """One channel to the manager, and what came with it."""

    def __init__(self, path: str) -> None:
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.connect(protocol.address_of(path))
        self.channel.settimeout(60)
        self.userfaultfd = -1
        self.mappings: list[mmap.mmap] = []

    def send(self, message: protocol.Message | bytes, fds: tuple[int, ...] = ()) -> None:
        data = message if isinstance(message, bytes) else protocol.encode(message)
        socket.send_fds(self.channel, [data], list(fds))

    def receive(self) -> protocol.Reply:
        """The next reply; EOFError if the manager has closed the channel. Descriptors are closed but for `found`."""
        data, fds = protocol.receive(self.channel)
        for fd in fds:
            os.close(fd)
        if not data:
            raise EOFError("the manager closed the channel")
        return protocol.decode_reply(data)

    def ask(self, message: protocol.Message | bytes, fds: tuple[int, ...] = ()) -> protocol.Reply:
        self.send(message, fds)
        return self.receive()

    def error(self, message: protocol.Message | bytes, fds: tuple[int, ...] = ()) -> str:
        """The kind of error that the manager answers with, and never a defect of its own."""
        reply = self.ask(message, fds)
        assert isinstance(reply, protocol.Failed), f"{message!r} was answered with {reply}"
        assert reply.text
        return reply.kind

    def hello(self) -> RawClient:
        """A proper beginning, with a userfaultfd."""
        self.userfaultfd = userfaultfd.open_userfaultfd().fd
        assert isinstance(self.ask(protocol.Hello(), (self.userfaultfd,)), protocol.Welcome)
        return self

    def found(self, message: protocol.Message, fds: tuple[int, ...] = ()) -> tuple[protocol.Found, int]:
        """The object, and the descriptor of its memory."""
        self.send(message, fds)
        data, memory = protocol.receive(self.channel)
        reply = protocol.decode_reply(data)
        assert isinstance(reply, protocol.Found), reply
        return reply, memory[0]

    def show(self, found: protocol.Found, memory: int) -> tuple[mmap.mmap, int]:
        """The object's memory in this process, registered; its address. The manager does not know of it yet."""
        nbytes = -(-found.nbytes // PAGE_SIZE) * PAGE_SIZE
        if found.writable:
            mapping = mmap.mmap(memory, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        else:
            mapping = mmap.mmap(memory, nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ)
        os.close(memory)
        mapping.madvise(mmap.MADV_DONTFORK)
        address = syscalls.address_of(mapping)
        mode = userfaultfd.MODE_MISSING | (userfaultfd.MODE_WRITE_PROTECT if found.protect else 0)
        userfaultfd.register(self.userfaultfd, address, nbytes, mode)
        if found.protect:
            userfaultfd.protect(self.userfaultfd, address, nbytes, on=True)
        self.mappings.append(mapping)
        return mapping, address

    def mapped(self, message: protocol.Message, fds: tuple[int, ...] = ()) -> tuple[mmap.mmap, int]:
        """The object's memory, mapped as it should be, and the mapping's number."""
        found, memory = self.found(message, fds)
        mapping, address = self.show(found, memory)
        number = len(self.mappings)
        reply = self.ask(protocol.Map(found.object, address, number))
        assert isinstance(reply, protocol.Mapped), reply
        return mapping, number

    def close(self) -> None:
        """Go in order; a process that lives and has mappings is served on without its channels."""
        with suppress(OSError, EOFError):
            self.ask(protocol.Goodbye())
        self.channel.close()
        for mapping in self.mappings:
            mapping.close()
        if self.userfaultfd >= 0:
            os.close(self.userfaultfd)


# --- processes that vanish


def _before_hello(path: str) -> None:
    RawClient(path)


def _with_hello_unanswered(path: str) -> None:
    RawClient(path).send(protocol.Hello(), (userfaultfd.open_userfaultfd().fd,))


def _with_allocate_unanswered(path: str) -> None:
    RawClient(path).hello().send(protocol.Allocate(PAGE_SIZE, "vanishing"))


def _between_found_and_map(path: str) -> None:
    RawClient(path).hello().found(protocol.Allocate(PAGE_SIZE, "vanishing"))


def _with_map_unanswered(path: str) -> None:
    client = RawClient(path).hello()
    found, memory = client.found(protocol.Allocate(PAGE_SIZE, "vanishing"))
    client.send(protocol.Map(found.object, client.show(found, memory)[1], 1))


def _with_write_unanswered(path: str) -> None:
    client = RawClient(path).hello()
    _, number = client.mapped(protocol.Allocate(PAGE_SIZE, "vanishing"))
    client.send(protocol.Write(number, 0, b"x"))


def _with_report_unanswered(path: str) -> None:
    client = RawClient(path).hello()
    mapping, _ = client.mapped(protocol.Allocate(PAGE_SIZE, "vanishing"))
    mapping[0] = 1
    client.send(protocol.ReportPage(Report(name="vanishing", offset=0)))


def _with_unread_notices(path: str) -> None:
    client = RawClient(path).hello()
    mapping, _ = client.mapped(protocol.Allocate(PAGE_SIZE, "vanishing"))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.send(protocol.Listen(), (theirs.fileno(),))
    assert isinstance(protocol.receive_reply(ours)[0], protocol.Added)
    mapping[0] = 1
    client.ask(protocol.ReportPage(Report(name="vanishing", offset=0)))
    assert ours.recv(1, socket.MSG_PEEK)


def _with_its_channels_closed(path: str) -> None:
    client = RawClient(path).hello()
    mapping, _ = client.mapped(protocol.Allocate(2 * PAGE_SIZE, "vanishing"))
    client.channel.close()
    # It still has its memory: these first touches are faults that only the manager can end.
    assert mapping[0] == 0
    mapping[PAGE_SIZE] = 1


def _file(path: str) -> tuple[RawClient, mmap.mmap, int]:
    client = RawClient(path).hello()
    # Beside the socket, so that the test knows it.
    name = str(Path(path).with_name("vanishing"))
    fd = os.open(name, os.O_RDWR | os.O_CLOEXEC)
    mapping, number = client.mapped(protocol.Open(name, 0, None, writable=True), (fd,))
    os.close(fd)
    return client, mapping, number


def _with_prefetch_unanswered(path: str) -> None:
    client, _, number = _file(path)
    client.send(protocol.Prefetch(number, 0, FILE_PAGES * PAGE_SIZE))


def _with_dirty_pages(path: str) -> None:
    _, mapping, _ = _file(path)
    dirty(mapping)


def _with_flush_unanswered(path: str) -> None:
    client, mapping, number = _file(path)
    dirty(mapping)
    client.send(protocol.Flush(number, 0))


def dirty(memory: mmap.mmap | bytearray) -> bytes:
    """Change every second page, in an order that is no stream: many writes instead of one. What the memory holds then."""
    for page in reversed(range(0, FILE_PAGES, 2)):
        memory[page * PAGE_SIZE] = ord("d")
    return bytes(memory)


VANISH: dict[str, Callable[[str], None]] = {
    one.__name__[1:].replace("_", " "): one
    for one in (
        _before_hello, _with_hello_unanswered, _with_allocate_unanswered, _between_found_and_map, _with_map_unanswered,
        _with_write_unanswered, _with_report_unanswered, _with_unread_notices, _with_its_channels_closed,
        _with_prefetch_unanswered, _with_dirty_pages, _with_flush_unanswered,
    )
}  # fmt: skip


def _stray(path: str) -> None:
    client = RawClient(path).hello()
    mapping, _ = client.show(*client.found(protocol.Allocate(PAGE_SIZE, "vanishing")))
    mapping[0]


STRAY = "stray"

if __name__ == "__main__":
    (VANISH | {STRAY: _stray})[sys.argv[2]](sys.argv[1])
    os.kill(os.getpid(), signal.SIGKILL)
