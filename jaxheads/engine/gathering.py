"""From the inputs of a call to a batch: checks shapes, dtypes and the values of host arrays, and encodes strings.

It runs in Python at every call, and selects the arrays that enter compiled code.
"""

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.contract import AbstractHead
from jaxheads.engine.trees import naming
from jaxheads.numerics import columns, fields, inputs, masking, meshes, vocabulary
from jaxheads.numerics import labels as rules
from jaxheads.numerics.batch import ABSENT, Batch, Given, Masks
from jaxheads.numerics.labels import LabelSpec
from jaxheads.numerics.linear import LinearLogits
from jaxheads.numerics.reduction import SMALLEST_SUM, Reduction
from jaxheads.numerics.warned import MaskWarning


def gather(head: AbstractHead, given: Given) -> Batch:
    """Returns the checked batch of a head. Without logits, for uses of labels alone, it has the shape of the labels."""
    if not (given.check is None or isinstance(given.check, (bool, np.bool_))):
        raise ValueError(f"check must be True, False or None. Given {given.check!r}.")
    given = _enter_mesh(given)
    if inside := head.parts():
        routed, parts = head.route(given), {}
        if set(routed) != set(inside):
            raise ValueError(
                f"{type(head).__name__}.route must say what each head inside is given, {sorted(inside)}. Given "
                f"{sorted(routed)}."
            )
        if head.weight_column is not None or head.extra_metrics:
            raise ValueError(
                f"A {type(head).__name__} has heads inside, and weights and metrics are theirs: give weight_column and "
                f"with_metrics(...) to those. Given {head!r}."
            )
        for name, part in routed.items():
            with naming(name):
                parts[name] = gather(inside[name], part)
        return Batch(parts=parts)
    weights, weights_name = _weights_of(head, given)
    logits = None if given.logits is ABSENT else check_logits(head.logits_spec, given.logits)
    lead = _lead_of_labels(head, given.labels) if logits is None else leading_shape(head.logits_spec, logits)
    last = _last_size(head, logits)
    entries = (1, last) if last not in (None, 1) else (1,)
    where = _gather_masks(Masks.of(given.where), lead, entries if head.per_logit_where else (1,), given.check)
    if weights is not None:
        weights = inputs.as_weights(weights, lead, entries if head.per_logit_weights else (1,), weights_name)
    live = _live_on_host(where, weights, given.check)
    if weights is not None and live is not None:
        _check_weight_values(np.asarray(weights), live, weights_name)
        if given.divides and head.loss_reduction is Reduction.SUM_OVER_BATCH_SIZE:
            _warn_of_mask(np.asarray(weights), _live_on_host(where, None, given.check), weights_name)
    batch = Batch(
        labels=_gather_labels(head, given, lead, where, weights, live),
        logits=logits,
        weights=weights,
        where=where,
        features=columns.numeric_columns(given.features) if head.reads_features else None,
        normalizer=inputs.as_normalizer(given.normalizer),
        rank=len(lead),
    )
    if head.slices is not None and (given.with_slices or head.reads_slices):
        found = given.features if given.columns is None else given.columns
        batch = batch.replace(slices=head.slices.ids(found, lead, _select_rows(live), given.check))
    if head.samples or (given.with_slices and head.bootstrap is not None):
        batch = batch.replace(key=_key_of(head, given) if logits is not None else jax.random.key(0))
    return batch


def _enter_mesh(given: Given) -> Given:
    """Returns the same inputs. A function that is traced on an Explicit mesh may close over arrays on that mesh.

    `full_like` forgets how such a constant is laid out, but not how an argument of a compiled function is
    (`findings/jax_full_like_of_a_constant_forgets_its_layout.sh`).
    """
    if jax.sharding.get_abstract_mesh().empty:
        return given
    names = ("labels", "logits", "features", "weights", "where")
    return given.replace(**{name: _enter_all(vars(given)[name]) for name in names})


def _enter_all(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {key: _enter_all(inner) for key, inner in x.items()}
    return jax.tree.map(meshes.enter, x) if isinstance(x, LinearLogits) else meshes.enter(x)


def at(head: AbstractHead, batch: Batch, logits: Any) -> Batch:
    """Adds logits to a batch that was gathered without them."""
    if batch.parts is None:
        return batch.replace(logits=check_logits(head.logits_spec, logits))
    inside, routed = head.parts(), head.route(Given(logits=logits))
    return batch.replace(
        parts={name: at(inside[name], part, routed[name].logits) for name, part in batch.parts.items()}
    )


def lead_of(head: AbstractHead, given: Given) -> tuple[int, ...]:
    """Returns the leading axes of the inputs of a head without heads inside: of its logits, else of its labels."""
    if given.logits is ABSENT:
        return _lead_of_labels(head, given.labels)
    return leading_shape(head.logits_spec, check_logits(head.logits_spec, given.logits))


def existing(batch: Batch) -> jax.Array:
    """Returns a mask of the elements (or of their entries) that exist, with the mesh layout of the logits."""
    masks = (jnp.asarray(mask).astype(jnp.bool_) for mask in batch.where)
    return functools.reduce(jnp.logical_and, masks, _all_true(batch))


def _all_true(batch: Batch) -> jax.Array:
    """Returns True `[..., 1]`. It does not use `jnp.ones`, which would be replicated under `set_mesh`."""
    of = batch.labels if batch.logits is None else batch.logits
    first = jax.tree.leaves(of, is_leaf=lambda x: isinstance(x, LinearLogits))[0]
    rows = first.hidden if isinstance(first, LinearLogits) else first
    rank = rows.ndim - 1 if batch.rank is None else batch.rank
    if meshes.is_off_mesh(rows):
        return jax.lax.full((*rows.shape[:rank], 1), True)
    true = masking.true_like(rows)
    if rank < rows.ndim - 1:
        true = jnp.all(true, axis=tuple(range(rank + 1, rows.ndim)))
    return jnp.all(true, axis=-1, keepdims=True)


# Logits.


def event_of(spec: Any) -> tuple[int | None, ...]:
    """Returns the last axes of one element's logits."""
    return tuple(spec) if isinstance(spec, (tuple, list)) else (spec,)


def check_logits(spec: Any, logits: Any, what: str = "logits") -> Any:
    """Returns logits as float32 of the shape in the spec, or lazy logits unchanged; or a dict of either."""
    if isinstance(spec, Mapping):
        if not isinstance(logits, Mapping) or set(logits) != set(spec):
            found = sorted(map(str, logits)) if isinstance(logits, Mapping) else f"a {type(logits).__name__}"
            raise ValueError(f"{what} must be a dict with the keys {sorted(spec)}. Given {found}.")
        checked = {key: check_logits(inner, logits[key], f"{what}[{key!r}]") for key, inner in spec.items()}
        leads = {key: leading_shape(inner, checked[key]) for key, inner in spec.items()}
        if len(set(leads.values())) > 1:
            raise ValueError(f"{what} of a dict must have equal leading axes. Given {leads}.")
        return checked
    if isinstance(logits, LinearLogits):
        logits.check()
    else:
        logits = inputs.as_numbers(logits, what)
    shape, event = tuple(logits.shape), event_of(spec)
    if len(event) == 1 and event[0] is not None:
        inputs.check_logits(shape, event[0])
    elif len(shape) <= len(event) or any(n not in (None, m) for n, m in zip(event, shape[-len(event) :], strict=True)):
        axes = ", ".join("any" if n is None else str(n) for n in event)
        raise ValueError(f"{what} must have shape [D0, ..., DN, {axes}], of one leading axis or more. Given {shape}.")
    return logits


def leading_shape(spec: Any, logits: Any) -> tuple[int, ...]:
    """Returns the leading axes of checked logits."""
    if isinstance(spec, Mapping):
        key = next(iter(spec))
        return leading_shape(spec[key], logits[key])
    return tuple(logits.shape)[: -len(event_of(spec))]


def _last_size(head: AbstractHead, logits: Any) -> int | None:
    """Returns the size of the last axis, where masks and weights may have one entry for each logit; else None."""
    spec = head.logits_spec
    if isinstance(spec, Mapping) or len(event_of(spec)) > 1:
        return None
    return event_of(spec)[0] if logits is None or event_of(spec)[0] is not None else tuple(logits.shape)[-1]


# Labels.


def _lead_of_labels(head: AbstractHead, labels: Any) -> tuple[int, ...]:
    leads: list[tuple[int, ...]] = []

    def note(spec: LabelSpec, label: Any, what: str) -> None:
        label, _ = rules.as_encoded(head.to_array(label, ids=False))
        array = inputs.as_array(label, what, names=head.vocabulary is not None)
        leads.append(rules.leading_shape(spec, tuple(array.shape)))

    rules.each_label(head.label_spec, labels, note)
    return leads[0]


def _gather_labels(
    head: AbstractHead, given: Given, lead: tuple[int, ...], where: Any, weights: Any, live: np.ndarray | None
) -> Any:
    check, names = given.check, head.vocabulary

    def known() -> np.ndarray | None:
        # Strings are read on the host in any case. Then concrete masks are read too, to find the strings that exist.
        return _live_on_host(where, weights, True) if live is None and check is None else live

    def take(spec: LabelSpec, label: Any, what: str) -> Any:
        label, strangers = rules.as_encoded(head.to_array(label, ids=False))
        array = rules.give_shape(spec, inputs.as_array(label, what, names=names is not None), lead, what)
        if check is not False and strangers and (rows := known()) is not None:
            vocabulary.refuse_strangers(strangers, rows, spec.size or 0, names)
        array = rules.settle_labels(spec, rules.give_dtype(array, label, spec), names, live, known, check, what)
        # Names are int32 by now. An id that is neither of a bool's two values stays visible only as an integer.
        return inputs.cast(array, spec.dtype) if isinstance(array, np.ndarray) and spec.kind != "bool" else array

    return rules.each_label(head.label_spec, given.labels, take)


# Masks and weights.


def _weights_of(head: AbstractHead, given: Given) -> tuple[Any, str]:
    """Returns the weights of a call, from the weight column if the head has one, and their name in messages."""
    column = head.weight_column
    if column is None:
        return given.weights, "weights"
    if given.weights is not None:
        raise ValueError(
            f"Weights are given twice: by weights= and by the head's weight_column={column!r}. Use one of them."
        )
    if isinstance(column, str):
        found, name = columns.column(given.features, column, "the weight_column"), f"weight (features[{column!r}])"
    else:
        found, name = column(given.features), "weights"
    if found is None:
        raise ValueError(
            f"The head's weight_column={column!r} gave None: no weights at all. Give it weights, or build the head "
            "without a weight_column."
        )
    return found, name


def _gather_masks(masks: Masks, lead: tuple[int, ...], sizes: tuple[int, ...], check: bool | None) -> tuple[Any, ...]:
    """Returns masks `lead + [1]` (or one of `sizes`), host masks as bool. Each is checked where all others hold."""
    values = [inputs.as_where(mask.value, lead, mask.what, sizes) for mask in masks]
    for i, (mask, value) in enumerate(zip(masks, values, strict=True)):
        others = values[:i] + values[i + 1 :]
        if inputs.dtype_kind(value) != "bool" and all(inputs.is_readable(x, check) for x in (value, *others)):
            holds = functools.reduce(np.logical_and, (np.asarray(x) != 0 for x in others), np.asarray(True))
            inputs.check_where(np.asarray(value), holds, mask.what)
    return tuple(inputs.cast(x, jnp.bool_) if _is_plain(x) else x for x in values)


def _is_plain(mask: Any) -> bool:
    """Tells whether a host mask loses nothing as bool. Other values than 0 and 1 stay, for the compiled check."""
    return isinstance(mask, np.ndarray) and (mask.dtype == np.bool_ or bool(np.isin(mask, (0, 1)).all()))


def _live_on_host(where: tuple[Any, ...], weights: Any, check: bool | None) -> np.ndarray | None:
    """Returns a mask of the elements whose values are checked; None where reading it would stall a device."""
    live = np.asarray(True)
    for x in (*where, *(() if weights is None else (weights,))):
        if not inputs.is_readable(x, check):
            return None
        live = np.asarray(live & (np.asarray(x) != 0))
    return live


def _select_rows(live: np.ndarray | None) -> np.ndarray | None:
    """Returns live rows `[..., 1]`, from live elements."""
    return None if live is None else np.any(live, -1, keepdims=True) if live.ndim else live


def _check_weight_values(weights: np.ndarray, live: np.ndarray, what: str) -> None:
    bad = ~((weights >= 0) & np.isfinite(weights)) & live
    if bad.any():
        position = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{what} must be finite and not negative. Given {np.broadcast_to(weights, bad.shape)[position]!s} at index "
            f"{position}. Use 0 to hide an element, where=False to leave it out."
        )
    if 0 < (largest := np.max(np.where(live, weights, 0), initial=0)) < SMALLEST_SUM:
        raise ValueError(
            f"{what} must not all be tiny: float32 loses a part of their sum. Given at most {largest:.3g}, expected at "
            f"least one of {SMALLEST_SUM:g} or more. Multiply all by one number, such as weights / weights.max()."
        )


_told_of_mask: list[bool] = []


def _warn_of_mask(weights: np.ndarray, exists: np.ndarray | None, what: str) -> None:
    """Tells once that weights of 0 and 1 are no mask: the loss is divided by the number of all elements."""
    if _told_of_mask or exists is None or not weights.size:
        return
    hidden = (weights == 0) & exists
    if hidden.any() and bool(np.all((weights == 0) | (weights == 1))):
        _told_of_mask.append(True)
        warnings.warn(
            f"{what} are 0 and 1, {int(hidden.sum())} of {weights.size} are 0, and the loss is divided by the number "
            "of all elements, as in tf.estimator. If they are a mask, pass where= in their place, or build the head "
            'with loss_reduction="mean". This is told once. To silence it: '
            'warnings.filterwarnings("ignore", category=jh.MaskWarning).',
            MaskWarning,
            stacklevel=4,
        )


def _key_of(head: AbstractHead, given: Given) -> Any:
    if given.key is None:
        why = f"bootstrap={head.bootstrap!r}" if not head.samples else "a loss that is drawn at random"
        raise ValueError(
            f"{type(head).__name__} has {why} and needs key= for each batch: key=jax.random.fold_in(key, step), and in "
            "shard_map or pmap folded with jax.lax.axis_index too."
        )
    fields.check_key(given.key)
    return given.key
