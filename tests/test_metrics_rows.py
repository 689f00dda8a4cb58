"""The confusion of two classes, and metrics of whole rows: scikit-learn's values, and the laws."""

import functools
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
import sklearn.metrics

import jaxheads as jh

UNTYPED: Any = jh  # some arguments here are wrong to a type checker
M: Any = jh.metrics
sk: Any = sklearn.metrics
N, C = 240, 5
COUNTS = (M.TrueNegatives, M.FalsePositives, M.FalseNegatives, M.TruePositives)
KEYS = ("true_negatives", "false_positives", "false_negatives", "true_positives")


def f32(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)


@functools.cache
def drawn(seed: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels, logits with ties and with some on the edges, weights that are fractions and 0, and a mask."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((N, columns)) < 0.4).astype(np.float32)
    logits = (np.round(4 * (rng.normal(size=(N, columns)) + labels)) / 4).astype(np.float32)
    weights = np.where(rng.random((N, 1)) < 0.1, 0, 3 * rng.random((N, 1))).astype(np.float32)
    return labels, logits, weights, rng.random((N, 1)) < 0.8


def live_rows(labels: Any, logits: Any, weights: Any, where: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a metric may see, in float64. Masked rows of a batch hold NaN in place of their logits."""
    live = (where & (weights > 0))[:, 0]
    return labels[live].astype(np.float64), logits[live].astype(np.float64), weights[live, 0].astype(np.float64)


def poisoned(logits: np.ndarray, where: np.ndarray) -> np.ndarray:
    return np.where(where, logits, np.float32(np.nan))


def merged(head: Any, labels: Any, logits: Any, weights: Any, where: Any) -> jh.Metrics:
    """The metrics of two batches of equal shape, added: one program."""
    half = N // 2
    parts = [
        head.measure(labels[i], logits[i], weights=weights[i], where=where[i])
        for i in (slice(0, half), slice(half, None))
    ]
    return parts[0] + parts[1]


# The confusion of two classes


def test_binary_confusion_is_that_of_scikit_learn():
    counts = [cls(t) for cls in COUNTS for t in (None, 0.3)]
    head = jh.BinaryClassHead(label_vocabulary=("ham", "spam")).with_metrics(
        M.ConfusionMatrix(), M.ConfusionMatrix("true", threshold=0.3), M.NegativePredictiveValue(0.3), *counts
    )
    labels, logits, weights, where = drawn(3, 1)
    metrics = merged(head, labels, poisoned(logits, where), weights, where)
    values = metrics.compute()
    y, z, w = live_rows(labels, logits, weights, where)
    for t, ending in ((0.5, ""), (0.3, "/positive_threshold_0.3")):
        predicted = (1 / (1 + np.exp(-z)) > t)[:, 0]
        expected = sk.confusion_matrix(y[:, 0], predicted, sample_weight=w)
        np.testing.assert_allclose([values[key + ending] for key in KEYS], expected.ravel(), rtol=1e-6)
        for by in (None, "true", "pred", "all"):
            named = sk.confusion_matrix(y[:, 0], predicted, sample_weight=w, normalize=by)
            np.testing.assert_allclose(metrics.confusion_matrix(by, threshold=t), named, rtol=1e-6)
        tn, _, fn, _ = expected.ravel()
    np.testing.assert_allclose(values["confusion_matrix"], metrics.confusion_matrix(), rtol=1e-6)
    np.testing.assert_allclose(values["confusion_matrix/positive_threshold_0.3"].sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(values["negative_predictive_value/positive_threshold_0.3"], tn / (tn + fn), rtol=1e-6)
    frame = pd.DataFrame(metrics.confusion_matrix("all", names=True, threshold=0.3))
    assert list(frame.index) == list(frame.columns) == ["ham", "spam"]
    np.testing.assert_allclose(frame.loc["ham", "spam"], expected[0, 1] / w.sum(), rtol=1e-6)
    inside = jax.jit(lambda metrics: metrics.compute(0.0))(metrics)
    np.testing.assert_allclose(inside["confusion_matrix"], values["confusion_matrix"], rtol=1e-6)


def test_the_confusion_of_an_empty_state_and_of_soft_labels():
    head = jh.BinaryClassHead(slices=jh.Slices("group", 2)).with_metrics(M.ConfusionMatrix("true"))
    np.testing.assert_array_equal(head.metrics().compute()["confusion_matrix"], np.full((2, 2), np.nan))
    np.testing.assert_array_equal(head.metrics().compute(0.0)["confusion_matrix"], np.zeros((2, 2)))
    groups = {"group": np.array([0, 0, 1])}
    metrics = head.measure(f32([0.25, 1, 0]), f32([[1], [-1], [2]]), groups)
    np.testing.assert_allclose(metrics.confusion_matrix(), [[0, 1.75], [1, 0.25]])
    np.testing.assert_allclose(metrics.confusion_matrix(slice=0), [[0, 0.75], [1, 0.25]])
    np.testing.assert_allclose(metrics.by_slice()["confusion_matrix"][0], [[0, 1], [0.8, 0.2]], rtol=1e-6)
    broken = head.measure(f32([0, 1, 0]), f32([[np.nan], [1], [2]]), groups)
    assert np.isnan(broken.confusion_matrix()).all()


def test_counts_of_labels_and_of_classes():
    labels, logits, weights, where = drawn(4, C)
    ones = [cls(t, average=average) for cls in COUNTS for t in (None, 0.3) for average in ("micro", None)]
    head = jh.MultiLabelHead(C).with_metrics(*ones, M.NegativePredictiveValue(average="macro"))
    values = head.measure(labels, poisoned(logits, where), weights=weights, where=where).compute()
    y, z, w = live_rows(labels, logits, weights, where)
    for t, ending in ((0.5, ""), (0.3, "/positive_threshold_0.3")):
        each = sk.multilabel_confusion_matrix(y, 1 / (1 + np.exp(-z)) > t, sample_weight=w).reshape(C, 4)
        for key, column in zip(KEYS, each.T, strict=True):
            found = [values[f"{key}{ending}/class{k}"] for k in range(C)]
            np.testing.assert_allclose(found, column, rtol=1e-6)
            np.testing.assert_allclose(values[key + ending], column.sum(), rtol=1e-6)
        if t == 0.5:
            npv = np.mean(each[:, 0] / (each[:, 0] + each[:, 2]))
            np.testing.assert_allclose(values["negative_predictive_value_macro"], npv, rtol=1e-6)
    head = jh.MultiClassHead(C).with_metrics(M.ConfusionMatrix(), *(cls(average=None) for cls in COUNTS))
    ids = labels.argmax(-1).astype(np.int32)
    metrics = head.measure(ids, poisoned(logits, where), weights=weights, where=where)
    ids = y.argmax(-1)
    each = sk.multilabel_confusion_matrix(ids, z.argmax(-1), labels=range(C), sample_weight=w).reshape(C, 4)
    values = metrics.compute()
    for key, column in zip(KEYS, each.T, strict=True):
        np.testing.assert_allclose([values[f"{key}/class{k}"] for k in range(C)], column, rtol=1e-6)
    named = pd.DataFrame(metrics.confusion_matrix("pred", names=True))
    expected = sk.confusion_matrix(ids, z.argmax(-1), labels=range(C), sample_weight=w, normalize="pred")
    np.testing.assert_allclose(named.to_numpy(), expected, rtol=1e-6)
    assert list(named.index) == [f"class{k}" for k in range(C)]


def test_confusion_inside_other_heads():
    """Names are those of the head that is meant."""
    parts = [jh.BinaryClassHead(name="a", label_vocabulary=("no", "yes")), jh.BinaryClassHead(name="b")]
    metrics = jh.MultiHead(parts).metrics()
    assert list(metrics.confusion_matrix(names=True, key="a/scores")) == ["no", "yes"]
    assert list(metrics.confusion_matrix(names=True, key="b/scores")) == ["0", "1"]
    with pytest.raises(ValueError, match=r"Given key=None, and a head with \['a/scores', 'b/scores'\]"):
        metrics.confusion_matrix()
    steps = jh.SequentialHeadWrapper(parts[0], "mask").metrics()
    assert list(steps.confusion_matrix(names=True)) == ["no", "yes"]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: M.ConfusionMatrix(threshold=1), r"threshold must be a number in \(0, 1\)"),
        (lambda: jh.MultiClassHead(3).with_metrics(M.ConfusionMatrix(threshold=0.3)), "Leave the threshold out"),
        (lambda: jh.MultiLabelHead(3).with_metrics(M.ConfusionMatrix()), r"TruePositives\(average=None\)"),
        (lambda: jh.RegressionHead().with_metrics(M.ConfusionMatrix()), "needs a head whose rows have one class"),
        (lambda: M.TruePositives(average="macro"), "a count has no mean over classes"),
        (lambda: UNTYPED.BinaryClassHead().metrics().confusion_matrix("rows"), "normalize must be"),
        (lambda: UNTYPED.BinaryClassHead().metrics().confusion_matrix(threshold=0.3), r"one of \[0.5\].*Given 0.3"),
        (lambda: UNTYPED.MultiClassHead(3).metrics().confusion_matrix(), r"ConfusionMatrix\(\)\) keeps"),
        (lambda: UNTYPED.BinaryClassHead().metrics().confusion_matrix(names="yes"), "names must be"),
    ],
)
def test_what_has_no_confusion_is_refused(make, match):
    with pytest.raises(ValueError, match=match) as error:
        make()
    assert len(str(error.value)) <= 400
