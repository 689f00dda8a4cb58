"""The four ways in which per-element losses become one number."""

import enum
from typing import NamedTuple

import jax

from jaxheads.numerics import brief, masking


class Reduction(enum.Enum):
    """How a head divides the weighted sum of its per-element losses.

    | member | loss |
    | --- | --- |
    | `SUM` | the weighted sum |
    | `SUM_OVER_BATCH_SIZE` | divided by the number of existing elements (zero weights count) |
    | `MEAN` | divided by the sum of the weights |
    | `SUM_BY_NONZERO_WEIGHTS` | divided by the number of elements whose weight is not zero |

    Wherever a `Reduction` is taken, its text is taken too; `"auto"` is `SUM_OVER_BATCH_SIZE`.

    >>> Reduction.of("auto")
    Reduction.SUM_OVER_BATCH_SIZE
    """

    SUM = "sum"
    SUM_OVER_BATCH_SIZE = "sum_over_batch_size"
    MEAN = "mean"
    SUM_BY_NONZERO_WEIGHTS = "sum_by_nonzero_weights"

    def __repr__(self) -> str:
        return f"Reduction.{self.name}"

    @classmethod
    def of(cls, value: "Reduction | str") -> "Reduction":
        """Returns the member that `value` is or names."""
        if isinstance(value, cls):
            return value
        if brief.is_one_of(value, ("auto",)):
            return cls.SUM_OVER_BATCH_SIZE
        texts = [member.value for member in cls]
        if value is None or not brief.is_one_of(value, texts):
            raise ValueError(
                f"Invalid loss_reduction: {brief.tell(value)}. Expected a jaxheads.Reduction, or one of "
                f"{['auto', *texts]}."
            )
        return cls(value)


# Weights that are all smaller are refused: float32 loses a part of them, or of their products with losses.
SMALLEST_SUM = 2.0**-120


class Divisor(NamedTuple):
    """The divisor of the loss of a whole batch, for the losses of its parts; `head.divisor` makes it.

    Attributes:
        value: the divisor under the head's reduction; under `SUM` the number of elements, by which nothing is divided.
        live: the number of elements whose weight is not 0.
    """

    value: jax.Array
    live: jax.Array


def divide(total: jax.Array, by: jax.Array) -> jax.Array:
    """Returns `total / by`, and 0 where `by` is 0: an empty batch is a harmless step. A NaN total stays NaN."""
    empty = jax.lax.eq(by, jax.lax.full_like(by, 0))
    ratio = jax.lax.div(total, masking.choose(empty, jax.lax.full_like(by, 1), by))
    is_nan = jax.lax.ne(ratio, ratio)
    return masking.choose(empty & ~is_nan, jax.lax.full_like(ratio, 0), ratio)
