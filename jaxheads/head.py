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
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads import spec
from jaxheads.losses import terms
from jaxheads.losses.terms import Term as Term
from jaxheads.metrics import (
    Bootstrap,
    Count,
    FunctionMetric,
    Grouped,
    Mean,
    MeanView,
    Membership,
    Metric,
    Metrics,
    Observation,
    ScoresView,
    Slices,
    reduced,
)
from jaxheads.metrics.state import joined, metric_names, slots
from jaxheads.numerics import batch as batches
from jaxheads.numerics import columns, fields, inputs, masking, meshes, pairs, reduction, tiles
from jaxheads.numerics import labels as rules
from jaxheads.numerics.batch import Elements
from jaxheads.numerics.configuration import Configuration
from jaxheads.numerics.fields import learned as learned
from jaxheads.numerics.fields import running as running
from jaxheads.numerics.fields import subheads as subheads
from jaxheads.numerics.labels import LabelSpec as LabelSpec
from jaxheads.numerics.linear import LinearLogits as LinearLogits
from jaxheads.numerics.reduction import Divisor, Reduction
from jaxheads.spec import EstimatorSpec, ExportOutput, PredictOutput

WeightColumn: TypeAlias = str | Callable[[Any], Any] | None
MODES = (None, "train", "eval", "infer")
AVERAGE_LOSS = "average_loss"
DIVISOR = "divisor"
COUNT = "slice_count"
RESERVED = ("slice", "count", "regularization_loss")  # what metrics of slices, and of a regularized loss, are called


class NoClosedForm(ValueError):
    """A head whose best constant logits no formula gives."""


class Head(Configuration, abc.ABC):
    """A head: loss, predictions and metrics from logits. Subclass it to write one.

    Authors override `logits_dimension` and `losses`, and where needed `label_spec`, `outputs`, `observe`, `summarize`,
    `validate` and `advance`. Annotated attributes are constructor arguments. A class is either abstract, and named so,
    or never subclassed.

    Args:
        weight_column: a key of `features`, or a function `features -> weights`.
        loss_reduction: a `Reduction` or its text.
        name: suffixes the metric keys, as in `auc/NAME`.
        extra_metrics: what `with_metrics` adds.
        slices: groups of the data that get every metric too.
        bootstrap: replicas from which `metrics.compute(confidence=0.95)` makes intervals; updates then need a `key`.
    """

    weight_column: WeightColumn = dataclasses.field(default=None, kw_only=True)
    loss_reduction: Reduction | str = dataclasses.field(default=Reduction.SUM_OVER_BATCH_SIZE, kw_only=True)
    name: str | None = dataclasses.field(default=None, kw_only=True)
    extra_metrics: Sequence[Metric] = dataclasses.field(default=(), kw_only=True)
    slices: Slices | None = dataclasses.field(default=None, kw_only=True)
    bootstrap: Bootstrap | None = dataclasses.field(default=None, kw_only=True)

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
    def label_spec(self) -> rules.Specs:
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

    def sources(self, labels: Any, logits: jax.Array) -> Mapping[str, Callable[[], Observation]]:
        """What metrics of `with_metrics` may read, by name, as functions that make it: nothing unread is computed."""
        return {}

    def summarize(self, seen: Mapping[str, Any]) -> Mapping[str, Any]:
        """Metrics by name from what was observed.

        By default each mean under its own key, and of a score histogram the areas, `KEY/auc` and
        `KEY/auc_precision_recall`.
        """
        out: dict[str, Any] = {}
        for key, view in seen.items():
            if isinstance(view, MeanView) and key != AVERAGE_LOSS:
                out[key] = view.mean
            elif isinstance(view, ScoresView):
                out |= {f"{key}/auc": view.roc_auc(), f"{key}/auc_precision_recall": view.pr_auc()}
        return out

    def advance(
        self, labels: Any, logits: jax.Array, weights: jax.Array, psum: Callable[[Any], Any]
    ) -> Mapping[str, Any]:
        """The next values of the running fields, from a batch; `psum` sums over devices.

        Weights are 0 where an element is masked or bad, and a step's share of them where sequences are averaged. A head
        with heads inside passes on what they need:
        `{"inner": self.inner.advance(labels, logits, weights, psum)}`.
        """
        return {}

    def best_constant(self, labels: Any, weights: np.ndarray) -> Any:
        """The constant logits `[logits_dimension]` at which the weighted loss is least, for `constant_logits`.

        On the host, in NumPy: `labels` float64 `[n, size]` and `weights` float64 `[n, 1]` or `[n, d]`, of the elements
        that weigh anything.
        """
        raise NoClosedForm(
            f"{type(self).__name__} has no best constant logits in closed form. Start from zeros, or fit them: "
            "minimize head.loss over one row of logits, broadcast to all."
        )

    def signatures(self, predictions: Mapping[str, Any]) -> Mapping[str, ExportOutput]:
        """What a server returns, from all predictions: by default they all, as `serving_default` and `predict`."""
        everything = PredictOutput(dict(predictions))
        return {"serving_default": everything, "predict": everything}

    @property
    def vocabulary(self) -> tuple[str, ...] | None:
        """The names by which labels may be given: by default the field `label_vocabulary`, if there is one."""
        return getattr(self, "label_vocabulary", None)

    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes, for heads whose predictions are of classes."""
        return None

    def to_array(self, labels: Any, ids: bool) -> Any:
        """Host labels of a form of the head's own (lists of names a row) encoded; `ids`: lists of numbers too."""
        return labels

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
            normalizer: replaces the divisor; one global number, not negative, never summed over devices.
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
        normalizer = head._normalizer(normalizer)
        if axis_name is not None or inputs.is_traced((head, batch, normalizer)):
            loss = head._reduced_loss(batch, normalizer, axis_name)
        else:
            loss = _loss_compiled(head, batch, normalizer)
        regularization = inputs.as_scalars(regularization_losses)
        return loss if regularization is None else loss + inputs.add_scalars(regularization)

    def predictions(self, logits: Any, keys: Any = None, *, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Predictions by key; only those asked for are computed. An unknown key is refused with the valid ones."""
        return self._ready(params)._predict(logits, keys)

    def export_outputs(self, logits: Any, *, params: Mapping[str, Any] | None = None) -> dict[str, ExportOutput]:
        """What a server returns, by signature: pytrees of arrays, with class names as static metadata."""
        head = self._ready(params)
        return dict(head.signatures(head._predict(logits, None)))

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
        key: jax.Array | None = None,
    ) -> Metrics:
        """`eval_metrics + measure(...)`, compiled once. The arguments are those of `loss`.

        A head with a `bootstrap` needs a `key`, a new one for every batch and device.
        """
        _check_mode(mode)
        if not isinstance(eval_metrics, Metrics):
            raise ValueError(f"eval_metrics must be what head.metrics() gives. Given {type(eval_metrics).__name__}.")
        head = self._ready(params)
        batch = head._gather(labels, logits, features, weights, where, check)
        batch = head._grouped(batch, features, key, check)
        batch["regularization"] = inputs.as_scalars(regularization_losses)
        eval_metrics.check_size()
        if lead := jnp.shape(eval_metrics.state)[:-2]:
            raise ValueError(
                f"update_metrics adds one batch to one state. Given a state with leading axes {lead}: the batch would "
                "count once for each of its entries. Call it inside the pmap or vmap that made them; inside shard_map, "
                "where an axis of size 1 is left, take jax.tree.map(lambda x: x[0], metrics), and x[None] at the end; "
                "or merge them there, with .psum(axis_name)."
            )
        eval_metrics.check_same_kind(Metrics(None, fields.unbound(self), regularization_losses is not None))
        update = _update if inputs.is_traced((eval_metrics, head, batch)) else _update_compiled
        return dataclasses.replace(eval_metrics, state=update(eval_metrics.state, head, batch))

    def with_metrics(self, *metrics: Metric, **functions: Callable[[Any, jax.Array], Any]) -> Self:
        """The same head with more metrics: what nobody asks for costs nothing, what shares a state is paid once.

        Args:
            metrics: of the catalogue `jh.metrics`, or your own.
            functions: by name, `(labels, logits) -> one value an element`, of which the weighted mean is kept.

        Raises:
            ValueError: what is no metric; a metric that reads what this head does not have; a name that is taken.

        >>> import jaxheads as jh
        >>> head = jh.RegressionHead().with_metrics(bias=lambda labels, logits: logits - labels)
        >>> head.measure(labels=[1.0, 2.0], logits=[[2.0], [2.5]]).compute()["bias"]
        np.float32(0.75)
        """
        added = (*metrics, *(FunctionMetric(name, function) for name, function in functions.items()))
        return dataclasses.replace(self, extra_metrics=(*self.extra_metrics, *added))

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
        key: jax.Array | None = None,
    ) -> Metrics:
        """The metrics of this batch alone, as plain float32 sums; a notebook cell prints their values."""
        head = self._ready(params)
        batch = head._gather(labels, logits, features, weights, where, check)
        batch = head._grouped(batch, features, key, check)
        batch["regularization"] = inputs.as_scalars(regularization_losses)
        measure = _measure if inputs.is_traced((head, batch)) else _measure_compiled
        return Metrics(measure(head, batch), fields.unbound(self), regularization_losses is not None)

    def constant_logits(
        self, labels: Any, weights: Any = None, where: Any = None, *, features: Any = None
    ) -> np.ndarray:
        """The logits that do best if all examples get the same: at them the weighted loss is least. Host side.

        Where gradient boosting starts, a bias initializer, and a baseline: `head.measure` of them, broadcast.

        Args:
            labels, weights, where: as for `loss`; the values of device arrays are checked too.
            features: where a `weight_column`, or the mask of sequences, is looked up.

        Returns:
            Float32 `[logits_dimension]`; of a `MultiHead` those of its heads, in their order. What would be infinite,
            the logit of a class that was never or always seen, is cut at -30 and 30.

        Raises:
            ValueError: a head without a closed form, as with a `loss_fn`; no element that weighs anything; what `loss`
                raises.

        >>> import flax.linen as nn
        >>> import numpy as np
        >>> import jaxheads as jh
        >>> head, labels = jh.BinaryClassHead(), np.array([1, 0, 0, 0])
        >>> constant = head.constant_logits(labels)
        >>> constant  # ln(1/3)
        array([-1.0986123], dtype=float32)
        >>> last_layer = nn.Dense(1, bias_init=nn.initializers.constant(constant))
        >>> baseline = head.measure(labels=labels, logits=np.broadcast_to(constant, (4, 1)))
        >>> baseline.compute()["prediction/mean"]
        np.float32(0.25)
        """
        if inputs.is_traced((labels, weights, where, features)):
            raise ValueError("constant_logits works on the host: call it outside jit.")
        batch = self._gather(labels, self._zero_logits(labels), features, weights, where, True)
        return np.asarray(self._constants(jax.tree.map(np.asarray, batch)), np.float32)

    def encode_labels(self, labels: Any, where: Any = None) -> Any:
        """Class names as the ids that a jitted step takes, and legal numbers in its dtype. Host side.

        Refuses what an eager loss refuses. Rows where `where` is False may hold anything; they stay illegal (an unknown
        name is -1), which the step accepts under the same `where` and shows without it.
        """
        if inputs.is_traced((labels, where)):
            raise ValueError("encode_labels works on the host: call it before the jitted step.")
        to_array = functools.partial(self.to_array, ids=True)
        return rules.encode(self.label_spec, labels, where, self.vocabulary, to_array)

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
        fields.check_state(self, state, "state", "as head.init_state() makes it")
        head = self._ready(fields.merge(params or {}, state))
        return head._advanced(head._gather(labels, logits, features, weights, where, None), axis_name)

    def divisor(
        self,
        labels: Any,
        logits: Any,
        features: Any = None,
        *,
        weights: Any = None,
        where: Any = None,
        params: Mapping[str, Any] | None = None,
        axis_name: Any = None,
    ) -> Any:
        """What the loss of a whole batch is divided by: given as `normalizer`, the losses of its parts add up to it.

        Only the shape of the logits matters, unless the head counts elements by them.
        """
        head = self._ready(params)
        sums = head._loss_sums(head._gather(labels, logits, features, weights, where, None), axis_name)
        return head._divisor_of(meshes.psum(sums, axis_name))

    def create_estimator_spec(
        self,
        features: Any,
        mode: str,
        logits: Any,
        labels: Any = None,
        optimizer: Any = None,
        trainable_variables: Any = None,
        train_op_fn: Callable[..., Any] | None = None,
        update_ops: Any = None,
        regularization_losses: Any = None,
        *,
        opt_state: Any = None,
        weights: Any = None,
        where: Any = None,
        params: Any = None,
        axis_name: Any = None,
        key: jax.Array | None = None,
    ) -> EstimatorSpec:
        """All that a step of training, evaluation or prediction gives, as one pytree.

        Args:
            features, labels, weights, where: as for `loss`.
            mode: "train", "eval" or "infer".
            logits: as for `loss`, or a function of the trainable variables: `v -> logits` or `v -> (logits,
                model_state)`. With an optimizer it must be a function.
            optimizer: an optax `GradientTransformation`. Either it or `train_op_fn` in training, not both.
            trainable_variables: the pytree that `optimizer` changes.
            train_op_fn: `loss -> train_op`, or `(loss, grads) -> train_op` if it has such an argument without default.
            update_ops: a pytree of other updates (batch statistics) to carry along; functions in it are called.
            regularization_losses: scalars, or functions of the trainable variables.
            opt_state: of the optimizer; made by `optimizer.init` if None.
            params: the learned and running fields, as `bind` takes them, or a function of the trainable variables.
            axis_name: as for `loss`; metrics are summed over it too, and gradients averaged.
            key: for the replicas of a head with a `bootstrap`.

        Returns:
            An `EstimatorSpec`. In training its `train_op` is what `train_op_fn` returned, or a `TrainOp` with the new
            variables, optimizer state, model state and running fields.

        Raises:
            ValueError: an unknown mode; in training neither or both of `optimizer` and `train_op_fn`, logits that are
                no function of the variables that the optimizer is to change; and what `loss` raises.
        """
        given = spec.Given(features, labels, logits, weights, where, params, regularization_losses, axis_name, key)
        training = spec.Training(optimizer, trainable_variables, train_op_fn, update_ops, opt_state)
        return spec.create(self, mode, given, training)

    def bind(self, params: Mapping[str, Any]) -> "Head":
        """The same head with learned and running fields filled in from dicts as `init` and `init_state` make them."""
        return fields.bind(self, params)

    # Machinery. A head made of heads overrides what begins with an underscore here, and `observed` and `read`.

    def __post_init__(self):
        object.__setattr__(self, "loss_reduction", Reduction.of(self.loss_reduction))
        if self.name is not None and not isinstance(self.name, str):
            raise ValueError(f"name must be a string or None. Given {self.name!r}.")
        if not (self.weight_column is None or isinstance(self.weight_column, str) or callable(self.weight_column)):
            raise ValueError(
                "weight_column must be a key of features or a function features -> weights. Given type: "
                f"{type(self.weight_column).__name__}."
            )
        examples = {"slices": (Slices, 'jh.Slices("origin", 3)'), "bootstrap": (Bootstrap, "jh.Bootstrap(200)")}
        for name, (kind, example) in examples.items():
            if not isinstance(given := getattr(self, name), (kind, type(None))):
                raise ValueError(f"{name} must be {example}, or None. Given {given!r}.")
        for metric in self.extra_metrics:
            if not isinstance(metric, Metric):
                raise ValueError(
                    f"with_metrics() takes metrics, as jh.metrics.RocAuc(), and functions by name. Given {metric!r}."
                )
        super().__post_init__()
        if self.extra_metrics:
            metric_names(fields.unbound(self))  # refuses names that clash, and metrics that read what is not there

    def observed(self) -> dict[str, Observation]:
        """The observations of this head, without data: the layout of its metric state."""

        def label(spec: LabelSpec, _: str) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((1, spec.size), spec.dtype)

        labels = rules.per_label(self.label_spec, label)
        logits = jax.ShapeDtypeStruct((1, self.logits_dimension), jnp.float32)
        keys: list[str] = []

        def observe(params, labels, logits):
            observations: dict[str, Observation] = {AVERAGE_LOSS: Mean(logits)}
            observations |= self.bind(params)._observations(labels, logits)
            if self.slices is not None:
                observations[COUNT] = Count(logits)
            keys[:] = observations  # a pytree would sort them
            return tuple(observations.values())

        found = jax.eval_shape(observe, fields.abstract(self), labels, logits)
        return {key: self._in_groups(inner) for key, inner in zip(keys, found, strict=True)}

    def _in_groups(self, observation: Observation) -> Observation:
        """What the state keeps of an observation: with groups and replicas it is kept for each."""
        if self.slices is None and self.bootstrap is None:
            return observation
        replicas, groups = self.bootstrap.replicas if self.bootstrap else 0, self.slices.n if self.slices else 0
        return Grouped(observation, replicas, groups)

    def read(self, seen: Mapping[str, Any]) -> dict[tuple[str, str | None], Any]:
        """All metrics from views of what was observed, by key and the name that is appended to it."""
        # What is kept for other metrics alone is theirs to read.
        plain = dataclasses.replace(fields.unbound(self), extra_metrics=()) if self.extra_metrics else None
        own = {key: seen[key] for key in slots(plain, False)[0] if key in seen} if plain is not None else dict(seen)
        own.pop(COUNT, None)
        values = {AVERAGE_LOSS: seen[AVERAGE_LOSS].mean, **self.summarize(own)}
        for metric in self.extra_metrics:
            for key, value in metric.summarize(seen).items():
                if key in values or key in RESERVED:
                    raise ValueError(
                        f"{metric!r} gives {key!r}, which {type(self).__name__} has already. Leave it out, or give it "
                        "another name."
                    )
                values[key] = value
        return {(key, self.suffix): value for key, value in values.items()}

    @property
    def suffix(self) -> str | None:
        """What is appended to the keys of the metrics."""
        return self.name

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
            label_vocabulary=self.vocabulary,
            to_array=functools.partial(self.to_array, ids=False),
            check=check,
        )
        batch["features"] = columns.numeric_columns(features) if self.reads_features else {}
        return batch

    def _zero_logits(self, labels: Any) -> Any:
        """Logits of 0 for every label, in no memory."""
        leads: list[tuple[int, ...]] = []

        def note(spec: LabelSpec, label: Any, what: str) -> None:
            label, _ = rules.as_encoded(self.to_array(label, ids=False))
            array = inputs.as_array(label, what, names=self.vocabulary is not None)
            leads.append(rules.leading_shape(spec, tuple(array.shape)))

        rules.each_label(self.label_spec, labels, note)
        return np.broadcast_to(np.float32(0), (*leads[0], self.logits_dimension))

    def _constants(self, batch: dict[str, Any]) -> np.ndarray:
        """The best constant logits of a gathered batch, float64."""
        elements = batches.clean(self.label_spec, batch)
        scale = 1.0 if elements.scale is None else np.asarray(elements.scale, np.float64)
        weights = np.asarray(elements.counted, np.float64) * scale
        weights = weights.reshape(-1, weights.shape[-1])
        seen = np.asarray(weights.any(-1))
        if not seen.any():
            raise ValueError(
                f"constant_logits needs elements that weigh something. Given {seen.size} for {type(self).__name__}, of "
                "which none does: they are masked, or their weight is zero."
            )
        labels = jax.tree.map(lambda x: np.asarray(x, np.float64).reshape(seen.size, -1)[seen], elements.labels)
        found = np.asarray(self.best_constant(labels, weights[seen]), np.float64)
        if found.shape != (self.logits_dimension,):
            raise ValueError(
                f"{type(self).__name__}.best_constant must return shape {(self.logits_dimension,)}. Given "
                f"{found.shape}."
            )
        return found

    def _weights(self, weights: Any, features: Any) -> tuple[Any, str]:
        column = self.weight_column
        if column is None:
            return weights, "weights"
        if weights is not None:
            raise ValueError(
                f"Weights are given twice: by weights= and by the head's weight_column={column!r}. Use one of them."
            )
        if not isinstance(column, str):
            return self._found(column(features)), "weights"
        return self._found(columns.column(features, column, "the weight_column")), f"weight (features[{column!r}])"

    def _found(self, weights: Any) -> Any:
        if weights is None:
            raise ValueError(
                f"The head's weight_column={self.weight_column!r} gave None: no weights at all. Give it weights, or "
                "build the head without a weight_column."
            )
        return weights

    def _predict(self, logits: Any, keys: Any) -> dict[str, Any]:
        outputs: dict[str, Any] = dict(self.outputs(batches.dense(batches.check_logits(logits, self.logits_dimension))))
        asked = (keys,) if isinstance(keys, str) else tuple(keys or outputs)
        for key in asked:
            if key not in outputs:
                raise ValueError(f"Unknown prediction key {key!r}. Valid prediction keys include {list(outputs)}.")
        return {key: value() if callable(value) else value for key, value in outputs.items() if key in asked}

    def _served(self, predictions: dict[str, Any], features: Any) -> dict[str, Any]:
        """Predictions with what of the features belongs to them: a sequence's mask."""
        return predictions

    def _normalizer(self, normalizer: Any) -> Any:
        return inputs.as_normalizer(normalizer)

    def _reduced_loss(self, batch: dict[str, Any], normalizer: Any, axis_name: Any) -> jax.Array:
        """The loss of a gathered batch, without regularization."""
        return self._loss_of(self._global_sums(batch, axis_name), normalizer)

    def _global_sums(self, batch: dict[str, Any], axis_name: Any) -> jax.Array:
        """`_loss_sums` over all devices. What the head learns is typed as differing over them for these sums alone."""
        return meshes.psum(meshes.varying(self, axis_name)._loss_sums(batch, axis_name), axis_name)

    @property
    def _loss_size(self) -> int:
        """How many numbers `_loss_sums` gives."""
        return 3

    def _loss_sums(self, batch: dict[str, Any], axis_name: Any) -> jax.Array:
        """What the loss is made of, `[_loss_size]`, additive over devices: weighted sum, divisor, live elements.

        A head whose rows depend on each other looks for those of other devices along `axis_name`.
        """
        elements = batches.clean(self.label_spec, batch)
        batches.debug_check(elements, type(self).__name__)
        return terms.loss_sums(self._term(elements), elements, Reduction.of(self.loss_reduction))

    def _loss_of(self, sums: jax.Array, normalizer: Any) -> jax.Array:
        """The loss from sums over all devices; a normalizer is global already."""
        if normalizer is None or isinstance(normalizer, Divisor):
            by = sums[1] if normalizer is None else normalizer.value
            return sums[0] if self.loss_reduction is Reduction.SUM else reduction.divide(sums[0], by)
        return reduction.divide(sums[0], jnp.asarray(normalizer, jnp.float32))

    def _share(self, sums: jax.Array, normalizer: Any) -> tuple[jax.Array, jax.Array]:
        """Which part of the whole batch this is, for what is added once a batch; and whether anything in it weighs."""
        if isinstance(normalizer, Divisor):
            return reduction.divide(sums[2], normalizer.live), normalizer.live > 0
        part = jnp.float32(1) if normalizer is None else reduction.divide(sums[1], jnp.asarray(normalizer, jnp.float32))
        return jnp.where(sums[2] > 0, part, jnp.zeros_like(part)), sums[2] > 0

    def _divisor_of(self, sums: jax.Array) -> Any:
        """What `divisor` gives, from the sums of the whole batch."""
        return Divisor(sums[1], sums[2])

    def _summaries(self, loss: jax.Array, sums: jax.Array, regularization: Any) -> dict[str, jax.Array]:
        """The scalars of a training step that the original wrote, by tag."""
        out = {joined("loss", self.suffix): loss}
        return out if regularization is None else {**out, joined("regularization_loss", self.suffix): regularization}

    def _evaluated(self, batch: dict[str, Any], axis_name: Any) -> tuple[jax.Array, dict[str, jax.Array], Metrics]:
        """The regularized loss of a gathered batch, its summaries, its metrics: all of them over all devices."""
        sums, losses = self._global_sums(batch, axis_name), batch["regularization"]
        regularization = None if losses is None else inputs.add_scalars(losses)
        loss = self._loss_of(sums, None)
        loss = loss if regularization is None else loss + regularization
        metrics = Metrics(_measure(self, batch), fields.unbound(self), losses is not None)
        if axis_name is not None:
            metrics = metrics.psum(axis_name)
        return loss, self._summaries(loss, sums, regularization), metrics

    @property
    def _has_divisor(self) -> bool:
        """Whether `_sums` adds a number for `with_divisor`."""
        return True

    def read_loss(self, seen: Mapping[str, Any]) -> Any:
        """The loss of all data seen, under the head's reduction; `seen` with the divisor."""
        mean, divisor = seen[AVERAGE_LOSS], seen[DIVISOR].total
        if self.loss_reduction is not Reduction.SUM:
            return mean.ratio(mean.total, divisor)
        return mean.xp.where(divisor > 0, mean.total, mean.xp.full_like(mean.total, mean.undefined))

    def was_seen(self, seen: Mapping[str, Any]) -> Any:
        """Whether there was anything to divide by."""
        return seen[DIVISOR].total > 0

    def _grouped(self, batch: dict[str, Any], features: Any, key: Any, check: bool | None) -> dict[str, Any]:
        """A gathered batch with what slices and replicas need."""
        if self.slices is not None:
            lead, live = tuple(batch["logits"].shape)[:-1], batches.live_rows(batch, check)
            batch["slices"] = self.slices.ids(features, lead, live, check)
        if self.bootstrap is not None:
            if key is None:
                raise ValueError(
                    f"{type(self).__name__} has bootstrap={self.bootstrap!r} and needs key= for each batch: "
                    "key=jax.random.fold_in(key, step), and in shard_map or pmap folded with jax.lax.axis_index too."
                )
            batch["key"] = key
        return batch

    def _all_sums(self, batch: dict[str, Any], with_divisor: bool = False) -> list[jax.Array]:
        """The sums of a gathered batch, part by part; of large batches tile by tile."""
        parts = functools.partial(self._parts_of, with_divisor=with_divisor)
        if not self.rowwise:
            return tiles.finished(parts(batch))
        layout, _ = slots(fields.unbound(self), False)
        return tiles.summed(parts, batch, sum(x.size for _, x in layout.values() if not x.is_late))

    def _parts_of(self, batch: dict[str, Any], with_divisor: bool) -> list[Any]:
        """Of a gathered batch the bad elements, then what the head observes: sums, or what is to be reduced later.

        With the divisor, also what the loss of all the elements that metrics count is divided by.
        """
        elements = batches.clean(self.label_spec, batch)
        term = self._average_term(elements)
        observations = {AVERAGE_LOSS: Mean(*term), **self._observed_of(elements)}
        weights, bad, groups = elements.counted, elements.bad, None
        if self.slices is not None:
            observations[COUNT] = Count(weights)
            groups, stray = Membership.of(jnp.asarray(batch["slices"]), self.slices.n)
            # In no group that there is: left out and counted, as an illegal label is.
            bad = bad | (stray & (weights != 0))
            weights = jnp.where(stray, jnp.zeros_like(weights), weights)
        replicas = None if self.bootstrap is None else jax.random.split(batch["key"], self.bootstrap.replicas)
        parts: list[Any] = [masking.total(bad.astype(jnp.float32))[None]]
        for observation in observations.values():
            late = tiles.Late(observation, weights, groups, replicas, reduced)
            parts.append(late if observation.is_late else late.reduced())
        if with_divisor:
            anywhere = jnp.any(bad, -1, keepdims=True)
            good = elements._replace(weights=weights, exists=elements.exists & ~anywhere)
            of = terms.DivisorOf(term, good, Reduction.of(self.loss_reduction))
            late = tiles.Late(of, masking.ones_like(good.exists), groups, replicas, reduced)
            parts.append(late.reduced())
        return parts

    def _advanced(self, batch: dict[str, Any], axis_name: Any) -> dict[str, Any]:
        """The new running state of a bound head from a gathered batch, checked."""
        psum = functools.partial(meshes.psum, axis_name=axis_name)
        new = fields.carry(self, fields.state_of(self), self._advance(batch, psum))
        fields.check_state(self, new, f"{type(self).__name__}.advance", "those of the heads inside it included")
        return jax.tree.map(jax.lax.stop_gradient, new)

    def _advance(self, batch: dict[str, Any], psum: Callable[[Any], Any]) -> Mapping[str, Any]:
        """What moves in the running state, from a gathered batch."""
        return self._advance_of(batches.clean(self.label_spec, batch), psum)

    def _advance_of(self, elements: Elements, psum: Callable[[Any], Any]) -> Mapping[str, Any]:
        """The same from the elements of a batch."""
        return self.advance(elements.labels, elements.logits, elements.times_scale(elements.counted), psum)

    def _term(self, elements: Elements) -> Term:
        """The per-element losses, checked."""
        features = (elements.features,) if _takes_features(type(self)) else ()
        losses = self.losses(elements.labels, elements.logits, *features)
        lead = tuple(elements.logits.shape)[:-1]
        return terms.as_term(losses, lead, self.logits_dimension, type(self).__name__).scaled(elements.scale)

    def _average_term(self, elements: Elements) -> Term:
        """The per-element losses whose mean is `average_loss`."""
        return self._term(elements)

    def _observed_of(self, elements: Elements) -> Mapping[str, Observation]:
        """What is observed of the elements of a batch, beside the average loss."""
        return self._observations(elements.labels, elements.logits)

    def _observations(self, labels: Any, logits: jax.Array) -> Mapping[str, Observation]:
        """What `observe` gives, checked."""
        observations = dict(self.observe(labels, logits))
        sources = self.sources(labels, logits) if self.extra_metrics else {}
        for metric in self.extra_metrics:
            for key, observation in metric.observe(labels, logits, sources).items():
                observations[key] = observations[key].join(observation) if key in observations else observation
        for key, observation in observations.items():
            what = f"{type(self).__name__}.observe: {key!r}"
            if not isinstance(observation, Observation):
                raise ValueError(
                    f"{what} must be an observation such as jh.Mean(values). Given a {type(observation).__name__}."
                )
            if key in (AVERAGE_LOSS, DIVISOR, COUNT):
                raise ValueError(f"{what} is kept by every head already. Use another key.")
            observation.check(what, tuple(logits.shape)[:-1])
        return observations


def _measure(head: Head, batch: dict[str, Any]) -> jax.Array:
    """The packed sums `[slots, 1]` of one batch, with the regularization after the first, if it is kept."""
    key = {name: batch[name] for name in ("key",) if name in batch}
    head, batch = jax.lax.stop_gradient((head, {k: v for k, v in batch.items() if k not in key}))
    losses = batch["regularization"]
    bad, *sums = head._all_sums({**batch, **key})
    kept = [] if losses is None else [jnp.stack([inputs.add_scalars(losses), jnp.float32(1)])]
    return jnp.concatenate([bad, *kept, *sums])[:, None]


def _update(state: jax.Array, head: Head, batch: dict[str, Any]) -> jax.Array:
    return pairs.add(state, _measure(head, batch))


_loss_compiled = jax.jit(lambda head, batch, normalizer: head._reduced_loss(batch, normalizer, None))
_measure_compiled = jax.jit(_measure)
_update_compiled = jax.jit(_update)


def check_head(head: Any) -> None:
    """Refuses what is no head, and heads that hold values: programs carry what a head learns beside it."""
    if not isinstance(head, Head):
        given = f"the class {head.__name__}: make one" if isinstance(head, type) else f"a {type(head).__name__}"
        raise ValueError(f"head must be a head, such as jh.BinaryClassHead(). Given {given}.")
    if jax.tree.leaves(head):
        raise ValueError(
            f"head must be unbound: what it learns is made and kept beside it. Given a bound {type(head).__name__}. "
            "Pass the head that bind was called on; its values go where head.init(key) would put them."
        )


@functools.lru_cache(maxsize=1024)
def _takes_features(cls: type[Head]) -> bool:
    return "features" in inspect.signature(cls.losses).parameters


def _check_mode(mode: Any) -> None:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} unrecognized. Expected one of {MODES}.")
