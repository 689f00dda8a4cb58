"""Training steps over the zoo, against differences of the float64 oracles; what a network carries; padding; cost."""

import dataclasses
import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from benchmarks.report import cost
from benchmarks.train_step import by_hand
from jax.sharding import NamedSharding, PartitionSpec
from zoo import ENGINE, ZOO, Entry, OrdinalHead, PriorCorrectedHead, marked

import jaxheads as jh
from jaxheads.numerics import duals

N, INPUTS, RATE = 24, 3, 0.1
KEY = jax.random.key(0)
ENTRIES = marked(ZOO, quick=("binary", "nested", "sequential", "ordinal"))


# Some of optax's own arithmetic mixes dtypes.
mixed_dtypes = functools.partial(jax.numpy_dtype_promotion, "standard")


def linear(params, features):
    return features["x"] @ params["w"]


def draw(entry: Entry, n: int = N) -> tuple[dict[str, Any], dict[str, Any]]:
    """A batch with uneven masks and weights, nothing at all in every fourth row; and parameters."""
    rng = np.random.default_rng(7)
    weights = rng.choice(np.array([0, 0.3, 1, 2.5], np.float32), n)
    where = rng.random(n) < 0.6
    where[::4] = False
    weights[1:3] = 0
    x = rng.normal(size=(n, INPUTS)).astype(np.float32)
    w = rng.normal(size=(INPUTS, entry.head.logits_dimension)).astype(np.float32) / 2
    return {"features": {"x": x}, "labels": entry.labels(rng, (n,)), "weights": weights, "where": where}, {"w": w}


def by_differences(function, tree: Any) -> tuple[float, Any]:
    """A float64 function of a pytree and its gradient, by central differences."""
    leaves, structure = jax.tree.flatten(jax.tree.map(lambda x: np.asarray(x, np.float64), tree))
    gradient = [np.zeros_like(leaf) for leaf in leaves]
    for k, leaf in enumerate(leaves):
        for i in np.ndindex(leaf.shape):
            ends = []
            for sign in (1, -1):
                moved = [x.copy() for x in leaves]
                moved[k][i] += sign * 1e-5
                ends.append(function(structure.unflatten(moved)))
            gradient[k][i] = (ends[0] - ends[1]) / 2e-5
    return function(structure.unflatten(leaves)), structure.unflatten(gradient)


def expected_step(entry: Entry, batch: dict[str, Any], params: dict[str, Any]) -> tuple[float, Any, Any]:
    """Loss, and parameters of network and head after a step of gradient descent."""
    head_params = entry.head.init(jax.random.split(KEY)[0])

    def loss(tree):
        logits = batch["features"]["x"].astype(np.float64) @ tree["params"]["w"]
        inner = _merged(tree["head"], entry.head.init_state())
        return entry.expected_loss(batch["labels"], logits, batch["weights"], batch["where"], inner)

    value, gradient = by_differences(loss, {"params": params, "head": head_params})

    def moved(path, x, g):
        if duals.is_multiplier(path):
            # Upwards, each by the gradient of its own Lagrangian.
            return np.maximum(np.asarray(x) + RATE * g * g.size, 0)
        return np.asarray(x) - RATE * g

    after = jax.tree_util.tree_map_with_path(moved, {"params": params, "head": head_params}, gradient)
    return value, after["params"], after["head"]


def _merged(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {k: _merged(a.get(k, {}), b[k]) if isinstance(b.get(k), dict) else b.get(k, a.get(k)) for k in {*a, *b}}


def created(entry_head: jh.Head, params: Any, optimizer: Any, **more: Any) -> jh.TrainState:
    return jh.TrainState.create(params=params, optimizer=optimizer, head=entry_head, key=KEY, **more)


def close(actual: Any, expected: Any, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


# How a batch is parted is the engine's: of its heads alone.
@pytest.mark.parametrize(
    ("entry", "micro_batches"),
    [
        pytest.param(*each.values, n, id=f"{n}-{each.id}", marks=each.marks if n == 1 else pytest.mark.slow)
        for n in (1, 4)
        for each in ENTRIES
        if n == 1 or each.id in ENGINE
    ],
)
def test_a_step_is_the_oracles(entry, micro_batches):
    """The first of four micro-batches holds nothing that counts."""
    batch, params = draw(entry)
    optimizer = entry.optimizer(optax.sgd(RATE))
    make = functools.partial(jh.make_train_step, entry.head, linear, optimizer, micro_batches=micro_batches)
    if entry.whole and micro_batches > 1:
        with pytest.raises(ValueError, match="pairs across the parts of a batch would be lost"):
            make()
        return
    step: Any = jax.jit(make(), donate_argnums=0)
    state = created(entry.head, params, optimizer)
    loss, after, head_after = expected_step(entry, batch, params)
    state, out = step(state, batch)
    np.testing.assert_allclose(out.loss, loss, rtol=2e-5)
    close(state.params, after)
    close(state.head_params, head_after)
    assert state.step == 1
    logits = batch["features"]["x"].astype(np.float64) @ params["w"]
    first = {**entry.head.init(jax.random.key(0)), **entry.head.init_state()}
    expected = entry.expected_metrics(batch["labels"], logits, batch["weights"], batch["where"], first)
    values = out.metrics.compute()
    for key, value in expected.items():
        if "auc" not in key:
            np.testing.assert_allclose(values[key], value, rtol=2e-5, err_msg=key)
    for _ in range(2):
        state, out = step(state, batch)
    assert step._cache_size() == 1
    assert np.isfinite(out.loss)


UNCERTAIN = jh.MultiHead(
    [
        jh.BinaryClassHead(name="b"),
        jh.MultiHead([jh.RegressionHead(name="r", loss_reduction="sum"), OrdinalHead(3, name="o")]),
    ],
    [1.0, 0.5],
    weighting="uncertainty",
)


def test_micro_batches_under_learned_weights():
    """A step in parts moves everything as one of the whole batch does, what is added once a batch included."""
    rng = np.random.default_rng(1)
    labels = {
        "b": rng.integers(0, 2, N),
        "r_o": {"r": rng.normal(size=N).astype(np.float32), "o": rng.integers(0, 3, N)},
    }
    batch = {
        "features": {"x": rng.normal(size=(N, INPUTS)).astype(np.float32)},
        "labels": labels,
        "where": {"b": rng.random(N) < 0.5, "r_o": {"r": np.arange(N) < 7, "o": np.arange(N) == 20}},
        "weights": {"b": rng.choice([0.0, 0.3, 2.0], N).astype(np.float32)},
    }
    params = {"w": rng.normal(size=(INPUTS, 3)).astype(np.float32)}
    head_params = UNCERTAIN.init(jax.random.split(KEY)[0])

    def loss(tree):
        z = batch["features"]["x"].astype(np.float64) @ tree["params"]["w"]
        s, cuts = tree["head"]["log_variances"], tree["head"]["r_o"]["o"]["cuts"]
        entry = next(entry for entry in ZOO if entry.name == "ordinal")
        weights, there = batch["weights"]["b"].astype(np.float64), batch["where"]["b"]
        binary = ((np.logaddexp(0, z[:, 0]) - labels["b"] * z[:, 0]) * weights)[there].sum() / there.sum()
        squares = ((z[:, 1] - labels["r_o"]["r"]) ** 2)[:7].sum()
        ordinal = entry.losses(labels["r_o"]["o"][20:21, None], z[20:21, 2:], {"cuts": cuts}).sum()
        both = np.exp(-s) * [binary, 0.5 * (squares + ordinal)] + s / 2
        return both.sum()

    value, gradient = by_differences(loss, {"params": params, "head": head_params})
    optimizer = optax.sgd(RATE)
    for micro_batches in (1, 6):
        made = jh.make_train_step(UNCERTAIN, linear, optimizer, micro_batches=micro_batches, with_metrics=False)
        step = jax.jit(made)
        state, out = step(created(UNCERTAIN, params, optimizer), batch)
        np.testing.assert_allclose(out.loss, value, rtol=2e-5)
        close(state.params["w"], params["w"] - RATE * gradient["params"]["w"])
        close(state.head_params, jax.tree.map(lambda x, g: x - RATE * g, head_params, gradient["head"]))


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("how", ["jit", "shard_map", "unchecked", "pmap"])
def test_devices_do_not_matter(how, micro_batches):
    for name in ("nested", "multi_head", "survival"):
        entry = next(entry for entry in ZOO if entry.name == name)
        batch, params = draw(entry, 48)
        optimizer = optax.sgd(RATE)
        loss, after, head_after = expected_step(entry, batch, params)
        step = jh.make_train_step(
            entry.head, linear, optimizer, axis_name=None if how == "jit" else "d", micro_batches=micro_batches
        )
        state = created(entry.head, params, optimizer)
        mesh, specs = jax.make_mesh((8,), ("d",)), PartitionSpec()
        if how == "pmap":
            cut = jax.tree.map(lambda x: x.reshape(8, 6, *x.shape[1:]), batch)
            state, out = jax.pmap(step, "d", in_axes=(None, 0), out_axes=None)(state, cut)
        else:
            if how != "jit":
                step = jax.shard_map(
                    step, mesh=mesh, in_specs=(specs, PartitionSpec("d")), out_specs=specs, check_vma=how == "shard_map"
                )
            batch_there = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("d")))
            state, out = jax.jit(step)(jax.device_put(state, NamedSharding(mesh, specs)), batch_there)
        np.testing.assert_allclose(out.loss, loss, rtol=2e-5)
        close(state.params, after)
        close(state.head_params, head_after)
        logits = batch["features"]["x"].astype(np.float64) @ params["w"]
        expected = entry.expected_metrics(batch["labels"], logits, batch["weights"], batch["where"], entry.params())
        for key in (key for key in expected if "average_loss" in key):
            np.testing.assert_allclose(out.metrics.compute()[key], expected[key], rtol=2e-5)


def test_running_state_moves_with_every_batch():
    head, optimizer = PriorCorrectedHead(), optax.sgd(RATE)
    rng = np.random.default_rng(2)
    x, labels = rng.normal(size=(N, INPUTS)).astype(np.float32), rng.integers(0, 2, N)
    where = np.arange(N) >= 5
    evaluate = jax.jit(jh.make_eval_step(head, linear))
    for micro_batches in (1, 3):
        made = jh.make_train_step(head, linear, optimizer, micro_batches=micro_batches, with_metrics=False)
        step = jax.jit(made)
        state = created(head, {"w": np.zeros((INPUTS, 1), np.float32)}, optimizer)
        for _ in range(2):
            state, _ = step(state, {"features": {"x": x}, "labels": labels, "where": where})
        positives, seen = np.asarray(state.head_state["counts"], np.float64).sum(-1)
        assert (positives, seen) == (1 + 2 * labels[5:].sum(), 2 + 2 * (N - 5))
        # Evaluation reads it and leaves it alone.
        out = evaluate(state, {"features": {"x": x}, "labels": labels})
        z = x.astype(np.float64) @ np.asarray(state.params["w"], np.float64) + np.log(positives / (seen - positives))
        np.testing.assert_allclose(out.loss, (np.logaddexp(0, z[:, 0]) - labels * z[:, 0]).mean(), rtol=1e-5)


class Network(nn.Module):
    """Batch norm and dropout."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.75)(x)
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=not train)(x))


def network_apply(params, features, *, train, model_state, rngs):
    variables = {"params": params, **model_state}
    if not train:
        return Network().apply(variables, features["x"], train=False)
    return Network().apply(variables, features["x"], train=True, mutable=list(model_state), rngs=rngs)


@functools.cache
def network_variables() -> Any:
    return jax.jit(lambda: Network().init(jax.random.key(1), jnp.zeros((1, INPUTS)), train=False))()


def network_state(optimizer: Any) -> jh.TrainState:
    variables = network_variables()
    statistics = {"batch_stats": variables["batch_stats"]}
    return created(jh.RegressionHead(), variables["params"], optimizer, model_state=statistics)


def test_batch_statistics_and_dropout_are_carried():
    optimizer, head = optax.sgd(0.0), jh.RegressionHead()
    rng = np.random.default_rng(3)
    x, labels = rng.normal(2, 3, size=(N, INPUTS)).astype(np.float32), rng.normal(size=N).astype(np.float32)
    batch = {"features": {"x": x}, "labels": labels}
    step: Any = jax.jit(jh.make_train_step(head, network_apply, optimizer, with_metrics=False))
    first, out = step(network_state(optimizer), batch)
    statistics: Any = first.model_state["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(statistics["mean"], 0.25 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics["var"], 0.75 + 0.25 * x.astype(np.float64).var(0), rtol=1e-5)
    second, again = step(first, batch)
    # Nothing was learned: only another dropout makes another loss; and the same state makes the same one.
    losses = [float(each.loss) for each in (out, again, step(network_state(optimizer), batch)[1])]
    assert losses[0] == losses[2] != losses[1]
    assert step._cache_size() == 1
    kernel, bias = (np.asarray(second.params["Dense_0"][k], np.float64) for k in ("kernel", "bias"))
    mean, var = (np.asarray(second.model_state["batch_stats"]["BatchNorm_0"][k], np.float64) for k in ("mean", "var"))
    predict, evaluate = jh.make_predict_step(head, network_apply), jh.make_eval_step(head, network_apply)
    predictions, evaluated = jax.jit(lambda state: (predict(state, batch), evaluate(state, batch).loss))(second)
    expected = (x - mean) / np.sqrt(var + 1e-5) @ kernel + bias
    np.testing.assert_allclose(predictions["predictions"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(evaluated, ((expected[:, 0] - labels) ** 2).mean(), rtol=1e-4)


def test_devices_average_statistics_and_drop_apart():
    optimizer, head = optax.sgd(0.0), jh.RegressionHead()
    rng = np.random.default_rng(4)
    x = np.tile(rng.normal(size=(4, INPUTS)).astype(np.float32), (8, 1))
    batch = {"features": {"x": x}, "labels": np.zeros(32, np.float32)}
    step = jh.make_train_step(head, network_apply, optimizer, axis_name="d", with_metrics=False)
    mesh, specs = jax.make_mesh((8,), ("d",)), PartitionSpec()
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(specs, PartitionSpec("d")), out_specs=specs))
    there = jax.device_put(network_state(optimizer), NamedSharding(mesh, specs))
    state, out = mapped(there, jax.device_put(batch, NamedSharding(mesh, PartitionSpec("d"))))
    np.testing.assert_allclose(state.model_state["batch_stats"]["BatchNorm_0"]["mean"], 0.25 * x.mean(0), rtol=1e-5)
    # The same four rows on each device: with the same dropout the loss would be that of one device.
    alone = jax.jit(jh.make_train_step(head, network_apply, optimizer, with_metrics=False))
    small = {"features": {"x": x[:4]}, "labels": np.zeros(4, np.float32)}
    assert float(out.loss) != float(alone(network_state(optimizer), small)[1].loss)


HEAD = jh.RegressionHead()


def steps_of(optimizer: Any, n: int = 1, **more: Any) -> list[tuple[jh.TrainState, Any]]:
    """States and what was told, as NumPy; without metrics, if they are not asked for."""
    step = jax.jit(jh.make_train_step(HEAD, more.pop("apply", linear), optimizer, **{"with_metrics": False, **more}))
    state, done = created(HEAD, {"w": np.full((INPUTS, 1), 0.5, np.float32)}, optimizer), []
    x = np.eye(INPUTS, dtype=np.float32)
    for _ in range(n):
        state, out = step(state, {"features": {"x": x}, "labels": np.array([1.0, 2.0, 3.0], np.float32)})
        done.append((state, out))
    return jax.device_get(done)


# Of x = the identity and labels (1, 2, 3) at w = 0.5: the gradient of the mean of (w - y)^2.
GRADIENT = 2 * (0.5 - np.array([[1.0], [2.0], [3.0]])) / 3


def test_optimizers_get_what_they_want():
    clipped = steps_of(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(RATE)))[0][0].params["w"]
    np.testing.assert_allclose(clipped, 0.5 - RATE * GRADIENT / np.linalg.norm(GRADIENT), rtol=1e-6)
    frozen = optax.masked(optax.set_to_zero(), {"w": True})
    assert (steps_of(optax.chain(optax.sgd(RATE), frozen), 3)[-1][0].params["w"] == 0.5).all()
    # With a rate of 0 the loss stands still: after two steps without progress the scale is halved.
    plateau = optax.chain(optax.sgd(0.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=2))
    with mixed_dtypes():
        assert [float(state.opt_state[1].scale) for state, _ in steps_of(plateau, 4)] == [1.0, 1.0, 0.5, 0.5]

    def update(updates, state, params=None, **seen):
        return updates, seen

    optimizer = optax.GradientTransformationExtraArgs(lambda params: {"value": np.float32(0), "grad": params}, update)
    ((state, _),) = steps_of(optimizer)
    np.testing.assert_allclose(state.opt_state["value"], ((0.5 - np.array([1, 2, 3])) ** 2).mean(), rtol=1e-6)
    np.testing.assert_allclose(state.opt_state["grad"]["w"], GRADIENT, rtol=1e-6)


SEARCHES = {
    "lbfgs": optax.lbfgs(),
    "backtracking": optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=15, store_grad=True)
    ),
    "alone": optax.scale_by_backtracking_linesearch(max_backtracking_steps=15, increase_factor=4.0),
}
SEARCH_HEAD = jh.BinaryClassHead(loss_reduction="mean")


def search_data() -> tuple[dict[str, Any], dict[str, Any]]:
    """Uneven masks and weights; no row of the first of four parts exists."""
    batch, params = draw(next(entry for entry in ZOO if entry.name == "binary"), 32)
    return batch, params


def noisy_linear(params: Any, features: Any, *, rngs: Any) -> Any:
    """Noise that is another one for another key: a search that drew its own would see another loss."""
    noise = jax.random.normal(rngs["dropout"], (INPUTS, 1))
    return features["x"] @ (params["w"] + 0.3 * noise)


def search_by_hand(optimizer: Any, noise: Any, steps: int = 3) -> tuple[list[float], np.ndarray]:
    """Without the library: the loss written out, optax' own recipe."""
    batch, params = search_data()
    x, labels = batch["features"]["x"], jnp.asarray(batch["labels"], jnp.float32).reshape(-1)
    weights = jnp.asarray(batch["weights"] * batch["where"], jnp.float32)

    @jax.jit
    def step(params, opt_state, noise):
        def loss(params):
            z = (x @ (params["w"] + 0.3 * noise))[:, 0]
            return jnp.sum(weights * (jnp.logaddexp(0.0, z) - labels * z)) / jnp.sum(weights)

        value, grad = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grad, opt_state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), opt_state, value

    params, losses = jax.tree.map(jnp.asarray, params), []
    opt_state = optimizer.init(params)
    for i in range(steps):
        params, opt_state, value = step(params, opt_state, noise(i))
        losses.append(float(value))
    return losses, np.asarray(params["w"])


@pytest.mark.parametrize(
    "name", ["backtracking", *(pytest.param(x, marks=pytest.mark.slow) for x in ("lbfgs", "alone"))]
)
def test_line_searches_are_those_by_hand(name):
    """Also with dropout: the loss of the search is that of the step."""
    optimizer = SEARCHES[name]
    batch, params = search_data()
    key = jax.random.split(KEY)[1]

    def noise(i: int) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, i), 0), (INPUTS, 1))

    with mixed_dtypes():
        losses, w = search_by_hand(optimizer, noise)
        step = jax.jit(jh.make_train_step(SEARCH_HEAD, noisy_linear, optimizer, with_metrics=False))
        state = created(SEARCH_HEAD, params, optimizer)
        for loss in losses:
            state, out = step(state, batch)
            np.testing.assert_allclose(out.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("micro_batches", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "how", ["unchecked", *(pytest.param(how, marks=pytest.mark.slow) for how in ("jit", "shard_map", "pmap"))]
)
@pytest.mark.parametrize("name", ["backtracking", pytest.param("lbfgs", marks=pytest.mark.slow)])
def test_line_searches_over_devices(name, how, micro_batches):
    """Each device has other rows, with other masks. All must search on the same loss, with the same gradient."""
    optimizer = SEARCHES[name]
    batch, params = search_data()
    axis_name = None if how == "jit" else "d"
    step: Any = jh.make_train_step(
        SEARCH_HEAD, linear, optimizer, axis_name=axis_name, micro_batches=micro_batches, with_metrics=False
    )
    mesh, specs = jax.make_mesh((8,), ("d",)), PartitionSpec()
    with mixed_dtypes():
        losses, w = search_by_hand(optimizer, lambda i: jnp.zeros((INPUTS, 1)), 2)
        state = created(SEARCH_HEAD, params, optimizer)
        if how == "pmap":
            batch = jax.tree.map(lambda x: x.reshape(8, 4, *x.shape[1:]), batch)
            step = jax.pmap(step, "d", in_axes=(None, 0), out_axes=None)
        else:
            batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("d")))
            state = jax.device_put(state, NamedSharding(mesh, specs))
            if how != "jit":
                checked = how == "shard_map"
                in_specs = (specs, PartitionSpec("d"))
                step = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=specs, check_vma=checked)
            step = jax.jit(step)
        for loss in losses:
            state, out = step(state, batch)
            np.testing.assert_allclose(out.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_line_search_over_micro_batches():
    batch, params = search_data()
    optimizer, after = SEARCHES["lbfgs"], []
    with mixed_dtypes():
        for micro_batches in (1, 4):
            made = jh.make_train_step(SEARCH_HEAD, linear, optimizer, micro_batches=micro_batches, with_metrics=False)
            step, state = jax.jit(made), created(SEARCH_HEAD, params, optimizer)
            state, _ = step(state, batch)
            state, out = step(state, batch)
            after.append((out.loss, state.params["w"]))
    chex.assert_trees_all_close(after[1], after[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_line_search_in_create_estimator_spec():
    batch, params = search_data()
    optimizer = SEARCHES["lbfgs"]

    @jax.jit
    def step(params, opt_state):
        spec = SEARCH_HEAD.create_estimator_spec(
            **{key: batch[key] for key in ("features", "labels", "weights", "where")},
            mode="train",
            logits=lambda params: linear(params, batch["features"]),
            optimizer=optimizer,
            trainable_variables=params,
            opt_state=opt_state,
        )
        return spec.train_op.params, spec.train_op.opt_state, spec.loss

    with mixed_dtypes():
        losses, w = search_by_hand(optimizer, lambda i: jnp.zeros((INPUTS, 1)), 2)
        opt_state = optimizer.init(params)
        for loss in losses:
            params, opt_state, value = step(params, opt_state)
            np.testing.assert_allclose(value, loss, rtol=1e-5)
    np.testing.assert_allclose(params["w"], w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "match"),
    [
        (optax.MultiSteps(optax.lbfgs(), 2), r"cannot be inside optax.MultiSteps(.|\n)*micro_batches=n"),
        (optax.masked(optax.lbfgs(), {"w": True, "b": False}), "must move all parameters(.|\n)*optax.masked"),
        (
            optax.partition({"search": optax.lbfgs(), "sgd": optax.sgd(RATE)}, {"w": "search", "b": "sgd"}),
            "must move all parameters(.|\n)*optax.partition",
        ),
    ],
)
def test_line_searches_that_see_another_loss_are_refused(optimizer, match):
    batch, params = search_data()
    step = jh.make_train_step(SEARCH_HEAD, lambda p, features: linear(p, features) + p["b"], optimizer)
    with mixed_dtypes(), pytest.raises(ValueError, match=match):
        jax.eval_shape(step, created(SEARCH_HEAD, {**params, "b": np.zeros((1, 1), np.float32)}, optimizer), batch)


def test_a_line_search_over_spread_parameters_is_refused():
    mesh, optimizer = jax.make_mesh((8,), ("d",)), SEARCHES["alone"]
    batch, _ = search_data()
    state = created(SEARCH_HEAD, {"w": np.zeros((8, 1), np.float32)}, optimizer)

    def apply(params, features):
        return features["x"] @ jax.lax.all_gather(params["w"], "d", tiled=True)[:INPUTS]

    step = jh.make_train_step(SEARCH_HEAD, apply, optimizer, axis_name="d", with_metrics=False)
    spread = dataclasses.replace(jax.tree.map(lambda _: PartitionSpec(), state), params={"w": PartitionSpec("d")})
    in_specs = (spread, PartitionSpec("d"))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=(spread, PartitionSpec()))
    with mixed_dtypes(), pytest.raises(ValueError, match="parameters that are spread over axis_name='d'"):
        jax.eval_shape(
            mapped,
            jax.device_put(state, jax.tree.map(lambda s: NamedSharding(mesh, s), spread)),
            jax.device_put(batch, NamedSharding(mesh, PartitionSpec("d"))),
        )


def test_regularization_is_added_once():
    for micro_batches in (1, 3):
        given = {"micro_batches": micro_batches, "regularization_fn": lambda p: 0.1 * jnp.sum(p["w"] ** 2)}
        ((state, out),) = steps_of(optax.sgd(RATE), with_metrics=True, **given)
        np.testing.assert_allclose(out.loss, ((0.5 - np.array([1, 2, 3])) ** 2).mean() + 0.1 * 0.75, rtol=1e-6)
        np.testing.assert_allclose(state.params["w"], 0.5 - RATE * (GRADIENT + 0.1), rtol=1e-6)
        np.testing.assert_allclose(out.metrics.compute()["regularization_loss"], 0.075, rtol=1e-6)


def test_a_bfloat16_network_has_a_float32_loss():
    def half(params, features):
        return features["x"].astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)

    with mixed_dtypes():
        ((state, out),) = steps_of(optax.adam(RATE), apply=half)
    assert out.loss.dtype == state.params["w"].dtype == state.opt_state[0].mu["w"].dtype == jnp.float32
    # 0.5 and the labels are bfloat16 numbers, so the loss is exact.
    np.testing.assert_allclose(out.loss, ((0.5 - np.array([1, 2, 3])) ** 2).mean(), rtol=1e-6)


def test_metrics_are_made_if_asked_for():
    ((_, out),) = steps_of(optax.sgd(RATE), with_metrics=False)
    assert out.metrics is None


CONSTANT = jnp.ones(1)


class ConstantHead(jh.Head):
    """What it learns and keeps begins as one array that somebody else holds."""

    scale: jax.Array = jh.learned(lambda head, key: CONSTANT)
    first: jax.Array = jh.running(lambda head: CONSTANT)
    second: jax.Array = jh.running(lambda head: CONSTANT)
    logits_dimension = 1

    def losses(self, labels, logits):
        return (labels - jnp.expand_dims(self.scale, 0) * logits) ** 2


def test_what_a_head_makes_is_copied_too():
    made = jh.make_train_step(ConstantHead(), linear, optax.sgd(RATE), with_metrics=False)
    step = jax.jit(made, donate_argnums=0)
    state = created(ConstantHead(), {"w": np.ones((INPUTS, 1), np.float32)}, optax.sgd(RATE))
    state, _ = step(state, {"features": {"x": np.eye(INPUTS, dtype=np.float32)}, "labels": np.zeros(INPUTS)})
    assert CONSTANT[0] == 1
    # Labels 0, logits 1: the gradient of the mean of s^2 is 2.
    np.testing.assert_allclose(state.head_params["scale"], 1 - 2 * RATE, rtol=1e-6)


def test_many_micro_batches_of_bfloat16_parameters_add_up():
    """512 gradients of 1 / 512 each, that bfloat16 would add up to 1 / 2."""
    n = 512
    batch = {"features": {"x": np.ones((n, 1), jnp.bfloat16)}, "labels": np.full(n, -0.5, np.float32)}
    step = jax.jit(jh.make_train_step(HEAD, linear, optax.sgd(1.0), micro_batches=n, with_metrics=False))
    with mixed_dtypes():
        state, _ = step(created(HEAD, {"w": np.zeros((1, 1), jnp.bfloat16)}, optax.sgd(1.0)), batch)
    assert state.params["w"].dtype == jnp.bfloat16
    assert state.params["w"].tolist() == [[-1.0]]


def test_keys_are_there_in_micro_batches_too():
    def noisy(params, features, *, rngs):
        return linear(params, features) + 0 * jax.random.normal(rngs["dropout"], (1, 1))

    for micro_batches in (1, 3):
        ((state, _),) = steps_of(optax.sgd(RATE), apply=noisy, micro_batches=micro_batches)
        np.testing.assert_allclose(state.params["w"], 0.5 - RATE * GRADIENT, rtol=1e-6)


def test_optimizers_in_wrappers_get_what_they_want():
    plateau = optax.chain(optax.sgd(RATE), optax.contrib.reduce_on_plateau(factor=0.5, patience=2))
    with mixed_dtypes():
        first, second = steps_of(optax.MultiSteps(plateau, 2), 2)
    assert (first[0].params["w"] == 0.5).all()
    np.testing.assert_allclose(second[0].params["w"], 0.5 - RATE * GRADIENT, rtol=1e-6)


def keep_parameters(updates: Any, state: Any, params: Any = None) -> Any:
    return updates, params


def test_a_state_of_its_own_arrays():
    """Optimizers that keep the parameters share their buffers, which could not be donated twice."""
    mine = {"w": jnp.full((INPUTS, 1), 0.5)}
    optimizer, head = optax.GradientTransformation(lambda params: params, keep_parameters), HEAD
    step = jax.jit(jh.make_train_step(head, linear, optimizer, with_metrics=False), donate_argnums=0)
    state = created(head, mine, optimizer)
    state, _ = step(state, {"features": {"x": np.eye(INPUTS, dtype=np.float32)}, "labels": np.ones(INPUTS)})
    np.testing.assert_array_equal(mine["w"], np.full((INPUTS, 1), 0.5))
    weak = created(head, {"w": 0.5, "b": jnp.full((), 0.5)}, optax.sgd(RATE))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(weak.params))


QUICK_PADDED = (("binary", ()), ("survival", ()), ("sequential", (4,)))


@pytest.mark.parametrize(
    ("name", "lead"),
    [
        pytest.param(name, lead, marks=[] if (name, lead) in QUICK_PADDED else pytest.mark.slow)
        for name in ("binary", "survival", "multi_head", "sequential")
        for lead in ((), (4,))
    ],
)
def test_padded_rows_do_not_exist(name, lead):
    entry = next(entry for entry in ZOO if entry.name == name)
    rng = np.random.default_rng(5)
    x = rng.normal(size=(5, *lead, INPUTS)).astype(np.float32)
    w = rng.normal(size=(INPUTS, entry.head.logits_dimension)).astype(np.float32)
    labels = entry.labels(rng, (5, *lead))
    padded = jh.pad_batch({"features": {"x": x}, "labels": labels}, 8)
    assert padded["where"].shape == (8,)
    state = created(entry.head, {"w": w}, optax.sgd(RATE))
    out = jax.jit(jh.make_eval_step(entry.head, linear))(state, padded)
    expected = entry.expected_loss(labels, x.astype(np.float64) @ w)
    np.testing.assert_allclose(out.loss, expected, rtol=2e-5)


def test_padding_keeps_masks_and_refuses_what_does_not_fit():
    batch = {"features": {"name": np.array(["a", "b"])}, "labels": {"u": np.arange(2), "v": np.arange(2)}}
    padded = jh.pad_batch({**batch, "where": {"v": np.array([False, True])}}, 3)
    assert padded["features"]["name"].tolist() == ["a", "b", "b"]
    assert padded["where"]["u"].tolist() == [True, True, False]
    assert padded["where"]["v"].tolist() == [False, True, False]
    assert jh.pad_batch(batch, 2)["where"].tolist() == [True, True]
    for size, match in ((1, "Given 2 rows"), (0, "at least 1"), (2.5, "at least 1")):
        with pytest.raises(ValueError, match=match):
            jh.pad_batch(batch, size)  # pyright: ignore[reportArgumentType]  # what is tested
    with pytest.raises(ValueError, match=r"where is given for \['x'\](.|\n)*\['u', 'v'\]"):
        jh.pad_batch({**batch, "where": {"x": np.array([True, True])}}, 3)
    frame = jh.pad_batch({"features": pd.DataFrame({"a": [1, 2], "b": [0.5, 1.5]}), "labels": [1, 0]}, 3)
    assert frame["features"]["a"].tolist() == [1, 2, 2]
    assert frame["features"]["a"].dtype.kind == "i"
    assert frame["labels"].tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match=r"same number of rows(.|\n)*\(3,\)"):
        jh.pad_batch({**batch, "weights": np.ones(3)}, 4)
    with pytest.raises(ValueError, match="Given 0 rows"):
        jh.pad_batch({"features": np.zeros((0, 2)), "labels": np.zeros(0)}, 4)


def nullable(values: Any, dtype: str) -> Any:
    return pd.Series(values, dtype=dtype)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (nullable([True, None, False], "boolean"), [True, True, False, False]),
        (nullable([1, None, 0], "Int64"), [1, 1, 0, 0]),
        (nullable([None, 1, 0], "Int8"), [1, 1, 0, 0]),
        ([1, None, 0], [1, 1, 0, 0]),
        (np.array([1, pd.NA, 0], object), [1, 1, 0, 0]),
    ],
)
@pytest.mark.parametrize(
    "masked", ["where", *(pytest.param(x, marks=pytest.mark.slow) for x in ("nullable where", "weights"))]
)
def test_padding_of_missing_labels_that_are_hidden(labels, expected, masked):
    """They have the dtype of the others, and the loss of a step is that of the rows that exist."""
    missing = np.array([x is None or x is pd.NA for x in labels])
    hidden = {"weights": np.float32(~missing)} if masked == "weights" else {"where": ~missing}
    if masked == "nullable where":
        hidden["where"] = nullable(hidden["where"].tolist(), "boolean")
    batch = {"features": {"x": np.arange(9, dtype=np.float32).reshape(3, 3) / 8}, "labels": labels, **hidden}
    padded = jh.pad_batch(batch, 4)
    assert padded["labels"].tolist() == expected
    assert padded["labels"].dtype.kind == ("b" if expected[0] is True else "i")
    assert padded["where"].dtype == np.bool_
    step = jax.jit(jh.make_eval_step(jh.BinaryClassHead(loss_reduction="mean"), linear))
    w = np.array([[1.0], [-0.5], [0.25]], np.float32)
    out = step(created(jh.BinaryClassHead(), {"w": w}, optax.sgd(RATE)), padded)
    z = (batch["features"]["x"].astype(np.float64) @ w)[~missing, 0]
    np.testing.assert_allclose(out.loss, np.mean(np.logaddexp(0, z) - np.array([1, 0]) * z), rtol=1e-6)
    with pytest.raises(ValueError, match=r"labels must not be missing(.|\n)*row [01], 1 in all(.|\n)*notna"):
        jh.pad_batch({**batch, "where": None, "weights": np.ones(3)}, 4)


def test_padding_of_missing_values_elsewhere():
    x = {"count": nullable([1, None, 3], "Int64"), "flag": nullable([None, True, False], "boolean")}
    by_head = {"a": nullable([None, 1, 0], "Int64"), "b": nullable([1, None, 0], "boolean")}
    where = {"a": np.array([False, True, True]), "b": np.array([True, False, True])}
    padded = jh.pad_batch({"features": pd.DataFrame(x), "labels": by_head, "where": where}, 4)
    assert padded["labels"]["a"].tolist() == [1, 1, 0, 0]
    assert padded["labels"]["b"].tolist() == [True, True, False, False]
    # Each row exists for a head, so what features lack is NaN.
    np.testing.assert_array_equal(padded["features"]["count"], [1, np.nan, 3, 3])
    np.testing.assert_array_equal(padded["features"]["flag"], [np.nan, 1, 0, 0])
    entries = np.array([[1, None], [0, 1], [None, 0]], object)
    there = np.array([[True, False], [True, True], [False, True]])
    padded = jh.pad_batch({"features": np.zeros((3, 1)), "labels": entries, "where": there}, 3)
    assert padded["labels"][there].tolist() == [1, 0, 1, 0]
    with pytest.raises(ValueError, match=r"labels\['a'\] must not be missing"):
        jh.pad_batch({"features": x, "labels": by_head, "where": {"b": where["b"]}}, 4)
    with pytest.raises(ValueError, match=r"where must not be missing(.|\n)*where.fillna\(False\)"):
        jh.pad_batch({"features": x, "labels": np.zeros(3), "where": nullable([True, None, True], "boolean")}, 4)


def test_padding_and_placing_of_random_keys():
    keys = jax.random.split(jax.random.key(3, impl="rbg"), 3)
    padded = jh.pad_batch({"features": {"noise": keys}, "labels": np.zeros(3)}, 8)
    noise = padded["features"]["noise"]
    assert noise.dtype == keys.dtype
    expected = np.asarray(jax.random.key_data(keys))
    np.testing.assert_array_equal(jax.random.key_data(noise), expected[[0, 1, 2, 2, 2, 2, 2, 2]])
    (again,) = jh.training.lockstep([{"features": {"noise": keys}, "labels": np.zeros(3)}], 8)
    np.testing.assert_array_equal(jax.random.key_data(again["features"]["noise"]), jax.random.key_data(noise))
    there = jh.training.shard_batch(padded, jax.make_mesh((8,), ("d",)))["features"]["noise"]
    assert len(there.sharding.device_set) == 8
    np.testing.assert_array_equal(jax.random.key_data(there), jax.random.key_data(noise))


@pytest.mark.parametrize(
    ("head", "labels", "refused"),
    [
        (jh.BinaryClassHead(), nullable([True, None, False], "boolean"), "Given nan"),
        (jh.BinaryClassHead(label_vocabulary=("no", "yes")), nullable([1, None, 0], "Int64"), "Given nan"),
        (jh.MultiClassHead(3), nullable([2, None, 0], "Int64"), "Given a missing value"),
        (jh.MultiClassHead(3), [2, None, 0], "Given a missing value"),
        (jh.RegressionHead(), nullable([1, None, -4], "Int64"), "Given nan"),
        (jh.RegressionHead(), nullable([1.5, None, -4], "Float64"), "Given nan"),
        (jh.RegressionHead(), pd.DataFrame({"y": nullable([1, None, -4], "Int64")}), "Given nan"),
    ],
)
def test_missing_labels_where_masked(head, labels, refused):
    logits = np.linspace(-1, 2, 3 * head.logits_dimension, dtype=np.float32).reshape(3, -1)
    where = np.array([True, False, True])
    values = np.asarray(
        [x for x in np.ravel(np.asarray(labels, object)) if isinstance(x, (bool, int, float)) and x == x]
    )
    expected = head.loss(values, logits[where])
    np.testing.assert_allclose(head.loss(labels, logits, where=where), expected, rtol=1e-6)
    encoded = head.encode_labels(labels, where)
    loss = jax.jit(lambda labels, where: head.loss(labels, logits, where=where))
    np.testing.assert_allclose(loss(encoded, where), expected, rtol=1e-6)
    assert np.isnan(loss(encoded, np.ones(3, bool)))
    with pytest.raises(ValueError, match=refused):
        head.loss(labels, logits)


def test_what_does_not_fit_is_refused():
    head, optimizer = HEAD, optax.sgd(RATE)
    make = functools.partial(jh.make_train_step, head)
    x = np.zeros((4, INPUTS), np.float32)
    state = created(head, {"w": np.zeros((INPUTS, 1), np.float32)}, optimizer)
    good = {"features": {"x": x}, "labels": np.zeros(4, np.float32)}
    for bad, match in (("sgd", r"optax.*'sgd'"), (None, "optax.*None"), (optax.sgd, "optax.*function")):
        with pytest.raises(ValueError, match=match):
            make(linear, bad)
        with pytest.raises(ValueError, match=match):
            created(head, {}, bad)
    with pytest.raises(ValueError, match="apply_fn must be a function"):
        make({"w": 1}, optimizer)  # pyright: ignore[reportArgumentType]  # what is tested
    with pytest.raises(ValueError, match=r"micro_batches.*Given 0"):
        make(linear, optimizer, micro_batches=0)
    with pytest.raises(ValueError, match=r"micro_batches=3 must divide(.|\n)*\(4, 3\)|\(4,\)"):
        jax.eval_shape(make(linear, optimizer, micro_batches=3), state, good)
    for batch, match in (
        ({"features": x}, r"keys \['features', 'labels'\]"),
        ({**good, "w": x}, r"none but.*'w'"),
        (x, "Given a ndarray"),
    ):
        with pytest.raises(ValueError, match=match):
            make(linear, optimizer)(state, batch)  # pyright: ignore[reportArgumentType]  # what is tested
    with pytest.raises(ValueError, match="provide labels"):
        jax.eval_shape(make(linear, optimizer), state, {**good, "labels": None})
    with_state = dataclasses.replace(state, model_state={"mean": np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match="no argument of that name"):
        jax.eval_shape(make(linear, optimizer), with_state, good)
    wider = make(lambda params, features, model_state: (linear(params, features), {"mean": jnp.zeros(3)}), optimizer)
    for given in (state, with_state):
        with pytest.raises(ValueError, match=r"same structure(.|\n)*float32\[3\]"):
            jax.eval_shape(wider, given, good)
    without = make(lambda params, features, model_state: linear(params, features), optimizer)
    with pytest.raises(ValueError, match=r"must return \(logits, model_state\)(.|\n)*would be lost"):
        jax.eval_shape(without, with_state, good)
    for owned in ({"top": {"learned": {"cuts": np.zeros(3)}}}, {"learned": {"cuts": {"value": np.zeros(3)}}}):
        with pytest.raises(ValueError, match="owns_head=False"):
            created(OrdinalHead(4), owned, optimizer)
    with pytest.raises(ValueError, match="Given 3 values"):
        jax.eval_shape(make(lambda params, features: (1, 2, 3), optimizer), state, good)
    with pytest.raises(ValueError, match=r"params must be a pytree of arrays. Given a str at \['w'\]"):
        created(head, {"w": "x"}, optimizer)


def test_a_head_that_learns_shares_the_optimizer():
    """Its own transformation for the head's part of what the optimizer sees."""
    head = OrdinalHead(4)
    optimizer = optax.partition(
        {"net": optax.sgd(RATE), "head": optax.set_to_zero()}, {"params": "net", "head": "head"}
    )
    batch, params = draw(next(entry for entry in ZOO if entry.name == "ordinal"))
    state = created(head, params, optimizer)
    assert jax.tree.structure(state.trainable) == jax.tree.structure({"params": {"w": 0}, "head": {"cuts": 0}})
    after, _ = jax.jit(jh.make_train_step(head, linear, optimizer, with_metrics=False))(state, batch)
    close(after.head_params, head.init(jax.random.split(KEY)[0]), rtol=0, atol=0)
    assert (np.asarray(after.params["w"]) != params["w"]).all()


# One pass over the rows serves loss and metrics. Of these heads XLA then keeps columns that a step by hand makes twice:
# fewer operations, and a few more bytes. These are the largest ratios of jax 0.10.1 and 0.12.0.
OPERATIONS = {"multi_class": 0.9963, "multi_head": 0.9529}
BYTES = {"multi_class": 1.0185, "multi_head": 1.0072}


@pytest.mark.all_passes
@pytest.mark.parametrize(
    "name", ["multi_class", *(pytest.param(name, marks=pytest.mark.slow) for name in ("binary", "multi_head"))]
)
def test_a_step_costs_what_one_by_hand_costs(name):
    entry = next(entry for entry in ZOO if entry.name == name)
    batch, params = draw(entry, 64)
    optimizer = optax.adam(RATE)
    state = created(entry.head, params, optimizer)
    bare = state.params, state.head_params, state.opt_state, state.key, state.step, batch
    with mixed_dtypes():
        made = jax.jit(jh.make_train_step(entry.head, linear, optimizer)).lower(state, batch).compile()
        hand = jax.jit(by_hand(entry.head, linear, optimizer)).lower(*bare).compile()
    if name == "binary":
        assert cost(made).flops == cost(hand).flops > 0
        assert cost(made).accessed == cost(hand).accessed > 0
    else:
        assert 0 < cost(made).flops <= OPERATIONS[name] * cost(hand).flops
        assert 0 < cost(made).accessed <= BYTES[name] * cost(hand).accessed


def equations(jaxpr: Any) -> int:
    """How many operations a traced program has, with those in its branches and loops."""
    inside = [jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")) for equation in jaxpr.eqns]
    nested = [getattr(x, "jaxpr", x) for leaves in inside for x in leaves if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
    return len(jaxpr.eqns) + sum(map(equations, nested))


# How many operations a traced step may have. Tracing is most of what a first step costs, and operations are most of
# tracing; `benchmarks/tracing.py` measures the time.
# Of the heads in "multi_head" one learns: copies of live rows are some 40 operations.
@pytest.mark.parametrize(("name", "budget"), [("binary", 420), ("multi_head", 1000)])
def test_a_traced_step_is_small(name, budget):
    entry = next(entry for entry in ZOO if entry.name == name)
    optimizer = optax.sgd(RATE)
    batch, params = draw(entry, 64)
    step = jh.make_train_step(entry.head, linear, optimizer)
    traced = jax.make_jaxpr(step)(created(entry.head, params, optimizer), batch)
    assert 0.8 * budget < equations(traced.jaxpr) <= budget
