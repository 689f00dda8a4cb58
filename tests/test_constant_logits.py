"""The best constant logits, against the slope of the oracles' losses and scikit-learn's dummies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from laws import draw, poison, slope
from sklearn.dummy import DummyClassifier, DummyRegressor
from zoo import ZOO

import jaxheads as jh

# One number of rows in all tests here: what is eager compiles a program for each shape.
ROWS = 40
each_constant = pytest.mark.parametrize("entry", [entry for entry in ZOO if entry.closed], ids=lambda entry: entry.name)


@each_constant
def test_the_slope_of_the_loss_is_0_at_the_constant_logits(entry):
    labels, _ = draw(entry, lead=(ROWS,))
    weights = np.resize(np.array([0.5, 2, 1, 0, 0.3, 7], np.float32), ROWS)
    where = np.arange(ROWS) % 3 != 1
    hidden = ((weights == 0) | ~where)[:, None]
    spoiled, _ = poison(entry, labels, np.zeros((ROWS, entry.head.logits_dimension), np.float32), hidden)
    got = entry.head.constant_logits(spoiled, weights, where)
    assert got.dtype == np.float32
    assert got.shape == (entry.head.logits_dimension,)
    assert np.abs(got).max() > 0.05

    def loss(z):
        return entry.expected_loss(labels, np.broadcast_to(z, (ROWS, len(z))), weights, where, reduction="mean")

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
    weights, names = rng.random(ROWS), np.array(["ant", "bee", "cat"])
    labels, y = names[rng.integers(0, 3, ROWS)], rng.gamma(2.0, size=(ROWS, 2))
    nothing = np.zeros((ROWS, 1))

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
    labels = {"a": repeated([1, 0, 1, 1]), "b": repeated([1.0, np.nan, 2.0, 6.0])}
    heads = [jh.BinaryClassHead(name="a"), jh.RegressionHead(name="b")]
    where = {"b": repeated([1, 0, 1, 1])}
    for head in (jh.MultiHead(heads, head_weights=(1.0, 0.0)), jh.MultiHead(heads, weighting="uncertainty")):
        np.testing.assert_allclose(head.constant_logits(labels, where=where), [np.log(3), 3], rtol=1e-6)
    sequences = jh.SequentialHeadWrapper(jh.BinaryClassHead(), sequence_lengths="n", average_over="sequences")
    steps = {"n": np.array([2, 1])}
    # One half of the first sequence, all of the second: 3/4.
    got = sequences.constant_logits(np.array([[1, 0, 9], [1, 9, 9]]), features=steps)
    np.testing.assert_allclose(got, [np.log(3)], rtol=1e-6)


def repeated(rows: list | np.ndarray) -> np.ndarray:
    return np.resize(rows, (ROWS, *np.shape(rows)[1:]))


def test_an_infinite_constant_logit_is_cut():
    for head, rows, expected in (
        (jh.BinaryClassHead(), [1, 1], [30]),
        (jh.LogisticRegressionHead(), [0.0], [-30]),
        (jh.MultiClassHead(3), [0, 2], [-np.log(2), -30, -np.log(2)]),
        (jh.MultiLabelHead(3), [[1, 0, 1], [1, 0, 0]], [30, -30, 0]),
        (jh.PoissonRegressionHead(), [0, 0], [-30]),
    ):
        np.testing.assert_allclose(head.constant_logits(repeated(rows)), expected, rtol=1e-6)


@pytest.mark.parametrize("entry", [entry for entry in ZOO if not entry.closed], ids=lambda entry: entry.name)
def test_a_head_without_a_closed_form_says_so(entry):
    with pytest.raises(ValueError, match="has no best constant logits in closed form"):
        entry.head.constant_logits(draw(entry, lead=(ROWS,))[0])


def test_what_has_no_best_constant_is_refused():
    head, ones = jh.RegressionHead(2), np.ones((ROWS, 2))
    with pytest.raises(ValueError, match="with a loss_fn has no best constant logits in closed form"):
        jh.BinaryClassHead(loss_fn=zoo.hinge_per_element).constant_logits(repeated([1]))
    with pytest.raises(ValueError, match=r"Given 40 for RegressionHead, of which none does"):
        head.constant_logits(ones, weights=repeated([0]))
    with pytest.raises(ValueError, match=r"logits \[1\] of 2"):
        head.constant_logits(ones, weights=repeated([[1, 0], [2, 0]]))
    with pytest.raises(ValueError, match="Given nan at index"):
        head.constant_logits(jax.device_put(repeated(np.array([[1, np.nan]], np.float32))))
    with pytest.raises(ValueError, match="not negative"):
        head.constant_logits(ones, weights=repeated([1, -1]))
    with pytest.raises(ValueError, match="Head 'b': constant_logits needs elements"):
        jh.MultiHead([jh.RegressionHead(name="b")]).constant_logits({"b": repeated([1.0])}, where=repeated([0]))
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda y: jnp.asarray(head.constant_logits(y)))(ones)
