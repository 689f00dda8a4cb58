"""Prints what a step of `make_train_step` costs beside one written by hand: XLA's figures, and times of both in turns.

python tests/benchmarks/train_step.py
"""

import argparse
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxheads as jh
from benchmarks.report import cost, medians

INPUTS, HIDDEN = 64, 256


def by_hand(head: jh.Head, apply_fn: Callable[..., Any], optimizer: Any) -> Callable[..., Any]:
    """`(params, head_params, opt_state, key, step, batch) -> the same, loss and metrics`: nothing but what must be."""

    def train_step(params: Any, learned: Any, opt_state: Any, key: Any, step: Any, batch: dict[str, Any]):
        def loss_of(trainable: Any):
            logits = apply_fn(trainable["params"], batch["features"])
            return head.loss(**{**batch, "logits": logits}, params=trainable["head"]), logits

        (loss, logits), grads = jax.value_and_grad(loss_of, has_aux=True)({"params": params, "head": learned})
        # Where a head learns nothing, the optimizer sees the parameters of the network alone.
        seen = {"params": params, "head": learned} if learned else params
        updates, opt_state = optimizer.update(grads if learned else grads["params"], opt_state, seen)
        metrics = head.measure(**{**batch, "logits": logits}, params=learned)
        new: Any = optax.apply_updates(seen, updates)
        params, learned = (new["params"], new["head"]) if learned else (new, learned)
        return params, learned, opt_state, key, step + 1, loss, metrics

    return train_step


def network(params: Any, features: Any) -> jax.Array:
    """Two layers."""
    return jax.nn.relu(features["x"] @ params["a"]) @ params["b"]


def main(argv: Sequence[str] | None = None) -> None:
    """One row for each head and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=(1_024, 16_384), help="batch sizes")
    parser.add_argument("--repeat", type=int, default=20, help="timed calls of each")
    options = parser.parse_args(argv)
    rng, optimizer = np.random.default_rng(0), optax.adam(1e-3)
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}\n")
    print("| head | rows | Mflop, both | MB accessed, both | ms, made | ms, by hand | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for head in (jh.RegressionHead(), jh.BinaryClassHead(), jh.MultiClassHead(10)):
        sizes = {"a": (INPUTS, HIDDEN), "b": (HIDDEN, head.logits_dimension)}
        params = {name: jnp.asarray(rng.normal(size=size) / 8, jnp.float32) for name, size in sizes.items()}
        state = jh.TrainState.create(params=params, optimizer=optimizer, head=head, key=jax.random.key(0))
        for rows in options.rows:
            x = jnp.asarray(rng.normal(size=(rows, INPUTS)), jnp.float32)
            labels = jnp.asarray(rng.integers(0, max(2, head.logits_dimension), rows), jnp.int32)
            batch = {"features": {"x": x}, "labels": labels}
            bare = (state.params, {}, state.opt_state, state.key, state.step, batch)
            made = jax.jit(jh.make_train_step(head, network, optimizer)).lower(state, batch).compile()
            hand = jax.jit(by_hand(head, network, optimizer)).lower(*bare).compile()
            ours, theirs = cost(made), cost(hand)
            times = medians({"made": (made, (state, batch)), "hand": (hand, bare)}, options.repeat)
            pairs = ((ours.flops, theirs.flops), (ours.accessed, theirs.accessed))
            both = [" against ".join(dict.fromkeys(f"{figure / 1e6:.2f}" for figure in pair)) for pair in pairs]
            cells = [f"{head}", f"{rows:,}", *both, f"{times['made']:.3f}", f"{times['hand']:.3f}"]
            print(f"| {' | '.join(cells)} | {times['made'] / times['hand']:.3f} |")


if __name__ == "__main__":
    main()
