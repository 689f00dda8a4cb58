"""Examples in a small form, in processes of their own: on one device, and without the strictness that tests set.

They compile as fast as the tests do. CI runs the README's main command, which is `flight_delays.py`, as users do.
"""

import csv
import json
import os
import pathlib
import subprocess
import sys

import programs
import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
LOSSES = {"late": "log loss", "minutes": "absolute error, minutes", "departure": "log loss"}


@pytest.fixture(scope="module")
def multi_task(tmp_path_factory):
    """What the run printed, and the folder that it wrote."""
    out = tmp_path_factory.mktemp("multi_task")
    return run_example("multi_task_flights.py", out, "--rows", "20000", "--epochs", "3")[0], out


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


def run_example(name, out, *arguments, all_passes=False):
    """What an example printed, and its `metrics.json`, in a process of its own."""
    command = [sys.executable, str(EXAMPLES / name), *arguments, "--out", str(out)]
    environment = {**os.environ, **programs.environment(all_passes)}
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out, timeout=600, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout, json.loads((out / "metrics.json").read_text())


@pytest.mark.slow
def test_wide_and_deep_tells_late_flights(tmp_path):
    printed, results = run_example("flight_delays.py", tmp_path, "--rows", "20000", "--epochs", "2")
    base, test = results["base_rate"], results["test"]
    assert results["rows"] == {"train": 14994, "validation": 1716, "test": 3290}
    assert results["best_epoch"] in (1, 2)
    assert 0.85 < test["average_loss"] / base["average_loss"] < 0.97
    assert 0.64 < test["auc"] < 0.75
    # Were flights without an arrival counted as on time, or padding as flights, the rate would be another.
    assert test["label/mean"] == base["label/mean"] == pytest.approx(0.24235, abs=1e-4)
    low, high = results["auc_interval"]
    assert low <= results["sklearn_auc"] <= high
    assert "\nauc " in printed
    assert (tmp_path / "flight_delays.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_one_head_drives_a_network_and_two_boosters(tmp_path):
    printed, results = run_example("boosted_flights.py", tmp_path, "--rows", "20000", "--epochs", "2")
    base, *others = results["test"]
    assert (base, others) == ("base rate", ["network", "XGBoost", "LightGBM"])
    constant = results["test"][base]
    assert constant["auc"] == 0.5
    for name in others:
        values, told = results["test"][name], results["training"][name]
        assert values.keys() == constant.keys()
        assert 0.85 < values["average_loss"] / constant["average_loss"] < 0.97, name
        assert 0.63 < values["auc"] < 0.75, name
        assert values["label/mean"] == pytest.approx(0.24235, abs=1e-4), name
        assert 0.4 < told["october"] < 0.47, name
    for name in ("XGBoost", "LightGBM"):
        told = results["training"][name]
        assert told["october"] == min(told["losses"])
        # It went on for 30 rounds, and stopped.
        assert len(told["losses"]) == told["best_round"] + 30 < 400
    assert "\ncalibration error" in printed
    assert (tmp_path / "boosted_flights.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_one_pass_evaluates_a_model(tmp_path):
    printed, results = run_example("evaluate_a_model.py", tmp_path, "--rows", "20000", "--epochs", "1")
    test, exact = results["test"], results["sklearn"]
    assert 0.64 < test["auc"] < 0.75
    assert test["auc/lower"] - 1e-6 <= exact["auc"] <= test["auc/upper"] + 1e-6
    assert test["auc/upper"] - test["auc/lower"] < 0.005
    assert test["auc"] == pytest.approx(exact["auc"], abs=1e-3)
    assert test["average_precision"] == pytest.approx(exact["average_precision"], abs=5e-3)
    for name in ("brier_score", "average_loss"):
        assert test[name] == pytest.approx(exact[name], abs=1e-5), name
    assert 0 < test["expected_calibration_error"] < 0.1
    # By Hanley and McNeil's formula the interval is 0.044 wide.
    assert 0.03 < test["auc/ci_upper"] - test["auc/ci_lower"] < 0.06
    for name in ("auc", "brier_score", "label/mean", "precision_at_recall_0.8"):
        assert test[f"{name}/ci_lower"] < test[name] < test[f"{name}/ci_upper"], name

    october, best = results["operating_points"].values()
    for point in (october, best):
        assert [point["recall"], point["precision"]] == pytest.approx(point["sklearn"], abs=1e-6)
    assert 0.8 <= best["recall"] < 0.82
    assert best["precision"] == pytest.approx(test["precision_at_recall_0.8"], abs=1e-6)
    assert 0.65 < october["recall"] < 0.95
    assert october["recall_interval"][0] < october["recall"] < october["recall_interval"][1]

    with (tmp_path / "slices.csv").open() as file:
        slices = list(csv.DictReader(file))
    counts = [float(group["count"]) for group in slices]
    assert [group["slice"] for group in slices[:3]] == ["EWR", "JFK", "LGA"]
    # Each flight has an airport and an airline; the 68 without an arrival are in no group.
    assert (len(slices), sum(counts[:3]), sum(counts[3:]), results["observed"]) == (19, 3222, 3222, 3222)
    assert [group["auc"] == "" for group in slices] == [count < 100 for count in counts]
    late = sum(n * float(group["label/mean"]) for n, group in zip(counts[:3], slices[:3], strict=True))
    assert late / 3222 == pytest.approx(test["label/mean"], abs=1e-6)
    assert results["slice_auc_difference"] < 5e-3
    assert "\nLGA " in printed
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_wide_model_is_sparse_and_as_good_as_scikit_learns(tmp_path):
    printed, results = run_example("wide_flights.py", tmp_path, "--rows", "20000", "--epochs", "3")
    models, weights = results["models"], results["weights"]
    base, other = models["base rate"]["test"], models["scikit-learn"]["test"]
    assert [*models] == ["base rate", "0", "3", "10", "30", "100", "300", "scikit-learn"]
    assert 0.5 < base["average_loss"] < 0.6
    assert base["auc"] == 0.5
    for strength in ("0", "3", "10"):
        test = models[strength]["test"]
        assert 0.92 < test["average_loss"] / base["average_loss"] < 0.985, strength
        assert 0.59 < test["auc"] < 0.68, strength
    assert models["0"]["test"]["average_loss"] == pytest.approx(other["average_loss"], abs=0.005)
    assert models["0"]["test"]["auc"] == pytest.approx(other["auc"], abs=0.02)
    # Without l1 only the ids that no training flight has stay 0.
    nonzero = [models[strength]["nonzero"] for strength in ("0", "3", "10", "30", "100", "300")]
    assert nonzero == sorted(nonzero, reverse=True)
    assert 0.98 * weights < nonzero[0] < weights
    assert 0.05 * weights < nonzero[3] < 0.4 * weights
    assert models["300"]["test"]["auc"] < models["10"]["test"]["auc"]
    losses = {strength: models[f"{strength}"]["October"]["average_loss"] for strength in (0, 3, 10, 30, 100, 300)}
    allowed = 1.001 * min(losses.values())
    assert results["picked"] == max(strength for strength, loss in losses.items() if loss <= allowed)
    assert "\nscikit-learn, l2" in printed
    assert (tmp_path / "wide_flights.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_ftrl_and_adagrad_train_wide_and_deep_in_one_step(tmp_path):
    printed, results = run_example("wide_and_deep_flights.py", tmp_path, "--rows", "20000", "--epochs", "1")
    base, models, weights = results["base_rate"], results["models"], results["wide_weights"]
    assert [*models] == ["wide", "deep", "wide & deep", "one Adam"]
    assert 0.92 < models["wide"]["test"]["average_loss"] / base["average_loss"] < 0.99
    assert 0.56 < models["wide"]["test"]["auc"] < 0.66
    for name in ("deep", "wide & deep", "one Adam"):
        test = models[name]["test"]
        assert 0.85 < test["average_loss"] / base["average_loss"] < 0.97, name
        assert 0.64 < test["auc"] < 0.75, name
    for name in ("wide", "wide & deep"):
        assert 0.01 * weights < models[name]["nonzero"] < 0.2 * weights, name
    assert 0.98 * weights < models["one Adam"]["nonzero"] < weights
    moved = models["wide & deep"]["moved"]
    assert 0.002 < moved["wide"] < 0.1
    assert 0.01 < moved["deep"] < 0.5
    assert 0.02 < results["spread"]["wide"] < results["spread"]["deep"] < 1
    assert "\nwide weights not 0" in printed
    assert (tmp_path / "wide_and_deep_flights.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_network_prices_diamonds(tmp_path):
    printed, results = run_example("diamonds.py", tmp_path, "--rows", "5000", "--epochs", "5")
    assert results["rows"] == {"train": 4000, "validation": 500, "test": 500}
    test, head = results["test"], results["head"]
    assert [*test] == ["mean", "linear", "boosted trees", "network"]
    assert abs(test["mean"]["R2"]) < 0.02
    assert 3000 < test["mean"]["RMSE, $"] < 5000
    # Above, the network would have seen the price: boosted trees on ten times as many stay below 0.985.
    assert 0.9 < test["network"]["R2"] < 0.99
    assert 2 < test["network"]["median error, %"] < 12
    assert test["network"]["MAE, $"] < 0.2 * test["mean"]["MAE, $"]
    assert test["boosted trees"]["MAE, $"] < test["linear"]["MAE, $"] < 0.2 * test["mean"]["MAE, $"]
    # What the head tells is in dollars too, but for the loss.
    assert 3000 < head["label/mean"] < 5000
    assert 0.9 < head["prediction/mean"] / head["label/mean"] < 1.1
    assert 0.003 < head["average_loss"] < 0.04
    assert 1 <= results["best_epoch"] <= 5
    assert "\nmedian error, %" in printed
    assert (tmp_path / "diamonds.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_recurrent_network_tags_programs(tmp_path):
    printed, results = run_example("sequence_tagger.py", tmp_path, "--files", "20", "--epochs", "1", all_passes=True)
    assert results["files"] == {"train": 16, "validation": 2, "test": 2}
    constant, character, network = results["test"].values()
    assert [*results["test"]] == ["most frequent tag", "character alone", "network"]
    # Where a step that is not there counted, its label, -1, would be no tag.
    assert 1 < constant["average_loss"] < 2
    assert 0.1 < constant["accuracy"] < 0.5 < character["accuracy"] < 0.75
    assert character["average_loss"] < 0.75 * constant["average_loss"]
    assert 0.85 < network["accuracy"] < 1
    assert 0 < network["average_loss"] < 0.5 * character["average_loss"]
    # Only who looks around can tell a keyword from a name.
    assert character["keyword"] < 0.3 < 0.6 < network["keyword"]
    once, twice = results["loss_by_padding"].values()
    assert once == pytest.approx(twice, rel=1e-5)
    assert "k keyword, n name" in printed
    assert (tmp_path / "sequence_tagger.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_networks_of_any_kind_learn(tmp_path):
    printed, results = run_example("bring_your_own_network.py", tmp_path)
    assert results.keys() == {"plain", "equinox", "haiku"}
    for name, values in results.items():
        assert 0.85 < values["accuracy"] < 0.97, name
        assert values["average_loss"] < 0.5, name
    assert "not installed" not in printed


@pytest.mark.slow
def test_a_mesh_gives_the_numbers_of_one_device(tmp_path):
    arguments = ("--rows", "20000", "--epochs", "1", "--devices", "8", "--model-devices", "2")
    printed, results = run_example("train_on_mesh.py", tmp_path, *arguments)
    meshes, differences = results["meshes"], results["differences"]
    assert [*meshes] == ["mesh 1 x 1", "mesh 8 x 1", "mesh 4 x 2"]
    assert [*differences] == ["mesh 8 x 1", "mesh 4 x 2"]
    # The last batch is uneven: padding alone on two devices.
    assert results["last_batch_by_device"] == [128] * 5 + [18, 0, 0]
    for name, difference in differences.items():
        assert difference["metric"] < 1e-5, name
        assert difference["loss of a step"] < 2e-6, name
        assert difference["parameter"] < 2e-5, name
    for name, mesh in meshes.items():
        first, last = mesh["losses"]
        assert 0.85 < mesh["test"]["average_loss"] / 0.5538 < 0.97, name  # that of the base rate
        assert 0.64 < mesh["test"]["auc"] < 0.75, name
        assert last < first, name
        assert mesh["test"]["label/mean"] == pytest.approx(0.24235, abs=1e-4), name
    reduced = {name: mesh["collectives"].pop("all-reduce") for name, mesh in meshes.items()}
    # The loss, then gradients and metrics; the split layers add one on the way forth and one back.
    assert reduced == {"mesh 1 x 1": 0, "mesh 8 x 1": 2, "mesh 4 x 2": 4}
    assert not any(any(mesh["collectives"].values()) for mesh in meshes.values())
    assert [mesh["kernel"][1] for mesh in meshes.values()] == [256, 256, 128]
    assert "\nall-reduce in a step" in printed


@pytest.mark.slow
def test_pmap_is_right_and_the_mean_of_means_is_not(tmp_path):
    printed, results = run_example("pmap_tpu_cores.py", tmp_path, "--devices", "8", "--epochs", "15")
    assert (results["devices"], results["traces"], results["steps"]) == (8, 1, 165)
    assert results["parameters"] < 1e-5
    assert results["test"] == pytest.approx(results["test_one_core"], abs=1e-5)
    assert 0.85 < results["test"]["accuracy"] < 0.97
    assert results["test"]["average_loss"] < 0.5
    missing, last = results["gradients"].values()
    assert last["rows"] == [16, 1, 0, 0, 0, 0, 0, 0]
    assert 0.3 * 128 < sum(missing["rows"]) < 0.7 * 128
    for batch in (missing, last):
        assert batch["loss(axis_name=...), then pmean"] < 1e-6
    wrong = "each core's own mean, then pmean"
    assert missing[wrong] > 0.1
    assert last[wrong] > 0.7
    assert f"\n  {wrong}" in printed


@pytest.mark.slow
def test_training_for_precision_at_a_recall_pays_where_a_line_cannot_have_both(tmp_path):
    printed, results = run_example("precision_at_recall.py", tmp_path, "--seeds", "2")
    clouds, loans = results["clouds"], results["loans"]
    precision = "precision at tuned threshold"
    assert clouds["cross-entropy"][precision] == pytest.approx(0.15, abs=0.01)
    assert clouds["global objective"][precision] > 0.8
    assert clouds["verdict"]["words"] == "higher"
    # On the loans neither way is better by much, and both beat the base rate of 0.28.
    assert all(0.35 < loans[way][precision] < 0.55 for way in ("cross-entropy", "global objective"))
    assert loans["verdict"]["words"].startswith("no different")
    for way in ("cross-entropy", "global objective"):
        assert loans[way]["recall at tuned threshold"] == pytest.approx(0.9, abs=0.04)
    # The threshold that was learned is the one that was asked for.
    assert loans["global objective"]["recall at z > 0"] == pytest.approx(0.9, abs=0.04)
    assert loans["cross-entropy"]["recall at z > 0"] < 0.6
    assert printed.count("Verdict: at a recall of") == 2
    assert (tmp_path / "precision_at_recall.png").read_bytes().startswith(b"\x89PNG")
