"""A head as a flax linen module."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxheads.head import Head, check_unbound
from jaxheads.nn._abstract import AbstractHeadModule, Owned, check_hidden, learns, project
from jaxheads.numerics import fields

HEAD_STATE = "head_state"


class LinenHead(AbstractHeadModule, nn.Module):
    """The last layer of a network and its head, as one `flax.linen` module.

    It owns, in the collection `"params"`, the output matrix `kernel` `[d, logits_dimension]`, the `bias`, and under
    `learned` what the head learns, as `head.init(key)` makes it; in the collection `"head_state"`, under `running`, the
    head's running fields, as `head.init_state()` makes them. What a head does not have is not there.

    `module(hidden)` gives the logits, float32 whatever the dtype of `hidden`; of a `MultiHead` one array that it
    splits. `loss`, `predictions`, `measure`, `export_outputs` and `update_state` are those of the head with `hidden`
    in place of logits: call them from an enclosing module, or by `apply(..., method="loss")`. `update_state` needs
    `mutable=["head_state"]` and does nothing in `init`; everything else only reads the state.

    With `make_train_step` the module gives nothing but logits, `apply_fn = lambda params, features:
    model.apply({"params": params}, features["x"])`. There the `TrainState` owns what the head learns and keeps, so make
    the module of such a head with `owns_head=False`; an owner's copy would sit in the network's parameters and never be
    trained. For a head without such fields nothing need be said.

    Args:
        head: the head, unbound.
        use_bias: whether a bias is added.
        dtype: in which `hidden` and `kernel` are multiplied (sums are float32); by default bfloat16 or float16 if both
            are, else float32.
        param_dtype: of `kernel` and `bias`. What the head learns has the dtype that `head.init` gives it.
        kernel_init, bias_init: initializers, as `nn.Dense` takes them.
        lazy: the head is given `jh.LinearLogits(hidden, kernel, bias)` instead of an array, and so is the caller of
            `module(hidden)`. Same numbers; masks reach `hidden`, so that its masked rows may hold NaN.
        owns_head: whether the module owns the head's fields. If not, methods other than `module(hidden)` are refused
            for a head that has any.

    Raises:
        ValueError: what is no head, or a bound one; `hidden` that is no array of numbers of rank 2 or more;
            `update_state` while `"head_state"` is not mutable; what the head's own methods raise. Flax tells of
            `hidden` of another last size than the parameters were made for.

    >>> import jax, optax
    >>> import jax.numpy as jnp
    >>> import jaxheads as jh
    >>> model = jh.nn.LinenHead(jh.BinaryClassHead())
    >>> hidden, labels = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([1, 0])
    >>> variables = model.init(jax.random.key(0), hidden)
    >>> jax.tree.map(jnp.shape, variables)
    {'params': {'bias': (1,), 'kernel': (2, 1)}}
    >>> def loss(params):
    ...     return model.apply({"params": params}, hidden, labels, method="loss")
    >>> params, optimizer = variables["params"], optax.sgd(0.5)
    >>> opt_state = optimizer.init(params)
    >>> @jax.jit
    ... def step(params, opt_state):
    ...     updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
    ...     return optax.apply_updates(params, updates), opt_state
    >>> for _ in range(20):
    ...     params, opt_state = step(params, opt_state)
    >>> model.apply({"params": params}, hidden, "class_ids", method="predictions")["class_ids"].ravel()
    Array([1, 0], dtype=int32)
    """

    head: Head
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()
    lazy: bool = False
    owns_head: bool = True

    def __post_init__(self):
        check_unbound(self.head)
        super().__post_init__()

    def __call__(self, hidden: Any) -> Any:
        """The logits, float32 `[..., logits_dimension]`; `LinearLogits` if `lazy`."""
        return self._own(hidden).logits

    @nn.compact
    def _own(self, hidden: Any) -> Owned:
        hidden, size = check_hidden(hidden), self.head.logits_dimension
        kernel = self.param("kernel", self.kernel_init, (hidden.shape[-1], size), self.param_dtype)
        bias = self.param("bias", self.bias_init, (size,), self.param_dtype) if self.use_bias else None
        learned: Mapping[str, Any] = {}
        running: Mapping[str, Any] = {}
        if self.owns_head and learns(self.head):
            learned = self.param("learned", self.head.init)
        if self.owns_head and fields.has_state(self.head):
            running = self.variable(HEAD_STATE, "running", self.head.init_state).value
        return Owned(project(hidden, kernel, bias, self.dtype, self.lazy), learned, running)

    def _keep(self, running: Mapping[str, Any]) -> None:
        if not self.is_mutable_collection(HEAD_STATE):
            raise ValueError(
                f"update_state changes the collection {HEAD_STATE!r}, which is not mutable here. In training, use "
                f"out, updates = model.apply(variables, ..., mutable=[{HEAD_STATE!r}]) and carry on with "
                f"updates[{HEAD_STATE!r}]; in evaluation, do not call it."
            )
        if not self.is_initializing():
            self.put_variable(HEAD_STATE, "running", running)
