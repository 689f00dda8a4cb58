"""An update of any library as a program that can be timed, and what several tables need of a library."""

import dataclasses
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxheads as jh
from benchmarks.report import update_of

OURS = "jaxheads"
FLOOR = "one pass over memory"
# What must be installed for a peer.
MODULES = {
    "metrax": "metrax",
    "keras": "keras",
    "clu": "clu",
    "torchmetrics": "torchmetrics",
    "scikit-learn": "sklearn",
}
COMPILER = "gcc"
PEERS = (*MODULES, COMPILER)


@dataclasses.dataclass(frozen=True)
class Program:
    """An update of one library.

    Attributes:
        update: `(state, batch) -> state`; what is not traced may change the state that it is given instead.
        state: before the first batch.
        read: the values by name from a state; `auc` and `accuracy` show whether all did the same job.
        prepare: the batch in the library's own arrays; not timed.
        traced: whether JAX compiles it.
        share: the update sees one row in this many, and its time counts as often.
    """

    update: Callable[[Any, Any], Any]
    state: Any
    read: Callable[[Any], Mapping[str, Any]] = lambda _: {}
    prepare: Callable[[Mapping[str, Any]], Any] = lambda batch: batch
    traced: bool = True
    share: int = 1


def batch_of(rows: int, columns: int = 1, classes: bool = False) -> dict[str, jax.Array]:
    """Logits `[rows, columns]` that know something of the labels: one class each, or bits."""
    rng = np.random.default_rng(rows)
    logits = rng.standard_normal((rows, columns), np.float32)
    if classes:
        labels = rng.integers(0, columns, (rows, 1), np.int32)
        np.put_along_axis(logits, labels, np.take_along_axis(logits, labels, 1) + 2, 1)
    else:
        labels = (rng.random((rows, columns), np.float32) < 1 / (1 + np.exp(-logits))).astype(np.int32)
    return {"logits": jnp.asarray(logits), "labels": jnp.asarray(labels)}


def installed(peers: Iterable[str], say: Callable[[str], None]) -> list[str]:
    """Those that are here; the others are named with the cure."""
    found = []
    for peer in peers:
        if peer == COMPILER:
            found += [peer] if shutil.which(peer) else []
        elif importlib.util.find_spec(MODULES[peer]) is None:
            say(f"{peer} is not installed and left out: pip install -e '.[benchmark]'")
        else:
            found.append(peer)
    return found


def of_head(head: jh.Head) -> Program:
    """jaxheads itself."""
    return Program(update_of(head), head.metrics(), lambda metrics: metrics.compute())


def floor() -> Program:
    """One pass over the inputs: no metric is faster."""

    def update(state: jax.Array, batch: Mapping[str, Any]) -> jax.Array:
        # Sums over a trailing axis of 1 are slow on the CPU.
        flat = [x.reshape(-1) if x.shape[-1] == 1 else x for x in batch.values()]
        return state + sum(x.sum().astype(jnp.float32) for x in flat)

    return Program(update, jnp.zeros(()))


def keras() -> Any:
    """The module, on JAX."""
    os.environ["KERAS_BACKEND"] = "jax"  # read on import
    return importlib.import_module("keras")


def keras_program(metrics: list[Any], arguments: Callable[[Any], list[tuple[Any, ...]]], **read: int) -> Program:
    """Stateless updates of Keras metrics; `arguments` gives those of each, `read` the positions of what is read."""

    def update(state: Any, batch: Any) -> Any:
        given = zip(metrics, state, arguments(batch), strict=True)
        return [metric.stateless_update_state(variables, *each) for metric, variables, each in given]

    def values(state: Any) -> dict[str, Any]:
        return {name: metrics[k].stateless_result(state[k]) for name, k in read.items()}

    return Program(update, [[variable.value for variable in metric.variables] for metric in metrics], values)


def torchmetrics() -> tuple[Any, Any]:
    """The modules torch and torchmetrics."""
    # Read on import. Threads that spin while they wait take the cores from whoever is next, and where the machine does
    # other work they wait for a whole time slice at every operation (measured: 8 ms instead of 0.1).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return importlib.import_module("torch"), importlib.import_module("torchmetrics")


def tensors(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a batch as torch has them."""
    torch, _ = torchmetrics()
    return {name: torch.from_numpy(np.array(x)) for name, x in batch.items()}


# By title: the peer that must be installed, and the program for a number of thresholds, classes or labels.
Programs = Mapping[str, tuple[str | None, Callable[[int], Program]]]


def made(table: Programs, peers: Iterable[str], number: int) -> dict[str, Program]:
    """The programs of a table whose peer is among those given."""
    return {title: make(number) for title, (peer, make) in table.items() if peer is None or peer in peers}
