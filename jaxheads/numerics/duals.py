"""Multipliers in a parameter tree: how they are found, and the refusal of an optimizer that would go the wrong way."""

from typing import Any, NamedTuple

import jax

from jaxheads.numerics.fields import names_along

MULTIPLIERS = "lagrange_multipliers"


class PrimalDualState(NamedTuple):
    """The state of an optimizer that ascends on multipliers. Its type tells that the optimizer does.

    Attributes:
        steps: int32 `[m]`, the number of steps, for each of the m leaves of multipliers that the optimizer moves.
        inner: the states of the two optimizers.
    """

    steps: Any
    inner: Any


def is_multiplier(path: Any) -> bool:
    """Tells whether a path in a pytree of parameters leads to multipliers."""
    return any(name.endswith(MULTIPLIERS) for name in names_along(path))


def count_multipliers(params: Any) -> int:
    """Returns how many leaves are multipliers."""
    return sum(is_multiplier(path) for path, _ in jax.tree.leaves_with_path(params))


def check_ascends(opt_state: Any, params: Any) -> None:
    """Refuses parameters with multipliers under an optimizer that would descend on some of them, without end."""
    states = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, PrimalDualState))
    # By shapes, because traces have them too. Replicas have leading axes.
    moved = sum(x.steps.shape[-1] for x in states if isinstance(x, PrimalDualState))
    if (given := count_multipliers(params)) > moved:
        raise ValueError(
            f"The parameters hold multipliers ({MULTIPLIERS!r}), and this optimizer would minimize over them "
            f"({given - moved} of {given} leaves): they fall without end, where they must rise while a constraint is "
            "violated. Wrap it, all of a multi_transform: optimizer = jh.training.primal_dual(optimizer)."
        )
