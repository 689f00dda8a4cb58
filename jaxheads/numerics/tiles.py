"""Sums over the rows of a large batch, tile by tile, so that no intermediate is as long as the batch.

On a CPU that is faster too, for a tile stays in the cache. An accelerator wants the whole batch at once, and so does
the partitioner of a sharded batch.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.numerics import pairs

# Small tiles save memory, and a CPU handles few large tiles sooner: an eighth of the rows, within these limits. Each
# tile makes sums of its own, so it holds about as many elements as there are sums, but no more than the last limit.
MIN_ROWS, MAX_ROWS, MIN_ELEMENTS, MAX_ELEMENTS = 2**13, 2**15, 2**18, 2**20


def tile_rows(shape: tuple[Any, ...], size: int = 0) -> int | None:
    """Returns how many rows of an array of this shape make a tile of `size` sums; None if it is not worth cutting."""
    if not all(isinstance(size, int) for size in shape):
        return None
    rows = min(max(MIN_ROWS, shape[0] // 8), MAX_ROWS)
    elements = min(max(size, MIN_ELEMENTS), MAX_ELEMENTS)
    rows = max(1, min(rows, elements // max(1, math.prod(shape[1:]))))
    return rows if shape[0] >= 2 * rows else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Late:
    """An observation to reduce, with the weights and groups of its rows: tile by tile, or once for all rows.

    Attributes:
        observation: a value with arrays of one entry a row, and with `reduce`.
        weights: the weights of the rows.
        groups, replicas: as `how` takes them.
        how: `(observation, weights, groups, replicas) -> sums`.
    """

    observation: Any
    weights: Any
    groups: Any
    replicas: Any
    how: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})

    def reduce(self) -> jax.Array:
        """Returns the sums."""
        return self.how(self.observation, self.weights, self.groups, self.replicas)


def finish(parts: list[Any]) -> list[jax.Array]:
    """Returns the sums, also of the parts that were left for later."""
    return [part.reduce() if isinstance(part, Late) else part for part in parts]


def sum_over_rows(sums: Callable[..., list[Any]], batch: Any, n: int, rows: int) -> list[jax.Array]:
    """Adds up the parts of `sums(tile, fresh, i)` over all tiles of `batch`, whose leaves have `n` rows.

    The last tile overlaps the one before it; `fresh [rows]` is False for the rows that were counted already. The parts
    that a tile leaves for later are reduced once, for all tiles together.
    """
    # Without their last axis of size 1: with it XLA's CPU code for the values of a tile is many times slower.
    thin = jax.tree.map(lambda x: x.ndim > 1 and x.shape[-1] == 1, batch)
    batch = jax.tree.map(lambda x, is_thin: x[..., 0] if is_thin else x, batch, thin)
    is_late: list[bool] = []

    def of_tile(i: jax.Array) -> tuple[list[jax.Array], list[Late]]:
        start = jnp.minimum(i * rows, n - rows)
        tile = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, rows), batch)
        tile = jax.tree.map(lambda x, is_thin: x[..., None] if is_thin else x, tile, thin)
        fresh = start + jnp.arange(rows, dtype=jnp.int32) >= i * rows
        parts = sums(tile, fresh, i)
        is_late[:] = [isinstance(part, Late) for part in parts]
        late = [part for part in parts if isinstance(part, Late)]
        return [part for part in parts if not isinstance(part, Late)], late

    def body(carry: Any, i: jax.Array) -> tuple[Any, list[Any]]:
        parts, late = of_tile(i)
        # Each by itself: if they were in one array, XLA would make all of them again for every number.
        added = [pairs.two_sum(total, part) for (total, _), part in zip(carry, parts, strict=True)]
        carry = [(total, lost + error) for (total, error), (_, lost) in zip(added, carry, strict=True)]
        return carry, [
            {"observation": x.observation, "weights": x.weights, "groups": x.groups, "replicas": x.replicas}
            for x in late
        ]

    shapes, late_shapes = jax.eval_shape(of_tile, jnp.int32(0))
    zero = jnp.float32(0)
    for leaf in jax.tree.leaves(batch):
        # Inside shard_map the carry must be typed as varying over the axes that its data vary over.
        zero = jnp.where(False, leaf[(0,) * leaf.ndim].astype(jnp.float32), zero)
    carry = [(jnp.zeros(x.shape, jnp.float32) + zero, jnp.zeros(x.shape, jnp.float32) + zero) for x in shapes]
    carry, stacked = jax.lax.scan(body, carry, jnp.arange(-(-n // rows), dtype=jnp.int32))
    exact = iter([jnp.where(jnp.isfinite(total), total + lost, total) for total, lost in carry])
    whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked)
    for arrays, of_tiles in zip(whole, stacked, strict=True):
        # Keys are no rows: the keys of one tile serve all tiles.
        arrays["replicas"] = jax.tree.map(lambda x: x[0], of_tiles["replicas"])
    late = iter([dataclasses.replace(like, **arrays) for arrays, like in zip(whole, late_shapes, strict=True)])
    return [next(late).reduce() if later else next(exact) for later in is_late]
