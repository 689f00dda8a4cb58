"""From a batch to elements, in compiled code: masked and illegal inputs are replaced before a formula sees them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxheads.contract import AbstractHead
from jaxheads.engine import gathering
from jaxheads.losses import terms
from jaxheads.losses.terms import Term
from jaxheads.metrics import Membership, Observation
from jaxheads.metrics.base import KEPT
from jaxheads.numerics import brief, hooks, masking
from jaxheads.numerics import labels as rules
from jaxheads.numerics.batch import Batch, Devices, Elements, Rows
from jaxheads.numerics.labels import LabelSpec
from jaxheads.numerics.linear import LinearLogits

# A logit, or a feature less 1, at which no usual formula is special: not 0, no simple fraction.
GENERIC = 0.3719


class Seen(NamedTuple):
    """The elements of a batch and their losses, for a head without heads inside."""

    elements: Elements
    term: Term


def see(head: AbstractHead, batch: Batch, devices: Devices) -> Seen:
    """Returns the elements and losses of the batch of a head without heads inside."""
    elements = clean(head, batch, devices, copies=bool(jax.tree.leaves(head)) and head.coupling != "sequence")
    return Seen(elements, term_of(_cut_from_nothing(head, elements), elements))


def see_for_metrics(head: AbstractHead, batch: Batch, devices: Devices, inside: bool) -> Seen:
    """Returns the elements, and the losses if a metric reads them: `average_loss`, or the divisor of a head inside."""
    elements = clean(head, batch, devices)
    if inside or type(head).average_losses is AbstractHead.average_losses:
        return Seen(elements, term_of(head, elements))
    return Seen(elements, Term(None))


def _cut_from_nothing(head: AbstractHead, elements: Elements) -> AbstractHead:
    """Returns the head. Its learned values get no gradient from a batch in which no row weighs anything.

    Such a batch has no row to copy into masked rows, and a formula may have an infinite slope at the fill.
    """
    if not jax.tree.leaves(head):
        return head
    # The sum that the loss takes too: devices add up both at once.
    some = masking.total(elements.live) > 0
    return jax.tree.map(lambda x: jnp.where(some, x, jax.lax.stop_gradient(x)), head)


def clean(head: AbstractHead, batch: Batch, devices: Devices = Rows.devices, copies: bool = False) -> Elements:
    """Returns the elements of the batch of a head without heads inside. Formulas never see masked values.

    The gradient of a logit in a masked row is cut off. That of a learned value goes through every row, and 0 times an
    infinite slope is NaN. So for the loss of a head that has learned values, `copies` asks for masked rows that are
    copies of a live one: the formula must have a finite slope there anyway. Where devices may share the batch, the live
    row is one nearby; far from any (a padded end of a batch) they are numbers inside the legal range at which no usual
    formula is special: copies from afar would cost a collective in each step. If a loss looks at other
    rows, the logits of masked rows are 0 all the same: the distance of a row to its copy is 0, where a root has an
    infinite slope. If it looks at the steps of a sequence, the fill may say where it ends: nothing is copied.
    """
    specs, exists = head.label_spec, gathering.existing(batch)
    weights = masking.ones_like(exists) if batch.weights is None else jnp.asarray(batch.weights)
    live = exists & masking.is_not_zero(weights)
    row = live if live.shape[-1] == 1 else jnp.any(live, -1, keepdims=True)

    def mask_of(spec: LabelSpec, labels: jax.Array) -> jax.Array:
        if spec.axes:
            return jnp.broadcast_to(masking.rows_like(row, labels), labels.shape)
        return jnp.broadcast_to(live if live.shape[-1] in (1, labels.shape[-1]) else row, labels.shape)

    def find_illegal(spec: LabelSpec, labels: Any, _: str) -> jax.Array:
        labels = jnp.asarray(labels)
        return mask_of(spec, labels) & spec.illegal(labels, jnp)

    def fill(spec: LabelSpec, labels: Any, illegal: jax.Array, _: str) -> jax.Array:
        labels, mask = jnp.asarray(labels).astype(spec.dtype), mask_of(spec, labels)
        if copies:
            # An illegal label needs no copy: the gradient is NaN anyway. So without masks nothing is looked for.
            labels = masking.copy_first(mask, labels, spec.inside, live.ndim - 1, live.shape[-1] > 1)
            return masking.keep(~spec.illegal(labels, jnp), labels, spec.inside)
        return masking.keep(mask & ~illegal, labels, spec.fill)

    labels, bad = batch.labels, live & ~((weights > 0) & jnp.isfinite(weights))
    if specs:
        illegal = rules.per_label(specs, find_illegal, labels)
        labels = rules.per_label(specs, fill, labels, illegal)
        for found in jax.tree.leaves(illegal):
            if found.ndim > live.ndim:
                found = jnp.any(found, axis=tuple(range(live.ndim, found.ndim)))
            bad = bad | (live & (found if found.shape[-1] == live.shape[-1] else jnp.any(found, -1, keepdims=True)))
    for mask in batch.where:
        if jnp.asarray(mask).dtype != jnp.bool_:
            bad = bad | (live & (jnp.asarray(mask) != 1))
    weights = masking.choose(bad, jnp.ones_like(weights), weights)
    weights = masking.choose(live, weights, jnp.zeros_like(weights))
    logits = None
    if batch.logits is not None:
        logits = _mask_logits(head, batch.logits, live, row, copies and head.coupling in ("row", None))
    elements = Elements(labels, logits, weights, live, bad, Rows(exists, weights))
    return elements._replace(rows=_make_rows(head, batch, elements, row, devices, copies))


def _make_rows(
    head: AbstractHead, batch: Batch, elements: Elements, row: jax.Array, devices: Devices, copies: bool
) -> Rows:
    """Returns what hooks may know about the rows, beside labels and logits."""
    columns = batch.features
    if columns is not None:
        columns = jax.tree.map(
            lambda column: masking.keep_rows(row, jnp.asarray(column), 1 + GENERIC * copies, copies), columns
        )
    rows = Rows(
        exists=elements.rows.exists,
        weights=elements.counted if batch.scale is None else elements.counted * batch.scale,
        columns=columns,
        groups=_find_groups(head, batch, row),
        scale=batch.scale,
        key=batch.key,
        devices=dataclasses.replace(devices, asked_by=type(head).__name__) if head.coupling == "batch" else devices,
    )
    if type(head).prepare is AbstractHead.prepare or elements.logits is None:
        return rows
    return dataclasses.replace(rows, prepared=hooks.call(head, "prepare", elements.labels, elements.logits, rows=rows))


def _find_groups(head: AbstractHead, batch: Batch, row: jax.Array) -> jax.Array | None:
    """Returns the slices of each row: 1 or 0, `[..., n]`; NaN where its slice does not exist; 1 in masked rows."""
    if not head.reads_slices or head.slices is None:
        return None
    groups, stray = Membership.of(jnp.asarray(batch.slices), head.slices.n)
    return masking.keep(row, jnp.where(stray, jnp.nan, groups.indicators), 1)


def _mask_logits(head: AbstractHead, logits: Any, live: jax.Array, row: jax.Array, copies: bool) -> Any:
    """Returns logits as hooks get them: float32, multiplied unless the head takes lazy logits.

    Where masked they are 0, or copies of live ones.

    For lazy logits the rows of the hidden layer are masked, and the product is masked again. Otherwise a formula with a
    NaN gradient at the fill would send NaN through the zeros of the hidden layer to the kernel.
    """
    if isinstance(logits, Mapping):
        return {key: _mask_logits(head, inner, row, row, copies) for key, inner in logits.items()}
    if isinstance(logits, LinearLogits):
        logits = dataclasses.replace(logits, hidden=masking.keep(row, jnp.asarray(logits.hidden), 0))
        if head.takes_linear:
            return logits
        logits = logits.multiply()
    logits = jnp.asarray(logits, jnp.float32)
    plain = logits.ndim == live.ndim
    mask = live if plain and live.shape[-1] == logits.shape[-1] else row
    mask = mask if plain else masking.rows_like(mask, logits)
    if copies:
        return masking.copy_first(mask, logits, GENERIC, live.ndim - 1, live.shape[-1] > 1)
    return masking.keep(mask, logits, 0)


# Calls of hooks, with checks.


def term_of(head: AbstractHead, elements: Elements, hook: str = "losses") -> Term:
    """Returns the checked losses of the elements."""
    losses = hooks.call(head, hook, elements.labels, elements.logits, rows=elements.rows)
    lead = tuple(elements.rows.exists.shape)[:-1]
    return terms.as_term(losses, lead, _list_loss_sizes(elements), f"{type(head).__name__}.{hook}").scaled(
        elements.rows.scale
    )


def _list_loss_sizes(elements: Elements) -> tuple[int, ...]:
    """Returns the sizes that losses may have in the last axis: 1, and that of the logits where elements are rows."""
    logits = elements.logits
    if isinstance(logits, Mapping) or len(logits.shape) != elements.rows.exists.ndim:
        return (1,)
    return (1, logits.shape[-1])


def average_term_of(head: AbstractHead, seen: Seen) -> Term:
    """Returns the losses whose mean is `average_loss`."""
    if type(head).average_losses is AbstractHead.average_losses:
        return seen.term
    return term_of(head, seen.elements, "average_losses")


def as_mapping(head: AbstractHead, hook: str, found: Any) -> Mapping[str, Any]:
    """Returns what a hook gave by key, or refuses another kind of value, such as None."""
    if not isinstance(found, Mapping):
        raise ValueError(f"{type(head).__name__}.{hook} must return a dict by key. Given {brief.tell(found)}.")
    return found


def observations_of(head: AbstractHead, elements: Elements, extra: bool = True) -> dict[str, Observation]:
    """Returns the checked observations of `observe` and (if `extra`) of the metrics from `with_metrics`."""
    labels, logits, rows = elements.labels, elements.logits, elements.rows
    observations = dict(as_mapping(head, "observe", hooks.call(head, "observe", labels, logits, rows=rows)))
    sources: Mapping[str, Callable[[], Observation]] = {}
    added = head.extra_metrics if extra else ()
    if added:
        sources = hooks.call(head, "sources", labels, logits, rows=rows)
    for metric in added:
        for key, observation in hooks.call(metric, "observe", labels, logits, sources, rows=rows).items():
            observations[key] = observations[key].join(observation) if key in observations else observation
    lead = tuple(rows.exists.shape)[:-1]
    for key, observation in observations.items():
        what = f"{type(head).__name__}.observe: {key!r}"
        if not isinstance(observation, Observation):
            raise ValueError(
                f"{what} must be an observation such as jh.Mean(values). Given a {type(observation).__name__}."
            )
        if key in KEPT:
            raise ValueError(f"{what} is kept by every head already. Use another key.")
        observation.check(what, lead)
    return {key: observation for key, observation in observations.items() if observation.told_by not in observations}


def debug_check(head: AbstractHead, bad: jax.Array, stacked: bool = False) -> None:
    """Adds a check with a message for `checkify`; a program compiled without `checkify` gets no code from it.

    If the elements of several heads are stacked, the message is of the first head that has bad elements.
    """
    if isinstance(bad, Tracer):
        from jax.experimental import checkify

        message = "{n} unmasked elements have an illegal label or weight for " + type(head).__name__
        n = jax.lax.reduce_sum(bad.astype(jnp.int32), tuple(range(int(stacked), bad.ndim)))
        if stacked:
            n = n[jnp.argmax(n != 0)]
        checkify.debug_check(jax.lax.eq(n, np.int32(0)), message, n=n)


def dense_logits(head: AbstractHead, logits: Any) -> Any:
    """Returns logits as the hooks of predictions get them: float32, multiplied unless the head takes lazy logits."""
    checked = gathering.check_logits(head.logits_spec, logits)

    def dense(x: Any) -> Any:
        if isinstance(x, LinearLogits):
            return x if head.takes_linear else x.multiply()
        return jnp.asarray(x, jnp.float32)

    return jax.tree.map(dense, checked, is_leaf=lambda x: isinstance(x, LinearLogits))
