"""What `test_hosts.py` runs: processes measure, and their parent, which has no device, merges what they send."""

import json
import multiprocessing
from typing import Any

import numpy as np
from jax._src import xla_bridge

import jaxheads as jh

HEAD, PARTS = jh.BinaryClassHead(thresholds=(0.3,)), 4


def draw(part: int) -> dict[str, Any]:
    rng = np.random.default_rng(part)
    logits = rng.normal(size=(10 + part, 1)).astype(np.float32)
    labels = (logits + rng.normal(size=logits.shape) > 0).astype(np.int32)
    return {"labels": labels, "logits": logits, "weights": rng.random(logits.shape).astype(np.float32)}


def measure(part: int) -> jh.Metrics:
    return HEAD.measure(**draw(part))


def main() -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        metrics = jh.Metrics.merge(pool.map(measure, range(PARTS)))
    values = {name: float(value) for name, value in metrics.compute(bounds=True).items()}
    assert "average_loss" in repr(metrics)
    print(json.dumps({"values": values, "has_backend": xla_bridge.backends_are_initialized()}))


if __name__ == "__main__":
    main()
