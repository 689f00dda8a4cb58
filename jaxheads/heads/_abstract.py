"""What several heads share."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.numerics import stable


def check_loss_fn(loss_fn: Any) -> None:
    """Refuses a loss function that does not take `labels, logits[, features]`."""
    if loss_fn is None:
        return
    if not callable(loss_fn):
        raise ValueError(f"loss_fn must be a function loss_fn(labels, logits[, features]). Given {loss_fn!r}.")
    parameters = inspect.signature(loss_fn).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    for needed in ("labels", "logits"):
        if needed not in names:
            raise ValueError(f"loss_fn must contain argument: {needed}. Given arguments: {tuple(names)}.")
    # The original knew the argument `loss_reduction` and never passed it: with a default it does no harm.
    optional = [p.name for p in parameters if p.default is not p.empty]
    unexpected = [n for n in names if n not in ("labels", "logits", "features") and n not in optional]
    known = [n for n in names if n not in ("labels", "logits", "features", "loss_reduction")]
    if unexpected or known:
        raise ValueError(
            f"loss_fn has unexpected args: {unexpected or known}. It is called as "
            "loss_fn(labels=, logits=[, features=])."
        )


def takes_features(loss_fn: Callable[..., Any] | None) -> bool:
    """Whether a loss function asks for the features."""
    return loss_fn is not None and "features" in inspect.signature(loss_fn).parameters


def call_loss_fn(loss_fn: Callable[..., Any], labels: Any, logits: jax.Array, features: Any, size: int) -> jax.Array:
    """The user's per-element losses, checked to be `[..., size]`."""
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


def check_thresholds(thresholds: Any) -> None:
    """Refuses thresholds outside (0, 1), and two that print alike: they would share their metric keys."""
    if not isinstance(thresholds, tuple):
        raise ValueError(f"thresholds must be a sequence of numbers in (0, 1). Given {thresholds!r}.")
    for t in thresholds:
        if isinstance(t, bool) or not isinstance(t, (int, float)) or not 0 < t < 1 or not stable.fits_float32(t):
            raise ValueError(f"thresholds not in (0, 1): {t!r} in {thresholds!r}.")
    printed: dict[str, float] = {}
    for t in thresholds:
        if printed.setdefault(f"{t:g}", t) != t:
            raise ValueError(
                f"thresholds {printed[f'{t:g}']!r} and {t!r} print alike (%g) and would share the metric keys "
                f"positive_threshold_{t:g}. Leave one out."
            )


def class_id_outputs(logits: jax.Array, n: int) -> dict[str, Any]:
    """`all_class_ids`, `[D0, n]` at any rank, as in the original."""
    return {"all_class_ids": lambda: jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None], (logits.shape[0], n))}
