"""What a training step does on request: norms, skipped steps, scales of the loss; and what it costs without."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from benchmarks.report import cost
from benchmarks.train_step import by_hand
from devices import P, mesh_of

import jaxheads as jh

KEY, N, D = jax.random.key(0), 16, 3
HEAD = jh.MultiHead(
    [jh.BinaryClassHead(name="late"), jh.RegressionHead(name="minutes")], weighting="uncertainty", head_weights=[1, 0.5]
)
# Some of optax's own arithmetic mixes dtypes.
mixed_dtypes = functools.partial(jax.numpy_dtype_promotion, "standard")


def schedule(count):
    return 0.5 / (jnp.asarray(count, jnp.float32) + 1)


INJECTED = optax.inject_hyperparams(optax.sgd)(schedule, momentum=0.5)


def network(params, features):
    return features @ params["w"]


@functools.cache
def batch_of() -> dict[str, Any]:
    """A batch of which the second device of four has no row that exists; one of these rows has a NaN as its label."""
    rng = np.random.default_rng(0)
    labels = {"late": rng.integers(0, 2, N), "minutes": rng.normal(size=N).astype(np.float32)}
    where = rng.random(N) < 0.7
    where[4:8] = False
    labels["minutes"][5] = np.nan
    return {
        "features": rng.normal(size=(N, D)).astype(np.float32),
        "labels": labels,
        "where": {"late": where, "minutes": where},
    }


def first_state(optimizer: Any = INJECTED, **given: Any) -> jh.TrainState:
    params = {"w": np.linspace(-1, 1, D * 2, dtype=np.float32).reshape(D, 2)}
    return jh.TrainState.create(params=params, optimizer=optimizer, head=HEAD, key=KEY, **given)


def gradients(w: np.ndarray, s: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The loss and both gradients, in float64: `exp(-s) * (binary, squares / 2) + s / 2`, summed."""
    batch = batch_of()
    there = batch["where"]["late"]
    x, y, t = (np.asarray(a, np.float64)[there] for a in (batch["features"], *batch["labels"].values()))
    z, n = x @ w, there.sum()
    binary = (np.logaddexp(0, z[:, 0]) - y * z[:, 0]).mean()
    squares = ((z[:, 1] - t) ** 2).mean()
    errors = np.stack([1 / (1 + np.exp(-z[:, 0])) - y, z[:, 1] - t], 1) * np.exp(-s) / n
    both = np.exp(-s) * [binary, squares / 2]
    return (both + s / 2).sum(), x.T @ errors, 0.5 - both


def norm(*arrays: np.ndarray) -> float:
    return np.sqrt(sum((x**2).sum() for x in arrays))


def compiled(step: Any, way: str, devices: int = 4) -> Any:
    """A step as users run it, `(state, batch) -> (state, out)`; of `pmap`, the values of all devices must be equal."""
    if way == "jit":
        return jax.jit(step)
    if way == "pmap":
        mapped = jax.pmap(step, "d", in_axes=(None, 0), devices=jax.devices()[:devices])

        def call(state, batch):
            cut = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
            state, out = mapped(state, cut)
            key, whole = state.key[0], jax.device_get((state.__class__(**{**vars(state), "key": None}), out))
            for leaf in jax.tree.leaves(whole):
                np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
            state, out = jax.tree.map(lambda x: x[0], whole)
            return jh.TrainState(**{**vars(state), "key": key}), out

        return call
    specs = {"in_specs": (P(), P("d")), "out_specs": P()}
    return jax.jit(jax.shard_map(step, mesh=mesh_of(devices, "auto"), check_vma=way == "shard_map", **specs))


@pytest.mark.parametrize(("way", "micro_batches"), [("jit", 2), ("pmap", 1), ("shard_map", 2), ("unchecked", 1)])
def test_norms_are_those_of_the_whole_batch(way, micro_batches):
    given: dict[str, Any] = {"axis_name": None if way == "jit" else "d", "micro_batches": micro_batches}
    step = compiled(jh.make_train_step(HEAD, network, INJECTED, with_norms=True, with_metrics=False, **given), way)
    state = first_state()
    w, s = (np.asarray(x, np.float64) for x in (state.params["w"], state.head_params["log_variances"]))
    moved: Any = (np.zeros_like(w), np.zeros_like(s))
    for i in range(2):
        loss, *grads = gradients(w, s)
        moved = [0.5 * m + g for m, g in zip(moved, grads, strict=True)]
        updates = [-0.5 / (i + 1) * m for m in moved]
        w, s = w + updates[0], s + updates[1]
        state, out = step(state, batch_of())
        expected = loss, norm(*grads), norm(w, s), norm(*updates), 0.5 / (i + 1)
        found = out.loss, out.grad_norm, out.param_norm, out.update_norm, out.learning_rate
        np.testing.assert_allclose(found, expected, rtol=2e-5)
    assert {x.dtype for x in found} == {np.dtype(np.float32)}


def test_norms_of_parameters_that_are_spread_over_devices():
    head = jh.RegressionHead()

    def gathering(params, features):
        return features @ jax.lax.all_gather(params["w"], "d", tiled=True)

    w, x = np.array([[1.0], [2.0], [3.0], [4.0]], np.float32), np.eye(4, dtype=np.float32)
    optimizer = optax.sgd(0.5)
    state = jh.TrainState.create(params={"w": w}, optimizer=optimizer, head=head, key=KEY)
    spread = jax.tree.map(lambda leaf: P("d") if jnp.shape(leaf) == (4, 1) else P(), state)
    step = jh.make_train_step(head, gathering, optimizer, axis_name="d", with_norms=True, with_metrics=False)
    mapped = jax.shard_map(
        step,
        mesh=mesh_of(2, "auto"),
        in_specs=(spread, {"features": P("d"), "labels": P("d")}),
        out_specs=(spread, P()),
    )
    _, out = jax.jit(mapped)(state, {"features": x, "labels": np.zeros(4, np.float32)})
    # The mean of w^2: a gradient of w / 2, an update of -w / 4.
    np.testing.assert_allclose([out.grad_norm, out.param_norm, out.update_norm], norm(w) * np.array([0.5, 0.75, 0.25]))
    assert out.learning_rate is None


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [
        (optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.adam)(0.25)), 0.25),
        (optax.adam(schedule), None),
        (optax.partition({"a": INJECTED, "b": INJECTED}, {"params": "a", "head": "b"}), None),
    ],
)
def test_the_learning_rate_is_found_or_none(optimizer, rate):
    step = jh.make_train_step(HEAD, network, optimizer, with_norms=True, with_metrics=False)
    with mixed_dtypes():
        found = jax.jit(step)(first_state(optimizer), batch_of())[1].learning_rate
    assert found == rate


def test_norms_of_narrow_numbers_are_summed_in_float32():
    """In bfloat16, 10,000 squares of 1 would stop at 256; in float16, the square of 300 is infinite."""
    from jaxheads.engine.optimizing import global_norm

    ones, large = jnp.ones(10_000, jnp.bfloat16), jnp.full(4, 300, jnp.float16)
    np.testing.assert_allclose(jax.jit(global_norm)({"a": ones, "b": large}), np.sqrt(10_000 + 4 * 9e4), rtol=1e-6)


@pytest.mark.all_passes
def test_what_is_not_asked_for_costs_nothing():
    head, optimizer = jh.RegressionHead(), optax.adam(0.1)

    def linear(params, features):
        return features["x"] @ params["w"]

    params = {"w": np.zeros((D, 1), np.float32)}
    state = jh.TrainState.create(params=params, optimizer=optimizer, head=head, key=KEY)
    batch = {"features": {"x": np.zeros((64, D), np.float32)}, "labels": np.zeros(64, np.float32)}
    bare = state.params, state.head_params, state.opt_state, state.key, state.step, batch
    with mixed_dtypes():
        made = jax.jit(jh.make_train_step(head, linear, optimizer)).lower(state, batch).compile()
        hand = jax.jit(by_hand(head, linear, optimizer)).lower(*bare).compile()
    assert cost(made).flops == cost(hand).flops > 0
    assert cost(made).accessed == cost(hand).accessed > 0
