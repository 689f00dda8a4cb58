"""A batch as users pass it, checked and made safe: the double where, written once.

`gather` runs in Python at every call: it checks shapes, dtypes and the values of host arrays, encodes strings, and
picks what enters compiled code. `clean` runs inside: it replaces masked and illegal inputs before a formula sees
them.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.numerics import inputs, masking, vocabulary
from jaxheads.numerics.linear import LinearLogits


@dataclasses.dataclass(frozen=True)
class LabelSpec:
    """What labels are legal: read by the checks, the masks and the tests' samplers.

    Attributes:
        size: the last axis.
        kind: `"float"` (any number is taken), `"int"` or `"bool"`.
        low: the smallest legal value; None for no limit.
        high: the largest legal value; None for no limit. Labels must be finite in any case.
        fill: the legal value that masked rows are given before a formula sees them; their logits become 0. A formula
            with learned fields must be smooth there, for the gradient of those fields passes through every row.
    """

    size: int = 1
    kind: str = "float"
    low: float | None = None
    high: float | None = None
    fill: float = 0

    def __post_init__(self):
        if self.kind not in ("float", "int", "bool"):
            raise ValueError(f'A label is of kind "float", "int" or "bool". Given {self.kind!r}.')

    @property
    def dtype(self) -> Any:
        """What labels are cast to."""
        return {"float": jnp.float32, "int": jnp.int32, "bool": jnp.bool_}[self.kind]

    def illegal(self, labels: Any, xp: Any) -> Any:
        """Bool like `labels`: outside the range, or not a finite number."""
        if self.kind == "bool":
            return (labels != 0) & (labels != 1)
        # Only floats can be NaN or infinite; NaN is out of every range.
        legal = xp.isfinite(labels) if jnp.issubdtype(labels.dtype, jnp.floating) else labels == labels
        if self.low is not None:
            legal = legal & (labels >= self.low)
        if self.high is not None:
            legal = legal & (labels <= self.high)
        return ~legal

    def describe(self) -> str:
        """The legal values in words."""
        kind = {"float": "numbers", "int": "integers", "bool": "booleans"}[self.kind]
        if self.low is None and self.high is None:
            return f"finite {kind}" if self.kind == "float" else kind
        low, high = ("-inf" if self.low is None else self.low), ("inf" if self.high is None else self.high)
        return f"{kind} in [{low}, {high}]"


Specs: TypeAlias = LabelSpec | Mapping[str, LabelSpec]


class Elements(NamedTuple):
    """A checked batch: nothing in it can poison a formula.

    Attributes:
        labels: as the label spec says; the fill where masked or illegal.
        logits: float32 `[..., d]`; 0 where masked.
        weights: float32 `[..., 1]` or `[..., d]`; 0 where masked.
        exists: bool `[..., 1]`.
        bad: bool `[..., 1]` or `[..., d]`: unmasked, but with an illegal label or weight.
        features: the columns that the loss reads; 1 where masked.
    """

    labels: Any
    logits: jax.Array
    weights: jax.Array
    exists: jax.Array
    bad: jax.Array
    features: dict[str, jax.Array]


def per_label(specs: Specs, function: Any, *labels: Any) -> Any:
    """`function(spec, *labels, name)` for the one label, or a dict of results for structured labels."""
    if isinstance(specs, LabelSpec):
        return function(specs, *labels, "labels")
    return {k: function(s, *(x[k] for x in labels), f"labels[{k!r}]") for k, s in specs.items()}


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
    check: bool | None,
) -> dict[str, Any]:
    """What enters compiled code: arrays of checked shapes, those from the host in their final dtype."""
    logits = check_logits(logits, dimension)
    lead = tuple(logits.shape)[:-1]
    where = None if where is None else inputs.as_where(where, lead, check)
    if weights is not None:
        sizes = (1, dimension) if per_logit_weights and dimension > 1 else (1,)
        weights = inputs.as_weights(weights, lead, sizes, weights_name)
    live = _live_on_host(where, weights, check)
    if weights is not None and live is not None:
        _check_weight_values(np.asarray(weights), live, weights_name)
    if labels is None:
        raise ValueError(
            "You must provide labels. Given: None. Loss and metrics need them; for predictions alone call "
            "head.predictions(logits)."
        )
    if not isinstance(specs, LabelSpec) and (not isinstance(labels, Mapping) or set(labels) != set(specs)):
        given = sorted(labels) if isinstance(labels, Mapping) else f"a {type(labels).__name__}"
        raise ValueError(f"labels must be a dict with the keys {sorted(specs)}. Given {given}.")

    def take(spec: LabelSpec, label: Any, what: str) -> Any:
        label = _shaped_labels(spec, label, lead, live, label_vocabulary, what)
        if live is not None and inputs.is_readable(label, check):
            check_label_values(np.asarray(label), spec, live, what)
        return inputs.cast(label, spec.dtype) if isinstance(label, np.ndarray) else label

    return {"labels": per_label(specs, take, labels), "logits": logits, "weights": weights, "where": where}


def _shaped_labels(
    spec: LabelSpec,
    labels: Any,
    lead: tuple[int, ...],
    live: np.ndarray | None,
    label_vocabulary: tuple[str, ...] | None,
    what: str,
) -> Any:
    """Labels of shape `lead + [spec.size]`, encoded if they were strings, still in their own dtype."""
    array = inputs.as_array(labels, what)
    if isinstance(array, np.ndarray) and inputs.is_text(array):
        array = vocabulary.encode(array, label_vocabulary, _rows_like(live, array))
    kinds = {"float": ("bool", "int", "float"), "int": ("int",), "bool": ("bool", "int")}[spec.kind]
    if inputs.dtype_kind(array) not in kinds:
        raise ValueError(
            f"{what} must be {spec.describe()} with a dtype of {' or '.join(kinds)}. Given dtype {array.dtype}."
        )
    shape = tuple(array.shape)
    if len(shape) == len(lead) and shape:
        array = array.reshape((*shape, 1))
    if len(array.shape) < 2:
        raise ValueError(f"{what} must have rank at least 2, or one label a row. Given shape {shape}.")
    if array.shape[-1] != spec.size:
        raise ValueError(
            f"Mismatched label shape. Expected {what} dimension={spec.size}.  Received {array.shape[-1]} in shape "
            f"{shape}. Suggested Fix: if the labels are one-hot, pass class ids, labels.argmax(-1); otherwise check "
            f"the head's n_classes or label_dimension, or reshape to {(*lead, spec.size)}."
        )
    if tuple(array.shape) != (*lead, spec.size):
        raise ValueError(
            f"{what} shape must be [D0, D1, ... DN, {spec.size}]. Suggested Fix: give one label to each row of "
            f"logits. expected_labels_shape: {(*lead, spec.size)}. labels_shape: {tuple(array.shape)}."
        )
    return array


def _rows_like(live: np.ndarray | None, array: np.ndarray) -> np.ndarray | None:
    """Which rows are live, shaped like labels that may lack the last axis; None where all may be, or shapes differ."""
    if live is None or live.ndim == 0:
        return None
    rows = np.asarray(live.any(-1, keepdims=array.ndim == live.ndim))
    fits = rows.ndim == array.ndim and all(a in (1, b) for a, b in zip(rows.shape, array.shape, strict=True))
    return rows if fits else None


def _live_on_host(where: Any, weights: Any, check: bool | None) -> np.ndarray | None:
    """In which elements values are checked; None where knowing it would stall a device."""
    live = np.asarray(True)
    for x in (where, weights):
        if x is None:
            continue
        if not inputs.is_readable(x, check):
            return None
        live = np.asarray(live & (np.asarray(x) != 0))
    return live


def _check_weight_values(weights: np.ndarray, live: np.ndarray, what: str) -> None:
    bad = ~((weights >= 0) & np.isfinite(weights)) & live
    if bad.any():
        position = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{what} must be finite and not negative. Given {weights[position]!s} at index {position}. Use 0 to hide "
            "an element, where=False to leave it out."
        )


def check_label_values(labels: np.ndarray, spec: LabelSpec, live: np.ndarray, what: str = "labels") -> None:
    """Refuses illegal values in live rows, naming the first."""
    if live.ndim and live.shape[-1] not in (1, labels.shape[-1]):
        live = np.asarray(live.any(-1, keepdims=True))
    bad = spec.illegal(labels, np) & live
    if bad.any():
        position = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{what} must be {spec.describe()}. Given {labels[position]!s} at index {position}, {int(bad.sum())} "
            "illegal in all. Mend the labels, or leave those rows out with where=False."
        )


def clean(specs: Specs, batch: Mapping[str, Any]) -> Elements:
    """The elements of a gathered batch."""
    logits = batch["logits"]
    where, weights = batch["where"], batch["weights"]
    where = _all_true(logits) if where is None else jnp.asarray(where)
    exists = where.astype(jnp.bool_)
    weights = jnp.ones_like(exists, jnp.float32) if weights is None else jnp.asarray(weights)
    live = exists & (weights != 0)
    row = jnp.any(live, -1, keepdims=True)

    def find_illegal(spec: LabelSpec, labels: Any, _: str) -> jax.Array:
        # In their own dtype or a wider one: a narrower one may turn an illegal value into a legal one.
        labels = jnp.asarray(labels)
        if labels.dtype.itemsize < 4 or (spec.kind == "float" and not jnp.issubdtype(labels.dtype, jnp.floating)):
            labels = labels.astype(jnp.float32 if spec.kind == "float" else jnp.int32)
        mask = live if live.shape[-1] in (1, spec.size) else row
        return jnp.broadcast_to(mask, labels.shape) & spec.illegal(labels, jnp)

    def fill(spec: LabelSpec, labels: Any, illegal: jax.Array, _: str) -> jax.Array:
        labels = jnp.asarray(labels).astype(spec.dtype)
        mask = live if live.shape[-1] in (1, spec.size) else row
        return masking.keep(jnp.broadcast_to(mask, labels.shape) & ~illegal, labels, spec.fill)

    illegal = per_label(specs, find_illegal, batch["labels"])
    labels = per_label(specs, fill, batch["labels"], illegal)
    each = [x if x.shape[-1] == live.shape[-1] else jnp.any(x, -1, keepdims=True) for x in jax.tree.leaves(illegal)]
    bad = functools.reduce(jnp.logical_or, each) & live
    bad = bad | (live & ~((weights > 0) & jnp.isfinite(weights)))
    if where.dtype != jnp.bool_:
        bad = bad | (live & (where != 1))
    weights = jnp.where(live, jnp.where(bad, jnp.ones_like(weights), weights), jnp.zeros_like(weights))
    features = {k: masking.keep_rows(row, jnp.asarray(v), 1) for k, v in batch.get("features", {}).items()}
    return Elements(labels, _masked_logits(logits, live, row), weights, exists, bad, features)


def _all_true(logits: Any) -> jax.Array:
    """True `[..., 1]`, laid out over a mesh as the logits are; `jnp.ones` would be replicated under `set_mesh`."""
    rows = logits.hidden if isinstance(logits, LinearLogits) else logits
    return jnp.all(jnp.ones_like(rows, bool), axis=-1, keepdims=True)


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
