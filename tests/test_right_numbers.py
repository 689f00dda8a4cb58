"""Right numbers where users met wrong ones: kinds of faults, each on inputs of several shapes."""

import dataclasses
import json
import pickle
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
import sklearn.metrics
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxheads as jh
from jaxheads.engine import gathering

M: Any = jh.metrics
sk: Any = sklearn.metrics
NAN = float("nan")


# 1. Masked rows do not reach learned fields.


class WeibullHead(jh.Head):
    """The logarithm of a label has no finite slope at 0, the fill of masked rows."""

    logits_dimension = 1
    label_spec = jh.LabelSpec(low=0)
    coupling = "row"
    log_k: Any = jh.learned(lambda head, key: jnp.float32(0.2))

    def losses(self, labels, logits):
        k = jnp.exp(self.log_k)
        z = k * (jnp.log(labels) - logits)
        return jnp.exp(z) - z - self.log_k


class PowerHead(jh.Head):
    """The power of a logit has no finite slope in its exponent at 0, the fill of masked logits."""

    logits_dimension = 2
    coupling = "row"
    power: Any = jh.learned(lambda head, key: jnp.float32(1.5))

    def losses(self, labels, logits):
        return labels * jnp.abs(logits) ** self.power


class RateHead(jh.Head):
    """Neither has the power of a column of features, which is 1 in masked rows."""

    logits_dimension = 1
    coupling = "row"
    power: Any = jh.learned(lambda head, key: jnp.float32(0.5))

    def losses(self, labels, logits, features):
        return (labels - logits * jnp.abs(features["t"].reshape(logits.shape) - 1) ** self.power) ** 2


class PairsHead(jh.Head):
    """Rows look at each other, and labels have a logarithm."""

    logits_dimension = 1
    label_spec = jh.LabelSpec(low=0)
    coupling = "batch"
    scale: Any = jh.learned(lambda head, key: jnp.float32(1.0))

    def losses(self, labels, logits, rows):
        y, z, w = (rows.devices.all(x) for x in (labels, logits, rows.weights))
        gaps = (self.scale * (jnp.log(labels).reshape(-1, 1) - jnp.log(y).T) - logits.reshape(-1, 1) + z.T) ** 2
        return (gaps @ w).reshape(labels.shape)


def learned_gradient(head, labels, logits, place=None, **rest):
    params = jax.device_put(head.init(jax.random.key(0)), place)

    def loss(params):
        return head.loss(labels, logits, params=params, **rest)

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("head", [WeibullHead(), PowerHead(), RateHead(), PairsHead()], ids=lambda h: type(h).__name__)
@pytest.mark.parametrize("hidden", [[1], [0, 2, 3], pytest.param([0, 1, 2], marks=pytest.mark.slow)])
def test_masked_rows_do_not_reach_learned_fields(head, hidden):
    rng = np.random.default_rng(0)
    labels = rng.uniform(1, 3, (4, head.label_spec.size)).astype(np.float32)
    logits = rng.normal(size=(4, head.logits_dimension)).astype(np.float32)
    features = {"t": rng.uniform(2, 3, 4).astype(np.float32)}
    kept = np.setdiff1d(np.arange(4), hidden)
    garbage = np.array(labels), np.array(logits)
    for array in garbage:
        array[hidden] = NAN
    expected = learned_gradient(head, labels[kept], logits[kept], features={"t": features["t"][kept]})
    for how in ({"where": np.isin(np.arange(4), kept)}, {"weights": np.isin(np.arange(4), kept) * np.float32(1)}):
        reduced = dataclasses.replace(head, loss_reduction="mean")
        value, gradient = learned_gradient(reduced, *garbage, features=features, **how)
        np.testing.assert_allclose(value, expected[0], rtol=2e-6)
        for found, true in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected[1]), strict=True):
            np.testing.assert_allclose(found, true, rtol=1e-5)


def test_the_first_case_is_right():
    class First(jh.Head):
        logits_dimension = 1
        label_spec = jh.LabelSpec(low=0)
        coupling = "row"
        log_k: Any = jh.learned(lambda head, key: jnp.float32(0.0))

        def losses(self, labels, logits):
            return jnp.exp(self.log_k) * jnp.log(labels) + logits

    labels, logits = np.array([np.e, 5.0], np.float32), np.ones((2, 1), np.float32)
    value, gradient = learned_gradient(First(), labels, logits, where=np.array([True, False]))
    np.testing.assert_allclose([value, gradient["log_k"]], [2.0, 1.0], rtol=1e-6)
    padded = jh.pad_batch({"labels": labels[:1], "features": {}}, 3)
    value, gradient = learned_gradient(First(), padded["labels"], np.ones((3, 1), np.float32), where=padded["where"])
    np.testing.assert_allclose([value, gradient["log_k"]], [2.0, 1.0], rtol=1e-6)


class ShiftedHead(jh.Head):
    """The formula is undefined at all labels and logits up to a number that only the data know."""

    logits_dimension = 1
    coupling = "row"
    power: Any = jh.learned(lambda head, key: jnp.float32(0.5))

    def losses(self, labels, logits):
        return jnp.log(labels - 2000) ** self.power + (logits - 40) ** self.power


@pytest.mark.parametrize("n", [2, 8, 32, 128, 7])
def test_masked_rows_are_copies_of_live_ones_near_by(n):
    """Of every eight rows one is there; the formula has no value at any fill."""
    labels, logits, kept = shifted_rows(n, np.arange(n) % 8 == 1)
    value, gradient = learned_gradient(ShiftedHead(), labels, logits, where=kept)
    assert_live_rows_alone(value, gradient, labels, logits, kept)


def shifted_rows(n: int, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    labels, logits = rng.uniform(2002, 2020, (n, 1)).astype(np.float32), rng.uniform(41, 50, (n, 1)).astype(np.float32)
    return np.where(kept[:, None], labels, NAN).astype(np.float32), np.where(kept[:, None], logits, 0), kept


def assert_live_rows_alone(value, gradient, labels, logits, kept) -> None:
    y, z = np.log(labels[kept].astype(np.float64) - 2000), logits[kept].astype(np.float64) - 40
    np.testing.assert_allclose(value, np.mean(y**0.5 + z**0.5), rtol=2e-6)
    np.testing.assert_allclose(gradient["power"], np.mean(y**0.5 * np.log(y) + z**0.5 * np.log(z)), rtol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(("devices", "rows"), [(2, 4), (4, 8), (8, 4)])
def test_masked_rows_are_copies_of_the_live_ones_of_a_device(devices, rows, check_vma):
    """Inside `shard_map` all rows of a device may be copied, also at the padded end of a batch."""
    labels, logits, kept = shifted_rows(devices * rows, np.arange(devices * rows) % rows == 1)
    P, mesh = PartitionSpec, jax.make_mesh((devices,), ("d",), (AxisType.Auto,), devices=jax.devices()[:devices])

    def step(params, labels, logits, where):
        def loss(params):
            return ShiftedHead().loss(labels, logits, where=where, params=params, axis_name="d")

        value, gradient = jax.value_and_grad(loss)(params)
        return value, gradient if check_vma else jax.lax.pmean(gradient, "d")

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("d"), P("d"), P("d")), out_specs=P(), check_vma=check_vma)
    params = ShiftedHead().init(jax.random.key(0))
    value, gradient = jax.jit(mapped)(params, labels, logits, kept)
    assert_live_rows_alone(value, gradient, labels, logits, kept)


@pytest.mark.parametrize(("shape", "layout"), [((2, 4), "a"), ((1, 8), "a"), ((8, 1), "a"), ((2, 4), ("a", "b"))])
def test_masked_rows_are_copies_of_live_ones_near_by_on_two_axes(shape, layout):
    labels, logits, kept = shifted_rows(64, np.arange(64) % 8 == 1)
    mesh = jax.make_mesh(shape, ("a", "b"), (AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        spread = jax.device_put((labels, logits, kept), NamedSharding(mesh, PartitionSpec(layout)))
        whole = NamedSharding(mesh, PartitionSpec())
        value, gradient = learned_gradient(ShiftedHead(), spread[0], spread[1], whole, where=spread[2])
    assert_live_rows_alone(value, gradient, labels, logits, kept)


@pytest.mark.parametrize("n", [4, 32, 4096])
def test_a_padded_end_of_any_length_is_copies_on_one_device(n):
    labels, logits, kept = shifted_rows(n, np.arange(n) < n // 2)
    value, gradient = learned_gradient(ShiftedHead(), labels, logits, where=kept)
    assert_live_rows_alone(value, gradient, labels, logits, kept)
    value, gradient = learned_gradient(ShiftedHead(), *(np.flip(x, 0) for x in (labels, logits)), where=kept[::-1])
    assert_live_rows_alone(value, gradient, labels, logits, kept)


def test_a_batch_on_one_device_is_cut_into_few_blocks():
    """What is on no mesh has a mesh of no devices: its batches were cut into blocks of one row."""
    from jaxheads.numerics import meshes

    assert meshes.count_devices(jnp.zeros(3)) == 1
    mesh = jax.make_mesh((4, 2), ("rows", "b"), (AxisType.Explicit,) * 2)
    for layout, count in ((("rows", "b"), 8), ("rows", 4), (None, 1)):
        placed = jax.device_put(jnp.zeros(8), NamedSharding(mesh, PartitionSpec(layout)))
        assert jax.jit(meshes.count_devices)(placed) == count
    head = jh.RegressionHead().with_metrics(M.R2Score())
    rows = jnp.zeros((2**16, 1))
    compiled = jax.jit(lambda rows: head.measure(rows, rows).state).lower(rows).compile()
    flops: Any = compiled.cost_analysis()
    assert flops["flops"] < 100 * len(rows)


@pytest.mark.parametrize("head", [WeibullHead(), PowerHead(), PairsHead()], ids=lambda h: type(h).__name__)
def test_a_batch_without_rows_has_no_gradient(head):
    rows = np.zeros((3, 1), np.float32), np.zeros((3, head.logits_dimension), np.float32)
    labels = np.broadcast_to(rows[0], (3, head.label_spec.size))
    value, gradient = learned_gradient(head, labels, rows[1], where=np.zeros(3, bool))
    assert (float(value), float(jax.tree.leaves(gradient)[0])) == (0, 0)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_masked_rows_do_not_reach_learned_fields_on_a_mesh(axis_type):
    head, rng = WeibullHead(), np.random.default_rng(1)
    labels, logits = rng.uniform(1, 3, (8, 1)).astype(np.float32), rng.normal(size=(8, 1)).astype(np.float32)
    where = np.array([0, 0, 0, 1, 0, 1, 1, 0], bool)
    expected = learned_gradient(head, labels[where], logits[where])
    mesh = jax.make_mesh((4,), ("rows",), (axis_type,), devices=jax.devices()[:4])
    spread = jax.device_put((labels, logits, where), NamedSharding(mesh, PartitionSpec("rows")))
    whole = NamedSharding(mesh, PartitionSpec())
    value, gradient = learned_gradient(head, spread[0], spread[1], whole, where=spread[2])
    np.testing.assert_allclose(value, expected[0], rtol=2e-6)
    np.testing.assert_allclose(gradient["log_k"], expected[1]["log_k"], rtol=1e-5)


def test_entries_that_are_missing_do_not_reach_learned_fields():
    """By entry, with a column that no row has."""

    class Columns(jh.Head):
        logits_dimension = 3
        label_spec = jh.LabelSpec(3, low=0)
        coupling, per_logit_where = "row", True
        scale: Any = jh.learned(lambda head, key: jnp.float32(1.0))

        def losses(self, labels, logits):
            return (self.scale * jnp.log(labels) - logits) ** 2

    labels = np.array([[1.5, 0, 0], [0, 2.5, 0], [2.0, 3.0, 0]], np.float32)
    logits, where = np.ones((3, 3), np.float32), labels > 0
    value, gradient = learned_gradient(Columns(), labels, logits, where=where)
    gaps = np.log(labels[where].astype(np.float64)) - 1
    np.testing.assert_allclose(value, np.mean(gaps**2), rtol=2e-6)
    np.testing.assert_allclose(gradient["scale"], np.mean(2 * gaps * (gaps + 1)), rtol=1e-5)


# 3. What is predicted perfectly is told so.


@pytest.mark.slow
@pytest.mark.rounding
def test_perfect_and_nearly_perfect_predictions_are_told_apart():
    head = jh.RegressionHead().with_metrics(M.R2Score(), M.ExplainedVariance())
    compute, rng = jax.jit(lambda metrics: metrics.compute()), np.random.default_rng(5)
    for spread in (0.1, 1, 3):
        labels = rng.lognormal(0, spread, (1024, 1)).astype(np.float32)
        weights = rng.uniform(0, 2, (1024, 1)).astype(np.float32)
        for scale in (1, 1e-4, 1e6):
            scaled = (labels * scale).astype(np.float32)
            values = head.measure(scaled, scaled, weights=weights).compute()
            assert (values["r2_score"], values["explained_variance"]) == (1, 1)
            for error in (1e-3, 0.1):
                near = (scaled * (1 + error * rng.standard_normal((1024, 1)))).astype(np.float32)
                metrics = head.measure(scaled, near, weights=weights)
                inside = jax.device_get(compute(metrics))
                y, p, w = (x[:, 0].astype(np.float64) for x in (scaled, near, weights))
                for values in (metrics.compute(), inside):
                    np.testing.assert_allclose(values["r2_score"], sk.r2_score(y, p, sample_weight=w), atol=1e-7)
                    assert values["r2_score"] <= values["explained_variance"] <= 1


# 4. What bins leave open is told, and most scores fit.


def binary_scores(shift: float, spread: float, gap: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = (rng.random(2000) < 0.3).astype(np.int32)
    return labels, (rng.normal(size=2000) * spread + shift + gap * labels).astype(np.float32)[:, None]


@pytest.mark.parametrize(
    ("shift", "spread", "gap"), [(18, 5, 7), (-60, 20, 10), (-700, 230, 150), (0, 2, 1), (200, 60, 40)]
)
def test_most_scores_fit_the_default_bins(shift, spread, gap):
    labels, logits = binary_scores(shift, spread, gap)
    values = jh.BinaryClassHead().measure(labels, logits).compute(bounds=True)
    exact = sk.roc_auc_score(labels, logits[:, 0])
    np.testing.assert_allclose(values["auc"], exact, atol=1e-3)
    assert values["auc/lower"] - 1e-6 <= exact <= values["auc/upper"] + 1e-6
    assert values["auc/upper"] - values["auc/lower"] < 2e-2


def test_the_default_bins_are_counted_exactly():
    """Every edge, the numbers beside it, and numbers of every size."""
    from jaxheads.numerics import edges

    at = np.asarray(edges.list_growing(), np.float32)
    assert (np.diff(at) > 0).all()
    assert (at[0], at[-1], len(at)) == (-1024, 1024, 2433)
    rng = np.random.default_rng(0)
    sizes = (rng.standard_normal(20_000) * 10.0 ** rng.uniform(-40, 37, 20_000)).astype(np.float32)
    ends = np.array([0, -0.0, np.inf, -np.inf], np.float32)
    x = np.concatenate([at, np.nextafter(at, np.float32(np.inf)), np.nextafter(at, np.float32(-np.inf)), sizes, ends])
    found = np.asarray(jax.jit(lambda x: edges.locate_growing(x, (0.3,)))(x))
    flushed = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)
    np.testing.assert_array_equal(found, np.searchsorted(at, flushed, side="left") + (x > np.float32(0.3)))
    assert edges.locate_growing(jnp.float32(NAN)[None], ()).tolist() == [0]


@pytest.mark.parametrize("shift", [-6.9, 3.0])
def test_compute_warns_where_the_text_does(shift):
    labels, logits = binary_scores(shift, 1e-4, 1e-4)
    metrics = jh.BinaryClassHead().measure(labels, logits)
    with pytest.warns(jh.GridWarning, match=r"auc in \[0(.|\n)*Mend it with bins=jh\.LogitGrid"):
        metrics.compute()
    assert "Mend it with bins=jh.LogitGrid" in repr(metrics)
    # The bins of the state tell where scores lie to a 64th: the second piece of advice is finer.
    for _ in range(2):
        advice = repr(metrics).split("bins=")[-1].split(";")[0]
        metrics = jh.BinaryClassHead(bins=eval(advice, {"jh": jh})).measure(labels, logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = metrics.compute()["auc"]
    np.testing.assert_allclose(found, sk.roc_auc_score(labels, logits[:, 0]), atol=5e-3)


def test_slices_and_curves_warn_of_coarse_bins_and_not_of_few_rows():
    labels, logits = binary_scores(3.0, 1e-4, 1e-4)
    head, sides = jh.BinaryClassHead(slices=jh.Slices("side", 2)), {"side": np.arange(2000) % 2}
    metrics = head.measure(labels, logits, features=sides)
    with pytest.warns(jh.GridWarning, match=r"auc in \[0(.|\n)*Mend it with bins=jh\.LogitGrid"):
        metrics.by_slice()
    with pytest.warns(jh.GridWarning, match=r"auc in \[0(.|\n)*Mend it with bins=jh\.LogitGrid"):
        metrics.curve("roc", slice=1)
    close = np.where(np.arange(2000) < 300, logits[:, 0], 4 * np.random.default_rng(1).normal(size=2000))[:, None]
    metrics = head.measure(labels, close, features={"side": (np.arange(2000) < 300).astype(int)})
    for read in (metrics.by_slice, lambda: metrics.curve("roc", slice=1)):
        with pytest.warns(jh.GridWarning, match="The grid is too coarse for these scores: auc"):
            read()
    metrics.compute(bounds=True)
    labels, logits = binary_scores(0.0, 2.0, 1.0)
    few = {"side": np.where(np.arange(2000) < 1998, 0, 1)}  # two rows with one score, of either label
    labels[-2:], logits[-2:] = [0, 1], 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = head.measure(labels, logits, features=few)
        assert metrics.by_slice()["auc"][1] == 0.5
        metrics.curve("pr", slice=1)


# 5. The interval of average precision closes.


@pytest.mark.parametrize("n", [7, 150])
def test_average_precision_has_no_interval_where_no_bin_is_shared(n):
    rng = np.random.default_rng(n)
    logits = rng.permutation(np.linspace(-6, 6, n, dtype=np.float32))[:, None]
    labels = (rng.random(n) < 1 / (1 + np.exp(-logits[:, 0]))).astype(np.int32)
    weights = rng.choice(np.array([0.5, 1, 3], np.float32), n)
    metrics = jh.BinaryClassHead().with_metrics(M.AveragePrecision()).measure(labels, logits, weights=weights)
    values = metrics.compute(bounds=True)
    exact = sk.average_precision_score(labels, logits[:, 0], sample_weight=weights)
    for end in ("", "/lower", "/upper"):
        np.testing.assert_allclose(values[f"average_precision{end}"], exact, rtol=2e-6)


def test_scores_that_are_tied_are_one_score():
    labels = np.array([1, 1, 1, 0, 0, 1, 0], np.int32)
    logits = np.array([3, 3, 3, 3, 2, 1, 0], np.float32)[:, None]
    metrics = jh.BinaryClassHead().with_metrics(M.AveragePrecision()).measure(labels, logits)
    values = metrics.compute(bounds=True)
    exact = sk.average_precision_score(labels, logits[:, 0])
    np.testing.assert_allclose(values["average_precision"], exact, rtol=1e-6)
    # Whether the negative at 3 is tied with the positives is not known: it may come first.
    np.testing.assert_allclose(values["average_precision/lower"], exact, rtol=1e-6)


# 6. Means take what a class counts as. 7. Many classes.


def test_macro_averages_take_what_is_undefined():
    labels, predicted = np.array([0, 1, 2, 2]), np.array([0, 1, 1, 1])
    head = jh.MultiClassHead(3).with_metrics(M.Precision(average="macro"), M.MeanIoU(), M.FBeta(average="weighted"))
    metrics = head.measure(labels, np.eye(3, dtype=np.float32)[predicted])
    for zero, expected in ((0.0, (1 + 1 / 3) / 3), (1.0, (2 + 1 / 3) / 3), (NAN, (1 + 1 / 3) / 2)):
        values = metrics.compute(undefined=zero)
        np.testing.assert_allclose(values["precision_macro"], expected, rtol=1e-6)
        precision = sk.precision_score(labels, predicted, average="macro", zero_division=zero)
        np.testing.assert_allclose(values["precision_macro"], precision, rtol=1e-6)
    inside = jax.jit(lambda m: m.compute(undefined=0.0))(metrics)
    np.testing.assert_allclose(inside["precision_macro"], (1 + 1 / 3) / 3, rtol=1e-6)


def test_means_over_targets_and_areas_take_it_too():
    labels = np.array([[0, 0], [1, 0], [1, 0]])
    logits = np.array([[-1, 0.5], [2, 0.3], [-2, 0.1]], np.float32)
    head = jh.MultiLabelHead(2).with_metrics(M.RocAuc(average="macro"), M.Recall(average="macro"))
    values, zeros = (head.measure(labels, logits).compute(undefined=x) for x in (NAN, 0.0))
    for key in ("auc_macro", "recall_macro"):
        np.testing.assert_allclose(zeros[key], values[key] / 2, rtol=1e-6)
    flat = jh.RegressionHead(2).with_metrics(M.R2Score())
    values, zeros = (flat.measure(labels, logits).compute(undefined=x)["r2_score"] for x in (NAN, 0.0))
    np.testing.assert_allclose(zeros, values / 2, rtol=1e-6)


def test_an_interval_of_replicas_is_that_of_the_convention():
    head = jh.MultiClassHead(3, bootstrap=jh.Bootstrap(50)).with_metrics(M.Precision(average="macro"))
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 3, 60), rng.integers(0, 2, 60)
    metrics = head.measure(labels, np.eye(3, dtype=np.float32)[predicted], key=jax.random.key(0))
    values = metrics.compute(undefined=0.0, confidence=0.9)
    assert values["precision_macro/ci_lower"] < values["precision_macro"] < values["precision_macro/ci_upper"]


def test_macro_metrics_of_many_classes_are_linear():
    begun = time.process_time()
    recall = jh.MultiClassHead(200_000, extra_metrics=[M.Recall(average="macro"), M.BalancedAccuracy(), M.CohenKappa()])
    assert time.process_time() - begun < 5  # a minute, and 14 GB, for a tenth of the classes
    assert recall.metrics().state.shape[0] < 4 * 200_000
    for metric in (M.ConfusionMatrix(), M.CohenKappa(weights="linear")):
        with pytest.raises(ValueError, match=r"a table of all pairs of 20000 classes: 3\.2 GB"):
            jh.MultiClassHead(20_000, extra_metrics=[metric])
    begun = time.process_time()
    jh.MultiClassHead(4000, extra_metrics=[M.ConfusionMatrix()])
    jh.MultiClassHead(200_000, extra_metrics=[M.Support()])
    assert time.process_time() - begun < 10


@pytest.mark.parametrize(
    "make",
    [
        lambda: jh.MultiClassHead(4096, extra_metrics=[M.ConfusionMatrix()], slices=jh.Slices("s", 50)),
        lambda: jh.MultiLabelHead(100_000, extra_metrics=[M.PrAuc(average="macro")]),
    ],
    ids=["slices", "histograms"],
)
def test_a_state_that_fits_nowhere_is_refused(make):
    with pytest.raises(ValueError, match=r"GB of state(.|\n)*The most is 2\.1 GB(.|\n)*take fewer"):
        make()


@pytest.mark.parametrize("rows", [60, pytest.param(40_000, marks=pytest.mark.slow)])
def test_counts_are_those_of_the_table(rows):
    rng, n = np.random.default_rng(rows), 5
    labels, logits = rng.choice([0, 1, 3, 4], rows), rng.normal(size=(rows, n)).astype(np.float32)
    logits[:, 4] -= 9
    logits[::7, 0] = NAN
    weights = rng.choice(np.array([0, 0.5, 1, 2], np.float32), rows)
    metrics = [
        cls(average=average)
        for cls in (M.Precision, M.Recall, M.FBeta, M.IoU, M.Specificity)
        for average in ("macro", "weighted", "micro", None)
    ]
    metrics += [M.Support(), M.BalancedAccuracy(), M.CohenKappa(), M.MatthewsCorrcoef(), M.MeanIoU()]
    head = jh.MultiClassHead(n).with_metrics(*metrics)
    features = {"g": rng.integers(-1, 2, rows)}
    for slices in (None, jh.Slices("g", 2)):
        sliced = dataclasses.replace(head, slices=slices)
        counted, table = (
            h.measure(labels, logits, features, weights=weights)
            for h in (sliced, sliced.with_metrics(M.ConfusionMatrix()))
        )
        assert counted.state.shape[0] < table.state.shape[0]
        pairs = [(counted.compute(), table.compute())]
        pairs += [(counted.by_slice(), table.by_slice())] if slices else []
        for few, all_ in pairs:
            for key, value in few.items():
                if key != "slice":
                    np.testing.assert_allclose(value, all_[key], rtol=2e-6, err_msg=key)


def test_metrics_of_spreads_of_no_rows():
    head = jh.RegressionHead().with_metrics(M.R2Score(), M.PearsonCorrelation())
    nothing = head.measure(np.zeros(0, np.float32), np.zeros((0, 1), np.float32))
    assert np.isnan(nothing.compute()["r2_score"])
    some = head.measure([1.0, 2.0], [[1.0], [2.0]])
    assert (nothing + some).compute()["r2_score"] == 1


# 9. Weights of any size. 10. Calibration of the predicted class, and states in stacks. 11. Weights as a mask.


def test_weights_that_are_all_tiny_are_refused():
    labels, logits = np.array([0, 1, 1]), np.array([[1.0], [2.0], [-1.0]], np.float32)
    weights = np.array([1.0, 2, 3]) * 1e-38
    mean = jh.BinaryClassHead(loss_reduction="mean")
    for call in (mean.loss, mean.measure, jh.BinaryClassHead().loss):
        with pytest.raises(ValueError, match=r"must not all be tiny(.|\n)*Multiply all by one number"):
            call(labels, logits, weights=weights)
    rows = jnp.asarray(labels), jnp.asarray(logits), jnp.asarray(weights * 4, jnp.float32)
    value, gradient = jax.jit(jax.value_and_grad(lambda z: mean.loss(rows[0], z, weights=rows[2])))(rows[1])
    assert np.isnan(value)
    assert np.isnan(gradient).all()
    many = [np.repeat(x, 4000, axis=0) for x in rows]  # their sum is large enough
    assert np.isnan(jax.jit(lambda labels, logits, weights: mean.loss(labels, logits, weights=weights))(*many))
    with pytest.warns(jh.BadInputWarning, match="add up to"):
        jax.jit(lambda *a: mean.measure(a[0], a[1], weights=a[2]))(*rows).compute()
    # One weight of a usual size, and the tiny ones add nothing that could be seen.
    some = np.array([1.0, 1e-38, 1e-38])
    np.testing.assert_allclose(mean.loss(labels, logits, weights=some), np.log1p(np.exp(1.0)), rtol=1e-6)


def test_reliability_of_many_classes_is_that_of_the_predicted_class():
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 4, 500), rng.normal(size=(500, 4)).astype(np.float32)
    top = jax.nn.softmax(logits, -1).max(-1)
    right = np.argmax(logits, -1) == labels
    bins = np.minimum((np.asarray(top) * 10).astype(int), 9)
    expected = [
        (top[bins == b].mean(), right[bins == b].mean(), (bins == b).sum()) for b in range(10) if (bins == b).any()
    ]
    head = jh.MultiClassHead(4).with_metrics(M.ExpectedCalibrationError(10))
    # The second head has a histogram too, of each class against all others.
    for beside in ((), (M.OneVsRestAuc(),)):
        metrics = head.with_metrics(*beside).measure(labels, logits)
        np.testing.assert_allclose(np.transpose(metrics.reliability(10)), expected, rtol=1e-5)
        with pytest.raises(ValueError, match=r"ExpectedCalibrationError\(12\)"):
            metrics.reliability(12)


def test_a_stack_of_states_is_told():
    head = jh.BinaryClassHead()
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 2, (3, 50)), rng.normal(size=(3, 50, 1)).astype(np.float32)
    parts = [head.measure(*rows) for rows in zip(labels, logits, strict=True)]
    stacked = dataclasses.replace(parts[0], state=np.stack([part.state for part in parts]))
    with pytest.warns(jh.StackedWarning, match=r"several states in one, \(3,\)(.|\n)*metrics.sum\(\)"):
        assert stacked.compute()["auc"].shape == (3,)


def test_weights_that_look_like_a_mask_are_told_once(monkeypatch):
    labels, logits = np.array([1.0, 2.0, 9.0]), np.zeros((3, 1), np.float32)
    calls = [
        (lambda: jh.RegressionHead().loss(labels, logits, weights=[1, 1, 0]), True),
        (lambda: jh.RegressionHead(weight_column="w").loss(labels, logits, {"w": np.array([1.0, 0, 1])}), True),
        (lambda: jh.RegressionHead().loss(labels, logits, weights=[1, 1, 1]), False),
        (lambda: jh.RegressionHead().loss(labels, logits, weights=[1, 2, 0]), False),
        (lambda: jh.RegressionHead().loss(labels, logits, weights=[1, 1, 0], where=[1, 1, 0]), False),
        (lambda: jh.RegressionHead(loss_reduction="mean").loss(labels, logits, weights=[1, 1, 0]), False),
        (lambda: jh.RegressionHead().measure(labels, logits, weights=[1, 1, 0]), False),
    ]
    for call, told in calls:
        monkeypatch.setattr(gathering, "_told_of_mask", [])
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            call()
            call()
        assert [x.category for x in found] == [jh.MaskWarning] * told
        if told:
            assert "where=" in str(found[0].message)
            assert '"mean"' in str(found[0].message)
            assert "filterwarnings" in str(found[0].message)


# 19. What comes out goes into files.


def test_values_go_into_json_and_data_frames():
    head = jh.MultiClassHead(3, slices=jh.Slices("g", 2, names=("a", "b"))).with_metrics(M.Recall(average=None))
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 3, 40), rng.normal(size=(40, 3)).astype(np.float32)
    features = {"g": np.array(["a", "b"])[rng.integers(0, 2, 40)]}
    values: Any = head.measure(labels, logits, features).compute()
    assert json.loads(json.dumps(values)) == values
    assert all(isinstance(value, float) for value in values.values())
    assert {value.dtype for value in values.values()} == {np.dtype(np.float32)}
    mean = jh.RegressionHead().measure([0.9], [[0.0]]).compute()["label/mean"]
    assert (repr(mean), mean == 0.9, mean == np.float32(0.9), mean != 0.9) == ("0.9", True, True, False)
    again = pickle.loads(pickle.dumps(values))
    assert again == values
    assert {type(value) for value in again.values()} == {type(mean)}
    assert values["accuracy"] == np.float32(sk.accuracy_score(labels, logits.argmax(-1)))
    metrics = head.with_metrics(M.ConfusionMatrix()).measure(labels, logits, features)
    frame = pd.DataFrame(metrics.by_slice())
    assert frame.shape[0] == 2
    for i, name in enumerate("ab"):
        inside = features["g"] == name
        np.testing.assert_array_equal(
            frame["confusion_matrix"][i],
            sk.confusion_matrix(labels[inside], logits[inside].argmax(-1), labels=range(3)),
        )


def test_slices_are_given_by_name():
    named = jh.RegressionHead(slices=jh.Slices("g", 2, names=("JFK", "LGA")))
    labels, logits = np.array([1.0, 2.0, 4.0, 8.0]), np.zeros((4, 1), np.float32)
    for column in (
        np.array(["JFK", "LGA", "LGA", "JFK"]),
        ["JFK", "LGA", "LGA", "JFK"],
        pd.Series(["JFK", "LGA", "LGA", "JFK"], dtype="category").astype(object),
        np.array([[b"JFK"], [b"LGA"], [b"LGA"], [b"JFK"]]),
    ):
        found = named.measure(labels, logits, {"g": column}).by_slice()
        assert found["label/mean"].tolist() == [4.5, 3.0]
    found = named.measure(labels, logits, {"g": np.array(["JFK", None, "LGA", None], object)}).by_slice()
    assert found["count"].tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"Given 'EWR', 1 unknown"):
        named.measure(labels, logits, {"g": np.array(["JFK", "EWR", "LGA", "JFK"])})
    hidden = named.measure(labels, logits, {"g": np.array(["JFK", "EWR", "LGA", "JFK"])}, where=[1, 0, 1, 1])
    assert hidden.by_slice()["count"].tolist() == [2, 1]
    for ids in (np.array([0, 1, 1, 0], object), np.array([0, 1, 1, 0])):
        assert named.measure(labels, logits, {"g": ids}).by_slice()["label/mean"].tolist() == [4.5, 3.0]
    with pytest.raises(ValueError, match="Given 2, 1 unknown"):
        named.measure(labels, logits, {"g": np.array([0, 1, 2, None], object)})
    with pytest.raises(ValueError, match="To give names, build the head with them"):
        jh.RegressionHead(slices=jh.Slices("g", 2)).measure(labels, logits, {"g": np.array(["a", "b", "a", "b"])})


def test_training_with_masked_rows_moves_learned_fields():
    """The last batch of an epoch, filled up: one step by `make_train_step` is that of the rows alone."""
    head, optimizer = WeibullHead(), optax.sgd(0.1)
    step = jax.jit(jh.make_train_step(head, lambda params, features: features["x"] @ params["w"], optimizer))
    rng = np.random.default_rng(2)
    rows = {"features": {"x": rng.normal(size=(3, 1)).astype(np.float32)}, "labels": rng.uniform(1, 2, 3)}
    ends = []
    for batch in (rows, jh.pad_batch(rows, 5)):
        state = jh.TrainState.create(
            params={"w": jnp.ones((1, 1))}, optimizer=optimizer, head=head, key=jax.random.key(0)
        )
        ends.append(step(state, batch)[0])
    for a, b in zip(jax.tree.leaves(ends[0].trainable), jax.tree.leaves(ends[1].trainable), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
