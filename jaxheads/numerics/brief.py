"""Short texts about the values of users, for errors: errors end in logs, where data do not belong."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

# How many values of a user a text shows, and how many characters of each.
VALUES, CHARACTERS = 3, 40


@runtime_checkable
class Shaped(Protocol):
    """An array, or the description of one by another library."""

    @property
    def dtype(self) -> Any: ...

    @property
    def shape(self) -> Any: ...


def tell(value: Any) -> str:
    """Returns the kind of a value, its size, and at most three of its values.

    >>> tell([3, 1, 4, 1, 5]), tell({"a": 1}), tell("x" * 100)
    ('[3, 1, 4, ...] of length 5', "a dict with the keys ['a']", "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...")
    """
    if isinstance(value, (np.ndarray, np.generic)) and value.size <= VALUES:
        return f"an array {value.dtype}{list(value.shape)}: {cut(str(value.tolist()))}"
    if isinstance(value, Shaped):
        return f"an array {value.dtype}{list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with the keys {tell_names(value)}"
    if isinstance(value, (list, tuple)) and (len(value) > VALUES or any(len(repr(x)) > CHARACTERS for x in value)):
        shown = ", ".join(tell(each) for each in value[:VALUES])
        return cut(f"[{shown}{', ...' if len(value) > VALUES else ''}]", 3 * CHARACTERS) + f" of length {len(value)}"
    return cut(repr(value))


def tell_names(names: Any, most: int = 10) -> str:
    """Returns the first names of a table or a dict, sorted."""
    found = sorted(map(str, names))
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return f"{[cut(name) for name in found[:most]]}{more}"


def is_one_of(x: Any, options: Any) -> bool:
    """Tells whether a user's value is one of a few texts, or None among them. An array would compare its entries."""
    return (x is None or isinstance(x, str)) and x in options


def as_names(x: Any) -> tuple[str, ...] | None:
    """Returns the texts in a user's list of any kind, of one text too; None for any other value."""
    if isinstance(x, str):
        return (x,)
    if isinstance(x, np.ndarray):
        x = x.tolist()
    elif isinstance(x, (bytes, Mapping, type, jax.Array)):
        return None
    if not isinstance(x, Iterable):
        return None
    names = tuple(x)
    return names if all(isinstance(name, str) for name in names) else None


def cut(text: str, most: int = CHARACTERS) -> str:
    """Returns the start of a text."""
    return text if len(text) <= most else text[: most - 1] + "..."
