"""`create_estimator_spec`: the results of a step of training, evaluation or prediction, as one pytree."""

import inspect
from typing import Any, NamedTuple

import jax

from jaxheads.engine import evaluating, predicting
from jaxheads.engine.gathering import gather
from jaxheads.engine.optimizing import averaged, check_optimizer, updated
from jaxheads.engine.readiness import ready
from jaxheads.numerics import brief, inputs, meshes
from jaxheads.numerics.batch import Given
from jaxheads.spec import EstimatorSpec, TrainOp

TRAIN, EVAL, PREDICT = "train", "eval", "infer"


class Call(NamedTuple):
    """The batch arguments of `create_estimator_spec`. Logits, parameters and losses may be functions.

    Attributes:
        given: the batch.
        params, regularization_losses, axis_name: as for `head.loss`.
    """

    given: Given
    params: Any
    regularization_losses: Any
    axis_name: Any


class Training(NamedTuple):
    """The training arguments of `create_estimator_spec`."""

    optimizer: Any
    variables: Any
    train_op_fn: Any
    update_ops: Any
    opt_state: Any

    @property
    def wants_gradients(self) -> bool:
        """Whether the step needs gradients."""
        return self.optimizer is not None or _needs(self.train_op_fn, "grads")


class Forward(NamedTuple):
    """The outputs of the network and the head."""

    head: Any
    logits: Any
    model_state: Any
    found: evaluating.Evaluated


def create(head: Any, mode: Any, call: Call, training: Training) -> EstimatorSpec:
    """Returns the spec of a head in one of the three modes."""
    features = call.given.features
    if not brief.is_one_of(mode, (TRAIN, EVAL, PREDICT)):
        given = mode if isinstance(mode, str) else brief.tell(mode)
        raise ValueError(f"mode={given} unrecognized. Expected one of {(TRAIN, EVAL, PREDICT)}.")
    if mode == PREDICT:
        bound, logits, _ = _run_network(head, call, training.variables)
        predictions = predicting.predict(bound, Given(logits=logits, features=features, key=call.given.key))
        outputs = dict(bound.signatures(predictions))
        return EstimatorSpec(PREDICT, bound.served(predictions, features), export_outputs=outputs)
    if mode == EVAL:
        loss, forward = _run_forward(head, call, training.variables)
        forward = forward._replace(found=evaluating.without_gradient(forward.found))
        return EstimatorSpec(EVAL, _make_predictions(forward, call), loss, _make_metrics(forward, call.axis_name))
    return _run_training(head, call, training)


def _run_training(head: Any, call: Call, training: Training) -> EstimatorSpec:
    _check_training(head, call, training)
    axis_name = call.axis_name
    if not training.wants_gradients:
        loss, forward = _run_forward(head, call, training.variables)
        train_op = training.train_op_fn(loss)
    else:

        def loss_of(variables: Any) -> tuple[jax.Array, Forward]:
            return _run_forward(head, call, variables)

        def evaluate(variables: Any) -> tuple[tuple[jax.Array, Forward], Any]:
            found, grads = jax.value_and_grad(loss_of, has_aux=True)(variables)
            return found, meshes.mean_of_gradients(grads, axis_name)

        def look(variables: Any) -> tuple[jax.Array, Any]:
            (loss, _), grads = evaluate(variables)
            return loss, grads

        (loss, forward), grads = evaluate(training.variables)
        if training.optimizer is None:
            train_op = training.train_op_fn(loss, grads=grads)
        else:
            given = training.opt_state, training.variables, loss, look
            params, opt_state, _ = updated(training.optimizer, grads, *given, axis_name)
            train_op = TrainOp(params, opt_state)
    if train_op is None:
        raise ValueError("Missing train_op. Given a train_op_fn that returned None: let it return what it made.")
    update_ops = jax.tree.map(lambda op: op() if callable(op) else op, training.update_ops)
    found = forward.found
    head_state = evaluating.advance(forward.head, found.batch, axis_name, found.seen)
    states = averaged(forward.model_state, axis_name), head_state
    if isinstance(train_op, TrainOp):
        train_op = TrainOp(train_op.params, train_op.opt_state, *states)
    summaries = evaluating.summaries_of(forward.head, found, loss)
    predictions, metrics = _make_predictions(forward, call), _make_metrics(forward, axis_name)
    return EstimatorSpec(TRAIN, predictions, loss, metrics, train_op, update_ops, None, summaries, *states)


def _make_predictions(forward: Forward, call: Call) -> Any:
    given = Given(logits=forward.logits, features=call.given.features, key=call.given.key)
    return predicting.predict(forward.head, given)


def _make_metrics(forward: Forward, axis_name: Any) -> Any:
    metrics = evaluating.metrics_of(forward.head, forward.found, axis_name)
    return metrics if axis_name is None else metrics.psum(axis_name)


def _check_training(head: Any, call: Call, training: Training) -> None:
    if training.optimizer is not None and training.train_op_fn is not None:
        raise ValueError("train_op_fn and optimizer cannot both be set. Leave one of them out.")
    if training.optimizer is None and training.train_op_fn is None:
        raise ValueError(
            "train_op_fn and optimizer cannot both be None. Pass optimizer=optax.adam(1e-3) with trainable_variables, "
            "or train_op_fn, a function of the loss."
        )
    _ = head.loss_reduction  # raises for a MultiHead with several reductions: the original does not train it
    if training.optimizer is not None:
        check_optimizer(training.optimizer)
    elif not callable(training.train_op_fn):
        raise ValueError(f"train_op_fn must be a function loss -> train_op. Given {training.train_op_fn!r}.")
    if not training.wants_gradients:
        return
    who = "optimizer" if training.optimizer is not None else "train_op_fn with the argument grads"
    if training.variables is None:
        raise ValueError(
            f"trainable_variables cannot be None. Given None, with an {who}. Pass the pytree of parameters that is to "
            "change, and logits as a function of it."
        )
    if not callable(call.given.logits):
        raise ValueError(
            f"With an {who}, logits must be a function of the trainable variables, v -> logits or v -> (logits, "
            f"model_state): an array has no gradient. Given {type(call.given.logits).__name__}. Pass lambda v: "
            "network(v, features)."
        )


def _needs(function: Any, name: str) -> bool:
    """Tells whether a function has an argument of this name without a value. Builtins without signature have none."""
    try:
        found = inspect.signature(function).parameters.get(name)
    except ValueError:
        return False
    return found is not None and found.default is found.empty


def _run_network(head: Any, call: Call, variables: Any) -> tuple[Any, Any, Any]:
    """Returns the head with its parameters, the logits, and the state of the model."""
    params = _evaluate_at(call.params, variables, "params")
    logits = _evaluate_at(call.given.logits, variables, "logits")
    pair = callable(call.given.logits) and isinstance(logits, tuple)
    if pair and len(logits) != 2:
        raise ValueError(
            f"The function logits must return logits or the pair (logits, model_state). Given {len(logits)} values."
        )
    logits, model_state = logits if pair else (logits, None)
    return ready(head, params), logits, model_state


def _run_forward(head: Any, call: Call, variables: Any) -> tuple[jax.Array, Forward]:
    bound, logits, model_state = _run_network(head, call, variables)
    batch = gather(bound, call.given.replace(logits=logits, with_slices=True))
    losses = call.regularization_losses
    if isinstance(losses, (list, tuple)):
        losses = [_evaluate_at(loss, variables, "regularization_losses") for loss in losses]
    loss, found = evaluating.evaluate(bound, batch, inputs.as_scalars(losses), call.axis_name)
    return loss, Forward(bound, logits, model_state, found)


def _evaluate_at(value: Any, variables: Any, what: str) -> Any:
    """Returns `value`, or its result at the variables if it is a function."""
    if not callable(value):
        return value
    if variables is None:
        raise ValueError(
            f"trainable_variables cannot be None. Given None, and {what} as a function of them. Pass the variables, or "
            f"{what} as a value."
        )
    return value(variables)
