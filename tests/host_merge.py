"""What `test_hosts.py` runs in a process that has no device: `host_merge.py FILES`, of metrics that others pickled."""

import json
import pathlib
import pickle
import sys

from jax._src import xla_bridge

import jaxheads as jh


def main() -> None:
    files = [pathlib.Path(name) for name in sys.argv[1:]]
    metrics = jh.Metrics.merge(part for file in files for part in pickle.loads(file.read_bytes()))
    values = {name: float(value) for name, value in metrics.compute(bounds=True).items()}
    assert "average_loss" in repr(metrics)
    print(json.dumps({"values": values, "has_backend": xla_bridge.backends_are_initialized()}))


if __name__ == "__main__":
    main()
