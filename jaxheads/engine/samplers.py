"""Random labels and logits for a head, drawn from its declarations."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxheads.contract import AbstractHead
from jaxheads.engine.gathering import event_of
from jaxheads.numerics import labels as rules
from jaxheads.numerics.labels import LabelSpec

ANY = 3  # the size drawn for an axis of any size


def sample_labels(head: AbstractHead, rng: np.random.Generator, lead: tuple[int, ...]) -> Any:
    """Draws legal labels `lead + [size]` of a head; a dict by name for heads inside; None for a head without labels."""
    if inside := head.parts():
        found = {name: sample_labels(inner, rng, lead) for name, inner in inside.items()}
        return found.get("", found)
    specs = head.label_spec
    return rules.per_label(specs, lambda spec, _: _draw(spec, rng, lead)) if specs else None


def _draw(spec: LabelSpec, rng: np.random.Generator, lead: tuple[int, ...]) -> np.ndarray:
    shape = (*lead, *(n or ANY for n in spec.event))
    low = spec.low if spec.low is not None else spec.fill if spec.high is None else spec.high - 3
    high = spec.high if spec.high is not None else low + 3
    if spec.total is not None:
        drawn = rng.uniform(0.1, 1, shape)
        return (spec.total * drawn / drawn.sum(-1, keepdims=True)).astype(np.float32)
    if spec.kind == "float":
        return rng.uniform(low, high, shape).astype(np.float32)
    if spec.kind == "int":
        return rng.integers(int(low), int(high) + 1, shape).astype(np.int32)
    return rng.random(shape) < 0.5


def sample_logits(head: AbstractHead, rng: np.random.Generator, lead: tuple[int, ...], scale: float = 2.0) -> Any:
    """Draws normally distributed logits `lead + [d]` of a head; a dict where the head takes a dict."""
    if inside := head.parts():
        if "" in inside:
            return sample_logits(inside[""], rng, lead, scale)
        return {name: sample_logits(inner, rng, lead, scale) for name, inner in inside.items()}
    return _draw_normal(head.logits_spec, rng, lead, scale)


def _draw_normal(spec: Any, rng: np.random.Generator, lead: tuple[int, ...], scale: float) -> Any:
    if isinstance(spec, Mapping):
        return {key: _draw_normal(inner, rng, lead, scale) for key, inner in spec.items()}
    return (scale * rng.standard_normal((*lead, *(n or ANY for n in event_of(spec))))).astype(np.float32)
