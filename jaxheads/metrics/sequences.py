"""Metrics that count whole sequences, not single steps."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxheads.metrics.base import CONFUSION, SCORES, Metric, Observation, at_threshold
from jaxheads.metrics.mean import Mean
from jaxheads.metrics.scored import check_share


@dataclasses.dataclass(frozen=True)
class ExactMatch(Metric):
    """`exact_match`, the share of sequences in which every step is right; undefined without sequences.

    A sequence is one entry of the first axis, with all steps along the next axes that exist and have a weight. Its
    weight is the mean weight of these steps. A step is right if the predicted class is the label, or if every entry of
    a row of scores is on the same side of z = 0 as its label (a soft label is rounded). Without axes between the first
    and the last, the metric is the accuracy of whole rows: the subset accuracy of a `MultiLabelHead`. The steps of a
    sequence must be on one device. The metric is refused beside a `bootstrap`, which draws steps one by one.

    Args:
        threshold: for rows of scores, a probability in (0, 1) in place of z = 0; the key is then
            `exact_match/positive_threshold_T`.

    Raises:
        ValueError: a head without decisions; a threshold outside (0, 1), or one for the largest of many logits.

    Source: `sklearn.metrics.accuracy_score` of multilabel rows, which is the same metric for rows.

    >>> import jax.numpy as jnp
    >>> import jaxheads as jh
    >>> head = jh.SequentialHeadWrapper(jh.MultiClassHead(3), "mask").with_metrics(jh.metrics.ExactMatch())
    >>> logits = jnp.eye(3)[jnp.array([[0, 1, 2], [1, 1, 0]])]
    >>> labels, mask = jnp.array([[0, 1, 0], [1, 2, 0]]), jnp.array([[1, 1, 0], [1, 1, 1]])
    >>> head.measure(labels=labels, logits=logits, features={"mask": mask}).compute()["exact_match"]
    0.5
    """

    threshold: float | None = None

    higher_is_better = True
    unit = "sequence"

    def __post_init__(self):
        if self.threshold is not None:
            check_share(self, "threshold", self.threshold, below=1.0)

    @property
    def _key(self) -> str:
        return "exact_match" if self.threshold is None else at_threshold("exact_match", self.threshold)

    def observe(  # pyright: ignore[reportIncompatibleMethodOverride]  # with `rows`, which metrics may ask for
        self, labels: Any, logits: jax.Array, sources: Mapping[str, Callable[[], Observation]], rows: Any
    ) -> Mapping[str, Observation]:
        right = self._find_right(sources)
        live = rows.weights > 0
        steps = jnp.any(live, axis=-1, keepdims=True)
        axes = tuple(range(1, right.ndim))
        wrong = jnp.any(live & ~right, axis=axes, keepdims=True)
        # The share of each step in its sequence.
        number = jnp.sum(steps.astype(jnp.float32), axis=axes, keepdims=True)
        share = steps.astype(jnp.float32) / jnp.maximum(number, jnp.ones_like(number))
        return {self._key: Mean(share * (~wrong).astype(jnp.float32), share)}

    def _find_right(self, sources: Mapping[str, Callable[[], Observation]]) -> jax.Array:
        """Returns which entries are right, `[..., 1]` or `[..., d]`."""
        if CONFUSION in sources:
            if self.threshold is not None:
                raise ValueError(
                    f"{self!r} has a threshold. This head predicts the class of the largest logit: leave it out."
                )
            made: Any = sources[CONFUSION]()
            if made.shares is not None:
                raise ValueError(f"{self!r} asks for one label a row. Given a head whose labels are distributions.")
            return made.right
        if SCORES in sources:
            made = sources[SCORES]()
            right = made.decide(self.threshold) == (jnp.asarray(made.labels, jnp.float32) > 0.5)
            return right & ~jnp.isnan(made.logits)
        raise ValueError(
            f"{self!r} reads the decisions of a head of classes. Given a head with {sorted(sources) or 'no sources'}."
        )

    def summarize(self, seen: Mapping[str, Any]) -> dict[str, Any]:
        return {self._key: seen[self._key].mean}
