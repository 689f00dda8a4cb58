"""One training step on one device and on many: `jit` over a mesh of devices, the first thing to reach for.

The flights and the question are those of `flight_delays.py`: who arrives more than 15 minutes late?
The step too is made as there. What is added is where arrays lie: the state on every device, of each
batch some rows on each. All else is the compiler's work. With `--model-devices 2` the mesh has a
second axis, over which the hidden layers are split.

    pip install -e '.[examples]'
    python examples/train_on_mesh.py --devices 8                      # a CPU as eight devices; 40 s on two cores
    python examples/train_on_mesh.py --devices 8 --model-devices 2    # and as 4 x 2; 10 s more
    python examples/train_on_mesh.py                                  # TPU, GPU: all devices that there are

What to look at:

* There is no `axis_name`, no `pmean`, no `psum`. The loss divides by the flights of the whole batch,
  the metrics count them all, and dropout draws what it draws on one device.
* Two all-reduces are in the compiled step, and nobody wrote them: the first sums the loss and what it
  is divided by, the second all gradients and metrics at once. With the hidden layers split there are
  two more, one on the way forth and one on the way back.
* `jh.pad_batch` fills up each batch to as many rows as devices can share evenly. In the last one of an
  epoch, 580 flights, some devices get none that exist. That changes nothing.

What to expect: the same test AUC, 0.697, to the sixth digit, on 1, 8 and 4 x 2 devices. No loss of the
494 steps differs by more than 2e-7, no parameter at the end by more than 1e-6. (With relu that is not
sure: with the network of `flight_delays.py` the losses part by 1e-4 after some 200 steps.) Eight devices
that share two cores are no faster than one: 10 to 15 ms a step. What a mesh gains shows on real devices.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _flights import (
    BATCH_SIZE,
    Data,
    arguments,
    cell,
    flax_functions,
    floats,
    late_flights,
    make_batches,
    parse,
    print_table,
    steps_an_epoch,
    write_json,
)
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jaxheads as jh

LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.1
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# The first hidden layer is split by its outputs and the second by its inputs, so that nothing has to
# move between the two. On a mesh with one device along "model" this splits nothing.
SPLIT = {"first/kernel": P(None, "model"), "first/bias": P("model"), "second/kernel": P("model", None)}


class Network(nn.Module):
    """Two hidden layers over embeddings and numbers; `first_guess` is the logit to begin with."""

    sizes: tuple[tuple[int, int], ...]
    first_guess: tuple[float, ...]

    @nn.compact
    def __call__(self, inputs: dict[str, jax.Array], *, train: bool = False) -> jax.Array:
        embedded = [nn.Embed(*size)(inputs["deep"][:, column]) for column, size in enumerate(self.sizes)]
        x = jnp.concatenate([*embedded, inputs["numbers"]], axis=-1)
        # Not relu: where a sum is so near 0 that rounding decides on which side it is, the gradient
        # jumps, and two runs are no longer one to the last digit.
        for name, width in (("first", 256), ("second", 64)):
            x = nn.gelu(nn.Dense(width, name=name)(x))
            x = nn.Dropout(0.5, deterministic=not train)(x)
        return jnp.asarray(self.first_guess) + nn.Dense(1, name="logits")(x)


def make_mesh(devices: Sequence[Any], model_devices: int) -> Mesh:
    """Devices in rows for "data" and columns for "model"."""
    # Auto leaves it to the compiler how what lies between inputs and outputs is laid out, so that
    # the network needs no word about it.
    shape = len(devices) // model_devices, model_devices
    return jax.make_mesh(shape, ("data", "model"), (AxisType.Auto, AxisType.Auto), devices=devices)


def layout(state: jh.TrainState, mesh: Mesh) -> Any:
    """Where each leaf of the state lies: on every device, but for what SPLIT names."""

    def sharding(path: Any, _: Any) -> NamedSharding:
        # Adam's moments have the names of the parameters too, and so lie where those do.
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, next((spec for end, spec in SPLIT.items() if name.endswith(end)), P()))

    return jax.tree_util.tree_map_with_path(sharding, state)


class Trained(NamedTuple):
    """What training on a mesh gave.

    Attributes:
        params: of the network, on the host.
        losses: of every step.
        test: the metrics of November and December.
        milliseconds: a step, with moving the batch there, without compiling.
        collectives: how many there are in a step, by name.
        kernel: the shape of the part of the first hidden layer that lies on one device.
    """

    params: Any
    losses: np.ndarray
    test: dict[str, float]
    milliseconds: float
    collectives: dict[str, int]
    kernel: tuple[int, ...]


def train(data: Data, mesh: Mesh, size: int, epochs: int, seed: int) -> Trained:
    """Trains and tests on a mesh, with batches that are filled up to `size` rows."""
    head = jh.BinaryClassHead()
    init, apply_fn = flax_functions(Network(data.sizes["deep_sizes"], data.first_guess), data.inputs)
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps_an_epoch(data) * epochs)
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
    init_key, key = jax.random.split(jax.random.key(seed))
    state = jh.TrainState.create(params=init(init_key), optimizer=optimizer, head=head, key=key)

    everywhere, by_rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    shardings = layout(state, mesh)
    state = jax.device_put(state, shardings)

    def batches(rows: np.ndarray) -> list[dict[str, Any]]:
        return [jh.pad_batch(batch, size) for batch in make_batches(data, rows)]

    # No axis_name: under jit a batch is one array, wherever its rows are, and a sum over it is the sum.
    # With out_shardings the state comes back as it went in, so that what is compiled once serves every step.
    train_step = jax.jit(
        jh.make_train_step(head, apply_fn, optimizer), donate_argnums=0, out_shardings=(shardings, everywhere)
    )
    eval_step = jax.jit(jh.make_eval_step(head, apply_fn), out_shardings=everywhere)
    # Compiled by hand, only to look into it: a call of train_step would do the same.
    example = batches(data.split["train"][:BATCH_SIZE])[0]
    step = train_step.lower(state, jax.device_put(example, by_rows)).compile()

    shuffle, losses, seconds = np.random.default_rng(seed), [], 0.0
    for epoch in range(1, epochs + 1):
        given = batches(shuffle.permutation(data.split["train"]))
        started = time.perf_counter()
        name = f"{named(mesh)}, epoch {epoch}/{epochs}"
        for batch in tqdm(given, name, leave=False, disable=None, mininterval=0.5):
            state, out = step(state, jax.device_put(batch, by_rows))
            losses.append(out.loss)
        jax.block_until_ready(state)
        seconds += time.perf_counter() - started
    tested = jh.evaluate(state, eval_step, (jax.device_put(batch, by_rows) for batch in batches(data.split["test"])))
    text, kernel = step.as_text() or "", state.params["first"]["kernel"]
    return Trained(
        params=jax.tree.map(np.asarray, state.params),
        losses=np.array(losses),
        test=floats(tested),
        milliseconds=1e3 * seconds / len(losses),
        # A collective may be split in two, its start and its end.
        collectives={name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES},
        kernel=kernel.addressable_shards[0].data.shape,
    )


def named(mesh: Mesh) -> str:
    """What to call a mesh: how many devices there are along each axis."""
    return "mesh " + " x ".join(map(str, mesh.shape.values()))


def apart(trained: Trained, other: Trained) -> dict[str, float]:
    """The largest differences between two."""

    def largest(a: Any, b: Any) -> float:
        # What was not measured is NaN in both.
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return float(np.max([np.max(np.where(np.isnan(x) & np.isnan(y), 0, np.abs(x - y))) for x, y in pairs]))

    parts = {"metric": "test", "loss of a step": "losses", "parameter": "params"}
    return {name: largest(getattr(trained, part), getattr(other, part)) for name, part in parts.items()}


def tell(found: dict[str, Trained], differences: dict[str, dict[str, float]]) -> None:
    """Prints the table: a column for each mesh."""
    first, *_ = found.values()
    rows = {name: [cell(trained.test[name], 6) for trained in found.values()] for name in first.test}
    for name in ("metric", "loss of a step", "parameter"):
        told = [f"{difference[name]:.0e}" for difference in differences.values()]
        rows[f"largest difference, {name}"] = ["", *told]
    rows["milliseconds a step"] = [f"{trained.milliseconds:.1f}" for trained in found.values()]
    for name in COLLECTIVES:
        counts = [trained.collectives[name] for trained in found.values()]
        if any(counts):
            rows[f"{name} in a step"] = list(map(str, counts))
    rows["first/kernel, on a device"] = [" x ".join(map(str, trained.kernel)) for trained in found.values()]
    print_table("data x model", list(found), rows)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains on one device and on all, prints the table; returns what `metrics.json` holds."""
    parser = arguments("Train on a mesh of devices.", "train_on_mesh_out")
    parser.add_argument("--devices", type=int, help="how many; a CPU becomes as many (default: all there are)")
    parser.add_argument("--model-devices", type=int, default=1, help="how many of them share the hidden layers")
    parser.set_defaults(epochs=2)
    args = parse(parser, argv)
    if args.devices is not None:
        # Before anything looks for devices. TPU and GPU do not mind.
        jax.config.update("jax_num_cpu_devices", args.devices)
        # One step at a time: the devices of a CPU share its threads, and with many steps under way
        # they were once seen to wait for one another for ever.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    devices, columns = jax.devices()[: args.devices], args.model_devices
    if columns < 1 or len(devices) % columns or len(devices) < (args.devices or 1):
        parser.error(f"--devices {args.devices} and --model-devices {columns} do not fit {len(jax.devices())} devices")
    if len(devices) == 1:
        print("There is one device. On a CPU, --devices 8 makes it eight.")
    started = time.perf_counter()

    data = late_flights(args.rows)
    n, last = len(devices), (len(data.split["train"]) - 1) % BATCH_SIZE + 1
    size = -(-BATCH_SIZE // n) * n  # each device gets as many rows
    by_device = np.clip(last - size // n * np.arange(n), 0, size // n)
    print(f"the last batch of an epoch has {last} flights, by device {by_device.tolist()}")

    meshes = [make_mesh(devices[:1], 1), make_mesh(devices, 1)]
    if columns > 1:
        meshes.append(make_mesh(devices, columns))
    found = {named(mesh): train(data, mesh, size, args.epochs, args.seed) for mesh in meshes}
    first, *others = found
    differences = {name: apart(found[name], found[first]) for name in others}
    tell(found, differences)

    results = {
        "seed": args.seed,
        "platform": devices[0].platform,
        "last_batch_by_device": by_device.tolist(),
        "meshes": {
            name: {
                "test": trained.test,
                "losses": [float(trained.losses[0]), float(trained.losses[-1])],
                "milliseconds": trained.milliseconds,
                "collectives": trained.collectives,
                "kernel": trained.kernel,
            }
            for name, trained in found.items()
        },
        "differences": differences,
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(results, args.out / "metrics.json")
    print(f"wrote {args.out / 'metrics.json'} after {results['seconds']} s")
    return results


if __name__ == "__main__":
    main()
