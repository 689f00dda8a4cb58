"""What counters say after 2^24 examples, and what it costs to keep them right.

A float32 that has reached 2^24 is not moved by adding 1.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxheads as jh
from benchmarks.program import keras, keras_program, torchmetrics
from benchmarks.race import figure, table
from benchmarks.report import batch_of, compiled_update, cost, medians
from jaxheads.metrics.state import slots

FULL, MORE, BLOCK = 2**24, 10_000, 2**20
HEADS: dict[str, jh.Head] = {
    "RegressionHead()": jh.RegressionHead(),
    "MultiClassHead(10)": jh.MultiClassHead(10),
    "BinaryClassHead, ThresholdGrid(200)": jh.BinaryClassHead(bins=jh.ThresholdGrid(200)),
    "BinaryClassHead()": jh.BinaryClassHead(),
}


class Counter(NamedTuple):
    """An accuracy: `update(state, right)` takes decisions `[N]`; `read(state)` gives the accuracy and the count."""

    update: Callable[[Any, Any], Any]
    state: Any
    read: Callable[[Any], tuple[Any, Any]]
    traced: bool = True


def _ours() -> Counter:
    head = jh.BinaryClassHead()

    def update(metrics: jh.Metrics, right: jax.Array) -> jh.Metrics:
        logits = jnp.where(right, 1.0, -1.0)[:, None]
        return head.update_metrics(metrics, features=None, logits=logits, labels=jnp.ones_like(right, jnp.int32))

    def read(metrics: jh.Metrics) -> tuple[Any, Any]:
        start, _ = slots(head, False)[0]["average_loss",]
        count = np.asarray(metrics.state, np.float64)[start + 1].sum()
        return metrics.compute()["accuracy"], count

    return Counter(update, head.metrics(), read)


def _clu() -> Counter:
    kind = importlib.import_module("clu.metrics").Average

    def update(state: Any, right: jax.Array) -> Any:
        return state.merge(kind.from_model_output(right.astype(jnp.float32)))

    return Counter(update, kind.empty(), lambda state: (state.compute(), state.count))


def _metrax(kind: str) -> Counter:
    made = getattr(importlib.import_module("metrax"), kind)

    def update(state: Any, right: jax.Array) -> Any:
        if kind == "Average":
            return state.merge(made.from_model_output(right.astype(jnp.float32)))
        return state.merge(made.from_model_output(right.astype(jnp.int32), jnp.ones_like(right, jnp.int32)))

    return Counter(update, made.empty(), lambda state: (state.compute(), state.count))


def _keras() -> Counter:
    metric = keras().metrics.BinaryAccuracy()

    def arguments(right: jax.Array) -> list[tuple[Any, ...]]:
        return [(jnp.ones((len(right), 1)), right.astype(jnp.float32)[:, None])]

    program = keras_program([metric], arguments, accuracy=0)
    names = [variable.name for variable in metric.variables]

    def read(state: Any) -> tuple[Any, Any]:
        return program.read(state)["accuracy"], state[0][names.index("count")]

    return Counter(program.update, program.state, read)


def _torchmetrics(name: str) -> Counter:
    torch, tm = torchmetrics()
    metric = tm.MeanMetric() if name == "MeanMetric" else tm.classification.BinaryAccuracy(validate_args=False)

    def update(_: Any, right: Any) -> None:
        right = torch.from_numpy(np.array(right))
        metric.update(right.float()) if name == "MeanMetric" else metric.update(
            right.int(), torch.ones_like(right.int())
        )

    def read(_: Any) -> tuple[Any, Any]:
        count = metric.weight if name == "MeanMetric" else metric.tp + metric.fp + metric.tn + metric.fn
        return float(metric.compute()), float(count)

    return Counter(update, None, read, traced=False)


COUNTERS: dict[str, tuple[str | None, Callable[[], Counter]]] = {
    "jaxheads": (None, _ours),
    "clu, Average": ("clu", _clu),
    "metrax, Accuracy": ("metrax", lambda: _metrax("Accuracy")),
    "metrax, Average": ("metrax", lambda: _metrax("Average")),
    "Keras, BinaryAccuracy": ("keras", _keras),
    "torchmetrics, MeanMetric": ("torchmetrics", lambda: _torchmetrics("MeanMetric")),
    "torchmetrics, BinaryAccuracy": ("torchmetrics", lambda: _torchmetrics("BinaryAccuracy")),
}


def _after(make: Callable[[], Counter], right: bool) -> tuple[float, float]:
    """Accuracy and count after 2^24 right answers and 10,000 of another kind, one by one."""
    counter = make()
    state, block, one = counter.state, jnp.ones(BLOCK, bool), jnp.full(1, right)
    fill = jax.jit(counter.update) if counter.traced else counter.update
    for _ in range(FULL // BLOCK):
        state = fill(state, block)
    if counter.traced:
        state = jax.jit(lambda state: jax.lax.fori_loop(0, MORE, lambda _, s: counter.update(s, one), state))(state)
    else:
        for _ in range(MORE):
            state = counter.update(state, one)
    accuracy, count = counter.read(state)
    return float(accuracy), float(count)


def frozen(peers: Iterable[str]) -> list[str]:
    """The table of what each library says; a true figure is marked."""
    truth = [(1.0, FULL + MORE), (FULL / (FULL + MORE), FULL + MORE)]
    rows = [["the truth", "", *(f"{x:.6f}" for x, _ in truth[::-1]), f"{FULL + MORE:,}"]]
    for title, (peer, make) in COUNTERS.items():
        if peer is not None and peer not in peers:
            continue
        told = [_after(make, right) for right in (True, False)]
        exact = all(abs(a - x) < 1e-7 and n == m for (a, n), (x, m) in zip(told, truth, strict=True))
        rows.append([title, "yes" if exact else "no", *(f"{a:.6f}" for a, _ in told[::-1]), f"{told[0][1]:,.0f}"])
    columns = [
        "counter",
        "right",
        "accuracy, then 10,000 wrong answers",
        "then 10,000 right ones",
        "examples it counts",
    ]
    return table(columns, rows)


def _plain(head: jh.Head, batch: Mapping[str, Any]) -> tuple[Callable[..., Any], jh.Metrics]:
    """The update of a state without rounding errors kept, compiled, and its zero."""
    zero = head.metrics()
    zero = dataclasses.replace(zero, state=zero.state[..., :1])

    def update(metrics: jh.Metrics, batch: Mapping[str, Any]) -> jh.Metrics:
        return dataclasses.replace(metrics, state=metrics.state + head.measure(**batch).state)

    return jax.jit(update).lower(zero, batch).compile(), zero


def pair_costs(rows: int, repeat: int) -> list[str]:
    """The table of what a compensated pair adds to an update, a head a row."""
    lines = []
    for title, head in HEADS.items():
        batch = batch_of(head, rows)
        pair, (plain, zero) = compiled_update(head, batch), _plain(head, batch)
        times = medians({"pair": (pair, (head.metrics(), batch)), "plain": (plain, (zero, batch))}, repeat)
        ours, theirs = cost(pair), cost(plain)
        added = [ours.accessed / theirs.accessed - 1, ours.flops / theirs.flops - 1]
        sizes = [theirs.accessed, ours.accessed - theirs.accessed, theirs.flops, ours.flops - theirs.flops]
        cells = [*(f"{100 * x:.1f} %" for x in added), *(f"{x:,.0f}" for x in sizes)]
        lines.append([title, *cells, f"{times['pair'] / times['plain']:.3f}x", figure(times["plain"])])
    columns = [
        "head",
        "bytes added",
        "flops added",
        "bytes, plain",
        "more",
        "flops, plain",
        "more",
        "time",
        "ms, plain",
    ]
    return table(columns, lines)
