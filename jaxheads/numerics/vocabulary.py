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
    """The ids, int32, of an array of strings or bytes. Names in rows that do not exist may be anything."""
    if vocabulary is None:
        raise ValueError(
            f"labels are strings (e.g. {_text(labels.flat[0])!r}) but the head has no label_vocabulary. Give it "
            "label_vocabulary=[...], or pass integer class ids."
        )
    ids = {name: i for i, name in enumerate(vocabulary)}
    encoded = np.asarray([ids.get(_text(name), -1) for name in labels.flat], np.int32).reshape(labels.shape)
    unknown = encoded < 0
    if where is not None:
        unknown &= where
        encoded = np.maximum(encoded, 0)
    if unknown.any():
        position = tuple(int(i) for i in np.argwhere(unknown)[0])
        raise ValueError(
            f"label {_text(labels[position])!r} at index {position} is not in the label_vocabulary {vocabulary!r}. "
            "Add it there, or leave the row out with where=False."
        )
    return encoded


def _text(name: Any) -> str:
    return name.decode("utf-8") if isinstance(name, bytes) else str(name)
