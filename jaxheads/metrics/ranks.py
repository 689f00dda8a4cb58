"""The rank of each row's label among the classes: top-k accuracy, any number of k in one pass."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.metrics.base import CONFUSION, RANKS, AbstractSourceMetric, Observation, View, join_names
from jaxheads.metrics.confusion import Counted
from jaxheads.numerics import brief, inputs, masking, meshes
from jaxheads.numerics.histograms import histogram

# The key of the ranks by label class.
CLASS_RANKS = f"{RANKS}/classes"


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
    """Top-k hits that can be read: their weight by k, and the weight of all rows; of each class, if it has `names`."""

    hits: Mapping[int, Any]
    weight: Any
    names: tuple[str, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassRanks(Counted):
    """The weights that `Ranks` keeps, for the rows of each label class: `[len(ks) + 1, n]`.

    Args:
        labels: class ids, int32 `[..., 1]`.
        ranks: how many classes come before that of the label, of the same shape.
        names: the names of the n classes.
        ks: the numbers k.
        shares: as `Decisions` have them.
    """

    labels: Any
    ranks: Any
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    ks: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    shares: Any = None

    @property
    def size(self) -> int:
        """A sum for each k, and the weight, of each class."""
        return (len(self.ks) + 1) * len(self.names)

    def join(self, other: Observation) -> "ClassRanks":
        """Returns ranks with all k of both."""
        if not isinstance(other, ClassRanks) or other.names != self.names:
            raise ValueError(f"Ranks among {len(self.names)} classes do not join {other}. Rename one.")
        return dataclasses.replace(self, ks=tuple(dict.fromkeys(self.ks + other.ks)))

    def count(self, weights: jax.Array, groups: Any, n: int) -> jax.Array:
        """Counts the rows of each label in one histogram, with all k."""
        k = len(self.names)
        hits = [masking.keep(self.ranks < each, weights, 0) for each in self.ks]
        sums = histogram(self.labels + groups * np.int32(k), [*hits, weights], n * k)[:, 0]
        return jnp.moveaxis(sums.reshape(-1, n, k), 1, 0).reshape(n, self.size)

    def read(self, sums: Any, xp: Any, undefined: float) -> "RanksView":
        """Returns the sums, by k, with the classes on a last axis."""
        each = sums.reshape((*sums.shape[:-1], len(self.ks) + 1, len(self.names)))
        return RanksView(
            xp, undefined, {k: each[..., i, :] for i, k in enumerate(self.ks)}, each[..., -1, :], self.names
        )


@dataclasses.dataclass(frozen=True)
class TopKAccuracy(AbstractSourceMetric):
    """The share of labels among the k classes with the largest logits: `top_5_accuracy`, undefined without data.

    `sum(a [rank < k]) / sum(a)`, where the rank counts the classes ahead; of equal logits the first class is ahead, as
    in `jax.lax.top_k`. A row with a NaN is a miss. Several k share one pass. Reads the ranks of a `MultiClassHead`.

    With `average=None` it is that share of the rows of each label class, `top_5_accuracy/CLASS`: the recall of the
    class within the top k. `average="macro"` is the mean of these over the classes that have labels,
    `top_5_accuracy_macro`. Their mean by support is `top_5_accuracy` itself.

    Args:
        k: from 1 (which is `accuracy`) to the number of classes.
        average: `"micro"`, of all rows; None, of each class; `"macro"`, the mean over classes.

    Raises:
        ValueError: a k outside this range, another average, a head without ranks.

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
    average: Literal["micro", "macro"] | None = dataclasses.field(default="micro", kw_only=True)

    source = RANKS
    higher_is_better = True

    def __post_init__(self):
        if not brief.is_one_of(self.average, ("micro", "macro", None)):
            raise ValueError(
                f'TopKAccuracy: average must be "micro", "macro" or None. Given {brief.tell(self.average)}.'
            )
        if not inputs.is_integer(self.k, 1):
            raise ValueError(f"TopKAccuracy needs a positive integer k. Given {self.k!r}.")
        object.__setattr__(self, "k", int(self.k))

    def observe(
        self, labels: Any, logits: jax.Array, sources: Mapping[str, Callable[[], Observation]]
    ) -> Mapping[str, Observation]:
        ranks: Ranks = self.refine(self.made(sources))
        if self.average == "micro":
            return {RANKS: ranks}
        if CONFUSION not in sources:
            raise ValueError(f"{self!r} needs the label of each row, from {CONFUSION!r}. Given {sorted(sources)}.")
        decided: Any = sources[CONFUSION]()
        return {
            CLASS_RANKS: ClassRanks(
                meshes.whole_rows(decided.labels), ranks.ranks, decided.names, ranks.ks, ranks.shares
            )
        }

    def summarize(self, seen: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.values(seen[RANKS if self.average == "micro" else CLASS_RANKS])

    def refine(self, observation: Ranks) -> Ranks:
        if self.k > observation.n_classes:
            raise ValueError(f"{self!r} asks for more than there are: {observation.n_classes} classes.")
        return dataclasses.replace(observation, ks=(self.k,))

    def values(self, view: RanksView) -> dict[str, Any]:
        value, key = view.ratio(view.hits[self.k], view.weight), f"top_{self.k}_accuracy"
        if self.average is None:
            return {join_names(key, name): value[..., i] for i, name in enumerate(view.names)}
        if self.average == "macro":
            return {f"{key}_macro": view.average(value, view.weight != 0)}
        return {key: value}
