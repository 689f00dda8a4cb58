"""A batch as users pass it, checked and made safe: the double where, written once.

`gather` runs in Python at every call: it checks shapes, dtypes and the values of host arrays, encodes strings, and
picks what enters compiled code. `clean` runs inside: it replaces masked and illegal inputs before a formula sees
them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxheads.numerics import inputs, masking, vocabulary
from jaxheads.numerics import labels as rules
from jaxheads.numerics.labels import LabelSpec, Specs
from jaxheads.numerics.linear import LinearLogits


class Mask(NamedTuple):
    """Which elements exist, and what the user calls it."""

    value: Any
    what: str = "where"


class Masks(tuple[Mask, ...]):
    """Several masks, all of which must hold: a sequence's and the user's."""


class Elements(NamedTuple):
    """A checked batch: nothing in it can poison a formula.

    Attributes:
        labels: as the label spec says; the fill where masked or illegal.
        logits: float32 `[..., d]`; 0 where masked.
        weights: float32 `[..., 1]` or `[..., d]`; 0 where masked.
        exists: bool `[..., 1]`.
        bad: bool `[..., 1]` or `[..., d]`: unmasked, but with an illegal label or weight.
        features: the columns that the loss reads, nested as given; 1 where masked.
        scale: how often each element counts in the loss, `[..., 1]`; None for once.
    """

    labels: Any
    logits: jax.Array
    weights: jax.Array
    exists: jax.Array
    bad: jax.Array
    features: Mapping[Any, Any]
    scale: jax.Array | None = None

    @property
    def counted(self) -> jax.Array:
        """The weights that metrics count with: bad elements are left out."""
        return jnp.where(self.bad, jnp.zeros_like(self.weights), self.weights)

    def times_scale(self, weights: jax.Array) -> jax.Array:
        """Weights of elements that count as often as they do in the loss."""
        return weights if self.scale is None else weights * self.scale


def check_logits(logits: Any, dimension: int) -> Any:
    """Logits as float32 `[D0, ..., DN, dimension]`, or lazy ones as they are."""
    if isinstance(logits, LinearLogits):
        logits.check()
    else:
        logits = inputs.as_numbers(logits, "logits")
    inputs.check_logits(tuple(logits.shape), dimension)
    return logits


def dense(logits: Any) -> jax.Array:
    """Float32 logits, multiplied out if they were lazy."""
    return logits.multiply() if isinstance(logits, LinearLogits) else jnp.asarray(logits, jnp.float32)


def gather(
    specs: Specs,
    dimension: int,
    labels: Any,
    logits: Any,
    weights: Any,
    where: Any,
    *,
    weights_name: str,
    per_logit_weights: bool,
    label_vocabulary: tuple[str, ...] | None,
    to_array: Callable[[Any], Any],
    check: bool | None,
) -> dict[str, Any]:
    """What enters compiled code: arrays of checked shapes, those from the host in their final dtype."""
    logits = check_logits(logits, dimension)
    lead = tuple(logits.shape)[:-1]
    where = _gather_masks(masks_of(where), lead, check)
    if weights is not None:
        sizes = (1, dimension) if per_logit_weights and dimension > 1 else (1,)
        weights = inputs.as_weights(weights, lead, sizes, weights_name)
    live = _live_on_host(where, weights, check)
    if weights is not None and live is not None:
        _check_weight_values(np.asarray(weights), live, weights_name)

    def take(spec: LabelSpec, label: Any, what: str) -> Any:
        label, strangers = rules.as_encoded(to_array(label))
        array = rules.shaped(spec, inputs.as_array(label, what, names=label_vocabulary is not None), lead, what)

        def known() -> np.ndarray | None:
            # Strings are looked at on the host in any case: then so are concrete masks, to tell which of them exist.
            return _live_on_host(where, weights, True) if live is None and check is None else live

        if check is not False and strangers and (rows := known()) is not None:
            vocabulary.refuse_strangers(strangers, rows, spec.size, label_vocabulary)
        array = rules.settled(spec, rules.typed(array, label, spec), label_vocabulary, live, known, check, what)
        # Names came as int32; an id that is not one of a bool's two stays visible only as an integer.
        return inputs.cast(array, spec.dtype) if isinstance(array, np.ndarray) and spec.kind != "bool" else array

    return {"labels": rules.each_label(specs, labels, take), "logits": logits, "weights": weights, "where": where}


def masks_of(where: Any) -> Masks:
    """One `where`, or several masks that all must hold; none for None."""
    if isinstance(where, Masks):
        return where
    return Masks(() if where is None else (Mask(where),))


def _gather_masks(masks: Masks, lead: tuple[int, ...], check: bool | None) -> tuple[Any, ...]:
    """Masks `lead + [1]`, those of the host as bool and checked in the elements that the others let exist."""
    values = [inputs.as_where(mask.value, lead, mask.what) for mask in masks]
    for i, (mask, value) in enumerate(zip(masks, values, strict=True)):
        if inputs.dtype_kind(value) == "bool" or not inputs.is_readable(value, check):
            continue
        others = [np.asarray(x) for x in values[:i] + values[i + 1 :] if inputs.is_readable(x, check)]
        live = functools.reduce(np.logical_and, (x != 0 for x in others), np.asarray(True))
        if len(others) == len(values) - 1:
            inputs.check_where(np.asarray(value), live, mask.what)
    return tuple(inputs.cast(x, jnp.bool_) if _is_plain(x) else x for x in values)


def _is_plain(mask: Any) -> bool:
    """Whether a mask of the host loses nothing as bool; other values than 0 and 1 stay, for the compiled check."""
    return isinstance(mask, np.ndarray) and (mask.dtype == np.bool_ or bool(np.isin(mask, (0, 1)).all()))


def _live_on_host(where: tuple[Any, ...], weights: Any, check: bool | None) -> np.ndarray | None:
    """In which elements values are checked; None where knowing it would stall a device."""
    live = np.asarray(True)
    for x in (*where, *(() if weights is None else (weights,))):
        if not inputs.is_readable(x, check):
            return None
        live = np.asarray(live & (np.asarray(x) != 0))
    return live


def live_rows(batch: Mapping[str, Any], check: bool | None) -> np.ndarray | None:
    """In which rows `[..., 1]` of a gathered batch values are checked; None where knowing it would stall a device."""
    live = _live_on_host(batch["where"], batch["weights"], check)
    return None if live is None else np.any(live, -1, keepdims=True) if live.ndim else live


def _check_weight_values(weights: np.ndarray, live: np.ndarray, what: str) -> None:
    bad = ~((weights >= 0) & np.isfinite(weights)) & live
    if bad.any():
        position = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{what} must be finite and not negative. Given {weights[position]!s} at index {position}. Use 0 to hide "
            "an element, where=False to leave it out."
        )


def existing(batch: Mapping[str, Any]) -> jax.Array:
    """Which elements exist: bool `[..., 1]`."""
    masks = (jnp.asarray(mask).astype(jnp.bool_) for mask in batch["where"])
    return functools.reduce(jnp.logical_and, masks, _all_true(batch["logits"]))


def clean(specs: Specs, batch: Mapping[str, Any]) -> Elements:
    """The elements of a gathered batch."""
    logits = batch["logits"]
    masks, weights, exists = [jnp.asarray(mask) for mask in batch["where"]], batch["weights"], existing(batch)
    weights = masking.ones_like(exists) if weights is None else jnp.asarray(weights)
    live = exists & (weights != 0)
    row = jnp.any(live, -1, keepdims=True)

    def find_illegal(spec: LabelSpec, labels: Any, _: str) -> jax.Array:
        labels = jnp.asarray(labels)
        mask = live if live.shape[-1] in (1, spec.size) else row
        return jnp.broadcast_to(mask, labels.shape) & spec.illegal(labels, jnp)

    def fill(spec: LabelSpec, labels: Any, illegal: jax.Array, _: str) -> jax.Array:
        labels = jnp.asarray(labels).astype(spec.dtype)
        mask = live if live.shape[-1] in (1, spec.size) else row
        return masking.keep(jnp.broadcast_to(mask, labels.shape) & ~illegal, labels, spec.fill)

    illegal = rules.per_label(specs, find_illegal, batch["labels"])
    labels = rules.per_label(specs, fill, batch["labels"], illegal)
    each = [x if x.shape[-1] == live.shape[-1] else jnp.any(x, -1, keepdims=True) for x in jax.tree.leaves(illegal)]
    bad = functools.reduce(jnp.logical_or, each) & live
    bad = bad | (live & ~((weights > 0) & jnp.isfinite(weights)))
    for mask in masks:
        if mask.dtype != jnp.bool_:
            bad = bad | (live & (mask != 1))
    weights = jnp.where(live, jnp.where(bad, jnp.ones_like(weights), weights), jnp.zeros_like(weights))
    features = jax.tree.map(lambda column: masking.keep_rows(row, jnp.asarray(column), 1), batch.get("features", {}))
    return Elements(labels, _masked_logits(logits, live, row), weights, exists, bad, features, batch.get("scale"))


def _all_true(logits: Any) -> jax.Array:
    """True `[..., 1]`, laid out over a mesh as the logits are; `jnp.ones` would be replicated under `set_mesh`."""
    rows = logits.hidden if isinstance(logits, LinearLogits) else logits
    return jnp.all(masking.true_like(rows), axis=-1, keepdims=True)


def _masked_logits(logits: Any, live: jax.Array, row: jax.Array) -> jax.Array:
    """Float32 logits, 0 where masked.

    Of lazy ones the rows of the hidden layer are masked, and the product again: a NaN gradient of a formula at the fill
    would reach the kernel through the zeros of the hidden layer.
    """
    if isinstance(logits, LinearLogits):
        hidden = jnp.asarray(logits.hidden)
        logits = dataclasses.replace(logits, hidden=masking.keep(row, hidden, 0)).multiply()
    mask = live if live.shape[-1] == logits.shape[-1] else row
    return masking.keep(mask, jnp.asarray(logits, jnp.float32), 0)


def debug_check(elements: Elements, who: str) -> None:
    """A message under `checkify`; nothing at all in a program compiled without it."""
    if isinstance(elements.bad, Tracer):
        from jax.experimental import checkify

        message = "{n} unmasked elements have an illegal label or weight for " + who
        checkify.debug_check(~jnp.any(elements.bad), message, n=jnp.sum(elements.bad.astype(jnp.int32)))
