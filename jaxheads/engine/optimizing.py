"""One step of an optax optimizer, with checks. Both training steps use it."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.numerics import duals


def is_optimizer(value: Any) -> bool:
    """Tells whether a value has the two functions of an optax transformation."""
    return all(callable(getattr(value, name, None)) for name in ("init", "update"))


def averaged(model_state: Any, axis_name: Any) -> Any:
    """Averages batch statistics over devices. Counters stay: they are the same on all devices."""
    if axis_name is None:
        return model_state
    leaves, structure = jax.tree.flatten(model_state)
    floating = [jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in leaves]
    means = [jax.lax.pmean(x, axis_name) if mean else x for x, mean in zip(leaves, floating, strict=True)]
    return structure.unflatten(means)


def updated(optimizer: Any, grads: Any, opt_state: Any, variables: Any, loss: jax.Array) -> tuple[Any, Any]:
    """Returns the next variables and optimizer state. Optimizers that take the loss and gradients by name get them."""
    import optax

    declared = inspect.signature(optimizer.update).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in declared.values())
    extra = {name: x for name, x in (("value", loss), ("grad", grads)) if takes_all or name in declared}
    if opt_state is None:
        opt_state = optimizer.init(variables)
    else:
        check_opt_state(optimizer, opt_state, variables)
    duals.check_ascends(opt_state, variables)
    updates, opt_state = optimizer.update(grads, opt_state, variables, **extra)
    return optax.apply_updates(variables, updates), opt_state


def _list_shapes(tree: Any) -> dict[str, str]:
    """Returns the shapes of a pytree, by path."""
    return {jax.tree_util.keystr(path): f"{list(jnp.shape(leaf))}" for path, leaf in jax.tree.leaves_with_path(tree)}


def check_opt_state(optimizer: Any, opt_state: Any, variables: Any) -> None:
    """Refuses the state of another optimizer, or a state for variables of another structure."""
    if (given := _list_shapes(opt_state)) != (expected := _list_shapes(jax.eval_shape(optimizer.init, variables))):
        raise ValueError(
            "opt_state does not belong to this optimizer and these variables. Given shapes "
            f"{given}, expected {expected}. Make it with optimizer.init(variables)."
        )


def check_optimizer(optimizer: Any) -> None:
    """Refuses every value that is not an optax transformation, also the name of an optimizer."""
    if not is_optimizer(optimizer):
        raise ValueError(
            "The given optimizer is not an optax.GradientTransformation, such as optax.adam(1e-3). Received "
            f"{optimizer!r} of type {type(optimizer).__name__}."
        )
