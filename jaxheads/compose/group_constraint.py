"""The constraint that no group of the data is worse off than all rows: a term added to the loss of each entry."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.losses import global_objectives as formulas
from jaxheads.metrics.mean import SumsView
from jaxheads.numerics import masking, pairs

# The entries that each rate counts: positives, negatives, all.
RATES = {
    "true_positive_rate": lambda labels: labels,
    "false_positive_rate": lambda labels: 1 - labels,
    "positive_rate": masking.ones_like,
}


@dataclasses.dataclass(frozen=True)
class GroupConstraint:
    """A constraint: a rate of each group may be worse than the rate of all rows, but only by a tolerance.

    Attributes:
        rate: one of `RATES`.
        tolerance: how much worse off a group may be.
        labels: how many labels an example has.
        groups: how many groups there are.
        zero_one: whether the multipliers see the rates themselves, not their soft forms.
    """

    rate: str
    tolerance: float
    labels: int
    groups: int
    zero_one: bool

    def first_multipliers(self) -> jax.Array:
        """Returns one multiplier for each label and group; they have no effect before a violation."""
        return jnp.zeros((self.labels, self.groups), jnp.float32)

    def first_counts(self) -> jax.Array:
        """Returns for each label the number of all rows, of rows that the rate counts, and of those in each group.

        They are compensated pairs `[labels, 2 + groups, 2]`, like the counts of labels.
        """
        support = 1.0 if self.rate == "positive_rate" else 0.5
        first = np.array([1.0, support, *[support / self.groups] * self.groups], np.float32)
        first = np.broadcast_to(first, (self.labels, len(first)))
        return jnp.stack([first, np.zeros_like(first)], axis=-1)

    def errors(self, labels: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the entries that the rate counts, then their errors: softly (`sigmoid(-z)`), and as indicators.

        An error is an entry predicted negative; for a false positive rate, one predicted positive. A loss cannot
        replace the sigmoid: the rate of all rows is subtracted, and a loss has no upper bound.
        """
        support = RATES[self.rate](labels)
        signed = logits if self.rate == "false_positive_rate" else -logits
        missed, alarmed = formulas.indicators(logits)
        counted = alarmed if self.rate == "false_positive_rate" else missed
        return support, masking.weighted(jax.nn.sigmoid(signed), support), masking.weighted(counted, support)

    def terms(
        self, labels: jax.Array, logits: jax.Array, inside: jax.Array, counts: jax.Array, multipliers: jax.Array
    ) -> jax.Array:
        """Returns the mean over groups of the terms that the constraints add to an entry, `[..., labels]`.

        Args:
            labels, logits: `[..., labels]`.
            inside: 1 where a row is in a group, else 0, `[..., 1, groups]`.
            counts: counts in the form of `first_counts`.
            multipliers: `[labels, groups]`.
        """
        total, support, each = (counts.sum(-1)[:, part] for part in (slice(1), slice(1, 2), slice(2, None)))
        soft, counted = (
            x[..., None] * (inside - leading(each / support, inside)) for x in self.errors(labels, logits)[1:]
        )
        allowed = leading(self.tolerance * each / total, inside)
        seen = counted - allowed if self.zero_one else None
        return jnp.mean(formulas.priced(leading(multipliers, inside), soft - allowed, seen), -1)

    def advance(
        self, counts: jax.Array, labels: jax.Array, logits: jax.Array, inside: jax.Array, rows: Any
    ) -> jax.Array:
        """Returns the counts with one more batch added, from all devices."""
        support = self.errors(labels, logits)[0][..., None]
        columns = jnp.concatenate([masking.ones_like(support), support, support * jnp.nan_to_num(inside)], axis=-1)
        weighted = masking.weighted(columns, rows.weights[..., None])
        return pairs.add(counts, rows.devices.sum(masking.column_totals(weighted, kept=2))[..., None])

    def columns(
        self, labels: jax.Array, logits: jax.Array, inside: jax.Array, multipliers: jax.Array
    ) -> list[jax.Array]:
        """Returns the columns that `violations` reads as sums: ones, `errors`, `errors` in each group, multipliers."""
        each = [x[..., None] for x in self.errors(labels, logits)]
        priced = masking.ones_like(each[0]) * leading(multipliers, inside)
        return [masking.ones_like(logits), *each, *(x * inside for x in each), priced]

    def violations(self, sums: SumsView) -> dict[str, Any]:
        """Returns the violations of the worst group and label and of each group, and the largest multiplier."""
        xp = sums.xp
        weight, support, soft, counted = (x[..., None] for x in sums.sums[:4])
        inside, soft_in, counted_in, multipliers = (
            x.reshape(*x.shape[:-1], self.labels, self.groups) for x in sums.sums[4:]
        )
        # A group of all rows, such as a slice of the group itself, has nothing to compare with.
        there = (inside > 0) & (inside < (1 - 1e-6) * support)

        def excess(errors: Any, errors_in: Any) -> Any:
            found = sums.zeroed().ratio(errors_in, inside) - sums.zeroed().ratio(errors, support) - self.tolerance
            return xp.where(there, found, xp.full_like(found, -np.inf))

        def worst(found: Any, axes: Any = (-2, -1)) -> Any:
            largest = found.max(axes)
            return xp.where(there.any(axes), largest, xp.full_like(largest, sums.undefined))

        real = excess(counted, counted_in)
        return {
            "group_violation": worst(real),
            "group_violation_surrogate": worst(excess(soft, soft_in)),
            "group_violations": worst(real, -2),
            "group_multiplier/max": sums.ratio(multipliers, weight * xp.ones_like(multipliers)).max((-2, -1)),
        }


def leading(x: Any, like: jax.Array) -> Any:
    """Returns an array with new leading axes, so that it broadcasts with `like`; a number is returned unchanged."""
    rank = np.ndim(x)
    return x if rank == 0 else jnp.expand_dims(x, tuple(range(like.ndim - rank)))
