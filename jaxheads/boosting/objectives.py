"""A head's loss as the objective of a booster."""

import dataclasses
from typing import Any

import numpy as np

from jaxheads.boosting.conventions import Hessian, Options
from jaxheads.boosting.datasets import RowsCache, check_boosted
from jaxheads.boosting.derivatives import differentiate_compiled
from jaxheads.engine.readiness import ready
from jaxheads.head import Head


@dataclasses.dataclass(frozen=True)
class Objective:
    """Gradient and Hessian of a head's loss, in the two forms in which boosters ask for them. Pickles if the head does.

    Made by `xgboost_objective` and `lightgbm_objective`.

    Attributes:
        head: unbound.
        params: the values of its learned and running fields, or None.
        options: of `derivatives`.
    """

    head: Head
    params: Any
    options: Options
    _cache: RowsCache = dataclasses.field(default_factory=RowsCache, repr=False, compare=False)

    def __post_init__(self):
        check_boosted(self.head, self.params, metrics=False)

    def __call__(self, predicted: Any, dataset: Any, sample_weight: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """`(margins, DMatrix or Dataset)`; or `(labels, margins[, sample_weight])`, as scikit-learn's wrappers call."""
        rows, logits = self._cache.read(self.head, predicted, dataset, sample_weight)
        g, h = differentiate_compiled(self.head, ready(self.head, self.params), rows.batch, self.options, logits)
        gradient, hessian = np.asarray(g), np.asarray(h)
        if not np.isfinite(gradient.sum() + hessian.sum()):
            _check_finite(gradient, hessian, logits)
        if logits.shape[1] == 1:
            return gradient.reshape(-1), hessian.reshape(-1)
        return gradient, hessian


def _check_finite(gradient: np.ndarray, hessian: np.ndarray, logits: np.ndarray) -> None:
    """Refuses derivatives that are not finite. A sum of finite ones may overflow, and is no error."""
    bad = ~(np.isfinite(gradient) & np.isfinite(hessian))
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"The loss has no finite derivatives in {int(bad.sum())} places, the first at row {row}, logit {column}: "
            f"gradient {gradient[row, column]}, Hessian {hessian[row, column]} at margin {logits[row, column]}. Lower "
            "the learning rate or set max_delta_step, start from head.constant_logits(labels), or mend the loss_fn."
        )


def xgboost_objective(
    head: Head,
    *,
    params: Any = None,
    hessian: Hessian = "auto",
    floor: float = 1e-16,
    max_delta_step: float = 0.7,
) -> Objective:
    """A head's loss as the `obj` of `xgboost.train`, or the `objective` of XGBoost's scikit-learn estimators.

    It reads labels and weights from the `DMatrix`; labels from `with_labels`, if there are any, replace its own. Rows
    that are masked or have weight 0 get gradient and Hessian 0, but stay in the dataset: `with_labels` says what they
    do there. It runs on every worker of Dask or Spark, because it pickles if the head does (a `loss_fn` that is a
    lambda does not pickle; write a function in a module). Parameters of XGBoost's own objectives (`scale_pos_weight`)
    do nothing.

    A head with several logits needs `num_target=head.logits_dimension` among the parameters: `Booster.predict` then
    gives logits. With `num_class=` it gives class ids, and logits only by `predict(..., output_margin=True)`; training
    is the same.

    XGBoost starts a custom objective from a margin of `base_score=0.5`; pass `base_score=0` and `base_margin`, rows of
    `head.constant_logits(labels)`. Its `XGBClassifier` alone keeps the logistic link of two classes: there 0.5, its
    default, is a margin of 0, and `predict_proba` is right.

    Args:
        head: any head with one row of logits an example, and without a `weight_column`.
        params: values of its learned and running fields; they are not trained.
        hessian, floor: as for `derivatives`; `"auto"` is the convention of XGBoost's own objective.
        max_delta_step: of a `PoissonRegressionHead`; set the booster's parameter too, as its own objective does.

    Raises:
        ValueError: a head that needs features or learned values that are not there. When called: labels that the head
            refuses, margins of another size than its logits, derivatives that are not finite.

    >>> import numpy as np, xgboost
    >>> import jaxheads as jh
    >>> x = np.array([[0.0], [1.0], [2.0], [3.0]])
    >>> data = xgboost.DMatrix(x, label=[0, 0, 1, 1], weight=[1.0, 2.0, 2.0, 1.0])
    >>> parameters = {"base_score": 0, "min_child_weight": 0, "disable_default_eval_metric": True}
    >>> head, log = jh.BinaryClassHead(), {}
    >>> booster = xgboost.train(
    ...     parameters, data, 10, obj=jh.boosting.xgboost_objective(head), evals=[(data, "train")],
    ...     custom_metric=jh.boosting.xgboost_metric(head, keys=("average_loss", "auc")), evals_result=log,
    ...     verbose_eval=False)
    >>> log["train"]["auc"][-1]
    1.0
    >>> head.predictions(booster.predict(data, output_margin=True)[:, None], "class_ids")["class_ids"].ravel()
    Array([0, 0, 1, 1], dtype=int32)
    """
    return Objective(head, params, Options(hessian, floor, "xgboost", max_delta_step))


def lightgbm_objective(
    head: Head,
    *,
    params: Any = None,
    hessian: Hessian = "auto",
    floor: float = 1e-16,
    max_delta_step: float = 0.7,
) -> Objective:
    """A head's loss as the `objective` in the parameters of `lightgbm.train`, or of its scikit-learn estimators.

    As `xgboost_objective`, with LightGBM's conventions. Rows of gradient and Hessian 0 count in its bins and leaves
    (`with_labels`). LightGBM starts a custom objective from 0: pass `init_score`,
    rows of `head.constant_logits(labels)`, and add them to what it predicts. Heads with several logits need
    `num_class=head.logits_dimension`, and grow a tree for each. `LGBMClassifier` predicts margins under any custom
    objective, not classes or probabilities: `jh.boosting.BoostedHead` predicts all of them.

    >>> import lightgbm, numpy as np
    >>> import jaxheads as jh
    >>> x = np.array([[0.0], [1.0], [2.0], [3.0]])
    >>> data = lightgbm.Dataset(x, label=[0, 0, 1, 1])
    >>> parameters = {"objective": jh.boosting.lightgbm_objective(jh.BinaryClassHead()), "min_data_in_leaf": 1,
    ...     "min_data_in_bin": 1, "verbosity": -1}
    >>> booster = lightgbm.train(parameters, data, 10)
    >>> (booster.predict(x, raw_score=True) > 0).tolist()
    [False, False, True, True]
    """
    return Objective(head, params, Options(hessian, floor, "lightgbm", max_delta_step))
