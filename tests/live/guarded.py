"""For the tests of guards: a memory with known content, pages of which are lost and repaired."""

from __future__ import annotations

import hwpoison
from tests.live.conftest import known
from tests.live.frames import PAGE

PAGES = 8


def known_memory(manager: hwpoison.Manager) -> hwpoison.Memory:
    """Anonymous memory with known content, called t."""
    memory = manager.allocate(PAGES * PAGE, "t")
    memory.buffer[:] = known(PAGES * PAGE)
    return memory


def lose(manager: hwpoison.Manager, memory: hwpoison.Memory, *pages: int) -> None:
    """These pages have content, and are lost."""
    for page in pages:
        assert manager.inject(memory, page * PAGE).victims


def repair(memory: hwpoison.Memory, page: int) -> None:
    """What `known_memory` held there."""
    memory.repair(page * PAGE, known(PAGES * PAGE)[page * PAGE : (page + 1) * PAGE])
