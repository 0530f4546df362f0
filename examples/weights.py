"""A model's weights, in safetensors' format, served by forked workers: one copy in memory, whatever fails in it.

The workers' tensors point into managed memory. When a page of it fails, the manager reads it again from the file; a worker
that touches it meanwhile waits a little, and goes on with the right bytes.

    python examples/weights.py      # needs safetensors; with torch the tensors are torch's, otherwise numpy's
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy
import safetensors.numpy

import hwpoison

try:
    import torch
except ImportError:
    torch = None

# Nobody writes to weights, and torch has no tensors that are read-only.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

WORKERS, LAYERS, WIDTH = 3, 8, 512


def save_weights(path: Path) -> None:
    chance = numpy.random.default_rng(1)
    layers = {f"layer {n}": chance.standard_normal((WIDTH, WIDTH), dtype="f4") / WIDTH**0.5 for n in range(LAYERS)}
    safetensors.numpy.save_file(layers, path)


def tensors(memory: hwpoison.Memory) -> dict[str, Any]:
    """All tensors of the file, without a copy. It begins with the size of its header, which says where each of them is."""
    size = int.from_bytes(memory.read(0, 8), "little")
    found = {}
    for name, entry in json.loads(memory.read(8, size)).items():
        if name != "__metadata__":
            begin, _ = entry["data_offsets"]
            shape, dtype = entry["shape"], {"F32": "f4", "F64": "f8"}[entry["dtype"]]
            array = memory.array(dtype, tuple(shape), offset=8 + size + begin)
            found[name] = array if torch is None else torch.from_numpy(array)
    return found


def answer(weights: dict[str, Any], question: int) -> float:
    """What the model says."""
    value = numpy.full(WIDTH, question, "f4")
    for name in sorted(weights):
        value = numpy.tanh(numpy.asarray(weights[name] @ (value if torch is None else torch.from_numpy(value))))
    return float(value.sum())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, hwpoison.Manager() as manager:
        path = Path(folder, "model.safetensors")
        save_weights(path)
        expected = answer(safetensors.numpy.load_file(path) if torch is None else tensors_of_torch(path), 1)
        memory = manager.open(path)
        weights = tensors(memory)  # before the fork: the workers have them at the same addresses
        workers = []
        for _ in range(WORKERS):
            worker = os.fork()
            if not worker:
                right = all(answer(weights, 1) == expected for _ in range(200))
                os._exit(0 if right else 1)
            workers.append(worker)
        chance = random.Random(1)
        for _ in range(50):
            manager.inject(memory, chance.randrange(memory.nbytes))  # a page fails (simulated)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers]
        print("workers whose answers were all right:", statuses.count(0), "of", WORKERS)
        print("bytes that are lost:", sum(one.nbytes for one in memory.lost()))
        del weights


def tensors_of_torch(path: Path) -> dict[str, Any]:
    import safetensors.torch

    return safetensors.torch.load_file(path)


if __name__ == "__main__":
    main()
