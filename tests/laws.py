"""Shared by the laws: batches, garbage for hidden rows, expected values, and the one program that most laws run."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from zoo import ENGINE, ZOO, Entry, bounds_of, changed, marked

import jaxheads as jh
from jaxheads.testing.case import Case, Values, program

N, SCALE = 8, np.float32(1)
ONES, ALL = np.ones((N, 1), np.float32), np.ones((N, 1), bool)
each = pytest.mark.parametrize("entry", marked(ZOO))

each_refusing = pytest.mark.parametrize("entry", marked(entry for entry in ZOO if entry.illegal is not None))
each_learning = pytest.mark.parametrize("entry", marked(entry for entry in ZOO if entry.params()))

many = hypothesis.settings(deadline=None, max_examples=12, derandomize=True, database=None)
few = hypothesis.settings(many, max_examples=6)
seeds = st.integers(0, 2**16)
masks = st.integers(0, 2**N - 1).map(lambda bits: np.array([[bits >> i & 1] for i in range(N)], bool))
multiplicities = st.lists(st.sampled_from([0.0, 0.25, 0.3, 1.0, 2.0, 7.5]), min_size=N, max_size=N).map(
    lambda values: np.array(values, np.float32)[:, None]
)


def engine_but(quick: tuple[str, ...] | None) -> pytest.MarkDecorator:
    """The heads of the engine. With `quick`, all others are slow: for laws that cost too much on all of them."""
    return pytest.mark.parametrize("entry", marked((entry for entry in ZOO if entry.name in ENGINE), quick))


engine = engine_but(quick=None)


def f32(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)


DTYPES = {"float": np.float32, "int": np.int32, "bool": np.bool_}


def settle(labels: Any, spec: Any) -> Any:
    """Labels in the dtype that compiled code takes: each further dtype would be one more program."""
    if isinstance(spec, jh.LabelSpec):
        return labels.astype(DTYPES[spec.kind])
    return {key: settle(labels[key], inner) for key, inner in spec.items()}


def draw(entry: Entry, seed: int = 0, lead: tuple[int, ...] = (N,)) -> tuple[Any, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = entry.labels(rng, lead)
    return settle(labels, entry.head.label_spec), entry.logits(rng, lead)


def average_of(entry: Entry) -> str:
    """The key of the average loss. For a `MultiHead` it is that of its first head."""
    return full_name(entry.parts[0] if entry.parts else entry, "average_loss")


def part_like(tree: Any, like: Any) -> Any:
    """The part of the nested dicts `tree` that has the keys of `like`."""
    return {key: part_like(tree[key], value) for key, value in like.items()} if isinstance(like, dict) else tree


def full_name(entry: Entry, key: str) -> str:
    return f"{key}/{entry.head.suffix}" if entry.head.suffix else key


def added(parts: Iterable[jh.Metrics]) -> jh.Metrics:
    """Python's `sum`, which starts from 0."""
    total = sum(parts)
    assert isinstance(total, jh.Metrics)
    return total


def case_of(entry: Entry, seed: int = 0) -> Case:
    """The rows of an entry, as the laws of `jaxheads.testing` take them."""
    return Case(entry.head, entry.params(), *draw(entry, seed), None, N)


def step(head: jh.Head):
    """Loss, its gradients to logits and parameters, and the metrics of the batch: by the program of `check_head`.

    The function that it returns takes labels, logits, weights, where and params.
    """

    def run(*given: Any):
        found = values_of(head, *given)
        return found.loss, found.by_logits, found.by_params, found.metrics

    return run


def reduced(head: jh.Head):
    """The loss under each reduction. They share all but the divisor, and one compiled program."""
    if "loss_reduction" in {field.name for field in dataclasses.fields(head)}:
        return lambda *given: values_of(head, *given).losses
    return _reduced_inside(head)


def values_of(head: jh.Head, labels: Any, logits: Any, weights: Any, where: Any, params: Any) -> Values:
    """The results of the program of `check_head`."""
    return program(head)(labels, logits, None, weights, where, params, SCALE, None)


@functools.cache
def _reduced_inside(head: jh.Head):
    """The heads inside have the reductions, so each reduction needs other heads."""

    def run(labels, logits, weights, where, params):
        rest = {"weights": weights, "where": where, "params": params}
        heads = {reduction.value: changed(head, loss_reduction=reduction) for reduction in jh.Reduction}
        return {name: other.loss(labels, logits, **rest) for name, other in heads.items()}

    return jax.jit(run)


def slope(f, x: Any) -> np.ndarray:
    """Central differences of `f` in float64."""
    x = np.asarray(x, np.float64)
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        high, low = x.copy(), x.copy()
        high[i] += 1e-5
        low[i] -= 1e-5
        out[i] = (f(high) - f(low)) / 2e-5
    return out


def expected_gradient(entry: Entry, labels, logits, weights=None, where=None) -> np.ndarray:
    """Central differences of the oracle's loss: of all rows at once if no row's loss depends on other rows."""
    if entry.whole is not None:
        return slope(lambda z: entry.expected_loss(labels, z, weights, where), logits)
    logits, out = np.asarray(logits, np.float64), []
    for nudge in np.eye(logits.shape[-1]) * 1e-5:
        ends = [entry.expected_shares(labels, logits + sign * nudge, weights, where) for sign in (1, -1)]
        out.append((ends[0] - ends[1]) / 2e-5)
    return np.stack(out, -1).reshape(logits.shape)


def poison(entry: Entry, labels: Any, logits: np.ndarray, hidden: np.ndarray) -> tuple[Any, np.ndarray]:
    """The same batch with garbage in the hidden rows: NaN, infinities, ids out of range."""

    def spoil(x, garbage):
        filler = np.resize(np.asarray(garbage, x.dtype), x.shape)
        return np.where(np.broadcast_to(hidden, x.shape), filler, x)

    def spoil_labels(x, spec):
        if spec.kind == "float":
            return spoil(x.astype(np.float32), [np.nan, -np.inf, 1e38, -3.0, np.inf])
        return spoil(x, [-1, 2**31 - 1, 99, -(2**31)] if spec.kind == "int" else [True])

    spec = entry.head.label_spec
    if isinstance(spec, jh.LabelSpec):
        labels = spoil_labels(labels, spec)
    else:
        labels = {key: spoil_labels(labels[key], inner) for key, inner in spec.items()}
    return labels, spoil(logits, [np.nan, np.inf, 1e38, -np.inf])


def replace_label(labels: np.ndarray, row: int, value: float) -> np.ndarray:
    """The labels with `value` in one row; as float if the value is not an integer."""
    changed = labels.copy() if np.float32(value).is_integer() else labels.astype(np.float32)
    changed[row] = value
    return changed


def assert_values(got: dict[str, Any], expected: dict[str, float], *, rtol: float = 2e-6, slack: float = 0.0) -> None:
    """Asserts that every expected metric is there and right, and that an area is within the bounds of its bins."""
    assert set(expected) <= set(got)
    for key, value in expected.items():
        bounds = bounds_of(got, key)
        if bounds and not np.isnan(value):
            lower, upper = bounds
            assert lower - 1e-6 - slack <= value <= upper + 1e-6 + slack, key
            assert lower <= got[key] <= upper, key
        else:
            np.testing.assert_allclose(got[key], value, rtol=rtol, atol=2e-6, err_msg=key)


def assert_same_values(a: jh.Metrics, b: jh.Metrics, rtol: float = 1e-6, but: str | None = None) -> None:
    x, y = a.compute(bounds=True), b.compute(bounds=True)
    assert list(x) == list(y)
    kept = [key for key in x if but is None or not key.startswith(but)]
    chex.assert_trees_all_close(*({key: values[key] for key in kept} for values in (x, y)), rtol=rtol, atol=1e-6)
