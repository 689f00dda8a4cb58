"""The state that training carries from step to step."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxheads.engine.optimizing import check_optimizer
from jaxheads.head import Head, check_unbound
from jaxheads.numerics import brief, duals, fields, inputs
from jaxheads.training.scaling import LossScale
from jaxheads.training.text import describe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class TrainState:
    """A pytree of all arrays that a step changes. The class is small, so that you can fork it.

    Attributes:
        step: int32, the number of steps taken, skipped ones too.
        params: the parameters of the network.
        head_params: the learned fields of the head, as `head.init(key)` makes them; `{}` if it learns nothing.
        opt_state: the state of the optimizer, for `trainable`.
        model_state: values of the network without gradients, such as batch statistics; None if there are none.
        head_state: the running fields of the head, as `head.init_state()` makes them; `{}` if there are none.
        key: a random key. Each step folds its own key from it, for dropout.
        skipped: int32, the number of skipped steps, if the state was created with `count_skipped=True` or with a
            `loss_scale`; None otherwise.
        loss_scale: the scale of the loss for the next step; None if there is none, or a fixed one.
    """

    step: Any
    params: Any
    head_params: Any
    opt_state: Any
    model_state: Any
    head_state: Any
    key: Any

    if TYPE_CHECKING:
        skipped: Any = None
        loss_scale: Any = None
    else:  # no fields: the checkpoints of a state without them stay the same
        skipped = loss_scale = None

    @classmethod
    def create(
        cls,
        *,
        params: Any,
        optimizer: Any,
        head: Head,
        key: jax.Array,
        model_state: Any = None,
        count_skipped: bool = False,
        loss_scale: Any = None,
    ) -> "TrainState":
        """Makes the state before the first step.

        Arrays are copied, so a step that donates its state deletes none of your arrays.

        Args:
            params: the parameters of the network, any pytree of arrays.
            optimizer: an optax `GradientTransformation`.
            head: the head, unbound.
            key: a random key, for the first values of the head's learned fields, and for dropout.
            model_state: any pytree of arrays; None if the network has no such values.
            count_skipped: whether the state counts the steps that `make_train_step(skip_nonfinite=True)` skips.
            loss_scale: a scale of the loss that adapts, `jh.training.DynamicLossScale()`. Steps that overflow are then
                skipped and counted. A fixed scale goes to `make_train_step`.

        Raises:
            ValueError: an optimizer that is none, or that would descend on multipliers; leaves that are no arrays;
                parameters that already hold the parameters of the head; a `loss_scale` that does not adapt.
        """
        inputs.check_switch("count_skipped", count_skipped)
        if loss_scale is not None and not isinstance(loss_scale, LossScale):
            raise ValueError(
                "loss_scale must be a scale that adapts, jh.training.DynamicLossScale(). Given "
                f"{brief.tell(loss_scale)}. Give a fixed number to make_train_step(loss_scale=...)."
            )
        check_unbound(head)
        check_optimizer(optimizer)
        fields.check_key(key)
        params, model_state = _copy(params, "params"), _copy(model_state, "model_state")
        init_key, key = jax.random.split(key)
        head_params = _copy(head.init(init_key), "head_params")
        _check_owner(params, head_params)
        head_state = _copy(head.init_state(), "head_state")
        opt_state = _copy(optimizer.init(join_params(params, head_params)), "opt_state")
        duals.check_ascends(opt_state, head_params)
        first = jnp.zeros((), jnp.int32), params, head_params, opt_state, model_state, head_state, key
        if not count_skipped and loss_scale is None:
            return cls(*first)
        return GuardedTrainState(*first, jnp.zeros((), jnp.int32), _copy(loss_scale, "loss_scale"))

    @property
    def trainable(self) -> Any:
        """The tree for the optimizer: `params`; if the head learns, `{"params": params, "head": head_params}`."""
        return join_params(self.params, self.head_params)

    def __repr__(self) -> str:
        """The fields in a few words: shapes and dtypes, and the values of small arrays."""
        fields_ = ", ".join(f"{name}={describe(value)}" for name, value in vars(self).items())
        return f"{type(self).__name__}({fields_})"

    @property
    def bound(self) -> dict[str, Any]:
        """The head's fields in one dict, as `params=` takes them."""
        return fields.merge(self.head_params, self.head_state)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class GuardedTrainState(TrainState):
    """A `TrainState` that counts skipped steps, and perhaps has a scale of the loss."""

    skipped: Any = None
    loss_scale: Any = None


def join_params(params: Any, head_params: Mapping[str, Any]) -> Any:
    """Returns the tree for the optimizer."""
    return {"params": params, "head": head_params} if head_params else params


def split_params(trainable: Any, learns: bool) -> tuple[Any, Any]:
    """Returns the parameters of the network and of the head, from the tree for the optimizer."""
    return (trainable["params"], trainable["head"]) if learns else (trainable, {})


def _check_owner(params: Any, head_params: Any) -> None:
    """Refuses parameters of a head module that holds the learned fields of the head: there they are never trained."""

    def names(tree: Any) -> list[tuple[str, ...]]:
        return [tuple(fields.names_along(path)) for path, _ in jax.tree.leaves_with_path(tree)]

    owned = {("learned", *name) for name in names(head_params)}
    held = {name[i:] for name in names(params) for i in range(len(name))}
    # nnx keeps the value of a variable one level down.
    held |= {name[:-1] for name in held if name[-1] == "value"}
    if owned and owned <= held:
        raise ValueError(
            f"params hold what the head learns, under 'learned', and the TrainState does too: {sorted(owned)}. Make "
            "the head module with owns_head=False."
        )


def _copy(tree: Any, what: str) -> Any:
    """Copies arrays, and drops weak types: after the first step, a weak type would be another type."""

    def copy(path: Any, leaf: Any) -> jax.Array:
        try:
            return jnp.array(leaf, dtype=jax.dtypes.result_type(leaf), copy=True)
        except (TypeError, OverflowError) as error:
            raise ValueError(
                f"{what} must be a pytree of arrays. Given a {type(leaf).__name__} at {jax.tree_util.keystr(path)}."
            ) from error

    return jax.tree_util.tree_map_with_path(copy, tree)
