"""The laws of what a head writes itself, on every head of the zoo, on one device: by one compiled function, `step`.

Expected values come from the zoo's float64 oracles. The engine's own laws are in `test_laws_engine.py`.
"""

import dataclasses
import inspect
import pickle
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from laws import (
    ALL,
    ONES,
    N,
    added,
    assert_same_values,
    assert_values,
    average_of,
    case_of,
    draw,
    each,
    each_learning,
    each_refusing,
    expected_gradient,
    f32,
    few,
    many,
    masks,
    multiplicities,
    part_like,
    poison,
    reduced,
    replace_label,
    seeds,
    slope,
    step,
)
from zoo import ENGINE, ZOO, MultiEntry, changed, marked

import jaxheads as jh
from jaxheads.compose._abstract import AbstractCompositeHead
from jaxheads.metrics.reading import STAMP
from jaxheads.numerics import fields
from jaxheads.testing import laws
from jaxheads.testing.case import Skipped

# The laws of `jaxheads.testing`, which authors run on heads of their own

OF_THE_SAME_PROGRAM = (
    laws.weights_are_multiplicities,
    laws.metrics_add,
    laws.bad_input_is_visible,
    laws.any_cotangent,
    laws.negative_losses_are_declared,
)
# These compile programs of their own. They are quick for a few heads, one for each way through the engine.
OTHERS = (
    laws.one_trace,
    laws.leading_axes_do_not_matter,
    laws.predictions_are_of_rows,
    laws.extremes_are_harmless,
    laws.running_state_counts_what_is_there,
)
# These have stricter relatives: `..._are_the_oracles_of_the_rows_that_are_there` on every head, and `test_input_dtypes`
# on the heads of the engine.
STRICTER_ELSEWHERE = (laws.where_is_absence, laws.reductions_are_float32)


@each
@pytest.mark.parametrize("law", OF_THE_SAME_PROGRAM)
def test_laws_that_need_no_oracle(entry, law):
    obey(law, entry)


QUICK = ("regression_3_exp", "binary", "nested", "sequential")


@pytest.mark.slow
@pytest.mark.parametrize("entry", marked(entry for entry in ZOO if entry.name in (*ENGINE, *QUICK)))
@pytest.mark.parametrize("law", STRICTER_ELSEWHERE)
def test_laws_by_other_programs_with_stricter_relatives(entry, law):
    obey(law, entry)


@pytest.mark.parametrize("entry", marked(ZOO, quick=QUICK))
@pytest.mark.parametrize("law", OTHERS)
def test_laws_that_need_no_oracle_by_other_programs(entry, law):
    obey(law, entry)


def obey(law, entry):
    case = case_of(entry)
    with pytest.MonkeyPatch.context() as patch:
        # A number alone may differ by 1e-6 of itself, the sum of the two.
        patch.setattr(laws, "RTOL", 9e-7)
        patch.setattr(laws, "ATOL", 1e-7)
        if applies(law, case):
            law(case)
        else:
            with pytest.raises(Skipped):
                law(case)


def applies(law, case):
    """Whether a law is about such a head."""
    head = case.head
    return {
        laws.metrics_add: not case.is_coupled,
        laws.bad_input_is_visible: len(case.leaves) == 1,
        laws.leading_axes_do_not_matter: not case.tail,
        laws.running_state_counts_what_is_there: bool(head.init_state()),
        laws.negative_losses_are_declared: not head.signed,
    }.get(law, True)


# The oracle


@each
def test_loss_and_metrics_without_weights_and_mask_are_the_oracles(entry):
    """All other laws pass weights and a mask, so that they share a program."""
    labels, logits = draw(entry, 28)
    head = entry.head

    @jax.jit
    def run(labels, logits, params):
        return head.loss(labels, logits, params=params), head.measure(labels, logits, params=params)

    loss, measured = run(labels, logits, entry.params())
    np.testing.assert_allclose(loss, entry.expected_loss(labels, logits), rtol=2e-6, atol=2e-6)
    assert_values(measured.compute(bounds=True), entry.expected_metrics(labels, logits))


@each
def test_loss_is_the_oracles_under_every_reduction(entry):
    labels, logits = draw(entry)
    weights = np.array([0.5, 2, 1, 0, 0.3, 1, 4, 0], np.float32)[:, None]
    where = (np.arange(N) % 3 != 1)[:, None]
    for rows in ((ONES, ALL), (weights, where)):
        got = reduced(entry.head)(labels, logits, *rows, entry.params())
        names = [reduction.value for reduction in jh.Reduction]
        expected = {name: entry.expected_loss(labels, logits, *rows, reduction=name) for name in names}
        chex.assert_shape(list(got.values()), ())
        chex.assert_type(list(got.values()), jnp.float32)
        chex.assert_trees_all_close(got, expected, rtol=2e-6, atol=2e-6)


@each
@many
@hypothesis.given(seed=seeds, where=masks, weights=multiplicities, spoiled=st.booleans())
def test_loss_gradient_and_metrics_are_the_oracles_of_the_rows_that_are_there(entry, seed, where, weights, spoiled):
    """Law 1 and the formula: hidden rows are absent, be there garbage in them or not."""
    labels, logits = draw(entry, seed)
    hidden = ~where | (weights == 0)
    given = poison(entry, labels, logits, hidden) if spoiled else (labels, logits)
    loss, gradient, to_params, measured = step(entry.head)(*given, weights, where, entry.params())
    np.testing.assert_allclose(loss, entry.expected_loss(labels, logits, weights, where), rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(np.asarray(gradient)[hidden[:, 0]], 0)
    np.testing.assert_allclose(gradient, expected_gradient(entry, labels, logits, weights, where), rtol=1e-5, atol=2e-6)
    chex.assert_tree_all_finite(to_params)
    values = measured.compute(bounds=True)
    assert_values(values, entry.expected_metrics(labels, logits, weights, where))
    if isinstance(entry, MultiEntry) and (where & (weights > 0)).any():
        assert_values(values, entry.expected_losses(labels, logits, weights, where))


@each_learning
def test_gradient_to_learned_fields_is_the_oracles(entry):
    labels, logits = draw(entry)
    params, learned = entry.params(), entry.head.init(jax.random.key(0))
    _, _, gradients, _ = step(entry.head)(labels, logits, ONES, ALL, params)
    leaves, tree = jax.tree.flatten(learned)
    for i, gradient in enumerate(jax.tree.leaves(part_like(gradients, learned))):

        def loss(value, i=i):
            changes = jax.tree.unflatten(tree, [*leaves[:i], value, *leaves[i + 1 :]])
            return entry.expected_loss(labels, logits, params=fields.merge(entry.head.init_state(), changes))

        np.testing.assert_allclose(gradient, slope(loss, leaves[i]), rtol=1e-5, atol=2e-6)


def test_threshold_metrics_by_hand():
    entry = next(entry for entry in ZOO if entry.name == "binary")
    labels, logits = draw(entry, 3)
    weights = np.linspace(0.1, 2.0, N, dtype=np.float32)
    got = entry.head.measure(labels, logits, weights=weights).compute()
    y, w = labels[:, 0], weights.astype(np.float64)
    above = zoo.sigmoid(logits[:, 0].astype(np.float64)) > 0.3
    np.testing.assert_allclose(
        got["precision/positive_threshold_0.3"], w[above & (y == 1)].sum() / w[above].sum(), 1e-6
    )
    np.testing.assert_allclose(got["recall/positive_threshold_0.3"], w[above & (y == 1)].sum() / w[y == 1].sum(), 1e-6)
    np.testing.assert_allclose(got["accuracy/positive_threshold_0.3"], w[above == (y == 1)].sum() / w.sum(), 1e-6)


# Laws 1 and 2: a zero weight hides, a weight of two is twice


@each
def test_zero_weight_hides_but_counts(entry):
    labels, logits = draw(entry, 2)
    weights = np.array([1, 0, 1, 1, 0, 1, 1, 0], np.float32)[:, None]
    spoiled = poison(entry, labels, logits, weights == 0)
    for reduction, loss in reduced(entry.head)(*spoiled, weights, ALL, entry.params()).items():
        expected = entry.expected_loss(labels, logits, weights, reduction=reduction)
        np.testing.assert_allclose(loss, expected, rtol=2e-6, atol=2e-6, err_msg=reduction)
    if entry.count is None:
        by_all, by_seen = (
            entry.expected_loss(labels, logits, weights, reduction=r) for r in ("sum_over_batch_size", "mean")
        )
        np.testing.assert_allclose(by_all, by_seen * 5 / 8)


@each
def test_weight_two_is_twice(entry):
    """Six rows, two of them of weight 2, are those six and the two again: in every metric, and in a sum and a mean."""
    labels, logits = draw(entry, 4)
    params, again = entry.params(), np.array([0, 1, 2, 3, 4, 5, 0, 3])
    weights, there = f32([2, 1, 1, 2, 1, 1, 1, 1])[:, None], (np.arange(N) < 6)[:, None]
    more = jax.tree.map(lambda x: x[again], (labels, logits))
    weighted = reduced(entry.head)(labels, logits, weights, there, params)
    for reduction in ("sum", "mean"):
        expected = entry.expected_loss(*more, reduction=reduction)
        np.testing.assert_allclose(weighted[reduction], expected, rtol=2e-6)
    single, double = (reduced(entry.head)(labels, logits, w, ALL, params) for w in (ONES, 2 * ONES))
    for got, factor in (("sum_over_batch_size", 2), ("sum_by_nonzero_weights", 2), ("sum", 2), ("mean", 1)):
        np.testing.assert_allclose(double[got], factor * single[got], rtol=1e-6)
    measured = step(entry.head)(labels, logits, weights, there, params)[-1]
    assert_same_values(measured, step(entry.head)(*more, ONES, ALL, params)[-1], but="loss/")
    assert_values(measured.compute(bounds=True), entry.expected_metrics(*more))


# Law 3: metrics add


@each
@few
@hypothesis.given(
    seed=seeds,
    parts=st.lists(st.integers(0, 3), min_size=N, max_size=N),
    order=st.permutations(range(4)),
)
def test_any_split_in_any_order(entry, seed, parts, order):
    labels, logits = draw(entry, seed)
    weights = np.random.default_rng(seed).choice(f32([0.1, 0.5, 1, 3]), (N, 1))
    part = np.array(parts)[:, None]
    params = entry.params()
    pieces = [step(entry.head)(labels, logits, weights, part == k, params)[-1] for k in order]
    total = added(pieces)
    assert_same_values(total, step(entry.head)(labels, logits, weights, ALL, params)[-1])
    assert_same_values((pieces[0] + pieces[1]) + (pieces[2] + pieces[3]), total)
    assert_values(total.compute(bounds=True), entry.expected_metrics(labels, logits, weights))


@each
def test_strangers_are_refused(entry):
    head = entry.head
    stranger = changed(head, name="stranger")
    with pytest.raises(ValueError, match="different heads") as error:
        _ = head.metrics() + stranger.metrics()
    assert repr(head) in str(error.value)
    assert repr(stranger) in str(error.value)
    labels, logits = draw(entry)
    with pytest.raises(ValueError, match="stranger"):
        head.update_metrics(stranger.metrics(), None, logits, labels, params=entry.params())
    with pytest.raises(TypeError):
        _ = head.metrics() + 1
    with pytest.raises(TypeError):
        _ = 1 + head.metrics()
    with pytest.raises(ValueError, match="regularization"):
        _ = head.metrics() + head.metrics(regularization_losses=[])
    with pytest.raises(ValueError, match="regularization"):
        head.update_metrics(head.metrics(), None, logits, labels, "eval", [1.0], params=entry.params())
    with pytest.raises(ValueError, match="int"):
        head.update_metrics(0, None, logits, labels, params=entry.params())  # pyright: ignore[reportArgumentType]


@each
def test_infinities_stay_infinite(entry):
    measured = step(entry.head)(*draw(entry), ONES, ALL, entry.params())[-1]
    stamp = slice(1, 1 + STAMP)

    def full(value):
        state = np.full_like(measured.state, value)
        state[stamp] = 0
        return dataclasses.replace(measured, state=state)

    def total(metrics):
        return np.delete(np.asarray(metrics.state).sum(-1), stamp)

    huge, once = full(np.inf), full(2e38)
    np.testing.assert_array_equal(total(entry.head.metrics() + huge + measured + huge), np.inf)
    np.testing.assert_array_equal(total(once + once + measured), np.inf)


# Laws 6 and 7: parameters of any dtype, extreme logits, nothing to see


@each_learning
def test_parameters_of_any_dtype(entry):
    """A parameter tree may be cast as a whole; the formula still sees float32."""
    labels, logits = draw(entry, 12)
    for dtype in (jnp.bfloat16, np.float64):
        params = jax.tree.map(lambda value, dtype=dtype: np.asarray(value).astype(dtype), entry.params())
        loss, *_, measured = step(entry.head)(labels, logits, ONES, ALL, params)
        exact = jax.tree.map(lambda value: value.astype(np.float64), params)
        np.testing.assert_allclose(loss, entry.expected_loss(labels, logits, params=exact), rtol=2e-6, atol=2e-6)
        assert_values(measured.compute(bounds=True), entry.expected_metrics(labels, logits, params=exact))


@each
@pytest.mark.parametrize("size", [1e4, 100.0, 1e-30])
def test_extreme_logits(entry, size):
    labels, logits = draw(entry, 14)
    logits = np.float32(size) * np.sign(logits)
    loss, gradient, to_params, measured = step(entry.head)(labels, logits, ONES, ALL, entry.params())
    with np.errstate(over="ignore"):
        expected = entry.expected_loss(labels, logits)
        metrics = entry.expected_metrics(labels, logits)
        metrics = {key: float(np.float32(value)) for key, value in metrics.items()}
    averages = [key for key in metrics if key.startswith("average_loss")]
    if any(np.isinf(metrics[key]) for key in averages):
        assert loss == np.inf
        assert not np.isnan(gradient).any()
        assert all(measured.compute()[key] == np.inf for key in averages if np.isinf(metrics[key]))
        return
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    chex.assert_tree_all_finite((gradient, to_params))
    assert_values(measured.compute(bounds=True), metrics)


@each
def test_nothing_to_see(entry):
    head, params = entry.head, entry.params()
    labels, logits = draw(entry, 15)
    rows = (*poison(entry, labels, logits, ALL), ONES, ~ALL)
    for loss in reduced(head)(*rows, params).values():
        assert loss == 0
    loss, gradient, to_params, measured = step(head)(*rows, params)
    for leaf in jax.tree.leaves((loss, gradient, to_params)):
        np.testing.assert_array_equal(leaf, 0)
    assert gradient.shape == logits.shape
    # A batch without rows is taken too. Of the heads of the engine it is compiled, in test_laws_engine.py.
    none = [jax.tree.map(lambda x: np.asarray(x)[:0], x) for x in (labels, logits)]
    chex.assert_shape(jax.eval_shape(lambda: head.loss(*none, params=params)), ())
    chex.assert_equal_shape([jax.eval_shape(lambda: head.measure(*none, params=params)).state, measured.state])
    assert all(np.isnan(value).all() for value in measured.compute(bounds=True).values())
    assert all((value == 0).all() for value in measured.compute(undefined=0.0).values())
    assert all(np.isnan(value).all() for value in head.metrics().compute().values())
    seen_labels, seen_logits = draw(entry, 16)
    total = measured + step(head)(seen_labels, seen_logits, ONES, ALL, params)[-1] + measured
    expected = entry.expected_metrics(seen_labels, seen_logits)
    assert_values(total.compute(bounds=True), expected)
    # Of rows that are all in one group no violation is defined.
    undefined = {key for key, value in total.compute().items() if np.isnan(value).any()}
    assert undefined == {key for key, value in expected.items() if np.isnan(value)}
    assert bool(undefined) == (entry.name == "error_rate")


# Law 8: bad input is refused or visible


@each
def test_wrong_keys_and_parameters_are_refused_by_name(entry):
    head, params = entry.head, entry.params()
    labels, logits = draw(entry)

    def predicted(keys=None):
        # What is refused is refused in tracing: nothing need be compiled.
        return jax.eval_shape(lambda z: head.predictions(z, keys, params=params), logits)

    with pytest.raises(ValueError, match="nonsense") as error:
        predicted(("nonsense",))
    if not isinstance(head, jh.MultiHead):
        valid = list(predicted())
        assert all(key in str(error.value) for key in valid)
        for key in valid:
            assert list(predicted(key)) == [key]
    weighted = changed(head, weight_column="w")
    if not isinstance(head, jh.SequentialHeadWrapper):
        with pytest.raises(ValueError, match="weights="):
            weighted.loss(labels, logits, {"w": ONES}, weights=ONES, params=params)
        with pytest.raises(ValueError, match=r"Feature w .*\['v'\]"):
            weighted.loss(labels, logits, {"v": ONES}, params=params)
    with pytest.raises(ValueError, match="w"):
        weighted.loss(labels, logits, params=params)
    with pytest.raises(ValueError, match="unknown"):
        head.bind({"unknown": 1.0})
    with pytest.raises(ValueError, match="unknown"):
        head.loss(labels, logits, params={**params, "unknown": 1.0})
    if not params:
        return
    for call in (
        lambda: head.loss(labels, logits),
        lambda: head.measure(labels, logits),
        lambda: head.predictions(logits),
        lambda: head.update_metrics(head.metrics(), None, logits, labels),
    ):
        with pytest.raises(ValueError, match=r"params=(.|\n)*bind"):
            call()
    path, _ = jax.tree.leaves_with_path(params)[0]
    with pytest.raises(ValueError, match=path[-1].key):
        head.bind(jax.tree.map(lambda value: np.zeros((*np.shape(value), 7), np.float32), params))


@each_refusing
def test_illegal_labels(entry):
    head, params = entry.head, entry.params()
    labels, logits = draw(entry, 17)
    row = 5
    bad = replace_label(labels, row, entry.illegal)
    device = jax.device_put(bad)
    there = {"weights": ONES, "where": ALL, "params": params}

    for call in (head.loss, head.measure):
        with pytest.raises(ValueError, match=rf"\({row}, 0\)"):
            call(bad, logits, **there)
        with pytest.raises(ValueError, match=rf"\({row}, 0\)"):
            call(device, logits, check=True, **there)
    with pytest.raises(ValueError, match=rf"\({row}, 0\)"):
        head.update_metrics(head.metrics(), None, logits, bad, **there)
    with pytest.raises(ValueError, match="labels"):
        head.loss(jax.tree.map(lambda x: x.tolist(), bad), logits, **there)

    assert np.isnan(head.loss(device, logits, **there))
    assert np.isnan(head.loss(bad, logits, check=False, **there))
    # In a masked row it is nobody's business.
    where = (np.arange(N) != row)[:, None]
    rest = entry.expected_loss(labels, logits, where=where)
    for labels_, check in ((bad, None), (device, None), (device, True), (bad, True)):
        loss = head.loss(labels_, logits, check=check, **{**there, "where": where})
        np.testing.assert_allclose(loss, rest, rtol=2e-6, atol=2e-6)

    loss, gradient, to_params, measured = step(head)(bad, logits, ONES, ALL, params)
    assert np.isnan(loss)
    assert np.isnan(np.asarray(gradient)[row]).all()
    assert all(np.isnan(to_params[name]).any() for name in jax.eval_shape(head.init, jax.random.key(0)))
    with pytest.warns(jh.BadInputWarning, match=r"\b1 element"):
        values = measured.compute(bounds=True)
    assert_values(values, entry.expected_metrics(labels, logits, where=where))
    assert "1 element" in repr(measured)
    total = head.metrics() + measured + measured
    with pytest.warns(jh.BadInputWarning, match=r"\b2 element"):
        total.compute()


@each
def test_nan_logits_are_visible(entry):
    labels, logits = draw(entry, 20)
    logits[3] = np.nan
    loss, *_, measured = step(entry.head)(labels, logits, ONES, ALL, entry.params())
    assert np.isnan(loss)
    assert np.isnan(measured.compute()[average_of(entry)])


# Law 9: one trace, one answer


def count_calls_of_losses(entry, monkeypatch):
    """A list that grows whenever a head of the entry is asked for its losses: once a trace."""
    head = getattr(entry.head, "static_head", entry.head)
    # In metrics, it is the base head of an objective whose losses are averaged.
    heads = [head.heads[0]] if isinstance(head, jh.MultiHead) else [head]
    if isinstance(head, jh.GlobalObjectiveHead):
        heads.append(head.base)
    traces = []

    def count_calls(cls):
        original = cls.losses

        def counting(self, *args, **kwargs):
            traces.append(1)
            return original(self, *args, **kwargs)

        counting.__signature__ = inspect.signature(original)  # pyright: ignore[reportFunctionMemberAccess]
        monkeypatch.setattr(cls, "losses", counting)

    for cls in {type(head) for head in heads}:
        count_calls(cls)
    return traces


def again(entry):
    """An equal head, built anew. Of a MultiHead, labels go by the names."""
    return dataclasses.replace(entry.head) if entry.parts else changed(entry.head, name="traced")


TRACED = 7  # rows: a shape that no other test traces


@each
def test_one_trace_for_many_steps(entry):
    """Of heads that are equal and built anew, in a step of one's own: nothing need be compiled to see it."""
    optimizer, params = optax.sgd(0.1), entry.params()

    @jax.jit
    @chex.assert_max_traces(1)
    def train(head, bias, opt_state, labels, logits):
        gradient = jax.grad(lambda b: head.loss(labels, logits + b, params=params))(bias)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(bias, updates), opt_state

    bias = jnp.float32(0)
    arguments = bias, optimizer.init(bias)
    for seed in range(3):
        arguments = jax.eval_shape(train, again(entry), *arguments, *draw(entry, seed, (TRACED,)))


# Eager calls run functions that are compiled once. Which head it is changes nothing: quick for a plain one.
@pytest.mark.parametrize("entry", marked((e for e in ZOO if e.name in (*ENGINE, "logistic")), quick=("logistic",)))
def test_one_trace_for_many_eager_calls(entry, monkeypatch):
    traces, params = count_calls_of_losses(entry, monkeypatch), entry.params()

    def loss(_, labels, logits):
        return again(entry).loss(labels, logits, params=params)

    def measure(_, labels, logits):
        return again(entry).measure(labels, logits, params=params)

    def update(metrics, labels, logits):
        return again(entry).update_metrics(metrics, None, logits, labels, params=params)

    for call in (loss, measure, update):
        traces.clear()
        call(again(entry).metrics(), *draw(entry, 0, (TRACED,)))
        once = len(traces)
        assert once >= 1
        for seed in (1, 2):
            call(again(entry).metrics(), *draw(entry, seed, (TRACED,)))
        assert len(traces) == once


@each
def test_metrics_inside_jit_have_the_shapes_outside(entry):
    """Their values are tested on the heads of the engine."""
    measured = step(entry.head)(*draw(entry, 21), ONES, ALL, entry.params())[-1]
    inside = jax.eval_shape(lambda metrics: metrics.compute(bounds=True), measured)
    chex.assert_trees_all_equal_shapes_and_dtypes(dict(inside), measured.compute(bounds=True))


@each
@few
@hypothesis.given(order=st.permutations(range(N)))
def test_order_of_rows_does_not_matter(entry, order):
    labels, logits = draw(entry, 24)
    weights, where = np.linspace(0, 2, N, dtype=np.float32)[:, None], (np.arange(N) != 4)[:, None]
    order = np.array(order)
    plain = step(entry.head)(labels, logits, weights, where, entry.params())
    shuffled = jax.tree.map(lambda x: x[order], (labels, logits, weights, where))
    loss, gradient, _, measured = step(entry.head)(*shuffled, entry.params())
    np.testing.assert_allclose(loss, plain[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, np.asarray(plain[1])[order], rtol=1e-6, atol=1e-7)
    assert_same_values(measured, plain[3])


# Identity


def has_callables(head: jh.Head) -> bool:
    return any(callable(getattr(head, field.name)) for field in dataclasses.fields(head))


@each
def test_unbound_heads_are_values(entry):
    head = entry.head
    same = dataclasses.replace(head)
    assert same is not head
    assert same == head
    assert hash(same) == hash(head)
    assert {head: 1}[same] == 1
    assert jax.tree.leaves(head) == []
    assert pickle.loads(pickle.dumps(head)) == head
    assert jax.tree.unflatten(jax.tree.structure(head), []) == head
    if not has_callables(head):
        assert eval(repr(head), {**vars(zoo), **vars(jh)}) == head
    assert changed(head, loss_reduction="auto").loss_reduction is jh.Reduction.SUM_OVER_BATCH_SIZE
    for change in ({"name": "other"}, {"weight_column": "w"}, {"loss_reduction": jh.Reduction.SUM_BY_NONZERO_WEIGHTS}):
        other = changed(head, **change)
        assert type(other) is type(head)
        if isinstance(head, AbstractCompositeHead):
            assert other != head
            continue
        name, value = next(iter(change.items()))
        assert getattr(other, name) == value
        assert (other == head) == (getattr(head, name) == value)
    assert head != "a head"
    with pytest.raises(dataclasses.FrozenInstanceError):
        head.name = "changed"


@each
def test_bound_heads_carry_their_parameters(entry):
    head, params = entry.head, entry.params()
    bound = head.bind(params)
    assert len(jax.tree.leaves(bound)) == len(jax.tree.leaves(params))
    copies = (
        pickle.loads(pickle.dumps(bound)),
        jax.tree.map(lambda x: x, bound),
        head.bind(dict(params)),
        dataclasses.replace(bound),
    )
    for copy in copies:
        chex.assert_trees_all_equal(copy, bound)
    assert "n" in changed(bound, name="n").name.split("_")
    if not params:
        # It is the head itself, whose loss is tested above.
        assert bound == head
        return
    labels, logits = draw(entry, 25)
    loss = jax.jit(lambda copy: copy.loss(labels, logits))
    for copy in copies:
        np.testing.assert_allclose(loss(copy), entry.expected_loss(labels, logits), rtol=2e-6, atol=2e-6)
    for forbidden in (lambda: hash(bound), lambda: bound == head.bind(params)):
        with pytest.raises(ValueError, match="bound"):
            forbidden()
    for name in params:
        assert name in repr(bound)


@each_learning
def test_optax_moves_what_is_learned_and_nothing_else(entry):
    head, optimizer = entry.head, optax.sgd(0.1)
    labels, logits = draw(entry, 26)
    learned, state = head.init(jax.random.key(1)), head.init_state()
    *_, gradients, _ = step(head)(labels, logits, ONES, ALL, {**learned, **state})
    updates, _ = optimizer.update(part_like(gradients, learned), optimizer.init(learned))
    moved: Any = optax.apply_updates(learned, updates)
    before = entry.expected_loss(labels, logits, params={**learned, **state})
    after = entry.expected_loss(labels, logits, params={**moved, **state})
    for new, old in zip(jax.tree.leaves(moved), jax.tree.leaves(learned), strict=True):
        assert np.abs(new - old).max() > 0
    assert after < before or not learned
    # Every call reads the values that it is given.
    bound = {**moved, **state}
    loss, *_, measured = step(head)(labels, logits, ONES, ALL, bound)
    np.testing.assert_allclose(loss, after, rtol=2e-6)
    expected = entry.expected_metrics(labels, logits, params=bound)
    there = {"weights": ONES, "where": ALL}
    for metrics in (
        measured,
        head.measure(labels, logits, params=bound, **there),
        head.update_metrics(head.metrics(), None, logits, labels, params=bound, **there),
        head.bind(bound).measure(labels, logits, **there),
    ):
        assert_values(metrics.compute(bounds=True), expected)
    for name in state:
        jax.tree.map(lambda gradient: np.testing.assert_array_equal(gradient, 0), gradients[name])


@each
def test_running_fields(entry):
    """A state goes through `update_state` with its structure and dtypes; what has none passes nothing on."""
    head = entry.head
    state = jax.device_get(head.init_state())
    labels, logits = draw(entry, 27)
    update = jax.jit(lambda state: head.update_state(state, labels, logits, params=head.init(jax.random.key(0))))
    new = jax.device_get(update(state))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    assert bool(state) == entry.running
    assert any(np.any(new != old) for new, old in zip(*map(jax.tree.leaves, (new, state)), strict=True)) == bool(state)
    for wrong in [{**state, "stranger": np.zeros(())}, *([dict.fromkeys(state, np.zeros(7)), {}] if state else [])]:
        with pytest.raises(ValueError, match="running state of"):
            head.update_state(wrong, labels, logits, params=head.init(jax.random.key(0)))


@each
def test_repr_never_fails(entry):
    head = entry.head
    measured = step(head)(*draw(entry), ONES, ALL, entry.params())[-1]
    title = f"Metrics of {head!r}"
    for value in measured.compute():
        assert value in repr(measured)
    seen = []
    jax.make_jaxpr(lambda metrics: seen.append(repr(metrics)))(measured)
    like = np.asarray(measured.state)
    odd = [
        dataclasses.replace(measured, state=np.stack([like] * 2)),
        dataclasses.replace(measured, state=jax.ShapeDtypeStruct(like.shape, jnp.float32)),
        dataclasses.replace(measured, state=None),
        dataclasses.replace(measured, state=np.full_like(like, np.nan)),
        jax.tree.map(lambda x: "leaf", measured),
        jax.eval_shape(lambda: measured),
        head.metrics(),
    ]
    deleted = dataclasses.replace(measured, state=jax.device_put(like, may_alias=False))
    deleted.state.delete()
    for text in (*seen, *map(repr, odd), repr(deleted), repr(head.metrics([]))):
        assert text.startswith(title)
