"""The mean and the scale of labels: counted on the host, or while training."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.numerics import brief, inputs, masking, pairs

# A spread below this part of the mean is rounding of float32. Labels are all equal then, and their scale is 1.
LEAST_SPREAD = 1e-6


class LabelStatistics(NamedTuple):
    """The weighted mean and standard deviation of labels: numbers, or tuples of one number for each target."""

    mean: float | tuple[float, ...]
    scale: float | tuple[float, ...]


def label_statistics(labels: Any, weights: Any = None, where: Any = None) -> LabelStatistics:
    """Returns the mean and the standard deviation of labels, for `RegressionHead(label_mean=, label_scale=)`.

    With weights w, `mean = sum(w y) / sum(w)` and `scale^2 = sum(w (y - mean)^2) / sum(w)`, for each target, in
    float64. A weight of 2 counts a row twice. Labels that are all equal have a scale of 1. It works on the host.

    Args:
        labels: `[N]`, or `[..., label_dimension]`: the last axis of several has the targets. Sequences of one target
            are `[B, T, 1]`.
        weights, where: as for `head.loss`; of the shape of the labels, or of their leading shape with or without a last
            axis of 1. Labels of weight 0, or where `where` is False, may be anything.

    Returns:
        `mean, scale`: numbers for `[N]` and `[..., 1]`, else tuples.

    Raises:
        ValueError: a traced array; other shapes; a label that is not finite; a negative weight; a target without any
            label that weighs something; labels that float32 cannot tell apart, such as seconds since 1970.

    Source: `sklearn.preprocessing.StandardScaler`.

    >>> import jaxheads as jh
    >>> mean, scale = jh.label_statistics([1000.0, 1002.0, 1004.0], weights=[1, 2, 1])
    >>> head = jh.RegressionHead(label_mean=mean, label_scale=scale)
    >>> head
    RegressionHead(label_mean=1002.0, label_scale=1.4142135623730951)
    >>> head.predictions(logits=[[0.0], [1.0]])["predictions"].ravel().tolist()
    [1002.0, 1003.4141845703125]
    """
    if inputs.is_traced((labels, weights, where)):
        raise ValueError("label_statistics works on the host: call it outside jit, on all labels.")
    y = np.asarray(inputs.as_array(labels, "labels"))
    if y.dtype.kind not in "biuf" and inputs.dtype_kind(y) != "float":
        raise ValueError(f"labels must be numbers. Given {brief.tell(y)}.")
    y = y[:, None] if y.ndim == 1 else y
    if y.ndim < 2:
        raise ValueError(f"labels must be [N] or [..., label_dimension]. Given {brief.tell(labels)}.")
    y, lead, sizes = y.astype(np.float64), y.shape[:-1], (1, y.shape[-1])
    exists = True if where is None else np.asarray(inputs.as_where(where, lead, sizes=sizes))
    w = np.ones(1) if weights is None else np.asarray(inputs.as_weights(weights, lead, sizes, "weights"), np.float64)
    if where is not None:
        inputs.check_where(np.asarray(exists), np.ones(np.shape(exists), bool), "where")
    w = np.where(np.broadcast_to(exists, y.shape) != 0, w, 0)
    if not (np.isfinite(w).all() and (w >= 0).all()):
        raise ValueError("weights must be finite and not negative, where labels exist.")
    y = np.where(w > 0, y, 0)
    if not np.isfinite(y).all():
        raise ValueError(f"labels must be finite. Given {y[~np.isfinite(y)][0]}. Leave out such rows with where=.")
    axes = tuple(range(y.ndim - 1))
    total = w.sum(axes)
    if not total.all():
        raise ValueError(f"Each target needs a label that weighs something. Given weights that add up to {total}.")
    with np.errstate(over="ignore", invalid="ignore"):
        mean = (w * y).sum(axes) / total
        spread = np.sqrt((w * np.square(y - mean)).sum(axes) / total)
    if not np.isfinite([mean, spread]).all():
        raise ValueError(f"labels are too large to be squared. Given a mean of {mean.max():g}. Divide them first.")
    varies = spread > 1e-13 * np.abs(mean)
    if (near := varies & (spread < LEAST_SPREAD * np.abs(mean))).any():
        raise ValueError(
            "labels become float32 in a head, which cannot tell labels apart that lie so close together. Given a mean "
            f"of {mean[near][0]:.10g} and a standard deviation of {spread[near][0]:g}. Subtract the mean from the "
            "labels on the host, in float64, and add it to the predictions."
        )
    scale = np.where(varies, spread, 1.0)
    one = y.shape[-1] == 1
    return LabelStatistics(*(x.item() if one else tuple(x.tolist()) for x in (mean, scale)))


# Counts while training. A float32 sum of squares loses the spread of labels far from zero, so labels are counted less a
# shift, which is the mean of the first batch that weighs something. The counts are compensated pairs: they do not stop.


def start(targets: int) -> jax.Array:
    """Returns counts of no label, `[4, targets, 2]`: a shift, and the sums of 1, y - shift and its square."""
    return jnp.zeros((4, targets, 2), jnp.float32)


def count(
    counts: jax.Array, labels: jax.Array, weights: jax.Array, over_devices: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Returns the counts with one more batch: labels `[..., d]` of weights `[..., 1]` or `[..., d]`."""
    weights = weights * masking.ones_like(labels)
    sums = jnp.stack([masking.column_totals(x) for x in (weights, masking.weighted(labels, weights))])
    weight, total = over_devices(sums)
    mean = total / jnp.where(weight > 0, weight, jnp.ones_like(weight))
    shift = jnp.where(jnp.sum(counts[1], axis=-1) > 0, counts[0, :, 0], mean)
    around = labels - extend(shift, labels)
    powers = jnp.stack([masking.column_totals(masking.weighted(x, weights)) for x in (around, around**2)])
    sums = pairs.add(counts[1:], jnp.concatenate([weight[None], over_devices(powers)])[..., None])
    return jnp.concatenate([jnp.stack([shift, jnp.zeros_like(shift)], axis=-1)[None], sums])


def read(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the mean and the scale of each target, `[d]`: 0 and 1 before any label; 1 where all are equal."""
    shift, weight, first, second = jnp.sum(counts, axis=-1)
    safe = jnp.where(weight > 0, weight, jnp.ones_like(weight))
    mean = shift + first / safe
    variance = second / safe - jnp.square(first / safe)
    spreads = variance > jnp.square(LEAST_SPREAD * mean)
    ones = jnp.ones_like(variance)
    return mean, jnp.where(spreads, jnp.sqrt(jnp.where(spreads, variance, ones)), ones)


def extend(values: Any, like: Any) -> Any:
    """Returns values of each target, `[d]`, with the leading axes of `like [..., d]`."""
    return values.reshape((1,) * (like.ndim - 1) + values.shape)
