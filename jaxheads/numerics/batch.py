"""A batch as users pass it, checked and made safe: the double where, written once.

`gather` runs in Python at every call: it checks shapes, dtypes and the values of host arrays, encodes strings, and
picks what enters compiled code. `clean` runs inside: it replaces masked and illegal inputs before a formula sees
them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxheads.numerics import inputs, masking, vocabulary
from jaxheads.numerics.linear import LinearLogits

INT32 = np.iinfo(np.int32)


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
        for name in ("low", "high", "fill"):
            # NumPy's scalars have a dtype of their own, which strict promotion would refuse to compare.
            if isinstance(value := getattr(self, name), np.generic):
                object.__setattr__(self, name, value.item())
        if self.low is not None and self.high is not None and not self.low <= self.high:
            raise ValueError(f"A label's low must not be above its high. Given low={self.low!r}, high={self.high!r}.")
        if self.illegal(np.asarray(self.fill), np).any():
            raise ValueError(
                f"A label's fill must be legal, for formulas are given it in masked rows. Given fill={self.fill!r}, "
                f"expected one of {self.describe()}. Pass fill= to the LabelSpec."
            )

    @property
    def dtype(self) -> Any:
        """What labels are cast to."""
        return {"float": jnp.float32, "int": jnp.int32, "bool": jnp.bool_}[self.kind]

    def illegal(self, labels: Any, xp: Any) -> Any:
        """Bool like `labels`: outside the range or not a finite number, as they are or as they will be cast."""
        wide, dtype = labels.dtype.itemsize > 4, labels.dtype
        if self.kind == "bool":
            labels = labels if wide or dtype == np.uint32 else inputs.cast(labels, jnp.int32)
            return (labels != 0) & (labels != 1)
        illegal = self._outside(inputs.cast(labels, self.dtype), xp)
        if wide and jnp.issubdtype(dtype, jnp.floating):
            return illegal | self._outside(labels, xp)
        if self.kind == "int" and (wide or dtype == np.uint32):
            illegal = illegal | (labels > INT32.max)
            if jnp.issubdtype(dtype, jnp.signedinteger):
                illegal = illegal | (labels < INT32.min)
        return illegal

    def _outside(self, labels: Any, xp: Any) -> Any:
        # Only floats can be NaN or infinite; NaN is out of every range.
        legal = xp.isfinite(labels) if jnp.issubdtype(labels.dtype, jnp.floating) else labels == labels
        if self.low is not None:
            legal = legal & (labels >= self.low)
        if self.high is not None:
            legal = legal & (labels <= self.high)
        return ~legal

    def settle(self, labels: np.ndarray, illegal: np.ndarray | None) -> np.ndarray:
        """Labels of the host in their final dtype, those found illegal (or, if nobody looked, all) still visibly so.

        A plain cast would hide some in the legal range: 2**32 is 0 as an int32, 2 is True, 1 + 1e-9 is 1.
        """
        if self.kind == "float":
            final = inputs.cast(labels, jnp.float32)
            return final if illegal is None or not illegal.any() else np.where(illegal, np.float32(np.nan), final)
        if self.kind == "bool" and (labels.dtype == np.bool_ or (illegal is not None and not illegal.any())):
            return inputs.cast(labels, jnp.bool_)
        if labels.dtype.itemsize >= 4 and labels.dtype != np.int32:
            own = np.iinfo(labels.dtype)
            labels = np.clip(labels, max(own.min, INT32.min), min(own.max, INT32.max))
        return inputs.cast(labels, jnp.int32)

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
        features: the columns that the loss reads, nested as given; 1 where masked.
    """

    labels: Any
    logits: jax.Array
    weights: jax.Array
    exists: jax.Array
    bad: jax.Array
    features: Mapping[Any, Any]

    @property
    def counted(self) -> jax.Array:
        """The weights that metrics count with: bad elements are left out."""
        return jnp.where(self.bad, jnp.zeros_like(self.weights), self.weights)


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

    def take(spec: LabelSpec, label: Any, what: str) -> Any:
        array = _shaped_labels(spec, inputs.as_array(label, what, names=label_vocabulary is not None), lead, what)

        def known() -> np.ndarray | None:
            # Strings are looked at on the host in any case: then so are concrete masks, to tell which of them exist.
            return _live_on_host(where, weights, True) if live is None and check is None else live

        array = _settled(spec, _like(array, label, spec), label_vocabulary, live, known, check, what)
        # Names came as int32; an id that is not one of a bool's two stays visible only as an integer.
        return inputs.cast(array, spec.dtype) if isinstance(array, np.ndarray) and spec.kind != "bool" else array

    return {"labels": _each_label(specs, labels, take), "logits": logits, "weights": weights, "where": where}


def encode(specs: Specs, labels: Any, where: Any, label_vocabulary: tuple[str, ...] | None) -> Any:
    """Labels as `gather` makes them, in the shape they have: NumPy arrays for a later compiled step.

    What is illegal in rows that are absent stays so (an unknown name is -1): accepted by a step under the same `where`,
    and visible in one without.
    """

    def take(spec: LabelSpec, label: Any, what: str) -> Any:
        array = np.asarray(inputs.as_array(label, what, names=label_vocabulary is not None))
        shape = array.shape
        live = np.asarray(True)
        if spec.size > 1 or (shape[-1:] == (1,) and len(shape) > 1):
            _check_label_size(spec, shape, shape[:-1], what)
        else:
            array = array[..., None]
        if where is not None:
            live = np.asarray(inputs.as_where(where, array.shape[:-1], True)) != 0
        array = _settled(spec, _like(array, label, spec), label_vocabulary, live, lambda: live, True, what)
        return array.reshape(shape)

    return _each_label(specs, labels, take)


def _each_label(specs: Specs, labels: Any, take: Any) -> Any:
    """`take(spec, label, name)` of the one label, or of each of a dict with the keys of the specs."""
    if labels is None:
        raise ValueError(
            "You must provide labels. Given: None. Loss and metrics need them; for predictions alone call "
            "head.predictions(logits)."
        )
    if not isinstance(specs, LabelSpec) and (not isinstance(labels, Mapping) or set(labels) != set(specs)):
        given = sorted(map(str, labels)) if isinstance(labels, Mapping) else f"a {type(labels).__name__}"
        raise ValueError(f"labels must be a dict with the keys {sorted(specs)}. Given {given}.")
    return per_label(specs, take, labels)


def _like(array: Any, label: Any, spec: LabelSpec) -> Any:
    """`array`; but a list without elements has no dtype of its own."""
    empty = isinstance(array, np.ndarray) and array.size == 0 and not isinstance(label, (np.ndarray, jax.Array))
    return array.astype(spec.dtype) if empty else array


def _settled(
    spec: LabelSpec,
    array: Any,
    label_vocabulary: tuple[str, ...] | None,
    live: np.ndarray | None,
    live_names: Callable[[], np.ndarray | None],
    check: bool | None,
    what: str,
) -> Any:
    """Labels with a last axis, encoded, checked, and (names excepted) in their final dtype if they come from the host.

    Illegal ones are refused in rows known to be live. In others they stay illegal, for the compiled check to judge: it
    sees all masks.
    """
    if inputs.is_text(array) or (array.dtype == object and label_vocabulary is not None):
        ids = vocabulary.encode(array, label_vocabulary, np.asarray(False))
        unknown = ids < 0
        if check is not False and unknown.any() and (rows := live_names()) is not None:
            vocabulary.refuse(array, unknown & _live_like(rows, ids), label_vocabulary)
        return ids
    kinds = {"float": ("bool", "int", "float"), "int": ("int",), "bool": ("bool", "int")}[spec.kind]
    if inputs.dtype_kind(array) not in kinds:
        fix = f" Suggested Fix: if these are class ids, cast them: {what}.astype(int)." if spec.kind == "int" else ""
        raise ValueError(
            f"{what} must be {spec.describe()} with a dtype of {' or '.join(kinds)}. Given dtype {array.dtype}.{fix}"
        )
    illegal = None
    if inputs.is_readable(array, check) and (live is not None or isinstance(array, np.ndarray)):
        illegal = spec.illegal(np.asarray(array), np)
        if live is not None:
            _refuse_labels(np.asarray(array), illegal & _live_like(live, array), spec, what)
    return spec.settle(array, illegal) if isinstance(array, np.ndarray) else array


def _shaped_labels(spec: LabelSpec, array: Any, lead: tuple[int, ...], what: str) -> Any:
    """Labels of shape `lead + [spec.size]`."""
    shape = tuple(array.shape)
    if len(shape) == len(lead) and shape:
        array = array.reshape((*shape, 1))
    if len(array.shape) < 2:
        raise ValueError(f"{what} must have rank at least 2, or one label a row. Given shape {shape}.")
    _check_label_size(spec, tuple(array.shape), lead, what)
    if tuple(array.shape) != (*lead, spec.size):
        raise ValueError(
            f"{what} shape must be [D0, D1, ... DN, {spec.size}]. Suggested Fix: give one label to each row of "
            f"logits. expected_labels_shape: {(*lead, spec.size)}. labels_shape: {tuple(array.shape)}."
        )
    return array


def _check_label_size(spec: LabelSpec, shape: tuple[int, ...], lead: tuple[int, ...], what: str) -> None:
    if shape[-1:] != (spec.size,):
        raise ValueError(
            f"Mismatched label shape. Expected {what} dimension={spec.size}.  Received {shape[-1] if shape else None} "
            f"in shape {shape}. Suggested Fix: if the labels are one-hot, pass class ids, labels.argmax(-1); otherwise "
            f"check the head's n_classes or label_dimension, or reshape to {(*lead, spec.size)}."
        )


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


def _live_like(live: np.ndarray, labels: Any) -> np.ndarray:
    """Live elements in a shape that broadcasts to labels: whole rows where weights are per logit."""
    per_logit = live.ndim and live.shape[-1] not in (1, labels.shape[-1])
    return np.asarray(live.any(-1, keepdims=True)) if per_logit else live


def _refuse_labels(labels: np.ndarray, bad: np.ndarray, spec: LabelSpec, what: str) -> None:
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
        labels = jnp.asarray(labels)
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
    features = jax.tree.map(lambda column: masking.keep_rows(row, jnp.asarray(column), 1), batch.get("features", {}))
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


def debug_check(elements: Elements, who: str) -> None:
    """A message under `checkify`; nothing at all in a program compiled without it."""
    if isinstance(elements.bad, Tracer):
        from jax.experimental import checkify

        message = "{n} unmasked elements have an illegal label or weight for " + who
        checkify.debug_check(~jnp.any(elements.bad), message, n=jnp.sum(elements.bad.astype(jnp.int32)))
