"""Labels and weights of a booster's dataset, as arrays that a head takes."""

import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.boosting.attaching import Attached, Dataset, Holder
from jaxheads.contract import Given
from jaxheads.engine import trees
from jaxheads.engine.gathering import gather
from jaxheads.engine.readiness import ready
from jaxheads.head import Head, check_unbound
from jaxheads.numerics.batch import Batch
from jaxheads.numerics.labels import LabelSpec

KEPT = 8  # calls by arrays, which have no dataset to remember them by


class Rows(NamedTuple):
    """All rows of a dataset, checked and encoded, without logits.

    Attributes:
        n: how many.
        batch: their labels, weights and masks.
    """

    n: int
    batch: Batch

    def part(self, start: int, stop: int) -> "Rows":
        """Some rows."""
        return Rows(min(stop, self.n) - start, jax.tree.map(lambda x: x[start:stop], self.batch))


def check_boosted(head: Any, params: Any, metrics: bool) -> None:
    """Refuses a head that needs more than what a booster's dataset holds.

    Args:
        head: what is to be boosted.
        params: its learned and running fields, or None.
        metrics: whether its metrics are asked for too.
    """
    check_unbound(head)
    if "" in head.parts():
        raise ValueError(
            f"A booster has one row of logits an example. Given a {type(head).__name__}: use its inner head."
        )
    for inner in trees.leaves(head):
        if inner.weight_column is not None:
            raise ValueError(
                f"The booster's dataset holds the weights: xgboost.DMatrix(weight=...), lightgbm.Dataset(weight=...), "
                f"sample_weight=. Given a head with weight_column={inner.weight_column!r}; build it without."
            )
        if inner.reads_features or inner.reads_slices:
            raise ValueError(
                f"A booster's dataset gives no features, which a loss_fn or group_rate would read. Given {inner!r}. "
                "Leave them out of it."
            )
        if metrics and (inner.slices is not None or inner.bootstrap is not None):
            raise ValueError(
                f"The metrics of a booster's log have no slices and no bootstrap. Given {inner!r}. Measure the "
                "margins that the booster predicts by such a head afterwards: head.measure(labels, margins, features)."
            )
    ready(head, params)


def as_logits(head: Head, predicted: Any, what: str) -> np.ndarray:
    """A booster's margins as float32 `[n, logits_dimension]`."""
    margins = np.asarray(predicted)
    if not margins.size:  # a worker without rows
        return np.zeros((0, head.logits_dimension), np.float32)
    logits = np.ascontiguousarray(margins.reshape(len(margins), -1), np.float32)
    if margins.ndim not in (1, 2) or logits.shape[1] != head.logits_dimension:
        raise ValueError(
            f"{what} must give {head.logits_dimension} margins a row for {type(head).__name__}. Given shape "
            f"{margins.shape}. Pass num_class={head.logits_dimension} (XGBoost: or num_target) to the booster, and an "
            "objective of jh.boosting: a built-in one may hand over predicted classes."
        )
    return logits


class _Kept(NamedTuple):
    """Rows, and what they were prepared from."""

    labels: Any
    weights: Any
    rows: Rows

    @classmethod
    def of(cls, head: Head, labels: Any, weights: Any) -> "_Kept":
        """Prepared now. What is kept is copied: the memory is the booster's or the caller's."""
        rows = prepare(head, labels, weights)
        own = labels if isinstance(labels, Attached) else np.array(labels)
        return cls(own, None if weights is None else np.array(weights), rows)

    def are_of(self, labels: Any, weights: Any) -> bool:
        """Whether the values are the same."""
        return _same(labels, self.labels) and _same(weights, self.weights)


class RowsCache:
    """Rows as they were prepared, so that labels are checked and encoded once, not in every round.

    Kept as long as their dataset is, and prepared again if it has other values since; of calls by arrays, as from
    scikit-learn's wrappers, the last few, found by values. Copied or pickled it is empty.
    """

    def __init__(self):
        self._of_datasets: weakref.WeakKeyDictionary[Any, _Kept] = weakref.WeakKeyDictionary()
        self._of_arrays: list[_Kept] = []

    def __reduce__(self) -> Any:
        return RowsCache, ()

    def rows(self, head: Head, labels: Any, weights: Any, dataset: Any) -> Rows:
        """The rows of labels (an array, or `Attached`) under weights, which a dataset holds; or None does."""
        if dataset is not None:
            kept = self._of_datasets.get(dataset)
            if kept is None or not kept.are_of(labels, weights):
                kept = self._of_datasets[dataset] = _Kept.of(head, labels, weights)
            return kept.rows
        known = [i for i, kept in enumerate(self._of_arrays) if kept.are_of(labels, weights)]
        kept = self._of_arrays.pop(known[0]) if known else _Kept.of(head, labels, weights)
        self._of_arrays = [*self._of_arrays[1 - KEPT :], kept]
        return kept.rows


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)) or a.dtype != b.dtype:
        return False
    # To look for NaN takes three times as long, and there is seldom one.
    return np.array_equal(a, b) or (a.dtype.kind == "f" and np.array_equal(a, b, equal_nan=True))


def of_dataset(dataset: Dataset) -> tuple[Any, Any]:
    """Labels (those of `with_labels` first) and weights of a DMatrix or Dataset."""
    weights = dataset.get_weight()
    weights = None if weights is None or np.size(weights) == 0 else np.asarray(weights)
    return dataset.jaxheads_labels if isinstance(dataset, Holder) else dataset.get_label(), weights


def prepare(head: Head, labels: Any, weights: Any) -> Rows:
    """Checks and encodes what a dataset holds, once."""
    where = None
    if isinstance(labels, Attached):
        labels, where = labels
    else:
        labels = _from_floats(head, labels)
    batch = gather(head, Given(labels, weights=weights, where=where, check=True))
    # Copies, on the device: what boosters hand out may be a view of memory that they free.
    return Rows(_length(batch), jax.tree.map(jnp.array, batch))


def _length(batch: Batch) -> int:
    """The number of rows."""
    while batch.parts is not None:
        batch = next(iter(batch.parts.values()))
    return len(jax.tree.leaves(batch.labels)[0])


def _from_floats(head: Head, labels: Any) -> np.ndarray:
    """A dataset's column of labels as the head takes them: boosters keep all labels as float32."""
    labels, spec = np.asarray(labels), head.label_spec
    if not isinstance(spec, LabelSpec):
        raise ValueError(
            f"{type(head).__name__} takes a dict of labels, {sorted(spec)}, which a booster's dataset cannot hold. "
            "Attach them: jh.boosting.with_labels(dataset, labels)."
        )
    if spec.kind != "float" and labels.dtype.kind == "f":
        if (labels != np.rint(labels)).any():
            bad = labels[labels != np.rint(labels)][0]
            raise ValueError(f"labels of {type(head).__name__} must be {spec.describe()}. Given {bad}.")
        labels = labels.astype(np.int32)
    return labels.reshape(-1, spec.size) if spec.size and spec.size > 1 else labels
