"""`Metrics` as a notebook shows them."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxheads.metrics.base import join_names
from jaxheads.metrics.curves import Interval, ScoresView
from jaxheads.metrics.reading import is_addressable


def kind(state: Any, size: int) -> str | None:
    """Returns a line about a state that has no values to show; None for a state that has values."""
    if not isinstance(state, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)):
        return f"{type(state).__name__}[]"
    line = f"{state.dtype}{list(state.shape)}"
    if isinstance(state, (Tracer, jax.ShapeDtypeStruct)) or state.ndim != 2:
        return line
    if isinstance(state, jax.Array) and state.is_deleted():
        return f"{line}, deleted (it was donated to a compiled function)"
    if isinstance(state, jax.Array) and not is_addressable(state):
        return f"{line}, not addressable from here"
    return None if state.shape[0] == size else f"{line}, which does not fit the head"


def table(values: Mapping[tuple[str, str | None], Any], bad: Any, histograms: Iterable[ScoresView]) -> list[str]:
    """Returns lines: keys and values, then the elements left out, then the metrics that bins leave open, and a cure."""
    width = max(len(join_names(*key)) for key in values)
    lines = []
    for key, value in values.items():
        middle = value.value if isinstance(value, Interval) else value
        shown = f"{middle:.6g}" if np.ndim(middle) == 0 else np.array2string(np.asarray(middle), precision=6)
        lines.append(f"  {join_names(*key):<{width}}  {shown}")
    if bad > 0:
        lines.append(f"  {int(bad)} elements had an illegal label, weight or slice and were left out.")
    wide = describe_bins({key: value for key, value in values.items() if isinstance(value, Interval)}, histograms)
    return [*lines, f"  {wide}"] if wide else lines


def describe_bins(values: Mapping[tuple[str, str | None], Interval], histograms: Iterable[ScoresView]) -> str:
    """Tells which metrics the bins leave open, and the grid that mends it; empty if none is open by more than 1e-2."""
    binned = []
    for key, value in values.items():
        if np.any(value.is_wide()):
            bounds = f" in [{value.lower:.4g}, {value.upper:.4g}]" if np.ndim(value.value) == 0 else ""
            binned.append(f"{join_names(*key)}{bounds}")
    if not binned:
        return ""
    coarse = next((view for view in histograms if view.total.ndim == 0 and view.is_coarse()), None)
    mend = "narrower bins where the scores lie, bins=jh.LogitGrid(low, high, n)"
    if coarse is not None:
        mend = f"bins={coarse.advice()}"
        if coarse.exclusive:
            mend = f"jh.metrics.OneVsRestAuc({mend}), whose bins serve all metrics of these scores"
    return (
        f"The grid is too coarse for these scores: {', '.join(binned)}. "
        f"Mend it with {mend}; scores that are equal no grid can tell apart."
    )
