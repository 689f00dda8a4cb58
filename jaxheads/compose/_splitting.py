"""What is given by head: a dict by the names of heads, or one array of logits that is cut in their order."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.contract import LinearLogits
from jaxheads.engine import trees
from jaxheads.numerics import brief, inputs


def split_logits(sizes: Mapping[str, int], logits: Any, asked: Sequence[str]) -> dict[str, Any]:
    """Returns the logits of the heads that are asked for, from a dict or one array; `sizes` are those of all heads."""
    if isinstance(logits, Mapping):
        return select(logits, "logits", asked)
    if isinstance(logits, LinearLogits):
        logits.check()
    else:
        logits = inputs.as_numbers(logits, "logits")
    shape, whole = tuple(logits.shape), sum(sizes.values())
    if len(shape) < 2 or shape[-1] != whole:
        raise ValueError(
            f"Could not split logits of shape {shape} among the heads with individual logits dimensions: "
            f"{[*sizes.values()]}. The last dimension of the logits tensor should equal {whole} but is "
            f"{shape[-1] if shape else None}, and the rank must be at least 2. A dict by head is taken too."
        )
    if isinstance(logits, jax.Array) and len(asked) == len(sizes) >= trees.LEAST:
        return dict(zip(sizes, _split_columns(logits, [*sizes.values()]), strict=True))
    ends = dict(zip(sizes, itertools.accumulate(sizes.values()), strict=True))
    columns = {name: (ends[name] - sizes[name], ends[name]) for name in asked}
    if isinstance(logits, LinearLogits):
        return {name: logits.columns(start, end) for name, (start, end) in columns.items()}
    return {name: logits[..., start:end] for name, (start, end) in columns.items()}


def _split_columns(logits: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """Returns stretches of the last axis.

    The gradient of many slices would be a sum of as many arrays. Stretches of equal size next to each other become the
    first axis before they are cut: if they are stacked again, XLA makes one transposition of it all.
    """
    runs = [(size, len([*run])) for size, run in itertools.groupby(sizes)]
    found, lead = [], logits.shape[:-1]
    pieces = jax.lax.split(logits, [size * n for size, n in runs], logits.ndim - 1)
    for piece, (size, n) in zip(pieces, runs, strict=True):
        rows = jnp.moveaxis(piece.reshape(*lead, n, size), -2, 0)
        found += [jax.lax.squeeze(x, (0,)) for x in jax.lax.split(rows, [1] * n, 0)]
    return found


def select(value: Any, what: str, asked: Sequence[str]) -> dict[str, Any]:
    """Returns the values of the heads that are asked for, from a dict by head."""
    if not isinstance(value, Mapping):
        raise ValueError(
            f"You must provide {what}: {what} must be a dict by head, {[*asked]}. Given: {brief.tell(value)}."
        )
    if missing := [name for name in asked if name not in value]:
        raise ValueError(f"{what} has missing values for head(s): {missing}. Given {brief.tell_names(value)}.")
    return {name: value[name] for name in asked}
