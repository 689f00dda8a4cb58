"""Prints what `update_metrics` costs: XLA's own figures, and median times on this machine.

    python tests/benchmarks/report.py
    python tests/benchmarks/report.py --rows 65536 --repeat 5

Bytes and operations are those of the compiled program and vary with nothing but versions; XLA counts the body of a
loop once. Times are for looking at: the heads take turns, and the median of each is shown.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxheads as jh

HEADS: dict[str, jh.Head] = {
    "RegressionHead()": jh.RegressionHead(),
    "RegressionHead, R2Score()": jh.RegressionHead().with_metrics(jh.metrics.R2Score()),
    "MultiClassHead(10)": jh.MultiClassHead(10),
    "BinaryClassHead()": jh.BinaryClassHead(),
    "BinaryClassHead, ThresholdGrid(200)": jh.BinaryClassHead(bins=jh.ThresholdGrid(200)),
    "BinaryClassHead, ThresholdGrid(10000)": jh.BinaryClassHead(bins=jh.ThresholdGrid(10_000)),
    "BinaryClassHead, LogitGrid(n=10000)": jh.BinaryClassHead(bins=jh.LogitGrid(n=10_000)),
    "BinaryClassHead, 1000 thresholds": jh.BinaryClassHead(thresholds=tuple(k / 1001 for k in range(1, 1001))),
}
ROWS = (1_024, 65_536, 1_048_576)
SHORT = 20  # ms


class Cost(NamedTuple):
    """What XLA says of a compiled program."""

    temp: int
    accessed: float
    flops: float


def cost(compiled: Any) -> Cost:
    """Temporary memory and bytes accessed, in bytes, and operations, from XLA's own analysis."""
    analysis = compiled.cost_analysis()
    return Cost(
        compiled.memory_analysis().temp_size_in_bytes,
        analysis.get("bytes accessed", 0.0),
        analysis.get("flops", 0.0),
    )


def batch_of(head: jh.Head, rows: int, masked: bool = False) -> dict[str, Any]:
    """A batch as `update_metrics` takes it, with weights and a mask if asked for."""
    rng = np.random.default_rng(rows)
    n = head.logits_dimension
    batch = {
        "logits": jnp.asarray(rng.standard_normal((rows, n), np.float32)),
        "labels": jnp.asarray(rng.integers(0, max(n, 2), (rows, 1)), jnp.int32),
    }
    if masked:
        batch["weights"] = jnp.asarray(rng.random((rows, 1), np.float32))
        batch["where"] = jnp.asarray(rng.random((rows, 1)) < 0.9)
    return batch


def update_of(head: jh.Head) -> Callable[[jh.Metrics, Mapping[str, Any]], jh.Metrics]:
    """`(metrics, batch) -> metrics`."""

    def update(metrics: jh.Metrics, batch: Mapping[str, Any]) -> jh.Metrics:
        return head.update_metrics(metrics, features=None, **batch)

    return update


def compiled_update(head: jh.Head, batch: dict[str, Any]) -> Callable[..., jh.Metrics]:
    """`(metrics, batch) -> metrics`, compiled for the shapes of a batch."""
    return jax.jit(update_of(head)).lower(head.metrics(), batch).compile()


def timings(
    updates: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]], repeat: int, seconds: float = math.inf
) -> dict[str, list[float]]:
    """The times of each in ms; they take turns, so that a slow moment of the machine is everyone's.

    Args:
        updates: a function and its arguments by name.
        repeat: timed calls of each; a first call is not timed.
        seconds: after this long the turns of one end, but not before three timed calls.
    """
    times: dict[str, list[float]] = {name: [] for name in updates}
    for turn in range(repeat + 1):
        for name, (update, arguments) in updates.items():
            spent = times[name]
            if len(spent) >= 3 and sum(spent) > 1e3 * seconds:
                continue
            if spent and spent[-1] < SHORT:
                # What another left in the caches, after a call of seconds and gigabytes, is not this one's doing.
                jax.block_until_ready(update(*arguments))
            start = time.perf_counter()
            jax.block_until_ready(update(*arguments))
            if turn:  # the first is a warm-up
                spent.append(1e3 * (time.perf_counter() - start))
    return times


def medians(updates: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]], repeat: int) -> dict[str, float]:
    """The median time of each in ms."""
    return {name: statistics.median(times) for name, times in timings(updates, repeat).items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one row a head and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="batch sizes")
    parser.add_argument("--repeat", type=int, default=20, help="timed calls of each")
    options = parser.parse_args(argv)

    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {len(jax.devices())} device(s)\n")
    print("| update_metrics of | rows | temp B/row | accessed MB | Mflop | median ms |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for rows in options.rows:
        batches = {name: batch_of(head, rows) for name, head in HEADS.items()}
        updates = {name: compiled_update(head, batches[name]) for name, head in HEADS.items()}
        timed = {name: (updates[name], (head.metrics(), batches[name])) for name, head in HEADS.items()}
        for name, ms in medians(timed, options.repeat).items():
            temp, accessed, flops = cost(updates[name])
            print(f"| {name} | {rows:,} | {temp / rows:.1f} | {accessed / 1e6:.2f} | {flops / 1e6:.2f} | {ms:.3f} |")


if __name__ == "__main__":
    main()
