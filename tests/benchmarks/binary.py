"""The same job in every library: eight metrics of a binary classifier, from logits and labels, updated by a batch.

Loss, accuracy, precision, recall, ROC-AUC, PR-AUC, mean prediction and mean label. Each library is used as its own
documentation advises where speed matters: one `jit` around all metrics where it can be traced, shared states and no
argument checks in torchmetrics.
"""

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxheads as jh
from benchmarks.by_hand import by_hand
from benchmarks.program import (
    COMPILER,
    FLOOR,
    OURS,
    Program,
    Programs,
    floor,
    keras,
    keras_program,
    of_head,
    tensors,
    torchmetrics,
)


def _keras(thresholds: int) -> Program:
    m = keras().metrics
    decided = [m.BinaryAccuracy(), m.Precision(thresholds=0.5), m.Recall(thresholds=0.5)]
    curves = [m.AUC(thresholds, curve) for curve in ("ROC", "PR")]
    metrics = [m.BinaryCrossentropy(from_logits=True), *decided, *curves, m.Mean(), m.Mean()]

    def arguments(batch: Any) -> list[tuple[Any, ...]]:
        labels, probabilities = batch["labels"], jax.nn.sigmoid(batch["logits"])
        return [(labels, batch["logits"]), *5 * [(labels, probabilities)], (probabilities,), (labels,)]

    return keras_program(metrics, arguments, accuracy=1, auc=4)


def _flat(batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Labels, losses, probabilities and decisions, `[N]` each."""
    logits, labels = batch["logits"].reshape(-1), batch["labels"].reshape(-1)
    return labels, optax.sigmoid_binary_cross_entropy(logits, labels), jax.nn.sigmoid(logits), logits > 0


def _metrax(thresholds: int) -> Program:
    metrax = importlib.import_module("metrax")
    zeros = functools.partial(jnp.zeros, thresholds)
    state = {
        **{name: metrax.Average.empty() for name in ("loss", "prediction", "label")},
        **{"accuracy": metrax.Accuracy.empty(), "precision": metrax.Precision.empty(), "recall": metrax.Recall.empty()},
        # Their own `empty` has another shape than every later state.
        "auc": metrax.AUCROC(zeros(), zeros(), zeros(), zeros(), thresholds),
        "auc_pr": metrax.AUCPR(zeros(), zeros(), zeros(), thresholds),
    }

    def update(state: Any, batch: Any) -> Any:
        labels, losses, probabilities, decided = _flat(batch)
        measured = {
            "loss": metrax.Average.from_model_output(losses),
            "prediction": metrax.Average.from_model_output(probabilities),
            "label": metrax.Average.from_model_output(labels.astype(jnp.float32)),
            "accuracy": metrax.Accuracy.from_model_output(decided.astype(jnp.int32), labels),
            "precision": metrax.Precision.from_model_output(probabilities, labels),
            "recall": metrax.Recall.from_model_output(probabilities, labels),
            "auc": metrax.AUCROC.from_model_output(probabilities, labels, num_thresholds=thresholds),
            "auc_pr": metrax.AUCPR.from_model_output(probabilities, labels, num_thresholds=thresholds),
        }
        return {name: state[name].merge(measured[name]) for name in measured}

    return Program(update, state, lambda state: {name: state[name].compute() for name in ("accuracy", "auc")})


def _metrax_nnx(thresholds: int) -> Program:
    nnx = importlib.import_module("metrax.nnx")
    kinds = ("Average", "Average", "Average", "Accuracy", "Precision", "Recall", "AUCROC", "AUCPR")
    metrics = [getattr(nnx, kind)() for kind in kinds]

    def update(metrics: Any, batch: Any) -> Any:
        labels, losses, probabilities, decided = _flat(batch)
        for metric, values in zip(metrics, (losses, probabilities, labels.astype(jnp.float32)), strict=False):
            metric.update(values=values)
        metrics[3].update(predictions=decided.astype(jnp.int32), labels=labels)
        for metric in metrics[4:6]:
            metric.update(predictions=probabilities, labels=labels)
        for metric in metrics[6:]:
            metric.update(predictions=probabilities, labels=labels, num_thresholds=thresholds)
        return [jax.tree.leaves(metric.clu_metric) for metric in metrics]

    return Program(update, metrics, lambda _: {"auc": metrics[6].compute()}, traced=False)


def _clu(thresholds: int) -> Program:
    metrics = importlib.import_module("clu.metrics")
    names = ("loss", "prediction", "accuracy", "label")
    collection = metrics.Collection.create(**{name: metrics.Average.from_output(name) for name in names})

    def update(state: Any, batch: Any) -> Any:
        labels, losses, probabilities, decided = _flat(batch)
        outputs = {"loss": losses, "prediction": probabilities, "accuracy": decided == labels, "label": labels}
        return state.merge(collection.single_from_model_output(**outputs))

    return Program(update, collection.empty(), lambda state: {"accuracy": state.compute()["accuracy"]})


def _torchmetrics(thresholds: int) -> Program:
    torch, tm = torchmetrics()
    kinds = {
        **{name: getattr(tm.classification, f"Binary{name}")() for name in ("Accuracy", "Precision", "Recall")},
        "auc": tm.classification.BinaryAUROC(thresholds=thresholds, validate_args=False),
        "auc_pr": tm.classification.BinaryAveragePrecision(thresholds=thresholds, validate_args=False),
    }
    for name in ("Accuracy", "Precision", "Recall"):
        kinds[name].validate_args = False
    shared, means = tm.MetricCollection(kinds), [tm.MeanMetric() for _ in range(3)]
    entropy = torch.nn.functional.binary_cross_entropy_with_logits

    def update(_: Any, batch: Any) -> None:
        logits, labels = batch["logits"].reshape(-1), batch["labels"].reshape(-1)
        probabilities, floats = torch.sigmoid(logits), labels.float()
        shared.update(probabilities, labels)
        for mean, values in zip(means, (entropy(logits, floats, reduction="none"), probabilities, floats), strict=True):
            mean.update(values)

    def read(_: Any) -> dict[str, Any]:
        found = shared.compute()
        return {"accuracy": float(found["Accuracy"]), "auc": float(found["auc"])}

    return Program(update, None, read, tensors, traced=False)


def _scikit_learn(thresholds: int) -> Program:
    m = importlib.import_module("sklearn.metrics")

    def update(_: Any, batch: Any) -> dict[str, Any]:
        labels, logits = batch
        probabilities, decided = 1 / (1 + np.exp(-logits)), logits > 0
        return {
            "loss": m.log_loss(labels, probabilities),
            "accuracy": m.accuracy_score(labels, decided),
            "precision": m.precision_score(labels, decided),
            "recall": m.recall_score(labels, decided),
            "auc": m.roc_auc_score(labels, probabilities),
            "auc_pr": m.average_precision_score(labels, probabilities),
            "prediction": probabilities.mean(),
            "label": labels.mean(),
        }

    def prepare(batch: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
        return np.asarray(batch["labels"])[:, 0], np.asarray(batch["logits"])[:, 0]

    return Program(update, None, lambda values: values, prepare, traced=False)


BINARY: Programs = {
    OURS: (None, lambda thresholds: of_head(jh.BinaryClassHead(bins=jh.ThresholdGrid(thresholds)))),
    "jaxheads, logit bins": (None, lambda _: of_head(jh.BinaryClassHead())),
    FLOOR: (None, lambda _: floor()),
    "C, one thread": (COMPILER, by_hand),
    "clu, 4 means": ("clu", _clu),
    "Keras": ("keras", _keras),
    "metrax, jit": ("metrax", _metrax),
    "metrax nnx, eager": ("metrax", _metrax_nnx),
    "torchmetrics": ("torchmetrics", _torchmetrics),
    "scikit-learn, exact": ("scikit-learn", _scikit_learn),
}
# Those whose work depends on the number of thresholds; metrax nnx does the work of metrax, op by op.
BINNED: Programs = {title: BINARY[title] for title in (OURS, "Keras", "metrax, jit", "torchmetrics")}
