"""The original's `BinaryClassHead.update_metrics` in a `tf.function`: ms a call, for table A of peers.py.

TensorFlow 2.15, the last that has it, and JAX want different versions of NumPy, so this runs in an environment of its
own, in turns with `python tests/benchmarks/report.py`:

    python3.11 -m venv tensorflow && tensorflow/bin/pip install tensorflow-cpu==2.15.1
    tensorflow/bin/python tests/benchmarks/tensorflow_head.py
"""

import importlib
import statistics
import time

import numpy as np

ROWS = (1_024, 65_536, 1_048_576)
REPEAT = 10


def main() -> None:
    """Prints a line for each number of rows."""
    tf = importlib.import_module("tensorflow")
    for n in ROWS:
        rng = np.random.default_rng(n)
        logits = rng.standard_normal((n, 1), np.float32)
        labels = (rng.random((n, 1), np.float32) < 1 / (1 + np.exp(-logits))).astype(np.int64)
        head = tf.estimator.BinaryClassHead()
        metrics, batch = head.metrics(), (tf.constant(logits), tf.constant(labels))

        @tf.function
        def update(logits, labels, head=head, metrics=metrics):
            return head.update_metrics(metrics, {}, logits, labels)["average_loss"].result()

        update(*batch)
        times = []
        for _ in range(REPEAT):
            started = time.perf_counter()
            update(*batch).numpy()
            times.append(1e3 * (time.perf_counter() - started))
        print(f"{n:,} rows: {statistics.median(times):.2f} ms, AUC {metrics['auc'].result().numpy():.4f}")


if __name__ == "__main__":
    main()
