"""The logits before the first tree: the best that are the same for all rows, by a formula or by a search."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.boosting.datasets import find_live, list_seen
from jaxheads.contract import NoClosedForm
from jaxheads.engine import predicting, trees
from jaxheads.engine.elements import see
from jaxheads.engine.gathering import at, event_of
from jaxheads.head import Head
from jaxheads.numerics import masking
from jaxheads.numerics.batch import Batch, Devices
from jaxheads.numerics.labels import LabelSpec

POWERS = 2.0 ** np.arange(-6, 21)
QUANTILES = np.linspace(0, 1, 21)
STEPS = 36  # each leaves 0.618 of a bracket: in all 3e-8 of it, the resolution of float32
NOISE = 1e-7  # by which part the losses of a flat stretch may differ, in float32
LARGEST = 30.0  # as in `constant_logits`, for losses that fall without end


def find_constants(head: Head, batch: Batch) -> np.ndarray:
    """Returns the best constant logits of each head inside; zeros where neither a formula nor a search knows them.

    Args:
        head: unbound.
        batch: on the host, without logits.
    """
    if batch.parts is not None:
        return np.concatenate([*trees.each(head, find_constants, trees.parts_of(head, batch)).values()])
    try:
        return predicting.constants(head, batch)
    except NoClosedForm:
        return search_constants(head, batch)


def search_constants(head: Head, batch: Batch) -> np.ndarray:
    """Searches the best constant of each logit by its losses: the best of a grid, then a golden section around it.

    All logits are searched at once. This is right where the loss of each logit depends on this logit alone, which is
    tried. Other heads with several logits, and heads whose rows look at each other, start from zeros.

    Args:
        head: without heads inside.
        batch: on the host, without logits.
    """
    n, zeros = head.logits_dimension, np.zeros(head.logits_dimension)
    if head.coupling not in ("row", None) or event_of(head.logits_spec) != (n,):
        return zeros
    live = find_live(head, batch)
    rows = live.any(-1)
    batch, live = jax.tree.map(lambda x: x[rows], batch), live[rows]

    def lose(logits: np.ndarray) -> np.ndarray:
        losses = np.asarray(_lose(head, batch, np.asarray(logits, np.float32)))
        total = np.sum(losses if n > 1 else losses.reshape(-1, 1), axis=0, dtype=np.float64)
        return np.where(np.isfinite(total), total, np.inf)

    grid = _make_grid(head, batch, live)
    if n > 1 and not _is_separable(lose, grid[len(grid) // 2] + 0.37):
        return zeros
    best, least = _search(lose, grid)
    return np.where(least < lose(zeros), best, zeros)


@jax.jit
def _lose(head: Head, batch: Batch, logits: jax.Array) -> jax.Array:
    """Returns the weighted losses of all rows at the same logits, `[n, 1]` or `[n, d]`."""
    rows = jax.tree.leaves(batch.labels)[0].shape[0]
    seen = see(head, at(head, batch, jnp.broadcast_to(logits[None], (rows, logits.shape[0]))), Devices())
    values, elements = seen.term.values, seen.elements
    weights = (elements.of_whole_rows() if values.shape[-1] == 1 else elements).weights
    return masking.weighted(values, weights)


def _make_grid(head: Head, batch: Batch, live: np.ndarray) -> np.ndarray:
    """Returns logits to try, `[m, d]`, sorted: 0, powers of 2 of both signs, and quantiles of the labels."""
    n, spec = head.logits_dimension, head.label_spec
    powers = POWERS
    if isinstance(spec, LabelSpec) and spec.low is not None and spec.high is not None:
        powers = np.append(POWERS[POWERS < LARGEST], LARGEST)
    columns = [np.tile(np.concatenate([-powers[::-1], [0], powers])[:, None], n)]
    for labels in jax.tree.leaves(batch.labels):
        seen = list_seen(labels, live)
        seen = seen if len(seen) == n else [np.concatenate(seen)] * n
        columns.append(
            np.stack([np.quantile(x.astype(np.float64), QUANTILES) if x.size else 0 * QUANTILES for x in seen], -1)
        )
    return np.sort(np.concatenate(columns), axis=0)


def _is_separable(lose: Callable[[np.ndarray], np.ndarray], logits: np.ndarray) -> bool:
    """Tells whether there is one loss for each logit, which other logits do not change.

    Any two logits differ in a bit of their numbers. So one change for each bit and value tries all pairs.
    """
    before, numbers = lose(logits), np.arange(len(logits))
    if before.shape != logits.shape:
        return False
    for bit in range(len(logits).bit_length()):
        for value in (0, 1):
            changed = (numbers >> bit) & 1 == value
            if (lose(logits + changed) != before)[~changed].any():
                return False
    return True


def _search(lose: Callable[[np.ndarray], np.ndarray], grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best logits `[d]` and their losses. Of equal ones the smallest is best."""
    losses, every = np.stack([lose(row) for row in grid]), np.arange(grid.shape[1])
    close = losses <= losses.min(0) + NOISE * np.abs(losses.min(0))
    i = np.where(close, np.abs(grid), np.inf).argmin(0)
    best, least = grid[i, every], losses[i, every]
    low, high = grid[np.maximum(i - 1, 0), every], grid[np.minimum(i + 1, len(grid) - 1), every]
    golden = (np.sqrt(5) - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    of_left, of_right = lose(left), lose(right)
    for _ in range(STEPS):
        is_left = of_left <= of_right
        low, high = np.where(is_left, low, left), np.where(is_left, right, high)
        new = np.where(is_left, high - golden * (high - low), low + golden * (high - low))
        of_new = lose(new)
        left, right = np.where(is_left, new, right), np.where(is_left, left, new)
        of_left, of_right = np.where(is_left, of_new, of_right), np.where(is_left, of_left, of_new)
    found = np.where(of_left <= of_right, left, right)
    of_found = np.minimum(of_left, of_right)
    is_better = np.isfinite(of_found) & (of_found + NOISE * np.abs(of_found) < least)
    return np.where(is_better, found, best), np.where(is_better, of_found, least)
