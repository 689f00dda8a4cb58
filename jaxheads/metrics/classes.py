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
from typing import Any, Literal

import jax

from jaxheads.metrics.base import AVERAGE_LOSS, CONFUSION, COUNTS, AbstractSourceMetric, Metric, Observation
from jaxheads.metrics.confusion import ClassCounts, ClassesView, ConfusionView
from jaxheads.metrics.curves import Interval, ScoresView
from jaxheads.metrics.grids import AbstractGrid
from jaxheads.metrics.scored import AbstractScoreMetric, Average
from jaxheads.numerics import brief


@dataclasses.dataclass(frozen=True)
class ConfusionMatrix(AbstractSourceMetric):
    """`confusion_matrix [n, n]`: weights by label (rows) and predicted class (columns).

    The predicted class is the first of the largest logits. A row with a NaN has no prediction and is in no column: it
    is missing in the sum of its row.

    Args:
        normalize: None, or the sum to divide by: `"true"`, of each row; `"pred"`, of each column; `"all"`, of all. A
            row, a column or a matrix without weight is undefined.

    Source: `sklearn.metrics.confusion_matrix`.
    """

    normalize: Literal["true", "pred", "all"] | None = None

    source = CONFUSION

    def __post_init__(self):
        if not brief.is_one_of(self.normalize, (None, "true", "pred", "all")):
            raise ValueError(f'ConfusionMatrix: normalize must be "true", "pred", "all" or None: {self.normalize!r}.')

    def values(self, view: ConfusionView) -> dict[str, Any]:
        matrix, ones = view.matrix, view.xp.ones_like(view.matrix)
        by = {"true": view.support[..., None], "pred": matrix.sum(-2)[..., None, :], "all": view.total[..., None, None]}
        value = view.ratio(matrix, by[self.normalize] * ones) if self.normalize else matrix
        return {"confusion_matrix": value}


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
