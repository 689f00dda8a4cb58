"""What a training step does on request: norms, skipped steps, scales of the loss; and what it costs without."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from benchmarks.report import cost
from benchmarks.train_step import by_hand
from devices import P, mesh_of

import jaxheads as jh
from jaxheads.engine.optimizing import find_learning_rate, global_norm

KEY, N, D = jax.random.key(0), 16, 3
HEAD = jh.MultiHead(
    [jh.BinaryClassHead(name="late"), jh.RegressionHead(name="minutes")], weighting="uncertainty", head_weights=[1, 0.5]
)
# Some of optax's own arithmetic mixes dtypes.
mixed_dtypes = functools.partial(jax.numpy_dtype_promotion, "standard")


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def schedule(count):
    return 0.5 / (jnp.asarray(count, jnp.float32) + 1)


INJECTED = optax.inject_hyperparams(optax.sgd)(schedule, momentum=0.5)


def network(params, features):
    return features @ params["w"]


@functools.cache
def batch_of() -> dict[str, Any]:
    """A batch of which the second device of four has no row that exists; one of these rows has a NaN as its label."""
    rng = np.random.default_rng(0)
    labels = {"late": rng.integers(0, 2, N), "minutes": rng.normal(size=N).astype(np.float32)}
    where = rng.random(N) < 0.7
    where[4:8] = False
    labels["minutes"][5] = np.nan
    return {
        "features": rng.normal(size=(N, D)).astype(np.float32),
        "labels": labels,
        "where": {"late": where, "minutes": where},
    }


def first_state(optimizer: Any = INJECTED, **given: Any) -> jh.TrainState:
    params = {"w": np.linspace(-1, 1, D * 2, dtype=np.float32).reshape(D, 2)}
    return jh.TrainState.create(params=params, optimizer=optimizer, head=HEAD, key=KEY, **given)


def gradients(w: np.ndarray, s: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The loss and both gradients, in float64: `exp(-s) * (binary, squares / 2) + s / 2`, summed."""
    batch = batch_of()
    there = batch["where"]["late"]
    x, y, t = (np.asarray(a, np.float64)[there] for a in (batch["features"], *batch["labels"].values()))
    z, n = x @ w, there.sum()
    binary = (np.logaddexp(0, z[:, 0]) - y * z[:, 0]).mean()
    squares = ((z[:, 1] - t) ** 2).mean()
    errors = np.stack([1 / (1 + np.exp(-z[:, 0])) - y, z[:, 1] - t], 1) * np.exp(-s) / n
    both = np.exp(-s) * [binary, squares / 2]
    return (both + s / 2).sum(), x.T @ errors, 0.5 - both


def norm(*arrays: np.ndarray) -> float:
    return np.sqrt(sum((x**2).sum() for x in arrays))


def compiled(step: Any, way: str, devices: int = 4) -> Any:
    """A step as users run it, `(state, batch) -> (state, out)`; of `pmap`, the values of all devices must be equal."""
    if way == "jit":
        return jax.jit(step)
    if way == "pmap":
        mapped = jax.pmap(step, "d", in_axes=(None, 0), devices=jax.devices()[:devices])

        def call(state, batch):
            cut = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
            state, out = mapped(state, cut)
            key, whole = state.key[0], jax.device_get((dataclasses.replace(state, key=None), out))
            for leaf in jax.tree.leaves(whole):
                np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
            state, out = jax.tree.map(lambda x: x[0], whole)
            return dataclasses.replace(state, key=key), out

        return call
    specs = {"in_specs": (P(), P("d")), "out_specs": P()}
    return jax.jit(jax.shard_map(step, mesh=mesh_of(devices, "auto"), check_vma=way == "shard_map", **specs))


@pytest.mark.parametrize(
    ("way", "micro_batches"), [("shard_map", 2), slow("jit", 2), slow("pmap", 1), slow("unchecked", 1)]
)
def test_norms_are_those_of_the_whole_batch(way, micro_batches):
    given: dict[str, Any] = {"axis_name": None if way == "jit" else "d", "micro_batches": micro_batches}
    step = compiled(jh.make_train_step(HEAD, network, INJECTED, with_norms=True, with_metrics=False, **given), way)
    state = first_state()
    w, s = (np.asarray(x, np.float64) for x in (state.params["w"], state.head_params["log_variances"]))
    moved: Any = (np.zeros_like(w), np.zeros_like(s))
    for i in range(2):
        loss, *grads = gradients(w, s)
        moved = [0.5 * m + g for m, g in zip(moved, grads, strict=True)]
        updates = [-0.5 / (i + 1) * m for m in moved]
        w, s = w + updates[0], s + updates[1]
        state, out = step(state, batch_of())
        expected = loss, norm(*grads), norm(w, s), norm(*updates), 0.5 / (i + 1)
        found = out.loss, out.grad_norm, out.param_norm, out.update_norm, out.learning_rate
        np.testing.assert_allclose(found, expected, rtol=2e-5)
        assert {x.dtype for x in found} == {np.dtype(np.float32)}


def test_norms_of_parameters_that_are_spread_over_devices():
    head = jh.RegressionHead()

    def gathering(params, features):
        return features @ jax.lax.all_gather(params["w"], "d", tiled=True)

    w, x = np.array([[1.0], [2.0], [3.0], [4.0]], np.float32), np.eye(4, dtype=np.float32)
    optimizer = optax.sgd(0.5)
    state = jh.TrainState.create(params={"w": w}, optimizer=optimizer, head=head, key=KEY)
    spread = jax.tree.map(lambda leaf: P("d") if jnp.shape(leaf) == (4, 1) else P(), state)
    step = jh.make_train_step(head, gathering, optimizer, axis_name="d", with_norms=True, with_metrics=False)
    mapped = jax.shard_map(
        step,
        mesh=mesh_of(2, "auto"),
        in_specs=(spread, {"features": P("d"), "labels": P("d")}),
        out_specs=(spread, P()),
    )
    _, out = jax.jit(mapped)(state, {"features": x, "labels": np.zeros(4, np.float32)})
    # The mean of w^2: a gradient of w / 2, an update of -w / 4.
    np.testing.assert_allclose([out.grad_norm, out.param_norm, out.update_norm], norm(w) * np.array([0.5, 0.75, 0.25]))
    assert out.learning_rate is None


@pytest.mark.parametrize(
    ("optimizer", "is_found"),
    [
        (optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.adam)(0.25)), True),
        (optax.MultiSteps(INJECTED, 2), True),
        (optax.adam(schedule), False),
        (optax.partition({"a": INJECTED, "b": INJECTED}, {"x": "a", "y": "b"}), False),
    ],
)
def test_one_learning_rate_is_found_or_none(optimizer, is_found):
    params = {"x": np.ones(1, np.float32), "y": np.ones(1, np.float32)}
    found = jax.eval_shape(lambda params: find_learning_rate(optimizer.init(params)), params)
    assert (found is not None) == is_found


def test_norms_of_narrow_numbers_are_summed_in_float32():
    """In bfloat16, 10,000 squares of 1 would stop at 256; in float16, the square of 300 is infinite."""
    ones, large = jnp.ones(10_000, jnp.bfloat16), jnp.full(4, 300, jnp.float16)
    np.testing.assert_allclose(jax.jit(global_norm)({"a": ones, "b": large}), np.sqrt(10_000 + 4 * 9e4), rtol=1e-6)


@pytest.mark.all_passes
def test_what_is_not_asked_for_costs_nothing():
    head, optimizer = jh.RegressionHead(), optax.adam(0.1)

    def linear(params, features):
        return features["x"] @ params["w"]

    params = {"w": np.zeros((D, 1), np.float32)}
    state = jh.TrainState.create(params=params, optimizer=optimizer, head=head, key=KEY)
    batch = {"features": {"x": np.zeros((64, D), np.float32)}, "labels": np.zeros(64, np.float32)}
    bare = state.params, state.head_params, state.opt_state, state.key, state.step, batch
    with mixed_dtypes():
        made = jax.jit(jh.make_train_step(head, linear, optimizer)).lower(state, batch).compile()
        hand = jax.jit(by_hand(head, linear, optimizer)).lower(*bare).compile()
    assert cost(made).flops == cost(hand).flops > 0
    assert cost(made).accessed == cost(hand).accessed > 0


def spoiled(kind: str) -> dict[str, Any]:
    """The batch with one bad value: in the first row that exists of the third device and of the second micro-batch."""
    batch = batch_of()
    row = next(i for i in range(8, 12) if batch["where"]["late"][i] and i % 2)
    x = batch["features"].copy()
    if kind == "features":
        x[row] = np.inf
        return {**batch, "features": x}
    return {**batch, "labels": {**batch["labels"], "late": np.where(np.arange(N) == row, 7, batch["labels"]["late"])}}


@pytest.mark.parametrize(
    ("way", "micro_batches"), [("pmap", 2), slow("jit", 2), slow("shard_map", 1), slow("unchecked", 2)]
)
def test_a_step_that_is_not_finite_is_skipped(way, micro_batches):
    """As if the batch had never been, on all devices; but a step was taken, as with `optax.apply_if_finite`."""
    optimizer = optax.sgd(0.1, momentum=0.5)
    given: dict[str, Any] = {"axis_name": None if way == "jit" else "d", "micro_batches": micro_batches}
    made = jh.make_train_step(HEAD, network, optimizer, skip_nonfinite=True, with_norms=True, **given)
    step = compiled(made, way)
    state, wrapped = first_state(optimizer, count_skipped=True), optax.apply_if_finite(optimizer, 9)
    metrics, expected = [], jax.device_get((state.trainable, wrapped.init(state.trainable)))

    @jax.jit
    def update(grads, opt_state, trainable):
        updates, opt_state = wrapped.update(grads, opt_state)
        return optax.apply_updates(trainable, updates), opt_state

    for kind in ("", "features", "labels", ""):
        state, out = step(state, spoiled(kind) if kind else batch_of())
        trainable, opt_state = expected
        w, s = (np.asarray(x) for x in (trainable["params"]["w"], trainable["head"]["log_variances"]))
        _, *grads = gradients(w.astype(np.float64), s.astype(np.float64))
        w_grad, s_grad = (g.astype(np.float32) * np.float32(np.nan if kind else 1) for g in grads)
        expected = update({"params": {"w": w_grad}, "head": {"log_variances": s_grad}}, opt_state, trainable)
        opt_state = expected[1]
        chex.assert_trees_all_close((state.trainable, state.opt_state), (expected[0], opt_state.inner_state), rtol=2e-5)
        assert bool(out.skipped) is bool(kind)
        assert np.isfinite([out.loss, out.grad_norm]).all() == (not kind)
        assert (out.update_norm == 0) == bool(kind)
        metrics.append(jax.device_get(out.metrics))
    assert (state.step, state.skipped, opt_state.total_notfinite) == (4, 2, 2)
    with pytest.warns(jh.BadInputWarning, match="1 "):  # the illegal label is not forgotten
        values = jh.Metrics.merge(metrics).compute()
    assert np.isfinite(values["average_loss/late"])
    np.testing.assert_allclose(out.loss, gradients(w.astype(np.float64), s.astype(np.float64))[0], rtol=2e-5)


class CountingHead(jh.Head):
    """It counts batches."""

    batches: jax.Array = jh.running(lambda head: jnp.zeros(1))
    logits_dimension = 1
    coupling = "row"

    def losses(self, labels, logits):
        return (labels - logits) ** 2

    def advance(self, labels, logits, rows):
        return {"batches": self.batches + 1}


def test_the_states_of_model_and_head_stay_too():
    def counting(params, features, *, model_state):
        return features @ params["w"], {"sum": model_state["sum"] + features.sum(0), "key": model_state["key"]}

    head, optimizer = CountingHead(), optax.sgd(0.1)
    made = jh.make_train_step(head, counting, optimizer, skip_nonfinite=True, with_metrics=False)
    step: Any = jax.jit(made, donate_argnums=0)
    state = jh.TrainState.create(
        params={"w": np.ones((D, 1), np.float32)},
        optimizer=optimizer,
        head=head,
        key=KEY,
        model_state={"sum": np.zeros(D, np.float32), "key": jax.random.key(3)},
    )
    good = {"features": np.ones((4, D), np.float32), "labels": np.zeros(4, np.float32)}
    # A NaN in a row that is hidden is no reason, if the network does not spread it.
    hidden = {**good, "labels": np.array([np.nan, 0, 0, 0], np.float32), "where": np.arange(4) > 0}
    good["where"] = np.ones(4, bool)
    for batch, expected in ((good, 1), ({**good, "features": good["features"] * np.nan}, 1), (hidden, 2)):
        state, _ = step(state, batch)
        np.testing.assert_array_equal(state.head_state["batches"], [expected])
        np.testing.assert_array_equal(state.model_state["sum"], np.full(D, 4 * expected))
    assert state.step == 3
    assert state.skipped is None
    assert step._cache_size() == 1


def test_devices_agree_where_parameters_are_spread():
    """The loss is finite, and one device alone has a gradient that is not: of a square root at 0."""
    w, batch = np.array([[0.0], [1.0]], np.float32), {"features": np.eye(2, dtype=np.float32), "labels": np.ones(2)}

    def root(params, features):
        return features @ jnp.sqrt(jax.lax.all_gather(params["w"], "d", tiled=True))

    head, optimizer = jh.RegressionHead(), optax.sgd(0.5)
    state = jh.TrainState.create(params={"w": w}, optimizer=optimizer, head=head, key=KEY)
    spread = jax.tree.map(lambda leaf: P("d") if jnp.shape(leaf) == (2, 1) else P(), state)
    step = jh.make_train_step(head, root, optimizer, axis_name="d", skip_nonfinite=True, with_metrics=False)
    mapped = jax.shard_map(step, mesh=mesh_of(2, "auto"), in_specs=(spread, P("d")), out_specs=(spread, P()))
    for labels, skipped in (([2, 2], True), ([0, 2], False)):
        state = dataclasses.replace(state, params={"w": w if skipped else w + 1})
        after, out = jax.jit(mapped)(state, {**batch, "labels": np.array(labels, np.float32)})
        assert np.isfinite(out.loss)
        assert out.skipped == skipped
        assert (np.asarray(after.params["w"]) == np.asarray(state.params["w"])).tolist() == [[skipped]] * 2


@pytest.mark.parametrize("name", ["backtracking", slow("lbfgs")])
def test_a_line_search_is_skipped(name):
    searches: dict[str, Any] = {
        "lbfgs": optax.lbfgs(),
        "backtracking": optax.chain(
            optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=5, store_grad=True)
        ),
    }
    optimizer = searches[name]
    with mixed_dtypes():
        made = jh.make_train_step(HEAD, network, optimizer, skip_nonfinite=True, with_metrics=False)
        step, state = jax.jit(made), first_state(optimizer)
        state, first = step(state, batch_of())
        after, out = step(state, spoiled("features"))
        chex.assert_trees_all_equal((after.trainable, after.opt_state), (state.trainable, state.opt_state))
        assert out.skipped
        _, second = step(after, batch_of())
    assert second.loss < first.loss


# Intermediate values in float16: gradients of 1e-9 and less are 0 there.
FAINT = 2.0**-30


def faint(params, features):
    return (features.astype(jnp.float16) @ params["w"].astype(jnp.float16)).astype(jnp.float32) * FAINT


def faint_step(head: jh.Head, **given: Any) -> Any:
    return jax.jit(jh.make_train_step(head, faint, optax.sgd(2.0**30), with_metrics=False, **given))


def faint_state(head: jh.Head, **given: Any) -> jh.TrainState:
    params = {"w": np.ones((D, 1), np.float32)}
    return jh.TrainState.create(params=params, optimizer=optax.sgd(2.0**30), head=head, key=KEY, **given)


FAINT_BATCH = {"features": np.eye(D, dtype=np.float32), "labels": np.array([1, 2, 4], np.float32)}
# Of the mean of (FAINT w - y)^2.
FAINT_GRADIENT = -2 * FAINT * FAINT_BATCH["labels"][:, None] / D


@pytest.mark.parametrize("micro_batches", [3, slow(1)])
def test_a_scale_of_the_loss_keeps_small_gradients(micro_batches):
    head, state = jh.RegressionHead(), faint_state(jh.RegressionHead())
    for loss_scale, gradient in ((None, 0 * FAINT_GRADIENT), (2.0**30, FAINT_GRADIENT)):
        step = faint_step(head, loss_scale=loss_scale, with_norms=True, micro_batches=micro_batches)
        after, out = step(state, FAINT_BATCH)
        np.testing.assert_allclose(after.params["w"], 1 - 2.0**30 * gradient, rtol=1e-3)
        np.testing.assert_allclose(out.grad_norm, norm(gradient), rtol=1e-3)
        np.testing.assert_allclose(out.loss, 7, rtol=1e-6)


def test_a_dynamic_scale_falls_and_rises():
    """By the rule written out, and as that of jmp; both in the same step."""
    import jmp

    head, first = jh.RegressionHead(), 2.0**62
    scales = [
        jh.training.DynamicLossScale(first, period=2, factor=16),
        jmp.DynamicLossScale(jnp.float32(first), period=2, factor=16),
    ]
    for scale in scales:
        step, state = faint_step(head), faint_state(head, loss_scale=scale)
        value, good, found, expected, skipped, w = first, 0, [], [], 0, np.ones((D, 1))
        for _ in range(9):
            before = state
            with mixed_dtypes():  # jmp's arithmetic mixes them
                state, out = step(state, FAINT_BATCH)
            # The largest intermediate gradient is the scale times 8 / 3 times FAINT, and 65504 the largest number.
            finite = value * 8 / 3 * FAINT < 65504
            assert bool(out.skipped) is not finite
            if finite:
                value, good = (value * 16, 0) if good == 1 else (value, good + 1)
                w = w - 2.0**30 * FAINT_GRADIENT
            else:
                value, good, skipped = value / 16, 0, skipped + 1
                chex.assert_trees_all_equal(before.params, state.params)
            scale: Any = state.loss_scale
            found.append(float(scale.value if hasattr(scale, "value") else scale.loss_scale))
            expected.append(value)
        assert found == expected
        assert skipped == state.skipped > 3
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-3)
        assert len({*expected}) > 3


def test_a_scale_stays_within_bounds():
    @jax.jit
    def bounds():
        small = jh.training.DynamicLossScale(1.5, smallest=1.0)
        large = jh.training.DynamicLossScale(2.0**127, period=1)
        return small.adjust(False).adjust(False).value, large.adjust(True).value

    assert bounds() == (1, 2.0**127)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: jh.make_train_step(HEAD, network, INJECTED, loss_scale=0), "loss_scale must be a positive(.|\n)*0"),
        (lambda: jh.make_train_step(HEAD, network, INJECTED, loss_scale=1e39), r"loss_scale must be(.|\n)*1e\+39"),
        (
            lambda: jh.make_train_step(HEAD, network, INJECTED, loss_scale=jh.training.DynamicLossScale()),  # pyright: ignore[reportArgumentType]
            r"fixed number(.|\n)*Given a DynamicLossScale(.|\n)*TrainState.create\(loss_scale=",
        ),
        (lambda: jh.make_train_step(HEAD, network, INJECTED, skip_nonfinite=2), "skip_nonfinite must be True or False"),  # pyright: ignore[reportArgumentType]
        (lambda: jh.training.DynamicLossScale(0.5), "value must be at least smallest=1.0"),
        (lambda: jh.training.DynamicLossScale(good_steps=-5), "good_steps must be an integer"),
        (lambda: jh.training.DynamicLossScale(good_steps=2.5), "good_steps must be an integer"),
        (lambda: first_state(loss_scale=8.0), r"adapts(.|\n)*Given 8.0(.|\n)*make_train_step\(loss_scale="),
        (lambda: first_state(count_skipped=1), "count_skipped must be True or False"),
        (lambda: jh.training.DynamicLossScale(-1.0), "value must be a positive number(.|\n)*Given -1"),
        (lambda: jh.training.DynamicLossScale(factor=1.0), "factor must be a number above 1"),
        (lambda: jh.training.DynamicLossScale(period=0), "period must be an integer of at least 1"),
    ],
)
def test_options_that_are_none_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("state", "given", "match"),
    [
        ({"count_skipped": True}, {}, "counts skipped steps(.|\n)*skip_nonfinite=True"),
        (
            {"loss_scale": jh.training.DynamicLossScale()},
            {"loss_scale": 8.0},
            "two scales: loss_scale=8.0(.|\n)*the DynamicLossScale of the TrainState",
        ),
    ],
)
def test_a_state_of_another_step_is_refused(state, given, match):
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(jh.make_train_step(HEAD, network, INJECTED, **given), first_state(**state), batch_of())


def test_parameters_and_model_state_that_overflow_are_skipped_too():
    def apply(params, features, model_state):
        return features @ params["w"], {"square": model_state["square"] * 1e30, "key": jax.random.key(3)}

    step = jax.jit(jh.make_train_step(jh.RegressionHead(), apply, optax.sgd(1e38), skip_nonfinite=True))
    batch = {"features": np.full((2, 1), 10.0, np.float32), "labels": np.ones(2, np.float32)}
    for first, labels in ((1.0, 1.0), (1e20, 0.0)):
        model_state = {"square": jnp.float32(first), "key": jax.random.key(2)}
        state = jh.TrainState.create(
            params={"w": np.zeros((1, 1), np.float32)},
            model_state=model_state,
            optimizer=optax.sgd(1e38),
            head=jh.RegressionHead(),
            key=jax.random.key(0),
        )
        after, out = step(state, {**batch, "labels": np.full(2, labels, np.float32)})
        assert out.skipped
        assert np.isfinite(out.loss)
        np.testing.assert_array_equal(after.params["w"], 0)
        np.testing.assert_array_equal(after.model_state["square"], np.float32(first))
