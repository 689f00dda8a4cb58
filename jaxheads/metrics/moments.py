"""Weighted moments of labels, predictions and errors, for each target: what metrics of regression read."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.metrics.base import Observation, View
from jaxheads.metrics.curves import Interval
from jaxheads.numerics import masking, meshes

# How far float32 may have moved a sum of squares, as a part of it. That each square is rounded, and the sum of each
# batch (which XLA adds up in a tree), was seen to move it by 2.3 * 2^-24 at most; eight times 2^-24 is allowed for.
ROUNDING = 2.0**-21


class RoundedInterval(Interval):
    """A value and the bounds that hold the value of the same numbers without rounding."""

    mend = ""

    @classmethod
    def of(cls, mend: str, value: Any, lower: Any, upper: Any) -> "RoundedInterval":
        """With what would make it narrower, as text."""
        interval = cls(value, lower, upper)
        interval.mend = mend
        return interval

    def is_wide(self) -> Any:
        """Whether rounding leaves more open than 1e-2, or 1e-2 of the value where that is large."""
        return self.upper - self.lower > 1e-2 * np.fmax(1.0, np.abs(self.value))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments(Observation):
    """Nine weighted sums for each target, `[9, d]`: of 1, y, p, y^2, p^2, y p, e, e^2 and |e|, where e = y - p.

    Args:
        labels: y, `[..., d]`.
        predictions: p, `[..., d]`, on the scale of the labels.
        shift: what is taken from y and p of each target before they are squared; None for nothing, and for what another
            metric of the same head asks for.
    """

    labels: Any
    predictions: Any
    shift: tuple[float, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    only_sums = True

    @property
    def n_targets(self) -> int:
        """How many targets there are."""
        return jnp.shape(self.predictions)[-1]

    @property
    def size(self) -> int:
        """Nine sums a target."""
        return 9 * self.n_targets

    def join(self, other: Observation) -> "Moments":
        """With the shift of the one that has one."""
        shifts = {x.shift for x in (self, other) if isinstance(x, Moments) and x.shift is not None}
        if not isinstance(other, Moments) or len(shifts) > 1:
            raise ValueError(
                f"All metrics of one head read the same moments, so their shift must be equal. Given "
                f"{sorted(shifts) if isinstance(other, Moments) else other}. Give it to one of them: it serves all."
            )
        return dataclasses.replace(self, shift=next(iter(shifts), None))

    def reduce(self, weights: jax.Array) -> jax.Array:
        """The sums of this batch."""
        labels, predictions = (jnp.asarray(x, jnp.float32) for x in (self.labels, self.predictions))
        weights, errors = weights * masking.ones_like(predictions), labels - predictions
        if self.shift is not None:
            shift = jnp.expand_dims(jnp.asarray(self.shift, jnp.float32), tuple(range(predictions.ndim - 1)))
            labels, predictions = labels - shift, predictions - shift
        squares = (labels * labels, predictions * predictions, labels * predictions)
        values = (labels, predictions, *squares, errors, errors * errors, jnp.abs(errors))
        each = [weights, *(masking.weighted(x, weights) for x in values)]
        if weights.shape[-1] == 1:
            return jnp.stack([masking.total(x) for x in each])
        return meshes.replicated(jnp.concatenate([masking.column_totals(x) for x in each]))

    def read(self, sums: Any, xp: Any, undefined: float) -> "MomentsView":
        """The sums, with the metrics that they tell."""
        each = sums.reshape((*sums.shape[:-1], 9, self.n_targets))
        return MomentsView(xp, undefined, self.shift, *(each[..., i, :] for i in range(9)))


@dataclasses.dataclass(frozen=True)
class MomentsView(View):
    """Moments that can be read, all `[..., d]`; a spread that float32 cannot tell from none is `undefined`."""

    shift: tuple[float, ...] | None
    weight: Any
    label: Any
    prediction: Any
    label_square: Any
    prediction_square: Any
    product: Any
    error: Any
    error_square: Any
    error_size: Any

    def mean(self, total: Any) -> Any:
        """A sum divided by the weight."""
        return self.ratio(total, self.weight)

    def is_broken(self) -> Any:
        """Where the data hold what is no number, `[..., d]`."""
        return ~self.xp.isfinite(self.label_square + self.prediction_square + self.error_square)

    def mend(self) -> str:
        """The shift to use, from the mean of the labels of a single state; inside `jit` nobody knows it."""
        if self.xp is not np or self.weight.ndim != 1:
            return ""
        shift = dataclasses.replace(self, undefined=0.0).mean(self.label) + np.asarray(self.shift or 0.0)
        first, *others = (float(f"{x:.3g}") for x in shift)
        return f"shift={(first, *others) if others else first}"

    def r2(self) -> Interval:
        """`1 - sum(e^2) / sum((y - mean(y))^2)`."""
        return self._explain(self.error_square, ROUNDING * self.error_square)

    def explained_variance(self) -> Interval:
        """`1 - sum((e - mean(e))^2) / sum((y - mean(y))^2)`."""
        return self._explain(*self._compute_spread(self.error, self.error_square))

    def pearson(self) -> Interval:
        """`cov(y, p) / sqrt(var(y) var(p))`."""
        xp = self.xp
        label, label_slack = self._compute_spread(self.label, self.label_square)
        prediction, prediction_slack = self._compute_spread(self.prediction, self.prediction_square)
        defined = (label > label_slack) & (prediction > prediction_slack)

        def standardized(x: Any) -> Any:
            # Root by root: the product of two small spreads may be no float32.
            return x / xp.sqrt(xp.where(defined, label, 1.0)) / xp.sqrt(xp.where(defined, prediction, 1.0))

        value = standardized(self.product - self.label * self.prediction / xp.where(defined, self.weight, 1.0))
        # |y p| adds up to the geometric mean of the squares at most.
        slack = ROUNDING * standardized(xp.sqrt(self.label_square) * xp.sqrt(self.prediction_square))
        for part, whole in ((label_slack, label), (prediction_slack, prediction)):
            slack = slack + xp.abs(value) * part / xp.where(defined, whole, 1.0) / 2
        none = (self.label_square == 0) | (self.prediction_square == 0)
        return self._bound(defined, none, label + prediction, (value, value - slack, value + slack), -1.0)

    def _compute_spread(self, total: Any, squares: Any) -> tuple[Any, Any]:
        """`sum(a (x - mean(x))^2)`, and how far rounding may have moved it."""
        return squares - total * dataclasses.replace(self, undefined=0.0).mean(total), ROUNDING * squares

    def _explain(self, part: Any, slack: Any) -> Interval:
        """1 less a part of the spread of the labels."""
        xp = self.xp
        spread, spread_slack = self._compute_spread(self.label, self.label_square)
        defined = spread > spread_slack
        part, least = xp.maximum(part, 0.0), xp.maximum(part - slack, 0.0)
        pairs = ((part, spread), (part + slack, spread - spread_slack), (least, spread + spread_slack))
        values = tuple(1 - above / xp.where(defined, below, 1.0) for above, below in pairs)
        return self._bound(defined, self.label_square == 0, spread + part, values, -np.inf)

    def _bound(self, defined: Any, none: Any, seen: Any, values: tuple[Any, ...], least: float) -> Interval:
        """A value and its bounds between `least` and 1.

        Numbers that are all the shift have no spread: `undefined`. Of others that are all equal nobody can tell, after
        rounding, whether they have one: the value is `undefined`, the bounds are as wide as can be. NaN stays NaN.
        """
        xp = self.xp
        value, lower, upper = (xp.where(defined, xp.clip(x, least, 1.0), np.nan) for x in values)
        value = xp.where(defined, value, self.undefined)
        lower, upper = xp.where(defined, lower, least), xp.where(defined, upper, 1.0)
        out = (xp.where(none, self.undefined, x) for x in (value, lower, upper))
        return Interval(*(xp.where(xp.isnan(seen), np.nan, x) for x in out))
