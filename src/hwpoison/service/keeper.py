"""The keeper: the process that managers come from, and that holds what must outlive each of them.

It is started first, loads all that a manager needs, and forks: the child is the manager. What must not be lost (the
userfaultfds of clients, memory, bad frames, the journal) the manager gives to the keeper, under a label, as soon as it has
it. When the manager dies, the keeper forks another one, which has all of that, at once: no interpreter has to start. The
keeper does nothing else, so that there is little in it that could fail; if it dies all the same, the manager starts another
keeper and gives it everything (`Keeper.replace`).

There is never more than one manager: the next one is forked when the last one has been waited for.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from hwpoison.linux import journal
from hwpoison.linux.inheritance import PROCESS
from hwpoison.linux.standard import say

GIVE_UP_SECONDS = 10.0
"""So long after a manager's death there must be another one. Else what is held is let go, which ends who waits for it."""
END_SECONDS = 2.0
"""So long processes that were sent SIGBUS may take to end, with a core dump for instance."""
LOOK_SECONDS = 1.0
"""Between two looks whether the manager is half dead: nothing tells of that."""
PAUSE_SECONDS = 0.1
"""Between two attempts to start one."""
SHORT_LIFE_SECONDS = 1.0
SHORT_LIVES_MAX = 20
"""So many managers in a row may end by themselves within `SHORT_LIFE_SECONDS`: something kills each of them."""
SLOW_SECONDS = 1.0
"""A keeper that takes nothing for so long is not waited for any longer."""
THINGS_LIMIT = 16
"""Most descriptors of one message."""
MESSAGE_LIMIT = 4096
FILE = "file:"
"""Labels of what a file system may have to be asked for when it is closed."""
LISTENER = "listener"
"""Label of the socket at which clients connect. A manager that is told to end drops it."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Passed on to the manager."""

Held = dict[str, int]
"""Descriptors by label."""
Manage = Callable[["Keeper", Held, int], int]
"""A manager's whole life: its keeper, what it inherits, and how many there were with it; the exit status."""


class Keeper:
    """The manager's side, see `hwpoison.linux.kept.Keeping`. What is given to it is in its socket, whatever becomes of the
    manager then. Only a keeper that takes nothing for `SLOW_SECONDS`, because somebody has stopped it, gets it later."""

    def __init__(self, channel: socket.socket, held: Held) -> None:
        self.channel = channel
        self.copies = dict(held)
        """What it holds, for the next keeper: numbers of this process, which stay open as long."""
        self._waiting: deque[tuple[bytes, list[int]]] = deque()
        channel.setblocking(False)

    def keep(self, *things: tuple[str, int]) -> None:
        for at in range(0, len(things), THINGS_LIMIT):
            some = things[at : at + THINGS_LIMIT]
            self.copies.update(some)
            self._send("keep " + " ".join(label for label, _ in some), [fd for _, fd in some])

    def drop(self, *labels: str) -> None:
        for label in labels:
            if self.copies.pop(label, None) is not None:
                self._send(f"drop {label}")

    def ready(self) -> None:
        """The manager serves. If it ended before, its start has failed."""
        self._send("ready")

    def goodbye(self) -> None:
        """The manager ends in order: there will be no other one."""
        self._send("goodbye")

    def restart(self) -> None:
        """The manager ends, and the next one comes from what is installed by then."""
        self._send("restart")

    def replace(self, channel: socket.socket) -> None:
        """The keeper has died. There is another one at `channel`: give it everything."""
        self.channel.close()
        channel.setblocking(False)
        self.channel = channel
        for _, fds in self._waiting:
            for fd in fds:
                os.close(fd)
        self._waiting.clear()
        self.keep(*self.copies.items())
        self.ready()

    @property
    def lives(self) -> bool:
        """False if it has died, and was not replaced yet."""
        poll = select.poll()
        poll.register(self.channel, 0)
        return not poll.poll(0)

    @property
    def behind(self) -> bool:
        """True if there is something that it has not taken yet: `go_on` when its channel can be written to."""
        return bool(self._waiting)

    def go_on(self) -> None:
        """Send what waits."""
        while self._waiting:
            message, fds = self._waiting[0]
            if not self._sent(message, fds):
                return
            self._waiting.popleft()
            for fd in fds:
                os.close(fd)

    def _send(self, text: str, fds: list[int] | None = None) -> None:
        message = text.encode()
        if not self._waiting and self._sent(message, fds or []):
            return
        poll = select.poll()
        poll.register(self.channel, select.POLLOUT)
        while not self._waiting and poll.poll(SLOW_SECONDS * 1000):
            if self._sent(message, fds or []):
                return
        # The keeper is stopped, or slow. The descriptors may be closed here before it reads.
        self._waiting.append((message, [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in fds or []]))

    def _sent(self, message: bytes, fds: list[int]) -> bool:
        try:
            socket.send_fds(self.channel, [message], fds, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            pass  # It is dead, and will be replaced.
        return True


Resume = Callable[[Held, int, list[int]], None]
"""Execute what is installed now, instead of this program, with what is held, how many managers there were, and the signals
for the next one, which are complete when others are blocked. Raises OSError, with everything as it was."""
HOPELESS = 75
"""The exit status of a manager that can't take over, nor can another one: it has said why."""


def run(
    manage: Manage,
    held: Held,
    resume: Resume,
    first: socket.socket | None = None,
    life: int = 0,
    told: Sequence[int] = (),
) -> int:
    """Be a keeper until a manager says goodbye; the exit status.

    `first` is only for the first manager. `life`: so many managers there were, of a program that was resumed, and which was
    `told` these signals.
    """
    return _Process(manage, held, resume, life, first, told).run()


def adopt(manage: Manage, channel: socket.socket, pidfd: int, life: int, resume: Resume) -> int:
    """Be the keeper of a manager that has lost its own: the process `pidfd`, at the other end of `channel`."""
    process = _Process(manage, {}, resume, life)
    process.adopt(channel, pidfd)
    return process.run()


class _HalfDeadError(Exception):
    """The last manager can't end, so there can't be another one."""


class _Process:
    """The keeper process."""

    def __init__(
        self,
        manage: Manage,
        held: Held,
        resume: Resume,
        life: int = 0,
        first: socket.socket | None = None,
        told: Sequence[int] = (),
    ) -> None:
        self._first = first
        self._manage = manage
        self._held = held
        self._resume = resume
        self._life = life
        self._channel: socket.socket | None = None
        self._pidfd = -1
        self._pid = 0
        self._ready = False
        self._over = False
        self._renew = False
        self._hopeless = False
        self._told: list[int] = list(told)
        """Signals for the next manager: one that is not ready yet would die of them."""
        self._passed: list[int] = []
        """Those that the manager was sent, and has not acted on: it may be dying, and not have seen them."""
        # Whoever has started this may have ignored it, which is inherited; then nobody could be waited for.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in SIGNALS:
            # Who starts it with nohup means that.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._pass_on)
        # Those that have come while the program was executed anew.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def run(self) -> int:
        try:
            return self._run()
        except _HalfDeadError:
            return self._give_up(
                f"the manager is dead, but a thread of it has waited for a file system for {GIVE_UP_SECONDS:.0f} s, so that "
                "no other one can be started"
            )
        except Exception as error:  # noqa: BLE001  (clients must not be ended without a word)
            traceback.print_exc()
            return self._give_up(f"the keeper has failed: {error!r}")
        finally:
            # From here on they would end this process otherwise than it ends.
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def _run(self) -> int:
        if self._life and self._channel is None and not self._succeed(time.monotonic()):
            return self._give_up()
        if self._channel is None:
            self._start()
        lives = 0
        while True:
            begun = time.monotonic()
            self._listen(None)
            status = self._wait()
            if self._over or (self._life == 1 and not self._ready):
                # It may have been told to end at once.
                self._end_clients(self._who_maps() or [])
                if self._over:
                    return max(status or 0, 0)  # It had said that all is well.
                if status is not None and status >= 0:
                    return status
                say(f"hwpoison: the manager has ended {_how(status)} before it was ready")
                return 1
            died = time.monotonic()
            if journal.LABEL not in self._held:
                return self._give_up("the manager has died, and its journal could not be written")
            if self._renew:
                self._renew = False
                try:
                    self._resume(self._held, self._life, self._told)
                except OSError as error:
                    say(f"hwpoison: what is installed can't be executed ({error}); the version that was started goes on")
            else:
                say(f"hwpoison: the manager has ended {_how(status)}; another one takes over")
            hurried = status not in (-signal.SIGKILL, None) and died - begun < SHORT_LIFE_SECONDS
            lives = lives + 1 if hurried else 0
            if lives == SHORT_LIVES_MAX:
                return self._give_up(f"{lives} managers in a row have ended within {SHORT_LIFE_SECONDS:.0f} s each")
            if not self._succeed(died):
                return self._give_up()

    def _give_up(self, why: str = "") -> int:
        """What is held is let go with the end of this process."""
        if self._hopeless:
            why = "no manager can take over"
        why = why or f"the manager has died, and no other one could be started within {GIVE_UP_SECONDS:.0f} s"
        mapping = self._who_maps()
        say(f"hwpoison: {why}: processes that map its memory are ended by {'SIGKILL' if mapping is None else 'SIGBUS'}")
        self._end_clients(mapping or [])
        return 1

    def _who_maps(self) -> list[int] | None:
        """The pidfds of processes that still map memory; None if the journal can't be read."""
        try:
            records = journal.read(self._held[journal.LABEL])
        except (LookupError, OSError):
            return None
        numbers = {value[0]: None for key, value in records.items() if key[0] == "mapping"}
        return [self._held.get(f"{PROCESS}:{number}", -1) for number in numbers]

    def _end_clients(self, mapping: list[int]) -> None:
        """By SIGBUS; by SIGKILL, whom that does not end, as he sleeps in a system call or handles it. Whoever can't be told
        here, the lifeline ends, when this process has ended."""
        told = []
        for pidfd in mapping:
            with suppress(OSError):
                signal.pidfd_send_signal(pidfd, signal.SIGBUS)
                told.append(pidfd)
        deadline = time.monotonic() + END_SECONDS
        for pidfd in told:
            if not _wait_for(pidfd, deadline):
                # A manager that is half dead has the other end of its lifeline.
                with suppress(OSError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def adopt(self, channel: socket.socket, pidfd: int) -> None:
        self._channel, self._pidfd, self._ready = channel, pidfd, True

    # --- a manager's life

    def _succeed(self, died: float) -> bool:
        """Start managers until one is ready; False if none is in time."""
        told = False
        while True:
            try:
                self._start()
            except (OSError, MemoryError) as error:
                # The system gives no process, or no descriptors, now.
                if not told:
                    say(f"hwpoison: no manager can be started now: {error}; it is tried for {GIVE_UP_SECONDS:.0f} s")
                told = True
            else:
                self._listen(died + GIVE_UP_SECONDS, until_ready=True)
                if self._ready:
                    return True
                status = self._wait()
                if status == HOPELESS:
                    self._hopeless = True
                    return False
                say(f"hwpoison: the manager has ended {_how(status)} before it was ready; another one is tried")
            left = died + GIVE_UP_SECONDS - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(PAUSE_SECONDS, left))

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ready = False
        sys.stdout.flush()
        sys.stderr.flush()
        life = self._life + 1
        try:
            self._pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if not self._pid:
            status = 1
            try:
                ours.close()
                for number in SIGNALS:
                    signal.signal(number, signal.SIG_DFL)
                # What the terminal sends to this program comes to the keeper, and from there.
                os.setsid()
                status = self._manage(Keeper(theirs, self._held), dict(self._held), life)
            except BaseException:  # noqa: BLE001  (nothing of this process may go on in the child)
                traceback.print_exc()
            finally:
                with suppress(OSError, ValueError):
                    sys.stderr.flush()
                os._exit(status)
        self._life = life
        theirs.close()
        if self._first is not None:
            self._first.close()
            self._first = None
        try:
            self._pidfd = os.pidfd_open(self._pid)
        except OSError:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            ours.close()
            raise
        self._channel = ours

    def _listen(self, deadline: float | None, *, until_ready: bool = False) -> None:
        """Take what the manager gives, until it ends, or is to be ready and was not at the deadline."""
        assert self._channel is not None
        poll = select.poll()
        # Its process too: somebody else may have the other end of its channel.
        for one in (self._channel.fileno(), self._pidfd):
            poll.register(one, select.POLLIN)
        while not (until_ready and self._ready):
            left = LOOK_SECONDS if deadline is None or self._ready else max(0.0, deadline - time.monotonic())
            found = [fd for fd, _ in poll.poll(min(left, LOOK_SECONDS) * 1000)]
            if not found and left >= LOOK_SECONDS and not _half_dead(self._pidfd):
                continue
            # What it has said before it died is taken first.
            if self._channel.fileno() not in found or not self._take(self._channel):
                return

    def _take(self, channel: socket.socket) -> bool:
        """One message; False if there are no more."""
        space = socket.CMSG_SPACE(THINGS_LIMIT * 4)
        try:
            data, ancillary, _, _ = channel.recvmsg(MESSAGE_LIMIT, space, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return False
        fds = array.array("i")
        for _, _, content in ancillary:
            fds.frombytes(content[: len(content) // 4 * 4])
        verb, *labels = data.decode().split(" ")
        match verb:
            case "keep":
                for label, fd in zip(labels, fds, strict=False):
                    self._let_go(label)
                    self._held[label] = fd
            case "drop":
                for label in labels:
                    self._let_go(label)
                if LISTENER in labels:
                    # It was told to end, and the next one sees that. What it is told from now on means: at once.
                    self._passed.clear()
            case "ready":
                self._ready = True
                told, self._told = self._told, []
                for number in told:
                    self._pass_on(number, None)
            case "goodbye":
                self._over = True
            case "restart":
                self._renew = True
        return bool(data)

    def _let_go(self, label: str) -> None:
        fd = self._held.pop(label, -1)
        if fd < 0:
            return
        if label.startswith(FILE):
            # Its file system may never answer. (A thread that waits for that holds nothing that a fork would need.)
            threading.Thread(target=_close, args=(fd,), daemon=True).start()
        else:
            _close(fd)

    def _wait(self) -> int | None:
        """The manager has ended, or has to: its status, negative for a signal; None if it is another process's child."""
        assert self._channel is not None
        self._channel.close()
        self._channel = None
        pidfd, self._pidfd = self._pidfd, -1
        self._told += self._passed
        self._passed.clear()
        if not self._over and not self._renew:
            # It has let go of us, or is not ready in time. There must not be two of them.
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        if self._over:
            _wait_for(pidfd)
        elif not _wait_for(pidfd, time.monotonic() + LOOK_SECONDS):
            say("hwpoison: the manager is dead, but for a thread that waits for a file system: its clients wait for that")
            if not _wait_for(pidfd, time.monotonic() + GIVE_UP_SECONDS - LOOK_SECONDS):
                raise _HalfDeadError
        os.close(pidfd)
        if not self._pid:
            return None
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return os.waitstatus_to_exitcode(status)

    def _pass_on(self, number: int, _frame: object) -> None:
        if not self._ready or self._pidfd < 0 or _has_ended(self._pidfd):
            self._told.append(number)
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)
            if number not in self._passed:
                self._passed.append(number)


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _half_dead(pidfd: int) -> bool:
    """True if its first thread is dead, and another one is not: it waits in the kernel, where no signal ends it."""
    with suppress(OSError, ValueError):
        about = Path(f"/proc/self/fdinfo/{pidfd}").read_text()
        pid = int(about.partition("Pid:")[2].split()[0])
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False


def _wait_for(pidfd: int, deadline: float | None = None) -> bool:
    """False if it has not ended by then."""
    # `select` knows no descriptors from 1,024 on.
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000))


def _close(fd: int) -> None:
    with suppress(OSError):
        os.close(fd)


def _how(status: int | None) -> str:
    if status is None:
        return "in a way that is not known"
    if status >= 0:
        return f"with status {status}"
    try:
        return f"by {signal.Signals(-status).name}"
    except ValueError:
        # Of signals for real time only two have names.
        return f"by signal {-status}"
