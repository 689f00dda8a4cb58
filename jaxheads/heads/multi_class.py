"""One of n classes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads import metrics, spec
from jaxheads.contract import LabelSpec
from jaxheads.heads import class_options, constants, scoring
from jaxheads.losses.weighted import Options, softmax_losses
from jaxheads.metrics import Mean, Observation, Scores
from jaxheads.metrics.base import CONFUSION, RANKS, SCORES
from jaxheads.numerics import brief, inputs, masking, meshes, stable, vocabulary

IDS, DISTRIBUTIONS = "ids", "distributions"


class MultiClassHead(class_options.AbstractClassHead):
    """Classification into one of `n_classes` classes.

    **Domain**: `labels` are integer class ids 0 ... n_classes - 1, `[D0, ..., DN, 1]` or `[D0, ..., DN]`. Eager calls
    and `encode_labels` also take the names of a `label_vocabulary`. One-hot and float labels are refused. With
    `label_kind="distributions"` labels are shares `[D0, ..., DN, n_classes]` in [0, 1] that add up to 1 within 0.01
    (mixup, distillation, several true classes); ids and names are then encoded on the host, as one-hot rows. In every
    metric, such a label counts as `share_k` of a row of class k.

    **Link**: `P(y = k) = softmax(z)_k`.

    **loss** = `logsumexp(z) - z_y`, or `loss_fn`; `[..., 1]`. With options, or distributions as labels, it is
    `sum_k w_k q_k (1 - p_k)^g (-ln p_k) + c logsumexp(z)^2`, for the smoothed label q, the class weights w and the
    shifted z.

    **Predictions**: `logits [..., n]`, `probabilities [..., n]`, `class_ids [..., 1]` (int32; the first of equal
    maxima), `all_class_ids [D0, n]`; `decode_predictions` adds `classes` and `all_classes`.
    **Metrics**: `average_loss`, `accuracy`, and `regularization_loss` if a regularization is given. All are float32.
    `with_metrics` adds metrics that read `"confusion"`, the confusion matrix; `"ranks"`, the rank of the label; or
    `"scores"`, for each class the log odds of its probability against all other classes.

    Args:
        n_classes: at least 2. A network of one logit for two classes has a `BinaryClassHead`.
        weight_column: a key of `features`, or a function `features -> weights`.
        label_vocabulary: the names of the classes.
        loss_reduction: a `Reduction` or its text.
        loss_fn: `loss_fn(labels, logits[, features])` returns one loss for each element, `[..., 1]`; its labels are
            int32 `[..., 1]`, or float32 `[..., n]` if they are distributions. Other arguments must be keyword-only with
            a default, or bound by `functools.partial`.
        name: is appended to the metric keys.
        label_kind: `"ids"`, or `"distributions"`.
        label_smoothing: the part e of labels that is spread over all classes: `q = (1 - e) y + e / n`, as in optax. T5X
            and flax' examples spread e over the other n - 1 classes, and subtract the entropy of q, a constant: their
            gradient is that of `label_smoothing=e * n / (n - 1)` here.
        class_weights: the factor of the loss of each class, or a dict by class (name or id) in which a class that is
            left out weighs 1; `jh.balanced_class_weights` makes them. They multiply each class's part of a smoothed or
            mixed label, as in PyTorch (in Keras the row, by its largest label). A part of the loss, no multiplicities:
            metrics and denominators do not see them (PyTorch's mean divides by the weights of the labels).
        focal_gamma: the exponent g of the focal loss.
        focal_alpha: the factor of the focal loss, one number, or one for each class, as in Keras.
        logit_adjustment: the share of each class, or its logarithm, or a dict by class; the loss takes `z_k + ln
            share_k` in place of `z_k` (Menon et al. 2021). `"running"` counts the weighted rows in training, from one
            of each class on; the counts are then a running field.
        z_loss: the factor c of the squared logsumexp, as in T5X; class weights do not multiply it.

    Raises:
        ValueError: options of the loss beside a `loss_fn`, or outside their range; `n_classes` below 2; a vocabulary of
            another length; a `loss_fn` with other arguments or another result shape; labels that are not integers;
            labels out of range, or a name outside the vocabulary, in an unmasked row.

    Source: `tf.estimator.MultiClassHead` (TensorFlow 2.15).

    >>> import jax.numpy as jnp
    >>> import jaxheads as jh
    >>> head = jh.MultiClassHead(3, label_vocabulary=("ant", "bee", "cat"))
    >>> logits = jnp.array([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    >>> head.measure(labels=["bee", "cat"], logits=logits).compute()["accuracy"]
    0.5
    >>> head.decode_predictions(head.predictions(logits, "class_ids"))["classes"].tolist()
    [['bee'], ['ant']]

    The original's documented example:

    >>> head = jh.MultiClassHead(3)
    >>> labels, logits = jnp.array([1, 1]), jnp.array([[10.0, 0.0, 0.0], [0.0, 10.0, 0.0]])
    >>> print(f"{head.loss(labels=labels, logits=logits):.2f}")  # (10 + 0) / 2
    5.00
    """

    n_classes: int
    _: dataclasses.KW_ONLY
    label_vocabulary: Sequence[str] | None = None
    label_kind: str = IDS
    z_loss: float = 0.0

    higher_is_better = scoring.HIGHER_IS_BETTER

    def validate(self) -> None:
        n = self.n_classes
        if not inputs.is_integer(n, 2):
            raise ValueError(
                f"n_classes must be an integer > 1. Given: {n!r}. For one logit of two classes use BinaryClassHead()."
            )
        vocabulary.check(self.label_vocabulary, n, "MultiClassHead")
        if not brief.is_one_of(self.label_kind, (IDS, DISTRIBUTIONS)) or self.label_kind is None:
            raise ValueError(f"label_kind must be {IDS!r} or {DISTRIBUTIONS!r}. Given {brief.tell(self.label_kind)}.")
        super().validate()
        self.check_options(n)
        class_options.check_number("z_loss", self.z_loss, "a finite number of at least 0", lambda x: x >= 0)
        if isinstance(self.focal_alpha, tuple):
            class_options.check_factors("focal_alpha", self.focal_alpha, n)
        elif self.focal_alpha is not None:
            class_options.check_number("focal_alpha", self.focal_alpha, "a finite number above 0", lambda x: x > 0)
        self._find_log_shares()

    @property
    def logits_dimension(self) -> int:
        return self.n_classes

    @property
    def label_spec(self) -> LabelSpec:
        if self.label_kind == DISTRIBUTIONS:
            return LabelSpec(self.n_classes, "float", 0, 1, total=1)
        return LabelSpec(1, "int", 0, self.n_classes - 1)

    def to_array(self, labels: Any, ids: bool) -> Any:
        if self.label_kind == IDS:
            return labels
        return vocabulary.one_hot(labels, self.n_classes, self.vocabulary)

    @property
    def class_keys(self) -> tuple[Any, ...]:
        return tuple(self.label_vocabulary or range(self.n_classes))

    @property
    def option_names(self) -> tuple[str, ...]:
        return (*super().option_names, "z_loss")

    def standard_losses(self, labels: jax.Array, logits: jax.Array) -> jax.Array:
        return softmax_losses(labels, logits, self._find_options())

    def _find_options(self) -> Options:
        weights = self.class_weights
        if self.focal_alpha is not None:
            weights = np.asarray(weights or 1.0) * np.asarray(self.focal_alpha) * np.ones(self.n_classes)
        return Options(self.label_smoothing, weights, self.focal_gamma, self._find_log_shares(), self.z_loss)

    def _find_log_shares(self) -> Any:
        """Returns the logarithms of the shares of the classes, or of their counts; None without `logit_adjustment`."""
        if self.logit_adjustment == class_options.RUNNING:
            return None if self.class_counts is None else self.log_counts - jnp.log(jnp.sum(self.class_counts))
        if self.logit_adjustment is None:
            return None
        return np.log(class_options.as_shares("logit_adjustment", self.logit_adjustment, self.n_classes))

    def count_classes(self, labels: jax.Array, logits: jax.Array, weights: jax.Array) -> jax.Array:
        return masking.column_totals(masking.weighted(self._as_shares(labels, logits), weights))

    def _as_shares(self, labels: jax.Array, logits: jax.Array) -> jax.Array:
        """Returns labels as shares `[..., n]`, laid out as the logits are, one-hot where they are ids."""
        if self.label_kind == DISTRIBUTIONS:
            return labels * masking.ones_like(logits)
        return (meshes.columns(logits, labels.dtype) == labels).astype(jnp.float32)

    def standard_constant(self, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
        if self.label_kind == DISTRIBUTIONS:
            shares = constants.mean_constant(labels, weights)
        else:
            shares = np.bincount(labels[:, 0].astype(int), weights[:, 0], self.n_classes) / weights.sum()
        return constants.softmax_constant(shares, self._find_options())

    def outputs(self, logits: jax.Array) -> dict[str, Any]:
        return {
            "logits": logits,
            "probabilities": lambda: jax.nn.softmax(logits, axis=-1),
            "class_ids": lambda: jnp.argmax(logits, axis=-1, keepdims=True).astype(jnp.int32),
            **scoring.class_id_outputs(logits, self.n_classes),
        }

    def observe(self, labels: jax.Array, logits: jax.Array) -> dict[str, Observation]:
        if self.label_kind == DISTRIBUTIONS:
            return {"accuracy": Mean(stable.pick(self._as_shares(labels, logits), stable.first_argmax(logits)))}
        return {"accuracy": Mean(stable.is_argmax(logits, labels))}

    def sources(self, labels: jax.Array, logits: jax.Array) -> dict[str, Callable[[], Observation]]:
        n = self.n_classes
        names = tuple(self.label_vocabulary or ()) or tuple(f"class{k}" for k in range(n))

        def scores() -> Scores:
            shares = self._as_shares(labels, logits)
            return Scores(shares, stable.log_odds_of_each(logits), None, names=names, exclusive=True)

        def confusion() -> metrics.ConfusionTable:
            predicted = stable.first_argmax(logits)
            if self.label_kind == IDS:
                return metrics.ConfusionTable(labels, predicted, names)
            each = meshes.columns(logits, jnp.int32)
            return metrics.ConfusionTable(each, predicted + 0 * each, names, self._as_shares(labels, logits))

        def ranks() -> metrics.Ranks:
            if self.label_kind == IDS:
                return metrics.Ranks(stable.rank(logits, labels), n)
            whole = meshes.whole_rows(logits)
            return metrics.Ranks(stable.rank_each(whole), n, shares=self._as_shares(labels, whole))

        return {CONFUSION: confusion, RANKS: ranks, SCORES: scores}

    def class_names(self) -> tuple[str, ...]:
        return scoring.class_names(self.label_vocabulary, self.n_classes)

    def signatures(self, predictions: Any) -> dict[str, spec.ExportOutput]:
        return spec.classification_signatures(predictions, self.class_names())
