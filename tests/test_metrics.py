"""Metric states beyond one histogram a head."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxheads as jh


class TwoScoresHead(jh.Head):
    """Two outputs, each with a histogram of its own."""

    logits_dimension = 2

    @property
    def label_spec(self):
        return jh.LabelSpec(2, "float", 0, 1)

    def losses(self, labels, logits):
        return (labels - logits) ** 2

    def observe(self, labels, logits):
        return {
            k: jh.Scores(labels[..., i : i + 1], logits[..., i : i + 1], jh.LogitGrid()) for i, k in enumerate("ab")
        }

    def summarize(self, seen):
        return {f"auc/{k}": seen[k].roc_auc() for k in "ab"}


def test_a_head_may_keep_two_histograms():
    labels = np.array([[1, 0], [0, 1], [1, 1], [0, 0]])
    logits = np.array([[1, 1], [-1, -1], [2, 3], [-3, 2]], np.float32)
    metrics = TwoScoresHead(name="t").measure(labels, logits)
    values = metrics.compute(bounds=True)
    # By hand: all four pairs of column 0 are ranked rightly, two of four in column 1.
    assert (values["auc/a/t"], values["auc/b/t"]) == (1.0, 0.5)
    assert {"auc/a/lower/t", "auc/a/upper/t", "auc/b/lower/t", "auc/b/upper/t"} < set(values)
    with pytest.raises(ValueError, match="which keeps 2"):
        metrics.curve("roc")


def test_the_mend_is_for_the_histogram_that_is_too_coarse():
    labels = np.array([[1, 1], [0, 0]])
    logits = np.array([[1, 5.001], [-1, 5.002]], np.float32)
    text = repr(TwoScoresHead().measure(labels, logits))
    assert "auc/b in [0, 1]" in text
    assert "auc/a in" not in text
    grid = eval(text.partition("bins=")[2].partition(";")[0], {"jh": jh})
    assert 4.9 < grid.low < 5.001 < 5.002 < grid.high < 5.1


def test_all_scores_equal_is_an_auc_of_one_half():
    metrics = jh.BinaryClassHead().measure(labels=[0, 1, 1], logits=jnp.full((3, 1), 0.7))
    assert metrics.compute()["auc"] == 0.5
    assert "equal no grid can tell apart" in repr(metrics)
