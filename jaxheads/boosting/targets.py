"""Labels as scikit-learn's users have them, and what a head makes of its logits, in their words."""

import warnings
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import assert_all_finite, check_consistent_length, column_or_1d

from jaxheads.compose import GlobalObjectiveHead, MultiHead
from jaxheads.head import Head
from jaxheads.heads import BinaryClassHead, MultiClassHead, MultiLabelHead
from jaxheads.numerics.labels import LabelSpec

ClassHead: TypeAlias = BinaryClassHead | MultiClassHead
CLASS_HEADS = (BinaryClassHead, MultiClassHead)


def keys_of(head: Head) -> tuple[str, ...]:
    """The prediction keys of a head."""
    return tuple(head.outputs(jnp.zeros((1, head.logits_dimension))))


def base_of(head: Head) -> Any:
    """The head that says what labels and classes are."""
    return head.base if isinstance(head, GlobalObjectiveHead) else head


def kind_of(head: Head) -> str | None:
    """`"classifier"`, `"regressor"`, or None for what scikit-learn has no word for."""
    if isinstance(head, MultiHead):
        return None
    if isinstance(base_of(head), (*CLASS_HEADS, MultiLabelHead)):
        return "classifier"
    return "regressor" if "predictions" in keys_of(head) and isinstance(head.label_spec, LabelSpec) else None


def learn_classes(head: ClassHead, y: Any, where: Any) -> tuple[np.ndarray, bool]:
    """The classes behind a head's ids, and whether labels are given as shares (soft labels) rather than as classes.

    0 ... n - 1, if labels are such ids; else those of the vocabulary, else the different labels in order.
    """
    n = len(head.class_names())
    y = column_or_1d(y)
    if where is not None:
        check_consistent_length(y, where)
        y = y[column_or_1d(where).astype(bool)]
    if y.dtype == np.bool_ and n == 2:
        return np.array([False, True]), False
    if _are_ids(y, n):
        if y.min() > 0:
            warnings.warn(
                f"Labels from {y.min()} to {y.max()} of {n} classes are taken for ids of 0 ... {n - 1}, the first of "
                "which is not among these rows. If they are meant to count from 1, subtract 1.",
                stacklevel=4,
            )
        return np.arange(n, dtype=y.dtype), False
    is_soft = False
    if y.dtype.kind == "f" and isinstance(head, BinaryClassHead):
        assert_all_finite(y, input_name="y")
        is_soft = bool(y.size and y.min() >= 0 and y.max() <= 1)  # ids are gone by now
    if head.label_vocabulary is not None:
        return np.asarray(head.label_vocabulary), is_soft
    if is_soft:
        return np.arange(2), True
    check_classification_targets(y)
    classes = np.unique(y)
    if len(classes) != n:
        only = "Only binary classification is supported: " if n == 2 else ""
        raise ValueError(
            f"{only}{type(head).__name__} has {n} classes. Given labels of {len(classes)} classes: "
            f"{classes[:10].tolist()}. Build the head for as many; if some class is not among these rows, give it a "
            f"label_vocabulary, or the labels as ids 0 ... {n - 1}."
        )
    return classes, False


def _are_ids(y: np.ndarray, n: int) -> bool:
    """Whether labels are whole numbers of 0 ... n - 1, floats too."""
    return y.dtype.kind in "iuf" and y.size > 0 and bool(np.isin(y, np.arange(n)).all())


def encode(head: Head, y: Any, where: Any, classes: np.ndarray | None, soft: bool) -> Any:
    """Labels as the head takes them."""
    head = base_of(head)
    if y is None:
        raise ValueError("This estimator requires y to be passed, but the target y is None.")
    if isinstance(head, MultiHead) or not isinstance(head.label_spec, LabelSpec):
        return head.encode_labels(y, where)
    if head.label_spec.size == 1:
        y = column_or_1d(y, warn=True)
        if where is None and y.dtype.kind == "f":
            assert_all_finite(y, input_name="y")
        if y.dtype == object and not isinstance(head, CLASS_HEADS):
            y = _numbers(y)
    if isinstance(head, CLASS_HEADS) and classes is not None and not soft:
        # Names of a vocabulary are its own business, in fit or later.
        by_name = any(x.dtype.kind in "USO" for x in (y, classes))
        if head.label_vocabulary is None or not by_name:
            return _class_ids(y, where, classes)
    return head.encode_labels(y, where)


def _numbers(y: np.ndarray) -> np.ndarray:
    try:
        return y.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Unknown label type: y must be numbers. Given objects such as {y[0]!r}.") from error


def _class_ids(y: np.ndarray, where: Any, classes: np.ndarray) -> np.ndarray:
    ids = np.clip(np.searchsorted(classes, y), 0, len(classes) - 1)
    unknown = classes[ids] != y
    if where is not None:
        unknown &= np.asarray(where).reshape(unknown.shape).astype(bool)
    if unknown.any():
        strangers = np.unique(np.asarray(y)[unknown])[:10].tolist()
        raise ValueError(
            f"y holds classes that were not there in fit: {strangers}. The classes are {classes.tolist()}."
        )
    return ids.astype(np.int32)


def predicted(head: Head, logits: np.ndarray, classes: np.ndarray | None) -> Any:
    """What a scikit-learn user calls the prediction: a class, labels that are there, a number; by head of several."""
    head = base_of(head)
    if isinstance(head, MultiHead):
        split = head._split(logits, [str(inner.name) for inner in head.heads])
        return {str(inner.name): predicted(inner, split[str(inner.name)], None) for inner in head.heads}
    if isinstance(head, MultiLabelHead):
        return (logits > 0).astype(np.int32)
    keys = keys_of(head)
    key = next((key for key in ("class_ids", "predictions") if key in keys), keys[0])
    values = np.asarray(head.predictions(logits, key)[key])
    values = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    if key != "class_ids":
        return values
    names = getattr(head, "label_vocabulary", None)
    classes = np.asarray(names) if classes is None and names else classes
    return values if classes is None else classes[values]


def score(head: Head, logits: np.ndarray, labels: Any, weights: Any, where: Any) -> float:
    """What a scikit-learn user calls the score: accuracy, R2, or the loss, negative."""
    base, kind = base_of(head), kind_of(head)
    if kind is None:
        return -float(head.loss(labels, logits, weights=weights, where=where))
    there = slice(None) if where is None else np.asarray(where).reshape(-1).astype(bool)
    labels, logits, weights = np.asarray(labels)[there], logits[there], None if weights is None else weights[there]
    if isinstance(base, CLASS_HEADS):
        ids = np.asarray(base.predictions(logits, "class_ids")["class_ids"])[:, 0]
        # A soft label is the share of positives.
        labels = labels.reshape(ids.shape)
        right = 1 - np.abs(labels - ids) if labels.dtype.kind == "f" else labels == ids
        return float(np.average(right, weights=weights))
    measure = accuracy_score if kind == "classifier" else r2_score
    return float(measure(labels, predicted(head, logits, None), sample_weight=weights))


def on_host(predictions: Mapping[str, Any]) -> dict[str, Any]:
    """Predictions as NumPy arrays."""
    return jax.tree.map(np.asarray, dict(predictions))
