"""Frozen dataclasses that are pytrees: static fields are metadata, learned and running ones are data.

The class decorator is applied by `Head.__init_subclass__`, so that writing a head takes no decorator.
"""

import collections
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.numerics import brief
from jaxheads.numerics.kept import ORIGIN, per_head

_KIND = "jaxheads_kind"
STATIC, LEARNED, RUNNING, HEADS = "static", "learned", "running", "heads"


def learned(initializer: Callable[[Any, jax.Array], Any], *, init: Literal[False] = False) -> Any:
    """Makes a field that lives in the parameter tree and is trained like any parameter; None until bound.

    Args:
        initializer: `(head, key) -> array`, the first value; None if this configuration has no such parameter.
        init: tells type checkers that the constructor need not be given this field.
    """
    return _make_field(LEARNED, initializer)


def running(initializer: Callable[[Any], Any], *, init: Literal[False] = False) -> Any:
    """Makes a field that is carried beside batch statistics: no gradient, no weight decay; None until bound.

    Args:
        initializer: `(head) -> array`, the first value; None if this configuration has no such statistic.
        init: tells type checkers that the constructor need not be given this field.
    """
    return _make_field(RUNNING, initializer)


def subheads(**kwargs: Any) -> Any:
    """Makes a field that holds a head or a tuple of heads: a child of the pytree. Learned fields inside are leaves."""
    return dataclasses.field(metadata={_KIND: (HEADS, None)}, **kwargs)


def _make_field(kind: str, initializer: Callable[..., Any]) -> Any:
    names = {LEARNED: ("head", "key"), RUNNING: ("head",)}[kind]
    if not callable(initializer):
        raise ValueError(f"{kind}() takes a function that makes the first value. Given {initializer!r}.")
    if (given := _list_arguments(initializer, len(names))) is not None:
        raise ValueError(
            f"{kind}() takes a function of {' and '.join(names)}. Given one with the arguments {given}. Write "
            f"{kind}(lambda {', '.join(names)}: jnp.zeros(3))."
        )
    # The constructor takes it by keyword after all, so that dataclasses.replace of a bound head keeps its parameters.
    return dataclasses.field(default=None, kw_only=True, metadata={_KIND: (kind, initializer)})


def _list_arguments(function: Callable[..., Any], n: int) -> str | None:
    """Returns the arguments of a function that cannot be called with `n` values; None if it can, or if unknown."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*range(n))
    except TypeError:
        return str(signature)
    return None


@functools.lru_cache(maxsize=1024)
def of_kind(cls: type, *kinds: str) -> tuple[dataclasses.Field, ...]:
    """Returns the fields of a head class; only the fields of `kinds`, if any are named."""
    every = dataclasses.fields(cls)
    return tuple(f for f in every if not kinds or f.metadata.get(_KIND, (STATIC, None))[0] in kinds)


def names_along(path: Any) -> list[str]:
    """Returns the names along a path in a pytree. A key with slashes, as haiku's, is several names."""
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def values_of(node: Any, *kinds: str) -> dict[str, Any]:
    """Returns the values of a dataclass's fields by name; only of the fields of `kinds`, if any are named."""
    return {field.name: getattr(node, field.name) for field in of_kind(type(node), *kinds)}


def initializer(field: dataclasses.Field) -> Callable[..., Any]:
    """Returns the function that makes the first value of a learned or running field."""
    return field.metadata[_KIND][1]


def freeze(name: str, value: Any) -> Any:
    """Returns a static value made hashable, or refuses it with the name of the field."""
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
            f"{name} is a static field and must be hashable. Given a {type(value).__name__}: {brief.tell(value)}. Pass "
            "a list or a tuple."
        ) from error
    return value


class Frozen(dataclasses.FrozenInstanceError, ValueError):
    """The error of an assignment to a field of a head."""


def register(cls: type) -> None:
    """Makes a frozen dataclass of `cls` and registers it as a pytree."""

    def refuse(self: Any, name: str, value: Any = None) -> None:
        raise Frozen(
            f"A {cls.__name__} is frozen. Given a new value for {name!r}. To change a field, make a copy: "
            f"dataclasses.replace(head, {name}=...). In a class, compute it in a property instead."
        )

    if "__init__" in vars(cls):
        raise ValueError(
            f"{cls.__name__} must not have its own __init__: a head is frozen, and its constructor is made from its "
            "fields. Given one. Declare the arguments as fields, such as `margin: float = 1.0` in the class; check "
            "them in `def validate(self)`; compute other values in a property, or in a function that builds the head."
        )
    made: Any = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    made.__setattr__ = made.__delattr__ = refuse
    data = tuple(f.name for f in of_kind(cls, LEARNED, RUNNING, HEADS))
    static = tuple(f.name for f in of_kind(cls, STATIC))

    def flatten(head):
        values = values_of(head)
        return tuple(values[n] for n in data), tuple(values[n] for n in static)

    def flatten_with_keys(head):
        children, aux = flatten(head)
        return tuple((jax.tree_util.GetAttrKey(n), c) for n, c in zip(data, children, strict=True)), aux

    def unflatten(aux, children):
        # Not through __init__: leaves may be anything here (tracers, None, sentinels), and no static value is new.
        head = object.__new__(cls)
        for name, value in zip((*static, *data), (*aux, *children), strict=True):
            object.__setattr__(head, name, value)
        return head

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


def children(node: Any) -> dict[str, Any]:
    """Returns the heads inside a head, by the name under which their parameters nest."""
    found: dict[str, Any] = {}
    for name, value in values_of(node, HEADS).items():
        if isinstance(value, tuple):
            found.update(_name_heads(value))
        elif value is not None:
            found[name] = value
    return found


def _name_heads(heads: tuple[Any, ...]) -> list[tuple[str, Any]]:
    """Returns the heads of a tuple with their names; a head without a name has its number."""
    return [(head.name or str(i), head) for i, head in enumerate(heads)]


def check_children(node: Any) -> None:
    """Refuses heads in tuples whose parameters would share a name, with each other or with a field."""
    fields = {field.name for field in dataclasses.fields(node)}
    held = [value for value in values_of(node, HEADS).values() if isinstance(value, tuple)]
    names = collections.Counter(name for heads in held for name, _ in _name_heads(heads))
    if clashing := sorted(name for name, n in names.items() if name in fields or n > 1):
        raise ValueError(
            f"{type(node).__name__} holds heads whose names clash, with each other or with a field: {clashing}. Their "
            "parameters nest under their names (a number where there is none): give each a name of its own."
        )


def with_values(node: Any, changes: Mapping[str, Any]) -> Any:
    """Replaces values as `dataclasses.replace` does, but without `__init__`, and by name also in tuples of heads."""
    heads = values_of(node, HEADS)
    copy = object.__new__(type(node))
    for name, old in values_of(node).items():
        value = changes.get(name, old)
        if name in heads and isinstance(value, tuple):
            value = tuple(changes.get(inner, child) for inner, child in _name_heads(value))
        object.__setattr__(copy, name, value)
    return copy


def init(node: Any, key: jax.Array) -> dict[str, Any]:
    """Returns the first values of the learned fields, nested by the names of the heads inside."""
    check_key(key)
    learned_fields = of_kind(type(node), LEARNED)
    made = {f.name: initializer(f)(node, jax.random.fold_in(key, i)) for i, f in enumerate(learned_fields)}
    values = _as_arrays(node, made)
    for i, (name, child) in enumerate(children(node).items(), start=len(learned_fields)):
        if inner := init(child, jax.random.fold_in(key, i)):
            values[name] = inner
    return values


def check_key(key: Any) -> None:
    """Refuses a value that is no random key, such as a seed."""
    if not isinstance(key, (jax.Array, np.ndarray)) or not (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or (key.dtype == np.uint32 and key.ndim)
    ):
        raise ValueError(f"key must be a random key, such as jax.random.key(0). Given {brief.tell(key)}.")


def _as_arrays(node: Any, made: Mapping[str, Any]) -> dict[str, Any]:
    """Returns first values as arrays without JAX's weak type: the first update would drop it, and compile again."""
    values = {}
    for name, value in made.items():
        if value is None:
            continue
        try:
            array = jnp.asarray(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{type(node).__name__}.{name} must start as an array, or as None for no value. Given a "
                f"{type(value).__name__}. A field with a tree of arrays is not possible: declare one field for each."
            ) from error
        values[name] = jax.lax.convert_element_type(array, array.dtype)
    return values


def init_state(node: Any) -> dict[str, Any]:
    """Returns the first values of the running fields, nested likewise."""
    values = _as_arrays(node, {f.name: initializer(f)(node) for f in of_kind(type(node), RUNNING)})
    for name, child in children(node).items():
        if inner := init_state(child):
            values[name] = inner
    return values


@per_head
def abstract(node: Any) -> dict[str, Any]:
    """Returns the shapes and dtypes of all learned and running fields of an unbound head."""
    if not _may_learn(node):
        return {}
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = merge(
        jax.eval_shape(functools.partial(init, node), key), jax.eval_shape(functools.partial(init_state, node))
    )
    # The answer is kept, so it must be the same in 64-bit mode.
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, _narrow(x.dtype)), shapes)


def _narrow(dtype: Any) -> Any:
    """Returns float32 for floats, as the logits are, and 32 bits for integers of 64 bits."""
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.float32
    return {"int64": jnp.int32, "uint64": jnp.uint32}.get(str(dtype), dtype)


def merge(params: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Merges learned and running values in one tree; dicts under the same name are merged too."""
    both = {**params, **state}
    for name in set(params) & set(state):
        if not (isinstance(params[name], Mapping) and isinstance(state[name], Mapping)):
            raise ValueError(
                f"{name!r} is given twice, in the parameters and in the state. params holds what head.init(key) made, "
                "state what head.init_state() made."
            )
        both[name] = merge(params[name], state[name])
    return both


def bind(node: Any, params: Mapping[str, Any]) -> Any:
    """Returns the same head with learned and running fields filled in."""
    if not isinstance(params, Mapping):
        raise ValueError(f"params must be a dict as head.init(key) makes it. Given {type(params).__name__}.")
    shapes = abstract(unbound(node))
    unknown = sorted(set(params) - set(shapes))
    if unknown:
        raise ValueError(
            f"{type(node).__name__} has no learned or running field {unknown}. Given {sorted(params)}, expected "
            f"{sorted(shapes) or 'none: this head learns nothing'}."
        )
    inside, held = children(node), {field.name for field in of_kind(type(node), RUNNING)}
    changes: dict[str, Any] = {}
    for name, value in params.items():
        if name in inside:
            changes[name] = bind(inside[name], value)
            continue
        if jnp.shape(value) != shapes[name].shape:
            raise ValueError(
                f"{type(node).__name__}.{name} must have shape {shapes[name].shape}, as head.init(key) makes it. Given "
                f"{jnp.shape(value)}."
            )
        # A head trains the same in a bfloat16 parameter tree.
        value = jnp.asarray(value, shapes[name].dtype)
        changes[name] = jax.lax.stop_gradient(value) if name in held else value
    made = with_values(node, changes)
    # So a bound head keeps the programs of the unbound one alive.
    object.__setattr__(made, ORIGIN, unbound(node))
    return made


def unbound(node: Any) -> Any:
    """Returns the same head with learned and running fields emptied."""
    if not jax.tree.leaves(node):
        return node
    try:
        return node._origin
    except AttributeError:
        pass
    changes: dict[str, Any] = {field.name: None for field in of_kind(type(node), LEARNED, RUNNING)}
    return with_values(node, {**changes, **{name: unbound(child) for name, child in children(node).items()}})


def missing(node: Any, shapes: Mapping[str, Any] | None = None) -> list[str]:
    """Returns the names of the learned and running fields that have no value."""
    if shapes is None:
        if not _may_learn(node):
            return []
        shapes = abstract(unbound(node))
    values = values_of(node, LEARNED, RUNNING)
    own = [name for name, value in values.items() if name in shapes and value is None]
    inside = {name: child for name, child in children(node).items() if name in shapes}
    return own + [f"{name}.{inner}" for name, child in inside.items() for inner in missing(child, shapes[name])]


def _may_learn(node: Any) -> bool:
    """Tells whether there are learned or running fields at all: without any, nothing needs to be evaluated."""
    return bool(of_kind(type(node), LEARNED, RUNNING)) or any(map(_may_learn, children(node).values()))


def state_of(node: Any) -> dict[str, Any]:
    """Returns the values of the running fields of a bound head, nested as `init_state` nests them."""
    values = {name: value for name, value in values_of(node, RUNNING).items() if value is not None}
    for name, child in children(node).items():
        if inner := state_of(child):
            values[name] = inner
    return values


def has_state(node: Any) -> bool:
    """Tells whether the node or a head inside it has running fields."""
    return bool(_trace_state(unbound(node)))


@per_head
def _trace_state(node: Any) -> dict[str, Any]:
    """Returns the shapes and dtypes of the result of `init_state` for an unbound head."""
    return jax.eval_shape(functools.partial(init_state, node))


def carry(node: Any, state: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the new state. A field that it lacks stays as it was; a head inside must be in it."""
    inside = children(node)
    kept = {name: value for name, value in state.items() if name not in inside}
    both = {k: carry(inside[k], state[k], v) if k in inside and k in state else v for k, v in new.items()}
    return {**kept, **both}


def check_state(node: Any, state: Mapping[str, Any], what: str, fix: str) -> None:
    """Refuses a running state of other keys, shapes or dtypes than `init_state` makes."""
    expected = _trace_state(unbound(node))

    def kinds(tree: Any) -> dict[str, str]:
        leaves = jax.tree.leaves_with_path(tree)
        return {
            jax.tree_util.keystr(path): f"{jnp.dtype(_narrow(jnp.result_type(x)))}{list(jnp.shape(x))}"
            for path, x in leaves
        }

    if (given := kinds(dict(state))) != (wanted := kinds(expected)):
        raise ValueError(
            f"{what} must give the running state of {type(node).__name__}, {fix}. Given {given}, expected {wanted}."
        )
