"""What `fit` calls after an epoch: functions and logs of the user's own, known by their methods."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from jaxheads.numerics import brief

Callback: TypeAlias = Callable[[dict[str, float], Any], Any]
Log: TypeAlias = Callable[[Mapping[str, float], int], Any]


def find_log(writer: Any) -> Log:
    """Returns a function of values and a step that writes to a user's log; one that does nothing if there is none.

    >>> class Run:
    ...     def log(self, data, step=None):
    ...         print(data, step)
    >>> find_log(Run())({"train/loss": 0.5}, 8)
    {'train/loss': 0.5} 8
    """
    if writer is None:
        return lambda values, step: None
    add_scalar = getattr(writer, "add_scalar", None)
    if callable(add_scalar):

        def add_each(values: Mapping[str, float], step: int) -> None:
            for key, value in values.items():
                add_scalar(key, value, step)

        return add_each
    for name in ("log_metrics", "log"):
        method = getattr(writer, name, None)
        # A logger of the standard library has a method log too, for a level and a message.
        if callable(method) and _takes(method, {}, step=0):
            return lambda values, step, method=method: method(dict(values), step=step)
    raise ValueError(
        "writer must have add_scalar(tag, value, step), as tensorboardX.SummaryWriter has; log_metrics(values, "
        f"step=...), as mlflow has; or log(values, step=...), as a run of wandb has. Given {brief.tell(writer)}."
    )


def list_callbacks(given: Callback | Sequence[Callback] | None) -> list[Callback]:
    """Returns the functions for the end of an epoch as a list; refuses everything but functions of two arguments."""
    if given is None:
        return []
    functions = [given] if callable(given) or not isinstance(given, Iterable) else list(given)
    for function in functions:
        if not callable(function) or not _takes(function, {}, None):
            raise ValueError(
                "on_epoch_end must be a function of the epoch's row and the state, function(row, state), or a list of "
                f"such functions. Given {brief.tell(function)}."
            )
    return functions


def call(callbacks: Sequence[Callback], row: Mapping[str, float], state: Any) -> bool:
    """Calls the functions in their order, and tells whether any of them has stopped training."""
    stops = False
    for function in callbacks:
        answer = function(dict(row), state)
        is_array = isinstance(answer, brief.Shaped) and answer.shape == () and answer.dtype == np.bool_
        is_switch = isinstance(answer, bool) or is_array
        if answer is not None and not is_switch:
            raise ValueError(
                "A function on_epoch_end must return True to stop training; None or False to go on. Given "
                f"{brief.tell(answer)} by {brief.tell(function)}."
            )
        stops |= bool(answer)
    return stops


def _takes(function: Any, *args: Any, **named: Any) -> bool:
    """Tells whether a function can be called like this, as far as its signature says."""
    try:
        inspect.signature(function).bind(*args, **named)
    except TypeError:
        return False
    except ValueError:  # no signature
        return True
    return True
