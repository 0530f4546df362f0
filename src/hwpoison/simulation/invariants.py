"""What must hold after every step, and in the end: each invariant is a sentence, and all are here.

`Expectation` knows what the memory must hold: it is told of every store of a process and of everything that was asked of the
manager, and looks at each page that the manager puts in place, at the moment at which it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hwpoison.core.journal import AskedBy
from hwpoison.core.locks import RangeLocks
from hwpoison.core.mappings import Client, Mapping
from hwpoison.core.objects import Loss
from hwpoison.core.pages import DIRTY, LOST, POISONED, PRESENT, WRITEBACK
from hwpoison.core.records import Failure, Notice, Outcome, Report, State
from hwpoison.simulation.files import FILE_OFFSET, PREFIX
from hwpoison.simulation.memory import HWPOISON, PAGE, POISON, SimulatedStore
from hwpoison.simulation.operations import NAME, PAGE_SIZE
from hwpoison.simulation.processes import Process

if TYPE_CHECKING:
    from hwpoison.simulation.world import World

Become = Callable[[bytes], bytes]
_WRITABLE = (PAGE, False)


class Expectation:
    """What each page of the object must hold. `violation` is the first sentence that did not hold."""

    def __init__(self, world: World) -> None:
        self.world = world
        count = world.object.pages.count
        self.violation: str | None = None
        self.history: list[list[bytes]] = [[self._on_disk(page) or bytes(world.object.page_size)] for page in range(count)]
        """What was in each page, the last entry now."""
        self.frames_gone_bad = 0
        self.foreign: set[int] = set()
        """Pages of which others have changed the file."""
        self.owed: set[Mapping] = set()
        """Handles whose next flush must fail: changes were lost."""
        self._untold: set[int] = set()
        """Pages with changes that were lost, and of which no flush has told yet."""
        self._may: list[list[Become]] = [[] for _ in range(count)]
        self._fresh: list[int] = [0] * count
        self._was: list[list[bytes]] = [[] for _ in range(count)]
        """What the file has held since somebody asked for whatever it holds."""
        self._told: set[tuple[str, int, int]] = set()
        self._losses: set[tuple[str, int]] = set()
        self._flushes: dict[Mapping, tuple[list[int], bool, frozenset[int], tuple[int, int]]] = {}
        self._dirty: dict[Mapping, set[int]] = {}
        """What was dirty when a handle asked for a flush."""
        self._unsynced: set[int] = set()
        """Pages that a sync has failed for and that will not be written again: all handles are told of that once."""
        self._calm = (0, 0)
        """What had gone wrong when last nothing was under way, and how much of that was a sync."""
        self._told_of: dict[Mapping, int] = {}
        """Of how many syncs that failed before a handle's next flush it can't be told any more."""
        self._unsure: set[int] = set()
        """Pages that a dead manager had written to the file, or was about to change: nobody knows whether its sync has
        failed, or the change was made. They may count as changed though the file has them, and as not written if they are
        not in memory any more."""
        self.resident: dict[int, int] = {}
        """The page that is to be fit for system calls, by the mapping."""
        self.struck: set[int] = set()
        """Pages that somebody has said are bad, or whose frames are."""
        self.named: set[int] = set()
        """Frames that somebody has said are bad, by their number."""
        self.collapsed = False
        """There was a large frame."""
        self.found_out: dict[AskedBy, str] = {}
        """What dead managers have found out and not said: the event, by who has asked."""
        self.elsewhere: set[int] = set()
        """Pages of which the file does not hold what it should: another object over it has lost that."""
        self._reviving: list[int] = [0] * count
        self._reporting: list[int] = [0] * count

    def fail(self, sentence: str) -> None:
        """Not raised: a task would keep it."""
        if self.violation is None:
            self.violation = sentence

    def _on_disk(self, page: int) -> bytes:
        size = self.world.object.page_size
        return self.world.disk.content[FILE_OFFSET:][page * size : (page + 1) * size] if self.world.disk is not None else b""

    def _durable(self, page: int) -> bytes:
        size = self.world.object.page_size
        return self.world.disk.durable[FILE_OFFSET:][page * size : (page + 1) * size] if self.world.disk is not None else b""

    # --- what is done to the memory

    def begins(self, page: int, content: bytes | None) -> bytes:
        """The page is there from the beginning, with this content, or what the file holds, or zeros."""
        if content is not None and (self.world.disk is None or content != self.history[page][-1]):
            self.history[page].append(content)
        return self.history[page][-1]

    def lost_before(self, page: int) -> None:
        """The page was lost before all this, and its owners know."""
        loss = self.world.object.losses[page]
        self._losses.add((loss.event_id, page))
        if loss.state is State.DIRTY_FILE:
            self.world.object.error_sequence += 1
            self.world.object.untold.add(page)
            self._untold.add(page)
            self.owed.update(agent.mapping for agent in self.world.agents if agent.mapping is not None)

    def stored(self, page: int, data: bytes) -> None:
        """A process has stored to the page."""
        self.history[page].append(data)

    def changed_by_others(self, pages: Iterable[int]) -> None:
        """Somebody is about to change the file's content of these pages."""
        for page in pages:
            self.foreign.add(page)
            if self._fresh[page]:
                self._was[page].append(self._on_disk(page))

    @contextmanager
    def may_become(self, page: int, become: Become) -> Iterator[None]:
        """The manager was asked to change the page so."""
        self._may[page].append(become)
        self._reviving[page] += 1
        self.world.touched(page)
        try:
            yield
        finally:
            # Also if the manager has died: who has asked will ask again.
            if self.world.dead:
                self._unsure.add(page)
            self._may[page].remove(become)
            self._reviving[page] -= 1
            self.world.touched(page)

    @contextmanager
    def may_be_fresh(self, page: int) -> Iterator[None]:
        """The manager was asked for whatever is behind the page."""
        self._fresh[page] += 1
        self._reviving[page] += 1
        self.world.touched(page)
        try:
            yield
        finally:
            self._fresh[page] -= 1
            if not self._fresh[page]:
                self._was[page].clear()
            self._reviving[page] -= 1
            self.world.touched(page)

    def placed(self, store: SimulatedStore, page: int, content: bytes) -> None:
        """The manager has put content into the page, for everybody to see."""
        found = self.world.store.pages[page]
        if found is not None and (found.bad or found.number in self.named):
            # A frame that is said to be bad, and that nobody holds, is given out again.
            self.struck.add(page)
        expected = self.history[page][-1]
        if page in self.elsewhere and not (self._may[page] or self._fresh[page]):
            self.fail(
                f"What the file does not hold, as another object over it has lost that, is not read from it: page {page}."
            )
        changed = [become(expected) for become in self._may[page]]
        if self._fresh[page]:
            changed += [*self._was[page], self._on_disk(page)] if self.world.disk is not None else [bytes(len(expected))]
        if content in changed:
            self.history[page].append(content)
        elif content != expected:
            self.fail(f"No page gets content that is not what was last written: page {page} got {_text(content)} for "
                      f"{_text(expected)}.")  # fmt: skip
        elif page in self.world.object.losses and not self._reviving[page]:
            self.fail(f"A lost page stays lost until somebody repairs or discards it: page {page}.")

    def taken_over(self, mappings: dict[int, Mapping]) -> None:
        """There is another manager: handles are known by their numbers."""

        def known(mapping: Mapping) -> Mapping:
            return mappings.get(mapping.number, mapping)

        self.owed = {known(one) for one in self.owed}
        self._told_of = {known(one): wrong for one, wrong in self._told_of.items()}
        # They are asked for again.
        if self.world.disk is not None:
            size = self.world.object.page_size
            self._unsure.update(sorted({(at - FILE_OFFSET) // size for at in self.world.disk.written}))
        self._flushes.clear()
        self._dirty.clear()

    # --- what processes see

    def read(self, who: str, page: int, found: bytes) -> None:
        """A process has read the page."""
        if found != self.history[page][-1]:
            self.fail(f"No access gets a byte that is not the last written: {who} read {_text(found)} from page {page}, "
                      f"last written was {_text(self.history[page][-1])}.")  # fmt: skip

    def right(self, page: int, found: bytes) -> bool:
        """True if the page holds this."""
        return found == self.history[page][-1]

    def guarded(self, who: str, page: int, found: bytes) -> None:
        """A guarded view has shown something else than what the page holds."""
        if any(found):
            self.fail(f"A guarded view shows what was last written, or zeros: {who} saw {_text(found)} in page {page}.")

    def guard_ended(self, who: str, met: Sequence[int], *, saw_zeros: bool) -> None:
        """A guard has ended, and raises for the pages `met`."""
        if saw_zeros and not met:
            self.fail(f"A guard that has shown zeros of a lost page raises at its end: {who}.")
        known = {page for _, page in self._losses}
        for page in met:
            if page not in known:
                self.fail(f"No guard raises for a page that was not lost: {who}, page {page}.")

    def sent(self, process: Process, address: int) -> None:
        """A process is sent SIGBUS for an access. What becomes of the page before it arrives is no matter."""
        found = process.area_at(address)
        if found is not None:
            self.refused(process.name, found[1], guarded=False, by_kernel=False)
        if process.asleep is None:
            self.fail(f"Nobody is sent a signal for an access that is over: {process.name}.")

    def refused(self, who: str, page: int, *, guarded: bool, by_kernel: bool) -> None:
        """An access has ended with SIGBUS. The kernel's own mark stays in a page table whatever becomes of the page."""
        object_ = self.world.object
        if by_kernel or self.world.dead or self.world.taking_over:
            return
        if guarded:
            self.fail(f"No access is refused in a guard that is open: {who}, page {page}.")
        if page not in object_.losses and not self._reviving[page] and not object_.closed:
            self.fail(f"No access to a page that is not lost is refused: {who}, page {page}.")

    def told_lost(self, pages: Sequence[int]) -> None:
        """A request was refused because of these pages."""
        for page in pages:
            if page not in self.world.object.losses:
                self.fail(f"No request is refused for a page that is not lost: page {page}.")

    def told(self, client: Client, notice: Notice) -> None:
        """A client was told of a loss."""
        object_ = self.world.object
        page = notice.offset // object_.page_size
        loss = object_.losses.get(page)
        if loss is None or loss.event_id != notice.event_id:
            self.fail(f"Nobody is told of a loss that is none: {notice.event_id}, page {page}.")
        # A large frame that can't be split goes as it is: what is on its way then counts as not arrived.
        given_up = notice.outcome is Outcome.FAILED and notice.state is State.DIRTY_FILE
        if object_.pages.flags[page] & WRITEBACK and not self.world.has_waited() and not given_up:
            self.fail(f"A page on its way to the file is decided on when it is there: page {page}.")
        if not any(agent.client is client and agent.owns for agent in self.world.agents):
            self.fail(f"Nobody is told of a loss that is not his: client {client.number}, page {page}.")
        if notice.name != NAME or notice.offset % PAGE_SIZE or notice.nbytes != PAGE_SIZE:
            self.fail(f"Who is told of a loss is told where it is: {notice.name}, {notice.offset}, {notice.nbytes} bytes.")
        key = (notice.event_id, page, client.number)
        if key in self._told:
            self.fail(f"Each owner is told of a loss once: client {client.number}, page {page}.")
        self._told.add(key)

    def handled(self, failure: Failure) -> None:
        """A report was handled."""
        object_ = self.world.object
        if failure.offset is None:
            return
        page = failure.offset // object_.page_size
        loss = object_.losses.get(page)
        lost_by_it = loss is not None and loss.event_id == failure.event_id
        if failure.victims and not failure.already_poisoned and not lost_by_it and not object_.closed:
            self.fail(f"Who is a victim is one of a loss that the failure is named for: {failure.event_id}, page {page}.")
        if failure.state is State.FREE and loss is not None and not object_.closed:
            self.fail(f"Whoever reports a page that is lost hears that it is known: page {page} was called free.")
        lost_it = failure.outcome is Outcome.RECOVERED and failure.state in (State.DIRTY_FILE, State.ANONYMOUS)
        if lost_it and (loss is None or loss.event_id != failure.event_id):
            self.fail(f"A failure that lost something is the loss's: {failure.event_id}, page {page}.")
        # A large frame that is given up is lost too, though the outcome is another.
        lost_it = lost_it or (loss is not None and loss.event_id == failure.event_id)
        owners = tuple(sorted(agent.process.pid for agent in self.world.agents if agent.owns))
        if lost_it and failure.victims != owners:
            self.fail(f"The victims of a failure are the owners: {failure.victims} and not {owners}, page {page}.")

    def answered(self, asked_by: AskedBy, report: Report, failure: Failure) -> None:
        """Who has reported has the answer."""
        found_out = self.found_out.pop(asked_by, "")
        if found_out not in ("", failure.event_id):
            self.fail(f"A report is handled once, whoever answers: it was {found_out}, and then {failure.event_id}.")
        if failure.already_poisoned and report.pid is not None and not set(failure.victims) <= {report.pid}:
            self.fail(f"Of a page that was bad before, he is the victim who has touched it: {failure.victims}.")

    def frame_handled(self, number: int, failure: Failure) -> None:
        """A report that has named a frame was handled."""
        if failure.outcome is Outcome.RECOVERED and not self.world.machine.quarantine[number]:
            self.fail(f"A frame that is said to be isolated is in quarantine: frame {number}.")

    def in_vain(self, who: str, page: int, entry: str) -> None:
        """A system call has failed at a page that is there."""
        if entry not in (POISON, HWPOISON):
            self.fail(f"No system call fails at a page that is there: {who}, page {page}.")

    def refused_in_call(self, mapping: int, who: str, page: int) -> None:
        """A system call has failed."""
        failed = page in self.struck or page in self.world.object.losses or self.collapsed
        if self.resident.get(mapping) == page and not failed:
            self.fail(f"No system call fails where memory is resident and has not failed: {who}, page {page}.")

    @contextmanager
    def reporting(self, page: int) -> Iterator[list[Failure]]:
        """A report by name is handled: its failure is put into the list."""
        self.struck.add(page)
        busy = self._reporting[page]
        self._reporting[page] += 1
        found: list[Failure] = []
        try:
            yield found
        finally:
            self._reporting[page] -= 1
        if busy and not found[0].already_poisoned and not self.world.object.closed:
            self.fail(f"A report that comes while another of the page is handled hears so: page {page}.")

    # --- flush

    def flush_begins(self, mapping: Mapping) -> None:
        """A handle asks for a flush."""
        flags = self.world.object.pages.flags
        self._dirty[mapping] = {page for page in range(len(self.history)) if flags[page] & (DIRTY | WRITEBACK)}
        if sum(not task.done() for task in self.world.loop.tasks) == 1:
            self._calm = self._gone_wrong()
        losses = self.world.object.losses
        begun = [-1 if page in losses else len(one) - 1 for page, one in enumerate(self.history)]
        calm = (-1, self._calm[1]) if self.world.store.has_bad() else self._calm
        self._flushes[mapping] = (begun, mapping in self.owed, self._still_untold(), calm)

    def _still_untold(self) -> frozenset[int]:
        """Pages with lost changes that nobody has had back, and of which no flush has told."""
        losses = self.world.object.losses
        return frozenset(page for page in self._untold if page in losses and losses[page].state is State.DIRTY_FILE)

    def _gone_wrong(self) -> tuple[int, int]:
        """How much has gone wrong of which a flush may tell, and how much of that was a sync."""
        wrong = self.world.machine.went_wrong
        return wrong["write fails"] + wrong["sync fails"] + self.frames_gone_bad, wrong["sync fails"]

    def _look_at_given_up(self, dirty: set[int]) -> None:
        """A sync has failed. What this flush has written and is still in memory must be dirty again; what was written
        before, or was dropped since, is not to be had again."""
        object_, disk = self.world.object, self.world.disk
        if disk is None:
            return
        for page in sorted({(at - FILE_OFFSET) // object_.page_size for at in disk.given_up}):
            flags = object_.pages.flags[page] if page < object_.pages.count else 0
            if not flags & DIRTY and not (flags & PRESENT and page in dirty):
                self._unsynced.add(page)
        disk.given_up.clear()

    def not_written(self, mapping: Mapping, syncs: int) -> None:
        """It was told that not everything could be written, for so many syncs. What else it is owed it is owed still."""
        begun, *_, calm = self._flushes.pop(mapping)
        self._told_of[mapping] = self._told_of.get(mapping, 0) + syncs
        self._look_at_given_up(self._dirty.pop(mapping))
        if not (self.world.machine.went_wrong["write fails"] or self.foreign):
            for page, known in enumerate(begun):
                found = self.world.store.pages[page]
                well = known >= 0 and found is not None and not found.bad and page not in self.world.object.losses
                if well and self._on_disk(page) not in self.history[page][known:]:
                    self.fail(f"A page that can't be written keeps no other one from the file: page {page}.")
        if self._gone_wrong()[0] <= calm[0] and not self.world.store.has_bad() and not self.foreign:
            self.fail("flush() fails to write only where something goes wrong.")

    def flush_failed(self, mapping: Mapping) -> None:
        """It was told that changes are lost, or that a sync of another handle has failed."""
        _, owed, untold, calm = self._flushes.pop(mapping)
        del self._dirty[mapping]
        wrong = self._gone_wrong()[1] > self._told_of.get(mapping, 0)
        if not (owed or untold or wrong or mapping in self.owed or self._still_untold() or self._unsure):
            self.fail("flush() says that changes are lost only where they are.")
        self.owed.discard(mapping)
        self._untold.clear()
        self._told_of[mapping] = calm[1]

    def flushed(self, mapping: Mapping) -> None:
        """It was told that all is in the file."""
        begun, owed, untold, calm = self._flushes.pop(mapping)
        self._told_of[mapping] = calm[1]
        del self._dirty[mapping]
        if owed:
            self.fail("flush() fails once for each handle if changes were lost.")
        if untold & self._still_untold():
            self.fail("Lost changes of which nobody was told are told to whoever flushes.")
        for page, known in enumerate(begun):
            if page in self.world.object.losses or page in self.foreign or not self.world.object.tracks_dirt:
                continue
            if known < 0 or page in self._unsynced:  # It was lost before.
                continue
            # Another flush may have failed half way after this one was done: byte for byte it is this content, or newer.
            found, half = self._durable(page), self.world.object.page_size // 2
            newer = self.history[page][known:]
            if found[:half] not in [one[:half] for one in newer] or found[half:] not in [one[half:] for one in newer]:
                self.fail(f"What was written before a flush() is on the disk after it: page {page}.")

    # --- after every step

    def check(self) -> str | None:
        """The first sentence that does not hold."""
        world = self.world
        if self.violation is not None or world.dead or world.taking_over:
            return self.violation
        object_, store = world.object, world.store
        if world.defects:
            self.fail(f"Nothing goes wrong inside: {world.defects[0]}.")
        if world.machine.given_back:
            self.fail(f"A bad frame that was taken out never goes back: frame {world.machine.given_back[0]}.")
        if world.machine.closed_under:
            self.fail(f"No file is closed while it is written: {world.machine.closed_under[0]}.")
        if world.machine.quarantine:
            self._check_quarantine()
        if object_.closed:
            if object_.lost_changes:
                self.fail("An object that has lost changes stays until somebody has had them back.")
            return self.violation
        flags, losses = object_.pages.flags, object_.losses
        busy = _worked_on(object_.locks)
        unwatched = self._unwatched() if object_.tracks_dirt else None
        lost = 0
        for page, found in enumerate(store.pages):
            now = flags[page]
            if now & LOST:
                lost += 1
                if page not in losses or not now & POISONED:
                    self.fail(f"The books of what is lost balance: page {page}.")
            if page in busy:
                continue
            if (found is None) == bool(now & PRESENT):
                self.fail(f"A page that nobody works on is present if and only if its flag says so: page {page}.")
            elif found is not None and unwatched is not None and not now & DIRTY:
                for who, entries in unwatched:
                    if entries.get(page) == _WRITABLE:
                        self.fail(f"Nobody can write to a clean page unseen: {who}, page {page}.")
                if not now & WRITEBACK and page not in self.foreign and found.content != self._on_disk(page):
                    self.fail(f"A clean page is what the file holds: page {page}.")
        if lost != len(losses):
            self.fail(f"The books of what is lost balance: {lost} pages, {len(losses)} losses.")
        if world.manager.reclaim.present != object_.pages.present or object_.pages.present < 0:
            self.fail("The count of present pages balances.")
        return self.violation

    def _lost_changes(self) -> int:
        """Pages of files, of all objects, of which changes are lost."""
        files = [one for one in self.world.manager.objects() if one.backing is not None]
        return sum(loss.state is State.DIRTY_FILE for one in files for loss in one.losses.values())

    def look_at_losses(self) -> None:
        """After every step, also one that is only told again: those who are owners now are those who had to be told."""
        object_ = self.world.object
        if self.world.dead or self.world.taking_over:
            return
        for page, loss in object_.losses.items():
            key = (loss.event_id, page)
            if key in self._losses:
                continue
            self._losses.add(key)
            self.world.touched(page)
            self._look_at_loss(page, loss)
            # Who they are is known from the processes, not from the manager.
            for agent in self.world.agents:
                if not agent.owns:
                    continue
                if (*key, agent.client.number) not in self._told:
                    self.fail(f"Each owner is told of a loss: client {agent.client.number}, page {page}.")
                if loss.state is State.DIRTY_FILE and agent.mapping is not None:
                    self.owed.add(agent.mapping)
            if loss.state is State.DIRTY_FILE:
                self._untold.add(page)
                # Also a handle that is gone, and whose flush is still under way.
                self.owed.update(self._flushes)
                for begun, *_ in self._flushes.values():
                    # What this page was to have in the file is lost; what it has from now on came after the flush began.
                    begun[page] = -1

    def _look_at_loss(self, page: int, loss: Loss) -> None:
        """Nothing is declared lost that could be had back; a large frame that can't be split takes what is beside."""
        world = self.world
        if page in self.elsewhere:
            return
        if world.disk is None:
            right = loss.state is State.ANONYMOUS
        else:
            changed = self.history[page][-1] != self._on_disk(page) and page not in self.foreign
            right = loss.state is State.DIRTY_FILE or (loss.state is State.CLEAN_FILE and not changed)
        if not right:
            self.fail(f"A loss says what is lost, changes or what the file has: {loss.state}, page {page}.")
        if loss.outcome is Outcome.FAILED:
            if not self.collapsed:
                self.fail(f"Nothing is given up whole that is not one large frame: page {page}.")
            return
        if loss.state is not State.CLEAN_FILE and page not in self.struck:
            self.fail(f"Nothing is lost that nobody has said is bad: page {page}.")
        if world.disk is None:
            return
        wrong = world.machine.went_wrong
        if loss.state is State.DIRTY_FILE:
            # Where a process has written, or is about to, the page counts as changed before it is; and its neighbours. What
            # a sync has failed for counts as not written.
            touched = any(agent.has_written for agent in world.agents)
            newer = not self.history[page][-1] == self._on_disk(page) == self._durable(page)
            excused = touched or self._may[page] or self._dirty or self.foreign or world.has_waited()
            excused = excused or page in self._unsure
            if not (newer or excused or wrong["write fails"] or wrong["sync fails"]):
                self.fail(f"Nothing is lost that the file has: page {page}.")
        # A file that others have changed anywhere is another version of all its pages.
        elif not (self.foreign or wrong["read fails"] or wrong["write fails"]):
            self.fail(f"Nothing is lost that the file has, and that can be read: page {page}.")

    def _check_quarantine(self) -> None:
        machine = self.world.machine
        used = {page.number for store in machine.stores for page in store.pages if page is not None}
        for number, count in machine.quarantine.items():
            if number in used or number in machine.free:  # the frame of a page that was lost or read again
                self.fail(f"A quarantined frame is never handed out: frame {number}.")
            if count != 1:
                self.fail(f"A frame is quarantined once: frame {number}.")

    def _unwatched(self) -> list[tuple[str, dict[int, tuple[str, bool]]]]:
        """The page tables in which an entry that is writable must belong to a dirty page."""
        known = {(one.client.space.pid, one.address) for one in self.world.object.mappings}
        return [
            (area.process.name, area.entries)
            for area in self.world.store.areas
            if not area.private and (area.process.pid, area.address) in known
        ]

    # --- in the end

    def check_end(self) -> str | None:
        """Nothing can happen any more: everything must have settled."""
        world = self.world
        if world.dead:
            # Who has asked it for something, or sleeps in a fault, waits for its successor.
            return self.violation
        if world.loop.errors:
            self.fail(f"No error is left to the event loop: {world.loop.errors[0]}.")
        for task in world.loop.tasks:
            if not task.done():
                self.fail(f"Every task ends: {task.get_name()}.")
            elif not task.cancelled() and task.exception() is not None:
                self.fail(f"No task fails: {task.get_name()}: {task.exception()!r}.")
        for agent in world.agents:
            if agent.process.alive and agent.at < len(agent.script):
                self.fail(f"Nobody sleeps for ever: {agent.name}, at {agent.script[agent.at][:2]}.")
        if world.manager.lost_changes_of.total() != self._lost_changes():
            self.fail("The count of lost changes balances.")
        if self.violation is None:
            self._check_settled()
        return self.violation

    def _may_be_bad(self, page: int) -> bool:
        """True if it can't be held against the manager that the page is in a bad frame."""
        world = self.world
        if world.liveness is not None and world.liveness.looks:
            # Everybody has looked, and has reported what was met.
            return False
        return self.unheard or page in world.unreported

    @property
    def unheard(self) -> bool:
        """True if a report came to nothing: a frame that was nobody's then is not ours to keep from the system."""
        return any(one.outcome in (Outcome.FAILED, Outcome.IGNORED) for one in self.world.failures)

    def _check_settled(self) -> None:
        world, object_ = self.world, self.world.object
        if object_.locks.busy:
            self.fail("No lock is lost.")
        if world.disk is not None and not world.disk.content.startswith(PREFIX[: len(world.disk.content)]):
            self.fail("Of the file, nothing is written that is not the object's.")
        if object_.backing is not None and (object_.backing.writing or object_.backing.turn.locked()):
            self.fail("No turn at the file is lost.")
        if world.manager.reclaim._files.coming or world.manager.reclaim._anonymous.coming:
            self.fail("No promised room is lost.")
        owners = sorted(agent.client.number for agent in world.agents if agent.owns)
        if sorted(one.client.number for one in object_.mappings) != owners:
            self.fail("The reverse map has the mappings that there are, and no other.")
        if object_.references != len(owners):
            self.fail(f"The references to an object balance: {object_.references} for {len(owners)} mappings.")
        if object_.resident or any(one.resident for one in object_.mappings):
            self.fail(
                f"What is resident is so until that is over, or its client gone: page {min(object_.resident, default=0)}."
            )
        unwritten = object_.closed and bool(self._gone_wrong()[0] or self.foreign)
        if world.store.transit:
            self.fail(f"Every frame that was taken out is held, or given back: frame {world.store.transit[0].number}.")
        for page in range(object_.pages.count):
            flags = object_.pages.flags[page]
            if flags & WRITEBACK or (flags & POISONED and not flags & LOST):
                self.fail(f"No page stays in between: page {page}.")
            found = world.store.pages[page]
            expected = self.history[page][-1]
            if found is not None and found.content != expected:
                self.fail(f"What is present is what was last written: page {page}.")
            if found is not None and found.bad and not self._may_be_bad(page):
                self.fail(f"No page stays in a bad frame whose failure was handled: page {page}.")
            gone = found is None or object_.closed
            if gone and page not in object_.losses and page not in self.foreign and not unwritten:
                behind = bytes(len(expected)) if world.disk is None else self._on_disk(page)
                if behind != expected and not (object_.closed and world.disk is None):
                    self.fail(f"What is not present can be had back: page {page}.")


def _worked_on(locks: RangeLocks) -> set[int]:
    """Pages that somebody has locked, or waits to lock."""
    if not locks.busy:
        return set()
    return {page for one in (*locks._held, *locks._waiting) for page in range(one.first, one.end)}


def _text(content: bytes) -> str:
    return str(int.from_bytes(content[:8], "little"))
