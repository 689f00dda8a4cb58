"""Objectives of rates at an operating point as Lagrangians, and of the order of pairs (Eban et al. 2017).

The losses `l+` and `l-` stand in for a positive below 0 and a negative above it (`SCALE` times the indicator is at most
the loss). So every objective of rates is a linear problem in the means over rows of `y l+` and `(1 - y) l-`.
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
    """`positive y l+ + negative (1 - y) l-`: the cost of an error on a positive, and of one on a negative."""

    positive: Any
    negative: Any

    def of(self, errors: Any) -> Any:
        """Returns the cost of a pair of errors, on positives and on negatives."""
        return self.positive * errors[0] + self.negative * errors[1]


class Problem(NamedTuple):
    """The problem: minimize the mean of `objective`, such that the mean of `constraint` is at most `allowed`.

    `allowed` takes the shares of positives and of negatives, times the `SCALE` of the losses, in place of errors.
    """

    objective: Rate
    constraint: Rate
    allowed: Rate


def problem(objective: str, target: np.ndarray) -> Problem:
    """Returns the problem of an objective at its targets (one for each label, or each anchor of precision).

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
    """Returns `l+` and `l-`: softplus(-z) and softplus(z), or max(0, 1 - z) and max(0, 1 + z)."""
    if name == "hinge":
        return jnp.maximum(1 - logits, 0.0), jnp.maximum(1 + logits, 0.0)
    # This takes a third of the time of jax.nn.softplus on a CPU, and both share their logarithm.
    ones = masking.ones_like(logits)
    return sigmoid_cross_entropy(ones, logits), sigmoid_cross_entropy(0 * ones, logits)


def indicators(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns 1 where a positive is missed (z <= 0), and 1 where a negative is taken for one (z > 0); NaN for NaN."""
    found = jnp.where(jnp.isnan(logits), logits, (logits > 0).astype(jnp.float32))
    return 1 - found, found


def split(labels: jax.Array, errors: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns the errors on positives, and on negatives. An infinite error on the other kind adds nothing."""
    return masking.weighted(errors[0], labels), masking.weighted(errors[1], 1 - labels)


def lagrangian(
    problem: Problem,
    multipliers: jax.Array,
    priors: jax.Array,
    errors: Any,
    scale: float,
    counted: Any = None,
) -> jax.Array:
    """Returns `objective + multipliers (constraint - allowed)` of each entry, from its split errors.

    With `counted`, the split indicators, the value and the errors' gradient stay the same, and the multipliers'
    gradient is that of the rates themselves: the proxy Lagrangian of Cotter et al. (2019).
    """
    allowed = scale * problem.allowed.of((priors, 1 - priors))
    violation = problem.constraint.of(errors) - allowed
    real = None if counted is None else scale * problem.constraint.of(counted) - allowed
    return problem.objective.of(errors) + priced(multipliers, violation, real)


def priced(multipliers: jax.Array, violation: jax.Array, real: jax.Array | None) -> jax.Array:
    """Returns `multipliers * violation`. With `real` the value is the same, but the multipliers' gradient is `real`."""
    if real is None:
        return multipliers * violation
    fixed = jax.lax.stop_gradient(multipliers)
    return fixed * violation + (multipliers - fixed) * real


class Rows(NamedTuple):
    """All rows that make pairs, each `[n, c]` or `[n, 1]`: the rows of one device, or of all devices."""

    labels: jax.Array
    logits: jax.Array
    weights: jax.Array


def pair_losses(name: str, labels: jax.Array, logits: jax.Array, rows: Rows, normalize: str) -> jax.Array:
    """Returns the part of each row in the mean loss of pairs `l+(z_i - z_j)`, i positive and j negative: `[..., 1]`.

    Weighted and added up over rows, it is the sum W of the weights times the mean over labels of `sum_ij w_i w_j y_i (1
    - y_j) l+(z_i - z_j)`, divided by the weight of those pairs (`"pairs"`) or of all pairs, W^2 (`"batch"`). So it
    gives a mean as any other loss does.
    """
    total, positives = jnp.sum(rows.weights), jnp.sum(rows.weights * rows.labels, axis=0)
    negatives = jnp.sum(rows.weights * (1 - rows.labels), axis=0)
    by = positives * (negatives / jnp.where(total == 0, jnp.ones_like(total), total))
    factor = reduction.divide(jnp.ones_like(by), by if normalize == "pairs" else jnp.full_like(by, total))
    lost = _lost_to_negatives(name, logits, rows)
    lost = labels * _unless(labels, lost) * jnp.expand_dims(factor, tuple(range(logits.ndim - 1)))
    return jnp.mean(lost, axis=-1, keepdims=True)


def _unless(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Returns values, with 0 for infinite ones of weight 0. The rest stays, for NaN to pass through in a gradient."""
    # By multiplication they lie on an Explicit mesh as the weights do: the choice insists on that.
    values = values * masking.ones_like(weights)
    return jnp.where((weights == 0) & jnp.isinf(values), jnp.zeros_like(values), values)


def _lost_to_negatives(name: str, logits: jax.Array, rows: Rows) -> jax.Array:
    """Returns `sum_j w_j (1 - y_j) l+(z - z_j)` for every entry of the logits, `PAIR_ROWS` rows j at a time.

    The values in between are made anew in the backward pass: memory is that of the rows, not of their pairs.
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
        # Two equal infinite logits are a tie, and a row of weight 0 adds nothing.
        gap = jnp.where((z == others) & jnp.isinf(z), jnp.zeros_like(others), z - others)
        return jnp.sum(weights * _unless(weights, surrogates(name, gap)[0]), axis=-1)

    def body(lost: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return lost + against(*chunk), None

    # Zeros that are laid out, and vary over devices, as the sums will.
    zeros = (~masking.true_like(logits)).astype(jnp.float32) + 0 * jnp.sum(weights)
    return jax.lax.scan(body, zeros, (cut(rows.logits), cut(weights)))[0]
