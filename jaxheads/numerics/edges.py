"""The bucket of every number among fixed edges, exactly, at a cost that does not grow with the edges."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.numerics import brief, masking, meshes

WIDTH = 64
LARGEST = np.finfo(np.float32).max


class Edges:
    """Sorted float32 edges; `locate(x)` counts those strictly below `x`, exactly for every float32.

    A uniform table of cells gives the first guess by arithmetic. Rounding may put a number one cell off, so each
    cell's range of candidates reaches one cell further on both sides, and a branch-free binary search of a few steps
    compares with the edges themselves. The number of steps depends on the fullest cell alone: one for uniform edges.

    A TPU is slow at looking numbers up, and quick at matrix products. There the edges lie in rows of 64. A number is
    compared with the first edge of every row; a product with a one-hot vector gives its row; the number is compared
    with the edges of that row. The product is exact: it adds up only the three bfloat16 parts of one float32.
    """

    def __init__(self, values):
        self.values = np.unique(np.asarray(values, np.float32))
        if not self.values.size or not np.isfinite(self.values).all():
            raise ValueError(f"Edges must be finite numbers, at least one. Given {brief.tell(values)}.")
        m = self.values.size
        low, high = float(self.values[0]), float(self.values[-1])
        self.cells = max(16, 8 * m)
        self.low = np.float32(low)
        self.scale = np.float32((self.cells - 1) / (high - low)) if high > low else np.float32(1)
        cell = self._find_cell(self.values, np)
        first = np.searchsorted(cell, np.arange(self.cells) - 1, side="left")
        last = np.searchsorted(cell, np.arange(self.cells) + 1, side="right")
        self.first = first.astype(np.int32)
        self.steps = int(np.max(last - first)).bit_length()
        self.padded = np.concatenate([self.values, np.full(2**self.steps, np.inf, np.float32)])
        self.rows = np.concatenate([self.values, np.full(-m % WIDTH, LARGEST, np.float32)]).reshape(-1, WIDTH)
        self.parts = np.stack(in_three(self.rows))
        # Parts below the normal numbers are 0 to XLA. Edges that small are looked up.
        normal = np.all((self.parts == 0) | (np.abs(self.parts) >= np.finfo(np.float32).tiny))
        self.exact = bool(normal and self.values[-1] < LARGEST)

    def _find_cell(self, x, xp):
        scaled = (x - self.low) * self.scale
        return xp.clip(scaled, np.float32(0), np.float32(self.cells - 1)).astype(xp.int32)

    def locate(self, x: jax.Array) -> jax.Array:
        """Returns how many edges lie strictly below `x`: int32 in `[0, len(values)]`. NaN counts as below all."""
        x = jnp.where(jnp.isnan(x), jnp.full_like(x, -jnp.inf), x)
        if not self.exact:
            return self.by_table(x)
        return jax.lax.platform_dependent(x, tpu=self.by_product, default=self.by_table)

    def by_table(self, x: jax.Array) -> jax.Array:
        """Locates numbers by looking them up in tables."""
        count = take(self.first, self._find_cell(x, jnp))
        for step in (2**k for k in reversed(range(self.steps))):
            below = take(self.padded, count + (step - 1)) < x
            count = jnp.where(below, count + step, count)
        return count

    def by_product(self, x: jax.Array) -> jax.Array:
        """Locates numbers by comparisons and a matrix product."""
        if x.ndim > 1 and x.shape[-1] == 1:
            # A last axis of size 1 makes the layout of the arrays below, and so the time, ten times as large.
            return self.by_product(x[..., 0])[..., None]
        x, n = jnp.minimum(x, LARGEST)[None], len(self.rows)

        def column(values: np.ndarray) -> jax.Array:
            return jnp.asarray(values).reshape(-1, *[1] * (x.ndim - 1))

        def below(values: jax.Array) -> jax.Array:
            return jnp.sum(values < x, axis=0, keepdims=True, dtype=jnp.int32)

        row = below(column(self.rows[1:, 0]))
        # One product of three times the length, not three products: their sum would be written out.
        chosen = (row == column(np.tile(np.arange(n, dtype=np.int32), 3))).astype(jnp.bfloat16)
        parts = jnp.asarray(self.parts.reshape(3 * n, WIDTH), jnp.bfloat16)
        edges = jax.lax.dot_general(parts, chosen, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return (row * WIDTH + below(edges))[0]


MOST_COMPARED = 16


def locate_uniform(x: jax.Array, first: int, count: int, scale: float, extra: tuple[float, ...]) -> jax.Array:
    """Locates as `Edges.locate`, among `count` edges at consecutive multiples of a power of two, and a few others.

    Nothing is looked up: a float32 times a power of two is exact, and so is its `ceil`.

    Args:
        first: the first multiple.
        scale: 1 divided by the power of two.
        extra: float32 edges that are no such multiples.
    """
    x = jnp.asarray(x, jnp.float32)
    x = masking.keep(jax.lax.eq(x, x), x, -np.inf)
    multiple = jax.lax.ceil(jax.lax.mul(x, jax.lax.full_like(x, scale)))
    below = jax.lax.clamp(np.float32(first), multiple, np.float32(first + count))
    below = jax.lax.sub(below.astype(jnp.int32), np.int32(first))
    for edge in extra:
        below = below + (x > np.float32(edge)).astype(jnp.int32)
    return below


# Edges at multiples of 1/64 up to 16 on both sides of 0; beyond, 32 each time that the size doubles, up to 1024.
_MULTIPLES, _DOUBLINGS, _BITS = 1024, 6, 5


@functools.cache
def list_growing() -> tuple[float, ...]:
    """Returns the edges of `locate_growing`, sorted."""
    fine = np.arange(_MULTIPLES + 1) / 64
    growth = 1 + np.arange(1, 2**_BITS + 1) / 2**_BITS
    beyond = np.concatenate([fine[-1] * 2.0**k * growth for k in range(_DOUBLINGS)])
    above = np.concatenate([fine[1:], beyond])
    return tuple(np.concatenate([-above[::-1], [0.0], above]).tolist())


def locate_growing(x: jax.Array, extra: tuple[float, ...]) -> jax.Array:
    """Locates as `Edges.locate`, among the edges of `list_growing`, and a few others.

    Subnormal numbers count as 0, as to XLA. Nothing is looked up here either. Up to 16, the whole part of `64 |x|`
    counts edges on one side of 0. Beyond, the leading bits of a float32 do: its exponent and the first bits of its
    fraction, read as an integer, go up by 1 at each edge.
    """
    x = jnp.asarray(x, jnp.float32)
    scaled = jax.lax.mul(x, jax.lax.full_like(x, 64))
    # No bits are set above 0, else all bits. These flip the bits of an integer, which makes it `-1 - integer`.
    flipped = jax.lax.sub(jax.lax.gt(scaled, jax.lax.full_like(x, 0)).astype(jnp.int32), np.int32(1))
    # One more than the last edge is beyond it, and counts all edges.
    size = jax.lax.min(jax.lax.abs(scaled), jax.lax.full_like(x, _MULTIPLES * 2**_DOUBLINGS + 1))
    # An edge counts if it is strictly below. Above 0 the edge itself does not count yet, so the bits are read less 1.
    bits = jax.lax.sub(jax.lax.bitcast_convert_type(size, jnp.int32), 1 + flipped)
    first = int(np.float32(_MULTIPLES).view(np.int32))
    fine = jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.int32)
    shift = 23 - _BITS
    coarse = jax.lax.add(jax.lax.shift_right_arithmetic(bits, np.int32(shift)), np.int32(_MULTIPLES - (first >> shift)))
    passed = masking.choose(jax.lax.lt(bits, np.int32(first)), fine, coarse)
    below = jax.lax.bitwise_xor(passed, flipped) + np.int32(_MULTIPLES + _DOUBLINGS * 2**_BITS + 1)
    below = masking.keep(jax.lax.eq(x, x), below, 0)
    for edge in extra:
        below = below + (x > np.float32(edge)).astype(jnp.int32)
    return below


@functools.lru_cache(maxsize=64)
def edges_of(values: tuple[float, ...]) -> Edges:
    """Returns `Edges(values)`, built once for equal values."""
    return Edges(values)


def take(table: np.ndarray, index: jax.Array) -> jax.Array:
    """Returns `table[index]` for indices known to be in range, laid out like the index."""
    out_sharding = None if meshes.explicit_mesh(index) is None else jax.typeof(index).sharding
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds", out_sharding=out_sharding)


def in_three(x: Any) -> Any:
    """Cuts a float32 in three numbers of 8 bits, largest first, that bfloat16 holds and that add up to it exactly."""
    if isinstance(x, np.ndarray):
        xp, bits = np, lambda x, dtype: x.view(dtype)
    else:
        xp, bits = jnp, jax.lax.bitcast_convert_type

    def leading(x: Any) -> Any:
        return bits(bits(x, np.int32) & np.int32(-(2**16)), np.float32)

    # A number that is not finite is all in the first.
    is_finite = xp.isfinite(x)
    finite = xp.where(is_finite, x, xp.zeros_like(x))
    first = xp.where(is_finite, leading(x), x)
    rest = finite - leading(finite)
    second = leading(rest)
    return first, second, rest - second
