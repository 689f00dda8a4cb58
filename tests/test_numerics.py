"""Floor 0 against float64 NumPy, exact rationals and, for the edges, a plain search."""

from fractions import Fraction
from typing import Any

import devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import jaxheads as jh
from jaxheads import losses
from jaxheads.metrics.grids import LogitGrid, ThresholdGrid
from jaxheads.numerics import fields, histograms, masking, pairs, stable, vocabulary
from jaxheads.numerics.edges import Edges, in_three
from jaxheads.numerics.linear import LinearLogits
from jaxheads.numerics.reduction import Reduction, divide

pytestmark = pytest.mark.rounding

few = settings(max_examples=30, deadline=None, derandomize=True)
huge = float(np.float32(1e30))
finite = st.floats(-huge, huge, width=32, allow_subnormal=False)


ZERO = np.zeros((1, 2), np.float32)
add = jax.jit(pairs.add)


def exactly(x) -> Fraction:
    return sum((Fraction(float(v)) for v in np.asarray(x, np.float64).ravel()), Fraction(0))


@few
@given(st.lists(st.integers(0, 2**31), min_size=2, max_size=30))
def test_pairs_add_integers_exactly_to_2_48(values):
    total = ZERO
    for value in values:
        parts = np.array([[np.float32(value), np.float32(value - int(np.float32(value)))]], np.float32)
        total = add(total, parts)
    assert exactly(total) == sum(values)


@few
@given(st.lists(finite, min_size=2, max_size=40))
def test_pairs_hold_any_sum_to_48_bits(values):
    total = ZERO
    for value in values:
        total = add(total, np.full((1, 1), value, np.float32))
    scale = sum(abs(Fraction(float(np.float32(v)))) for v in values)
    error = abs(exactly(total) - sum((Fraction(float(np.float32(v))) for v in values), Fraction(0)))
    # Subnormal errors below 1e-38 are flushed to zero by XLA.
    assert error <= scale * Fraction(len(values) * 3, 2**47) + Fraction(len(values), 10**37)


def test_pairs_keep_infinities_and_nan():
    inf, nan, one = (np.full((1, 1), value, np.float32) for value in (np.inf, np.nan, 1))
    np.testing.assert_array_equal(add(ZERO, inf), [[np.inf, 0]])
    np.testing.assert_array_equal(add(add(ZERO, inf), one), [[np.inf, 0]])
    assert np.isnan(np.asarray(add(ZERO, nan))).any()


def awkward(edges: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Edges, their float32 neighbours, what lies between, and the far ends."""
    with np.errstate(over="ignore"):
        above, below = (np.nextafter(edges, np.float32(side)) for side in (np.inf, -np.inf))
    spread = rng.uniform(edges[0] - 1, edges[-1] + 1, 5000).astype(np.float32)
    ends = np.array([0.0, -0.0, 2e-38, -2e-38, 1e38, -1e38, np.inf, -np.inf], np.float32)
    return normal(np.concatenate([edges, above, below, spread, ends]))


def is_subnormal(x: np.ndarray) -> np.ndarray:
    """Whether XLA may read it as zero."""
    return (x != 0) & (np.abs(x) < np.finfo(np.float32).tiny)


def normal(x: np.ndarray) -> np.ndarray:
    """Without the subnormals."""
    return x[~is_subnormal(x)]


EDGE_SETS = {
    "uniform": np.linspace(-20, 20, 2047),
    "one": np.array([0.25]),
    "crowded": np.concatenate([[-20.0, 20.0], 0.3 + np.arange(500) * 1e-7, np.arange(7) * 1e-30]),
    "crowded_at_zero": np.arange(3) * 1e-37,
    "many": np.random.default_rng(1).normal(size=10_000),
    "wide": np.array([-1e30, -1.0, 0.0, 1e-20, 1.0, 3.4e38]),
    "to_the_end": np.array([-1.0, 0.0, np.finfo(np.float32).max]),
    "thresholds": np.arange(1, 199) / 199,
}


@pytest.mark.parametrize("name", EDGE_SETS)
def test_edges_locate_every_number_exactly(name):
    edges = Edges(EDGE_SETS[name])
    x = awkward(edges.values, np.random.default_rng(0))
    expected = np.searchsorted(edges.values.astype(np.float64), x.astype(np.float64), side="left")
    # What a TPU does, in columns and in rows. Edges whose parts are subnormal it looks up too.
    assert edges.exact == (name not in ("crowded_at_zero", "to_the_end"))
    shapes = ((-1, 1), (1, -1)) if edges.exact else ()
    found = jax.jit(lambda x: (edges.locate(x), [edges.by_product(x.reshape(shape)) for shape in shapes]))(x)
    for each in jax.tree.leaves(found):
        np.testing.assert_array_equal(np.ravel(each), expected)


in_three_compiled = jax.jit(in_three)


@few
@given(st.lists(st.floats(width=32, allow_subnormal=False), min_size=20, max_size=20))
def test_a_float_is_three_of_eight_bits(values):
    x = np.asarray(values, np.float32)
    for parts in (in_three(x), jax.device_get(in_three_compiled(x))):
        first, second, third = (np.asarray(part, np.float64) for part in parts)
        for part in parts:
            kept = part.astype(jnp.bfloat16).astype(np.float32)
            # Below the normal numbers a part may be 0 to XLA, and bfloat16 has fewer bits.
            there = ~is_subnormal(part)
            np.testing.assert_array_equal(kept[there], part[there])
        np.testing.assert_array_equal(first[~np.isfinite(x)], x[~np.isfinite(x)])
        apart = np.where(np.isfinite(x), first + second + third, x)
        # A part below the normal numbers may be 0.
        np.testing.assert_allclose(apart, x, rtol=0, atol=1.2e-38)


@few
@given(
    # Of two sizes: a table of another size is another program.
    st.sampled_from([3, 60]).flatmap(
        lambda n: st.lists(st.floats(-50, 50, width=32, allow_subnormal=False), min_size=n, max_size=n, unique=True)
    ),
    st.lists(st.floats(width=32, allow_nan=False, allow_subnormal=False), min_size=50, max_size=50),
)
def test_edges_locate_among_any_edges(values, x):
    edges, x = Edges(values), np.asarray(x, np.float32)
    with jax.disable_jit():
        found = edges.locate(jnp.asarray(x))
    np.testing.assert_array_equal(found, np.searchsorted(edges.values, x, side="left"))


def test_edges_put_nan_below_all():
    assert int(jax.jit(Edges([0.0, 1.0]).locate)(np.float32(np.nan))) == 0


def test_ten_thousand_edges_cost_a_few_steps():
    grid = jh.LogitGrid()
    thresholds = tuple(float(t) for t in np.arange(1, 10_001) / 10_001)
    assert grid.layout(()).edges.steps <= 3
    assert grid.layout(thresholds).edges.steps <= 6
    assert jh.ThresholdGrid(200).layout(thresholds).edges.steps <= 6


@pytest.mark.slow
def test_every_float32_between_0_and_1_has_its_bucket():
    """All 1,065,353,217 of them, through the compiled kernel, against comparisons with the edges around it."""
    edges = ThresholdGrid(200).layout(()).edges
    padded = np.concatenate([[-np.inf], edges.values, [np.inf]]).astype(np.float32)

    @jax.jit
    def wrong(start):
        x = jax.lax.bitcast_convert_type(start + jnp.arange(2**22, dtype=jnp.int32), jnp.float32)
        k = edges.locate(x)
        table = jnp.asarray(padded)
        right = (table[k] < x) & (x <= table[k + 1])
        # Subnormals are zero to XLA: bucket 0 either way.
        return jnp.sum(jnp.where(x <= 1, ~right & (x >= 2**-126), False))

    last = int(np.float32(1.0).view(np.int32))
    assert sum(int(wrong(jnp.int32(start))) for start in range(0, last + 1, 2**22)) == 0


HISTOGRAMS = {
    "few": ((5, 3), 7, None),
    "one_row": ((1, 1), 3, None),
    "nothing": ((0, 1), 3, None),
    "rows_by_column": ((16, 3), 200, (1, 2, 3)),
    "columns_share_a_row": ((16, 4), 200, (0, 1, 0, 2)),
    "blocks": ((40_000, 1), 2050, None),
    "blocks_of_columns": ((32_768, 3), 130, (2, 0, 1)),
    "blocks_that_do_not_divide": ((40_001, 2), 70, None),
    "more_axes": ((8, 5000, 1), 2050, None),
}
FORMS = {"scatter": histograms._sum_by_scatter, "product": histograms._sum_by_product}


def histogram_case(name):
    """Buckets, two arrays of weights, and their sums in float64."""
    shape, n, columns = HISTOGRAMS[name]
    rng = np.random.default_rng(0)
    buckets = rng.integers(0, n, shape).astype(np.int32)
    weights = (rng.random(shape) ** 8 * 10).astype(np.float32), np.full(shape, 0.1, np.float32)
    rows = np.broadcast_to(np.zeros(shape[-1], int) if columns is None else np.asarray(columns), shape)
    expected = np.zeros((2, rows.max(initial=0) + 1, n))
    for sums, each in zip(expected, weights, strict=True):
        np.add.at(sums, (rows, buckets), each.astype(np.float64))
    return buckets, weights, n, columns, expected


# These are added up on eight devices, below.
ELSEWHERE = ("blocks", "more_axes")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ELSEWHERE else []) for name in HISTOGRAMS]
)
def test_histograms_sum_by_bucket(name, form):
    """What a CPU and a GPU do, and what a TPU does: the same to the last bits."""
    buckets, weights, n, columns, expected = histogram_case(name)
    found = jax.jit(lambda buckets, *weights: FORMS[form](buckets, weights, n, columns))(buckets, *weights)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=1e-30)


@pytest.mark.parametrize(
    ("form", "spread"),
    [
        *(("scatter", False), ("scatter", True), ("product", False)),
        pytest.param("product", True, marks=pytest.mark.slow),  # none crosses devices, see below
    ],
)
def test_a_million_equal_weights_in_one_bucket_do_not_drift(form, spread):
    rows = NamedSharding(devices.mesh_of(8, "auto"), PartitionSpec("d")) if spread else None
    arrays = jax.device_put((np.zeros((2**20, 1), np.int32), np.full((2**20, 1), 0.1, np.float32)), rows)
    found = np.asarray(jax.jit(lambda buckets, weights: FORMS[form](buckets, (weights,), 200, None))(*arrays))
    np.testing.assert_allclose(found[0, 0, 0], 2**20 * float(np.float32(0.1)), rtol=3e-7)
    assert not found[0, 0, 1:].any()


@pytest.mark.parametrize("form", FORMS)
def test_an_exported_histogram_of_any_number_of_rows_does_not_drift(form):
    (n,) = jax.export.symbolic_shape("n")
    shapes = jax.ShapeDtypeStruct((n, 1), jnp.int32), jax.ShapeDtypeStruct((n, 1), jnp.float32)
    call = jax.jit(lambda buckets, weights: FORMS[form](buckets, (weights,), 200, None))
    exported = jax.export.export(call)(*shapes)
    found = np.asarray(exported.call(np.zeros((2**18, 1), np.int32), np.full((2**18, 1), 0.1, np.float32)))
    # The scatter makes one block of them all: 2e-3 off if the bound were that of a block.
    np.testing.assert_allclose(found[0, 0, 0], 2**18 * float(np.float32(0.1)), rtol=1e-5)


@pytest.mark.parametrize("spread", [False, True], ids=["one_device", "eight"])
@pytest.mark.parametrize("rows", [2**20, 1_000_000])
def test_products_add_up_a_block_of_rows_at_most(rows, spread):
    """More of them in one float32 sum would drift on a device that adds them one by one."""
    mesh = NamedSharding(devices.mesh_of(8, "auto"), PartitionSpec("d")) if spread else None
    arrays = jax.device_put((np.zeros((rows, 1), np.int32), np.ones((rows, 1), np.float32)), mesh)
    jitted = jax.jit(lambda buckets, weights: histograms._sum_by_product(buckets, (weights,), 2050, None))
    traced = jitted.trace(*arrays)
    products = [eqn for eqn in traced.jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert len(products) == 3
    for product in products:
        (contracted, _), (batch, _) = product.params["dimension_numbers"]
        shape = product.invars[0].aval.shape
        assert np.prod([shape[axis] for axis in contracted]) <= 2**14
        blocks = np.prod([shape[axis] for axis in batch])
        assert blocks >= rows // 2**14
        assert not spread or blocks % 8 == 0  # none crosses devices


SPREAD = ("rows_by_column", "columns_share_a_row", "blocks", "blocks_of_columns", "more_axes")


@pytest.mark.parametrize(
    ("name", "form", "axes"),
    [
        pytest.param(name, form, axes, marks=[] if axes == "explicit" and name == "more_axes" else pytest.mark.slow)
        for name in SPREAD
        for form in FORMS
        for axes in devices.AXES
    ],
)
def test_histograms_of_spread_rows_are_one_all_reduce(name, form, axes):
    buckets, weights, n, columns, expected = histogram_case(name)
    call = jax.jit(lambda buckets, *weights: FORMS[form](buckets, weights, n, columns))
    placed = jax.device_put((buckets, *weights), NamedSharding(devices.mesh_of(8, axes), PartitionSpec("d")))
    np.testing.assert_allclose(call(*placed), expected, rtol=3e-7, atol=1e-30)
    text = call.lower(*placed).compile().as_text()
    assert devices.count(text, "all-reduce") == 1
    for other in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert devices.count(text, other) == 0


# Axes that are shorter than XLA's blocks of 32, beside longer ones and alone.
@pytest.mark.parametrize(
    "shape", [(30, 30, 30, 30), (32, 31, 31, 3), (31, 31, 900), (16, 28, 28, 1), (2, 24, 40, 8), (961, 31), (8192,)]
)
def test_sums_are_exact_whatever_the_axes(shape):
    x, y = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)

    @jax.jit
    def run(x):
        # The squares are made in the loop that adds them up, as losses are.
        each = masking.total((x - y) ** 2), masking.column_totals((x - y) ** 2), masking.column_totals((x - y) ** 2, 2)
        return each, jax.grad(lambda x: masking.total((x - y) ** 2))(x)

    found, gradient = run(x)
    squares = (x.astype(np.float64) - y) ** 2
    for got, kept in list(zip(found, (0, 1, 2), strict=True))[: len(shape)]:
        exact = squares.sum(tuple(range(len(shape) - kept)))
        np.testing.assert_allclose(got, exact, rtol=1e-6, err_msg=f"{kept} axes are kept")
    np.testing.assert_allclose(gradient, 2 * (x.astype(np.float64) - y), rtol=1e-5, atol=1e-6)


def test_sums_by_axis_keep_what_is_infinite_or_nan():
    x = np.ones((30, 30, 4), np.float32)
    x[3, 3, 1:] = np.inf, -np.inf, np.nan
    sums, slope = jax.jit(lambda x: (masking.column_totals(x), jax.grad(lambda x: masking.column_totals(x)[2])(x)))(x)
    np.testing.assert_array_equal(sums, [900, np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(slope, np.broadcast_to([0, 0, 1, 0], x.shape))


def test_infinite_and_nan_weights_show_in_their_row():
    buckets: Any = np.array([[0, 1], [2, 3]], np.int32)
    sums = jax.jit(lambda weights: [form(buckets, (weights,), 4, (0, 1)) for form in FORMS.values()])
    for bad in (np.nan, np.inf):
        for found in jax.device_get(sums(np.array([[1, bad], [2, 3]], np.float32))):
            assert not np.isfinite(found[0, 1]).all()
            np.testing.assert_array_equal(found[0, 0], [1, 0, 2, 0])


@pytest.mark.parametrize("grid", [LogitGrid(), LogitGrid(-3, 5, 100), ThresholdGrid(200), ThresholdGrid(3)])
def test_user_thresholds_are_exact_edges(grid):
    """Every bucket of a score above a threshold is above its edge, and no other, neighbours included."""
    thresholds = (0.1, 0.3, 0.5, 1 / 3, 0.999, 1e-6)
    layout = grid.layout(thresholds)
    z = np.asarray([stable.log_odds(t) for t in thresholds], np.float32)
    z = np.concatenate(
        [
            z,
            np.nextafter(z, np.float32(9)),
            np.nextafter(z, np.float32(-9)),
            np.linspace(-15, 15, 999),
        ]
    )
    z = normal(z.astype(np.float32))
    buckets, p = jax.device_get(jax.jit(lambda z: (grid.buckets(layout, z), jax.nn.sigmoid(z)))(z))
    np.testing.assert_array_equal(buckets > layout.zero, z > 0)
    for t in thresholds:
        if isinstance(grid, LogitGrid):
            positive = z > np.float32(stable.log_odds(t))
        else:
            positive = p > np.float32(t)
        np.testing.assert_array_equal(buckets > layout.position[t], positive, err_msg=str(t))


def test_z_above_0_is_an_edge_of_its_own_where_p_is_exactly_one_half():
    z = np.array([1e-9, -1e-9, 0.0, 1e-30], np.float32)
    grid = ThresholdGrid(200)
    layout = grid.layout((0.5,))
    buckets, p = jax.device_get(jax.jit(lambda z: (grid.buckets(layout, z), jax.nn.sigmoid(z)))(z))
    np.testing.assert_array_equal(p, 0.5)
    np.testing.assert_array_equal(buckets > layout.zero, [True, False, False, True])
    assert not np.any(buckets > layout.position[0.5])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LogitGrid(1, 1), "low < high"),
        (lambda: LogitGrid(-np.inf, 1), "finite"),
        (lambda: LogitGrid(n=2), "at least 3"),
        (lambda: LogitGrid(1e8, 1e8 + 10, 2048), "narrower"),
        (lambda: ThresholdGrid(2.5), "integer"),  # pyright: ignore[reportArgumentType]  # what is tested
        (lambda: Edges([]), "at least one"),
        (lambda: Edges([np.nan]), "finite"),
        (lambda: Reduction.of("none"), "Invalid loss_reduction: 'none'"),
        (
            lambda: LinearLogits(np.ones((2, 3)), np.ones((4, 1))).check(),
            r"hidden \(2, 3\), kernel \(4, 1\)",
        ),
        (
            lambda: LinearLogits(np.ones((2, 3)), np.ones((3, 1)), np.ones(2)).check(),
            r"Given \(2,\)",
        ),
        (lambda: fields.learned(3), "function"),  # pyright: ignore[reportArgumentType]  # what is tested
    ],
)
def test_bad_configuration_is_refused_in_words(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_is_argmax_is_the_first_maximum():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, (200, 5)).astype(np.float32)
    ids = rng.integers(0, 5, (200, 1)).astype(np.int32)
    expected = values.argmax(-1, keepdims=True) == ids
    is_argmax = jax.jit(stable.is_argmax)
    np.testing.assert_array_equal(is_argmax(values, ids), expected)
    values[:, 2] = -np.inf
    expected = values.argmax(-1, keepdims=True) == ids
    np.testing.assert_array_equal(is_argmax(values, ids), expected)


def test_vocabulary_encodes_text_and_bytes_and_names_the_stranger():
    labels = np.array([["b"], [b"a"]], object)
    np.testing.assert_array_equal(vocabulary.encode(labels, ("a", "b")), [[1], [0]])
    with pytest.raises(ValueError, match=r"'c' at index \(1, 0\).*where=False"):
        vocabulary.encode(np.array([["b"], ["c"]]), ("a", "b"))
    kept = vocabulary.encode(np.array([["b"], ["c"]]), ("a", "b"), np.array([[True], [False]]))
    np.testing.assert_array_equal(kept, [[1], [-1]])


@jax.jit
def sigmoid_cross_entropy(label, z):
    """Values and slopes for one label, compiled once."""
    return jax.jvp(lambda z: losses.sigmoid_cross_entropy(jnp.full_like(z, label), z), (z,), (jnp.ones_like(z),))


@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
def test_sigmoid_cross_entropy_is_the_formula(label):
    """In float64 by hand, relative to itself; its slope too; integer and bfloat16 labels; infinite logits."""
    z = np.concatenate([np.linspace(-80, 80, 20_001), [0.0, np.inf, -np.inf]]).astype(np.float32)
    value, slope = (np.asarray(x) for x in sigmoid_cross_entropy(np.float32(label), z))
    exact = z[:-2].astype(np.float64)
    p, q = (np.exp(-np.logaddexp(0, sign * exact)) for sign in (-1, 1))
    exact = label * np.logaddexp(0, -exact) + (1 - label) * np.logaddexp(0, exact)
    np.testing.assert_allclose(value[:-2], exact, rtol=4e-7)
    np.testing.assert_allclose(slope[:-2], (1 - label) * p - label * q, rtol=5e-7, atol=1e-7)
    np.testing.assert_array_equal(value[-2:], [np.inf if label < 1 else 0, np.inf if label > 0 else 0])
    np.testing.assert_allclose(slope[-2:], [1 - label, -label], rtol=1e-6)
    for dtype in (jnp.int32, jnp.bfloat16):
        if dtype == jnp.bfloat16 or label in (0, 1):
            labels, loss = np.asarray(label, dtype), losses.sigmoid_cross_entropy
            assert jax.eval_shape(loss, labels, np.asarray(0.5, jnp.bfloat16)).dtype == jnp.bfloat16
            assert jax.eval_shape(jax.grad(loss, argnums=1), labels, np.float32(1)).dtype == np.float32


def test_labels_of_the_sigmoid_loss_may_be_learned():
    """A teacher trained with its student: labels move alone, or with the logits. By hand in float64, and by optax."""
    z: Any = np.array([-3.0, 0.5, 7.0], np.float32)
    y: Any = np.array([0.2, 0.5, 0.9], np.float32)

    @jax.jit
    def slopes(w):
        def alone(y):
            return losses.sigmoid_cross_entropy(y, z).sum()

        def both(w):
            return losses.sigmoid_cross_entropy(jax.nn.sigmoid(w * y), w * z).sum()

        def by_optax(w):
            return optax.sigmoid_binary_cross_entropy(w * z, jax.nn.sigmoid(w * y)).sum()

        return jax.grad(alone)(y), jax.grad(both)(w), jax.grad(by_optax)(w)

    moved, got, of_optax = slopes(np.float32(0.7))
    np.testing.assert_allclose(moved, -z, rtol=1e-6)
    z64, y64 = z.astype(np.float64), y.astype(np.float64)
    teacher = 1 / (1 + np.exp(-0.7 * y64))
    by_logits = (1 / (1 + np.exp(-0.7 * z64)) - teacher) * z64
    np.testing.assert_allclose(got, np.sum(by_logits - 0.7 * z64 * teacher * (1 - teacher) * y64), rtol=1e-5)
    np.testing.assert_allclose(got, of_optax, rtol=1e-5)


def test_a_division_by_0_is_0_and_hides_no_nan():
    totals = jnp.array([3, 0, np.nan, 2, np.inf], jnp.float32)
    divisors = jnp.array([2, 0, 0, 0, 4], jnp.float32)
    np.testing.assert_array_equal(divide(totals, divisors), [1.5, 0, np.nan, 0, np.inf])
    slope = jax.grad(lambda total: jnp.sum(divide(total, divisors)))(totals)
    np.testing.assert_array_equal(slope, [0.5, 0, 1, 0, 0.25])
