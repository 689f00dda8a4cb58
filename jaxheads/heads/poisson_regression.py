"""Regression of counts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads import losses, metrics, spec
from jaxheads.contract import LabelSpec
from jaxheads.head import Head
from jaxheads.heads import constants, loss_functions
from jaxheads.metrics import Mean, Observation
from jaxheads.metrics.base import MOMENTS


class PoissonRegressionHead(Head):
    """Regression of counts and rates by the Poisson likelihood.

    **Domain**: `labels` are finite and not negative (fractions are allowed), `[D0, ..., DN, label_dimension]`, or
    `[D0, ..., DN]` where `label_dimension` is 1. `weights` and `where` may also have the shape of the logits.

    **Link**: `E(y) = exp(z)`: the logit is the logarithm of the mean.

    **loss** = `exp(z) - y z`. With `compute_full_loss` it also has `y ln y - y + ln(2 pi y) / 2` where y > 1. This is
    Stirling's approximation of `ln y!`, a constant that makes the loss comparable to other likelihoods. The loss is
    +inf where exp(z) overflows, at z > 88.7.

    **Predictions**: `predictions [..., label_dimension]` = exp(z), and `logits`.
    **Metrics**: `average_loss`, `prediction/mean`, `label/mean`, and `regularization_loss` if a regularization is
    given. They are weighted means over all elements, the last axis included. All are float32. `with_metrics` adds
    metrics that read `"moments"`, the moments of labels and predictions.

    Args:
        label_dimension: the number of targets.
        weight_column: a key of `features`, or a function `features -> weights`.
        compute_full_loss: whether to add Stirling's term.
        loss_reduction: a `Reduction` or its text.
        name: is appended to the metric keys.

    Raises:
        ValueError: `label_dimension` below 1; labels that are negative, NaN or infinite in an unmasked row.

    Source: `tf.estimator.PoissonRegressionHead` (TensorFlow 2.15).

    >>> import jax.numpy as jnp
    >>> import jaxheads as jh
    >>> head = jh.PoissonRegressionHead()
    >>> labels, logits = jnp.array([[0.0], [3.0]]), jnp.array([[0.0], [1.0]])
    >>> float(head.loss(labels=labels, logits=logits))  # (1 + (2.7183 - 3 + 1.7641)) / 2
    1.2411...
    >>> head.predictions(logits, "predictions")["predictions"].ravel()
    Array([1.       , 2.7182817], dtype=float32)
    """

    label_dimension: int = 1
    _: dataclasses.KW_ONLY
    compute_full_loss: bool = True

    per_logit_weights = True
    per_logit_where = True
    coupling = "row"

    def validate(self) -> None:
        loss_functions.check_label_dimension(self.label_dimension)
        if not isinstance(self.compute_full_loss, bool):
            raise ValueError(f"compute_full_loss must be True or False. Given {self.compute_full_loss!r}.")

    @property
    def logits_dimension(self) -> int:
        return self.label_dimension

    @property
    def label_spec(self) -> LabelSpec:
        return LabelSpec(self.label_dimension, "float", 0)

    def losses(self, labels: jax.Array, logits: jax.Array) -> jax.Array:
        return losses.poisson(labels, logits, self.compute_full_loss)

    def best_constant(self, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return constants.log_constant(constants.mean_constant(labels, weights))

    def outputs(self, logits: jax.Array) -> dict[str, Any]:
        return {"predictions": lambda: jnp.exp(logits), "logits": logits}

    def observe(self, labels: jax.Array, logits: jax.Array) -> dict[str, Observation]:
        return {"prediction/mean": Mean(jnp.exp(logits)), "label/mean": Mean(labels)}

    def sources(self, labels: jax.Array, logits: jax.Array) -> dict[str, Callable[[], Observation]]:
        return {MOMENTS: lambda: metrics.Moments(labels, jnp.exp(logits))}

    def signatures(self, predictions: Any) -> dict[str, spec.ExportOutput]:
        return spec.regression_signatures(predictions, "predictions")
