"""Compensated pairs: a float32 `(sum, error)` on a trailing axis, worth about 48 bits.

A float32 counter stops at 2^24. The pair goes on: `two_sum` returns the rounding error of an addition exactly
(Knuth 1969), and the error is carried along (Dekker 1971; the addition below is `AccurateDWPlusDW` of Joldes,
Muller and Popescu 2017, with a relative error below 3 * 2^-48).

A trailing axis of size 1 is a plain float32 array, as one batch gives it; size 2 is a pair. Adding any two gives a
pair, so that a `lax.scan` that starts from zero pairs never changes type.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.numerics import meshes


def two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns `a + b` rounded, and the rounding error."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (x[..., 0], x[..., 1]) if x.shape[-1] == 2 else (x[..., 0], jnp.zeros_like(x[..., 0]))


def add(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the sum of two states `[..., 1 or 2]` as a pair `[..., 2]`."""
    rank = max(a.ndim, b.ndim)
    a, b = (jnp.expand_dims(x, tuple(range(rank - x.ndim))) for x in (a, b))
    (a_sum, a_error), (b_sum, b_error) = _split(a), _split(b)
    s, e = two_sum(a_sum, b_sum)
    t, f = two_sum(a_error, b_error)
    high, e = two_sum(s, e + t)
    high, low = two_sum(high, e + f)
    # inf - inf is NaN in the error term, and inf must stay inf.
    plain = a_sum + b_sum
    finite = jnp.isfinite(plain)
    pair = jnp.where(finite, high, plain), jnp.where(finite, low, jnp.zeros_like(low))
    # `jnp.stack`, as a choice: XLA's CPU code for it takes two thirds of the time.
    return jnp.where(np.array([True, False]), *(jnp.expand_dims(x, -1) for x in pair))


def psum(x: jax.Array, axis_name) -> jax.Array:
    """Returns the sum over the devices of `axis_name`, the same on all of them, in one all-reduce.

    A plain `psum` of pairs would add the large parts in float32, and lose the errors that the small parts keep. So each
    device puts its pair in its own slot of a zero array. Adding zeros loses nothing. Then the slots are added as pairs.
    """
    if x.shape[-1] == 1:
        return meshes.psum(x, axis_name)
    meshes.check_axis(axis_name)
    n = jax.lax.axis_size(axis_name)
    slots = jnp.zeros((n, *x.shape), x.dtype).at[jax.lax.axis_index(axis_name)].set(x)
    slots = jax.lax.psum(slots, axis_name)
    return fold(slots, add)


def fold(x: jax.Array, combine: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Combines the entries of the first axis pairwise, in about log2(n) rounds: rounding errors grow no faster."""
    while (n := x.shape[0]) > 1:
        half = n // 2
        merged = combine(x[:half], x[half : 2 * half])
        x = jnp.concatenate([merged, x[2 * half :]]) if n % 2 else merged
    return x[0]


def add_along(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns the sum of states `[..., 1 or 2]` over some axes as pairs `[..., 2]`; of no states, zero."""
    x = jnp.moveaxis(x, axes, range(len(axes)))
    x = x.reshape(-1, *x.shape[len(axes) :])
    x = add(x, jnp.zeros_like(x))
    return fold(x, add) if x.shape[0] else jnp.zeros_like(x, shape=x.shape[1:])


def merge(states: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the sum of states `[..., 1 or 2]` of equal leading shape as pairs `[..., 2]`: in float64, on the host."""
    total = sum(np.asarray(x, np.float64).sum(-1) for x in states)
    high = np.asarray(total, np.float32)
    with np.errstate(invalid="ignore"):
        low = np.where(np.isfinite(high), total - high, 0).astype(np.float32)
    return np.stack([high, low], axis=-1)
