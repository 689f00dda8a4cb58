"""Metric states beyond one histogram a head."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.metrics import roc_auc_score

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
    with pytest.raises(ValueError, match=r"keeps 2: \['a', 'b'\]"):
        metrics.curve("roc")
    with pytest.raises(ValueError, match="key='c'"):
        metrics.reliability(key="c")
    for key in "ab":
        fpr, tpr, _ = metrics.curve("roc", key)
        assert abs(np.trapezoid(tpr, fpr) - values[f"auc/{key}/t"]) < 1e-9
        assert metrics.reliability(key=key)[2].sum() == 4


def test_the_mend_is_for_the_histogram_that_is_too_coarse():
    labels = np.array([[1, 1], [0, 0]] * 2)
    logits = np.array([[1, 5.001], [-1, 5.002]] * 2, np.float32)
    text = repr(TwoScoresHead(name="t").measure(labels, logits))
    assert "auc/b/t in [0, 1]" in text
    assert "auc/a/t in" not in text
    grid = eval(text.partition("bins=")[2].partition(";")[0], {"jh": jh})
    assert 4.9 < grid.low < 5.001 < 5.002 < grid.high < 5.1


def test_all_scores_equal_is_an_auc_of_one_half():
    logits = np.full((4, 1), 0.7, np.float32)
    metrics = jh.BinaryClassHead().measure([0, 1, 1, 1], logits, weights=np.ones(4))
    assert metrics.compute()["auc"] == 0.5
    assert "equal no grid can tell apart" in repr(metrics)


# What is added up is added up exactly.


def decided_by_hand(labels, logits, weights):
    """Label mean, accuracy, precision and recall in float64."""
    y, z, w = (np.asarray(x, np.float64).ravel() for x in (labels, logits, weights))
    right, positive = (y == (z > 0)), z > 0
    return {
        "label/mean": (w * y).sum() / w.sum(),
        "accuracy": (w * right).sum() / w.sum(),
        "precision": (w * y * positive).sum() / (w * positive).sum(),
        "recall": (w * y * positive).sum() / (w * y).sum(),
        "accuracy_baseline": max((w * y).sum(), (w * (1 - y)).sum()) / w.sum(),
    }


def hinge(labels, logits):
    """A loss of one's own keeps the batch in one piece."""
    return jnp.maximum(0.0, 1.0 - (2.0 * labels - 1.0) * logits)


@functools.cache
def spread_over_devices(way):
    """`(labels, logits, weights) -> metrics` of rows on eight devices, by `jit` or by `shard_map`."""
    mesh, head = jax.make_mesh((8,), ("d",)), jh.BinaryClassHead()
    rows = NamedSharding(mesh, PartitionSpec("d"))

    def measure(y, z, w):
        metrics = head.measure(y, z, weights=w)
        return metrics if way == "jit" else metrics.psum("d")

    step = measure
    if way == "shard_map":
        step = jax.shard_map(measure, mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec())
    step = jax.jit(step)
    return lambda *batch: step(*jax.device_put(batch, rows))


@pytest.mark.parametrize("spread", [0.0, 0.05, 2.0])
@pytest.mark.parametrize("rows", [1000, pytest.param(2**20, marks=pytest.mark.slow)])
def test_fractional_weights_in_few_buckets_do_not_drift(rows, spread):
    """A running float32 sum of a million weights of 0.1 is off by 1 %."""
    rng = np.random.default_rng(5)
    labels = (rng.random((rows, 1)) < 0.3).astype(np.int32)
    logits = (0.5 + spread * rng.standard_normal((rows, 1))).astype(np.float32)
    weights = np.where(rng.random((rows, 1)) < 0.5, np.float32(0.1), np.float32(0.3))
    expected = decided_by_hand(labels, logits, weights)
    area = roc_auc_score(labels[:, 0], logits[:, 0], sample_weight=weights[:, 0].astype(np.float64))
    for metrics in (
        jh.BinaryClassHead().measure(labels, logits, weights=weights),
        jh.BinaryClassHead(loss_fn=hinge).measure(labels, logits, weights=weights),
        spread_over_devices("jit")(labels, logits, weights),
        spread_over_devices("shard_map")(labels, logits, weights),
    ):
        values = metrics.compute(bounds=True)
        for key, value in expected.items():
            np.testing.assert_allclose(values[key], value, rtol=2e-7, err_msg=key)
        assert values["auc/lower"] - 1e-7 <= area <= values["auc/upper"] + 1e-7


@pytest.mark.parametrize("weight", [1e-36, 1e-30, 3.0, 1e30, 1e38])
def test_weights_of_any_size(weight):
    labels, logits = np.array([0, 1, 1, 0]), np.array([[-1.0], [1.0], [2.0], [0.5]], np.float32)
    metrics = jh.BinaryClassHead().measure(labels, logits, weights=np.full(4, weight, np.float32) * [1, 0.5, 0.25, 1])
    values = metrics.compute()
    np.testing.assert_allclose([values["accuracy"], values["auc"]], [1.75 / 2.75, 1.0], rtol=1e-6)


@pytest.mark.parametrize(
    "bins",
    [
        jh.LogitGrid(),
        pytest.param(jh.LogitGrid(n=20_000), marks=pytest.mark.slow),
        pytest.param(jh.ThresholdGrid(200), marks=pytest.mark.slow),
    ],
    ids=repr,
)
@pytest.mark.parametrize("rows", [5, pytest.param(100_000, marks=pytest.mark.slow)])
def test_compute_inside_jit_is_compute_outside(rows, bins):
    rng = np.random.default_rng(6)
    head = jh.BinaryClassHead(bins=bins, thresholds=(0.1, 0.5))
    labels = rng.integers(0, 2, rows)
    logits = (2 * rng.standard_normal((rows, 1)) + labels[:, None]).astype(np.float32)
    weights = rng.random(rows).astype(np.float32)

    @jax.jit
    def measure(zero, weights):
        measured = head.measure(labels, logits, weights=weights)
        return measured, [metrics.compute(bounds=True) for metrics in (measured, zero + measured)]

    measured, computed = jax.device_get(measure(head.metrics(), weights))
    outside = measured.compute(bounds=True)
    for inside in computed:
        assert set(inside) == set(outside)
        for key, value in outside.items():
            np.testing.assert_allclose(inside[key], value, atol=5e-7, err_msg=key)
        assert inside["auc/upper"] <= 1


# What is not a metric is refused.


class ObservingHead(jh.Head):
    """A head that observes what it is told to."""

    seen: Callable[..., Any]
    logits_dimension = 3

    def losses(self, labels, logits):
        return (labels - logits) ** 2

    def observe(self, labels, logits):
        return {"seen": self.seen(labels, logits)}


@pytest.mark.parametrize(
    ("seen", "match"),
    [
        (lambda y, z: jh.Mean(z[..., 0]), r"shape \(1,\)"),
        (lambda y, z: jh.Mean(jnp.mean(z)), r"shape \(\)"),
        (lambda y, z: jh.Mean(z, count=z[..., 0]), r"shape \(1,\)"),
        (lambda y, z: jh.Mean(z[None]), r"shape \(1, 1, 3\)"),
        (lambda y, z: jh.Scores(y[..., 0], z[..., 0], jh.LogitGrid()), r"Scores of shape \(1,\)"),
        (lambda y, z: z, "must be an observation"),
    ],
    ids=["no_last_axis", "scalar", "count", "deep", "scores", "array"],
)
def test_observations_that_are_not_one_an_element_are_refused(seen, match):
    head = ObservingHead(seen)
    with pytest.raises(ValueError, match=r"ObservingHead\.observe: 'seen'") as error:
        head.metrics()
    assert re.search(match, str(error.value))


def test_the_average_loss_is_not_observed_twice():
    class TwiceHead(jh.Head):
        logits_dimension = 1

        def losses(self, labels, logits):
            return logits

        def observe(self, labels, logits):
            return {"average_loss": jh.Mean(logits)}

    with pytest.raises(ValueError, match="'average_loss' is kept by every head"):
        TwiceHead().metrics()


@pytest.mark.parametrize("size", [0, 2, 7])
def test_losses_of_another_size_are_refused(size):
    class WideHead(jh.Head):
        logits_dimension = 3

        def losses(self, labels, logits):
            return jnp.zeros((*logits.shape[:-1], size))

    with pytest.raises(ValueError, match=rf"\(4, 1\) or \(4, 3\). Given \(4, {size}\)"):
        WideHead().loss(jnp.zeros((4, 3)), jnp.zeros((4, 3)))


def test_scores_without_a_summary_have_their_areas():
    head = ObservingHead(lambda y, z: jh.Scores(y > 0, z, jh.LogitGrid()))
    labels, logits = np.array([[1.0, 0, 1], [0, 1, 0]], np.float32), np.array([[2.0, -1, 1], [-2, 3, -3]], np.float32)
    assert head.measure(labels, logits).compute()["seen/auc"] == 1
    assert "seen/auc_precision_recall" in repr(head.measure(labels, logits))


def test_metrics_of_other_leading_axes_do_not_add():
    head = jh.RegressionHead()
    one = head.measure([1.0], np.ones((1, 1)))
    stacked = {n: dataclasses.replace(one, state=np.stack([one.state] * n)) for n in (1, 3)}
    with pytest.raises(ValueError, match=r"\(3,\) and \(1,\)"):
        _ = stacked[3] + stacked[1]
    assert (head.metrics() + stacked[3]).compute()["average_loss"].shape == (3,)
    assert (stacked[3] + stacked[3]).state.shape[0] == 3


def test_strangers_of_the_same_repr_are_told_apart():
    def head():
        return jh.RegressionHead(loss_fn=lambda labels, logits: (labels - logits) ** 2)

    a, b = head(), head()
    if repr(a) != repr(b):
        a, b = (dataclasses.replace(h, loss_fn=_named(h.loss_fn)) for h in (a, b))
    assert repr(a) == repr(b)
    with pytest.raises(ValueError, match="two functions or classes of the same name"):
        _ = a.metrics() + b.metrics()


class _named:
    """A function whose repr hides its address."""

    def __init__(self, function):
        self.function = function

    def __call__(self, labels, logits):
        return self.function(labels, logits)

    def __repr__(self):
        return "squared"


def test_a_state_that_does_not_fit_its_head_is_refused():
    """A checkpoint that another configuration has written."""
    labels, logits = [0, 1], np.array([[0.5], [1.0]], np.float32)
    head, other = jh.BinaryClassHead(), jh.BinaryClassHead(thresholds=(0.3,))
    for one, two in ((head, other), (other, head)):
        wrong = dataclasses.replace(one.metrics(), state=two.metrics().state)
        for use in (
            wrong.compute,
            lambda wrong=wrong: wrong + wrong,
            lambda wrong=wrong, one=one: one.update_metrics(wrong, None, logits, labels),
            lambda wrong=wrong: wrong.curve("roc"),
        ):
            with pytest.raises(ValueError, match="does not fit its head"):
                use()
        assert "does not fit the head" in repr(wrong)


def test_metrics_of_more_than_one_value_are_printed():
    class PerTargetHead(jh.Head):
        logits_dimension = 2

        def losses(self, labels, logits):
            return (labels - logits) ** 2

        def observe(self, labels, logits):
            return {k: jh.Mean(logits[..., i : i + 1]) for i, k in enumerate("ab")}

        def summarize(self, seen):
            return {"each": seen["a"].xp.stack([seen["a"].mean, seen["b"].mean])}

    metrics = PerTargetHead().measure(np.zeros((2, 2)), np.array([[1.0, 5.0], [1.0, 7.0]]))
    assert metrics.compute()["each"].tolist() == [1, 6]
    assert "each          [1. 6.]" in repr(metrics)


@pytest.mark.parametrize(("axes", "lead"), [pytest.param("n", (3,), marks=pytest.mark.slow), ("b, s, t", (2, 1, 3))])
def test_metrics_and_losses_of_any_number_of_rows_are_exported(axes, lead):
    from jax import export

    heads = {1: jh.BinaryClassHead(), 3: jh.RegressionHead(3)}
    sizes = export.symbolic_shape(axes)

    def one(n, labels, logits):
        return jax.grad(heads[n].loss, argnums=1)(labels, logits), heads[n].measure(labels, logits).state

    def run(each):
        return {n: one(n, *rows) for n, rows in each.items()}

    rng, given = np.random.default_rng(0), {}
    for n in heads:
        given[n] = rng.integers(0, 2, (*lead, n)).astype(np.float32), rng.normal(size=(*lead, n)).astype(np.float32)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*sizes, x.shape[-1]), x.dtype), given)
    exported = export.export(jax.jit(run))(shapes)
    chex.assert_trees_all_close(exported.call(given), jax.jit(run)(given), rtol=1e-6)


def test_a_donated_state_says_so():
    head = jh.RegressionHead()
    state = head.metrics()
    jax.jit(lambda metrics: metrics + metrics, donate_argnums=0)(state)
    assert "deleted" in repr(state)


@pytest.mark.parametrize("signs", [np.asarray, np.abs], ids=["both", "positive"])
@pytest.mark.parametrize("bins", [jh.ThresholdGrid(201), jh.ThresholdGrid(200)], ids=repr)
def test_scores_next_to_zero_are_printed_and_the_mend_mends(bins, signs):
    """Positive ones lie between z > 0 and float32 p > 0.5, a bin of no width."""
    rng = np.random.default_rng(7)
    labels, logits = rng.integers(0, 2, 1000), signs(1e-9 * rng.standard_normal((1000, 1))).astype(np.float32)
    metrics = jh.BinaryClassHead(bins=bins, thresholds=(0.5,)).measure(labels, logits)
    grid = eval(repr(metrics).partition("with bins=")[2].partition(";")[0], {"jh": jh})
    assert grid.low < -1e-9 < 1e-9 < grid.high < grid.low + 0.05


def test_a_bad_label_beside_a_nan_logit_is_left_out():
    head = jh.BinaryClassHead()
    labels, logits = np.array([1, 0, 7], np.float32), np.array([[1.0], [-1.0], [np.nan]], np.float32)
    labels, logits = jax.device_put((labels, logits))  # on the device nothing is refused
    with jax.debug_nans(True):
        metrics = head.measure(labels, logits)
    with pytest.warns(jh.BadInputWarning, match="1 elements"):
        assert metrics.compute()["auc"] == 1


def test_metrics_pass_no_gradient_on():
    head = jh.BinaryClassHead()
    labels = np.array([1, 0], np.float32)

    def loss(logits):
        metrics = head.measure(labels, logits, weights=logits[:, 0] ** 2)
        return head.loss(labels, logits) + metrics.state.sum(), metrics

    @jax.jit
    def gradients(logits):
        return jax.grad(loss, has_aux=True)(logits)[0], jax.grad(lambda z: head.loss(labels, z))(logits)

    np.testing.assert_array_equal(*gradients(np.array([[1.0], [-1.0]], np.float32)))


class CountedHead(jh.Head):
    """A count of its own for each of eight targets."""

    logits_dimension = 8

    def losses(self, labels, logits):
        return jh.Term((labels - logits) ** 2, 1.0 + (labels > 0).astype(jnp.float32))


@pytest.mark.parametrize("axes", [jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto])
def test_the_last_axis_may_be_sharded(axes):
    mesh = jax.make_mesh((2, 4), ("a", "b"), (axes, axes))
    rng = np.random.default_rng(8)
    labels, logits = (rng.standard_normal((16, 8)).astype(np.float32) for _ in range(2))
    weights = rng.random((16, 1)).astype(np.float32)
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("a", "b")))
    rows = jax.device_put(weights, NamedSharding(mesh, PartitionSpec("a")))
    squares, counts = (labels - logits).astype(np.float64) ** 2, np.where(labels > 0, 2.0, 1.0)
    heads = {
        jh.RegressionHead(8, loss_reduction="mean"): np.average(squares.mean(-1), weights=weights[:, 0]),
        CountedHead(loss_reduction="mean"): (weights * squares).sum() / (weights * counts).sum(),
    }

    @jax.jit
    def measure(y, z, w):
        return [(head.measure(y, z, weights=w), head.loss(y, z, weights=w)) for head in heads]

    found = measure(put(labels), put(logits), rows)
    for (metrics, loss), expected in zip(found, heads.values(), strict=True):
        np.testing.assert_allclose([metrics.compute()["average_loss"], loss], expected, rtol=1e-6)


@pytest.mark.parametrize("range_", [(-3e38, 3e38), (0, np.inf), (1, 1), (2, 1), (np.nan, 1)])
def test_grids_need_a_range(range_):
    with pytest.raises(ValueError, match="low < high"):
        jh.LogitGrid(*range_)


def test_grids_take_numpy_integers():
    assert jh.LogitGrid(n=np.int64(5)) == jh.LogitGrid(n=5)  # pyright: ignore[reportArgumentType]  # what is tested
    assert repr(jh.ThresholdGrid(np.int32(5))) == "ThresholdGrid(n=5)"  # pyright: ignore[reportArgumentType]
