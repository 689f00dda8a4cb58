"""Heads that accept a `loss_fn` in place of their own losses, and the checks and calls of this function."""

import abc
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.contract import NoClosedForm
from jaxheads.head import Head
from jaxheads.numerics import inputs, masking, meshes
from jaxheads.numerics.labels import LabelSpec

# What optax and others call logits and labels. Functions of labels and logits keep these names.
PREDICTIONS = ("predictions", "predictor_outputs")
LOGITS = ("logits", "scores", *PREDICTIONS)
LABELS = ("labels", "targets")

# Which labels optax's losses of logits take, by their names: shares for each logit; one of two hard labels for each
# logit, and which; one class id for each row; one-hot rows.
SHARES, HARD, IDS, ONE_HOT = "shares", "hard labels", "ids", "one-hot labels"
PAIRS = {"hinge_loss": (-1, 1), "perceptron_loss": (-1, 1), "sparsemax_loss": (0, 1)}
OPTAX = {
    **dict.fromkeys(("sigmoid_binary_cross_entropy", "sigmoid_focal_loss"), SHARES),
    **dict.fromkeys(PAIRS, HARD),
    **dict.fromkeys(("softmax_cross_entropy_with_integer_labels", "multiclass_hinge_loss"), IDS),
    **dict.fromkeys(("multiclass_perceptron_loss", "multiclass_sparsemax_loss"), IDS),
    **dict.fromkeys(("softmax_cross_entropy", "safe_softmax_cross_entropy", "poly_loss_cross_entropy"), ONE_HOT),
}


class AbstractLossFnHead(Head):
    """A head that accepts a `loss_fn` in place of its own losses.

    A `loss_fn` is called as `loss_fn(labels=, logits=[, features=])`. The losses of optax are taken as they are, also
    with arguments bound by `functools.partial`:

    * `RegressionHead` without `inverse_link_fn`: `huber_loss`, `l2_loss`, `log_cosh`, `squared_error`, and other
      functions of `predictions` and `targets`.
    * `BinaryClassHead` and `MultiLabelHead`: `sigmoid_binary_cross_entropy`, `sigmoid_focal_loss`, `sparsemax_loss`,
      `hinge_loss`, `perceptron_loss`. The last two get labels -1 and 1 in place of 0 and 1. The last three take hard
      labels only, so a soft label y counts as a positive of weight y and a negative of weight 1 - y.
    * `MultiClassHead`: `softmax_cross_entropy_with_integer_labels`, `multiclass_hinge_loss`,
      `multiclass_perceptron_loss`, `multiclass_sparsemax_loss`; `softmax_cross_entropy`, `safe_softmax_cross_entropy`
      and `poly_loss_cross_entropy`, which get one-hot labels.

    A `MultiLabelHead` takes the mean over classes of a loss of single logits, as its own loss does.
    """

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
        if self.loss_fn is not None:
            self._check_labels_of(self.loss_fn)

    def _check_labels_of(self, loss_fn: Callable[..., Any]) -> None:
        """Refuses a loss function that would read the labels, or the logits, of this head as something else."""
        spec, kind, takes = self.label_spec, _kind_of(loss_fn), None
        limits = (spec.kind, spec.low, spec.high) if isinstance(spec, LabelSpec) else (None, None, None)
        is_class_id = limits[:2] == ("int", 0) and self.logits_dimension > 1
        if kind in (IDS, ONE_HOT) and not is_class_id:
            takes = "one of several classes: it is for MultiClassHead"
        elif kind == SHARES and is_class_id:
            takes = "labels of single logits: it is for BinaryClassHead and MultiLabelHead"
        elif kind == HARD and limits != ("float", 0, 1):
            takes = "one of two classes for each logit: it is for BinaryClassHead and MultiLabelHead"
        elif kind is None and (_find_pair(loss_fn) or ("",))[0] in PREDICTIONS:
            if limits[1] is not None or vars(self).get("inverse_link_fn") is not None:
                takes = "predictions, and logits are no predictions of this head: it is for RegressionHead without link"
        if takes is not None:
            raise ValueError(
                f"loss_fn={_describe(loss_fn)} takes {takes}. Given arguments: {_names_of(loss_fn)}, for a "
                f"{type(self).__name__} of {self.logits_dimension} logits. If this is what you want, wrap the "
                "function: lambda labels, logits: f(logits, labels)."
            )

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
    """Refuses a loss function that takes neither `labels, logits[, features]` nor the arguments of a loss of optax.

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
    if _kind_of(loss_fn) is not None:
        return
    names = tuple(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
    by_keyword = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    called = (
        "It is called as loss_fn(labels=, logits=[, features=]). Bind other arguments, functools.partial(f, x=value); "
        "make them keyword-only with a default; or wrap the function, lambda labels, logits: f(logits, labels)."
    )
    pair = _find_pair(loss_fn) or ("logits", "labels")
    for needed, name in zip(("labels", "logits"), reversed(pair), strict=True):
        if name not in by_keyword:
            raise ValueError(f"loss_fn must contain argument: {needed}, by keyword. Given arguments: {names}. {called}")

    def expected(p: inspect.Parameter) -> bool:
        if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) or (p.name in (*pair, "features") and p.name in by_keyword):
            return True
        # The original accepted an argument `loss_reduction` and never passed it. With a default it does no harm.
        return p.default is not p.empty and (p.kind is p.KEYWORD_ONLY or p.name == "loss_reduction")

    if unexpected := [p.name for p in parameters if not expected(p)]:
        raise ValueError(f"loss_fn has unexpected args: {unexpected}. Given arguments: {names}. {called}")


def _names_of(loss_fn: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the names of the arguments of a function."""
    return tuple(inspect.signature(loss_fn).parameters)


def _find_pair(loss_fn: Callable[..., Any]) -> tuple[str, str] | None:
    """Returns what a function calls logits and labels, if its first two arguments are these, in any order.

    A function may call them `logits` and `labels` at any place. This is the rule of the original.
    """
    names = _names_of(loss_fn)
    if {"labels", "logits"} <= set(names):
        return "logits", "labels"
    for logits, labels in (names[:2], names[1::-1]) if len(names) > 1 else ():
        if logits in LOGITS and labels in LABELS:
            return logits, labels
    return None


def _name_of_optax(loss_fn: Callable[..., Any]) -> str:
    """Returns the name of a function of optax, perhaps with arguments bound by keyword; "" for all others."""
    while isinstance(loss_fn, functools.partial) and not loss_fn.args:
        loss_fn = loss_fn.func
    if isinstance(loss_fn, types.FunctionType) and loss_fn.__module__.startswith("optax."):
        return loss_fn.__name__
    return ""


def _kind_of(loss_fn: Callable[..., Any]) -> str | None:
    """Returns which labels a loss of optax takes; None for all functions that are not in the table."""
    return OPTAX.get(_name_of_optax(loss_fn))


def _describe(loss_fn: Callable[..., Any]) -> str:
    return loss_fn.__name__ if inspect.isfunction(loss_fn) else repr(loss_fn)


def takes_features(loss_fn: Callable[..., Any] | None) -> bool:
    """Tells whether a loss function needs the features: it has this argument, and no partial has bound it."""
    if loss_fn is None or (isinstance(loss_fn, functools.partial) and "features" in loss_fn.keywords):
        return False
    found = inspect.signature(loss_fn).parameters.get("features")
    return found is not None and found.kind in (found.POSITIONAL_OR_KEYWORD, found.KEYWORD_ONLY)


def call_loss_fn(loss_fn: Callable[..., Any], labels: Any, logits: jax.Array, features: Any, size: int) -> jax.Array:
    """Returns the losses of the user's function, after a check that they are `[..., size]`."""
    extra = {}
    if takes_features(loss_fn):
        if features is None:
            raise ValueError(
                "loss_fn takes features, and none were given. A head around this head passes them on: give its hook "
                "the argument, def losses(self, labels, logits, features): return self.inner.losses(labels, logits, "
                "features)."
            )
        extra = {"features": features}
    kind = _kind_of(loss_fn)
    if kind is not None:
        losses = _call_optax(loss_fn, kind, labels, logits, size)
    else:
        logits_name, labels_name = _find_pair(loss_fn) or ("logits", "labels")
        losses = jnp.asarray(loss_fn(**{labels_name: labels, logits_name: logits}, **extra))
    expected = (*logits.shape[:-1], size)
    if tuple(losses.shape) != expected:
        raise ValueError(
            f"loss_fn must return Tensor of shape [D0, D1, ... DN, {size}]: one unreduced loss an element. "
            f"logits_shape: {tuple(logits.shape)}, expected loss_shape: {expected}, given loss_shape: "
            f"{tuple(losses.shape)}. Use keepdims=True in a sum or mean over the last axis."
        )
    return losses


def _call_optax(loss_fn: Callable[..., Any], kind: str, labels: jax.Array, logits: jax.Array, size: int) -> jax.Array:
    """Returns the losses of a function of optax, `[..., size]`, with labels in the form that it takes."""
    if kind == ONE_HOT:
        return loss_fn(logits, (meshes.columns(logits, labels.dtype) == labels).astype(logits.dtype))[..., None]
    if kind == IDS:
        for _ in logits.shape[2:]:
            loss_fn = jax.vmap(loss_fn)  # some take one leading axis
        return loss_fn(logits, labels[..., 0])[..., None]
    if kind == HARD:
        negative, positive = (loss_fn(logits, jnp.full_like(logits, y)) for y in PAIRS[_name_of_optax(loss_fn)])
        # A sum of two parts, because a label may be soft. At an infinite logit, a part that does not count may be so.
        losses = masking.keep(labels > 0, labels * positive, 0) + masking.keep(labels < 1, (1 - labels) * negative, 0)
    else:
        losses = loss_fn(logits, labels)
    # Single logits have a head's own mean.
    return losses if losses.shape[-1] == size else jnp.mean(losses, axis=-1, keepdims=True)
