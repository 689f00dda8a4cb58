"""Formulas that keep their value where the plain ones overflow."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.numerics import meshes


def log_odds(probability: float) -> float:
    """`ln(p / (1 - p))` in float64, on the host."""
    return math.log(probability) - math.log1p(-probability)


def two_class_probabilities(logits: jax.Array) -> jax.Array:
    """`softmax([0, z])` from `z [..., 1]`, without a maximum: `[sigmoid(-z), sigmoid(z)]`, finite at any z."""
    return jnp.concatenate([jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits)], axis=-1)


def pick(values: jax.Array, ids: jax.Array) -> jax.Array:
    """`values[..., ids]` from `values [..., n]` and in-range `ids [..., 1]`: `[..., 1]`.

    By selection, not by gather: a gather's gradient is a scatter, which an Explicit mesh refuses and a TPU runs
    slowly, and the selection fuses with its neighbours.
    """
    chosen = meshes.columns(values, ids.dtype) == ids
    return jnp.sum(jnp.where(chosen, values, jnp.zeros_like(values)), -1, keepdims=True)


def is_argmax(values: jax.Array, ids: jax.Array) -> jax.Array:
    """Whether `ids [..., 1]` is the first maximum of `values [..., n]`: bool `[..., 1]`.

    By counting who comes before it, which is one fused pass; an argmax is not. A row with a NaN has no maximum.
    """
    mine = pick(values, ids)
    columns = meshes.columns(values, ids.dtype)
    ahead = (values > mine) | ((values == mine) & (columns < ids)) | jnp.isnan(values)
    return ~jnp.any(ahead, axis=-1, keepdims=True)


def fits_float32(probability: float) -> bool:
    """Whether a probability in (0, 1) stays inside as a float32."""
    return 0.0 < float(np.float32(probability)) < 1.0
