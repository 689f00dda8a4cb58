"""The bucket of every number among fixed edges, exactly, at a cost that does not grow with the edges."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxheads.numerics import meshes, pairs

BLOCK = 2**14


class Edges:
    """Sorted float32 edges; `locate(x)` counts those strictly below `x`, exactly for every float32.

    A uniform table of cells gives the first guess by arithmetic. Rounding may put a number one cell off, so each
    cell's range of candidates reaches one cell further on both sides, and a branch-free binary search of a few steps
    compares with the edges themselves. The number of steps depends on the fullest cell alone: two for uniform
    edges, six for 10,000 user thresholds.
    """

    def __init__(self, values):
        self.values = np.unique(np.asarray(values, np.float32))
        if not self.values.size or not np.isfinite(self.values).all():
            raise ValueError(f"Edges must be finite numbers, at least one. Given {values!r}.")
        m = self.values.size
        low, high = float(self.values[0]), float(self.values[-1])
        self.cells = max(16, 2 * m)
        self.low = np.float32(low)
        self.scale = np.float32((self.cells - 1) / (high - low)) if high > low else np.float32(1)
        cell = self._cell(self.values, np)
        first = np.searchsorted(cell, np.arange(self.cells) - 1, side="left")
        last = np.searchsorted(cell, np.arange(self.cells) + 1, side="right")
        self.first = first.astype(np.int32)
        self.steps = int(np.max(last - first)).bit_length()
        self.padded = np.concatenate([self.values, np.full(2**self.steps, np.inf, np.float32)])

    def _cell(self, x, xp):
        scaled = (x - self.low) * self.scale
        return xp.clip(scaled, np.float32(0), np.float32(self.cells - 1)).astype(xp.int32)

    def locate(self, x: jax.Array) -> jax.Array:
        """How many edges lie strictly below `x`: int32 in `[0, len(values)]`. NaN counts as below all."""
        x = jnp.where(jnp.isnan(x), jnp.full_like(x, -jnp.inf), x)
        count = take(self.first, self._cell(x, jnp))
        for step in (2**k for k in reversed(range(self.steps))):
            below = take(self.padded, count + (step - 1)) < x
            count = jnp.where(below, count + step, count)
        return count


@functools.lru_cache(maxsize=256)
def edges_of(values: tuple[float, ...]) -> Edges:
    """`Edges(values)`, built once for equal values."""
    return Edges(values)


def take(table: np.ndarray, index: jax.Array) -> jax.Array:
    """`table[index]` for indices known to be in range, laid out like the index."""
    out_sharding = None if meshes.explicit_mesh(index) is None else jax.typeof(index).sharding
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds", out_sharding=out_sharding)


def histogram(buckets: jax.Array, weights: jax.Array, n: int, most: int | None = None) -> jax.Array:
    """Sums non-negative `weights` by `buckets`, of any one shape: float32 `[n]`, right to the last bits.

    A scatter adds to each bucket one by one, and a running float32 sum drifts: a million weights of 0.1 in one bucket
    are off by 1 %. So each weight is split in a multiple of a quantum, of which a block of rows adds up exactly, and a
    small rest; every block has a histogram of its own; and the blocks are added pairwise.

    Args:
        buckets: which of `n` sums each entry adds to, `[..., c]`.
        weights: the same shape.
        n: the number of sums.
        most: how many entries of a last axis can meet in one sum; all c by default.
    """
    examples = buckets.shape[:-1] if buckets.ndim > 1 else buckets.shape
    most = (buckets.shape[-1] if buckets.ndim > 1 else 1) if most is None else most
    if buckets.ndim > 1 and buckets.shape[-1] == 1:
        buckets, weights = buckets[..., 0], weights[..., 0]
    mesh = meshes.explicit_mesh(buckets)
    replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec(None))
    # Under shape polymorphism the number of rows is no number: then all is one block.
    rows = math.prod(examples) * most if all(isinstance(size, int) for size in buckets.shape) else BLOCK
    blocks = max(1, -(-rows // BLOCK))
    if blocks > 1:
        width = math.prod(buckets.shape[len(examples) :])
        buckets = meshes.flat_index(buckets) // width * most // BLOCK * n + buckets

    def sums(weights):
        zeros = jnp.zeros(blocks * n, jnp.float32)
        added = zeros.at[buckets].add(weights, mode="promise_in_bounds", out_sharding=replicated)
        return pairs.fold(added.reshape(blocks, n), jnp.add)

    if not meshes.is_local(buckets):
        # The quantum below would be a second all-reduce. Nine bits of each weight are as good unless weights of a
        # million to one share a bucket.
        coarse = jax.lax.reduce_precision(weights, exponent_bits=8, mantissa_bits=8)
        return sums(coarse) + sums(weights - coarse)
    coarse = _multiples(weights, min(rows, BLOCK)) if rows else weights
    exact, rest = sums(coarse), weights - coarse
    return exact + jax.lax.cond(jnp.any(rest != 0), sums, lambda _: jnp.zeros_like(exact), rest)


def _multiples(weights: jax.Array, rows: int) -> jax.Array:
    """The weights rounded down to multiples of a power of two, such that any `rows` of them add up exactly."""
    bound = jnp.minimum(jnp.sum(weights), rows * jnp.max(weights))
    exponent = jnp.frexp(bound)[1]
    # A sum below 2^e in multiples of 2^(e - 23) has 23 bits; a float32 holds 24. Where the rest would be subnormal, and
    # so 0 to XLA, and where the sum is no number, the quantum is so large that all is rest.
    usual = jnp.isfinite(bound) & (exponent > -80)
    quantum = jnp.ldexp(jnp.float32(1), jnp.where(usual, exponent - 23, 127))
    return jnp.floor(weights / quantum) * quantum
