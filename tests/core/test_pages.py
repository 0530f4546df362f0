"""The two bytes of each page, against a model that has a set of words and a number for each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hwpoison.core.pages import DIRTY, LOST, PIECE_PAGES, POISONED, PRESENT, WRITEBACK, Pages

FLAGS = (PRESENT, DIRTY, WRITEBACK, POISONED, LOST)
ranges = st.tuples(st.integers(0, 39), st.integers(1, 40))


def runs_of(pages: list[int]) -> list[tuple[int, int]]:
    """Sorted page numbers, neighbours joined."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and sum(runs[-1]) == page:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((page, 1))
    return runs


class PagesMachine(RuleBasedStateMachine):
    """Drives both, and compares all that can be asked."""

    @initialize(count=st.integers(1, 40))
    def begin(self, count: int) -> None:
        self.count = count
        self.pages = Pages(count)
        self.flags: list[set[int]] = [set() for _ in range(count)]
        self.generations = [0] * count

    def cut(self, range_: tuple[int, int]) -> tuple[int, int]:
        first = range_[0] % self.count
        return first, min(range_[1], self.count - first)

    @rule(range_=ranges, generation=st.integers(0, 255), flags=st.sampled_from((0, DIRTY)))
    def arrive(self, range_: tuple[int, int], generation: int, flags: int) -> None:
        first, count = self.cut(range_)
        model = self.flags[first : first + count]
        if any({PRESENT, LOST} & one for one in model):
            return
        self.pages.arrived(first, count, generation, flags)
        for page in range(first, first + count):
            self.flags[page] |= {PRESENT, flags} - {0}
            self.generations[page] = generation

    @rule(range_=ranges)
    def leave(self, range_: tuple[int, int]) -> None:
        first, count = self.cut(range_)
        if not all(PRESENT in one for one in self.flags[first : first + count]):
            return
        self.pages.left(first, count)
        for page in range(first, first + count):
            self.flags[page] -= {PRESENT, DIRTY}
            self.generations[page] = 0

    @rule(page=st.integers(0, 39), flag=st.sampled_from((DIRTY, WRITEBACK, POISONED, LOST)))
    def set_flag(self, page: int, flag: int) -> None:
        page %= self.count
        assert self.pages.set(flag, page) == (flag not in self.flags[page])
        self.flags[page].add(flag)

    @rule(page=st.integers(0, 39), flags=st.sets(st.sampled_from((DIRTY, WRITEBACK, POISONED, LOST)), min_size=1))
    def clear_flags(self, page: int, flags: set[int]) -> None:
        page %= self.count
        self.pages.clear(sum(flags), page)
        self.flags[page] -= flags

    @rule(range_=ranges, limit=st.integers(1, 50))
    def ask(self, range_: tuple[int, int], limit: int) -> None:
        first, count = self.cut(range_)
        for flag in FLAGS:
            having = [page for page in range(first, first + count) if flag in self.flags[page]]
            assert list(self.pages.runs(flag, first, count)) == runs_of(having)
        absent = 0
        while first + absent < self.count and absent < limit and not self.flags[first + absent]:
            absent += 1
        assert self.pages.absent_from(first, limit) == absent

    @invariant()
    @precondition(lambda self: hasattr(self, "pages"))
    def is_as_the_model(self) -> None:
        assert list(self.pages.flags) == [sum(one) for one in self.flags]
        assert list(self.pages.generation) == self.generations
        assert self.pages.present == sum(PRESENT in one for one in self.flags)
        for flag in FLAGS:
            assert list(self.pages.runs(flag)) == runs_of([page for page, one in enumerate(self.flags) if flag in one])


TestPages = PagesMachine.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=40)


def arrive_twice(pages: Pages) -> None:
    pages.arrived(2, 1, 1)


def arrive_while_lost(pages: Pages) -> None:
    pages.set(LOST, 0)
    pages.arrived(0, 2, 1)


def leave_twice(pages: Pages) -> None:
    pages.left(2, 2)


@pytest.mark.parametrize("wrong", [arrive_twice, arrive_while_lost, leave_twice])
def test_bookkeeping_that_cannot_be_is_an_assertion(wrong: Callable[[Pages], None]) -> None:
    pages = Pages(4)
    pages.arrived(2, 1, 1)
    with pytest.raises(AssertionError):
        wrong(pages)


def test_runs_are_whole_in_objects_of_any_size() -> None:
    """A run may begin and end anywhere among a million pages."""
    pages = Pages(1 << 20)
    for first, count in ((0, 1), (65_535, 2), (131_071, 200_000), ((1 << 20) - 1, 1)):
        pages.arrived(first, count, 1)
    assert list(pages.runs(PRESENT)) == [(0, 1), (65_535, 2), (131_071, 200_000), ((1 << 20) - 1, 1)]
    assert list(pages.runs(PRESENT, 65_536, 65_536)) == [(65_536, 1), (131_071, 1)]


def test_runs_end_where_nothing_ever_was() -> None:
    pages = Pages(4 * PIECE_PAGES)
    pages.arrived(PIECE_PAGES - 3, 3, 1)
    pages.arrived(3 * PIECE_PAGES, PIECE_PAGES, 1)
    assert list(pages.runs(PRESENT)) == [(PIECE_PAGES - 3, 3), (3 * PIECE_PAGES, PIECE_PAGES)]
    assert list(pages.runs(PRESENT, PIECE_PAGES - 1, 2 * PIECE_PAGES + 2)) == [(PIECE_PAGES - 1, 1), (3 * PIECE_PAGES, 1)]
    assert pages.set(POISONED, 2 * PIECE_PAGES)
    assert list(pages.runs(POISONED)) == [(2 * PIECE_PAGES, 1)]


def test_pages_are_found_by_generation_and_generations_join() -> None:
    pages = Pages(3 * PIECE_PAGES + 5)
    pages.arrived(2, 1, 7)
    pages.arrived(PIECE_PAGES - 1, 2, 8)
    pages.arrived(3 * PIECE_PAGES + 4, 1, 7)
    assert [pages.find_generation(7, first) for first in (0, 2, 3)] == [2, 2, 3 * PIECE_PAGES + 4]
    pages.join_generation(7, 8)
    assert [pages.find_generation(8, first) for first in (0, 3, PIECE_PAGES)] == [2, PIECE_PAGES - 1, PIECE_PAGES]
    assert pages.find_generation(8, PIECE_PAGES + 1) == 3 * PIECE_PAGES + 4
    assert pages.find_generation(7) == -1


def test_two_bytes_a_page_are_all_that_is_kept() -> None:
    pages = Pages(1 << 20)
    pages.arrived(0, 1 << 20, 7, DIRTY)
    assert len(pages.flags) + len(pages.generation) == 2 << 20
