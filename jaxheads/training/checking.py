"""A look at batches on the host, before a compiled step: what it cannot take, and labels that are illegal."""

import functools
import inspect
import numbers
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jaxheads.engine.gathering import gather
from jaxheads.head import Head
from jaxheads.numerics import inputs
from jaxheads.numerics.batch import Given
from jaxheads.numerics.missing import is_frame

KEYS = ("features", "labels", "weights", "where")
HEAD, OPTIMIZER = "jaxheads_head", "jaxheads_optimizer"


@runtime_checkable
class Indexed(Protocol):
    """What Python can go through without `__iter__`, such as a dataset with items by number."""

    def __getitem__(self, index: int, /) -> Any: ...


def attach_head(step: Any, head: Head, optimizer: Any = None) -> Any:
    """Notes the head and the optimizer of a step, so that a loop can look at batches and know the run by them."""
    vars(step).update({HEAD: head, OPTIMIZER: optimizer})
    return step


def head_of(step: Any) -> Head | None:
    """Returns the head of a step, also if it is compiled, mapped or partial; None for a function of another origin."""
    return _find_noted(step, HEAD)


def optimizer_of(step: Any) -> Any:
    """Returns the optimizer of a step, likewise."""
    return _find_noted(step, OPTIMIZER)


def _find_noted(step: Any, name: str) -> Any:
    inner = inspect.unwrap(step)
    if isinstance(inner, functools.partial):
        return _find_noted(inner.func, name)
    return vars(inner).get(name) if inspect.isfunction(inner) else None


def check_batches(batches: Any, what: str) -> Any:
    """Returns batches, or refuses a value that is not an iterable of them, such as one batch alone."""
    if isinstance(batches, Mapping) or (is_frame(batches) and hasattr(batches, "columns")):
        given = f"one dict with the keys {[*batches]}" if isinstance(batches, Mapping) else "a data frame"
        raise ValueError(f"{what} must be a list of batches, each a dict. Given {given}. Put it in a list: [batch].")
    # An array of objects holds batches, as NumPy's permutation of a list of them.
    is_one = isinstance(batches, (str, bytes, type, np.generic, jax.Array))
    is_one = is_one or (isinstance(batches, np.ndarray) and (batches.dtype != object or not batches.ndim))
    if is_one or not isinstance(batches, (Iterable, Indexed)):
        given = "a function" if callable(batches) else f"a {type(batches).__name__}"
        raise ValueError(f"{what} must be a list of batches, or another iterable of them. Given {given}.")
    return batches


def check_function_of_epochs(batches: Any) -> None:
    """Refuses a function of batches that does not take the number of an epoch."""
    try:
        signature = inspect.signature(batches)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(0)
    except TypeError as error:
        raise ValueError(
            f"A function as batches is called with the epoch, 0, 1, ... Given one with the arguments {signature}. "
            "Write lambda epoch: ..."
        ) from error


def looked_at(batches: Iterator[Any], step: Any, what: str) -> Iterator[Any]:
    """Gives the batches on, after a look at the first one."""
    for i, batch in enumerate(batches):
        if i == 0:
            check_batch(batch, step, what)
        yield batch


def check_batch(batch: Any, step: Any, what: str) -> None:
    """Refuses a batch that the step of a head would fail on, or whose host arrays hold illegal labels or weights.

    Device arrays are not read, because that would wait for the device.
    """
    if (head := head_of(step)) is None:
        return
    if not isinstance(batch, Mapping):
        raise ValueError(f"{what}: A batch must be a dict with the keys {list(KEYS)}. Given a {type(batch).__name__}.")
    if set(batch) - set(KEYS):
        return  # the step itself says what a batch is
    for key, value in batch.items():
        _check_arrays(value, key, what, is_label=key == "labels", is_features=key == "features")
    try:
        _gather(head, batch, None)
    except ValueError as error:
        try:
            _gather(head, batch, False)
        except ValueError:
            return  # shapes, which the step judges: it knows the logits
        raise ValueError(f"{what}: {error}") from error


def _gather(head: Head, batch: Mapping[str, Any], check: bool | None) -> None:
    """Checks a batch without logits, with its values or only in its shapes."""
    if batch.get("labels") is not None:
        gather(head, Given(**batch, divides=check is None, check=check))


def _check_arrays(value: Any, name: str, what: str, is_label: bool, is_features: bool) -> None:
    """Refuses values that are no arrays of numbers."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_arrays(inner, f"{name}[{key!r}]", what, is_label, is_features)
        return
    # Features may be any pytree.
    leaves = jax.tree.leaves(value) if is_features else [] if value is None else [value]
    for leaf in leaves:
        if isinstance(leaf, jax.Array) or (isinstance(leaf, inputs.JaxArrayLike) and not isinstance(leaf, np.ndarray)):
            continue
        if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind not in "OSUMm":
            continue
        if isinstance(leaf, numbers.Number) and is_features:
            continue
        text = inputs.is_text(np.asarray(leaf, object)) or inputs.is_text(leaf)
        kind = f"a {type(leaf).__name__}" + (" of strings" if text else "")
        if is_label:
            fix = "Encode labels first, on the host: head.encode_labels(labels)."
        elif text:
            fix = "Encode them as numbers, or leave them out of the batch."
        else:
            fix = "Pass an array, np.asarray(x), or let jh.pad_batch(batch, size) make arrays."
        raise ValueError(f"{what}: {name} must be an array of numbers: a step is compiled. Given {kind}. {fix}")
