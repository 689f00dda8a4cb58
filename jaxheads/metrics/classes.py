"""Metrics for heads of many classes that heads of two classes do not have.

Metrics of decisions for or against each class, such as `Precision`, `Recall`, `FBeta`, `IoU`, `Support`,
`BalancedAccuracy`, `CohenKappa` and `MatthewsCorrcoef`, are with the other metrics of decisions: without a threshold
they read the hits and errors of the head by class. Metrics of scores, such as `AveragePrecision`, read the histogram of
each class against all others.

>>> import jax.numpy as jnp
>>> import jaxheads as jh
>>> head = jh.MultiClassHead(3, label_vocabulary=("ant", "bee", "cat"))
>>> head = head.with_metrics(jh.metrics.ConfusionMatrix(), jh.metrics.Recall(average=None), jh.metrics.CohenKappa())
>>> logits = jnp.array([[3.0, 0.0, 0.0], [0.0, 2.0, 1.0], [0.0, 2.0, 1.0], [1.0, 0.0, 0.0]])
>>> values = head.measure(labels=["ant", "bee", "cat", "ant"], logits=logits).compute()
>>> values["confusion_matrix"]
array([[2., 0., 0.],
       [0., 1., 0.],
       [0., 1., 0.]], dtype=float32)
>>> print(values["recall/bee"], values["recall/cat"], values["cohen_kappa"])  # by chance (2 * 2 + 1 * 2 + 1 * 0) / 16
1.0 0.0 0.6
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxheads.metrics.base import (
    AVERAGE_LOSS,
    CONFUSION,
    COUNTS,
    SCORES,
    AbstractSourceMetric,
    Metric,
    Observation,
    at_threshold,
)
from jaxheads.metrics.confusion import ClassCounts, ClassesView
from jaxheads.metrics.curves import Interval, ScoresView
from jaxheads.metrics.grids import AbstractGrid
from jaxheads.metrics.outcomes import Normalize, check_normalize
from jaxheads.metrics.scored import AbstractScoreMetric, Average, check_share


@dataclasses.dataclass(frozen=True)
class ConfusionMatrix(Metric):
    """`confusion_matrix [n, n]`: weights by label (rows) and predicted class (columns).

    The predicted class is the first of the largest logits. A row with a NaN has no prediction and is in no column: it
    is missing in the sum of its row.

    For a head of two classes and one logit it is `[[TN, FP], [FN, TP]]`, read from the score histogram that the head
    keeps. It is exact at its threshold. A NaN makes it NaN. `metrics.confusion_matrix(names=True)` names the classes.

    Args:
        normalize: None, or the sum to divide by: `"true"`, of each row; `"pred"`, of each column; `"all"`, of all. A
            row, a column or a matrix without weight is undefined.
        threshold: for two classes and one logit, a probability in (0, 1). Scores above it are predicted as the second
            class; the key is `confusion_matrix/positive_threshold_T`. By default z > 0.

    Raises:
        ValueError: another value of `normalize`; a threshold outside (0, 1), or one for many classes; a head without
            classes, or with several labels a row.

    Source: `sklearn.metrics.confusion_matrix`.

    >>> import jaxheads as jh
    >>> head = jh.BinaryClassHead().with_metrics(jh.metrics.ConfusionMatrix(threshold=0.3))
    >>> values = head.measure(labels=[1, 1, 0, 0], logits=[[2.0], [-0.5], [-1.0], [0.5]]).compute()
    >>> values["confusion_matrix/positive_threshold_0.3"]
    array([[1., 1.],
           [0., 2.]], dtype=float32)
    """

    normalize: Normalize = None
    threshold: float | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        check_normalize("ConfusionMatrix", self.normalize)
        if self.threshold is not None:
            check_share(self, "threshold", self.threshold, below=1.0)

    def observe(
        self, labels: Any, logits: jax.Array, sources: Mapping[str, Callable[[], Observation]]
    ) -> Mapping[str, Observation]:
        if CONFUSION in sources:
            if self.threshold is not None:
                raise ValueError(
                    f"{self!r} has a threshold. This head predicts one of many classes, by the largest logit. Leave "
                    "the threshold out, or take jh.metrics.TruePositives(threshold, average=None) and its like."
                )
            return {CONFUSION: sources[CONFUSION]()}
        scores: Any = sources[SCORES]() if SCORES in sources else None
        if scores is None or scores.logits.shape[-1] > 1:
            raise ValueError(
                f"{self!r} needs a head whose rows have one class each, such as BinaryClassHead or MultiClassHead. "
                "For several labels a row, take jh.metrics.TruePositives(average=None), FalsePositives, "
                "FalseNegatives and TrueNegatives."
            )
        return {SCORES: scores.with_threshold(self.threshold)}

    def summarize(self, seen: Mapping[str, Any]) -> dict[str, Any]:
        view = seen[CONFUSION] if CONFUSION in seen else seen[SCORES].decide(self.threshold)
        key = "confusion_matrix" if self.threshold is None else at_threshold("confusion_matrix", self.threshold)
        return {key: view.normalized(self.normalize)}


@dataclasses.dataclass(frozen=True)
class MeanIoU(AbstractSourceMetric):
    """`mean_iou`, the mean of `TP / (TP + FP + FN)` over the classes that have labels or are predicted.

    It is `IoU(average="macro")` under the name that it has for pixels. Source: `keras.metrics.MeanIoU`.
    """

    source = CONFUSION
    higher_is_better = True

    def observe(
        self, labels: Any, logits: jax.Array, sources: Mapping[str, Callable[[], Observation]]
    ) -> Mapping[str, Observation]:
        return {COUNTS: ClassCounts.of(self.made(sources))}

    def summarize(self, seen: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.values(ClassCounts.view(seen))

    def values(self, view: ClassesView) -> dict[str, Any]:
        each = view.by_class().with_undefined(float("nan")).at_zero().iou
        return {"mean_iou": view.average(each, ~view.xp.isnan(each))}


@dataclasses.dataclass(frozen=True)
class OneVsRestAuc(AbstractScoreMetric):
    """`auc_ovr_macro`, `auc_ovr_weighted`, or `auc_ovr/CLASS`: the areas under the ROC curves of each class.

    Each class is ranked against all others by its probability among them: the score is its log odds, `z_k - logsumexp`
    of the others. Undefined for a class with no labels, or with all; means are over the others. Bins leave an interval.

    Args:
        average: `"macro"`, `"weighted"` by support, None for each class, `"micro"` for all together.
        bins: the bins of the log odds, by default a `GrowingGrid`. They serve all metrics of the head's scores,
            `RocAuc` and the rest.

    Source: `sklearn.metrics.roc_auc_score(multi_class="ovr")`; Provost and Domingos (2000).

    >>> import jaxheads as jh
    >>> head = jh.MultiClassHead(3).with_metrics(jh.metrics.OneVsRestAuc())
    >>> logits = [[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.5]]
    >>> values = head.measure(labels=[0, 1, 2, 2], logits=logits).compute()
    >>> print(f"{values['auc_ovr_macro']:.4f}")  # (1 + 1 + 3/4) / 3
    0.9167
    """

    average: Average = dataclasses.field(default="macro", kw_only=True)
    bins: AbstractGrid | None = dataclasses.field(default=None, kw_only=True)

    stem = "auc_ovr"
    higher_is_better = True

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.bins, (AbstractGrid, type(None))):
            raise ValueError(
                f"OneVsRestAuc: bins must be jh.GrowingGrid(), jh.LogitGrid(...) or jh.ThresholdGrid(n): {self.bins!r}."
            )

    def refine(self, observation: Any) -> Observation:
        return super().refine(dataclasses.replace(observation, grid=self.bins or observation.grid))

    def read(self, view: ScoresView) -> Interval:
        return view.roc_auc()


@dataclasses.dataclass(frozen=True)
class Perplexity(Metric):
    """`perplexity = exp(average_loss)`, of all data seen; undefined without data.

    It is the head's own loss: with a `loss_fn`, the exponential of that.

    >>> import jaxheads as jh
    >>> head = jh.MultiClassHead(4).with_metrics(jh.metrics.Perplexity())
    >>> head.measure(labels=[1], logits=[[0.0, 0.0, 0.0, 0.0]]).compute()["perplexity"]
    4.0
    """

    higher_is_better = False

    def observe(
        self, labels: Any, logits: jax.Array, sources: Mapping[str, Callable[[], Observation]]
    ) -> Mapping[str, Observation]:
        return {}

    def summarize(self, seen: Mapping[str, Any]) -> dict[str, Any]:
        loss = seen[AVERAGE_LOSS]
        xp = loss.xp
        value = xp.exp(loss.mean)
        return {"perplexity": xp.where(loss.weight == 0, xp.full_like(value, loss.undefined), value)}
