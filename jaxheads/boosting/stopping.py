"""The log of a booster in training, with all decimals, and when to stop by it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxheads.boosting.evaluation import Evaluation


class Monitor(NamedTuple):
    """The metric to stop by.

    Attributes:
        key: its name.
        higher: whether it is better when high.
        rounds: for how many rounds it may fail to improve.
    """

    key: str
    higher: bool
    rounds: int


@dataclasses.dataclass
class Log:
    """A metric for a booster that keeps its values. XGBoost's own log has six decimals, too few for small losses.

    Attributes:
        metric: of a head, as the booster takes it.
        datasets: the booster's, in order; the last one decides.
        monitor: the metric to stop by, or None.
        values: by dataset and metric, one value a round.
    """

    metric: Evaluation
    datasets: Sequence[Any]
    monitor: Monitor | None
    values: dict[str, dict[str, list[float]]] = dataclasses.field(init=False)

    def __post_init__(self):
        self.values = {name: {key: [] for key in self.metric.keys} for name in self.names}

    @property
    def names(self) -> list[str]:
        """The names of the datasets."""
        return [f"validation_{i}" for i in range(len(self.datasets))]

    def __call__(self, predicted: Any, dataset: Any) -> list[tuple[Any, ...]]:
        """Measures as the metric does, and keeps the values."""
        found = self.metric.values(predicted, dataset)
        name = next(name for name, known in zip(self.names, self.datasets, strict=True) if known is dataset)
        for key, value in found.items():
            self.values[name][key].append(value)
        return self.metric.entries(found)

    @property
    def best(self) -> int | None:
        """The best round so far, from 0; None where nothing is monitored."""
        if self.monitor is None:
            return None
        pick: Callable[[Any], Any] = np.argmax if self.monitor.higher else np.argmin
        return int(pick(self.values[self.names[-1]][self.monitor.key]))

    def find_stop(self) -> int | None:
        """Returns the best round if the monitored metric has failed to improve for its number of rounds; else None."""
        if self.monitor is None or (best := self.best) is None:
            return None
        scores = self.values[self.names[-1]][self.monitor.key]
        if math.isnan(scores[-1]):
            raise ValueError(
                f"early_stopping_rounds needs a number in every round. The monitored {self.monitor.key!r} of the last "
                f"of eval_set is undefined in round {len(scores) - 1}: look at its rows (both classes? weights above "
                "0?), or choose another monitor."
            )
        return best if len(scores) - 1 - best >= self.monitor.rounds else None
