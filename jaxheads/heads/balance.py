"""Class weights from the labels of a data set, on the host."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxheads.numerics import brief, inputs
from jaxheads.numerics import labels as rules
from jaxheads.numerics import vocabulary as names


def balanced_class_weights(
    labels: Any, vocabulary: Sequence[str] | int, weights: Any = None, where: Any = None
) -> tuple[float, ...]:
    """Returns the class weights with which each class has the same part in the loss: `class_weights=` of a head.

    `w_k = sum(a) / (n sum(a [y = k]))` for n classes, weights a, and labels y. They are computed in float64.

    Args:
        labels: class ids or names, `[...]` or `[..., 1]`, for example of all training rows.
        vocabulary: the names of the classes in the order of their ids, or the number of classes.
        weights: the weight of each row; None for 1.
        where: False for rows that do not count.

    Returns:
        One number for each class.

    Raises:
        ValueError: a label that is no class; a class without a row that counts, whose weight would be infinite.

    Source: `sklearn.utils.class_weight.compute_class_weight("balanced")`.

    >>> import jaxheads as jh
    >>> weights = jh.balanced_class_weights(["ant", "bee", "bee", "bee"], ["ant", "bee"])
    >>> [round(w, 3) for w in weights]
    [2.0, 0.667]
    >>> jh.BinaryClassHead(class_weights=weights, label_vocabulary=["ant", "bee"]).class_weights == weights
    True
    """
    known: tuple[str, ...] | None = None if isinstance(vocabulary, int) else brief.as_names(vocabulary)
    n: Any = vocabulary if known is None else len(known)
    if not inputs.is_integer(n, 2):
        raise ValueError(
            f"vocabulary must be a list of at least two class names, or their number. Given {brief.tell(vocabulary)}."
        )
    names.check(known, n, "function")
    given = np.asarray(inputs.as_array(labels, "labels", names=known is not None))
    if given.ndim > 1 and given.shape[-1] == n and given.dtype.kind in "biuf" and np.isin(given, (0, 1)).all():
        raise ValueError(
            f"labels must be class ids or names. Given an array {list(given.shape)} of 0 and 1, which reads as one-hot "
            "or multi-hot rows. Pass labels.argmax(-1); of ids that are meant so, labels.ravel()."
        )
    labels = given.astype(np.int32) if given.dtype == np.bool_ else labels
    ids = np.asarray(
        rules.encode(rules.LabelSpec(1, "int", 0, n - 1), labels, where, known, lambda x: x), np.int64
    ).reshape(-1)
    counts = np.ones(ids.size) if weights is None else np.asarray(inputs.as_array(weights, "weights"), np.float64)
    counts = counts.reshape(-1)
    if where is not None:
        counts = np.where(np.asarray(inputs.as_where(where, (ids.size,))).reshape(-1) != 0, counts, 0)
    if counts.shape != ids.shape or not (np.isfinite(counts) & (counts >= 0)).all():
        raise ValueError(
            f"weights must be one finite number of at least 0 for each of {ids.size} labels. Given "
            f"{brief.tell(weights)}."
        )
    inside = (ids >= 0) & (ids < n)
    totals = np.bincount(ids[inside], counts[inside], n)
    if missing := [k for k in range(n) if totals[k] == 0]:
        shown = missing if known is None else [known[k] for k in missing]
        raise ValueError(
            f"A class without rows has no balanced weight. Given no row of {brief.tell(shown)}. Write the "
            "weights by hand: class_weights={class: weight}, in which classes that are left out weigh 1."
        )
    return tuple((totals.sum() / (n * totals)).tolist())
