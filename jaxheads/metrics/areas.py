"""Metrics of all thresholds at once: how well scores rank. Bins leave an interval, `compute(bounds=True)`.

Each takes `average` and `name`; the rules for ties, for 0/0 and for absent classes are told in `jaxheads.metrics`.

>>> import jax.numpy as jnp
>>> import jaxheads as jh
>>> head = jh.MultiLabelHead(3).with_metrics(jh.metrics.RocAuc(average="macro"), jh.metrics.AveragePrecision())
>>> labels = jnp.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
>>> logits = jnp.array([[2.0, 0.5, -1.0], [-0.5, 1.0, -2.0], [1.0, 0.0, 0.5]])
>>> values = head.measure(labels=labels, logits=logits).compute()
>>> print(f"{values['auc_macro']:.2f} {values['average_precision']:.4f}")  # (1 + 1/2) / 2: the last class is absent
0.75 0.9167
"""

import dataclasses
from typing import Any

from jaxheads.metrics.base import Observation
from jaxheads.metrics.curves import Interval, ScoresView
from jaxheads.metrics.outcomes import Outcomes
from jaxheads.metrics.scored import AbstractScoreMetric, check_share


@dataclasses.dataclass(frozen=True)
class RocAuc(AbstractScoreMetric):
    """`auc`, the area under the ROC curve: how often a positive has a higher score than a negative.

    With `max_fpr=m` it is `auc_max_fpr_M`, of the area A of the part where the false positive rate is at most m. As in
    scikit-learn it is not A itself but its standard form by McClish (1989), `(1 + (A - m^2 / 2) / (m - m^2 / 2)) / 2`:
    0.5 for scores that tell nothing, 1 for the best. For m = 1 it is the whole area.

    Undefined without positives or without negatives. Source: `roc_auc_score`.

    Args:
        max_fpr: in (0, 1]; by default there is no limit.

    Raises:
        ValueError: a `max_fpr` outside (0, 1].

    >>> import jaxheads as jh
    >>> head = jh.BinaryClassHead().with_metrics(jh.metrics.RocAuc(max_fpr=0.5))
    >>> values = head.measure(labels=[1, 1, 0, 0], logits=[[2.0], [-0.5], [-1.0], [0.5]]).compute()
    >>> print(f"{values['auc_max_fpr_0.5']:.4f}")  # A = 0.5 * 0.5
    0.6667
    """

    max_fpr: float | None = dataclasses.field(default=None, kw_only=True)

    higher_is_better = True

    def __post_init__(self):
        super().__post_init__()
        if self.max_fpr is not None:
            check_share(self, "max_fpr", self.max_fpr)

    @property
    def key(self) -> str:
        return "auc" if self.max_fpr is None else f"auc_max_fpr_{self.max_fpr:g}"

    def read(self, view: ScoresView) -> Interval:
        return view.roc_auc() if self.max_fpr is None else view.partial_roc_auc(self.max_fpr)


@dataclasses.dataclass(frozen=True)
class PrAuc(AbstractScoreMetric):
    """`auc_precision_recall`, the area under the precision-recall curve, interpolated as by Davis and Goadrich (2006).

    Undefined without positives. Source: Keras `AUC(curve="PR")`.
    """

    stem = "auc_precision_recall"
    higher_is_better = True

    def read(self, view: ScoresView) -> Interval:
        return view.pr_auc()


@dataclasses.dataclass(frozen=True)
class AveragePrecision(AbstractScoreMetric):
    """`average_precision = sum_n (R_n - R_{n-1}) P_n`: precision averaged over the positives, without interpolation.

    Undefined without positives. The value is that of the bins, as if scores were equal inside each. Source:
    `average_precision_score`.
    """

    stem = "average_precision"
    higher_is_better = True

    def refine(self, observation: Any) -> Observation:
        return super().refine(dataclasses.replace(observation, ties=True))

    def read(self, view: ScoresView) -> Interval:
        def averaged(precision: Any) -> Any:
            return view.zeroed().ratio((view.positive * precision).sum(-1), view.positives)

        return view.interval(
            view.positives > 0,
            averaged(view.cuts().zeroed().precision[..., :-1]),
            lower=view.zeroed().ratio(self._sum_worst(view).sum(-1), view.positives),
            upper=averaged(view.ideal().zeroed().precision),
        )

    def _sum_worst(self, view: ScoresView) -> Any:
        """Returns, for each bucket, the least sum of precisions that its positives can have, in any order of scores.

        It is least if the negatives of the bucket come first. Positives that are tied come at once. Else it is least if
        they come in ever smaller parts: the integral of (t + x) / (t + x + F) over x from 0 to p, where t are the
        positives above the bucket, and F the negatives above and inside it.
        """
        xp, p, worst, ratio = view.xp, view.positive, view.worst(), view.zeroed().ratio
        false, above = worst.false_positives, worst.true_positives
        apart = p - false * xp.log1p(ratio(p, above + false))
        return apart if view.tied is None else xp.where(view.tied, p * ratio(above + p, above + p + false), apart)


@dataclasses.dataclass(frozen=True)
class KolmogorovSmirnov(AbstractScoreMetric):
    """`kolmogorov_smirnov`, the largest `|TPR - FPR|` at any threshold: how far apart the scores of the classes lie.

    Undefined without positives or without negatives. The value, and its lower bound, is the largest at an edge of the
    bins. Source: `scipy.stats.ks_2samp`.
    """

    stem = "kolmogorov_smirnov"
    higher_is_better = True

    def read(self, view: ScoresView) -> Interval:
        def ahead(outcomes: Outcomes) -> Any:
            return outcomes.zeroed().recall - outcomes.zeroed().fall_out

        xp, defined = view.xp, (view.positives > 0) & (view.negatives > 0)
        value = xp.abs(ahead(view.cuts())).max(-1)
        upper = xp.maximum(ahead(view.ideal()).max(-1), -ahead(view.worst()).min(-1))
        return view.interval(defined, value, value, upper)
