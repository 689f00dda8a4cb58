"""Metrics of whole rows of several labels: one value a row, and the mean of these values.

A `MultiLabelHead` has them, and every head whose source `"scores"` has entries that do not exclude each other. Where
entries have masks or weights of their own, the same rules hold for all of them:

* **Entries.** An entry that is masked, or of weight 0, is not there: it is no label, no prediction, and has no rank.
* **Rows.** The weight of a row in the mean is the mean weight of its entries that exist. A row without entries is not
  there.
* **The undefined.** A row for which the metric is 0/0 was not measured: the mean is over the other rows (scikit-learn's
  `zero_division=nan`). With another `undefined` than NaN, such a row counts as that: `compute(undefined=0.0)` is
  scikit-learn's `zero_division=0`, its default.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.metrics.base import SCORES, Observation
from jaxheads.metrics.mean import Sums, SumsView
from jaxheads.metrics.outcomes import Outcomes
from jaxheads.metrics.scored import AVERAGES, AbstractThresholdMetric
from jaxheads.metrics.scores import Scores
from jaxheads.numerics import masking

# What stands for 0/0 in compiled code. No metric of rows is negative, and a NaN would trip `jax_debug_nans`.
NOTHING = -1.0


@dataclasses.dataclass(frozen=True)
class AbstractRowsMetric(AbstractThresholdMetric):
    """A metric of decisions that may be averaged over rows: `average="samples"` gives `KEY_samples`."""

    averages = (*AVERAGES, "samples")

    def observe(
        self, labels: Any, logits: jax.Array, sources: Mapping[str, Callable[[], Observation]], rows: Any = None
    ) -> Mapping[str, Observation]:
        if self.average != "samples":
            return super().observe(labels, logits, sources)
        scores = take_rows(self, sources)
        y, live = as_entries(scores, rows.weights)
        yes = scores.decide(self.threshold).astype(jnp.float32)
        four = (y * yes, (1 - y) * yes, y * (1 - yes), (1 - y) * (1 - yes))
        outcomes = (jnp.sum(masking.weighted(x, live), -1, keepdims=True) for x in four)
        value = self.decided(Outcomes(jnp, NOTHING, *outcomes))
        # A NaN score shows in every metric of scores.
        broken = masking.keep(jnp.isnan(scores.logits) & masking.is_not_zero(live), scores.logits, 0)
        return {self._kept_rows: mean_of_rows(value + jnp.sum(broken, -1, keepdims=True))}

    def summarize(self, seen: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.average != "samples":
            return super().summarize(seen)
        return {self._full_key: read_mean(seen[self._kept_rows])}

    @property
    def _kept_rows(self) -> str:
        return f"samples:{self.key}{self.ending}"


def take_rows(metric: Any, sources: Mapping[str, Callable[[], Observation]]) -> Scores:
    """Returns the scores of a head of several labels a row. Refuses any other head."""
    scores: Any = sources[SCORES]() if SCORES in sources else None
    if scores is None or scores.exclusive or scores.logits.shape[-1] < 2:
        raise ValueError(
            f"{metric!r} is a mean over rows of several labels, as those of a MultiLabelHead. Given a head with "
            f"{sorted(sources) or 'no sources'} and one label a row. Leave it out; of one class a row, "
            "jh.metrics.TopKAccuracy(k) and the averages by class are what it would be."
        )
    return scores


def as_entries(scores: Scores, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns labels and weights of all entries, float32 `[..., c]`."""
    ones = masking.ones_like(scores.logits)
    return jnp.asarray(scores.labels, jnp.float32) * ones, weights * ones


def mean_of_rows(values: jax.Array) -> Sums:
    """Returns an observation of values `[..., 1]`, where a negative one is not defined: their sum, and two weights."""
    missing = values < 0
    return Sums((masking.keep(~missing, values, 0), (~missing).astype(jnp.float32), missing.astype(jnp.float32)))


def read_mean(view: SumsView) -> Any:
    """Returns the mean over the rows that have a value. Those without count as `undefined`, if that is a number."""
    total, defined, missing = (x[..., 0] for x in view.sums)
    if np.isnan(view.undefined):
        return view.ratio(total, defined)
    return view.ratio(total + view.undefined * missing, defined + missing)
