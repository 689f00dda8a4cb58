"""FTRL against TensorFlow's optimizer, the published algorithm, and in the company optax puts it in."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from goldens import loader
from jax.sharding import NamedSharding, PartitionSpec

from jaxheads.training import ftrl

CASES = loader.read("ftrl")["cases"]
BY_L1 = next(case for case in CASES if case["kwargs"].keys() == {"learning_rate", "l1_regularization_strength"})
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case["kwargs"]) or "defaults")


def f32(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)


def walk(optimizer: Any, weights: Any, gradients: Any, update: Any = None) -> Iterator[Any]:
    """The weights after each step."""
    state = optimizer.init(weights)
    for gradient in gradients:
        updates, state = (update or optimizer.update)(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
        yield weights


def assert_golden(path: Any, case: dict[str, Any]) -> None:
    """The weights after every step, and where TensorFlow's are 0, exactly 0."""
    path, expected = f32(list(path)), f32(case["w_after_step"])
    np.testing.assert_allclose(path, expected, rtol=5e-7, atol=5e-7)
    np.testing.assert_array_equal(path == 0, expected == 0)


def published(
    gradients: np.ndarray,
    weights: Sequence[float] | np.ndarray,
    alphas: float | Sequence[float],
    *,
    beta: float = 0.0,
    lambda_1: float = 0.0,
    lambda_2: float = 0.0,
    power: float = 0.5,
    n_start: float = 0.1,
    shrinkage: float = 0.0,
    stored: Callable[[float, float], float] = lambda old, new: new,
) -> np.ndarray:
    """Algorithm 1 of the paper, one coordinate after the other in double precision; a learning rate for each step.

    A gradient is first used and then counted. TensorFlow's additions are the power, where n starts, and shrinkage.
    """
    gradients, path = np.asarray(gradients, np.float64), np.empty(np.shape(gradients))
    for i, w in enumerate(map(float, weights)):
        z, n = 0.0, n_start
        for t, (g, alpha) in enumerate(zip(gradients[:, i], np.broadcast_to(alphas, len(gradients)), strict=True)):
            sigma = (math.pow(n + g * g, power) - math.pow(n, power)) / alpha
            z += g - sigma * w + 2 * shrinkage * w
            n += g * g
            new = 0.0
            if abs(z) > lambda_1:
                new = -(z - math.copysign(lambda_1, z)) / ((beta + math.pow(n, power)) / alpha + lambda_2)
            path[t, i] = w = stored(w, new)
    return path


@by_case
def test_golden(case):
    optimizer = ftrl(**case["kwargs"])
    assert_golden(walk(optimizer, f32(case["w0"]), f32(case["grads"])), case)


def draw(seed: int) -> tuple[dict[str, float], dict[str, Any], np.ndarray, np.ndarray]:
    """Hyperparameters by our names and by the paper's, weights to start from and gradients."""
    rng = np.random.default_rng(seed)
    rate, power, start = 10 ** rng.uniform(-2, 0), rng.choice([0.5, rng.uniform(0, 1)]), rng.uniform(0.01, 1)
    l1, l2, shrinkage, beta = rng.uniform(0, [1, 1, 0.3, 2]) * (rng.random(4) < 0.7)
    ours = {
        "learning_rate": rate,
        "learning_rate_power": -power,
        "initial_accumulator_value": start,
        "l1_regularization_strength": l1,
        "l2_regularization_strength": l2,
        "l2_shrinkage_regularization_strength": shrinkage,
        "beta": beta,
    }
    papers = {"alphas": rate, "power": power, "n_start": start, "lambda_1": l1, "lambda_2": 2 * l2}
    papers |= {"shrinkage": shrinkage, "beta": beta}
    # As many weights as the golden cases have: another number is other programs.
    weights, gradients = rng.normal(size=6), rng.normal(size=(15, 6)) * 10 ** rng.uniform(-3, 1, size=6)
    gradients[rng.random(gradients.shape) < 0.2] = 0.0
    return ours, papers, weights, gradients


def seeds(start: int, quick: int, end: int) -> list[Any]:
    """Seeds, the first few of them quick."""
    return [pytest.param(seed, marks=[] if seed < start + quick else pytest.mark.slow) for seed in range(start, end)]


@pytest.mark.parametrize("seed", seeds(0, 4, 6))
def test_published_algorithm(seed):
    ours, papers, weights, gradients = draw(seed)
    path = f32(list(walk(ftrl(**ours), f32(weights), f32(gradients))))
    expected = published(f32(gradients), f32(weights), **papers)
    np.testing.assert_allclose(path, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", seeds(6, 5, 16))
def test_published_algorithm_in_double_precision(seed):
    ours, papers, weights, gradients = draw(seed)
    expected = published(gradients, weights, **papers)
    with jax.enable_x64(True):
        state = ftrl(**ours).init(jnp.asarray(weights))
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float64)}
        path = np.asarray(list(walk(ftrl(**ours), weights, gradients)))
    np.testing.assert_allclose(path, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(path == 0, expected == 0)


def test_weights_minimise_the_published_objective():
    """Equation 1: gradients so far, l1, l2, and a quadratic around the weights of each step."""
    rate, l1, l2, beta, start = 0.3, 0.7, 0.2, 0.5, 0.1
    rng = np.random.default_rng(3)
    gradients = rng.normal(size=(10, 6))
    with jax.enable_x64(True):
        optimizer = ftrl(
            rate,
            l1_regularization_strength=l1,
            l2_regularization_strength=l2,
            beta=beta,
            initial_accumulator_value=start,
        )
        path = np.asarray(list(walk(optimizer, np.zeros(6), gradients)))
    roots = np.sqrt(start + np.cumsum(gradients**2, 0))
    sigmas = np.diff(roots, axis=0, prepend=math.sqrt(start)) / rate
    centres = np.concatenate([np.zeros((1, 6)), path[:-1]])

    def objective(w: np.ndarray) -> np.ndarray:
        stay = np.sum(sigmas * (w - centres) ** 2, 0) + (math.sqrt(start) + beta) / rate * w**2
        return np.sum(gradients, 0) * w + l1 * np.abs(w) + l2 * w**2 + stay / 2

    assert 0 < np.sum(path[-1] == 0) < 6
    for step in (1e-5, 1e-2, 1.0):
        assert np.all(objective(path[-1]) < objective(path[-1] + step))
        assert np.all(objective(path[-1]) < objective(path[-1] - step))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_l1_makes_exact_zeros(dtype):
    weights = jnp.asarray([0.1, -1 / 3, 1e-30, -3e30, 7.0, 1e-41], dtype)
    optimizer = ftrl(0.1, l1_regularization_strength=1e38)
    for update in (optimizer.update, jax.jit(optimizer.update)):
        (after,) = walk(optimizer, weights, [jnp.ones_like(weights)], update)
        np.testing.assert_array_equal(np.asarray(after, np.float32), 0.0)


def test_l1_finds_the_features_that_matter():
    rng = np.random.default_rng(0)
    inputs = f32(rng.normal(size=(2000, 20)))
    labels = inputs[:, :3] @ f32([2.0, -1.0, 0.5]) + f32(0.1 * rng.normal(size=2000))
    optimizer = ftrl(0.3, l1_regularization_strength=60.0)

    @jax.jit
    def fit(weights: jax.Array) -> jax.Array:
        def step(carry: Any, row: Any) -> Any:
            weights, state = carry
            x, y = row
            updates, state = optimizer.update((x @ weights - y) * x, state, weights)
            return (optax.apply_updates(weights, updates), state), None

        return jax.lax.scan(step, (weights, optimizer.init(weights)), (inputs, labels))[0][0]

    weights = np.asarray(fit(np.zeros(20, np.float32)))
    np.testing.assert_allclose(weights[:3], [2.0, -1.0, 0.5], atol=0.05)
    np.testing.assert_array_equal(weights[3:], 0.0)


def test_zero_gradients():
    optimizer = ftrl(lambda count: jnp.where(count == 1, 0.5, 0.25), l1_regularization_strength=0.4)
    path = walk(optimizer, f32([0.0, 0.3]), f32([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]), jax.jit(optimizer.update))
    root = math.sqrt(0.1 + 1.0)
    # w is a function of the sums: what it was at first is forgotten, and a new learning rate is heeded.
    np.testing.assert_allclose(next(path), [-(1 - 0.4) * 0.25 / root, 0.0], rtol=1e-6)
    np.testing.assert_allclose(next(path), [-(1 - 0.4) * 0.5 / root, 0.0], rtol=1e-6)
    np.testing.assert_allclose(next(path), [-(1 - 0.4) * 0.25 / root, -(1 - 0.4) * 0.25 / root], rtol=1e-6)


def test_accumulators_that_start_at_zero():
    with jax.debug_nans(True):
        path = walk(ftrl(0.5, initial_accumulator_value=0.0), f32([0.2, 0.2]), f32([[0.0, 3.0], [-3.0, 4.0]]))
        # The first gradient moves a weight by the learning rate, whatever its size: z = 3 - 3 w / 0.5.
        np.testing.assert_allclose(next(path), [0.0, -(3 - 3 * 0.2 / 0.5) * 0.5 / 3], rtol=1e-6)
        z = 3 - 3 * 0.2 / 0.5 + 4 + (5 - 3) * 0.3 / 0.5
        np.testing.assert_allclose(next(path), [0.5, -z * 0.5 / 5], rtol=1e-6)


def test_power_zero_is_a_fixed_rate():
    gradients = f32([[1.0, -2.0], [0.5, 4.0], [-3.0, 0.0]])
    path = f32(list(walk(ftrl(0.1, learning_rate_power=0.0), f32([0.0, 0.0]), gradients)))
    np.testing.assert_allclose(path, -0.1 * np.cumsum(gradients, 0), rtol=1e-6)


def test_schedule():
    gradients = f32(np.random.default_rng(5).normal(size=(12, 4)))
    optimizer = ftrl(optax.exponential_decay(0.4, 1, 0.8), l1_regularization_strength=0.3, beta=0.7)
    path = f32(list(walk(optimizer, np.ones(4, np.float32), gradients, jax.jit(optimizer.update))))
    expected = published(gradients, np.ones(4), [0.4 * 0.8**t for t in range(12)], lambda_1=0.3, beta=0.7)
    np.testing.assert_allclose(path, expected, rtol=1e-5, atol=1e-6)


def test_steps_are_counted_under_a_schedule_only():
    weights = jnp.ones(2)
    state: Any = ftrl(0.1).init(weights)
    assert state.count is None
    optimizer = ftrl(optax.constant_schedule(0.1))
    state = optimizer.init(weights)
    for count in range(3):
        assert (state.count, state.count.dtype) == (count, jnp.int32)
        _, state = optimizer.update(weights, state, weights)


@pytest.mark.parametrize("rate", [BY_L1["kwargs"]["learning_rate"], "schedule"])
def test_jit_is_eager_and_one_trace(rate):
    arguments = dict(BY_L1["kwargs"])
    if rate == "schedule":
        arguments["learning_rate"] = optax.constant_schedule(arguments["learning_rate"])
    optimizer = ftrl(**arguments)
    update = jax.jit(chex.assert_max_traces(optimizer.update, n=1))
    weights, gradients = f32(BY_L1["w0"]), f32(BY_L1["grads"])
    compiled = list(walk(optimizer, weights, gradients, update))
    assert_golden(compiled, BY_L1)
    np.testing.assert_allclose(compiled, list(walk(optimizer, weights, gradients)), rtol=5e-7, atol=1e-7)


def test_wide_and_deep():
    wide, deep = f32(BY_L1["w0"]), {"kernel": f32([[1.0, -2.0]]), "bias": f32([0.5])}
    tower = [jax.tree.map(lambda leaf, t=t: f32(np.sin(leaf + t)), deep) for t in range(12)]
    gradients = [{"wide": g, "deep": other} for g, other in zip(f32(BY_L1["grads"]), tower, strict=True)]
    optimizer = optax.multi_transform(
        {"ftrl": ftrl(**BY_L1["kwargs"]), "adagrad": optax.adagrad(0.1)}, {"wide": "ftrl", "deep": "adagrad"}
    )
    params = {"wide": wide, "deep": deep}
    path = list(walk(optimizer, params, gradients, jax.jit(optimizer.update)))
    assert_golden([params["wide"] for params in path], BY_L1)
    adagrad = optax.adagrad(0.1)
    for got, expected in zip(path, walk(adagrad, deep, tower, jax.jit(adagrad.update)), strict=True):
        chex.assert_trees_all_close(got["deep"], expected, rtol=1e-6)
    state = optimizer.init(params)
    assert [leaf.shape for leaf in jax.tree.leaves(optax.tree.get(state, "linears"))] == [wide.shape]


def test_masked():
    optimizer = optax.masked(ftrl(**BY_L1["kwargs"]), {"w": True, "b": False})
    params = {"w": f32(BY_L1["w0"]), "b": jnp.ones(3)}
    gradients = [{"w": g, "b": f32([1.0, 2.0, 3.0])} for g in f32(BY_L1["grads"])]
    path = list(walk(optimizer, params, gradients))
    assert_golden([params["w"] for params in path], BY_L1)
    np.testing.assert_array_equal(path[-1]["b"], 1 + 12 * f32([1.0, 2.0, 3.0]))
    assert len(jax.tree.leaves(optimizer.init(params))) == 2


def test_after_clipping():
    gradients = f32(BY_L1["grads"])
    optimizer = optax.chain(optax.clip(0.5), ftrl(0.1, l1_regularization_strength=0.05))
    path = f32(list(walk(optimizer, f32(BY_L1["w0"]), gradients)))
    expected = published(np.clip(gradients, -0.5, 0.5), BY_L1["w0"], 0.1, lambda_1=0.05)
    np.testing.assert_allclose(path, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16():
    """Weights are rounded, the sums are not: gradients too small to move a weight add up until they do."""

    def bf16(x: float) -> float:
        return float(np.asarray(x, jnp.bfloat16))

    weights = np.array([0.5, -0.25, 0.0], jnp.bfloat16)
    gradients = np.broadcast_to(np.array([0.01, -0.002, 0.03], jnp.bfloat16), (300, 3))
    optimizer = ftrl(0.5, l1_regularization_strength=0.1, initial_accumulator_value=1.0)
    update = jax.jit(optimizer.update)
    updates, state = update(gradients[0], optimizer.init(weights), weights)
    assert updates.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    path = np.asarray([np.asarray(w, np.float32) for w in walk(optimizer, weights, gradients, update)])
    expected = published(
        np.asarray(gradients, np.float32),
        np.asarray(weights, np.float32),
        0.5,
        lambda_1=0.1,
        n_start=1.0,
        stored=lambda old, new: bf16(old + bf16(new - old)),
    )
    np.testing.assert_allclose(path, expected, rtol=2**-7)


def test_gradients_and_rates_of_another_dtype():
    gradients = np.random.default_rng(9).normal(size=(5, 4)).astype(jnp.bfloat16)
    optimizer = ftrl(lambda count: jnp.bfloat16(0.25))
    path = list(walk(optimizer, np.ones(4, np.float32), gradients, jax.jit(optimizer.update)))
    assert path[-1].dtype == jnp.float32
    np.testing.assert_allclose(path, published(f32(gradients), np.ones(4), 0.25), rtol=1e-5, atol=1e-6)


def test_scalars_and_numbers():
    (first, second), gradients = BY_L1["w0"][:2], f32(BY_L1["grads"])
    optimizer = ftrl(**BY_L1["kwargs"])
    # A number of Python's and a scalar array.
    steps = [{"a": float(g[0]), "b": jnp.asarray(g[1])} for g in gradients]
    path = list(walk(optimizer, {"a": first, "b": jnp.asarray(second)}, steps))
    expected = f32(BY_L1["w_after_step"])[:, :2]
    np.testing.assert_allclose([[w["a"], w["b"]] for w in path], expected, rtol=5e-7, atol=5e-7)
    assert {jnp.shape(leaf) for leaf in path[-1].values()} == {()}


def test_none_and_nothing():
    optimizer = ftrl(**BY_L1["kwargs"])
    params = {"w": f32(BY_L1["w0"]), "static": None}
    gradients = [{"w": g, "static": None} for g in f32(BY_L1["grads"])]
    path = list(walk(optimizer, params, gradients))
    assert path[-1]["static"] is None
    assert_golden([params["w"] for params in path], BY_L1)

    state: Any = optimizer.init(params)
    nowhere: Any = {"w": None, "static": None}
    updates, after = optimizer.update(nowhere, state, params)
    assert updates == nowhere
    chex.assert_trees_all_equal(after, state)

    updates, _ = optimizer.update({}, optimizer.init({}), {})
    assert updates == {}


def test_a_nan_is_seen():
    """TensorFlow's comparison makes the weight 0, and it stays 0 whatever comes."""
    optimizer = ftrl(0.1)
    path = list(walk(optimizer, f32([0.5, 0.5]), f32([[np.nan, 1.0], [1.0, 1.0]]), jax.jit(optimizer.update)))
    np.testing.assert_array_equal(np.isnan(path), [[True, False]] * 2)
    # That of a schedule, too: it is not the 0 at which nothing moves.
    optimizer = ftrl(lambda count: jnp.where(count == 1, jnp.nan, 0.1))
    path = list(walk(optimizer, f32([0.5]), f32([[1.0], [1.0]]), jax.jit(optimizer.update)))
    np.testing.assert_array_equal(np.isnan(path), [[False], [True]])


def test_injected_hyperparameters():
    arguments = {"learning_rate": 0.1, "learning_rate_power": -0.7, "l1_regularization_strength": 0.01}
    case = next(case for case in CASES if case["kwargs"] == arguments)
    optimizer = optax.inject_hyperparams(ftrl)(**arguments)
    update = jax.jit(optimizer.update)
    weights, gradients = f32(case["w0"]), f32(case["grads"])
    assert_golden(walk(optimizer, weights, gradients, update), case)

    def slower(gradient: Any, state: Any, params: Any) -> Any:
        rate = jnp.where(state.count < 6, 0.1, 0.03)
        return update(gradient, state._replace(hyperparams=state.hyperparams | {"learning_rate": rate}), params)

    path = f32(list(walk(optimizer, weights, gradients, slower)))
    expected = published(gradients, case["w0"], [0.1] * 6 + [0.03] * 6, power=0.7, lambda_1=0.01)
    np.testing.assert_allclose(path, expected, rtol=1e-5, atol=1e-6)


def test_the_sums_are_known_to_be_like_the_parameters():
    optimizer = ftrl(optax.constant_schedule(0.1))
    state: Any = optimizer.init({"w": jnp.ones(3)})
    marked: Any = optax.tree_map_params(optimizer, lambda leaf: "sum", state, transform_non_params=lambda leaf: "count")
    assert marked == ({"w": "sum"}, {"w": "sum"}, "count")


def test_the_sums_lie_where_the_parameters_lie():
    mesh = jax.make_mesh((4,), ("data",))
    rng = np.random.default_rng(11)
    gradients = f32(rng.normal(size=(3, 8)))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    optimizer = ftrl(0.1, l1_regularization_strength=0.2)
    weights = jax.device_put(jnp.ones(8), sharding)
    assert {leaf.sharding for leaf in jax.tree.leaves(optimizer.init(weights))} == {sharding}
    path = list(walk(optimizer, weights, jax.device_put(list(gradients), sharding), jax.jit(optimizer.update)))
    assert path[-1].sharding == sharding
    np.testing.assert_allclose(path, published(gradients, np.ones(8), 0.1, lambda_1=0.2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "bad", "legal"),
    [
        ("learning_rate", 0.0, "> 0"),
        ("learning_rate", -0.1, "> 0"),
        ("learning_rate_power", 0.5, "<= 0"),
        ("learning_rate_power", math.nan, "<= 0"),
        ("initial_accumulator_value", -0.1, ">= 0"),
        ("l1_regularization_strength", -0.1, ">= 0"),
        ("l1_regularization_strength", math.inf, ">= 0"),
        ("l2_regularization_strength", -0.1, ">= 0"),
        ("l2_shrinkage_regularization_strength", -0.1, ">= 0"),
        ("beta", -0.1, ">= 0"),
    ],
)
def test_bad_hyperparameters(name, bad, legal):
    with pytest.raises(ValueError, match=rf"^{name} must be finite and {legal}\. Given {bad}\.$"):
        ftrl(**{name: bad})


@pytest.mark.parametrize("name", ["learning_rate_power", "initial_accumulator_value", "beta"])
def test_zero_is_a_hyperparameter(name):
    ftrl(**{name: 0.0})


def test_a_schedule_below_zero_is_refused():
    optimizer = ftrl(optax.linear_schedule(-0.5, 0.1, 10))
    with pytest.raises(ValueError, match=r"learning_rate at step 0 must be finite and >= 0\. Given -0\.5"):
        optimizer.init(jnp.ones(2))


def test_a_step_at_rate_zero_is_none():
    """The start of a warmup, and the end of a decay; what lies between is a step as ever, worked out by hand."""
    optimizer = ftrl(lambda count: jnp.where(count == 1, 0.5, 0.0))
    weights = jnp.array([1.0, -2.0])
    state: Any = optimizer.init(weights)
    gradients = jnp.array([0.3, 0.4])
    found = []
    for _ in range(4):
        updates, state = optimizer.update(gradients, state, weights)
        weights = optax.apply_updates(weights, updates)
        found.append(np.asarray(weights, np.float64))
    np.testing.assert_array_equal(found[0], [1, -2])
    n, w, g = 0.1, np.array([1.0, -2.0]), np.array([0.3, 0.4])
    z = g - (np.sqrt(n + g**2) - np.sqrt(n)) / 0.5 * w
    np.testing.assert_allclose(found[1], -z / (np.sqrt(n + g**2) / 0.5), rtol=1e-6)
    np.testing.assert_array_equal(found[1:], [found[1]] * 3)
    np.testing.assert_allclose(state.accumulators, n + g**2, rtol=1e-6)


def test_an_update_without_params_is_refused():
    optimizer = ftrl(0.1)
    with pytest.raises(ValueError, match=r"Given params=None: call update\(gradients, state, params\)"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))


def test_a_gradient_of_another_shape_is_refused():
    optimizer = ftrl(0.1)
    weights = {"w": jnp.ones((2, 1))}
    with pytest.raises(ValueError, match=r"a gradient \(2,\) for a parameter \(2, 1\)"):
        optimizer.update({"w": jnp.ones(2)}, optimizer.init(weights), weights)
