"""The numbers and refusals of TensorFlow's own heads, case by case.

The files are described in `goldens/README.md`. Every case of them is either required, and then runs
through the test that `TEST_OF_KIND` names, or stands in `goldens/differs.py`, and then a check
below asserts what this library does instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from goldens import loader, oracle
from goldens.callables import LOSS_FNS
from goldens.differs import DIFFERS
from goldens.loader import Batch, Case
from goldens.refusals import words

import jaxheads as jh

MODES = ("train", "eval")
# Class names are for the host: `predictions` gives the ids, `decode_predictions` the names.
IDS_OF_NAMES = {"classes": "class_ids", "all_classes": "all_class_ids"}


def cases(test: str) -> pytest.MarkDecorator:
    """Parametrises a test with the required cases that go through it."""
    chosen = [case for case in loader.all_cases() if case.required and case.test == test]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.id)


def close(actual, expected, what: str, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    if expected.dtype.kind == "U":
        np.testing.assert_array_equal(actual, expected, err_msg=what)
    else:
        np.testing.assert_allclose(actual, expected, rtol, atol, equal_nan=True, err_msg=what)


def close_metrics(metrics, expected, what: str) -> None:
    """Names and values, `expected` in the file's way of writing them."""
    computed = metrics.compute(undefined=0.0)
    assert set(computed) == set(expected), what
    for name, value in expected.items():
        close(computed[name], loader.scalar(value), f"{what}: {name}", rtol=5e-5, atol=5e-6)


def close_predictions(head, predictions, keys: list[str] | None, golden, what: str) -> None:
    expected = {key: loader.decode(array) for key, array in golden.items()}
    decoded = head.decode_predictions(predictions)
    if keys is None:
        assert set(decoded) == set(expected), what
    else:
        assert set(predictions) == {IDS_OF_NAMES.get(key, key) for key in keys}, what
        assert set(keys) == set(expected), what
    for key, array in expected.items():
        if array.dtype.kind == "i":
            assert decoded[key].dtype.kind == "i", f"{what}: {key}"
        close(decoded[key], array, f"{what}: {key}")


def arrays_of(keys: list[str] | None) -> list[str] | None:
    """The arrays behind TensorFlow's prediction keys: names are decoded from ids on the host."""
    return None if keys is None else [IDS_OF_NAMES.get(key, key) for key in keys]


def zero(head, case: Case):
    return head.metrics([0.0] if case.regularized else None)


def golden_metrics(case: Case) -> list[dict]:
    """After each batch; the file keeps those after the last one apart."""
    return [*case.expected.get("metrics_after_batch", []), case.expected["metrics"]]


def padded(batch: Batch) -> dict:
    """The batch's arguments in one of few shapes: more rows, of garbage, that do not exist."""
    n = len(jax.tree.leaves(batch.logits)[0])
    rows = 8 if n <= 8 else 64

    def pad(array):
        garbage = {"f": np.nan, "i": 99, "b": True, "U": "no such class"}[array.dtype.kind]
        more = np.full((rows - n, *array.shape[1:]), garbage)
        return np.concatenate([array, more if array.dtype.kind == "U" else more.astype(array.dtype)])

    lead = jax.tree.leaves(batch.logits)[0].shape[1:-1]
    exists = np.arange(rows).reshape((-1, *[1] * len(lead))) < n
    arrays = jax.tree.map(pad, batch.arrays)
    return batch.inputs | arrays | {"where": np.broadcast_to(exists, (rows, *lead))}


def loss_and_gradient(head, inputs: dict):
    """The loss and its gradient with respect to the logits."""
    logits = jax.tree.map(jnp.asarray, inputs["logits"])
    return jax.value_and_grad(lambda z: head.loss(**(inputs | {"logits": z})))(logits)


def numbers_of(head, case: Case) -> list[dict]:
    """What the head gives for each batch, op by op and padded.

    Each shape costs a compilation for every operation, far more than the numbers themselves, hence
    the padding. It also holds the head to its first law: what is masked is absent.
    """
    with jax.disable_jit():
        return numbers(head, case, padded)


def numbers(head, case: Case, arguments: Callable[[Batch], dict]) -> list[dict]:
    """What the head gives for each batch, with these arguments for a batch."""
    metrics, results = zero(head, case), []
    keys = arrays_of(case.raw.get("prediction_keys_arg"))
    for batch in case.batches:
        n, inputs = len(jax.tree.leaves(batch.logits)[0]), arguments(batch)
        metrics = head.update_metrics(metrics, **inputs)
        predictions = jax.tree.map(np.asarray, head.predictions(inputs["logits"], keys))
        result = {
            "eval_loss": head.loss(mode="eval", **inputs),
            "predictions": {key: array[:n] for key, array in predictions.items()},
            "metrics": metrics,
        }
        if "train_loss_grad_logits" in case.expected:
            loss, gradient = loss_and_gradient(head, inputs | {"mode": "train"})
            gradient = np.asarray(gradient)
            assert not gradient[n:].any(), "rows that do not exist have a gradient"
            result |= {"train_loss": loss, "train_loss_grad_logits": gradient[:n]}
        else:
            result["train_loss"] = head.loss(mode="train", **inputs)
        results.append(result)
    return results


@cases("test_behaviour")
def test_behaviour(case: Case):
    head = loader.build(case.raw)
    expected = case.expected
    assert head.name == expected["name"]
    assert head.logits_dimension == expected["logits_dimension"]
    text = expected["loss_reduction"]
    reduction = "SUM_OVER_BATCH_SIZE" if text == "auto" else text.upper()
    assert head.loss_reduction == jh.Reduction[reduction]
    created = zero(head, case).compute(undefined=0.0)
    assert set(created) == set(expected["metric_keys_at_creation"])
    assert not any(created.values())
    check_numbers(head, case, numbers_of(head, case))


def check_numbers(head, case: Case, results: list[dict], but: list[dict] | None = None) -> None:
    """All numbers of a case; `but` are metrics, by batch, that are not the golden ones."""
    expected = case.expected
    for i, result in enumerate(results):
        for loss in (f"{mode}_loss" for mode in MODES):
            assert result[loss].dtype == jnp.float32
            close(result[loss], loader.scalar(expected[loss][i]), f"{loss} of batch {i}")
        if "train_loss_grad_logits" in result:
            golden = loader.decode(expected["train_loss_grad_logits"][i])
            close(result["train_loss_grad_logits"], golden, f"gradient of batch {i}")
        keys, golden = case.raw.get("prediction_keys_arg"), expected["predictions"][i]
        close_predictions(head, result["predictions"], keys, golden, f"predictions of batch {i}")
        golden = golden_metrics(case)[i] | (but[i] if but else {})
        close_metrics(result["metrics"], golden, f"metrics after batch {i}")
    mean = np.mean([np.float64(result["eval_loss"]) for result in results])
    close(mean, loader.scalar(expected["evaluate_loss"]), "loss of evaluate")


def call(case: Case):
    """Does what the refused case did."""
    head = loader.build(case.raw)
    if case.raw["call"] == "construct":
        return head
    (batch,) = case.batches
    if case.raw["call"] == "predictions":
        return head.predictions(batch.logits, case.raw.get("prediction_keys_arg"))
    if case.raw["call"] == "update_metrics":
        return head.update_metrics(head.metrics(), **batch.inputs)
    return head.loss(**batch.inputs)


def refused(function: Callable[[], object], *expected_words: str) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        function()
    message = str(caught.value).lower()
    missing = [word for word in expected_words if word.lower() not in message]
    assert not missing, f"{missing} not in {message!r}"


@cases("test_refusal")
def test_refusal(case: Case):
    refused(lambda: call(case), *words(case.id))


def logits_of(probabilities: np.ndarray) -> np.ndarray:
    """Float32 logits whose float32 sigmoid is these probabilities, or one ulp of the logit away.

    Where a neighbour of `logit(p)` gives p exactly it is taken, so that ties stay ties.
    """
    p = np.asarray(probabilities, np.float32)
    with np.errstate(divide="ignore"):
        middle = np.clip(np.log(p.astype(np.float64)) - np.log1p(-p.astype(np.float64)), -200, 200)
    candidates = [middle.astype(np.float32)]
    for direction in (-np.inf, np.inf):
        neighbour = candidates[0]
        for _ in range(4):
            neighbour = np.nextafter(neighbour, np.float32(direction))
            candidates.append(neighbour)
    stacked = np.stack(candidates)
    distance = np.abs(np.asarray(jax.nn.sigmoid(stacked)) - p)
    return np.take_along_axis(stacked, np.argmin(distance, axis=0)[None], axis=0)[0]


def keras_inputs(case: Case) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Labels, logits and weights of each batch, as `[n, 1]`; weights broadcast as Keras does."""
    for batch in case.raw["batches"]:
        labels, p = loader.decode(batch["labels"]), loader.decode(batch["predictions"])
        weights = 1.0 if batch["weights"] is None else loader.decode(batch["weights"])
        weights = np.broadcast_to(np.float32(weights), p.shape)
        logits = logits_of(p)
        np.testing.assert_array_equal(
            bucket(jax.nn.sigmoid(logits)), bucket(p), err_msg="a logit that changes the bucket"
        )
        yield labels.reshape(-1, 1), logits.reshape(-1, 1), weights.reshape(-1, 1)


def bucket(p) -> np.ndarray:
    return np.maximum(np.ceil(np.asarray(p, np.float32) * np.float32(199)) - 1, 0)


def keras_metrics(case: Case, cast: bool, thresholds: tuple[float, ...] = ()) -> jh.Metrics:
    """With `cast`, labels that are not 0 become whole positives, which Keras does itself."""
    head = jh.BinaryClassHead(bins=jh.ThresholdGrid(200), thresholds=thresholds)
    metrics = head.metrics()
    for labels, logits, weights in keras_inputs(case):
        labels = (labels != 0).astype(np.float32) if cast else labels
        metrics = metrics + head.measure(labels, logits, weights=weights)
    return metrics


@cases("test_keras_auc")
def test_keras_auc(case: Case):
    metrics = keras_metrics(case, cast=True)
    computed = metrics.compute(undefined=0.0)
    close(computed["auc"], case.expected["roc"], "roc", rtol=5e-5, atol=5e-6)
    close(computed["auc_precision_recall"], case.expected["pr"], "pr", rtol=5e-5, atol=5e-6)
    close_counts(metrics, case)


def close_counts(metrics: jh.Metrics, case: Case) -> None:
    """The confusion vectors at the inner thresholds: rates of the curve times totals."""
    fallout, sensitivity, thresholds = metrics.curve("roc")
    inner = np.arange(1, 199)
    distance = np.abs(np.asarray(thresholds)[:, None] - inner / 199)
    assert np.max(np.min(distance, axis=0)) < 1e-6
    points = np.argmin(distance, axis=0)
    for rate, right, wrong in (
        (sensitivity, "true_positives_rle", "false_negatives_rle"),
        (fallout, "false_positives_rle", "true_negatives_rle"),
    ):
        expected = loader.expand(case.expected[right])
        total = (expected + loader.expand(case.expected[wrong]))[0]
        # A rate of nothing is NaN, its count 0.
        counts = np.nan_to_num(np.asarray(rate)[points]) * total
        np.testing.assert_allclose(counts, expected[inner], 5e-5, 5e-6, err_msg=right)


@cases("test_keras_threshold")
def test_keras_threshold(case: Case):
    threshold = case.raw["threshold"]
    computed = keras_metrics(case, cast=False, thresholds=(threshold,)).compute(undefined=0.0)
    for name, value in case.expected.items():
        actual = computed[f"{name}/positive_threshold_{threshold:g}"]
        close(actual, loader.scalar(value), name, rtol=5e-5, atol=5e-6)


QUICK = (
    "regression/default",
    "regression/float64_inputs",
    "regression/only_empty_batch",
    "binary_class/vocabulary_list",
    "binary_class/only_empty_batch",
    "multi_class/ties",
    "multi_class/only_empty_batch",
)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.id, marks=[] if case.id in QUICK else pytest.mark.slow)
        for case in loader.all_cases()
        if case.required and case.kind == "case"
    ],
)
def test_as_given(case: Case):
    """The same numbers from the very arrays of the file, by plain calls: minutes of compiling."""
    head = loader.build(case.raw)
    check_numbers(head, case, numbers(head, case, lambda batch: batch.inputs))


def options() -> list[Case]:
    """Few required cases that hold every constructor option of each head, in every form it takes."""

    def forms(case: Case) -> set[tuple]:
        """A form is a reduction, a tag such as `$tuple`, or a type; a loss may read features."""
        found: set[tuple] = {(case.raw["head"],)}
        for option, value in case.raw["kwargs"].items():
            form = next(iter(value)) if isinstance(value, dict) else type(value).__name__
            form = value if option == "loss_reduction" else form
            found.add((case.raw["head"], option, form, "_feature_" in str(value)))
        return found

    missing = {
        case: forms(case)
        for case in loader.all_cases()
        if case.required and "train_loss_grad_logits" in case.raw.get("expected", ())
    }
    chosen = []
    while any(missing.values()):
        most = max(missing, key=lambda case: len(missing[case]))
        held = missing[most]
        chosen.append(most)
        missing = {case: wanted - held for case, wanted in missing.items()}
    return chosen


@pytest.mark.parametrize("case", options(), ids=lambda case: case.id)
def test_compiled(case: Case):
    """The same numbers from `jax.jit` of everything, labels as the ids that a jitted step takes."""
    head = loader.build(case.raw)
    batch = case.batches[0]
    labels = batch.labels
    if labels.dtype.kind == "U":
        labels = head.encode_labels(labels)

    @jax.jit
    def step(inputs):
        metrics = head.update_metrics(zero(head, case), **inputs)
        return *loss_and_gradient(head, inputs), metrics

    loss, gradient, metrics = step(jax.tree.map(jnp.asarray, batch.inputs | {"labels": labels}))
    expected = case.expected
    close(loss, loader.scalar(expected["train_loss"][0]), "loss")
    close(gradient, loader.decode(expected["train_loss_grad_logits"][0]), "gradient")
    close_metrics(metrics, golden_metrics(case)[0], "metrics")


CHECKS: dict[str, Callable[[Case], None]] = {}


def differs(*ids: str) -> Callable:
    """Registers the check of what is done instead of what TensorFlow does in these cases."""

    def register(function: Callable[[Case], None]) -> Callable[[Case], None]:
        CHECKS.update(dict.fromkeys(ids, function))
        return function

    return register


@pytest.mark.parametrize("case_id", DIFFERS)
def test_differs_on_purpose(case_id: str):
    CHECKS[case_id](loader.by_id()[case_id])


def on_device(batch: Batch) -> Batch:
    return Batch(**jax.tree.map(jnp.asarray, batch.inputs))


def is_nan_under_jit(head, batch: Batch) -> None:
    """Loss and gradient of a bad row, where its values cannot be looked at."""
    step = jax.jit(lambda inputs: loss_and_gradient(head, inputs))
    loss, gradient = step(on_device(batch).inputs)
    assert np.isnan(loss)
    assert np.isnan(gradient).any()


def computed_with_warning(metrics, rows: int) -> dict:
    """What is left when bad rows are left out; reading it warns with their number."""
    with pytest.warns(jh.BadInputWarning, match=rf"\b{rows}\b"):
        return metrics.compute()


@differs("regression/nan_label_with_zero_weight")
def _(case: Case):
    head, (batch,) = loader.build(case.raw), case.batches
    # Weights (0, 1), labels (NaN, 1), logits (1, 2): the loss is 1 * (2 - 1)^2 over two elements.
    loss, gradient = loss_and_gradient(head, batch.inputs)
    close(loss, 0.5, "loss")
    close(gradient, [[0.0], [1.0]], "gradient")
    metrics = head.update_metrics(head.metrics(), **batch.inputs)
    close_metrics(metrics, {"average_loss": 1, "prediction/mean": 2, "label/mean": 1}, "metrics")


@differs("regression/nan_label_and_inf_logit")
def _(case: Case):
    head, (nan_label, inf_logit) = loader.build(case.raw), case.batches
    refused(lambda: head.loss(**nan_label.inputs), "labels", "nan")
    refused(lambda: head.update_metrics(head.metrics(), **nan_label.inputs), "labels", "nan")
    refused(lambda: head.loss(**on_device(nan_label).inputs, check=True), "labels", "nan")
    is_nan_under_jit(head, nan_label)
    # Labels (NaN, 1), logits (1, 2): the second row is left.
    metrics = head.update_metrics(head.metrics(), **on_device(nan_label).inputs)
    close(computed_with_warning(metrics, 1)["average_loss"], 1.0, "average_loss")
    # An infinite logit has a loss, and it is TensorFlow's.
    assert head.loss(**inf_logit.inputs) == np.inf
    metrics = computed_with_warning(head.update_metrics(metrics, **inf_logit.inputs), 1)
    assert metrics["average_loss"] == metrics["prediction/mean"] == np.inf
    close(metrics["label/mean"], 1.0, "label/mean")


@differs("regression/weights_negative", "binary_class/weights_negative")
def _(case: Case):
    head = loader.build(case.raw)
    for i, batch in enumerate(case.batches):
        assert batch.features is not None
        negative = batch.features["w"] < 0
        if not negative.any():
            close(head.loss(**batch.inputs), loader.scalar(case.expected["train_loss"][i]), "loss")
            continue
        named = ("features['w']", "negative", str(tuple(np.argwhere(negative)[0].tolist())))
        refused(lambda batch=batch: head.loss(**batch.inputs), *named)
        refused(lambda batch=batch: head.measure(**batch.inputs), *named)
        refused(lambda batch=batch: head.loss(**on_device(batch).inputs, check=True), *named)
        is_nan_under_jit(head, batch)
        left = ~negative.ravel()
        rest = Batch({"w": batch.features["w"][left]}, batch.labels[left], batch.logits[left], None)
        expected = head.measure(**rest.inputs).compute()
        actual = computed_with_warning(head.measure(**on_device(batch).inputs), negative.sum())
        for name, value in expected.items():
            close(actual[name], value, name)


@differs("regression/error/loss_reduction_unknown")
def _(case: Case):
    head = loader.build(case.raw, weight_column="w")
    assert head.loss_reduction == jh.Reduction.MEAN
    loss = head.loss([[1.0], [0.0]], [[3.0], [1.0]], {"w": [3.0, 1.0]})
    close(loss, (3 * 4 + 1 * 1) / 4, "loss")
    refused(lambda: loader.build(case.raw, loss_reduction="median"), "reduction", "median")


@differs(
    "regression/error/labels_sparse",
    "binary_class/error/labels_sparse",
    "multi_class/error/labels_sparse",
)
def _(case: Case):
    refused(lambda: call(case), "labels", "sparse")
    head, (batch,) = loader.build(case.raw), case.batches
    sparse = batch.labels
    # TensorFlow refused the container before it looked at the strings of the multi-class case.
    ids = np.arange(len(sparse.values)) if sparse.values.dtype.kind == "U" else sparse.values
    dense = np.zeros(sparse.dense_shape, ids.dtype)
    dense[tuple(sparse.indices.T)] = ids
    scipy_labels = scipy.sparse.coo_array(dense)
    refused(lambda: head.loss(scipy_labels, batch.logits), "labels", "sparse")
    close(head.loss(dense.tolist(), batch.logits), head.loss(dense, batch.logits), "loss")
    ragged = [[0], [1, 0]]
    refused(lambda: head.loss(ragged, np.zeros((2, head.logits_dimension))), "labels", "equal")


@differs("regression/error/labels_string")
def _(case: Case):
    refused(lambda: call(case), "labels", "str")


@differs("regression/error/weight_string_values")
def _(case: Case):
    refused(lambda: call(case), "features['w']", "dtype")


@differs("binary_class/error/labels_string_no_vocabulary")
def _(case: Case):
    refused(lambda: call(case), "labels", "label_vocabulary")


@differs("regression/error/features_none")
def _(case: Case):
    (batch,) = case.batches
    assert batch.features is None
    # Labels (1, 2), logits (3, 4).
    close(call(case), 4.0, "loss")
    head = loader.build(case.raw)
    assert head.update_metrics(head.metrics(), **batch.inputs).compute()["average_loss"] == 4


@differs("regression/error/regularization_empty_list")
def _(case: Case):
    head, (batch,) = loader.build(case.raw), case.batches
    close(call(case), 4.0, "loss")
    metrics = head.update_metrics(head.metrics([]), **batch.inputs).compute()
    close(metrics["regularization_loss"], 0.0, "regularization_loss")


@differs("regression/error/predictions_keys_arg")
def _(case: Case):
    predictions = call(case)
    assert list(predictions) == ["predictions"]
    close(predictions["predictions"], case.batches[0].logits, "predictions")


@differs("binary_class/soft_labels")
def _(case: Case):
    head = loader.build(case.raw)
    split = []
    for i, golden in enumerate(golden_metrics(case)):
        labels = np.concatenate([batch.labels for batch in case.batches[: i + 1]])
        logits = np.concatenate([batch.logits for batch in case.batches[: i + 1]])
        counted = oracle.counting_metrics(labels, logits, np.ones_like(labels), head.thresholds)
        assert all(abs(golden[name] - counted[name]) > 1e-3 for name in counted)
        split.append(counted)
    # Losses, gradients, predictions and means are TensorFlow's; what counts is split.
    check_numbers(head, case, numbers_of(head, case), but=split)


@differs("binary_class/thresholds_duplicate")
def _(case: Case):
    head = loader.build(case.raw)
    check_numbers(head, case, numbers_of(head, case))


@differs("binary_class/vocabulary_of_three")
def _(case: Case):
    refused(lambda: loader.build(case.raw), "label_vocabulary", "2", "zuko")
    head = loader.build(case.raw, label_vocabulary=["aang", "iroh"])
    for i, result in enumerate(numbers_of(head, case)):
        close(result["train_loss"], loader.scalar(case.expected["train_loss"][i]), "loss")
        close_metrics(result["metrics"], golden_metrics(case)[i], f"metrics after batch {i}")
        names = head.decode_predictions(result["predictions"])["all_classes"]
        three = loader.decode(case.expected["predictions"][i]["all_classes"])
        np.testing.assert_array_equal(names, three[:, :2])


@differs("binary_class/error/vocabulary_duplicate")
def _(case: Case):
    refused(lambda: loader.build(case.raw), "label_vocabulary", "'a'")


@differs(
    "binary_class/error/labels_int_with_vocabulary",
    "multi_class/error/labels_int_with_vocabulary",
)
def _(case: Case):
    head, (batch,) = loader.build(case.raw), case.batches
    named = np.asarray(head.label_vocabulary)[batch.labels]
    np.testing.assert_array_equal(head.encode_labels(named), batch.labels)
    close(call(case), head.loss(named, batch.logits), "loss")
    close(call(case), loader.build(case.raw, label_vocabulary=None).loss(**batch.inputs), "loss")
    beyond = batch.labels + 7
    refused(lambda: head.loss(beyond, batch.logits), "labels", str(beyond[0, 0]))


@differs("multi_class/error/labels_int8")
def _(case: Case):
    head, (batch,) = loader.build(case.raw), case.batches
    assert batch.labels.dtype == np.int8
    for dtype in (np.int8, np.uint8, np.int16):
        loss = head.loss(batch.labels.astype(dtype), batch.logits)
        close(loss, head.loss(batch.labels.astype(np.int32), batch.logits), dtype.__name__)


@differs("binary_class/ties_quarter_three_quarters")
def _(case: Case):
    head, (batch,) = loader.build(case.raw), case.batches
    scores = np.asarray(head.predictions(batch.logits)["logistic"]).ravel()
    ties = np.asarray([0.25, 0.75], np.float32)
    np.testing.assert_array_max_ulp(scores, ties, maxulp=1)
    # What this sigmoid decides; TensorFlow's gives the ties themselves, hence its two decisions.
    decided = {}
    for threshold in head.thresholds:
        values = oracle.at_decision(batch.labels.ravel(), np.ones(2), scores > threshold)
        for name, value in zip(("accuracy", "precision", "recall"), values, strict=True):
            decided[f"{name}/positive_threshold_{threshold:g}"] = value
    if np.array_equal(scores, ties):
        assert decided.items() <= case.expected["metrics"].items()
    check_numbers(head, case, numbers_of(head, case), but=[decided])


@differs("keras_metrics/threshold_soft")
def _(case: Case):
    threshold = case.raw["threshold"]
    names = {name: f"{name}/positive_threshold_{threshold:g}" for name in case.expected}
    cast = keras_metrics(case, cast=True, thresholds=(threshold,)).compute()
    for name in ("precision", "recall"):
        close(cast[names[name]], loader.scalar(case.expected[name]), name)
    # Labels (.3, 0, .9, 1), decisions (0, 1, 1, 1): Keras finds one label equal to its decision,
    # here (0.7 + 0 + 0.9 + 1) / 4 is right.
    assert case.expected["accuracy"] == 0.25
    soft = keras_metrics(case, cast=False, thresholds=(threshold,)).compute()
    close(soft[names["accuracy"]], 2.6 / 4, "accuracy")
    close(soft[names["precision"]], 1.9 / 3, "precision")
    close(soft[names["recall"]], 1.9 / 2.2, "recall")


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in loader.load("binary_class")
        if case.kind == "case" and case.required and set(case.raw["kwargs"]) <= {"thresholds"}
    ],
    ids=lambda case: case.id,
)
def test_oracle_of_counting_metrics(case: Case):
    """The formula for soft labels gives TensorFlow's numbers where the labels are hard."""
    labels = np.concatenate([batch.labels.ravel() for batch in case.batches])
    logits = np.concatenate([batch.logits.ravel() for batch in case.batches])
    thresholds = case.raw["kwargs"].get("thresholds", ())
    counted = oracle.counting_metrics(labels, logits, np.ones(len(labels)), thresholds)
    for name, value in counted.items():
        golden = loader.scalar(case.expected["metrics"][name])
        close(value, golden, name, rtol=5e-5, atol=5e-6)


def test_only_the_excused_differ():
    """Required is everything but `excused.json` and what is tagged an accident."""
    # With Keras's cast done by the caller, all numbers of this case with soft labels are reached.
    assert set(DIFFERS) == loader.excused_ids() - {"keras_metrics/auc_soft_labels"}
    assert set(CHECKS) == set(DIFFERS)


def test_every_case_runs():
    """No case is lost between the files and the tests."""
    everything = loader.all_cases()
    assert len({case.id for case in everything}) == len(everything)
    files = loader.read("index")["files"]
    assert len(everything) == sum(files[f"{family}.json"]["cases"] for family in loader.FAMILIES)
    parametrized = {
        case.id
        for test in loader.TEST_OF_KIND.values()
        for mark in globals()[test].pytestmark
        if mark.name == "parametrize"
        for case in mark.args[1]
    }
    required = {case.id for case in everything if case.required}
    assert parametrized == required
    assert required | set(DIFFERS) == {case.id for case in everything}
    assert not required & set(DIFFERS)
    print(loader.golden_summary())


def test_every_named_function_is_there():
    assert set(LOSS_FNS) == set(loader.read("index")["loss_fns"])
