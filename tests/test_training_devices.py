"""A training step over devices where a network, a head or a layout is out of the ordinary."""

import dataclasses
import functools
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import P, mesh_of
from jax.sharding import AxisType, NamedSharding

import jaxheads as jh

OPTIMIZER = optax.sgd(0.1, momentum=0.9)
HEAD = jh.MultiHead(
    [jh.BinaryClassHead(name="late"), jh.RegressionHead(name="minutes")], weighting="uncertainty", head_weights=[1, 0.5]
)


def network(params, features):
    return features @ params["w"] + params["b"][None]


def decay(params):
    return [0.1 * jnp.sum(params["w"] ** 2), 0.01 * jnp.sum(params["b"] ** 2)]


def batch_of(n=16):
    rng = np.random.default_rng(0)
    labels = {"late": rng.integers(0, 2, n), "minutes": rng.normal(size=n).astype(np.float32)}
    where = {"minutes": rng.random(n) < 0.4}
    return {"features": rng.normal(size=(n, 3)).astype(np.float32), "labels": labels, "where": where}


def first_state():
    params = {"w": np.ones((3, 2), np.float32), "b": np.array([0.5, -0.5], np.float32)}
    return jh.TrainState.create(params=params, optimizer=OPTIMIZER, head=HEAD, key=jax.random.key(0))


def make_step(axis_name=None, apply_fn=network, micro_batches=1):
    given: dict[str, Any] = {"axis_name": axis_name, "micro_batches": micro_batches}
    step = jh.make_train_step(HEAD, apply_fn, OPTIMIZER, regularization_fn=decay, with_metrics=False, **given)

    def call(state, batch):
        with jax.numpy_dtype_promotion("standard"):  # some of optax's own arithmetic mixes dtypes
            return step(state, batch)

    return call


@functools.cache
def alone():
    return jax.jit(make_step())(first_state(), batch_of())


def assert_same(found, expected):
    """Compares what was learned, the state of the optimizer and the loss."""
    trees = [jax.device_get((state.trainable, state.opt_state, out.loss)) for state, out in (found, expected)]
    chex.assert_trees_all_close(*trees, rtol=2e-6, atol=1e-6)


def split(batch, n):
    return jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch)


@pytest.mark.parametrize(
    ("way", "micro_batches"),
    [
        pytest.param(way, n, marks=[] if (way, n) in (("vma", 2), ("pmap", 1)) else [pytest.mark.slow])
        for way in ("vmap", "pmap", "vma", "no_vma", "two_axes")
        for n in (1, 2)
    ],
)
def test_learned_weights_and_regularization(way, micro_batches):
    """What is added once a batch, and what is learned outside of the sums, has the gradient of one device."""
    step, state, batch = make_step("d", micro_batches=micro_batches), first_state(), batch_of()
    if way == "vmap":
        state, out = jax.jit(jax.vmap(step, in_axes=(None, 0), axis_name="d"))(state, split(batch, 4))
    elif way == "pmap":
        mapped = jax.pmap(step, in_axes=(None, 0), axis_name="d", devices=jax.devices()[:4])
        state, out = mapped(state, split(batch, 4))
    elif way == "two_axes":
        mesh = jax.make_mesh((2, 2), ("d", "e"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
        step = make_step(("d", "e"), micro_batches=micro_batches)
        mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(("d", "e"))), out_specs=P())
        state, out = jax.jit(mapped)(state, batch)
    else:
        specs = {"in_specs": (P(), P("d")), "out_specs": P()}
        mapped = jax.shard_map(step, mesh=mesh_of(4, "auto"), check_vma=way == "vma", **specs)
        state, out = jax.jit(mapped)(state, batch)
    if way in ("vmap", "pmap"):
        state, out = jax.device_get((dataclasses.replace(state, key=None), out))
        for leaf in jax.tree.leaves((state, out)):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
        state, out = jax.tree.map(lambda x: x[0], (state, out))
    assert_same((state, out), alone())


def test_a_parameter_spread_over_the_axis_keeps_its_own_gradient():
    """As when each device holds a part and gathers the rest: under the default check its type tells."""

    def gathering(params, features):
        return network({**params, "w": jax.lax.all_gather(params["w"], "d", axis=1, tiled=True)}, features)

    def sharded(x):
        return P(None, "d") if jnp.shape(x) == (3, 2) else P()

    def step(state, batch):
        # Its regularization, too, is of the part that a device holds; the network's is enough here.
        made = jh.make_train_step(HEAD, gathering, OPTIMIZER, axis_name="d", with_metrics=False)
        with jax.numpy_dtype_promotion("standard"):
            return made(state, batch)

    plain = jh.make_train_step(HEAD, network, OPTIMIZER, with_metrics=False)
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = jax.jit(plain)(first_state(), batch_of())
    specs, mesh = jax.tree.map(sharded, first_state()), mesh_of(2, "auto")
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(specs, P("d")), out_specs=(specs, P()))
    state, _ = jax.jit(mapped)(first_state(), batch_of())
    np.testing.assert_allclose(state.params["w"], expected.params["w"], rtol=2e-6, atol=1e-6)
    assert state.params["w"].sharding.is_equivalent_to(NamedSharding(mesh, P(None, "d")), 2)


def test_a_state_stacked_by_device_is_refused_where_devices_would_drift_apart():
    def stacked(state, batch):
        state, _ = make_step("d")(jax.tree.map(lambda x: x[0], state), batch)
        return jax.tree.map(lambda x: x[None], state)

    state = jax.jit(lambda state: jax.tree.map(lambda x: jnp.stack([x] * 4), state))(first_state())
    specs: dict[str, Any] = {"in_specs": P("d"), "out_specs": P("d")}
    with pytest.raises(ValueError, match=r"stacked by device(.|\n)*in_specs=P\(\)"):
        jax.jit(jax.shard_map(stacked, mesh=mesh_of(4, "auto"), **specs))(state, batch_of())
    unchecked = jax.jit(jax.shard_map(stacked, mesh=mesh_of(4, "auto"), check_vma=False, **specs))(state, batch_of())
    np.testing.assert_allclose(np.asarray(unchecked.params["w"])[3], alone()[0].params["w"], rtol=2e-6, atol=1e-6)


def test_a_network_may_loop_over_its_parameters_alone():
    """Their types are left as they are: the carry of such a loop begins and ends the same on all devices."""

    def looping(params, features):
        carry, _ = jax.lax.scan(lambda c, w: (c + w, None), jnp.zeros(2), params["w"])
        return network(params, features) + carry[None]

    mapped = jax.shard_map(make_step("d", looping), mesh=mesh_of(4, "auto"), in_specs=(P(), P("d")), out_specs=P())
    plain = make_step(None, looping)
    assert_same(*(jax.jit(step)(first_state(), batch_of()) for step in (mapped, plain)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_step()({}, batch_of()), "takes a TrainState(.|\n)*Given a dict"),
        (lambda: jh.make_eval_step(HEAD, network)({}, batch_of()), "takes a TrainState"),
        (
            lambda: jh.make_train_step(cast(Any, jh.BinaryClassHead), network, OPTIMIZER),
            "the class BinaryClassHead: make one",
        ),
        (
            lambda: make_step()(
                dataclasses.replace(first_state(), params={"w": np.ones((3, 2), np.float32)}), batch_of()
            ),
            r"opt_state does not belong(.|\n)*optimizer.init",
        ),
        (
            lambda: jh.make_predict_step(HEAD.bind(HEAD.init(jax.random.key(0))), network),
            "must be unbound(.|\n)*Given a bound MultiHead",
        ),
    ],
)
def test_what_is_no_state_and_no_head_is_refused_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()
