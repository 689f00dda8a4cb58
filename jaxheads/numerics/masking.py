"""The double where: masked inputs are replaced before a formula sees them, and its result is masked after.

Masking the result alone is not enough: `where(mask, f(nan), 0)` has a NaN gradient.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.numerics import meshes

# Tracing an operation of `jax.lax` takes a third of the time of its like in `jnp`, which is a nested `jit`.


def true_like(x: Any) -> jax.Array:
    """Returns True for every entry of `x`, laid out over a mesh like `x`; jax 0.12's `ones_like` forgets the layout."""
    if meshes.is_off_mesh(x):
        return jax.lax.full(jnp.shape(x), True)
    x = jnp.asarray(x)
    return (x == x) | True


def ones_like(x: Any) -> jax.Array:
    """Returns float32 ones, laid out over a mesh as `x` is."""
    if meshes.is_off_mesh(x):
        return jax.lax.full(jnp.shape(x), np.float32(1))
    return true_like(x).astype(jnp.float32)


def rows_like(mask: jax.Array, x: jax.Array) -> jax.Array:
    """Returns `mask [..., 1]` with axes added or dropped, so that it broadcasts against `x [..., a, b]`."""
    lead = mask.ndim - 1
    if x.ndim <= lead:
        return jnp.any(mask, axis=tuple(range(x.ndim, mask.ndim)))
    return jnp.expand_dims(mask, tuple(range(mask.ndim, x.ndim))) if x.ndim > lead + 1 else mask


def choose(mask: Any, x: Any, other: Any) -> jax.Array:
    """Chooses as `jnp.where`, in one operation if nothing is broadcast: tracing it takes a quarter of the time."""
    if jnp.shape(mask) == jnp.shape(x) == jnp.shape(other) and jnp.result_type(x) == jnp.result_type(other):
        return jax.lax.select_n(mask, other, x)
    return jnp.where(mask, x, other)


def is_not_zero(x: jax.Array) -> jax.Array:
    """Tells which entries are not 0."""
    return jax.lax.ne(x, jax.lax.full_like(x, 0))


def keep(mask: jax.Array, x: Any, fill: float) -> Any:
    """Returns `x` where `mask` holds, else `fill`."""
    return choose(mask, x, jax.lax.full_like(x, fill))


def keep_rows(mask: jax.Array, x: jax.Array, fill: float, copies: bool = False) -> jax.Array:
    """Applies `keep` or `copy_first` to a column of features, if the column shares the mask's leading axes.

    The fill is 1: unlike 0 it is harmless to a logarithm, a square root and a division alike.
    """
    shared = min(x.ndim, mask.ndim - 1)
    if shared == 0 or x.shape[:shared] != mask.shape[:shared]:
        return x
    return copy_first(rows_like(mask, x), x, fill, shared, False) if copies else keep(rows_like(mask, x), x, fill)


# Where devices may share a batch, copies are looked for within so many blocks of it, or fewer. The number is a power of
# two, so devices hold whole blocks, and need no word from each other. Blocks of fewer rows are joined: a small block
# may have no live row.
_BLOCKS, _ROWS = 64, 8


def copy_first(mask: jax.Array, x: jax.Array, fill: float, lead: int, entries: bool) -> jax.Array:
    """Returns `x` where `mask` holds; else the first entry of a block for which it holds, along the first `lead` axes.

    If it holds for none of these, the copy is the first of the whole block if `entries` have masks of their own; else
    `fill`. The copies have no gradient. They are sums of one entry and zeros, because that is quick on a mesh too.
    """
    if any(isinstance(size, int) and size == 0 for size in x.shape):
        return x
    if not entries and meshes.is_local((mask, x)):
        return _copy_first_row(mask, x, fill, lead)
    shape = x.shape
    blocks = _count_blocks(mask, x)
    if entries or mask.ndim != x.ndim or mask.shape[:lead] != shape[:lead]:
        mask = jnp.broadcast_to(mask, shape)
    x, mask = (jnp.reshape(part, (blocks, -1, *part.shape[1:])) for part in (x, mask))
    # Laid out as the values are: a choice insists on that.
    whole_mask = mask & true_like(x)
    found, there = jax.lax.stop_gradient(keep(whole_mask, x, fill)), mask
    levels = [(x, whole_mask)]
    for axes in (range(1, lead + 1), *([range(lead + 1, x.ndim)] if entries else [])):
        for axis in axes:
            # A mask of whole rows has one column. The search for the first takes the time, so it runs on that column.
            index = meshes.index(there, axis, np.int32)
            first = there & (index == jnp.argmax(there, axis, keepdims=True).astype(np.int32))
            first = first & true_like(found)
            add = jnp.any if found.dtype == np.bool_ else jnp.sum
            found = add(keep(first, found, 0), axis, keepdims=True).astype(found.dtype)
            there = jnp.any(there, axis, keepdims=True)
        levels.append((found, there))
    everywhere, out = true_like(x), jax.lax.full_like(x, fill)
    for values, held in reversed(levels):
        # By an operation with an array of the whole shape: a broadcast would be laid out unlike `x`.
        whole = values | ~everywhere if x.dtype == np.bool_ else values + (~everywhere).astype(x.dtype)
        out = jnp.where(held & everywhere, whole, out)
    return jnp.reshape(out, shape)


def _copy_first_row(mask: jax.Array, x: jax.Array, fill: float, lead: int) -> jax.Array:
    """Copies as `copy_first`, on one device. It may look up a row: sums of one entry and zeros would read all rows."""
    live = jnp.broadcast_to(mask, (*x.shape[:lead], *mask.shape[lead:]))
    rows, live = (jnp.reshape(part, (-1, *part.shape[lead:])) for part in (x, live))
    first = _find_first(live)
    some = first != _NOWHERE
    place = jnp.broadcast_to(jnp.where(some, first, np.int32(0)), (1, *rows.shape[1:]))
    copy = jnp.take_along_axis(jax.lax.stop_gradient(rows), place, 0, mode="promise_in_bounds")
    copy = jnp.where(some, copy, jax.lax.full_like(copy, fill))
    return jnp.reshape(jnp.where(live, rows, copy), x.shape)


# The first live row is looked for among so many rows first, then among all.
_NEAR = 1024
_NOWHERE = np.int32(np.iinfo(np.int32).max)


def _find_first(live: jax.Array) -> jax.Array:
    """Returns the index of the first live row, for each column of the mask, `[1, ...]`; `_NOWHERE` if none is live."""

    def search(live: jax.Array) -> jax.Array:
        # A minimum takes XLA's CPU code a fraction of the time of an argmax.
        return jnp.min(jnp.where(live, meshes.index(live, 0, np.int32), _NOWHERE), 0, keepdims=True)

    n = live.shape[0]
    if not isinstance(n, int) or n <= 2 * _NEAR:
        return search(live)
    near = search(live[:_NEAR])
    return jax.lax.cond(jnp.all(near != _NOWHERE), lambda: near, lambda: search(live))


def _count_blocks(mask: jax.Array, x: jax.Array) -> int:
    """Returns how many blocks the rows are cut into: one, if the number of rows is a symbol, in export."""
    rows, devices = x.shape[0], max(map(meshes.count_devices, (mask, x)))
    if devices == 1:
        return 1
    blocks = math.gcd(rows, math.lcm(_BLOCKS, devices)) if isinstance(rows, int) else 1
    while blocks % (2 * devices) == 0 and rows // blocks < _ROWS:
        blocks //= 2
    return blocks


def weighted(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns `weights * values` as float32; 0 wherever the weight is 0, for any value there."""
    product = jnp.asarray(values, jnp.float32) * weights
    return choose(is_not_zero(weights), product, jax.lax.full_like(product, 0))


def total(x: jax.Array) -> jax.Array:
    """Returns the sum of all of `x`, as float32; of a mask the number of entries that hold.

    A last axis of size 1 is dropped: with it XLA's CPU code is 20 times slower. A mask is chosen from ones and zeros
    after that: XLA moves a cast to before the drop, and takes its slow way again.
    """
    x = jax.lax.squeeze(x, (x.ndim - 1,)) if x.ndim > 1 and x.shape[-1] == 1 else x
    if x.dtype == jnp.bool_:
        x = jax.lax.select_n(x, jax.lax.full_like(x, 0, jnp.float32), jax.lax.full_like(x, 1, jnp.float32))
    return column_totals(x, kept=0)


# How many float32 numbers may be added one after the other: their sum is right to a few in 1e7.
_IN_A_ROW = 256


def column_totals(x: jax.Array, kept: int = 1) -> jax.Array:
    """Returns the sums over all but the last `kept` axes (if one: `[d]`), axis by axis where one step is not exact.

    XLA sums blocks of up to 32 numbers along each axis, and adds the numbers of a block one after the other. Three axes
    make blocks of up to 32,768 numbers: with jaxlib 0.10 on CPUs the sum of `[64, 33, 100]` is off by 6e-6, that of
    `[30, 30, 30, 30]` by 1.5e-4. Two axes make blocks of up to 1,024: column sums are not exact then, a full sum is.
    """
    if x.dtype not in (jnp.float32, jnp.float64):
        x = x.astype(jnp.float32)
    axes = x.shape[: x.ndim - kept]
    exact_in_one_step = 2 if kept == 0 else 1
    if len(axes) > exact_in_one_step and math.prod(map(_count_in_block, axes)) > _IN_A_ROW:
        for axis in reversed(range(1, len(axes))):
            x = _settle(jax.lax.reduce_sum(x, (axis,)))
    return jax.lax.reduce_sum(x, tuple(range(x.ndim - kept)))


@jax.custom_jvp
def _settle(x: jax.Array) -> jax.Array:
    """Returns `x` itself, by operations that no compiler removes: the sums before and after stay apart.

    `jax.lax.optimization_barrier` is not enough. XLA drops it before it joins loops, and LLVM may then add all numbers
    of two loops one after the other: with jaxlib 0.10 on a CPU with AVX-512, not on every CPU.
    """
    lowest = jax.lax.full_like(x, np.finfo(x.dtype).min)
    return choose(jax.lax.lt(x, lowest), x, jax.lax.max(x, lowest))


@_settle.defjvp
def _settle_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return _settle(*primals), *tangents


def _count_in_block(size: Any) -> int:
    """Returns how many numbers of an axis a block holds; if the size is a symbol, in export, the most it can hold."""
    return min(size, 32) if isinstance(size, int) else 32
