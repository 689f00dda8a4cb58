"""FTRL-proximal, the optimizer of wide sparse linear models, for optax."""

import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jaxheads.numerics import brief


class FtrlState(NamedTuple):
    """The two sums of each weight, in float32 or wider; with a schedule, also the number of steps taken."""

    accumulators: Any
    linears: Any
    count: Any = None  # pyright: ignore[reportIncompatibleMethodOverride]  # optax's states all call it so


class _Step(NamedTuple):
    """The results of a step for one leaf."""

    update: Any
    accumulator: Any
    linear: Any


def ftrl(
    learning_rate: optax.ScalarOrSchedule = 0.001,
    *,
    learning_rate_power: float = -0.5,
    initial_accumulator_value: float = 0.1,
    l1_regularization_strength: float = 0.0,
    l2_regularization_strength: float = 0.0,
    l2_shrinkage_regularization_strength: float = 0.0,
    beta: float = 0.0,
) -> optax.GradientTransformation:
    """FTRL-proximal: AdaGrad's steps for each coordinate, and weights that l1 makes exactly 0.

    Each weight `w` has two sums, which start at `n = initial_accumulator_value` and `z = 0`. With the gradient `g` and
    `p = -learning_rate_power`, a step is:

        n' = n + g²
        z' = z + g + 2 l2_shrinkage w - (n'^p - n^p) / learning_rate w
        w' = 0                                                                  where |z'| <= l1
        w' = (l1 sign(z') - z') / ((n'^p + beta) / learning_rate + 2 l2)        elsewhere

    The update is `w' - w`. With it, `optax.apply_updates` gives `w'`, exactly 0 where `w'` is 0. So put nothing after
    ftrl in a chain. In the paper, `alpha` is the learning rate, `lambda_1` is l1, `lambda_2` is twice l2, and n starts
    at 0.

    Weights should start at 0. If a weight starts elsewhere, the first step keeps at most the share `1 - (n / n')^p` of
    it, and nothing where the gradient is 0: w' depends only on the sums. Gradients are dense, so the same happens to
    the rows of an embedding that no example has touched.

    l1 and n have the unit of the loss: with `loss_reduction="sum"` they count examples, with a mean they shrink with
    the batch. `optax.inject_hyperparams` needs `static_args=("learning_rate_power",)`: otherwise the power of n is
    computed by a slower function.

    n and z are float32 for parameters of any dtype (float64 for float64). Updates have the dtype of the parameters. A
    gradient that is None leaves its weight alone. A NaN in a gradient makes its weight NaN. In TensorFlow it makes the
    weight 0 for ever.

    Args:
        learning_rate: a number > 0, or a schedule: a function of the number of steps taken. A step at which a schedule
            gives 0 (the start of a warmup, the end of a decay) changes nothing, and leaves the sums as they are too.
        learning_rate_power: <= 0; how the rate falls as n grows. -0.5 is AdaGrad's power, 0 keeps the rate constant.
        initial_accumulator_value: >= 0; the first value of n. At 0, l2_shrinkage needs l2 or beta: for a weight without
            a gradient, the denominator of the first `w'` contains nothing else.
        l1_regularization_strength: >= 0; a weight is 0 while `|z|` is at most this value.
        l2_regularization_strength: >= 0; moves w' towards 0, as a part of the proximal term.
        l2_shrinkage_regularization_strength: >= 0; a penalty `l2_shrinkage w²` on the loss, which n does not count.
        beta: >= 0; the beta of the paper. It makes the first steps smaller.

    Raises:
        ValueError: a hyperparameter out of its range or not finite; a schedule that starts below 0; an update without
            `params`, or with a gradient that does not have the shape of its parameter.

    Source: McMahan et al., "Ad Click Prediction: a View from the Trenches" (KDD 2013), algorithm 1. The numbers agree
    with `tf.keras.optimizers.legacy.Ftrl` (TensorFlow 2.15).

    >>> import jax.numpy as jnp
    >>> import optax
    >>> from jaxheads.training import ftrl
    >>> optimizer = ftrl(0.5, l1_regularization_strength=0.6)
    >>> weights = jnp.zeros(2)
    >>> state = optimizer.init(weights)
    >>> updates, state = optimizer.update(jnp.array([1.0, -0.5]), state, weights)
    >>> optax.apply_updates(weights, updates)  # (0.6 - 1) / (sqrt(0.1 + 1) / 0.5), and |-0.5| <= 0.6
    Array([-0.190...,  0.        ], dtype=float32)
    """
    if not callable(learning_rate):
        learning_rate = _check("learning_rate", learning_rate, "> 0")
    power = -_check("learning_rate_power", learning_rate_power, "<= 0")
    start = _check("initial_accumulator_value", initial_accumulator_value, ">= 0")
    l1 = _check("l1_regularization_strength", l1_regularization_strength, ">= 0")
    l2 = _check("l2_regularization_strength", l2_regularization_strength, ">= 0")
    shrinkage = _check("l2_shrinkage_regularization_strength", l2_shrinkage_regularization_strength, ">= 0")
    beta = _check("beta", beta, ">= 0")

    def init(params: Any) -> Any:
        count = None
        if callable(learning_rate):
            count = jnp.zeros([], jnp.int32)
            _check("learning_rate at step 0", learning_rate(count), ">= 0")
        return FtrlState(
            accumulators=jax.tree.map(lambda w: jnp.full_like(w, start, _choose_dtype(w)), params),
            linears=jax.tree.map(lambda w: jnp.zeros_like(w, _choose_dtype(w)), params),
            count=count,
        )

    def raised(accumulator: jax.Array) -> jax.Array:
        if isinstance(power, float) and power == 0.5:
            return jnp.sqrt(accumulator)
        return jnp.power(accumulator, power)

    def step(rate: Any, gradient: Any, weight: Any, accumulator: Any, linear: Any) -> _Step:
        if gradient is None:
            return _Step(None, accumulator, linear)
        if jnp.shape(gradient) != jnp.shape(weight):
            raise ValueError(
                f"A gradient must have the shape of its parameter. Given a gradient {jnp.shape(gradient)} for a "
                f"parameter {jnp.shape(weight)}."
            )
        g, w, rate = (jnp.asarray(x, accumulator.dtype) for x in (gradient, weight, rate))
        # Where the rate is 0 there is no step. The formula divides by the rate, and gets 1 in its place.
        moves = rate != 0
        rate = jnp.where(moves, rate, 1.0)
        old_accumulator, old_linear, before = accumulator, linear, raised(accumulator)
        accumulator = accumulator + g * g
        after = raised(accumulator)
        # The plain difference, not g² / (after + before): its sum over all steps is the `after` below, even rounded.
        linear = linear + (g + 2 * shrinkage * w - (after - before) / rate * w)
        # `<=` is false for NaN, so NaN does not become a weight of 0. Where it is true, the denominator may be 0.
        zero = jnp.abs(linear) <= l1
        denominator = jnp.where(zero, 1.0, after / rate + 2 * (l2 + beta / (2 * rate)))
        new = jnp.where(zero, 0.0, (l1 * jnp.sign(linear) - linear) / denominator)
        update = jnp.where(moves, new - w, 0.0).astype(jnp.result_type(weight))
        return _Step(update, jnp.where(moves, accumulator, old_accumulator), jnp.where(moves, linear, old_linear))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        if params is None:
            raise ValueError(
                "ftrl computes new weights and returns how they differ from the present ones. Given params=None: call "
                "update(gradients, state, params)."
            )
        rate, count = learning_rate, state.count
        if callable(learning_rate):
            rate, count = learning_rate(count), optax.safe_increment(count)
        steps = jax.tree.map(
            functools.partial(step, rate),
            updates,
            params,
            state.accumulators,
            state.linears,
            is_leaf=lambda leaf: leaf is None,
        )

        pick = functools.partial(jax.tree.map, is_leaf=lambda leaf: isinstance(leaf, _Step))
        sums = pick(lambda made: made.accumulator, steps), pick(lambda made: made.linear, steps)
        return pick(lambda made: made.update, steps), FtrlState(*sums, count)

    return optax.GradientTransformation(init, update)


_LEGAL = {"> 0": operator.gt, ">= 0": operator.ge, "<= 0": operator.le}


def _check(name: str, value: Any, legal: str) -> Any:
    """Returns a hyperparameter as a float, after a check; a traced one, as in `optax.inject_hyperparams`, unchecked."""
    if isinstance(value, Tracer):
        return value
    if not isinstance(value, (int, float, np.generic, np.ndarray, jax.Array)) or jnp.shape(value) != ():
        raise ValueError(f"{name} must be a number. Given {brief.tell(value)}.")
    number = float(value)
    if not (math.isfinite(number) and _LEGAL[legal](number, 0)):
        raise ValueError(f"{name} must be finite and {legal}. Given {value}.")
    return number


def _choose_dtype(weight: Any) -> Any:
    """Returns the dtype of a weight's sums."""
    dtype = jnp.result_type(weight)
    return dtype if dtype == jnp.float64 else jnp.float32
