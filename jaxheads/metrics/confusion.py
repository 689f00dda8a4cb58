"""Decisions for one of many classes: weights by label and predicted class, of all pairs or in three sums a class."""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.metrics.base import CONFUSION, COUNTS, Observation, View
from jaxheads.metrics.outcomes import Normalize, Outcomes, divide_matrix
from jaxheads.numerics import masking
from jaxheads.numerics.histograms import histogram

# A table of more classes than this is refused. The state of 4,096 classes takes 134 MB.
MOST_CLASSES = 4096


class Counted(Observation):
    """Rows with one label each, or with shares of several, to be counted by class."""

    shares: Any

    @property
    def is_late(self) -> bool:
        """Tells whether there are more sums than a tile has rows: it then costs least to fill them once."""
        return self.size >= 2**14

    def reduce(self, weights: jax.Array) -> jax.Array:
        """Returns the sums of this batch."""
        return self.count(self._weigh(weights), np.int32(0), 1).ravel()

    def reduce_by(self, weights: jax.Array, groups: Any) -> jax.Array:
        """Returns the sums of each group. Where groups do not overlap, all are counted at once."""
        if groups.ids is None:
            return super().reduce_by(weights, groups)
        weights = masking.keep(groups.ids >= 0, jnp.asarray(weights, jnp.float32), 0)
        return self.count(self._weigh(weights), jnp.maximum(groups.ids, 0), groups.n)

    def _weigh(self, weights: jax.Array) -> jax.Array:
        """Returns the weight of each label."""
        weights = jnp.asarray(weights, jnp.float32)
        return weights if self.shares is None else masking.weighted(self.shares, weights)

    @abc.abstractmethod
    def count(self, weights: jax.Array, groups: Any, n: int) -> jax.Array:
        """Returns the sums of each of `n` groups, `[n, size]`."""


@dataclasses.dataclass(frozen=True)
class Decisions(Counted):
    """Decisions for one of many classes.

    Args:
        labels: class ids, int32 `[..., 1]`; or `[..., d]`, where a row has d labels.
        predicted: class ids of the same shape; n where nothing is predicted.
        names: the names of the n classes, as the keys of metrics show them.
        shares: how often each of d labels counts, `[..., d]`; None for once.
    """

    labels: Any
    predicted: Any
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    shares: Any = None

    @property
    def right(self) -> jax.Array:
        """Whether each label is predicted, bool of the shape of the labels."""
        return self.labels == self.predicted

    @property
    def share_right(self) -> jax.Array:
        """The share of the labels of a row that is predicted, float32 `[..., 1]`."""
        right = self.right.astype(jnp.float32)
        return right if self.shares is None else jnp.sum(masking.weighted(self.shares, right), -1, keepdims=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConfusionTable(Decisions):
    """Weights by label and predicted class, `[n, n + 1]`.

    The last column is for rows with a NaN, which have no prediction. To every metric they are misses of their class,
    and hits of none.
    """

    @property
    def size(self) -> int:
        """A sum for each pair."""
        return len(self.names) * (len(self.names) + 1)

    def check(self, what: str, lead: tuple[int, ...]) -> None:
        """Refuses also a table of too many classes."""
        super().check(what, lead)
        if (n := len(self.names)) > MOST_CLASSES:
            raise ValueError(
                f"{what} is a table of all pairs of {n} classes: {self.size * 8 / 1e9:.1f} GB of state. The most is "
                f"{MOST_CLASSES} classes. Leave out jh.metrics.ConfusionMatrix and a CohenKappa with weights. "
                "Precision, Recall, FBeta, IoU, Support and their like keep three sums a class."
            )

    def count(self, weights: jax.Array, groups: Any, n: int) -> jax.Array:
        """Counts the pairs in one histogram: one number tells the group and the pair."""
        pairs = self.labels * np.int32(len(self.names) + 1) + self.predicted
        return histogram(groups * np.int32(self.size) + pairs, (weights,), n * self.size).reshape(n, self.size)

    def read(self, sums: Any, xp: Any, undefined: float) -> "ConfusionView":
        """Returns the matrix, with the metrics that it tells."""
        n = len(self.names)
        table = sums.reshape((*sums.shape[:-1], n, n + 1))
        wrong = table * _make_constant(1 - np.eye(n, n + 1), table, xp)
        hits = table[..., np.arange(n), np.arange(n)]
        return ConfusionView(xp, undefined, hits, wrong[..., :-1].sum(-2), wrong.sum(-1), self.names, table=table)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassCounts(Decisions):
    """Three weights for each class, `[3, n]`: of its hits, of rows predicted as it by mistake, and of its misses.

    They tell all that a decision for or against each class tells, and take a state that is linear in n.
    """

    told_by = CONFUSION

    @classmethod
    def of(cls, table: ConfusionTable) -> "ClassCounts":
        """Returns counts of the decisions in a table."""
        return cls(table.labels, table.predicted, table.names, table.shares)

    @staticmethod
    def view(seen: Mapping[str, Any]) -> "ClassesView":
        """Returns the view of the counts, or of the table that is kept in their place."""
        return seen[COUNTS if COUNTS in seen else CONFUSION]

    @property
    def size(self) -> int:
        """Three sums a class."""
        return 3 * len(self.names)

    def count(self, weights: jax.Array, groups: Any, n: int) -> jax.Array:
        """Counts by label, and by prediction, in two histograms."""
        k = len(self.names)
        hits, misses = masking.keep(self.right, weights, 0), masking.keep(~self.right, weights, 0)
        mistaken, first = masking.keep(self.predicted < np.int32(k), misses, 0), groups * np.int32(k)
        by_label = histogram(self.labels + first, (hits, misses), n * k)[:, 0]
        by_prediction = histogram(jnp.minimum(self.predicted, np.int32(k - 1)) + first, (mistaken,), n * k)[:, 0]
        counts = jnp.stack([by_label[0], by_prediction[0], by_label[1]])
        return jnp.moveaxis(counts.reshape(3, n, k), 1, 0).reshape(n, self.size)

    def read(self, sums: Any, xp: Any, undefined: float) -> "ClassesView":
        """Returns the counts, with the metrics that they tell."""
        three = sums.reshape((*sums.shape[:-1], 3, len(self.names)))
        hits, false_positives, false_negatives = (three[..., i, :] for i in range(3))
        return ClassesView(xp, undefined, hits, false_positives, false_negatives, self.names)


@dataclasses.dataclass(frozen=True)
class ClassesView(View):
    """Decisions for one of many classes that can be read.

    Attributes:
        hits: the weight of the rows of each class that are predicted as such, `[..., n]`.
        false_positives: the weight of other rows that are predicted as the class.
        false_negatives: the weight of the rows of the class that are not predicted as such.
        names: the names of the classes.
        apart: whether outcomes are of each class against all others, or of all classes together.
    """

    hits: Any
    false_positives: Any
    false_negatives: Any
    names: tuple[str, ...]
    apart: bool = False

    @functools.cached_property
    def support(self) -> Any:
        """The weight of the labels of each class, `[..., n]`."""
        return self.hits + self.false_negatives

    @property
    def total(self) -> Any:
        """The weight of all rows."""
        return self.support.sum(-1)[..., None] if self.apart else self.support.sum(-1)

    def by_class(self) -> "ClassesView":
        """Returns the same view, with outcomes that have the classes on a last axis."""
        return dataclasses.replace(self, apart=True)

    def at_zero(self) -> Outcomes:
        """Returns the outcomes where positive means predicted: in a row with n classes, one is and n - 1 are not."""
        if self.apart:
            return Outcomes(self.xp, self.undefined, *self._four)
        tp, fp, fn, tn = (x.sum(-1) for x in self._four)
        return MultiClassOutcomes(self.xp, self.undefined, tp, fp, fn, tn, self)

    @functools.cached_property
    def _four(self) -> tuple[Any, Any, Any, Any]:
        """True and false positives, false and true negatives of each class.

        True negatives are put together from parts that do not cancel: in float32 a difference of large sums would lose
        the small classes.
        """
        missed = self._sum_others(self.false_negatives) - self.false_positives
        negatives = self._sum_others(self.hits) + self.xp.maximum(missed, 0.0)
        return self.hits, self.false_positives, self.false_negatives, negatives

    def balanced_accuracy(self) -> Any:
        """Returns the mean recall of the classes that have labels."""
        return self.mean_over(self.ratio(self.hits, self.support), self.support > 0)

    def kappa(self, weights: str | None) -> Any:
        """Returns `1 - sum(O_ij) / sum(E_ij)` over i and j that differ; E is O for independent labels and predictions.

        A row without a prediction is as wrong as can be.
        """
        labels, predicted = self._divide_by_total(self.support), self._share_predictions()
        observed = self._divide_by_total(self.false_negatives).sum(-1)
        expected = (labels * (self._sum_others(predicted[..., :-1]) + predicted[..., -1:])).sum(-1)
        return self.ratio(expected - observed, expected)

    def matthews_corrcoef(self) -> Any:
        """Returns Gorodkin's R_K, the correlation of labels and predictions as one-hot vectors."""
        # sum_k (c_kk - t_k p_k) of shares is TP TN - FP FN of each class: the common part has cancelled already.
        tp, fp, fn, tn = map(self._divide_by_total, self._four)
        root = self.xp.sqrt
        # sum_k s_k (1 - s_k) of the shares of labels, and of predictions.
        both = (self._divide_by_total(self.support), self._share_predictions())
        labels, predicted = ((shares * self._sum_others(shares)).sum(-1) for shares in both)
        return self.ratio((tp * tn - fp * fn).sum(-1), root(labels) * root(predicted))

    def _share_predictions(self) -> Any:
        """Returns the share of each predicted class, and of rows without a prediction, `[..., n + 1]`."""
        predicted = self.hits + self.false_positives
        none = self.xp.maximum(self.support.sum(-1) - predicted.sum(-1), 0.0)
        return self._divide_by_total(self.xp.concatenate([predicted, none[..., None]], -1))

    def _sum_others(self, x: Any) -> Any:
        """Returns, for each entry of the last axis, the sum of all others, without a difference."""
        xp = self.xp
        zero = xp.zeros_like(x[..., :1])
        before = xp.concatenate([zero, xp.cumsum(x[..., :-1], -1)], -1)
        after = xp.flip(xp.concatenate([zero, xp.cumsum(xp.flip(x, -1)[..., :-1], -1)], -1), -1)
        return before + after

    def _divide_by_total(self, sums: Any) -> Any:
        """Returns weights `[..., k]` as parts of the whole: products of weights may leave the range of float32."""
        return self.zeroed().ratio(sums, self.by_class().total)


@dataclasses.dataclass(frozen=True)
class ConfusionView(ClassesView):
    """A confusion matrix that can be read.

    Attributes:
        table: the weights `[..., n, n + 1]`, as `ConfusionTable` has them.
    """

    table: Any = None

    @property
    def matrix(self) -> Any:
        """Weights by label (rows) and predicted class (columns), `[..., n, n]`."""
        return self.table[..., :-1]

    def normalized(self, by: Normalize) -> Any:
        """Returns the matrix, as it is, or as parts of the sums that `by` names."""
        return divide_matrix(self, self.matrix, self.support, self.total, by)

    def kappa(self, weights: str | None) -> Any:
        """Returns `1 - sum(w_ij O_ij) / sum(w_ij E_ij)`; E is O for independent labels and predictions.

        A row without a prediction is as wrong as can be.
        """
        if weights is None:
            return super().kappa(None)
        n = len(self.names)
        steps = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
        steps = {"linear": steps, "quadratic": steps**2}[weights]
        cost = _make_constant(np.concatenate([steps, np.full((n, 1), steps.max())], 1), self.table, self.xp)
        labels, predicted = self._divide_by_total(self.support), self._divide_by_total(self.table.sum(-2))
        observed = self._divide_by_total((cost * self.table).sum((-2, -1))[..., None])[..., 0]
        expected = (cost * (labels[..., :, None] * predicted[..., None, :])).sum((-2, -1))
        return self.ratio(expected - observed, expected)


def _make_constant(array: np.ndarray, table: Any, xp: Any) -> Any:
    """Returns a constant `[a, b]` with as many axes as a table."""
    return xp.asarray(array[(None,) * (table.ndim - 2)], table.dtype)


@dataclasses.dataclass(frozen=True)
class MultiClassOutcomes(Outcomes):
    """The outcomes of all classes together. A metric that is no ratio of them is read from the counts of each class.

    Their precision, recall and F are all the accuracy of the head, where every row has a prediction.
    """

    classes: ClassesView

    @property
    def accuracy(self) -> Any:
        """The share of rows whose label is predicted: a row counts once, not once a class."""
        return self.ratio(self.true_positives, self.classes.total)

    @property
    def hamming_loss(self) -> Any:
        """The share of rows whose label is not predicted."""
        return self.ratio(self.false_negatives, self.classes.total)

    @property
    def balanced_accuracy(self) -> Any:
        """The mean recall of the classes that have labels."""
        return self.classes.balanced_accuracy()

    @property
    def matthews_corrcoef(self) -> Any:
        """Gorodkin's R_K."""
        return self.classes.matthews_corrcoef()

    @property
    def cohen_kappa(self) -> Any:
        """Agreement beyond that of chance."""
        return self.kappa(None)

    def kappa(self, weights: str | None) -> Any:
        """Returns the agreement beyond that of chance, where errors weigh as `weights` says."""
        return self.classes.kappa(weights)
