"""jaxheads beside google-metrax, clu, Keras on JAX, torchmetrics, scikit-learn, C by hand: a table and a figure.

    pip install -e '.[benchmark]'
    python tests/benchmarks/peers.py --out benchmark_out
    python tests/benchmarks/peers.py --tables A --rows 1024 65536 --peers keras metrax

Ratios are the peer's time over that of jaxheads in the same process, taken in turns: they hold from run to run and
machine to machine, as times do not. Bytes are XLA's own figures of the compiled program, for those that JAX compiles;
XLA counts the body of a loop once. A peer that is not installed is left out, with a line that says so.
"""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import sys
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax

from benchmarks import binary, counters, figures, overheads, program, race, wide
from benchmarks.report import ROWS

THRESHOLDS = (200, 2_000, 10_000)
DISTRIBUTIONS = {"metrax": "google-metrax"}


class Sheet:
    """What was said, on the screen at once and in a file at the end."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, *lines: str) -> None:
        """Adds lines."""
        self.lines += lines
        print(*lines, sep="\n", flush=True)


def table_a(sheet: Sheet, options: argparse.Namespace, peers: Sequence[str]) -> None:
    """Binary metrics over examples and thresholds, and the figure of both."""
    budget = options.repeat, options.seconds
    sheet.say("", "## A. Binary streaming metrics", "")
    sheet.say(
        "Loss, accuracy, precision, recall, ROC-AUC, PR-AUC, mean prediction, mean label, with 200 thresholds. "
        f"A ratio is a time over that of `{program.OURS}`; at most {budget[1]:g} s, at least 3 timed calls a program "
        "and size. Bytes and AUC are those at the last size.",
        "",
    )
    sizes, found = {f"{n:,}": n for n in options.rows}, {}
    for size, n in sizes.items():
        programs = program.made(binary.BINARY, peers, THRESHOLDS[0])
        found[size] = race.race(programs, program.batch_of(n), *budget)
    sheet.say(*race.compared(found, sizes, ("accuracy", "auc")))
    examples = {title: [(n, found[size][title].ms) for size, n in sizes.items()] for title in found[next(iter(sizes))]}

    rows = min(65_536, max(options.rows))
    sheet.say("", f"### Growth with the number of thresholds, {rows:,} examples", "")
    counts, batch = {f"{n:,}": n for n in options.thresholds}, program.batch_of(rows)
    grown = {size: race.race(program.made(binary.BINNED, peers, n), batch, *budget) for size, n in counts.items()}
    sheet.say(*race.compared(grown, dict.fromkeys(counts, rows), ("auc",), growth=True))
    titles = next(iter(grown.values()))
    thresholds = {title: [(n, grown[size][title].ms) for size, n in counts.items()] for title in titles}
    path = options.out / "peers.png"
    figures.draw(examples, thresholds, rows, machine(), path)
    sheet.say("", f"![Time against examples and against thresholds]({path.name})")


def table_b(sheet: Sheet, options: argparse.Namespace, peers: Sequence[str]) -> None:
    """Many classes, many labels."""
    rows = options.wide_rows
    sheet.say("", "## B. Many classes, many labels")
    for title, table, columns, checked in (
        ("classes: loss, accuracy, top-5, confusion matrix", wide.CLASSES, options.classes, ("accuracy", "top-5")),
        ("labels: ROC-AUC of each", wide.LABELS, options.labels, ("auc",)),
    ):
        sheet.say("", f"### {rows:,} x {columns:,} {title}", "")
        batch = program.batch_of(rows, columns, table is wide.CLASSES)
        found = race.race(program.made(table, peers, columns), batch, options.repeat, options.seconds)
        sheet.say(*race.compared({f"{rows:,}": found}, {f"{rows:,}": rows}, checked))


def table_d(sheet: Sheet, options: argparse.Namespace, peers: Sequence[str]) -> None:
    """Counters."""
    sheet.say("", "## D. Counters", "", "2^24 right answers in blocks of 2^20, then 10,000 updates of one example.", "")
    sheet.say(*counters.frozen(peers))
    rows = min(65_536, max(options.rows))
    sheet.say("", f"### What the compensated pair adds to an update of {rows:,} rows", "")
    sheet.say(
        "Against the same update of a plain float32 state. XLA counts the body of the loop over tiles of rows once, so "
        "that the share of bytes and flops is less than this.",
        "",
    )
    sheet.say(*counters.pair_costs(rows, options.repeat))


def table_f(sheet: Sheet, options: argparse.Namespace, peers: Sequence[str]) -> None:
    """Dispatch and import."""
    children = max(1, min(5, options.repeat))
    sheet.say("", f"## F. Dispatch and import, {overheads.ROWS} rows", "")
    sheet.say(*overheads.calls(peers, options.repeat, children), "")
    sheet.say(*overheads.imports(peers, children))


TABLES = {"A": table_a, "B": table_b, "D": table_d, "F": table_f}


def machine() -> str:
    """Versions and device, in a line."""
    device = jax.devices()[0]
    where = f"{os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    return f"jax {jax.__version__}, {jax.device_count()} {device.platform} device(s), {where}"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables and writes them, with the figure, to a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="which, by default all")
    parser.add_argument("--peers", nargs="*", choices=program.PEERS, default=program.PEERS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="batch sizes of table A")
    parser.add_argument("--thresholds", type=int, nargs="+", default=THRESHOLDS, help="their numbers in table A")
    parser.add_argument("--wide-rows", type=int, default=65_536, help="the batch size of table B")
    parser.add_argument("--classes", type=int, default=1_000, help="of table B")
    parser.add_argument("--labels", type=int, default=200, help="of table B")
    parser.add_argument("--repeat", type=int, default=20, help="timed calls of each program")
    parser.add_argument("--seconds", type=float, default=6.0, help="no more calls of a program after this long")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmark_out"), help="a folder")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)

    sheet = Sheet()
    sheet.say("# jaxheads beside its peers", "")
    peers = program.installed(options.peers, sheet.say)
    versions = [
        f"{peer} {importlib.metadata.version(DISTRIBUTIONS.get(peer, peer))}"
        for peer in peers
        if peer != program.COMPILER
    ]
    sheet.say(f"{datetime.date.today()}: {machine()}, {', '.join(versions) or 'no peers'}.")
    for name in options.tables:
        TABLES[name](sheet, options, peers)
    (options.out / "peers.md").write_text("\n".join(sheet.lines) + "\n")


if __name__ == "__main__":
    main()
