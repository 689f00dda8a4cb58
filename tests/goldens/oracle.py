"""In float64 NumPy: metrics that count, with soft labels split by weight; and losses of all data seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def cross_entropy(labels, logits) -> np.ndarray:
    return np.logaddexp(0, logits) - labels * logits


def with_last_axis(array, like) -> np.ndarray:
    return array[..., None] if array.ndim < like.ndim else array


def losses(kind: str, arguments: dict[str, Any], labels, logits) -> np.ndarray:
    """Unreduced losses of a head without a `loss_fn`."""
    assert "loss_fn" not in arguments
    logits = np.asarray(logits, np.float64)
    labels = with_last_axis(np.asarray(labels, np.float64), logits)
    if kind == "RegressionHead":
        return (labels - logits) ** 2
    if kind == "PoissonRegressionHead":
        y = np.where(labels > 1, labels, 1)
        stirling = np.where(labels > 1, y * np.log(y) - y + np.log(2 * np.pi * y) / 2, 0)
        return np.exp(logits) - labels * logits + stirling * arguments.get("compute_full_loss", True)
    if kind == "MultiClassHead":
        chosen = np.take_along_axis(logits, labels.astype(int), axis=-1)
        return np.logaddexp.reduce(logits, axis=-1, keepdims=True) - chosen
    return cross_entropy(labels, logits).mean(axis=-1, keepdims=True)


def head_losses(head: dict[str, Any], batches: Sequence[tuple[Any, Any, Any]]) -> dict[str, np.ndarray]:
    """By the name of each head: the loss of all data, and the mean of the batches' losses.

    `head` is as `loader.outline` writes it; a batch is labels, logits and features.
    """
    if "heads" in head:
        named: dict[str, np.ndarray] = {}
        both, start = np.zeros(2), 0
        for weight, part in zip(head["weights"], head["heads"], strict=True):
            name, columns = part["name"], slice(start, start := start + part["size"])
            own = [
                (labels[name], logits[name] if isinstance(logits, dict) else logits[..., columns], features)
                for labels, logits, features in batches
            ]
            named |= head_losses(part, own)
            both = both + weight * named[name]
        return {head["name"]: both} | named  # the only head of a MultiHead has its name
    arguments, sums, counts = head["kwargs"], [], []
    for labels, logits, features in batches:
        each, weights = losses(head["head"], arguments, labels, logits), np.ones(())
        if "weight_column" in arguments:
            weights = with_last_axis(np.asarray(features[arguments["weight_column"]], np.float64), each)
        sums.append(np.sum(each * weights))
        counts.append(each.size)
    if arguments.get("loss_reduction") == "sum":
        return {head["name"]: np.asarray([np.sum(sums), np.mean(sums)])}
    return {head["name"]: np.asarray([ratio(np.sum(sums), np.sum(counts)), np.mean(ratio(sums, counts))])}
