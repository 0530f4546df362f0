"""The end of an object: when nobody refers to it any more, though somebody may come again while it is written back."""

from __future__ import annotations

import asyncio

import pytest

from hwpoison.core.recovery import write
from hwpoison.linux.syscalls import PAGE_SIZE
from tests.core.conftest import Core, Run


@pytest.mark.parametrize("turns", range(40))
def test_who_comes_and_goes_while_an_object_ends_loses_no_change_and_ends_it_once(run: Run, turns: int) -> None:
    """`turns`: of the event loop, after which somebody comes."""

    async def story(core: Core) -> None:
        path = core.new_file(4)
        expected = bytearray(path.read_bytes())
        object_ = core.open(path, writable=True)
        await write(core.manager, object_, 10, b"first")
        expected[10:15] = b"first"
        core.manager.release(object_)
        for _ in range(turns):
            await asyncio.sleep(0)
        if not object_.closed:
            core.manager.hold(object_)
            await write(core.manager, object_, PAGE_SIZE + 10, b"second")
            expected[PAGE_SIZE + 10 : PAGE_SIZE + 16] = b"second"
            core.manager.release(object_)
            await core.manager.write_back()
        await core.manager.settled(str(path))
        assert object_.closed
        assert path.read_bytes() == expected
        assert core.events == []

    run(story)
