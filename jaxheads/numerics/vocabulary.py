"""Class names and their ids: host only, for no string ever reaches a device."""

from typing import Any

import numpy as np


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
    """The ids, int32, of an array of strings or bytes; -1, which no class has, for whatever is not a name.

    Those are refused in rows that exist (by default all).
    """
    if vocabulary is None:
        example = f" (e.g. {_shown(labels.flat[0])})" if labels.size else ""
        raise ValueError(
            f"labels are strings{example} but the head has no label_vocabulary. Give it label_vocabulary=[...], or "
            "pass integer class ids."
        )
    ids: dict[str | None, int] = {name: i for i, name in enumerate(vocabulary)}
    encoded = np.fromiter((ids.get(_text(name), -1) for name in labels.flat), np.int32, labels.size)
    encoded = encoded.reshape(labels.shape)
    refuse(labels, encoded < 0 if where is None else (encoded < 0) & where, vocabulary)
    return encoded


def refuse(labels: np.ndarray, unknown: np.ndarray, vocabulary: tuple[str, ...] | None) -> None:
    """Refuses names that are not in the vocabulary, naming the first."""
    if unknown.any():
        position = tuple(int(i) for i in np.argwhere(unknown)[0])
        raise ValueError(
            f"label {_shown(labels[position])} at index {position} is not in the label_vocabulary {vocabulary!r}, "
            f"{int(unknown.sum())} such in all. Add it there, or leave the row out with where=False."
        )


def _text(name: Any) -> str | None:
    """A name; None for what is none: undecodable bytes, and what stands for a missing value (None, NaN, pandas.NA)."""
    if isinstance(name, bytes):
        try:
            return name.decode("utf-8")
        except UnicodeDecodeError:
            return None
    return str(name) if isinstance(name, str) else None


def _shown(name: Any) -> str:
    text = _text(name)
    return repr(text if text is not None else name.item() if isinstance(name, np.generic) else name)
