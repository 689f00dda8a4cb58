"""Parameters of the boosters that a `BoostedHead` refuses, because under a head they would do nothing or harm."""

from collections.abc import Mapping
from typing import Any

_DECIDED = "The head decides {}: leave them out, or choose another head."
_ROUNDS = "The number of rounds is n_estimators. Given {} too; leave them out."
_STOPPING = "To stop early pass early_stopping_rounds= and monitor=. Given {}."
_IDLE = (
    "{} belong to the booster's own objectives and would do nothing under a head. Weigh rows and classes by fit(..., "
    "sample_weight=...); choose the loss by the head and its loss_fn."
)
_SHARED = (
    "LightGBM grows a tree for each logit. Given multi_strategy, which is XGBoost's: use booster='xgboost' for trees "
    "that all logits share, or leave it out."
)
_OF_BOTH = {
    _ROUNDS: "num_boost_round num_iterations num_iteration n_iter num_tree num_trees num_round num_rounds nrounds "
    "max_iter",
    _STOPPING: "early_stopping_round early_stopping n_iter_no_change early_stopping_min_delta first_metric_only",
}
# The names include the library's aliases.
_OF_ONE = {
    "xgboost": {
        _DECIDED: "objective eval_metric base_score num_class num_target disable_default_eval_metric",
        _IDLE: "scale_pos_weight class_weight quantile_alpha expectile_alpha huber_slope tweedie_variance_power "
        "aft_loss_distribution aft_loss_distribution_scale",
    },
    "lightgbm": {
        _DECIDED: "objective objective_type app application loss metric metrics metric_types num_class num_classes "
        "boost_from_average eval_metric",
        _IDLE: "scale_pos_weight class_weight is_unbalance unbalance unbalanced_sets sigmoid alpha fair_c "
        "tweedie_variance_power reg_sqrt",
        _SHARED: "multi_strategy",
    },
}

# Parameters of the libraries' scikit-learn estimators. `train` does not read them; the text says what to do instead.
_CATEGORIES = "columns of dtype category of a frame are split on as such; of an array, name them in "
_NATIVE = "parameters stand beside the head, BoostedHead(head, max_depth=3)"
_ELSEWHERE = {
    "missing": "a missing value is NaN; put it there in X",
    "importance_type": "feature_importances_ is the share in the gain; booster_ knows the others",
    "params": _NATIVE,
    "kwargs": _NATIVE,
    "callbacks": "give them to fit",
    "feature_names": "give X as a frame, whose columns have names",
}
ELSEWHERE = {
    "xgboost": {
        **dict.fromkeys(("enable_categorical", "categorical_feature"), _CATEGORIES + 'feature_types=["c", "q", ...]'),
        "feature_weights": "the booster knows them of a dataset alone; train it natively with xgboost_objective(head)",
        **_ELSEWHERE,
    },
    "lightgbm": {
        **dict.fromkeys(("feature_types", "enable_categorical"), _CATEGORIES + "categorical_feature=[0, ...]"),
        **_ELSEWHERE,
    },
}


def check_params(params: Mapping[str, Any], booster: str, early_stopping_rounds: int | None) -> None:
    """Refuses parameters of the booster that would do nothing, or that the head decides."""
    for message, names in {**_OF_ONE[booster], **_OF_BOTH}.items():
        if given := [key for key in params if key in names.split()]:
            raise ValueError(message.format(given))
    for key in params:
        if key in ELSEWHERE[booster]:
            raise ValueError(f"{key} is no parameter here and would do nothing: {ELSEWHERE[booster][key]}.")
    if booster == "xgboost":
        return
    kind = next((str(params[alias]) for alias in ("boosting", "boosting_type", "boost") if alias in params), "gbdt")
    if kind in ("rf", "random_forest"):
        raise ValueError(
            f"LightGBM's random forests take no objective but its own, and no logits to start from. Given {kind!r}. "
            'Boost instead ("gbdt", "dart").'
        )
    if kind == "dart" and early_stopping_rounds is not None:
        raise ValueError(
            "DART changes the weights of earlier trees, so no earlier round can be gone back to. Given "
            f"early_stopping_rounds={early_stopping_rounds!r}. Leave one of them out."
        )
