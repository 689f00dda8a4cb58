"""Two models compared by paired replicas: by scikit-learn and NumPy on the drawn rows, replica by replica."""

import functools
import pickle
from typing import Any, cast

import jax
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

import jaxheads as jh
from jaxheads.metrics import groups

N, REPLICAS, KEY = 240, 30, jax.random.key(3)
SLICES = jh.Slices("origin", 2, names=("JFK", "LGA"))
HEAD = jh.BinaryClassHead(slices=SLICES, bootstrap=jh.Bootstrap(REPLICAS))
REGRESSION = jh.RegressionHead(bootstrap=jh.Bootstrap(REPLICAS))


@functools.cache
def draw():
    """Labels, weights, masks, slices; and the logits of two models, rounded to bins of their own."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (N, 1))
    weights, where = rng.choice(np.array([0, 0.5, 1, 2], np.float32), (N, 1)), rng.random((N, 1)) < 0.9
    origin = rng.integers(-1, 2, (N, 1)).astype(np.int32)
    logits = [(labels + rng.normal(size=(N, 1)) * sd).astype(np.float32).round(1) for sd in (1.0, 1.1)]
    return labels, weights, where, origin, logits


@functools.cache
def draws():
    """How often each replica counts each row; the first entry is all data."""
    of = jax.jit(lambda key, w: [groups.poisson(one, w) for one in jax.random.split(key, REPLICAS)])
    return np.stack([np.ones((N, 1)), *map(np.asarray, of(KEY, draw()[1]))]).astype(np.float64)[..., 0]


def measure(model, head=HEAD, key=KEY, keep=slice(None), **changes):
    labels, weights, where, origin, logits = draw()
    given = {"labels": labels, "logits": logits[model], "weights": weights, "where": where, **changes}
    given = {name: x[keep] for name, x in given.items()}
    return head.measure(**given, features={"origin": origin[keep]}, key=key)


def differences(score, inside):
    """The differences of a score on all data, then on each replica: `score(labels, logits, weights)` in float64."""
    labels, weights, where, _, logits = draw()
    every = draws() * (weights * where)[:, 0] * inside
    return np.array([np.subtract(*(score(labels[:, 0], z[:, 0].astype(float), w) for z in logits)) for w in every])


def cross_entropy(labels, logits, weights):
    return np.average(np.logaddexp(0, np.where(labels == 1, -logits, logits)), weights=weights)


def assert_row(row, expected, confidence):
    each, tail = expected[1:], (1 - confidence) / 2
    ends = np.quantile(each, [tail, 1 - tail])
    share = np.mean(each > 0) + np.mean(each == 0) / 2
    np.testing.assert_allclose(
        [row[name] for name in ("difference", "ci_lower", "ci_upper", "share_above_zero")],
        [expected[0], *ends, share],
        atol=3e-6,
    )


def test_differences_are_those_of_each_replica():
    found = measure(0).compare(measure(1), confidence=0.8)
    origin = draw()[3][:, 0]
    scores: dict[str, Any] = {
        "average_loss": cross_entropy,
        "auc": lambda labels, z, w: roc_auc_score(labels, z, sample_weight=w),
        "accuracy": lambda labels, z, w: np.average((z > 0) == labels, weights=w),
    }
    for metric, score in scores.items():
        for i, name in enumerate((None, "JFK", "LGA")):
            inside = np.ones(N) if name is None else origin == i - 1
            assert_row(found.find(metric, name), differences(score, inside), 0.8)
    row, values = found.find("auc"), measure(0).compute()
    assert (row["a"], row["b"]) == (values["auc"], measure(1).compute()["auc"])
    assert found.find("label/mean")["difference"] == 0
    assert found.find("label/mean")["share_above_zero"] == 0.5
    table = pd.DataFrame(found)
    assert list(table) == ["metric", "slice", "a", "b", "difference", "ci_lower", "ci_upper", "share_above_zero"]
    assert set(table["metric"]) == set(values)
    assert len(table) == 3 * len(values)
    again = pickle.loads(pickle.dumps(found))
    assert repr(again) == repr(found)
    assert "Comparison a - b: intervals of 0.8 from 30 paired replicas\n" in repr(found)


def test_the_other_way_round_changes_the_signs():
    one, two = (measure(i) for i in (0, 1))
    forth, back = one.compare(two), two.compare(one)
    np.testing.assert_array_equal(forth["difference"], -back["difference"])
    np.testing.assert_array_equal(forth["ci_lower"], -back["ci_upper"])
    np.testing.assert_allclose(forth["share_above_zero"], 1 - back["share_above_zero"], atol=1e-6)


def test_batches_add_up_and_bins_may_differ():
    """Replicas are paired batch by batch."""
    finer = jh.BinaryClassHead(slices=SLICES, bootstrap=jh.Bootstrap(REPLICAS), bins=jh.LogitGrid(-8, 8, 1000))
    keys, halves = jax.random.split(KEY), (slice(0, N // 2), slice(N // 2, N))
    one, two = (
        [measure(model, head, key, keep) for key, keep in zip(keys, halves, strict=True)]
        for model, head in ((0, HEAD), (1, finer))
    )
    found = (one[0] + one[1]).compare(two[0] + two[1])
    labels, weights, where, _, logits = draw()
    expected = differences(cross_entropy, np.ones(N))[0]
    np.testing.assert_allclose(found.find("average_loss")["difference"], expected, atol=3e-6)
    # A head with coarser bins has the same accuracy, because z = 0 is an edge.
    right = [np.average((z > 0) == labels, weights=weights * where) for z in logits]
    np.testing.assert_allclose(found.find("accuracy")["difference"], right[0] - right[1], atol=1e-6)


def test_small_slices_and_what_was_not_measured_are_nan():
    slices = jh.Slices("origin", 2, min_count=N)
    head = jh.BinaryClassHead(slices=slices, bootstrap=jh.Bootstrap(REPLICAS))
    found = measure(0, head).compare(measure(1, head))
    assert np.isfinite(found.find("auc")["ci_lower"])
    assert np.isnan([x for name, x in found.find("auc", 1).items() if name not in ("metric", "slice")]).all()
    empty = head.metrics().compare(head.metrics())
    assert np.isnan(np.stack([empty[name] for name in ("difference", "ci_upper", "share_above_zero")])).all()


def test_several_heads_and_tables():
    """The names are full ones; a confusion matrix is left out."""
    inner = jh.MultiClassHead(3, name="a", bootstrap=jh.Bootstrap(4)).with_metrics(jh.metrics.ConfusionMatrix())
    head = jh.MultiHead([inner, jh.RegressionHead(name="b", bootstrap=jh.Bootstrap(4))])
    rng = np.random.default_rng(1)
    labels = {"a": rng.integers(0, 3, (50, 1)), "b": rng.normal(size=(50, 1)).astype(np.float32)}
    one, two = (head.measure(labels, rng.normal(size=(50, 4)).astype(np.float32), key=KEY) for _ in range(2))
    found = one.compare(two)
    assert "slice" not in found
    assert set(found["metric"]) == set(one.compute()) - {"confusion_matrix/a"}
    row = found.find("average_loss/b")
    np.testing.assert_allclose(row["difference"], row["a"] - row["b"], atol=1e-6)


def regression(labels, model=0, head=REGRESSION, key=KEY, **given):
    return head.measure(labels, draw()[4][model], key=key, **given)


@functools.cache
def numbers():
    return np.random.default_rng(2).normal(size=(N, 1)).astype(np.float32) + 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measure(0).compare(cast(Any, 3)), "takes the Metrics of another model. Given 3"),
        (lambda: measure(0).compare(measure(1), confidence=95), "between 0 and 1"),
        (lambda: jh.RegressionHead().metrics().compare(REGRESSION.metrics()), "keeps none(.|\n)*Bootstrap"),
        (lambda: REGRESSION.metrics().compare(jh.RegressionHead().metrics()), "keeps none(.|\n)*Bootstrap"),
        (lambda: measure(0).compare(regression(numbers())), "one kind.*BinaryClassHead.*RegressionHead"),
        (
            lambda: REGRESSION.metrics().compare(jh.RegressionHead(bootstrap=jh.Bootstrap(4)).metrics()),
            "Given 30 and 4",
        ),
        (
            lambda: REGRESSION.metrics().compare(jh.RegressionHead(name="b", bootstrap=jh.Bootstrap(30)).metrics()),
            r"left one has \['average_loss', .*right one \['average_loss/b'",
        ),
        (
            lambda: measure(0).compare(jh.BinaryClassHead(bootstrap=jh.Bootstrap(REPLICAS)).metrics()),
            "same slices.*JFK.*and None",
        ),
        (lambda: measure(0).compare(HEAD.metrics()), "same rows.*add up to .* and 0"),
        (lambda: measure(0).compare(measure(1, key=jax.random.key(4))), "weights of the replicas differ"),
        (lambda: regression(numbers()).compare(regression(numbers()[::-1], 1)), "means of the replicas' labels differ"),
        (lambda: regression(numbers()).compare(regression(numbers() + 1, 1)), "means of the replicas' labels differ"),
        (lambda: measure(0).compare(measure(1)).find("auc", "EWR"), "'auc' with slice='EWR'.*'JFK'"),
        (
            lambda: jax.eval_shape(lambda m: m.compare(m), REGRESSION.metrics()),
            r"compare\(\) reads one concrete state, outside jit",
        ),
    ],
)
def test_what_does_not_compare_is_refused(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert len(str(caught.value)) <= 400


def test_classes_of_another_number_do_not_compare():
    one, two = (jh.MultiClassHead(n, bootstrap=jh.Bootstrap(4)).metrics() for n in (3, 4))
    with pytest.raises(ValueError, match=r"same labels and classes\. Given MultiClassHead"):
        one.compare(two)


@pytest.mark.parametrize("kind", ["classes", "labels"])
def test_other_labels_of_several_classes_are_seen(kind):
    """By counts of classes, or by positives of the histogram; also in another order, which changes replicas alone."""
    rng = np.random.default_rng(1)
    z = rng.normal(size=(60, 3)).astype(np.float32)
    bootstrap = jh.Bootstrap(REPLICAS)
    if kind == "classes":
        head = jh.MultiClassHead(3, extra_metrics=[jh.metrics.BalancedAccuracy()], bootstrap=bootstrap)
        labels = rng.integers(0, 3, (60, 1))
    else:
        head = jh.MultiLabelHead(3, bootstrap=bootstrap)
        labels = rng.integers(0, 2, (60, 3))
    one = jax.jit(lambda y, z: head.measure(y, z, key=KEY))
    found = one(labels, z).compare(one(labels, 2 * z))
    assert found.find("average_loss")["difference"] != 0
    for other in (np.roll(labels, 1, 0), np.flip(labels, 0)):
        with pytest.raises(ValueError, match="the weights of the replicas' labels differ"):
            one(labels, z).compare(one(other, z))
