"""An optimizer for Lagrangians: it descends on the model and ascends on the multipliers."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxheads.engine.optimizing import is_optimizer
from jaxheads.numerics.duals import MULTIPLIERS, PrimalDualState, count_multipliers, is_multiplier


def primal_dual(
    optimizer: optax.GradientTransformation,
    dual_optimizer: optax.GradientTransformation | None = None,
    *,
    max_multiplier: float | None = None,
    warm_up: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Descends on the parameters with one optimizer, and ascends on the multipliers of a head with another.

    Multipliers are all leaves with a name that ends with `lagrange_multipliers`, anywhere in the tree of parameters. A
    multiplier rises while its constraint is violated. A projection keeps it in `[0, max_multiplier]`; from 0 it can
    rise again. Weight decay in `optimizer` does not reach multipliers, nor does a clip of the global norm, and they do
    not count in that norm.

    A head's loss is a mean of Lagrangians. A leaf has one multiplier for each of them: for each label, and each anchor
    or group. The gradient of a multiplier is multiplied by their number, so that its rate does not depend on how many
    there are. Scales of the whole loss (`loss_reduction="sum"`, the weight of a head in a `MultiHead`) act on the
    multipliers as on all parameters.

    Args:
        optimizer: for all other parameters.
        dual_optimizer: for the multipliers, `optax.sgd(1.0)` if None. A plain rate is best: a step is then as large as
            the violation. Adam ignores this size. `optax.optimistic_gradient_descent` damps oscillations.
        max_multiplier: a bound for the multipliers. If a constraint cannot be met, its multiplier rises without end.
        warm_up: the number of first steps in which the multipliers, and the state of `dual_optimizer`, do not change.
            With multipliers of 1, `precision_at_recall` and `tpr_at_fpr` are the cross-entropy.

    Raises:
        ValueError: an optimizer that is none, a bound that is not positive, a negative `warm_up`; in `init`, parameters
            without multipliers; in `update`, no `params`.

    Source: Cotter et al., "Two-Player Games for Efficient Non-Convex Constrained Optimization" (ALT 2019). The original
    `global_objectives` reverses the gradient instead, and its `dual_rate_factor` has no effect under Adam.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> from jaxheads.training import primal_dual
    >>> optimizer = primal_dual(optax.sgd(0.1), optax.sgd(0.5), max_multiplier=4.0)
    >>> params = {"w": jnp.ones(1), "head": {"lagrange_multipliers": jnp.array([1.0, 0.0, 3.5])}}
    >>> state = optimizer.init(params)
    >>> gradients = {"w": jnp.ones(1), "head": {"lagrange_multipliers": jnp.array([0.2, -0.1, 0.5])}}
    >>> updates, state = optimizer.update(gradients, state, params)
    >>> new = optax.apply_updates(params, updates)  # 1 + 0.5 * 3 * 0.2, and two at their bounds
    >>> new["w"], new["head"]["lagrange_multipliers"]
    (Array([0.9], dtype=float32), Array([1.3, 0. , 4. ], dtype=float32))
    """
    dual_optimizer = optax.sgd(1.0) if dual_optimizer is None else dual_optimizer
    for name, given in (("optimizer", optimizer), ("dual_optimizer", dual_optimizer)):
        if not is_optimizer(given):
            raise ValueError(
                f"{name} must be an optax.GradientTransformation, such as optax.sgd(0.1). Given {given!r}."
            )
    if max_multiplier is not None and not (_is_number(max_multiplier) and 0 < max_multiplier < math.inf):
        raise ValueError(f"max_multiplier must be a positive number, or None for no bound. Given {max_multiplier!r}.")
    if not isinstance(warm_up, int) or isinstance(warm_up, bool) or warm_up < 0:
        raise ValueError(f"warm_up must be a number of steps, 0 or more. Given {warm_up!r}.")

    def has_begun(step: Any, **_: Any) -> jax.Array:
        return jnp.asarray(step) >= warm_up

    if warm_up:
        dual_optimizer = optax.conditionally_mask(dual_optimizer, has_begun)
    both = optax.multi_transform(
        {"primal": optimizer, "dual": dual_optimizer},
        lambda params: jax.tree_util.tree_map_with_path(_label_leaf, params),
    )

    def init(params: Any) -> PrimalDualState:
        if not (moved := count_multipliers(params)):
            raise ValueError(
                f"primal_dual needs parameters with multipliers, leaves called {MULTIPLIERS!r} as "
                "jh.GlobalObjectiveHead(...).init(key) makes them. Given none. Pass the plain optimizer."
            )
        return PrimalDualState(jnp.zeros(moved, jnp.int32), both.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, PrimalDualState]:
        if params is None:
            raise ValueError(
                "primal_dual keeps multipliers within bounds and must know where they are. Given params=None: call "
                "update(gradients, state, params)."
            )

        def ascent(path: Any, gradient: Any) -> Any:
            return gradient if not is_multiplier(path) or gradient is None else -gradient * gradient.size

        def within(path: Any, change: Any, value: Any) -> Any:
            if not is_multiplier(path) or change is None:
                return change
            return (jnp.clip(value + change, 0, max_multiplier) - value).astype(change.dtype)

        each = functools.partial(jax.tree_util.tree_map_with_path, is_leaf=lambda x: x is None)
        changes, inner = both.update(each(ascent, updates), state.inner, params, **extra)
        return each(within, changes, params), PrimalDualState(optax.safe_increment(state.steps), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _label_leaf(path: Any, _: Any) -> str:
    return "dual" if is_multiplier(path) else "primal"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
