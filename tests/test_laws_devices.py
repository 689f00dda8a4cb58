"""Law 5 on every head: devices do not matter, however the work is spread over them, even unevenly."""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from zoo import ZOO, Entry, bounds_of

import jaxheads as jh

P = PartitionSpec
N = 16
each = pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
few = pytest.mark.parametrize(
    "entry", [entry for entry in ZOO if entry.name in ("binary", "ordinal", "running_prior")], ids=lambda e: e.name
)
AXES = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}
each_axes = pytest.mark.parametrize("axes", AXES)
each_vma = pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])


def mesh_of(n: int, axes: str = "explicit") -> jax.sharding.Mesh:
    if axes == "explicit":
        return jax.make_mesh((n,), ("d",), devices=jax.devices()[:n])  # what make_mesh gives by default
    return jax.make_mesh((n,), ("d",), (AXES[axes],), devices=jax.devices()[:n])


def draw(entry: Entry, n: int = N) -> dict[str, Any]:
    """A batch that is unevenly spread: of eight devices one has padding alone, one nothing but zero weights."""
    rng = np.random.default_rng(1)
    where = (rng.random((n, 1)) < 0.7) & (np.arange(n)[:, None] // 2 != 3)
    where[:2] = [[True], [False]]
    weights = rng.choice(np.array([0, 0.3, 1, 2.5], np.float32), (n, 1))
    weights[0] = 1
    weights[10:12] = 0
    labels, logits = entry.labels(rng, (n,)), entry.logits(rng, (n,))
    return {"labels": labels, "logits": logits, "weights": weights, "where": where}


def model(params: dict[str, Any], logits: jax.Array) -> jax.Array:
    """Parameters that all rows share, so that their gradient crosses devices."""
    return logits * params["scale"][None] + params["bias"][None]


def start(entry: Entry) -> dict[str, Any]:
    d = entry.head.logits_dimension
    return {
        "scale": np.linspace(0.8, 1.2, d, dtype=np.float32),
        "bias": np.linspace(-0.1, 0.3, d, dtype=np.float32),
        "head": jax.tree.map(np.asarray, entry.head.init(jax.random.key(0))),
    }


def train_step(head: jh.Head, params, state, metrics, batch, axis_name=None):
    """The recipe: loss, gradients, the batch's metrics, updated metrics, the next running state."""
    rest = {"weights": batch["weights"], "where": batch["where"]}

    def loss(params):
        logits = model(params, batch["logits"])
        value = head.loss(batch["labels"], logits, params={**params["head"], **state}, axis_name=axis_name, **rest)
        return value, logits

    (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    bound = {**params["head"], **state}
    measured = head.measure(batch["labels"], logits, params=bound, **rest)
    if axis_name is not None:
        gradients = jax.lax.pmean(gradients, axis_name)
        measured = measured.psum(axis_name)
    new = head.update_state(state, batch["labels"], logits, params=params["head"], axis_name=axis_name, **rest)
    return value, gradients, measured, metrics + measured, new


@functools.cache
def alone(name: str):
    """The step on one device."""
    entry = next(entry for entry in ZOO if entry.name == name)
    step = jax.jit(functools.partial(train_step, entry.head))
    return step(start(entry), entry.head.init_state(), entry.head.metrics(), draw(entry))


def assert_close(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        b = np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * max(1.0, float(np.abs(b).max(initial=0.0))))


def assert_step(got: Any, entry: Entry) -> None:
    """Equal to one device, to 1e-6, the values that are read from the metrics included."""
    expected = alone(entry.name)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    assert_close(got[:2], expected[:2])
    assert_close(got[4], expected[4])
    for ours, theirs in zip(got[2:4], expected[2:4], strict=True):
        assert ours.state.shape == theirs.state.shape
        ours, theirs = ours.compute(bounds=True), theirs.compute(bounds=True)
        assert_close(ours, theirs)


@each
def test_one_device_is_the_oracle(entry):
    """What the other tests here compare with."""
    loss, gradients, measured, updated, new = alone(entry.name)
    params, batch = start(entry), draw(entry)
    rows = (batch["weights"], batch["where"])
    constants = {**params["head"], **entry.head.init_state()}

    def expect(changes):
        scale, bias = ({**params, **changes}[name].astype(np.float64) for name in ("scale", "bias"))
        return entry.expected_loss(batch["labels"], batch["logits"].astype(np.float64) * scale + bias, *rows, constants)

    np.testing.assert_allclose(loss, expect({}), rtol=3e-6)
    for name in ("scale", "bias"):
        value = params[name].astype(np.float64)
        for i in range(len(value)):
            nudge = 1e-5 * (np.arange(len(value)) == i)
            slope = (expect({name: value + nudge}) - expect({name: value - nudge})) / 2e-5
            np.testing.assert_allclose(gradients[name][i], slope, rtol=2e-5, atol=2e-6)
    logits = np.asarray(model(params, batch["logits"]))
    expected = entry.expected_metrics(batch["labels"], logits, *rows, constants)
    values = measured.compute(bounds=True)
    for key, value in expected.items():
        lower, upper = bounds_of(values, key) or (0.0, 1e-6)
        np.testing.assert_allclose(values[key], value, rtol=3e-6, atol=2e-6 + upper - lower)
    for key, value in updated.compute().items():
        np.testing.assert_array_equal(value, values[key])
    if entry.name == "running_prior":
        w = np.where(batch["where"], batch["weights"], 0).astype(np.float64)
        exact = [1 + (w * batch["labels"]).sum(), 2 + w.sum()]
        np.testing.assert_allclose(np.asarray(new["counts"], np.float64).sum(-1), exact, rtol=1e-6)


def by_jit(entry: Entry, n: int, axes: str):
    mesh = mesh_of(n, axes)
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("d"))
    step = jax.jit(functools.partial(train_step, entry.head))
    constants = jax.device_put((start(entry), entry.head.init_state(), entry.head.metrics()), whole)
    return step(*constants, jax.device_put(draw(entry), rows))


def by_shard_map(entry: Entry, n: int, axes: str, check_vma: bool):
    mesh = mesh_of(n, axes)
    mapped = jax.shard_map(
        functools.partial(train_step, entry.head, axis_name="d"),
        mesh=mesh,
        in_specs=(P(), P(), P(), P("d")),
        out_specs=P(),
        check_vma=check_vma,
    )
    constants = (start(entry), entry.head.init_state(), entry.head.metrics())
    if axes == "explicit":
        # On an Explicit mesh, arguments come with the layout that the specs ask for.
        constants = jax.device_put(constants, NamedSharding(mesh, P()))
        return jax.jit(mapped)(*constants, jax.device_put(draw(entry), NamedSharding(mesh, P("d"))))
    return jax.jit(mapped)(*constants, draw(entry))


def by_pmap(entry: Entry, n: int):
    step = jax.pmap(
        functools.partial(train_step, entry.head, axis_name="d"),
        axis_name="d",
        in_axes=(None, None, None, 0),
        devices=jax.devices()[:n],
    )
    batch = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), draw(entry))
    out = step(start(entry), entry.head.init_state(), entry.head.metrics(), batch)
    for leaf in jax.tree.leaves(out):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return jax.tree.map(lambda x: x[0], out)


@each
@each_axes
def test_jit_over_sharded_arrays_on_8(entry, axes):
    assert_step(by_jit(entry, 8, axes), entry)


@each
@each_vma
def test_shard_map_on_8(entry, check_vma):
    assert_step(by_shard_map(entry, 8, "explicit", check_vma), entry)


@each
def test_pmap_on_8(entry):
    assert_step(by_pmap(entry, 8), entry)


@each
def test_two_devices(entry):
    assert_step(by_jit(entry, 2, "explicit"), entry)


@few
def test_one_and_four_devices(entry):
    assert_step(by_jit(entry, 4, "auto"), entry)
    assert_step(by_shard_map(entry, 4, "auto", True), entry)
    assert_step(by_jit(entry, 1, "explicit"), entry)


@each
@each_axes
def test_an_update_is_one_all_reduce(entry, axes):
    """On rows enough to be cut in tiles, were they on one device: slicing a sharded batch would gather it."""
    head, params = entry.head, entry.params()
    batch = draw(entry, 40_016)

    @jax.jit
    def update(metrics, batch):
        rest = {"weights": batch["weights"], "where": batch["where"]}
        return head.update_metrics(
            metrics, None, batch["logits"], batch["labels"], "eval", [jnp.float32(0.5)], params=params, **rest
        )

    mesh = mesh_of(8, axes)
    metrics = jax.device_put(head.metrics([]), NamedSharding(mesh, P()))
    text = update.lower(metrics, jax.device_put(batch, NamedSharding(mesh, P("d")))).compile().as_text()
    assert count(text, "all-reduce") == 1
    for other in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert count(text, other) == 0


def count(text: str | None, operation: str) -> int:
    assert text is not None
    return sum(f" {operation}(" in line or f" {operation}-start(" in line for line in text.splitlines())


@pytest.mark.parametrize("entry", [e for e in ZOO if e.name in ("binary", "multi_class")], ids=lambda entry: entry.name)
def test_eager_calls_on_sharded_arrays(entry):
    """Without a jit of one's own, as in a notebook: on both kinds of mesh, the mesh set or not."""
    head, batch, params = entry.head, draw(entry), entry.params()

    def call(batch, times=1):
        rest = {"weights": batch["weights"], "where": batch["where"], "params": params}
        metrics = head.metrics()
        for _ in range(times):
            metrics = head.update_metrics(metrics, None, batch["logits"], batch["labels"], **rest)
        return metrics.compute(bounds=True)

    expected = call(batch)
    for axes in AXES:
        mesh = mesh_of(8, axes)
        placed = jax.device_put(batch, NamedSharding(mesh, P("d")))
        assert_close(call(placed), expected)
        with jax.set_mesh(mesh):
            assert_close(call(placed, times=2), expected)
        if axes == "explicit":
            loss = head.loss(**placed, params=params)
            np.testing.assert_allclose(loss, entry.expected_loss(**batch), rtol=2e-6)


SOFTMAX = jh.MultiClassHead(8)


@jax.jit
def softmax_step(labels, logits, where):
    loss = jax.value_and_grad(lambda z: SOFTMAX.loss(labels, z, where=where))(logits)
    return loss, SOFTMAX.measure(labels, logits, where=where)


@pytest.mark.parametrize("spec", [P(("a", "b")), P("a", "b"), P(None, "b")], ids=["rows", "both", "classes"])
@each_axes
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
    alone = hidden @ kernel, jh.LinearLogits(jnp.asarray(hidden), jnp.asarray(kernel))
    placed = put(alone[0], spec), jh.LinearLogits(put(hidden, rows), put(kernel, columns))
    for one, many in zip(alone, placed, strict=True):
        expected, measured = softmax_step(labels, one, where)
        got, metrics = softmax_step(put(labels, rows), many, put(where, rows))
        np.testing.assert_allclose(got[0], exact, rtol=2e-6)
        assert_close(got, expected)
        assert_close(metrics.compute(), measured.compute())


@each_vma
def test_axis_names_may_be_several(check_vma):
    entry = next(entry for entry in ZOO if entry.name == "binary")
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
    on_host = functools.reduce(operator.add, (jax.tree.map(lambda x, i=i: x[i], apart) for i in range(8)))
    for metrics in (once, each_time, on_host):
        values = metrics.compute(bounds=True)
        assert_close(values, expected.compute(bounds=True))
        np.testing.assert_allclose(values["average_loss"], exact["average_loss"], rtol=2e-6)
    assert all(value.shape == (8,) for value in apart.compute().values())


@pytest.mark.parametrize("way", ["vma", "no_vma", "pmap"])
@pytest.mark.parametrize("n", [2, 5, 8])
def test_psum_of_accumulated_states_keeps_the_pairs(way, n):
    """Sums of 2^31 and more with small parts beside them: a plain psum of the pairs would lose the small ones."""
    head = jh.BinaryClassHead(thresholds=(0.3,))
    slots = head.metrics().state.shape[0]
    rng = np.random.default_rng(3)
    large = (rng.integers(1, 2**20, (n, slots)) * 2.0**11).astype(np.float32)
    small = rng.integers(0, 64, (n, slots)).astype(np.float32)
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


def test_the_usual_recipe_is_wrong_and_ours_is_not():
    """A mean on each device, then a mean over devices, weighs rows by how few share their device."""
    entry = next(entry for entry in ZOO if entry.name == "binary")
    batch, params = draw(entry), start(entry)
    expected = alone("binary")[1]["bias"]

    def gradient(params, batch, axis_name):
        def loss(params):
            logits = model(params, batch["logits"])
            rest = {"weights": batch["weights"], "where": batch["where"]}
            return entry.head.loss(batch["labels"], logits, axis_name=axis_name, **rest)

        return jax.lax.pmean(jax.grad(loss)(params), "d")["bias"]

    split = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
    for axis_name, error in ((None, 0.05), ("d", 0.0)):
        run = functools.partial(gradient, axis_name=axis_name)
        got = [jax.pmap(run, "d", in_axes=(None, 0))(params, split)[0]]
        for check_vma in (True, False):
            mapped = jax.shard_map(
                run, mesh=mesh_of(8, "auto"), in_specs=(P(), P("d")), out_specs=P(), check_vma=check_vma
            )
            got.append(jax.jit(mapped)(params, batch))
        for value in got:
            off = np.abs(value / expected - 1).max()
            assert off > error if error else off < 1e-6


@pytest.mark.parametrize("entry", [e for e in ZOO if e.illegal is not None], ids=lambda entry: entry.name)
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


@each
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
