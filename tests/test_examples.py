"""Examples in a small form, as users start them. `flight_delays.py` is the README's main command: CI runs that."""

import json
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
LOSSES = {"late": "log loss", "minutes": "absolute error, minutes", "departure": "log loss"}


@pytest.fixture(scope="module")
def multi_task(tmp_path_factory):
    """What the run printed, and the folder that it wrote."""
    out = tmp_path_factory.mktemp("multi_task")
    # In a process of its own: on one device and without the strictness that tests set, as at a user's.
    command = [sys.executable, str(EXAMPLES / "multi_task_flights.py"), "--rows", "20000", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout, out


@pytest.mark.slow
def test_one_network_serves_three_tasks(multi_task):
    printed, out = multi_task
    results = json.loads((out / "metrics.json").read_text())
    base, *others = results["test"]
    assert others == ["three models", "one, fixed", "one, uncertainty"]
    constant = results["test"][base]
    assert constant["late"]["AUC"] == 0.5
    assert 0.7 < constant["late"]["accuracy"] < 0.8
    assert 20 < constant["minutes"]["absolute error, minutes"] < 27
    for column in others:
        values = results["test"][column]
        assert values.keys() == LOSSES.keys()
        for task, loss in LOSSES.items():
            # Below 0.8 of the base rate's, the network would know what has yet to happen.
            assert 0.8 < values[task][loss] / constant[task][loss] < 1, (column, task)
        assert 0.65 < values["late"]["AUC"] < 0.75
        for task in ("late", "departure"):
            assert values[task]["accuracy"] > constant[task]["accuracy"] - 0.01
        assert column in printed
    for line in (
        "late: AUC",
        "minutes: absolute error, minutes",
        "departure: accuracy",
        "parameters",
        "learned weights",
    ):
        assert f"\n{line}" in printed


@pytest.mark.slow
def test_the_one_network_is_smaller_and_learns_its_weights(multi_task):
    _, out = multi_task
    results = json.loads((out / "metrics.json").read_text())
    models, weights = results["models"], results["learned_weights"]
    assert models["one, fixed"]["parameters"] < 0.6 * models["three models"]["parameters"]
    # Three numbers more: the learned weights.
    assert models["one, uncertainty"]["parameters"] == models["one, fixed"]["parameters"] + len(LOSSES)
    assert weights.keys() == LOSSES.keys()
    assert all(0.5 < w < 2 and w != 1 for w in weights.values())
    assert (out / "multi_task_flights.png").read_bytes().startswith(b"\x89PNG")
