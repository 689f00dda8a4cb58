"""The constant logits that do best, in closed form."""

import numpy as np

# What an infinite logit is cut at: a class that was never seen has a probability of 1e-13.
LIMIT = 30.0


def mean_constant(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted mean of each column, `[n, d]` under `[n, 1]` or `[n, d]`: `[d]`."""
    weights = np.broadcast_to(weights, values.shape)
    totals = weights.sum(0)
    if not totals.all():
        raise ValueError(
            f"There is no best constant for the logits {np.flatnonzero(totals == 0).tolist()} of {len(totals)}: none "
            "of their elements weighs anything. Give some a weight."
        )
    return (values * weights).sum(0) / totals


def log_constant(x: np.ndarray) -> np.ndarray:
    """`ln x`, no less than -30."""
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(x), -LIMIT)


def log_odds_constant(p: np.ndarray) -> np.ndarray:
    """`ln p / (1 - p)`, cut at -30 and 30."""
    with np.errstate(divide="ignore"):
        return np.clip(np.log(p) - np.log1p(-p), -LIMIT, LIMIT)
