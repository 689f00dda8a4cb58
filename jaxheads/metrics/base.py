"""What a head observes, and how it is read back: the two ends of a metric state.

An observation is declared per element. The head's base class reduces it, so that masks, weights, devices, and later
slices and bootstrap replicas, are written once. Whatever is observed becomes one stretch of the head's packed state.
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


class Observation(abc.ABC):
    """Per-element values of one batch that reduce to `size` sums."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """How many sums it takes."""

    def check(self, what: str, lead: tuple[int, ...]) -> None:
        """Refuses arrays that are not `lead + [k]`: one of shape `[N]` would broadcast to `[N, N]`."""
        for x in jax.tree.leaves(self):
            if jnp.ndim(x) != len(lead) + 1 or jnp.shape(x)[:-1] != lead:
                raise ValueError(
                    f"{what} must hold one value for each element, {(*lead, 1)} or {(*lead, 'd')}. Given "
                    f"{type(self).__name__} of shape {jnp.shape(x)}. Use keepdims=True, or x[..., None]; masks and "
                    "weights are applied afterwards."
                )

    @abc.abstractmethod
    def reduce(self, weights: jax.Array) -> jax.Array:
        """The sums `[size]` of this batch under weights `[..., 1]` or `[..., d]`."""

    @abc.abstractmethod
    def read(self, sums: Any, xp: Any, undefined: float) -> Any:
        """A view of accumulated sums `[..., size]`.

        Args:
            sums: float64 NumPy outside `jit`, float32 JAX inside.
            xp: `numpy` or `jax.numpy`, whichever `sums` belongs to.
            undefined: what a metric whose denominator is zero reads as.
        """


@dataclasses.dataclass(frozen=True)
class View:
    """Accumulated sums with the array module they belong to."""

    xp: Any
    undefined: float

    def ratio(self, numerator: Any, denominator: Any) -> Any:
        """`numerator / denominator`; `undefined` where the denominator is 0; NaN stays NaN."""
        xp = self.xp
        zero = denominator == 0
        safe = xp.where(zero, xp.ones_like(denominator), denominator)
        return xp.where(zero, xp.full_like(numerator / safe, self.undefined), numerator / safe)
