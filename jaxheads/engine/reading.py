"""The layout of a head's state, and how metrics are read from it."""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.contract import AVERAGE_LOSS, AbstractHead
from jaxheads.engine import gathering, trees
from jaxheads.engine.elements import observations_of
from jaxheads.metrics import Count, Grouped, Mean, Observation
from jaxheads.metrics.base import COUNT, DIVISOR, LOSS, RESERVED, Path, is_part_of, join_names
from jaxheads.metrics.mean import Total
from jaxheads.metrics.reading import slots
from jaxheads.metrics.state import read_nothing
from jaxheads.numerics import fields, hooks
from jaxheads.numerics import labels as rules
from jaxheads.numerics.batch import Elements, Rows
from jaxheads.numerics.kept import per_head
from jaxheads.numerics.labels import LabelSpec


def layout(head: Any, inside: bool = False) -> dict[Path, Observation]:
    """Returns the observations in a state, in its order, by path: the names of the heads around one, then its key."""
    if not (inner := head.parts()):
        return _layout_of_leaf(head, inside)
    found: dict[Path, Observation] = {}
    for name, part in inner.items():
        below = layout(part, inside or bool(name))
        found |= {(name, *path) if name else path: observation for path, observation in below.items()}
    return found


def _layout_of_leaf(head: Any, inside: bool) -> dict[Path, Observation]:
    found = dict(_list_observations(fields.unbound(head), True))
    if head.slices is not None:
        found[COUNT] = Count(jax.ShapeDtypeStruct((1, 1), jnp.float32))
    if inside:
        found[DIVISOR] = Total()
    return {(key,): _add_groups(head, observation) for key, observation in found.items()}


def _add_groups(head: Any, observation: Observation) -> Observation:
    """Returns the observation kept once for each group and replica, if the head has groups or replicas."""
    if head.slices is None and head.bootstrap is None:
        return observation
    replicas, groups = head.bootstrap.replicas if head.bootstrap else 0, head.slices.n if head.slices else 0
    return Grouped(observation, replicas, groups)


@per_head
def _list_observations(head: Any, extra: bool) -> tuple[tuple[str, Observation], ...]:
    # Heads that differ in name alone are traced once.
    return _trace_observations(trees.nameless(head), extra)


@per_head
def _trace_observations(head: Any, extra: bool) -> tuple[tuple[str, Observation], ...]:
    """Returns the observations of a head without heads inside, as shapes: hooks run abstractly, without data.

    Without `extra`, only the head's own observations: those kept for `with_metrics` are read by its metrics alone.
    """

    def label(spec: LabelSpec, _: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *(n or 1 for n in spec.event)), spec.dtype)

    def of_logits(spec: Any) -> Any:
        if isinstance(spec, Mapping):
            return {key: of_logits(inner) for key, inner in spec.items()}
        return jax.ShapeDtypeStruct((1, *(n or 1 for n in gathering.event_of(spec))), jnp.float32)

    labels = rules.per_label(head.label_spec, label) if head.label_spec else None
    keys: list[str] = []

    def observe(params: Any, labels: Any, logits: Any) -> Any:
        bound, ones = fields.bind(head, params), jnp.ones((1, 1), jnp.float32)
        groups = jnp.zeros((1, head.slices.n), jnp.float32) if head.slices is not None else None
        columns = _NoColumns() if head.reads_features else None
        rows = Rows(ones > 0, ones, columns, groups, key=jax.random.key(0) if head.samples else None)
        if type(head).prepare is not AbstractHead.prepare:
            rows = dataclasses.replace(rows, prepared=hooks.call(bound, "prepare", labels, logits, rows=rows))
        elements = Elements(labels, logits, ones, ones > 0, ones > 1, rows)
        found = {AVERAGE_LOSS: Mean(ones), **observations_of(bound, elements, extra)}
        keys[:] = found  # a pytree would sort them
        return tuple(found.values())

    found = jax.eval_shape(observe, fields.abstract(head), labels, of_logits(head.logits_spec))
    return tuple(zip(keys, found, strict=True))


class _NoColumns(dict):
    """Columns for a layout without data: every key exists."""

    def __missing__(self, key: Any) -> jax.Array:
        return jnp.ones((1,), jnp.float32)


def read(head: Any, seen: Mapping[Path, Any]) -> dict[tuple[str, str | None], Any]:
    """Returns all metrics from views of the observations, by key and the name that is appended to it."""
    if not (inner := head.parts()):
        return _read_leaf(head, {path[0]: view for path, view in seen.items()})
    views = _select_below(inner, seen)
    out: dict[tuple[str, str | None], Any] = {
        (LOSS, name): read_loss(part, views[name]) for name, part in inner.items() if name
    }
    for name, part in inner.items():
        out |= read(part, views[name])
    return out


@per_head
def directions(head: Any) -> dict[str, bool | None]:
    """Tells, by a metric's full name, whether a higher value is better; None where neither is better, or unknown."""
    found = read_nothing(head, lambda views: _directions(head, views))
    return {join_names(*key): higher for key, higher in found.items()}


def _directions(head: Any, seen: Mapping[Path, Any]) -> dict[tuple[str, str | None], bool | None]:
    if inner := head.parts():
        found: dict[tuple[str, str | None], bool | None] = {(LOSS, name): False for name in inner if name}
        below = _select_below(inner, seen)
        for name, part in inner.items():
            found |= _directions(part, below[name])
        return found
    views = {path[0]: view for path, view in seen.items()}
    each: dict[str, bool | None] = {AVERAGE_LOSS: False}
    # A metric of one class or one threshold has the direction of the whole metric: "auc/sun" that of "auc".
    declared = head.higher_is_better.items()
    for key in head.summarize(_select_own(head, views)):
        each[key] = next((higher for whole, higher in declared if is_part_of(key, whole)), None)
    for metric in head.extra_metrics:
        each |= {key: metric.direction(key) for key in metric.summarize(views)}
    return {(key, head.suffix): higher for key, higher in each.items()}


def _select_own(head: Any, seen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the head's own observations, without those kept for metrics of `with_metrics`."""
    return {key: seen[key] for key, _ in _list_observations(fields.unbound(head), False)}


def _select_below(inner: Mapping[str, Any], seen: Mapping[Path, Any]) -> dict[str, dict[Path, Any]]:
    """Returns the views of each of the heads inside, by name."""
    found: dict[str, dict[Path, Any]] = {name: {} for name in inner}
    for (name, *below), view in seen.items():
        if name in found:
            found[name][(*below,)] = view
    return {**found, "": dict(seen)} if "" in found else found


def _read_leaf(head: Any, seen: Mapping[str, Any]) -> dict[tuple[str, str | None], Any]:
    values = {AVERAGE_LOSS: seen[AVERAGE_LOSS].mean, **head.summarize(_select_own(head, seen))}
    for metric in head.extra_metrics:
        for key, value in metric.summarize(seen).items():
            if key in values or key in RESERVED:
                raise ValueError(
                    f"{metric!r} gives {key!r}, which {type(head).__name__} has already. Leave it out, or give it "
                    "another name."
                )
            values[key] = value
    return {(key, head.suffix): value for key, value in values.items()}


def read_loss(head: Any, seen: Mapping[Path, Any]) -> Any:
    """Returns the loss of all data seen; heads inside without data give 0. Learned weights are not applied."""
    inner = head.parts()
    if not inner:
        views = {path[0]: view for path, view in seen.items()}
        return head.read_loss(views, views[DIVISOR].total)
    view, losses, shares = next(iter(seen.values())), {}, {}
    below, silent = _select_below(inner, seen), head.silent
    for name, part in inner.items():
        there, loss = was_seen(part, below[name]), read_loss(part, below[name])
        # A head that counts for nothing gives 0 even where its loss is NaN.
        losses[name] = view.xp.where(there & (name not in silent), loss, view.xp.zeros_like(loss))
        shares[name] = view.xp.where(there, view.xp.ones_like(loss), view.xp.zeros_like(loss))
    total = head.combine(losses, shares)
    return view.xp.where(was_seen(head, seen), total, view.xp.full_like(total, view.undefined))


def was_seen(head: Any, seen: Mapping[Path, Any]) -> Any:
    """Tells whether any head that counts has seen data."""
    if not (inner := head.parts()):
        return seen[DIVISOR,].total > 0
    below, silent = _select_below(inner, seen), head.silent
    found = (was_seen(part, below[name]) for name, part in inner.items() if name not in silent)
    return functools.reduce(operator.or_, found, False)


def slots_of(head: Any) -> tuple[dict[Path, tuple[int, Observation]], int]:
    """Returns `slots` of a head, bound or not."""
    return slots(fields.unbound(head), False)
