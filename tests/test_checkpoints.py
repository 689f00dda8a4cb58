"""Checkpoints of `fit`: those of another run are refused, damaged ones are told; a folder has one owner."""

import dataclasses
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import warnings
from typing import Any

import jax
import numpy as np
import optax
import programs
import pytest
from test_fit import EVALUATE, HEAD, OPTIMIZER, STEP, VALIDATION, apply, batches, same, start

import jaxheads as jh
from jaxheads.numerics.describing import describe, describe_code
from jaxheads.training import checkpoints
from jaxheads.training.progress import Progress


class Stop(Exception):
    pass


def stopping_at(epoch: int, batch: int):
    def until(e):
        for i, each in enumerate(batches(e)):
            if (e, i) == (epoch, batch):
                raise Stop
            yield each

    return until


def fit(directory: Any, given: Any = batches, step: Any = STEP, state: Any = None, **rest: Any) -> jh.training.Fitted:
    rest = {"epochs": 1, "progress": False} | rest
    return jh.fit(start() if state is None else state, step, given, directory=directory, **rest)


def square(labels, logits):
    return (labels - logits) ** 2


def triple(labels, logits):
    return 3 * (labels - logits) ** 2


def other(head: jh.Head = HEAD, optimizer: Any = OPTIMIZER) -> dict[str, Any]:
    """A step and a first state of another run, whose arrays have the same shapes."""
    params = {"w": np.zeros((3, 1), np.float32)}
    state = jh.TrainState.create(params=params, optimizer=optimizer, head=head, key=jax.random.key(0))
    return {"step": jh.make_train_step(head, apply, optimizer), "state": state}


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        (other(), other(jh.RegressionHead()), r"another head. There: BinaryClassHead\(\). Now: RegressionHead\(\)"),
        pytest.param(
            other(),
            other(jh.BinaryClassHead(name="a")),
            r"another head. There: BinaryClassHead\(\). Now: .*name='a'",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            other(), other(jh.BinaryClassHead(loss_reduction="sum")), "another head(.|\n)*SUM", marks=pytest.mark.slow
        ),
        pytest.param(
            other(jh.BinaryClassHead(thresholds=[0.3])),
            other(jh.BinaryClassHead(thresholds=[0.4])),
            "another head",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            other(jh.RegressionHead(loss_fn=square)),
            other(jh.RegressionHead(loss_fn=triple)),
            "square(.|\n)*triple",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            other(),
            other(optimizer=optax.sgd(0.25, momentum=0.9)),
            r"another optimizer(.|\n)*-0\.5(.|\n)*-0\.25",
            marks=pytest.mark.slow,
        ),
        (other(), other(optimizer=optax.sgd(0.5, momentum=0.9, nesterov=True)), r"nesterov=False(.|\n)*nesterov=True"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(first, second, match, tmp_path):
    """Even at the end of an epoch, where all arrays would fit."""
    fit(tmp_path, **first)
    with pytest.raises(ValueError, match=match) as error:
        fit(tmp_path, epochs=2, **second)
    assert "allow_changes=True" in str(error.value)
    assert len(str(error.value)) < 400 + len(str(tmp_path))
    assert len(fit(tmp_path, epochs=2, allow_changes=True, **second).history) == 2


def test_the_same_run_is_known_again(tmp_path):
    """Also a head and an optimizer that were built anew; a schedule too, and a lambda."""
    for optimizer in (optax.sgd(0.5, momentum=0.9), optax.sgd(optax.cosine_decay_schedule(0.1, 8), momentum=0.9)):
        texts = {describe(optimizer) for _ in range(2)}
        assert len(texts) == 1
        assert "0x" not in texts.pop()
    again = jh.BinaryClassHead(loss_fn=lambda labels, logits: (labels - logits) ** 2)
    more = jh.BinaryClassHead(loss_fn=lambda labels, logits: (labels - logits) ** 2)
    assert describe(again) == describe(more) != describe(jh.BinaryClassHead())
    assert describe(optax.cosine_decay_schedule(0.1, 8)) != describe(optax.cosine_decay_schedule(0.1, 9))
    fit(tmp_path)
    assert len(fit(tmp_path, epochs=2, **other(dataclasses.replace(HEAD))).history) == 2


class Power:
    """A loss with a setting, as an object that is called and as a method."""

    def __init__(self, power):
        self.power = power

    def __call__(self, labels, logits):
        return jax.numpy.abs(labels - logits) ** self.power

    def loss(self, labels, logits):
        return self(labels, logits)


def adam_in_steps(rate, steps=4):
    return optax.MultiSteps(optax.adam(rate), steps).gradient_transformation()


NAMES = np.array(["rock", "paper"], object)
# Makers of a value, and others of a value that differs from it.
DIFFERENT: list[Any] = [
    (lambda: optax.adam(1e-3), lambda: optax.adam(2e-3)),
    (lambda: optax.adam(optax.cosine_decay_schedule(0.1, 8)), lambda: optax.adam(optax.cosine_decay_schedule(0.1, 9))),
    (lambda: adam_in_steps(0.1), lambda: adam_in_steps(9.0)),
    (lambda: adam_in_steps(0.1), lambda: adam_in_steps(0.1, 5)),
    (lambda: optax.inject_hyperparams(optax.sgd)(0.1), lambda: optax.inject_hyperparams(optax.sgd)(0.2)),
    (lambda: Power(2), lambda: Power(3)),
    (lambda: Power(2).loss, lambda: Power(3).loss),
    (lambda: lambda y, z: (lambda a: 3 * a)(y - z), lambda: lambda y, z: (lambda a: 4 * a)(y - z)),
    (lambda: lambda y: y in (1.0, 2.0), lambda: lambda y: y in (1.0, 3.0)),
    (lambda: {"names": NAMES}, lambda: {"names": NAMES[::-1]}),
    (lambda: list(range(5000)), lambda: [*range(4999), 0]),
    (lambda: jax.random.key(0), lambda: jax.random.key(1)),
    (lambda: jh.BinaryClassHead(thresholds=[0.3]), lambda: jh.BinaryClassHead(thresholds=[0.4])),
]


@pytest.mark.parametrize(("make", "make_other"), DIFFERENT)
def test_a_description_is_of_the_value(make, make_other):
    one, again, other = describe(make()), describe(make()), describe(make_other())
    assert one == again != other
    assert "0x" not in one
    assert len(one) < 5000


def test_a_description_does_not_change_as_a_schedule_is_used():
    """Cosine schedules of optax make a float of the number of their steps when they are first traced."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 4, 100)
    before = describe(schedule)
    jax.eval_shape(schedule, np.float32(3))
    assert describe(schedule) == before


def test_other_code_is_told_where_names_and_numbers_are_the_same():
    one, other = (lambda y, z: (y - z) * 2), (lambda y, z: (y + z) * 2)
    assert describe(one) == describe(other)
    assert describe_code(one) == describe_code(lambda y, z: (y - z) * 2) != describe_code(other)
    assert describe_code(optax.adam(1e-3)) == {}


def test_fewer_epochs_than_there_are_and_other_batches_are_refused(tmp_path):
    fit(tmp_path / "done", epochs=2)
    with pytest.raises(ValueError, match=r"holds 2 epochs\. Given epochs=1"):
        fit(tmp_path / "done", epochs=1)
    with pytest.raises(Stop):
        fit(tmp_path / "done", stopping_at(2, 5), epochs=3, checkpoint_every=2)
    with pytest.raises(ValueError, match=r"holds 2 epochs and 4 batches\. Given epochs=2"):
        fit(tmp_path / "done", epochs=2)
    with pytest.raises(ValueError, match=r"Epoch 3 was begun with 4 batches"):
        fit(tmp_path / "done", list(batches(2))[:4], epochs=3)
    with pytest.raises(Stop):
        fit(tmp_path / "begun", stopping_at(0, 5), checkpoint_every=2)
    halves = [{key: jax.tree.map(lambda x: x[:4], value) for key, value in batch.items()} for batch in batches(0)]
    with pytest.raises(ValueError, match=r"begun with batches of \[8, 3\], \[8\](.|\n)*goes on with \[4, 3\], \[4\]"):
        fit(tmp_path / "begun", halves, checkpoint_every=2)
    others = list(batches(1))
    with pytest.raises(ValueError, match=r"Epoch 1 was begun with other values in its first batch(.|\n)*as the seed"):
        fit(tmp_path / "begun", others, checkpoint_every=2)
    with pytest.raises(Stop):
        fit(tmp_path / "augmented", stopping_at(0, 5), checkpoint_every=2)
    noisy = [{"features": {"x": batch["features"]["x"] + 1}, "labels": batch["labels"]} for batch in batches(0)]
    fit(tmp_path / "augmented", noisy)
    fit(tmp_path / "begun", halves, checkpoint_every=2, allow_changes=True)


def test_another_width_is_named(tmp_path):
    fit(tmp_path)
    wide = {"w": np.zeros((4, 1), np.float32)}
    optimizer = optax.sgd(0.5, momentum=0.9)
    state = jh.TrainState.create(params=wide, optimizer=optimizer, head=HEAD, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"w is float32\[3, 1\] there, and float32\[4, 1\] now \(2 arrays differ\)"):
        fit(tmp_path, epochs=2, state=state)


def test_another_kind_of_numbers_or_of_key_is_named(tmp_path):
    fit(tmp_path)
    for change, match in (
        ({"params": {"w": np.zeros((3, 1), jax.numpy.bfloat16)}}, r"float32\[3, 1\] there, and bfloat16\[3, 1\]"),
        ({"params": {"w": np.zeros((3, 1), np.float32), "e": {}}}, "another state"),
    ):
        given: dict[str, Any] = {"params": {"w": np.zeros((3, 1), np.float32)}, "key": jax.random.key(0)} | change
        state = jh.TrainState.create(**given, optimizer=OPTIMIZER, head=HEAD)
        with pytest.raises(ValueError, match=match):
            fit(tmp_path, epochs=2, state=state)


@pytest.mark.slow
def test_changes_once_allowed_are_not_held_against_the_best(tmp_path):
    rest = {"eval_step": EVALUATE, "validation": VALIDATION}
    fit(tmp_path, epochs=2, **rest)
    still = other(optimizer=optax.sgd(1e-9, momentum=0.9))
    fit(tmp_path, epochs=3, allow_changes=True, **still, **rest)
    assert len(fit(tmp_path, epochs=4, **still, **rest).history) == 4


def test_files_beside_a_checkpoint_are_no_damage(tmp_path):
    fit(tmp_path, epochs=2)
    for step in (tmp_path / "latest").iterdir():
        (step / ".DS_Store").write_text("")
    assert len(fit(tmp_path, epochs=3).history) == 3


@pytest.mark.parametrize(
    ("directory", "match"),
    [
        ("", "path of a folder"),
        (5, "path of a folder"),
        (b"abc", "path of a folder"),
        ("a\0b", "path of a folder"),
        ("gs://bucket/run", "file system that is mounted"),
    ],
)
def test_what_is_no_path_is_refused(directory, match):
    with pytest.raises(ValueError, match=match):
        fit(directory)


@pytest.mark.parametrize("name", ["lock", "latest", "best"])
def test_names_that_are_taken_are_told(name, tmp_path):
    if name == "lock":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=rf"{name} must be a f"):
        fit(tmp_path, **VALIDATED)


def test_a_path_stays_where_it_was_when_training_began(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def moving(epoch):
        os.chdir("/")
        return batches(epoch)

    fit("run", moving)
    assert len(fit(tmp_path / "run", epochs=2).history) == 2


def test_no_flipped_bit_of_the_progress_passes():
    at = Progress(3, 2, np.array([[1.5, 1e-9], [2.5, 0.0]], np.float32), 1, 0.25, 1, "loss, min", [{"epoch": 1}])
    text = json.dumps(at.to_json()).encode()
    expected, read = Progress.from_json(json.loads(text)).to_json(), 0
    assert expected == at.to_json()
    for place in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[place // 8] ^= 1 << place % 8
        try:
            found = Progress.from_json(json.loads(flipped)).to_json()
        except (ValueError, KeyError, TypeError):
            continue
        read += 1
        assert found == expected
    assert read < 10  # a blank that has become a line break, say


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def delete(path: pathlib.Path) -> None:
    path.unlink()


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: pathlib.Path) -> None:
    whole = bytearray(path.read_bytes())
    for place in range(0, len(whole), max(1, len(whole) // 16)):
        whole[place] ^= 1
    path.write_bytes(whole)


def run_damaged(template: pathlib.Path, copy: pathlib.Path, which: str, number: int, damage: Any, expected: Any) -> str:
    """Damages one file of a copy and goes on; returns how that ended, after it has compared the numbers."""
    shutil.copytree(template, copy)
    damage(files_of(copy / which)[number])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            ended = fit(copy, **VALIDATED)
        except ValueError as error:
            return f"refused: {error}"
    same(ended.state, expected.state)
    told = [warning for warning in told if warning.category is jh.CheckpointWarning]
    if not (told and which.startswith("best")):
        same(ended.best, expected.best)
        assert ended.history == expected.history
    return f"told: {told[0].message}" if told else "unharmed"


VALIDATED: dict[str, Any] = {"epochs": 3, "eval_step": EVALUATE, "validation": VALIDATION}
DAMAGES = [delete, cut, flip]


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    """A run of three epochs, and the folder of one that has done two."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    fit(folder, **VALIDATED | {"epochs": 2})
    return folder, fit(None, **VALIDATED)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize(
    ("which", "every"),
    [("latest/16", False), *(pytest.param(x, True, marks=pytest.mark.slow) for x in ("latest/16", "best/1"))],
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_goes_on(which, every, damage, two_epochs, tmp_path):
    folder, expected = two_epochs
    files = files_of(folder / which)
    ends = {
        str(files[i].relative_to(folder)): run_damaged(folder, tmp_path / f"{i}", which, i, damage, expected)
        for i in (range(len(files)) if every else [len(files) // 2])
    }
    assert not [text for text in ends.values() if text.startswith("refused")], ends
    assert not every or any(text.startswith("told") for text in ends.values()), ends


def test_where_no_checkpoint_is_intact_that_is_said(two_epochs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(two_epochs[0], folder)
    for path in files_of(folder / "latest"):
        cut(path)
    with (
        pytest.warns(jh.CheckpointWarning, match=r"checkpoint 16 of .* is damaged(.|\n)*goes on from .* 8"),
        pytest.raises(ValueError, match=r"checkpoint 8 of .* is damaged(.|\n)*No other in .* is intact"),
    ):
        fit(folder, **VALIDATED)


def test_the_best_is_not_missed_where_it_is_not_needed_and_told_where_it_is(two_epochs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(two_epochs[0], folder)
    shutil.rmtree(folder / "best")
    with pytest.warns(jh.CheckpointWarning, match=r"checkpoint \d of .*best is missing(.|\n)*next epoch counts"):
        ended = fit(folder, **VALIDATED)
    same(ended.best, ended.state)
    shutil.rmtree(folder / "best")
    fit(folder, epochs=4)


def test_a_new_run_beside_an_old_best_keeps_its_own(two_epochs, tmp_path):
    """Orbax would skip what has a lower number than what is there, and say so by a return value alone."""
    folder = tmp_path / "run"
    shutil.copytree(two_epochs[0], folder)
    shutil.rmtree(folder / "latest")
    rest = VALIDATED | {"epochs": 1}
    ended = fit(folder, **rest)
    again = fit(folder, **rest)
    same((again.state, again.best), (ended.state, ended.best))
    assert [path.name for path in (folder / "best").iterdir() if path.name.isdigit()] == ["1"]


def test_a_disk_that_is_full_is_told_in_words(tmp_path, monkeypatch):
    fit(tmp_path)

    def full(*args: Any, **rest: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("orbax.checkpoint.CheckpointManager.save", full)
        with pytest.raises(ValueError, match=r"checkpoint 16 could not be written(.|\n)*No space left(.|\n)*full"):
            fit(tmp_path, epochs=2)
    assert len(fit(tmp_path, epochs=2).history) == 2


def test_a_directory_that_cannot_be_written_is_found_before_the_first_batch(tmp_path):
    (tmp_path / "file").write_text("")

    def never(epoch):
        raise AssertionError("a batch was asked for")

    with pytest.raises(ValueError, match="cannot be written"):
        fit(tmp_path / "file", never)


def test_a_directory_has_one_owner_at_a_time(tmp_path):
    with checkpoints.locked(tmp_path), pytest.raises(ValueError, match=rf"in use by the process {os.getpid()} on \w+"):
        fit(tmp_path)
    fit(tmp_path)


HOLD = """
import pathlib, sys, time
from jaxheads.training.checkpoints import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_the_death_of_the_owner_frees_a_directory(tmp_path):
    environment = {**os.environ, **programs.environment(), "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by the process {owner.pid} on"):
            fit(tmp_path)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    assert len(fit(tmp_path).history) == 1


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def unknown(*args: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unknown)
    with pytest.warns(jh.CheckpointWarning, match="without locks"), checkpoints.locked(tmp_path):
        pass


def test_an_owner_without_a_name_is_another_process(tmp_path, monkeypatch):
    with checkpoints.locked(tmp_path):
        (tmp_path / "lock").write_text("{")
        with pytest.raises(ValueError, match="in use by another process"), checkpoints.locked(tmp_path):
            pass
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with checkpoints.locked(tmp_path):
        pass


def test_what_is_no_damage_is_passed_on(tmp_path, monkeypatch):
    fit(tmp_path)
    for error in (MemoryError(), PermissionError("not yours"), RuntimeError("RESOURCE_EXHAUSTED: out of memory")):

        def fail(*args: Any, error: Exception = error, **rest: Any) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr("orbax.checkpoint.CheckpointManager.restore", fail)
            with pytest.raises(type(error)):
                fit(tmp_path, epochs=2)
    with monkeypatch.context() as patched:
        patched.setattr("orbax.checkpoint.CheckpointManager.save", lambda *args, **rest: False)
        with pytest.raises(ValueError, match="does not say why"):
            fit(tmp_path, epochs=2)
    for path in (tmp_path / "latest").glob("*/files.json"):
        path.unlink()  # as a process that was killed before it wrote the list
    assert len(fit(tmp_path, epochs=2).history) == 2


def test_other_leaves_and_other_keys_are_named(tmp_path):
    fit(tmp_path)
    for change, match in (
        ({"params": {"w": np.zeros((3, 1), np.float32), "b": np.zeros(1, np.float32)}}, r"only now(.|\n)*params/b"),
        ({"key": jax.random.PRNGKey(0)}, "key is key<fry> there, and uint32 now"),
    ):
        given: dict[str, Any] = {"params": {"w": np.zeros((3, 1), np.float32)}, "key": jax.random.key(0)} | change
        state = jh.TrainState.create(**given, optimizer=OPTIMIZER, head=HEAD)
        with pytest.raises(ValueError, match=match):
            fit(tmp_path, epochs=2, state=state)
