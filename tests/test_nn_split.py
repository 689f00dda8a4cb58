"""`jh.nn.split`: flax models of both kinds, trained as by hand; what they carry, drop and refuse."""

from typing import Any

import chex
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import P, mesh_of
from flax import nnx

import jaxheads as jh

KEY, N, D = jax.random.key(0), 8, 3
HEAD, OPTIMIZER = jh.RegressionHead(), optax.sgd(0.1)
RNG = np.random.default_rng(0)
X = RNG.normal(2, 3, size=(N, D)).astype(np.float32)
BATCH: dict[str, Any] = {"features": {"x": X}, "labels": RNG.normal(size=N).astype(np.float32)}
# As users of flax's older way still do.
pytestmark = pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
BOTH = pytest.mark.parametrize("kind", ["linen", "nnx"])


class LinenNet(linen.Module):
    rate: float = 0.0

    @linen.compact
    def __call__(self, x, deterministic: bool):
        x = linen.BatchNorm(use_running_average=deterministic, momentum=0.75)(x)
        self.sow("intermediates", "normed", x)
        return linen.Dense(1)(linen.Dropout(self.rate, deterministic=deterministic)(x))


class NnxNet(nnx.Module):
    def __init__(self, rate: float = 0.0):
        rngs = nnx.Rngs(0)
        self.norm, self.dense = nnx.BatchNorm(D, momentum=0.75, rngs=rngs), nnx.Linear(D, 1, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        x = self.norm(x)
        self.sow(nnx.Intermediate, "normed", x)
        return self.dense(self.dropout(x))


def parts_of(kind: str, rate: float = 0.0) -> jh.nn.Split:
    if kind == "nnx":
        return jh.nn.split(NnxNet(rate), inputs="x")
    return jh.nn.split(LinenNet(rate), inputs=lambda features: features["x"], key=KEY, features=BATCH["features"])


def state_of(parts: jh.nn.Split) -> jh.TrainState:
    given: dict[str, Any] = {"optimizer": OPTIMIZER, "head": HEAD, "key": KEY}
    return jh.TrainState.create(params=parts.params, model_state=parts.model_state, **given)


def values(tree: Any) -> dict[str, np.ndarray]:
    """Arrays by the last parts of their names."""
    leaves = jax.tree.leaves_with_path(tree)
    return {str(getattr(path[-1], "key", path[-1])): np.asarray(x, np.float64) for path, x in leaves}


@BOTH
def test_a_model_is_trained_as_by_hand(kind):
    """Batch norm over the batch in training, its running statistics in evaluation; in float64."""
    parts = parts_of(kind)
    state, before = state_of(parts), values(parts.params)
    step: Any = jax.jit(jh.make_train_step(HEAD, parts.apply_fn, OPTIMIZER, with_metrics=False), donate_argnums=0)
    state, out = step(state, BATCH)
    x = X.astype(np.float64)
    mean, var = x.mean(0), x.var(0)
    normed = (x - mean) / np.sqrt(var + 1e-5)
    error = (normed @ before["kernel"])[:, 0] - BATCH["labels"]
    np.testing.assert_allclose(out.loss, (error**2).mean(), rtol=1e-5)
    after, statistics = values(state.params), values(state.model_state)
    kernel = before["kernel"] - 0.1 * 2 * normed.T @ error[:, None] / N
    np.testing.assert_allclose(after["kernel"], kernel, rtol=1e-4, atol=1e-6)
    assert sorted(statistics) == ["mean", "var"]
    np.testing.assert_allclose(statistics["mean"], 0.25 * mean, rtol=1e-5)
    np.testing.assert_allclose(statistics["var"], 0.75 + 0.25 * var, rtol=1e-5)
    predicted = jax.jit(jh.make_predict_step(HEAD, parts.apply_fn))(state, BATCH)["predictions"]
    normed = (x - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5) * after["scale"]
    # The biases of both layers have moved too.
    biases = [np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state.params) if "bias" in str(path)]
    shift = next(b for b in biases if b.shape == (D,)) @ after["kernel"] + next(b for b in biases if b.shape == (1,))
    np.testing.assert_allclose(predicted, normed @ after["kernel"] + shift, rtol=1e-4, atol=1e-5)
    state, _ = step(state, BATCH)
    assert step._cache_size() == 1


@pytest.mark.parametrize("kind", ["nnx", pytest.param("linen", marks=pytest.mark.slow)])
def test_dropout_is_another_one_in_each_step_and_on_each_device(kind):
    parts = parts_of(kind, 0.5)
    frozen = optax.sgd(0.0)
    made = jh.make_train_step(HEAD, parts.apply_fn, frozen, with_metrics=False)
    step, state = jax.jit(made), state_of(parts)
    second, first = step(state, BATCH)
    losses = [float(out.loss) for out in (first, step(second, BATCH)[1], step(state, BATCH)[1])]
    assert losses[0] == losses[2] != losses[1]
    # The same rows on both devices: dropped alike, they would have the same loss.
    mapped = jax.shard_map(
        jh.make_train_step(HEAD, parts.apply_fn, frozen, axis_name="d", with_metrics=False),
        mesh=mesh_of(2, "auto"),
        in_specs=(P(), P("d")),
        out_specs=P(),
    )
    twice = jax.tree.map(lambda x: np.concatenate([x, x]), BATCH)
    after, out = jax.jit(mapped)(state, twice)

    @jax.jit
    def logits_on(device):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(state.key, 0), device), 0)
        given: dict[str, Any] = {"train": True, "model_state": state.model_state, "rngs": {"dropout": key}}
        return parts.apply_fn(state.params, BATCH["features"], **given)[0]

    logits = [logits_on(device) for device in range(2)]
    each = [((np.asarray(z)[:, 0] - BATCH["labels"]) ** 2).mean() for z in logits]
    assert abs(each[0] - each[1]) > 1e-3
    np.testing.assert_allclose(out.loss, np.mean(each), rtol=1e-5)
    chex.assert_trees_all_close(values(after.model_state), values(second.model_state), rtol=1e-5)
    evaluated = [jax.jit(jh.make_eval_step(HEAD, p.apply_fn))(state, BATCH).loss for p in (parts, parts_of(kind))]
    assert evaluated[0] == evaluated[1]


def test_a_model_without_state_has_none():
    model = nnx.Linear(D, 1, rngs=nnx.Rngs(0))
    params, model_state, apply_fn = jh.nn.split(model)
    assert model_state is None
    given: dict[str, Any] = {"train": True, "model_state": None, "rngs": None}
    np.testing.assert_allclose(apply_fn(params, X, **given), model(jnp.asarray(X)), rtol=1e-6)
    params, model_state, apply_fn = jh.nn.split(linen.Dense(1), key=KEY, features=X)
    assert model_state is None
    expected = X @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
    np.testing.assert_allclose(apply_fn(params, X, **given), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: jh.nn.split(linen.Dense(1)), r"no parameters yet(.|\n)*a Dense without key and features(.|\n)*key="),
        (lambda: jh.nn.split(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), key=KEY), "has its parameters already(.|\n)*Linear"),
        (lambda: jh.nn.split(linen.Dense), "must be an instance(.|\n)*Given the class Dense"),
        (lambda: jh.nn.split(lambda x: x), "must be an instance(.|\n)*write apply_fn"),
        (lambda: jh.nn.split(linen.Dense(1), inputs=3), "inputs must be a key(.|\n)*Given 3"),  # pyright: ignore[reportArgumentType]
        (
            lambda: jh.nn.split(linen.Dense(1), inputs="z", key=KEY, features={"x": X}),
            r"inputs='z' must be a key of the features. Given features \['x'\]",
        ),
        (
            lambda: jh.nn.split(linen.Dense(1), inputs="z", key=KEY, features=X),
            "Given features a (.|\n)*ArrayImpl|Tracer",
        ),
        (
            lambda: jax.eval_shape(
                jh.make_train_step(HEAD, parts_of("nnx", 0.5).apply_fn, OPTIMIZER, rngs=()),
                state_of(parts_of("nnx", 0.5)),
                BATCH,
            ),
            "NnxNet has random streams(.|\n)*gives no keys",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


class Deep(nnx.Module):
    """Layers in a list, whose keys are integers; more than ten, so that their order as text is another one."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(11)])
        self.norm, self.last = nnx.BatchNorm(D, rngs=rngs), nnx.Linear(D, 1, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.last(self.norm(x))


def test_a_model_of_many_layers_goes_on_from_a_checkpoint(tmp_path):
    parts = jh.nn.split(Deep(), inputs="x")
    model, step = Deep(), jh.make_train_step(HEAD, parts.apply_fn, OPTIMIZER, with_metrics=False)
    model.eval()
    predict = jh.make_predict_step(HEAD, parts.apply_fn)
    found, expected = jax.jit(lambda state: (predict(state, BATCH)["predictions"], model(X)))(state_of(parts))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    given: dict[str, Any] = {"batches": [BATCH], "progress": False}
    jh.fit(state_of(parts), step, directory=tmp_path, **given)
    again = jh.fit(state_of(parts), step, directory=tmp_path, epochs=2, **given)
    whole = jh.fit(state_of(parts), step, epochs=2, **given)
    chex.assert_trees_all_equal(again.state.trainable, whole.state.trainable)
    chex.assert_trees_all_equal(again.state.model_state, whole.state.model_state)


def test_states_of_nnx_go_on_from_a_checkpoint_too(tmp_path):
    """Parameters as `nnx.split` gives them, for networks that are merged by hand."""
    graphdef, params = nnx.split(nnx.Linear(D, 1, rngs=nnx.Rngs(0)))

    def apply(params, features):
        return nnx.merge(graphdef, params, copy=True)(features["x"])

    step = jh.make_train_step(HEAD, apply, OPTIMIZER, with_metrics=False)
    given: dict[str, Any] = {"batches": [BATCH], "directory": tmp_path, "progress": False}
    state = jh.TrainState.create(params=params, optimizer=OPTIMIZER, head=HEAD, key=KEY)
    jh.fit(state, step, **given)
    again = jh.fit(state, step, epochs=2, **given)
    whole = jh.fit(state, step, epochs=2, **{**given, "directory": None})
    chex.assert_trees_all_equal(again.state.params, whole.state.params)
    wider = nnx.state(nnx.Linear(D, 2, rngs=nnx.Rngs(0)))
    other = jh.TrainState.create(params=wider, optimizer=OPTIMIZER, head=HEAD, key=KEY)
    with pytest.raises(ValueError, match=r"another network: params/bias(/value)? is float32\[1\] there"):
        jh.fit(other, step, epochs=3, **given)


def test_names_decide_not_places():
    """A checkpoint gives the numbers of a list back as texts, which have another order: "10" is before "2"."""
    model = nnx.Sequential(*[nnx.Linear(D, D, rngs=nnx.Rngs(i)) for i in range(12)])
    params, model_state, apply_fn = jh.nn.split(model)
    given: dict[str, Any] = {"train": False, "model_state": model_state, "rngs": None}
    restored = {"layers": {str(i): layer for i, layer in params["layers"].items()}}
    np.testing.assert_array_equal(apply_fn(restored, X, **given), apply_fn(params, X, **given))
    lacking = {"layers": {i: layer for i, layer in params["layers"].items() if i != 3}}
    for other in ({"zzz": params["layers"]}, lacking, None):
        with pytest.raises(ValueError, match="must have the names"):
            apply_fn(other, X, **given)
