"""Programs of several libraries in turns over one batch, and their figures as rows of a table."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from benchmarks.program import OURS, Program
from benchmarks.report import Cost, cost, timings


class Result(NamedTuple):
    """One program over one batch.

    Attributes:
        ms: the median.
        calls: how many were timed.
        cost: what XLA says, where JAX compiles it.
        values: what the library says of the batch.
    """

    ms: float
    calls: int
    cost: Cost | None
    values: Mapping[str, float]


def race(programs: Mapping[str, Program], batch: Mapping[str, Any], repeat: int, seconds: float) -> dict[str, Result]:
    """The result of each program; `seconds` is the budget of each."""
    updates, costs = {}, {}
    for title, program in programs.items():
        given = program.state, program.prepare(batch)
        compiled = jax.jit(program.update).lower(*given).compile() if program.traced else program.update
        updates[title] = (compiled, given)
        costs[title] = cost(compiled) if program.traced else None
    times = timings(updates, repeat, seconds)
    results = {}
    for title, program in programs.items():
        update, given = updates[title]
        values = {
            name: float(value) for name, value in program.read(update(*given)).items() if jax.numpy.size(value) == 1
        }
        ms = program.share * statistics.median(times[title])
        results[title] = Result(ms, len(times[title]), costs[title], values)
    return results


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown; all but the first column are numbers."""
    rule = ["---", *(len(columns) - 1) * ["---:"]]
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]


def figure(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def compared(
    results: Mapping[str, Mapping[str, Result]], rows: Mapping[str, int], checked: Sequence[str], growth: bool = False
) -> list[str]:
    """The table of one program a row: its time over that of jaxheads first, then times, bytes and what it says.

    Args:
        results: by size, in the words of the table, and title.
        rows: the number of examples of each size.
        checked: names of values to show.
        growth: also the last time over the first.
    """
    sizes, last = list(results), list(results)[-1]
    columns = [
        *(["program"] + [f"ratio, {size}" for size in sizes] + ["growth"] * growth),
        *([f"ms, {size}" for size in sizes] + ["timed calls", "temp B/row", "accessed B/row", *checked]),
    ]
    lines = []
    for title in results[last]:
        found = [results[size][title] for size in sizes]
        ours = [results[size][OURS] for size in sizes]
        counted = found[-1].cost
        lines.append(
            [
                title,
                *(f"{figure(theirs.ms / own.ms)}x" for theirs, own in zip(found, ours, strict=True)),
                *([f"{found[-1].ms / found[0].ms:.1f}x"] * growth),
                *(figure(each.ms) for each in found),
                "/".join(str(each.calls) for each in found),
                *([f"{x / rows[last]:,.1f}" for x in (counted.temp, counted.accessed)] if counted else ["", ""]),
                *(f"{found[-1].values[name]:.4f}" if name in found[-1].values else "" for name in checked),
            ]
        )
    return table(columns, lines)
