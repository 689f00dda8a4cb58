"""The score histogram: weights of negatives and positives by bucket."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.metrics.base import Observation
from jaxheads.metrics.curves import ScoresView
from jaxheads.metrics.grids import AbstractGrid, Layout
from jaxheads.numerics import masking
from jaxheads.numerics.histograms import histogram


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores(Observation):
    """A histogram of logits by label, `[2, rows, buckets]`.

    A soft label y counts as weight y positive and 1 - y negative.

    Args:
        labels: float `[..., c]` in [0, 1].
        logits: float `[..., c]`; the entries of the last axis are examples of one histogram (micro average).
        grid: the bins.
        thresholds: probabilities that become exact edges.
        columns: which entries of the last axis have a histogram of their own as well; it costs memory alone.
    """

    labels: Any
    logits: Any
    grid: AbstractGrid = dataclasses.field(metadata={"static": True})
    thresholds: tuple[float, ...] = dataclasses.field(default=(), metadata={"static": True})
    columns: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def layout(self) -> Layout:
        """The edges of the histogram."""
        return self.grid.layout(self.thresholds)

    @property
    def size(self) -> int:
        """Two sums a bucket and row."""
        return 2 * self._n_rows * self.layout.n_buckets

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
        if not isinstance(other, Scores) or other.grid != self.grid:
            raise ValueError(
                f"One histogram serves all metrics of the same scores. Given bins {self.grid} and {other}."
            )
        return dataclasses.replace(
            self,
            thresholds=tuple(dict.fromkeys(self.thresholds + other.thresholds)),
            columns=tuple(dict.fromkeys(self.columns + other.columns)),
        )

    def reduce(self, weights: jax.Array) -> jax.Array:
        """One pass: the bucket of each element, then its two weights."""
        layout = self.layout
        labels = jnp.asarray(self.labels, jnp.float32)
        # By multiplication, for labels may lie as the rows do, and logits be spread over classes too.
        labels = labels * masking.ones_like(self.logits)
        weights = weights * masking.ones_like(labels)
        # A NaN score has no bucket; it must show, so it makes a NaN of the histogram.
        weights = jnp.where(jnp.isnan(self.logits) & (weights != 0), self.logits, weights)
        buckets = self.grid.buckets(layout, self.logits)
        both = (weights * (1 - labels), weights * labels)
        return histogram(buckets, both, layout.n_buckets, self._rows).ravel()

    def read(self, sums: Any, xp: Any, undefined: float) -> "ScoresView":
        """The histogram, with the metrics that it tells."""
        both = sums.reshape((*sums.shape[:-1], 2, self._n_rows, self.layout.n_buckets))

        def view(histogram: Any, inside: dict[int, ScoresView]) -> ScoresView:
            negative, positive = histogram[..., 0, :], histogram[..., 1, :]
            return ScoresView(xp, undefined, self.grid, self.layout, negative, positive, inside)

        inside = {column: view(both[..., row, :], {}) for row, column in enumerate(self.columns, start=1)}
        return view(both.sum(-2) if self.columns else both[..., 0, :], inside)
