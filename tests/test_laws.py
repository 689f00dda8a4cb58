"""The laws, each on every head of the zoo, on one device. Expected values come from the zoo's float64 oracles."""

import dataclasses
import functools
import inspect
import io
import pickle
import re
from collections.abc import Iterable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from jax.experimental import checkify
from sklearn.calibration import calibration_curve
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import precision_recall_curve, roc_auc_score, roc_curve
from zoo import ZOO, Entry, MultiEntry, bounds_of, changed, marked

import jaxheads as jh
from jaxheads.compose._abstract import AbstractCompositeHead
from jaxheads.numerics import fields

N = 8
each = pytest.mark.parametrize("entry", marked(ZOO))
each_array = pytest.mark.parametrize(
    "entry", marked(entry for entry in ZOO if isinstance(entry.head.label_spec, jh.LabelSpec))
)
each_refusing = pytest.mark.parametrize("entry", marked(entry for entry in ZOO if entry.illegal is not None))
many = hypothesis.settings(deadline=None, max_examples=20, derandomize=True, database=None)
seeds = st.integers(0, 2**16)
masks = st.integers(0, 2**N - 1).map(lambda bits: np.array([[bits >> i & 1] for i in range(N)], bool))
multiplicities = st.lists(st.sampled_from([0.0, 0.25, 0.3, 1.0, 2.0, 7.5]), min_size=N, max_size=N).map(
    lambda values: np.array(values, np.float32)[:, None]
)
ONES, ALL = np.ones((N, 1), np.float32), np.ones((N, 1), bool)


def f32(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)


def draw(entry: Entry, seed: int = 0, lead: tuple[int, ...] = (N,)) -> tuple[Any, np.ndarray]:
    rng = np.random.default_rng(seed)
    return entry.labels(rng, lead), entry.logits(rng, lead)


def average_of(entry: Entry) -> str:
    """The key of an average loss: of a `MultiHead`, that of its first head."""
    return full_name(entry.parts[0] if entry.parts else entry, "average_loss")


def part_like(tree: Any, like: Any) -> Any:
    """The part of nested dicts that has the keys of others."""
    return {key: part_like(tree[key], value) for key, value in like.items()} if isinstance(like, dict) else tree


def full_name(entry: Entry, key: str) -> str:
    return f"{key}/{entry.head.suffix}" if entry.head.suffix else key


def added(parts: Iterable[jh.Metrics]) -> jh.Metrics:
    """Python's `sum`, which starts from 0."""
    total = sum(parts)
    assert isinstance(total, jh.Metrics)
    return total


@functools.cache
def step(head: jh.Head):
    """Loss, its gradients to logits and parameters, and the metrics of the batch: one compiled function."""

    def run(labels, logits, weights, where, params):
        def loss(logits, params):
            return head.loss(labels, logits, weights=weights, where=where, params=params)

        value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(logits, params)
        return (
            value,
            *gradients,
            head.measure(labels, logits, weights=weights, where=where, params=params),
        )

    return jax.jit(run)


@functools.cache
def reduced(head: jh.Head):
    """The loss under each reduction, and its gradient to the logits: one compiled function."""

    def run(labels, logits, weights, where, params):
        def one(reduction):
            other = changed(head, loss_reduction=reduction)
            return jax.value_and_grad(lambda z: other.loss(labels, z, weights=weights, where=where, params=params))

        return {reduction.value: one(reduction)(logits) for reduction in jh.Reduction}

    return jax.jit(run)


def slope(f, x: Any) -> np.ndarray:
    """Central differences of `f` in float64."""
    x = np.asarray(x, np.float64)
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        high, low = x.copy(), x.copy()
        high[i] += 1e-5
        low[i] -= 1e-5
        out[i] = (f(high) - f(low)) / 2e-5
    return out


def expected_gradient(entry: Entry, labels, logits, weights=None, where=None) -> np.ndarray:
    return slope(lambda z: entry.expected_loss(labels, z, weights, where), logits)


def poison(entry: Entry, labels: Any, logits: np.ndarray, hidden: np.ndarray) -> tuple[Any, np.ndarray]:
    """The same batch with garbage in the hidden rows: NaN, infinities, ids out of range."""

    def spoil(x, garbage):
        filler = np.resize(np.asarray(garbage, x.dtype), x.shape)
        return np.where(np.broadcast_to(hidden, x.shape), filler, x)

    def spoil_labels(x, spec):
        if spec.kind == "float":
            return spoil(x.astype(np.float32), [np.nan, -np.inf, 1e38, -3.0, np.inf])
        return spoil(x, [-1, 2**31 - 1, 99, -(2**31)] if spec.kind == "int" else [True])

    spec = entry.head.label_spec
    if isinstance(spec, jh.LabelSpec):
        labels = spoil_labels(labels, spec)
    else:
        labels = {key: spoil_labels(labels[key], inner) for key, inner in spec.items()}
    return labels, spoil(logits, [np.nan, np.inf, 1e38, -np.inf])


def replace_label(labels: np.ndarray, row: int, value: float) -> np.ndarray:
    """The labels with `value` in one row; as float if the value is no integer."""
    changed = labels.copy() if np.float32(value).is_integer() else labels.astype(np.float32)
    changed[row] = value
    return changed


def assert_values(got: dict[str, Any], expected: dict[str, float], *, rtol: float = 2e-6, slack: float = 0.0) -> None:
    """Every expected metric is there and right; an area is within what its bins leave."""
    assert set(expected) <= set(got)
    for key, value in expected.items():
        bounds = bounds_of(got, key)
        if bounds and not np.isnan(value):
            lower, upper = bounds
            assert lower - 1e-6 - slack <= value <= upper + 1e-6 + slack, key
            assert lower <= got[key] <= upper, key
        else:
            np.testing.assert_allclose(got[key], value, rtol=rtol, atol=2e-6, err_msg=key)


def assert_same_values(a: jh.Metrics, b: jh.Metrics, rtol: float = 1e-6, but: str | None = None) -> None:
    x, y = a.compute(bounds=True), b.compute(bounds=True)
    assert list(x) == list(y)
    for key in (key for key in x if but is None or not key.startswith(but)):
        np.testing.assert_allclose(x[key], y[key], rtol=rtol, atol=1e-6, err_msg=key)


# The oracle


@each
def test_loss_is_the_oracles_under_every_reduction(entry):
    labels, logits = draw(entry)
    weights = np.array([0.5, 2, 1, 0, 0.3, 1, 4, 0], np.float32)
    where = np.arange(N) % 3 != 1
    params = entry.params()
    plain = {"params": params}
    masked = {"weights": weights, "where": where, "params": params}

    @jax.jit
    def losses(labels, logits):
        out = {}
        for reduction in jh.Reduction:
            head = changed(entry.head, loss_reduction=reduction)
            out[reduction.value] = (
                head.loss(labels, logits, **plain),
                head.loss(labels, logits, **masked),
                head.loss(labels, logits, normalizer=3.5, **masked),
                head.loss(labels, logits, None, "train", [jnp.float32(0.5), jnp.float32(0.25)], **plain),
            )
        return out

    for reduction, got in losses(labels, logits).items():
        expect = functools.partial(entry.expected_loss, labels, logits, reduction=reduction)
        expected = (expect(), expect(weights, where), expect(weights, where, normalizer=3.5), expect() + 0.75)
        for value in got:
            assert value.dtype == jnp.float32
            assert value.shape == ()
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6, err_msg=reduction)


@each
@many
@hypothesis.given(seed=seeds, where=masks, weights=multiplicities)
def test_loss_gradient_and_metrics_are_the_oracles(entry, seed, where, weights):
    labels, logits = draw(entry, seed)
    loss, gradient, _, measured = step(entry.head)(labels, logits, weights, where, entry.params())
    np.testing.assert_allclose(loss, entry.expected_loss(labels, logits, weights, where), rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(gradient, expected_gradient(entry, labels, logits, weights, where), rtol=1e-5, atol=2e-6)
    values = measured.compute(bounds=True)
    assert_values(values, entry.expected_metrics(labels, logits, weights, where))
    if isinstance(entry, MultiEntry) and (where & (weights > 0)).any():
        assert_values(values, entry.expected_losses(labels, logits, weights, where))


@each
def test_gradient_to_learned_fields_is_the_oracles(entry):
    labels, logits = draw(entry)
    params, learned = entry.params(), entry.head.init(jax.random.key(0))
    _, _, gradients, _ = step(entry.head)(labels, logits, ONES, ALL, params)
    leaves, tree = jax.tree.flatten(learned)
    for i, gradient in enumerate(jax.tree.leaves(part_like(gradients, learned))):

        def loss(value, i=i):
            changes = jax.tree.unflatten(tree, [*leaves[:i], value, *leaves[i + 1 :]])
            return entry.expected_loss(labels, logits, params=fields.merge(entry.head.init_state(), changes))

        np.testing.assert_allclose(gradient, slope(loss, leaves[i]), rtol=1e-5, atol=2e-6)


def test_threshold_metrics_by_hand():
    entry = next(entry for entry in ZOO if entry.name == "binary")
    labels, logits = draw(entry, 3)
    weights = np.linspace(0.1, 2.0, N, dtype=np.float32)
    got = entry.head.measure(labels, logits, weights=weights).compute()
    y, w = labels[:, 0], weights.astype(np.float64)
    above = zoo.sigmoid(logits[:, 0].astype(np.float64)) > 0.3
    np.testing.assert_allclose(
        got["precision/positive_threshold_0.3"], w[above & (y == 1)].sum() / w[above].sum(), 1e-6
    )
    np.testing.assert_allclose(got["recall/positive_threshold_0.3"], w[above & (y == 1)].sum() / w[y == 1].sum(), 1e-6)
    np.testing.assert_allclose(got["accuracy/positive_threshold_0.3"], w[above == (y == 1)].sum() / w.sum(), 1e-6)


# The best constant logits


CLOSED = ("regression", "regression_3_exp", "binary", "binary_soft_grid", "multi_class", "poisson", "logistic")
CLOSED += ("multi_label", "sequential")
each_constant = pytest.mark.parametrize(
    "entry", [entry for entry in ZOO if entry.name in CLOSED], ids=lambda entry: entry.name
)


@each_constant
def test_the_slope_of_the_loss_is_0_at_the_constant_logits(entry):
    labels, _ = draw(entry, lead=(40,))
    labels = np.asarray(labels)
    weights = np.resize(np.array([0.5, 2, 1, 0, 0.3, 7], np.float32), 40)
    where = np.arange(40) % 3 != 1
    hidden = ((weights == 0) | ~where)[:, None]
    spoiled, _ = poison(entry, labels, np.zeros((40, entry.head.logits_dimension), np.float32), hidden)
    got = entry.head.constant_logits(spoiled, weights, where)
    assert got.dtype == np.float32
    assert got.shape == (entry.head.logits_dimension,)
    assert np.abs(got).max() > 0.05

    def loss(z):
        return entry.expected_loss(labels, np.broadcast_to(z, (40, len(z))), weights, where, reduction="mean")

    # The loss of the oracle, in float64; second derivatives are of the order of 1, and float32 has 24 bits.
    np.testing.assert_allclose(slope(loss, got), 0, atol=1e-6)
    if entry.head.per_logit_weights:
        weights = np.stack([weights] * len(got), -1) * (1 + np.arange(len(got), dtype=np.float32)) / 2
        weights[:20, -1] = 0
        each = entry.head.constant_logits(labels, weights, where)
        one = entry.head.constant_logits(labels[:, -1:].repeat(len(got), 1), weights[:, -1], where)
        np.testing.assert_allclose(each[-1], one[-1], rtol=1e-6)
        assert abs(each[-1] - got[-1]) > 1e-3


def test_constant_logits_are_scikit_learns():
    rng = np.random.default_rng(0)
    weights, names = rng.random(60), np.array(["ant", "bee", "cat"])
    labels, y = names[rng.integers(0, 3, 60)], rng.gamma(2.0, size=(60, 2))
    nothing = np.zeros((60, 1))

    def prior(labels: np.ndarray) -> np.ndarray:
        return DummyClassifier(strategy="prior").fit(nothing, labels, weights).predict_proba(nothing[:1])[0]

    multi = jh.MultiClassHead(3, label_vocabulary=tuple(names)).constant_logits(labels, weights)
    np.testing.assert_allclose(np.exp(multi), prior(labels), rtol=1e-6)
    binary = jh.BinaryClassHead().constant_logits(labels == "bee", weights)
    np.testing.assert_allclose(zoo.sigmoid(binary.astype(np.float64)), prior(labels == "bee")[1:], rtol=1e-6)
    mean = np.average(y, axis=0, weights=weights)
    np.testing.assert_allclose(DummyRegressor().fit(nothing, y, weights).predict(nothing[:1])[0], mean, rtol=1e-12)
    np.testing.assert_allclose(jh.RegressionHead(2).constant_logits(y, weights), mean, rtol=1e-6)
    np.testing.assert_allclose(jh.PoissonRegressionHead(2).constant_logits(y, weights), np.log(mean), rtol=1e-6)


def test_constant_logits_of_heads_inside():
    labels = {"a": np.array([1, 0, 1, 1]), "b": np.array([1.0, np.nan, 2.0, 6.0])}
    heads = [jh.BinaryClassHead(name="a"), jh.RegressionHead(name="b")]
    where = {"b": np.array([1, 0, 1, 1])}
    for head in (jh.MultiHead(heads, head_weights=(1.0, 0.0)), jh.MultiHead(heads, weighting="uncertainty")):
        np.testing.assert_allclose(head.constant_logits(labels, where=where), [np.log(3), 3], rtol=1e-6)
    sequences = jh.SequentialHeadWrapper(jh.BinaryClassHead(), sequence_lengths="n", average_over="sequences")
    steps = {"n": np.array([2, 1])}
    # One half of the first sequence, all of the second: 3/4.
    got = sequences.constant_logits(np.array([[1, 0, 9], [1, 9, 9]]), features=steps)
    np.testing.assert_allclose(got, [np.log(3)], rtol=1e-6)


def test_an_infinite_constant_logit_is_cut():
    np.testing.assert_array_equal(jh.BinaryClassHead().constant_logits([1, 1]), [30])
    np.testing.assert_array_equal(jh.LogisticRegressionHead().constant_logits([0.0]), [-30])
    np.testing.assert_allclose(jh.MultiClassHead(3).constant_logits([0, 2]), [-np.log(2), -30, -np.log(2)], rtol=1e-6)
    np.testing.assert_array_equal(jh.MultiLabelHead(3).constant_logits([[1, 0, 1], [1, 0, 0]]), [30, -30, 0])
    np.testing.assert_array_equal(jh.PoissonRegressionHead().constant_logits([0, 0]), [-30])


@pytest.mark.parametrize("entry", [entry for entry in ZOO if entry.name not in CLOSED], ids=lambda entry: entry.name)
def test_a_head_without_a_closed_form_says_so(entry):
    with pytest.raises(ValueError, match="has no best constant logits in closed form"):
        entry.head.constant_logits(draw(entry)[0])


def test_what_has_no_best_constant_is_refused():
    head = jh.RegressionHead(2)
    with pytest.raises(ValueError, match="with a loss_fn has no best constant logits in closed form"):
        jh.BinaryClassHead(loss_fn=zoo.hinge_per_element).constant_logits([1])
    with pytest.raises(ValueError, match=r"Given 2 for RegressionHead, of which none does"):
        head.constant_logits(np.ones((2, 2)), weights=[0, 0])
    with pytest.raises(ValueError, match=r"logits \[1\] of 2"):
        head.constant_logits(np.ones((2, 2)), weights=np.array([[1, 0], [2, 0]]))
    with pytest.raises(ValueError, match="Given nan at index"):
        head.constant_logits(jnp.array([[1, jnp.nan]]))
    with pytest.raises(ValueError, match="not negative"):
        head.constant_logits(np.ones((2, 2)), weights=[1, -1])
    with pytest.raises(ValueError, match="Head 'b': constant_logits needs elements"):
        jh.MultiHead([jh.RegressionHead(name="b")]).constant_logits({"b": [1.0]}, where=[0])
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda y: jnp.asarray(head.constant_logits(y)))(jnp.ones((2, 2)))


# Law 1: where=False is absence


@each
@many
@hypothesis.given(seed=seeds, where=masks, weights=multiplicities)
def test_hidden_garbage_is_absent(entry, seed, where, weights):
    labels, logits = draw(entry, seed)
    hidden = ~where | (weights == 0)
    spoiled_labels, spoiled_logits = poison(entry, labels, logits, hidden)
    loss, gradient, to_params, measured = step(entry.head)(
        spoiled_labels, spoiled_logits, weights, where, entry.params()
    )
    np.testing.assert_allclose(loss, entry.expected_loss(labels, logits, weights, where), rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(np.asarray(gradient)[hidden[:, 0]], 0)
    np.testing.assert_allclose(gradient, expected_gradient(entry, labels, logits, weights, where), rtol=1e-5, atol=2e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(to_params))
    assert_values(measured.compute(bounds=True), entry.expected_metrics(labels, logits, weights, where))


@each
def test_where_equals_dropping_the_rows(entry):
    labels, logits = draw(entry, 1)
    where = np.array([1, 0, 0, 1, 1, 0, 1, 1], bool)[:, None]
    weights = np.linspace(0.2, 3, N, dtype=np.float32)[:, None]
    keep = where[:, 0]
    masked = step(entry.head)(*poison(entry, labels, logits, ~where), weights, where, entry.params())
    dropped = step(entry.head)(
        jax.tree.map(lambda x: x[keep], labels),
        logits[keep],
        weights[keep],
        ALL[keep],
        entry.params(),
    )
    np.testing.assert_allclose(masked[0], dropped[0], rtol=1e-6)
    np.testing.assert_allclose(masked[1][keep], dropped[1], rtol=1e-6, atol=1e-7)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), masked[2], dropped[2])
    assert_same_values(masked[3], dropped[3])
    # Called eagerly, NumPy garbage in hidden rows is not refused either.
    labels, logits = poison(entry, labels, logits, ~where)
    eager = entry.head.loss(labels, logits, where=where[:, 0], weights=weights, params=entry.params())
    np.testing.assert_allclose(eager, dropped[0], rtol=1e-6)


@each
def test_zero_weight_hides_but_counts(entry):
    labels, logits = draw(entry, 2)
    weights = np.array([1, 0, 1, 1, 0, 1, 1, 0], np.float32)[:, None]
    spoiled = poison(entry, labels, logits, weights == 0)
    for reduction, (loss, gradient) in reduced(entry.head)(*spoiled, weights, ALL, entry.params()).items():
        expected = entry.expected_loss(labels, logits, weights, reduction=reduction)
        np.testing.assert_allclose(loss, expected, rtol=2e-6, atol=2e-6, err_msg=reduction)
        np.testing.assert_array_equal(np.asarray(gradient)[weights[:, 0] == 0], 0)
    if entry.count is None:
        by_all, by_seen = (
            entry.expected_loss(labels, logits, weights, reduction=r) for r in ("sum_over_batch_size", "mean")
        )
        np.testing.assert_allclose(by_all, by_seen * 5 / 8)


def test_per_logit_weights_hide_single_logits():
    entry = next(entry for entry in ZOO if entry.head.per_logit_weights and entry.head.logits_dimension > 1)
    labels, logits = draw(entry)
    rng = np.random.default_rng(0)
    weights = rng.choice(f32([0, 0.5, 1, 3]), logits.shape)
    where = np.arange(N)[:, None] != 2
    hidden = (weights == 0) | ~where
    spoiled_labels = np.where(hidden, np.float32(np.nan), labels)
    spoiled_logits = np.where(hidden, np.float32(np.inf), logits)
    loss, gradient, _, measured = step(entry.head)(spoiled_labels, spoiled_logits, weights, where, {})
    w = np.where(where, weights, 0).astype(np.float64)
    values = (logits.astype(np.float64) - labels) ** 2
    np.testing.assert_allclose(loss, (w * values).sum() / w.sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * w * (logits - labels) / w.sum(), rtol=1e-5, atol=1e-7)
    got = measured.compute()
    np.testing.assert_allclose(got["average_loss/r"], (w * values).sum() / w.sum(), rtol=1e-6)
    np.testing.assert_allclose(got["label/mean/r"], (w * labels).sum() / w.sum(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["prediction/mean/r"], (w * np.exp(logits)).sum() / w.sum(), rtol=1e-5)


def root_error(labels, logits):
    return jnp.sqrt((labels - logits) ** 2)


def relative_error(labels, logits):
    return jnp.abs(labels - logits) / labels


def log_error(labels, logits):
    return (jnp.log(labels) - jnp.log(logits)) ** 2


@pytest.mark.parametrize("loss_fn", [root_error, relative_error, log_error])
def test_losses_that_are_undefined_at_the_fill(loss_fn):
    """Whatever stands in for a hidden row, a loss of the user's own may be undefined there, and its gradient too."""
    rng = np.random.default_rng(0)
    labels, hidden = rng.uniform(1, 2, (2, N, 1)).astype(np.float32)
    where, kernel = np.arange(N)[:, None] % 3 != 0, f32([[1.3]])
    head = jh.RegressionHead(loss_fn=loss_fn)

    def lazy(kernel, hidden, labels, where):
        return head.loss(labels, jh.LinearLogits(hidden, kernel), where=where)

    def dense(kernel, hidden, labels, where):
        return head.loss(labels, hidden @ kernel, where=where)

    for loss in (dense, lazy):
        keep = where[:, 0]
        value, gradient = jax.value_and_grad(loss)(kernel, hidden, labels, where)
        dropped = jax.value_and_grad(loss)(kernel, hidden[keep], labels[keep], where[keep])
        np.testing.assert_allclose(value, dropped[0], rtol=1e-6)
        np.testing.assert_allclose(gradient, dropped[1], rtol=1e-6)
    measured = head.measure(labels, hidden @ kernel, where=where)
    y, z = labels[where].astype(np.float64), 1.3 * hidden[where].astype(np.float64)
    by_hand = {
        root_error: np.abs(y - z),
        relative_error: np.abs(y - z) / y,
        log_error: np.log(y / z) ** 2,
    }
    np.testing.assert_allclose(measured.compute()["average_loss"], by_hand[loss_fn].mean(), rtol=2e-6)
    np.testing.assert_allclose(value, by_hand[loss_fn].mean(), rtol=2e-6)


# Law 2: weights are multiplicities


@each
def test_weight_two_is_twice(entry):
    labels, logits = draw(entry, 4)
    head, params = entry.head, entry.params()
    repeated = np.concatenate([np.arange(N), [0, 3, 3, 6]])
    weights = np.bincount(repeated).astype(np.float32)[:, None]
    more = jax.tree.map(lambda x: x[repeated], (labels, logits))
    weighted = reduced(head)(labels, logits, weights, ALL, params)
    for reduction in ("sum", "mean"):
        expected = entry.expected_loss(*more, reduction=reduction)
        np.testing.assert_allclose(weighted[reduction][0], expected, rtol=2e-6)
    single, double = (reduced(head)(labels, logits, w, ALL, params) for w in (ONES, 2 * ONES))
    for got, factor in (("sum_over_batch_size", 2), ("sum_by_nonzero_weights", 2), ("sum", 2), ("mean", 1)):
        np.testing.assert_allclose(double[got][0], factor * single[got][0], rtol=1e-6)
        np.testing.assert_allclose(double[got][1], factor * single[got][1], rtol=1e-6, atol=1e-7)
    measured = head.measure(labels, logits, weights=weights, params=params)
    assert_same_values(measured, head.measure(*more, params=params), but="loss/")


def test_soft_labels_are_split_weights():
    entry = next(entry for entry in ZOO if entry.name == "binary_soft_grid")
    for head in (entry.head, jh.BinaryClassHead(thresholds=(0.3, 0.9))):
        labels, logits = draw(entry, 5)
        weights = np.linspace(0.1, 2.0, N, dtype=np.float32)[:, None]
        soft = head.measure(labels, logits, weights=weights).compute()
        hard = head.measure(
            np.concatenate([np.ones_like(labels), np.zeros_like(labels)]),
            np.concatenate([logits, logits]),
            weights=np.concatenate([weights * labels, weights * (1 - labels)]),
        ).compute()
        for key in soft:
            np.testing.assert_allclose(soft[key], hard[key], rtol=1e-6, err_msg=key)


# Law 3: metrics add


@each
@many
@hypothesis.given(
    seed=seeds,
    parts=st.lists(st.integers(0, 3), min_size=N, max_size=N),
    order=st.permutations(range(4)),
)
def test_any_split_in_any_order(entry, seed, parts, order):
    labels, logits = draw(entry, seed)
    weights = np.random.default_rng(seed).choice(f32([0.1, 0.5, 1, 3]), (N, 1))
    part = np.array(parts)[:, None]
    params = entry.params()
    pieces = [step(entry.head)(labels, logits, weights, part == k, params)[-1] for k in order]
    total = added(pieces)
    assert_same_values(total, step(entry.head)(labels, logits, weights, ALL, params)[-1])
    assert_same_values((pieces[0] + pieces[1]) + (pieces[2] + pieces[3]), total)
    assert_values(total.compute(bounds=True), entry.expected_metrics(labels, logits, weights))


@pytest.mark.parametrize(
    "entry", [e for e in ZOO if e.name in ("binary", "ordinal", "survival")], ids=lambda entry: entry.name
)
def test_hosts_with_different_row_counts(entry):
    """Each host measures its own rows, five, none and eleven, and sends its metrics as bytes."""
    labels, logits = draw(entry, 6, (16,))
    params = entry.params()
    sent = [
        pickle.dumps(
            entry.head.measure(jax.tree.map(lambda x, rows=rows: x[rows], labels), logits[rows], params=params)
        )
        for rows in (slice(0, 5), slice(5, 5), slice(5, 16))
    ]
    merged = added(map(pickle.loads, sent))
    assert_same_values(merged, entry.head.measure(labels, logits, params=params))
    assert_values(merged.compute(bounds=True), entry.expected_metrics(labels, logits))


@each
def test_zero_is_the_identity_and_checkpoints_are_arrays(entry):
    labels, logits = draw(entry, 7)
    head, params = entry.head, entry.params()
    zero = head.metrics()
    measured = head.measure(labels, logits, params=params)
    assert measured.state.dtype == zero.state.dtype == jnp.float32
    assert measured.state.shape == (*zero.state.shape[:1], 1)
    assert zero.state.shape[1:] == (2,)
    for same in (zero + measured, measured + zero, added([measured]), zero + zero + measured):
        np.testing.assert_array_equal(same.state.sum(-1), measured.state.sum(-1))
    assert (zero + zero).state.sum() == 0
    updated = head.update_metrics(zero, None, logits, labels, params=params)
    np.testing.assert_array_equal(updated.state, (zero + measured).state)
    # The head's metrics are of the unbound head, however it was given its parameters.
    bound = head.bind(params)
    np.testing.assert_array_equal(bound.measure(labels, logits).state, measured.state)
    assert bound.metrics().head == measured.head == head

    file = io.BytesIO()
    np.save(file, updated.state)
    file.seek(0)
    loaded = dataclasses.replace(head.metrics(), state=np.load(file))
    assert_same_values(loaded, updated, rtol=0)
    assert_same_values(loaded + measured, updated + measured, rtol=0)
    assert_same_values(pickle.loads(pickle.dumps(updated)), updated, rtol=0)
    leaves, tree = jax.tree.flatten(updated)
    assert len(leaves) == 1
    assert jax.tree.unflatten(tree, leaves).compute().keys() == updated.compute().keys()


@each
def test_scan_carry_keeps_its_type(entry):
    labels, logits = draw(entry, 8, (4, N))
    head, params = entry.head, entry.params()

    @jax.jit
    def evaluate(metrics, labels, logits):
        def body(metrics, batch):
            return head.update_metrics(metrics, None, batch[1], batch[0], params=params), None

        return jax.lax.scan(body, metrics, (labels, logits))[0]

    scanned = evaluate(head.metrics(), labels, logits)
    looped = head.metrics()
    assert jax.tree.structure(scanned) == jax.tree.structure(looped)
    assert jax.typeof(scanned.state) == jax.typeof(looped.state)
    for i in range(4):
        looped = head.update_metrics(looped, None, logits[i], jax.tree.map(lambda x, i=i: x[i], labels), params=params)
    assert_same_values(scanned, looped)
    assert_values(scanned.compute(bounds=True), entry.expected_metrics(labels, logits))
    assert_same_values(evaluate(scanned, labels, logits), scanned)


@each
def test_strangers_are_refused(entry):
    head = entry.head
    stranger = changed(head, name="stranger")
    with pytest.raises(ValueError, match="different heads") as error:
        _ = head.metrics() + stranger.metrics()
    assert repr(head) in str(error.value)
    assert repr(stranger) in str(error.value)
    labels, logits = draw(entry)
    with pytest.raises(ValueError, match="stranger"):
        head.update_metrics(stranger.metrics(), None, logits, labels, params=entry.params())
    with pytest.raises(TypeError):
        _ = head.metrics() + 1
    with pytest.raises(TypeError):
        _ = 1 + head.metrics()
    with pytest.raises(ValueError, match="regularization"):
        _ = head.metrics() + head.metrics(regularization_losses=[])
    with pytest.raises(ValueError, match="regularization"):
        head.update_metrics(head.metrics(), None, logits, labels, "eval", [1.0], params=entry.params())
    with pytest.raises(ValueError, match="int"):
        head.update_metrics(0, None, logits, labels, params=entry.params())  # pyright: ignore[reportArgumentType]


@each
def test_regularization_is_the_mean_over_updates(entry):
    labels, logits = draw(entry)
    head, params = entry.head, entry.params()
    key, average = full_name(entry, "regularization_loss"), average_of(entry)
    metrics = head.metrics(regularization_losses=[])
    assert np.isnan(metrics.compute()[key])
    for losses in ([0.5, 0.25], [1.0, 0.0], [0.0, 0.0]):
        metrics = head.update_metrics(metrics, None, logits, labels, "eval", losses, params=params)
    np.testing.assert_allclose(metrics.compute()[key], 1.75 / 3, rtol=1e-6)
    assert key not in head.measure(labels, logits, params=params).compute()
    np.testing.assert_allclose(metrics.compute()[average], entry.expected_metrics(labels, logits)[average], rtol=2e-6)


def test_no_regularization_losses_are_zero():
    head = jh.RegressionHead()
    metrics = head.update_metrics(head.metrics([]), None, f32([[1.0]]), [1.0], "eval", [2.0])
    metrics = head.update_metrics(metrics, None, f32([[1.0]]), [1.0], "eval", [])
    assert metrics.compute()["regularization_loss"] == 1.0
    assert head.loss([1.0], f32([[1.0]]), regularization_losses=[]) == 0
    assert head.loss([1.0], f32([[1.0]]), regularization_losses=[1.0, 2.5]) == 3.5
    for wrong in (3.0, [np.ones(2)]):
        with pytest.raises(ValueError, match="regularization_losses"):
            head.loss([1.0], f32([[1.0]]), regularization_losses=wrong)


# Law 4: counters do not stop


@each
def test_counters_go_on(entry):
    """After 2^24 and after 2^31 rows, ten thousand more, one at a time."""
    labels, logits = draw(entry, 9, (N + 1,))
    head, params, extra = entry.head, entry.params(), 10_000
    each_weight = np.resize(f32([0.1, 0.3]), (N + 1, 1))
    first = head.measure(jax.tree.map(lambda x: x[:N], labels), logits[:N], params=params, weights=each_weight[:N])
    last = jax.tree.map(lambda x: x[N:], labels)
    one = np.asarray(head.measure(last, logits[N:], params=params, weights=each_weight[N:]).state, np.float64)[:, 0]

    @jax.jit
    def evaluate(metrics):
        def body(_, metrics):
            return head.update_metrics(metrics, None, logits[N:], last, params=params, weights=each_weight[N:])

        return jax.lax.fori_loop(0, extra, body, metrics)

    for times in (2.0**21, 2.0**28):
        state = head.metrics().state.at[..., 0].set(first.state[..., 0] * times)
        metrics = evaluate(dataclasses.replace(first, state=state))
        exact = np.asarray(first.state, np.float64)[:, 0] * times + extra * one
        np.testing.assert_allclose(np.asarray(metrics.state, np.float64).sum(-1), exact, rtol=1e-10)
        weights = np.append(np.full(N, times), extra)[:, None] * each_weight
        assert_values(metrics.compute(bounds=True), entry.expected_metrics(labels, logits, weights))


@pytest.mark.parametrize("head", [jh.BinaryClassHead(), jh.MultiClassHead(3)], ids=["binary", "multi_class"])
def test_ten_thousand_wrong_answers_after_sixteen_million_right_ones(head):
    n = head.logits_dimension
    right = head.measure(np.zeros((1,), np.int32), f32([[-3.0] if n == 1 else [3, 0, 0]]))
    metrics = dataclasses.replace(
        head.metrics(), state=head.metrics().state.at[..., 0].set(right.state[..., 0] * 2**24)
    )
    wrong = f32([[3.0] if n == 1 else [0, 3, 0]])

    @jax.jit
    def evaluate(metrics):
        def body(metrics, _):
            return head.update_metrics(metrics, None, wrong, np.zeros((1,), np.int32)), None

        return jax.lax.scan(body, metrics, length=10_000)[0]

    assert abs(float(evaluate(metrics).compute()["accuracy"]) - 2**24 / (2**24 + 10_000)) < 2e-7


@each
def test_infinities_stay_infinite(entry):
    head, params = entry.head, entry.params()
    measured = head.measure(*draw(entry), params=params)
    huge = dataclasses.replace(measured, state=jnp.full_like(measured.state, jnp.inf))
    total = head.metrics() + huge + measured + huge
    np.testing.assert_array_equal(total.state.sum(-1), np.inf)
    once = dataclasses.replace(measured, state=jnp.full_like(measured.state, 2e38))
    np.testing.assert_array_equal((once + once + measured).state.sum(-1), np.inf)


# Law 6: float32 reductions


@each
def test_input_dtypes(entry):
    labels, logits = draw(entry, 10)
    head, params = entry.head, entry.params()
    for dtype in (jnp.bfloat16, np.float16, np.float64, np.int32, np.int8):
        cast = np.asarray(logits).astype(dtype)
        expected = entry.expected_loss(labels, cast.astype(np.float64))
        metrics = entry.expected_metrics(labels, cast.astype(np.float64))
        for array in (cast, jnp.asarray(cast)) if dtype in (jnp.bfloat16, np.int8) else (cast,):
            loss = head.loss(labels, array, params=params)
            assert loss.dtype == jnp.float32
            np.testing.assert_allclose(loss, expected, rtol=2e-6, atol=2e-6, err_msg=str(dtype))
        measured = head.measure(labels, cast, params=params)
        assert measured.state.dtype == jnp.float32
        assert_values(measured.compute(bounds=True), metrics)
    for dtype in (jnp.bfloat16, jnp.float16):
        cast = jnp.asarray(logits, dtype)
        gradient = jax.jit(jax.grad(lambda z: head.loss(labels, z, params=params)))(cast)
        assert gradient.dtype == dtype
        expected = expected_gradient(entry, labels, np.asarray(cast, np.float64))
        np.testing.assert_allclose(np.asarray(gradient, np.float32), expected, rtol=0.01, atol=1e-3)


@each
def test_low_precision_weights_count_exactly(entry):
    """301 is not a bfloat16."""
    labels, logits = draw(entry, 11, (301,))
    rounded = jnp.asarray(logits, jnp.bfloat16)
    ones = jnp.ones((301, 1), jnp.bfloat16)
    head = changed(entry.head, loss_reduction="mean")
    rest = {"weights": ones, "params": entry.params()}
    loss = jax.jit(lambda z: head.loss(labels, z, **rest))(rounded)
    exact = np.asarray(rounded, np.float64)
    np.testing.assert_allclose(loss, entry.expected_loss(labels, exact, reduction="mean"), rtol=2e-6)
    measured = head.measure(labels, rounded, **rest)
    assert_values(measured.compute(bounds=True), entry.expected_metrics(labels, exact))


@each
def test_float64_mode(entry):
    labels, logits = draw(entry, 12)
    head, params = entry.head, entry.params()
    with jax.enable_x64(True):
        labels = jax.tree.map(lambda x: jnp.asarray(x, np.float64 if x.dtype.kind == "f" else None), labels)
        z, weights = jnp.asarray(logits, jnp.float64), jnp.asarray(ONES, jnp.float64)

        @jax.jit
        def run(metrics, labels, z, weights):
            def body(metrics, _):
                return head.update_metrics(metrics, None, z, labels, weights=weights, params=params), None

            loss = jax.value_and_grad(lambda z: head.loss(labels, z, weights=weights, params=params))(z)
            return (
                *loss,
                jax.lax.scan(body, metrics, length=2)[0],
                head.predictions(z, params=params),
            )

        loss, gradient, metrics, predictions = run(head.metrics(), labels, z, weights)
        assert loss.dtype == metrics.state.dtype == jnp.float32
        assert gradient.dtype == jnp.float64
        assert all(value.dtype in (jnp.float32, jnp.int32) for value in jax.tree.leaves(predictions))
        np.testing.assert_allclose(loss, entry.expected_loss(labels, logits), rtol=2e-6, atol=2e-6)
        assert_values(metrics.compute(bounds=True), entry.expected_metrics(labels, logits))


@each
def test_parameters_of_any_dtype(entry):
    """A parameter tree may be cast as a whole; the formula still sees float32."""
    labels, logits = draw(entry, 12)
    for dtype in (jnp.bfloat16, np.float64):
        params = jax.tree.map(lambda value, dtype=dtype: np.asarray(value).astype(dtype), entry.params())
        loss, *_, measured = step(entry.head)(labels, logits, ONES, ALL, params)
        exact = jax.tree.map(lambda value: value.astype(np.float64), params)
        np.testing.assert_allclose(loss, entry.expected_loss(labels, logits, params=exact), rtol=2e-6, atol=2e-6)
        assert_values(measured.compute(bounds=True), entry.expected_metrics(labels, logits, params=exact))


@each_array
@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64, jnp.bfloat16, np.float64])
def test_label_dtypes(entry, dtype):
    """Any dtype that can hold a legal label gives the same loss; an inexact one is refused where ids are wanted."""
    spec = entry.head.label_spec
    labels, logits = draw(entry, 13)
    labels = np.round(labels).astype(dtype)
    kind = jnp.issubdtype(dtype, jnp.integer)
    if spec.kind == "int" and not kind:
        with pytest.raises(ValueError, match="dtype"):
            entry.head.loss(labels, logits, params=entry.params())
        return
    loss = entry.head.loss(labels, logits, params=entry.params())
    on_device = loss if dtype == np.float64 else entry.head.loss(jnp.asarray(labels), logits, params=entry.params())
    plain = labels.astype(np.int64 if spec.kind == "int" else np.float64)
    for value in (loss, on_device):
        np.testing.assert_allclose(value, entry.expected_loss(plain, logits), rtol=2e-6, atol=2e-6)


# Law 7: extreme logits, nothing to see


@each
@pytest.mark.parametrize("size", [1e4, 100.0, 1e-30])
def test_extreme_logits(entry, size):
    labels, logits = draw(entry, 14)
    logits = np.float32(size) * np.sign(logits)
    loss, gradient, to_params, measured = step(entry.head)(labels, logits, ONES, ALL, entry.params())
    with np.errstate(over="ignore"):
        expected = entry.expected_loss(labels, logits)
        metrics = entry.expected_metrics(labels, logits)
        metrics = {key: float(np.float32(value)) for key, value in metrics.items()}
    averages = [key for key in metrics if key.startswith("average_loss")]
    if any(np.isinf(metrics[key]) for key in averages):
        assert loss == np.inf
        assert not np.isnan(gradient).any()
        assert all(measured.compute()[key] == np.inf for key in averages if np.isinf(metrics[key]))
        return
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, to_params)))
    assert_values(measured.compute(bounds=True), metrics)


@each
@pytest.mark.parametrize("rows", [0, N], ids=["empty", "all_masked"])
def test_nothing_to_see(entry, rows):
    head, params = entry.head, entry.params()
    labels, logits = draw(entry, 15, (rows,))
    labels, logits = poison(entry, labels, logits, np.ones((rows, 1), bool))
    weights, where = np.ones((rows, 1), np.float32), np.zeros((rows, 1), bool)
    for loss, gradient in reduced(head)(labels, logits, weights, where, params).values():
        assert loss == 0
        assert gradient.shape == logits.shape
        np.testing.assert_array_equal(gradient, 0)
    _, _, to_params, measured = step(head)(labels, logits, weights, where, params)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(to_params))
    assert all(np.isnan(value).all() for value in measured.compute(bounds=True).values())
    assert all((value == 0).all() for value in measured.compute(undefined=0.0).values())
    assert all(np.isnan(value).all() for value in head.metrics().compute().values())
    seen_labels, seen_logits = draw(entry, 16)
    total = measured + head.measure(seen_labels, seen_logits, params=params) + measured
    expected = entry.expected_metrics(seen_labels, seen_logits)
    assert_values(total.compute(bounds=True), expected)
    # Of rows that are all in one group no violation is defined.
    undefined = {key for key, value in total.compute().items() if np.isnan(value).any()}
    assert undefined == {key for key, value in expected.items() if np.isnan(value)}
    assert bool(undefined) == (entry.name == "error_rate")
    eager = head.loss(labels, logits, weights=weights, where=where, params=params)
    assert eager == 0


def test_only_what_was_never_seen_is_undefined():
    values = jh.BinaryClassHead().measure([0, 0], f32([[1.0], [-1.0]])).compute()
    assert values["accuracy"] == 0.5
    assert values["precision"] == 0
    undefined = {key for key, value in values.items() if np.isnan(value)}
    assert undefined == {"recall", "auc", "auc_precision_recall"}


# Law 8: bad input is refused or visible


@each
def test_wrong_shapes_are_refused_with_both_shapes(entry):
    head, params = entry.head, entry.params()
    labels, logits = draw(entry)
    d = head.logits_dimension

    def calls(labels=labels, logits=logits, **kwargs):
        yield lambda: head.loss(labels, logits, params=params, **kwargs)
        yield lambda: head.measure(labels, logits, params=params, **kwargs)
        yield lambda: head.update_metrics(head.metrics(), None, logits, labels, params=params, **kwargs)
        yield lambda: jax.eval_shape(lambda z: head.loss(labels, z, params=params, **kwargs), logits)

    def refused(*needles, **kwargs):
        for call in calls(**kwargs):
            with pytest.raises(ValueError) as error:  # noqa: PT011, the needles are the match
                call()
            for needle in needles:
                assert str(needle) in str(error.value)

    refused("rank", (N,), logits=logits[:, 0])
    refused((N, d + 1), d, logits=np.concatenate([logits, logits[:, :1]], -1))
    refused("rank", (), logits=np.float32(1))
    refused((N - 1, 1), (N, 1), weights=ONES[:-1])
    refused((N, 5), (N, 1), weights=np.ones((N, 5), np.float32))
    refused((N + 1,), (N, 1), where=np.ones(N + 1, bool))
    refused("dtype", weights=np.array(["a"] * N))
    refused("dtype", where=np.array(["a"] * N))
    refused("0 and 1", where=np.full((N, 1), 2))
    refused("labels", labels=None)
    for rows in (1, N - 1):
        # A MultiHead stops at its first head.
        first = [labels[entry.parts[0].head.name]] if entry.parts else jax.tree.leaves(labels)
        shapes = {str((rows, x.shape[-1])) for x in first}
        refused("Suggested Fix", *shapes, N, labels=jax.tree.map(lambda x, rows=rows: x[:rows], labels))
    wide = jax.tree.map(lambda x: np.concatenate([x, x], -1), labels)
    refused("Suggested Fix", 2 * jax.tree.leaves(labels)[0].shape[-1], labels=wide)
    refused("", labels=jax.tree.map(lambda x: x.astype(str), labels))
    refused("", labels=jax.tree.map(lambda x: x.astype(np.complex64), labels))
    if isinstance(labels, dict):
        one = next(iter(labels))
        refused(*labels, labels=labels[one])
        refused(*labels, labels={one: labels[one]})
    with pytest.raises(ValueError, match="sparse"):
        head.loss(labels, logits, mode="sparse", params=params)


@each
def test_wrong_keys_and_parameters_are_refused_by_name(entry):
    head, params = entry.head, entry.params()
    labels, logits = draw(entry)
    with pytest.raises(ValueError, match="nonsense") as error:
        head.predictions(logits, ("nonsense",), params=params)
    if not isinstance(head, jh.MultiHead):
        valid = list(head.predictions(logits, params=params))
        assert all(key in str(error.value) for key in valid)
        for key in valid:
            assert list(head.predictions(logits, key, params=params)) == [key]
    weighted = changed(head, weight_column="w")
    if not isinstance(head, jh.SequentialHeadWrapper):
        with pytest.raises(ValueError, match="weights="):
            weighted.loss(labels, logits, {"w": ONES}, weights=ONES, params=params)
        with pytest.raises(ValueError, match=r"Feature w .*\['v'\]"):
            weighted.loss(labels, logits, {"v": ONES}, params=params)
    with pytest.raises(ValueError, match="w"):
        weighted.loss(labels, logits, params=params)
    with pytest.raises(ValueError, match="unknown"):
        head.bind({"unknown": 1.0})
    with pytest.raises(ValueError, match="unknown"):
        head.loss(labels, logits, params={**params, "unknown": 1.0})
    if not params:
        return
    for call in (
        lambda: head.loss(labels, logits),
        lambda: head.measure(labels, logits),
        lambda: head.predictions(logits),
        lambda: head.update_metrics(head.metrics(), None, logits, labels),
    ):
        with pytest.raises(ValueError, match=r"params=(.|\n)*bind"):
            call()
    path, _ = jax.tree.leaves_with_path(params)[0]
    with pytest.raises(ValueError, match=path[-1].key):
        head.bind(jax.tree.map(lambda value: np.zeros((*np.shape(value), 7), np.float32), params))


@each_refusing
def test_illegal_labels(entry):
    head, params = entry.head, entry.params()
    labels, logits = draw(entry, 17)
    row = 5
    bad = replace_label(labels, row, entry.illegal)
    device = jax.tree.map(jnp.asarray, bad)
    where = (np.arange(N) != row)[:, None]
    rest = entry.expected_loss(labels, logits, where=where)

    for call in (head.loss, head.measure):
        with pytest.raises(ValueError, match=rf"\({row}, 0\)"):
            call(bad, logits, params=params)
        with pytest.raises(ValueError, match=rf"\({row}, 0\)"):
            call(device, logits, params=params, check=True)
    with pytest.raises(ValueError, match=rf"\({row}, 0\)"):
        head.update_metrics(head.metrics(), None, logits, bad, params=params)
    with pytest.raises(ValueError, match="labels"):
        head.loss(jax.tree.map(lambda x: x.tolist(), bad), logits, params=params)

    assert np.isnan(head.loss(device, logits, params=params))
    assert np.isnan(head.loss(bad, logits, params=params, check=False))
    # In a masked row it is nobody's business.
    for labels_, check in ((bad, None), (device, None), (device, True), (bad, True)):
        loss = head.loss(labels_, logits, where=where, params=params, check=check)
        np.testing.assert_allclose(loss, rest, rtol=2e-6, atol=2e-6)

    loss, gradient, to_params, measured = step(head)(bad, logits, ONES, ALL, params)
    assert np.isnan(loss)
    assert np.isnan(gradient[row]).all()
    assert all(np.isnan(to_params[name]).any() for name in head.init(jax.random.key(0)))
    with pytest.warns(jh.BadInputWarning, match=r"\b1 element"):
        values = measured.compute(bounds=True)
    assert_values(values, entry.expected_metrics(labels, logits, where=where))
    assert "1 element" in repr(measured)
    total = head.metrics() + measured + measured
    with pytest.warns(jh.BadInputWarning, match=r"\b2 element"):
        total.compute()
    # Inside jit nothing can be warned of, and the values are the same.
    inside = jax.jit(lambda m: m.compute())(measured)
    assert_values({k: np.asarray(v) for k, v in inside.items()}, {k: values[k] for k in inside}, rtol=1e-5)


@each
@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_illegal_weights(entry, weight):
    head, params = entry.head, entry.params()
    labels, logits = draw(entry, 18)
    weights = ONES.copy()
    weights[2] = weight
    where = (np.arange(N) != 2)[:, None]
    with pytest.raises(ValueError, match=r"weights.*\(2, 0\)"):
        head.loss(labels, logits, weights=weights, params=params)
    with pytest.raises(ValueError, match=r"weights.*\(2, 0\)"):
        head.measure(labels, logits, weights=jnp.asarray(weights), check=True, params=params)
    loss, gradient, _, measured = step(head)(labels, logits, weights, ALL, params)
    assert np.isnan(loss)
    assert np.isnan(gradient[2]).all()
    with pytest.warns(jh.BadInputWarning, match=rf"\b{len(entry.parts) or 1} element"):
        values = measured.compute(bounds=True)
    assert_values(values, entry.expected_metrics(labels, logits, where=where))
    loss, gradient, _, measured = step(head)(labels, logits, weights, where, params)
    np.testing.assert_allclose(loss, entry.expected_loss(labels, logits, where=where), rtol=2e-6, atol=2e-6)
    assert np.isfinite(gradient).all()
    assert_values(measured.compute(bounds=True), entry.expected_metrics(labels, logits, where=where))


def test_a_where_that_is_neither_true_nor_false():
    entry = next(entry for entry in ZOO if entry.name == "binary")
    labels, logits = draw(entry, 18)
    where = np.ones((N, 1), np.float32)
    where[:2] = [[0], [0.5]]
    for garbage in (where, jnp.asarray(where)):
        with pytest.raises(ValueError, match="0 and 1"):
            entry.head.loss(labels, logits, where=garbage, check=True)
    loss, gradient, _, measured = step(entry.head)(labels, logits, ONES, where, {})
    assert np.isnan(loss)
    assert np.isnan(gradient[1]).all()
    with pytest.warns(jh.BadInputWarning, match=r"\b1 element"):
        values = measured.compute(bounds=True)
    assert_values(values, entry.expected_metrics(labels, logits, where=where == 1))


@each_refusing
def test_checkify_gives_the_message(entry):
    head, params = entry.head, entry.params()
    labels, logits = draw(entry, 19)
    bad = replace_label(labels, 1, entry.illegal)

    def loss(labels, logits, where):
        return head.loss(labels, logits, where=where, params=params)

    checked = jax.jit(checkify.checkify(jax.jit(loss), errors=checkify.user_checks))
    error, value = checked(bad, logits, ALL)
    assert "illegal label or weight" in error.get()
    assert type(getattr(head, "static_head", head)).__name__ in error.get()
    assert np.isnan(value)
    error, value = checked(bad, logits, (np.arange(N) != 1)[:, None])
    assert error.get() is None
    assert np.isfinite(value)
    # Without checkify, nothing of it is left in the program.
    text = jax.jit(loss).lower(bad, logits, ALL).as_text()
    assert "custom_call" not in text


@each
def test_nan_logits_are_visible(entry):
    labels, logits = draw(entry, 20)
    logits[3] = np.nan
    loss, *_, measured = step(entry.head)(labels, logits, ONES, ALL, entry.params())
    assert np.isnan(loss)
    assert np.isnan(measured.compute()[average_of(entry)])


# Law 9: one trace, one answer


@each
def test_one_trace_for_many_steps(entry, monkeypatch):
    head = getattr(entry.head, "static_head", entry.head)
    # In metrics, it is the base head of an objective whose losses are averaged.
    heads = [head.heads[0]] if isinstance(head, jh.MultiHead) else [head]
    if isinstance(head, jh.GlobalObjectiveHead):
        heads.append(head.base)
    traces = []

    def count_calls(cls):
        original = cls.losses

        def counting(self, *args):
            traces.append(1)
            return original(self, *args)

        counting.__signature__ = inspect.signature(original)  # pyright: ignore[reportFunctionMemberAccess]
        monkeypatch.setattr(cls, "losses", counting)

    for cls in {type(head) for head in heads}:
        count_calls(cls)
    optimizer = optax.sgd(0.1)
    rows = 7  # a shape that no other test compiles

    def again():
        # Equal, and built anew; of a MultiHead, labels go by the names.
        return dataclasses.replace(entry.head) if entry.parts else changed(entry.head, name="traced")

    params = entry.params()

    @jax.jit
    def train(head, bias, opt_state, labels, logits):
        traces.append("train")
        gradient = jax.grad(lambda b: head.loss(labels, logits + b, params=params))(bias)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(bias, updates), opt_state

    bias, metrics = jnp.float32(0), again().metrics()
    opt_state = optimizer.init(bias)
    for seed in range(3):
        bias, opt_state = train(again(), bias, opt_state, *draw(entry, seed, (rows,)))
    assert traces == ["train", 1]

    def update(metrics, labels, logits):
        return again().update_metrics(metrics, None, logits, labels, params=params)

    for call in (update, lambda _, labels, logits: again().measure(labels, logits, params=params)):
        traces.clear()
        metrics = call(metrics, *draw(entry, 0, (rows,)))
        once = len(traces)
        assert once >= 1
        for seed in (1, 2):
            metrics = call(again().metrics(), *draw(entry, seed, (rows,)))
        assert len(traces) == once


@each
def test_eager_equals_jit(entry):
    labels, logits = draw(entry, 21)
    head, params = entry.head, entry.params()
    weights, where = np.linspace(0, 2, N, dtype=np.float32), np.arange(N) != 4
    arguments = {"weights": weights, "where": where, "params": params}
    loss, *_, measured = step(head)(labels, logits, weights[:, None], where[:, None], params)
    np.testing.assert_allclose(head.loss(labels, logits, **arguments), loss, rtol=1e-6, atol=1e-7)
    assert_same_values(head.measure(labels, logits, **arguments), measured)
    updated = head.update_metrics(head.metrics(), None, logits, labels, **arguments)
    assert_same_values(updated, measured)
    predictions = head.predictions(logits, params=params)
    compiled = jax.jit(lambda head, z, params: head.predictions(z, params=params))(head, logits, params)
    assert set(predictions) == set(compiled)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), predictions, compiled)


@each
def test_leading_shapes_do_not_matter(entry):
    """Nor does it matter whether labels, weights and masks keep a last axis of size 1."""
    labels, logits = draw(entry, 22)
    head, params = entry.head, entry.params()
    weights, where = np.linspace(0, 2, N, dtype=np.float32)[:, None], (np.arange(N) != 4)[:, None]
    flat = step(head)(labels, logits, weights, where, params)
    tall = jax.tree.map(lambda x: x.reshape(2, 2, 2, -1), (labels, logits, weights, where))
    short = jax.tree.map(lambda x: x[..., 0] if x.shape[-1] == 1 else x, tall)
    loss, gradient, to_params, measured = step(head)(short[0], tall[1], *short[2:], params)
    np.testing.assert_allclose(loss, flat[0], rtol=1e-6)
    np.testing.assert_allclose(gradient.reshape(logits.shape), flat[1], rtol=1e-5, atol=1e-7)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), to_params, flat[2])
    assert_same_values(measured, flat[3])
    updated = head.update_metrics(head.metrics(), None, tall[1], tall[0], weights=tall[2], where=tall[3], params=params)
    assert_same_values(updated, flat[3])


@each
def test_vmap_over_examples_is_a_loop(entry):
    labels, logits = draw(entry, 23)
    head, params = entry.head, entry.params()
    weights = np.linspace(0, 2, N, dtype=np.float32)[:, None]

    def one(labels, logits, weights):
        labels, logits, weights = jax.tree.map(lambda x: x[None], (labels, logits, weights))
        loss = jax.value_and_grad(lambda z: head.loss(labels, z, weights=weights, params=params))(logits)
        return *loss, head.measure(labels, logits, weights=weights, params=params)

    losses, gradients, measured = jax.jit(jax.vmap(one))(labels, logits, weights)
    for i in range(N):
        row = jax.tree.map(lambda x, i=i: x[i : i + 1], (labels, logits, weights))
        np.testing.assert_allclose(losses[i], entry.expected_loss(*row), rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(gradients[i], expected_gradient(entry, *row), rtol=1e-5, atol=2e-6)
    # The leading axis passes through compute, + and a sum.
    values = measured.compute(bounds=True)
    for i in range(1, N):
        single = jax.tree.map(lambda x, i=i: x[i], measured).compute(bounds=True)
        assert values.keys() == single.keys()
        for key, value in single.items():
            assert values[key].shape == (N, *np.shape(value))
            np.testing.assert_allclose(values[key][i], value, rtol=1e-6, err_msg=key)
    total = added(jax.tree.map(lambda x, i=i: x[i], measured) for i in range(N))
    assert_values(total.compute(bounds=True), entry.expected_metrics(labels, logits, weights))
    assert "8" in repr(measured)
    assert_same_values(jax.tree.map(lambda x: x[3], measured + measured), jax.tree.map(lambda x: x[3], measured))


@each
@many
@hypothesis.given(order=st.permutations(range(N)))
def test_order_of_rows_does_not_matter(entry, order):
    labels, logits = draw(entry, 24)
    weights, where = np.linspace(0, 2, N, dtype=np.float32)[:, None], (np.arange(N) != 4)[:, None]
    order = np.array(order)
    plain = step(entry.head)(labels, logits, weights, where, entry.params())
    shuffled = jax.tree.map(lambda x: x[order], (labels, logits, weights, where))
    loss, gradient, _, measured = step(entry.head)(*shuffled, entry.params())
    np.testing.assert_allclose(loss, plain[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, plain[1][order], rtol=1e-6, atol=1e-7)
    assert_same_values(measured, plain[3])


# Identity


def has_callables(head: jh.Head) -> bool:
    return any(callable(getattr(head, field.name)) for field in dataclasses.fields(head))


@each
def test_unbound_heads_are_values(entry):
    head = entry.head
    same = dataclasses.replace(head)
    assert same is not head
    assert same == head
    assert hash(same) == hash(head)
    assert {head: 1}[same] == 1
    assert jax.tree.leaves(head) == []
    assert pickle.loads(pickle.dumps(head)) == head
    assert jax.tree.unflatten(jax.tree.structure(head), []) == head
    if not has_callables(head):
        assert eval(repr(head), {**vars(zoo), **vars(jh)}) == head
    assert changed(head, loss_reduction="auto").loss_reduction is jh.Reduction.SUM_OVER_BATCH_SIZE
    for change in ({"name": "other"}, {"weight_column": "w"}, {"loss_reduction": jh.Reduction.SUM_BY_NONZERO_WEIGHTS}):
        other = changed(head, **change)
        assert type(other) is type(head)
        if isinstance(head, AbstractCompositeHead):
            assert other != head
            continue
        name, value = next(iter(change.items()))
        assert getattr(other, name) == value
        assert (other == head) == (getattr(head, name) == value)
    assert head != "a head"
    with pytest.raises(dataclasses.FrozenInstanceError):
        head.name = "changed"


@each
def test_bound_heads_carry_their_parameters(entry):
    head, params = entry.head, entry.params()
    labels, logits = draw(entry, 25)
    bound = head.bind(params)
    assert len(jax.tree.leaves(bound)) == len(jax.tree.leaves(params))
    copies = (
        pickle.loads(pickle.dumps(bound)),
        jax.tree.map(lambda x: x, bound),
        head.bind(dict(params)),
        dataclasses.replace(bound),
    )
    loss = jax.jit(lambda copy: copy.loss(labels, logits))
    for copy in copies:
        jax.tree.map(np.testing.assert_array_equal, copy, bound)
        assert jax.tree.structure(copy) == jax.tree.structure(bound)
        np.testing.assert_allclose(loss(copy), entry.expected_loss(labels, logits), rtol=2e-6, atol=2e-6)
    assert "n" in changed(bound, name="n").name.split("_")
    if params:
        for forbidden in (lambda: hash(bound), lambda: bound == head.bind(params)):
            with pytest.raises(ValueError, match="bound"):
                forbidden()
        for name in params:
            assert name in repr(bound)
    else:
        assert bound == head


@each
def test_optax_moves_what_is_learned_and_nothing_else(entry):
    head, optimizer = entry.head, optax.sgd(0.1)
    labels, logits = draw(entry, 26)
    learned, state = head.init(jax.random.key(1)), head.init_state()
    *_, gradients, _ = step(head)(labels, logits, ONES, ALL, {**learned, **state})
    updates, _ = optimizer.update(part_like(gradients, learned), optimizer.init(learned))
    moved: Any = optax.apply_updates(learned, updates)
    before = entry.expected_loss(labels, logits, params={**learned, **state})
    after = entry.expected_loss(labels, logits, params={**moved, **state})
    for new, old in zip(jax.tree.leaves(moved), jax.tree.leaves(learned), strict=True):
        assert np.abs(new - old).max() > 0
    assert after < before or not learned
    # Every call reads the values that it is given.
    bound = {**moved, **state}
    np.testing.assert_allclose(step(head)(labels, logits, ONES, ALL, bound)[0], after, rtol=2e-6)
    expected = entry.expected_metrics(labels, logits, params=bound)
    for metrics in (
        head.measure(labels, logits, params=bound),
        head.update_metrics(head.metrics(), None, logits, labels, params=bound),
        head.bind(bound).measure(labels, logits),
    ):
        assert_values(metrics.compute(bounds=True), expected)
    for name in state:
        jax.tree.map(lambda gradient: np.testing.assert_array_equal(gradient, 0), gradients[name])


@each
def test_running_fields(entry):
    """A state goes through `update_state` with its structure and dtypes; what has none passes nothing on."""
    head = entry.head
    state = head.init_state()
    labels, logits = draw(entry, 27)
    new = jax.jit(lambda state: head.update_state(state, labels, logits, params=head.init(jax.random.key(0))))(state)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
    counting = ("running_prior", "nested", "precision_at_recall", "precision_recall_auc", "error_rate")
    assert bool(state) == (entry.name in counting)
    assert any(np.any(new != old) for new, old in zip(*map(jax.tree.leaves, (new, state)), strict=True)) == bool(state)
    for wrong in [{**state, "stranger": jnp.zeros(())}, *([dict.fromkeys(state, jnp.zeros(7)), {}] if state else [])]:
        with pytest.raises(ValueError, match="running state of"):
            head.update_state(wrong, labels, logits, params=head.init(jax.random.key(0)))


def test_running_prior_counts_what_is_seen():
    entry = next(entry for entry in ZOO if entry.name == "running_prior")
    labels, logits = draw(entry, 28)
    weights = np.linspace(0, 2, N, dtype=np.float32)[:, None]
    where = (np.arange(N) % 4 != 1)[:, None]
    spoiled = poison(entry, labels, logits, ~where | (weights == 0))
    state = entry.head.init_state()
    for _ in range(3):
        state = entry.head.update_state(state, *spoiled, weights=weights, where=where)
    w = np.where(where, weights, 0).astype(np.float64)
    expected = [1 + 3 * (w * labels).sum(), 2 + 3 * w.sum()]
    np.testing.assert_allclose(np.asarray(state["counts"], np.float64).sum(-1), expected, rtol=1e-6)
    loss = entry.head.loss(labels, logits, params=state)
    np.testing.assert_allclose(loss, entry.expected_loss(labels, logits, params=state), rtol=2e-6)
    # Evaluation reads the state and leaves it alone.
    gradient = jax.grad(lambda state: entry.head.loss(labels, logits, params=state))(state)
    np.testing.assert_array_equal(gradient["counts"], 0)


class SettingHead(jh.Head):
    """A head that checks nothing of its own accord, and reads a feature."""

    setting: Any = None
    rate: jax.Array = jh.learned(lambda head, key: jnp.ones(1))

    logits_dimension = 1

    def losses(self, labels, logits, features: Any = None):
        rate = jnp.expand_dims(self.rate, tuple(range(logits.ndim - 1)))
        return (labels - logits * rate) ** 2 / features["scale"]


def test_sequences_in_static_fields_become_tuples_and_arrays_are_refused():
    head = jh.BinaryClassHead(thresholds=[0.3, 0.5], label_vocabulary=["a", "b"])  # pyright: ignore[reportArgumentType]
    assert head.thresholds == (0.3, 0.5)
    assert head.label_vocabulary == ("a", "b")
    assert head == jh.BinaryClassHead(thresholds=(0.3, 0.5), label_vocabulary=("a", "b"))
    for bad in (np.array([0.3]), jnp.array([0.3]), float("nan"), [0.3, float("nan")], {0.3: 1}):
        with pytest.raises(ValueError, match="thresholds"):
            jh.BinaryClassHead(thresholds=bad)  # pyright: ignore[reportArgumentType]
    assert SettingHead([[1, 2], [3]]).setting == ((1, 2), (3,))
    for bad in (
        np.ones(2),
        jnp.ones(2),
        [np.ones(2)],
        float("nan"),
        (1.0, (float("nan"),)),
        np.float32("nan"),
        {},
        set(),
    ):
        with pytest.raises(ValueError, match="setting"):
            SettingHead(bad)
    assert jh.MultiClassHead(np.int64(3)) == jh.MultiClassHead(3)  # pyright: ignore[reportArgumentType]


# Features


@pytest.mark.parametrize(
    # A sequence's features hold its mask: tests of its own.
    "entry",
    marked(entry for entry in ZOO if entry.name != "sequential"),
)
def test_features_may_hold_strings(entry):
    labels, logits = draw(entry, 29)
    params, weights = entry.params(), np.linspace(0, 2, N, dtype=np.float32)
    expected = entry.expected_loss(labels, logits, weights)
    metrics = entry.expected_metrics(labels, logits, weights)
    features = {"w": weights, "who": np.array(["ann", "bob"] * 4), "words": [["x"], ["y", "z"]] * 4, "none": None}
    for column, given in (("w", features), ("w", {**features, "w": weights.tolist()}), (lambda f: f["w"], features)):
        head = changed(entry.head, weight_column=column)
        loss = head.loss(labels, logits, given, params=params)
        np.testing.assert_allclose(loss, expected, rtol=2e-6, atol=2e-6)
    head = changed(entry.head, weight_column="w")
    closed = jax.jit(lambda z: head.loss(labels, z, features, params=params))(logits)
    np.testing.assert_allclose(closed, expected, rtol=2e-6, atol=2e-6)
    updated = head.update_metrics(head.metrics(), features, logits, labels, params=params)
    assert_values(updated.compute(bounds=True), metrics)


def scaled_error(labels, logits, features):
    return (logits - labels) ** 2 / features["scale"]


def test_loss_fn_reads_features_whose_hidden_rows_are_harmless():
    rng = np.random.default_rng(0)
    labels, logits = rng.normal(size=(2, N, 1)).astype(np.float32)
    scale = rng.uniform(1, 2, (N, 1)).astype(np.float32)
    where = (np.arange(N) % 3 != 0)[:, None]
    exact = np.where(where, (logits.astype(np.float64) - labels) ** 2 / scale, 0)
    head = jh.RegressionHead(loss_fn=scaled_error)
    for garbage in (0.0, np.nan):
        features = {"scale": np.where(where, scale, np.float32(garbage)), "who": ["ann"] * N}
        loss, gradient = jax.value_and_grad(lambda z, f=features: head.loss(labels, z, f, where=where))(logits)
        np.testing.assert_allclose(loss, exact.sum() / where.sum(), rtol=1e-6)
        slopes = np.where(where, 2 * (logits - labels) / scale, 0) / where.sum()
        np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-7)
        measured = head.measure(labels, logits, features, where=where)
        np.testing.assert_allclose(measured.compute()["average_loss"], exact.sum() / where.sum(), rtol=1e-6)


def test_features_of_hidden_rows_do_not_reach_learned_fields():
    rng = np.random.default_rng(0)
    labels, logits = rng.normal(size=(2, N, 1)).astype(np.float32)
    scale = rng.uniform(1, 2, N).astype(np.float32)
    where = np.arange(N) % 3 != 0
    slope = np.mean((-2 * (labels.astype(np.float64) - logits) * logits)[where, 0] / scale[where])
    head = SettingHead()
    for garbage in (0.0, np.nan):
        for lead in ((N,), (2, 4)):
            features = {"scale": np.where(where, scale, np.float32(garbage))[:, None], "who": np.array(["ann"] * N)}
            shaped = jax.tree.map(lambda x, lead=lead: x.reshape(*lead, 1), (labels, logits, where, features["scale"]))
            features["scale"] = shaped[3]

            def loss(params, batch=shaped, features=features):
                return head.loss(batch[0], batch[1], features, where=batch[2], params=params)

            gradient = jax.jit(jax.grad(loss))({"rate": np.ones(1, np.float32)})
            np.testing.assert_allclose(gradient["rate"][0], slope, rtol=1e-5)


def test_strings_are_labels_where_there_is_a_vocabulary():
    names = np.array(["ant", "bee", "cat"])
    head = jh.MultiClassHead(3, label_vocabulary=("ant", "bee", "cat"))
    entry = dataclasses.replace(next(entry for entry in ZOO if entry.name == "multi_class"), head=head)
    logits = entry.logits(np.random.default_rng(0), (N,))
    ids = np.arange(N)[:, None] % 3
    expected = entry.expected_loss(ids, logits)
    for labels in (names[ids], names[ids[:, 0]].tolist(), names[ids].astype("S"), names[ids].astype(object), ids):
        np.testing.assert_allclose(head.loss(labels, logits), expected, rtol=2e-6)
        np.testing.assert_array_equal(head.encode_labels(labels).reshape(N, 1), ids)
    with pytest.raises(ValueError, match="dog"):
        head.loss(["dog"] * N, logits)
    where = ids[:, 0] != 1
    spoiled = np.where(where, names[ids[:, 0]], "dog")
    np.testing.assert_allclose(
        head.loss(spoiled, logits, where=where), entry.expected_loss(ids, logits, where=where), rtol=2e-6
    )
    with pytest.raises(ValueError, match="label_vocabulary"):
        jh.MultiClassHead(3).loss(["ant"] * N, logits)
    decoded = head.decode_predictions(head.predictions(logits))
    np.testing.assert_array_equal(decoded["classes"][:, 0], names[logits.argmax(-1)])
    np.testing.assert_array_equal(decoded["all_classes"], [["ant", "bee", "cat"]] * N)


# Large batches, and logits that are not multiplied yet


LARGE = 20_001


@each
def test_large_batches(entry):
    """Rows enough to be cut in tiles, the last of them partial: in weights, masks, garbage and areas as any batch."""
    rng = np.random.default_rng(30)
    labels, logits = draw(entry, 30, (LARGE,))
    weights = rng.choice(f32([0, 0.1, 0.3, 3]), (LARGE, 1))
    where = rng.random((LARGE, 1)) < 0.9
    spoiled = poison(entry, labels, logits, ~where | (weights == 0))
    rest = {"weights": weights, "where": where, "params": entry.params()}
    loss = entry.head.loss(*spoiled, **rest)
    np.testing.assert_allclose(loss, entry.expected_loss(labels, logits, weights, where), rtol=5e-6)
    expected = entry.expected_metrics(labels, logits, weights, where)
    assert_values(entry.head.measure(*spoiled, **rest).compute(bounds=True), expected)
    update = jax.jit(lambda m, y, z: entry.head.update_metrics(m, None, z, y, **rest))
    metrics = update(update(entry.head.metrics(), *spoiled), *spoiled)
    assert_values(metrics.compute(bounds=True), expected)


@each_refusing
def test_bad_rows_of_large_batches_are_counted_once(entry):
    labels, logits = draw(entry, 31, (LARGE,))
    rows = np.arange(0, LARGE, 500)
    bad = replace_label(labels, 0, entry.illegal)
    bad[rows] = entry.illegal
    where = ~np.isin(np.arange(LARGE), rows)
    measured = entry.head.measure(bad, logits, params=entry.params(), check=False)
    with pytest.warns(jh.BadInputWarning, match=rf"\b{len(rows)} element"):
        values = measured.compute(bounds=True)
    assert_values(values, entry.expected_metrics(labels, logits, where=where))


@each
def test_large_batches_keep_their_regularization_and_leading_axes(entry):
    labels, logits = draw(entry, 32, (LARGE, 2))
    deep = entry.head.measure(labels, logits, regularization_losses=[0.5, 1.0], params=entry.params())
    values = deep.compute(bounds=True)
    assert values[full_name(entry, "regularization_loss")] == 1.5
    assert_values(values, entry.expected_metrics(labels, logits))


def lazy_logits(entry: Entry, n: int, seed: int = 33) -> tuple[jh.LinearLogits, np.ndarray]:
    rng = np.random.default_rng(seed)
    d = entry.head.logits_dimension
    factors: Any = [rng.normal(size=shape).astype(np.float32) for shape in ((n, 3), (3, d), (d,))]
    lazy = jh.LinearLogits(*factors)
    return lazy, factors[0].astype(np.float64) @ lazy.kernel + lazy.bias


@each
def test_linear_logits_are_multiplied_logits(entry):
    lazy, exact = lazy_logits(entry, N)
    labels = entry.labels(np.random.default_rng(34), (N,))
    weights, where = np.linspace(0, 2, N, dtype=np.float32)[:, None], (np.arange(N) % 5 != 3)[:, None]
    hidden = np.where(where & (weights > 0), lazy.hidden, np.float32(np.nan))
    params = entry.params()
    loss, gradient, _, measured = step(entry.head)(
        labels, dataclasses.replace(lazy, hidden=hidden), weights, where, params
    )
    np.testing.assert_allclose(loss, entry.expected_loss(labels, exact, weights, where), rtol=3e-6, atol=2e-6)
    to_logits = expected_gradient(entry, labels, exact, weights, where)
    inputs = np.where(where, lazy.hidden, 0).astype(np.float64)
    np.testing.assert_allclose(gradient.hidden, to_logits @ lazy.kernel.T, rtol=1e-4, atol=3e-6)
    np.testing.assert_allclose(gradient.kernel, inputs.T @ to_logits, rtol=1e-4, atol=3e-6)
    np.testing.assert_allclose(gradient.bias, to_logits.sum(0), rtol=1e-4, atol=3e-6)
    assert_values(measured.compute(bounds=True), entry.expected_metrics(labels, exact, weights, where), rtol=5e-6)
    dense = exact.astype(np.float32)
    both = (entry.head.predictions(z, params=params) for z in (lazy, dense))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), *both)
    without = jh.LinearLogits(lazy.hidden, lazy.kernel)
    plain = entry.head.loss(labels, without, params=params)
    np.testing.assert_allclose(plain, entry.expected_loss(labels, exact - lazy.bias), rtol=5e-6, atol=2e-6)
    bad_kernel = jh.LinearLogits(lazy.hidden, lazy.kernel[:-1])
    with pytest.raises(ValueError, match=r"\(8, 3\).*\(2, "):
        entry.head.loss(labels, bad_kernel, params=params)
    bad_bias = jh.LinearLogits(lazy.hidden, lazy.kernel, jnp.ones(7))
    with pytest.raises(ValueError, match="bias"):
        entry.head.predictions(bad_bias, params=params)


@each
def test_linear_logits_of_low_precision(entry):
    """The product is accumulated in float32: bfloat16 factors give the float32 answer of those factors."""
    lazy, _ = lazy_logits(entry, N)
    lazy = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), lazy)
    exact = (np.asarray(x, np.float64) for x in (lazy.hidden, lazy.kernel, lazy.bias))
    hidden, kernel, bias = exact
    labels = entry.labels(np.random.default_rng(34), (N,))
    loss = entry.head.loss(labels, lazy, params=entry.params())
    np.testing.assert_allclose(loss, entry.expected_loss(labels, hidden @ kernel + bias), rtol=5e-6, atol=2e-6)


@each
def test_large_batches_of_linear_logits(entry):
    lazy, exact = lazy_logits(entry, LARGE)
    labels = entry.labels(np.random.default_rng(35), (LARGE,))
    where = np.random.default_rng(36).random((LARGE, 1)) < 0.9
    hidden = np.where(where, lazy.hidden, np.float32(np.nan))
    measured = entry.head.measure(labels, dataclasses.replace(lazy, hidden=hidden), where=where, params=entry.params())
    # In float32 a few rows of 20,001 fall on the other side of a decision.
    assert_values(
        measured.compute(bounds=True), entry.expected_metrics(labels, exact, where=where), rtol=1e-5, slack=1e-4
    )


# What can be read from metrics


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
    predicted, observed, weight = jh.BinaryClassHead().measure(labels, logits).reliability(bins=8)
    probabilities = zoo.sigmoid(logits[:, 0].astype(np.float64))
    expected_observed, expected_predicted = calibration_curve(labels, probabilities, n_bins=8)
    np.testing.assert_allclose(predicted, expected_predicted, atol=2e-3)
    # Rows in the bin of an edge may fall on its other side.
    np.testing.assert_allclose(observed, expected_observed, atol=1e-2)
    assert weight.sum() == 4000
    for bins in (0, 2.5, True):
        with pytest.raises(ValueError, match="bins"):
            jh.BinaryClassHead().measure(labels, logits).reliability(bins=bins)  # pyright: ignore[reportArgumentType]
    one_sided = jh.BinaryClassHead().measure([1, 1], f32([[2.0], [2.0]])).reliability(bins=10)
    assert [x.tolist() for x in one_sided[1:]] == [[1.0], [2.0]]


def test_heads_without_scores_have_no_curves():
    metrics = jh.RegressionHead().metrics()
    for call in (lambda: metrics.curve("roc"), lambda: metrics.reliability()):
        with pytest.raises(ValueError, match="RegressionHead"):
            call()


def test_areas_of_rare_events():
    labels, logits = scores(39, 50_000, 0.01, -10.0, 2.0)
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


@pytest.mark.parametrize("sd", [0.02, 0.001])
@pytest.mark.parametrize("center", [-10.0, 25.0])
def test_a_coarse_grid_says_so_and_names_the_mend(sd, center):
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


@each
def test_repr_never_fails(entry):
    head, params = entry.head, entry.params()
    measured = head.measure(*draw(entry), params=params)
    title = f"Metrics of {head!r}"
    for value in measured.compute():
        assert value in repr(measured)
    seen = []

    @jax.jit
    def traced(metrics):
        seen.append(repr(metrics))
        return metrics

    traced(measured)
    odd = [
        dataclasses.replace(measured, state=jnp.stack([measured.state] * 2)),
        dataclasses.replace(measured, state=jax.ShapeDtypeStruct(measured.state.shape, jnp.float32)),
        dataclasses.replace(measured, state=None),
        dataclasses.replace(measured, state=jnp.full_like(measured.state, jnp.nan)),
        jax.tree.map(lambda x: "leaf", measured),
        jax.eval_shape(lambda: measured),
        head.metrics(),
    ]
    deleted = dataclasses.replace(measured, state=jnp.array(measured.state))
    deleted.state.delete()
    for text in (*seen, *map(repr, odd), repr(deleted), repr(head.metrics([]))):
        assert text.startswith(title)
