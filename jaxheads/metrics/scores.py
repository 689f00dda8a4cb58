"""The score histogram: weights of negatives and positives by bucket."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.metrics.base import Observation
from jaxheads.metrics.curves import ScoresView
from jaxheads.metrics.grids import AbstractGrid, GrowingGrid, Layout
from jaxheads.numerics import masking
from jaxheads.numerics.histograms import by_label, histogram


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores(Observation):
    """A histogram of logits by label, `[2, rows, buckets]`; `[4, rows, buckets]` with `ties`.

    A soft label y counts as weight y positive and 1 - y negative.

    Args:
        labels: float `[..., c]` in [0, 1].
        logits: float `[..., c]`; the entries of the last axis are examples of one histogram (micro average).
        grid: the bins; None for a `GrowingGrid`, or for the bins of another metric that shares the histogram.
        thresholds: probabilities that become exact edges.
        columns: which entries of the last axis have a histogram of their own as well; it costs only memory.
        names: the names of the entries of the last axis in metric keys; by default `class0`, `class1`, ...
        ties: whether to find out in which buckets all positives have the same score. For this each score is turned
            into a direction, by its bits, and directions are added up: only equal ones do not weaken each other. Two
            scores pass for one if their directions are within a tenth of a degree. The chance of that is 1 in 1,700.
        exclusive: whether the entries of the last axis are classes that exclude each other.
        decision: the probability above which the head decides for a class, or one for each class; None for z > 0. A
            single one must be among the thresholds.
    """

    labels: Any
    logits: Any
    grid: AbstractGrid | None = dataclasses.field(metadata={"static": True})
    thresholds: tuple[float, ...] = dataclasses.field(default=(), metadata={"static": True})
    columns: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    names: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    ties: bool = dataclasses.field(default=False, metadata={"static": True})
    exclusive: bool = dataclasses.field(default=False, metadata={"static": True})
    decision: float | tuple[float, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def layout(self) -> Layout:
        """The edges of the histogram."""
        return self._bins.layout(self.thresholds)

    @property
    def _bins(self) -> AbstractGrid:
        return GrowingGrid() if self.grid is None else self.grid

    @property
    def size(self) -> int:
        """Two sums a bucket and row, or four."""
        return self._n_sums * self._n_rows * self.layout.n_buckets

    @property
    def _n_sums(self) -> int:
        return 4 if self.ties else 2

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each entry of the last axis in metric keys."""
        n = self.logits.shape[-1]
        if self.names and len(self.names) != n:
            raise ValueError(f"Scores need one name for each of {n} entries of the last axis. Given {self.names!r}.")
        return self.names or tuple(f"class{i}" for i in range(n))

    def decide(self, threshold: float | None) -> jax.Array:
        """Tells which scores count as positive, as the histogram does: those above a threshold; None: as the head."""
        decision = self.decision if threshold is None else threshold
        return self.logits > 0 if decision is None else self._bins.exceeds(self.logits, decision)

    def with_threshold(self, threshold: float | None) -> "Scores":
        """Returns the same scores with one more exact edge; None: with the edges at which the head decides."""
        decision = self.decision if threshold is None else threshold
        added = decision if isinstance(decision, tuple) else () if decision is None else (decision,)
        return dataclasses.replace(self, thresholds=tuple(dict.fromkeys((*self.thresholds, *added))))

    @property
    def _n_rows(self) -> int:
        """The number of rows. The first row is for all entries without a row of their own."""
        return 1 + len(self.columns)

    @property
    def _rows(self) -> list[int] | None:
        """The row of each entry of the last axis."""
        if not self.columns:
            return None
        own = {column: row for row, column in enumerate(self.columns, start=1)}
        return [own.get(column, 0) for column in range(jnp.shape(self.logits)[-1])]

    def join(self, other: Observation) -> "Scores":
        """Returns one histogram with the thresholds and the columns of both."""
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
            ties=self.ties or other.ties,
        )

    def reduce(self, weights: jax.Array) -> jax.Array:
        """Adds up in one pass: the bucket of each element, then its weight, under its label."""
        return self._sum(*self._locate_entries(weights), self.layout.n_buckets).ravel()

    def _sum(self, buckets: jax.Array, labels: jax.Array, weights: jax.Array, n: int) -> jax.Array:
        """Returns the histograms `[2 or 4, rows, n]`."""
        both = by_label(buckets, labels, weights, n, self._rows)
        if not self.ties:
            return both
        positives, directions = weights * labels, _find_directions(self.logits)
        return jnp.concatenate([both, histogram(buckets, [positives * x for x in directions], n, self._rows)])

    def reduce_by(self, weights: jax.Array, groups: Any) -> jax.Array:
        """Adds up each group, in one pass if groups do not overlap: the group is a part of the bucket's number."""
        if groups.ids is None:
            return super().reduce_by(weights, groups)
        buckets, labels, weights = self._locate_entries(weights * (groups.ids >= 0).astype(jnp.float32))
        n = self.layout.n_buckets
        each = self._sum(buckets + jnp.maximum(groups.ids, 0) * np.int32(n), labels, weights, groups.n * n)
        each = each.reshape(self._n_sums, self._n_rows, groups.n, n)
        return jnp.moveaxis(each, 2, 0).reshape(groups.n, self.size)

    def _locate_entries(self, weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the bucket, the label and the weight of each element."""
        layout = self.layout
        labels = jnp.asarray(self.labels, jnp.float32)
        # By multiplication, for labels may lie as the rows do, and logits be spread over classes too.
        labels = labels * masking.ones_like(self.logits)
        weights = weights * masking.ones_like(labels)
        # A NaN score has no bucket. It must show, so it makes the histogram NaN.
        has_none = jax.lax.ne(self.logits, self.logits) & (weights != 0)
        weights = masking.choose(has_none, self.logits, weights)
        return self._bins.buckets(layout, self.logits), labels, weights

    def read(self, sums: Any, xp: Any, undefined: float) -> "ScoresView":
        """Returns the histogram, with the metrics that it tells."""
        sums = sums.reshape((*sums.shape[:-1], self._n_sums, self._n_rows, self.layout.n_buckets))
        # The NaN of a score lies in one bucket. Every metric must show it, also where that bucket does not count.
        total = sums.sum((-3, -1), keepdims=True)
        sums = xp.where(xp.isnan(total), total, sums)

        def view(sums: Any, order: tuple[int, ...] = (), own: ScoresView | None = None) -> ScoresView:
            negative, positive, *directed = (sums[..., i, :] for i in range(self._n_sums))
            names, exclusive = self.class_names, self.exclusive
            tied = _are_tied(positive, cosines=directed[0], sines=directed[1], xp=xp) if directed else None
            return ScoresView(
                *(xp, undefined, self._bins, self.layout, negative, positive, names, order, own, tied, exclusive),
                decision=self.decision,
            )

        if not self.columns:
            return view(sums[..., 0, :])
        return view(sums.sum(-2), self.columns, view(xp.moveaxis(sums[..., 1:, :], -2, -3)))


def _find_directions(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns two numbers in [0, 1] for each score: a random point on a circle of diameter 1, one for equal scores."""
    # -0 and 0 are equal scores.
    bits = jax.lax.bitcast_convert_type(logits + jnp.zeros_like(logits), jnp.uint32)
    # After a multiplication by 2^32 over the golden ratio, the high bits depend on all bits (Knuth, 6.4).
    mixed = jax.lax.shift_right_logical(bits * np.uint32(2654435769), np.uint32(8))
    angle = mixed.astype(jnp.float32) * np.float32(2 * np.pi / 2**24)
    return (1 + jnp.cos(angle)) / 2, (1 + jnp.sin(angle)) / 2


def _are_tied(positive: Any, cosines: Any, sines: Any, xp: Any) -> Any:
    """Tells in which buckets all positives have one direction: their sum is as long as can be, but for rounding."""
    some = xp.where(positive > 0, positive, xp.ones_like(positive))
    x, y = (2 * sums / some - 1 for sums in (cosines, sines))
    return x * x + y * y >= 1 - 3e-6
