"""The comparison with other libraries runs without any of them, and shows what it must."""

import re
import shutil
import sys

import numpy as np
import pytest

from benchmarks import binary, by_hand, figures, peers, program

SMALL = "--peers --rows 64 256 --thresholds 20 50 --wide-rows 32 --classes 12 --labels 6 --repeat 1".split()


def rows_of(lines, heading):
    """The cells of the first table after a heading, by the first cell."""
    start = next(k for k, line in enumerate(lines) if line.startswith(heading))
    first = next(k for k in range(start, len(lines)) if lines[k].startswith("| "))
    end = next(k for k in range(first, len(lines) + 1) if k == len(lines) or not lines[k].startswith("| "))
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[first:end])
    assert {len(row) for row in rows} == {len(header)}
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


@pytest.mark.slow
def test_the_tables_and_the_figure_without_peers(tmp_path, capsys):
    peers.main([*SMALL, "--out", str(tmp_path)])
    lines = (tmp_path / "peers.md").read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == lines

    ours, plain = "jaxheads", ["jaxheads", "jaxheads, logit bins", "one pass over memory"]
    binary = rows_of(lines, "## A")
    assert list(binary) == plain
    assert binary[ours]["ratio, 64"] == binary[ours]["ratio, 256"] == "1x"
    assert binary[ours]["timed calls"] == "1/1"
    assert 0.6 < float(binary[ours]["auc"]) < 0.9
    assert list(rows_of(lines, "### Growth")) == [ours]
    classes = rows_of(lines, "### 32 x 12 classes")
    assert list(classes) == [ours, "one pass over memory", "naive JAX"]
    assert all(classes[ours][name] == classes["naive JAX"][name] for name in ("accuracy", "top-5"))
    assert list(rows_of(lines, "### 32 x 6 labels")) == [ours, "one pass over memory"]
    assert rows_of(lines, "## D")[ours]["right"] == "yes"
    assert len(rows_of(lines, "### What the compensated pair adds")) == 4
    assert list(rows_of(lines, "## F")) == plain[:2]
    assert any(re.fullmatch(r"First eager call of jaxheads, fresh process: \d+ ms\.", line) for line in lines)
    imports = next(line for line in lines if line.startswith("| jaxheads | 1.0x |") and line.endswith("|  |"))
    assert 0 < int(imports.split("|")[4]) < 100

    picture = (tmp_path / "peers.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the floor in C is compiled by gcc, which is not here")
def test_the_floor_in_c_does_the_same_job():
    batch, made = program.batch_of(5_000), by_hand.by_hand(20)
    given = made.prepare(batch)
    made.update(None, given)
    sums, counts = made.update(None, given)
    assert np.float32(1e-38) * np.float32(0.1) > 0  # loading it has left subnormal numbers alone
    logits, labels = given[0].astype(np.float64), given[1]
    p = 1 / (1 + np.exp(-logits))
    expected = [np.sum(np.logaddexp(0, logits) - labels * logits), p.sum(), labels.sum()]
    np.testing.assert_allclose(sums, np.multiply(2, expected), rtol=1e-5)
    buckets = np.searchsorted(np.arange(20) / 19, p)
    for label in (0, 1):
        np.testing.assert_array_equal(
            counts.sum(0)[:20, label], 2 * np.bincount(buckets[labels == label], minlength=20)
        )


def test_every_program_has_a_line_in_the_figure():
    assert set(binary.BINARY) <= set(figures.STYLES)


def test_a_peer_that_is_not_here_is_named(monkeypatch):
    monkeypatch.setitem(program.MODULES, "clu", "no_module_of_this_name")
    monkeypatch.setitem(program.MODULES, "keras", sys.__name__)
    said = []
    assert program.installed(["clu", "keras"], said.append) == ["keras"]
    assert said == ["clu is not installed and left out: pip install -e '.[benchmark]'"]
