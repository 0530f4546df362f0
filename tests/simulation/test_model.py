"""Long sequences of what clients, files and bad frames do, beside a small model that says what memory must hold.

One operation follows the other here; what happens when two meet is for the explorer (`hwpoison.simulation.explore`). This is
about many: several objects of several pages, of any size and from any byte of a file, in one manager, with a memory limit or
without.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from hwpoison.core import recovery
from hwpoison.core.records import Failure, Outcome, Report, State
from hwpoison.core.writeback import UnwrittenError
from hwpoison.errors import PoisonError
from hwpoison.simulation.loop import Mode
from tests.simulation.model import PAGE, Handle, Memory, pages_of
from tests.simulation.stage import Shape, Stage, shapes

somebody = precondition(lambda self: any(one.handles for one in self.memories))
"""A rule that needs a client that maps something."""


class AnyMemory(Stage):
    """Each rule does an operation, to the manager and to the model, and compares."""

    @initialize(
        data=st.data(),
        objects=st.lists(shapes(), min_size=1, max_size=4),
        limit=st.sampled_from([None, 4, 20, 1000]),
        markers=st.booleans(),
        forgetful=st.booleans(),
        mode=st.sampled_from(["quiet", "batch"]),
    )
    def begin(self, data: Any, objects: list[Shape], limit: int | None, markers: bool, forgetful: bool, mode: Mode) -> None:
        """`limit`: in pages. `markers`: there are poison markers. `forgetful`: those of write protection go with a page."""
        self.set_up(objects, limit, markers, mode)
        self.machine.choose = lambda options: int(forgetful)
        with self.step(data):
            for memory in self.memories:
                if self.open(memory):
                    self.read(self.map(memory, None), range(memory.count))

    def teardown(self) -> None:
        if not self.settled:
            return
        self.machine.budget.clear()
        with self.step(None):
            for process in list(self.clients):
                self.die(process)
        for memory in [one for one in self.memories if one.is_open]:
            # It outlives its users because of what it has lost and the file has not.
            with self.step(None):
                handle = self.map(memory, None)
                self.repair(memory, 0, self.chance.randbytes(memory.nbytes))
                self.die(handle.process)
        with self.step(None):
            self.run(self.manager.close())
        assert not self.manager.objects()

    # --- what is drawn

    def handle(self, data: Any) -> Handle:
        found: Handle = data.draw(st.sampled_from([one for memory in self.memories for one in memory.handles]))
        return found

    def bytes_of(self, data: Any, memory: Memory) -> tuple[int, int]:
        """Any bytes, or whole pages."""
        unit = data.draw(st.sampled_from([PAGE, 1]))
        begin = data.draw(st.integers(0, memory.nbytes // unit)) * unit
        return begin, min(data.draw(st.integers(0, memory.nbytes // unit + 1)) * unit, memory.nbytes - begin)

    # --- who uses what

    @rule(data=st.data(), attach=st.booleans(), reads=st.booleans())
    def a_client_comes(self, data: Any, attach: bool, reads: bool) -> None:
        """It opens an object, or attaches to one that is there, and reads all of it, or nothing yet."""
        with self.step(data):
            memory = data.draw(st.sampled_from(self.memories))
            process = data.draw(st.sampled_from([None, *self.clients]))
            if (attach and memory.is_open) or self.open(memory):
                handle = self.map(memory, process)
                self.read(handle, range(memory.count if reads else 0))

    @somebody
    @rule(data=st.data(), dies=st.booleans())
    def a_client_goes(self, data: Any, dies: bool) -> None:
        with self.step(data):
            handle = self.handle(data)
            if dies:
                self.die(handle.process)
            else:
                handle.process.unmap(handle.area)
                self.manager.unmap(handle.mapping)
                self.left([handle])

    # --- what clients do

    @somebody
    @rule(data=st.data(), stores=st.booleans(), ahead=st.booleans())
    def a_client_accesses_bytes(self, data: Any, stores: bool, ahead: bool) -> None:
        """One page after the other. `ahead`: it has asked for them before."""
        with self.step(data):
            handle = self.handle(data)
            offset, nbytes = self.bytes_of(data, handle.memory)
            pages = pages_of(offset, nbytes)
            if ahead and pages:
                self.prefetch(handle, pages)
            if not stores or not handle.memory.writable:
                self.read(handle, pages)
            else:
                for page in pages:
                    self.store(handle, page, *handle.memory.part(offset, nbytes, page))

    def prefetch(self, handle: Handle, pages: range) -> None:
        self.run(self.manager.prefetch(handle.mapping, pages.start, len(pages)))
        if self.limit is None and not handle.memory.foreign and not self.went_wrong("read", handle.memory):
            assert not handle.memory.absent(pages)

    def read(self, handle: Handle, pages: range) -> None:
        for page in pages:
            absent = handle.memory.absent([page])
            self.accessed(handle.memory, page, absent, self.access(handle, page))

    def store(self, handle: Handle, page: int, begin: int, end: int) -> None:
        memory, new = handle.memory, self.chance.randbytes(end - begin)
        absent = memory.absent([page])
        found = self.access(handle, page, lambda old: old[:begin] + new + old[end:])
        if found is not None:
            memory.write(page * PAGE + begin, new)
            # Where writes are sequential, one fault declares several pages dirty.
            memory.touched |= {one for one in range(page, memory.count) if memory.tracks_dirt and memory.present(one)}
        self.accessed(memory, page, absent, found)

    def accessed(self, memory: Memory, page: int, absent: set[int], found: bytes | None) -> None:
        """Somebody has touched the page, and found what he must, or was refused."""
        if found is not None:
            assert page not in memory.lost
            assert found == memory.pages[page]
        if page not in memory.lost:
            self.read_in(memory, absent, {page} if found is None else set())
        # Its next page may push this one out, and what is written back then was stored before or now.
        self.look_at_files()

    @somebody
    @rule(data=st.data())
    def a_client_asks_to_write(self, data: Any) -> None:
        with self.step(data):
            memory = self.handle(data).memory
            offset, nbytes = self.bytes_of(data, memory)
            content = self.chance.randbytes(nbytes)
            writing = recovery.write(self.manager, memory.object, offset, content)
            if not memory.writable:
                with pytest.raises(PermissionError):
                    self.run(writing)
                return
            partly = {page for page in pages_of(offset, nbytes) if not memory.whole(offset, nbytes, page)}
            absent, refused = memory.absent(partly), set()
            try:
                self.run(writing)
            except PoisonError as error:
                refused = {one.offset // PAGE for one in error.ranges}
            self.read_in(memory, absent, refused - set(memory.lost))
            assert refused == partly & set(memory.lost)
            if not refused:
                memory.write(offset, content)

    @precondition(lambda self: any(one.handles and one.lost for one in self.memories))
    @rule(data=st.data(), repair=st.booleans())
    def a_client_wants_lost_pages_back(self, data: Any, repair: bool) -> None:
        with self.step(data):
            memory = data.draw(st.sampled_from([one for one in self.memories if one.handles and one.lost]))
            offset, nbytes = self.bytes_of(data, memory)
            if repair:
                self.repair(memory, offset, self.chance.randbytes(nbytes))
            else:
                self.discard(memory, pages_of(offset, nbytes))

    def repair(self, memory: Memory, offset: int, content: bytes) -> None:
        repairing = recovery.repair(self.manager, memory.object, offset, content)
        pages = pages_of(offset, len(content))
        if not memory.writable or offset % PAGE or not all(memory.whole(offset, len(content), page) for page in pages):
            with pytest.raises(ValueError if memory.writable else PermissionError):
                self.run(repairing)
            return
        mended = [page for page in pages if page in memory.lost]
        assert self.run(repairing) == sum(memory.nbytes_of(page) for page in mended)
        for page in mended:
            memory.write(page * PAGE, content[page * PAGE - offset :][: memory.nbytes_of(page)])

    def discard(self, memory: Memory, pages: range) -> None:
        given_up = [page for page in pages if page in memory.lost]
        discarding = recovery.discard(self.manager, memory.object, pages.start, len(pages))
        try:
            assert self.run(discarding) == sum(memory.nbytes_of(page) for page in given_up)
        except OSError:
            # The first page that can't be had from the file, and those behind it, stay lost.
            stay = {one.offset // PAGE for one in memory.object.lost(pages.start, len(pages))}
            assert self.went_wrong("read", memory) or memory.cut_off(stay)
            given_up = [page for page in given_up if page < min(stay)]
        for page in given_up:
            memory.fresh(page)

    @somebody
    @rule(data=st.data())
    def a_client_flushes(self, data: Any) -> None:
        with self.step(data):
            handle = self.handle(data)
            memory = handle.memory
            surely, perhaps = memory.cut_off(memory.unsaved()), memory.cut_off(memory.stored | memory.touched)
            with self.writing_back([memory]):
                owed, unwritten, told = handle.owed, False, False
                try:
                    self.run(self.manager.flush(handle.mapping))
                except UnwrittenError:
                    unwritten = True
                except OSError:
                    told = True
            surely |= self.went_wrong("write", memory) or self.went_wrong("sync", memory)
            assert surely <= unwritten <= (surely or perhaps)
            if not unwritten:
                assert told == (owed or any(memory.lost.get(page) is State.DIRTY_FILE for page in memory.untold))
                owed = False
            if told:
                memory.untold.clear()
            # That a sync has failed was told to this handle there and then.
            handle.owed = owed

    # --- what befalls the memory

    @precondition(lambda self: any(one.is_open for one in self.memories))
    @rule(data=st.data(), way=st.sampled_from(["name", "frame", "address", "frame that is held"]))
    def a_page_is_reported(self, data: Any, way: str) -> None:
        with self.step(data):
            if way == "frame that is held" and self.machine.quarantine:
                number = data.draw(st.sampled_from(sorted(self.machine.quarantine)))
                assert self.run(self.manager.report(Report(pfn=number))).already_poisoned
                return
            memory, page = self.page_of_interest(data)
            at = page * PAGE + data.draw(st.integers(0, memory.nbytes_of(page) - 1))
            if way == "frame" and memory.present(page):
                report = Report(pfn=memory.store.goes_bad(page, declared=False))
            elif way == "address" and memory.handles:
                handle = data.draw(st.sampled_from(memory.handles))
                report = Report(pid=handle.process.pid, address=handle.area.address + at)
            else:
                report = Report(name=memory.name, offset=at)
            self.judge(memory, page, report)

    def page_of_interest(self, data: Any) -> tuple[Memory, int]:
        """Of each kind about as often, although most pages have nothing to lose."""
        pages = [(one, page) for one in self.memories if one.is_open for page in range(one.count)]
        present = [(one, page) for one, page in pages if one.present(page)]
        dear = [(one, page) for one, page in present if page in one.only_here()]
        clean = [(one, page) for one, page in present if one.tracks_dirt and page not in one.stored | one.touched]
        some = data.draw(st.sampled_from([some for some in (dear, clean, present, pages) if some]))
        found: tuple[Memory, int] = data.draw(st.sampled_from(some))
        return found

    def judge(self, memory: Memory, page: int, report: Report) -> None:
        """The failure is what the page was, and does what is done to such a page."""
        expected = self.expected_states(memory, page)
        failure: Failure = self.run(self.manager.report(report))
        assert failure.state in expected
        assert failure.outcome is (Outcome.FAILED if failure.already_poisoned else Outcome.RECOVERED)
        before = set(memory.lost)
        self.isolated += failure.state in (State.ANONYMOUS, State.DIRTY_FILE, State.CLEAN_FILE)
        if failure.state in (State.ANONYMOUS, State.DIRTY_FILE):
            self.lose(memory, {page}, failure.state)
        elif failure.state is State.CLEAN_FILE:
            memory.clean([page])
            if memory.handles:
                self.read_in(memory, {page}, {page} if failure.victims else set())
        pids = sorted({one.process.pid for one in memory.handles})
        assert failure.victims == (tuple(pids) if set(memory.lost) != before else ())

    def expected_states(self, memory: Memory, page: int) -> set[State]:
        if page in memory.lost:
            return {State.ALREADY_POISONED}
        if not memory.present(page):
            return {State.FREE}
        if memory.disk is None:
            return {State.ANONYMOUS}
        if page in memory.unsaved():
            return {State.DIRTY_FILE}
        return {State.CLEAN_FILE, State.DIRTY_FILE} if page in memory.touched | memory.stored else {State.CLEAN_FILE}

    @precondition(lambda self: self.limit is not None and any(one.is_open and one.disk is not None for one in self.memories))
    @rule(data=st.data(), wanted=st.integers(1, 12))
    def somebody_wants_room(self, data: Any, wanted: int) -> None:
        """As much as if the limit were met."""
        with self.step(data):
            file = next(one.object for one in self.memories if one.is_open and one.disk is not None)
            reclaim = self.manager.reclaim
            before = reclaim.present
            limit, reclaim.limit = reclaim.limit, before
            self.run(recovery.make_room(self.manager, file, wanted))
            reclaim.limit = limit
            clean = [
                (one, page) for one in self.memories if one.is_open and one.disk is not None
                for page in range(one.count) if one.present(page) and page not in one.stored | one.touched
            ]  # fmt: skip
            assert reclaim.present <= before - wanted or not clean

    @precondition(lambda self: self.limit is None)
    @rule(data=st.data())
    def everything_is_written_back(self, data: Any) -> None:
        """Where there is a limit, whoever wants room does it often enough."""
        with self.step(data), self.writing_back([one for one in self.memories if one.is_open]):
            self.run(self.manager.write_back())

    # --- what befalls the files

    @rule(data=st.data(), what=st.sampled_from(["read fails", "write fails", "sync fails", "change", "cut"]))
    def something_goes_wrong(self, data: Any, what: str) -> None:
        """Now, or up to twice at some later time."""
        files = [one for one in self.memories if one.disk is not None]
        if what not in ("change", "cut"):
            self.machine.budget[what] = 2
        elif files:
            with self.step(data):
                memory = data.draw(st.sampled_from(files))
                nbytes = len(memory.disk.content)
                begin, count = data.draw(st.integers(0, nbytes)), data.draw(st.integers(0, nbytes))
                if what == "cut":
                    memory.change_file(partial(memory.disk.truncate, begin + count // PAGE))
                else:
                    # Also no byte at all: its times have changed, which may mean anything.
                    new = self.chance.randbytes(min(count, nbytes - begin))
                    memory.change_file(partial(memory.disk.change, begin, new))


AnyMemory.TestCase.settings = settings(max_examples=150, stateful_step_count=80)
TestEverySequenceShowsWhatTheModelSays: Any = AnyMemory.TestCase
