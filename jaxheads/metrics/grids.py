"""The edges of a score histogram."""

import abc
import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

from jaxheads.numerics import brief, edges, inputs, stable
from jaxheads.numerics.edges import Edges, edges_of


@dataclasses.dataclass(frozen=True)
class Layout:
    """The edges of a histogram: the grid's, one at each user threshold, and one at z > 0.

    Attributes:
        edges: the sorted edges in the space that is compared (logits or probabilities).
        probabilities: the probability at each edge; `n_buckets - 1` of them.
        logits: the logit at each edge.
        curve: the positions of the edges that are points of the curves.
        zero: the position of the edge that says z > 0.
        position: the position of the edge of each user threshold.
        representative: a probability that stands for each bucket.
    """

    edges: Edges
    probabilities: np.ndarray
    logits: np.ndarray
    curve: np.ndarray
    zero: int
    position: dict[float, int]
    representative: np.ndarray

    @property
    def n_buckets(self) -> int:
        return len(self.probabilities) + 1


class AbstractGrid(abc.ABC):
    """The bins of a score histogram."""

    @abc.abstractmethod
    def layout(self, thresholds: tuple[float, ...]) -> Layout:
        """Returns all edges, with the user's thresholds among them."""

    @abc.abstractmethod
    def buckets(self, layout: Layout, logits: jax.Array) -> jax.Array:
        """Returns the bucket of each logit: how many edges it exceeds."""

    def exceeds(self, logits: jax.Array, threshold: float | tuple[float, ...]) -> jax.Array:
        """Tells which logits lie above a user threshold, or each above its own, as edges in the layout decide."""
        return logits > stable.as_edges(threshold, logits, stable.log_odds)

    @abc.abstractmethod
    def finer(self, low: float, high: float) -> str:
        """Returns the grid to use where scores between two logits share too few bins, as text."""


# More bins are refused before memory is asked for. No scores need as many: float32 has fewer numbers from 1 to 2.
MOST_BINS = 2**22


def _check_size(grid: Any, n: Any, least: int) -> None:
    if not inputs.is_integer(n, least):
        raise ValueError(f"{type(grid).__name__} needs an integer n of at least {least}. Given {n!r}.")
    if n > MOST_BINS:
        size = n * 16 / 1e9
        raise ValueError(f"{type(grid).__name__} takes at most {MOST_BINS} bins. Given {n}: {size:.1f} GB of state.")
    object.__setattr__(grid, "n", int(n))


@dataclasses.dataclass(frozen=True)
class LogitGrid(AbstractGrid):
    """`n` bins over logits: uniform from `low` to `high`, the first and the last open.

    It is fine where the scores of rare events lie, unlike a grid on probabilities. A user threshold t is an exact edge:
    positive means z > float32(ln(t / (1 - t))). Bins whose width is a power of two, at multiples of it, take a third of
    the time: the default bins are 1/64 wide.

    Args:
        low, high: the range of logits that the bins divide.
        n: the number of bins.

    >>> LogitGrid(-8, 8, 1024)
    LogitGrid(low=-8.0, high=8.0, n=1024)
    """

    low: float = -16.0
    high: float = 16.0
    n: int = 2050

    def __post_init__(self):
        _check_size(self, self.n, 3)
        for name in ("low", "high"):
            value = vars(self)[name]
            if not isinstance(value, (int, float, np.number)):
                raise ValueError(f"LogitGrid: {name} must be a number. Given {brief.tell(value)}.")
            object.__setattr__(self, name, float(value))
        if not -1e37 < self.low < self.high < 1e37 or np.float32(self.low) == np.float32(self.high):
            raise ValueError(
                f"LogitGrid needs low < high, finite and below 1e37 in size. Given low={self.low}, high={self.high}."
            )
        if np.unique(self._space_edges()).size != self.n - 1:
            raise ValueError(
                f"{self!r} has bins narrower than float32 can tell apart: fewer bins, or a range nearer to 0."
            )

    def _space_edges(self) -> np.ndarray:
        return np.linspace(self.low, self.high, self.n - 1).astype(np.float32)

    def layout(self, thresholds: tuple[float, ...]) -> Layout:
        return _lay_out_logits(tuple(self._space_edges().tolist()), thresholds)

    def buckets(self, layout: Layout, logits: jax.Array) -> jax.Array:
        extra = self._list_others(layout)
        if extra is None:
            return layout.edges.locate(logits)
        return edges.locate_uniform(logits, *self._find_multiples(), extra)

    def _find_multiples(self) -> tuple[int, int, float]:
        """Returns three numbers for edges at multiples of a power of two; zeros for other edges.

        They are the first multiple, the number of multiples, and 1 divided by that power.
        """
        width = (self.high - self.low) / (self.n - 2)
        first = self.low / width
        # Beyond 2^22 multiples a float32 logit divided by the width is no exact number of them.
        whole = math.frexp(width)[0] == 0.5 and first == int(first) and -(2**22) < first <= 2**22 - self.n
        return (int(first), self.n - 1, 1 / width) if whole and 2**-60 < width < 2**60 else (0, 0, 0.0)

    def _list_others(self, layout: Layout) -> tuple[float, ...] | None:
        """Returns the edges that are no multiples; None if a bucket cannot be found without looking it up."""
        first, count, scale = self._find_multiples()
        if not count:
            return None
        multiple = layout.logits * scale
        on_grid = (multiple == np.round(multiple)) & (multiple >= first) & (multiple < first + count)
        extra = layout.logits[~on_grid]
        return tuple(extra.tolist()) if len(extra) <= edges.MOST_COMPARED else None

    def finer(self, low: float, high: float) -> str:
        # Rounded outwards to two digits of the span, and no more bins than float32 has numbers there. Scores in one bin
        # of no width (|z| < 1e-7, whose float32 probability is 0.5) are given some room.
        room = 1e-6 * max(1.0, abs(high)) if high <= low else 0.0
        low, high = low - room, high + room
        unit = 10.0 ** (math.floor(math.log10(high - low)) - 1)
        low, high = (math.floor(low / unit) - 1) * unit, (math.ceil(high / unit) + 1) * unit
        spacing = float(np.spacing(np.float32(max(abs(low), abs(high)))))
        n = min(max(self.n, 2048), max(3, int((high - low) / (2 * spacing))))
        return f"jh.LogitGrid({low:.9g}, {high:.9g}, {n})"


@dataclasses.dataclass(frozen=True)
class GrowingGrid(AbstractGrid):
    """The default: bins over logits that are 1/64 wide from -16 to 16, and grow with |z| beyond, up to 1024.

    Beyond 16 there are 32 bins each time that |z| doubles, so a bin is at most 1/32 of |z| wide. The first and last
    bins are open. A user threshold is an exact edge, as in a `LogitGrid`. If all scores lie close together, as those of
    a rare event may, `compute` warns, and names a `LogitGrid` that fits.

    >>> GrowingGrid()
    GrowingGrid()
    """

    def layout(self, thresholds: tuple[float, ...]) -> Layout:
        return _lay_out_logits(edges.list_growing(), thresholds)

    def buckets(self, layout: Layout, logits: jax.Array) -> jax.Array:
        extra = np.setdiff1d(layout.edges.values, np.asarray(edges.list_growing(), np.float32))
        if len(extra) > edges.MOST_COMPARED:
            # These edges are looked up by themselves: a table for all would have large cells, as the grid is wide.
            return edges.locate_growing(logits, ()) + edges.edges_of(tuple(extra.tolist())).locate(logits)
        return edges.locate_growing(logits, tuple(extra.tolist()))

    def finer(self, low: float, high: float) -> str:
        return LogitGrid().finer(low, high)


@functools.lru_cache(maxsize=64)
def _lay_out_logits(grid: tuple[float, ...], thresholds: tuple[float, ...]) -> Layout:
    user = np.asarray([stable.log_odds(t) for t in thresholds], np.float32)
    values = np.unique(np.concatenate([np.asarray(grid, np.float32), user, np.zeros(1, np.float32)]))
    position = np.searchsorted(values, user)
    z = values.astype(np.float64)
    # The open bins are represented by their one edge: nothing is known of the scores beyond.
    middles = np.concatenate([z[:1], (z[1:] + z[:-1]) / 2, z[-1:]])
    return Layout(
        edges=edges_of(tuple(values.tolist())),
        probabilities=_sigmoid(z),
        logits=z,
        curve=np.arange(len(values)),
        zero=int(np.searchsorted(values, np.float32(0))),
        position=dict(zip(thresholds, position.tolist(), strict=True)),
        representative=_sigmoid(middles),
    )


@dataclasses.dataclass(frozen=True)
class ThresholdGrid(AbstractGrid):
    """`n` thresholds 0, 1/(n-1), ..., 1 on probabilities: `ThresholdGrid(200)` gives TensorFlow's numbers.

    Positive means float32 p > t. All probabilities of rare events may fall into one bin; the default has bins over
    logits for that reason.

    Args:
        n: the number of thresholds, both ends included.
    """

    n: int = 200

    def __post_init__(self):
        _check_size(self, self.n, 3)

    def layout(self, thresholds: tuple[float, ...]) -> Layout:
        return _lay_out_thresholds(self, thresholds)

    def buckets(self, layout: Layout, logits: jax.Array) -> jax.Array:
        # z > 0 may hold where float32 p is exactly 0.5, so it is an edge of its own just below p > 0.5.
        return layout.edges.locate(jax.nn.sigmoid(logits)) + (logits > 0).astype(np.int32)

    def exceeds(self, logits: jax.Array, threshold: float | tuple[float, ...]) -> jax.Array:
        return jax.nn.sigmoid(logits) > stable.as_edges(threshold, logits, float)

    def finer(self, low: float, high: float) -> str:
        return LogitGrid().finer(low, high)


@functools.lru_cache(maxsize=64)
def _lay_out_thresholds(grid: ThresholdGrid, thresholds: tuple[float, ...]) -> Layout:
    inner = (np.arange(1, grid.n - 1) / (grid.n - 1)).astype(np.float32)
    user = np.asarray(thresholds, np.float32)
    values = np.unique(np.concatenate([inner, user]))
    zero = int(np.searchsorted(values, np.float32(0.5)))
    shifted = np.arange(len(values)) + (np.arange(len(values)) >= zero)
    p = np.insert(values.astype(np.float64), zero, 0.5)
    ends = np.concatenate([[0.0], p, [1.0]])
    return Layout(
        edges=edges_of(tuple(values.tolist())),
        probabilities=p,
        logits=np.log(p) - np.log1p(-p),
        curve=shifted[np.searchsorted(values, inner)],
        zero=zero,
        position=dict(zip(thresholds, shifted[np.searchsorted(values, user)].tolist(), strict=True)),
        representative=(ends[1:] + ends[:-1]) / 2,
    )


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -z))
