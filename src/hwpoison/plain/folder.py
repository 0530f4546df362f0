"""What takes the place of the manager: a folder that goes with the process that has made it.

An object is an entry there, which says what it is, and for anonymous memory a file beside it with the bytes. Who has an
object open has a lock on its entry, so the last one, or whoever comes after that was killed, takes it away.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from hwpoison.core.records import NAME_LIMIT

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:
    # Windows. Entries go with their folder there.
    fcntl = None

GONE = "the manager whose folder was {} has ended; open a new one with Manager()"
MANAGER = "manager"
"""The file that says why memory is not managed, and the manager's policy."""
ENTRY, BYTES, PERSISTENT = ".entry", ".memory", ".persistent"
"""How the names of an object's files end; the last is there if it stays without anybody who has it open."""


class Entry(NamedTuple):
    """What is said of an object: `nbytes` of the file at `path` from `offset` on."""

    name: str
    kind: str
    mode: str
    path: str
    offset: int
    nbytes: int


class Held:
    """An object that somebody in this process has open; `number` tells it from a later one of its name."""

    def __init__(self, entry: Entry, place: str, fd: int) -> None:
        self.entry = entry
        self.number = os.fstat(fd).st_ino
        self._place = place
        self._fd = fd
        self._owner = os.getpid()

    def let_go(self) -> None:
        """Nobody here has it any more. A forked child has it from its parent, and leaves it to that."""
        if os.getpid() == self._owner:
            if fcntl is not None:
                # Children have copies of the descriptor.
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            _remove_if_unused(self._place)


class Folder:
    """One manager's."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._owner = os.getpid()
        self._numbers = count(1)

    @property
    def why(self) -> str:
        """Why nothing is managed."""
        return str(json.loads(self._file(MANAGER).read_text())[0])

    @property
    def policy(self) -> str:
        """The manager's."""
        return str(json.loads(self._file(MANAGER).read_text())[1])

    def add(self, name: str | None, kind: str, mode: str, path: str, offset: int, nbytes: int, *, persistent: bool) -> Held:
        """A new object; without a `name` it gets one. Anonymous memory is all zeros. Raises FileExistsError, OSError."""
        # The second time: who was quicker may have gone meanwhile.
        for one in map("anonymous-{}".format, self._numbers) if name is None else (name, name):
            if not 0 < len(one) <= NAME_LIMIT or "\0" in one:
                raise ValueError(f"an object's name has 1 to {NAME_LIMIT} characters, and no NUL among them")
            place = self._place(one)
            _remove_if_unused(place)
            with suppress(FileExistsError), self._there():
                where = path or place + BYTES
                return _added(Entry(one, kind, mode, where, offset, nbytes), place, persistent=persistent)
        why = f"the name {name!r} is taken by another object; pass another name=, or attach({name!r})"
        raise FileExistsError(errno.EEXIST, why)

    def find(self, name: str) -> Held:
        """Raises FileNotFoundError."""
        place = self._place(name)
        _remove_if_unused(place)
        with suppress(FileNotFoundError), self._there():
            fd = _locked(place)
            try:
                if entry := _said_at(place):
                    return Held(entry, place, fd)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
        raise _no_object(name)

    def entries(self) -> list[tuple[Entry, bool]]:
        """All objects, and whether each is persistent."""
        found = []
        if not os.path.isdir(self.path):
            raise ConnectionError(GONE.format(self.path))
        for file in sorted(Path(self.path).glob("*" + ENTRY)):
            _remove_if_unused(place := str(file).removesuffix(ENTRY))
            with suppress(FileNotFoundError):
                if entry := _said_at(place):
                    found.append((entry, os.path.exists(place + PERSISTENT)))
        return found

    def unlink(self, name: str) -> None:
        """It is persistent no more. Raises FileNotFoundError."""
        place = self._place(name)
        try:
            os.unlink(place + PERSISTENT)
        except FileNotFoundError:
            if not os.path.exists(place + ENTRY):
                raise _no_object(name) from None
        _remove_if_unused(place)

    def remove(self) -> None:
        """The manager is closed. Where a mapped file can't be deleted, it stays. A forked child leaves it to its parent."""
        if os.getpid() == self._owner:
            gone = self.path + ".gone"
            # From here on nobody puts anything there any more.
            with suppress(OSError):
                os.rename(self.path, gone)
            shutil.rmtree(gone, ignore_errors=True)
            shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def _there(self) -> Iterator[None]:
        """Raises ConnectionError if what is not found is the whole folder."""
        try:
            yield
        except FileNotFoundError:
            if not os.path.isdir(self.path):
                raise ConnectionError(GONE.format(self.path)) from None
            raise

    def _file(self, name: str) -> Path:
        return Path(self.path, name)

    def _place(self, name: str) -> str:
        """What its files' names begin with: a name may be longer than a file's, and have any sign in it."""
        return str(self._file(hashlib.sha256(name.encode()).hexdigest()))


def _no_object(name: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, f"there is no object {name!r}")


def make_folder(why: str, policy: str) -> Folder:
    """A new one."""
    try:
        path = tempfile.mkdtemp(prefix="hwpoison-", dir="/dev/shm")
    except OSError:
        path = tempfile.mkdtemp(prefix="hwpoison-")
    folder = Folder(path)
    Path(folder.path, MANAGER).write_text(json.dumps([why, policy]))
    return folder


def _said_at(place: str) -> Entry | None:
    """None: it is just being made. Raises FileNotFoundError."""
    try:
        return Entry(*json.loads(Path(place + ENTRY).read_bytes()))
    except ValueError:
        return None


def _locked(place: str, *, new: bool = False) -> int:
    """A descriptor of an entry, which stays as long as that does. Raises FileNotFoundError if the last one has just gone."""
    flags = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOINHERIT", 0)
    fd = os.open(place + ENTRY, flags | (os.O_CREAT | os.O_EXCL if new else 0), 0o600)
    try:
        if fcntl is not None:
            fcntl.flock(fd, fcntl.LOCK_SH)
            if not os.fstat(fd).st_nlink:
                raise FileNotFoundError(place)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _added(entry: Entry, place: str, *, persistent: bool) -> Held:
    try:
        fd = _locked(place, new=True)
    except FileNotFoundError:
        if not os.path.isdir(os.path.dirname(place)):
            raise
        # Who has found it unlocked has taken it away.
        raise FileExistsError from None
    try:
        if entry.kind == "anonymous":
            with open(entry.path, "wb") as file:
                file.truncate(entry.nbytes)
        if persistent:
            Path(place + PERSISTENT).touch()
        Path(place + ENTRY).write_text(json.dumps(entry))
        return Held(entry, place, fd)
    except BaseException:
        os.close(fd)
        for end in (PERSISTENT, BYTES, ENTRY):
            with suppress(OSError):
                os.unlink(place + end)
        raise


def _remove_if_unused(place: str) -> None:
    if fcntl is not None and not os.path.exists(place + PERSISTENT):
        with suppress(OSError), open(place + ENTRY, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Else another one has taken it away, and a new one may be there.
            unused = os.path.samestat(os.fstat(file.fileno()), os.stat(place + ENTRY))
            for end in (BYTES, ENTRY) if unused else ():
                with suppress(FileNotFoundError):
                    os.unlink(place + end)
