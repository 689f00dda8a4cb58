"""Any number of n classes at once."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads import spec
from jaxheads.contract import LabelSpec, Rows, Term
from jaxheads.heads import class_options, constants, scoring
from jaxheads.losses.weighted import Options, sigmoid_losses
from jaxheads.metrics import ColumnMeans, GrowingGrid, Observation, Scores
from jaxheads.metrics.base import SCORES, join_names
from jaxheads.metrics.grids import AbstractGrid
from jaxheads.numerics import brief, inputs, masking, stable, vocabulary

PROBABILITY_MEAN = "probability_mean"


class MultiLabelHead(class_options.AbstractClassHead):
    """Classification into any number of `n_classes` classes for each example.

    **Domain**: `labels` are multi-hot `[D0, ..., DN, n_classes]`: int, bool, or numbers in [0, 1]. In every metric, a
    soft label y counts as a positive of weight y and a negative of weight 1 - y. `encode_labels` makes multi-hot labels
    from lists of class ids or names, with one list for each example, nested to the depth of the leading axes. An eager
    call also takes lists of names. `where` and `weights` may have the shape of the logits, for example where the labels
    of some classes are missing.

    **Link**: `P(y_k = 1) = sigmoid(z_k)`, independently for each class.

    **loss** = the mean over classes of `softplus(z_k) - y_k z_k`, or `loss_fn`; `[..., 1]`. With masks or weights of
    single entries the loss of a batch is the mean over the entries that exist. With `reduce_classes="sum"` it is the
    sum over the classes that exist, and the loss of a batch the mean over rows. With options each entry has the loss of
    a `BinaryClassHead` with them.

    **Predictions**: `logits [..., n]`, `probabilities [..., n]`; with a `decision_threshold` also `class_ids [..., n]`
    (int32, 1 where p > threshold); `decode_predictions` adds `classes` and `all_classes`, both the names behind the
    last axis, `[D0, n]`.
    **Metrics**: `average_loss`; over all entries of all examples (micro average) `auc`, `auc_precision_recall`, and for
    each threshold t `accuracy|precision|recall/positive_threshold_t` (positive: p > t); for each class c of
    `classes_for_class_based_metrics` `probability_mean/c`, `auc/c`, `auc_precision_recall/c`, where c is its name or
    `class7`; with a `decision_threshold` `accuracy`, `precision` and `recall` of all entries; `regularization_loss` if
    a regularization is given. All are float32. All areas come from one histogram with `bins`.
    `with_metrics(jh.metrics...)` adds metrics that read the source `"scores"`, over all entries or for each class.

    Args:
        n_classes: at least 2.
        weight_column: a key of `features`, or a function `features -> weights`; one weight for each example.
        thresholds: numbers in (0, 1).
        label_vocabulary: the names of the classes.
        loss_reduction: a `Reduction` or its text.
        loss_fn: `loss_fn(labels, logits[, features])` returns one loss for each example, `[..., 1]`; its labels are
            float32. Other arguments must be keyword-only with a default, or bound by `functools.partial`.
        classes_for_class_based_metrics: class ids, or names of the vocabulary.
        name: is appended to the metric keys.
        bins: `GrowingGrid()` (default), `LogitGrid(low, high, n)`, or `ThresholdGrid(200)` for TensorFlow's numbers.
        reduce_classes: `"mean"` or `"sum"`, over the classes of a row.
        decision_threshold: the probability above which a class is predicted, one number or one for each class;
            without one it is z > 0 wherever a decision is needed. Metrics of decisions without a threshold of their own
            follow it; with one for each class they need `average=`. `head.at_threshold(t)` gives the head with another.
        label_smoothing: the part e of labels that is spread over both values: `(1 - e) y + e / 2`, as in Keras.
        class_weights: the factor of the loss of each class, or a dict by class (name or id) in which a class that is
            left out weighs 1. A part of the loss, no multiplicities: metrics do not see them, and the mean over classes
            is not divided by them.
        pos_weight: the factor of the loss of positives, one number or one for each class, as in PyTorch.
        focal_gamma: the exponent g of the focal loss.
        focal_alpha: the factor of positives in the focal loss, and 1 less it of negatives; a number, or one for each
            class.
        logit_adjustment: the share of positives of each class, or its logarithm; one number or one for each class. The
            loss takes `z + ln(share / (1 - share))` in place of z. `"running"` counts the weighted entries in training,
            from one of each kind on.

    Raises:
        ValueError: options of the loss beside a `loss_fn`, or outside their range; `n_classes` below 2; thresholds
            outside (0, 1), or two that print alike; a vocabulary of another length; unknown classes in
            `classes_for_class_based_metrics`; labels outside [0, 1], unknown ids or unknown names in an unmasked
            example.

    Source: `tf.estimator.MultiLabelHead` (TensorFlow 2.15).

    >>> import jax.numpy as jnp
    >>> import jaxheads as jh
    >>> head = jh.MultiLabelHead(3, label_vocabulary=("sea", "sun", "sand"), classes_for_class_based_metrics=["sun"])
    >>> labels = head.encode_labels([["sun"], ["sand", "sea"]])
    >>> labels
    array([[0., 1., 0.],
           [1., 0., 1.]], dtype=float32)
    >>> logits = jnp.array([[-1.0, 1.0, -1.0], [-1.5, 1.5, 2.5]])
    >>> values = head.measure(labels=labels, logits=logits).compute()
    >>> print(*(f"{key} {values[key]:.4f}" for key in ("average_loss", "auc", "probability_mean/sun")), sep=", ")
    average_loss 0.7369, auc 0.5556, probability_mean/sun 0.7743

    The original's documented example:

    >>> head = jh.MultiLabelHead(2)
    >>> labels, logits = jnp.array([[1, 0], [1, 1]]), jnp.array([[-1.0, 1.0], [-1.5, 1.5]])
    >>> print(f"{head.loss(labels=labels, logits=logits):.2f}")  # (1.3133 + 0.9514) / 2
    1.13
    >>> values = head.measure(labels=labels, logits=logits).compute()
    >>> print(f"auc {values['auc']:.2f}, auc_precision_recall {values['auc_precision_recall']:.2f}")
    auc 0.33, auc_precision_recall 0.77
    """

    n_classes: int
    _: dataclasses.KW_ONLY
    thresholds: Sequence[float] | None = None
    label_vocabulary: Sequence[str] | None = None
    classes_for_class_based_metrics: Sequence[int | str] | None = None
    bins: AbstractGrid = GrowingGrid()
    reduce_classes: str = "mean"
    decision_threshold: float | Sequence[float] | Mapping[Any, float] | None = None
    pos_weight: float | Sequence[float] | Mapping[Any, float] | None = None

    higher_is_better = scoring.HIGHER_IS_BETTER

    def validate(self) -> None:
        n = self.n_classes
        if not inputs.is_integer(n, 2):
            raise ValueError(f"n_classes must be an integer > 1 for multi-label classification. Given: {n!r}.")
        scoring.check_thresholds(self.thresholds)
        vocabulary.check(self.label_vocabulary, n, "MultiLabelHead")
        super().validate()
        scoring.check_bins(self.bins)
        self._find_watched()
        if not brief.is_one_of(self.reduce_classes, ("mean", "sum")) or self.reduce_classes is None:
            raise ValueError(f'reduce_classes must be "mean" or "sum". Given {brief.tell(self.reduce_classes)}.')
        if self.loss_fn is not None and self.reduce_classes != "mean":
            raise ValueError(
                f"reduce_classes is a part of this head's own loss. Given {self.reduce_classes!r} and a loss_fn. Take "
                "the sum in the loss_fn."
            )
        if isinstance(self.decision_threshold, tuple) and len(self.decision_threshold) != n:
            raise ValueError(
                f"decision_threshold must be one probability, or one for each of {n} classes. Given "
                f"{len(self.decision_threshold)}."
            )
        for threshold in self._as_each(self.decision_threshold) or ():
            scoring.check_decision_threshold(threshold)
        self.check_options(n)
        for name, expected, is_legal in (
            ("pos_weight", "a finite number above 0", lambda x: x > 0),
            ("focal_alpha", "a number in [0, 1]", lambda x: 0 <= x <= 1),
        ):
            if getattr(self, name) is not None:
                class_options.check_each(name, self._as_each(getattr(self, name)), n, expected, is_legal)
        self._find_log_odds()

    def _as_each(self, values: Any) -> Any:
        """Returns one number for each class."""
        return values if values is None or isinstance(values, tuple) else (values,) * self.n_classes

    @property
    def class_keys(self) -> tuple[Any, ...]:
        return tuple(self.label_vocabulary or range(self.n_classes))

    @property
    def option_names(self) -> tuple[str, ...]:
        return (*super().option_names, "pos_weight")

    @property
    def by_class(self) -> tuple[str, ...]:
        return (*super().by_class, "pos_weight", "decision_threshold")

    def _find_options(self) -> Options:
        negative = positive = np.asarray(self.class_weights or 1.0)
        if self.pos_weight is not None:
            positive = positive * np.asarray(self.pos_weight)
        if self.focal_alpha is not None:
            alpha = np.asarray(self.focal_alpha)
            negative, positive = negative * (1 - alpha), positive * alpha
        plain = self.class_weights is self.pos_weight is self.focal_alpha is None
        weights = None if plain else (negative, positive)
        return Options(self.label_smoothing, weights, self.focal_gamma, self._find_log_odds())

    def _find_log_odds(self) -> Any:
        """Returns the log odds of the share of each class; None without `logit_adjustment`."""
        if self.logit_adjustment == class_options.RUNNING:
            return None if self.class_counts is None else self.log_counts[1] - self.log_counts[0]
        if self.logit_adjustment is None:
            return None
        shares = self._as_each(self.logit_adjustment)
        class_options.check_each("logit_adjustment", shares, self.n_classes, "a share of positives", lambda x: x != 0)
        return tuple(stable.log_odds(class_options.as_share("logit_adjustment", x)) for x in shares)

    @property
    def counts_shape(self) -> tuple[int, ...]:
        return 2, self.n_classes

    def count_classes(self, labels: jax.Array, logits: jax.Array, weights: jax.Array) -> jax.Array:
        return self.count_two(labels, weights)

    def _find_watched(self) -> dict[str, int]:
        """Returns the ids of the classes with metrics of their own, by their names in metric keys."""
        names, watched = self.label_vocabulary, {}
        chosen = () if self.classes_for_class_based_metrics is None else self.classes_for_class_based_metrics
        if not isinstance(chosen, tuple):
            raise ValueError(f"classes_for_class_based_metrics must be a list of ids or names. Given {chosen!r}.")
        for c in chosen:
            if isinstance(c, str):
                if names is None:
                    raise ValueError(
                        "label_vocabulary must be provided when classes_for_class_based_metrics are strings. Given "
                        f"{c!r}."
                    )
                if c not in names:
                    raise ValueError(
                        f"classes_for_class_based_metrics: {c!r} is not in the label_vocabulary {tuple(names)!r}."
                    )
                c = names.index(c)
            if not inputs.is_integer(c, 0, self.n_classes - 1):
                raise ValueError(
                    f"All classes_for_class_based_metrics must be in range [0, {self.n_classes - 1}], or names of the "
                    f"label_vocabulary. Given: {c!r}."
                )
            watched[names[c] if names else f"class{c}"] = c
        return watched

    @property
    def logits_dimension(self) -> int:
        return self.n_classes

    @property
    def label_spec(self) -> LabelSpec:
        return LabelSpec(self.n_classes, "float", 0, 1)

    def to_array(self, labels: Any, ids: bool) -> Any:
        if inputs.is_text(labels) and labels.size:
            raise ValueError(
                "labels of a multi-label head are multi-hot arrays, or lists of names. Given an array of strings (dtype"
                f" str, e.g. {str(labels.flat[0])!r}) of shape {labels.shape}: if each row lists names, pass "
                "labels.tolist()."
            )
        lists = isinstance(labels, (list, tuple))
        named = vocabulary.has_names(labels) or (self.vocabulary is not None and vocabulary.is_empty(labels))
        return vocabulary.multi_hot(labels, self.n_classes, self.vocabulary) if lists and (ids or named) else labels

    @property
    def per_logit_weights(self) -> bool:
        return self.loss_fn is None

    @property
    def per_logit_where(self) -> bool:
        return self.loss_fn is None

    def losses(self, labels: jax.Array, logits: jax.Array, features: Any = None, rows: Rows | None = None) -> Any:
        if rows is None or max(rows.exists.shape[-1], rows.weights.shape[-1]) == 1:
            return super().losses(labels, logits, features)
        # Entries have their own masks or weights. Under a mean each counts as 1 / n_classes of a row; under a sum all
        # that exist count as one row.
        entries = sigmoid_losses(labels, logits, self._find_options())
        if self.reduce_classes == "mean":
            return Term(entries / self.n_classes, masking.ones_like(entries) / self.n_classes)
        exists = rows.exists.astype(jnp.float32) * masking.ones_like(entries)
        return Term(entries, exists / jnp.maximum(jnp.sum(exists, axis=-1, keepdims=True), 1))

    def standard_losses(self, labels: jax.Array, logits: jax.Array) -> jax.Array:
        reduce = jnp.mean if self.reduce_classes == "mean" else jnp.sum
        return reduce(sigmoid_losses(labels, logits, self._find_options()), axis=-1, keepdims=True)

    def standard_constant(self, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return constants.sigmoid_constant(labels, weights, self._find_options())

    def at_threshold(self, threshold: float | Sequence[float] | Mapping[Any, float]) -> "MultiLabelHead":
        """Returns the same head with another `decision_threshold`: for all classes, for each, or a dict by class."""
        return dataclasses.replace(self, decision_threshold=threshold)

    def outputs(self, logits: jax.Array) -> dict[str, Any]:
        out = {"logits": logits, "probabilities": lambda: jax.nn.sigmoid(logits)}
        if self.decision_threshold is None:
            return out
        return {**out, "class_ids": lambda: scoring.decide(logits, self.decision_threshold)}

    def observe(self, labels: jax.Array, logits: jax.Array) -> dict[str, Observation]:
        classes = tuple(self._find_watched().values())
        seen: dict[str, Observation] = {SCORES: self._make_scores(labels, logits, classes)}
        if self.decision_threshold is not None:
            seen |= scoring.observe_decisions(labels, logits, self.decision_threshold)
        return {**seen, PROBABILITY_MEAN: ColumnMeans(jax.nn.sigmoid(logits), classes)} if classes else seen

    def _make_scores(self, labels: jax.Array, logits: jax.Array, classes: tuple[int, ...]) -> Scores:
        decision: Any = self.decision_threshold
        single = (decision,) if isinstance(decision, (int, float)) else ()
        thresholds = tuple(dict.fromkeys((*(self.thresholds or ()), *single)))
        names = tuple(self.label_vocabulary or ())
        return Scores(labels, logits, self.bins, thresholds, classes, names, decision=decision)

    def sources(self, labels: jax.Array, logits: jax.Array) -> dict[str, Callable[[], Observation]]:
        return {SCORES: lambda: self._make_scores(labels, logits, ())}

    def summarize(self, seen: Mapping[str, Any]) -> dict[str, Any]:
        scores = seen[SCORES]
        out = {"auc": scores.roc_auc(), "auc_precision_recall": scores.pr_auc()}
        out |= scoring.at_thresholds(scores, self.thresholds)
        if self.decision_threshold is not None:
            out |= {key: seen[key].mean for key in scoring.DECISIONS}
        for i, (name, column) in enumerate(self._find_watched().items()):
            out[join_names(PROBABILITY_MEAN, name)] = seen[PROBABILITY_MEAN].mean[..., i]
            out[join_names("auc", name)] = scores.columns[column].roc_auc()
            out[join_names("auc_precision_recall", name)] = scores.columns[column].pr_auc()
        return out

    def signatures(self, predictions: Mapping[str, Any]) -> dict[str, spec.ExportOutput]:
        return spec.classification_signatures(predictions, self.class_names())

    def decode_predictions(self, predictions: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Returns NumPy arrays; `classes` and `all_classes` are both the names behind the last axis, `[D0, n]`."""
        out = super().decode_predictions(predictions)
        return {**out, "classes": out["all_classes"]} if "all_classes" in out else out

    def class_names(self) -> tuple[str, ...]:
        return scoring.class_names(self.label_vocabulary, self.n_classes)
