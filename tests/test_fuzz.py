"""A fuzz of the public API: a call ends in a value, or in a `ValueError` in our own words.

A loss of legal arguments is compared with NumPy; other values, such as those that odd arguments gave, are not.
Arguments are drawn from legal ones and from odd ones. A run prints its seed; `FUZZ_SEED=7 FUZZ_EXAMPLES=20000` runs
another one. What ends otherwise is in `KNOWN`, each with its reason.
"""

import functools
import inspect
import os
import pathlib
import traceback
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import jaxheads as jh

SEED, EXAMPLES = int(os.environ.get("FUZZ_SEED", "0")), int(os.environ.get("FUZZ_EXAMPLES", "5000"))
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
PACKAGE = str(pathlib.Path(jh.__file__).parent)
M: Any = jh.metrics

# What ends otherwise, by a part of its text, and why that is right.
KNOWN = {
    "unexpected keyword argument": "Python's own words for a call that does not fit a signature",
    "required positional argument": "the same",
    "required keyword-only argument": "the same",
    "Error interpreting argument to <function _fail": "JAX's words: of a user's own step, the head is not known",
    "iteration over a 0-d array": "dict(loss), where the class dict is given as a user's function of the loss",
}

N = 3
LABELS = {
    "float": lambda: np.array([0.5, 1.0, 0.0], np.float32),
    "binary": lambda: np.array([0, 1, 1]),
    "ids": lambda: np.array([0, 2, 1]),
    "hot": lambda: np.array([[0, 1, 1], [1, 0, 0], [0, 0, 0]]),
    "names": lambda: ["a", "b", "a"],
}
COLUMNS = {"w": np.array([1.0, 0.0, 2.0]), "g": np.array([0, 1, 1]), "length": np.array([2, 0, 1])}

# Odd values, each made anew. A name says what an example was given.
ODD: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "0": lambda: 0,
    "1": lambda: 1,
    "-1": lambda: -1,
    "7": lambda: 7,
    "2**70": lambda: 2**70,
    "0.0": lambda: 0.0,
    "0.5": lambda: 0.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-1e30": lambda: -1e30,
    "1j": lambda: 1j,
    "True": lambda: True,
    "False": lambda: False,
    "''": lambda: "",
    "'x'": lambda: "x",
    "'a/b'": lambda: "a/b",
    "b'x'": lambda: b"x",
    "[]": list,
    "[1]": lambda: [1],
    "[0.3, 0.2]": lambda: [0.3, 0.2],
    "['a']": lambda: ["a"],
    "[None]": lambda: [None],
    "[[1], [2, 3]]": lambda: [[1], [2, 3]],
    "()": tuple,
    "('a', 'b')": lambda: ("a", "b"),
    "{}": dict,
    "{'a': 1}": lambda: {"a": 1},
    "{1: 2}": lambda: {1: 2},
    "a set": lambda: {1, 2},
    "range(2)": lambda: range(2),
    "a generator": lambda: (x for x in (1, 2)),
    "an object": object,
    "a class": lambda: dict,
    "a function": lambda: lambda *args: args[0] if args else 1,
    "a failing function": lambda: _fail,
    "float64(0.3)": lambda: np.float64(0.3),
    "int8(2)": lambda: np.int8(2),
    "bool_": lambda: np.bool_(True),
    "array(0.5)": lambda: np.array(0.5),
    "array[0]": lambda: np.zeros(0),
    "array[3]": lambda: np.array([0.2, 0.5, 1.0], np.float32),
    "int[3]": lambda: np.array([0, 1, 5]),
    "bool[3]": lambda: np.array([True, False, True]),
    "nan[3]": lambda: np.array([np.nan, 0.0, np.inf]),
    "negative[3]": lambda: np.array([-1.0, 0.5, 1e30]),
    "float[3, 1]": lambda: np.array([[0.2], [0.5], [-1.0]], np.float32),
    "float[3, 3]": lambda: np.eye(3, dtype=np.float32),
    "float[2, 3, 1]": lambda: np.zeros((2, 3, 1), np.float32),
    "float[0, 1]": lambda: np.zeros((0, 1), np.float32),
    "complex[3]": lambda: np.zeros(3, complex),
    "text[3]": lambda: np.array(["a", "b", "c"]),
    "object[3]": lambda: np.array([1, "a", None], object),
    "dates[3]": lambda: np.array(["2020-01-01"] * 3, "M8[D]"),
    "bfloat16[3]": lambda: np.array([0, 1, 1], jnp.bfloat16),
    "jax[3]": lambda: jnp.array([0.2, 0.5, 1.0]),
    "jax[3, 1]": lambda: jnp.zeros((3, 1)),
    "a key": lambda: jax.random.key(0),
    "a series": lambda: pd.Series([1.0, 0.0, 1.0]),
    "a series with NA": lambda: pd.Series([1, None, 0], dtype="Int64"),
    "a frame": lambda: pd.DataFrame({"w": [1.0, 2.0, 3.0]}),
    "masked[3]": lambda: np.ma.MaskedArray([1.0, 2.0, 3.0], [False, True, False]),
    "shape": lambda: jax.ShapeDtypeStruct((3, 1), jnp.float32),
    "a head": lambda: jh.RegressionHead(name="odd"),
    "[heads]": lambda: [jh.RegressionHead(name="a"), jh.RegressionHead(name="a")],
    "a metric": lambda: M.BrierScore(),
    "slices": lambda: jh.Slices("g", 2),
    "an optimizer": lambda: optax.sgd(0.1),
    "a module": lambda: types,
}


def _fail(*_: Any, **__: Any) -> Any:
    raise ValueError("a user's own error")


def apply_fn(params: Any, features: Any) -> Any:
    return features["x"] @ params["w"]


def square(labels: Any, logits: Any) -> Any:
    return (labels - logits) ** 2


OPTIMIZER = optax.sgd(0.1)
HEADS: dict[str, Callable[[], jh.Head]] = {
    "float": jh.RegressionHead,
    "binary": lambda: jh.BinaryClassHead(thresholds=[0.3]),
    "ids": lambda: jh.MultiClassHead(3),
    "hot": lambda: jh.MultiLabelHead(3),
    "names": lambda: jh.BinaryClassHead(label_vocabulary=["a", "b"], slices=jh.Slices("g", 2), weight_column="w"),
}


@functools.cache
def start(name: str) -> Any:
    head = HEADS[name]()
    params = {"w": np.zeros((2, head.logits_dimension), np.float32)}
    return jh.TrainState.create(params=params, optimizer=OPTIMIZER, head=head, key=jax.random.key(0))


def batch_of(name: str) -> dict[str, Any]:
    return {"features": {"x": np.ones((N, 2), np.float32)}, "labels": LABELS[name]()}


def steps_of(name: str) -> dict[str, Any]:
    head = HEADS[name]()
    return {
        "state": start(name),
        "train_step": jh.make_train_step(head, apply_fn, OPTIMIZER),
        "eval_step": jh.make_eval_step(head, apply_fn),
        "batches": [batch_of(name)],
        "validation": [batch_of(name)],
        "head": head,
        "apply_fn": apply_fn,
        "optimizer": OPTIMIZER,
        "batch": batch_of(name),
        "size": 4,
        "params": {"w": np.zeros((2, head.logits_dimension), np.float32)},
        "progress": False,
        "key": jax.random.key(0),
        "higher_is_better": None,
        "patience": None,
    }


def arguments_of(name: str) -> dict[str, Any]:
    """Legal arguments of the methods of a head, and of what is beside it."""
    head = HEADS[name]()
    logits = np.linspace(-1, 1, N * head.logits_dimension, dtype=np.float32).reshape(N, head.logits_dimension)
    return {
        "labels": LABELS[name](),
        "logits": logits,
        "features": COLUMNS,
        "mode": "train",
        "weights": None,
        "where": np.array([True, True, False]),
        "keys": None,
        "key": jax.random.key(0),
        "eval_metrics": head.metrics(),
        "predictions": head.predictions(logits),
        "state": {},
        "params": None,
        "trainable_variables": {"z": logits},
        "train_op_fn": None,
        "optimizer": None,
        "regularization_losses": None,
        "axis_name": None,
        "check": None,
        "normalizer": None,
        "opt_state": None,
        "update_ops": None,
    }


METHODS = (
    *("loss", "measure", "update_metrics", "predictions", "export_outputs", "metrics", "constant_logits"),
    *("encode_labels", "decode_predictions", "init", "init_state", "bind", "update_state", "divisor"),
    "create_estimator_spec",
)
# The parts of the API that are made from their own arguments, with legal values of some of these.
MADE: dict[str, tuple[Any, dict[str, Any]]] = {
    **{name: (getattr(jh, name), {}) for name in ("BinaryClassHead", "RegressionHead", "PoissonRegressionHead")},
    "LogisticRegressionHead": (jh.LogisticRegressionHead, {}),
    "MultiClassHead": (jh.MultiClassHead, {"n_classes": 3}),
    "MultiLabelHead": (jh.MultiLabelHead, {"n_classes": 3}),
    "binary_or_multi_class_head": (jh.binary_or_multi_class_head, {"n_classes": 3}),
    "MultiHead": (jh.MultiHead, {"heads": [jh.RegressionHead(name="a"), jh.BinaryClassHead(name="b")]}),
    "SequentialHeadWrapper": (jh.SequentialHeadWrapper, {"static_head": jh.BinaryClassHead()}),
    "GlobalObjectiveHead": (
        jh.GlobalObjectiveHead,
        {"base": jh.BinaryClassHead(), "objective": "precision_at_recall", "target": 0.8},
    ),
    "LogitGrid": (jh.LogitGrid, {}),
    "ThresholdGrid": (jh.ThresholdGrid, {}),
    "GrowingGrid": (jh.GrowingGrid, {}),
    "Slices": (jh.Slices, {"column": "g", "n": 2}),
    "Bootstrap": (jh.Bootstrap, {"replicas": 3}),
    "LabelSpec": (jh.LabelSpec, {}),
    "learned": (jh.learned, {"initializer": lambda head, key: 0.0, "init": False}),
    "running": (jh.running, {"initializer": lambda head: 0.0, "init": False}),
    "LinearLogits": (
        jh.LinearLogits,
        {"hidden": np.ones((N, 2), np.float32), "kernel": np.ones((2, 1), np.float32), "bias": None},
    ),
    "ftrl": (jh.training.ftrl, {"learning_rate": 0.1}),
    "primal_dual": (jh.training.primal_dual, {"primal": OPTIMIZER, "dual": OPTIMIZER}),
    "xgboost_objective": (jh.boosting.xgboost_objective, {"head": jh.BinaryClassHead()}),
    "xgboost_metric": (jh.boosting.xgboost_metric, {"head": jh.BinaryClassHead()}),
    "lightgbm_objective": (jh.boosting.lightgbm_objective, {"head": jh.BinaryClassHead()}),
    "lightgbm_metric": (jh.boosting.lightgbm_metric, {"head": jh.BinaryClassHead()}),
    "BoostedHead": (jh.boosting.BoostedHead, {"head": jh.BinaryClassHead()}),
}
CATALOGUE = [name for name in dir(M) if inspect.isclass(getattr(M, name)) and issubclass(getattr(M, name), M.Metric)]
MADE |= {f"metrics.{name}": (getattr(M, name), {}) for name in CATALOGUE if not inspect.isabstract(getattr(M, name))}
STEPS = {
    name: getattr(jh, name)
    for name in ("make_train_step", "make_eval_step", "make_predict_step", "fit", "evaluate", "pad_batch")
} | {"create": jh.TrainState.create, "lockstep": lambda **given: list(jh.training.lockstep(**given))}
READ = ("compute", "by_slice", "curve", "reliability", "merge", "psum", "__add__", "with_metrics")


def draw_arguments(data: Any, function: Any, legal: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Draws up to three odd arguments of a function; the others are legal, or left out."""
    parameters = [
        p for p in inspect.signature(function).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    names = [p.name for p in parameters if p.name != "self"]
    given = {name: legal[name] for name in names if name in legal}
    odd = data.draw(st.lists(st.sampled_from(names), max_size=3, unique=True)) if names else []
    told = {name: data.draw(st.sampled_from([*ODD])) for name in odd}
    return {**given, **{name: ODD[kind]() for name, kind in told.items()}}, told


def draw_call(data: Any) -> tuple[str, Callable[[], Any], dict[str, str]]:
    """Draws a call: its name, the call, and its odd arguments."""
    kind = data.draw(st.sampled_from(["made", "method", "method", "method", "step", "read"]))
    if kind == "made":
        name = data.draw(st.sampled_from(sorted(MADE)))
        function, legal = MADE[name]
        given, told = draw_arguments(data, function, legal)
        return name, lambda: use(function(**given)), told
    task = data.draw(st.sampled_from(sorted(HEADS)))
    if kind == "step":
        name = data.draw(st.sampled_from(sorted(STEPS)))
        given, told = draw_arguments(data, STEPS[name] if name != "lockstep" else jh.training.lockstep, steps_of(task))
        return f"{name} of {task}", lambda: STEPS[name](**given), told
    head = HEADS[task]()
    if kind == "read":
        name = data.draw(st.sampled_from(READ))
        metrics = head.measure(LABELS[task](), arguments_of(task)["logits"], COLUMNS)
        if name in ("merge", "__add__", "psum", "with_metrics"):
            odd = data.draw(st.sampled_from([*ODD]))
            of = head if name == "with_metrics" else metrics
            return f"{name} of {task}", lambda: getattr(of, name)(ODD[odd]()), {"0": odd}
        given, told = draw_arguments(data, getattr(metrics, name), {"kind": "roc", "warn": False})
        return f"{name} of {task}", lambda: getattr(metrics, name)(**given), told
    name = data.draw(st.sampled_from(METHODS))
    given, told = draw_arguments(data, getattr(head, name), arguments_of(task))
    return f"{name} of {task}", lambda: getattr(head, name)(**given), told


def use(made: Any) -> Any:
    """Uses what was made: a head must have metrics, a grid must fit a head, a metric must be refused or taken."""
    if isinstance(made, jh.Head):
        return made.metrics()
    if isinstance(made, (jh.LogitGrid, jh.ThresholdGrid, jh.GrowingGrid)):
        return jh.BinaryClassHead(bins=made).metrics()
    if isinstance(made, jh.Slices):
        return jh.RegressionHead(slices=made).metrics()
    if isinstance(made, jh.Bootstrap):
        return jh.RegressionHead(bootstrap=made).metrics()
    if isinstance(made, M.Metric):
        return jh.BinaryClassHead().with_metrics(made).metrics()
    if isinstance(made, jh.LinearLogits):
        return jh.RegressionHead().loss(np.zeros(N), made)
    return made


def is_shallow(error: Exception, text: str) -> bool:
    """Tells whether an error of Python's, about arguments, comes from the call itself and not from inside it."""
    if "argument" not in text or "_fail" in text:
        return True
    return not any(frame.filename.startswith(PACKAGE) for frame in traceback.extract_tb(error.__traceback__))


def is_ours(error: Exception) -> bool:
    """Tells whether an error is a `ValueError` that the library has raised itself, or a user's function."""
    if not isinstance(error, ValueError):
        return False
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    return where.startswith(PACKAGE) or "a user's own error" in str(error)


def judge(name: str, call: Callable[[], Any], odd: Mapping[str, str]) -> str | None:
    """Makes a call; returns what is wrong with its end, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = call()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if any(known in text for known in KNOWN) and is_shallow(error, text):
            return None
        if not is_ours(error):
            return f"{name} with {dict(odd)} ended in {text[:300]}"
        if len(str(error)) > 600:
            return f"{name} with {dict(odd)} has an error of {len(str(error))} characters: {text[:100]}"
        return None
    if name.startswith("loss of") and not odd:
        expected = oracle(name.removeprefix("loss of "))
        if not np.allclose(found, expected, rtol=1e-5):
            return f"{name} gives {found}, and NumPy {expected}"
    return None


def oracle(task: str) -> float:
    """The loss of the legal arguments, in float64."""
    z = np.asarray(arguments_of(task)["logits"], np.float64)
    y = np.array([0, 1, 0]) if task == "names" else np.asarray(LABELS[task](), np.float64)
    if task == "ids":
        losses = np.log(np.exp(z).sum(-1)) - z[np.arange(N), y.astype(int)]
    elif task == "float":
        losses = (z[:, 0] - y) ** 2
    elif task == "hot":
        losses = (np.logaddexp(0, z) - y * z).mean(-1)
    else:
        losses = np.logaddexp(0, z[:, 0]) - y * z[:, 0]
    weights = COLUMNS["w"] if task == "names" else np.ones(N)
    return float((losses * weights)[:2].sum() / 2)  # the third row is masked


@pytest.mark.slow
def test_every_call_ends_in_a_value_or_in_our_words(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a text may be taken for a directory
    ends: dict[str, int] = {"calls": 0}

    @seed(SEED)
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=SLOW)
    @given(st.data())
    def run(data):
        name, call, odd = draw_call(data)
        ends["calls"] += 1
        wrong = judge(name, call, odd)
        assert wrong is None, wrong

    run()
    with capsys.disabled():
        print(f"\nfuzz: {ends['calls']} calls, FUZZ_SEED={SEED}")


def test_legal_arguments_match_the_oracle():
    for task in HEADS:
        given = {name: arguments_of(task)[name] for name in ("labels", "logits", "features", "where")}
        if task != "names":
            given.pop("features")
        assert judge(f"loss of {task}", functools.partial(HEADS[task]().loss, **given), {}) is None


def test_the_fuzz_sees_what_is_wrong():
    """An error of Python, one of NumPy, a wrong value and a long message are told."""
    long = ValueError("x" * 700)

    def raise_(error: Exception) -> Any:
        raise error

    for call in (lambda: 1 / 0, lambda: np.zeros(3).reshape(2, 2), lambda: raise_(KeyError("x")), lambda: raise_(long)):
        assert judge("a call", call, {}) is not None
    assert judge("loss of float", lambda: 0.0, {}) is not None
    assert judge("a call", lambda: jh.RegressionHead(label_dimension=0), {}) is None
