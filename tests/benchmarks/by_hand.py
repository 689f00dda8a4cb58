"""Table A in C, compiled where a compiler is at hand: the floor that a CPU sets."""

import ctypes
import functools
import pathlib
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.program import Program

SOURCE = pathlib.Path(__file__).with_name("floor.c")
# With these gcc calls the vectorized exponential and logarithm of the C library.
FLAGS = ("-Ofast", "-march=native", "-mprefer-vector-width=512", "-fPIC", "-c")


@functools.cache
def compiled() -> Any:
    """The function `update` of floor.c."""
    with tempfile.TemporaryDirectory() as folder:
        objects, library = pathlib.Path(folder) / "floor.o", pathlib.Path(folder) / "floor.so"
        subprocess.run(["gcc", *FLAGS, str(SOURCE), "-o", str(objects)], check=True)
        # Linked without those flags: with them gcc adds code that, once loaded, flushes subnormal numbers to zero in
        # all of the process.
        subprocess.run(["gcc", "-shared", str(objects), "-o", str(library), "-lm"], check=True)
        function = ctypes.CDLL(str(library)).update
    pointer = np.ctypeslib.ndpointer
    arrays = pointer(np.float32), pointer(np.int32), ctypes.c_int64, ctypes.c_int32
    function.argtypes, function.restype = [*arrays, pointer(np.float64), pointer(np.uint32)], None
    return function


def by_hand(thresholds: int) -> Program:
    """Eight metrics, 200 thresholds, one thread."""
    update_batch, sums = compiled(), np.zeros(3)
    counts = np.zeros((4, thresholds + 1, 2), np.uint32)

    def update(_: Any, batch: Any) -> tuple[np.ndarray, np.ndarray]:
        logits, labels = batch
        update_batch(logits, labels, len(logits), thresholds, sums, counts)
        return sums, counts

    def read(_: Any) -> dict[str, Any]:
        negative, positive = np.moveaxis(counts.sum(0, dtype=np.float64), -1, 0)
        # A bucket's positives against the negatives below it; those in one bucket are ties.
        below = np.cumsum(negative) - negative
        return {"auc": positive @ (below + negative / 2) / (positive.sum() * negative.sum())}

    def prepare(batch: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
        return np.array(batch["logits"])[:, 0], np.array(batch["labels"])[:, 0]

    return Program(update, None, read, prepare, traced=False)
