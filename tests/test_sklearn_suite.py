"""The metrics beside scikit-learn: its own tests, and means over classes where some are absent."""

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
from benchmarks import sklearn_suite
from sklearn import metrics as sklearn

import jaxheads as jh

M = jh.metrics
ROWS, CLASSES, LABELS = 24, 5, 4
AVERAGES = ("macro", "weighted", "micro", None)
METRICS: dict[str, tuple[Any, Any]] = {
    "precision": (M.Precision, sklearn.precision_score),
    "recall": (M.Recall, sklearn.recall_score),
    "f1": (M.FBeta, sklearn.f1_score),
    "iou": (M.IoU, sklearn.jaccard_score),
}
CATALOGUE = [
    cls(average=average, name=f"{name}_{average}") for name, (cls, _) in METRICS.items() for average in AVERAGES
]


@pytest.mark.slow
def test_scikit_learns_own_tests(capsys):
    if not sklearn_suite.find_files():
        pytest.skip("scikit-learn is installed without its tests")
    recording, answers = sklearn_suite.run()
    with capsys.disabled():
        print("", *sklearn_suite.report(recording, answers), sep="\n")

    # Recording must change nothing for scikit-learn: its tests pass as they are.
    assert not recording.ended.get("failed")
    assert recording.ended["passed"] > 300
    assert not [str(x) for x in answers if x.is_unexplained]
    outcomes = [x.outcome for x in answers]
    assert outcomes.count(sklearn_suite.AGREES) > 500
    # An interval from 0 to 1 would hold everything.
    assert max(x.width for x in answers) < 0.05


def test_a_wrong_value_and_a_refusal_are_found():
    given = {"labels": None, "pos_label": 1, "average": "binary", "sample_weight": None, "zero_division": "warn"}
    given |= {"y_true": np.array([0, 1, 1, 1]), "y_pred": np.array([0, 1, 1, 0])}
    right = sklearn_suite.Call("recall_score", given, 2 / 3, sklearn.recall_score)
    wrong = dataclasses.replace(right, value=0.66)
    refused = dataclasses.replace(right, given=given | {"sample_weight": np.array([1, -1, 1, 1])})
    absent = dataclasses.replace(right, given=given | {"average": "samples"})

    answers = sklearn_suite.answer([right, wrong, refused, absent])
    assert [x.outcome for x in answers] == ["agree", "disagree", "refused", "not applicable"]
    assert [x.is_unexplained for x in answers] == [False, True, True, False]
    table = "\n".join(sklearn_suite.report(sklearn_suite.Recording((right, wrong, refused, absent), 4, {}), answers))
    assert "| agree | 1 |" in table
    assert table.count("WITHOUT A REASON") == 2
    assert "recall_score() disagree" in table


@pytest.mark.parametrize("undefined", [0.0, *(pytest.param(x, marks=pytest.mark.slow) for x in (1.0, np.nan))])
def test_means_over_classes_count_absent_ones_as_undefined_says(undefined):
    head = jh.MultiClassHead(CLASSES).with_metrics(*CATALOGUE)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        # Some classes have no label, some are never predicted, and mostly one has neither.
        labels = rng.choice(rng.permutation(CLASSES)[: 1 + seed % 4], ROWS)
        predicted = rng.choice(rng.permutation(CLASSES)[: 1 + (seed // 2) % 4], ROWS)
        weights = rng.integers(0, 4, ROWS) / 2
        logits = np.where(predicted[:, None] == np.arange(CLASSES), 2.0, rng.uniform(-1, 1, (ROWS, CLASSES)))
        compare(head, labels[:, None], logits, weights, labels, predicted, CLASSES, undefined)


@pytest.mark.slow
@pytest.mark.parametrize("undefined", [0.0, 1.0, np.nan])
def test_means_over_labels_count_absent_ones_as_undefined_says(undefined):
    head = jh.MultiLabelHead(LABELS).with_metrics(*CATALOGUE)
    for seed in range(12):
        rng = np.random.default_rng(100 + seed)
        # From all to none of the labels occur, and from none to all are predicted.
        labels = (rng.random((ROWS, LABELS)) < 0.4) & (rng.permutation(LABELS) >= seed % (LABELS + 1))
        predicted = (rng.random((ROWS, LABELS)) < 0.5) & (rng.permutation(LABELS) < (seed // 2) % (LABELS + 1))
        weights = rng.integers(0, 4, ROWS) / 2
        logits = np.where(predicted, 1, -1) * rng.uniform(0.1, 3, (ROWS, LABELS))
        compare(head, labels, logits, weights, labels.astype(int), predicted.astype(int), LABELS, undefined)


def compare(
    head: Any, labels: Any, logits: Any, weights: Any, truth: Any, predicted: Any, classes: int, undefined: float
) -> None:
    state = head.measure(
        labels=labels.astype(np.int32 if labels.shape[1] == 1 else np.float32),
        logits=logits.astype(np.float32),
        weights=weights[:, None].astype(np.float32),
        where=np.ones((ROWS, 1), bool),
    )
    support = weights @ (labels if labels.shape[1] > 1 else labels == np.arange(classes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of wide bins, and scikit-learn's own
        values = state.compute(undefined=undefined)
        for name, (_, function) in METRICS.items():
            if name == "iou" and np.isnan(undefined):
                continue  # which scikit-learn does not take
            options: dict[str, Any] = {
                "labels": np.arange(classes),
                "sample_weight": weights,
                "zero_division": undefined,
            }
            each = function(truth, predicted, average=None, **options)
            for average in AVERAGES:
                expected = function(truth, predicted, average=average, **options)
                if average == "weighted" and support[~np.isnan(each)].sum() == 0:
                    expected = undefined  # all weights are 0; scikit-learn takes the plain mean
                key = f"{name}_{average}"
                keys = [key] if average else [f"{key}/class{i}" for i in range(classes)]
                found = [values[key] for key in keys]
                np.testing.assert_allclose(found, np.atleast_1d(expected), rtol=2e-6, err_msg=f"{key}, {undefined}")
