"""What the metrics of a rate under a constraint tell, from sums of errors by label and anchor."""

import math
from typing import Any

import jax
import numpy as np

from jaxheads.losses.global_objectives import Problem, indicators
from jaxheads.metrics import Interval, ScoresView
from jaxheads.metrics.mean import SumsView
from jaxheads.metrics.operating import (
    PrecisionAtRecall,
    RecallAtPrecision,
    SensitivityAtSpecificity,
    SpecificityAtSensitivity,
)
from jaxheads.numerics import masking

ACHIEVED = {
    "precision_at_recall": lambda target: PrecisionAtRecall(target),
    "recall_at_precision": lambda target: RecallAtPrecision(target),
    "tpr_at_fpr": lambda target: SensitivityAtSpecificity(1 - target),
    "fpr_at_tpr": lambda target: SpecificityAtSensitivity(target),
}


# What each rate of a group is of: positives, negatives, all rows.
GROUP_RATES = {
    "true_positive_rate": lambda labels: labels,
    "false_positive_rate": lambda labels: 1 - labels,
    "positive_rate": masking.ones_like,
}


def errors_of_rate(rate: str | None, labels: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a rate is of, and its errors there, softly (`sigmoid(-z)`) and as they are: `[..., labels]` each.

    An error is a row that is not taken for positive, of a false positive rate one that is. Losses would not do in the
    place of a sigmoid: the rate of all rows is subtracted, and a loss has no bound above.
    """
    support = GROUP_RATES[str(rate)](labels)
    signed = logits if rate == "false_positive_rate" else -logits
    missed, alarmed = indicators(logits)
    counted = alarmed if rate == "false_positive_rate" else missed
    return support, masking.weighted(jax.nn.sigmoid(signed), support), masking.weighted(counted, support)


def of_groups(sums: SumsView, labels: int, groups: int, tolerance: float) -> dict[str, Any]:
    """Violations of the worst group and label and of each group, and the largest multiplier.

    Args:
        sums: of ones and of `errors_of_rate`, `[..., labels]`; of the latter in each group, and of multipliers, `[...,
            labels * groups]`.
        labels, groups: how many.
        tolerance: what is allowed.
    """
    xp = sums.xp
    weight, support, soft, counted = (x[..., None] for x in sums.sums[:4])
    inside, soft_in, counted_in, multipliers = (x.reshape(*x.shape[:-1], labels, groups) for x in sums.sums[4:])
    # A group that is all there is, as in a slice of itself, has nothing to be compared with.
    there = (inside > 0) & (inside < (1 - 1e-6) * support)

    def violations(errors: Any, errors_in: Any) -> Any:
        found = sums.zeroed().ratio(errors_in, inside) - sums.zeroed().ratio(errors, support) - tolerance
        return xp.where(there, found, xp.full_like(found, -np.inf))

    def worst(found: Any, axes: Any = (-2, -1)) -> Any:
        largest = found.max(axes)
        return xp.where(there.any(axes), largest, xp.full_like(largest, sums.undefined))

    real = violations(counted, counted_in)
    return {
        "group_violation": worst(real),
        "group_violation_surrogate": worst(violations(soft, soft_in)),
        "group_violations": worst(real, -2),
        "group_multiplier/max": sums.ratio(multipliers, weight * xp.ones_like(multipliers)).max((-2, -1)),
    }


def of_constraint(rates: SumsView, problem: Problem, shape: tuple[int, ...], scale: float) -> dict[str, Any]:
    """Objective, violations, multipliers and bounds.

    Args:
        rates: sums of labels and of 1 - labels, `[..., n]`; of missed positives and alarms by the surrogates, of both
            as they are, and of multipliers, `[..., n * anchors]`.
        problem: of the shape of the multipliers.
        shape: that shape.
        scale: of the surrogates.
    """
    xp, n, anchors = rates.xp, shape[0], math.prod(shape) // shape[0]
    # Of each label, and of each anchor (there may be one): a last axis more than labels have.
    positives, negatives = (x[..., None] for x in rates.sums[:2])
    missed, alarmed, missed_01, alarmed_01, multipliers = (x.reshape(*x.shape[:-1], n, anchors) for x in rates.sums[2:])
    problem = jax.tree.map(lambda x: np.asarray(x, missed.dtype).reshape(n, -1) if np.ndim(x) else x, problem)
    allowed = problem.allowed.of((positives, negatives))
    # What is allowed is a part of one of them, and so is what is said to be too much.
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


def achieved(objective: str, target: float, scores: ScoresView) -> dict[str, Any]:
    """The best of what is optimized while the target is held, and at which threshold."""
    found = ACHIEVED[objective](target).read(scores)
    if objective == "fpr_at_tpr":
        specificity = found[""]
        value, lower, upper = (1 - x for x in (specificity.value, specificity.upper, specificity.lower))
        found[""] = Interval(*(scores.where(has_pairs(scores), x) for x in (value, lower, upper)))
    return {f"{objective}_{target:g}{part}": value for part, value in found.items()}


def misordered(scores: ScoresView, labels: int) -> Any:
    """The share of pairs in the wrong order, the mean over labels that have pairs; undefined if not all are kept."""
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
    """Whether there are positives and negatives."""
    return (scores.positives > 0) & (scores.negatives > 0)
