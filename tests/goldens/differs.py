"""Which golden cases differ on purpose, and what this library does instead.

`test_goldens.py` holds one check for each; a case that is not listed here is required.
"""

from __future__ import annotations

HIDDEN = "a zero weight hides even a NaN, and the row still counts in the divisor"
BAD_VALUE = "a NaN label is refused in a host array, and under jit loss and gradient are NaN"
NEGATIVE = "a negative weight is refused in a host array, and under jit loss and gradient are NaN"
NO_SPARSE = "no sparse tensors: refused in words; rows of equal length are an array"
IDS = "integer ids in range are accepted, vocabulary or not"
SOFT = "a soft label y is weight y positive and 1 - y negative in every metric that counts"
NEGATIVE_COUNT = "a negative count is refused in a host array, and under jit loss and gradient are NaN"
NAMED = "refused with words that name the argument and the value"

DIFFERS = {
    "regression/nan_label_with_zero_weight": HIDDEN,
    "regression/nan_label_and_inf_logit": BAD_VALUE,
    "regression/weights_negative": NEGATIVE,
    "regression/error/loss_reduction_unknown": "'mean' is a reduction; another word is refused",
    "regression/error/labels_sparse": NO_SPARSE,
    "regression/error/labels_string": "refused with words that name the strings",
    "regression/error/weight_string_values": "refused with words that name the weights",
    "regression/error/features_none": "features=None is no features",
    "regression/error/regularization_empty_list": "an empty list of regularization losses is 0",
    "regression/error/predictions_keys_arg": "regression takes prediction keys too",
    "binary_class/soft_labels": SOFT,
    "binary_class/vocabulary_of_three": "refused at construction; two words give those numbers",
    "binary_class/weights_negative": NEGATIVE,
    "binary_class/ties_quarter_three_quarters": "hangs on the last bit of a sigmoid",
    "binary_class/error/labels_sparse": NO_SPARSE,
    "binary_class/error/labels_string_no_vocabulary": "refused, and label_vocabulary is named",
    "binary_class/error/labels_int_with_vocabulary": IDS,
    "binary_class/error/vocabulary_duplicate": "refused at construction, with the repeated word",
    "multi_class/error/labels_sparse": NO_SPARSE,
    "multi_class/error/labels_int_with_vocabulary": IDS,
    "multi_class/error/labels_int8": "any integer dtype is accepted",
    "keras_metrics/threshold_soft": SOFT,
    "poisson_regression/negative_labels_full": NEGATIVE_COUNT,
    "poisson_regression/negative_labels_not_full": NEGATIVE_COUNT,
    "multi_label/soft_labels": SOFT,
    "multi_label/error/labels_bool_dense": "a multi-hot array may be bool",
    "multi_label/error/sparse_string_no_vocabulary": NAMED,
    "multi_label/error/sparse_out_of_vocabulary": NAMED,
    "multi_label/error/dense_string_with_vocabulary": NAMED,
    "multi_head/duplicate_names": "refused at construction; with two names each head has its own logits",
    "multi_head/error/labels_none": NAMED,
    "multi_head/error/loss_reduction_auto_vs_sobs": "'auto' is SUM_OVER_BATCH_SIZE, so the two are the same",
    "sequential/logits_rank2": "refused: the leading axes of a sequence's logits are [B, T], the last is the head's",
    "sequential/error/multi_head_inside": "a MultiHead may be inside",
    "sequential/error/sparse_too_few": "no sparse tensors; a step that is there without a legal label is refused",
    "sequential/error/mask_wrong_shape": NAMED,
    "sequential/error/labels_none": NAMED,
    "sequential/error/regression_predictions": "regression takes prediction keys, so the wrapper does",
    "estimator_spec/rule/train_variables_dict": "trainable_variables is any pytree",
    "estimator_spec/rule/train_update_ops_not_list": "update_ops is any pytree",
    "estimator_spec/rule/mode_unknown_simple_head": "an unknown mode is refused by every head, as by MultiHead there",
}

# Decided after the list of excused cases was made.
SINCE = {
    "multi_class/error/n_classes_2": "two classes may have a logit each",
    "multi_label/error/weight_per_class": "an entry may have a weight of its own, and counts as its part of a row",
}
DIFFERS |= SINCE

# Excused, accidents among them, and yet all their numbers are TensorFlow's.
REQUIRED_ANYWAY = (
    "keras_metrics/auc_soft_labels",  # with Keras's cast done by the caller
    "poisson_regression/extreme_logits",
    "binary_class/thresholds_duplicate",
    "multi_label/class_metrics_duplicate",
    "multi_head/head_weights_zero_and_negative",
    "multi_head/nested",
)

# Of every `MultiHead` case `loss/NAME` differs after more than one batch: it is the loss of all data seen, not a mean
# of batch means. `oracle.pooled_losses` says what it is instead; everything else in those cases is required.
POOLED = "loss/"
