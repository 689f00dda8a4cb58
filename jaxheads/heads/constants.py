"""The best constant logits, in closed form."""

import numpy as np

from jaxheads.contract import NoClosedForm
from jaxheads.losses.weighted import Options

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
