"""Floor 6: heads for gradient boosted trees, XGBoost's and LightGBM's."""

from typing import TYPE_CHECKING, Any

from jaxheads.boosting.attaching import with_labels as with_labels
from jaxheads.boosting.derivatives import derivatives as derivatives
from jaxheads.boosting.evaluation import lightgbm_metric as lightgbm_metric
from jaxheads.boosting.evaluation import xgboost_metric as xgboost_metric
from jaxheads.boosting.objectives import lightgbm_objective as lightgbm_objective
from jaxheads.boosting.objectives import xgboost_objective as xgboost_objective

if TYPE_CHECKING:
    from jaxheads.boosting.estimator import BoostedHead as BoostedHead


def __getattr__(name: str) -> Any:
    # The estimator needs scikit-learn; objectives and metrics do not.
    if name != "BoostedHead":
        raise AttributeError(f"module 'jaxheads.boosting' has no attribute {name!r}")
    from jaxheads.boosting.estimator import BoostedHead

    globals()[name] = BoostedHead
    return BoostedHead


def __dir__() -> list[str]:
    return sorted({*globals(), "BoostedHead"})
