"""The metrics that a score histogram tells: those of thresholds, and the areas, with the intervals that bins leave."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np

from jaxheads.metrics.base import View
from jaxheads.metrics.grids import AbstractGrid, Layout
from jaxheads.metrics.outcomes import Outcomes


class Interval(NamedTuple):
    """A value and the bounds that hold the value of the same scores without bins."""

    value: Any
    lower: Any
    upper: Any

    def is_wide(self) -> Any:
        """Tells whether the bins leave more than 1e-2 open."""
        return self.upper - self.lower > 1e-2


@dataclasses.dataclass(frozen=True)
class ScoresView(View):
    """A score histogram that can be read: all entries together, and each entry that has a histogram of its own.

    Attributes:
        grid: the bins.
        layout: their edges.
        negative, positive: weights by bucket, on the last axis.
        names: the names of the entries of the logits' last axis: the classes.
        order: which entries have a histogram of their own.
        own: those histograms, in that order, on the axis before the last.
        tied: in which buckets all positives have the same score; None if no metric needs it.
        exclusive: whether the entries are classes that exclude each other.
        decision: the probability above which the head decides for a class, or one for each class; None for z > 0.
        apart: whether the axis before the buckets has the classes, all of them in their order.
    """

    grid: AbstractGrid
    layout: Layout
    negative: Any
    positive: Any
    names: tuple[str, ...] = ()
    order: tuple[int, ...] = ()
    own: "ScoresView | None" = None
    tied: Any = None
    exclusive: bool = False
    decision: float | tuple[float, ...] | None = None
    apart: bool = False

    @functools.cached_property
    def columns(self) -> "Mapping[int, ScoresView]":
        """The view of each class that has a histogram of its own, by its index."""
        each = {column: self._rows(row) for row, column in enumerate(self.order)}
        if not isinstance(decision := self.decision, tuple):
            return each
        return {column: dataclasses.replace(view, decision=decision[column]) for column, view in each.items()}

    def by_class(self) -> "ScoresView":
        """Returns the view of all classes at once, in their order: every value has them on a last axis."""
        return self._classes

    @functools.cached_property
    def _classes(self) -> "ScoresView":
        place = {column: row for row, column in enumerate(self.order)}
        return dataclasses.replace(self._rows([place[column] for column in range(len(self.names))]), apart=True)

    def _rows(self, which: int | list[int]) -> "ScoresView":
        own = cast("ScoresView", self.own)
        index = which if isinstance(which, int) else np.asarray(which, np.int32)
        negative, positive = (x[..., index, :] for x in (own.negative, own.positive))
        tied = None if own.tied is None else own.tied[..., index, :]
        return dataclasses.replace(own, negative=negative, positive=positive, tied=tied)

    @property
    def support(self) -> Any:
        """The weight of all positives."""
        return self.positives

    @property
    def total(self) -> Any:
        """The weight of all entries."""
        return self.positives + self.negatives

    @functools.cached_property
    def _above(self) -> tuple[Any, Any]:
        """Weights of negatives and positives in bucket k and higher, k = 0 ... n_buckets (where they are 0)."""

        def suffix(x):
            sums = self.xp.flip(self.xp.cumsum(self.xp.flip(x, -1), -1), -1)
            return self.xp.concatenate([sums, self.xp.zeros_like(sums[..., :1])], -1)

        return suffix(self.negative), suffix(self.positive)

    @functools.cached_property
    def _below(self) -> tuple[Any, Any]:
        """Weights of negatives and positives in buckets lower than k, k = 0 (where they are 0) ... n_buckets."""

        def prefix(x):
            sums = self.xp.cumsum(x, -1)
            return self.xp.concatenate([self.xp.zeros_like(sums[..., :1]), sums], -1)

        return prefix(self.negative), prefix(self.positive)

    @property
    def negatives(self) -> Any:
        """The weight of all negatives."""
        return self._above[0][..., 0]

    @property
    def positives(self) -> Any:
        """The weight of all positives."""
        return self._above[1][..., 0]

    @property
    def positive_rate(self) -> Any:
        """The weighted mean of the labels."""
        return self.ratio(self.positives, self.total)

    def at(self, threshold: float) -> Outcomes:
        """Returns the outcomes where positive means a score above one of the user's thresholds."""
        return self._count_at(self.layout.position[threshold])

    def at_zero(self) -> Outcomes:
        """Returns the outcomes where positive means z > 0."""
        return self._count_at(self.layout.zero)

    def decide(self, threshold: float | None) -> Outcomes:
        """Returns the outcomes at one of the user's thresholds; None: as the head decides."""
        decision = self.decision if threshold is None else threshold
        if decision is None:
            return self.at_zero()
        return self._count_each(decision) if isinstance(decision, tuple) else self.at(decision)

    def _count_each(self, decision: tuple[float, ...]) -> Outcomes:
        """Returns the outcomes of each class at its own threshold."""
        if not self.apart:
            raise ValueError(
                "The head decides for each class at its own threshold, which the one histogram of all classes does not "
                'tell. Give the metric average=None, "macro" or "weighted", or threshold=.'
            )
        edges = np.asarray([self.layout.position[t] + 1 for t in decision], np.int32)
        edges = edges.reshape((1,) * (self.positive.ndim - 2) + (-1, 1))

        def take(sums: Any) -> Any:
            index = self.xp.broadcast_to(edges, (*sums.shape[:-1], 1))
            return self.xp.take_along_axis(sums, index, -1)[..., 0]

        (fp, tp), (tn, fn) = (tuple(map(take, pair)) for pair in (self._above, self._below))
        return Outcomes(self.xp, self.undefined, tp, fp, fn, tn)

    def _count_at(self, edge: int) -> Outcomes:
        fp, tp = (sums[..., edge + 1] for sums in self._above)
        # Not 1 - x or total - x: in float32 that would lose small values.
        fn, tn = (x[..., : edge + 1].sum(-1) for x in (self.positive, self.negative))
        return Outcomes(self.xp, self.undefined, tp, fp, fn, tn)

    def cuts(self) -> Outcomes:
        """Returns the outcomes at every edge, from all predicted positive to none: a last axis of `n_buckets + 1`."""
        return self._count_everywhere(slice(None), slice(None))

    def ideal(self) -> Outcomes:
        """Returns, by bucket, outcomes that no threshold inside can surpass: its positives above, its negatives below.

        A value that grows with TP and falls with FP is nowhere larger than at one of these.
        """
        return self._count_everywhere(slice(None, -1), slice(1, None))

    def worst(self) -> Outcomes:
        """Returns, by bucket, the outcomes with its negatives above a threshold inside it, and its positives below."""
        return self._count_everywhere(slice(1, None), slice(None, -1))

    def _count_everywhere(self, positive: slice, negative: slice) -> Outcomes:
        (fp, tp), (tn, fn) = self._above, self._below
        four = tp[..., positive], fp[..., negative], fn[..., positive], tn[..., negative]
        return Outcomes(self.xp, self.undefined, *four)

    def _take_points(self) -> tuple[Any, Any]:
        """Returns false and true positives at the edges of the curve, from all predicted positive to none."""
        index = np.concatenate([[0], self.layout.curve + 1, [self.layout.n_buckets]])
        fp, tp = self._above
        return fp[..., index], tp[..., index]

    def _take_bins(self) -> tuple[Any, ...]:
        """Returns, for each bin between two points of the curve, false and true positives above it, and those within.

        Those within are added up by themselves: the difference of two neighbouring points loses them in float32.
        """
        starts = np.concatenate([[0], self.layout.curve + 1])
        bins = np.repeat(np.arange(len(starts)), np.diff(starts, append=self.layout.n_buckets))

        def within(x):
            if self.xp is np:
                return np.add.reduceat(x, starts, axis=-1)
            return jnp.zeros((*x.shape[:-1], len(starts)), x.dtype).at[..., bins].add(x)

        fp, tp = self._take_points()
        return fp[..., 1:], tp[..., 1:], within(self.negative), within(self.positive)

    def roc_auc(self) -> Interval:
        """Returns the area under the ROC curve; pairs that share a bin count half, and span the interval."""
        _, tp, more_fp, more_tp = self._take_bins()
        one = self.xp.ones_like(self.positives)
        defined = (self.positives > 0) & (self.negatives > 0)
        positives = self.xp.where(defined, self.positives, one)[..., None]
        step = more_fp / self.xp.where(defined, self.negatives, one)[..., None]
        lower, upper = (step * (tp / positives)).sum(-1), (step * ((tp + more_tp) / positives)).sum(-1)
        return self.interval(defined, (lower + upper) / 2, lower, upper)

    def partial_roc_auc(self, max_fpr: float) -> Interval:
        """Returns the area under the ROC curve up to a false positive rate, in the standard form of McClish (1989).

        Inside a bin the curve is a straight line, as for equal scores. The bounds are the paths that take all positives
        of the bin first, or all negatives.
        """
        xp = self.xp
        fp, tp, more_fp, more_tp = self._take_bins()
        defined = (self.positives > 0) & (self.negatives > 0)
        one = xp.ones_like(self.positives)
        positives, negatives = (xp.where(defined, x, one)[..., None] for x in (self.positives, self.negatives))
        start, step, base, rise = fp / negatives, more_fp / negatives, tp / positives, more_tp / positives
        # A bin that lies inside as a whole keeps its own width: the difference of two sums would lose it in float32.
        width = xp.where(start + step <= max_fpr, step, xp.maximum(max_fpr - start, xp.zeros_like(start)))
        part = self.zeroed().ratio(width, step)
        least, most = max_fpr * max_fpr / 2, max_fpr
        areas = ((width * height).sum(-1) for height in (base + part * rise / 2, base, base + rise))
        return self.interval(defined, *((1 + (area - least) / (most - least)) / 2 for area in areas))

    def pr_auc(self) -> Interval:
        """Returns the area under the precision-recall curve, interpolated as by Davis and Goadrich (2006) and Keras.

        Precision is integrated over the true positives. Within a bin the path is a straight line in (FP, TP); the
        bounds are the paths that take all positives of the bin first, or all negatives.
        """
        xp = self.xp
        defined = self.positives > 0
        scale = xp.where(defined, self.positives, xp.ones_like(self.positives))[..., None]
        fp, tp, more_fp, more_tp = (x / scale for x in self._take_bins())
        quotient = self.zeroed().ratio
        slope = quotient(more_tp, more_tp + more_fp)
        offset = tp - slope * (tp + fp)
        value = slope * (more_tp + offset * xp.log1p(quotient(more_tp + more_fp, tp + fp)))

        def at(fp):
            return more_tp - fp * xp.log1p(quotient(more_tp, tp + fp))

        return self.interval(defined, *(x.sum(-1) for x in (value, at(fp + more_fp), at(fp))))

    def interval(self, defined: Any, value: Any, lower: Any, upper: Any) -> Interval:
        """Returns value and bounds, all in [0, 1], `undefined` where they are not defined."""
        xp = self.xp
        # Inside jit an area of 1 may come out as 1.0000002, and a bound may pass its value by as much.
        areas = (xp.clip(v, 0, 1) for v in (value, xp.minimum(lower, value), xp.maximum(upper, value)))
        return Interval(*(self.where(defined, v) for v in areas))

    def where(self, defined: Any, value: Any) -> Any:
        """Returns the value where it is defined, else `undefined`; NaN where a score was NaN."""
        value = self.xp.where(defined, value, self.xp.full_like(value, self.undefined))
        return self.xp.where(self.xp.isnan(self.total), self.total, value)

    def roc_curve(self) -> tuple[Any, Any, Any]:
        """Returns `fpr, tpr, thresholds`, thresholds falling from 1 to 0."""
        fp, tp = self._take_points()
        ones = self.xp.ones_like(fp)
        fpr = self.ratio(fp, ones * self.negatives[..., None])
        tpr = self.ratio(tp, ones * self.positives[..., None])
        kept = self._select_points(fp, tp)
        return fpr[..., kept][..., ::-1], tpr[..., kept][..., ::-1], self._list_thresholds()[kept][::-1]

    def pr_curve(self) -> tuple[Any, Any, Any]:
        """Returns `precision, recall, thresholds`, thresholds rising from 0 to 1; precision 1 without predictions."""
        fp, tp = self._take_points()
        precision = dataclasses.replace(self, undefined=1.0).ratio(tp, tp + fp)
        recall = self.ratio(tp, self.xp.ones_like(tp) * self.positives[..., None])
        kept = self._select_points(fp, tp)
        return precision[..., kept], recall[..., kept], self._list_thresholds()[kept]

    def _select_points(self, fp: Any, tp: Any) -> Any:
        """Selects the points of a curve. Logits beyond 36 have a probability of 1: empty bins there are left out."""
        thresholds = self._list_thresholds()
        if self.xp is not np or fp.ndim > 1:
            return slice(None)
        same = [np.diff(x) == 0 for x in (thresholds, fp, tp)]
        return np.concatenate([[True], ~np.logical_and.reduce(same)])

    def _list_thresholds(self) -> np.ndarray:
        return np.concatenate([[0.0], self.layout.probabilities[self.layout.curve], [1.0]])

    def reliability(self, bins: int) -> tuple[Any, Any, Any]:
        """Returns `predicted, observed, weight` in equal steps of probability. Steps without data are left out."""
        p = self.layout.representative
        group = np.minimum((p * bins).astype(int), bins - 1)
        sums = np.stack(
            [
                np.bincount(group, column, minlength=bins)
                for column in ((self.positive + self.negative) * p, self.positive, self.positive + self.negative)
            ]
        )
        predicted, observed, weight = sums[:, sums[2] > 0]
        return predicted / weight, observed / weight, weight

    def is_coarse(self) -> bool:
        """Tells whether the bins are too coarse for the scores of this single state."""
        return self.roc_auc().is_wide() or self.pr_auc().is_wide()

    def advice(self) -> str:
        """Returns the grid to use instead, as text, from the range of the scores of a single state."""
        seen = np.flatnonzero(np.asarray(self.positive + self.negative) > 0)
        z = self.layout.logits
        # An open bin says only that scores lie beyond the last edge, so it reaches out as far again.
        span = max(z[-1] - z[0], 1.0)
        z = np.concatenate([[z[0] - span], z, [z[-1] + span]])
        low, high = z[seen[0]], z[seen[-1] + 1]
        return self.grid.finer(float(low), float(high))
