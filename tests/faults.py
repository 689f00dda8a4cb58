"""Faults of files and processes during `jh.fit`, each with how it ended: `python tests/faults.py [--kills 15]`.

A table says for each fault what the next run did: it went on to the same numbers as a run without faults ("went on"),
it said so and began at the checkpoint before ("told"), or it refused in words ("refused"). Anything else ends the
script with an error. `test_faults.py` runs it with fewer kills. A full and a read-only disk are made in a namespace of
Linux; where that is not allowed, the table says "UNTRIED".
"""

import argparse
import collections
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

TESTS = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
EPOCHS, SECONDS = 4, 300

# Python runs this file again, as the process that is killed, or whose disk is full.
Outcomes = Iterator[tuple[str, str]]


def train(folder: pathlib.Path, pause: float = 0.0) -> dict[str, Any]:
    """A run of four epochs with validation, and a checkpoint after every three batches; it goes on if it was begun."""
    import test_fit

    import jaxheads as jh

    def batches(epoch: int) -> Iterator[Any]:
        for batch in test_fit.batches(epoch):
            time.sleep(pause)
            yield batch

    fitted = jh.fit(
        *(test_fit.start(), test_fit.STEP, batches),
        epochs=EPOCHS,
        eval_step=test_fit.EVALUATE,
        validation=test_fit.VALIDATION,
        directory=folder,
        checkpoint_every=3,
        progress=False,
    )
    w = [state.params["w"].ravel().tolist() for state in (fitted.state, fitted.best)]
    return {"w": w, "history": fitted.history}


def start_child(folder: pathlib.Path, *before: str) -> subprocess.Popen[str]:
    command = [*before, sys.executable, str(TESTS / "faults.py"), "--child", str(folder)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT)


def finish(folder: pathlib.Path) -> dict[str, Any]:
    """Trains to the end in another process: tests compile with other flags, which give other last bits."""
    printed, errors = start_child(folder).communicate()
    lines = printed.splitlines()
    return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {"failed": errors}


def kill(n: int, seed: int, folder: pathlib.Path, whole: dict[str, Any]) -> Outcomes:
    """Kills a run at a random moment of its training, and goes on."""
    rng, trial = random.Random(seed), start_child(folder / "trial")
    assert trial.stdout is not None
    trial.stdout.readline()
    begun = time.monotonic()
    trial.communicate()
    length = 0.8 * (time.monotonic() - begun)  # its end is the end of the process, after training
    for i in range(n):
        child, run, moment = start_child(folder / f"{i}"), folder / f"{i}", rng.uniform(0, length)
        assert child.stdout is not None
        child.stdout.readline()  # training begins
        time.sleep(moment)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        if child.returncode != -signal.SIGKILL:
            yield f"killed after {moment:.2f} s", f"LATE: the run had ended, with {child.returncode}"
            continue
        steps = sorted(int(path.name) for path in run.glob("latest/*") if path.name.isdigit())
        where = f"step {steps[-1]}" if steps else "no checkpoint"
        yield (
            f"killed after {moment:.2f} s of training, {where}",
            "went on" if finish(run) == whole else "WRONG NUMBERS",
        )


def corrupt(folder: pathlib.Path) -> Outcomes:
    """Deletes, cuts or flips each file of the newest checkpoints; counts how the next runs ended."""
    import test_checkpoints as tests

    template = folder / "template"
    tests.fit(template, **tests.VALIDATED | {"epochs": 2})
    expected = tests.fit(None, **tests.VALIDATED)
    for damage in tests.DAMAGES:
        for which in ("latest/16", "latest/8", "best/1"):
            ends: collections.Counter[str] = collections.Counter()
            for i in range(len(tests.files_of(template / which))):
                copy = folder / f"{damage.__name__}{which.replace('/', '')}{i}"
                ends[tests.run_damaged(template, copy, which, i, damage, expected).partition(":")[0]] += 1
                shutil.rmtree(copy)
            yield (
                f"{damage.__name__}: one of {ends.total()} files of {which}",
                ", ".join(f"{end} {n}" for end, n in sorted(ends.items())),
            )


def refuse(folder: pathlib.Path) -> Outcomes:
    """Another head, another optimizer, other batches, another owner."""
    import optax
    import test_checkpoints as tests

    import jaxheads as jh

    run = folder / "run"
    tests.fit(run)
    begun = folder / "begun"
    try:
        tests.fit(begun, tests.stopping_at(0, 5), checkpoint_every=2)
    except tests.Stop:
        pass
    command = [sys.executable, "-c", tests.HOLD, str(folder / "owned")]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert owner.stdout is not None
    owner.stdout.readline()  # it holds the folder
    for fault, call in {
        "another head": lambda: tests.fit(run, epochs=2, **tests.other(jh.RegressionHead())),
        "another optimizer": lambda: tests.fit(run, epochs=2, **tests.other(optimizer=optax.sgd(0.25, momentum=0.9))),
        "other batches within an epoch": lambda: tests.fit(begun, list(tests.batches(1)), checkpoint_every=2),
        "two processes at a time": lambda: tests.fit(folder / "owned"),
    }.items():
        yield fault, _end(call)
    owner.kill()
    owner.communicate()


def fill(folder: pathlib.Path, whole: dict[str, Any]) -> Outcomes:
    """A disk that becomes full, and one that is read-only; then the same folder, copied to where there is room."""
    for fault, options in {"a full disk": "size=250k", "a read-only disk": "size=9m"}.items():
        disk, kept = folder / "disk", folder / "kept"
        disk.mkdir(exist_ok=True)
        read_only = f" && mount -o remount,ro {disk}" if "read" in fault else ""
        mounted = f"mount -t tmpfs -o {options} none {disk}{read_only} && "
        script = f'{mounted}{{ timeout {SECONDS} "$@"; code=$?; cp -r {disk} {kept}; exit $code; }}'
        tried = subprocess.run(["unshare", "-rm", "sh", "-c", mounted + "true"], capture_output=True, check=False)
        if tried.returncode:
            yield fault, "UNTRIED: no namespaces of Linux here"
            continue
        child = start_child(disk, "unshare", "-rm", "sh", "-c", script, "sh")
        _, errors = child.communicate()
        if "ValueError" not in errors:
            yield fault, f"UNTOLD: {errors[-300:]}"
            continue
        told = errors[errors.rindex("ValueError:") :].splitlines()[0]
        yield fault, f"refused: {told.removeprefix('ValueError: ')}"
        if kept.exists() and "full" in fault:
            yield f"{fault}, with room again", "went on" if finish(kept) == whole else "WRONG NUMBERS"
        shutil.rmtree(kept, ignore_errors=True)


def _end(call: Any) -> str:
    try:
        call()
    except ValueError as error:
        return f"refused: {error}"
    return "SILENT"


def run(kills: int, seed: int, folder: pathlib.Path) -> list[tuple[str, str]]:
    """Makes all faults, and prints the table as it grows."""
    whole, found = finish(folder / "whole"), []
    parts = (
        kill(kills, seed, folder / "killed", whole),
        corrupt(folder / "damaged"),
        refuse(folder / "refused"),
        fill(folder / "full", whole),
    )
    for name in ("killed", "damaged", "refused", "full"):
        (folder / name).mkdir()
    for part in parts:
        for fault, outcome in part:
            found.append((fault, outcome))
            print(f"{fault:<58} {outcome[:150]}", flush=True)
    return found


def is_silent(outcome: str) -> bool:
    """Tells whether a fault had no outcome in words, or a wrong one."""
    return outcome.split()[0].strip(":").isupper() and not is_untried(outcome)


def is_untried(outcome: str) -> bool:
    """Tells whether a fault could not be made on this machine."""
    return outcome.startswith("UNTRIED")


def main() -> None:
    """Prints the table; fails if there is a silent fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=pathlib.Path)
    given = parser.parse_args()
    if given.child:
        import test_fit  # noqa: F401  # so that training begins at once

        print("begun", flush=True)
        print(json.dumps(train(given.child, 0.02)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = run(given.kills, given.seed, pathlib.Path(folder))
    silent = [fault for fault, outcome in found if is_silent(outcome)]
    print(f"{len(found)} rows, {len(silent)} silent: {silent}")
    sys.exit(bool(silent))


if __name__ == "__main__":
    main()
