"""The comparison of two models, by the differences of paired bootstrap replicas."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxheads.metrics.base import join_names
from jaxheads.metrics.reading import find_middle, take_quantile
from jaxheads.numerics import brief
from jaxheads.numerics.describing import describe

# A table in a notebook shows so many rows.
SHOWN = 50
# Sums of the same weights in another order differ by less, relative to the sum. Draws of other keys differ by more:
# sums of n Poisson numbers by about sqrt(2 / n), so by 4e-5 even for a billion rows.
SAME_WEIGHT = 1e-5
# Histograms round more where a chip adds them up in bfloat16.
SAME_POSITIVES = 1e-4
# Means of the same labels differ by less than this part of the spread of the replicas, or of the mean.
SAME_SPREAD, SAME_MEAN = 1e-2, 1e-6

Key = tuple[str, str | None]


class Comparison(dict[str, Any]):
    """The differences of two models' metrics, `a.compare(b)`: a dict of columns that `pandas.DataFrame` takes.

    One row is one metric of all data, or of one slice. The columns:

    * `metric`, and with slices `slice`: its name, None for all data.
    * `a`, `b`, `difference`: the values of both models, and a - b.
    * `ci_lower`, `ci_upper`: the middle `confidence` of the replicas' differences (the percentile interval).
    * `share_above_zero`: the share of replicas in which a is above b. A replica in which both are equal counts half.

    Numbers are float32, and NaN where one of the models has no value.

    Attributes:
        confidence: the share of replicas inside of an interval.
        replicas: the number of replicas.
    """

    def __init__(self, columns: Mapping[str, Any], confidence: float, replicas: int):
        super().__init__(columns)
        self.confidence, self.replicas = confidence, replicas

    def find(self, metric: str, slice: Any = None) -> dict[str, Any]:
        """Returns the row of a metric, as a dict; of all data, or of the slice with this name or number.

        Raises:
            ValueError: there is no such row.
        """
        slices = self.get("slice", [None] * len(self["metric"]))
        for i, row in enumerate(zip(self["metric"], slices, strict=True)):
            if row == (metric, slice):
                return {name: column[i] for name, column in self.items()}
        raise ValueError(
            f"This comparison has no metric {brief.tell(metric)} with slice={brief.tell(slice)}. It has the metrics "
            f"{brief.tell_names(set(self['metric']))}, and the slices {brief.tell_names(set(slices) - {None})}."
        )

    def __repr__(self) -> str:
        title = f"Comparison a - b: intervals of {self.confidence:g} from {self.replicas} paired replicas"
        columns = [
            [name, *(f"{x:.6g}" if isinstance(x, np.floating) else str(x) for x in column[:SHOWN])]
            for name, column in self.items()
        ]
        widths = [max(map(len, column)) for column in columns]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*columns, strict=True)]
        more = len(self["metric"]) - SHOWN
        return "\n  ".join([title, *lines, *([f"... and {more} rows more"] if more > 0 else [])])


def check_comparable(a: Any, b: Any) -> None:
    """Refuses two heads whose metrics of equal names mean different things. Both have replicas."""
    kinds = _list_kinds(a), _list_kinds(b)
    if kinds[0] != kinds[1]:
        differing = next(
            (pair for pair in zip(*kinds, strict=False) if pair[0] != pair[1]), (len(kinds[0]), len(kinds[1]))
        )
        raise ValueError(
            "compare() needs two heads of one kind, with the same labels and classes. Given "
            f"{brief.cut(str(differing[0]), 120)} and {brief.cut(str(differing[1]), 120)}."
        )
    if a.bootstrap != b.bootstrap:
        raise ValueError(
            "compare() pairs replicas, so both heads need as many. Given "
            f"{a.bootstrap.replicas} and {b.bootstrap.replicas}."
        )
    groups = [None if x.slices is None else (x.slices.n, x.slices.names, x.slices.min_count) for x in (a, b)]
    if groups[0] != groups[1]:
        raise ValueError(
            "compare() needs two heads with the same slices: their number, names and min_count. Given "
            f"{brief.cut(repr(a.slices), 120)} and {brief.cut(repr(b.slices), 120)}."
        )


def check_same_names(a: Mapping[Key, Any], b: Mapping[Key, Any]) -> None:
    """Refuses values of which one model has some that the other has not."""
    left, right = ({join_names(*key) for key in values} for values in (a, b))
    if left != right:
        ours, theirs = (brief.tell_names(names, brief.VALUES) for names in (left - right, right - left))
        raise ValueError(
            f"compare() needs two heads with the same metrics. Only the left one has {ours}, only the right one "
            f"{theirs}. Give both the same name and the same with_metrics(...)."
        )


def check_same_rows(a: Mapping[Any, Any], b: Mapping[Any, Any]) -> None:
    """Refuses weights `[1 + replicas, ...]` of other rows, or of other draws. Both have the same keys."""
    for key, left in a.items():
        right = b[key]
        differ = np.abs(left - right) > SAME_WEIGHT * np.maximum(np.abs(left), np.abs(right))
        if np.any(differ[0]):
            at = np.unravel_index(np.argmax(differ[0]), differ[0].shape)
            raise ValueError(
                "compare() needs the metrics of two models on the same rows. Given rows whose weights add up to "
                f"{left[0][at]:g} and {right[0][at]:g}. Give both models the same labels, weights, masks and slices."
            )
        if np.any(differ):
            raise ValueError(_tell_of_keys("the weights of the replicas differ"))


def check_same_positives(a: Mapping[Any, Any], b: Mapping[Any, Any]) -> None:
    """Refuses weights of positives, or of the labels of classes, that tell of other labels or another order."""
    for key in a.keys() & b.keys():
        left, right = a[key], b[key]
        if np.any(np.abs(left - right) > SAME_POSITIVES * np.maximum(np.abs(left), np.abs(right))):
            raise ValueError(_tell_of_keys("the weights of the replicas' labels differ"))


def check_same_labels(a: Mapping[Key, Any], b: Mapping[Key, Any]) -> None:
    """Refuses means of labels `[1 + replicas, ...]` that tell of other labels, or of labels in another order."""
    for key in a:
        if key[0] != "label/mean":
            continue
        left, right = a[key], b[key]
        both = np.isfinite(left) & np.isfinite(right)
        spread = np.nanmax(np.where(both, left, np.nan)) - np.nanmin(np.where(both, left, np.nan)) if both.any() else 0
        if np.any(np.abs(left - right)[both] > SAME_SPREAD * spread + SAME_MEAN * np.abs(left)[both]):
            raise ValueError(_tell_of_keys("the means of the replicas' labels differ"))


def _tell_of_keys(seen: str) -> str:
    return (
        f"compare() needs paired replicas, and {seen}. The same rows must have been drawn: give both models the same "
        "batches, in the same order, and the same key= for each batch."
    )


def _list_kinds(head: Any) -> list[str]:
    """Returns what the labels of a head, and of each head inside, mean."""
    inner = head.parts()
    if not inner:
        return [f"{type(head).__name__} with labels {describe(head.label_spec)} {head.vocabulary or ''}".rstrip()]
    return [type(head).__name__, *(kind for name, each in inner.items() for kind in [name, *_list_kinds(each)])]


def compare(
    a: Mapping[Key, Any],
    b: Mapping[Key, Any],
    small: Mapping[str | None, Any],
    names: list[Any] | None,
    confidence: float,
    replicas: int,
) -> Comparison:
    """Returns the comparison of values `[1 + replicas, 1 + slices]`; entries 0 are of all data.

    Args:
        a, b: values by key. Metrics that are arrays, such as a confusion matrix, are left out.
        small: which slices are too small for metrics, by the name of a head, and under None for all others.
        names: the names of the slices; None for heads without.
        confidence, replicas: as for `Comparison`.
    """
    rows: list[tuple[Any, ...]] = []
    middles = {key: (find_middle(value), find_middle(b[key])) for key, value in a.items()}
    middles = {key: pair for key, pair in middles.items() if np.ndim(pair[0]) == 2}
    for at, name in enumerate([None, *(names or [])]):
        for key, pair in middles.items():
            left, right = (each[:, at] for each in pair)
            if at and small[key[1] if key[1] in small else None][at - 1]:
                left = right = np.full_like(left, np.nan)
            rows.append((join_names(*key), name, left[0], right[0], *_measure_difference(left - right, confidence)))
    columns = ("metric", "slice", "a", "b", "difference", "ci_lower", "ci_upper", "share_above_zero")
    table: dict[str, Any] = dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
    table = {name: column if name in columns[:2] else np.asarray(column, np.float32) for name, column in table.items()}
    if names is None:
        del table["slice"]
    return Comparison(table, confidence, replicas)


def _measure_difference(differences: Any, confidence: float) -> tuple[Any, ...]:
    """Returns the difference of all data, the ends of its interval, and the share of replicas above zero."""
    whole, each = differences[0], differences[1:]
    defined = ~np.isnan(each)
    if np.isnan(whole) or not defined.any():
        return whole, np.nan, np.nan, np.nan
    ends = (take_quantile(each, q, 0, np) for q in ((1 - confidence) / 2, (1 + confidence) / 2))
    return whole, *ends, np.mean((1 + np.sign(each[defined])) / 2)
