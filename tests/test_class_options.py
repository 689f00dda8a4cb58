"""Options of heads of classes: smoothing, class weights, focus, shares, distributions, thresholds.

Expected values are float64 formulas, and the functions of optax and scikit-learn. `test_laws.py` runs all laws on four
heads with options.
"""

import dataclasses
import pickle
from typing import Any

import jax
import numpy as np
import optax
import pytest
import sklearn.metrics
from sklearn.utils.class_weight import compute_class_weight

import jaxheads as jh

RNG = np.random.default_rng(7)
ROWS, N = 12, 4
IDS = RNG.integers(0, N, (ROWS, 1)).astype(np.int32)
Z = RNG.normal(size=(ROWS, N)).astype(np.float32) * 3
ONE_HOT = np.eye(N, dtype=np.float32)[IDS[:, 0]]
SHARES = (0.7 * ONE_HOT + 0.3 * ONE_HOT[::-1]).astype(np.float32)
BITS = RNG.integers(0, 2, (ROWS, 1)).astype(np.float32)
HOT = RNG.integers(0, 2, (ROWS, N)).astype(np.float32)
WEIGHTS = (0.5, 1.0, 2.0, 4.0)
WRONG: Any = 2.0
PRIORS = (0.1, 0.2, 0.3, 0.4)


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


def softplus(z):
    return np.logaddexp(0.0, z)


def log_softmax(z):
    return z - np.logaddexp.reduce(z, -1, keepdims=True)


def softmax_formula(shares, z, smoothing: Any = 0.0, weights: Any = 1.0, gamma=0.0, shift: Any = 0.0, z_loss=0.0):
    z = z.astype(np.float64) + shift
    q = (1 - smoothing) * shares.astype(np.float64) + smoothing / N
    log = log_softmax(z)
    losses = (weights * q * (1 - np.exp(log)) ** gamma * -log).sum(-1)
    return losses + z_loss * np.logaddexp.reduce(z, -1) ** 2


def sigmoid_formula(
    y, z, smoothing: Any = 0.0, negative: Any = 1.0, positive: Any = 1.0, gamma: Any = 0.0, shift: Any = 0.0
):
    z, y = z.astype(np.float64) + shift, (1 - smoothing) * y.astype(np.float64) + smoothing / 2
    p = np.exp(-softplus(-z))
    return positive * y * (1 - p) ** gamma * softplus(-z) + negative * (1 - y) * p**gamma * softplus(z)


def slopes(formula, z):
    """The gradient of the mean of a formula of rows, by central differences in float64."""
    z, out = z.astype(np.float64), np.zeros(z.shape)
    for index in np.ndindex(z.shape):
        up, down = z.copy(), z.copy()
        up[index] += 1e-5
        down[index] -= 1e-5
        out[index] = (formula(up).mean() - formula(down).mean()) / 2e-5
    return out


def assert_is_formula(head, labels, z, formula):
    value, gradient = jax.jit(jax.value_and_grad(lambda z: head.loss(labels=labels, logits=z)))(z)
    np.testing.assert_allclose(value, formula(z).mean(), rtol=1e-6)
    np.testing.assert_allclose(gradient, slopes(formula, z), rtol=2e-5, atol=1e-7)


SOFTMAX = {
    "smoothing": ({"label_smoothing": 0.1}, {"smoothing": 0.1}),
    "weights": ({"class_weights": WEIGHTS}, {"weights": WEIGHTS}),
    "smoothing-weights": ({"label_smoothing": 0.3, "class_weights": WEIGHTS}, {"smoothing": 0.3, "weights": WEIGHTS}),
    "focal": ({"focal_gamma": 2.0}, {"gamma": 2.0}),
    "focal-below-1": ({"focal_gamma": 0.5, "focal_alpha": WEIGHTS}, {"gamma": 0.5, "weights": WEIGHTS}),
    "priors": ({"logit_adjustment": PRIORS}, {"shift": np.log(PRIORS)}),
    "z_loss": ({"z_loss": 1e-2}, {"z_loss": 1e-2}),
    "all": (
        {
            **{"label_smoothing": 0.1, "class_weights": WEIGHTS, "focal_gamma": 1.5, "focal_alpha": 0.25},
            **{"logit_adjustment": np.log(PRIORS), "z_loss": 1e-3},
        },
        {
            **{"smoothing": 0.1, "weights": 0.25 * np.array(WEIGHTS), "gamma": 1.5, "shift": np.log(PRIORS)},
            **{"z_loss": 1e-3},
        },
    ),
}


@pytest.mark.parametrize(("options", "formula"), SOFTMAX.values(), ids=SOFTMAX)
def test_a_loss_of_classes_is_the_formula(options, formula):
    assert_is_formula(jh.MultiClassHead(N, **options), IDS, Z, lambda z: softmax_formula(ONE_HOT, z, **formula))
    mixed = jh.MultiClassHead(N, label_kind="distributions", **options)
    assert_is_formula(mixed, SHARES, Z, lambda z: softmax_formula(SHARES, z, **formula))


SIGMOID = {
    "smoothing": ({"label_smoothing": 0.1}, {"smoothing": 0.1}),
    "weights": ({"class_weights": (0.5, 3)}, {"negative": 0.5, "positive": 3}),
    "pos_weight": ({"pos_weight": 5}, {"positive": 5}),
    "focal": ({"focal_gamma": 2.0, "focal_alpha": 0.25}, {"gamma": 2.0, "negative": 0.75, "positive": 0.25}),
    "priors": ({"logit_adjustment": 0.1}, {"shift": np.log(1 / 9)}),
}


@pytest.mark.parametrize(("options", "formula"), SIGMOID.values(), ids=SIGMOID)
def test_a_loss_of_one_logit_is_the_formula(options, formula):
    z = Z[:, :1]
    assert_is_formula(jh.BinaryClassHead(**options), BITS, z, lambda z: sigmoid_formula(BITS, z, **formula)[:, 0])


def test_options_of_several_labels_are_by_class():
    head = jh.MultiLabelHead(
        N, class_weights=WEIGHTS, pos_weight=(1, 2, 3, 4), focal_gamma=1.0, focal_alpha=0.3, logit_adjustment=PRIORS
    )
    odds = np.log(PRIORS) - np.log1p(-np.array(PRIORS))
    weights = {"positive": 0.3 * np.array(WEIGHTS) * [1, 2, 3, 4], "negative": 0.7 * np.array(WEIGHTS)}
    assert_is_formula(head, HOT, Z, lambda z: sigmoid_formula(HOT, z, gamma=1.0, shift=odds, **weights).mean(-1))


def test_a_sum_over_classes_is_over_those_that_exist():
    """scenic's sigmoid loss: a sum over classes, and a mean over images."""
    where = RNG.random((ROWS, N)) < 0.7
    where[0] = False
    losses = sigmoid_formula(HOT, Z)
    head = jh.MultiLabelHead(N, reduce_classes="sum")
    np.testing.assert_allclose(head.loss(HOT, Z), losses.sum(-1).mean(), rtol=1e-6)
    np.testing.assert_allclose(head.loss(HOT, Z, where=where), (losses * where).sum() / (ROWS - 1), rtol=1e-6)
    mean = jh.MultiLabelHead(N)
    np.testing.assert_allclose(mean.loss(HOT, Z, where=where), losses[where].mean(), rtol=1e-6)
    found = head.measure(HOT, Z, where=where).compute(warn=False)
    np.testing.assert_allclose(found["average_loss"], (losses * where).sum() / (ROWS - 1), rtol=1e-6)


@pytest.mark.parametrize("z", [slow(-90.0), slow(-30.0), 0.0, slow(30.0), 90.0])
@pytest.mark.parametrize("gamma", [0.5, slow(2.0)])
def test_a_focal_loss_has_finite_slopes(z, gamma):
    binary, several = jh.BinaryClassHead(focal_gamma=gamma), jh.MultiClassHead(2, focal_gamma=gamma)
    y, z = np.array([[0], [1]]), np.full((2, 1), z, np.float32)
    loss, slope = jax.value_and_grad(lambda z: binary.loss(y, z))(z)
    np.testing.assert_allclose(loss, sigmoid_formula(y, z, gamma=gamma).mean(), rtol=3e-6, atol=1e-30)
    slopes = jax.grad(lambda z: several.loss(y, z))(np.concatenate([0 * z, z], -1))
    assert np.isfinite(slope).all()
    assert np.isfinite(slopes).all()


@pytest.mark.parametrize("gamma", [0.5, slow(1.0), slow(2.0)])
def test_a_focal_loss_has_finite_slopes_at_infinite_logits(gamma):
    """Where the loss is finite, as that of a class that cannot be: a padded vocabulary."""
    binary, several = jh.BinaryClassHead(focal_gamma=gamma), jh.MultiLabelHead(2, focal_gamma=gamma)
    z = np.array([[-np.inf], [np.inf], [1.0]], np.float32)
    y = np.array([[0], [1], [1]])
    gradient = jax.grad(lambda z: binary.loss(y, z))(z)
    expected = jax.grad(lambda z: binary.loss(y[2:], z))(z[2:])
    np.testing.assert_allclose(gradient, np.concatenate([[[0], [0]], expected / 3]), rtol=1e-6)
    gradient = jax.grad(lambda z: several.loss(np.concatenate([y, y], -1), z))(np.concatenate([z, z], -1))
    assert np.isfinite(gradient).all()
    shares, z = np.array([[0.5, 0.5, 0.0]], np.float32), np.array([[1.0, 2.0, -np.inf]], np.float32)
    padded = jh.MultiClassHead(3, label_kind="distributions", focal_gamma=gamma)
    whole = jh.MultiClassHead(2, label_kind="distributions", focal_gamma=gamma)
    gradient = jax.grad(lambda z: padded.loss(shares, z))(z)
    expected = jax.grad(lambda z: whole.loss(shares[:, :2], z))(z[:, :2])
    np.testing.assert_allclose(gradient, np.pad(expected, [(0, 0), (0, 1)]), rtol=1e-6)
    far = np.array([[90.0], [-90.0], [3.0]], np.float32)
    _, hessian = jh.boosting.derivatives(binary, np.array([1, 0, 1]), far)
    assert np.isfinite(hessian).all()


@pytest.mark.parametrize("library", ["xgboost", slow("lightgbm")])
def test_options_that_change_nothing_give_the_same_trees(library):
    plain = jh.boosting.derivatives(jh.MultiClassHead(N), IDS, Z, library=library)
    neutral: Any = ({"class_weights": (1,) * N}, {"logit_adjustment": (1 / N,) * N}, {"label_smoothing": 1e-9})
    for options in neutral:
        found = jh.boosting.derivatives(jh.MultiClassHead(N, **options), IDS, Z, library=library)
        np.testing.assert_allclose(found, plain, rtol=2e-5, atol=2e-6)
    found = jh.boosting.derivatives(jh.MultiClassHead(N, label_kind="distributions"), ONE_HOT, Z, library=library)
    np.testing.assert_allclose(found, plain, rtol=2e-5, atol=2e-6)
    plain = jh.boosting.derivatives(jh.MultiLabelHead(N), HOT, Z, library=library)
    neutral = ({"pos_weight": 1.0}, {"reduce_classes": "sum"}, {"reduce_classes": "sum", "pos_weight": 1.0})
    for options in neutral:
        found = jh.boosting.derivatives(jh.MultiLabelHead(N, **options), HOT, Z, library=library)
        np.testing.assert_allclose(found, plain, rtol=2e-5, atol=2e-6)


# Other packages.


def test_smoothing_and_focus_are_those_of_optax():
    smoothed = optax.softmax_cross_entropy(Z, optax.smooth_labels(ONE_HOT, 0.1)).mean()
    np.testing.assert_allclose(jh.MultiClassHead(N, label_smoothing=0.1).loss(IDS, Z), smoothed, rtol=1e-6)
    focal = optax.sigmoid_focal_loss(Z[:, :1], BITS, alpha=0.25, gamma=2.0).mean()
    head = jh.BinaryClassHead(focal_gamma=2.0, focal_alpha=0.25)
    np.testing.assert_allclose(head.loss(BITS, Z[:, :1]), focal, rtol=2e-6)
    # A soft label is a mixture of hard ones here, and not in optax: its docstring says so.
    soft = 0.5 * (head.loss(0 * BITS, Z[:, :1]) + head.loss(0 * BITS + 1, Z[:, :1]))
    np.testing.assert_allclose(head.loss(0 * BITS + 0.5, Z[:, :1]), soft, rtol=1e-6)


def test_class_weights_are_scikit_learns_but_for_the_divisor():
    head = jh.MultiClassHead(N, class_weights=WEIGHTS)
    p = np.exp(log_softmax(Z.astype(np.float64)))
    a = np.array(WEIGHTS)[IDS[:, 0]]
    expected = sklearn.metrics.log_loss(IDS[:, 0], p, sample_weight=a, labels=range(N))
    np.testing.assert_allclose(head.loss(IDS, Z), expected * a.sum() / ROWS, rtol=1e-6)
    # What PyTorch's mean divides by is what weights of rows do here.
    by_weight = jh.MultiClassHead(N, loss_reduction="mean").loss(IDS, Z, weights=a.astype(np.float32))
    np.testing.assert_allclose(by_weight, expected, rtol=1e-6)


def test_balanced_weights_are_scikit_learns():
    labels = RNG.integers(0, 3, 50)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(jh.balanced_class_weights(labels, 3), expected, rtol=1e-12)
    names = np.array(["a", "b", "c"])
    np.testing.assert_allclose(jh.balanced_class_weights(names[labels], names.tolist()), expected, rtol=1e-12)
    weights, where = RNG.integers(1, 4, 50), RNG.random(50) < 0.8
    repeated = np.repeat(labels[where], weights[where])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=repeated)
    np.testing.assert_allclose(jh.balanced_class_weights(labels, 3, weights, where), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="no row of \\['d'\\]"):
        jh.balanced_class_weights(names[labels], ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="reads as one-hot or multi-hot"):
        jh.balanced_class_weights([[1, 0], [1, 1]], 2)
    assert jh.balanced_class_weights([True, False, True, True], 2) == (2.0, 2 / 3)
    with pytest.raises(ValueError, match="vocabulary must be"):
        jh.balanced_class_weights(labels, 1.5)  # pyright: ignore[reportArgumentType]
    head = jh.MultiClassHead(3, class_weights=jh.balanced_class_weights(labels, 3))
    # Each class has the same part in the loss of the training data.
    parts = [float(head.loss(labels, np.zeros((50, 3)), where=labels == k)) * sum(labels == k) for k in range(3)]
    np.testing.assert_allclose(parts, parts[0] * np.ones(3), rtol=1e-6)


# Ports: formulas of programs, one constructor each.


def test_a_translation_with_smoothing_and_padding():
    """lm1b and wmt: 0.1 spread over the other 6 of 7 words, less the entropy; a mean over tokens, padding apart."""
    tokens, z = RNG.integers(0, 7, (3, 5)), RNG.normal(size=(3, 5, 7)).astype(np.float32)
    there = tokens > 0
    q = np.where(np.eye(7)[tokens] > 0, 0.9, 0.1 / 6)
    entropy = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1 / 6))
    expected = ((-(q * log_softmax(z.astype(np.float64))).sum(-1) - entropy) * there).sum() / there.sum()
    head = jh.MultiClassHead(7, label_smoothing=0.1 * 7 / 6)
    loss, gradient = jax.value_and_grad(lambda z: head.loss(tokens, z, where=there))(z)
    np.testing.assert_allclose(float(loss) - entropy, expected, rtol=1e-6)
    slopes = (np.exp(log_softmax(z.astype(np.float64))) - q) * there[..., None] / there.sum()
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-8)


def test_a_language_model_with_a_z_loss():
    """maxtext: cross-entropy and 1e-4 times the squared logsumexp, over the tokens that count."""
    tokens, z = RNG.integers(0, 7, (3, 5)), 5 * RNG.normal(size=(3, 5, 7)).astype(np.float32)
    there = RNG.random((3, 5)) < 0.6
    total = np.logaddexp.reduce(z.astype(np.float64), -1)
    each = total - np.take_along_axis(z, tokens[..., None], -1)[..., 0] + 1e-4 * total**2
    head = jh.MultiClassHead(7, z_loss=1e-4)
    np.testing.assert_allclose(head.loss(tokens, z, where=there), each[there].mean(), rtol=1e-6)


def test_images_with_mixed_labels():
    """big_vision: a softmax loss of labels that mixup has mixed, or that hold several classes."""
    several = HOT + 1e-6
    several = (several / several.sum(-1, keepdims=True)).astype(np.float32)
    for shares in (SHARES, several):
        expected = -(shares * log_softmax(Z.astype(np.float64))).sum(-1).mean()
        np.testing.assert_allclose(
            jh.MultiClassHead(N, label_kind="distributions").loss(shares, Z), expected, rtol=1e-6
        )


def test_many_tasks_with_missing_labels():
    """molpcba: 128 tasks, a mean over the labels that are there."""
    y, z = RNG.integers(0, 2, (6, 128)).astype(np.float32), RNG.normal(size=(6, 128)).astype(np.float32)
    y[RNG.random(y.shape) < 0.6] = np.nan
    head = jh.MultiLabelHead(128)
    expected = sigmoid_formula(np.nan_to_num(y), z)[~np.isnan(y)].mean()
    np.testing.assert_allclose(head.loss(y, z, where=~np.isnan(y)), expected, rtol=1e-6)


# Distributions.


def test_one_hot_distributions_have_the_metrics_of_ids():
    added = [
        *(jh.metrics.ConfusionMatrix(), jh.metrics.TopKAccuracy(2), jh.metrics.Precision(average="macro")),
        *(jh.metrics.CohenKappa(), jh.metrics.OneVsRestAuc(), jh.metrics.LogLoss(), jh.metrics.BrierScore()),
        *(jh.metrics.ExpectedCalibrationError(), jh.metrics.ExpectedCalibrationError(norm="max")),
    ]
    of_ids = jh.MultiClassHead(N, extra_metrics=added)
    of_shares = jh.MultiClassHead(N, extra_metrics=added, label_kind="distributions")
    weights, where = RNG.random(ROWS).astype(np.float32), RNG.random(ROWS) < 0.8
    expected = of_ids.measure(IDS, Z, weights=weights, where=where).compute(warn=False)
    found = of_shares.measure(ONE_HOT, Z, weights=weights, where=where).compute(warn=False)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=2e-6, atol=1e-7, err_msg=key)


def test_mixed_labels_count_by_their_shares():
    """Each row counts as one row of each class, with its share as the weight."""
    added = [jh.metrics.ConfusionMatrix(), jh.metrics.TopKAccuracy(2), jh.metrics.Recall(average=None)]
    mixed = jh.MultiClassHead(N, extra_metrics=added, label_kind="distributions")
    found = mixed.measure(SHARES, Z).compute(warn=False)
    repeated = jh.MultiClassHead(N, extra_metrics=added, loss_reduction="mean")
    rows = np.repeat(np.arange(ROWS), N)
    expected = repeated.measure(np.tile(np.arange(N), ROWS), Z[rows], weights=SHARES.ravel()).compute(warn=False)
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=2e-6, atol=1e-6, err_msg=key)


def test_names_and_ids_become_distributions():
    head = jh.MultiClassHead(3, label_kind="distributions", label_vocabulary=("a", "b", "c"))
    expected = np.eye(3)[[1, 0]]
    for labels in (["b", "a"], np.array(["b", "a"]), [[1], [0]], np.array([1, 0])):
        np.testing.assert_array_equal(head.encode_labels(labels), expected)
        np.testing.assert_allclose(head.loss(labels, Z[:2, :3]), head.loss(expected, Z[:2, :3]))
    with pytest.raises(ValueError, match="'q'"):
        head.loss(["b", "q"], Z[:2, :3])
    assert np.isfinite(head.loss(["b", "q"], Z[:2, :3], where=[True, False]))
    with pytest.raises(ValueError, match="add up to 1"):
        head.loss(2 * expected, Z[:2, :3])
    with pytest.raises(ValueError, match="add up to 1"):
        head.loss(0 * expected, Z[:2, :3])
    step = jax.jit(head.loss)
    assert np.isnan(step(np.full((2, 3), 0.5, np.float32), Z[:2, :3]))


# Decisions.


def test_a_decision_threshold_decides_everywhere():
    z = np.linspace(-3, 3, 13, dtype=np.float32)[:, None]
    y = (RNG.random(13) < 0.5).astype(np.int32)
    head = jh.BinaryClassHead(decision_threshold=0.3)
    p = 1 / (1 + np.exp(-z.astype(np.float64)))[:, 0]
    decided = p > 0.3
    np.testing.assert_array_equal(head.predictions(z)["class_ids"][:, 0], decided)
    found = head.measure(y, z).compute(warn=False)
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(y, decided), rel=1e-6)
    assert found["precision"] == pytest.approx(sklearn.metrics.precision_score(y, decided), rel=1e-6)
    assert found["recall"] == pytest.approx(sklearn.metrics.recall_score(y, decided), rel=1e-6)
    served: Any = head.export_outputs(z)["predict"]
    np.testing.assert_array_equal(served.outputs["class_ids"][:, 0], decided)
    # Without a threshold, a logit of 0 is of class 0.
    assert jh.BinaryClassHead().predictions([[0.0]], "class_ids")["class_ids"].tolist() == [[0]]


def test_the_best_threshold_of_a_head_is_its_next():
    y = (RNG.random(400) < 0.2).astype(np.int32)
    z = (RNG.normal(size=400) + 2 * y - 1.5).astype(np.float32)[:, None]
    head = jh.BinaryClassHead().with_metrics(jh.metrics.BestThreshold())
    values = head.measure(y, z).compute(warn=False)
    best = head.at_threshold(values["best_f1_threshold"])
    assert best == dataclasses.replace(head, decision_threshold=best.decision_threshold)
    assert pickle.loads(pickle.dumps(best)) == best
    found = best.predictions(z)["class_ids"][:, 0]
    assert sklearn.metrics.f1_score(y, found) == pytest.approx(values["best_f1"], rel=1e-3)


def test_thresholds_of_several_labels():
    thresholds = (0.2, 0.5, 0.7, 0.9)
    head = jh.MultiLabelHead(N, label_vocabulary=list("abcd")).at_threshold({"a": 0.2, "c": 0.7, "d": 0.9})
    assert head.decision_threshold == thresholds
    decided = 1 / (1 + np.exp(-Z.astype(np.float64))) > thresholds
    np.testing.assert_array_equal(head.predictions(Z)["class_ids"], decided)
    where = RNG.random(HOT.shape) < 0.8
    found = head.measure(HOT, Z, where=where).compute(warn=False)
    assert found["accuracy"] == pytest.approx((HOT == decided)[where].mean(), rel=1e-6)
    precision, recall, _, _ = sklearn.metrics.precision_recall_fscore_support(
        HOT[where], decided[where], average="binary"
    )
    assert (found["precision"], found["recall"]) == pytest.approx((precision, recall), rel=1e-6)
    assert "class_ids" not in jh.MultiLabelHead(N).predictions(Z)


def test_a_boosted_head_of_distributions_predicts_names():
    x, names = RNG.normal(size=(90, 2)), np.array(["a", "b", "c"])[RNG.integers(0, 3, 90)]
    head = jh.MultiClassHead(3, label_kind="distributions", label_vocabulary=("a", "b", "c"))
    model = jh.boosting.BoostedHead(head, n_estimators=2, max_depth=2).fit(x, names)
    assert set(model.predict(x)) <= {"a", "b", "c"}
    assert model.score(x, names) == pytest.approx(np.mean(model.predict(x) == names))


def test_a_boosted_head_decides_by_the_threshold():
    x = RNG.normal(size=(300, 2))
    y = (x[:, 0] + RNG.normal(size=300) > 1).astype(int)
    by: Any = {"n_estimators": 5, "max_depth": 2}
    plain = jh.boosting.BoostedHead(jh.BinaryClassHead(), **by).fit(x, y)
    low = jh.boosting.BoostedHead(jh.BinaryClassHead(decision_threshold=0.05), **by).fit(x, y)
    np.testing.assert_array_equal(low.predict(x), plain.predict_proba(x)[:, 1] > 0.05)
    assert low.score(x, y) == pytest.approx(np.mean(low.predict(x) == y))


def test_boosting_takes_the_weights_of_classes():
    """XGBoost's own `scale_pos_weight` gives the same trees."""
    xgboost = pytest.importorskip("xgboost")
    x = RNG.normal(size=(300, 2)).astype(np.float32)
    y = (x[:, 0] + RNG.normal(size=300) > 1).astype(int)
    data = xgboost.DMatrix(x, y)
    settings = {"max_depth": 2, "base_score": 0.5, "tree_method": "hist", "seed": 0}
    own = xgboost.train({**settings, "objective": "binary:logistic", "scale_pos_weight": 3}, data, 5)
    objective = jh.boosting.xgboost_objective(jh.BinaryClassHead(pos_weight=3))
    ours = xgboost.train({**settings, "base_score": 0.0}, data, 5, obj=objective)
    np.testing.assert_allclose(
        ours.predict(data, output_margin=True), own.predict(data, output_margin=True), rtol=1e-4, atol=1e-5
    )


# Constants, and running shares.


@pytest.mark.parametrize(
    "options",
    [
        *({"label_smoothing": 0.1}, {"class_weights": WEIGHTS}, {"logit_adjustment": PRIORS, "z_loss": 0.1}),
        {"label_kind": "distributions", "class_weights": WEIGHTS, "label_smoothing": 0.2},
    ],
    ids=str,
)
def test_the_best_constant_has_no_slope(options):
    head = jh.MultiClassHead(N, **options)
    labels = SHARES if "label_kind" in options else IDS
    constant = head.constant_logits(labels)
    slope = jax.grad(lambda z: head.loss(labels, z[None] + np.zeros((ROWS, N), np.float32)))(constant)
    np.testing.assert_allclose(slope, np.zeros(N), atol=2e-6)


def test_running_shares_are_those_of_weighted_rows():
    head = jh.MultiClassHead(N, logit_adjustment="running")
    state, weights = head.init_state(), RNG.integers(0, 3, ROWS).astype(np.float32)
    for _ in range(2):
        state = head.update_state(state, IDS, Z, weights=weights)
    counts = 1 + 2 * np.bincount(IDS[:, 0], weights, N)
    np.testing.assert_allclose(state["class_counts"].sum(-1), counts)
    given = jh.MultiClassHead(N, logit_adjustment=counts / counts.sum())
    np.testing.assert_allclose(head.loss(IDS, Z, params=state), given.loss(IDS, Z), rtol=2e-6)
    labels = jh.MultiLabelHead(N, logit_adjustment="running")
    state = labels.update_state(labels.init_state(), HOT, Z)
    np.testing.assert_allclose(state["class_counts"].sum(-1), 1 + np.stack([(1 - HOT).sum(0), HOT.sum(0)]))


# Refusals.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: jh.MultiClassHead(3, label_smoothing=1.2), "label_smoothing must be a number in .0, 1.. Given 1.2"),
        (lambda: jh.MultiClassHead(3, label_smoothing=True), "label_smoothing"),
        (lambda: jh.MultiClassHead(3, class_weights=(1, 2)), "3 numbers, one for each class. Given 2 values"),
        (lambda: jh.MultiClassHead(3, class_weights=(1, -2, 1)), r"class_weights\[1\]"),
        (lambda: jh.MultiClassHead(3, class_weights=(0, 0, 0)), "must not all be 0"),
        (lambda: jh.MultiClassHead(3, class_weights=WRONG), "a sequence of 3 numbers"),
        (lambda: jh.MultiClassHead(2, class_weights={"a": 2.0}), r"lacks: \['a'\]"),
        (lambda: jh.MultiClassHead(3, logit_adjustment=(0.5, 0.2, 0.2)), "0.9 in all"),
        (lambda: jh.MultiClassHead(3, logit_adjustment=(0.5, 0.5, 0.0)), "logarithm"),
        (lambda: jh.MultiClassHead(3, logit_adjustment={0: 1.0}), "a number for each of the 3 classes"),
        (lambda: jh.MultiClassHead(2, label_vocabulary=("a", "b"), class_weights={0: 2, "a": 3}), "a class twice"),
        (lambda: jh.BinaryClassHead(logit_adjustment=-1e6), "share of positives"),
        (lambda: jh.MultiClassHead(3, logit_adjustment="batch"), "a sequence of 3 numbers"),
        (lambda: jh.MultiClassHead(3, focal_alpha=0.25), "needs focal_gamma"),
        (lambda: jh.MultiClassHead(3, focal_gamma=-1.0), "focal_gamma must be"),
        (lambda: jh.MultiClassHead(3, z_loss=-1.0), "z_loss must be"),
        (lambda: jh.MultiClassHead(3, label_kind="one_hot"), "label_kind must be"),
        (lambda: jh.MultiClassHead(3, z_loss=1.0, loss_fn=lambda labels, logits: logits[..., :1]), "change nothing"),
        (lambda: jh.BinaryClassHead(pos_weight=2, class_weights=(1, 2)), "Leave one out"),
        (lambda: jh.BinaryClassHead(logit_adjustment=1.5), "share of positives"),
        (lambda: jh.BinaryClassHead(decision_threshold=1.0), "a probability in .0, 1.. Given 1.0"),
        (lambda: jh.BinaryClassHead(focal_gamma=2.0, focal_alpha=1.5), "focal_alpha must be"),
        (lambda: jh.MultiLabelHead(3, decision_threshold=(0.5, 0.5)), "one for each of 3 classes. Given 2"),
        (lambda: jh.MultiLabelHead(3, reduce_classes="max"), "reduce_classes must be"),
        (lambda: jh.MultiLabelHead(3, pos_weight=(1, 0, 1)), r"pos_weight\[1\]"),
        (lambda: jh.GlobalObjectiveHead(jh.BinaryClassHead(pos_weight=2.0), "roc_auc"), r"\['pos_weight'\]"),
        (lambda: jh.GlobalObjectiveHead(jh.BinaryClassHead(decision_threshold=0.3), "roc_auc"), "change nothing"),
    ],
)
def test_bad_options_are_refused_in_words(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert len(str(error.value)) <= 400


# Cost.


@pytest.mark.all_passes
@pytest.mark.parametrize("name", ["label_smoothing", "z_loss", "class_weights", "all three"])
def test_options_read_no_more_memory(name):
    options = {"label_smoothing": 0.1, "z_loss": 1e-4, "class_weights": tuple(range(1, 65))}
    options = options if name == "all three" else {name: options[name]}

    def count_bytes(head):
        step = jax.jit(jax.value_and_grad(lambda z, y: head.loss(labels=y, logits=z)))
        shapes = jax.ShapeDtypeStruct((2048, 64), np.float32), jax.ShapeDtypeStruct((2048,), np.int32)
        cost: Any = step.lower(*shapes).compile().cost_analysis()
        return cost["bytes accessed"]

    assert count_bytes(jh.MultiClassHead(64, **options)) <= 1.05 * count_bytes(jh.MultiClassHead(64))


def test_classes_may_lie_on_several_devices():
    """Logits that an Explicit mesh spreads over rows and classes, labels that it spreads over rows."""
    axes = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("rows", "classes"), axis_types=axes, devices=jax.devices()[:4])
    added = [jh.metrics.ConfusionMatrix(), jh.metrics.TopKAccuracy(2), jh.metrics.TopKAccuracy(2, average="macro")]
    options: Any = {"label_smoothing": 0.1, "class_weights": WEIGHTS, "logit_adjustment": PRIORS, "z_loss": 0.1}
    for kind, labels in (("ids", IDS), ("distributions", SHARES)):
        head = jh.MultiClassHead(N, label_kind=kind, extra_metrics=added, **options)
        expected = head.measure(labels, Z).compute(warn=False)

        def step(labels, z, head=head):
            return jax.value_and_grad(lambda z: head.loss(labels, z))(z), head.measure(labels, z)

        with jax.set_mesh(mesh):
            spread = jax.sharding.PartitionSpec("rows", "classes")
            z = jax.device_put(Z, jax.sharding.NamedSharding(mesh, spread))
            y = jax.device_put(labels, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows", None)))
            (loss, gradient), metrics = jax.jit(step)(y, z)
        np.testing.assert_allclose(loss, expected["average_loss"], rtol=1e-6)
        assert jax.typeof(gradient).sharding.spec == spread
        found = metrics.compute(warn=False)
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-6, atol=1e-6, err_msg=key)


def test_metrics_of_decisions_follow_the_head():
    z = RNG.normal(size=(60, 1)).astype(np.float32)
    y = (RNG.random((60, 1)) < 0.4).astype(np.int32)
    added = [
        *(jh.metrics.FBeta(), jh.metrics.HammingLoss(), jh.metrics.ExactMatch(), jh.metrics.ConfusionMatrix()),
        *(jh.metrics.TruePositives(), jh.metrics.MatthewsCorrcoef(), jh.metrics.Recall(threshold=0.5)),
    ]
    metrics = jh.BinaryClassHead(decision_threshold=0.3, extra_metrics=added).measure(y, z)
    found = metrics.compute(warn=False)
    decided = 1 / (1 + np.exp(-z.astype(np.float64))) > 0.3
    assert found["f1"] == pytest.approx(sklearn.metrics.f1_score(y, decided), rel=1e-6)
    assert found["hamming_loss"] == pytest.approx(1 - found["accuracy"], rel=1e-6)
    assert found["exact_match"] == pytest.approx(found["accuracy"], rel=1e-6)
    assert found["true_positives"] == (y * decided).sum()
    assert found["matthews_corrcoef"] == pytest.approx(sklearn.metrics.matthews_corrcoef(y, decided), rel=1e-5)
    assert found["recall/positive_threshold_0.5"] == pytest.approx(sklearn.metrics.recall_score(y, z > 0), rel=1e-6)
    expected = sklearn.metrics.confusion_matrix(y, decided)
    np.testing.assert_array_equal(found["confusion_matrix"], expected)
    np.testing.assert_array_equal(metrics.confusion_matrix(), expected)
    np.testing.assert_array_equal(metrics.confusion_matrix(threshold=0.5), sklearn.metrics.confusion_matrix(y, z > 0))


@pytest.mark.parametrize("bins", [jh.GrowingGrid(), jh.ThresholdGrid(50)], ids=["growing", "thresholds"])
def test_metrics_of_several_labels_follow_thresholds_of_their_own(bins):
    thresholds = (0.3, 0.5, 0.6, 0.8)
    z, y = RNG.normal(size=(40, N)).astype(np.float32), RNG.integers(0, 2, (40, N)).astype(np.float32)
    added = [
        *(jh.metrics.ExactMatch(), jh.metrics.Precision(average="samples"), jh.metrics.FBeta(average=None)),
        *(jh.metrics.HammingLoss(average="macro"), jh.metrics.Recall(average="weighted")),
    ]
    head = jh.MultiLabelHead(N, decision_threshold=thresholds, extra_metrics=added, bins=bins)
    found = head.measure(y, z).compute(undefined=0.0, warn=False)
    decided = 1 / (1 + np.exp(-z.astype(np.float64))) > thresholds
    assert found["exact_match"] == pytest.approx((y == decided).all(-1).mean(), rel=1e-6)
    samples = np.mean([(a & (b > 0)).sum() / max(a.sum(), 1) for a, b in zip(decided, y, strict=True)])
    assert found["precision_samples"] == pytest.approx(samples, rel=1e-6)
    each = [sklearn.metrics.f1_score(*pair) for pair in zip(y.T, decided.T, strict=True)]
    np.testing.assert_allclose([found[f"f1/class{k}"] for k in range(N)], each, rtol=1e-6)
    assert found["hamming_loss_macro"] == pytest.approx((y != decided).mean(), rel=1e-6)
    weighted = sklearn.metrics.recall_score(y, decided, average="weighted")
    assert found["recall_weighted"] == pytest.approx(weighted, rel=1e-6)
    with pytest.raises(ValueError, match="at its own threshold"):
        head.with_metrics(jh.metrics.FBeta())
    one = jh.MultiLabelHead(N, decision_threshold=0.3, extra_metrics=[jh.metrics.FBeta()], bins=bins).measure(y, z)
    decided = 1 / (1 + np.exp(-z.astype(np.float64))) > 0.3
    assert one.compute(warn=False)["f1"] == pytest.approx(
        sklearn.metrics.f1_score(y.ravel(), decided.ravel()), rel=1e-6
    )


def test_running_shares_and_a_mask_where_classes_lie_on_several_devices():
    axes = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("rows", "classes"), axis_types=axes, devices=jax.devices()[:4])
    where = np.arange(ROWS) != 3
    for head, labels, spec in (
        (jh.MultiClassHead(N, logit_adjustment="running"), IDS, ("rows", None)),
        (jh.MultiLabelHead(N, logit_adjustment="running"), HOT, ("rows", "classes")),
    ):
        state = head.init_state()
        expected = head.loss(labels, Z, where=where, params=state)

        def step(labels, z, where, head=head, state=state):
            return head.loss(labels, z, where=where, params=state), head.update_state(state, labels, z, where=where)

        with jax.set_mesh(mesh):
            places = (spec, ("rows", "classes"), ("rows",))
            sharded = [jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*place)) for place in places]
            loss, after = jax.jit(step)(*map(jax.device_put, (labels, Z, where), sharded))
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        by_one = head.update_state(state, labels, Z, where=where)
        np.testing.assert_allclose(after["class_counts"], by_one["class_counts"])
