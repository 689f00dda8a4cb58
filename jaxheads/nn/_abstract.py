"""What the linen and the nnx module share: they differ only in where they keep what they own."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxheads.head import Head
from jaxheads.metrics import Metrics
from jaxheads.numerics import fields, inputs
from jaxheads.numerics.kept import per_head
from jaxheads.numerics.linear import LinearLogits
from jaxheads.spec import ExportOutput


class Owned(NamedTuple):
    """What a module hands to its head.

    Attributes:
        logits: an array, or `LinearLogits`.
        learned: as `head.init` makes it, with the values of now.
        running: as `head.init_state` makes it, likewise.
    """

    logits: Any
    learned: Mapping[str, Any]
    running: Mapping[str, Any]


class AbstractHeadModule:
    """The methods of a head on the last hidden layer, for a module that owns the last layer and the head's fields."""

    if TYPE_CHECKING:
        # Attributes of linen's dataclass and of the nnx module; annotated here they would be fields twice.
        head: Head
        owns_head: bool

    def _own(self, hidden: Any) -> Owned:
        """The logits of a hidden layer, and the values of the head's fields; `{}` where the module owns none."""
        raise NotImplementedError

    def _keep(self, running: Mapping[str, Any]) -> None:
        """Puts new values of the running fields where the module keeps them."""
        raise NotImplementedError

    def loss(
        self,
        hidden: Any,
        labels: Any,
        features: Any = None,
        regularization_losses: Any = None,
        *,
        weights: Any = None,
        where: Any = None,
        normalizer: Any = None,
        axis_name: Any = None,
        check: bool | None = None,
    ) -> jax.Array:
        """The regularized loss, a float32 scalar; arguments as those of `head.loss`, with `hidden` for the logits."""
        logits, params = self._given(hidden)
        return self.head.loss(
            labels,
            logits,
            features,
            regularization_losses=regularization_losses,
            weights=weights,
            where=where,
            params=params,
            normalizer=normalizer,
            axis_name=axis_name,
            check=check,
        )

    def predictions(self, hidden: Any, keys: Any = None) -> dict[str, Any]:
        """Predictions by key; only those asked for are computed."""
        logits, params = self._given(hidden)
        return self.head.predictions(logits, keys, params=params)

    def measure(
        self,
        hidden: Any,
        labels: Any,
        features: Any = None,
        regularization_losses: Any = None,
        *,
        weights: Any = None,
        where: Any = None,
        check: bool | None = None,
    ) -> Metrics:
        """The `Metrics` of this batch; they add. Arguments as those of `head.measure`, with `hidden` for the logits."""
        logits, params = self._given(hidden)
        return self.head.measure(
            labels, logits, features, regularization_losses, weights=weights, where=where, params=params, check=check
        )

    def export_outputs(self, hidden: Any) -> dict[str, ExportOutput]:
        """What a server returns, by signature."""
        logits, params = self._given(hidden)
        return self.head.export_outputs(logits, params=params)

    def update_state(
        self,
        hidden: Any,
        labels: Any,
        features: Any = None,
        *,
        weights: Any = None,
        where: Any = None,
        axis_name: Any = None,
    ) -> None:
        """Moves the running fields by a training batch, in place; nothing happens if the head has none.

        Take the loss of a batch first: it is that of the state before it.
        """
        self._check_owner()
        logits, learned, running = self._own(hidden)
        if running:
            self._keep(
                self.head.update_state(
                    running, labels, logits, features, weights=weights, where=where, params=learned, axis_name=axis_name
                )
            )

    def _given(self, hidden: Any) -> tuple[Any, dict[str, Any]]:
        """Logits and all of the head's fields in one dict, as its own methods take them."""
        self._check_owner()
        logits, learned, running = self._own(hidden)
        return logits, fields.merge(learned, running)

    def _check_owner(self) -> None:
        if not self.owns_head and (names := sorted(fields.abstract(self.head))):
            raise ValueError(
                f"This {type(self).__name__} was made with owns_head=False, so it has no values for {names} of its "
                f"{type(self.head).__name__}. Call the head with the module's logits, head.loss(labels=labels, "
                "logits=module(hidden), params=state.bound), or make the module with owns_head=True."
            )


@per_head
def learns(head: Head) -> bool:
    """Whether an unbound head has learned fields, in it or in heads inside it."""
    return bool(jax.eval_shape(head.init, jax.eval_shape(lambda: jax.random.key(0))))


def check_hidden(hidden: Any) -> jax.Array:
    """The last hidden layer as an array `[D0, ..., DN, d]` of numbers."""
    hidden = inputs.as_array(hidden, "hidden")
    if inputs.dtype_kind(hidden) == "other":
        raise ValueError(f"hidden must be an array of numbers. Given dtype {hidden.dtype}.")
    if hidden.ndim < 2:
        raise ValueError(
            f"hidden must have rank at least 2, [D0, ..., DN, d]. Given rank {hidden.ndim}, shape {hidden.shape}. "
            "Add a leading axis, hidden[None], for a single example."
        )
    return jnp.asarray(hidden)


def project(hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None, dtype: Any, lazy: bool) -> Any:
    """`hidden @ kernel + bias` as float32 logits, or not multiplied yet.

    Factors of one narrow dtype are multiplied as such and summed in float32; the bias is added in float32.
    """
    if dtype is not None:
        hidden, kernel = hidden.astype(dtype), kernel.astype(dtype)
    logits = LinearLogits(hidden, kernel, bias)
    return logits if lazy else logits.multiply()
