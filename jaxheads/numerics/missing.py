"""Missing values among numbers of the host: None, NaN and pandas.NA, in columns whose other values are no floats."""

from typing import Any, Protocol, runtime_checkable

import numpy as np

# A missing integer: it is illegal in every spec of integers, because it is no int32.
INTEGER = int(np.iinfo(np.int64).min)


@runtime_checkable
class Typed(Protocol):
    """A column of a data frame, or an array."""

    @property
    def dtype(self) -> Any: ...


@runtime_checkable
class Kinded(Protocol):
    """A dtype of NumPy or pandas, which tells its kind by a letter."""

    @property
    def kind(self) -> str: ...


@runtime_checkable
class Named(Protocol):
    """A table whose columns have names: of pyarrow, whose `columns` are the columns themselves, or of datasets."""

    @property
    def column_names(self) -> Any: ...


def is_frame(x: Any) -> bool:
    """Tells whether a value has columns by name, as a data frame of any library."""
    return hasattr(x, "__getitem__") and (hasattr(x, "columns") or isinstance(x, Named))


def names_of(frame: Any) -> list[Any]:
    """Returns the names of the columns of a data frame, which may have a column that is named `column_names`."""
    if isinstance(frame, Named) and isinstance(names := frame.column_names, list):
        return names
    columns: Any = frame
    return [*columns.columns]


def read(x: Any) -> np.ma.MaskedArray | None:
    """Returns the values of a column with a mask of the missing ones; None for a column that needs none.

    These need none: columns of floats, where NaN is missing, columns of text, and columns without a missing value.
    Values are bool, integers or floats, as the column says or as they are.
    """
    if is_frame(x):
        names = names_of(x)
        read_columns = [read(x[name]) for name in names]
        if not any(column is not None for column in read_columns):
            return None
        parts = [x[name] if column is None else column for name, column in zip(names, read_columns, strict=True)]
        return np.ma.stack([np.ma.asarray(part) for part in parts], axis=-1)
    dtype: Any = x.dtype if isinstance(x, Typed) else np.dtype(object)
    declared = dtype.kind if isinstance(dtype, Kinded) else None
    array = x if isinstance(x, np.ndarray) else np.asarray(x)
    if array.dtype.kind == "f" and declared in ("i", "u"):
        # How pandas gives nullable integers.
        mask = np.isnan(array)
        values = np.where(mask, 0, array).astype(np.uint64 if declared == "u" else np.int64)
        return np.ma.MaskedArray(values, mask)
    if array.dtype.kind != "O":
        return None
    flat = list(array.flat)
    if any(isinstance(value, (str, bytes)) for value in flat):
        return None
    mask = np.fromiter(map(_is_missing, flat), bool, len(flat))
    there = [value for value, missing in zip(flat, mask, strict=True) if not missing]
    if not all(isinstance(value, (bool, int, float, np.bool_, np.number)) for value in there):
        return None
    if any(isinstance(value, np.timedelta64) for value in there):  # to NumPy, a kind of integer
        return None
    if declared not in ("b", "i", "u") and not (there and mask.any()):
        return None
    kept = np.asarray(there, {"b": bool, "i": np.int64, "u": np.uint64}.get(declared or ""))
    values = np.zeros(len(flat), kept.dtype)
    values[~mask] = kept
    return np.ma.MaskedArray(values, mask).reshape(array.shape)


def as_floats(column: np.ma.MaskedArray) -> np.ndarray:
    """Returns a column as it would be without a mask: floats with NaN, if something is missing."""
    mask = np.ma.getmaskarray(column)
    return np.where(mask, np.nan, column.data.astype(np.float64)) if mask.any() else column.data


def as_integers(column: np.ma.MaskedArray) -> np.ndarray:
    """Returns a column of integers or bools as int64, with `INTEGER` where a value is missing."""
    return np.where(np.ma.getmaskarray(column), np.int64(INTEGER), column.data.astype(np.int64))


def _is_missing(value: Any) -> bool:
    return value is None or type(value).__name__ == "NAType" or (isinstance(value, float) and value != value)
