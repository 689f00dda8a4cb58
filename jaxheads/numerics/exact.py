"""Sums that stay exact however they are split: numbers cut into digits, which float32 adds up without rounding.

A digit has 8 bits, and its place is fixed: digit k counts `2^(8 (k + LOW))`. So the digits of many batches and devices
add up one by one, as in Demmel and Nguyen, "Fast Reproducible Floating-Point Summation" (2013). A float32 holds the
sum of the digits of 2^15 settled numbers exactly. Digits are read as a double word, `(value, error)`, of twice the bits
of its dtype (Dekker 1971).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxheads.numerics import meshes
from jaxheads.numerics.pairs import two_sum

BITS = 8
# From the square of the smallest float32 to the square of the largest, times the number of rows.
LOW, DIGITS = -33, 72
# How many digits a product of three integers of 24 bits takes, shifted by up to 7.
_PER_PRODUCT = 10


def add_products(factors: jax.Array, exponents: jax.Array) -> jax.Array:
    """Returns the sums over `n` of exact products: three float32 `[..., n, 3]`, times `2^exponents` `[..., n]`.

    The sums are digits `[..., DIGITS]`, not settled; all NaN where a factor is no finite number. A product has 80 bits,
    so ten digits in a row. They are added up by the place of the first, in one matrix product, which is exact.
    """
    bits = jax.lax.bitcast_convert_type(factors, jnp.int32)
    powers = jax.lax.shift_right_logical(bits, np.int32(23)) & np.int32(255)
    # A float32 is an integer of 24 bits times a power of two. Subnormal numbers are 0 to XLA.
    whole = jnp.where(powers > 0, (bits & np.int32(2**23 - 1)) | np.int32(2**23), np.int32(0))
    exponents = exponents + jnp.sum(powers - np.int32(150), axis=-1, dtype=jnp.int32)
    first, second, third = (whole[..., i] for i in range(3))
    shifted = jax.lax.shift_left(first, exponents & np.int32(BITS - 1))
    product = _multiply(_multiply(_split(shifted, 3), _split(second, 2)), _split(third, 2))
    sign = jnp.prod(jnp.where(jnp.isfinite(factors), jnp.sign(factors), np.float32(np.nan)), axis=-1)
    digits = jnp.stack([sign * digit.astype(jnp.float32) for digit in _list_digits(product)], axis=-2)
    # The first digit may lie below the lowest place: the upper digits of the product still count.
    lowest, n = LOW - (_PER_PRODUCT - 1), _PER_PRODUCT - 1 + DIGITS
    place = jax.lax.shift_right_arithmetic(exponents, np.int32(BITS.bit_length() - 1))
    starts = np.expand_dims(np.arange(lowest, lowest + n, dtype=np.int32), tuple(range(place.ndim - 1)))
    is_start = (place[..., None] == starts[..., None, :]).astype(jnp.float32)
    *batch, i = range(place.ndim)
    mesh = meshes.explicit_mesh(digits)
    # Integers of 8 bits and of one: exact on every device, also where a float32 is multiplied as a bfloat16.
    by_start = jax.lax.dot_general(
        digits,
        is_start,
        (([i + 1], [i]), (batch, batch)),
        out_sharding=None if mesh is None else NamedSharding(mesh, PartitionSpec(*[None] * digits.ndim)),
    )
    out = [by_start[..., j, _PER_PRODUCT - 1 - j :][..., :DIGITS] for j in range(_PER_PRODUCT)]
    return sum(out[1:], out[0])


def settle(digits: jax.Array) -> jax.Array:
    """Carries sums of up to 2^16 digits to the places above, twice, so that the rest in each place is below 2^9."""
    zero = jnp.zeros_like(digits[..., :1])
    for _ in range(2):
        over = jnp.floor(digits[..., :-1] * np.float32(2.0**-BITS))
        digits = digits - 2**BITS * jnp.concatenate([over, zero], -1) + jnp.concatenate([zero, over], -1)
    return digits


def _split(x: jax.Array, n: int) -> list[jax.Array]:
    """Returns the `n` digits of 12 bits of an integer, from the lowest."""
    return [jax.lax.shift_right_logical(x, np.int32(12 * i)) & np.int32(4095) for i in range(n)]


def _list_digits(product: list[jax.Array]) -> list[jax.Array]:
    """Returns digits of 8 bits from digits of 12 bits: three from each two."""
    digits = []
    for j in range(_PER_PRODUCT):
        i, shift = divmod(BITS * j, 12)
        digit = jax.lax.shift_right_logical(product[i], np.int32(shift))
        if shift > 12 - BITS:
            digit = digit | jax.lax.shift_left(product[i + 1], np.int32(12 - shift))
        digits.append(digit & np.int32(2**BITS - 1))
    return digits


def _multiply(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
    """Returns the digits of 12 bits of a product of two numbers, from the lowest."""
    columns: list[Any] = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            columns[i + j] = columns[i + j] + x * y
    digits, over = [], jnp.zeros_like(a[0])
    for column in columns:
        digits.append((column + over) & np.int32(4095))
        over = jax.lax.shift_right_logical(column + over, np.int32(12))
    return [*digits, over]


def find_top(digits: Any, xp: Any) -> Any:
    """Returns the place of the highest digit that is not 0, counted from 2^0: `[...]` of digits `[..., DIGITS]`."""
    places = np.arange(LOW, LOW + DIGITS, dtype=np.int32)
    places = np.expand_dims(places, tuple(range(digits.ndim - 1)))
    return xp.where(digits != 0, places, np.int32(LOW)).max(-1)


def scale(x: Any, powers: Any, xp: Any) -> Any:
    """Returns `x * 2^powers`: of float32, for powers up to 127, and 0 below -126.

    `jnp.ldexp` traces 53 operations, this function 9.
    """
    if xp is np:
        return np.ldexp(x, np.clip(powers, -1000, 1000))
    bits = jax.lax.shift_left(jnp.clip(powers, -127, 127) + np.int32(127), np.int32(23))
    return x * jax.lax.bitcast_convert_type(bits, jnp.float32)


def join(digits: Any, unit: Any, xp: Any) -> tuple[Any, Any]:
    """Returns the double word that digits `[..., DIGITS]` stand for, in units of `2^unit`, `[...]`."""
    places = BITS * np.arange(LOW, LOW + DIGITS, dtype=np.int32)
    powers = np.expand_dims(places, tuple(range(unit.ndim))) - unit[..., None]
    terms = scale(digits, powers, xp)
    words = terms, xp.zeros_like(terms)
    while (n := words[0].shape[-1]) > 1:
        half = n // 2
        low, high, rest = ([x[..., a:b] for x in words] for a, b in ((0, half), (half, 2 * half), (2 * half, n)))
        added = add((low[0], low[1]), (high[0], high[1]))
        words = tuple(xp.concatenate(both, -1) for both in zip(added, rest, strict=True))
    return words[0][..., 0], words[1][..., 0]


def add(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    """Returns the sum of two double words."""
    high, low = two_sum(a[0], b[0])
    more, less = two_sum(a[1], b[1])
    high, low = two_sum(high, low + more)
    return two_sum(high, low + less)


def subtract(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    """Returns the difference of two double words."""
    return add(a, (-b[0], -b[1]))


def multiply(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    """Returns the product of two double words."""
    high, low = _multiply_exactly(a[0], b[0])
    return two_sum(high, low + (a[0] * b[1] + a[1] * b[0]))


def divide(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    """Returns the quotient of two double words; the divisor is not 0."""
    first = a[0] / b[0]
    rest = subtract(a, multiply(b, (first, first * 0)))
    return two_sum(first, rest[0] / b[0])


def _multiply_exactly(a: Any, b: Any) -> tuple[Any, Any]:
    """Returns `a * b` rounded, and the rounding error."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halve(a), _halve(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halve(x: Any) -> tuple[Any, Any]:
    """Returns two numbers of half the bits that add up to a number."""
    scaled = x * (2.0**12 + 1 if x.dtype == np.float32 else 2.0**27 + 1)
    high = scaled - (scaled - x)
    return high, x - high
