"""The metrics of a rate under a constraint, read from sums of errors for each label and anchor."""

import math
from typing import Any

import jax
import numpy as np

from jaxheads.losses.global_objectives import (
    FPR_AT_TPR,
    PRECISION_AT_RECALL,
    RECALL_AT_PRECISION,
    TPR_AT_FPR,
    Problem,
)
from jaxheads.metrics import Interval, ScoresView
from jaxheads.metrics.mean import SumsView
from jaxheads.metrics.operating import (
    PrecisionAtRecall,
    RecallAtPrecision,
    SensitivityAtSpecificity,
    SpecificityAtSensitivity,
)

ACHIEVED = {
    PRECISION_AT_RECALL: PrecisionAtRecall,
    RECALL_AT_PRECISION: RecallAtPrecision,
    TPR_AT_FPR: lambda target: SensitivityAtSpecificity(1 - target),
    FPR_AT_TPR: SpecificityAtSensitivity,
}


def read_constraint(rates: SumsView, problem: Problem, shape: tuple[int, ...], scale: float) -> dict[str, Any]:
    """Returns the objective, violations, multipliers and bounds.

    Args:
        rates: the sums of labels and of 1 - labels, `[..., n]`; then `[..., n * anchors]`: the surrogates of missed
            positives and of false alarms, their numbers, and the multipliers.
        problem: with arrays of the shape of the multipliers.
        shape: the shape of the multipliers.
        scale: the scale of the surrogates.
    """
    xp, n, anchors = rates.xp, shape[0], math.prod(shape) // shape[0]
    # The last two axes are labels and anchors. Without anchors, the last axis has size 1.
    positives, negatives = (x[..., None] for x in rates.sums[:2])
    missed, alarmed, missed_01, alarmed_01, multipliers = (x.reshape(*x.shape[:-1], n, anchors) for x in rates.sums[2:])
    problem = jax.tree.map(lambda x: np.asarray(x, missed.dtype).reshape(n, -1) if np.ndim(x) else x, problem)
    allowed = problem.allowed.of((positives, negatives))
    # The problem allows errors as a share of the negatives, or of the positives. A violation is a share of the same.
    support = (negatives if np.ndim(problem.allowed.negative) else positives) * xp.ones_like(missed)
    weight = (positives + negatives) * xp.ones_like(missed)

    def worst(errors: Any) -> Any:
        found = rates.zeroed().ratio(problem.constraint.of(errors) - allowed, support)
        largest = xp.where(support > 0, found, xp.full_like(found, -np.inf)).max((-2, -1))
        return xp.where((support > 0).any((-2, -1)), largest, xp.full_like(largest, rates.undefined))

    def share(errors: Any, of: Any) -> Any:
        return rates.ratio(errors.sum((-2, -1)), (of * xp.ones_like(errors)).sum((-2, -1)))

    surrogate = missed / scale, alarmed / scale
    return {
        "objective": share(problem.objective.of((missed, alarmed)), weight),
        "constraint_violation": worst((missed_01, alarmed_01)),
        "constraint_violation_surrogate": worst(surrogate),
        "multiplier/mean": share(multipliers, weight),
        "multiplier/max": rates.ratio(multipliers, weight).max((-2, -1)),
        "recall_lower_bound": share(positives - surrogate[0], positives),
        "false_positive_rate_upper_bound": share(surrogate[1], negatives),
    }


def achieved_key(objective: str, target: float) -> str:
    """Returns the key of the best value at a target."""
    return f"{objective}_{target:g}"


def read_achieved(objective: str, target: float, scores: ScoresView) -> dict[str, Any]:
    """Returns the best value of the objective at a target, and the threshold that gives it."""
    found = ACHIEVED[objective](target).read(scores)
    if objective == FPR_AT_TPR:
        specificity = found[""]
        value, lower, upper = (1 - x for x in (specificity.value, specificity.upper, specificity.lower))
        found[""] = Interval(*(scores.where(has_pairs(scores), x) for x in (value, lower, upper)))
    return {f"{achieved_key(objective, target)}{part}": value for part, value in found.items()}


def read_misordered(scores: ScoresView, labels: int) -> Any:
    """Returns the share of pairs in the wrong order, as a mean over labels that have pairs.

    It is undefined if some label has no histogram of its own.
    """
    views = [scores] if labels == 1 else [*scores.columns.values()]
    xp, nothing = scores.xp, scores.xp.full_like(scores.positives, scores.undefined)
    if len(views) < labels:
        return nothing
    there = xp.stack([has_pairs(view) for view in views], -1)
    wrong = xp.stack([1 - view.roc_auc().value for view in views], -1)
    count = there.sum(-1)
    found = xp.where(there, wrong, xp.zeros_like(wrong)).sum(-1) / xp.maximum(count, 1)
    return xp.where(count > 0, found, nothing)


def has_pairs(scores: ScoresView) -> Any:
    """Tells whether there are both positives and negatives."""
    return (scores.positives > 0) & (scores.negatives > 0)
