"""Weighted sums of labels, predictions and errors, for each target. Metrics of regression read them."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.metrics.base import Observation, View
from jaxheads.numerics import exact, masking, meshes

# The sums that are kept as digits: of 1; of y and p; of y^2, p^2 and y p. Those of e = y - p and e^2 follow from them.
_SUMS = 6
# A batch is cut into so many blocks, or fewer, each with a mean of its own. The number is so small that it costs
# nothing, and a power of two: devices that share a batch hold whole blocks, and need not agree on a mean.
_BLOCKS = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments(Observation):
    """Weighted sums for each target: of 1, e^2 and |e|, where e = y - p; and, with `spreads`, those for variances.

    A float32 sum of squares loses the variance of numbers far from zero: for years about 2015, all of it. So each batch
    is summed about its own mean. The sums about zero follow from that, and are kept as exact digits, which add up for
    any batches.

    Args:
        labels: y, `[..., d]`.
        predictions: p, `[..., d]`, on the scale of the labels.
        spreads: whether the sums of variances and covariances are kept too.
    """

    labels: Any
    predictions: Any
    spreads: bool = dataclasses.field(default=False, metadata={"static": True})

    only_sums = True

    @property
    def n_targets(self) -> int:
        """The number of targets."""
        return jnp.shape(self.predictions)[-1]

    @property
    def size(self) -> int:
        """Three sums a target, and the digits."""
        return (3 + (_SUMS * exact.DIGITS if self.spreads else 0)) * self.n_targets

    def join(self, other: Observation) -> "Moments":
        """Returns moments with the sums that either keeps."""
        if not isinstance(other, Moments):
            raise ValueError(f"Moments and a {type(other).__name__} are observed under one key. Rename one.")
        return dataclasses.replace(self, spreads=self.spreads or other.spreads)

    def reduce(self, weights: jax.Array) -> jax.Array:
        """Returns the sums of this batch."""
        labels, predictions = (jnp.asarray(x, jnp.float32) for x in (self.labels, self.predictions))
        weights, errors = weights * masking.ones_like(predictions), labels - predictions
        plain = [_sum_rows(x) for x in (weights, *(masking.weighted(x, weights) for x in (errors**2, jnp.abs(errors))))]
        if self.spreads:
            plain.append(meshes.replicated(_cut_spreads((labels, predictions), weights)).ravel())
        return jnp.concatenate([meshes.replicated(x) for x in plain])

    def read(self, sums: Any, xp: Any, undefined: float) -> "MomentsView":
        """Returns the sums, with the metrics that they tell."""
        d = self.n_targets
        plain, spreads = sums[..., : 3 * d].reshape((*sums.shape[:-1], 3, d)), None
        if self.spreads:
            digits = sums[..., 3 * d :].reshape((*sums.shape[:-1], _SUMS, d, exact.DIGITS))
            spreads = Spreads(digits, xp)
        weight, error_square, error_size = (plain[..., i, :] for i in range(3))
        return MomentsView(xp, undefined, weight, error_square, error_size, spreads)


def _sum_rows(x: jax.Array) -> jax.Array:
    """Returns the sum over all but the last axis, `[d]`."""
    return masking.total(x)[None] if x.shape[-1] == 1 else masking.column_totals(x)


def _cut_spreads(columns: tuple[jax.Array, ...], weights: jax.Array) -> jax.Array:
    """Returns the sums of a batch that variances need, as digits `[6, d, DIGITS]`.

    A block is summed about its mean m: `x = m + 2^k u`. From its sums of u and of u^2 follow those of x and of x^2:
    `n m + 2^k U` and `n m^2 + 2 m 2^k U + 2^2k UU`.
    """
    n, d = weights.shape[0], weights.shape[-1]
    known = isinstance(n, int) and n and weights.ndim > 1
    blocks = math.gcd(n, math.lcm(_BLOCKS, meshes.count_devices(weights))) if known else 1
    columns, weights = jax.tree.map(lambda x: jnp.reshape(x, (blocks, -1, d)), (columns, weights))
    if d == 1:  # without the axis of targets XLA's CPU code takes half the time
        columns, weights = jax.tree.map(lambda x: jax.lax.squeeze(x, (2,)), (columns, weights))
    weight, live = jnp.sum(weights, axis=1), masking.is_not_zero(weights)
    some = weight > 0
    safe = jnp.where(some, weight, jnp.ones_like(weight))

    def center(x: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the mean of each block, the power of two of the largest distance, and distances in units of it."""
        # The mean is taken about one of the numbers: so numbers that are all equal have no spread at all.
        one = jnp.max(jnp.where(live, x, -np.inf), axis=1, initial=-np.inf)
        mean = one + jnp.sum(masking.weighted(x - one[:, None], weights), axis=1) / safe
        mean = jnp.where(jnp.isfinite(mean), mean, one)
        mean = jnp.where(some, mean, jnp.zeros_like(mean))
        around = jnp.where(live, x - mean[:, None], jnp.zeros_like(x))
        # Exponents as in the bits of a float32, where 127 stands for 0.
        exponent = jax.lax.bitcast_convert_type(jnp.max(jnp.abs(around), axis=1, initial=0), jnp.int32)
        exponent = jnp.clip(jax.lax.shift_right_logical(exponent, np.int32(23)), 1, 253)
        unit = jax.lax.bitcast_convert_type(jax.lax.shift_left(254 - exponent, np.int32(23)), jnp.float32)
        return mean, exponent - np.int32(127), around * unit[:, None]

    means, powers, scaled = zip(*map(jax.jit(center), columns), strict=True)
    firsts = [jnp.sum(weights * u, axis=1) for u in scaled]
    one, none = jnp.ones_like(weight), jnp.zeros_like(powers[0])
    # Each product: three factors, and the exponent of the power of two that it is multiplied by.
    sums = [[(weight, one, one, none)]]
    sums += [[(weight, m, one, none), (u, one, one, k)] for m, u, k in zip(means, firsts, powers, strict=True)]
    for m, u, k, scale in zip(means, firsts, powers, scaled, strict=True):
        second = jnp.sum(weights * scale * scale, axis=1)
        sums.append([(weight, m, m, none), (u, m, one, k + 1), (second, one, one, 2 * k)])
    cross = jnp.sum(weights * scaled[0] * scaled[1], axis=1)
    mixed = [(firsts[0], means[1], one, powers[0]), (firsts[1], means[0], one, powers[1])]
    sums.append([(weight, means[0], means[1], none), *mixed, (cross, one, one, powers[0] + powers[1])])
    products = [product for parts in sums for product in parts]
    products = [[x.T if d > 1 else x[None] for x in product] for product in products]
    factors = jnp.stack([jnp.stack(product[:3], axis=-1) for product in products])
    digits = exact.add_products(factors, jnp.stack([product[3] for product in products]))
    ends = np.cumsum([0, *map(len, sums)])
    return exact.settle(jnp.stack([jnp.sum(digits[i:j], axis=0) for i, j in itertools.pairwise(ends)]))


@dataclasses.dataclass(frozen=True)
class Spreads:
    """Variances and covariances, read from digits once for all metrics. Each is for every target, `[..., d]`.

    y, p and e are counted in units of their own, `2^unit`, so that no square overflows. A unit is half of the place of
    the highest digit of their squares.

    Attributes:
        digits: the sums, `[..., 6, d, DIGITS]`.
        xp: the array module in use.
    """

    digits: Any
    xp: Any

    @functools.cached_property
    def totals(self) -> Any:
        """The digits of the sums of 1, y, p and e, of their squares, and of y p: `[..., 8, d, DIGITS]`."""
        weight, y, p, y2, p2, product = (self.digits[..., i, :, :] for i in range(_SUMS))
        return self.xp.stack([weight, y, p, y - p, y2, p2, y2 - 2 * product + p2, product], axis=-3)

    @functools.cached_property
    def units(self) -> list[Any]:
        """The exponents of the units of y, p and e."""
        units = exact.BITS // 2 * exact.find_top(self.totals[..., 4:7, :, :], self.xp)
        return [units[..., i, :] for i in range(3)]

    @functools.cached_property
    def words(self) -> tuple[Any, Any]:
        """The totals as double words `[..., 8, d]`, in those units."""
        y, p, e = self.units
        units = self.xp.stack([0 * y, y, p, e, 2 * y, 2 * p, 2 * e, y + p], axis=-2)
        return exact.join(self.totals, units, self.xp)

    @functools.cached_property
    def about_means(self) -> tuple[Any, ...]:
        """The sums of squares of y, p and e about their means; the sum of y p about theirs; and `n mean(e)^2`."""
        xp, (high, low) = self.xp, self.words
        weight = xp.where(high[..., :1, :] == 0, xp.ones_like(high[..., :1, :]), high[..., :1, :])
        high = xp.concatenate([weight, high[..., 1:, :]], axis=-2)

        def pick(*rows: int) -> tuple[Any, Any]:
            found = (xp.stack([x[..., i, :] for i in rows], axis=-2) for x in (high, low))
            return next(found), next(found)

        products = exact.multiply(pick(1, 2, 3, 1), pick(1, 2, 3, 2))
        shifts, less = exact.divide(products, pick(0, 0, 0, 0))
        sums, _ = exact.subtract(pick(4, 5, 6, 7), (shifts, less))
        # A smaller sum is a rounding error of double words: the numbers are all equal. A covariance may be of any size.
        least = 2.0**-42 if high.dtype == np.float32 else 2.0**-90
        squares = xp.where(
            sums[..., :3, :] <= least * high[..., 4:7, :], xp.zeros_like(high[..., :3, :]), sums[..., :3, :]
        )
        return *(squares[..., i, :] for i in range(3)), sums[..., 3, :], shifts[..., 2, :]


@dataclasses.dataclass(frozen=True)
class MomentsView(View):
    """Moments that can be read, all `[..., d]`.

    Attributes:
        weight, error_square, error_size: the sums of 1, e^2 and |e|.
        spreads: the `Spreads` for metrics of variances; None where they are not kept.
    """

    weight: Any
    error_square: Any
    error_size: Any
    spreads: Any

    def mean(self, total: Any) -> Any:
        """Returns a sum divided by the weight."""
        return self.ratio(total, self.weight)

    def r2(self) -> Any:
        """Returns `1 - sum(e^2) / sum((y - mean(y))^2)`."""
        own, square = self._error
        return self._explain(self.xp.where(own, square, self.spreads.words[0][..., 6, :]))

    def explained_variance(self) -> Any:
        """Returns `1 - sum((e - mean(e))^2) / sum((y - mean(y))^2)`."""
        _, _, spread, _, shift = self.spreads.about_means
        own, square = self._error
        return self._explain(self.xp.where(own & (2 * shift <= square), square - shift, spread))

    def pearson(self) -> Any:
        """Returns `cov(y, p) / sqrt(var(y) var(p))`."""
        y, p, _, product, _ = self.spreads.about_means
        value = self.ratio(product, self.xp.sqrt(y) * self.xp.sqrt(p))
        return self.xp.where((y != 0) & (p != 0), self.xp.clip(value, -1.0, 1.0), value)

    @functools.cached_property
    def _error(self) -> tuple[Any, Any]:
        """Whether the float32 sum of e^2 tells more than the digits, and that sum, in the unit of e.

        It does so where errors are small beside the labels, unless the squares leave the range of float32.
        """
        spread, (label, _, error) = self.spreads.about_means[0], self.spreads.units
        square = self.error_square
        for _ in range(2):
            spread, square = exact.scale(spread, label, self.xp), exact.scale(square, -error, self.xp)
        return self.xp.isfinite(self.error_square) & (spread >= 2.0**-70), square

    def _explain(self, part: Any) -> Any:
        """Returns 1 less a part of the spread of the labels. Errors and labels have units of their own."""
        spread, (label, _, error) = self.spreads.about_means[0], self.spreads.units
        share = self.ratio(self.xp.maximum(part, 0.0), spread)
        for _ in range(2):
            share = exact.scale(share, self.xp.clip(error - label, -125, 125), self.xp)
        return self.xp.where(spread == 0, self.xp.full_like(share, self.undefined), 1 - share)
