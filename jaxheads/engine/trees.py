"""Walks over heads with heads inside. A head under the name "" takes and gives the values themselves, not a dict."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxheads.contract import AbstractHead, Batch


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Adds the name of the head to a `ValueError` that it raises."""
    try:
        yield
    except ValueError as error:
        if not name:
            raise
        raise ValueError(f"Head {name!r}: {error}") from error


def each(head: AbstractHead, function: Callable[..., Any], *trees: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `function(inner, *values)` by name, for every head inside that all trees hold."""
    found = {}
    for name, inner in head.parts().items():
        if all(name in tree for tree in trees):
            with naming(name):
                found[name] = function(inner, *(tree[name] for tree in trees))
    return found


def parts_of(head: AbstractHead, batch: Batch) -> dict[str, Batch]:
    """Returns the batches of the heads inside, by name, as these heads see them."""
    return head.prepared(batch).parts or {}


def unnested(by_name: Mapping[str, Any]) -> Any:
    """Returns the form for users: a dict by name, or the value of the one head under the name ""."""
    return by_name[""] if "" in by_name else dict(by_name)


def leaves(head: AbstractHead) -> list[AbstractHead]:
    """Returns the heads without heads inside."""
    inside = head.parts()
    return [leaf for inner in inside.values() for leaf in leaves(inner)] if inside else [head]
