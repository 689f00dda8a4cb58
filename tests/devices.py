"""Three steps of training, spread over devices in every way that JAX offers. What law 5 is tested with."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from zoo import ZOO, Entry

import jaxheads as jh

P = PartitionSpec
N, STEPS = 16, 3
AXES = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}
KEY = jax.random.key(0)
# Momentum is carried from step to step, and Adam divides by what it carried: both kinds in one step.
OPTIMIZERS: dict[Any, Any] = {"sgd": optax.sgd(0.005, momentum=0.9), "adam": optax.adam(0.05, eps=1e-3)}


class Trained(NamedTuple):
    """What three steps gave: the state after them, the loss of each, the metrics of all."""

    state: jh.TrainState
    losses: Any
    metrics: jh.Metrics


def entry_of(name: str) -> Entry:
    return next(entry for entry in ZOO if entry.name == name)


def mesh_of(n: int, axes: str = "explicit") -> jax.sharding.Mesh:
    if axes == "explicit":
        return jax.make_mesh((n,), ("d",), devices=jax.devices()[:n])  # what make_mesh gives by default
    return jax.make_mesh((n,), ("d",), (AXES[axes],), devices=jax.devices()[:n])


def draw(entry: Entry, n: int = N, seed: int = 1) -> dict[str, Any]:
    """A batch that is unevenly spread: of eight devices one has padding alone, one nothing but zero weights."""
    rng = np.random.default_rng(seed)
    where = (rng.random((n, 1)) < 0.7) & (np.arange(n)[:, None] // 2 != 3)
    where[:2] = [[True], [False]]
    weights = rng.choice(np.array([0, 0.3, 1, 2.5], np.float32), (n, 1))
    weights[0] = 1
    weights[10:12] = 0
    labels, logits = entry.labels(rng, (n,)), entry.logits(rng, (n,))
    return {"labels": labels, "logits": logits, "weights": weights, "where": where}


def batches_of(entry: Entry) -> list[dict[str, Any]]:
    """Three batches as steps take them."""
    drawn = [draw(entry, seed=seed) for seed in range(1, 1 + STEPS)]
    return [{"features": batch.pop("logits"), **batch} for batch in drawn]


def model(params: dict[str, Any], logits: Any) -> Any:
    """Parameters that all rows share, so that their gradient crosses devices."""
    return logits * params["scale"][None] + params["bias"][None]


def network(params: dict[str, Any], features: Any) -> Any:
    """Two layers: gradient descent trains one, Adam the other."""
    return model(params["adam"], model(params["sgd"], features))


def start(entry: Entry) -> dict[str, Any]:
    d = entry.head.logits_dimension
    return {"scale": np.linspace(0.8, 1.2, d, dtype=np.float32), "bias": np.linspace(-0.1, 0.3, d, dtype=np.float32)}


def first_params(entry: Entry) -> dict[str, Any]:
    return {name: start(entry) for name in OPTIMIZERS}


def by_name(entry: Entry, tree: Any) -> Any:
    """Which optimizer trains what: Adam its layer, gradient descent the rest, what the head learns included."""

    def kind(path: Any, _: Any) -> str:
        keys = [getattr(key, "key", None) for key in path]
        # Pairs do not see a bias that all rows share: what Adam would divide there is rounding alone.
        return "adam" if "adam" in keys and not (entry.whole and "bias" in keys) else "sgd"

    return jax.tree_util.tree_map_with_path(kind, tree)


def optimizer(entry: Entry) -> Any:
    both = optax.multi_transform(OPTIMIZERS, functools.partial(by_name, entry))
    return entry.optimizer(both, OPTIMIZERS["sgd"])


def first_state(entry: Entry) -> jh.TrainState:
    return jh.TrainState.create(params=first_params(entry), optimizer=optimizer(entry), head=entry.head, key=KEY)


def make_step(entry: Entry, axis_name: str | None = None, micro_batches: int = 1) -> Callable[..., Any]:
    return jh.make_train_step(entry.head, network, optimizer(entry), axis_name=axis_name, micro_batches=micro_batches)


def run(
    entry: Entry,
    step: Callable[..., Any],
    compiled: Callable[[Any], Any] = jax.jit,
    state: Any = None,
    place: Callable[[Any], Any] = lambda batch: batch,
) -> Trained:
    """The three steps, one after the other, by one trace."""
    chex.clear_trace_counter()  # it goes by the place of a function, and this one is made anew for every head

    @chex.assert_max_traces(1)
    def traced(state, batch):
        # Some of optax's own arithmetic mixes dtypes.
        with jax.numpy_dtype_promotion("standard"):
            return step(state, batch)

    state = first_state(entry) if state is None else state
    metrics, losses, call = entry.head.metrics(), [], compiled(traced)
    for batch in batches_of(entry):
        state, out = call(state, place(batch))
        metrics = metrics + out.metrics
        losses.append(np.asarray(out.loss))
    return Trained(state, np.stack(losses), metrics)


@functools.cache
def alone(name: str) -> Trained:
    """On one device."""
    entry = entry_of(name)
    return run(entry, make_step(entry))


def by_jit(entry: Entry, n: int, axes: str, micro_batches: int = 1) -> Trained:
    mesh = mesh_of(n, axes)
    state = jax.device_put(first_state(entry), NamedSharding(mesh, P()))
    rows = NamedSharding(mesh, P("d"))
    step = make_step(entry, None, micro_batches)
    trained = run(entry, step, jax.jit, state, lambda batch: jax.device_put(batch, rows))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(trained.state))
    return trained


def by_shard_map(entry: Entry, n: int, axes: str, check_vma: bool, micro_batches: int = 1) -> Trained:
    mesh = mesh_of(n, axes)

    def mapped(step):
        specs = {"in_specs": (P(), P("d")), "out_specs": P()}
        return jax.jit(jax.shard_map(step, mesh=mesh, check_vma=check_vma, **specs))

    # On an Explicit mesh, arguments come with the layout that the specs ask for.
    state = jax.device_put(first_state(entry), NamedSharding(mesh, P()))
    rows = NamedSharding(mesh, P("d"))
    return run(entry, make_step(entry, "d", micro_batches), mapped, state, lambda batch: jax.device_put(batch, rows))


def by_pmap(entry: Entry, n: int, micro_batches: int = 1) -> Trained:
    def mapped(step):
        return jax.pmap(step, axis_name="d", devices=jax.devices()[:n])

    def split(batch):
        return jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch)

    # Laid out over the devices, as the state that comes back is: else the second step would be traced again.
    state = jax.tree.map(lambda x: jnp.stack([x] * n), first_state(entry))
    state = jax.device_put(state, NamedSharding(mesh_of(n, "auto"), P("d")))
    state, losses, metrics = run(entry, make_step(entry, "d", micro_batches), mapped, state, split)
    for leaf in jax.tree.leaves((dataclasses.replace(state, key=jax.random.key_data(state.key)), metrics, losses.T)):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    state, metrics = jax.tree.map(lambda x: x[0], (state, metrics))
    return Trained(state, losses[:, 0], metrics)


WAYS: dict[str, Callable[..., Trained]] = {
    "jit_explicit": functools.partial(by_jit, axes="explicit"),
    "jit_auto": functools.partial(by_jit, axes="auto"),
    "shard_map": functools.partial(by_shard_map, axes="explicit", check_vma=True),
    "shard_map_no_vma": functools.partial(by_shard_map, axes="auto", check_vma=False),
    "pmap": by_pmap,
}


def assert_close(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        b = np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * max(1.0, float(np.abs(b).max(initial=0.0))))


def assert_same(got: Trained, expected: Trained) -> None:
    """Equal to 1e-6: losses, parameters, optimizer state, running state, and the values read from the metrics."""
    np.testing.assert_array_equal(jax.random.key_data(got.state.key), jax.random.key_data(expected.state.key))
    assert_close(dataclasses.replace(got.state, key=None), dataclasses.replace(expected.state, key=None))
    assert_close(got.losses, expected.losses)
    assert got.metrics.state.shape == expected.metrics.state.shape
    assert_close(got.metrics.compute(bounds=True), expected.metrics.compute(bounds=True))


def count(text: str | None, operation: str) -> int:
    """How many times an operation stands in compiled HLO."""
    assert text is not None
    return sum(f" {operation}(" in line or f" {operation}-start(" in line for line in text.splitlines())


def reduced(text: str | None) -> list[int]:
    """How many numbers each all-reduce of compiled HLO adds up: of `f32[2,3]{...}`, or of a tuple of such."""
    assert text is not None
    lines = [line for line in text.splitlines() if " all-reduce(" in line or " all-reduce-start(" in line]
    results = [line.split(" = ", 1)[1].split(" all-reduce", 1)[0] for line in lines]
    sizes = [re.findall(r"\w+\[([\d,]*)\]", result) for result in results]
    return [sum(math.prod(int(n) for n in size.split(",") if n) for size in each) for each in sizes]


def law_summary(passed: list[str]) -> list[str]:
    """A table of the tests that passed: for each head and way on how many devices, `x 2` in two micro-batches."""
    cells: dict[tuple[str, str], set[str]] = {}
    for node in passed:
        _, _, given = node.partition("test_laws_devices.py::test_three_steps")
        if not given or "[" not in given:
            continue
        ids = given[given.index("[") + 1 : -1].split("-")
        *numbers, way, name = ids
        n, parts = numbers or ("8", "1")
        cells.setdefault((name, way), set()).add(n if parts == "1" else f"{n} x {parts}")
    if not cells:
        return []
    rows = [["", *WAYS]]
    for entry in ZOO:
        rows.append([entry.name, *(", ".join(sorted(cells.get((entry.name, way), ()))) for way in WAYS)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    title = "three steps of training equal to one device's to 1e-6, by number of devices (x micro-batches):"
    return [title, *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)]
