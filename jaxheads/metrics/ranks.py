"""The rank of each row's label among the classes: top-k accuracy, any number of k in one pass."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.metrics.base import RANKS, AbstractSourceMetric, Observation, View
from jaxheads.numerics import inputs, masking


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ranks(Observation):
    """The weight of rows whose label is among the k best, for several k, and of all rows.

    Args:
        ranks: how many classes come before that of the label, `[..., 1]`; or before each class, `[..., n]`.
        n_classes: the number of classes, which no k may exceed.
        ks: the numbers k.
        shares: how often each of the n classes counts as the label, `[..., n]`; None for one label.
    """

    ranks: Any
    n_classes: int = dataclasses.field(metadata={"static": True})
    ks: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    shares: Any = None

    only_sums = True

    @property
    def size(self) -> int:
        """A sum for each k, and the weight."""
        return len(self.ks) + 1

    def join(self, other: Observation) -> "Ranks":
        """Returns ranks with all k of both."""
        if not isinstance(other, Ranks) or other.n_classes != self.n_classes:
            raise ValueError(f"Ranks among {self.n_classes} classes do not join {other}. Rename one.")
        return dataclasses.replace(self, ks=tuple(dict.fromkeys(self.ks + other.ks)))

    def reduce(self, weights: jax.Array) -> jax.Array:
        """Returns the sums of this batch."""
        weights = jnp.asarray(weights, jnp.float32)
        weights = weights if self.shares is None else masking.weighted(self.shares, weights)
        hits = (masking.weighted(self.ranks < k, weights) for k in self.ks)
        return jnp.stack([masking.total(x) for x in (*hits, weights)])

    def read(self, sums: Any, xp: Any, undefined: float) -> "RanksView":
        """Returns the sums, by k."""
        return RanksView(xp, undefined, {k: sums[..., i] for i, k in enumerate(self.ks)}, sums[..., -1])


@dataclasses.dataclass(frozen=True)
class RanksView(View):
    """Top-k hits that can be read: their weight by k, and the weight of all rows."""

    hits: Mapping[int, Any]
    weight: Any


@dataclasses.dataclass(frozen=True)
class TopKAccuracy(AbstractSourceMetric):
    """The share of labels among the k classes with the largest logits: `top_5_accuracy`, undefined without data.

    `sum(a [rank < k]) / sum(a)`, where the rank counts the classes ahead; of equal logits the first class is ahead, as
    in `jax.lax.top_k`. A row with a NaN is a miss. Several k share one pass. Reads the ranks of a `MultiClassHead`.

    Args:
        k: from 1 (which is `accuracy`) to the number of classes.

    Source: `keras.metrics.SparseTopKCategoricalAccuracy`, `sklearn.metrics.top_k_accuracy_score`.

    >>> import jaxheads as jh
    >>> head = jh.MultiClassHead(3).with_metrics(jh.metrics.TopKAccuracy(2))
    >>> head.measure(labels=[1, 2], logits=[[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    Metrics of MultiClassHead(n_classes=3, extra_metrics=(jh.metrics.TopKAccuracy(k=2),))
      average_loss    1.90761
      accuracy        0
      top_2_accuracy  0.5
    """

    k: int = 5

    source = RANKS
    higher_is_better = True

    def __post_init__(self):
        if not inputs.is_integer(self.k, 1):
            raise ValueError(f"TopKAccuracy needs a positive integer k. Given {self.k!r}.")
        object.__setattr__(self, "k", int(self.k))

    def refine(self, observation: Ranks) -> Ranks:
        if self.k > observation.n_classes:
            raise ValueError(f"{self!r} asks for more than there are: {observation.n_classes} classes.")
        return dataclasses.replace(observation, ks=(self.k,))

    def values(self, view: RanksView) -> dict[str, Any]:
        return {f"top_{self.k}_accuracy": view.ratio(view.hits[self.k], view.weight)}
