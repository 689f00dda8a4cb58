"""The score histogram: weights of negatives and positives by bucket."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.metrics.base import Observation
from jaxheads.metrics.curves import ScoresView
from jaxheads.metrics.grids import AbstractGrid, Layout, LogitGrid
from jaxheads.numerics import masking
from jaxheads.numerics.histograms import by_label


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores(Observation):
    """A histogram of logits by label, `[2, rows, buckets]`.

    A soft label y counts as weight y positive and 1 - y negative.

    Args:
        labels: float `[..., c]` in [0, 1].
        logits: float `[..., c]`; the entries of the last axis are examples of one histogram (micro average).
        grid: the bins; None for a `LogitGrid`, or for those of whoever shares the histogram.
        thresholds: probabilities that become exact edges.
        columns: which entries of the last axis have a histogram of their own as well; it costs memory alone.
        names: of the entries of the last axis, as they stand in metric keys; by default `class0`, `class1`, ...
    """

    labels: Any
    logits: Any
    grid: AbstractGrid | None = dataclasses.field(metadata={"static": True})
    thresholds: tuple[float, ...] = dataclasses.field(default=(), metadata={"static": True})
    columns: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    names: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def layout(self) -> Layout:
        """The edges of the histogram."""
        return self._bins.layout(self.thresholds)

    @property
    def _bins(self) -> AbstractGrid:
        return LogitGrid() if self.grid is None else self.grid

    @property
    def size(self) -> int:
        """Two sums a bucket and row."""
        return 2 * self._n_rows * self.layout.n_buckets

    @property
    def class_names(self) -> tuple[str, ...]:
        """What stands for each entry of the last axis in metric keys."""
        n = self.logits.shape[-1]
        if self.names and len(self.names) != n:
            raise ValueError(f"Scores need one name for each of {n} entries of the last axis. Given {self.names!r}.")
        return self.names or tuple(f"class{i}" for i in range(n))

    @property
    def _n_rows(self) -> int:
        """The first row is that of all entries without one of their own."""
        return 1 + len(self.columns)

    @property
    def _rows(self) -> list[int] | None:
        """To which row each entry of the last axis goes."""
        if not self.columns:
            return None
        own = {column: row for row, column in enumerate(self.columns, start=1)}
        return [own.get(column, 0) for column in range(jnp.shape(self.logits)[-1])]

    def join(self, other: Observation) -> "Scores":
        """The thresholds and the columns of both, in one histogram."""
        if not isinstance(other, Scores):
            raise ValueError(f"Scores and a {type(other).__name__} are observed under one key. Rename one.")
        grids = {grid for grid in (self.grid, other.grid) if grid is not None}
        if len(grids) > 1:
            raise ValueError(
                f"One histogram serves all metrics of the same scores. Given bins {' and '.join(map(repr, grids))}. "
                "Give them to one metric alone: they serve all."
            )
        return dataclasses.replace(
            self,
            grid=next(iter(grids), None),
            thresholds=tuple(dict.fromkeys(self.thresholds + other.thresholds)),
            columns=tuple(dict.fromkeys(self.columns + other.columns)),
        )

    def reduce(self, weights: jax.Array) -> jax.Array:
        """One pass: the bucket of each element, then its weight, under its label."""
        return by_label(*self._locate_entries(weights), self.layout.n_buckets, self._rows).ravel()

    def reduce_by(self, weights: jax.Array, groups: Any) -> jax.Array:
        """Where groups do not overlap, one pass too: the group is a part of the bucket's number."""
        if groups.ids is None:
            return super().reduce_by(weights, groups)
        buckets, labels, weights = self._locate_entries(weights * (groups.ids >= 0).astype(jnp.float32))
        n = self.layout.n_buckets
        both = by_label(buckets + jnp.maximum(groups.ids, 0) * np.int32(n), labels, weights, groups.n * n, self._rows)
        both = both.reshape(2, self._n_rows, groups.n, n)
        return jnp.moveaxis(both, 2, 0).reshape(groups.n, self.size)

    def _locate_entries(self, weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The bucket, the label and the weight of each element."""
        layout = self.layout
        labels = jnp.asarray(self.labels, jnp.float32)
        # By multiplication, for labels may lie as the rows do, and logits be spread over classes too.
        labels = labels * masking.ones_like(self.logits)
        weights = weights * masking.ones_like(labels)
        # A NaN score has no bucket; it must show, so it makes a NaN of the histogram.
        has_none = jax.lax.ne(self.logits, self.logits) & (weights != 0)
        weights = masking.choose(has_none, self.logits, weights)
        return self._bins.buckets(layout, self.logits), labels, weights

    def read(self, sums: Any, xp: Any, undefined: float) -> "ScoresView":
        """The histogram, with the metrics that it tells."""
        both = sums.reshape((*sums.shape[:-1], 2, self._n_rows, self.layout.n_buckets))
        # The NaN of a score lies in one bucket. Whatever is read must show it, also where that bucket does not count.
        total = both.sum((-3, -1), keepdims=True)
        both = xp.where(xp.isnan(total), total, both)

        def view(negative: Any, positive: Any, *own: Any) -> ScoresView:
            return ScoresView(xp, undefined, self._bins, self.layout, negative, positive, self.class_names, *own)

        if not self.columns:
            return view(both[..., 0, 0, :], both[..., 1, 0, :])
        total, own = both.sum(-2), both[..., 1:, :]
        return view(total[..., 0, :], total[..., 1, :], self.columns, view(own[..., 0, :, :], own[..., 1, :, :]))
