"""Counting metrics of one binary score in float64 NumPy, with soft labels split by weight."""

from __future__ import annotations

import numpy as np


def ratio(numerator, denominator) -> np.ndarray:
    """With TensorFlow's 0 where there is nothing to divide by."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=np.abs(denominator) > 1e-12)


def at_decision(labels, weights, positive) -> tuple[float, float, float]:
    """Accuracy, precision and recall of the decisions `positive`."""
    true_positive = np.sum(weights * labels * positive)
    right = true_positive + np.sum(weights * (1 - labels) * ~positive)
    return (
        float(ratio(right, np.sum(weights))),
        float(ratio(true_positive, np.sum(weights * positive))),
        float(ratio(true_positive, np.sum(weights * labels))),
    )


def above(labels, scores, weights, n=200) -> tuple[np.ndarray, np.ndarray]:
    """Weight of positives and of negatives above each of `n` thresholds `i / (n - 1)`.

    The first threshold lies below 0 and the last above 1.
    """
    scores = np.asarray(scores, np.float32)
    edges = np.arange(n, dtype=np.float64) / (n - 1)
    edges[0], edges[-1] = -1e-7, 1 + 1e-7
    higher = scores.astype(np.float64)[:, None] > edges
    return (weights * labels) @ higher, (weights * (1 - labels)) @ higher


def areas(labels, scores, weights) -> tuple[float, float]:
    """Area under ROC by trapezoids, and under precision-recall by Davis and Goadrich's rule."""
    true_positive, false_positive = above(labels, scores, weights)
    positives, negatives = np.sum(weights * labels), np.sum(weights * (1 - labels))
    sensitivity, fallout = ratio(true_positive, positives), ratio(false_positive, negatives)
    roc = np.sum((fallout[:-1] - fallout[1:]) * (sensitivity[:-1] + sensitivity[1:]) / 2)

    predicted = true_positive + false_positive
    gained = true_positive[:-1] - true_positive[1:]
    slope = ratio(gained, np.maximum(predicted[:-1] - predicted[1:], 0))
    intercept = true_positive[1:] - slope * predicted[1:]
    both = (predicted[:-1] > 1e-12) & (predicted[1:] > 1e-12)
    quotient = np.where(both, ratio(predicted[:-1], predicted[1:]), 1.0)
    precision_recall = np.sum(ratio(slope * (gained + intercept * np.log(quotient)), positives))
    return float(roc), float(precision_recall)


def counting_metrics(labels, logits, weights, thresholds) -> dict[str, float]:
    """Every metric of a `BinaryClassHead` that counts, by its name."""
    labels, logits, weights = (np.asarray(array, np.float64).ravel() for array in (labels, logits, weights))
    # Probabilities are compared as float32; a class id is 1 where the logit is positive.
    half = np.exp(-np.abs(logits))
    scores = (np.where(logits >= 0, 1.0, half) / (1 + half)).astype(np.float32)
    decisions = {"": logits > 0}
    for threshold in thresholds:
        decisions[f"/positive_threshold_{threshold:g}"] = scores > np.float32(threshold)
    metrics = {}
    for suffix, positive in decisions.items():
        decided = at_decision(labels, weights, positive)
        for name, value in zip(("accuracy", "precision", "recall"), decided, strict=True):
            metrics[name + suffix] = value
    metrics["auc"], metrics["auc_precision_recall"] = areas(labels, scores, weights)
    return metrics
