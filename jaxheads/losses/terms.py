"""From per-element losses to one number."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.numerics import masking, meshes
from jaxheads.numerics.batch import Elements
from jaxheads.numerics.reduction import Reduction


class Term(NamedTuple):
    """Per-element losses with an element count of their own (pairs, events, conditional tasks).

    Attributes:
        values: `[..., 1]` or `[..., d]`.
        count: the number in place of 1 for each element in every denominator; `[..., 1]` or the same shape.
    """

    values: Any
    count: Any = None

    def scaled(self, scale: Any) -> "Term":
        """Returns the term with each element counted `scale [..., 1]` times, in the loss and in the denominators."""
        if scale is None:
            return self
        return Term(self.values * scale, scale if self.count is None else self.count * scale)


def as_term(losses: Any, lead: tuple[int, ...], sizes: tuple[int, ...], who: str) -> Term:
    """Returns a hook's result as a term with float32 values. Refuses shapes that are not `lead` and one of `sizes`."""
    term = losses if isinstance(losses, Term) else Term(losses)
    allowed = list(dict.fromkeys((*lead, size) for size in sizes))
    for part in (part for part in term if part is not None):
        if jnp.shape(part) not in allowed:
            raise ValueError(
                f"{who} must return per-element losses of shape {' or '.join(map(str, allowed))}. Given "
                f"{jnp.shape(part)}. Use keepdims=True in a sum or mean over the last axis."
            )
    return Term(jnp.asarray(term.values, jnp.float32), term.count)


class LossSums(NamedTuple):
    """The sums that a loss is made of, float32 scalars.

    Attributes:
        total: the weighted sum of the losses.
        divisor: the number that it is divided by.
        live: the number of elements whose weight is not 0.
    """

    total: Any
    divisor: Any
    live: Any


def loss_sums(term: Term, elements: Elements, how: Reduction) -> LossSums:
    """Returns the sums of a term's losses."""
    elements = _fit_elements(elements, term)
    # By multiplication: `where(bad, nan, loss)` would have gradient 0.
    values = term.values * masking.keep(~elements.bad, masking.ones_like(elements.weights), np.nan)
    total = masking.total(masking.weighted(values, elements.weights))
    live = masking.total(elements.live)
    return LossSums(total, divisor(term, elements, how), live)


def divisor(term: Term, elements: Elements, how: Reduction) -> jax.Array:
    """Returns the divisor of the weighted sum (under `SUM`, unused, the number of elements)."""
    elements = _fit_elements(elements, term)
    multiplicity: jax.Array = {
        Reduction.SUM: lambda: elements.rows.exists,
        Reduction.SUM_OVER_BATCH_SIZE: lambda: elements.rows.exists,
        Reduction.MEAN: lambda: elements.weights,
        Reduction.SUM_BY_NONZERO_WEIGHTS: lambda: masking.is_not_zero(elements.weights),
    }[how]()
    if term.count is None and multiplicity.shape == term.values.shape and meshes.is_off_mesh(term.values):
        return masking.total(multiplicity)
    # By multiplication: a broadcast would be laid out unlike values whose last axis is sharded.
    multiplicity = multiplicity.astype(jnp.float32) * masking.ones_like(term.values)
    return masking.total(multiplicity if term.count is None else masking.weighted(term.count, multiplicity))


def _fit_elements(elements: Elements, term: Term) -> Elements:
    """Returns the elements with one weight a row, where there is one loss a row."""
    return elements.of_whole_rows() if term.values.shape[-1] == 1 else elements


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DivisorOf:
    """The `divisor` of a part of the elements, reduced as an observation is: for all data, each group and replica."""

    term: Term
    elements: Elements
    how: Reduction = dataclasses.field(metadata={"static": True})

    def reduce(self, weights: jax.Array) -> jax.Array:
        """Returns the divisor of all elements, each counted `weights` times: `[1]`."""
        return divisor(self.term.scaled(weights), self.elements, self.how)[None]

    def reduce_by(self, weights: jax.Array, groups: Any) -> jax.Array:
        """Returns `reduce` for each group of a `Membership`."""
        return groups.at_once(lambda inside: self.reduce(weights * inside))
