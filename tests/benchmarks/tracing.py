"""Prints how long JAX traces and lowers a training step. With another checkout of jaxheads it also prints the ratio.

python tests/benchmarks/tracing.py --against ../jaxheads-of-before

Each figure is the median of several turns. In a turn every checkout has a process of its own, one after the other. The
time is that of the processor, so that other work on the machine disturbs it less.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxheads as jh

ROWS, FEATURES, REPEATS = 256, 8, 9
HERE = pathlib.Path(__file__).parents[2]


def linear(params: Any, features: Any) -> jax.Array:
    """A network of one layer."""
    return features["x"] @ params["w"]


def programs() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Returns functions to trace by name, each with its arguments: two heads, in both kinds of training step."""
    rng, optimizer = np.random.default_rng(0), optax.sgd(0.1)
    three = [jh.BinaryClassHead(name="a"), jh.MultiClassHead(5, name="b"), jh.RegressionHead(name="c")]
    labels = {
        "a": rng.integers(0, 2, (ROWS, 1)).astype(np.int32),
        "b": rng.integers(0, 5, (ROWS, 1)).astype(np.int32),
        "c": rng.normal(size=(ROWS, 1)).astype(np.float32),
    }
    batch = {
        "features": {"x": rng.normal(size=(ROWS, FEATURES)).astype(np.float32)},
        "weights": np.ones((ROWS, 1), np.float32),
        "where": np.ones((ROWS, 1), bool),
    }
    found: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
    for name, head, own in (
        ("binary", jh.BinaryClassHead(), labels["a"]),
        ("three heads", jh.MultiHead(three), labels),
    ):
        params = {"w": jnp.zeros((FEATURES, head.logits_dimension))}
        state = jh.TrainState.create(params=params, optimizer=optimizer, head=head, key=jax.random.key(0))

        def spec(params: Any, batch: Any, head: jh.Head = head) -> Any:
            features, rest = batch["features"], {key: value for key, value in batch.items() if key != "features"}
            return head.create_estimator_spec(
                features,
                "train",
                lambda params: linear(params, features),
                optimizer=optimizer,
                trainable_variables=params,
                **rest,
            )

        given = {**batch, "labels": own}
        found[f"{name}, make_train_step"] = jh.make_train_step(head, linear, optimizer), (state, given)
        found[f"{name}, create_estimator_spec"] = spec, (params, given)
    return found


def measure() -> dict[str, list[float]]:
    """Returns milliseconds of tracing and of lowering, by program, with caches that are empty each time."""
    out = {}
    for name, (function, arguments) in programs().items():
        times = []
        for _ in range(REPEATS):
            jax.clear_caches()
            start = time.process_time()
            traced = jax.jit(function).trace(*arguments)
            middle = time.process_time()
            traced.lower()
            times.append((middle - start, time.process_time() - middle))
        # The first time imports modules.
        out[name] = [1e3 * statistics.median(column) for column in zip(*times[1:], strict=True)]
    return out


def measured_in(root: pathlib.Path) -> dict[str, list[float]]:
    """Returns `measure()` of a checkout, from a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--one"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=pathlib.Path, help="another checkout")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--one", action="store_true", help="print one measurement as JSON")
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure()))
        return
    roots = [HERE, *([options.against.resolve()] if options.against else [])]
    turns = [[measured_in(root) for root in roots] for _ in range(options.turns)]
    print(f"{'milliseconds to trace + lower':<40}" + "".join(f"{name:>18}" for name in ("here", "there")[: len(roots)]))
    for name in turns[0][0]:
        columns = [[statistics.median(turn[i][name][k] for turn in turns) for k in (0, 1)] for i in range(len(roots))]
        line = f"{name:<40}" + "".join(f"{trace:>9.0f} + {lower:>6.0f}" for trace, lower in columns)
        print(line + (f"   ratio {sum(columns[0]) / sum(columns[1]):.2f}" if len(columns) > 1 else ""))


if __name__ == "__main__":
    main()
