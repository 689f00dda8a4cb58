"""Law 5 on every head: devices do not matter, however the work is spread over them, even unevenly."""

import dataclasses
import functools
import operator
from typing import Any

import chex
import jax
import numpy as np
import pytest
from devices import (
    AXES,
    KEY,
    OPTIMIZERS,
    STEPS,
    WAYS,
    N,
    P,
    alone,
    assert_close,
    assert_same,
    batches_of,
    by_name,
    count,
    draw,
    entry_of,
    first_params,
    first_state,
    mesh_of,
    model,
    network,
    optimizer,
    reduced,
    start,
)
from jax.sharding import AxisType, NamedSharding
from laws import engine
from zoo import ENGINE, ZOO, bounds_of, marked

import jaxheads as jh
from jaxheads.metrics.reading import STAMP
from jaxheads.numerics import duals

each = pytest.mark.parametrize("entry", marked(ZOO))
# The others are slow: what a head adds to the engine here are the shapes of what it learns and counts. A head that
# learns and counts is inside "nested"; "survival" has a dict of labels and a count of its own.
FIRST = ("nested", "survival")
engine_first = pytest.mark.parametrize("entry", marked(ZOO, quick=FIRST))
few = pytest.mark.parametrize(
    "entry", marked((e for e in ZOO if e.name in ("binary", "ordinal", "running_prior")), quick=("ordinal",))
)
each_axes = pytest.mark.parametrize("axes", AXES)
each_vma = pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
each_way = pytest.mark.parametrize("way", WAYS)


def training_by_hand(entry):
    """Losses, parameters, optimizer state and running state after three steps: float64, gradients by differences."""
    params = {**first_params(entry), "head": entry.head.init(jax.random.split(jax.random.key(0))[0])}
    leaves, structure = jax.tree.flatten(jax.tree.map(lambda x: np.asarray(x, np.float64), params))
    is_dual = jax.tree.leaves(jax.tree_util.tree_map_with_path(lambda path, _: duals.is_multiplier(path), params))
    is_adam = [kind == "adam" for kind in jax.tree.leaves(by_name(entry, params))]
    moments, state, losses = [(np.zeros_like(x), np.zeros_like(x)) for x in leaves], entry.head.init_state(), []
    for step, batch in enumerate(batches_of(entry), start=1):
        rows = (batch["weights"], batch["where"])

        def loss(leaves, batch=batch, rows=rows, state=state):
            tree = structure.unflatten(leaves)
            logits = network(tree, batch["features"].astype(np.float64))
            return entry.expected_loss(batch["labels"], logits, *rows, merged(tree["head"], state))

        losses.append(loss(leaves))
        gradient = [np.zeros_like(x) for x in leaves]
        for k, leaf in enumerate(leaves):
            for i in np.ndindex(leaf.shape):
                nudge = np.zeros_like(leaf)
                nudge[i] = 1e-5
                ends = [loss([*leaves[:k], leaf + sign * nudge, *leaves[k + 1 :]]) for sign in (1, -1)]
                gradient[k][i] = (ends[0] - ends[1]) / 2e-5
        for k, g in enumerate(gradient):
            first, second = moments[k]
            # Multipliers ascend, each by the gradient of its own Lagrangian.
            g = -g * g.size if is_dual[k] else g
            if is_adam[k]:
                first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
                leaves[k] = leaves[k] - 0.05 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-3)
            else:
                first = 0.9 * first + g
                leaves[k] = leaves[k] - 0.005 * first
                leaves[k] = np.maximum(leaves[k], 0) if is_dual[k] else leaves[k]
            moments[k] = first, second
        state = advanced(entry, state, batch)
    return losses, structure.unflatten(leaves), state


def merged(a: Any, b: Any) -> Any:
    return {k: merged(a.get(k, {}), b[k]) if isinstance(b.get(k), dict) else b.get(k, a.get(k)) for k in {*a, *b}}


def advanced(entry, state, batch):
    """What is counted, where a head of the zoo counts."""
    if not state:
        return state
    w = np.where(batch["where"], batch["weights"], 0).astype(np.float64)
    seen = entry.counted(batch["labels"], w)

    def counted(x):
        total = np.asarray(x, np.float64).sum(-1)
        total = total + seen.reshape(total.shape)
        return np.stack([total, np.zeros_like(total)], -1)

    return jax.tree.map(counted, state)


@engine_first
def test_one_device_is_the_oracle(entry):
    """What the other tests here compare with."""
    state, losses, metrics = alone(entry.name)
    expected, params, running = training_by_hand(entry)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    got = {**state.params, "head": state.head_params}
    assert jax.tree.structure(got) == jax.tree.structure(params)
    chex.assert_trees_all_close(got, params, rtol=2e-5, atol=5e-6)
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64).sum(-1), (state.head_state, running))
    chex.assert_trees_all_close(*sums, rtol=1e-6)
    assert state.step == STEPS
    # The metrics of the first step, before anything was trained; of all three there is no closed form here.
    batch, constants = batches_of(entry)[0], entry.params()
    logits = network(first_params(entry), batch["features"])
    measured = entry.head.measure(
        batch["labels"], logits, weights=batch["weights"], where=batch["where"], params=constants
    )
    exact = entry.expected_metrics(batch["labels"], logits, batch["weights"], batch["where"], constants)
    values = measured.compute(bounds=True)
    for key, value in exact.items():
        lower, upper = bounds_of(values, key) or (0.0, 1e-6)
        np.testing.assert_allclose(values[key], value, rtol=3e-6, atol=2e-6 + upper - lower)
    assert metrics.compute().keys() == measured.compute().keys()


# The ways differ in where rows lie, not in the head. These heads go every way: a head of rows, one that learns and
# counts, several in one, pairs, groups, an own count, a wrapper, and parameters that are broadcast to the rows. The
# others take the mesh that `jax.make_mesh` makes. The quick tests have that mesh for a few heads, and the two mapped
# ways for the head that learns and counts.
EVERY_WAY = ("binary", "nested", "multi_head", "survival", "sequential", "ordinal", "roc_auc", "error_rate")


def is_slow(entry, way):
    if way == "jit_explicit":
        return entry.name not in FIRST
    return (entry.name, way) not in (("nested", "shard_map"), ("nested", "pmap"))


def placed(ways, few):
    """Entries and ways: every way of the heads in `EVERY_WAY`, a few of the others."""
    for entry in ZOO:
        for way in ways if entry.name in EVERY_WAY else few:
            yield entry, way


@pytest.mark.parametrize(
    ("entry", "way"),
    [
        pytest.param(entry, way, id=f"{way}-{entry.name}", marks=[pytest.mark.slow] if is_slow(entry, way) else [])
        for entry, way in placed(WAYS, ("jit_explicit",))
    ],
)
def test_three_steps(entry, way):
    assert_same(WAYS[way](entry, 8), alone(entry.name))


# The head that learns and counts trains on every number of devices, in every number of parts, every way. The others of
# `EVERY_WAY` train on four devices in two parts, two ways each, in turns. How a batch is spread and parted is the
# engine's: further heads need not.
SPREADS = [(n, parts, way) for way in WAYS for n, parts in ((4, 2), (1, 1), (2, 1), (8, 2))]


def is_tried(entry, spread):
    if entry.name == "nested":
        return True
    turn = EVERY_WAY.index(entry.name) if entry.name in EVERY_WAY else 0
    return spread[:2] == (4, 2) and ([*WAYS].index(spread[2]) - turn) % len(WAYS) in (0, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "micro_batches", "way", "entry"),
    [
        pytest.param(*spread, entry, id="-".join(map(str, (*spread, entry.name))))
        for entry, spread in placed(SPREADS, ())
        if is_tried(entry, spread)
    ],
)
def test_three_steps_on_fewer_devices_and_in_micro_batches(entry, way, n, micro_batches):
    if entry.whole and micro_batches > 1:
        with pytest.raises(ValueError, match="pairs across the parts of a batch would be lost"):
            WAYS[way](entry, n, micro_batches=micro_batches)
        return
    assert_same(WAYS[way](entry, n, micro_batches=micro_batches), alone(entry.name))


SPREAD = {
    "multi_class": (jh.MultiClassHead(4), lambda rng: rng.integers(0, 4, (N, 1))),
    "multi_label": (jh.MultiLabelHead(4), lambda rng: rng.integers(0, 2, (N, 4))),
    "regression": (jh.RegressionHead(4, loss_reduction="mean"), lambda rng: rng.normal(size=(N, 4)).astype(np.float32)),
}


@pytest.mark.parametrize(
    ("name", "axes", "micro_batches"),
    [
        pytest.param(
            name, axes, n, marks=[] if (name, axes, n) == ("multi_class", "explicit", 1) else [pytest.mark.slow]
        )
        for name in SPREAD
        for axes in AXES
        for n in (1, 2)
    ],
)
def test_a_kernel_spread_over_classes(name, axes, micro_batches):
    """Rows over one axis of the mesh, classes over the other; by jit, which needs no axis name."""
    head, labels = SPREAD[name]
    rng = np.random.default_rng(3)
    rows = [{**draw(entry_of("regression"), seed=seed), "labels": labels(rng)} for seed in range(1, 1 + STEPS)]
    batches = [{**batch, "features": rng.normal(size=(N, 3)).astype(np.float32)} for batch in rows]
    kernel = rng.normal(size=(3, 4)).astype(np.float32)
    adam = OPTIMIZERS["adam"]

    @jax.jit
    def first():
        return jh.TrainState.create(params=kernel, optimizer=adam, head=head, key=KEY)

    def train(micro_batches, put):
        step = jax.jit(
            jh.make_train_step(head, lambda kernel, x: x @ kernel, adam, micro_batches=micro_batches),
        )
        with jax.numpy_dtype_promotion("standard"):
            state, metrics, losses = first(), head.metrics(), []
            state = jax.tree.map(lambda x: put(x, P(None, "model") if x.shape == kernel.shape else P()), state)
            for batch in batches:
                given = {key: batch[key] for key in ("features", "labels", "weights", "where")}
                state, out = step(state, put(given, P("data")))
                metrics += out.metrics
                losses.append(out.loss)
        return (state.params, state.opt_state, losses, metrics.compute(bounds=True)), state.params.sharding

    expected, _ = train(1, lambda x, spec: x)
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AXES[axes],) * 2)
    got, sharding = train(micro_batches, lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)))
    assert_close(got, expected)
    assert sharding.spec == P(None, "model")  # the kernel was never gathered into the state


# Ids that are constants, as those of "error_rate", are reduced by themselves; of a column: test_group_constraints.py.
@pytest.mark.parametrize(
    ("axes", "entry"),
    [
        pytest.param(axes, *given.values, id=f"{axes}-{given.id}", marks=given.marks if axes == "explicit" else slow)
        for axes, slow in (("explicit", []), ("auto", pytest.mark.slow))
        for given in marked((entry for entry in ZOO if entry.name != "error_rate"), quick=("nested", "multi_head"))
        if axes == "explicit" or given.id in ENGINE
    ],
)
def test_an_update_is_one_all_reduce(entry, axes):
    """On rows enough to be cut in tiles, were they on one device: slicing a sharded batch would gather it."""
    head, params = entry.head, entry.params()
    batch = draw(entry, 40_016)

    @jax.jit
    def update(metrics, batch):
        rest = {"weights": batch["weights"], "where": batch["where"]}
        return head.update_metrics(
            metrics, None, batch["logits"], batch["labels"], "eval", [np.float32(0.5)], params=params, **rest
        )

    mesh = mesh_of(8, axes)
    metrics = jax.device_put(head.metrics([]), NamedSharding(mesh, P()))
    text = update.lower(metrics, jax.device_put(batch, NamedSharding(mesh, P("d")))).compile().as_text()
    assert count(text, "all-reduce") == 1
    for other in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert count(text, other) == 0


def elements_added_up(entry, step, mesh=None):
    """How many numbers cross eight devices in a step under `shard_map` with its check; how many are trained."""
    mesh = mesh_of(8, "auto") if mesh is None else mesh
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(mesh.axis_names)), out_specs=P())
    batch, state = draw(entry, 1024), jax.eval_shape(lambda: first_state(entry))
    batch["features"] = batch.pop("logits")
    with jax.numpy_dtype_promotion("standard"):  # some of optax's own arithmetic mixes dtypes
        added_up = sum(reduced(jax.jit(mapped).lower(state, batch).compile().as_text()))
    return added_up, sum(x.size for x in jax.tree.leaves(state.trainable))


@engine_first
def test_a_step_adds_gradients_up_once(entry):
    """In the shape of their parameters: `grad` adds up over devices where a formula broadcasts what rows share."""
    step = jh.make_train_step(entry.head, network, optimizer(entry), axis_name="d", with_metrics=False)
    added_up, parameters = elements_added_up(entry, step)
    running = sum(x.size for x in jax.tree.leaves(jax.eval_shape(entry.head.init_state)))
    assert parameters <= added_up <= parameters + 3 * len(entry.parts or [entry]) + running


def test_a_step_over_two_axes_adds_gradients_up_once():
    entry, mesh = entry_of("ordinal"), jax.make_mesh((2, 4), ("d", "e"), (AxisType.Auto,) * 2)
    step = jh.make_train_step(entry.head, network, optimizer(entry), axis_name=("d", "e"), with_metrics=False)
    added_up, parameters = elements_added_up(entry, step, mesh)
    # The three sums of the loss may cross one axis after the other.
    assert parameters <= added_up <= parameters + 2 * 3


@pytest.mark.parametrize("name", ["binary", "ordinal"])
def test_a_spec_adds_gradients_up_once(name):
    entry = entry_of(name)
    learned = bool(jax.eval_shape(entry.head.init, KEY))

    def step(state, batch):
        spec = entry.head.create_estimator_spec(
            batch["features"],
            "train",
            lambda v: network(v["params"] if learned else v, batch["features"]),
            batch["labels"],
            optimizer(entry),
            state.trainable,
            params=(lambda v: v["head"]) if learned else None,
            axis_name="d",
        )
        return spec.train_op.params, spec.loss

    added_up, parameters = elements_added_up(entry, step)
    assert parameters <= added_up <= parameters + 3


@pytest.mark.parametrize("entry", marked((e for e in ZOO if e.name in ("binary", "multi_class")), quick=("binary",)))
@pytest.mark.parametrize("axes", ["explicit", pytest.param("auto", marks=pytest.mark.slow)])
def test_eager_calls_on_sharded_arrays(entry, axes):
    """Without a jit of one's own, as in a notebook: on both kinds of mesh, the mesh set or not."""
    head, batch, params = entry.head, draw(entry), entry.params()

    def call(batch, times=1):
        rest = {"weights": batch["weights"], "where": batch["where"], "params": params}
        metrics = head.metrics()
        for _ in range(times):
            metrics = head.update_metrics(metrics, None, batch["logits"], batch["labels"], **rest)
        return metrics.compute(bounds=True)

    expected = call(batch)
    mesh = mesh_of(8, axes)
    placed = jax.device_put(batch, NamedSharding(mesh, P("d")))
    assert_close(call(placed), expected)
    with jax.set_mesh(mesh):
        assert_close(call(placed, times=2), expected)
    if axes == "explicit":
        loss = head.loss(**placed, params=params)
        np.testing.assert_allclose(loss, entry.expected_loss(**batch), rtol=2e-6)


# The groups of "error_rate" are made in its column, on no mesh.
CLOSED_OVER = [e for e in ZOO if e.name in {*ENGINE, "ordinal"} - {"error_rate"}]


@pytest.mark.parametrize("entry", marked(CLOSED_OVER, quick=("ordinal",)))
def test_a_compiled_function_may_close_over_sharded_data(entry):
    """As in a notebook: only the parameters are arguments. JAX's `full_like` forgets the layout of such a constant."""
    batch, params, mesh = draw(entry), jax.device_get(entry.params()), mesh_of(8)

    def run(data):
        def of(params):
            loss = jax.value_and_grad(lambda p: entry.head.loss(**data, params=p))(params)
            return loss, entry.head.measure(**data, params=params).state

        return jax.jit(of)

    expected = run(batch)(params)
    with jax.set_mesh(mesh):
        found = run(jax.device_put(batch, NamedSharding(mesh, P("d"))))(params)
    np.testing.assert_allclose(found[0][0], entry.expected_loss(**batch), rtol=2e-6)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=2e-5, atol=1e-5)


SOFTMAX = jh.MultiClassHead(8)


@jax.jit
def softmax_step(labels, logits, where):
    loss = jax.value_and_grad(lambda z: SOFTMAX.loss(labels, z, where=where))(logits)
    return loss, SOFTMAX.measure(labels, logits, where=where)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(P("a", "b"), id="both"),
        pytest.param(P(("a", "b")), id="rows", marks=pytest.mark.slow),
        pytest.param(P(None, "b"), id="classes", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("axes", ["explicit", pytest.param("auto", marks=pytest.mark.slow)])
def test_meshes_of_two_axes(spec, axes):
    """Rows over both axes, or rows over one and the classes over the other; logits multiplied or not."""
    entry = dataclasses.replace(next(entry for entry in ZOO if entry.name == "multi_class"), head=SOFTMAX)
    rng = np.random.default_rng(5)
    hidden, kernel = (rng.normal(size=size).astype(np.float32) for size in ((N, 4), (4, 8)))
    labels, where = rng.integers(0, 8, (N, 1)).astype(np.int32), rng.random((N, 1)) < 0.7
    exact = entry.expected_loss(labels, hidden.astype(np.float64) @ kernel, where=where)
    mesh = jax.make_mesh((2, 4), ("a", "b"), (AXES[axes],) * 2)

    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    rows, columns = P(spec[0]), P(None, *spec[1:])
    alone = hidden @ kernel, jh.LinearLogits(hidden, kernel)
    placed = put(alone[0], spec), jh.LinearLogits(put(hidden, rows), put(kernel, columns))
    for one, many in zip(alone, placed, strict=True):
        expected, measured = softmax_step(labels, one, where)
        got, metrics = softmax_step(put(labels, rows), many, put(where, rows))
        np.testing.assert_allclose(got[0], exact, rtol=2e-6)
        assert_close(got, expected)
        assert_close(metrics.compute(), measured.compute())


@each_vma
def test_axis_names_may_be_several(check_vma):
    entry = entry_of("binary")
    head, batch = entry.head, draw(entry)
    names = ("a", "b")

    def run(batch):
        rest = {"weights": batch["weights"], "where": batch["where"]}
        metrics = head.metrics().varying(names)
        for _ in range(2):
            metrics = head.update_metrics(metrics, None, batch["logits"], batch["labels"], **rest)
        return head.loss(batch["labels"], batch["logits"], axis_name=names, **rest), metrics.psum(names)

    mesh = jax.make_mesh((2, 4), names, (AxisType.Auto,) * 2)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=P(names), out_specs=P(), check_vma=check_vma)
    loss, metrics = jax.jit(mapped)(batch)
    np.testing.assert_allclose(loss, entry.expected_loss(**batch), rtol=2e-6)
    expected = head.measure(**batch).compute(bounds=True)
    assert_close(metrics.compute(bounds=True), expected)


@few
@each_vma
def test_scan_inside_shard_map(entry, check_vma):
    """Devices that hold their own share of every batch accumulate on their own and merge once at the end."""
    head, params = entry.head, entry.params()
    rng = np.random.default_rng(2)
    labels, logits = entry.labels(rng, (5, N)), entry.logits(rng, (5, N))
    where = rng.random((5, N, 1)) < 0.6
    mesh = mesh_of(8, "auto")

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P(None, "d"), out_specs=(P(), P(), P("d")), check_vma=check_vma
    )
    def evaluate(labels, logits, where):
        def update(metrics, batch):
            labels, logits, where = batch
            return head.update_metrics(metrics, None, logits, labels, where=where, params=params), None

        def update_and_merge(metrics, batch):
            labels, logits, where = batch
            return metrics + head.measure(labels, logits, where=where, params=params).psum("d"), None

        local, _ = jax.lax.scan(update, head.metrics().varying("d"), (labels, logits, where))
        merged, _ = jax.lax.scan(update_and_merge, head.metrics(), (labels, logits, where))
        return local.psum("d"), merged, jax.tree.map(lambda x: x[None], local)

    once, each_time, apart = evaluate(labels, logits, where)
    expected = head.measure(labels, logits, where=where, params=params)
    exact = entry.expected_metrics(labels, logits, where=where)
    apart = jax.device_get(apart)
    on_host = functools.reduce(operator.add, (jax.tree.map(lambda x, i=i: x[i], apart) for i in range(8)))
    for metrics in (once, each_time, on_host):
        values = metrics.compute(bounds=True)
        assert_close(values, expected.compute(bounds=True))
        np.testing.assert_allclose(values["average_loss"], exact["average_loss"], rtol=2e-6)
    assert all(value.shape == (8,) for value in apart.compute().values())


@pytest.mark.parametrize("way", ["vma", "no_vma", "pmap"])
@pytest.mark.parametrize("n", [pytest.param(2, marks=pytest.mark.slow), 5, pytest.param(8, marks=pytest.mark.slow)])
def test_psum_of_accumulated_states_keeps_the_pairs(way, n):
    """Sums of 2^31 and more with small parts beside them: a plain psum of the pairs would lose the small ones."""
    head = jh.BinaryClassHead(thresholds=(0.3,))
    slots = head.metrics().state.shape[0]
    rng = np.random.default_rng(3)
    large = (rng.integers(1, 2**20, (n, slots)) * 2.0**11).astype(np.float32)
    small = rng.integers(0, 64, (n, slots)).astype(np.float32)
    large[:, 1 : 1 + STAMP] = small[:, 1 : 1 + STAMP] = 0  # a stamp of no batches fits
    pairs = dataclasses.replace(head.metrics(), state=np.zeros((n, slots, 2), np.float32))
    for part in (large, small, small, small):
        pairs = pairs + dataclasses.replace(pairs, state=part[..., None])
    exact = (large.astype(np.float64) + 3.0 * small).sum(0)

    if way == "pmap":
        out = jax.pmap(lambda m: m.psum("d"), axis_name="d", devices=jax.devices()[:n])(pairs)
        states = np.asarray(out.state, np.float64)
        np.testing.assert_array_equal(states, states[:1].repeat(n, 0))
        total = states[0]
    else:
        merge = jax.shard_map(
            lambda m: jax.tree.map(lambda x: x[0], m).psum("d"),
            mesh=mesh_of(n, "auto"),
            in_specs=P("d"),
            out_specs=P(),
            check_vma=way == "vma",
        )
        compiled = jax.jit(merge).lower(pairs).compile()
        assert count(compiled.as_text(), "all-reduce") == 1
        total = np.asarray(jax.jit(merge)(pairs).state, np.float64)
    assert total.shape == (slots, 2)
    np.testing.assert_allclose(total.sum(-1), exact, rtol=1e-13)
    # The law's own bound: what float32 sums would have lost.
    assert np.abs(np.float32(exact) - exact).max() > 1


def gradient_of(loss, params, **options):
    return jax.grad(functools.partial(loss, **options))(params)


RECIPES = {
    "mean": lambda loss, params: jax.lax.pmean(gradient_of(loss, params, axis_name="d"), "d"),
    "mean of local means": lambda loss, params: jax.lax.pmean(gradient_of(loss, params), "d"),
    "sum": lambda loss, params: jax.lax.psum(gradient_of(loss, params, axis_name="d"), "d"),
    "sum of means": lambda loss, params: jax.lax.psum(RECIPES["mean"](loss, params), "d"),
}


@functools.cache
def bias_gradients():
    """The gradient of a bias on eight devices, as recipes combine it, over the right one: by recipe and way."""
    entry = entry_of("binary")
    batch, params = draw(entry), start(entry)

    def local(params, batch):
        def loss(params, **options):
            logits = model(params, batch["logits"])
            rest = {"weights": batch["weights"], "where": batch["where"]}
            return entry.head.loss(batch["labels"], logits, **rest, **options)

        return {name: recipe(loss, params)["bias"] for name, recipe in RECIPES.items()}

    split = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
    by_pmap = jax.pmap(local, "d", in_axes=(None, 0))(params, split)
    out = {"pmap": {name: np.asarray(value)[0] for name, value in by_pmap.items()}}
    for way, check_vma in (("shard_map", True), ("shard_map_no_vma", False)):
        mapped = jax.shard_map(
            local, mesh=mesh_of(8, "auto"), in_specs=(P(), P("d")), out_specs=P(), check_vma=check_vma
        )
        out[way] = jax.jit(mapped)(params, batch)

    def exact(bias):
        logits = model({**params, "bias": bias}, batch["logits"].astype(np.float64))
        return entry.expected_loss(batch["labels"], logits, batch["weights"], batch["where"])

    bias = params["bias"].astype(np.float64)
    expected = (exact(bias + 1e-5) - exact(bias - 1e-5)) / 2e-5
    return {name: {way: (np.asarray(got[name]) / expected).item() for way, got in out.items()} for name in RECIPES}


def test_the_recipe_is_right_in_every_way():
    expected = {"pmap": 1, "shard_map": 1, "shard_map_no_vma": 1}
    assert bias_gradients()["mean"] == pytest.approx(expected, rel=1e-5)


def test_the_mean_of_local_means_is_wrong():
    """It weighs rows by how few share their device; and `shard_map` with its check has added up already."""
    got = bias_gradients()["mean of local means"]
    assert abs(got["pmap"] - 1) > 0.05
    assert got["shard_map_no_vma"] == pytest.approx(got["pmap"], rel=1e-5)
    assert got["shard_map"] == pytest.approx(8 * got["pmap"], rel=1e-5)


@pytest.mark.parametrize("recipe", ["sum", "sum of means"])
def test_one_sum_more_is_wrong(recipe):
    """Of a loss that is over all devices already, `psum` gives gradients as many times too large as there are."""
    expected = {"pmap": 8, "shard_map": 8, "shard_map_no_vma": 8}
    assert bias_gradients()[recipe] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "entry",
    marked(
        (e for e in ZOO if e.illegal is not None and e.name in ENGINE),
        quick=("regression_3_exp", "nested", "sequential"),
    ),
)
def test_bad_input_is_seen_from_every_device(entry):
    """One illegal row on one device: the loss is NaN on all, and the metrics leave out and count that row."""
    batch = draw(entry)
    labels = batch["labels"].astype(np.float32) if entry.illegal in (-0.5, np.nan) else batch["labels"].copy()
    labels[0] = entry.illegal
    params = entry.params()

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh_of(8, "auto"), in_specs=P("d"), out_specs=P())
    def run(labels, logits, weights, where):
        rest = {"weights": weights, "where": where, "params": params}
        loss = entry.head.loss(labels, logits, axis_name="d", **rest)
        return loss, entry.head.measure(labels, logits, **rest).psum("d")

    loss, measured = run(labels, batch["logits"], batch["weights"], batch["where"])
    assert np.isnan(loss)
    with pytest.warns(jh.BadInputWarning, match=r"\b1 element"):
        values = measured.compute()
    batch["where"][0] = False
    exact = entry.expected_metrics(batch["labels"], batch["logits"], batch["weights"], batch["where"])
    for key, value in exact.items():
        if key not in ("auc",):
            np.testing.assert_allclose(values[key], value, rtol=3e-6, atol=2e-6)


@each_vma
def test_a_normalizer_is_global(check_vma):
    """It divides the sum over devices, and is not summed itself."""
    entry = next(entry for entry in ZOO if entry.name == "binary")
    batch = draw(entry)

    def run(batch):
        return entry.head.loss(**batch, normalizer=12.5, axis_name="d")

    mapped = jax.shard_map(run, mesh=mesh_of(8, "auto"), in_specs=P("d"), out_specs=P(), check_vma=check_vma)
    np.testing.assert_allclose(jax.jit(mapped)(batch), entry.expected_loss(**batch, normalizer=12.5), rtol=2e-6)


@pytest.mark.slow
@engine
def test_large_local_batches(entry):
    """Rows enough on each device to be cut in tiles."""
    n = 40_016
    batch, params = draw(entry, n), entry.params()
    batch["logits"] = np.where(batch["where"], batch["logits"], np.float32(np.nan))
    expected = entry.expected_metrics(batch["labels"], batch["logits"], batch["weights"], batch["where"])

    def measure(batch):
        rest = {"weights": batch["weights"], "where": batch["where"]}
        return entry.head.measure(batch["labels"], batch["logits"], params=params, **rest)

    mapped = jax.shard_map(
        lambda batch: measure(batch).psum("d"), mesh=mesh_of(2, "auto"), in_specs=P("d"), out_specs=P()
    )
    values = jax.jit(mapped)(batch).compute(bounds=True)
    for key, value in expected.items():
        lower, upper = bounds_of(values, key) or (0.0, 0.0)
        np.testing.assert_allclose(values[key], value, rtol=3e-6, atol=2e-6 + upper - lower)


@pytest.mark.slow
def test_linear_logits_over_devices():
    entry = next(entry for entry in ZOO if entry.name == "ordinal")
    rng = np.random.default_rng(4)
    batch, params = draw(entry), entry.params()
    d = entry.head.logits_dimension
    hidden, kernel, bias = (rng.normal(size=s).astype(np.float32) for s in ((N, 3), (3, d), (d,)))
    hidden = np.where(batch["where"], hidden, np.float32(np.nan))

    def run(kernel, bias, hidden, batch, axis_name=None):
        rest = {"weights": batch["weights"], "where": batch["where"], "params": params}

        def loss(kernel, bias):
            lazy = jh.LinearLogits(hidden, kernel, bias)
            return entry.head.loss(batch["labels"], lazy, axis_name=axis_name, **rest)

        out = jax.value_and_grad(loss, argnums=(0, 1))(kernel, bias)
        measured = entry.head.measure(batch["labels"], jh.LinearLogits(hidden, kernel, bias), **rest)
        if axis_name is None:
            return *out, measured
        return out[0], jax.lax.pmean(out[1], axis_name), measured.psum(axis_name)

    expected = jax.jit(run)(kernel, bias, hidden, batch)
    exact = np.where(batch["where"], hidden, 0).astype(np.float64) @ kernel + bias
    loss = entry.expected_loss(batch["labels"], exact, batch["weights"], batch["where"])
    np.testing.assert_allclose(expected[0], loss, rtol=3e-6)
    mesh = mesh_of(8)
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("d"))
    placed = (*jax.device_put((kernel, bias), whole), *jax.device_put((hidden, batch), rows))
    mapped = jax.shard_map(
        functools.partial(run, axis_name="d"), mesh=mesh, in_specs=(P(), P(), P("d"), P("d")), out_specs=P()
    )
    for got in (jax.jit(run)(*placed), jax.jit(mapped)(*placed)):
        assert_close(got[:2], expected[:2])
        assert_close(got[2].compute(), expected[2].compute())


BINARY = jh.BinaryClassHead()
ROWS = {"labels": np.array([1, 0, 1, 0]), "logits": np.zeros((4, 1), np.float32)}


def stepped(make):
    """A call of a step that was made for the axis "d"."""
    step = make(
        BINARY,
        lambda params, x: x @ params,
        **({"optimizer": SGD} if make is jh.make_train_step else {}),
        axis_name="d",
    )
    state = jh.TrainState.create(params=np.zeros((1, 1), np.float32), optimizer=SGD, head=BINARY, key=jax.random.key(0))
    return step(state, {"features": ROWS["logits"], "labels": ROWS["labels"]})


SGD = OPTIMIZERS["sgd"]
UNBOUND = {
    "loss": lambda: BINARY.loss(**ROWS, axis_name="d"),
    "divisor": lambda: BINARY.divisor(**ROWS, axis_name="d"),
    "update_state": lambda: entry_of("running_prior").head.update_state(
        entry_of("running_prior").head.init_state(), **ROWS, axis_name="d"
    ),
    "create_estimator_spec": lambda: BINARY.create_estimator_spec({}, "eval", **ROWS, axis_name="d"),
    "psum_of_a_batch": lambda: BINARY.measure(**ROWS).psum("d"),
    "psum_of_sums": lambda: BINARY.metrics().psum("d"),
    "varying": lambda: BINARY.metrics().varying("d"),
    "train_step": lambda: stepped(jh.make_train_step),
    "eval_step": lambda: stepped(jh.make_eval_step),
}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        # An eager divisor is many programs before it comes to the axis.
        pytest.param(name, how, marks=[pytest.mark.slow] if (name, how) == ("divisor", "eager") else [])
        for name in UNBOUND
        for how in ("eager", "jit")
    ],
)
def test_an_axis_that_is_not_there_is_refused_in_words(name, how):
    call = jax.jit(UNBOUND[name]) if how == "jit" else UNBOUND[name]
    with pytest.raises(ValueError, match=r"axis_name='d' is not the name of a mapped axis.*shard_map.*leave it out"):
        call()
    other = jax.pmap(lambda _: call(), axis_name="other")
    with pytest.raises(ValueError, match="axis_name='d' is not the name"):
        other(np.zeros(2))


def test_one_batch_is_not_added_to_the_states_of_many_devices():
    """It would count once on each of them."""
    apart = jax.tree.map(lambda x: np.stack([x] * 8), BINARY.metrics())
    with pytest.raises(ValueError, match=r"leading axes \(8,\).*psum"):
        BINARY.update_metrics(apart, None, **ROWS)
    inside = jax.jit(jax.vmap(lambda metrics: BINARY.update_metrics(metrics, None, **ROWS)))(apart)
    assert inside.state.shape == apart.state.shape

    # What shard_map makes of them has a first axis of size 1, and the way around it is told.
    def naive(metrics):
        return BINARY.update_metrics(metrics, None, **ROWS)

    def told(metrics):
        return naive(metrics[0])[None]

    mapped = functools.partial(jax.shard_map, mesh=mesh_of(8, "auto"), in_specs=P("d"), out_specs=P("d"))
    with pytest.raises(ValueError, match=r"leading axes \(1,\).*metrics\[0\].*metrics\[None\]"):
        jax.jit(mapped(naive))(apart)
    np.testing.assert_array_equal(jax.jit(mapped(told))(apart).state, inside.state)


def test_shards_of_different_shapes_are_refused():
    """Labels of one number of rows, logits of another; states of four devices, and of eight."""
    metrics = BINARY.metrics()
    with pytest.raises(ValueError, match=r"labels shape.*\(4, 1\).*\(3, 1\)"):
        BINARY.update_metrics(metrics, None, ROWS["logits"], ROWS["labels"][:3])
    four, eight = (jax.tree.map(lambda x, n=n: np.stack([x] * n), metrics) for n in (4, 8))
    with pytest.raises(ValueError, match=r"\(4,\) and \(8,\)"):
        _ = four + eight


def test_a_mesh_that_does_not_divide_the_batch_is_refused_in_words():
    batch = {"features": ROWS["logits"], "labels": ROWS["labels"]}
    with pytest.raises(ValueError, match=r"8 devices.*multiple of.*Given 4 rows.*pad_batch"):
        jh.training.shard_batch(batch, mesh_of(8))
    placed = jh.training.shard_batch(jh.pad_batch(batch, 8), mesh_of(8))
    loss = jax.jit(lambda batch: BINARY.loss(batch["labels"], batch["features"], where=batch["where"]))(placed)
    assert loss == pytest.approx(np.log(2), rel=1e-6)
