"""Many classes and many labels in every library.

Of many classes: loss, accuracy, top-5 and the confusion matrix, as far as a library has them. Of many labels: one
ROC-AUC a label, with 200 thresholds.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxheads as jh
from benchmarks.program import (
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

THRESHOLDS = 200
TOP = 5


def _class_head(classes: int) -> Program:
    metrics = jh.metrics.TopKAccuracy(TOP), jh.metrics.ConfusionMatrix()
    program = of_head(jh.MultiClassHead(classes).with_metrics(*metrics))

    def read(metrics: jh.Metrics) -> dict[str, Any]:
        values = metrics.compute()
        return {"accuracy": values["accuracy"], "top-5": values[f"top_{TOP}_accuracy"]}

    return dataclasses.replace(program, read=read)


def _label_head(labels: int) -> Program:
    """It keeps the head's own metrics beside the areas."""
    head = jh.MultiLabelHead(labels, bins=jh.ThresholdGrid(THRESHOLDS)).with_metrics(jh.metrics.RocAuc(average=None))

    def read(metrics: jh.Metrics) -> dict[str, Any]:
        values = metrics.compute()
        return {"auc": np.mean([values[f"auc/class{k}"] for k in range(labels)])}

    return dataclasses.replace(of_head(head), read=read)


def _naive_classes(classes: int) -> Program:
    def update(state: Any, batch: Any) -> Any:
        logits, labels = batch["logits"], batch["labels"][:, 0]
        decided = jnp.argmax(logits, -1)
        _, best = jax.lax.top_k(logits, TOP)
        return {
            "count": state["count"] + len(labels),
            "loss": state["loss"] + optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum(),
            "hits": state["hits"] + (decided == labels).sum(),
            "top": state["top"] + (best == labels[:, None]).sum(),
            "confusion": state["confusion"].at[labels, decided].add(1),
        }

    scalars = {"count": jnp.zeros((), jnp.int32), "hits": jnp.zeros((), jnp.int32), "top": jnp.zeros((), jnp.int32)}
    state = {**scalars, "loss": jnp.zeros(()), "confusion": jnp.zeros((classes, classes))}

    def read(state: Any) -> dict[str, Any]:
        return {"accuracy": state["hits"] / state["count"], "top-5": state["top"] / state["count"]}

    return Program(update, state, read)


def _clu_classes(_: int) -> Program:
    metrics = importlib.import_module("clu.metrics")
    collection = metrics.Collection.create(loss=metrics.Average.from_output("loss"), accuracy=metrics.Accuracy)

    def update(state: Any, batch: Any) -> Any:
        logits, labels = batch["logits"], batch["labels"][:, 0]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return state.merge(collection.single_from_model_output(loss=loss, logits=logits, labels=labels))

    return Program(update, collection.empty(), lambda state: {"accuracy": state.compute()["accuracy"]})


def _keras_classes(_: int) -> Program:
    m = keras().metrics
    top = m.SparseTopKCategoricalAccuracy(TOP)
    metrics = [m.SparseCategoricalCrossentropy(from_logits=True), m.SparseCategoricalAccuracy(), top]
    return keras_program(
        metrics, lambda batch: 3 * [(batch["labels"][:, 0], batch["logits"])], **{"accuracy": 1, "top-5": 2}
    )


def _torch_classes(classes: int) -> Program:
    torch, tm = torchmetrics()
    c, options = tm.classification, {"num_classes": classes, "validate_args": False}
    kinds = {
        "accuracy": c.MulticlassAccuracy(average="micro", **options),
        "top-5": c.MulticlassAccuracy(average="micro", top_k=TOP, **options),
        "confusion": c.MulticlassConfusionMatrix(**options),
    }
    shared, loss = tm.MetricCollection(kinds), tm.MeanMetric()

    def update(_: Any, batch: Any) -> None:
        logits, labels = batch["logits"], batch["labels"][:, 0].long()
        shared.update(logits, labels)
        loss.update(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))

    def read(_: Any) -> dict[str, Any]:
        return {name: float(value) for name, value in shared.compute().items() if name != "confusion"}

    return Program(update, None, read, tensors, traced=False)


def _keras_labels(labels: int) -> Program:
    metric = keras().metrics.AUC(THRESHOLDS, multi_label=True, num_labels=labels, from_logits=True)
    return keras_program([metric], lambda batch: [(batch["labels"], batch["logits"])], auc=0)


def _metrax_labels(labels: int) -> Program:
    kind = importlib.import_module("metrax").AUCROC
    zeros = jnp.zeros((labels, THRESHOLDS))
    # The number of thresholds is an array leaf there, so it gets an entry a label too.
    state = kind(zeros, zeros, zeros, zeros, jnp.full(labels, THRESHOLDS))

    def update(state: Any, batch: Any) -> Any:
        def of_label(given: Any) -> Any:
            before, labels, logits = given
            probabilities = jax.nn.sigmoid(logits)
            return before.merge(kind.from_model_output(probabilities, labels, num_thresholds=THRESHOLDS))

        # One label after the other: all at once compares every score with every threshold in memory.
        return jax.lax.map(of_label, (state, batch["labels"].T, batch["logits"].T))

    return Program(update, state, lambda state: {"auc": np.mean(jax.vmap(lambda each: each.compute())(state))})


def _torch_labels(labels: int) -> Program:
    torch, tm = torchmetrics()
    share = 64  # all rows would compare and count 2.6 billion pairs in int64, 20 GB
    options = {"num_labels": labels, "average": None, "thresholds": THRESHOLDS, "validate_args": False}
    metric = tm.classification.MultilabelAUROC(**options)

    def prepare(batch: Mapping[str, Any]) -> Any:
        return tensors({name: x[: max(1, len(x) // share)] for name, x in batch.items()})

    def update(_: Any, batch: Any) -> None:
        metric.update(torch.sigmoid(batch["logits"]), batch["labels"])

    return Program(update, None, lambda _: {"auc": float(metric.compute().mean())}, prepare, False, share)


CLASSES: Programs = {
    OURS: (None, _class_head),
    FLOOR: (None, lambda _: floor()),
    "naive JAX": (None, _naive_classes),
    "clu, loss and accuracy": ("clu", _clu_classes),
    "Keras, no confusion matrix": ("keras", _keras_classes),
    "torchmetrics": ("torchmetrics", _torch_classes),
}
LABELS: Programs = {
    OURS: (None, _label_head),
    FLOOR: (None, lambda _: floor()),
    "Keras": ("keras", _keras_labels),
    "metrax, jit": ("metrax", _metrax_labels),
    "torchmetrics, 1/64 of the rows": ("torchmetrics", _torch_labels),
}
