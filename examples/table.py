"""An Arrow table in managed memory: pyarrow reads it where it is, without a copy.

While the file is there, a page that fails comes back from it, and nobody notices. A column that exists in memory only
loses rows: which ones, `hwpoison.lost` says.

    python examples/table.py        # needs pyarrow
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy
import pyarrow
import pyarrow.compute
import pyarrow.ipc

import hwpoison

ROWS = 500_000


def write_table(path: Path) -> None:
    table = pyarrow.table({"id": numpy.arange(ROWS), "price": numpy.arange(ROWS) * 0.25})
    with pyarrow.ipc.new_file(path, table.schema) as file:
        file.write_table(table)


def table_over(buffer: memoryview) -> pyarrow.Table:
    """Its columns point into the buffer."""
    return pyarrow.ipc.open_file(pyarrow.py_buffer(buffer)).read_all()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, hwpoison.Manager() as manager:
        path = Path(folder, "prices.arrow")
        write_table(path)

        prices = manager.open(path)
        table = table_over(prices.buffer)
        place = hwpoison.locate(table["price"].chunk(0).buffers()[1])
        print("the column lies in the file:", place.memory is prices)
        manager.inject(prices, place.offset)  # a page of it fails (simulated)
        total = pyarrow.compute.sum(table["price"]).as_py()
        print("its sum is right:", total == 0.25 * ROWS * (ROWS - 1) / 2)

        # The same bytes, and no file that they could be had back from.
        copy = manager.allocate(path.stat().st_size, "copy")
        copy.write(0, path.read_bytes())
        column = table_over(copy.buffer)["price"].chunk(0).to_numpy()
        place = hwpoison.locate(column)
        manager.inject(copy, place.offset + place.nbytes // 2)
        rows = hwpoison.lost(column)
        print("rows are lost:", 0 < len(rows) < ROWS and ROWS // 2 in rows)
        try:
            with hwpoison.guard(copy) as safe:
                pyarrow.compute.sum(table_over(safe.buffer)["price"])
        except hwpoison.PoisonError:
            print("a sum over them is refused")
        # They are in the other table.
        (lost,) = copy.lost()
        copy.repair(lost.offset, prices.read(lost.offset, lost.nbytes))
        print("after the repair it is right:", pyarrow.compute.sum(table_over(copy.buffer)["price"]).as_py() == total)
        del table, column, place


if __name__ == "__main__":
    main()
