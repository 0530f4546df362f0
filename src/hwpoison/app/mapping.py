"""How an object comes to be at an address of this process: mapped, registered, and made known, in this order.

An unregistered mapping would read absent pages as zeros. So a forked child inherits none (MADV_DONTFORK): it makes each
anew, at the same address, with a userfaultfd of its own, see `again`.
"""

from __future__ import annotations

import errno
import mmap
import random
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

from hwpoison import protocol
from hwpoison.core.records import Policy
from hwpoison.linux import syscalls, userfaultfd
from hwpoison.linux.syscalls import PAGE_SIZE

if TYPE_CHECKING:
    from hwpoison.app.connection import Channel, Connection


PLACES_MAX = 16
"""So many are tried for a mapping that is to be far from others."""
PLACE_ALIGNMENT = 1 << 20
# The other one is the program's own, which may count on what comes next.
_chance = random.SystemRandom()


class Watch(weakref.ref[mmap.mmap]):
    """Sees the end of a mapping. What is done then must be one call into C, which no signal handler can interrupt."""

    __slots__ = ("name", "number")
    __hash__ = object.__hash__
    __eq__ = object.__eq__

    number: int
    """The client's own, for the manager."""
    name: str


class Mapping(mmap.mmap):
    """`memory`: what is kept by the mapping's views, where that is wanted."""

    __slots__ = ("memory",)
    memory: object

    def resize(self, newsize: int) -> None:
        raise SystemError("managed memory has the size that it was made with")


class Mapped:
    """What must be known of a mapping to make it again. `nbytes` in whole pages."""

    __slots__ = ("address", "connection", "errors", "found", "guarded", "nbytes", "number", "policy", "slot", "told")

    def __init__(self, connection: Connection, found: protocol.Found, *, guarded: bool, address: int, nbytes: int) -> None:
        self.connection = connection
        self.found = found
        self.guarded = guarded
        self.address = address
        self.nbytes = nbytes
        self.number = 0
        self.slot = -1
        """Of a guarded view, on the board."""
        self.errors = 0
        """What the first `Flush` has to say."""
        self.told = False
        """The manager knows of it."""
        self.policy: Policy | None = None
        """Of its memory, if that has one of its own."""


_mapped: dict[Watch, Mapped] = {}
"""Every mapping of this process. A connection lives as long as one of its mappings does: a forked child needs it."""


def all_mapped() -> list[Mapped]:
    """Those that have not been unmapped."""
    there = [(watch(), one) for watch, one in list(_mapped.items())]
    return [one for mapping, one in there if mapping is not None and not mapping.closed]


def forget(mapped: Mapped) -> None:
    """In a forked child: it can't be had again, and stays fenced there and in whatever is forked from there."""
    for watch, one in list(_mapped.items()):
        if one is mapped:
            _mapped.pop(watch, None)


def _flags(found: protocol.Found, *, guarded: bool) -> tuple[int, int]:
    """Of mmap: flags, protection."""
    if guarded or not found.writable:
        return mmap.MAP_PRIVATE, mmap.PROT_READ
    return mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE


def _keep_plain(address: int, nbytes: int) -> None:
    syscalls.advise(address, nbytes, mmap.MADV_DONTFORK)
    # A page within a large frame can't be isolated alone.
    try:
        syscalls.advise(address, nbytes, syscalls.MADV_NOHUGEPAGE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def map_object(fd: int, found: protocol.Found, *, guarded: bool) -> Mapping:
    """The memory `fd` of an object, mapped and not yet registered."""
    mapping = _map_apart(fd, -(-found.nbytes // PAGE_SIZE) * PAGE_SIZE, *_flags(found, guarded=guarded))
    _keep_plain(syscalls.address_of(mapping), len(mapping))
    return mapping


def _map_apart(fd: int, nbytes: int, flags: int, protection: int) -> Mapping:
    """A mapping far from where the kernel puts what is mapped later.

    A child that C code has forked has nothing at our addresses, and nothing else must come there by itself: views would show
    it. Where that can't be had, it is where the kernel puts it.
    """
    # Not the object yet: what a signal handler that raises leaves behind is addresses, and nobody's memory.
    try:
        mapping = Mapping(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | syscalls.MAP_NORESERVE, protection)
    except OSError:
        # As much memory would not be had (overcommit_memory 2, `ulimit -d`), which the object's mapping does not need.
        mapping = Mapping(fd, nbytes, flags, protection)
    usual = syscalls.address_of(mapping)
    address = _reserved(nbytes, usual) or usual
    try:
        syscalls.map_memory(nbytes, protection, flags | syscalls.MAP_FIXED, fd, address)
    except OSError:
        if address != usual:
            syscalls.unmap_memory(address, nbytes)
        raise
    if address != usual and not syscalls.move(mapping, address):
        syscalls.unmap_memory(address, nbytes)
        syscalls.map_memory(nbytes, protection, flags | syscalls.MAP_FIXED, fd, usual)
    return mapping


def _reserved(nbytes: int, usual: int) -> int:
    """An address in the second quarter of the address space, at whose end (`usual`) the kernel puts mappings. 0: none.

    It is taken until something is mapped there.
    """
    lowest = usual // 4
    for _ in range(PLACES_MAX if nbytes < lowest // 2 else 0):
        # By chance: whoever else does this, another copy of the client in C say, does not begin where this one does.
        place = (lowest + _chance.randrange(lowest - nbytes)) // PLACE_ALIGNMENT * PLACE_ALIGNMENT
        with suppress(OSError):
            syscalls.fence(place, nbytes)
            return place
    return 0


def register(
    connection: Connection,
    mapping: mmap.mmap,
    found: protocol.Found,
    *,
    guarded: bool,
    channel: Channel | None = None,
    number: int | None = None,
) -> Mapped:
    """Register it, and only then let the manager, and then anybody, know of it. Raises ValueError if all is closed."""
    address = syscalls.address_of(mapping)
    _watch_faults(connection, found, address, len(mapping), guarded=guarded)
    mapped = Mapped(connection, found, guarded=guarded, address=address, nbytes=len(mapping))
    mapped.number = connection.new_number() if number is None else number
    # Of several, what was made first is called last: then the others know that it is gone.
    weakref.finalize(mapping, connection.mapping_gone).atexit = False
    _mapped[Watch(mapping, _mapped.pop)] = mapped
    # Before it is known: if this is interrupted, the manager may know it and we may not.
    connection.watch_mapping(mapping, found.name, mapped.number)
    _tell(connection, mapped, channel)
    return mapped


def _watch_faults(connection: Connection, found: protocol.Found, address: int, nbytes: int, *, guarded: bool) -> None:
    opened = connection.descriptor
    if opened is None:
        raise ValueError(f"memory {found.name!r} is closed")
    protect = found.protect and not guarded
    mode = userfaultfd.MODE_MISSING | (userfaultfd.MODE_WRITE_PROTECT if protect else 0)
    userfaultfd.register(opened.number, address, nbytes, mode)
    if protect:
        userfaultfd.protect(opened.number, address, nbytes, on=True)


def _tell(connection: Connection, mapped: Mapped, channel: Channel | None) -> None:
    request = protocol.Map(mapped.found.object, mapped.address, mapped.number, mapped.guarded)
    if channel is None:
        reply = connection.request(request, protocol.Mapped)
    else:
        reply = connection.ask(channel, request, protocol.Mapped)[0]
    mapped.slot, mapped.errors, mapped.told = reply.slot, reply.errors, True


# --- in a forked child


def fence(mapped: Mapped) -> None:
    """Nothing else may come to its addresses: views of it would show that. Raises OSError if something has."""
    syscalls.fence(mapped.address, mapped.nbytes)


def again(mapped: Mapped, channel: Channel) -> None:
    """In place of its fence. Raises OSError if the object can't be had any more, or not be mapped."""
    connection, wanted = mapped.connection, mapped.found
    request = protocol.Attach(wanted.name, wanted.object, mapped.number)
    mapped.found, fds = connection.ask(channel, request, protocol.Found)
    flags, protection = _flags(mapped.found, guarded=mapped.guarded)
    try:
        syscalls.map_memory(mapped.nbytes, protection, flags | syscalls.MAP_FIXED, fds[0], mapped.address)
    finally:
        fds.close()
    try:
        _keep_plain(mapped.address, mapped.nbytes)
        _watch_faults(connection, mapped.found, mapped.address, mapped.nbytes, guarded=mapped.guarded)
        _tell(connection, mapped, channel)
    except BaseException:
        # Never unregistered: zeros, for everybody.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | syscalls.MAP_FIXED | syscalls.MAP_NORESERVE
        with suppress(OSError):
            syscalls.map_memory(mapped.nbytes, 0, flags, -1, mapped.address)
        raise
