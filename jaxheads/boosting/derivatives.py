"""Gradient and diagonal Hessian of any head's loss with respect to its logits: what gradient boosting asks for."""

import numbers
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.boosting.conventions import LIBRARIES, Options, convention, is_separable
from jaxheads.contract import Given
from jaxheads.engine import losing, trees
from jaxheads.engine.elements import clean, dense_logits, see
from jaxheads.engine.gathering import gather
from jaxheads.engine.readiness import ready
from jaxheads.head import Head
from jaxheads.heads import RegressionHead
from jaxheads.numerics.batch import Batch, Devices, Elements
from jaxheads.numerics.linear import LinearLogits

Hessian: TypeAlias = str | Callable[[Any, jax.Array], Any]
HESSIANS = ("auto", "exact", "gauss_newton", "unit")


def derivatives(
    head: Head,
    labels: Any,
    logits: Any,
    *,
    weights: Any = None,
    where: Any = None,
    features: Any = None,
    params: Any = None,
    hessian: Hessian = "auto",
    floor: float = 1e-16,
    library: str = "xgboost",
    max_delta_step: float = 0.7,
) -> tuple[jax.Array, jax.Array]:
    """Gradient and diagonal Hessian, with respect to the logits, of the weighted sum of the head's losses.

    Compiled once for a head, its options and the shapes. Whatever the head's reduction, it is the sum that is taken: a
    row's derivatives do not depend on how many there are. Weights count once, masked elements are 0. The Hessian is
    right where a row's loss depends on that row's logits alone.

    Args:
        head: any head; of a `MultiHead` the losses are added under its weights.
        labels, logits, weights, where, features, params: as for `head.loss`.
        hessian: `"exact"`; `"auto"`, the library's own convention where the head's loss is one of its objectives, else
            exact (the gradient then too: squared error is halved, the mean over labels is a sum);
            `"gauss_newton"`, for a `RegressionHead` with a `loss_fn` and an `inverse_link_fn` the curvature of the loss
            in the predictions alone, `loss''(z) - loss'(z) link''(z) / link'(z)`, not negative where the loss is convex
            in them, else exact (which for the likelihoods here, in their natural parameters, is the Fisher information
            already); `"unit"`, the weights, for losses without curvature (hinge, quantile); or a function
            `(labels, logits) -> h`, of weight 1, that broadcasts to the logits.
        floor: what the Hessian is at least, where the weight is not 0.
        library: whose conventions, `"xgboost"` or `"lightgbm"`.
        max_delta_step: the Poisson objectives take the Hessian at a logit so much larger.

    Returns:
        `(gradient, hessian)`, float32 of the shape of the logits `[..., logits_dimension]`, those of a `MultiHead` in
        one array, in the order of its heads.

    Raises:
        ValueError: an unknown `hessian` or `library`, a negative floor or `max_delta_step`; a function whose result has
            another shape; what `head.loss` raises.

    Source: `tests/test_boosting.py` holds the conventions against XGBoost 3.2 and LightGBM 4.7.

    >>> import jax.numpy as jnp
    >>> import jaxheads as jh
    >>> labels, logits = jnp.array([1, 0]), jnp.array([[0.0], [0.0]])
    >>> gradient, hessian = jh.boosting.derivatives(jh.BinaryClassHead(), labels, logits, weights=[1.0, 4.0])
    >>> gradient.ravel().tolist(), hessian.ravel().tolist()
    ([-0.5, 2.0], [0.25, 1.0])
    """
    options = check_options(hessian, floor, library, max_delta_step)
    # On the host, so that shapes, dtypes and values are looked at as everywhere.
    bound = ready(head, params)
    batch = gather(bound, Given(labels, logits, features, weights, where))
    return compiled(bound, batch, hessian, float(floor), options)


def check_options(hessian: Any, floor: Any, library: Any, max_delta_step: Any) -> Options:
    """The options, or an error that says what they may be."""
    if not callable(hessian) and hessian not in HESSIANS:
        raise ValueError(f"hessian must be one of {HESSIANS}, or a function (labels, logits) -> h. Given {hessian!r}.")
    if library not in LIBRARIES:
        raise ValueError(f"library must be one of {LIBRARIES}. Given {library!r}.")
    for name, value in (("floor", floor), ("max_delta_step", max_delta_step)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) < np.inf:
            raise ValueError(f"{name} must be a finite number, not negative. Given {value!r}.")
    return Options(library, float(max_delta_step))


def of_batch(head: Head, batch: Batch, hessian: Hessian, floor: float, options: Options) -> tuple[jax.Array, jax.Array]:
    """`derivatives` of a gathered batch."""
    each = _each(head, batch, jnp.float32(1), hessian, floor, options)
    gradients, hessians = zip(*each, strict=True)
    return jnp.concatenate(gradients, axis=-1), jnp.concatenate(hessians, axis=-1)


compiled = jax.jit(of_batch, static_argnums=(2, 3, 4))


def _each(
    head: Head, batch: Batch, factor: jax.Array, hessian: Hessian, floor: float, options: Options
) -> list[tuple[jax.Array, jax.Array]]:
    """The derivatives of every head inside, in order."""
    if batch.parts is None:
        return [_of_one(head, batch, factor, hessian, floor, options)]
    parts, found = trees.parts_of(head, batch), []
    zeros = {name: jnp.float32(0) for name in head.parts()}
    # How much the loss of each head inside counts in the loss of all.
    factors = jax.grad(lambda losses: head.combine(losses, zeros))(zeros)
    for name, inner in head.parts().items():
        own = _each(inner, parts[name], factor * factors[name], hessian, floor, options)
        found += jax.tree.map(jnp.zeros_like, own) if name in head.silent else own
    return found


def _of_one(
    head: Head, batch: Batch, factor: jax.Array, hessian: Hessian, floor: float, options: Options
) -> tuple[jax.Array, jax.Array]:
    logits = dense_logits(head, batch.logits)
    if isinstance(logits, Mapping) or len(logits.shape) < 2:
        raise ValueError(
            f"A booster gives one row of logits an example. Given {type(head).__name__}, which takes a dict."
        )
    if isinstance(logits, LinearLogits):
        logits = logits.multiply()

    def total(logits: jax.Array) -> jax.Array:
        return losing.sums(head, see(head, batch.replace(logits=logits), Devices())).total

    if isinstance(hessian, str) and hessian != "unit" and head.coupling in ("batch", "sequence"):
        raise ValueError(
            f"The loss of a row of {type(head).__name__} looks at other rows, as that of pairs (roc_auc) does, and has "
            "no Hessian of a row alone: shifting all logits changes nothing. Given "
            f'hessian={hessian!r}. Pass hessian="unit", or a function.'
        )
    gradient = jax.grad(total)
    g, library = gradient(logits), convention(head, options) if hessian == "auto" else None
    elements = clean(head, batch)
    if library is not None:
        h = _weighted(elements, library.curvature(elements.logits))
    elif callable(hessian):
        h = _weighted(elements, _checked(hessian(elements.labels, elements.logits), logits.shape))
    elif hessian == "unit":
        h = _weighted(elements, jnp.ones_like(logits))
    else:
        h = _diagonal(gradient, logits, is_separable(head))
        if hessian == "gauss_newton" and isinstance(head, RegressionHead) and head.loss_fn is not None:
            h = h - _bend(head, logits, g)
    live = jnp.broadcast_to(elements.weights != 0, h.shape)
    floored = jnp.where(live, jnp.maximum(factor * h, jnp.full_like(h, floor)), jnp.zeros_like(h))
    return (factor if library is None else factor * library.scale) * g, floored


def _weighted(elements: Elements, values: jax.Array) -> jax.Array:
    """Values of weight 1, weighted as the loss is; NaN where a label or weight is illegal."""
    weights = elements.weights * jnp.where(elements.bad, jnp.nan, jnp.ones_like(elements.weights))
    return values * (weights if elements.rows.scale is None else weights * elements.rows.scale)


def _checked(values: Any, shape: tuple[int, ...]) -> jax.Array:
    values = jnp.asarray(values, jnp.float32)
    if jnp.shape(values) not in (shape, (*shape[:-1], 1)):
        raise ValueError(
            f"hessian must return one number a logit, {shape}, or a row, {(*shape[:-1], 1)}. Given {jnp.shape(values)}."
        )
    return jnp.broadcast_to(values, shape)


def _diagonal(gradient: Callable[[jax.Array], jax.Array], logits: jax.Array, separable: bool) -> jax.Array:
    """The second derivatives along each logit, forward over reverse: all rows at once, column by column."""

    def along(tangent: jax.Array) -> jax.Array:
        return jax.jvp(gradient, (logits,), (tangent,))[1]

    if separable:
        return along(jnp.ones_like(logits))

    def column(k: jax.Array) -> jax.Array:
        chosen = jnp.expand_dims(jnp.arange(logits.shape[-1]) == k, tuple(range(logits.ndim - 1)))
        tangent = jnp.broadcast_to(chosen, logits.shape).astype(logits.dtype)
        return jnp.sum(along(tangent) * tangent, axis=-1)

    return jnp.moveaxis(jax.lax.map(column, jnp.arange(logits.shape[-1])), 0, -1)


def _bend(head: RegressionHead, logits: jax.Array, g: jax.Array) -> jax.Array:
    """What the bend of the link adds to the second derivative: `loss'(prediction) link''(z)`."""
    link = head.inverse_link_fn
    if link is None:
        return jnp.zeros_like(g)

    def slope(logits: jax.Array) -> jax.Array:
        return jax.jvp(link, (logits,), (jnp.ones_like(logits),))[1]

    first, second = jax.jvp(slope, (logits,), (jnp.ones_like(logits),))
    # Where the link is flat nothing reaches the loss.
    return jnp.where(first == 0, jnp.zeros_like(g), g * second / jnp.where(first == 0, jnp.ones_like(first), first))
