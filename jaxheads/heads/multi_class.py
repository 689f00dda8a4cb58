"""One of n classes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxheads import losses, metrics, spec
from jaxheads.contract import LabelSpec
from jaxheads.heads import constants, loss_functions, scoring
from jaxheads.metrics import Mean, Observation, Scores
from jaxheads.metrics.base import CONFUSION, RANKS, SCORES
from jaxheads.numerics import inputs, meshes, stable, vocabulary


class MultiClassHead(loss_functions.AbstractLossFnHead):
    """Classification into one of `n_classes` classes.

    **Domain**: `labels` are integer class ids 0 ... n_classes - 1, `[D0, ..., DN, 1]` or `[D0, ..., DN]`. Eager calls
    and `encode_labels` also take the names of a `label_vocabulary`. One-hot and float labels are refused.

    **Link**: `P(y = k) = softmax(z)_k`.

    **loss** = `logsumexp(z) - z_y`, or `loss_fn`; `[..., 1]`.

    **Predictions**: `logits [..., n]`, `probabilities [..., n]`, `class_ids [..., 1]` (int32; the first of equal
    maxima), `all_class_ids [D0, n]`; `decode_predictions` adds `classes` and `all_classes`.
    **Metrics**: `average_loss`, `accuracy`, and `regularization_loss` if a regularization is given. All are float32.
    `with_metrics` adds metrics that read `"confusion"`, the confusion matrix; `"ranks"`, the rank of the label; or
    `"scores"`, for each class the log odds of its probability against all other classes.

    Args:
        n_classes: at least 3; for two use `BinaryClassHead`, or `binary_or_multi_class_head`.
        weight_column: a key of `features`, or a function `features -> weights`.
        label_vocabulary: the names of the classes.
        loss_reduction: a `Reduction` or its text.
        loss_fn: `loss_fn(labels, logits[, features])` returns one loss for each element, `[..., 1]`; its labels are
            int32 `[..., 1]`. Other arguments must be keyword-only with a default, or bound by `functools.partial`.
        name: is appended to the metric keys.

    Raises:
        ValueError: `n_classes` below 3; a vocabulary of another length; a `loss_fn` with other arguments or another
            result shape; labels that are not integers; labels out of range, or a name outside the vocabulary, in an
            unmasked row.

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

    higher_is_better = scoring.HIGHER_IS_BETTER

    def validate(self) -> None:
        n = self.n_classes
        if not inputs.is_integer(n, 3):
            raise ValueError(f"n_classes must be an integer > 2. Given: {n!r}. For two classes use BinaryClassHead().")
        vocabulary.check(self.label_vocabulary, n, "MultiClassHead")
        super().validate()

    @property
    def logits_dimension(self) -> int:
        return self.n_classes

    @property
    def label_spec(self) -> LabelSpec:
        return LabelSpec(1, "int", 0, self.n_classes - 1)

    def standard_losses(self, labels: jax.Array, logits: jax.Array) -> jax.Array:
        return losses.softmax_cross_entropy(labels, logits)

    def standard_constant(self, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
        shares = np.bincount(labels[:, 0].astype(int), weights[:, 0], self.n_classes) / weights.sum()
        return constants.log_constant(shares)

    def outputs(self, logits: jax.Array) -> dict[str, Any]:
        return {
            "logits": logits,
            "probabilities": lambda: jax.nn.softmax(logits, axis=-1),
            "class_ids": lambda: jnp.argmax(logits, axis=-1, keepdims=True).astype(jnp.int32),
            **scoring.class_id_outputs(logits, self.n_classes),
        }

    def observe(self, labels: jax.Array, logits: jax.Array) -> dict[str, Observation]:
        return {"accuracy": Mean(stable.is_argmax(logits, labels))}

    def sources(self, labels: jax.Array, logits: jax.Array) -> dict[str, Callable[[], Observation]]:
        n = self.n_classes
        names = tuple(self.label_vocabulary or ()) or tuple(f"class{k}" for k in range(n))

        def scores() -> Scores:
            one_hot = meshes.columns(logits, labels.dtype) == labels
            return Scores(one_hot, stable.log_odds_of_each(logits), None, names=names, exclusive=True)

        return {
            CONFUSION: lambda: metrics.ConfusionTable(labels, stable.first_argmax(logits), names),
            RANKS: lambda: metrics.Ranks(stable.rank(logits, labels), n),
            SCORES: scores,
        }

    def class_names(self) -> tuple[str, ...]:
        return scoring.class_names(self.label_vocabulary, self.n_classes)

    def signatures(self, predictions: Any) -> dict[str, spec.ExportOutput]:
        return spec.classification_signatures(predictions, self.class_names())
