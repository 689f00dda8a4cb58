"""Logits that are not multiplied out yet."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.numerics import brief, inputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearLogits:
    """`hidden @ kernel + bias`, not multiplied yet. Every head takes it in place of an array of logits.

    Args:
        hidden: the last hidden layer, `[..., d]`.
        kernel: the output matrix, `[d, logits_dimension]`.
        bias: `[logits_dimension]`, or None.

    >>> import jax.numpy as jnp
    >>> import jaxheads as jh
    >>> hidden, kernel = jnp.ones((4, 3)), jnp.ones((3, 1))
    >>> head = jh.BinaryClassHead()
    >>> labels = jnp.array([1, 0, 1, 1])
    >>> lazy = head.loss(labels=labels, logits=jh.LinearLogits(hidden, kernel))
    >>> bool(lazy == head.loss(labels=labels, logits=hidden @ kernel))
    True
    """

    hidden: jax.Array | np.ndarray
    kernel: jax.Array | np.ndarray
    bias: jax.Array | np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the product."""
        return (*jnp.shape(self.hidden)[:-1], *jnp.shape(self.kernel)[-1:])

    def check(self) -> None:
        """Refuses values that are no arrays of numbers, and shapes that cannot be multiplied."""
        for name, part in (("hidden", self.hidden), ("kernel", self.kernel), ("bias", self.bias)):
            if part is not None and not (isinstance(part, brief.Shaped) and inputs.dtype_kind(part) != "other"):
                raise ValueError(f"LinearLogits: {name} must be an array of numbers. Given {brief.tell(part)}.")
        hidden, kernel = jnp.shape(self.hidden), jnp.shape(self.kernel)
        if len(hidden) < 2 or len(kernel) != 2 or hidden[-1] != kernel[0]:
            raise ValueError(
                "LinearLogits needs hidden [..., d] with at least one leading axis and kernel [d, logits_dimension]. "
                f"Given hidden {hidden}, kernel {kernel}."
            )
        if self.bias is not None and jnp.shape(self.bias) != kernel[1:]:
            raise ValueError(
                f"LinearLogits needs bias [logits_dimension] = {kernel[1:]}. Given {jnp.shape(self.bias)}."
            )

    def columns(self, start: int, stop: int) -> "LinearLogits":
        """Returns the logits `start ... stop - 1`, not multiplied either."""
        bias = None if self.bias is None else self.bias[start:stop]
        return LinearLogits(self.hidden, self.kernel[:, start:stop], bias)

    def multiply(self) -> jax.Array:
        """Returns the logits as float32, accumulated in float32 for any dtype of the factors."""
        hidden, kernel = jnp.asarray(self.hidden), jnp.asarray(self.kernel)
        dtype = hidden.dtype if hidden.dtype == kernel.dtype and hidden.dtype.itemsize < 4 else jnp.float32
        logits = jnp.matmul(hidden.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)
        if self.bias is None:
            return logits
        bias = jnp.asarray(self.bias, jnp.float32)
        return logits + jnp.expand_dims(bias, tuple(range(logits.ndim - 1)))
