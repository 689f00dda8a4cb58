"""Regression by squared error and its robust kin, on labels of any scale."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxheads import losses, metrics, spec
from jaxheads.contract import LabelSpec, Rows, running
from jaxheads.heads import constants, label_statistics, loss_functions
from jaxheads.metrics import Mean, Observation
from jaxheads.metrics.base import MOMENTS
from jaxheads.numerics import brief

OBJECTIVES = SQUARED_ERROR, ABSOLUTE_ERROR, LOG_COSH, HUBER = "squared_error", "absolute_error", "log_cosh", "huber"
RUNNING = "running"
# The range of float32.
LEAST, LARGEST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


class RegressionHead(loss_functions.AbstractLossFnHead):
    """Regression with squared error, a robust loss, or a loss of your own.

    **Domain**: `labels` are finite numbers (int and bool are cast), `[D0, ..., DN, label_dimension]`, or `[D0, ...,
    DN]` where `label_dimension` is 1. `weights` and `where` may also have the shape of the logits.

    **Link**: `predictions = inverse_link_fn(logits)`; the identity by default. The loss never sees the link.

    **loss** = one loss for each of the `label_dimension` logits, `loss_fn` or an `objective` of `e = z - y`:

    | objective | loss | its best constant |
    | --- | --- | --- |
    | `"squared_error"` (default) | `e^2` (no half) | the mean |
    | `"absolute_error"` | `|e|` | the median |
    | `"huber"` | `e^2 / 2` up to `|e| = huber_delta`, else `huber_delta (|e| - huber_delta / 2)` | no formula |
    | `"log_cosh"` | `ln cosh(e)`, about `e^2 / 2` for small errors and `|e| - ln 2` for large ones | no formula |

    **Labels of any scale**: with `label_mean` m and `label_scale` s the loss takes `(y - m) / s` in place of y, and
    `predictions = m + s inverse_link_fn(z)`. So networks learn numbers about 0 and 1, and all that a user sees is in
    the units of the labels: labels, predictions, and the metrics of both. Only `average_loss` is the mean of the
    training loss, in standardized units (of squared error it is the mean squared error divided by `s^2`). Take
    `jh.metrics.MeanSquaredError` for one in units. `constant_logits` and the derivatives for boosting are those of the
    standardized loss too.

    With `"running"`, m and s are the weighted mean and standard deviation of all earlier training labels, over all
    devices. The train step counts them: `head.init_state()` is in its state, and other calls take it as `params=`.
    Before any label, m is 0 and s is 1, so the first step trains on raw labels. To start with known values, count some
    labels first: `head_state = head.update_state(head.init_state(), labels, logits)`, with any logits, and put that in
    the train state, `dataclasses.replace(state, head_state=head_state)`. `label_statistics` is better where all labels
    are at hand: the numbers do not move then. Boosters take numbers alone.

    **Predictions**: `predictions [..., label_dimension]`; with an `inverse_link_fn`, `label_mean` or `label_scale` also
    `logits`.
    **Metrics**: `average_loss`, `prediction/mean`, `label/mean`, and `regularization_loss` if a regularization is
    given. They are weighted means over all elements, the last axis included. All are float32. `with_metrics` adds
    metrics that read `"moments"`, the moments of labels and predictions.

    Args:
        label_dimension: the number of targets.
        weight_column: a key of `features`, or a function `features -> weights`.
        loss_fn: `loss_fn(labels, logits[, features])` returns one loss for each logit, `[..., label_dimension]`. Other
            arguments must be keyword-only with a default, or bound by `functools.partial`.
        inverse_link_fn: a function `logits -> predictions`.
        objective: one of the table, without `loss_fn`.
        huber_delta: the error from which on `"huber"` is linear; of standardized labels if they have a scale.
        label_mean, label_scale: a number, or one for each target, as `jh.label_statistics` gives them; or `"running"`,
            for both. By default 0 and 1. With `"running"`, give an optimizer that keeps squared gradients, such as
            Adam, counts of some labels before the first step (as above), for raw labels would stay in its state; and
            let `fit` monitor a metric in units, for `average_loss` is in a unit that moves.
        loss_reduction: a `Reduction` or its text.
        name: is appended to the metric keys.

    Raises:
        ValueError: `label_dimension` below 1; a `loss_fn` with other arguments or another result shape; an unknown
            objective, or one beside a `loss_fn`; a `huber_delta` that is not above 0, or of another objective; labels
            that are NaN or infinite in an unmasked row; a `label_scale` that is not above 0, or numbers for another
            number of targets.

    Source: `tf.estimator.RegressionHead` (TensorFlow 2.15); `huber_loss` and `log_cosh` of optax 0.2.8, which halve the
    square; `sklearn.compose.TransformedTargetRegressor` for labels of
    any scale.

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
    objective: str = "squared_error"
    huber_delta: float = 1.0
    label_mean: float | Sequence[float] | str | None = None
    label_scale: float | Sequence[float] | str | None = None
    label_counts: Any = running(
        lambda head: label_statistics.start(head.label_dimension) if head._counts_labels else None
    )

    def validate(self) -> None:
        loss_functions.check_label_dimension(self.label_dimension)
        super().validate()
        if self.inverse_link_fn is not None and not callable(self.inverse_link_fn):
            raise ValueError(
                f"inverse_link_fn must be a function logits -> predictions. Given {self.inverse_link_fn!r}."
            )
        self._check_objective()
        self._check_statistics()

    def _check_objective(self) -> None:
        if self.objective is None or not brief.is_one_of(self.objective, OBJECTIVES):
            raise ValueError(f"objective must be one of {OBJECTIVES}. Given {brief.tell(self.objective)}.")
        if self.loss_fn is not None and self.objective != SQUARED_ERROR:
            raise ValueError(
                f"A head has one loss. Given both a loss_fn and objective={self.objective!r}. Leave one out."
            )
        if not _lies_in(self.huber_delta, LEAST, LARGEST):
            raise ValueError(f"huber_delta must be a number above 0. Given {brief.tell(self.huber_delta)}.")
        if self.objective != HUBER and self.huber_delta != 1:
            raise ValueError(
                f'huber_delta is of objective="huber". Given huber_delta={self.huber_delta!r} and '
                f"objective={self.objective!r}. Leave it out."
            )

    def _check_statistics(self) -> None:
        given = {"label_mean": self.label_mean, "label_scale": self.label_scale}
        if any(isinstance(value, str) for value in given.values()):
            if set(given.values()) != {RUNNING}:
                raise ValueError(
                    'label_mean and label_scale must be numbers, or both "running". Given '
                    f"label_mean={brief.tell(self.label_mean)}, label_scale={brief.tell(self.label_scale)}."
                )
            return
        for name, value in given.items():
            low, what = (LEAST, "a number above 0") if name == "label_scale" else (-LARGEST, "a finite number")
            values = value if isinstance(value, tuple) else (1.0 if value is None else value,)
            if len(values) not in (1, self.label_dimension) or not all(_lies_in(x, low, LARGEST) for x in values):
                each = f", or {self.label_dimension} of them" if self.label_dimension > 1 else ""
                raise ValueError(
                    f'{name} must be {what}{each}; or "running". Given {brief.tell(value)}. '
                    "jh.label_statistics(labels) gives both."
                )
        if (statistics := self._statistics) is not None and (statistics[1] < 1e-6 * np.abs(statistics[0])).any():
            raise ValueError(
                f"label_scale={brief.tell(self.label_scale)} is less than a millionth of label_mean="
                f"{brief.tell(self.label_mean)}: labels become float32, which cannot tell such labels apart. Subtract "
                "the mean from the labels on the host, in float64, and add it to the predictions."
            )

    @property
    def _counts_labels(self) -> bool:
        return self.label_mean == RUNNING

    @property
    def _statistics(self) -> tuple[Any, Any] | None:
        """The mean and the scale of each target, float32 `[d]`; None where labels are taken as they are."""
        if self._counts_labels:
            return label_statistics.read(self.label_counts)
        mean, scale = self.label_mean, self.label_scale
        if mean is None and scale is None:
            return None

        def each(value: Any, default: float) -> np.ndarray:
            values = np.asarray(default if value is None else value, np.float32)
            return np.broadcast_to(values, (self.label_dimension,))

        return each(mean, 0.0), each(scale, 1.0)

    def _standardize(self, labels: Any, statistics: Any) -> Any:
        """Returns labels less their mean, in units of their scale."""
        if statistics is None:
            return labels
        mean, scale = (label_statistics.extend(x, labels) for x in statistics)
        return (labels - mean) / scale

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

    def losses(self, labels: jax.Array, logits: jax.Array, features: Any = None) -> jax.Array:
        return super().losses(self._standardize(labels, self._statistics), logits, features)

    def best_constant(self, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
        if self._counts_labels and self.label_counts is None:
            raise ValueError(
                'The best constant logits depend on the values of label_mean="running". Bind them first, '
                "head.bind(state).constant_logits(labels), or give numbers, jh.label_statistics(labels)."
            )
        statistics = jax.tree.map(np.asarray, self._statistics)
        return super().best_constant(self._standardize(labels, statistics), weights)

    def advance(self, labels: jax.Array, logits: jax.Array, rows: Rows) -> Mapping[str, Any]:
        if not self._counts_labels:
            return {}
        return {"label_counts": label_statistics.count(self.label_counts, labels, rows.weights, rows.devices.sum)}

    def standard_losses(self, labels: jax.Array, logits: jax.Array) -> jax.Array:
        if self.objective == HUBER:
            return losses.huber(labels, logits, self.huber_delta)
        formulas = {
            SQUARED_ERROR: losses.squared_error,
            ABSOLUTE_ERROR: losses.absolute_error,
            LOG_COSH: losses.log_cosh,
        }
        return formulas[self.objective](labels, logits)

    def standard_constant(self, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
        if self.objective == SQUARED_ERROR:
            return constants.mean_constant(labels, weights)
        if self.objective == ABSOLUTE_ERROR:
            return constants.median_constant(labels, weights)
        return super().standard_constant(labels, weights)

    def outputs(self, logits: jax.Array) -> dict[str, Any]:
        if self.inverse_link_fn is None and self.label_mean is None and self.label_scale is None:
            return {"predictions": logits}
        return {"predictions": lambda: self._predict(logits), "logits": logits}

    def observe(self, labels: jax.Array, logits: jax.Array) -> dict[str, Observation]:
        return {"prediction/mean": Mean(self._predict(logits)), "label/mean": Mean(labels)}

    def sources(self, labels: jax.Array, logits: jax.Array) -> dict[str, Callable[[], Observation]]:
        return {MOMENTS: lambda: metrics.Moments(labels, self._predict(logits))}

    def _predict(self, logits: jax.Array) -> jax.Array:
        values, statistics = logits if self.inverse_link_fn is None else self.inverse_link_fn(logits), self._statistics
        if statistics is None:
            return values
        mean, scale = (label_statistics.extend(x, logits) for x in statistics)
        return mean + scale * values

    def signatures(self, predictions: Any) -> dict[str, spec.ExportOutput]:
        return spec.regression_signatures(predictions, "predictions")


def _lies_in(x: Any, low: float, high: float) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and low <= x <= high
