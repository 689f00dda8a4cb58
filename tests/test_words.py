"""Mistakes of authors of heads: each ends in the library's own error, which names the fix."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxheads as jh

LABELS, LOGITS = np.array([1.0, 2.0], np.float32), np.array([[1.5], [0.5]], np.float32)


class SquaredHead(jh.Head):
    """A head to make mistakes in."""

    logits_dimension = 1

    def losses(self, labels, logits):
        return (labels - logits) ** 2


@pytest.mark.parametrize(
    ("field", "function", "match"),
    [
        (jh.learned, lambda: jnp.ones(1), r"function of head and key(.|\n)*Given(.|\n)*\(\)"),
        (jh.learned, lambda head: jnp.ones(1), r"arguments \(head\)(.|\n)*learned\(lambda head, key: "),
        (jh.learned, lambda head, key, *, n: jnp.ones(n), r"arguments \(head, key, \*, n\)"),
        (jh.running, lambda head, key: jnp.ones(1), r"function of head. Given(.|\n)*running\(lambda head: "),
        (jh.running, jnp.ones, None),
        (jh.learned, lambda *given: jnp.ones(1), None),
        (jh.learned, max, None),
    ],
)
def test_first_values_come_from_a_function_of_the_head(field, function, match):
    if match is None:
        field(function)
    else:
        with pytest.raises(ValueError, match=match):
            field(function)


def test_first_values_are_arrays():
    class TreeHead(SquaredHead):
        scale: Any = jh.learned(lambda head, key: {"a": jnp.ones(1)})
        count: Any = jh.running(lambda head: "none")

    for make in (lambda: TreeHead().init(jax.random.key(0)), TreeHead().init_state):
        with pytest.raises(ValueError, match=r"TreeHead.(scale|count) must start as an array(.|\n)*Given a (dict|str)"):
            make()


def define_with_assignment():
    class OwnHead(SquaredHead):
        def __init__(self, margin):
            self.margin = margin  # pyright: ignore[reportAttributeAccessIssue]  # what is tested

    return OwnHead(1.0)


def define_with_super():
    class OwnHead(SquaredHead):
        def __init__(self, margin):
            super().__init__(name=f"margin_{margin}")

    return OwnHead(1.0)


@pytest.mark.parametrize("define", [define_with_assignment, define_with_super])
def test_a_constructor_is_made_of_fields(define):
    with pytest.raises(
        ValueError, match=r"OwnHead must not have its own __init__(.|\n)*margin: float = 1.0(.|\n)*validate"
    ):
        define()


def test_heads_are_frozen():
    class LateHead(SquaredHead):
        margin: float = 1.0

        def __post_init__(self):
            self.doubled = 2 * self.margin  # pyright: ignore[reportAttributeAccessIssue]  # what is tested

    head = SquaredHead()
    for change in (LateHead, lambda: setattr(head, "name", "late"), lambda: delattr(head, "name")):
        with pytest.raises(
            ValueError, match=r"frozen. Given(.|\n)*dataclasses.replace\(head, \w+=...\)(.|\n)*property"
        ):
            change()
        with pytest.raises(dataclasses.FrozenInstanceError):
            change()


def scaled(labels, logits, features):
    return features["scale"] * (labels - logits) ** 2


class AroundHead(jh.Head):
    """Does not ask for features, which the head inside needs."""

    inner: jh.Head = jh.subheads()
    logits_dimension = 1

    def losses(self, labels, logits):
        return self.inner.losses(labels, logits)


class PassingHead(AroundHead):
    """The fix that the error names."""

    def losses(self, labels, logits, features):  # pyright: ignore[reportIncompatibleMethodOverride]  # a hook asks
        return self.inner.losses(labels, logits, features)  # pyright: ignore[reportCallIssue]  # as its class says


def test_a_head_around_a_loss_function_passes_features_on():
    inner, features = jh.RegressionHead(loss_fn=scaled), {"scale": np.array([[2.0], [4.0]], np.float32)}
    for method in ("loss", "measure"):
        with pytest.raises(
            ValueError, match=r"takes features, and none(.|\n)*losses\(self, labels, logits, features\)"
        ):
            getattr(AroundHead(inner), method)(LABELS, LOGITS, features)
    assert PassingHead(inner).loss(LABELS, LOGITS, features) == (2 * 0.25 + 4 * 2.25) / 2


def gathered(x):
    return jax.lax.all_gather(x, "rows", tiled=True)[:2]


class GatherHead(SquaredHead):
    coupling = "batch"

    def observe(self, labels, logits):
        return {"mean": jh.Mean(gathered(logits))}


class SumHead(SquaredHead):
    coupling = "batch"

    def losses(self, labels, logits):
        return (labels - logits) ** 2 / jax.lax.psum(1.0, "rows")


class IndexHead(SquaredHead):
    def losses(self, labels, logits):
        return (labels - logits) ** 2 + jax.lax.axis_index("rows")


class OutputsHead(SquaredHead):
    coupling = "row"

    def outputs(self, logits):
        return {"predictions": jax.lax.pmean(logits, "rows")}


def loss_over_rows(labels, logits):
    return jax.lax.pmean((labels - logits) ** 2, "rows")


@pytest.mark.parametrize(
    ("head", "method", "hook"),
    [
        (GatherHead(), "measure", "GatherHead.observe"),
        (GatherHead(), "metrics", "GatherHead.observe"),
        (SumHead(), "loss", "SumHead.losses"),
        (IndexHead(), "loss", "IndexHead.losses"),
        (OutputsHead(), "predictions", "OutputsHead.outputs"),
        (jh.RegressionHead(loss_fn=loss_over_rows), "loss", "RegressionHead.losses"),
    ],
)
def test_hooks_take_other_rows_from_rows_devices(head, method, hook):
    given = {"metrics": (), "predictions": (LOGITS,)}.get(method, (LABELS, LOGITS))
    with pytest.raises(ValueError, match=rf"{hook} uses a mapped axis(.|\n)*rows.devices.all\(x\)"):
        getattr(head, method)(*given)


def test_other_unknown_names_stay_what_they_are():
    class TypoHead(SquaredHead):
        coupling = "row"

        def losses(self, labels, logits):
            return labels - logit  # noqa: F821  # pyright: ignore[reportUndefinedVariable]  # what is tested

    with pytest.raises(NameError, match="logit"):
        TypoHead().loss(LABELS, LOGITS)


class NothingHead(jh.Head):
    """Hooks that forget to return."""

    logits_dimension = 1
    coupling = "row"

    def losses(self, labels, logits):
        return (labels - logits) ** 2

    def outputs(self, logits):  # pyright: ignore[reportIncompatibleMethodOverride]  # what is tested
        return None

    def observe(self, labels, logits):  # pyright: ignore[reportIncompatibleMethodOverride]  # what is tested
        return None


COLUMN, ZEROS = np.zeros(3, np.float32), np.zeros((3, 1), np.float32)
SAMPLED: Any = jh.RegressionHead(bootstrap=jh.Bootstrap(3))
UNTYPED: Any = jh  # to a type checker all of these are wrong
SLIPS: list[Any] = [
    (lambda: UNTYPED.BinaryClassHead(extra_metrics=UNTYPED.metrics.BrierScore()), "put it in a list"),
    (lambda: UNTYPED.BinaryClassHead().init(0), r"random key, such as jax\.random\.key\(0\)\. Given 0"),
    (lambda: SAMPLED.measure(COLUMN, ZEROS, key=0), "random key"),
    (lambda: UNTYPED.LogitGrid(-1, 1, 10**12), r"at most \d+ bins(.|\n)*GB of state"),
    (lambda: UNTYPED.ThresholdGrid(10**12), "GB of state"),
    (lambda: UNTYPED.RegressionHead(bootstrap=UNTYPED.Bootstrap(10**9)).metrics(), "GB of state"),
    (lambda: UNTYPED.RegressionHead(slices=UNTYPED.Slices("g", 10**9)).metrics(), "GB of state"),
    (lambda: UNTYPED.LabelSpec(size=-1), "at least 1"),
    (lambda: UNTYPED.LabelSpec(size=2.0), "at least 1"),
    (lambda: NothingHead().predictions(ZEROS), r"NothingHead\.outputs must return a dict by key\. Given None"),
    (lambda: NothingHead().measure(COLUMN, ZEROS), r"NothingHead\.observe must return a dict"),
    (lambda: UNTYPED.BinaryClassHead().decode_predictions(3), "must be a dict"),
    (lambda: UNTYPED.MultiClassHead(3).decode_predictions({"class_ids": np.array(1)}), "leading axis"),
    (lambda: UNTYPED.Metrics.merge(3), "takes a list of states"),
    (lambda: UNTYPED.evaluate(None, 3, []), r"jh\.make_eval_step"),
    (lambda: UNTYPED.fit(None, 3, []), r"jh\.make_train_step"),
    (lambda: UNTYPED.fit(None, print, [{}], writer=2), r"add_scalar(.|\n)*Given 2"),
]


@pytest.mark.parametrize(("slip", "match"), SLIPS)
def test_a_slip_is_told_in_our_words(slip, match):
    with pytest.raises(ValueError, match=match):
        slip()
