"""What a step gives as a pytree: `EstimatorSpec`; and what a server returns, by signature: export outputs."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxheads.numerics import inputs, meshes

TRAIN, EVAL, PREDICT = "train", "eval", "infer"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassificationOutput:
    """Scores of named classes.

    Attributes:
        scores: float32 `[..., n]`.
        classes: the names behind the last axis of the scores; static, for no array holds strings.
    """

    scores: Any
    classes: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def tensors(self) -> dict[str, Any]:
        """The arrays by the names that a signature gives them."""
        return {"scores": self.scores}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RegressionOutput:
    """One array of predicted values.

    Attributes:
        value: float32 `[..., d]`.
    """

    value: Any

    @property
    def tensors(self) -> dict[str, Any]:
        """The arrays by the names that a signature gives them."""
        return {"outputs": self.value}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PredictOutput:
    """All predictions by key.

    Attributes:
        outputs: arrays by prediction key.
        classes: the names behind class ids, by the prefix of their keys ("" for a single head); static.
    """

    outputs: dict[str, Any]
    classes: tuple[tuple[str, tuple[str, ...]], ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def tensors(self) -> dict[str, Any]:
        """The arrays by the names that a signature gives them."""
        return dict(self.outputs)


ExportOutput: TypeAlias = ClassificationOutput | RegressionOutput | PredictOutput


def regression_signatures(predictions: Mapping[str, Any], key: str) -> dict[str, ExportOutput]:
    """`serving_default` and `regression` of one key; `predict` of all."""
    value = RegressionOutput(predictions[key])
    return {"serving_default": value, "regression": value, "predict": PredictOutput(dict(predictions))}


def classification_signatures(
    predictions: Mapping[str, Any], names: tuple[str, ...], regression: str | None = None
) -> dict[str, ExportOutput]:
    """`serving_default` and `classification` of the probabilities; `regression` of a key; `predict` of all."""
    scores = ClassificationOutput(predictions["probabilities"], names)
    signatures: dict[str, ExportOutput] = {"serving_default": scores, "classification": scores}
    if regression is not None:
        signatures["regression"] = RegressionOutput(predictions[regression])
    return {**signatures, "predict": PredictOutput(dict(predictions), (("", names),))}


def merged_signatures(by_head: Mapping[str, Mapping[str, ExportOutput]]) -> dict[str, ExportOutput]:
    """Those of several heads: the first is served by default, all under `HEAD/signature`, `predict` has everything."""
    merged: dict[str, ExportOutput] = {}
    outputs: dict[str, Any] = {}
    classes: list[tuple[str, tuple[str, ...]]] = []
    for name, signatures in by_head.items():
        for signature, output in signatures.items():
            default = signature == "serving_default"
            merged[name if default else f"{name}/{signature}"] = output
            if default:
                merged.setdefault("serving_default", output)
        predict = signatures.get("predict", PredictOutput({}))
        outputs |= {f"{name}/{key}": value for key, value in predict.tensors.items()}
        named = predict.classes if isinstance(predict, PredictOutput) else ()
        classes += [(f"{name}/{prefix}" if prefix else name, names) for prefix, names in named]
    return {**merged, "predict": PredictOutput(outputs, tuple(classes))}


class TrainOp(NamedTuple):
    """What a training step changes, as it is afterwards.

    Attributes:
        params: the trainable variables.
        opt_state: the state of the optimizer.
        model_state: what `logits` returned beside the logits (batch statistics); None if nothing.
        head_state: the running fields of the head, as `head.init_state()` makes them; `{}` if there are none.
    """

    params: Any
    opt_state: Any
    model_state: Any = None
    head_state: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EstimatorSpec:
    """All that a step of training, evaluation or prediction gives; what does not belong to its mode is None.

    Attributes:
        mode: "train", "eval" or "infer"; static.
        predictions: as `head.predictions` gives them; for sequences in "infer" with their mask.
        loss: the regularized loss, float32, in "train" and "eval".
        metrics: the `Metrics` of this batch, in "train" and "eval".
        train_op: in "train" a `TrainOp`, or what `train_op_fn` returned.
        update_ops: in "train" what was given as `update_ops`, with functions called.
        export_outputs: in "infer" what a server returns, by signature.
        summaries: in "train" the scalars to write, by tag: `loss/NAME`, `regularization_loss/NAME`.
        model_state: in "train" what `logits` returned beside the logits, floating parts averaged over `axis_name`.
        head_state: in "train" the next running fields, as `head.init_state()` makes them; `{}` if there are none.
    """

    mode: str = dataclasses.field(metadata={"static": True})
    predictions: Any = None
    loss: Any = None
    metrics: Any = None
    train_op: Any = None
    update_ops: Any = None
    export_outputs: Any = None
    summaries: Any = None
    model_state: Any = None
    head_state: Any = None


class Given(NamedTuple):
    """What `create_estimator_spec` is given of a batch."""

    features: Any
    labels: Any
    logits: Any
    weights: Any
    where: Any
    params: Any
    regularization_losses: Any
    axis_name: Any
    key: Any = None


class Training(NamedTuple):
    """What `create_estimator_spec` is given for training."""

    optimizer: Any
    variables: Any
    train_op_fn: Any
    update_ops: Any
    opt_state: Any

    @property
    def wants_gradients(self) -> bool:
        """Whether anything is to be done with gradients."""
        return self.optimizer is not None or _needs(self.train_op_fn, "grads")


class Forward(NamedTuple):
    """What comes out of the network and the head."""

    head: Any
    batch: dict[str, Any]
    logits: Any
    model_state: Any
    summaries: dict[str, Any]
    metrics: Any


def create(head: Any, mode: Any, given: Given, training: Training) -> EstimatorSpec:
    """The spec of a head in one of the three modes."""
    if mode == PREDICT:
        ready, logits, _ = _network(head, given, training.variables)
        predictions = ready._predict(logits, None)
        outputs = dict(ready.signatures(predictions))
        return EstimatorSpec(PREDICT, ready._served(predictions, given.features), export_outputs=outputs)
    if mode not in (TRAIN, EVAL):
        raise ValueError(f"mode={mode} unrecognized. Expected one of {(TRAIN, EVAL, PREDICT)}.")
    if mode == EVAL:
        loss, seen = _forward(head, given, training.variables)
        return EstimatorSpec(EVAL, seen.head._predict(seen.logits, None), loss, seen.metrics)
    return _train(head, given, training)


def _train(head: Any, given: Given, training: Training) -> EstimatorSpec:
    _check_training(head, given, training)
    if not training.wants_gradients:
        loss, seen = _forward(head, given, training.variables)
        train_op = training.train_op_fn(loss)
    else:

        def loss_of(variables: Any) -> tuple[jax.Array, Forward]:
            return _forward(head, given, variables)

        (loss, seen), grads = jax.value_and_grad(loss_of, has_aux=True)(training.variables)
        grads = meshes.mean_of_gradients(grads, given.axis_name)
        if training.optimizer is None:
            train_op = training.train_op_fn(loss, grads=grads)
        else:
            params, opt_state = updated(training.optimizer, grads, training.opt_state, training.variables, loss)
            train_op = TrainOp(params, opt_state)
    if train_op is None:
        raise ValueError("Missing train_op. Given a train_op_fn that returned None: let it return what it made.")
    update_ops = jax.tree.map(lambda op: op() if callable(op) else op, training.update_ops)
    predictions = seen.head._predict(seen.logits, None)
    states = averaged(seen.model_state, given.axis_name), seen.head._advanced(seen.batch, given.axis_name)
    if isinstance(train_op, TrainOp):
        train_op = TrainOp(train_op.params, train_op.opt_state, *states)
    return EstimatorSpec(TRAIN, predictions, loss, seen.metrics, train_op, update_ops, None, seen.summaries, *states)


def averaged(model_state: Any, axis_name: Any) -> Any:
    """Batch statistics averaged over devices; counters are the same on all of them."""
    if axis_name is None:
        return model_state
    leaves, structure = jax.tree.flatten(model_state)
    floating = [jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in leaves]
    means = [jax.lax.pmean(x, axis_name) if mean else x for x, mean in zip(leaves, floating, strict=True)]
    return structure.unflatten(means)


def updated(optimizer: Any, grads: Any, opt_state: Any, variables: Any, loss: jax.Array) -> tuple[Any, Any]:
    """The next variables and optimizer state; what some optimizers want beside the gradients is given to all."""
    import optax

    from jaxheads.numerics import duals

    declared = inspect.signature(optimizer.update).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in declared.values())
    extra = {name: x for name, x in (("value", loss), ("grad", grads)) if takes_all or name in declared}
    if opt_state is None:
        opt_state = optimizer.init(variables)
    else:
        check_opt_state(optimizer, opt_state, variables)
    duals.check_ascends(opt_state, variables)
    updates, opt_state = optimizer.update(grads, opt_state, variables, **extra)
    return optax.apply_updates(variables, updates), opt_state


def _kinds(tree: Any) -> dict[str, str]:
    """The shapes of a pytree, by path."""
    return {jax.tree_util.keystr(path): f"{list(jnp.shape(leaf))}" for path, leaf in jax.tree.leaves_with_path(tree)}


def check_opt_state(optimizer: Any, opt_state: Any, variables: Any) -> None:
    """Refuses the state of another optimizer, or of variables of another structure."""
    if (given := _kinds(opt_state)) != (expected := _kinds(jax.eval_shape(optimizer.init, variables))):
        raise ValueError(
            "opt_state does not belong to this optimizer and these variables. Given shapes "
            f"{given}, expected {expected}. Make it with optimizer.init(variables)."
        )


def check_optimizer(optimizer: Any) -> None:
    """Refuses what is no optax transformation, a name among them."""
    if not (callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))):
        raise ValueError(
            "The given optimizer is not an optax.GradientTransformation, such as optax.adam(1e-3). Received "
            f"{optimizer!r} of type {type(optimizer).__name__}."
        )


def _check_training(head: Any, given: Given, training: Training) -> None:
    if training.optimizer is not None and training.train_op_fn is not None:
        raise ValueError("train_op_fn and optimizer cannot both be set. Leave one of them out.")
    if training.optimizer is None and training.train_op_fn is None:
        raise ValueError(
            "train_op_fn and optimizer cannot both be None. Pass optimizer=optax.adam(1e-3) with trainable_variables, "
            "or train_op_fn, a function of the loss."
        )
    _ = head.loss_reduction  # a MultiHead of several reductions is not trained by the original
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
    if not callable(given.logits):
        raise ValueError(
            f"With an {who}, logits must be a function of the trainable variables, v -> logits or v -> (logits, "
            f"model_state): an array has no gradient. Given {type(given.logits).__name__}. Pass lambda v: "
            "network(v, features)."
        )


def _needs(function: Any, name: str) -> bool:
    """Whether a function has an argument that nobody has bound; builtins do not tell, and have none of ours."""
    try:
        found = inspect.signature(function).parameters.get(name)
    except ValueError:
        return False
    return found is not None and found.default is found.empty


def _network(head: Any, given: Given, variables: Any) -> tuple[Any, Any, Any]:
    """The head with its parameters, the logits, and the state of the model."""
    params = _at(given.params, variables, "params")
    logits = _at(given.logits, variables, "logits")
    pair = callable(given.logits) and isinstance(logits, tuple)
    if pair and len(logits) != 2:
        raise ValueError(
            f"The function logits must return logits or the pair (logits, model_state). Given {len(logits)} values."
        )
    logits, model_state = logits if pair else (logits, None)
    return head._ready(params), logits, model_state


def _forward(head: Any, given: Given, variables: Any) -> tuple[jax.Array, Forward]:
    ready, logits, model_state = _network(head, given, variables)
    batch = ready._gather(given.labels, logits, given.features, given.weights, given.where, None)
    batch = ready._grouped(batch, given.features, given.key, None)
    losses = given.regularization_losses
    if isinstance(losses, (list, tuple)):
        losses = [_at(loss, variables, "regularization_losses") for loss in losses]
    batch["regularization"] = inputs.as_scalars(losses)
    loss, summaries, metrics = ready._evaluated(batch, given.axis_name)
    return loss, Forward(ready, batch, logits, model_state, summaries, metrics)


def _at(value: Any, variables: Any, what: str) -> Any:
    """`value`, or if it is a function what it is at the variables."""
    if not callable(value):
        return value
    if variables is None:
        raise ValueError(
            f"trainable_variables cannot be None. Given None, and {what} as a function of them. Pass the variables, or "
            f"{what} as a value."
        )
    return value(variables)
