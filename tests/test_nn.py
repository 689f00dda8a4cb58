"""Heads as flax modules: trained to optima that others found, counted by hand, and who owns what."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from flax import linen, nnx
from zoo import ZOO, OrdinalHead, PriorCorrectedHead, TemperatureHead, ordinal_losses

import jaxheads as jh

KEY = jax.random.key(0)
LINEN, NNX = "linen", "nnx"
BOTH = pytest.mark.parametrize("kind", [LINEN, NNX])


def drawn(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """An initializer that compiles nothing."""
    return jax.device_put(np.random.default_rng(0).normal(size=shape).astype(dtype))


class Case:
    """A module of one of the two kinds with its values, called as a pure function."""

    def __init__(self, kind: str, head: jh.Head, width: int, **options: Any):
        options = {"kernel_init": drawn, **options}
        if kind == LINEN:
            self.module = jh.nn.LinenHead(head, **options)
            variables = self.module.init(KEY, np.zeros((1, width), np.float32))
            self.params, self.state = variables["params"], {k: v for k, v in variables.items() if k != "params"}
        else:
            self.module = jh.nn.NnxHead(head, width, rngs=nnx.Rngs(0), **options)
            self.graphdef, self.params, self.state = nnx.split(self.module, nnx.Param, jh.nn.HeadState)

    def __call__(self, method: str, *args: Any, params: Any = None, state: Any = None, **given: Any) -> Any:
        """What a method gives; of `update_state` the new state."""
        params, state = self.params if params is None else params, self.state if state is None else state
        if isinstance(self.module, jh.nn.LinenHead):
            mutable = ["head_state"] if method == "update_state" else False
            out = self.module.apply({"params": params, **state}, *args, **given, method=method, mutable=mutable)
            return out[1] if mutable else out
        # Variables of their own: nnx.merge puts those of a state into the module, to be changed there.
        module = nnx.merge(self.graphdef, params, jax.tree.map(lambda x: x, state))
        out = getattr(module, method)(*args, **given)
        return nnx.state(module, jh.nn.HeadState) if method == "update_state" else out

    def values(self, tree: Any) -> dict[str, np.ndarray]:
        """Arrays by their path from the module."""
        tree = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree.get("head_state", tree)
        leaves = jax.tree.leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in leaves}

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """In float64, by NumPy."""
        values = self.values(self.params)
        return hidden.astype(np.float64) @ values["kernel"].astype(np.float64) + values["bias"]


def nested(values: dict[str, np.ndarray], below: str = "") -> dict[str, Any]:
    """`{"learned/a/b": x}` as `{"a": {"b": x}}`, of those below a name."""
    out: dict[str, Any] = {}
    for path, value in values.items():
        if path.startswith(below):
            *above, last = path.removeprefix(below).split("/")
            functools.reduce(lambda tree, name: tree.setdefault(name, {}), above, out)[last] = value
    return out


@functools.cache
def ordinal_data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(160, 2)).astype(np.float32)
    return x, np.digitize(x @ [1.5, -1.0] + rng.logistic(size=160), [-1.0, 0.5, 2.0]).astype(np.int32)[:, None]


@functools.cache
def ordinal_optimum() -> tuple[float, np.ndarray, np.ndarray]:
    """The least mean loss in float64, the kernel and the cut points there."""
    x, labels = ordinal_data()

    def loss(theta: np.ndarray) -> float:
        with np.errstate(invalid="ignore"):  # cut points may cross in a line search
            return float(ordinal_losses(labels, x @ theta[:2, None], {"cuts": theta[2:]}).mean())

    found = scipy.optimize.minimize(loss, np.array([0.0, 0.0, -1.0, 0.0, 1.0]), method="BFGS")
    return found.fun, found.x[:2, None], found.x[2:]


def check_optimal(first: Any, loss: Any, kernel: Any, cuts: Any):
    least, best_kernel, best_cuts = ordinal_optimum()
    assert first > least + 0.1
    np.testing.assert_allclose(loss, least, rtol=0, atol=2e-6)
    np.testing.assert_allclose(kernel, best_kernel, rtol=0, atol=2e-3)
    np.testing.assert_allclose(cuts, best_cuts, rtol=0, atol=2e-3)


def momentum() -> optax.GradientTransformation:
    # Not adam: optax's own bias correction mixes dtypes, which strict promotion refuses.
    return optax.sgd(0.5, momentum=0.9)


def test_linen_trains_what_the_head_learns():
    x, labels = ordinal_data()
    model, optimizer = jh.nn.LinenHead(OrdinalHead(4), use_bias=False), momentum()
    params = jax.jit(model.init)(KEY, x)["params"]
    opt_state = optimizer.init(params)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, opt_state):
        loss, grads = jax.value_and_grad(lambda p: model.apply({"params": p}, x, labels, method="loss"))(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    losses = []
    for _ in range(250):
        params, opt_state, loss = step(params, opt_state)
        losses.append(loss)
    check_optimal(losses[0], losses[-1], params["kernel"], params["learned"]["cuts"])


def test_nnx_trains_what_the_head_learns():
    x, labels = ordinal_data()
    model = jh.nn.NnxHead(OrdinalHead(4), 2, use_bias=False, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, momentum(), wrt=nnx.Param)

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def step(model, optimizer, x, labels):
        loss, grads = nnx.value_and_grad(lambda model: model.loss(x, labels))(model)
        optimizer.update(model, grads)
        return loss

    run: Any = step
    losses = [run(model, optimizer, x, labels) for _ in range(250)]
    check_optimal(losses[0], losses[-1], model.kernel[...], model.learned["cuts"][...])


@BOTH
def test_under_make_train_step_the_state_owns_what_the_head_learns(kind):
    x, labels = ordinal_data()
    head, optimizer = OrdinalHead(4), momentum()
    case = Case(kind, head, 2, use_bias=False, owns_head=False)
    assert case.values(case.params).keys() == {"kernel"}

    def apply_linen(params, features):
        return jh.nn.LinenHead(head, use_bias=False, owns_head=False).apply({"params": params}, features["x"])

    def apply_nnx(params, features):
        return nnx.merge(case.graphdef, params, case.state)(features["x"])

    apply_fn = apply_linen if kind == LINEN else apply_nnx

    step, batch = (
        jh.make_train_step(head, apply_fn, optimizer, with_metrics=False),
        {"features": {"x": x}, "labels": labels},
    )
    train = jax.jit(lambda state: jax.lax.scan(lambda state, _: step(state, batch), state, length=250))
    state, out = train(jh.TrainState.create(params=case.params, optimizer=optimizer, head=head, key=KEY))
    assert case.values(state.params).keys() == {"kernel"}
    first, *_, last = out.loss.tolist()
    check_optimal(first, last, case.values(state.params)["kernel"], state.head_params["cuts"])
    with pytest.raises(ValueError, match=r"owns_head=False, so it has no values for \['cuts'\] of its OrdinalHead"):
        case("loss", x, labels)
    with pytest.raises(ValueError, match=r"params=state\.bound"):
        case("update_state", x, labels)


class LinenNetwork(linen.Module):
    """A network that ends in a head."""

    lazy: bool

    def setup(self):
        self.body = linen.Dense(8)
        self.top = jh.nn.LinenHead(jh.BinaryClassHead(), lazy=self.lazy)

    def hidden(self, x):
        return jnp.tanh(self.body(x))

    def __call__(self, x):
        return self.top(self.hidden(x))

    def loss(self, x, labels):
        return self.top.loss(self.hidden(x), labels)

    def predictions(self, x):
        return self.top.predictions(self.hidden(x), "class_ids")


class CompactNetwork(linen.Module):
    """The same in linen's other style; loss and metrics of one pass."""

    lazy: bool

    @linen.compact
    def __call__(self, x, labels):
        hidden = jnp.tanh(linen.Dense(8)(x))
        top = jh.nn.LinenHead(jh.BinaryClassHead(), lazy=self.lazy, name="top")
        return top.loss(hidden, labels), top.measure(hidden, labels)


class NnxNetwork(nnx.Module):
    def __init__(self, lazy: bool, rngs: nnx.Rngs):
        self.body = nnx.Linear(2, 8, rngs=rngs)
        self.top = jh.nn.NnxHead(jh.BinaryClassHead(), 8, lazy=lazy, rngs=rngs)

    def loss(self, x, labels):
        return self.top.loss(jnp.tanh(self.body(x)), labels)


# Exclusive or: no last layer alone, whatever it learns, gets more than 3 of 4 right, or below ln 2.
XOR = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]], np.float32), np.array([0, 1, 1, 0])


def fitted(loss_fn: Any, params: Any) -> Any:
    optimizer = optax.sgd(0.5)

    def body(_, carry):
        params, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(loss_fn)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(lambda p: jax.lax.fori_loop(0, 400, body, (p, optimizer.init(p))))(params)[0]


@pytest.mark.parametrize("lazy", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_linen_network_trains_through_its_head(lazy):
    model = LinenNetwork(lazy)
    params = jax.jit(lambda: model.init(KEY, *XOR, method="loss")["params"])()
    shapes = {"body": {"bias": (8,), "kernel": (2, 8)}, "top": {"bias": (1,), "kernel": (8, 1)}}
    assert jax.tree.map(jnp.shape, params) == shapes
    params = fitted(lambda p: model.apply({"params": p}, *XOR, method="loss"), params)
    found = jax.jit(lambda params: model.apply({"params": params}, XOR[0], method="predictions"))(params)
    assert isinstance(found, dict)
    assert np.ravel(found["class_ids"]).tolist() == [0, 1, 1, 0]


def test_a_compact_linen_network_takes_loss_and_metrics_in_one_pass():
    model = CompactNetwork(False)
    params = jax.jit(lambda: model.init(KEY, *XOR)["params"])()
    assert params.keys() == {"Dense_0", "top"}
    one_pass = jax.jit(lambda params: model.apply({"params": params}, *XOR))
    loss, metrics = one_pass(params)
    first, top = (jax.tree.map(lambda x: np.asarray(x, np.float64), params[name]) for name in ("Dense_0", "top"))
    z = np.tanh(XOR[0] @ first["kernel"] + first["bias"]) @ top["kernel"] + top["bias"]
    expected = np.logaddexp(0, (1 - 2 * XOR[1]) * z[:, 0]).mean()
    np.testing.assert_allclose([loss, metrics.compute()["average_loss"]], [expected] * 2, rtol=1e-5)
    loss, metrics = one_pass(fitted(lambda params: one_pass(params)[0], params))
    assert loss.item() < 0.05
    assert metrics.compute()["accuracy"] == 1


@pytest.mark.parametrize("lazy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_nnx_network_trains_through_its_head(lazy):
    graphdef, params = nnx.split(nnx.jit(lambda: NnxNetwork(lazy, nnx.Rngs(0)))())

    def loss(params):
        return nnx.merge(graphdef, params).loss(*XOR)

    assert jax.jit(loss)(fitted(loss, params)).item() < 0.05


# Of a head that keeps counts, from 1 of 2: weight 4 and three labels 1 that weigh 3, the last row not being there.
LABELS, WEIGHTS = np.array([1, 1, 0, 1], np.int32), np.array([1, 2, 1, 1], np.float32)
WHERE = np.array([True, True, True, False])
MASKED = {"weights": WEIGHTS, "where": WHERE}


@BOTH
def test_running_state_moves_by_what_was_counted(kind):
    case = Case(kind, PriorCorrectedHead(), 3, kernel_init=linen.initializers.zeros_init())
    hidden = np.ones((4, 3), np.float32)
    assert case.values(case.state).keys() == {"running/counts"}
    assert case.values(case.state)["running/counts"][:, 0].tolist() == [1, 2]

    @jax.jit
    def run(state):
        loss = case("loss", hidden, LABELS, **MASKED, state=state)
        moved = case("update_state", hidden, LABELS, **MASKED, state=state)
        return loss, moved, case("predictions", hidden, "logistic", state=state)["logistic"]

    loss, state, _ = run(case.state)
    # Log odds 0 of even counts, and the logits are 0.
    np.testing.assert_allclose(loss, 4 * np.log(2) / 3, rtol=1e-6)
    assert case.values(state)["running/counts"][:, 0].tolist() == [4, 6]
    # Log odds ln 4/2 now: softplus is ln 3.
    later, state, probability = run(state)
    np.testing.assert_allclose(later, (4 * np.log(3) - 3 * np.log(2)) / 3, rtol=1e-6)
    np.testing.assert_allclose(probability, np.full((4, 1), 2 / 3), rtol=1e-6)
    assert case.values(state)["running/counts"][:, 0].tolist() == [7, 10]


@BOTH
def test_running_state_of_heads_inside_moves(kind):
    head = TemperatureHead(PriorCorrectedHead(name="inner"), name="t")
    case = Case(kind, head, 3)
    assert {k: v.shape for k, v in case.values(case.params).items()} == {
        "bias": (1,),
        "kernel": (3, 1),
        "learned/log_temperature": (1,),
    }
    state = jax.jit(lambda: case("update_state", np.ones((4, 3), np.float32), LABELS))()
    assert {k: v[:, 0].tolist() for k, v in case.values(state).items()} == {"running/inner/counts": [4, 6]}


@BOTH
def test_running_state_gets_no_gradient(kind):
    case = Case(kind, PriorCorrectedHead(), 3)
    grads = jax.grad(lambda state: case("loss", np.ones((4, 3), np.float32), LABELS, state=state))(case.state)
    assert not np.any(case.values(grads)["running/counts"])


@BOTH
def test_update_state_of_a_head_without_running_fields_does_nothing(kind):
    case = Case(kind, jh.BinaryClassHead(), 3)
    assert not case.values(case("update_state", np.ones((4, 3), np.float32), LABELS))
    if isinstance(case.module, jh.nn.LinenHead):
        # Nor is anything asked for: to change the task is to change one line.
        case.module.apply({"params": case.params}, np.ones((4, 3), np.float32), LABELS, method="update_state")


def test_linen_state_moves_neither_in_init_nor_while_immutable():
    class Network(linen.Module):
        @linen.compact
        def __call__(self, x, labels):
            top = jh.nn.LinenHead(PriorCorrectedHead(), name="top")
            loss = top.loss(x, labels)
            top.update_state(x, labels)
            return loss

    model, x = Network(), np.ones((4, 3), np.float32)
    variables = jax.jit(model.init)(KEY, x, LABELS)
    assert np.asarray(variables["head_state"]["top"]["running"]["counts"])[:, 0].tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"not mutable here.*mutable=\['head_state'\]"):
        jax.eval_shape(model.apply, variables, x, LABELS)
    _, updates = jax.jit(lambda variables: model.apply(variables, x, LABELS, mutable=["head_state"]))(variables)
    assert np.asarray(updates["head_state"]["top"]["running"]["counts"])[:, 0].tolist() == [4, 6]


def test_nnx_state_moves_in_place_and_is_told_apart_by_filters():
    head = TemperatureHead(PriorCorrectedHead(name="inner"), name="t")
    model = jh.nn.NnxHead(head, 3, rngs=nnx.Rngs(0))
    graphdef, params, state = nnx.split(model, nnx.Param, jh.nn.HeadState)
    assert nnx.to_pure_dict(params).keys() == {"kernel", "bias", "learned"}
    assert nnx.to_pure_dict(state).keys() == {"running"}
    assert nnx.to_pure_dict(nnx.state(model)).keys() == {"kernel", "bias", "learned", "running"}
    merged = nnx.clone(nnx.merge(graphdef, params, state))
    nnx.jit(lambda module, x: module.update_state(x, LABELS))(merged, np.ones((4, 3), np.float32))
    assert merged.running["inner"]["counts"][...][:, 0].tolist() == [4, 6]
    assert model.running["inner"]["counts"][...][:, 0].tolist() == [1, 2]
    assert isinstance(merged.running["inner"]["counts"], jh.nn.HeadState)
    assert isinstance(merged.learned["log_temperature"], nnx.Param)


@BOTH
def test_axis_name_makes_loss_and_state_those_of_all_devices(kind):
    case = Case(kind, PriorCorrectedHead(), 3, kernel_init=linen.initializers.zeros_init())
    hidden, labels = np.ones((2, 2, 3), np.float32), LABELS.reshape(2, 2)
    masked = {k: v.reshape(2, 2) for k, v in MASKED.items()}

    def shard(hidden, labels, masked):
        state = case("update_state", hidden, labels, **masked, axis_name="i")
        return case("loss", hidden, labels, **masked, axis_name="i"), jax.tree.leaves(state)

    losses, counts = jax.jit(jax.vmap(shard, axis_name="i"))(hidden, labels, masked)
    # 4 in weights over 3 rows, of which one shard has two and the other one.
    np.testing.assert_allclose(losses, np.full(2, 4 * np.log(2) / 3), rtol=1e-6)
    assert counts[0][..., 0].tolist() == [[4, 6], [4, 6]]


def entry_named(name: str):
    return next(entry for entry in ZOO if entry.name == name)


@BOTH
@pytest.mark.parametrize(
    ("name", "lazy"),
    [("multi_class", False), ("nested", False), pytest.param("multi_head", True, marks=pytest.mark.slow)],
)
def test_loss_and_metrics_are_those_of_the_formula(kind, name, lazy):
    rng, entry = np.random.default_rng(1), entry_named(name)
    case = Case(kind, entry.head, 4, lazy=lazy, bias_init=drawn)
    hidden, labels = rng.normal(size=(5, 3, 4)).astype(np.float32), entry.labels(rng, (5, 3))
    masked: dict[str, Any] = {"weights": 0.5 + rng.random((5, 3)), "where": rng.random((5, 3)) < 0.7}
    fields = nested(case.values(case.params), "learned/")
    if name == "nested":
        fields["inner"] = {"counts": np.array([[1.0, 0.0], [2.0, 0.0]])}
    logits = case.logits(hidden)
    loss = case("loss", hidden, labels, **masked)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, entry.expected_loss(labels, logits, **masked, params=fields), rtol=2e-5)
    metrics = case("measure", hidden, labels, **masked).compute()
    expected = entry.expected_metrics(labels, logits, **masked, params=fields)
    # Areas have no closed form, only bounds.
    exact = {key: value for key, value in expected.items() if not key.startswith("auc")}
    assert exact.keys() <= metrics.keys()
    np.testing.assert_allclose([metrics[key] for key in exact], list(exact.values()), rtol=2e-5)


def test_multi_head_parameters_nest_under_the_names_of_its_heads():
    head = jh.MultiHead([OrdinalHead(4, name="stars"), PriorCorrectedHead(name="late"), jh.RegressionHead(2, name="r")])
    for kind in (LINEN, NNX):
        case = Case(kind, head, 5)
        shapes = {k: v.shape for k, v in case.values(case.params).items()}
        assert shapes == {"kernel": (5, 4), "bias": (4,), "learned/stars/cuts": (3,)}
        assert {k: v.shape for k, v in case.values(case.state).items()} == {"running/late/counts": (2, 2)}
        assert case("predictions", np.ones((2, 5), np.float32), {"stars": ("class_ids",)}).keys() == {"stars"}


@BOTH
@pytest.mark.parametrize("lazy", [False, True])
def test_gradients_are_those_of_the_formula(kind, lazy):
    rng = np.random.default_rng(2)
    case = Case(kind, jh.MultiClassHead(3), 4, lazy=lazy)
    assert isinstance(case("__call__", np.ones((1, 4), np.float32)), jh.LinearLogits if lazy else jax.Array)
    hidden, labels = rng.normal(size=(6, 4)).astype(np.float32), np.array([0, 2, 1, 1, 0, 2])
    z = case.logits(hidden)
    error = np.exp(z - np.logaddexp.reduce(z, -1, keepdims=True)) - np.eye(3)[labels]
    grads = case.values(jax.jit(jax.grad(lambda p: case("loss", hidden, labels, params=p)))(case.params))
    np.testing.assert_allclose(grads["kernel"], hidden.T @ error / 6, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grads["bias"], error.mean(0), rtol=1e-4, atol=1e-6)


@BOTH
def test_lazily_masked_rows_of_the_hidden_layer_may_hold_nan(kind):
    case = Case(kind, jh.BinaryClassHead(), 2, lazy=True, kernel_init=linen.initializers.zeros_init())
    hidden = np.array([[1, 2], [np.nan, np.inf]], np.float32)

    def loss(params):
        return case("loss", hidden, np.array([1, 0]), where=np.array([True, False]), params=params)

    # At logit 0 the gradient of the one row is -1/2 of its hidden layer.
    grads = case.values(jax.jit(jax.grad(loss))(case.params))
    np.testing.assert_allclose(grads["kernel"], [[-0.5], [-1.0]], rtol=1e-6)


@BOTH
@pytest.mark.parametrize("option", ["hidden", "dtype"])
def test_bfloat16_is_multiplied_into_float32(kind, option):
    """The rounding of the factors is in the answer, that of a bfloat16 logit (up to 0.4 %) is not."""
    rng = np.random.default_rng(3)
    narrow = {"param_dtype": jnp.bfloat16} if option == "hidden" else {"dtype": jnp.bfloat16}
    case = Case(kind, jh.RegressionHead(loss_reduction="sum"), 16, **narrow)
    assert case.values(case.params)["kernel"].dtype == (jnp.bfloat16 if option == "hidden" else jnp.float32)
    hidden = rng.normal(size=(32, 16)).astype(jnp.bfloat16 if option == "hidden" else np.float32)
    factors = [x.astype(jnp.bfloat16).astype(np.float64) for x in (hidden, nested(case.values(case.params))["kernel"])]
    logits, loss = jax.jit(lambda: (case("__call__", hidden), case("loss", hidden, np.zeros((32, 1)))))()
    assert logits.dtype == loss.dtype == jnp.float32
    np.testing.assert_allclose(logits, factors[0] @ factors[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(loss, ((factors[0] @ factors[1]) ** 2).sum(), rtol=1e-5)


@BOTH
def test_arguments_reach_the_head(kind):
    case = Case(kind, jh.RegressionHead(weight_column="w"), 1, kernel_init=linen.initializers.ones_init())
    hidden, labels = np.array([[1], [2]], np.float32), np.zeros(2, np.float32)
    features = {"w": np.array([3, 1], np.float32)}

    @jax.jit
    def run():
        losses = (
            case("loss", hidden, labels, features),
            case("loss", hidden, labels, features, [0.25, 0.5]),
            case("loss", hidden, labels, features, normalizer=14.0),
            case("loss", hidden, labels, features, where=np.array([False, True])),
        )
        return losses, case("measure", hidden, labels, features, [0.25])

    losses, metrics = jax.device_get(run())
    assert losses == ((3 * 1 + 4) / 2, 3.5 + 0.75, 0.5, 4)
    values = metrics.compute()
    assert values["average_loss"] == 7 / 4
    assert values["regularization_loss"] == 0.25
    with pytest.raises(ValueError, match="Weights are given twice"):
        case("loss", hidden, labels, features, weights=np.ones(2, np.float32))
    for method in ("loss", "measure"):
        with pytest.raises(ValueError, match="labels"):
            case(method, hidden, np.array([0, np.nan], np.float32), features, check=True)


@BOTH
def test_running_state_reads_the_weight_column(kind):
    case = Case(kind, PriorCorrectedHead(weight_column="w"), 3)
    state = jax.jit(lambda: case("update_state", np.ones((4, 3), np.float32), LABELS, {"w": WEIGHTS}))()
    assert case.values(state)["running/counts"][:, 0].tolist() == [1 + 4, 2 + 5]


@BOTH
def test_predictions_and_exports(kind):
    case = Case(kind, jh.BinaryClassHead(), 2, bias_init=linen.initializers.ones_init())
    hidden = np.array([[0.5, -2.0], [3.0, 1.0]], np.float32)
    p = 1 / (1 + np.exp(-case.logits(hidden)))
    found = case("predictions", hidden, ("logistic", "class_ids"))
    assert found.keys() == {"logistic", "class_ids"}
    np.testing.assert_allclose(found["logistic"], p, rtol=1e-6)
    assert np.array_equal(found["class_ids"], p > 0.5)
    exports = case("export_outputs", hidden)
    assert {"serving_default", "classification", "regression", "predict"} == exports.keys()
    np.testing.assert_allclose(exports["predict"].outputs["probabilities"], np.hstack([1 - p, p]), rtol=1e-5)
    with pytest.raises(ValueError, match="Unknown prediction key 'nonsense'"):
        case("predictions", hidden, "nonsense")


@BOTH
def test_options_of_the_last_layer(kind):
    constant = linen.initializers.constant
    case = Case(kind, jh.RegressionHead(2), 3, kernel_init=constant(2.0), bias_init=constant(5.0))
    assert np.array_equal(case("__call__", np.array([[1, 2, 3]], np.float32)), [[17.0, 17.0]])
    case = Case(kind, jh.RegressionHead(2), 3, use_bias=False, kernel_init=constant(2.0), param_dtype=jnp.float16)
    assert {k: (v.shape, v.dtype) for k, v in case.values(case.params).items()} == {"kernel": ((3, 2), np.float16)}
    assert np.array_equal(case("__call__", [[1, 2, 3]]), [[12.0, 12.0]])


def test_linen_is_initialized_under_jit_and_without_memory():
    model = jh.nn.LinenHead(TemperatureHead(PriorCorrectedHead(name="inner"), name="t"))
    expected = {
        "params": {"kernel": (3, 1), "bias": (1,), "learned": {"log_temperature": (1,)}},
        "head_state": {"running": {"inner": {"counts": (2, 2)}}},
    }
    hidden = jax.ShapeDtypeStruct((7, 3), jnp.float32)
    assert jax.tree.map(lambda x: x.shape, jax.eval_shape(model.init, KEY, hidden)) == expected
    variables = jax.jit(functools.partial(model.init, method="loss"))(KEY, np.ones((4, 3), np.float32), LABELS)
    assert jax.tree.map(jnp.shape, variables) == expected
    assert variables["params"]["learned"]["log_temperature"].tolist() == [0.25]
    assert variables["head_state"]["running"]["inner"]["counts"][:, 0].tolist() == [1, 2]


def test_nnx_is_initialized_under_jit_and_without_memory():
    def make():
        return jh.nn.NnxHead(OrdinalHead(4), 3, rngs=nnx.Rngs(0))

    shapes = jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(nnx.state(nnx.eval_shape(make))))
    assert shapes == {"kernel": (3, 1), "bias": (1,), "learned": {"cuts": (3,)}}
    assert nnx.jit(make)().learned["cuts"][...].tolist() == [-1, 0, 1]


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (jh.BinaryClassHead, "Given the class BinaryClassHead: make one"),
        ("binary", "Given a str"),
        (OrdinalHead(4).bind({"cuts": np.zeros(3, np.float32)}), "must be unbound.*Given a bound OrdinalHead"),
    ],
)
def test_what_is_no_unbound_head_is_refused(head, words):
    with pytest.raises(ValueError, match=words):
        jh.nn.LinenHead(head)
    with pytest.raises(ValueError, match=words):
        jh.nn.NnxHead(head, 3, rngs=nnx.Rngs(0))


@BOTH
@pytest.mark.parametrize(
    ("hidden", "words"),
    [
        (np.ones(3, np.float32), r"rank at least 2.*shape \(3,\).*hidden\[None\]"),
        (np.array([["a", "b", "c"]]), "array of numbers"),
        ([[1.0, 2.0, 3.0], [1.0]], "hidden must be an array"),
    ],
)
def test_a_wrong_hidden_layer_is_refused(kind, hidden, words):
    case = Case(kind, jh.BinaryClassHead(), 3)
    with pytest.raises(ValueError, match=words):
        case("__call__", hidden)


def test_a_hidden_layer_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"in_features = 3 wide. Given shape \(2, 5\).*in_features=5"):
        Case(NNX, jh.BinaryClassHead(), 3)("__call__", np.ones((2, 5), np.float32))
    with pytest.raises(Exception, match="kernel") as caught:
        Case(LINEN, jh.BinaryClassHead(), 3)("__call__", np.ones((2, 5), np.float32))
    assert "(5, 1)" in str(caught.value)
    assert "(3, 1)" in str(caught.value)


@BOTH
def test_what_the_module_owns_is_refused_by_the_train_state(kind):
    case = Case(kind, OrdinalHead(4), 2)
    with pytest.raises(ValueError, match="owns_head=False"):
        jh.TrainState.create(params=case.params, optimizer=optax.sgd(0.1), head=OrdinalHead(4), key=KEY)


class NormedNetwork(nnx.Module):
    """Batch norm and dropout before the head."""

    def __init__(self, rngs: nnx.Rngs):
        # Both modes are said: flax announces that it will no longer have a default.
        self.norm = nnx.BatchNorm(3, use_running_average=False, momentum=0.75, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=False, rngs=rngs)
        self.top = jh.nn.NnxHead(jh.RegressionHead(), 3, rngs=rngs)

    def __call__(self, x):
        return self.top(self.dropout(self.norm(x)))


def test_an_nnx_network_carries_its_state_through_make_train_step():
    """As the docstring of `NnxHead` says."""
    graphdef, params, rest = nnx.split(NormedNetwork(nnx.Rngs(0)), nnx.Param, ...)

    def apply_fn(params, features, *, train, model_state):
        model = nnx.merge(graphdef, params, model_state, copy=True)
        (model.train if train else model.eval)()
        logits = model(features["x"])
        return logits, nnx.state(model, nnx.Not(nnx.Param))

    head, optimizer = jh.RegressionHead(), optax.sgd(0.0)
    x = np.random.default_rng(0).normal(2, 3, size=(16, 3)).astype(np.float32)
    batch = {"features": {"x": x}, "labels": np.zeros(16, np.float32)}
    step = jax.jit(jh.make_train_step(head, apply_fn, optimizer, with_metrics=False), donate_argnums=0)
    state = jh.TrainState.create(params=params, optimizer=optimizer, head=head, key=KEY, model_state=rest)
    losses = []
    for _ in range(2):
        state, out = step(state, batch)
        losses.append(float(out.loss))
    # Nothing was learned, and yet the loss is another: the dropout's count moved.
    assert losses[0] != losses[1]
    mean = 0.25 * x.mean(0)
    moved: Any = nnx.to_pure_dict(state.model_state)["norm"]
    np.testing.assert_allclose(moved["mean"], 0.75 * mean + mean, rtol=1e-5)
    predicted = jax.jit(jh.make_predict_step(head, apply_fn))(state, batch)["predictions"]
    kernel = np.asarray(nnx.to_pure_dict(state.params)["top"]["kernel"], np.float64)
    normed = (x - np.asarray(moved["mean"], np.float64)) / np.sqrt(np.asarray(moved["var"], np.float64) + 1e-5)
    np.testing.assert_allclose(predicted, normed @ kernel, rtol=1e-4, atol=1e-5)
