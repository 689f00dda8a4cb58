"""The weighted mean: two sums."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.metrics.base import Observation, View
from jaxheads.numerics import masking


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean(Observation):
    """`sum(a v) / sum(a)`; with `count`, `sum(a v) / sum(a count)`.

    Args:
        values: one value an element, `[..., 1]` or `[..., d]`; numbers or bool.
        count: what stands in the place of 1 in the denominator, `[..., 1]` or `[..., d]`.
    """

    values: Any
    count: Any = None

    @property
    def size(self) -> int:
        """The weighted sum and the weight."""
        return 2

    def reduce(self, weights: jax.Array) -> jax.Array:
        """The two sums over this batch."""
        values = jnp.asarray(self.values, jnp.float32)
        # By multiplication: a broadcast would be laid out unlike values whose last axis is sharded.
        weights = weights * masking.ones_like(values)
        count = weights if self.count is None else masking.weighted(self.count, weights)
        return jnp.stack([masking.total(masking.weighted(values, weights)), masking.total(count)])

    def read(self, sums: Any, xp: Any, undefined: float) -> "MeanView":
        """What the sums tell."""
        return MeanView(xp, undefined, total=sums[..., 0], weight=sums[..., 1])


@dataclasses.dataclass(frozen=True)
class MeanView(View):
    """A mean that can be read: `mean`, and the two sums it comes from."""

    total: Any
    weight: Any

    @property
    def mean(self) -> Any:
        """The weighted mean, undefined where nothing was seen."""
        return self.ratio(self.total, self.weight)
