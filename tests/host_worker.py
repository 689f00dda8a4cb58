"""What `test_hosts.py` runs in each of two processes: `host_worker.py JOB PROCESS PORT FOLDER`.

A job is `everything`, `whole`, `killed`, `resumed`, `raises`, or names of heads, which are trained. Each process has
two devices. It writes its results to `FOLDER/JOB_PROCESS.pickle`, in NumPy. `everything` writes the metrics that a
process has measured alone to `FOLDER/own_PROCESS.pickle`, too.
"""

import dataclasses
import functools
import os
import pathlib
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # Before anything makes an array, as `devices.py` does at once.
    process, port = int(sys.argv[2]), sys.argv[3]
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process, initialization_timeout=60)

import devices
from jax.sharding import NamedSharding, PartitionSpec

import jaxheads as jh

# Of the 16 rows of a batch the first process has 11, the other 5.
OWN, SIZE = (slice(0, 11), slice(11, 16)), 12


def everywhere(tree: Any, axes: str = "explicit") -> Any:
    """A copy on each device. By `jit`, since `device_put` refuses random keys where devices are other processes'."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh(axes), PartitionSpec()))(tree)


def plain(state: jh.TrainState) -> Any:
    """What this process holds of it, in NumPy; it may be all."""
    leaves = jax.tree.leaves(state)
    assert all(leaf.is_fully_replicated for leaf in leaves)
    return jax.tree.map(
        lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x),
        state,
    )


def mesh(axes: str = "explicit") -> jax.sharding.Mesh:
    return devices.mesh_of(4, axes)


def own(batch: Any) -> Any:
    return jax.tree.map(lambda x: x[OWN[jax.process_index()]], batch)


def trained(name: str, axes: str) -> Any:
    """Three steps over all four devices."""
    entry = devices.entry_of(name)

    def place(batch: Any) -> Any:
        (padded,) = jh.training.lockstep([own(batch)], SIZE)
        return jh.training.shard_batch(padded, mesh(axes))

    state = everywhere(devices.first_state(entry), axes)
    found = devices.run(entry, devices.make_step(entry), jax.jit, state, place)
    return found._replace(state=plain(found.state))


@functools.cache
def evaluation(name: str) -> tuple[Any, Any]:
    """A compiled step, and the state that it is given, over all devices."""
    entry = devices.entry_of(name)
    return jax.jit(jh.make_eval_step(entry.head, devices.network)), everywhere(devices.first_state(entry))


def evaluated(name: str, counts: tuple[int, int], like: Any = None) -> Any:
    """The metrics of all rows, and how many steps it took, where processes have different numbers of batches."""
    entry, steps = devices.entry_of(name), 0
    step, state = evaluation(name)

    def given() -> Iterator[Any]:
        nonlocal steps
        mine = [own(batch) for batch in devices.batches_of(entry)[: counts[jax.process_index()]]]
        for batch in jh.training.lockstep(mine, SIZE, like):
            steps += 1
            yield jh.training.shard_batch(batch, mesh())

    return jh.evaluate(state, step, given()), steps


def message(call: Callable[[], Any]) -> str:
    """What it raises."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def breaking() -> Iterator[Any]:
    """Batches of which the second cannot be read, in one process."""
    batch = devices.batches_of(devices.entry_of("binary"))[0]
    for i in range(3):
        if i == 1 and jax.process_index() == 1:
            raise ValueError("cannot read this")
        yield batch


def measured() -> list[jh.Metrics]:
    """The batches of this process on its own devices, without collectives: for whoever gets the states to merge."""
    entry = devices.entry_of("binary")
    step, state = jax.jit(jh.make_eval_step(entry.head, devices.network)), devices.first_state(entry)
    local = jax.make_mesh((2,), ("d",), devices=jax.local_devices())
    batches = [jh.pad_batch(own(batch), SIZE) for batch in devices.batches_of(entry)]
    return [step(state, jh.training.shard_batch(batch, local)).metrics for batch in batches]


def everything() -> dict[str, Any]:
    """What two processes find out about each other."""
    batch = devices.batches_of(devices.entry_of("binary"))[0]
    zero = devices.entry_of("binary").head.metrics()
    states = np.zeros((2, *zero.state.shape), np.float32)
    spread = dataclasses.replace(zero, state=jh.training.shard_batch(states, mesh()))
    crossed = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2).T, ("data", "model"))
    return {
        "uneven": evaluated("binary", (3, 1)),
        "none in one": evaluated("binary", (0, 2), jax.tree.map(lambda x: x[:2], batch)),
        "none at all": list(jh.training.lockstep([], SIZE)),
        "without like": message(lambda: evaluated("binary", (0, 2))),
        "broken": message(lambda: list(jh.training.lockstep(breaking(), 16))),
        "odd rows": message(lambda: jh.training.shard_batch({"x": np.zeros((3, 2))}, mesh())),
        "odd rows in one": message(lambda: jh.training.shard_batch({"x": np.zeros(3 + jax.process_index())}, mesh())),
        "uneven rows": message(lambda: jh.training.shard_batch({"x": np.zeros(4 + 4 * jax.process_index())}, mesh())),
        "crossed mesh": message(lambda: jh.training.shard_batch({"x": np.zeros(4)}, crossed)),
        "no rows": message(lambda: jh.training.shard_batch({"x": np.float32(1)}, mesh())),
        "spread, merged": message(lambda: jh.Metrics.merge([spread])),
        "spread, pickled": message(lambda: pickle.dumps(spread)),
        "trained": {"ordinal": trained("ordinal", "explicit")},
        "own": measured(),
    }


class BrokenLog:
    """A writer that one process cannot use."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: Any) -> None:
        if jax.process_index() == 1:
            raise RuntimeError(f"no room for {tag} in the log")


def fitted(directory: pathlib.Path, killed: bool, writer: Any = None) -> Any:
    """Two epochs of six batches, a checkpoint after every two; `killed` ends both in the second epoch."""
    entry = devices.entry_of("running_prior")
    drawn = [batch for _ in range(2) for batch in devices.batches_of(entry)]

    def batches(epoch: int) -> Iterator[Any]:
        order = np.random.default_rng(epoch).permutation(len(drawn))
        for i, batch in enumerate(jh.training.lockstep((own(drawn[j]) for j in order), SIZE)):
            if killed and epoch == 1 and i == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield jh.training.shard_batch(batch, mesh())

    class Validation:
        """Batches that can be gone through anew."""

        def __iter__(self) -> Iterator[Any]:
            mine = [own(batch) for batch in drawn[: 1 + 2 * jax.process_index()]]
            return (jh.training.shard_batch(batch, mesh()) for batch in jh.training.lockstep(mine, SIZE))

    state = everywhere(devices.first_state(entry))
    with jax.numpy_dtype_promotion("standard"):
        fitted = jh.fit(
            *(state, devices.make_step(entry), batches),
            epochs=2,
            eval_step=jh.make_eval_step(entry.head, devices.network),
            validation=Validation(),
            directory=directory,
            checkpoint_every=2,
            writer=writer,
        )
    return {"state": plain(fitted.state), "best": plain(fitted.best), "history": fitted.history}


if __name__ == "__main__":
    job, folder = sys.argv[1], pathlib.Path(sys.argv[4])
    if job == "everything":
        found = everything()
    elif job in ("whole", "killed", "resumed", "raises"):
        writer = BrokenLog() if job == "raises" else None
        found = fitted(folder / ("cut" if job in ("killed", "resumed") else job), job == "killed", writer)
    else:
        found = {name: trained(name, "auto") for name in job.split(",")}
    for name, content in {job: found, "own": found.get("own")}.items():
        if content is not None:
            (folder / f"{name}_{jax.process_index()}.pickle").write_bytes(pickle.dumps(content))
