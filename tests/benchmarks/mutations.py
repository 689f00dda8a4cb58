"""Puts faults into copies of the package, one at a time, and shows which quick test finds each.

    python tests/benchmarks/mutations.py [--only TEXT] [--workers 2]

The laws run first, then all quick tests, each time until a test fails. The table says SURVIVED for a fault that no
test finds, and the exit code is then 1. The tests that find a fault must pass without one. All faults together take
ten minutes on two cores.
"""

import argparse
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Arguments of pytest, in turns: no argument is all quick tests.
RUNS = (["tests/test_laws.py"], ["tests/test_laws_engine.py"], ["tests/test_laws_devices.py"], [])


@dataclasses.dataclass(frozen=True)
class Fault:
    """A text of a file in `jaxheads/`, which is found there once, and the wrong text that takes its place."""

    name: str
    file: str
    old: str
    new: str

    def put_into(self, root: pathlib.Path) -> str:
        """The text of the file with the fault in it."""
        text = (root / "jaxheads" / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.name}: jaxheads/{self.file} must hold this text once, not {text.count(self.old)} "
                f"times: {self.old!r}. If the code has changed, change tests/benchmarks/mutations.py."
            )
        return text.replace(self.old, self.new)


FAULTS = (
    Fault(
        "a mask that only multiplies",
        "numerics/masking.py",
        "    return choose(mask, x, jax.lax.full_like(x, fill))",
        "    return x * jnp.asarray(mask).astype(jnp.asarray(x).dtype)",
    ),
    Fault(
        "a weight forgotten in the means of columns",
        "metrics/mean.py",
        "for x in (masking.weighted(values, weights), weights)]",
        "for x in (masking.weighted(values, masking.is_not_zero(weights).astype(jnp.float32)), weights)]",
    ),
    Fault(
        "a weight forgotten in every mean",
        "metrics/mean.py",
        "masking.total(masking.weighted(values, weights)), masking.total(count)",
        "masking.total(masking.weighted(values, masking.is_not_zero(weights).astype(jnp.float32))), "
        "masking.total(count)",
    ),
    Fault(
        "a sum in bfloat16",
        "numerics/masking.py",
        "    return column_totals(x, kept=0)",
        "    return jnp.sum(x.astype(jnp.bfloat16)).astype(jnp.float32)",
    ),
    Fault(
        "a pair whose error term is dropped",
        "numerics/pairs.py",
        "    return s, (a - (s - t)) + (b - t)",
        "    return s, 0 * t",
    ),
    Fault(
        "a missing psum",
        "numerics/meshes.py",
        "    check_axis(axis_name)\n    return jax.lax.psum(tree, axis_name)",
        "    check_axis(axis_name)\n    return tree",
    ),
    Fault(
        "a bucket of the default bins that is off by one",
        "numerics/edges.py",
        "    below = jax.lax.bitwise_xor(passed, flipped) + np.int32(_MULTIPLES + _DOUBLINGS * 2**_BITS + 1)",
        "    below = jax.lax.bitwise_xor(passed, flipped) + np.int32(_MULTIPLES + _DOUBLINGS * 2**_BITS + 2)",
    ),
    Fault(
        "a bucket of a LogitGrid that is off by one",
        "numerics/edges.py",
        "    below = jax.lax.sub(below.astype(jnp.int32), np.int32(first))",
        "    below = jax.lax.sub(below.astype(jnp.int32), np.int32(first)) + 1",
    ),
    Fault(
        "a bad row whose loss is not NaN",
        "losses/terms.py",
        "values = term.values * masking.keep(~elements.bad, masking.ones_like(elements.weights), np.nan)",
        "values = term.values",
    ),
    Fault(
        "a count that the divisor forgets",
        "losses/terms.py",
        "masking.total(multiplicity if term.count is None else masking.weighted(term.count, multiplicity))",
        "masking.total(multiplicity)",
    ),
    Fault(
        "rows of zero weight in the divisor of those with weight",
        "losses/terms.py",
        "Reduction.SUM_BY_NONZERO_WEIGHTS: lambda: masking.is_not_zero(elements.weights)",
        "Reduction.SUM_BY_NONZERO_WEIGHTS: lambda: elements.rows.exists",
    ),
    Fault(
        "rows of zero weight that are not hidden",
        "engine/elements.py",
        "live = exists & masking.is_not_zero(weights)",
        "live = exists & (weights == weights)",
    ),
    Fault(
        "rows of the last tile counted twice",
        "numerics/tiles.py",
        "fresh = start + jnp.arange(rows, dtype=jnp.int32) >= i * rows",
        "fresh = jnp.arange(rows, dtype=jnp.int32) >= 0",
    ),
    Fault(
        "features of hidden rows left as they are",
        "numerics/masking.py",
        "    return copy_first(rows_like(mask, x), x, fill, shared, False) if copies else "
        "keep(rows_like(mask, x), x, fill)",
        "    return x",
    ),
)


def copy(root: pathlib.Path, fault: Fault | None = None) -> None:
    """Copies the working tree, with this fault: the files that git tracks, and new ones that it does not ignore."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, root / name)
    if fault is not None:
        (root / "jaxheads" / fault.file).write_text(fault.put_into(root))


def first_failures(run: list[str], root: pathlib.Path, cache: pathlib.Path, workers: int) -> str:
    """The first tests that fail in this copy, no text if none does."""
    python_path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", str(workers), "-o", f"cache_dir={cache}", *run]
    environment = {**os.environ, "PYTHONPATH": python_path}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    failed = re.findall(r"^(?:FAILED|ERROR) \S*?([^/\s]+)::(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode and not failed:
        raise RuntimeError(f"pytest failed, but no test did:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return ", ".join(f"`{test}` in {file}" for file, test in failed[:2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run only the faults whose names hold this text")
    parser.add_argument("--workers", type=int, default=2, help="processes of pytest")
    args = parser.parse_args()
    print("| fault | seconds | first failing tests |\n| --- | ---: | --- |", flush=True)
    survived = False
    with tempfile.TemporaryDirectory() as folder:
        clean, cache = pathlib.Path(folder, "clean"), pathlib.Path(folder, "cache")
        copy(clean)
        pass_without_fault: list[list[str]] = []
        for fault in FAULTS:
            if args.only not in fault.name:
                continue
            root, start, seconds, found = pathlib.Path(folder, "copy"), time.monotonic(), 0.0, ""
            copy(root, fault)
            for run in RUNS:
                found = first_failures(run, root, cache, args.workers)
                seconds = time.monotonic() - start
                if found:
                    if run not in pass_without_fault:
                        if failed := first_failures(run, clean, cache, args.workers):
                            raise RuntimeError(f"without a fault these tests fail too: {failed}")
                        pass_without_fault.append(run)
                    break
            survived |= not found
            print(f"| {fault.name} (`{fault.file}`) | {seconds:.0f} | {found or 'SURVIVED'} |", flush=True)
            shutil.rmtree(root)
    return int(survived)


if __name__ == "__main__":
    sys.exit(main())
