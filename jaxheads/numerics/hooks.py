"""Calls of hooks. A hook gets the values that it asks for by the names of its arguments."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")

# The arguments that a hook may ask for beside labels and logits; the last three are parts of the first.
EXTRA = ("rows", "features", "weights", "psum")

# The hooks that may ask.
HOOKS = ("losses", "average_losses", "prepare", "advance", "outputs", "observe", "sources")


def hook(method: Callable[..., Result]) -> Callable[..., Result]:
    """Marks a hook, so that a type checker accepts overrides with fewer arguments, or with more of `EXTRA`."""
    return method


@functools.lru_cache(maxsize=4096)
def asked(cls: type, hook: str) -> dict[str, str]:
    """Returns the arguments of a class's hook that are among `EXTRA`, and the name in `EXTRA` of each."""
    parameters = inspect.signature(getattr(cls, hook)).parameters
    named: dict[str, str] = {name: name for name in EXTRA if name in parameters}
    others = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    if hook == "advance" and not named and len(others) == 5:
        # `advance(labels, logits, w, total)`: the old form, from before hooks were called by name.
        named = {others[3]: "weights", others[4]: "psum"}
    return named


def takes(cls: type, hook: str, name: str) -> bool:
    """Tells whether the hook of a class asks for an argument."""
    return name in asked(cls, hook)


def call(head: Any, hook: str, *arguments: Any, rows: Any) -> Any:
    """Calls `head.hook(*arguments)`, with the parts of the rows that the hook asks for."""
    extra = {argument: _select_part(rows, name) for argument, name in asked(type(head), hook).items()}
    try:
        return getattr(head, hook)(*arguments, **extra)
    except NameError as error:
        if "unbound axis name" not in str(error):
            raise
        raise ValueError(
            f"{type(head).__name__}.{hook} uses a mapped axis, and there is none in this call ({error}). A head also "
            'works where nothing is mapped. Declare coupling = "batch" in the class, give the hook an argument rows, '
            "and take rows.devices.all(x) in place of all_gather, rows.devices.sum(x) in place of psum. They know the "
            "axis_name of the call."
        ) from error


def _select_part(rows: Any, name: str) -> Any:
    if name == "rows":
        return rows
    return {"features": rows.columns, "weights": rows.weights, "psum": rows.devices.sum}[name]
