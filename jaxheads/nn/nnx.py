"""A head as a flax nnx module."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads.head import Head, check_unbound
from jaxheads.nn._abstract import AbstractHeadModule, Owned, check_hidden, project

KERNEL_INIT, BIAS_INIT = nnx.initializers.lecun_normal(), nnx.initializers.zeros_init()


class HeadState(nnx.Variable):
    """A running field of a head: no gradient, moved by `update_state`. For filters, as `nnx.BatchStat` is."""


class NnxHead(AbstractHeadModule, nnx.Module):
    """The last layer of a network and its head, as one `flax.nnx` module.

    It owns `nnx.Param`s: the output matrix `kernel` `[in_features, logits_dimension]`, the `bias`, and in the dict
    `learned` what the head learns, nested as `head.init(key)` makes it; and `jh.nn.HeadState`s: in the dict `running`
    the head's running fields, as `head.init_state()` makes them.

    `module(hidden)` gives the logits, float32 whatever the dtype of `hidden`; of a `MultiHead` one array that it
    splits. `loss`, `predictions`, `measure`, `export_outputs` and `update_state` are those of the head with `hidden`
    in place of logits. Only `update_state` changes the module.

    With `make_train_step` the module gives nothing but logits. Split the model that it is the top of:

        params, model_state, apply_fn = jh.nn.split(model, inputs="x")

    There the `TrainState` owns what the head learns and keeps, so make the module of such a head with
    `owns_head=False`; an owner's copy would sit in the network's parameters and never be trained. For a head without
    such fields nothing need be said.

    Args:
        head: the head, unbound.
        in_features: the last size of `hidden`.
        use_bias: whether a bias is added.
        dtype: in which `hidden` and `kernel` are multiplied (sums are float32); by default bfloat16 or float16 if both
            are, else float32.
        param_dtype: of `kernel` and `bias`. What the head learns has the dtype that `head.init` gives it.
        kernel_init, bias_init: initializers, as `nnx.Linear` takes them.
        lazy: the head is given `jh.LinearLogits(hidden, kernel, bias)` instead of an array, and so is the caller of
            `module(hidden)`. Same numbers; masks reach `hidden`, so that its masked rows may hold NaN.
        owns_head: whether the module owns the head's fields. If not, methods other than `module(hidden)` are refused
            for a head that has any.
        rngs: of which the stream `params` is used.

    Raises:
        ValueError: what is no head, or a bound one; `hidden` that is no array of numbers of rank 2 or more, or not
            `in_features` wide; what the head's own methods raise.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> from flax import nnx
    >>> import jaxheads as jh
    >>> model = jh.nn.NnxHead(jh.BinaryClassHead(), 2, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)
    >>> @nnx.jit
    ... def step(model, optimizer, hidden, labels):
    ...     optimizer.update(model, nnx.grad(lambda model: model.loss(hidden, labels))(model))
    ...     model.update_state(hidden, labels)  # nothing to do for a head without running fields
    >>> hidden, labels = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([1, 0])
    >>> for _ in range(20):
    ...     step(model, optimizer, hidden, labels)
    >>> model.predictions(hidden, "class_ids")["class_ids"].ravel()
    Array([1, 0], dtype=int32)
    """

    def __init__(
        self,
        head: Head,
        in_features: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable[..., Any] = KERNEL_INIT,
        bias_init: Callable[..., Any] = BIAS_INIT,
        lazy: bool = False,
        owns_head: bool = True,
        rngs: nnx.Rngs,
    ):
        check_unbound(head)
        self.head, self.in_features = head, in_features
        self.dtype, self.lazy, self.owns_head = dtype, lazy, owns_head
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, head.logits_dimension), param_dtype))
        bias = nnx.Param(bias_init(rngs.params(), (head.logits_dimension,), param_dtype)) if use_bias else None
        self.bias = nnx.data(bias)
        # Not nnx.Dict, whose keys are attributes: a head may be called "items".
        self.learned = nnx.data(jax.tree.map(nnx.Param, head.init(rngs.params())) if owns_head else {})
        self.running = nnx.data(jax.tree.map(HeadState, head.init_state()) if owns_head else {})

    def __call__(self, hidden: Any) -> Any:
        """The logits, float32 `[..., logits_dimension]`; `LinearLogits` if `lazy`."""
        return self._own(hidden).logits

    def _own(self, hidden: Any) -> Owned:
        hidden = check_hidden(hidden)
        if hidden.shape[-1] != self.in_features:
            raise ValueError(
                f"hidden must be in_features = {self.in_features} wide. Given shape {hidden.shape}. Make the module "
                f"with in_features={hidden.shape[-1]}."
            )
        bias = None if self.bias is None else self.bias[...]
        logits = project(hidden, self.kernel[...], bias, self.dtype, self.lazy)
        return Owned(logits, _values(self.learned), _values(self.running))

    def _keep(self, running: Mapping[str, Any]) -> None:
        def keep(variable: HeadState, value: jax.Array) -> None:
            variable[...] = value

        jax.tree.map(keep, self.running, dict(running), is_leaf=_is_variable)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _values(tree: Any) -> Any:
    return jax.tree.map(lambda variable: variable[...], tree, is_leaf=_is_variable)
