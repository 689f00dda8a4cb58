"""Traps measured in other libraries, each with the answer that is right. The trap is the test's name."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxheads as jh
from jaxheads.metrics.reading import STAMP

MSE = jh.RegressionHead()


def column(*values: float, dtype=np.float32) -> np.ndarray:
    return np.array(values, dtype)[:, None]


def f32(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)


def average(values: Any, **kwargs) -> jh.Metrics:
    """The metrics whose `label/mean` is the mean of some values."""
    return MSE.measure(labels=values, logits=np.zeros(values.shape, np.float32), **kwargs)


def test_half_weights_are_not_cast_to_int():
    """scenic's `weighted_correctly_classified` counts two right answers of weight 0.5 as none."""
    head = jh.BinaryClassHead()
    right = head.measure(labels=[1, 1], logits=column(2, 2), weights=[0.5, 0.5])
    assert right.compute()["accuracy"] == 1.0
    wrong = head.measure(labels=[1, 1], logits=column(-2, 2), weights=[1.0, 0.0])
    assert (right + wrong).compute()["accuracy"] == 0.5
    classes = jh.MultiClassHead(3)
    right = classes.measure(labels=[1, 1], logits=np.eye(3, dtype=np.float32)[[1, 1]], weights=[0.5, 0.5])
    wrong = classes.measure(labels=[0, 1], logits=np.eye(3, dtype=np.float32)[[1, 1]], weights=[1.0, 0.0])
    assert (right + wrong).compute()["accuracy"] == 0.5


def test_a_mask_that_broadcasts_counts_what_it_covers():
    """nnx's `Average` of ones [2, 5] under a mask [2, 1] is 5."""
    head = jh.RegressionHead(5)
    ones = np.ones((2, 5), np.float32)
    for where in (np.ones((2, 1), bool), np.ones(2, bool)):
        values = head.measure(labels=ones, logits=np.zeros_like(ones), where=where).compute()
        assert values["label/mean"] == values["average_loss"] == 1.0
        assert head.loss(labels=ones, logits=np.zeros_like(ones), where=where) == 1.0


def test_fractional_weights_stay_in_the_denominator():
    """nnx's `Average` of [1, 3] under [.5, .25] is inf."""
    values = average(column(1, 3), weights=[0.5, 0.25]).compute()
    np.testing.assert_allclose(values["label/mean"], 1.25 / 0.75, rtol=1e-6)


def test_a_weight_is_not_a_mask():
    """clu's `Average` of [1, 3] under [.5, 0] has weight 1."""
    metrics = average(column(1, 3), weights=[0.5, 0])
    assert metrics.compute()["label/mean"] == 1.0
    np.testing.assert_allclose((metrics + average(column(4))).compute()["label/mean"], (0.5 + 4) / 1.5, rtol=1e-6)


def test_a_mask_that_does_not_fit_is_refused():
    """clu drops it, with a line in the log, where the loss is a scalar."""
    for wrong in (np.ones(2, bool), np.ones((2, 1), bool), np.ones((3, 2), bool)):
        with pytest.raises(ValueError, match=r"where shape .*\(3, 1\)"):
            average(column(1, 2, 4), where=wrong)

    def scalar(labels, logits):
        return jnp.mean((labels - logits) ** 2)

    with pytest.raises(ValueError, match="unreduced"):
        jh.RegressionHead(loss_fn=scalar).loss(labels=column(1, 2), logits=column(0, 0), where=[True, False])


def test_metrics_are_scan_carries():
    """metrax's `Average`, `Accuracy` and `AUCPR` change dtype or shape when merged."""
    heads = (MSE, jh.BinaryClassHead(thresholds=(0.5,)), jh.MultiClassHead(3))
    batches = ((column(1, 2), column(0, 0)), ([1, 0], column(1, 2)), ([1, 2], np.zeros((2, 3), np.float32)))

    @jax.jit
    def run():
        ones = [head.measure(*batch) for head, batch in zip(heads, batches, strict=True)]

        def body(metrics, _):
            return [a + b for a, b in zip(metrics, ones, strict=True)], None

        return ones, jax.lax.scan(body, [head.metrics() for head in heads], length=3)[0]

    for one, scanned in zip(*run(), strict=True):
        expected = one.compute()
        for key, value in scanned.compute().items():
            np.testing.assert_allclose(value, expected[key], rtol=1e-6)


def test_two_metrics_live_beside_each_other_and_a_loss():
    """Two metrax metrics in one clu `Collection`, with `loss=`, raise a TypeError."""
    auc, classes = jh.BinaryClassHead(name="a"), jh.MultiClassHead(3, name="c")

    @jax.jit
    def step(collection, loss):
        new = {
            "a": auc.measure([1, 0], column(2, 1)),
            "c": classes.measure([2, 0], np.eye(3, dtype=np.float32)[:2]),
            "loss": average(loss),
        }
        return {key: collection[key] + value for key, value in new.items()}

    collection = {"a": auc.metrics(), "c": classes.metrics(), "loss": MSE.metrics()}
    for loss in (1.0, 3.0):
        collection = step(collection, column(loss))
    values = {key: value for metrics in collection.values() for key, value in metrics.compute().items()}
    assert (values["auc/a"], values["accuracy/c"], values["label/mean"]) == (1.0, 0.0, 2.0)


def test_nan_in_a_masked_slot_is_dropped():
    """kauldron, metrax, nnx and Keras let it through."""
    masks: list[dict[str, Any]] = [{"where": [True, False]}, {"weights": [1.0, 0.0]}]
    for mask in masks:
        values = average(column(1, np.nan), **mask).compute()
        assert values["label/mean"] == values["average_loss"] == 1.0
        step = jax.jit(jax.value_and_grad(lambda z, mask=mask: MSE.loss(column(1, np.nan), z, **mask)))
        loss, gradient = step(column(0, np.nan))
        assert np.isfinite(loss)
        np.testing.assert_array_equal(np.isfinite(gradient), True)
        assert gradient[1] == 0


def test_rank_one_labels_never_make_a_matrix():
    """`optax.sigmoid_binary_cross_entropy([3], [3, 1])` and `huber_loss` have shape (3, 3)."""
    labels, logits = np.array([1.0, 0.0, 1.0], np.float32), column(2, -1, 0.5)
    exact = np.mean(np.logaddexp(0, logits[:, 0].astype(np.float64)) - labels * logits[:, 0])
    for given in (labels, labels[:, None]):
        np.testing.assert_allclose(jh.BinaryClassHead().loss(given, logits), exact, rtol=1e-6)
    with pytest.raises(ValueError, match="rank"):
        jh.BinaryClassHead().loss(labels[:, None], logits[:, 0])
    with pytest.raises(ValueError, match="labels"):
        jh.BinaryClassHead().loss(np.ones((3, 3), np.float32), logits)

    def huber(labels, logits):
        with jax.numpy_rank_promotion("allow"):
            return optax.huber_loss(logits, labels[:, 0])

    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        jh.RegressionHead(loss_fn=huber).loss(labels, logits)


def test_label_minus_one_is_not_the_last_class():
    """`optax.softmax_cross_entropy_with_integer_labels` takes it as such."""
    head, logits, label = jh.MultiClassHead(3), f32([[0.0, 1.0, 2.0]]), jax.device_put(np.array([-1], np.int32))
    with pytest.raises(ValueError, match="-1"):
        head.loss([-1], logits)
    with pytest.raises(ValueError, match="-1"):
        head.loss(label, logits, check=True)
    loss, gradient = jax.jit(jax.value_and_grad(lambda z: head.loss(label, z)))(logits)
    assert np.isnan(loss)
    assert np.isnan(gradient).all()
    with pytest.warns(jh.BadInputWarning, match=r"\b1 element"):
        assert np.isnan(head.measure(label, logits).compute()["accuracy"])


def test_swapped_labels_and_logits_are_refused():
    """`optax.sigmoid_binary_cross_entropy(labels, logits)`, the wrong way round, is -28.7."""
    labels, logits = column(1, 0, 1), column(3.2, -4.0, 7.5)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        jh.BinaryClassHead().loss(logits, labels)
    assert np.isnan(jax.jit(jh.BinaryClassHead().loss)(logits, labels))
    with pytest.raises(ValueError, match=r"logits shape .*\(3, 1\)"):
        jh.MultiClassHead(3).loss(np.eye(3, dtype=np.float32), np.array([[0], [1], [2]]))


def test_weights_are_not_replaced_by_ones():
    """torchmetrics' `MeanMetric(nan_strategy="disable")` of [1, 3] under [1, 0] is 2."""
    assert average(column(1, 3), weights=[1.0, 0.0]).compute()["label/mean"] == 1.0


def test_loss_and_average_loss_of_a_padded_batch_agree():
    """The original divides one by the batch size and the other by the weights: 0.626 and 1.670 for the same rows."""
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 2, 8), rng.normal(size=(8, 1)).astype(np.float32)
    there = np.arange(8) < 3
    exact = (np.logaddexp(0, logits[:, 0].astype(np.float64)) - labels * logits[:, 0])[there].mean()
    # With weights for a mask, the reduction that divides by them agrees too.
    head = jh.LogisticRegressionHead()
    weights, by_weight = there.astype(np.float32), dataclasses.replace(head, loss_reduction="mean")

    @jax.jit
    def both(head, hiding):
        return head.loss(labels, logits, **hiding), head.measure(labels, logits, **hiding)

    for loss, measured in (both(head, {"where": there}), both(by_weight, {"weights": weights})):
        np.testing.assert_allclose([loss, measured.compute()["average_loss"]], exact, rtol=1e-6)


def test_a_float32_counter_does_not_stop():
    """2^24 - 3, and ten ones more, are 2^24 in plain float32."""
    assert np.float32(2**24) + np.float32(1) == np.float32(2**24)
    one = average(column(1))
    state = np.asarray(one.state) * np.array([2**24 - 3, 0], np.float32)
    metrics = dataclasses.replace(one, state=state)
    for _ in range(10):
        metrics = metrics + one
    # The weights of the mean of ones: as float32 the true number, 2^24 + 7, is 2^24 + 8.
    total = np.asarray(metrics.state, np.float64).sum(-1)
    assert total[1 + STAMP :].max() == 2**24 + 7
    # One zero beside them, told apart from none.
    share = (metrics + average(column(0))).compute()["label/mean"]
    np.testing.assert_allclose(share, 1 - 1 / (2**24 + 8), rtol=1e-7)


def test_bfloat16_rows_are_counted_in_float32():
    """301 is not a bfloat16: ones that are counted in it are 300, or 302, or stop at 256."""
    ones, zeros = np.ones((301, 1), jnp.bfloat16), np.zeros((301, 1), jnp.bfloat16)
    summed = dataclasses.replace(MSE, loss_reduction="sum")
    own = jh.RegressionHead(loss_fn=lambda labels, logits: jnp.ones_like(logits, jnp.bfloat16), loss_reduction="sum")

    @jax.jit
    def run(zeros, ones):
        plain = jnp.sum(ones, dtype=jnp.bfloat16)
        return plain, summed.loss(zeros, ones), summed.loss(zeros, ones, weights=ones), own.loss(zeros, ones)

    plain, *losses = run(zeros, ones)
    assert plain != 301
    np.testing.assert_array_equal(losses, 301)
    metrics = average(ones, weights=ones)
    assert np.asarray(metrics.state).max() == 301
    assert metrics.compute()["label/mean"] == 1.0


@pytest.mark.parametrize("way", ["pmap", "shard_map"])
def test_a_mean_per_device_then_a_mean_over_devices(way):
    """With unequal masks the gradient is 38 % off by `pmap`, 149 % by `shard_map`; `axis_name=` makes it right."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 16, 1)).astype(np.float32)
    where = np.arange(16)[:, None] % 4 < np.arange(16)[:, None] // 4
    w = np.ones((1, 1), np.float32)
    exact = 2 * np.where(where, (x.astype(np.float64) * w - y) * x, 0).sum() / where.sum()

    def gradients(w, x, y, where):
        losses = [
            lambda w, axis_name=axis_name: MSE.loss(y, x @ w, where=where, axis_name=axis_name)
            for axis_name in ("d", None)
        ]
        return [jax.lax.pmean(jax.grad(loss)(w), "d") for loss in losses]

    if way == "pmap":
        split = (value.reshape(4, 4, 1) for value in (x, y, where))
        mapped = jax.pmap(gradients, "d", in_axes=(None, 0, 0, 0), devices=jax.devices()[:4])
        right, wrong = (np.asarray(each)[0] for each in mapped(w, *split))
    else:
        mesh = jax.make_mesh((4,), ("d",), (AxisType.Auto,), devices=jax.devices()[:4])
        rows = PartitionSpec("d")
        specs = (PartitionSpec(), rows, rows, rows)
        mapped = jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
        right, wrong = map(np.asarray, jax.jit(mapped)(w, x, y, where))

    np.testing.assert_allclose(right[0, 0], exact, rtol=1e-6)
    assert abs(wrong[0, 0] / exact - 1) > 0.1


def test_micro_batches_with_unequal_masks():
    """`optax.MultiSteps` over means is 26 % off; `normalizer=` gives the gradient of the whole batch."""
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 4, 4, 1)).astype(np.float32)
    where = np.arange(4)[None, :, None] < np.array([4, 1, 2, 1])[:, None, None]
    w = np.ones((1, 1), np.float32)
    exact = 2 * np.where(where, (x.astype(np.float64) - y) * x, 0).sum() / where.sum()

    def moved(normalizer):
        optimizer = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=4)

        def step(carry, batch):
            (params, state), (xs, ys, mask) = carry, batch
            gradient = jax.grad(lambda w: MSE.loss(ys, xs @ w, where=mask, normalizer=normalizer))(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        with jax.numpy_dtype_promotion("standard"):
            (params, _), _ = jax.jit(lambda: jax.lax.scan(step, (w, optimizer.init(w)), (x, y, where)))()
        return (w - np.asarray(params)).item()

    # MultiSteps takes the mean of four gradients: a quarter of the rows that exist divides each.
    np.testing.assert_allclose(moved(where.sum() / 4), exact, rtol=1e-5)
    assert abs(moved(None) / exact - 1) > 0.1
