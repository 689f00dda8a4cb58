"""What a head observes, and how it is read back: the two ends of a metric state.

An observation is declared per element. The head's base class reduces it, so that masks, weights, devices, and later
slices and bootstrap replicas, are written once. Whatever is observed becomes one stretch of the head's packed state.
"""

import abc
import dataclasses
from typing import Any

import jax


class Observation(abc.ABC):
    """Per-element values of one batch that reduce to `size` sums."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """How many sums it takes."""

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
