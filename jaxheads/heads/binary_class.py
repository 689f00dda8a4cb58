"""Two classes, one logit."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads import losses, spec
from jaxheads.contract import LabelSpec, WeightColumn
from jaxheads.heads import constants, loss_functions, scoring
from jaxheads.metrics import GrowingGrid, Mean, Observation, Scores
from jaxheads.metrics.base import SCORES
from jaxheads.metrics.grids import AbstractGrid
from jaxheads.numerics import stable, vocabulary


class BinaryClassHead(loss_functions.AbstractLossFnHead):
    """Binary classification from one logit.

    **Domain**: `labels` in [0, 1], `[D0, ..., DN, 1]` or `[D0, ..., DN]`: int, bool or soft labels. Eager calls and
    `encode_labels` also take the names of a `label_vocabulary`. In every metric, a soft label y counts as a positive of
    weight y and a negative of weight 1 - y.

    **Link**: `P(y = 1) = sigmoid(z)`.

    **loss** = `softplus(z) - y z`, or `loss_fn`; `[..., 1]`.

    **Predictions**: `logits [..., 1]`, `logistic [..., 1]`, `probabilities [..., 2]`, `class_ids [..., 1]` (int32, z
    > 0), `all_class_ids [D0, 2]`; `decode_predictions` adds `classes` and `all_classes`.
    **Metrics**: `average_loss`, `accuracy`, `precision`, `recall` (positive: z > 0), `prediction/mean`, `label/mean`,
    `accuracy_baseline` (the accuracy of always guessing the more frequent class), `auc`, `auc_precision_recall`
    (interpolated as in Keras), for each threshold t `accuracy|precision|recall/positive_threshold_t` (positive: p > t),
    and `regularization_loss` if a regularization is given. All are float32. The areas come from a histogram with
    `bins`: `compute(bounds=True)` gives the interval that binning leaves. `with_metrics(jh.metrics...)` adds metrics
    that read the source `"scores"`.

    Args:
        weight_column: a key of `features`, or a function `features -> weights`.
        thresholds: numbers in (0, 1).
        label_vocabulary: the names of the two classes.
        loss_reduction: a `Reduction` or its text.
        loss_fn: `loss_fn(labels, logits[, features])` returns one loss for each element, `[..., 1]`. Other arguments
            must be keyword-only with a default, or bound by `functools.partial`.
        name: is appended to the metric keys.
        bins: `GrowingGrid()` (default), `LogitGrid(low, high, n)`, or `ThresholdGrid(200)` for TensorFlow's numbers.

    Raises:
        ValueError: thresholds outside (0, 1), or two that print alike; a vocabulary that is not two names; a `loss_fn`
            with other arguments or another result shape; labels outside [0, 1], or a name outside the vocabulary, in
            an unmasked row.

    Source: `tf.estimator.BinaryClassHead` (TensorFlow 2.15).

    >>> import jax.numpy as jnp
    >>> import jaxheads as jh
    >>> head = jh.BinaryClassHead(thresholds=(0.3,))
    >>> labels, logits = jnp.array([1, 1, 0, 0]), jnp.array([[2.0], [-0.5], [-1.0], [0.5]])
    >>> float(head.loss(labels=labels, logits=logits))
    0.5970...
    >>> values = head.measure(labels=labels, logits=logits).compute()
    >>> values["auc"], values["recall/positive_threshold_0.3"]
    (0.75, 1.0)

    The original's documented example:

    >>> head = jh.BinaryClassHead()
    >>> labels, logits = jnp.array([1, 1]), jnp.array([[45.0], [-41.0]])
    >>> float(head.loss(labels=labels, logits=logits))  # (0 + 41) / 2
    20.5
    >>> values = head.measure(labels=labels, logits=logits).compute(undefined=0.0)
    >>> print(*(f"{key} {values[key]:.2f}" for key in ("accuracy", "precision", "recall", "auc")))
    accuracy 0.50 precision 1.00 recall 0.50 auc 0.00
    """

    weight_column: WeightColumn = None  # positional here too, as in the original
    _: dataclasses.KW_ONLY
    thresholds: Sequence[float] | None = None
    label_vocabulary: Sequence[str] | None = None
    bins: AbstractGrid = GrowingGrid()

    logits_dimension = 1
    higher_is_better = scoring.HIGHER_IS_BETTER

    def validate(self) -> None:
        vocabulary.check(self.label_vocabulary, 2, "BinaryClassHead")
        scoring.check_thresholds(self.thresholds)
        super().validate()
        scoring.check_bins(self.bins)

    @property
    def label_spec(self) -> LabelSpec:
        return LabelSpec(1, "float", 0, 1)

    def standard_losses(self, labels: jax.Array, logits: jax.Array) -> jax.Array:
        return losses.sigmoid_cross_entropy(labels, logits)

    def standard_constant(self, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return constants.log_odds_constant(constants.mean_constant(labels, weights))

    def outputs(self, logits: jax.Array) -> dict[str, Any]:
        return {
            "logits": logits,
            "logistic": lambda: jax.nn.sigmoid(logits),
            "probabilities": lambda: stable.two_class_probabilities(logits),
            "class_ids": lambda: (logits > 0).astype(jnp.int32),
            **scoring.class_id_outputs(logits, 2),
        }

    def observe(self, labels: jax.Array, logits: jax.Array) -> dict[str, Observation]:
        return {
            "prediction/mean": Mean(jax.nn.sigmoid(logits)),
            SCORES: self.sources(labels, logits)[SCORES](),
        }

    def sources(self, labels: jax.Array, logits: jax.Array) -> dict[str, Callable[[], Observation]]:
        thresholds = tuple(dict.fromkeys(self.thresholds or ()))
        return {SCORES: lambda: Scores(labels, logits, self.bins, thresholds)}

    def summarize(self, seen: Mapping[str, Any]) -> dict[str, Any]:
        scores = seen[SCORES]
        decided = scores.at_zero()
        larger = scores.xp.maximum(scores.positives, scores.negatives)
        return {
            "accuracy": decided.accuracy,
            "precision": decided.precision,
            "recall": decided.recall,
            "prediction/mean": seen["prediction/mean"].mean,
            "label/mean": scores.positive_rate,
            "accuracy_baseline": scores.ratio(larger, scores.positives + scores.negatives),
            "auc": scores.roc_auc(),
            "auc_precision_recall": scores.pr_auc(),
            **scoring.at_thresholds(scores, self.thresholds),
        }

    def signatures(self, predictions: Mapping[str, Any]) -> dict[str, spec.ExportOutput]:
        return spec.classification_signatures(predictions, self.class_names(), regression="logistic")

    def class_names(self) -> tuple[str, ...]:
        return scoring.class_names(self.label_vocabulary, 2)
