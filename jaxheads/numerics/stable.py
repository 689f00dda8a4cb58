"""Formulas that keep their value where the plain ones overflow."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.numerics import masking, meshes


def log_odds(probability: float) -> float:
    """Returns `ln(p / (1 - p))` in float64, on the host."""
    return math.log(probability) - math.log1p(-probability)


def as_edges(thresholds: float | tuple[float, ...], logits: Any, edge: Callable[[float], float]) -> np.ndarray:
    """Returns the edge of a threshold, or of one for each entry of the last axis, as float32 that fits the logits."""
    each = thresholds if isinstance(thresholds, tuple) else (thresholds,)
    return np.asarray([edge(t) for t in each], np.float32).reshape((1,) * (logits.ndim - 1) + (-1,))


def two_class_probabilities(logits: jax.Array) -> jax.Array:
    """Returns `softmax([0, z])` of `z [..., 1]`, without a maximum: `[sigmoid(-z), sigmoid(z)]`, finite at any z."""
    return jnp.concatenate([jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits)], axis=-1)


def log1p(x: jax.Array) -> jax.Array:
    """Returns `ln(1 + x)` for x from 0 to 1, by `2 artanh(x / (2 + x))` and its series.

    It takes half the time of XLA's on a CPU. The argument of the series is at most 1/3, so the first term left out is
    below 2e-9 of the value.
    """
    s = jax.lax.div(x, jax.lax.add(x, jax.lax.full_like(x, 2)))
    square, series = jax.lax.mul(s, s), jax.lax.full_like(x, 1 / 15)
    for k in (13, 11, 9, 7, 5, 3, 1):
        series = jax.lax.add(jax.lax.mul(series, square), jax.lax.full_like(x, 1 / k))
    return 2 * s * series


def huber(errors: jax.Array, delta: float) -> jax.Array:
    """Returns `e^2 / 2` where `|e|` is at most delta, else `delta (|e| - delta / 2)`.

    It is not optax's, whose slope is `(e - delta) + delta`: of an error of 1e-6 delta, one part in 20 is lost.
    """
    inside = jnp.clip(errors, -delta, delta)
    return inside * (errors - inside / 2)


def pick(values: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns `values[..., ids]` from `values [..., n]` and in-range `ids [..., 1]`: `[..., 1]`.

    It selects, and does not gather: a gather's gradient is a scatter, which an Explicit mesh refuses and a TPU runs
    slowly, and the selection fuses with its neighbours.
    """
    chosen = meshes.columns(values, ids.dtype) == ids
    return jnp.sum(masking.keep(chosen, values, 0), -1, keepdims=True)


def is_argmax(values: jax.Array, ids: jax.Array) -> jax.Array:
    """Tells whether `ids [..., 1]` is the first maximum of `values [..., n]`: bool `[..., 1]`.

    It counts the values that come before, in one fused pass; an argmax is not one. A row with a NaN has no maximum.
    """
    return rank(values, ids) == 0


def rank(values: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns how many of `values [..., n]` come before those at `ids [..., 1]`: float32 `[..., 1]`.

    It is n in a row with a NaN. Of equal values the first comes first, as in `jax.lax.top_k`: the k best have a rank
    below k. (There -0.0 comes after 0.0; here, as in `argmax`, they are equal.) The count is in float32, for which a
    CPU has the quicker sum.
    """
    mine, has_nan = _zero_nan(pick(values, ids)), jnp.isnan(jnp.max(values, axis=-1, keepdims=True))
    ahead = (values > mine) | ((values == mine) & (meshes.columns(values, ids.dtype) < ids))
    found = jnp.sum(ahead.astype(jnp.float32), axis=-1, keepdims=True)
    return jnp.where(has_nan, jnp.full_like(found, values.shape[-1]), found)


def rank_each(values: jax.Array) -> jax.Array:
    """Returns `rank` of every entry of `values [..., n]`: float32 `[..., n]`."""
    has_nan = jnp.isnan(jnp.max(values, axis=-1, keepdims=True))
    # The order of the order; the sort keeps the order of equal values.
    found = jnp.argsort(jnp.argsort(-values, axis=-1, stable=True), axis=-1).astype(jnp.float32)
    return jnp.where(has_nan, jnp.full_like(found, values.shape[-1]), found)


def first_argmax(values: jax.Array) -> jax.Array:
    """Returns the index of the first maximum of `values [..., n]`: int32 `[..., 1]`; n in a row with a NaN.

    It compares with the maximum, in two passes that fuse with their neighbours: XLA's argmax takes a CPU six times as
    long.
    """
    n, largest = values.shape[-1], jnp.max(values, axis=-1, keepdims=True)
    columns = meshes.columns(values, jnp.float32)
    found = jnp.where(values == _zero_nan(largest), columns, jnp.full_like(columns, n))
    found = jnp.min(found, axis=-1, keepdims=True)
    return jnp.where(jnp.isnan(largest), jnp.full_like(found, n), found).astype(jnp.int32)


def _zero_nan(x: jax.Array) -> jax.Array:
    """Returns `x` with 0 for NaN. It is for a value that is made of a row and compared with all entries of the row.

    Without it, XLA's CPU code would write out the plain result of a reduction as often as the row has entries.
    """
    return masking.keep(jax.lax.eq(x, x), x, 0)


def log_odds_of_each(logits: jax.Array) -> jax.Array:
    """Returns `ln(p_k / (1 - p_k))` of `p = softmax(logits)`: each logit less the logsumexp of the others, `[..., n]`.

    The sum over all less the part of the largest would cancel, so the others of the largest are added up by themselves.
    For any other class the sum holds the 1 of the largest, with or without the part of that class.
    """
    columns, first = meshes.columns(logits, jnp.int32), first_argmax(logits)
    is_first = columns == first
    others = jnp.where(is_first, jnp.full_like(logits, -jnp.inf), logits)
    top, second = jnp.max(logits, axis=-1, keepdims=True), jnp.max(others, axis=-1, keepdims=True)
    # Where all is infinite, inf - inf would be NaN.
    top, second = (jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)) for x in (top, second))
    parts = jnp.exp(logits - top)
    rest = jnp.sum(parts, axis=-1, keepdims=True) - parts
    below = jnp.sum(jnp.exp(others - second), axis=-1, keepdims=True)
    return jnp.where(is_first, logits - second - jnp.log(below), logits - top - jnp.log(rest))


def fits_float32(probability: float) -> bool:
    """Tells whether a probability in (0, 1) stays inside as a float32."""
    return 0.0 < float(np.float32(probability)) < 1.0
