"""`Head`: the methods that users call. The part for authors is in `contract.py`, the algorithms are in `engine/`."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.contract import ABSENT, AbstractHead, Given
from jaxheads.engine import declarations, evaluating, losing, predicting, reading
from jaxheads.engine.gathering import gather
from jaxheads.engine.readiness import bound, ready
from jaxheads.metrics import FunctionMetric, Metric, Metrics, Observation
from jaxheads.metrics.base import Path
from jaxheads.metrics.state import metric_names, slots
from jaxheads.numerics import brief, fields, inputs
from jaxheads.numerics import labels as rules
from jaxheads.numerics.kept import twin_of
from jaxheads.numerics.reduction import Reduction
from jaxheads.spec import EstimatorSpec, ExportOutput

MODES = (None, "train", "eval", "infer")


class Head(AbstractHead):
    """A head: loss, predictions and metrics from logits. Subclass it to write one.

    `jaxheads.contract` describes the hooks that a subclass writes, and the arguments that every head has.
    """

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
        key: jax.Array | None = None,
        check: bool | None = None,
    ) -> jax.Array:
        """Returns the regularized training loss.

        Args:
            labels: as the head's docstring says, `[...]` or `[..., 1]`; strings where there is a vocabulary (eagerly).
            logits: `[D0, ..., DN, logits_dimension]`, or `LinearLogits`.
            features: a mapping; only the weight column and the inputs of `loss_fn` are read.
            mode: one of "train", "eval", "infer"; changes nothing in the loss.
            regularization_losses: scalars, added after the reduction.
            weights: float, `[...]` or `[..., 1]`; multiplicities, also fractions. A weight of 0 hides the values.
            where: bool or 0/1, `[...]` or `[..., 1]`; an element with False counts as absent.
            params: the learned (and running) fields, as `bind` takes them.
            normalizer: replaces the divisor; one global number, not negative, never summed over devices.
            axis_name: numerator and denominator are summed over this mapped axis; `pmean` the gradients afterwards.
                A head whose rows look at each other finds the rows of other devices by it; `()`: there are none.
            key: a random key, for heads that sample.
            check: True checks the values of device arrays too (and waits for them); False checks no values.

        Returns:
            A float32 scalar. 0 for an empty batch. NaN, with a NaN gradient, if an unmasked label or weight is illegal
            and could not be refused (under `jit`).

        Raises:
            ValueError: wrong shapes or dtypes at trace time; illegal values of host arrays.
        """
        _check_mode(mode)
        head = ready(self, params)
        given = Given(
            labels, logits, features, weights, where, normalizer, divides=normalizer is None, key=key, check=check
        )
        batch = gather(head, given)
        loss = evaluating.loss(self, head, batch, axis_name)
        regularization = inputs.as_scalars(regularization_losses)
        return loss if regularization is None else loss + inputs.add_scalars(regularization)

    def predictions(
        self,
        logits: Any,
        keys: Any = None,
        *,
        params: Mapping[str, Any] | None = None,
        features: Any = None,
        key: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Returns predictions by key, only those asked for. An unknown key is refused, with a list of valid keys."""
        return predicting.predict(bound(self, params), Given(logits=logits, features=features, keys=keys, key=key))

    def export_outputs(
        self,
        logits: Any,
        *,
        params: Mapping[str, Any] | None = None,
        features: Any = None,
        key: jax.Array | None = None,
    ) -> dict[str, ExportOutput]:
        """Returns the outputs of a server, by signature: pytrees of arrays, with class names as static metadata."""
        head = bound(self, params)
        return dict(head.signatures(predicting.predict(head, Given(logits=logits, features=features, key=key))))

    def metrics(self, regularization_losses: Any = None) -> Metrics:
        """Returns zero metrics, the identity of `+`. They keep `regularization_loss` if a list is given."""
        head, regularized = twin_of(fields.unbound(self)), regularization_losses is not None
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
        axis_name: Any = None,
        check: bool | None = None,
        key: jax.Array | None = None,
    ) -> Metrics:
        """Returns `eval_metrics + measure(...)`, compiled once. The arguments are those of `measure`."""
        _check_mode(mode)
        if not isinstance(eval_metrics, Metrics):
            raise ValueError(f"eval_metrics must be what head.metrics() gives. Given {type(eval_metrics).__name__}.")
        head = ready(self, params)
        given = Given(labels, logits, features, weights, where, with_slices=True, key=key, check=check)
        batch, losses = gather(head, given), inputs.as_scalars(regularization_losses)
        eval_metrics.check_one_state()
        eval_metrics.check_same_kind(Metrics(None, twin_of(fields.unbound(self)), losses is not None))
        state = evaluating.update(eval_metrics.state, self, head, batch, losses, axis_name)
        return dataclasses.replace(eval_metrics, state=state)

    def with_metrics(self, *metrics: Metric, **functions: Callable[[Any, jax.Array], Any]) -> Self:
        """Returns the same head with more metrics. Only metrics in use cost time; a shared state is computed once.

        Args:
            metrics: from the catalogue `jh.metrics`, or your own.
            functions: functions by name, `(labels, logits) -> one value per element`; the weighted mean is kept.

        Raises:
            ValueError: an argument that is no metric; a metric that reads a value that this head lacks; a taken name.

        >>> import jaxheads as jh
        >>> head = jh.RegressionHead().with_metrics(bias=lambda labels, logits: logits - labels)
        >>> head.measure(labels=[1.0, 2.0], logits=[[2.0], [2.5]]).compute()["bias"]
        0.75
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
        axis_name: Any = None,
        check: bool | None = None,
        key: jax.Array | None = None,
    ) -> Metrics:
        """Returns the metrics of this batch alone, as plain float32 sums; a notebook cell prints their values.

        The arguments are those of `loss`. A head with a `bootstrap` needs a `key`, a new one for every batch and
        device. The sums cover this device's rows. A head whose `coupling` is "batch" also looks at the rows of other
        devices, and finds them by `axis_name`.
        """
        head = ready(self, params)
        given = Given(labels, logits, features, weights, where, with_slices=True, key=key, check=check)
        batch, losses = gather(head, given), inputs.as_scalars(regularization_losses)
        state = evaluating.measure(self, head, batch, losses, axis_name)
        return Metrics(state, twin_of(fields.unbound(self)), losses is not None)

    def constant_logits(
        self, labels: Any, weights: Any = None, where: Any = None, *, features: Any = None
    ) -> np.ndarray:
        """Returns the best logits that are the same for all examples: the weighted loss is least there. Host side.

        Uses: the start of gradient boosting, a bias initializer, and a baseline (`head.measure` of them, broadcast).

        Args:
            labels, weights, where: as for `loss`; the values of device arrays are checked too.
            features: the columns that hold a `weight_column`, or the mask of sequences.

        Returns:
            Float32 `[logits_dimension]`; for a `MultiHead` the logits of its heads, in their order. Infinite values,
            such as the logit of a class that was never or always seen, are cut at -30 and 30.

        Raises:
            ValueError: a head without a closed form, for example with a `loss_fn`; no element with a weight; also the
                errors of `loss`.

        >>> import flax.linen as nn
        >>> import numpy as np
        >>> import jaxheads as jh
        >>> head, labels = jh.BinaryClassHead(), np.array([1, 0, 0, 0])
        >>> constant = head.constant_logits(labels)
        >>> constant  # ln(1/3)
        array([-1.0986123], dtype=float32)
        >>> last_layer = nn.Dense(1, bias_init=nn.initializers.constant(constant))
        >>> baseline = head.measure(labels=labels, logits=np.broadcast_to(constant, (4, 1)))
        >>> baseline.compute(warn=False)["prediction/mean"]  # one score for all: there is no curve to be read
        0.25
        """
        if inputs.is_traced((labels, weights, where, features)):
            raise ValueError("constant_logits works on the host: call it outside jit.")
        batch = gather(self, Given(labels, features=features, weights=weights, where=where, check=True))
        return np.asarray(predicting.constants(self, jax.tree.map(np.asarray, batch)), np.float32)

    def encode_labels(self, labels: Any, where: Any = None) -> Any:
        """Encodes class names as the ids that a jitted step takes, and legal numbers in its dtype. Host side.

        It refuses the labels that an eager loss refuses. Rows where `where` is False may hold anything. Their illegal
        labels stay illegal (an unknown name is -1): a step accepts them with the same `where`, and shows them without.
        """
        if inputs.is_traced((labels, where)):
            raise ValueError("encode_labels works on the host: call it before the jitted step.")
        to_array = functools.partial(self.to_array, ids=True)
        return rules.encode(self.label_spec, labels, where, self.vocabulary, to_array, self.per_logit_where)

    def decode_predictions(self, predictions: Mapping[str, Any]) -> dict[str, Any]:
        """Returns predictions as NumPy arrays, with `classes` (if `class_ids` exists) and `all_classes` `[D0, n]`."""
        return predicting.decoded(self, predictions)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Returns the first values of the learned fields: a plain dict for your parameter tree, `{}` if none exist."""
        return fields.init(self, key)

    def init_state(self) -> dict[str, Any]:
        """Returns the first values of the running fields: a plain dict to carry beside batch statistics."""
        return fields.init_state(self)

    def bind(self, params: Mapping[str, Any]) -> "Head":
        """Returns the same head with learned and running fields from dicts in the form of `init` and `init_state`."""
        return fields.bind(self, params)

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
        key: jax.Array | None = None,
    ) -> dict[str, Any]:
        """Returns the running fields after a training batch; they are the same on all devices of `axis_name`."""
        for name, given in (("state", state), ("params", {} if params is None else params)):
            if not isinstance(given, Mapping):
                raise ValueError(f"{name} must be a dict, as head.init_state() makes it. Given {brief.tell(given)}.")
        fields.check_state(self, state, "state", "as head.init_state() makes it")
        head = ready(self, fields.merge(params or {}, state))
        batch = gather(head, Given(labels, logits, features, weights, where, key=key))
        return evaluating.advance(head, batch, axis_name)

    def divisor(
        self,
        labels: Any,
        logits: Any = None,
        features: Any = None,
        *,
        weights: Any = None,
        where: Any = None,
        params: Mapping[str, Any] | None = None,
        axis_name: Any = None,
    ) -> Any:
        """Returns the divisor of a whole batch's loss. With it as `normalizer`, losses of parts add up to the whole.

        Only the shape of the logits matters, unless the head counts elements by them.
        """
        head = ready(self, params)
        given = Given(labels, ABSENT if logits is None else logits, features, weights, where, key=jax.random.key(0))
        return losing.divisor(head, gather(head, given), axis_name)

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
        """Returns the results of a step of training, evaluation or prediction, as one pytree.

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
            opt_state: the state of the optimizer; made by `optimizer.init` if None.
            params: the learned and running fields, as `bind` takes them, or a function of the trainable variables.
            axis_name: as for `loss`; metrics are summed over it too, and gradients averaged.
            key: a random key, for the replicas of a head with a `bootstrap`.

        Returns:
            An `EstimatorSpec`. In training its `train_op` is what `train_op_fn` returned, or a `TrainOp` with the new
            variables, optimizer state, model state and running fields.

        Raises:
            ValueError: an unknown mode; in training neither or both of `optimizer` and `train_op_fn`, or logits that
                are no function of the variables that the optimizer changes; also the errors of `loss`.
        """
        from jaxheads.engine import specs

        given = Given(labels, logits, features, weights, where, divides=True, key=key)
        call = specs.Call(given, params, regularization_losses, axis_name)
        training = specs.Training(optimizer, trainable_variables, train_op_fn, update_ops, opt_state)
        return specs.create(self, mode, call, training)

    # The methods of a head that a metric state calls.

    @property
    def suffix(self) -> str | None:
        """The name that is appended to the keys of the metrics."""
        return self.name

    def observed(self) -> dict[Path, Observation]:
        """Returns the observations of this head, without data: the layout of its metric state."""
        return reading.layout(self)

    def read(self, seen: Mapping[Path, Any]) -> dict[tuple[str, str | None], Any]:
        """Returns all metrics from views of the observations, by key and the name that is appended to it."""
        return reading.read(self, seen)

    def __post_init__(self):
        object.__setattr__(self, "loss_reduction", Reduction.of(self.loss_reduction))
        declarations.check(self)
        super().__post_init__()
        if self.extra_metrics:
            # It refuses names that clash, and metrics that read missing values. It is given a copy: a subclass may yet
            # change fields, and a head holds what was derived from it.
            metric_names(copy.copy(fields.unbound(self)))


def check_unbound(head: Any) -> None:
    """Refuses values that are no head, and bound heads: programs carry learned values beside the head."""
    if not isinstance(head, Head):
        given = f"the class {head.__name__}: make one" if isinstance(head, type) else f"a {type(head).__name__}"
        raise ValueError(f"head must be a head, such as jh.BinaryClassHead(). Given {given}.")
    if jax.tree.leaves(head):
        raise ValueError(
            f"head must be unbound: what it learns is made and kept beside it. Given a bound {type(head).__name__}. "
            "Pass the head that bind was called on; its values go where head.init(key) would put them."
        )


def _check_mode(mode: Any) -> None:
    if not brief.is_one_of(mode, MODES):
        raise ValueError(f"mode={mode!r} unrecognized. Expected one of {MODES}.")
