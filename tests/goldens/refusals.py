"""What a refusal has to say: every word stands in the message of the `ValueError`.

Keyed by the case's id, or by what follows `error/` where the families agree. The words are what a
person needs to mend the call: the argument's name and the offending value, or both shapes.
"""

from __future__ import annotations

REFUSALS = {
    "label_dimension_0": ("label_dimension", "0"),
    "label_dimension_-1": ("label_dimension", "-1"),
    "n_classes_None": ("n_classes", "None"),
    "n_classes_2": ("n_classes", "2"),
    "n_classes_1": ("n_classes", "1"),
    "n_classes_-1": ("n_classes", "-1"),
    "factory_one_class": ("n_classes", "1"),
    "loss_reduction_none": ("reduction", "none"),
    "loss_reduction_v1_name": ("reduction", "weighted_sum_by_nonzero_weights"),
    "loss_fn_bad_no_labels": ("loss_fn", "labels"),
    "loss_fn_bad_no_logits": ("loss_fn", "logits"),
    "loss_fn_bad_extra_arg": ("loss_fn", "name"),
    "loss_fn_wrong_shape": ("loss_fn", "(2,)", "(2, 1)"),
    "multi_class/error/loss_fn_wrong_shape": ("loss_fn", "(2, 3)", "(2, 1)"),
    "thresholds_0": ("thresholds", "0.0"),
    "thresholds_1": ("thresholds", "1.0"),
    "thresholds_2": ("thresholds", "1.5"),
    "thresholds_3": ("thresholds", "-0.1"),
    "vocabulary_str": ("label_vocabulary", "str"),
    "vocabulary_set": ("label_vocabulary", "set"),
    "vocabulary_wrong_length": ("label_vocabulary", "2", "3"),
    "labels_none": ("labels", "none"),
    "labels_scalar": ("labels", "()"),
    "labels_wrong_dim": ("labels", "(2, 1)", "(2, 3)"),
    "binary_class/error/labels_wrong_dim": ("labels", "(2, 2)", "(2, 1)"),
    "labels_wrong_batch": ("labels", "(3, 1)", "(2, 1)"),
    "labels_rank_too_high": ("labels", "(2, 1, 1)", "(2, 1)"),
    "labels_float": ("labels", "integer", "float32"),
    "labels_bool": ("labels", "integer", "bool"),
    "labels_string_no_vocabulary": ("labels", "label_vocabulary"),
    "labels_one_hot": ("labels", "(2, 3)", "one-hot"),
    "binary_class/error/labels_too_large": ("labels", "1.2"),
    "multi_class/error/labels_too_large": ("labels", "45"),
    "binary_class/error/labels_negative": ("labels", "-1"),
    "multi_class/error/labels_negative": ("labels", "-5"),
    "labels_nan": ("labels", "nan"),
    "labels_out_of_vocabulary": ("label_vocabulary", "zzz"),
    "labels_third_of_vocabulary": ("label_vocabulary", "zuko"),
    "logits_rank1": ("logits", "(2,)"),
    "logits_wrong_dim": ("logits", "(2, 1)", "3"),
    "binary_class/error/logits_two_columns": ("logits", "(2, 2)", "1"),
    "multi_class/error/logits_two_columns": ("logits", "(1, 2)", "3"),
    "binary_class/error/predictions_invalid_key": ("some_invalid_key", "'probabilities'"),
    "multi_class/error/predictions_invalid_key": ("'logistic'", "'probabilities'"),
    "weight_feature_missing": ("weight_column", "feature w", "features"),
    "weight_wrong_batch": ("features['w']", "(3, 1)", "(2, 1)"),
    "binary_class/error/weight_wrong_batch": ("features['w']", "(3,)", "(2, 1)"),
    "weight_wrong_last_dim": ("features['w']", "(1, 3)", "(1, 2)"),
    "weight_rank3_inner_mismatch": ("features['w']", "(2, 1)", "(2, 2, 1)"),
    "weight_two_columns": ("features['w']", "(2, 2)", "(2, 1)"),
    "weight_per_class": ("features['w']", "(2, 3)"),
    "weight_scalar": ("features['w']", "()"),
    "weight_sparse": ("features['w']", "sparse"),
    "weight_column_not_str": ("weight_column", "int"),
    "update_metrics_labels_wrong_batch": ("labels", "(3, 1)", "(2, 1)"),
    "update_metrics_bad_labels": ("labels", "2"),
}


def words(case_id: str) -> tuple[str, ...]:
    """The words that the refusal of this case has to hold."""
    return REFUSALS.get(case_id) or REFUSALS[case_id.rpartition("error/")[2]]
