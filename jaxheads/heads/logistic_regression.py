"""Regression of a probability."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxheads import losses, metrics, spec
from jaxheads.contract import LabelSpec
from jaxheads.head import Head
from jaxheads.heads import constants
from jaxheads.metrics import Mean, Observation
from jaxheads.metrics.base import MOMENTS


class LogisticRegressionHead(Head):
    """Regression of a probability or a share in [0, 1], by the logistic loss.

    For classes, with accuracy and AUC, use `BinaryClassHead`.

    **Domain**: `labels` in [0, 1], `[D0, ..., DN, 1]` or `[D0, ..., DN]`; fractions, int and bool.

    **Link**: `E(y) = sigmoid(z)`.

    **loss** = `softplus(z) - y z`; `[..., 1]`.

    **Predictions**: `predictions [..., 1]` = sigmoid(z), and `logits`.
    **Metrics**: `average_loss`, `prediction/mean`, `label/mean`, and `regularization_loss` if a regularization is
    given. All are float32. `with_metrics` adds metrics that read `"moments"`, the moments of labels and predictions.

    Args:
        weight_column: a key of `features`, or a function `features -> weights`; may be positional.
        loss_reduction: a `Reduction` or its text.
        name: is appended to the metric keys.

    Raises:
        ValueError: labels outside [0, 1] in an unmasked row.

    Source: `tf.estimator.LogisticRegressionHead` (TensorFlow 2.15).

    >>> import jax.numpy as jnp
    >>> import jaxheads as jh
    >>> head = jh.LogisticRegressionHead()
    >>> labels, logits = jnp.array([[0.25], [1.0]]), jnp.array([[0.0], [2.0]])
    >>> float(head.loss(labels=labels, logits=logits))  # (ln 2 + ln(1 + e^-2)) / 2
    0.4100...
    >>> head.predictions(logits, "predictions")["predictions"].ravel()
    Array([0.5     , 0.88079...], dtype=float32)
    """

    weight_column: Any = None

    logits_dimension = 1
    coupling = "row"

    @property
    def label_spec(self) -> LabelSpec:
        return LabelSpec(1, "float", 0, 1)

    def losses(self, labels: jax.Array, logits: jax.Array) -> jax.Array:
        return losses.sigmoid_cross_entropy(labels, logits)

    def best_constant(self, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return constants.log_odds_constant(constants.mean_constant(labels, weights))

    def outputs(self, logits: jax.Array) -> dict[str, Any]:
        return {"predictions": lambda: jax.nn.sigmoid(logits), "logits": logits}

    def observe(self, labels: jax.Array, logits: jax.Array) -> dict[str, Observation]:
        return {"prediction/mean": Mean(jax.nn.sigmoid(logits)), "label/mean": Mean(labels)}

    def sources(self, labels: jax.Array, logits: jax.Array) -> dict[str, Callable[[], Observation]]:
        return {MOMENTS: lambda: metrics.Moments(labels, jax.nn.sigmoid(logits))}

    def signatures(self, predictions: Any) -> dict[str, spec.ExportOutput]:
        return spec.regression_signatures(predictions, "predictions")
