"""Heads on boosted trees. Expected derivatives come from the zoo's float64 oracles, margins from the boosters."""

import dataclasses
import functools
import inspect
import json
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lightgbm
import numpy as np
import pandas as pd
import pytest
import xgboost
import zoo
from benchmarks.boosting import RUNS, TASKS, apart, flights
from scipy.special import expit, log_softmax, softmax
from sklearn.base import clone, is_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    get_scorer,
    log_loss,
    mean_squared_error,
    r2_score,
    roc_auc_score,
)
from sklearn.model_selection import GridSearchCV
from threadpoolctl import threadpool_limits
from xgboost.callback import EarlyStopping
from zoo import ZOO, Entry, marked

import jaxheads as jh
from jaxheads.boosting import evaluation
from jaxheads.boosting.datasets import prepare
from jaxheads.boosting.engines import ENGINES
from jaxheads.engine.reading import directions
from jaxheads.metrics.state import metric_names

N = 12
WEIGHTS = np.resize(np.array([0.5, 2, 1, 0, 0.3, 7], np.float32), N)
WHERE = np.arange(N) % 5 != 1
LIBRARIES = ("xgboost", "lightgbm")
both = pytest.mark.parametrize("library", LIBRARIES)
# What our own code decides for either library alike: quick with one of them.
either = pytest.mark.parametrize("library", ["xgboost", pytest.param("lightgbm", marks=pytest.mark.slow)])
ONE_THREAD: dict[str, Any] = {"n_jobs": 1}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """In datasets and predictions too: of a few hundred rows, threads wait fifty times as long as they work."""
    with threadpool_limits(1, "openmp"):
        yield


def objective(library: str, head: Any, **given: Any) -> Any:
    return getattr(jh.boosting, f"{library}_objective")(head, **given)


def metric(library: str, head: Any, *keys: Any) -> Any:
    return getattr(jh.boosting, f"{library}_metric")(head, *keys)


def dataset(library: str, x: Any, label: Any = None, weight: Any = None) -> Any:
    if library == "xgboost":
        return xgboost.DMatrix(x, label=label, weight=weight)
    return lightgbm.Dataset(x, label, weight=weight, params={"verbosity": -1}).construct()


@functools.cache
def table(n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """A feature matrix and a score that follows from it, but for noise.

    What is boosted or measured has 300 rows, where their number is all the same: another would be another program.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 4))
    return x, x[:, 0] + x[:, 1] * x[:, 2] + 0.3 * rng.normal(size=n)


# Derivatives


def test_pairs_have_no_hessian_of_a_row():
    head, labels = jh.GlobalObjectiveHead(jh.BinaryClassHead(), "roc_auc"), np.array([1, 0, 1, 0])
    logits = np.array([[1.0], [0.5], [-1.0], [0.0]], np.float32)
    for hessian in ("auto", "exact", "gauss_newton"):
        with pytest.raises(ValueError, match=r'no Hessian of a row alone(.|\n)*hessian="unit"'):
            jh.boosting.derivatives(head, labels, logits, hessian=hessian)
    g, h = jax.device_get(jh.boosting.derivatives(head, labels, logits, hessian="unit"))
    # All that a positive is pushed up, the negatives are pushed down.
    np.testing.assert_allclose(g.sum(), 0, atol=1e-6)
    assert (np.sign(g[:, 0]) == [-1, 1, -1, 1]).all()
    np.testing.assert_array_equal(h, 1)


def second_differences(f: Any, z: np.ndarray, e: float = 1e-3) -> np.ndarray:
    out = np.zeros(z.shape)
    for i in np.ndindex(z.shape):
        high, low = z.copy(), z.copy()
        high[i] += e
        low[i] -= e
        out[i] = (f(high) - 2 * f(z) + f(low)) / e**2
    return out


# Of quick ones: one logit, several that depend on each other or not, a dict of labels, heads inside.
QUICK = ("binary", "multi_class", "multi_label", "survival", "multi_head")


@pytest.mark.parametrize("entry", marked((e for e in ZOO if e.name != "roc_auc"), quick=QUICK))
def test_exact_derivatives_are_the_oracles(entry: Entry):
    rng = np.random.default_rng(1)
    labels, logits = entry.labels(rng, (N,)), entry.logits(rng, (N,))
    hidden = (~WHERE | (WEIGHTS == 0))[:, None]
    # A NaN in a hidden row is nobody's business.
    spoiled = np.where(hidden, np.float32(np.nan), logits)
    params = entry.params()
    g, h = jh.boosting.derivatives(
        entry.head, labels, spoiled, weights=WEIGHTS, where=WHERE, params=params, hessian="exact"
    )
    assert g.dtype == h.dtype == jnp.float32
    assert g.shape == h.shape == logits.shape

    def total(z: np.ndarray) -> float:
        return entry.expected_loss(labels, z, WEIGHTS, WHERE, params=params, reduction="sum")

    z = logits.astype(np.float64)
    first = np.zeros(z.shape)
    for i in np.ndindex(z.shape):
        high, low = z.copy(), z.copy()
        high[i] += 1e-5
        low[i] -= 1e-5
        first[i] = (total(high) - total(low)) / 2e-5
    np.testing.assert_allclose(g, first, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(h, second_differences(total, z), rtol=1e-3, atol=2e-4)
    # The floor is for what weighs something, and for nothing else.
    live = np.broadcast_to(~hidden, z.shape)
    assert (np.asarray(g)[~live] == 0).all()
    assert (np.asarray(h)[~live] == 0).all()
    assert (np.asarray(h)[live] > 0).all()


def test_conventions_are_the_libraries():
    rng = np.random.default_rng(2)
    z, w = rng.normal(size=(N, 3)).astype(np.float32), WEIGHTS[:, None].astype(np.float64)
    y, counts = rng.integers(0, 2, (N, 3)), rng.poisson(2.0, (N, 3)).astype(np.float32)
    ids, p, s = rng.integers(0, 3, N), softmax(z.astype(np.float64), -1), expit(z.astype(np.float64))
    hot = np.eye(3)[ids]
    cases: list[tuple[Any, ...]] = [
        (library, *case)
        for library, factor in (("xgboost", 2.0), ("lightgbm", 1.5))
        for case in (
            (jh.RegressionHead(3), counts, z - counts, np.ones((N, 3))),
            (jh.MultiLabelHead(3), y, s - y, s * (1 - s)),
            (jh.PoissonRegressionHead(3), counts, np.exp(z) - counts, np.exp(z.astype(np.float64) + 0.7)),
            (jh.MultiClassHead(3), ids, p - hot, factor * p * (1 - p)),
        )
    ]
    # Whatever the reduction: of the sum. A likelihood of one's own has no convention.
    own = jh.RegressionHead(3, loss_fn=lambda labels, logits: (labels - logits) ** 2, loss_reduction="mean")

    @jax.jit
    def run(z):
        derivatives = jh.boosting.derivatives
        got = [derivatives(head, labels, z, weights=WEIGHTS, library=library) for library, head, labels, *_ in cases]
        small = derivatives(jh.PoissonRegressionHead(3), counts, z, max_delta_step=0.2)
        return got, small, derivatives(own, counts, z)

    found, small, of_own = run(z)
    for got, (library, head, _, g, h) in zip(found, cases, strict=True):
        np.testing.assert_allclose(got[0], w * g, rtol=1e-5, atol=1e-6, err_msg=f"{library} {head!r}")
        np.testing.assert_allclose(got[1], w * h, rtol=1e-5, atol=1e-6, err_msg=f"{library} {head!r}")
    np.testing.assert_allclose(small[1], np.exp(z + 0.2), rtol=1e-5)
    np.testing.assert_allclose(of_own[0], 2 * (z - counts), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(of_own[1], np.full((N, 3), 2))


def test_heads_inside_keep_their_conventions_and_weights():
    heads = [jh.BinaryClassHead(name="late"), jh.RegressionHead(2, name="r"), jh.PoissonRegressionHead(name="none")]
    inner = jh.MultiHead([jh.MultiClassHead(3, name="k"), jh.RegressionHead(name="m")], head_weights=(0.5, 1.0))
    head = jh.MultiHead([*heads, inner], head_weights=(1.0, 3.0, 0.0, 2.0))
    labels: dict[str, Any] = {"late": [1, 0], "r": [[1.0, 2.0], [3.0, np.nan]], "k_m": {"k": [2, 0], "m": [1, 1]}}
    # On the device, where values are not looked at: a weight of 0 hides the head all the same.
    labels["none"] = jax.device_put(np.array([np.nan, 1.0], np.float32))
    where = {"r": [1, 0]}
    z = np.array([[0.0, 1, 1, 5, 0, 0, 1, 3], [1, 1, 1, 5, 1, 0, 0, 4]], np.float32)
    g, h = jh.boosting.derivatives(head, labels, z, where=where)
    s, p = expit(z[:, :1]), softmax(z[:, 4:7], -1)
    expected_g = [s - [[1], [0]], 3 * np.array([[0, -1], [0, 0]]), [[0], [0]], p - np.eye(3)[[2, 0]], [[4], [6]]]
    expected_h = [s * (1 - s), 3 * np.array([[1, 1], [0, 0]]), [[0], [0]], 2 * p * (1 - p), [[2], [2]]]
    np.testing.assert_allclose(g, np.concatenate(expected_g, 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(h, np.concatenate(expected_h, 1), rtol=1e-5, atol=1e-6)
    as_dict = {"late": z[:, :1], "r": z[:, 1:3], "none": z[:, 3:4], "k_m": {"k": z[:, 4:7], "m": z[:, 7:]}}
    np.testing.assert_array_equal(g, jh.boosting.derivatives(head, labels, as_dict, where=where)[0])
    learned = jh.MultiHead(heads[:2], weighting="uncertainty")
    params = {"log_variances": np.array([0.0, 1.0], np.float32)}
    labels = {"late": labels["late"], "r": labels["r"]}
    g, h = jax.device_get(jh.boosting.derivatives(learned, labels, z[:, :3], where={"r": [1, 0]}, params=params))
    np.testing.assert_allclose(g[0], [-0.5, 0, -np.exp(-1)], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(h[0], [0.25, np.exp(-1), np.exp(-1)], rtol=1e-5)


def squared_in_dollars(labels, logits):
    return (jnp.exp(logits) - labels) ** 2


def test_gauss_newton_leaves_out_the_bend_of_the_link():
    head = jh.RegressionHead(loss_fn=squared_in_dollars, inverse_link_fn=jnp.exp)
    z, y = np.array([[1.0], [0.5]], np.float32), np.array([9.0, 0.1], np.float32)
    flat = dataclasses.replace(head, inverse_link_fn=jnp.zeros_like)
    asked = ((head, "exact"), (head, "gauss_newton"), (flat, "gauss_newton"))
    weights = np.array([1, 2], np.float32)

    @jax.jit
    def hessians(z):
        return [jh.boosting.derivatives(one, y, z, weights=weights, hessian=kind)[1] for one, kind in asked]

    of_loss, of_predictions, of_flat = hessians(z)
    m = np.exp(z.astype(np.float64))
    exact = 2 * m**2 + 2 * (m - y[:, None]) * m
    np.testing.assert_allclose(of_loss, np.maximum(exact, 1e-16) * [[1], [2]], rtol=1e-5)
    assert exact[0, 0] < 0
    np.testing.assert_allclose(of_predictions, 2 * m**2 * [[1], [2]], rtol=1e-5)
    assert np.isfinite(of_flat).all()


def test_other_hessians():
    head = jh.BinaryClassHead(loss_fn=zoo.hinge_per_element)
    z = np.array([[0.0], [2.0], [0.5]], np.float32)
    derivatives: Any = functools.partial(jh.boosting.derivatives, head, [1, 1, 0], weights=[1.0, 3.0, 0.0])
    asked = ({"hessian": "unit"}, {"floor": 0.5}, {"hessian": lambda labels, logits: 2 + logits})
    gradient, *hessians = jax.jit(lambda z: [derivatives(z)[0], *(derivatives(z, **given)[1] for given in asked)])(z)
    np.testing.assert_array_equal(gradient, [[-1], [0], [0]])
    np.testing.assert_array_equal(np.concatenate(hessians, -1), [[1, 0.5, 2], [3, 0.5, 12], [0, 0, 0]])
    for given, words in (
        ({"hessian": "fisher"}, "hessian must be one of"),
        ({"library": "catboost"}, "library must be one of"),
        ({"floor": -1}, "floor must be a finite number, not negative. Given -1"),
        ({"max_delta_step": np.inf}, "max_delta_step must be"),
        ({"hessian": lambda labels, logits: logits[0]}, "one number a logit"),
    ):
        with pytest.raises(ValueError, match=words):
            derivatives(z, **given)
    with pytest.raises(ValueError, match="must be numbers in"):
        jh.boosting.derivatives(head, [2, 1, 1], z)
    # Under jit nobody can refuse, but all can see.
    found = jax.jit(lambda y: jh.boosting.derivatives(jh.BinaryClassHead(), y, z))(np.array([2, 1, 0], np.int32))
    bad, *others = np.concatenate(found, -1)
    assert np.isnan(bad).all()
    assert np.isfinite(others).all()


def test_derivatives_are_compiled_once():
    # No `chex.assert_max_traces`: how often one program traces a loss is the library's affair.
    traces = []

    def loss_fn(labels, logits):
        traces.append(1)
        return (labels - logits) ** 2

    head, z = jh.RegressionHead(loss_fn=loss_fn), np.zeros((3, 1), np.float32)
    jh.boosting.derivatives(head, [1.0, 2.0, 3.0], z)
    first = len(traces)
    jh.boosting.derivatives(dataclasses.replace(head), [3.0, 2.0, 3.0], z + 1)
    ours = objective("xgboost", head)
    for _ in range(3):
        ours(z[:, 0], xgboost.DMatrix(z, label=[1.0, 2.0, 3.0]))
    assert len(traces) <= 2 * first


# Objectives


# XGBoost 3.4 changed what `max_delta_step` does beside `min_child_weight`: training by either objective must follow it.
LIMITED: dict[str, Any] = {"max_delta_step": 0.5, "min_child_weight": 20}


@pytest.mark.parametrize(
    ("task", "weighted", "limited", "library"),
    [
        *(
            pytest.param(task, weighted, False, library, marks=[] if weighted or task == "binary" else pytest.mark.slow)
            for task in TASKS
            for weighted in (False, True)
            for library in LIBRARIES
        ),
        ("binary", False, True, "xgboost"),
        ("poisson", True, True, "xgboost"),
    ],
)
def test_margins_are_those_of_the_built_in_objective(task, weighted, limited, library):
    data, given = flights(3000), LIMITED if limited else {}
    if limited and task == "poisson":  # its Hessian knows the limit of steps
        given = given | {"objective": objective(library, TASKS[task].head, max_delta_step=given["max_delta_step"])}
    built_in, ours = RUNS[library](TASKS[task], data, data["weight"] if weighted else None, 8, nthread=1, **given)
    expected, got = built_in(), ours()
    assert np.abs(expected - expected[:1]).max() > 0.1
    assert apart(expected, got) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "task"),
    [("xgboost", "binary"), ("lightgbm", "binary"), ("xgboost", "poisson"), ("lightgbm", "classes")],
)
def test_margins_of_all_flights_are_those_of_the_built_in_objective(library, task):
    """Weighted; without weights, and of further tasks, on the flights of the test above, it is the same code."""
    data = flights()
    built_in, ours = RUNS[library](TASKS[task], data, data["weight"], 20)
    assert apart(built_in(), ours()) <= 1e-6


@both
def test_objectives_read_datasets_and_scikit_learns_arguments(library):
    y, w = np.array([1.0, 0, 1], np.float32), np.array([1.0, 2, 0.5], np.float32)
    z = np.array([0.3, -1, 2])
    p = expit(z)
    ours = objective(library, jh.BinaryClassHead())
    for weights in (w, None):
        k = 1 if weights is None else w
        for g, h in (ours(z, dataset(library, z[:, None], y, weights)), ours(y, z, weights)):
            assert g.dtype == h.dtype == np.float32
            np.testing.assert_allclose(g, (p - y) * k, rtol=1e-5)
            np.testing.assert_allclose(h, p * (1 - p) * k, rtol=1e-5)
    # Other labels are other labels, whatever was prepared before.
    np.testing.assert_allclose(ours(1 - y, z, w)[0], (p - 1 + y) * w, rtol=1e-5)
    before, w = y.copy(), w.copy()
    y[0] = 0
    np.testing.assert_allclose(ours(y, z, w)[0][0], p[0] * w[0], rtol=1e-5)
    # Nor is what was prepared a view of memory that others write to.
    np.testing.assert_allclose(ours(before, z, w)[0], (p - before) * w, rtol=1e-5)
    y[:] = 0
    np.testing.assert_allclose(ours(np.array([0.0, 0, 1], np.float32), z, w)[0], (p - [0, 0, 1]) * w, rtol=1e-5)


@both
def test_objectives_and_metrics_pickle(library):
    head = jh.RegressionHead(loss_fn=squared_in_dollars)
    for made in (objective(library, head), metric(library, head, "average_loss")):
        z, y = np.array([0.1, 0.2]), np.array([1.0, 2.0])
        before = made(y, z)
        again = pickle.loads(pickle.dumps(made))
        assert again == made
        assert hash(again) == hash(made)
        np.testing.assert_array_equal(np.asarray(again(y, z), object), np.asarray(before, object))
    assert len(pickle.dumps(made)) < 2000
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(objective(library, jh.RegressionHead(loss_fn=lambda labels, logits: labels - logits)))


@both
def test_several_logits_and_attached_labels(library):
    x, s = table()
    head = jh.MultiHead([jh.BinaryClassHead(name="a"), jh.RegressionHead(2, name="b")])
    labels = {"a": (s > 0).astype(int), "b": np.stack([s, np.where(s > 1, np.nan, -s)], 1)}
    where = {"b": s <= 1}
    data = dataset(library, x, np.zeros(len(x)))
    assert jh.boosting.with_labels(data, labels, where) is data
    z = np.random.default_rng(0).normal(size=(len(x), 3))
    margins = np.asfortranarray(z) if library == "lightgbm" else z.astype(np.float32)
    g, h = objective(library, head)(margins, data)
    p = expit(z[:, 0])
    np.testing.assert_allclose(g[:, 0], p - labels["a"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(g[:, 1:], np.where((s <= 1)[:, None], z[:, 1:] - labels["b"], 0), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(h[:, 1], s <= 1)
    found = {name: value for name, value, *_ in metric(library, head, ("auc/a", "average_loss/b"))(margins, data)}
    live = s <= 1
    expected = mean_squared_error(labels["b"][live], z[live, 1:])
    np.testing.assert_allclose(found["average_loss/b"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["auc/a"], roc_auc_score(labels["a"], z[:, 0]), atol=2e-3)


def test_several_columns_of_a_dmatrix():
    y = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    z = np.array([[0.5, 1], [0, 0], [2, -1]], np.float32)
    g, _ = objective("xgboost", jh.MultiLabelHead(2))(z, xgboost.DMatrix(z, label=y))
    np.testing.assert_allclose(g, expit(z) - y, rtol=1e-5)


@both
def test_what_a_dataset_cannot_give_is_refused(library):
    survival = next(entry.head for entry in ZOO if entry.name == "survival")
    ordinal = next(entry for entry in ZOO if entry.name == "ordinal")
    z = np.zeros(3, np.float32)
    for made in (objective, metric):
        for head, words in (
            (jh.BinaryClassHead(weight_column="w"), "dataset holds the weights.*'w'"),
            (jh.RegressionHead(loss_fn=lambda labels, logits, features: logits), "no features, which a loss_fn"),
            (jh.SequentialHeadWrapper(jh.BinaryClassHead()), "use its inner head"),
            (ordinal.head, "learned or running fields without values"),
            (jh.MultiHead([jh.BinaryClassHead("w", name="a")]), "dataset holds the weights"),
            ("head", "head must be a head"),
        ):
            with pytest.raises(ValueError, match=words):
                made(library, head)
    for head in (jh.BinaryClassHead(slices=jh.Slices("x", 2)), jh.BinaryClassHead(bootstrap=jh.Bootstrap(3))):
        objective(library, head)
        with pytest.raises(ValueError, match="no slices and no bootstrap"):
            metric(library, head)
    with pytest.raises(ValueError, match="with_labels"):
        objective(library, survival)(z, dataset(library, z[:, None], z))
    with pytest.raises(ValueError, match=r"0 labels for 3 margins\. Give the dataset its labels"):
        objective(library, jh.BinaryClassHead())(np.zeros(0), z)
    with pytest.raises(ValueError, match=r"Given 0\.5"):
        objective(library, jh.MultiClassHead(3))(np.array([0.5, 1, 2]), np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"must give 3 margins a row.*Given shape \(3,\)"):
        objective(library, jh.MultiClassHead(3))(np.array([0, 1, 2]), z)
    with pytest.raises(ValueError, match="3 labels for 2 margins"):
        objective(library, jh.BinaryClassHead())(z, z[:2])
    with pytest.raises(ValueError, match="numbers in"):
        objective(library, jh.BinaryClassHead())(z + 3, z)
    with pytest.raises(ValueError, match=r"no finite derivatives in 1 places, the first at row 1, logit 0.*margin 100"):
        objective(library, jh.PoissonRegressionHead())(z, np.array([0.0, 100, 1]))
    with pytest.raises(ValueError, match="needs labels"):
        jh.boosting.with_labels(dataset(library, z[:, None], z), None)
    with pytest.raises(ValueError, match="Unknown metrics"):
        metric(library, jh.BinaryClassHead(), "area")
    with pytest.raises(ValueError, match="at least one"):
        metric(library, jh.BinaryClassHead(), ())


@either
def test_a_worker_without_rows_takes_part(library):
    head, nothing = jh.MultiClassHead(3), np.zeros((0, 3))
    assert [part.size for part in objective(library, head)(np.zeros(0), nothing)] == [0, 0]
    metric(library, head, "average_loss")(np.zeros(0), nothing)


@either
def test_an_objective_takes_the_values_of_learned_fields(library):
    head, cuts, z = next(entry.head for entry in ZOO if entry.name == "ordinal"), np.array([-2.0, 0, 1]), np.zeros(3)
    g, _ = objective(library, head, params={"cuts": cuts.astype(np.float32)})(np.array([0, 1, 3]), z)
    # The slopes of -ln F(c0 - z), -ln(F(c1 - z) - F(c0 - z)) and -ln(1 - F(c2 - z)) at 0, F the logistic function.
    f = expit(cuts)
    np.testing.assert_allclose(g, [1 - f[0], 1 - f[0] - f[1], -f[2]], rtol=1e-6)


# Metrics


@both
def test_metrics_of_a_log_are_exact(library, monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK", 75)
    x, s = table()
    y, w = (s > 0.4).astype(np.float32), 1 + np.arange(300, dtype=np.float32) % 3
    head = jh.BinaryClassHead().with_metrics(jh.metrics.AveragePrecision())
    log = metric(library, head)(x[:, 0], dataset(library, x, y, w))
    found = {name: value for name, value, *_ in log}
    assert found.keys() >= {"average_loss", "accuracy", "auc", "average_precision"}
    np.testing.assert_allclose(found["average_loss"], log_loss(y, expit(x[:, 0]), sample_weight=w), rtol=1e-6)
    np.testing.assert_allclose(found["accuracy"], np.average((x[:, 0] > 0) == y, weights=w), rtol=1e-6)
    np.testing.assert_allclose(found["auc"], roc_auc_score(y, x[:, 0], sample_weight=w), atol=2e-3)
    exact = average_precision_score(y, x[:, 0], sample_weight=w)
    np.testing.assert_allclose(found["average_precision"], exact, atol=5e-3)
    one = metric(library, head, "accuracy")(y, x[:, 0], w)
    assert (one if library == "xgboost" else one[0][1]) == found["accuracy"]
    if library == "lightgbm":
        directions = {name: higher for name, _, higher in log}
        assert directions["auc"]
        assert directions["average_precision"]
        assert not directions["average_loss"]


def test_counts_of_a_log_do_not_stop(monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK", 3)
    # In float32 2^24 + 1 is 2^24, so the eleven would vanish.
    y, w = np.array([1.0, 0, 0] + 11 * [1]), np.array([2.0**24, 0, 0] + 11 * [1])
    ((_, value, _),) = metric("lightgbm", jh.BinaryClassHead(), "recall")(y, np.array([1.0, 0, 0] + 11 * [-1]), w)
    assert abs(value - 2**24 / (2**24 + 11)) < 1e-9 + 6e-8
    rows = prepare(jh.BinaryClassHead(), np.float32(y), np.float32(w))
    found = evaluation.measure_rows(jh.BinaryClassHead(), None, rows, np.ones((14, 1), np.float32))
    assert 2**24 + 11 in np.asarray(found.state, np.float64).sum(-1)


def test_directions_are_what_metrics_say():
    m = jh.metrics
    binary = jh.BinaryClassHead(thresholds=(0.3,), name="late").with_metrics(
        m.BestThreshold(), m.BestThreshold(cost_false_positive=1.0, cost_false_negative=2.0), m.LogLoss(),
        m.BrierScore(), m.BaseRate(), m.ExpectedCalibrationError(), my_own=lambda y, z: z,
    )  # fmt: skip
    classes = jh.MultiClassHead(6).with_metrics(
        m.TopKAccuracy(5), m.OneVsRestAuc(average="macro"), m.CohenKappa(), m.MeanIoU(), m.Perplexity(),
        m.IoU(average="weighted"), m.Recall(average=None), m.Support(),
    )  # fmt: skip
    both = jh.MultiHead([binary, jh.RegressionHead(name="minutes").with_metrics(m.R2Score())])
    rate = jh.GlobalObjectiveHead(jh.BinaryClassHead(), "fpr_at_tpr", 0.9, label_priors=0.5)
    for head, higher, lower, neither in (
        (
            both,
            "auc/late auc_precision_recall/late accuracy/positive_threshold_0.3/late best_f1/late r2_score/minutes",
            "average_loss/late loss/late loss/minutes log_loss/late brier_score/late lowest_cost/late "
            "expected_calibration_error/late",
            "label/mean/late accuracy_baseline/late best_f1_threshold/late lowest_cost_logit/late base_rate/late "
            "my_own/late prediction/mean/minutes",
        ),
        (
            classes,
            "accuracy top_5_accuracy auc_ovr_macro cohen_kappa mean_iou iou_weighted recall/class1",
            "average_loss perplexity",
            "support/class1",
        ),
        (rate, "auc", "fpr_at_tpr_0.9 objective constraint_violation", "fpr_at_tpr_0.9_threshold"),
    ):
        found = directions(head)
        assert set(found) == set(metric_names(head))
        for keys, direction in ((higher, True), (lower, False), (neither, None)):
            assert {key: found[key] for key in keys.split()} == dict.fromkeys(keys.split(), direction)


def test_probabilities_are_refused_where_they_can_be_told():
    y = np.array([0, 1, 2, 1])
    z = np.random.default_rng(0).normal(size=(4, 3))
    made = metric("lightgbm", jh.MultiClassHead(3), "average_loss")
    ((_, value, _),) = made(y, log_softmax(z, -1))
    np.testing.assert_allclose(value, log_loss(y, softmax(z, -1)), rtol=1e-5)
    with pytest.raises(ValueError, match="handed probabilities to the metric"):
        made(y, softmax(z, -1))
    # All-equal margins of a first round may add up to 1.
    assert np.isfinite(made(y, np.full((4, 3), 1 / 3))[0][1])
    for head, y in ((jh.BinaryClassHead(), np.arange(300.0) % 2), (jh.MultiLabelHead(2), np.array([[0, 1]] * 3))):
        p = np.linspace(0.1, 0.9, y.size).reshape(y.shape)
        with pytest.warns(UserWarning, match=rf"metrics of {type(head).__name__} are in \[0, 1\]"):
            metric("xgboost", head, "average_loss")(y, p)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for z in (p - 0.2, 2 * p, 0 * p + 0.3):
                metric("xgboost", head, "average_loss")(y, z)
    data, log = dataset("xgboost", *(a.astype(np.float32) for a in (table()[0], table()[1] > 0))), {}
    given = {"custom_metric": metric("xgboost", jh.BinaryClassHead()), "evals_result": log, "verbose_eval": False}
    with pytest.warns(UserWarning, match="are in"):
        xgboost.train({"objective": "binary:logistic"}, data, 1, evals=[(data, "train")], **given)


@both
def test_scikit_learns_wrappers_take_both(library):
    x, s = table()
    y, w = (s > 0).astype(int), 1 + np.arange(300) % 2
    head = jh.BinaryClassHead()
    ours, key = objective(library, head), metric(library, head, "average_loss")
    if library == "xgboost":
        given = {"n_estimators": 5, "base_score": 0.0, "max_depth": 3, "n_jobs": 1}
        model = xgboost.XGBRegressor(objective=ours, eval_metric=key, **given)
        model.fit(x, y, sample_weight=w, eval_set=[(x, y)], sample_weight_eval_set=[w], verbose=False)
        log, margins = model.evals_result()["validation_0"], model.predict(x)
        native = xgboost.train(
            {"base_score": 0, "max_depth": 3, "nthread": 1}, xgboost.QuantileDMatrix(x, label=y, weight=w), 5, obj=ours
        )
        expected = native.predict(xgboost.DMatrix(x), output_margin=True)
        with pytest.raises(ValueError, match="log one number"):
            metric(library, head, ("auc", "accuracy"))(y, margins)
    else:
        model = lightgbm.LGBMRegressor(objective=ours, n_estimators=5, n_jobs=1, verbosity=-1)
        # LightGBM 4.7 deprecates the name that 4.6 has.
        has_new_names = "eval_X" in inspect.signature(model.fit).parameters
        rows: dict[str, Any] = {"eval_X": x, "eval_y": y} if has_new_names else {"eval_set": [(x, y)]}
        model.fit(x, y, sample_weight=w, **rows, eval_sample_weight=[w], eval_metric=key)
        (log,), margins = model.evals_result_.values(), np.asarray(model.predict(x))
        params = {"objective": ours, "num_threads": 1, "verbosity": -1}
        expected = np.asarray(lightgbm.train(params, lightgbm.Dataset(x, y, weight=w), 5).predict(x))
    np.testing.assert_allclose(margins, expected, atol=1e-6)
    np.testing.assert_allclose(log["average_loss"][-1], log_loss(y, expit(margins), sample_weight=w), atol=1e-6)


@pytest.mark.parametrize("given", [{}, {"base_score": 0.5}])
def test_xgboosts_classifier_keeps_its_link_and_stops_by_the_metric(given):
    x, s = table(600)
    y = (s + 2 * np.random.default_rng(1).normal(size=600) > 1).astype(int)
    head = jh.BinaryClassHead()
    model = xgboost.XGBClassifier(
        objective=objective("xgboost", head), eval_metric=metric("xgboost", head, "average_loss"), n_jobs=1,
        early_stopping_rounds=4, n_estimators=60, **given,
    )  # fmt: skip
    model.fit(x[:300], y[:300], eval_set=[(x[300:], y[300:])], verbose=False)
    log = model.evals_result()["validation_0"]["average_loss"]
    assert len(log) == model.best_iteration + 5
    np.testing.assert_allclose(min(log), log_loss(y[300:], model.predict_proba(x[300:])), atol=1e-6)
    # From a margin of 0, as natively.
    native = xgboost.train(
        {"base_score": 0, "nthread": 1}, xgboost.QuantileDMatrix(x[:300], label=y[:300]), 3,
        obj=objective("xgboost", head),
    )  # fmt: skip
    expected = native.predict(xgboost.DMatrix(x), output_margin=True)
    np.testing.assert_allclose(model.predict(x, output_margin=True, iteration_range=(0, 3)), expected, atol=1e-6)


def test_names_with_spaces_stay_whole_in_xgboosts_log():
    x, s = table()
    y = np.stack([s > 0, s < 1, s > 1], 1)
    names = ("no sun", "sea: calm", "sea_calm")
    head = jh.MultiLabelHead(3, label_vocabulary=names, classes_for_class_based_metrics=names)
    log: Any = {}
    data = dataset("xgboost", x, y)
    params = {"num_target": 3, "base_score": 0, "disable_default_eval_metric": True}
    given = {"obj": objective("xgboost", head), "custom_metric": metric("xgboost", head), "verbose_eval": False}
    xgboost.train(params, data, 2, evals=[(data, "train")], evals_result=log, **given)
    assert {"auc/no_sun", "auc/sea_calm", "auc/sea_calm_"} <= log["train"].keys()
    assert {len(values) for values in log["train"].values()} == {2}
    model = boosted(head, n_estimators=2, init_score=0.0).fit(x, y, eval_set=[(x, y)])
    ours = model.evals_result_["validation_0"]
    assert set(ours) == set(evaluation.list_numbers(head))
    p = model.predict_proba(x)
    for i, name in enumerate(names):
        np.testing.assert_allclose(ours[f"auc/{name}"][-1], roc_auc_score(y[:, i], p[:, i]), atol=2e-3)


WORKER = """
import json, sys
import numpy as np, xgboost
from xgboost import collective
import jaxheads as jh
rank, arguments = int(sys.argv[1]), json.loads(sys.argv[2])
x = np.random.default_rng(0).normal(size=(301, 3))
y = (x[:, 0] + x[:, 1] > 0.5).astype(np.float32)
rows = slice(0, 40) if rank == 0 else slice(40, None)
head = jh.BinaryClassHead()
with collective.CommunicatorContext(**arguments, dmlc_task_id=str(rank)):
    data, log = xgboost.DMatrix(x[rows], label=y[rows]), {}
    booster = xgboost.train(
        {"base_score": 0, "nthread": 1, "disable_default_eval_metric": True}, data, 3, evals=[(data, "train")],
        obj=jh.boosting.xgboost_objective(head), custom_metric=jh.boosting.xgboost_metric(head),
        evals_result=log, verbose_eval=False)
    # Not inside rank 0 alone: prediction needs no one else.
    margins = booster.predict(xgboost.DMatrix(x), output_margin=True)
if rank == 0:
    print(json.dumps([log["train"], head.measure(y, margins[:, None]).compute()["auc"].item()]))
"""


@pytest.mark.slow
def test_metrics_of_two_workers_are_those_of_all_rows(tmp_path):
    from xgboost.tracker import RabitTracker

    tracker = RabitTracker(host_ip="127.0.0.1", n_workers=2)
    tracker.start()
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    arguments = json.dumps(tracker.worker_args())
    root = str(Path(jh.__file__).parents[1])
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": root},
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in started]
    assert all(process.returncode == 0 for process in started), outputs
    log, auc = json.loads(outputs[0][0].splitlines()[-1])
    # Six decimals in the log; the mean of the workers' own areas would be another number.
    assert abs(log["auc"][-1] - auc) < 2e-6


# The estimator


def boosted(head: jh.Head, booster: str = "xgboost", **params: Any) -> Any:
    small = {"min_data_in_leaf": 5} if booster == "lightgbm" else {}
    return jh.boosting.BoostedHead(head, booster, **{"n_estimators": 20, **ONE_THREAD, **small, **params})


ALWAYS = {
    "check_no_attributes_set_in_init": "the booster's parameters stand beside our own, as in XGBoost's estimators",
}
# Asked for to 1e-7, beyond float32: whether it holds depends on the loss.
WEIGHTS_REPEAT = (
    "sums in float32 round in another order, and LightGBM counts rows in bins and leaves, not their weights"
)
REASONS = {
    **ALWAYS,
    "check_sample_weight_equivalence_on_dense_data": WEIGHTS_REPEAT,
    "check_sample_weight_equivalence_on_sparse_data": WEIGHTS_REPEAT,
}


@pytest.mark.slow
@both
@pytest.mark.parametrize("head", [jh.BinaryClassHead(), jh.PoissonRegressionHead()], ids=repr)
def test_scikit_learns_own_checks(library, head):
    from sklearn.utils.estimator_checks import check_estimator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Some checks have ten rows.
        model = boosted(head, library, **({"min_data_in_leaf": 1} if library == "lightgbm" else {}))
        found = check_estimator(model, expected_failed_checks=REASONS, on_fail="raise")
    assert len(found) > 50
    failed = {check["check_name"] for check in found if check["status"] == "xfail"}
    assert set(ALWAYS) <= failed <= set(REASONS)


@either
def test_classes_of_any_kind(library):
    x, s = table()
    three = np.digitize(s, (-0.7, 0.7))
    names = np.array(["bee", "ant", "cat"])
    fast = {"n_estimators": 5, "learning_rate": 0.8, "init_score": 0.0}
    for head, y, classes in (
        (jh.BinaryClassHead(), np.where(s > 0, "yes", "no"), ["no", "yes"]),
        (jh.BinaryClassHead(), np.where(s > 0, 1, -1), [-1, 1]),
        (jh.BinaryClassHead(), s > 0, [False, True]),
        (jh.BinaryClassHead(label_vocabulary=("yes", "no")), np.where(s > 0, "yes", "no"), ["no", "yes"]),
        (jh.MultiClassHead(3), names[three], ["ant", "bee", "cat"]),
        (jh.MultiClassHead(3, label_vocabulary=tuple(names)), names[three], sorted(names)),
        # Ids and truth values stay what they are, whatever they are called.
        (jh.BinaryClassHead(label_vocabulary=("yes", "no")), (s > 0).astype(int), [0, 1]),
        (jh.BinaryClassHead(label_vocabulary=("yes", "no")), s > 0, [False, True]),
        (jh.MultiClassHead(3, label_vocabulary=tuple(names)), three, [0, 1, 2]),
        (jh.MultiClassHead(3, label_vocabulary=tuple(names)), three * 1.0, [0, 1, 2]),
        (jh.MultiClassHead(3), three + 5.0, [5, 6, 7]),
        (jh.MultiClassHead(3), (s > 0).astype(int), [0, 1, 2]),
        (jh.MultiClassHead(3), (s > 0) * 1.0, [0, 1, 2]),
        (jh.BinaryClassHead(), np.zeros(300), [0, 1]),
        (jh.GlobalObjectiveHead(jh.BinaryClassHead(), "roc_auc"), np.where(s > 0, "yes", "no"), ["no", "yes"]),
    ):
        unit = {"hessian": "unit"} if isinstance(head, jh.GlobalObjectiveHead) else {}
        model = boosted(head, library, **fast, **unit).fit(x, y)
        predicted = model.predict(x)
        assert is_classifier(model)
        assert model.classes_.tolist() == classes
        assert predicted.dtype == model.classes_.dtype
        p = model.predict_proba(x)
        np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)
        assert (model.classes_[p.argmax(-1)] == predicted).all()
        assert model.score(x, y) == accuracy_score(y, predicted) > 0.85
        assert model.predictions(x, "logits").keys() == {"logits"}
        # Scorers of scikit-learn go by the order of classes.
        decided = model.decision_function(x)
        chosen = decided.argmax(-1) if decided.ndim == 2 else (decided > 0).astype(int)
        assert (model.classes_[chosen] == predicted).all()
        assert decided.shape == ((300,) if len(classes) == 2 else (300, len(classes)))
    with pytest.raises(ValueError, match="Given labels of 2 classes"):
        boosted(jh.MultiClassHead(3), library).fit(x, np.where(s > 0, "a", "b"))
    model = boosted(jh.MultiClassHead(3), library, n_estimators=1, init_score=0.0).fit(x, three + 5.0)
    with pytest.raises(ValueError, match=r"not there in fit: \[9\.0\]"):
        model.measure(x, three * 0 + 9.0)
    with pytest.raises(ValueError, match=r"not there in fit: \['b'\]\. The classes are \[5\.0, 6\.0, 7\.0\]"):
        model.score(x, np.full(300, "b"))
    # By ids or by names, in fit and later.
    named = jh.BinaryClassHead(label_vocabulary=("yes", "no"))
    texts, ids = np.where(s > 0, "yes", "no"), np.where(s > 0, 0, 1)
    soft = 0.1 + 0.8 * ids
    for y, *others in ((texts, ids, soft), (ids, texts, soft), (ids.astype(object), texts), (soft, ids, texts)):
        model = boosted(named, library, n_estimators=3, init_score=0.0)
        model.fit(x, y, eval_set=[(x, other) for other in others])
        assert model.score(x, texts) == model.score(x, ids) > 0.85
        np.testing.assert_allclose(model.score(x, soft), 0.1 + 0.8 * model.score(x, ids), rtol=1e-6)
        assert model.classes_.tolist() == (["no", "yes"] if y is texts or y is soft else [0, 1])
    with pytest.raises(ValueError, match="Given labels of 1 classes"):
        model.set_params(head=jh.BinaryClassHead()).fit(x, np.full(300, "a"))
    assert model.classes_.tolist() == ["no", "yes"]  # as the booster that is there
    assert "classes_" not in vars(model.set_params(head=jh.RegressionHead()).fit(x, s))


class Grades(jh.Head):
    """A head of the user's own with probabilities."""

    logits_dimension = 3

    @property
    def label_spec(self):
        return jh.LabelSpec(1, "int", 0, 2)

    def losses(self, labels, logits):
        return jh.MultiClassHead(3).losses(labels, logits)

    def outputs(self, logits):
        found = jh.MultiClassHead(3).outputs(logits)
        return {key: found[key] for key in ("probabilities", "class_ids")}


def test_heads_of_ones_own_have_their_own_order():
    x, s = table()
    three, names = np.digitize(s, (-0.7, 0.7)), ("bee", "ant", "cat")
    model = boosted(jh.MultiClassHead(3, label_vocabulary=names), n_estimators=5, learning_rate=0.8, init_score=0.0)
    model.fit(x, np.array(names)[three]).set_params(head=Grades()).fit(x, three)
    assert (model.predict_proba(x).argmax(1) == model.predict(x)).all()
    assert (model.predict(x) == three).mean() > 0.85


@either
def test_labels_that_are_not_there_may_be_anything(library):
    x, s = table()
    there = np.arange(300) % 3 > 0
    y = np.where(s > 0, "yes", "no").astype(object)
    expected = boosted(jh.BinaryClassHead(), library, n_estimators=3).fit(x, y, where=there)
    for nothing, dtype in ((None, object), (np.nan, object), (pd.NA, "string"), (None, "category")):
        masked = pd.Series([label if known else nothing for label, known in zip(y, there, strict=True)], dtype=dtype)
        model = boosted(jh.BinaryClassHead(), library, n_estimators=3).fit(x, masked, where=there)
        np.testing.assert_array_equal(model.predict_logits(x), expected.predict_logits(x))
        assert model.score(x, masked, where=there) == expected.score(x, y, where=there)
    truth = [bool(late) if known else None for late, known in zip(s > 0, there, strict=True)]
    model = boosted(jh.BinaryClassHead(), library, n_estimators=3).fit(x, truth, where=there)
    np.testing.assert_array_equal(model.predict_logits(x), expected.predict_logits(x))
    assert model.classes_.tolist() == [False, True]


@either
def test_scorers_of_scikit_learn_are_right_whatever_the_order_of_a_vocabulary(library):
    x, s = table(600)
    half, three = slice(300), np.digitize(s, (-0.7, 0.7))
    for vocabulary, ids in ((("yes", "no"), s < 0), (("no", "yes"), s > 0), (("bee", "ant", "cat"), three)):
        two, y = len(vocabulary) == 2, np.asarray(vocabulary)[ids.astype(int)]
        head = jh.BinaryClassHead if two else functools.partial(jh.MultiClassHead, 3)
        model = boosted(head(label_vocabulary=vocabulary), library, n_estimators=5).fit(x[half], y[half])
        own = model.predictions(x[half], "probabilities")["probabilities"][np.arange(300), ids[half].astype(int)]
        np.testing.assert_allclose(get_scorer("neg_log_loss")(model, x[half], y[half]), np.log(own).mean(), rtol=1e-5)
        if two:
            sign = 1 if vocabulary[1] == "yes" else -1
            expected = roc_auc_score(y[half] == "yes", sign * model.predict_logits(x[half])[:, 0])
            assert get_scorer("roc_auc")(model, x[half], y[half]) == expected > 0.8
            # Trained on either half.
            assert CalibratedClassifierCV(model, cv=2).fit(x, y).score(x, y) > 0.8


@either
def test_scores_leave_out_what_is_masked_and_count_shares(library):
    x, s = table()
    there, weights = np.arange(300) % 3 > 0, np.resize([1.0, 2, 0.5], 300)
    some, given = {"sample_weight": weights, "where": there}, {"n_estimators": 3, "init_score": 0.0}
    y = np.where(there, s > 0, np.nan)
    model = boosted(jh.BinaryClassHead(name="late"), library, **given).fit(x, y, **some)
    right = (model.predict(x) == (s > 0))[there]
    np.testing.assert_allclose(model.score(x, y, **some), np.average(right, weights=weights[there]), rtol=1e-12)
    line = boosted(jh.RegressionHead(), library, **given).fit(x, s)
    expected = r2_score(s[there], line.predict(x)[there], sample_weight=weights[there])
    np.testing.assert_allclose(line.score(x, np.where(there, s, np.nan), **some), expected, rtol=1e-12)
    share = expit(2 * s)
    soft = boosted(jh.BinaryClassHead(), library, **given).fit(x, share)
    expected = np.where(soft.predict(x) == 1, share, 1 - share).mean()
    np.testing.assert_allclose(soft.score(x, share), expected, rtol=1e-6)
    for each_one, labels in ((model, y), (line, s)):
        for nothing in ({"where": np.zeros(300, bool)}, {"sample_weight": np.zeros(300)}):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert np.isnan(each_one.score(x, s > 0 if each_one is model else labels, **nothing))
    shares = np.stack([share, 1 - share], 1)
    several = boosted(jh.MultiLabelHead(2), library, **given).fit(x, shares)
    decided = several.predict_logits(x) > 0
    expected = np.where(decided, shares, 1 - shares).prod(1).mean()
    np.testing.assert_allclose(several.score(x, shares), expected, rtol=1e-6)
    expected = (decided == (shares > 0.5)).all(1).mean()
    assert several.score(x, shares > 0.5) == expected
    two = jh.MultiHead([jh.BinaryClassHead(name="a"), jh.RegressionHead(name="b")])
    masked = {"a": (s > 0).astype(int), "b": np.where(there, s, np.nan)}
    model = boosted(two, library, **given).fit(x, masked, where={"b": there})
    z = model.predict_logits(x).astype(np.float64)
    expected = log_loss(s > 0, expit(z[:, 0])) + ((z[:, 1] - s)[there] ** 2).sum() / there.sum()
    np.testing.assert_allclose(model.score(x, masked, where={"b": there}), -expected, rtol=1e-5)


@both
def test_rows_without_a_label_are_absent(library):
    x, s = table()
    there = np.arange(300) % 3 > 0
    y = np.where(there, s > 0, np.nan)
    given = {"learning_rate": 0.3, "n_estimators": 5}
    model = boosted(jh.BinaryClassHead(), library, **given).fit(x, y, where=there)
    assert model.classes_.tolist() == [0, 1]
    rate = (s > 0)[there].mean()
    np.testing.assert_allclose(model.init_logits_, [np.log(rate / (1 - rate))], rtol=1e-5, atol=1e-6)
    alone = boosted(jh.BinaryClassHead(), library, **given).fit(x[there], s[there] > 0)
    np.testing.assert_array_equal(model.predict_logits(x), alone.predict_logits(x))
    assert log_loss((s > 0)[there], model.predict_proba(x[there])) < 0.4
    values = model.measure(x, y, where=there).compute()
    np.testing.assert_allclose(values["label/mean"], rate, rtol=1e-6)
    with pytest.raises(ValueError, match="contains NaN"):
        boosted(jh.BinaryClassHead(), library).fit(x, y)


@both
def test_an_estimator_is_the_native_booster_on_the_same_head(library):
    x, s = table()
    y, w = (s > 0.5).astype(int), (1 + np.arange(300) % 3).astype(np.float32)
    model = boosted(jh.BinaryClassHead(), library, n_estimators=10, learning_rate=0.2).fit(x, y, w)
    rate = np.average(y, weights=w)
    np.testing.assert_allclose(model.init_logits_, [np.log(rate / (1 - rate))], rtol=1e-6)
    if library == "xgboost":
        data = xgboost.QuantileDMatrix(x, label=y, weight=w)
        params = {"objective": "binary:logistic", "base_score": rate, "learning_rate": 0.2, "nthread": 1}
        expected = xgboost.train(params, data, 10).predict(xgboost.DMatrix(x), output_margin=True)
    else:
        params = {"objective": "binary", "learning_rate": 0.2, "min_data_in_leaf": 5, "num_threads": 1, "verbosity": -1}
        expected = lightgbm.train(params, lightgbm.Dataset(x, y, weight=w), 10).predict(x, raw_score=True)
    np.testing.assert_allclose(model.decision_function(x), np.asarray(expected), atol=2e-6)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict_proba(x), model.predict_proba(x))
    assert model.feature_importances_.shape == (4,)
    np.testing.assert_allclose(model.feature_importances_.sum(), 1, rtol=1e-6)
    assert model.feature_importances_.argmin() == 3
    values = model.measure(x, y, w).compute()
    np.testing.assert_allclose(values["average_loss"], log_loss(y, model.predict_proba(x), sample_weight=w), rtol=1e-5)


@both
def test_regression_of_several_numbers_and_tags(library):
    x, s = table()
    y = np.stack([s, x[:, 3]], 1)
    model = boosted(jh.RegressionHead(2), library, n_estimators=10, learning_rate=0.5).fit(x, y)
    assert model.predict(x).shape == (300, 2)
    np.testing.assert_allclose(model.init_logits_, y.mean(0), rtol=1e-5, atol=1e-6)
    assert model.score(x, y) > 0.9
    np.testing.assert_allclose(model.score(x, y), r2_score(y, model.predict(x)))
    tags = boosted(jh.MultiLabelHead(2), library, n_estimators=10, init_score=0.0).fit(x, y > 0)
    assert tags.predict(x).shape == tags.predict_proba(x).shape == (300, 2)
    np.testing.assert_array_equal(tags.predict(x), tags.predict_proba(x) > 0.5)
    assert tags.score(x, y > 0) > 0.8
    counts = boosted(jh.PoissonRegressionHead(), library, n_estimators=2).fit(x, np.floor(np.exp(s / 2)))
    assert (counts.predict(x) > 0).all()
    np.testing.assert_allclose(counts.predict(x), np.exp(counts.predict_logits(x)[:, 0]), rtol=1e-6)
    assert not hasattr(counts, "predict_proba")
    assert not hasattr(counts, "decision_function")


@pytest.mark.parametrize(("library", "shared"), [("xgboost", False), ("xgboost", True), ("lightgbm", False)])
def test_several_tasks_with_missing_labels(library, shared):
    x, s = table()
    head = jh.MultiHead([jh.BinaryClassHead(name="a"), jh.RegressionHead(name="b")])
    y = {"a": (s > 0).astype(int), "b": np.where(x[:, 0] > 1, np.nan, s)}
    where = {"b": ~np.isnan(y["b"])}
    extra = {"multi_strategy": "multi_output_tree", "tree_method": "hist"} if shared else {}
    model = boosted(head, library, n_estimators=10, learning_rate=0.5, **extra)
    model.fit(x, y, where=where, eval_set=[(x, y)], eval_where=[where], eval_sample_weight=np.full((1, 300), 2.0))
    predicted = model.predict(x)
    assert (predicted["a"] == y["a"]).mean() > 0.9
    assert r2_score(s[where["b"]], predicted["b"][where["b"]]) > 0.85
    np.testing.assert_allclose(model.init_logits_[1], np.nanmean(y["b"]), rtol=1e-5, atol=1e-6)
    log = model.evals_result_["validation_0"]
    values = model.measure(x, y, np.full(300, 2.0), where=where).compute()
    for key in ("loss/a", "loss/b", "auc/a"):
        np.testing.assert_allclose(log[key][-1], values[key], atol=2e-6)
    trees = len(model.booster_.get_dump()) if library == "xgboost" else model.booster_.num_trees()
    assert trees == (10 if shared else 20)
    assert model.score(x, y, where=where) < 0
    with pytest.raises(ValueError, match="Head 'b'"):
        boosted(head, library).fit(x, y)


@both
def test_early_stopping_by_a_head_metric(library):
    x, s = table(600)
    rng = np.random.default_rng(1)
    y = (s + 2 * rng.normal(size=600) > 0).astype(int)
    model = boosted(
        jh.BinaryClassHead(), library, n_estimators=200, early_stopping_rounds=5, monitor="auc", learning_rate=0.5
    ).fit(x[:300], y[:300], eval_set=[(x[300:], y[300:])])
    log = model.evals_result_["validation_0"]
    assert model.best_iteration_ == np.argmax(log["auc"])
    assert int(model.booster_.best_iteration) == model.best_iteration_ + (library == "lightgbm")
    assert len(log["auc"]) == model.best_iteration_ + 6 < 200
    values = model.measure(x[300:], y[300:]).compute()
    np.testing.assert_allclose(values["auc"], max(log["auc"]), atol=2e-6)
    np.testing.assert_allclose(values["average_loss"], log["average_loss"][model.best_iteration_], atol=2e-6)
    assert {"accuracy", "label/mean", "auc_precision_recall"} < log.keys()
    plain: Any = clone(model)
    plain.set_params(monitor=None).fit(x[:300], y[:300], eval_set=[(x[300:], y[300:])])
    assert plain.best_iteration_ == np.argmin(plain.evals_result_["validation_0"]["average_loss"])


@either
def test_the_last_of_several_decides(library):
    x, s = table(600)
    y = (s > 0).astype(int)
    # What the first set calls worse and worse.
    sets = [(x[300:], 1 - y[300:]), (x[300:], y[300:])]
    model = boosted(jh.BinaryClassHead(), library, n_estimators=40, early_stopping_rounds=3)
    model.fit(x[:300], y[:300], eval_set=sets)
    upside_down, log = (model.evals_result_[name]["average_loss"] for name in ("validation_0", "validation_1"))
    assert model.best_iteration_ == np.argmin(log) > np.argmin(upside_down) + 3


@either
def test_the_direction_that_is_given_counts(library):
    x, s = table(600)
    y = s - x[:, 0]  # the mean falls at first, then comes back
    for higher, best in ((True, np.argmax), (False, np.argmin)):
        model = boosted(
            jh.RegressionHead(), library, n_estimators=30, early_stopping_rounds=4, monitor="prediction/mean",
            higher_is_better=higher, learning_rate=0.3,
        ).fit(x[:300], y[:300], eval_set=[(x[300:], y[300:])])  # fmt: skip
        means = model.evals_result_["validation_0"]["prediction/mean"]
        assert model.best_iteration_ == best(means)
        assert len(means) == min(30, model.best_iteration_ + 5)


@either
def test_small_losses_are_not_rounded_to_stop(library):
    x, s = table(600)
    y = 3e-3 * s  # XGBoost splits for no gain below 1e-6
    model = boosted(jh.RegressionHead(), library, n_estimators=40, early_stopping_rounds=3, learning_rate=0.2)
    model.fit(x[:300], y[:300], eval_set=[(x[300:], y[300:])])
    losses = model.evals_result_["validation_0"]["average_loss"]
    assert model.best_iteration_ == np.argmin(losses) > 5
    expected = mean_squared_error(y[300:], model.predict(x[300:]))
    np.testing.assert_allclose(min(losses), expected, rtol=1e-5)


@both
def test_predictions_are_of_the_model_that_was_trained_however_far_it_starts(library):
    """Training adds trees to the start, and rounds as it goes."""
    x, s = table()
    y = 1e5 + s
    model = boosted(jh.RegressionHead(), library, n_estimators=60, learning_rate=0.4).fit(x, y, eval_set=[(x, y)])
    last = model.evals_result_["validation_0"]["average_loss"][-1]
    assert last < 0.1 * s.var()
    y32 = y.astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(mean_squared_error(y32, model.predict(x).astype(np.float64)), last, rtol=0.05)
    np.testing.assert_allclose(model.measure(x, y).compute()["average_loss"], last, rtol=0.05)


@either
def test_first_rounds_do_not_look_like_probabilities_to_an_estimator(library):
    x, s = table()
    y = (s > -0.3).astype(int)
    model = boosted(jh.BinaryClassHead(), library, n_estimators=3, learning_rate=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(x, y, eval_set=[(x, y)])
    first = model.init_logits_[0]
    assert 0 < first < 1


def test_the_score_of_several_tasks_is_their_loss():
    x, s = table()
    head = jh.MultiHead([jh.BinaryClassHead(name="a"), jh.RegressionHead(name="b")], head_weights=(1.0, 0.001))
    y = {"a": (s > 0).astype(int), "b": 100 * s}
    model = boosted(head, n_estimators=8).fit(x, y)
    z = model.predict_logits(x).astype(np.float64)
    expected = log_loss(y["a"], expit(z[:, 0])) + 0.001 * mean_squared_error(y["b"], z[:, 1])
    np.testing.assert_allclose(model.score(x, y), -expected, rtol=1e-5)


@both
def test_a_monitor_that_is_undefined_says_so(library):
    x, s = table()
    model = boosted(jh.BinaryClassHead(), library, early_stopping_rounds=3, monitor="auc")
    with pytest.raises(ValueError, match=r"monitored 'auc' of the last of eval_set is undefined in round 0"):
        model.fit(x, s > 0, eval_set=[(x, np.ones(300))])


def test_the_libraries_own_stopping_goes_by_the_loss():
    x, s = table(600)
    y = (s + 2 * np.random.default_rng(1).normal(size=600) > 0).astype(int)
    head, log = jh.BinaryClassHead(), {}
    train, test = (dataset("xgboost", x[part], y[part]) for part in (slice(300), slice(300, None)))
    booster = xgboost.train(
        {"base_score": 0, "nthread": 1, "disable_default_eval_metric": True}, train, 100,
        obj=objective("xgboost", head), custom_metric=metric("xgboost", head), evals=[(test, "test")],
        early_stopping_rounds=4, evals_result=log, verbose_eval=False,
    )  # fmt: skip
    losses = log["test"]["average_loss"]
    assert booster.best_iteration == np.argmin(losses)
    assert len(losses) == booster.best_iteration + 5
    # Of LightGBM any metric stops: one that cannot improve, a mean of labels, would at once.
    assert all(directions(head)[key] is not None for key in metric("lightgbm", head).keys)
    y = (s > 0).astype(int)
    train = lightgbm.Dataset(x[:300], y[:300], params={"verbosity": -1})
    found: Any = {}
    lightgbm.train(
        {"objective": objective("lightgbm", head), "num_threads": 1, "verbosity": -1}, train, 20,
        valid_sets=[train.create_valid(x[300:], y[300:])], feval=metric("lightgbm", head),
        callbacks=[lightgbm.early_stopping(5, verbose=False), lightgbm.record_evaluation(found)],
    )  # fmt: skip
    assert len(found["valid_0"]["average_loss"]) > 6


@both
def test_attached_labels_follow_slices_and_folds(library):
    x, s = table()
    y = {"late": (s > 0.4).astype(int), "minutes": s.tolist()}
    there = np.arange(300) % 4 > 0
    head = jh.MultiHead([jh.BinaryClassHead(name="late"), jh.RegressionHead(name="minutes")])
    attached = jh.boosting.with_labels(dataset(library, x, np.zeros(300)), y, {"minutes": there})
    rows = np.random.default_rng(3).permutation(300)[:150]
    if library == "lightgbm":
        part = attached.subset(used_indices=rows).construct()
        rows = np.sort(rows)
    else:
        part = attached.slice(rindex=rows)
    z = np.random.default_rng(2).normal(size=(150, 2))
    g, _ = objective(library, head)(z, part)
    expected = np.stack([expit(z[:, 0]) - y["late"][rows], there[rows] * (z[:, 1] - s[rows])], 1)
    np.testing.assert_allclose(np.asarray(g), expected, atol=1e-6)
    again = jh.boosting.with_labels(attached, {**y, "late": 1 - y["late"]})
    assert again is attached
    parts = again.subset(rows).construct() if library == "lightgbm" else again.slice(rows)
    g, _ = objective(library, head)(z, parts)
    np.testing.assert_allclose(np.asarray(g)[:, 0], expit(z[:, 0]) - 1 + y["late"][rows], atol=1e-6)
    jh.boosting.with_labels(attached, y, {"minutes": there})
    # The folds of cv, each measured by its own labels.
    folds = [(np.arange(150, 300), np.arange(150)), (np.arange(150), np.arange(150, 300))]
    means = metric(library, head, ("label/mean/late", "label/mean/minutes"))
    one = {"num_boost_round": 1, "folds": folds}
    if library == "xgboost":
        given = {"num_target": 2, "base_score": 0, "disable_default_eval_metric": True}
        log: Any = xgboost.cv(
            given, attached, obj=objective(library, head), custom_metric=means, as_pandas=False, **one
        )
        found = [log[f"test-label/mean/{name}-mean"][0] for name in y]
    else:
        given = {"objective": objective(library, head), "num_class": 2, "verbosity": -1}
        log = lightgbm.cv(given, attached, feval=means, **one)
        found = [log[f"valid label/mean/{name}-mean"][0] for name in y]
    tests = [test for _, test in folds]
    late = np.mean([y["late"][test].mean() for test in tests])
    minutes = np.mean([s[test][there[test]].mean() for test in tests])
    np.testing.assert_allclose(found, [late, minutes], atol=2e-6)
    with pytest.raises(ValueError, match=r"needs an xgboost\.DMatrix or a lightgbm\.Dataset"):
        jh.boosting.with_labels(np.zeros(3), np.zeros(3))


@either
def test_ids_that_may_count_from_one_are_told(library):
    x, s = table()
    y = np.digitize(s, [0]) + 1
    with pytest.warns(UserWarning, match=r"Labels from 1 to 2 of 3 classes are taken for ids of 0 ... 2") as warned:
        model = boosted(jh.MultiClassHead(3), library).fit(x, y)
    assert warned[0].filename == __file__
    assert model.classes_.tolist() == [0, 1, 2]
    assert model.score(x, y) > 0.8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert boosted(jh.BinaryClassHead(), library).fit(x, y).classes_.tolist() == [1, 2]


OWN = {"xgboost": "feature_types", "lightgbm": "categorical_feature"}
OTHERS = {"xgboost": "categorical_feature", "lightgbm": "feature_types"}


@both
def test_what_an_estimator_refuses(library):
    x, s = table()
    y = (s > 0).astype(int)
    two = jh.MultiHead([jh.BinaryClassHead(name="a"), jh.RegressionHead(name="b")])
    pairs = [(x, y)]
    for model, given, words in (
        (boosted(jh.BinaryClassHead(), "catboost"), {}, "booster must be one of"),
        (boosted(jh.BinaryClassHead(), library, objective="binary"), {}, r"The head decides \['objective'\]"),
        (boosted(jh.BinaryClassHead(), library, num_boost_round=3), {}, "number of rounds is n_estimators"),
        (boosted(jh.BinaryClassHead(), library, scale_pos_weight=3), {}, "would do nothing under a head"),
        (
            boosted(jh.BinaryClassHead(), library, early_stopping_round=3),
            {},
            "pass early_stopping_rounds= and monitor=",
        ),
        (boosted(jh.BinaryClassHead(), library, early_stopping_rounds=0), {}, "an integer of at least 1"),
        (boosted(jh.BinaryClassHead(), library, monitor="auc"), {}, "Pass early_stopping_rounds= too"),
        (
            boosted(jh.BinaryClassHead(), library),
            {
                "callbacks": [lightgbm.early_stopping(3) if library == "lightgbm" else EarlyStopping(rounds=3)],
                "eval_set": pairs,
            },
            "To stop early pass early_stopping_rounds=",
        ),
        (boosted(jh.BinaryClassHead(), library, missing=-1.0), {}, "missing is no parameter here.*is NaN"),
        (boosted(jh.BinaryClassHead(), library, params={"max_depth": 2}), {}, "parameters stand beside the head"),
        (boosted(jh.BinaryClassHead(), library, importance_type="gain"), {}, "booster_ knows the others"),
        (
            boosted(jh.BinaryClassHead(), library, **{OTHERS[library]: ["c", "q", "q", "q"]}),
            {},
            f"{OTHERS[library]} is no parameter here.*of an array, name them in {OWN[library]}=",
        ),
        (boosted(jh.BinaryClassHead(), library), {"eval_set": (x, y)}, r"a list of pairs, \[\(X, y\)\].*ndarray"),
        (
            boosted(jh.BinaryClassHead(), library),
            {"eval_set": [(x, y, y)]},
            "with weights in eval_sample_weight.*tuple of 3",
        ),
        (boosted(jh.BinaryClassHead(), library), {"where": True}, r"where shape must be \(300,\).*where shape: \(\)"),
        (
            boosted(jh.BinaryClassHead(), library),
            {"where": np.full(300, 2)},
            "bool, or 0 and 1. Given other values, e.g. 2",
        ),
        (boosted(jh.BinaryClassHead(), library, callbacks=[]), {}, "callbacks is no parameter here.*give them to fit"),
        (boosted(jh.BinaryClassHead(), library, n_estimators=0), {}, "n_estimators must be an integer"),
        (boosted(jh.BinaryClassHead(), library, init_score=[1, 2]), {}, "init_score must be None"),
        (boosted(jh.BinaryClassHead(), library, init_score=np.nan), {}, "init_score must be finite"),
        (boosted(jh.BinaryClassHead(), library, early_stopping_rounds=3), {}, "needs eval_set"),
        (
            boosted(jh.BinaryClassHead(), library, early_stopping_rounds=3, monitor="area"),
            {"eval_set": pairs},
            "monitor must be a metric of the head",
        ),
        (
            boosted(jh.BinaryClassHead(), library, early_stopping_rounds=3, monitor="label/mean"),
            {"eval_set": pairs},
            "Pass higher_is_better=",
        ),
        (boosted(jh.BinaryClassHead(bootstrap=jh.Bootstrap(3)), library), {}, "no slices and no bootstrap"),
        (boosted(jh.BinaryClassHead("w"), library), {}, "holds the weights"),
        (
            boosted(jh.GlobalObjectiveHead(jh.BinaryClassHead(), "precision_at_recall", 0.9), library),
            {},
            "trains no fields of its head.*lagrange_multipliers",
        ),
        (
            boosted(jh.BinaryClassHead(), library),
            {"where": np.ones(200, bool)},
            r"where shape must be \(300,\).*where shape: \(200,\)",
        ),
        (boosted(jh.BinaryClassHead(), library), {"sample_weight": np.ones((300, 2))}, r"shape \(300,\)"),
        (boosted(jh.BinaryClassHead(), library), {"sample_weight": -np.ones(300)}, "not negative"),
        (
            boosted(jh.BinaryClassHead(), library),
            {"eval_set": pairs, "eval_sample_weight": []},
            "an entry for each of eval_set, 1. Given 0",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            model.fit(x, y, **given)
    labels = {"a": y, "b": s}
    with pytest.raises(ValueError, match="needs monitor="):
        boosted(two, library, early_stopping_rounds=3).fit(x, labels, eval_set=[(x, labels)])
    with pytest.raises(ValueError, match="Head 'b': constant_logits needs elements that weigh something"):
        boosted(two, library).fit(x, labels, where={"b": np.zeros(300, bool)})
    for kind in ("rf", "random_forest"):
        with pytest.raises(ValueError, match=f"random forests take no objective but its own.*Given '{kind}'"):
            boosted(jh.BinaryClassHead(), "lightgbm", boosting_type=kind).fit(x, y)
    with pytest.raises(ValueError, match=r"no earlier round can be gone back to\. Given early_stopping_rounds=3"):
        boosted(jh.BinaryClassHead(), "lightgbm", boosting="dart", early_stopping_rounds=3).fit(x, y, eval_set=pairs)
    assert boosted(jh.BinaryClassHead(), "lightgbm", boosting="dart").fit(x, y).score(x, y) > 0.85
    for columns, words in (("0,1", "Given '0,1'"), (0, "Given 0"), ([9], r"0 \.\.\. 3\. Given \[9\]"), (["a"], "'a'")):
        with pytest.raises(ValueError, match=f"cat_feature must be a list of columns.*{words}"):
            boosted(jh.BinaryClassHead(), "lightgbm", cat_feature=columns).fit(x, y)
    with pytest.raises(ValueError, match="One list of columns"):
        boosted(jh.BinaryClassHead(), "lightgbm", cat_feature=[0], categorical_feature=[1]).fit(x, y)
    with pytest.raises(ValueError, match="LightGBM grows a tree for each logit"):
        boosted(two, "lightgbm", multi_strategy="multi_output_tree").fit(x, labels)


@both
def test_frames_keep_their_categories(library):
    rng = np.random.default_rng(0)
    town = rng.integers(0, 8, 300)
    # By number no split at one place tells them apart.
    y = np.isin(town, (0, 3, 5)).astype(int)
    frame = pd.DataFrame({"town": pd.Categorical.from_codes(town, list("hgfedcba")), "noise": rng.normal(size=300)})
    model = boosted(jh.BinaryClassHead(), library, n_estimators=3, max_depth=1, learning_rate=1.0)
    if library == "lightgbm":
        model.set_params(min_data_per_group=1, cat_smooth=0, cat_l2=0, max_cat_to_onehot=1)
    else:
        model.set_params(max_cat_to_onehot=1)
    assert model.fit(frame, y).score(frame, y) == 1
    assert model.feature_names_in_.tolist() == ["town", "noise"]
    as_numbers = frame.assign(town=town)
    again: Any = clone(model)
    assert again.fit(as_numbers, y).score(as_numbers, y) < 0.9


@both
def test_columns_of_codes_are_categories_by_name(library):
    rng = np.random.default_rng(0)
    town = rng.integers(0, 8, 300)
    y = np.isin(town, (0, 3, 5)).astype(int)
    x = np.stack([town, rng.normal(size=300)], 1)
    frame, given = pd.DataFrame(x, columns=["town", "noise"]), {"n_estimators": 3, "max_depth": 1, "learning_rate": 1.0}
    ways = {
        "xgboost": [(x, "feature_types", ["c", "q"]), (x, "feature_types", ("c", "q"))],
        "lightgbm": [
            *((x, "categorical_feature", way) for way in ([0], (0,), np.array([0]))),
            (frame, "cat_feature", ["town"]),
        ],
    }
    for table, name, way in ways[library]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = boosted(jh.BinaryClassHead(), library, **given, **{name: way}).fit(table, y, eval_set=[(table, y)])
        assert model.score(table, y) == 1
    assert boosted(jh.BinaryClassHead(), library, **given).fit(x, y).score(x, y) < 1


@both
@pytest.mark.filterwarnings("ignore:X (does not have valid|has) feature names")
def test_arrays_and_frames_take_turns(library):
    """scikit-learn warns where one follows the other, and looks at the number of columns."""
    x, s = table()
    frame = pd.DataFrame(x, columns=list("abcd"))
    found = []
    for fitted, other in ((x, frame), (frame, x)):
        model = boosted(jh.RegressionHead(), library, n_estimators=5, early_stopping_rounds=5)
        model.fit(fitted, s, eval_set=[(other, s)])
        np.testing.assert_array_equal(model.predict(other), model.predict(fitted))
        found.append(model.predict(fitted))
    np.testing.assert_array_equal(*found)


@both
def test_steps_of_poisson_objectives_may_be_any_number(library):
    x, s = table()
    counts = np.floor(np.exp(s / 2))
    name = {"xgboost": "max_delta_step", "lightgbm": "poisson_max_delta_step"}[library]

    def fitted(head: Any, y: Any, value: Any) -> np.ndarray:
        return (
            boosted(head, library, n_estimators=2, **({} if value == "left out" else {name: value}))
            .fit(x, y)
            .predict_logits(x)
        )

    head = jh.PoissonRegressionHead()
    by_default = fitted(head, counts, "left out")
    np.testing.assert_array_equal(fitted(head, counts, None), by_default)
    np.testing.assert_array_equal(fitted(head, counts, np.float32(0.7)), by_default)
    assert np.abs(fitted(head, counts, np.int64(2)) - by_default).max() > 0.01
    fitted(jh.BinaryClassHead(), s > 0, None)


@both
def test_labels_are_looked_at_once_a_dataset(library, monkeypatch):
    """However many datasets there are, as in folds; and again where labels or weights of one change."""
    from jaxheads.boosting import datasets

    calls = []
    monkeypatch.setattr(datasets, "prepare", lambda *args: calls.append(0) or prepare(*args))
    monkeypatch.setattr(datasets, "KEPT", 2)
    x, s = table()
    y = (s > 0).astype(np.float32)
    many = [dataset(library, x, np.roll(y, i)) for i in range(4)]
    head = jh.BinaryClassHead()
    f, z = objective(library, head), np.zeros(300)
    for i in [*range(4)] * 2:
        np.testing.assert_allclose(f(z, many[i])[0], 0.5 - np.roll(y, i), atol=1e-6)
    assert len(calls) == 4
    many[0].set_label(1 - y)
    np.testing.assert_allclose(f(z, many[0])[0], y - 0.5, atol=1e-6)
    many[0].set_weight(np.full(300, 2.0))
    np.testing.assert_allclose(f(z, many[0])[0], 2 * y - 1, atol=1e-6)
    assert len(calls) == 6
    for i in (0, 1, 0, 1, 2, 1):  # as scikit-learn's wrappers call it: of arrays the last two are kept
        f(np.roll(y, i), z)
    assert len(calls) == 9
    f(y, z)
    assert len(calls) == 10
    assert len(f._cache._of_datasets) == 4
    many.clear()
    assert not f._cache._of_datasets


def test_attached_labels_are_a_copy_and_pickle():
    x, s = table()
    y = {"a": (s > 0).astype(int), "b": s.copy()}
    head = jh.MultiHead([jh.BinaryClassHead(name="a"), jh.RegressionHead(name="b")])
    data = jh.boosting.with_labels(lightgbm.Dataset(x, np.zeros(300)), y)
    y["b"][:] = 99
    again = pickle.loads(pickle.dumps(data))
    assert type(again) is type(data) is not lightgbm.Dataset
    z = np.zeros((300, 2))
    for each_one in (data.construct(), again.construct(), again.subset(np.arange(300)).construct()):
        np.testing.assert_allclose(np.asarray(objective("lightgbm", head)(z, each_one)[0])[:, 1], -s, atol=1e-6)


def test_parameters_of_booster_and_estimator_stand_together():
    head = jh.BinaryClassHead()
    model = jh.boosting.BoostedHead(head, max_depth=3, n_estimators=7)
    assert model.get_params()["max_depth"] == 3
    again: Any = clone(model.set_params(max_depth=2, learning_rate=0.5, hessian="exact"))
    assert (again.hessian, again.params) == ("exact", {"max_depth": 2, "learning_rate": 0.5})
    assert again.head == head
    assert jh.boosting.BoostedHead(head).get_params().keys() == model.get_params().keys() - {
        "max_depth",
        "learning_rate",
    }
    x, s = table(600)
    one, given = boosted(head, n_estimators=3), {"max_depth": [1, 3]}
    search = GridSearchCV(one, given, cv=2, scoring="roc_auc", refit=False)
    search.fit(x, np.where(s > 0, "b", "a"))
    assert search.best_params_ == {"max_depth": 3}


@either
def test_soft_labels_loss_functions_and_starts(library):
    x, s = table()
    soft = boosted(jh.BinaryClassHead(), library).fit(x, expit(2 * s))
    assert r2_score(expit(2 * s), soft.predict_proba(x)[:, 1]) > 0.85
    assert soft.classes_.tolist() == [0, 1]
    hinge = boosted(jh.BinaryClassHead(loss_fn=zoo.hinge_per_element), library, hessian="unit").fit(x, s > 0)
    np.testing.assert_array_equal(hinge.init_logits_, [np.sign((s > 0).mean() - 0.5)])
    assert hinge.score(x, s > 0) > 0.9
    far = boosted(jh.RegressionHead(), library, init_score=7.5, n_estimators=1, learning_rate=1e-6).fit(x, s)
    np.testing.assert_allclose(far.predict(x), 7.5, atol=1e-4)
    tasks = jh.MultiHead([jh.RegressionHead(name="m"), jh.BinaryClassHead(loss_fn=zoo.hinge_per_element, name="h")])
    started = boosted(tasks, library, n_estimators=1).fit(x, {"m": s + 3, "h": s > 0})
    np.testing.assert_allclose(started.init_logits_, [np.mean(s) + 3, hinge.init_logits_[0]], rtol=1e-5)


def test_engines_and_exports():
    assert set(ENGINES) == set(LIBRARIES)
    assert "BoostedHead" in dir(jh.boosting)
    with pytest.raises(AttributeError, match="no attribute 'Boosted'"):
        jh.boosting.Boosted  # noqa: B018
    # Objectives come without scikit-learn, and nothing here with `import jaxheads`.
    code = "import sys, jaxheads as jh; jh.boosting.xgboost_objective(jh.BinaryClassHead()); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"sklearn", "xgboost", "lightgbm"} & set(found)
