"""Metrics that compare probabilities with frequencies: exact sums of their own, no bins of scores.

Each takes `average` and `name`; the rules for 0/0 and for absent classes are told in `jaxheads.metrics`. A soft label y
counts as weight y positive and 1 - y negative, here too.

>>> import jax.numpy as jnp
>>> import jaxheads as jh
>>> head = jh.BinaryClassHead().with_metrics(jh.metrics.BrierScore(), jh.metrics.ExpectedCalibrationError())
>>> labels, p = jnp.array([1, 0, 0, 0]), jnp.array([[0.75], [0.25], [0.25], [0.25]])
>>> values = head.measure(labels=labels, logits=jnp.log(p / (1 - p))).compute()
>>> print(f"{values['brier_score']:.4f} {values['expected_calibration_error']:.2f}")
0.0625 0.25
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxheads.metrics.base import CONFUSION, WHOLE, Observation, View, calibration_key
from jaxheads.metrics.scored import AbstractScoreMetric
from jaxheads.numerics import brief, inputs, masking
from jaxheads.numerics.edges import edges_of
from jaxheads.numerics.histograms import histogram


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassMeans(Observation):
    """Sums of `a v`, of `a` and of `a y` for each class: a mean, and its weights.

    Args:
        values: one value an entry, `[..., c]`.
        labels: float `[..., c]` in [0, 1].
        names: the names of the entries of the last axis.
    """

    values: Any
    labels: Any
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def size(self) -> int:
        """Three sums a class."""
        return 3 * len(self.names)

    def reduce(self, weights: jax.Array) -> jax.Array:
        """Returns the weighted sums of this batch, then the weights, then those of the positives."""
        values = jnp.asarray(self.values, jnp.float32)
        weights = weights * masking.ones_like(values)
        three = (masking.weighted(values, weights), weights, masking.weighted(self.labels, weights))
        if len(self.names) == 1:
            return jnp.stack([masking.total(x) for x in three])
        return jnp.concatenate([masking.column_totals(x) for x in three])

    def read(self, sums: Any, xp: Any, undefined: float) -> "ClassMeansView":
        """Returns the means, of all classes and of each."""
        three = sums.reshape((*sums.shape[:-1], 3, len(self.names)))
        weighted, total, support = (three[..., i, :] for i in range(3))
        # Else a mean over classes would take a NaN for a class that is absent.
        total = xp.where(xp.isnan(weighted), weighted, total)
        each = ClassMeansView(xp, undefined, self.names, weighted, total, support)
        return ClassMeansView(xp, undefined, self.names, weighted.sum(-1), total.sum(-1), support.sum(-1), each)


@dataclasses.dataclass(frozen=True)
class ClassMeansView(View):
    """Means that can be read: of all entries, and with the classes on a last axis."""

    names: tuple[str, ...]
    weighted: Any
    total: Any
    support: Any
    each: "ClassMeansView | None" = None

    def by_class(self) -> Any:
        """Returns the view of all classes at once: every value has them on a last axis."""
        return self.each

    @property
    def mean(self) -> Any:
        """The weighted mean."""
        return self.ratio(self.weighted, self.total)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CalibrationBins(Observation):
    """Sums of `a`, `a p` and `a y` by class and by equal steps of the probability p. Each step holds its upper end.

    Args:
        labels: float `[..., c]` in [0, 1].
        logits: float `[..., c]`.
        bins: the number of steps.
        names: the names of the entries of the last axis.
    """

    labels: Any
    logits: Any
    bins: int = dataclasses.field(metadata={"static": True})
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def size(self) -> int:
        """Three sums a class and step."""
        return 3 * len(self.names) * self.bins

    def reduce(self, weights: jax.Array) -> jax.Array:
        """Returns the three sums of each step, in one pass over the entries."""
        p = jax.nn.sigmoid(jnp.asarray(self.logits, jnp.float32))
        weights = weights * masking.ones_like(p)
        # A NaN belongs to no step. It must show, so it makes one of the steps NaN.
        weights = jnp.where(jnp.isnan(p) & (weights != 0), p, weights)
        edges = edges_of(tuple(k / self.bins for k in range(1, self.bins)))
        three = (weights, masking.weighted(p, weights), masking.weighted(self.labels, weights))
        columns = list(range(len(self.names))) if len(self.names) > 1 else None
        return histogram(edges.locate(p), three, self.bins, columns).ravel()

    def read(self, sums: Any, xp: Any, undefined: float) -> "CalibrationView":
        """Returns the steps, of all classes and of each."""
        three = sums.reshape((*sums.shape[:-1], 3, len(self.names), self.bins))
        weight, predicted, observed = (three[..., i, :, :] for i in range(3))
        each = CalibrationView(xp, undefined, self.names, weight, predicted, observed)
        return CalibrationView(xp, undefined, self.names, weight.sum(-2), predicted.sum(-2), observed.sum(-2), each)


@dataclasses.dataclass(frozen=True)
class CalibrationView(View):
    """Calibration by steps of probability (on the last axis) that can be read."""

    names: tuple[str, ...]
    weight: Any
    predicted: Any
    observed: Any
    each: "CalibrationView | None" = None

    def by_class(self) -> Any:
        """Returns the view of all classes at once: every value has them on a last axis."""
        return self.each

    def of_class(self, column: int) -> "CalibrationView":
        """Returns the view of one class."""
        each: Any = self.each
        own = (x[..., column, :] for x in (each.weight, each.predicted, each.observed))
        return CalibrationView(self.xp, self.undefined, (self.names[column],), *own)

    @property
    def total(self) -> Any:
        """The weight of all entries."""
        return self.weight.sum(-1)

    @property
    def support(self) -> Any:
        """The weight of the positives."""
        return self.observed.sum(-1)

    def error(self, norm: str) -> Any:
        """Returns the distance between mean probability and frequency over the steps, by their weight.

        `"l1"` is its mean, `"l2"` the root of its mean square, `"max"` the largest.
        """
        xp, plain = self.xp, self.zeroed()
        gaps = xp.abs(self.predicted - self.observed)
        if norm == "l1":
            return self.ratio(gaps.sum(-1), self.total)
        distance = plain.ratio(gaps, self.weight)
        value = distance.max(-1) if norm == "max" else xp.sqrt(plain.ratio((gaps * distance).sum(-1), self.total))
        return xp.where(self.total == 0, xp.full_like(value, self.undefined), value)

    def curve(self) -> tuple[Any, Any, Any]:
        """Returns `predicted, observed, weight` of each step: mean probability, frequency; undefined if it is empty."""
        return self.ratio(self.predicted, self.weight), self.ratio(self.observed, self.weight), self.weight

    def reliability(self) -> tuple[Any, Any, Any]:
        """Returns the same of the steps that are not empty, for a single state on the host."""
        predicted, observed, weight = self.curve()
        held = weight > 0
        return predicted[held], observed[held], weight[held]


@dataclasses.dataclass(frozen=True)
class AbstractSumsMetric(AbstractScoreMetric):
    """A metric with sums of its own, of the scores in its head's histogram."""

    def observe(
        self, labels: Any, logits: jax.Array, sources: Mapping[str, Callable[[], Observation]]
    ) -> Mapping[str, Observation]:
        scores = self.check_classes(self.made(sources))
        one_of_many = self.average == "micro" and CONFUSION in sources
        whole = self.whole(scores, sources[CONFUSION]()) if one_of_many else None
        return {self.kept: self.sums(scores)} if whole is None else {self._kept_whole: whole}

    @property
    def kept(self) -> str:
        """The key under which the sums are accumulated."""
        return self.stem

    @abc.abstractmethod
    def sums(self, scores: Any) -> Observation:
        """Returns the observation that is accumulated, for every average alike."""

    def whole(self, scores: Any, decided: Any) -> Observation | None:
        """Returns the observation of all classes together, if they exclude each other; None: entries are examples.

        Args:
            scores: the scores of each class against all others.
            decided: the `ConfusionTable`.
        """
        return None

    @property
    def _kept_whole(self) -> str:
        return f"{self.kept}{WHOLE}"

    def summarize(self, seen: Mapping[str, Any]) -> Mapping[str, Any]:
        by_row = self.average == "micro" and self._kept_whole in seen
        return self.values(seen[self._kept_whole if by_row else self.kept])


@dataclasses.dataclass(frozen=True)
class AbstractClassMean(AbstractSumsMetric):
    """A weighted mean of one value an entry."""

    def sums(self, scores: Any) -> Observation:
        labels = _take_labels(scores)
        return ClassMeans(self.entries(labels, scores.logits), labels, scores.class_names)

    def whole(self, scores: Any, decided: Any) -> Observation | None:
        row = self.of_row(_take_labels(scores), scores.logits)
        return None if row is None else ClassMeans(row, masking.ones_like(row), ("all",))

    def of_row(self, labels: jax.Array, logits: jax.Array) -> jax.Array | None:
        """Returns one value a row, `[..., 1]`, of classes that exclude each other; None if only entries have one."""
        return None

    @abc.abstractmethod
    def entries(self, labels: jax.Array, logits: jax.Array) -> jax.Array:
        """Returns one value an entry, `[..., c]`."""

    def read(self, view: ClassMeansView) -> Any:
        return view.mean


@dataclasses.dataclass(frozen=True)
class BrierScore(AbstractClassMean):
    """`brier_score`, the mean of `y (1 - p)^2 + (1 - y) p^2`: for labels 0 and 1, of `(y - p)^2`.

    For a `MultiClassHead` it is the mean over rows of `sum_k (y_k - p_k)^2`; by class, that of each against all others.
    Undefined without data. Source: `brier_score_loss`.
    """

    stem = "brier_score"
    higher_is_better = False

    def entries(self, labels: jax.Array, logits: jax.Array) -> jax.Array:
        # sigmoid(-z) is 1 - p, also where that is small.
        return labels * jax.nn.sigmoid(-logits) ** 2 + (1 - labels) * jax.nn.sigmoid(logits) ** 2

    def of_row(self, labels: jax.Array, logits: jax.Array) -> jax.Array:
        return self.entries(labels, logits).sum(-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class LogLoss(AbstractClassMean):
    """`log_loss`, the mean of `-y ln p - (1 - y) ln(1 - p)`, for any loss that the head is trained on.

    The `average_loss` of a `BinaryClassHead` and of a `MultiLabelHead` without `loss_fn` is the same; this metric is
    for heads with a loss of their own, and for values by class. For a `MultiClassHead` it is the mean of `-ln p_y`; by
    class, that of each against all others. Undefined without data. Source: `log_loss`.
    """

    stem = "log_loss"
    higher_is_better = False

    def entries(self, labels: jax.Array, logits: jax.Array) -> jax.Array:
        # Masked, for at a logit of inf one of the terms is 0 times inf.
        right = masking.weighted(jax.nn.softplus(-logits), labels)
        return right + masking.weighted(jax.nn.softplus(logits), 1 - labels)

    def of_row(self, labels: jax.Array, logits: jax.Array) -> jax.Array:
        return masking.weighted(jax.nn.softplus(-logits), labels).sum(-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class BaseRate(AbstractClassMean):
    """`base_rate`, the mean of the labels: the share of positives, and the precision of guessing.

    Undefined without data.
    """

    stem = "base_rate"

    def entries(self, labels: jax.Array, logits: jax.Array) -> jax.Array:
        return labels


@dataclasses.dataclass(frozen=True)
class ExpectedCalibrationError(AbstractSumsMetric):
    """`expected_calibration_error`, the sum over equal steps of p of `|sum a p - sum a y|`, divided by `sum a`.

    It is exact for its steps, whatever the bins of the scores. For a `MultiClassHead`, p is the probability of the
    predicted class, and y is 1 if that class is right (Guo et al. 2017); by class, each is taken against all others.
    Undefined without data. Source: Naeini et al. (2015); scikit-learn's `calibration_curve` has the same steps.
    `metrics.reliability(bins)` gives its curve.

    With d, the distance between mean probability and frequency in a step, this is the mean of d, each step by its
    weight: `norm="l1"`. `norm="l2"` is `expected_calibration_error_l2`, the root of the mean of d^2 (Kumar et al. 2019;
    no bias is subtracted). `norm="max"` is `expected_calibration_error_max`, the largest d of any step with data,
    however little: the maximum calibration error, MCE.

    It is a sum of distances: chance alone lifts it above 0, most where a step or a slice holds little, and in every
    bootstrap replica once more. So read its intervals as upper ones (Kumar et al. 2019).

    Args:
        bins: the number of steps, at least 2.
        norm: `"l1"`, `"l2"` or `"max"`. All norms share their sums.

    Raises:
        ValueError: fewer than 2 bins, another norm.
    """

    bins: int = 15
    norm: Literal["l1", "l2", "max"] = dataclasses.field(default="l1", kw_only=True)

    stem = "expected_calibration_error"
    higher_is_better = False

    def __post_init__(self):
        super().__post_init__()
        if self.norm is None or not brief.is_one_of(self.norm, ("l1", "l2", "max")):
            raise ValueError(
                f'ExpectedCalibrationError: norm must be "l1", "l2" or "max". Given {brief.tell(self.norm)}.'
            )
        if not inputs.is_integer(self.bins, 2):
            raise ValueError(f"ExpectedCalibrationError: bins must be an integer of at least 2. Given {self.bins!r}.")
        object.__setattr__(self, "bins", int(self.bins))

    @property
    def key(self) -> str:
        return self.stem if self.norm == "l1" else f"{self.stem}_{self.norm}"

    @property
    def kept(self) -> str:
        return calibration_key(self.bins)

    def sums(self, scores: Any) -> Observation:
        return CalibrationBins(_take_labels(scores), scores.logits, self.bins, scores.class_names)

    def whole(self, scores: Any, decided: Any) -> Observation:
        largest = scores.logits.max(-1, keepdims=True)
        return CalibrationBins(decided.share_right, largest, self.bins, ("all",))

    def read(self, view: CalibrationView) -> Any:
        return view.error(self.norm)


def _take_labels(scores: Any) -> jax.Array:
    """Returns the labels of scores, one for each of their entries."""
    return jnp.asarray(scores.labels, jnp.float32) * masking.ones_like(scores.logits)
