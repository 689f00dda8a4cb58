"""The results of a step as a pytree, `EstimatorSpec`, and the results of a server by signature, export outputs."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax


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
    """Returns `serving_default` and `regression` of one key; `predict` of all."""
    value = RegressionOutput(predictions[key])
    return {"serving_default": value, "regression": value, "predict": PredictOutput(dict(predictions))}


def classification_signatures(
    predictions: Mapping[str, Any], names: tuple[str, ...], regression: str | None = None
) -> dict[str, ExportOutput]:
    """Returns `serving_default` and `classification` of probabilities; `regression` of a key; `predict` of all."""
    scores = ClassificationOutput(predictions["probabilities"], names)
    signatures: dict[str, ExportOutput] = {"serving_default": scores, "classification": scores}
    if regression is not None:
        signatures["regression"] = RegressionOutput(predictions[regression])
    return {**signatures, "predict": PredictOutput(dict(predictions), (("", names),))}


def merged_signatures(by_head: Mapping[str, Mapping[str, ExportOutput]]) -> dict[str, ExportOutput]:
    """Returns the signatures of several heads: the first by default, all as `HEAD/signature`, `predict` for all."""
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
    """The values that a training step changes, as they are afterwards.

    Attributes:
        params: the trainable variables.
        opt_state: the state of the optimizer.
        model_state: the value that `logits` returned beside the logits (batch statistics); None if nothing.
        head_state: the running fields of the head, as `head.init_state()` makes them; `{}` if there are none.
    """

    params: Any
    opt_state: Any
    model_state: Any = None
    head_state: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EstimatorSpec:
    """The results of a step of training, evaluation or prediction; a result that is not of its mode is None.

    Attributes:
        mode: "train", "eval" or "infer"; static.
        predictions: as `head.predictions` gives them; for sequences in "infer" with their mask.
        loss: the regularized loss, float32, in "train" and "eval".
        metrics: the `Metrics` of this batch, in "train" and "eval".
        train_op: in "train" a `TrainOp`, or the result of `train_op_fn`.
        update_ops: in "train" the given `update_ops`, with functions called.
        export_outputs: in "infer" the results of a server, by signature.
        summaries: in "train" the scalars to write, by tag: `loss/NAME`, `regularization_loss/NAME`.
        model_state: in "train" the value that `logits` returned beside the logits, floats averaged over `axis_name`.
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
