"""What must hold after every step, and in the end: each invariant is a sentence, and all are here.

`Expectation` knows what the memory must hold: it is told of every store of a process and of everything that was asked of the
manager, and looks at each page that the manager puts in place, at the moment at which it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hwpoison.core.mappings import Client, Mapping
from hwpoison.core.pages import DIRTY, LOST, POISONED, PRESENT, WRITEBACK
from hwpoison.core.records import Failure, Notice, Outcome, State
from hwpoison.simulation.machine import PAGE, SimulatedStore

if TYPE_CHECKING:
    from hwpoison.simulation.world import World

Become = Callable[[bytes], bytes]


class Expectation:
    """What each page of the object must hold. `violation` is the first sentence that did not hold."""

    def __init__(self, world: World) -> None:
        self.world = world
        count = world.object.pages.count
        self.violation: str | None = None
        self.history: list[list[bytes]] = [[self._on_disk(page) or bytes(world.object.page_size)] for page in range(count)]
        """What was in each page, the last entry now."""
        self.bad: set[int] = set()
        """Pages whose frame went bad."""
        self.foreign = False
        """The file was changed by others."""
        self.owed: set[Mapping] = set()
        """Handles whose next flush must fail: changes were lost."""
        self._may: list[list[Become]] = [[] for _ in range(count)]
        self._fresh: list[int] = [0] * count
        self._told: set[tuple[str, int, int]] = set()
        self._losses: set[tuple[str, int]] = set()
        self._flushes: dict[Mapping, tuple[list[int], bool]] = {}
        self._reviving: list[int] = [0] * count
        self._reporting: list[int] = [0] * count

    def fail(self, sentence: str) -> None:
        """Not raised: a task would keep it."""
        if self.violation is None:
            self.violation = sentence

    def _on_disk(self, page: int) -> bytes:
        size = self.world.object.page_size
        return self.world.disk.content[page * size : (page + 1) * size] if self.world.disk is not None else b""

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
            self.owed.update(agent.mapping for agent in self.world.agents if agent.mapping is not None)

    def stored(self, page: int, data: bytes) -> None:
        """A process has stored to the page."""
        self.history[page].append(data)

    def changed_by_others(self) -> None:
        """Somebody has changed the file."""
        self.foreign = True

    @contextmanager
    def may_become(self, page: int, become: Become) -> Iterator[None]:
        """The manager was asked to change the page so."""
        self._may[page].append(become)
        self._reviving[page] += 1
        self.world.touched(page)
        yield
        self._may[page].remove(become)
        self._reviving[page] -= 1
        self.world.touched(page)

    @contextmanager
    def may_be_fresh(self, page: int) -> Iterator[None]:
        """The manager was asked for whatever is behind the page."""
        self._fresh[page] += 1
        self._reviving[page] += 1
        self.world.touched(page)
        yield
        self._fresh[page] -= 1
        self._reviving[page] -= 1
        self.world.touched(page)

    def placed(self, store: SimulatedStore, page: int, content: bytes) -> None:
        """The manager has put content into the page, for everybody to see."""
        expected = self.history[page][-1]
        changed = [become(expected) for become in self._may[page]]
        if self._fresh[page]:
            changed.append(self._on_disk(page) or bytes(len(expected)))
        if content in changed:
            self.history[page].append(content)
        elif content != expected:
            self.fail(f"No page gets content that is not what was last written: page {page} got {_text(content)} for "
                      f"{_text(expected)}.")  # fmt: skip
        elif page in self.world.object.losses and not self._reviving[page]:
            self.fail(f"A lost page stays lost until somebody repairs or discards it: page {page}.")

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

    def refused(self, who: str, page: int, *, guarded: bool, by_kernel: bool) -> None:
        """An access has ended with SIGBUS. The kernel's own mark stays in a page table whatever becomes of the page."""
        object_ = self.world.object
        if by_kernel or self.world.dead:
            return
        if guarded and page not in self.bad:
            self.fail(f"No access is refused in a guard that is open: {who}, page {page}.")
        if page not in object_.losses and page not in self.bad and not self._reviving[page] and not object_.closed:
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
        if object_.pages.flags[page] & WRITEBACK and not self.world.loop.time():
            self.fail(f"A page on its way to the file is decided on when it is there: page {page}.")
        if not any(mapping.client is client for mapping in object_.mappings.covering(page)):
            self.fail(f"Nobody is told of a loss that is not his: client {client.number}, page {page}.")
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
        if failure.state is State.FREE and loss is not None and not object_.closed:
            self.fail(f"Whoever reports a page that is lost hears that it is known: page {page} was called free.")
        lost_it = failure.outcome is Outcome.RECOVERED and failure.state in (State.DIRTY_FILE, State.ANONYMOUS)
        if lost_it and (loss is None or loss.event_id != failure.event_id):
            self.fail(f"A failure that lost something is the loss's: {failure.event_id}, page {page}.")

    @contextmanager
    def reporting(self, page: int) -> Iterator[list[Failure]]:
        """A report by name is handled: its failure is put into the list."""
        busy = self._reporting[page]
        self._reporting[page] += 1
        found: list[Failure] = []
        yield found
        self._reporting[page] -= 1
        if busy and not found[0].already_poisoned and not self.world.object.closed:
            self.fail(f"A report that comes while another of the page is handled hears so: page {page}.")

    # --- flush

    def flush_begins(self, mapping: Mapping) -> None:
        """A handle asks for a flush."""
        self._flushes[mapping] = ([len(one) - 1 for one in self.history], mapping in self.owed)

    def flush_failed(self, mapping: Mapping) -> None:
        """It was told that changes are lost, or could not be written."""
        _, owed = self._flushes.pop(mapping)
        spent = any(self.world.machine.budget[name] < count for name, count in self.world.scenario.budget)
        if mapping not in self.owed and not owed and not spent and not self.bad and not self.foreign:
            self.fail("flush() fails only where changes were lost or could not be written.")
        self.owed.discard(mapping)

    def flushed(self, mapping: Mapping) -> None:
        """It was told that all is in the file."""
        begun, owed = self._flushes.pop(mapping)
        if owed:
            self.fail("flush() fails once for each handle if changes were lost.")
        for page, known in enumerate(begun):
            if page in self.world.object.losses or self.foreign or not self.world.object.tracks_dirt:
                continue
            # Another flush may have failed half way after this one was done: byte for byte it is this content, or newer.
            found, half = self._on_disk(page), self.world.object.page_size // 2
            newer = self.history[page][known:]
            if found[:half] not in [one[:half] for one in newer] or found[half:] not in [one[half:] for one in newer]:
                self.fail(f"What was written before a flush() is in the file after it: page {page}.")

    # --- after every step

    def check(self) -> str | None:
        """The first sentence that does not hold."""
        world = self.world
        if self.violation is not None or world.dead:
            return self.violation
        object_, store = world.object, world.store
        if world.defects:
            self.fail(f"Nothing goes wrong inside: {world.defects[0]}.")
        if world.machine.quarantine:
            self._check_quarantine()
        if object_.closed:
            return self.violation
        for page in range(object_.pages.count):
            flags = object_.pages.flags[page]
            if bool(flags & LOST) != (page in object_.losses) or (flags & LOST and not flags & POISONED):
                self.fail(f"The books of what is lost balance: page {page}.")
            if not object_.locks.free(page):
                continue
            found = store.pages[page]
            if (found is not None) != bool(flags & PRESENT):
                self.fail(f"A page that nobody works on is present if and only if its flag says so: page {page}.")
            elif found is not None and object_.tracks_dirt and not flags & DIRTY:
                self._check_clean(page, found.content, bool(flags & WRITEBACK))
        if world.manager.reclaim.present != object_.pages.present or object_.pages.present < 0:
            self.fail("The count of present pages balances.")
        return self.violation

    def look_at_losses(self) -> None:
        """After every step, also one that is only told again: those who are owners now are those who had to be told."""
        object_ = self.world.object
        if self.world.dead:
            return
        for page, loss in object_.losses.items():
            key = (loss.event_id, page)
            if key in self._losses:
                continue
            self._losses.add(key)
            self.world.touched(page)
            for mapping in object_.mappings.covering(page):
                if (*key, mapping.client.number) not in self._told:
                    self.fail(f"Each owner is told of a loss: client {mapping.client.number}, page {page}.")
                if loss.state is State.DIRTY_FILE:
                    self.owed.add(mapping)

    def _check_quarantine(self) -> None:
        machine = self.world.machine
        used = {page.number for store in machine.stores for page in store.pages if page is not None}
        for number, count in machine.quarantine.items():
            if number in used or number in machine.free:  # the frame of a page that was lost or read again
                self.fail(f"A quarantined frame is never handed out: frame {number}.")
            if count != 1:
                self.fail(f"A frame is quarantined once: frame {number}.")

    def _check_clean(self, page: int, content: bytes, on_its_way: bool) -> None:
        for area in self.world.store.areas:
            known = any(
                one.address == area.address and one.client.space.pid == area.process.pid
                for one in self.world.object.mappings
            )
            if known and not area.private and area.entries.get(page) == (PAGE, False):
                self.fail(f"Nobody can write to a clean page unseen: {area.process.name}, page {page}.")
        spent = any(self.world.machine.budget[name] < count for name, count in self.world.scenario.budget)
        if not on_its_way and not self.foreign and not spent and content != self._on_disk(page):
            self.fail(f"A clean page is what the file holds: page {page}.")

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
        if self.violation is None:
            self._check_settled()
        return self.violation

    def _check_settled(self) -> None:
        world, object_ = self.world, self.world.object
        if object_.locks.busy:
            self.fail("No lock is lost.")
        if object_.backing is not None and (object_.backing.writing or object_.backing.turn.locked()):
            self.fail("No turn at the file is lost.")
        if world.manager.reclaim._coming:
            self.fail("No promised room is lost.")
        spent = any(world.machine.budget[name] < count for name, count in world.scenario.budget)
        for page in range(object_.pages.count):
            flags = object_.pages.flags[page]
            if flags & WRITEBACK or (flags & POISONED and not flags & LOST):
                self.fail(f"No page stays in between: page {page}.")
            found = world.store.pages[page]
            expected = self.history[page][-1]
            if found is not None and found.content != expected:
                self.fail(f"What is present is what was last written: page {page}.")
            # A frame that was nobody's when it was reported is not ours to keep from the system.
            if (
                found is not None
                and found.bad
                and page not in world.unreported
                and not any(one.outcome in (Outcome.FAILED, Outcome.IGNORED) for one in world.failures)
            ):
                self.fail(f"No page stays in a bad frame whose failure was handled: page {page}.")
            gone = found is None or object_.closed
            if gone and page not in object_.losses and not self.foreign and not spent:
                behind = bytes(len(expected)) if world.disk is None else self._on_disk(page)
                if behind != expected and not (object_.closed and world.disk is None):
                    self.fail(f"What is not present can be had back: page {page}.")


def _text(content: bytes) -> str:
    return str(int.from_bytes(content[:8], "little"))
