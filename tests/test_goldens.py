"""The numbers and refusals of TensorFlow's own heads, case by case.

The files are described in `goldens/README.md`. Every case of them is either required, and then runs
through the test that `TEST_OF_KIND` names, or stands in `goldens/differs.py`, and then a check
below asserts what this library does instead.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
import zoo
from goldens import behaviours, loader, oracle
from goldens.callables import LOSS_FNS
from goldens.differs import DIFFERS, POOLED, REQUIRED_ANYWAY, SINCE
from goldens.loader import GARBAGE, Batch, Case, SparseTensor
from goldens.refusals import words

import jaxheads as jh

MODES = ("train", "eval")
# Class names are for the host: `predictions` gives the ids, `decode_predictions` the names.
IDS_OF_NAMES = {"classes": "class_ids", "all_classes": "all_class_ids"}
# The arrays of each export output, by the names that a server gives them.
SERVED = {"ClassificationOutput": {"scores"}, "RegressionOutput": {"outputs"}}


def options() -> list[Case]:
    """Few required cases that hold every constructor option of each head, and every form that options take."""

    def forms(spec: dict[str, Any]) -> set[tuple]:
        """A form is a reduction, a tag such as `$tuple`, or a type; a loss may read features.

        Forms are read by the same code for every head, so that any head will do. Of a head inside another it is the
        class.
        """
        found: set[tuple] = {(spec["head"],)}
        for option, value in spec["kwargs"].items():
            form = next(iter(value)) if isinstance(value, dict) else type(value).__name__
            form = value if option == "loss_reduction" else form
            inside = loader.inner(spec) if option == "heads" else [value] if option == "static_head" else []
            found |= {(spec["head"], option, head["head"]) for head in inside}
            found |= {(spec["head"], option), (option, form, not inside and "_feature_" in str(value))}
        return found

    missing = {case: forms(case.raw) for case in loader.all_cases() if case.required and case.kind == "case"}
    chosen = []
    while any(missing.values()):
        most = max(missing, key=lambda case: len(missing[case]))
        held = missing[most]
        chosen.append(most)
        missing = {case: wanted - held for case, wanted in missing.items()}
    return chosen


def some(cases: Iterable[Case], quick: Collection[str] | None = None) -> pytest.MarkDecorator:
    """Parametrises a test with cases; with the ids of those that are `quick`, the others are slow."""
    chosen = [
        pytest.param(case, id=case.id, marks=[] if quick is None or case.id in quick else pytest.mark.slow)
        for case in cases
    ]
    return pytest.mark.parametrize("case", chosen)


def cases(test: str, quick: Collection[str] | None = None) -> pytest.MarkDecorator:
    """Parametrises a test with the required cases that go through it."""
    return some([case for case in loader.all_cases() if case.required and case.test == test], quick)


OPTIONS = [case.id for case in options()]


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


def names_of(head, predictions: Mapping[str, Any]) -> dict[str, Any]:
    """Predictions as NumPy arrays by TensorFlow's keys, class names among them; of heads inside as `NAME::key`."""
    if isinstance(head, jh.SequentialHeadWrapper):
        return names_of(head.static_head, predictions)
    decoded = head.decode_predictions(predictions)
    if isinstance(head, jh.MultiHead):
        heads = {str(inner.name): inner for inner in head.heads}
        inside = {name: names_of(inner, predictions[name]) for name, inner in heads.items()}
        np.testing.assert_equal(
            decoded, {name: inner.decode_predictions(predictions[name]) for name, inner in heads.items()}
        )
        return {f"{name}::{key}": value for name, inner in inside.items() for key, value in inner.items()}
    if isinstance(head, jh.MultiLabelHead):
        # TensorFlow has the names of all classes under the one key, this library under both.
        np.testing.assert_array_equal(decoded.pop("all_classes"), decoded["classes"])
    return decoded


def close_predictions(head, predictions, keys: list[str] | None, golden, what: str) -> None:
    expected = {key: loader.decode(array) for key, array in golden.items()}
    decoded = names_of(head, predictions)
    if keys is None:
        assert set(decoded) == set(expected), what
    else:
        assert list(predictions) == arrays_of(head, keys), what
        assert set(keys) == set(expected), what
    for key, array in expected.items():
        if array.dtype.kind == "i":
            assert decoded[key].dtype.kind == "i", f"{what}: {key}"
        close(decoded[key], array, f"{what}: {key}")


def arrays_of(head, keys: list[str] | None) -> list[str] | None:
    """The arrays behind TensorFlow's prediction keys: names are decoded from ids on the host."""
    if keys == ["classes"] and isinstance(head, jh.MultiLabelHead):
        return ["probabilities"]  # the names of all classes come with any array
    return None if keys is None else [IDS_OF_NAMES.get(key, key) for key in keys]


def exported(output) -> dict[str, np.ndarray]:
    """The tensors of an export output by TensorFlow's names, made of its arrays and its static class names."""
    if isinstance(output, jh.RegressionOutput):
        return {"value": np.asarray(output.value)}
    if isinstance(output, jh.ClassificationOutput):
        return {"scores": np.asarray(output.scores), "classes": np.tile(output.classes, (len(output.scores), 1))}
    tensors = {key: np.asarray(array) for key, array in output.outputs.items()}
    for prefix, classes in output.classes:
        prefix, every = f"{prefix}/" if prefix else "", np.asarray(classes)
        rows = np.tile(every, (len(tensors[f"{prefix}logits"]), 1))
        ids = tensors.get(f"{prefix}class_ids")
        # A multi-label head names all classes in each row, one that decides also those that it decides for.
        tensors[f"{prefix}classes"] = rows if ids is None else every[ids]
        if ids is not None:
            tensors[f"{prefix}all_classes"] = rows
    return tensors


def close_exports(head, outputs: Mapping[str, Any], case: Case) -> None:
    """Signatures, their types, and the name, kind, shape and value of every tensor in them."""
    golden, predictions = case.expected["export_outputs_batch0"], case.expected["predictions"][0]
    own = {}
    if case.raw.get("prediction_keys_arg"):
        # The file has only the predictions that were asked for; other cases hold the others to it.
        own = names_of(head, head.predictions(case.batches[0].logits))
        own = {key: array.astype(str) if array.dtype == object else array for key, array in own.items()}
    assert set(outputs) == set(golden)
    for name, output in outputs.items():
        assert type(output).__name__ == golden[name]["type"], name
        tensors, expected = exported(output), golden[name]["tensors"]
        assert set(tensors) == set(expected), name
        for key, tensor in expected.items():
            source = tensor.get("same_as_prediction")
            array = own[source] if source in own else loader.decode(tensor.get("value") or predictions[source])
            assert array.shape == tuple(tensor["shape"])
            assert tensors[key].dtype.kind == array.dtype.kind, f"{name}: {key}"
            close(tensors[key], array, f"export output {name}: {key}")
        served = SERVED.get(golden[name]["type"], set(output.outputs) if hasattr(output, "outputs") else set())
        assert set(output.tensors) == served, name


def zero(head, case: Case):
    return head.metrics([0.0] if case.regularized else None)


def golden_metrics(case: Case) -> list[dict | None]:
    """After each batch; the file keeps those after the last one apart, and has no others of a `MultiHead`."""
    every = len(case.raw["batches"])
    last = case.expected["metrics"] | {key: value for key, (value, _) in pooled(case).items()}
    before = case.expected.get("metrics_after_batch", [None] * (every - 1) if case.family == "multi_head" else [])
    assert len(before) == every - 1
    return [*before, last]


def pooled(case: Case, batches: list[Batch] | None = None) -> dict[str, np.ndarray]:
    """The metrics `loss/NAME` of a `MultiHead`: of all data, which is what they are here, and the mean of batches."""
    if "heads" not in case.raw.get("kwargs", {}):
        return {}
    batches = encoded(loader.build(case.raw), case) if batches is None else batches
    values = oracle.head_losses(loader.outline(case.raw), [(b.labels, b.logits, b.features) for b in batches])
    inside = {POOLED + name: value for name, value in values.items()}
    return {key: value for key, value in inside.items() if key in case.expected["metrics"]}


def without_sparse(head, batch: Batch) -> Batch:
    """Lists of ids or names for multi-label heads, dense arrays for sequences; no other head took sparse tensors."""
    features = batch.features
    if isinstance(head, jh.SequentialHeadWrapper) and features is not None:
        features = {key: x.dense() if isinstance(x, SparseTensor) else x for key, x in features.items()}
    return dataclasses.replace(batch, labels=as_lists(head, batch.labels), features=features)


def as_lists(head, labels):
    if isinstance(labels, dict):
        heads = {inner.name: inner for inner in head.heads}
        return {name: as_lists(heads[name], inner) if name in heads else inner for name, inner in labels.items()}
    if not isinstance(labels, SparseTensor):
        return labels
    if isinstance(head, jh.SequentialHeadWrapper):
        return labels.dense()
    return labels.rows if isinstance(head, jh.MultiLabelHead) else labels


def lists(labels) -> list[list]:
    """The lists of rows among labels."""
    inside = labels.values() if isinstance(labels, dict) else ()
    return [labels] if isinstance(labels, list) else [rows for inner in inside for rows in lists(inner)]


def encoded(head, case: Case) -> list[Batch]:
    """The batches, with arrays of what `encode_labels` makes of lists (and of all labels of a head inside)."""
    batches = [without_sparse(head, batch) for batch in case.batches]
    return [
        dataclasses.replace(batch, labels=head.encode_labels(batch.labels)) if lists(batch.labels) else batch
        for batch in batches
    ]


def padded(batch: Batch) -> dict:
    """The batch's arguments in one of few shapes: more rows and steps, of garbage, that do not exist."""
    lead = jax.tree.leaves(batch.logits)[0].shape[:-1]
    more = added(lead)

    def pad(array):
        garbage = np.asarray(GARBAGE[array.dtype.kind], None if array.dtype.kind == "U" else array.dtype)
        for axis, width in enumerate(more):
            beyond = np.full((*array.shape[:axis], width, *array.shape[axis + 1 :]), garbage)
            array = np.concatenate([array, beyond], axis)
        return array

    exists = np.pad(np.ones(lead, bool), [(0, width) for width in more] + [(0, 0)] * (len(lead) - len(more)))
    return batch.inputs | jax.tree.map(pad, batch.arrays) | {"where": exists}


def added(lead: tuple[int, ...]) -> tuple[int, ...]:
    """How many rows make 8 or 64 of a leading shape, and how many steps make 4 where there are any."""
    return ((8 if lead[0] <= 8 else 64) - lead[0], *(4 - steps for steps in lead[1:2]))


def loss_and_gradient(head, inputs: dict):
    """The loss and its gradient with respect to the logits, compiled."""
    return jax.jit(jax.value_and_grad(lambda z: head.loss(**(inputs | {"logits": z}))))(inputs["logits"])


def numbers_of(head, case: Case) -> list[dict]:
    """What the head gives for each batch, padded, by one compiled function for each head.

    The padding leaves few shapes. It also holds the head to its first law: what is masked is absent.
    """

    def arguments(batch: Batch) -> dict:
        inputs = padded(batch)
        if any(array.dtype.kind in "US" for array in jax.tree.leaves(inputs["labels"])):
            # Names are for the host; those of rows that do not exist may be anything.
            inputs["labels"] = head.encode_labels(inputs["labels"], where=inputs["where"])
        return inputs

    return numbers(head, case, encoded(head, case), arguments, compiled)


@functools.cache
def compiled(head, keys: tuple[str, ...] | None):
    return jax.jit(functools.partial(everything, head, keys))


def plain(head, keys: tuple[str, ...] | None):
    """One call after the other, as in a notebook; but for what JAX would do there by one operation after the other."""
    return functools.partial(everything, head, keys)


def everything(head, keys: tuple[str, ...] | None, metrics, inputs: dict) -> dict:
    """Losses, gradient, predictions, exports and metrics of a batch."""
    if all(jnp.issubdtype(z.dtype, jnp.floating) for z in jax.tree.leaves(inputs["logits"])):
        loss, gradient = loss_and_gradient(head, inputs | {"mode": "train"})
    else:
        loss, gradient = head.loss(mode="train", **inputs), None

    @jax.jit
    def served(logits):
        return {"predictions": head.predictions(logits, keys), "export_outputs": head.export_outputs(logits)}

    return {
        "train_loss": loss,
        "train_loss_grad_logits": gradient,
        **{f"{mode}_loss": head.loss(mode=mode, **inputs) for mode in MODES if mode != "train"},
        **served(inputs["logits"]),
        "metrics": head.update_metrics(metrics, **inputs),
    }


def as_before(more: tuple[int, ...], tree):
    """Without the rows that were added; and without steps, but what is `[rows, n]` has none."""

    def cut(array):
        array = np.asarray(array)[: len(array) - more[0]]
        return array[:, : array.shape[1] - more[1]] if len(more) > 1 and array.ndim > 2 else array

    return jax.tree.map(cut, tree)


def numbers(
    head,
    case: Case,
    batches: list[Batch],
    arguments: Callable[[Batch], dict],
    make: Callable[..., Callable[..., dict]] = plain,
) -> list[dict]:
    """What the head gives for each batch, with these arguments for a batch."""
    metrics, results = zero(head, case), []
    keys = arrays_of(head, case.raw.get("prediction_keys_arg"))
    call = make(head, None if keys is None else tuple(keys))
    for batch in batches:
        inputs = arguments(batch)
        shapes = (jax.tree.leaves(tree)[0].shape[:-1] for tree in (inputs["logits"], batch.logits))
        own = functools.partial(as_before, tuple(long - short for long, short in zip(*shapes, strict=True))[:2])
        result = call(metrics, inputs)
        metrics = result["metrics"]
        result |= {key: own(result[key]) for key in ("predictions", "export_outputs")}
        gradient = result["train_loss_grad_logits"]
        result["train_loss_grad_logits"] = own(gradient)  # None of logits that are integers
        all_rows, there = ([np.count_nonzero(x) for x in jax.tree.leaves(g)] for g in (gradient, own(gradient)))
        assert all_rows == there, "rows that do not exist have a gradient"
        results.append(result)
    return results


@cases("test_behaviour", OPTIONS)
def test_behaviour(case: Case):
    head = loader.build(case.raw)
    expected = case.expected
    assert head.name == expected["name"]
    assert head.logits_dimension == expected["logits_dimension"]
    if "loss_reduction_error" in expected:
        refused(lambda: head.loss_reduction, "loss_reduction", "Reduction.SUM,", "SUM_OVER_BATCH_SIZE")
    else:
        text = expected["loss_reduction"]
        reduction = "SUM_OVER_BATCH_SIZE" if text == "auto" else text.upper()
        assert head.loss_reduction == jh.Reduction[reduction]
    created = zero(head, case).compute(undefined=0.0)
    # TensorFlow's MultiHead has the metrics of its heads only when the first batch is seen.
    keys = expected["metrics"] if isinstance(head, jh.MultiHead) else expected["metric_keys_at_creation"]
    assert set(created) == set(keys) >= set(expected["metric_keys_at_creation"])
    assert not any(created.values())
    check_numbers(head, case, numbers_of(head, case))


def check_numbers(head, case: Case, results: list[dict], but: list[dict] | None = None) -> None:
    """All numbers of a case; `but` are metrics, by batch, that are not the golden ones."""
    expected = case.expected
    close_exports(head, results[0]["export_outputs"], case)
    for i, (result, metrics) in enumerate(zip(results, golden_metrics(case), strict=True)):
        for loss in (f"{mode}_loss" for mode in MODES):
            assert result[loss].dtype == jnp.float32
            close(result[loss], loader.scalar(expected[loss][i]), f"{loss} of batch {i}")
        if "train_loss_grad_logits" in expected:
            golden = loader.decode(expected["train_loss_grad_logits"][i])
            assert jax.tree.structure(result["train_loss_grad_logits"]) == jax.tree.structure(golden)
            jax.tree.map(
                functools.partial(close, what=f"gradient of batch {i}"), result["train_loss_grad_logits"], golden
            )
        keys, golden = case.raw.get("prediction_keys_arg"), expected["predictions"][i]
        close_predictions(head, result["predictions"], keys, golden, f"predictions of batch {i}")
        if metrics is not None:
            close_metrics(result["metrics"], metrics | (but[i] if but else {}), f"metrics after batch {i}")
    mean = np.mean([np.float64(result["eval_loss"]) for result in results])
    close(mean, loader.scalar(expected["evaluate_loss"]), "loss of evaluate")


def call(case: Case):
    """Does what the refused case did."""
    head = loader.build(case.raw)
    if case.raw["call"] == "construct":
        return head
    if case.raw["call"] == "loss_reduction":
        return head.loss_reduction
    (batch,) = (without_sparse(head, batch) for batch in case.batches)
    if lists(batch.labels):
        batch = dataclasses.replace(batch, labels=head.encode_labels(batch.labels))
    if case.raw["call"] == "predictions":
        return head.predictions(batch.logits, case.raw.get("prediction_keys_arg"))
    if case.raw["call"] == "update_metrics":
        return head.update_metrics(head.metrics(), **batch.inputs)
    return head.loss(**batch.inputs)


def refused(function: Callable[[], object], *expected_words: str, by: type[Exception] = ValueError) -> None:
    with pytest.raises(by, match=r"\S") as caught:
        function()
    message = str(caught.value).lower()
    missing = [word for word in expected_words if word.lower() not in message]
    assert not missing, f"{missing} not in {message!r}"


@cases("test_refusal")
def test_refusal(case: Case):
    # An argument that is not there is Python's to refuse.
    unexpected = "unexpected keyword argument" in case.raw["error"]["message"]
    refused(lambda: call(case), *words(case.id), by=TypeError if unexpected else ValueError)


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


def keras_inputs(case: Case) -> Iterator[tuple[np.ndarray, ...]]:
    """Labels, logits, weights and mask of each batch, as `[ROWS, 1]`; weights broadcast as Keras does."""
    for batch in case.raw["batches"]:
        labels, p = loader.decode(batch["labels"]), loader.decode(batch["predictions"])
        weights = 1.0 if batch["weights"] is None else loader.decode(batch["weights"])
        weights = np.broadcast_to(np.float32(weights), p.shape)
        there = np.arange(ROWS)[:, None] < p.size
        labels, p, weights = (np.resize(np.float32(array), ROWS)[:, None] * there for array in (labels, p, weights))
        logits = logits_of(p)
        np.testing.assert_array_equal(
            bucket(jax.nn.sigmoid(logits)), bucket(p), err_msg="a logit that changes the bucket"
        )
        yield labels, logits, weights, there


def bucket(p) -> np.ndarray:
    return np.maximum(np.ceil(np.asarray(p, np.float32) * np.float32(199)) - 1, 0)


# One head and one number of rows, that of the largest batch, are one program for all cases.
KERAS, ROWS = jh.BinaryClassHead(bins=jh.ThresholdGrid(200), thresholds=(0.25, 0.5, 0.75)), 100


def keras_metrics(case: Case, cast: bool) -> jh.Metrics:
    """With `cast`, labels that are not 0 become whole positives, which Keras does itself."""
    metrics = KERAS.metrics()
    for labels, logits, weights, where in keras_inputs(case):
        labels = (labels != 0).astype(np.float32) if cast else labels
        metrics = metrics + KERAS.measure(labels, logits, weights=weights, where=where)
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
    computed = keras_metrics(case, cast=False).compute(undefined=0.0)
    for name, value in case.expected.items():
        actual = computed[f"{name}/positive_threshold_{threshold:g}"]
        close(actual, loader.scalar(value), name, rtol=5e-5, atol=5e-6)


# As they are in the file, without padding and one call after the other, each shape is some programs more.
QUICK = ("regression/float64_inputs", "multi_class/only_empty_batch")
AS_GIVEN = (*QUICK, "binary_class/vocabulary_list", "binary_class/only_empty_batch", "multi_class/ties")
FAMILIES = ("regression", "poisson_regression", "logistic_regression", "multi_label", "multi_head", "sequential")
AS_GIVEN += tuple(next(name for name in OPTIONS if name.startswith(f"{family}/")) for family in FAMILIES)


@some([case for case in loader.all_cases() if case.id in AS_GIVEN], QUICK)
def test_as_given(case: Case):
    """The same numbers from the very arrays of the file, by plain calls; and the mode changes nothing in a loss."""
    head = loader.build(case.raw)
    check_numbers(head, case, numbers(head, case, encoded(head, case), lambda batch: batch.inputs))


@pytest.mark.parametrize("case_id", ["multi_label/class_metrics_names", "multi_head/vocabularies_and_sparse"])
def test_lists_of_names_need_no_encoding(case_id: str):
    """An eager call takes them straight in."""
    case = loader.by_id()[case_id]
    head, batch = loader.build(case.raw), case.batches[0]
    loss = head.loss(**without_sparse(head, batch).inputs)
    close(loss, loader.scalar(case.expected["train_loss"][0]), "loss")


# Specs: what `create_estimator_spec` gives, mode by mode; its refusals; and steps of gradient descent.


class NoTransformation:
    """An optimizer of another library: no `init`, no `update`."""

    def minimize(self, loss):
        return loss


# The file's symbolic arguments; `logits` as a function where an optimizer needs one.
SPEC_ARGUMENTS: dict[str, dict[str, Any]] = {
    "train_op_fn": {"no_op": lambda loss: loss, "returns_none": lambda loss: None},
    "optimizer": {
        "sgd": optax.sgd(0.1),
        "string": "sgd",
        "v1_adam": NoTransformation(),
        "keras_new_sgd": NoTransformation(),
    },
    "trainable_variables": {"list": [np.float32(1)], "dict": {"w": np.float32(1)}},
    "update_ops": {"one_op": {"mean": np.float32(3)}, "list": [np.float32(3)]},
}


def spec_of(case: Case, mode: str, **arguments: Any):
    return specs_of(case, {mode: arguments})[mode]


def specs_of(case: Case, arguments: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The specs of some modes with arguments for each, in one program: eager they would be hundreds."""
    head, (batch,) = loader.build(case.raw), case.batches
    labels = as_lists(head, batch.labels)
    labels = head.encode_labels(labels) if lists(labels) else labels
    inputs = dataclasses.replace(batch, labels=labels).inputs

    @jax.jit
    def specs():
        return {mode: head.create_estimator_spec(**(inputs | given), mode=mode) for mode, given in arguments.items()}

    return specs()


def spec_arguments(case: Case) -> dict[str, Any]:
    arguments: dict[str, Any] = {key: SPEC_ARGUMENTS[key][value] for key, value in case.raw["args"].items()}
    if "trainable_variables" in arguments:
        (batch,) = case.batches
        arguments["logits"] = lambda v: jax.tree.map(lambda z: jax.tree.leaves(v)[0] * z, batch.logits)
    return arguments


def close_spec(head, spec, golden: dict[str, Any], mask) -> None:
    """What is there and what is not, names, shapes and values."""
    assert (spec.loss is not None) == golden["loss"]
    assert (spec.train_op is not None) == golden["train_op"]
    predictions = dict(spec.predictions)
    shapes = {}
    if isinstance(head, jh.SequentialHeadWrapper) and spec.mode == "infer":
        shapes["mask"] = list(predictions.pop("mask").shape)
    for key, array in names_of(head, predictions).items():
        # In training and evaluation TensorFlow cuts out the steps that are there; `[B, n]` it makes of them anew.
        cut = array[mask != 0] if mask is not None and spec.mode != "infer" and array.ndim > 2 else array
        rows = int(np.count_nonzero(mask)) if mask is not None and spec.mode != "infer" else len(array)
        shapes[key] = [rows, *cut.shape[1:]]
    assert shapes == golden.get("prediction_shapes", shapes)
    assert set(shapes) == set(golden["predictions"])
    assert (spec.export_outputs is None) == (golden["export_outputs"] is None)
    assert set(spec.export_outputs or ()) == set(golden["export_outputs"] or ())
    assert (spec.metrics is not None) == golden["loss"]
    if spec.mode == "eval":
        assert set(spec.metrics.compute()) == set(golden["eval_metric_ops"])
    if "loss_value" in golden:
        close(spec.loss, loader.scalar(golden["loss_value"]), "loss")
    if "train_op_value" in golden:
        close(spec.train_op, loader.scalar(golden["train_op_value"]), "train_op")
    if "summaries" in golden:
        assert set(spec.summaries) == set(golden["summaries"])
        for tag, value in golden["summaries"].items():
            close(spec.summaries[tag], loader.scalar(value), tag)


# Names, what regularizes, several heads, sequences; the losses and predictions are those of `test_behaviour`.
QUICK_SPECS = ("binary_named_regularized", "regression_link", "multi_class", "multi_label", "multi_head_regularized")
QUICK_SPECS += ("sequential_binary_regularized",)


@cases("test_spec", [f"estimator_spec/{name}" for name in QUICK_SPECS])
def test_spec(case: Case):
    head, (batch,) = loader.build(case.raw), case.batches
    mask = (batch.features or {}).get("mask")
    arguments: dict[str, Any] = {"train": {"train_op_fn": lambda loss: loss * -7.0}, "eval": {}, "infer": {}}
    assert set(arguments) == set(case.expected)
    for mode, spec in specs_of(case, arguments).items():
        assert spec.mode == mode
        close_spec(head, spec, case.expected[mode], mask)


MASKS = ("default_mask_key", "mask_bool", "mask_float32", "multi_class_vocabulary", "rank4_regression")


@some(
    [
        case
        for case in loader.load("sequential")
        if case.required and "predict_spec_mask" in case.raw.get("expected", {})
    ],
    [f"sequential/{name}" for name in MASKS],
)
def test_spec_of_sequences(case: Case):
    """In prediction the mask stands among the predictions, under its key."""
    head, (batch, *_) = loader.build(case.raw), case.batches
    spec = jax.jit(lambda logits: head.create_estimator_spec(batch.features, "infer", logits))(batch.logits)
    golden = case.expected["predict_spec_mask"]
    assert golden["key"] == head.sequence_length_mask
    np.testing.assert_array_equal(spec.predictions[golden["key"]], loader.decode(golden["value"]))
    others = {key: array for key, array in spec.predictions.items() if key != head.sequence_length_mask}
    names = {*names_of(head, others), head.sequence_length_mask}
    assert names == set(case.expected["predict_spec_prediction_keys"])


SPEC_REFUSALS = {
    "train_neither": ("train_op_fn and optimizer cannot both be None", "optax"),
    "train_both": ("train_op_fn and optimizer cannot both be set",),
    "train_no_variables": ("trainable_variables cannot be None",),
    "train_optimizer_v1": ("optax", "NoTransformation"),
    "train_optimizer_string": ("optax", "'sgd'", "str"),
    "train_optimizer_keras_new": ("optax", "NoTransformation"),
    "train_op_fn_returns_none": ("Missing train_op",),
    "train_labels_none": ("provide labels", "None"),
    "eval_labels_none": ("provide labels", "None"),
    "multi_head_mode_unknown": ("mode=bogus unrecognized", "'train'"),
    "multi_head_train_neither": ("train_op_fn and optimizer cannot both be None",),
    "multi_head_mixed_reductions_train": ("loss_reduction must be the same", "Reduction.SUM,"),
    "multi_head_labels_none": ("provide labels", "None"),
    "sequential_predict_no_mask": ("'mask'", "features", "[]"),
}


@cases("test_spec_refusal")
def test_spec_refusal(case: Case):
    refused(lambda: spec_of(case, case.raw["mode"], **spec_arguments(case)), *SPEC_REFUSALS[case.id.rpartition("/")[2]])


@cases("test_spec_rule")
def test_spec_rule(case: Case):
    spec = spec_of(case, case.raw["mode"], **spec_arguments(case))
    assert spec.mode == case.raw["mode_of_the_result"]
    close_spec(loader.build(case.raw), spec, case.expected, None)


@cases("test_train_loop", [f"train_loop/{name}" for name in ("regression_sum_l2", "binary_vocab", "multi_class_w")])
def test_train_loop(case: Case):
    """Gradient descent through the spec, compiled: every loss, every parameter, and a counter among the updates."""
    raw, expected = case.raw, case.expected
    x, w, optimizer = loader.decode(raw["x"]), jnp.asarray(loader.decode(raw["w0"])), optax.sgd(raw["lr"])
    head, (batch,) = loader.build(raw), case.batches
    labels = head.encode_labels(as_lists(head, batch.labels))
    losses = None if raw["l2"] is None else [lambda v: raw["l2"] * jnp.sum(v**2)]

    @jax.jit
    def step(w, opt_state, runs):
        return head.create_estimator_spec(
            batch.features,
            "train",
            lambda v: x @ v,
            labels,
            optimizer,
            w,
            update_ops=lambda: runs + 1,
            regularization_losses=losses,
            opt_state=opt_state,
        )

    opt_state, runs = optimizer.init(w), jnp.int32(0)
    for loss, after in zip(expected["loss_before_step"], expected["w_after_step"], strict=True):
        spec = step(w, opt_state, runs)
        (w, opt_state, model_state, head_state), runs = spec.train_op, spec.update_ops
        close(spec.loss, loader.scalar(loss), "loss")
        close(w, loader.decode(after), "parameters")
        assert model_state is None
        assert head_state == {}
    assert runs == expected["update_ops_runs"]


CHECKS: dict[str, Callable[[Case], None]] = {}


def differs(*ids: str) -> Callable:
    """Registers the check of what is done instead of what TensorFlow does in these cases."""

    def register(function: Callable[[Case], None]) -> Callable[[Case], None]:
        CHECKS.update(dict.fromkeys(ids, function))
        return function

    return register


# What another head is checked for by the same function is slow, where it is more than a refusal.
ALIKE = ("binary_class/weights_negative", "poisson_regression/negative_labels_not_full", "multi_label/soft_labels")


@pytest.mark.parametrize(
    "case_id", [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in DIFFERS]
)
def test_differs_on_purpose(case_id: str):
    CHECKS[case_id](loader.by_id()[case_id])


def on_device(batch: Batch) -> Batch:
    return Batch(**jax.tree.map(jnp.asarray, batch.inputs))


def is_nan_under_jit(head, batch: Batch) -> None:
    """Loss and gradient of a bad row, where its values cannot be looked at."""
    loss, gradient = jax.jit(functools.partial(loss_and_gradient, head))(batch.inputs)
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
        device, there = on_device(batch), np.ones_like(negative)
        expected = head.measure(**device.inputs, where=~negative).compute()
        actual = computed_with_warning(head.measure(**device.inputs, where=there), negative.sum())
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


@differs("binary_class/soft_labels", "multi_label/soft_labels")
def _(case: Case):
    head = loader.build(case.raw)
    split = []
    for i, golden in enumerate(golden_metrics(case)):
        assert golden is not None
        labels = np.concatenate([batch.labels for batch in case.batches[: i + 1]])
        logits = np.concatenate([batch.logits for batch in case.batches[: i + 1]])
        counted = oracle.counting_metrics(labels, logits, np.ones_like(labels), head.thresholds)
        if case.family == "multi_label":
            # It has no metrics at z > 0: accuracy, precision and recall at 0.5 are left, and both areas.
            counted = {name: value for name, value in counted.items() if name in golden}
            assert len(counted) == 5
        assert all(abs(golden[name] - counted[name]) > 1e-3 for name in counted)
        split.append(counted)
    # Losses, gradients, predictions and means are TensorFlow's; what counts is split.
    check_numbers(head, case, numbers_of(head, case), but=split)


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


@differs("multi_class/error/n_classes_2")
def _(case: Case):
    head = loader.build(case.raw)
    logits = np.array([[0.0, 1.0], [2.0, -1.0]])
    expected = (np.log1p(np.exp(1.0)) + np.log1p(np.exp(-3.0))) / 2
    close(head.loss([0, 0], logits.astype(np.float32)), expected, "loss")
    refused(lambda: jh.MultiClassHead(1), "n_classes", "1")


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
    losses = zoo.cross_entropy if case.family == "binary_class" else zoo.softmax_cross_entropy
    expected = losses(batch.labels, batch.logits.astype(np.float64), None).mean()
    close(call(case), expected, "loss of ids")
    close(head.loss(named, batch.logits), expected, "loss of names")
    beyond = batch.labels + 7
    refused(lambda: head.loss(beyond, batch.logits), "labels", str(beyond[0, 0]))


@differs("multi_class/error/labels_int8")
def _(case: Case):
    head, (batch,) = loader.build(case.raw), case.batches
    assert batch.labels.dtype == np.int8
    for dtype in (np.int8, np.uint8, np.int16):
        loss = head.loss(batch.labels.astype(dtype), batch.logits)
        expected = zoo.softmax_cross_entropy(batch.labels.astype(np.int64), batch.logits.astype(np.float64), None)
        close(loss, expected.mean(), dtype.__name__)


@differs("binary_class/ties_quarter_three_quarters")
def _(case: Case):
    head, (batch,) = loader.build(case.raw), case.batches
    results = numbers_of(head, case)
    scores = np.asarray(results[0]["predictions"]["logistic"]).ravel()
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
    check_numbers(head, case, results, but=[decided])


@differs("poisson_regression/negative_labels_full", "poisson_regression/negative_labels_not_full")
def _(case: Case):
    head, (batch,) = loader.build(case.raw), case.batches
    negative = (batch.labels < 0).any(-1)
    assert negative.any()
    named = ("labels", str(batch.labels.min()), str(tuple(np.argwhere(batch.labels < 0)[0].tolist())))
    refused(lambda: head.loss(**batch.inputs), *named)
    refused(lambda: head.measure(**batch.inputs), *named)
    refused(lambda: head.loss(**on_device(batch).inputs, check=True), *named)
    is_nan_under_jit(head, batch)
    device, there = on_device(batch), np.ones_like(negative)
    expected = head.measure(**device.inputs, where=~negative).compute(undefined=0.0)
    actual = head.measure(**device.inputs, where=there)
    with pytest.warns(jh.BadInputWarning, match=rf"\b{negative.sum()}\b"):
        computed = actual.compute(undefined=0.0)
    for name, value in expected.items():
        close(computed[name], value, name)


@differs("multi_label/error/labels_bool_dense")
def _(case: Case):
    (batch,) = case.batches
    assert batch.labels.dtype == np.bool_
    close(call(case), zoo.cross_entropy(batch.labels * 1.0, batch.logits.astype(np.float64), None).mean(), "loss")


@differs("multi_label/error/weight_per_class")
def _(case: Case):
    (batch,) = case.batches
    weights = batch.inputs["features"]["w"].astype(np.float64)
    entries = zoo.cross_entropy(batch.labels * 1.0, batch.logits.astype(np.float64), None)
    assert weights.shape == entries.shape
    close(call(case), (weights * entries).mean(), "loss")


@differs("multi_label/error/sparse_string_no_vocabulary")
def _(case: Case):
    refused(lambda: call(case), "labels", "label_vocabulary", "'a'")
    head, (batch,) = loader.build(case.raw), case.batches
    refused(lambda: head.loss(batch.labels.rows, batch.logits), "labels", "label_vocabulary", "'a'")


@differs("multi_label/error/sparse_out_of_vocabulary")
def _(case: Case):
    refused(lambda: call(case), "labels", "'zzz'", "index (1,)", "'zuko'")
    head, (batch,) = loader.build(case.raw), case.batches
    refused(lambda: head.loss(batch.labels.rows, batch.logits), "labels", "'zzz'", "index (1,)", "'zuko'")


@differs("multi_label/error/dense_string_with_vocabulary")
def _(case: Case):
    # A row of three names in an array is no multi-hot row, and may not be meant as a list of names either.
    refused(lambda: call(case), "labels", "str", "'aang'", "list")
    head, (batch,) = loader.build(case.raw), case.batches
    refused(lambda: head.measure(**batch.inputs), "labels", "str", "'aang'", "list")
    # Each row lists all names.
    expected = np.logaddexp(0, -batch.logits.astype(np.float64)).mean()
    close(head.loss(batch.labels.tolist(), batch.logits), expected, "loss of lists of names")


@differs("multi_head/duplicate_names")
def _(case: Case):
    refused(lambda: loader.build(case.raw), "names", "['b']")
    # TensorFlow's second head overwrites the logits of the first: two heads with the second column give its numbers.
    twice = jh.BinaryClassHead(name="b", bins=jh.ThresholdGrid(200))
    head = jh.MultiHead([twice, dataclasses.replace(twice, name="b2")])
    batch, golden = case.batches[0], case.expected
    labels = dict.fromkeys(("b", "b2"), batch.labels["b"])
    logits = dict.fromkeys(("b", "b2"), batch.logits[:, 1:])

    @jax.jit
    def run():
        return head.loss(labels, logits), head.loss(labels, batch.logits), head.predictions(logits)["b2"]["logits"]

    alike, apart, second = run()
    close(alike, loader.scalar(golden["train_loss"][0]), "loss")
    close(second, loader.decode(golden["predictions"][0]["b::logits"]), "logits")
    each = np.asarray(batch.logits, np.float64)
    own = (np.logaddexp(0, each) - batch.labels["b"] * each).mean(0).sum()
    close(apart, own, "loss, each with its column")


@differs("multi_head/error/labels_none")
def _(case: Case):
    refused(lambda: call(case), "labels", "dict", "none")


@differs("multi_head/error/loss_reduction_auto_vs_sobs")
def _(case: Case):
    assert call(case) is jh.Reduction.SUM_OVER_BATCH_SIZE


@differs("sequential/logits_rank2")
def _(case: Case):
    head, batch = loader.build(case.raw), case.batches[0]
    shape = str(batch.logits.shape)
    for refuse in (
        lambda: head.loss(**batch.inputs),
        lambda: head.measure(**batch.inputs),
        lambda: head.loss(**on_device(batch).inputs),
    ):
        refused(refuse, "logits", shape, "[B, T, ")
    loss = head.loss(**(batch.inputs | {"logits": batch.logits[..., None]}))
    close(loss, loader.scalar(case.expected["train_loss"][0]), "loss with a last axis")


@differs("sequential/error/multi_head_inside")
def _(case: Case):
    head = call(case)
    (name,) = (inner.name for inner in head.static_head.heads)
    mask = np.asarray([[True, True, False], [True, False, False]])
    labels, logits = np.asarray([[1, 0, 9], [1, 9, 9]]), np.asarray([[[0.5], [2.0], [0.0]], [[-1.0], [3.0], [7.0]]])
    features = {"sequence_length_mask": mask}
    loss = head.loss({name: labels}, {name: logits}, features)
    # Labels (1, 0, 1), logits (1/2, 2, -1).
    close(loss, np.mean(np.logaddexp(0, [-0.5, 2.0, 1.0])), "loss")


@differs("sequential/error/sparse_too_few")
def _(case: Case):
    head, (batch,) = loader.build(case.raw), case.batches
    refused(lambda: head.loss(**batch.inputs), "labels", "sparse")
    # The step (0, 1) is there and has no label: garbage there is refused, in the masked step (1, 1) it is not.
    dense = batch.labels.dense()
    assert dense[0, 1] == dense[1, 1] == GARBAGE["i"]
    refused(lambda: head.loss(dense, batch.logits, batch.features), "labels", "99", "(0, 1")
    dense[0, 1] = 1
    # Labels (1, 1, 0) and logits (1, 2, 3) of the three steps.
    close(head.loss(dense, batch.logits, batch.features), np.mean(np.logaddexp(0, [-1.0, -2.0, 3.0])), "loss")


@differs("sequential/error/mask_wrong_shape")
def _(case: Case):
    refused(lambda: call(case), "two dimensions", "features['mask']", "(2, 3)", "(2, 2)")


@differs("sequential/error/labels_none")
def _(case: Case):
    refused(lambda: call(case), "provide labels", "none")


@differs("sequential/error/regression_predictions")
def _(case: Case):
    (batch,) = case.batches
    close(call(case)["predictions"], batch.logits, "predictions")


@differs("estimator_spec/rule/train_variables_dict")
def _(case: Case):
    # Labels (1, 0), logits v (z1, z2): d loss / d v is the mean of (p - y) z.
    (batch,), z = case.batches, case.batches[0].logits.astype(np.float64)
    spec = spec_of(case, "train", **spec_arguments(case))
    gradient = ((1 / (1 + np.exp(-z)) - batch.labels) * z).mean()
    close(spec.train_op.params["w"], np.float32(1 - 0.1 * gradient), "the variable in the dict")


@differs("estimator_spec/rule/train_update_ops_not_list")
def _(case: Case):
    assert spec_of(case, "train", **spec_arguments(case)).update_ops == {"mean": 3}


@differs("estimator_spec/rule/mode_unknown_simple_head")
def _(case: Case):
    refused(lambda: spec_of(case, "bogus", **spec_arguments(case)), "mode=bogus unrecognized", "'train'", "'infer'")


@differs("keras_metrics/threshold_soft")
def _(case: Case):
    threshold = case.raw["threshold"]
    names = {name: f"{name}/positive_threshold_{threshold:g}" for name in case.expected}
    cast = keras_metrics(case, cast=True).compute()
    for name in ("precision", "recall"):
        close(cast[names[name]], loader.scalar(case.expected[name]), name)
    # Labels (.3, 0, .9, 1), decisions (0, 1, 1, 1): Keras finds one label equal to its decision,
    # here (0.7 + 0 + 0.9 + 1) / 4 is right.
    assert case.expected["accuracy"] == 0.25
    soft = keras_metrics(case, cast=False).compute()
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
    assert set(DIFFERS) == loader.excused_ids() | set(SINCE)
    assert set(CHECKS) == set(DIFFERS)
    assert all(loader.by_id()[name].required for name in REQUIRED_ANYWAY)


def multi_head_cases() -> list[Case]:
    return [case for case in loader.load("multi_head") if case.kind == "case" and case.required]


@pytest.mark.parametrize("case", multi_head_cases(), ids=lambda case: case.id)
def test_oracle_of_pooled_losses(case: Case):
    """The formula for `loss/NAME` gives TensorFlow's number where the batches are averaged as TensorFlow does."""
    for key, (_, mean) in pooled(case).items():
        close(mean, loader.scalar(case.expected["metrics"][key]), key, rtol=5e-5, atol=5e-6)


def test_pooled_losses_differ():
    """The two are not the same number, or nothing would be excused."""
    apart = [abs(both[0] - both[1]) > 1e-3 for case in multi_head_cases() for both in pooled(case).values()]
    assert sum(apart) > len(apart) / 2


@pytest.mark.parametrize(
    "case", [case for case in loader.all_cases() if '"sparse": ' in json.dumps(case.raw)], ids=lambda case: case.id
)
def test_sparse_tensors_are_refused(case: Case):
    """The container itself, wherever the file has one: its numbers come from lists or arrays."""
    head, batch = loader.build(case.raw), case.batches[0]
    weights = any(isinstance(column, SparseTensor) for column in (batch.features or {}).values())
    refused(lambda: head.loss(**batch.inputs), "features['w']" if weights else "labels", "sparse")


def test_behaviours_are_exercised():
    """Every behaviour of the original's own tests that has a counterpart, by a case that runs here."""
    table = {behaviour.id: behaviour for behaviour in behaviours.table()}
    assert len(table) == 108
    assert {name for name, behaviour in table.items() if not behaviour.patterns} == set(behaviours.WITHOUT_COUNTERPART)
    exercised = {behaviour.id for behaviour in behaviours.exercised(loader.by_id())}
    assert exercised == {behaviour.id for behaviour in behaviours.applicable()}


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
        for (case,) in (param.values for param in mark.args[1])
    }
    required = {case.id for case in everything if case.required}
    assert parametrized == required
    assert required | set(DIFFERS) == {case.id for case in everything}
    assert not required & set(DIFFERS)
    print(loader.golden_summary())


def test_every_named_function_is_there():
    assert set(LOSS_FNS) == set(loader.read("index")["loss_fns"])
