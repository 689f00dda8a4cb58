"""The table of what every head costs on TPUs, as their compiler tells: python tests/tpu_compile/report.py

Needs `pip install -e '.[test,tpu-compile]'`, and no TPU. Rows are spread over the chips of one host; all figures are of
one device. Cycles are the compiler's own estimate; what it has no estimate for is left out of them.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
from zoo import ZOO

from tpu_compile.programs import CHIPS, PROGRAMS, ROWS, Compiled, analyzed, mesh_of


def main() -> None:
    parser = argparse.ArgumentParser(description="What every head costs on TPUs.")
    parser.add_argument("--heads", nargs="+", choices=[entry.name for entry in ZOO], help="by default all")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    print(f"{ROWS:,} rows on each of", ", ".join(f"{mesh_of(chip).size} {chip}" for chip in CHIPS))
    print(f"| head | program | all-reduces | bytes a row | temp a row | cycles: {', '.join(CHIPS)} |")
    print("| --- | --- | --- | --- | --- | --- |")
    for entry in ZOO:
        if args.heads and entry.name not in args.heads:
            continue
        for name, program in PROGRAMS.items():
            found = [analyzed(program(entry, chip)) for chip in CHIPS]
            counts = {len(each.reduced) for each in found}
            accessed, temp = ([value / ROWS for value in values] for values in _columns(found))
            cells = [
                *(entry.name, name, "-".join(map(str, sorted(counts)))),
                *(f"{min(accessed):.0f}-{max(accessed):.0f}", f"{min(temp):.1f}-{max(temp):.1f}"),
                ", ".join(f"{each.cycles:,}" for each in found),
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


def _columns(found: list[Compiled]) -> tuple[list[float], list[float]]:
    return [each.accessed for each in found], [each.temp for each in found]


if __name__ == "__main__":
    main()
