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
        rounds: for how many it may fail to improve.
    """

    key: str
    higher: bool
    rounds: int


@dataclasses.dataclass
class Log:
    """A metric for a booster that keeps what it told it: XGBoost's own log has six decimals, which small losses lose.

    Attributes:
        metric: of a head, as the booster takes it.
        datasets: the booster's, in order; the last one decides.
        monitor: what to stop by, if at all.
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
        """Those of the datasets."""
        return [f"validation_{i}" for i in range(len(self.datasets))]

    def __call__(self, predicted: Any, dataset: Any) -> list[tuple[Any, ...]]:
        """As the metric, kept."""
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

    def over_since(self) -> int | None:
        """The best round, if the monitored metric has not improved for its number of rounds since; else None."""
        best = self.best
        if self.monitor is None or best is None:
            return None
        scores = self.values[self.names[-1]][self.monitor.key]
        if math.isnan(scores[-1]):
            raise ValueError(
                f"early_stopping_rounds needs a number in every round. The monitored {self.monitor.key!r} of the last "
                f"of eval_set is undefined in round {len(scores) - 1}: look at its rows (both classes? weights above "
                "0?), or choose another monitor."
            )
        return best if len(scores) - 1 - best >= self.monitor.rounds else None
