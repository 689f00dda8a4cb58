"""Slices and bootstrap replicas: filtering and reweighting by hand, devices, coverage by simulation."""

import functools
import pickle
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats
from devices import count, mesh_of
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score
from zoo import changed

import jaxheads as jh
from jaxheads.metrics import groups

P = PartitionSpec
N = 3
SLICES = jh.Slices("origin", N)
HEADS = {
    "binary": jh.BinaryClassHead(thresholds=(0.3,)),
    "multi_class": jh.MultiClassHead(4).with_metrics(jh.metrics.ConfusionMatrix()),
    "multi_label": jh.MultiLabelHead(3, classes_for_class_based_metrics=[1]),
    "regression": jh.RegressionHead(2).with_metrics(jh.metrics.R2Score()),
    "several": jh.MultiHead([jh.BinaryClassHead(name="a"), jh.RegressionHead(name="b", loss_reduction="mean")]),
}
# Quick with a histogram, and with heads inside.
few = pytest.mark.parametrize(
    "name", [name if name in ("binary", "several") else pytest.param(name, marks=pytest.mark.slow) for name in HEADS]
)


def with_a_count():
    return jh.BinaryClassHead(slices=SLICES).with_metrics(count=lambda labels, logits: labels)


def sliced(name, slices=SLICES, bootstrap=None):
    """The head with slices; of a `MultiHead`, in all heads inside."""
    head = HEADS[name]
    if not isinstance(head, jh.MultiHead):
        return changed(head, slices=slices, bootstrap=bootstrap)
    return jh.MultiHead([changed(inner, slices=slices, bootstrap=bootstrap) for inner in head.heads])


@functools.cache
def draw(name, n=240, seed=0):
    rng, head = np.random.default_rng(seed), HEADS[name]
    one = {
        "binary": lambda: rng.integers(0, 2, (n, 1)),
        "multi_class": lambda: rng.integers(0, 4, (n, 1)),
        "multi_label": lambda: rng.integers(0, 2, (n, 3)),
        "regression": lambda: rng.normal(size=(n, 2)).astype(np.float32),
        "several": lambda: {"a": rng.integers(0, 2, (n, 1)), "b": rng.normal(size=(n, 1)).astype(np.float32)},
    }
    logits = rng.normal(size=(n, head.logits_dimension)).astype(np.float32).round(1)
    weights, where = rng.choice(np.array([0, 0.3, 1, 2], np.float32), (n, 1)), rng.random((n, 1)) < 0.8
    origin = rng.integers(-1, N, (n, 1)).astype(np.int32)
    return {"labels": one[name](), "logits": logits, "weights": weights, "where": where}, origin


def rows(batch, keep):
    return jax.tree.map(lambda x: x[keep], batch)


def alone(batch, keep):
    """The batch of some rows: the others do not exist, which needs no program for their number."""
    return {**batch, "where": batch["where"] & keep[:, None]}


def assert_slices(got, expected, rtol=2e-6):
    """`by_slice` against the metrics of each slice by itself, a list."""
    for i, one in enumerate(expected):
        assert set(one) <= set(got)
        for key, value in one.items():
            np.testing.assert_allclose(got[key][i], value, rtol=rtol, atol=2e-6, err_msg=f"{key} of slice {i}")


def by_filtering(name, n=240):
    batch, origin = draw(name, n)
    return [HEADS[name].measure(**alone(batch, origin[:, 0] == i)).compute() for i in range(N)]


@pytest.mark.parametrize("n", [240, pytest.param(20_000, marks=pytest.mark.slow)])
@few
def test_a_slice_is_the_metrics_of_its_rows(name, n):
    """On few rows, and on enough to be cut in tiles."""
    (batch, origin), head = draw(name, n), sliced(name)
    metrics = head.measure(**batch, features={"origin": origin})
    assert_slices(metrics.by_slice(), by_filtering(name, n), rtol=2e-5 if n > 1000 else 2e-6)
    whole, plain = metrics.compute(), HEADS[name].measure(**batch).compute()
    assert whole.keys() == plain.keys()
    for key in plain:
        np.testing.assert_allclose(whole[key], plain[key], rtol=2e-5, atol=2e-6)
    live = batch["where"] & (batch["weights"] > 0)
    assert metrics.by_slice()["count"].tolist() == [np.sum(live & (origin == i)) for i in range(N)]


@pytest.mark.slow
def test_a_table_larger_than_a_tile_is_made_once():
    """Of slices and replicas too."""
    n, classes, key = 6000, 130, jax.random.key(5)
    rng, plain = np.random.default_rng(0), jh.MultiClassHead(130).with_metrics(jh.metrics.ConfusionMatrix())
    head = changed(plain, slices=SLICES, bootstrap=jh.Bootstrap(2))
    labels, origin = rng.integers(0, classes, n), rng.integers(-1, N, n)
    logits, weights = rng.normal(size=(n, classes)).astype(np.float32), rng.choice(np.array([0, 0.5, 1], np.float32), n)
    metrics = head.measure(labels, logits, {"origin": origin}, weights=weights, key=key)
    predicted = logits.argmax(-1)

    def table(weights):
        out = np.zeros((classes, classes))
        np.add.at(out, (labels, predicted), weights)
        return out

    np.testing.assert_allclose(metrics.compute()["confusion_matrix"], table(weights), rtol=1e-6)
    for i in range(N):
        np.testing.assert_allclose(metrics.by_slice()["confusion_matrix"][i], table(weights * (origin == i)), rtol=1e-6)
    ends = metrics.compute(confidence=1 - 1e-9)
    spread = (ends["confusion_matrix/ci_upper"] + ends["confusion_matrix/ci_lower"]).sum() / 2
    # The totals of two replicas: within five standard deviations of a Poisson sum.
    assert 0 < abs(spread - weights.sum()) < 5 * np.sqrt((weights**2).sum() / 2)


@few
def test_slices_may_overlap(name):
    (batch, origin), head = draw(name), sliced(name)
    matrix = np.concatenate([origin == 0, origin >= 0, origin <= 1], axis=-1)
    found = head.measure(**batch, features={"origin": matrix}).by_slice()
    expected = [HEADS[name].measure(**alone(batch, matrix[:, i])).compute() for i in range(N)]
    assert_slices(found, expected)


def test_confusion_of_slices_that_overlap_is_that_of_their_rows():
    head = jh.MultiClassHead(3, slices=jh.Slices("origin", 2)).with_metrics(jh.metrics.ConfusionMatrix())
    labels, predicted = np.array([0, 1, 1, 2]), np.array([0, 0, 1, 1])
    inside = np.array([[1, 1], [1, 0], [0, 1], [1, 1]], bool)
    found = head.measure(labels, np.eye(3, dtype=np.float32)[predicted], {"origin": inside}).by_slice()
    expected = [[[1, 0, 0], [1, 0, 0], [0, 1, 0]], [[1, 0, 0], [0, 1, 0], [0, 1, 0]]]  # labels by predictions
    np.testing.assert_array_equal(found["confusion_matrix"], expected)


def test_membership_may_be_told_in_numbers():
    (batch, origin), head = draw("regression"), jh.RegressionHead(2, slices=SLICES)
    matrix = np.concatenate([origin == 0, origin >= 0, origin <= 1], axis=-1)
    live = batch["where"] & (batch["weights"] > 0)
    for dtype in (np.int32, np.bool_):
        found = head.measure(**batch, features={"origin": matrix.astype(dtype)}).by_slice()
        assert found["count"].tolist() == (live & matrix).sum(0).tolist()


@few
def test_any_split_gives_the_same_slices(name):
    (batch, origin), head = draw(name), sliced(name)
    metrics = head.metrics()
    for part in np.array_split(np.random.default_rng(1).permutation(240), 5):
        inside = rows(batch, part)
        metrics = head.update_metrics(
            metrics,
            {"origin": origin[part]},
            inside["logits"],
            inside["labels"],
            weights=inside["weights"],
            where=inside["where"],
        )
    assert_slices(metrics.by_slice(), by_filtering(name))
    again = pickle.loads(pickle.dumps(metrics))
    np.testing.assert_array_equal(again.by_slice()["count"], metrics.by_slice()["count"])


@pytest.mark.parametrize(
    ("name", "axes"),
    [pytest.param(name, axes, marks=pytest.mark.slow) for name in HEADS for axes in ("auto", "explicit")],
)
def test_slices_and_replicas_on_eight_devices(name, axes):
    """By sharded `jit`, in one all-reduce."""
    (batch, origin), head = draw(name), sliced(name, bootstrap=jh.Bootstrap(2))
    mesh, key = mesh_of(8, axes), jax.random.key(3)

    @jax.jit
    def measure(batch, origin, key):
        return head.measure(**batch, features={"origin": origin}, key=key)

    placed = jax.device_put((batch, origin), NamedSharding(mesh, P("d")))
    compiled = measure.lower(*placed, key).compile()
    text, got = compiled.as_text(), compiled(*placed, key)
    assert count(text, "all-reduce") == 1
    assert not any(count(text, other) for other in ("all-gather", "all-to-all", "collective-permute"))
    assert_slices(got.by_slice(), by_filtering(name))
    values = got.compute(confidence=0.9)
    expected = head.measure(**batch, features={"origin": origin}, key=key)
    for key_, value in expected.compute(confidence=0.9).items():
        np.testing.assert_allclose(values[key_], value, rtol=2e-6, atol=2e-6)


def test_slices_under_shard_map():
    (batch, origin), head = draw("binary"), sliced("binary")

    def measure(batch, origin):
        return head.measure(**batch, features={"origin": origin}).psum("d")

    mapped = jax.shard_map(measure, mesh=mesh_of(8, "auto"), in_specs=P("d"), out_specs=P())
    assert_slices(jax.jit(mapped)(batch, origin).by_slice(), by_filtering("binary"))


@functools.cache
def largest_alone():
    """The metrics of slices a, b and c, of which only the largest has enough rows; and how many each has."""
    batch, origin = draw("binary")
    sizes = [int(np.sum((batch["weights"] > 0) & batch["where"] & (origin == i))) for i in range(N)]
    head = jh.BinaryClassHead(slices=jh.Slices("origin", N, names=("a", "b", "c"), min_count=max(sizes)))
    return head.measure(**batch, features={"origin": origin}), sizes


def test_a_slice_that_is_too_small_has_no_metrics():
    metrics, sizes = largest_alone()
    found = metrics.by_slice()
    assert found["slice"].tolist() == ["a", "b", "c"]
    assert found["count"].tolist() == sizes
    np.testing.assert_array_equal(np.isnan(found["auc"]), np.asarray(sizes) < max(sizes))
    zeros = metrics.by_slice(undefined=0.0)
    assert (zeros["auc"] == 0).tolist() == [size < max(sizes) for size in sizes]


@pytest.mark.slow
def test_curves_of_a_slice_are_those_of_its_rows():
    """By scikit-learn, from the rows of the slice alone: at the edges of bins, and of calibration exactly."""
    batch, origin = draw("binary", 2000)
    slices = jh.Slices("origin", N, names=("a", "b", "c"), min_count=100)
    exact = jh.BinaryClassHead(name="a", slices=slices).with_metrics(jh.metrics.ExpectedCalibrationError(8))
    head = jh.MultiHead([exact, jh.BinaryClassHead(name="b", slices=slices)])
    both, logits = {"a": batch["labels"], "b": batch["labels"]}, np.repeat(batch["logits"], 2, axis=-1)
    metrics = head.measure(both, logits, {"origin": origin})
    inside = origin[:, 0] == 1
    labels, p = batch["labels"][inside, 0], scipy.special.expit(batch["logits"][inside, 0].astype(np.float64))
    for which in (1, "b"):
        fpr, tpr, thresholds = metrics.curve("roc", "a/scores", slice=which)
        for i in range(0, len(thresholds), 97):
            np.testing.assert_allclose(tpr[i], np.mean(p[labels == 1] > thresholds[i]), rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(fpr[i], np.mean(p[labels == 0] > thresholds[i]), rtol=1e-6, atol=1e-9)
    frequency, mean = calibration_curve(labels, p, n_bins=8)
    predicted, observed, weight = metrics.reliability(8, "a/scores", slice="b")
    np.testing.assert_allclose(predicted, mean, rtol=1e-6)
    np.testing.assert_allclose(observed, frequency, rtol=1e-6)
    assert weight.sum() == inside.sum()
    assert np.abs(metrics.reliability(8, "b/scores", slice=1)[0] - mean).max() > 1e-5
    # From the histogram's bins where the head keeps no sums of as many steps: not exact.
    of_four = metrics.reliability(4, "a/scores", slice="b")[0] - calibration_curve(labels, p, n_bins=4)[1]
    assert 0 < np.abs(of_four).max() < 0.01


def test_slices_without_curves_are_refused():
    metrics, sizes = largest_alone()
    small, large = int(np.argmin(sizes)), int(np.argmax(sizes))
    with pytest.raises(ValueError, match=rf"slice '{'abc'[small]}' has {min(sizes)} elements, fewer than min_count="):
        metrics.curve("pr", slice="abc"[small])
    recall = metrics.curve("pr", slice=large)[1]
    assert (recall.min(), recall.max()) == (0, 1)
    for given in ("d", 3, -1, True):
        with pytest.raises(ValueError, match=r"0 to 2, called a, b, c. Given slice="):
            metrics.reliability(slice=given)
    with pytest.raises(ValueError, match="needs a head with slices"):
        jh.BinaryClassHead().metrics().curve("roc", slice=0)


def test_bounds_of_slices_hold_what_bins_hide():
    (batch, origin), head = draw("binary"), sliced("binary", slices=SLICES)
    head = changed(head, bins=jh.LogitGrid(-2, 2, 8))
    found = head.measure(**batch, features={"origin": origin}).by_slice(bounds=True)
    for i in range(N):
        inside = (origin[:, 0] == i) & batch["where"][:, 0]
        exact = roc_auc_score(
            batch["labels"][inside], batch["logits"][inside], sample_weight=batch["weights"][inside, 0]
        )
        assert found["auc/lower"][i] < exact < found["auc/upper"][i]
        assert found["auc/upper"][i] - found["auc/lower"][i] > 0.01


def test_slices_are_read_inside_jit():
    (batch, origin), head = draw("regression"), jh.RegressionHead(2, slices=SLICES, bootstrap=jh.Bootstrap(4))

    @jax.jit
    def measure(batch, origin):
        metrics = head.measure(**batch, features={"origin": origin}, key=jax.random.key(0))
        return metrics, (metrics.by_slice(confidence=0.5), metrics.compute(confidence=0.5))

    metrics, inside = measure(batch, origin)
    outside = metrics.by_slice(confidence=0.5), metrics.compute(confidence=0.5)
    for got, expected in zip(inside, outside, strict=True):
        assert set(expected) - set(got) <= {"slice"}
        for key, value in got.items():
            np.testing.assert_allclose(value, expected[key], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    "name", [name if name == "binary" else pytest.param(name, marks=pytest.mark.slow) for name in HEADS]
)
def test_a_replica_is_the_metrics_under_its_weights(name):
    (batch, origin), head = draw(name), sliced(name, bootstrap=jh.Bootstrap(2))
    key = jax.random.key(7)
    metrics = head.measure(**batch, features={"origin": origin}, key=key)
    # The middle 1e-9 and nearly all of two replicas tell both.
    got, middle = metrics.compute(confidence=1 - 1e-9), HEADS[name].measure(**batch).compute()
    drawn = jax.jit(lambda key: [groups.poisson(one, batch["weights"]) for one in jax.random.split(key, 2)])(key)
    each_ = [
        HEADS[name].measure(**{**batch, "weights": batch["weights"] * np.asarray(times)}).compute() for times in drawn
    ]
    for metric, value in middle.items():
        np.testing.assert_allclose(got[metric], value, rtol=2e-6, atol=2e-6)
        if "loss/" in metric:  # of a sum over the batch size: elements of weight 0 count, replicas drop them
            continue
        head_name = metric.split("/")[-1] if name == "several" else None
        base = metric.removesuffix(f"/{head_name}") if head_name else metric
        ends = ["/".join(filter(None, (base, end, head_name))) for end in ("ci_lower", "ci_upper")]
        lower, upper = (got[end] for end in ends)
        values = [one[metric] for one in each_]
        np.testing.assert_allclose([lower, upper], [np.min(values, 0), np.max(values, 0)], rtol=1e-5, atol=5e-6)


def test_draws_are_poisson():
    weights: Any = np.ones((400_000, 1), np.float32)
    draws = np.asarray(jax.jit(lambda key: groups.poisson(key, weights))(jax.random.key(1))).astype(int)
    seen = np.bincount(draws[:, 0], minlength=9)[:9]
    expected = 400_000 * scipy.stats.poisson.pmf(np.arange(9), 1)
    assert scipy.stats.chisquare(seen[:7], expected[:7] * seen[:7].sum() / expected[:7].sum()).pvalue > 1e-4
    assert draws.max() <= 12
    np.testing.assert_allclose([draws.mean(), draws.var()], 1, atol=0.01)


@pytest.mark.slow
def test_tiles_draw_apart():
    """Were every tile drawn alike, the spread of a mean over all rows would be that over one tile."""
    n = 2**15
    head = jh.RegressionHead(bootstrap=jh.Bootstrap(40))
    # The same numbers in each of four tiles: drawn alike, they would sway together.
    labels = np.tile(np.random.default_rng(0).normal(size=n // 4).astype(np.float32), 4)
    metrics = head.measure(labels=labels, logits=np.zeros((n, 1), np.float32), key=jax.random.key(0))
    found = metrics.compute(confidence=0.6827)
    np.testing.assert_allclose(found["label/mean/ci_upper"] - found["label/mean/ci_lower"], 2 / np.sqrt(n), rtol=0.3)


@pytest.mark.slow
@pytest.mark.all_passes
def test_intervals_cover_the_truth_as_often_as_they_say():
    """400 samples of 300 rows from a known model; 90 % intervals. The truth from 4 million rows."""
    head = jh.BinaryClassHead(bootstrap=jh.Bootstrap(200))
    keys = ("label/mean", "auc", "accuracy")

    def sample(key, n):
        one, two = jax.random.split(key)
        logits = jax.random.normal(one, (n, 1)) * 1.5 - 0.5
        return (jax.random.uniform(two, (n, 1)) < jax.nn.sigmoid(logits)).astype(jnp.int32), logits

    truth = jh.BinaryClassHead().measure(*sample(jax.random.key(9), 4_000_000)).compute()

    @jax.jit
    def intervals(key):
        labels, logits = sample(key, 300)
        found = head.measure(labels, logits, key=jax.random.fold_in(key, 1)).compute(confidence=0.9)
        return {name: (found[f"{name}/ci_lower"], found[f"{name}/ci_upper"]) for name in keys}

    ends = [jax.device_get(intervals(key)) for key in jax.random.split(jax.random.key(0), 400)]
    for name in keys:
        covered = np.mean([lower <= truth[name] <= upper for lower, upper in (each[name] for each in ends)])
        # Of 400 at 90 %, the standard error is 1.5 %; percentile intervals of 300 rows are a little short.
        assert 0.85 <= covered <= 0.945, name


@pytest.mark.slow
def test_training_and_evaluation_have_keys():
    head = jh.RegressionHead(slices=SLICES, bootstrap=jh.Bootstrap(8))
    optimizer, key = optax.sgd(0.1), jax.random.key(0)

    def apply_fn(params, features):
        return features["x"] @ params["w"]

    batch, origin = draw("binary")
    features = {"x": np.concatenate([batch["logits"], np.ones_like(batch["logits"])], -1), "origin": origin}
    given = {"features": features, "labels": batch["labels"]}
    state = jh.TrainState.create(params={"w": np.zeros((2, 1), np.float32)}, optimizer=optimizer, head=head, key=key)
    step = jax.jit(jh.make_train_step(head, apply_fn, optimizer, micro_batches=2))
    state, out = step(state, given)
    assert out.metrics.by_slice()["count"].tolist() == [np.sum(origin == i) for i in range(N)]
    assert np.isfinite(out.metrics.compute(confidence=0.9)["average_loss/ci_upper"])
    eval_step = jh.make_eval_step(head, apply_fn)
    first, second = (jh.evaluate(state, eval_step, [given, given], key=jax.random.key(k)) for k in (0, 1))
    assert first.compute() == second.compute()
    assert first.compute(confidence=0.9) != second.compute(confidence=0.9)
    with pytest.raises(ValueError, match="needs key="):
        jh.evaluate(state, eval_step, [given])


def test_a_slice_that_is_not_there_is_left_out_and_told_under_jit():
    (batch, origin), head = draw("binary"), sliced("binary")
    wrong = origin.copy()
    live = np.flatnonzero((batch["weights"] > 0) & batch["where"])[:2]
    wrong[live[0]], wrong[live[1]] = N, -2
    measure = jax.jit(lambda batch, origin: head.measure(**batch, features={"origin": origin}))
    with pytest.warns(jh.BadInputWarning, match="2 elements"):
        found = measure(batch, wrong).by_slice()
    keep = np.ones(240, bool)
    keep[live] = False
    np.testing.assert_array_equal(found["auc"], measure(alone(batch, keep), origin).by_slice()["auc"])


def test_ids_of_masked_rows_may_be_anything():
    head = jh.BinaryClassHead(slices=jh.Slices("g", 2))
    rest: dict[str, Any] = {
        "labels": [1, 0, 1, 9],
        "logits": np.ones((4, 1), np.float32),
        "features": {"g": np.array([0, 1, 1, -7])},
    }
    all_, some = np.ones(4), np.array([1, 1, 1, 0])
    for where, weights in ((some, all_), (all_, some)):
        assert head.measure(**rest, where=where, weights=weights).by_slice()["count"].tolist() == [1, 2]
    with pytest.raises(ValueError, match="Given -7 at index"):
        head.measure(**{**rest, "labels": [1, 0, 1, 1], "weights": [0, 1, 1, 1]})


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "dtype",
    [np.uint8, *(pytest.param(x, marks=pytest.mark.slow) for x in (np.int8, np.uint16, np.int16, np.int32)), np.uint32],
)
def test_ids_of_any_integer_type(dtype, compiled):
    head = jh.RegressionHead(slices=jh.Slices("g", 2))
    labels, logits = np.array([1, 2, 6], np.float32), np.zeros((3, 1), np.float32)

    def measure(ids):
        return head.measure(labels, logits, {"g": ids})

    found = (jax.jit(measure) if compiled else measure)(np.array([0, 1, 1], dtype)).by_slice()
    assert (found["count"].tolist(), found["label/mean"].tolist()) == ([1, 2], [1, 4])


def test_a_row_counts_if_any_of_its_targets_weighs_something():
    head = jh.RegressionHead(2, slices=jh.Slices("g", 1))
    weights, zeros = np.array([[0, 1.0], [0, 0], [2, 0]]), np.zeros((3, 2))
    found = head.measure(zeros + 1, zeros, weights=weights, features={"g": np.zeros(3, int)}).by_slice()
    assert (found["count"].tolist(), found["average_loss"].tolist()) == ([2], [1])


def test_each_task_hides_its_own_small_slices():
    slices, n = jh.Slices("g", 2, min_count=10), 40
    head = jh.MultiHead([jh.RegressionHead(name=name, slices=slices) for name in "ab"])
    groups_, few_ = np.arange(n) % 2, np.arange(n) < 1
    given = {"labels": {"a": groups_, "b": np.full(n, 7.0)}, "logits": np.zeros((n, 2), np.float32)}
    for hidden, seen in (("a", "b"), ("b", "a")):
        where = {hidden: few_, seen: np.ones(n, bool)}
        found = head.measure(**given, features={"g": groups_}, where=where).by_slice()
        assert found[f"count/{hidden}"].tolist() == [1, 0]
        assert found[f"count/{seen}"].tolist() == found["count"].tolist() == [20, 20]
        assert np.isnan(found[f"average_loss/{hidden}"]).all()
        assert np.isnan(found[f"loss/{hidden}"]).all()
        assert np.isfinite(found[f"average_loss/{seen}"]).all()


def test_replicas_without_a_value_are_left_out_of_the_interval():
    """Two positives, above all negatives: the AUC is 1 wherever there is one, and one replica in seven has none."""
    head = jh.BinaryClassHead(bootstrap=jh.Bootstrap(50))
    labels, logits = np.arange(40) >= 38, np.linspace(-2, 2, 40, dtype=np.float32)[:, None]
    found = head.measure(labels, logits, key=jax.random.key(0)).compute(undefined=0.0, confidence=0.95)
    assert found["auc/ci_lower"] == found["auc/ci_upper"] == 1
    logits[0] = np.nan
    found = head.measure(labels, logits, key=jax.random.key(0)).compute(confidence=0.95)
    assert np.isnan([found["auc"], found["auc/ci_lower"], found["auc/ci_upper"]]).all()
    nothing = head.metrics().compute(undefined=0.0, confidence=0.95)
    assert nothing["auc/ci_upper"] == 0


def test_sequences_have_slices_of_their_own_or_by_step():
    inner = jh.BinaryClassHead(slices=jh.Slices("user", 2))
    head = jh.SequentialHeadWrapper(inner)
    labels, logits = np.array([[1, 0, 1], [0, 0, 1]]), np.ones((2, 3, 1), np.float32)
    mask = np.array([[1, 1, 0], [1, 1, 1]])
    features = {"sequence_length_mask": mask, "user": np.array([0, 1])}
    assert head.measure(labels, logits, features).by_slice()["count"].tolist() == [2, 3]
    features["user"] = np.array([[0, 1, 0], [1, 1, -1]])
    assert head.measure(labels, logits, features).by_slice()["count"].tolist() == [1, 3]


def test_a_spec_takes_a_key():
    head, logits, labels = jh.RegressionHead(bootstrap=jh.Bootstrap(4)), np.zeros((9, 1)), np.arange(9.0)

    @jax.jit
    def metrics(key):
        return head.create_estimator_spec({}, "eval", logits, labels, key=key).metrics

    values = metrics(jax.random.key(0)).compute(confidence=0.9)
    assert values["label/mean/ci_lower"] < values["label/mean/ci_upper"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: with_a_count(), "gives 'count', which"),
        (lambda: jh.Slices("a", 2, names="ab"), "names must be 2 strings"),
        (lambda: jh.Slices("a", 2, names=("x", "x")), "all different"),
        (lambda: jh.Slices("a", 0), "n must be an integer of at least 1"),
        (lambda: jh.Slices("a", 2, names=("x",)), "names must be 2 strings"),
        (lambda: jh.Slices(cast(Any, 3), 2), "column must be a key"),
        (lambda: jh.Bootstrap(1), "replicas must be an integer of at least 2"),
        (lambda: jh.BinaryClassHead(slices=cast(Any, "a")), "slices must be jh.Slices"),
        (lambda: sliced("binary").measure([1], [[0.0]], {"dest": [0]}), r"Feature origin \(of slices\).*\['dest'\]"),
        (lambda: sliced("binary").measure([1], [[0.0]]), "Feature origin"),
        (lambda: sliced("binary").measure([1], [[0.0]], {"origin": [3]}), "must lie in -1 ... 2.*Given 3 at index"),
        (lambda: sliced("binary").measure([1], [[0.0]], {"origin": [0.5]}), "integers or bool"),
        (lambda: sliced("binary").measure([1], [[0.0]], {"origin": [[0, 1, 2]]}), "must lie in 0 ... 1"),
        (lambda: sliced("binary").measure([1], [[0.0]], {"origin": [0, 1]}), "shape"),
        (lambda: HEADS["binary"].metrics().by_slice(), "needs a head with slices"),
        (lambda: HEADS["binary"].metrics().compute(confidence=0.9), "keeps none(.|\n)*Bootstrap"),
        (lambda: sliced("binary").metrics().compute(confidence=95), "between 0 and 1"),
        (
            lambda: jh.MultiHead([jh.BinaryClassHead(name="a", slices=SLICES), jh.BinaryClassHead(name="b")]),
            "must have the same slices",
        ),
        (lambda: HEADS["several"].with_metrics(jh.metrics.BrierScore()), "has the metrics of the heads inside"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
