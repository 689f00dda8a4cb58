"""The loops: which epoch is best, when to stop, what is written, and going on where a process was killed."""

import builtins
import dataclasses
import importlib.util
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time
import types
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pandas as pd
import programs
import pytest
from sklearn.metrics import roc_auc_score

import jaxheads as jh

RNG = np.random.default_rng(0)
X = RNG.normal(size=(96, 3)).astype(np.float32)
LABELS = (X @ [1, -1, 0.5] + RNG.normal(size=96) > 0).astype(np.int32)
HEAD, RATE = jh.BinaryClassHead(), 0.5
OPTIMIZER = optax.sgd(RATE, momentum=0.9)


def apply(params, features):
    return features["x"] @ params["w"]


STEP, EVALUATE = jh.make_train_step(HEAD, apply, OPTIMIZER), jh.make_eval_step(HEAD, apply)
VALIDATION = [
    {"features": {"x": X[64:80]}, "labels": LABELS[64:80]},
    {"features": {"x": X[80:]}, "labels": LABELS[80:]},
]


def batches(epoch: int):
    order = np.random.default_rng(epoch).permutation(64)
    for rows in np.split(order, 8):
        yield {"features": {"x": X[rows]}, "labels": LABELS[rows]}


def start() -> jh.TrainState:
    params = {"w": np.zeros((3, 1), np.float32)}
    return jh.TrainState.create(params=params, optimizer=OPTIMIZER, head=HEAD, key=jax.random.key(0))


def by_hand(epochs: int) -> list[np.ndarray]:
    """The parameters after each epoch, in float64."""
    w, velocity, after = np.zeros(3), np.zeros(3), []
    for epoch in range(epochs):
        for batch in batches(epoch):
            x, y = batch["features"]["x"].astype(np.float64), batch["labels"]
            velocity = 0.9 * velocity + x.T @ (1 / (1 + np.exp(-x @ w)) - y) / len(y)
            w = w - RATE * velocity
        after.append(w)
    return after


def same(a: Any, b: Any) -> None:
    """Bit by bit."""

    def data(x: Any) -> Any:
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    chex.assert_trees_all_equal(*jax.tree.map(data, (a, b)), strict=True)


class Writer(dict):
    """What TensorBoard writers have."""

    def add_scalar(self, tag, value, step):
        self[tag, step] = value


def test_epochs_are_those_by_hand(capsys):
    writer = Writer()
    fitted = jh.fit(start(), STEP, batches, epochs=4, eval_step=EVALUATE, validation=VALIDATION, writer=writer)
    after = by_hand(4)
    np.testing.assert_allclose(np.ravel(fitted.state.params["w"]), after[-1], rtol=1e-4)
    losses = []
    for epoch, (w, line) in enumerate(zip(after, fitted.history, strict=True), start=1):
        z = X[64:].astype(np.float64) @ w
        losses.append((np.logaddexp(0, z) - LABELS[64:] * z).mean())
        assert (line["epoch"], line["step"]) == (epoch, 8 * epoch)
        np.testing.assert_allclose(line["validation/average_loss"], losses[-1], rtol=1e-5)
        np.testing.assert_allclose(line["train/loss"], line["train/average_loss"], rtol=1e-6)
        np.testing.assert_allclose(writer["validation/auc", 8 * epoch], roc_auc_score(LABELS[64:], z), atol=0.01)
    # It overshoots: the last epoch is not the best one, whichever way one looks.
    best = int(np.argmin(losses))
    np.testing.assert_allclose(np.ravel(fitted.best.params["w"]), after[best], rtol=1e-4)
    worst = jh.fit(
        *(start(), STEP, batches), epochs=4, eval_step=EVALUATE, validation=VALIDATION, higher_is_better=True
    )
    np.testing.assert_allclose(np.ravel(worst.best.params["w"]), after[int(np.argmax(losses))], rtol=1e-4)
    assert best != int(np.argmax(losses))
    printed = capsys.readouterr().out
    assert [printed.count(key) for key in ("train/loss", "validation/loss", "average_loss")] == [8, 8, 0]


def test_training_stops_when_nothing_gets_better():
    def rising(epoch):
        return [{"features": {"x": X[:8]}, "labels": LABELS[:8] if epoch < 2 else 1 - LABELS[:8]}]

    def run(patience):
        return jh.fit(
            *(start(), STEP, rising),
            epochs=9,
            eval_step=EVALUATE,
            validation=[{"features": {"x": X[:8]}, "labels": LABELS[:8]}],
            patience=patience,
            progress=False,
        )

    whole = run(None)
    losses = [line["validation/average_loss"] for line in whole.history]
    best = int(np.argmin(losses))
    assert len(losses) == 9
    for patience in (1, 3):
        stopped = run(patience)
        assert [line["validation/average_loss"] for line in stopped.history] == losses[: best + 1 + patience]
        same(stopped.best, whole.best)


def test_the_monitor_says_which_way_is_better():
    """Trained on labels upside down from the third epoch on, the model is best before: by its loss and by its AUC."""

    def turning(epoch):
        return [{"features": {"x": X[:64]}, "labels": LABELS[:64] if epoch < 2 else 1 - LABELS[:64]}] * 4

    def run(monitor, **given):
        validation = {"eval_step": EVALUATE, "validation": VALIDATION}
        return jh.fit(start(), STEP, turning, epochs=5, monitor=monitor, progress=False, **validation, **given)

    by_loss, by_auc = run("loss"), run("auc")
    areas = [line["validation/auc"] for line in by_auc.history]
    assert int(np.argmax(areas)) != int(np.argmin(areas))
    best = run("validation/auc", higher_is_better=True).best
    np.testing.assert_array_equal(by_auc.best.params["w"], best.params["w"])
    assert (by_auc.best.params["w"] != run("auc", higher_is_better=False).best.params["w"]).any()
    assert by_loss.best.step in (4, 8)
    with pytest.raises(ValueError, match=r"'label/mean' is better when high(.|\n)*higher_is_better="):
        run("label/mean")
    assert run("label/mean", higher_is_better=False).history


def test_without_validation_the_last_is_the_best():
    fitted = jh.fit(start(), STEP, list(batches(0)), epochs=2, progress=False)
    same(fitted.best, fitted.state)
    assert not any("validation" in key for key in fitted.history[0])
    before = start()
    jh.fit(before, STEP, list(batches(0)), progress=False)
    assert not np.any(before.params["w"])


def test_evaluation_adds_up():
    state = start()
    values = jh.evaluate(state, EVALUATE, VALIDATION).compute()
    np.testing.assert_allclose(values["average_loss"], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(values["label/mean"], LABELS[64:].mean(), rtol=1e-6)
    with pytest.raises(ValueError, match="no batches"):
        jh.evaluate(state, EVALUATE, iter([]))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"eval_step": EVALUATE}, "belong together"),
        ({"patience": 2}, "belong together"),
        ({"checkpoint_every": 2}, "needs a directory. Given checkpoint_every=2"),
        ({"checkpoint_every": 0}, "checkpoint_every must be an integer of at least 1. Given 0"),
        ({"patience": 0, "eval_step": EVALUATE, "validation": VALIDATION}, "patience must be(.|\n)*Given 0"),
        ({"epochs": 1.5}, "epochs must be(.|\n)*1.5"),
        ({"eval_step": EVALUATE, "validation": iter(VALIDATION)}, "Given an iterator: pass a list"),
        ({"monitor": "f1", "eval_step": EVALUATE, "validation": VALIDATION}, r"monitor='f1' is no metric(.|\n)*auc"),
    ],
)
def test_what_does_not_fit_is_refused(given, match):
    with pytest.raises(ValueError, match=match):
        jh.fit(start(), STEP, batches, progress=False, **given)


def test_a_loss_that_is_lost_stops_training():
    bad = [{"features": {"x": X[:8] * np.nan}, "labels": LABELS[:8]}]
    with pytest.raises(ValueError, match="The loss of epoch 1 is nan"):
        jh.fit(start(), STEP, bad, epochs=3, progress=False)
    with pytest.raises(ValueError, match="an epoch without batches"):
        jh.fit(start(), STEP, iter(list(batches(0))), epochs=2, progress=False)


def test_state_and_metrics_are_plain_pytrees_to_orbax(tmp_path):
    """In mid-epoch, without any code of ours; what goes on from there is the same to the last bit."""
    step = jax.jit(STEP)
    state, metrics = start(), HEAD.metrics()
    every = list(batches(0))
    for batch in every[:3]:
        state, out = step(state, batch)
        metrics = metrics + out.metrics
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "here", {"state": state, "metrics": metrics})
        checkpointer.wait_until_finished()
        found = checkpointer.restore(tmp_path / "here", {"state": start(), "metrics": HEAD.metrics()})
    same(found, {"state": state, "metrics": metrics})
    went_on, summed = found["state"], found["metrics"]
    for batch in every[3:]:
        state, out = step(state, batch)
        metrics = metrics + out.metrics
        went_on, again = step(went_on, batch)
        summed = summed + again.metrics
    same((went_on, summed), (state, metrics))
    np.testing.assert_allclose(np.ravel(state.params["w"]), by_hand(1)[0], rtol=1e-4)


SCRIPT = """
import json, pathlib, sys, time
import test_fit
folder, slow = pathlib.Path(sys.argv[1]), sys.argv[2] == "slow"

def batches(epoch):
    for i, batch in enumerate(test_fit.batches(epoch)):
        if slow and (epoch, i) == (2, 6):
            (folder / "there").touch()
            time.sleep(600)
        yield batch

import jaxheads as jh
fitted = jh.fit(test_fit.start(), test_fit.STEP, batches, epochs=4, eval_step=test_fit.EVALUATE,
                validation=test_fit.VALIDATION, directory=folder / "run", checkpoint_every=3, progress=False)
w = [fitted.state.params["w"].ravel().tolist(), fitted.best.params["w"].ravel().tolist()]
(folder / "ended.json").write_text(json.dumps({"w": w, "history": fitted.history, "step": int(fitted.state.step)}))
"""


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path):
    """SIGKILL, in the middle of an epoch and between two checkpoints."""
    here = pathlib.Path(__file__).parent
    environment = {**os.environ, **programs.environment(), "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    results = {}
    for name, slow in (("whole", False), ("killed", True)):
        folder = tmp_path / name
        folder.mkdir()
        command = [sys.executable, "-c", SCRIPT, str(folder)]
        if slow:
            process = subprocess.Popen([*command, "slow"], env=environment)
            deadline = time.monotonic() + 300
            while not (folder / "there").exists():
                assert process.poll() is None, "it ended before it could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.2)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert not (folder / "ended.json").exists()
            # Two epochs of eight batches, and the three before the checkpoint in the third one.
            assert max(int(path.name) for path in (folder / "run" / "latest").iterdir()) == 19
        subprocess.run([*command, "fast"], env=environment, check=True, timeout=300)
        results[name] = json.loads((folder / "ended.json").read_text())
    assert results["killed"] == results["whole"]
    assert results["whole"]["step"] == 32
    np.testing.assert_allclose(results["whole"]["w"][0], by_hand(4)[-1], rtol=1e-4)


def test_going_on_in_one_process(tmp_path):
    """The same without a second process: an exception in the place of the signal, and once more after the end."""

    class Stop(Exception):
        pass

    def dying(epoch):
        for i, batch in enumerate(batches(epoch)):
            if (epoch, i) == (1, 5):
                raise Stop
            yield batch

    given: dict[str, Any] = {"epochs": 2, "eval_step": EVALUATE, "validation": VALIDATION, "progress": False}
    whole = jh.fit(start(), STEP, batches, **given)
    given |= {"directory": tmp_path, "checkpoint_every": 4}
    with pytest.raises(Stop):
        jh.fit(start(), STEP, dying, **given)
    seen = []

    def counting(epoch):
        seen.append(epoch)
        return batches(epoch)

    for _ in range(2):
        again = jh.fit(start(), STEP, counting, **given)
        same((again.state, again.best), (whole.state, whole.best))
        assert again.history == whole.history
    assert seen == [1]


def stopping_at(epoch: int, batch: int, stop: type[BaseException]):
    def batches_until(e):
        for i, each in enumerate(batches(e)):
            if (e, i) == (epoch, batch):
                raise stop
            yield each

    return batches_until


def test_a_checkpoint_of_another_head_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        jh.fit(
            *(start(), jh.make_train_step(HEAD, apply, OPTIMIZER, with_metrics=False)),
            stopping_at(0, 5, KeyboardInterrupt),
            directory=tmp_path,
            checkpoint_every=2,
            progress=False,
        )
    with pytest.raises(ValueError, match=r"begun with 0 sums of metrics(.|\n)*new directory"):
        jh.fit(start(), STEP, batches, directory=tmp_path, checkpoint_every=2, progress=False)


def test_patience_begins_with_validation_and_a_nan_is_no_progress(tmp_path, capsys):
    jh.fit(start(), STEP, batches, epochs=3, directory=tmp_path, progress=False)
    given: dict[str, Any] = {"eval_step": EVALUATE, "validation": VALIDATION, "patience": 2, "directory": tmp_path}
    went_on = jh.fit(start(), STEP, batches, epochs=4, **given)
    assert len(went_on.history) == 4
    assert f"going on after epoch 3, batch 0 of {tmp_path}" in capsys.readouterr().out
    # With positives alone there is no area: the first epoch is kept, and two more are waited for.
    positives = [{"features": {"x": X[64:]}, "labels": np.ones(32, np.int32)}]
    lost = jh.fit(
        *(start(), STEP, batches),
        epochs=9,
        eval_step=EVALUATE,
        validation=positives,
        monitor="auc",
        patience=2,
        progress=False,
    )
    assert [np.isnan(line["validation/auc"]) for line in lost.history] == [True] * 3
    np.testing.assert_allclose(np.ravel(lost.best.params["w"]), by_hand(1)[0], rtol=1e-4)


def test_another_metric_begins_anew(tmp_path):
    """A loss of 0.5 is not to be beaten by an accuracy below it."""
    given: dict[str, Any] = {"eval_step": EVALUATE, "validation": VALIDATION, "directory": tmp_path, "progress": False}
    jh.fit(start(), STEP, batches, epochs=2, **given)
    went_on = jh.fit(start(), STEP, batches, epochs=3, monitor="validation/accuracy", **given)
    same(went_on.best, went_on.state)


def test_a_lost_loss_is_in_no_checkpoint(tmp_path):
    def spoiled(epoch):
        every = list(batches(epoch))
        every[3] = {**every[3], "features": {"x": every[3]["features"]["x"] * np.nan}}
        return every

    for bad in (spoiled, batches):
        if bad is spoiled:
            with pytest.raises(ValueError, match=r"loss of epoch 1 is nan(.|\n)*No checkpoint holds it"):
                jh.fit(start(), STEP, bad, directory=tmp_path, checkpoint_every=2, progress=False)
        else:
            ended = jh.fit(start(), STEP, bad, directory=tmp_path, checkpoint_every=2, progress=False)
            np.testing.assert_allclose(np.ravel(ended.state.params["w"]), by_hand(1)[0], rtol=1e-4)


def test_the_losses_and_the_monitored_metric_are_printed(capsys):
    jh.fit(start(), STEP, batches, eval_step=EVALUATE, validation=VALIDATION, monitor="auc")
    words = capsys.readouterr().out.split()
    assert words[2::2] == ["train/loss", "validation/loss", "validation/auc"]


def test_results_are_short_as_text():
    fitted = jh.fit(start(), STEP, batches, epochs=2, eval_step=EVALUATE, validation=VALIDATION, progress=False)
    text = repr(fitted)
    assert text.startswith("Fitted: 2 epochs, step 16, best at step ")
    assert f"validation/auc                   {fitted.history[-1]['validation/auc']:.5g}" in text
    assert max(map(len, text.splitlines())) < 80
    params: dict[str, Any] = {"w": np.arange(9, dtype=np.float32).reshape(3, 3), "b": np.array([0.5, 1.25], np.float32)}
    given: dict[str, Any] = {"optimizer": optax.sgd(RATE), "head": HEAD, "key": jax.random.key(0)}
    state = jh.TrainState.create(params=params, **given)
    assert "step=0, params={'b': [0.5, 1.25], 'w': <float32[3, 3]>}, head_params={}" in repr(state)
    many = jh.TrainState.create(params={str(i): params for i in range(10)}, **given)
    assert "params=<20 arrays, 110 numbers>" in repr(many)
    # Tracers and donated arrays have no values.
    shown = []
    jax.eval_shape(lambda state: shown.append(repr(state)), state)
    jax.jit(lambda state: state, donate_argnums=0)(state)
    assert "'b': <float32[2]>" in shown[0]
    assert "'b': <float32[2], deleted>" in repr(state)


STATE = start()
ONE = VALIDATION[0]
ILLEGAL = {**ONE, "labels": ONE["labels"] + 2}
NAMED = jh.BinaryClassHead(label_vocabulary=("no", "yes"))
NAMES = {**ONE, "labels": np.array(NAMED.label_vocabulary)[ONE["labels"]]}


class Empty:
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([], "validation must hold batches. Given an empty list"),
        (Empty(), "validation must hold batches. Given an empty Empty"),
        (ONE, r"validation must be a list of batches(.|\n)*one dict with the keys \['features'(.|\n)*\[batch\]"),
        (lambda: VALIDATION, "validation must be a list of batches(.|\n)*Given a function"),
        (3, "validation must be a list of batches(.|\n)*Given a int"),
        ([None], "A batch must be a dict(.|\n)*NoneType"),
        ([ILLEGAL], r"first batch of validation: labels must be numbers in \[0, 1\]. Given [23] at index \(0, 0\)"),
        ([NAMES], r"first batch of validation: labels(.|\n)*of strings(.|\n)*head.encode_labels"),
    ],
)
def test_validation_that_is_none(given, match):
    with pytest.raises(ValueError, match=match):
        jh.fit(STATE, STEP, batches, eval_step=EVALUATE, validation=given, progress=False)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (ONE, "batches must be a list of batches(.|\n)*one dict"),
        (lambda epoch: ONE, "batches must be a list of batches(.|\n)*one dict"),
        (lambda: [ONE], r"called with the epoch(.|\n)*Given one with the arguments \(\)"),
        (pd.DataFrame({"x": [1.0]}), "batches must be a list of batches(.|\n)*a data frame"),
        (3, "batches must be a list of batches(.|\n)*Given a int"),
        ([ILLEGAL], r"first batch of epoch 1: labels must be numbers(.|\n)*Given [23] at index \(0, 0\)"),
        ([{**ONE, "weights": -np.ones(16)}], "first batch of epoch 1: weights must be finite and not negative"),
        ([NAMES], r"first batch of epoch 1: labels(.|\n)*a ndarray of strings(.|\n)*head.encode_labels"),
        ([{**NAMES, "labels": NAMES["labels"].tolist()}], "labels(.|\n)*a list of strings(.|\n)*head.encode_labels"),
        ([{**ONE, "labels": pd.Series(ONE["labels"])}], "labels(.|\n)*a Series(.|\n)*head.encode_labels"),
        ([{**ONE, "features": {"x": X[:16], "who": NAMES["labels"]}}], r"features\['who'\](.|\n)*leave them out"),
        ([{**ONE, "where": [True] * 16}], r"where must be an array of numbers(.|\n)*a list(.|\n)*np.asarray"),
    ],
)
def test_batches_that_are_none(given, match):
    with pytest.raises(ValueError, match=match):
        jh.fit(STATE, STEP, given, progress=False)
    if not callable(given):
        with pytest.raises(ValueError, match=match.replace(" of epoch 1", "")):
            jh.evaluate(STATE, EVALUATE, given)


def test_a_look_at_a_batch_refuses_nothing_that_a_step_takes():
    """Hidden rows, arrays of the device, shapes that are known with the logits, mapped and compiled steps."""
    hidden = {**ILLEGAL, "labels": np.where(np.arange(16) < 8, ONE["labels"], 7), "where": np.arange(16) < 8}
    assert np.isfinite(jh.fit(STATE, jax.jit(STEP), [hidden], progress=False).history[0]["train/loss"])
    on_device = [{**ILLEGAL, "labels": jnp.asarray(ILLEGAL["labels"])}]
    with pytest.raises(ValueError, match="The loss of epoch 1 is nan"):
        jh.fit(STATE, STEP, on_device, progress=False)
    mapped = jax.pmap(jh.make_train_step(HEAD, apply, OPTIMIZER, axis_name="d"), "d", in_axes=(None, 0), out_axes=None)
    stacked = [jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), ILLEGAL)]
    with pytest.raises(ValueError, match=r"first batch of epoch 1: labels(.|\n)*at index \(0, 0, 0\)"):
        jh.fit(STATE, mapped, stacked, progress=False)
    # One step of a sequence: the labels alone could be one column.
    head = jh.SequentialHeadWrapper(HEAD, sequence_length_mask="mask")
    step = jh.make_train_step(head, lambda params, features: features["x"] @ params["w"], OPTIMIZER)
    features = {"x": X[:4, None], "mask": np.ones((4, 1), bool)}
    batch = {"features": features, "labels": LABELS[:4, None]}
    state = jh.TrainState.create(params={"w": np.zeros((3, 1))}, optimizer=OPTIMIZER, head=head, key=jax.random.key(0))
    assert len(jh.fit(state, step, [batch], progress=False).history) == 1
    # A function of the user's own may take batches of any kind.
    own = jax.jit(lambda state, x: STEP(state, {"features": {"x": x}, "labels": jnp.zeros(len(x))}))
    rows: Any = [X[:4]]
    assert jh.fit(STATE, own, rows, progress=False).state.step == 1


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"monitor": "auc"}, "monitor='auc', higher_is_better=None without eval_step and validation"),
        ({"monitor": "validation/loss"}, "without eval_step and validation"),
        ({"higher_is_better": True}, "higher_is_better=True without eval_step and validation"),
        ({"monitor": "confusion_matrix"}, "must be one number, and that metric is an array"),
    ],
)
def test_a_monitor_needs_validation_and_is_one_number(given, match):
    head = jh.MultiClassHead(3).with_metrics(jh.metrics.ConfusionMatrix())
    step, evaluate = jh.make_train_step(head, apply, OPTIMIZER), jh.make_eval_step(head, apply)
    params = {"w": np.zeros((3, 3), np.float32)}
    state = jh.TrainState.create(params=params, optimizer=OPTIMIZER, head=head, key=jax.random.key(0))
    if given.get("monitor") == "confusion_matrix":
        given = {**given, "eval_step": evaluate, "validation": VALIDATION, "higher_is_better": True}
    seen = []

    def noted(epoch):
        seen.append(epoch)
        return batches(epoch)

    with pytest.raises(ValueError, match=match):
        jh.fit(state, step, noted, progress=False, **given)
    assert not seen


class ZMQInteractiveShell:
    """The name by which IPython's kernel is known."""


class Colab(ZMQInteractiveShell):
    """Colab derives its own."""


@pytest.mark.parametrize(("shell", "bars"), [(ZMQInteractiveShell, 2), (Colab, 2), (object, 0), (None, 0)])
@pytest.mark.parametrize("by_module", [True, False])
def test_notebooks_show_bars_and_logs_do_not(shell, bars, by_module, monkeypatch, capfd):
    if shell is not None and by_module:
        monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell()))
    elif shell is not None:
        monkeypatch.setattr(builtins, "get_ipython", lambda: shell(), raising=False)
    made = []

    def bar(batches, title, **options):
        made.append((title, options["disable"]))
        return batches

    monkeypatch.setitem(sys.modules, "tqdm.auto", types.SimpleNamespace(tqdm=bar))
    jh.fit(STATE, STEP, batches, eval_step=EVALUATE, validation=VALIDATION)
    assert [title for title, _ in made] == ["epoch 1/1", "validation"]
    assert [disable is False for _, disable in made].count(True) == bars
    assert all(disable is None for _, disable in made) == (bars == 0)


def test_a_bar_of_text_in_a_kernel_without_widgets(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=ZMQInteractiveShell))
    jh.evaluate(STATE, EVALUATE, VALIDATION, progress=True)
    assert "evaluate" in capfd.readouterr().err
    monkeypatch.delitem(sys.modules, "IPython")
    jh.evaluate(STATE, EVALUATE, VALIDATION, progress=True)
    assert not capfd.readouterr().err


def test_without_tqdm_there_is_no_bar(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "tqdm" else found(name, *more))
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert jh.fit(start(), STEP, batches).state.step == 8


def test_a_state_and_steps_of_ones_own_are_trained():
    """Forks of `TrainState` are advised: a loop asks of a state that it counts its steps."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Own:
        step: Any
        w: Any

    def step(state: Any, batch: Any) -> Any:
        loss = jnp.mean((batch["labels"] - state.w) ** 2)
        return Own(state.step + 1, state.w + 0.1), jh.StepOutput(loss, None)

    shuffled = np.random.default_rng(0).permutation(np.array([{"labels": np.zeros(2)}] * 3, object))
    fitted = jh.fit(Own(jnp.int32(0), jnp.float32(1)), step, lambda epoch: shuffled, progress=False)  # pyright: ignore[reportArgumentType]
    assert int(fitted.state.step) == 3
    with pytest.raises(ValueError, match="must be a TrainState"):
        jh.fit(Own(jnp.int32(0), jnp.float32(1)), STEP, batches, progress=False)  # pyright: ignore[reportArgumentType]


def test_norms_and_the_rate_are_in_the_history():
    optimizer = optax.inject_hyperparams(optax.sgd)(lambda count: RATE / (1 + jnp.asarray(count, jnp.float32)))
    step = jh.make_train_step(HEAD, apply, optimizer, with_norms=True)
    params = {"w": np.zeros((3, 1), np.float32)}
    state = jh.TrainState.create(params=params, optimizer=optimizer, head=HEAD, key=jax.random.key(0))
    line = jh.fit(state, step, batches, progress=False).history[0]
    w, rows = np.zeros(3), []
    for i, batch in enumerate(batches(0)):
        x, y = batch["features"]["x"].astype(np.float64), batch["labels"]
        gradient, rate = x.T @ (1 / (1 + np.exp(-x @ w)) - y) / len(y), RATE / (1 + i)
        w = w - rate * gradient
        rows.append([*map(np.linalg.norm, (gradient, w, rate * gradient)), rate])
    found = [line[f"train/{name}"] for name in ("grad_norm", "param_norm", "update_norm", "learning_rate")]
    np.testing.assert_allclose(found, np.mean(rows, 0), rtol=1e-5)
    np.testing.assert_allclose(line["train/loss"], line["train/average_loss"], rtol=1e-6)


def spoiled(epoch: int):
    """The batches, the third of them with a NaN."""
    every = list(batches(epoch))
    every[2] = {**every[2], "features": {"x": every[2]["features"]["x"] * np.nan}}
    return every


def guarded(**given: Any) -> jh.TrainState:
    params = {"w": np.zeros((3, 1), np.float32)}
    return jh.TrainState.create(params=params, optimizer=OPTIMIZER, head=HEAD, key=jax.random.key(0), **given)


def test_steps_that_are_skipped_are_counted_over_a_resume(tmp_path):
    """They are as if they had never been: in the parameters, in the means of an epoch, and in its metrics."""
    skipping = jh.make_train_step(HEAD, apply, OPTIMIZER, skip_nonfinite=True, with_norms=True)
    given: dict[str, Any] = {"epochs": 2, "progress": False}
    whole = jh.fit(guarded(count_skipped=True), skipping, spoiled, **given)
    others = jh.fit(start(), STEP, lambda epoch: [b for i, b in enumerate(batches(epoch)) if i != 2], **given)
    np.testing.assert_allclose(whole.state.params["w"], others.state.params["w"], rtol=1e-6)
    for line, other in zip(whole.history, others.history, strict=True):
        assert line["train/skipped"] == 1
        assert np.isfinite(list(line.values())).all()
        for key in ("train/loss", "train/auc", "train/label/mean"):
            np.testing.assert_allclose(line[key], other[key], rtol=1e-6)
    assert whole.state.skipped == 2
    assert whole.state.step == 16

    def dying(epoch):
        for i, batch in enumerate(spoiled(epoch)):
            if (epoch, i) == (1, 5):
                raise KeyboardInterrupt
            yield batch

    given.update(directory=tmp_path, checkpoint_every=4)
    with pytest.raises(KeyboardInterrupt):
        jh.fit(guarded(count_skipped=True), skipping, dying, **given)
    again = jh.fit(guarded(count_skipped=True), skipping, spoiled, **given)
    same(again.state, whole.state)
    assert again.history == whole.history
    with pytest.raises(ValueError, match=r"only now: \[\](.|\n)*same count_skipped and loss_scale"):
        jh.fit(start(), skipping, spoiled, **{**given, "epochs": 3})


def test_a_run_goes_on_with_steps_that_may_be_skipped(tmp_path):
    """The checkpoints of a state that counts nothing are as they were before there was a count."""
    jh.fit(start(), STEP, batches, directory=tmp_path, progress=False)
    skipping = jh.make_train_step(HEAD, apply, OPTIMIZER, skip_nonfinite=True)
    went_on = jh.fit(start(), skipping, spoiled, epochs=2, directory=tmp_path, progress=False)
    assert [line.get("train/skipped") for line in went_on.history] == [None, 1]
    with pytest.raises(ValueError, match=r"only now: \['skipped'\](.|\n)*same count_skipped and loss_scale"):
        jh.fit(guarded(count_skipped=True), skipping, batches, epochs=3, directory=tmp_path, progress=False)
    old = {name: getattr(start(), name) for name in ("params", "head_params", "opt_state", "model_state", "head_state")}
    old |= {"step": jnp.int32(5), "key": jax.random.key(1)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "old", old)
        checkpointer.wait_until_finished()
        assert checkpointer.restore(tmp_path / "old", start()).step == 5


def test_an_epoch_of_skipped_steps_has_no_mean():
    skipping = jh.make_train_step(HEAD, apply, OPTIMIZER, skip_nonfinite=True)
    bad = [{"features": {"x": X[:8] * np.nan}, "labels": LABELS[:8]}]
    fitted = jh.fit(start(), skipping, bad, progress=False)
    assert np.isnan(fitted.history[0]["train/loss"])
    assert fitted.history[0]["train/skipped"] == 1
    same(fitted.state.params, start().params)


class Mlflow:
    """What the module mlflow has."""

    def __init__(self):
        self.seen = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None, synchronous: bool | None = None):
        self.seen[step] = metrics


class Run:
    """What a run of wandb has."""

    def __init__(self):
        self.seen = {}

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None):
        self.seen[step] = data


@pytest.mark.parametrize("kind", [Mlflow, Run])
def test_logs_are_known_by_their_methods(kind):
    writer = kind()
    fitted = jh.fit(start(), STEP, batches, epochs=2, writer=writer, progress=False)
    assert list(writer.seen) == [8, 16]
    for line in fitted.history:
        expected = {key: value for key, value in line.items() if key not in ("epoch", "step")}
        assert writer.seen[line["step"]] == expected


@pytest.mark.parametrize("writer", [logging.getLogger("jaxheads"), print, "run", types.SimpleNamespace(log=3)])
def test_what_is_no_log_is_refused(writer):
    with pytest.raises(ValueError, match=r"add_scalar\(tag, value, step\)(.|\n)*log_metrics(.|\n)*wandb(.|\n)*Given"):
        jh.fit(start(), STEP, batches, writer=writer, progress=False)


def test_functions_are_called_after_each_epoch_and_may_stop(tmp_path):
    rows, after = [], by_hand(3)

    def note(row: dict[str, float], state: Any) -> None:
        np.testing.assert_allclose(np.ravel(state.params["w"]), after[len(rows)], rtol=1e-4)
        # Its checkpoint is written.
        assert (tmp_path / "latest" / str(8 * (len(rows) + 1))).exists()
        rows.append(dict(row))
        row.clear()

    def stop(row: Any, state: Any) -> Any:
        return np.bool_(state.step >= 16)

    given: dict[str, Any] = {"epochs": 3, "directory": tmp_path, "progress": False}
    fitted = jh.fit(start(), STEP, batches, on_epoch_end=[stop, note], **given)
    assert fitted.history == rows
    assert [row["epoch"] for row in rows] == [1, 2]
    # A stop is in no checkpoint.
    went_on = jh.fit(start(), STEP, batches, on_epoch_end=note, **given)
    assert went_on.history == rows
    assert len(rows) == 3


def test_a_function_that_raises_ends_training(tmp_path):
    def broken(row: Any, state: Any) -> None:
        raise RuntimeError("no room in the log")

    with pytest.raises(RuntimeError, match="no room in the log"):
        jh.fit(start(), STEP, batches, epochs=2, on_epoch_end=broken, directory=tmp_path, progress=False)
    went_on = jh.fit(start(), STEP, batches, epochs=2, directory=tmp_path, progress=False)
    assert [line["epoch"] for line in went_on.history] == [1, 2]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (3, r"must be a function(.|\n)*function\(row, state\)(.|\n)*Given 3"),
        ([lambda row: None], r"must be a function(.|\n)*function\(row, state\)(.|\n)*Given"),
        (lambda row, state: row, r"must return True to stop(.|\n)*Given a dict"),
    ],
)
def test_functions_that_do_not_fit_are_refused(given, match):
    with pytest.raises(ValueError, match=match):
        jh.fit(start(), STEP, batches, on_epoch_end=given, progress=False)
