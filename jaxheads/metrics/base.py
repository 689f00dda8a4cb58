"""The observations of a head, and the views that read them back: the two ends of a metric state.

An observation is declared per element. The head's base class reduces it, so that masks, weights, devices, and later
slices and bootstrap replicas, are written once. Each observation becomes one stretch of the head's packed state.
"""

import abc
import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads.numerics import fields

# The values that a head keeps beside its observations: the mean of its losses; the divisor of its loss, inside a
# `MultiHead`; the number of elements that weigh anything, with slices.
AVERAGE_LOSS, DIVISOR, COUNT = KEPT = ("average_loss", "divisor", "slice_count")
# The loss of all data that a head in a `MultiHead` has seen.
LOSS = "loss"
# The columns of `by_slice` beside the metrics, and the metric of a regularized loss.
SLICE, SLICE_SIZE, REGULARIZATION_LOSS = RESERVED = ("slice", "count", "regularization_loss")

# The sources that heads of the library have: the score histogram, the confusion matrix, the rank of the label, and the
# moments of labels and predictions. A head observes its own histogram under the same key.
SCORES, CONFUSION, RANKS, MOMENTS = "scores", "confusion", "ranks", "moments"
# The part of a confusion matrix for metrics that need three sums a class, and not all pairs of classes.
COUNTS = "class_counts"


def join_names(*parts: str | None) -> str:
    """Joins a key and the names that exist to the full name of a metric or a summary, such as `auc/sun/HEAD`."""
    return "/".join(part for part in parts if part)


def is_part_of(key: str, whole: str) -> bool:
    """Tells whether a key names a metric, or the part of it that `join_names` names for one class or threshold."""
    return key == whole or key.startswith(f"{whole}/")


def at_threshold(key: str, threshold: float) -> str:
    """Returns the key of a metric of decisions at a threshold of the user's."""
    return f"{key}/positive_threshold_{threshold:g}"


def calibration_key(bins: int, whole: bool = False) -> str:
    """Returns the key of the observation for the calibration in so many bins; `whole`: of the predicted class."""
    return f"calibration/{bins}{WHOLE if whole else ''}"


# The end of the key of an observation with one value a row, where classes exclude each other, and not one an entry.
WHOLE = "/classes"

# The place of an observation in a state: the names of the heads around its own, then its key.
Path: TypeAlias = tuple[str, ...]


class Observation(abc.ABC):
    """Per-element values of one batch that reduce to `size` sums."""

    # Whether `reduce` does nothing but add: then it reduces all groups at once.
    only_sums: ClassVar[bool] = False
    # The key of an observation that tells all that this one does: beside it, this one is not kept.
    told_by: ClassVar[str | None] = None

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """The number of sums that it takes."""

    def check(self, what: str, lead: tuple[int, ...]) -> None:
        """Refuses arrays that are not `lead + [k]`: one of shape `[N]` would broadcast to `[N, N]`."""
        for x in jax.tree.leaves(self):
            if jnp.ndim(x) != len(lead) + 1 or jnp.shape(x)[:-1] != lead:
                raise ValueError(
                    f"{what} must hold one value for each element, {(*lead, 1)} or {(*lead, 'd')}. Given "
                    f"{type(self).__name__} of shape {jnp.shape(x)}. Use keepdims=True, or x[..., None]; masks and "
                    "weights are applied afterwards."
                )

    def join(self, other: "Observation") -> "Observation":
        """Returns one observation that serves the readers of both. Refuses two that cannot be one."""
        if jax.tree.structure(self) != jax.tree.structure(other):
            raise ValueError(f"Two metrics observe different things under one key: {self} and {other}. Rename one.")
        return self

    @abc.abstractmethod
    def reduce(self, weights: jax.Array) -> jax.Array:
        """Returns the sums `[size]` of this batch under weights `[..., 1]` or `[..., d]`."""

    def reduce_by(self, weights: jax.Array, groups: Any) -> jax.Array:
        """Returns `reduce` for each group, `[groups.n, size]`: one after the other, unless a better way is known."""
        over = groups.at_once if self.only_sums else groups.each
        return over(lambda inside: self.reduce(weights * inside))

    @property
    def is_late(self) -> bool:
        """Whether it is reduced for all rows at once, not tile by tile: a large state made of small arrays."""
        return False

    @abc.abstractmethod
    def read(self, sums: Any, xp: Any, undefined: float) -> Any:
        """Returns a view of accumulated sums `[..., size]`.

        Args:
            sums: float64 NumPy outside `jit`, float32 JAX inside.
            xp: `numpy` or `jax.numpy`, whichever `sums` belongs to.
            undefined: the value of a metric whose denominator is zero.
        """


@dataclasses.dataclass(frozen=True)
class View:
    """Accumulated sums with the array module they belong to."""

    xp: Any
    undefined: float

    def ratio(self, numerator: Any, denominator: Any) -> Any:
        """Returns `numerator / denominator`; `undefined` where the denominator is 0; NaN stays NaN."""
        xp = self.xp
        zero = denominator == 0
        safe = xp.where(zero, xp.ones_like(denominator), denominator)
        return xp.where(zero, xp.full_like(numerator / safe, self.undefined), numerator / safe)

    def with_undefined(self, undefined: float) -> Self:
        """Returns the same view with another value for 0/0. It keeps the sums that it has added up already."""
        other = copy.copy(self)
        object.__setattr__(other, "undefined", undefined)
        return other

    def zeroed(self) -> Self:
        """Returns the same view, whose 0/0 is 0: absent data add nothing."""
        return self.with_undefined(0.0)

    def average(self, values: Any, defined: Any, weights: Any = None) -> Any:
        """Returns the mean over the last axis (classes, targets). An entry without a value counts as `undefined`.

        If `undefined` is NaN, the mean is over the entries that have a value.
        """
        if np.isnan(self.undefined):
            return self.mean_over(values, defined, weights)
        every = self.xp.where(defined, values, self.xp.full_like(values, self.undefined))
        return self.mean_over(every, self.xp.ones_like(every, dtype=bool), weights)

    def mean_over(self, values: Any, defined: Any, weights: Any = None) -> Any:
        """Returns the mean over the last axis (classes, targets), of the entries that have a value.

        An absent class was not measured: it neither lifts the mean nor lowers it.
        """
        xp = self.xp
        each = xp.where(defined, xp.ones_like(values) if weights is None else weights, xp.zeros_like(values))
        return self.ratio((xp.where(defined, values, xp.zeros_like(values)) * each).sum(-1), each.sum(-1))


class Metric(abc.ABC):
    """A metric that a head keeps beside its own, by `head.with_metrics(metric)`; a frozen dataclass, equal by value.

    Subclass it to write one: `observe` returns the observations, and `summarize` reads their sums. If several metrics
    observe under one key, it is accumulated once. To read a source that the head has already (its score histogram, its
    confusion matrix), subclass `AbstractSourceMetric`. Names of classes come with the observation that a head makes,
    and so with its view.
    """

    # True for an accuracy, False for an error; None where neither is better, as for a mean of labels.
    higher_is_better: Any = None
    # The unit that it counts: "element", or "sequence", all elements of one entry of the first axis.
    unit: Any = "element"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # In the class itself: where there is none, `dataclass` would write one.
        if cls.__module__.startswith(f"{__package__}.") and "__repr__" not in vars(cls):
            cls.__repr__ = Metric.__repr__

    def __repr__(self) -> str:
        """Shows the metric as it is written: with the arguments that differ from their defaults."""
        values = fields.values_of(self) if dataclasses.is_dataclass(self) else {}
        defaults = {field.name: field.default for field in fields.of_kind(type(self))} if values else {}
        arguments = ", ".join(f"{name}={value!r}" for name, value in values.items() if value != defaults[name])
        return f"jh.metrics.{type(self).__name__}({arguments})"

    @abc.abstractmethod
    def observe(
        self, labels: Any, logits: jax.Array, sources: Mapping[str, Callable[[], Observation]]
    ) -> Mapping[str, Observation]:
        """Returns the observations to add up, by a static key; `sources` are the head's own, made when called.

        It may have a further argument `rows`, as the hooks of heads may.
        """

    @abc.abstractmethod
    def summarize(self, seen: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the values by name, from views of all observations; an `Interval` where bins leave one."""

    def direction(self, key: str) -> bool | None:
        """Returns `higher_is_better` of one of the keys that this metric gives, where they differ."""
        return self.higher_is_better


class AbstractSourceMetric(Metric):
    """A metric that reads one of its head's sources."""

    if TYPE_CHECKING:
        # A class attribute or a property, as the author likes; a type checker would insist on one of them.
        source: ClassVar[Any]
    else:

        @property
        @abc.abstractmethod
        def source(self) -> str:
            """The source: `"scores"`, `"confusion"`, `"ranks"`, `"moments"`. A head's docstring lists those it has."""

    def refine(self, observation: Any) -> Observation:
        """Returns the observation with all that this metric needs: an exact threshold, a histogram for each class."""
        return observation

    @abc.abstractmethod
    def values(self, view: Any) -> Mapping[str, Any]:
        """Returns the values by name, from a view of the source."""

    def observe(
        self, labels: Any, logits: jax.Array, sources: Mapping[str, Callable[[], Observation]]
    ) -> Mapping[str, Observation]:
        return {self.source: self.refine(self.made(sources))}

    def made(self, sources: Mapping[str, Callable[[], Observation]]) -> Any:
        """Returns the head's observation, or raises an error that names the sources of the head."""
        if self.source not in sources:
            raise ValueError(
                f"{self!r} reads {self.source!r}, which this head does not have. Given a head with "
                f"{sorted(sources) or 'no sources'}. Choose a metric that reads one of those, or write a "
                "jh.metrics.Metric of your own."
            )
        return sources[self.source]()

    def summarize(self, seen: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.values(seen[self.source])
