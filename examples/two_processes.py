"""Two processes train one model, as two hosts would: uneven data, evaluation that ends, stop and resume.

Started once, it starts itself twice. The two find each other on this machine (`jax.distributed.initialize`), and each
brings two CPU devices, which together are one mesh of four. Which digit is it? Of the 1,297 digits to train on (of
8 x 8 pixels, shipped by scikit-learn) the first process has 900, the other 397; of the 500 to test on 350 and 150.

    pip install -e '.[examples]'
    python examples/two_processes.py                   # under a minute on two CPU cores, mostly imports and compiling
    python examples/two_processes.py --process-id 0 --out by_hand      # or by hand, in two windows
    python examples/two_processes.py --process-id 1 --out by_hand

What to look at:

* `jh.training.lockstep` fills up every batch, and gives batches without rows to the process that runs out first: all
  take the same number of steps, in training as in evaluation, or one would wait for the others for ever.
* `jh.training.shard_batch` makes one global array of what the processes hold. The step is that of one device.
* `jh.fit` writes checkpoints, together. The second of three runs stops in the middle of an epoch, the third goes on.
* `jh.Metrics.merge` needs no mesh: each process measures its own rows on its own device, and whoever gets the states,
  here by a file, adds them.

What to expect: 88 % of the last 500 digits right, log loss 0.4819, in four columns that are equal to the seventh digit:
one process on all rows, two, two that were stopped after 52 steps and went on from the checkpoint after 50, and the
merged states. The parameters of two processes differ from those of one by 1e-7, since sums are taken in another order;
what was stopped and resumed is equal bit by bit.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import jaxheads as jh

PIXELS, HIDDEN, DIGITS = 64, 64, 10
ROWS = {"train": (range(0, 900), range(900, 1297)), "test": (range(1297, 1647), range(1647, 1797))}
SIZE = 64  # rows of a batch in each process
CHECKPOINT_EVERY = 5
HEAD, OPTIMIZER = jh.MultiClassHead(DIGITS), optax.adam(3e-3)


class Stopped(Exception):
    """After as many steps as `--stop-after` says: what a machine that is taken away would do."""


def first_state() -> jh.TrainState:
    """Two layers."""
    first, second, key = jax.random.split(jax.random.key(0), 3)
    params = {
        "w1": jax.random.normal(first, (PIXELS, HIDDEN)) / jnp.sqrt(PIXELS),
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(second, (HIDDEN, DIGITS)) / jnp.sqrt(HIDDEN),
        "b2": jnp.zeros(DIGITS),
    }
    return jh.TrainState.create(params=params, optimizer=OPTIMIZER, head=HEAD, key=key)


def apply_fn(params: Any, features: Any) -> jax.Array:
    hidden = jax.nn.relu(features["pixels"] @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels."""
    data: Any = load_digits()
    return (data.data / 16).astype(np.float32), data.target.astype(np.int32)


def own_batches(part: str, process: int, epoch: int = 0) -> Iterator[dict[str, Any]]:
    """What one process reads; in training, shuffled."""
    rows = np.array(ROWS[part][process])
    if part == "train":
        rows = np.random.default_rng(epoch).permutation(rows)
    for some in np.split(rows, range(SIZE, len(rows), SIZE)):
        pixels, labels = (array[some] for array in digits())
        yield {"features": {"pixels": pixels}, "labels": labels}


def train_and_test(
    train: Callable[[int], Iterator[Any]], test: Iterator[Any], state: jh.TrainState, epochs: int, folder: Path
) -> tuple[jh.TrainState, dict[str, float]]:
    """The same lines for one process and for many."""
    train_step, eval_step = jh.make_train_step(HEAD, apply_fn, OPTIMIZER), jh.make_eval_step(HEAD, apply_fn)
    fitted = jh.fit(
        *(state, train_step, train),
        epochs=epochs,
        directory=folder,
        checkpoint_every=CHECKPOINT_EVERY,
        progress=jax.process_index() == 0,
    )
    metrics = jh.evaluate(fitted.state, eval_step, test)
    return fitted.state, {name: float(value) for name, value in metrics.compute().items()}


def alone(epochs: int, folder: Path) -> tuple[Any, dict[str, float]]:
    """One process, one device, the same rows in each step."""

    def batches(part: str, epoch: int = 0) -> Iterator[Any]:
        for some in zip_longest(*(own_batches(part, process, epoch) for process in (0, 1))):
            batch = jax.tree.map(lambda *parts: np.concatenate(parts), *(one for one in some if one is not None))
            yield jh.pad_batch(batch, 2 * SIZE)

    state, test = train_and_test(lambda epoch: batches("train", epoch), batches("test"), first_state(), epochs, folder)
    return jax.tree.map(np.asarray, state.params), test


def work(args: argparse.Namespace) -> None:
    """One of the two processes."""
    jax.config.update("jax_num_cpu_devices", 2)
    # Short, so that where one fails the other does not wait for minutes.
    jax.distributed.initialize(
        args.address,
        num_processes=2,
        process_id=args.process_id,
        initialization_timeout=60,
        heartbeat_timeout_seconds=30,
        shutdown_timeout_seconds=30,
    )
    process, mesh, read = jax.process_index(), jax.make_mesh((jax.device_count(),), ("data",)), 0

    def spread(batches: Iterator[Any]) -> Iterator[Any]:
        return (jh.training.shard_batch(batch, mesh) for batch in jh.training.lockstep(batches, SIZE))

    def train(epoch: int) -> Iterator[Any]:
        nonlocal read
        for batch in spread(own_batches("train", process, epoch)):
            if read == args.stop_after:
                raise Stopped
            read += 1
            yield batch

    # Made where it shall be: one copy on each device of each process.
    state = jax.jit(first_state, out_shardings=NamedSharding(mesh, PartitionSpec()))()
    try:
        test = spread(own_batches("test", process))
        state, values = train_and_test(train, test, state, args.epochs, args.out / "checkpoints")
    except Stopped:
        print(f"process {process} stops after {read} steps")
        return
    # No step of these waits for anyone: the state of this process, on one device of its own.
    mine = jax.tree.map(lambda x: x.addressable_data(0), state)
    metrics = jh.evaluate(mine, jh.make_eval_step(HEAD, apply_fn), own_batches("test", process))
    params = jax.tree.map(np.asarray, mine.params)
    found = {"params": params, "test": values, "batches": read, "own": metrics}
    (args.out / f"process_{process}.pickle").write_bytes(pickle.dumps(found))


def start(name: str, args: argparse.Namespace, stop_after: int | None = None) -> list[dict[str, Any]]:
    """Starts both, waits for both, and returns what they found; if one fails, or time is up, neither is left behind."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    folder, running = args.out / name, []
    folder.mkdir(parents=True, exist_ok=True)
    for process in (0, 1):
        (folder / f"process_{process}.pickle").unlink(missing_ok=True)
    options = ["--address", address, "--epochs", str(args.epochs), "--out", str(folder)]
    options += [] if stop_after is None else ["--stop-after", str(stop_after)]
    until = time.monotonic() + args.timeout
    try:
        for process in (0, 1):
            command = [sys.executable, __file__, "--process-id", str(process), *options]
            # Two devices of a CPU each, whatever else this machine has.
            running.append(subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}))
        while any(process.poll() is None for process in running):
            if any(process.poll() for process in running) or time.monotonic() > until:
                break
            time.sleep(0.05)
    finally:
        for process in running:
            # Not by SIGTERM: JAX catches that one, to let a machine that is taken away save its state.
            process.kill()
            process.wait()
    if any(process.returncode for process in running):
        raise SystemExit(f"{name}: the processes ended with {[process.returncode for process in running]}")
    paths = [folder / f"process_{process}.pickle" for process in (0, 1)]
    return [pickle.loads(path.read_bytes()) for path in paths if path.exists()]


def apart(a: Any, b: Any) -> float:
    """The largest difference."""
    return max(float(np.max(np.abs(x - y))) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs all, prints the table and writes `metrics.json`; with `--process-id` it is one of the two processes."""
    parser = argparse.ArgumentParser(description="Two processes train one model.")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument(
        "--stop-after", type=int, help="steps after which to stop (default: half of them, within an epoch)"
    )
    parser.add_argument("--timeout", type=float, default=300, help="seconds that the two may take")
    parser.add_argument("--process-id", type=int, choices=(0, 1), help="be one of the two processes")
    parser.add_argument("--address", default="localhost:1234", help="where process 0 listens")
    parser.add_argument("--out", type=Path, default=Path("two_processes_out"), help="a new folder")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.process_id is not None:
        work(args)
        return {}
    if any(args.out.iterdir()):
        parser.error(f"{args.out} has files in it, and training would go on from its checkpoints: pass a new --out")

    per_epoch = -(-max(len(rows) for rows in ROWS["train"]) // SIZE)
    stop = args.stop_after or per_epoch * (args.epochs // 2) + per_epoch // 2  # within an epoch
    params, test = alone(args.epochs, args.out / "one")
    whole = start("whole", args)
    start("stopped", args, stop)
    resumed = start("stopped", args)

    merged = jh.Metrics.merge(one["own"] for one in whole)
    columns = {
        "one process": test,
        "two": whole[0]["test"],
        "two, resumed": resumed[0]["test"],
        "merged on the host": {name: float(value) for name, value in merged.compute().items()},
    }
    print(f"\n{'test':<14}" + "".join(f"{name:>20}" for name in columns))
    for name in test:
        print(f"{name:<14}" + "".join(f"{values[name]:>20.7f}" for values in columns.values()))
    results = {
        "test": columns,
        "batches read": {"two": whole[0]["batches"], "stopped after": stop, "resumed": resumed[0]["batches"]},
        "differences": {
            "parameters, two and one process": apart(whole[0]["params"], params),
            "parameters, process 0 and 1": apart(whole[0]["params"], whole[1]["params"]),
            "parameters, resumed and whole": max(apart(resumed[i]["params"], whole[i]["params"]) for i in (0, 1)),
        },
    }
    for name, value in results["differences"].items():
        print(f"largest difference, {name:<32}{value:.0e}")
    print(f"batches read: {results['batches read']}")
    (args.out / "metrics.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
