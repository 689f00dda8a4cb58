"""Frozen configuration that is a pytree. It makes a head equal by value, hashable, picklable and printable."""

import copy
import dataclasses
from typing import Any, Self, dataclass_transform

import jax
import numpy as np

from jaxheads.numerics import fields
from jaxheads.numerics.fields import learned, running, subheads
from jaxheads.numerics.kept import KEPT, ORIGIN


@dataclass_transform(
    frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field, learned, running, subheads)
)
class Configuration:
    """A base class. Its subclasses become frozen dataclasses and pytrees when they are defined."""

    # Beside the fields, which are in the instance's dict.
    __slots__ = (KEPT, ORIGIN)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        fields.register(cls)

    def validate(self) -> None:
        """Refuses bad configuration. It runs once, at construction, when static fields are frozen already."""

    def __post_init__(self):
        for name, value in fields.values_of(self, fields.STATIC).items():
            object.__setattr__(self, name, fields.freeze(name, value))
        for name, value in fields.values_of(self, fields.HEADS).items():
            object.__setattr__(self, name, _freeze_heads(name, value))
        fields.check_children(self)
        self.validate()

    def _get_identity(self) -> tuple[Any, ...]:
        if jax.tree.leaves(self):
            raise ValueError(
                f"{self!r} is bound to parameters: only unbound heads are compared and hashed. Keep the head and its "
                "parameters apart and pass params=."
            )
        return tuple(fields.values_of(self, fields.STATIC, fields.HEADS).values())

    def __getstate__(self) -> Any:
        """Returns the state for copies and pickles: compiled programs stay behind."""
        state = object.__getstate__(self)
        if isinstance(state, tuple):
            own = {name: value for name, value in state[1].items() if name not in (KEPT, ORIGIN)}
            return (state[0], own) if own else state[0]
        return state

    def make_twin(self) -> Self:
        """Returns an equal head that never holds derived values, and whose heads inside hold none."""
        twin = copy.copy(self)
        for name, value in fields.values_of(self, fields.HEADS).items():
            inside = tuple(head.make_twin() for head in value) if isinstance(value, tuple) else value
            object.__setattr__(twin, name, inside.make_twin() if isinstance(inside, Configuration) else inside)
        object.__setattr__(twin, KEPT, None)
        return twin

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Configuration) or type(self) is not type(other):
            return NotImplemented
        return self._get_identity() == other._get_identity()

    def __hash__(self) -> int:
        return hash((type(self), self._get_identity()))

    def __repr__(self) -> str:
        """Shows the arguments that differ from their defaults: first those of the class itself, then of its bases."""
        base, values, parts = type(self).__mro__[1], fields.values_of(self), []
        inherited = [field.name for field in dataclasses.fields(base)] if dataclasses.is_dataclass(base) else []
        for field in sorted(fields.of_kind(type(self)), key=lambda f: f.name in inherited):
            value = values[field.name]
            if isinstance(value, (jax.Array, np.ndarray)):
                parts.append(f"{field.name}=<{value.dtype}{list(value.shape)}>")
            elif field.init and not _is_default(value, field.default):
                parts.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


def _freeze_heads(name: str, value: Any) -> Any:
    """Returns a head, a tuple of heads, or None. Refuses any other value."""
    value = tuple(value) if isinstance(value, list) else value
    inside = value if isinstance(value, tuple) else () if value is None else (value,)
    for head in inside:
        if not isinstance(head, Configuration):
            raise ValueError(f"{name} holds heads: a head, or a list of heads. Given {head!r}.")
    return value


def _is_default(value: Any, default: Any) -> bool:
    # A bound head cannot be compared, and is no default.
    bound = any(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(value))
    return value is default or (not bound and type(value) is type(default) and value == default)
