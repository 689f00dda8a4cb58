"""Features as users hold them (mappings, data frames, nested), and the numbers among them that a loss can read."""

import dataclasses
import numbers
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jaxheads.numerics import brief, inputs
from jaxheads.numerics.missing import is_frame, names_of


class Columns(dict):
    """The columns of `features` that compiled code can hold, by key. For another key, an error names these columns.

    A pytree that is nested as the features are. The error also names the columns that were left out. They are no part
    of the tree's structure: a text column that comes and goes compiles nothing anew.
    """

    left_out: Mapping[Any, str] = MappingProxyType({})

    def __missing__(self, key: Any) -> Any:
        left_out = ", ".join(f"{k!r}: {why}" for k, why in self.left_out.items())
        raise ValueError(
            f"features[{key!r}] is not among the numeric columns that a loss can read. Columns: {describe(self)}. "
            f"Left out, for they hold no numbers: {{{left_out}}}."
        )


@dataclasses.dataclass(frozen=True)
class _Layout:
    keys: tuple[Any, ...]
    left_out: Mapping[Any, str] = dataclasses.field(compare=False)


def _flatten_columns(columns: Columns) -> tuple[list[tuple[Any, Any]], _Layout]:
    keys = tuple(sorted(columns, key=lambda key: (type(key).__name__, str(key))))
    return [(jax.tree_util.DictKey(key), columns[key]) for key in keys], _Layout(keys, columns.left_out)


def _unflatten_columns(layout: _Layout, values: Any) -> Columns:
    columns = Columns(zip(layout.keys, values, strict=True))
    columns.left_out = layout.left_out
    return columns


jax.tree_util.register_pytree_with_keys(Columns, _flatten_columns, _unflatten_columns)


def describe(x: Any) -> str:
    """Returns the dtype and shape of a column in a few letters."""
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(value)}" for key, value in x.items()) + "}"
    return f"{x.dtype}{list(x.shape)}"


def table(features: Any) -> Mapping[Any, Any] | None:
    """Returns a mapping, or a data frame as one; None for anything else."""
    if isinstance(features, Mapping):
        return features
    return {key: features[key] for key in names_of(features)} if is_frame(features) else None


def column(features: Any, key: str, what: str) -> Any:
    """Returns one column, or raises an error that tells its use and the columns that exist."""
    found = table(features)
    if found is None or key not in found:
        given = brief.tell(features) if found is None else brief.tell_names(found)
        raise ValueError(f"Feature {key} ({what}) is not in features. Given features: {given}.")
    return found[key]


def numeric_columns(features: Any) -> Columns:
    """Returns the columns of `features` that compiled code can hold: numbers in arrays of any rank, nested mappings."""
    columns, left_out = Columns(), {}
    given = table({} if features is None else features)
    if given is None:
        raise ValueError(f"features must be a mapping or a data frame. Given a {type(features).__name__}.")
    for key, value in given.items():
        if isinstance(value, Mapping):
            columns[key] = numeric_columns(value)
        elif isinstance(column := _read_column(value), str):
            left_out[key] = column
        else:
            columns[key] = column
    columns.left_out = left_out
    return columns


def _read_column(value: Any) -> Any:
    """Returns a feature as an array of numbers, or a text that says what it is instead."""
    kind = type(value).__name__
    if isinstance(value, np.ma.MaskedArray):
        if np.ma.is_masked(value):
            return "a masked array with masked values"
        value = value.data
    if isinstance(value, (list, tuple)):
        first = value
        while isinstance(first, (list, tuple)):
            if not first:
                return f"an empty {kind}"
            first = first[0]
        if not isinstance(first, (numbers.Number, np.generic, np.ndarray)):
            return f"a {kind} of {type(first).__name__}"
    elif not isinstance(value, (numbers.Number, np.generic, inputs.NumpyArrayLike)):
        if not isinstance(value, inputs.JaxArrayLike):
            return f"a {kind}"
        value = value.__jax_array__()
    try:
        array = value if isinstance(value, (np.ndarray, jax.Array)) else np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"a {kind} that NumPy cannot convert ({error})"
    return array if inputs.dtype_kind(array) != "other" else f"dtype {array.dtype}"
