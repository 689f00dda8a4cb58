"""Labels and weights of a booster's dataset, as arrays that a head takes."""

import functools
import threading
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.boosting.attaching import Attached, Dataset, have_same_values, read_labels, read_weights
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

    def cut(self, start: int, stop: int) -> "Rows":
        """Takes some rows."""
        return Rows(min(stop, self.n) - start, jax.tree.map(lambda x: x[start:stop], self.batch))


def check_boosted(head: Any, params: Any, metrics: bool) -> None:
    """Refuses a head that needs more than a booster's dataset holds.

    Args:
        head: the head to be boosted.
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


def as_logits(head: Head, predicted: Any) -> np.ndarray:
    """Returns a booster's margins as float32 `[n, logits_dimension]`."""
    margins = np.asarray(predicted)
    if not margins.size:  # a worker without rows
        return np.zeros((0, head.logits_dimension), np.float32)
    logits = np.ascontiguousarray(margins.reshape(len(margins), -1), np.float32)
    if margins.ndim not in (1, 2) or logits.shape[1] != head.logits_dimension:
        raise ValueError(
            f"The booster must give {head.logits_dimension} margins a row for {type(head).__name__}. Given shape "
            f"{margins.shape}. Pass num_target= (XGBoost) or num_class= (LightGBM) to the booster, and an "
            "objective of jh.boosting: a built-in one may hand over predicted classes."
        )
    return logits


class _Kept(NamedTuple):
    """Prepared rows, with copies of the labels and weights that they were prepared from."""

    labels: Any
    weights: Any
    rows: Rows

    @classmethod
    def of(cls, head: Head, labels: Any, weights: Any) -> "_Kept":
        """Prepares rows. Labels and weights are copied, because the booster or the caller owns their memory."""
        rows = prepare(head, labels, weights)
        own = labels if isinstance(labels, Attached) else np.array(labels)
        return cls(own, None if weights is None else np.array(weights), rows)

    def are_of(self, labels: Any, weights: Any) -> bool:
        """Tells whether labels and weights have the same values still."""
        return have_same_values(labels, self.labels) and have_same_values(weights, self.weights)


class RowsCache:
    """Prepared rows, so that labels are checked and encoded once, not in every round.

    Rows of a dataset are kept as long as the dataset lives, and are prepared again when its values change. Of the calls
    by arrays, which scikit-learn's wrappers make, the last few are kept, and found by their values. A copy or a pickle
    is empty.

    Threads may share it, as four estimators share one objective. What a call found is its own from then on: a place in
    a list may belong to another thread's labels a moment later.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._of_datasets: weakref.WeakKeyDictionary[Any, _Kept] = weakref.WeakKeyDictionary()
        self._of_arrays: tuple[_Kept, ...] = ()
        self._calls = 0

    def count_call(self) -> int:
        """Counts a call, and returns how many there were."""
        with self._lock:
            self._calls += 1
            return self._calls

    def __reduce__(self) -> Any:
        return RowsCache, ()

    def read(self, head: Head, first: Any, second: Any, sample_weight: Any) -> tuple[Rows, np.ndarray]:
        """Reads a call of a booster: the rows, prepared, and the margins as logits.

        Args:
            head: unbound.
            first, second, sample_weight: margins and a DMatrix or Dataset; or, from scikit-learn's wrappers, labels,
                margins and weights.
        """
        if isinstance(second, Dataset):
            predicted, rows = first, self._find_rows(head, second)
        else:
            weights = None if sample_weight is None else np.asarray(sample_weight)
            predicted, rows = second, self._find_rows_of_arrays(head, np.asarray(first), weights)
        logits = as_logits(head, predicted)
        if rows.n != len(logits):
            raise ValueError(
                f"There are {rows.n} labels for {len(logits)} margins. Give the dataset its labels, label=..., or "
                "attach them, jh.boosting.with_labels(dataset, labels); a slice of it needs a slice of them."
            )
        return rows, logits

    def _find_rows(self, head: Head, dataset: Dataset) -> Rows:
        labels, weights = read_labels(dataset), read_weights(dataset)
        with self._lock:
            kept = self._of_datasets.get(dataset)
        if kept is None or not kept.are_of(labels, weights):
            kept = _Kept.of(head, labels, weights)
            with self._lock:
                self._of_datasets[dataset] = kept
        return kept.rows

    def _find_rows_of_arrays(self, head: Head, labels: np.ndarray, weights: np.ndarray | None) -> Rows:
        kept = next((kept for kept in self._of_arrays if kept.are_of(labels, weights)), None)
        kept = _Kept.of(head, labels, weights) if kept is None else kept
        with self._lock:
            others = [other for other in self._of_arrays if other is not kept]
            self._of_arrays = (*others[1 - KEPT :], kept)
        return kept.rows


def prepare(head: Head, labels: Any, weights: Any) -> Rows:
    """Checks and encodes the labels and weights of a dataset."""
    where = None
    if isinstance(labels, Attached):
        labels, where = labels.labels, labels.where
    else:
        labels = _read_column(head, labels)
    batch = gather(head, Given(labels, weights=weights, where=where, check=True))
    leaf = batch
    while leaf.parts is not None:
        leaf = next(iter(leaf.parts.values()))
    # Copies, on the device: boosters may hand out a view of memory that they free.
    return Rows(len(jax.tree.leaves(leaf.labels)[0]), jax.tree.map(jnp.array, batch))


def find_live(head: Head, batch: Batch) -> np.ndarray:
    """Tells which elements count, of a batch on the host: their label exists, and their weight is not 0.

    Returns:
        bool `[n, 1]` or `[n, d]`; for a head with heads inside `[n, 1]`, whether any of them keeps the row. A head
        that counts for nothing keeps none.
    """
    if batch.parts is not None:
        parts = {name: part for name, part in trees.parts_of(head, batch).items() if name not in head.silent}
        kept = [live.any(-1, keepdims=True) for live in trees.each(head, find_live, parts).values()]
        return functools.reduce(np.logical_or, kept, np.zeros((1, 1), bool))
    live: Any = np.ones((len(jax.tree.leaves(batch.labels)[0]), 1), bool)
    for factor in (*batch.where, batch.weights, batch.scale):
        if factor is not None:
            live = live & (np.asarray(factor) != 0)
    return live


def list_seen(labels: Any, live: np.ndarray) -> list[np.ndarray]:
    """Lists the labels that count, of one array of labels on the host, column by column."""
    columns = np.asarray(labels).reshape(len(live), -1)
    live = live if live.shape[-1] in (1, columns.shape[-1]) else np.any(live, -1, keepdims=True)
    live = np.broadcast_to(live, columns.shape)
    return [columns[live[:, i], i] for i in range(columns.shape[-1])]


def have_variety(head: Head, batch: Batch) -> bool:
    """Tells whether any label differs between two rows that count, of a batch on the host."""
    if batch.parts is not None:
        return any(trees.each(head, have_variety, trees.parts_of(head, batch)).values())
    live = find_live(head, batch)
    return any((x != x[:1]).any() for labels in jax.tree.leaves(batch.labels) for x in list_seen(labels, live))


def _read_column(head: Head, labels: Any) -> np.ndarray:
    """Returns a dataset's column of labels as the head takes them. Boosters keep all labels as float32."""
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
