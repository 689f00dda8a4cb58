"""Laws of the engine, which heads share: each on the heads of `zoo.ENGINE`, one for every way through it."""

import dataclasses
import functools
import io
import pickle
import warnings
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from laws import (
    ALL,
    ONES,
    N,
    added,
    assert_same_values,
    assert_values,
    average_of,
    draw,
    engine,
    engine_but,
    expected_gradient,
    f32,
    full_name,
    poison,
    replace_label,
    slope,
    step,
)
from zoo import ENGINE, ZOO, Entry, changed, marked

import jaxheads as jh

LARGE = 20_001


@functools.cache
def by_reduction(head: jh.Head):
    """The regularized loss under each reduction with its gradient, and the loss by another divisor: one program."""
    by = {reduction.value: changed(head, loss_reduction=reduction) for reduction in jh.Reduction}

    def run(labels, logits, weights, where, params):
        rest = {"weights": weights, "where": where, "params": params}

        def regularized(logits, head):
            return head.loss(labels, logits, None, "train", [np.float32(0.5), np.float32(0.25)], **rest)

        each = {name: jax.value_and_grad(regularized)(logits, other) for name, other in by.items()}
        return each, head.loss(labels, logits, normalizer=3.5, **rest)

    return jax.jit(run)


@engine_but(quick=("nested", "survival"))
def test_reductions_divide_values_and_gradients_alike(entry):
    labels, logits = draw(entry)
    weights = np.array([0.5, 2, 1, 0, 0.3, 1, 4, 0], np.float32)[:, None]
    where = (np.arange(N) % 3 != 1)[:, None]
    hidden, params = ~where | (weights == 0), entry.params()
    run = by_reduction(entry.head)
    each, normalized = run(*poison(entry, labels, logits, hidden), weights, where, params)
    by_another = entry.expected_loss(labels, logits, weights, where, normalizer=3.5)
    np.testing.assert_allclose(normalized, by_another, rtol=2e-6, atol=2e-6)
    for reduction, (loss, gradient) in each.items():
        expect = functools.partial(entry.expected_loss, reduction=reduction)
        exact = expect(labels, logits, weights, where)
        np.testing.assert_allclose(loss, exact + 0.75, rtol=2e-6, atol=2e-6, err_msg=reduction)
        slopes = slope(lambda z, expect=expect: expect(labels, z, weights, where), logits)
        np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=2e-6, err_msg=reduction)
        np.testing.assert_array_equal(np.asarray(gradient)[hidden[:, 0]], 0)
    each, normalized = jax.device_get(run(*poison(entry, labels, logits, ALL), ONES, ~ALL, params))
    assert normalized == 0
    for loss, gradient in each.values():
        assert loss == 0.75
        np.testing.assert_array_equal(gradient, 0)


# Law 1: where=False is absence


def test_per_logit_weights_hide_single_logits():
    entry = next(entry for entry in ZOO if entry.head.per_logit_weights and entry.head.logits_dimension > 1)
    labels, logits = draw(entry)
    rng = np.random.default_rng(0)
    weights = rng.choice(f32([0, 0.5, 1, 3]), logits.shape)
    where = np.arange(N)[:, None] != 2
    hidden = (weights == 0) | ~where
    spoiled_labels = np.where(hidden, np.float32(np.nan), labels)
    spoiled_logits = np.where(hidden, np.float32(np.inf), logits)
    loss, gradient, _, measured = step(entry.head)(spoiled_labels, spoiled_logits, weights, where, {})
    w = np.where(where, weights, 0).astype(np.float64)
    values = (logits.astype(np.float64) - labels) ** 2
    np.testing.assert_allclose(loss, (w * values).sum() / w.sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * w * (logits - labels) / w.sum(), rtol=1e-5, atol=1e-7)
    got = measured.compute()
    np.testing.assert_allclose(got["average_loss/r"], (w * values).sum() / w.sum(), rtol=1e-6)
    np.testing.assert_allclose(got["label/mean/r"], (w * labels).sum() / w.sum(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["prediction/mean/r"], (w * np.exp(logits)).sum() / w.sum(), rtol=1e-5)


def root_error(labels, logits):
    return jnp.sqrt((labels - logits) ** 2)


def relative_error(labels, logits):
    return jnp.abs(labels - logits) / labels


def log_error(labels, logits):
    return (jnp.log(labels) - jnp.log(logits)) ** 2


@pytest.mark.parametrize("loss_fn", [root_error, relative_error, log_error])
def test_losses_that_are_undefined_at_the_fill(loss_fn):
    """Whatever stands in for a hidden row, a loss of the user's own may be undefined there, and its gradient too."""
    rng = np.random.default_rng(0)
    labels, hidden = rng.uniform(1, 2, (2, N, 1)).astype(np.float32)
    where, kernel = np.arange(N)[:, None] % 3 != 0, f32([[1.3]])
    head = jh.RegressionHead(loss_fn=loss_fn)

    def lazy(kernel, hidden, labels, where):
        return head.loss(labels, jh.LinearLogits(hidden, kernel), where=where)

    def dense(kernel, hidden, labels, where):
        return head.loss(labels, hidden @ kernel, where=where)

    @jax.jit
    def run():
        masked, dropped = (hidden, labels, where), (x[where[:, 0]] for x in (hidden, labels, where))
        rows = (masked, tuple(dropped))
        both = [[jax.value_and_grad(loss)(kernel, *each) for each in rows] for loss in (dense, lazy)]
        return both, head.measure(labels, hidden @ kernel, where=where)

    both, measured = run()
    y, z = labels[where].astype(np.float64), 1.3 * hidden[where].astype(np.float64)
    by_hand = {
        root_error: np.abs(y - z),
        relative_error: np.abs(y - z) / y,
        log_error: np.log(y / z) ** 2,
    }
    np.testing.assert_allclose(measured.compute()["average_loss"], by_hand[loss_fn].mean(), rtol=2e-6)
    for (value, gradient), dropped in both:
        np.testing.assert_allclose(value, by_hand[loss_fn].mean(), rtol=2e-6)
        np.testing.assert_allclose(value, dropped[0], rtol=1e-6)
        np.testing.assert_allclose(gradient, dropped[1], rtol=1e-6)


# Law 2: weights are multiplicities


def test_soft_labels_are_split_weights():
    entry = next(entry for entry in ZOO if entry.name == "binary_soft_grid")
    for head in (entry.head, jh.BinaryClassHead(thresholds=(0.3, 0.9))):
        labels, logits = draw(entry, 5)
        weights, twice = np.linspace(0.1, 2.0, N, dtype=np.float32)[:, None], np.concatenate([logits, logits])
        ones, zeros = np.ones_like(labels), np.zeros_like(labels)
        soft = head.measure(
            np.concatenate([labels, labels]), twice, weights=np.concatenate([weights, 0 * weights])
        ).compute()
        hard = head.measure(
            np.concatenate([ones, zeros]),
            twice,
            weights=np.concatenate([weights * labels, weights * (1 - labels)]),
        ).compute()
        for key in soft:
            np.testing.assert_allclose(soft[key], hard[key], rtol=1e-6, err_msg=key)


# What a head adds to it is tested without dropping: `..._are_the_oracles_of_the_rows_that_are_there`, on every head.
@engine_but(quick=("nested", "survival"))
def test_where_equals_dropping_the_rows(entry):
    """To the number of rows that is left: to none, too."""
    labels, logits = draw(entry, 1)
    where = np.array([1, 0, 0, 1, 1, 0, 1, 1], bool)[:, None]
    weights = np.linspace(0.2, 3, N, dtype=np.float32)[:, None]
    for there in (where, ~ALL):
        keep = there[:, 0]
        spoiled = poison(entry, labels, logits, ~there)
        masked = jax.device_get(step(entry.head)(*spoiled, weights, there, entry.params()))
        rows = jax.tree.map(lambda x, keep=keep: x[keep], (labels, logits, weights, ALL))
        dropped = step(entry.head)(*rows, entry.params())
        np.testing.assert_allclose(masked[0], dropped[0], rtol=1e-6)
        np.testing.assert_allclose(masked[1][keep], dropped[1], rtol=1e-6, atol=1e-7)
        chex.assert_trees_all_close(masked[2], dropped[2], rtol=1e-5, atol=1e-7)
        assert_same_values(masked[3], dropped[3])
        # Called eagerly, NumPy garbage in hidden rows is not refused either.
        eager = entry.head.loss(*spoiled, where=there, weights=weights, params=entry.params())
        np.testing.assert_allclose(eager, dropped[0], rtol=1e-6)
    assert masked[0] == 0


# Law 3: metrics add


@pytest.mark.parametrize(
    "entry", marked((e for e in ZOO if e.name in ("binary", "ordinal", "survival")), quick=("survival",))
)
def test_hosts_with_different_row_counts(entry):
    """Each host measures its own rows, five, none and eleven, and sends its metrics as bytes."""
    labels, logits = draw(entry, 6, (16,))
    params = entry.params()
    sent = [
        pickle.dumps(
            entry.head.measure(jax.tree.map(lambda x, rows=rows: x[rows], labels), logits[rows], params=params)
        )
        for rows in (slice(0, 5), slice(5, 5), slice(5, 16))
    ]
    merged = added(map(pickle.loads, sent))
    assert_same_values(merged, entry.head.measure(labels, logits, params=params))
    assert_values(merged.compute(bounds=True), entry.expected_metrics(labels, logits))


@engine
def test_zero_is_the_identity_and_checkpoints_are_arrays(entry):
    labels, logits = draw(entry, 7)
    head, params, rows = entry.head, entry.params(), {"weights": ONES, "where": ALL}
    zero = head.metrics()
    measured = head.measure(labels, logits, params=params, **rows)
    assert measured.state.dtype == zero.state.dtype == jnp.float32
    assert measured.state.shape == (*zero.state.shape[:1], 1)
    assert zero.state.shape[1:] == (2,)
    for same in (zero + measured, measured + zero, added([measured]), zero + zero + measured):
        np.testing.assert_array_equal(np.asarray(same.state).sum(-1), np.asarray(measured.state).sum(-1))
    assert np.asarray((zero + zero).state).sum() == 0
    updated = head.update_metrics(zero, None, logits, labels, params=params, **rows)
    np.testing.assert_array_equal(updated.state, (zero + measured).state)
    # The head's metrics are of the unbound head, however it was given its parameters.
    bound = head.bind(params)
    np.testing.assert_array_equal(bound.measure(labels, logits, **rows).state, measured.state)
    assert bound.metrics().head == measured.head == head

    file = io.BytesIO()
    np.save(file, updated.state)
    file.seek(0)
    loaded = dataclasses.replace(head.metrics(), state=np.load(file))
    assert_same_values(loaded, updated, rtol=0)
    assert_same_values(loaded + measured, updated + measured, rtol=0)
    assert_same_values(pickle.loads(pickle.dumps(updated)), updated, rtol=0)
    leaves, tree = jax.tree.flatten(updated)
    assert len(leaves) == 1
    assert jax.tree.unflatten(tree, leaves).compute().keys() == updated.compute().keys()


@engine
def test_scan_carry_keeps_its_type(entry):
    labels, logits = draw(entry, 8, (4, N))
    head, rest = entry.head, {"params": entry.params(), "weights": ONES, "where": ALL}

    @jax.jit
    def evaluate(metrics, labels, logits):
        def body(metrics, batch):
            return head.update_metrics(metrics, None, batch[1], batch[0], **rest), None

        return jax.lax.scan(body, metrics, (labels, logits))[0]

    scanned = evaluate(head.metrics(), labels, logits)
    looped = head.metrics()
    chex.assert_trees_all_equal_structs(scanned, looped)
    chex.assert_trees_all_equal_shapes_and_dtypes(scanned, looped)
    assert jax.typeof(scanned.state) == jax.typeof(looped.state)
    for i in range(4):
        looped = head.update_metrics(looped, None, logits[i], jax.tree.map(lambda x, i=i: x[i], labels), **rest)
    assert_same_values(scanned, looped)
    assert_values(scanned.compute(bounds=True), entry.expected_metrics(labels, logits))
    assert_same_values(evaluate(scanned, labels, logits), scanned)


@engine_but(quick=("binary", "sequential"))
def test_regularization_is_the_mean_over_updates(entry):
    labels, logits = draw(entry)
    head, params = entry.head, entry.params()
    key, average = full_name(entry, "regularization_loss"), average_of(entry)
    metrics = head.metrics(regularization_losses=[])
    assert np.isnan(metrics.compute()[key])
    for losses in ([0.5, 0.25], [1.0, 0.0], [0.0, 0.0]):
        metrics = head.update_metrics(metrics, None, logits, labels, "eval", losses, params=params)
    np.testing.assert_allclose(metrics.compute()[key], 1.75 / 3, rtol=1e-6)
    assert key not in step(head)(labels, logits, ONES, ALL, params)[-1].compute()
    np.testing.assert_allclose(metrics.compute()[average], entry.expected_metrics(labels, logits)[average], rtol=2e-6)


def test_no_regularization_losses_are_zero():
    head = jh.RegressionHead()
    metrics = head.update_metrics(head.metrics([]), None, f32([[1.0]]), [1.0], "eval", [2.0])
    metrics = head.update_metrics(metrics, None, f32([[1.0]]), [1.0], "eval", [])
    assert metrics.compute()["regularization_loss"] == 1.0
    assert head.loss([1.0], f32([[1.0]]), regularization_losses=[]) == 0
    assert head.loss([1.0], f32([[1.0]]), regularization_losses=[1.0, 2.5]) == 3.5
    for wrong in (3.0, [np.ones(2)]):
        with pytest.raises(ValueError, match="regularization_losses"):
            head.loss([1.0], f32([[1.0]]), regularization_losses=wrong)


# Law 4: counters do not stop


@engine_but(quick=("binary", "survival"))
def test_counters_go_on(entry):
    """After 2^24 and after 2^31 rows, a thousand more, one at a time."""
    labels, logits = draw(entry, 9)
    head, params, extra = entry.head, entry.params(), 1000
    each_weight, last = np.resize(f32([0.1, 0.3]), (N, 1)), np.arange(N)[:, None] == N - 1
    first = step(head)(labels, logits, each_weight, ALL, params)[-1]
    state, one = (
        np.asarray(measured.state, np.float64)[:, 0]
        for measured in (first, step(head)(labels, logits, each_weight, last, params)[-1])
    )
    row = jax.tree.map(lambda x: x[N - 1 :], {"labels": labels, "logits": logits, "weights": each_weight})

    @jax.jit
    def evaluate(metrics):
        def body(_, metrics):
            return head.update_metrics(metrics, None, params=params, **row)

        return jax.lax.fori_loop(0, extra, body, metrics)

    for times in (2.0**21, 2.0**28):
        many = np.stack([state * times, 0 * state], -1).astype(np.float32)
        metrics = evaluate(dataclasses.replace(first, state=many))
        exact = state * times + extra * one
        np.testing.assert_allclose(np.asarray(metrics.state, np.float64).sum(-1), exact, rtol=1e-10)
        weights = (times + extra * last) * each_weight
        assert_values(metrics.compute(bounds=True), entry.expected_metrics(labels, logits, weights))


@pytest.mark.parametrize("head", [jh.BinaryClassHead(), jh.MultiClassHead(3)], ids=["binary", "multi_class"])
def test_a_thousand_wrong_answers_after_sixteen_million_right_ones(head):
    n = head.logits_dimension
    right, wrong = (f32([[-3.0], [3.0]]) if n == 1 else f32([[3, 0, 0], [0, 3, 0]]))[:, None]
    label = np.zeros((1,), np.int32)

    @jax.jit
    def evaluate():
        first = head.measure(label, right).state[..., 0] * 2**24
        metrics = dataclasses.replace(head.metrics(), state=jnp.stack([first, jnp.zeros_like(first)], -1))

        def body(metrics, _):
            return head.update_metrics(metrics, None, wrong, label), None

        return jax.lax.scan(body, metrics, length=1000)[0]

    assert abs(float(evaluate().compute()["accuracy"]) - 2**24 / (2**24 + 1000)) < 2e-7


# Law 6: float32 reductions


@engine_but(quick=("regression_3_exp", "survival"))
def test_input_dtypes(entry):
    labels, logits = draw(entry, 10)
    head, rest = entry.head, {"params": entry.params(), "weights": ONES, "where": ALL}
    for dtype in (jnp.bfloat16, np.float16, np.float64, np.int32, np.int8):
        cast = logits.astype(dtype)
        expected = entry.expected_loss(labels, cast.astype(np.float64))
        metrics = entry.expected_metrics(labels, cast.astype(np.float64))
        for array in (cast, jax.device_put(cast)) if dtype in (jnp.bfloat16, np.int8) else (cast,):
            loss = head.loss(labels, array, **rest)
            assert loss.dtype == jnp.float32
            np.testing.assert_allclose(loss, expected, rtol=2e-6, atol=2e-6, err_msg=str(dtype))
        measured = head.measure(labels, cast, **rest)
        assert measured.state.dtype == jnp.float32
        assert_values(measured.compute(bounds=True), metrics)
    both = [logits.astype(dtype) for dtype in (jnp.bfloat16, jnp.float16)]
    gradients = jax.jit(jax.grad(lambda both: sum(head.loss(labels, z, **rest) for z in both)))(both)
    for cast, gradient in zip(both, gradients, strict=True):
        assert gradient.dtype == cast.dtype
        expected = expected_gradient(entry, labels, cast.astype(np.float64))
        np.testing.assert_allclose(np.asarray(gradient, np.float32), expected, rtol=0.01, atol=1e-3)


@engine_but(quick=("binary", "survival"))
def test_low_precision_weights_count_exactly(entry):
    """301 is not a bfloat16."""
    labels, logits = draw(entry, 11, (301,))
    rounded, ones = logits.astype(jnp.bfloat16), np.ones((301, 1), jnp.bfloat16)
    head, params = changed(entry.head, loss_reduction="mean"), entry.params()

    @jax.jit
    def run(logits, weights):
        rest = {"weights": weights, "params": params}
        return head.loss(labels, logits, **rest), head.measure(labels, logits, **rest)

    loss, measured = run(rounded, ones)
    exact = rounded.astype(np.float64)
    np.testing.assert_allclose(loss, entry.expected_loss(labels, exact, reduction="mean"), rtol=2e-6)
    assert_values(measured.compute(bounds=True), entry.expected_metrics(labels, exact))


@engine_but(quick=("nested", "survival"))
def test_float64_mode(entry):
    labels, logits = draw(entry, 12)
    head, params = entry.head, entry.params()
    wide = (jax.tree.map(lambda x: x.astype(np.float64) if x.dtype.kind == "f" else x, labels), np.float64(logits))
    with jax.enable_x64(True):

        @jax.jit
        def run(metrics, labels, z, weights):
            def body(metrics, _):
                return head.update_metrics(metrics, None, z, labels, weights=weights, params=params), None

            loss = jax.value_and_grad(lambda z: head.loss(labels, z, weights=weights, params=params))(z)
            return (
                *loss,
                jax.lax.scan(body, metrics, length=2)[0],
                head.predictions(z, params=params),
            )

        loss, gradient, metrics, predictions = run(head.metrics(), *wide, np.float64(ONES))
        assert loss.dtype == metrics.state.dtype == jnp.float32
        assert gradient.dtype == jnp.float64
        assert all(value.dtype in (jnp.float32, jnp.int32) for value in jax.tree.leaves(predictions))
        np.testing.assert_allclose(loss, entry.expected_loss(labels, logits), rtol=2e-6, atol=2e-6)
        assert_values(metrics.compute(bounds=True), entry.expected_metrics(labels, logits))


@pytest.mark.parametrize(
    "entry", marked(e for e in ZOO if e.name in ("binary", "regression_3_exp", "multi_class", "multi_label", "poisson"))
)
def test_label_dtypes(entry):
    """Any dtype that can hold a legal label gives the same loss; an inexact one is refused where ids are wanted."""
    head, kind = entry.head, entry.head.label_spec.kind
    labels, logits = draw(entry, 13)
    legal = []
    for dtype in (np.bool_, np.uint8, np.int64, jnp.bfloat16, np.float64):
        given = np.round(labels).astype(dtype)
        if kind != "int" or jnp.issubdtype(dtype, jnp.integer):
            legal.append(given)
            continue
        with pytest.raises(ValueError, match="dtype"):
            head.loss(given, logits)
    traced = jax.jit(lambda every: [head.loss(given, logits) for given in every])(legal)
    for given, inside in zip(legal, traced, strict=True):
        expected = entry.expected_loss(given.astype(np.int64 if kind == "int" else np.float64), logits)
        np.testing.assert_allclose((head.loss(given, logits), inside), expected, rtol=2e-6, atol=2e-6)


# Law 7: nothing to see


def test_only_what_was_never_seen_is_undefined():
    values = jh.BinaryClassHead().measure([0, 0], f32([[1.0], [-1.0]])).compute()
    assert values["accuracy"] == 0.5
    assert values["precision"] == 0
    undefined = {key for key, value in values.items() if np.isnan(value)}
    assert undefined == {"recall", "auc", "auc_precision_recall"}


# Law 8: bad input is refused or visible


@engine
def test_wrong_shapes_are_refused_with_both_shapes(entry):
    head, params = entry.head, entry.params()
    labels, logits = draw(entry)
    d = head.logits_dimension

    def calls(labels=labels, logits=logits, **kwargs):
        yield lambda: head.loss(labels, logits, params=params, **kwargs)
        yield lambda: head.measure(labels, logits, params=params, **kwargs)
        yield lambda: head.update_metrics(head.metrics(), None, logits, labels, params=params, **kwargs)
        yield lambda: jax.eval_shape(lambda z: head.loss(labels, z, params=params, **kwargs), logits)

    def refused(*needles, **kwargs):
        for call in calls(**kwargs):
            with pytest.raises(ValueError) as error:  # noqa: PT011, the needles are the match
                call()
            for needle in needles:
                assert str(needle) in str(error.value)

    refused("rank", (N,), logits=logits[:, 0])
    refused((N, d + 1), d, logits=np.concatenate([logits, logits[:, :1]], -1))
    refused("rank", (), logits=np.float32(1))
    refused((N - 1, 1), (N, 1), weights=ONES[:-1])
    refused((N, 5), (N, 1), weights=np.ones((N, 5), np.float32))
    refused((N + 1,), (N, 1), where=np.ones(N + 1, bool))
    refused("dtype", weights=np.array(["a"] * N))
    refused("dtype", where=np.array(["a"] * N))
    refused("0 and 1", where=np.full((N, 1), 2))
    refused("labels", labels=None)
    for rows in (1, N - 1):
        # A MultiHead stops at its first head.
        first = [labels[entry.parts[0].head.name]] if entry.parts else jax.tree.leaves(labels)
        shapes = {str((rows, x.shape[-1])) for x in first}
        refused("Suggested Fix", *shapes, N, labels=jax.tree.map(lambda x, rows=rows: x[:rows], labels))
    wide = jax.tree.map(lambda x: np.concatenate([x, x], -1), labels)
    refused("Suggested Fix", 2 * jax.tree.leaves(labels)[0].shape[-1], labels=wide)
    refused("", labels=jax.tree.map(lambda x: x.astype(str), labels))
    refused("", labels=jax.tree.map(lambda x: x.astype(np.complex64), labels))
    if isinstance(labels, dict):
        one = next(iter(labels))
        refused(*labels, labels=labels[one])
        refused(*labels, labels={one: labels[one]})
    with pytest.raises(ValueError, match="sparse"):
        head.loss(labels, logits, mode="sparse", params=params)


@engine
@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_illegal_weights(entry, weight):
    head, params = entry.head, entry.params()
    labels, logits = draw(entry, 18)
    weights = ONES.copy()
    weights[2] = weight
    where = (np.arange(N) != 2)[:, None]
    with pytest.raises(ValueError, match=r"weights.*\(2, 0\)"):
        head.loss(labels, logits, weights=weights, params=params)
    with pytest.raises(ValueError, match=r"weights.*\(2, 0\)"):
        head.measure(labels, logits, weights=jnp.asarray(weights), check=True, params=params)
    loss, gradient, _, measured = step(head)(labels, logits, weights, ALL, params)
    assert np.isnan(loss)
    assert np.isnan(gradient[2]).all()
    with pytest.warns(jh.BadInputWarning, match=rf"\b{len(entry.parts) or 1} element"):
        values = measured.compute(bounds=True)
    assert_values(values, entry.expected_metrics(labels, logits, where=where))
    loss, gradient, _, measured = step(head)(labels, logits, weights, where, params)
    np.testing.assert_allclose(loss, entry.expected_loss(labels, logits, where=where), rtol=2e-6, atol=2e-6)
    chex.assert_tree_all_finite(gradient)
    assert_values(measured.compute(bounds=True), entry.expected_metrics(labels, logits, where=where))


@engine
def test_metrics_inside_jit_have_the_values_outside(entry):
    """Of bad rows nothing can be warned there, and the values are the same."""
    labels, logits = draw(entry, 17)
    bad = ONES.copy()
    bad[5] = -1
    compute = jax.jit(lambda metrics: metrics.compute())
    for weights in (ONES, bad):
        measured = step(entry.head)(labels, logits, weights, ALL, entry.params())[-1]
        inside = compute(measured)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", jh.BadInputWarning)
            values = measured.compute(bounds=True)
        assert_values({k: np.asarray(v) for k, v in inside.items()}, {k: values[k] for k in inside}, rtol=1e-5)


def test_a_where_that_is_neither_true_nor_false():
    entry = next(entry for entry in ZOO if entry.name == "binary")
    labels, logits = draw(entry, 18)
    where = np.ones((N, 1), np.float32)
    where[:2] = [[0], [0.5]]
    for garbage in (where, jnp.asarray(where)):
        with pytest.raises(ValueError, match="0 and 1"):
            entry.head.loss(labels, logits, where=garbage, check=True)
    loss, gradient, _, measured = step(entry.head)(labels, logits, ONES, where, {})
    assert np.isnan(loss)
    assert np.isnan(gradient[1]).all()
    with pytest.warns(jh.BadInputWarning, match=r"\b1 element"):
        values = measured.compute(bounds=True)
    assert_values(values, entry.expected_metrics(labels, logits, where=where == 1))


@pytest.mark.parametrize("entry", marked(entry for entry in ZOO if entry.name in ENGINE and entry.illegal is not None))
def test_checkify_gives_the_message(entry):
    head, params = entry.head, entry.params()
    labels, logits = draw(entry, 19)
    bad = replace_label(labels, 1, entry.illegal)

    def loss(labels, logits, where):
        return head.loss(labels, logits, where=where, params=params)

    checked = jax.jit(checkify.checkify(jax.jit(loss), errors=checkify.user_checks))
    error, value = checked(bad, logits, ALL)
    assert "illegal label or weight" in error.get()
    assert type(getattr(head, "static_head", head)).__name__ in error.get()
    assert np.isnan(value)
    error, value = checked(bad, logits, (np.arange(N) != 1)[:, None])
    assert error.get() is None
    assert np.isfinite(value)
    # Without checkify, nothing of it is left in the program.
    text = jax.jit(loss).lower(bad, logits, ALL).as_text()
    assert "custom_call" not in text


# Law 9: one trace, one answer


@engine_but(quick=("nested", "survival"))
def test_vmap_over_examples_is_a_loop(entry):
    labels, logits = draw(entry, 23)
    head, params = entry.head, entry.params()
    weights = np.linspace(0, 2, N, dtype=np.float32)[:, None]

    def one(labels, logits, weights):
        labels, logits, weights = jax.tree.map(lambda x: x[None], (labels, logits, weights))
        loss = jax.value_and_grad(lambda z: head.loss(labels, z, weights=weights, params=params))(logits)
        return *loss, head.measure(labels, logits, weights=weights, params=params)

    losses, gradients, measured = jax.device_get(jax.jit(jax.vmap(one))(labels, logits, weights))
    for i in range(N):
        row = jax.tree.map(lambda x, i=i: x[i : i + 1], (labels, logits, weights))
        np.testing.assert_allclose(losses[i], entry.expected_loss(*row), rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(gradients[i], expected_gradient(entry, *row), rtol=1e-5, atol=2e-6)
    # The leading axis passes through compute, + and a sum.
    values = measured.compute(bounds=True)
    for i in range(1, N):
        single = jax.tree.map(lambda x, i=i: x[i], measured).compute(bounds=True)
        assert values.keys() == single.keys()
        for key, value in single.items():
            assert values[key].shape == (N, *np.shape(value))
            np.testing.assert_allclose(values[key][i], value, rtol=1e-6, err_msg=key)
    total = added(jax.tree.map(lambda x, i=i: x[i], measured) for i in range(N))
    assert_values(total.compute(bounds=True), entry.expected_metrics(labels, logits, weights))
    assert "8" in repr(measured)
    twice = jax.device_get(measured + measured)
    assert_same_values(jax.tree.map(lambda x: x[3], twice), jax.tree.map(lambda x: x[3], measured))


def test_running_prior_counts_what_is_seen():
    entry = next(entry for entry in ZOO if entry.name == "running_prior")
    labels, logits = draw(entry, 28)
    weights = np.linspace(0, 2, N, dtype=np.float32)[:, None]
    where = (np.arange(N) % 4 != 1)[:, None]
    spoiled = poison(entry, labels, logits, ~where | (weights == 0))
    state = entry.head.init_state()
    update = jax.jit(lambda state: entry.head.update_state(state, *spoiled, weights=weights, where=where))
    for _ in range(3):
        state = update(state)
    w = np.where(where, weights, 0).astype(np.float64)
    expected = [1 + 3 * (w * labels).sum(), 2 + 3 * w.sum()]
    np.testing.assert_allclose(np.asarray(state["counts"], np.float64).sum(-1), expected, rtol=1e-6)
    # Evaluation reads the state and leaves it alone.
    loss, gradient = jax.jit(jax.value_and_grad(lambda state: entry.head.loss(labels, logits, params=state)))(state)
    np.testing.assert_allclose(loss, entry.expected_loss(labels, logits, params=state), rtol=2e-6)
    np.testing.assert_array_equal(gradient["counts"], 0)


# Fields and features


class SettingHead(jh.Head):
    """A head that checks nothing of its own accord, and reads a feature."""

    setting: Any = None
    rate: jax.Array = jh.learned(lambda head, key: jnp.ones(1))

    logits_dimension = 1

    def losses(self, labels, logits, features: Any = None):
        rate = jnp.expand_dims(self.rate, tuple(range(logits.ndim - 1)))
        return (labels - logits * rate) ** 2 / features["scale"]


def test_sequences_in_static_fields_become_tuples_and_arrays_are_refused():
    head = jh.BinaryClassHead(thresholds=[0.3, 0.5], label_vocabulary=["a", "b"])  # pyright: ignore[reportArgumentType]
    assert head.thresholds == (0.3, 0.5)
    assert head.label_vocabulary == ("a", "b")
    assert head == jh.BinaryClassHead(thresholds=(0.3, 0.5), label_vocabulary=("a", "b"))
    for bad in (np.array([0.3]), jnp.array([0.3]), float("nan"), [0.3, float("nan")], {0.3: 1}):
        with pytest.raises(ValueError, match="thresholds"):
            jh.BinaryClassHead(thresholds=bad)  # pyright: ignore[reportArgumentType]
    assert SettingHead([[1, 2], [3]]).setting == ((1, 2), (3,))
    for bad in (
        np.ones(2),
        jnp.ones(2),
        [np.ones(2)],
        float("nan"),
        (1.0, (float("nan"),)),
        np.float32("nan"),
        {},
        set(),
    ):
        with pytest.raises(ValueError, match="setting"):
            SettingHead(bad)
    assert jh.MultiClassHead(np.int64(3)) == jh.MultiClassHead(3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    # A sequence's features hold its mask: tests of its own.
    "entry",
    marked(
        (entry for entry in ZOO if entry.name in ENGINE and entry.name != "sequential"),
        quick=("regression_3_exp", "survival"),
    ),
)
def test_features_may_hold_strings(entry):
    labels, logits = draw(entry, 29)
    params, weights = entry.params(), np.linspace(0, 2, N, dtype=np.float32)
    expected = entry.expected_loss(labels, logits, weights)
    metrics = entry.expected_metrics(labels, logits, weights)
    features = {"w": weights, "who": np.array(["ann", "bob"] * 4), "words": [["x"], ["y", "z"]] * 4, "none": None}
    for column, given in (("w", features), ("w", {**features, "w": weights.tolist()}), (lambda f: f["w"], features)):
        head = changed(entry.head, weight_column=column)
        loss = head.loss(labels, logits, given, params=params)
        np.testing.assert_allclose(loss, expected, rtol=2e-6, atol=2e-6)
    head = changed(entry.head, weight_column="w")
    closed = jax.jit(lambda z: head.loss(labels, z, features, params=params))(logits)
    np.testing.assert_allclose(closed, expected, rtol=2e-6, atol=2e-6)
    updated = head.update_metrics(head.metrics(), features, logits, labels, params=params)
    assert_values(updated.compute(bounds=True), metrics)


def scaled_error(labels, logits, features):
    return (logits - labels) ** 2 / features["scale"]


def test_loss_fn_reads_features_whose_hidden_rows_are_harmless():
    rng = np.random.default_rng(0)
    labels, logits = rng.normal(size=(2, N, 1)).astype(np.float32)
    scale = rng.uniform(1, 2, (N, 1)).astype(np.float32)
    where = (np.arange(N) % 3 != 0)[:, None]
    exact = np.where(where, (logits.astype(np.float64) - labels) ** 2 / scale, 0)
    head = jh.RegressionHead(loss_fn=scaled_error)

    @jax.jit
    def run(scale):
        features = {"scale": scale, "who": ["ann"] * N}
        loss = jax.value_and_grad(lambda z: head.loss(labels, z, features, where=where))(logits)
        return *loss, head.measure(labels, logits, features, where=where)

    for garbage in (0.0, np.nan):
        loss, gradient, measured = run(np.where(where, scale, np.float32(garbage)))
        np.testing.assert_allclose(loss, exact.sum() / where.sum(), rtol=1e-6)
        slopes = np.where(where, 2 * (logits - labels) / scale, 0) / where.sum()
        np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(measured.compute()["average_loss"], exact.sum() / where.sum(), rtol=1e-6)


def test_features_of_hidden_rows_do_not_reach_learned_fields():
    rng = np.random.default_rng(0)
    labels, logits = rng.normal(size=(2, N, 1)).astype(np.float32)
    scale = rng.uniform(1, 2, N).astype(np.float32)
    where = np.arange(N) % 3 != 0
    slope = np.mean((-2 * (labels.astype(np.float64) - logits) * logits)[where, 0] / scale[where])
    head = SettingHead()

    def loss(params, labels, logits, where, scale):
        features = {"scale": scale, "who": np.array(["ann"] * N)}
        return head.loss(labels, logits, features, where=where, params=params)

    gradient = jax.jit(jax.grad(loss))
    for garbage in (0.0, np.nan):
        for lead in ((N,), (2, 4)):
            rows = (labels, logits, where, np.where(where, scale, np.float32(garbage)))
            got = gradient({"rate": np.ones(1, np.float32)}, *(x.reshape(*lead, 1) for x in rows))
            np.testing.assert_allclose(got["rate"][0], slope, rtol=1e-5)


def test_strings_are_labels_where_there_is_a_vocabulary():
    names = np.array(["ant", "bee", "cat"])
    head = jh.MultiClassHead(3, label_vocabulary=("ant", "bee", "cat"))
    entry = dataclasses.replace(next(entry for entry in ZOO if entry.name == "multi_class"), head=head)
    logits = entry.logits(np.random.default_rng(0), (N,))
    ids = np.arange(N)[:, None] % 3
    expected = entry.expected_loss(ids, logits)
    for labels in (names[ids], names[ids[:, 0]].tolist(), names[ids].astype("S"), names[ids].astype(object), ids):
        np.testing.assert_allclose(head.loss(labels, logits), expected, rtol=2e-6)
        np.testing.assert_array_equal(head.encode_labels(labels).reshape(N, 1), ids)
    with pytest.raises(ValueError, match="dog"):
        head.loss(["dog"] * N, logits)
    where = ids[:, 0] != 1
    spoiled = np.where(where, names[ids[:, 0]], "dog")
    np.testing.assert_allclose(
        head.loss(spoiled, logits, where=where), entry.expected_loss(ids, logits, where=where), rtol=2e-6
    )
    with pytest.raises(ValueError, match="label_vocabulary"):
        jh.MultiClassHead(3).loss(["ant"] * N, logits)
    decoded = head.decode_predictions(jax.jit(head.predictions)(logits))
    np.testing.assert_array_equal(decoded["classes"][:, 0], names[logits.argmax(-1)])
    np.testing.assert_array_equal(decoded["all_classes"], [["ant", "bee", "cat"]] * N)


# Large batches, and logits that are not multiplied yet


LARGE_HEADS = marked(
    (entry for entry in ZOO if entry.name in (*ENGINE, "multi_label", "ordinal")),
    quick=("regression_3_exp", "nested", "sequential"),
)
# All pairs of 20,001 rows: that one runs for longer than it compiles.
LARGE_HEADS = [
    pytest.param(*case.values, id=case.id, marks=(*case.marks, *([pytest.mark.all_passes] * (case.id == "roc_auc"))))
    for case in LARGE_HEADS
]


@pytest.mark.parametrize("entry", LARGE_HEADS)
def test_large_batches(entry):
    """Rows enough to be cut in tiles, the last of them partial: with weights, masks, garbage, areas and bad rows."""
    rng = np.random.default_rng(30)
    labels, logits = draw(entry, 30, (LARGE,))
    weights = rng.choice(f32([0, 0.1, 0.3, 3]), (LARGE, 1))
    where = rng.random((LARGE, 1)) < 0.9
    head, params = entry.head, entry.params()
    spoiled = poison(entry, labels, logits, ~where | (weights == 0))

    @jax.jit
    def run(labels, logits, weights, where):
        rest = {"weights": weights, "where": where, "params": params}
        return head.loss(labels, logits, **rest), head.measure(
            labels, logits, regularization_losses=[np.float32(0.5), np.float32(1)], **rest
        )

    loss, measured = run(*spoiled, weights, where)
    np.testing.assert_allclose(loss, entry.expected_loss(labels, logits, weights, where), rtol=5e-6)
    values = measured.compute(bounds=True)
    assert values[full_name(entry, "regularization_loss")] == 1.5
    assert_values(values, entry.expected_metrics(labels, logits, weights, where))
    # Bad rows, in all tiles, are counted once.
    rows = np.arange(0, LARGE, 500)
    bad = np.ones_like(weights)
    if entry.illegal is None:
        bad[rows] = -1
    else:
        spoiled = replace_label(labels, 0, entry.illegal), logits
        spoiled[0][rows] = entry.illegal
    labels, logits = (labels, logits) if entry.illegal is None else spoiled
    loss, measured = run(labels, logits, bad, np.ones_like(where))
    assert np.isnan(loss)
    with pytest.warns(jh.BadInputWarning, match=rf"\b{len(rows) * (len(entry.parts) or 1)} element"):
        values = measured.compute(bounds=True)
    labels, logits = draw(entry, 30, (LARGE,))
    assert_values(values, entry.expected_metrics(labels, logits, where=~np.isin(np.arange(LARGE), rows)))


@pytest.mark.parametrize(
    "entry", marked((entry for entry in ZOO if entry.name in ("binary", "multi_head")), quick=("binary",))
)
def test_large_batches_are_accumulated(entry):
    labels, logits = draw(entry, 31, (LARGE,))
    weights = np.random.default_rng(31).choice(f32([0.1, 0.3, 3]), (LARGE, 1))
    update = jax.jit(
        lambda metrics: entry.head.update_metrics(metrics, None, logits, labels, weights=weights, params=entry.params())
    )
    values = update(update(entry.head.metrics())).compute(bounds=True)
    assert_values(values, entry.expected_metrics(labels, logits, weights))


@pytest.mark.parametrize(
    "entry",
    marked(
        (entry for entry in ZOO if entry.name in ("regression_3_exp", "binary", "survival", "sequential")),
        quick=("regression_3_exp", "sequential"),
    ),
)
def test_large_batches_of_any_leading_shape(entry):
    labels, logits = draw(entry, 32, (LARGE, 2))
    weights, where = np.ones((LARGE, 2, 1), np.float32), np.ones((LARGE, 2, 1), bool)
    deep = entry.head.measure(labels, logits, weights=weights, where=where, params=entry.params())
    assert_values(deep.compute(bounds=True), entry.expected_metrics(labels, logits))


def lazy_logits(entry: Entry, n: int, seed: int = 33) -> tuple[jh.LinearLogits, np.ndarray]:
    rng = np.random.default_rng(seed)
    d = entry.head.logits_dimension
    factors: Any = [rng.normal(size=shape).astype(np.float32) for shape in ((n, 3), (3, d), (d,))]
    lazy = jh.LinearLogits(*factors)
    return lazy, factors[0].astype(np.float64) @ lazy.kernel + lazy.bias


@engine_but(quick=("regression_3_exp", "nested", "sequential"))
def test_linear_logits_are_multiplied_logits(entry):
    lazy, exact = lazy_logits(entry, N)
    labels, _ = draw(entry, 34)
    weights, where = np.linspace(0, 2, N, dtype=np.float32)[:, None], (np.arange(N) % 5 != 3)[:, None]
    hidden = np.where(where & (weights > 0), lazy.hidden, np.float32(np.nan))
    params = entry.params()
    loss, gradient, _, measured = step(entry.head)(
        labels, dataclasses.replace(lazy, hidden=hidden), weights, where, params
    )
    np.testing.assert_allclose(loss, entry.expected_loss(labels, exact, weights, where), rtol=3e-6, atol=2e-6)
    to_logits = expected_gradient(entry, labels, exact, weights, where)
    inputs = np.where(where, lazy.hidden, 0).astype(np.float64)
    np.testing.assert_allclose(gradient.hidden, to_logits @ lazy.kernel.T, rtol=1e-4, atol=3e-6)
    np.testing.assert_allclose(gradient.kernel, inputs.T @ to_logits, rtol=1e-4, atol=3e-6)
    np.testing.assert_allclose(gradient.bias, to_logits.sum(0), rtol=1e-4, atol=3e-6)
    assert_values(measured.compute(bounds=True), entry.expected_metrics(labels, exact, weights, where), rtol=5e-6)

    @jax.jit
    def run(lazy, dense):
        both = [entry.head.predictions(z, params=params) for z in (lazy, dense)]
        return both, entry.head.loss(labels, jh.LinearLogits(lazy.hidden, lazy.kernel), params=params)

    both, plain = run(lazy, exact.astype(np.float32))
    chex.assert_trees_all_close(*both, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(plain, entry.expected_loss(labels, exact - lazy.bias), rtol=5e-6, atol=2e-6)
    bad_kernel = jh.LinearLogits(lazy.hidden, lazy.kernel[:-1])
    with pytest.raises(ValueError, match=r"\(8, 3\).*\(2, "):
        entry.head.loss(labels, bad_kernel, params=params)
    bad_bias = jh.LinearLogits(lazy.hidden, lazy.kernel, np.ones(7, np.float32))
    with pytest.raises(ValueError, match="bias"):
        entry.head.predictions(bad_bias, params=params)


@engine_but(quick=("regression_3_exp", "binary", "survival"))
def test_linear_logits_of_low_precision(entry):
    """The product is accumulated in float32: bfloat16 factors give the float32 answer of those factors."""
    lazy, _ = lazy_logits(entry, N)
    lazy = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lazy)
    hidden, kernel, bias = (x.astype(np.float64) for x in (lazy.hidden, lazy.kernel, lazy.bias))
    labels, _ = draw(entry, 34)
    loss = entry.head.loss(labels, lazy, params=entry.params())
    np.testing.assert_allclose(loss, entry.expected_loss(labels, hidden @ kernel + bias), rtol=5e-6, atol=2e-6)


@pytest.mark.parametrize(
    "entry",
    marked(
        (entry for entry in ZOO if entry.name in ("regression_3_exp", "binary", "nested")),
        quick=("regression_3_exp", "nested"),
    ),
)
def test_large_batches_of_linear_logits(entry):
    lazy, exact = lazy_logits(entry, LARGE)
    labels = entry.labels(np.random.default_rng(35), (LARGE,))
    where = np.random.default_rng(36).random((LARGE, 1)) < 0.9
    hidden = np.where(where, lazy.hidden, np.float32(np.nan))
    measured = entry.head.measure(labels, dataclasses.replace(lazy, hidden=hidden), where=where, params=entry.params())
    # In float32 a few rows of 20,001 fall on the other side of a decision.
    assert_values(
        measured.compute(bounds=True), entry.expected_metrics(labels, exact, where=where), rtol=1e-5, slack=1e-4
    )
