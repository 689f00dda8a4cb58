"""Three questions about a flight, one network: late or not, how many minutes, and how it departs.

The flights and the network of `flight_delays.py`, with three outputs under one `jh.MultiHead`, against three networks
of the same size with one output each, trained in the same way.

    pip install "jaxheads[examples]"
    python examples/multi_task_flights.py                         # two to three minutes on two CPU cores
    python examples/multi_task_flights.py --rows 20000            # about a minute, mostly compiling
    python examples/multi_task_flights.py --weighting fixed       # fixed | uncertainty | both (default)

What to look at:

* Labels and `where` are dicts by task. 8,255 flights were cancelled and have no departure; 9,430, with those that were
  diverted, have no arrival. So a diverted flight trains one task and not the other two.
* The minutes are trained on their absolute error. Squares would make the few flights that are ten hours late all that
  counts; so the median is predicted, and the `average_loss` of the task is what one wants to read: how many minutes the
  prediction is off on average, here counted in half-hours, which brings the three losses to one size.
* `weighting="uncertainty"` gives each task a learned weight. It is one more entry of the parameter tree, made by
  `head.init`; the training step is the same line for line.
* A single model is a `jh.MultiHead` of one head, so that all five models share one training step.

What to expect (test flights, seed 0): one network does nearly what three do, with 59 % of their parameters and a third
to two thirds of their training time. Late: AUC 0.695 (0.696 with learned weights) against 0.699 alone, log loss 0.513
against 0.512, the base rate's 0.562. Minutes: off by 22.2 on average, as alone; 23.4 with one guess for all. Departure:
log loss 1.007 against 1.008 alone, the base rate's 1.088. With seeds 1 and 2, too, the AUC is 0.002 to 0.003 below that
of the single model, and the rest is even. The learned weights come out at 1.06, 0.63 and 0.53, about 1 / (2 loss), and
change little, since the losses are of one size to begin with.

No epoch is picked, unlike in `flight_delays.py`: all models are taken as they are when the learning rate has come down
to 0, and October is only printed. It had few delays, and wherever the minutes are among the tasks it picks the first
epoch. Tried with seed 0, that was worse in November and December (AUC 0.675; minutes alone 22.5), so it was dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _flights import (
    LATE_MINUTES,
    Arrays,
    WideAndDeep,
    arguments,
    load_flights,
    make_inputs,
    parse,
    split_by_date,
    write_json,
)
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxheads as jh

UNIT = 30  # minutes
DEPARTURE_MINUTES = (0, 15, 60)  # upper ends of the classes
DEPARTURES = ("on time", "to 15 min", "to 60 min", "later")

BATCH_SIZE = 1024
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.1


def absolute_error(labels: jax.Array, logits: jax.Array) -> jax.Array:
    """What the median minimizes."""
    return jnp.abs(labels - logits)


TASKS: dict[str, jh.Head] = {
    "late": jh.BinaryClassHead(name="late"),
    "minutes": jh.RegressionHead(loss_fn=absolute_error, name="minutes"),
    "departure": jh.MultiClassHead(len(DEPARTURES), label_vocabulary=DEPARTURES, name="departure"),
}
# What is shown of each task, the loss first: a name, the metric's key, and what it is multiplied by.
SHOWN = {
    "late": (("log loss", "average_loss/late", 1), ("AUC", "auc/late", 1), ("accuracy", "accuracy/late", 1)),
    "minutes": (("absolute error, minutes", "average_loss/minutes", UNIT),),
    "departure": (("log loss", "average_loss/departure", 1), ("accuracy", "accuracy/departure", 1)),
}
Values = dict[str, dict[str, float]]  # by task and name


class Data(NamedTuple):
    """What all models are trained and tested on.

    Attributes:
        inputs: what `make_inputs` makes.
        labels: by task, one a flight.
        observed: by task, bool: whether there is a label.
        split: rows by part.
        constants: by task, the logits that do best on the training labels if every flight gets the same.
        sizes: what the network has to know of the inputs.
    """

    inputs: Arrays
    labels: Arrays
    observed: Arrays
    split: Arrays
    constants: dict[str, tuple[float, ...]]
    sizes: dict[str, Any]


class Model(NamedTuple):
    """A trained model.

    Attributes:
        metrics: of the test flights.
        logits: of the test flights.
        parameters: how many.
        seconds: of training, with what compiling took.
        weights: of the tasks in the loss.
    """

    metrics: Any
    logits: jax.Array
    parameters: int
    seconds: float
    weights: dict[str, float]


def make_data(rows: int | None) -> Data:
    """Inputs and labels; where a flight has no label there is one that would not pass unmasked."""
    flights = load_flights(rows)
    split = split_by_date(flights)
    inputs, sizes = make_inputs(flights, split["train"])
    arrival, departure = flights["arrival_delay"], flights["departure_delay"]
    observed = {"late": ~np.isnan(arrival), "minutes": ~np.isnan(arrival), "departure": ~np.isnan(departure)}
    labels = {
        "late": np.where(observed["late"], arrival > LATE_MINUTES, np.nan).astype(np.float32),
        "minutes": (arrival / UNIT).astype(np.float32),
        "departure": np.where(observed["departure"], np.searchsorted(DEPARTURE_MINUTES, departure), -1).astype(
            np.int32
        ),
    }
    known = {name: labels[name][split["train"]][observed[name][split["train"]]] for name in labels}
    rate = np.mean(known["late"], dtype=float)
    share = np.bincount(known["departure"], minlength=len(DEPARTURES)) / len(known["departure"])
    constants = {
        "late": (float(np.log(rate / (1 - rate))),),
        "minutes": (float(np.median(known["minutes"])),),
        "departure": tuple(np.log(share).tolist()),
    }
    return Data(inputs, labels, observed, split, constants, sizes)


def make_batches(data: Data, tasks: Sequence[str], rows: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yields batches of one size; `where` is, by task, false for padding and for flights without a label."""
    for start in range(0, len(rows), BATCH_SIZE):
        batch = rows[start : start + BATCH_SIZE]
        # The last batch is filled up with repetitions of its own rows, which `where` hides.
        padded = np.resize(batch, BATCH_SIZE)
        exists = np.arange(BATCH_SIZE) < len(batch)
        yield {
            "inputs": {name: array[padded] for name, array in data.inputs.items()},
            "labels": {name: data.labels[name][padded] for name in tasks},
            "where": {name: data.observed[name][padded] & exists for name in tasks},
        }


def make_steps(
    head: jh.MultiHead,
    network: WideAndDeep,
    optimizer: optax.GradientTransformation,
    dropout_key: jax.Array,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two compiled functions: one training step, one evaluation step.

    `params` holds the network's and the head's own, which is empty unless the head learns its weights.
    """

    @jax.jit
    def train_step(params, opt_state, batch, step):
        def loss_fn(params):
            rngs = {"dropout": jax.random.fold_in(dropout_key, step)}
            logits = network.apply(params["network"], batch["inputs"], train=True, rngs=rngs)
            return head.loss(labels=batch["labels"], logits=logits, where=batch["where"], params=params["head"])

        grads = jax.grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    @jax.jit
    def eval_step(params, metrics, batch):
        # One array of all logits: the head splits it among the tasks.
        logits: Any = network.apply(params["network"], batch["inputs"])
        labels, where = batch["labels"], batch["where"]
        metrics = head.update_metrics(
            metrics, features=None, logits=logits, labels=labels, where=where, params=params["head"]
        )
        return metrics, logits

    return train_step, eval_step


def train(title: str, head: jh.MultiHead, data: Data, epochs: int, seed: int) -> Model:
    """Trains a model for the tasks of the head, and tests it."""
    tasks = [str(inner.name) for inner in head.heads]
    # It begins at the base rate, so that only what differs from flight to flight is left to learn.
    network = WideAndDeep(**data.sizes, first_guess=sum((data.constants[name] for name in tasks), ()))
    init_key, dropout_key, head_key = jax.random.split(jax.random.key(seed), 3)
    first = {name: array[:1] for name, array in data.inputs.items()}
    params: dict[str, Any] = {"network": network.init(init_key, first), "head": head.init(head_key)}
    steps = -(-len(data.split["train"]) // BATCH_SIZE)
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps * epochs)
    # The weights of the tasks are no matter of weight decay.
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY, mask={"network": True, "head": False})
    opt_state = optimizer.init(params)
    train_step, eval_step = make_steps(head, network, optimizer, dropout_key)

    def evaluate(rows: np.ndarray) -> tuple[Any, jax.Array]:
        metrics, logits = head.metrics(), []
        for batch in make_batches(data, tasks, rows):
            metrics, batch_logits = eval_step(params, metrics, batch)
            logits.append(batch_logits)
        return metrics, jnp.concatenate(logits)[: len(rows)]

    started = time.perf_counter()
    shuffle = np.random.default_rng(seed)
    step = 0
    bar = tqdm(total=steps * epochs, desc=title, leave=False, disable=None, mininterval=0.5)
    for _ in range(epochs):
        for batch in make_batches(data, tasks, shuffle.permutation(data.split["train"])):
            params, opt_state = train_step(params, opt_state, batch, step)
            step += 1
            bar.update()
    jax.block_until_ready(params)
    bar.close()
    seconds = time.perf_counter() - started

    validated = evaluate(data.split["validation"])[0].compute()
    base = measure_constants(data, tasks, data.split["validation"])
    of_base = ", ".join(f"{name} {validated[f'loss/{name}'] / base[f'loss/{name}']:.3f}" for name in tasks)
    print(f"{title:<26}{seconds:>6.1f} s   October, of the base rate's loss: {of_base}")
    metrics, logits = evaluate(data.split["test"])
    log_variances = params["head"].get("log_variances", np.zeros(len(tasks)))
    weights = dict(zip(tasks, np.exp(-np.asarray(log_variances, float)).tolist(), strict=True))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Model(metrics, logits, parameters, seconds, weights)


def measure_constants(data: Data, tasks: Sequence[str], rows: np.ndarray) -> Mapping[str, Any]:
    """The metrics of a model that says the same of every flight."""
    metrics = jh.MultiHead([TASKS[name] for name in tasks]).measure(
        labels={name: data.labels[name][rows] for name in tasks},
        logits={name: np.tile(np.asarray(data.constants[name], np.float32), (len(rows), 1)) for name in tasks},
        where={name: data.observed[name][rows] for name in tasks},
    )
    return metrics.compute()


def shown(metrics: Mapping[str, Any]) -> Values:
    """What is shown of computed metrics, of the tasks that are among them."""
    return {
        task: {name: float(metrics[key]) * unit for name, key, unit in rows}
        for task, rows in SHOWN.items()
        if f"loss/{task}" in metrics
    }


def print_table(columns: Mapping[str, Values], models: Mapping[str, Sequence[Model]]) -> None:
    """Prints metrics, size and time side by side; a group of models counts with all its parameters and seconds."""
    width = 3 + max(map(len, columns))
    print(f"\n{'test flights':<34}" + "".join(f"{column:>{width}}" for column in columns))
    for task, rows in SHOWN.items():
        for name, _, unit in rows:
            digits = 4 if unit == 1 else 2
            cells = "".join(f"{values[task][name]:>{width}.{digits}f}" for values in columns.values())
            print(f"{task + ': ' + name:<34}" + cells)
    parameters = {column: f"{sum(model.parameters for model in group):,}" for column, group in models.items()}
    seconds = {column: f"{sum(model.seconds for model in group):.1f}" for column, group in models.items()}
    for name, cells in (("parameters", parameters), ("seconds of training", seconds)):
        print(f"{name:<34}" + "".join(f"{cells.get(column, '-'):>{width}}" for column in columns))


def draw(model: Model, data: Data, columns: Mapping[str, Values], path: Path) -> None:
    """Draws what one network says of each task against what happened, and what all models save of the base rate's loss.

    The test flights are put in groups of one size by what is predicted; a dot is a group.
    """
    colors = ("#1f5a92", "#c06c2b", "#5d8c4a", "#8a3b5c")
    figure = Figure(figsize=(11, 9), layout="constrained")
    FigureCanvasAgg(figure)
    late, minutes, departure, saved = figure.subplots(2, 2).ravel()
    keys = {"late": "logistic", "minutes": "predictions", "departure": "probabilities"}
    rows = data.split["test"]

    def dots(axes: Any, task: str, predicted: Any, happened: np.ndarray, average: Any, **options: Any) -> None:
        seen = data.observed[task][rows]
        predicted, happened = np.asarray(predicted)[seen], happened[seen]
        groups = np.array_split(np.argsort(predicted), 20)
        said, came = ([average(values[group]) for group in groups] for values in (predicted, happened))
        axes.plot(said, came, "o", ms=5, alpha=0.8, **options)

    outputs = jh.MultiHead([*TASKS.values()]).predictions(model.logits, {task: (key,) for task, key in keys.items()})
    said = {task: outputs[task][key] for task, key in keys.items()}
    labels = {task: array[rows] for task, array in data.labels.items()}
    dots(late, "late", said["late"][:, 0], labels["late"], np.mean, color=colors[0])
    late.set(
        title=f"Late: arrives more than {LATE_MINUTES} minutes late",
        xlabel="predicted probability",
        ylabel="observed share",
    )
    dots(minutes, "minutes", UNIT * said["minutes"][:, 0], UNIT * labels["minutes"], np.median, color=colors[0])
    minutes.set(
        title="Minutes: how late it arrives", xlabel="predicted median, minutes", ylabel="observed median, minutes"
    )
    for k, name in enumerate(DEPARTURES):
        happened = labels["departure"] == k
        dots(departure, "departure", said["departure"][:, k], happened, np.mean, color=colors[k], label=name)
    departure.set(title="Departure: which class", xlabel="predicted probability", ylabel="observed share")
    departure.legend(loc="upper left", frameon=False)
    for axes in (late, minutes, departure):
        low, high = min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])
        axes.plot([low, high], [low, high], "--", color="#9a9a9a", lw=1, zorder=0)

    base, *others = columns
    width = 0.8 / len(others)
    for i, column in enumerate(others):
        losses = {task: SHOWN[task][0][0] for task in SHOWN}
        share = [1 - columns[column][task][name] / columns[base][task][name] for task, name in losses.items()]
        places = np.arange(len(SHOWN)) + width * (i - (len(others) - 1) / 2)
        bars = saved.bar(places, share, 0.9 * width, color=("#9a9a9a", *colors)[i], label=column)
        saved.bar_label(bars, fmt="{:.1%}", fontsize=8, padding=2)
    saved.set(title="Loss saved of the base rate's", xticks=range(len(SHOWN)), xticklabels=[*SHOWN])
    saved.yaxis.set_major_formatter("{x:.0%}")
    saved.margins(y=0.2)
    saved.legend(loc="upper center", ncols=len(others), frameon=False)

    figure.suptitle("One network, three tasks. A dot is a twentieth of the test flights, by what is predicted")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, tests, prints the table and writes the files; returns what `metrics.json` holds."""
    parser = arguments("Three tasks on flights: one network against three.", "multi_task_flights_out")
    parser.add_argument("--weighting", choices=("fixed", "uncertainty", "both"), default="both")
    args = parse(parser, argv)
    started = time.perf_counter()

    data = make_data(args.rows)
    missing = ", ".join(f"{name} {np.sum(~there):,}" for name, there in data.observed.items())
    print(
        f"{len(data.labels['late']):,} flights, without a label: {missing}; "
        + ", ".join(f"{name} {len(rows):,}" for name, rows in data.split.items())
        + f" ({time.perf_counter() - started:.1f} s)"
    )

    models: dict[str, list[Model]] = {"three models": []}
    for name, inner in TASKS.items():
        models["three models"].append(train(f"{name} alone", jh.MultiHead([inner]), data, args.epochs, args.seed))
    for weighting in ("fixed", "uncertainty"):
        if args.weighting in (weighting, "both"):
            head = jh.MultiHead([*TASKS.values()], weighting=weighting)
            models[f"one, {weighting}"] = [train(f"all, {weighting} weights", head, data, args.epochs, args.seed)]

    columns = {"base rate": shown(measure_constants(data, [*TASKS], data.split["test"]))}
    for column, group in models.items():
        columns[column] = {}
        for model in group:
            columns[column] |= shown(model.metrics.compute())
    print_table(columns, models)
    if learned := models.get("one, uncertainty"):
        print("\nlearned weights: " + ", ".join(f"{name} {w:.2f}" for name, w in learned[0].weights.items()))

    figure_path, json_path = args.out / "multi_task_flights.png", args.out / "metrics.json"
    one = next(group[0] for column, group in models.items() if column.startswith("one"))
    draw(one, data, columns, figure_path)
    results = {
        "rows": {name: len(rows) for name, rows in data.split.items()},
        "seed": args.seed,
        "test": columns,
        "models": {
            column: {
                "parameters": sum(model.parameters for model in group),
                "training_seconds": round(sum(model.seconds for model in group), 1),
            }
            for column, group in models.items()
        },
        "learned_weights": {
            name: w for model in models.get("one, uncertainty", []) for name, w in model.weights.items()
        },
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(results, json_path)
    print(f"wrote {figure_path} and {json_path} after {results['seconds']} s")
    return results


if __name__ == "__main__":
    main()
