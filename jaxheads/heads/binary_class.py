"""Two classes, one logit."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxheads import spec
from jaxheads.contract import LabelSpec, WeightColumn
from jaxheads.heads import class_options, constants, scoring
from jaxheads.losses.weighted import Options, sigmoid_losses
from jaxheads.metrics import GrowingGrid, Mean, Observation, Scores
from jaxheads.metrics.base import SCORES
from jaxheads.metrics.grids import AbstractGrid
from jaxheads.numerics import stable, vocabulary


class BinaryClassHead(class_options.AbstractClassHead):
    """Binary classification from one logit.

    **Domain**: `labels` in [0, 1], `[D0, ..., DN, 1]` or `[D0, ..., DN]`: int, bool or soft labels. Eager calls and
    `encode_labels` also take the names of a `label_vocabulary`. In every metric, a soft label y counts as a positive of
    weight y and a negative of weight 1 - y.

    **Link**: `P(y = 1) = sigmoid(z)`.

    **loss** = `softplus(z) - y z`, or `loss_fn`; `[..., 1]`. With options it is, for the smoothed y and the shifted z,
    `y a (1 - p)^g softplus(-z) + (1 - y) b p^g softplus(z)`, where `(b, a)` are the class weights. So a soft label is a
    mixture of two hard ones; the factor of optax's focal loss differs for soft labels.

    **Predictions**: `logits [..., 1]`, `logistic [..., 1]`, `probabilities [..., 2]`, `class_ids [..., 1]` (int32; 1
    where p > `decision_threshold`, which without one is z > 0: a logit of 0 is of class 0), `all_class_ids [D0, 2]`;
    `decode_predictions` adds `classes` and `all_classes`.
    **Metrics**: `average_loss`, `accuracy`, `precision`, `recall` (of `class_ids`; with a `ThresholdGrid` they compare
    float32 probabilities), `prediction/mean`, `label/mean`, `accuracy_baseline` (the accuracy of always guessing the
    more frequent class), `auc`, `auc_precision_recall` (interpolated as in Keras), for each threshold t
    `accuracy|precision|recall/positive_threshold_t` (positive: p > t), and `regularization_loss` if a regularization is
    given. All are float32. The areas come from a histogram with `bins`: `compute(bounds=True)` gives the interval that
    binning leaves. `with_metrics(jh.metrics...)` adds metrics that read the source `"scores"`.

    Args:
        weight_column: a key of `features`, or a function `features -> weights`.
        thresholds: numbers in (0, 1).
        label_vocabulary: the names of the two classes.
        loss_reduction: a `Reduction` or its text.
        loss_fn: `loss_fn(labels, logits[, features])` returns one loss for each element, `[..., 1]`. Other arguments
            must be keyword-only with a default, or bound by `functools.partial`.
        name: is appended to the metric keys.
        bins: `GrowingGrid()` (default), `LogitGrid(low, high, n)`, or `ThresholdGrid(200)` for TensorFlow's numbers.
        decision_threshold: the probability above which the class is 1; `head.at_threshold(t)` gives the head with
            another one, such as that of `jh.metrics.BestThreshold`. Metrics of decisions without a threshold of their
            own follow it.
        label_smoothing: the part e of labels that is spread over both classes: `(1 - e) y + e / 2`, as in Keras.
        class_weights: the factors `(b, a)` of the losses of negatives and of positives, or a dict by class (name or id)
            in which a class that is left out weighs 1. They are a part of the loss, no multiplicities: metrics and
            denominators do not see them (PyTorch's mean divides by them; Keras' does not).
        pos_weight: the factor of the loss of positives, in place of `class_weights=(1, pos_weight)`, as XGBoost's
            `scale_pos_weight`.
        focal_gamma: the exponent g of the focal loss.
        focal_alpha: the factor of positives in the focal loss, and 1 less it of negatives, as in torchvision.
        logit_adjustment: the share of positives, or both shares, or their logarithms; the loss takes `z + ln(share_1 /
            share_0)` in place of z (Menon et al. 2021). `"running"` counts the weighted rows in training, from one
            of each class on; the counts are then a running field.

    Raises:
        ValueError: options of the loss beside a `loss_fn`, or outside their range; thresholds outside (0, 1), or two
            that print alike; a vocabulary that is not two names; a `loss_fn` with other arguments or another result
            shape; labels outside [0, 1], or a name outside the vocabulary, in an unmasked row.

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
    decision_threshold: float | None = None
    pos_weight: float | None = None

    logits_dimension = 1
    higher_is_better = scoring.HIGHER_IS_BETTER

    def validate(self) -> None:
        vocabulary.check(self.label_vocabulary, 2, "BinaryClassHead")
        scoring.check_thresholds(self.thresholds)
        super().validate()
        scoring.check_bins(self.bins)
        scoring.check_decision_threshold(self.decision_threshold)
        self.check_options(2)
        if self.pos_weight is not None:
            class_options.check_number("pos_weight", self.pos_weight, "a finite number above 0", lambda x: x > 0)
            if self.class_weights is not None:
                raise ValueError(
                    f"pos_weight={self.pos_weight!r} is class_weights=(1, {self.pos_weight!r}). Given class_weights="
                    f"{self.class_weights!r} too. Leave one out."
                )
        if self.focal_alpha is not None:
            class_options.check_number("focal_alpha", self.focal_alpha, "a number in [0, 1]", lambda x: 0 <= x <= 1)
        self._find_log_odds()

    @property
    def class_keys(self) -> tuple[Any, ...]:
        return tuple(self.label_vocabulary or (0, 1))

    @property
    def option_names(self) -> tuple[str, ...]:
        return (*super().option_names, "pos_weight")

    @property
    def label_spec(self) -> LabelSpec:
        return LabelSpec(1, "float", 0, 1)

    def standard_losses(self, labels: jax.Array, logits: jax.Array) -> jax.Array:
        return sigmoid_losses(labels, logits, self._find_options())

    def _find_options(self) -> Options:
        weights: Any = self.class_weights if self.pos_weight is None else (1.0, self.pos_weight)
        alpha: Any = self.focal_alpha
        if alpha is not None:
            negative, positive = weights or (1.0, 1.0)
            weights = negative * (1 - alpha), positive * alpha
        return Options(self.label_smoothing, weights, self.focal_gamma, self._find_log_odds())

    def _find_log_odds(self) -> Any:
        """Returns the log odds of the shares of both classes; None without `logit_adjustment`."""
        shares = self.logit_adjustment
        if shares == class_options.RUNNING:
            return None if self.class_counts is None else self.log_counts[1] - self.log_counts[0]
        if isinstance(shares, tuple):
            shares = class_options.as_shares("logit_adjustment", shares, 2)[1]
        return None if shares is None else stable.log_odds(class_options.as_share("logit_adjustment", shares))

    @property
    def counts_shape(self) -> tuple[int, ...]:
        return (2,)

    def count_classes(self, labels: jax.Array, logits: jax.Array, weights: jax.Array) -> jax.Array:
        return self.count_two(labels, weights)[:, 0]

    def standard_constant(self, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return constants.sigmoid_constant(labels, weights, self._find_options())

    def at_threshold(self, threshold: float) -> "BinaryClassHead":
        """Returns the same head with another `decision_threshold`."""
        return dataclasses.replace(self, decision_threshold=threshold)

    def outputs(self, logits: jax.Array) -> dict[str, Any]:
        return {
            "logits": logits,
            "logistic": lambda: jax.nn.sigmoid(logits),
            "probabilities": lambda: stable.two_class_probabilities(logits),
            "class_ids": lambda: scoring.decide(logits, self.decision_threshold),
            **scoring.class_id_outputs(logits, 2),
        }

    def observe(self, labels: jax.Array, logits: jax.Array) -> dict[str, Observation]:
        return {
            "prediction/mean": Mean(jax.nn.sigmoid(logits)),
            SCORES: self.sources(labels, logits)[SCORES](),
        }

    def sources(self, labels: jax.Array, logits: jax.Array) -> dict[str, Callable[[], Observation]]:
        decision = () if self.decision_threshold is None else (self.decision_threshold,)
        thresholds = tuple(dict.fromkeys((*(self.thresholds or ()), *decision)))
        return {SCORES: lambda: Scores(labels, logits, self.bins, thresholds, decision=self.decision_threshold)}

    def summarize(self, seen: Mapping[str, Any]) -> dict[str, Any]:
        scores = seen[SCORES]
        decided = scores.decide(None)
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
