"""Heads that accept a `loss_fn` in place of their own losses, and the checks and calls of this function."""

import abc
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.contract import NoClosedForm
from jaxheads.head import Head
from jaxheads.numerics import inputs

CALLED = ("labels", "logits", "features")


class AbstractLossFnHead(Head):
    """A head that accepts a `loss_fn` in place of its own losses."""

    _: dataclasses.KW_ONLY
    loss_fn: Callable[..., Any] | None = None

    @abc.abstractmethod
    def standard_losses(self, labels: jax.Array, logits: jax.Array) -> jax.Array:
        """Returns the head's own losses, `[..., loss_size]`."""

    def standard_constant(self, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Returns `best_constant` for the head's own losses; by default there is no closed form."""
        return super().best_constant(labels, weights)

    @property
    def loss_size(self) -> int:
        """The size of the last axis of the losses."""
        return 1

    def validate(self) -> None:
        check_loss_fn(self.loss_fn)

    @property
    def reads_features(self) -> bool:
        return takes_features(self.loss_fn)

    @property
    def coupling(self) -> str | None:
        return "row" if self.loss_fn is None else None

    def losses(self, labels: jax.Array, logits: jax.Array, features: Any = None) -> jax.Array:
        if self.loss_fn is None:
            return self.standard_losses(labels, logits)
        return call_loss_fn(self.loss_fn, labels, logits, features, self.loss_size)

    def best_constant(self, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
        if self.loss_fn is not None:
            raise NoClosedForm(
                f"{type(self).__name__} with a loss_fn has no best constant logits in closed form. Given {self!r}. "
                "Start from zeros, or from those of the head without it."
            )
        return self.standard_constant(labels, weights)


def check_label_dimension(dimension: Any) -> None:
    """Refuses every value that is not a positive integer."""
    if not inputs.is_integer(dimension, 1):
        raise ValueError(f"Invalid label_dimension {dimension!r}: expected an integer of at least 1.")


def check_loss_fn(loss_fn: Any) -> None:
    """Refuses a loss function that does not take `labels, logits[, features]`.

    Other arguments must be keyword-only with a default. `functools.partial` makes such arguments when it binds them by
    keyword. An argument that may be positional is refused even with a default, as in the original: it may be a misspelt
    `features`.
    """
    if loss_fn is None:
        return
    if not callable(loss_fn):
        raise ValueError(f"loss_fn must be a function loss_fn(labels, logits[, features]). Given {loss_fn!r}.")
    try:
        parameters = inspect.signature(loss_fn).parameters.values()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"loss_fn must be a function loss_fn(labels, logits[, features]). Given {loss_fn!r}, whose arguments "
            "Python cannot tell (a builtin?). Wrap it: lambda labels, logits: f(...)."
        ) from error
    names = tuple(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
    by_keyword = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    called = (
        "It is called as loss_fn(labels=, logits=[, features=]). Bind other arguments, functools.partial(f, x=value); "
        "make them keyword-only with a default; or wrap the function, lambda labels, logits: f(logits, labels)."
    )
    for needed in ("labels", "logits"):
        if needed not in by_keyword:
            raise ValueError(f"loss_fn must contain argument: {needed}, by keyword. Given arguments: {names}. {called}")

    def expected(p: inspect.Parameter) -> bool:
        if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) or (p.name in CALLED and p.name in by_keyword):
            return True
        # The original accepted an argument `loss_reduction` and never passed it. With a default it does no harm.
        return p.default is not p.empty and (p.kind is p.KEYWORD_ONLY or p.name == "loss_reduction")

    if unexpected := [p.name for p in parameters if not expected(p)]:
        raise ValueError(f"loss_fn has unexpected args: {unexpected}. Given arguments: {names}. {called}")


def takes_features(loss_fn: Callable[..., Any] | None) -> bool:
    """Tells whether a loss function needs the features: it has this argument, and no partial has bound it."""
    if loss_fn is None or (isinstance(loss_fn, functools.partial) and "features" in loss_fn.keywords):
        return False
    found = inspect.signature(loss_fn).parameters.get("features")
    return found is not None and found.kind in (found.POSITIONAL_OR_KEYWORD, found.KEYWORD_ONLY)


def call_loss_fn(loss_fn: Callable[..., Any], labels: Any, logits: jax.Array, features: Any, size: int) -> jax.Array:
    """Returns the losses of the user's function, after a check that they are `[..., size]`."""
    extra = {"features": features} if takes_features(loss_fn) else {}
    losses = jnp.asarray(loss_fn(labels=labels, logits=logits, **extra))
    expected = (*logits.shape[:-1], size)
    if tuple(losses.shape) != expected:
        raise ValueError(
            f"loss_fn must return Tensor of shape [D0, D1, ... DN, {size}]: one unreduced loss an element. "
            f"logits_shape: {tuple(logits.shape)}, expected loss_shape: {expected}, given loss_shape: "
            f"{tuple(losses.shape)}. Use keepdims=True in a sum or mean over the last axis."
        )
    return losses
