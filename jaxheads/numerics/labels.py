"""Legal labels: their spec, checks that name the first illegal label, and arrays for a compiled step."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.numerics import brief, inputs, missing, vocabulary
from jaxheads.numerics.warned import RoundingWarning

INT32 = np.iinfo(np.int32)


@dataclasses.dataclass(frozen=True)
class LabelSpec:
    """The labels that are legal. The checks, the masks and the tests' samplers read it.

    Attributes:
        size: the last axis; None for any.
        kind: `"float"` (any number is taken), `"int"` or `"bool"`.
        low: the smallest legal value; None for no limit.
        high: the largest legal value; None for no limit. Labels must be finite in any case.
        fill: the legal value that masked rows get before a formula sees them; their logits become 0. A head with
            learned fields gets copies of a live row instead, if there is one.
        axes: sizes of the axes before the last that belong to one element (boxes of an image); None for any.
        total: what the labels along the last axis add up to, within 0.01 (bfloat16 rounds each by up to 0.004); None
            for any sum. Masked rows get `fill` all the same.
    """

    size: int | None = 1
    kind: str = "float"
    low: float | None = None
    high: float | None = None
    fill: float = 0
    axes: tuple[int | None, ...] = ()
    total: float | None = None

    def __post_init__(self):
        if not brief.is_one_of(self.kind, ("float", "int", "bool")):
            raise ValueError(f'A label is of kind "float", "int" or "bool". Given {self.kind!r}.')
        if not isinstance(self.axes, tuple) or not all(n is None or inputs.is_integer(n, 1) for n in self.event):
            raise ValueError(
                "A label's size must be an integer of at least 1, or None for any, and its axes a tuple of these. "
                f"Given size={self.size!r}, axes={self.axes!r}."
            )
        for name in ("low", "high", "fill", "total"):
            value = getattr(self, name)
            # NumPy's scalars have a dtype of their own, which strict promotion would refuse to compare.
            if isinstance(value, np.generic):
                value = value.item()
                object.__setattr__(self, name, value)
            if not isinstance(value, (int, float)) and not (value is None and name != "fill"):
                raise ValueError(f"A label's {name} must be a number. Given {brief.tell(value)}.")
        if self.low is not None and self.high is not None and not self.low <= self.high:
            raise ValueError(f"A label's low must not be above its high. Given low={self.low!r}, high={self.high!r}.")
        if self.illegal(np.asarray(self.fill), np).any():
            raise ValueError(
                f"A label's fill must be legal, for formulas are given it in masked rows. Given fill={self.fill!r}, "
                f"expected one of {self.describe()}. Pass fill= to the LabelSpec."
            )

    @property
    def event(self) -> tuple[int | None, ...]:
        """The last axes, which belong to one element."""
        return (*self.axes, self.size)

    @property
    def inside(self) -> float:
        """A legal value inside the limits, where a formula has no edge; the fill, if that is inside or no float."""
        low, high, fill = self.low, self.high, self.fill
        if self.kind != "float" or (fill != 0 and fill not in (low, high)):
            return fill
        if low is not None and high is not None:
            return low + 0.3719 * (high - low)
        return 1.3719 + low if low is not None else high - 1.3719 if high is not None else 0.3719

    @property
    def dtype(self) -> Any:
        """The dtype that labels are cast to."""
        return {"float": jnp.float32, "int": jnp.int32, "bool": jnp.bool_}[self.kind]

    def illegal(self, labels: Any, xp: Any) -> Any:
        """Tells which labels are out of range or not finite, as they are or will be cast: bool like `labels`."""
        wide, dtype = labels.dtype.itemsize > 4, labels.dtype
        if self.kind == "bool":
            labels = labels if wide or dtype == np.uint32 else inputs.cast(labels, jnp.int32)
            return (labels != 0) & (labels != 1)
        illegal = self._is_outside(inputs.cast(labels, self.dtype), xp)
        if wide and jnp.issubdtype(dtype, jnp.floating):
            return illegal | self._is_outside(labels, xp)
        if self.kind == "int" and (wide or dtype == np.uint32):
            illegal = illegal | (labels > INT32.max)
            if jnp.issubdtype(dtype, jnp.signedinteger):
                illegal = illegal | (labels < INT32.min)
        return illegal

    def _is_outside(self, labels: Any, xp: Any) -> Any:
        # Only floats can be NaN or infinite; NaN is out of every range.
        legal = xp.isfinite(labels) if jnp.issubdtype(labels.dtype, jnp.floating) else labels == labels
        if self.total is not None and labels.ndim:
            total = xp.sum(labels, axis=-1, keepdims=True)
            legal = legal & (abs(total - self.total) <= 0.01)
        if self.low is not None:
            legal = legal & (labels >= self.low)
        if self.high is not None:
            legal = legal & (labels <= self.high)
        return ~legal

    def settle(self, labels: np.ndarray, illegal: np.ndarray | None) -> np.ndarray:
        """Returns labels of the host in their final dtype. Labels found illegal stay illegal.

        A plain cast would hide some in the legal range: 2**32 is 0 as an int32, 2 is True, 1 + 1e-9 is 1. Integers and
        bools stay illegal without a check too.
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
        """Returns the legal values in words."""
        kind = {"float": "numbers", "int": "integers", "bool": "booleans"}[self.kind]
        if self.low is None and self.high is None:
            return f"finite {kind}" if self.kind == "float" else kind
        low, high = ("-inf" if self.low is None else self.low), ("inf" if self.high is None else self.high)
        total = "" if self.total is None else f" that add up to {self.total} along the last axis"
        return f"{kind} in [{low}, {high}]{total}"


Specs: TypeAlias = LabelSpec | Mapping[str, LabelSpec]


def per_label(specs: Specs, function: Any, *labels: Any) -> Any:
    """Returns `function(spec, *labels, name)` for the one label, or a dict of results for structured labels."""
    if isinstance(specs, LabelSpec):
        return function(specs, *labels, "labels")
    return {k: function(s, *(x[k] for x in labels), f"labels[{k!r}]") for k, s in specs.items()}


def as_encoded(label: Any) -> vocabulary.Encoded:
    """Returns a label with the entries that could not be encoded: none, unless it was made of lists."""
    return label if isinstance(label, vocabulary.Encoded) else vocabulary.Encoded(label, {})


def encode(
    specs: Specs,
    labels: Any,
    where: Any,
    label_vocabulary: tuple[str, ...] | None,
    to_array: Callable[[Any], Any],
    entries: bool = False,
) -> Any:
    """Returns labels as `gather` makes them, in the shape they have: NumPy arrays for a later compiled step.

    An illegal label in an absent row stays illegal (an unknown name is -1). A step under the same `where` accepts it; a
    step without it sees it. With `entries`, the mask may have one value for each entry.
    """

    def take(spec: LabelSpec, label: Any, what: str) -> Any:
        label, strangers = as_encoded(to_array(label))
        array = np.asarray(inputs.as_array(label, what, names=label_vocabulary is not None))
        shape = array.shape
        live = np.asarray(True)
        if (lead := leading_shape(spec, shape)) != shape:
            _check_label_size(spec, shape, lead, what)
        else:
            array = array[..., None]
        if where is not None:
            sizes = (1, array.shape[-1]) if entries else (1,)
            mask = np.asarray(inputs.as_where(where, array.shape[:-1], sizes=sizes))
            inputs.check_where(mask, np.asarray(True), "where")
            live = mask != 0
        vocabulary.refuse_strangers(strangers, live, spec.size or 0, label_vocabulary)
        array = settle_labels(spec, give_dtype(array, label, spec), label_vocabulary, live, lambda: live, True, what)
        return array.reshape(shape)

    return each_label(specs, labels, take)


def leading_shape(spec: LabelSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the leading axes of labels that come without logits: `[..., 1]` is read as one label a row."""
    if spec.size != 1 or spec.axes:
        return shape[: len(shape) - len(spec.event)]
    return shape[:-1] if shape[-1:] == (1,) and len(shape) > 1 else shape


def each_label(specs: Specs, labels: Any, take: Any) -> Any:
    """Returns `take(spec, label, name)` of the one label, or of each label in a dict with the keys of the specs."""
    if not isinstance(specs, LabelSpec) and not specs:
        if labels is not None:
            raise ValueError("This head takes no labels: labels must be None. Given labels.")
        return None
    if labels is None:
        raise ValueError(
            "You must provide labels. Given: None. Loss and metrics need them; for predictions alone call "
            "head.predictions(logits)."
        )
    if not isinstance(specs, LabelSpec) and (not isinstance(labels, Mapping) or set(labels) != set(specs)):
        given = sorted(map(str, labels)) if isinstance(labels, Mapping) else f"a {type(labels).__name__}"
        raise ValueError(f"labels must be a dict with the keys {sorted(specs)}. Given {given}.")
    return per_label(specs, take, labels)


def give_dtype(array: Any, label: Any, spec: LabelSpec) -> Any:
    """Returns `array` in its true dtype: an empty list has none of its own, and missing integers are floats in it."""
    if isinstance(array, np.ndarray) and array.dtype.kind == "f" and spec.kind != "float":
        column = missing.read(np.asarray(label, object) if isinstance(label, (list, tuple)) else label)
        if column is not None and column.dtype.kind in ("iu" if spec.kind == "int" else "biu"):
            return missing.as_integers(column).reshape(array.shape)
    empty = isinstance(array, np.ndarray) and array.size == 0 and not isinstance(label, (np.ndarray, jax.Array))
    return array.astype(spec.dtype) if empty else array


def settle_labels(
    spec: LabelSpec,
    array: Any,
    label_vocabulary: tuple[str, ...] | None,
    live: np.ndarray | None,
    live_names: Callable[[], np.ndarray | None],
    check: bool | None,
    what: str,
) -> Any:
    """Returns labels with a last axis, encoded and checked; in their final dtype if they are numbers of the host.

    Illegal labels are refused in rows known to be live. In other rows they stay illegal, and the compiled check judges:
    it sees all masks.
    """
    if inputs.is_text(array) or (array.dtype == object and label_vocabulary is not None):
        ids = vocabulary.encode(array, label_vocabulary, np.asarray(False))
        unknown = ids < 0
        if check is not False and unknown.any() and (rows := live_names()) is not None:
            vocabulary.refuse(array, unknown & _fit_live(rows, ids), label_vocabulary)
        return ids
    kinds = {"float": ("bool", "int", "float"), "int": ("int",), "bool": ("bool", "int")}[spec.kind]
    if inputs.dtype_kind(array) not in kinds:
        fix = f" Suggested Fix: if these are class ids, cast them: {what}.astype(int)." if spec.kind == "int" else ""
        fix = inputs.mend_time(array.dtype) or fix
        raise ValueError(
            f"{what} must be {spec.describe()} with a dtype of {' or '.join(kinds)}. Given dtype {array.dtype}.{fix}"
        )
    illegal = None
    if inputs.is_readable(array, check) and (live is not None or isinstance(array, np.ndarray)):
        illegal = spec.illegal(np.asarray(array), np)
        if live is not None:
            _refuse_labels(np.asarray(array), illegal & _fit_live(live, array), spec, what)
        if spec.kind == "float" and array.dtype.itemsize > 4:
            _warn_of_rounding(np.asarray(array), ~illegal if live is None else ~illegal & _fit_live(live, array), what)
    return spec.settle(array, illegal) if isinstance(array, np.ndarray) else array


def _warn_of_rounding(labels: np.ndarray, live: np.ndarray, what: str) -> None:
    """Warns of labels that lie so close together, and so far from zero, that float32 cannot tell them apart."""
    live = np.broadcast_to(live, labels.shape)
    for i in range(labels.shape[-1]):
        exact = labels[..., i][live[..., i]].astype(np.float64)
        spread = exact.std() if exact.size else 0.0
        # Float32 tells most labels apart. To see this, half a unit in the last place of the largest is enough.
        if not 0 < spread <= 100 * np.abs(exact).max() * 2.0**-24:
            continue
        if (lost := np.abs(exact - exact.astype(np.float32)).max()) > 1e-2 * spread:
            warnings.warn(
                f"{what} become float32, which rounds them by up to {lost:.3g}. Given labels about "
                f"{exact.mean():.6g}, with a standard deviation of {spread:.3g}. Subtract {exact.mean():.6g} from them "
                "first, and add it to the predictions.",
                RoundingWarning,
                stacklevel=2,
            )


def give_shape(spec: LabelSpec, array: Any, lead: tuple[int, ...], what: str) -> Any:
    """Returns labels of shape `lead + [spec.size]`."""
    shape, event = tuple(array.shape), spec.event
    if len(event) > 1 or None in event:
        fits = len(shape) == len(lead) + len(event) and shape[: len(lead)] == lead
        if not fits or any(n not in (None, m) for n, m in zip(event, shape[len(lead) :], strict=True)):
            axes = ", ".join("any" if n is None else str(n) for n in event)
            raise ValueError(f"{what} must have shape {list(lead)} + [{axes}], to match the logits. Given {shape}.")
        return array
    if len(shape) == len(lead) and shape:
        array = inputs.add_last_axis(array)
    if len(array.shape) < 2:
        raise ValueError(f"{what} must have rank at least 2, or one label a row. Given shape {shape}.")
    _check_label_size(spec, tuple(array.shape), lead, what, shape)
    if tuple(array.shape) != (*lead, spec.size):
        raise ValueError(
            f"{what} shape must be [D0, D1, ... DN, {spec.size}]. Suggested Fix: give one label to each row of "
            f"logits. expected_labels_shape: {(*lead, spec.size)}. labels_shape: {tuple(array.shape)}."
        )
    return array


def _check_label_size(
    spec: LabelSpec, shape: tuple[int, ...], lead: tuple[int, ...], what: str, given: tuple[int, ...] | None = None
) -> None:
    if shape[-1:] != (spec.size,):
        one_hot = "if the labels are one-hot, pass class ids, labels.argmax(-1)"
        if spec.total is not None:
            one_hot = "if the labels are class ids, pass rows of shares, head.encode_labels(labels)"
        raise ValueError(
            f"Mismatched label shape. Expected {what} dimension={spec.size}.  Received {shape[-1] if shape else None} "
            f"in shape {shape if given is None else given}. Suggested Fix: {one_hot}; "
            "otherwise check the head's n_classes or label_dimension, or reshape to "
            f"{(*lead, spec.size)}."
        )


def _fit_live(live: np.ndarray, labels: Any) -> np.ndarray:
    """Returns live elements in a shape that broadcasts to labels: whole rows where weights are per logit."""
    per_logit = live.ndim and live.shape[-1] not in (1, labels.shape[-1])
    return np.asarray(live.any(-1, keepdims=True)) if per_logit else live


def _refuse_labels(labels: np.ndarray, bad: np.ndarray, spec: LabelSpec, what: str) -> None:
    if bad.any():
        position = tuple(int(i) for i in np.argwhere(bad)[0])
        given = "a missing value" if labels[position] == missing.INTEGER else labels[position]
        raise ValueError(
            f"{what} must be {spec.describe()}. Given {given!s} at index {position}, {int(bad.sum())} "
            "illegal in all. Mend the labels, or leave those rows out with where=False."
        )
