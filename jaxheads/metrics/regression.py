"""Metrics of regression: errors, and how much of the labels is explained.

They read labels and predictions after the inverse link, in the units of the labels. For several targets a metric is the
mean over targets, or, with `multioutput="raw_values"`, one value a target, each under its own key, `KEY/target0`.

>>> import jaxheads as jh
>>> head = jh.RegressionHead().with_metrics(jh.metrics.RootMeanSquaredError(), jh.metrics.R2Score())
>>> values = head.measure(labels=[3.0, -0.5, 2.0, 7.0], logits=[[2.5], [0.0], [2.0], [8.0]]).compute()
>>> print(f"{values['root_mean_squared_error']:.4f} {values['r2_score']:.4f}")
0.6124 0.9486
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.metrics.base import MOMENTS, AbstractSourceMetric, Observation, View
from jaxheads.metrics.mean import MeanView, Sums, SumsView
from jaxheads.metrics.moments import Moments, MomentsView
from jaxheads.metrics.scored import check_positive
from jaxheads.numerics import brief, inputs, masking, stable

OUTPUTS = ("uniform_average", "raw_values")
Outputs: TypeAlias = Literal["uniform_average", "raw_values"]


@dataclasses.dataclass(frozen=True)
class AbstractMomentMetric(AbstractSourceMetric):
    """A metric of labels and predictions of each target.

    Args:
        multioutput: for several targets, `"uniform_average"`: the mean over those for which the metric is defined; or
            `"raw_values"`: the value of each, as `KEY/target0`, `KEY/target1`, ...
    """

    multioutput: Outputs = "uniform_average"

    source = MOMENTS
    key: ClassVar[str]

    def __post_init__(self):
        if not brief.is_one_of(self.multioutput, OUTPUTS):
            raise ValueError(
                f"{type(self).__name__}: multioutput must be one of {OUTPUTS}. Given {self.multioutput!r}."
            )

    @abc.abstractmethod
    def read(self, view: Any) -> Any:
        """Returns the value of each target, `[..., d]`."""

    def values(self, view: Any) -> dict[str, Any]:
        return self._name_values(view, self.read(view), view.weight > 0)

    def _name_values(self, view: View, each: Any, defined: Any) -> dict[str, Any]:
        if self.multioutput == "raw_values":
            return {f"{self.key}/target{i}": each[..., i] for i in range(each.shape[-1])}
        return {self.key: view.average(each, defined)}


@dataclasses.dataclass(frozen=True)
class MeanSquaredError(AbstractMomentMetric):
    """`mean_squared_error = sum(a (y - p)^2) / sum(a)`. Source: `sklearn.metrics.mean_squared_error`."""

    key = "mean_squared_error"
    higher_is_better = False

    def read(self, view: MomentsView) -> Any:
        return view.mean(view.error_square)


@dataclasses.dataclass(frozen=True)
class RootMeanSquaredError(AbstractMomentMetric):
    """`root_mean_squared_error`, the root of the mean over all data seen (and not a mean of roots).

    For several targets it is the mean of their roots. Source: `sklearn.metrics.root_mean_squared_error`.
    """

    key = "root_mean_squared_error"
    higher_is_better = False

    def read(self, view: MomentsView) -> Any:
        root = view.xp.sqrt
        return view.ratio(root(view.error_square), root(view.weight))


@dataclasses.dataclass(frozen=True)
class MeanAbsoluteError(AbstractMomentMetric):
    """`mean_absolute_error = sum(a |y - p|) / sum(a)`. Source: `sklearn.metrics.mean_absolute_error`."""

    key = "mean_absolute_error"
    higher_is_better = False

    def read(self, view: MomentsView) -> Any:
        return view.mean(view.error_size)


@dataclasses.dataclass(frozen=True)
class AbstractErrorMetric(AbstractMomentMetric):
    """A mean of errors that moments do not tell. It keeps two sums for each target.

    Args:
        multioutput: as for all metrics of regression.
    """

    # The name of the errors, for metrics that share their sums; by default the key.
    errors: ClassVar[str | None] = None

    @abc.abstractmethod
    def measure(self, labels: jax.Array, predictions: jax.Array) -> jax.Array:
        """Returns the error of each element, `[..., d]`."""

    @property
    def _path(self) -> str:
        return f"{MOMENTS}/{self.errors or self.key}"

    def observe(
        self, labels: Any, logits: jax.Array, sources: Mapping[str, Callable[[], Observation]]
    ) -> dict[str, Observation]:
        moments = self.made(sources)
        errors = self.measure(*(jnp.asarray(x, jnp.float32) for x in (moments.labels, moments.predictions)))
        return {self._path: Sums((errors, masking.ones_like(errors)))}

    def summarize(self, seen: Mapping[str, Any]) -> Mapping[str, Any]:
        view: SumsView = seen[self._path]
        return self.values(MeanView(view.xp, view.undefined, *view.sums))

    def read(self, view: MeanView) -> Any:
        return view.mean


@dataclasses.dataclass(frozen=True)
class MeanSquaredLogError(AbstractErrorMetric):
    """`mean_squared_log_error = sum(a (ln(1 + y) - ln(1 + p))^2) / sum(a)`, for counts, prices and other sizes.

    It is NaN if a label or a prediction lies below -1, and infinite at -1. (scikit-learn refuses both; Keras takes 0
    for negative numbers.)

    Source: `sklearn.metrics.mean_squared_log_error`.
    """

    key = "mean_squared_log_error"
    errors = "squared_log_error"
    higher_is_better = False

    def measure(self, labels: jax.Array, predictions: jax.Array) -> jax.Array:
        return jnp.square(jnp.log1p(labels) - jnp.log1p(predictions))


@dataclasses.dataclass(frozen=True)
class RootMeanSquaredLogError(MeanSquaredLogError):
    """`root_mean_squared_log_error`, the root of `MeanSquaredLogError` over all data seen.

    For several targets it is the mean of their roots. Source: `sklearn.metrics.root_mean_squared_log_error`.
    """

    key = "root_mean_squared_log_error"

    def read(self, view: MeanView) -> Any:
        root = view.xp.sqrt
        return view.ratio(root(view.total), root(view.weight))


@dataclasses.dataclass(frozen=True)
class MeanAbsolutePercentageError(AbstractErrorMetric):
    """`mean_absolute_percentage_error = sum(a |y - p| / max(|y|, epsilon)) / sum(a)`, as a share: 0.1 is 10 percent.

    epsilon is 2^-52, as in scikit-learn, so one label of 0 with another prediction makes the mean very large. Keras
    gives percent, with an epsilon of 1e-7. Choose `WithinTolerance(0.1, relative=True)` if labels may be 0.

    Source: `sklearn.metrics.mean_absolute_percentage_error`.
    """

    key = "mean_absolute_percentage_error"
    higher_is_better = False

    def measure(self, labels: jax.Array, predictions: jax.Array) -> jax.Array:
        return jnp.abs(labels - predictions) / jnp.maximum(jnp.abs(labels), np.float32(2.0**-52))


@dataclasses.dataclass(frozen=True)
class HuberError(AbstractErrorMetric):
    """`huber_error`, the mean of `e^2 / 2` where `|e| = |y - p|` is at most delta, else of `delta (|e| - delta / 2)`.

    Few large errors do not rule it, as they rule a mean square. `delta` is in the units of the labels, and in the key
    if it is not 1: `huber_error_5`.

    Source: `scipy.special.huber`.
    """

    delta: float = 1.0
    multioutput: Outputs = dataclasses.field(default="uniform_average", kw_only=True)

    higher_is_better = False

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "delta", self.delta)

    @property
    def key(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  # by its delta
        """The key, with the delta."""
        return "huber_error" if self.delta == 1 else f"huber_error_{self.delta:g}"

    def measure(self, labels: jax.Array, predictions: jax.Array) -> jax.Array:
        return stable.huber(labels - predictions, self.delta)


@dataclasses.dataclass(frozen=True)
class WithinTolerance(AbstractErrorMetric):
    """`within_tolerance_5`, the share of elements with `|y - p| <= 5`; with `relative`, `|y - p| <= 0.1 |y|`.

    It says how often a prediction is good enough, whatever the size of the other errors: the quantiles of the error,
    the median among them, read from the other side. The key with `relative` is `within_relative_tolerance_0.1`.

    Args:
        tolerance: the largest error that counts as good, in the units of the labels, or as a share of the label.
        relative: whether it is a share of the label.
        multioutput: as for all metrics of regression.

    Raises:
        ValueError: a tolerance that is not above 0.

    Source: the fraction of predictions within a factor, FAC2 (Chang and Hanna 2004), with any tolerance.
    """

    tolerance: float  # pyright: ignore[reportGeneralTypeIssues]  # multioutput is by keyword here
    relative: bool = False
    multioutput: Outputs = dataclasses.field(default="uniform_average", kw_only=True)

    higher_is_better = True

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "tolerance", self.tolerance)
        inputs.check_switch("relative", self.relative)

    @property
    def key(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  # by its tolerance
        """The key, with the tolerance."""
        return f"within_{'relative_' if self.relative else ''}tolerance_{self.tolerance:g}"

    def measure(self, labels: jax.Array, predictions: jax.Array) -> jax.Array:
        limit, error = np.float32(self.tolerance), jnp.abs(labels - predictions)
        within = error <= (limit * jnp.abs(labels) if self.relative else limit)
        return jnp.where(jnp.isnan(error), error, within.astype(error.dtype))


@dataclasses.dataclass(frozen=True)
class AbstractSpreadMetric(AbstractMomentMetric):
    """A metric that compares with the spread of the labels. It is exact however far from zero labels lie.

    Inside `jit`, where numbers are float32, `compute` is right to 1e-6 up to a mean of 10,000 times the spread, and to
    3e-5 up to 100,000 times; beyond a million times it may be undefined. Outside `jit` it is right at any mean.

    Labels are float32, so numbers that float32 cannot tell apart have no spread. If float64 labels lose more than a
    hundredth of it, a `RoundingWarning` tells so when they are given.

    Args:
        multioutput: as for all metrics of regression.
        shift: changes nothing. It was the number to subtract from labels far from zero. They need no help any more.
    """

    shift: float | Sequence[float] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.shift is None:
            return
        given = np.asarray(self.shift)
        if given.ndim > 1 or given.dtype.kind not in "iuf" or not np.isfinite(given.astype(np.float32)).all():
            raise ValueError(f"{type(self).__name__}: shift must be a number, or one a target. Given {self.shift!r}.")
        shift = given.astype(float).tolist()
        object.__setattr__(self, "shift", tuple(shift) if given.ndim else shift)

    def refine(self, observation: Moments) -> Moments:
        shifts, n = len(self.shift) if isinstance(self.shift, tuple) else 1, observation.n_targets
        if shifts not in (1, n):
            raise ValueError(f"{self!r} has {shifts} shifts. This head has {n} targets: give one, or one a target.")
        return dataclasses.replace(observation, spreads=True)

    def values(self, view: MomentsView) -> dict[str, Any]:
        if self.multioutput == "raw_values":
            return self._name_values(view, self.read(view), None)
        # A target without a value is left out; a target that is NaN because of the data is not.
        each, nan = self.read(view.with_undefined(np.nan)), view.xp.isnan
        return self._name_values(view, each, ~nan(each) | ~view.xp.isfinite(view.error_square))


@dataclasses.dataclass(frozen=True)
class R2Score(AbstractSpreadMetric):
    """`r2_score = 1 - sum(a (y - p)^2) / sum(a (y - mean(y))^2)`; undefined where all labels are equal.

    Source: `sklearn.metrics.r2_score(force_finite=False)`.
    """

    key = "r2_score"
    higher_is_better = True

    def read(self, view: MomentsView) -> Any:
        return view.r2()


@dataclasses.dataclass(frozen=True)
class ExplainedVariance(AbstractSpreadMetric):
    """`explained_variance = 1 - var(y - p) / var(y)`: R^2, were predictions right in the mean.

    Source: `sklearn.metrics.explained_variance_score(force_finite=False)`.
    """

    key = "explained_variance"
    higher_is_better = True

    def read(self, view: MomentsView) -> Any:
        return view.explained_variance()


@dataclasses.dataclass(frozen=True)
class PearsonCorrelation(AbstractSpreadMetric):
    """`pearson_correlation = cov(y, p) / sqrt(var(y) var(p))`; undefined where either is always the same.

    Source: `scipy.stats.pearsonr`, `keras.metrics.PearsonCorrelation`.
    """

    key = "pearson_correlation"
    higher_is_better = True

    def read(self, view: MomentsView) -> Any:
        return view.pearson()
