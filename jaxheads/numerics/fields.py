"""Frozen dataclasses that are pytrees: static fields are metadata, learned and running ones are data.

The class decorator is applied by `Head.__init_subclass__`, so that writing a head takes no decorator.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np

_KIND = "jaxheads_kind"
STATIC, LEARNED, RUNNING, HEADS = "static", "learned", "running", "heads"


def learned(initializer: Callable[[Any, jax.Array], Any], *, init: Literal[False] = False) -> Any:
    """A field that lives in the parameter tree and is trained like any parameter; None until bound.

    Args:
        initializer: `(head, key) -> array`, the first value.
        init: tells type checkers that the constructor need not be given this field.
    """
    return _field(LEARNED, initializer)


def running(initializer: Callable[[Any], Any], *, init: Literal[False] = False) -> Any:
    """A field carried beside batch statistics: no gradient, no weight decay; None until bound.

    Args:
        initializer: `(head) -> array`, the first value.
        init: tells type checkers that the constructor need not be given this field.
    """
    return _field(RUNNING, initializer)


def subheads(**kwargs: Any) -> Any:
    """A field that holds a head or a tuple of heads: a child of the pytree, so learned fields inside are leaves."""
    return dataclasses.field(metadata={_KIND: (HEADS, None)}, **kwargs)


def _field(kind: str, initializer: Callable[..., Any]) -> Any:
    if not callable(initializer):
        raise ValueError(f"{kind}() takes a function that makes the first value. Given {initializer!r}.")
    # By keyword in the constructor after all, so that dataclasses.replace of a bound head keeps its parameters.
    return dataclasses.field(default=None, kw_only=True, metadata={_KIND: (kind, initializer)})


def of_kind(cls: type, *kinds: str) -> tuple[dataclasses.Field, ...]:
    """The fields of a head class that are of one of `kinds`."""
    return tuple(f for f in dataclasses.fields(cls) if f.metadata.get(_KIND, (STATIC, None))[0] in kinds)


def initializer(field: dataclasses.Field) -> Callable[..., Any]:
    """What makes the first value of a learned or running field."""
    return field.metadata[_KIND][1]


def freeze(name: str, value: Any) -> Any:
    """A static value made hashable, or refused with the name of the field."""
    if isinstance(value, (list, tuple, Iterator)):
        items = [freeze(name, v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, (np.ndarray, jax.Array)):
        raise ValueError(
            f"{name} is a static field and cannot hold an array. Given {type(value).__name__} of shape "
            f"{np.shape(value)}. Pass a tuple, e.g. tuple(x.tolist()), or declare the field learned()."
        )
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{name} must not be NaN: NaN never equals itself, so every call would compile anew.")
    try:
        hash(value)
    except TypeError as error:
        raise ValueError(
            f"{name} is a static field and must be hashable. Given a {type(value).__name__}: {value!r}. Pass a "
            "list or a tuple."
        ) from error
    return value


def register(cls: type) -> None:
    """Makes a frozen dataclass of `cls` and registers it as a pytree."""
    dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    data = tuple(f.name for f in of_kind(cls, LEARNED, RUNNING, HEADS))
    static = tuple(f.name for f in of_kind(cls, STATIC))

    def flatten(head):
        return tuple(getattr(head, n) for n in data), tuple(getattr(head, n) for n in static)

    def flatten_with_keys(head):
        children, aux = flatten(head)
        return tuple((jax.tree_util.GetAttrKey(n), c) for n, c in zip(data, children, strict=True)), aux

    def unflatten(aux, children):
        # Not through __init__: leaves may be anything here (tracers, None, sentinels), and nothing static is new.
        head = object.__new__(cls)
        for name, value in zip((*static, *data), (*aux, *children), strict=True):
            object.__setattr__(head, name, value)
        return head

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
