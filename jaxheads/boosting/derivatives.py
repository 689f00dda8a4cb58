"""Gradient and diagonal Hessian of any head's loss with respect to its logits, for gradient boosting."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.boosting.conventions import Hessian, Options, find_convention, is_separable
from jaxheads.contract import Given
from jaxheads.engine import losing, trees
from jaxheads.engine.elements import clean, debug_check, dense_logits, see
from jaxheads.engine.gathering import at, gather
from jaxheads.engine.readiness import ready
from jaxheads.head import Head
from jaxheads.heads import RegressionHead
from jaxheads.numerics import fields
from jaxheads.numerics.batch import Batch, Devices, Elements
from jaxheads.numerics.kept import programs_per_head
from jaxheads.numerics.linear import LinearLogits


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

    The function is compiled once for a head, its options and the shapes. It takes the sum under every reduction, so
    the derivatives of a row do not depend on the number of rows. Weights count once. The derivatives of masked elements
    are 0. The Hessian is right if the loss of a row depends on the logits of that row alone.

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
        floor: the smallest Hessian, wherever the weight is not 0.
        library: the library whose conventions are used, `"xgboost"` or `"lightgbm"`.
        max_delta_step: the Poisson objectives take the Hessian at the logit plus this number.

    Returns:
        `(gradient, hessian)`, float32 of the shape of the logits `[..., logits_dimension]`; for a `MultiHead` one array
        each, in the order of its heads.

    Raises:
        ValueError: an unknown `hessian` or `library`, a negative floor or `max_delta_step`; a function whose result has
            another shape; everything that `head.loss` refuses.

    Source: `tests/test_boosting.py` holds the conventions against XGBoost 3.2 and LightGBM 4.7.

    >>> import jax.numpy as jnp
    >>> import jaxheads as jh
    >>> labels, logits = jnp.array([1, 0]), jnp.array([[0.0], [0.0]])
    >>> gradient, hessian = jh.boosting.derivatives(jh.BinaryClassHead(), labels, logits, weights=[1.0, 4.0])
    >>> gradient.ravel().tolist(), hessian.ravel().tolist()
    ([-0.5, 2.0], [0.25, 1.0])
    """
    options = Options(hessian, floor, library, max_delta_step)
    # On the host, so that shapes, dtypes and values are checked as everywhere.
    bound = ready(head, params)
    batch = gather(bound, Given(labels, logits, features, weights, where))
    return differentiate_compiled(head, bound, batch, options)


def differentiate(head: Head, batch: Batch, options: Options) -> tuple[jax.Array, jax.Array]:
    """Returns the `derivatives` of a gathered batch."""
    gradients, hessians = zip(*_differentiate_leaves(head, batch, jnp.float32(1), options), strict=True)
    return jnp.concatenate(gradients, axis=-1), jnp.concatenate(hessians, axis=-1)


def differentiate_compiled(
    owner: Head, head: Head, batch: Batch, options: Options, logits: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Does `differentiate` in compiled code, which is freed with `owner`, and adds logits before it, if they are given.

    As everywhere, JAX is given the leaves of the head alone: it would keep all else for ever.
    """
    leaves, structure = jax.tree.flatten(head)
    return _compile(fields.unbound(owner), structure, options)(leaves, batch, logits)


@programs_per_head
def _compile(_: Head, structure: Any, options: Options) -> Any:
    def run(leaves: Any, batch: Batch, logits: Any) -> tuple[jax.Array, jax.Array]:
        head = jax.tree.unflatten(structure, leaves)
        return differentiate(head, batch if logits is None else at(head, batch, logits), options)

    return jax.jit(run)


def _differentiate_leaves(
    head: Head, batch: Batch, factor: jax.Array, options: Options
) -> list[tuple[jax.Array, jax.Array]]:
    """Returns the derivatives of every head without heads inside, in order. Its loss counts `factor` times."""
    if batch.parts is None:
        return [_differentiate_leaf(head, batch, factor, options)]
    parts, found = trees.parts_of(head, batch), []
    zeros = {name: jnp.float32(0) for name in head.parts()}
    factors = jax.grad(lambda losses: head.combine(losses, zeros))(zeros)
    for name, inner in head.parts().items():
        own = _differentiate_leaves(inner, parts[name], factor * factors[name], options)
        found += jax.tree.map(jnp.zeros_like, own) if name in head.silent else own
    return found


def _differentiate_leaf(head: Head, batch: Batch, factor: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
    logits, hessian = dense_logits(head, batch.logits), options.hessian
    if isinstance(logits, Mapping) or len(logits.shape) < 2:
        raise ValueError(
            f"A booster gives one row of logits an example. Given {type(head).__name__}, which takes a dict."
        )
    if isinstance(logits, LinearLogits):
        logits = logits.multiply()

    def total(logits: jax.Array) -> jax.Array:
        seen = see(head, batch.replace(logits=logits), Devices())
        debug_check(head, seen.elements.bad)
        return losing.sums(head, seen).total

    if isinstance(hessian, str) and hessian != "unit" and head.coupling in ("batch", "sequence"):
        raise ValueError(
            f"The loss of a row of {type(head).__name__} looks at other rows, as that of pairs (roc_auc) does, and has "
            "no Hessian of a row alone: shifting all logits changes nothing. Given "
            f'hessian={hessian!r}. Pass hessian="unit", or a function.'
        )
    gradient = jax.grad(total)
    g, library = gradient(logits), find_convention(head, options) if hessian == "auto" else None
    elements = clean(head, batch)
    if library is not None and library.curvature is not None:
        h = _weigh(elements, library.curvature(elements.logits))
    elif callable(hessian):
        h = _weigh(elements, _broadcast(hessian(elements.labels, elements.logits), logits.shape))
    elif hessian == "unit":
        h = _weigh(elements, jnp.ones_like(logits))
    else:
        h = _differentiate_twice(gradient, logits, is_separable(head))
        h = h if library is None else library.factor * h
        if hessian == "gauss_newton" and isinstance(head, RegressionHead) and head.loss_fn is not None:
            h = h - _differentiate_link(head, logits, g)
    live = jnp.broadcast_to(elements.weights != 0, h.shape)
    floored = jnp.where(live, jnp.maximum(factor * h, jnp.full_like(h, options.floor)), jnp.zeros_like(h))
    return (factor if library is None else factor * library.scale) * g, floored


def _weigh(elements: Elements, values: jax.Array) -> jax.Array:
    """Weighs values as the loss is weighed; NaN where a label or weight is illegal."""
    weights = elements.weights * jnp.where(elements.bad, jnp.nan, jnp.ones_like(elements.weights))
    return values * (weights if elements.rows.scale is None else weights * elements.rows.scale)


def _broadcast(values: Any, shape: tuple[int, ...]) -> jax.Array:
    values = jnp.asarray(values, jnp.float32)
    if jnp.shape(values) not in (shape, (*shape[:-1], 1)):
        raise ValueError(
            f"hessian must return one number a logit, {shape}, or a row, {(*shape[:-1], 1)}. Given {jnp.shape(values)}."
        )
    return jnp.broadcast_to(values, shape)


def _differentiate_twice(gradient: Callable[[jax.Array], jax.Array], logits: jax.Array, separable: bool) -> jax.Array:
    """Returns the second derivatives along each logit, forward over reverse: all rows at once, column by column."""

    def along(tangent: jax.Array) -> jax.Array:
        return jax.jvp(gradient, (logits,), (tangent,))[1]

    if separable:
        return along(jnp.ones_like(logits))

    def column(k: jax.Array) -> jax.Array:
        chosen = jnp.expand_dims(jnp.arange(logits.shape[-1]) == k, tuple(range(logits.ndim - 1)))
        tangent = jnp.broadcast_to(chosen, logits.shape).astype(logits.dtype)
        return jnp.sum(along(tangent) * tangent, axis=-1)

    return jnp.moveaxis(jax.lax.map(column, jnp.arange(logits.shape[-1])), 0, -1)


def _differentiate_link(head: RegressionHead, logits: jax.Array, g: jax.Array) -> jax.Array:
    """Returns the term of the second derivative that the bend of the link adds: `loss'(prediction) link''(z)`."""
    link = head.inverse_link_fn
    if link is None:
        return jnp.zeros_like(g)

    def slope(logits: jax.Array) -> jax.Array:
        return jax.jvp(link, (logits,), (jnp.ones_like(logits),))[1]

    first, second = jax.jvp(slope, (logits,), (jnp.ones_like(logits),))
    # Where the link is flat nothing reaches the loss.
    return jnp.where(first == 0, jnp.zeros_like(g), g * second / jnp.where(first == 0, jnp.ones_like(first), first))
