"""Labels, predictions and scores as users of scikit-learn know them, from those of a head and back."""

import warnings
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from sklearn.metrics import r2_score
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import assert_all_finite, column_or_1d

from jaxheads.contract import Given
from jaxheads.head import Head
from jaxheads.heads import BinaryClassHead, MultiClassHead, MultiLabelHead, scoring
from jaxheads.heads.multi_class import DISTRIBUTIONS
from jaxheads.numerics import inputs
from jaxheads.numerics.labels import LabelSpec

ClassHead: TypeAlias = BinaryClassHead | MultiClassHead
CLASS_HEADS = (BinaryClassHead, MultiClassHead)


def list_keys(head: Head) -> tuple[str, ...]:
    """Returns the prediction keys of a head."""
    return tuple(head.outputs(jnp.zeros((1, head.logits_dimension))))


def find_base(head: Head) -> Any:
    """Returns the head that decides which labels and classes there are."""
    return head if head.wrapped is None else head.wrapped


def tell_kind(head: Head) -> str | None:
    """Returns `"classifier"`, `"regressor"`, or None for a head that scikit-learn has no word for."""
    if head.parts():
        return None
    if isinstance(find_base(head), (*CLASS_HEADS, MultiLabelHead)):
        return "classifier"
    return "regressor" if "predictions" in list_keys(head) and isinstance(head.label_spec, LabelSpec) else None


def _has_columns(head: Head) -> bool:
    """Tells whether labels have a column for each class."""
    return isinstance(head, MultiLabelHead) or (isinstance(head, MultiClassHead) and head.label_kind == DISTRIBUTIONS)


class Classes(NamedTuple):
    """The classes that a classifier has found among its labels.

    Attributes:
        names: the classes, in the head's order; None where labels have columns.
        order: the head's ids (or columns), in the order of `classes_`.
    """

    names: np.ndarray | None
    order: np.ndarray

    @classmethod
    def of(cls, head: Head, y: Any, where: Any) -> "Classes | None":
        """Finds the classes of the labels that exist; None for a head that is no classifier."""
        head = find_base(head)
        if _has_columns(head):
            return cls(None, np.arange(head.logits_dimension))
        if not isinstance(head, CLASS_HEADS) or y is None:
            return None
        names = _find_names(head, y, where)
        # Scorers of scikit-learn assume that classes are sorted.
        return cls(names, np.argsort(names))

    def sort(self, head: Head) -> np.ndarray:
        """Returns the classes in the order of scikit-learn's `classes_`."""
        if self.names is None:
            return np.asarray(find_base(head).label_vocabulary or self.order)
        return self.names[self.order]


def _find_names(head: ClassHead, y: Any, where: Any) -> np.ndarray:
    """Finds the classes behind a head's ids.

    These are 0 ... n - 1 if labels are such ids or shares; else the vocabulary; else the different labels, sorted.
    """
    n, y = len(head.class_names()), column_or_1d(y)
    y = _convert_objects(y if where is None else y[where])
    if y.dtype == np.bool_ and n == 2:
        return np.array([False, True])
    if _are_ids(y, n):
        if y.min() > 0:
            warnings.warn(
                f"Labels from {y.min()} to {y.max()} of {n} classes are taken for ids of 0 ... {n - 1}, the first of "
                "which is not among these rows. If they are meant to count from 1, subtract 1.",
                stacklevel=4,
            )
        return np.arange(n, dtype=y.dtype)
    if y.dtype.kind == "f" and isinstance(head, BinaryClassHead):
        assert_all_finite(y, input_name="y")
    if head.label_vocabulary is not None:
        return np.asarray(head.label_vocabulary)
    if _are_shares(head, y):
        return np.arange(2)
    check_classification_targets(y)
    classes = np.unique(y)
    if len(classes) != n:
        only = "Only binary classification is supported: " if n == 2 else ""
        raise ValueError(
            f"{only}{type(head).__name__} has {n} classes. Given labels of {len(classes)} classes: "
            f"{classes[:10].tolist()}. Build the head for as many; if some class is not among these rows, give it a "
            f"label_vocabulary, or the labels as ids 0 ... {n - 1}."
        )
    return classes


def read_mask(where: Any, n: int) -> np.ndarray | None:
    """Returns which labels of one column exist, bool `[n]`."""
    if where is None:
        return None
    given = np.asarray(inputs.as_where(where, (n,)))
    inputs.check_where(given, np.ones(given.shape, bool), "where")
    return given[:, 0].astype(bool)


def _convert_objects(y: np.ndarray) -> np.ndarray:
    """Converts objects that are all numbers, or all truth values, to an array of these."""
    if y.dtype != object:
        return y
    found = np.array(y.tolist())
    return found if found.dtype.kind in "biu" and found.shape == y.shape else y


def _are_ids(y: np.ndarray, n: int) -> bool:
    """Tells whether labels are whole numbers of 0 ... n - 1, also as floats."""
    return y.dtype.kind in "iuf" and y.size > 0 and bool(np.isin(y, np.arange(n)).all())


def _are_shares(head: ClassHead, y: np.ndarray) -> bool:
    """Tells whether labels are soft: shares of positives, at least one of them neither 0 nor 1."""
    if y.dtype.kind != "f" or not isinstance(head, BinaryClassHead) or not y.size or _are_ids(y, 2):
        return False
    return bool(((y >= 0) & (y <= 1)).all())


def encode(head: Head, y: Any, where: Any, classes: Classes | None) -> Any:
    """Encodes labels as the head takes them."""
    head = find_base(head)
    if y is None:
        raise ValueError("This estimator requires y to be passed, but the target y is None.")
    if not isinstance(head.label_spec, LabelSpec):
        return head.encode_labels(y, where)
    if head.label_spec.size == 1:
        y = column_or_1d(y, warn=True)
        if where is None and y.dtype.kind == "f":
            assert_all_finite(y, input_name="y")
        if y.dtype == object and not isinstance(head, CLASS_HEADS):
            y = _convert_numbers(y)
    if isinstance(head, CLASS_HEADS) and classes is not None and classes.names is not None:
        return _encode_classes(head, y, where, classes.names)
    return head.encode_labels(y, where)


def _encode_classes(head: ClassHead, y: np.ndarray, where: Any, names: np.ndarray) -> np.ndarray:
    """Encodes labels as ids of classes, or as shares; 0 in rows without a label."""
    there = np.ones(len(y), bool) if where is None else where
    known = _convert_objects(y[there])
    are_names = head.label_vocabulary is not None and names.dtype.kind == "U"
    if _are_shares(head, known) and (are_names or names.dtype.kind == "b" or _are_ids(names, 2)):
        return np.where(there, y, 0).astype(np.float32)
    # The head encodes the names of its vocabulary itself, in fit and later.
    if head.label_vocabulary is not None and (are_names or known.dtype.kind in "USO"):
        return head.encode_labels(y, where)
    ids = np.zeros(len(y), np.int32)
    ids[there] = _find_ids(known, names)
    return ids


def _find_ids(y: np.ndarray, classes: np.ndarray) -> np.ndarray:
    if (y.dtype.kind in "USO") != (classes.dtype.kind in "USO"):
        ids, unknown = np.zeros(len(y), int), np.ones(len(y), bool)
    else:
        ids = np.clip(np.searchsorted(classes, y), 0, len(classes) - 1)
        unknown = classes[ids] != y
    if unknown.any():
        strangers = list(dict.fromkeys(y[unknown].tolist()))[:10]
        raise ValueError(
            f"y holds classes that were not there in fit: {strangers}. The classes are {classes.tolist()}."
        )
    return ids


def _convert_numbers(y: np.ndarray) -> np.ndarray:
    try:
        return y.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Unknown label type: y must be numbers. Given objects such as {y[0]!r}.") from error


def predict(head: Head, logits: np.ndarray, classes: Classes | None) -> Any:
    """Predicts as scikit-learn does: classes, columns of 0 and 1, or numbers; a dict by head for several heads."""
    head = find_base(head)
    if parts := head.parts():
        routed = head.route(Given(logits=logits))
        return {name: predict(inner, np.asarray(routed[name].logits), None) for name, inner in parts.items()}
    if isinstance(head, MultiLabelHead):
        return np.asarray(scoring.decide(logits, head.decision_threshold))
    keys = list_keys(head)
    key = next((key for key in ("class_ids", "predictions") if key in keys), keys[0])
    values = np.asarray(head.predictions(logits, key)[key])
    values = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    if key != "class_ids":
        return values
    names = None if classes is None else classes.names
    names = np.asarray(head.vocabulary) if names is None and head.vocabulary else names
    return values if names is None else names[values]


def score(head: Head, logits: np.ndarray, labels: Any, weights: Any, where: Any) -> float:
    """Scores as scikit-learn does: by accuracy or R2, and any other head by its negative loss."""
    base, kind = find_base(head), tell_kind(head)
    if kind is None:
        return -float(head.loss(labels, logits, weights=weights, where=where))
    there = np.ones(len(logits), bool) if where is None else where
    weights = np.ones(len(logits)) if weights is None else weights
    if not weights[there].any():
        return float("nan")
    labels, logits, weights = np.asarray(labels)[there], logits[there], weights[there]
    if kind == "regressor":
        return float(r2_score(labels, predict(head, logits, None), sample_weight=weights))
    labels = labels.reshape(len(labels), -1)
    if isinstance(base, MultiClassHead):
        predicted = np.asarray(base.predictions(logits, "class_ids")["class_ids"])
        # A distribution counts by its share of the predicted class.
        right = np.take_along_axis(labels, predicted, -1) if _has_columns(base) else labels == predicted
    else:
        # A soft label is the share of positives.
        decided = np.asarray(scoring.decide(logits, getattr(base, "decision_threshold", None)))
        right = 1 - np.abs(labels.astype(np.float64) - decided)
    return float(np.average(right.prod(-1), weights=weights))
