"""Floor 1: per-element losses `[..., 1]` or `[..., d]`, optax's where optax has the loss.

optax is imported where it is used, so that `import jaxheads` does not pay for it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.numerics import masking, stable


def squared_error(labels: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns `(z - y)^2`, without the half."""
    import optax

    return optax.squared_error(logits, labels)


def absolute_error(labels: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns `|z - y|`. Its slope is 0 where both are equal; that of `jnp.abs` is 1. optax 0.2.8 has none."""
    errors = logits - labels
    return errors * jnp.sign(errors)


def huber(labels: jax.Array, logits: jax.Array, delta: float) -> jax.Array:
    """Returns Huber's loss of the error `z - y`."""
    return stable.huber(logits - labels, delta)


def log_cosh(labels: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns `ln cosh(z - y)`.

    It is not optax's, which subtracts two logarithms: of an error of 1e-4 nothing is left there.
    """
    errors = logits - labels
    sizes = jnp.abs(errors)
    small = sizes < 1
    near = jnp.where(small, errors, jnp.zeros_like(errors))
    far = jnp.where(small, jnp.ones_like(sizes), sizes)
    # cosh(x) = 1 + 2 sinh(x / 2)^2.
    near = jnp.log1p(2 * jnp.square(jnp.sinh(near / 2)))
    return jnp.where(small, near, far + (stable.log1p(jnp.exp(-2 * far)) - math.log(2.0)))


def sigmoid_cross_entropy(labels: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns `softplus(z) - y z`, for hard and soft labels; at an infinite z its limit.

    It is not optax's, which takes two logarithms where one will do: three times as long, and its metrics four times.
    """
    # By subtraction: on a mesh labels may lie as the rows do, and logits be spread over classes too.
    logits = jnp.asarray(logits)
    return _sigmoid_cross_entropy(jnp.asarray(labels).astype(logits.dtype), logits)


@jax.custom_jvp
def _sigmoid_cross_entropy(labels: jax.Array, logits: jax.Array) -> jax.Array:
    wrong = (logits > 0).astype(logits.dtype) - labels
    # Infinitely sure and right: 0 * inf, where the limit is 0.
    linear = masking.keep(wrong != 0, wrong * logits, 0)
    return linear + stable.log1p(jax.lax.exp(jax.lax.neg(jax.lax.abs(logits))))


def _sigmoid_cross_entropy_jvp(primals: Any, tangents: Any) -> Any:
    (labels, logits), (d_labels, d_logits) = primals, tangents
    parts = []
    if not is_zero(d_logits):
        # As a difference, sigmoid(z) - y would lose its small value where the model is sure and right.
        slope = (1 - labels) * jax.nn.sigmoid(logits) - labels * jax.nn.sigmoid(-logits)
        parts.append(slope * d_logits)
    # Labels that do not move add nothing at an infinite logit either, so their zeros are not multiplied by it.
    if not is_zero(d_labels):
        parts.append(-logits * d_labels)
    return _sigmoid_cross_entropy(labels, logits), sum(parts[1:], parts[0])


def is_zero(tangent: Any) -> bool:
    """Tells whether a tangent is known to be 0."""
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


_sigmoid_cross_entropy.defjvp(_sigmoid_cross_entropy_jvp, symbolic_zeros=True)


def poisson(labels: jax.Array, logits: jax.Array, full: bool) -> jax.Array:
    """Returns `exp(z) - y z`; if `full`, plus Stirling's approximation of `ln y!` where y > 1. optax 0.2.8 has none."""
    losses = jnp.exp(logits) - labels * logits
    if not full:
        return losses
    large = labels > 1
    y = jnp.where(large, labels, jnp.full_like(labels, 2))
    stirling = y * jnp.log(y) - y + 0.5 * jnp.log(2 * jnp.pi * y)
    return losses + jnp.where(large, stirling, jnp.zeros_like(losses))


__all__ = ["absolute_error", "huber", "log_cosh", "poisson", "sigmoid_cross_entropy", "squared_error"]
