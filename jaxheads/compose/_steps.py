"""Masks of the steps of padded sequences: from a column of features, for the heads inside a sequence wrapper."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxheads.contract import Batch, Given
from jaxheads.engine import gathering
from jaxheads.head import Head
from jaxheads.numerics import brief, inputs
from jaxheads.numerics.batch import Mask, Masks


def read_mask(key: str, features: Any) -> Any:
    """Returns the column of the mask, or of the lengths."""
    if features is None or key not in features:
        found = None if features is None else brief.tell_names(features)
        raise ValueError(
            f"The provided key {key!r} of the mask or the lengths of sequences should be included in the features "
            f"dictionary, but was not found. Found keys: {found}. With sequence_length_mask=None all steps are there "
            "that where= says."
        )
    return inputs.as_array(features[key], f"features[{key!r}]")


def make_mask(column: Any, key: str, lengths: bool, lead: tuple[int, ...], check: bool | None) -> Mask:
    """Returns the mask of the steps that exist, in the leading shape of the logits, from a mask or from lengths."""
    what = f"features[{key!r}]"
    xp, shape = (np if isinstance(column, np.ndarray) else jnp), tuple(column.shape)
    if lengths:
        if shape != lead[:1] or inputs.dtype_kind(column) != "int":
            raise ValueError(f"{what} must be integer lengths of shape {lead[:1]}. Given {column.dtype}{list(shape)}.")
        illegal = (column < 0) | (column > lead[1])
        if inputs.is_readable(column, check) and np.asarray(illegal).any():
            raise ValueError(
                f"{what}: lengths must lie in 0 ... {lead[1]}. Given {np.asarray(column)[np.asarray(illegal)][0]}."
            )
        there = xp.arange(lead[1], dtype=np.int32)[None] < column.astype(np.int32)[:, None]
        # An illegal length that cannot be refused here becomes an illegal mask value, for the compiled check.
        column = xp.where(illegal[:, None], np.int32(2), there.astype(np.int32))
    elif len(shape) != 2 or shape != lead[:2]:
        raise ValueError(
            f"Mask is expected to have two dimensions, those of the logits, {lead[:2]}. Given {what} of shape {shape}."
        )
    return Mask(xp.broadcast_to(xp.expand_dims(column, tuple(range(2, len(lead)))), lead), what)


def scale_steps(batch: Batch) -> Batch:
    """Returns the batch with the share of each step in its sequence as its scale."""
    exists = gathering.existing(batch).astype(jnp.float32)
    steps = jnp.sum(exists, axis=tuple(range(1, exists.ndim)), keepdims=True)
    return batch.replace(scale=exists / jnp.maximum(steps, jnp.ones_like(steps)))


def find_lead(head: Head, given: Given) -> tuple[int, ...]:
    """Returns the leading axes of the inputs of the heads inside."""
    while inside := head.parts():
        routed = head.route(given.replace(where=None, features=None)) if "" not in inside else {"": given}
        name = next(iter(routed))
        head, given = inside[name], routed[name]
    return gathering.lead_of(head, given)


def add_mask(head: Head, where: Any, mask: Mask) -> Any:
    """Adds the mask of the sequences to `where`, which is one for all heads or nested by head."""
    inside = head.parts()
    if not isinstance(where, Mapping):
        return Masks((mask, *Masks.of(where)))
    if "" in inside:
        return add_mask(inside[""], where, mask)
    if unknown := [key for key in where if key not in inside]:
        raise ValueError(f"where given for heads that are not there: {unknown}. The heads are {[*inside]}.")
    return {name: add_mask(inner, where.get(name), mask) for name, inner in inside.items()}
