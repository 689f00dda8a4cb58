"""The metrics of many classes and of regression: scikit-learn's values, and the laws."""

import dataclasses
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from devices import mesh_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.special import logsumexp, softmax

import jaxheads as jh
from jaxheads.numerics import exact, stable

M: Any = jh.metrics
sk: Any = sklearn.metrics
N, K = 960, 8
NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen")
P = PartitionSpec


@functools.cache
def classes() -> dict[str, Any]:
    """Ties everywhere; dog is never predicted, gnu has no labels, hen has neither."""
    rng = np.random.default_rng(11)
    labels = rng.choice([0, 1, 2, 3, 4, 5], (N, 1), p=[0.4, 0.3, 0.1, 0.1, 0.07, 0.03]).astype(np.int32)
    logits = rng.standard_normal((N, K)) + 1.5 * (labels == np.arange(K))
    logits = np.round(2 * logits) / 2 - 12 * (np.arange(K) == 3) - 24 * (np.arange(K) == 7)
    return {"labels": labels, "logits": logits.astype(np.float32), "weights": fractions(rng)}


def f32(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)


def fractions(rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random((N, 1)) < 0.1, 0, 3 * rng.random((N, 1))).astype(np.float32)


@functools.cache
def targets(link: str, d: int) -> dict[str, Any]:
    rng = np.random.default_rng(12)
    logits = rng.standard_normal((N, d)).astype(np.float32)
    mean = LINKS[link](logits.astype(np.float64))
    labels = {
        "identity": lambda: mean + 0.7 * rng.standard_normal((N, d)),
        "exp": lambda: rng.poisson(mean),
        "sigmoid": lambda: np.clip(mean + 0.2 * rng.standard_normal((N, d)), 0, 1),
    }[link]()
    return {"labels": np.round(labels, 1).astype(np.float32), "logits": logits, "weights": fractions(rng)}


def exponential(logits):
    return jnp.exp(logits)


LINKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "identity": lambda z: z,
    "exp": np.exp,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
}

AVERAGES: tuple[Any, ...] = ("micro", "macro", "weighted", None)
EVERY_CLASS_METRIC = (
    M.ConfusionMatrix(),
    *(cls(average=average) for cls in (M.Precision, M.Recall, M.FBeta, M.IoU) for average in AVERAGES),
    M.Specificity(average="macro"),
    M.FBeta(beta=2, average="macro"),
    M.Support(),
    *(M.CohenKappa(weights=weights) for weights in (None, "linear", "quadratic")),
    M.MatthewsCorrcoef(),
    M.MeanIoU(),
    M.BalancedAccuracy(),
    *(M.TopKAccuracy(k) for k in (2, 3, 5)),
    *(M.TopKAccuracy(k, average=average) for k in (2, 3) for average in (None, "macro")),
    *(M.OneVsRestAuc(average=average) for average in AVERAGES),
    M.AveragePrecision(average="macro"),
    M.Precision(threshold=0.3, average="macro"),
    M.Perplexity(),
)
ERRORS = (M.RootMeanSquaredError, M.MeanSquaredError, M.MeanAbsoluteError)
SPREADS = (M.R2Score, M.ExplainedVariance, M.PearsonCorrelation)
EVERY_REGRESSION_METRIC = (
    *(cls() for cls in ERRORS + SPREADS),
    *(cls(multioutput="raw_values") for cls in ERRORS + SPREADS),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A head with metrics, data for it, and float64 values of the metrics by name."""

    name: str
    head: jh.Head
    data: Callable[[], dict[str, Any]]
    expected: Callable[..., dict[str, Any]]

    def measure(self, **changes: Any) -> jh.Metrics:
        # Always with a mask: one program for all tests of a case.
        return self.head.measure(**{**self.data(), "where": np.ones((N, 1), bool), **changes})


def expected_of_classes(labels, logits, weights) -> dict[str, Any]:
    z, y, w = logits.astype(np.float64), labels[:, 0], weights[:, 0].astype(np.float64)
    y, z, w = y[w > 0], z[w > 0], w[w > 0]
    predicted, every = z.argmax(-1), list(range(K))
    seen = sorted({*y, *predicted})
    options = {"labels": every, "sample_weight": w, "zero_division": np.nan}
    out: dict[str, Any] = {
        "confusion_matrix": sk.confusion_matrix(y, predicted, labels=every, sample_weight=w),
        "matthews_corrcoef": sk.matthews_corrcoef(y, predicted, sample_weight=w),
        "balanced_accuracy": np.mean([w[(y == k) & (predicted == k)].sum() / w[y == k].sum() for k in set(y)]),
        "mean_iou": sk.jaccard_score(y, predicted, labels=seen, average="macro", sample_weight=w),
        "perplexity": np.exp(np.average(logsumexp(z, -1) - z[np.arange(len(y)), y], weights=w)),
        "fbeta_2_macro": sk.fbeta_score(y, predicted, beta=2, average="macro", **options),
        "specificity_macro": np.mean([w[(y != k) & (predicted != k)].sum() / w[y != k].sum() for k in every]),
    }
    for name, weighting in (("", None), ("_linear", "linear"), ("_quadratic", "quadratic")):
        kappa = sk.cohen_kappa_score(y, predicted, labels=every, weights=weighting, sample_weight=w)
        out[f"cohen_kappa{name}"] = kappa
    for key, score in (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score)):
        for average in ("micro", "macro", "weighted"):
            ending = "" if average == "micro" else f"_{average}"
            out[f"{key}{ending}"] = score(y, predicted, average=average, **options)
        out |= {f"{key}/{NAMES[k]}": v for k, v in enumerate(score(y, predicted, average=None, **options))}
    iou = sk.jaccard_score(y, predicted, labels=seen, average=None, sample_weight=w)
    out |= {f"iou/{name}": np.nan for name in NAMES} | {f"iou/{NAMES[k]}": v for k, v in zip(seen, iou, strict=True)}
    out["iou"] = sk.jaccard_score(y, predicted, average="micro", sample_weight=w)
    out["iou_macro"] = out["mean_iou"]
    out["iou_weighted"] = sk.jaccard_score(y, predicted, labels=seen, average="weighted", sample_weight=w)
    support = np.array([w[y == k].sum() for k in every])
    out |= {f"support/{name}": v for name, v in zip(NAMES, support, strict=True)}
    for k in (2, 3, 5):
        best = np.argsort(-z, axis=-1, kind="stable")[:, :k]
        hit = (best == y[:, None]).any(-1)
        out[f"top_{k}_accuracy"] = np.average(hit, weights=w)
        if k < 5:
            each = [np.average(hit[y == c], weights=w[y == c]) if (y == c).any() else np.nan for c in every]
            out |= {f"top_{k}_accuracy/{name}": value for name, value in zip(NAMES, each, strict=True)}
            out[f"top_{k}_accuracy_macro"] = np.nanmean(each)
    p = softmax(z, -1)
    present = [k for k in every if support[k] > 0]
    areas = np.array([sk.roc_auc_score(y == k, p[:, k], sample_weight=w) for k in present])
    precisions = [sk.average_precision_score(y == k, p[:, k], sample_weight=w) for k in present]
    out |= {f"auc_ovr/{name}": np.nan for name in NAMES}
    out |= {f"auc_ovr/{NAMES[k]}": area for k, area in zip(present, areas, strict=True)}
    out |= {"auc_ovr_macro": areas.mean(), "auc_ovr_weighted": np.average(areas, weights=support[present])}
    every_pair = np.repeat(w, K)
    out["auc_ovr"] = sk.roc_auc_score((y[:, None] == every).ravel(), p.ravel(), sample_weight=every_pair)
    out["average_precision_macro"] = np.mean(precisions)
    at = {k: sk.precision_score(y == k, p[:, k] > 0.3, sample_weight=w, zero_division=np.nan) for k in every}
    out["precision_macro/positive_threshold_0.3"] = np.nanmean(list(at.values()))
    return out


def expected_of_regression(link: str):
    def expected(labels, logits, weights) -> dict[str, Any]:
        y, p = labels.astype(np.float64), LINKS[link](logits.astype(np.float64))
        w = weights[:, 0].astype(np.float64)
        scores = {
            "root_mean_squared_error": sk.root_mean_squared_error,
            "mean_squared_error": sk.mean_squared_error,
            "mean_absolute_error": sk.mean_absolute_error,
            "r2_score": functools.partial(sk.r2_score, force_finite=False),
            "explained_variance": functools.partial(sk.explained_variance_score, force_finite=False),
        }
        out = {}
        for key, score in scores.items():
            out[key] = score(y, p, sample_weight=w)
            each = score(y, p, sample_weight=w, multioutput="raw_values")
            out |= {f"{key}/target{i}": value for i, value in enumerate(each)}
        covariances = [np.cov(y[:, i], p[:, i], aweights=w) for i in range(y.shape[-1])]
        pearson = [c[0, 1] / np.sqrt(c[0, 0] * c[1, 1]) for c in covariances]
        out |= {f"pearson_correlation/target{i}": value for i, value in enumerate(pearson)}
        return {**out, "pearson_correlation": np.mean(pearson)}

    return expected


def regression_case(name: str, head: jh.Head, link: str) -> Case:
    data = functools.partial(targets, link, head.logits_dimension)
    return Case(name, head.with_metrics(*EVERY_REGRESSION_METRIC), data, expected_of_regression(link))


CASES = [
    Case(
        "classes",
        jh.MultiClassHead(K, label_vocabulary=NAMES).with_metrics(*EVERY_CLASS_METRIC),
        classes,
        expected_of_classes,
    ),
    regression_case("regression", jh.RegressionHead(), "identity"),
    regression_case("targets", jh.RegressionHead(8, inverse_link_fn=exponential), "exp"),
    regression_case("poisson", jh.PoissonRegressionHead(2), "exp"),
    regression_case("logistic", jh.LogisticRegressionHead(), "sigmoid"),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# Quick for classes alone: what follows is the same for all metrics.
few_cases = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[] if case.name == "classes" else [pytest.mark.slow]) for case in CASES],
)


def assert_same(got: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-6) -> None:
    assert list(got) == list(expected)
    for key, value in expected.items():
        # The spread of what is in [0, 1] about 0.5 is a difference of sums five times as large.
        within = 5 * tolerance if key.startswith(("r2_score", "explained_variance", "pearson")) else tolerance
        np.testing.assert_allclose(got[key], value, rtol=within, atol=within, err_msg=key)


def assert_expected(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal to 1e-6, or, of what bins or rounding leave open, inside the interval."""
    for key, value in expected.items():
        parts = key.split("/")
        ends = ["/".join([*parts[:i], end, *parts[i:]]) for i in range(1, len(parts) + 1) for end in ("lower", "upper")]
        found = [got[end] for end in ends if end in got]
        if not found or np.isnan(value):
            np.testing.assert_allclose(got[key], value, rtol=1e-6, atol=1e-6, err_msg=key)
        else:
            assert found[0] - 1e-6 <= value <= found[1] + 1e-6, key
            assert found[0] - 1e-6 <= got[key] <= found[1] + 1e-6, key
            np.testing.assert_allclose(got[key], value, atol=2e-2, err_msg=key)


@each_case
def test_values_are_those_of_scikit_learn(case):
    got, expected = case.measure().compute(bounds=True), case.expected(**case.data())
    own = {"average_loss", "accuracy", "prediction/mean", "label/mean"}
    assert {key for key in got if "lower" not in key and "upper" not in key} - own == set(expected)
    assert_expected(got, expected)


# The laws, on heads that keep every metric.

OTHER_WAYS = (("auto", None), ("explicit", True), ("explicit", False), ("auto", True))


@each_case
def test_a_weight_of_two_is_twice_the_row(case):
    data = case.data()
    # All but the last hundred rows, of which the first hundred count twice; as many rows of them.
    there, again = (np.arange(N) < N - 100)[:, None], np.arange(N) % (N - 100)
    weights = data["weights"] * np.where(np.arange(N) < 100, 2, 1)[:, None].astype(np.float32)
    twice = {key: x[again] for key, x in data.items()}
    assert_same(case.measure(**twice).compute(), case.measure(weights=weights, where=there).compute())


@each_case
def test_masked_rows_are_absent(case):
    data, where = case.data(), np.arange(N) % 2 > 0
    poisoned = {**data, "logits": np.where(where[:, None], data["logits"], np.float32(np.nan))}
    # The other half twice, by halves of their weights: as many rows.
    dense = {key: np.repeat(x[where], 2, axis=0) for key, x in data.items()}
    expected = case.measure(**{**dense, "weights": dense["weights"] / 2}).compute(bounds=True)
    assert_same(case.measure(**poisoned, where=where[:, None]).compute(bounds=True), expected)
    no_weight = {**poisoned, "weights": np.where(where[:, None], data["weights"], 0)}
    assert_same(case.measure(**no_weight).compute(bounds=True), expected)


@pytest.mark.slow
@pytest.mark.rounding
@few_cases
def test_batches_add_up_and_any_leading_shape_is_one(case):
    whole, data = case.measure().compute(bounds=True), case.data()
    metrics = case.head.metrics()
    for start in range(0, N, N // 4):
        part = {key: x[start : start + N // 4] for key, x in data.items()}
        metrics = case.head.update_metrics(metrics, None, part["logits"], part["labels"], weights=part["weights"])
    assert_same(metrics.compute(bounds=True), whole)
    deep = {key: x.reshape(4, 6, N // 24, -1) for key, x in data.items()}
    assert_same(case.head.measure(**deep).compute(bounds=True), whole)


@pytest.mark.slow
@few_cases
def test_compute_inside_jit_is_compute_outside_with_leading_axes_too(case):
    """Of rows, and of none: what is undefined is so on either side."""
    parts = [case.measure(where=np.arange(N)[:, None] % 3 == i) for i in range(2)]
    parts.append(dataclasses.replace(parts[0], state=np.zeros_like(parts[0].state)))
    stacked = dataclasses.replace(parts[0], state=np.stack([x.state for x in parts]))
    outside = stacked.compute(-7.0, bounds=True)
    inside = jax.jit(lambda metrics: metrics.compute(-7.0, bounds=True))(stacked)
    assert_same({key: inside[key] for key in outside}, outside, 3e-6)
    each = [part.compute(-7.0, bounds=True) for part in parts]
    assert_same(outside, {key: np.stack([x[key] for x in each]) for key in each[0]})


@each_case
def test_what_was_not_measured_is_undefined(case):
    empty = case.head.metrics()
    for undefined in (np.nan, 0.0, -7.0):
        for key, value in empty.compute(undefined).items():
            counted = key == "confusion_matrix" or key.startswith("support")
            np.testing.assert_array_equal(value, np.full_like(value, 0.0 if counted else undefined), err_msg=key)
    assert all(np.isfinite(value).all() for value in case.measure().compute(0.0).values())


@pytest.mark.parametrize(
    ("case", "overlapping"),
    [
        pytest.param(case, overlapping, marks=marks, id=f"{'members' if overlapping else 'ids'}-{case.name}")
        for case, overlapping, marks in (
            (CASES[0], False, []),
            (CASES[3], True, []),
            (CASES[0], True, [pytest.mark.slow]),
            (CASES[3], False, [pytest.mark.slow]),
        )
    ],
)
def test_slices_are_the_rows_of_each_group(case, overlapping):
    groups = np.random.default_rng(18).integers(-1, 2, N)
    members = np.stack([groups == k for k in range(2)], -1)
    members[:50] |= overlapping
    head = dataclasses.replace(case.head, slices=jh.Slices("group", 2))
    features = {"group": members if overlapping else groups}
    got = head.measure(**case.data(), features=features).by_slice()
    for k in range(2):
        expected = case.measure(where=members[:, k : k + 1]).compute()
        assert_same({key: got[key][k] for key in expected}, expected)


@few_cases
@pytest.mark.parametrize(
    ("axes", "check_vma"),
    [("explicit", None), *(pytest.param(*way, marks=pytest.mark.slow) for way in OTHER_WAYS)],
)
def test_devices_do_not_matter(case, axes, check_vma):
    """By `jit`, and by `shard_map` with and without its check."""
    mesh, merged = mesh_of(8, axes), lambda batch: case.head.measure(**batch).psum("d")
    rows = jax.device_put(case.data(), NamedSharding(mesh, P("d")))
    if check_vma is None:
        got = jax.jit(lambda batch: case.head.measure(**batch))(rows)
    else:
        got = jax.jit(jax.shard_map(merged, mesh=mesh, in_specs=P("d"), out_specs=P(), check_vma=check_vma))(rows)
    assert_same(got.compute(bounds=True), case.measure().compute(bounds=True))


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=lambda case: case.name)
@pytest.mark.parametrize("axes", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow)], ids=str)
def test_the_last_axis_may_be_sharded(case, axes):
    mesh = jax.make_mesh((2, 4), ("a", "b"), (axes, axes))
    layout = {key: P("a", "b") if x.shape[-1] == 8 else P("a") for key, x in case.data().items()}
    placed = {key: jax.device_put(x, NamedSharding(mesh, layout[key])) for key, x in case.data().items()}
    got = jax.jit(lambda batch: case.head.measure(**batch))(placed)
    assert_same(got.compute(bounds=True), case.measure().compute(bounds=True))


@each_case
def test_heads_with_metrics_are_values(case):
    head = case.head
    text = repr(head)
    assert "jh.metrics." in text
    if "inverse_link_fn" not in text:
        rebuilt = eval(text, {**vars(jh), "jh": jh})
        assert (rebuilt, hash(rebuilt)) == (head, hash(head))
        assert repr(rebuilt) == text
    copy = pickle.loads(pickle.dumps(head))
    assert (copy, hash(copy)) == (head, hash(head))
    measured = pickle.loads(pickle.dumps(case.measure()))
    assert_same((measured + case.measure()).compute(), (case.measure() + case.measure()).compute())


# One by one.


def test_reprs_say_what_differs_from_the_defaults():
    assert repr(M.TopKAccuracy()) == "jh.metrics.TopKAccuracy()"
    assert repr(M.R2Score(shift=[1, 2.5])) == "jh.metrics.R2Score(shift=(1.0, 2.5))"
    grid = M.OneVsRestAuc(average=None, bins=jh.LogitGrid(-4, 4, 66))
    assert repr(grid) == "jh.metrics.OneVsRestAuc(average=None, bins=LogitGrid(low=-4.0, high=4.0, n=66))"


def test_what_nobody_asks_for_costs_nothing_and_what_is_shared_is_paid_once():
    def size(*metrics):
        return jh.MultiClassHead(K).with_metrics(*metrics).metrics().state.shape[0]

    plain, matrix = size(), K * (K + 1)
    assert size(M.Perplexity()) == plain
    assert size(M.ConfusionMatrix(), M.Recall(average=None), M.CohenKappa(), M.MeanIoU()) == plain + matrix
    assert size(M.Recall(average=None), M.CohenKappa(), M.MeanIoU(), M.Precision(average="macro")) == plain + 3 * K
    assert size(M.CohenKappa(weights="linear"), M.Recall(average=None)) == plain + matrix
    assert size(M.TopKAccuracy(2), M.TopKAccuracy(3)) == plain + 3
    ranks = M.Ranks(np.zeros((1, 1)), K, (2, 3))
    assert ranks.join(dataclasses.replace(ranks, ks=(3, 5))).ks == (2, 3, 5)
    assert size(M.OneVsRestAuc()) == size(M.OneVsRestAuc(average=None), M.PrAuc(average="macro"))

    def moments(*metrics):
        return jh.RegressionHead(2).with_metrics(*metrics).metrics().state.shape[0]

    assert moments(M.MeanSquaredError(), M.MeanAbsoluteError()) == moments() + 2 * 3
    assert moments(*EVERY_REGRESSION_METRIC) == moments(M.R2Score()) == moments() + 2 * (3 + 6 * exact.DIGITS)


def test_classes_without_names_have_numbers():
    head = jh.MultiClassHead(3).with_metrics(M.Recall(average=None), M.OneVsRestAuc(average=None))
    keys = head.metrics().compute()
    assert {f"{key}/class{k}" for key in ("recall", "auc_ovr") for k in range(3)} < set(keys)
    named = jh.MultiClassHead(3, name="task").with_metrics(M.Recall(average=None), M.TopKAccuracy(2))
    assert {"recall/class0/task", "top_2_accuracy/task"} < set(named.metrics().compute())


def test_metrics_inside_a_multi_head():
    heads = [jh.MultiClassHead(3, name="a").with_metrics(M.ConfusionMatrix()), jh.RegressionHead(name="b")]
    head = jh.MultiHead([heads[0], heads[1].with_metrics(M.R2Score())])
    labels = {"a": np.array([0, 2, 2]), "b": np.array([1.0, 2.0, 4.0], np.float32)}
    logits = {"a": np.eye(3, dtype=np.float32), "b": np.array([[1.0], [2.0], [3.0]], np.float32)}
    values = head.measure(labels, logits).compute()
    assert values["confusion_matrix/a"].tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 1]]
    np.testing.assert_allclose(values["r2_score/b"], sk.r2_score([1, 2, 4], [1, 2, 3]), rtol=1e-6)


def test_a_row_with_a_nan_is_wrong_and_is_predicted_nothing():
    every = (*EVERY_CLASS_METRIC[:-5], M.TopKAccuracy(8))
    head = jh.MultiClassHead(K, label_vocabulary=NAMES).with_metrics(
        *(m for m in every if "Auc" not in repr(m)), M.OneVsRestAuc()
    )
    logits = np.eye(K, dtype=np.float32)[[0, 1, 2, 2]]
    logits[2, 5] = np.nan
    metrics = head.measure(np.array([0, 1, 2, 2]), logits)
    values = metrics.compute()
    assert np.isnan(values["average_loss"])
    expected = {"accuracy": 0.75, "recall": 0.75, "recall/cat": 0.5, "precision": 1.0, "top_2_accuracy": 0.75}
    expected |= {"top_8_accuracy": 0.75, "iou/cat": 0.5, "balanced_accuracy": 2.5 / 3, "support/cat": 2.0}
    assert {key: values[key] for key in expected} == pytest.approx(expected)
    assert values["confusion_matrix"].sum() == 3
    # As with one more class, that no label has.
    y, predicted = [0, 1, 2, 2], [0, 1, 8, 2]
    np.testing.assert_allclose(values["cohen_kappa"], sk.cohen_kappa_score(y, predicted), rtol=1e-6)
    np.testing.assert_allclose(values["matthews_corrcoef"], sk.matthews_corrcoef(y, predicted), rtol=1e-6)
    assert np.isnan(metrics.compute(0.0)["auc_ovr_macro"])


def test_top_k_is_scikit_learns_where_nothing_ties():
    rng = np.random.default_rng(13)
    labels, logits = rng.integers(0, 20, 500), rng.standard_normal((500, 20)).astype(np.float32)
    weights = rng.random(500).astype(np.float32)
    ks = (1, 2, 3, 5, 10, 20)
    head = jh.MultiClassHead(20).with_metrics(*map(M.TopKAccuracy, ks))
    values = head.measure(labels, logits, weights=weights).compute()
    for k in ks[:-1]:
        expected = sk.top_k_accuracy_score(labels, logits, k=k, sample_weight=weights.astype(float))
        np.testing.assert_allclose(values[f"top_{k}_accuracy"], expected, rtol=1e-6)
    assert values["top_20_accuracy"] == 1
    assert values["top_1_accuracy"] == values["accuracy"]


@pytest.mark.parametrize(
    ("bins", "width"),
    [(jh.LogitGrid(-30, 30, 60_000), 2e-4), pytest.param(jh.LogitGrid(), 6e-3, marks=pytest.mark.slow)],
    ids=["fine", "default"],
)
def test_areas_are_scikit_learns_where_every_class_is_there(bins, width):
    rng = np.random.default_rng(14)
    labels, logits = rng.integers(0, 4, 2000), 2 * rng.standard_normal((2000, 4))
    logits = (logits + (labels[:, None] == np.arange(4))).astype(np.float32)
    weights = rng.random(2000).astype(np.float32)
    averages: tuple[Any, ...] = ("macro", "weighted", "micro")
    head = jh.MultiClassHead(4).with_metrics(*(M.OneVsRestAuc(average=average, bins=bins) for average in averages))
    values = head.measure(labels, logits, weights=weights).compute(bounds=True)
    for average in averages:
        key = "auc_ovr" if average == "micro" else f"auc_ovr_{average}"
        options = {"multi_class": "ovr", "average": average, "sample_weight": weights.astype(float)}
        expected = sk.roc_auc_score(labels, softmax(logits.astype(float), -1), **options)
        lower, upper = ("/".join([key, end]) for end in ("lower", "upper"))
        assert values[lower] - 1e-6 <= expected <= values[upper] + 1e-6
        assert values[upper] - values[lower] < width


log_odds_of_each = jax.jit(stable.log_odds_of_each)


@pytest.mark.parametrize("scale", [0.1, 1, 30, 1000])
def test_log_odds_of_each_class_do_not_cancel(scale):
    z = (scale * np.random.default_rng(15).standard_normal((200, 7))).astype(np.float32)
    exact = z.astype(np.float64)
    expected = np.stack([exact[:, k] - logsumexp(np.delete(exact, k, 1), axis=1) for k in range(7)], 1)
    got = log_odds_of_each(z)
    np.testing.assert_allclose(got, expected, rtol=5e-7, atol=5e-7 * max(1.0, scale))


def test_the_first_of_equal_logits_is_predicted():
    ids: Any = np.array([[0], [1], [3]], np.int32)

    @jax.jit
    def decided(logits):
        return stable.first_argmax(logits), stable.rank(logits, ids), stable.is_argmax(logits, ids)

    for value in (0, -np.inf):
        logits = np.full((3, 4), value, np.float32)
        found = [x.ravel().tolist() for x in decided(logits)]
        assert found == [np.argmax(logits, -1).tolist(), [0, 1, 3], [True, False, False]]


def test_normalized_confusion():
    data = classes()
    heads = {by: jh.MultiClassHead(K).with_metrics(M.ConfusionMatrix(by)) for by in ("true", "pred", "all")}

    @jax.jit
    def measure(batch):
        counts = heads["all"].measure(**batch)  # the same for all
        metrics = {by: dataclasses.replace(counts, head=head) for by, head in heads.items()}
        return metrics, {by: each.compute(0.0) for by, each in metrics.items()}

    metrics, inside = measure(data)
    predicted, weights = data["logits"].argmax(-1), data["weights"][:, 0].astype(np.float64)
    for by in heads:
        options = {"labels": range(K), "normalize": by, "sample_weight": weights}
        expected = sk.confusion_matrix(data["labels"][:, 0], predicted, **options)
        for values in (metrics[by].compute(0.0), inside[by]):
            np.testing.assert_allclose(values["confusion_matrix"], expected, rtol=1e-6, atol=1e-7)


def test_small_classes_are_not_lost_inside_jit():
    """A class of weight 1 among 10^9: float32 differences of sums would know nothing of it."""
    head = jh.MultiClassHead(3).with_metrics(M.CohenKappa(), M.MatthewsCorrcoef(), M.Specificity(average=None))
    labels, logits = np.array([0, 0, 1, 1, 2]), np.eye(3, dtype=np.float32)[[0, 1, 1, 0, 2]]
    weights = np.array([1e9, 2, 1, 1, 1], np.float32)
    inside = jax.jit(lambda weights: head.measure(labels, logits, weights=weights).compute())(weights)
    predicted, w = logits.argmax(-1), weights.astype(np.float64)
    for key, score in (("cohen_kappa", sk.cohen_kappa_score), ("matthews_corrcoef", sk.matthews_corrcoef)):
        np.testing.assert_allclose(inside[key], score(labels, predicted, sample_weight=w), rtol=1e-5)
    np.testing.assert_allclose(inside["specificity/class0"], 2 / 3, rtol=1e-6)


# Cancellation.


def far_off(mean: float) -> dict[str, Any]:
    rng = np.random.default_rng(16)
    labels = (mean + rng.standard_normal((20_000, 1))).astype(np.float32)
    return {"labels": labels, "logits": (labels + 0.5 * rng.standard_normal((20_000, 1))).astype(np.float32)}


def explained_by_hand(labels, logits) -> dict[str, float]:
    y, p = labels[:, 0].astype(np.float64), logits[:, 0].astype(np.float64)
    return {
        "r2_score": sk.r2_score(y, p),
        "explained_variance": sk.explained_variance_score(y, p),
        "pearson_correlation": np.corrcoef(y, p)[0, 1],
    }


def explained(mean: float, shift: float | None = None) -> jh.Metrics:
    head = jh.RegressionHead().with_metrics(M.R2Score(shift=shift), M.ExplainedVariance(), M.PearsonCorrelation())
    return head.measure(**far_off(mean))


@pytest.mark.parametrize(
    "mean", [*(pytest.param(x, marks=pytest.mark.slow) for x in (0.0, 3.0, 100.0, 1e3, 1e5)), -1e4]
)
@pytest.mark.rounding
def test_labels_may_lie_far_from_zero(mean):
    """Float32 sums of squares would have lost the spread, of 1, at a mean of 10,000."""
    expected, metrics = explained_by_hand(**far_off(mean)), explained(mean)
    for key, value in expected.items():
        np.testing.assert_allclose(metrics.compute()[key], value, rtol=2e-6, err_msg=key)
    # It was the mend, and does no harm.
    assert explained(mean, shift=mean).compute() == metrics.compute()


@pytest.mark.slow
@pytest.mark.rounding
def test_parts_far_from_zero_add_up():
    """Parts with means of their own, one of them without a spread, in any order, on the host and in float32."""
    rng = np.random.default_rng(3)
    labels = np.repeat([2015.0, -3e4, 2015.5, 7e5], 50) + np.repeat([1, 20, 0, 1], 50) * rng.standard_normal(200)
    labels, logits = f32(labels)[:, None], f32(labels + rng.standard_normal(200))[:, None]
    head = jh.RegressionHead().with_metrics(M.R2Score(), M.ExplainedVariance(), M.PearsonCorrelation())
    parts = [head.measure(labels[i : i + 50], logits[i : i + 50]) for i in range(0, 200, 50)]
    expected = explained_by_hand(labels, logits)
    whole = sum(parts, head.metrics())
    inside = jax.device_get(jax.jit(lambda metrics: metrics.compute())(whole))
    for values in (
        whole.compute(),
        sum(parts[::-1], head.metrics()).compute(),
        jh.Metrics.merge(parts).compute(),
        inside,
    ):
        for key, value in expected.items():
            np.testing.assert_allclose(values[key], value, rtol=2e-6, err_msg=key)


@pytest.mark.parametrize(("mean", "within"), [(1e4, 2e-6), (1e5, 5e-5)])
@pytest.mark.rounding
def test_compute_inside_jit_is_near_for_labels_far_from_zero(mean, within):
    rng = np.random.default_rng(4)
    labels = f32(mean + rng.standard_normal((1000, 1)))
    logits = f32(labels + 0.3 * rng.standard_normal((1000, 1)))
    head = jh.RegressionHead().with_metrics(M.R2Score(), M.ExplainedVariance(), M.PearsonCorrelation())
    inside = jax.device_get(jax.jit(lambda metrics: metrics.compute())(head.measure(labels, logits)))
    for key, value in explained_by_hand(labels, logits).items():
        np.testing.assert_allclose(inside[key], value, rtol=within, err_msg=key)


@pytest.mark.rounding
def test_many_batches_far_from_zero_add_up_inside_jit():
    """More than a float32 digit would hold, were each batch not settled: 4,096 times the same rows."""
    labels, logits = f32(1e5 + np.arange(128.0))[:, None], f32(1e5 + np.arange(128.0) ** 1.01)[:, None]
    metrics = jh.RegressionHead().with_metrics(M.R2Score()).measure(labels, logits)
    many = dataclasses.replace(metrics, state=metrics.state * 4096)
    inside = jax.device_get(jax.jit(lambda metrics: metrics.compute()["r2_score"])(many))
    np.testing.assert_allclose(inside, explained_by_hand(labels, logits)["r2_score"], rtol=2e-6)


@pytest.mark.parametrize("scale", [1e-19, 1e18])
@pytest.mark.rounding
def test_a_spread_has_any_size(scale):
    data = far_off(2.0)
    expected = explained_by_hand(**data)
    head = jh.RegressionHead().with_metrics(M.R2Score(), M.ExplainedVariance(), M.PearsonCorrelation())
    values = head.measure(data["labels"] * f32(scale), data["logits"] * f32(scale)).compute()
    for key, value in expected.items():
        np.testing.assert_allclose(values[key], value, rtol=2e-6, err_msg=key)


def test_labels_that_float32_cannot_tell_apart_are_told():
    labels, head = 1.7e9 + np.arange(4.0), jh.RegressionHead()
    with pytest.warns(jh.RoundingWarning, match=r"rounds them by up to 3\.(.|\n)*Subtract 1.7e\+09"):
        head.loss(labels, np.zeros((4, 1), np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head.loss(labels - 1.7e9, np.zeros((4, 1), np.float32))
        head.loss(np.full(4, 1.7e9 + 1), np.zeros((4, 1), np.float32))  # all equal: there is nothing to tell apart
        head.loss(f32(labels), np.zeros((4, 1), np.float32))  # what is float32 already loses nothing more
        head.loss(labels, np.zeros((4, 1), np.float32), where=[True, False, False, False])


def test_a_shift_is_a_number_or_one_a_target():
    with pytest.raises(ValueError, match="2 targets: give one, or one a target"):
        jh.RegressionHead(2).with_metrics(M.R2Score(shift=(1, 2, 3)))


def test_targets_that_do_not_vary_are_left_out_of_the_mean():
    labels = np.array([[1.0, 3, 0], [2, 3, 0], [4, 3, 0]], np.float32)
    logits = np.array([[1.0, 2, 0], [2, 3, 0], [3, 4, 1]], np.float32)
    head = jh.RegressionHead(3).with_metrics(M.R2Score(), M.R2Score(multioutput="raw_values"))
    values = head.measure(labels, logits).compute()
    expected = sk.r2_score(labels[:, 0], logits[:, 0])
    np.testing.assert_allclose(values["r2_score"], expected, rtol=1e-6)
    assert np.isnan([values["r2_score/target1"], values["r2_score/target2"]]).all()
    told = head.measure(labels, logits).compute(-1.0)
    assert (told["r2_score/target1"], told["r2_score/target2"]) == (-1, -1)
    np.testing.assert_allclose(told["r2_score"], (expected - 2) / 3, rtol=1e-6)


def test_a_prediction_that_is_no_number_shows():
    head = jh.RegressionHead(2).with_metrics(*EVERY_REGRESSION_METRIC)
    logits = np.array([[1.0, 2], [np.nan, 3], [1, 5]], np.float32)
    values = head.measure(np.array([[1.0, 2], [2, 3], [3, 4]], np.float32), logits).compute(0.0)
    for key in ("r2_score", "pearson_correlation", "explained_variance", "mean_squared_error"):
        assert np.isnan([values[key], values[f"{key}/target0"]]).all()
        assert np.isfinite(values[f"{key}/target1"])


def reciprocal(logits):
    """What masks put in the place of logits, 0, is infinite here."""
    return 1 / logits


def test_masked_rows_are_absent_whatever_the_link_makes_of_them():
    head = jh.RegressionHead(inverse_link_fn=reciprocal).with_metrics(M.MeanSquaredError(), M.R2Score())
    data = {"labels": np.array([1.0, 2, 4, 3]), "logits": np.array([[1.0], [0.5], [0.2], [9]], np.float32)}
    values = head.measure(**data, where=np.array([1, 1, 1, 0])).compute()
    np.testing.assert_allclose(values["mean_squared_error"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(values["r2_score"], sk.r2_score([1, 2, 4], [1, 2, 5]), rtol=1e-6)


def test_each_logit_may_have_its_weight():
    rng = np.random.default_rng(17)
    labels, logits = (rng.standard_normal((50, 2)).astype(np.float32) for _ in range(2))
    weights = rng.random((50, 2)).astype(np.float32)
    head = jh.RegressionHead(2).with_metrics(M.R2Score(multioutput="raw_values"), M.MeanAbsoluteError())
    values = head.measure(labels, logits, weights=weights).compute()
    w = weights.astype(np.float64)
    errors = [sk.mean_absolute_error(labels[:, i], logits[:, i], sample_weight=w[:, i]) for i in range(2)]
    np.testing.assert_allclose(values["mean_absolute_error"], np.mean(errors), rtol=1e-6)
    for i in range(2):
        expected = sk.r2_score(labels[:, i], logits[:, i], sample_weight=w[:, i])
        np.testing.assert_allclose(values[f"r2_score/target{i}"], expected, rtol=1e-6)


# What does not fit is refused.


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: M.TopKAccuracy(0), "positive integer k"),
        (lambda: M.TopKAccuracy(True), "positive integer k"),
        (lambda: M.TopKAccuracy(2, average="weighted"), 'average must be "micro", "macro" or None'),
        (lambda: jh.MultiClassHead(3).with_metrics(M.TopKAccuracy(4)), "more than there are: 3 classes"),
        (lambda: M.ConfusionMatrix("rows"), "normalize must be"),
        (lambda: M.CohenKappa(weights="cubic"), "weights must be"),
        (lambda: M.OneVsRestAuc(bins=200), "bins must be"),
        (lambda: M.OneVsRestAuc(average="mean"), "average must be one of"),
        (lambda: M.MeanSquaredError("mean"), "multioutput must be one of"),
        (lambda: M.R2Score(shift=np.nan), "shift must be a number"),
        (lambda: M.R2Score(shift="mean"), "shift must be a number"),
        (lambda: jh.RegressionHead().with_metrics(M.ConfusionMatrix()), "head whose rows have one class each"),
        (lambda: jh.MultiClassHead(3).with_metrics(M.R2Score()), r"\['confusion', 'ranks', 'scores'\]"),
        (lambda: jh.MultiClassHead(3).with_metrics(M.Accuracy()), "'accuracy', which MultiClassHead has already"),
        (lambda: jh.BinaryClassHead().with_metrics(M.MeanIoU()), "'confusion', which this head does not have"),
    ],
)
def test_what_does_not_fit_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_classes_that_exclude_each_other_are_one_decision():
    """Loss, Brier score, accuracy and calibration of a row, not of its entries; by class, each against all others."""
    data = classes()
    head = jh.MultiClassHead(K, label_vocabulary=NAMES).with_metrics(
        M.LogLoss(),
        M.BrierScore(),
        M.Accuracy(name="right"),
        M.ExpectedCalibrationError(8),
        M.LogLoss(average=None),
        M.BrierScore(average="macro"),
        M.ExpectedCalibrationError(8, average=None),
    )

    @jax.jit
    def measure(batch):
        metrics = head.measure(**batch)
        return metrics, metrics.compute()

    metrics, inside = measure(data)
    w, y = data["weights"][:, 0].astype(np.float64), data["labels"][:, 0]
    p = softmax(data["logits"].astype(np.float64), -1)
    chosen = p.argmax(-1)

    def calibration_error(p, y):
        step = np.clip(np.ceil(8 * p).astype(int) - 1, 0, 7)
        return np.abs(np.bincount(step, w * (p - y), 8)).sum() / w.sum()

    brier = [np.average((p[:, k] - (y == k)) ** 2, weights=w) for k in range(K)]
    expected = {
        "log_loss": sk.log_loss(y, p, labels=range(K), sample_weight=w),
        "brier_score": sk.brier_score_loss(y, p, labels=range(K), sample_weight=w),
        "right": sk.accuracy_score(y, chosen, sample_weight=w),
        "expected_calibration_error": calibration_error(p.max(-1), chosen == y),
        "brier_score_macro": np.mean(brier),
        "log_loss/bee": sk.log_loss(y == 1, p[:, 1], sample_weight=w),
        "expected_calibration_error/bee": calibration_error(p[:, 1], y == 1),
    }
    for values in (metrics.compute(), inside):
        for key, value in expected.items():
            np.testing.assert_allclose(values[key], value, rtol=2e-6, atol=1e-7, err_msg=key)
        np.testing.assert_allclose(values["right"], values["accuracy"], rtol=1e-6)
        np.testing.assert_allclose(values["log_loss"], values["average_loss"], rtol=1e-6)


def test_bins_of_one_metric_serve_all():
    data, bins = classes(), jh.LogitGrid(-4, 4, 130)
    auc, precision = M.OneVsRestAuc(bins=bins), M.AveragePrecision(average="macro")
    heads = [jh.MultiClassHead(K).with_metrics(*given) for given in ((auc, precision), (precision, auc), (auc,))]
    one, other, alone = jax.jit(lambda batch: [head.measure(**batch) for head in heads])(data)
    assert one.state.shape == other.state.shape
    assert one.compute() == other.compute()
    assert one.compute()["auc_ovr_macro"] == alone.compute()["auc_ovr_macro"]
    with pytest.raises(ValueError, match=r"Given bins LogitGrid\(.* and LogitGrid\((.|\n)*Give them to one"):
        jh.MultiClassHead(K).with_metrics(auc, M.OneVsRestAuc(average=None, bins=jh.LogitGrid(-5, 5)))


def test_a_function_has_a_state_of_its_own():
    class Hidden(jh.Head):
        logits_dimension = 1

        def losses(self, labels, logits):
            return (labels - logits) ** 2

        def observe(self, labels, logits):
            return {"hidden": jh.Mean(jnp.abs(labels - logits))}

        def summarize(self, seen):
            return {"mae": seen["hidden"].mean}

    head = Hidden().with_metrics(hidden=lambda labels, logits: 0 * logits + 7, scores=lambda labels, logits: logits)
    values = head.measure([1.0, 2.0], [[0.0], [1.0]]).compute()
    assert (values["mae"], values["hidden"], values["scores"]) == (1, 7, 0.5)


def test_k_may_be_numpys():
    assert M.TopKAccuracy(np.int64(2)) == M.TopKAccuracy(2)
