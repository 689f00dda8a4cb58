"""The figure of the benchmarks: time against examples, and time against thresholds, one line a library."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.axes
import matplotlib.figure
import matplotlib.ticker

# Okabe and Ito's colours, told apart by colour-blind eyes; every line has a marker of its own too.
STYLES = {
    "jaxheads": ("#000000", "o"),
    "jaxheads, logit bins": ("#000000", "x"),
    "one pass over memory": ("#999999", "."),
    "C, one thread": ("#666666", "+"),
    "clu, 4 means": ("#56B4E9", "v"),
    "Keras": ("#009E73", "s"),
    "metrax, jit": ("#D55E00", "D"),
    "metrax nnx, eager": ("#E69F00", "P"),
    "torchmetrics": ("#CC79A7", "^"),
    "scikit-learn, exact": ("#0072B2", "*"),
}
Lines = Mapping[str, Sequence[tuple[float, float]]]


def _spread(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights at least a gap apart, in the same order, near to their own: neighbours that touch share a middle."""
    groups: list[tuple[list[str], float]] = []
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        names, middle = [name], height
        while groups and middle - groups[-1][1] < gap * (len(names) + len(groups[-1][0])) / 2:
            names = [*groups.pop()[0], *names]
            middle = sum(heights[each] for each in names) / len(names)
        groups.append((names, middle))
    return {name: middle + gap * (k - (len(names) - 1) / 2) for names, middle in groups for k, name in enumerate(names)}


def _panel(axes: matplotlib.axes.Axes, lines: Lines, xlabel: str, title: str) -> None:
    for name, points in lines.items():
        colour, marker = STYLES[name]
        dashed = name in ("jaxheads, logit bins", "one pass over memory", "C, one thread")
        width, order = (2.5, 3) if name == "jaxheads" else (1.5, 2)
        style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "--" if dashed else "-"}
        axes.plot(*zip(*points, strict=True), linewidth=width, zorder=order, **style)
    axes.set(xscale="log", yscale="log", xlabel=xlabel, title=title)
    measured = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xticks(measured, [f"{x:,.0f}" for x in measured])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    bottom, top = axes.get_ylim()
    heights = {name: math.log(points[-1][1] / bottom, top / bottom) for name, points in lines.items()}
    for name, height in _spread(heights, 0.05).items():
        axes.annotate(
            name,
            xy=lines[name][-1],
            xytext=(1.05, height),
            textcoords="axes fraction",
            color="#666666" if name == "one pass over memory" else STYLES[name][0],
            va="center",
            fontsize=9,
            fontweight="bold" if name == "jaxheads" else "normal",
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4},
        )


def draw(examples: Lines, thresholds: Lines, growth_rows: int, caption: str, path: pathlib.Path) -> None:
    """Writes the figure; the lines are `(x, ms)` by title."""
    picture = matplotlib.figure.Figure(figsize=(12, 5), layout="constrained")
    left, right = picture.subplots(1, 2)
    _panel(left, examples, "examples in a batch", "Eight binary metrics, 200 thresholds")
    _panel(right, thresholds, "thresholds", f"The same, {growth_rows:,} examples")
    left.set_ylabel("ms an update (median)")
    picture.supxlabel(caption, fontsize=8, color="#555555")
    picture.savefig(path, dpi=150)
