"""What clients may ask of the manager, and what the machine tells it. The handling itself is in the files beside.

Everything runs on one event loop. A coroutine that has awaited anything looks again at what it relied on.
"""

from __future__ import annotations

import asyncio

from hwpoison.core import faults, residence, writeback
from hwpoison.core.books import Books
from hwpoison.core.failure import memory_failure
from hwpoison.core.journal import AskedBy
from hwpoison.core.machine import File, Hits, Identity, Space
from hwpoison.core.mappings import Client, Mapping
from hwpoison.core.objects import Backing, MemoryObject
from hwpoison.core.pages import DIRTY, WRITEBACK
from hwpoison.core.records import NAME_LIMIT, Failure, Report
from hwpoison.core.writeback import write_back_all

SOURCE_LIMIT = 256
"""Most characters of who found a failure: the event log keeps them."""


class MemoryManager(Books):
    """The books, with everything that can be done."""

    # --- objects

    def allocate(self, nbytes: int, name: str | None = None, *, persistent: bool = False) -> MemoryObject:
        """A new anonymous object, all zeros; `persistent`: it stays until `unlink`. Raises ValueError, FileExistsError,
        MemoryError."""
        if nbytes <= 0:
            raise ValueError(f"an object has at least 1 byte, not {nbytes}")
        if self.memory_limit is not None:
            size = self.machine.page_size
            allocated = sum(one.pages.count for one in self._objects.values() if one.backing is None) * size
            if allocated + -(-nbytes // size) * size > self.memory_limit:
                raise MemoryError(
                    f"{nbytes} bytes of anonymous memory do not fit: {allocated} of the memory limit of "
                    f"{self.memory_limit} are allocated, and anonymous pages can't be dropped"
                )
        return self._create(name, nbytes, None, persistent=persistent)

    def unlink(self, name: str) -> None:
        """A persistent object ends with its last mapping, or now; others do so in any case. Raises FileNotFoundError."""
        object_ = self.find(name)
        if object_.persistent:
            object_.persistent = False
            self.journal.object(object_)
            self.release(object_)

    async def version(self, name: str, file: File) -> Identity:
        """The version that `file` is in, for an `open` right after this. Not beside an own write, when it says nothing."""
        known = self._objects.get(name)
        if known is None or known.backing is None:
            return await file.identity()
        async with known.backing.turn:
            return await file.identity()

    def open(
        self, name: str, file: File, identity: Identity, offset: int, nbytes: int | None, *, writable: bool
    ) -> MemoryObject:
        """The object over bytes of `file`, which is in version `identity`: a new one, or that of `name` if it is the same
        file, range and mode.

        Raises ValueError for a range that is not within the file, FileExistsError for a name that is taken.
        """
        if offset < 0 or (nbytes is not None and nbytes <= 0):
            raise ValueError(f"offset {offset} and {nbytes} bytes are no range: offset >= 0 and nbytes >= 1")
        if not identity.nbytes:
            raise ValueError(f"{name!r} is empty; an object has at least 1 byte")
        if nbytes is None:
            nbytes = identity.nbytes - offset
        if nbytes <= 0 or offset + nbytes > identity.nbytes:
            raise ValueError(
                f"{max(nbytes, 0)} bytes at offset {offset} are not within {name!r}, which has {identity.nbytes} bytes"
            )
        known = self._objects.get(name)
        if known is not None and known.backing is not None and known.backing.identity is not None:
            same_file = known.backing.place == identity[:2]
            if same_file and (known.backing.offset, known.nbytes, known.backing.writable) == (offset, nbytes, writable):
                if known.backing.writing or known.backing.identity == identity:
                    self.start(file.close(), f"close of the second descriptor of object {known.number}")
                    return known
                if not known.lost_changes:
                    raise FileExistsError(
                        f"{name!r} was changed since it was opened here, and that version is still in use; close it, or "
                        "pass another name="
                    )
            elif same_file and not known.lost_changes:
                raise FileExistsError(f"{name!r} is open in another mode or range; pass another name= to have it twice")
        for other in self.objects():
            if other.lost_changes and other.backing is not None and other.backing.place == identity[:2]:
                raise FileExistsError(
                    f"changes to this file that were made as {other.name!r} are lost, and it does not hold them; "
                    f"attach({other.name!r}), repair() or discard() what is in lost(), and close it"
                )
        return self._create(name, nbytes, Backing(file, offset, writable, identity))

    def _create(self, name: str | None, nbytes: int, backing: Backing | None, *, persistent: bool = False) -> MemoryObject:
        number = self.new_number()
        if name is None:
            name = f"anonymous-{number}"
        if name in self._objects:
            raise FileExistsError(f"the name {name!r} is taken by another object; pass another name=, or attach({name!r})")
        if not 0 < len(name) <= NAME_LIMIT or "\0" in name:
            raise ValueError(f"an object's name has 1 to {NAME_LIMIT} characters, and no NUL among them")
        self.journal.require()
        store = self.machine.create(name, nbytes, number)
        try:
            machine = self.machine
            object_ = MemoryObject(
                number, name, nbytes, machine.page_size, store, backing, machine.table, machine.large_frame_bytes
            )
        except MemoryError:
            store.close()
            raise
        if backing is not None:
            backing.file.keep(number)
        self._objects[name] = object_
        object_.persistent = persistent
        self.journal.object(object_)
        if persistent:
            self.hold(object_)
        return object_

    def promise(self, object_: MemoryObject, asked_by: AskedBy) -> None:
        """The object stays although nobody maps it: a client is about to, also if this manager dies."""
        self.journal.promised(asked_by, object_)
        self.promises[asked_by] = object_
        self.hold(object_)

    def promise_over(self, asked_by: AskedBy) -> None:
        """It has mapped it, or does not want to any more."""
        object_ = self.promises.pop(asked_by, None)
        if object_ is not None:
            self.journal.promise_over(asked_by)
            self.release(object_)

    def hold(self, object_: MemoryObject) -> None:
        """The object stays although nobody maps it, while this manager lives."""
        object_.references += 1

    def release(self, object_: MemoryObject) -> None:
        """One reference less; the last one writes the object back and ends it."""
        object_.references -= 1
        if not object_.references:
            object_.ending = self.start(self._end(object_, object_.ending), f"end of object {object_.number}")

    async def settled(self, name: str) -> None:
        """Until an object that nobody refers to any more is at its end; then `name` is free."""
        object_ = self._objects.get(name)
        if object_ is not None and object_.ending is not None:
            await asyncio.wait((object_.ending,))

    async def _end(self, object_: MemoryObject, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            # Somebody came while it was under way, and has gone again. It must not close the file under this one.
            await asyncio.wait((before,))
        while not (object_.references or object_.closed):
            error = await write_back_all(self, object_)
            async with object_.locks.hold(0, object_.pages.count):
                if await self._ended_as_far_as_written(object_, unwritten=error is not None):
                    return

    async def _ended_as_far_as_written(self, object_: MemoryObject, *, unwritten: bool) -> bool:
        """End an object of which all pages are locked; False if changes have come that nobody has tried to write."""
        # What reclaim writes back needs no lock any more, but it needs the file.
        for page in [page for run in object_.pages.runs(WRITEBACK) for page in range(run[0], run[0] + run[1])]:
            await object_.written_back(page)
        if object_.references or object_.ending is not asyncio.current_task() or object_.lost_changes:
            # What somebody who has come and gone meanwhile has changed is for the next end to write. And what was lost of a
            # file's changes must not be read as what the file held before: who opens it again finds the loss.
            return True
        dirty = sum(object_.nbytes_of(*run) for run in object_.pages.runs(DIRTY))
        if dirty and not unwritten:
            # The last client has died while something that it had asked for was under way.
            return False
        if dirty:
            self.record(
                "error",
                object_,
                detail=f"{dirty} bytes of changes are lost: nobody uses them any more, and they could not be written",
            )
        object_.closed = True
        del self._objects[object_.name]
        self.journal.object_ended(object_)
        self.reclaim.left(object_, object_.pages.present)
        object_.store.close()
        if object_.backing is not None:
            await object_.backing.file.close()
        return True

    # --- clients and their mappings

    def add_client(self, space: Space, number: int | None = None) -> Client:
        client = Client(self.new_number() if number is None else number, space, self.machine.page_size)
        self._clients[client.number] = client
        self.journal.client(client)
        return client

    def remove_client(self, client: Client) -> None:
        """The process is gone, or has no mapping left and wants no more."""
        if not client.alive:
            return
        client.alive = False
        del self._clients[client.number]
        for mapping in (*client.mappings, *client.vacated):
            self.unmap(mapping)
        self.journal.client_gone(client)

    def map(self, client: Client, object_: MemoryObject, address: int, hits: Hits | None) -> Mapping:
        """`client` shows the whole object at `address`, registered with its userfaultfd. Raises ValueError."""
        if address <= 0 or address % object_.page_size:
            raise ValueError(f"address {address:#x} is not that of a new mapping of {object_.name!r}")
        self.journal.require()
        mapping = Mapping(self.new_number(), client, object_, address, 0, object_.pages.count, hits)
        self.journal.mapping(mapping)
        self.add_mapping(mapping)
        return mapping

    def unmap(self, mapping: Mapping) -> None:
        """The mapping is gone from the client's address space."""
        if mapping in mapping.client.vacated:
            del mapping.client.vacated[mapping]
        else:
            mapping.client.remove(mapping)
            mapping.object.mappings.remove(mapping)
        for number in tuple(mapping.resident):
            residence.end(self, mapping, number)
        mapping.gone = True
        self.journal.mapping_gone(mapping)
        self.release(mapping.object)

    # --- what happens

    def fault(self, client: Client, address: int, thread: int, *, write: bool, protected: bool) -> None:
        """See `core.faults.fault`."""
        faults.fault(self, client, address, thread, write=write, protected=protected)

    async def report(self, report: Report, asked_by: AskedBy | None = None) -> Failure:
        """See `core.failure.memory_failure`. `asked_by`: who gets the answer, from a successor if need be.

        Raises FileNotFoundError or ValueError for what names no page.
        """
        begun = self.answers.get(asked_by) if asked_by is not None else None
        if begun is not None:
            # Who has asked goes on waiting if this is cancelled.
            return await asyncio.shield(begun)
        ways = (report.name, report.pfn, report.pid)
        complete = (report.name is None) == (report.offset is None) and (report.pid is None) == (report.address is None)
        numbers = (report.offset, report.pfn, report.pid, report.address)
        if ways.count(None) != 2 or not complete:
            raise ValueError("a report names a page by one of: name and offset, pfn, pid and address")
        if len(report.source) > SOURCE_LIMIT:
            raise ValueError(f"the source of a report has at most {SOURCE_LIMIT} characters, not {len(report.source)}")
        if any(number is not None and number < 0 for number in numbers):
            raise ValueError("the offset, frame, process or address of a report is 0 or more")
        if report.name is not None:
            self.find(report.name).pages_of(report.offset or 0, 1)
        self.journal.require()
        return await memory_failure(self, report, asked_by)

    def answered(self, asked_by: AskedBy) -> None:
        """Who has asked for a report has the answer."""
        self.answers.pop(asked_by, None)
        self.journal.answered(asked_by)

    async def flush(self, mapping: Mapping) -> None:
        """See `core.writeback.flush`. The client may go meanwhile; its object must not."""
        self.hold(mapping.object)
        try:
            await writeback.flush(self, mapping)
        finally:
            self.release(mapping.object)

    async def prefetch(self, mapping: Mapping, first: int, count: int) -> None:
        """Bring pages in, as many as the memory limit lets stay; those that can't be had are left for their access."""
        await faults.prefetch(self, mapping.object, first, min(count, self.reclaim.for_files // 2))

    async def write_back(self) -> None:
        """What is dirty now is in the files when this returns; what could not be written was recorded."""
        for object_ in self.objects():
            if object_.closed:
                continue
            # Its last client may go meanwhile, and take its file away.
            self.hold(object_)
            try:
                await write_back_all(self, object_)
            finally:
                self.release(object_)

    async def close(self) -> None:
        """Write everything back; afterwards nothing is under way."""
        await self.write_back()
        while self._tasks:
            await asyncio.wait(self._tasks)
