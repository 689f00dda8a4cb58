"""One objective, one metric and one head, shared by eight threads: each gets the numbers of its own labels."""

import concurrent.futures
import sys
from typing import Any

import numpy as np
import pytest

import jaxheads as jh

THREADS, ROWS = 8, 16


@pytest.fixture(autouse=True)
def _switch_often():
    """Threads take turns every microsecond, not every five milliseconds: what can go wrong does so soon."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Column:
    """A dataset of labels and weights, as boosters hand it over."""

    def __init__(self, labels: np.ndarray):
        self.labels = labels

    def get_label(self) -> np.ndarray:
        return self.labels

    def get_weight(self) -> None:
        return None


def run_in_threads(call: Any, calls: int) -> list[str]:
    """Calls `call(rng, labels, logits)` in all threads; returns what it found wrong."""

    def work(thread: int) -> list[str]:
        rng, found = np.random.default_rng(thread), []
        # A booster asks for the same labels in every round, and they are remembered.
        labels = rng.integers(0, 2, ROWS).astype(np.float32)
        for _ in range(calls):
            found += call(labels, rng.normal(size=ROWS).astype(np.float32))
        return found

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return [line for lines in pool.map(work, range(THREADS)) for line in lines]


@pytest.mark.parametrize("calls", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_threads_get_the_gradients_of_their_own_labels(calls):
    objective = jh.boosting.xgboost_objective(jh.BinaryClassHead())

    def call(labels, logits):
        expected = 1 / (1 + np.exp(-logits.astype(np.float64))) - labels
        by_arrays, _ = objective(labels, logits)
        by_dataset, _ = objective(logits, Column(labels))
        return [
            f"{name}: {found}"
            for name, found in {"arrays": by_arrays, "dataset": by_dataset}.items()
            if not np.allclose(found, expected, rtol=1e-5)
        ]

    assert not run_in_threads(call, calls)[:3]


@pytest.mark.parametrize("calls", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_threads_get_the_metrics_of_their_own_labels(calls):
    head = jh.BinaryClassHead()
    metric = jh.boosting.lightgbm_metric(head, keys=("average_loss", "accuracy"))

    def call(labels, logits):
        z = logits.astype(np.float64)
        expected = np.mean(np.logaddexp(0, z) - labels * z), np.mean((z > 0) == labels)
        logged = [value for _, value, _ in metric(labels, logits)]
        values = head.measure(labels[:, None], logits[:, None]).compute(warn=False)
        measured = values["average_loss"], values["accuracy"]
        return [str((found, expected)) for found in (logged, measured) if not np.allclose(found, expected, rtol=1e-5)]

    assert not run_in_threads(call, calls)[:3]
