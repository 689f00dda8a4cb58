"""Floor 1: additive metric states."""

from jaxheads.metrics.base import AbstractSourceMetric as AbstractSourceMetric
from jaxheads.metrics.base import Metric as Metric
from jaxheads.metrics.base import Observation as Observation
from jaxheads.metrics.base import View as View
from jaxheads.metrics.curves import Interval as Interval
from jaxheads.metrics.curves import ScoresView as ScoresView
from jaxheads.metrics.grids import LogitGrid as LogitGrid
from jaxheads.metrics.grids import ThresholdGrid as ThresholdGrid
from jaxheads.metrics.mean import ColumnMeans as ColumnMeans
from jaxheads.metrics.mean import FunctionMetric as FunctionMetric
from jaxheads.metrics.mean import Mean as Mean
from jaxheads.metrics.mean import MeanView as MeanView
from jaxheads.metrics.mean import Total as Total
from jaxheads.metrics.scores import Scores as Scores
from jaxheads.metrics.state import BadInputWarning as BadInputWarning
from jaxheads.metrics.state import Metrics as Metrics
