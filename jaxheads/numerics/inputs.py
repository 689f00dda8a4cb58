"""The values of users, made into arrays of a known dtype and shape, or refused with the fix in the message.

Shapes and dtypes are checked whenever a head is called, traced or not. Values can be looked at only in host arrays:
waiting for a device array would stall the device, and a tracer has no values.
"""

import functools
import math
from typing import Any, Protocol, TypeGuard, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxheads.numerics import brief, missing
from jaxheads.numerics.reduction import Divisor


def is_traced(tree: Any) -> bool:
    """Tells whether any leaf is a tracer."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def is_readable(x: Any, check: bool | None) -> bool:
    """Tells whether the values of `x` may be looked at: host arrays always, device arrays on request."""
    if isinstance(x, Tracer) or check is False:
        return False
    if isinstance(x, jax.Array):
        return bool(check) and x.is_fully_addressable
    return True


@runtime_checkable
class JaxArrayLike(Protocol):
    """A value that JAX can make an array of, such as a variable of flax's nnx."""

    def __jax_array__(self) -> jax.Array: ...


@runtime_checkable
class NumpyArrayLike(Protocol):
    """A value that NumPy can make an array of, such as a column of a data frame."""

    def __array__(self) -> np.ndarray: ...


def as_array(x: Any, what: str, *, names: bool | None = None) -> np.ndarray | jax.Array:
    """Returns `x` as a NumPy array, or as it is if it is a JAX array.

    `names` is for labels: it tells whether they may be names, with objects among the strings.
    """
    if isinstance(x, np.ma.MaskedArray):
        x = _unmask(x, what)
    if isinstance(x, np.ndarray) and x.dtype == object:
        return x if (column := missing.read(x)) is None else missing.as_floats(column)
    if isinstance(x, (jax.Array, np.ndarray)):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            raise ValueError(f"{what} must be an array of numbers. Given random keys.")
        return x
    if isinstance(x, JaxArrayLike):
        return jnp.asarray(x)
    if isinstance(x, (list, tuple)) and is_traced(x):
        raise ValueError(
            f"{what} must be an array. Given a {type(x).__name__} of {len(x)} values that jit has traced, each as an "
            "argument of its own. Make an array of it before the compiled function: np.asarray(x)."
        )
    try:
        array = np.asarray(x)
    except ValueError as error:
        raise ValueError(
            f"{what} must be an array. Given a {type(x).__name__} that NumPy cannot convert ({error}). "
            "Pass rows of equal length."
        ) from error
    if (column := missing.read(array if isinstance(x, (list, tuple)) else x)) is not None:
        return missing.as_floats(column)
    if array.dtype.kind == "O" and not (is_text(array) or (array.ndim and (names or not array.size))):
        raise ValueError(
            f"{what} must be a dense array of numbers"
            + (", or of strings where a label_vocabulary is given. " if names is not None else ". ")
            + f"Given a {type(x).__name__}, which NumPy reads as an object array of shape {array.shape}. Sparse "
            "and ragged containers are not supported: pass a dense array, or rows of equal length."
        )
    return array


def _unmask(x: np.ma.MaskedArray, what: str) -> np.ndarray:
    """Returns the data of a masked array in which nothing is masked: a masked value would count."""
    if hidden := int(np.ma.count_masked(x)):
        raise ValueError(
            f"{what} must be an array without a mask of its own. Given a NumPy masked array with {hidden} masked "
            "values, which would count as they are. Pass x.data, and which rows exist: where=~np.ma.getmaskarray(x)."
        )
    return x.data


def is_integer(x: Any, low: int, high: float = math.inf) -> TypeGuard[int]:
    """Tells whether `x` is a Python or NumPy integer, not a bool, from `low` to `high`."""
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool) and bool(low <= x <= high)


def check_switch(name: str, value: Any) -> None:
    """Refuses a value that is neither True nor False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False. Given {brief.tell(value)}.")


def is_text(x: Any) -> bool:
    """Tells whether `x` is a NumPy array of strings or bytes, or of objects with some among them."""
    if not isinstance(x, np.ndarray):
        return False
    return x.dtype.kind in "UST" or (x.dtype.kind == "O" and any(isinstance(v, (str, bytes)) for v in x.flat))


def dtype_kind(x: Any) -> str:
    """Returns `"bool"`, `"int"`, `"float"` or `"other"`. Bfloat16 and 8-bit floats are floats, times are `"other"`."""
    if is_time(x.dtype):  # NumPy counts a timedelta64 among the integers
        return "other"
    for kind, dtype in (("bool", jnp.bool_), ("int", jnp.integer), ("float", jnp.floating)):
        if jnp.issubdtype(x.dtype, dtype):
            return kind
    return "other"


def is_time(dtype: Any) -> bool:
    """Tells whether the values are points in time or durations."""
    return isinstance(dtype, np.dtype) and dtype.kind in "mM"


def mend_time(dtype: Any) -> str:
    """Returns the advice for making numbers of times; an empty text for another dtype."""
    if not is_time(dtype):
        return ""
    duration = "x" if dtype.kind == "m" else "(x - x.min())"
    column = "series" if dtype.kind == "m" else "(series - series.min())"
    return (
        f" A duration is a number only in a unit: {duration} / np.timedelta64(1, 's'), or {column}.dt.total_seconds()."
    )


def cast(x: Any, dtype: Any) -> Any:
    """Returns `x` in `dtype`. It stays on the host if it is there."""
    if isinstance(x, np.ndarray):
        with np.errstate(over="ignore", invalid="ignore"):
            return x.astype(dtype, copy=False)
    return x if x.dtype == dtype else jnp.asarray(x, dtype)


def as_numbers(x: Any, what: str, *, kinds: tuple[str, ...] = ("bool", "int", "float")) -> Any:
    """Returns `x` as float32. Refuses values that are no numbers."""
    array = as_array(x, what)
    if dtype_kind(array) not in kinds:
        given = f"strings (dtype {array.dtype})" if is_text(array) else f"dtype {array.dtype}"
        mend = mend_time(array.dtype)
        raise ValueError(f"{what} must have a dtype of {' or '.join(kinds)}. Given {given}.{mend}")
    return cast(array, jnp.float32)


def check_logits(shape: tuple[int, ...], dimension: int) -> None:
    """Refuses logits that are not `[D0, ..., DN, dimension]`."""
    if len(shape) < 2:
        raise ValueError(
            f"logits must have rank at least 2. Received rank {len(shape)}, shape {shape}. "
            f"Expected [D0, ..., DN, {dimension}]: add a leading axis, logits[None], for a single example"
            + (", or a last one, logits[..., None], for a column." if dimension == 1 else ".")
        )
    if shape[-1] != dimension:
        raise ValueError(
            f"logits shape must be [D0, D1, ... DN, logits_dimension], got {shape}: the last axis is {shape[-1]}, "
            f"logits_dimension is {dimension}. Make the last layer of the network {dimension} wide, or check the "
            "head's n_classes or label_dimension."
        )


def expand(x: Any, lead: tuple[int, ...], sizes: tuple[int, ...], what: str) -> Any:
    """Returns `x` of shape `lead` or `lead + [E]`, E one of `sizes`, as `lead + [E]`."""
    shape = tuple(x.shape)
    if len(shape) == len(lead):
        shape = (*shape, 1)
    allowed = [(*lead, size) for size in sizes]
    if shape not in allowed:
        raise ValueError(
            f"{what} shape must be {' or '.join(map(str, [lead, *allowed]))} to match the logits' leading shape "
            f"{lead}. Given {what} shape: {tuple(x.shape)}."
        )
    if len(x.shape) == len(shape):
        return x
    return add_last_axis(x) if shape == (*x.shape, 1) else x.reshape(shape)


def as_weights(x: Any, lead: tuple[int, ...], sizes: tuple[int, ...], what: str) -> Any:
    """Returns float32 weights `lead + [1]` (or `lead + [d]` where a head takes weights per logit)."""
    return expand(as_numbers(x, what), lead, sizes, what)


def add_last_axis(x: Any) -> Any:
    """Returns `x[..., None]`. For device arrays it is compiled: JAX's reshape outside `jit` takes six times as long."""
    return x.reshape((*x.shape, 1)) if isinstance(x, (np.ndarray, Tracer)) else _add_last_axis(x)


@jax.jit
def _add_last_axis(x: jax.Array) -> jax.Array:
    return jnp.expand_dims(x, -1)


def as_where(x: Any, lead: tuple[int, ...], what: str = "where", sizes: tuple[int, ...] = (1,)) -> Any:
    """Returns a mask, bool or 0/1: `lead + [1]`, or one of `sizes` in place of 1.

    An entry of a mask with fewer leading axes holds for all elements inside it.
    """
    array = as_array(x, what)
    if dtype_kind(array) == "other":
        raise ValueError(f"{what} must be bool, or 0 and 1. Given dtype {array.dtype}.")
    shape = tuple(array.shape)
    if shape and len(shape) < len(lead) and shape == lead[: len(shape)]:
        xp = np if isinstance(array, np.ndarray) else jnp
        array = xp.broadcast_to(array.reshape(shape + (1,) * (len(lead) - len(shape))), lead)
    return expand(array, lead, sizes, what)


def check_where(values: np.ndarray, live: np.ndarray, what: str) -> None:
    """Refuses a mask that is neither 0 nor 1 where the other masks hold."""
    bad = ~np.isin(values, (0, 1)) & live
    if bad.any():
        raise ValueError(
            f"{what} says which elements exist: bool, or 0 and 1. Given other values, e.g. {values[bad][0]}. Pass "
            "multiplicities as weights=."
        )


def as_slices(x: Any, lead: tuple[int, ...], n: int) -> Any:
    """Returns ids of slices `lead + [1]`, or a membership matrix `lead + [n]`.

    An entry with fewer leading axes holds for all elements inside it.
    """
    array, what = as_array(x, "slices"), f"slices (ids, or a membership matrix of {n} columns)"
    kind, shape = dtype_kind(array), tuple(array.shape)
    if kind not in ("int", "bool"):
        raise ValueError(f"{what} must be integers or bool. Given dtype {array.dtype}.")
    xp = np if isinstance(array, np.ndarray) else jnp
    if shape and len(shape) < len(lead) and shape == lead[: len(shape)]:
        array = xp.broadcast_to(array.reshape(shape + (1,) * (len(lead) - len(shape))), lead)
    is_matrix = tuple(array.shape) == (*lead, n) and (n > 1 or kind == "bool")
    if kind == "bool" and not is_matrix:
        raise ValueError(f"{what}: membership must have shape {(*lead, n)}. Given bool of shape {shape}.")
    return expand(array, lead, (n,) if is_matrix else (1,), what)


def check_slices(ids: Any, n: int, live: Any, check: bool | None) -> None:
    """Refuses ids on the host that no group has, in rows that are `live [..., 1]` (None: not known)."""
    if live is None or not is_readable(ids, check):
        return
    values = np.asarray(ids)
    low, high = (0, 1) if values.shape[-1] != 1 or values.dtype == np.bool_ else (-1, n - 1)
    bad = ((values < low) | (values > high)) & live
    if bad.any():
        raise ValueError(
            f"slices must lie in {low} ... {high}"
            + (" (-1: in no group)" if low else " (a membership matrix)")
            + f". Given {values[bad][0]} at index {tuple(int(i) for i in np.argwhere(bad)[0])}."
        )


def as_normalizer(x: Any) -> Any:
    """Returns a divisor: one number, float32 if it comes from the host. A device array's value is not looked at."""
    if x is None or isinstance(x, Divisor):
        return x
    array = as_array(x, "normalizer")
    if dtype_kind(array) == "other" or tuple(array.shape) != ():
        raise ValueError(
            "normalizer must be one number, the divisor of the global batch. Given "
            f"{f'shape {tuple(array.shape)}' if array.shape else f'dtype {array.dtype}'}. Sum it up first."
        )
    if not isinstance(array, np.ndarray):
        return array
    value = cast(array, jnp.float32)
    if not (np.isfinite(value) and value >= 0):
        raise ValueError(f"normalizer must be finite and not negative (0 gives a loss of 0). Given {brief.tell(x)}.")
    return value


def as_scalars(losses: Any) -> list[Any] | None:
    """Returns regularization losses as float32 scalars."""
    if losses is None:
        return None
    if not isinstance(losses, (list, tuple)):
        given = type(losses).__name__
        raise ValueError(f"regularization_losses must be a list of scalars. Given {given}: wrap it, [x].")
    losses = [x.__jax_array__() if isinstance(x, JaxArrayLike) and not isinstance(x, jax.Array) else x for x in losses]
    for value in losses:
        if not isinstance(value, (int, float, np.generic, np.ndarray, jax.Array)):
            raise ValueError(f"regularization_losses must be scalars. Given {brief.tell(value)}.")
        if jnp.shape(value) != ():
            raise ValueError(f"regularization_losses must be scalars. Given one of shape {jnp.shape(value)}.")
    return [jnp.asarray(value, jnp.float32) for value in losses]


def add_scalars(losses: Any) -> jax.Array:
    """Returns the sum of regularization losses, 0 if there are none."""
    return functools.reduce(jnp.add, losses or [], jnp.float32(0))
