"""What users passed, in a few words for an error: errors end in logs, where data do not belong."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

# Of the values of a user so many are shown, and of the text of each so many characters.
VALUES, CHARACTERS = 3, 40


@runtime_checkable
class Shaped(Protocol):
    """An array, or what another library keeps about one."""

    @property
    def dtype(self) -> Any: ...

    @property
    def shape(self) -> Any: ...


def tell(value: Any) -> str:
    """Returns a kind, a size, and at most three values.

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


def cut(text: str, most: int = CHARACTERS) -> str:
    """Returns the start of a text."""
    return text if len(text) <= most else text[: most - 1] + "..."
