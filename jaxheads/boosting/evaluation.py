"""A head's metrics in a booster's own log."""

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxheads.boosting.attaching import Dataset
from jaxheads.boosting.datasets import Rows, RowsCache, check_boosted
from jaxheads.engine.evaluating import measure
from jaxheads.engine.gathering import at
from jaxheads.engine.readiness import ready
from jaxheads.engine.reading import directions
from jaxheads.head import Head
from jaxheads.heads import BinaryClassHead, LogisticRegressionHead, MultiClassHead, MultiLabelHead
from jaxheads.metrics import Metrics
from jaxheads.metrics.base import join_names
from jaxheads.metrics.curves import Interval
from jaxheads.metrics.state import read_nothing
from jaxheads.numerics import brief, pairs
from jaxheads.numerics.kept import twin_of

CHUNK = 65_536
FIRST = 20


def measure_rows(head: Head, params: Any, rows: Rows, logits: np.ndarray) -> Metrics:
    """Measures all rows in chunks, which are added on the host in float64."""
    states, bound = [], ready(head, params)
    for start in range(0, max(len(logits), 1), CHUNK):
        batch = at(bound, rows.cut(start, start + CHUNK).batch, logits[start : start + CHUNK])
        states.append(Metrics(measure(head, bound, batch, None, None), twin_of(head)))
    return Metrics.merge(states)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A head's metrics, in the two forms in which boosters ask for them. Pickles if the head does.

    Made by `xgboost_metric` and `lightgbm_metric`.

    Attributes:
        head: unbound.
        params: the values of its learned and running fields, or None.
        keys: the names of the metrics, in the order of the log.
        library: `"xgboost"` or `"lightgbm"`.
    """

    head: Head
    params: Any
    keys: tuple[str, ...]
    library: str
    _cache: RowsCache = dataclasses.field(default_factory=RowsCache, repr=False, compare=False)

    @property
    def __name__(self) -> str:
        """The name in the log of XGBoost's scikit-learn estimators."""
        key, *others = self.keys
        return type(self.head).__name__ if others else name_in_log([key])[key]

    def __call__(self, predicted: Any, dataset: Any, sample_weight: Any = None) -> Any:
        """`(margins, DMatrix or Dataset)`; or `(labels, margins[, sample_weight])`, as scikit-learn's wrappers call."""
        rows, logits = self._cache.read(self.head, predicted, dataset, sample_weight)
        _check_margins(self.head, logits)
        values = self._measure(rows, logits)
        if self.library == "lightgbm" or isinstance(dataset, Dataset):
            return self.entries(values)
        key, *others = self.keys
        if others:
            raise ValueError(
                "XGBoost's scikit-learn estimators log one number of a metric. Given the keys "
                f"{list(self.keys)}: pass one, xgboost_metric(head, keys={key!r})."
            )
        return values[key]

    def values(self, predicted: Any, dataset: Any) -> dict[str, float]:
        """Returns the metrics by key. `predicted` is known to be margins, `dataset` is a DMatrix or Dataset."""
        return self._measure(*self._cache.read(self.head, predicted, dataset, None))

    def _measure(self, rows: Rows, logits: np.ndarray) -> dict[str, float]:
        found = measure_rows(self.head, self.params, rows, logits)
        # The margins of the first rounds always lie close together: that bins are too coarse says nothing yet.
        late = self._cache.count_call() > FIRST
        values = (_add_workers(found) if self.library == "xgboost" else found).compute(warn=late)
        return {key: float(values[key]) for key in self.keys}

    def entries(self, values: Mapping[str, float]) -> list[tuple[Any, ...]]:
        """Returns metrics in the form of the library's log."""
        if self.library == "xgboost":
            names = name_in_log(values)
            return [(names[key], value) for key, value in values.items()]
        return [(key, value, bool(directions(self.head)[key])) for key, value in values.items()]


def _add_workers(metrics: Metrics) -> Metrics:
    """Adds the metrics of all workers of XGBoost's collective, in float64."""
    from xgboost import collective

    if collective.get_world_size() == 1:
        return metrics
    sums = np.asarray(metrics.state, np.float64).sum(-1)
    total = collective.allreduce(sums, collective.Op.SUM)
    return dataclasses.replace(metrics, state=pairs.merge([total[..., None]]))


def name_in_log(keys: Iterable[str]) -> dict[str, str]:
    """Returns the metrics' names in XGBoost's log. The log is printed, and parsed again at spaces and colons.

    A name that another metric has gets a `_` more.
    """
    names = {key: re.sub(r"[\s:]+", "_", key) for key in keys}
    taken = {key for key, name in names.items() if key == name}
    for key, name in names.items():
        if key != name:
            while name in taken:
                name += "_"
            taken.add(name)
            names[key] = name
    return names


def _check_margins(head: Head, logits: np.ndarray) -> None:
    """Refuses rows that must be probabilities of a softmax; warns of rows that look like those of a sigmoid."""
    kinds = (MultiClassHead, BinaryClassHead, LogisticRegressionHead, MultiLabelHead)
    if not isinstance(head, kinds) or not len(logits) or logits.min() < 0 or np.ptp(logits) <= 1e-3:
        return
    train = "Train with jh.boosting.xgboost_objective(head) (or lightgbm_objective), not with a built-in objective"
    if isinstance(head, MultiClassHead):
        # No rows of margins add up to 1.
        if np.allclose(logits.sum(-1), 1, atol=1e-4):
            raise ValueError(
                "The booster handed probabilities to the metric, where a head takes margins. Given rows that are not "
                f"negative and add up to 1. {train}."
            )
    elif logits.max() <= 1:
        # Margins of first rounds may lie there as well.
        warnings.warn(
            f"All predictions that the booster handed to the metrics of {type(head).__name__} are in [0, 1]. If they "
            f"are probabilities, the metrics are wrong: a head takes margins. {train}. If they are margins, ignore "
            "this.",
            stacklevel=4,
        )


def xgboost_metric(head: Head, keys: str | Sequence[str] | None = None, *, params: Any = None) -> Evaluation:
    """A head's metrics as the `custom_metric` of `xgboost.train`: a list of (name, value), all of them from one pass.

    Sums are kept in float64. Under XGBoost's collective (Dask, Spark) they are added over workers before they are read,
    so an AUC covers all rows. As the `eval_metric` of a scikit-learn estimator, give it one key. Train with an
    objective of `jh.boosting`: beside a built-in objective XGBoost hands over probabilities. These cannot always be
    told from margins (a warning says so if all are in [0, 1]).

    XGBoost stops early by the last of the metrics (for a `MultiHead` this is the loss of its first head alone: name
    another), in a log of six decimals. It takes a metric to be better when low, unless its name begins with `auc`,
    `pre` or `map`. For another one (`accuracy`) pass
    `xgboost.callback.EarlyStopping(rounds=10, metric_name="accuracy", maximize=True)`. `BoostedHead` knows directions,
    and all decimals.

    Args:
        head: any head with one row of logits an example, and without a `weight_column`, slices or bootstrap.
        keys: names of its metrics; by default all that are numbers, the loss last. In the log a `_` stands for
            spaces and colons.
        params: values of its learned and running fields.

    Raises:
        ValueError: an unknown name; a head that needs more than a dataset holds. When called: labels that the head
            refuses; margins of another size; rows that are probabilities.

    `xgboost_objective` has an example.
    """
    return _make_evaluation(head, keys, params, "xgboost")


def lightgbm_metric(head: Head, keys: str | Sequence[str] | None = None, *, params: Any = None) -> Evaluation:
    """A head's metrics as the `feval` of `lightgbm.train`: a list of (name, value, whether higher is better).

    As `xgboost_metric`. Losses and errors are better when low, rates and areas when high. LightGBM stops early by any
    of the metrics unless `lightgbm.early_stopping(..., first_metric_only=True)`. So by default only metrics that have a
    direction are there. A metric without one (`label/mean`) is given to LightGBM as better when low. On several
    machines, LightGBM measures the rows of each machine apart.

    >>> import numpy as np
    >>> import jaxheads as jh
    >>> metric = jh.boosting.lightgbm_metric(jh.RegressionHead(), keys=("average_loss", "label/mean"))
    >>> metric(np.array([1.0, 2.0]), np.array([1.0, 4.0]), np.array([1.0, 3.0]))  # as LGBMRegressor calls it
    [('average_loss', 3.0, False), ('label/mean', 1.75, False)]
    """
    return _make_evaluation(head, keys, params, "lightgbm")


def _make_evaluation(head: Head, keys: str | Sequence[str] | None, params: Any, library: str) -> Evaluation:
    check_boosted(head, params, metrics=True)
    names = list_numbers(head)
    if keys is None:
        have_one = tuple(name for name in names if directions(head)[name] is not None)
        by_default = (*names[1:], *names[:1]) if library == "xgboost" else have_one
        return Evaluation(head, params, by_default, library)
    if (chosen := brief.as_names(keys)) is None:
        raise ValueError(f"keys must be names of metrics. Given {brief.tell(keys)}. There are {list(names)}.")
    if unknown := [key for key in chosen if key not in names]:
        raise ValueError(f"Unknown metrics {unknown} of {type(head).__name__}. Those that are numbers: {list(names)}.")
    if not chosen:
        raise ValueError(f"keys must name at least one metric. Given {keys!r}. There are {list(names)}.")
    return Evaluation(head, params, chosen, library)


def list_numbers(head: Head) -> tuple[str, ...]:
    """Returns the names of the metrics that are single numbers."""

    def read(views: Any) -> tuple[str, ...]:
        values = {join_names(*key): x.value if isinstance(x, Interval) else x for key, x in head.read(views).items()}
        return tuple(name for name, value in values.items() if np.ndim(value) == 0)

    return read_nothing(head, read)
