"""Weighted histograms that do not drift, in the form that the device is quick at."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxheads.numerics import masking, meshes, pairs
from jaxheads.numerics.edges import WIDTH, in_three

BLOCK = 2**14
LARGE = 2**16  # for so many sums, blocks take more memory than the entries do


def histogram(
    buckets: jax.Array, weights: Sequence[jax.Array], n: int, columns: Sequence[int] | None = None
) -> jax.Array:
    """Sums non-negative weights by bucket: float32 `[len(weights), rows, n]`.

    Args:
        buckets: which of `n` sums each entry adds to, int32 `[..., c]`.
        weights: several float32 arrays of that shape.
        n: the number of sums.
        columns: the row of sums, numbered from 0, for each entry of the last axis; by default there is one row.
    """

    def by_scatter(buckets, *weights):
        return _sum_by_scatter(buckets, weights, n, columns)

    def by_product(buckets, *weights):
        return _sum_by_product(buckets, weights, n, columns)

    return jax.lax.platform_dependent(buckets, *weights, tpu=by_product, default=by_scatter)


def by_label(
    buckets: jax.Array, labels: jax.Array, weights: jax.Array, n: int, columns: Sequence[int] | None = None
) -> jax.Array:
    """Returns histograms of negatives and positives: float32 `[2, rows, n]`. A soft label y adds `1 - y` and `y` times.

    Where labels turn out to be 0 and 1, each entry is added once, to the bucket of its label.
    """

    def by_product(buckets, labels, weights):
        return _sum_by_product(buckets, (weights * (1 - labels), weights * labels), n, columns)

    def spread(buckets, labels, weights):
        return _sum_by_scatter(buckets, (weights * (1 - labels), weights * labels), n, columns)

    def counted(buckets, labels, weights):
        rows, _, flat = _flatten(buckets, n, columns)
        keys = flat + (labels == 1).astype(jnp.int32) * np.int32(rows * n)
        sums = jnp.zeros(2 * rows * n, jnp.float32).at[keys].add(weights, mode="promise_in_bounds")
        return jax.lax.reshape(sums, (2, rows, n))

    def weighed(buckets, labels, weights):
        rows, most, flat = _flatten(buckets, n, columns)
        keys, both = jnp.stack([flat, flat + rows * n]), jnp.stack([weights * (1 - labels), weights * labels])
        return jax.lax.reshape(_scatter(keys, both, 2 * rows * n, most), (2, rows, n))

    def by_scatter(buckets, labels, weights):
        # Hard labels and weights of 0 and 1, the usual ones, add up exactly as they are, once each.
        if not _is_few(buckets):
            return weighed(buckets, labels, weights)
        usual = ((labels == 0) | (labels == 1)) & ((weights == 0) | (weights == 1))
        return jax.lax.cond(_holds_everywhere(usual), counted, weighed, buckets, labels, weights)

    # On a mesh the question would be an all-reduce of its own.
    default = by_scatter if meshes.is_local((buckets, labels, weights)) else spread
    return jax.lax.platform_dependent(buckets, labels, weights, tpu=by_product, default=default)


def _holds_everywhere(condition: jax.Array) -> jax.Array:
    """Tells whether a condition holds everywhere, by a sum: XLA's CPU code for an `and` of many is slower."""
    return jax.lax.eq(masking.total(~condition), np.float32(0))


def _is_few(buckets: jax.Array) -> bool:
    """Tells whether a float32 can count the entries that meet in one sum."""
    return _is_known(buckets) and math.prod(buckets.shape) < 2**24


def _flatten(buckets: jax.Array, n: int, columns: Sequence[int] | None) -> tuple[int, int, jax.Array]:
    """Returns the number of rows of sums, the most entries of a last axis in one sum, and the sum of each entry."""
    if columns is None:
        return 1, buckets.shape[-1], buckets
    first = np.asarray(columns, np.int32) * n
    flat = buckets + jnp.expand_dims(jnp.asarray(first), tuple(range(buckets.ndim - 1)))
    return max(columns) + 1, max(map(list(columns).count, set(columns))), flat


def _sum_by_scatter(
    buckets: jax.Array, weights: Sequence[jax.Array], n: int, columns: Sequence[int] | None
) -> jax.Array:
    """Adds each entry to its sum: a CPU or a GPU takes no time to find it.

    A running float32 sum drifts: a million weights of 0.1 in one bucket are off by 1 %. So each weight is split in a
    multiple of a quantum and a small rest. A block of rows adds up such multiples exactly. Every block has a histogram
    of its own, and the blocks are added pairwise.
    """
    rows, most, buckets = _flatten(buckets, n, columns)
    sums = [_scatter(buckets, each, rows * n, most) for each in weights]
    return jnp.stack(sums).reshape(len(sums), rows, n)


def _scatter(buckets: jax.Array, weights: jax.Array, n: int, most: int) -> jax.Array:
    """Returns the sums `[n]` of one array of weights; `most` entries of a last axis can meet in one of them."""
    examples = buckets.shape[:-1]
    if buckets.ndim > 1 and buckets.shape[-1] == 1:
        buckets, weights = buckets[..., 0], weights[..., 0]
    mesh = meshes.explicit_mesh(buckets)
    replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec(None))
    # Under shape polymorphism the number of rows is no number: then all rows are one block.
    rows = math.prod(examples) * most if _is_known(buckets) else None
    block = max(BLOCK, n)
    blocks = 1 if rows is None else max(1, -(-rows // block))
    if blocks > 1:
        width = math.prod(buckets.shape[len(examples) :])
        buckets = meshes.flat_index(buckets) // width * most // block * n + buckets

    def sums(weights):
        zeros = jnp.zeros(blocks * n, jnp.float32)
        added = zeros.at[buckets].add(weights, mode="promise_in_bounds", out_sharding=replicated)
        return pairs.fold(added.reshape(blocks, n), jnp.add)

    if not meshes.is_local(buckets):
        # The quantum below would be a second all-reduce. Nine bits of each weight are as good while weights are of one
        # size: if weights in one bucket are as a thousand to one, the sum is off by 1e-5 (see BUILD_NOTES).
        coarse = jax.lax.reduce_precision(weights, exponent_bits=8, mantissa_bits=8)
        return sums(coarse) + sums(weights - coarse)
    coarse = weights if rows == 0 else _round_down(weights, None if rows is None else min(rows, block))

    def together(coarse, rest):
        # As one complex number: on a CPU a scatter of complex numbers takes little longer than one of floats.
        zeros = jnp.zeros(blocks * n, jnp.complex64)
        added = zeros.at[buckets].add(jax.lax.complex(coarse, rest), mode="promise_in_bounds").reshape(blocks, n)
        return pairs.fold(jnp.real(added), jnp.add) + pairs.fold(jnp.imag(added), jnp.add)

    def apart(coarse, rest):
        return sums(coarse) + sums(rest)

    rest = weights - coarse
    if n < LARGE:
        return jax.lax.platform_dependent(coarse, rest, cpu=together, default=apart)
    exact = sums(coarse)
    return exact + jax.lax.cond(_holds_everywhere(rest == 0), lambda _: jnp.zeros_like(exact), sums, rest)


def _round_down(weights: jax.Array, rows: int | None) -> jax.Array:
    """Rounds the weights down to multiples of a power of two, such that any `rows` of them, or all, add up exactly."""
    bound = jnp.sum(weights)
    bound = bound if rows is None else jnp.minimum(bound, rows * jnp.max(weights))
    exponent = jax.lax.shift_right_logical(jax.lax.bitcast_convert_type(bound, jnp.int32), np.int32(23))
    exponent = jax.lax.sub(exponent, np.int32(126))
    # A sum below 2^e in multiples of 2^(e - 23) has 23 bits; a float32 holds 24. Where the rest would be subnormal, and
    # so 0 to XLA, and where the sum is no number, the quantum is so large that a whole weight is rest.
    usual = jax.lax.is_finite(bound) & jax.lax.gt(exponent, np.int32(-80))
    power = masking.keep(usual, jax.lax.sub(exponent, np.int32(23)), 127)
    return jax.lax.floor(weights * _raise_two(jax.lax.neg(power))) * _raise_two(power)


def _raise_two(exponent: jax.Array) -> jax.Array:
    """Returns `2^e` as a float32, for e from -127 (where it is 0) to 127."""
    return jax.lax.bitcast_convert_type(jax.lax.shift_left(exponent + 127, np.int32(23)), jnp.float32)


def _is_known(x: jax.Array) -> bool:
    return all(isinstance(size, int) for size in x.shape)


def _sum_by_product(
    buckets: jax.Array, weights: Sequence[jax.Array], n: int, columns: Sequence[int] | None
) -> jax.Array:
    """Adds up by products of matrices of zeros and ones, for a TPU: it takes long to find a place in memory.

    Bucket `64 i + j` is entry `(i, j)` of `sum(e_i w e_j^T)`. The compiler makes the one-hot vectors where it
    multiplies and never writes them. A product takes bfloat16 numbers and adds them up in float32. So each weight is
    cut in three numbers that bfloat16 holds, and a block of rows adds the parts of equal weights up exactly.
    """
    cut, merged = _plan_blocks(buckets, math.prod(buckets.shape[1 : None if columns is None else -1]))
    entries, mesh = cut(buckets), meshes.explicit_mesh(buckets)
    # Blocks are kept apart, and so are columns that have rows of their own.
    apart = [0] if columns is None else [0, entries.ndim - 1]
    added = [axis for axis in range(entries.ndim) if axis not in apart]
    batch, contracted = ([axis + 1 for axis in axes] for axes in (apart, added))
    out_sharding = by_block = None
    if mesh is not None:
        spec = jax.typeof(entries).sharding.spec
        out_sharding = NamedSharding(mesh, PartitionSpec(*(spec[axis] for axis in apart), None, None))
        by_block = NamedSharding(mesh, PartitionSpec(spec[0], None, None))

    def one_hot(index: jax.Array, size: int) -> jax.Array:
        ids = np.arange(size, dtype=np.int32).reshape(-1, *[1] * entries.ndim)
        return index[None] == jnp.asarray(ids)

    row = jax.lax.shift_right_logical(entries, np.int32(WIDTH.bit_length() - 1))
    column = jax.lax.bitwise_and(entries, np.int32(WIDTH - 1))
    high, low = one_hot(row, -(-n // WIDTH)), one_hot(column, WIDTH).astype(jnp.bfloat16)

    def sums(part: jax.Array) -> jax.Array:
        rows = masking.keep(high, jnp.broadcast_to(part.astype(jnp.bfloat16)[None], high.shape), 0)
        return jax.lax.dot_general(
            rows,
            low,
            ((contracted, contracted), (batch, batch)),
            preferred_element_type=jnp.float32,
            out_sharding=out_sharding,
        )

    def whole(weights: jax.Array) -> jax.Array:
        first, second, third = map(sums, in_three(cut(weights)))
        total = first + (second + third)
        total = total.reshape(*total.shape[:-2], -1)[..., :n]
        total = total[:, None] if columns is None else total
        total = total if by_block is None else jax.sharding.reshard(total, by_block)
        return merged(total if columns is None else _add_by_row(total, columns))

    return jnp.stack([whole(each) for each in weights])


def _plan_blocks(x: jax.Array, width: int) -> tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]:
    """Returns a function that cuts arrays like `x` in blocks on a new first axis, and one that adds up their sums.

    A block holds at most `BLOCK` numbers that meet in one sum, `width` from each entry of the first axis of `x`.
    """
    one = (lambda x: x[None]), (lambda x: x[0])
    if not _is_known(x) or x.shape[0] * width <= BLOCK:
        return one
    n, most = x.shape[0], max(1, BLOCK // width)
    if meshes.is_local(x):
        rows = most
        blocks = -(-n // rows)

        def cut(x: jax.Array) -> jax.Array:
            # The padding adds zeros to the first bucket.
            filled = jnp.pad(x, [(0, blocks * rows - n), *[(0, 0)] * (x.ndim - 1)])
            return filled.reshape(blocks, rows, *x.shape[1:])

        return cut, lambda x: pairs.fold(x, jnp.add)
    # No two devices share a block, if the first axis is cut in equal parts: else rows would move.
    each, rest = divmod(n, meshes.count_devices(x))
    rows = next((rows for rows in range(min(most, each), 0, -1) if each % rows == 0), 1)
    if rest or 16 * rows < min(most, each):
        return one
    # Blocks are added up on every device, and then over devices, in one all-reduce.
    return (lambda x: x.reshape(n // rows, rows, *x.shape[1:])), (lambda x: jnp.sum(x, axis=0))


def _add_by_row(sums: jax.Array, columns: Sequence[int]) -> jax.Array:
    """Adds up sums by column `[blocks, c, n]` to sums by row `[blocks, rows, n]`."""
    members = [np.flatnonzero(np.asarray(columns) == row) for row in range(max(columns) + 1)]
    out = sums[:, np.array([inside[0] if len(inside) else 0 for inside in members])]
    for row, inside in enumerate(members):
        if len(inside) != 1:
            is_it = jnp.asarray(np.arange(len(members)) == row)[None, :, None]
            out = jnp.where(is_it, jnp.sum(sums[:, inside], axis=1, keepdims=True), out)
    return out
