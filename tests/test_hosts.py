"""Several processes: each has rows of its own, steps wait for all, and metric states merge without a device."""

import copy
import dataclasses
import functools
import json
import os
import pathlib
import pickle
import random
import socket
import subprocess
import sys
import time
from fractions import Fraction
from typing import Any

import chex
import devices
import host_worker
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import programs
import pytest
from zoo import bounds_of

import jaxheads as jh
from jaxheads.metrics.reading import STAMP
from jaxheads.training import lockstep, shard_batch

TESTS = pathlib.Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
SECONDS = 300
HEAD = jh.RegressionHead()
RNG = np.random.default_rng(0)


def together(job: str, folder: pathlib.Path, fails: bool = False) -> tuple[list[Any], str]:
    """Returns what two processes found (their exit codes, if they fail), and what they printed.

    Neither outlives the time-out, nor the other's end by much.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    logs = [folder / f"{job}_{i}.log" for i in range(2)]
    running, until = [], time.monotonic() + SECONDS
    try:
        for i, log in enumerate(logs):
            command = [sys.executable, str(TESTS / "host_worker.py"), job, str(i), str(port), str(folder)]
            with log.open("w") as out:
                environment = {**os.environ, "JAX_PLATFORMS": "cpu", **programs.environment()}
                running.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment))
        while any(process.poll() is None for process in running) and time.monotonic() < until:
            if any(process.poll() for process in running):
                # One failed; the other waits for it in a collective.
                until = min(until, time.monotonic() + 20)
            time.sleep(0.05)
    finally:
        for process in running:
            # SIGTERM is caught by JAX's own handler.
            process.kill()
            process.wait()
    printed = "".join(log.read_text() for log in logs)
    codes = [process.returncode for process in running]
    assert all(codes) if fails else codes == [0, 0], f"{codes}\n{printed[-6000:]}"
    return codes if fails else [pickle.loads((folder / f"{job}_{i}.pickle").read_bytes()) for i in range(2)], printed


def rows(batch: Any, some: slice) -> Any:
    return jax.tree.map(lambda x: x[some], batch)


def with_key(state: jh.TrainState) -> jh.TrainState:
    return dataclasses.replace(state, key=jax.random.wrap_key_data(jnp.asarray(state.key)))


def same(a: Any, b: Any) -> None:
    """Bit by bit."""
    chex.assert_trees_all_equal(a, b, strict=True)


def check_trained(found: list[Any], names: list[str]) -> None:
    for name in names:
        first, second = (one[name] for one in found)
        same(first, second)
        devices.assert_same(first._replace(state=with_key(first.state)), devices.alone(name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def found(folder):
    return together("everything", folder)[0]


@pytest.mark.slow
def test_two_processes_train_as_one(found):
    check_trained([one["trained"] for one in found], ["ordinal"])


@pytest.mark.slow
def test_two_processes_train_other_heads_as_one(tmp_path):
    names = ["binary", "running_prior", "multi_head"]
    check_trained(together(",".join(names), tmp_path)[0], names)


@functools.cache
def evaluation(name: str) -> Any:
    """What measures padded rows of one process, compiled once."""
    entry = devices.entry_of(name)
    step, state = jax.jit(jh.make_eval_step(entry.head, devices.network)), devices.first_state(entry)
    return lambda part: step(state, jh.pad_batch(part, host_worker.SIZE)).metrics


def measured(name: str, counts: tuple[int, int]) -> jh.Metrics:
    """The rows of both processes, in one."""
    return jh.Metrics.merge(
        evaluation(name)(rows(batch, own))
        for own, n in zip(host_worker.OWN, counts, strict=True)
        for batch in devices.batches_of(devices.entry_of(name))[:n]
    )


@pytest.mark.slow
@pytest.mark.parametrize(("case", "counts"), [("uneven", (3, 1)), ("none in one", (0, 2))])
def test_evaluation_ends_on_both(found, case, counts):
    (first, steps), (second, others) = (one[case] for one in found)
    assert steps == others == max(counts)
    same(first, second)
    devices.assert_close(first.compute(bounds=True), measured("binary", counts).compute(bounds=True))


@pytest.mark.slow
def test_processes_without_batches_end_or_say_so(found):
    for one in found:
        assert one["none at all"] == []
        # On both, for where one stops the other would wait.
        assert one["without like"].startswith("ValueError: A process has no batch to take the shapes from")
        assert "like=" in one["without like"]
    assert "Another process failed" in found[0]["broken"]
    assert found[1]["broken"] == "ValueError: cannot read this"


@pytest.mark.slow
def test_what_cannot_be_spread_over_processes_is_refused(found):
    for one in found:
        assert "over 2 devices of this process" in one["odd rows"]
        assert "3 rows" in one["odd rows"]
        assert "pad_batch" in one["odd rows"]
        assert "()" in one["no rows"]
        # Each would hold other rows as the same ones, or count the rows otherwise.
        assert "several processes hold the same rows" in one["crossed mesh"]
        assert "Given [2, 4] by process" in one["uneven rows"]
        assert "lockstep" in one["uneven rows"]
        for case in ("spread, merged", "spread, pickled"):
            assert "spread over processes" in one[case]
            assert "psum" in one[case]
    assert "multiple of that" in found[0]["odd rows in one"]
    assert "Given [-1, 2] by process (-1: refused there)" in found[1]["odd rows in one"]


@pytest.mark.slow
def test_states_of_processes_merge_to_the_truth(found):
    entry = devices.entry_of("binary")
    parts = [metrics for one in found for metrics in one["own"]]
    assert all(type(part.state) is np.ndarray for part in parts)
    batches = [devices.draw(entry, seed=seed) for seed in range(1, 1 + devices.STEPS)]
    every = jax.tree.map(lambda *x: np.concatenate(x), *batches)
    logits = every["logits"].astype(np.float64)
    for params in devices.first_params(entry).values():
        logits = logits * params["scale"].astype(np.float64) + params["bias"].astype(np.float64)
    check_values(jh.Metrics.merge(parts), entry.expected_metrics(**{**every, "logits": logits}))


def check_values(metrics: jh.Metrics, expected: dict[str, float]) -> None:
    got = metrics.compute(bounds=True)
    for key, value in expected.items():
        low, high = bounds_of(got, key) or (got[key], got[key])
        assert low - 1e-6 * max(1, abs(value)) <= value <= high + 1e-6 * max(1, abs(value)), key


@pytest.mark.slow
def test_both_killed_in_an_epoch_go_on(tmp_path):
    whole = together("whole", tmp_path)[0]
    same(*whole)
    assert [line["step"] for line in whole[0]["history"]] == [6, 12]
    together("killed", tmp_path, fails=True)
    resumed, printed = together("resumed", tmp_path)
    assert printed.count("going on after epoch 1, batch 2 of") == 2
    for one, other in zip(whole, resumed, strict=True):
        same(one, other)


@pytest.mark.slow
def test_an_error_in_one_process_ends_both(tmp_path):
    """It does not wait for the other at its end, so the other fails in its next step: nobody has to kill it."""
    codes, printed = together("raises", tmp_path, fails=True)
    assert codes[1] == 1
    assert codes[0] not in (0, -9)  # -9: it was killed after waiting for 20 s
    assert "RuntimeError: no room for train/loss in the log" in printed
    assert "Process 1 of 2 ends with this RuntimeError" in printed


@pytest.mark.slow
def test_a_process_without_a_device_merges_what_others_measured(found, folder):
    """It gets the states as files, and starts no backend; its values are those of a merge here, to the last bit."""
    command = [sys.executable, str(TESTS / "host_merge.py"), *map(str, sorted(folder.glob("own_*.pickle")))]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **programs.environment()}
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    told = json.loads(run.stdout)
    assert told["has_backend"] is False
    merged = jh.Metrics.merge(metrics for one in found for metrics in one["own"])
    assert told["values"] == {key: float(value) for key, value in merged.compute(bounds=True).items()}


def state_of(slots: Any) -> jh.Metrics:
    """With the same in every slot but those of the stamp: a pair, or one number."""
    zero = HEAD.metrics()
    state = np.broadcast_to(np.float32(slots), (*np.shape(zero.state)[:1], np.size(slots))).copy()
    state[STAMPED] = 0
    return dataclasses.replace(zero, state=state)


STAMPED = slice(1, 1 + STAMP)


def total(metrics: jh.Metrics) -> np.ndarray:
    """The sums of a state, without its stamp."""
    return np.delete(np.asarray(metrics.state, np.float64).sum(-1), STAMPED, -1)


def test_merged_counts_do_not_stop():
    parts = [state_of([2.0**24])] + [state_of([1.0])] * 1001
    assert (total(jh.Metrics.merge(parts)) == 2**24 + 1001).all()
    assert (total(jh.Metrics.merge([jh.Metrics.merge(parts)] * 100)) == 100 * (2**24 + 1001)).all()


def drawn_pairs(n: int) -> np.ndarray:
    """Pairs of very different size, whose errors matter."""
    values = RNG.normal(size=n) * 10.0 ** RNG.integers(-3, 9, n)
    high = values.astype(np.float32)
    return np.stack([high, (values - high).astype(np.float32)], -1)


def test_merged_sums_are_exact_to_a_pair():
    pairs = drawn_pairs(300)
    exact = sum(Fraction(float(x)) for pair in pairs for x in pair)
    size = sum(abs(Fraction(float(x))) for pair in pairs for x in pair)
    merged = jh.Metrics.merge(state_of(pair) for pair in pairs)
    assert merged.state.dtype == np.float32
    assert merged.state.shape == (*np.shape(HEAD.metrics().state)[:1], 2)
    got = Fraction(float(merged.state[0, 0])) + Fraction(float(merged.state[0, 1]))
    assert abs(got - exact) < size / 2**46
    # Not by a wide margin: what float32 alone would leave.
    assert abs(Fraction(float(merged.state[0, 0])) - exact) > size / 2**46


def test_the_order_does_not_matter():
    parts = [state_of(pair) for pair in np.abs(drawn_pairs(200))]
    expected = total(jh.Metrics.merge(parts))
    for seed in range(5):
        shuffled = random.Random(seed).sample(parts, len(parts))
        left, right = jh.Metrics.merge(shuffled[: seed + 1]), jh.Metrics.merge(shuffled[seed + 1 :])
        np.testing.assert_allclose(total(jh.Metrics.merge(shuffled)), expected, rtol=1e-12)
        np.testing.assert_allclose(total(jh.Metrics.merge([right, left])), expected, rtol=1e-12)


def test_merge_is_addition():
    parts = [
        HEAD.measure(labels=RNG.normal(size=(8, 1)).astype(np.float32), logits=np.ones((8, 1), np.float32))
        for _ in range(3)
    ]
    added = functools.reduce(lambda a, b: a + b, parts, HEAD.metrics())
    devices.assert_close(jh.Metrics.merge(parts).compute(), added.compute())
    # Of sums and batches, of this machine's arrays and others'.
    devices.assert_close(
        jh.Metrics.merge([added, pickle.loads(pickle.dumps(added)), parts[0]]).compute(),
        (added + added + parts[0]).compute(),
    )
    assert type(jh.Metrics.merge(parts).state) is np.ndarray


def test_an_infinite_sum_stays_infinite():
    merged = jh.Metrics.merge([state_of([np.inf, 0.0]), state_of([1.0, 0.0])])
    assert np.isposinf(total(merged)).all()
    assert np.isnan(total(jh.Metrics.merge([state_of([np.nan]), state_of([1.0])]))).all()
    # Warnings are errors here.
    for values, test in (((2e38, 2e38), np.isposinf), ((np.inf, -np.inf), np.isnan)):
        parts = [state_of([value]) for value in values]
        assert test(total(jh.Metrics.merge(parts))).all()
        assert test(total(parts[0] + parts[1])).all()


def test_merge_refuses_what_does_not_add():
    one = HEAD.metrics()
    for nothing in ([], iter(())):
        with pytest.raises(ValueError, match="at least one Metrics"):
            jh.Metrics.merge(nothing)
    others: Any = [one, 1.0]
    with pytest.raises(ValueError, match=r"nothing else. Given \['Metrics', 'float'\]"):
        jh.Metrics.merge(others)
    alone: Any = one
    with pytest.raises(ValueError, match=r"a list, \[metrics\]"):
        jh.Metrics.merge(alone)
    with pytest.raises(ValueError, match="different heads"):
        jh.Metrics.merge([one, jh.RegressionHead(name="other").metrics()])
    with pytest.raises(ValueError, match="regularization"):
        jh.Metrics.merge([one, HEAD.metrics([])])
    with pytest.raises(ValueError, match=r"leading axes. Given \[\(\), \(3,\)\]"):
        jh.Metrics.merge([one, dataclasses.replace(one, state=np.stack([one.state] * 3))])
    with pytest.raises(ValueError, match="does not fit its head"):
        jh.Metrics.merge([one, dataclasses.replace(one, state=np.zeros((99, 2), np.float32))])
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda metrics: jh.Metrics.merge([metrics, metrics]))(one)


def test_leading_axes_are_kept():
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    zero = HEAD.metrics()
    states = [np.broadcast_to(x[:, None, None], (3, *np.shape(zero.state)[:1], 1)).copy() for x in values.T]
    for state in states:
        state[:, STAMPED] = 0
    merged = jh.Metrics.merge(dataclasses.replace(zero, state=state) for state in states)
    np.testing.assert_array_equal(total(merged), np.broadcast_to([[1], [5], [9]], total(merged).shape))
    labels, logits = np.arange(8, dtype=np.float32).reshape(2, 4, 1), np.zeros((4, 1), np.float32)
    measured = jax.jit(jax.vmap(lambda y: HEAD.measure(labels=y, logits=logits)))(labels)
    got = jh.Metrics.merge([measured, measured]).compute()
    np.testing.assert_allclose(got["label/mean"], [1.5, 5.5])


def test_regularization_losses_merge_to_their_mean():
    y = np.ones((2, 1), np.float32)
    parts = [HEAD.measure(labels=y, logits=y, regularization_losses=[loss]) for loss in (1.0, 2.0, 6.0)]
    assert jh.Metrics.merge(parts).compute()["regularization_loss"] == 3


def test_states_over_devices_merge():
    ones = np.ones((8, *np.shape(HEAD.metrics().state)), np.float32)
    ones[:, STAMPED] = 0
    sharded = jax.device_put(
        ones,
        jax.sharding.NamedSharding(devices.mesh_of(8), jax.sharding.PartitionSpec("d")),
    )
    metrics = dataclasses.replace(HEAD.metrics(), state=sharded)
    assert (total(jh.Metrics.merge([metrics, metrics])) == 4).all()


def test_pickles_hold_numpy_and_copies_what_was_there():
    metrics = HEAD.measure(
        labels=np.ones((2, 1), np.float32), logits=np.zeros((2, 1), np.float32), regularization_losses=[0.5]
    )
    assert isinstance(metrics.state, jax.Array)
    sent = pickle.loads(pickle.dumps(metrics))
    assert type(sent.state) is np.ndarray
    assert sent.head == metrics.head
    assert sent.regularized
    np.testing.assert_array_equal(sent.state, metrics.state)
    again = pickle.loads(pickle.dumps(sent))
    np.testing.assert_array_equal(again.state, metrics.state)
    assert copy.copy(metrics).state is metrics.state
    deep = copy.deepcopy(metrics)
    assert isinstance(deep.state, jax.Array)
    assert deep.state is not metrics.state
    own = copy.deepcopy(sent)
    own.state[:] = 0
    np.testing.assert_array_equal(sent.state, metrics.state)
    # What was unpickled goes on: by addition, on a device; in a compiled step; as a tree.
    assert (sent + metrics).compute()["average_loss"] == 1
    assert jax.jit(lambda m: m + m)(sent).compute()["average_loss"] == 1
    assert jax.tree.structure(sent) == jax.tree.structure(metrics)


def batch_of(n: int) -> dict[str, Any]:
    return {"features": {"x": np.arange(n, dtype=np.float32)[:, None]}, "labels": np.zeros(n, np.int32)}


def test_lockstep_in_one_process():
    got = list(lockstep((batch_of(n) for n in (4, 1)), 4))
    assert [batch["where"].tolist() for batch in got] == [[True] * 4, [True, False, False, False]]
    assert [batch["features"]["x"].ravel().tolist() for batch in got] == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert list(lockstep([], 4)) == []
    assert list(lockstep([], 4, like=batch_of(2))) == []
    with pytest.raises(ValueError, match=r"size=4\. Given 5 rows"):
        list(lockstep([batch_of(5)], 4))

    def breaking():
        yield batch_of(2)
        raise OSError("no such shard")

    batches = lockstep(breaking(), 4)
    next(batches)
    with pytest.raises(OSError, match="no such shard"):
        next(batches)


def test_shard_batch_in_one_process():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    batch = shard_batch(batch_of(8), mesh)
    assert batch["labels"].addressable_shards[0].data.shape == (2,)
    assert shard_batch(batch_of(8), mesh, "model")["labels"].addressable_shards[0].data.shape == (4,)
    both = shard_batch(batch_of(8), mesh, ("data", "model"))
    assert both["features"]["x"].addressable_shards[0].data.shape == (1, 1)
    np.testing.assert_array_equal(both["features"]["x"], batch_of(8)["features"]["x"])
    names: Any
    for names in ("rows", 0, (), ("data", "data"), ("data", "rows")):
        with pytest.raises(ValueError, match=r"axes of the mesh.*Given .*expected some of \('data', 'model'\)"):
            shard_batch(batch_of(8), mesh, names)
    with pytest.raises(ValueError, match=r"4 devices.*Given 6 rows.*pad_batch"):
        shard_batch({"labels": np.zeros(6)}, mesh)
    with pytest.raises(ValueError, match=r"8 devices.*Given 4 rows"):
        shard_batch(batch_of(4), mesh, ("data", "model"))
    with pytest.raises(ValueError, match=r"same number of rows.*'weights'.*\(\)"):
        shard_batch({"weights": np.float32(1)}, mesh)
    with pytest.raises(ValueError, match=r"same number of rows.*\(8,\).*\(16,\)"):
        shard_batch({"labels": np.zeros(8), "weights": np.zeros(16)}, mesh)
    not_a_mesh: Any = None
    with pytest.raises(ValueError, match=r"must be a jax\.sharding\.Mesh"):
        shard_batch(batch_of(8), not_a_mesh)
    # Lists and tables as pad_batch takes them.
    placed = shard_batch({"features": pd.DataFrame({"x": range(8)}), "labels": [0] * 8}, mesh)
    assert placed["features"]["x"].shape == placed["labels"].shape == (8,)


def test_lockstep_takes_none_for_no_end():
    bad: Any = [batch_of(2), None, batch_of(2)]
    with pytest.raises(ValueError, match="Given NoneType"):
        list(lockstep(bad, 3))


@pytest.mark.slow
def test_the_example_goes_on_and_gets_the_same(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(EXAMPLES / "two_processes.py"), "--epochs", "2", "--out", str(out)]
    environment = {**os.environ, **programs.environment()}
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=2 * SECONDS, env=environment
    )
    assert run.returncode == 0, run.stderr[-4000:]
    results = json.loads((out / "metrics.json").read_text())
    # 15 batches in an epoch, of which one process has 7 with rows; a checkpoint after every 5; the epoch is read anew.
    assert results["batches read"] == {"two": 30, "stopped after": 22, "resumed": 15}
    assert "going on after epoch 1, batch 5" in run.stdout
    one, two, resumed, merged = results["test"].values()
    assert two == resumed
    for other in (two, merged):
        assert other == pytest.approx(one, rel=1e-6)
    assert 0.3 < one["accuracy"] < 0.95
    assert 0.3 < one["average_loss"] < 2.2
    differences = results["differences"]
    assert 0 < differences["parameters, two and one process"] < 1e-6
    assert differences["parameters, process 0 and 1"] == differences["parameters, resumed and whole"] == 0
