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
    "binary_class/thresholds_duplicate": "equal thresholds are one threshold, counted once",
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
}
