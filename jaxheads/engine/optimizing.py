"""One step of an optax optimizer, with checks. Both training steps use it."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.numerics import duals, meshes


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


def updated(
    optimizer: Any,
    grads: Any,
    opt_state: Any,
    variables: Any,
    loss: jax.Array,
    evaluate: Callable[[Any], tuple[jax.Array, Any]],
    axis_name: Any = None,
) -> tuple[Any, Any, Any]:
    """Returns the next variables and optimizer state, and the updates that were added to the variables.

    Optimizers that take `value`, `grad` or `value_fn` by name get them: the loss, the gradients, and the loss of the
    same batch as a function of the variables.

    Args:
        evaluate: `variables -> (loss, gradients)` of the same batch, both over all devices of `axis_name`.
    """
    import optax

    declared = inspect.signature(optimizer.update).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in declared.values())
    extra = {name: x for name, x in (("value", loss), ("grad", grads)) if takes_all or name in declared}
    if opt_state is None:
        opt_state = optimizer.init(variables)
    else:
        check_opt_state(optimizer, opt_state, variables)
    duals.check_ascends(opt_state, variables)
    value_fn = _make_value_fn(evaluate, variables, opt_state, axis_name)

    def update(**more: Any) -> tuple[Any, Any]:
        return optimizer.update(grads, opt_state, variables, **extra, **more)

    _check_line_search(opt_state)
    if "value_fn" in declared:
        updates, opt_state = update(value_fn=value_fn)
    else:
        try:
            updates, opt_state = update()
        except TypeError as error:
            # A chain does not declare the arguments of its parts. A part that needs the function fails without it.
            if not takes_all or "value_fn" not in str(error):
                raise
            updates, opt_state = update(value_fn=value_fn)
    return optax.apply_updates(variables, updates), opt_state, updates


def global_norm(tree: Any, axis_name: Any = None) -> jax.Array:
    """Returns the norm of all arrays of a pytree together, summed in float32; the same on all devices.

    Where types tell that an array is spread over devices, its parts are added up.
    """
    names = axis_name if isinstance(axis_name, (tuple, list)) else (axis_name,)

    def square(x: jax.Array) -> jax.Array:
        total = jnp.sum(jnp.square(jnp.abs(x).astype(jnp.float32)))
        spread = [] if axis_name is None else [name for name in names if meshes.varies(x, name)]
        return jax.lax.psum(total, tuple(spread)) if spread else total

    return jnp.sqrt(sum(map(square, jax.tree.leaves(tree)), jnp.float32(0)))


def is_finite(tree: Any, axis_name: Any = None) -> jax.Array:
    """Tells whether all numbers of a pytree are finite, on all devices."""
    finite = jnp.bool_(True)
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact):  # no counters, no random keys
            finite = finite & jnp.all(jnp.isfinite(leaf))
    if axis_name is None:
        return finite
    return jax.lax.pmin(meshes.varying(finite.astype(jnp.int32), axis_name), axis_name) > 0


def find_learning_rate(opt_state: Any) -> jax.Array | None:
    """Returns the learning rate that `optax.inject_hyperparams` keeps; None if it keeps none, or several."""
    import optax

    def is_injected(path: Any, _: Any) -> bool:
        # Beside the values, the state keeps the states of schedules, by the same names.
        return len(path) > 1 and getattr(path[-2], "name", None) == "hyperparams"

    found = optax.tree.get_all_with_path(opt_state, "learning_rate", is_injected)
    return jnp.asarray(found[0][1], jnp.float32) if len(found) == 1 else None


def _make_value_fn(
    evaluate: Callable[[Any], tuple[jax.Array, Any]], variables: Any, opt_state: Any, axis_name: Any
) -> Callable[[Any], jax.Array]:
    """Returns the loss as a function of the variables, for a line search.

    Its gradient is that of `evaluate`. JAX's own would be that of one device, without the default check of `shard_map`,
    and would keep the intermediate values of all micro-batches.
    """

    def look(moved: Any) -> tuple[jax.Array, Any]:
        if _holds(opt_state, ("MultiStepsState",)):
            raise ValueError(
                "A line search cannot be inside optax.MultiSteps: gradients are those of several batches, and the "
                "loss is that of the last. Given an optimizer with both. Cut one large batch into parts instead: "
                "make_train_step(..., micro_batches=n)."
            )
        if axis_name is not None and any(meshes.varies(x, axis_name) for x in jax.tree.leaves(variables)):
            raise ValueError(
                "A line search needs all parameters on every device. Given parameters that are spread over "
                f"axis_name={axis_name!r}. Pass them with in_specs=P(), or use plain jit over a mesh without axis_name."
            )
        if jax.tree.structure(moved) != jax.tree.structure(variables):
            raise ValueError(_WHOLE)
        return evaluate(moved)

    @jax.custom_vjp
    def value_fn(moved: Any) -> jax.Array:
        return look(moved)[0]

    def backward(grads: Any, cotangent: jax.Array) -> tuple[Any]:
        return (jax.tree.map(lambda x: (x * cotangent).astype(x.dtype), grads),)

    value_fn.defvjp(look, backward)
    return value_fn


_WHOLE = (
    "A line search must move all parameters. Given one that sees a part of them: it is inside optax.masked, "
    "optax.partition or primal_dual. Give it all parameters, or take another optimizer."
)


def _check_line_search(opt_state: Any) -> None:
    """Refuses a line search that sees a part of the parameters."""

    def is_masked(x: Any) -> bool:
        return type(x).__name__ == "MaskedState"

    masked = [x for x in jax.tree.leaves(opt_state, is_leaf=is_masked) if is_masked(x)]
    if _holds(masked, ("ScaleByZoomLinesearchState", "ScaleByBacktrackingLinesearchState")):
        raise ValueError(_WHOLE)


def _holds(tree: Any, names: tuple[str, ...]) -> bool:
    """Tells whether a pytree holds a node of a class with one of the names."""

    def is_one(x: Any) -> bool:
        return type(x).__name__ in names

    return any(map(is_one, jax.tree.leaves(tree, is_leaf=is_one)))


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
