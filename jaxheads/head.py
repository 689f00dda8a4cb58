"""The contract: what a head is, for users and for authors.

A head is a frozen dataclass of configuration. Given logits it computes loss, predictions and metrics, as pure functions. A new
head overrides `logits_dimension`, `losses` and `outputs`, and where it has metrics of its own `observe`:

>>> import jax.numpy as jnp
>>> import jaxheads as jh
>>> class QuantileHead(jh.Head):
...     quantile: float = 0.5
...     logits_dimension = 1
...
...     def losses(self, labels, logits):
...         return jnp.maximum(self.quantile * (labels - logits), (self.quantile - 1) * (labels - logits))
...
...     def outputs(self, logits):
...         return {"predictions": logits}
...
...     def observe(self, labels, logits):
...         return {"coverage": jh.Mean(labels <= logits)}
>>> head = QuantileHead(quantile=0.9, name="p90")
>>> head.measure(labels=jnp.array([1.0, 2.0]), logits=jnp.array([[2.0], [0.0]]))
Metrics of QuantileHead(quantile=0.9, name='p90')
  average_loss/p90  0.95
  coverage/p90      0.5

Masks, weights, checks, dtypes, reductions, devices and compiled updates live here, once, for every head.
"""

import abc
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.metrics import Mean, MeanView, Metrics, Observation
from jaxheads.metrics.state import slots
from jaxheads.numerics import fields, inputs, masking, pairs, reduction, tiles, vocabulary
from jaxheads.numerics.fields import learned, running, subheads
from jaxheads.numerics.linear import LinearLogits
from jaxheads.numerics.reduction import Reduction

WeightColumn: TypeAlias = str | Callable[[Any], Any] | None
MODES = (None, "train", "eval", "infer")


@dataclasses.dataclass(frozen=True)
class LabelSpec:
    """What labels are legal: read by the checks, the masks and the tests' samplers.

    Attributes:
        size: the last axis.
        kind: `"float"` (any number is taken), `"int"` or `"bool"`.
        low, high: the closed legal range; without one, any finite number.
        fill: the legal value that masked rows are given before a formula sees them.
    """

    size: int = 1
    kind: str = "float"
    low: float | None = None
    high: float | None = None
    fill: float = 0

    def __post_init__(self):
        if self.kind not in ("float", "int", "bool"):
            raise ValueError(f'A label is of kind "float", "int" or "bool". Given {self.kind!r}.')

    def illegal(self, labels: Any, xp: Any) -> Any:
        """Bool like `labels`: outside the range, or not a finite number."""
        if self.kind == "bool":
            return xp.zeros(labels.shape, bool)
        legal = xp.isfinite(labels)
        if self.low is not None:
            legal = legal & (labels >= self.low)
        if self.high is not None:
            legal = legal & (labels <= self.high)
        return ~legal

    def describe(self) -> str:
        """The legal values in words."""
        kind = {"float": "numbers", "int": "integer class ids", "bool": "booleans"}[self.kind]
        if self.low is None and self.high is None:
            return f"finite {kind}" if self.kind == "float" else kind
        low, high = ("-inf" if self.low is None else self.low), ("inf" if self.high is None else self.high)
        return f"{kind} in [{low}, {high}]"


class Term(NamedTuple):
    """Per-element losses with an element count of their own (pairs, events, conditional tasks).

    Attributes:
        values: `[..., 1]` or `[..., d]`.
        count: what stands in the place of 1 for each element in every denominator; the same shape.
    """

    values: Any
    count: Any = None


class Elements(NamedTuple):
    """A checked batch: float32 logits, labels and weights with nothing in them that could poison a formula.

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


@dataclass_transform(
    frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field, learned, running, subheads)
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Head(abc.ABC):
    """A head: loss, predictions and metrics from logits. Subclass it to write one.

    Authors override `logits_dimension` and `losses`, and where needed `label_spec`, `outputs`, `observe`, `summarize`,
    `validate` and `advance`. Annotated attributes are constructor arguments. A class is either abstract, and named so, or
    never subclassed.

    Args:
        weight_column: a key of `features`, or a function `features -> weights`.
        loss_reduction: a `Reduction` or its text.
        name: suffixes the metric keys, as in `auc/NAME`.
    """

    weight_column: WeightColumn = dataclasses.field(default=None, kw_only=True)
    loss_reduction: Reduction | str = dataclasses.field(default=Reduction.SUM_OVER_BATCH_SIZE, kw_only=True)
    name: str | None = dataclasses.field(default=None, kw_only=True)

    # --- for authors of a head ------------------------------------------------------------------------------------

    if TYPE_CHECKING:
        # A class attribute or a property, as the author likes; a type checker would insist on one of them.
        logits_dimension: ClassVar[Any]
    else:

        @property
        @abc.abstractmethod
        def logits_dimension(self) -> int:
            """The size of the last axis of the logits."""

    @property
    def label_spec(self) -> LabelSpec | Mapping[str, LabelSpec]:
        """What labels are legal; a dict of specs for structured labels (time and event; a list with its mask)."""
        return LabelSpec(self.logits_dimension)

    @abc.abstractmethod
    def losses(self, labels: Any, logits: jax.Array) -> jax.Array | Term:
        """Per-element losses `[..., 1]` or `[..., d]`: unreduced, unweighted. May take `features` as a third argument."""

    def outputs(self, logits: jax.Array) -> Mapping[str, Any]:
        """Predictions by key: arrays, or functions without arguments that make them when asked for."""
        return {"logits": logits}

    def observe(self, labels: Any, logits: jax.Array) -> Mapping[str, Observation]:
        """What the metrics accumulate beside `average_loss`, by a static key."""
        return {}

    def summarize(self, seen: Mapping[str, Any]) -> Mapping[str, Any]:
        """Metrics by name from what was observed; by default each mean under its own key."""
        return {k: view.mean for k, view in seen.items() if isinstance(view, MeanView) and k != "average_loss"}

    def validate(self) -> None:
        """Refuses bad configuration. Static fields are frozen already; runs once, at construction."""

    def advance(self, labels: Any, logits: jax.Array, weights: jax.Array, psum: Callable[[Any], Any]) -> dict[str, Any]:
        """The next values of the running fields, from a batch; `psum` sums over devices."""
        return {}

    @property
    def per_logit_weights(self) -> bool:
        """Whether weights may have the shape of the logits."""
        return False

    @property
    def reads_features(self) -> bool:
        """Whether `losses` takes the numeric columns of `features`."""
        return False

    @property
    def rowwise(self) -> bool:
        """Whether the loss and the observations of a row depend on that row alone: then large batches are cut in tiles."""
        return False

    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes, for heads whose predictions have class ids."""
        return None

    # --- for users ------------------------------------------------------------------------------------------------

    def loss(
        self,
        labels: Any,
        logits: Any,
        features: Any = None,
        mode: str | None = None,
        regularization_losses: Any = None,
        *,
        weights: Any = None,
        where: Any = None,
        params: Mapping[str, Any] | None = None,
        normalizer: Any = None,
        axis_name: Any = None,
        check: bool | None = None,
    ) -> jax.Array:
        """The regularized training loss.

        Args:
            labels: as the head's docstring says, `[...]` or `[..., 1]`; strings where there is a vocabulary (eagerly).
            logits: `[D0, ..., DN, logits_dimension]`, or `LinearLogits`.
            features: a mapping; only the weight column and what `loss_fn` reads is looked at.
            mode: one of "train", "eval", "infer"; changes nothing in the loss.
            regularization_losses: scalars, added after the reduction.
            weights: float, `[...]` or `[..., 1]`; multiplicities, fractions included. 0 hides the values.
            where: bool or 0/1, `[...]` or `[..., 1]`; False is absence.
            params: the learned (and running) fields, as `bind` takes them.
            normalizer: replaces the divisor; a global number, never summed over devices.
            axis_name: sum numerator and denominator over this mapped axis; then `pmean` the gradients.
            check: True looks at the values of device arrays too (and waits for them); False at none.

        Returns:
            A float32 scalar. 0 for an empty batch. NaN, with a NaN gradient, if an unmasked label or weight is illegal
            and could not be refused (under `jit`).

        Raises:
            ValueError: wrong shapes or dtypes at trace time; illegal values of host arrays.
        """
        _check_mode(mode)
        head = self._ready(params)
        batch = head._gather(labels, logits, features, weights, where, check)
        elements = head._elements(batch)
        _debug_check(head, elements.bad)
        values, count = head._losses(elements)
        values = values * jnp.where(
            elements.bad, jnp.full_like(elements.weights, jnp.nan), jnp.ones_like(elements.weights)
        )
        total = jnp.sum(masking.weighted(values, elements.weights))
        divisor = head._divisor(elements, values.shape, count) if normalizer is None else None
        if axis_name is not None:
            summed = jax.lax.psum(jnp.stack([total, jnp.float32(0) if divisor is None else divisor]), axis_name)
            total, divisor = summed[0], None if divisor is None else summed[1]
        if head.loss_reduction is Reduction.SUM and normalizer is None:
            loss = total
        else:
            by = divisor if normalizer is None else jnp.asarray(normalizer, jnp.float32)
            loss = reduction.divide(total, by)
        return loss if regularization_losses is None else loss + _sum_scalars(regularization_losses)

    def predictions(
        self, logits: Any, keys: Any = None, *, params: Mapping[str, Any] | None = None
    ) -> dict[str, jax.Array]:
        """The predictions by key; only the asked ones are computed, and an unknown key is refused with the valid ones."""
        head = self._ready(params)
        outputs = head.outputs(_dense(head._check_logits(logits)))
        asked = (keys,) if isinstance(keys, str) else tuple(keys or outputs)
        for key in asked:
            if key not in outputs:
                raise ValueError(f"Unknown prediction key {key!r}. Valid prediction keys include {list(outputs)}.")
        return {key: value() if callable(value) else value for key, value in outputs.items() if key in asked}

    def metrics(self, regularization_losses: Any = None) -> Metrics:
        """Zero metrics: the identity of `+`. Keeps `regularization_loss` if a list is given."""
        regularized = regularization_losses is not None
        head = self._unbound()
        return Metrics(jnp.zeros((slots(head, regularized)[1], 2), jnp.float32), head, regularized)

    def update_metrics(
        self,
        eval_metrics: Metrics,
        features: Any,
        logits: Any,
        labels: Any,
        mode: str | None = None,
        regularization_losses: Any = None,
        *,
        weights: Any = None,
        where: Any = None,
        params: Mapping[str, Any] | None = None,
        check: bool | None = None,
    ) -> Metrics:
        """`eval_metrics + measure(...)`, compiled once. The arguments are those of `loss`."""
        _check_mode(mode)
        if not isinstance(eval_metrics, Metrics):
            raise ValueError(f"eval_metrics must be what head.metrics() gives. Given {type(eval_metrics).__name__}.")
        head = self._ready(params)
        batch = head._gather(labels, logits, features, weights, where, check)
        batch["regularization"] = _regularization(regularization_losses)
        regularized = regularization_losses is not None
        eval_metrics._same_kind(Metrics(None, self._unbound(), regularized))
        update = _update if inputs.is_traced((eval_metrics, head, batch)) else _update_compiled
        return dataclasses.replace(eval_metrics, state=update(eval_metrics.state, head, batch))

    def measure(
        self,
        labels: Any,
        logits: Any,
        features: Any = None,
        regularization_losses: Any = None,
        *,
        weights: Any = None,
        where: Any = None,
        params: Mapping[str, Any] | None = None,
        check: bool | None = None,
    ) -> Metrics:
        """The metrics of this batch alone, plain float32 sums; a notebook cell prints their values."""
        head = self._ready(params)
        batch = head._gather(labels, logits, features, weights, where, check)
        batch["regularization"] = _regularization(regularization_losses)
        measure = _measure if inputs.is_traced((head, batch)) else _measure_compiled
        return Metrics(measure(head, batch), self._unbound(), regularization_losses is not None)

    def encode_labels(self, labels: Any) -> Any:
        """Class names as the ids that a jitted step takes; ids in range pass through. Host side."""
        if isinstance(labels, jax.core.Tracer):
            raise ValueError("encode_labels works on the host: call it before the jitted step.")
        array = inputs.as_array(labels, "labels")
        if inputs.is_text(array):
            return vocabulary.encode(array, self._vocabulary)
        spec = self.label_spec
        if isinstance(spec, LabelSpec):
            _check_label_values(np.asarray(array), spec, np.ones((), bool))
        return np.asarray(array)

    def decode_predictions(self, predictions: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The predictions as NumPy arrays, with `classes` (where `class_ids` is there) and `all_classes` `[D0, n]`."""
        out = {key: np.asarray(value) for key, value in predictions.items()}
        names = self.class_names()
        if names is None or not out:
            return out
        names = np.asarray(names, object)
        if "class_ids" in out:
            out["classes"] = names[out["class_ids"]]
        rows = next(iter(out.values())).shape[0]
        out["all_classes"] = np.broadcast_to(names, (rows, len(names)))
        return out

    def init(self, key: jax.Array) -> dict[str, Any]:
        """The first values of the learned fields: a plain dict for the user's parameter tree, `{}` if there are none."""
        params: dict[str, Any] = {}
        for i, field in enumerate(fields.of_kind(type(self), fields.LEARNED)):
            params[field.name] = jnp.asarray(fields.initializer(field)(self, jax.random.fold_in(key, i)))
        for i, (name, head) in enumerate(self._children().items()):
            if inner := head.init(jax.random.fold_in(key, 1000 + i)):
                params[name] = inner
        return params

    def init_state(self) -> dict[str, Any]:
        """The first values of the running fields, `{}` if there are none."""
        state: dict[str, Any] = {
            field.name: jnp.asarray(fields.initializer(field)(self))
            for field in fields.of_kind(type(self), fields.RUNNING)
        }
        for name, head in self._children().items():
            if inner := head.init_state():
                state[name] = inner
        return state

    def update_state(
        self,
        state: Mapping[str, Any],
        labels: Any,
        logits: Any,
        features: Any = None,
        *,
        weights: Any = None,
        where: Any = None,
        params: Mapping[str, Any] | None = None,
        axis_name: Any = None,
    ) -> dict[str, Any]:
        """The running fields after a training batch; the same on all devices of `axis_name`."""
        head = self._ready({**(params or {}), **state})
        elements = head._elements(head._gather(labels, logits, features, weights, where, None))
        weights = jnp.where(elements.bad, jnp.zeros_like(elements.weights), elements.weights)
        psum = (lambda x: x) if axis_name is None else functools.partial(jax.lax.psum, axis_name=axis_name)
        new = head.advance(elements.labels, elements.logits, weights, psum)
        return jax.tree.map(jax.lax.stop_gradient, {**state, **new})

    def bind(self, params: Mapping[str, Any]) -> "Head":
        """The same head with learned and running fields filled in from a dict as `init` and `init_state` give them."""
        shapes = {**_abstract(self._unbound())}
        unknown = sorted(set(params) - set(shapes))
        if unknown:
            raise ValueError(
                f"{type(self).__name__} has no learned or running field {unknown}. It has {sorted(shapes)}."
            )
        changes: dict[str, Any] = {}
        frozen = {field.name for field in fields.of_kind(type(self), fields.RUNNING)}
        children = self._children()
        for name, value in params.items():
            if name in children:
                changes[name] = children[name].bind(value)
                continue
            if jnp.shape(value) != shapes[name].shape:
                raise ValueError(
                    f"{type(self).__name__}.{name} must have shape {shapes[name].shape}, as head.init makes it. Given "
                    f"{jnp.shape(value)}."
                )
            changes[name] = jax.lax.stop_gradient(value) if name in frozen else value
        return self._replace_children(changes)

    # --- identity -------------------------------------------------------------------------------------------------

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        fields.register(cls)

    def __post_init__(self):
        for field in fields.of_kind(type(self), fields.STATIC, fields.HEADS):
            value = getattr(self, field.name, None)
            object.__setattr__(self, field.name, fields.freeze(field.name, value))
        object.__setattr__(self, "loss_reduction", Reduction.of(self.loss_reduction))
        if self.name is not None and not isinstance(self.name, str):
            raise ValueError(f"name must be a string or None. Given {self.name!r}.")
        if not (self.weight_column is None or isinstance(self.weight_column, str) or callable(self.weight_column)):
            raise ValueError(
                "Weight column must be a key of features or a function features -> weights. Given type: "
                f"{type(self.weight_column).__name__}."
            )
        self.validate()

    def _identity(self) -> tuple[Any, ...]:
        if jax.tree.leaves(self):
            raise ValueError(
                f"{self!r} is bound to parameters: only unbound heads are compared and hashed. Keep the head and its "
                "parameters apart and pass params=."
            )
        return tuple(getattr(self, f.name) for f in fields.of_kind(type(self), fields.STATIC, fields.HEADS))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(self) is not type(other):
            return NotImplemented
        return self._identity() == other._identity()  # type: ignore[union-attr]  # same type as self

    def __hash__(self) -> int:
        return hash((type(self), self._identity()))

    def __repr__(self) -> str:
        parts = []
        inherited = {f.name for f in dataclasses.fields(Head)}
        for field in sorted(dataclasses.fields(type(self)), key=lambda f: f.name in inherited):
            value = getattr(self, field.name)
            if not field.init or not field.repr:
                continue
            if field.default is not dataclasses.MISSING and value is field.default:
                continue
            if isinstance(value, (jax.Array, np.ndarray)):
                parts.append(f"{field.name}=<{value.dtype}{list(value.shape)}>")
            elif field.default is dataclasses.MISSING or value != field.default:
                parts.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"

    # --- machinery ------------------------------------------------------------------------------------------------

    def observed(self) -> dict[str, Observation]:
        """The observations of this head, without data: the layout of its metric state."""
        spec = self.label_spec
        rows = (1,)

        def label(s: LabelSpec) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*rows, s.size), _dtype(s))

        labels = label(spec) if isinstance(spec, LabelSpec) else {k: label(s) for k, s in spec.items()}
        logits = jax.ShapeDtypeStruct((*rows, self.logits_dimension), jnp.float32)

        keys: list[str] = []

        def observe(params, labels, logits):
            observations = self.bind(params)._observations(labels, logits, None)
            keys[:] = observations  # a pytree would sort them
            return tuple(observations.values())

        return dict(zip(keys, jax.eval_shape(observe, _abstract(self), labels, logits), strict=False))

    def _observations(self, labels: Any, logits: jax.Array, term: Term | None) -> dict[str, Observation]:
        """What is observed, the loss first. Without a term (the layout alone is wanted) the loss is not traced."""
        loss = Mean(jnp.zeros_like(logits)) if term is None else Mean(term.values, term.count)
        return {"average_loss": loss, **self.observe(labels, logits)}

    @property
    def _vocabulary(self) -> tuple[str, ...] | None:
        return getattr(self, "label_vocabulary", None)

    def _children(self) -> dict[str, "Head"]:
        """The heads inside, by the name under which their parameters nest."""
        children: dict[str, Head] = {}
        for field in fields.of_kind(type(self), fields.HEADS):
            value = getattr(self, field.name)
            if isinstance(value, Head):
                children[field.name] = value
            elif isinstance(value, tuple):
                children.update({head.name or str(i): head for i, head in enumerate(value)})
        return children

    def _replace_children(self, changes: dict[str, Any]) -> "Head":
        """`dataclasses.replace` that goes past `__init__` and reaches into tuples of heads."""
        head = object.__new__(type(self))
        for field in dataclasses.fields(type(self)):
            value = getattr(self, field.name)
            if field.name in changes:
                value = changes[field.name]
            elif isinstance(value, tuple) and value and all(isinstance(v, Head) for v in value):
                value = tuple(changes.get(v.name or str(i), v) for i, v in enumerate(value))
            object.__setattr__(head, field.name, value)
        return head

    def _unbound(self) -> "Head":
        if not jax.tree.leaves(self):
            return self
        changes: dict[str, Any] = {f.name: None for f in fields.of_kind(type(self), fields.LEARNED, fields.RUNNING)}
        return self._replace_children({**changes, **{name: head._unbound() for name, head in self._children().items()}})

    def _ready(self, params: Mapping[str, Any] | None) -> "Head":
        """The head with its parameters, or an error that says how to give them."""
        head = self if params is None else self.bind(params)
        missing = head._missing()
        if missing:
            raise ValueError(
                f"{type(self).__name__} has learned or running fields without values: {missing}. Make them with "
                "params = head.init(key) (and head.init_state()), then pass params=params, or use head.bind(params)."
            )
        return head

    def _missing(self) -> list[str]:
        own = [
            f.name for f in fields.of_kind(type(self), fields.LEARNED, fields.RUNNING) if getattr(self, f.name) is None
        ]
        return own + [f"{name}.{inner}" for name, head in self._children().items() for inner in head._missing()]

    def _check_logits(self, logits: Any) -> Any:
        if isinstance(logits, LinearLogits):
            logits.check()
            inputs.check_logits(logits.shape, self.logits_dimension)
            return logits
        logits = inputs.as_numbers(logits, "logits")
        inputs.check_logits(tuple(logits.shape), self.logits_dimension)
        return logits

    def _gather(
        self, labels: Any, logits: Any, features: Any, weights: Any, where: Any, check: bool | None
    ) -> dict[str, Any]:
        """What enters compiled code, checked: a dict of arrays with the shapes and dtypes of law."""
        logits = self._check_logits(logits)
        lead = tuple(logits.shape)[:-1]
        sizes = (1, self.logits_dimension) if self.per_logit_weights and self.logits_dimension > 1 else (1,)
        where = None if where is None else inputs.as_where(where, lead, check)
        weights, what = self._weights(weights, features)
        weights = None if weights is None else inputs.as_weights(weights, lead, sizes, what)
        live = _live_on_host(where, weights, check)
        if weights is not None and live is not None and inputs.is_readable(weights, check):
            _check_weight_values(np.asarray(weights), live, what)
        if labels is None:
            raise ValueError(
                f"You must provide labels. Given: None. {type(self).__name__} needs them for its loss and metrics; "
                "for predictions alone call head.predictions(logits)."
            )
        spec = self.label_spec
        if isinstance(spec, LabelSpec):
            labels = self._labels(labels, spec, lead, live, check, "labels")
        else:
            if not isinstance(labels, Mapping) or set(labels) != set(spec):
                given = sorted(labels) if isinstance(labels, Mapping) else f"a {type(labels).__name__}"
                raise ValueError(f"labels must be a dict with the keys {sorted(spec)}. Given {given}.")
            labels = {k: self._labels(labels[k], s, lead, live, check, f"labels[{k!r}]") for k, s in spec.items()}
        columns = inputs.numeric_columns(features) if self.reads_features else {}
        return {"labels": labels, "logits": logits, "weights": weights, "where": where, "features": columns}

    def _weights(self, weights: Any, features: Any) -> tuple[Any, str]:
        column = self.weight_column
        if column is None:
            return weights, "weights"
        if weights is not None:
            raise ValueError(
                f"Weights are given twice: by weights= and by the head's weight_column={column!r}. Use one of them."
            )
        if not isinstance(column, str):
            return column(features), "weights"
        if not isinstance(features, Mapping) or column not in features:
            given = sorted(map(str, features)) if isinstance(features, Mapping) else features
            raise ValueError(f"Feature {column} (the weight_column) is not in features. Given features: {given}.")
        return features[column], f"weight (features[{column!r}])"

    def _labels(self, labels: Any, spec: LabelSpec, lead: Any, live: Any, check: bool | None, what: str) -> Any:
        array = inputs.as_array(labels, what)
        if inputs.is_text(array):
            shown = live if live is not None and live.ndim == array.ndim else None
            array = vocabulary.encode(array, self._vocabulary, _rows(live, array.shape) if shown is None else shown)
        kind = inputs.dtype_kind(array)
        kinds = {"float": ("bool", "int", "float"), "int": ("int",), "bool": ("bool", "int")}[spec.kind]
        if kind not in kinds:
            raise ValueError(
                f"{what} must be {spec.describe()} with a dtype of {' or '.join(kinds)}. Given dtype {array.dtype}."
            )
        if len(array.shape) == len(lead):
            array = array.reshape((*array.shape, 1)) if len(lead) else array
        if len(array.shape) < 2:
            raise ValueError(
                f"{what} must have rank at least 2 (or 1, one label a row). Given shape {tuple(array.shape)}."
            )
        if array.shape[-1] != spec.size:
            raise ValueError(
                f"Mismatched label shape. Expected {what} dimension={spec.size}.  Received {array.shape[-1]} in shape "
                f"{tuple(array.shape)}. Suggested Fix: if the labels are one-hot, pass class ids, labels.argmax(-1); otherwise "
                f"check the head's n_classes or label_dimension, or reshape to {(*lead, spec.size)}."
            )
        if tuple(array.shape) != (*lead, spec.size):
            raise ValueError(
                f"{what} shape must be [D0, D1, ... DN, {spec.size}]. Suggested Fix: give one label to each row of logits. "
                f"expected_labels_shape: {(*lead, spec.size)}. labels_shape: {tuple(array.shape)}."
            )
        if live is not None and inputs.is_readable(array, check):
            _check_label_values(np.asarray(array), spec, live, what)
        return inputs.cast(array, _dtype(spec)) if isinstance(array, np.ndarray) else array

    def _elements(self, batch: dict[str, Any]) -> Elements:
        """The double where, once for every head."""
        logits = batch["logits"]
        lead = tuple(logits.shape)[:-1]
        exists = jnp.ones((*lead, 1), bool) if batch["where"] is None else jnp.asarray(batch["where"])
        weights = jnp.ones((*lead, 1), jnp.float32) if batch["weights"] is None else jnp.asarray(batch["weights"])
        live = exists & (weights != 0)
        row = jnp.any(live, -1, keepdims=True)
        logits = masking_logits(logits, live, row)
        spec = self.label_spec

        def clean(labels: Any, spec: LabelSpec) -> tuple[jax.Array, jax.Array]:
            labels = jnp.asarray(labels)
            mask = live if live.shape[-1] in (1, spec.size) else row
            # Looked at in their own dtype: a cast may turn an illegal value into a legal one.
            illegal = jnp.broadcast_to(mask, labels.shape) & spec.illegal(labels, jnp)
            legal = masking.keep(
                jnp.broadcast_to(mask, labels.shape) & ~illegal, labels.astype(_dtype(spec)), spec.fill
            )
            return legal, illegal if live.shape[-1] == spec.size else jnp.any(illegal, -1, keepdims=True)

        if isinstance(spec, LabelSpec):
            labels, bad = clean(batch["labels"], spec)
        else:
            both = {k: clean(batch["labels"][k], s) for k, s in spec.items()}
            labels, bad = (
                {k: v[0] for k, v in both.items()},
                functools.reduce(jnp.logical_or, (v[1] for v in both.values())),
            )
        bad = (bad & live) | (live & ~((weights > 0) & jnp.isfinite(weights)))
        weights = jnp.where(live, jnp.where(bad, jnp.ones_like(weights), weights), jnp.zeros_like(weights))
        features = {k: masking.keep_rows(row, jnp.asarray(v), 1) for k, v in batch["features"].items()}
        return Elements(labels, logits, weights, exists, bad, features)

    def _losses(self, elements: Elements) -> Term:
        arguments = (elements.labels, elements.logits)
        values = self.losses(*arguments, elements.features) if _takes_features(type(self)) else self.losses(*arguments)
        term = values if isinstance(values, Term) else Term(values)
        lead = tuple(elements.logits.shape)[:-1]
        for part in (p for p in term if p is not None):
            if tuple(jnp.shape(part))[:-1] != lead or jnp.ndim(part) != len(lead) + 1:
                raise ValueError(
                    f"{type(self).__name__}.losses must return per-element losses of shape {(*lead, 1)} or "
                    f"{(*lead, self.logits_dimension)}. Given {jnp.shape(part)}."
                )
        return Term(jnp.asarray(term.values, jnp.float32), term.count)

    def _divisor(self, elements: Elements, shape: tuple[int, ...], count: Any) -> jax.Array:
        shape = jnp.broadcast_shapes(shape, elements.weights.shape)
        multiplicity = {
            Reduction.SUM: jnp.ones_like(elements.weights),
            Reduction.SUM_OVER_BATCH_SIZE: elements.exists.astype(jnp.float32),
            Reduction.MEAN: elements.weights,
            Reduction.SUM_BY_NONZERO_WEIGHTS: (elements.weights != 0).astype(jnp.float32),
        }[self.loss_reduction]
        multiplicity = jnp.broadcast_to(multiplicity, shape)
        return jnp.sum(multiplicity if count is None else masking.weighted(count, multiplicity))


def _measure(head: Head, batch: dict[str, Any]) -> jax.Array:
    """The packed sums `[slots, 1]` of one batch."""
    logits = batch["logits"]
    rows = tiles.tile_rows(tuple(logits.shape)) if head.rowwise else None
    if rows is None or not tiles.is_local(batch):
        return _sums(head, batch)[:, None]
    lazy = isinstance(logits, LinearLogits)
    cut = {k: batch[k] for k in ("labels", "weights", "where")} | {"logits": logits.hidden if lazy else logits}

    def by_tiles(cut, batch):
        def sums(tile, fresh):
            fresh = fresh.reshape(-1, *[1] * (len(logits.shape) - 1))
            lead = (*jax.tree.leaves(tile["logits"])[0].shape[:-1], 1)
            exists = jnp.broadcast_to(fresh, lead) if tile["where"] is None else tile["where"] & fresh
            inner = dataclasses.replace(batch["logits"], hidden=tile["logits"]) if lazy else tile["logits"]
            return _sums(head, {**batch, **tile, "where": exists, "logits": inner, "regularization": None})

        total = tiles.sum_over_rows(sums, cut, logits.shape[0], rows)
        if batch["regularization"] is None:
            return total
        return jnp.concatenate([total[:1], _regularization_sums(batch["regularization"]), total[1:]])

    def whole(cut, batch):
        return _sums(head, batch)

    return jax.lax.platform_dependent(cut, batch, cpu=by_tiles, default=whole)[:, None]


def _sums(head: Head, batch: dict[str, Any]) -> jax.Array:
    elements = head._elements(batch)
    weights = jnp.where(elements.bad, jnp.zeros_like(elements.weights), elements.weights)
    term = head._losses(elements)
    parts = [jnp.sum(elements.bad.astype(jnp.float32))[None]]
    if batch["regularization"] is not None:
        parts.append(_regularization_sums(batch["regularization"]))
    observations = head._observations(elements.labels, elements.logits, term)
    parts += [observation.reduce(weights) for observation in observations.values()]
    return jnp.concatenate(parts)


def _regularization_sums(losses: Any) -> jax.Array:
    return jnp.stack([_sum_scalars(losses), jnp.float32(1)])


def _update(state: jax.Array, head: Head, batch: dict[str, Any]) -> jax.Array:
    return pairs.add(state, _measure(head, batch))


_measure_compiled = jax.jit(_measure)
_update_compiled = jax.jit(_update)


def masking_logits(logits: Any, live: jax.Array, row: jax.Array) -> jax.Array:
    """Float32 logits, 0 where masked; of lazy ones, the rows of the hidden layer are masked."""
    if isinstance(logits, LinearLogits):
        hidden = jnp.asarray(logits.hidden)
        return dataclasses.replace(logits, hidden=masking.keep(row, hidden, 0)).multiply()
    mask = live if live.shape[-1] == logits.shape[-1] else row
    return masking.keep(mask, jnp.asarray(logits, jnp.float32), 0)


def _dense(logits: Any) -> jax.Array:
    return logits.multiply() if isinstance(logits, LinearLogits) else jnp.asarray(logits, jnp.float32)


def _dtype(spec: LabelSpec) -> Any:
    return {"float": jnp.float32, "int": jnp.int32, "bool": jnp.bool_}[spec.kind]


@functools.lru_cache(maxsize=1024)
def _abstract(head: Head) -> dict[str, Any]:
    """Shapes and dtypes of all learned and running fields."""
    if not jax.tree.leaves(head) and not head._missing():
        return {}
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, state = jax.eval_shape(head.init, key), jax.eval_shape(head.init_state)
    merged = {**params, **state}
    for name in set(params) & set(state):
        merged[name] = {**params[name], **state[name]}
    return merged


@functools.lru_cache(maxsize=1024)
def _takes_features(cls: type[Head]) -> bool:
    return "features" in inspect.signature(cls.losses).parameters


def _check_mode(mode: Any) -> None:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} unrecognized. Expected one of {MODES}.")


def _regularization(losses: Any) -> list[Any] | None:
    if losses is None:
        return None
    if not isinstance(losses, (list, tuple)):
        raise ValueError(
            f"regularization_losses must be a list of scalars. Given {type(losses).__name__}: wrap it, [x]."
        )
    for value in losses:
        if jnp.shape(value) != ():
            raise ValueError(f"regularization_losses must be scalars. Given one of shape {jnp.shape(value)}.")
    return [jnp.asarray(value, jnp.float32) for value in losses]


def _sum_scalars(losses: Any) -> jax.Array:
    return sum(_regularization(losses) or (), start=jnp.float32(0))


def _live_on_host(where: Any, weights: Any, check: bool | None) -> np.ndarray | None:
    """Which elements values are checked in, if that can be known here: None where it would stall a device."""
    live = np.ones((), bool)
    for x in (where, weights):
        if x is None:
            continue
        if not inputs.is_readable(x, check):
            return None
        live = live & (np.asarray(x) != 0)
    return live


def _rows(live: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """The host mask as it fits an array of labels that may lack the last axis."""
    if live is None or live.ndim == 0:
        return None
    rows = live.any(-1)
    return rows if rows.shape == shape else None


def _check_weight_values(weights: np.ndarray, live: np.ndarray, what: str) -> None:
    bad = ~((weights >= 0) & np.isfinite(weights)) & live
    if bad.any():
        position = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{what} must be finite and not negative. Given {weights[position]} at index {position}. Use 0 to hide an "
            "element, where=False to leave it out."
        )


def _check_label_values(labels: np.ndarray, spec: LabelSpec, live: np.ndarray, what: str = "labels") -> None:
    if live.ndim and live.shape[-1] not in (1, labels.shape[-1]):
        live = live.any(-1, keepdims=True)
    bad = spec.illegal(labels, np) & live
    if bad.any():
        position = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{what} must be {spec.describe()}. Given {labels[position]} at index {position}, {int(bad.sum())} illegal "
            "in all. Mend the labels, or leave those rows out with where=False."
        )


def _debug_check(head: Head, bad: jax.Array) -> None:
    """A message under `checkify`; nothing at all in a program compiled without it."""
    if isinstance(bad, jax.core.Tracer):
        from jax.experimental import checkify

        checkify.debug_check(
            ~jnp.any(bad),
            "{n} unmasked elements have an illegal label or weight for " + type(head).__name__,
            n=jnp.sum(bad.astype(jnp.int32)),
        )
