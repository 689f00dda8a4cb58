"""Byte counts of compiled updates: XLA's own figures, so nothing here depends on the machine's speed."""

import jax
import jax.numpy as jnp
import pytest

import jaxheads as jh
from benchmarks import report

ROWS = 65_536
CEILING = 16  # bytes of temporary memory an example
COUNTS = (200, 10_000)

BINS = {
    "probabilities": lambda n: jh.BinaryClassHead(bins=jh.ThresholdGrid(n)),
    "logits": lambda n: jh.BinaryClassHead(bins=jh.LogitGrid(n=n)),
    "exact": lambda n: jh.BinaryClassHead(thresholds=tuple(k / (n + 1) for k in range(1, n + 1))),
}


def temp_per_row(compiled) -> float:
    return report.cost(compiled).temp / ROWS


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "weighted"])
@pytest.mark.parametrize(
    ("bins", "count"),
    [
        pytest.param(bins, count, marks=[] if (bins, count) == ("logits", max(COUNTS)) else [pytest.mark.slow])
        for bins in BINS
        for count in COUNTS
    ],
)
def test_an_update_needs_little_memory_at_any_number_of_thresholds(bins, count, masked):
    head = BINS[bins](count)
    found = temp_per_row(report.compiled_update(head, report.batch_of(head, ROWS, masked)))
    print(f"{bins}, {count} thresholds, {'weighted' if masked else 'plain'}: {found:.1f} bytes of temp an example")
    assert 0 < found <= CEILING


@pytest.mark.parametrize("count", COUNTS)
def test_a_comparison_with_every_threshold_would_be_seen(count):
    """The usual way to count, a bool for every example and threshold."""
    thresholds = jnp.arange(count, dtype=jnp.float32) / count

    def naive(logits, labels):
        above = (jax.nn.sigmoid(logits) > thresholds[None]).astype(jnp.float32)
        return above.T @ labels

    shape = jax.ShapeDtypeStruct((ROWS, 1), jnp.float32)
    assert temp_per_row(jax.jit(naive).lower(shape, shape).compile()) > CEILING


@pytest.mark.slow
def test_the_report_runs(capsys):
    report.main(["--rows", "512", "--repeat", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == len(report.HEADS) + 2


@pytest.mark.slow
@pytest.mark.parametrize("head", [jh.BinaryClassHead(), jh.RegressionHead()], ids=lambda head: type(head).__name__)
def test_exact_counters_cost_little(head):
    """Of the bytes and operations of an update, what the pairs add to plain float32 sums."""
    batch = report.batch_of(head, ROWS)

    def plain(state, batch):
        return state + head.measure(**batch).state

    exact = report.cost(report.compiled_update(head, batch))
    bare = report.cost(jax.jit(plain).lower(head.metrics().state[:, :1], batch).compile())
    assert bare.accessed < exact.accessed <= 1.15 * bare.accessed
    assert bare.flops < exact.flops <= 1.15 * bare.flops


@pytest.mark.slow
def test_a_thousand_classes_are_never_copied():
    """Loss, accuracy, top-5 and the confusion matrix of 65,536 x 1000 logits, 262 MB; the matrix itself is 4."""
    head = jh.MultiClassHead(1000).with_metrics(jh.metrics.TopKAccuracy(5), jh.metrics.ConfusionMatrix())
    logits = jax.ShapeDtypeStruct((ROWS, 1000), jnp.float32)
    labels = jax.ShapeDtypeStruct((ROWS, 1), jnp.int32)
    compiled = jax.jit(lambda labels, logits: head.measure(labels, logits)).lower(labels, logits).compile()
    assert report.cost(compiled).temp <= 0.02 * 4 * ROWS * 1000
