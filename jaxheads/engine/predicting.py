"""The results of a head without labels: predictions and export outputs. Also the best constant logits."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.contract import AbstractHead
from jaxheads.engine import trees
from jaxheads.engine.elements import as_mapping, clean, dense_logits
from jaxheads.engine.gathering import leading_shape
from jaxheads.numerics import brief, columns, hooks
from jaxheads.numerics.batch import Batch, Given, Rows


def predict(head: Any, given: Given) -> dict[str, Any]:
    """Returns predictions by key, only those that are asked for; for several heads, a dict by head."""
    if head.parts():
        return trees.unnested(trees.each(head, predict, head.route(given)))
    logits = dense_logits(head, given.logits)
    lead = leading_shape(head.logits_spec, logits)
    found = columns.numeric_columns(given.features) if head.reads_features and given.features is not None else None
    ones = jnp.ones((*lead, 1), jnp.float32)
    rows = Rows(ones > 0, ones, columns=found, key=given.key)
    outputs: dict[str, Any] = dict(as_mapping(head, "outputs", hooks.call(head, "outputs", logits, rows=rows)))
    asked = _list_asked(given.keys, outputs)
    for key in asked:
        if key not in outputs:
            raise ValueError(f"Unknown prediction key {key!r}. Valid prediction keys include {list(outputs)}.")
    return {key: value() if callable(value) else value for key, value in outputs.items() if key in asked}


def _list_asked(keys: Any, outputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns the keys that are asked for: all by default, and where the list is empty."""
    if keys is None:
        return tuple(outputs)
    if (names := brief.as_names(keys)) is None:
        raise ValueError(f"keys must be prediction keys, of {list(outputs)}; None for all. Given {brief.tell(keys)}.")
    return names or tuple(outputs)


def constants(head: Any, batch: Batch) -> np.ndarray:
    """Returns the best constant logits, float64, of a batch that was gathered without logits."""
    if batch.parts is not None:
        return np.concatenate(list(trees.each(head, constants, trees.parts_of(head, batch)).values()))
    elements = clean(head, batch)
    scale = 1.0 if elements.rows.scale is None else np.asarray(elements.rows.scale, np.float64)
    weights = np.asarray(elements.counted, np.float64) * scale
    weights = weights.reshape(-1, weights.shape[-1])
    seen = np.asarray(weights.any(-1))
    if not seen.any():
        raise ValueError(
            f"constant_logits needs elements that weigh something. Given {seen.size} for {type(head).__name__}, of "
            "which none does: they are masked, or their weight is zero."
        )
    labels = jax.tree.map(lambda x: np.asarray(x, np.float64).reshape(seen.size, -1)[seen], elements.labels)
    found = np.asarray(head.best_constant(labels, weights[seen]), np.float64)
    if found.shape != (head.logits_dimension,):
        raise ValueError(
            f"{type(head).__name__}.best_constant must return shape {(head.logits_dimension,)}. Given {found.shape}."
        )
    return found


def decoded(head: AbstractHead, predictions: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns predictions as NumPy arrays, with the names of classes."""
    if not isinstance(predictions, Mapping):
        raise ValueError(f"predictions must be a dict, as head.predictions gives it. Given {brief.tell(predictions)}.")
    out = {key: np.asarray(value) for key, value in predictions.items()}
    if flat := [key for key, value in out.items() if not value.ndim]:
        raise ValueError(f"predictions must have a leading axis of examples. Given {flat} without: add one, x[None].")
    names = head.class_names()
    if names is None or not out:
        return out
    if "class_ids" in out:
        ids = out["class_ids"]
        if (bad := (ids < 0) | (ids >= len(names))).any():
            raise ValueError(
                f"class_ids must lie in 0 ... {len(names) - 1}. Given {ids[bad][0]}, {int(bad.sum())} illegal in all. "
                "Are these the predictions of another head, or padding?"
            )
        out["classes"] = np.asarray(names, object)[ids]
    rows = next(iter(out.values())).shape[0]
    out["all_classes"] = np.tile(np.asarray(names, object), (rows, 1))
    return out
