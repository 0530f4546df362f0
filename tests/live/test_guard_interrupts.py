"""Guards and signal handlers that raise, as Ctrl-C does: between any two bytecodes of a guard's beginning, use and end.

After each, no guard is open for the manager, no zero page is left behind, and what was met is told by somebody.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from types import CodeType, FrameType
from typing import Any

import pytest

import hwpoison
from hwpoison.app import guard as guard_module
from hwpoison.app import view as view_module
from tests.live.conftest import known
from tests.live.frames import PAGE
from tests.live.guarded import PAGES, known_memory, lose
from tests.live.process import Child

FILES = {guard_module.__file__, view_module.__file__}
LOST = 2
BYTECODES_MAX = 20_000


@pytest.fixture
def memory(manager: hwpoison.Manager) -> hwpoison.Memory:
    return known_memory(manager)


class Interrupt(KeyboardInterrupt):
    """`unwinding`: it came between bytecodes of no line, with which an exception is passed on. There a guard can't say
    anything any more, and the interpreter looks for no signals: so none can come there in earnest."""

    def __init__(self, unwinding: bool) -> None:
        super().__init__()
        self.unwinding = unwinding


def interrupted_everywhere(action: Callable[[], object], *codes: CodeType) -> Iterator[Interrupt]:
    """Runs `action` again and again, and interrupts it before its first, second, ... bytecode in `FILES` or in `codes`,
    until it comes to its end. Each time the caller looks what was left."""
    for place in count(1):
        assert place < BYTECODES_MAX
        left = place

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename not in FILES and frame.f_code not in codes:
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            if event == "opcode":
                left -= 1
                if not left:
                    raise Interrupt(frame.f_lineno is None)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            action()
        except Interrupt as interrupt:
            sys.settrace(before)
            interrupt.__traceback__ = None
            yield interrupt
        else:
            assert left > 0
            return
        finally:
            sys.settrace(before)


def open_guards(memory: hwpoison.Memory) -> int:
    """What the manager sees."""
    gc.collect(0)
    view = memory._guarded_view()
    return int(view._words[view._guards_word])


def shows_zeros(memory: hwpoison.Memory, leaked: memoryview) -> bool:
    """True if a use of the view outside of all guards reads the lost page."""
    reader, writer = os.pipe()
    try:
        os.write(writer, leaked[LOST * PAGE : (LOST + 1) * PAGE])
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        return False
    finally:
        os.close(reader)
        os.close(writer)
    return True


def told(error: BaseException | None) -> bool:
    """Whether the exception says that the page is lost, itself or by one that it comes from."""
    while error is not None:
        if isinstance(error, hwpoison.PoisonError) and ("t", LOST * PAGE, PAGE) in error.ranges:
            return True
        if any("lost bytes were met" in note for note in getattr(error, "__notes__", ())):
            return True
        error = error.__cause__ or error.__context__
    return False


@pytest.mark.parametrize("kept", [False, True], ids=["a new guard", "a kept guard"])
def test_a_guard_that_is_interrupted_anywhere_is_not_open_any_more(kept: bool, memory: hwpoison.Memory) -> None:
    the_guard = hwpoison.guard(memory)

    def action() -> None:
        with the_guard if kept else hwpoison.guard(memory) as safe:
            safe.check()

    places = 0
    for _ in interrupted_everywhere(action):
        places += 1
        assert kept or open_guards(memory) == 0
        with the_guard if kept else hwpoison.guard(memory) as safe:
            assert open_guards(memory) == 1
            assert safe.buffer[PAGE] == known(2 * PAGE)[PAGE]
        assert open_guards(memory) == 0
    # Python 3.12 and later have fewer places where a line can be interrupted.
    assert places > (100 if sys.version_info < (3, 12) else 90)


@pytest.mark.parametrize("body", ["ends", "raises", "checks", "guards again", "is interrupted"])
def test_what_was_met_is_told_wherever_the_guard_is_interrupted_and_its_zeros_are_gone(
    body: str, manager: hwpoison.Manager, memory: hwpoison.Memory
) -> None:
    lose(manager, memory, LOST)
    with hwpoison.guard(memory) as safe:
        leaked = safe.buffer
    met = False

    def action() -> None:
        nonlocal met
        met = False
        with suppress(hwpoison.PoisonError, SystemExit):
            with hwpoison.guard(memory) as safe:
                met = not safe.buffer[LOST * PAGE]
                if body == "raises":
                    raise ZeroDivisionError
                if body == "checks":
                    safe.check()
                if body == "guards again":
                    with hwpoison.guard(memory) as nested:
                        assert not nested.buffer[LOST * PAGE]
                if body == "is interrupted":
                    raise SystemExit

    by_itself = by_the_next = 0
    for interrupt in interrupted_everywhere(action):
        assert open_guards(memory) == 0
        assert not shows_zeros(memory, leaked)
        # The next guard meets nothing itself.
        caught: hwpoison.PoisonError | None = None
        try:
            with hwpoison.guard(memory) as safe:
                assert safe.buffer[PAGE] == known(2 * PAGE)[PAGE]
        except hwpoison.PoisonError as error:
            caught = error
        assert met or not caught, "nobody is told of a loss that nobody has met"
        assert not met or told(interrupt) or told(caught) or interrupt.unwinding
        by_itself += told(interrupt)
        by_the_next += told(caught)
        with hwpoison.guard(memory):
            pass  # And it is told no more.
    assert by_itself
    assert by_the_next or body == "checks", "an interrupt of the body itself, as check is a part of it, has a note"


def test_a_guard_over_two_memories_that_is_interrupted_tells_of_both(
    manager: hwpoison.Manager, memory: hwpoison.Memory
) -> None:
    other = manager.allocate(PAGE, "other")
    other.buffer[0] = 1
    lose(manager, memory, LOST)
    lose(manager, other, 0)

    def action() -> None:
        with suppress(hwpoison.PoisonError), hwpoison.guard(memory, other) as (one, two):
            assert one.buffer[LOST * PAGE] == two.buffer[0] == 0
            touched.append(True)

    touched: list[bool] = []
    for interrupt in interrupted_everywhere(action):
        assert open_guards(memory) == open_guards(other) == 0
        names = {one.name for one in getattr(interrupt.__context__, "ranges", ())}
        for each in (memory, other):
            try:
                with hwpoison.guard(each):
                    pass
            except hwpoison.PoisonError as error:
                names |= {one.name for one in error.ranges}
        assert names == ({"t", "other"} if touched else set()) or (touched and interrupt.unwinding)
        touched.clear()


def test_a_read_that_is_interrupted_anywhere_leaves_no_guard_open_and_nothing_to_tell(
    manager: hwpoison.Manager, memory: hwpoison.Memory
) -> None:
    lose(manager, memory, LOST)

    def action() -> None:
        for page in (LOST, LOST + 1):
            with suppress(hwpoison.PoisonError):
                memory.read(page * PAGE, PAGE)

    for _ in interrupted_everywhere(action, hwpoison.Memory.read.__code__):
        assert open_guards(memory) == 0
        with hwpoison.guard(memory):
            pass
        assert memory.read(0, LOST * PAGE) == known(PAGES * PAGE)[: LOST * PAGE]


def test_real_signals_that_raise_in_guards_leave_none_open_and_no_zeros() -> None:
    code = """
import random
from hwpoison.app import guard, view
files = {guard.__file__, view.__file__}
struck = tries = 0

def handler(number, frame):
    global struck
    if frame.f_code.co_filename in files:
        struck += 1
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, handler)
with hwpoison.Manager() as manager:
    memory = manager.allocate(4 * 4096, "t")
    memory.array()[:] = 1
    manager.inject(memory, 4096)
    view = memory._guarded_view()
    wrong = 0
    while struck < 200:
        result = None
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 3e-4))
            with hwpoison.guard(memory) as safe:
                result = safe.buffer[4096 * (tries % 2)]
        except (hwpoison.PoisonError, KeyboardInterrupt):
            result = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        tries += 1
        wrong += result == 0 or view._words[view._guards_word] != 0
    say(wrong)
    del safe
"""
    with Child(code) as child:
        assert child.hear() == 0
        assert child.wait() == 0, child.errors
        assert "ignored" not in child.errors
