"""The common part of the metrics of scores: thresholds, averages over classes, and the names of both."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import numpy as np

from jaxheads.metrics.base import (
    CONFUSION,
    COUNTS,
    SCORES,
    AbstractSourceMetric,
    Observation,
    at_threshold,
    is_part_of,
    join_names,
)
from jaxheads.metrics.confusion import ClassCounts
from jaxheads.metrics.curves import Interval, ScoresView
from jaxheads.metrics.outcomes import Outcomes
from jaxheads.metrics.scores import Scores
from jaxheads.numerics import brief, stable

Average: TypeAlias = Literal["micro", "macro", "weighted", "samples"] | None
# All but "samples", which few metrics have: those of `jaxheads.metrics.rows`.
AVERAGES = ("micro", "macro", "weighted", None)


@dataclasses.dataclass(frozen=True)
class AbstractScoreMetric(AbstractSourceMetric):
    """A metric of scores and labels: over all entries, or of each class.

    Args:
        average: `"micro"`, all entries as examples of one class; None, each class under a key of its own, `KEY/CLASS`;
            `"macro"`, their mean, `KEY_macro`; `"weighted"`, their mean by support (the weight of their positives).
        name: the key in place of the usual one.
    """

    average: Average = dataclasses.field(default="micro", kw_only=True)
    name: str | None = dataclasses.field(default=None, kw_only=True)

    source = SCORES
    stem: ClassVar[str] = ""
    averages: ClassVar[tuple[str | None, ...]] = AVERAGES

    def __post_init__(self):
        if not brief.is_one_of(self.average, self.averages):
            raise ValueError(f"{type(self).__name__}: average must be one of {self.averages}. Given {self.average!r}.")
        if self.name is not None and (not isinstance(self.name, str) or not self.name):
            raise ValueError(f"{type(self).__name__}: name must be a string or None. Given {self.name!r}.")

    @property
    def key(self) -> str:
        """The usual key, without average and class: by default the class attribute `stem`."""
        return self.stem

    @property
    def ending(self) -> str:
        """The part of the key after the average: the threshold."""
        return ""

    @abc.abstractmethod
    def read(self, view: Any) -> Any:
        """Returns the value from a view, or several by key ending: `""` is the one that is averaged over classes."""

    def check_classes(self, scores: Any) -> Any:
        """Returns the head's scores. Refuses an average over classes where there is one class."""
        if self.average != "micro" and scores.logits.shape[-1] < 2:
            raise ValueError(
                f"{self!r} has average={self.average!r}, of each class of several; this head scores one. Pass "
                'average="micro": all there is.'
            )
        return scores

    def refine(self, observation: Any) -> Observation:
        scores: Scores = self.check_classes(observation)
        if self.average == "micro":
            return scores
        return dataclasses.replace(scores, columns=tuple(range(len(scores.class_names))))

    @property
    def _full_key(self) -> str:
        """The key without a class."""
        suffix = f"_{self.average}" if self.average in ("macro", "weighted", "samples") else ""
        return self.name or f"{self.key}{suffix}{self.ending}"

    def direction(self, key: str) -> bool | None:
        """Returns `higher_is_better` for the value, and None for the threshold at which it is reached."""
        return self.higher_is_better if is_part_of(key, self._full_key) else None

    def values(self, view: Any) -> Mapping[str, Any]:
        stem = self._full_key
        if self.average == "micro":
            return {f"{stem}{part}": value for part, value in _as_parts(self.read(view)).items()}
        each = view.by_class()
        if self.average is None:
            parts = _as_parts(self.read(each))
            return {
                join_names(f"{stem}{part}", name): _map_interval(lambda x, i=i: x[..., i], value)
                for part, value in parts.items()
                for i, name in enumerate(view.names)
            }
        value, nan = _as_parts(self.read(each.with_undefined(np.nan)))[""], each.xp.isnan
        # A NaN is a class that was not measured, or one with a NaN score. The latter is not left out.
        middle = value.value if isinstance(value, Interval) else value
        defined = ~nan(middle) | nan(each.total)
        weights = each.support if self.average == "weighted" else None
        return {stem: _map_interval(lambda x: view.average(x, defined, weights), value)}


@dataclasses.dataclass(frozen=True)
class AbstractThresholdMetric(AbstractScoreMetric):
    """A metric of yes-or-no decisions; exact at its threshold, which becomes an edge of the histogram.

    Args:
        threshold: a probability in (0, 1); scores above it are positive. By default as the head decides: above its
            `decision_threshold`, else z > 0; for one of many classes the first of the largest logits.
    """

    threshold: float | None = None

    @property
    def needs_pairs(self) -> bool:
        """Whether errors between some classes weigh more than others, so that the whole confusion matrix is needed."""
        return False

    def __post_init__(self):
        super().__post_init__()
        if self.threshold is not None:
            check_share(self, "threshold", self.threshold, below=1.0)

    @property
    def ending(self) -> str:
        return "" if self.threshold is None else at_threshold("", self.threshold)

    def refine(self, observation: Any) -> Observation:
        scores: Any = super().refine(observation)
        return scores.with_threshold(self.threshold)

    def observe(
        self, labels: Any, logits: jax.Array, sources: Mapping[str, Callable[[], Observation]]
    ) -> Mapping[str, Observation]:
        if not self._decides_by_argmax(sources):
            return super().observe(labels, logits, sources)
        table: Any = sources[CONFUSION]()
        return {CONFUSION: table} if self.needs_pairs else {COUNTS: ClassCounts.of(table)}

    def summarize(self, seen: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.threshold is not None or (COUNTS not in seen and CONFUSION not in seen):
            return super().summarize(seen)
        return self.values(seen[CONFUSION] if self.needs_pairs else ClassCounts.view(seen))

    def _decides_by_argmax(self, sources: Mapping[str, Any]) -> bool:
        """Tells whether the decision is the predicted one of many classes: so it is without a threshold."""
        return self.threshold is None and CONFUSION in sources

    def read(self, view: Any) -> Any:
        return self.decided(view.decide(self.threshold) if isinstance(view, ScoresView) else view.at_zero())

    @abc.abstractmethod
    def decided(self, outcomes: Outcomes) -> Any:
        """Returns the value from the weights of the four outcomes."""


def check_share(metric: Any, field: str, given: Any, below: float = np.inf) -> None:
    """Makes a float of a field that must be a number in (0, 1], and smaller than `below`."""
    value = _to_float(given)
    if not 0 < value <= 1 or value >= below or (value < 1 and not stable.fits_float32(value)):
        end = ")" if below == 1.0 else "]"
        raise ValueError(f"{type(metric).__name__}: {field} must be a number in (0, 1{end}. Given {given!r}.")
    object.__setattr__(metric, field, value)


def check_positive(metric: Any, field: str, given: Any) -> None:
    """Makes a float of a field that must be a positive finite number."""
    value = _to_float(given)
    if not 0 < value < np.inf:
        raise ValueError(f"{type(metric).__name__}: {field} must be a positive number. Given {given!r}.")
    object.__setattr__(metric, field, value)


def _to_float(value: Any) -> float:
    """Returns the value as a float, NaN if it is no number."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return float(value) if number else np.nan


def _as_parts(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {"": value}


def _map_interval(function: Any, value: Any) -> Any:
    return Interval(*map(function, value)) if isinstance(value, Interval) else function(value)
