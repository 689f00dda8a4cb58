"""The catalogue of metrics of scores, against scikit-learn and against float64 NumPy on the scores without bins."""

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn
from sklearn.calibration import calibration_curve

import jaxheads as jh
from jaxheads.metrics import calibration
from jaxheads.metrics.state import slots
from jaxheads.numerics import stable

M = jh.metrics
ROWS = 400
nan: Any = np.nan  # as `zero_division` it is no float to a type checker
SCORES = ("continuous", "ties", "one_bin", "equal", "beyond", "separated")


@dataclasses.dataclass(frozen=True)
class Rows:
    """One class: hard labels, scores and weights in float64; `of` splits soft labels in a positive and a negative."""

    y: np.ndarray
    z: np.ndarray
    w: np.ndarray

    @classmethod
    def of(cls, labels: Any, logits: Any, weights: Any) -> "Rows":
        y, z, w = (np.asarray(x, np.float64).ravel() for x in np.broadcast_arrays(labels, logits, weights))
        split = cls(np.repeat([1.0, 0.0], len(y)), np.tile(z, 2), np.concatenate([w * y, w * (1 - y)]))
        keep = split.w > 0
        return cls(split.y[keep], split.z[keep], split.w[keep])

    @functools.cached_property
    def cuts(self) -> np.ndarray:
        """TP, FP, FN, TN at every threshold that decides differently, from all positive to none: `[4, cuts]`."""
        values, place = np.unique(self.z, return_inverse=True)
        below = [
            np.concatenate([[0], np.cumsum(np.bincount(place, self.w * (self.y == y), len(values)))]) for y in (1, 0)
        ]
        return np.stack([below[0][-1] - below[0], below[1][-1] - below[1], below[0], below[1]])

    def decided(self, threshold: float | None, bins: Any) -> np.ndarray:
        if isinstance(bins, jh.ThresholdGrid) and threshold is not None:
            p = np.asarray(jax.nn.sigmoid(jnp.asarray(self.z, jnp.float32)))
            return p > np.float32(threshold)
        return self.z > np.float32(0 if threshold is None else stable.log_odds(threshold))


def ratio(a, b):
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(a) / np.asarray(b)


def among(rows: Rows, value: np.ndarray, held: np.ndarray) -> float:
    """The largest value where something is held; nothing predicted positive has precision 1 and recall 0."""
    return float(np.max(np.where(held, value, 0.0)))


def precision_at_recall(rows: Rows, recall: float) -> float:
    tp, fp, fn, _ = rows.cuts[:, :-1]
    return among(rows, ratio(tp, tp + fp), tp >= recall * (tp + fn) * (1 - 1e-9))


def recall_at_precision(rows: Rows, precision: float) -> float:
    tp, fp, fn, _ = rows.cuts[:, :-1]
    return among(rows, ratio(tp, tp + fn), tp >= precision * (tp + fp) * (1 - 1e-9))


def sensitivity_at_specificity(rows: Rows, specificity: float) -> float:
    tp, fp, fn, tn = rows.cuts
    return among(rows, ratio(tp, tp + fn), tn >= specificity * (tn + fp) * (1 - 1e-9))


def specificity_at_sensitivity(rows: Rows, sensitivity: float) -> float:
    tp, fp, fn, tn = rows.cuts
    return among(rows, ratio(tn, tn + fp), tp >= sensitivity * (tp + fn) * (1 - 1e-9))


def best_f(rows: Rows, beta: float) -> float:
    tp, fp, fn, _ = rows.cuts[:, :-1]
    return float(np.max((1 + beta**2) * tp / ((1 + beta**2) * tp + fp + beta**2 * fn)))


def lowest_cost(rows: Rows, false_positive: float, false_negative: float) -> float:
    _, fp, fn, _ = rows.cuts
    return float(np.min(false_positive * fp + false_negative * fn) / rows.w.sum())


def kolmogorov_smirnov(rows: Rows) -> float:
    fpr, tpr, _ = sklearn.roc_curve(rows.y, rows.z, sample_weight=rows.w, drop_intermediate=False)
    return float(np.max(np.abs(tpr - fpr)))


def interpolated(rows: Rows) -> float:
    """The area by Davis and Goadrich, `integral of TP / (TP + FP) dTP` along straight lines between the cuts."""
    area = 0.0
    tp, fp = rows.cuts[:2, ::-1]
    for t, f, more_t, more_f in zip(tp, fp, np.diff(tp), np.diff(fp), strict=False):
        slope, found = more_t / (more_t + more_f), t + f
        growth = np.log((found + more_t + more_f) / found) if found > 0 else 0.0
        area += slope * (more_t + (t - slope * found) * growth)
    return area / tp[-1]


def calibration_error(rows: Rows, bins: int) -> float:
    p = 1 / (1 + np.exp(-rows.z))
    step = np.searchsorted(np.arange(1, bins) / bins, p, side="left")
    return float(np.abs(np.bincount(step, rows.w * (p - rows.y))).sum() / rows.w.sum())


def normed(rows: Rows, norm: str, bins: int = 15) -> float:
    """The root of the mean square, or the largest, of the distances in the steps: step by step."""
    p = 1 / (1 + np.exp(-rows.z))
    step = np.searchsorted(np.arange(1, bins) / bins, p, side="left")
    own = [step == k for k in np.unique(step)]
    gaps = [abs(np.average(p[x], weights=rows.w[x]) - np.average(rows.y[x], weights=rows.w[x])) for x in own]
    if norm == "max":
        return float(max(gaps))
    return float(np.sqrt(np.average(np.square(gaps), weights=[rows.w[x].sum() for x in own])))


def by_sklearn(function: Callable[..., Any], **arguments: Any) -> Callable[..., float]:
    return lambda rows, z: float(function(rows.y, z, sample_weight=rows.w, **arguments))


def logistic(rows: Rows) -> np.ndarray:
    return 1 / (1 + np.exp(-rows.z))


def specificity(rows: Rows, decided: np.ndarray) -> float:
    return float(sklearn.recall_score(1 - rows.y, ~decided, sample_weight=rows.w, zero_division=nan))


# What is exact at a threshold: the class, its arguments, its key, the value from the rows and what is decided for them.
DECIDED: list[tuple[Any, dict[str, Any], str, Callable[..., float]]] = [
    (M.Precision, {}, "precision", by_sklearn(sklearn.precision_score, zero_division=nan)),
    (M.Recall, {}, "recall", by_sklearn(sklearn.recall_score, zero_division=nan)),
    (M.FBeta, {}, "f1", by_sklearn(sklearn.f1_score, zero_division=nan)),
    (M.FBeta, {"beta": 2}, "fbeta_2", by_sklearn(sklearn.fbeta_score, beta=2, zero_division=nan)),
    (M.FBeta, {"beta": 0.5}, "fbeta_0.5", by_sklearn(sklearn.fbeta_score, beta=0.5, zero_division=nan)),
    (M.Specificity, {}, "specificity", specificity),
    (M.Accuracy, {}, "accuracy", by_sklearn(sklearn.accuracy_score)),
    (M.BalancedAccuracy, {}, "balanced_accuracy", by_sklearn(sklearn.balanced_accuracy_score)),
    (M.MatthewsCorrcoef, {}, "matthews_corrcoef", by_sklearn(sklearn.matthews_corrcoef)),
    (M.CohenKappa, {}, "cohen_kappa", by_sklearn(sklearn.cohen_kappa_score)),
]

# What is exact whatever the scores.
EXACT: list[tuple[Any, dict[str, Any], str, Callable[[Rows], float]]] = [
    (M.BrierScore, {}, "brier_score", lambda r: by_sklearn(sklearn.brier_score_loss)(r, logistic(r))),
    (M.LogLoss, {}, "log_loss", lambda r: float(np.average(np.logaddexp(0, np.where(r.y, -r.z, r.z)), weights=r.w))),
    (M.BaseRate, {}, "base_rate", lambda r: float(np.average(r.y, weights=r.w))),
    (M.ExpectedCalibrationError, {}, "expected_calibration_error", lambda r: calibration_error(r, 15)),
    (M.ExpectedCalibrationError, {"bins": 7, "name": "ece_7"}, "ece_7", lambda r: calibration_error(r, 7)),
    (M.ExpectedCalibrationError, {"norm": "l2"}, "expected_calibration_error_l2", lambda r: normed(r, "l2")),
    (M.ExpectedCalibrationError, {"norm": "max"}, "expected_calibration_error_max", lambda r: normed(r, "max")),
]

# What bins leave an interval of.
BINNED: list[tuple[Any, dict[str, Any], str, Callable[[Rows], float]]] = [
    (M.RocAuc, {}, "auc", lambda r: by_sklearn(sklearn.roc_auc_score)(r, r.z)),
    (M.PrAuc, {}, "auc_precision_recall", interpolated),
    (M.AveragePrecision, {}, "average_precision", lambda r: by_sklearn(sklearn.average_precision_score)(r, r.z)),
    (M.KolmogorovSmirnov, {}, "kolmogorov_smirnov", kolmogorov_smirnov),
    (M.BestThreshold, {}, "best_f1", lambda r: best_f(r, 1)),
    (M.BestThreshold, {"beta": 0.5}, "best_fbeta_0.5", lambda r: best_f(r, 0.5)),
    (
        M.BestThreshold,
        {"cost_false_positive": 1, "cost_false_negative": 5},
        "lowest_cost",
        lambda r: lowest_cost(r, 1, 5),
    ),
]
for x in (0.2, 0.9, 1.0):
    partial = functools.partial(sklearn.roc_auc_score, max_fpr=x)
    BINNED += [
        (M.RocAuc, {"max_fpr": x}, f"auc_max_fpr_{x:g}", lambda r, score=partial: by_sklearn(score)(r, r.z)),
        (M.PrecisionAtRecall, {"recall": x}, f"precision_at_recall_{x:g}", lambda r, x=x: precision_at_recall(r, x)),
        (
            M.RecallAtPrecision,
            {"precision": x},
            f"recall_at_precision_{x:g}",
            lambda r, x=x: recall_at_precision(r, x),
        ),
        (
            M.SensitivityAtSpecificity,
            {"specificity": x},
            f"sensitivity_at_specificity_{x:g}",
            lambda r, x=x: sensitivity_at_specificity(r, x),
        ),
        (
            M.SpecificityAtSensitivity,
            {"sensitivity": x},
            f"specificity_at_sensitivity_{x:g}",
            lambda r, x=x: specificity_at_sensitivity(r, x),
        ),
    ]

THRESHOLDS = (None, 0.3, 0.9)


def catalogue(average: Any) -> tuple[Any, ...]:
    """All metrics, but those that every head with scores has already."""

    def given(arguments: dict[str, Any]) -> dict[str, Any]:
        # A name of one's own is taken as it is.
        named = {"name": arguments["name"] + suffix_of(average)} if "name" in arguments else {}
        return {**arguments, **named, "average": average}

    made = [cls(**given(arguments)) for cls, arguments, _, _ in EXACT + BINNED]
    made += [cls(threshold=t, **given(arguments)) for cls, arguments, _, _ in DECIDED for t in THRESHOLDS]
    return tuple(made)


def suffix_of(average: Any) -> str:
    return "" if average in ("micro", None) else f"_{average}"


def ending(threshold: float | None) -> str:
    return "" if threshold is None else f"/positive_threshold_{threshold:g}"


class ScoredHead(jh.Head):
    """A head with the source `scores` and no metrics of its own, so that no name is taken."""

    n: int = 1
    bins: Any = jh.LogitGrid()
    names: tuple[str, ...] = ()

    @property
    def logits_dimension(self):
        return self.n

    @property
    def label_spec(self):
        return jh.LabelSpec(self.n, "float", 0, 1)

    def losses(self, labels, logits):
        return (labels - logits) ** 2

    def sources(self, labels, logits):
        return {"scores": lambda: jh.Scores(labels, logits, self.bins, names=self.names)}


GRIDS = (jh.LogitGrid(), jh.LogitGrid(-2, 2, 6), jh.ThresholdGrid(12))


@functools.cache
def binary(bins: Any) -> Any:
    return ScoredHead(1, bins).with_metrics(*catalogue("micro"))


def sampled(kind: str, soft: bool, seed: int, columns: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.random((ROWS, columns)) < 0.3
    z = rng.normal(size=(ROWS, columns)) + labels
    logits = {
        "continuous": z,
        "inverted": -z,
        # On the edges of the grids, and between them.
        "ties": np.round(z * 4) / 4,
        "one_bin": 0.3 + np.round(z * 4) / 4 * 1e-3,
        "equal": np.full_like(z, 0.7),
        "beyond": 30 * z,
        "separated": np.where(labels, 1, -1) + 0.1 * np.round(z),
    }[kind]
    y = np.clip(labels + rng.integers(-3, 4, labels.shape) / 4, 0, 1) if soft else labels.astype(np.float64)
    weights = np.where(rng.random((ROWS, 1)) < 0.1, 0, rng.random((ROWS, 1)) * 3)
    return y.astype(np.float32), logits.astype(np.float32), weights.astype(np.float32)


def measured(head: Any, labels: Any, logits: Any, weights: Any = 1.0, where: Any = True) -> jh.Metrics:
    """The metrics of some rows: always with weights and a mask, and filled up to 400, for one program a head."""
    labels, n = np.asarray(labels, np.float32).reshape(len(logits), -1), len(logits)
    weights, where = (np.broadcast_to(np.reshape(x, (-1, 1)), (n, 1)) for x in (weights, where))
    rows = np.arange(ROWS) % n
    given = {"weights": weights.astype(np.float32)[rows], "where": where[rows] & (np.arange(ROWS) < n)[:, None]}
    return head.measure(labels[rows], logits[rows], **given)


def close(got: Any, expected: Any, name: str, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=atol, err_msg=name)


def check_binned(values: dict[str, Any], key: str, truth: float) -> None:
    lower, upper = values[f"{key}/lower"], values[f"{key}/upper"]
    assert lower - 1e-6 <= truth <= upper + 1e-6, (key, lower, truth, upper)
    assert lower <= values[key] <= upper, key


@pytest.mark.parametrize("bins", GRIDS, ids=repr)
@pytest.mark.parametrize(
    ("kind", "soft", "seeds"),
    [
        pytest.param(
            *(kind, soft, seeds),
            marks=[] if seeds == (0,) and (not soft or kind == "ties") else [pytest.mark.slow],
            id=f"{'first' if seeds == (0,) else 'more'}-{'soft' if soft else 'hard'}-{kind}",
        )
        for seeds in ((0,), (1, 2))
        for soft in (False, True)
        for kind in SCORES
    ],
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_every_metric_is_that_of_the_scores_without_bins(bins, kind, soft, seeds):
    for seed in seeds:
        labels, logits, weights = sampled(kind, soft, seed)
        rows = Rows.of(labels, logits, weights)
        values = measured(binary(bins), labels, logits, weights).compute(bounds=True)
        for cls, arguments, key, oracle in EXACT:
            close(values[key], oracle(rows), f"{cls.__name__} {arguments}")
        for _, _, key, oracle in BINNED:
            check_binned(values, key, oracle(rows))
        for _, _, key, oracle in DECIDED:
            for t in THRESHOLDS:
                decided, expected = rows.decided(t, bins), oracle(rows, rows.decided(t, bins))
                if key in ("matthews_corrcoef", "cohen_kappa") and len(np.unique(decided)) == 1:
                    expected = nan if key == "matthews_corrcoef" else 0.0  # scikit-learn gives 0 for the first
                close(values[key + ending(t)], expected, key + ending(t))


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("kind", ["continuous", "inverted", "ties"])
def test_values_of_scores_that_share_no_bin_are_exact(kind, soft):
    """With an edge between any two different scores, every value is that of the scores."""
    labels, logits, weights = sampled(kind, soft, 5)
    place = np.unique(logits, return_inverse=True)[1].reshape(logits.shape)
    logits = ((place - place.max() / 2) / 32 + 1 / 128).astype(np.float32)
    rows = Rows.of(labels, logits, weights)
    values = measured(binary(jh.LogitGrid()), labels, logits, weights).compute()
    for _, _, key, oracle in BINNED:
        close(values[key], oracle(rows), key)


def viewed(rows: Rows, bins: Any) -> Any:
    """A histogram filled by NumPy, that nothing need be compiled."""
    layout = bins.layout(())
    bucket = np.searchsorted(layout.logits, rows.z, side="left")
    sums = [np.bincount(bucket, rows.w * (rows.y == y), layout.n_buckets) for y in (0, 1)]
    nothing = np.zeros((1, 1), np.float32)
    return jh.Scores(nothing, nothing, bins).read(np.concatenate(sums), np, nan)


@pytest.mark.parametrize("weighted", [False, True], ids=["counts", "weights"])
@pytest.mark.parametrize("tables", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_bounds_hold_for_a_few_rows_in_any_order(weighted, tables):
    """Where anything can happen inside a bin: up to twelve rows, in two or three bins, most of them tied."""
    rng, bins = np.random.default_rng(17), jh.LogitGrid(-1, 1, 4)
    inside = np.zeros(2)
    for _ in range(tables):
        n = rng.integers(3, 13)
        y = np.concatenate([[0.0, 1.0], rng.integers(0, 2, n - 2)])
        z = rng.choice([-1.5, -0.5, 0.5, 1.5], n, p=[0.1, 0.4, 0.4, 0.1]) + rng.choice([0.0, 0.1, 0.2, 0.3], n)
        rows = Rows(y, z, rng.choice([0.1, 1.0, 7.0], n) if weighted else np.ones(n))
        view = viewed(rows, bins)
        for cls, arguments, key, oracle in BINNED:
            interval, truth = cls(**arguments).values(view)[key], oracle(rows)
            assert interval.lower - 1e-6 <= truth <= interval.upper + 1e-6, (cls, arguments, rows, interval, truth)
            inside += (interval.lower + 1e-6 < truth, truth < interval.upper - 1e-6)
    # Not because the bounds are 0 and 1.
    assert inside.min() > tables


def test_bounds_are_reached():
    """The bounds are no wider than they must be: some order of the scores in a bin reaches them."""
    rng, found = np.random.default_rng(0), {}
    labels = rng.random(40) < 0.4
    bin_of = rng.integers(0, 3, 40)
    for higher in (False, True):  # the positives of each bin
        rows = Rows(labels * 1.0, bin_of + np.where(labels == higher, 0.2, 0.1) - 1.5, np.ones(40))
        for _, _, key, oracle in BINNED:
            found.setdefault(key, []).append(oracle(rows))
    view = viewed(rows, jh.LogitGrid(-1, 1, 4))
    values = {key: cls(**arguments).values(view)[key] for cls, arguments, key, _ in BINNED}
    assert (values["auc"].lower, values["auc"].upper) == pytest.approx(found["auc"], abs=1e-6)
    for key in ("average_precision", "kolmogorov_smirnov", "best_f1", "precision_at_recall_0.9"):
        assert values[key].upper == pytest.approx(max(found[key]), abs=1e-6), key
    assert values["lowest_cost"].lower == pytest.approx(min(found["lowest_cost"]), abs=1e-6)


def decided_by(values, key, rows, bins):
    """The weights of the four outcomes, deciding the rows by hand at the threshold that a metric tells."""
    decided = rows.z > values[f"{key}_logit"]
    if isinstance(bins, jh.ThresholdGrid):
        decided = np.asarray(jax.nn.sigmoid(jnp.asarray(rows.z, jnp.float32))) > values[f"{key}_threshold"]
    close(1 / (1 + np.exp(-np.float64(values[f"{key}_logit"]))), values[f"{key}_threshold"], key)
    return tuple(rows.w[(decided == d) & (rows.y == y)].sum() for d, y in ((1, 1), (1, 0), (0, 1), (0, 0)))


@pytest.mark.parametrize("bins", GRIDS, ids=repr)
@pytest.mark.parametrize("kind", SCORES)
def test_the_best_threshold_reaches_its_value(bins, kind):
    labels, logits, weights = sampled(kind, False, 7)
    rows = Rows.of(labels, logits, weights)
    values = measured(binary(bins), labels, logits, weights).compute()
    for key, sign, best in (("best_f1", 1, best_f(rows, 1)), ("lowest_cost", -1, lowest_cost(rows, 1, 5))):
        tp, fp, fn, tn = decided_by(values, key, rows, bins)
        reached = 2 * tp / (2 * tp + fp + fn) if key == "best_f1" else (fp + 5 * fn) / (tp + fp + fn + tn)
        close(values[key], reached, key)
        assert sign * reached <= sign * best + 1e-9, key


OPERATING = {
    "precision_at_recall_0.9": ("precision", "recall", 0.9),
    "recall_at_precision_0.9": ("recall", "precision", 0.9),
    "sensitivity_at_specificity_0.9": ("recall", "specificity", 0.9),
    "specificity_at_sensitivity_0.9": ("specificity", "recall", 0.9),
}


@pytest.mark.parametrize("bins", GRIDS, ids=repr)
@pytest.mark.parametrize("kind", SCORES)
def test_an_operating_point_is_had_at_its_threshold(bins, kind):
    """The value is reached, and the rate is held."""
    labels, logits, weights = sampled(kind, False, 7)
    rows = Rows.of(labels, logits, weights)
    values = measured(binary(bins), labels, logits, weights).compute()
    for key, (value, held, rate) in OPERATING.items():
        tp, fp, fn, tn = decided_by(values, key, rows, bins)
        rates = {
            "precision": tp / (tp + fp) if tp + fp else 1.0,
            "recall": tp / (tp + fn),
            "specificity": tn / (tn + fp),
        }
        close(values[key], rates[value], key)
        assert rates[held] >= rate - 2e-7, key


def test_thresholds_of_rates_that_only_the_ends_hold():
    labels, logits = np.array([1.0, 0, 0, 0]), np.array([[-3.0], [-1.0], [2.0], [4.0]], np.float32)
    values = measured(binary(jh.LogitGrid()), labels, logits).compute()
    # The one positive has the lowest score: found with all others, or never with precision.
    assert (values["precision_at_recall_0.9"], values["recall_at_precision_0.9"]) == (0.25, 0)
    assert values["precision_at_recall_0.9_logit"] < -3
    assert values["recall_at_precision_0.9_logit"] > 4
    none = measured(binary(jh.LogitGrid()), np.zeros(4), logits).compute()
    assert np.isnan(none["precision_at_recall_0.9_threshold"])


def test_the_best_threshold_lies_in_the_middle_of_the_gap():
    labels, logits = np.array([0.0, 0, 1, 1]), np.array([[-3.0], [-1.0], [2.0], [4.0]], np.float32)
    values = measured(binary(jh.LogitGrid()), labels, logits).compute()
    assert values["best_f1"] == 1
    assert values["best_f1_logit"] == pytest.approx(0.5, abs=1 / 32)
    # Where a miss costs most, all is positive; where a false alarm does, nothing is.
    head = ScoredHead().with_metrics(
        M.BestThreshold(cost_false_positive=1e-6, cost_false_negative=1, name="all"),
        M.BestThreshold(cost_false_positive=1, cost_false_negative=1e-6, name="none"),
    )
    mixed = head.measure(np.array([1.0, 0, 1, 0]), logits).compute()
    assert mixed["all_logit"] < -3
    assert mixed["none_logit"] > 4
    assert 0 <= mixed["all_threshold"] < mixed["none_threshold"] <= 1


TENTHS = tuple(k / 10 for k in range(1, 11))


@pytest.mark.parametrize(
    ("weight", "rates"),
    [(0.1, (0.3, 0.6, 0.9)), *(pytest.param(weight, TENTHS, marks=pytest.mark.slow) for weight in (1.0, 0.1, 1 / 3))],
)
def test_a_rate_that_is_just_reached_is_held(weight, rates):
    """Nine of ten, in weights whose sums are rounded."""
    logits = np.linspace(-3, 3, 20).astype(np.float32)[:, None]
    labels = np.tile([0.0, 1.0], 10)
    asked = [cls(rate) for cls in (M.PrecisionAtRecall, M.SpecificityAtSensitivity) for rate in rates]
    asked += [M.SensitivityAtSpecificity(rate) for rate in rates]
    metrics = ScoredHead().with_metrics(*asked).measure(labels, logits, weights=np.full(20, weight, np.float32))
    rows = Rows.of(labels[:, None], logits, 1.0)
    for values in (metrics.compute(), jax.jit(lambda m: m.compute())(metrics)):
        for rate in rates:
            close(values[f"precision_at_recall_{rate:g}"], precision_at_recall(rows, rate), f"{rate}")
            close(values[f"specificity_at_sensitivity_{rate:g}"], specificity_at_sensitivity(rows, rate), f"{rate}")
            close(values[f"sensitivity_at_specificity_{rate:g}"], sensitivity_at_specificity(rows, rate), f"{rate}")


def test_without_weights_they_are_those_of_scipy_and_scikit_learn():
    labels, logits, _ = sampled("ties", False, 3)
    y, z = labels[:, 0], logits[:, 0].astype(np.float64)
    asked = (M.PrecisionAtRecall(0.9), M.RecallAtPrecision(0.9), M.BestThreshold(), M.KolmogorovSmirnov())
    asked += (M.SensitivityAtSpecificity(0.9), M.SpecificityAtSensitivity(0.9))
    head = ScoredHead(1, jh.LogitGrid(-8, 8, 8 * 16 + 2)).with_metrics(*asked)
    values = measured(head, labels, logits).compute()
    # Each score has a bin of its own: they are multiples of 1/4, and lie at the upper ends of bins.
    statistic: Any = stats.ks_2samp(z[y == 1], z[y == 0])
    assert values["kolmogorov_smirnov"] == pytest.approx(statistic.statistic, abs=1e-6)
    precision, recall, _ = sklearn.precision_recall_curve(y, z)
    assert values["precision_at_recall_0.9"] == pytest.approx(precision[recall >= 0.9].max(), abs=1e-6)
    assert values["recall_at_precision_0.9"] == pytest.approx(recall[precision >= 0.9].max(), abs=1e-6)
    with np.errstate(invalid="ignore"):
        assert values["best_f1"] == pytest.approx(np.nanmax(2 * precision * recall / (precision + recall)), abs=1e-6)
    fpr, tpr, _ = sklearn.roc_curve(y, z, drop_intermediate=False)
    assert values["sensitivity_at_specificity_0.9"] == pytest.approx(tpr[fpr <= 0.1].max(), abs=1e-6)
    assert values["specificity_at_sensitivity_0.9"] == pytest.approx(1 - fpr[tpr >= 0.9].min(), abs=1e-6)


# What holds of every metric.

SHARED = ("continuous", "ties")


BY_CLASS = ("macro", "weighted", None)


@functools.cache
def multi(*averages: Any) -> Any:
    metrics = [metric for average in averages for metric in catalogue(average)]
    return ScoredHead(4, names=("sea", "sun", "sand", "sky")).with_metrics(*metrics)


def absent(labels: np.ndarray) -> np.ndarray:
    """Without positives of the third class, without negatives of the last."""
    labels = labels.copy()
    labels[:, 2], labels[:, 3] = 0, 1
    return labels


def same(a: dict[str, Any], b: dict[str, Any], atol: float = 1e-6) -> None:
    assert set(a) == set(b)
    for key, value in b.items():
        close(a[key], value, key, atol)


@pytest.mark.parametrize(
    "head",
    [binary(jh.LogitGrid()), pytest.param(multi(*BY_CLASS), marks=pytest.mark.slow)],
    ids=["binary", "by_class"],
)
def test_weights_masks_and_batches(head):
    labels, logits, weights = sampled("ties", True, 11, head.n)
    whole = measured(head, labels, logits, weights).compute(bounds=True)
    # A hundred rows are there once more, or count twice.
    again, rows = np.arange(ROWS) % 300, slice(300)
    twice = measured(head, labels[again], logits[again], weights[again]).compute(bounds=True)
    times = np.where(np.arange(300) < 100, 2, 1)[:, None]
    same(measured(head, labels[rows], logits[rows], weights[rows] * times).compute(bounds=True), twice)
    keep = np.arange(ROWS) % 4 == 0
    gone = np.where(keep[:, None], logits, np.float32(np.nan))
    masked = measured(head, labels, gone, weights, keep).compute(bounds=True)
    same(masked, measured(head, labels[keep], logits[keep], weights[keep]).compute(bounds=True))
    parts = [measured(head, labels, logits, weights, np.arange(ROWS) // 100 == i) for i in range(4)]
    same(sum(parts, head.metrics()).compute(bounds=True), whole)


def one_of_each(average: Any, columns: int) -> Any:
    """A head with one metric of each class: what compiles in a few seconds."""
    kinds = {type(metric): metric for metric in catalogue(average) if getattr(metric, "threshold", 0.3) == 0.3}
    return ScoredHead(columns).with_metrics(*kinds.values())


JITTED = [one_of_each("micro", 1), one_of_each("macro", 4), one_of_each(None, 4)]


@pytest.mark.parametrize(
    "head",
    JITTED[:1] + [pytest.param(head, marks=pytest.mark.slow) for head in JITTED[1:]],
    ids=["binary", "macro", "by_class"],
)
def test_inside_jit_and_with_leading_axes(head):
    """Of ordinary states, with weights of any size, of one that has a NaN score, and of one that has seen nothing."""
    states = [head.metrics().state]
    for seed, (kind, size) in enumerate((("continuous", 1), ("ties", 1e-30), ("one_bin", 1e30), ("equal", 1))):
        labels, logits, weights = sampled(kind, True, seed, head.n)
        logits[3, 0] = np.nan if kind == "equal" else logits[3, 0]
        weights = (weights + 0.1) * np.float32(size)
        metrics = head.measure(absent(labels) if head.n > 1 else labels, logits, weights=weights)
        states.append((metrics + head.metrics()).state)
        if size != 1:
            labels = absent(labels) if head.n > 1 else labels
            plain = head.measure(labels, logits, weights=weights / np.float32(size)).compute(bounds=True)
            same(metrics.compute(bounds=True), plain, 2e-6)
    stacked = dataclasses.replace(head.metrics(), state=np.stack(states))
    outside = stacked.compute(bounds=True, undefined=-7.0)
    same(jax.jit(lambda m: m.compute(bounds=True, undefined=-7.0))(stacked), outside, 2e-6)
    for i, state in enumerate(states):
        each = dataclasses.replace(stacked, state=state).compute(bounds=True, undefined=-7.0)
        same({key: value[i] for key, value in outside.items()}, each)
    assert {float(value[0]) for value in outside.values()} == {-7}
    seen = {key for key, value in outside.items() if not np.isnan(value[-1])}
    # Labels are none the worse for a NaN score, nor are other classes.
    spared = ("base_rate", "class1", "class2", "class3")
    assert all(any(name in key for name in spared) for key in seen), seen
    assert len(seen) < len(outside)


@pytest.mark.slow
def test_metrics_of_devices_are_merged():
    head, devices = binary(jh.LogitGrid()), jax.device_count()
    assert devices > 1
    labels, logits, weights = sampled("ties", True, 4)
    whole = measured(head, labels, logits, weights).compute()
    parts = [x.reshape(devices, ROWS // devices, 1) for x in (labels, logits, weights)]
    mapped = jax.pmap(lambda y, z, w: head.measure(y, z, weights=w).psum("d"), "d")(*parts)
    same({key: value[0] for key, value in mapped.compute().items()}, whole)
    mesh = jax.make_mesh((devices,), ("d",))
    put = functools.partial(jax.device_put, device=jax.NamedSharding(mesh, jax.P("d")))
    several = multi(*BY_CLASS)
    y, z, w = sampled("ties", True, 4, several.n)
    on_mesh = jax.jit(lambda y, z, w: several.measure(y, z, weights=w))(put(y), put(z), put(w))
    same(on_mesh.compute(), measured(several, y, z, w).compute())


def class_rows(labels: Any, logits: Any, weights: Any) -> list[Rows]:
    return [Rows.of(labels[:, c : c + 1], logits[:, c : c + 1], weights) for c in range(labels.shape[1])]


def oracles() -> list[tuple[str, Callable[[Rows], float], bool]]:
    """All keys, with the truth of one class, and whether bins leave an interval."""
    out = [(key, oracle, False) for _, _, key, oracle in EXACT] + [(key, oracle, True) for _, _, key, oracle in BINNED]
    for _, _, key, oracle in DECIDED:
        for t in THRESHOLDS:
            out.append((key + ending(t), lambda r, t=t, f=oracle: f(r, r.decided(t, jh.LogitGrid())), False))
    return out


def one_class(key: str, rows: Rows, oracle: Callable[[Rows], float]) -> float:
    """The truth of a class, NaN by our rules: no positives, or no negatives."""
    positives, negatives = rows.cuts[0, 0] > 0, rows.cuts[1, 0] > 0
    needs_positives = ("auc", "average", "precision_at", "recall_at", "best", "kolmo", "sensitivity", "specificity_at")
    needs_negatives = ("auc", "kolmo", "sensitivity", "specificity_at", "matthews")
    if key.startswith((*needs_positives, "matthews")) and not positives:
        return nan
    if key.startswith(needs_negatives) and not key.startswith("auc_precision") and not negatives:
        return nan
    return oracle(rows)


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.filterwarnings("ignore:A single label was found", "ignore:y_pred contains classes")
def test_averages_over_classes(kind):
    labels, logits, weights = sampled(kind, False, 2, 4)
    labels = absent(labels)
    each = class_rows(labels, logits, weights)
    support = np.array([rows.cuts[0, 0] for rows in each])
    of_all, by_class = (
        measured(head, labels, logits, weights).compute(bounds=True) for head in (multi("micro"), multi(*BY_CLASS))
    )
    together = Rows.of(labels, logits, weights)
    for key, oracle, binned in oracles():
        head, slash, rest = key.partition("/")
        truths = np.array([one_class(key, rows, oracle) for rows in each])
        for name, truth in zip(("sea", "sun", "sand", "sky"), truths, strict=True):
            if binned and not np.isnan(truth):
                check_binned(by_class, f"{key}/{name}", truth)
            else:
                close(by_class[f"{key}/{name}"], truth, f"{key}/{name}")
        defined = ~np.isnan(truths)
        means = {"macro": truths[defined].mean(), "weighted": np.average(truths[defined], weights=support[defined])}
        for average, mean in means.items():
            shown = f"{head}_{average}{slash}{rest}"
            if binned:
                check_binned(by_class, shown, mean)
            else:
                close(by_class[shown], mean, shown)
        if binned:
            check_binned(of_all, key, oracle(together))
        else:
            close(of_all[key], oracle(together), key)


def test_macro_is_that_of_scikit_learn():
    labels, logits, weights = sampled("continuous", False, 2, 4)
    labels[:, 2] = 0
    decided = logits > 0
    for average in ("micro", "macro", "weighted"):
        head, suffix = multi("micro") if average == "micro" else multi(*BY_CLASS), suffix_of(average)
        metrics = measured(head, labels, logits, weights)
        values, zeros = metrics.compute(), metrics.compute(undefined=0.0)
        for key, function in (("precision", sklearn.precision_score), ("f1", sklearn.f1_score)):
            every: Any = ((values, nan), (zeros, 0.0))
            for found, zero in every:
                expected = function(labels, decided, average=average, sample_weight=weights[:, 0], zero_division=zero)
                close(found[key + suffix], expected, key)
        there = [0, 1, 3]
        auc = sklearn.roc_auc_score(labels[:, there], logits[:, there], average=average, sample_weight=weights[:, 0])
        if average != "micro":
            close(values["auc" + suffix], auc, "auc", 2e-3)


def test_what_was_not_measured_is_undefined():
    for head in (binary(jh.LogitGrid()), multi(*BY_CLASS)):
        empty = head.metrics()
        assert all(np.isnan(value) for value in empty.compute(bounds=True).values())
        assert set(empty.compute(undefined=-7.0).values()) == {np.float32(-7)}


def test_without_positives_or_without_negatives():
    logits = np.array([[1.0], [-1.0], [2.0]], np.float32)
    head = binary(jh.LogitGrid())
    none, all_ = (measured(head, np.full(3, y), logits).compute(undefined=-7.0) for y in (0.0, 1.0))
    missing = {key for key, value in none.items() if value == -7}
    assert {"auc", "auc_precision_recall", "average_precision", "recall", "best_f1", "best_f1_threshold"} <= missing
    assert {"kolmogorov_smirnov", "precision_at_recall_0.9", "matthews_corrcoef"} <= missing
    assert (none["precision"], none["specificity"], none["f1"], none["lowest_cost"]) == (0, np.float32(1 / 3), 0, 0)
    assert none["balanced_accuracy"] == none["specificity"]
    missing = {key for key, value in all_.items() if value == -7}
    assert {"auc", "specificity", "kolmogorov_smirnov", "sensitivity_at_specificity_0.9"} <= missing
    assert (all_["average_precision"], all_["auc_precision_recall"], all_["best_f1"]) == (1, 1, 1)
    assert all_["balanced_accuracy"] == all_["recall"] == np.float32(2 / 3)


# How they are kept, named, printed.


def test_what_shares_a_state_is_paid_once():
    plain = slots(jh.BinaryClassHead(), False)[1]
    one = jh.BinaryClassHead().with_metrics(M.AveragePrecision(), M.FBeta(), M.KolmogorovSmirnov(), M.BestThreshold())
    # Two sums more for each bucket, for the lower bound of the average precision.
    plain += 2 * jh.Scores(np.zeros((1, 1)), np.zeros((1, 1)), jh.BinaryClassHead().bins).layout.n_buckets
    assert slots(one, False)[1] == plain
    assert slots(one.with_metrics(M.Precision(0.3), M.Recall(0.3), M.Recall(0.31)), False)[1] == plain + 4 * 2
    assert slots(one.with_metrics(M.BrierScore()), False)[1] == plain + 3
    several = jh.MultiLabelHead(5)
    plain = slots(several, False)[1]
    by_class = several.with_metrics(M.RocAuc(average="macro"))
    assert slots(by_class, False)[1] > 5 * plain
    more = by_class.with_metrics(M.FBeta(average=None), M.PrAuc(average="weighted"))
    assert slots(more, False)[1] == slots(by_class, False)[1]
    calibrated = several.with_metrics(*(M.BrierScore(average=average) for average in ("micro", "macro", None)))
    assert slots(calibrated, False)[1] == plain + 3 * 5


def test_keys_have_the_names_of_the_classes():
    head = jh.MultiLabelHead(3, label_vocabulary=("sea", "sun", "sand"), classes_for_class_based_metrics=["sun"])
    labels, logits, _ = sampled("continuous", False, 0, 3)
    more = head.with_metrics(
        M.FBeta(average=None, threshold=0.3),
        M.RocAuc(average="macro"),
        M.BestThreshold(average=None, name="cut"),
        M.Precision(average="weighted", threshold=0.3),
    )
    values, plain = (h.measure(labels, logits).compute(bounds=True) for h in (more, head))
    assert {f"f1/positive_threshold_0.3/{name}" for name in ("sea", "sun", "sand")} < set(values)
    for rows, name in zip(class_rows(labels, logits, 1.0), ("sea", "sun", "sand"), strict=True):
        f1 = sklearn.f1_score(rows.y, rows.decided(0.3, head.bins))
        close(values[f"f1/positive_threshold_0.3/{name}"], f1, name)
    assert {"auc_macro", "auc_macro/lower", "precision_weighted/positive_threshold_0.3"} < set(values)
    assert {"cut/sea", "cut/sea/lower", "cut_threshold/sea", "cut_logit/sand"} < set(values)
    # What the head had is what it was, though all classes now have rows of their own, in another order; but that the
    # thresholds cut two bins.
    same({key: values[key] for key in plain}, plain, 1e-5)
    nameless = jh.MultiLabelHead(3).with_metrics(M.Recall(average=None)).metrics().compute()
    assert {f"recall/class{i}" for i in range(3)} < set(nameless)
    named = dataclasses.replace(more, name="task").metrics().compute(bounds=True)
    assert {"auc_macro/task", "auc_macro/lower/task", "cut/sea/task"} < set(named)


def test_metrics_of_heads_inside_heads():
    inner = jh.BinaryClassHead(name="late").with_metrics(M.AveragePrecision(), M.BrierScore())
    both = jh.MultiHead([inner, jh.MultiLabelHead(2, name="tags").with_metrics(M.FBeta(average="macro"))])
    labels, logits, _ = sampled("continuous", False, 0, 3)
    values = both.measure({"late": labels[:, :1], "tags": labels[:, 1:]}, logits).compute(bounds=True)
    late, *tags = class_rows(labels, logits, 1.0)
    close(values["brier_score/late"], by_sklearn(sklearn.brier_score_loss)(late, logistic(late)), "brier_score/late")
    truth = by_sklearn(sklearn.average_precision_score)(late, late.z)
    assert values["average_precision/lower/late"] - 1e-6 <= truth <= values["average_precision/upper/late"] + 1e-6
    f1 = np.mean([sklearn.f1_score(rows.y, rows.z > 0) for rows in tags])
    close(values["f1_macro/tags"], f1, "f1_macro/tags")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: jh.BinaryClassHead().with_metrics(M.RocAuc()), "RocAuc.*gives 'auc', which BinaryClassHead has"),
        (lambda: jh.BinaryClassHead().with_metrics(M.FBeta(), M.FBeta()), "gives 'f1'"),
        (lambda: jh.BinaryClassHead(thresholds=(0.3,)).with_metrics(M.Recall(0.3)), "positive_threshold_0.3"),
        (lambda: ScoredHead().with_metrics(M.Precision(0.3), M.Precision(0.3000001)), "positive_threshold_0.3"),
        (
            lambda: jh.MultiLabelHead(2, classes_for_class_based_metrics=[0]).with_metrics(M.RocAuc(average=None)),
            "auc/class0",
        ),
        (
            lambda: jh.BinaryClassHead().with_metrics(M.FBeta(average="macro")),
            'this head scores one. Pass average="micro"',
        ),
        (lambda: jh.BinaryClassHead().with_metrics(M.BrierScore(average=None)), "this head scores one"),
        (
            lambda: jh.BinaryClassHead().with_metrics(M.Support()),
            'average=None, of each class(.|\n)*Pass average="micro"',
        ),
        (lambda: jh.RegressionHead().with_metrics(M.FBeta()), r"reads 'scores', which this head does not have"),
        (lambda: jh.RegressionHead().with_metrics(M.BrierScore()), r"reads 'scores', which this head does not have"),
        (lambda: ScoredHead(2, names=("a",)).with_metrics(M.FBeta(average=None)), "one name for each of 2"),
        (lambda: M.FBeta(average=cast("Any", "binary")), "average must be one of.*samples"),
        (lambda: M.RocAuc(average="samples"), "average must be one of"),
        (lambda: M.FBeta(name=""), "name must be a string"),
        (lambda: M.Precision(1.0), r"threshold must be a number in \(0, 1\)"),
        (lambda: M.Precision(0), r"threshold must be a number in \(0, 1\)"),
        (lambda: M.Precision(cast("Any", "0.5")), r"threshold must be a number in \(0, 1\)"),
        (lambda: M.Precision(True), r"threshold must be a number in \(0, 1\)"),
        (lambda: M.Precision(1 - 1e-12), r"threshold must be a number in \(0, 1\)"),
        (lambda: M.PrecisionAtRecall(0), r"recall must be a number in \(0, 1\]"),
        (lambda: M.RecallAtPrecision(1.5), r"precision must be a number in \(0, 1\]"),
        (lambda: M.SensitivityAtSpecificity(nan), r"specificity must be a number in \(0, 1\]"),
        (lambda: M.SpecificityAtSensitivity(-0.5), r"sensitivity must be a number in \(0, 1\]"),
        (lambda: M.FBeta(beta=0), "beta must be a positive number"),
        (lambda: M.BestThreshold(beta=np.inf), "beta must be a positive number"),
        (lambda: M.BestThreshold(cost_false_positive=1), "needs both costs"),
        (lambda: M.BestThreshold(cost_false_positive=1, cost_false_negative=-1), "cost_false_negative must be"),
        (lambda: M.BestThreshold(beta=2, cost_false_positive=1, cost_false_negative=1), "beta is of the F score"),
        (lambda: M.ExpectedCalibrationError(1), "at least 2"),
        (lambda: M.ExpectedCalibrationError(norm=cast("Any", None)), 'norm must be "l1"'),
        (lambda: M.RocAuc(max_fpr=0), r"max_fpr must be a number in \(0, 1\]"),
        (lambda: M.ExpectedCalibrationError(cast("Any", 2.5)), "at least 2"),
    ],
)
def test_what_cannot_be_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_heads_with_metrics_are_values():
    metrics = [m for average in ("micro", "macro", None) for m in catalogue(average)]
    head = jh.MultiLabelHead(3, name="h").with_metrics(
        M.AveragePrecision(average="macro"),
        M.FBeta(2, threshold=0.3, average=None),
        M.BestThreshold(name="cut"),
        M.BrierScore(),
    )
    scope = {**vars(jh), "jh": jh}
    for value in (*metrics, head):
        assert eval(repr(value), scope) == value
        assert hash(eval(repr(value), scope)) == hash(value)
        assert pickle.loads(pickle.dumps(value)) == value == copy.deepcopy(value)
    assert repr(M.FBeta(2, threshold=np.float64(0.3), average="macro")) == (
        "jh.metrics.FBeta(average='macro', threshold=0.3, beta=2.0)"
    )
    assert repr(M.RocAuc()) == "jh.metrics.RocAuc()"
    assert M.FBeta() != M.FBeta(average="macro")
    # Equal heads share their compiled functions and add.
    again = pickle.loads(pickle.dumps(head))
    assert (head.metrics() + again.metrics()).head == head


def test_the_calibration_curve_is_that_of_scikit_learn():
    labels, logits, _ = sampled("continuous", False, 1)
    ones: Any = np.ones((ROWS, 1), np.float32)
    bins = functools.partial(calibration.CalibrationBins, bins=10, names=("yes",))
    sums = jax.jit(lambda labels, logits: bins(labels, logits).reduce(ones))(labels, logits)
    view: Any = bins(labels, logits).read(np.asarray(sums, np.float64), np, nan)
    predicted, observed, weight = view.curve()
    frequency, mean = calibration_curve(labels[:, 0], 1 / (1 + np.exp(-logits[:, 0].astype(np.float64))), n_bins=10)
    assert weight.sum() == ROWS
    np.testing.assert_allclose(predicted[weight > 0], mean, rtol=1e-6)
    np.testing.assert_allclose(observed[weight > 0], frequency, rtol=1e-6)
    assert np.isnan(predicted[weight == 0]).all()


def test_probabilities_at_the_ends_of_steps_and_of_the_line():
    logits = np.array([[-np.inf], [np.inf], [0.0], [-40.0], [40.0]], np.float32)
    labels = np.array([0.0, 1, 1, 0, 0])
    head = ScoredHead().with_metrics(M.ExpectedCalibrationError(2), M.BrierScore(), M.LogLoss())
    values = head.measure(labels, logits).compute()
    # 0.5 lies in the lower of two steps, (0 + 0.5 + 0) against (0 + 1 + 0); above, (1 + 1) against (1 + 0).
    assert values["expected_calibration_error"] == pytest.approx((0.5 + 1) / 5, rel=1e-6)
    assert values["brier_score"] == pytest.approx((0.25 + 1) / 5, rel=1e-6)
    assert values["log_loss"] == pytest.approx((np.log(2) + 40) / 5, rel=1e-6)


def test_a_number_is_the_beta_of_an_f_score():
    labels, logits, _ = sampled("ties", False, 0)
    head = jh.BinaryClassHead().with_metrics(M.FBeta(0.5), M.FBeta(2, threshold=0.3))
    values = head.measure(labels, logits).compute()
    rows = Rows.of(labels, logits, 1.0)
    close(values["fbeta_0.5"], sklearn.fbeta_score(rows.y, rows.z > 0, beta=0.5), "0.5")
    decided = rows.decided(0.3, head.bins)
    close(values["fbeta_2/positive_threshold_0.3"], sklearn.fbeta_score(rows.y, decided, beta=2), "2")


def test_the_name_of_a_class_hides_no_end_of_an_interval():
    head = jh.MultiLabelHead(2, label_vocabulary=("lower", "b"), classes_for_class_based_metrics=["lower"])
    metrics = head.metrics()
    assert set(metrics.compute()) >= {"auc", "auc/lower"}
    with pytest.raises(ValueError, match="'auc/lower' is a metric, and an end of the interval of 'auc'"):
        metrics.compute(bounds=True)
    named = jh.BinaryClassHead(bootstrap=jh.Bootstrap(2)).with_metrics(M.Recall(name="auc/ci_lower"))
    with pytest.raises(ValueError, match="'auc/ci_lower' is a metric"):
        named.metrics().compute(confidence=0.9)
