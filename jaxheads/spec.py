"""What a step gives as a pytree: `EstimatorSpec`; and what a server returns, by signature: export outputs."""

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
