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

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.metrics.base import SCORES, Metric, Observation
from jaxheads.metrics.mean import Sums, SumsView
from jaxheads.metrics.outcomes import Outcomes
from jaxheads.metrics.scored import AVERAGES, AbstractThresholdMetric
from jaxheads.metrics.scores import Scores
from jaxheads.numerics import brief, inputs, masking, meshes

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


@dataclasses.dataclass(frozen=True)
class AbstractAtK(Metric):
    """A metric of the k entries of each row with the largest logits.

    Of equal logits the first entry is ahead, as in `jax.lax.top_k`; in a row with a NaN none is. The weight of an entry
    says only whether it is there, for a rank has no multiplicity. A soft label y counts as y of a label.
    """

    k: int = 5

    higher_is_better = True
    stem: ClassVar[str] = ""

    def __post_init__(self):
        if not inputs.is_integer(self.k, 1):
            raise ValueError(f"{type(self).__name__} needs a positive integer k. Given {brief.tell(self.k)}.")
        object.__setattr__(self, "k", int(self.k))

    @property
    def _key(self) -> str:
        return f"{self.stem}_{self.k}"

    def observe(  # pyright: ignore[reportIncompatibleMethodOverride]  # with `rows`, which metrics may ask for
        self, labels: Any, logits: jax.Array, sources: Mapping[str, Callable[[], Observation]], rows: Any
    ) -> Mapping[str, Observation]:
        scores = take_rows(self, sources)
        if self.k > (n := scores.logits.shape[-1]):
            raise ValueError(f"{self!r} asks for more than there are: {n} classes.")
        # The best of a row are not found by parts of it.
        logits, y, weights = map(meshes.whole_rows, (scores.logits, *as_entries(scores, rows.weights)))
        there = masking.is_not_zero(weights)
        y = masking.keep(there, y, 0)
        found = masking.keep(_are_best(logits, there, self.k), y, 0)
        return {self._key: mean_of_rows(self.of_rows(*(jnp.sum(x, -1, keepdims=True) for x in (found, y))))}

    @abc.abstractmethod
    def of_rows(self, found: jax.Array, there: jax.Array) -> jax.Array:
        """Returns one value a row, `[..., 1]`, from the labels among the k best and all labels; -1 where it is 0/0."""

    def summarize(self, seen: Mapping[str, Any]) -> dict[str, Any]:
        return {self._key: read_mean(seen[self._key])}


@dataclasses.dataclass(frozen=True)
class RecallAtK(AbstractAtK):
    """`recall_at_K`, the share of a row's labels that are among its k largest logits: the mean over rows with labels.

    A row without labels is 0/0. The rules for ties, NaN, masks and weights are told in `jaxheads.metrics.rows`.

    Args:
        k: from 1 to the number of classes.

    Raises:
        ValueError: a k outside this range; a head without several labels a row.

    Source: `torchmetrics.retrieval.RetrievalRecall(top_k=k, empty_target_action="skip")`, with a row for a query.

    >>> import jaxheads as jh
    >>> head = jh.MultiLabelHead(4).with_metrics(jh.metrics.RecallAtK(2), jh.metrics.PrecisionAtK(2))
    >>> labels, logits = [[1, 0, 1, 1], [0, 0, 0, 0]], [[4.0, 3.0, 2.0, 1.0], [1.5, 2.5, 3.5, 4.5]]
    >>> values = head.measure(labels=labels, logits=logits).compute(warn=False)
    >>> print(f"{values['recall_at_2']:.4f} {values['precision_at_2']:.4f}")  # 1/3; (1/2 + 0) / 2
    0.3333 0.2500
    """

    stem = "recall_at"

    def of_rows(self, found: jax.Array, there: jax.Array) -> jax.Array:
        return Outcomes(jnp, NOTHING, found, jnp.zeros_like(found), there - found, jnp.zeros_like(found)).recall


@dataclasses.dataclass(frozen=True)
class PrecisionAtK(AbstractAtK):
    """`precision_at_K`, the number of a row's labels among its k largest logits, divided by k: the mean over rows.

    A row without labels counts as 0, and one with fewer than k entries is divided by k too. The rules for ties, NaN,
    masks and weights are told in `jaxheads.metrics.rows`.

    Args:
        k: from 1 to the number of classes.

    Raises:
        ValueError: a k outside this range; a head without several labels a row.

    Source: `torchmetrics.retrieval.RetrievalPrecision(top_k=k, empty_target_action="neg")`, with a row for a query.
    """

    stem = "precision_at"

    def of_rows(self, found: jax.Array, there: jax.Array) -> jax.Array:
        return found / np.float32(self.k)


def _are_best(logits: jax.Array, there: jax.Array, k: int) -> jax.Array:
    """Tells which entries of `logits [..., c]` are among the k largest of those that are there; none if one is NaN."""
    z = masking.keep(there, logits, -np.inf)
    least = jax.lax.top_k(z, k)[0][..., -1:]
    above, ties = there & (z > least), there & (z == least)
    # The first of the ties fill the places that are left.
    place, taken = jnp.cumsum(ties.astype(jnp.float32), -1), jnp.sum(above.astype(jnp.float32), -1, keepdims=True)
    return (above | (ties & (place + taken <= k))) & ~jnp.any(jnp.isnan(z), -1, keepdims=True)
