"""Checks of thresholds and bins, metrics at thresholds, and class ids: shared by heads of classes."""

from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.metrics import Mean, ScoresView
from jaxheads.metrics.base import at_threshold
from jaxheads.metrics.grids import AbstractGrid
from jaxheads.numerics import brief, stable

# Metrics of decisions and of ranking, which heads of classes share.
HIGHER_IS_BETTER = MappingProxyType(
    dict.fromkeys(("accuracy", "precision", "recall", "auc", "auc_precision_recall"), True)
)


def check_thresholds(thresholds: Any) -> None:
    """Refuses thresholds outside (0, 1), and two thresholds that print alike: they would share their metric keys."""
    if thresholds is None:
        return
    if not isinstance(thresholds, tuple):
        raise ValueError(f"thresholds must be a sequence of numbers in (0, 1). Given {thresholds!r}.")
    for t in thresholds:
        if isinstance(t, bool) or not isinstance(t, (int, float)) or not 0 < t < 1 or not stable.fits_float32(t):
            raise ValueError(f"thresholds not in (0, 1): {t!r} in {thresholds!r}.")
    printed: dict[str, float] = {}
    for t in thresholds:
        if (other := printed.setdefault(at_threshold("", t), t)) != t:
            raise ValueError(
                f"thresholds {other!r} and {t!r} print alike (%g) and would share the metric keys "
                f"positive_threshold_{t:g}. Leave one out."
            )


def check_decision_threshold(threshold: Any) -> None:
    """Refuses a decision threshold that is no probability in (0, 1)."""
    if threshold is None:
        return
    is_number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not is_number or not 0 < threshold < 1 or not stable.fits_float32(threshold):
        raise ValueError(
            f"decision_threshold must be a probability in (0, 1). Given {brief.tell(threshold)}. For a logit t pass "
            "1 / (1 + exp(-t))."
        )


def decide(logits: Any, threshold: Any) -> jax.Array:
    """Returns 1 where the probability is above the threshold, else 0: int32. Without a threshold, where z > 0.

    Args:
        logits: `[..., d]`, of a device or of the host.
        threshold: a probability, or one for each logit.
    """
    if threshold is None:
        return jnp.asarray(logits > 0, jnp.int32)
    # The histogram of scores has its edges at the same float32 numbers.
    return jnp.asarray(logits > stable.as_edges(threshold, logits, stable.log_odds), jnp.int32)


# The metrics of decisions about single entries, which have their own means.
DECISIONS = ("accuracy", "precision", "recall")


def observe_decisions(labels: jax.Array, logits: jax.Array, threshold: Any) -> dict[str, Mean]:
    """Returns the means of decisions about entries; a soft label y is a positive of weight y. A NaN shows in each."""
    nothing = jnp.where(jnp.isnan(logits), logits, jnp.zeros_like(logits))
    found = decide(logits, threshold).astype(jnp.float32) + nothing
    hits = labels * found
    right = hits + (1 - labels) * (1 - found)
    return {"accuracy": Mean(right), "precision": Mean(hits, found), "recall": Mean(hits, labels + nothing)}


def check_bins(bins: Any) -> None:
    """Refuses every value that is not a grid."""
    if not isinstance(bins, AbstractGrid):
        raise ValueError(f"bins must be jh.GrowingGrid(), jh.LogitGrid(...) or jh.ThresholdGrid(n). Given {bins!r}.")


def class_names(label_vocabulary: Any, n: int) -> tuple[str, ...]:
    """Returns the names of the classes; without a vocabulary, their ids as text."""
    return tuple(label_vocabulary or ()) or tuple(map(str, range(n)))


def at_thresholds(scores: ScoresView, thresholds: Any) -> dict[str, Any]:
    """Returns `accuracy|precision|recall/positive_threshold_t` for each threshold."""
    found = {}
    for t in thresholds or ():
        decided = scores.at(t)
        rates = {"accuracy": decided.accuracy, "precision": decided.precision, "recall": decided.recall}
        found |= {at_threshold(key, t): rate for key, rate in rates.items()}
    return found


def class_id_outputs(logits: jax.Array, n: int) -> dict[str, Any]:
    """Returns `all_class_ids`, `[D0, n]` at any rank, as in the original."""
    return {"all_class_ids": lambda: jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None], (logits.shape[0], n))}
