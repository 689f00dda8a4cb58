"""What each dtype and container of the host becomes as labels, weights and masks: numbers, or a refusal in words."""

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import jaxheads as jh

HEAD, IDS = jh.RegressionHead(), jh.MultiClassHead(3)
Z, Z3 = np.zeros((3, 1), np.float32), np.zeros((3, 3), np.float32)
MINUTES = pd.to_timedelta([5, 10, 20], unit="min")
DAYS = pd.to_datetime(["2013-01-01", "2013-01-02", "2013-01-03"])


def masked(values: Any, mask: Any) -> np.ma.MaskedArray:
    return np.ma.MaskedArray(values, mask)


# A container, and the numbers that it is read as.
NUMBERS: list[Any] = [
    *(
        np.array([0, 1, 2], dtype)
        for dtype in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", ">f4")
    ),
    np.array([0, 1, 2], jnp.bfloat16),
    [0, 1, 2],
    (0.0, 1.0, 2.0),
    pd.Series([0, 1, 2]),
    pd.Series([0, 1, 2], dtype="Int64"),
    pd.Series([0, 1, 2], dtype="UInt8"),
    pd.Series([0, 1, 2], dtype="Float32"),
    pd.Series(pd.arrays.SparseArray([0, 1, 2])),
    pd.Index([0, 1, 2]),
    pd.DataFrame({"y": [0, 1, 2]}),
    memoryview(np.array([0, 1, 2])),  # pyright: ignore[reportArgumentType]  # from Python 3.12 on arrays declare it
    masked([0, 1, 2], False),
    masked([0.0, 1.0, 2.0], [False] * 3),
    jnp.arange(3),
    (MINUTES - MINUTES[0]) / np.timedelta64(5, "m") * np.array([0, 1, 2 / 3]),
]


@pytest.mark.parametrize("labels", NUMBERS, ids=lambda x: f"{type(x).__name__}-{getattr(x, 'dtype', '')}")
def test_numbers_are_numbers(labels):
    np.testing.assert_allclose(HEAD.loss(labels, Z), 5 / 3, rtol=1e-6)


# A container, and what the error says of it.
REFUSED: list[tuple[Any, str]] = [
    (pd.Series(MINUTES), r"timedelta64(.|\n)*total_seconds"),
    (pd.Series([*MINUTES[:2], None]), r"timedelta64(.|\n)*total_seconds"),
    (MINUTES.to_numpy(), r"timedelta64(.|\n)*np\.timedelta64\(1, 's'\)"),
    (list(MINUTES.to_numpy()), "timedelta64"),
    (np.array([*MINUTES.to_numpy()], object), "numbers"),
    (np.array([0, 1, 2], object), "numbers"),
    (pd.Series(DAYS), r"datetime64(.|\n)*x - x\.min"),
    (DAYS.to_numpy(), r"datetime64"),
    (pd.Series(DAYS).dt.to_period("D"), "numbers"),
    (np.array([1, 2, 3], complex), "complex"),
    (np.array(["a", "b", "c"]), "strings"),
    (np.array([(1, 2)] * 3, [("a", int), ("b", int)]), "dtype"),
    (np.zeros(3, "V4"), "dtype"),
    (masked([0, 1, 2], [False, True, False]), r"masked array with 1 masked(.|\n)*where="),
    ({"a": 1}, "dense array"),
]


@pytest.mark.parametrize(("labels", "match"), REFUSED, ids=lambda x: type(x).__name__ if not isinstance(x, str) else "")
@pytest.mark.parametrize("how", ["labels", "weights", "where"])
def test_what_is_no_number_is_refused(labels, match, how):
    if how == "labels":
        with pytest.raises(ValueError, match=match):
            HEAD.loss(labels, Z)
        with pytest.raises(ValueError, match=r"labels"):
            IDS.loss(labels, Z3)
        return
    with pytest.raises(ValueError, match=how):
        HEAD.loss(np.zeros(3), Z, **{how: labels})


def test_a_mask_of_numpys_own_is_refused_whatever_ran_before():
    """A cached program took the hidden values of a masked array for numbers."""
    plain, hidden = np.array([1.0, 2.0, 3.0], np.float32), masked(np.array([1, 1e9, 3], np.float32), [0, 1, 0])
    for _ in range(2):
        HEAD.loss(plain, Z)
        HEAD.measure(plain, Z, weights=plain)
        given: dict[str, Any]
        for given in ({"labels": hidden}, {"labels": plain, "weights": hidden}, {"labels": plain, "where": hidden}):
            with pytest.raises(ValueError, match="masked array"):
                HEAD.measure(logits=Z, **given)
    head = jh.RegressionHead(loss_fn=lambda labels, logits, features: (labels - logits) ** 2 + features["t"][:, None])
    with pytest.raises(ValueError, match="masked array with masked values"):
        head.loss(plain, Z, {"t": hidden})
    np.testing.assert_allclose(head.loss(plain, Z, {"t": masked(plain, False)}), 14 / 3 + 2, rtol=1e-6)


@pytest.mark.parametrize("nothing", [0, 0.0, False, ""])
def test_nothing_is_said_by_none_alone(nothing):
    logits = np.zeros((3, 1), np.float32)
    for refused in (
        lambda: jh.BinaryClassHead(thresholds=nothing),
        lambda: jh.MultiLabelHead(3, thresholds=nothing),
        lambda: jh.MultiLabelHead(3, classes_for_class_based_metrics=nothing),
        lambda: jh.BinaryClassHead(label_vocabulary=nothing),
        lambda: jh.BinaryClassHead(name=nothing),
        lambda: jh.MultiHead([jh.BinaryClassHead(name="a")], head_weights=nothing),
        lambda: jh.SequentialHeadWrapper(jh.BinaryClassHead(), sequence_lengths=nothing),
        lambda: jh.BinaryClassHead().predictions(logits, nothing),
        lambda: HEAD.loss(np.zeros(3), logits, axis_name=nothing),
        lambda: HEAD.measure(np.zeros(3), logits).psum(nothing),
    ):
        with pytest.raises(ValueError, match=r"[Gg]iven|Unknown prediction key"):
            refused()


def test_options_that_exclude_each_other_or_mean_nothing():
    with pytest.raises(ValueError, match="not both"):
        jh.SequentialHeadWrapper(HEAD, sequence_length_mask="mask", sequence_lengths="lengths")
    jh.SequentialHeadWrapper(HEAD, sequence_length_mask=None, sequence_lengths="lengths")
    for check in ("False", 0, 1):
        with pytest.raises(ValueError, match="check must be True, False or None"):
            HEAD.loss(np.zeros(3), Z, check=check)  # pyright: ignore[reportArgumentType]  # what is tested
    with pytest.raises(ValueError, match="keys must be prediction keys"):
        HEAD.predictions(Z, 3)


def test_rows_of_flags_are_not_read_as_ids():
    head = jh.MultiLabelHead(3)
    for labels in ([[2, 1, 1], [1, 0, 0], [1, 1, 0]], [[1, 1, 0], [0, 0, 1]], [*map(list, np.eye(3, dtype=int))]):
        with pytest.raises(ValueError, match=r"multi-hot"):
            head.encode_labels(labels)
    np.testing.assert_array_equal(head.encode_labels([[2, 1, 0], [1], []]), [[1, 1, 1], [0, 1, 0], [0, 0, 0]])


def test_an_id_that_no_class_has_gets_no_name():
    head = jh.MultiClassHead(3, label_vocabulary=("a", "b", "c"))
    for bad in (-1, 3):
        with pytest.raises(ValueError, match=rf"class_ids must lie in 0 \.\.\. 2\. Given {bad}"):
            head.decode_predictions({"class_ids": np.array([[0], [bad]])})


LARGE = 50_000


@pytest.mark.parametrize(
    "call",
    [
        lambda: jh.MultiLabelHead(3).encode_labels(list(range(LARGE))),
        lambda: jh.MultiLabelHead(LARGE).encode_labels([[1] * LARGE] * 2),
        lambda: jh.MultiHead([jh.RegressionHead(name="a")]).loss([0.5] * LARGE, np.zeros((LARGE, 1))),
        lambda: jh.RegressionHead(weight_column="w").loss(np.zeros(3), Z, [0.5] * LARGE),
        lambda: jh.RegressionHead(weight_column="w").loss(np.zeros(3), Z, {f"column {i}": Z for i in range(LARGE)}),
        lambda: jh.SequentialHeadWrapper(HEAD, sequence_lengths="n").loss(
            np.zeros((LARGE, 2)), np.zeros((LARGE, 2, 1)), {"n": np.full(LARGE, 3)}
        ),
        lambda: HEAD.loss(np.zeros(3), Z, normalizer=-np.ones(())),
        lambda: jh.BinaryClassHead(bins=np.zeros(LARGE)),  # pyright: ignore[reportArgumentType]  # what is tested
        lambda: HEAD.loss(["a name"] * LARGE, np.zeros((LARGE, 1))),
        lambda: IDS.loss(np.full(LARGE, 7), np.zeros((LARGE, 3))),
        lambda: jh.MultiClassHead(3, label_vocabulary=["a", "b", "c"]).loss(["x" * LARGE] * 3, Z3),
    ],
)
def test_an_error_shows_few_values(call):
    with pytest.raises(ValueError, match=r"label|[Gg]iven") as error:
        call()
    assert len(str(error.value)) <= 400


def test_pickles_of_many_slices_are_small_and_exact():
    head = jh.BinaryClassHead(slices=jh.Slices("g", 30))
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 2, 200), rng.normal(size=(200, 1)).astype(np.float32)
    metrics = head.metrics() + head.measure(labels, logits, {"g": rng.integers(0, 30, 200)})
    pickled = pickle.dumps(metrics)
    again = pickle.loads(pickled)
    assert len(pickled) < 0.2 * metrics.state.nbytes
    np.testing.assert_array_equal(np.asarray(again.state).view(np.uint32), np.asarray(metrics.state).view(np.uint32))
    assert again.head == head
    state = np.zeros_like(metrics.state)
    state[5] = np.nan, -0.0
    odd = pickle.loads(pickle.dumps(jh.Metrics(state, head))).state
    np.testing.assert_array_equal(odd.view(np.uint32), state.view(np.uint32))


def test_tables_of_any_library_are_features():
    polars, pyarrow = pytest.importorskip("polars"), pytest.importorskip("pyarrow")
    # A column of pandas may have the name by which pyarrow gives the names of its columns.
    frame = pd.DataFrame({"w": [1.0, 2.0, 3.0], "column_names": [0, 1, 1]})
    arrow = pyarrow.Table.from_pandas(frame)
    head = jh.RegressionHead(weight_column="w", slices=jh.Slices("column_names", 2))
    expected = head.measure(np.zeros(3), Z, {"w": np.array([1.0, 2, 3]), "column_names": np.array([0, 1, 1])})
    for features in (frame, polars.from_pandas(frame), arrow, arrow.to_batches()[0]):
        metrics = head.measure(np.zeros(3), Z, features)
        np.testing.assert_array_equal(metrics.state, expected.state)
        padded = jh.pad_batch({"features": features, "labels": np.zeros(3)}, 4)
        assert {name: column.tolist() for name, column in padded["features"].items()} == {
            "w": [1, 2, 3, 3],
            "column_names": [0, 1, 1, 1],
        }


@pytest.mark.parametrize("kind", ["list", "series", "arrays", "pyarrow", "nested"])
def test_columns_of_lists_become_arrays(kind):
    rows = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    column: Any = rows
    if kind == "series":
        column = pd.Series(rows)
    elif kind == "arrays":
        column = pd.Series([np.array(row) for row in rows])
    elif kind == "pyarrow":
        column = pytest.importorskip("pyarrow").array(rows)
    elif kind == "nested":
        column = pd.Series([[np.array(row), np.array(row)] for row in rows])
    padded = jh.pad_batch({"features": {"x": column}, "labels": np.zeros(3)}, 4)["features"]["x"]
    expected = np.array([*rows, rows[-1]])
    np.testing.assert_array_equal(padded, np.stack([expected] * 2, 1) if kind == "nested" else expected)
    assert padded.dtype == np.float64


def test_columns_of_uneven_lists_are_refused():
    mesh = jax.make_mesh((1,), ("data",))
    for rows in (
        [[1.0, 2.0], [3.0]],
        pd.Series([[1.0, 2.0], [3.0]]),
        pd.Series([[1.0], None]),
        [[1.0], 2.0],
        pd.Series([[[1], [2]], [[1, 2], [3, 4]]]),
    ):
        for call in (lambda x: jh.pad_batch(x, 4), lambda x: jh.training.shard_batch(x, mesh)):
            with pytest.raises(ValueError, match=r"Each row of \['features'\]\['x'\] must(.|\n)*to one length"):
                call({"features": {"x": rows}, "labels": np.zeros(2)})
            with pytest.raises(ValueError, match=r"encode_labels"):
                call({"features": {"x": np.zeros(2)}, "labels": rows})


def test_lists_that_jit_took_apart_are_refused():
    for given in ({"labels": [0.0, 1.0, 2.0]}, {"labels": np.zeros(3), "weights": (1.0, 1.0, 2.0)}):
        with pytest.raises(ValueError, match=r"3 values that jit has traced(.|\n)*np\.asarray"):
            jax.jit(lambda given: HEAD.loss(logits=Z, **given))(given)


def test_lists_of_names_may_be_of_any_kind():
    three = pd.Series(["c", "a", "b", "a"])
    for names in (np.unique(three), pd.Index(["a", "b", "c"]), {"a": 1, "b": 2, "c": 3}.keys(), iter("abc")):
        assert jh.Slices("g", 3, names=names).names == ("a", "b", "c")  # pyright: ignore[reportArgumentType]
    head = jh.BinaryClassHead()
    for keys in (np.array(["logits"]), {"logits"}, {"logits": 0}.keys(), pd.Index(["logits"])):
        assert set(head.predictions(Z, keys)) == {"logits"}
        assert jh.boosting.xgboost_metric(head, keys={"auc"}).keys == ("auc",)  # pyright: ignore[reportArgumentType]
    metrics = HEAD.measure(np.zeros(3), Z)
    assert metrics.compute(undefined=jnp.float32(0), warn=False) == metrics.compute(undefined=0.0, warn=False)
    with pytest.raises(ValueError, match="must be 3 strings"):
        jh.Slices("g", 3, names=[1, 2, 3])  # pyright: ignore[reportArgumentType]  # what is tested


def test_an_empty_merge_is_the_identity_of_a_head():
    head = jh.BinaryClassHead()
    some = head.measure([1, 0, 1], np.array([[1], [2], [3]], np.float32))
    zero = jh.Metrics.merge([], head=head)
    assert jh.Metrics.merge([zero, jax.device_get(some)]).compute() == jh.Metrics.merge([some], head=head).compute()
    losses = head.measure([1, 0], np.zeros((2, 1), np.float32), regularization_losses=[np.float32(2)])
    assert jh.Metrics.merge([zero, losses], head=head).compute()["regularization_loss"] == 2
    with pytest.raises(ValueError, match="head must be a head"):
        jh.Metrics.merge([], head=3)
    with pytest.raises(ValueError, match="different heads"):
        jh.Metrics.merge([some], head=jh.BinaryClassHead(thresholds=[0.3]))
    with pytest.raises(ValueError, match="With head="):
        jh.Metrics.merge([])


def cube(labels, logits):
    return jnp.abs(labels - logits) ** 3


TWINS = [
    (jh.BinaryClassHead(label_vocabulary=["no", "yes"]), jh.BinaryClassHead(label_vocabulary=["yes", "no"])),
    (jh.RegressionHead(loss_fn=cube), jh.RegressionHead()),
    (jh.BinaryClassHead(thresholds=[0.3]), jh.BinaryClassHead(thresholds=[0.4])),
    (jh.BinaryClassHead(bins=jh.LogitGrid(-8, 8, 64)), jh.BinaryClassHead(bins=jh.LogitGrid(-4, 4, 64))),
    (jh.BinaryClassHead(bins=jh.LogitGrid(-8, 8, 199)), jh.BinaryClassHead(bins=jh.ThresholdGrid(200))),
    (
        jh.MultiClassHead(3, label_vocabulary=["a", "b", "c"]).with_metrics(jh.metrics.Recall(average=None)),
        jh.MultiClassHead(3, label_vocabulary=["b", "a", "c"]).with_metrics(jh.metrics.Recall(average=None)),
    ),
    (
        jh.RegressionHead(slices=jh.Slices("g", 2, names=("x", "y"))),
        jh.RegressionHead(slices=jh.Slices("g", 2, names=("y", "x"))),
    ),
    (
        jh.MultiHead([jh.RegressionHead(name="a"), jh.RegressionHead(name="b")]),
        jh.MultiHead([jh.RegressionHead(name="b"), jh.RegressionHead(name="a")]),
    ),
]


@pytest.mark.parametrize(
    ("one", "other"), [*TWINS[:3], *(pytest.param(*twins, marks=pytest.mark.slow) for twins in TWINS[3:])]
)
def test_a_state_of_another_meaning_is_refused_though_it_fits(one, other):
    """As a checkpoint restores it: an array of the size that the head expects."""
    n = one.logits_dimension
    labels, logits = np.zeros(4, np.float32 if isinstance(one, jh.RegressionHead) else np.int32), np.ones((4, n))
    labels = {"a": labels, "b": labels} if isinstance(one, jh.MultiHead) else labels
    features = {"g": np.array([0, 1, 1, 0])}
    state = jax.device_get(one.measure(labels, logits.astype(np.float32), features).state)
    if state.shape != other.metrics().state[..., :1].shape:
        pytest.fail("the heads are no twins")
    right, wrong = jh.Metrics(state, one), jh.Metrics(state, other)
    right.compute(warn=False)
    for read in (
        lambda: wrong.compute(),
        lambda: wrong + wrong,
        lambda: jh.Metrics.merge([wrong]),
        lambda: jh.Metrics(jnp.asarray(state), other).compute(),
        lambda: (other.measure(labels, logits.astype(np.float32), features) + wrong).compute(),
    ):
        with pytest.raises(ValueError, match="metrics mean something else") as error:
            read()
        assert len(str(error.value)) <= 450


def test_the_stamp_adds_like_the_rest_of_a_state():
    head, rng = jh.BinaryClassHead(), np.random.default_rng(0)
    labels, logits = rng.integers(0, 2, (5, 8)), rng.normal(size=(5, 8, 1)).astype(np.float32)

    @jax.jit
    def run(metrics, labels, logits):
        def body(metrics, batch):
            return head.update_metrics(metrics, None, batch[1], batch[0]), None

        metrics, _ = jax.lax.scan(body, metrics, (labels, logits))
        return metrics, jax.vmap(head.measure)(labels, logits)

    added, stacked = run(head.metrics(), labels, logits)
    total = jax.tree.map(lambda x: x.sum(0), stacked)
    mean = jax.tree.map(lambda x: x.mean(0), stacked)
    expected = added.compute(warn=False)
    for metrics in (total, mean, jax.tree.map(lambda x: x * 0.3, total)):
        for key, value in metrics.compute(warn=False).items():
            np.testing.assert_allclose(value, expected[key], rtol=1e-5, err_msg=key)
    assert stacked.compute(warn=False)["auc"].shape == (5,)
