"""The wire: whatever a client sends, or stops sending, the manager carries on and no other client notices.

One manager serves all tests here, with a witness: an ordinary client that has memory, and listens. After each test the
witness must have noticed nothing, and the manager must hold as many descriptors as before.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hwpoison
from hwpoison import protocol
from hwpoison.core.records import Failure, Notice, Outcome, Report, State
from hwpoison.linux import syscalls, userfaultfd
from hwpoison.linux.quarantine import PIPE_FRAMES
from hwpoison.linux.syscalls import PAGE_SIZE
from hwpoison.service.channel import NOTICES_LIMIT
from tests.service.raw import FILE_PAGES, STRAY, VANISH, RawClient, dirty
from tests.support import SECONDS_MAX, need, wait_until

SERVE = "import sys; from hwpoison.service.daemon import serve; sys.exit(serve(sys.argv[1]))"
NOBODY, SOMEBODY_ELSE = 65534, 65533
PATTERN = bytes(range(256)) * (PAGE_SIZE // 256)


class Served:
    """A manager process, and the witness that it serves."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "socket")
        self._stderr = folder / "stderr"
        with self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen([sys.executable, "-P", "-c", SERVE, self.path], stderr=stderr)
        try:
            self._begin()
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise

    def _begin(self) -> None:
        wait_until(lambda: _connects(self.path) or self._process.poll() is not None, "the manager serves")
        assert self._process.poll() is None, self._stderr.read_text()
        self._manager = hwpoison.connect(self.path)
        self._notices: list[Notice] = []
        self._witness = self._manager.allocate(4096 * PAGE_SIZE, "witness")
        self._witness.on_failure(self._notices.append)
        self._witness.write(0, PATTERN)
        self._used = 1
        self._said = 0
        # The first failure and the first events make what is kept for all later ones.
        self._manager.inject(self._witness, 0)
        wait_until(lambda: self._notices, "the witness is told of its own loss")
        self._witness.write(0, PATTERN)
        list(self._manager.events())
        self._descriptors = self._count_descriptors()

    def inject(self, name: str, page: int) -> Failure:
        """A failure that somebody else than the client under test reports."""
        return self._manager.inject(name, page * PAGE_SIZE)

    def _count_descriptors(self) -> Counter[str]:
        folder = f"/proc/{self._process.pid}/fd"
        found: Counter[str] = Counter()
        for fd in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError):
                found[os.readlink(f"{folder}/{fd}").split(":[")[0]] += 1
        # The quarantine grows, and that is right.
        frames = self._manager.statistics().quarantined // PAGE_SIZE
        found["pipe"] -= 2 * -(-frames // PIPE_FRAMES)
        return found

    def _let_everybody_in(self) -> None:
        """Return when the manager has accepted all who have connected so far; it accepts them in their order.

        A connection that was dropped may still wait for that. Until then nothing in the manager can be counted for it, and
        the manager can look just as before between two of them. From here on it can only get rid of some.
        """
        last = RawClient(self.path)
        assert isinstance(last.ask(protocol.Hello()), protocol.Welcome)
        last.close()

    def assert_well(self) -> None:
        """The manager is as it was, and the witness has noticed nothing."""
        assert self._process.poll() is None, self._stderr.read_text()
        self._let_everybody_in()
        assert self._witness.read(0, PAGE_SIZE) == PATTERN
        # A page that is touched for the first time: by a fault of the witness, and by the manager.
        self._used += 1
        start = self._used * PAGE_SIZE
        assert self._witness.buffer[start : start + PAGE_SIZE] == bytes(PAGE_SIZE)
        self._witness.write(start, PATTERN)
        assert self._witness.read(start, PAGE_SIZE) == PATTERN
        assert len(self._notices) == 1
        wait_until(lambda: [one.name for one in self._manager.objects()] == ["witness"], "other objects are gone", 10)
        wait_until(lambda: self._manager.statistics().clients == 1, "other clients are gone", 10)
        self._assert_descriptors_are_closed()
        said = self._stderr.read_text()[self._said :]
        self._said += len(said)
        assert "defect" not in said, said
        assert "Traceback" not in said, said

    def _assert_descriptors_are_closed(self) -> None:
        before = self._descriptors

        def as_before() -> bool:
            self._descriptors = self._count_descriptors()
            return self._descriptors == before

        with contextlib.suppress(AssertionError):
            wait_until(as_before, "descriptors are closed", 10)
        # By what was seen last, not by another look. It is kept: what one test leaves is not held against the next one.
        assert self._descriptors == before, (
            f"the manager has {dict(self._descriptors - before)} more and {dict(before - self._descriptors)} fewer; "
            f"the witness has {len(self._manager.connection._idle)} channels that are idle"
        )

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)
        wait_until(lambda: ") T " in Path(f"/proc/{self._process.pid}/stat").read_text(), "the manager is stopped")

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        try:
            self._manager.close()
        finally:
            self._process.send_signal(signal.SIGTERM)
            status = self._process.wait(SECONDS_MAX)
        assert status == 0
        assert not os.path.exists(self.path)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("served"))
    yield served
    served.close()


@pytest.fixture(autouse=True)
def well_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "served" in request.fixturenames:
        served: Served = request.getfixturevalue("served")
        served.assert_well()


@pytest.fixture
def raw(served: Served) -> Iterator[RawClient]:
    """A channel on which nothing was said yet."""
    client = RawClient(served.path)
    yield client
    client.close()


@pytest.fixture
def client(raw: RawClient) -> RawClient:
    """A client after its Hello."""
    return raw.hello()


@pytest.fixture
def vanishing(served: Served) -> Path:
    """The file that the processes in `raw` open."""
    path = Path(served.path).with_name("vanishing")
    path.write_bytes(b"." * FILE_PAGES * PAGE_SIZE)
    return path


# --- messages that are none

GARBAGE = {
    "zeros": bytes(64),
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "a number": b"\x05",
    "half a message": protocol.encode(protocol.Allocate(PAGE_SIZE, "half"))[:-2],
    "a message and more": protocol.encode(protocol.Allocate(PAGE_SIZE, "more")) + b"\0",
    "an unknown type": msgspec.msgpack.encode(["Explode", 1]),
    "a reply": protocol.encode(protocol.Done()),
    "a field of the wrong type": msgspec.msgpack.encode(["Allocate", "many", None]),
    "too few fields": msgspec.msgpack.encode(["Map", 1]),
    "text that is no UTF-8": b"\x92\xa6Attach\xa2\xff\xfe",
    "a number of more than 64 bits": b"\x93\xa8Allocate\xc7\x10\x00" + bytes(16) + b"\xc0",
    "a nesting without end": b"\x93\xa5Hello\x01" + b"\x91" * 100_000 + b"\xc0",
    "a length that is not there": b"\x92\xa6Attach\xdb\xff\xff\xff\xff",
}


@pytest.mark.parametrize("what", GARBAGE)
def test_a_packet_that_is_no_request_is_refused_and_the_channel_stays(client: RawClient, what: str) -> None:
    assert client.error(GARBAGE[what]) == "ValueError"
    assert isinstance(client.ask(protocol.GetStatistics()), protocol.StatisticsReply)


def test_a_message_that_is_too_long_is_refused_and_the_channel_stays(client: RawClient) -> None:
    assert client.error(protocol.encode(protocol.Attach("n" * protocol.MESSAGE_LIMIT))) == "ValueError"
    assert isinstance(client.ask(protocol.GetStatistics()), protocol.StatisticsReply)


def test_an_empty_packet_ends_the_channel_and_its_descriptors(client: RawClient) -> None:
    client.send(b"", (0, 1, 2))
    with pytest.raises(EOFError):
        client.receive()


@given(st.binary(max_size=200))
def test_no_bytes_decode_to_anything_but_a_request_or_a_malformed_error(data: bytes) -> None:
    with contextlib.suppress(protocol.MalformedError):
        assert isinstance(protocol.decode_request(data), protocol.Message)


@given(
    st.sampled_from(protocol.Request.__args__).map(lambda one: one.__name__),
    st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.binary() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=5,
        ),
        max_size=5,
    ),
)
def test_no_fields_decode_to_anything_but_a_request_or_a_malformed_error(kind: str, fields: list[object]) -> None:
    with contextlib.suppress(protocol.MalformedError):
        request = protocol.decode_request(msgspec.msgpack.encode([kind, *fields]))
        assert type(request).__name__ == kind


# --- the beginning

REQUESTS: list[protocol.Message] = [
    protocol.Allocate(PAGE_SIZE),
    protocol.Attach("witness"),
    protocol.Map(1, PAGE_SIZE, 1),
    protocol.ReportPage(Report(name="witness", offset=0)),
    protocol.ListObjects(),
    protocol.SyncLog(),
    protocol.Goodbye(),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda one: type(one).__name__)
def test_nothing_is_done_for_a_client_that_has_not_said_hello(raw: RawClient, request_: protocol.Message) -> None:
    assert raw.error(request_) == "ConnectionError"


def test_a_client_of_another_version_is_told_to_install_the_same(raw: RawClient) -> None:
    reply = raw.ask(protocol.Hello(protocol.VERSION + 1))
    assert isinstance(reply, protocol.Failed)
    assert reply.kind == "ConnectionError"
    assert "install the same version" in reply.text


def test_a_second_hello_is_refused(client: RawClient) -> None:
    assert client.error(protocol.Hello(), (client.userfaultfd,)) == "ConnectionError"


@pytest.mark.parametrize("kind", ["pipe", "file", "memfd", "socket", "unopened userfaultfd", "userfaultfd with events"])
def test_a_descriptor_that_is_no_userfaultfd_as_it_must_be_is_refused(raw: RawClient, kind: str, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        if kind == "pipe":
            fds = os.pipe()
        elif kind == "file":
            fds = (os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT),)
        elif kind == "memfd":
            fds = (os.memfd_create("memory"),)
        elif kind == "socket":
            fds = (socket.socket(socket.AF_UNIX).detach(),)
        elif kind == "unopened userfaultfd":
            fds = (userfaultfd._open()[0],)
        else:
            # Events of fork come with a descriptor each, for the process that reads them: the manager.
            need(os.geteuid() == 0, "the privilege to ask for events of fork")
            fds = (userfaultfd.open_userfaultfd(userfaultfd.NEEDED | userfaultfd.Feature(1 << 1)).fd,)
        for fd in fds:
            stack.callback(os.close, fd)
        assert raw.error(protocol.Hello(), (fds[0],)) == "ValueError"


def test_more_descriptors_than_a_message_can_have_are_refused(raw: RawClient) -> None:
    ends = os.pipe()
    try:
        assert raw.error(protocol.Hello(), ends * protocol.DESCRIPTOR_LIMIT) == "ValueError"
    finally:
        for end in ends:
            os.close(end)


def test_descriptors_that_no_message_asked_for_are_closed(client: RawClient) -> None:
    assert isinstance(client.ask(protocol.ListObjects(), (0, 1, 2)), protocol.ObjectList)


@pytest.mark.parametrize("kind", [protocol.AddChannel, protocol.Listen])
def test_a_channel_that_is_no_such_socket_is_refused(client: RawClient, kind: type[protocol.AddChannel]) -> None:
    ends = os.pipe()
    stream, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with stream, other:
        assert client.error(kind()) == "ValueError"
        assert client.error(kind(), (ends[0],)) == "ValueError"
        assert client.error(kind(), (stream.fileno(),)) == "ValueError"
    for end in ends:
        os.close(end)


# --- requests that make no sense

WRONG_SIZES = [0, -1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


@pytest.mark.parametrize("nbytes", WRONG_SIZES)
def test_memory_of_a_size_that_cannot_be_is_refused(client: RawClient, nbytes: int) -> None:
    assert client.error(protocol.Allocate(nbytes)) in ("ValueError", "MemoryError", "OSError")


@pytest.mark.parametrize("name", ["", "\0", "n" * 100_000, "\x01" * 60_000], ids=["empty", "NUL", "long", "long when shown"])
def test_a_name_that_cannot_be_is_refused(client: RawClient, name: str) -> None:
    assert client.error(protocol.Allocate(PAGE_SIZE, name)) == "ValueError"


def test_a_name_of_many_bytes_a_character_is_a_name(client: RawClient) -> None:
    name = "記憶" * 100
    client.mapped(protocol.Allocate(PAGE_SIZE, name))
    reply = client.ask(protocol.ListObjects())
    assert isinstance(reply, protocol.ObjectList)
    assert name in [one.name for one in reply.objects]


def test_a_name_that_is_taken_or_unknown_is_refused(client: RawClient) -> None:
    assert client.error(protocol.Allocate(PAGE_SIZE, "witness")) == "FileExistsError"
    assert client.error(protocol.Attach("nobody")) == "FileNotFoundError"


@pytest.mark.parametrize("kind", [protocol.Allocate(PAGE_SIZE, "unmapped"), protocol.Attach("witness")])
def test_a_client_without_a_userfaultfd_gets_no_memory_and_leaves_none(raw: RawClient, kind: protocol.Message) -> None:
    raw.ask(protocol.Hello())
    assert raw.error(kind) == "PermissionError"


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, 0), (0, -1), (1, PAGE_SIZE), (1 << 63, 1), (0, 1 << 63)])
def test_a_range_outside_the_file_is_refused(client: RawClient, tmp_path: Path, offset: int, nbytes: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(PATTERN)
    with path.open("rb") as file:
        message = protocol.Open(str(path), offset, nbytes, writable=False)
        assert client.error(message, (file.fileno(),)) == "ValueError"


def test_a_descriptor_that_cannot_back_an_object_as_asked_is_refused(client: RawClient, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(PATTERN)
    opened = [
        os.open(path, os.O_RDONLY),
        os.open(path, os.O_WRONLY),
        # Every write would go to its end.
        os.open(path, os.O_RDWR | os.O_APPEND),
        os.open(tmp_path, os.O_RDONLY),
        *os.pipe(),
    ]
    try:
        kinds = [client.error(protocol.Open("file", 0, None, writable=True), (fd,)) for fd in opened]
    finally:
        for fd in opened:
            os.close(fd)
    assert kinds == ["PermissionError", "PermissionError", "ValueError", "IsADirectoryError", "ValueError", "ValueError"]
    assert client.error(protocol.Open("file", 0, None, writable=True)) == "ValueError"


@pytest.mark.parametrize(
    "what", ["nothing", "not registered", "other memory", "the middle is not", "the last page is not", "not watched"]
)
def test_a_mapping_that_is_not_registered_is_refused(client: RawClient, tmp_path: Path, what: str) -> None:
    """Its absent pages would be zeros, for everybody."""
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * PAGE_SIZE))
    with path.open("r+b") as file:
        watched = protocol.Open("file", 0, None, writable=True)
        asked = (watched, (file.fileno(),)) if what == "not watched" else (protocol.Allocate(3 * PAGE_SIZE),)
        found, memory = client.found(*asked)
    room = mmap.mmap(-1, 3 * PAGE_SIZE, mmap.MAP_PRIVATE) if what == "other memory" else mmap.mmap(memory, 3 * PAGE_SIZE)
    address = syscalls.address_of(room)
    if what in ("the last page is not", "not watched"):
        nbytes = 3 * PAGE_SIZE if what == "not watched" else 2 * PAGE_SIZE
        userfaultfd.register(client.userfaultfd, address, nbytes, userfaultfd.MODE_MISSING)
    if what == "the middle is not":
        for page in (0, 2):
            userfaultfd.register(client.userfaultfd, address + page * PAGE_SIZE, PAGE_SIZE, userfaultfd.MODE_MISSING)
    if what == "nothing":
        room.close()
    assert client.error(protocol.Map(found.object, address, 1)) == "ValueError"
    os.close(memory)


@pytest.mark.parametrize("address", [0, -PAGE_SIZE, 1 << 20 | 1, 1 << 62, 1 << 63, (1 << 64) - PAGE_SIZE])
def test_a_mapping_where_none_can_be_is_refused(client: RawClient, address: int) -> None:
    found, memory = client.found(protocol.Allocate(2 * PAGE_SIZE))
    os.close(memory)
    assert client.error(protocol.Map(found.object, address, 1)) == "ValueError"


def test_a_mapping_over_another_one_takes_its_place_until_the_client_says_that_the_old_one_is_gone(
    client: RawClient,
) -> None:
    found, memory = client.found(protocol.Allocate(2 * PAGE_SIZE))
    # Where it says that it has mapped it, there is something that is registered.
    os.close(memory)
    memory = os.memfd_create("registered")
    os.ftruncate(memory, 4 * PAGE_SIZE)
    room = mmap.mmap(memory, 4 * PAGE_SIZE)
    os.close(memory)
    address = syscalls.address_of(room) + PAGE_SIZE
    userfaultfd.register(client.userfaultfd, address - PAGE_SIZE, 4 * PAGE_SIZE, userfaultfd.MODE_MISSING)
    numbers = []
    for number, overlapping in enumerate((address, address - PAGE_SIZE, address, address + PAGE_SIZE)):
        assert isinstance(client.ask(protocol.Map(found.object, overlapping, number)), protocol.Mapped)
        # As after the manager's death: what was done is not done again.
        assert isinstance(client.ask(protocol.Map(found.object, overlapping, number)), protocol.Mapped)
        assert client.error(protocol.Map(found.object, overlapping + 16 * PAGE_SIZE, number)) == "ValueError"
        numbers.append(number)
        assert _listed(client, found.name).mappings == 1
    for number in numbers:
        assert isinstance(client.ask(protocol.Flush(number, 0)), protocol.Flushed)
        assert isinstance(client.ask(protocol.Unmap(number)), protocol.Done)
    reply = client.ask(protocol.ListObjects())
    assert isinstance(reply, protocol.ObjectList)
    assert found.name not in [one.name for one in reply.objects]


def _listed(client: RawClient, name: str) -> protocol.ObjectInfo:
    reply = client.ask(protocol.ListObjects())
    assert isinstance(reply, protocol.ObjectList)
    return next(one for one in reply.objects if one.name == name)


def test_only_an_object_that_was_given_to_the_client_can_be_mapped_by_it(client: RawClient) -> None:
    # The witness's object has the lowest number.
    for number in (*range(-1, 10), 1 << 63):
        assert client.error(protocol.Map(number, 1 << 30, 1)) == "ValueError"


def test_a_client_uses_its_own_mappings_only(client: RawClient) -> None:
    for number in (-1, 0, 1, 2, 3, 4, 5, 1 << 63):
        for request in (
            protocol.Unmap(number),
            protocol.Write(number, 0, b"x"),
            protocol.Prefetch(number, 0, 1),
            protocol.Repair(number, 0, PATTERN),
            protocol.Discard(number, 0, 1),
            protocol.Lost(number),
            protocol.Met(number, 0, 0),
            protocol.Flush(number, 0),
        ):
            assert client.error(request) == "ValueError"


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, -1), (0, 2 * PAGE_SIZE + 1), (1 << 63, 1), (1, (1 << 64) - 1)])
def test_bytes_outside_an_object_are_refused(client: RawClient, offset: int, nbytes: int) -> None:
    _, number = client.mapped(protocol.Allocate(2 * PAGE_SIZE, "small"))
    assert client.error(protocol.Prefetch(number, offset, nbytes)) == "ValueError"
    assert client.error(protocol.Discard(number, offset, nbytes)) == "ValueError"
    outside = offset if offset not in (0, 1) else 2 * PAGE_SIZE
    assert client.error(protocol.Write(number, outside, b"xx")) == "ValueError"
    assert client.error(protocol.Repair(number, outside, b"xx")) == "ValueError"
    assert client.error(protocol.ReportPage(Report(name="small", offset=outside))) == "ValueError"


def test_numbers_that_make_no_sense_in_met_find_nothing(client: RawClient) -> None:
    _, number = client.mapped(protocol.Allocate(PAGE_SIZE))
    for since, forget in ((-1, -1), (1 << 63, 1 << 63), (0, (1 << 64) - 1)):
        assert client.ask(protocol.Met(number, since, forget)) == protocol.Ranges([], 0)


WRONG_REPORTS = {
    "nothing": Report(),
    "a name alone": Report(name="witness"),
    "an offset alone": Report(offset=0),
    "a process alone": Report(pid=1),
    "an address alone": Report(address=PAGE_SIZE),
    "two ways": Report(name="witness", offset=0, pid=1, address=PAGE_SIZE),
    "a frame below the first": Report(pfn=-1),
    "an address below the first": Report(pid=1, address=-PAGE_SIZE),
    "an offset below the first": Report(name="witness", offset=-1),
}


@pytest.mark.parametrize("what", WRONG_REPORTS)
def test_a_report_that_names_no_page_is_refused(client: RawClient, what: str) -> None:
    need(WRONG_REPORTS[what].pfn is None or os.geteuid() == 0, "the privilege to know frame numbers")
    assert client.error(protocol.ReportPage(WRONG_REPORTS[what])) == "ValueError"


@pytest.mark.parametrize(
    "report",
    [
        Report(pfn=0),
        Report(pfn=(1 << 64) - 1),
        Report(pid=(1 << 64) - 1, address=(1 << 64) - 1),
        Report(pid=1, address=0),
    ],
)
def test_a_report_of_what_nobody_has_is_an_unknown_page(client: RawClient, report: Report) -> None:
    need(report.pfn is None or os.geteuid() == 0, "the privilege to know frame numbers")
    reply = client.ask(protocol.ReportPage(report))
    assert isinstance(reply, protocol.Handled)
    assert (reply.failure.state, reply.failure.outcome, reply.failure.victims) == (State.UNKNOWN, Outcome.IGNORED, ())


def test_a_name_is_free_once_the_last_mapping_is_gone_and_what_it_changed_is_in_the_file(
    client: RawClient, vanishing: Path
) -> None:
    with vanishing.open("r+b") as file:
        mapping, number = client.mapped(protocol.Open(str(vanishing), 0, None, writable=True), (file.fileno(),))
        expected = dirty(mapping)
        # One right after the other: the second comes while the manager still writes.
        client.send(protocol.Unmap(number))
        unmapped = client.ask(protocol.Open(str(vanishing), 0, None, writable=False), (file.fileno(),))
        assert unmapped == protocol.Done()
        found = client.receive()
        assert isinstance(found, protocol.Found)
        assert not found.writable
    assert vanishing.read_bytes() == expected


# --- clients that stop


def test_a_client_may_be_gone_before_its_hello_is_read(served: Served) -> None:
    served.pause()
    try:
        vanish(served.path, "with hello unanswered")
    finally:
        served.go_on()


def vanish(path: str, where: str, number: signal.Signals = signal.SIGKILL) -> None:
    """A process that ends by a signal at some point of what it has to say."""
    raw = Path(__file__).with_name("raw.py")
    process = subprocess.run([sys.executable, raw, path, where], timeout=SECONDS_MAX, check=False)
    assert process.returncode == -number


@pytest.mark.parametrize("where", VANISH)
def test_a_client_may_vanish_at_any_moment(served: Served, vanishing: Path, where: str) -> None:
    vanish(served.path, where)
    if where in ("with dirty pages", "with flush unanswered"):
        served.assert_well()
        assert vanishing.read_bytes() == dirty(bytearray(b"." * FILE_PAGES * PAGE_SIZE))


def test_memory_that_the_manager_was_not_told_of_is_sigbus_and_never_zeros(served: Served) -> None:
    vanish(served.path, STRAY, signal.SIGBUS)


def test_a_reply_that_is_larger_than_a_packet_arrives_whole() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reply = protocol.Ranges([(2 * page * PAGE_SIZE, PAGE_SIZE) for page in range(100_000)], 100_000)
    with ours, theirs, open(os.devnull) as beside:
        protocol.send_reply(ours, reply, [beside.fileno()])
        received, fds = protocol.receive_reply(theirs)
        assert received == reply
        assert len(fds) == 1
        assert os.path.samestat(os.fstat(fds[0]), os.fstat(beside.fileno()))
        # Whoever drops them closes them.
        number = fds[0]
        del fds
        with pytest.raises(OSError, match="descriptor"):
            os.fstat(number)


def test_a_reply_that_cannot_be_said_is_answered_as_failed_and_the_channel_goes_on(tmp_path: Path) -> None:
    script = "import sys; from hwpoison.service.daemon import serve; serve(sys.argv[1], memory_limit=1 << 70)"
    path = str(tmp_path / "socket")
    with subprocess.Popen([sys.executable, "-P", "-c", script, path], stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: process.poll() is not None or _connects(path), "the manager serves")
            client = RawClient(path).hello()
            for _ in range(2):
                assert client.error(protocol.GetStatistics()) == "RuntimeError"
            assert client.ask(protocol.ListObjects()) == protocol.ObjectList([])
            client.close()
            process.terminate()
            assert process.wait(SECONDS_MAX) == 0
            assert process.stderr is not None
            assert process.stderr.read().count("a defect in hwpoison: the reply to GetStatistics") == 2
        finally:
            process.kill()


def test_a_client_that_reads_no_replies_loses_its_channel(client: RawClient) -> None:
    client.channel.setblocking(False)
    request = protocol.encode(protocol.GetStatistics())
    with pytest.raises(OSError) as caught:
        for _ in range(100_000):
            with contextlib.suppress(BlockingIOError):
                client.channel.send(request)
    assert isinstance(caught.value, (BrokenPipeError, ConnectionResetError))


def test_notices_of_losses_that_were_repaired_do_not_heap_up_for_a_client_that_does_not_read(
    served: Served, client: RawClient
) -> None:
    mapping, number = client.mapped(protocol.Allocate(2 * PAGE_SIZE, "unread"))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(SECONDS_MAX)
    with ours:
        with theirs:
            client.send(protocol.Listen(), (theirs.fileno(),))
            assert isinstance(protocol.receive_reply(ours)[0], protocol.Added)
        mapping[0] = mapping[PAGE_SIZE] = 1
        # The socket itself holds some hundreds; the rest waits in the manager.
        failures = []
        for _ in range(NOTICES_LIMIT // 2):
            failures.append(served.inject("unread", 0))
            assert client.ask(protocol.Repair(number, 0, PATTERN)) == protocol.Count(PAGE_SIZE)
        standing = served.inject("unread", 1)
        for _ in range(2 * NOTICES_LIMIT):
            failures.append(served.inject("unread", 0))
            assert client.ask(protocol.Repair(number, 0, PATTERN)) == protocol.Count(PAGE_SIZE)
        last = served.inject("unread", 0)
        told = []
        while last.event_id not in told:
            message = protocol.decode_reply(protocol.receive(ours)[0])
            assert isinstance(message, protocol.Told)
            told.append(message.notice.event_id)
    assert told.count(standing.event_id) == 1
    assert len(told) < 2 * NOTICES_LIMIT
    order = [one.event_id for one in (*failures[: NOTICES_LIMIT // 2], standing, *failures[NOTICES_LIMIT // 2 :], last)]
    assert told == [one for one in order if one in told]


def open_and_drop(path: str, count: int) -> None:
    """Connections, of which every second one says hello and does not wait for an answer."""
    for number in range(count):
        client = RawClient(path)
        if number % 2:
            client.send(protocol.Hello())
        client.channel.close()


def test_channels_that_are_opened_and_dropped_leave_nothing(served: Served) -> None:
    open_and_drop(served.path, 200)


def test_channels_that_are_dropped_before_they_are_accepted_leave_nothing(served: Served) -> None:
    served.pause()
    try:
        # No more than can wait: the next one would wait for the manager.
        open_and_drop(served.path, 100)
    finally:
        served.go_on()


# --- other users


@pytest.fixture
def served_for_nobody() -> Iterator[str]:
    """The abstract address of a manager that an ordinary user runs."""
    need(os.geteuid() == 0, "the privilege to run processes of other users")
    probe = [sys.executable, "-P", "-c", "import hwpoison.service.daemon"]
    user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    readable = subprocess.run(probe, capture_output=True, check=False, cwd="/", **user).returncode == 0  # type: ignore[call-overload]
    need(readable, f"an interpreter and a checkout that user {NOBODY} can read")
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, NOBODY, NOBODY)
        address = f"@hwpoison-test-{os.getpid()}"
        process = subprocess.Popen(  # type: ignore[call-overload]
            [sys.executable, "-P", "-c", SERVE, address],
            env=os.environ | {"HWPOISON_LOG": f"{folder}/events.db"},
            cwd="/",
            **user,
        )
        try:
            wait_until(lambda: process.poll() is not None or _connects(address), "the manager serves")
            assert process.poll() is None
            yield address
        finally:
            process.terminate()
            assert process.wait(SECONDS_MAX) == 0


def _connects(address: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        return probe.connect_ex(protocol.address_of(address)) == 0


ASK = """
import socket, sys
from hwpoison import protocol
channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
channel.connect(protocol.address_of(sys.argv[1]))
if sys.argv[2] == "hello":
    channel.send(protocol.encode(protocol.Hello()))
reply = protocol.decode_reply(protocol.receive(channel)[0])
print(type(reply).__name__, getattr(reply, "kind", ""), getattr(reply, "text", ""))
print(len(channel.recv(1)) if sys.argv[2] != "hello" else "")
"""


def test_a_manager_serves_its_user_and_root_and_refuses_everybody_else(served_for_nobody: str) -> None:
    def ask(uid: int, what: str) -> str:
        command = [sys.executable, "-P", "-c", ASK, served_for_nobody, what]
        return subprocess.run(
            command, user=uid, group=uid, extra_groups=[], cwd="/", capture_output=True, text=True, timeout=SECONDS_MAX,
            check=True,
        ).stdout  # fmt: skip

    refused, closed = ask(SOMEBODY_ELSE, "nothing").splitlines()
    assert refused == f"Failed PermissionError this manager serves user {NOBODY} and root, not user {SOMEBODY_ELSE}"
    assert closed == "0"
    assert ask(NOBODY, "hello").startswith("Welcome")
    with hwpoison.connect(served_for_nobody) as manager, manager.allocate(PAGE_SIZE) as memory:
        memory.buffer[:] = PATTERN
        assert memory.read(0, PAGE_SIZE) == PATTERN
