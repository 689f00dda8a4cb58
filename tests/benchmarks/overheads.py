"""What a call and an import cost: dispatch, eager updates, first calls and imports in processes of their own."""

import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax

from benchmarks.binary import BINARY
from benchmarks.program import FLOOR, OURS, Program, made
from benchmarks.race import figure, table
from benchmarks.report import batch_of, timings
from jaxheads import BinaryClassHead

ROWS, THRESHOLDS = 32, 200
WATCHED = ("flax", "optax", "chex", "tensorflow", "torch", "pandas")
# What is imported, and the peer that must be installed; the last two are jaxheads' own dependencies.
IMPORTS = {
    "jaxheads": None,
    "clu.metrics": "clu",
    "metrax": "metrax",
    "metrax.nnx": "metrax",
    "keras": "keras",
    "torchmetrics": "torchmetrics",
    "sklearn.metrics": "scikit-learn",
    "optax": None,
    "flax.nnx": None,
}
IMPORT = """
import sys, time, jax
before, start = set(sys.modules), time.perf_counter()
import {module}
print(1e3 * (time.perf_counter() - start), *set(sys.modules) - before)
"""
FIRST = """
import time, jax
from benchmarks import overheads
update, arguments = overheads.first({title!r}, {eager})
start = time.perf_counter()
jax.block_until_ready(update(*arguments))
print(1e3 * (time.perf_counter() - start))
"""


def small_batch() -> dict[str, Any]:
    """The batch of all updates here."""
    return batch_of(BinaryClassHead(), ROWS)


def first(title: str, eager: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function that was never called, and its arguments on the device."""
    program = BINARY[title][1](THRESHOLDS)
    arguments = jax.block_until_ready((program.state, program.prepare(small_batch())))
    return program.update if eager else jax.jit(program.update), arguments


def child(code: str) -> list[str]:
    """The words that a fresh Python prints."""
    here = pathlib.Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, (str(here), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "KERAS_BACKEND": "jax"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"A child process failed.\n{code}\n{run.stderr}")
    return run.stdout.split()


def _per_call(update: Callable[..., Any], state: Any, batch: Any, calls: int) -> float:
    """Microseconds a call, each with the state of the call before."""
    for _ in range(10):
        state = update(state, batch)
    jax.block_until_ready(state)
    start = time.perf_counter()
    for _ in range(calls):
        state = update(state, batch)
    jax.block_until_ready(state)
    return 1e6 * (time.perf_counter() - start) / calls


def _dispatch(programs: dict[str, Program], batch: Any, repeat: int, calls: int) -> dict[str, tuple[float, float]]:
    """Microseconds of an update with donated state, and of a call that only adds 1 to every leaf of it."""
    compiled = {
        title: [
            jax.jit(program.update, donate_argnums=0),
            jax.jit(lambda state, batch: jax.tree.map(lambda x: x + 1, state), donate_argnums=0, keep_unused=True),
        ]
        for title, program in programs.items()
    }
    times: dict[str, list[list[float]]] = {title: [[], []] for title in programs}
    for _ in range(repeat):
        for title, program in programs.items():
            for spent, update in zip(times[title], compiled[title], strict=True):
                state = jax.tree.map(lambda x: jax.numpy.array(x, copy=True), program.state)
                spent.append(_per_call(update, state, batch, calls))
    return {title: (statistics.median(update), statistics.median(bare)) for title, (update, bare) in times.items()}


def calls(peers: Iterable[str], repeat: int, children: int) -> list[str]:
    """The table of calls at 32 rows."""
    batch = small_batch()
    programs = made({title: each for title, each in BINARY.items() if title != FLOOR}, peers, THRESHOLDS)
    traced = {title: program for title, program in programs.items() if program.traced}
    dispatched = _dispatch(traced, batch, min(repeat, 9), 50 * repeat)
    eager = {title: (program.update, (program.state, program.prepare(batch))) for title, program in programs.items()}
    at_once = {title: statistics.median(times) for title, times in timings(eager, repeat, 3.0).items()}
    compiling = {
        title: [float(child(FIRST.format(title=title, eager=False))[0]) for _ in range(children)] for title in traced
    }
    own = [float(child(FIRST.format(title=OURS, eager=True))[0]) for _ in range(children)]
    rows = []
    for title in programs:
        jitted, bare = dispatched.get(title, (None, None))
        numbers = [
            *(f"{at_once[title] / at_once[OURS]:.1f}x", f"{jitted / dispatched[OURS][0]:.1f}x" if jitted else ""),
            *(figure(at_once[title]), *(f"{us:.1f}" if us else "" for us in (jitted, bare))),
            str(len(jax.tree.leaves(traced[title].state))) if title in traced else "",
            f"{min(compiling[title]):.0f}" if title in traced else "",
        ]
        rows.append([title, *numbers])
    columns = [
        "program",
        "ratio, eager",
        "ratio, jit",
        "ms, eager",
        "us, jit",
        "us, adding 1",
        "leaves",
        "ms, first jit",
    ]
    return [*table(columns, rows), "", f"First eager call of {OURS}, fresh process: {min(own):.0f} ms."]


def imports(peers: Iterable[str], children: int) -> list[str]:
    """The table of imports over `import jax`, the least of several fresh processes."""
    names = [name for name, peer in IMPORTS.items() if peer is None or peer in peers]
    found: dict[str, list[list[str]]] = {name: [] for name in names}
    for _ in range(children):
        for name in names:
            found[name].append(child(IMPORT.format(module=name)))
    least = {name: min(float(words[0]) for words in runs) for name, runs in found.items()}
    rows = []
    for name, runs in found.items():
        added = runs[-1][1:]
        brought = ", ".join(module for module in WATCHED if module in added and module != name.split(".")[0])
        rows.append([name, f"{least[name] / least['jaxheads']:.1f}x", f"{least[name]:.0f}", str(len(added)), brought])
    return table(["import", "ratio", "ms over jax", "modules added", "brings in"], rows)
