"""scikit-learn's own metric tests as a peer: what its tests compute, jaxheads computes again.

    python tests/benchmarks/sklearn_suite.py

The test files are read from the installed scikit-learn and run as they are. Each call of a metric is recorded, with its
arguments and its value. If the catalogue of jaxheads has the metric with these options, a head computes it again.
`KNOWN` is the one place that says why an answer may differ, and what it must be instead.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib
import inspect
import os
import pathlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import joblib
import numpy as np
import pytest
import sklearn.metrics
from scipy import sparse
from sklearn.utils.multiclass import type_of_target

import jaxheads as jh

M = jh.metrics
PACKAGE = "sklearn.metrics.tests"
FILES = ("test_ranking", "test_classification", "test_regression")
HOMES = ("sklearn.metrics._ranking", "sklearn.metrics._classification", "sklearn.metrics._regression")

# Two float32 values of one number.
RTOL, ATOL = 2e-6, 2e-7


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of one of scikit-learn's metrics.

    Attributes:
        name: that of the function.
        given: all arguments, with arrays and lists as NumPy arrays, and defaults filled in.
        value: what it returned.
        function: the function.
    """

    name: str
    given: Mapping[str, Any]
    value: Any
    function: Callable[..., Any]

    @property
    def options(self) -> str:
        """The arguments that are no data and differ from their defaults, as text."""
        shown = []
        for key, parameter in inspect.signature(self.function).parameters.items():
            value = self.given[key]
            if key == "sample_weight" and value is not None:
                shown.append(key)
            elif key not in DATA and not _is_same(value, parameter.default):
                shown.append(f"{key}={_show(value)}")
        return ", ".join(shown)


DATA = ("y_true", "y_pred", "y_score", "y_proba", "y_prob", "y1", "y2", "sample_weight", "y_true_type", "warn_for")


def _is_same(a: Any, b: Any) -> bool:
    return a is b or repr(a) == repr(b)


def _show(value: Any) -> str:
    return repr(value.tolist()) if isinstance(value, np.ndarray) else repr(value)


@dataclasses.dataclass(frozen=True)
class Recording:
    """The calls of scikit-learn's tests, each once, and how its tests ended."""

    calls: tuple[Call, ...]
    made: int
    ended: Mapping[str, int]


class _Recorder:
    """A pytest plugin: the tests of scikit-learn get functions that record, and nothing else changes for them."""

    def __init__(self) -> None:
        self.originals = {
            name: function
            for name in sklearn.metrics.__all__
            if inspect.isfunction(function := getattr(sklearn.metrics, name)) and function.__module__ in HOMES
        }
        self.calls: dict[Any, Call] = {}
        self.made = 0
        self.ended: collections.Counter[str] = collections.Counter()
        self.running = False

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            # Only what the test itself calls, and not what scikit-learn calls in turn.
            if not self.running:
                return function(*args, **kwargs)
            try:
                given = _fill_in(signature, args, kwargs)
            except TypeError:
                return function(*args, **kwargs)  # which refuses it
            self.running = False
            try:
                value = function(*args, **kwargs)
            finally:
                self.running = True
            self.made += 1
            self.calls.setdefault((name, _make_key(given)), Call(name, given, value, function))
            return value

        return recorded

    # The wrappers are in the package while the test modules are imported, and at no other time.

    def pytest_sessionstart(self) -> None:
        for file in FILES:
            importlib.import_module(f"{PACKAGE}.{file}")  # what the tests import keeps the functions as they are
        self.forget()
        for name, function in self.originals.items():
            setattr(sklearn.metrics, name, self.wrap(name, function))

    def pytest_collection_finish(self) -> None:
        self.restore()
        self.running = True

    def restore(self) -> None:
        """scikit-learn has its own functions again."""
        self.running = False
        for name, function in self.originals.items():
            setattr(sklearn.metrics, name, function)

    def forget(self) -> None:
        """The next import of a test module reads its file."""
        for file in FILES:
            sys.modules.pop(f"{PACKAGE}.{file}", None)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.ended[report.outcome] += 1


def _fill_in(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return {key: _to_numpy(value) for key, value in bound.arguments.items()}


def _make_key(value: Any) -> Any:
    """What is the same for two calls of the same."""
    if isinstance(value, dict):
        return tuple((key, _make_key(x)) for key, x in value.items())
    if isinstance(value, np.ndarray):
        content = repr(value.tolist()) if value.dtype.hasobject else value.tobytes()
        return value.dtype.str, value.shape, content
    return repr(value)


def _to_numpy(value: Any) -> Any:
    """A copy: tests may change their arrays later."""
    if sparse.issparse(value):
        return np.asarray(value.toarray())
    if isinstance(value, (list, tuple)) or hasattr(value, "__array__"):
        try:
            return np.array(value)
        except ValueError:
            return value
    return value


def find_files() -> list[pathlib.Path]:
    """scikit-learn's test files; none if the installed package comes without them."""
    try:
        folder = pathlib.Path(importlib.import_module(PACKAGE).__file__ or "").parent
    except ModuleNotFoundError:
        return []
    found = [folder / f"{file}.py" for file in FILES]
    return found if all(path.exists() for path in found) else []


@functools.cache
def record() -> Recording:
    """Runs scikit-learn's tests in this process, and keeps the calls of its metrics."""
    recorder = _Recorder()
    with tempfile.TemporaryDirectory() as folder, _set_aside("PYTEST_ADDOPTS"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = pathlib.Path(folder) / "pytest.ini"
        settings.write_text("[pytest]\n")
        options = ["-c", str(settings), "--rootdir", folder, "-W", "ignore"]
        options += [f"-pno:{name}" for name in ("cacheprovider", "terminal", "xdist", "faulthandler", "randomly")]
        try:
            with joblib.parallel_backend("sequential"):  # no other processes, which would take longest
                pytest.main([*options, *map(str, find_files())], plugins=[recorder])
        finally:
            recorder.restore()
            recorder.forget()
    return Recording(tuple(recorder.calls.values()), recorder.made, dict(recorder.ended))


@contextlib.contextmanager
def _set_aside(name: str) -> Iterator[None]:
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


# What a head is asked: the kind of head, how many classes or targets, and what no other question may share with it.
HeadKey = tuple[str, int, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """One metric of a question.

    Attributes:
        metric: what the head is given.
        keys: where its values are read; of several, one for each class or target.
        expected: scikit-learn's value.
        complement: whether that is 1 less the metric, as a loss is of an accuracy.
    """

    metric: Any
    keys: tuple[str, ...]
    expected: Any
    complement: bool = False

    def read(self, values: Mapping[str, Any], end: str = "") -> np.ndarray:
        """The values of the metric, or its bounds."""
        found = np.asarray([values.get(key + end, values[key]) for key in self.keys], np.float64)
        found = 1 - found if self.complement else found
        return found.reshape(np.shape(self.expected)) if found.size == np.size(self.expected) else found


@dataclasses.dataclass(frozen=True)
class Question:
    """A call, put to a head: labels `[N, d]`, logits `[N, d]`, weights and mask `[N, 1]`."""

    head: HeadKey
    parts: tuple[Part, ...]
    labels: np.ndarray
    logits: np.ndarray
    weights: np.ndarray
    where: np.ndarray
    undefined: float = np.nan


class NotInCatalogueError(Exception):
    """The catalogue has no such metric, or not with this option."""


class RefusedError(Exception):
    """The question is refused by jaxheads, in words."""


def _make(metric: Callable[..., Any], **arguments: Any) -> Any:
    try:
        return metric(**arguments)
    except ValueError as error:
        raise RefusedError(str(error)) from error


def _part(cls: Any, average: Any, n: int, expected: Any, complement: bool = False, **arguments: Any) -> Part:
    """A metric of scores or decisions under a key of its own."""
    key = "-".join(map(str, (cls.__name__, average, *arguments.values())))
    metric = _make(cls, average=average, name=key, **arguments)
    keys = (key,) if average is not None else tuple(f"{key}/class{i}" for i in range(n))
    return Part(metric, keys, expected, complement)


def _ask(
    head: HeadKey,
    parts: Sequence[Part],
    labels: Any,
    logits: Any,
    call: Call,
    undefined: Any = np.nan,
    where: Any = None,
) -> Question:
    labels, logits = (np.asarray(x)[:, None] if np.ndim(x) == 1 else np.asarray(x) for x in (labels, logits))
    weights = call.given.get("sample_weight")
    weights = np.ones(len(logits)) if weights is None else np.asarray(weights, np.float64)
    where = np.ones(len(logits), bool) if where is None else where
    return Question(head, tuple(parts), labels, logits, weights[:, None], where[:, None], float(undefined))


def _is_multilabel(*arrays: Any) -> bool:
    return any(type_of_target(x) == "multilabel-indicator" for x in arrays)


def _flat(x: Any) -> np.ndarray:
    return np.asarray(x).ravel()


def _list_classes(call: Call, *arrays: np.ndarray) -> np.ndarray:
    """The classes in their order: those of `labels=`, else all that occur."""
    labels = call.given.get("labels")
    return np.unique(np.concatenate([*arrays])) if labels is None else np.asarray(labels)


def _encode(labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The place of each label among the classes; -1 for one that is not among them."""
    place = {value: i for i, value in enumerate(classes.tolist())}
    return np.asarray([place.get(value, -1) for value in labels.tolist()], np.int32).reshape(-1)


def _one_hot(ids: np.ndarray, n: int) -> np.ndarray:
    return ids[:, None] == np.arange(n)


def _signs(decided: np.ndarray) -> np.ndarray:
    return np.where(decided, 1.0, -1.0)


def _to_log_odds(scores: np.ndarray) -> np.ndarray:
    """Scores that look like probabilities become their log odds; others are logits as they are."""
    scores = np.asarray(scores, np.float64)
    with np.errstate(divide="ignore"):
        looks = scores.size and scores.min() >= 0 and scores.max() <= 1
        return np.log(scores) - np.log1p(-scores) if looks else scores


def _to_log(probabilities: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(probabilities, np.float64))


def _refuse_samples(call: Call) -> None:
    if call.given.get("average") == "samples":
        raise NotInCatalogueError('average="samples" of scores, or of one label a row')


def _refuse_counts(call: Call) -> None:
    if not call.given["normalize"]:
        raise NotInCatalogueError("normalize=False, a sum and not a mean")


def _entries(
    call: Call, make: Callable[[Any, int], list[Part]], truth: Any, scores: Any, average: Any, undefined: Any
) -> Question:
    """Entries of k columns, each a yes or no of its own; one column is a head of two classes."""
    k = truth.shape[1]
    if k == 1:
        parts = make("micro", 1)
        return _ask(("binary", 1, None), parts, truth, scores, call, undefined)
    return _ask(("labels", k, None), make(average, k), truth, scores, call, undefined)


def _ask_decisions(call: Call, make: Callable[[Any, int], list[Part]]) -> Question:
    """Precision and its kin, of two classes, of many, or of many labels, and of those in `labels=`."""
    given, average = call.given, call.given["average"]
    undefined = 0.0 if given["zero_division"] == "warn" else given["zero_division"]
    truth, predicted = given["y_true"], given["y_pred"]
    if _is_multilabel(truth, predicted):
        columns = np.arange(truth.shape[1]) if given["labels"] is None else np.asarray(given["labels"])
        if average == "samples" and len(columns) < 2:
            raise NotInCatalogueError('average="samples" of one label a row')
        return _entries(call, make, truth[:, columns] != 0, _signs(predicted[:, columns] != 0), average, undefined)
    _refuse_samples(call)
    truth, predicted = _flat(truth), _flat(predicted)
    if average == "binary":
        yes, decided = ((x == given["pos_label"])[:, None] for x in (truth, predicted))
        return _entries(call, make, yes, _signs(decided), "micro", undefined)
    classes = _list_classes(call, truth, predicted)
    n = len(classes)
    truth, predicted = (_encode(x, classes) for x in (truth, predicted))
    if n < 3 or (truth < 0).any() or (predicted < 0).any():
        return _entries(call, make, _one_hot(truth, n), _signs(_one_hot(predicted, n)), average, undefined)
    return _ask(("classes", n, None), make(average, n), truth, _signs(_one_hot(predicted, n)), call, undefined)


def _decision(cls: Any) -> Callable[[Call], Question]:
    def ask(call: Call) -> Question:
        arguments = {"beta": call.given["beta"]} if "beta" in call.given else {}
        return _ask_decisions(call, lambda average, n: [_part(cls, average, n, call.value, **arguments)])

    return ask


def _ask_prfs(call: Call) -> Question:
    precision, recall, f, support = call.value

    def make(average: Any, n: int) -> list[Part]:
        parts = [_part(M.Precision, average, n, precision), _part(M.Recall, average, n, recall)]
        parts.append(_part(M.FBeta, average, n, f, beta=call.given["beta"]))
        return parts if support is None else [*parts, _part(M.Support, average, n, support)]

    return _ask_decisions(call, make)


def _ask_plain(
    call: Call, part: Callable[[], Part], undefined: Any = np.nan, names: Any = ("y_true", "y_pred")
) -> Question:
    """One number of labels and predictions, of two classes or of many."""
    truth, predicted = (_flat(call.given[name]) for name in names)
    classes = _list_classes(call, truth, predicted)
    truth, predicted = (_encode(x, classes) for x in (truth, predicted))
    where = (truth >= 0) & (predicted >= 0)
    n = len(classes)
    if n < 3:
        return _ask(("binary", 1, None), [part()], truth == 1, _signs(predicted == 1), call, undefined, where)
    truth = np.where(where, truth, 0)
    return _ask(("classes", n, None), [part()], truth, _signs(_one_hot(predicted, n)), call, undefined, where)


def _ask_hamming(call: Call) -> Question:
    truth, predicted = call.given["y_true"], call.given["y_pred"]
    part = functools.partial(_part, M.HammingLoss, "micro", 1, call.value)
    if not _is_multilabel(truth, predicted):
        return _ask_plain(call, part)
    return _ask(("labels", truth.shape[1], None), [part()], truth != 0, _signs(predicted != 0), call)


def _ask_accuracy(call: Call, complement: bool = False) -> Question:
    if "normalize" in call.given:
        _refuse_counts(call)
    truth, predicted = call.given["y_true"], call.given["y_pred"]
    part = functools.partial(_part, M.Accuracy, "micro", 1, call.value, complement)
    if not _is_multilabel(truth, predicted):
        return _ask_plain(call, part)
    match = Part(M.ExactMatch(), ("exact_match",), call.value, complement)
    head = ("labels", truth.shape[1], None)
    return _ask(head, [match], truth != 0, _signs(predicted != 0), call)


def _ask_balanced(call: Call) -> Question:
    if call.given["adjusted"]:
        raise NotInCatalogueError("adjusted=True, the gain over chance")
    return _ask_plain(call, lambda: _part(M.BalancedAccuracy, "micro", 1, call.value))


def _ask_mcc(call: Call) -> Question:
    return _ask_plain(call, lambda: _part(M.MatthewsCorrcoef, "micro", 1, call.value), 0.0)


def _ask_kappa(call: Call) -> Question:
    part = functools.partial(_part, M.CohenKappa, "micro", 1, call.value, weights=call.given["weights"])
    return _ask_plain(call, part, call.given["replace_undefined_by"], ("y1", "y2"))


def _ask_confusion(call: Call) -> Question:
    truth, predicted = (_flat(call.given[name]) for name in ("y_true", "y_pred"))
    classes = _list_classes(call, truth, predicted)
    n, normalize = len(classes), call.given["normalize"]
    truth, predicted = (_encode(x, classes) for x in (truth, predicted))
    where = (truth >= 0) & (predicted >= 0)
    if n == 2:
        part = Part(_make(M.ConfusionMatrix, normalize=normalize), ("confusion_matrix",), call.value)
        key = ("binary", 1, f"normalize={normalize}")
        return _ask(key, [part], truth == 1, _signs(predicted == 1), call, 0.0, where)
    # A head of many classes has three at least: those that are missing stay empty.
    wide = max(n, 3)
    part = Part(_make(M.ConfusionMatrix, normalize=normalize), ("confusion_matrix",), _pad_matrix(call.value))
    logits = _signs(_one_hot(predicted, wide))
    return _ask(
        ("classes", wide, f"normalize={normalize}"), [part], np.where(where, truth, 0), logits, call, 0.0, where
    )


def _ask_roc(call: Call) -> Question:
    _refuse_samples(call)
    given, average = call.given, call.given["average"]
    limit: dict[str, Any] = {} if given["max_fpr"] is None else {"max_fpr": float(given["max_fpr"])}
    truth, scores = given["y_true"], np.asarray(given["y_score"])
    if type_of_target(truth) == "multilabel-indicator":
        make = lambda average, n: [_part(M.RocAuc, average, n, call.value, **limit)]  # noqa: E731
        return _entries(call, make, truth != 0, _to_log_odds(scores), average, np.nan)
    truth = _flat(truth)
    if scores.ndim == 2 and scores.shape[1] > 2:
        if given["multi_class"] == "ovo":
            raise NotInCatalogueError('multi_class="ovo", a mean over pairs of classes')
        classes = _list_classes(call, truth)
        part = _part(M.OneVsRestAuc, average, len(classes), call.value)
        return _ask(("classes", len(classes), None), [part], _encode(truth, classes), _to_log(scores), call)
    positive = truth == np.unique(truth)[-1] if len(np.unique(truth)) > 1 else truth == 1
    part = _part(M.RocAuc, "micro", 1, call.value, **limit)
    return _ask(("binary", 1, None), [part], positive, _to_log_odds(_flat(scores)), call)


def _ask_average_precision(call: Call) -> Question:
    _refuse_samples(call)
    given, average = call.given, call.given["average"]
    truth, scores = given["y_true"], np.asarray(given["y_score"])
    make = lambda average, n: [_part(M.AveragePrecision, average, n, call.value)]  # noqa: E731
    kind = type_of_target(truth)
    if kind == "multilabel-indicator":
        return _entries(call, make, truth != 0, _to_log_odds(scores), average, 0.0)
    truth = _flat(truth)
    if kind == "multiclass":
        classes = np.unique(truth)
        ids, n = _encode(truth, classes), len(classes)
        if scores.min() >= 0 and np.allclose(scores.sum(1), 1):
            return _ask(("classes", n, None), make(average, n), ids, _to_log(scores), call, 0.0)
        return _entries(call, make, _one_hot(ids, n), _to_log_odds(scores), average, 0.0)
    positive = (truth == given["pos_label"])[:, None]
    return _entries(call, make, positive, _to_log_odds(_flat(scores))[:, None], "micro", 0.0)


def _ask_top_k(call: Call) -> Question:
    _refuse_counts(call)
    given, k = call.given, call.given["k"]
    truth, scores = _flat(given["y_true"]), np.asarray(given["y_score"])
    classes = np.sort(_list_classes(call, truth))
    if len(classes) < 3:
        if k > 1:
            raise NotInCatalogueError("k above 1 of two classes: always 1")
        part = _part(M.Accuracy, "micro", 1, call.value)
        return _ask(("binary", 1, None), [part], truth == classes[-1], _to_log_odds(_flat(scores)), call)
    part = Part(_make(M.TopKAccuracy, k=k), (f"top_{k}_accuracy",), call.value)
    return _ask(("classes", len(classes), None), [part], _encode(truth, classes), scores, call)


def _ask_probabilities(call: Call, cls: Any) -> Question:
    given = call.given
    truth, scores = given["y_true"], _find_probabilities(call)
    # One-hot rows are the places of their ones.
    truth = truth.argmax(1) if truth.ndim == 2 and truth.shape[1] > 1 else _flat(truth)
    classes = np.sort(_list_classes(call, truth))
    part = _part(cls, "micro", 1, call.value)
    if scores.ndim == 2 and scores.shape[1] > 2:
        return _ask(("classes", len(classes), None), [part], _encode(truth, classes), _to_log(scores), call)
    positive = given.get("pos_label")
    positive = (classes[-1] if len(classes) > 1 else 1) if positive is None else positive
    scores = (
        _to_log(scores[:, 1]) - _to_log(scores[:, 0])
        if scores.ndim == 2 and scores.shape[1] == 2
        else _to_log_odds(_flat(scores))
    )
    return _ask(("binary", 1, None), [part], truth == positive, scores, call)


def _find_probabilities(call: Call) -> np.ndarray:
    """The argument has had two names; the one that is not in use holds a word or nothing."""
    given = (call.given.get(name) for name in ("y_proba", "y_prob", "y_pred"))
    return next(np.asarray(x, np.float64) for x in given if x is not None and not isinstance(x, str))


def _ask_log_loss(call: Call) -> Question:
    _refuse_counts(call)
    return _ask_probabilities(call, M.LogLoss)


def _ask_brier(call: Call) -> Question:
    halved, scores = call.given["scale_by_half"], _find_probabilities(call)
    wide = scores.ndim == 2 and scores.shape[1] > 2
    if halved != "auto" and bool(halved) == wide:
        raise NotInCatalogueError("scale_by_half, another factor than the usual one")
    return _ask_probabilities(call, M.BrierScore)


def _regression(cls: Any) -> Callable[[Call], Question]:
    def ask(call: Call) -> Question:
        outputs = call.given["multioutput"]
        if not isinstance(outputs, str) or outputs == "variance_weighted":
            raise NotInCatalogueError("multioutput with weights of targets")
        labels, logits = (np.asarray(call.given[name], np.float64) for name in ("y_true", "y_pred"))
        d = labels.shape[1] if labels.ndim == 2 else 1
        metric = _make(cls, multioutput=outputs)
        keys = (metric.key,) if outputs == "uniform_average" else tuple(f"{metric.key}/target{i}" for i in range(d))
        return _ask(
            ("regression", d, None), [Part(metric, keys, call.value)], labels, logits, call, _set_undefined(call)
        )

    return ask


def _set_undefined(call: Call) -> float:
    """What scikit-learn says of labels that are all equal and predicted wrong; of one row it says nothing."""
    lone = call.name == "r2_score" and len(call.given["y_true"]) < 2
    return 0.0 if call.given.get("force_finite") and not lone else np.nan


# How each function of scikit-learn is put to a head. What is not here, the catalogue does not have.
ASKED: dict[str, Callable[[Call], Question]] = {
    "precision_score": _decision(M.Precision),
    "recall_score": _decision(M.Recall),
    "f1_score": _decision(M.FBeta),
    "fbeta_score": _decision(M.FBeta),
    "jaccard_score": _decision(M.IoU),
    "precision_recall_fscore_support": _ask_prfs,
    "accuracy_score": _ask_accuracy,
    "zero_one_loss": lambda call: _ask_accuracy(call, complement=True),
    "hamming_loss": _ask_hamming,
    "balanced_accuracy_score": _ask_balanced,
    "matthews_corrcoef": _ask_mcc,
    "cohen_kappa_score": _ask_kappa,
    "confusion_matrix": _ask_confusion,
    "roc_auc_score": _ask_roc,
    "average_precision_score": _ask_average_precision,
    "top_k_accuracy_score": _ask_top_k,
    "log_loss": _ask_log_loss,
    "brier_score_loss": _ask_brier,
    "mean_squared_error": _regression(M.MeanSquaredError),
    "root_mean_squared_error": _regression(M.RootMeanSquaredError),
    "mean_absolute_error": _regression(M.MeanAbsoluteError),
    "mean_squared_log_error": _regression(M.MeanSquaredLogError),
    "root_mean_squared_log_error": _regression(M.RootMeanSquaredLogError),
    "mean_absolute_percentage_error": _regression(M.MeanAbsolutePercentageError),
    "r2_score": _regression(M.R2Score),
    "explained_variance_score": _regression(M.ExplainedVariance),
}

AGREES, WITHIN, DISAGREES, REFUSED, ABSENT = "agree", "within the interval", "disagree", "refused", "not applicable"
# What gives a curve, and not a number.
POINTS = ("roc_curve", "det_curve", "precision_recall_curve", "confusion_matrix_at_thresholds", "metric_at_thresholds")
CURVES = "the points of a curve: `Metrics.curve` has them at the edges of the bins"
OUTCOMES = (AGREES, WITHIN, DISAGREES, REFUSED, ABSENT)


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why jaxheads gives another value than scikit-learn, or none.

    Attributes:
        functions: of scikit-learn.
        options: which calls of them, in words.
        holds: whether a call is one of those.
        ours: what jaxheads must give there, by another way; None where it refuses.
        why: one sentence.
    """

    functions: tuple[str, ...]
    options: str
    holds: Callable[[Call], bool]
    ours: Callable[[Call], Any] | None
    why: str

    def explains(self, call: Call, value: Any) -> bool:
        """Whether this is the reason for a value, or for a refusal (None)."""
        if call.name not in self.functions or not self.holds(call):
            return False
        return value is None if self.ours is None else value is not None and _is_close(value, self.ours(call))


def _call_again(call: Call, **changed: Any) -> Any:
    given = {**call.given, **changed}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return call.function(**given)


def _replace_probabilities(call: Call, change: Callable[[np.ndarray], np.ndarray]) -> Any:
    name = next(x for x in ("y_proba", "y_prob", "y_pred") if isinstance(call.given.get(x), np.ndarray))
    return _call_again(call, **{name: change(np.asarray(call.given[name], np.float64))})


def _has_ties(call: Call) -> bool:
    return any(len(np.unique(row)) < len(row) for row in np.atleast_2d(call.given["y_score"]))


def _count_hits(call: Call) -> float:
    """Top-k accuracy where of equal scores the first class is ahead."""
    order = np.argsort(-np.asarray(call.given["y_score"], np.float64), axis=1, kind="stable")
    ids = _encode(_flat(call.given["y_true"]), np.sort(_list_classes(call, _flat(call.given["y_true"]))))
    return float(np.average((order[:, : call.given["k"]] == ids[:, None]).any(1), weights=call.given["sample_weight"]))


def _overflows(call: Call) -> bool:
    weights = np.asarray(call.given["sample_weight"])
    return weights.dtype.kind in "iu" and float(weights.astype(float).sum()) > np.iinfo(np.int64).max


def _is_certain(call: Call) -> bool:
    scores = _find_probabilities(call)
    return bool(((scores == 0) | (scores == 1)).any())


def _does_not_sum_to_one(call: Call) -> bool:
    scores = _find_probabilities(call)
    return scores.ndim == 2 and scores.shape[1] > 1 and not np.allclose(scores.sum(1), 1, atol=1e-6)


def _has_constant_labels(call: Call) -> bool:
    labels = np.asarray(call.given["y_true"], np.float64)
    return bool((labels.reshape(len(labels), -1).std(0) == 0).any())


def _leave_out_constant_labels(call: Call) -> Any:
    """Each target by scikit-learn, but `undefined` where labels are all equal; a mean is of those with a value."""
    each = np.atleast_1d(_call_again(call, multioutput="raw_values", force_finite=False))
    undefined = _set_undefined(call)
    each = np.where(np.isfinite(each), each, undefined)
    if call.given["multioutput"] == "raw_values":
        return each
    return np.nan if np.isnan(each).all() else float(np.nanmean(each))


VARIANCES = ("r2_score", "explained_variance_score")

# Every difference from scikit-learn, and what the value must be instead.
KNOWN = (
    Reason(
        ("top_k_accuracy_score",),
        "equal scores",
        _has_ties,
        _count_hits,
        "Of equal scores the first class is ahead, as in `argmax` and `jax.lax.top_k`; in scikit-learn the last.",
    ),
    Reason(
        ("top_k_accuracy_score",),
        "k above the number of classes",
        lambda call: call.given["k"] > np.shape(call.given["y_score"])[-1],
        None,
        "Such a k is a mistake, and is refused; scikit-learn warns and gives 1.",
    ),
    Reason(
        ("fbeta_score",),
        "beta=0 or beta=inf",
        lambda call: call.given["beta"] in (0, np.inf),
        None,
        "These are precision and recall, which have metrics of their own.",
    ),
    Reason(
        ("confusion_matrix",),
        "integer weights whose sum is above 2^63",
        lambda call: call.given["sample_weight"] is not None and _overflows(call),
        lambda call: _pad_matrix(_call_again(call, sample_weight=np.asarray(call.given["sample_weight"], float))),
        "scikit-learn adds integers of 64 bits, which overflow; its test asks only for the dtype.",
    ),
    Reason(
        ("log_loss",),
        "a label whose probability is 0",
        _is_certain,
        lambda call: np.inf,
        "The loss is infinite; scikit-learn moves probabilities away from 0 by the epsilon of their dtype.",
    ),
    Reason(
        ("log_loss",),
        "rows that do not sum to 1",
        _does_not_sum_to_one,
        lambda call: _replace_probabilities(call, lambda p: p / p.sum(1, keepdims=True)),
        "A softmax always sums to 1, so a head sees the rows divided by their sums; scikit-learn warns and takes them.",
    ),
    Reason(
        VARIANCES,
        "labels that are all equal",
        _has_constant_labels,
        _leave_out_constant_labels,
        "The metric is undefined there: `undefined=`, or left out of the mean if that is NaN; scikit-learn says 1 if "
        "the predictions are right, and with `force_finite=False` -inf or NaN, also in the mean.",
    ),
)


def _pad_matrix(matrix: np.ndarray) -> np.ndarray:
    """A confusion matrix with the empty classes that make three; that of two classes as it is."""
    more = 0 if len(matrix) == 2 else max(3 - len(matrix), 0)
    return np.pad(np.asarray(matrix, float), ((0, more), (0, more)))


@dataclasses.dataclass(frozen=True)
class Answer:
    """What became of a call.

    Attributes:
        call: the call.
        outcome: one of `OUTCOMES`.
        detail: both values, the words of the refusal, or what the catalogue does not have.
        reason: the entry of `KNOWN` that tells why, where it disagrees or is refused.
        width: of the interval that was needed.
    """

    call: Call
    outcome: str
    detail: str = ""
    reason: Reason | None = None
    width: float = 0.0

    @property
    def is_unexplained(self) -> bool:
        """Whether something is wrong, in jaxheads or in this file."""
        return self.outcome in (DISAGREES, REFUSED) and self.reason is None

    def __str__(self) -> str:
        data = {key: _show(value)[:200] for key, value in self.call.given.items() if key in DATA and value is not None}
        return f"{self.call.name}({self.call.options}) {self.outcome}: {self.detail}. Given {data}"


def _refuse(call: Call, words: str) -> Answer:
    return Answer(call, REFUSED, words, _find_reason(call, None))


def _find_reason(call: Call, value: Any) -> Reason | None:
    return next((reason for reason in KNOWN if reason.explains(call, value)), None)


HEADS: dict[str, Callable[[int], Any]] = {
    "binary": lambda n: jh.BinaryClassHead(),
    "classes": jh.MultiClassHead,
    "labels": jh.MultiLabelHead,
    "regression": lambda n: jh.RegressionHead(label_dimension=n),
}

# Calls of fewer rows are filled with rows that do not exist, calls of more are cut: one program for each head.
ROWS = 256


def answer(calls: Sequence[Call]) -> list[Answer]:
    """Asks jaxheads. All questions to one kind of head share one head with all their metrics."""
    answers: dict[int, Answer] = {}
    asked: dict[HeadKey, list[tuple[int, Question]]] = collections.defaultdict(list)
    for i, call in enumerate(calls):
        try:
            if call.name not in ASKED:
                raise NotInCatalogueError(CURVES if call.name in POINTS else f"no metric like {call.name}")
            question = ASKED[call.name](call)
            asked[question.head].append((i, question))
        except NotInCatalogueError as error:
            answers[i] = Answer(call, ABSENT, str(error))
        except RefusedError as error:
            answers[i] = _refuse(call, str(error))
    for key, questions in asked.items():
        head, refused = _build(key, [question for _, question in questions])
        for i, question in questions:
            words = [refused[part.metric] for part in question.parts if part.metric in refused]
            answers[i] = _refuse(calls[i], words[0]) if words else _measure_and_compare(calls[i], head, question)
    return [answers[i] for i in range(len(calls))]


def _build(key: HeadKey, questions: Sequence[Question]) -> tuple[Any, dict[Any, str]]:
    """The head with all metrics that are asked of it, and the words for those that it refuses."""
    base, refused = HEADS[key[0]](key[1]), {}
    metrics = list(dict.fromkeys(part.metric for question in questions for part in question.parts))
    with contextlib.suppress(ValueError):
        return base.with_metrics(*metrics), refused
    for metric in metrics:
        try:
            base.with_metrics(metric)
        except ValueError as error:
            refused[metric] = str(error)
    return base.with_metrics(*(metric for metric in metrics if metric not in refused)), refused


def _measure_and_compare(call: Call, head: Any, question: Question) -> Answer:
    try:
        values = _measure(head, question)
    except ValueError as error:
        return _refuse(call, str(error))
    return _compare(call, question, values)


def _measure(head: Any, question: Question) -> dict[str, Any]:
    total = None
    for start in range(0, max(len(question.logits), 1), ROWS):

        def cut(x: np.ndarray, dtype: Any, start: int = start) -> np.ndarray:
            x = x[start : start + ROWS]
            return np.concatenate([x, np.zeros((ROWS - len(x), x.shape[1]), x.dtype)]).astype(dtype)

        seen = head.measure(
            labels=cut(question.labels, np.int32 if question.head[0] == "classes" else np.float32),
            logits=cut(question.logits, np.float32),
            weights=cut(question.weights, np.float32),
            where=cut(question.where, bool),
        )
        total = seen if total is None else total + seen
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of bins that leave much open: the interval is what is compared
        warnings.simplefilter("error", jh.BadInputWarning)
        assert total is not None  # there is one cut at least
        return total.compute(undefined=question.undefined, bounds=True)


def _is_close(a: Any, b: Any) -> bool:
    return np.shape(a) == np.shape(b) and bool(np.allclose(a, b, RTOL, ATOL, equal_nan=True))


def _compare(call: Call, question: Question, values: Mapping[str, Any]) -> Answer:
    answers = [_compare_part(call, part, values) for part in question.parts]
    worst = next((x for outcome in (DISAGREES, WITHIN) for x in answers if x.outcome == outcome), answers[0])
    return next((x for x in answers if x.is_unexplained), worst)


def _compare_part(call: Call, part: Part, values: Mapping[str, Any]) -> Answer:
    value, *ends = (part.read(values, end) for end in ("", "/lower", "/upper"))
    expected = np.asarray(part.expected, np.float64)
    if _is_close(value, expected):
        return Answer(call, AGREES)
    detail = f"{part.metric!r} gives {value.tolist()}, scikit-learn {expected.tolist()}"
    lower, upper = np.minimum(*ends), np.maximum(*ends)
    if value.shape == expected.shape:
        inside = (lower - ATOL <= expected) & (expected <= upper + ATOL)
        if np.all(inside | np.isnan(value) & np.isnan(expected)):
            detail += f", bounds {lower.tolist()} and {upper.tolist()}"
            return Answer(call, WITHIN, detail, width=float(np.nanmax(upper - lower)))
    return Answer(call, DISAGREES, detail, _find_reason(call, value))


@functools.cache
def run() -> tuple[Recording, list[Answer]]:
    """scikit-learn's tests, and the answers of jaxheads."""
    recording = record()
    return recording, answer(recording.calls)


def report(recording: Recording, answers: Sequence[Answer]) -> list[str]:
    """The counts and the tables."""
    counts = collections.Counter(x.outcome for x in answers)
    applicable = len(answers) - counts[ABSENT]
    ended = ", ".join(f"{n} {outcome}" for outcome, n in sorted(recording.ended.items()))
    lines = [
        f"# jaxheads beside the tests of scikit-learn {sklearn.__version__}",
        "",
        f"{', '.join(f'{file}.py' for file in FILES)}: {ended}. They call metrics {recording.made} times, of which "
        f"{len(answers)} calls differ. The catalogue has what {applicable} of them ask for.",
        "",
        *_tabulate(("outcome", "calls"), [(x, counts[x]) for x in OUTCOMES]),
        "",
        "## By function",
        "",
    ]
    names = sorted({x.call.name for x in answers if x.outcome != ABSENT})
    by_name = collections.Counter((x.call.name, x.outcome) for x in answers)
    lines += _tabulate(("function", *OUTCOMES), [(name, *(by_name[name, x] for x in OUTCOMES)) for name in names])
    lines += ["", "## Why jaxheads disagrees or refuses", ""]
    why = collections.Counter((x.outcome, x.reason) for x in answers if x.reason)
    rows = [
        (", ".join(r.functions), r.options, outcome, why[outcome, r], r.why)
        for r in KNOWN
        for outcome in (DISAGREES, REFUSED)
        if why[outcome, r]
    ]
    lines += _tabulate(("function", "calls with", "outcome", "calls", "reason"), rows)
    lines += ["", *(f"WITHOUT A REASON: {x}" for x in answers if x.is_unexplained)]
    lines += ["## Within the interval", "", *(f"- {x.call.name}: {x.detail}" for x in answers if x.outcome == WITHIN)]
    lines += ["", "## What the catalogue does not have", ""]
    absent = collections.Counter(x.detail for x in answers if x.outcome == ABSENT)
    return lines + _tabulate(("what", "calls"), absent.most_common())


def _tabulate(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]


def main() -> None:
    """Prints the tables."""
    if not find_files():
        print("The installed scikit-learn has no tests.")
        return
    import programs

    programs.start(devices=1)
    start, spent = time.perf_counter(), time.process_time()
    print(*report(*run()), sep="\n")
    print(f"\n{time.perf_counter() - start:.0f} s, {time.process_time() - spent:.0f} s of a CPU.")


if __name__ == "__main__":
    main()
