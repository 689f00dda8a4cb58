"""The laws that need no formula. Each takes a `Case`, and raises `AssertionError` if a head breaks the law."""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.metrics import Metrics
from jaxheads.numerics.labels import LabelSpec
from jaxheads.numerics.linear import LinearLogits
from jaxheads.numerics.reduction import Reduction
from jaxheads.testing.case import Case, Skipped, Values

Law = Callable[[Case], None]

# The difference that is allowed: relative to each value, and to the largest value of its array. The tests of the
# library set them lower.
RTOL, ATOL = 1e-5, 2e-6
FLAT = 0.05  # small logits: a loss with a margin may be flat at larger ones


def of(oracle: Any, devices: Sequence[Any]) -> dict[str, Law]:
    """Returns the laws by name, for a head with or without (None) an oracle, on some devices."""
    every: dict[str, Law] = {
        "where=False is absence": where_is_absence,
        "a weight of 0 hides, a weight of 2 is twice": weights_are_multiplicities,
        "metrics add": metrics_add,
        "devices do not matter": functools.partial(devices_do_not_matter, devices=devices),
        "lazy logits are their product": lazy_logits_are_their_product,
        "reductions are float32": reductions_are_float32,
        "extreme logits and empty batches are harmless": extremes_are_harmless,
        "bad input is refused or visible": bad_input_is_visible,
        "one trace, and eager equals jit": one_trace,
        "leading axes do not matter": leading_axes_do_not_matter,
        "any cotangent": any_cotangent,
        "predictions are of each row": predictions_are_of_rows,
        "losses below 0 are declared": negative_losses_are_declared,
        "running state counts what is there": running_state_counts_what_is_there,
    }
    return every if oracle is None else {"the loss is the oracle's": functools.partial(loss_is, oracle=oracle), **every}


def loss_is(case: Case, oracle: Any) -> None:
    """Checks the loss against the oracle, under every reduction, with weights."""
    weights = np.linspace(0.5, 2, case.size)[:, None]
    found = case.values(weights=weights).losses
    if not found:
        raise Skipped("the heads inside say how the loss is reduced")
    extra = {"weights": weights} if "weights" in inspect.signature(oracle).parameters else {}
    told = oracle(case.labels, jax.tree.map(np.float64, case.logits), **extra)
    losses, counts = told if isinstance(told, tuple) else (told, np.ones_like(told))
    total = (np.asarray(losses, np.float64) * weights).sum()
    divisors = {
        Reduction.SUM: 1,
        Reduction.MEAN: np.sum(counts * weights),
        Reduction.SUM_OVER_BATCH_SIZE: np.sum(counts),
        Reduction.SUM_BY_NONZERO_WEIGHTS: np.sum(counts),
    }
    for reduction, divisor in divisors.items():
        expected = total / divisor if divisor else 0.0
        what = f"The loss (loss_reduction={reduction.value!r}) is not the oracle's"
        close(found[reduction.value], expected, what)


def where_is_absence(case: Case) -> None:
    """Checks that hidden rows change no loss, gradient or metric, whatever their values: they count as absent."""
    case.check_not_random()
    hidden = np.arange(case.size) % 2 == 1
    kept = np.flatnonzero(~hidden)
    for rows in (case, case.scaled(FLAT)):
        masked, without = spoiled(rows, hidden).values(where=~hidden), rows.rows(kept).values()
        same(masked, without, "with a row hidden by where=False", "without it", rows=kept)
        gradient = jax.tree.map(lambda x: np.asarray(x)[hidden], masked.by_logits)
        close(gradient, jax.tree.map(np.zeros_like, gradient), "Logits of hidden rows have a gradient")


def weights_are_multiplicities(case: Case) -> None:
    """Checks that a row of weight 2 counts twice, in metrics, a sum and a mean, and a row of weight 0 not at all."""
    case.check_not_random()
    times = np.resize([2, 1, 1], case.size)
    times[np.cumsum(times) > case.size] = 0
    again = np.repeat(np.arange(case.size), times)
    there = np.arange(case.size) < len(again)
    for rows in (case, case.scaled(FLAT)):
        weighted = spoiled(rows, times == 0).values(weights=times)
        twice = rows.rows(np.resize(again, case.size)).values(where=there)
        for reduction in (Reduction.SUM, Reduction.MEAN):
            if (name := reduction.value) in weighted.losses:
                what = f"The loss (loss_reduction={name!r}) with a weight of 2 is not that of two rows"
                close(weighted.losses[name], twice.losses[name], what)
        # The loss of a head inside depends on its reduction, which may count a row once whatever its weight is.
        same_metrics(weighted.metrics, twice.metrics, "with a weight of 2", "of the row twice", but="loss/")


def metrics_add(case: Case) -> None:
    """Checks that the metrics of the parts of a batch add up to those of the whole, and that zero adds nothing."""
    case.check_not_random()
    if case.is_coupled:
        raise Skipped("its rows look at each other")
    first = np.arange(case.size) < case.size // 2
    parts = [case.values(where=where).metrics for where in (first, ~first)]
    same_metrics(parts[0] + parts[1], case.values().metrics, "of two parts together", "of the whole")
    same_metrics(case.head.metrics() + parts[0], parts[0], "with zero added", "without")


def devices_do_not_matter(case: Case, devices: Sequence[Any]) -> None:
    """Checks loss, gradients and metrics for rows that are spread over devices in every way, and masked unevenly."""
    if len(devices) < 2:
        raise Skipped("there is one device")
    case.check_not_random()
    n = len(devices)
    spread = case.rows(np.resize(np.arange(case.size), 2 * n))
    # With three devices or more, no row of the second device exists.
    there = (np.arange(2 * n) % 3 != 1) & ((np.arange(2 * n) // 2 != 1) | (n < 3))
    weights = np.resize([0.5, 1, 0, 2, 1.5], 2 * n)
    expected, wrong = spread.values(weights, there), []
    given = spread.spread(weights, np.float32), spread.spread(there, bool)
    for name, run in ways(spread, devices).items():
        try:
            same(run(*given), expected, f"on {n} devices", "on one")
        except Exception as error:  # any error is reported with its way, and the other ways still run
            wrong.append(f"{name}: {error}")
    if wrong:
        raise AssertionError("\n".join(wrong))


def ways(case: Case, devices: Sequence[Any]) -> dict[str, Callable[[Any, Any], Values]]:
    """Returns functions by name. Each computes the values of a case with its rows spread over devices in one way."""
    mesh = jax.sharding.Mesh(np.asarray(devices), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    explicit = jax.sharding.Mesh(np.asarray(devices), ("devices",), axis_types=(jax.sharding.AxisType.Explicit,))
    by_rows, whole = jax.sharding.PartitionSpec("devices"), jax.sharding.PartitionSpec()

    def given(weights: Any, where: Any) -> tuple[Any, ...]:
        return case.labels, case.logits, case.features, weights, where

    def run(axis_name: Any, labels: Any, logits: Any, features: Any, weights: Any, where: Any, params: Any) -> Values:
        rest = {"weights": weights, "where": where, "axis_name": axis_name, "key": case.key}

        def loss(logits: Any, params: Any) -> jax.Array:
            return case.head.loss(labels, logits, features, params=params, **rest)

        value, (by_logits, by_params) = jax.value_and_grad(loss, argnums=(0, 1), allow_int=True)(logits, params)
        metrics = case.head.measure(labels, logits, features, params=params, **rest)
        floats = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, by_params)
        return Values(value, by_logits, floats, {}, metrics)

    def on(mesh: Any) -> Callable[[Any, Any], Values]:
        def spread(weights: Any, where: Any) -> Values:
            rows = jax.device_put(given(weights, where), jax.sharding.NamedSharding(mesh, by_rows))
            params = jax.device_put(case.params, jax.sharding.NamedSharding(mesh, whole))
            return jax.jit(functools.partial(run, None))(*rows, params)

        return spread

    def mapped(check_vma: bool) -> Callable[[Any, Any], Values]:
        def local(*arguments: Any) -> Values:
            found = run("devices", *arguments)
            # With the check, `grad` adds up the gradients of parameters; without it each device has its own.
            by_params = found.by_params if check_vma else jax.lax.pmean(found.by_params, "devices")
            return Values(found.loss, found.by_logits, by_params, {}, found.metrics.psum("devices"))

        specs = Values(whole, by_rows, whole, {}, whole)  # pyright: ignore[reportArgumentType]  # specs for values
        step = jax.shard_map(local, mesh=mesh, in_specs=(*[by_rows] * 5, whole), out_specs=specs, check_vma=check_vma)

        def spread(weights: Any, where: Any) -> Values:
            found = jax.jit(step)(*given(weights, where), case.params)
            if check_vma:
                return found
            # Without the check, the gradient of the shared loss to a device's rows is too large by the device count.
            by_logits = jax.tree.map(lambda x: x / len(devices), found.by_logits)
            return Values(found.loss, by_logits, found.by_params, {}, found.metrics)

        return spread

    def by_pmap(weights: Any, where: Any) -> Values:
        n = len(devices)
        rows = jax.tree.map(lambda x: np.reshape(x, (n, -1, *np.shape(x)[1:])), given(weights, where))

        def local(labels: Any, logits: Any, features: Any, weights: Any, where: Any) -> Values:
            found = run("devices", labels, logits, features, weights, where, case.params)
            by_params = jax.lax.pmean(found.by_params, "devices")
            return Values(found.loss, found.by_logits, by_params, {}, found.metrics.psum("devices"))

        found = jax.pmap(local, axis_name="devices", devices=list(devices))(*rows)
        first = jax.tree.map(lambda x: x[0], Values(found.loss, {}, found.by_params, {}, found.metrics))
        by_logits = jax.tree.map(lambda x: np.reshape(x, (-1, *x.shape[2:])) / n, found.by_logits)
        return dataclasses.replace(first, by_logits=by_logits)

    return {
        "jit over a mesh": on(mesh),
        "jit over a mesh with Explicit axes": on(explicit),
        "shard_map": mapped(True),
        "shard_map(check_vma=False)": mapped(False),
        "pmap": by_pmap,
    }


def reductions_are_float32(case: Case) -> None:
    """Checks that logits in bfloat16 give the loss that the same numbers give in float32."""
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), case.logits)
    high = jax.tree.map(lambda x: np.asarray(x, np.float32), low)
    found, expected = case.values(logits=low), case.values(logits=high)
    close(found.loss, expected.loss, "The loss of bfloat16 logits is not that of the same logits in float32")
    if found.loss.dtype != jnp.float32:
        raise AssertionError(f"The loss must be float32. Given {found.loss.dtype}.")


def extremes_are_harmless(case: Case) -> None:
    """Checks that logits of 1e4 and -1e4 give no NaN, and that a batch of masked rows has loss 0 and gradient 0."""
    for size in (1e4, -1e4):
        for what, sign in (("equal", np.ones_like), ("of both signs", np.sign)):
            logits = jax.tree.map(lambda x, size=size, sign=sign: np.float32(size) * sign(x), case.logits)
            found = case.values(logits=logits)
            gradients = jax.tree.leaves(found.by_logits)
            if np.isnan(found.loss) or any(np.isnan(x).any() for x in gradients):
                raise AssertionError(
                    f"Logits of {size:g}, {what}, give a loss of {found.loss} and a gradient with NaN; where the "
                    "formula has no float32 they may be inf."
                )
            if np.isfinite(found.loss) and not all(np.isfinite(x).all() for x in gradients):
                raise AssertionError(f"Logits of {size:g}, {what}, give a finite loss, and a gradient that is not.")
            predicted = [x for x in jax.tree.leaves(case.predictions(logits)[0]) if x.dtype.kind in "fV"]
            if any(np.isnan(x).any() for x in predicted):
                raise AssertionError(f"Logits of {size:g}, {what}, give predictions with NaN.")
    nothing = spoiled(case, np.ones(case.size, bool)).values(where=np.zeros(case.size))
    for what, tree in (("loss", nothing.loss), ("gradient", (nothing.by_logits, nothing.by_params))):
        close(tree, jax.tree.map(np.zeros_like, tree), f"A batch of which no row exists has a {what} that is not 0")


def bad_input_is_visible(case: Case) -> None:
    """Checks that an illegal label is refused on the host, and gives a NaN loss and gradient in a compiled step."""
    labels = _make_illegal(case)
    try:
        case.head.loss(labels, case.logits, case.features, params=case.params, key=case.key)
    except ValueError:
        pass
    else:
        raise AssertionError("An illegal label on the host is not refused.")

    found = dataclasses.replace(case, labels=labels).values()
    if not np.isnan(found.loss):
        raise AssertionError(f"An illegal label in a compiled step gives a loss of {found.loss}, not NaN.")
    if not any(np.isnan(x).any() for x in jax.tree.leaves(found.by_logits)):
        raise AssertionError("An illegal label in a compiled step gives a gradient without NaN.")


def _make_illegal(case: Case) -> Any:
    """Returns labels whose first value is illegal."""
    (head,) = case.leaves if len(case.leaves) == 1 else (None,)
    specs = None if head is None else head.label_spec
    by_name = {None: specs} if isinstance(specs, LabelSpec) else dict(specs or {})
    for name, spec in by_name.items():
        if not isinstance(spec, LabelSpec) or (worst := _find_illegal(spec)) is None:
            continue
        given = case.labels if name is None else case.labels[name]
        labels = np.array(given, np.float32 if np.isnan(worst) else None)
        labels[(0,) * labels.ndim] = worst
        return labels if name is None else {**case.labels, name: labels}
    raise Skipped("it has several heads inside" if head is None else "all labels of their dtype are legal")


def _find_illegal(spec: LabelSpec) -> float | None:
    """Returns an illegal label; None where all labels are legal."""
    if spec.kind == "float":
        return np.nan
    if spec.kind == "bool" or spec.high is spec.low is None:
        return None
    return spec.high + 1 if spec.high is not None else spec.low - 1  # pyright: ignore[reportOptionalOperand]  # one is there


def one_trace(case: Case) -> None:
    """Checks that a head built again from equal fields causes no new trace, and that eager and compiled calls agree."""
    # `chex.assert_max_traces` adds up the traces of all heads: it counts by the place of a function.
    traces: list[int] = []

    def count(head: Any, labels: Any, logits: Any) -> Any:
        traces.append(0)
        return head.loss(labels, logits, case.features, params=case.params, key=case.key)

    step = jax.jit(count)
    step.eval_shape(case.head, case.labels, case.logits)
    step.eval_shape(dataclasses.replace(case.head), case.labels, case.logits)
    if len(traces) != 1:
        raise AssertionError(
            f"Two equal heads were traced {len(traces)} times. A field of the class changes when the head is built "
            "again, so heads with equal arguments are not equal."
        )

    weights, there = np.linspace(0, 2, case.size), np.arange(case.size) != 1
    compiled, head = case.values(weights, there), case.head
    where = case.spread(there, bool)
    rest = {"weights": case.spread(weights, np.float32), "where": where, "params": case.params, "key": case.key}
    loss = head.loss(case.labels, case.logits, case.features, **rest)
    close(loss, compiled.loss, "An eager loss is not that of a compiled step")
    measured = head.measure(case.labels, case.logits, case.features, **rest)
    same_metrics(measured, compiled.metrics, "of an eager call", "of a compiled step")
    updated = head.update_metrics(head.metrics(), case.features, case.logits, case.labels, **rest)
    same_metrics(updated, compiled.metrics, "of an eager update", "of a compiled step")


def leading_axes_do_not_matter(case: Case) -> None:
    """Checks that rows `[2, 1, n / 2]` have the values of rows `[n]`, and that weights and masks need no last axis.

    Labels need none either, if their last axis has the size 1.
    """
    if case.tail:
        raise Skipped("its leading axes have a meaning")
    case.check_not_random()
    weights, where = np.linspace(0, 2, case.size), np.arange(case.size) != 1
    flat, labels = case.values(weights, where), case.labels
    if not case.head.parts() and isinstance(case.head.label_spec, LabelSpec) and case.head.label_spec.event == (1,):
        labels = np.asarray(labels)[..., 0]
    deep = dataclasses.replace(case, labels=labels).values(weights, where, lead=(2, 1, case.size // 2))
    by_logits = jax.tree.map(lambda x: np.reshape(x, (case.size, *np.shape(x)[3:])), deep.by_logits)
    same(dataclasses.replace(deep, by_logits=by_logits), flat, "of rows [2, 1, n / 2]", "of rows [n]")


def predictions_are_of_rows(case: Case) -> None:
    """Checks that predictions keep the rows, that compiled ones are the eager ones, and each key alone as among all."""
    eager = case.head.predictions(case.logits, params=case.params, features=case.features, key=case.key)
    for path, value in jax.tree.leaves_with_path(eager):
        if np.shape(value)[:1] != (case.size,):
            raise AssertionError(
                f"The prediction {jax.tree_util.keystr(path)} has shape {np.shape(value)}, for {case.size} rows: its "
                "first axis must be that of the rows."
            )
    compiled, alone = case.predictions()
    close(compiled, eager, "Compiled predictions are not the eager ones")
    for key, value in alone.items():
        close(value, eager[key], f"The prediction {key!r} alone is not that among all")


def negative_losses_are_declared(case: Case) -> None:
    """Checks that a head whose loss may be negative declares `signed = True`."""
    if case.head.signed:
        raise Skipped("it declares that losses may be negative")
    cases = [case.scaled(scale) for scale in (FLAT, 1, 4)]
    found = [case.values(where=row) for case in cases for row in np.eye(case.size)]
    loss = min(float(values.losses.get("sum", values.loss)) for values in found)
    if loss < -ATOL:
        raise AssertionError(
            f"The loss is {loss}. Declare signed = True in the class: a MultiHead that learns the weights of its heads "
            "then refuses this head."
        )


def running_state_counts_what_is_there(case: Case) -> None:
    """Checks that the running state leaves out hidden rows, and counts a row of weight 2 as that row twice."""
    case.check_not_random()
    if not (state := case.head.init_state()):
        raise Skipped("it keeps none")
    learned = case.head.init(jax.random.key(0))

    def moved(case: Case, weights: Any, where: Any) -> Any:
        rest = {"weights": case.spread(weights, np.float32), "where": case.spread(where, bool), "params": learned}
        return jax.jit(lambda: case.head.update_state(state, case.labels, case.logits, case.features, **rest))()

    ones = np.ones(case.size)
    hidden = np.arange(case.size) % 2 == 1
    masked, without = moved(spoiled(case, hidden), ones, ~hidden), case.rows(np.flatnonzero(~hidden))
    expected = moved(without, np.ones(without.size), np.ones(without.size))
    close(masked, expected, "The running state after hidden rows is not that without them")
    again = case.rows(np.append(np.arange(case.size), 0))
    twice = moved(case, np.where(np.arange(case.size) == 0, 2, ones), ones)
    expected = moved(again, np.ones(again.size), np.ones(again.size))
    close(twice, expected, "The running state after a row of weight 2 is not that after the row twice")


def lazy_logits_are_their_product(case: Case) -> None:
    """Checks that a head takes `LinearLogits` as their product: hidden layer times matrix, plus bias."""
    if not any(leaf.takes_linear for leaf in case.leaves):
        raise Skipped("it takes none")
    rng, n = np.random.default_rng(1), case.head.logits_dimension
    shapes = (case.size, *case.tail, 3), (3, n), (n,)
    hidden, kernel, bias = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    where = case.spread(np.arange(case.size) % 2 == 0, bool)
    given = np.where(where, hidden, np.float32(np.nan))

    def both(lazy: bool, hidden: Any, kernel: Any, bias: Any) -> Any:
        def loss(*parts: Any) -> jax.Array:
            product = LinearLogits(*parts)
            logits = product if lazy else product.multiply()
            return case.head.loss(case.labels, logits, case.features, where=where, params=case.params, key=case.key)

        logits = LinearLogits(hidden, kernel, bias) if lazy else LinearLogits(hidden, kernel, bias).multiply()
        metrics = case.head.measure(case.labels, logits, case.features, where=where, params=case.params, key=case.key)
        return jax.value_and_grad(loss, argnums=(0, 1, 2))(hidden, kernel, bias), metrics

    step = jax.jit(both, static_argnums=0)
    (loss, gradients), metrics = step(True, given, kernel, bias)
    (product, expected), others = step(False, np.where(where, hidden, 0), kernel, bias)
    close(loss, product, "The loss of lazy logits is not that of their product")
    for name, gradient, other in zip(("hidden layer", "matrix", "bias"), gradients, expected, strict=True):
        close(gradient, other, f"The gradient to the {name} of lazy logits is not that of their product")
    same_metrics(metrics, others, "of lazy logits", "of their product")


def any_cotangent(case: Case) -> None:
    """Checks that the gradient of 1024 times the loss is 1024 times the gradient."""
    one, many = case.values(), case.values(scale=1024.0)
    expected = jax.tree.map(lambda x: 1024 * np.asarray(x), (one.by_logits, one.by_params))
    close(
        (many.by_logits, many.by_params), expected, "The gradient of 1024 times the loss is not 1024 times the gradient"
    )


# Garbage, and comparisons.


def spoiled(case: Case, hidden: np.ndarray) -> Case:
    """Returns the case with garbage in the hidden rows: NaN, and illegal labels."""

    def spoil(x: Any) -> np.ndarray:
        x = np.array(x)
        rows = hidden.reshape(-1, *[1] * (x.ndim - 1))
        if x.dtype.kind == "f":
            return np.where(rows, np.float32(np.nan), x).astype(x.dtype)
        return np.where(rows, np.iinfo(x.dtype).min, x).astype(x.dtype) if x.dtype.kind == "i" else x

    labels, logits = jax.tree.map(spoil, (case.labels, case.logits))
    features = None if case.features is None else jax.tree.map(_spoiled_column(spoil, case.size), case.features)
    return dataclasses.replace(case, labels=labels, logits=logits, features=features)


def _spoiled_column(spoil: Callable[[Any], np.ndarray], size: int) -> Callable[[Any], Any]:
    """Returns a function that puts garbage in the hidden rows of number columns; other values stay unchanged."""

    def column(x: Any) -> Any:
        return spoil(x) if np.ndim(x) and np.shape(x)[0] == size and np.asarray(x).dtype.kind == "f" else x

    return column


def same(found: Values, expected: Values, how: str, other: str, rows: Any = None) -> None:
    """Checks that loss, gradients and metrics have the expected values."""
    close(found.loss, expected.loss, f"The loss {how} is not that {other}")
    for name, value in found.losses.items():
        if name in expected.losses:
            close(value, expected.losses[name], f"The loss (loss_reduction={name!r}) {how} is not that {other}")
    by_logits = found.by_logits if rows is None else jax.tree.map(lambda x: np.asarray(x)[rows], found.by_logits)
    close(by_logits, expected.by_logits, f"The gradient to the logits {how} is not that {other}")
    close(found.by_params, expected.by_params, f"The gradient to what the head learns {how} is not that {other}")
    same_metrics(found.metrics, expected.metrics, how, other)


def same_metrics(found: Metrics, expected: Metrics, how: str, other: str, but: str = "\n") -> None:
    """Checks that every metric has its expected value, except metrics whose names begin with `but`."""

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got, wanted = found.compute(bounds=True), expected.compute(bounds=True)
    for key in (key for key in got if not key.startswith(but)):
        close(got[key], wanted[key], f"The metric {key!r} {how} is not that {other}")


def close(found: Any, expected: Any, what: str) -> None:
    """Checks that all leaves are nearly equal, with NaN where NaN is expected."""
    import chex

    try:
        chex.assert_trees_all_equal_comparator(_is_close, _tell_difference, found, expected)
    except AssertionError as error:
        raise AssertionError(f"{what}.\n{error}") from error


def _is_close(found: Any, expected: Any) -> bool:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    scale = float(np.max(np.abs(expected[np.isfinite(expected)]), initial=0.05))
    return found.shape == expected.shape and np.allclose(found, expected, RTOL, ATOL * scale, equal_nan=True)


def _tell_difference(found: Any, expected: Any) -> str:
    return f"{np.asarray(found).tolist()} against {np.asarray(expected).tolist()}"
