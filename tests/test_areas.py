"""Curves and areas that are read from metrics: exact where scores share no bin, bounded where they do."""

import dataclasses
import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import zoo
from laws import f32, many, seeds
from sklearn.calibration import calibration_curve
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score, roc_curve

import jaxheads as jh


def scores(seed: int, n: int, rate: float, center: float, sd: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < rate).astype(np.int32)
    return labels, (center + sd * (rng.standard_normal(n) + labels)).astype(np.float32)[:, None]


def test_curves_are_those_of_scikit_learn():
    """On scores that all lie in bins of their own, so that the curves are exact at every threshold between them."""
    rng = np.random.default_rng(37)
    logits = rng.permutation(np.linspace(-6, 6, 150, dtype=np.float32))[:, None]
    labels = (rng.random(150) < zoo.sigmoid(logits[:, 0])).astype(np.int32)
    weights = rng.choice(f32([0.5, 1, 3]), 150)
    measured = jh.BinaryClassHead().measure(labels, logits, weights=weights)
    probabilities = zoo.sigmoid(logits[:, 0].astype(np.float64))

    fpr, tpr, thresholds = measured.curve("roc")
    assert fpr.shape == tpr.shape == thresholds.shape
    assert np.all(np.diff(thresholds) < 0)
    expected = roc_curve(labels, probabilities, sample_weight=weights, drop_intermediate=False)
    points = {(round(a, 6), round(b, 6)) for a, b in zip(fpr, tpr, strict=True)}
    assert {(round(a, 6), round(b, 6)) for a, b in zip(*expected[:2], strict=True)} <= points
    for i in (0, 700, 1024, 1300, -1):
        above = probabilities > thresholds[i]
        np.testing.assert_allclose(tpr[i], weights[above & (labels == 1)].sum() / weights[labels == 1].sum(), 1e-6)

    precision, recall, thresholds = measured.curve("pr")
    assert precision.shape == recall.shape == thresholds.shape
    expected = precision_recall_curve(labels, probabilities, sample_weight=weights)
    points = {(round(a, 6), round(b, 6)) for a, b in zip(precision, recall, strict=True)}
    assert {(round(a, 6), round(b, 6)) for a, b in zip(*expected[:2], strict=True)} <= points
    for i in (0, 700, 1024, 1300):
        above = probabilities > thresholds[i]
        np.testing.assert_allclose(precision[i], weights[above & (labels == 1)].sum() / weights[above].sum(), 1e-6)
    with pytest.raises(ValueError, match="roc"):
        measured.curve("lift")


def test_reliability_is_scikit_learns_calibration_curve():
    labels, logits = scores(38, 4000, 0.4, 0.0, 2.0)
    metrics = jh.BinaryClassHead().measure(labels, logits)
    predicted, observed, weight = metrics.reliability(bins=8)
    probabilities = zoo.sigmoid(logits[:, 0].astype(np.float64))
    expected_observed, expected_predicted = calibration_curve(labels, probabilities, n_bins=8)
    np.testing.assert_allclose(predicted, expected_predicted, atol=2e-3)
    # Rows in the bin of an edge may fall on its other side.
    np.testing.assert_allclose(observed, expected_observed, atol=1e-2)
    assert weight.sum() == 4000
    for bins in (0, 2.5, True):
        with pytest.raises(ValueError, match="bins"):
            metrics.reliability(bins=bins)  # pyright: ignore[reportArgumentType]
    one_sided = jh.BinaryClassHead().measure(np.ones_like(labels), np.full_like(logits, 2)).reliability(bins=10)
    assert [x.tolist() for x in one_sided[1:]] == [[1.0], [4000.0]]


def of_classes(multi: bool) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A head with a histogram of each of three classes; labels, logits, the score and the label of each class."""
    rng = np.random.default_rng(41)
    n, names = 150, ("sea", "sun", "sand")
    logits = rng.permuted(np.linspace(-6, 6, n, dtype=np.float32)[:, None] + np.zeros((1, 3), np.float32), axis=0)
    every = logits.astype(np.float64)
    M: Any = jh.metrics
    if multi:
        labels = (rng.random((n, 3)) < zoo.sigmoid(every)).astype(np.int32)
        head = jh.MultiLabelHead(3, label_vocabulary=names, slices=jh.Slices("g", 2))
        return head.with_metrics(M.RocAuc(average=None)), labels, logits, every, labels
    labels = (every + rng.gumbel(size=(n, 3))).argmax(-1)
    # The log odds of each class against the two others.
    odds = every - np.logaddexp(np.roll(every, 1, -1), np.roll(every, 2, -1))
    head = jh.MultiClassHead(3, label_vocabulary=names, slices=jh.Slices("g", 2))
    head = head.with_metrics(M.OneVsRestAuc(average=None))
    return head, labels, logits, odds, (labels[:, None] == np.arange(3)).astype(np.int32)


@pytest.mark.parametrize("multi", [True, False], ids=["labels", "classes"])
def test_curves_of_one_class_are_those_of_scikit_learn(multi):
    head, labels, logits, scored, truth = of_classes(multi)
    groups = np.arange(150) % 2
    weights = np.random.default_rng(42).choice(f32([0.5, 1, 3]), 150)
    metrics = head.measure(labels, logits, {"g": groups}, weights=weights)
    for k, given in ((0, "sea"), (1, 1), (2, "sand")):
        for which, own in ((None, groups >= 0), (1, groups == 1)):
            y, z, w = truth[own, k], scored[own, k], weights[own]
            fpr, tpr, thresholds = metrics.curve("roc", slice=which, class_name=given)
            above = z > np.log(thresholds[1:-1, None]) - np.log1p(-thresholds[1:-1, None])
            true, all_ = (above * y) @ w, above @ w
            np.testing.assert_allclose(tpr[1:-1], true / (y @ w), rtol=1e-6)
            np.testing.assert_allclose(fpr[1:-1], (all_ - true) / ((1 - y) @ w), rtol=1e-6, atol=1e-12)
            np.testing.assert_allclose(auc(fpr, tpr), roc_auc_score(y, z, sample_weight=w), atol=2e-3)
            precision, recall, thresholds = metrics.curve("pr", slice=which, class_name=given)
            np.testing.assert_allclose(recall[1:-1], true[::-1] / (y @ w), rtol=1e-6)
            some = all_[::-1] > 0
            np.testing.assert_allclose(precision[1:-1][some], (true / np.maximum(all_, 1e-9))[::-1][some], rtol=1e-6)
        predicted, observed, weight = metrics.reliability(5, class_name=given)
        p = zoo.sigmoid(scored[:, k])
        step = np.minimum((p * 5).astype(int), 4)
        for i, found in zip(np.unique(step), np.transpose([predicted, observed, weight]), strict=True):
            mine = step == i
            exact = [np.average(p[mine], weights=weights[mine]), np.average(truth[mine, k], weights=weights[mine])]
            # Probabilities are those of the middles of bins; a row in the bin of an edge may fall on its other side.
            np.testing.assert_allclose(found[:2], exact, atol=1e-2)
            np.testing.assert_allclose(found[2], weights[mine].sum(), rtol=1e-5)


@pytest.mark.parametrize("multi", [True, False], ids=["labels", "classes"])
def test_reliability_of_one_class_is_exact_beside_its_calibration(multi):
    head, labels, logits, scored, truth = of_classes(multi)
    calibrated = dataclasses.replace(head, extra_metrics=(jh.metrics.ExpectedCalibrationError(8, average=None),))
    metrics = calibrated.measure(labels, logits, {"g": np.zeros(150, int)})
    for k in range(3):
        predicted, observed, weight = metrics.reliability(8, class_name=k)
        expected = calibration_curve(truth[:, k], zoo.sigmoid(scored[:, k]), n_bins=8)
        np.testing.assert_allclose(predicted, expected[1], rtol=1e-5)
        np.testing.assert_allclose(observed, expected[0], rtol=1e-5)
        assert weight.sum() == 150


def test_the_curve_of_a_class_tells_that_its_bins_are_coarse():
    head = jh.MultiLabelHead(2).with_metrics(jh.metrics.Recall(average=None))
    rng = np.random.default_rng(43)
    # The few entries of the first class share a bin, which all entries together do not show.
    logits = np.stack([0.1 + 1e-3 * rng.random(1000), 12 * rng.random(1000) - 6], -1).astype(np.float32)
    labels = np.stack([rng.random(1000) < 0.5, logits[:, 1] > 0.5], -1)
    metrics = head.measure(labels, logits, where=(np.arange(1000) < 20)[:, None] | np.array([[False, True]]))
    metrics.curve("roc")
    metrics.curve("roc", class_name="class1")
    with pytest.warns(jh.GridWarning, match="auc/class0"):
        metrics.curve("roc", class_name="class0")


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: jh.MultiLabelHead(3).metrics().curve("roc", class_name=1),
            r"Keep one of each.*RocAuc\(average=None\)",
        ),
        (lambda: jh.MultiLabelHead(3).metrics().reliability(class_name=1), "Keep one of each"),
        (lambda: jh.BinaryClassHead().metrics().curve("pr", class_name=1), "scores of one class. Leave it out"),
        (lambda: of_classes(True)[0].metrics().curve("pr", class_name=3), "from 0 to 2, or one of .*'sand'.*Given 3"),
        (lambda: of_classes(True)[0].metrics().reliability(class_name="sky"), "Given 'sky'"),
        (lambda: jh.MultiClassHead(3).metrics().curve("roc", class_name=1), "reads one score histogram"),
    ],
)
def test_a_class_without_a_histogram_has_no_curve(call, match):
    with pytest.raises(ValueError, match=match) as error:
        call()
    assert len(str(error.value)) <= 400


def test_heads_without_scores_have_no_curves():
    metrics = jh.RegressionHead().metrics()
    for call in (lambda: metrics.curve("roc"), lambda: metrics.reliability()):
        with pytest.raises(ValueError, match="RegressionHead"):
            call()


def test_areas_of_rare_events():
    labels, logits = scores(39, 15_000, 0.01, -10.0, 2.0)
    values = jh.BinaryClassHead().measure(labels, logits).compute(bounds=True)
    exact = roc_auc_score(labels, logits[:, 0])
    assert abs(values["auc"] - exact) < 1e-4
    assert values["auc/lower"] <= exact <= values["auc/upper"]
    assert values["auc/upper"] - values["auc/lower"] < 2e-2
    tensorflows = jh.BinaryClassHead(bins=jh.ThresholdGrid(200)).measure(labels, logits).compute(bounds=True)
    assert tensorflows["auc/lower"] <= exact <= tensorflows["auc/upper"]
    assert tensorflows["auc"] < exact - 0.02


def exact_pr_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Davis and Goadrich's interpolation over all distinct scores, in float64."""
    _, rank = np.unique(-scores, return_inverse=True)
    tp = np.concatenate([[0], np.cumsum(np.bincount(rank, labels))]).astype(np.float64)
    fp = np.concatenate([[0], np.cumsum(np.bincount(rank, 1 - labels))]).astype(np.float64)
    area = 0.0
    for k in range(len(tp) - 1):
        gain, p_low, p_high = tp[k + 1] - tp[k], tp[k] + fp[k], tp[k + 1] + fp[k + 1]
        slope = gain / (p_high - p_low)
        offset = tp[k] - slope * p_low
        area += slope * gain + (slope * offset * np.log(p_high / p_low) if p_low > 0 and slope > 0 else 0.0)
    return float(area / tp[-1])


@many
@hypothesis.given(seed=seeds, levels=st.sampled_from([2, 5, 1000]), center=st.sampled_from([-12.0, 0.0, 30.0]))
def test_bounds_hold_the_areas_ties_included(seed, levels, center):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 64)
    labels[:2] = 0, 1
    logits = (center + 0.01 * rng.integers(0, levels, (64, 1))).astype(np.float32)
    values = jh.BinaryClassHead().measure(labels, logits).compute(bounds=True)
    for key, exact in (
        ("auc", roc_auc_score(labels, logits[:, 0])),
        ("auc_precision_recall", exact_pr_auc(labels, logits[:, 0])),
    ):
        assert values[f"{key}/lower"] - 1e-6 <= exact <= values[f"{key}/upper"] + 1e-6
        assert values[f"{key}/lower"] - 1e-6 <= values[key] <= values[f"{key}/upper"] + 1e-6


def test_ties_count_half():
    values = jh.BinaryClassHead().measure([1, 0, 1, 0], np.ones((4, 1), np.float32)).compute(bounds=True)
    assert (values["auc"], values["auc/lower"], values["auc/upper"]) == (0.5, 0.0, 1.0)


@pytest.mark.parametrize(
    ("center", "sd"),
    [
        (-10.0, 0.02),
        pytest.param(-10.0, 0.001, marks=pytest.mark.slow),
        pytest.param(25.0, 0.02, marks=pytest.mark.slow),
        (25.0, 0.001),
    ],
)
def test_a_coarse_grid_says_so_and_names_the_mend(center, sd):
    labels, logits = scores(40, 5000, 0.3, center, sd)
    head = jh.BinaryClassHead()
    metrics = head.metrics()
    for part in range(5):
        rows = slice(1000 * part, 1000 * (part + 1))
        metrics = head.update_metrics(metrics, None, logits[rows], labels[rows])
    exact = roc_auc_score(labels, logits[:, 0])
    texts = [repr(metrics)]
    while "too coarse" in texts[-1] and len(texts) < 5:
        values = metrics.compute(bounds=True)
        assert values["auc/lower"] - 1e-6 <= exact <= values["auc/upper"] + 1e-6
        # As a reader would: paste what the message says.
        mend = re.search(r"bins=(jh\.\w+\([^)]*\))", texts[-1])
        assert mend
        head = jh.BinaryClassHead(bins=eval(mend[1], {"jh": jh}))
        metrics = head.measure(labels, logits)
        texts.append(repr(metrics))
    values = metrics.compute(bounds=True)
    assert head.bins != jh.LogitGrid()
    assert values["auc/upper"] - values["auc/lower"] <= 1e-2
    assert abs(values["auc"] - exact) < 1e-3
    assert "too coarse" not in repr(jh.BinaryClassHead().measure([0, 1], f32([[-1.0], [1.0]])))
