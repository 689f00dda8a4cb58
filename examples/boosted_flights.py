"""Will this flight arrive more than 15 minutes late? One head, three learners: flax, XGBoost, LightGBM.

All 336,776 flights that were to leave New York City in 2013, split by date, from what is known when
the hour of the departure begins; see `flight_delays.py` for the data and the network. The boosted
trees see the same columns as they are: categories as categories, missing readings as missing.

    pip install -e '.[examples,boosting]'
    python examples/boosted_flights.py                  # half a minute on two CPU cores
    python examples/boosted_flights.py --rows 20000     # 15 s, mostly compiling

What to look at:

* One `jh.BinaryClassHead` with two more metrics. Its loss trains the network through optax, and its
  gradient and Hessian train the trees; its metrics fill the boosters' own logs, where October's loss
  says when to stop, and the table of the test.
* All four columns are the same object's `measure` of logits, so no number differs because two
  libraries define it differently.
* Flights without an arrival have no label: `where=` keeps them out of the network's loss and out of
  the trees' alike.
* `head.constant_logits` is where the trees begin, the network's first guess, and the first column.

What to expect: no learner is better than another, a test AUC of 0.699, 0.700 and 0.698, log loss 0.512,
0.511 and 0.511 against the 0.562 of the base rate; most of what delays a flight has yet to happen. The
trees need no embeddings, crosses or scaling for it, and about 50 rounds, 2 to 6 s.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pandas as pd
from _flights import (
    Data,
    WideAndDeep,
    arguments,
    cell,
    fit,
    flax_functions,
    floats,
    late_flights,
    new_figure,
    parse,
    predict,
    print_table,
    save,
    steps_an_epoch,
    write_json,
)

import jaxheads as jh

LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.1
ROUNDS = 400
PATIENCE = 30
CATEGORIES = ("carrier", "origin", "dest")
NUMBERS = ("weekday", "hour", "departure", "arrival", "duration", "distance", "scheduled", "scheduled_before")
# Each booster in its own words: about as many leaves, and enough flights in each.
PARAMS: dict[str, dict[str, Any]] = {
    "xgboost": {"max_depth": 6, "min_child_weight": 20},
    "lightgbm": {"num_leaves": 63, "min_child_samples": 100},
}
SHARED: dict[str, Any] = {"learning_rate": 0.1, "colsample_bytree": 0.7, "reg_lambda": 10.0, "seed": 0}
NAMES = {"xgboost": "XGBoost", "lightgbm": "LightGBM"}
SHOWN = {
    "average_loss": "log loss",
    "auc": "AUC",
    "auc_precision_recall": "AUC, precision-recall",
    "accuracy": "accuracy",
    "brier_score": "Brier score",
    "expected_calibration_error": "calibration error",
}
COLORS = {"network": "#1f5a92", "XGBoost": "#c7622b", "LightGBM": "#3d8b5a"}


def frame(data: Data) -> pd.DataFrame:
    """What is known of each flight, for learners that take categories and missing values."""
    columns = {name: pd.Categorical(data.columns[name]) for name in CATEGORIES}
    columns |= {name: data.columns[name].astype(np.float32) for name in NUMBERS}
    weather = data.columns["weather"].astype(np.float32)
    columns |= {f"weather_{i}": weather[:, i] for i in range(weather.shape[1])}
    return pd.DataFrame(columns)


def train_network(head: jh.Head, data: Data, epochs: int, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The test's logits, and what to tell of the training."""
    init, apply_fn = flax_functions(WideAndDeep(**data.sizes, first_guess=data.first_guess), data.inputs)
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps_an_epoch(data) * epochs)
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
    init_key, key = jax.random.split(jax.random.key(seed))
    state = jh.TrainState.create(params=init(init_key), optimizer=optimizer, head=head, key=key)
    train_step = jax.jit(jh.make_train_step(head, apply_fn, optimizer), donate_argnums=0)
    best = fit(state, train_step, jax.jit(jh.make_eval_step(head, apply_fn)), data, epochs, seed)
    predict_step = jax.jit(jh.make_predict_step(head, apply_fn, keys="logits"))
    logits = predict(predict_step, best.state, data, "test")["logits"]
    return logits, {"seconds": best.seconds, "october": best.validation["average_loss"], "best_epoch": best.epoch}


def train_trees(head: jh.Head, data: Data, x: pd.DataFrame, booster: str) -> tuple[np.ndarray, dict[str, Any]]:
    """The test's logits, and what to tell of the training."""
    started = time.perf_counter()
    rows, october = data.split["train"], data.split["validation"]
    model = jh.boosting.BoostedHead(
        *(head, booster),
        n_estimators=ROUNDS,
        early_stopping_rounds=PATIENCE,
        monitor="average_loss",
        **PARAMS[booster],
        **SHARED,
    )
    model.fit(
        *(x.iloc[rows], data.labels[rows]),
        where=data.observed[rows],
        eval_set=[(x.iloc[october], data.labels[october])],
        eval_where=[data.observed[october]],
    )
    losses = model.evals_result_["validation_0"]["average_loss"]
    best = model.best_iteration_
    assert best is not None  # training could have stopped early
    seconds = time.perf_counter() - started
    print(f"{NAMES[booster]}  {best + 1} rounds  October's loss {losses[best]:.4f}  {seconds:.1f} s")
    told = {"seconds": seconds, "october": losses[best], "best_round": best + 1, "losses": losses}
    return model.predict_logits(x.iloc[data.split["test"]]), told


def draw(found: Mapping[str, jh.Metrics], told: Mapping[str, dict[str, Any]], base: float, path: Path) -> None:
    """Draws October's loss by round, and of the test ROC and reliability."""
    figure = new_figure(13, 4.4)
    rounds, roc, reliability = figure.subplots(1, 3)
    for name, metrics in found.items():
        color, about = COLORS[name], told[name]
        if "losses" in about:
            rounds.plot(np.arange(1, len(about["losses"]) + 1), about["losses"], color=color, label=name)
            rounds.plot(about["best_round"], about["october"], "o", color=color, ms=5)
        else:
            rounds.axhline(about["october"], ls="--", color=color, label=f"{name}, best epoch")
        false_positives, true_positives, _ = metrics.curve("roc")
        roc.plot(false_positives, true_positives, color=color, label=f"{name}, AUC {metrics.compute()['auc']:.3f}")
        predicted, happened, weight = metrics.reliability(bins=10)
        crowded = weight > 0.002 * weight.sum()
        reliability.plot(predicted[crowded], happened[crowded], "o-", color=color, ms=4, label=name)
    rounds.set(title="October, after each round", xlabel="rounds of boosting", ylabel="log loss")
    rounds.legend(frameon=False)
    for axes in (roc, reliability):
        axes.plot([0, 1], [0, 1], ":", color="#9a9a9a", lw=1)
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
    roc.set(title="ROC, test", xlabel="false positive rate", ylabel="true positive rate")
    roc.legend(loc="lower right", frameon=False)
    reliability.axvline(base, ls=":", color="#9a9a9a", lw=1)
    reliability.set(title="Reliability, test", xlabel="predicted probability", ylabel="share that was late")
    reliability.legend(loc="upper left", frameon=False)
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains all three, prints the table and writes the files; returns what `metrics.json` holds."""
    parser = arguments("Predict late flights with a network and with boosted trees under one head.", "boosted_out")
    args = parse(parser, argv)
    started = time.perf_counter()

    data = late_flights(args.rows)
    head = jh.BinaryClassHead().with_metrics(jh.metrics.BrierScore(), jh.metrics.ExpectedCalibrationError())
    rows, test = data.split["train"], data.split["test"]
    constant = head.constant_logits(data.labels[rows], where=data.observed[rows])
    data = data._replace(first_guess=tuple(constant.tolist()))

    logits, told = {}, {}
    logits["network"], told["network"] = train_network(head, data, args.epochs, args.seed)
    x = frame(data)
    for booster, name in NAMES.items():
        logits[name], told[name] = train_trees(head, data, x, booster)

    def measure(logits: Any) -> jh.Metrics:
        return head.measure(labels=data.labels[test], logits=logits, where=data.observed[test])

    found = {name: measure(z) for name, z in logits.items()}
    base = floats(measure(np.tile(constant, (len(test), 1))))
    tested = {"base rate": base} | {name: floats(metrics) for name, metrics in found.items()}
    table = {label: [cell(values[key]) for values in tested.values()] for key, label in SHOWN.items()}
    table["seconds of training"] = ["-", *(f"{told[name]['seconds']:.1f}" for name in found)]
    print_table("test", list(tested), table)

    figure_path, json_path = args.out / "boosted_flights.png", args.out / "metrics.json"
    draw(found, told, base["label/mean"], figure_path)
    results = {
        "rows": {name: len(part) for name, part in data.split.items()},
        "constant": float(constant[0]),
        "test": tested,
        "training": told,
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(results, json_path)
    print(f"\nwrote {figure_path} and {json_path} after {results['seconds']} s")
    return results


if __name__ == "__main__":
    main()
