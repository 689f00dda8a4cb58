"""What is compiled for TPU without one, and what its HLO tells.

A TPU's compiler runs on any machine (`pip install 'jax[tpu]'` brings the one that fits), given a description of the
chips. It is what a TPU would run, so collectives, memory and the compiler's own estimate of cycles can be read off.
"""

import functools
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

# The compiler looks for chips that are not there, and for their names on the network, unless told otherwise.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from devices import draw, reduced
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from zoo import Entry

import jaxheads as jh

CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
ROWS, INPUTS = 2**16, 64  # rows of a device, inputs of a row
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
P = PartitionSpec


class Compiled(NamedTuple):
    """What a compiled program tells of itself.

    Attributes:
        collectives: how many there are of each kind.
        reduced: the numbers of elements that each all-reduce adds up.
        scatters: how many scatters and sorts there are.
        products: how many matrix products.
        accessed: bytes read and written by a device, as XLA counts them.
        temp: bytes of temporary memory of a device.
        cycles: the compiler's estimate for all that it has an estimate for.
    """

    collectives: dict[str, int]
    reduced: list[int]
    scatters: int
    products: int
    accessed: float
    temp: int
    cycles: int


@functools.cache
def mesh_of(chip: str) -> Mesh:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def shapes(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Arrays without content, laid out over a mesh."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.asarray(x).dtype, sharding=sharding), tree)


def batch_of(entry: Entry, mesh: Mesh, rows: int) -> dict[str, Any]:
    """Labels, logits, weights and mask of a batch that is spread over the chips."""
    few, n = draw(entry, 16), rows * mesh.size
    long = jax.tree.map(lambda x: np.broadcast_to(x[:1], (n, *x.shape[1:])), few)
    return shapes(long, mesh, P("data"))


def loss_and_gradient(entry: Entry, chip: str, rows: int = ROWS) -> Any:
    mesh, params = mesh_of(chip), entry.params()

    def call(batch):
        def loss(logits):
            return entry.head.loss(**{**batch, "logits": logits}, params=params)

        return jax.value_and_grad(loss)(batch["logits"])

    return jax.jit(call).lower(batch_of(entry, mesh, rows))


def update_metrics(entry: Entry, chip: str, rows: int = ROWS) -> Any:
    mesh, params = mesh_of(chip), entry.params()

    def call(metrics, batch):
        return entry.head.update_metrics(metrics, None, **batch, params=params)

    metrics = shapes(entry.head.metrics(), mesh, P())
    return jax.jit(call, donate_argnums=0).lower(metrics, batch_of(entry, mesh, rows))


def train_step(entry: Entry, chip: str, rows: int = ROWS) -> Any:
    mesh, optimizer = mesh_of(chip), entry.optimizer(optax.sgd(0.1, momentum=0.9))
    params = {"w": np.zeros((INPUTS, entry.head.logits_dimension), np.float32)}
    state = jh.TrainState.create(params=params, optimizer=optimizer, head=entry.head, key=jax.random.key(0))
    batch = batch_of(entry, mesh, rows)
    batch.pop("logits")
    batch["features"] = shapes(np.broadcast_to(np.float32(0), (rows * mesh.size, INPUTS)), mesh, P("data"))
    step = jh.make_train_step(entry.head, lambda p, x: x @ p["w"], optimizer, with_metrics=False)
    return jax.jit(step, donate_argnums=0).lower(shapes(state, mesh, P()), batch)


def mapped_step(entry: Entry, chip: str, rows: int = ROWS) -> Any:
    """The step with its metrics and Adam, under `shard_map` with its check."""
    mesh, optimizer = mesh_of(chip), entry.optimizer(optax.adam(0.1))
    params = {"w": np.zeros((INPUTS, entry.head.logits_dimension), np.float32)}
    state = jh.TrainState.create(params=params, optimizer=optimizer, head=entry.head, key=jax.random.key(0))
    batch = batch_of(entry, mesh, rows)
    batch.pop("logits")
    batch["features"] = shapes(np.broadcast_to(np.float32(0), (rows * mesh.size, INPUTS)), mesh, P("data"))
    step = jh.make_train_step(entry.head, lambda p, x: x @ p["w"], optimizer, axis_name="data")

    def call(state, batch):
        # Some of optax's own arithmetic mixes dtypes.
        with jax.numpy_dtype_promotion("standard"):
            return step(state, batch)

    mapped = jax.shard_map(call, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    return jax.jit(mapped, donate_argnums=0).lower(shapes(state, mesh, P()), batch)


PROGRAMS: dict[str, Callable[..., Any]] = {
    "loss_and_gradient": loss_and_gradient,
    "update_metrics": update_metrics,
    "train_step": train_step,
}


def analyzed(lowered: Any) -> Compiled:
    """Compiles, and reads what came out."""
    compiled = lowered.compile()
    text = compiled.as_text()
    lines = text.splitlines()

    def named(operation: str) -> list[str]:
        return [line for line in lines if f" {operation}(" in line or f" {operation}-start(" in line]

    cycles = [int(x) for x in re.findall(r'"estimated_cycles":"(\d+)"', text)]
    return Compiled(
        {name: len(named(name)) for name in COLLECTIVES},
        reduced(text),
        len(named("scatter")) + len(named("sort")),
        len(named("convolution")) + len(named("dot")),
        compiled.cost_analysis()["bytes accessed"],
        compiled.memory_analysis().temp_size_in_bytes,
        # What has no estimate is written as the largest number there is.
        sum(x for x in cycles if x < 2**60),
    )
