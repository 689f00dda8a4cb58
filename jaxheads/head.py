"""The contract: what a head is, for users and for authors.

A head is a frozen dataclass of configuration. Given logits it computes loss, predictions and metrics, as pure
functions. A new head overrides `logits_dimension`, `losses` and `outputs`, and `observe` for metrics of its own:

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
from jax.core import Tracer

from jaxheads.metrics import Mean, MeanView, Metrics, Observation
from jaxheads.metrics.state import slots
from jaxheads.numerics import batch as batches
from jaxheads.numerics import fields, inputs, masking, meshes, pairs, reduction, tiles, vocabulary
from jaxheads.numerics.batch import Elements
from jaxheads.numerics.batch import LabelSpec as LabelSpec
from jaxheads.numerics.fields import learned, running, subheads
from jaxheads.numerics.linear import LinearLogits
from jaxheads.numerics.reduction import Reduction

WeightColumn: TypeAlias = str | Callable[[Any], Any] | None
MODES = (None, "train", "eval", "infer")


class Term(NamedTuple):
    """Per-element losses with an element count of their own (pairs, events, conditional tasks).

    Attributes:
        values: `[..., 1]` or `[..., d]`.
        count: what stands in the place of 1 for each element in every denominator; the same shape.
    """

    values: Any
    count: Any = None


@dataclass_transform(
    frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field, learned, running, subheads)
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Head(abc.ABC):
    """A head: loss, predictions and metrics from logits. Subclass it to write one.

    Authors override `logits_dimension` and `losses`, and where needed `label_spec`, `outputs`, `observe`, `summarize`,
    `validate` and `advance`. Annotated attributes are constructor arguments. A class is either abstract, and named so,
    or never subclassed.

    Args:
        weight_column: a key of `features`, or a function `features -> weights`.
        loss_reduction: a `Reduction` or its text.
        name: suffixes the metric keys, as in `auc/NAME`.
    """

    weight_column: WeightColumn = dataclasses.field(default=None, kw_only=True)
    loss_reduction: Reduction | str = dataclasses.field(default=Reduction.SUM_OVER_BATCH_SIZE, kw_only=True)
    name: str | None = dataclasses.field(default=None, kw_only=True)

    # For authors of a head.

    if TYPE_CHECKING:
        # A class attribute or a property, as the author likes; a type checker would insist on one of them.
        logits_dimension: ClassVar[Any]
    else:

        @property
        @abc.abstractmethod
        def logits_dimension(self) -> int:
            """The size of the last axis of the logits."""

    @property
    def label_spec(self) -> batches.Specs:
        """What labels are legal; a dict of specs for structured labels (time and event; a list with its mask)."""
        return LabelSpec(self.logits_dimension)

    @abc.abstractmethod
    def losses(self, labels: Any, logits: jax.Array) -> jax.Array | Term:
        """Per-element losses `[..., 1]` or `[..., d]`: unreduced, unweighted; may take `features` as a third."""

    def outputs(self, logits: jax.Array) -> Mapping[str, Any]:
        """Predictions by key: arrays, or functions without arguments that make them when asked for."""
        return {"logits": logits}

    def observe(self, labels: Any, logits: jax.Array) -> Mapping[str, Observation]:
        """What the metrics accumulate beside `average_loss`, by a static key."""
        return {}

    def summarize(self, seen: Mapping[str, Any]) -> Mapping[str, Any]:
        """Metrics by name from what was observed; by default each mean under its own key."""
        return {k: view.mean for k, view in seen.items() if isinstance(view, MeanView) and k != "average_loss"}

    def validate(self) -> None:  # noqa: B027  (a hook that most heads leave alone)
        """Refuses bad configuration. Static fields are frozen already; runs once, at construction."""

    def advance(
        self, labels: Any, logits: jax.Array, weights: jax.Array, psum: Callable[[Any], Any]
    ) -> Mapping[str, Any]:
        """The next values of the running fields, from a batch; `psum` sums over devices."""
        return {}

    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes, for heads whose predictions have class ids."""
        return None

    @property
    def per_logit_weights(self) -> bool:
        """Whether weights may have the shape of the logits."""
        return False

    @property
    def reads_features(self) -> bool:
        """Whether `losses` needs the numeric columns of `features`: by default, if it has an argument of that name."""
        return _takes_features(type(self))

    @property
    def rowwise(self) -> bool:
        """Whether loss and observations of a row depend on that row alone: then large batches are cut in tiles."""
        return False

    # For users.

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
        if axis_name is not None or inputs.is_traced((head, batch, normalizer)):
            loss = head._reduced_loss(batch, normalizer, axis_name)
        else:
            loss = _loss_compiled(head, batch, normalizer)
        return loss if regularization_losses is None else loss + _sum_scalars(_scalars(regularization_losses))

    def predictions(self, logits: Any, keys: Any = None, *, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Predictions by key; only those asked for are computed. An unknown key is refused with the valid ones."""
        head = self._ready(params)
        outputs: dict[str, Any] = dict(head.outputs(batches.dense(batches.check_logits(logits, head.logits_dimension))))
        asked = (keys,) if isinstance(keys, str) else tuple(keys or outputs)
        for key in asked:
            if key not in outputs:
                raise ValueError(f"Unknown prediction key {key!r}. Valid prediction keys include {list(outputs)}.")
        return {key: value() if callable(value) else value for key, value in outputs.items() if key in asked}

    def metrics(self, regularization_losses: Any = None) -> Metrics:
        """Zero metrics: the identity of `+`. Keeps `regularization_loss` if a list is given."""
        head, regularized = fields.unbound(self), regularization_losses is not None
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
        batch["regularization"] = _scalars(regularization_losses)
        eval_metrics.check_same_kind(Metrics(None, fields.unbound(self), regularization_losses is not None))
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
        """The metrics of this batch alone, as plain float32 sums; a notebook cell prints their values."""
        head = self._ready(params)
        batch = head._gather(labels, logits, features, weights, where, check)
        batch["regularization"] = _scalars(regularization_losses)
        measure = _measure if inputs.is_traced((head, batch)) else _measure_compiled
        return Metrics(measure(head, batch), fields.unbound(self), regularization_losses is not None)

    def encode_labels(self, labels: Any) -> Any:
        """Class names as the ids that a jitted step takes; legal numbers pass through. Host side."""
        if isinstance(labels, Tracer):
            raise ValueError("encode_labels works on the host: call it before the jitted step.")
        array = inputs.as_array(labels, "labels")
        if inputs.is_text(array):
            return vocabulary.encode(np.asarray(array), self._vocabulary)
        spec = self.label_spec
        if isinstance(spec, LabelSpec):
            batches.check_label_values(np.asarray(array), spec, np.asarray(True))
        return np.asarray(array)

    def decode_predictions(self, predictions: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Predictions as NumPy arrays, with `classes` (where `class_ids` is there) and `all_classes` `[D0, n]`."""
        out = {key: np.asarray(value) for key, value in predictions.items()}
        names = self.class_names()
        if names is None or not out:
            return out
        if "class_ids" in out:
            out["classes"] = np.asarray(names, object)[out["class_ids"]]
        rows = next(iter(out.values())).shape[0]
        out["all_classes"] = np.tile(np.asarray(names, object), (rows, 1))
        return out

    def init(self, key: jax.Array) -> dict[str, Any]:
        """The first values of the learned fields: a plain dict for your parameter tree, `{}` if there are none."""
        return fields.init(self, key)

    def init_state(self) -> dict[str, Any]:
        """The first values of the running fields: a plain dict to carry beside batch statistics."""
        return fields.init_state(self)

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
        head = self._ready(fields.merge(params or {}, state))
        elements = batches.clean(head.label_spec, head._gather(labels, logits, features, weights, where, None))
        psum = (lambda x: x) if axis_name is None else functools.partial(jax.lax.psum, axis_name=axis_name)
        new = head.advance(elements.labels, elements.logits, _counted(elements), psum)
        return jax.tree.map(jax.lax.stop_gradient, {**state, **new})

    def bind(self, params: Mapping[str, Any]) -> "Head":
        """The same head with learned and running fields filled in from dicts as `init` and `init_state` make them."""
        return fields.bind(self, params)

    # Identity.

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        fields.register(cls)

    def __post_init__(self):
        for field in fields.of_kind(type(self), fields.STATIC, fields.HEADS):
            object.__setattr__(self, field.name, fields.freeze(field.name, getattr(self, field.name)))
        object.__setattr__(self, "loss_reduction", Reduction.of(self.loss_reduction))
        if self.name is not None and not isinstance(self.name, str):
            raise ValueError(f"name must be a string or None. Given {self.name!r}.")
        if not (self.weight_column is None or isinstance(self.weight_column, str) or callable(self.weight_column)):
            raise ValueError(
                "weight_column must be a key of features or a function features -> weights. Given type: "
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
        if not isinstance(other, Head) or type(self) is not type(other):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash((type(self), self._identity()))

    def __repr__(self) -> str:
        inherited = {f.name for f in dataclasses.fields(Head)}
        parts = []
        for field in sorted(dataclasses.fields(self), key=lambda f: f.name in inherited):
            value = getattr(self, field.name)
            if isinstance(value, (jax.Array, np.ndarray)):
                parts.append(f"{field.name}=<{value.dtype}{list(value.shape)}>")
            elif field.init and value is not field.default and value != field.default:
                parts.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"

    # Machinery.

    def observed(self) -> dict[str, Observation]:
        """The observations of this head, without data: the layout of its metric state."""

        def label(spec: LabelSpec, _: str) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((1, spec.size), spec.dtype)

        labels = batches.per_label(self.label_spec, label)
        logits = jax.ShapeDtypeStruct((1, self.logits_dimension), jnp.float32)
        keys: list[str] = []

        def observe(params, labels, logits):
            observations = {"average_loss": Mean(logits), **self.bind(params).observe(labels, logits)}
            keys[:] = observations  # a pytree would sort them
            return tuple(observations.values())

        found = jax.eval_shape(observe, fields.abstract(self), labels, logits)
        return dict(zip(keys, found, strict=True))

    @property
    def _vocabulary(self) -> tuple[str, ...] | None:
        return getattr(self, "label_vocabulary", None)

    def _ready(self, params: Mapping[str, Any] | None) -> "Head":
        """The head with its parameters, or an error that says how to give them."""
        head = self if params is None else self.bind(params)
        if missing := fields.missing(head):
            raise ValueError(
                f"{type(self).__name__} has learned or running fields without values: {missing}. Make them with "
                "params = head.init(key) (and head.init_state()), then pass params=params, or use head.bind(params)."
            )
        return head

    def _gather(
        self, labels: Any, logits: Any, features: Any, weights: Any, where: Any, check: bool | None
    ) -> dict[str, Any]:
        weights, weights_name = self._weights(weights, features)
        batch = batches.gather(
            self.label_spec,
            self.logits_dimension,
            labels,
            logits,
            weights,
            where,
            weights_name=weights_name,
            per_logit_weights=self.per_logit_weights,
            label_vocabulary=self._vocabulary,
            check=check,
        )
        batch["features"] = inputs.numeric_columns(features) if self.reads_features else {}
        return batch

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

    def _reduced_loss(self, batch: dict[str, Any], normalizer: Any, axis_name: Any) -> jax.Array:
        """The loss of a gathered batch, without regularization."""
        elements = batches.clean(self.label_spec, batch)
        _debug_check(self, elements.bad)
        values, count = self._term(elements)
        # By multiplication: `where(bad, nan, loss)` would have gradient 0.
        values = values * jnp.where(elements.bad, jnp.nan, jnp.ones_like(elements.weights))
        total = masking.total(masking.weighted(values, elements.weights))
        by = self._divisor(elements, values.shape, count) if normalizer is None else jnp.float32(normalizer)
        if axis_name is not None:
            # A normalizer is global already.
            total, summed = jax.lax.psum(jnp.stack([total, by]), axis_name)
            by = summed if normalizer is None else by
        return total if self.loss_reduction is Reduction.SUM and normalizer is None else reduction.divide(total, by)

    def _sums(self, batch: dict[str, Any]) -> jax.Array:
        """The packed sums `[slots]` of a gathered batch."""
        elements = batches.clean(self.label_spec, batch)
        observations = {"average_loss": Mean(*self._term(elements)), **self.observe(elements.labels, elements.logits)}
        counted = _counted(elements)
        parts = [masking.total(elements.bad.astype(jnp.float32))[None], *_regularization_sums(batch)]
        return jnp.concatenate(parts + [observation.reduce(counted) for observation in observations.values()])

    def _term(self, elements: Elements) -> Term:
        """The per-element losses, checked."""
        arguments = [elements.labels, elements.logits]
        if _takes_features(type(self)):
            arguments.append(elements.features)
        values = self.losses(*arguments)
        term = values if isinstance(values, Term) else Term(values)
        lead = tuple(elements.logits.shape)[:-1]
        for part in (part for part in term if part is not None):
            if jnp.shape(part)[:-1] != lead or jnp.ndim(part) != len(lead) + 1:
                raise ValueError(
                    f"{type(self).__name__}.losses must return per-element losses of shape {(*lead, 1)} or "
                    f"{(*lead, self.logits_dimension)}. Given {jnp.shape(part)}."
                )
        return Term(jnp.asarray(term.values, jnp.float32), term.count)

    def _divisor(self, elements: Elements, shape: tuple[int, ...], count: Any) -> jax.Array:
        multiplicity = {
            Reduction.SUM: jnp.ones_like(elements.weights),
            Reduction.SUM_OVER_BATCH_SIZE: elements.exists.astype(jnp.float32),
            Reduction.MEAN: elements.weights,
            Reduction.SUM_BY_NONZERO_WEIGHTS: (elements.weights != 0).astype(jnp.float32),
        }[Reduction.of(self.loss_reduction)]
        multiplicity = jnp.broadcast_to(multiplicity, jnp.broadcast_shapes(shape, elements.weights.shape))
        return masking.total(multiplicity if count is None else masking.weighted(count, multiplicity))


def _measure(head: Head, batch: dict[str, Any]) -> jax.Array:
    """The packed sums `[slots, 1]` of one batch."""
    logits = batch["logits"]
    rows = tiles.tile_rows(tuple(logits.shape)) if head.rowwise else None
    if rows is None or not meshes.is_local(batch):
        return head._sums(batch)[:, None]
    lazy = isinstance(logits, LinearLogits)
    cut = {k: batch[k] for k in ("labels", "weights", "where")} | {"logits": logits.hidden if lazy else logits}

    def by_tiles(cut, batch):
        def sums(tile, fresh):
            inner = dataclasses.replace(batch["logits"], hidden=tile["logits"]) if lazy else tile["logits"]
            fresh = jnp.broadcast_to(fresh.reshape(-1, *[1] * (len(inner.shape) - 1)), (*inner.shape[:-1], 1))
            exists = fresh if tile["where"] is None else masking.keep(fresh, tile["where"], 0)
            return head._sums({**batch, **tile, "where": exists, "logits": inner, "regularization": None})

        total = tiles.sum_over_rows(sums, cut, logits.shape[0], rows)
        return jnp.concatenate([total[:1], *_regularization_sums(batch), total[1:]])

    return jax.lax.platform_dependent(cut, batch, cpu=by_tiles, default=lambda _, batch: head._sums(batch))[:, None]


def _counted(elements: Elements) -> jax.Array:
    """The weights that metrics count with: bad elements are left out."""
    return jnp.where(elements.bad, jnp.zeros_like(elements.weights), elements.weights)


def _regularization_sums(batch: dict[str, Any]) -> list[jax.Array]:
    """The two sums of the regularization's mean over updates, if it is kept."""
    losses = batch["regularization"]
    return [] if losses is None else [jnp.stack([_sum_scalars(losses), jnp.float32(1)])]


def _update(state: jax.Array, head: Head, batch: dict[str, Any]) -> jax.Array:
    return pairs.add(state, _measure(head, batch))


_loss_compiled = jax.jit(lambda head, batch, normalizer: head._reduced_loss(batch, normalizer, None))
_measure_compiled = jax.jit(_measure)
_update_compiled = jax.jit(_update)


@functools.lru_cache(maxsize=1024)
def _takes_features(cls: type[Head]) -> bool:
    return "features" in inspect.signature(cls.losses).parameters


def _check_mode(mode: Any) -> None:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} unrecognized. Expected one of {MODES}.")


def _scalars(losses: Any) -> list[Any] | None:
    if losses is None:
        return None
    if not isinstance(losses, (list, tuple)):
        given = type(losses).__name__
        raise ValueError(f"regularization_losses must be a list of scalars. Given {given}: wrap it, [x].")
    for value in losses:
        if jnp.shape(value) != ():
            raise ValueError(f"regularization_losses must be scalars. Given one of shape {jnp.shape(value)}.")
    return [jnp.asarray(value, jnp.float32) for value in losses]


def _sum_scalars(losses: Any) -> jax.Array:
    return functools.reduce(jnp.add, losses, jnp.float32(0))


def _debug_check(head: Head, bad: jax.Array) -> None:
    """A message under `checkify`; nothing at all in a program compiled without it."""
    if isinstance(bad, Tracer):
        from jax.experimental import checkify

        message = "{n} unmasked elements have an illegal label or weight for " + type(head).__name__
        checkify.debug_check(~jnp.any(bad), message, n=jnp.sum(bad.astype(jnp.int32)))
