"""A head on gradient boosted trees, as a scikit-learn estimator."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import jax
import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import ClassifierTags, RegressorTags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data

from jaxheads.boosting import targets
from jaxheads.boosting.conventions import Hessian, Options
from jaxheads.boosting.datasets import check_boosted, find_live, have_variety
from jaxheads.boosting.engines import ENGINES, LightGBM, Part, Plan, XGBoost
from jaxheads.boosting.evaluation import Evaluation, list_numbers, measure_rows
from jaxheads.boosting.objectives import Objective
from jaxheads.boosting.parameters import check_params
from jaxheads.boosting.starts import find_constants
from jaxheads.boosting.stopping import Monitor
from jaxheads.engine import trees
from jaxheads.engine.reading import directions
from jaxheads.head import Head, check_unbound
from jaxheads.heads import BinaryClassHead, MultiLabelHead, PoissonRegressionHead
from jaxheads.metrics import Metrics
from jaxheads.numerics import brief, fields
from jaxheads.numerics.batch import Batch
from jaxheads.numerics.missing import is_frame


def _has_probabilities(estimator: Any) -> bool:
    return "probabilities" in targets.list_keys(estimator.head)


def _is_classifier(estimator: Any) -> bool:
    return targets.tell_kind(estimator.head) == "classifier"


class BoostedHead(BaseEstimator):
    """Gradient boosted trees under any head: XGBoost or LightGBM trains them natively on the head's own loss.

    Rows that do not count for any head (`where` is False, or the weight is 0) do not reach the booster. The model is
    that of the other rows. A row that counts for one head of a `MultiHead` takes part in the trees of all heads, with
    gradient and Hessian 0 in those of the others: in the bins, in LightGBM's leaf counts, in samples of rows.

    A classifier, a regressor, or neither, as the head is. Labels of classifiers may be of any kind: ids 0 ... n - 1,
    names of the head's `label_vocabulary`, or others, which the head then has sorted; predictions are of the kind that
    was given to `fit`. Frames keep their categories, which the booster splits on (columns of arrays that hold codes are
    named by its own `feature_types=["c", ...]` or `categorical_feature=[0]`). A missing value in `X`, NaN, is the
    booster's. An entry that a sparse matrix leaves out is a missing value for XGBoost, and 0 for LightGBM.

    Args:
        head: unbound, one row of logits an example, without a `weight_column`: the weights are `sample_weight`.
        booster: `"xgboost"` or `"lightgbm"`.
        n_estimators: rounds of boosting. Heads with several logits grow a tree for each in every round, XGBoost with
            `multi_strategy="multi_output_tree"` one for all.
        hessian: as for `jh.boosting.derivatives`.
        init_score: the logits before the first tree: a number, or one for each logit; or None for the best constant,
            by `head.constant_logits`, or by a search where there is no formula (a `loss_fn`). The search takes one
            logit, or several with a loss each; zeros for other heads.
        early_stopping_rounds: for how many rounds `monitor` may fail to improve on the last of `eval_set`; predictions
            then use the best round.
        monitor: a metric of the head; its average loss by default.
        higher_is_better: of the monitor, where the metric does not say.
        params: the booster's own: `learning_rate`, `max_depth`, `random_state`, `n_jobs`, ... `max_delta_step` of a
            `PoissonRegressionHead` on XGBoost is 0.7 by default, as for its own objective. LightGBM is quiet by
            default, also about names that it does not know: `verbosity=0` lets it tell.

    Attributes:
        booster_: the `xgboost.Booster` or `lightgbm.Booster`, whose margins are without the init score.
        init_logits_: float32 `[logits_dimension]`, which predictions add.
        classes_: of a classifier, sorted as everywhere in scikit-learn, with the columns of `predict_proba` and
            `decision_function` in that order; `predict_logits` and `predictions` have the head's.
        evals_result_: the head's metrics of each of `eval_set`, `validation_0` and so on, one value a round.
        best_iteration_: with early stopping the best round, from 0; else None.
        feature_importances_: the share of each feature in the gain of all splits.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.

    Raises:
        ValueError: when fitted: an unknown booster or metric, parameters that the head decides (`objective`,
            `num_class`) or that would do nothing here (`scale_pos_weight`: give `sample_weight`), early stopping
            without an `eval_set` or by a metric that is undefined on it, shared trees, random forests and early
            stopping of DART on LightGBM, labels that the head refuses, no row that counts.

    >>> import numpy as np
    >>> import jaxheads as jh
    >>> x = np.random.default_rng(0).normal(size=(200, 3))
    >>> y = np.where(x[:, 0] + x[:, 1] ** 2 > 1, "late", "on time")
    >>> head = jh.BinaryClassHead(label_vocabulary=("on time", "late"))
    >>> model = jh.boosting.BoostedHead(head, booster="lightgbm", n_estimators=20).fit(x, y)
    >>> bool(model.score(x, y) > 0.9), model.predict(x[:2]).tolist() == y[:2].tolist()
    (True, True)
    >>> bool(model.measure(x, y).compute()["auc"] > 0.95)
    True
    """

    def __init__(
        self,
        head: Head,
        booster: str = "xgboost",
        *,
        n_estimators: int = 100,
        hessian: Hessian = "auto",
        init_score: Any = None,
        early_stopping_rounds: int | None = None,
        monitor: str | None = None,
        higher_is_better: bool | None = None,
        **params: Any,
    ):
        self.head = head
        self.booster = booster
        self.n_estimators = n_estimators
        self.hessian = hessian
        self.init_score = init_score
        self.early_stopping_rounds = early_stopping_rounds
        self.monitor = monitor
        self.higher_is_better = higher_is_better
        self.params = params

    # Parameters of the booster stand beside our own, as in XGBoost's estimators.

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Returns our own parameters and the booster's."""
        return {**super().get_params(deep), **self.params}

    def set_params(self, **params: Any) -> Self:
        """Sets our own parameters and the booster's."""
        own = self._get_param_names()
        theirs = {key: value for key, value in params.items() if key not in own}
        self.params = {**self.params, **theirs}
        for key, value in params.items():
            if key in own:
                setattr(self, key, value)
        return self

    def __sklearn_tags__(self) -> Any:
        tags, head = super().__sklearn_tags__(), targets.find_base(self.head)
        kind = targets.tell_kind(self.head)
        tags.estimator_type = kind
        tags.input_tags.allow_nan = tags.input_tags.sparse = tags.input_tags.categorical = True
        tags.target_tags.required = True
        several = isinstance(head, MultiLabelHead) or (kind == "regressor" and head.logits_dimension > 1)
        tags.target_tags.multi_output, tags.target_tags.single_output = several, not several
        tags.target_tags.positive_only = isinstance(head, PoissonRegressionHead)
        if kind == "classifier":
            multi_class = not isinstance(head, (BinaryClassHead, MultiLabelHead))
            tags.classifier_tags = ClassifierTags(multi_class=multi_class, multi_label=several)
        elif kind == "regressor":
            tags.regressor_tags = RegressorTags()
        return tags

    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        where: Any = None,
        eval_set: Sequence[tuple[Any, Any]] | None = None,
        eval_sample_weight: Sequence[Any] | None = None,
        eval_where: Sequence[Any] | None = None,
        callbacks: Sequence[Any] = (),
        verbose: bool = False,
    ) -> Self:
        """Trains. Warns if no tree has a split although labels differ.

        Args:
            X: `[n, features]`, an array, a sparse matrix or a frame.
            y: labels; for a `MultiHead` a dict by head.
            sample_weight: multiplicities, `[n]`.
            where: which labels exist; for a `MultiHead` one mask for all heads, or a dict by head. It must be False for
                a label that is NaN, also if the row has weight 0. Rows that no head keeps are left out before training.
            eval_set: a list of pairs `(X, y)` that are measured after every round.
            eval_sample_weight, eval_where: weights and masks of `eval_set`, one each (or None).
            callbacks: the booster's own. Callbacks that stop early are refused.
            verbose: whether the log is printed.
        """
        engine = self._find_engine()
        check_unbound(self.head)
        if missing := fields.missing(self.head):
            raise ValueError(
                f"A BoostedHead grows trees, and trains no fields of its head. Given {self.head!r} with {missing}. "
                "Train natively: jh.boosting.xgboost_objective(head, params=values)."
            )
        check_boosted(self.head, None, metrics=True)
        params, step = self._settle_params()
        x = self._validate_table(X, reset=True)
        classes = targets.Classes.of(self.head, y, self._read_mask(x, y, where))
        train = self._encode(x, y, sample_weight, where, classes)
        batch = jax.tree.map(np.asarray, train.prepare(self.head).batch)
        kept = np.any(find_live(self.head, batch), axis=-1)
        if not kept.any():
            raise ValueError(
                f"A BoostedHead learns from rows with a label and a weight. Given {x.shape[0]} rows, and "
                f"{type(self.head).__name__} keeps none: where is False, or the weight of the row or the head is zero. "
                "Look at where and sample_weight."
            )
        start, train = self._find_start(batch), train.keep(kept)
        evaluated = self._encode_pairs(eval_set, eval_sample_weight, eval_where, classes)
        keys = list_numbers(self.head)
        monitor = self._choose_monitor(keys, bool(evaluated))
        if stopping := [c for c in callbacks if "EarlyStopping" in type(c).__name__]:
            raise ValueError(
                f"To stop early pass early_stopping_rounds= (and monitor=), which know the metrics. Given the callback "
                f"{stopping[0]!r}."
            )
        rounds = _check_count("n_estimators", self.n_estimators, "")
        objective = Objective(self.head, None, Options(self.hessian, library=self.booster, max_delta_step=step))
        metric = Evaluation(self.head, None, keys, self.booster)
        plan = Plan(params, rounds, start, objective, metric, monitor, callbacks, verbose)
        self.booster_, log = engine.train(plan, train, evaluated)
        self.evals_result_, self.best_iteration_ = log.values, log.best
        self.init_logits_, self._classes = start, classes
        vars(self).pop("classes_", None)  # another head's
        if classes is not None:
            self.classes_ = classes.sort(self.head)
        if not engine.has_splits(self.booster_) and have_variety(self.head, batch):
            limits = {"xgboost": "min_child_weight", "lightgbm": "min_data_in_leaf or min_sum_hessian_in_leaf"}
            warnings.warn(
                f"No tree of the model has a split: it predicts the same for every row. It starts from "
                f"{start.tolist()}. If the features should matter, the loss may be too flat there, or the rows may be "
                f'too few. Try hessian="unit", another init_score, or a lower {limits[self.booster]}, or scale the '
                "labels.",
                stacklevel=2,
            )
        return self

    def predict_logits(self, X: Any) -> np.ndarray:
        """Returns the logits, float32 `[n, logits_dimension]`."""
        check_is_fitted(self, "booster_")
        rounds = None if self.best_iteration_ is None else self.best_iteration_ + 1
        x = self._validate_table(X, reset=False)
        logits = self._find_engine().predict(self.booster_, x, rounds, self.init_logits_)
        return np.asarray(logits, np.float32).reshape(-1, self.head.logits_dimension)

    def predict(self, X: Any) -> Any:
        """Returns classes `[n]`, columns of 0 and 1 `[n, classes]`, or numbers; for a `MultiHead` a dict by head."""
        return targets.predict(self.head, self.predict_logits(X), self._classes)

    @available_if(_has_probabilities)
    def predict_proba(self, X: Any) -> np.ndarray:
        """Returns the head's `probabilities` `[n, classes]`, in the order of `classes_`."""
        found = np.asarray(self.head.predictions(self.predict_logits(X), "probabilities")["probabilities"])
        return found if self._classes is None else found[:, self._classes.order]

    @available_if(_is_classifier)
    def decision_function(self, X: Any) -> np.ndarray:
        """Returns the logits, in the order of `classes_`; with two classes `[n]`, the logits of the second."""
        logits, classes = self.predict_logits(X), cast(targets.Classes, self._classes)
        if logits.shape[1] > 1:
            return logits[:, classes.order]
        return logits[:, 0] if classes.order[-1] == 1 else -logits[:, 0]

    def predictions(self, X: Any, keys: Any = None) -> dict[str, Any]:
        """Returns the head's own predictions by key, as NumPy arrays."""
        return jax.tree.map(np.asarray, dict(self.head.predictions(self.predict_logits(X), keys)))

    def measure(self, X: Any, y: Any, sample_weight: Any = None, *, where: Any = None) -> Metrics:
        """Returns the head's metrics of these rows."""
        logits = self.predict_logits(X)
        part = self._encode(logits, y, sample_weight, where, self._classes)
        return measure_rows(self.head, None, part.prepare(self.head), logits)

    def score(self, X: Any, y: Any, sample_weight: Any = None, *, where: Any = None) -> float:
        """Returns the accuracy of a classifier, the R2 of a regressor; for other heads the negative loss of these rows.

        An example with several labels is right if all labels are right. A soft label counts as right by its share, and
        several soft labels by the product of their shares. The score is NaN if no row counts.
        """
        logits = self.predict_logits(X)
        part = self._encode(logits, y, sample_weight, where, self._classes)
        # The labels of a regressor as they were given: the head's are float32.
        labels = np.asarray(y, np.float64) if targets.tell_kind(self.head) == "regressor" else part.labels
        return targets.score(self.head, logits, labels, part.weights, part.where)

    @property
    def feature_importances_(self) -> np.ndarray:
        """The share of each feature in the gain of all splits; zeros if there is none."""
        check_is_fitted(self, "booster_")
        gains = self._find_engine().sum_gains(self.booster_).astype(np.float64)
        return gains / total if (total := gains.sum()) else gains

    def _find_engine(self) -> XGBoost | LightGBM:
        if not brief.is_one_of(self.booster, ENGINES):
            raise ValueError(f"booster must be one of {[*ENGINES]}. Given {self.booster!r}.")
        return ENGINES[self.booster]

    def _settle_params(self) -> tuple[dict[str, Any], Any]:
        """Returns the booster's parameters, and the step of Poisson objectives."""
        params = {key: value for key, value in self.params.items() if value is not None}
        if isinstance(missing := params.get("missing"), float) and np.isnan(missing):
            del params["missing"]
        check_params(params, self.booster, self.early_stopping_rounds)
        if self.booster == "xgboost" and isinstance(self.head, PoissonRegressionHead):
            params.setdefault("max_delta_step", 0.7)
        if not any(isinstance(head, PoissonRegressionHead) for head in trees.leaves(self.head)):
            return params, 0.7
        return params, params.get("max_delta_step" if self.booster == "xgboost" else "poisson_max_delta_step", 0.7)

    def _validate_table(self, X: Any, reset: bool) -> Any:
        # Frames go to the booster as they are: an array would lose their categories.
        if is_frame(X):
            return validate_data(self, X, reset=reset, skip_check_array=True)
        return validate_data(self, X, reset=reset, accept_sparse="csr", ensure_all_finite="allow-nan", dtype="numeric")

    def _read_mask(self, x: Any, y: Any, where: Any) -> Any:
        """Checks the number of labels, and returns which of them exist."""
        if y is not None and not isinstance(y, Mapping):
            check_consistent_length(y, x)
        return where if isinstance(where, Mapping) else targets.read_mask(where, int(x.shape[0]))

    def _encode(self, x: Any, y: Any, sample_weight: Any, where: Any, classes: targets.Classes | None) -> Part:
        """Returns rows with encoded labels."""
        where = self._read_mask(x, y, where)
        labels = targets.encode(self.head, y, where, classes)
        weights = None if sample_weight is None else np.asarray(sample_weight, np.float32)
        if weights is not None and weights.shape != (n := int(x.shape[0]),):
            raise ValueError(f"sample_weight must be one number a row, shape {(n,)}. Given shape {weights.shape}.")
        return Part(x, labels, where, weights)

    def _find_start(self, batch: Batch) -> np.ndarray:
        """Returns the logits before the first tree."""
        dimension = self.head.logits_dimension
        if self.init_score is None:
            return np.asarray(find_constants(self.head, batch), np.float32)
        try:
            given = np.broadcast_to(np.asarray(self.init_score, np.float32), (dimension,)).copy()
        except ValueError as error:
            raise ValueError(
                f"init_score must be None, a number, or one for each of the {dimension} logits. Given "
                f"{self.init_score!r}."
            ) from error
        if not np.isfinite(given).all():
            raise ValueError(f"init_score must be finite. Given {self.init_score!r}.")
        return given

    def _encode_pairs(self, pairs: Any, weights: Any, where: Any, classes: targets.Classes | None) -> list[Part]:
        pairs = list(() if pairs is None else pairs)
        if strange := [pair for pair in pairs if not (isinstance(pair, (tuple, list)) and len(pair) == 2)]:
            parts = f" of {len(strange[0])}" if isinstance(strange[0], (tuple, list)) else ""
            raise ValueError(
                f"eval_set must be a list of pairs, [(X, y)], with weights in eval_sample_weight. Given an entry of "
                f"type {type(strange[0]).__name__}{parts}."
            )
        for name, values in (("eval_sample_weight", weights), ("eval_where", where)):
            if values is not None and len(values) != len(pairs):
                raise ValueError(f"{name} must have an entry for each of eval_set, {len(pairs)}. Given {len(values)}.")
        weights, where = ([None] * len(pairs) if values is None else values for values in (weights, where))
        return [
            self._encode(self._validate_table(x, reset=False), y, w, there, classes)
            for (x, y), w, there in zip(pairs, weights, where, strict=True)
        ]

    def _choose_monitor(self, names: tuple[str, ...], is_evaluated: bool) -> Monitor | None:
        """Returns the metric to stop by, one of these names."""
        if self.early_stopping_rounds is None:
            if self.monitor is not None:
                raise ValueError(f"monitor={self.monitor!r} decides when to stop. Pass early_stopping_rounds= too.")
            return None
        rounds = _check_count("early_stopping_rounds", self.early_stopping_rounds, ", or None")
        if not is_evaluated:
            raise ValueError("early_stopping_rounds needs eval_set=[(X, y)] in fit: the last one decides. Given none.")
        key = self.monitor
        if key is None:
            if self.head.parts():
                given = type(self.head).__name__
                raise ValueError(
                    f"early_stopping_rounds needs monitor=, one of {list(names)}. Given a {given} and None."
                )
            key = names[0]
        if key not in names:
            raise ValueError(
                f"monitor must be a metric of the head that is a number, one of {list(names)}. Given {key!r}."
            )
        higher = directions(self.head)[key] if self.higher_is_better is None else self.higher_is_better
        if higher is None:
            raise ValueError(f"Whether {key!r} is better when high, the metric does not say. Pass higher_is_better=.")
        return Monitor(key, higher, rounds)


def _check_count(name: str, value: Any, also: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1{also}. Given {value!r}.")
    return int(value)
