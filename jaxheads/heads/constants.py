"""The best constant logits, in closed form."""

import numpy as np

# Infinite logits are cut here: a class that was never seen gets a probability of 1e-13.
LIMIT = 30.0


def mean_constant(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the weighted mean of each column, `[d]`: values are `[n, d]`, weights `[n, 1]` or `[n, d]`."""
    weights = np.broadcast_to(weights, values.shape)
    totals = weights.sum(0)
    if not totals.all():
        raise ValueError(
            f"There is no best constant for the logits {np.flatnonzero(totals == 0).tolist()} of {len(totals)}: none "
            "of their elements weighs anything. Give some a weight."
        )
    return (values * weights).sum(0) / totals


def log_constant(x: np.ndarray) -> np.ndarray:
    """Returns `ln x`, but at least -30."""
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(x), -LIMIT)


def log_odds_constant(p: np.ndarray) -> np.ndarray:
    """Returns `ln(p / (1 - p))`, cut at -30 and 30."""
    with np.errstate(divide="ignore"):
        return np.clip(np.log(p) - np.log1p(-p), -LIMIT, LIMIT)
