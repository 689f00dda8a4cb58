"""Counters that do not stop, over a billion examples and any number of devices: states against exact rational sums."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import P, mesh_of
from jax.sharding import NamedSharding

import jaxheads as jh
from jaxheads.metrics.reading import STAMP
from jaxheads.numerics import pairs

pytestmark = pytest.mark.rounding

ROWS, TIMES = 2**16, 15_259  # a billion examples


def batches(n, rows, weights=(0.1, 0.3, 1.0, 2.7)):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(n, rows, 1)).astype(np.float32)
    labels = rng.integers(0, 2, (n, rows, 1))
    return labels, logits, rng.choice(np.asarray(weights, np.float32), (n, rows, 1))


@functools.partial(jax.jit, static_argnums=2)
def added_in_turns(state, states, times):
    """The state, and so many others added to it, one after the other."""
    return jax.lax.scan(lambda s, i: (pairs.add(s, states[i % len(states)]), None), state, jnp.arange(times))[0]


def exactly(state):
    """The rational numbers that the pairs of a state stand for."""
    return [sum((Fraction(float(x)) for x in pair), Fraction(0)) for pair in np.asarray(state)]


def test_means_of_a_billion_examples_are_right_to_1e_12():
    """Sixteen different batches in turns, scanned; against the rational sum of what each batch measured.

    What a batch itself measures is float32: its own rounding, 1e-8 of a mean, is not of this test.
    """
    head = jh.RegressionHead()
    labels, logits, weights = batches(16, ROWS)
    batch = zip(labels, logits, weights, strict=True)
    measured = np.stack([head.measure(*rows, weights=weight).state for *rows, weight in batch])
    state = added_in_turns(head.metrics().state, measured, TIMES)
    often = [TIMES // 16 + (i < TIMES % 16) for i in range(16)]
    exact = [
        sum((times * Fraction(float(one[slot, 0])) for times, one in zip(often, measured, strict=True)), Fraction(0))
        for slot in range(len(state))
    ]
    for got, expected in zip(exactly(state), exact, strict=True):
        assert abs(got - expected) <= abs(expected) * Fraction(1, 10**12)
    # The mean that is read, which is a float32 at the end.
    metrics = jh.Metrics(state, head)
    mean = exact[3 + STAMP] / exact[4 + STAMP]
    assert abs(Fraction(float(metrics.compute()["prediction/mean"])) - mean) <= abs(mean) / 2**23
    # A float32 total would have lost more than that long ago.
    plain = functools.reduce(
        lambda total, i: total + measured[i % 16, :, 0], range(TIMES), np.zeros(len(state), np.float32)
    )
    assert max(abs(float(a) / float(b) - 1) for a, b in zip(plain, exact, strict=True) if b) > 1e-6


@pytest.mark.parametrize("ones", [3, 2**24])
def test_counts_are_exact_to_2_48(ones):
    """One more than a float32 can count, doubled until there are 2^47 and more of each; then one more still counts."""
    head, add = jh.BinaryClassHead(), jax.jit(pairs.add)
    one = np.asarray(head.measure(labels=[1], logits=[[0.3]]).state)
    state, count = add(add(head.metrics().state, one * np.float32(ones)), one), ones + 1
    while count < 2**47:
        state, count = add(state, state), 2 * count
    state, count = add(state, one), count + 1
    restored = np.asarray(state)  # as a checkpoint keeps it
    slots = np.flatnonzero(one[:, 0] == 1)
    assert len(slots) >= 2
    assert {exactly(restored)[slot] for slot in slots} == {count}


COUNTED = jh.BinaryClassHead(thresholds=(0.3,))


@functools.cache
def measuring(way, devices):
    """`(labels, logits, weights, where) -> metrics` over devices."""

    def measure(labels, logits, weights, where):
        found = COUNTED.measure(labels, logits, weights=weights, where=where)
        return found.psum("d") if way == "shard_map" else found

    if way == "jit":
        return jax.jit(measure)
    return jax.jit(jax.shard_map(measure, mesh=mesh_of(devices, "auto"), in_specs=P("d"), out_specs=P()))


@functools.cache
def trained(way, devices, weighted):
    """The metrics of one batch, and of three hundred, on so many devices."""
    labels, logits, weights = batches(8, 1024)
    where = np.random.default_rng(1).random(labels.shape) < 0.9
    step, rows = measuring(way, devices), NamedSharding(mesh_of(devices, "auto"), P("d"))
    given = zip(labels, logits, weights if weighted else [None] * len(weights), where, strict=True)
    found = [step(*jax.device_put(batch, rows)) for batch in given]
    states = np.stack([each.state for each in found])
    return found[0], jh.Metrics(added_in_turns(COUNTED.metrics().state, states, 300), COUNTED)


@pytest.mark.parametrize("way", ["jit", pytest.param("shard_map", marks=pytest.mark.slow)])
@pytest.mark.parametrize("devices", [8, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
def test_devices_count_alike_and_do_not_drift_apart(way, devices):
    """Counts bit by bit; means to 1e-7, after one batch and after three hundred."""
    for weighted in (False, True):
        for one, spread in zip(trained("jit", 1, weighted), trained(way, devices, weighted), strict=True):
            if not weighted:
                counts = slice(5 + STAMP, None)  # behind the means of the loss and of the prediction: the histogram
                np.testing.assert_array_equal(np.asarray(spread.state)[counts], np.asarray(one.state)[counts])
            got, expected = spread.compute(), one.compute()
            for key, value in expected.items():
                np.testing.assert_allclose(got[key], value, rtol=2e-7, atol=1e-7, err_msg=key)
