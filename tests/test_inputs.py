"""What users pass in: labels, names, weights, features, loss functions. Legal forms enter, others are refused."""

import functools
import operator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from goldens import callables
from zoo import SurvivalHead

import jaxheads as jh

NAMES = ("ant", "bee", "cat")
THREE = jh.MultiClassHead(3, label_vocabulary=NAMES)
TWO = jh.BinaryClassHead(label_vocabulary=("no", "yes"))
LOGITS = np.array([[0.5, 1.0, -1.0], [2.0, 0.0, 1.0], [0.0, 0.25, 3.0]], np.float32)
HERE = np.array([True, False, True])


def f32(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)


def with_second(value: Any, how: str) -> Any:
    """Names of three classes, the second of which is something else, in one of the containers that people have."""
    labels = ["ant", value, "cat"]
    if how == "list":
        return labels
    if how == "object":
        return np.array(labels, object)
    return pd.Series(labels, dtype=how)


def losses(labels: Any, logits: Any = LOGITS) -> np.ndarray:
    z = np.asarray(logits, np.float64)
    return np.logaddexp.reduce(z, -1) - z[np.arange(len(labels)), labels]


# Names in rows that are absent


MISSING = [
    ("dog", "list"),
    ("dog", "object"),
    (None, "list"),
    (None, "object"),
    (np.nan, "object"),
    (b"\xff\xfe", "object"),
    (7, "object"),
    (["ant"], "object"),
    (pd.NA, "object"),
    (None, "string"),
    (None, "category"),
    (None, "str"),
]


@pytest.mark.parametrize(("value", "how"), MISSING)
def test_a_name_in_an_absent_row_may_be_anything(value, how):
    if isinstance(value, list):
        labels = np.empty(3, object)
        labels[:] = ["ant", value, "cat"]
    else:
        labels = with_second(value, how)
    expected = losses([0, 1, 2])[HERE].mean()
    device, ones = jax.device_put((HERE, np.ones(3, np.float32)))
    masks: list[dict[str, Any]] = [
        {"where": HERE},
        {"where": device},
        {"where": device, "weights": ones},
        {"where": HERE, "check": False},
        {"where": device, "check": False},
        {"where": device, "check": True},
    ]
    for mask in masks:
        np.testing.assert_allclose(THREE.loss(labels, LOGITS, **mask), expected, rtol=1e-6)
        np.testing.assert_allclose(
            THREE.measure(labels, LOGITS, **mask).compute()["average_loss"], expected, rtol=1e-6, err_msg=str(mask)
        )
    weights = HERE.astype(np.float32)
    for hiding in (weights, jax.device_put(weights)):
        np.testing.assert_allclose(THREE.loss(labels, LOGITS, weights=hiding), expected * 2 / 3, rtol=1e-6)


def test_an_unknown_name_is_visible_under_jit():
    every = [with_second(value, how) for value, how in MISSING if not isinstance(value, list)]
    jitted = jax.jit(lambda where: [THREE.loss(labels, LOGITS, where=where) for labels in every])
    np.testing.assert_allclose(jitted(HERE), losses([0, 1, 2])[HERE].mean(), rtol=1e-6)
    assert np.isnan(jitted(np.ones(3, bool))).all()


@pytest.mark.parametrize(("value", "how"), MISSING[:6] + MISSING[8:])
@pytest.mark.parametrize("where", [None, np.ones(3, bool), jnp.ones(3, bool)], ids=["none", "host", "device"])
def test_a_name_in_a_live_row_is_refused_with_its_position(value, how, where):
    with pytest.raises(ValueError, match=r"(?s)label .* at index \(1, 0\) is not in the label_vocabulary"):
        THREE.loss(with_second(value, how), LOGITS, where=where)


def test_undecodable_bytes_are_shown():
    with pytest.raises(ValueError, match=r"label b'\\xff' at index \(0, 0\)"):
        TWO.loss(np.array([b"\xff"]), [[1.0]])


def test_nothing_but_missing_names():
    assert TWO.loss([None, None], [[1.0], [2.0]], where=[False, False]) == 0
    with pytest.raises(ValueError, match=r"label None at index \(0, 0\)"):
        TWO.loss([None, None], [[1.0], [2.0]])
    with pytest.raises(ValueError, match="dense array of numbers"):
        jh.MultiClassHead(3).loss([None, None, None], LOGITS)


def test_an_unknown_name_of_two_classes_is_visible_under_jit():
    """-1 as a float label: outside [0, 1], where a class id of -1 would be a legal number."""
    labels, logits = ["yes", "maybe"], np.array([[1.0], [2.0]], np.float32)
    step = jax.jit(jax.value_and_grad(lambda z, where: TWO.loss(labels, z, where=where)))
    loss, gradient = step(logits, np.array([True, False]))
    np.testing.assert_allclose(loss, np.logaddexp(0, -1), rtol=1e-6)
    assert gradient[1] == 0
    loss, gradient = step(logits, np.array([True, True]))
    assert np.isnan(loss)
    assert np.isnan(gradient[1])
    measured = jax.jit(lambda where: TWO.measure(labels, logits, where=where))(np.array([True, True]))
    with pytest.warns(jh.BadInputWarning, match=r"\b1 element"):
        measured.compute()


def test_masks_on_the_device_are_read_only_for_unknown_names(monkeypatch):
    """Reading them waits for the device."""
    from jaxheads.engine import gathering

    read = []
    original = gathering._live_on_host

    def spy(where, weights, check):
        read.append(check)
        return original(where, weights, check)

    monkeypatch.setattr(gathering, "_live_on_host", spy)
    THREE.loss(["ant", "bee", "cat"], LOGITS, where=jnp.asarray(HERE))
    assert read == [None]
    THREE.loss(["ant", "dog", "cat"], LOGITS, where=jnp.asarray(HERE))
    assert read[1:] == [None, True]


def test_pandas_labels_of_all_kinds():
    expected = losses([0, 1, 2]).mean()
    for labels in (
        pd.Series(NAMES),
        pd.Series(NAMES, dtype=object),
        pd.Series(NAMES, dtype="string"),
        pd.Series(NAMES, dtype="category"),
        pd.Categorical(NAMES),
        pd.DataFrame({"label": NAMES}),
        pd.Series([0, 1, 2]),
        pd.Series([0, 1, 2], dtype="Int64"),
        pd.Series([0, 1, 2], index=[5, 6, 7]),
    ):
        np.testing.assert_allclose(THREE.loss(labels, LOGITS), expected, rtol=1e-6)


# Loss functions


class Scaled:
    def __init__(self, by):
        self.by = by

    def __call__(self, labels, logits):
        return self.by * (labels - logits) ** 2


def powered(labels, logits, power):
    return jnp.abs(labels - logits) ** power


def powered_keyword(labels, logits, *, power=2.0):
    return powered(labels, logits, power)


def scaled_by_feature(labels, logits, features):
    return features["scale"] * (labels - logits) ** 2


@pytest.mark.parametrize(
    ("loss_fn", "expected"),
    [
        (functools.partial(powered, power=3.0), 27.0),
        (powered_keyword, 9.0),
        (functools.partial(powered_keyword, power=1.0), 3.0),
        (Scaled(0.5), 4.5),
        (Scaled(0.5).__call__, 4.5),
        (functools.partial(scaled_by_feature, features={"scale": 2.0}), 18.0),
        (lambda labels, logits, **unused: (labels - logits) ** 2, 9.0),
        (callables.mse_with_reduction_arg, 9.0),
    ],
)
def test_loss_functions_that_are_taken(loss_fn, expected):
    head = jh.RegressionHead(loss_fn=loss_fn)
    np.testing.assert_allclose(head.loss([1.0], [[4.0]]), expected, rtol=1e-6)


def test_focal_loss_of_optax_bound_or_wrapped():
    labels, logits = np.array([1.0, 0.0], np.float32), np.array([[1.0], [0.5]], np.float32)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = np.mean([(1 - p[0]) ** 3 * -np.log(p[0]), p[1] ** 3 * -np.log(1 - p[1])])
    for loss_fn in (
        functools.partial(functools.partial(optax.sigmoid_focal_loss, gamma=9.0), alpha=None, gamma=3.0),
        lambda labels, logits: optax.sigmoid_focal_loss(logits, labels, gamma=3.0),
    ):
        np.testing.assert_allclose(jh.BinaryClassHead(loss_fn=loss_fn).loss(labels, logits), expected, rtol=1e-5)


def _required_keyword(labels, logits, *, gamma):
    return logits


def _positional_only(labels, logits, /):
    return logits


def _extra_positional_only(labels, logits, x=1):
    return logits


@pytest.mark.parametrize(
    ("loss_fn", "words"),
    [
        (powered, ("'power'", "functools.partial")),
        (callables.bad_extra_arg, ("'name'", "functools.partial", "keyword-only")),
        (_required_keyword, ("'gamma'", "functools.partial")),
        (functools.partial(_required_keyword, 1.0), ("labels",)),
        (_positional_only, ("labels", "by keyword")),
        (_extra_positional_only, ("'x'",)),
        (optax.losses.kl_divergence, ("labels", "log_predictions", "lambda labels, logits")),
        (lambda *args, **kwargs: 0, ("labels",)),
        (max, ("builtin", "lambda labels, logits")),
        (operator.itemgetter(0), ("labels",)),
        (3, ("function", "3")),
    ],
)
def test_loss_functions_that_are_refused(loss_fn, words):
    for head in (jh.RegressionHead, jh.BinaryClassHead, functools.partial(jh.MultiClassHead, 3)):
        with pytest.raises(ValueError, match="loss_fn") as caught:
            head(loss_fn=loss_fn)
        assert all(word in str(caught.value) for word in words), str(caught.value)


# Values, judged as given and as cast


@pytest.mark.parametrize(
    ("head", "label"),
    [
        (jh.RegressionHead(), 1e300),
        (jh.RegressionHead(), -1e39),
        (jh.BinaryClassHead(), 1 + 1e-9),
        (jh.BinaryClassHead(), -1e-60),
        (jh.MultiClassHead(3), 2**32),
        (jh.MultiClassHead(3), 2**32 + 1),
        (jh.MultiClassHead(3), np.uint64(2**64 - 1)),
        (jh.MultiClassHead(3), np.uint32(2**32 - 1)),
    ],
)
def test_labels_that_a_cast_would_hide(head, label):
    labels = np.array([[label]])
    logits = np.zeros((1, head.logits_dimension), np.float32)
    with pytest.raises(ValueError, match="labels must be"):
        head.loss(labels, logits)
    with pytest.raises(ValueError, match="labels must be"):
        head.encode_labels(labels)
    # Nobody has looked at the mask: what enters compiled code is illegal still.
    for mask in ({"where": jax.device_put(np.ones(1, bool))}, {"weights": jax.device_put(np.ones(1, np.float32))}):
        assert np.isnan(head.loss(labels, logits, **mask))
    if abs(float(label)) > 2:
        assert np.isnan(head.loss(labels, logits, check=False))
    assert head.loss(labels, logits, where=[False]) == 0
    assert head.loss(labels, logits, where=jax.device_put(np.zeros(1, bool))) == 0


def test_two_is_not_true():
    """As a bool 2 would be True."""
    head, logits = SurvivalHead(), np.zeros((2, 1), np.float32)
    labels = {"time": np.ones((2, 1), np.float32), "event": np.array([[1], [2]])}
    with pytest.raises(ValueError, match=r"labels\['event'\] must be booleans"):
        head.loss(labels, logits)
    assert np.isnan(head.loss(labels, logits, where=jax.device_put(np.ones(2, bool))))
    assert np.isnan(head.loss(labels, logits, check=False))
    legal = labels | {"event": np.array([[1], [0]])}
    assert np.isfinite(head.loss(legal, logits))
    assert np.isfinite(head.loss(legal, logits, check=False))


@pytest.mark.parametrize(
    ("spec", "dtype", "legal", "illegal"),
    [
        (jh.LabelSpec(), np.float64, -1e38, 1e300),
        (jh.LabelSpec(1, "float", 0, 1), np.float64, 1, 1 + 1e-9),
        (jh.LabelSpec(1, "float", -1, 1), np.uint64, 1, 2),
        (jh.LabelSpec(1, "int", -1, 4), np.uint32, 4, 2**32 - 1),
        (jh.LabelSpec(1, "int", -1, 4), np.uint64, 4, 2**64 - 1),
        (jh.LabelSpec(1, "int", -1, 4), np.uint8, 4, 255),
        (jh.LabelSpec(1, "int", 0, 4), np.int64, 4, 2**32),
        (jh.LabelSpec(1, "int", -1, None), np.int64, 4, -(2**32)),
        (jh.LabelSpec(1, "int"), np.int64, 2**31 - 1, 2**31),
        (jh.LabelSpec(1, "bool"), np.uint32, 1, 2),
        (jh.LabelSpec(1, "bool"), np.int64, 1, 2**32),
    ],
)
def test_wide_dtypes_are_judged_alike_on_host_and_device(spec, dtype, legal, illegal):
    labels = np.array([legal, illegal], dtype)
    np.testing.assert_array_equal(spec.illegal(labels, np), [False, True])
    with jax.enable_x64(True):
        traced = jax.jit(lambda x: spec.illegal(x, jnp))(labels)
    np.testing.assert_array_equal(traced, [False, True])


def test_a_float64_label_in_x64_mode_is_visible():
    head, logits = jh.RegressionHead(), np.zeros((1, 1))
    with jax.enable_x64(True):
        step = jax.jit(lambda y, where: head.loss(y, logits, where=where))
        assert np.isnan(step(np.array([[1e300]]), np.array([True])))
        assert step(np.array([[1e300]]), np.array([False])) == 0
        assert step(np.array([[1e10]]), np.array([True])) == np.float32(1e20)
        weighted = jax.jit(lambda w: head.loss(np.ones((1, 1)), logits, weights=w))
        assert np.isnan(weighted(np.array([1e300])))


def test_weights_that_float32_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="weights must be finite"):
        jh.RegressionHead().loss([1.0, 2.0], [[0.0], [0.0]], weights=np.array([1.0, 1e300]))
    assert jh.RegressionHead().loss([1.0, 2.0], [[0.0], [0.0]], weights=[1, 1e300], where=[True, False]) == 1


# The normalizer


@pytest.mark.parametrize("normalizer", [np.nan, -1, -0.5, np.inf, 1e300, [2.0], np.ones(2), np.ones((1, 1)), "4", 1j])
def test_normalizers_that_are_refused(normalizer):
    with pytest.raises(ValueError, match="normalizer must be"):
        jh.RegressionHead().loss([1.0], [[0.0]], normalizer=normalizer)


def test_normalizers_of_devices_are_scalars_too():
    head = jh.RegressionHead()
    with pytest.raises(ValueError, match=r"normalizer .*shape \(1,\)"):
        head.loss([1.0], [[0.0]], normalizer=jnp.ones(1))
    with pytest.raises(ValueError, match=r"normalizer .*shape \(2,\)"):
        jax.jit(lambda n: head.loss([1.0], [[0.0]], normalizer=n))(np.ones(2))


def test_normalizers_that_are_taken():
    head = jh.RegressionHead()
    normalizers = [4, 4.0, np.float64(4), np.array(4), *jax.device_put((np.float32(4), np.int32(4)))]
    jitted = jax.jit(lambda every: [head.loss([2.0], [[0.0]], normalizer=n) for n in every])
    np.testing.assert_array_equal(jitted(normalizers), 1)
    for normalizer in normalizers:
        assert head.loss([2.0], [[0.0]], normalizer=normalizer) == 1
        assert head.loss([2.0], [[0.0]], normalizer=np.asarray(normalizer) * 0) == 0


# encode_labels


@pytest.mark.parametrize(
    ("head", "labels", "words"),
    [
        (jh.MultiClassHead(3), [0.0, 1.0], "integers in \\[0, 2\\].*float64.*astype"),
        (jh.MultiClassHead(3), [True, False], "integers in \\[0, 2\\].*bool"),
        (jh.MultiClassHead(3), [0, 3], r"Given 3 at index \(1, 0\)"),
        (jh.MultiClassHead(3), ["ant"], "no label_vocabulary"),
        (jh.MultiClassHead(3), np.array([], "U3"), "no label_vocabulary"),
        (THREE, ["ant", "dog"], r"'dog' at index \(1, 0\)"),
        (THREE, ["ant", None], r"None at index \(1, 0\)"),
        (jh.BinaryClassHead(), [0.5, np.nan], r"Given nan"),
        (jh.RegressionHead(2), [[1.0, 2.0, 3.0]], r"labels dimension=2.  Received 3"),
        (SurvivalHead(), [1.0], r"dict with the keys \['event', 'time'\]. Given a list"),
        (SurvivalHead(), {"time": [1.0]}, r"Given \['time'\]"),
        (
            SurvivalHead(),
            {"time": [-1.0], "event": [True]},
            r"labels\['time'\] must be numbers in \[0, inf\]. Given -1",
        ),
        (SurvivalHead(), {"time": [1.0], "event": [0.0]}, r"labels\['event'\] .*float64"),
        (jh.RegressionHead(), None, "Given: None"),
    ],
)
def test_encode_labels_refuses_what_a_loss_refuses(head, labels, words):
    with pytest.raises(ValueError, match=words):
        head.encode_labels(labels)


@pytest.mark.parametrize(
    ("head", "labels", "expected"),
    [
        (THREE, ["cat", "ant"], np.array([2, 0], np.int32)),
        (THREE, [[b"cat"], [b"ant"]], np.array([[2], [0]], np.int32)),
        (THREE, pd.Series(["cat", "ant"], dtype="category"), np.array([2, 0], np.int32)),
        (THREE, np.array([2, 0], np.uint8), np.array([2, 0], np.int32)),
        (THREE, jnp.array([2, 0]), np.array([2, 0], np.int32)),
        (THREE, "cat", np.array(2, np.int32)),
        (THREE, [], np.array([], np.int32)),
        (THREE, np.array([], "U3"), np.array([], np.int32)),
        (THREE, np.array([], object), np.array([], np.int32)),
        (TWO, ["yes", "no"], np.array([1, 0], np.int32)),
        (jh.BinaryClassHead(), [True, False], np.array([1, 0], np.float32)),
        (jh.RegressionHead(2), np.ones((3, 2)), np.ones((3, 2), np.float32)),
    ],
)
def test_encode_labels_gives_the_dtype_of_a_step(head, labels, expected):
    encoded = head.encode_labels(labels)
    assert isinstance(encoded, np.ndarray)
    assert (encoded.dtype, encoded.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(encoded, expected)


def test_encode_labels_of_structured_labels():
    encoded = SurvivalHead().encode_labels({"time": [1, 2], "event": [1, 0]})
    assert {key: x.dtype for key, x in encoded.items()} == {"time": np.float32, "event": np.bool_}
    np.testing.assert_array_equal(encoded["time"], [1, 2])
    np.testing.assert_array_equal(encoded["event"], [True, False])


@functools.cache
def loss_under(head: jh.Head) -> Any:
    """The loss of three rows under a mask, compiled."""
    logits = np.zeros((3, head.logits_dimension), np.float32)
    return jax.jit(lambda labels, where: head.loss(labels, logits, where=where))


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        (THREE, ["ant", "dog", "cat"]),
        (THREE, ["ant", None, "cat"]),
        (jh.MultiClassHead(3), [0, 2**32, 2]),
        (jh.BinaryClassHead(), [0.0, np.nan, 1.0]),
        (jh.BinaryClassHead(), [0, 7, 1]),
        (TWO, ["no", "?", "yes"]),
        (SurvivalHead(), {"time": [1.0, -1.0, 2.0], "event": [0, 2, 1]}),
    ],
)
def test_encode_labels_of_absent_rows(head, labels):
    """A jitted step takes them under the same mask, and shows them without."""
    step = loss_under(head)
    shaped = jax.tree.map(lambda x: np.array(x, object)[:, None], labels, is_leaf=lambda x: isinstance(x, list))
    if head not in (THREE, TWO):
        shaped = jax.tree.map(lambda x: np.array(x.tolist()), shaped)
    for given, where in ((labels, HERE), (shaped, HERE[:, None]), (labels, jnp.asarray(HERE)), (shaped, [1, 0, 1])):
        encoded = jax.tree.map(lambda x: x.reshape(3, 1), head.encode_labels(given, where=where))
        assert np.isfinite(step(encoded, HERE))
        assert np.isnan(step(encoded, np.ones(3, bool)))
        with pytest.raises(ValueError, match="at index"):
            head.encode_labels(given, where=np.ones(3, bool))
    with pytest.raises(ValueError, match="where shape"):
        head.encode_labels(labels, where=[True])


def test_encode_labels_is_for_the_host():
    with pytest.raises(ValueError, match="before the jitted step"):
        jax.jit(THREE.encode_labels)(np.array([0]))


# Features


def reads(*keys, path=operator.getitem):
    """A loss function that multiplies by features."""

    def loss_fn(labels, logits, features):
        out = (labels - logits) ** 2
        for key in keys:
            out = out * jnp.asarray(path(features, key), jnp.float32)
        return out

    return jh.RegressionHead(loss_fn=loss_fn)


COLUMN = [[2.0], [3.0]]
ONES, ZEROS = np.ones((2, 1), np.float32), np.zeros((2, 1), np.float32)
READS_X = reads("x")
COLUMNS = [
    (COLUMN, 2.5),
    (np.array(COLUMN), 2.5),
    (jax.device_put(f32(COLUMN)), 2.5),
    ([np.array([2.0]), np.array([3.0])], 2.5),
    (pd.DataFrame({"x": [2.0, 3.0]}), 2.5),
    (2, 2),
    (2.0, 2),
    (True, 1),
    (np.float64(2), 2),
    (np.array(2), 2),
    (jax.device_put(np.float32(2)), 2),
]


def with_text(column: Any) -> list[dict[str, Any]]:
    """Features that hold a column alone, and others that hold text too."""
    return [{"x": column}, {"x": column, "who": ["ann", "bob"], "nested": {"who": "ann"}}]


@pytest.mark.parametrize(("column", "expected"), COLUMNS)
def test_columns_that_enter(column, expected):
    for features in with_text(column):
        assert READS_X.loss(ONES, ZEROS, features) == expected
        assert READS_X.measure(ONES, ZEROS, features).compute()["average_loss"] == expected


def test_columns_that_enter_compiled_code():
    every = [features for column, _ in COLUMNS for features in with_text(column)]
    got = jax.jit(lambda y: [READS_X.loss(y, ZEROS, features) for features in every])(ONES)
    np.testing.assert_array_equal(got, np.repeat([expected for _, expected in COLUMNS], 2))


def test_a_traced_scalar_is_a_column():
    slope = jax.jit(jax.grad(lambda x: READS_X.loss(ONES, ZEROS, {"x": x})))(np.float32(2))
    assert slope == 1


def test_data_frames_are_features():
    def loss_fn(labels, logits, features):
        return (labels - logits) ** 2 * features["x"][:, None]

    frame = pd.DataFrame(
        {"x": f32([2, 3]), "w": f32([1, 3]), "n": pd.array([1, 2], dtype="Int64"), "who": ["ann", "bob"]}
    )
    head = jh.RegressionHead(loss_fn=loss_fn, weight_column="w", loss_reduction="sum")
    for features in (frame, dict(frame), {"x": frame["x"], "w": frame["w"]}):
        assert head.loss(ONES, ZEROS, features) == 2 + 9
    with pytest.raises(ValueError, match=r"Feature v .*\['n', 'w', 'who', 'x'\]"):
        jh.RegressionHead(weight_column="v").loss(ONES, ZEROS, frame)
    with pytest.raises(ValueError, match=r"features\['who'\]"):
        jh.RegressionHead(weight_column="who").loss(ONES, ZEROS, frame)


def test_nested_features_and_their_absent_rows():
    head = reads(("a", "x"), ("a", "s"), path=lambda f, key: f[key[0]][key[1]])
    garbage = {"a": {"x": [[2.0], [np.nan]], "s": 3.0, "who": "ann"}}
    loss, gradient = jax.jit(jax.value_and_grad(lambda z: head.loss(ONES, z, garbage, where=[True, False])))(ZEROS)
    assert loss == 6
    np.testing.assert_array_equal(gradient, [[-12], [0]])


@pytest.mark.parametrize("jit", [False, True])
def test_a_column_that_is_missing_is_named(jit):
    features = {
        "x": COLUMN,
        "n": 3,
        "who": ["ann", "bob"],
        "ragged": [[1.0], [2.0, 3.0]],
        "day": pd.Series(pd.to_datetime(["2020-01-01"] * 2)),
        "code": np.array(["a", "b"]),
        "inner": {"y": np.ones(2, np.float32)},
        "none": None,
    }
    for wanted in ("absent", "who", "ragged", "none"):
        head = reads(wanted)

        def call(y, head=head):
            return head.loss(y, ZEROS, features)

        with pytest.raises(ValueError, match=rf"features\['{wanted}'\]") as caught:
            (jax.jit(call) if jit else call)(ONES)
        message = str(caught.value)
        entered, left_out = message.split("Left out")
        assert "'inner': {'y': float32[2]}, 'n': int32[], 'x': float32[2, 1]" in entered
        words = (
            "'who': a list of str",
            "'ragged': ",
            "'day': dtype datetime64",
            "'code': dtype <U1",
            "'none': a NoneType",
        )
        assert all(word in left_out for word in words), message
    assert READS_X.loss(ONES, ZEROS, features) == 2.5


def test_features_that_are_no_table():
    with pytest.raises(ValueError, match=r"features must be a mapping or a data frame\. Given a ndarray"):
        reads("x").loss(ONES, ZEROS, ONES)
    with pytest.raises(ValueError, match=r"features\['x'\]"):
        reads("x").loss(ONES, ZEROS, None)
    assert jh.RegressionHead().loss(ONES, ZEROS, ONES) == 1, "a head that reads no features takes anything"


def test_text_that_comes_and_goes_compiles_nothing_anew():
    @chex.assert_max_traces(n=1)
    def loss_fn(labels, logits, features):
        return (labels - logits) ** 2 * features["x"]

    head = jh.RegressionHead(loss_fn=loss_fn)
    for more in ({}, {"who": np.array(["ann", "bob"])}, {"who": np.array(["cecily", "bob"])}, {"tag": "t"}):
        head.loss(ONES, ZEROS, {"x": f32(COLUMN), **more})
        head.loss(ONES, ZEROS, {**more, "x": f32(COLUMN)})


# Constructors


def test_the_first_argument_of_the_original_may_be_positional():
    head = jh.BinaryClassHead("w")
    assert head == jh.BinaryClassHead(weight_column="w")
    assert eval(repr(head), {"BinaryClassHead": jh.BinaryClassHead}) == head
    assert head.loss([1, 0], [[0.0], [0.0]], {"w": [3.0, 1.0]}) == np.float32(2 * np.log(2))
    with pytest.raises(TypeError):
        jh.BinaryClassHead("w", (0.3,))  # pyright: ignore[reportCallIssue]  # the point of the test
    with pytest.raises(ValueError, match="weight_column must be a key"):
        jh.BinaryClassHead(2)  # pyright: ignore[reportArgumentType]  # the point of the test
    assert jh.MultiClassHead(3).n_classes == 3
    assert jh.RegressionHead(2).label_dimension == 2


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_sizes_may_be_numpy_integers(dtype):
    for numpy, python in (
        (jh.RegressionHead(dtype(3)), jh.RegressionHead(3)),
        (jh.MultiClassHead(dtype(5)), jh.MultiClassHead(5)),
    ):
        assert numpy == python
        assert hash(numpy) == hash(python)
        assert repr(numpy) == repr(python)
        assert type(numpy.logits_dimension) is int
        assert eval(repr(numpy), dict(vars(jh))) == python


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"low": 1}, "fill=0"),
        ({"high": -1}, "fill=0"),
        ({"low": 0, "high": 1, "fill": 2}, r"fill=2.*numbers in \[0, 1\]"),
        ({"low": 2, "high": 1, "fill": 1}, "low=2, high=1"),
        ({"low": np.nan}, "nan"),
        ({"fill": np.inf}, "fill=inf"),
        ({"kind": "bool", "fill": 2}, "fill=2"),
        ({"kind": "int", "low": 1, "high": 5}, "fill=0"),
    ],
)
def test_label_specs_that_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        jh.LabelSpec(**arguments)


def test_label_specs_take_numpy_limits():
    spec = jh.LabelSpec(1, "float", np.float64(0), np.float64(1), np.float64(0.5))
    np.testing.assert_array_equal(spec.illegal(np.array([0.5, 2.0]), np), [False, True])
    assert type(spec.low) is float


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.bool_])
def test_one_hot_labels_are_told_of_argmax(dtype):
    head = jh.MultiClassHead(3)
    for labels in (np.eye(3, dtype=dtype), jax.device_put(np.eye(3, dtype=dtype))):
        with pytest.raises(ValueError, match=r"one-hot.*argmax\(-1\)"):
            head.loss(labels, LOGITS)
    assert np.isfinite(head.loss(np.eye(3, dtype=dtype).argmax(-1), LOGITS))


# Infinite logits


binary_loss = jax.jit(jax.value_and_grad(jh.BinaryClassHead().loss, argnums=1))


@pytest.mark.parametrize(
    ("label", "logit", "loss", "gradient"),
    [
        (1, np.inf, 0, 0),
        (0, -np.inf, 0, 0),
        (1, -np.inf, np.inf, -1),
        (0, np.inf, np.inf, 1),
        (0.5, np.inf, np.inf, 0.5),
        (0.75, -np.inf, np.inf, -0.75),
        (1, np.nan, np.nan, np.nan),
        (0, 1e300, np.inf, 1),
        (1, 1e300, 0, 0),
    ],
)
def test_infinite_logits_of_two_classes(label, logit, loss, gradient):
    with np.errstate(over="ignore"):
        value, slope = binary_loss(f32([label]), f32([[logit]]))
    np.testing.assert_array_equal(value, np.float32(loss))
    np.testing.assert_array_equal(slope, f32([[gradient]]))
    np.testing.assert_array_equal(jh.BinaryClassHead().loss([label], np.array([[logit]])), np.float32(loss))
