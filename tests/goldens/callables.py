"""The functions that the golden files name: the formulas are in `index.json.gz`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


def mse_per_element(labels, logits):
    return jnp.square(labels - logits)


def mse_with_reduction_arg(labels, logits, loss_reduction="never passed"):
    del loss_reduction
    return jnp.square(labels - logits)


def abs_per_element(labels, logits):
    return jnp.abs(labels - logits)


def huber_1(labels, logits):
    distance = jnp.abs(labels - logits)
    return jnp.where(distance <= 1, 0.5 * distance * distance, distance - 0.5)


def mse_times_feature_scale(labels, logits, features):
    return features["scale"] * jnp.square(labels - logits)


def _cross_entropy(labels, logits):
    labels = labels.astype(logits.dtype)
    return jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))


def brier(labels, logits):
    return jnp.square(jax.nn.sigmoid(logits) - labels)


def hinge_pm1(labels, logits):
    return jnp.maximum(0.0, 1 - (2 * labels - 1) * logits)


def bce_times_feature_scale(labels, logits, features):
    return features["scale"] * _cross_entropy(labels, logits)


def _one_hot(labels, logits):
    classes = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    return (labels == classes).astype(logits.dtype)


def one_minus_prob(labels, logits):
    chosen = _one_hot(labels, logits) * jax.nn.softmax(logits)
    return 1 - jnp.sum(chosen, axis=-1, keepdims=True)


def xent_smooth_0_1(labels, logits):
    target = 0.9 * _one_hot(labels, logits) + 0.1 / logits.shape[-1]
    return -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1, keepdims=True)


def sum_bce(labels, logits):
    return jnp.sum(_cross_entropy(labels, logits), axis=-1, keepdims=True)


def ml_brier_mean(labels, logits):
    return jnp.mean(jnp.square(jax.nn.sigmoid(logits) - labels), axis=-1, keepdims=True)


def ml_bce_times_feature_scale(labels, logits, features):
    mean = jnp.mean(_cross_entropy(labels, logits), axis=-1, keepdims=True)
    return features["scale"] * mean


def bad_no_labels(logits, x):
    del x
    return logits


def bad_no_logits(labels, x):
    del x
    return labels


def bad_extra_arg(labels, logits, name=None):
    del name
    return jnp.square(labels - logits)


def bad_shape_drop_last(labels, logits):
    del labels
    return jnp.sum(jnp.square(logits), axis=-1)


def bad_shape_keep_all(labels, logits):
    del labels
    return jnp.square(logits)


LOSS_FNS = {
    function.__name__: function
    for function in (
        mse_per_element,
        mse_with_reduction_arg,
        abs_per_element,
        huber_1,
        mse_times_feature_scale,
        brier,
        hinge_pm1,
        bce_times_feature_scale,
        one_minus_prob,
        xent_smooth_0_1,
        sum_bce,
        ml_brier_mean,
        ml_bce_times_feature_scale,
        bad_no_labels,
        bad_no_logits,
        bad_extra_arg,
        bad_shape_drop_last,
        bad_shape_keep_all,
    )
}

LINK_FNS = {
    "exp": jnp.exp,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "square": jnp.square,
}

NORMALIZERS = {
    None: lambda column: column,
    "plus_one": lambda column: column + 1,
    "sqrt": jnp.sqrt,
    "times_ten": lambda column: 10 * column,
}


@dataclasses.dataclass(frozen=True)
class NumericColumn:
    """`tf.feature_column.numeric_column(key, normalizer_fn=...)` as a function of the features."""

    key: str
    normalizer: str | None = None

    def __call__(self, features):
        column = jnp.asarray(features[self.key], jnp.float32)
        return NORMALIZERS[self.normalizer](column)
