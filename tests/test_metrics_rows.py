"""The confusion of two classes, and metrics of whole rows: scikit-learn's values, and the laws."""

import functools
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

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
    ones = (cls(average=None) for cls in COUNTS)
    head = jh.MultiClassHead(C).with_metrics(M.ConfusionMatrix(), M.HammingLoss(), *ones)
    ids = labels.argmax(-1).astype(np.int32)
    metrics = head.measure(ids, poisoned(logits, where), weights=weights, where=where)
    ids = y.argmax(-1)
    each = sk.multilabel_confusion_matrix(ids, z.argmax(-1), labels=range(C), sample_weight=w).reshape(C, 4)
    values = metrics.compute()
    for key, column in zip(KEYS, each.T, strict=True):
        np.testing.assert_allclose([values[f"{key}/class{k}"] for k in range(C)], column, rtol=1e-6)
    loss = sk.hamming_loss(ids, z.argmax(-1), sample_weight=w)
    np.testing.assert_allclose(values["hamming_loss"], loss, rtol=1e-6)
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


# Rows of several labels

SCORES = {
    "precision": (M.Precision, {}, sk.precision_score, {}),
    "recall": (M.Recall, {}, sk.recall_score, {}),
    "f1": (M.FBeta, {}, sk.f1_score, {}),
    "fbeta_2": (M.FBeta, {"beta": 2}, sk.fbeta_score, {"beta": 2}),
    "iou": (M.IoU, {}, sk.jaccard_score, {}),
}
THRESHOLDS = ((None, ""), (0.3, "/positive_threshold_0.3"))


@functools.cache
def of_rows(bins: Any) -> Any:
    ones = [cls(threshold=t, average="samples", **own) for cls, own, _, _ in SCORES.values() for t, _ in THRESHOLDS]
    more = [cls(t) for cls in (M.HammingLoss, M.ExactMatch) for t, _ in THRESHOLDS]
    return jh.MultiLabelHead(C, bins=bins).with_metrics(*ones, *more)


@functools.cache
def sparse(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows among which some have no labels, some no predictions, some neither."""
    labels, logits, weights, where = drawn(seed, C)
    some, none = np.random.default_rng(seed).random((2, N, 1)) < 0.2
    return labels * ~some, (logits - 8 * none).astype(np.float32), weights, where


def jaccard(y: np.ndarray, decided: np.ndarray, average: str, sample_weight: Any, zero_division: float) -> float:
    """scikit-learn's takes 0 and 1 for `zero_division` only: rows without a value are left out by hand."""
    union = (y + decided > 0).sum(1)
    each = np.divide((y * decided).sum(1), union, where=union > 0, out=np.full(len(y), zero_division))
    there = ~np.isnan(each)
    return float(np.average(each[there], weights=sample_weight[there]))


@pytest.mark.parametrize("bins", [jh.GrowingGrid(), jh.ThresholdGrid(12)], ids=repr)
def test_means_over_rows_are_those_of_scikit_learn(bins):
    labels, logits, weights, where = sparse(5)
    metrics = merged(of_rows(bins), labels, poisoned(logits, where), weights, where)
    y, z, w = live_rows(labels, logits, weights, where)
    found = {undefined: metrics.compute(undefined, warn=False) for undefined in (np.nan, 0.0)}
    for t, ending in THRESHOLDS:
        decided = (1 / (1 + np.exp(-z)) > (t or 0.5)).astype(int)
        assert {0} < {*y.sum(1)}
        assert {0} < {*decided.sum(1)}
        for undefined, values in found.items():
            given = {"average": "samples", "sample_weight": w, "zero_division": undefined}
            for key, (_, _, score, own) in SCORES.items():
                expected = (jaccard if key == "iou" else score)(y, decided, **given, **own)
                np.testing.assert_allclose(values[f"{key}_samples{ending}"], expected, rtol=2e-6, err_msg=key)
        iou = sk.jaccard_score(y, decided, average="samples", sample_weight=w, zero_division=0)
        np.testing.assert_allclose(found[0.0][f"iou_samples{ending}"], iou, rtol=2e-6)
        loss = sk.hamming_loss(y, decided, sample_weight=w)
        np.testing.assert_allclose(found[0.0][f"hamming_loss{ending}"], loss, rtol=2e-6)
        match = sk.accuracy_score(y, decided, sample_weight=w)
        np.testing.assert_allclose(found[0.0][f"exact_match{ending}"], match, rtol=2e-6)


def test_entries_of_rows_have_masks_and_weights():
    """A masked entry is not there; one of weight 2 counts twice in its row. The mean weight is that of the row."""
    labels, logits, _, _ = sparse(6)
    rng = np.random.default_rng(6)
    where, weights = rng.random((N, C)) < 0.7, rng.choice([0, 1, 2, 0.5], (N, C)).astype(np.float32)
    head = of_rows(jh.GrowingGrid())
    values = head.measure(labels, poisoned(logits, where), weights=weights, where=where).compute()
    live = where * weights.astype(np.float64)
    hit, found, there = ((live * x).sum(1) for x in (labels * (logits > 0), logits > 0, labels))
    of_row = live.sum(1) / np.maximum(where.sum(1), 1)
    for key, top, base in (
        ("precision", hit, found),
        ("recall", hit, there),
        ("f1", 2 * hit, found + there),
        ("iou", hit, found + there - hit),
    ):
        own = base > 0
        expected = np.average(top[own] / base[own], weights=of_row[own])
        np.testing.assert_allclose(values[f"{key}_samples"], expected, rtol=2e-6, err_msg=key)


def test_a_nan_shows_and_a_row_without_entries_is_not_there():
    labels, logits, weights, where = sparse(7)
    head = of_rows(jh.GrowingGrid())
    broken = logits.copy()
    broken[np.flatnonzero((where & (weights > 0)).ravel())[0], 0] = np.nan
    values = head.measure(labels, broken, weights=weights, where=where).compute()
    assert np.isnan([values[f"{key}_samples"] for key in SCORES]).all()
    empty = head.measure(labels, broken, weights=weights, where=np.zeros_like(where))
    for undefined in (np.nan, 0.0, -7.0):
        values = empty.compute(undefined)
        np.testing.assert_array_equal([values[f"{key}_samples"] for key in SCORES], undefined)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: jh.BinaryClassHead().with_metrics(M.FBeta(average="samples")), "mean over rows of several labels"),
        (lambda: jh.MultiClassHead(3).with_metrics(M.Recall(average="samples")), "mean over rows of several labels"),
        (lambda: jh.RegressionHead().with_metrics(M.IoU(average="samples")), "Given a head with.*moments"),
        (lambda: M.Specificity(average="samples"), "average must be one of"),
        (lambda: M.ExactMatch(0.0), r"threshold must be a number in \(0, 1\)"),
        (lambda: jh.MultiClassHead(3).with_metrics(M.ExactMatch(0.3)), "leave it out"),
    ],
)
def test_what_has_no_rows_of_labels_is_refused(make, match):
    with pytest.raises(ValueError, match=match) as error:
        make()
    assert len(str(error.value).split("\n-----")[0]) <= 400


# The best of each row


@functools.cache
def best_of_rows() -> Any:
    ones = [cls(k) for cls in (M.RecallAtK, M.PrecisionAtK) for k in (1, 3, C)]
    # Beside a mean over rows of every kind, for the laws of devices, slices and replicas.
    return jh.MultiLabelHead(C).with_metrics(*ones, M.FBeta(average="samples"), M.ExactMatch(0.3))


def best_by_hand(labels: Any, logits: Any, there: Any, of_row: Any, k: int) -> tuple[float, float]:
    """Recall and precision of the k best of each row, row by row: a stable sort of the entries that are there."""
    recalls, precisions, each, every = [], [], [], []
    for y, z, own, w in zip(labels, logits, there, of_row, strict=True):
        hits = y[own][np.argsort(-z[own], kind="stable")[:k]].sum()
        if y[own].sum():
            recalls.append(hits / y[own].sum())
            each.append(w)
        precisions.append(hits / k)
        every.append(w)
    return float(np.average(recalls, weights=each)), float(np.average(precisions, weights=every))


@pytest.mark.parametrize("entries", [False, True], ids=["rows", "entries"])
def test_the_best_of_rows(entries):
    labels, logits, weights, where = sparse(8)
    labels = np.where(labels > 0, np.random.default_rng(8).choice([0.25, 1], labels.shape), 0).astype(np.float32)
    if entries:
        rng = np.random.default_rng(9)
        where, weights = rng.random((N, C)) < 0.7, rng.choice([0, 1, 2.5], (N, C)).astype(np.float32)
    logits = np.where(logits > 1, logits, np.where(logits < -1, -np.inf, logits)).astype(np.float32)
    values = merged(best_of_rows(), labels, poisoned(logits, where), weights, where).compute()
    where, live = np.broadcast_to(where, logits.shape), np.broadcast_to(where * weights, logits.shape)
    own = live.any(-1)
    of_row = live.sum(1) / np.maximum(where.sum(1), 1)
    for k in (1, 3, C):
        y, z = (x[own].astype(np.float64) for x in (labels, logits))
        expected = best_by_hand(y, z, live[own] > 0, of_row[own], k)
        found = values[f"recall_at_{k}"], values[f"precision_at_{k}"]
        np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_the_best_of_a_row_with_a_nan_and_of_a_row_without_labels():
    head = best_of_rows()
    logits = f32([[np.nan, 1, 2, 3, 4], [5, 4, 3, 2, 1]])
    values = head.measure(f32([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]), logits).compute(-7.0, warn=False)
    assert (values["recall_at_1"], values["precision_at_3"]) == (-3.5, 0)


@pytest.mark.parametrize("kind", ["auto", "explicit", "classes", "manual"])
def test_rows_do_not_know_of_devices(kind):
    labels, logits, weights, where = sparse(8)
    where, weights = np.repeat(where, C, 1), np.repeat(weights, C, 1)
    head = best_of_rows()
    whole = head.measure(labels, logits, weights=weights, where=where).compute()
    data = (labels, logits, weights, where)
    axes = AxisType.Explicit if kind in ("explicit", "classes") else AxisType.Auto
    # With 5 devices each may hold one of the classes.
    shape = (1, C) if kind == "classes" else (4, 1)
    mesh = jax.make_mesh(shape, ("rows", "columns"), (axes, axes), devices=jax.devices()[: np.prod(shape)])

    def measure(labels: Any, logits: Any, weights: Any, where: Any) -> jh.Metrics:
        return head.measure(labels, logits, weights=weights, where=where)

    if kind == "manual":
        spec = P("rows")
        spread = jax.shard_map(
            lambda *data: measure(*data).psum("rows"), mesh=mesh, in_specs=(spec,) * 4, out_specs=P()
        )
        found = jax.jit(spread)(*data)
    else:
        found = jax.jit(measure)(*(jax.device_put(x, NamedSharding(mesh, P("rows", "columns"))) for x in data))
    for key, value in found.compute().items():
        np.testing.assert_allclose(value, whole[key], rtol=2e-6, atol=1e-6, err_msg=key)


def test_rows_in_slices_and_replicas():
    labels, logits, weights, where = sparse(8)
    metrics = [m for m in best_of_rows().extra_metrics if m.unit == "element"]
    head = jh.MultiLabelHead(C, slices=jh.Slices("g", 2), bootstrap=jh.Bootstrap(20)).with_metrics(*metrics)
    groups = np.arange(N) % 2
    found = head.measure(labels, logits, {"g": groups}, weights=weights, where=where, key=jax.random.key(0))
    values, sliced = found.compute(confidence=0.9), found.by_slice()
    for k in range(2):
        own = where & (groups == k)[:, None]
        expected = best_of_rows().measure(labels, logits, weights=weights, where=own).compute()
        for key in ("recall_at_3", "precision_at_1", "f1_samples"):
            np.testing.assert_allclose(sliced[key][k], expected[key], rtol=2e-6)
    assert values["recall_at_3/ci_lower"] < values["recall_at_3"] < values["recall_at_3/ci_upper"]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: M.RecallAtK(0), "positive integer k"),
        (lambda: M.PrecisionAtK(2.5), "positive integer k"),
        (lambda: jh.MultiLabelHead(3).with_metrics(M.RecallAtK(4)), "more than there are: 3 classes"),
        (lambda: jh.MultiClassHead(3).with_metrics(M.RecallAtK(2)), "TopKAccuracy"),
        (lambda: jh.BinaryClassHead().with_metrics(M.PrecisionAtK(1)), "mean over rows of several labels"),
    ],
)
def test_what_has_no_best_of_rows_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
