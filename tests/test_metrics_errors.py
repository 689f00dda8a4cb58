"""Errors of regression that moments do not tell, by scikit-learn and SciPy in float64."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
import scipy.special
from sklearn.metrics import (
    mean_absolute_percentage_error,
    mean_squared_log_error,
    root_mean_squared_log_error,
)

import jaxheads as jh
from jaxheads import metrics as M

N = 40
EACH = (
    M.MeanSquaredLogError,
    M.RootMeanSquaredLogError,
    M.MeanAbsolutePercentageError,
    functools.partial(M.HuberError, 2.0),
    functools.partial(M.WithinTolerance, 0.5),
    functools.partial(M.WithinTolerance, 0.25, relative=True),
)
EVERY = (*(make() for make in EACH), *(make(multioutput="raw_values") for make in EACH))
HEAD = jh.RegressionHead(2, inverse_link_fn=jax.nn.softplus).with_metrics(*EVERY)


@functools.cache
def draw():
    """Labels not negative, some 0; rows without weight or mask hold what no logarithm takes."""
    rng = np.random.default_rng(0)
    labels = rng.gamma(2.0, size=(N, 2)).astype(np.float32)
    labels[:3, 0] = 0
    weights, where = rng.choice(np.array([0, 0.5, 1, 3], np.float32), (N, 1)), rng.random((N, 1)) < 0.8
    weights[:4] = 1
    where[:4] = True
    labels = np.where(where & (weights > 0), labels, np.float32(-7))
    return labels, rng.normal(size=(N, 2)).astype(np.float32) + 1, weights, where


def expected(keep=slice(None)):
    labels, logits, weights, where = (np.asarray(x)[keep] for x in draw())
    live = (where * weights > 0)[:, 0]
    y, p = labels[live].astype(float), np.logaddexp(0, logits[live].astype(float))
    scores: dict[str, Any] = {
        "mean_squared_log_error": mean_squared_log_error,
        "root_mean_squared_log_error": root_mean_squared_log_error,
        "mean_absolute_percentage_error": mean_absolute_percentage_error,
        "huber_error_2": lambda y, p, **given: mean_of(scipy.special.huber(2, y - p), **given),
        "within_tolerance_0.5": lambda y, p, **given: mean_of(np.abs(y - p) <= 0.5, **given),
        "within_relative_tolerance_0.25": lambda y, p, **given: mean_of(np.abs(y - p) <= 0.25 * y, **given),
    }
    out = {}
    for key, score in scores.items():
        given = {"sample_weight": weights[live, 0].astype(float)}
        out[key] = score(y, p, **given, multioutput="uniform_average")
        for i, value in enumerate(score(y, p, **given, multioutput="raw_values")):
            out[f"{key}/target{i}"] = value
    return out


def mean_of(values, *, sample_weight, multioutput):
    found = np.average(values, axis=0, weights=sample_weight)
    return found if multioutput == "raw_values" else found.mean()


@functools.cache
def compiled():
    return jax.jit(lambda y, z, w, e: HEAD.measure(y, z, weights=w, where=e))


def measure(**changes):
    given = dict(zip(("labels", "logits", "weights", "where"), draw(), strict=True))
    return compiled()(*{**given, **changes}.values())


def assert_values(metrics, values):
    found = metrics.compute()
    for key, value in values.items():
        np.testing.assert_allclose(found[key], value, rtol=2e-5, err_msg=key)


def test_errors_are_those_of_scikit_learn():
    values = expected()
    assert set(values) < set(measure().compute())
    assert values["mean_absolute_percentage_error"] > 1e13  # a label of 0
    assert_values(measure(), values)


def test_batches_add_up_and_weights_count():
    half = np.arange(N)[:, None] < N // 2
    where = draw()[3]
    assert_values(measure(where=where & half) + measure(where=where & ~half), expected())
    assert_values(measure(where=where & ~half), expected(slice(N // 2, N)))
    twice = measure(weights=2 * draw()[2])
    assert_values(twice, expected())


def test_weights_may_be_those_of_each_target():
    weights = np.random.default_rng(1).choice(np.array([0, 1, 2], np.float32), (N, 2))
    labels = np.maximum(draw()[0], 0)
    found = measure(labels=labels, weights=weights, where=np.ones((N, 1), bool)).compute()
    p = np.logaddexp(0, draw()[1].astype(float))
    for i in range(2):
        y = labels[:, i].astype(float)
        value = mean_squared_log_error(y, p[:, i], sample_weight=weights[:, i])
        np.testing.assert_allclose(found[f"mean_squared_log_error/target{i}"], value, rtol=2e-5)


def test_what_has_no_value():
    """Nothing seen is undefined; a logarithm of what is below -1 is NaN, and shows."""
    empty = HEAD.metrics().compute()
    assert all(np.isnan(empty[key]) for key in expected())
    told = HEAD.metrics().compute(undefined=-1.0)
    assert {told[key] for key in expected()} == {-1}
    labels = np.maximum(draw()[0], 0)
    labels[0, 1] = -2
    found = measure(labels=labels, weights=np.ones((N, 1), np.float32)).compute()
    assert np.isnan([found["mean_squared_log_error"], found["root_mean_squared_log_error/target1"]]).all()
    assert np.isfinite([found["mean_squared_log_error/target0"], found["huber_error_2"]]).all()


def test_metrics_of_the_same_errors_share_their_sums():
    def size(*metrics):
        return jh.RegressionHead(2).with_metrics(*metrics).metrics().state.shape[0]

    assert size(M.MeanSquaredLogError(), M.RootMeanSquaredLogError("raw_values")) == size() + 4
    assert size(M.HuberError(), M.HuberError(2)) == size() + 8


def test_identity_and_directions():
    for metric in EVERY:
        assert eval(repr(metric), {"jh": jh}) == metric
    assert repr(M.WithinTolerance(0.5)) == "jh.metrics.WithinTolerance(tolerance=0.5)"
    assert M.HuberError().key == "huber_error"
    assert M.WithinTolerance(3).higher_is_better
    assert not M.MeanSquaredLogError().higher_is_better


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda make: make.HuberError(0), "delta"),
        (lambda make: make.WithinTolerance(-1), "tolerance"),
        (lambda make: make.WithinTolerance("a"), "tolerance"),
        (lambda make: make.WithinTolerance(1, relative=2), "relative must be True or False"),
        (lambda make: make.MeanSquaredLogError("each"), "multioutput must be one of"),
        (lambda make: jh.BinaryClassHead().with_metrics(make.HuberError()), "reads 'moments'"),
    ],
)
def test_bad_values_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call(M)


def test_a_prediction_that_is_nan_is_within_nothing():
    head = jh.RegressionHead().with_metrics(M.WithinTolerance(1.0))
    assert np.isnan(head.measure([1.0, 2.0], [[np.nan], [2.0]]).compute(warn=False)["within_tolerance_1"])
    assert head.measure([1.0, 2.0], [[4.0], [2.0]]).compute(warn=False)["within_tolerance_1"] == 0.5
