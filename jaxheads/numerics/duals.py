"""Multipliers in a parameter tree: how they are found, and the refusal of an optimizer that would go the wrong way."""

from typing import Any, NamedTuple

import jax

MULTIPLIERS = "lagrange_multipliers"


class PrimalDualState(NamedTuple):
    """The state of an optimizer that ascends on multipliers, which is what it is known by.

    Attributes:
        steps: int32, how many were taken.
        inner: the states of the two optimizers.
    """

    steps: Any
    inner: Any


def is_multiplier(path: Any) -> bool:
    """Whether a path in a pytree of parameters leads to multipliers."""
    return MULTIPLIERS in jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def has_multipliers(params: Any) -> bool:
    """Whether there are any."""
    return any(is_multiplier(path) for path, _ in jax.tree.leaves_with_path(params))


def check_ascends(opt_state: Any, params: Any) -> None:
    """Refuses parameters with multipliers under an optimizer that would descend on them, and on no bound."""
    states = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, PrimalDualState))
    if has_multipliers(params) and not any(isinstance(x, PrimalDualState) for x in states):
        raise ValueError(
            f"The parameters hold multipliers ({MULTIPLIERS!r}), and this optimizer would minimize over them: they "
            "fall without end, where they must rise while a constraint is violated. Wrap it: optimizer = "
            "jh.training.primal_dual(optimizer)."
        )
