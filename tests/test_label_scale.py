"""Regression on labels of any scale: by scikit-learn's StandardScaler and metrics, and by NumPy in float64."""

import functools
import pickle
from typing import Any, cast

import jax
import numpy as np
import optax
import pytest
from devices import mesh_of
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score
from sklearn.preprocessing import StandardScaler

import jaxheads as jh

N = 64
MEAN, SCALE = (2015.0, -4.0), (3.0, 0.01)
HEAD = jh.RegressionHead(2, label_mean=MEAN, label_scale=SCALE)
RUNNING = jh.RegressionHead(2, label_mean="running", label_scale="running")


@functools.cache
def draw(seed=0):
    """Labels far from zero, `[64, 2]`; logits, weights and masks. Rows without weight or mask hold garbage."""
    rng = np.random.default_rng(seed)
    weights, where = rng.choice(np.array([0, 0.5, 1, 2], np.float32), (N, 1)), rng.random((N, 1)) < 0.8
    labels = (np.array(MEAN) + np.array(SCALE) * rng.normal(size=(N, 2))).astype(np.float32)
    labels = np.where(where & (weights > 0), labels, np.float32(np.nan))
    return labels, rng.normal(size=(N, 2)).astype(np.float32), weights, where


def seen(seed=0):
    """Labels, logits and weights of the rows that count, in float64."""
    labels, logits, weights, where = draw(seed)
    live = (where & (weights > 0))[:, 0]
    return labels[live].astype(float), logits[live].astype(float), weights[live, 0].astype(float)


@jax.jit
def update(state, labels, logits, weights, where):
    return RUNNING.update_state(state, labels, logits, weights=weights, where=where)


@jax.jit
def predict(state):
    return RUNNING.predictions(np.array([[0, 0], [1, 1]], np.float32), keys="predictions", params=state)["predictions"]


def counted(state):
    """The mean and the scale that a running head has counted, as its predictions tell them."""
    zero, one = np.asarray(predict(state), np.float64)
    return zero, one - zero


@functools.cache
def first():
    """The state before any label, made once."""
    return jax.device_get(RUNNING.init_state())


def test_the_loss_is_standardized_and_the_rest_is_in_units():
    labels, logits, weights, where = draw()
    y, z, w = seen()
    head = HEAD.with_metrics(
        jh.metrics.MeanSquaredError("raw_values"), jh.metrics.MeanAbsoluteError(), jh.metrics.R2Score()
    )
    loss, slope = jax.jit(jax.value_and_grad(lambda z: HEAD.loss(labels, z, weights=weights, where=where)))(logits)
    error = z - (y - MEAN) / SCALE
    np.testing.assert_allclose(loss, np.sum(w[:, None] * error**2) / (2 * where.sum()), rtol=1e-5)
    expected = np.zeros((N, 2))
    expected[(where & (weights > 0))[:, 0]] = 2 * w[:, None] * error / (2 * where.sum())
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)
    p = np.array(MEAN) + np.array(SCALE) * z
    values = head.measure(labels, logits, weights=weights, where=where).compute()
    raw = mean_squared_error(y, p, sample_weight=w, multioutput="raw_values")
    np.testing.assert_allclose([values[f"mean_squared_error/target{i}"] for i in (0, 1)], raw, rtol=1e-4)
    np.testing.assert_allclose(values["mean_absolute_error"], mean_absolute_error(y, p, sample_weight=w), rtol=1e-4)
    np.testing.assert_allclose(values["r2_score"], r2_score(y, p, sample_weight=w), rtol=1e-4)
    np.testing.assert_allclose(values["label/mean"], np.average(y, axis=0, weights=w).mean(), rtol=1e-6)
    np.testing.assert_allclose(values["prediction/mean"], np.average(p, axis=0, weights=w).mean(), rtol=1e-6)
    np.testing.assert_allclose(values["average_loss"], np.average(error**2, axis=0, weights=w).mean(), rtol=1e-5)


def test_predictions_come_back_in_units():
    logits = np.array([[0.0, 0.0], [2.0, -1.0]], np.float32)
    found, served = jax.jit(lambda z: (HEAD.predictions(z), HEAD.export_outputs(z)["serving_default"]))(logits)
    np.testing.assert_allclose(found["predictions"], [[2015, -4], [2021, -4.01]], rtol=1e-6)
    np.testing.assert_array_equal(found["logits"], logits)
    np.testing.assert_array_equal(cast(Any, served).value, found["predictions"])
    assert list(jax.eval_shape(jh.RegressionHead().predictions, logits[:, :1])) == ["predictions"]
    # One number alone: the other is 0 or 1.
    for option, expected in ({"label_mean": 5}, [5, 7]), ({"label_scale": 5.0}, [0, 10]):
        found = jax.jit(cast(Any, jh.RegressionHead)(**option).predictions)(logits[:, :1])
        np.testing.assert_array_equal(found["predictions"][:, 0], expected)


def test_loss_fn_and_link_work_on_standardized_labels():
    """Pixels from 0 to 255 as shares: the loss sees y / 255, and the prediction is 255 sigmoid(z)."""
    head = jh.RegressionHead(
        loss_fn=_cross_entropy,
        inverse_link_fn=jax.nn.sigmoid,
        label_scale=255,
    )
    labels, logits = np.array([[0.0], [51], [255]], np.float32), np.array([[-1.0], [0], [2]], np.float32)
    y, z = labels.astype(float) / 255, logits.astype(float)
    np.testing.assert_allclose(head.loss(labels, logits), np.mean(np.logaddexp(0, z) - y * z), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(head.predictions)(logits)["predictions"], 255 / (1 + np.exp(-z)), rtol=1e-6)
    gradient, hessian = jh.boosting.derivatives(head, labels, logits)
    p = 1 / (1 + np.exp(-z))
    np.testing.assert_allclose(gradient, p - y, atol=1e-6)
    np.testing.assert_allclose(hessian, p * (1 - p), rtol=1e-5)


def _cross_entropy(labels, logits):
    return jax.nn.softplus(logits) - labels * logits


def test_boosters_see_the_standardized_loss():
    """Half of its gradient and a Hessian of 1, as XGBoost and LightGBM have for squared error; the best constant."""
    labels, logits, weights, where = draw()
    y, z, w = seen()
    gradient, hessian = jh.boosting.derivatives(HEAD, labels, logits, weights=weights, where=where)
    live = (where & (weights > 0))[:, 0]
    np.testing.assert_allclose(gradient[live], w[:, None] * (z - (y - MEAN) / SCALE), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(hessian[live], np.broadcast_to(w[:, None], (len(w), 2)))
    best = (np.average(y, axis=0, weights=w) - MEAN) / SCALE
    np.testing.assert_allclose(HEAD.constant_logits(labels, weights, where), best, rtol=1e-4)


def scaler(*batches):
    fitted: Any = StandardScaler()
    for y, _, w in batches:
        fitted.partial_fit(y, sample_weight=w)
    return fitted


def test_running_statistics_are_those_of_all_rows_that_count():
    """Batch by batch, compiled once; a batch that weighs nothing, also as the first, changes nothing."""
    state = first()
    np.testing.assert_array_equal(counted(state), [[0, 0], [1, 1]])
    labels, logits, weights, where = draw()
    empty = labels, logits, np.zeros_like(weights), where
    for batch in (empty, draw(0), empty, draw(1), draw(2)):
        state = update(state, *batch)
    expected = scaler(*(seen(i) for i in range(3)))
    mean, scale = counted(state)
    np.testing.assert_allclose(mean, expected.mean_, rtol=1e-6)
    np.testing.assert_allclose(scale, np.sqrt(expected.var_), rtol=2e-3)


def test_the_counts_themselves_are_exact():
    """The spread of labels far from zero, after many batches; a float32 sum of squares would have lost it."""
    head = jh.RegressionHead(label_mean="running", label_scale="running")
    rng = np.random.default_rng(3)
    labels = (2e6 + rng.normal(size=(50, 256, 1))).astype(np.float32)

    def step(state, labels):
        return head.update_state(state, labels, 0 * labels), None

    state = jax.device_get(jax.jit(lambda labels: jax.lax.scan(step, head.init_state(), labels)[0])(labels))
    mean, scale = labels.astype(float).mean(), labels.astype(float).std()
    counts = np.asarray(state["label_counts"], np.float64).sum(-1)[:, 0]
    shift, weight, first, second = counts
    np.testing.assert_allclose(shift + first / weight, mean, rtol=1e-9)
    np.testing.assert_allclose(np.sqrt(second / weight - (first / weight) ** 2), scale, rtol=1e-5)
    assert weight == 50 * 256


def test_labels_that_are_all_equal_have_a_scale_of_1():
    labels, logits, weights, where = draw()
    equal = np.where(np.isnan(labels), np.nan, np.array([0.1, -2e7], np.float32))
    mean, scale = counted(update(first(), equal, logits, weights, where))
    np.testing.assert_allclose(mean, [0.1, -2e7], rtol=1e-6)
    np.testing.assert_allclose(scale[0], 1, rtol=1e-6)


def test_weights_may_be_those_of_each_target():
    labels, logits, *_ = draw()
    labels = np.nan_to_num(labels, nan=7)
    weights = np.random.default_rng(5).choice(np.array([0, 1, 3], np.float32), (N, 2))
    mean, scale = counted(update(first(), labels, logits, weights, np.ones((N, 1), bool)))
    for i in range(2):
        fitted: Any = StandardScaler().fit(labels[:, i : i + 1].astype(float), sample_weight=weights[:, i])
        np.testing.assert_allclose(mean[i], fitted.mean_[0], rtol=1e-5)
        np.testing.assert_allclose(scale[i], np.sqrt(fitted.var_[0]), rtol=1e-5)


def train(step, batches, state):
    for batch in batches:
        state, _ = step(state, batch)
    return state


@functools.cache
def batches():
    return [dict(zip(("labels", "features", "weights", "where"), draw(i), strict=True)) for i in range(3)]


@functools.cache
def start():
    params = {"w": np.eye(2, dtype=np.float32)}
    state = jh.TrainState.create(params=params, optimizer=optax.sgd(1e-3), head=RUNNING, key=jax.random.PRNGKey(0))
    return jax.device_get(state)


def make_step(**options):
    return jh.make_train_step(RUNNING, lambda params, x: x @ params["w"], optax.sgd(1e-3), **options)


def simulate():
    """Three steps in float64: each has the statistics of the batches before it; the first has raw labels."""
    w, before = np.eye(2), []
    for i in range(3):
        y, x, a = seen(i)
        fitted = scaler(*before) if before else None
        target = y if fitted is None else (y - fitted.mean_) / np.sqrt(fitted.var_)
        rows = draw(i)[3].sum()
        w = w - 1e-3 * x.T @ (2 * a[:, None] * (x @ w - target)) / (2 * rows)
        before.append((y, x, a))
    return w, scaler(*before)


@pytest.mark.parametrize(
    "how",
    [
        "plain",
        "micro",
        "explicit",
        *(pytest.param(how, marks=pytest.mark.slow) for how in ("auto", "shard_map", "pmap")),
    ],
)
def test_training_counts_alike_on_devices_and_in_parts(how):
    if how in ("plain", "micro"):
        step = jax.jit(make_step(micro_batches=4 if how == "micro" else 1))
        state = train(step, batches(), start())
    elif how == "pmap":
        step = jax.pmap(make_step(axis_name="d"), axis_name="d", in_axes=(None, 0), out_axes=None)
        apart = [jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch) for batch in batches()]
        state = train(step, apart, start())
    elif how == "shard_map":
        spec = PartitionSpec()
        step = jax.shard_map(
            make_step(axis_name="d"), mesh=mesh_of(8, "auto"), in_specs=(spec, PartitionSpec("d")), out_specs=spec
        )
        state = train(jax.jit(step), batches(), start())
    else:
        mesh = mesh_of(8, how)
        placed = [jax.device_put(batch, NamedSharding(mesh, PartitionSpec("d"))) for batch in batches()]
        state = train(jax.jit(make_step()), placed, jax.device_put(start(), NamedSharding(mesh, PartitionSpec())))
    w, fitted = simulate()
    np.testing.assert_allclose(jax.device_get(state.params["w"]), w, rtol=2e-4, atol=2e-5)
    counts = np.asarray(jax.device_get(state.head_state["label_counts"]), np.float64).sum(-1)
    np.testing.assert_allclose(counts[0] + counts[2] / counts[1], fitted.mean_, rtol=1e-6)
    spread = np.sqrt(counts[3] / counts[1] - (counts[2] / counts[1]) ** 2)
    np.testing.assert_allclose(spread, np.sqrt(fitted.var_), rtol=1e-4)


def test_heads_inside_count_their_own_labels():
    """Several equal heads, which the engine stacks, and one other; the steps of a sequence that exist."""
    running: Any = {"label_mean": "running", "label_scale": "running"}
    heads = [jh.RegressionHead(name=name, **running) for name in "abc"] + [jh.RegressionHead(2, name="d", **running)]
    many, steps = jh.MultiHead(heads), jh.SequentialHeadWrapper(jh.RegressionHead(**running))
    rng = np.random.default_rng(7)
    labels = {name: rng.normal(i, 1 + i, (8, 1)).astype(np.float32) for i, name in enumerate("abc")}
    labels["d"] = rng.normal(9, 2, (8, 2)).astype(np.float32)
    y, mask = rng.normal(7, 3, (3, 4)).astype(np.float32), np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])

    @jax.jit
    def run(labels, y):
        first = many.update_state(many.init_state(), labels, np.zeros((8, 5), np.float32))
        features = {"sequence_length_mask": mask}
        second = steps.update_state(steps.init_state(), y, np.zeros((3, 4, 1), np.float32), features)
        logits = np.repeat(np.array([[0], [1]], np.float32), 5, -1)
        return many.predictions(logits, params=first), steps.predictions(logits[:, :1, None], params=second)

    found, of_steps = jax.device_get(run(labels, y))
    expected = {**labels, "steps": y[mask == 1][:, None]}
    for name, (zero, one) in {
        "steps": of_steps["predictions"][:, 0],
        **{name: found[name]["predictions"] for name in labels},
    }.items():
        np.testing.assert_allclose(zero, expected[name].astype(float).mean(0), rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(one - zero, expected[name].astype(float).std(0), rtol=1e-4, err_msg=name)


def test_bound_values_give_the_constant():
    labels, logits, weights, where = draw()
    state = update(first(), labels, logits, weights, where)
    best = RUNNING.bind(state).constant_logits(labels, weights, where)
    np.testing.assert_allclose(best, 0, atol=1e-3)


def test_label_statistics_are_those_of_a_standard_scaler():
    labels, _, weights, where = draw()
    fitted = scaler(seen())
    found: Any = jh.label_statistics(labels, weights, where)
    np.testing.assert_allclose(found.mean, fitted.mean_, rtol=1e-12)
    np.testing.assert_allclose(found.scale, np.sqrt(fitted.var_), rtol=1e-10)
    assert isinstance(found.mean, tuple)
    assert type(found.mean[0]) is type(found.scale[0]) is float
    one = jh.label_statistics(np.array([[1.0], [3]]))
    assert one == jh.label_statistics([1, 3]) == (2.0, 1.0)
    assert type(one.mean) is type(one.scale) is float
    assert jh.label_statistics([0.1] * 7).scale == 1
    of_targets = jh.label_statistics([[1.0, 9], [3, 5]], weights=[[1, 0], [1, 2]])
    assert of_targets == ((2.0, 5.0), (1.0, 1.0))


def test_identity():
    for head in (HEAD, RUNNING):
        assert eval(repr(head), {**vars(jh)}) == head == pickle.loads(pickle.dumps(head))
    assert repr(RUNNING) == "RegressionHead(label_dimension=2, label_mean='running', label_scale='running')"
    assert hash(jh.RegressionHead(label_mean=5)) == hash(jh.RegressionHead(label_mean=5.0))
    assert jh.RegressionHead().init_state() == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jh.RegressionHead(label_scale=0), "label_scale must be a number above 0; .*Given 0"),
        (lambda: jh.RegressionHead(label_scale=-1.5), "above 0.*Given -1.5"),
        (lambda: jh.RegressionHead(label_scale=1e-50), "above 0.*Given 1e-50"),
        (lambda: jh.RegressionHead(2, label_scale=(1, 0)), r"above 0, or 2 of them.*Given \(1, 0\)"),
        (lambda: jh.RegressionHead(2, label_mean=(1, 2, 3)), r"or 2 of them.*Given \(1, 2, 3\)"),
        (lambda: jh.RegressionHead(label_mean=(1, 2)), "must be a finite number; "),
        (lambda: jh.RegressionHead(label_mean=np.inf), "Given inf"),
        (lambda: jh.RegressionHead(label_mean=10**400), "label_mean must be"),
        (lambda: jh.RegressionHead(label_mean=True), "Given True"),
        (lambda: jh.RegressionHead(label_mean=cast(Any, np.zeros(2))), "label_mean is a static field"),
        (
            lambda: jh.RegressionHead(label_mean="running"),
            "both \"running\". Given label_mean='running', label_scale=None",
        ),
        (lambda: jh.RegressionHead(label_mean="mean", label_scale="mean"), 'both "running"'),
        (lambda: RUNNING.constant_logits(np.zeros((3, 2))), "head.bind"),
        (lambda: RUNNING.predictions(np.zeros((3, 2), np.float32)), "label_counts"),
        (lambda: jh.boosting.xgboost_objective(RUNNING), "label_counts"),
        (lambda: jh.label_statistics([1.0, np.nan]), "labels must be finite. Given nan"),
        (lambda: jh.label_statistics([1.0, 2], weights=[1, -1]), "not negative"),
        (lambda: jh.label_statistics([1.0, 2], where=[0, 0]), "weighs something"),
        (lambda: jh.label_statistics([]), "weighs something"),
        (lambda: jh.label_statistics(["a", "b"]), "labels must be numbers"),
        (lambda: jh.label_statistics(3.0), r"\[N\] or"),
        (lambda: jh.label_statistics([1.0, 2], weights=[1, 2, 3]), "weights"),
        (lambda: jax.eval_shape(jh.label_statistics, np.zeros(3)), "outside jit"),
    ],
)
def test_bad_values_are_told(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert len(str(caught.value)) <= 400


def test_labels_that_float32_cannot_tell_apart_are_refused():
    seconds = 1.7e9 + np.random.default_rng(0).uniform(0, 3000, 50)
    with pytest.raises(ValueError, match="Subtract the mean from the labels on the host"):
        jh.label_statistics(seconds)
    with pytest.raises(ValueError, match="Subtract the mean from the labels on the host"):
        jh.RegressionHead(label_mean=1.7e9, label_scale=900.0)
    with pytest.raises(ValueError, match="too large to be squared"):
        jh.label_statistics([1e200, 2e200])
    years = np.array([2015.0, 2016.0, 2018.0])
    np.testing.assert_allclose(jh.label_statistics(years), (years.mean(), years.std()), rtol=1e-12)
    assert jh.label_statistics([0.1 + 0.2, 0.3]).scale == 1.0
