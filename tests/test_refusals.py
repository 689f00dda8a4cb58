"""Refusals that compile nothing: what was given, what was expected, and the fix, each in the words of the part."""

import functools
import types
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import jaxheads as jh
from jaxheads.numerics import fields
from jaxheads.numerics.batch import ABSENT
from jaxheads.numerics.describing import describe

UNTYPED: Any = jh  # to a type checker most of these are wrong
M = UNTYPED.metrics
COLUMN, ZEROS = np.zeros(3, np.float32), np.zeros((3, 1), np.float32)
A, B = jh.RegressionHead(name="a"), jh.RegressionHead(name="b")


class Squared(UNTYPED.Head):
    logits_dimension = 1
    coupling = "row"

    def losses(self, labels, logits):
        return (labels - logits) ** 2


class WideConstant(Squared):
    def best_constant(self, labels, weights):
        return np.zeros(3)


class Boxes(Squared):
    logits_spec = (None, 4)
    label_spec = jh.LabelSpec(4, axes=(None,))


class Unlabelled(Squared):
    label_spec = types.MappingProxyType({})


class PartsField(Squared):
    parts: Any = None


class Weighted(UNTYPED.MultiHead):
    weight_column = "w"


class Scaled(Squared):
    scale: Any = jh.learned(lambda head, key: jnp.float32(1))


def timed(labels, logits, features):
    return features["t"]


CASES: list[Any] = [
    (lambda: UNTYPED.MultiHead([A, A]), "names clash"),
    (lambda: UNTYPED.MultiHead([A, B], head_weights=[1.0, np.inf]), "must be finite numbers"),
    (lambda: UNTYPED.MultiHead([A, B], weighting="best"), "weighting must be one of"),
    (lambda: UNTYPED.MultiHead([A, B]).loss(COLUMN, np.zeros((3, 2))), "dict by head"),
    (lambda: UNTYPED.SequentialHeadWrapper(3), "heads: a head"),
    (lambda: UNTYPED.SequentialHeadWrapper(None), "static_head must be a head"),
    (lambda: UNTYPED.SequentialHeadWrapper(A, average_over="rows"), "average_over must be one of"),
    (lambda: UNTYPED.PoissonRegressionHead(compute_full_loss="no"), "must be True or False"),
    (lambda: UNTYPED.RegressionHead(inverse_link_fn=3), "must be a function logits -> predictions"),
    (lambda: UNTYPED.BinaryClassHead(thresholds=[0.3, 0.30000001]), "print alike"),
    (lambda: UNTYPED.BinaryClassHead(bins=20), "bins must be"),
    (lambda: UNTYPED.RegressionHead(bootstrap=3), r"bootstrap must be jh\.Bootstrap"),
    (lambda: UNTYPED.RegressionHead(slices=3), r"slices must be jh\.Slices"),
    (lambda: UNTYPED.RegressionHead(extra_metrics=[3]), "takes metrics"),
    (lambda: PartsField(), "is a hook"),
    (lambda: Weighted([A, B]).loss({"a": COLUMN, "b": COLUMN}, np.zeros((3, 2))), "weights and metrics are theirs"),
    (lambda: Boxes().loss(np.zeros((3, 2, 4)), np.zeros(4)), "must have shape"),
    (lambda: Boxes().loss(np.zeros((2, 2, 4)), np.zeros((3, 2, 4))), "to match the logits"),
    (lambda: WideConstant().constant_logits(COLUMN), r"must return shape \(1,\)"),
    (lambda: UNTYPED.LabelSpec(kind="text"), "is of kind"),
    (lambda: Unlabelled().loss(COLUMN, ZEROS), "takes no labels"),
    (lambda: Scaled().bind(3), "must be a dict as head.init"),
    (lambda: fields.merge({"a": 1}, {"a": 2}), "given twice"),
    (lambda: UNTYPED.RegressionHead(slices=jh.Slices("g", 2)).measure(COLUMN, ZEROS, {"g": COLUMN > 0}), "membership"),
    (lambda: A.metrics().curve("roc", slice=0), r"curve\(\)"),
    (lambda: UNTYPED.fit(None, print, [{}], allow_changes="yes"), "must be True or False"),
    (lambda: UNTYPED.boosting.BoostedHead(A).fit(ZEROS, None), "requires y to be passed"),
    (lambda: UNTYPED.boosting.BoostedHead(A).fit(ZEROS, np.array(["a", "b", "c"], object)), "y must be numbers"),
    (lambda: jh.RegressionHead(loss_fn=timed).loss(COLUMN, ZEROS, {"t": []}), "an empty list"),
]


@pytest.mark.parametrize(("call", "match"), CASES)
def test_a_refusal_says_what_is_wrong(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_observations_of_two_kinds_do_not_join():
    mean, scores = jh.Mean(ZEROS), jh.Scores(ZEROS, ZEROS, jh.GrowingGrid())
    moments = jh.RegressionHead().with_metrics(M.R2Score()).observed()
    (spread,) = [x for x in moments.values() if type(x).__name__ == "Moments"]
    for one, other in ((mean, scores), (scores, mean), (spread, mean)):
        with pytest.raises(ValueError, match="Rename one"):
            cast(Any, one).join(other)


def test_composites_and_wrappers_give_what_is_inside():
    both: Any = jh.MultiHead([A, B])
    values = both.losses({"a": COLUMN[:, None], "b": COLUMN[:, None]}, np.ones((3, 2), np.float32))
    assert {name: float(np.sum(value)) for name, value in values.items()} == {"a": 3, "b": 3}
    assert set(both.outputs(np.ones((3, 2), np.float32))) == {"a", "b"}
    tags: Any = jh.SequentialHeadWrapper(jh.MultiClassHead(3, label_vocabulary=["x", "y", "z"]))
    assert tags.class_names() == ("x", "y", "z")
    assert tags.coupling == "row"
    np.testing.assert_array_equal(tags.encode_labels([["x", "y"]]), [[0, 1]])
    assert "class_ids" in tags.outputs(np.zeros((1, 2, 3), np.float32))
    assert np.shape(tags.losses(np.zeros((1, 2, 1), np.int32), np.zeros((1, 2, 3), np.float32))) == (1, 2, 1)
    assert repr(ABSENT) == "ABSENT"


def test_descriptions_of_all_kinds_of_values():
    loop: list[Any] = []
    loop.append(loop)

    def unset():
        return later

    deleted = jnp.zeros(3)
    deleted.delete()
    assert describe(loop) == "(...)"
    assert "later=unset" in describe(unset)
    later = 3
    assert "later=3" in describe(unset)
    assert describe(deleted) == "float32[3]"
    assert describe(np.float32(3)) == describe(3) == describe(jnp.float32(3)) == "3"
    assert describe({3, 1, 2}) == "set(1, 2, 3)"
    assert describe(functools.partial(max, 3, key=abs)) == "partial(max, (3), {'key': abs})"
    assert describe(jh.RegressionHead) == "jaxheads.heads.regression.RegressionHead"
    assert describe(np.add) == "add"
    assert describe(object()) == "object"
    jax.make_jaxpr(lambda x: describe(x) == "float32[3]" or 1 / 0)(np.zeros(3, np.float32))


def test_missing_labels_of_several_heads_are_filled_where_they_are_hidden():
    labels = {"a": pd.Series([1, None, 3], dtype="Int64"), "b": pd.Series([True, None, False], dtype="boolean")}
    where = {"a": np.array([True, False, True]), "b": np.array([True, False, True])}
    padded = jh.pad_batch({"features": {"x": COLUMN}, "labels": labels, "where": where}, 4)
    np.testing.assert_array_equal(padded["labels"]["a"][:3], [1, 1, 3])
    np.testing.assert_array_equal(padded["where"]["b"].ravel(), [True, False, True, False])
    with pytest.raises(ValueError, match="missing value in row 1"):
        jh.pad_batch({"features": {"x": COLUMN}, "labels": labels}, 4)
