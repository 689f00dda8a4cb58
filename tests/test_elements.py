"""Elements that are more than a row of logits: entries with masks, sequences, two towers, no labels, random draws."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from jax.experimental import checkify
from scipy.special import expit
from sklearn.metrics import roc_auc_score
from zoo import CoxHead, InfoNceHead

import jaxheads as jh

N, C = 12, 3
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 2, (N, C)).astype(np.float32)
LOGITS = RNG.normal(size=(N, C)).astype(np.float32)
WEIGHTS = RNG.choice(np.array([0, 0.5, 1, 3], np.float32), (N, C))
WHERE = RNG.random((N, C)) < 0.7
WHERE[2] = False


# Missing labels: masks and weights of single entries


def entries(labels: Any, logits: Any) -> np.ndarray:
    return zoo.cross_entropy(labels, logits.astype(np.float64), None)


@jax.jit
def of_entries(labels, logits, weights, where):
    def each(reduction):
        head = jh.MultiLabelHead(C, loss_reduction=reduction, classes_for_class_based_metrics=(1,))
        return jax.value_and_grad(lambda z: head.loss(labels, z, weights=weights, where=where))(logits), head.measure(
            labels, logits, weights=weights, where=where
        )

    return {reduction.value: each(reduction) for reduction in jh.Reduction}


def test_missing_labels_of_some_classes_are_absent():
    hidden = ~WHERE | (WEIGHTS == 0)
    spoiled = np.where(hidden, np.float32(np.nan), LABELS), np.where(hidden, np.float32(np.inf), LOGITS)
    found = of_entries(*spoiled, WEIGHTS, WHERE)
    w = np.where(WHERE, WEIGHTS, 0).astype(np.float64)
    total = (w * np.where(hidden, 0, entries(LABELS, LOGITS))).sum()
    by = {"sum": C, "sum_over_batch_size": WHERE.sum(), "mean": w.sum(), "sum_by_nonzero_weights": (w > 0).sum()}
    for reduction, ((loss, gradient), metrics) in found.items():
        np.testing.assert_allclose(loss, total / by[reduction], rtol=2e-6, err_msg=reduction)
        exact = w * (expit(LOGITS.astype(np.float64)) - LABELS) / by[reduction]
        np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=1e-7, err_msg=reduction)
        values = metrics.compute(bounds=True)
        np.testing.assert_allclose(values["average_loss"], total / w.sum(), rtol=2e-6)
        there, one = ~hidden, ~hidden[:, 1]
        area = roc_auc_score(LABELS[there], LOGITS[there], sample_weight=w[there])
        assert values["auc/lower"] - 1e-6 <= area <= values["auc/upper"] + 1e-6
        mean = (w[one, 1] * expit(LOGITS[one, 1])).sum() / w[one, 1].sum()
        np.testing.assert_allclose(values["probability_mean/class1"], mean, rtol=2e-6)


def test_rows_are_entries_that_share_a_mask():
    """A mask of rows gives the same as that mask for each entry."""
    where = WHERE.any(-1, keepdims=True)
    one, many = (of_entries(LABELS, LOGITS, np.ones_like(w, np.float32), w) for w in (where, where.repeat(C, -1)))
    for reduction in one:
        chex.assert_trees_all_close(one[reduction][0], many[reduction][0], rtol=1e-6, atol=1e-8)
        chex.assert_trees_all_close(*(x[reduction][1].compute(bounds=True) for x in (one, many)), rtol=1e-6)


def test_missing_labels_are_let_through_on_the_host_and_illegal_ones_are_not():
    labels = np.where(WHERE, LABELS, np.float32(np.nan))
    head = jh.MultiLabelHead(C)
    exact = np.where(WHERE, entries(LABELS, LOGITS), 0).sum() / WHERE.sum()
    np.testing.assert_allclose(head.loss(labels, LOGITS, where=WHERE), exact, rtol=2e-6)
    np.testing.assert_array_equal(head.encode_labels(labels, WHERE), labels)
    row, column = np.argwhere(WHERE)[3]
    labels[row, column] = np.nan
    for call in (head.loss, head.measure):
        with pytest.raises(ValueError, match=rf"\({row}, {column}\)"):
            call(labels, LOGITS, where=WHERE)
    with pytest.raises(ValueError, match=rf"\({row}, {column}\)"):
        head.encode_labels(labels, WHERE)


def test_a_loss_of_ones_own_is_of_whole_rows():
    head = jh.MultiLabelHead(C, loss_fn=lambda labels, logits: jnp.mean((labels - logits) ** 2, -1, keepdims=True))
    with pytest.raises(ValueError, match=r"\(12, 3\)"):
        head.loss(LABELS, LOGITS, where=WHERE)


def test_missing_targets_of_a_regression():
    labels = np.where(WHERE, LABELS, np.float32(np.nan))
    head = jh.RegressionHead(C)
    loss, gradient = jax.jit(jax.value_and_grad(lambda z: head.loss(labels, z, where=WHERE)))(LOGITS)
    errors = np.where(WHERE, LOGITS.astype(np.float64) - LABELS, 0)
    np.testing.assert_allclose(loss, (errors**2).sum() / WHERE.sum(), rtol=2e-6)
    np.testing.assert_allclose(gradient, 2 * errors / WHERE.sum(), rtol=1e-5, atol=1e-7)
    constants = head.constant_logits(labels, where=WHERE)
    np.testing.assert_allclose(constants, [LABELS[WHERE[:, c], c].mean() for c in range(C)], rtol=1e-6)


def test_entries_train_alike_in_parts():
    """Micro-batches are divided by the entries of the whole batch."""
    batch = {"features": LOGITS, "labels": np.where(WHERE, LABELS, np.float32(np.nan)), "where": WHERE}
    head, optimizer = jh.MultiLabelHead(C), optax.sgd(0.5)
    state = jh.TrainState.create(
        params={"w": np.ones((1, C), np.float32)}, optimizer=optimizer, head=head, key=jax.random.key(0)
    )
    whole, parts = (
        jax.jit(jh.make_train_step(head, lambda p, x: x * p["w"], optimizer, micro_batches=n))(state, batch)
        for n in (1, 4)
    )
    chex.assert_trees_all_close(whole[0].params, parts[0].params, rtol=1e-6)
    np.testing.assert_allclose(whole[1].loss, parts[1].loss, rtol=1e-6)


# Metrics whose unit is a sequence


def test_exact_match_is_of_whole_sequences():
    rng = np.random.default_rng(1)
    labels, logits = rng.integers(0, 3, (40, 4)), rng.normal(size=(40, 4, 3)).astype(np.float32)
    predicted = logits.argmax(-1)
    labels = np.where(rng.random((40, 4)) < 0.8, predicted, labels)
    mask = np.arange(4)[None] < rng.integers(0, 5, (40, 1))  # some have no steps at all
    weights = np.where(rng.random((40, 4)) < 0.1, 0, rng.choice([1.0, 2.0], (40, 1))).astype(np.float32)
    head = jh.SequentialHeadWrapper(jh.MultiClassHead(3)).with_metrics(jh.metrics.ExactMatch())
    features = {"sequence_length_mask": mask}
    found = jax.jit(lambda: head.measure(labels, logits, features, weights=weights))().compute()["exact_match"]
    live = mask & (weights > 0)
    rows = live.any(-1)
    right = ((predicted == labels) | ~live).all(-1)
    each = np.array([w[own].mean() if own.any() else 0 for w, own in zip(weights, live, strict=True)])
    np.testing.assert_allclose(found, (each * right)[rows].sum() / each[rows].sum(), rtol=1e-6)
    # Of batches it is that of all sequences.
    parts = [head.measure(labels[i::3], logits[i::3], {"sequence_length_mask": mask[i::3]}, weights=weights[i::3])
             for i in range(3)]  # fmt: skip
    np.testing.assert_allclose(jh.Metrics.merge(parts).compute()["exact_match"], found, rtol=1e-6)


def test_exact_match_of_rows():
    head = jh.MultiLabelHead(C).with_metrics(jh.metrics.ExactMatch())
    plain = head.measure(LABELS, LOGITS).compute()["exact_match"]
    np.testing.assert_allclose(plain, ((LOGITS > 0) == LABELS).all(-1).mean(), rtol=1e-6)
    masked = head.measure(LABELS, LOGITS, where=WHERE).compute()["exact_match"]
    right = (((LOGITS > 0) == LABELS) | ~WHERE).all(-1)[WHERE.any(-1)]
    np.testing.assert_allclose(masked, right.mean(), rtol=1e-6)
    with pytest.raises(ValueError, match="decisions of a head of classes"):
        jh.RegressionHead().with_metrics(jh.metrics.ExactMatch())


# Rows that look at each other


class UndeclaredHead(jh.Head):
    """A mean over rows, and not a word of it."""

    logits_dimension = 1

    def losses(self, labels, logits):
        return (labels - logits + jnp.mean(logits)) ** 2


class UndeclaredMetricHead(jh.Head):
    """A loss of each row, and an observation of all."""

    logits_dimension = 1

    def losses(self, labels, logits):
        return (labels - logits) ** 2

    def observe(self, labels, logits):
        return {"spread": jh.Mean(jnp.abs(logits - jnp.mean(logits)))}


class UndeclaredMarginHead(jh.Head):
    """A margin between rows, which no two rows of the usual size are within."""

    logits_dimension = 1

    def losses(self, labels, logits):
        return jnp.sum(jnp.maximum(0.01 - (logits - logits.T) ** 2, 0), -1, keepdims=True)


class UndeclaredSumHead(jh.Head):
    """A loss that asks for the other devices, and multiplies the answer by 0 where it is tried."""

    logits_dimension = 1

    def losses(self, labels, logits, rows):
        return (labels - logits) ** 2 + 0 * rows.devices.sum(jnp.sum(logits))


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (UndeclaredHead(), "loss"),
        (UndeclaredMetricHead(), "observation"),
        (UndeclaredMarginHead(), "loss"),
        (UndeclaredSumHead(), "loss"),
    ],
)
def test_rows_that_look_at_each_other_in_silence_are_refused(head, what):
    labels, logits = LABELS[:, 0], LOGITS[:, :1]
    for call in (
        lambda: head.loss(labels, logits),
        lambda: head.measure(labels, logits),
        lambda: jax.eval_shape(lambda z: head.loss(labels, z), logits),
        lambda: jax.eval_shape(jax.grad(lambda z: head.loss(labels, z)), logits),
    ):
        with pytest.raises(ValueError, match=rf'another {what} when the other rows change.*coupling = "batch"'):
            call()


def test_a_coupling_that_is_none_is_refused():
    class AllHead(UndeclaredHead):
        coupling = "all"

    with pytest.raises(ValueError, match=r"coupling must be one of .*'all'"):
        AllHead().loss(LABELS[:, 0], LOGITS[:, :1])


def test_parts_of_a_batch_of_coupled_rows_are_refused():
    labels = {"time": np.ones((N, 1), np.float32), "event": np.ones((N, 1), bool)}
    with pytest.raises(ValueError, match=r"looks at the other rows of its batch(.|\n)*CoxHead"):
        CoxHead().divisor(labels, LOGITS[:, :1])
    with pytest.raises(ValueError, match="looks at the other rows"):
        jh.make_train_step(CoxHead(), lambda p, x: x * p, optax.sgd(0.1), micro_batches=2)


# No labels, two towers, random draws, shared work


def test_a_head_without_labels_trains_two_towers():
    head, optimizer = InfoNceHead(), optax.sgd(0.1)

    def towers(params, features):
        return {name: features[name] @ params[name] for name in ("query", "key")}

    rng = np.random.default_rng(0)
    shared = rng.normal(size=(16, 4)).astype(np.float32)
    features = {"query": shared, "key": shared + 0.1 * rng.normal(size=(16, 4)).astype(np.float32)}
    params = {name: rng.normal(size=(4, 3)).astype(np.float32) for name in ("query", "key")}
    state = jh.TrainState.create(params=params, optimizer=optimizer, head=head, key=jax.random.key(0))
    step = jax.jit(jh.make_train_step(head, towers, optimizer))
    losses, out = [], None
    for _ in range(40):
        state, out = step(state, {"features": features})
        losses.append(float(out.loss))
    assert out is not None
    assert losses[-1] < 0.3 * losses[0]
    np.testing.assert_allclose(out.metrics.compute()["average_loss"], losses[-1], rtol=1e-6)
    measured = jh.make_eval_step(head, towers)(state, {"features": features})
    assert measured.loss < losses[-1]
    with pytest.raises(ValueError, match=r"keys \['key', 'query'\]"):
        head.loss(None, {"query": LOGITS})
    with pytest.raises(ValueError, match="leading axes"):
        head.loss(None, {"query": LOGITS, "key": LOGITS[:4]})


class NoisyHead(jh.Head):
    """Squared error of a noisy logit, which also draws a prediction."""

    logits_dimension = 1
    coupling = "row"
    samples = True

    def losses(self, labels, logits, rows):
        return (labels - logits - jax.random.normal(rows.key, logits.shape)) ** 2

    def outputs(self, logits, rows):
        return {"mean": logits, "sample": lambda: logits + jax.random.normal(rows.key, logits.shape)}


def test_heads_that_draw_need_a_key():
    head, key = NoisyHead(), jax.random.key(3)
    labels, logits = LABELS[:, :1], LOGITS[:, :1]
    noise = np.asarray(jax.random.normal(key, logits.shape), np.float64)
    exact = ((labels - logits - noise) ** 2).mean()
    np.testing.assert_allclose(head.loss(labels, logits, key=key), exact, rtol=2e-6)
    measured = head.measure(labels, logits, key=key).compute()
    np.testing.assert_allclose(measured["average_loss"], exact, rtol=2e-6)
    np.testing.assert_allclose(head.predictions(logits, "sample", key=key)["sample"], logits + noise, rtol=1e-6)
    for call in (head.loss, head.measure):
        with pytest.raises(ValueError, match=r"drawn at random(.|\n)*key="):
            call(labels, logits)
    optimizer = optax.sgd(0.1)
    state = jh.TrainState.create(params=np.ones((1, 1), np.float32), optimizer=optimizer, head=head, key=key)
    step = jax.jit(jh.make_train_step(head, lambda p, x: x * p, optimizer))
    batch = {"features": logits, "labels": labels}
    after, first = step(state, batch)
    _, second = step(dataclasses.replace(after, params=state.params), batch)
    assert first.loss != second.loss  # a new key at every step
    parts = jax.jit(jh.make_train_step(head, lambda p, x: x * p, optimizer, micro_batches=2))
    assert np.isfinite(parts(state, batch)[1].loss)


class SharedHead(jh.Head):
    """Loss and metric of one costly value, which `prepare` makes."""

    logits_dimension = 1
    coupling = "row"

    def prepare(self, labels, logits, rows):
        COUNT.append(1)
        return jnp.exp(logits)

    def losses(self, labels, logits, rows):
        return rows.prepared - labels * logits

    def observe(self, labels, logits, rows):
        return {"rate": jh.Mean(rows.prepared)}


COUNT: list[int] = []


def test_what_loss_and_metrics_share_is_made_once():
    head, optimizer = SharedHead(), optax.sgd(0.1)
    labels, logits = LABELS[:, :1], LOGITS[:, :1]
    exact = np.exp(logits.astype(np.float64))
    np.testing.assert_allclose(head.loss(labels, logits), (exact - labels * logits).mean(), rtol=2e-6)
    np.testing.assert_allclose(head.measure(labels, logits).compute()["rate"], exact.mean(), rtol=2e-6)
    step = jh.make_train_step(head, lambda p, x: x * p, optimizer)
    state = jh.TrainState.create(
        params=np.ones((1, 1), np.float32), optimizer=optimizer, head=head, key=jax.random.key(0)
    )
    COUNT.clear()
    jax.eval_shape(step, state, {"features": logits, "labels": labels})
    assert len(COUNT) == 1


class ExposureHead(jh.Head):
    """Poisson counts at an exposure, which predictions read too."""

    logits_dimension = 1
    coupling = "row"
    reads_features = True
    label_spec = jh.LabelSpec(1, "float", 0)

    def losses(self, labels, logits, rows):
        rate = logits + jnp.log(rows.features["exposure"])[:, None]
        return jnp.exp(rate) - labels * rate

    def outputs(self, logits, rows):
        return {"count": jnp.exp(logits) * rows.features["exposure"][:, None]}


def test_predictions_may_read_features():
    head, exposure = ExposureHead(), np.linspace(1, 3, N, dtype=np.float32)
    labels, logits = LABELS[:, :1], LOGITS[:, :1]
    z = logits.astype(np.float64) + np.log(exposure)[:, None]
    np.testing.assert_allclose(
        head.loss(labels, logits, {"exposure": exposure}), (np.exp(z) - labels * z).mean(), rtol=2e-6
    )
    predicted = head.predictions(logits, features={"exposure": exposure})["count"]
    np.testing.assert_allclose(predicted, np.exp(z), rtol=2e-6)
    state = jh.TrainState.create(
        params=np.ones((1, 1), np.float32), optimizer=optax.sgd(0.1), head=head, key=jax.random.key(0)
    )
    step = jh.make_predict_step(head, lambda p, features: features["x"] * p)
    served = step(state, {"features": {"x": logits, "exposure": exposure}})["count"]
    np.testing.assert_allclose(served, np.exp(z), rtol=2e-6)


# Faults that were found by reading


class PlaneHead(jh.Head):
    """A plane of numbers an element, and one label: the squared error of its mean."""

    logits_dimension = 1
    logits_spec = (512, 512)
    coupling = "row"

    def losses(self, labels, logits):
        return (labels - jnp.mean(logits, axis=(-2, -1))[..., None]) ** 2


def test_elements_with_an_inside_are_measured_in_tiles():
    labels, logits = LABELS[:4, :1], RNG.normal(size=(4, 512, 512)).astype(np.float32)
    measured = PlaneHead().measure(labels, logits, where=np.array([True, False, True, True]))
    exact = ((labels[:, 0] - logits.mean((1, 2), dtype=np.float64)) ** 2)[[0, 2, 3]].mean()
    np.testing.assert_allclose(measured.compute()["average_loss"], exact, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("head", [jh.BinaryClassHead(), jh.SequentialHeadWrapper(jh.BinaryClassHead(), None)], ids=repr)
def test_parts_of_a_batch_have_the_axes_of_their_logits(head):
    """Labels `[N, 1]` of one step each are those of logits `[N, 1, 1]`."""
    batch = {"features": LOGITS[:, :1, None], "labels": LABELS[:, :1], "where": WHERE[:, :1]}
    state = jh.TrainState.create(
        params=np.ones((1, 1, 1), np.float32), optimizer=optax.sgd(0.1), head=head, key=jax.random.key(0)
    )
    losses = [
        jax.jit(jh.make_train_step(head, lambda p, x: x * p, optax.sgd(0.1), micro_batches=n))(state, batch)[1].loss
        for n in (1, 3)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


def test_a_divisor_needs_no_logits():
    for head in (jh.BinaryClassHead(loss_reduction="mean"), jh.MultiLabelHead(C)):
        labels, n = LABELS[:, : head.logits_dimension], head.logits_dimension
        with_logits = head.divisor(labels, LOGITS[:, :n], weights=WEIGHTS[:, :1])
        chex.assert_trees_all_close(head.divisor(labels, weights=WEIGHTS[:, :1]), with_logits)


def test_a_sequence_inside_a_task_inside_a_sequence_has_its_mask():
    inner = jh.SequentialHeadWrapper(jh.BinaryClassHead(name="b"), "own")
    tasks = jh.MultiHead([inner, jh.RegressionHead(name="r")])
    head = jh.SequentialHeadWrapper(tasks, "whole")
    rng = np.random.default_rng(2)
    own, whole = rng.random((6, 4)) < 0.6, rng.random((6, 4)) < 0.6
    labels = {"b_sequential": rng.integers(0, 2, (6, 4)), "r": rng.normal(size=(6, 4)).astype(np.float32)}
    logits = rng.normal(size=(6, 4, 2)).astype(np.float32)
    z, both = logits.astype(np.float64), own & whole
    exact = (np.logaddexp(0, z[..., 0]) - labels["b_sequential"] * z[..., 0])[both].mean()
    exact += ((z[..., 1] - labels["r"]) ** 2)[whole].mean()
    for columns in (None, ("own",)):
        given = dataclasses.replace(head, feature_columns=columns)
        loss = jax.jit(given.loss)(labels, logits, {"own": own, "whole": whole})
        np.testing.assert_allclose(loss, exact, rtol=2e-6)


def test_predictions_of_sequences_see_the_columns_that_the_loss_sees():
    class SpreadHead(jh.Head):
        logits_dimension = 1
        coupling = "row"
        reads_features = True

        def losses(self, labels, logits, rows):
            return (labels - logits * rows.features["scale"]) ** 2

        def outputs(self, logits, rows):
            return {"mean": logits * rows.features["scale"]}

    head = jh.SequentialHeadWrapper(SpreadHead(), None, feature_columns="scale")
    logits, scale = LOGITS.reshape(N, C, 1), WEIGHTS
    predicted = head.predictions(logits, features={"scale": scale, "other": np.zeros(3)})["mean"]
    np.testing.assert_allclose(predicted, logits * scale[..., None], rtol=1e-6)
    exact = ((LABELS[..., None] - predicted) ** 2).mean()
    np.testing.assert_allclose(head.loss(LABELS, logits, {"scale": scale}), exact, rtol=2e-6)


def test_steps_that_look_at_each_other_have_no_hessian_of_one():
    class CenteredStepsHead(jh.Head):
        logits_dimension = 1
        coupling = "sequence"

        def losses(self, labels, logits):
            return (labels - logits - jnp.mean(logits, axis=1, keepdims=True)) ** 2

    with pytest.raises(ValueError, match="no Hessian of a row alone"):
        jh.boosting.derivatives(CenteredStepsHead(), LABELS, LOGITS[..., None], hessian="exact")
    gradient, _ = jh.boosting.derivatives(CenteredStepsHead(), LABELS, LOGITS[..., None], hessian="unit")
    assert gradient.shape == (N, C, 1)
    with pytest.raises(ValueError, match="which takes a dict"):
        jh.boosting.derivatives(InfoNceHead(), None, {"query": LOGITS, "key": LOGITS})


def test_exact_match_knows_what_is_not_right():
    head = jh.MultiLabelHead(C).with_metrics(jh.metrics.ExactMatch())
    broken = jax.device_put(np.full((2, C), np.nan, np.float32))
    assert head.measure(np.zeros((2, C), np.int32), broken).compute()["exact_match"] == 0
    with pytest.raises(ValueError, match="too narrow"):
        dataclasses.replace(head, bootstrap=jh.Bootstrap(10))


def test_a_bad_entry_leaves_its_row_in_the_divisor():
    head = jh.MultiHead([jh.RegressionHead(2, name="r")])
    labels = jax.device_put({"r": np.array([[1, np.nan], [3, 5]], np.float32)})
    where = {"r": np.ones((2, 2), bool)}
    measured = head.measure(labels, np.zeros((2, 2), np.float32), where=where)
    with pytest.warns(jh.BadInputWarning):
        values = measured.compute()
    np.testing.assert_allclose([values["loss/r"], values["average_loss/r"]], [35 / 3] * 2, rtol=1e-6)


def test_a_silent_head_hides_illegal_labels():
    head = jh.MultiHead([jh.RegressionHead(name="r"), jh.BinaryClassHead(name="b")], [1.0, 0.0])
    labels = {"r": LABELS[:, :1], "b": np.full((N, 1), 7, np.int32)}
    error, loss = checkify.checkify(jax.jit(head.loss), errors=checkify.user_checks)(labels, jnp.asarray(LOGITS[:, :2]))
    error.throw()
    assert np.isfinite(loss)
    loud = jh.MultiHead(head.heads)
    error, _ = checkify.checkify(jax.jit(loud.loss), errors=checkify.user_checks)(labels, jnp.asarray(LOGITS[:, :2]))
    assert "illegal label" in str(error.get())


def test_hooks_may_have_fewer_arguments_or_those_of_before():
    class OldHead(jh.Head):
        logits_dimension = 1
        coupling = "row"
        samples = True
        seen: Any = jh.running(lambda head: jnp.zeros(()))

        def prepare(self, labels, logits):
            return logits**2

        def losses(self, labels, logits, rows):
            return labels + rows.prepared

        def observe(self, labels, logits, rows):
            return {"noise": jh.Mean(jax.random.normal(rows.key, logits.shape))}

        def advance(self, labels, logits, w, total):
            return {"seen": self.seen + total(jnp.sum(w))}

    head, key = OldHead(), jax.random.key(0)
    state, labels, logits = head.init_state(), LABELS[:, :1], LOGITS[:, :1]
    exact = (labels + logits.astype(np.float64) ** 2).mean()
    np.testing.assert_allclose(head.loss(labels, logits, params=state, key=key), exact, rtol=2e-6)
    assert np.isfinite(head.measure(labels, logits, params=state, key=key).compute()["noise"])
    new = head.update_state(state, labels, logits, weights=WEIGHTS[:, :1], key=key)
    np.testing.assert_allclose(new["seen"], WEIGHTS[:, 0].sum(), rtol=1e-6)


def test_names_of_the_contract_are_not_for_fields():
    class PartsHead(jh.Head):
        parts: int = 3  # pyright: ignore[reportIncompatibleMethodOverride]  # what is tested
        logits_dimension = 1

        def losses(self, labels, logits):
            return labels - logits

    class SamplesHead(jh.Head):
        samples: int = 5
        logits_dimension = 1

        def losses(self, labels, logits):
            return labels - logits

    class RowwiseHead(jh.Head):
        logits_dimension = 1
        rowwise = True

        def losses(self, labels, logits):
            return labels - logits

    for head, words in ((PartsHead, "parts is a hook"), (SamplesHead, "samples is a decl"), (RowwiseHead, "coupling")):
        with pytest.raises(ValueError, match=words):
            head()


def test_no_keys_are_all_keys():
    head = jh.MultiHead([jh.RegressionHead(name="r"), jh.BinaryClassHead(name="b")])
    every = head.predictions(LOGITS[:, :2])
    chex.assert_trees_all_equal(head.predictions(LOGITS[:, :2], ()), every)
    chex.assert_trees_all_equal(head.predictions(LOGITS[:, :2], {"b": ()}), {"b": every["b"]})


# Rows of other devices


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_coupled_head_must_be_told_the_axis_of_other_devices(check_vma):
    given = zoo.SHAPED["cox"]
    rng = np.random.default_rng(0)
    labels, logits = zoo.times(rng, (8,)), rng.normal(size=(8, 1)).astype(np.float32)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:4]), ("devices",))
    spread, whole = jax.sharding.PartitionSpec("devices"), jax.sharding.PartitionSpec()

    def loss(axis_name, rows):
        def local(labels, logits):
            return given.head.loss(labels, logits, axis_name=axis_name)

        step = jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=whole, check_vma=check_vma)
        return jax.eval_shape(step, labels, logits).shape

    refused = [(None, spread)] + ([] if check_vma else [(None, whole)])
    for arguments in refused:
        with pytest.raises(ValueError, match=r"CoxHead look at the rows of all devices(.|\n)*the axis 'devices'"):
            loss(*arguments)
    taken = [("devices", spread), ((), whole)] + ([(None, whole)] if check_vma else [])
    assert {loss(*arguments) for arguments in taken} == {()}
    # An axis of one device hides no rows.
    one = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("devices",))
    alone = jax.shard_map(given.head.loss, mesh=one, in_specs=spread, out_specs=whole, check_vma=False)
    assert jax.eval_shape(alone, labels, logits).shape == ()
    if check_vma:
        # Masks and weights may differ where rows do not.
        def masked(labels, logits):
            where = np.arange(8) // 2 == jax.lax.axis_index("devices")
            return given.head.loss(labels, logits, where=where)

        step = jax.shard_map(masked, mesh=mesh, in_specs=whole, out_specs=spread)
        with pytest.raises(ValueError, match="look at the rows of all devices"):
            jax.eval_shape(step, labels, logits)
        return
    rows = jax.tree.map(lambda x: x.reshape(4, 2, 1), (labels, logits))
    with pytest.raises(ValueError, match="give pmap an axis_name"):
        jax.eval_shape(jax.pmap(given.head.loss, devices=jax.devices()[:4]), *rows)
    # Sums over rows need no axis, though the loss does.
    head = jh.GlobalObjectiveHead(jh.BinaryClassHead(), "roc_auc")

    def measure(labels, logits):
        return head.measure(labels, logits, params=head.init(jax.random.key(0))).psum("devices").state

    step = jax.shard_map(measure, mesh=mesh, in_specs=spread, out_specs=whole)
    jax.eval_shape(step, np.arange(8)[:, None] % 2, logits)
    # The axis of a vmap is no axis of devices.
    batches = jax.tree.map(lambda x: x[None], (labels, logits))
    assert jax.eval_shape(jax.vmap(given.head.loss, axis_name="batches"), *batches).shape == (1,)
