"""How much to bring in: one page where access is random, more and more where it is sequential.

A mapping remembers where each of its recent sequential streams would go on. A fault exactly there multiplies the window;
any other fault begins a new stream of one page. Random access therefore never reads a page too many.
"""

from __future__ import annotations

STREAMS = 16
"""Streams that a mapping remembers; the oldest is forgotten."""
GROWTH = 4
"""Each fault of a stream brings in this many times as much as the one before."""


def next_window(streams: dict[int, int], page: int, limit: int) -> int:
    """Pages to bring in for a fault at `page`, at most `limit`. `streams`: next page of a stream -> its last window."""
    last = streams.pop(page, 0)
    window = max(1, min(last * GROWTH if last else 1, limit))
    if len(streams) >= STREAMS:
        del streams[next(iter(streams))]
    streams[page + window] = window
    return window
