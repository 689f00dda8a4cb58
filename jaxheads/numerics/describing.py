"""Texts about heads, optimizers and other configuration, the same in every process: they tell two of them apart."""

import dataclasses
import enum
import hashlib
import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

# Functions of these packages differ by their names and by the values that they hold; their code stays the same.
KNOWN = ("jax", "optax", "flax", "chex", "jaxheads", "functools", "numpy")
# How many characters an error shows of two texts that differ, and how many of them before the first difference.
SHOWN, BEFORE = 70, 25
# A longer text is cut to its start and a hash, and a longer list to its length and a hash.
LONGEST, MOST = 4000, 64


def describe(value: Any) -> str:
    """Returns a text that is equal for values that mean the same, in another process and another Python too.

    It holds no address. Functions count by their name, by the numbers and names in their code, and by the values that
    they hold, such as the rates of an optimizer of optax. Arrays count by shape, dtype and values. An integer is the
    float of the same value: schedules of optax turn one into the other as they are traced.
    """
    return _Describer().describe(value)


def describe_code(value: Any) -> dict[str, str]:
    """Returns a hash of the code of all functions of a user in a value. It compares within one version of Python."""
    describer = _Describer()
    describer.describe(value)
    version = f"code (Python {sys.version_info.major}.{sys.version_info.minor})"
    return {version: describer.code.hexdigest()[:12]} if describer.has_code else {}


class _Describer:
    """A describer of one value. A value that is met again, as a function that many others hold, is described once."""

    def __init__(self):
        self.code, self.has_code = hashlib.sha256(), False
        self._known: dict[int, tuple[Any, str]] = {}
        self._outer: set[int] = set()

    def describe(self, value: Any) -> str:
        if id(value) in self._outer:
            return "..."
        if (known := self._known.get(id(value))) is not None:
            return known[1]
        self._outer.add(id(value))
        text = _shorten(self._describe(value), LONGEST)
        self._outer.remove(id(value))
        # The value is kept too: another one could have its address later.
        self._known[id(value)] = value, text
        return text

    def _describe(self, value: Any) -> str:
        if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
            return _describe_number(value)
        if value is None or isinstance(value, (bool, complex, str, bytes, enum.Enum, np.generic, np.dtype)):
            return repr(value)
        if isinstance(value, (jax.Array, np.ndarray)):
            return self._describe_array(value)
        if isinstance(value, partial):
            return f"partial({self._list([value.func, value.args, value.keywords])})"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            held = {x.name: vars(value)[x.name] for x in dataclasses.fields(value) if x.name in vars(value)}
            return self._call(type(value).__qualname__, {k: x for k, x in held.items() if not _is_default(value, k, x)})
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{self.describe(key)}: {self.describe(x)}" for key, x in value.items()) + "}"
        if isinstance(value, (list, tuple, set, frozenset)):
            return self._describe_list(value)
        if isinstance(value, type):
            return f"{value.__module__}.{value.__qualname__}"
        if callable(value):
            function = inspect.unwrap(value)
            if isinstance(function, types.MethodType):
                return f"{self.describe(function.__func__)} of {self.describe(function.__self__)}"
            if isinstance(function, types.FunctionType):
                return self._describe_function(function)
            if isinstance(function, (types.BuiltinFunctionType, np.ufunc)):
                return function.__name__
        try:
            return self._call(type(value).__qualname__, vars(value))
        except TypeError:  # it has no attributes of its own
            return type(value).__qualname__

    def _list(self, values: Any) -> str:
        return ", ".join(map(self.describe, values))

    def _call(self, name: str, held: Mapping[str, Any]) -> str:
        return f"{name}({', '.join(f'{key}={self.describe(x)}' for key, x in held.items())})"

    def _describe_list(self, value: Any) -> str:
        name = "" if type(value) in (list, tuple) else type(value).__qualname__
        if isinstance(value, (set, frozenset)):
            return f"{name}({', '.join(sorted(map(self.describe, value)))})"
        if len(value) > MOST and all(isinstance(x, (int, float, str, bytes)) for x in value):
            return f"{name}({len(value)} values:{_hash(repr(list(value)))})"
        return f"{name}({self._list(value)})"

    def _describe_array(self, value: Any) -> str:
        kind = f"{value.dtype}{list(np.shape(value))}"
        if isinstance(value, Tracer):
            return kind
        if isinstance(value, jax.Array) and (value.is_deleted() or not value.is_fully_addressable):
            return kind
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        value = np.asarray(value)
        if value.dtype == object:
            return f"{kind}:{_hash(self._list(value.ravel().tolist()))}"
        if value.ndim == 0 and value.dtype.kind in "iuf":
            return _describe_number(value[()])
        return f"{kind}:{hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:12]}"

    def _describe_function(self, function: types.FunctionType) -> str:
        code, held = function.__code__, {}
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                held[name] = self.describe(cell.cell_contents)
            except ValueError:  # a cell that has no value yet
                held[name] = "unset"
        positional = code.co_varnames[: code.co_argcount]
        defaults = dict(zip(reversed(positional), reversed(function.__defaults__ or ()), strict=False))
        defaults |= function.__kwdefaults__ or {}
        held |= {name: self.describe(default) for name, default in defaults.items() if default is not None}
        if str(function.__module__).partition(".")[0] not in KNOWN:
            found = set(_list_code(code))
            numbers = {name: x for name in found if isinstance(x := function.__globals__.get(name), (int, float))}
            held |= {name: self.describe(x) for name, x in sorted(numbers.items())}
            held["code"] = " ".join(sorted(found))
            self.has_code = True
            for each in _walk_code(code):
                self.code.update(each.co_code)
        name = function.__qualname__.replace(".<locals>", "")
        return f"{name}({', '.join(f'{key}={x}' for key, x in held.items())})"


def _is_default(value: Any, name: str, held: Any) -> bool:
    """Tells whether a field has its default value: a new field of a later version changes no text."""
    default = type(value).__dataclass_fields__[name].default
    return isinstance(held, type(default)) and describe(held) == describe(default)


def _describe_number(value: Any) -> str:
    """Returns a text, which is the same for 100, 100.0 and NumPy's numbers of this value."""
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    number = float(value)
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)


def _walk_code(code: types.CodeType) -> Iterator[types.CodeType]:
    """Gives the code of a function, and of the functions that are defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _walk_code(constant)


def _list_code(code: types.CodeType) -> Iterator[str]:
    """Gives the numbers and names in code.

    As a set, these are the same where Python puts a comprehension into a function of its own and where it does not.
    """
    for each in _walk_code(code):
        yield from each.co_names
        for constant in each.co_consts:
            for x in constant if isinstance(constant, tuple) else (constant,):
                if isinstance(x, (int, float, complex)) and not isinstance(x, bool):
                    yield repr(x)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}...{_hash(text)}"


def find_changes(kept: Mapping[str, str], now: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Returns the texts that differ, by name, cut around the first difference. A name that only one has is left out."""
    both = {name: (kept[name], now[name]) for name in kept if name in now}
    return {name: _show(*texts) for name, texts in both.items() if texts[0] != texts[1]}


def _show(one: str, other: str) -> tuple[str, str]:
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, same - BEFORE)

    def cut(text: str) -> str:
        part = text[start : start + SHOWN]
        return ("..." if start else "") + part + ("..." if start + SHOWN < len(text) else "")

    return cut(one), cut(other)
