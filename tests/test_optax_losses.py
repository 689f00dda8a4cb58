"""optax's losses as `loss_fn`, as they are: numbers written out in float64, labels, equality, pickling, refusals."""

import functools
import pickle
from typing import Any

import jax
import numpy as np
import optax
import pytest

import jaxheads as jh

RNG = np.random.default_rng(4)
N = 6
Y, Z = RNG.normal(size=(N, 2)).astype(np.float32), (2 * RNG.normal(size=(N, 2))).astype(np.float32)
BITS, ONE = np.array([1, 0, 0, 1, 1, 0]), (2 * RNG.normal(size=(N, 1))).astype(np.float32)
SHARES = np.array([1, 0, 0.25, 0.75, 1, 0], np.float32)
IDS, LOGITS = np.array([2, 0, 1, 1, 3, 2]), (2 * RNG.normal(size=(N, 4))).astype(np.float32)
HOT = np.eye(4)[IDS]
MANY = RNG.integers(0, 2, (N, 4))
WHERE, WEIGHTS = np.array([True, True, False, True, True, True]), np.array([1, 2, 1, 0.5, 0, 1], np.float32)


def log_softmax(z):
    return z - np.logaddexp.reduce(z, -1, keepdims=True)


def cross_entropy(y, z):
    return np.logaddexp(0, z) - y * z


def huber(y, z, delta):
    size = np.abs(y - z)
    return np.where(size < delta, size**2 / 2, delta * (size - delta / 2))


def focal(y, z, gamma):
    p = 1 / (1 + np.exp(-z))
    return y * (1 - p) ** gamma * -np.log(p) + (1 - y) * p**gamma * -np.log(1 - p)


def hinge(y, z):
    return y * np.maximum(0, 1 - z) + (1 - y) * np.maximum(0, 1 + z)


def sparse_plus(z):
    return np.where(z <= -1, 0, np.where(z >= 1, z, (z + 1) ** 2 / 4))


def of_class(z):
    return np.take_along_axis(z, IDS[:, None], -1)


REGRESSION = functools.partial(jh.RegressionHead, 2)
CLASSES, LABELS = functools.partial(jh.MultiClassHead, 4), functools.partial(jh.MultiLabelHead, 4)
P = functools.partial
Z64, ONE64, LOGITS64 = (x.astype(np.float64) for x in (Z, ONE, LOGITS))

# A head, a loss of optax, labels, logits, the losses of the rows in float64.
TAKEN: list[tuple[Any, Any, Any, Any, Any]] = [
    (REGRESSION, optax.huber_loss, Y, Z, huber(Y, Z64, 1.0)),
    (REGRESSION, P(optax.huber_loss, delta=0.25), Y, Z, huber(Y, Z64, 0.25)),
    (REGRESSION, optax.l2_loss, Y, Z, (Y - Z64) ** 2 / 2),
    (REGRESSION, optax.squared_error, Y, Z, (Y - Z64) ** 2),
    (REGRESSION, optax.log_cosh, Y, Z, np.log(np.cosh(Y - Z64))),
    (jh.BinaryClassHead, optax.hinge_loss, BITS, ONE, hinge(BITS[:, None], ONE64)),
    (jh.BinaryClassHead, optax.hinge_loss, SHARES, ONE, hinge(SHARES[:, None], ONE64)),
    (jh.BinaryClassHead, optax.losses.perceptron_loss, BITS, ONE, np.maximum(0, (1 - 2 * BITS[:, None]) * ONE64)),
    (jh.BinaryClassHead, optax.losses.sparsemax_loss, BITS, ONE, sparse_plus((1 - 2 * BITS[:, None]) * ONE64)),
    (jh.BinaryClassHead, optax.sigmoid_binary_cross_entropy, SHARES, ONE, cross_entropy(SHARES[:, None], ONE64)),
    (jh.BinaryClassHead, optax.sigmoid_focal_loss, BITS, ONE, focal(BITS[:, None], ONE64, 2.0)),
    (jh.BinaryClassHead, P(optax.sigmoid_focal_loss, gamma=1.0), BITS, ONE, focal(BITS[:, None], ONE64, 1.0)),
    (CLASSES, optax.softmax_cross_entropy_with_integer_labels, IDS, LOGITS, -of_class(log_softmax(LOGITS64))),
    (CLASSES, optax.softmax_cross_entropy, IDS, LOGITS, -of_class(log_softmax(LOGITS64))),
    (CLASSES, optax.safe_softmax_cross_entropy, IDS, LOGITS, -of_class(log_softmax(LOGITS64))),
    (
        *(CLASSES, P(optax.losses.poly_loss_cross_entropy, epsilon=0.5), IDS, LOGITS),
        -of_class(log_softmax(LOGITS64)) + 0.5 * (1 - of_class(np.exp(log_softmax(LOGITS64)))),
    ),
    (
        *(CLASSES, optax.losses.multiclass_hinge_loss, IDS, LOGITS),
        np.max(LOGITS64 + 1 - HOT, -1, keepdims=True) - of_class(LOGITS64),
    ),
    (
        *(CLASSES, optax.losses.multiclass_perceptron_loss, IDS, LOGITS),
        LOGITS64.max(-1, keepdims=True) - of_class(LOGITS64),
    ),
    (LABELS, optax.sigmoid_binary_cross_entropy, MANY, LOGITS, cross_entropy(MANY, LOGITS64).mean(-1, keepdims=True)),
    (LABELS, optax.hinge_loss, MANY, LOGITS, hinge(MANY, LOGITS64).mean(-1, keepdims=True)),
]


# Some of optax's own arithmetic mixes dtypes.
mixed_dtypes = functools.partial(jax.numpy_dtype_promotion, "standard")


def name_of(loss_fn):
    return getattr(loss_fn, "__name__", "partial")


# Of functions that are taken alike, one is quick.
QUICK = (optax.huber_loss, optax.hinge_loss, optax.sigmoid_binary_cross_entropy, optax.losses.sparsemax_loss)
QUICK += (optax.softmax_cross_entropy_with_integer_labels, optax.softmax_cross_entropy)


@pytest.mark.parametrize(
    ("make", "loss_fn", "labels", "logits", "losses"),
    [pytest.param(*x, id=name_of(x[1]), marks=[] if x[1] in QUICK else pytest.mark.slow) for x in TAKEN],
)
def test_losses_of_optax_are_taken(make, loss_fn, labels, logits, losses):
    head = make(loss_fn=loss_fn, loss_reduction="mean")
    weights = np.broadcast_to(np.where(WHERE, WEIGHTS, 0)[:, None], losses.shape)
    expected = np.sum(weights * losses) / np.sum(weights)
    with mixed_dtypes():
        loss = head.loss(labels, logits, where=WHERE, weights=WEIGHTS)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        metrics = head.measure(labels, logits, where=WHERE, weights=WEIGHTS)
        np.testing.assert_allclose(metrics.compute()["average_loss"], expected, rtol=1e-5)
    assert head == make(loss_fn=loss_fn, loss_reduction="mean")
    if not isinstance(loss_fn, functools.partial):  # partials are equal by identity, in Python too
        assert pickle.loads(pickle.dumps(head)) == head


def test_ids_of_any_rank():
    """`multiclass_sparsemax_loss` takes one leading axis."""
    for loss_fn in (optax.losses.multiclass_sparsemax_loss, optax.softmax_cross_entropy_with_integer_labels):
        head = jh.MultiClassHead(4, loss_fn=loss_fn)
        with mixed_dtypes():
            flat, nested = head.loss(IDS, LOGITS), head.loss(IDS.reshape(3, 2), LOGITS.reshape(3, 2, 4))
        np.testing.assert_allclose(nested, flat, rtol=1e-6)
    # Two classes at the same logit, the third far below: 1/2 of each, (1 - 1/2^2 - 1/2^2) / 2 = 1/4 above the logit.
    head = jh.MultiClassHead(3, loss_fn=optax.losses.multiclass_sparsemax_loss)
    with mixed_dtypes():
        np.testing.assert_allclose(head.loss([0], np.array([[1.0, 1.0, -9.0]], np.float32)), 0.25, rtol=1e-6)


def test_hinges_at_infinity():
    """The part of the other label is infinite, and does not count."""
    head = jh.BinaryClassHead(loss_fn=optax.hinge_loss)
    logits = np.array([[np.inf], [-np.inf]], np.float32)
    loss, gradient = jax.value_and_grad(lambda z: head.loss(np.array([1, 0]), z))(logits)
    assert loss == 0
    np.testing.assert_array_equal(gradient, 0)


def predictions_first(predictions, targets):
    return (predictions - targets) ** 3


def targets_first(targets, predictions):
    return (predictions - targets) ** 3


def scores_last(labels, scores, *, power=3):
    return (scores - labels) ** power


@pytest.mark.parametrize("loss_fn", [predictions_first, targets_first, scores_last])
def test_own_functions_are_called_by_their_names(loss_fn):
    assert jh.RegressionHead(loss_fn=loss_fn).loss([1.0], [[3.0]]) == 8


def misspelt(predictions, targets, feature=None):
    return predictions - targets


BINARY, LINKED = jh.BinaryClassHead, functools.partial(jh.RegressionHead, inverse_link_fn=jax.numpy.exp)


@pytest.mark.parametrize(
    ("make", "loss_fn", "words"),
    [
        (BINARY, optax.huber_loss, ("logits are no predictions", "RegressionHead", "lambda labels, logits")),
        (CLASSES, optax.l2_loss, ("logits are no predictions",)),
        (LINKED, optax.huber_loss, ("logits are no predictions", "without link")),
        (LINKED, predictions_first, ("predictions_first", "no predictions")),
        (jh.RegressionHead, optax.hinge_loss, ("one of two classes", "BinaryClassHead")),
        (CLASSES, optax.hinge_loss, ("one of two classes", "BinaryClassHead")),
        (CLASSES, optax.sigmoid_binary_cross_entropy, ("labels of single logits", "MultiLabelHead")),
        (BINARY, optax.softmax_cross_entropy, ("one of several classes", "MultiClassHead")),
        (BINARY, optax.softmax_cross_entropy_with_integer_labels, ("one of several classes", "MultiClassHead")),
        (LABELS, optax.safe_softmax_cross_entropy, ("one of several classes", "MultiClassHead")),
        (jh.RegressionHead, optax.softmax_cross_entropy, ("one of several classes",)),
        (jh.RegressionHead, optax.losses.kl_divergence, ("must contain argument: labels", "log_predictions")),
        (jh.RegressionHead, misspelt, ("unexpected args: ['feature']",)),
        (jh.RegressionHead, lambda predicted, true: predicted, ("must contain argument: labels", "predicted")),
        (jh.RegressionHead, lambda x, predictions, targets: x, ("must contain argument: labels",)),
    ],
)
def test_losses_that_read_something_else_are_refused(make, loss_fn, words):
    with pytest.raises(ValueError, match="loss_fn") as caught:
        make(loss_fn=loss_fn)
    assert all(word in str(caught.value) for word in words), str(caught.value)
