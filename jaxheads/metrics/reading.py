"""The layout of a packed state, and the names and intervals of the values that are read from it."""

import dataclasses
import types
import warnings
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.metrics.base import Observation, Path, join_names
from jaxheads.metrics.curves import Interval
from jaxheads.metrics.groups import Grouped
from jaxheads.numerics.brief import cut
from jaxheads.numerics.describing import describe
from jaxheads.numerics.kept import per_head

# A state of more numbers is refused: as pairs of float32 it takes 2.1 GB, which every update reads and writes.
MOST_SLOTS = 2**28


# A stamp has four slots: the number of batches, and that number times each of three small integers, the fingerprint. So
# it adds like the rest of a state, through every sum, scan and device, and is exact for a million batches, also in
# float32 without pairs.
STAMP = 4
MOST = 15
# How far a stamp may be off: a float32 sum of very many batches rounds.
CLOSE = 1e-3


def fingerprint(head: Any) -> tuple[int, ...]:
    """Returns three integers from 1 to 15 that tell the meaning of a head's slots: their names, bins and classes."""
    parts = [f"{join_names(*path)} {_describe(observation)}" for path, observation in head.observed().items()]
    hashed = zlib.crc32("; ".join([*parts, describe(head.slices), *_list_meanings(head)]).encode())
    return tuple(1 + hashed // MOST**i % MOST for i in range(STAMP - 1))


def _list_meanings(head: Any) -> Iterator[str]:
    """Gives the names of the classes, and of the loss, of each head inside."""
    for inner in head.parts().values():
        yield from _list_meanings(inner)
    if not head.parts():
        loss = vars(head).get("loss_fn")
        yield f"{head.vocabulary} {loss.__qualname__ if isinstance(loss, types.FunctionType) else ''}"


def _describe(observation: Any) -> str:
    static = [field.name for field in dataclasses.fields(observation) if field.metadata.get("static")]
    found = {name: describe(vars(observation)[name]) for name in static}
    inner = f" of {_describe(observation.inner)}" if isinstance(observation, Grouped) else ""
    return f"{type(observation).__qualname__} {observation.size} {found}{inner}"


@per_head
def make_stamp(head: Any) -> np.ndarray:
    """Returns the stamp of one batch."""
    return np.array([1, *fingerprint(head)], np.float32)


def check_stamp(head: Any, stamp: np.ndarray) -> None:
    """Refuses a state whose slots mean something else: `stamp [..., 4]`, in float64. An empty state has none."""
    expected = stamp[..., :1] * make_stamp(head)[1:]
    found = stamp[..., 1:]
    if np.array_equal(found, expected):
        return
    with np.errstate(invalid="ignore"):  # an infinite state, as one that has overflown, tells nothing
        wrong = np.isfinite(found) & (np.abs(found - expected) > CLOSE * np.abs(expected))
    if np.any(wrong):
        raise ValueError(
            "This state, or a part of it, was made by a head whose metrics mean something else: other bins, "
            "thresholds, classes or groups, of equal number. It does not fit its head. Given a state for "
            f"{cut(repr(head), 150)}. Restore it for the head that made it."
        )


@per_head
def slots(head: Any, regularized: bool) -> tuple[dict[Path, tuple[int, Observation]], int]:
    """Returns the observations of a head, each with its first slot in the packed state, and the size of the state.

    Slot 0 counts the bad elements; then the stamp; then the regularization's mean, if there is one; then the
    observations.
    """
    offset, layout = 1 + STAMP + (2 if regularized else 0), {}
    for path, observation in head.observed().items():
        layout[path] = (offset, observation)
        offset += observation.size
    if offset > MOST_SLOTS:
        path, (_, largest) = max(layout.items(), key=lambda item: item[1][1].size)
        raise ValueError(
            f"The metrics of {head!r} take {offset * 8 / 1e9:.1f} GB of state, {largest.size * 8 / 1e9:.1f} GB of them "
            f"for {join_names(*path)!r}. The most is {MOST_SLOTS * 8 / 1e9:.1f} GB. A confusion matrix, score "
            "histograms of many classes or bins, slices and bootstrap replicas multiply: leave one out, or take fewer."
        )
    return layout, offset


def name_values(values: Mapping[tuple[str, str | None], Any], bounds: bool, xp: Any) -> dict[str, Any]:
    """Returns values by their full names, with the ends of intervals if they are asked for."""
    intervals = {key: x if isinstance(x, Interval) else Interval(x, None, None) for key, x in values.items()}
    out = {join_names(*key): float32(interval.value, xp) for key, interval in intervals.items()}
    if not bounds:
        return out
    for key, interval in intervals.items():
        if interval.lower is not None:
            _add_end(out, key, "lower", float32(interval.lower, xp))
            _add_end(out, key, "upper", float32(interval.upper, xp))
    return out


def _add_end(out: dict[str, Any], key: tuple[str, str | None], end: str, value: Any) -> None:
    """Adds the end of an interval. Refuses a name that is taken, as by a class called "lower"."""
    name = join_names(key[0], end, key[1])
    if name in out:
        raise ValueError(
            f"{name!r} is a metric, and an end of the interval of {join_names(*key)!r} would be called so too. Give "
            'the class, or the metric, another name than "lower", "upper", "ci_lower" or "ci_upper".'
        )
    out[name] = value


def add_quantiles(
    out: dict[str, Any],
    replicas: Mapping[tuple[str, str | None], Any],
    measured: Mapping[tuple[str, str | None], Any],
    confidence: float,
    undefined: float,
    xp: Any,
    axis: int,
) -> None:
    """Adds `KEY/ci_lower` and `KEY/ci_upper`, over the replicas that have a value.

    The `replicas` and the values `measured` were both read with NaN for undefined.

    A metric without a value has no interval: a NaN among the data shows, though replicas may have missed it.
    """
    for key, value in replicas.items():
        each, whole = find_middle(value), find_middle(measured[key])
        for end, q in (("ci_lower", (1 - confidence) / 2), ("ci_upper", (1 + confidence) / 2)):
            found = xp.where(xp.isnan(whole), whole, take_quantile(each, q, axis, xp))
            _add_end(out, key, end, float32(xp.where(xp.isnan(found), undefined, found), xp))


def find_middle(value: Any) -> Any:
    """Returns the value itself, without the bounds of an interval."""
    return value.value if isinstance(value, Interval) else value


def take_quantile(x: Any, q: float, axis: int, xp: Any) -> Any:
    """Returns a quantile of the numbers that are not NaN."""
    if xp is jnp:
        return jnp.nanquantile(x, q, axis=axis)
    with warnings.catch_warnings():
        # Where no replica has a value, the quantile is NaN. A warning would say it twice.
        warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
        return np.nanquantile(x, q, axis=axis)


def hide_small(value: Any, small: Any, undefined: float, xp: Any) -> Any:
    """Returns a value, or an interval, with `undefined` for slices that are too small."""
    if isinstance(value, Interval):
        return value._make(None if part is None else hide_small(part, small, undefined, xp) for part in value)
    # A metric may be an array: a confusion matrix.
    small = xp.expand_dims(small, tuple(range(np.ndim(small), np.ndim(value))))
    return xp.where(small, xp.full_like(value, undefined), value)


def float32(value: Any, xp: Any) -> Any:
    """Returns the value in float32; outside `jit` it is NumPy's, and a scalar is a `Scalar`."""
    if xp is jnp:
        return jnp.asarray(value, jnp.float32)
    rounded = np.float32(value)
    return Scalar(rounded) if rounded.ndim == 0 else rounded


class Scalar(np.float64):
    """A float32 number that is a Python float as well, so that `json.dumps` and loggers take it."""

    dtype: Any = np.dtype(np.float32)  # pyright: ignore[reportIncompatibleMethodOverride]  # what a float32 has

    def __repr__(self) -> str:
        # The shortest number that is the same float32: 0.9, not 0.8999999761581421.
        return str(np.float32(self))

    __str__ = __repr__

    # It compares as a float32: equal to 0.9 and to np.float32(0.9).
    def __eq__(self, other: Any) -> Any:
        return np.float32(self) == other

    def __ne__(self, other: Any) -> Any:
        return np.float32(self) != other

    __hash__ = np.float64.__hash__

    def __reduce__(self) -> Any:
        return Scalar, (float(self),)


def is_addressable(state: jax.Array) -> bool:
    """Tells whether this process holds all of a state."""
    return state.is_fully_addressable or state.is_fully_replicated


def on_host(state: Any) -> Any:
    """Returns the same state. Refuses one that this process does not hold."""
    if isinstance(state, jax.Array) and not is_addressable(state):
        raise ValueError(
            f"These metrics are spread over processes: state {state.shape} with sharding {state.sharding}. Merge them "
            "with .psum(axis_name) inside the step, so that every process holds the total."
        )
    return state
