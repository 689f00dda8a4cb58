"""jaxheads: the tops of models, as pure functions for JAX.

A head computes loss, predictions and metrics from logits. It is frozen configuration; its state is a pytree that adds.

>>> import jax.numpy as jnp
>>> import jaxheads as jh
>>> head = jh.BinaryClassHead()
>>> labels, logits = jnp.array([1, 0, 1]), jnp.array([[0.4], [-1.2], [3.0]])
>>> loss = head.loss(labels=labels, logits=logits)
>>> metrics = head.metrics()
>>> metrics = head.update_metrics(metrics, features=None, logits=logits, labels=labels)
>>> metrics.compute()["auc"]
1.0
"""

import importlib as _importlib
import typing as _typing

from jaxheads import metrics as metrics
from jaxheads.contract import LabelSpec as LabelSpec
from jaxheads.contract import Term as Term
from jaxheads.contract import learned as learned
from jaxheads.contract import running as running
from jaxheads.contract import subheads as subheads
from jaxheads.head import Head as Head
from jaxheads.heads import BinaryClassHead as BinaryClassHead
from jaxheads.heads import LogisticRegressionHead as LogisticRegressionHead
from jaxheads.heads import MultiClassHead as MultiClassHead
from jaxheads.heads import MultiLabelHead as MultiLabelHead
from jaxheads.heads import PoissonRegressionHead as PoissonRegressionHead
from jaxheads.heads import RegressionHead as RegressionHead
from jaxheads.heads.label_statistics import label_statistics as label_statistics
from jaxheads.metrics import Bootstrap as Bootstrap
from jaxheads.metrics import ColumnMeans as ColumnMeans
from jaxheads.metrics import GrowingGrid as GrowingGrid
from jaxheads.metrics import LogitGrid as LogitGrid
from jaxheads.metrics import Mean as Mean
from jaxheads.metrics import Metrics as Metrics
from jaxheads.metrics import Scores as Scores
from jaxheads.metrics import Slices as Slices
from jaxheads.metrics import ThresholdGrid as ThresholdGrid
from jaxheads.numerics.linear import LinearLogits as LinearLogits
from jaxheads.numerics.reduction import Reduction as Reduction
from jaxheads.numerics.warned import BadInputWarning as BadInputWarning
from jaxheads.numerics.warned import CheckpointWarning as CheckpointWarning
from jaxheads.numerics.warned import GridWarning as GridWarning
from jaxheads.numerics.warned import MaskWarning as MaskWarning
from jaxheads.numerics.warned import RoundingWarning as RoundingWarning
from jaxheads.numerics.warned import StackedWarning as StackedWarning

if _typing.TYPE_CHECKING:
    from jaxheads import boosting as boosting
    from jaxheads import nn as nn
    from jaxheads import testing as testing
    from jaxheads import training as training
    from jaxheads.compose import GlobalObjectiveHead as GlobalObjectiveHead
    from jaxheads.compose import MultiHead as MultiHead
    from jaxheads.compose import SequentialHeadWrapper as SequentialHeadWrapper
    from jaxheads.compose import binary_or_multi_class_head as binary_or_multi_class_head
    from jaxheads.heads.balance import balanced_class_weights as balanced_class_weights
    from jaxheads.spec import ClassificationOutput as ClassificationOutput
    from jaxheads.spec import EstimatorSpec as EstimatorSpec
    from jaxheads.spec import PredictOutput as PredictOutput
    from jaxheads.spec import RegressionOutput as RegressionOutput
    from jaxheads.spec import TrainOp as TrainOp
    from jaxheads.training import StepOutput as StepOutput
    from jaxheads.training import TrainState as TrainState
    from jaxheads.training import evaluate as evaluate
    from jaxheads.training import fit as fit
    from jaxheads.training import make_eval_step as make_eval_step
    from jaxheads.training import make_predict_step as make_predict_step
    from jaxheads.training import make_train_step as make_train_step
    from jaxheads.training import pad_batch as pad_batch

__version__ = "0.1.0"

# Upper floors, imported when first asked for.
_LAZY: dict[str, str] = dict.fromkeys(
    ("GlobalObjectiveHead", "MultiHead", "SequentialHeadWrapper", "binary_or_multi_class_head"), "jaxheads.compose"
)
_LAZY |= {"balanced_class_weights": "jaxheads.heads.balance"}
_LAZY |= dict.fromkeys(
    ("ClassificationOutput", "EstimatorSpec", "PredictOutput", "RegressionOutput", "TrainOp"), "jaxheads.spec"
)
_LAZY |= dict.fromkeys(
    (
        *("StepOutput", "TrainState", "evaluate", "fit"),
        *("make_eval_step", "make_predict_step", "make_train_step", "pad_batch"),
    ),
    "jaxheads.training",
)
_MODULES = ("boosting", "nn", "testing", "training")


def __getattr__(name: str) -> _typing.Any:
    if name in _MODULES:
        return _importlib.import_module(f"jaxheads.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'jaxheads' has no attribute {name!r}")
    value = getattr(_importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_MODULES})
