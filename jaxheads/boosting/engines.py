"""What differs between XGBoost and LightGBM for the estimator: datasets, training, margins."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxheads.boosting.attaching import with_labels
from jaxheads.boosting.evaluation import Evaluation, lightgbm_metric, xgboost_metric
from jaxheads.boosting.objectives import Objective, lightgbm_objective, xgboost_objective
from jaxheads.boosting.stopping import Log, Monitor
from jaxheads.numerics.columns import is_frame

# Parameters that the head decides, and their aliases.
DECIDED = {
    "xgboost": ("objective", "eval_metric", "base_score", "num_class", "num_target", "disable_default_eval_metric"),
    "lightgbm": (
        *("objective", "objective_type", "app", "application", "loss", "metric", "metrics", "metric_types"),
        *("num_class", "num_classes", "boost_from_average", "eval_metric"),
    ),
}
# Those of its own objectives, which would do nothing.
IDLE = {
    "xgboost": (
        *("scale_pos_weight", "class_weight", "quantile_alpha", "expectile_alpha", "huber_slope"),
        *("tweedie_variance_power", "aft_loss_distribution", "aft_loss_distribution_scale"),
    ),
    "lightgbm": (
        *("scale_pos_weight", "class_weight", "is_unbalance", "unbalance", "unbalanced_sets", "sigmoid", "alpha"),
        *("fair_c", "tweedie_variance_power", "reg_sqrt"),
    ),
}
# Those of their scikit-learn estimators, which `train` does not read, and what to do instead.
_CATEGORIES = "columns of dtype category of a frame are split on as such; of an array, name them in "
_MISSING = "a missing value is NaN; put it there in X"
_NATIVE = "parameters stand beside the head, BoostedHead(head, max_depth=3)"
_OURS = {
    "importance_type": "feature_importances_ is the share in the gain; booster_ knows the others",
    "params": _NATIVE,
    "kwargs": _NATIVE,
    "callbacks": "give them to fit",
    "feature_names": "give X as a frame, whose columns have names",
}
ELSEWHERE = {
    "xgboost": {
        "missing": _MISSING,
        "enable_categorical": _CATEGORIES + 'feature_types=["c", "q", ...]',
        "categorical_feature": _CATEGORIES + 'feature_types=["c", "q", ...]',
        "feature_weights": "the booster knows them of a dataset alone; train it natively with xgboost_objective(head)",
        **_OURS,
    },
    "lightgbm": {
        "missing": _MISSING,
        **dict.fromkeys(("feature_types", "enable_categorical"), _CATEGORIES + "categorical_feature=[0, ...]"),
        **_OURS,
    },
}
CATEGORICAL = ("categorical_feature", "categorical_features", "cat_feature", "categorical_column", "cat_column")
STOPPING = (
    "early_stopping_round",
    "early_stopping",
    "n_iter_no_change",
    "early_stopping_min_delta",
    "first_metric_only",
)
ROUNDS = (
    *(
        "num_boost_round",
        "num_iterations",
        "num_iteration",
        "n_iter",
        "num_tree",
        "num_trees",
        "num_round",
        "num_rounds",
    ),
    *("nrounds", "max_iter"),
)


class Part(NamedTuple):
    """Rows to train or evaluate on: a table, and what belongs to its rows.

    Attributes:
        x: an array or a frame.
        labels, where: as the head takes them.
        weights: one a row, or None.
        margins: `[n, d]` to start from.
    """

    x: Any
    labels: Any
    where: Any
    weights: Any
    margins: np.ndarray


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        params: the user's own for the booster.
        rounds: how many.
        objective, metric: as the booster takes them.
        monitor: the metric to stop by; None never to stop.
        callbacks: the user's own.
        verbose: whether the log is printed.
    """

    params: Mapping[str, Any]
    rounds: int
    objective: Objective
    metric: Evaluation
    monitor: Monitor | None
    callbacks: Sequence[Any]
    verbose: bool


class Trained(NamedTuple):
    """What training gave.

    Attributes:
        booster: the library's own.
        log: by dataset and metric, one value a round.
        best: the round to predict by, from 0, if training stopped early or could have.
    """

    booster: Any
    log: dict[str, dict[str, list[float]]]
    best: int | None


class Engine(Protocol):
    """What the estimator asks of a library."""

    objective: Callable[..., Objective]
    metric: Callable[..., Evaluation]

    def train(self, plan: Plan, train: Part, evaluated: Sequence[Part]) -> Trained:
        """Trains natively."""
        ...

    def logits(self, booster: Any, x: Any, rounds: int | None, start: np.ndarray) -> np.ndarray:
        """The sums of the trees and of the logits `[d]` that training started from: `[n, d]` or `[n]`."""
        ...

    def gains(self, booster: Any) -> np.ndarray:
        """What each feature gained in all splits."""
        ...


class XGBoost:
    """XGBoost's native interface."""

    objective = staticmethod(xgboost_objective)
    metric = staticmethod(xgboost_metric)

    def train(self, plan: Plan, train: Part, evaluated: Sequence[Part]) -> Trained:
        """By `xgboost.train`, over quantiles where the tree method allows."""
        import xgboost
        from xgboost.callback import TrainingCallback

        dimension = train.margins.shape[1]
        params = {**plan.params, "base_score": 0, "disable_default_eval_metric": True}
        types = params.pop("feature_types", None)
        if dimension > 1:
            params["num_target"] = dimension
        data = self._dataset(train, params, types, None)
        log = Log(plan.metric, [self._dataset(part, params, types, data) for part in evaluated], plan.monitor)

        class Stop(TrainingCallback):
            def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
                return log.over_since() is not None

        booster = xgboost.train(
            params,
            data,
            plan.rounds,
            obj=plan.objective,
            custom_metric=log if evaluated else None,
            evals=list(zip(log.datasets, log.names, strict=True)),
            callbacks=[*plan.callbacks, Stop()],
            verbose_eval=plan.verbose,
        )
        if log.best is not None:
            booster.set_attr(best_iteration=str(log.best))
        return Trained(booster, log.values, log.best)

    def _dataset(self, part: Part, params: Mapping[str, Any], types: Any, reference: Any) -> Any:
        import xgboost

        given = {
            "weight": part.weights,
            "base_margin": part.margins,
            "feature_types": types,
            "enable_categorical": True,
        }
        given |= {
            name: params[alias] for name, alias in (("nthread", "nthread"), ("nthread", "n_jobs")) if alias in params
        }
        if params.get("tree_method", "hist") in ("hist", "auto"):
            given |= {"max_bin": params["max_bin"]} if "max_bin" in params else {}
            data = xgboost.QuantileDMatrix(part.x, ref=reference, **given)
        else:
            data = xgboost.DMatrix(part.x, **given)
        if reference is not None:
            data.feature_names = reference.feature_names
        return with_labels(data, part.labels, part.where)

    def logits(self, booster: Any, x: Any, rounds: int | None, start: np.ndarray) -> np.ndarray:
        """By `Booster.predict`, from the start: trees were fitted to what float32 left of each sum in training."""
        import xgboost

        types = None if is_frame(x) else booster.feature_types
        margins = np.tile(start, (x.shape[0], 1))
        data = xgboost.DMatrix(x, base_margin=margins, feature_types=types, enable_categorical=True)
        # An array after a frame, or the other way: scikit-learn has warned, and looked at the number of columns.
        data.feature_names = booster.feature_names
        return booster.predict(data, output_margin=True, iteration_range=(0, rounds or 0))

    def gains(self, booster: Any) -> np.ndarray:
        """`total_gain`."""
        found = booster.get_score(importance_type="total_gain")
        names = booster.feature_names or [f"f{i}" for i in range(booster.num_features())]
        return np.array([np.sum(found.get(name, 0.0)) for name in names])


class LightGBM:
    """LightGBM's native interface."""

    objective = staticmethod(lightgbm_objective)
    metric = staticmethod(lightgbm_metric)

    def train(self, plan: Plan, train: Part, evaluated: Sequence[Part]) -> Trained:
        """By `lightgbm.train`."""
        import lightgbm

        params = {"verbosity": -1, **plan.params, "objective": plan.objective, "metric": "None"}
        if (dimension := train.margins.shape[1]) > 1:
            params["num_class"] = dimension
        # It takes them of a dataset alone; of parameters it says that it ignores them.
        named = {alias: params.pop(alias) for alias in CATEGORICAL if alias in params}
        categories = _columns(named, train.x) if named else "auto"
        for_data = {**params, "objective": "none"}
        data = self._dataset(train, for_data, categories, None)
        log = Log(plan.metric, [self._dataset(part, for_data, "auto", data) for part in evaluated], plan.monitor)

        def stop(env: Any) -> None:
            if (best := log.over_since()) is not None:
                raise lightgbm.EarlyStopException(best, env.evaluation_result_list)

        callbacks = [*plan.callbacks, *([lightgbm.log_evaluation()] if plan.verbose else ()), stop]
        try:
            booster = lightgbm.train(
                params,
                data,
                plan.rounds,
                valid_sets=list(log.datasets),
                valid_names=log.names,
                feval=log if evaluated else None,
                callbacks=callbacks,
            )
        except lightgbm.basic.LightGBMError as error:
            if "num_features()" not in str(error):
                raise
            raise ValueError(
                f"LightGBM finds no feature to split on: all are constant, or there are too few rows (n_samples="
                f"{len(train.margins)}). Give it more rows, or lower min_data_in_bin and min_data_in_leaf."
            ) from error
        if log.best is not None:
            booster.best_iteration = log.best + 1
        return Trained(booster, log.values, log.best)

    def _dataset(self, part: Part, params: dict[str, Any], categories: Any, reference: Any) -> Any:
        import lightgbm

        margins = part.margins[:, 0] if part.margins.shape[1] == 1 else part.margins
        # It insists on labels of its own; those that count are attached.
        nothing = np.zeros(len(margins), np.float32)
        data = lightgbm.Dataset(
            part.x,
            nothing,
            reference=reference,
            weight=part.weights,
            init_score=margins,
            categorical_feature=categories,
            params=params,
        )
        return with_labels(data, part.labels, part.where)

    def logits(self, booster: Any, x: Any, rounds: int | None, start: np.ndarray) -> np.ndarray:
        """By `Booster.predict`, which leaves the init score out; in float64, as LightGBM trains."""
        margins = booster.predict(x, raw_score=True, num_iteration=-1 if rounds is None else rounds)
        return np.asarray(margins).reshape(-1, len(start)) + start

    def gains(self, booster: Any) -> np.ndarray:
        """`gain`."""
        return np.asarray(booster.feature_importance(importance_type="gain"))


def _columns(named: Mapping[str, Any], x: Any) -> list[int]:
    """The numbers of the columns that are categories: LightGBM takes a list of plain integers, or nothing is said."""
    (alias, given), *others = named.items()
    if others:
        raise ValueError(f"One list of columns says which are categories. Given {sorted(named)}.")
    names = [str(name) for name in x.columns] if is_frame(x) else []
    known = {**{i: i for i in range(x.shape[1])}, **{name: i for i, name in enumerate(names)}}
    if not isinstance(given, (list, tuple, np.ndarray)) or not all(column in known for column in given):
        legal = f"0 ... {x.shape[1] - 1}" + (f" or {names[:10]}" if names else "")
        raise ValueError(f"{alias} must be a list of columns, of {legal}. Given {given!r}.")
    return [known[column] for column in given]


ENGINES: dict[str, Engine] = {"xgboost": XGBoost(), "lightgbm": LightGBM()}
