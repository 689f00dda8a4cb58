"""Several states in one, as pmap, vmap and scan stack them: one of them, and their sum, by NumPy in float64."""

from typing import Any, cast

import jax
import numpy as np
import pytest
from devices import mesh_of
from jax.sharding import NamedSharding, PartitionSpec

import jaxheads as jh

HEAD = jh.RegressionHead()
RNG = np.random.default_rng(0)
LABELS, LOGITS = RNG.normal(size=(2, 8, 3, 5, 1)).astype(np.float32)
WEIGHTS = RNG.choice(np.array([0, 0.5, 1, 2], np.float32), LABELS.shape)


@jax.jit
def measure(labels, logits, weights):
    """States `[8, 3]` by two vmaps."""
    return jax.vmap(jax.vmap(lambda y, z, w: HEAD.measure(y, z, weights=w)))(labels, logits, weights)


def expected(at: Any = slice(None), axis: Any = None):
    """The loss of some states, or of sums over an axis of the stack and the rows."""
    y, z, w = (x[at].astype(np.float64) for x in (LABELS, LOGITS, WEIGHTS))
    axes = tuple(range(y.ndim)) if axis is None else (axis, -2, -1)
    return np.sum(w * (y - z) ** 2, axes) / np.sum(w, axes)


def assert_loss(metrics, value):
    np.testing.assert_allclose(metrics.compute(warn=False)["average_loss"], value, rtol=2e-6)


@pytest.mark.parametrize("place", [jax.device_get, lambda x: x], ids=["host", "device"])
def test_one_of_several_and_their_sum(place):
    stacked = place(measure(LABELS, LOGITS, WEIGHTS))
    assert len(stacked) == 8
    assert len(stacked[0]) == 3
    assert stacked
    for index in ((2, 1), (-1, 0), (slice(2, 4), 1), (np.int64(3), slice(None))):
        assert_loss(stacked[index].sum(), expected(index))
    assert_loss(stacked[4][2], expected((4, 2)))
    assert [one.state.shape for one in stacked] == [stacked.state.shape[1:]] * 8
    assert_loss(stacked.sum(), expected())
    for axis in (0, 1, -1):
        assert_loss(stacked.sum(axis), expected(axis=axis % 2))
    assert (
        stacked.sum().state.shape[-1] == stacked[:0].sum().state.shape[-1] == stacked[0, :1].sum().state.shape[-1] == 2
    )
    assert np.isnan(stacked[:0].sum().compute()["average_loss"])
    one = stacked[0, 0]
    assert one.sum() is one
    assert one[None].state.shape == (1, *one.state.shape)
    assert_loss(sum(stacked, HEAD.metrics()).sum(), expected())


def test_counters_do_not_stop_in_a_sum():
    """Float32 would forget the small states beside the large one; on the host and compiled."""
    one, zeros = jax.device_get(HEAD.measure([1.0], [[0.0]])), np.zeros((5, 2), np.float32)
    state = np.zeros((1001, one.state.shape[0], 2), np.float32)
    state[:, -6:, 0], state[0, -6:, 0] = 1, 2**25
    stacked = jh.Metrics(state, one.head)
    for total in (stacked.sum(), jax.jit(lambda m: m.sum())(stacked)):
        np.testing.assert_array_equal(np.asarray(total.state, np.float64).sum(-1)[-6:], 2**25 + 1000)
        np.testing.assert_array_equal(total.state[:-6], zeros[: len(total.state) - 6])


def test_steps_of_a_scan():
    def step(total, rows):
        found = HEAD.measure(rows[0], rows[1], weights=rows[2])
        return total + found, found

    rows = [x[:, 0] for x in (LABELS, LOGITS, WEIGHTS)]
    total, steps = jax.jit(lambda rows: jax.lax.scan(step, HEAD.metrics(), rows))(rows)
    for each in (total, steps.sum()):
        assert_loss(each, expected((slice(None), 0)))
    assert_loss(steps[-2:].sum(), expected((slice(6, None), 0)))


@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_states_of_a_mesh(axes):
    stacked = jax.device_put(measure(LABELS, LOGITS, WEIGHTS), NamedSharding(mesh_of(8, axes), PartitionSpec("d")))
    assert_loss(stacked.sum(), expected())
    assert_loss(stacked[3].sum(), expected(3))


def test_states_of_pmap():
    measured = jax.pmap(lambda y, z, w: HEAD.measure(y, z, weights=w))(*(x[:, 0] for x in (LABELS, LOGITS, WEIGHTS)))
    assert_loss(measured[5], expected((5, 0)))
    assert_loss(measured.sum(), expected((slice(None), 0)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m[0], r"Given \[0\] of one state.*compute"),
        (lambda m: m["auc"], r"Given \['auc'\] of one state.*compute\(\)"),
        (lambda m: m[None][1], r"metrics\[1\] is not there.*\(1,\)"),
        (lambda m: m[None][-2], r"metrics\[-2\] is not there"),
        (lambda m: m[None][0, 0], r"Given \[\[0, 0\]\]|Given \[\(0, 0\)\]"),
        (lambda m: m[None][True], "arrays of integers or slices"),
        (lambda m: m[None][np.array([0.0])], "arrays of integers or slices"),
        (lambda m: m.sum(0), "Given axis=0 of one state"),
        (lambda m: m[None].sum(1), r"Given axis=1 of states \(1,\)"),
        (lambda m: m[None].sum(cast(Any, "d")), "Given axis='d'"),
        (lambda m: m[None].curve("roc"), r"metrics.sum\(\), or take one, metrics\[0\]"),
    ],
)
def test_what_is_not_there_is_refused(call, message):
    metrics = jax.device_get(jh.BinaryClassHead().metrics())
    with pytest.raises(ValueError, match=message) as caught:
        call(metrics)
    assert len(str(caught.value)) <= 400


def test_one_state_is_not_a_list():
    """By Python's own protocol, as of a number."""
    for call in (len, iter):
        with pytest.raises(TypeError, match=r"metrics.compute\(\)"):
            call(HEAD.metrics())


def test_arrays_choose_several():
    stacked = measure(LABELS, LOGITS, WEIGHTS)
    best = jax.numpy.argmin(stacked.sum(1).state[:, 0, 0])
    for index in (best, np.array(int(best)), np.int32(best)):
        assert_loss(stacked[index].sum(), expected(int(best)))
    assert_loss(stacked[[0, 2]].sum(), expected([0, 2]))
    assert_loss(stacked[np.array([1, 5])].sum(), expected([1, 5]))
    assert_loss(jax.jit(lambda metrics, i: metrics[i])(stacked, 3).sum(), expected(3))
    for index in (np.float32(1), True, [], [9], ...):
        with pytest.raises(ValueError, match="metrics\\["):
            stacked[index]
