"""Metrics of regression: errors, and how much of the labels is explained.

They read the moments of labels and predictions, after the inverse link. For several targets a metric is the mean over
targets, or, with `multioutput="raw_values"`, one value a target, each under its own key, `KEY/target0`.

>>> import jaxheads as jh
>>> head = jh.RegressionHead().with_metrics(jh.metrics.RootMeanSquaredError(), jh.metrics.R2Score())
>>> values = head.measure(labels=[3.0, -0.5, 2.0, 7.0], logits=[[2.5], [0.0], [2.0], [8.0]]).compute()
>>> print(f"{values['root_mean_squared_error']:.4f} {values['r2_score']:.4f}")
0.6124 0.9486
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from jaxheads.metrics.base import MOMENTS, AbstractSourceMetric
from jaxheads.metrics.moments import Moments, MomentsView
from jaxheads.numerics import brief

OUTPUTS = ("uniform_average", "raw_values")


@dataclasses.dataclass(frozen=True)
class AbstractMomentMetric(AbstractSourceMetric):
    """A metric of labels and predictions of each target.

    Args:
        multioutput: for several targets, `"uniform_average"`: the mean over those for which the metric is defined; or
            `"raw_values"`: the value of each, as `KEY/target0`, `KEY/target1`, ...
    """

    multioutput: Literal["uniform_average", "raw_values"] = "uniform_average"

    source = MOMENTS
    key: ClassVar[str]

    def __post_init__(self):
        if not brief.is_one_of(self.multioutput, OUTPUTS):
            raise ValueError(
                f"{type(self).__name__}: multioutput must be one of {OUTPUTS}. Given {self.multioutput!r}."
            )

    @abc.abstractmethod
    def read(self, view: MomentsView) -> Any:
        """Returns the value of each target, `[..., d]`."""

    def values(self, view: MomentsView) -> dict[str, Any]:
        return self._name_values(view, self.read(view), view.weight > 0)

    def _name_values(self, view: MomentsView, each: Any, defined: Any) -> dict[str, Any]:
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
