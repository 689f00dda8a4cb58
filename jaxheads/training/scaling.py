"""Scales of the loss, with which small gradients survive in float16."""

import dataclasses
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.numerics import brief, inputs

TreeT = TypeVar("TreeT")
NUMBERS = (int, float, np.integer, np.floating)
LARGEST = float(np.finfo(np.float32).max)


@runtime_checkable
class LossScale(Protocol):
    """A scale that adapts, a pytree of arrays: `DynamicLossScale`, or one of the package jmp."""

    def scale(self, tree: Any, /) -> Any: ...

    def unscale(self, tree: Any, /) -> Any: ...

    def adjust(self, grads_finite: Any, /) -> Any: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DynamicLossScale:
    """A scale of the loss that is as large as float16 allows, for `TrainState.create(loss_scale=...)`.

    A step takes the gradient of `value * loss` and divides it by `value`. If the loss, the gradients, the new
    parameters or the new `model_state` are not finite, the step is skipped and the value is divided by `factor`. After
    `period` steps in a row that are not skipped, it is multiplied by `factor`, unless it would no longer be finite.

    Args:
        value: the first value.
        good_steps: the number of steps since the value changed.
        period: how many good steps make the value rise.
        factor: by how much it rises and falls; a power of two rounds nothing.
        smallest: the value does not fall below this number.

    Raises:
        ValueError: a value or a bound that is not positive, a value below the smallest, a factor that is not above 1, a
            period below 1, a number of steps below 0.

    Source: Micikevicius et al., "Mixed Precision Training" (ICLR 2018). The package jmp has the same rule, and its
    `DynamicLossScale` may take the place of this one.

    >>> import jaxheads as jh
    >>> scale = jh.training.DynamicLossScale(1024.0, period=2)
    >>> float(scale.adjust(False).value), float(scale.adjust(True).adjust(True).value)
    (512.0, 2048.0)
    """

    value: Any = 2.0**15
    good_steps: Any = 0
    period: int = dataclasses.field(default=2000, metadata={"static": True})
    factor: float = dataclasses.field(default=2.0, metadata={"static": True})
    smallest: float = dataclasses.field(default=1.0, metadata={"static": True})

    def __post_init__(self):
        check_scale("smallest", self.smallest)
        check_scale("factor", self.factor)
        if isinstance(self.value, NUMBERS):  # afterwards it is an array of a state
            if check_scale("value", self.value) < self.smallest:
                raise ValueError(
                    f"value must be at least smallest={self.smallest}: it would rise where it has to fall. Given "
                    f"{self.value}. Pass a smaller smallest=."
                )
        if isinstance(self.good_steps, NUMBERS) and not inputs.is_integer(self.good_steps, 0):
            raise ValueError(f"good_steps must be an integer of at least 0. Given {brief.tell(self.good_steps)}.")
        if self.factor <= 1:
            raise ValueError(f"factor must be a number above 1. Given {self.factor}.")
        if not inputs.is_integer(self.period, 1):
            raise ValueError(f"period must be an integer of at least 1. Given {brief.tell(self.period)}.")

    def scale(self, tree: TreeT, /) -> TreeT:
        """Returns the arrays times the value."""
        return multiply(tree, self.value)

    def unscale(self, tree: TreeT, /) -> TreeT:
        """Returns the arrays divided by the value."""
        return multiply(tree, 1 / self.value)

    def adjust(self, grads_finite: Any, /) -> "DynamicLossScale":
        """Returns the scale for the next step."""
        value, good = jnp.asarray(self.value, jnp.float32), jnp.asarray(self.good_steps, jnp.int32) + 1
        rises = good >= self.period
        raised = jnp.where(rises & jnp.isfinite(value * self.factor), value * self.factor, value)
        lowered = jnp.maximum(value / self.factor, self.smallest)
        value = jnp.where(grads_finite, raised, lowered)
        return dataclasses.replace(self, value=value, good_steps=jnp.where(rises | ~jnp.asarray(grads_finite), 0, good))


def multiply(tree: TreeT, factor: Any) -> TreeT:
    """Returns the arrays times a number, in their own dtypes; the product is made in float32 at least."""

    def each(x: Any) -> Any:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return (x.astype(wide) * factor).astype(x.dtype)

    return jax.tree.map(each, tree)


def check_scale(name: str, value: Any) -> float:
    """Returns a positive number that float32 holds, and refuses everything else."""
    if isinstance(value, bool) or not isinstance(value, NUMBERS) or not 0 < value <= LARGEST:
        raise ValueError(f"{name} must be a positive number, and finite in float32. Given {brief.tell(value)}.")
    return float(value)
