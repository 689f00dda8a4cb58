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
    """In a line what a state is that has no values to show; None for one that has."""
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
    """Lines of keys and values, then what was left out, then what bins or rounding leave open, and its cure."""
    width = max(len(join_names(*key)) for key in values)
    lines = []
    for key, value in values.items():
        middle = value.value if isinstance(value, Interval) else value
        shown = f"{middle:.6g}" if np.ndim(middle) == 0 else np.array2string(np.asarray(middle), precision=6)
        lines.append(f"  {join_names(*key):<{width}}  {shown}")
    if bad > 0:
        lines.append(f"  {int(bad)} elements had an illegal label, weight or slice and were left out.")
    return lines + _describe_bins(values, histograms)


def rounded(values: Mapping[tuple[str, str | None], Any]) -> list[str]:
    """What is given though rounding may have moved it by more than 1e-2, with the mend; a line for each mend."""
    wide: dict[str, list[str]] = {}
    for key, value in values.items():
        if isinstance(value, Interval) and value.mend is not None:
            lower, upper = np.asarray(value.lower), np.asarray(value.upper)
            # As wide as can be they are of numbers that may all be equal: those have no value, or are in no mean.
            told = np.isfinite(lower) & ~((lower == -1) & (upper == 1))
            if np.any(value.is_wide() & told & ~np.isnan(value.value)):
                wide.setdefault(value.mend, []).append(join_names(*key))
    return [_describe_rounding(names, mend) for mend, names in wide.items()]


def _describe_rounding(metrics: list[str], mend: str) -> str:
    return (
        f"The spread of these numbers is lost in float32 sums of their squares: {', '.join(metrics)}. "
        f"Mend it with {mend or 'shift='}, about the mean of the labels; where all are equal there is none."
    )


def _describe_bins(values: Mapping[tuple[str, str | None], Any], histograms: Iterable[ScoresView]) -> list[str]:
    wide: dict[str | None, list[str]] = {}
    for key, value in values.items():
        if isinstance(value, Interval) and np.ndim(value.value) == 0 and value.is_wide():
            wide.setdefault(value.mend, []).append(f"{join_names(*key)} in [{value.lower:.4g}, {value.upper:.4g}]")
    lines = []
    if binned := wide.pop(None, None):
        advice = next((view.advice() for view in histograms if view.is_coarse()), "a finer grid")
        lines.append(
            f"  The grid is too coarse for these scores: {', '.join(binned)}. "
            f"Mend it with bins={advice}; scores that are equal no grid can tell apart."
        )
    return lines + [f"  {_describe_rounding(metrics, mend or '')}" for mend, metrics in wide.items()]
