"""`create_estimator_spec` beyond the original's cases: compiled, heads that learn, devices; what is refused."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from zoo import ZOO, OrdinalHead, PriorCorrectedHead, marked, ordinal_losses, sigmoid

import jaxheads as jh

RNG = np.random.default_rng(0)
N, RATE = 16, 0.5
X = RNG.normal(size=(N, 2)).astype(np.float32)
W = RNG.normal(size=(2, 1)).astype(np.float32)
LABELS = RNG.integers(0, 2, N)
WHERE = RNG.random(N) < 0.7
Z = X.astype(np.float64) @ W
GRADIENT = (X.T @ np.where(WHERE, sigmoid(Z[:, 0]) - LABELS, 0) / WHERE.sum())[:, None]
LOSS = (np.logaddexp(0, Z[:, 0]) - LABELS * Z[:, 0])[WHERE].mean()
HEAD = jh.BinaryClassHead(name="b")
SGD = optax.sgd(RATE)


def network(v):
    return X @ v["w"]


def train(head: jh.Head = HEAD, logits: Any = network, variables: Any = None, **more: Any) -> jh.EstimatorSpec:
    """A spec of training; eager, where nobody compiles it, and then each of its operations is a program."""
    given: dict[str, Any] = {"labels": LABELS, "optimizer": SGD, "where": WHERE, **more}
    variables = {"w": W} if variables is None and given["optimizer"] is not None else variables
    return head.create_estimator_spec({}, "train", logits, trainable_variables=variables, **given)


def compiled(**given: Any) -> jh.EstimatorSpec:
    return jax.jit(lambda: train(**given))()


@pytest.mark.parametrize("how", [pytest.param("eager", marks=pytest.mark.slow), "jit"])
def test_a_step_of_training(how):
    step = jax.jit(lambda w, n: train(variables=w, update_ops={"seen": lambda: n + 1}))
    spec = step({"w": W}, 1) if how == "jit" else train(update_ops={"seen": lambda: np.int32(2)})
    assert spec.mode == "train"
    np.testing.assert_allclose([spec.loss, spec.summaries["loss/b"]], LOSS, rtol=1e-6)
    np.testing.assert_allclose(spec.train_op.params["w"], W - RATE * GRADIENT, rtol=1e-5)
    np.testing.assert_allclose(spec.predictions["logistic"], sigmoid(Z), rtol=1e-5)
    np.testing.assert_allclose(spec.metrics.compute()["average_loss/b"], LOSS, rtol=1e-6)
    assert spec.update_ops == {"seen": 2}
    assert spec.export_outputs is None


def test_the_state_of_optimizer_and_model_goes_on():
    momentum = optax.sgd(RATE, momentum=0.5)

    def with_state(v):
        return network(v), {"mean": jnp.mean(network(v))}

    first = compiled(logits=with_state, optimizer=momentum)
    np.testing.assert_allclose(first.train_op.model_state["mean"], Z.mean(), rtol=1e-5)
    second = compiled(
        logits=with_state, optimizer=momentum, variables=first.train_op.params, opt_state=first.train_op.opt_state
    )
    z = X.astype(np.float64) @ np.asarray(first.train_op.params["w"], np.float64)
    gradient = (X.T @ np.where(WHERE, sigmoid(z[:, 0]) - LABELS, 0) / WHERE.sum())[:, None]
    expected = np.asarray(first.train_op.params["w"]) - RATE * (gradient + 0.5 * GRADIENT)
    np.testing.assert_allclose(second.train_op.params["w"], expected, rtol=1e-5)


def test_a_head_that_learns_is_trained_by_a_function():
    head = OrdinalHead(3)
    variables = {"w": W, "head": head.init(jax.random.key(0))}
    labels = RNG.integers(0, 3, N)
    spec = compiled(head=head, variables=variables, labels=labels, params=lambda v: v["head"])

    def loss(cuts):
        return ordinal_losses(labels[WHERE, None], Z[WHERE], {"cuts": cuts}).mean()

    cuts = np.asarray(variables["head"]["cuts"], np.float64)
    slopes = [(loss(cuts + step) - loss(cuts - step)) / 2e-5 for step in 1e-5 * np.eye(2)]
    np.testing.assert_allclose(spec.loss, loss(cuts), rtol=1e-5)
    np.testing.assert_allclose(spec.train_op.params["head"]["cuts"], cuts - RATE * np.array(slopes), rtol=1e-4)
    assert spec.train_op.head_state == {}


def test_running_fields_move_in_training_alone():
    head = PriorCorrectedHead()
    state = head.init_state()
    counts = compiled(head=head, params=state).train_op.head_state["counts"]
    np.testing.assert_allclose(np.sum(counts, -1), [1 + LABELS[WHERE].sum(), 2 + WHERE.sum()])
    assert jax.eval_shape(lambda: head.create_estimator_spec({}, "eval", X @ W, LABELS, params=state)).train_op is None


def test_a_function_of_the_loss_may_ask_for_gradients():
    spec = compiled(optimizer=None, variables={"w": W}, train_op_fn=lambda loss, grads: (loss * 2, grads))
    np.testing.assert_allclose(spec.train_op[0], 2 * LOSS, rtol=1e-6)
    np.testing.assert_allclose(spec.train_op[1]["w"], GRADIENT, rtol=1e-5)
    # What it gives is given as it is, called eagerly.
    plain = jh.RegressionHead()
    assert train(plain, logits=X @ W, optimizer=None, train_op_fn=lambda loss: "done").train_op == "done"
    # Bound already, or there only if wanted: nobody asks for gradients.
    for fn in (lambda loss, grads=3: grads, functools.partial(lambda loss, grads: grads, grads=3)):
        assert train(plain, logits=X @ W, optimizer=None, train_op_fn=fn).train_op == 3


def test_states_are_there_with_a_function_of_the_loss_too():
    spec = compiled(
        head=PriorCorrectedHead(),
        logits=lambda v: (network(v), {"mean": jnp.mean(network(v))}),
        optimizer=None,
        variables={"w": W},
        train_op_fn=lambda loss, grads: grads,
        params=PriorCorrectedHead().init_state(),
    )
    np.testing.assert_allclose(spec.model_state["mean"], Z.mean(), rtol=1e-5)
    np.testing.assert_allclose(np.sum(spec.head_state["counts"], -1), [1 + LABELS[WHERE].sum(), 2 + WHERE.sum()])


@pytest.mark.parametrize("check_vma", [pytest.param(False, marks=pytest.mark.slow), True])
def test_devices_do_not_matter(check_vma):
    mesh, all_of_it, rows = jax.make_mesh((8,), ("d",)), PartitionSpec(), PartitionSpec("d")

    def step(w, x, labels, where):
        def with_mean(v):
            return x @ v["w"], {"mean": jnp.mean(x @ v["w"]), "steps": 3}

        spec = HEAD.create_estimator_spec({}, "train", with_mean, labels, SGD, w, where=where, axis_name="d")
        return spec.loss, spec.train_op.params, spec.metrics, spec.summaries, spec.model_state["mean"]

    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(all_of_it, rows, rows, rows), out_specs=all_of_it, check_vma=check_vma
    )
    batch = jax.device_put((X, LABELS, WHERE), NamedSharding(mesh, rows))
    loss, params, metrics, summaries, mean = jax.jit(mapped)(
        jax.device_put({"w": W}, NamedSharding(mesh, all_of_it)), *batch
    )
    np.testing.assert_allclose(mean, Z.mean(), rtol=1e-5)
    np.testing.assert_allclose([loss, summaries["loss/b"], metrics.compute()["average_loss/b"]], LOSS, rtol=1e-6)
    np.testing.assert_allclose(params["w"], W - RATE * GRADIENT, rtol=1e-5)


# Of the built-in heads the specs are TensorFlow's, in test_goldens.py.
@pytest.mark.parametrize("entry", marked(ZOO, quick=("nested", "survival")))
def test_every_head_has_all_three_modes(entry):
    rng = np.random.default_rng(1)
    labels, logits = entry.labels(rng, (6,)), entry.logits(rng, (6,))
    expected = entry.expected_loss(labels, logits)
    head, params = entry.head, entry.params()

    def spec_of(mode, **given):
        return head.create_estimator_spec(None, mode, logits, labels, params=params, **given)

    training = {"train_op_fn": lambda loss: loss + 1}
    modes: dict[str, Any] = {"train": training, "eval": {}, "infer": {}}
    if entry.name == "multi_head":
        # As in the original: what several reductions add up to has none.
        with pytest.raises(ValueError, match="loss_reduction must be the same"):
            spec_of("train", **modes.pop("train"))
    specs = jax.jit(lambda: [spec_of(mode, **given) for mode, given in modes.items()])()
    for mode, spec in zip(modes, specs, strict=True):
        like = jax.eval_shape(lambda: head.predictions(logits, params=params))
        assert jax.tree.structure(spec.predictions) == jax.tree.structure(like)
        if mode != "infer":
            np.testing.assert_allclose(spec.loss, expected, rtol=2e-5)
            assert spec.metrics.head == head
        assert (spec.export_outputs is None) == (mode != "infer")
        if mode == "train":
            np.testing.assert_allclose(spec.train_op, expected + 1, rtol=2e-5)
            total = spec.summaries[f"loss/{head.suffix}" if head.suffix and not entry.parts else "loss"]
            np.testing.assert_array_equal(total, spec.loss)


def test_the_lengths_of_sequences_are_served_with_the_predictions():
    head = jh.SequentialHeadWrapper(jh.RegressionHead(), sequence_lengths="n")
    lengths = np.array([2, 1])
    spec = head.create_estimator_spec({"n": lengths}, "infer", np.zeros((2, 3, 1)))
    np.testing.assert_array_equal(spec.predictions["n"], lengths)
    assert "n" not in spec.export_outputs["predict"].outputs
    clashing = jh.SequentialHeadWrapper(jh.RegressionHead(), "predictions")
    with pytest.raises(ValueError, match="'predictions' of the mask is a prediction key too"):
        clashing.create_estimator_spec({"predictions": np.ones((2, 3))}, "infer", np.zeros((2, 3, 1)))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"logits": X @ W}, r"logits must be a function(.|\n)*no gradient(.|\n)*ndarray"),
        ({"optimizer": "adam"}, r"optax.GradientTransformation(.|\n)*'adam' of type str"),
        ({"optimizer": optax.adam}, r"optax.GradientTransformation(.|\n)*type function"),
        ({"train_op_fn": lambda loss: loss}, "cannot both be set"),
        ({"optimizer": None}, "cannot both be None"),
        ({"optimizer": None, "train_op_fn": 3}, "train_op_fn must be a function(.|\n)*3"),
        ({"optimizer": None, "train_op_fn": lambda loss, grads: loss}, "trainable_variables cannot be None"),
        ({"optimizer": None, "train_op_fn": lambda loss: None, "logits": X @ W}, "Missing train_op"),
        ({"labels": None}, "provide labels"),
        ({"logits": lambda v: (1, 2, 3)}, "Given 3 values"),
        ({"regularization_losses": 3.0}, r"must be a list of scalars(.|\n)*\[x\]"),
        ({"opt_state": optax.adam(RATE).init({"w": W})}, r"opt_state(.|\n)*optimizer.init\(variables\)"),
        ({"opt_state": SGD.init({"w": W}), "optimizer": optax.adam(RATE)}, r"opt_state(.|\n)*mu"),
        (
            {"opt_state": optax.sgd(1.0, 0.9).init({"w": np.zeros(3)}), "optimizer": optax.sgd(1.0, 0.9)},
            r"opt_state(.|\n)*\[3\](.|\n)*\[2, 1\]",
        ),
        ({"params": {"cuts": W}}, r"no learned or running field \['cuts'\]"),
    ],
)
def test_what_does_not_fit_is_refused(given, match):
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(lambda: train(**given))


def test_functions_of_variables_that_are_not_there_are_refused():
    every: tuple[dict[str, Any], ...] = ({"logits": network}, {"logits": X @ W, "params": lambda v: v})
    for given in every:
        with pytest.raises(ValueError, match="as a function of them"):
            HEAD.create_estimator_spec({}, "eval", labels=LABELS, **given)
    with pytest.raises(ValueError, match="has learned or running fields without values"):
        OrdinalHead(3).create_estimator_spec({}, "eval", X @ W, LABELS)
