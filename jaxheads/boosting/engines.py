"""The differences between XGBoost and LightGBM for the estimator: datasets, training, margins."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxheads.boosting.attaching import Attached, take_rows, with_labels
from jaxheads.boosting.datasets import Rows, prepare
from jaxheads.boosting.evaluation import Evaluation
from jaxheads.boosting.objectives import Objective
from jaxheads.boosting.stopping import Log, Monitor
from jaxheads.head import Head
from jaxheads.numerics.missing import is_frame, names_of

CATEGORICAL = ("categorical_feature", "categorical_features", "cat_feature", "categorical_column", "cat_column")


class Part(NamedTuple):
    """Rows to train or evaluate on.

    Attributes:
        x: an array or a frame.
        labels, where: as the head takes them.
        weights: one for each row, or None.
    """

    x: Any
    labels: Any
    where: Any
    weights: Any

    def prepare(self, head: Head) -> Rows:
        """Checks and encodes labels and weights."""
        return prepare(head, Attached(self.labels, self.where), self.weights)

    def keep(self, kept: np.ndarray) -> "Part":
        """Returns the rows that are kept, bool `[n]`."""
        if kept.all():
            return self
        rows = np.flatnonzero(kept)
        labels, where, weights = (take_rows(x, rows) for x in self[1:])
        return Part(_take_rows_of_table(self.x, rows), labels, where, weights)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        params: the user's own for the booster.
        rounds: how many.
        start: the logits `[d]` before the first tree.
        objective, metric: as the booster takes them.
        monitor: the metric to stop by; None never to stop.
        callbacks: the user's own.
        verbose: whether the log is printed.
    """

    params: Mapping[str, Any]
    rounds: int
    start: np.ndarray
    objective: Objective
    metric: Evaluation
    monitor: Monitor | None
    callbacks: Sequence[Any]
    verbose: bool


class XGBoost:
    """XGBoost's native interface."""

    def train(self, plan: Plan, train: Part, evaluated: Sequence[Part]) -> tuple[Any, Log]:
        """Trains by `xgboost.train`, over quantiles where the tree method allows. Returns the booster and its log."""
        import xgboost
        from xgboost.callback import TrainingCallback

        params = {**plan.params, "base_score": 0, "disable_default_eval_metric": True}
        types = params.pop("feature_types", None)
        if len(plan.start) > 1:
            params["num_target"] = len(plan.start)

        def make_dataset(part: Part, reference: Any) -> Any:
            given = {
                "weight": part.weights,
                "base_margin": np.tile(plan.start, (part.x.shape[0], 1)),
                "feature_types": types,
                "enable_categorical": True,
                "nthread": params.get("n_jobs", params.get("nthread")),
            }
            if params.get("tree_method", "hist") in ("hist", "auto"):
                data = xgboost.QuantileDMatrix(part.x, ref=reference, max_bin=params.get("max_bin"), **given)
            else:
                data = xgboost.DMatrix(part.x, **given)
            if reference is not None:
                data.feature_names = reference.feature_names
            return with_labels(data, part.labels, part.where)

        data = make_dataset(train, None)
        log = Log(plan.metric, [make_dataset(part, data) for part in evaluated], plan.monitor)

        class Stop(TrainingCallback):
            def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
                return log.find_stop() is not None

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
        return booster, log

    def predict(self, booster: Any, x: Any, rounds: int | None, start: np.ndarray) -> np.ndarray:
        """Predicts margins by `Booster.predict`, from the start.

        In training, each tree corrects the float32 rounding of the sum before it, and the sum includes the start.
        """
        import xgboost

        types = None if is_frame(x) else booster.feature_types
        margins = np.tile(start, (x.shape[0], 1))
        data = xgboost.DMatrix(x, base_margin=margins, feature_types=types, enable_categorical=True)
        # For an array after a frame, or a frame after an array: scikit-learn has warned, and has counted the columns.
        data.feature_names = booster.feature_names
        return booster.predict(data, output_margin=True, iteration_range=(0, rounds or 0))

    def sum_gains(self, booster: Any) -> np.ndarray:
        """Returns the gain of each feature in all splits, `total_gain`."""
        found = booster.get_score(importance_type="total_gain")
        names = booster.feature_names or [f"f{i}" for i in range(booster.num_features())]
        return np.array([np.sum(found.get(name, 0.0)) for name in names])

    def has_splits(self, booster: Any) -> bool:
        """Tells whether any tree has a split."""
        return bool(booster.get_score(importance_type="weight"))


class LightGBM:
    """LightGBM's native interface."""

    def train(self, plan: Plan, train: Part, evaluated: Sequence[Part]) -> tuple[Any, Log]:
        """Trains by `lightgbm.train`. Returns the booster and its log."""
        import lightgbm

        params = {"verbosity": -1, **plan.params, "objective": plan.objective, "metric": "None"}
        if len(plan.start) > 1:
            params["num_class"] = len(plan.start)
        # LightGBM takes the categorical columns of a dataset; it ignores them among the parameters, with a warning.
        named = {alias: params.pop(alias) for alias in CATEGORICAL if alias in params}
        categories = _number_columns(named, train.x) if named else "auto"

        def make_dataset(part: Part, reference: Any) -> Any:
            n = part.x.shape[0]
            data = lightgbm.Dataset(
                part.x,
                np.zeros(n, np.float32),  # LightGBM wants labels of its own; the head reads the attached ones
                reference=reference,
                weight=part.weights,
                init_score=np.tile(plan.start, (n, 1)) if len(plan.start) > 1 else np.repeat(plan.start, n),
                categorical_feature=categories if reference is None else "auto",
                params={**params, "objective": "none"},
            )
            return with_labels(data, part.labels, part.where)

        data = make_dataset(train, None)
        log = Log(plan.metric, [make_dataset(part, data) for part in evaluated], plan.monitor)

        def stop(env: Any) -> None:
            if (best := log.find_stop()) is not None:
                raise lightgbm.EarlyStopException(best, env.evaluation_result_list)

        try:
            booster = lightgbm.train(
                params,
                data,
                plan.rounds,
                valid_sets=list(log.datasets),
                valid_names=log.names,
                feval=log if evaluated else None,
                callbacks=[*plan.callbacks, *([lightgbm.log_evaluation()] if plan.verbose else ()), stop],
            )
        except lightgbm.basic.LightGBMError as error:
            if "num_features()" not in str(error):
                raise
            raise ValueError(
                f"LightGBM finds no feature to split on: all are constant, or there are too few rows (n_samples="
                f"{train.x.shape[0]}). Give it more rows, or lower min_data_in_bin and min_data_in_leaf."
            ) from error
        if log.best is not None:
            booster.best_iteration = log.best + 1
        return booster, log

    def predict(self, booster: Any, x: Any, rounds: int | None, start: np.ndarray) -> np.ndarray:
        """Predicts margins by `Booster.predict`, which leaves the start out; in float64, as LightGBM trains."""
        margins = booster.predict(x, raw_score=True, num_iteration=-1 if rounds is None else rounds)
        return np.asarray(margins).reshape(-1, len(start)) + start

    def sum_gains(self, booster: Any) -> np.ndarray:
        """Returns the gain of each feature in all splits, `gain`."""
        return np.asarray(booster.feature_importance(importance_type="gain"))

    def has_splits(self, booster: Any) -> bool:
        """Tells whether any tree has a split."""
        return bool(booster.feature_importance(importance_type="split").any())


def _take_rows_of_table(x: Any, rows: np.ndarray) -> Any:
    """Takes some rows of an array, a sparse matrix, or a frame of any library."""
    if hasattr(x, "iloc"):  # pandas
        return x.iloc[rows]
    return x.take(rows) if is_frame(x) and hasattr(x, "take") else x[rows]  # pyarrow; polars and arrays


def _number_columns(named: Mapping[str, Any], x: Any) -> list[int]:
    """Returns the numbers of the categorical columns: LightGBM reads a list of plain integers."""
    (alias, given), *others = named.items()
    if others:
        raise ValueError(f"One list of columns says which are categories. Given {sorted(named)}.")
    names = [str(name) for name in names_of(x)] if is_frame(x) else []
    known = {**{i: i for i in range(x.shape[1])}, **{name: i for i, name in enumerate(names)}}
    if not isinstance(given, (list, tuple, np.ndarray)) or not all(column in known for column in given):
        legal = f"0 ... {x.shape[1] - 1}" + (f" or {names[:10]}" if names else "")
        raise ValueError(f"{alias} must be a list of columns, of {legal}. Given {given!r}.")
    return [known[column] for column in given]


ENGINES = {"xgboost": XGBoost(), "lightgbm": LightGBM()}
