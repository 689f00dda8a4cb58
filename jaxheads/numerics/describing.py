"""Heads, optimizers and other configuration in words that are the same in every process: to tell two of them apart."""

import dataclasses
import enum
import functools
import hashlib
import inspect
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

# Functions of these packages differ by their names and by what they hold; the numbers in their code stay the same.
KNOWN = ("jax", "optax", "flax", "chex", "jaxheads", "functools", "numpy")
# How much of two texts that differ an error shows, and how much before the place where they part.
SHOWN, BEFORE = 70, 25


def describe(value: Any) -> str:
    """Returns a text that is equal for values that mean the same, in another process too: it holds no address.

    Functions count by their name, by the numbers and names in their code, and by all that they hold, which for an
    optimizer of optax are its rates. Arrays count by shape, dtype and values.
    """
    return _describe(value, ())


def _describe(value: Any, outer: tuple[int, ...]) -> str:
    if id(value) in outer:
        return "..."
    inner = functools.partial(_describe, outer=(*outer, id(value)))
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, enum.Enum, np.generic, np.dtype)):
        return repr(value)
    if isinstance(value, functools.partial):
        return f"partial({inner(value.func)}, {inner(value.args)}, {inner(value.keywords)})"
    if isinstance(value, (jax.Array, np.ndarray)):
        return _describe_array(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {field.name: vars(value)[field.name] for field in dataclasses.fields(value) if field.name in vars(value)}
        held = {name: x for name, x in held.items() if not _is_default(value, name, x)}
        return f"{type(value).__qualname__}({', '.join(f'{name}={inner(x)}' for name, x in held.items())})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{inner(key)}: {inner(x)}" for key, x in value.items()) + "}"
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = sorted(map(inner, value)) if isinstance(value, (set, frozenset)) else [*map(inner, value)]
        name = "" if type(value) in (list, tuple) else type(value).__qualname__
        return f"{name}({', '.join(parts)})"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if callable(value):
        function = inspect.unwrap(value)
        function = function.__func__ if isinstance(function, types.MethodType) else function
        if isinstance(function, types.FunctionType):
            return _describe_function(function, (*outer, id(value)))
    return type(value).__qualname__


def _is_default(value: Any, name: str, held: Any) -> bool:
    """Tells whether a field has its default value: a new field of a later version changes no text."""
    default = type(value).__dataclass_fields__[name].default
    return isinstance(held, type(default)) and describe(held) == describe(default)


def _describe_function(function: types.FunctionType, outer: tuple[int, ...]) -> str:
    code, held = function.__code__, {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            held[name] = _describe(cell.cell_contents, outer)
        except ValueError:  # a cell that has no value yet
            held[name] = "unset"
    positional = code.co_varnames[: code.co_argcount]
    defaults = dict(zip(reversed(positional), reversed(function.__defaults__ or ()), strict=False))
    defaults |= function.__kwdefaults__ or {}
    held |= {name: _describe(default, outer) for name, default in defaults.items() if default is not None}
    if str(function.__module__).partition(".")[0] not in KNOWN:
        numbers = [x for x in code.co_consts if isinstance(x, (int, float, complex)) and not isinstance(x, bool)]
        held["code"] = repr([*numbers, *code.co_names])
    name = function.__qualname__.replace(".<locals>", "")
    return f"{name}({', '.join(f'{key}={x}' for key, x in held.items())})"


def _describe_array(value: Any) -> str:
    kind = f"{value.dtype}{list(np.shape(value))}"
    if isinstance(value, Tracer) or not getattr(value, "is_fully_addressable", True):
        return kind
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return f"{kind}:{hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:12]}"


def find_changes(kept: Mapping[str, str], now: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Returns what differs, by name, as two short texts around the first difference. What one lacks is not compared."""
    both = {name: (kept[name], now[name]) for name in kept if name in now}
    return {name: _shorten(*texts) for name, texts in both.items() if texts[0] != texts[1]}


def _shorten(one: str, other: str) -> tuple[str, str]:
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, same - BEFORE)

    def cut(text: str) -> str:
        part = text[start : start + SHOWN]
        return ("..." if start else "") + part + ("..." if start + SHOWN < len(text) else "")

    return cut(one), cut(other)
