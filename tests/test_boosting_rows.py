"""Which rows and which labels reach a booster: rows that do not count, and labels that are set later."""

import functools
import pickle
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import lightgbm
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import xgboost
from scipy.optimize import minimize_scalar
from sklearn.metrics import r2_score, roc_auc_score
from threadpoolctl import threadpool_limits

import jaxheads as jh
from jaxheads.boosting import starts
from jaxheads.boosting.attaching import Attached
from jaxheads.boosting.datasets import prepare

LIBRARIES = ("xgboost", "lightgbm")
both = pytest.mark.parametrize("library", LIBRARIES)
LATE, MINUTES = jh.BinaryClassHead(name="late"), jh.RegressionHead(name="minutes")
TWO = jh.MultiHead([LATE, MINUTES])


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with threadpool_limits(1, "openmp"):
        yield


def boosted(head: jh.Head, library: str, **params: Any) -> Any:
    return jh.boosting.BoostedHead(head, library, **{"n_estimators": 5, "max_depth": 3, "n_jobs": 1, **params})


def objective(library: str, head: jh.Head) -> Any:
    return getattr(jh.boosting, f"{library}_objective")(head)


@functools.cache
def table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels, and which rows count: 300 of 1,200. The others lie elsewhere, and would take most bins."""
    rng = np.random.default_rng(0)
    kept = np.arange(1200) % 4 == 0
    x = np.where(kept[:, None], rng.uniform(0, 1, (1200, 2)), rng.uniform(5, 6, (1200, 2)))
    return x, np.sin(6 * x[:, 0]) + 0.5 * x[:, 1], kept


# Rows that do not count.


@both
def test_masked_rows_do_not_take_the_bins(library):
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.uniform(0, 1, (400, 1)), rng.uniform(5, 6, (40_000, 1))])
    y, there = (np.sin(6 * x[:, 0]) > 0).astype(int), np.arange(40_400) < 400
    models = [
        boosted(jh.BinaryClassHead(), library, n_estimators=20).fit(*given, **masks)
        for *given, masks in ((x, y, {"where": there}), (x[:400], y[:400], {}))
    ]
    assert roc_auc_score(y[:400], models[0].predict_logits(x[:400])[:, 0]) > 0.999
    np.testing.assert_array_equal(models[0].predict_logits(x), models[1].predict_logits(x))


def ways(kept: np.ndarray, s: np.ndarray) -> dict[str, tuple[jh.Head, Any, Any, Any]]:
    """Heads with labels, weights and masks that keep the same rows. What is not kept holds garbage."""
    late, nan = (s > 0.3).astype(int), np.where(kept, s, np.nan)
    even, odd = kept & (np.arange(len(s)) % 8 == 0), kept & (np.arange(len(s)) % 8 != 0)
    pairs = np.stack([np.where(even, s, np.nan), np.where(odd, s, np.nan)], 1)
    silent = jh.MultiHead([LATE, MINUTES], head_weights=(1.0, 0.0))
    return {
        "mask": (MINUTES, nan, None, kept),
        "weights": (MINUTES, s, kept * 1.0, None),
        "weights_and_mask": (LATE, late, np.where(even, 2.0, odd * 0.5), kept | (np.arange(len(s)) % 4 == 1)),
        "names": (LATE, np.where(kept, np.where(late, "b", "a"), "?").astype(object), None, kept),
        "by_task": (TWO, {"late": late, "minutes": pairs[:, 1]}, None, {"late": even, "minutes": odd}),
        "by_task_and_weights": (TWO, {"late": late, "minutes": s}, kept * 1.0, None),
        "lists": (TWO, {"late": late.tolist(), "minutes": nan.tolist()}, None, {"late": even, "minutes": odd.tolist()}),
        "silent": (silent, {"late": late, "minutes": s}, None, {"late": kept, "minutes": ~even}),
    }


SLOW_WAYS = [pytest.param(way, marks=pytest.mark.slow) for way in ("by_task_and_weights", "lists", "silent")]


@both
@pytest.mark.parametrize("way", ["mask", "weights", "weights_and_mask", "names", "by_task", *SLOW_WAYS])
def test_rows_that_no_head_keeps_are_left_out(library, way):
    x, s, kept = table()
    head, y, weights, where = ways(kept, s)[way]

    def take(given: Any) -> Any:
        if isinstance(given, dict):
            return {key: take(value) for key, value in given.items()}
        return None if given is None else np.asarray(given)[kept]

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # weights of 0 and 1 are no mistake here
        found = boosted(head, library).fit(x, y, weights, where=where)
        expected = boosted(head, library).fit(x[kept], take(y), take(weights), where=take(where))
    logits = found.predict_logits(x)
    # The start of a head of weight 0 is the best constant for all of its own rows.
    trained = slice(0, 1 if way == "silent" else None)
    np.testing.assert_array_equal(logits[:, trained], expected.predict_logits(x)[:, trained])
    assert np.ptp(logits[kept, 0]) > 0.1


@both
@pytest.mark.parametrize("kind", ["csr", "csc", "frame"])
def test_rows_of_any_table_are_left_out(library, kind):
    x, s, kept = table()
    if kind == "frame":
        codes = (4 * x[:, 0]).astype(int) % 4
        names = pd.Categorical.from_codes(codes, list("dbca"))
        given: Any = pd.DataFrame({"a": x[:, 1], "town": names}, index=np.arange(1200)[::-1])
        part = given[kept]
    else:
        given = scipy.sparse.csr_matrix(x) if kind == "csr" else scipy.sparse.csc_matrix(x)
        part = given.tocsr()[kept]
    found = boosted(MINUTES, library).fit(given, s, where=kept, eval_set=[(given, s)], eval_where=[kept])
    expected = boosted(MINUTES, library).fit(part, s[kept], eval_set=[(part, s[kept])])
    np.testing.assert_array_equal(found.predict_logits(given), expected.predict_logits(given))
    for key, values in expected.evals_result_["validation_0"].items():
        np.testing.assert_allclose(found.evals_result_["validation_0"][key], values, rtol=1e-5, atol=1e-6)


def test_frames_of_other_libraries():
    polars, pyarrow = pytest.importorskip("polars"), pytest.importorskip("pyarrow")
    x, s, kept = table()
    frame = pd.DataFrame(x, columns=["a", "b"])
    expected = boosted(MINUTES, "lightgbm").fit(x[kept], s[kept]).predict_logits(x)
    for given in (polars.from_pandas(frame), pyarrow.Table.from_pandas(frame)):
        found = boosted(MINUTES, "lightgbm").fit(given, s, where=kept)
        np.testing.assert_array_equal(found.predict_logits(given), expected)


@both
def test_a_booster_without_rows_is_refused(library):
    x, s, kept = table()
    late = (s > 0).astype(int)
    for head, y, weights, where in (
        (MINUTES, s, None, ~kept & kept),
        (MINUTES, s, 0 * s, None),
        (MINUTES, s, kept * 1.0, ~kept),
        (TWO, {"late": late, "minutes": s}, kept * 1.0, {"late": ~kept, "minutes": 0 * kept}),
        (jh.MultiHead([LATE, MINUTES], head_weights=(0.0, 0.0)), {"late": late, "minutes": s}, None, None),
    ):
        model = boosted(head, library, init_score=0.0)
        with pytest.raises(ValueError, match=rf"Given 1200 rows, and {type(head).__name__} keeps none(.|\n)*where"):
            model.fit(x, y, weights, where=where)
    # What is not kept is looked at as before.
    with pytest.raises(ValueError, match="not negative"):
        boosted(MINUTES, library).fit(x, s, np.where(kept, 1.0, -1.0))
    with pytest.raises(ValueError, match=r"where shape must be \(1200,\)"):
        boosted(MINUTES, library).fit(x, s, where=kept[:-1])


# Labels that are set after others were attached.


def dataset(library: str, label: Any) -> Any:
    x = np.arange(20.0)[:, None]
    if library == "xgboost":
        return xgboost.DMatrix(x, label=label)
    return lightgbm.Dataset(x, label, params={"verbosity": -1, "min_data_in_bin": 1}, free_raw_data=False)


def read(library: str, data: Any, head: jh.Head = MINUTES) -> np.ndarray:
    """Returns the labels that a booster's objective sees."""
    data = data.construct() if library == "lightgbm" else data
    n = data.num_row() if library == "xgboost" else data.num_data()
    return -np.asarray(objective(library, head)(np.zeros((n, head.logits_dimension)).squeeze(), data)[0])


A, B, C = np.arange(20.0), np.arange(20.0) % 7 + 0.5, np.arange(20.0) % 3 - 5
SETTERS: dict[str, Any] = {
    "set_label": lambda data, y: data.set_label(y),
    "set_info": lambda data, y: data.set_info(label=y),
    "set_float_info": lambda data, y: data.set_float_info("label", y),
    "set_field": lambda data, y: data.set_field("label", y),
    "attribute": lambda data, y: setattr(data, "label", y),
}
OF = {"xgboost": ("set_label", "set_info", "set_float_info"), "lightgbm": ("set_label", "set_field", "attribute")}


@pytest.mark.parametrize(("library", "way"), [(library, way) for library in LIBRARIES for way in OF[library]])
def test_labels_that_are_set_later_count(library, way):
    for is_constructed in (False, True):
        if library == "lightgbm" and way == "set_field" and not is_constructed:
            continue
        data = jh.boosting.with_labels(dataset(library, A), B, np.arange(20) % 2 == 0)
        if is_constructed:
            np.testing.assert_array_equal(read(library, data), np.where(np.arange(20) % 2 == 0, B, 0))
        SETTERS[way](data, C)
        np.testing.assert_array_equal(read(library, data), C)  # nor is there a mask
        rows = list(range(3, 9))
        part = data.slice(rows) if library == "xgboost" else data.subset(rows)
        np.testing.assert_array_equal(read(library, part), C[rows])
        # Attached again, they count again.
        np.testing.assert_array_equal(read(library, jh.boosting.with_labels(data, B)), B)


@both
def test_a_model_is_that_of_the_last_labels(library):
    x, s, _ = table()

    def train(data: Any) -> np.ndarray:
        if library == "xgboost":
            booster = xgboost.train({"base_score": 0, "nthread": 1}, data, 3, obj=objective(library, MINUTES))
            return booster.predict(xgboost.DMatrix(x), output_margin=True)
        params = {"objective": objective(library, MINUTES), "verbosity": -1, "num_threads": 1}
        return np.asarray(lightgbm.train(params, data, 3).predict(x, raw_score=True))

    def make(label: Any) -> Any:
        return xgboost.DMatrix(x, label=label) if library == "xgboost" else lightgbm.Dataset(x, label)

    data = jh.boosting.with_labels(make(0 * s), s)
    np.testing.assert_array_equal(train(data), train(make(s)))  # constructing is no reason to let go of labels
    data.set_label(-s)
    np.testing.assert_array_equal(train(data), train(make(-s)))


@both
def test_labels_may_be_set_to_what_they_were(library):
    data = jh.boosting.with_labels(dataset(library, A), B)
    data.set_label(A)
    np.testing.assert_array_equal(read(library, data), A)
    one = jh.boosting.with_labels(dataset(library, A), B)
    np.testing.assert_array_equal(read(library, one), B)
    one.set_label(A.copy())
    np.testing.assert_array_equal(read(library, one), A)


@both
def test_labels_of_a_part_may_be_set(library):
    data, rows = jh.boosting.with_labels(dataset(library, A), B), list(range(5, 15))
    for way in OF[library]:
        part = data.slice(rows) if library == "xgboost" else data.subset(rows).construct()
        np.testing.assert_array_equal(read(library, part), B[rows])
        SETTERS[way](part, C[rows])
        np.testing.assert_array_equal(read(library, part), C[rows])
    np.testing.assert_array_equal(read(library, data), B)


@both
def test_a_head_that_needs_a_dict_refuses_a_column(library):
    data = jh.boosting.with_labels(dataset(library, A), {"late": A > 3, "minutes": B})
    np.testing.assert_array_equal(read(library, data, TWO)[:, 1], B)
    data.set_label(C)
    with pytest.raises(ValueError, match=r"takes a dict of labels(.|\n)*with_labels"):
        read(library, data, TWO)


def test_labels_that_lightgbm_holds_twice_must_be_equal():
    """`set_field` changes what the trees read, and not the attribute that `get_label` and `get_weight` read."""
    for name in ("label", "weight"):
        data = dataset("lightgbm", A).construct()
        data.set_weight(A + 1)
        read("lightgbm", data)
        data.set_field(name, C + 10)
        with pytest.raises(ValueError, match=rf"each {name} twice(.|\n)*dataset\.set_{name}"):
            read("lightgbm", data)
        getattr(data, f"set_{name}")(C + 10)
        expected = (A + 1) * (C + 10) if name == "label" else A * (C + 10)
        np.testing.assert_allclose(read("lightgbm", data), expected, rtol=1e-6)


def test_a_pickled_dataset_knows_its_labels():
    data = pickle.loads(pickle.dumps(jh.boosting.with_labels(dataset("lightgbm", A), B)))
    np.testing.assert_array_equal(read("lightgbm", data), B)
    data.set_label(C)
    np.testing.assert_array_equal(read("lightgbm", data), C)


# Starts of heads without a formula.


def pseudo_huber(labels, logits):
    return jnp.sqrt(1 + (labels - logits) ** 2) - 1


def quantile_loss(labels, logits):
    return jnp.maximum(0.9 * (labels - logits), -0.1 * (labels - logits))


def squared_in_dollars(labels, logits):
    return (jnp.exp(logits) - labels) ** 2


def hinge(labels, logits):
    return jnp.maximum(0.0, 1.0 - (2.0 * labels - 1.0) * logits)


def own_cross_entropy(labels, logits):
    return jnp.logaddexp(0.0, logits) - labels * logits


def one_loss_for_both(labels, logits):
    return jnp.ones_like(logits) * jnp.sum(pseudo_huber(labels, logits), -1, keepdims=True)


@both
def test_a_loss_that_is_flat_at_zero_starts_elsewhere(library):
    x, s, _ = table()
    y = 100 + s / 4
    model = boosted(jh.RegressionHead(loss_fn=pseudo_huber), library, n_estimators=30).fit(x, y)
    assert np.abs(model.init_logits_ - np.median(y)) < 0.5
    assert r2_score(y, model.predict(x)) > 0.9
    pairs = np.stack([y, 70 - y], 1)
    two = boosted(jh.RegressionHead(2, loss_fn=pseudo_huber), library, n_estimators=30).fit(x, pairs)
    assert r2_score(pairs, two.predict(x)) > 0.9


def find_start(head: jh.Head, y: Any, weights: Any = None, where: Any = None) -> np.ndarray:
    batch = prepare(head, Attached(y, where), weights).batch
    return starts.find_constants(head, jax.tree.map(np.asarray, batch))


def test_starts_are_the_best_constants():
    rng = np.random.default_rng(2)
    y, w = 100 + 3 * rng.standard_t(3, size=200), rng.integers(0, 4, 200).astype(np.float32)
    there = np.arange(200) % 3 > 0
    bits = (y > 101).astype(int)

    def best(loss: Any, low: float, high: float) -> float:
        return minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-9}).x

    def huber(c: float, k: float = 1.0) -> float:
        return float(((w * there) * (np.sqrt(1 + (k * y - c) ** 2) - 1)).sum())

    masked = np.where(there, y, np.nan)
    one, two = jh.RegressionHead(loss_fn=pseudo_huber), jh.RegressionHead(2, loss_fn=pseudo_huber)
    expected = [best(huber, 90, 110), best(functools.partial(huber, k=-3.0), -330, -270)]
    np.testing.assert_allclose(find_start(one, masked, w, there), expected[:1], atol=5e-3)
    # Each logit with its own labels, and its own masks.
    both_columns = np.stack([masked, np.where(there, -3 * y, np.nan)], 1)
    found = find_start(two, both_columns, w, np.stack([there, there], 1))
    np.testing.assert_allclose(found, expected, atol=2e-2)
    quantile = jh.RegressionHead(loss_fn=quantile_loss)
    np.testing.assert_allclose(find_start(quantile, y), [np.quantile(y, 0.9, method="inverted_cdf")], atol=0.2)
    dollars = jh.RegressionHead(loss_fn=squared_in_dollars, inverse_link_fn=jnp.exp)
    np.testing.assert_allclose(find_start(dollars, y), [np.log(y.mean())], rtol=1e-4)
    own = jh.BinaryClassHead(loss_fn=own_cross_entropy)
    np.testing.assert_allclose(find_start(own, bits), [np.log(bits.mean() / (1 - bits.mean()))], atol=1e-3)
    # No constant is best where the loss falls without end; of equally good ones, the smallest.
    assert 10 < find_start(own, np.ones(200))[0] <= 30
    svm = jh.BinaryClassHead(loss_fn=hinge)
    assert [find_start(svm, y)[0] for y in (np.ones(200), np.zeros(200), np.arange(200) % 2)] == [1, -1, 0]
    # Of any size, and among heads that have a formula.
    np.testing.assert_allclose(find_start(one, 1e7 * y), [np.median(1e7 * y)], rtol=1e-2)
    np.testing.assert_allclose(find_start(one, 1e-4 * y), [1e-4 * y.mean()], rtol=1e-2)
    tasks = jh.MultiHead([jh.RegressionHead(name="a"), jh.RegressionHead(loss_fn=pseudo_huber, name="b")])
    found = find_start(tasks, {"a": y, "b": masked}, w, {"b": there})
    np.testing.assert_allclose(found, [np.average(y, weights=w), expected[0]], atol=5e-3)


def test_heads_that_cannot_be_searched_start_from_zeros():
    rng = np.random.default_rng(3)
    pairs = rng.normal(100, 1, (200, 2))
    np.testing.assert_array_equal(find_start(jh.RegressionHead(2, loss_fn=one_loss_for_both), pairs), [0, 0])
    ranks = jh.GlobalObjectiveHead(jh.BinaryClassHead(), "roc_auc")
    np.testing.assert_array_equal(find_start(ranks, np.arange(200) % 2), [0])
    nowhere = jh.RegressionHead(loss_fn=lambda labels, logits: jnp.nan * labels * logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(find_start(nowhere, pairs[:, 0]), [0])


@both
def test_a_model_without_a_split_is_told(library):
    x, s, kept = table()
    y = 100 + s
    model = boosted(jh.RegressionHead(loss_fn=pseudo_huber), library, init_score=0.0)
    with pytest.warns(UserWarning, match=r"No tree(.|\n)*has a split(.|\n)*starts from \[0\.0\]") as warned:
        model.fit(x, y)
    assert warned[0].filename == __file__
    assert np.ptp(model.predict(x)) == 0
    name = {"xgboost": "min_child_weight", "lightgbm": "min_sum_hessian_in_leaf"}[library]
    with pytest.warns(UserWarning, match=rf"has a split(.|\n)*{name}"):
        boosted(TWO, library, **{name: 10_000}).fit(x, {"late": s > 0, "minutes": s}, where=kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        boosted(MINUTES, library).fit(x, y)
        # Labels that are all the same need no split.
        boosted(MINUTES, library).fit(x, np.where(kept, 7.0, np.nan), where=kept)
        shared = {"multi_strategy": "multi_output_tree"} if library == "xgboost" else {}
        boosted(TWO, library, **shared).fit(x, {"late": s > 0, "minutes": s})


def test_several_logits_of_xgboost_are_targets():
    """As `xgboost_objective` says: `num_target` gives logits, `num_class` ids, after the same training."""
    x, s, _ = table()
    ids, head, data = np.digitize(s, (0, 0.8)), jh.MultiClassHead(3), xgboost.DMatrix(x)
    made = {
        name: xgboost.train(
            {"base_score": 0, "nthread": 1, name: 3}, xgboost.DMatrix(x, label=ids), 3, obj=objective("xgboost", head)
        )
        for name in ("num_target", "num_class")
    }
    logits = made["num_target"].predict(data)
    np.testing.assert_array_equal(made["num_class"].predict(data, output_margin=True), logits)
    np.testing.assert_array_equal(made["num_class"].predict(data), logits.argmax(1))
    with pytest.raises(ValueError, match=r"must give 3 margins a row(.|\n)*num_target="):
        xgboost.train({"base_score": 0}, xgboost.DMatrix(x, label=ids), 1, obj=objective("xgboost", head))
