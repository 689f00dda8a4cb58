"""Objectives of rates at an operating point as Lagrangians, and of the order of pairs (Eban et al. 2017).

With `l+` and `l-` the losses that stand in for a positive below 0 and a negative above it (`SCALE` times the indicator
is at most the loss), every objective of rates is a linear problem in the means over rows of `y l+` and `(1 - y) l-`.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.losses import sigmoid_cross_entropy
from jaxheads.numerics import masking, reduction

PRECISION_AT_RECALL, RECALL_AT_PRECISION = "precision_at_recall", "recall_at_precision"
TPR_AT_FPR, FPR_AT_TPR = "tpr_at_fpr", "fpr_at_tpr"
SCALE = {"xent": math.log(2), "hinge": 1.0}
PAIR_ROWS = 256


class Rate(NamedTuple):
    """`positive y l+ + negative (1 - y) l-`: what an error on a positive costs, and one on a negative."""

    positive: Any
    negative: Any

    def of(self, errors: Any) -> Any:
        """The cost of what was made of positives and of negatives."""
        return self.positive * errors[0] + self.negative * errors[1]


class Problem(NamedTuple):
    """Minimize the mean of `objective`, such that the mean of `constraint` is at most `allowed`.

    `allowed` is of the share of positives and the share of negatives, times the `SCALE` of the losses.
    """

    objective: Rate
    constraint: Rate
    allowed: Rate


def problem(objective: str, target: np.ndarray) -> Problem:
    """The problem of an objective at its targets (of each label; of each anchor of precision).

    `precision_at_recall`, `fpr_at_tpr`: least FP such that `FN <= (1 - target) P`. `tpr_at_fpr`: least FN such that
    `FP <= target N`. Else, recall at precision: least FN such that `target FP <= (1 - target) TP`, which in errors is
    `(1 - target) FN + target FP <= (1 - target) P`.
    """
    given, rest = np.asarray(target, np.float32), np.asarray(1 - np.asarray(target, np.float64), np.float32)
    if objective in (PRECISION_AT_RECALL, FPR_AT_TPR):
        return Problem(Rate(0.0, 1.0), Rate(1.0, 0.0), Rate(rest, 0.0))
    if objective == TPR_AT_FPR:
        return Problem(Rate(1.0, 0.0), Rate(0.0, 1.0), Rate(0.0, given))
    return Problem(Rate(1.0, 0.0), Rate(rest, given), Rate(rest, 0.0))


def surrogates(name: str, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`l+` and `l-`: softplus(-z) and softplus(z), or max(0, 1 - z) and max(0, 1 + z)."""
    if name == "hinge":
        return jnp.maximum(1 - logits, 0.0), jnp.maximum(1 + logits, 0.0)
    # A third of the time of jax.nn.softplus on a CPU, and both share their logarithm.
    ones = masking.ones_like(logits)
    return sigmoid_cross_entropy(ones, logits), sigmoid_cross_entropy(0 * ones, logits)


def indicators(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """1 where a positive is missed (z <= 0), and where a negative is taken for one (z > 0); NaN of NaN."""
    found = jnp.where(jnp.isnan(logits), logits, (logits > 0).astype(jnp.float32))
    return 1 - found, found


def split(labels: jax.Array, errors: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Errors as far as they are of positives, and of negatives; an infinite one of the other kind is not there."""
    return masking.weighted(errors[0], labels), masking.weighted(errors[1], 1 - labels)


def lagrangian(
    problem: Problem,
    multipliers: jax.Array,
    priors: jax.Array,
    errors: Any,
    scale: float,
    counted: Any = None,
) -> jax.Array:
    """`objective + multipliers (constraint - allowed)` of each entry, from its split errors.

    With `counted`, the split indicators, the value and the gradient of the errors are the same, and the multipliers'
    gradient is that of the rates themselves: the proxy Lagrangian of Cotter et al. (2019).
    """
    allowed = scale * problem.allowed.of((priors, 1 - priors))
    violation = problem.constraint.of(errors) - allowed
    real = None if counted is None else scale * problem.constraint.of(counted) - allowed
    return problem.objective.of(errors) + priced(multipliers, violation, real)


def priced(multipliers: jax.Array, violation: jax.Array, real: jax.Array | None) -> jax.Array:
    """`multipliers * violation`; with `real` of that value, but the multipliers' gradient is `real`."""
    if real is None:
        return multipliers * violation
    fixed = jax.lax.stop_gradient(multipliers)
    return fixed * violation + (multipliers - fixed) * real


class Rows(NamedTuple):
    """All rows that make pairs, each `[n, c]` or `[n, 1]`: those of one device, or of all."""

    labels: jax.Array
    logits: jax.Array
    weights: jax.Array


def pair_losses(name: str, labels: jax.Array, logits: jax.Array, rows: Rows, normalize: str) -> jax.Array:
    """What a row adds to the mean loss of pairs `l+(z_i - z_j)`, i positive and j negative: `[..., 1]`.

    Weighted and added up over rows, it is the sum W of the weights times the mean over labels of `sum_ij w_i w_j y_i (1
    - y_j) l+(z_i - z_j)`, divided by the weight of those pairs (`"pairs"`) or of all pairs, W^2 (`"batch"`). So it is
    the mean of a loss as any other is.
    """
    total, positives = jnp.sum(rows.weights), jnp.sum(rows.weights * rows.labels, axis=0)
    negatives = jnp.sum(rows.weights * (1 - rows.labels), axis=0)
    by = positives * (negatives / jnp.where(total == 0, jnp.ones_like(total), total))
    factor = reduction.divide(jnp.ones_like(by), by if normalize == "pairs" else jnp.full_like(by, total))
    lost = _lost_to_negatives(name, logits, rows)
    lost = labels * _unless(labels, lost) * jnp.expand_dims(factor, tuple(range(logits.ndim - 1)))
    return jnp.mean(lost, axis=-1, keepdims=True)


def _unless(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Values of which the infinite ones of weight 0 are 0. The rest stays, for NaN to pass through in a gradient."""
    # By multiplication they lie on an Explicit mesh as the weights do, which a choice would insist on.
    values = values * masking.ones_like(weights)
    return jnp.where((weights == 0) & jnp.isinf(values), jnp.zeros_like(values), values)


def _lost_to_negatives(name: str, logits: jax.Array, rows: Rows) -> jax.Array:
    """`sum_j w_j (1 - y_j) l+(z - z_j)` for every entry of the logits, `PAIR_ROWS` rows j at a time.

    What lies between is made anew in the backward pass: memory is that of the rows, not of their pairs.
    """
    n, size = rows.logits.shape[0], min(PAIR_ROWS, max(1, rows.logits.shape[0]))
    chunks = -(-n // size)

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, chunks * size - n), (0, 0)))
        return jnp.swapaxes(padded.reshape(chunks, size, x.shape[-1]), 1, 2)

    weights = rows.weights * (1 - rows.labels)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def against(others: jax.Array, weights: jax.Array) -> jax.Array:
        # [..., c, 1] against [c, size].
        others, weights = (jnp.expand_dims(x, tuple(range(logits.ndim - 1))) for x in (others, weights))
        z = logits[..., None]
        # Two that are as infinite are a tie, and what weighs nothing adds nothing.
        gap = jnp.where((z == others) & jnp.isinf(z), jnp.zeros_like(others), z - others)
        return jnp.sum(weights * _unless(weights, surrogates(name, gap)[0]), axis=-1)

    def body(lost: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return lost + against(*chunk), None

    # Zeros that lie, and vary over devices, as the sums will.
    zeros = (~masking.true_like(logits)).astype(jnp.float32) + 0 * jnp.sum(weights)
    return jax.lax.scan(body, zeros, (cut(rows.logits), cut(weights)))[0]
