"""How much is brought in: by the order of the faults alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwpoison.core.readahead import STREAMS, next_window


def windows(pages: Iterable[int], limit: int = 512) -> list[int]:
    streams: dict[int, int] = {}
    return [next_window(streams, page, limit) for page in pages]


def sequential(streams: dict[int, int], page: int, limit: int = 512) -> Iterator[int]:
    """The windows of somebody who reads on from `page`."""
    while True:
        window = next_window(streams, page, limit)
        yield window
        page += window


def test_sequential_access_grows_to_the_limit_and_stays_there() -> None:
    assert list(islice(sequential({}, 0), 8)) == [1, 4, 16, 64, 256, 512, 512, 512]


def test_a_limit_between_two_steps_is_reached() -> None:
    assert list(islice(sequential({}, 7, limit=100), 6)) == [1, 4, 16, 64, 100, 100]


@given(st.lists(st.integers(0, 1 << 20).map(lambda page: 2 * page), unique=True))
def test_access_that_never_goes_on_where_it_was_reads_no_page_too_many(pages: list[int]) -> None:
    """No page is even reached by another one's window: these are all two apart."""
    assert windows(pages) == [1] * len(pages)


def test_backward_access_is_no_stream() -> None:
    assert windows(range(100, 0, -1)) == [1] * 100


def test_streams_that_take_turns_grow_each_by_itself() -> None:
    streams: dict[int, int] = {}
    readers = [sequential(streams, start << 20) for start in range(STREAMS)]
    rounds = [[next(reader) for reader in readers] for _ in range(6)]
    assert rounds == [[window] * STREAMS for window in (1, 4, 16, 64, 256, 512)]


def test_a_stream_survives_random_access_beside_it() -> None:
    streams: dict[int, int] = {}
    reader = sequential(streams, 0)
    found = []
    for other in range(5):
        found.append(next(reader))
        for page in range(STREAMS - 1):
            assert next_window(streams, (1 << 20) + 1000 * (other * STREAMS + page), 512) == 1
    assert found == [1, 4, 16, 64, 256]


def test_the_stream_that_was_not_used_for_longest_is_forgotten_first() -> None:
    streams: dict[int, int] = {}
    old = sequential(streams, 0)
    next(old)
    kept = sequential(streams, 1 << 20)
    next(kept)
    for page in range(STREAMS - 1):
        next_window(streams, (2 << 20) + 1000 * page, 512)
    assert next(kept) == 4
    assert next(old) == 1


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 64)), max_size=200))
def test_a_window_is_within_its_limit_and_few_streams_are_kept(faults: list[tuple[int, int]]) -> None:
    streams: dict[int, int] = {}
    for page, limit in faults:
        assert 1 <= next_window(streams, page, limit) <= limit
        assert len(streams) <= STREAMS


@pytest.mark.parametrize("touched", [0, 2, 3])
def test_a_jump_within_a_window_begins_anew(touched: int) -> None:
    """The second window of a stream is pages 1 to 4; it goes on at 5 and nowhere else."""
    assert windows([0, 1, 1 + touched]) == [1, 4, 1]
