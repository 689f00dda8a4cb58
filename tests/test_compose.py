"""Heads made of heads: each task's own masks, weights and parameters; sequences by mask and by lengths."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from zoo import OrdinalHead, PriorCorrectedHead

import jaxheads as jh

LATE, MINUTES = jh.BinaryClassHead(name="late"), jh.RegressionHead(name="minutes")
BOTH = jh.MultiHead([LATE, MINUTES], head_weights=[2.0, 0.5])
RNG = np.random.default_rng(0)
N = 12
LABELS = {"late": RNG.integers(0, 2, N), "minutes": RNG.normal(size=N).astype(np.float32)}
LOGITS = RNG.normal(size=(N, 2)).astype(np.float32)
SOME = {"minutes": RNG.random(N) < 0.6}
WEIGHTS = {"late": RNG.choice(np.array([0.1, 0.3, 2], np.float32), N)}


def late_losses():
    z, y = LOGITS[:, 0].astype(np.float64), LABELS["late"]
    return np.logaddexp(0, z) - y * z


def minutes_losses():
    return (LOGITS[:, 1].astype(np.float64) - LABELS["minutes"]) ** 2


def test_each_task_has_missing_labels_and_weights_of_its_own():
    spoiled = {**LABELS, "minutes": np.where(SOME["minutes"], LABELS["minutes"], np.nan)}
    late = (late_losses() * WEIGHTS["late"]).sum() / N
    minutes = minutes_losses()[SOME["minutes"]].mean()
    given = {"where": SOME, "weights": WEIGHTS}

    @jax.jit
    def run(z):
        return jax.value_and_grad(lambda z: BOTH.loss(spoiled, z, **given))(z), BOTH.measure(spoiled, z, **given)

    (loss, gradient), metrics = run(LOGITS)
    np.testing.assert_allclose(loss, 2 * late + 0.5 * minutes, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(gradient)[~SOME["minutes"], 1], 0)
    values = metrics.compute()
    np.testing.assert_allclose(values["loss/late"], late, rtol=1e-6)
    np.testing.assert_allclose(values["loss/minutes"], minutes, rtol=1e-6)
    average = np.average(late_losses(), weights=WEIGHTS["late"])
    np.testing.assert_allclose(values["average_loss/late"], average, rtol=1e-6)


def test_what_is_given_for_a_head_that_is_not_there_is_refused():
    refused: tuple[dict[str, Any], ...] = (
        {"where": {"x": SOME["minutes"]}},
        {"weights": {"x": WEIGHTS["late"]}},
        {"normalizer": {"x": 1.0}},
    )
    for given in refused:
        with pytest.raises(ValueError, match=r"heads that are not there: \['x'\](.|\n)*late(.|\n)*minutes"):
            BOTH.loss(LABELS, LOGITS, **given)
    with pytest.raises(ValueError, match="not there"):
        BOTH.predictions(LOGITS, {"x": "logits"})


def test_normalizers_by_head_add_up():
    parts = [slice(0, 5), slice(5, N)]
    total = {"late": N, "minutes": N}

    @jax.jit
    def losses():
        each = []
        for part in parts:
            labels, weights = ({k: v[part] for k, v in given.items()} for given in (LABELS, WEIGHTS))
            each.append(BOTH.loss(labels, LOGITS[part], normalizer=total, weights=weights))
        return sum(each), BOTH.loss(LABELS, LOGITS, weights=WEIGHTS)

    np.testing.assert_allclose(*losses(), rtol=1e-6)
    with pytest.raises(ValueError, match="normalizer"):
        BOTH.loss(LABELS, LOGITS, normalizer={"late": -1.0})


def test_one_array_dicts_and_lazy_logits_are_the_same():
    by_name = {"late": LOGITS[:, :1], "minutes": LOGITS[:, 1:]}
    kernel = np.eye(2, dtype=np.float32)
    lazy = jh.LinearLogits(LOGITS, kernel, np.zeros(2, np.float32))
    each = {"late": jh.LinearLogits(LOGITS, kernel[:, :1]), "minutes": LOGITS[:, 1:]}
    forms = (LOGITS, by_name, lazy, each, {**by_name, "stranger": None})
    for logits in forms:
        predictions = jax.eval_shape(lambda logits=logits: BOTH.predictions(logits, {"late": "logistic"}))
        assert {name: list(keys) for name, keys in predictions.items()} == {"late": ["logistic"]}
    losses, predictions = jax.jit(lambda: ([BOTH.loss(LABELS, z) for z in forms], BOTH.predictions(LOGITS)))()
    expected = 2 * late_losses().mean() + 0.5 * minutes_losses().mean()
    np.testing.assert_allclose(losses, [expected] * len(forms), rtol=1e-6)
    assert set(predictions) == {"late", "minutes"}
    decoded = BOTH.decode_predictions(predictions)
    assert decoded["late"]["classes"].shape == (N, 1)


def test_learned_weights_are_kendalls():
    head = jh.MultiHead([LATE, MINUTES], weighting="uncertainty")
    params = head.init(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == {"log_variances": (2,)}
    s = np.array([0.7, -0.4])
    losses = np.array([late_losses().mean(), minutes_losses().mean()])
    unweighted = jh.MultiHead([LATE, MINUTES], [1.0, 0.0], weighting="uncertainty")
    nowhere = {"minutes": np.zeros(N, bool)}

    @jax.jit
    def run(s):
        def slopes(head, **given):
            return jax.value_and_grad(lambda s: head.loss(LABELS, LOGITS, params={"log_variances": s}, **given))(s)

        return slopes(head), slopes(head, where=nowhere), slopes(unweighted)

    (loss, gradient), (_, masked), (_, ignored) = jax.device_get(run(s.astype(np.float32)))
    np.testing.assert_allclose(loss, (np.exp(-s) * losses + s / 2).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, 0.5 - np.exp(-s) * losses, rtol=1e-5)
    # A head without labels in the batch, or of weight 0, leaves its weight alone.
    assert masked[1] == ignored[1] == 0
    # Stationary at ln(2 L).
    (_, at_best), *_ = run(np.log(2 * losses).astype(np.float32))
    np.testing.assert_allclose(at_best, 0, atol=1e-6)
    far = np.array([50.0, -50.0])
    clipped = np.clip(far, -20, 20)
    (loss, back), *_ = run(far.astype(np.float32))
    np.testing.assert_allclose(loss, (np.exp(-clipped) * losses + clipped / 2).sum(), rtol=1e-6)
    # What has overshot comes back.
    assert back[0] > 0 > back[1]
    assert head.metrics().compute().keys() == jh.MultiHead([LATE, MINUTES]).metrics().compute().keys()
    with pytest.raises(ValueError, match="log_variances"):
        head.loss(LABELS, LOGITS)
    assert jh.MultiHead([LATE, MINUTES]).init(jax.random.key(0)) == {}


LEARNED = jh.MultiHead([LATE, MINUTES], weighting="uncertainty")
VARIANCES = {"log_variances": np.array([0.7, -0.4], np.float32)}


def test_micro_batches_add_up_under_learned_weights():
    def whole(params):
        return LEARNED.loss(LABELS, LOGITS, params=params, where=SOME)

    def in_parts(params):
        total = {"late": float(N), "minutes": float(SOME["minutes"].sum())}
        return sum(
            LEARNED.loss(
                {k: v[p] for k, v in LABELS.items()},
                LOGITS[p],
                params=params,
                where={"minutes": SOME["minutes"][p]},
                normalizer=total,
            )
            for p in (slice(0, 5), slice(5, 6), slice(6, N))
        )

    got, expected = jax.jit(lambda params: [jax.value_and_grad(f)(params) for f in (in_parts, whole)])(VARIANCES)
    chex.assert_trees_all_close(got, expected, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "mean"])
def test_a_task_of_weight_zero_everywhere_leaves_its_learned_weight_alone(reduction):
    minutes = jh.RegressionHead(name="minutes", loss_reduction=reduction)
    head = jh.MultiHead([LATE, minutes], weighting="uncertainty")
    nothing = {"minutes": np.zeros(N, np.float32)}
    slope = jax.jit(jax.grad(lambda p: head.loss(LABELS, LOGITS, params=p, weights=nothing)))
    late, minutes = slope(VARIANCES)["log_variances"].tolist()
    assert minutes == 0 != late


def test_the_loss_of_a_nested_head_leaves_out_what_was_not_seen():
    inner = jh.MultiHead([jh.BinaryClassHead(name="b"), jh.RegressionHead(name="c")])
    head = jh.MultiHead([LATE, inner])
    labels = {"late": LABELS["late"], "b_c": {"b": LABELS["late"], "c": LABELS["minutes"]}}
    logits = np.concatenate([LOGITS[:, :1], LOGITS], -1)
    hidden = jh.MultiHead([LATE, jh.MultiHead(inner.heads, [1.0, 0.0])])
    spoiled = logits.copy()
    spoiled[3, 2] = np.nan

    @jax.jit
    def run():
        metrics = head.measure(labels, logits, where={"b_c": {"c": np.zeros(N, bool)}})
        return metrics, metrics.compute()["loss/b_c"], hidden.measure(labels, spoiled)

    metrics, inside, without = run()
    losses = [metrics.compute()["loss/b_c"], inside, without.compute()["loss/b_c"]]
    np.testing.assert_allclose(losses, [late_losses().mean()] * 3, rtol=1e-6)
    assert np.isnan(head.metrics().compute()["loss/b_c"])


def test_composites_stay_float32_in_64_bit_mode():
    with jax.enable_x64(True):
        for head in (jh.MultiHead([LATE, MINUTES], [1.0, 0.0]), LEARNED):
            params = jax.eval_shape(head.init, jax.random.key(0))
            loss = jax.eval_shape(lambda params, head=head: head.loss(LABELS, LOGITS, params=params), params)
            assert loss.dtype == jnp.float32
            assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


class RememberingHead(jh.Head):
    """A running field that nothing moves."""

    scale: jax.Array = jh.running(lambda head: jnp.ones(()))
    logits_dimension = 1

    def losses(self, labels, logits):
        return self.scale * (labels - logits) ** 2


def test_running_fields_that_do_not_move_stay():
    inner = RememberingHead(name="r")
    head = jh.MultiHead([LATE, inner])
    labels, steps = {"late": LABELS["late"], "r": LABELS["minutes"]}, np.zeros((2, 3, 1), np.float32)
    wrapped = jh.SequentialHeadWrapper(inner, None)
    states = head.init_state(), wrapped.init_state()

    @jax.jit
    def moved(of_head, of_wrapped):
        return head.update_state(of_head, labels, LOGITS), wrapped.update_state(of_wrapped, steps, steps)

    chex.assert_trees_all_equal(moved(*states), states)


def test_a_weight_of_zero_hides_a_head_even_a_nan():
    head = jh.MultiHead([LATE, MINUTES], [1.0, 0.0])
    spoiled = LOGITS.copy()
    spoiled[3, 1] = np.nan
    loss, gradient = jax.jit(jax.value_and_grad(lambda z: head.loss(LABELS, z)))(spoiled)
    np.testing.assert_allclose(loss, late_losses().mean(), rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(gradient)[:, 1], 0)


def test_nested_heads_learn_and_remember():
    stars, prior = OrdinalHead(4, name="stars"), PriorCorrectedHead(name="prior")
    inner = jh.MultiHead([stars, prior])
    head = jh.MultiHead([LATE, inner], [1.0, 3.0])
    assert head.name == "late_stars_prior"
    assert (
        eval(repr(inner), {**vars(jh), "OrdinalHead": OrdinalHead, "PriorCorrectedHead": PriorCorrectedHead}) == inner
    )
    params, state = head.init(jax.random.key(0)), head.init_state()
    assert jax.tree.map(jnp.shape, params) == {"stars_prior": {"stars": {"cuts": (3,)}}}
    assert jax.tree.map(jnp.shape, state) == {"stars_prior": {"prior": {"counts": (2, 2)}}}
    rng = np.random.default_rng(1)
    labels = {"late": rng.integers(0, 2, N), "stars_prior": {"stars": rng.integers(0, 4, N), "prior": np.ones(N)}}
    logits = rng.normal(size=(N, 3)).astype(np.float32)
    of_inner = labels["stars_prior"]

    @jax.jit
    def run(params, state):
        parts = (
            LATE.loss(labels["late"], logits[:, :1]),
            stars.loss(of_inner["stars"], logits[:, 1:2], params=params["stars_prior"]["stars"]),
            prior.loss(of_inner["prior"], logits[:, 2:], params=state["stars_prior"]["prior"]),
        )
        slope = jax.value_and_grad(lambda params: head.bind(params).bind(state).loss(labels, logits))
        some = {"stars_prior": {"prior": np.arange(N) < 5}}
        new = head.update_state(state, labels, logits, params=params, where=some)
        return parts, slope(params), new, head.bind(params).bind(state).measure(labels, logits)

    parts, (loss, gradient), new, metrics = run(params, state)
    np.testing.assert_allclose(loss, float(parts[0]) + 3 * (float(parts[1]) + float(parts[2])), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(new["stars_prior"]["prior"]["counts"]).sum(-1), [6, 7])
    values = metrics.compute()
    np.testing.assert_allclose(values["loss/stars_prior"], values["loss/stars"] + values["loss/prior"], rtol=1e-6)
    assert "mean_absolute_error/stars" in values
    assert np.abs(gradient["stars_prior"]["stars"]["cuts"]).min() > 0


@pytest.mark.parametrize(
    ("heads", "match"),
    [
        ([], "Must specify heads"),
        ([LATE, jh.RegressionHead()], "must have name"),
        ([LATE, LATE], "names clash"),
        ([LATE, 3], "holds heads"),
        ([jh.BinaryClassHead(name="b", thresholds=(0.5,)), jh.RegressionHead(name="threshold")], None),
        ([jh.MultiHead([LATE, MINUTES]), jh.RegressionHead(name="late")], "collide"),
        ([LATE, jh.RegressionHead(name="serving_default")], "must not hold"),
        ([LATE, jh.RegressionHead(name="predict")], "must not hold"),
        ([LATE, jh.RegressionHead(name="a/b")], "must not hold"),
    ],
)
def test_heads_that_do_not_go_together_are_refused(heads, match):
    if match is None:
        assert jh.MultiHead(heads).logits_dimension == 2
        return
    with pytest.raises(ValueError, match=match):
        jh.MultiHead(heads)


def test_curves_are_found_by_the_name_of_the_head():
    labels = {"late": LABELS["late"], "soon": 1 - LABELS["late"]}
    head = jh.MultiHead([LATE, jh.BinaryClassHead(name="soon")])
    metrics = jax.jit(head.measure)(labels, LOGITS)
    fpr, tpr, _ = metrics.curve("roc", "late/scores")
    np.testing.assert_allclose(np.trapezoid(tpr, fpr), metrics.compute()["auc/late"], rtol=1e-6)
    with pytest.raises(ValueError, match=r"late/scores(.|\n)*soon/scores"):
        metrics.curve("roc")


def test_exports_are_merged_and_the_first_head_is_served():
    exported: dict[str, Any] = BOTH.export_outputs(LOGITS)
    assert set(exported) == {
        *("serving_default", "late", "late/classification", "late/regression", "late/predict"),
        *("minutes", "minutes/regression", "minutes/predict", "predict"),
    }
    assert exported["serving_default"] is exported["late"]
    assert exported["late"].classes == ("0", "1")
    assert "minutes/predictions" in exported["predict"].outputs
    compiled = jax.jit(BOTH.export_outputs)(LOGITS)
    jax.tree.map(np.testing.assert_allclose, compiled, exported)


# Sequences


T = 5
LENGTHS = np.array([3, 0, 5, 1], np.int32)
MASK = np.arange(T) < LENGTHS[:, None]
STEPS = RNG.integers(0, 2, (4, T))
SEQUENCES = RNG.normal(size=(4, T, 1)).astype(np.float32)
STEP_WEIGHTS = RNG.choice(np.array([0.1, 0.3, 2], np.float32), (4, T))


def step_losses():
    z = SEQUENCES[..., 0].astype(np.float64)
    return np.logaddexp(0, z) - STEPS * z


def test_a_mask_of_steps_hides_all_places_of_a_step():
    """Logits may have more axes than batch and steps."""
    logits = np.random.default_rng(1).normal(size=(4, T, 3, 1)).astype(np.float32)
    loss = jh.SequentialHeadWrapper(jh.RegressionHead(), "mask").loss(
        np.zeros_like(logits), np.where(MASK[..., None, None], logits, np.nan), features={"mask": MASK}
    )
    np.testing.assert_allclose(loss, (logits[MASK].astype(np.float64) ** 2).mean(), rtol=1e-6)


def test_sequences_without_a_mask_are_served_as_they_are():
    head = jh.SequentialHeadWrapper(jh.RegressionHead(), None)
    spec = head.create_estimator_spec({}, "infer", SEQUENCES)
    np.testing.assert_array_equal(spec.predictions["predictions"], SEQUENCES)
    assert spec.predictions.keys() == {"predictions"}


@pytest.mark.parametrize("form", ["holes", "lengths", "where", "traced", pytest.param("mask", marks=pytest.mark.slow)])
def test_steps_that_are_not_there_are_absent(form):
    mask = MASK if form != "holes" else MASK & (RNG.random((4, T)) < 0.7)
    column = "weights"
    inner = jh.BinaryClassHead(weight_column=column)
    key = {"sequence_lengths": "n"} if form == "lengths" else {"sequence_length_mask": "mask"}
    head = jh.SequentialHeadWrapper(inner, feature_columns=(column,), **key)
    labels = np.where(mask, STEPS, 7)
    logits = np.where(mask[..., None], SEQUENCES, np.nan)
    features = {"mask": mask, "n": LENGTHS, column: np.where(mask, STEP_WEIGHTS, np.nan), "words": np.array(["a"] * 4)}
    where = None
    if form == "where":
        features["mask"], where = np.ones_like(mask), mask
    weights = STEP_WEIGHTS[mask].astype(np.float64)
    expected = (step_losses()[mask] * weights).sum() / mask.sum()

    def both(labels, logits, features):
        arguments = {"features": features, "where": where}
        loss, gradient = jax.value_and_grad(lambda z: head.loss(labels, z, **arguments))(logits)
        return loss, gradient, head.measure(labels, logits, **arguments)

    if form == "traced":
        del features["words"]
        loss, gradient, measured = jax.jit(both)(labels, logits, features)
    else:
        loss, gradient, measured = jax.jit(lambda logits: both(labels, logits, features))(logits)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(gradient)[~mask], 0)
    values = measured.compute()
    np.testing.assert_allclose(values["average_loss"], np.average(step_losses()[mask], weights=weights), rtol=1e-6)
    np.testing.assert_allclose(values["label/mean"], np.average(STEPS[mask], weights=weights), rtol=1e-6)


def test_sequences_count_alike_if_asked():
    head = jh.SequentialHeadWrapper(jh.BinaryClassHead(), sequence_lengths="n", average_over="sequences")
    features = {"n": LENGTHS}
    means = [step_losses()[i, : LENGTHS[i]].mean() for i in (0, 2, 3)]
    total = jh.SequentialHeadWrapper(
        jh.BinaryClassHead(loss_reduction="sum"), sequence_lengths="n", average_over="sequences"
    )

    @jax.jit
    def run():
        losses = [each.loss(STEPS, SEQUENCES, features) for each in (head, total)]
        return losses, head.measure(STEPS, SEQUENCES, features)

    losses, metrics = run()
    np.testing.assert_allclose(losses, [np.mean(means), np.sum(means)], rtol=1e-6)
    values = metrics.compute()
    np.testing.assert_allclose(values["average_loss"], np.mean(means), rtol=1e-6)
    np.testing.assert_allclose(values["label/mean"], STEPS[MASK].mean(), rtol=1e-6)


@pytest.mark.parametrize("average_over", ["steps", "sequences"])
def test_several_tasks_on_sequences(average_over):
    head = jh.SequentialHeadWrapper(BOTH, sequence_lengths="n", average_over=average_over)
    labels = {"late": STEPS, "minutes": RNG.normal(size=(4, T)).astype(np.float32)}
    logits = RNG.normal(size=(4, T, 2)).astype(np.float32)
    features, some = {"n": LENGTHS}, {"minutes": RNG.random((4, T)) < 0.5}
    each = {
        name: jh.SequentialHeadWrapper(inner, sequence_lengths="n", average_over=average_over)
        for name, inner in (("late", LATE), ("minutes", MINUTES))
    }

    @jax.jit
    def run(labels, logits):
        alone = {
            name: one.loss(labels[name], logits[..., i : i + 1], features, where=some.get(name))
            for i, (name, one) in enumerate(each.items())
        }
        given = {"features": features, "where": some}
        return alone, head.loss(labels, logits, **given), head.measure(labels, logits, **given)

    alone, loss, metrics = jax.device_get(run(labels, logits))
    np.testing.assert_allclose(loss, 2 * alone["late"] + 0.5 * alone["minutes"], rtol=1e-6)
    values = metrics.compute()
    for name in alone:
        np.testing.assert_allclose(values[f"loss/{name}"], alone[name], rtol=1e-6)


def test_masks_of_nested_tasks_on_sequences():
    nested = jh.MultiHead([LATE, jh.MultiHead([jh.BinaryClassHead(name="b"), jh.RegressionHead(name="c")])])
    head = jh.SequentialHeadWrapper(nested, sequence_lengths="n")
    labels = {"late": STEPS, "b_c": {"b": STEPS, "c": STEPS.astype(np.float32)}}
    logits = np.repeat(SEQUENCES, 3, -1)
    some = RNG.random((4, T)) < 0.5
    stranger = {"stranger": None, "late": logits[..., :1], "b_c": logits[..., 1:]}
    where = {"b_c": {"b": some}}
    loss = jax.jit(lambda: [head.loss(labels, z, {"n": LENGTHS}, where=where) for z in (logits, stranger)])()
    losses = step_losses()
    squares = (STEPS - SEQUENCES[..., 0].astype(np.float64)) ** 2
    expected = losses[MASK].mean() + losses[MASK & some].mean() + squares[MASK].mean()
    np.testing.assert_allclose(loss, [expected] * 2, rtol=1e-6)
    with pytest.raises(ValueError, match="not there"):
        head.loss(labels, logits, {"n": LENGTHS}, where={"b_c": {"x": some}})


def test_illegal_lengths_on_the_device_are_visible():
    head = jh.SequentialHeadWrapper(jh.BinaryClassHead(), sequence_lengths="n")
    run = jax.jit(jax.value_and_grad(lambda z, n: head.loss(STEPS, z, {"n": n})))
    for bad in (jax.device_put(np.array(bad, np.int32)) for bad in ([3, 99, 5, 1], [3, -2, 5, 1])):
        with pytest.raises(ValueError, match="lengths must lie"):
            head.loss(STEPS, SEQUENCES, {"n": bad}, check=True)
        loss, gradient = run(SEQUENCES, bad)
        assert np.isnan(loss)
        assert np.isnan(np.asarray(gradient)[1]).all()
        with pytest.warns(jh.BadInputWarning, match="5 elements"):
            head.measure(STEPS, SEQUENCES, {"n": bad}).compute()
    for dtype in (np.uint8, np.int16):
        jax.eval_shape(run, SEQUENCES, LENGTHS.astype(dtype))


def test_a_mask_that_is_configured_must_be_there():
    head = jh.SequentialHeadWrapper(jh.BinaryClassHead())
    with pytest.raises(ValueError, match="sequence_length_mask=None"):
        head.loss(STEPS, SEQUENCES)
    unmasked = jh.SequentialHeadWrapper(jh.BinaryClassHead(), None)
    np.testing.assert_allclose(unmasked.loss(STEPS, SEQUENCES), step_losses().mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ("way", "average_over"),
    [
        pytest.param(
            way, average_over, marks=[] if (average_over, way) == ("sequences", "sharded") else pytest.mark.slow
        )
        for way in ("one", "several", "sharded")
        for average_over in ("steps", "sequences")
    ],
)
def test_large_and_sharded_sequences(way, average_over):
    n = 20_008
    rng = np.random.default_rng(2)
    lengths = rng.integers(0, 3, n)
    labels, logits = rng.integers(0, 2, (n, 2)), rng.normal(size=(n, 2, 1)).astype(np.float32)
    mask = np.arange(2) < lengths[:, None]
    z = logits[..., 0].astype(np.float64)
    losses = np.logaddexp(0, z) - labels * z
    per_sequence = (losses * mask).sum(1)[lengths > 0] / lengths[lengths > 0]
    expected = losses[mask].mean() if average_over == "steps" else per_sequence.mean()
    inner = jh.MultiHead([LATE]) if way == "several" else LATE
    head = jh.SequentialHeadWrapper(inner, sequence_lengths="n", average_over=average_over)
    batch = ({"late": labels} if way == "several" else labels), logits, {"n": lengths}
    if way == "sharded":
        batch = jax.device_put(batch, NamedSharding(jax.make_mesh((8,), ("d",)), PartitionSpec("d")))
    values = jax.jit(head.measure)(*batch).compute()
    np.testing.assert_allclose(values["loss/late" if way == "several" else "average_loss/late"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("lengths", "match"),
    [
        (np.array([3, 9, 1, 0]), r"lengths must lie in 0 ... 5. Given 9"),
        (np.array([-1, 0, 1, 2]), r"lengths must lie in 0 ... 5. Given -1"),
        (np.ones(4), r"must be integer lengths of shape \(4,\). Given float64\[4\]"),
        (np.ones((4, 1), int), r"must be integer lengths of shape \(4,\). Given int64\[4, 1\]"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(lengths, match):
    head = jh.SequentialHeadWrapper(jh.BinaryClassHead(), sequence_lengths="n")
    with pytest.raises(ValueError, match=rf"features\['n'\]:? {match}"):
        head.loss(STEPS, SEQUENCES, {"n": lengths})


# Labels by lists


def test_lists_of_ids_and_names_become_multi_hot():
    head = jh.MultiLabelHead(3, label_vocabulary=("a", "b", "c"))
    expected = np.array([[[1, 0, 1], [0, 0, 0]], [[0, 1, 0], [1, 1, 1]]], np.float32)
    for lists in ([[["a", "c"], []], [["b"], ["c", "b", "a", "a"]]], [[[0, 2], []], [[1], [2, 1, 0]]]):
        np.testing.assert_array_equal(head.encode_labels(lists), expected)
    logits = RNG.normal(size=(2, 2, 3)).astype(np.float32)
    names = [[["a", "c"], []], [["b"], ["c", "b", "a"]]]
    assert head.loss(names, logits) == head.loss(expected, logits)
    np.testing.assert_array_equal(head.encode_labels(expected), expected)
    assert head.loss([[[], []], [[], []]], logits) == head.loss(np.zeros((2, 2, 3)), logits)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([["a"], ["x"]], r"'x' in the row at index \(1,\)"),
        ([[0], [3]], r"3 in the row at index \(1,\)"),
        ([[0], [-1]], r"-1 in the row"),
        ([["a"], [["b"]]], "one list a row"),
        (["a", "b"], "one list a row"),
        ([[1, 0, 1], [0, 0, 1]], "multi-hot"),
        ([[["a"]], [["a"], ["b"]]], "equal lengths"),
        (np.array([["a", "b", "c"]] * 2), "tolist"),
    ],
)
def test_lists_that_cannot_be_encoded_are_refused(labels, match):
    head = jh.MultiLabelHead(3, label_vocabulary=("a", "b", "c"))
    with pytest.raises(ValueError, match=match):
        head.encode_labels(labels)


def test_no_rows_at_all_are_no_rows():
    assert jh.MultiLabelHead(3, label_vocabulary=("a", "b", "c")).encode_labels([]).shape == (0, 3)


@pytest.mark.slow
def test_per_class_metrics_of_many_classes_stay_small():
    """A histogram of each class is 8 MB; blocks of rows are counted in examples, not in entries."""
    head = jh.MultiLabelHead(250, classes_for_class_based_metrics=list(range(250)))
    shapes = (jax.ShapeDtypeStruct((18_000, 250), jnp.float32),) * 2
    measure = jax.jit(lambda y, z: head.measure(y, z).state)
    analysis: Any = measure.lower(*shapes).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 12 * 8.2e6


def test_unknown_names_are_absent_in_rows_that_are():
    head = jh.MultiLabelHead(3, label_vocabulary=("a", "b", "c"))
    labels, logits = [["a"], ["x"]], RNG.normal(size=(2, 3)).astype(np.float32)
    alone = np.logaddexp(0, logits[0].astype(np.float64) * [-1, 1, 1]).mean()
    for where in ([True, False], jax.device_put(np.array([True, False]))):
        np.testing.assert_allclose(head.loss(labels, logits, where=where), alone, rtol=1e-6)
    encoded, loss = head.encode_labels(labels, where=[True, False]), jax.jit(head.loss)
    np.testing.assert_allclose(loss(encoded, logits, where=np.array([True, False])), alone, rtol=1e-6)
    assert np.isnan(loss(encoded, logits, where=np.ones(2, bool)))
    with pytest.raises(ValueError, match="label_vocabulary"):
        jh.MultiLabelHead(3).loss(labels, logits)
