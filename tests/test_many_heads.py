"""Many heads in a `MultiHead` that are equal but for their names are one program, with the numbers of each alone."""

import collections
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxheads as jh
from jaxheads.engine import trees
from jaxheads.engine.samplers import sample_labels, sample_logits
from jaxheads.numerics import fields

N, MANY = 8, trees.LEAST
CALLS: collections.Counter[str] = collections.Counter()
SMALL = jh.LogitGrid(-4, 4, 18)


class CountedHead(jh.Head):
    """A head that learns and runs, and counts the calls of its hooks."""

    weight: float = 1.0
    log_scale: Any = jh.contract.learned(lambda head, key: jnp.zeros((), jnp.float32))
    seen: Any = jh.contract.running(lambda head: jnp.zeros((), jnp.float32))

    logits_dimension = 1
    coupling = "row"

    def losses(self, labels, logits):
        CALLS["losses"] += 1
        return self.weight * (logits * jnp.exp(self.log_scale) - labels) ** 2

    def observe(self, labels, logits):
        CALLS["observe"] += 1
        return {"error": jh.Mean(jnp.abs(logits - labels) * jnp.exp(self.log_scale))}

    def advance(self, labels, logits, rows):
        CALLS["advance"] += 1
        return {"seen": self.seen + rows.devices.sum(jnp.sum(logits * rows.weights))}


# Heads of users stay apart: their code may read the name.
CountedHead.__module__ = "jaxheads.tested"


class OwnColumnHead(jh.Head):
    """A head that reads the column of its own name."""

    logits_dimension = 1
    coupling = "row"
    reads_features = True

    def losses(self, labels, logits, rows):
        return rows.features[self.name] * (logits - labels) ** 2


def many(n: int, make: Any = jh.BinaryClassHead, **arguments: Any) -> list[Any]:
    return [make(name=f"h{i}", **arguments) for i in range(n)]


def draw(head: jh.Head, n: int = N) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return sample_labels(head, rng, (n,)), sample_logits(head, rng, (n,))


def count_loops(function: Any, *arguments: Any) -> int:
    """How many groups of heads a traced function has: its loops at the top."""
    jaxpr = jax.make_jaxpr(function)(*arguments)
    return sum(equation.primitive.name == "scan" for equation in jaxpr.eqns)


def step_of(head: jh.Head, **given: Any) -> Any:
    """Loss, gradients to logits and parameters, metrics, running state."""

    def step(labels: Any, logits: Any, params: Any, rows: Any) -> Any:
        def loss(logits: Any, params: Any) -> Any:
            return head.loss(labels, logits, params=params, **rows, **given)

        found = jax.value_and_grad(loss, (0, 1), allow_int=True)(logits, params)
        return found, head.measure(labels, logits, params=params, **rows, **given).state

    return step


def params_of(head: jh.Head) -> Any:
    learned = head.init(jax.random.key(0))
    learned = jax.tree.unflatten(
        jax.tree.structure(learned), [x + np.float32(0.1 * i) for i, x in enumerate(jax.tree.leaves(learned))]
    )
    return fields.merge(learned, head.init_state())


def test_numbers_are_those_of_numpy():
    """Masks, weights, head weights and hidden NaN by head: loss, gradient and metrics."""
    rng, names = np.random.default_rng(0), [f"h{i}" for i in range(MANY)]
    by_head = np.where(np.arange(MANY) % 5 == 3, 0.0, rng.uniform(0.5, 2, MANY))
    head = jh.MultiHead(many(MANY, bins=SMALL), head_weights=by_head.tolist())
    y, z = rng.integers(0, 2, (N, MANY)).astype(np.float32), rng.normal(size=(N, MANY)).astype(np.float32)
    where, weights = rng.random((N, MANY)) < 0.7, rng.uniform(0.5, 2, (N, MANY)).astype(np.float32)
    where[0] = True
    spoiled = np.where(where, y, np.nan).astype(np.float32)
    spoiled[0, 3] = np.nan  # of a silent head

    def columns(x: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, x.T, strict=True))

    given = {"where": columns(where), "weights": columns(weights)}
    step = jax.jit(step_of(head))
    (loss, (gradient, _)), state = step(columns(spoiled), z, {}, given)

    w, x = np.where(where, weights, 0).astype(np.float64), z.astype(np.float64)
    each = (w * (np.logaddexp(0, x) - y * x)).sum(0) / where.sum(0)
    np.testing.assert_allclose(loss, each @ by_head, rtol=1e-6)
    expected = by_head * w * (1 / (1 + np.exp(-x)) - y) / where.sum(0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)
    with pytest.warns(jh.metrics.BadInputWarning):
        values = jh.Metrics(state, head).compute()
    right = (w * ((x > 0) == (y == 1))).sum(0) / w.sum(0)
    for i, name in enumerate(names):
        if i != 3:  # its one row with a NaN is counted as bad
            np.testing.assert_allclose(values[f"loss/{name}"], each[i], rtol=1e-6)
            np.testing.assert_allclose(values[f"accuracy/{name}"], right[i], rtol=1e-6)
    assert [key for key in values if key.startswith("auc/")] == [f"auc/{name}" for name in names]


def test_hooks_of_equal_heads_are_traced_once():
    head = jh.MultiHead(many(MANY, CountedHead))
    head.metrics()
    labels, logits = draw(head)
    optimizer = optax.sgd(0.1)
    step = jh.make_train_step(head, lambda params, features: {k: v * params for k, v in features.items()}, optimizer)
    state = jh.TrainState.create(params=jnp.float32(1), optimizer=optimizer, head=head, key=jax.random.key(0))
    CALLS.clear()
    jax.eval_shape(step, state, {"features": logits, "labels": labels})
    assert CALLS == {"losses": 1, "observe": 1, "advance": 1}
    CALLS.clear()
    jax.eval_shape(
        lambda metrics: head.update_metrics(metrics, None, logits, labels, params=params_of(head)), head.metrics()
    )
    assert CALLS == {"losses": 1, "observe": 1}


def test_construction_traces_equal_heads_once():
    class FreshHead(CountedHead):
        __module__ = CountedHead.__module__

    CALLS.clear()
    head = jh.MultiHead(many(3 * MANY, FreshHead))
    head.metrics()
    assert CALLS["observe"] <= 2


def test_the_program_hardly_grows():
    """A head more costs what joins its arrays to those of the others, not the formulas once more."""

    def count(n: int) -> int:
        head = jh.MultiHead(many(n))
        labels = {f"h{i}": np.zeros((N, 1), np.float32) for i in range(n)}
        step = step_of(head)
        jaxpr = jax.make_jaxpr(step)(labels, np.zeros((N, n), np.float32), {}, {"where": np.ones((N, 1), bool)})
        return len(jaxpr.eqns)

    assert (count(3 * MANY) - count(2 * MANY)) / MANY < 20


CASES: dict[str, Any] = {
    "learned and running": lambda: jh.MultiHead(many(4, CountedHead)),
    "slices": lambda: jh.MultiHead(many(4, bins=SMALL, slices=jh.Slices("group", 2))),
    "bootstrap": lambda: jh.MultiHead(many(4, bins=SMALL, bootstrap=jh.Bootstrap(2))),
    "in turns": lambda: jh.MultiHead(
        [kind(name=f"{kind.__name__}{i}") for i in range(3) for kind in (jh.PoissonRegressionHead, jh.RegressionHead)]
    ),
    "nested, by uncertainty": lambda: jh.MultiHead(
        [
            jh.MultiHead(many(3, jh.RegressionHead)),
            jh.MultiHead([jh.PoissonRegressionHead(name=f"p{i}") for i in range(3)], head_weights=[0, 1, 2]),
            jh.MultiClassHead(3, name="c"),
        ],
        weighting="uncertainty",
    ),
    "constrained": lambda: jh.MultiHead(
        [jh.GlobalObjectiveHead(base, "precision_at_recall", 0.9) for base in many(3, bins=SMALL)]
    ),
}


QUICK = ("learned and running",)


@pytest.mark.parametrize("case", [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in CASES])
def test_the_same_numbers_together_and_apart(case, monkeypatch):
    head = CASES[case]()
    labels, logits = draw(head)
    rng, params = np.random.default_rng(1), params_of(head)
    rows = {"where": rng.random((N, 1)) < 0.7, "weights": rng.uniform(0.5, 2, (N, 1)).astype(np.float32)}
    rows["features"] = {"group": rng.integers(-1, 2, N).astype(np.int32)}
    given = {"key": jax.random.key(0)} if case == "bootstrap" else {}

    def run(least: int) -> tuple[int, Any]:
        monkeypatch.setattr(trees, "LEAST", least)
        traced = jax.jit(step_of(head, **given)).trace(labels, logits, params, rows)
        return len(traced.jaxpr.eqns), traced.lower().compile()(labels, logits, params, rows)

    (few, together), (more, apart) = run(2), run(100)
    assert few < more
    for found, expected in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        if found.dtype == jnp.float32:
            np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("average", ["steps", "sequences"])
def test_sequences_inside(average, monkeypatch):
    monkeypatch.setattr(trees, "LEAST", 3)
    rng, names = np.random.default_rng(0), ["a", "b", "c"]
    heads = [jh.SequentialHeadWrapper(jh.RegressionHead(name=name), average_over=average) for name in names]
    head = jh.MultiHead(heads)
    y, z = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    mask = rng.random((4, 5)) < 0.6
    mask[:, 0] = True
    labels = {f"{name}_sequential": x for name, x in zip(names, y, strict=True)}

    def loss(z: Any) -> Any:
        return head.loss(labels, jnp.moveaxis(z, 0, -1), {"sequence_length_mask": mask})

    assert count_loops(loss, z) == 1
    share = mask / mask.sum(1, keepdims=True) / 4 if average == "sequences" else mask / mask.sum()
    expected = (((z - y).astype(np.float64) ** 2) * share).sum()
    found, gradient = jax.jit(jax.value_and_grad(loss))(z)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * (z - y).astype(np.float64) * share, rtol=1e-5, atol=1e-6)


def test_one_array_is_cut_in_the_order_of_the_heads():
    head = jh.MultiHead([jh.RegressionHead(2, name="r"), *many(MANY, lambda name: jh.RegressionHead(3, name=name))])
    labels, logits = draw(head)
    one = np.concatenate([logits[name] for name in head.parts()], axis=-1)
    together, gradient = jax.jit(jax.value_and_grad(lambda z: head.loss(labels, z)))(one)
    errors = np.concatenate([logits[name] - labels[name] for name in head.parts()], axis=-1).astype(np.float64)
    sizes = N * np.repeat([head.logits_dimension for head in head.heads], [x.logits_dimension for x in head.heads])
    np.testing.assert_allclose(together, (errors**2 / sizes).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * errors / sizes, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_what_differs_stays_apart():
    def loops(heads: list[Any], where: Any = None, z: Any = None) -> int:
        head = jh.MultiHead(heads)
        labels, logits = draw(head)
        return count_loops(lambda z: head.loss(labels, z, where=where), logits if z is None else z)

    assert loops(many(MANY)) == 1
    assert loops(many(MANY - 1)) == 0
    assert loops([*many(MANY - 1), jh.BinaryClassHead(name="x", thresholds=(0.3,))]) == 0
    assert loops([*many(MANY), *(jh.RegressionHead(name=f"r{i}") for i in range(MANY))]) == 2
    assert loops(many(MANY), {"h0": np.ones((N, 1), bool)}) == 0
    assert loops(many(MANY + 1), {"h0": np.ones((N, 1), bool)}) == 1
    lazy = jh.LinearLogits(jnp.ones((N, 2)), jnp.ones((2, MANY)))
    assert loops(many(MANY), z=lazy) == 0
    # The loss of pairs has a loop of its own.
    assert loops([jh.GlobalObjectiveHead(base, "roc_auc") for base in many(MANY)]) == MANY


def test_a_head_may_read_its_name():
    head = jh.MultiHead(many(MANY, OwnColumnHead))
    features = {f"h{i}": np.full((N, 1), i + 1, np.float32) for i in range(MANY)}
    labels = {name: np.zeros((N, 1), np.float32) for name in features}
    loss = jax.jit(lambda z: head.loss(labels, z, features))(np.ones((N, MANY), np.float32))
    np.testing.assert_allclose(loss, sum(range(1, MANY + 1)), rtol=1e-6)


@pytest.mark.slow
def test_bad_labels_show():
    head = jh.MultiHead(many(MANY, bins=SMALL))
    labels, logits = draw(head)
    labels["h5"][2:4] = 7
    rows = {"weights": np.ones((N, 1), np.float32)}
    (loss, (gradient, _)), state = jax.jit(step_of(head))(labels, logits, {}, rows)
    assert np.isnan(loss)
    assert [name for name, x in gradient.items() if np.isnan(x).any()] == ["h5"]
    assert np.isnan(gradient["h5"][2:4]).all()
    assert state[0, 0] == 2
    for function in (head.loss, jax.grad(head.loss, 1)):
        error, _ = checkify.checkify(jax.jit(function))(labels, logits)
        assert "2 unmasked elements have an illegal label or weight for BinaryClassHead" in (error.get() or "")


def test_an_error_names_a_head():
    class WrongHead(jh.Head):
        logits_dimension = 1
        coupling = "row"

        def losses(self, labels, logits):
            return logits[:, 0]

    head = jh.MultiHead(many(MANY, WrongHead))
    with pytest.raises(ValueError, match=re.escape("Head 'h0': WrongHead.losses must return")):
        jax.eval_shape(lambda: head.loss(*draw(head)))


def test_summaries_and_normalizers_by_head():
    head = jh.MultiHead(many(MANY, jh.RegressionHead))
    labels, logits = draw(head)
    each = {name: ((logits[name] - labels[name]).astype(np.float64) ** 2).sum() for name in labels}
    by = {name: np.float32(i + 1) for i, name in enumerate(labels)}
    found = jax.jit(lambda z: head.loss(labels, z, normalizer=by))(logits)
    np.testing.assert_allclose(found, sum(each[name] / by[name] for name in each), rtol=1e-6)
    spec = jax.jit(lambda z: head.create_estimator_spec(None, "train", z, labels, train_op_fn=lambda loss: loss))(
        logits
    )
    for name, total in each.items():
        np.testing.assert_allclose(spec.summaries[f"loss/{name}"], total / N, rtol=1e-6)
    divisor = jax.eval_shape(lambda z: head.divisor(labels, z), logits)
    assert set(divisor) == set(labels)


WAYS = [AxisType.Auto, AxisType.Explicit, True, False, "pmap"]


NAMES = ["auto", "explicit", "checked", "unchecked", "pmap"]


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, id=name, marks=[] if name == "explicit" else pytest.mark.slow)
        for name, way in zip(NAMES, WAYS, strict=True)
    ],
)
def test_devices_do_not_matter(way, monkeypatch):
    """Loss, metrics and running state of one head in a loop, over eight devices, and by NumPy."""
    monkeypatch.setattr(trees, "LEAST", 3)
    head, axis = jh.MultiHead(many(3, CountedHead)), None if isinstance(way, AxisType) else "d"
    labels, logits = draw(head, 16)
    where = {name: np.random.default_rng(i).random((16, 1)) < 0.6 for i, name in enumerate(labels)}
    given, state, learned = (labels, logits, where), head.init_state(), head.init(jax.random.key(0))

    def step(labels: Any, logits: Any, where: Any) -> Any:
        params = fields.merge(learned, state)
        rows = {"where": where, "axis_name": axis}

        def loss(z: Any) -> Any:
            return head.loss(labels, z, params=params, **rows)

        value, gradient = jax.value_and_grad(loss)(logits)
        metrics = head.measure(labels, logits, params=params, **rows)
        new = head.update_state(state, labels, logits, params=learned, **rows)
        return value, metrics if axis is None else metrics.psum(axis), new, gradient

    if isinstance(way, AxisType):
        mesh = jax.make_mesh((8,), ("d",), axis_types=(way,))
        with jax.set_mesh(mesh):
            found = jax.jit(step)(*jax.device_put(given, NamedSharding(mesh, PartitionSpec("d"))))
    elif way == "pmap":
        cut = jax.tree.map(lambda x: x.reshape(8, 2, 1), given)
        *found, gradient = jax.pmap(step, axis_name="d")(*cut)
        found = *jax.tree.map(lambda x: x[0], found), jax.tree.map(lambda x: x.reshape(16, 1), gradient)
    else:
        mesh, rows = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,)), PartitionSpec("d")
        out = PartitionSpec(), PartitionSpec(), PartitionSpec(), rows
        mapped = jax.shard_map(step, mesh=mesh, in_specs=(rows,) * 3, out_specs=out, check_vma=way)
        found = jax.jit(mapped)(*given)
    loss, metrics, new, gradient = jax.device_get(found)
    values, total = metrics.compute(), 0.0
    # Without types, the gradient of a sum over devices is added up once a device; `pmean` mends that in a step.
    times = 8 if way in (False, "pmap") else 1
    for name, mask in where.items():
        error = (logits[name] - labels[name]).astype(np.float64)[mask]
        total += (error**2).mean()
        np.testing.assert_allclose(values[f"error/{name}"], np.abs(error).mean(), rtol=1e-6)
        np.testing.assert_allclose(new[name]["seen"], logits[name][mask].sum(), rtol=1e-5)
        np.testing.assert_allclose(gradient[name][mask], times * 2 * error / mask.sum(), rtol=1e-5)
    np.testing.assert_allclose(loss, total, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.all_passes
def test_128_heads_train():
    """Two steps with all metrics, as a user compiles them; today in seconds, once in minutes."""
    head, optimizer = jh.MultiHead(many(128)), optax.sgd(0.5)
    step = jax.jit(jh.make_train_step(head, lambda params, features: features @ params, optimizer))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 4)), rng.integers(0, 2, (64, 128))
    batch = {
        "features": x.astype(np.float32),
        "labels": {f"h{i}": y[:, i : i + 1].astype(np.float32) for i in range(128)},
    }
    params = np.zeros((4, 128))
    state = jh.TrainState.create(
        params=jnp.zeros((4, 128), jnp.float32), optimizer=optimizer, head=head, key=jax.random.key(0)
    )
    z, out = x @ params, None
    for _ in range(2):
        z = x @ params
        state, out = step(state, batch)
        np.testing.assert_allclose(out.loss, (np.logaddexp(0, z) - y * z).mean(0).sum(), rtol=1e-5)
        params -= 0.5 * x.T @ (1 / (1 + np.exp(-z)) - y) / 64
    np.testing.assert_allclose(state.params, params, rtol=1e-4, atol=1e-6)
    assert out is not None
    values = out.metrics.compute()
    accuracy = ((z > 0) == (y == 1)).mean(0)
    np.testing.assert_allclose([values[f"accuracy/h{i}"] for i in range(128)], accuracy, rtol=1e-6)


def test_heads_that_share_all_of_their_values():
    head = jh.MultiHead([jh.RegressionHead(name=f"h{i}") for i in range(MANY)])
    y, z = jnp.array([[1.0], [3.0]]), jnp.array([[0.0], [1.0]])
    names = [*head.parts()]
    loss = jax.jit(lambda z: head.loss(dict.fromkeys(names, y), dict.fromkeys(names, z)))
    np.testing.assert_allclose(loss(z), MANY * 2.5, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(z), MANY * np.array([[-1.0], [-2.0]]), rtol=1e-6)


class NamedHead(jh.Head):
    """The class of a user, whose loss reads the name by a function elsewhere."""

    logits_dimension = 1
    coupling = "row"

    def losses(self, labels, logits):
        return scale_of(self) * (labels - logits) ** 2


def scale_of(head):
    return float(head.name.removeprefix("h"))


def test_names_that_matter_stay_apart():
    head = jh.MultiHead([NamedHead(name=f"h{i}") for i in range(MANY)])
    labels = {name: np.ones((2, 1), np.float32) for name in head.parts()}
    loss = head.loss(labels, np.zeros((2, MANY), np.float32))
    np.testing.assert_allclose(loss, MANY * (MANY - 1) / 2, rtol=1e-6)
