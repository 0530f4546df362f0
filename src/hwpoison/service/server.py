"""The manager's server: who may connect, and what the core says about what happens.

It ends when it is told to and nobody maps its memory any more, or, if it is private, when its last client is gone.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import struct
from collections.abc import Callable, Collection, Coroutine, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

from hwpoison import protocol
from hwpoison.core.manager import MemoryManager
from hwpoison.core.mappings import Client
from hwpoison.core.objects import MemoryObject
from hwpoison.core.records import Event, Failure, Notice, Policy, kernel_line
from hwpoison.core.takeover import take_over
from hwpoison.linux.descriptors import Descriptors
from hwpoison.linux.inheritance import LinuxInheritance
from hwpoison.linux.machine import LinuxMachine
from hwpoison.linux.standard import say
from hwpoison.service.eventlog import EventLog
from hwpoison.service.invitation import INVITATION, Invitation
from hwpoison.service.keeper import LISTENER, Keeper
from hwpoison.service.session import Left, Session

LATE_SECONDS = 2.0
"""A restart does not begin before files that take longer for an answer."""
PAUSE_SECONDS = 1.0
"""How long nobody can connect when the system refuses what that needs."""
log = logging.getLogger("hwpoison")


class Server:
    """Serves `listener`. `private`: ends with its last client."""

    def __init__(
        self,
        machine: LinuxMachine,
        listener: socket.socket | None,
        *,
        address: str,
        instance: str,
        life: int,
        keeper: Keeper,
        new_keeper: Callable[[], tuple[socket.socket, int]],
        check: list[str],
        events: EventLog,
        private: bool,
        leave: Callable[[], None],
        memory_limit: int | None,
        offline_foreign: bool,
        policy: Policy,
        users: Collection[int],
    ) -> None:
        self.machine = machine
        self.instance = instance
        self.address = address
        self._users = {os.geteuid(), 0, *users}
        self.policy = policy
        """When clients that have none of their own are told."""
        self.sessions_of: dict[int, Session] = {}
        self.manager = MemoryManager(
            machine, self, instance=instance, life=life, memory_limit=memory_limit, offline_foreign=offline_foreign
        )
        self._keeper = keeper
        self._new_keeper = new_keeper
        self._check = check
        """The command that says whether what is installed now can take over."""
        self.keeper = os.getppid()
        """Its process id; 0 while there is none."""
        self.descriptors = Descriptors()
        self._listener = listener
        self._events = events
        self._private = private
        self._leave = leave
        self._sessions: set[Session] = set()
        self._invitations: set[Invitation] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.stop = asyncio.Event()
        """Nobody new is served any more."""
        self.over = asyncio.Event()
        """Nor is anybody else."""
        self.renewing = False
        """Another manager takes over at once."""

    async def run(self, first: socket.socket | None = None, serving: Callable[[], None] | None = None) -> None:
        """Serve until stopped; `first` is a client that is connected already, `serving` is called when others can be."""
        self.machine.records.put(("life",), [self.manager.life, self.instance])
        if self.manager.life > 1:
            await self._take_over()
        self._watch_keeper()
        self._listen()
        if first is not None:
            self.admit(first)
        else:
            self._end_if_alone()
        self._keeper.ready()
        if serving is not None:
            serving()
        self._keep_up()
        await self.stop.wait()
        if self.renewing:
            return
        self._listen_no_more()
        if not self._private:
            await self._nobody_maps()
        await self.manager.write_back()
        for session in list(self._sessions):
            if session.client is None or not session.client.mappings:
                session.end()
            # Who maps memory, and is not waited for, is ended by the keeper.
        while self._tasks:
            # Requests that are under way, a flush for instance. Nobody is there to be answered, but it must not be cut off.
            await asyncio.wait(self._tasks)
        await self.manager.close()
        self.descriptors.close()

    def _listen_no_more(self) -> None:
        """Nobody new is let in, by a manager after this one neither."""
        listener, self._listener = self._listener, None
        if listener is not None:
            asyncio.get_running_loop().remove_reader(listener)
            # Before the socket is closed: what is at that place afterwards is another manager's.
            self._leave()
            self.machine.keeping.drop(LISTENER)
            listener.close()

    async def _take_over(self) -> None:
        """All that managers before this one had."""
        if self._listener is None:
            # It was told to end, and has stayed for who maps memory.
            self.stop.set()
        inheritance = LinuxInheritance(self.machine)
        left = Left(self.machine.records.all())
        sessions = [Session.inherited(self, inheritance, number, left) for number in left.sessions]
        for session in sessions:
            self._sessions.add(session)
            self.sessions_of[session.number] = session
        await take_over(self.manager, inheritance)
        self.event(Event(kind="takeover", pid=os.getpid(), detail=f"manager {self.manager.life}"))
        for session in sessions:
            session.go_on(inheritance, left)
        for session in sessions:
            session.listen()
        for asked_by in [one for one in self.manager.answers if one[0] not in left.sessions]:
            self.manager.answered(asked_by)
        for number in left.invitations:
            self._invitations.add(Invitation.inherited(self, inheritance.take(f"{INVITATION}:{number}"), number))
        for label, fd in inheritance.nobodys().items():
            self.machine.keeping.drop(label)
            self.spawn(self.machine.let_go(fd))

    # --- the keeper

    def _watch_keeper(self) -> None:
        asyncio.get_running_loop().add_reader(self._keeper.channel, self._keeper_ended)

    def _keeper_ended(self) -> None:
        """It never says anything. There must be another one."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._keeper.channel)
        loop.remove_writer(self._keeper.channel)
        if self.stop.is_set() and (self.over.is_set() or self._private):
            return
        say(f"hwpoison: the keeper has died; manager {os.getpid()} starts another one")
        if not self._private:
            # It was the process that was started to serve: who has ended it, or waits for it, must not find this one here.
            self.told_to_end()
        self.keeper = 0
        self._replace_keeper()

    def _replace_keeper(self, *, again: bool = False) -> None:
        """As soon as the system gives what that needs."""
        loop = asyncio.get_running_loop()
        try:
            with self.descriptors.one_more():
                channel, self.keeper = self._new_keeper()
        except (OSError, MemoryError) as error:
            if not again:
                without = "without one, this manager's death is that of who maps its memory"
                say(f"hwpoison: no keeper can be started now: {error}; it is tried until one can be ({without})")
            loop.call_later(PAUSE_SECONDS, partial(self._replace_keeper, again=True))
            return
        if again:
            say(f"hwpoison: there is a keeper again, process {self.keeper}")
        self._keeper.replace(channel)
        # One that can't live must not be replaced again and again all the time.
        loop.call_later(PAUSE_SECONDS, self._watch_keeper)
        self._keep_up()

    def _keep_up(self) -> None:
        """Send the keeper what it has not taken yet."""
        loop = asyncio.get_running_loop()
        self._keeper.go_on()
        if self._keeper.behind:
            loop.add_writer(self._keeper.channel, self._keep_up)
            if stopped(self.keeper):
                # What it has not taken is lost to a manager after this one. Whoever has stopped it did not mean that.
                say(f"hwpoison: the keeper, process {self.keeper}, was stopped while much waits for it; it is continued")
                with suppress(ProcessLookupError):
                    os.kill(self.keeper, signal.SIGCONT)
        else:
            loop.remove_writer(self._keeper.channel)

    def keep(self) -> None:
        """Something was given to the keeper that it may not have taken."""
        if self._keeper.behind:
            self._keep_up()

    async def restart(self) -> None:
        """Let another manager take over, of what is installed now. Never returns; raises OSError if it can't."""
        if self.stop.is_set():
            raise OSError(errno.EBUSY, "the manager was told to end, and stays only for those who map its memory")
        if stopped(self.keeper):
            why = f"the keeper, process {self.keeper}, is stopped, and could start nobody: kill -CONT {self.keeper} first"
            raise OSError(errno.EBUSY, why)
        self._require_successor()
        check = await asyncio.create_subprocess_exec(
            *self._check,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await check.communicate()
        if check.returncode:
            why = said.decode(errors="replace").strip().rpartition("\n")[2]
            raise OSError(errno.EPROTO, f"what is installed now can't take over, and this manager goes on: {why}")
        late = await self.machine.unanswered(LATE_SECONDS)
        if late:
            why = f"{late} reads or writes of files have had no answer for {LATE_SECONDS:g} s"
            raise OSError(errno.EBUSY, f"{why}, and the next manager could begin only after them: try again later")
        if self.stop.is_set():
            raise OSError(errno.EBUSY, "the manager was told to end meanwhile, or its last client has gone")
        self._require_successor()
        self.renewing = True
        self.stop.set()
        # The next one answers.
        await asyncio.get_running_loop().create_future()

    def _require_successor(self) -> None:
        if self.machine.records.broken:
            raise OSError(errno.ENOSPC, "the manager's journal can't be written, so that no other one could take over")
        if not self._keeper.lives:
            raise OSError(errno.EBUSY, "the keeper has died, and there is no other one yet: try again later")

    async def _nobody_maps(self) -> None:
        """Until the last process that maps memory is gone, for whom nobody else could serve a fault, or `over`."""
        pids = {client.pid for client in self.manager.clients() if client.mappings}
        if pids:
            many = "1 process still maps" if len(pids) == 1 else f"{len(pids)} processes still map"
            end = f"SIGTERM to process {os.getpid()}, or the same signal again, ends it at once, and those with it"
            say(f"hwpoison serve: {many} memory, and this stays until the last has gone; {end}")
        await self.manager.write_back()
        self.request_answered()
        await self.over.wait()

    def request_answered(self) -> None:
        """Or a client has gone: look whether that was the last one for whom we have stayed."""
        self.keep()
        if self.stop.is_set() and not any(one.references > one.persistent for one in self.manager.objects()):
            self.over.set()

    def told_to_end(self, *, at_once: bool = False) -> None:
        """By a signal. `at_once`: if that was said before."""
        if at_once and self.stop.is_set():
            self.over.set()
        self.stop.set()

    def _accept(self) -> None:
        try:
            self.descriptors.require()
        except OSError as error:
            with self.descriptors.one_more():
                self._accept_with(partial(_refuse, error=error))
        else:
            self._accept_with(self.admit)

    def _accept_with(self, welcome: Callable[[socket.socket], None]) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # Who wanted to connect has changed its mind.
        except OSError as error:
            # The whole system is short of something. It would be said again at once, and for ever.
            log.warning("nobody can connect for %g s: %s", PAUSE_SECONDS, error)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listener)
            loop.call_later(PAUSE_SECONDS, self._listen)
        else:
            welcome(connection)

    def _listen(self) -> None:
        if not self.stop.is_set() and self._listener is not None:
            self._listener.setblocking(False)
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def admit(self, connection: socket.socket) -> None:
        """A client, if it may be one."""
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, _ = struct.unpack("3i", credentials)
        if uid not in self._users:
            named = "".join(f", {one}" for one in sorted(self._users - {os.geteuid(), 0}))
            _refuse(connection, PermissionError(f"this manager serves user {os.geteuid()}{named} and root, not user {uid}"))
            return
        session = Session(self, connection, pid)
        self._sessions.add(session)
        session.listen()

    def invite(self, connection: socket.socket, objects: Iterable[MemoryObject]) -> None:
        """A client is about to fork: its child will say so at the other end."""
        self._invitations.add(Invitation.new(self, connection, objects))

    def invitation_over(self, invitation: Invitation) -> None:
        self._invitations.discard(invitation)
        self._end_if_alone()
        self.request_answered()

    def _end_if_alone(self) -> None:
        if self._private and not self._sessions and not self._invitations:
            self.stop.set()

    def session_ended(self, session: Session) -> None:
        self._sessions.discard(session)
        self.keep()
        self.sessions_of = {number: one for number, one in self.sessions_of.items() if one is not session}
        self._end_if_alone()
        self.request_answered()

    def spawn(self, story: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that reports its own errors."""
        task = asyncio.get_running_loop().create_task(story)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def statistics(self) -> protocol.Statistics:
        counted, size = self.manager.statistics, self.machine.page_size
        return protocol.Statistics(
            pid=os.getpid(),
            page_size=size,
            socket=protocol.printable_path(self.address),
            memory_limit=self.manager.memory_limit,
            memory_present=self.manager.reclaim.present * size,
            keeper=self.keeper,
            restarts=self.manager.life - 1,
            clients=len(self.manager.clients()) + len(self._invitations),
            objects=len(self.manager.objects()),
            outcomes=dict(counted.outcomes),
            states=dict(counted.states),
            quarantined=counted.quarantined * size,
            faults=counted.faults,
            read=counted.pages_read * size,
            written=counted.pages_written * size,
            dropped=counted.pages_dropped * size,
            accesses_to_lost=counted.accesses_to_lost,
            events_dropped=self._events.dropped,
        )

    async def sync_log(self) -> bytes:
        """Until all events so far are in the log; its place."""
        await asyncio.wrap_future(self._events.sync())
        return os.fsencode(self._events.path)

    # --- what the core says (see `hwpoison.core.accounting.Observer`)

    def event(self, event: Event) -> None:
        self._events.add(event)

    def notice(self, client: Client, notice: Notice) -> None:
        session = self.sessions_of.get(client.number)
        if session is not None:
            self._events.add(
                Event(
                    kind="notice",
                    event_id=notice.event_id,
                    name=notice.name,
                    offset=notice.offset,
                    nbytes=notice.nbytes,
                    state=notice.state,
                    outcome=notice.outcome,
                    pid=client.pid,
                )
            )
            session.tell(notice)

    def failure(self, where: str, failure: Failure) -> None:
        say(kernel_line(where, failure))

    def defect(self, what: str, error: BaseException) -> None:
        log.error("a defect in hwpoison: %s", what, exc_info=error)
        self._events.add(Event(kind="error", detail=f"defect: {what}: {error!r}"))


def _refuse(connection: socket.socket, error: Exception) -> None:
    """The first thing that who connects is told, and the last."""
    with connection, suppress(OSError):
        connection.setblocking(False)
        protocol.send(connection, protocol.failed(error))


def stopped(pid: int) -> bool:
    """True if the process is stopped, by Ctrl-Z or SIGSTOP."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False
