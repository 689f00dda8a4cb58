"""Metrics of yes-or-no decisions at a threshold: exact, whatever the bins.

Each takes `threshold` (a probability in (0, 1); scores above it are positive; by default as the head decides: above its
`decision_threshold`, else z > 0), `average` and `name`.
Its docstring tells its key; a given threshold adds `/positive_threshold_T` to it. `jaxheads.metrics` tells what
`average` adds, and the rules for 0/0 and for absent classes. `Precision`, `Recall`, `FBeta` and `IoU` of a
`MultiLabelHead` also take `average="samples"`, the mean of one value a row under `KEY_samples`: `jaxheads.metrics.rows`
tells its rules.

>>> import jax.numpy as jnp
>>> import jaxheads as jh
>>> head = jh.BinaryClassHead().with_metrics(jh.metrics.FBeta(threshold=0.3), jh.metrics.Specificity())
>>> labels, logits = jnp.array([1, 1, 0, 0]), jnp.array([[2.0], [-0.5], [-1.0], [0.5]])
>>> values = head.measure(labels=labels, logits=logits).compute()
>>> values["f1/positive_threshold_0.3"], values["specificity"]
(0.8, 0.5)
"""

import dataclasses
from typing import Any, Literal

from jaxheads.metrics.outcomes import Outcomes
from jaxheads.metrics.rows import AbstractRowsMetric
from jaxheads.metrics.scored import AbstractThresholdMetric, Average, check_positive
from jaxheads.numerics import brief


@dataclasses.dataclass(frozen=True)
class Precision(AbstractRowsMetric):
    """`precision = TP / (TP + FP)`, the share of true positives among predicted ones. Source: `precision_score`."""

    stem = "precision"
    higher_is_better = True

    def decided(self, outcomes: Outcomes) -> Any:
        return outcomes.precision


@dataclasses.dataclass(frozen=True)
class Recall(AbstractRowsMetric):
    """`recall = TP / (TP + FN)`, the share of positives that are found. Source: `recall_score`."""

    stem = "recall"
    higher_is_better = True

    def decided(self, outcomes: Outcomes) -> Any:
        return outcomes.recall


@dataclasses.dataclass(frozen=True)
class Specificity(AbstractThresholdMetric):
    """`specificity = TN / (TN + FP)`, the share of negatives that are left alone."""

    stem = "specificity"
    higher_is_better = True

    def decided(self, outcomes: Outcomes) -> Any:
        return outcomes.specificity


@dataclasses.dataclass(frozen=True)
class NegativePredictiveValue(AbstractThresholdMetric):
    """`negative_predictive_value = TN / (TN + FN)`, the share of true negatives among predicted ones: NPV."""

    stem = "negative_predictive_value"
    higher_is_better = True

    def decided(self, outcomes: Outcomes) -> Any:
        return outcomes.negative_predictive_value


@dataclasses.dataclass(frozen=True)
class Accuracy(AbstractThresholdMetric):
    """`accuracy = (TP + TN) / (TP + TN + FP + FN)`. Source: Keras `BinaryAccuracy`."""

    stem = "accuracy"
    higher_is_better = True

    def decided(self, outcomes: Outcomes) -> Any:
        return outcomes.accuracy


@dataclasses.dataclass(frozen=True)
class HammingLoss(AbstractThresholdMetric):
    """`hamming_loss = (FP + FN) / (TP + TN + FP + FN)`, the share of labels that are decided wrong: 1 - `accuracy`.

    For a `MultiLabelHead` it is over all entries of all rows; entries that are masked do not count. For one of many
    classes without a threshold it is the share of rows that are predicted wrong. Source: `hamming_loss`.
    """

    stem = "hamming_loss"
    higher_is_better = False

    def decided(self, outcomes: Outcomes) -> Any:
        return outcomes.hamming_loss


@dataclasses.dataclass(frozen=True)
class BalancedAccuracy(AbstractThresholdMetric):
    """`balanced_accuracy`, the mean of recall and specificity. Source: `balanced_accuracy_score`.

    Positives and negatives are its two classes: where one is absent it is the rate of the other alone. For many classes
    it is the mean recall of those that have labels.
    """

    stem = "balanced_accuracy"
    higher_is_better = True

    def decided(self, outcomes: Outcomes) -> Any:
        return outcomes.balanced_accuracy


@dataclasses.dataclass(frozen=True)
class FBeta(AbstractRowsMetric):
    """`f1`, or `fbeta_B = (1 + B^2) TP / ((1 + B^2) TP + FP + B^2 FN)`. Source: `fbeta_score`.

    Args:
        beta: how many times recall weighs as much as precision.
    """

    beta: float = 1.0
    threshold: float | None = dataclasses.field(default=None, kw_only=True)

    higher_is_better = True

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "beta", self.beta)

    @property
    def key(self) -> str:
        return f_key(self.beta)

    def decided(self, outcomes: Outcomes) -> Any:
        return outcomes.f_beta(self.beta)


def f_key(beta: float) -> str:
    """Returns the key of an F score."""
    return "f1" if beta == 1 else f"fbeta_{beta:g}"


@dataclasses.dataclass(frozen=True)
class IoU(AbstractRowsMetric):
    """`iou = TP / (TP + FP + FN)`, intersection over union, or Jaccard's index.

    For pixels, `average=None` gives each class by itself, and `MeanIoU` the mean. Source: Keras `IoU`, `jaccard_score`.
    """

    stem = "iou"
    higher_is_better = True

    def decided(self, outcomes: Outcomes) -> Any:
        return outcomes.iou


@dataclasses.dataclass(frozen=True)
class Support(AbstractThresholdMetric):
    """`support`, the weight of the positives; by default that of each class, under `support/CLASS`."""

    average: Average = dataclasses.field(default=None, kw_only=True)

    stem = "support"

    def decided(self, outcomes: Outcomes) -> Any:
        return outcomes.positives


@dataclasses.dataclass(frozen=True)
class AbstractCount(AbstractThresholdMetric):
    """The weight of one of the four outcomes; 0 without data."""

    def __post_init__(self):
        super().__post_init__()
        if self.average in ("macro", "weighted"):
            raise ValueError(
                f'{type(self).__name__}: average must be "micro" or None. Given {self.average!r}: a count has no mean '
                "over classes."
            )


@dataclasses.dataclass(frozen=True)
class TruePositives(AbstractCount):
    """`true_positives`, the weight of the positives that are found. Source: Keras `TruePositives`.

    The sum is over all entries, or with `average=None` of each class, under `true_positives/CLASS`. For one of many
    classes without a threshold, each row is predicted as one class and not as the others, and counts so in the sum.
    A soft label y counts with its two parts. The same holds for the other three outcomes.

    >>> import jaxheads as jh
    >>> M = jh.metrics
    >>> head = jh.BinaryClassHead().with_metrics(M.TruePositives(), M.FalsePositives(0.3))
    >>> values = head.measure(labels=[1, 1, 0], logits=[[2.0], [-0.5], [-0.25]], weights=[1.0, 1.0, 3.0]).compute()
    >>> values["true_positives"], values["false_positives/positive_threshold_0.3"]
    (1.0, 3.0)
    """

    stem = "true_positives"
    higher_is_better = True

    def decided(self, outcomes: Outcomes) -> Any:
        return outcomes.true_positives


@dataclasses.dataclass(frozen=True)
class FalsePositives(AbstractCount):
    """`false_positives`, the weight of the negatives that are predicted positive. Source: Keras `FalsePositives`."""

    stem = "false_positives"
    higher_is_better = False

    def decided(self, outcomes: Outcomes) -> Any:
        return outcomes.false_positives


@dataclasses.dataclass(frozen=True)
class FalseNegatives(AbstractCount):
    """`false_negatives`, the weight of the positives that are missed. Source: Keras `FalseNegatives`."""

    stem = "false_negatives"
    higher_is_better = False

    def decided(self, outcomes: Outcomes) -> Any:
        return outcomes.false_negatives


@dataclasses.dataclass(frozen=True)
class TrueNegatives(AbstractCount):
    """`true_negatives`, the weight of the negatives that are left alone. Source: Keras `TrueNegatives`."""

    stem = "true_negatives"
    higher_is_better = True

    def decided(self, outcomes: Outcomes) -> Any:
        return outcomes.true_negatives


@dataclasses.dataclass(frozen=True)
class MatthewsCorrcoef(AbstractThresholdMetric):
    """`matthews_corrcoef = (TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN))`.

    The correlation of label and decision, from -1 to 1; undefined where either is always the same (scikit-learn's 0 is
    `undefined=0.0`). For many classes it is Gorodkin's R_K. Source: `matthews_corrcoef`.
    """

    stem = "matthews_corrcoef"
    higher_is_better = True

    def decided(self, outcomes: Outcomes) -> Any:
        return outcomes.matthews_corrcoef


@dataclasses.dataclass(frozen=True)
class CohenKappa(AbstractThresholdMetric):
    """`cohen_kappa = 2 (TP TN - FN FP) / ((TP + FP) (FP + TN) + (TP + FN) (FN + TN))`.

    Agreement of label and decision beyond that of chance; undefined where both are always the same. For many classes it
    is `1 - sum(w_ij O_ij) / sum(w_ij E_ij)` over the confusion matrix O, and E, the same matrix for independent labels
    and decisions. Source: `cohen_kappa_score`.

    Args:
        weights: the weight of an error between classes i and j: None, 1; `"linear"`, `|i - j|`, under
            `cohen_kappa_linear`; `"quadratic"`, `(i - j)^2`, under `cohen_kappa_quadratic`. For two classes, all are
            the same.
    """

    weights: Literal["linear", "quadratic"] | None = dataclasses.field(default=None, kw_only=True)

    stem = "cohen_kappa"
    higher_is_better = True

    def __post_init__(self):
        super().__post_init__()
        if not brief.is_one_of(self.weights, (None, "linear", "quadratic")):
            raise ValueError(f'CohenKappa: weights must be None, "linear" or "quadratic". Given {self.weights!r}.')

    @property
    def key(self) -> str:
        return f"{self.stem}_{self.weights}" if self.weights else self.stem

    @property
    def needs_pairs(self) -> bool:
        return self.weights is not None

    def decided(self, outcomes: Outcomes) -> Any:
        return outcomes.kappa(self.weights)
