"""Weighted means: two sums each."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.metrics.base import Metric, Observation, View
from jaxheads.numerics import brief, masking


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean(Observation):
    """`sum(a v) / sum(a)`; with `count`, `sum(a v) / sum(a count)`.

    Args:
        values: one value an element, `[..., 1]` or `[..., d]`; numbers or bool.
        count: the number in place of 1 in the denominator, `[..., 1]` or `[..., d]`.
    """

    values: Any
    count: Any = None

    only_sums = True

    @property
    def size(self) -> int:
        """The weighted sum and the weight."""
        return 2

    def reduce(self, weights: jax.Array) -> jax.Array:
        """Returns the two sums over this batch."""
        values = jnp.asarray(self.values, jnp.float32)
        # By multiplication: a broadcast would be laid out unlike values whose last axis is sharded.
        weights = weights * masking.ones_like(values)
        count = weights if self.count is None else masking.weighted(self.count, weights)
        return jnp.stack([masking.total(masking.weighted(values, weights)), masking.total(count)])

    def read(self, sums: Any, xp: Any, undefined: float) -> "MeanView":
        """Returns a view of the sums."""
        return MeanView(xp, undefined, total=sums[..., 0], weight=sums[..., 1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ColumnMeans(Observation):
    """The weighted mean of each of some entries of the last axis: classes, targets.

    Args:
        values: `[..., d]`.
        columns: which of the d entries.
    """

    values: Any
    columns: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def size(self) -> int:
        """A weighted sum and a weight for each column."""
        return 2 * len(self.columns)

    def reduce(self, weights: jax.Array) -> jax.Array:
        """Returns the weighted sums of this batch, then the weights."""
        values = jnp.asarray(self.values, jnp.float32)
        weights = weights * masking.ones_like(values)
        chosen = np.asarray(self.columns, np.int32)
        return jnp.concatenate([masking.column_totals(x)[chosen] for x in (masking.weighted(values, weights), weights)])

    def read(self, sums: Any, xp: Any, undefined: float) -> "MeanView":
        """Returns the means in the order of the columns, on a last axis."""
        n = len(self.columns)
        return MeanView(xp, undefined, total=sums[..., :n], weight=sums[..., n:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums(Observation):
    """The weighted sums of all columns of several arrays.

    Args:
        parts: arrays `[..., d]`, each with a d of its own.
    """

    parts: tuple[Any, ...]

    only_sums = True

    @property
    def size(self) -> int:
        """A sum for each column."""
        return sum(part.shape[-1] for part in self.parts)

    def reduce(self, weights: jax.Array) -> jax.Array:
        """Returns the sums of this batch, part by part."""
        each = (masking.weighted(part, weights * masking.ones_like(part)) for part in self.parts)
        return jnp.concatenate([masking.total(x)[None] if x.shape[-1] == 1 else masking.column_totals(x) for x in each])

    def read(self, sums: Any, xp: Any, undefined: float) -> "SumsView":
        """Returns the sums, part by part."""
        ends = np.cumsum([0, *(part.shape[-1] for part in self.parts)])
        return SumsView(xp, undefined, tuple(sums[..., start:end] for start, end in itertools.pairwise(ends)))


@dataclasses.dataclass(frozen=True)
class SumsView(View):
    """Sums that can be read: of each part, `[..., d]`."""

    sums: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Total(Observation):
    """A sum that a head adds by itself: a stretch of the state, and nothing to reduce."""

    @property
    def size(self) -> int:
        """One sum."""
        return 1

    def reduce(self, weights: jax.Array) -> jax.Array:
        """Raises an error: the head appends its sum."""
        raise NotImplementedError("a Total is added by the head itself")

    def read(self, sums: Any, xp: Any, undefined: float) -> "MeanView":
        """Returns the sum, as `total`."""
        return MeanView(xp, undefined, total=sums[..., 0], weight=sums[..., 0])


@dataclasses.dataclass(frozen=True)
class MeanView(View):
    """A mean that can be read: `mean`, and the two sums it comes from."""

    total: Any
    weight: Any

    @property
    def mean(self) -> Any:
        """The weighted mean, undefined where nothing was seen."""
        return self.ratio(self.total, self.weight)


@dataclasses.dataclass(frozen=True)
class FunctionMetric(Metric):
    """The weighted mean of a function: `head.with_metrics(NAME=function)`.

    Args:
        name: its key.
        function: `(labels, logits) -> one value an element`, `[..., 1]` or `[..., d]`.
        higher_is_better: True, False, or None where neither is better.
    """

    name: str
    function: Callable[[Any, jax.Array], Any]
    higher_is_better: Any = None

    def __post_init__(self):
        if not isinstance(self.name, str) or not callable(self.function):
            raise ValueError(
                "A metric by a function needs a name, and a function of labels and logits. Given "
                f"{brief.tell(self.name)} and {brief.tell(self.function)}."
            )

    def observe(
        self, labels: Any, logits: jax.Array, sources: Mapping[str, Callable[[], Observation]]
    ) -> dict[str, Observation]:
        return {self._key: Mean(self.function(labels, logits))}

    def summarize(self, seen: Mapping[str, Any]) -> dict[str, Any]:
        return {self.name: seen[self._key].mean}

    @property
    def _key(self) -> str:
        # No author's own key may equal it: metrics share their observation under one key.
        return f"function:{self.name}"
