"""Operating points: the best value of one rate while another is held, and the threshold that is best.

The value is the best at an edge of the bins (and at the thresholds that other metrics ask for), so it can be had. A
threshold inside a bin may be better still, and the bound on that side says by how much at most. The other bound is the
value itself. A rate is held if it is missed by no more than a part of 1e-6 of `1 - rate`: rounding may change sums of
weights by so much.

Each metric gives its threshold under its key with `_threshold` appended, as a probability, and with `_logit`, as a
logit, which is exact also where the probability rounds to 1. Scores above it are positive. Of several thresholds that
are as good it is the lowest, and of those between the same scores the one in the middle. At 0 and -inf all scores are
positive; at 1 and inf none is (so it is for a recall of 0, where no threshold has the precision). A mean over classes
has no threshold.

Each takes `average` and `name`; the rules for 0/0 and for absent classes are told in `jaxheads.metrics`.

>>> import jax.numpy as jnp
>>> import jaxheads as jh
>>> head = jh.BinaryClassHead().with_metrics(jh.metrics.PrecisionAtRecall(0.9), jh.metrics.BestThreshold())
>>> labels, logits = jnp.array([1, 1, 0, 0]), jnp.array([[2.0], [-0.5], [-1.0], [0.5]])
>>> values = head.measure(labels=labels, logits=logits).compute()
>>> keys = "precision_at_recall_0.9", "precision_at_recall_0.9_threshold", "best_f1", "best_f1_threshold"
>>> print(*(f"{values[key]:.3f}" for key in keys))
0.667 0.317 0.800 0.317
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxheads.metrics.curves import Interval, ScoresView
from jaxheads.metrics.outcomes import Outcomes
from jaxheads.metrics.scored import AbstractScoreMetric, check_positive, check_share
from jaxheads.metrics.thresholds import f_key

SLACK = 1 + 1e-6


def _find_best(
    view: ScoresView, value: Callable[[Outcomes], Any], held: Callable[[Outcomes], Any], defined: Any
) -> dict[str, Any]:
    """Returns the largest value where a rate is held, and its threshold. Both must grow with TP and fall with FP."""
    xp = view.xp

    def rated(outcomes: Outcomes, missed: float) -> Any:
        plain = outcomes.zeroed()
        return xp.where(held(plain), value(plain), xp.full_like(plain.true_positives, missed))

    # One of the ends, all positive or nothing, holds the rate always, so some cut does.
    found, ideal = rated(view.cuts(), -1), rated(view.ideal(), 0)
    return {
        "": view.interval(defined, found.max(-1), found.max(-1), ideal.max(-1)),
        **_read_threshold(view, found.argmax(-1), defined),
    }


@dataclasses.dataclass(frozen=True)
class PrecisionAtRecall(AbstractScoreMetric):
    """`precision_at_recall_R`, the highest precision with a recall of at least R.

    Undefined without positives. Source: Keras `PrecisionAtRecall`.

    Args:
        recall: in (0, 1].
    """

    recall: float

    higher_is_better = True

    def __post_init__(self):
        super().__post_init__()
        check_share(self, "recall", self.recall)

    @property
    def key(self) -> str:
        return f"precision_at_recall_{self.recall:g}"

    def read(self, view: ScoresView) -> dict[str, Any]:
        missed = (1 - self.recall) * SLACK
        return _find_best(
            view, lambda o: o.precision, lambda o: o.false_negatives <= missed * o.positives, view.positives > 0
        )


@dataclasses.dataclass(frozen=True)
class RecallAtPrecision(AbstractScoreMetric):
    """`recall_at_precision_P`, the highest recall with a precision of at least P; 0 if there is none.

    Undefined without positives. Source: Keras `RecallAtPrecision`.

    Args:
        precision: in (0, 1].
    """

    precision: float

    higher_is_better = True

    def __post_init__(self):
        super().__post_init__()
        check_share(self, "precision", self.precision)

    @property
    def key(self) -> str:
        return f"recall_at_precision_{self.precision:g}"

    def read(self, view: ScoresView) -> dict[str, Any]:
        wrong = (1 - self.precision) * SLACK

        def held(o: Outcomes) -> Any:
            return o.false_positives <= wrong * (o.true_positives + o.false_positives)

        return _find_best(view, lambda o: o.recall, held, view.positives > 0)


@dataclasses.dataclass(frozen=True)
class SensitivityAtSpecificity(AbstractScoreMetric):
    """`sensitivity_at_specificity_S`, the highest sensitivity (recall) with a specificity of at least S.

    Undefined without positives or without negatives. Source: Keras `SensitivityAtSpecificity`.

    Args:
        specificity: in (0, 1].
    """

    specificity: float

    higher_is_better = True

    def __post_init__(self):
        super().__post_init__()
        check_share(self, "specificity", self.specificity)

    @property
    def key(self) -> str:
        return f"sensitivity_at_specificity_{self.specificity:g}"

    def read(self, view: ScoresView) -> dict[str, Any]:
        wrong = (1 - self.specificity) * SLACK
        defined = (view.positives > 0) & (view.negatives > 0)
        return _find_best(view, lambda o: o.recall, lambda o: o.false_positives <= wrong * o.negatives, defined)


@dataclasses.dataclass(frozen=True)
class SpecificityAtSensitivity(AbstractScoreMetric):
    """`specificity_at_sensitivity_S`, the highest specificity with a sensitivity (recall) of at least S.

    Undefined without positives or without negatives. Source: Keras `SpecificityAtSensitivity`.

    Args:
        sensitivity: in (0, 1].
    """

    sensitivity: float

    higher_is_better = True

    def __post_init__(self):
        super().__post_init__()
        check_share(self, "sensitivity", self.sensitivity)

    @property
    def key(self) -> str:
        return f"specificity_at_sensitivity_{self.sensitivity:g}"

    def read(self, view: ScoresView) -> dict[str, Any]:
        missed = (1 - self.sensitivity) * SLACK
        defined = (view.positives > 0) & (view.negatives > 0)
        return _find_best(view, lambda o: o.specificity, lambda o: o.false_negatives <= missed * o.positives, defined)


@dataclasses.dataclass(frozen=True)
class BestThreshold(AbstractScoreMetric):
    """The threshold with the highest F score, or with the lowest cost of errors, and the value that it reaches.

    `best_f1` (`best_fbeta_B`), or `lowest_cost = (c_FP FP + c_FN FN) / (TP + TN + FP + FN)`.

    An F score is undefined without positives, a cost without data.

    Args:
        beta: how many times recall weighs as much as precision.
        cost_false_positive, cost_false_negative: the two costs, in place of the F score.
    """

    beta: float = dataclasses.field(default=1.0, kw_only=True)
    cost_false_positive: float | None = dataclasses.field(default=None, kw_only=True)
    cost_false_negative: float | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "beta", self.beta)
        if (self.cost_false_positive is None) != (self.cost_false_negative is None):
            raise ValueError(f"{self!r} needs both costs, cost_false_positive and cost_false_negative, or none.")
        if self.cost_false_positive is not None:
            check_positive(self, "cost_false_positive", self.cost_false_positive)
            check_positive(self, "cost_false_negative", self.cost_false_negative)
            if self.beta != 1:
                raise ValueError(f"{self!r}: beta is of the F score; with costs there is none. Leave one out.")

    @property
    def higher_is_better(self) -> bool:
        return self.cost_false_positive is None

    @property
    def key(self) -> str:
        return f"best_{f_key(self.beta)}" if self.cost_false_positive is None else "lowest_cost"

    def read(self, view: ScoresView) -> dict[str, Any]:
        cuts, ideal = view.cuts().zeroed(), view.ideal().zeroed()
        if self.cost_false_positive is None or self.cost_false_negative is None:
            defined, scores = view.positives > 0, cuts.f_beta(self.beta)
            best, found = scores.argmax(-1), scores.max(-1)
            value = view.interval(defined, found, found, ideal.f_beta(self.beta).max(-1))
        else:
            costs = self.cost_false_positive, self.cost_false_negative
            defined, scores = view.total > 0, cuts.cost(*costs)
            best, found = scores.argmin(-1), scores.min(-1)
            value = Interval(*(view.where(defined, x) for x in (found, ideal.cost(*costs).min(-1), found)))
        return {"": value, **_read_threshold(view, best, defined)}


def _read_threshold(view: ScoresView, cut: Any, defined: Any) -> dict[str, Any]:
    """Returns the probability and the logit of the edge of index `cut`, by the ending that each adds to a key."""
    probability, logit = _find_threshold(view, cut)
    return {"_threshold": view.where(defined, probability), "_logit": view.where(defined, logit)}


def _find_threshold(view: ScoresView, cut: Any) -> tuple[Any, Any]:
    """Returns the probability and the logit of the middle edge of those that decide as the edge of index `cut`."""
    xp, n, layout = view.xp, view.layout.n_buckets, view.layout
    filled, cut = view.negative + view.positive > 0, xp.expand_dims(cut, -1).astype(np.int32)
    index = np.arange(n, dtype=np.int32).reshape((1,) * (filled.ndim - 1) + (n,))
    low = xp.where(filled & (index < cut), index + 1, xp.zeros_like(index)).max(-1)
    high = xp.where(filled & (index >= cut), index, xp.full_like(index, n)).min(-1)
    probabilities = np.concatenate([[0.0], layout.probabilities, [1.0]])
    logits = np.concatenate([[-np.inf], layout.logits, [np.inf]])
    return tuple(xp.asarray(x, view.positive.dtype)[(low + high) // 2] for x in (probabilities, logits))  # pyright: ignore[reportReturnType]  # two
