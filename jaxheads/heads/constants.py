"""The best constant logits, in closed form."""

import numpy as np

from jaxheads.contract import NoClosedForm
from jaxheads.losses.weighted import Options

# Infinite logits are cut here: a class that was never seen gets a probability of 1e-13.
LIMIT = 30.0


def mean_constant(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the weighted mean of each column, `[d]`: values are `[n, d]`, weights `[n, 1]` or `[n, d]`."""
    weights = _weigh_columns(values, weights)
    return (values * weights).sum(0) / weights.sum(0)


def median_constant(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the weighted median of each column likewise: the middle of the two values that are medians, if two are.

    At most half of the weight lies below it, and at most half above. A weight of 2 is that of two rows.
    """
    return np.array([_find_median(*column) for column in zip(values.T, _weigh_columns(values, weights).T, strict=True)])


def _find_median(values: np.ndarray, weights: np.ndarray) -> float:
    order = np.argsort(values[weights > 0])
    values, weights = values[weights > 0][order], weights[weights > 0][order]
    half = weights.sum() / 2
    close = half * 1e-6  # weights were rounded to float32
    below, above = np.cumsum(weights), np.cumsum(weights[::-1])[::-1]
    return float(values[(below >= half - close) & (above >= half - close)][[0, -1]].mean())


def _weigh_columns(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the weights of all values. Refuses a column in which nothing weighs anything."""
    weights = np.broadcast_to(weights, values.shape)
    if (nothing := weights.sum(0) == 0).any():
        raise ValueError(
            f"There is no best constant for the logits {np.flatnonzero(nothing).tolist()} of {len(nothing)}: none of "
            "their elements weighs anything. Give some a weight."
        )
    return weights


def log_constant(x: np.ndarray) -> np.ndarray:
    """Returns `ln x`, but at least -30."""
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(x), -LIMIT)


def log_odds_constant(p: np.ndarray) -> np.ndarray:
    """Returns `ln(p / (1 - p))`, cut at -30 and 30."""
    with np.errstate(divide="ignore"):
        return np.clip(np.log(p) - np.log1p(-p), -LIMIT, LIMIT)


def sigmoid_constant(labels: np.ndarray, weights: np.ndarray, options: Options) -> np.ndarray:
    """Returns the best constant logits `[d]` of `sigmoid_losses` with options.

    Args:
        labels, weights: `[n, d]`, and `[n, 1]` or `[n, d]`.
        options: those of the loss; refused with a focus, for which there is no closed form.
    """
    refuse_focus(options)
    mean = mean_constant(labels, weights) * (1 - options.smoothing) + options.smoothing / 2
    negative, positive = options.of_classes or (1.0, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        best = np.log(mean * positive) - np.log((1 - mean) * negative)
        best = best if options.shift is None else best - np.asarray(options.shift, np.float64)
    return np.clip(np.nan_to_num(best, nan=0.0, posinf=LIMIT, neginf=-LIMIT), -LIMIT, LIMIT)


def softmax_constant(shares: np.ndarray, options: Options) -> np.ndarray:
    """Returns the best constant logits of `softmax_losses` with options, from the shares of the classes, `[n]`."""
    refuse_focus(options)
    best = shares * (1 - options.smoothing) + options.smoothing / len(shares)
    if options.of_classes is not None:
        best = best * np.asarray(options.of_classes)
    # With logits that are log probabilities a z-loss is 0.
    best = log_constant(best / best.sum())
    return best if options.shift is None else best - np.asarray(options.shift, np.float64)


def refuse_focus(options: Options) -> None:
    """Refuses a focal loss."""
    if options.gamma is not None:
        raise NoClosedForm(
            f"A focal loss has no best constant logits in closed form. Given focal_gamma={options.gamma!r}. Start from "
            "those of the head without it."
        )
