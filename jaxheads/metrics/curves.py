"""What a score histogram tells: every metric of thresholds, and the areas, with the intervals that bins leave."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxheads.metrics.base import View
from jaxheads.metrics.grids import AbstractGrid, Layout


class Interval(NamedTuple):
    """A value and the bounds that hold the value of the same scores without bins."""

    value: Any
    lower: Any
    upper: Any

    def is_wide(self) -> bool:
        """Whether the bins leave more than 1e-2 open (of a single value)."""
        return bool(self.upper - self.lower > 1e-2)


@dataclasses.dataclass(frozen=True)
class Confusion(View):
    """Weights of the four outcomes at one threshold."""

    true_positives: Any
    false_positives: Any
    false_negatives: Any
    true_negatives: Any

    @property
    def accuracy(self) -> Any:
        right = self.true_positives + self.true_negatives
        return self.ratio(right, right + self.false_positives + self.false_negatives)

    @property
    def precision(self) -> Any:
        return self.ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> Any:
        return self.ratio(self.true_positives, self.true_positives + self.false_negatives)


@dataclasses.dataclass(frozen=True)
class ScoresView(View):
    """A score histogram that can be read: all entries together, and by itself each that has its own, by its index."""

    grid: AbstractGrid
    layout: Layout
    negative: Any
    positive: Any
    columns: "Mapping[int, ScoresView]" = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def _above(self) -> tuple[Any, Any]:
        """Weights of negatives and positives in bucket k and higher, k = 0 ... n_buckets (where they are 0)."""

        def suffix(x):
            sums = self.xp.flip(self.xp.cumsum(self.xp.flip(x, -1), -1), -1)
            return self.xp.concatenate([sums, self.xp.zeros_like(sums[..., :1])], -1)

        return suffix(self.negative), suffix(self.positive)

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
        return self.ratio(self.positives, self.positives + self.negatives)

    def at(self, threshold: float) -> Confusion:
        """The outcomes where positive means a score above one of the user's thresholds."""
        return self._confusion(self.layout.position[threshold])

    def at_zero(self) -> Confusion:
        """The outcomes where positive means z > 0."""
        return self._confusion(self.layout.zero)

    def _confusion(self, edge: int) -> Confusion:
        fp, tp = (sums[..., edge + 1] for sums in self._above)
        # Not 1 - x or total - x: in float32 that would lose what is small.
        fn, tn = (x[..., : edge + 1].sum(-1) for x in (self.positive, self.negative))
        return Confusion(self.xp, self.undefined, tp, fp, fn, tn)

    def _points(self) -> tuple[Any, Any]:
        """False and true positives at the edges of the curve, from all predicted positive to none."""
        index = np.concatenate([[0], self.layout.curve + 1, [self.layout.n_buckets]])
        fp, tp = self._above
        return fp[..., index], tp[..., index]

    def _bins(self) -> tuple[Any, ...]:
        """Of each bin between two points of the curve: false and true positives above it, and those within.

        What lies within is added up by itself: the difference of two neighbouring points loses it in float32.
        """
        starts = np.concatenate([[0], self.layout.curve + 1])
        bins = np.repeat(np.arange(len(starts)), np.diff(starts, append=self.layout.n_buckets))

        def within(x):
            if self.xp is np:
                return np.add.reduceat(x, starts, axis=-1)
            return jnp.zeros((*x.shape[:-1], len(starts)), x.dtype).at[..., bins].add(x)

        fp, tp = self._points()
        return fp[..., 1:], tp[..., 1:], within(self.negative), within(self.positive)

    def roc_auc(self) -> Interval:
        """Area under the ROC curve; pairs that share a bin count half, and span the interval."""
        _, tp, more_fp, more_tp = self._bins()
        one = self.xp.ones_like(self.positives)
        defined = (self.positives > 0) & (self.negatives > 0)
        positives = self.xp.where(defined, self.positives, one)[..., None]
        step = more_fp / self.xp.where(defined, self.negatives, one)[..., None]
        lower, upper = (step * (tp / positives)).sum(-1), (step * ((tp + more_tp) / positives)).sum(-1)
        return self._interval(defined, (lower + upper) / 2, lower, upper)

    def pr_auc(self) -> Interval:
        """Area under the precision-recall curve, interpolated as by Davis and Goadrich (2006), as Keras does.

        Precision is integrated over the true positives. Within a bin the path is a straight line in (FP, TP); the
        bounds are the paths that take all positives of the bin first, or all negatives.
        """
        xp = self.xp
        defined = self.positives > 0
        scale = xp.where(defined, self.positives, xp.ones_like(self.positives))[..., None]
        fp, tp, more_fp, more_tp = (x / scale for x in self._bins())

        def quotient(a, b):
            return xp.where(b > 0, a / xp.where(b > 0, b, xp.ones_like(b)), xp.zeros_like(a))

        slope = quotient(more_tp, more_tp + more_fp)
        offset = tp - slope * (tp + fp)
        value = slope * (more_tp + offset * xp.log1p(quotient(more_tp + more_fp, tp + fp)))

        def at(fp):
            return more_tp - fp * xp.log1p(quotient(more_tp, tp + fp))

        return self._interval(defined, *(x.sum(-1) for x in (value, at(fp + more_fp), at(fp))))

    def _interval(self, defined: Any, *values: Any) -> Interval:
        # Inside jit an area of 1 may come out as 1.0000002.
        areas = (self.xp.clip(v, 0, 1) for v in values)
        return Interval(*(self.xp.where(defined, v, self.xp.full_like(v, self.undefined)) for v in areas))

    def roc_curve(self) -> tuple[Any, Any, Any]:
        """`fpr, tpr, thresholds`, thresholds falling from 1 to 0."""
        fp, tp = self._points()
        ones = self.xp.ones_like(fp)
        fpr = self.ratio(fp, ones * self.negatives[..., None])
        tpr = self.ratio(tp, ones * self.positives[..., None])
        return fpr[..., ::-1], tpr[..., ::-1], self._thresholds()[::-1]

    def pr_curve(self) -> tuple[Any, Any, Any]:
        """`precision, recall, thresholds`, thresholds rising from 0 to 1; precision 1 where nothing is predicted."""
        fp, tp = self._points()
        precision = dataclasses.replace(self, undefined=1.0).ratio(tp, tp + fp)
        recall = self.ratio(tp, self.xp.ones_like(tp) * self.positives[..., None])
        return precision, recall, self._thresholds()

    def _thresholds(self) -> np.ndarray:
        return np.concatenate([[0.0], self.layout.probabilities[self.layout.curve], [1.0]])

    def reliability(self, bins: int) -> tuple[Any, Any, Any]:
        """`predicted, observed, weight` in equal steps of probability, those without data left out."""
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
        """Whether the bins are too coarse for the scores of this single state."""
        return self.roc_auc().is_wide() or self.pr_auc().is_wide()

    def advice(self) -> str:
        """The grid to use instead, from where the scores of a single state were seen."""
        seen = np.flatnonzero(np.asarray(self.positive + self.negative) > 0)
        z = self.layout.logits
        # An open bin says only that scores lie beyond the last edge: reach out as far again.
        span = max(z[-1] - z[0], 1.0)
        z = np.concatenate([[z[0] - span], z, [z[-1] + span]])
        low, high = z[seen[0]], z[seen[-1] + 1]
        return self.grid.finer(float(low), float(high))
