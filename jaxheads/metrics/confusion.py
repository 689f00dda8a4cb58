"""The confusion matrix: weights by class and predicted class, and what it tells."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.metrics.base import Observation, View
from jaxheads.metrics.outcomes import Outcomes
from jaxheads.numerics import masking
from jaxheads.numerics.histograms import histogram


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConfusionTable(Observation):
    """Weights by label and predicted class, `[n, n + 1]`.

    The last column is of rows with a NaN, for which nothing is predicted. No prediction is right there: to every metric
    they are misses of their class, and hits of none.

    Args:
        pairs: `label * (n + 1) + predicted`, int32 `[..., 1]`: one number, for in large batches each row keeps it.
        names: of the n classes, as the keys of metrics show them.
    """

    pairs: Any
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, labels: Any, predicted: Any, names: tuple[str, ...]) -> "ConfusionTable":
        """From class ids, int32 `[..., 1]`; what is predicted is n for none."""
        return cls(labels * np.int32(len(names) + 1) + predicted, names)

    @property
    def right(self) -> jax.Array:
        """Whether the label is predicted, bool `[..., 1]`."""
        n = np.int32(len(self.names) + 1)
        return self.pairs // n == self.pairs % n

    @property
    def size(self) -> int:
        """A sum for each pair."""
        return len(self.names) * (len(self.names) + 1)

    @property
    def is_late(self) -> bool:
        """Of many classes the table is larger than a tile of rows."""
        return self.size >= 2**14

    def reduce(self, weights: jax.Array) -> jax.Array:
        """One number says the pair, so that one histogram counts them."""
        return histogram(self.pairs, (jnp.asarray(weights, jnp.float32),), self.size).ravel()

    def reduce_by(self, weights: jax.Array, groups: Any) -> jax.Array:
        """Where groups do not overlap, the number says the group too."""
        if groups.ids is None:
            return super().reduce_by(weights, groups)
        weights = masking.keep(groups.ids >= 0, jnp.asarray(weights, jnp.float32), 0)
        keys = jnp.maximum(groups.ids, 0) * np.int32(self.size) + self.pairs
        return histogram(keys, (weights,), groups.n * self.size).reshape(groups.n, self.size)

    def read(self, sums: Any, xp: Any, undefined: float) -> "ConfusionView":
        """The matrix, with the metrics that it tells."""
        n = len(self.names)
        return ConfusionView(xp, undefined, sums.reshape((*sums.shape[:-1], n, n + 1)), self.names)


@dataclasses.dataclass(frozen=True)
class ConfusionView(View):
    """A confusion matrix that can be read.

    Attributes:
        table: the weights `[..., n, n + 1]`, as `ConfusionTable` has them.
        names: of the classes.
        apart: whether outcomes are of each class against all others, or of all classes together.
    """

    table: Any
    names: tuple[str, ...]
    apart: bool = False

    @property
    def matrix(self) -> Any:
        """Weights by label (rows) and predicted class (columns), `[..., n, n]`."""
        return self.table[..., :-1]

    @functools.cached_property
    def support(self) -> Any:
        """The weight of the labels of each class, `[..., n]`."""
        return self.table.sum(-1)

    @property
    def total(self) -> Any:
        """The weight of all rows."""
        return self.table.sum((-2, -1))[..., None] if self.apart else self.table.sum((-2, -1))

    def by_class(self) -> "ConfusionView":
        """Of which outcomes have the classes on a last axis."""
        return dataclasses.replace(self, apart=True)

    def at_zero(self) -> Outcomes:
        """The outcomes where positive means predicted: in a row with n classes, one is and n - 1 are not."""
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
        n = len(self.names)
        hits = self.table[..., np.arange(n), np.arange(n)]
        wrong = self.table * self._make_constant(1 - np.eye(n, n + 1))
        false_positives, false_negatives = wrong[..., :-1].sum(-2), wrong.sum(-1)
        missed = self.xp.maximum(wrong.sum((-2, -1))[..., None] - false_positives - false_negatives, 0.0)
        right = (hits[..., None, :] * self._make_constant(1 - np.eye(n))).sum(-1)
        return hits, false_positives, false_negatives, right + missed

    def balanced_accuracy(self) -> Any:
        """The mean recall of the classes that have labels."""
        hits, _, missed, _ = self._four
        return self.mean_over(self.ratio(hits, hits + missed), self.support > 0)

    def kappa(self, weights: str | None) -> Any:
        """`1 - sum(w_ij O_ij) / sum(w_ij E_ij)`, with E what labels and predictions would give if independent.

        A row without a prediction is as wrong as can be.
        """
        n = len(self.names)
        steps = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
        steps = {None: steps > 0, "linear": steps, "quadratic": steps**2}[weights]
        cost = self._make_constant(np.concatenate([steps, np.full((n, 1), steps.max())], 1))
        labels, predicted = self._divide_by_total(self.support), self._divide_by_total(self.table.sum(-2))
        observed = self._divide_by_total((cost * self.table).sum((-2, -1))[..., None])[..., 0]
        expected = (cost * (labels[..., :, None] * predicted[..., None, :])).sum((-2, -1))
        return self.ratio(expected - observed, expected)

    def matthews_corrcoef(self) -> Any:
        """Gorodkin's R_K, the correlation of labels and predictions as one-hot vectors."""
        # sum_k (c_kk - t_k p_k) of shares is TP TN - FP FN of each class: what is common has cancelled already.
        tp, fp, fn, tn = map(self._divide_by_total, self._four)
        covariance = (tp * tn - fp * fn).sum(-1)

        def variance(shares: Any) -> Any:
            # sum_k s_k (1 - s_k), as a sum over pairs of classes.
            pairs = shares[..., :, None] * shares[..., None, :]
            return (pairs * self._make_constant(1 - np.eye(shares.shape[-1]))).sum((-2, -1))

        root = self.xp.sqrt
        labels, predicted = (variance(self._divide_by_total(x)) for x in (self.support, self.table.sum(-2)))
        return self.ratio(covariance, root(labels) * root(predicted))

    def _make_constant(self, array: np.ndarray) -> Any:
        """A constant `[a, b]` beside the table."""
        return self.xp.asarray(array[(None,) * (self.table.ndim - 2)], self.table.dtype)

    def _divide_by_total(self, sums: Any) -> Any:
        """Weights `[..., k]` as parts of the whole: products of weights themselves may be no float32."""
        return dataclasses.replace(self, undefined=0.0).ratio(sums, self.by_class().total)


@dataclasses.dataclass(frozen=True)
class MultiClassOutcomes(Outcomes):
    """The outcomes of all classes together; what is more than a ratio of them is read from the confusion matrix.

    Their precision, recall and F are all the accuracy of the head, where every row has a prediction.
    """

    confusion: ConfusionView

    @property
    def accuracy(self) -> Any:
        """How often the label is predicted: a row counts once, not once a class."""
        return self.ratio(self.true_positives, self.confusion.total)

    @property
    def balanced_accuracy(self) -> Any:
        """The mean recall of the classes that have labels."""
        return self.confusion.balanced_accuracy()

    @property
    def matthews_corrcoef(self) -> Any:
        """Gorodkin's R_K."""
        return self.confusion.matthews_corrcoef()

    @property
    def cohen_kappa(self) -> Any:
        """Agreement beyond that of chance."""
        return self.kappa(None)

    def kappa(self, weights: str | None) -> Any:
        """Agreement beyond that of chance, where errors weigh as `weights` says."""
        return self.confusion.kappa(weights)
