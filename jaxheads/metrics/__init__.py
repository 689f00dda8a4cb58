"""Floor 1: additive metric states, and the catalogue of `head.with_metrics(...)`.

Metrics of scores (`BinaryClassHead`, `MultiLabelHead`, and every head with the source `"scores"`) share the head's one
histogram. The same rules hold for all of them:

* **The undefined.** A metric whose denominator is 0 was not measured: it is the `undefined` of `compute`, NaN by
  default. So are areas and operating points without positives, and those of ROC curves without negatives.
* **Absent classes.** `average="macro"` is the mean over the classes for which the metric is defined, `"weighted"` the
  same by their support, the weight of their positives (scikit-learn's `zero_division=nan`). With another `undefined`
  than NaN, a class without a value counts as that: `compute(undefined=0.0)` is scikit-learn's default for all
  classes of the head, `labels=range(n)`. `"micro"`, the
  default, takes all entries for examples of one class; None gives each class its `KEY/CLASS`. Means have keys of their
  own: `auc_macro`, `precision_weighted/positive_threshold_0.3`.
* **Rows of several labels.** `average="samples"`, `RecallAtK` and `PrecisionAtK` are means of one value a row; their
  rules are told in `jaxheads.metrics.rows`.
* **Ties.** Positive means a score above the threshold, not one that equals it. The user's thresholds and z = 0 are
  edges of the bins, so decisions there are exact. Elsewhere scores in one bin are taken for equal, and a pair of equal
  scores counts half. The interval `KEY/lower`, `KEY/upper` of `compute(bounds=True)` spans all orders of such scores,
  so it holds the value of the same scores without bins.

`MultiClassHead` has scores too, the log odds of each class against all others, and beside them a confusion matrix and
the rank of the label. Metrics of decisions without a threshold keep three sums a class of that matrix, for any number
of classes; only `ConfusionMatrix` and a `CohenKappa` with weights keep all pairs, for up to 4,096 classes. The
predicted class is the first of the largest logits. A row with a NaN has no prediction, is wrong, and makes scores NaN.
Heads of regression have the moments of labels and predictions, after the inverse link.
"""

import importlib as _importlib
import typing as _typing

from jaxheads.metrics.base import AbstractSourceMetric as AbstractSourceMetric
from jaxheads.metrics.base import Metric as Metric
from jaxheads.metrics.base import Observation as Observation
from jaxheads.metrics.base import View as View
from jaxheads.metrics.curves import Interval as Interval
from jaxheads.metrics.curves import ScoresView as ScoresView
from jaxheads.metrics.grids import GrowingGrid as GrowingGrid
from jaxheads.metrics.grids import LogitGrid as LogitGrid
from jaxheads.metrics.grids import ThresholdGrid as ThresholdGrid
from jaxheads.metrics.groups import Bootstrap as Bootstrap
from jaxheads.metrics.groups import Count as Count
from jaxheads.metrics.groups import Grouped as Grouped
from jaxheads.metrics.groups import Membership as Membership
from jaxheads.metrics.groups import Slices as Slices
from jaxheads.metrics.groups import reduced as reduced
from jaxheads.metrics.mean import ColumnMeans as ColumnMeans
from jaxheads.metrics.mean import FunctionMetric as FunctionMetric
from jaxheads.metrics.mean import Mean as Mean
from jaxheads.metrics.mean import MeanView as MeanView
from jaxheads.metrics.mean import Total as Total
from jaxheads.metrics.scores import Scores as Scores
from jaxheads.metrics.state import Metrics as Metrics
from jaxheads.numerics.warned import BadInputWarning as BadInputWarning
from jaxheads.numerics.warned import RoundingWarning as RoundingWarning

if _typing.TYPE_CHECKING:
    from jaxheads.metrics.areas import AveragePrecision as AveragePrecision
    from jaxheads.metrics.areas import KolmogorovSmirnov as KolmogorovSmirnov
    from jaxheads.metrics.areas import PrAuc as PrAuc
    from jaxheads.metrics.areas import RocAuc as RocAuc
    from jaxheads.metrics.calibration import BaseRate as BaseRate
    from jaxheads.metrics.calibration import BrierScore as BrierScore
    from jaxheads.metrics.calibration import ExpectedCalibrationError as ExpectedCalibrationError
    from jaxheads.metrics.calibration import LogLoss as LogLoss
    from jaxheads.metrics.classes import ConfusionMatrix as ConfusionMatrix
    from jaxheads.metrics.classes import MeanIoU as MeanIoU
    from jaxheads.metrics.classes import OneVsRestAuc as OneVsRestAuc
    from jaxheads.metrics.classes import Perplexity as Perplexity
    from jaxheads.metrics.comparing import Comparison as Comparison
    from jaxheads.metrics.confusion import ClassCounts as ClassCounts
    from jaxheads.metrics.confusion import ClassesView as ClassesView
    from jaxheads.metrics.confusion import ConfusionTable as ConfusionTable
    from jaxheads.metrics.confusion import ConfusionView as ConfusionView
    from jaxheads.metrics.moments import Moments as Moments
    from jaxheads.metrics.moments import MomentsView as MomentsView
    from jaxheads.metrics.operating import BestThreshold as BestThreshold
    from jaxheads.metrics.operating import PrecisionAtRecall as PrecisionAtRecall
    from jaxheads.metrics.operating import RecallAtPrecision as RecallAtPrecision
    from jaxheads.metrics.operating import SensitivityAtSpecificity as SensitivityAtSpecificity
    from jaxheads.metrics.operating import SpecificityAtSensitivity as SpecificityAtSensitivity
    from jaxheads.metrics.ranks import Ranks as Ranks
    from jaxheads.metrics.ranks import RanksView as RanksView
    from jaxheads.metrics.ranks import TopKAccuracy as TopKAccuracy
    from jaxheads.metrics.regression import ExplainedVariance as ExplainedVariance
    from jaxheads.metrics.regression import HuberError as HuberError
    from jaxheads.metrics.regression import MeanAbsoluteError as MeanAbsoluteError
    from jaxheads.metrics.regression import MeanAbsolutePercentageError as MeanAbsolutePercentageError
    from jaxheads.metrics.regression import MeanSquaredError as MeanSquaredError
    from jaxheads.metrics.regression import MeanSquaredLogError as MeanSquaredLogError
    from jaxheads.metrics.regression import PearsonCorrelation as PearsonCorrelation
    from jaxheads.metrics.regression import R2Score as R2Score
    from jaxheads.metrics.regression import RootMeanSquaredError as RootMeanSquaredError
    from jaxheads.metrics.regression import RootMeanSquaredLogError as RootMeanSquaredLogError
    from jaxheads.metrics.regression import WithinTolerance as WithinTolerance
    from jaxheads.metrics.rows import PrecisionAtK as PrecisionAtK
    from jaxheads.metrics.rows import RecallAtK as RecallAtK
    from jaxheads.metrics.sequences import ExactMatch as ExactMatch
    from jaxheads.metrics.thresholds import Accuracy as Accuracy
    from jaxheads.metrics.thresholds import BalancedAccuracy as BalancedAccuracy
    from jaxheads.metrics.thresholds import CohenKappa as CohenKappa
    from jaxheads.metrics.thresholds import FalseNegatives as FalseNegatives
    from jaxheads.metrics.thresholds import FalsePositives as FalsePositives
    from jaxheads.metrics.thresholds import FBeta as FBeta
    from jaxheads.metrics.thresholds import HammingLoss as HammingLoss
    from jaxheads.metrics.thresholds import IoU as IoU
    from jaxheads.metrics.thresholds import MatthewsCorrcoef as MatthewsCorrcoef
    from jaxheads.metrics.thresholds import NegativePredictiveValue as NegativePredictiveValue
    from jaxheads.metrics.thresholds import Precision as Precision
    from jaxheads.metrics.thresholds import Recall as Recall
    from jaxheads.metrics.thresholds import Specificity as Specificity
    from jaxheads.metrics.thresholds import Support as Support
    from jaxheads.metrics.thresholds import TrueNegatives as TrueNegatives
    from jaxheads.metrics.thresholds import TruePositives as TruePositives

# The names that are imported when they are asked for: `import jaxheads` does not pay for the catalogue.
_LAZY = {
    name: module
    for module, names in {
        "areas": ("AveragePrecision", "KolmogorovSmirnov", "PrAuc", "RocAuc"),
        "calibration": ("BaseRate", "BrierScore", "ExpectedCalibrationError", "LogLoss"),
        "classes": ("ConfusionMatrix", "MeanIoU", "OneVsRestAuc", "Perplexity"),
        "comparing": ("Comparison",),
        "confusion": ("ClassCounts", "ClassesView", "ConfusionTable", "ConfusionView"),
        "moments": ("Moments", "MomentsView"),
        "operating": (
            "BestThreshold",
            "PrecisionAtRecall",
            "RecallAtPrecision",
            "SensitivityAtSpecificity",
            "SpecificityAtSensitivity",
        ),
        "ranks": ("Ranks", "RanksView", "TopKAccuracy"),
        "regression": (
            "ExplainedVariance",
            "HuberError",
            "MeanAbsoluteError",
            "MeanAbsolutePercentageError",
            "MeanSquaredError",
            "MeanSquaredLogError",
            "PearsonCorrelation",
            "R2Score",
            "RootMeanSquaredError",
            "RootMeanSquaredLogError",
            "WithinTolerance",
        ),
        "rows": ("PrecisionAtK", "RecallAtK"),
        "sequences": ("ExactMatch",),
        "thresholds": (
            "Accuracy",
            "BalancedAccuracy",
            "CohenKappa",
            "FBeta",
            "FalseNegatives",
            "FalsePositives",
            "HammingLoss",
            "IoU",
            "MatthewsCorrcoef",
            "NegativePredictiveValue",
            "Precision",
            "Recall",
            "Specificity",
            "Support",
            "TrueNegatives",
            "TruePositives",
        ),
    }.items()
    for name in names
}


def __getattr__(name: str) -> _typing.Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'jaxheads.metrics' has no attribute {name!r}")
    value = getattr(_importlib.import_module(f"jaxheads.metrics.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
