"""Cross-entropies of classes with options: smoothed labels, weights of classes, focus, shifted logits, a z-loss.

Options that are off add nothing to a program.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.losses import is_zero, sigmoid_cross_entropy
from jaxheads.numerics import masking, meshes, stable

# The smallest base of a power. A power of 0 has an infinite slope where the exponent is below 1.
_TINY = 1e-15


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a cross-entropy; None and 0 are off.

    Attributes:
        smoothing: the part of each label that is spread evenly over all classes.
        of_classes: the factor of the loss of each class, `[n]`; of one logit (negative, positive), each a number or
            `[n]`.
        gamma: the exponent of the focus.
        shift: what is added to the logits, a number or `[n]`.
        z_loss: the factor of `logsumexp(z)^2`.
    """

    smoothing: float = 0.0
    of_classes: Any = None
    gamma: float | None = None
    shift: Any = None
    z_loss: float = 0.0


def sigmoid_losses(labels: jax.Array, logits: jax.Array, options: Options) -> jax.Array:
    """Returns `y a (1 - p)^g softplus(-z) + (1 - y) b p^g softplus(z)` for each logit, where (b, a) are the weights."""
    logits = _shift(logits, options)
    if options.smoothing:
        labels = labels * (1 - options.smoothing) + options.smoothing / 2
    if options.gamma is None and options.of_classes is None:
        return sigmoid_cross_entropy(labels, logits)
    negative, positive = (as_factor(x, logits) for x in options.of_classes or (1, 1))
    return _focal_cross_entropy(options.gamma or 0.0, labels * positive, (1 - labels) * negative, logits)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _focal_cross_entropy(gamma: float, positive: jax.Array, negative: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns `positive (1 - p)^gamma softplus(-z) + negative p^gamma softplus(z)`."""
    of_positive, of_negative = _split_focal(gamma, logits)
    return masking.weighted(of_positive, positive) + masking.weighted(of_negative, negative)


def _focal_cross_entropy_jvp(gamma: float, primals: Any, tangents: Any) -> Any:
    (positive, negative, logits), (d_positive, d_negative, d_logits) = primals, tangents
    parts = []
    if not is_zero(d_logits):
        missed, mistaken = _split_loss(logits)
        slopes = jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits)
        if gamma:
            # In closed form: derivatives of each step would be kept and read in turn. At an infinite logit the limit of
            # the product is 0.
            products = (_unless_infinite(missed) * slopes[1], _unless_infinite(mistaken) * slopes[0])
            slopes = slopes[0] + gamma * products[0], slopes[1] + gamma * products[1]
        rising = negative * _multiply_power(slopes[1], gamma, logits, missed)
        falling = positive * _multiply_power(slopes[0], gamma, -logits, mistaken)
        parts.append((rising - falling) * d_logits)
    # Factors that do not move add nothing at an infinite logit either, so their zeros are not multiplied by it.
    if not (is_zero(d_positive) and is_zero(d_negative)):
        moved = (jnp.zeros_like(logits) if is_zero(x) else x for x in (d_positive, d_negative))
        parts += [masking.weighted(*pair) for pair in zip(_split_focal(gamma, logits), moved, strict=True)]
    return _focal_cross_entropy(gamma, positive, negative, logits), sum(parts[1:], parts[0])


_focal_cross_entropy.defjvp(_focal_cross_entropy_jvp, symbolic_zeros=True)


def _split_loss(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns softplus(-z) and softplus(z), which share their logarithm."""
    log = stable.log1p(jnp.exp(-jnp.abs(logits)))
    return log + jnp.maximum(-logits, 0), log + jnp.maximum(logits, 0)


def _split_focal(gamma: float, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the focal loss of a positive, and of a negative."""
    missed, mistaken = _split_loss(logits)
    return _multiply_power(missed, gamma, -logits, mistaken), _multiply_power(mistaken, gamma, logits, missed)


def _multiply_power(x: jax.Array, gamma: float, logits: jax.Array, minus_log: jax.Array) -> jax.Array:
    """Returns `x sigmoid(z)^gamma`, where `minus_log` is `-ln sigmoid(z)`.

    Below 1 the power has an infinite slope where the sigmoid underflows; its logarithm has none. Else powers are quick.
    """
    if not gamma:
        return x
    return x * (jnp.exp(-gamma * minus_log) if gamma < 1 else jax.nn.sigmoid(logits) ** gamma)


def _unless_infinite(x: jax.Array) -> jax.Array:
    return masking.keep(jnp.isfinite(x) | jnp.isnan(x), x, 0)


def softmax_losses(labels: jax.Array, logits: jax.Array, options: Options) -> jax.Array:
    """Returns `sum_k w_k q_k (1 - p_k)^g (-ln p_k) + c logsumexp(z)^2`, `[..., 1]`.

    Without options it is not optax's: the gradient of its gather is a scatter that an Explicit mesh refuses (optax
    0.2.8 on jax 0.12).

    Args:
        labels: ids `[..., 1]`, int32, or shares `[..., n]`, float32. They become q by smoothing.
        logits: `[..., n]`.
        options: as above.
    """
    n, smoothing, shift = logits.shape[-1], options.smoothing, options.shift
    total = _shifted_logsumexp(logits, shift)
    logits = _shift(logits, options)
    of_classes = None if options.of_classes is None else as_factor(options.of_classes, logits)
    ids = labels if labels.shape[-1] == 1 else None
    if ids is not None and not smoothing:
        losses = _focus(total - stable.pick(logits, ids), options.gamma)
        losses = losses if of_classes is None else losses * _look_up(of_classes, ids, logits)
    else:
        if ids is None:
            # By multiplication: on a mesh labels may lie as the rows do, and logits be spread over classes too.
            shares, total_share = (labels * (1 - smoothing) + smoothing / n) * masking.ones_like(logits), None
        else:
            is_label = meshes.columns(logits, ids.dtype) == ids
            shares = jnp.where(is_label, np.float32(1 - smoothing + smoothing / n), np.float32(smoothing / n))
            # What the shares add up to is known: no sum need be taken.
            total_share = np.float32(1)
            if of_classes is not None:
                total_share = (1 - smoothing) * _look_up(of_classes, ids, logits) + smoothing * of_classes.mean()
        shares = shares if of_classes is None else shares * of_classes
        if options.gamma is not None:
            losses = jnp.sum(masking.weighted(_focus(total - logits, options.gamma), shares), axis=-1, keepdims=True)
        else:
            total_share = jnp.sum(shares, axis=-1, keepdims=True) if total_share is None else total_share
            losses = total * total_share - jnp.sum(masking.weighted(logits, shares), axis=-1, keepdims=True)
    return losses + options.z_loss * jnp.square(total) if options.z_loss else losses


def _look_up(of_classes: Any, ids: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns the numbers of the classes with these ids, `[..., 1]`. They have no gradient, so a gather is quick."""
    if meshes.explicit_mesh(logits) is None:
        return jnp.take(jnp.ravel(of_classes), ids, mode="clip")
    return stable.pick(of_classes * masking.ones_like(logits), ids)


# Below this, a maximum without the shift would let sums underflow.
_LEAST_SHIFT = -50.0


def _shifted_logsumexp(logits: jax.Array, shift: Any) -> jax.Array:
    """Returns `logsumexp(z + shift)`, `[..., 1]`.

    If the shift is known and small, its maximum is taken without it: XLA's CPU code would write out the shifted logits.
    """
    if shift is None:
        return jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    if isinstance(shift, jax.Array) or np.min(shift) < _LEAST_SHIFT:
        return jax.nn.logsumexp(logits + as_factor(shift, logits), axis=-1, keepdims=True)
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    largest = masking.keep(jnp.isfinite(largest), largest, 0)
    parts = jnp.exp(logits - largest + as_factor(shift, logits))
    return jnp.log(jnp.sum(parts, axis=-1, keepdims=True)) + largest


def _shift(logits: jax.Array, options: Options) -> jax.Array:
    return logits if options.shift is None else logits + as_factor(options.shift, logits)


def as_factor(values: Any, logits: Any) -> Any:
    """Returns a number, or numbers of the classes, as float32 with as many axes as the logits."""
    values = values if isinstance(values, jax.Array) else np.asarray(values, np.float32)
    return values.reshape((1,) * (logits.ndim - values.ndim) + values.shape)


def _focus(losses: jax.Array, gamma: float | None) -> jax.Array:
    """Returns `(1 - p)^g l` of losses `l = -ln p`."""
    return losses if gamma is None else _focus_by(gamma, losses)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _focus_by(gamma: float, losses: jax.Array) -> jax.Array:
    return _raise_rest(losses, gamma) * losses


@_focus_by.defjvp
def _focus_by_jvp(gamma: float, primals: Any, tangents: Any) -> Any:
    (losses,), (moved,) = primals, tangents
    # At an infinite loss `p l` has the limit 0.
    product = jnp.exp(-losses) * _unless_infinite(losses)
    slope = _raise_rest(losses, gamma) + gamma * _raise_rest(losses, gamma - 1) * product
    return _focus_by(gamma, losses), slope * moved


def _raise_rest(losses: jax.Array, power: float) -> jax.Array:
    """Returns `(1 - p)^power` of `-ln p`. Its base is kept off 0, where the slope may be infinite."""
    return jnp.maximum(-jnp.expm1(-losses), _TINY) ** power
