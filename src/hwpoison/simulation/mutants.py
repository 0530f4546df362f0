"""Defects planted on purpose: each one a bug that a kernel had, or a fact about Linux forgotten, in terms of our core.

A mutant is a change to the source of one module, made while that is imported, in a process of its own. The explorer must
find every one: what it can't find in others it would not find in us.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Literal


@dataclass(frozen=True, slots=True)
class Mutant:
    """In `module`, `before` becomes `after`. `source` is where it comes from, `what` is what goes wrong."""

    name: str
    source: str
    what: str
    module: str
    before: str
    after: str

    @property
    def hint(self) -> str:
        """How the name of a cell begins in which it is known to be caught: that is explored first."""
        return _KNOWN_CELLS.get(self.name, "")

    @property
    def mode(self) -> Literal["quiet", "batch"]:
        """In which mode it is to be caught: in quiet, but where two things must arrive together."""
        return "batch" if self.name in _TOGETHER else "quiet"

    @property
    def why_batch(self) -> str:
        """Why it can't be caught in quiet mode."""
        return _TOGETHER.get(self.name, "")


class _Planting(SourceFileLoader):
    mutant: Mutant

    def get_code(self, fullname: str) -> object:  # type: ignore[override]
        text = self.get_source(fullname)
        assert text is not None
        if text.count(self.mutant.before) != 1:
            raise ValueError(f"the mutant {self.mutant.name!r} does not fit {fullname} any more")
        return compile(text.replace(self.mutant.before, self.mutant.after), self.get_filename(fullname), "exec")


class _Finder(MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self._mutant.module:
            return None
        spec = PathFinder.find_spec(fullname, path)
        assert spec is not None
        assert spec.origin is not None
        loader = _Planting(fullname, spec.origin)
        loader.mutant = self._mutant
        spec.loader = loader
        return spec


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """While this lasts, the core and all that is built on it are imported anew, with the mutant in it."""
    kept = {name: module for name, module in sys.modules.items() if name.startswith("hwpoison.") and name != __name__}
    finder = _Finder(mutant)
    for name in kept:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [one for one in sys.modules if one.startswith("hwpoison.") and one != __name__]:
            del sys.modules[name]
        sys.modules.update(kept)


FAILURE, FAULTS, RECOVERY = "hwpoison.core.failure", "hwpoison.core.faults", "hwpoison.core.recovery"
WRITEBACK, LOCKS, POLICY, MANAGER = (
    "hwpoison.core.writeback",
    "hwpoison.core.locks",
    "hwpoison.core.policy",
    "hwpoison.core.manager",
)

TAKEOVER, RECLAIM = "hwpoison.core.takeover", "hwpoison.core.reclaim"

MUTANTS = (
    Mutant(
        "flag set after the lock", "Linux 405ce051236c (the flag was set before the page could not change any more)",
        "a second report is handled beside the first", FAILURE,
        "    handling.object.pages.set(POISONED, handling.page)\n", "",
    ),
    Mutant(
        "no recheck after the lock", "Linux a3e0f9e47d5e (the page was another one after it was locked)",
        "what the page was before the wait decides", FAILURE,
        "    return await _handle(handling, started, _act)\n",
        "    return await _handle(handling, started, lambda handling, _: _act(handling, row))\n",
    ),
    Mutant(
        "no wait for write-back", "Linux e8675d291ac0 (the wait for write-back was skipped)",
        "a page on its way to the file is decided on too early", FAILURE,
        "            await _io_settled(handling)\n", "",
    ),
    Mutant(
        "a page on its way is clean", "Linux e8675d291ac0 (a page that was still written back was taken for a clean one)",
        "a write that fails afterwards is forgotten", FAILURE,
        "    if flags & (DIRTY | WRITEBACK):\n", "    if flags & DIRTY:\n",
    ),
    Mutant(
        "a lost page stays in the books as well", "Linux 31134651778 (counted twice)",
        "a lost page is struck again as if it were there", FAILURE,
        "        if not object_.pages.flags[page] & LOST:\n            object_.pages.clear(POISONED, page)\n",
        "        object_.pages.clear(POISONED, page)\n",
    ),
    Mutant(
        "the frame goes back", "Linux 79f5f8fab482 (poisoned pages were left to the allocator)",
        "a bad frame is handed out again", FAILURE,
        "        frame.quarantine()\n", "        frame.release()\n",
    ),
    Mutant(
        "an isolated frame is not held", "Linux 79f5f8fab482 (poisoned pages were left to the allocator)",
        "a bad frame that was taken out is forgotten", FAILURE,
        "        frame.quarantine()\n", "        pass\n",
    ),
    Mutant(
        "the frame of the report is not compared", "linux-facts 9: compaction moves pages to other frames",
        "a page that is well is destroyed, and the bad frame is used on", FAILURE,
        "    frame = isolate(object_, page, handling.place.pfn)\n", "    frame = isolate(object_, page)\n",
    ),
    Mutant(
        "clean pages of a file are lost", "Linux 6a46079cf57a (clean page cache is dropped, and nobody is killed for it)",
        "what the file has is declared lost", FAILURE,
        "    if flags & (DIRTY | WRITEBACK):\n", "    if flags & (DIRTY | WRITEBACK | PRESENT):\n",
    ),
    Mutant(
        "wake forgotten", "userfaultfd: a COPY that does not wake (linux-facts 6)",
        "who met the page while it was away sleeps for ever", FAULTS,
        "    finally:\n        mapping.wake(page)\n", "    finally:\n        pass\n",
    ),
    Mutant(
        "no recheck of the page in a fault", "linux-facts 6: a COPY onto a page that is present fails, and wakes nobody",
        "a page that has come meanwhile is brought in again", FAULTS,
        "        elif flags & PRESENT:\n            return\n        else:\n", "        else:\n",
    ),
    Mutant(
        "zeros for a lost page", "Linux a76054266661, CVE-2022-49828 (a truncated page reads as zeros)",
        "the loss is silent", FAULTS,
        "        if flags & LOST or object_.closed:\n"
        "            await answer_lost(books, mapping, page, thread)\n        elif",
        "        if object_.closed:\n            await answer_lost(books, mapping, page, thread)\n        elif",
    ),
    Mutant(
        "a first write is not noted", "linux-facts 14: the fault of a first store is all that says that a page is dirty",
        "changes are read again from the file when a failure strikes", FAULTS,
        "    for page in range(first, first + count):\n        mapping.object.pages.set(DIRTY, page)\n", "",
    ),
    Mutant(
        "at once without looking at the locks", "Linux 25182f05ffed (a page was handled while it was being built)",
        "content is put beside somebody who works on the page", FAULTS,
        "    if not object_.locks.free(page):\n        return False\n", "",
    ),
    Mutant(
        "stale content after a change", "linux-facts 28: only size and times of a file tell of a change",
        "a healed page mixes versions of the file", RECOVERY,
        "    return content if len(content) == nbytes and await unchanged() else None\n",
        "    return content if len(content) == nbytes else None\n",
    ),
    Mutant(
        "stale content after a loss", "linux-facts 18: a lost page is an absent one",
        "a write to a part of a lost page reads the old content in", RECOVERY,
        "            if not whole and not flags[page] & (PRESENT | LOST):\n",
        "            if not whole and not flags[page] & PRESENT:\n",
    ),
    Mutant(
        "zeros before the right content", "linux-facts 5: a COPY brings page and content in together",
        "others see zeros while a page is repaired", RECOVERY,
        "        object_.store.publish(page, content)\n    except",
        "        object_.store.publish(page, bytes(len(content)))\n"
        "        object_.store.write(page * object_.page_size, content)\n    except",
    ),
    Mutant(
        "a repaired page is clean", "linux-facts 14: what the manager puts in is seen by no write protection",
        "what was repaired never gets to the file", RECOVERY,
        "    dirty = DIRTY if object_.tracks_dirt and content is not None else 0\n", "    dirty = 0\n",
    ),
    Mutant(
        "markers stay after a repair", "Linux 2e6053fea379 (who touched it looped on a page that was well)",
        "a page that is well is refused", RECOVERY,
        "        if page in mapping.markers:\n", "        if page in ():\n",
    ),
    Mutant(
        "not watched again while absent", "linux-facts 15: a punch can lose the marker",
        "a first write is unseen", RECOVERY,
        "                drop(books, object_, first, length)\n                await object_.watch(first, length)\n",
        "                drop(books, object_, first, length)\n",
    ),
    Mutant(
        "the owners are not told", "linux-facts 25: who does not have the page mapped is told by nobody",
        "a loss goes unreported", RECOVERY,
        "        victims = tell_owners(books, object_, page, loss)\n", "        victims = ()\n",
    ),
    Mutant(
        "dirt of a request forgotten", "linux-facts 14: a write to the memfd is unseen",
        "what the manager wrote for a client never gets to the file", RECOVERY,
        "                dirty = DIRTY if object_.tracks_dirt and not flags[page] & DIRTY else 0\n",
        "                dirty = 0\n",
    ),
    Mutant(
        "what could not be written is changed", "linux-facts 26: a write to a page that the kernel has declared bad is EIO",
        "a clean page is lost, which the file has", RECOVERY,
        "                    object_.pages.clear(dirty, page)\n                    raise\n", "                    raise\n",
    ),
    Mutant(
        "a sync that failed at the manager's death is forgotten", "Linux 5660e13d2fd6 (an error of writing was lost)",
        "what was written to make room is not on the disk, and flush() says that it is", TAKEOVER,
        "            if others or any(", "            if any(",
    ),
    Mutant(
        "copied before it is watched", "linux-facts 14: a store between the copy and the protection",
        "a store is neither in the file nor dirty", WRITEBACK,
        "        unwatched = await object_.watch_again(first, count)\n"
        "        copies, failed = _copied(object_, _well(object_, first, count))\n",
        "        copies, failed = _copied(object_, _well(object_, first, count))\n"
        "        unwatched = await object_.watch_again(first, count)\n",
    ),
    Mutant(
        "clean before the write has ended", "Linux e8675d291ac0 (the wait for write-back was skipped)",
        "a failure during the write reads the old content again", WRITEBACK,
        "                object_.pages.set(WRITEBACK, page)\n", "",
    ),
    Mutant(
        "an error leaves the page clean", "Linux 5660e13d2fd6 (a failed write left the page clean, and its error was lost)",
        "what could not be written is dropped later", WRITEBACK,
        "            if error is not None:\n"
        "                failed = failed or error\n                _dirty_again(object_, start, length)\n",
        "            if error is not None:\n                failed = failed or error\n",
    ),
    Mutant(
        "one write overtakes another", "linux-facts 30: two writes that are under way end in any order",
        "the older content is in the file in the end", WRITEBACK,
        "            # Two flushes of one object: the second waits for the first one's write, or it would overtake it.\n"
        "            await object_.written_back(page)\n",
        "            pass\n",
    ),
    Mutant(
        "the lock is kept on a cancelled wait", "CPython bpo-27585 (given the lock, and cancelled in the same turn)",
        "a lock is lost", LOCKS,
        "            if range_ in self._held:\n                self.release(range_)\n            else:\n",
        "            if range_ not in self._held:\n",
    ),
    Mutant(
        "what another object has lost meanwhile is read from the file", "a reader's refutation: no second look",
        "stale content is shown as what was last written", RECOVERY,
        "            # Changes to it may have been lost while it was read.\n"
        "            _none_lost_elsewhere(books, object_, offset, nbytes)\n", "",
    ),
    Mutant(
        "a file that can't be asked has been written", "a reader's refutation: fstat fails, beside the write",
        "flush() says that all is well, and the page is clean", WRITEBACK,
        "                books.record(\"error\", object_, detail=backing.changed)\n            return error\n",
        "                books.record(\"error\", object_, detail=backing.changed)\n            return None\n",
    ),
    Mutant(
        "a window counts as there before it is", "a reader's refutation: flags before the pages",
        "pages are said to be present, and are not", RECOVERY,
        "            await object_.store.fill(first, content)\n", "            pass\n",
    ),
    Mutant(
        "every page is taken for a part of a large frame", "a reader's refutation: clean neighbours lost without need",
        "pages that the file has are lost, and the bad frame goes back", FAILURE,
        "    frame = isolate(handling.object, handling.page, handling.place.pfn)\n", "    frame = None\n",
    ),
    Mutant(
        "the marker goes to another process's address", "a reader's refutation: all processes had one address in simulation",
        "who sleeps at the loss is never answered", POLICY,
        "    address = mapping.address_of(page)\n    with",
        "    address = object_.mappings.covering(page)[0].address_of(page)\n    with",
    ),
    Mutant(
        "a cached file is read from its begin", "a reader's refutation: the object's offset in the file is forgotten",
        "another part of the file is shown", FAULTS,
        "        found = backing.file.read_cached(backing.offset + page * object_.page_size, nbytes)",
        "        found = backing.file.read_cached(page * object_.page_size, nbytes)",
    ),
    Mutant(
        "a bad page keeps its neighbours from the file", "a reader's refutation, and once a bug of ours",
        "flush() fails for pages that are well", WRITEBACK,
        "            if length > 1:\n"
        "                copies += _copied(object_, [(page, 1) for page in range(start, start + length)])[0]\n", "",
    ),
    Mutant(
        "flags of a large frame go before its losses are known", "a reader's refutation, and once a bug of ours",
        "what a dying manager gave up reads as zeros, or as the file", RECOVERY,
        "        books.reclaim.left(object_, length)\n",
        "        books.reclaim.left(object_, length)\n        object_.pages.left(start, length)\n",
    ),
    Mutant(
        "who has gone keeps memory resident", "a reader's refutation: nothing said that these books balance",
        "its pages can't be dropped any more", MANAGER,
        "            residence.end(self, mapping, number)\n", "            pass\n",
    ),
    Mutant(
        "two that want a page to stay count as one", "a reader's refutation: no two had the same page resident",
        "a system call fails when the first of them has gone", "hwpoison.core.residence",
        "        counted[page] += by\n", "        counted[page] = max(by, 0)\n",
    ),
    Mutant(
        "what is resident is dropped", "linux-facts 2: a system call in user mode fails at an absent page",
        "a system call fails where it was promised not to", RECLAIM,
        "    if object_.resident and any(page in object_.resident for page in range(first, first + count)):\n"
        "        return False\n", "",
    ),
    Mutant(
        "what is resident is watched", "linux-facts 2: a system call in user mode fails at a page that is watched",
        "a system call fails where it was promised not to", WRITEBACK,
        "        unwatched = await object_.watch_again(first, count)\n",
        "        await object_.watch(first, count)\n        unwatched = ()\n",
    ),
    Mutant(
        "what a system call may write to is clean", "it can't be watched, so nobody sees it written to",
        "what a call writes after a write-back never gets to the file", WRITEBACK,
        "                if page not in unwatched:\n                    object_.pages.clear(DIRTY, page)\n",
        "                object_.pages.clear(DIRTY, page)\n",
    ),
    Mutant(
        "a loss shown as zeros is not counted", "linux-facts 19: the manager records the hit, then answers",
        "a guard ends as if its zeros were the content", POLICY,
        "            mapping.hits.hit()\n", "",
    ),
    Mutant(
        "a large frame is believed isolated", "linux-facts 11: a punch that returned 0 may have isolated nothing",
        "a page stays in its bad frame", FAILURE,
        "        return _lose_block(handling)\n    isolated = _quarantine(handling, handling.object, frame)\n",
        "        return Outcome.RECOVERED\n    isolated = _quarantine(handling, handling.object, frame)\n",
    ),
    Mutant(
        "one page of a large frame is named", "Linux 62228840660 (of a huge page the wrong one was reported)",
        "its neighbours are gone, and nobody is told", RECOVERY,
        "    present = list(object_.pages.runs(PRESENT, first, count))\n", "    present = [(page, 1)]\n",
    ),
    Mutant(
        "what was not synced is clean", "linux-facts 29: after a failed fsync the next one succeeds without the data",
        "what is not on the disk is dropped, and the next flush says that it is there", WRITEBACK,
        "        for first, count in written:\n            _dirty_again(object_, first, count)\n", "",
    ),
    Mutant(
        "the sync is left out", "linux-facts 29: what was written is on the disk when fsync has returned, and not before",
        "flush succeeds, and a loss of power takes what was flushed", WRITEBACK,
        "        await backing.file.sync()\n", "        pass\n",
    ),
    Mutant(
        "only the first owner is told", "linux-facts 25: all who have the page mapped and asked for it are told",
        "a loss goes unreported to the others", POLICY,
        "for mapping in object_.mappings.covering(page)}", "for mapping in object_.mappings.covering(page)[:1]}",
    ),
    Mutant(
        "a flush keeps its reference", "Linux ead07f6a867b (references were not dropped on each way out)",
        "an object stays for ever", MANAGER,
        "            await writeback.flush(self, mapping)\n        finally:\n            self.release(mapping.object)\n",
        "            await writeback.flush(self, mapping)\n        finally:\n            pass\n",
    ),
    Mutant(
        "what nobody was told has no heir", "Linux b4678df184b3 (an error that nobody has seen is seen by who opens next)",
        "who has the file next is not told of lost changes", RECOVERY,
        "        object_.untold.add(page)\n", "        pass\n",
    ),
    Mutant(
        "the last client's changes are not written", "linux-facts 29: only what was written and synced is in the file",
        "what was stored is neither in memory nor in the file", MANAGER,
        "            error = await write_back_all(self, object_)\n", "            error = OSError()\n",
    ),
    Mutant(
        "an error of writing uses up that of a loss", "Linux 5660e13d2fd6 (one error hid another from who asked)",
        "a flush that is tried again succeeds although changes are lost", WRITEBACK,
        "        raise unwritten\n", "        mapping.error_seen = mapping.errors\n        raise unwritten\n",
    ),
    Mutant(
        "flush says it never", "Linux b4678df184b3 (an error from before was told to nobody)",
        "a flush succeeds although changes are lost", RECOVERY,
        "            object_.error_sequence += 1\n", "",
    ),
    Mutant(
        "the next manager wakes nobody", "linux-facts 21: faults that the dead manager had read are shown to nobody again",
        "who slept when it died sleeps for ever", TAKEOVER,
        "            mapping.wake(mapping.first, mapping.count)\n", "            pass\n",
    ),
    Mutant(
        "what was found out is not said by the next manager", "Linux 31134651778 (counted twice)",
        "a report is handled twice", TAKEOVER,
        "    taking.answers()\n", "",
    ),
    Mutant(
        "what was on its way is clean to the next one", "linux-facts 29: a write may have written nothing",
        "changes are dropped that no file has", TAKEOVER,
        "DIRTY if flags & (DIRTY | WRITEBACK) else 0", "DIRTY if flags & DIRTY else 0",
    ),
    Mutant(
        "a loss is forgotten by the next manager", "linux-facts 18: a lost page is an absent one",
        "what was lost reads as what the file has, or as zeros", TAKEOVER,
        "        for (number, page), value in of_kind(self.records, \"loss\").items():\n",
        "        for (number, page), value in ():\n",
    ),
    Mutant(
        "markers outlive the manager", "linux-facts 20: a poison marker stays until it is replaced",
        "a page that was repaired is refused", TAKEOVER,
        "                await well_again(books, object_, page, loss, kind)\n", "                pass\n",
    ),
    Mutant(
        "a loss is over before its markers are gone", "linux-facts 20: a poison marker stays until it is replaced",
        "the next manager does not know of the markers", RECOVERY,
        "    for mapping in object_.mappings.covering(page):\n        mapping.client.forget_told",
        "    books.journal.loss_over(object_, page)\n"
        "    for mapping in object_.mappings.covering(page):\n        mapping.client.forget_told",
    ),
    Mutant(
        "not watched again by the next manager", "linux-facts 15: a punch can lose the marker",
        "a first write is unseen", TAKEOVER,
        "        await _watch(object_)\n", "        pass\n",
    ),
    Mutant(
        "who has gone is written down again", "linux-facts 21: a userfaultfd lives while somebody has it, whoever is dead",
        "the next manager finds a mapping of nobody", "hwpoison.core.journal",
        "        if mapping.gone:\n            return\n        slot", "        slot",
    ),
    Mutant(
        "a sync of the dead manager has succeeded", "linux-facts 29: of an error, fsync tells each descriptor once",
        "what is not on the disk is said to be there", TAKEOVER,
        "    taking.not_surely_durable()\n", "",
    ),
    Mutant(
        "a loss of the dead manager is no error any more", "a reader's refutation: nobody flushed after a death",
        "what was lost before the death, flush() says nothing of", RECOVERY,
        "            books.journal.errors(object_)\n", "",
    ),
    Mutant(
        "a loss of the dead manager was told", "a reader's refutation: nobody came after a death",
        "who has the file next is not told", RECOVERY,
        "        books.journal.loss(object_, page, loss, untold=changed)\n",
        "        books.journal.loss(object_, page, loss, untold=False)\n",
    ),
    Mutant(
        "what is on its way is lost as what the file has", "Linux e8675d291ac0 (a page on its way is no clean one)",
        "of a large frame that is given up, flush() does not tell all", RECOVERY,
        "object_.pages.flags[page] & (DIRTY | WRITEBACK)}", "object_.pages.flags[page] & DIRTY}",
    ),
    Mutant(
        "a large frame is lost as what was struck in it", "Linux 79f5f8fab482 (a huge page is more than its first page)",
        "changes beside a clean page are lost, and nobody says so", RECOVERY,
        "one_loss = replace(loss, state=State.DIRTY_FILE) if one in changed else loss", "one_loss = loss",
    ),
    Mutant(
        "an object ends beside its write-back", "Linux e8675d291ac0 (the wait for write-back was skipped)",
        "the file is closed before it has what was written", MANAGER,
        "            await object_.written_back(page)\n", "            pass\n",
    ),
    Mutant(
        "at once without asking what is lost elsewhere", "a reader's refutation: it was asked only where one waits",
        "what another object has lost is read from the file", FAULTS,
        "        if backing.writing or books.lost_changes_of[backing.place]:\n", "        if backing.writing:\n",
    ),
    Mutant(
        "a failure ends with its manager", "Linux 6a46079cf57a (what was begun is finished, whoever is killed for it)",
        "a page stays in between for ever", TAKEOVER,
        "    taking.finish_failures()\n", "",
    ),
    Mutant(
        "what a request has put in is clean to the next manager",
        "linux-facts 14: what the manager puts in is seen by no write protection",
        "what was written never gets to the file", RECOVERY,
        "                object_.pages.set(dirty, page)\n                try:\n                    await",
        "                try:\n                    await",
    ),
    Mutant(
        "a write of the dead manager is somebody else's", "linux-facts 28: only size and times of a file tell of a change",
        "what can be read is declared lost", TAKEOVER,
        "        if writing and identity is not None:\n", "        if False:\n",
    ),
)  # fmt: skip

_TOGETHER = {"the lock is kept on a cancelled wait": "a grant and a timer come in the same turn of the event loop"}
"""What needs two things at a time, and which."""
_KNOWN_CELLS = {
    "what nobody was told has no heir": "writable dirty: report 0, close 0, attach and flush 0",
    "the last client's changes are not written": "writable dirty: die 0, close 0",
    "the frame of the report is not compared": "writable dirty: flush 0, frame report 0, move 0",
    "an isolated frame is not held": "read-only present: frame report 0",
    "clean pages of a file are lost": "read-only present: frame report 0",
    "the lock is kept on a cancelled wait": "read-only absent: read 0, report 0",
    "flag set after the lock": "read-only absent: report 0, report 0",
    "no recheck after the lock": "read-only absent: read 0, report 0",
    "no wait for write-back": "writable absent: flush 0, report 0",
    "a page on its way is clean": "writable absent: flush 0, report 0",
    "no recheck of the page in a fault": "anonymous lost: read 0, request to write 0",
    "a first write is not noted": "writable absent: read 0, read 0",
    "at once without looking at the locks": "cached absent: read 0, read 0",
    "stale content after a change": "read-only absent: read 0, change 0",
    "a repaired page is clean": "writable absent: request to write 0, report 0",
    "not watched again while absent": "cached present: write 0, evict 0",
    "dirt of a request forgotten": "writable absent: read 0, request to write 0",
    "what could not be written is changed": "writable present: kernel poison 0, request to write half of 0",
    "a sync that failed at the manager's death is forgotten": "writable dirty: flush 0, write back 0 and the manager dies",
    "a loss of the dead manager is no error any more": "writable dirty: flush 0, report 0 and the manager dies",
    "a loss of the dead manager was told": "writable dirty: report 0, attach and flush 0 and the manager dies",
    "what is on its way is lost as what the file has": "writable dirty present: report 1, collapse 0, flush 0",
    "a large frame is lost as what was struck in it": "writable dirty present: report 1, collapse 0, flush 0",
    "an object ends beside its write-back": "writable dirty: write back 0, close 0",
    "at once without asking what is lost elsewhere": "cached absent: read 0, lose elsewhere 0",
    "copied before it is watched": "writable absent: read 0, flush 0",
    "clean before the write has ended": "writable absent: read 0, flush 0",
    "an error leaves the page clean": "writable absent: read 0, evict 0",
    "one write overtakes another": "writable absent: flush 0, flush 0",
    "what was not synced is clean": "writable dirty: flush twice 0",
    "the sync is left out": "writable dirty: read 0, flush 0",
    "only the first owner is told": "anonymous present: read 0, report 0",
    "an error of writing uses up that of a loss": "writable dirty: flush twice 0, report 0",
    "a flush keeps its reference": "writable dirty: read 0, flush 0",
    "flush says it never": "writable absent: flush 0, report 0",
    "a large frame is believed isolated": "read-only present: hardware 0, collapse 0",
    "markers stay after a repair": "anonymous lost: read 0, repair 0",
    "zeros before the right content": "writable lost: read 0, repair 0",
    "stale content after a loss": "writable lost: read 0, request to write half of 0",
    "the frame goes back": "read-only present: read 0, hardware 0",
    "one page of a large frame is named": "anonymous present present: report 0, collapse 1",
    "the next manager wakes nobody": "read-only absent: read 0 and the manager dies",
    "what was found out is not said by the next manager": "anonymous present: report 0 and the manager dies",
    "what was on its way is clean to the next one": "writable dirty: write back 0 and the manager dies",
    "a loss is forgotten by the next manager": "anonymous lost: read 0 and the manager dies",
    "markers outlive the manager": "anonymous lost: repair 0 and the manager dies",
    "a loss is over before its markers are gone": "anonymous lost: repair 0 and the manager dies",
    "not watched again by the next manager": "cached present: evict 0 and the manager dies",
    "a sync of the dead manager has succeeded": "writable dirty:  and the manager dies",
    "who has gone is written down again": "writable present:  and the manager dies",
    "a failure ends with its manager": "read-only present: report 0 and the manager dies",
    "what a request has put in is clean to the next manager": "writable absent: request to write 0 and the manager dies",
    "a write of the dead manager is somebody else's": "writable dirty absent: flush 0, read 1 and the manager dies",
    "a loss shown as zeros is not counted": "anonymous absent: read guarded 0, report 0",
    "what another object has lost meanwhile is read from the file": "read-only absent: lose elsewhere 0, read 0",
    "a file that can't be asked has been written": "writable lost: repair 0, flush 0",
    "a window counts as there before it is": "writable absent absent absent: read 2",
    "every page is taken for a part of a large frame": "read-only present: report 0, report 0",
    "the marker goes to another process's address": "read-only lost: read 0, hardware 0",
    "a cached file is read from its begin": "cached absent: read 0, evict 0",
    "flags of a large frame go before its losses are known": "writable dirty dirty: report 0, collapse 1 and",
    "who has gone keeps memory resident": "anonymous absent: ; beside clients that read while resident 0, die 0",
    "two that want a page to stay count as one": "read-only absent: read while resident 0, read while resident 0, evict 0",
    "what is resident is dropped": "read-only present: read while resident 0, evict 0",
    "what is resident is watched": "writable dirty: write while resident 0, write back 0",
    "what a system call may write to is clean": "writable dirty: write while resident 0, flush 0",
    "a bad page keeps its neighbours from the file": "writable dirty dirty: flush 0, kernel poison 1",
}


def mutant(name: str) -> Mutant:
    """By name. Raises ValueError."""
    for one in MUTANTS:
        if one.name == name:
            return one
    raise ValueError(f"there is no mutant {name!r}; `hwpoison explore --mutants` lists them")
