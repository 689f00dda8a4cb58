"""The contract: what the author of a head writes. Read this first.

A head is a class of configuration: annotated attributes are constructor arguments. From logits it computes loss,
predictions and metrics, as pure functions. A new head declares its `logits_dimension`, its `losses` and its `outputs`,
and `observe` if it has metrics of its own:

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

The arguments and the results of hooks:

* `labels`: `[..., size]`, as the head's `label_spec` says: `jh.LabelSpec(size=1, kind="float", low=None, high=None,
  fill=0)`. The kind is "float", "int" or "bool"; hooks get float32, int32 or bool. The limits are legal values. Masked
  rows get `fill`. A dict where `label_spec` is a dict; None where it is `{}`: users then pass `labels=None`.
* `logits`: float32 `[..., logits_dimension]`, 0 in masked rows. `logits_spec` may ask for another shape, or a dict.
  An exception: if the head has learned fields, masked rows of labels and logits are copies of a live row, because a
  formula with an infinite slope at the fill would send NaN to those fields. (If `coupling` is "batch", logits are 0 all
  the same; if it is "sequence", nothing is copied. Where devices may share the batch and there is no live row nearby,
  masked rows are numbers inside the limits of `label_spec`, and 0.3719 in logits.)
* `rows`: any method with `@hook` may have this argument too; the engine passes it by name. `rows.exists`, bool, and
  `rows.weights`, float32, are `[..., 1]`; a row of weight 0 exists. `rows.devices.all(x)` gathers the rows of all
  devices as `[n, d]`, with their gradient, also on one device; `rows.devices.sum(x)` adds up `x` over devices.
* Losses: one for each element, `[..., 1]` or `[..., d]`; or `jh.Term(values, count)`: the mean is then the sum of
  `weight * value` by the sum of `weight * count`, and 0 if no element counts. The engine applies an element's own mask
  and weight after the hook. At all finite logits, 0 among them, the gradient must not be NaN.
* Observations: `jh.Mean(values[, count])`, `jh.ColumnMeans(values, columns)` or `jh.Scores(labels, logits, grid)`,
  with one value for each element; its own mask and weight are applied after the hook.
* Predictions, under names of your choice: arrays whose leading axes are those of the logits.

A loss that looks at other rows must itself leave out rows that do not exist or have weight 0, and count a row of weight
2 as that row twice. This one adds up how far the similarity to rows of other classes exceeds a margin:

>>> class MarginHead(jh.Head):
...     margin: float = 1.0
...     logits_dimension = 2
...     label_spec = jh.LabelSpec(1, kind="int", low=0)
...     coupling = "batch"
...
...     def losses(self, labels, logits, rows):
...         others, classes, weights = (rows.devices.all(x) for x in (logits, labels, rows.weights))
...         beyond = jnp.maximum(logits.reshape(-1, 2) @ others.T - self.margin, 0)
...         beyond = jnp.where(labels.reshape(-1, 1) != classes.T, beyond, 0)
...         return (beyond @ weights).reshape(labels.shape)
>>> float(MarginHead().loss(labels=jnp.array([0, 1, 1]), logits=jnp.array([[1.0, 0.0], [2.5, 0.0], [0.0, 3.0]])))
1.0

The engine handles masks, weights, checks, dtypes, reductions, devices and compiled updates, once, for every head.
`jaxheads.testing.check_head(head)` tests a new head against all laws.
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
    """Raised by a head that has no formula for its best constant logits."""


class Declared(abc.ABC):  # noqa: B024  # outside of type checking, logits_dimension is abstract
    """The declarations of a head. Each is a class attribute or a property, as the author prefers.

    Attributes:
        logits_dimension: the size of the last axis of the logits; for a dict of logits, the sum of these sizes. Only
            this declaration is required.
        logits_spec: the last axes of one element's logits: `d`; `(None, d)` for `[..., T, d]`; or a dict of these.
        label_spec: which labels are legal: a `LabelSpec`, by default floats `[..., logits_dimension]`; a dict of them
            for structured labels; `{}` for a head without labels.
        vocabulary: the names that may be given as labels; by default the field `label_vocabulary`, if there is one.
        coupling: which rows the loss and the observations of a row depend on: `"row"`, that row alone; `"sequence"`,
            the rows along the axes between the first and the last; `"batch"`, the rows of all devices. Declare it.
            None: the engine tries the head once, on random rows, and refuses it if they depend on each other.
        signed: whether the loss may be negative, for example because a constant was left out. Such a head is refused
            where losses must not be negative (`MultiHead(weighting="uncertainty")`).
        per_logit_weights, per_logit_where: whether weights, or masks, may have the shape of the logits.
        reads_features: whether hooks read `rows.features`; by default, if one has an argument `features`.
        reads_slices: whether hooks read `rows.groups`.
        takes_linear: whether hooks take `LinearLogits`; if not, the engine multiplies them first.
        samples: whether hooks read `rows.key`: calls then need `key=`.
        higher_is_better: whether a higher value is better, by the part of a metric's key before a slash:
            `{"accuracy": True}`. `average_loss` is better when low; the direction of a metric not listed is unknown.
        silent: for a head made of heads, the names of the heads inside that count for nothing.
        wrapped: for a head around one other head, that head: it decides which labels and classes there are. None for
            all other heads.
    """

    coupling: Any = None
    signed: Any = False
    per_logit_weights: Any = False
    per_logit_where: Any = False
    reads_slices: Any = False
    takes_linear: Any = False
    samples: Any = False
    higher_is_better: Any = MappingProxyType({})
    silent: Any = frozenset()
    wrapped: Any = None

    if TYPE_CHECKING:
        logits_dimension: Any
        logits_spec: Any
        label_spec: Any
        vocabulary: Any
        reads_features: Any
    else:

        @property
        @abc.abstractmethod
        def logits_dimension(self) -> int:
            """The size of the last axis of the logits."""

        @property
        def logits_spec(self) -> Any:
            """The last axes of one element's logits."""
            return self.logits_dimension

        @property
        def label_spec(self) -> Specs:
            """Which labels are legal."""
            return LabelSpec(self.logits_dimension)

        @property
        def vocabulary(self) -> tuple[str, ...] | None:
            """The names that may be given as labels."""
            return vars(self).get("label_vocabulary")

        @property
        def reads_features(self) -> bool:
            """Whether hooks read the numeric columns of `features`."""
            return any(takes(type(self), name, "features") for name in HOOKS)


class AbstractHead(Configuration, Declared):
    """The fields that every head has, and the hooks that an author may override. The methods for users are in `Head`.

    Annotated attributes are constructor arguments. A class is either abstract, with a name that says so, or final.

    Args:
        weight_column: a key of `features`, or a function `features -> weights`.
        loss_reduction: a `Reduction` or its text.
        name: is appended to the metric keys, as in `auc/NAME`.
        extra_metrics: the metrics that `with_metrics` adds.
        slices: groups of the data that get every metric too.
        bootstrap: replicas for the intervals of `metrics.compute(confidence=0.95)`; updates then need a `key`.
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
        """Returns one loss for each element, `[..., 1]` or `[..., d]`, unreduced and unweighted; or a `Term`."""

    @hook
    def average_losses(self, labels: Any, logits: Any, rows: Rows) -> Any:
        """Returns the losses whose mean is the metric `average_loss`, if these differ from the training losses."""
        raise NotImplementedError  # the engine takes `losses`, unless this is overridden

    @hook
    def prepare(self, labels: Any, logits: Any, rows: Rows) -> Any:
        """Returns a value that `losses` and `observe` share. It is computed once, and read as `rows.prepared`."""
        return None

    @hook
    def advance(self, labels: Any, logits: Any, rows: Rows) -> Mapping[str, Any]:
        """Returns the next values of the running fields, after a batch; `rows.devices.sum(x)` sums over devices.

        A head that holds another head passes on its values: `{"inner": self.inner.advance(labels, logits, rows)}`.
        """
        return {}

    def best_constant(self, labels: Any, weights: np.ndarray) -> Any:
        """Returns the constant logits `[logits_dimension]` of least weighted loss, for `constant_logits`.

        It runs on the host, in NumPy: `labels` is float64 `[n, size]`, `weights` is float64 `[n, 1]` or `[n, d]`. Both
        hold only elements with a weight that is not 0.
        """
        raise NoClosedForm(
            f"{type(self).__name__} has no best constant logits in closed form. Start from zeros, or fit them: "
            "minimize head.loss over one row of logits, broadcast to all."
        )

    # Predictions.

    @hook
    def outputs(self, logits: Any) -> Mapping[str, Any]:
        """Returns predictions by key: arrays, or functions without arguments that compute them when asked for."""
        return {"logits": logits}

    def signatures(self, predictions: Mapping[str, Any]) -> Mapping[str, ExportOutput]:
        """Returns the outputs of a server. By default `serving_default` and `predict` each hold all predictions."""
        everything = PredictOutput(dict(predictions))
        return {"serving_default": everything, "predict": everything}

    def served(self, predictions: dict[str, Any], features: Any) -> dict[str, Any]:
        """Returns the predictions and the features that a server needs with them, such as the mask of a sequence."""
        return predictions

    def class_names(self) -> tuple[str, ...] | None:
        """Returns the names of the classes, for heads that predict classes."""
        return None

    def to_array(self, labels: Any, ids: bool) -> Any:
        """Encodes host labels of the head's own form (a list of names for each row); `ids`: lists of numbers too."""
        return labels

    # Metrics.

    @hook
    def observe(self, labels: Any, logits: Any) -> Mapping[str, Observation]:
        """Returns the observations that metrics accumulate beside `average_loss`, by a static key."""
        return {}

    @hook
    def sources(self, labels: Any, logits: Any) -> Mapping[str, Callable[[], Observation]]:
        """Returns functions, by name, that make observations for `with_metrics`. Unread ones are not called."""
        return {}

    def summarize(self, seen: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns metrics by name, from the accumulated observations.

        By default: each mean under its own key, and for each score histogram the areas, `KEY/auc` and
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
        """Returns the training loss of all data seen, `loss/NAME` in a `MultiHead`. Its sum is divided by `divisor`."""
        mean = seen[AVERAGE_LOSS]
        if self.loss_reduction is not Reduction.SUM:
            return mean.ratio(mean.total, divisor)
        return mean.xp.where(divisor > 0, mean.total, mean.xp.full_like(mean.total, mean.undefined))

    # A head made of heads overrides these four, and declares nothing else about the inputs and outputs of its heads.

    def parts(self) -> Mapping[str, Any]:
        """Returns the heads inside, by name. Inputs and outputs are dicts by these names, except for the name ""."""
        return {}

    def route(self, given: Given) -> Mapping[str, Given]:
        """Returns the part of a call that each head inside is given."""
        return {}

    def prepared(self, batch: Batch) -> Batch:
        """Changes a batch in compiled code, before the heads inside see it."""
        return batch

    def combine(self, losses: Mapping[str, Any], shares: Mapping[str, Any]) -> Any:
        """Combines the losses of the heads inside; `shares` say which part of its whole batch each head has seen."""
        return sum(losses.values())
