"""Class names and their ids: host only, for no string ever reaches a device."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxheads.numerics import brief


def check(vocabulary: Any, n: int, head: str) -> None:
    """Refuses a vocabulary that is not a tuple or list of `n` distinct names."""
    if vocabulary is None:
        return
    if not isinstance(vocabulary, tuple) or not all(isinstance(name, str) for name in vocabulary):
        raise ValueError(
            f"label_vocabulary should be a list or a tuple of strings. Given type: {type(vocabulary).__name__}, "
            f"value {vocabulary!r}."
        )
    if len(vocabulary) != n:
        raise ValueError(
            f"label_vocabulary must name each of the {n} classes of this {head} once (n_classes={n}). "
            f"Given {len(vocabulary)} names: "
            f"{vocabulary!r}."
        )
    if len(set(vocabulary)) != n:
        twice = sorted({name for name in vocabulary if vocabulary.count(name) > 1})
        raise ValueError(f"label_vocabulary must not repeat a name. Given {twice} more than once in {vocabulary!r}.")


def encode(labels: np.ndarray, vocabulary: tuple[str, ...] | None, where: np.ndarray | None = None) -> np.ndarray:
    """Returns the ids, int32, of an array of strings or bytes; -1, which no class has, for a value that is no name.

    Such values are refused in rows that exist (by default all).
    """
    if vocabulary is None:
        example = f" (e.g. {_show(labels.flat[0])})" if labels.size else ""
        raise ValueError(
            f"labels are strings{example} but the head has no label_vocabulary. Give it label_vocabulary=[...], or "
            "pass integer class ids."
        )
    ids: dict[str | None, int] = {name: i for i, name in enumerate(vocabulary)}
    encoded = np.fromiter((ids.get(_decode(name), -1) for name in labels.flat), np.int32, labels.size)
    encoded = encoded.reshape(labels.shape)
    refuse(labels, encoded < 0 if where is None else (encoded < 0) & where, vocabulary)
    return encoded


def refuse(labels: np.ndarray, unknown: np.ndarray, vocabulary: tuple[str, ...] | None) -> None:
    """Refuses names that are not in the vocabulary, naming the first."""
    if unknown.any():
        position = tuple(int(i) for i in np.argwhere(unknown)[0])
        raise ValueError(
            f"label {_show(labels[position])} at index {position} is not in the label_vocabulary "
            f"{brief.tell(vocabulary)}, {int(unknown.sum())} such in all. Add it there, or leave the row out with "
            "where=False."
        )


class Encoded(NamedTuple):
    """An array that was made of labels of another form.

    Attributes:
        array: -1, which is illegal, throughout a row that could not be encoded.
        strangers: the values without a class, by the position of their row.
    """

    array: np.ndarray
    strangers: dict[tuple[int, ...], Any]


def has_names(labels: Any) -> bool:
    """Tells whether there is a string anywhere in nested lists."""
    if isinstance(labels, (list, tuple)):
        return any(map(has_names, labels))
    return isinstance(labels, (str, bytes))


def is_empty(labels: Any) -> bool:
    """Tells whether nested lists hold nothing at all: rows without names."""
    return isinstance(labels, (list, tuple)) and all(map(is_empty, labels))


def one_hot(labels: Any, n: int, vocabulary: tuple[str, ...] | None) -> Any:
    """Encodes host labels that are names or ids as one-hot rows, float32 `[..., n]`; returns others as they are.

    Ids are integers with one axis, or with a last axis of size 1. An unknown name is a row of -1, which is illegal.
    """
    if is_plain(labels):
        labels = np.asarray(labels)
    if not isinstance(labels, np.ndarray):
        return labels
    if labels.dtype.kind in "USO" and vocabulary is not None:
        ids = encode(labels, vocabulary, np.asarray(False))
    elif labels.dtype.kind in "iu" and (labels.ndim == 1 or labels.shape[-1:] == (1,)):
        ids = labels
    else:
        return labels
    ids = ids[..., 0] if ids.ndim > 1 and ids.shape[-1] == 1 else ids
    strangers = {tuple(map(int, at)): labels[tuple(at)] for at in np.argwhere((ids < 0) | (ids >= n))}
    rows = (ids[..., None] == np.arange(n)).astype(np.float32)
    return Encoded(np.where(((ids < 0) | (ids >= n))[..., None], np.float32(-1), rows), strangers)


def is_plain(labels: Any) -> bool:
    """Tells whether labels are lists of names, or of integers."""
    if not isinstance(labels, (list, tuple)) or not labels:
        return isinstance(labels, (str, bytes)) or (isinstance(labels, (int, np.integer)) and labels is not True)
    return all(map(is_plain, labels))


def multi_hot(labels: Any, n: int, vocabulary: tuple[str, ...] | None) -> Encoded:
    """Encodes lists of ids or names, one an example, nested as deep as the leading axes: int32 `[..., n]`."""
    depth = _count_levels(labels)
    if depth < 2 and len(labels):
        raise ValueError(
            f"labels must be lists of class ids or names, one list a row: [[...], ...]. Given {brief.tell(labels)}."
        )
    if not len(labels):
        return Encoded(np.zeros((0, n), np.int32), {})
    lead = _measure_lead(labels, depth - 1)
    rows = list(_walk_rows(labels, len(lead)))
    if vocabulary is None and has_names(rows):
        encode(np.asarray([name for row in rows for name in row if isinstance(name, (str, bytes))]), None)
    ids: dict[Any, int] = {name: i for i, name in enumerate(vocabulary or ())}
    array = np.zeros((len(rows), n), np.int32)
    strangers = {}
    full = all(len(row) == n and all(isinstance(x, (int, np.integer)) for x in row) for row in rows)
    if full and len(rows) > 1 and any(len(set(row)) < n for row in rows):
        # Ids do not repeat in a row: these are multi-hot, or meant to be.
        raise ValueError(
            f"labels: {brief.tell(rows[0])} and all other rows read as multi-hot, not as lists of class ids. Pass "
            "multi-hot labels as an array of 0 and 1, np.asarray(labels)."
        )
    for i, row in enumerate(rows):
        for name in row:
            number = isinstance(name, (int, np.integer)) and not isinstance(name, bool)
            k = int(name) if number else ids.get(_decode(name), -1)
            if not 0 <= k < n:
                strangers[tuple(int(j) for j in np.unravel_index(i, lead))] = name
                array[i] = -1
                break
            array[i, k] = 1
    return Encoded(array.reshape((*lead, n)), strangers)


def refuse_strangers(strangers: dict[tuple[int, ...], Any], live: np.ndarray, n: int, vocabulary: Any) -> None:
    """Refuses ids and names without a class in rows `live [..., 1]`, naming the first."""
    for position, name in strangers.items():
        if live.any() if live.ndim == 0 else live[position].any():
            where = (
                f"in the label_vocabulary {brief.tell(vocabulary)}"
                if vocabulary
                else f"one of the class ids 0 ... {n - 1}"
            )
            raise ValueError(
                f"labels: {_show(name)} in the row at index {position} is not {where}. Rows are lists of class ids or "
                "names; leave a row out with where=False."
            )


def _count_levels(labels: Any) -> int:
    if not isinstance(labels, (list, tuple)):
        return 0
    return 1 + max(map(_count_levels, labels), default=0)


def _measure_lead(labels: Any, depth: int) -> tuple[int, ...]:
    """Returns the leading shape of lists whose rows are `depth` levels down."""
    if not isinstance(labels, (list, tuple)):
        raise ValueError(
            f"labels must be lists of class ids or names, one list a row. Given {brief.tell(labels)} for a row."
        )
    if depth <= 0:
        return ()
    shapes = {_measure_lead(inner, depth - 1) for inner in labels}
    if len(shapes) > 1:
        raise ValueError(f"labels: lists of rows must be of equal lengths. Given leading shapes {sorted(shapes)}.")
    return (len(labels), *(next(iter(shapes)) if shapes else (0,) * (depth - 1)))


def _walk_rows(labels: Any, depth: int) -> Iterator[Any]:
    if depth == 0:
        yield labels
        return
    for inner in labels:
        yield from _walk_rows(inner, depth - 1)


def _decode(name: Any) -> str | None:
    """Returns a name; None for a value that is none: undecodable bytes, a missing value (None, NaN, pandas.NA)."""
    if isinstance(name, bytes):
        try:
            return name.decode("utf-8")
        except UnicodeDecodeError:
            return None
    return str(name) if isinstance(name, str) else None


def _show(name: Any) -> str:
    text = _decode(name)
    return brief.tell(text if text is not None else name.item() if isinstance(name, np.generic) else name)
