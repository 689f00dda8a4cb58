"""The contract: what the author of a head writes. Read this first.

A head is a class of configuration: annotated attributes are constructor arguments. Given logits it computes loss,
predictions and metrics, as pure functions. A new head says its `logits_dimension`, its `losses` and its `outputs`, and
`observe` for metrics of its own:

>>> import jax.numpy as jnp
>>> import jaxheads as jh
>>> class QuantileHead(jh.Head):
...     quantile: float = 0.5
...     logits_dimension = 1
...     coupling = "row"
...
...     def losses(self, labels, logits):
...         return jnp.maximum(self.quantile * (labels - logits), (self.quantile - 1) * (labels - logits))
...
...     def outputs(self, logits):
...         return {"predictions": logits}
...
...     def observe(self, labels, logits):
...         return {"coverage": jh.Mean(labels <= logits)}
>>> head = QuantileHead(quantile=0.9, name="p90")
>>> head.measure(labels=jnp.array([1.0, 2.0]), logits=jnp.array([[2.0], [0.0]]))
Metrics of QuantileHead(quantile=0.9, name='p90')
  average_loss/p90  0.95
  coverage/p90      0.5

What hooks get and give:

* `labels`: `[..., size]` as the `LabelSpec(size, kind, low, high, fill)` says, float32, int32 or bool, and `fill` in
  masked rows. A dict where `label_spec` is one; None where it is `{}`, and then users pass `labels=None`.
* `logits`: float32 `[..., logits_dimension]`, 0 in masked rows; of another shape, or a dict, as `logits_spec` says.
* `rows`, for every hook that has such an argument: `rows.exists` and `rows.weights` `[..., 1]`, `rows.features`, and
  `rows.devices.all(x)` and `.sum(x)`, over the rows of all devices. A loss need not look at masks: they are applied
  after it. It must be finite, and have a finite gradient, at the fill.
* Losses are one an element, `[..., 1]` or `[..., d]`; or `Term(values, count)`, where `count` takes the place of 1 in
  every denominator.
* Observations are `Mean(values[, count])`, `ColumnMeans(values, columns)` or `Scores(labels, logits, grid)`, of one
  value an element each, unmasked and unweighted.

Masks, weights, checks, dtypes, reductions, devices and compiled updates are the engine's, once, for every head.
`jaxheads.testing.check_head(head)` tries a new one by all laws.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from jaxheads.losses.terms import Term as Term
from jaxheads.metrics import Bootstrap, MeanView, Metric, Observation, ScoresView, Slices
from jaxheads.metrics.base import AVERAGE_LOSS as AVERAGE_LOSS
from jaxheads.numerics.batch import ABSENT as ABSENT
from jaxheads.numerics.batch import Batch as Batch
from jaxheads.numerics.batch import Given as Given
from jaxheads.numerics.batch import Rows as Rows
from jaxheads.numerics.configuration import Configuration
from jaxheads.numerics.fields import learned as learned
from jaxheads.numerics.fields import running as running
from jaxheads.numerics.fields import subheads as subheads
from jaxheads.numerics.hooks import HOOKS, hook, takes
from jaxheads.numerics.labels import LabelSpec as LabelSpec
from jaxheads.numerics.labels import Specs
from jaxheads.numerics.linear import LinearLogits as LinearLogits
from jaxheads.numerics.reduction import Reduction
from jaxheads.spec import ExportOutput, PredictOutput

WeightColumn: TypeAlias = str | Callable[[Any], Any] | None


class NoClosedForm(ValueError):
    """A head whose best constant logits no formula gives."""


class Declared(abc.ABC):  # noqa: B024  # outside of type checking, logits_dimension is abstract
    """What a head says of itself: each a class attribute or a property, as the author likes.

    Attributes:
        logits_dimension: the size of the last axis of the logits; of a dict of logits the sum. The one that must be
            there.
        logits_spec: the last axes of the logits of one element: `d`; `(None, d)` for `[..., T, d]`; or a dict of these.
        label_spec: which labels are legal: a `LabelSpec`, by default floats `[..., logits_dimension]`; a dict of them
            for structured labels; `{}` for a head without labels.
        vocabulary: the names by which labels may be given; by default the field `label_vocabulary`, if there is one.
        coupling: how far the loss and the observations of a row look: `"row"`, at that row alone; `"sequence"`, along
            the axes between the first and the last; `"batch"`, at the rows of all devices. None: the engine tries the
            head once, and refuses it if its rows look at each other.
        signed: whether the loss may be negative, as one from which a constant was left out: such a head is refused
            where losses must not be (`MultiHead(weighting="uncertainty")`).
        per_logit_weights, per_logit_where: whether weights, and masks, may have the shape of the logits.
        reads_features: whether hooks read `rows.features`; by default, if one has an argument `features`.
        reads_slices: whether hooks read `rows.groups`.
        takes_linear: whether hooks take `LinearLogits`; else they are multiplied first.
        samples: whether hooks read `rows.key`: calls then need `key=`.
        higher_is_better: whether more is better, by the part of a metric's key before a slash: `{"accuracy": True}`.
            `average_loss` is better when low; of a metric that is not listed nobody knows.
        silent: of a head made of heads, those that count for nothing.
    """

    if TYPE_CHECKING:
        logits_dimension: Any
        logits_spec: Any
        label_spec: Any
        vocabulary: Any
        coupling: Any
        signed: Any
        per_logit_weights: Any
        per_logit_where: Any
        reads_features: Any
        reads_slices: Any
        takes_linear: Any
        samples: Any
        higher_is_better: Any
        silent: Any
    else:
        coupling = None
        signed = per_logit_weights = per_logit_where = reads_slices = takes_linear = samples = False
        higher_is_better, silent = MappingProxyType({}), frozenset()

        @property
        @abc.abstractmethod
        def logits_dimension(self) -> int:
            """The size of the last axis of the logits."""

        @property
        def logits_spec(self) -> Any:
            """The last axes of the logits of one element."""
            return self.logits_dimension

        @property
        def label_spec(self) -> Specs:
            """Which labels are legal."""
            return LabelSpec(self.logits_dimension)

        @property
        def vocabulary(self) -> tuple[str, ...] | None:
            """The names by which labels may be given."""
            return vars(self).get("label_vocabulary")

        @property
        def reads_features(self) -> bool:
            """Whether hooks read the numeric columns of `features`."""
            return any(takes(type(self), name, "features") for name in HOOKS)


class AbstractHead(Configuration, Declared):
    """The fields that every head has, and the hooks that an author may override. Users' methods are `Head`'s.

    Annotated attributes are constructor arguments. A class is either abstract, and named so, or never subclassed.

    Args:
        weight_column: a key of `features`, or a function `features -> weights`.
        loss_reduction: a `Reduction` or its text.
        name: suffixes the metric keys, as in `auc/NAME`.
        extra_metrics: what `with_metrics` adds.
        slices: groups of the data that get every metric too.
        bootstrap: replicas from which `metrics.compute(confidence=0.95)` makes intervals; updates then need a `key`.
    """

    weight_column: WeightColumn = dataclasses.field(default=None, kw_only=True)
    loss_reduction: Reduction | str = dataclasses.field(default=Reduction.SUM_OVER_BATCH_SIZE, kw_only=True)
    name: str | None = dataclasses.field(default=None, kw_only=True)
    extra_metrics: Sequence[Metric] = dataclasses.field(default=(), kw_only=True)
    slices: Slices | None = dataclasses.field(default=None, kw_only=True)
    bootstrap: Bootstrap | None = dataclasses.field(default=None, kw_only=True)

    # Loss.

    @hook
    @abc.abstractmethod
    def losses(self, labels: Any, logits: Any) -> Any:
        """One loss an element, `[..., 1]` or `[..., d]`, unreduced and unweighted; or a `Term`."""

    @hook
    def average_losses(self, labels: Any, logits: Any, rows: Rows) -> Any:
        """The losses whose mean is the metric `average_loss`, where they are not those that are trained on."""
        raise NotImplementedError  # the engine takes `losses`, unless this is overridden

    @hook
    def prepare(self, labels: Any, logits: Any, rows: Rows) -> Any:
        """A value that `losses` and `observe` share, made once: `rows.prepared`."""
        return None

    @hook
    def advance(self, labels: Any, logits: Any, rows: Rows) -> Mapping[str, Any]:
        """The next values of the running fields, from a batch; `rows.devices.sum(x)` adds up over devices.

        A head that holds a head passes on what that one needs: `{"inner": self.inner.advance(labels, logits, rows)}`.
        """
        return {}

    def best_constant(self, labels: Any, weights: np.ndarray) -> Any:
        """The constant logits `[logits_dimension]` at which the weighted loss is least, for `constant_logits`.

        On the host, in NumPy: `labels` float64 `[n, size]` and `weights` float64 `[n, 1]` or `[n, d]`, of the elements
        that weigh anything.
        """
        raise NoClosedForm(
            f"{type(self).__name__} has no best constant logits in closed form. Start from zeros, or fit them: "
            "minimize head.loss over one row of logits, broadcast to all."
        )

    # Predictions.

    @hook
    def outputs(self, logits: Any) -> Mapping[str, Any]:
        """Predictions by key: arrays, or functions without arguments that make them when asked for."""
        return {"logits": logits}

    def signatures(self, predictions: Mapping[str, Any]) -> Mapping[str, ExportOutput]:
        """What a server returns, from all predictions: by default they all, as `serving_default` and `predict`."""
        everything = PredictOutput(dict(predictions))
        return {"serving_default": everything, "predict": everything}

    def served(self, predictions: dict[str, Any], features: Any) -> dict[str, Any]:
        """Predictions with what of the features a server needs beside them, such as the mask of a sequence."""
        return predictions

    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes, for heads whose predictions are of classes."""
        return None

    def to_array(self, labels: Any, ids: bool) -> Any:
        """Host labels of a form of the head's own (lists of names a row) encoded; `ids`: lists of numbers too."""
        return labels

    # Metrics.

    @hook
    def observe(self, labels: Any, logits: Any) -> Mapping[str, Observation]:
        """What the metrics accumulate beside `average_loss`, by a static key."""
        return {}

    @hook
    def sources(self, labels: Any, logits: Any) -> Mapping[str, Callable[[], Observation]]:
        """What metrics of `with_metrics` may read, by name, as functions that make it: nothing unread is computed."""
        return {}

    def summarize(self, seen: Mapping[str, Any]) -> Mapping[str, Any]:
        """Metrics by name from what was observed.

        By default each mean under its own key, and of a score histogram the areas, `KEY/auc` and
        `KEY/auc_precision_recall`.
        """
        out: dict[str, Any] = {}
        for key, view in seen.items():
            if isinstance(view, MeanView) and key != AVERAGE_LOSS:
                out[key] = view.mean
            elif isinstance(view, ScoresView):
                out |= {f"{key}/auc": view.roc_auc(), f"{key}/auc_precision_recall": view.pr_auc()}
        return out

    def read_loss(self, seen: Mapping[str, Any], divisor: Any) -> Any:
        """The training loss of all data seen, `loss/NAME` in a `MultiHead`; `divisor` is what it is divided by."""
        mean = seen[AVERAGE_LOSS]
        if self.loss_reduction is not Reduction.SUM:
            return mean.ratio(mean.total, divisor)
        return mean.xp.where(divisor > 0, mean.total, mean.xp.full_like(mean.total, mean.undefined))

    # A head made of heads overrides these four, and says no more of what its heads are given and give.

    def parts(self) -> Mapping[str, Any]:
        """The heads inside by name. What they take and give is a dict by these names, but for one named ""."""
        return {}

    def route(self, given: Given) -> Mapping[str, Given]:
        """What each head inside is given of a call."""
        return {}

    def prepared(self, batch: Batch) -> Batch:
        """What is done to a batch in compiled code, before the heads inside see it."""
        return batch

    def combine(self, losses: Mapping[str, Any], shares: Mapping[str, Any]) -> Any:
        """One loss from those of the heads inside; `shares` say which part of its whole batch each has seen."""
        return sum(losses.values())
