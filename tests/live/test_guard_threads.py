"""Guards in several threads: each learns of what it has met, and no thread's zeros become another's data."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy
import pytest

import hwpoison
from tests.live.conftest import known
from tests.live.frames import PAGE
from tests.live.guarded import lose


def test_threads_of_native_code_in_one_guard_are_all_seen(manager: hwpoison.Manager) -> None:
    pages = 512
    memory = manager.allocate(pages * PAGE, "t")
    memory.buffer[:] = known(pages * PAGE)
    lost = [3, 130, 255, 300, 511]
    lose(manager, memory, *lost)
    with ThreadPoolExecutor(4) as threads, pytest.raises(hwpoison.PoisonError) as caught:
        with hwpoison.guard(memory) as safe:
            slices = numpy.split(safe.array("u8"), 4)
            sums = list(threads.map(numpy.sum, slices))
            del slices
    assert len(sums) == 4
    met = {page for one in caught.value.ranges for page in range(one.offset // PAGE, (one.offset + one.nbytes) // PAGE)}
    assert met == set(lost)


def test_a_sum_that_leaves_overlapping_guards_without_an_exception_is_right(manager: hwpoison.Manager) -> None:
    pages, rounds, workers = 32, 400, 4
    memory = manager.allocate(pages * PAGE, "t")
    content = known(pages * PAGE)
    memory.buffer[:] = content
    sums = numpy.frombuffer(content, "u8").reshape(pages, -1).sum(axis=1)
    wrong: list[str] = []
    right, refused = count(), count()
    ended = threading.Event()

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(rounds):
            first = chance.randrange(pages)
            last = chance.randint(first, min(first + 4, pages - 1))
            try:
                with hwpoison.guard(memory) as safe:
                    found = safe.array("u8", (pages, PAGE // 8))[first : last + 1].sum(axis=1)
                    if chance.random() < 0.3:
                        safe.check()
            except hwpoison.PoisonError:
                next(refused)
                continue
            if not (found == sums[first : last + 1]).all():
                wrong.append(f"pages {first} to {last}")
            next(right)

    def strike() -> None:
        chance = random.Random(0)
        while not ended.is_set():
            page = chance.randrange(pages)
            manager.inject(memory, page * PAGE)
            if chance.random() < 0.7:
                page = chance.randrange(pages)
            memory.repair(page * PAGE, content[page * PAGE : (page + 1) * PAGE])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, workers + 1)]
    striker = threading.Thread(target=strike)
    for thread in (striker, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    striker.join()
    assert wrong == []
    assert next(right) > 0
    assert next(refused) > 0
    memory.repair(0, content)
    with hwpoison.guard(memory) as safe:
        assert bytes(safe.buffer) == content, "after the last guard all zero pages are gone"


def test_threads_that_enter_the_first_guard_together_share_one_view(manager: hwpoison.Manager) -> None:
    start = threading.Barrier(8)
    for number in range(20):
        memory = manager.allocate(PAGE, f"t{number}")
        addresses: set[int] = set()

        def enter(memory: hwpoison.Memory = memory, addresses: set[int] = addresses) -> None:
            start.wait()
            with hwpoison.guard(memory) as safe:
                addresses.add(safe.address)

        threads = [threading.Thread(target=enter) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(addresses) == 1
