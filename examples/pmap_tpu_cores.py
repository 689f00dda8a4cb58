"""`pmap` over TPU cores, as many code bases still have it: what it asks of a training step, and a mistake that hides.

In new code take `jit` over a mesh (`train_on_mesh.py`), where none of this has to be written. Under `pmap` each core
runs the step on rows of its own, and what belongs to the whole batch has to be summed over the cores. The task: which
digit is it, 1,797 of them of 8 x 8 pixels (scikit-learn ships them, so nothing is downloaded).

    pip install -e '.[examples]'
    python examples/pmap_tpu_cores.py --devices 8     # a CPU as eight cores; 20 s on two real ones
    python examples/pmap_tpu_cores.py                 # TPU, GPU: all cores that there are

What to look at:

* `axis_name="cores"` in `jh.make_train_step` and `jh.make_eval_step` is all that has to be said: loss, gradient and
  metrics are then those of the whole batch, and the same on every core.
* The state has a first axis of cores, and is laid out over them before the first step; a batch has the shape
  `[cores, rows, ...]`. With `in_axes=(None, 0), out_axes=None` the state needs no such axis, and `jh.fit` will do.
* The mistake: each core takes the mean over its own rows, and `pmean` is the mean of those. That is right as long as
  all cores hold equally many rows. In most batches they do, so nobody sees it.

What to expect: after 220 steps eight cores and one differ by 2e-7 in the parameters, and get 91 % of the last 500
digits right. On a batch of which half the labels are missing, the mistake makes the gradient 16 % wrong. On the last
batch of an epoch, where one core has 16 rows, one has a single row and six have none, it is 81 % off: the zeros of the
six count in the mean, and the single row counts for as much as the 16. Made rightly, it is off by 1e-7: rounding.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import jaxheads as jh

PIXELS, DIGITS = 64, 10
TESTED, BATCH_SIZE = 500, 128
AXIS = "cores"

# How a gradient is made: the axis that the loss knows of, and the axis that gradients are averaged over.
RECIPES = {
    "one core": (None, None),
    "loss(axis_name=...), then pmean": (AXIS, AXIS),
    "each core's own mean, then pmean": (None, AXIS),
}

Arrays = dict[str, np.ndarray]
Batch = dict[str, Any]

HEAD = jh.MultiClassHead(DIGITS)
NETWORK = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(DIGITS)])


def apply_fn(params: Any, features: Any) -> jax.Array:
    """The logits of the network."""
    logits: Any = NETWORK.apply({"params": params}, features["pixels"])
    return logits


def make_batches(data: Arrays, rows: np.ndarray, size: int) -> Iterator[Batch]:
    """Batches of `size` rows; in the last one, `where` is False for those that do not exist."""
    for start in range(0, len(rows), BATCH_SIZE):
        some = rows[start : start + BATCH_SIZE]
        yield jh.pad_batch({"features": {"pixels": data["pixels"][some]}, "labels": data["digits"][some]}, size)


def epochs_of(data: Arrays, size: int, epochs: int, seed: int) -> Iterator[Batch]:
    """All batches of the training, shuffled in each epoch."""
    shuffle = np.random.default_rng(seed)
    for _ in range(epochs):
        yield from make_batches(data, shuffle.permutation(len(data["digits"]) - TESTED), size)


def split(batch: Batch, cores: int) -> Batch:
    """The rows of a batch as `[cores, rows, ...]`."""
    return jax.tree.map(lambda x: x.reshape(cores, -1, *x.shape[1:]), batch)


def replicate(tree: Any, devices: Sequence[Any]) -> Any:
    """A copy for each core, along a new first axis."""
    stacked = jax.tree.map(lambda x: jnp.stack([x] * len(devices)), tree)
    # Laid out as what comes back from pmap is: without this, the second step is traced and compiled again.
    mesh = jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)
    return jax.device_put(stacked, NamedSharding(mesh, PartitionSpec(AXIS)))


def first(tree: Any) -> Any:
    """What the first core has; all have the same."""
    return jax.tree.map(lambda x: x[0], tree)


def counted(step: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """A step, and how often it was traced: the length of a list."""
    traces: list[int] = []

    def traced(*args: Any) -> Any:
        traces.append(1)
        return step(*args)

    return traced, traces


def train(state: Any, step: Callable[..., Any], batches: Iterable[Batch]) -> Any:
    """The state after all batches."""
    for batch in batches:
        state, _ = step(state, batch)
    return state


def gradient(params: Any, batch: Batch, loss_axis: str | None, mean_axis: str | None) -> Any:
    """The gradient of a batch, or of a core's part of it, by one of the recipes."""

    def loss_of(params: Any) -> jax.Array:
        logits = apply_fn(params, batch["features"])
        return HEAD.loss(labels=batch["labels"], logits=logits, where=batch["where"], axis_name=loss_axis)

    grads = jax.grad(loss_of)(params)
    return grads if mean_axis is None else jax.lax.pmean(grads, mean_axis)


def gradients(params: Any, batch: Batch, devices: Sequence[Any]) -> dict[str, np.ndarray]:
    """The gradient of a batch by every recipe, as one vector."""

    def by(loss_axis: str | None, mean_axis: str | None) -> Any:
        def local(params: Any, batch: Batch) -> Any:
            return gradient(params, batch, loss_axis, mean_axis)

        if mean_axis is None:
            return jax.jit(local)(params, batch)
        mapped = jax.pmap(local, axis_name=mean_axis, devices=devices)
        return first(mapped(replicate(params, devices), split(batch, len(devices))))

    found = {name: by(*axes) for name, axes in RECIPES.items()}
    return {name: np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads)]) for name, grads in found.items()}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains on all cores and on one, compares gradients, and writes `metrics.json`."""
    parser = argparse.ArgumentParser(description="Train with pmap.")
    parser.add_argument("--devices", type=int, help="how many; a CPU becomes as many (default: all there are)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("pmap_tpu_cores_out"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.devices is not None:
        # Before anything looks for devices. TPU and GPU do not mind.
        jax.config.update("jax_num_cpu_devices", args.devices)
        # One step at a time: the devices of a CPU share its threads, and with many steps under way
        # they were once seen to wait for one another for ever.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    devices = jax.devices()[: args.devices]
    if len(devices) < (args.devices or 1):
        parser.error(f"--devices {args.devices} do not fit {len(jax.devices())} devices")
    if len(devices) == 1:
        print("There is one device. On a CPU, --devices 8 makes it eight.")
    started = time.perf_counter()

    digits: Any = load_digits()
    data = {"pixels": (digits.data / 16).astype(np.float32), "digits": digits.target.astype(np.int32)}
    cores = len(devices)
    size = -(-BATCH_SIZE // cores) * cores  # each core gets as many rows
    init_key, key = jax.random.split(jax.random.key(args.seed))
    params, optimizer = NETWORK.init(init_key, jnp.zeros((1, PIXELS)))["params"], optax.adam(3e-3)
    start = jh.TrainState.create(params=params, optimizer=optimizer, head=HEAD, key=key)

    # The step sums over the axis what the loss is divided by, and the metrics, and averages the gradients.
    step, traces = counted(jh.make_train_step(HEAD, apply_fn, optimizer, axis_name=AXIS))
    mapped_step = jax.pmap(step, axis_name=AXIS, devices=devices)
    mapped_eval = jax.pmap(jh.make_eval_step(HEAD, apply_fn, axis_name=AXIS), axis_name=AXIS, devices=devices)
    batches = (split(batch, cores) for batch in epochs_of(data, size, args.epochs, args.seed))
    state = train(replicate(start, devices), mapped_step, batches)

    # The same on one core, where no axis has a name.
    alone_step = jax.jit(jh.make_train_step(HEAD, apply_fn, optimizer))
    alone = train(start, alone_step, epochs_of(data, size, args.epochs, args.seed))

    held_out = list(make_batches(data, np.arange(len(data["digits"]))[-TESTED:], size))
    # Every core has the metrics of all cores: one copy counts.
    tested: Any = sum(first(mapped_eval(state, split(batch, cores)).metrics) for batch in held_out)
    tested_alone = jh.evaluate(alone, jh.make_eval_step(HEAD, apply_fn), held_out)
    test, test_alone = ({name: float(x) for name, x in metrics.compute().items()} for metrics in (tested, tested_alone))
    apart = jax.tree.map(lambda x, y: float(np.max(np.abs(x - y))), first(state.params), alone.params)
    difference = max(jax.tree.leaves(apart))
    for name in test:
        print(f"test {name:<14}{cores} cores {test[name]:.6f}   one core {test_alone[name]:.6f}")
    print(f"largest difference of a parameter after {int(alone.step)} steps: {difference:.0e}")
    print(f"the step was traced {len(traces)} time(s)")

    # Two batches whose rows are unevenly spread over the cores.
    full, *_, last = make_batches(data, np.arange(len(data["digits"]) - TESTED), size)
    labelled = full["where"] & (np.random.default_rng(args.seed).random(size) < 0.5)
    uneven = {"half the labels are missing": {**full, "where": labelled}, "the last batch of an epoch": last}
    results: dict[str, Any] = {
        "devices": cores,
        "traces": len(traces),
        "steps": int(alone.step),
        "test": test,
        "test_one_core": test_alone,
        "parameters": difference,
        "gradients": {},
    }
    for title, batch in uneven.items():
        rows = split(batch, cores)["where"].sum(axis=1).tolist()
        print(f"\n{title}; rows by core: {rows}")
        found = gradients(params, batch, devices)
        right, *_ = found.values()
        results["gradients"][title] = {"rows": rows}
        for name in list(RECIPES)[1:]:
            off = float(np.linalg.norm(found[name] - right) / np.linalg.norm(right))
            results["gradients"][title][name] = off
            print(f"  {name:<34}gradient off by {off:.2g}")
    results["seconds"] = round(time.perf_counter() - started, 1)
    (args.out / "metrics.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
