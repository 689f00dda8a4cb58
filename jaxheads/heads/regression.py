"""Regression by squared error."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxheads import losses, metrics, spec
from jaxheads.contract import LabelSpec
from jaxheads.heads import constants, loss_functions
from jaxheads.metrics import Mean, Observation
from jaxheads.metrics.base import MOMENTS


class RegressionHead(loss_functions.AbstractLossFnHead):
    """Regression with squared error, or with a loss of your own.

    **Domain**: `labels` are finite numbers (int and bool are cast), `[D0, ..., DN, label_dimension]`, or `[D0, ...,
    DN]` where `label_dimension` is 1. `weights` and `where` may also have the shape of the logits.

    **Link**: `predictions = inverse_link_fn(logits)`; the identity by default. The loss never sees the link.

    **loss** = `(z - y)^2` for each of the `label_dimension` logits (no half), or `loss_fn`.

    **Predictions**: `predictions [..., label_dimension]`; with an `inverse_link_fn` also `logits`.
    **Metrics**: `average_loss`, `prediction/mean`, `label/mean`, and `regularization_loss` if a regularization is
    given. They are weighted means over all elements, the last axis included. All are float32. `with_metrics` adds
    metrics that read `"moments"`, the moments of labels and predictions.

    Args:
        label_dimension: the number of targets.
        weight_column: a key of `features`, or a function `features -> weights`.
        loss_fn: `loss_fn(labels, logits[, features])` returns one loss for each logit, `[..., label_dimension]`. Other
            arguments must be keyword-only with a default, or bound by `functools.partial`.
        inverse_link_fn: a function `logits -> predictions`.
        loss_reduction: a `Reduction` or its text.
        name: is appended to the metric keys.

    Raises:
        ValueError: `label_dimension` below 1; a `loss_fn` with other arguments or another result shape; labels that are
            NaN or infinite in an unmasked row.

    Source: `tf.estimator.RegressionHead` (TensorFlow 2.15).

    >>> import jax.numpy as jnp
    >>> import jaxheads as jh
    >>> head = jh.RegressionHead()
    >>> labels, logits = jnp.array([[1.0], [3.0]]), jnp.array([[2.0], [3.5]])
    >>> float(head.loss(labels=labels, logits=logits))  # (1 + 0.25) / 2
    0.625
    >>> head.measure(labels=labels, logits=logits)
    Metrics of RegressionHead()
      average_loss     0.625
      prediction/mean  2.75
      label/mean       2

    The original's documented example:

    >>> labels, logits = jnp.array([43, 44]), jnp.array([[45.0], [41.0]])
    >>> float(head.loss(labels=labels, logits=logits))  # ((43 - 45)^2 + (44 - 41)^2) / 2
    6.5
    """

    label_dimension: int = 1
    _: dataclasses.KW_ONLY
    inverse_link_fn: Callable[[jax.Array], jax.Array] | None = None

    def validate(self) -> None:
        loss_functions.check_label_dimension(self.label_dimension)
        super().validate()
        if self.inverse_link_fn is not None and not callable(self.inverse_link_fn):
            raise ValueError(
                f"inverse_link_fn must be a function logits -> predictions. Given {self.inverse_link_fn!r}."
            )

    @property
    def logits_dimension(self) -> int:
        return self.label_dimension

    @property
    def label_spec(self) -> LabelSpec:
        return LabelSpec(self.label_dimension)

    per_logit_weights = True
    per_logit_where = True

    @property
    def loss_size(self) -> int:
        return self.label_dimension

    def standard_losses(self, labels: jax.Array, logits: jax.Array) -> jax.Array:
        return losses.squared_error(labels, logits)

    def standard_constant(self, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return constants.mean_constant(labels, weights)

    def outputs(self, logits: jax.Array) -> dict[str, Any]:
        link = self.inverse_link_fn
        return {"predictions": logits} if link is None else {"predictions": lambda: link(logits), "logits": logits}

    def observe(self, labels: jax.Array, logits: jax.Array) -> dict[str, Observation]:
        return {"prediction/mean": Mean(self._predict(logits)), "label/mean": Mean(labels)}

    def sources(self, labels: jax.Array, logits: jax.Array) -> dict[str, Callable[[], Observation]]:
        return {MOMENTS: lambda: metrics.Moments(labels, self._predict(logits))}

    def _predict(self, logits: jax.Array) -> jax.Array:
        return logits if self.inverse_link_fn is None else self.inverse_link_fn(logits)

    def signatures(self, predictions: Any) -> dict[str, spec.ExportOutput]:
        return spec.regression_signatures(predictions, "predictions")
