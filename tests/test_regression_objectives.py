"""The losses of regression: by SciPy and NumPy in float64; for boosting, by LightGBM."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import lightgbm
import numpy as np
import pytest
import scipy.special
import xgboost

import jaxheads as jh

HEADS = {
    "absolute_error": jh.RegressionHead(objective="absolute_error"),
    "log_cosh": jh.RegressionHead(objective="log_cosh"),
    "huber": jh.RegressionHead(objective="huber", huber_delta=1.5),
}
each_loss = pytest.mark.parametrize("name", HEADS)
# From nothing to the largest squares of float32, and at the knot of Huber's loss.
ERRORS = np.array([0, 1e-6, 1e-4, 0.01, 0.3, 0.999, 1, 1.5, 2, 5, 30, 100, 1e4, 1e18, 1e30])


def log_cosh(e):
    e = np.abs(e)
    with np.errstate(divide="ignore"):
        return np.where(e < 1, -np.log1p(-(np.tanh(e) ** 2)) / 2, e - np.log(2) + np.log1p(np.exp(-2 * e)))


FORMULAS = {
    "absolute_error": (np.abs, np.sign),
    "log_cosh": (log_cosh, np.tanh),
    "huber": (lambda e: scipy.special.huber(1.5, e), lambda e: np.clip(e, -1.5, 1.5)),
}


@each_loss
def test_losses_and_slopes_are_the_formulas_at_any_value(name):
    """Labels are 0, so that errors are exact; hidden rows hold NaN."""
    logits = np.concatenate([ERRORS, -ERRORS, [np.nan]]).astype(np.float32)[:, None]
    where, labels = np.isfinite(logits), np.where(np.isfinite(logits), 0, np.nan).astype(np.float32)
    e = logits[:-1].astype(np.float64)

    @jax.jit
    def run(logits):
        loss = functools.partial(HEADS[name].loss, labels, where=where, normalizer=np.float32(1))
        each = jax.vmap(lambda y, z: HEADS[name].losses(y[None], z[None])[0])(labels, logits)
        return each, jax.grad(lambda z: loss(z))(logits), HEADS[name].measure(labels[15:20], logits[15:20])

    each, slopes, metrics = jax.device_get(run(logits))
    formula, slope = FORMULAS[name]
    np.testing.assert_allclose(each[:-1], formula(e), rtol=2e-6, atol=1e-45)
    np.testing.assert_allclose(slopes[:-1], slope(e), rtol=2e-6)
    assert slopes[-1] == 0
    np.testing.assert_allclose(metrics.compute()["average_loss"], formula(e[15:20]).mean(), rtol=1e-6)


@each_loss
def test_the_loss_is_of_standardized_labels(name):
    head = cast(Any, jh.RegressionHead)(
        objective=name, label_mean=100.0, label_scale=20.0, huber_delta=1.5 if name == "huber" else 1.0
    )
    labels, logits = np.array([[80.0], [100], [180]], np.float32), np.array([[0.5], [0], [0]], np.float32)
    e = logits - (labels.astype(float) - 100) / 20
    np.testing.assert_allclose(head.loss(labels, logits), FORMULAS[name][0](e).mean(), rtol=1e-6)


def test_the_best_constant_of_absolute_error_is_the_median():
    """Of rows repeated as often as they weigh, by NumPy; in standardized units with a scale."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 9, 40):
        y, w = rng.normal(size=(n, 2)).round(1) * 10 + 50, rng.integers(0, 4, (n, 2))
        w[0] = 1
        head = jh.RegressionHead(2, objective="absolute_error")
        expected = [np.median(np.repeat(y[:, i], w[:, i])) for i in range(2)]
        np.testing.assert_allclose(head.constant_logits(y, w), expected, rtol=1e-6)
        # Fractions of weights that do not add up exactly: a median between two values stays between them.
        np.testing.assert_allclose(head.constant_logits(y, w * 0.1), expected, rtol=1e-6)
        scaled = jh.RegressionHead(2, objective="absolute_error", label_mean=(50.0, 40.0), label_scale=10.0)
        np.testing.assert_allclose(
            scaled.constant_logits(y, w), (np.array(expected) - [50, 40]) / 10, rtol=1e-5, atol=1e-6
        )
    with pytest.raises(ValueError, match=r"logits \[1\] of 2"):
        jh.RegressionHead(2, objective="absolute_error").constant_logits(y, np.array([[1, 0]] * 40))


def test_other_constants_are_searched():
    """For boosters, which need a start; elsewhere the head says that it knows none."""
    from jaxheads.boosting.starts import find_constants
    from jaxheads.contract import Given
    from jaxheads.engine.gathering import gather

    y = np.array([[1.0], [2], [3], [200]])
    for name in ("log_cosh", "huber"):
        with pytest.raises(ValueError, match="has no best constant logits in closed form"):
            HEADS[name].constant_logits(y)
        batch = jax.tree.map(np.asarray, gather(HEADS[name], Given(y, check=True)))
        grid = np.linspace(0, 10, 100_001)
        best = grid[FORMULAS[name][0](grid[:, None] - y.T).sum(1).argmin()]
        np.testing.assert_allclose(find_constants(HEADS[name], batch), [best], atol=2e-3)


@pytest.mark.parametrize("library", ["xgboost", "lightgbm"])
@pytest.mark.parametrize("name", ["absolute_error", "huber"])
def test_derivatives_for_boosters(name, library):
    """The slope of the loss and a Hessian of the weight; exact ones on request."""
    z, y = np.array([[0.0], [3], [-2]], np.float32), np.array([[0.5], [0], [0]], np.float32)
    weights = np.array([1, 2, 0], np.float32)
    found = jh.boosting.derivatives(HEADS[name], y, z, weights=weights, library=library)
    slope = FORMULAS[name][1]((z - y).astype(float))
    np.testing.assert_allclose(np.concatenate(found, -1), np.concatenate([slope, 1 + 0 * slope], -1) * [[1], [2], [0]])


def test_the_exact_hessian_of_log_cosh():
    z = np.array([[0.0], [1], [-2]], np.float32)
    _, hessian = jh.boosting.derivatives(HEADS["log_cosh"], 0 * z, z)
    np.testing.assert_allclose(hessian, 1 / np.cosh(z.astype(float)) ** 2, rtol=1e-5)


def test_lightgbm_has_the_same_huber():
    """Boosted from the same start: LightGBM's own objective and ours. XGBoost takes ours too."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 3))
    y = x[:, 0] + x[:, 1] ** 2 + rng.standard_t(2, 300)
    given = {"num_threads": 1, "verbosity": -1, "boost_from_average": False, "alpha": 1.5}

    def boost(objective: Any) -> Any:
        data = lightgbm.Dataset(x, y, free_raw_data=False)
        return lightgbm.train({**given, "objective": objective}, data, 8).predict(x, raw_score=True)

    expected = boost("huber")
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(boost(jh.boosting.lightgbm_objective(HEADS["huber"])), expected, atol=1e-5)
    data = xgboost.DMatrix(x, label=y)
    made = xgboost.train({"nthread": 1, "base_score": 0}, data, 8, obj=jh.boosting.xgboost_objective(HEADS["huber"]))
    before, after = (np.mean(scipy.special.huber(1.5, y - p)) for p in (0, made.predict(data)))
    assert after < 0.6 * before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda make: make(objective="mae"), r"one of \('squared_error', .*Given 'mae'"),
        (lambda make: make(objective=None), "Given None"),
        (lambda make: make(objective=jnp.abs), "objective must be one of"),
        (lambda make: make(objective="huber", huber_delta=0), "huber_delta must be a number above 0. Given 0"),
        (lambda make: make(huber_delta=2.0), "huber_delta=2.0 and objective='squared_error'. Leave it out"),
        (
            lambda make: make(objective="huber", loss_fn=lambda labels, logits: labels),
            "both a loss_fn and objective='huber'",
        ),
    ],
)
def test_bad_values_are_told(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(jh.RegressionHead)
    assert len(str(caught.value)) <= 400
