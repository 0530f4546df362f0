"""What clients and the manager say to each other.

One message is one packet of a SOCK_SEQPACKET socket, msgpack, with descriptors beside it where the message says so. Each
request gets one reply, in order, on the channel it came by: the reply that its docstring names, or `Failed`. A client may
open more channels, and one on which it is told of losses; it is there that the manager answers when it has taken them. A
client that stops waiting for a reply closes the channel.

When the manager dies, its ends of those channels close, and that of the first one does not: the next manager has it. The
client opens channels anew by that, and asks again what was not answered. Every request may be asked twice.
"""

from __future__ import annotations

import array
import builtins
import errno
import os
import socket
from collections.abc import Sequence

import msgspec

from hwpoison.core.records import Failure, Notice, Policy, Report
from hwpoison.errors import PoisonError, Range, UnsupportedError

VERSION = 3
MESSAGE_LIMIT = 192 << 10
"""Most bytes of a message; the default send buffer of a socket is a little larger."""
DATA_LIMIT = 128 << 10
"""Most bytes of content in one message, in whole pages for every page size up to 64 KiB."""
DESCRIPTOR_LIMIT = 4
ADDRESS_LIMIT = 107
"""Most bytes of a socket's path."""
TEXT_LIMIT = 8192
"""Most characters of an error's message: it may quote what was asked for, and must fit into a message itself."""


class Message(msgspec.Struct, tag=True, array_like=True):
    """Any message."""


# --- requests


class Hello(Message):
    """The first message. Descriptors: a userfaultfd after its handshake, or none for a client that maps nothing; and one end
    of a socket pair, which the manager and its keeper hold: by its other end the client learns that both are gone.

    Reply: `Welcome`.
    """

    version: int = VERSION


class Device(Message):
    """/dev/userfaultfd, open: whoever has that makes userfaultfds without limits. May be asked before Hello.

    Reply: `Done`, with the descriptor.
    """


class AddChannel(Message):
    """Descriptor: one end of a socket pair, another channel for requests. Reply, on that: `Added`."""


class Listen(Message):
    """Descriptor: one end of a socket pair, on which the client is told of losses (`Told`) from now on; those up to number
    `after` it has been told of.

    Reply, on that: `Added`.
    """

    after: int = 0


class Invite(Message):
    """The client is about to fork. Descriptor: one end of a socket pair, for the child, which says `Join` on it. What the
    client has mapped stays until it is closed. Reply, on that: `Added`.
    """


class Join(Message):
    """On the socket of `Invite`. Descriptor: one end of a socket pair, the first channel of another client. No reply."""


class Standing(Message):
    """What is lost now of the mapping's object, or for 0 of all that the client maps, and how many losses of its own the
    client has had, whether it was told or not. Reply: `Losses`."""

    mapping: int


class Allocate(Message):
    """A new anonymous object. Reply: `Found`.

    `mapping`, here and in `Open` and `Attach`: the number of the mapping that the client will make of it, see `Map`. Asked
    again with that number, the manager gives the same object again.
    """

    nbytes: int
    name: str | None = None
    mapping: int = 0
    persistent: bool = False


class Open(Message):
    """An object over a file. Descriptor: the file, opened by the client. Reply: `Found`."""

    name: str
    offset: int
    nbytes: int | None
    writable: bool
    mapping: int = 0


class Unlink(Message):
    """A persistent object ends when nobody has it open any more. Reply: `Done`."""

    name: str


class Attach(Message):
    """An object that exists; `object`: only if it is this one, and not another that has its name by now. Reply: `Found`."""

    name: str
    object: int | None = None
    mapping: int = 0


class Map(Message):
    """The object is mapped at `address` and registered with the client's userfaultfd. Reply: `Mapped`.

    On the channel by which the object was found: when the client closes that, what was not mapped is let go. On any for one
    more mapping. `mapping` is the client's own number for it, another one each time: it can say that it is gone also without
    the reply.
    """

    object: int
    address: int
    mapping: int
    guarded: bool = False


class Unmap(Message):
    """The mapping is gone from the client's address space, or will not be made. Reply: `Done`."""

    mapping: int


class Write(Message):
    """Store bytes, or nothing at all. Reply: `Done`."""

    mapping: int
    offset: int
    data: bytes


class Prefetch(Message):
    """Bring bytes in. Reply: `Done`."""

    mapping: int
    offset: int
    nbytes: int


class Resident(Message):
    """Bytes stay fit for system calls, until `ResidentOver` with the client's own `number` for them. Reply: `Done`."""

    mapping: int
    number: int
    offset: int
    nbytes: int
    write: bool


class ResidentOver(Message):
    """They need not any more. Reply: `Done`."""

    mapping: int
    number: int


class Repair(Message):
    """Give lost pages their right content. Reply: `Count` of bytes."""

    mapping: int
    offset: int
    data: bytes


class Discard(Message):
    """Give lost pages fresh content. Reply: `Count` of bytes."""

    mapping: int
    offset: int
    nbytes: int


class Lost(Message):
    """What is lost of the object. Reply: `Ranges`."""

    mapping: int


class Met(Message):
    """The losses that a guarded view has met, after its first `since`; the first `forget` will not be asked for again.

    Reply: `Ranges`, as they were met.
    """

    mapping: int
    since: int
    forget: int


class Flush(Message):
    """Write everything back. `errors`: as the last reply that the client has got said it. Reply: `Flushed`."""

    mapping: int
    errors: int


class ReportPage(Message):
    """A page is bad. `number`: another one for each report of the client; 0 if it is never asked again. Reply: `Handled`."""

    report: Report
    number: int = 0


class Restart(Message):
    """The manager of this `life` (see `Added`) ends, and another one takes over, of the version that is installed now.

    Reply, of that one, which is asked again: `Done`.
    """

    life: int


class ListObjects(Message):
    """Reply: `ObjectList`."""


class GetStatistics(Message):
    """Reply: `StatisticsReply`."""


class SyncLog(Message):
    """Write all events to the log. Reply: `LogPlace`."""


class Goodbye(Message):
    """The client has unmapped everything and goes. Reply: `Done`."""


# --- replies


class Done(Message):
    """It is done."""


class Added(Message):
    """The channel is there. `life`: how many managers there were, with this one, whose process is `pid`."""

    life: int
    pid: int


class Welcome(Message):
    """Descriptor: the board of guarded views' words (sealed), for a client that maps."""

    pid: int
    page_size: int
    instance: str
    poison_markers: bool
    policy: Policy


class Found(Message):
    """An object. Descriptor: its memory; map it MAP_SHARED if it is writable, MAP_PRIVATE and PROT_READ if not.

    `protect`: register it for write protection too, and protect all of it.
    """

    object: int
    name: str
    nbytes: int
    kind: str
    writable: bool
    protect: bool


class Mapped(Message):
    """`slot`: the words of the guarded view on the board. `errors`: what the first `Flush` has to say."""

    slot: int
    errors: int


class Flushed(Message):
    """`errors` counts those that the client is to be told of. `failed`, if there are some that it has not been told of, or
    if this very flush could not write everything (`unwritten`): then nothing is lost by it, and the next one tries again.
    Either is told as often as it is asked with the count from before.
    """

    errors: int
    failed: Failed | None = None
    unwritten: bool = False


class Losses(Message):
    """The number of losses, and those that stand, without numbers, by object and offset."""

    count: int
    standing: list[Told]


class Count(Message):
    """A number of bytes."""

    nbytes: int


class Ranges(Message):
    """Ranges of an object; `count`: for `Met`, how many losses the view has met."""

    ranges: list[tuple[int, int]]
    count: int = 0


class Handled(Message):
    """A failure."""

    failure: Failure


class ObjectInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What can be said of an object; sizes in bytes.

    `kind` is "anonymous" or "file", `mode` "r" or "r+"; `persistent`: it stays until it is unlinked. Of `nbytes`, `present`
    are in memory now, `dirty` are newer than the file, `lost` are gone until somebody repairs or discards them. `mappings`
    counts views, those of guards too; `pids` are the processes that have them.
    """

    name: str
    kind: str
    mode: str
    persistent: bool
    nbytes: int
    present: int
    dirty: int
    lost: int
    mappings: int
    pids: list[int]


class ObjectList(Message):
    """All objects."""

    objects: list[ObjectInfo]


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """Of one manager, since it started. Sizes in bytes.

    `pid`, `page_size`, `socket` (as `printable_path`) and `memory_limit` are the manager's, `keeper` is the process that it
    comes from; `memory_present` is what it holds now of all objects, for so many `clients` (with forked children that are
    about to come) and `objects`. `outcomes` and `states` count failures; reports of pages known to be bad are not counted
    among the outcomes, and among the states only as "already poisoned page". `restarts`: how often another manager has taken
    over; what is counted in `outcomes` and `states` goes on, the rest begins anew. `quarantined`: bad frames that are held.
    `faults`: accesses served. `read` from files, `written` to them, `dropped` to keep the limit. `accesses_to_lost` counts
    accesses, `events_dropped` events that could not be logged.
    """

    pid: int
    page_size: int
    socket: str
    memory_limit: int | None
    memory_present: int
    keeper: int
    restarts: int
    clients: int
    objects: int
    outcomes: dict[str, int]
    states: dict[str, int]
    quarantined: int
    faults: int
    read: int
    written: int
    dropped: int
    accesses_to_lost: int
    events_dropped: int


class StatisticsReply(Message):
    """The statistics."""

    statistics: Statistics


class LogPlace(Message):
    """Where the event log is; empty if there is none. `instance` begins the event ids of this manager."""

    path: bytes
    instance: str


class Failed(Message):
    """The request could not be done. `kind` is the name of the exception to raise."""

    kind: str
    errno: int
    text: str
    ranges: list[Range] = []


class Told(Message):
    """On the channel of `Listen`: a loss of the client's, its `number`th, of `object`. Names are used again, numbers not."""

    number: int
    object: int
    notice: Notice


class Elsewhere(Message):
    """A reply that is larger than a packet. Descriptor, the last one: a file with the reply."""


Request = (
    Hello | Device | AddChannel | Listen | Invite | Join | Standing | Allocate | Open | Unlink | Attach | Map | Unmap
    | Write | Prefetch | Resident | ResidentOver | Repair | Discard | Lost | Met | Flush | ReportPage | ListObjects
    | GetStatistics | SyncLog | Restart | Goodbye
)  # fmt: skip
Reply = (
    Done | Added | Welcome | Found | Mapped | Flushed | Losses | Count | Ranges | Handled | ObjectList | StatisticsReply
    | LogPlace | Failed | Told | Elsewhere
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)

encode = _encoder.encode

_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are no message, for text that is no UTF-8, and for a deep nesting."""


class MalformedError(ValueError):
    """A message that is none."""


class NoDescriptorError(OSError):
    """This process could not take the descriptors of a message: it has too many. `packet` is the message."""

    packet: bytes = b""


def decode_request(data: bytes) -> Request:
    """Raises `MalformedError`."""
    try:
        return _requests.decode(data)
    except _UNDECODABLE as error:
        raise MalformedError(f"this is no request of protocol version {VERSION}: {error}") from None


def decode_reply(data: bytes) -> Reply:
    """Raises `MalformedError`."""
    try:
        return _replies.decode(data)
    except _UNDECODABLE as error:
        raise MalformedError(f"this is no reply of protocol version {VERSION}: {error}") from None


# --- one packet


def send(channel: socket.socket, message: Message, fds: Sequence[int] = ()) -> None:
    """Send one message. Raises ValueError if it is too long, BlockingIOError, or OSError if the other end is gone."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        packet = encode(message)
    except OverflowError:
        raise ValueError("a number of more than 64 bits: sizes, offsets, addresses and frames have at most 64") from None
    if len(packet) > MESSAGE_LIMIT:
        raise ValueError(f"{len(packet)} bytes are too long for a message ({MESSAGE_LIMIT}); choose a shorter name or text")
    channel.sendmsg([packet], ancillary, socket.MSG_NOSIGNAL)


def send_reply(channel: socket.socket, reply: Message, fds: Sequence[int] = ()) -> None:
    """As `send`; a reply of any size."""
    packet = encode(reply)
    if len(packet) <= MESSAGE_LIMIT:
        send(channel, reply, fds)
        return
    place = os.memfd_create("hwpoison:reply", os.MFD_CLOEXEC)
    try:
        with os.fdopen(place, "wb", closefd=False) as file:
            file.write(packet)
        send(channel, Elsewhere(), [*fds, place])
    finally:
        os.close(place)


class Descriptors(list[int]):
    """Those of a reply. What is still in the list when nobody has that any more is closed: a signal handler may raise
    anywhere."""

    def close(self) -> None:
        while self:
            os.close(self.pop())

    __del__ = close


def receive_reply(channel: socket.socket) -> tuple[Reply, Descriptors]:
    """The reply and its descriptors. Raises EOFError if the other end is gone, `MalformedError`."""
    data, received = receive(channel)
    fds = Descriptors(received)
    if not data:
        raise EOFError("it closed the connection")
    reply = decode_reply(data)
    if isinstance(reply, Elsewhere) and fds:
        with os.fdopen(fds.pop(), "rb") as file:
            file.seek(0)
            reply = decode_reply(file.read())
    return reply, fds


_buffers: list[bytearray] = []
"""Those that are in nobody's hands: to allocate one for each message takes longer than all else that a small one needs."""


def receive(channel: socket.socket) -> tuple[bytes, list[int]]:
    """One packet and its descriptors (close-on-exec). b"" if the other end is gone or has sent an empty packet, which is no
    message. Raises `MalformedError` if too long, `NoDescriptorError`."""
    # Taken out of the list, and not one for each thread: a signal handler, or a garbage collection that finds a forgotten
    # memory, asks the manager something in the middle of this.
    try:
        buffer = _buffers.pop()
    except IndexError:
        buffer = bytearray(MESSAGE_LIMIT)
    try:
        return _received(channel, buffer)
    finally:
        _buffers.append(buffer)


def _received(channel: socket.socket, buffer: bytearray) -> tuple[bytes, list[int]]:
    packets: list[tuple[int, list[tuple[int, int, bytes]], int, object]] = []
    try:
        # Received and kept by one call into C: no signal handler can come between and raise.
        packets.extend(map(channel.recvmsg_into, [[buffer]], [_CONTROL_BYTES], [socket.MSG_CMSG_CLOEXEC]))
        nbytes, ancillary, flags, _ = packets[0]
        fds = _descriptors(ancillary)
        data = _checked(memoryview(buffer)[:nbytes], flags, len(fds))
    except BaseException:
        _close_all(packets)
        raise
    if not data:
        _close_all(packets)
        return data, []
    return data, fds


def _close_all(packets: list[tuple[int, list[tuple[int, int, bytes]], int, object]]) -> None:
    for _, ancillary, _, _ in packets:
        for fd in _descriptors(ancillary):
            os.close(fd)


_CONTROL_BYTES = socket.CMSG_SPACE(DESCRIPTOR_LIMIT * 4)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) // 4 * 4])
    return list(fds)


def _checked(packet: memoryview, flags: int, taken: int) -> bytes:
    if flags & socket.MSG_CTRUNC and taken < DESCRIPTOR_LIMIT:
        text = f"process {os.getpid()} has no file descriptors left; raise its limit (`ulimit -n`), or close something"
        error = NoDescriptorError(errno.EMFILE, text)
        error.packet = bytes(packet)
        raise error
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise MalformedError(f"a message has at most {MESSAGE_LIMIT} bytes and {DESCRIPTOR_LIMIT} descriptors")
    return bytes(packet)


# --- errors on the wire

_KINDS: dict[str, type[Exception]] = {
    one: getattr(builtins, one)
    for one in (
        "ValueError", "MemoryError", "OSError", "FileNotFoundError", "FileExistsError", "PermissionError",
        "IsADirectoryError", "ConnectionError", "RuntimeError",
    )
} | {"UnsupportedError": UnsupportedError}  # fmt: skip


def failed(error: Exception) -> Failed:
    """What to send for `error`: the nearest kind that the other side knows."""
    if isinstance(error, PoisonError):
        return Failed("PoisonError", error.errno or 0, str(error), list(error.ranges))
    kind = next((one.__name__ for one in type(error).__mro__ if one.__name__ in _KINDS), "RuntimeError")
    code = error.errno if isinstance(error, OSError) and error.errno else 0
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return Failed(kind, code, text[:TEXT_LIMIT].encode(errors="backslashreplace").decode())


def error_of(message: Failed) -> Exception:
    """The exception that `message` stands for."""
    if message.kind == "PoisonError":
        return PoisonError(message.ranges)
    kind = _KINDS.get(message.kind, RuntimeError)
    if issubclass(kind, OSError):
        defaults: dict[type[Exception], int] = {
            FileNotFoundError: errno.ENOENT,
            FileExistsError: errno.EEXIST,
            PermissionError: errno.EACCES,
        }
        code = message.errno or defaults.get(kind, 0)
        return kind(code, message.text) if code else kind(message.text)
    return kind(message.text)


# --- addresses


def printable_path(path: str) -> str:
    """A path as text that can be sent: bytes of it that are no UTF-8 are written as \\xNN, as in the names of objects."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def address_of(name: str) -> str:
    """A socket's address for `connect` and `bind`: a name that begins with @ is in the abstract namespace.

    Raises OSError if it is too long.
    """
    if len(os.fsencode(name)) > ADDRESS_LIMIT:
        raise OSError(errno.ENAMETOOLONG, f"a socket's path has at most {ADDRESS_LIMIT} bytes; choose a shorter one")
    return "\0" + name[1:] if name.startswith("@") else name
