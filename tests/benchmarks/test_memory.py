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


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bins", BINS)
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
